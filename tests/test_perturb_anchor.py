"""The closed-form anchor: covariances by loops, likelihood and predictions against scipy, sklearn and the textbook, and what it may not see."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from gears_nb.perturb import anchor as module
from gears_nb.perturb.anchor import BANDS, PARTS, REACH, VIEWS, Anchor, View, covariances, fit_anchor, fit_variances, likelihood, noise_matrices, rehearsal_folds, rehearse, total
from gears_nb.perturb.descriptors import Descriptors
from gears_nb.perturb.prepare import Deltas
from gears_nb.perturb.screens import Conditions, parts

seeds = st.integers(0, 10**6)
NAMES = ("A", "B", "C", "A+B", "B+C")


def axis(nanomolar):
    "Doses from 1 to 1000, 0 without."
    given = np.asarray(nanomolar, float)
    return np.where(np.isnan(given), 0.0, np.log10(np.where(np.isnan(given), 1.0, given)) / 3).astype(np.float32)


def kin(a, b):
    "Lines are numbers: L0, L1, ..."
    place = lambda names: np.array([float(str(n)[1:]) for n in names])
    return np.exp(-np.square(np.subtract.outer(place(a), place(b))) / 2)


def table_of(rng, n, names=NAMES, lines=3, doses=(np.nan, 1.0, 30.0, 1000.0)) -> Conditions:
    every = sorted({(f"L{i}", p, d if not np.isnan(d) else -1.0) for i in range(lines) for p in names for d in doses})
    rows = [every[i] for i in np.sort(rng.permutation(len(every))[:n])]
    line, name, dose = zip(*rows)
    return Conditions(np.array(line), np.array(name), np.where(np.array(dose) < 0, np.nan, dose))


def described(rng, names="ABCD") -> Descriptors:
    return Descriptors(np.array(list(names)), rng.normal(size=(len(names), 3)).astype(np.float32))


def taught_of(rng, n=20, k=9, table=None, scale=1.0) -> Deltas:
    "Differences drawn from the model itself."
    table = table_of(rng, n) if table is None else table
    K = covariances(table, table, axis, kin, None)
    cells, controls = rng.integers(5, 40, len(table)), np.full(len(table), 50)
    signal = np.tensordot(np.array([0.3, 1, 0.2, 0.4, 0.1, 0.5, 0, 0, 0, 0.1, 0.1, 0.1, 0.2, 0.1]), K, 1)
    sampling = rng.uniform(0.5, 2.0, k)
    bare = Deltas(table, np.zeros((len(table), k), np.float32), cells, controls, sampling)
    S = scale * signal + noise_matrices(bare).sum(0) + 1e-6 * np.eye(len(table))
    return replace(bare, delta=(np.linalg.cholesky(S) @ rng.normal(size=(len(table), k)) * np.sqrt(sampling)).astype(np.float32))


@pytest.fixture(scope="module")
def taught():
    return taught_of(np.random.default_rng(0), 30, 12)


@pytest.fixture(scope="module")
def fitted(taught):
    return fit_anchor(taught, dose=axis, kinship=kin, descriptors=described(np.random.default_rng(5)), seed=1)


def close(a, b, tol=2e-3) -> bool:
    return np.allclose(a, b, atol=tol * max(1e-6, np.abs(a).max()))


# covariances


@given(seeds, st.booleans(), st.booleans())
def test_covariances_by_loops(seed, related, known):
    rng = np.random.default_rng(seed)
    a, b, descriptors = table_of(rng, 6), table_of(rng, 7), described(rng) if known else None
    found = covariances(a, b, axis, kin if related else None, descriptors)
    unit = None if not known else descriptors.values / np.linalg.norm(descriptors.values, axis=1, keepdims=True)
    at = {} if not known else {n: i for i, n in enumerate(descriptors.names)}
    for i in range(6):
        for j in range(7):
            P, Q = parts(a.perturbation[i]), parts(b.perturbation[j])
            same, line = len(set(P) & set(Q)), float(a.line[i] == b.line[j])
            like = sum(float(unit[at[p]] @ unit[at[q]]) for p in P for q in Q) if known else 0.0
            da, db = float(axis(a.dose[i : i + 1])[0]), float(axis(b.dose[j : j + 1])[0])
            near, akin = np.exp(-((da - db) ** 2) / (2 * REACH**2)), kin(a.line[i : i + 1], b.line[j : j + 1])[0, 0] if related else 0.0
            wanted = [1, same, line, same * line, da * db, same * near, like, like * line, like * near, line * near, akin, same * akin, same * min(da, db), same * min(da, db) * line]
            assert len(wanted) == len(PARTS) and np.allclose(found[:, i, j], wanted, atol=1e-5)


@given(seeds, st.booleans())
def test_every_part_is_a_covariance(seed, known):
    rng = np.random.default_rng(seed)
    a = table_of(rng, 14)
    K = covariances(a, a, axis, kin, described(rng) if known else None)
    for own in K:
        assert np.allclose(own, own.T, atol=1e-5) and np.linalg.eigvalsh(own).min() > -1e-4
    order = rng.permutation(14)
    own = covariances(a, a, axis, kin)
    assert np.allclose(own[:, order][:, :, order], covariances(a.take(order), a.take(order), axis, kin))


@given(seeds)
def test_a_combination_may_be_written_in_any_order(seed):
    rng = np.random.default_rng(seed)
    a, b = table_of(rng, 8), table_of(rng, 5)
    turned = replace(a, perturbation=np.array(["+".join(reversed(p.split("+"))) for p in a.perturbation]))
    known = described(rng)
    assert np.array_equal(covariances(a, b, axis, kin, known), covariances(turned, b, axis, kin, known))


def test_a_part_that_is_not_described_adds_nothing(rng):
    a = Conditions(np.array(["L0", "L0"]), np.array(["A", "A+Z"]), np.array([np.nan, np.nan]))
    K = covariances(a, a, axis, None, described(rng))
    assert np.allclose(K[6], 1.0) and K[1, 1, 1] == 2 and K[1, 0, 1] == 1
    none = Descriptors(np.array([], str), np.zeros((0, 3), np.float32))
    assert not covariances(a, a, axis, None, none)[6].any()


# noise and likelihood


def test_noise_is_that_of_means_that_share_controls():
    "Two conditions of one line and the same 4 controls: errors of 3 and 6 treated cells, drawn many times."
    rng, n = np.random.default_rng(0), 40000
    control = rng.normal(size=(n, 4)).mean(1)
    errors = np.stack([rng.normal(size=(n, 3)).mean(1) - control, rng.normal(size=(n, 6)).mean(1) - control, rng.normal(size=(n, 5)).mean(1) - rng.normal(size=(n, 8)).mean(1)])
    table = Conditions(np.array(["a", "a", "b"]), np.array(["A", "B", "A"]), np.full(3, np.nan))
    own = noise_matrices(Deltas(table, np.zeros((3, 1), np.float32), np.array([3, 6, 5]), np.array([4, 4, 8]), np.ones(1)))
    assert np.allclose(np.cov(errors), own.sum(0), atol=0.01)


@given(seeds)
def test_likelihood_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    taught = taught_of(rng, 9, 4)
    K, N = covariances(taught.conditions, taught.conditions, axis, kin), noise_matrices(taught)
    logs, Y = rng.normal(size=len(PARTS) + 1) - 1, taught.delta.astype(float)
    S = np.einsum("t,tij->ij", np.exp(logs[:-1]), K) + (1 + np.exp(logs[-1])) * N[0] + N[1] + 1e-6 * np.eye(9)
    found = float(likelihood(*(torch.from_numpy(x) for x in (Y, K, N, logs))))
    wanted = -multivariate_normal(np.zeros(9), S).logpdf(Y.T).sum()
    assert np.isclose(found + 0.5 * 9 * 4 * np.log(2 * np.pi), wanted, rtol=1e-6)
    signal, full = total(*(torch.from_numpy(x) for x in (K, N, logs)))
    assert np.allclose(full.numpy(), S) and np.allclose(signal.numpy(), np.tensordot(np.exp(logs[:-1]), K, 1))


def test_variances_are_where_another_optimiser_finds_them(taught):
    K, N = covariances(taught.conditions, taught.conditions, axis, kin), noise_matrices(taught)
    Y = taught.delta / np.sqrt(taught.sampling)

    def objective(logs):
        S = np.tensordot(np.exp(logs[:-1]), K, 1) + (1 + np.exp(logs[-1])) * N[0] + N[1] + 1e-6 * np.eye(len(Y))
        _, det = np.linalg.slogdet(S)
        return (0.5 * (Y * np.linalg.solve(S, Y)).sum() + 0.5 * Y.shape[1] * det) / Y.shape[1] + 0.05 * np.square(logs + 6).sum() * 2 / Y.shape[1]

    best = optimize.minimize(objective, np.full(len(PARTS) + 1, -2.0), method="L-BFGS-B", bounds=[(-14, 8)] * (len(PARTS) + 1))
    found = fit_variances(Y, K, N)
    mine = objective(np.log(np.r_[found[:-1], found[-1] - 1]))
    assert found[-1] > 1 and (found > 0).all() and mine < best.fun + 0.02, (mine, best.fun)


def test_a_part_without_covariance_stays_small(taught):
    found = fit_variances(taught.delta, covariances(taught.conditions, taught.conditions, axis), noise_matrices(taught))
    assert (found[[6, 7, 8, 10, 11]] < 0.05).all()


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3])
def test_differences_of_any_size_give_finite_numbers(scale, taught):
    found = fit_anchor(replace(taught, delta=taught.delta * np.float32(scale)), dose=axis, kinship=kin, views=("programs",))
    assert np.isfinite(found.left_out).all() and np.isfinite(found.predict(taught.conditions)).all() and all(np.isfinite(v.variances).all() for v in found.views)


# folds


@given(seeds, st.sampled_from(("pair", "line", "perturbation", "dose", "random", "combination", "batch")))
def test_folds_keep_together_what_belongs_together(seed, expects):
    rng = np.random.default_rng(seed)
    table = table_of(rng, 25)
    fold = rehearsal_folds(table, expects, seed=seed)
    assert fold.shape == (25,) and set(fold) == set(range(len(set(fold)))) and len(set(fold)) <= 5 and np.array_equal(fold, rehearsal_folds(table, expects, seed=seed))
    if expects == "line":
        assert all(len(set(fold[table.line == line])) == 1 for line in set(table.line))
    if expects == "perturbation":
        assert all(len(set(fold[table.perturbation == p])) == 1 for p in set(table.perturbation))
    if expects == "random":
        assert len(set(fold)) == 5 and np.ptp(np.bincount(fold)) <= 1


@pytest.mark.xfail(reason="'whole perturbations with all combinations that contain them': a combination goes with one of its parts only, so the other part is held out while its combination is taught", strict=True)
def test_a_held_out_perturbation_is_in_no_taught_combination():
    table = Conditions(np.repeat("L0", 5), np.array(["A", "A+B", "B", "B+C", "C"]), np.full(5, np.nan))
    fold = rehearsal_folds(table, "perturbation", seed=0)
    for f in set(fold):
        held = {p for name in table.perturbation[fold == f] for p in parts(name) if len(parts(name)) == 1}
        assert not held & {p for name in table.perturbation[fold != f] for p in parts(name)}


def test_a_pair_is_rehearsed_with_all_its_doses():
    table = table_of(np.random.default_rng(0), 60)
    fold = rehearsal_folds(table, "pair", seed=0)
    assert all(len(set(fold[(table.line == line) & (table.perturbation == p)])) == 1 for line in set(table.line) for p in set(table.perturbation))


# predictions


@given(seeds)
def test_prediction_without_a_fold_is_the_conditional_mean(seed):
    "By the blocks of the inverse of the whole covariance, which never inverts the part."
    rng = np.random.default_rng(seed)
    taught = taught_of(rng, 12, 3)
    K, N = covariances(taught.conditions, taught.conditions, axis, kin), noise_matrices(taught)
    logs, fold, Y = rng.normal(size=len(PARTS) + 1) - 1, rng.integers(3, size=12), taught.delta.astype(float)
    found = module._predicted(*(torch.from_numpy(x) for x in (Y, K, N, logs)), fold).numpy()
    signal = np.tensordot(np.exp(logs[:-1]), K, 1)
    S = signal + (1 + np.exp(logs[-1])) * N[0] + N[1] + 1e-6 * np.eye(12)
    for f in set(fold):
        there, rest = fold == f, fold != f
        joint = S.copy()
        joint[np.ix_(there, rest)], joint[np.ix_(rest, there)] = signal[np.ix_(there, rest)], signal[np.ix_(rest, there)]
        joint[np.ix_(there, there)] += 100 * np.eye(there.sum())  # the mean does not depend on it
        P = np.linalg.inv(joint)
        assert np.allclose(found[there], -np.linalg.solve(P[np.ix_(there, there)], P[np.ix_(there, rest)] @ Y[rest]), atol=1e-6)
        Z = Y.copy()
        Z[there] = 1e3  # its own rows play no part
        again = module._predicted(*(torch.from_numpy(x) for x in (Z, K, N, logs)), fold).numpy()
        assert np.array_equal(again[there], found[there])


def test_dose_curves_are_those_of_sklearns_gaussian_process(rng):
    dose = np.array([1.0, 10.0, 50.0, 300.0, 1000.0])
    table = Conditions(np.repeat("L0", 5), np.repeat("A", 5), dose)
    cells, Y = np.array([3, 8, 20, 5, 9]), rng.normal(size=(5, 2))
    taught = Deltas(table, Y.astype(np.float32), cells, np.full(5, 10**9), np.ones(2))
    v = np.full(len(PARTS) + 1, 1e-14)
    v[PARTS.index("perturbation dose")], v[-1] = 0.7, 1.3
    K, N = covariances(table, table, axis), noise_matrices(taught)
    S = np.tensordot(v[:-1], K, 1) + v[-1] * N[0] + N[1] + 1e-6 * np.eye(5)
    mine = Anchor(taught, (View(np.zeros(2, int), v[None], np.linalg.solve(S, taught.delta), np.ones(2)),), np.zeros((5, 2)), axis, None, None)
    grid = Conditions(np.repeat("L0", 9), np.repeat("A", 9), np.logspace(0, 3, 9))
    theirs = GaussianProcessRegressor(ConstantKernel(0.7) * RBF(REACH), alpha=1.3 / cells + 1e-6, optimizer=None).fit(axis(dose)[:, None], taught.delta)
    assert np.allclose(mine.predict(grid), theirs.predict(axis(grid.dose)[:, None]), atol=1e-5)


def test_a_fitted_anchor_is_the_mean_of_its_views_by_hand(taught, fitted):
    descriptors = described(np.random.default_rng(5))
    asked = table_of(np.random.default_rng(9), 11)
    K = covariances(taught.conditions, taught.conditions, axis, kin, descriptors)
    cross, N = covariances(asked, taught.conditions, axis, kin, descriptors), noise_matrices(taught)
    sd, out = np.sqrt(taught.sampling), np.zeros((11, 12))
    for view in fitted.views:
        Y = taught.delta / sd if view.basis.ndim == 1 else taught.delta / sd @ np.linalg.pinv(view.basis / sd)
        made = np.zeros((11, Y.shape[1]))
        for j in range(Y.shape[1]):
            v = view.variances[view.band[j]]
            S = np.tensordot(v[:-1], K, 1) + v[-1] * N[0] + N[1] + 1e-6 * np.eye(30)
            made[:, j] = np.tensordot(v[:-1], cross, 1) @ np.linalg.inv(S) @ Y[:, j]
        out += (made * sd if view.basis.ndim == 1 else made @ view.basis) / len(fitted.views)
    assert len(fitted.views) == len(VIEWS) and close(out, fitted.predict(asked))


def test_programs_add_up_to_the_differences_and_are_orthogonal(taught):
    columns, band, basis = module._columns("programs", taught)
    assert close(columns @ basis, taught.delta, 1e-5) and np.allclose((basis / np.sqrt(taught.sampling)) @ (basis / np.sqrt(taught.sampling)).T, np.eye(len(basis)), atol=1e-4)
    assert (np.diff(band) >= 0).all() and band.min() == 0 and band.max() < BANDS
    columns, band, basis = module._columns("genes", taught)
    size = (np.square(taught.delta) / taught.sampling * taught.cells[:, None]).mean(0)
    assert close(columns * basis, taught.delta, 1e-5) and all(size[band == a].max() <= size[band == a + 1].min() for a in range(BANDS - 1))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_fewer_genes_than_bands(k):
    found = fit_anchor(taught_of(np.random.default_rng(2), 12, k), dose=axis, kinship=kin)
    assert found.predict(found.taught.conditions).shape == (12, k) and np.isfinite(found.left_out).all()


def test_left_out_is_the_mean_of_the_views_without_the_fold(taught):
    found = fit_anchor(taught, dose=axis, kinship=kin, views=("genes",), expects="line", seed=4)
    fold, (view,) = rehearsal_folds(taught.conditions, "line", seed=4), found.views
    K, N, Y = covariances(taught.conditions, taught.conditions, axis, kin), noise_matrices(taught), taught.delta / np.sqrt(taught.sampling)
    out = np.zeros_like(Y)
    for j in range(12):
        v = view.variances[view.band[j]]
        signal = np.tensordot(v[:-1], K, 1)
        S = signal + v[-1] * N[0] + N[1] + 1e-6 * np.eye(30)
        for f in set(fold):
            out[fold == f, j] = signal[np.ix_(fold == f, fold != f)] @ np.linalg.lstsq(S[np.ix_(fold != f, fold != f)], Y[fold != f, j], rcond=None)[0]
    assert close(out * np.sqrt(taught.sampling), found.left_out)


def _wrong(Y, metric, band, K, N, variances, fold) -> float:
    "Mean relative error of predictions without the fold, by loops."
    out = np.zeros_like(Y)
    for j, b in enumerate(band):
        signal = np.tensordot(variances[b][:-1], K, 1)
        S = signal + variances[b][-1] * N[0] + N[1] + 1e-6 * np.eye(len(Y))
        for f in set(fold):
            out[fold == f, j] = signal[np.ix_(fold == f, fold != f)] @ np.linalg.solve(S[np.ix_(fold != f, fold != f)], Y[fold != f, j])
    M = np.diag(metric) if metric.ndim == 1 else metric
    return float(np.mean([(e @ M @ e) / (y @ M @ y) for e, y in zip(out - Y, Y)]))


@pytest.mark.parametrize("view", VIEWS)
def test_rehearsal_lowers_the_error_it_is_about(view, taught):
    Y, band, basis = module._columns(view, taught)
    K, N, fold = covariances(taught.conditions, taught.conditions, axis, kin), noise_matrices(taught), rehearsal_folds(taught.conditions, "pair")
    metric = basis**2 if basis.ndim == 1 else basis @ basis.T
    start = np.tile(np.r_[np.full(len(PARTS), 0.02), 1.5], (band.max() + 1, 1))
    found = rehearse(Y, metric, band, K, N, start, fold)
    before, after = (_wrong(Y, metric, band, K, N, v, fold) for v in (start, found))
    assert after < before and (found[:, -1] > 1).all() and found.shape == start.shape
    assert np.array_equal(rehearse(Y, metric, band, K, N, start, fold), found)


# what it may not see, and what may not matter


def test_the_order_of_questions_does_not_matter(fitted):
    asked, order = table_of(np.random.default_rng(9), 20), np.random.default_rng(1).permutation(20)
    whole = fitted.predict(asked)
    assert np.allclose(fitted.predict(asked.take(order)), whole[order], atol=1e-6) and np.allclose(np.concatenate([fitted.predict(asked.take([i])) for i in range(20)]), whole, atol=1e-6)


def test_the_order_of_genes_does_not_matter(taught, fitted):
    order = np.random.default_rng(1).permutation(12)
    other = fit_anchor(replace(taught, delta=taught.delta[:, order], sampling=taught.sampling[order]), dose=axis, kinship=kin, descriptors=described(np.random.default_rng(5)), seed=1)
    assert close(fitted.predict(taught.conditions)[:, order], other.predict(taught.conditions), 0.02)


def test_a_gene_in_another_unit_gives_its_prediction_in_that_unit(taught):
    unit = np.where(np.arange(12) % 2, 2.0, 0.5).astype(np.float32)
    asked = table_of(np.random.default_rng(9), 6)
    fit = lambda t: fit_anchor(t, dose=axis, kinship=kin, views=("genes",), expects="pair", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rehearse", lambda Y, metric, band, K, N, variances, fold: variances)  # lengths are in log2, the likelihood knows none
        assert close(fit(taught).predict(asked) * unit, fit(replace(taught, delta=taught.delta * unit, sampling=taught.sampling * unit**2)).predict(asked), 0.01)


def test_mirrored_differences_are_predicted_mirrored(taught):
    fit = lambda t: fit_anchor(t, dose=axis, kinship=kin, views=("genes",), seed=1).predict(taught.conditions)
    assert close(fit(taught), -fit(replace(taught, delta=-taught.delta)), 1e-3)


def test_the_same_seed_gives_the_same_bits_and_nothing_is_touched(taught, fitted):
    before, state = taught.delta.copy(), torch.random.get_rng_state()
    again = fit_anchor(taught, dose=axis, kinship=kin, descriptors=described(np.random.default_rng(5)), seed=1)
    assert np.array_equal(again.predict(taught.conditions), fitted.predict(taught.conditions)) and np.array_equal(again.left_out, fitted.left_out)
    assert np.array_equal(before, taught.delta) and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("expects", ["pair", "line", "perturbation"])
def test_a_screen_of_hardly_any_conditions(n, expects):
    taught = taught_of(np.random.default_rng(n), table=table_of(np.random.default_rng(n), n))
    found = fit_anchor(taught, dose=axis, kinship=kin, expects=expects)
    assert np.isfinite(found.predict(table_of(np.random.default_rng(8), 9))).all() and np.isfinite(found.left_out).all()
    if n == 1:
        assert not found.left_out.any()
        own = found.predict(taught.conditions)
        assert (np.sign(own) == np.sign(taught.delta)).all() and np.linalg.norm(own) < np.linalg.norm(taught.delta)


def test_one_cell_and_a_constant_dose(rng):
    table = table_of(rng, 9, doses=(10.0,))
    found = fit_anchor(replace(taught_of(rng, table=table), cells=np.ones(9, int)), dose=lambda d: np.zeros(len(d), np.float32))
    assert np.isfinite(found.predict(table_of(rng, 6))).all()


def test_nothing_known_means_what_all_have_in_common(taught, fitted):
    "An unknown drug in an unknown, unrelated line: the same for every drug, and small against what is taught."
    asked = Conditions(np.array(["L900", "L900"]), np.array(["Q", "R"]), np.full(2, np.nan))
    found = fitted.predict(asked)
    assert np.allclose(found[0], found[1]) and np.linalg.norm(found[0]) < np.linalg.norm(taught.delta, axis=1).max()


def test_a_combination_with_an_unknown_part_rests_on_the_known_one(taught, fitted):
    ask = lambda name: fitted.predict(Conditions(np.array(["L1"]), np.array([name]), np.array([30.0])))[0]
    assert np.allclose(ask("A+Q"), ask("Q+A")) and np.allclose(ask("A+Q"), ask("A"), atol=1e-6) and not np.allclose(ask("A"), ask("Q"))


def test_the_control_has_no_effect(taught, fitted):
    found = fitted.predict(Conditions(np.array(["L1"]), np.array(["control"]), np.array([np.nan])))
    assert np.abs(found).max() < 1e-3 * np.abs(taught.delta).max()


def test_many_conditions_are_tuned_on_some_and_used_all(monkeypatch):
    monkeypatch.setattr(module, "MOST", 10)
    taught = taught_of(np.random.default_rng(3), 20, 4)
    found = fit_anchor(taught, dose=axis, kinship=kin, views=("genes",))
    assert found.views[0].weights.shape == (20, 4)
    other = fit_anchor(replace(taught, delta=taught.delta + np.float32(0.3) * (np.arange(20) == 7)[:, None]), dose=axis, kinship=kin, views=("genes",))
    assert not np.array_equal(found.predict(taught.conditions), other.predict(taught.conditions))
