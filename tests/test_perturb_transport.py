"""Plans between control and treated latents, what is read from them, their reductions, and two distances of populations."""
from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import rbf_kernel

from gears_nb.core.errors import InputError
from gears_nb.perturb.transport import (
    SparsePlan,
    blockwise,
    distances,
    draw,
    energy_distance,
    mean_cost,
    mmd,
    nearest_plan,
    project,
    sinkhorn,
    squared_cost,
    transport_cost,
)

SEEDS = st.integers(0, 999)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(seed: int, n: int = 12, m: int = 15, d: int = 3, groups: tuple[int, ...] = (), dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    return torch.randn(*groups, n, d, generator=g, dtype=dtype), 1.2 * torch.randn(*groups, m, d, generator=g, dtype=dtype) + 0.5


# --- the cost

@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
def test_cost_is_the_squared_distance_over_its_mean(seed, n, m, d):
    a, b = clouds(seed, n, m, d)
    raw = ot.dist(a.numpy(), b.numpy())
    np.testing.assert_allclose(mean_cost(a, b), raw.mean(), rtol=1e-9)
    np.testing.assert_allclose(squared_cost(a, b), raw / raw.mean(), rtol=1e-8)


def test_weighted_mean_leaves_padding_out():
    a, b = clouds(0)
    wa, wb = torch.rand(12, generator=generator(1)), torch.rand(15, generator=generator(2))
    raw = ot.dist(a.numpy(), b.numpy())
    share = np.outer(wa / wa.sum(), wb / wb.sum())
    np.testing.assert_allclose(mean_cost(a, b, wa, wb), (share * raw).sum(), rtol=1e-6)
    padded = torch.cat([a, torch.full((3, 3), 1e3, dtype=a.dtype)])
    np.testing.assert_allclose(squared_cost(padded, b, torch.arange(15) < 12)[:12], squared_cost(a, b), rtol=1e-9)


@given(SEEDS, st.floats(1e-3, 1e3), st.floats(-5, 5))
def test_a_common_scale_and_shift_is_worth_nothing(seed, factor, shift):
    a, b = (x.requires_grad_() for x in clouds(seed, groups=(2,)))
    cost = squared_cost(a, b)
    value = transport_cost(cost, sinkhorn(cost))
    moved = squared_cost(factor * (a + shift), factor * (b + shift))
    torch.testing.assert_close(transport_cost(moved, sinkhorn(moved)), value, rtol=1e-6, atol=1e-9)
    by_a, by_b = torch.autograd.grad(value.sum(), (a, b))
    assert abs((by_a * a).sum() + (by_b * b).sum()) < 1e-10  # no pay for shrinking
    assert (by_a.sum((0, 1)) + by_b.sum((0, 1))).abs().max() < 1e-10


def test_one_place_and_half_precision():
    ones = torch.ones(4, 2, requires_grad=True)
    cost = squared_cost(ones, torch.ones(3, 2))
    plan = sinkhorn(cost)
    transport_cost(cost, plan).backward()
    assert not cost.any() and torch.allclose(plan, torch.full((4, 3), 1 / 12)) and ones.grad.isfinite().all()
    a, b = clouds(1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = squared_cost(a, b)
        plan = sinkhorn(cost)
        assert torch.equal(cost, squared_cost(a, b)) and cost.dtype == plan.dtype == project(plan, b).dtype == torch.float32
    torch.testing.assert_close(project(plan, b), project(sinkhorn(squared_cost(a, b)), b))
    halves = a.bfloat16(), b.bfloat16()
    assert squared_cost(*halves).dtype == nearest_plan(*halves, 4).weight.dtype == blockwise(*halves, generator(), 8).project(halves[1]).dtype == torch.float32


def test_far_from_the_origin_nothing_is_lost():
    a, b = clouds(2)
    near = squared_cost(a.float(), b.float())
    torch.testing.assert_close(squared_cost((a + 500).float(), (b + 500).float()), near, rtol=2e-3, atol=2e-4)


# --- the plan

@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0, 5.0])
def test_plan_is_that_of_pot(epsilon):
    a, b = clouds(3)
    cost = squared_cost(a, b)
    wa, wb = torch.rand(12, generator=generator(4), dtype=a.dtype) + 0.1, torch.rand(15, generator=generator(5), dtype=a.dtype) + 0.1
    wa, wb = wa / wa.sum(), wb / wb.sum()
    reference = ot.sinkhorn(wa.numpy(), wb.numpy(), cost.numpy(), epsilon, method="sinkhorn_log", numItermax=20000, stopThr=1e-12)
    np.testing.assert_allclose(sinkhorn(cost, epsilon, 1500, wa, wb), reference, atol=1e-8)


