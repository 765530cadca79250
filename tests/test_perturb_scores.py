"""How predictions of perturbations are judged: against scipy, sklearn and closed forms, and what scores must not depend on."""
from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from gears_nb.core.errors import InputError
from gears_nb.perturb.prepare import deltas, log_values
from gears_nb.perturb.scores import (
    POPULATION,
    curve_scores,
    energy_distance,
    fit_basis,
    leading,
    leading_all,
    mean_scores,
    mmd,
    paired_interval,
    population_scores,
    rank_of_truth,
    some_cells,
    squared_unit,
)
from gears_nb.perturb.screens import Screen

seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)


@few
@given(seeds, st.integers(3, 12), st.integers(3, 12), st.integers(1, 30))
def test_leading_genes_are_those_of_welch(seed, m, n, k):
    rng = np.random.default_rng(seed)
    control, treated = rng.normal(size=(m, 20)), rng.normal(size=(n, 20)) * rng.uniform(0.5, 2, 20)
    t = np.abs(stats.ttest_ind(treated, control, equal_var=False).statistic)
    delta = treated.mean(0) - control.mean(0)
    chosen = leading(delta, control, treated, k)
    assert np.array_equal(chosen, np.argsort(-t, kind="stable")[:k])
    assert np.array_equal(chosen, leading(delta, sp.csr_matrix(control), sp.csr_matrix(treated), k))


def test_leading_genes_without_variance():
    delta = np.array([0.5, -2, 2, 0, 1])
    assert leading(delta, np.zeros((2, 5)), np.zeros((9, 5)), 3).tolist() == [1, 2, 4]
    assert leading(delta, np.zeros((5, 5)), np.zeros((5, 5)), 5).tolist() == [0, 1, 2, 4, 3], "an exact difference comes before none, ties by number"


def screen(seed=0, n=150, g=12):
    rng = np.random.default_rng(seed)
    kind = rng.choice(["control", "A", "B", "A+B"], n)
    return Screen(sp.csr_matrix(rng.poisson(2, (n, g)).astype(np.float32)), True, np.array([f"g{j}" for j in range(g)]), np.arange(n).astype(str), kind,
                  np.where(kind == "control", np.nan, 10.0), rng.choice(["K562", "A549"], n), rng.choice(["1", "2"], n))


def test_leading_genes_of_all_conditions():
    cells = screen()
    X, everyone = log_values(cells), np.ones(cells.n, bool)
    found = deltas(cells, X, everyone, everyone)
    for i, row in enumerate(leading_all(found, cells, X, everyone, everyone, 6)):
        line = cells.line == found.conditions.line[i]
        treated = line & (cells.perturbation == found.conditions.perturbation[i])
        assert np.array_equal(row, leading(found.delta[i], X[line & cells.control], X[treated], 6))
    with pytest.raises(InputError, match="conditions"):
        leading_all(found, cells, X, cells.perturbation != "A", everyone, 6)


@few
@given(seeds)
def test_mean_scores_against_scipy_and_over_orders_of_genes(seed):
    rng = np.random.default_rng(seed)
    P, O = rng.normal(size=(2, 4, 60))
    first = np.argsort(-np.abs(O), 1)[:, :50]
    rows = mean_scores(P, O, first)
    for p, o, at, row in zip(P, O, first, rows):
        by_top = [stats.pearsonr(p[genes], o[genes])[0] for genes in (slice(None), at[:20], at)]
        expected = [((p - o) ** 2).mean(), *by_top, 1 - cdist([p], [o], "cosine")[0, 0]]
        assert np.allclose(list(row.values()), expected)
    mixed = rng.permutation(60)
    again = mean_scores(P[:, mixed], O[:, mixed], np.argsort(mixed)[first])
    assert np.allclose([list(r.values()) for r in rows], [list(r.values()) for r in again])


def test_mean_scores_of_nothing():
    O = np.array([[1.0, 2, 3, 4], [2, 2, 2, 2], [0, 0, 0, 0], [1, 2, 3, np.nan]])
    rows = mean_scores(np.zeros((4, 4)), O, np.tile(np.arange(4), (4, 1)))
    assert rows[0] == {"mse": 7.5, "pcc_delta": 0.0, "pcc_top20": 0.0, "pcc_top50": 0.0, "cosine": 0.0}
    assert rows[1]["pcc_delta"] is None and rows[1]["cosine"] == 0 and rows[2]["cosine"] is None and rows[2]["mse"] == 0 and set(rows[3].values()) == {None}
    for bad in (O[:2], O[:, :2], O[0]):
        with pytest.raises(InputError):
            mean_scores(bad, O, np.zeros((4, 4), int))


