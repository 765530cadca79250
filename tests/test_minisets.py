"""Minisets: distinct, seeded, local where they should be, and never larger than memory allows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.data import minisets
from gears_nb.data.minisets import (
    default_tau,
    gumbel_topk,
    miniset_indices,
    paired_minisets,
)


def cloud(n, seed=0):
    return torch.randn(n, 2, generator=torch_rng(seed, "cloud"))


def distinct(rows):
    return bool((rows.sort(1).values.diff(dim=1) > 0).all())


@settings(max_examples=25, deadline=None)
@given(n=st.integers(20, 120), share=st.floats(0, 1), fraction=st.floats(0, 1), alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_rows_are_distinct_valid_and_seeded(n, share, fraction, alpha, seed):
    coords, size = cloud(n, seed), max(4, int(share * n))
    draw = miniset_indices(coords, size, 5, torch_rng(seed, "a"), global_fraction=fraction)
    assert draw.shape == (5, size) and draw.dtype == torch.long
    assert distinct(draw) and int(draw.min()) >= 0 and int(draw.max()) < n
    assert torch.equal(draw, miniset_indices(coords, size, 5, torch_rng(seed, "a"), global_fraction=fraction))
    one, two, shared = paired_minisets(coords, size, 4, torch_rng(seed, "b"), alpha=alpha, global_fraction=fraction)
    assert distinct(one) and distinct(two)
    assert shared.shape[1] == min(size, max(16, int(alpha * size)))
    assert torch.equal(one[:, : shared.shape[1]], shared) and torch.equal(two[:, : shared.shape[1]], shared)


def test_topk_draws_without_repetition_have_sequential_probabilities():
    weights = torch.tensor([0.5, 0.3, 0.2])
    drawn = gumbel_topk(weights.log().expand(60_000, 3), 3, torch_rng(0, "w"))
    for first in range(3):
        rows = drawn[drawn[:, 0] == first]
        assert abs(len(rows) / 60_000 - float(weights[first])) < 0.01
        for second in set(range(3)) - {first}:
            expected = float(weights[second] / (1 - weights[first]))
            assert abs((rows[:, 1] == second).float().mean().item() - expected) < 0.02


def test_global_part_reaches_far_and_local_part_stays():
    coords = torch.stack([torch.arange(2000.0), torch.zeros(2000)], 1)
    near = miniset_indices(coords, 50, 200, torch_rng(0), global_fraction=0.0)
    mixed = miniset_indices(coords, 50, 200, torch_rng(0), global_fraction=0.3)

    def spread(indices):
        return (coords[indices, 0].max(1).values - coords[indices, 0].min(1).values).median()

    assert spread(near) < 400 and spread(mixed) > 1200


def test_groups_do_not_need_one_big_array(monkeypatch):
    coords = cloud(300)
    monkeypatch.setattr(minisets, "MAX_ENTRIES", 900)
    draw = miniset_indices(coords, 40, 11, torch_rng(5))
    assert draw.shape == (11, 40) and distinct(draw)
    one, _, _ = paired_minisets(coords, 40, 11, torch_rng(5))
    assert one.shape == (11, 40)


def test_tau_follows_the_unit():
    coords = cloud(500)
    assert default_tau(100 * coords, 64) == pytest.approx(100 * default_tau(coords, 64), rel=1e-4)
    assert default_tau(coords, 256) > default_tau(coords, 64)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"n_miniset": 31}, "n_miniset"), ({"n_miniset": 8, "global_fraction": 1.5}, "global_fraction")],
)
def test_bad_input_is_one_line(arguments, field):
    with pytest.raises(InputError) as caught:
        miniset_indices(cloud(30), count=2, rng=torch_rng(0), **arguments)
    assert field in str(caught.value) and "\n" not in str(caught.value)


def test_numpy_coordinates_are_accepted():
    assert miniset_indices(np.random.default_rng(0).normal(size=(50, 2)), 10, 2, torch_rng(0)).shape == (2, 10)
