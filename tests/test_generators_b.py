"""Layout dynamics, autoregressive placement and the cooperative energy-based model: closed forms, order and padding, failures, the whole road."""
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import read_h5ad
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.generators import autoregressive, cooperative_ebm, layout_sde
from gears_nb.generators.autoregressive import Autoregressive, breadth_first, gumbel_choice, log_density, surrogate
from gears_nb.generators.cooperative_ebm import CooperativeEBM, langevin
from gears_nb.generators.layout_sde import LayoutSDE, check_times, consensus, lyapunov, margins, random_frames, settle
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.models.batches import Run
from gears_nb.models.conformance import conform, toy_slides
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.settings import profile
from gears_nb.runs.cli import main
from gears_nb.targets.builder import build_targets
from gears_nb.targets.energy import energy

SMALL = {"width": 8, "heads": 2, "inducing": 4}
TINY = {"layout-sde": {**SMALL, "steps": 4, "checks": 4}, "autoregressive": {**SMALL, "chunk": 16, "neighbours": 6}, "cooperative-ebm": {**SMALL, "chain": 3, "neighbours": 6}}
KINDS = {"layout-sde": LayoutSDE, "autoregressive": Autoregressive, "cooperative-ebm": CooperativeEBM}
MODULES = {"layout-sde": layout_sde, "autoregressive": autoregressive, "cooperative-ebm": cooperative_ebm}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def smoke(name, **own):
    return profile("smoke", progress=False, **{"structure.model": {"name": name, "settings": {**TINY[name], **own}}, "structure.miniset": 48, "structure.batch": 2,
                                               "structure.minisets_per_epoch": 4, "structure.guess_epochs": 2, "structure.epochs": 2})


def tiny_model(name, **own):
    torch.manual_seed(0)
    c = smoke(name, **own)
    model = KINDS[name].build(16, Run(c.structure, c.targets))
    for p in model.parameters():  # layers that begin at zero would hide what they do
        torch.nn.init.normal_(p, std=0.3)
    return model


# ---- all three

@pytest.mark.parametrize("name, own", [("layout-sde", {}), ("autoregressive", {}), ("autoregressive", {"start": "learned"}), ("cooperative-ebm", {}),
                                       ("cooperative-ebm", {"mode": "langevin", "use_chain": 2}), ("layout-sde", {"samples": 3})], ids=str)
def test_the_answer_turns_with_the_order_of_the_cells(name, own, monkeypatch):
    "Noise belongs to a cell: where it is carried along, so is everything else."
    model = tiny_model(name, **own).double().eval()
    drawn, order = torch.randn(40, 2, 30, 6, generator=rng(5)).double(), torch.randperm(30, generator=rng(6))

    def answer(H, rows):
        kept = iter(drawn)
        monkeypatch.setattr(MODULES[name], "cell_noise", lambda mask, width, rng, like: next(kept)[:, rows, :width])
        with torch.no_grad():
            return model(H, None, rng(1))
    H = torch.randn(2, 30, 16, generator=rng(7)).double()
    a, b = answer(H, torch.arange(30)), answer(H[:, order], order)
    assert torch.allclose(a.X[:, order], b.X, atol=1e-6)
    assert a.uncertainty is None or torch.allclose(a.uncertainty[:, order], b.uncertainty, atol=1e-6)


@pytest.mark.parametrize("name, own", [("layout-sde", {"early": "fall", "recompute": True, "weights": {"diversity": 0.1, "overlap": 0.05}}), ("layout-sde", {"window": 2, "use_steps": 6}),
                                       ("autoregressive", {"score": 0.5, "start": "learned"}), ("cooperative-ebm", {"mode": "langevin", "use_chain": 2, "temperature": 0.0, "clip": 0.0})], ids=str)
def test_every_choice_meets_the_contract(name, own):
    c = smoke(name, **own)
    conform(KINDS[name], Run(c.structure, c.targets))


@pytest.mark.parametrize("name", KINDS)
def test_losses_do_not_see_padding(name):
    model = tiny_model(name).double().train()
    H, coords = torch.randn(2, 30, 16, generator=rng(1)).double(), torch.randn(2, 30, 2, generator=rng(2)).double()
    wide = lambda x: torch.cat([x, 50 * torch.ones(2, 5, x.shape[-1]).double()], 1)
    mask = (torch.arange(35) < 30).expand(2, -1)
    short, long = build_targets(coords), build_targets(wide(coords), mask)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    a = model.losses(H, short, rng=rng())
    model.load_state_dict(start)  # a moving average is no constant
    b = model.losses(wide(H), long, mask, rng())
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-7) for k in a)


