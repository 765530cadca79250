"""Maps from distances: exact in the plane, robust to false lengths, one account of both modes; frames; refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.geometry.distances import Solution, optimal_scale, solve_distances, start_layout, stress1, tidy_edges
from gears_nb.geometry.gauge import canonical, gauge_fix, procrustes
from gears_nb.geometry.mds import classical_mds, double_centred, landmark_mds

ALL = np.stack(np.triu_indices(120, 1), 1)


def error(X: np.ndarray, truth: np.ndarray) -> float:
    return float(procrustes(np.asarray(X, float), gauge_fix(truth), scale=True).error)


@pytest.fixture(scope="module")
def place() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (120, 2))


def test_classical_mds_is_exact_in_the_plane():
    X = np.random.default_rng(0).normal(size=(20, 2))
    D = np.linalg.norm(X[:, None] - X[None], axis=-1)
    assert np.isclose(procrustes(classical_mds(D), X).error, 0, atol=1e-8)


def test_one_formula_for_tables_and_padded_batches():
    X = np.random.default_rng(1).normal(size=(2, 9, 2))
    D2 = np.stack([squareform(pdist(x, "sqeuclidean")) for x in X])
    w = torch.ones(2, 9, dtype=torch.float64)
    w[1, 6:] = 0
    gram, rows = double_centred(torch.from_numpy(D2), w)
    for b, n in ((0, 9), (1, 6)):
        alone, means = double_centred(D2[b, :n, :n], np.ones(n))
        Y = X[b, :n] - X[b, :n].mean(0)
        assert np.allclose(alone, Y @ Y.T) and np.allclose(gram[b, :n, :n], alone) and np.allclose(rows[b, :n], means)
    assert not gram[1, 6:].any()
    D = torch.from_numpy(np.sqrt(D2[:1]))
    Y = landmark_mds(D, torch.arange(9)[None], torch.ones(1, 9, dtype=torch.bool))[0].numpy()
    assert np.isclose(procrustes(Y, classical_mds(D[0].numpy())).error, 0, atol=1e-8)  # all points are landmarks: classical scaling


def test_lateration_refuses_a_graph_in_pieces():
    pairs = np.array([[i, j] for i in range(10) for j in range(i + 1, 10) if (i < 5) == (j < 5)])
    with pytest.raises(InputError, match="no path"):
        start_layout(10, pairs, np.ones(len(pairs)), [0, 1, 2], how="lateration")
    with pytest.raises(InputError, match="at least 3"):
        start_layout(10, pairs, np.ones(len(pairs)), how="lateration")


def test_the_robust_mode_ignores_a_false_length(place):
    d = pdist(place)
    d[::10] *= 3
    robust, square = (solve_distances(ALL, d, place, mode="robust", huber_delta=h, anchor_weight=0).X for h in (0.05, 1e6))
    assert error(robust, place) < 0.3 * error(square, place)


@pytest.mark.parametrize("mode", ["exact", "robust"])
def test_both_modes_give_one_account_and_do_not_see_the_order_of_pairs(place, mode):
    start, d = place + 0.1 * np.sin(5 * place[:, ::-1]), pdist(place)
    confidence = {"weight": np.random.default_rng(3).random(len(d))} if mode == "robust" else {}
    one = solve_distances(ALL, d, start, mode=mode, **confidence)
    assert isinstance(one, Solution) and one.converged and one.reason.startswith("converged") and one.iterations > 0
    assert one.stress < 1e-2 < one.start_stress and set(one.residuals) == {"q50", "q90", "q99"} and one.scale == 1
    order = np.random.default_rng(2).permutation(len(d))
    twice = np.concatenate([order, order[:50]])  # shuffled, turned round, some repeated
    shuffled = {k: v[twice] for k, v in confidence.items()}
    assert np.array_equal(solve_distances(ALL[twice][:, ::-1], d[twice], start, mode=mode, **shuffled).X, one.X)
    fixed = one.in_gauge()
    assert np.allclose(fixed.X, gauge_fix(one.X)) and np.allclose(fixed.X * fixed.scale, one.X - one.X.mean(0))


@pytest.mark.parametrize("mode", ["exact", "robust"])
@pytest.mark.parametrize("landmarks", [None, [0, 40, 80, 100]])
def test_a_start_is_made_where_none_is_given(place, mode, landmarks):
    assert error(solve_distances(ALL, pdist(place), mode=mode, landmarks=landmarks).X, place) < 1e-3


@pytest.mark.parametrize("mode", ["exact", "robust"])
def test_bad_input_is_refused(place, mode):
    d = pdist(place)
    for pairs, lengths, X0, message in ((ALL, -d, place, "negative or not finite"), (ALL, d[1:], place, "one length per pair"), (ALL[:0], d[:0], place, "one length per pair"),
                                        (ALL, d, place[:50], "number the points"), (ALL, d, place[:, :1], "one row of two numbers")):
        with pytest.raises(InputError, match=message):
            solve_distances(pairs, lengths, X0, mode=mode)
    again = np.vstack([ALL, ALL[:1, ::-1]])
    for pairs, lengths, message in ((ALL.astype(float), d, "two whole numbers per pair"), (ALL.ravel(), d, "two whole numbers per pair"), (ALL, 0 * d, "the longest is 0"),
                                    (ALL, 1e200 * d, "the longest is"), (ALL, d[:, None], "one length per pair")):
        with pytest.raises(InputError, match=message):
            solve_distances(pairs, lengths, mode=mode)
    with pytest.warns(GearsWarning, match="1 pairs are given again"):
        assert np.array_equal(solve_distances(again, np.append(d, 3 * d[0] + 1), place, mode=mode).X, solve_distances(ALL, d, place, mode=mode).X)
    assert np.array_equal(solve_distances(again, np.append(d, d[0]), place, mode=mode).X, solve_distances(ALL, d, place, mode=mode).X)


@pytest.mark.parametrize(("how", "message"), [({"mode": "robst"}, "choose one of exact, robust"), ({"iteration": 3}, "is no option of mode 'exact'"),
                                              ({"mode": "robust", "landmarks": [0, 1, 500]}, "name points from 0"), ({"landmarks": [-1, 2, 3]}, "name points from 0"),
                                              ({"mode": "robust", "weight": -np.ones(len(ALL))}, "confidence from 0"), ({"mode": "robust", "weight": [1.0]}, "confidence from 0")])
def test_bad_options_are_refused(place, how, message):
    with pytest.raises(InputError, match=message):
        solve_distances(ALL, pdist(place), **how)


def test_a_star_has_some_map():
    star = np.array([[0, 1], [0, 2], [0, 3], [0, 4]])
    found = solve_distances(star, np.arange(1.0, 5.0))
    assert np.isfinite(found.X).all() and found.stress < 0.5  # lengths to one hub settle nothing else


def test_tidy_edges_keeps_the_first_of_duplicates():
    edges, lengths = tidy_edges(4, np.array([[2, 0], [1, 1], [0, 2], [0, 1]]), np.array([5, 1, 7, 3]))
    assert edges.tolist() == [[0, 1], [0, 2]] and lengths.tolist() == [3, 5]


def test_stress1_of_vectors_and_batches():
    d, d_hat, w = np.random.default_rng(4).random((3, 50))
    assert stress1(d_hat, d) == pytest.approx(np.linalg.norm(d_hat - d) / np.linalg.norm(d))
    assert stress1(d_hat, d, w) == pytest.approx(np.sqrt((w * (d_hat - d) ** 2).sum() / (w * d**2).sum()))
    best = min(stress1(s * d_hat, d) for s in np.linspace(0, 3, 3001))
    assert stress1(d_hat, d, scaled=True) == pytest.approx(best, abs=1e-5) and optimal_scale(np.zeros(3), np.ones(3)) == 0
    both = stress1(*(torch.from_numpy(np.stack([x, x[::-1].copy()])) for x in (d_hat, d, w)))
    assert both.tolist() == pytest.approx([stress1(d_hat, d, w)] * 2)


@settings(max_examples=20, deadline=None)
@given(angle=st.floats(0, 6.3), flip=st.booleans(), scale=st.floats(0.1, 10))
def test_canonical_frame_is_unique(angle, flip, scale):
    X = np.random.default_rng(0).gamma(2, size=(50, 2)) * [2, 1]
    c, s = np.cos(angle), np.sin(angle)
    Q = np.array([[c, s], [-s, c]]) @ np.diag([1, -1 if flip else 1])
    assert np.allclose(canonical(scale * X @ Q + 3), canonical(X), atol=1e-8)