@few
@given(seeds, st.floats(0.1, 10), st.sampled_from(["cosine", "euclidean"]))
def test_rank_by_counting_and_of_scaled_predictions(seed, scale, metric):
    rng = np.random.default_rng(seed)
    P, O = rng.normal(size=(2, 7, 5))
    O[3] = O[2]  # a tie
    D = cdist(P, O, metric)
    by_hand = [sum(0.5 if j in (2, 3) and i in (2, 3) else float(D[i, j] < D[i, i]) for j in range(7) if j != i) / 6 for i in range(7)]
    assert np.allclose(rank_of_truth(P, O, metric), by_hand)
    assert np.allclose(rank_of_truth(scale * P, O), rank_of_truth(P, O)) and not rank_of_truth(O[:3], O[:3], metric).any()
    assert np.isclose(rank_of_truth(np.tile(P[0], (7, 1)), O, metric).mean(), 0.5)


def test_rank_of_nothing():
    O = np.eye(4)
    ranks = rank_of_truth(np.array([[0.0] * 4, [np.nan] * 4, [0, 0, 2, 0], [1, 0, 0, 0]]), O)
    assert ranks[0] == 0.5 and np.isnan(ranks[1]) and ranks[2] == 0 and np.isclose(ranks[3], 2 / 3)
    assert np.isnan(rank_of_truth(O[:1], O[:1])).all()
    for bad in (dict(observed=O[:2]), dict(metric="manhattan")):
        with pytest.raises(InputError):
            rank_of_truth(O, **{"observed": O} | bad)


@few
@given(seeds, st.floats(0.1, 5))
def test_distances_do_not_see_rotation_shift_or_order(seed, scale):
    rng = np.random.default_rng(seed)
    P, O = rng.normal(size=(9, 3)), rng.normal(0.5, 1.5, (7, 3))
    R, shift = np.linalg.qr(rng.normal(size=(3, 3)))[0], rng.normal(size=3)
    moved = [scale * X @ R + shift for X in (P[::-1], O)]
    assert np.isclose(energy_distance(*moved), scale * energy_distance(P, O)) and np.isclose(energy_distance(P, O), energy_distance(O, P))
    assert np.isclose(mmd(*moved), mmd(P, O)) and np.isclose(mmd(P, O, 2.0), mmd(O, P, 2.0)) and np.isclose(squared_unit(*moved), scale**2 * squared_unit(P, O))


def test_energy_distance_in_one_dimension():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=11), rng.normal(1, 2, 8)
    corrected = energy_distance(x[:, None], y[:, None])
    within = sum(np.abs(a[:, None] - a).mean() / (len(a) - 1) for a in (x, y))
    assert np.isclose(corrected + within, stats.energy_distance(x, y) ** 2)
    with pytest.raises(InputError):
        energy_distance(x[:1, None], y[:, None])


def test_two_halves_of_one_population_are_not_apart():
    rng = np.random.default_rng(1)
    pairs = [np.split(rng.normal(size=(24, 4)), 2) for _ in range(300)]
    for distance in (energy_distance, lambda a, b: mmd(a, b, 4.0)):
        values = np.array([distance(*pair) for pair in pairs])
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(300) and (values < 0).any()


def test_basis_is_that_of_sklearn():
    X = sp.random(60, 25, 0.4, random_state=0, format="csr") * 3
    basis, full = fit_basis(X, 5, seed=3), PCA(5, svd_solver="full").fit(X.toarray())
    assert np.allclose(np.abs(basis.project(X)), np.abs(full.transform(X.toarray())), atol=1e-6) and np.allclose(basis.mean, full.mean_)
    assert np.array_equal(basis.components, fit_basis(X, 5, seed=3).components)
    assert np.allclose(np.abs(fit_basis(X.toarray(), 5).components), np.abs(basis.components), atol=1e-6)
    with pytest.raises(InputError):
        fit_basis(X[:2])