@pytest.mark.parametrize("name", KINDS)
def test_several_draws_give_a_spread_per_cell(name):
    model = tiny_model(name, samples=4).eval()
    mask = torch.arange(30) < torch.tensor([[30], [22]])
    with torch.no_grad():
        out = model(torch.randn(2, 30, 16, generator=rng()), mask, rng(3))
    assert out.uncertainty.shape == (2, 30) and out.uncertainty[mask].min() > 0 and out.uncertainty[~mask].abs().max() == 0


@pytest.mark.parametrize("name", KINDS)
def test_what_is_told_is_a_record_of_one_sample(name):
    model = tiny_model(name).train()
    H, mask, truth = torch.randn(2, 30, 16, generator=rng()), torch.arange(30) < torch.tensor([[30], [22]]), torch.randn(2, 30, 2)
    told = model.explain(H, mask, truth=truth, about={"label": "toy"})
    for one, n in zip(told, (30, 22)):
        assert one.n == n and one.x.shape == (one.recycles + 1, n, 2) and one.about["label"] == "toy" and one.truth.shape == (n, 2)
        rows = one.attention.reshape(one.recycles, one.heads, n, n).sum(-1)
        assert np.allclose(rows, 1, atol=1e-4) and np.isfinite(one.terms["qk"]).all()
    assert model.training and model.explain(H, edges=torch.ones(2, 30, 30, dtype=torch.bool)) == []  # no graph of its own, so none to replace


@pytest.mark.parametrize("name, wrong", [("layout-sde", {"checks": 6}), ("layout-sde", {"steps": 2}), ("layout-sde", {"width": 9}), ("layout-sde", {"early": "up"}),
                                         ("layout-sde", {"weights": {"overlap": -1.0}}), ("autoregressive", {"score": 2.0}), ("autoregressive", {"start": "last"}),
                                         ("autoregressive", {"width": 9}), ("cooperative-ebm", {"mode": "c"}), ("cooperative-ebm", {"width": 9}), ("cooperative-ebm", {"step": 0.0})], ids=str)
def test_settings_that_do_not_fit_are_refused(name, wrong):
    with pytest.raises(InputError):
        tiny_model(name, **wrong)


# ---- layout dynamics

@given(st.floats(0.05, 0.9), st.floats(0.1, 2))
def test_a_linear_drift_has_the_variance_of_its_recursion(alpha, sigma):
    kicks = list(torch.randn(3, 20_000, generator=rng()).double())
    path = settle(lambda x, kick, t: (1 - alpha) * x + sigma * kick, torch.zeros(20_000).double(), kicks, keep=(1, 2, 3))
    v = 0.0
    for t in (1, 2, 3):
        v = (1 - alpha) ** 2 * v + sigma**2
        assert path[t].var().item() == pytest.approx(v, rel=0.06)


@given(st.lists(st.floats(0, 5), min_size=5, max_size=5), st.floats(0, 0.5))
def test_the_hinge_of_both_signs_is_the_sum_over_steps(E, gamma):
    given_, T = torch.tensor(E).double()[:, None], 4
    for early, sign in (("fall", 1), ("free", -1)):
        by_hand = sum(max(0.0, E[t + 1] - E[t] + sign * gamma * (1 - t / T)) for t in range(T))
        assert lyapunov(given_, margins(range(T + 1), gamma), early).item() == pytest.approx(by_hand, abs=1e-5)
    assert margins(check_times(30, 8), gamma).sum().item() == pytest.approx(sum(gamma * (1 - t / 30) for t in range(30)), abs=1e-4)


def test_a_step_of_the_model_is_that_of_the_source_and_half_steps_have_half_the_drift():
    model = tiny_model("layout-sde").double().eval()
    H, mask = torch.randn(1, 20, 16, generator=rng()).double(), torch.ones(1, 20, dtype=torch.bool)
    with torch.no_grad():
        one, two = (model.path(H, mask, rng(1), T, [0, 1]) for T in (4, 8))
        mu, wide = model.drift(one.states[0], model.lift(H), 0.0, mask)
        X0, same = one.states[0], rng(1)
        assert torch.allclose(model.start(H, mask, same), X0)
        kick = torch.randn(20, 2, generator=same)
        moved = X0 + mu + 0.05 * wide * kick
        assert torch.allclose(one.states[1], moved - moved.mean(1, keepdim=True))
    assert two.drift[0] == pytest.approx(one.drift[0].item() / 2) and two.sigma[0] == pytest.approx(one.sigma[0].item() / math.sqrt(2))


