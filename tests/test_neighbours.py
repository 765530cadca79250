"""The one search for neighbours: exact by every road, ties by index, never itself; and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from gears_nb.core.errors import InputError
from gears_nb.geometry import neighbours
from gears_nb.geometry.neighbours import (
    knn,
    knn_between,
    neighbour_recall,
    neighbour_sets,
    squared_distances,
    unit_rows,
)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), m=st.integers(2, 30), k=st.integers(1, 40), seed=st.integers(0, 999), levels=st.integers(1, 3))
def test_cosine_is_exact_and_breaks_ties_by_index(n, m, k, seed, levels):
    # Signed unit vectors: similarities are exactly -1, 0 or 1, so that almost everything is a tie.
    rng = np.random.default_rng(seed)
    A, B = (np.eye(levels)[rng.integers(0, levels, size)] * rng.choice([-1, 1], size=(size, 1)) for size in (n, m))
    distance, index = knn_between(A, B, k, metric="cosine")
    expected = np.argsort(-(A @ B.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(1 - distance**2 / 2, np.take_along_axis(A @ B.T, expected, 1), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), k=st.integers(1, 70), side=st.integers(1, 8), dim=st.sampled_from([1, 2, 3, 20]), seed=st.integers(0, 999))
def test_euclidean_is_exact_and_breaks_ties_by_index(n, k, side, dim, seed):
    # Few whole numbers: coincident points and ties everywhere, in few dimensions (a tree) and in many (all pairs).
    X = np.random.default_rng(seed).integers(0, side, (n, dim)).astype(float)
    D = cdist(X, X, "sqeuclidean").round()
    np.fill_diagonal(D, np.inf)
    expected = np.argsort(D, axis=1, kind="stable")[:, : min(k, n - 1)]
    distance, index = knn(X, k)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(distance, np.sqrt(np.take_along_axis(D, expected, 1)), atol=1e-6)
    if k < n:
        np.testing.assert_array_equal(knn_between(X[:5], X, k)[1], np.argsort(cdist(X[:5], X, "sqeuclidean").round(), axis=1, kind="stable")[:, :k])


def test_a_rotation_changes_no_tie():
    lattice = np.stack(np.meshgrid(np.arange(15.0), np.arange(12.0)), -1).reshape(-1, 2)
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    for k in (3, 6, 10, 17):
        np.testing.assert_array_equal(knn(7 * lattice @ turn + 3, k)[1], knn(lattice, k)[1])
        near = neighbour_sets(torch.from_numpy(lattice)[None], k)[0]
        np.testing.assert_array_equal(near.nonzero()[:, 1].reshape(-1, k), np.sort(knn(lattice, k)[1], axis=1))


@pytest.mark.parametrize("entries", [1, 300, 10**7])
def test_it_does_not_depend_on_the_block_size(entries, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ENTRIES", entries)
    rng = np.random.default_rng(1)
    A, B = rng.normal(size=(90, 12)), rng.normal(size=(150, 12))
    distance, index = knn_between(A, B, 9, metric="cosine")
    cosine = unit_rows(A) @ unit_rows(B).T
    np.testing.assert_array_equal(index, np.argsort(-cosine, axis=1, kind="stable")[:, :9])
    assert index.dtype == np.int64 and distance.dtype == np.float32 and (np.diff(distance, axis=1) >= 0).all()


def test_a_row_is_never_its_own_neighbour():
    F = np.repeat(np.random.default_rng(2).normal(size=(10, 5)), 3, axis=0)
    for metric in ("cosine", "euclidean"):
        distance, index = knn(F, 2, metric=metric)
        assert (index != np.arange(30)[:, None]).all()
        np.testing.assert_array_equal(index // 3, np.repeat(np.arange(10), 3)[:, None].repeat(2, 1))
        np.testing.assert_allclose(distance, 0, atol=1e-3)
        assert knn(F, 99, metric=metric)[0].shape == (30, 29)


def test_inverted_lists_find_most_and_never_the_row_itself():
    rng = np.random.default_rng(4)
    for metric, X in (("cosine", np.tanh(rng.normal(size=(2000, 2)) @ rng.normal(size=(2, 20)))), ("euclidean", rng.normal(size=(2000, 2)) @ rng.normal(size=(2, 20)))):
        exact, fast = (knn(X, 8, metric=metric, exact=e, candidates=300)[1] for e in (True, False))
        assert (fast != np.arange(2000)[:, None]).all()
        assert np.mean([len(np.intersect1d(a, b)) / 8 for a, b in zip(exact, fast)]) > 0.9
    np.testing.assert_array_equal(fast, knn(X, 8, metric=metric, exact=False, candidates=300)[1])


def test_cosine_ignores_the_length_of_vectors_and_tolerates_zero_rows():
    rng = np.random.default_rng(3)
    A, B = rng.normal(size=(8, 6)), rng.normal(size=(20, 6))
    scale = 2.0 ** rng.integers(-8, 8, size=(20, 1))
    np.testing.assert_array_equal(knn_between(A, B, 5, metric="cosine")[1], knn_between(4.0 * A, scale * B, 5, metric="cosine")[1])
    A[0] = 0
    distance, index = knn_between(A, B, 3, metric="cosine")
    np.testing.assert_array_equal(index[0], [0, 1, 2])
    np.testing.assert_allclose(1 - distance[0]**2 / 2, 0, atol=1e-6)


def test_it_refuses_what_it_cannot_answer():
    F = np.ones((3, 2))
    for ask in (lambda: knn(F, 0), lambda: knn(F[:1], 1), lambda: knn_between(F, F[:0], 1)):
        with pytest.raises(InputError, match="k must be a whole number from 1"):
            ask()


def test_padding_and_recall():
    X = np.random.default_rng(5).normal(size=(80, 2))
    assert neighbour_recall(X, 3 * X + 1) == 1 and neighbour_recall(X[::-1], X) < 0.5
    d2 = squared_distances(torch.from_numpy(X)[None])
    assert torch.equal(d2, d2.transpose(1, 2)) and not d2.diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize(("X", "how", "message"), [
    (np.ones((5, 2)), {"metric": "manhattan"}, "choose one of euclidean, cosine"), (np.ones(5), {}, "pass a table"), (np.ones((5, 0)), {}, "pass a table"),
    (np.ones((5, 2)), {"k": 2.0}, "whole number"), (np.ones((5, 2)), {"k": 0}, "whole number"), (np.ones((1, 2)), {}, "of 0 candidates")])
def test_searches_that_make_no_sense_are_refused(X, how, message):
    with pytest.raises(InputError, match=message):
        knn(X, **{"k": 2, **how})


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("columns", [2, 20])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_counted(metric, columns, value):
    X = np.random.default_rng(0).normal(size=(9, columns))
    X[[2, 5], 1] = value
    for search in (lambda: knn(X, 2, metric=metric), lambda: knn_between(X, X[:2], 1, metric=metric), lambda: knn_between(X[:2], X, 1, metric=metric)):
        with pytest.raises(InputError, match="2 of 9 rows hold NaN or infinite values"):
            search()


def test_between_tables_of_other_width_or_without_rows():
    with pytest.raises(InputError, match="has 2 columns, B has 3"):
        knn_between(np.ones((4, 2)), np.ones((4, 3)), 1)
    distance, index = knn_between(np.ones((0, 2)), np.ones((4, 2)), 3)
    assert distance.shape == index.shape == (0, 3)
