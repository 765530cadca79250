"""presets: the table, rows without densifying, batches that never pair across slides, training, embedding, keeping and resuming."""
from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.data.preprocess import Preprocessor
from gears_nb.data.simulator import simulate
from gears_nb.encoder import presets
from gears_nb.encoder.presets import (
    PRESETS,
    Dealer,
    Places,
    Preset,
    coins,
    fit_preset,
    log_rows,
    preset_config,
    two_views,
)
from gears_nb.encoder.settings import NetworkConfig

seeds = st.integers(0, 2**32 - 1)
QUICK = {"epochs": 3, "batch": 64, "width": (16,), "dim": 8, "lr": 3e-3, "positives": 6, "inv_warmup": 0.0}


def quick(name: str) -> dict:
    "Seconds of training; a stem has to fit into the few dimensions."
    return QUICK | ({"stem": 4} if name == "network" else {"cells": [cells()]} if name == "kdd" else {})


def section(seed: int, n: int = 90, g: int = 30, shift: float = 0.0, name: str = "s") -> AnnData:
    "Sparse counts that vary smoothly over the unit square; `shift`: a slide-wide gene effect."
    rng = np.random.default_rng(seed)
    place = rng.random((n, 2))
    waves = np.random.default_rng(1).normal(size=(2, g)) * 4
    rate = np.exp(1 + np.cos(place @ waves) + shift * np.random.default_rng(seed + 99).normal(size=g))
    adata = AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.var_names = [f"g{i}" for i in range(g)]
    adata.obs["slide"] = name
    adata.obsm["spatial"] = place * 100
    return adata


@pytest.fixture(scope="module")
def slides() -> list[AnnData]:
    return [section(s, n=70 + 20 * s, shift=0.5, name=f"s{s}") for s in range(3)]


def cells(n: int = 80) -> AnnData:
    "Dissociated cells: a section without places, and with an effect of its own."
    adata = section(7, n=n, shift=1.0, name="sc")
    del adata.obsm["spatial"]
    return adata


def dealer(slides: list[AnnData], **changes) -> Dealer:
    config = dataclasses.replace(NetworkConfig(), **{"batch": 64, "positives": 6, **changes})
    prep = Preprocessor.fit(slides, slide_key=None)
    return Dealer([log_rows(prep, s, True) for s in slides], [Places(s.obsm["spatial"], config.positives) for s in slides], config)


# the table ------------------------------------------------------------------------------------------------------------


def test_presets_differ_where_the_log_says_and_nowhere_else():
    base = dataclasses.asdict(PRESETS["v3"])
    changes = {name: {k for k, v in dataclasses.asdict(config).items() if v != base[k]} for name, config in PRESETS.items()}
    assert changes == {"v3": set(), "v4": {"coral_weight"}, "v5": {"centred"}, "vicreg_only": {"nce_weight"},
                       "kdd": {"nce_weight", "scale_weight", "adversary_weight", "adversary", "adversary_warmup"},
                       "network": {"centred", "context", "stem", "gene_gain", "dropout", "n_hvg", "scale_weight", "inv_warmup"}}
    assert base["nce_weight"] == base["scale_weight"] == 5.0 and base["train"]["lr"] == 1e-4 and base["train"]["epochs"] == 1200
    assert base["lambda_var"] == 50.0 and base["inv_warmup"] == 0.3 and base["width"] == (512, 256) and base["dim"] == 128


@pytest.mark.parametrize(("name", "changes", "hint"), [("v55", {}, "did you mean 'v5'"), ("v5", {"epoch": 3}, "did you mean 'epochs'"), ("zzzz", {}, "choose one of v3"),
                                                       ("v5", {"batch": 0}, "outside"), ("v5", {"lr": "fast"}, "type")])
def test_misspelt_names_and_bad_values_are_refused(name, changes, hint):
    with pytest.raises(InputError, match=hint):
        preset_config(name, **changes)


# rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_sparse_rows_equal_dense_rows(slides, monkeypatch, centred):
    prep = Preprocessor.fit(slides, n_hvg=20, slide_key=None)
    index = torch.tensor([5, 0, 5, 69])
    dense = log_rows(prep, slides[0], centred)
    monkeypatch.setattr(presets, "DENSE_ENTRIES", 0)
    sparse = log_rows(prep, slides[0], centred)
    assert sparse.sparse and not dense.sparse and len(sparse) == len(dense) == 70
    torch.testing.assert_close(sparse.take(index), dense.take(index))
    assert dense.take(index).shape == (4, 20)


