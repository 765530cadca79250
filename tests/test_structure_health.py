"""What the readiness lists ask of a trained model: closed forms of clumping, terms of attention, other candidates, the watched training."""
import dataclasses

import numpy as np
import pytest
import torch

from gears_nb.core.seeding import torch_rng
from gears_nb.core.store import Store
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.models.contract import mean_energy
from gears_nb.models.fit import fit_member
from gears_nb.models.trace import AttentionTrace
from gears_nb.structure import experiments as lab
from gears_nb.structure import health
from gears_nb.structure.readiness import held_out_rows, judge


def fold(seed=0, name="noise"):
    rng = np.random.default_rng(seed)
    source = lambda: (rng.normal(size=(80, 6)).astype(np.float32), rng.random((80, 2)))
    return lab.Fold(name, (source(), source()), None, source())


@pytest.fixture(scope="module")
def small():
    """A hardly trained model, its exam and its settings."""
    config = lab.base_config("smoke", diff={"structure.guess_epochs": 1, "structure.train.epochs": 2, "structure.minisets_per_epoch": 8})
    v, made = lab.variant({}, config), fold()
    exam = lab.evaluation_set(made.test, lab.EvaluationSettings.of(config, 4))
    return fit_member(*zip(*made.train), v.config.structure, v.config.targets, rung=v.rung)[0], exam, v, made


@pytest.mark.parametrize("n, aspect", [(64, 1.0), (256, 1.0), (128, 0.3)])
def test_independent_cells_are_as_close_as_the_formula_says(n, aspect):
    """A disc squeezed to another aspect; borders and the finite number leave a few per cent."""
    X = gauge_fix(health.scatter(150, n, torch_rng(n, "test")) * torch.tensor([1.0, aspect**0.5]))
    border = 2 / n**0.5  # a cell at the border has fewer others around it
    assert lab.health(X)["nearest"].mean() == pytest.approx(health.independent_nearest(n, aspect), rel=border)
    assert health.clumping(X).mean() == pytest.approx(1.0, abs=border)


def test_clumping_tells_lattice_chance_and_clumps():
    """A lattice is far above one, pairs that coincide far below; rotation, scale of the slide and padding do not matter."""
    line = torch.arange(8.0)
    lattice = gauge_fix(torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(1, 64, 2))
    pairs = gauge_fix(health.scatter(1, 32, torch_rng(0, "test")).repeat_interleave(2, 1))
    assert health.clumping(lattice).item() > 2.5 > 1 > 0.05 > health.clumping(pairs).item()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert health.clumping(gauge_fix(5 * lattice @ turn)).item() == pytest.approx(health.clumping(lattice).item(), rel=1e-4)
    padded, mask = torch.cat([lattice, torch.zeros(1, 7, 2)], 1), torch.arange(71)[None] < 64
    assert health.clumping(padded, mask).item() == pytest.approx(health.clumping(lattice).item(), rel=1e-4)


@pytest.mark.parametrize("n", [40, 128])
def test_independent_layouts_pass_the_fair_level(n):
    """Fresh draws: about 99 of a hundred reach it, and it is below what a typical one has."""
    fresh = health.clumping(health.scatter(300, n, torch_rng(7, "test")))
    assert (fresh >= health.fair_level(n)).float().mean() >= 0.96 and health.fair_level(n) < fresh.median()
    assert health.fair_level(n) == health.fair_level(n)


def test_attention_and_its_terms():
    """Rank correlation within rows, self-edges aside; a term that is not there is not a number."""
    row, col = np.divmod(np.arange(25, dtype=np.int32), 5)
    up = np.tile(np.arange(5.0), (5, 1))
    np.fill_diagonal(up, 100.0)
    given = AttentionTrace(row, col, up.reshape(1, 1, 25), {"qk": np.exp(np.tile(np.arange(5.0), 5)).reshape(1, 1, 25), "gate": -up.reshape(1, 1, 25)}, np.zeros((2, 5, 2)))
    assert health.term_correlation(given, "qk", 0) == pytest.approx(1.0) and health.term_correlation(given, "gate", -1) == pytest.approx(-1.0)
    assert np.isnan(health.term_correlation(given, "geo", 0))


def test_other_candidates_leave_the_model_as_it_was(small):
    model, exam, v, _ = small
    before, kept = lab.measure(model, exam), model.config
    at = health.energies_at(model, exam, (v.config.structure.k_cand, 30))
    assert at[f"k {v.config.structure.k_cand}"] == pytest.approx(before["h_gate"], rel=1e-4) and at["k 30"] != pytest.approx(before["h_gate"], rel=1e-6)
    assert model.config is kept and lab.measure(model, exam) == before
    with pytest.raises(ZeroDivisionError), health.with_candidates(model, 30):
        raise ZeroDivisionError
    assert model.config is kept


def test_columns_of_the_lists(small):
    """Every recycle is within the two limits of its spread, shares are shares, and a model that keeps no record has no correlations."""
    model, exam, _, _ = small
    plain, own = lab.measure(model, exam), health.measure_lists(model, exam)
    for spread in (plain["logit_std"], plain["logit_std_first"]):
        assert own["logit_low"] - 1e-4 <= spread <= own["logit_high"] + 1e-4
    assert 0 <= own["fair_ok"] <= 1 and 0 <= own["aspect10_ok"] <= 1 and own["aspect10_ok"] >= plain["aspect_ok"] and abs(own["rho_qk"]) <= 1
    model.explain = lambda *_, **__: None
    assert np.isnan(health.correlations(model, exam)["rho_gate"])
    del model.explain


def test_watching_a_training_does_not_change_it(small):
    """The last value of the curve is the energy of the model that nobody watched, to the last bit."""
    model, exam, v, made = small
    curve = health.validation_curve(v, made, 0, exam)
    assert len(curve) == 2 and curve[-1] == mean_energy(model, [(H, t) for H, _, t in exam.batches])


def test_rows_of_two_folds_are_kept(tmp_path, small):
    """The plan: every fold and seed, fewer on later folds, retrained sizes and watched trainings on the first; a second call computes nothing."""
    config = dataclasses.replace(small[2].config, profile="smoke")
    asked = dict(seeds=range(2), fewer=1, watched=1, more=(33,), jobs=1, store=Store(tmp_path))
    made = [fold(0, "a"), fold(1, "b")]
    table = held_out_rows(made, config, **asked)
    k = config.structure.k_cand
    plan = {"model": 3, f"k {round(1.25 * k)}": 3, f"k {round(1.5 * k)}": 3, f"retrained k {round(0.75 * k)}": 1, f"retrained k {round(1.25 * k)}": 1, "longer": 1}
    assert table.variant.value_counts().to_dict() == plan and table[table.variant == "model"]["k 33"].notna().all()
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again = held_out_rows(made, config, **asked)
    assert again.equals(table) and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == stamps
    told = {f.key: f for f in judge(table)}
    assert told["k"].numbers["lists"]["first"]["pass"] is not None and told["overlap"].numbers["value"] is not None and told["seeds"].numbers["value"] > 0