def test_small_epsilon_is_the_exact_plan_and_stable_in_single_precision():
    a, b = clouds(6, 15, 15)
    cost = squared_cost(a, b)
    exact = ot.emd2(np.full(15, 1 / 15), np.full(15, 1 / 15), cost.numpy())
    assert transport_cost(cost, sinkhorn(cost, 1e-3, 3000)).item() == pytest.approx(exact, rel=2e-3)
    plan = sinkhorn(cost.float(), 1e-3)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), torch.full((15,), 1 / 15), rtol=1e-5, atol=0)
    far = sinkhorn(torch.eye(5) * 1e4, 1e-3)
    assert far.isfinite().all() and not far.diagonal().any()


def test_one_dimension_is_sorting():
    a, b = clouds(7, 16, 16, 1)
    partner = sinkhorn(squared_cost(a, b), 1e-3, 2000).argmax(1)
    assert torch.equal(b[partner, 0].argsort(), a[:, 0].argsort())
    value = transport_cost(distances(a, b), sinkhorn(squared_cost(a, b), 1e-3, 2000))
    assert value.item() == pytest.approx(wasserstein_distance(a[:, 0], b[:, 0]), rel=0.01)


@given(SEEDS, st.floats(0.03, 3), st.integers(1, 40))
def test_rows_are_exact_after_any_number_of_rounds(seed, epsilon, iterations):
    a, b = clouds(seed, groups=(2, 3))
    weights = torch.rand(2, 3, 12, generator=generator(seed)) + 0.01
    cost = squared_cost(a, b)
    plan = sinkhorn(cost, epsilon, iterations, weights)
    torch.testing.assert_close(plan.sum(-1), weights.double() / weights.double().sum(-1, keepdim=True), rtol=1e-9, atol=0)
    assert (plan >= 0).all() and (transport_cost(cost, plan) > 0).all()


@given(SEEDS)
def test_limits_blocks_and_order(seed):
    a, b = clouds(seed, groups=(2,))
    cost = squared_cost(a, b)
    plan = sinkhorn(cost, 0.1, 150)
    torch.testing.assert_close(plan[1], sinkhorn(cost[1], 0.1, 150))
    torch.testing.assert_close(sinkhorn(cost, 1e6), torch.full_like(cost, 1 / 180), rtol=1e-4, atol=0)
    torch.testing.assert_close(sinkhorn(squared_cost(a, a), 1e-4), torch.eye(12, dtype=a.dtype).expand(2, -1, -1) / 12, atol=1e-4, rtol=0)
    rows, columns = torch.randperm(12, generator=generator(seed)), torch.randperm(15, generator=generator(seed))
    torch.testing.assert_close(sinkhorn(squared_cost(a[:, rows], b[:, columns]), 0.1, 150), plan[:, rows][:, :, columns])
    torch.testing.assert_close(sinkhorn(cost.mT, 0.1, 150), plan.mT, atol=1e-6, rtol=1e-4)
    value = [transport_cost(cost, sinkhorn(cost, e, 150)) for e in (0.05, 0.3, 3.0)]
    assert (value[0] <= value[1] + 1e-6).all() and (value[1] <= value[2] + 1e-6).all() and (value[2] <= 1 + 1e-6).all()


def test_padding_counts_for_nothing():
    a, b = clouds(8)
    wide, tall = torch.cat([a, torch.full((4, 3), 77.0)]), torch.cat([b, torch.full((2, 3), -77.0)])
    here, there = torch.arange(16) < 12, torch.arange(17) < 15
    plan = sinkhorn(squared_cost(wide, tall, here, there), 0.1, 100, here, there)
    torch.testing.assert_close(plan[:12, :15], sinkhorn(squared_cost(a, b), 0.1, 100))
    assert not plan[12:].any() and not plan[:, 15:].any()
    assert not project(plan, tall)[12:].any() and (draw(plan, generator())[:12] < 15).all()


# --- its gradient

def entropic(a: torch.Tensor, b: torch.Tensor, epsilon: float, **how) -> torch.Tensor:
    cost = squared_cost(a, b)
    plan = sinkhorn(cost, epsilon, 500, **how)
    return transport_cost(cost, plan) + epsilon * torch.special.xlogy(plan, plan * plan.numel()).sum()


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_held_plan_has_the_gradient_of_the_whole_problem(epsilon):
    a, b = clouds(9, 6, 7)
    a.requires_grad_()
    cost = squared_cost(a, b)
    plan = sinkhorn(cost, epsilon, 500)
    assert not plan.requires_grad
    held = torch.autograd.grad(transport_cost(cost, plan), a)[0]
    torch.testing.assert_close(held, torch.autograd.grad(entropic(a, b, epsilon, unrolled=True), a)[0], atol=1e-8, rtol=1e-6)
    with torch.no_grad():
        for i, j in ((0, 0), (3, 2)):
            step = torch.zeros_like(a)
            step[i, j] = 1e-5
            finite = (entropic(a + step, b, epsilon) - entropic(a - step, b, epsilon)) / 2e-5
            assert held[i, j].item() == pytest.approx(finite.item(), abs=1e-8)