def test_recomputing_changes_no_gradient_and_a_window_cuts_it():
    H, coords = torch.randn(1, 30, 16, generator=rng()).double(), torch.randn(1, 30, 2, generator=rng(1)).double()
    targets, grads = build_targets(coords), {}
    for label, own in {"all": {}, "again": {"recompute": True}, "window": {"window": 2}}.items():
        model = tiny_model("layout-sde", **own).double()
        model.losses(H, targets, rng=rng())["loss"].backward()
        grads[label] = torch.cat([p.grad.flatten() for p in model.drift.parameters()])
    assert torch.allclose(grads["all"], grads["again"], atol=1e-10) and not torch.allclose(grads["all"], grads["window"], atol=1e-6)


def test_samples_in_other_poses_are_the_same_opinion():
    X = gauge_fix(torch.randn(2, 15, 2, generator=rng()).double())
    mask = torch.ones(2, 15, dtype=torch.bool)
    out = consensus([X, X @ random_frames(2, rng(), X), 5 * X - 2], mask)
    assert torch.allclose(out.X, X) and out.uncertainty.max() < 1e-7
    assert consensus([X], mask).uncertainty is None
    assert consensus([X, X + 0.1 * torch.randn(2, 15, 2).double()], mask).uncertainty.min() > 0


# ---- autoregressive placement

def test_both_gradients_are_the_closed_form_and_their_sum_is_twice_it():
    "E = (x - 1)^2 in the plane, x = m + L e: the gradient by m is 2 (m - 1), by the diagonal of L it is 2 L."
    count, m0, L0 = 200_000, torch.tensor([2.0, 0.5]).double(), torch.tensor([[0.6, 0.0], [0.2, 0.4]]).double()

    def gradient(share, both=False):
        m, L = m0.clone().requires_grad_(), L0.clone().requires_grad_()
        x = m + torch.randn(count, 2, generator=rng(3)).double() @ L.T
        E = (x - 1).square().sum(-1)
        log_p = log_density(x.detach(), m, L.expand(count, 2, 2))
        loss = surrogate(E, log_p, share, 1.9) + (surrogate(E, log_p, 1.0, 1.9) if both else 0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (m, L))])[[0, 1, 2, 4, 5]]
    exact = torch.cat([2 * (m0 - 1), (2 * L0).flatten()[[0, 2, 3]]])
    for share in (0.0, 0.4, 1.0):
        assert torch.allclose(gradient(share), exact, atol=0.06)
    assert torch.allclose(gradient(0.0, both=True), 2 * exact, atol=0.06)  # the source's two terms count twice


def test_a_learned_choice_has_an_unbiased_score():
    "Three cells that cost 1, 2, 4 if chosen: the gradient of the expected cost by the logits is p (cost - mean cost)."
    cost = torch.tensor([1.0, 2.0, 4.0]).double()
    logits = torch.tensor([0.2, -0.3, 0.5]).double().requires_grad_()
    many = logits.expand(300_000, 3)
    first, log_p = gumbel_choice(many, torch.ones(300_000, 3, dtype=torch.bool), torch.randn(300_000, 3, generator=rng()).double())
    grad, = torch.autograd.grad(((cost[first] - 2.0) * log_p).mean(), logits)
    p = logits.detach().softmax(0)
    assert torch.allclose(grad, p * (cost - (p * cost).sum()), atol=0.01)


@given(st.integers(0, 99), st.integers(1, 12))
def test_breadth_first_visits_every_real_cell_once_and_never_skips_a_level(seed, n):
    near = torch.rand(1, n + 3, n + 3, generator=rng(seed)) < 0.25
    near = (near | near.transpose(1, 2)) & ~torch.eye(n + 3, dtype=torch.bool)
    mask, key = (torch.arange(n + 3) < n)[None], torch.rand(1, n + 3, generator=rng(seed + 1))
    near = near & mask[:, :, None] & mask[:, None]
    order, level = breadth_first(near, mask, torch.tensor([seed % n]), key)
    assert sorted(order[0].tolist()) == list(range(n + 3)) and order[0, 0] == seed % n and sorted(order[0, n:].tolist()) == [n, n + 1, n + 2]
    assert (level[0, order[0]].diff() >= 0).all()
    edges = near[0, :n, :n]
    assert not edges.any() or (level[0, :n, None] - level[0, None, :n])[edges].abs().max() <= 1
    again, _ = breadth_first(near.flip(1, 2), mask.flip(1), torch.tensor([n + 2 - seed % n]), key.flip(1))
    assert torch.equal(n + 2 - again[0, :n], order[0, :n])  # in another order of cells, the same walk