def test_centred_rows_are_those_of_the_preprocessor_and_raw_rows_keep_the_slide(slides):
    prep, every = Preprocessor.fit(slides, slide_key=None), torch.arange(70)
    np.testing.assert_allclose(log_rows(prep, slides[0], True).take(every), prep.transform(slides[0], add_global=False), atol=1e-5)
    raw = [log_rows(prep, s, False) for s in slides]
    means = torch.stack([r.take(torch.arange(len(r))).mean(0) for r in raw])
    assert means.abs().max() > 0.1  # slide effects are still there
    weights = torch.tensor([float(len(r)) for r in raw])
    torch.testing.assert_close((weights[:, None] * means).sum(0), torch.zeros(30), atol=1e-3, rtol=0)


def test_a_hundred_thousand_sparse_cells_are_never_dense():
    n, g, each, rng = 100_000, 500, 20, np.random.default_rng(0)
    column = rng.integers(0, g // each, (n, each), dtype=np.int32) + np.arange(0, g, g // each, dtype=np.int32)
    counts = rng.integers(1, 6, n * each).astype(np.float32)
    cells = AnnData(sp.csr_matrix((counts, column.ravel(), np.arange(0, n * each + 1, each)), (n, g)))
    cells.var_names = [f"g{i}" for i in range(g)]
    train = cells[:60].copy()
    train.obsm["spatial"] = rng.random((60, 2))
    preset = fit_preset("v5", [train], epochs=1, batch=64, width=(8,), dim=4, positives=4)
    dense, start = 4 * n * g, time.process_time()
    tracemalloc.start()
    prep = Preprocessor.fit([cells], slide_key=None)
    fitted = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    (H,) = preset.embed([cells])
    embedded = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert prep.genes == preset.preprocessor.genes and H.shape == (n, 4) and np.isfinite(H).all()
    assert fitted < 0.75 * dense and embedded < 0.75 * dense
    assert time.process_time() - start < 10


# pairs ----------------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_an_epoch_shows_every_spot_once_and_pairs_never_cross_slides(seed):
    some = [section(s, n=40 + 30 * s) for s in range(3)]
    deal = dealer(some)
    offset, seen = (0, 40, 110), []
    for parts in zip(*(torch.tensor_split(p.tiles(4, torch_rng(seed)), deal.steps) for p in deal.places)):
        batch = deal.batch(parts, torch_rng(seed))
        assert batch["slide"].tolist() == [s for s, part in enumerate(parts) for _ in part]
        for s, (part, positive, far) in enumerate(zip(parts, batch["positive"], batch["far"])):
            has = (positive >= 0).nonzero()[:, 0]
            assert len(positive) == len(part) and far.shape == (len(part), len(part)) and torch.equal(far, far.T)
            near = deal.places[s].near[part[has]]  # numbers of spots of this very slide
            assert (near == part[positive[has], None]).any(1).all() and (part[has] != part[positive[has]]).all()
            seen.append(part + offset[s])
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(210))


def test_positives_are_physical_neighbours_and_neighbours_never_repel():
    t = 2 * np.pi * np.arange(60) / 60
    place = Places(np.stack([np.cos(t), np.sin(t)], 1), 6)
    part = torch.randperm(60, generator=torch_rng(0))
    positive, far = presets._pairs(place, part, torch_rng(1))
    steps = lambda i, j: torch.minimum((i - j) % 60, (j - i) % 60)
    assert ((steps(part, part[positive]) >= 1) & (steps(part, part[positive]) <= 3)).all()
    apart = steps(part[:, None], part[None])
    assert not far[apart <= 5].any() and far[apart >= 8].all()


def test_every_neighbour_in_the_batch_may_be_the_positive():
    place = Places(np.random.default_rng(0).random((30, 2)), 5)
    part, rng = torch.arange(30), torch_rng(0)
    drawn = torch.stack([presets._pairs(place, part, rng)[0] for _ in range(200)])
    for i in range(30):
        assert set(drawn[:, i].tolist()) == set(place.near[i].tolist())


def test_a_spot_without_a_neighbour_in_the_batch_has_no_positive():
    line = Places(np.stack([np.arange(40.0), np.zeros(40)], 1), 2)
    positive, _ = presets._pairs(line, torch.tensor([0, 1, 20]), torch_rng(0))
    assert positive.tolist() == [1, 0, -1]


