"""answers: expected distances in one unit, further queries, and what is kept on disk."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from gears_nb.benchmark.answers import Answer, answer, answers, kept, load_query
from gears_nb.benchmark.peers import PeerFailed
from gears_nb.core.errors import InputError


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_expected_distances_feel_neither_pose_nor_unit(seed, scale):
    rng = np.random.default_rng(seed)
    X, spread, rows = rng.normal(size=(12, 2)), rng.uniform(0, 2, 12), np.arange(3, 12)
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    one, other = Answer("a", X, spread), Answer("a", scale * X @ turn + rng.normal(size=2), scale * spread)
    np.testing.assert_allclose(one.expected(rows), other.expected(rows), rtol=1e-6)
    assert (one.expected(rows) >= pdist(one.at(rows)[0]) - 1e-12).all()


def test_a_method_that_is_sure_expects_the_distances_of_its_map():
    X = np.random.default_rng(0).normal(size=(9, 2))
    np.testing.assert_allclose(Answer("a", X, np.zeros(9)).expected(np.arange(9)), pdist(Answer("a", X).at(np.arange(9))[0]))


def test_dissociated_cells_are_a_query_of_their_own():
    spots, cells = load_query("tiny"), load_query("tiny/SC")
    assert cells.query.n_obs == spots.extra["SC"].n_obs and "spatial" not in spots.extra["SC"].obsm
    np.testing.assert_array_equal(cells.query.obsm["spatial"], spots.extra["SC"].obsm["spatial_true"])


@pytest.mark.parametrize(("name", "hint"), [("tiny/XX", "no query 'XX'"), ("tiiny", "did you mean tiny")])
def test_unknown_queries_are_refused(name, hint):
    with pytest.raises(InputError, match=hint):
        load_query(name)


def test_answers_are_made_once_and_failures_are_not_kept(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": Answer("a", np.full((3, 2), np.nan), np.ones(3)), "b": Answer("b", np.eye(3)[:, :2])}

    assert not kept(tmp_path, make, "a").placed.any() and kept(tmp_path, make, "b").spread is None and len(made) == 1

    def fail():
        raise PeerFailed("not today")

    for _ in range(2):
        with pytest.raises(PeerFailed):
            kept(tmp_path / "other", fail, "a")
    assert not (tmp_path / "other").exists()


def test_a_tool_without_an_answer_is_named_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    found, without = answers(load_query("tiny"), ["knn5", "novosparc"], name="smoke")
    assert [a.method for a in found] == ["knn5"] and "not installed" in without["novosparc"]
    with pytest.raises(InputError, match="unknown method"):
        answer(load_query("tiny"), "nobody")
