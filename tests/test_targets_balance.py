"""Many descents at once, and the variants of the recipe: the written-out gradient is the library's, a stop-gradient stops, all losses are zero at the truth."""
from dataclasses import replace

import pytest
import torch

from gears_nb.core.errors import InputError
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.targets.balance import (
    EmaBalance,
    directed_pairs,
    effective_sigma,
    effective_walk,
    first_sigma_stress,
    log_square_rows,
    naive_walk,
    predicted_sigma,
    walk_log_square,
)
from gears_nb.targets.builder import build_targets
from gears_nb.targets.descent import LONGEST, adam_descent, fast_products, freeze_walk, frozen_loss, frozen_walk, products_exact
from gears_nb.targets.energy import stress, walk_divergence
from gears_nb.targets.families import FAMILIES

MASK = torch.arange(40)[None] < torch.tensor([40, 31])[:, None]


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed)).double()


def padded(seed: int = 0) -> torch.Tensor:
    return cloud(2, 40, seed=seed).masked_fill(~MASK[..., None], 0)


def value_and_slope(loss, X):
    X = X.clone().requires_grad_()
    value = loss(X)
    return value.detach(), torch.autograd.grad(value.sum(), X)[0]


@pytest.mark.parametrize("steps", range(1, LONGEST + 1))
def test_frozen_walk_is_the_library_s(steps):
    t = build_targets(padded(), MASK, k=10, rw_steps=steps)
    w = freeze_walk(t, torch.float64)
    for X in (gauge_fix(padded(), MASK) + 0.1 * padded(1), 0.5 * padded(2)):
        torch.testing.assert_close(value_and_slope(lambda X: walk_divergence(X, t), X), value_and_slope(lambda X: frozen_walk(X, w), X), rtol=1e-7, atol=1e-9)


def test_frozen_walk_with_walks_of_different_length():
    """Minisets of one batch keep their own number of steps."""
    X, mask = cloud(2, 140), torch.arange(140)[None] < torch.tensor([140, 100])[:, None]
    t = build_targets(X, mask)
    assert t.rw_steps.tolist() == [4, 3]
    Z = gauge_fix(X, mask) + 0.05 * cloud(2, 140, seed=1).masked_fill(~mask[..., None], 0)
    torch.testing.assert_close(frozen_walk(Z, freeze_walk(t, torch.float64)), walk_divergence(Z, t), rtol=1e-7, atol=1e-9)


def test_frozen_walk_without_its_value_has_the_same_slope():
    w = freeze_walk(build_targets(padded(), MASK, k=8), torch.float64)
    value, slope = value_and_slope(lambda X: frozen_walk(X, w), padded(3))
    blind, same = value_and_slope(lambda X: frozen_walk(X, w, value=False), padded(3))
    assert (value > 0).all() and (blind == 0).all()
    torch.testing.assert_close(slope, same)


def test_frozen_walk_is_finite_far_away():
    """A layout whose spots see nothing of each other must not break a descent."""
    w = freeze_walk(build_targets(cloud(1, 60).float(), k=6))
    value, slope = value_and_slope(lambda X: frozen_walk(X, w), 6 * cloud(1, 60, seed=4).float())
    assert torch.isfinite(value).all() and torch.isfinite(slope).all() and slope.abs().max() > 0


def test_walks_that_are_too_long_are_refused():
    with pytest.raises(InputError, match="rw_steps"):
        freeze_walk(build_targets(cloud(1, 30), k=5, rw_steps=LONGEST + 1))


@pytest.mark.parametrize("family", ["f1", "f2", "f2+f4", "f4", "f1+f2", "f2+f1reg", "f5", "gram"])
def test_families_keep_their_loss(family):
    t, X = FAMILIES[family].build(cloud(2, 40).float(), k=8), (cloud(2, 40) + 0.3 * cloud(2, 40, seed=1)).float()
    torch.testing.assert_close(frozen_loss(family, t)(X), FAMILIES[family].loss(X, t), rtol=1e-4, atol=1e-5)
    slopes = [value_and_slope(loss, X)[1] for loss in (frozen_loss(family, t, value=False), lambda X: FAMILIES[family].loss(X, t))]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)


def test_descents_of_a_batch_are_separate():
    t = build_targets(cloud(1, 40).float())[[0, 0]]
    X0, both, seen = cloud(2, 40, seed=1).float(), frozen_loss("f2+f4", t), []
    ends = adam_descent(X0, both, 30, marks=(0, 30), see=lambda step, X: seen.append((step, float(both(X)[0]))))
    torch.testing.assert_close(ends[1:], adam_descent(X0[1:], frozen_loss("f2+f4", t[1]), 30), rtol=1e-2, atol=1e-3)
    assert [step for step, _ in seen] == [0, 30] and seen[1][1] < seen[0][1]
    assert torch.equal(X0, cloud(2, 40, seed=1).float())