def test_whole_problem_is_that_of_geomloss():
    a, b = clouds(10)
    unit = mean_cost(a, b).item()
    peer = SamplesLoss("sinkhorn", p=2, blur=(0.2 * unit / 2) ** 0.5, scaling=0.98, debias=False, backend="tensorized")(a, b)
    assert entropic(a, b, 0.2).item() == pytest.approx(peer.item() * 2 / unit, rel=2e-3)


# --- partners

@given(SEEDS)
def test_projection_is_pot_s_barycentric_map(seed):
    a, b = clouds(seed)
    plan = sinkhorn(squared_cost(a, b), 0.1, 200)
    reference = ot.da.SinkhornTransport(reg_e=0.1 * mean_cost(a, b).item(), max_iter=5000, tol=1e-12).fit(Xs=a.numpy(), Xt=b.numpy())
    np.testing.assert_allclose(project(plan, b), reference.transform(Xs=a.numpy()), atol=1e-4)
    torch.testing.assert_close((project(plan, b)).mean(0), b.mean(0), atol=1e-4, rtol=0)


def test_means_of_partners_are_narrower_and_drawn_ones_are_not():
    a, b = clouds(11, 400, 400, 2)
    plan = sinkhorn(squared_cost(a, b), 0.3, 100)
    spread = b.var(0).sum()
    narrow, wide = project(plan, b).var(0).sum() / spread, b[draw(plan, generator(1))].var(0).sum() / spread
    assert narrow < 0.8 and abs(wide - 1) < 0.12
    drawn = torch.stack([b[draw(plan, generator(i))] for i in range(200)]).mean(0)
    assert (drawn - project(plan, b)).abs().mean() < 0.1


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 1.0])
def test_slope_between_normals_has_its_closed_form(epsilon):
    quantile = torch.special.ndtri((torch.arange(250, dtype=torch.float64) + 0.5) / 250)[:, None]
    a, b = quantile, 1.5 * quantile + 1
    price = epsilon * mean_cost(a, b).item()
    va, vb = a.var(correction=0).item(), b.var(correction=0).item()
    covariance = (np.sqrt(price**2 + 16 * va * vb) - price) / 4
    mean = project(sinkhorn(squared_cost(a, b), epsilon, 200), b)
    assert ((mean - 1) * a).mean().item() == pytest.approx(covariance, rel=0.03)


def test_draws_follow_the_row_and_the_generator():
    row = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    drawn = draw(row.expand(3, 10000, 6), generator(2))
    assert drawn.shape == (3, 10000)
    share = torch.bincount(drawn.flatten(), minlength=6) / 30000
    torch.testing.assert_close(share, row, atol=0.01, rtol=0)
    assert not share[[0, 2, 5]].any()
    assert torch.equal(drawn, draw(row.expand(3, 10000, 6), generator(2))) and not torch.equal(drawn, draw(row.expand(3, 10000, 6), generator(3)))
    assert torch.equal(draw(torch.eye(7), generator()), torch.arange(7))


# --- large blocks

