"""The refiner of perturbation latents: affine couplings, their inverse and log determinant, and its two stand-ins."""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gears_nb.core.errors import InputError
from gears_nb.perturb.flow import BOUND, Coupling, Flow, Residual, refiner


def shaken(module: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """All parameters normal with deviation `size`, in float64."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(size * torch.randn(p.shape, generator=g))
    return module.double()


def points(seed: int, b: int, *widths: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, w, generator=g, dtype=torch.float64) for w in widths]


def jacobian(module: nn.Module, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.func.jacrev(lambda x, i=i: module(x[None], c[i : i + 1])[0][0])(z[i]) for i in range(len(z))])


@given(st.integers(1, 9), st.integers(0, 4), st.integers(1, 7), st.integers(0, 99))
def test_inverse_undoes_at_any_size(dim, context, layers, seed):
    z, c = points(seed, 4, dim, context)
    flow = shaken(Flow(dim, context, 5, layers), seed)
    torch.testing.assert_close(flow.inverse(flow(z, c)[0], c), z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(flow(flow.inverse(z, c), c)[0], z, atol=1e-10, rtol=1e-10)


@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 99))
def test_log_determinant_is_that_of_the_derivatives(dim, layers, seed):
    z, c = points(seed, 3, dim, 2)
    flow = shaken(Flow(dim, 2, 6, layers), seed)
    sign, truth = torch.linalg.slogdet(jacobian(flow, z, c))
    torch.testing.assert_close(flow(z, c)[1], truth, atol=1e-9, rtol=1e-9)
    assert (sign == 1).all()


def test_inverse_in_single_precision():
    z, c = (x.float() for x in points(1, 64, 128, 32))
    flow = shaken(Flow(128, 32, 64, 6), 1, 0.1).float()
    moved, logdet = flow(z, c)
    assert (flow.inverse(moved, c) - z).abs().max() < 1e-5 and logdet.std() > 0.1


def test_density_of_the_moved_normal_is_normalised():
    """Change of variables: the density of moved points integrates to 1."""
    flow = shaken(Flow(2, 0, 6, 4), 5, 0.6)
    axis = torch.linspace(-12, 12, 500, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    none = grid.new_zeros(len(grid), 0)
    with torch.no_grad():
        z = flow.inverse(grid, none)
        log_density = -0.5 * z.square().sum(1) - np.log(2 * np.pi) - flow(z, none)[1]
    assert log_density.exp().sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["flow", "residual", "none"])
def test_refiners_start_as_the_identity_with_one_call(kind):
    z, c = (x.float() for x in points(2, 5, 7, 3))
    module = refiner(kind, 7, 3, 8, 3)
    moved, logdet = module(z, c)
    assert torch.equal(moved, z) and logdet.shape == (5,) and not logdet.any()
    if kind != "none":  # the first step moves the last layers, the second all of them
        target = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        optimiser = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(2):
            optimiser.zero_grad()
            (module(z, c)[0] - target).square().mean().backward()
            optimiser.step()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in module.parameters())


def test_layers_alternate_and_each_coordinate_is_moved():
    flow = Flow(5, 2, 4, 6)
    kept = torch.stack([c.kept for c in flow.couplings])
    assert (kept[0] ^ kept[1]).all() and torch.equal(kept[0], kept[2]) and ((~kept).sum(0) == 3).all()
    z, c = points(3, 4, 5, 2)
    for coupling in flow.couplings:
        moved = shaken(copy.deepcopy(coupling), 4)(z, c)[0]
        assert torch.equal(moved[:, coupling.kept], z[:, coupling.kept])
        assert not torch.isclose(moved[:, ~coupling.kept], z[:, ~coupling.kept]).any()


def test_one_dimension_is_a_line_for_each_context():
    flow = shaken(Flow(1, 2, 6, 6), 6)
    z = torch.linspace(-3, 3, 20, dtype=torch.float64)[:, None]
    slopes = []
    for context in (0.0, 1.0):
        moved, logdet = flow(z, torch.full((20, 2), context, dtype=torch.float64))
        slope = moved.diff(dim=0) / z.diff(dim=0)
        torch.testing.assert_close(slope, logdet.exp()[:1, None].expand_as(slope))
        slopes.append(slope[0].item())
    assert slopes[0] != slopes[1]


def test_scale_is_bounded_whatever_the_weights():
    z, c = points(7, 8, 6, 2)
    flow = shaken(Flow(6, 2, 4, 4), 7, 1e3)
    assert flow(z, c)[1].abs().max() <= 6 / 2 * 4 * BOUND + 1e-9


def test_rows_are_independent_and_contexts_count():
    z, c = points(8, 6, 4, 3)
    for module in (shaken(Flow(4, 3, 5, 4), 8), shaken(Residual(4, 3, 5, 2), 8)):
        moved = module(z, c)[0]
        torch.testing.assert_close(module(z[[3]], c[[3]])[0], moved[[3]])
        assert not torch.allclose(module(z, c.roll(1, 0))[0], moved)


def test_learns_a_map_that_depends_on_the_context():
    z, c = (x.float() for x in points(9, 200, 2, 1))
    c = (c > 0).float()
    goal = torch.where(c > 0, 1.5 * z + 1, z.flip(1))
    module = Flow(2, 1, 16, 6)
    shaken(module, 9, 0.3).float()
    optimiser = torch.optim.Adam(module.parameters(), 2e-2)
    before = (module(z, c)[0] - goal).square().mean().item()
    for _ in range(80):
        loss = (module(z, c)[0] - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.4 * before


def test_same_seed_same_network_and_state_round_trip():
    def made(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return refiner("flow", 4, 2, 8, 4)
    one, two, other = made(0), made(0), made(1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    other.load_state_dict(shaken(one, 3).float().state_dict())
    z, c = (x.float() for x in points(1, 3, 4, 2))
    assert torch.equal(other(z, c)[0], one(z, c)[0])


def test_autocast_keeps_latents_in_single_precision():
    z, c = (x.float() for x in points(4, 3, 6, 2))
    flow = shaken(Flow(6, 2, 8, 4), 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved, logdet = flow(z, c)
    assert moved.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(moved, flow(z, c)[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("how", [{"dim": 0}, {"context": -1}, {"hidden": 0}, {"layers": 0}, {"kind": "spline"}])
def test_sizes_and_kinds_that_cannot_be(how):
    for kind in ("flow", "residual"):
        with pytest.raises(InputError, match=next(iter(how))):
            refiner(**{"kind": kind, "dim": 3, "context": 2, "hidden": 4, "layers": 2} | how)


def test_mask_of_another_length():
    with pytest.raises(InputError, match="mask"):
        Coupling(3, 1, 4, torch.ones(4))