def test_population_scores():
    rng = np.random.default_rng(2)
    control, observed = rng.normal(size=(90, 12)), rng.normal(size=(80, 12)) @ (np.eye(12) + 0.5) + 1
    basis = fit_basis(control, 4)
    same = population_scores(control, control, observed, basis)
    assert tuple(same) == POPULATION and np.isclose(same["e_share"], 1) and np.isclose(same["correlation_share"], 1)
    assert np.isclose(same["e_distance"], energy_distance(basis.project(control), basis.project(observed)))
    right = population_scores(control, observed, observed, basis)
    assert right["e_share"] < 0.01 and right["variance_ratio"] == 1 and np.isclose(right["variance_pcc"], 1) and right["correlation_error"] == 0
    a, b = (np.corrcoef(X.T)[np.triu_indices(12, 1)] for X in (control, observed))
    assert np.isclose(same["correlation_error"], np.sqrt(np.mean((a - b) ** 2)))
    assert np.isclose(same["variance_pcc"], stats.pearsonr(np.log(control.var(0, ddof=1) + 1e-3), np.log(observed.var(0, ddof=1) + 1e-3))[0])
    sparse = population_scores(sp.csr_matrix(control), control, sp.csr_matrix(observed), basis)
    assert np.allclose(list(sparse.values()), list(same.values()))
    for predicted, seen in ((control, observed[:4]), (control * np.nan, observed), (control[:1], observed)):
        assert set(population_scores(control, predicted, seen, basis).values()) == {None}
    assert population_scores(observed, control, observed, basis)["correlation_share"] is None, "controls that do not differ leave nothing to be a share of"


def test_many_cells_are_drawn_by_seed():
    X = np.arange(3000.0)[:, None]
    assert len(some_cells(X)) == 1000 and np.array_equal(some_cells(X, 1), some_cells(sp.csr_matrix(X), 1))
    assert not np.array_equal(some_cells(X, 1), some_cells(X, 2))


@few
@given(seeds, st.floats(0.2, 5), st.floats(-2, 2))
def test_dose_curves(seed, slope, shift):
    rng = np.random.default_rng(seed)
    dose, P = 10.0 ** np.arange(4), rng.normal(size=(4, 6))
    O = rng.normal(size=(4, 6))
    found, line = curve_scores(dose, P, O, [1, 4]), LinearRegression().fit(P[:, [1, 4]].reshape(-1, 1), O[:, [1, 4]].ravel())
    assert np.allclose([found["slope"], found["intercept"]], [line.coef_[0], line.intercept_])
    centred = O[:, [1, 4]] - O[:, [1, 4]].mean(0)
    assert np.isclose(found["r2"], r2_score(centred.ravel(), (P[:, [1, 4]] - O[:, [1, 4]].mean(0)).ravel()))
    exact = curve_scores(dose[::-1], P, slope * P + shift, [0, 2, 3])
    assert np.allclose([exact["slope"], exact["intercept"]], [slope, shift])


def test_dose_curves_of_nothing():
    dose, P = np.array([1.0, 10, np.nan]), np.arange(6.0).reshape(3, 2)
    assert np.isclose(curve_scores(dose, P, P, [0, 1])["r2"], 1) and set(curve_scores(dose[1:], P[1:], P[1:], [0]).values()) == {None}
    assert curve_scores(dose, 0 * P, P, [0]) == {"r2": pytest.approx(1 - 4 / 2), "slope": None, "intercept": None}
    assert set(curve_scores(dose, P, P, []).values()) == {None}
    with pytest.raises(InputError):
        curve_scores(dose[:2], P, P, [0])


@few
@given(seeds, st.floats(-5, 5))
def test_intervals_move_with_the_scores(seed, shift):
    rng = np.random.default_rng(seed)
    ours, other, drug = rng.normal(size=12), rng.normal(size=12), rng.choice(list("abcd"), 12)
    plain = np.array(paired_interval(ours, other, seed, 200, drug))
    assert np.allclose(paired_interval(ours + shift, other, seed, 200, drug), plain + shift, equal_nan=True)
    assert np.isclose(plain[0], (ours - other).mean()) and (np.isnan(plain[1]) or plain[1] <= plain[0] + 1e-9)
    assert np.allclose(paired_interval(other, ours, seed, 200, drug), -plain[[0, 2, 1]], equal_nan=True)


def test_intervals():
    rng = np.random.default_rng(5)
    ours, other = rng.normal(0.5, 1, 40), rng.normal(size=40)
    there = stats.bootstrap((ours - other,), np.mean, n_resamples=20_000, method="percentile", random_state=0).confidence_interval
    assert np.allclose(paired_interval(ours, other, draws=20_000)[1:], [there.low, there.high], atol=0.04)
    assert paired_interval(ours, other) == paired_interval(ours, other)
    seeds_of_one = [np.repeat(x, 5) for x in (ours, other)]
    assert np.allclose(paired_interval(*seeds_of_one, groups=np.repeat(np.arange(40), 5)), paired_interval(ours, other))
    assert paired_interval([2.0, None, np.nan], [1.0, 3.0, 4.0])[0] == 1.0
    with pytest.raises(InputError, match="both"):
        paired_interval([None], [1.0])
    with pytest.raises(InputError, match="scores"):
        paired_interval([1.0, 2.0], [1.0])