def test_tiles_keep_neighbours_together_whatever_the_unit():
    xy = np.random.default_rng(0).random((400, 2))
    order = Places(xy, 6).tiles(4, torch_rng(0))
    torch.testing.assert_close(order, Places(xy * 1024, 6).tiles(4, torch_rng(0)))
    step = np.linalg.norm(np.diff(xy[order], axis=0), axis=1)
    assert np.median(step) < 0.3 * np.median(np.linalg.norm(xy[1:] - xy[:-1], axis=1))


def test_bad_coordinates_are_refused():
    with pytest.raises(InputError, match="spatial"):
        Places(np.full((10, 2), np.nan), 3)
    with pytest.raises(InputError, match="spatial"):
        Places(np.zeros((3, 2)), 3)


def test_infonce_feels_no_spot_of_another_slide(slides):
    deal = dealer(slides)
    batch = next(deal.epoch(torch_rng(0)))
    z = torch.randn(len(batch["x"]), 5, generator=torch_rng(1)).requires_grad_()
    w = torch.randn(len(batch["x"]), 5, generator=torch_rng(2)).requires_grad_()
    sizes, n = [len(p) for p in batch["positive"]], len(slides)
    for s in range(n):
        only = [p if i == s else torch.full_like(p, -1) for i, p in enumerate(batch["positive"])]
        grads = torch.autograd.grad(presets.infonce_by_slide(z, w, only, batch["far"], 0.1), [z, w])
        for i in range(n):
            moved = [float(g.split(sizes)[i].abs().sum()) for g in grads]
            assert all(m > 0 for m in moved) if i == s else moved == [0, 0]
    parts = [presets.infonce_by_slide(a, b, [p], [f], 0.1) for a, b, p, f in zip(z.split(sizes), w.split(sizes), batch["positive"], batch["far"])]
    counts = [int((p >= 0).sum()) for p in batch["positive"]]
    whole = presets.infonce_by_slide(z, w, batch["positive"], batch["far"], 0.1)
    torch.testing.assert_close(whole, sum(c * p for c, p in zip(counts, parts)) / sum(counts))


# views ----------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.floats(0, 1))
def test_coins_have_the_asked_shape_and_limits(seed, n, g, drop):
    heads = coins(torch_rng(seed), (n, g), drop)
    assert heads.shape == (n, g) and heads.dtype == torch.bool
    assert coins(torch_rng(seed), (n, g), 0.0).all() and coins(torch_rng(seed), (80, 80), drop).float().mean() == pytest.approx(1 - drop, abs=0.03)
    assert coins(torch_rng(seed), (80, 80), 1.0).float().mean() < 0.02


def test_the_two_views_differ_and_only_by_what_is_on():
    x, off = torch.ones(50, 40), {"gene_dropout": 0.0, "noise": 0.0, "scale_jitter": 0.0}
    view = lambda **on: two_views(x, NetworkConfig(**(off | on)), 2.0, torch_rng(0))
    assert torch.equal(view(), x.repeat(2, 1))
    dropped = view(gene_dropout=0.25)
    assert set(dropped.unique().tolist()) == {0.0, 1.0} and float(dropped.mean()) == pytest.approx(0.75, abs=0.03)
    assert not torch.equal(*dropped.chunk(2))
    assert float((view(noise=0.1) - 1).std()) == pytest.approx(0.2, rel=0.05)
    depth = view(scale_jitter=0.1)
    assert (depth.std(1) < 1e-6).all() and float(depth[:, 0].log().std()) == pytest.approx(0.1, rel=0.25)


def test_windows_are_runs_of_the_pool_and_every_one_comes_up():
    rows = presets.windows(torch_rng(0), torch.arange(12), 2000, 5)
    assert torch.equal(rows, rows[:, :1] + torch.arange(5)) and rows[:, 0].unique().tolist() == list(range(8))


def test_the_noise_of_a_batch_is_normal_and_independent_within_rows_and_across_views():
    noise = two_views(torch.zeros(300, 200), NetworkConfig(noise=1.0, gene_dropout=0.0, scale_jitter=0.0), 1.0, torch_rng(0))
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float((noise**4).mean()) == pytest.approx(3, abs=0.15)
    first, second = noise.chunk(2)
    assert abs(float((first * second).mean())) < 0.02 and abs(float((noise[:, 1:] * noise[:, :-1]).mean())) < 0.02
    assert len(noise[:, 0].unique()) > 0.98 * len(noise)  # rows read from different places


