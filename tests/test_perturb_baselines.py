"""Baselines of perturbation effects: leave-one-out, fallbacks and their words, neighbours, against independent implementations."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.perturb.baselines import PENALTIES, PLAIN, fit_linear, learn, population, predict_deltas
from gears_nb.perturb.descriptors import Descriptors
from gears_nb.perturb.prepare import Deltas
from gears_nb.perturb.screens import Conditions

NONE = np.nan
WORDS = {"perturbation", "parts", "descriptor", "line", "mean", "nothing"}


def asked(rows):
    line, name, dose = zip(*rows)
    return Conditions(np.array(line), np.array(name), np.array(dose, float))


def taught(rows, delta):
    delta = np.asarray(delta, np.float32).reshape(len(rows), -1)
    return Deltas(asked(rows), delta, np.full(len(rows), 9), np.full(len(rows), 9), np.ones(delta.shape[1]))


def table(rng, lines=3, drugs=8, genes=5):
    rows = [(f"L{i}", f"d{j}", NONE) for i in range(lines) for j in range(drugs)]
    effect, shift = rng.normal(size=(drugs, genes)), rng.normal(size=(lines, genes))
    return rows, np.stack([effect[int(p[1])] + shift[int(line[1])] for line, p, _ in rows]), effect, shift


@given(st.integers(0, 10**6), st.integers(5, 14), st.integers(1, 9), st.integers(1, 3))
def test_leave_one_out_is_brute_force(seed, n, d, k):
    rng = np.random.default_rng(seed)
    X, free, Y = rng.normal(size=(n, d)), np.column_stack([np.ones(n), rng.normal(size=n)]), rng.normal(size=(n, k))
    penalties = (0.03, 1.0, 40.0)
    fit, Z, ridge = fit_linear(X, free, Y, penalties), np.hstack([X, free]), np.array([1.0] * d + [0, 0])
    errors = []
    for penalty in penalties:
        wrong = []
        for i in range(n):
            kept = np.arange(n) != i
            wrong.append(Y[i] - Z[i] @ np.linalg.solve(Z[kept].T @ Z[kept] + np.diag(penalty * ridge), Z[kept].T @ Y[kept]))
        errors.append(np.mean(np.square(wrong)))
    assert np.allclose(fit.errors, errors, rtol=1e-6)
    full = np.linalg.solve(Z.T @ Z + np.diag(fit.penalty * ridge), Z.T @ Y)
    assert np.allclose(fit.weights, full[:d], atol=1e-8) and np.allclose(fit.free, full[d:], atol=1e-8)


def test_ridge_is_sklearns_on_the_same_columns(rng):
    from sklearn.linear_model import RidgeCV

    rows, delta, *_ = table(rng)
    known = Descriptors(np.array([f"d{j}" for j in range(9)]), rng.normal(size=(9, 4)).astype(np.float32))
    wanted = asked([("L0", "d8", NONE), ("L2", "d3", NONE), ("new", "d8", NONE)])
    found, used = predict_deltas("ridge", taught(rows, delta), wanted, known)
    unit = np.sqrt(np.square(known.values[:8]).sum(1).mean())
    columns = lambda those: np.array([[*(known.values[int(p[1])] / unit), *(float(line == f"L{i}") for i in range(3))] for line, p, _ in those])
    outside = RidgeCV(alphas=PENALTIES).fit(columns(rows), delta)
    assert np.allclose(found, outside.predict(columns(zip(wanted.line, wanted.perturbation, wanted.dose))), atol=1e-5) and set(used) == {"descriptor"}


@given(st.integers(0, 10**6))
def test_additive_recovers_an_additive_table(seed):
    rng = np.random.default_rng(seed)
    rows, delta, effect, shift = table(rng)
    out = [3, 12, 22]  # one in each line; every drug keeps two
    kept = [i for i in range(len(rows)) if i not in out]
    found, used = predict_deltas("additive", taught([rows[i] for i in kept], delta[kept]), asked([rows[i] for i in out]))
    assert np.allclose(found, delta[out], atol=1e-3) and set(used) == {"perturbation"}


def test_additive_recovers_combinations_and_a_slope(rng):
    effect, slope = rng.normal(size=(5, 3)), rng.normal(size=3)
    pairs = [(j,) for j in range(5)] + list(itertools.combinations(range(5), 2))
    rows = [("L", "+".join(f"d{j}" for j in own), dose) for own in pairs for dose in (10, 100, 1000)]
    truth = np.stack([effect[[int(p[1]) for p in name.split("+")]].sum(0) + slope * (np.log10(dose) - 1) / 2 for _, name, dose in rows])
    kept = [i for i in range(len(rows)) if i % 4]
    out = [i for i in range(len(rows)) if not i % 4]
    found, _ = predict_deltas("additive", taught([rows[i] for i in kept], truth[kept]), asked([rows[i] for i in out]))
    assert np.allclose(found, truth[out], atol=1e-3)
    unseen, used = predict_deltas("additive", taught([rows[i] for i in kept], truth[kept]), asked([("L", "d0+new", 10), ("M", "new", 10)]))
    assert used.tolist() == ["line", "mean"] and np.isfinite(unseen).all()


@given(st.integers(0, 10**6), st.sampled_from(PLAIN))
def test_every_method_answers_everything_finitely_and_says_on_what(seed, method):
    rng = np.random.default_rng(seed)
    rows = sorted({(f"L{rng.integers(2)}", rng.choice(["A", "B", "C", "A+B"]), float(rng.choice([10, 100, 1000]))) for _ in range(rng.integers(1, 9))})
    known = Descriptors(np.array(["A", "B", "C", "D"]), rng.integers(0, 2, (4, 6)).astype(np.float32), "fingerprint")
    wanted = asked([(line, name, dose) for line in ("L0", "new") for name in ("A", "B+C", "D", "nobody", "A+nobody", "control") for dose in (NONE, 1.0, 50.0, 1e6)])
    data = taught(rows, rng.normal(size=(len(rows), 3)))
    for descriptors in (None, known):
        delta, used = predict_deltas(method, data, wanted, descriptors)
        assert delta.shape == (len(wanted), 3) and delta.dtype == np.float32 and np.isfinite(delta).all() and set(used) <= WORDS
        assert not delta[wanted.perturbation == "control"].any()
        again = predict_deltas(method, data, wanted.take(np.arange(len(wanted))[::-1]), descriptors)
        assert np.allclose(again[0][::-1], delta, atol=1e-5) and again[1][::-1].tolist() == used.tolist()  # each condition is answered by itself
        assert not len(predict_deltas(method, data, wanted.take(np.zeros(0, int)), descriptors)[0])


@given(st.lists(st.sampled_from([1.0, 10.0, 30.0, 500.0, 1e4]), min_size=1, max_size=5, unique=True), st.floats(0.1, 1e5))
def test_doses_are_numpys_interpolation(doses, wanted):
    doses = sorted(doses)
    value = np.random.default_rng(len(doses)).normal(size=len(doses)).astype(np.float32)
    known = learn(taught([("L", "A", d) for d in doses], value), dose=np.log10)
    assert np.isclose(known.response("A", "other line", np.log10(wanted))[0], np.interp(np.log10(wanted), np.log10(doses), value), atol=1e-5)


def test_nearest_and_knn_by_hand():
    data = taught([("L", name, NONE) for name in "ABC"], [1, 10, 100])
    known = Descriptors(np.array(list("ABCDE")), np.array([[1, 0], [0, 1], [-1, 0], [2, 1], [0, -1]], np.float32))
    wanted = asked([("L", "D", NONE), ("L", "E", NONE), ("L", "F", NONE)])
    near, used = predict_deltas("nearest", data, wanted, known)
    assert near[:, 0].tolist() == [1, 1, 37] and used.tolist() == ["descriptor", "descriptor", "mean"]  # E is at a right angle to A and C: the first name
    mean, _ = predict_deltas("knn", data, wanted, known)
    assert np.isclose(mean[0, 0], (2 * 1 + 1 * 10) / 3, rtol=1e-5) and np.isclose(mean[1, 0], 37)  # nothing is like E: all alike


def test_perturbation_itself_comes_before_its_twin():
    data = taught([("L", "A", NONE), ("L", "B", NONE)], [1, 2])
    twins = Descriptors(np.array(["A", "B"]), np.ones((2, 3), np.float32), "fingerprint")
    delta, used = predict_deltas("nearest", data, asked([("M", "B", NONE)]), twins)
    assert delta[0, 0] == 2 and used.tolist() == ["perturbation"]


def test_without_a_descriptor_the_word_is_not_descriptor(rng):
    data = taught([("L", "A", NONE), ("L", "B", NONE)], [1, 2])
    foreign = Descriptors(np.array(["X"]), np.ones((1, 3), np.float32))
    for method in ("ridge", "nearest", "knn"):
        for descriptors in (None, foreign):
            delta, used = predict_deltas(method, data, asked([("L", "A", NONE), ("L", "A+B", NONE), ("L", "C", NONE)]), descriptors)
            assert delta[:, 0].tolist() == [1, 3, 1.5] and used.tolist() == ["perturbation", "parts", "mean"]


def test_unknown_method_is_one_line():
    with pytest.raises(InputError, match="'net' is unknown.*knn") as told:
        predict_deltas("net", taught([("L", "A", NONE)], [1]), asked([("L", "A", NONE)]))
    assert "\n" not in str(told.value)


@given(st.integers(0, 10**6))
def test_population_moves_every_cell_alike(seed):
    rng = np.random.default_rng(seed)
    cells, delta = np.abs(rng.normal(size=(7, 4))).astype(np.float32), rng.normal(size=4)
    free = population(delta, cells, floor=False)
    assert np.allclose(free.mean(0) - cells.mean(0), delta, atol=1e-5) and np.allclose(population(delta, cells), np.maximum(free, 0))


def latent_case():
    """A small screen, its training mask and two conditions to ask for."""
    from gears_nb.perturb.prepare import fit_normaliser
    from gears_nb.perturb.simulator import simulate_screen

    screen, _ = simulate_screen(n_cells=260, n_genes=24, n_modules=4, n_drugs=3, n_lines=2, doses=(100.0, 1000.0), n_batches=1)
    known = ~((screen.perturbation == "drug01") & (screen.line == "line2"))
    norm = fit_normaliser(screen, known, n_hvg=None)
    wanted = asked([("line2", "drug01", 100.0), ("line1", "drug02+drug03", 1000.0), ("line1", "nobody", 100.0), ("line1", "control", NONE)])
    return screen, known, norm, wanted, [norm.logged(screen, screen.control & (screen.line == line)).toarray() for line in wanted.line]


@pytest.mark.parametrize("method", ["scgen", "cpa"])
def test_latent_populations_come_from_training_cells_alone_and_come_again(method):
    from dataclasses import replace

    import scipy.sparse as sp

    from gears_nb.core.config import TrainConfig
    from gears_nb.perturb.latent import latent_population

    screen, known, norm, wanted, controls = latent_case()
    few = TrainConfig(epochs=2, lr=1e-3, progress=False, device="cpu")
    made, used = latent_population(method, screen, norm, known, wanted, controls, 3, few)
    assert used == ["perturbation", "parts", "mean", "nothing"] and all(m.shape == c.shape and m.min() >= 0 and np.isfinite(m).all() for m, c in zip(made, controls))
    spoilt = screen.values.toarray()
    spoilt[~known] = 77
    again, _ = latent_population(method, replace(screen, values=sp.csr_matrix(spoilt)), norm, known, wanted, controls, 3, few)
    assert all(np.array_equal(a, b) for a, b in zip(made, again))
    kept, _ = latent_population(method, screen, norm, known, wanted, controls, 3, few, keep_noise=True)
    assert np.allclose(kept[3], controls[3], atol=1e-4)  # an untouched cell that keeps its noise stays what it was


def test_latent_bad_input_is_one_line():
    from gears_nb.perturb.latent import latent_population

    screen, known, norm, wanted, controls = latent_case()
    for method, mask, given_ in (("vae", known, controls), ("cpa", screen.control, controls), ("scgen", known, controls[:1])):
        with pytest.raises(InputError) as told:
            latent_population(method, screen, norm, mask, wanted, given_)
        assert "\n" not in str(told.value)


def test_a_critic_that_is_wrong_by_more_than_chance_teaches_nothing():
    import torch

    from gears_nb.perturb.latent import STRENGTH, Additive, _code_pays, _critic_pays, mismatch, seeded

    net = seeded(lambda: Additive(6, 2, 2, 3, (0.0, 0.0)), 0, "test")
    batch = {"x": torch.ones(4, 6), "line": torch.tensor([0, 1, 0, 1]), "name": torch.tensor([0, 1, 2, 0]), "marks": torch.eye(2)[[0, 1, 0, 1]], "dose": torch.ones(4)}
    told = _code_pays(net, batch, 0, None)
    assert not told["fooled"].item() and torch.isclose(told["loss"], mismatch(net, batch))
    net.chance = (99.0, 99.0)
    told = _code_pays(net, batch, 0, None)
    assert torch.isclose(told["loss"], mismatch(net, batch) - STRENGTH * _critic_pays(net, batch, 0, None)["loss"])
    _critic_pays(net, batch, 0, None)["loss"].backward()
    assert net.critic[0].weight.grad is not None and net.encoder[0].weight.grad is None
