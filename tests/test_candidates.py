"""Candidate places: the distance of two sets against brute force, what it may not depend on, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist

from gears_nb.core.errors import InputError
from gears_nb.lab.rows import in_fresh_process
from gears_nb.reconstruct import candidates
from gears_nb.reconstruct.candidates import find_candidates, own_spread, set_distances


def brute(places: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    "Half the squared energy distance, pair by pair."
    mean = lambda a, b: cdist(places[a].astype(float), places[b].astype(float)).mean()
    return np.array([mean(i, j) - (mean(i, i) + mean(j, j)) / 2 for i, j in pairs])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 12), k=st.integers(1, 9), seed=st.integers(0, 999), block=st.sampled_from([1, 50, 2**24]))
def test_distances_of_sets(n, k, seed, block):
    rng = np.random.default_rng(seed)
    places, pairs = rng.normal(size=(n, k, 2)).astype(np.float32), np.stack(np.triu_indices(n, 1), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "BLOCK", block)
        spread = own_spread(places)
        found = set_distances(places, pairs, spread)
    np.testing.assert_allclose(found, np.maximum(brute(places, pairs), 0), atol=2e-5)
    np.testing.assert_allclose(set_distances(places, pairs[:, ::-1], spread), found, atol=1e-6)
    shuffled = rng.permuted(np.arange(k))
    np.testing.assert_allclose(set_distances(places[:, shuffled], pairs, spread), found, atol=2e-5)


def test_sure_cells_have_plain_distances_and_equal_sets_none():
    rng = np.random.default_rng(0)
    point, wide, pairs = rng.normal(size=(20, 1, 2)).astype(np.float32), rng.normal(size=(1, 8, 2)).astype(np.float32), np.stack(np.triu_indices(20, 1), 1)
    sure, same = np.repeat(point, 5, axis=1), np.repeat(wide, 20, axis=0)
    np.testing.assert_allclose(set_distances(sure, pairs, own_spread(sure)), pdist(point[:, 0]), atol=1e-5)
    np.testing.assert_allclose(set_distances(same, pairs, own_spread(same)), 0, atol=1e-5)
    assert (own_spread(sure) == 0).all() and own_spread(same).min() > 0.5


@pytest.mark.parametrize("mirror", [1, -1])
def test_frames_and_units_of_sections_do_not_matter(mirror):
    rng = np.random.default_rng(1)
    features, asked = [rng.normal(size=(40, 6)) for _ in range(2)], rng.normal(size=(15, 6))
    coords, pairs = [rng.normal(size=(40, 2)) for _ in range(2)], np.stack(np.triu_indices(15, 1), 1)
    turn = np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]]) @ np.diag([1, mirror])
    moved = [coords[0] @ turn * 250 - 9, coords[1]]
    one, two = (find_candidates(asked, features, c, k=7) for c in (coords, moved))
    np.testing.assert_allclose(one.distances(pairs), two.distances(pairs), atol=1e-4)
    np.testing.assert_allclose(one.doubt, two.doubt, atol=1e-4)
    np.testing.assert_allclose(one.distances(pairs), find_candidates(asked, features[::-1], coords[::-1], k=7).distances(pairs), atol=1e-5)


def test_places_of_the_query_cannot_be_read():
    """Nothing but features of the query goes in: its own positions have no way in, and its order only orders the answer."""
    rng = np.random.default_rng(2)
    features, asked, coords, order = rng.normal(size=(50, 4)), rng.normal(size=(12, 4)), rng.normal(size=(50, 2)), np.random.default_rng(3).permutation(12)
    pairs = np.stack(np.triu_indices(12, 1), 1)
    whole, mixed = find_candidates(asked, [features], [coords], k=5), find_candidates(asked[order], [features], [coords], k=5)
    np.testing.assert_array_equal(whole.doubt[order], mixed.doubt)
    np.testing.assert_allclose(whole.distances(order[pairs]), mixed.distances(pairs), atol=1e-6)


@pytest.mark.parametrize(("sections", "coords", "message"), [
    ([], [], "0 tables and 0 sets"), ([np.ones((5, 3))], [], "1 tables and 0 sets"), ([np.ones((5, 3))], [np.ones((4, 2))], "5 rows and 4 positions"),
    ([np.ones((5, 4))], [np.random.default_rng(0).normal(size=(5, 2))], "3 columns, B has 4")])
def test_tables_that_do_not_belong_together(sections, coords, message):
    with pytest.raises(InputError, match=message):
        find_candidates(np.ones((2, 3)), sections, coords)


def measured(n: int) -> None:
    rng = np.random.default_rng(0)
    found = find_candidates(rng.normal(size=(n, 8)), [rng.normal(size=(500, 8))], [rng.normal(size=(500, 2))])
    found.distances(rng.integers(0, n, size=(8 * n, 2)))


def test_memory_grows_with_cells_and_not_with_their_square():
    small, large = (in_fresh_process(lambda n=n: measured(n)).peak_mb for n in (2_000, 16_000))
    assert large < 6 * max(small, 60), (small, large)