def test_a_given_layout_has_the_density_of_its_draw_and_nobody_looks_ahead():
    model = tiny_model("autoregressive", chunk=7).double().eval()
    H, mask = torch.randn(1, 20, 16, generator=rng()).double(), torch.ones(1, 20, dtype=torch.bool)
    with torch.no_grad():
        drawn, order, _, h = model.draw(H, mask, rng(1))
        again = model.walk(h, mask, order, torch.zeros(1, 20, 2).double(), drawn.X)
        assert torch.allclose(again.log_p, drawn.log_p, atol=1e-9) and torch.allclose(again.mean, drawn.mean)
        late = drawn.X.clone()
        late[0, order[0, 14:]] += 9.0
        moved = model.walk(h, mask, order, torch.zeros(1, 20, 2).double(), late)
        assert torch.allclose(moved.mean[0, order[0]], drawn.mean[0, order[0]])
        late[0, order[0, :7]] += torch.randn(7, 2).double()
        assert not torch.allclose(model.walk(h, mask, order, torch.zeros(1, 20, 2).double(), late).mean[0, order[0, 7:]], drawn.mean[0, order[0, 7:]])


def test_entropy_is_rewarded_in_radii_and_the_baseline_is_from_before():
    H, coords = torch.randn(2, 30, 16, generator=rng()).double(), torch.randn(2, 30, 2, generator=rng(1)).double()
    targets, model = build_targets(coords), tiny_model("autoregressive", entropy=0.5).double().train()
    terms = model.losses(H, targets, rng=rng(2))
    assert terms["loss"].item() == pytest.approx((terms["energy"] - 0.5 * terms["entropy"]).item())
    assert terms["baseline"] == pytest.approx(terms["energy"].item()) and model.average == pytest.approx(terms["energy"].item()) and model.count == 1
    second = model.losses(H, targets, rng=rng(3))
    assert second["baseline"] == pytest.approx(terms["energy"].item())
    assert model.average.item() == pytest.approx((0.9 * terms["energy"] + 0.1 * second["energy"]).item())
    with torch.no_grad():  # a layout twice as large, with dice twice as large, has the same energy and entropy
        model.place.out.weight[:2] *= 2
        model.place.out.bias[:2] *= 2
        model.place.spread *= 2
        model.place.lift.weight[:, :2] /= 2
    larger = model.losses(H, targets, rng=rng(3))
    assert torch.allclose(larger["energy"], second["energy"]) and torch.allclose(larger["entropy"], second["entropy"])


# ---- cooperative energy-based model

@given(st.floats(0.3, 1.5), st.floats(0.05, 0.9), st.floats(0.1, 2))
def test_langevin_settles_at_the_variance_of_its_closed_form(s, share, temperature):
    step = share * s**2
    kicks = list(torch.randn(60, 4000, 1, 1, generator=rng()).double())
    start = math.sqrt(temperature) * s * torch.randn(4000, 1, 1, generator=rng(1)).double()
    X, course = langevin(start, lambda x: x.square().sum((1, 2)) / (2 * s**2), kicks, step, temperature=temperature)
    assert X.var().item() == pytest.approx(temperature * s**2 / (1 - step / (4 * s**2)), rel=0.12) and course.shape == (60, 4000)


def test_a_chain_without_temperature_descends_and_pulls_are_cut():
    X = torch.tensor([[[3.0, 4.0], [0.0, 0.1]]])
    U = lambda x: x.square().sum((1, 2)) / 2
    with torch.no_grad():  # as in use
        plain, _ = langevin(X, U, [torch.zeros_like(X)], 0.2, temperature=0.0)
        cut, E = langevin(X, U, [torch.zeros_like(X)], 0.2, temperature=0.0, clip=1.0)
    assert torch.allclose(plain, 0.9 * X) and torch.allclose(cut, torch.tensor([[[2.94, 3.92], [0.0, 0.09]]])) and E.item() == pytest.approx(12.505)
    assert not plain.requires_grad and torch.equal(langevin(X, U, [], 0.1)[0], X)


