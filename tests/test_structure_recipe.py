"""The source's recipe, tissues with room, intervals: what the pages of the structure chapter stand on."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.lab.judge import CARE, Question
from gears_nb.lab.power import Powered, interval, seen_table, smallest_visible
from gears_nb.models.batches import EmbeddedSlide, Run
from gears_nb.models.fit import fit_member
from gears_nb.structure.experiments import Fold, base_config, train_variant, variant
from gears_nb.structure.recipe import SOURCE, Recipe, Taught, mixed_batches, source
from gears_nb.structure.rungs import RUNGS
from gears_nb.structure.tissues import TISSUES, asked_on, present, room, run_on

SHORT = {"structure.train.epochs": 2, "structure.gate_pretrain": 2, "structure.guess_epochs": 2, "structure.minisets_per_epoch": 8, "structure.k_cand": 15,
         "structure.recycles": 2, "structure.miniset": 24}


def slides(count=2, n=60, d=6, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        xy = rng.random((n, 2))
        H = np.tanh(xy @ rng.normal(size=(2, d)) + 0.1 * rng.normal(size=(n, d)))
        out.append((H.astype(np.float32), xy))
    return out


FOLD = Fold("test", tuple(slides()), None, slides(1, seed=1)[0], "toy")
OURS_TAUGHT = {"structure.model": "gears_nb.structure.recipe:TaughtD7", "rung.sizes": ()}


def weights(model):
    return torch.cat([v.float().flatten() for v in model.state_dict().values()])


def test_under_our_settings_the_taught_model_is_the_rung():
    """What the recipe adds is silent where our settings ask for nothing of it: same weights, to the bit."""
    base = base_config("smoke", "d7", SHORT)
    a = train_variant(variant({}, base), FOLD, 0)
    b = train_variant(variant(OURS_TAUGHT, base), FOLD, 0)
    assert torch.equal(weights(a), weights(b))


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_has_a_taught_form(name):
    base = base_config("smoke", "d7")
    v = variant(source(name, sizes=(20, 30)) | {k: x for k, x in SHORT.items() if k != "structure.guess_epochs"}, base)
    model = train_variant(v, FOLD, 0)
    assert torch.isfinite(weights(model)).all() and isinstance(model, Taught)
    other = {f.name: getattr(v.rung, f.name) for f in dataclasses.fields(RUNGS[name])}
    assert other == {f.name: getattr(RUNGS[name], f.name) for f in dataclasses.fields(RUNGS[name])}


def test_the_first_guess_learns_only_where_it_was_not_taught_before():
    base = base_config("smoke", "d7", SHORT)
    tail = lambda diff: train_variant(variant(diff, base), FOLD, 0).refine.guess.out.weight
    start = lambda diff: tail(diff | {"structure.train.epochs": 0})
    joint = source("d7", sizes=()) | {k: x for k, x in SHORT.items() if k != "structure.guess_epochs"}
    assert not torch.equal(tail(joint), start(joint))
    assert torch.equal(tail(OURS_TAUGHT), start(OURS_TAUGHT))


def test_a_killed_two_stage_training_ends_in_the_same_weights(tmp_path):
    """The two halves have checkpoints of their own names; the second goes on with the ramp."""
    base = base_config("smoke", "d7")
    v = variant(source("d7", sizes=(20, 30), gate_training="two_stage") | SHORT | {"structure.train.epochs": 4, "structure.guess_epochs": 0}, base)
    c = dataclasses.replace(v.config.structure, train=dataclasses.replace(v.config.structure.train, progress=False))
    H, places = zip(*FOLD.train)
    fit = lambda loss=None, folder=None: fit_member(H, places, c, v.config.targets, rung=v.rung, **({"loss": loss} if loss else {}), checkpoints=folder)[0]
    whole, calls = fit(), []

    def dies(model, batch, epoch, rng):
        calls.append(epoch)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return model.losses(batch[0], batch[1], batch[1].mask, rng, epoch)

    with pytest.raises(KeyboardInterrupt):
        fit(dies, tmp_path)
    assert calls == [0, 0, 1, 1, 2, 2]  # two steps an epoch, two epochs a half: the second half counts on
    assert torch.equal(weights(fit(None, tmp_path)), weights(whole))


@given(st.lists(st.integers(8, 50), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_sizes_come_by_turns_on_every_slide(sizes, count, steps):
    run = Run(base_config("smoke", "d7", {"structure.minisets_per_epoch": 4 * steps}).structure, base_config("smoke").targets)
    parts = [EmbeddedSlide(*s) for s in slides(count, 40)]
    seen = [t.mask.shape[1] for _, t in mixed_batches(sizes)(parts, run, torch_rng(0, "test"))]
    assert seen == [min(40, sizes[step // count % len(sizes)]) for step in range(steps)]


def test_options_of_a_recipe_are_checked():
    base = base_config("toy")
    with pytest.raises(InputError, match="gate_trainin"):
        variant(source("d7", gate_trainin="frozen"), base)
    with pytest.raises(InputError, match="gate_training"):
        variant(source("d7", gate_training="sometimes"), base)
    with pytest.raises(InputError, match="no rung"):
        variant({"structure.model": "operator-vae"}, base)
    assert variant(source("v2"), base).config.structure.k_cand == SOURCE["structure.k_cand"]


def test_true_edges_are_refused_in_the_recipe_too():
    base = base_config("smoke", "d7", SHORT)
    model = train_variant(variant(source("d7", sizes=()) | SHORT, base), FOLD, 0).seal()
    H = torch.from_numpy(FOLD.test[0][None])
    with pytest.raises(InputError, match="true edges"):
        model(H, edges=torch.ones(1, 60, 60, dtype=torch.bool))


def test_rows_know_the_code_of_their_model():
    """Two models with the same choices at different addresses do not share rows."""
    base = base_config("smoke", "d7", SHORT)
    a, b = variant(OURS_TAUGHT, base), variant({"structure.model": "gears_nb.structure.recipe:Taught", "rung.sizes": ()}, base)
    assert dataclasses.asdict(a.rung) == dataclasses.asdict(b.rung) and isinstance(a.rung, Recipe)
    assert len({v.key(0, FOLD, "", "") for v in (a, b, variant({}, base))}) == 3


def test_tissues_are_named_and_absent_data_is_said(monkeypatch, capsys):
    with pytest.raises(InputError, match="heart"):
        present(["heart"])
    monkeypatch.setattr("gears_nb.structure.tissues.data_root", lambda: None)
    assert present(list(TISSUES)) == ["liver", "liver_network", "liver_crossslide"]
    assert "her2st_H is skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="GEARS_DATA"):
        present(["her2st_H"])


def test_questions_are_asked_of_each_tissue_on_its_own():
    """A change that helps on one tissue and harms on another must not average to nothing."""
    rng = np.random.default_rng(0)
    rows = [{"variant": v, "data": t, "fold": "f", "seed": s, "h_gate": 1 + (v == "new") * change + 0.001 * rng.normal()}
            for t, change in (("a", -0.2), ("b", 0.2)) for v in ("D7", "new") for s in range(4)]
    answers = asked_on({"is it better?": Powered(("new",), {"better": "yes", "worse": "no", "none": "not seen"})}, pd.DataFrame(rows))
    assert [v.outcome.partition(":")[0] for v in answers] == ["better", "worse"]
    assert all("95% interval" in v.outcome and "visible from" in v.outcome for v in answers)


def test_more_candidates_leave_less_room():
    values = [room(FOLD, (40,), k, minisets=4)[40] for k in (5, 15, 39)]
    assert values == sorted(values) and values[-1] == 1.0


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.floats(0.1, 10), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_an_interval_moves_and_stretches_with_its_values(values, scale, shift):
    low, high = interval(values)
    a, b = interval([scale * v + shift for v in values])
    assert np.allclose([a, b], [scale * low + shift, scale * high + shift], atol=1e-6)
    assert low <= np.mean(values) <= high


def test_the_smallest_visible_effect_shrinks_with_pairs_and_is_never_below_what_counts():
    sizes = [smallest_visible(1.0, n) for n in (2, 3, 5, 10, 100)]
    assert sizes == sorted(sizes, reverse=True) and abs(sizes[-1] - 0.28) < 0.01
    assert np.isnan(smallest_visible(1.0, 1))
    even = pd.DataFrame([{"variant": v, "seed": s, "h_gate": 1.0 + s} for v in ("D7", "same") for s in range(3)])
    assert seen_table(even, "D7").visible["same"] == pytest.approx(CARE * 2.0)


def test_a_powered_question_decides_as_the_plain_one():
    rng = np.random.default_rng(1)
    table = pd.DataFrame([{"variant": v, "seed": s, "h_gate": 1 + 0.05 * rng.normal()} for v in ("D7", "x", "y") for s in range(5)])
    says = {"better": "b", "worse": "w", "none": "n"}
    plain, powered = (kind(("x", "y"), says).verdict("?", table) for kind in (Question, Powered))
    assert powered.outcome.startswith(str(plain.outcome)) and powered.value == plain.value
    single = Powered(("x",), says).verdict("?", table[table.seed == 0])
    assert "95%" not in single.outcome and single.outcome.startswith("not decided")


def test_run_on_labels_rows_by_tissue():
    base = {"structure.train.epochs": 1, "structure.guess_epochs": 1, "structure.minisets_per_epoch": 4}
    table = run_on("test tissues", {"D7": {}}, ["liver", "her2st_H"], profile="smoke", diff=base, show=False)
    assert list(table.data) == ["liver", "her2st_H"] and table.h_gate.nunique() == 1