# training and embedding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_embeds_a_slide_it_never_saw(name, slides):
    preset = fit_preset(name, slides[:2], **quick(name))
    H = preset.embed(slides)
    assert [h.shape for h in H] == [(s.n_obs, 8) for s in slides] and all(np.isfinite(h).all() and h.dtype == np.float32 for h in H)
    paid = set(preset.history.rows[0]) & {"nce", "scale", "coral", "mmd", "adversary"}
    assert paid == {"v3": {"nce", "scale"}, "v4": {"nce", "scale", "coral"}, "v5": {"nce", "scale"}, "vicreg_only": {"scale"}, "kdd": {"adversary"}, "network": {"nce"}}[name]
    assert len(preset.history.rows) == 3 and preset.history.rows[-1]["loss"] < preset.history.rows[0]["loss"]


def test_same_seed_same_bits_and_the_global_stream_does_not_matter(slides):
    torch.manual_seed(1)
    first = fit_preset("v5", slides, seed=3, **QUICK).embed(slides)
    torch.manual_seed(2)
    again, other = (fit_preset("v5", slides, seed=s, **QUICK).embed(slides) for s in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and not np.array_equal(first[0], other[0])


def test_the_input_is_not_touched_and_blocks_do_not_matter(slides):
    before = [s.X.copy() for s in slides]
    preset = fit_preset("v3", slides, **QUICK)
    np.testing.assert_allclose(preset.embed(slides, block=7)[1], preset.embed(slides)[1], atol=1e-5)
    assert all((a != s.X).nnz == 0 for a, s in zip(before, slides))


def test_a_centred_preset_does_not_feel_a_gain_of_the_log_expression_and_a_raw_one_does(slides):
    centred, raw = (fit_preset(name, slides, **QUICK) for name in ("v5", "v3"))
    log = AnnData(np.asarray(centred.preprocessor.log_normalised(slides[0])))
    log.var_names = slides[0].var_names
    moved = log.copy()
    moved.X = log.X + np.random.default_rng(0).normal(size=30).astype(np.float32)
    as_is = lambda p: dataclasses.replace(p, preprocessor=dataclasses.replace(p.preprocessor, target_sum=None))
    gap = {p.name: np.abs(np.subtract(*as_is(p).embed([log, moved]))).max() for p in (centred, raw)}
    assert gap["v5"] < 1e-4 and gap["v3"] > 0.1


def test_coordinates_choose_pairs_and_nothing_else(slides):
    moved = [s.copy() for s in slides]
    for s in moved:
        s.obsm["spatial"] = s.obsm["spatial"] * 1024 + 0.0
    assert all(np.array_equal(a, b) for a, b in zip(fit_preset("v5", slides, **QUICK).embed(slides), fit_preset("v5", moved, **QUICK).embed(slides)))
    blind = [s.copy() for s in slides]
    for s in blind:
        s.obsm["spatial"] = np.random.default_rng(0).random((s.n_obs, 2))
    preset = fit_preset("v5", blind, **QUICK)
    for s in blind:
        del s.obsm["spatial"]
    assert len(preset.embed(blind)) == 3  # cells without coordinates can be embedded


LOSSES = {"v3": (81.896797, 80.225766), "v4": (82.104591, 80.528048), "v5": (81.253601, 80.035442), "vicreg_only": (67.543478, 66.794437), "kdd": (68.353485, 67.348151)}


@pytest.mark.parametrize("name", LOSSES)
def test_the_stack_that_presets_share_with_the_network_leaves_their_numbers_alone(name):
    "Losses of two passes as they were before presets and network became one stack; the tolerance is for other processors."
    slides = simulate("tiny", seed=0).slides[:-1]
    as_it_was = {"adversary": "slide", "adversary_warmup": 0.0} if name == "kdd" else {}
    assert fit_preset(name, slides, epochs=2, batch=64, **as_it_was).history.column("loss") == pytest.approx(LOSSES[name], rel=1e-5)


def test_context_and_stem_are_options_of_the_same_network(slides):
    preset = fit_preset("network", slides, **quick("network"))
    assert preset.encoder.axes.shape == (3 * 30, 4) and preset.encoder.body[-1].out_features == 4
    assert fit_preset("v5", slides, **QUICK).encoder.axes is None
    with_stem = fit_preset("v3", slides, **QUICK | {"stem": 3})
    (H,), X = with_stem.embed(slides[:1]), log_rows(with_stem.preprocessor, slides[0], False).take(torch.arange(70))
    np.testing.assert_allclose(H[:, :3], with_stem.encoder.stem(X), atol=1e-5)
    critic = fit_preset("network", slides, **quick("network") | {"adversary_weight": 1.0, "coral_weight": 1.0, "mmd_weight": 1.0})
    assert {"adversary", "coral", "mmd"} <= set(critic.history.rows[0])  # alignment acts on the learned half


# the critic of kinds ------------------------------------------------------------------------------------------------------


def test_a_critic_of_kinds_wants_both_kinds(slides):
    with pytest.raises(InputError, match="adversary.*one kind"):
        fit_preset("kdd", slides, **QUICK)
    assert "adversary" in fit_preset("kdd", slides, **QUICK, adversary="slide").history.rows[0]


def test_cells_need_no_places_and_their_places_are_not_read(slides):
    bare, placed = cells(), cells()
    placed.obsm["spatial"] = np.random.default_rng(0).random((placed.n_obs, 2))
    first, second = (fit_preset("v5", slides, cells=[c], **QUICK).embed(slides) for c in (bare, placed))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))  # with InfoNCE: cells are in no pair