def test_reductions_with_everything_are_the_full_plan():
    a, b = clouds(12, 40, 30)
    full = sinkhorn(squared_cost(a, b))
    for plan in (nearest_plan(a, b, 30), blockwise(a, b, generator(), 64)):
        assert isinstance(plan, SparsePlan)
        torch.testing.assert_close(plan.matrix().to_dense(), full, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(plan.project(b), project(full, b))


@given(SEEDS, st.integers(1, 20), st.floats(0.01, 1))
def test_nearest_plan_is_the_masked_problem(seed, k, epsilon):
    a, b = clouds(seed, 25, 20)
    sparse = nearest_plan(a, b, k, epsilon, 60)
    dense = sparse.matrix().to_dense()
    apart = squared_cost(a, b)
    near = torch.zeros_like(apart, dtype=torch.bool).scatter(1, apart.argsort(1)[:, :k], True)
    assert torch.equal(dense > 0, near & (dense > 0)) and sparse.index.shape == (25, k)
    torch.testing.assert_close(dense.sum(1), torch.full((25,), 1 / 25, dtype=a.dtype), rtol=1e-9, atol=0)
    used = near.any(0)
    masked = sinkhorn(apart.masked_fill(~near, 1e6)[:, used], epsilon, 60, None, used[used].double())
    torch.testing.assert_close(dense[:, used], masked, atol=1e-6, rtol=1e-4)


@given(SEEDS, st.integers(1, 60), st.integers(1, 60), st.integers(1, 30))
def test_blocks_are_disjoint_and_small(seed, n, m, block):
    a, b = clouds(seed, n, m)
    plan = blockwise(a, b, generator(seed), block, iterations=100)
    dense = plan.matrix().to_dense()
    assert dense.shape == (n, m)
    torch.testing.assert_close(dense.sum(1), torch.full((n,), 1 / n, dtype=a.dtype), rtol=1e-9, atol=0)
    parts = max(1, min(-(-max(n, m) // block), n, m))
    assert plan.index.shape[1] == -(-m // parts)
    met = (dense > 0).double()
    assert torch.equal(met @ met.T > 0, (met[:, None] == met[None]).all(2)) or (dense == 0).all(0).any()
    assert torch.equal(dense, blockwise(a, b, generator(seed), block, iterations=100).matrix().to_dense())
    drawn = plan.draw(generator(1))
    assert (dense[torch.arange(n), drawn] > 0).all()


# --- distances of populations

@given(SEEDS, st.integers(2, 12), st.integers(1, 12))
def test_mmd_is_a_mean_of_kernels(seed, n, m):
    a, b = clouds(seed, n, m)
    both = torch.cat([a, b]).numpy()
    apart = ot.dist(both, both)
    np.fill_diagonal(apart, 0)
    unit = np.sort(apart[apart > 0])[(np.count_nonzero(apart) - 1) // 2]
    sign = np.r_[np.full(n, 1 / n), np.full(m, -1 / m)]
    expected = np.mean([sign @ rbf_kernel(both, gamma=1 / (s * unit)) @ sign for s in (0.5, 1, 2)])
    assert mmd(a, b).item() == pytest.approx(expected, abs=1e-9) and mmd(a, b) > -1e-12
    torch.testing.assert_close(mmd(7 * a + 1, 7 * b + 1), mmd(a, b))


@given(SEEDS, st.integers(1, 12), st.integers(1, 12))
def test_energy_distance_is_scipy_s(seed, n, m):
    a, b = clouds(seed, n, m, 1)
    assert energy_distance(a, b).item() == pytest.approx(scipy_energy(a[:, 0], b[:, 0]) ** 2, abs=1e-9)
    a, b = clouds(seed, n, m, 4, (3,))
    assert (energy_distance(a, b) > 0).all()
    torch.testing.assert_close(energy_distance(a, b), energy_distance(b, a))
    torch.testing.assert_close(energy_distance(a, b)[1], energy_distance(a[1], b[1]))


@pytest.mark.parametrize("distance", [mmd, energy_distance])
def test_equal_and_coincident_clouds_have_a_gradient(distance):
    a, b = clouds(13, 6, 6)
    for x, y in ((a, a), (torch.ones_like(a), torch.ones_like(b)), (torch.cat([a, a]), b)):
        x = x.clone().requires_grad_()
        value = distance(x, y)
        value.backward()
        assert x.grad.isfinite().all() and value.item() >= -1e-12
    x = a.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: energy_distance(x, b), (x,))


def test_descent_brings_populations_together():
    a, b = clouds(14, 30, 30)
    for distance in (mmd, energy_distance):
        x = a.clone().requires_grad_()
        optimiser = torch.optim.Adam([x], 0.05)
        for _ in range(40):
            optimiser.zero_grad()
            distance(x, b).backward()
            optimiser.step()
        assert distance(x, b) < 0.3 * distance(a, b)


# --- input that cannot be

@pytest.mark.parametrize("shapes", [((3, 2), (4, 3)), ((2, 3, 2), (3, 4, 2)), ((0, 2), (3, 2)), ((3, 2), (0, 2))])
def test_clouds_that_do_not_fit(shapes):
    for function in (squared_cost, mmd, energy_distance, nearest_plan, lambda a, b: blockwise(a, b, None)):
        with pytest.raises(InputError, match="latents"):
            function(*map(torch.ones, shapes))


@pytest.mark.parametrize("how", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": float("nan")}, {"iterations": 0}])
def test_settings_that_cannot_be(how):
    a, b = clouds(0)
    for function in (lambda **how: sinkhorn(squared_cost(a, b), **how), lambda **how: nearest_plan(a, b, **how), lambda **how: blockwise(a, b, generator(), **how)):
        with pytest.raises(InputError, match="epsilon"):
            function(**how)


@pytest.mark.parametrize("weights", [torch.ones(4), torch.zeros(3), torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1.0, float("nan"), 2.0])])
def test_weights_that_are_no_shares(weights):
    with pytest.raises(InputError, match="weights"):
        sinkhorn(torch.ones(3, 5), weights_a=weights)
    with pytest.raises(InputError, match="weights"):
        sinkhorn(torch.ones(5, 3), weights_b=weights)
