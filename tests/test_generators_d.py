"""The operator-first VAE: what a walk is worth in closed form, spoiled walks that are detected, order and padding, the warm-up, bad settings."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.config import from_dict
from gears_nb.core.errors import InputError
from gears_nb.generators.edges import candidate_edges, walk_of
from gears_nb.generators.operator_vae import (OperatorVAE, OperatorVAEConfig, checkup, effective_rank, gumbel, information, latent_divergence, returns, slot_covariance,
                                              walk_faults, walk_health)
from gears_nb.generators.opnet import row_entropy, stationary
from gears_nb.generators.trial import examined
from gears_nb.models.batches import Run
from gears_nb.models.conformance import conform, toy_slides
from gears_nb.models.trace import AttentionTrace
from gears_nb.reconstruct.settings import profile

TINY = {"width": 16, "heads": 2, "points": 4, "latent": 3}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def built(dim=8, **own):
    torch.manual_seed(0)
    return OperatorVAE(dim, OperatorVAEConfig(**TINY, **own)).eval()


def whole(n):
    return torch.ones(1, n, dtype=torch.bool)


def tissue(n, seed=0):
    "A walk between near points of the plane."
    x = torch.rand(1, n, 2, generator=rng(seed)).double()
    near = torch.cdist(x, x).square()
    return walk_of((-near / 0.01).exp() * (1 - torch.eye(n)))


def padded(T, more):
    "A walk with `more` cells that stay where they are, and its mask."
    n = T.shape[1]
    wide = torch.eye(n + more, dtype=T.dtype).expand(len(T), -1, -1).clone()
    wide[:, :n, :n] = T
    return wide, (torch.arange(n + more) < n).expand(len(T), -1)


# ---- what a walk is worth

@given(st.integers(0, 99), st.integers(2, 12))
def test_equal_rows_say_nothing_and_are_of_rank_one(seed, n):
    row = torch.rand(1, 1, n, generator=rng(seed)).double() + 0.1
    T = (row / row.sum()).expand(1, n, n)
    assert information(T, whole(n)).abs() < 1e-9 and effective_rank(T, whole(n)).item() == pytest.approx(1, abs=1e-5)


@given(st.permutations(range(7)))
def test_a_permutation_says_everything_and_has_no_entropy(order):
    T = torch.eye(7).double()[list(order)][None]
    assert information(T, whole(7)).item() == pytest.approx(math.log(7)) and effective_rank(T, whole(7)).item() == pytest.approx(7)
    assert row_entropy(T).abs().max() < 1e-9
    there, back = (sum(hop(i) == i for i in range(7)) / 7 for hop in (lambda i: order[i], lambda i: order[order[i]]))
    assert returns(T, whole(7)).item() == pytest.approx(max(there, back))


@given(st.integers(1, 4), st.integers(1, 5))
def test_even_blocks_are_worth_their_number(blocks, size):
    T = torch.block_diag(*[torch.full((size, size), 1 / size, dtype=torch.float64)] * blocks)[None]
    n = blocks * size
    assert information(T, whole(n)).item() == pytest.approx(math.log(blocks), abs=1e-9) and effective_rank(T, whole(n)).item() == pytest.approx(blocks, rel=1e-5)
    assert returns(T, whole(n)).item() == pytest.approx(1 / size)


@given(st.integers(0, 99), st.integers(0, 6))
def test_numbers_of_a_walk_see_neither_order_nor_padding(seed, more):
    T, order = tissue(12, seed), torch.randperm(12, generator=rng(seed))
    seen = [[f(S, mask).item() for f in (information, effective_rank, returns)] for S, mask in ((T, whole(12)), (T[:, order][:, :, order], whole(12)), padded(T, more))]
    assert seen[0] == pytest.approx(seen[1], rel=1e-6) and seen[0] == pytest.approx(seen[2], rel=1e-6) and 0 <= seen[0][0] <= math.log(12)


@given(st.integers(0, 30), st.integers(0, 5))
def test_spoiled_walks_are_told_apart(seed, more):
    T = tissue(24, seed)
    n, pi = 24, stationary(tissue(24, seed), 400)
    swap = torch.eye(n).double()[torch.arange(n).view(-1, 2).flip(1).flatten()][None]
    half = (torch.arange(n) < n // 2).double()
    walks = {"": T, "uniform rows": pi[:, None].expand_as(T), "identity": torch.eye(n).double()[None], "swap": swap, "rank collapse": walk_of((half[:, None] == half).double()[None])}
    health = {name: walk_health(*padded(S, more)) for name, S in walks.items()}
    found = {name: walk_faults(numbers, health[""]) for name, numbers in health.items()}
    assert found == {"": [], "uniform rows": ["uniform rows", "rank collapse"], "identity": ["identity"], "swap": ["identity"], "rank collapse": ["rank collapse"]}


# ---- parts

def test_gumbel_noise_has_its_mean_and_does_not_see_padding():
    ok = whole(4000)[..., None].expand(1, -1, 2)
    g = gumbel(ok, rng(), torch.zeros(1))
    assert g.mean().item() == pytest.approx(0.5772, abs=0.04) and g.var().item() == pytest.approx(math.pi**2 / 6, rel=0.06)
    assert torch.equal(gumbel(torch.cat([ok, ~ok], 1), rng(), torch.zeros(1))[:, :4000], g)


def test_a_dimension_that_says_nothing_costs_nothing():
    mean, log_var = torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    mean[..., 1], log_var[..., 2], mean[:, 3:] = 2.0, math.log(4.0), 99.0
    mask = torch.arange(5)[None] < 3
    assert latent_divergence(mean, log_var, mask)[0].tolist() == pytest.approx([0, 2, 0.5 * (4 - 1 - math.log(4))])


def test_covariance_counts_neighbours_that_all_cells_have():
    logits, ok = torch.randn(1, 50, 4, generator=rng()), torch.ones(1, 50, 4, dtype=torch.bool)
    ok[0, 7, 3] = False                                # one cell has three neighbours
    other = torch.cat([logits[..., :3], 9 * logits[..., 3:]], -1)
    assert torch.equal(slot_covariance(logits, ok, whole(50)), slot_covariance(other, ok, whole(50)))
    mask = torch.arange(50)[None] < 40
    spoiled = torch.where(mask[..., None], logits, 1e4)
    assert torch.equal(slot_covariance(logits, ok, mask), slot_covariance(spoiled, ok & mask[..., None], mask))
    assert slot_covariance(logits[..., :1], ok[..., :1], whole(50)) == 0


@given(st.integers(0, 50), st.integers(0, 5))
def test_networks_read_a_walk_without_order_and_padding(seed, more):
    n, model = 14, built().double()
    H, T, order = torch.randn(1, n, 8, generator=rng(seed)).double(), tissue(n, seed), torch.randperm(n, generator=rng(seed))
    wide, mask = padded(T, more)
    H3 = torch.cat([H, torch.full((1, more, 8), 1e4).double()], 1)

    def read(H, T, mask):
        h = model.trunk(H, mask)
        return torch.cat([*model.inferred(H, h, T, mask), model.placed(H, h, T, mask)], -1)[:, :n]
    out = read(H, T, whole(n))
    assert torch.allclose(read(H[:, order], T[:, order][:, :, order], whole(n)), out[:, order], atol=1e-8)
    assert torch.allclose(read(H3, wide, mask), out, atol=1e-8)


# ---- the model

def test_a_sample_stands_on_neighbours_in_expression_and_never_on_itself():
    model, H = built(k=4), torch.randn(1, 25, 8, generator=rng())
    one, two = (model(H, None, rng(s)).operator for s in (0, 1))
    index, ok = candidate_edges(H, whole(25), 4)
    assert torch.allclose(one.sum(-1), torch.ones(1, 25)) and torch.equal((one > 0).sum(-1), ok.sum(-1)) and one.diagonal(dim1=1, dim2=2).abs().max() == 0
    assert not torch.equal(one, two) and torch.equal(one > 0, two > 0)


@pytest.mark.parametrize("own", [{"gumbel": 0.5}, {"entropy_goal": "zero", "warm": 0.0}])
def test_other_settings_meet_the_contract(own):
    conform(type("Other", (OperatorVAE,), {"build": classmethod(lambda cls, dim_in, run: cls(dim_in, OperatorVAEConfig(**TINY, **own))), "__module__": __name__}))


def test_the_tax_on_latents_is_warmed_up_and_the_entropy_is_matched_or_minimised():
    batch = examined(toy_slides(dim=8)[1], 2, 40)
    model, blunt = built(), built(entropy_goal="zero")
    at = lambda done: model.losses(*batch, None, rng(), done=done)
    start, end = at(0.0), at(1.0)
    assert [(at(d)["loss"] - start["loss"]).item() for d in (0.25, 0.5, 1.0)] == pytest.approx([0.005 * end["kl"].item(), 0.01 * end["kl"].item(), 0.01 * end["kl"].item()], rel=1e-3)
    assert blunt.losses(*batch, None, rng())["entropy"] > 1.5 > 0.5 > end["entropy"] and 0 < end["kept"] <= 1
    c = profile("smoke", **{"structure.model": "operator-vae", "progress": False})
    stage, = model.stages(Run(c.structure, c.targets))
    seen = []
    model.losses = lambda H, taught, mask, rng, epoch, *, done: seen.append(done)
    for epoch in range(stage.settings.epochs):
        stage.turns(model, batch, epoch, None)
    assert seen == sorted(seen) and 0 < seen[0] and seen[-1] < 1


def test_a_check_up_names_what_was_broken():
    batch = examined(toy_slides(dim=8)[1], 2, 40)
    broken = built()
    with torch.no_grad():
        broken.logits.net[-1].weight.zero_()
        broken.posterior.weight.zero_()
        broken.posterior.bias.zero_()
    numbers, faults = checkup(broken, batch, rng())
    assert {"even rows", "collapsed latents"} <= set(faults) and numbers["operator"] == pytest.approx(numbers["even walk"], rel=1e-4) and numbers["apart"] < 1e-6
    assert numbers["kl"] == 0 and "uniform rows" not in faults  # even on its own edges is not the same for all
    with torch.no_grad():
        broken.posterior.bias[0] = 1.0
    assert checkup(broken, batch, rng())[0]["active"] == 1


def test_a_record_holds_the_walk_of_the_real_cells():
    model, H, mask = built(), torch.randn(2, 30, 8, generator=rng()), torch.arange(30) < torch.tensor([[30], [22]])
    told = model.explain(H, mask)
    assert [type(t) for t in told] == [AttentionTrace] * 2 and [t.n for t in told] == [30, 22]
    assert torch.allclose(torch.from_numpy(told[1].x[-1]), model(H, mask, rng()).X[1, :22], atol=1e-6)


@pytest.mark.parametrize("wrong, told", [({"width": 30}, "30 columns cannot be cut into 4 heads"), ({"warm": 2.0}, "warm"), ({"entropy_goal": "one"}, "entropy_goal"),
                                         ({"latnt": 3}, "did you mean 'latent'")])
def test_wrong_settings_are_one_line(wrong, told):
    with pytest.raises(InputError, match=told):
        from_dict(wrong, OperatorVAEConfig)