def test_only_the_encoder_feels_the_warm_up(slides):
    mixed = dealer([*slides, section(7, n=80)], adversary_weight=1.0, adversary="kind", adversary_warmup=0.5, width=(16,), dim=8)
    mixed.places[-1], mixed.cells = presets.Scattered(80), torch.tensor([0, 0, 0, 1])
    batch = next(mixed.epoch(torch_rng(0)))
    assert torch.equal(batch["kind"], (batch["slide"] == 3).long()) and (batch["positive"][-1] == -1).all() and not batch["far"][-1].any()
    torch.manual_seed(0)
    student = presets.Student(presets.new_encoder(mixed.config, 30), 2, mixed.config)
    slope = {}
    for progress in (0.0, 0.25, 0.5, 0.9):
        loss = presets.critic_loss(student, torch.full((len(batch["x"]), 8), np.nan), batch, mixed.config, progress)  # the augmented view plays no part
        slope[progress] = torch.autograd.grad(loss, [student.encoder.body[0].weight, student.critic.body[0].weight])
    assert not slope[0.0][0].any() and torch.allclose(slope[0.25][0], slope[0.5][0] / 2) and torch.equal(slope[0.5][0], slope[0.9][0])
    assert all(torch.equal(slope[0.0][1], s[1]) for s in slope.values())


def test_the_critic_mixes_spots_and_cells():
    some = [section(0, n=120), section(1, n=120)]
    from gears_nb.encoder.probes import slide_accuracy
    longer = QUICK | {"epochs": 60, "cells": [cells(120)], "noise": 0.0, "gene_dropout": 0.1}
    told = {}
    for weight in (0.0, 20.0):
        H = fit_preset("kdd", some, **longer, adversary_weight=weight).embed([*some, cells(120)])
        told[weight] = slide_accuracy(np.concatenate(H), ["spots"] * 240 + ["cells"] * 120)
    assert told[20.0] < told[0.0]


def test_infonce_is_what_brings_physical_neighbours_together():
    some = [section(0, n=150), section(1, n=150)]
    longer = QUICK | {"epochs": 40}
    from gears_nb.geometry.neighbours import neighbour_recall

    recall = {name: np.mean([neighbour_recall(h, s.obsm["spatial"], 10) for h, s in zip(fit_preset(name, some, **longer).embed(some), some)])
              for name in ("v5", "vicreg_only")}
    assert recall["v5"] > 1.2 * recall["vicreg_only"]


def test_the_invariance_weight_rises(slides):
    warm = fit_preset("v5", slides, **(QUICK | {"inv_warmup": 1.0, "epochs": 4}))
    row = warm.history.rows[0]
    assert row["loss"] == pytest.approx(50 * row["var"] + row["cov"] + 5 * row["nce"] + 5 * row["scale"], rel=1e-5)
    row = warm.history.rows[2]
    assert row["loss"] == pytest.approx(12.5 * row["inv"] + 50 * row["var"] + row["cov"] + 5 * row["nce"] + 5 * row["scale"], rel=1e-5)


def test_an_empty_list_is_refused_and_one_small_slide_is_enough():
    with pytest.raises(InputError, match="slides"):
        fit_preset("v5", [])
    tiny = section(0, n=6)
    for name in PRESETS:
        assert np.isfinite(fit_preset(name, [tiny], **quick(name)).embed([tiny])[0]).all()


