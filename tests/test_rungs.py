"""Rungs: the composable model, its options one by one, training phases, the oracle guard."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gears_nb.core.errors import InputError
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.models.batches import EmbeddedSlide, Run
from gears_nb.models.catalogue import MODELS
from gears_nb.models.conformance import check_geometry_model
from gears_nb.models.contract import geometry_loss, mean_energy
from gears_nb.models.fit import fit_ensemble, fit_member
from gears_nb.reconstruct.settings import profile
from gears_nb.structure.gate import GateLogits, candidate_mask, oracle_edges
from gears_nb.structure.ipa import (
    EgnnBlock,
    RecycleBlock,
    Recycler,
    Steps,
    attention_bias,
    neighbour_walk,
)
from gears_nb.structure.rungs import RUNGS, Ladder, Rung, beta_share, gate_loss, make_gate, rung
from gears_nb.targets.builder import build_targets, log_support, log_walk, squared_distances

CONFIG = profile("toy", **{"structure.k_cand": 12, "structure.recycles": 3}).structure


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(B: int = 2, n: int = 40, d: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, n, d, generator=seeded(seed))


def world(seed: int = 0, B: int = 2, n: int = 40, d: int = 16):
    "Minisets `seed` of a synthetic tissue: `(H, targets)`."
    law, rng = seeded(7), seeded(100 + seed)
    waves, phase = torch.randn(2, d, generator=law), torch.randn(d, generator=law)
    pos = torch.rand(B, n, 2, generator=rng) * 2 - 1
    return torch.sin(pos @ waves + phase) + 0.3 * torch.randn(B, n, d, generator=rng), build_targets(pos)


def awake(choice: Rung | str = "d7", dim_in: int = 16, config=CONFIG, **diff) -> Ladder:
    "A model in evaluation mode in which no layer is zero, so that nothing passes for being inert."
    torch.manual_seed(0)
    choice = rung(choice, **diff) if isinstance(choice, str) else choice
    model = Ladder(dim_in, config, rung=choice).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return model


# ---------------------------------------------------------------- the table


def test_rungs_of_other_gates_start_from_the_same_first_guess():
    models = []
    for name, diff in (("d7", {}), ("plain", {}), ("topo", {}), ("d7", {"gate": "heads"}), ("d7", {"pair": True})):
        torch.manual_seed(0)
        models.append(Ladder(16, CONFIG, rung=rung(name, **diff)))
    for other in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].refine.guess.parameters(), other.refine.guess.parameters()))


def test_d7_numbers_are_the_ones_before_it_became_a_rung():
    "Six training steps and an evaluation of the class that `Ladder` replaced, which drew its gate's weights first."
    torch.manual_seed(0)
    config = profile("toy", **{"structure.k_cand": 20, "structure.recycles": 3}).structure
    gate = make_gate("edge", 16, config.heads)
    model, g = MODELS["d7"](16, config), seeded(1)
    model.gate.load_state_dict(gate.state_dict())
    H, targets = torch.randn(2, 50, 16, generator=g), build_targets(torch.randn(2, 50, 2, generator=g))
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for epoch in range(6):
        loss = model.train().losses(H, targets, None, g, epoch)["loss"]
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    assert losses == pytest.approx([0.7086568, 0.7422693, 0.7562370, 0.7341805, 0.6888875, 0.6391083], abs=2e-5)
    X = model.eval()(H).X[0, :4].flatten().tolist()
    assert X == pytest.approx([-0.341945, -0.888663, 0.624371, -0.636291, 0.470583, 0.814624, 1.660347, -0.036213], abs=2e-4)


def test_d2_without_its_extras_is_v2():
    bare = rung("d2", pair=False, beta_learned=False, geo="distance", eta="fixed", theta=0.4)
    assert bare == RUNGS["v2"] and rung("d7", gate="none") == RUNGS["plain"]
    assert rung("topo", gate="edge", tau="learned", geo="distance", geo_from=0, geo_clip=10.0, beta_ramp=0, detach_gate=False,
                rank_weight=0.0, trust_weight=0.0, warm_epochs=0) == RUNGS["d7"]


@pytest.mark.parametrize("diff", [{"gate": "hard"}, {"tau": "none"}, {"geo": "rbf2"}, {"betta": 1.0}, {"recycles": 0}, {"rank_weight": -0.1},
                                  {"smoothing": -1}, {"shared": "yes"}, {"gate_steps": ["one"]}, {"update": "gnn"}])
def test_impossible_rungs_are_refused(diff):
    with pytest.raises(InputError):
        rung("d7", **diff)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="choose from"):
        rung("d9")
    with pytest.raises(InputError, match="mutual"):
        awake("d7", graph="nearest")(embeddings())


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_keeps_the_promises_of_the_protocol(name):
    check_geometry_model(awake(name), embeddings())


@pytest.mark.parametrize("name", RUNGS)
def test_every_parameter_of_every_rung_learns(name):
    model, (H, targets) = awake(name).train(), world()
    model.losses(H, targets, None, seeded(), epoch=9)["loss"].backward()
    last = f"refine.blocks.{len(model.refine.blocks) - 1}.mlp"  # if blocks are not shared, nobody reads the features after the last recycle
    idle = {name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or p.grad.abs().max() == 0}
    assert not {name for name in idle if model.rung.shared or not name.startswith(last)}


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_survives_half_precision_and_wild_embeddings(name):
    model, (H, targets) = awake(name).train(), world()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.losses(H, targets, None, seeded(), epoch=9)["loss"].backward()
        X = model.eval()(1e4 * H).X
    assert X.dtype == torch.float32 and X.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- options


OPTIONS = [
    {"update": "egnn"}, {"recycles": 1}, {"shared": False}, {"maps": "rotation"}, {"maps": "scalar"}, {"theta": -1.0}, {"eta_floor": 0.9},
    {"uniform_from": 1}, {"smoothing": 2}, {"qk_norm": False}, {"tau": "clamped"}, {"tau": "fixed"}, {"geo": "none"}, {"geo": "rbf"},
    {"geo": "points"}, {"geo_from": 1}, {"geo_clip": 0.01}, {"pair": True}, {"logit_clip": 1.0}, {"graph": "cosine"}, {"graph": "mutual"},
    {"gate": "none"}, {"gate": "heads"}, {"gate": "context"}, {"beta": 0.3}, {"bias_clip": 0.05},
]


@pytest.mark.parametrize("diff", OPTIONS, ids=lambda d: "-".join(f"{k}={v}" for k, v in d.items()))
def test_every_option_of_the_forward_pass_does_something_and_keeps_the_promises(diff):
    base, model, H = awake("d7"), awake("d7", **diff), embeddings()
    shared = {k: v for k, v in base.state_dict().items() if not k.endswith("theta") and k in model.state_dict() and v.shape == model.state_dict()[k].shape}
    model.load_state_dict(shared, strict=False)
    assert (model(H).X - base(H).X).abs().max() > 1e-4
    check_geometry_model(model, H)


TRAINING = [{"gate_steps": (2,)}, {"gate_steps": (1, 2)}, {"gate_diagonal": True}, {"rank_weight": 0.5}, {"gate_input": "clean"}]


@pytest.mark.parametrize("diff", TRAINING, ids=str)
def test_every_option_of_the_gate_s_losses_does_something(diff):
    H, targets = world()
    value = {str(d): awake("d7", **d).train().losses(H, targets, None, seeded(), 3)["loss"].item() for d in ({}, diff)}
    assert len(set(value.values())) == 2


def test_limit_cases_meet():
    H = embeddings()
    learned, fixed = awake("d7", beta_learned=True), awake("d7")
    learned.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        learned.betas.fill_(CONFIG.beta)
    assert torch.allclose(learned(H).X, fixed(H).X, atol=1e-6)  # learned betas, all equal
    paired = awake("d7", pair=True)
    paired.load_state_dict(fixed.state_dict(), strict=False)
    nn.init.zeros_(paired.pair.out.weight)
    assert torch.allclose(paired(H).X, fixed(H).X, atol=1e-6)  # a silent pair term
    off, plain = awake("d7", beta=0.0), awake("plain")
    plain.load_state_dict({k: v for k, v in off.state_dict().items() if not k.startswith("gate")}, strict=False)
    assert torch.allclose(off(H).X, plain(H).X, atol=1e-6)  # a gate without weight


def test_learned_betas_stay_within_their_bound():
    model, H = awake("d2"), embeddings()
    with torch.no_grad():
        model.betas.fill_(50.0)
    wild = model(H).X
    with torch.no_grad():
        model.betas.fill_(2.5)
    assert torch.equal(model(H).X, wild)


@pytest.mark.parametrize(("geo_from", "silent"), [(0, []), (2, [0, 1]), (-1, [0, 1])])
def test_geometry_speaks_from_its_recycle_on(geo_from, silent):
    model, H = awake("d7", geo_from=geo_from), embeddings()
    before = model(H, trace=True).trace["attention"]
    with torch.no_grad():
        model.refine.blocks[0].geo.gamma += 3
    after = model(H, trace=True).trace["attention"]
    first_loud = len(silent)
    assert all(torch.equal(before[r], after[r]) for r in silent) and not torch.allclose(before[first_loud], after[first_loud])


def test_forced_uniform_attention_is_the_mean_over_the_graph():
    model, H = awake("d7", uniform_from=1), embeddings()
    trace = model(H, trace=True).trace
    mean = (trace["support"] / trace["support"].sum(-1, keepdim=True))[:, None].expand(-1, CONFIG.heads, -1, -1)
    assert torch.allclose(trace["attention"][1], mean) and torch.allclose(trace["attention"][2], mean)
    assert not torch.allclose(trace["attention"][0], mean)


def test_smoothing_recycles_mix_along_the_gate_s_walk():
    model, H = awake("d7", smoothing=2), embeddings()
    trace = model(H, trace=True).trace
    assert len(trace["x"]) == 1 + CONFIG.recycles + 2
    walk = neighbour_walk(attention_bias(trace["support"], GateLogits(trace["gate"], trace["support"]), CONFIG.beta))
    x, alpha = trace["x"][-2], torch.sigmoid(model.refine.smooth[-1])
    assert torch.allclose(trace["x"][-1], gauge_fix(x + alpha * (walk @ x - x)), atol=1e-6)


def test_stopped_gradients_do_not_pass_a_recycle():
    grads = {}
    for stop in (False, True):
        model, (H, targets) = awake("d7", stop_gradient=stop, geo="none"), world()  # without geometry features do not see coordinates
        (grads[stop],) = torch.autograd.grad(model.losses(H, targets)["rw"], model.refine.guess.out.weight, allow_unused=True)
    assert grads[False].abs().max() > 0 and (grads[True] is None or grads[True].abs().max() == 0)
    same = [awake("d7", stop_gradient=stop)(embeddings()).X for stop in (False, True)]
    assert torch.equal(*same)


def test_steps_start_at_their_word_and_respect_the_floor():
    assert Steps(5)().tolist() == pytest.approx([0.5987] * 5, abs=1e-4)
    floored = Steps(3, theta=-9.0, floor=0.5)()
    assert floored[0] >= 0.5 and floored[1] < 0.01
    fixed = awake("d7", eta="fixed").requires_grad_(True)
    assert "refine.steps.theta" in fixed.state_dict() and "refine.steps.theta" not in dict(fixed.named_parameters())


def test_logit_clip_comes_before_the_mask():
    torch.manual_seed(0)
    block, off = RecycleBlock(logit_clip=3.0), torch.zeros(1, 20, 20).masked_fill(torch.rand(1, 20, 20) > 0.5, -torch.inf)
    q, k, z, x = 100 * torch.randn(1, 4, 20, 16), torch.randn(1, 4, 20, 16), torch.randn(1, 20, 64), torch.randn(1, 20, 2)
    level = block.logits(q, k, z, x, off + 7)
    assert torch.equal(level.isneginf(), off.isneginf()[:, None].expand_as(level)) and level[level.isfinite()].abs().max() <= 3


@pytest.mark.parametrize("gate", ["edge", "heads"])
def test_gate_reaches_all_heads_or_its_own(gate):
    model, H = awake("d7", gate=gate), embeddings()
    M = model.candidates(H)
    seen = model.biases(H, M, model.gate(H, M))
    assert seen.shape == ((2, 40, 40) if gate == "edge" else (2, CONFIG.heads, 40, 40))
    assert torch.equal(seen.isneginf(), ~M if gate == "edge" else ~M[:, None].expand_as(seen))


def test_clipped_bias_keeps_the_mask():
    model, H = awake("d7", bias_clip=0.5), embeddings()
    M = model.candidates(H)
    bias = model.biases(H, M, model.gate(H, M))
    assert torch.equal(bias.isneginf(), ~M) and bias[M].abs().max().item() == pytest.approx(0.5)


def test_rbf_ignores_scale_and_candidates_off_the_graph():
    torch.manual_seed(0)
    block = RecycleBlock(geo="rbf")
    nn.init.normal_(block.geo.w)
    x, graph = torch.randn(2, 30, 2), attention_bias(candidate_mask(embeddings(2, 30), 5), None, 0.0)
    assert torch.allclose(block.geo(None, x, graph), block.geo(None, 9 * x, graph), atol=1e-3)
    assert not torch.allclose(block.geo(None, x, graph), block.geo(None, x, torch.zeros_like(graph)), atol=1e-3)  # the median is the graph's
    assert block.geo(None, x, graph).abs().max() <= 5 + 1e-6


def test_extra_columns_reach_the_gate_and_nothing_else():
    model, H = awake("d7", dim_in=20, gate_columns=4), embeddings(d=20)
    other = torch.cat([H[..., :16], torch.randn(2, 40, 4, generator=seeded(5))], -1)
    assert torch.equal(model.candidates(H), model.candidates(other))
    off = model.candidates(H)
    assert torch.equal(model(H, edges=off).X, model(other, edges=off).X) and not torch.equal(model(H).X, model(other).X)


# ---------------------------------------------------------------- egnn


@pytest.mark.parametrize("mirror", [False, True])
def test_egnn_is_equivariant(mirror):
    torch.manual_seed(0)
    block = EgnnBlock(dim=8).double()
    nn.init.normal_(block.pull.weight), nn.init.normal_(block.mlp[-1].weight)
    s, x = torch.randn(2, 20, 8, dtype=torch.float64), torch.randn(2, 20, 2, dtype=torch.float64)
    R = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0] * torch.tensor([1.0, -1.0 if mirror else 1.0])
    bias = attention_bias(candidate_mask(s, 5), None, 0.0)
    plain, moved = block(s, x, bias, torch.tensor(0.5)), block(s, x @ R + 3, bias, torch.tensor(0.5))
    assert (moved[1] - plain[1] @ R - 3).abs().max() < 1e-12 and (moved[0] - plain[0]).abs().max() < 1e-12


def test_egnn_equals_plain_loops():
    torch.manual_seed(0)
    block, s, x = EgnnBlock(dim=8), torch.randn(1, 9, 8), torch.randn(1, 9, 2)
    nn.init.normal_(block.pull.weight)
    bias = torch.randn(1, 9, 9).masked_fill(~candidate_mask(s, 3), -torch.inf)
    w, z, gelu = bias.softmax(-1)[0], block.norm(s)[0], nn.functional.gelu
    to, of = block.ends(z).chunk(2, -1)
    expected = x[0].clone()
    for i in range(9):
        for j in range(9):
            d2 = (x[0, i] - x[0, j]).square().sum().view(1)
            m = gelu(block.message(gelu(to[i] + of[j] + block.length(d2))))
            expected[i] += 0.5 * w[i, j] * block.pull(m) * (x[0, j] - x[0, i])
    assert torch.allclose(block(s, x, bias, torch.tensor(0.5))[1][0], expected, atol=1e-6)


# ---------------------------------------------------------------- graph, support, targets


def test_walks_of_the_targets_are_matrix_powers():
    T = build_targets(torch.randn(2, 50, 2, generator=seeded())).rw_transitions
    for s, P in T.items():
        assert torch.allclose(P, torch.matrix_power(T[1], s), atol=1e-6)
        assert torch.allclose(P.sum(-1), torch.ones(2, 50), atol=1e-5)


def test_walk_of_the_truth_is_the_target_walk():
    pos = gauge_fix(torch.randn(1, 50, 2, generator=seeded()))
    t = build_targets(pos)
    T = log_walk(squared_distances(pos), log_support(t.knn_edges, t.knn_mask, t.mask), t.sigma_local).softmax(-1)
    assert torch.allclose(T, t.rw_transitions[1], atol=1e-6)


@pytest.mark.parametrize("name", ["d7", "d2", "topo", "egnn"])
def test_gate_loss_and_attention_share_one_support_in_training(name):
    model, (H, targets) = awake(name).train(), world()
    supports, biases = [], []
    model.gate.register_forward_hook(lambda _, args, out: supports.extend((args[1], out.support)))
    model.refine.register_forward_hook(lambda _, args, out: biases.append(args[2]))
    model.losses(H, targets, None, seeded())
    given, kept = supports[:2]
    bias = biases[0] if isinstance(biases[0], torch.Tensor) else biases[0][0]
    bias = bias if bias.ndim == 3 else bias[:, 0]
    assert torch.equal(given, kept) and torch.equal(~bias.isneginf(), kept) and kept.sum() < model.candidates(H).sum()


def test_stress_of_every_rung_ignores_the_candidates():
    H, targets = world()
    for name in RUNGS:
        few, many = (awake(name, config=replace(CONFIG, k_cand=k)) for k in (5, 20))
        assert few.losses(H, targets)["stress0"].item() == many.losses(H, targets)["stress0"].item()


def test_embeddings_arrive_without_history_from_an_encoder_in_eval_mode():
    from gears_nb.encoder.model import SharedEncoder
    from gears_nb.encoder.presets import Rows, encode

    encoder = SharedEncoder(genes=12, width=(16,), learned=8, dropout=0.5).train()
    features = np.random.default_rng(0).normal(size=(80, 12)).astype(np.float32)
    H = encode(encoder, Rows(features, 0.0))
    assert isinstance(H, np.ndarray) and np.array_equal(H, encode(encoder.train(), Rows(features, 0.0))) and not encoder.training
    assert not EmbeddedSlide(H, features[:, :2]).H.requires_grad


# ---------------------------------------------------------------- who teaches the gate


def gate_gradients(**diff) -> tuple[float, float]:
    "Largest gradient of the gate from the geometry terms alone, and from the gate's own."
    model, (H, targets) = awake("d7", **diff), world()
    terms = model.losses(H, targets)
    size = lambda loss: max((0.0 if g is None else g.abs().max().item()) for g in
                            torch.autograd.grad(loss, list(model.gate.parameters()), retain_graph=True, allow_unused=True))
    return size(terms["rw"] + terms["stress"]), size(terms["gate"])


def test_a_detached_gate_hears_only_its_own_losses():
    assert gate_gradients()[0] > 0
    geometry, own = gate_gradients(detach_gate=True)
    assert geometry == 0 and own > 0
    assert torch.equal(awake("d7")(embeddings()).X, awake("d7", detach_gate=True)(embeddings()).X)


def test_the_ramp_of_beta_is_followed_and_kept():
    assert [beta_share(Rung(beta_ramp=4), 2.0, e) for e in (0, 2, 4, 7)] == [0.5, 1.25, 2.0, 2.0]
    model, (H, targets) = awake("d7", beta_ramp=4), world()
    assert model.ramped.item() == CONFIG.beta
    model.train().losses(H, targets, None, seeded(), epoch=2)
    assert model.ramped.item() == 1.25
    model.eval().losses(H, targets, epoch=0)  # evaluation does not move it
    again = awake("d7", beta_ramp=4)
    again.load_state_dict(model.state_dict())
    assert again.ramped.item() == 1.25 and torch.equal(again(H).X, model(H).X)
    assert not torch.equal(model(H).X, awake("d7")(H).X)


def test_trust_is_zero_until_the_gate_moves():
    model, (H, targets) = awake("d7", trust_weight=0.1), world()
    assert "trust" not in model.losses(H, targets)
    model.remember_gate()
    assert model.losses(H, targets)["trust"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.gate.out.weight.mul_(3)
    terms = model.losses(H, targets)
    assert terms["trust"] > 0.001 and "anchor" not in "".join(model.state_dict())
    terms["trust"].backward()
    assert all(p.grad is None for p in model.outside["anchor"].parameters())


def test_pretraining_uses_the_rung_s_losses():
    batch = world()
    assert set(gate_loss(awake("d7"), batch)) == {"loss"}
    terms = gate_loss(awake("topo"), batch)
    share = RUNGS["topo"].rank_weight / CONFIG.gate_weight
    assert terms["loss"].item() == pytest.approx((terms["gate"] + share * terms["rank"]).item())


def test_a_teacher_s_word_enters_with_its_weight():
    model, (H, targets) = awake("d7", distil_weight=0.5), world()
    before = model.losses(H, targets)
    model.outside["distil"] = lambda x, H, targets, mask: x.square().mean() * 0 + 3.0
    after = model.losses(H, targets)
    assert "distil" not in before and after["loss"].item() == pytest.approx(before["loss"].item() + 1.5)


def test_projected_candidates():
    model, H = awake("d7"), embeddings()
    model.outside["project"] = lambda H: H[..., :2]
    assert torch.equal(model.candidates(H), candidate_mask(H[..., :2], CONFIG.k_cand))


# ---------------------------------------------------------------- oracle guard


def test_true_edges_never_meet_a_gate():
    model, (H, targets) = awake("d7"), world()
    edges = oracle_edges(targets)
    for extra in ({"gate": model.gate(H, edges)}, {"graph": model.candidates(H)}, {"gate": model.gate(H, edges), "oracle": True}):
        with pytest.raises(InputError, match="gate is off"):
            model(H, edges=edges, **extra)


def test_true_edges_in_training_need_the_word():
    model, (H, targets) = awake("d7").train(), world()
    edges = oracle_edges(targets)
    for call in (lambda **o: model(H, edges=edges, **o), lambda **o: model.losses(H, targets, None, seeded(), edges=edges, **o)):
        with pytest.raises(InputError, match="oracle=True"):
            call()
        call(oracle=True)
    assert "gate" not in model.losses(H, targets, None, seeded(), edges=edges, oracle=True)
    assert "gate" not in model.eval().losses(H, targets, edges=edges)


def test_shipped_models_are_sealed_and_stay_so():
    H, coords = toy_slides()
    (model,), _ = fit_ensemble(H, coords, SMOKE.structure, SMOKE.targets)
    again = MODELS["d7"](24, SMOKE.structure)
    again.load_state_dict(model.state_dict())
    batch, targets = world(d=24)
    for shipped in (model, again.eval()):
        with pytest.raises(InputError, match="sealed"):
            shipped(batch, edges=oracle_edges(targets))
        with pytest.raises(InputError, match="sealed"):
            mean_energy(shipped, [(batch, targets)], edges=oracle_edges(targets))
        assert mean_energy(shipped, [(batch, targets)], edges=oracle_edges(targets), oracle=True) > 0
        assert shipped(batch).X.isfinite().all()


def test_another_inference_graph_keeps_the_gate():
    model, H = awake("d7"), embeddings()
    wide = candidate_mask(H, 25)
    trace = model(H, graph=wide, trace=True).trace
    assert torch.equal(trace["support"], wide) and torch.equal(trace["gate"].isneginf(), ~wide)
    assert torch.equal(model(H, graph=model.candidates(H)).X, model(H).X)


# ---------------------------------------------------------------- training phases


SMOKE = profile("smoke", **{"structure.train.epochs": 2, "structure.guess_epochs": 2, "structure.miniset": 48, "progress": False})


def toy_slides(count: int = 2, n: int = 90) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    W, coords = rng.normal(size=(2, 24)), [rng.random((n, 2)) for _ in range(count)]
    return [np.sin(4 * x @ W) + 0.1 * rng.normal(size=(n, 24)) for x in coords], coords


@pytest.mark.parametrize(("name", "expected"), [("plain", "guess refine"), ("d7", "guess gate refine"), ("topo", "guess gate warm refine")])
def test_rungs_run_through_their_phases(name, expected):
    H, coords = toy_slides()
    config = replace(SMOKE.structure, model=name)
    model, histories = fit_member(H, coords, config, SMOKE.targets)
    assert " ".join(histories) == expected and model.rung == RUNGS[name] and not model.training
    assert all(np.isfinite(h.column("loss")).all() for h in histories.values())
    assert all(p.requires_grad for p in model.parameters())


def test_phases_touch_what_they_should(monkeypatch):
    import gears_nb.models.fit as module

    H, coords = toy_slides()
    changed, right = {}, module.train

    def watched(model, *args, **kwargs):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        history = right(model, *args, **kwargs)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        changed[kwargs["name"].split("-")[0]] = {part for part in ("gate.", "refine.guess.", "refine.blocks.") if any(k.startswith(part) for k in moved)}
        return history

    monkeypatch.setattr(module, "train", watched)
    fit_member(H, coords, replace(SMOKE.structure, model="topo"), SMOKE.targets)
    assert changed == {"guess": {"refine.guess."}, "gate": {"gate."}, "warm": {"refine.blocks."}, "refine": {"gate.", "refine.blocks."}}


def test_warm_up_has_little_gate_and_no_walk():
    choice = rung("topo", warm_epochs=1)
    model = awake(choice).train()
    warm = {stage.name: stage for stage in model.stages(Run(SMOKE.structure, SMOKE.targets))}["warm"]
    terms = warm.turns(model, world(), 7, seeded())
    assert model.ramped.item() == choice.beta_start
    weightless = sum(terms[k].item() * w for k, w in (("stress", 1.0), ("stress0", 0.5)))
    assert terms["loss"].item() >= weightless and terms["rw"].item() > 0
    assert terms["loss"].item() - weightless < 0.3 * terms["rw"].item()


def test_training_continues_after_a_stop_with_the_same_numbers(tmp_path):
    H, coords = toy_slides()
    config = replace(SMOKE.structure, model="topo")
    whole, _ = fit_member(H, coords, config, SMOKE.targets, checkpoints=tmp_path / "a")

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after the gate, before the refinement
        fit_member(H, coords, config, SMOKE.targets, checkpoints=tmp_path / "b", prepare=stop)
    resumed, _ = fit_member(H, coords, config, SMOKE.targets, checkpoints=tmp_path / "b")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_another_rung_does_not_take_over_a_checkpoint(tmp_path):
    H, coords = toy_slides()
    fit_member(H, coords, SMOKE.structure, SMOKE.targets, checkpoints=tmp_path, rung=rung("d7"))
    with pytest.raises(InputError, match="another"):
        fit_member(H, coords, SMOKE.structure, SMOKE.targets, checkpoints=tmp_path, rung=rung("d7", beta=0.5))


def test_a_loss_of_one_s_own_reaches_the_refinement():
    H, coords = toy_slides()
    calls = []

    def oracle_loss(model, batch, epoch, rng):
        calls.append(epoch)
        return model.losses(*batch, batch[1].mask, rng, epoch, edges=oracle_edges(batch[1]), oracle=True)

    _, histories = fit_member(H, coords, SMOKE.structure, SMOKE.targets, loss=oracle_loss)
    assert set(calls) == {0, 1} and histories["refine"].column("gate") == [None, None]


def test_every_rung_learns_in_seconds():
    train, held_out = [world(s) for s in range(4)], [world(9)]
    for name in RUNGS:
        torch.manual_seed(0)
        model, rng = MODELS[name](16, CONFIG), seeded()
        before = mean_energy(model, held_out)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for epoch in range(4):
            model.train()
            for batch in train:
                optimiser.zero_grad()
                geometry_loss(model, batch, epoch, rng)["loss"].backward()
                optimiser.step()
        assert mean_energy(model, held_out) < 0.8 * before, name


def test_a_recycler_can_be_built_by_hand():
    torch.manual_seed(0)
    net = Recycler(lambda near: RecycleBlock(geo="distance" if near else "none"), dim_in=16, recycles=2, shared=False, geo_from=-1)
    assert net.blocks[0].geo is None and net.blocks[1].geo is not None
    assert net(embeddings(), torch.ones(2, 40, dtype=torch.bool), torch.zeros(2, 40, 40))[1].shape == (2, 40, 2)


def test_a_facade_of_another_rung_comes_back_from_disk_sealed(tmp_path):
    from test_facade import parts
    from test_facade import settings as small

    from gears_nb.reconstruct.facade import Gears

    slides, query, cells = parts()
    gears = Gears(small(**{"structure.model": "egnn"})).fit(slides, cells)
    gears.save(tmp_path)
    again = Gears.load(tmp_path)
    assert np.array_equal(gears.reconstruct(query).obsm["X_gears"], again.reconstruct(query).obsm["X_gears"], equal_nan=True)
    H, everyone = torch.randn(1, 20, again.fitted.cloud.shape[1]), torch.ones(1, 20, 20, dtype=torch.bool)
    for model in (*gears.fitted.models, *again.fitted.models):
        with pytest.raises(InputError, match="sealed"):
            model(H, edges=everyone)


def test_columns_for_the_gate_alone_never_reach_the_blocks():
    rng = np.random.default_rng(0)
    H, c = rng.normal(size=(90, 12)).astype(np.float32), rng.uniform(size=(90, 2)).astype(np.float32)
    config = profile("smoke", progress=False, **{"structure.guess_epochs": 1, "structure.minisets_per_epoch": 4, "structure.gate_pretrain": 1}).structure
    model, histories = fit_member([H], [c], config, profile("smoke").targets, rung=rung("d7", gate_columns=4))
    assert {"guess", "gate", "refine"} <= set(histories) and model.refine.guess.first.in_features == 8
    few = torch.from_numpy(H[None, :60]).clone()
    plain = Ladder(12, config, rung=rung("plain", gate_columns=4)).eval()
    before, other = plain(few).X, few.clone()
    other[..., 8:] = 100.0
    assert torch.equal(plain(other).X, before), "without a gate nobody reads the columns"