def test_a_chain_on_true_targets_lowers_their_energy_and_has_no_gradient():
    model, slide = tiny_model("cooperative-ebm", chain=30), toy_slides(n=60)[0]
    targets, mask = build_targets(slide.coords[None]), torch.ones(1, 60, dtype=torch.bool)
    X, E = model.correct(gauge_fix(torch.randn(1, 60, 2, generator=rng())), targets, mask, rng(1))
    assert E[-1] < 0.5 * E[0] and not X.requires_grad and torch.allclose(gauge_fix(X), X, atol=1e-5)


def test_turns_move_their_own_parts():
    model, slide = tiny_model("cooperative-ebm"), toy_slides(n=60)[0]
    c = smoke("cooperative-ebm")
    batch = slide.H[None], build_targets(slide.coords[None])
    [alone, together] = model.stages(Run(c.structure, c.targets))
    assert [t.name for t in alone.turns] == ["predictor"] and [t.name for t in together.turns] == ["generator", "predictor"]
    for turn in together.turns:
        model.zero_grad()
        turn.loss(model, batch, 0, rng())["loss"].backward()
        moved = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert moved == set(turn.parts)


def test_predicted_targets_fit_the_energy_and_ignore_padding():
    model = tiny_model("cooperative-ebm").double()
    H, mask = torch.randn(1, 30, 16, generator=rng()).double(), torch.ones(1, 30, dtype=torch.bool)
    wide, real = torch.cat([H, 9 * torch.ones(1, 5, 16).double()], 1), (torch.arange(35) < 30)[None]
    short, long = model.predictor.predicted(H, mask), model.predictor.predicted(wide, real)
    X = torch.randn(1, 30, 2, generator=rng(1)).double()
    a, b = energy(X, short, form="ratio"), energy(torch.cat([X, torch.zeros(1, 5, 2).double()], 1), long, form="ratio")
    assert torch.allclose(a.total, b.total, atol=1e-9) and a.total > 0
    assert torch.allclose(short.rw_transitions[1].sum(-1), torch.ones(1, 30).double()) and (short.ref_distances > 0).all() and (short.sigma_local > 0).all()
    flipped = model.predictor.lengths(model.predictor.trunk(H, mask), short.multiscale_edges.flip(-1))
    assert torch.allclose(flipped, short.ref_distances)


def test_mode_b_is_the_proposal_and_a_chain_on_predicted_targets():
    model = tiny_model("cooperative-ebm").eval()
    other = CooperativeEBM(16, replace(model.config, mode="langevin", use_chain=5)).eval()
    other.load_state_dict(model.state_dict())
    H, mask = torch.randn(1, 30, 16, generator=rng()), torch.ones(1, 30, dtype=torch.bool)
    with torch.no_grad():
        a, b, same = model(H, None, rng(1)).X, other(H, None, rng(1)).X, rng(1)
        by_hand = model.correct(model.propose(H, mask, same), model.predictor.predicted(H, mask), mask, same, 5)[0]
    assert torch.allclose(b, by_hand, atol=1e-5) and not torch.allclose(a, b, atol=1e-3)


# ---- the whole road

@pytest.mark.parametrize("name", KINDS)
def test_the_command_line_reconstructs_with_every_kind(name, tmp_path, monkeypatch, capsys):
    "Learns, places, saves; what was saved places the same cells at the same spots."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path / "cache"))
    *slides, query = simulate("tiny", seed=0).slides
    for file, table in zip("abq", (*slides, query)):
        table.write_h5ad(f"{file}.h5ad")
    own = [f"structure.model.settings.{key}={value}" for key, value in TINY[name].items()]
    words = ["--slides", "a.h5ad", "b.h5ad", "--cells", "q.h5ad", "--out", "r.h5ad", "--profile", "smoke", "--quiet", "--model-dir", "m", "--model-kind", name]
    assert main(["reconstruct", *words, "--set", "structure.epochs=1", "structure.guess_epochs=2", *own]) == 0
    assert "cells placed: r.h5ad" in capsys.readouterr().out
    g, X = Gears.load("m", {"progress": False}), read_h5ad("r.h5ad").obsm["X_gears"]
    assert isinstance(g.fitted.models[0], KINDS[name]) and X.shape == (query.n_obs, 2) and np.isfinite(X).any()
    np.testing.assert_array_equal(g.reconstruct(query).obsm["X_gears"], X)