# keeping --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_its_folder_bit_by_bit(name, slides, tmp_path):
    preset = fit_preset(name, slides[:2], **quick(name) | {"n_hvg": 20})
    back = Preset.load(preset.save(tmp_path / "deep" / "er"))
    assert (back.name, back.config, back.history, back.preprocessor.genes) == (name, preset.config, preset.history, preset.preprocessor.genes)
    assert all(np.array_equal(a, b) for a, b in zip(back.embed(slides), preset.embed(slides)))
    assert not back.encoder.training
    assert {p.suffix for p in (tmp_path / "deep" / "er").iterdir()} == {".json", ".safetensors"}


def _cut(folder):
    data = next(folder.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-9])


def _record(folder, change):
    path = folder / "preset.json"
    record = json.loads(path.read_text())
    change(record["meta"])
    path.write_text(json.dumps(record))


DAMAGE = {"no folder": shutil.rmtree, "no weights": lambda f: next(f.glob("*.safetensors")).unlink(), "cut weights": _cut,
          "half a record": lambda f: (f / "preset.json").write_text('{"format": 1, "tens'), "no config": lambda f: _record(f, lambda m: m.pop("config")),
          "an unknown field": lambda f: _record(f, lambda m: m["config"].update(speed=3)), "another width": lambda f: _record(f, lambda m: m["config"].update(width=[9])),
          "a value out of range": lambda f: _record(f, lambda m: m["config"].update(batch=0)), "a gene less": lambda f: _record(f, lambda m: m["preprocessor"]["genes"].pop()),
          "a list for the genes": lambda f: _record(f, lambda m: m.update(preprocessor=[1])), "no history": lambda f: _record(f, lambda m: m.update(history=None))}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_an_input_error_in_one_line(damage, slides, tmp_path):
    folder = fit_preset("v5", slides[:1], **QUICK).save(tmp_path / "kept")
    damage(folder)
    with pytest.raises(InputError) as caught:
        Preset.load(folder)
    assert "\n" not in str(caught.value) and "Remedy" in str(caught.value)


class Killed(BaseException):
    "What a kill looks like from inside: nothing catches it."


def dies_in_step(monkeypatch, step: int):
    "Let the `step`-th batch of the next training die."
    whole, seen = presets.encoder_loss, itertools.count()
    monkeypatch.setattr(presets, "encoder_loss", lambda *a: whole(*a) if next(seen) != step else (_ for _ in ()).throw(Killed))


@pytest.mark.parametrize(("name", "step"), [("v5", 0), ("v5", 5), ("v4", 13), ("kdd", 18)])
def test_killed_and_resumed_gives_the_numbers_of_an_uninterrupted_run(name, step, slides, tmp_path, monkeypatch):
    settings = QUICK | {"epochs": 5, "dropout": 0.1, "inv_warmup": 0.4} | ({"cells": [cells(10)]} if name == "kdd" else {})  # 4 batches to an epoch
    whole = fit_preset(name, slides, seed=7, **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_in_step(patch, step)
        fit_preset(name, slides, seed=7, checkpoint=tmp_path / "run", **settings)
    resumed = fit_preset(name, slides, seed=7, checkpoint=tmp_path / "run", **settings)
    assert resumed.history.resumed_from == step // 4 and len(resumed.history.rows) == 5
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in resumed.history.rows] == [{k: v for k, v in r.items() if k != "seconds"} for r in whole.history.rows]
    assert all(torch.equal(a, b) for a, b in zip(resumed.encoder.state_dict().values(), whole.encoder.state_dict().values()))
    assert all(np.array_equal(a, b) for a, b in zip(resumed.embed(slides), whole.embed(slides)))
    again = fit_preset(name, slides, seed=7, checkpoint=tmp_path / "run", **settings)  # finished: only read
    assert again.history.resumed_from == 5 and np.array_equal(again.embed(slides)[0], whole.embed(slides)[0])


def test_a_checkpoint_of_other_slides_settings_or_seed_is_refused(slides, tmp_path):
    fit_preset("v5", slides, checkpoint=tmp_path / "run", **QUICK)
    moved = [s.copy() for s in slides]
    moved[0].obsm["spatial"] = moved[0].obsm["spatial"] + np.array([[0.0, 1.0]])
    for name, some, changes in (("v5", moved, {}), ("v5", slides[:2], {}), ("v5", slides, {"seed": 1}), ("v5", slides, {"noise": 0.2}), ("v3", slides, {})):
        with pytest.raises(InputError, match="another"):
            fit_preset(name, some, checkpoint=tmp_path / "run", **(QUICK | changes))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        fit_preset("v5", slides, checkpoint=tmp_path / "run", **QUICK)