def test_fast_products_are_exact_and_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), fast_products():
        assert products_exact()
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_balance_makes_units_disappear():
    balance = EmaBalance({"a": 1.0, "b": 0.5})
    small = balance({"a": torch.tensor([2.0, 8.0]), "b": torch.tensor([1e-4, 1e4])})
    torch.testing.assert_close(small, torch.tensor([1.5, 1.5]))


def test_balance_without_memory_is_a_logarithm():
    x = torch.tensor([0.5, -2.0, 3.0], requires_grad=True)
    EmaBalance({"a": 2.0}, decay=0.0)({"a": x.square()}).sum().backward()
    torch.testing.assert_close(x.grad, 4 / x.detach())


def test_balance_remembers_and_stays_finite():
    balance = EmaBalance({"a": 1.0}, decay=0.5)
    balance({"a": torch.tensor([4.0])})
    torch.testing.assert_close(balance({"a": torch.tensor([1.0])}), torch.tensor([1 / ((1 + 0.5) / 0.75)]))
    assert float(EmaBalance({"a": 1.0})({"a": torch.zeros(1)})) == 0


def test_bad_balances_are_refused():
    with pytest.raises(InputError, match="decay"):
        EmaBalance({"a": 1.0}, decay=1.0)
    with pytest.raises(InputError, match="no share"):
        EmaBalance({"a": 1.0})({"b": torch.ones(1)})


def test_effective_bandwidth_is_the_frozen_one_at_the_truth():
    t, Y = build_targets(padded(), MASK, k=7), gauge_fix(padded(), MASK)
    torch.testing.assert_close(effective_sigma(Y, t), t.sigma_local)
    assert effective_walk(Y, t).abs().max() < 1e-9
    torch.testing.assert_close(predicted_sigma(2 * Y, t)[MASK], 2 * t.sigma_local[MASK])


def test_effective_bandwidth_has_no_gradient_and_the_naive_one_has():
    t, X = build_targets(cloud(1, 40), k=7), cloud(1, 40, seed=1)
    held = replace(t, sigma_local=effective_sigma(X, t))
    slope = value_and_slope(lambda X: walk_divergence(X, held), X)[1]
    torch.testing.assert_close(value_and_slope(lambda X: effective_walk(X, t), X)[1], slope)
    held = replace(t, sigma_local=predicted_sigma(X, t).detach())
    naive = value_and_slope(lambda X: naive_walk(X, t), X)[1]
    assert not torch.allclose(naive, value_and_slope(lambda X: walk_divergence(X, held), X)[1], rtol=0.1)


def test_naive_bandwidth_does_not_see_the_scale():
    Y = gauge_fix(cloud(1, 40))
    t = build_targets(Y, k=7)
    assert naive_walk(0.1 * Y, t) < 1e-3 < effective_walk(0.1 * Y, t) < walk_divergence(0.1 * Y, t)


def test_log_squares_by_hand():
    P, Q = torch.tensor([[0.5, 0.5, 0.0]]).double(), torch.tensor([[0.25, 0.75, 0.5]]).double()
    expected = (torch.tensor(2.0).log() ** 2 + torch.tensor(1.5).log() ** 2) / 2
    torch.testing.assert_close(log_square_rows(P, Q.log())[0], expected.double())


@pytest.mark.parametrize("loss", [walk_log_square, effective_walk, first_sigma_stress, lambda X, t: first_sigma_stress(X, t, "both")])
def test_variants_are_zero_at_the_truth_and_blind_to_padding(loss):
    t, Y = build_targets(padded(), MASK, k=8), gauge_fix(padded(), MASK)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()
    assert loss(Y @ turn, t).abs().max() < 1e-9
    X = padded(5)
    moved = torch.where(MASK[..., None], X, torch.full_like(X, 1e3))  # what stands in padded rows is never read
    torch.testing.assert_close(loss(X, t), loss(moved, t))
    alone = build_targets(padded()[1:, :31], k=8, n_landmarks=int(t.landmark_mask[1].sum()))
    torch.testing.assert_close(loss(X, t)[1:], loss(X[1:, :31], alone))


def test_neighbour_edges_belong_to_their_owner():
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [6.0, 0.0]]).double()
    t = build_targets(line, k=1, n_landmarks=1, n_ring=0)
    edges, ok = directed_pairs(t)
    assert sorted(map(tuple, edges[ok].tolist())) == [(0, 1), (0, 3), (1, 0), (1, 3), (2, 1), (3, 0), (3, 1), (3, 2)]
    unit = t.sigma_local[0, 0]
    moved = (line + torch.tensor([[0.0, 0], [0, 0], [0, 0], [3, 0]])).double()[None] * unit
    assert abs(float(first_sigma_stress(moved, t)) - (1 + 9 + 1 + 9 + 1) / 8) < 1e-2


def test_with_one_bandwidth_the_forms_agree():
    t = build_targets(cloud(1, 40), k=7)
    even = replace(t, sigma_local=torch.full_like(t.sigma_local, 0.5))
    X = cloud(1, 40, seed=1)
    torch.testing.assert_close(first_sigma_stress(X, even, "both"), stress(X, even, "sigma"), rtol=1e-3, atol=0)
