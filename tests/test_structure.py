"""Structure: the audit list of the ladder, equivariances, supports, determinism."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gears_nb.core.errors import InputError
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.models.catalogue import MODELS, model_class
from gears_nb.models.conformance import check_geometry_model
from gears_nb.models.contract import geometry_loss, mean_energy
from gears_nb.reconstruct.settings import profile
from gears_nb.structure.gate import (
    EdgeGateSoft,
    GateLogits,
    candidate_mask,
    gate_kl,
    oracle_edges,
    random_support,
)
from gears_nb.structure.ipa import (
    RecycleBlock,
    attention_bias,
    augment,
    coordinate_update,
    drop_edges,
    entropy_deficit,
    rw_weight,
)
from gears_nb.structure.rungs import (
    D7,
    RUNGS,
    Ladder,
    Rung,
    gate_loss,
    loss_weights,
    pretrain_gate,
    rung,
)
from gears_nb.targets.builder import build_targets
from gears_nb.targets.settings import TargetConfig

CONFIG = profile("toy", **{"structure.k_cand": 20, "structure.recycles": 3}).structure


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(B: int = 2, n: int = 50, d: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, n, d, generator=seeded(seed))


def world(B: int = 4, n: int = 60, d: int = 32, noise: float = 0.3, seed: int = 0, of: int = 0):
    "Minisets `seed` of the synthetic tissue `of`: `(H, targets)`."
    law, rng = seeded(of), seeded(100 + seed)
    waves, phase = torch.randn(2, d, generator=law), torch.randn(d, generator=law)
    pos = torch.rand(B, n, 2, generator=rng) * 2 - 1
    return torch.sin(pos @ waves + phase) + noise * torch.randn(B, n, d, generator=rng), build_targets(pos)


def awake(dim_in: int = 16, seed: int = 0, **extra) -> D7:
    "A D7 in evaluation mode whose zero-initialised layers are not zero, so that nothing passes for being inert."
    torch.manual_seed(seed)
    model = D7(dim_in, extra.pop("config", CONFIG), **extra)
    nn.init.normal_(model.refine.blocks[0].maps.A, std=0.3)
    nn.init.normal_(model.refine.blocks[0].mlp[-1].weight, std=0.1)
    return model.eval()


# ---------------------------------------------------------------- candidates and supports


def test_candidates_are_symmetric_with_diagonal_and_enough_degree():
    M = candidate_mask(embeddings(), 7)
    assert torch.equal(M, M.transpose(1, 2)) and M.diagonal(dim1=1, dim2=2).all() and (M.sum(-1) >= 8).all()
    assert torch.equal(M, candidate_mask(embeddings(), 7))


def test_candidates_equal_plain_knn():
    H = embeddings(1, 30)
    near = torch.cdist(H, H)[0].argsort(1)[:, 1:6]
    plain = torch.eye(30, dtype=torch.bool)
    plain[torch.arange(30)[:, None], near] = True
    assert torch.equal(candidate_mask(H, 5)[0], plain | plain.T)


def test_candidates_with_ties_do_not_depend_on_order():
    H = torch.randint(0, 3, (1, 40, 2), generator=seeded()).float()  # many exact ties and duplicates
    order = torch.randperm(40, generator=seeded(1))
    assert torch.equal(candidate_mask(H[:, order], 5), candidate_mask(H, 5)[:, order][:, :, order])


def test_candidates_ignore_autocast_and_padding():
    H = embeddings(1, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(candidate_mask(H, 6), candidate_mask(H.clone(), 6))
    padded = torch.cat([H, torch.zeros(1, 5, 16)], 1)
    M = candidate_mask(padded, 6, torch.arange(45)[None] < 40)
    assert torch.equal(M[:, :40, :40], candidate_mask(H, 6))
    assert torch.equal(M[0, 40:], torch.eye(45, dtype=torch.bool)[40:])
    assert candidate_mask(H, 500).all()


def test_cosine_candidates_ignore_length():
    H = embeddings(1, 40)
    scaled = H * torch.rand(1, 40, 1, generator=seeded(2)).add(0.5)
    assert torch.equal(candidate_mask(H, 6, cosine=True), candidate_mask(scaled, 6, cosine=True))
    assert not torch.equal(candidate_mask(H, 6), candidate_mask(scaled, 6))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), p=st.floats(0, 1))
def test_edge_drop_is_symmetric_and_keeps_rows_alive(seed, p):
    M = candidate_mask(embeddings(seed=seed), 4)
    thin = drop_edges(M, p, seeded(seed))
    assert torch.equal(thin, thin.transpose(1, 2)) and (thin <= M).all()
    assert thin.diagonal(dim1=1, dim2=2).all() and (thin.sum(-1) >= 2).all()


@pytest.mark.parametrize("k", [3, 12])
def test_random_support_keeps_degrees_and_forgets_edges(k):
    M = candidate_mask(embeddings(2, 80), k)
    R = random_support(M, seeded())
    assert torch.equal(R.sum(-1), M.sum(-1)) and torch.equal(R, R.transpose(1, 2)) and R.diagonal(dim1=1, dim2=2).all()
    off = ~torch.eye(80, dtype=torch.bool)
    assert (R & M & off).sum() / (M & off).sum() < 2 * (M & off).float().mean()


# ---------------------------------------------------------------- gate


def test_gate_lives_on_its_support_and_is_bounded():
    torch.manual_seed(0)
    net, H = EdgeGateSoft(dim_in=16, clip=3.0), 100 * embeddings()
    M = candidate_mask(H, 6)
    nn.init.normal_(net.out.weight, std=50)
    g = net(H, M).logits
    assert torch.equal(torch.isinf(g), ~M) and (g.diagonal(dim1=1, dim2=2) == 0).all() and g[M].abs().max() <= 3.0
    assert (g[M] != g.transpose(1, 2)[M]).any()  # h_i and h_j play different roles


def kl_by_hand(g, T, M):
    rows = []
    for i in range(len(g)):
        js = [j for j in range(len(g)) if M[i, j] and j != i]
        mass = sum(T[i, j] for j in js)
        if mass > 0:
            Z = sum(math.exp(g[i, j]) for j in js)
            rows.append(sum(T[i, j] / mass * math.log(T[i, j] / mass / (math.exp(g[i, j]) / Z)) for j in js if T[i, j] > 0))
    return sum(rows) / len(rows)


def test_gate_loss_equals_plain_loops_and_ignores_the_diagonal():
    H, targets = world(1, 40)
    torch.manual_seed(0)
    gate = EdgeGateSoft(dim_in=32)(H, candidate_mask(H, 5))
    expected = kl_by_hand(gate.logits[0].detach(), targets.rw_transitions[1][0], gate.support[0])
    assert gate_kl(gate, targets).item() == pytest.approx(float(expected), abs=1e-4)
    shifted = GateLogits(gate.logits + 9 * torch.eye(40), gate.support)
    assert gate_kl(shifted, targets).item() == pytest.approx(gate_kl(gate, targets).item(), abs=1e-6)


def test_gate_loss_survives_rows_without_neighbours():
    H, targets = world(1, 40)
    torch.manual_seed(0)
    M = candidate_mask(H, 5)
    M[0, 7, :] = M[0, :, 7] = False
    M[0, 7, 7] = True
    net = EdgeGateSoft(dim_in=32)
    loss = gate_kl(net(H, M), targets)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_pretraining_teaches_the_gate_and_nothing_else():
    train, held_out = [world(seed=s) for s in range(3)], world(seed=9)
    torch.manual_seed(0)
    model = D7(32, CONFIG)
    others = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("gate")}
    before = gate_loss(model, held_out)["loss"].item()
    curve = pretrain_gate(model, train, 60, lr=5e-3)
    assert len(curve) == 60 and gate_loss(model, held_out)["loss"].item() < 0.7 * before
    assert all(torch.equal(model.state_dict()[k], v) for k, v in others.items())


# ---------------------------------------------------------------- one recycle


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_two_nodes_move_towards_each_other(sign):
    x = torch.tensor([[[0.0, 0.0], [2.0, 1.0]]])
    swap = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    gap = lambda y: (y[0, 0] - y[0, 1]).norm()
    moved = x + 0.25 * coordinate_update(swap, x, sign * torch.eye(2)[None])
    assert (gap(moved) < gap(x)) == (sign > 0)


def test_update_equals_the_double_sum():
    g = seeded()
    a, x, A = torch.rand(2, 3, 7, 7, generator=g).softmax(-1), torch.randn(2, 7, 2, generator=g), torch.randn(3, 2, 2, generator=g)
    diff = x[:, None, :] - x[:, :, None]  # x_j - x_i at [i, j]
    assert torch.allclose(coordinate_update(a, x, A), torch.einsum("bhij,hcd,bijd->bic", a, A, diff), atol=1e-5)


def test_logits_are_bounded_at_the_first_recycle():
    torch.manual_seed(0)
    model, H = D7(16, CONFIG), 1e3 * embeddings()
    nn.init.normal_(model.gate.out.weight, std=50)
    M = model.candidates(H)
    bias = attention_bias(M, model.gate(H, M), CONFIG.beta)
    block, seen = model.refine.blocks[0], []
    inner = block.logits
    block.logits = lambda *args: seen.append(inner(*args)) or seen[-1]
    model.refine(H, torch.ones(2, 50, dtype=torch.bool), bias)
    on = M[:, None].expand_as(seen[0])
    assert seen[0][on].max() <= 10 + 2 * 5 and seen[0][on].min() >= -10 - 2 * 5 - 10
    assert all(torch.isneginf(level[~on]).all() for level in seen)


def test_untrained_block_is_the_identity():
    torch.manual_seed(0)
    model, H = D7(16, CONFIG).eval(), embeddings()
    assert torch.allclose(model(H).X, gauge_fix(model.refine.guess(H)), atol=1e-6)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("maps", "geo"), [("scalar", "distance"), ("scalar", "rbf"), ("rotation", "distance"), ("full", "distance"), ("scalar", "points")])
def test_equivariance_is_what_the_maps_and_the_geometry_buy(maps, geo, mirror):
    torch.manual_seed(1)
    block = RecycleBlock(maps=maps, geo=geo).double()
    nn.init.normal_(block.maps.A), nn.init.normal_(block.mlp[-1].weight)
    for p in block.geo.parameters():
        nn.init.normal_(p)  # rbf weights and point offsets start at zero
    s, x = torch.randn(2, 25, 64, dtype=torch.float64), torch.randn(2, 25, 2, dtype=torch.float64)
    R = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
    R = R * torch.tensor([1.0, -1.0 if (torch.det(R) > 0) == mirror else 1.0])
    bias, eta = torch.zeros(2, 25, 25), torch.tensor(0.5)
    plain, turned = block(s, x, bias, eta), block(s, x @ R, bias, eta)
    error = (turned[1] - plain[1] @ R).abs().max()
    turns = (maps == "scalar" or (maps == "rotation" and not mirror)) and geo != "points"  # offsets name a direction in the frame
    assert error < 1e-10 if turns else error > 1e-2
    assert (block(s, x + 5, bias, eta)[1] - plain[1] - 5).abs().max() < 1e-9  # translation, always
    if geo == "points":
        return
    assert (turned[0] - plain[0]).abs().max() < 1e-12  # features never see the frame


def test_gauge_fix_lets_gradients_through():
    model, (H, targets) = awake(32), world()
    terms = model.losses(H, targets)
    (grad,) = torch.autograd.grad(terms["rw"], model.refine.guess.out.weight)
    assert grad.abs().max() > 0


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("maps", ["full", "rotation", "scalar"])
def test_d7_keeps_the_promises_of_the_protocol(maps):
    check_geometry_model(awake(rung=rung("d7", maps=maps)), embeddings())


def test_registry():
    assert MODELS["d7"] is D7 and model_class("d7") is D7 and D7.preset == RUNGS["d7"] == Rung()
    assert all(issubclass(MODELS[name], Ladder) and MODELS[name].preset == RUNGS[name] for name in RUNGS)
    with pytest.raises(InputError, match="choose from"):
        model_class("d8")


def test_attention_rows_are_distributions_on_the_support():
    trace = awake()(embeddings(), trace=True).trace
    assert trace["x"].shape == (4, 2, 50, 2) and trace["attention"].shape == (3, 2, 4, 50, 50)
    a = trace["attention"]
    assert torch.allclose(a.sum(-1), torch.ones(3, 2, 4, 50), atol=1e-5)
    assert (a[:, ~trace["support"][:, None].expand(-1, 4, -1, -1)] == 0).all()
    assert torch.equal(trace["x"][-1], awake()(embeddings()).X)


def test_gate_bias_reaches_all_heads_alike():
    model, H = awake(), embeddings()
    M = model.candidates(H)
    push = torch.where(M, 0.0, -torch.inf).masked_fill(torch.eye(50, dtype=torch.bool), 5.0)
    gated = model(H, gate=GateLogits(push, M), trace=True).trace["attention"][0]
    free = model(H, edges=M, trace=True).trace["attention"][0]
    rise = gated.diagonal(dim1=-2, dim2=-1).log() - free.diagonal(dim1=-2, dim2=-1).log()
    assert (rise > 0).all()


def test_oracle_mode_runs_with_the_gate_off():
    model, (H, targets) = awake(32), world()
    edges = oracle_edges(targets)
    expected = model(H, edges=edges).X
    nn.init.normal_(model.gate.out.weight, std=10)
    assert torch.equal(model(H, edges=edges).X, expected)
    assert "gate" not in model.losses(H, targets, edges=edges) and "gate" in model.losses(H, targets)


def test_gate_of_another_support_is_refused():
    model, (H, targets) = awake(32), world()
    gate = model.gate(H, model.candidates(H))
    with pytest.raises(ValueError, match="another support"):
        model(H, graph=oracle_edges(targets), gate=gate)
    with pytest.raises(ValueError, match="another support"):
        model(H[:1], gate=gate)
    assert torch.equal(model(H, gate=gate).X, model(H).X)


def test_gate_loss_and_attention_share_one_support_in_training():
    model, (H, targets) = awake(32).train(), world()
    supports = []
    model.gate.register_forward_hook(lambda _, args, out: supports.append((args[1], out.support)))
    model.refine.register_forward_hook(lambda _, args, out: supports.append(args[2]))
    model.losses(H, targets, None, seeded())
    (given, kept), bias = supports
    assert torch.equal(given, kept) and torch.equal(~torch.isinf(bias), kept)
    assert kept.sum() < model.candidates(H).sum()  # some edges were dropped


def test_losses_see_no_padding():
    model, H = awake(32).double(), world(2, 40)[0]
    pos = torch.rand(2, 40, 2, generator=seeded(3), dtype=torch.float64)
    H, mask = H.double(), (torch.arange(52) < 40).expand(2, -1)
    wide, far = torch.cat([H, torch.full((2, 12, 32), 3.0)], 1).double(), torch.cat([pos, torch.full((2, 12, 2), 9.0)], 1).double()
    alone, padded = model.losses(H, build_targets(pos), epoch=5), model.losses(wide, build_targets(far, mask), epoch=5)
    for name, value in alone.items():
        assert torch.allclose(value, padded[name], atol=1e-7), name


def test_total_is_the_weighted_sum_and_follows_the_schedule():
    model, (H, targets) = awake(32, targets=TargetConfig(stress_weight=0.7)), world()
    for epoch, rw in ((0, 0.0), (2, CONFIG.rw_cap * 2 / 3), (3, CONFIG.rw_cap), (50, CONFIG.rw_cap)):  # one epoch of warm-up, three of ramp
        terms = model.losses(H, targets, epoch=epoch)
        weights = loss_weights(CONFIG, Rung(), 0.7, epoch)
        assert weights["rw"] == pytest.approx(rw) and weights["stress"] == 0.7
        assert terms["loss"].item() == pytest.approx(sum(weights[k] * v.item() for k, v in terms.items() if k != "loss"), rel=1e-5)
    assert rw_weight(0, 0, 0, 0.3) == 0.3


def test_stress_does_not_depend_on_the_candidates():
    few, many = (awake(32, config=replace(CONFIG, k_cand=k)) for k in (5, 40))
    many.load_state_dict(few.state_dict())
    H, targets = world()
    assert few.losses(H, targets)["stress0"].item() == many.losses(H, targets)["stress0"].item()
    assert few.losses(H, targets)["stress"].item() != many.losses(H, targets)["stress"].item()


def test_every_parameter_learns():
    model, (H, targets) = awake(32).train(), world()
    model.losses(H, targets, None, seeded(), epoch=9)["loss"].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or p.grad.abs().max() == 0]
    assert not idle


def test_augmentation_only_in_training_and_only_from_rng():
    H, mask = embeddings(), torch.ones(2, 50, dtype=torch.bool)
    assert torch.equal(augment(H, mask, 0.3, 0.1, seeded(1)), augment(H, mask, 0.3, 0.1, seeded(1)))
    assert torch.equal(augment(H, mask, 0.0, 0.0, seeded(1)), H)
    noise = augment(10 * H, mask, 0.3, 0.0, seeded(1)) - 10 * H
    assert noise.std().item() == pytest.approx(0.3 * (10 * H).std().item(), rel=0.06)  # relative to the spread of H
    model, (H, targets) = awake(32), world()
    assert model.losses(H, targets, None, seeded(1))["loss"] == model.losses(H, targets, None, seeded(2))["loss"]
    model.train()
    a, b, c = (model.losses(H, targets, None, seeded(s))["loss"].item() for s in (1, 1, 2))
    assert a == b != c


def test_half_precision_keeps_coordinates_single():
    model, (H, targets) = awake(32), world()
    exact = model.losses(H, targets)["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, terms = model(H), model.losses(H, targets)
        terms["loss"].backward()
    assert out.X.dtype == torch.float32 and terms["loss"].item() == pytest.approx(exact, rel=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_entropy_deficit_counts_real_rows_only():
    support = torch.eye(6, dtype=torch.bool)[None].clone()
    support[0, :4, :4] = True
    mask = torch.arange(6)[None] < 4
    one_hot = torch.eye(6)[None, None]
    assert entropy_deficit(one_hot, support, mask).item() == pytest.approx(1.0)
    assert entropy_deficit((support / support.sum(-1, keepdim=True))[:, None], support, mask).item() == pytest.approx(0.0, abs=1e-6)


def train_briefly(seed: int) -> tuple[D7, list[float]]:
    train, held_out, rng = [world(seed=s) for s in range(4)], [world(seed=9)], seeded(seed)
    torch.manual_seed(seed)
    model, curve = D7(32, CONFIG), []
    pretrain_gate(model, train, 20)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(6):
        model.train()
        for batch in train:
            loss = geometry_loss(model, batch, epoch, rng)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        curve.append(mean_energy(model, held_out))
    return model, curve


def test_training_helps_repeats_and_can_be_saved():
    model, curve = train_briefly(0)
    assert curve[-1] < 0.7 * curve[0] and curve == train_briefly(0)[1]
    H, targets = world(seed=9)
    assert mean_energy(model, [(H.flip(1), targets)]) > 3 * curve[-1]  # poison A: rows of H in the wrong order
    again = D7(32, CONFIG)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(H).X, model.eval()(H).X)


def test_d7_trains_in_the_house_loop(tmp_path):
    from gears_nb.core.training import train

    batches = [world(seed=s) for s in range(2)]
    config = replace(CONFIG.train, epochs=2, progress=False, device="cpu")
    torch.manual_seed(0)
    history = train(D7(32, CONFIG), lambda epoch, rng: batches, geometry_loss, config, seed=0, checkpoint=tmp_path / "d7",
                    validate=lambda m: mean_energy(m, batches), name="d7")
    assert len(history.rows) == 2 and all(math.isfinite(v) for v in history.rows[-1].values() if isinstance(v, float))
