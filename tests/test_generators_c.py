"""Constraint-first EGNN, IPA-R, EGNN-Dist, gradient flow, OpNet: turns and shifts, order and padding, closed forms, bad settings, and the whole road."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchdiffeq import odeint

from gears_nb.core.config import from_dict
from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.generators.constraint_egnn import ConstraintEGNN, ConstraintEGNNConfig, ConstraintLayer, LengthHead, edge_noise, likelihood, on_edges, softmax_over
from gears_nb.generators.edges import candidate_edges, paired_batches
from gears_nb.generators.egnn_dist import EGNNDist, EGNNDistConfig, EGNNLayer, PairHead
from gears_nb.generators.gradient_flow import GradientFlow, GradientFlowConfig, Velocity, downhill, misalignment
from gears_nb.generators.ipa_r import IPAR, IPABlock, IPARConfig, pass_weights, pulled
from gears_nb.generators.opnet import OpNet, OpNetConfig, imbalance, row_entropy, stationary
from gears_nb.generators.trial import chance, examined
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.models.batches import Run
from gears_nb.models.conformance import conform, toy_slides
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.settings import profile
from gears_nb.runs.cli import main
from gears_nb.targets.builder import build_targets
from gears_nb.targets.energy import energy

NAMES = ["constraint-egnn", "ipa-r", "egnn-dist", "gradient-flow", "opnet"]
TINY = {"constraint-egnn": {"layers": 2, "triplets": 50}, "ipa-r": {"recycles": 2, "blocks": 1}, "egnn-dist": {"layers": 2, "triplets": 50}, "gradient-flow": {"steps": 3}, "opnet": {}}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(seed, n, dim=8):
    "Places, rows and their neighbour lists, float64."
    torch.manual_seed(seed)
    h = torch.randn(1, n, dim).double()
    return torch.randn(1, n, 2).double(), h, *candidate_edges(h, torch.ones(1, n, dtype=torch.bool), 3)


def turn_of(seed):
    return torch.linalg.qr(torch.randn(2, 2, generator=rng(seed)).double())[0]


def steps():
    "Every equivariant step of the chapter as places -> places, on rows of 8 columns."
    c = {"width": 8, "hidden": 4, "heads": 2}
    flow = GradientFlowConfig(**c)
    d = lambda x, index: (x[:, :, None] - x.gather(1, index.flatten(1)[..., None].expand(-1, -1, 2)).unflatten(1, index.shape[1:])).norm(dim=-1)
    return {"constraint": (ConstraintLayer(8, 4), lambda f, x, h, i, ok: f(x, h, 1 + 0 * d(x, i), i, ok)),
            "egnn": (EGNNLayer(8, 4), lambda f, x, h, i, ok: f(x, h, i, ok)[0]),
            "signed": (IPABlock(IPARConfig(**c)), lambda f, x, h, i, ok: f(x, h, i, ok)[0]),
            "sigmoid": (IPABlock(IPARConfig(**c, moves="sigmoid")), lambda f, x, h, i, ok: f(x, h, i, ok)[0]),
            "flow": (Velocity(flow), lambda f, x, h, i, ok: x + f(torch.tensor(0.4), x, h, i, ok, ok.any(-1) | True))}


# ---- steps

@given(st.integers(0, 99), st.integers(5, 20), st.sampled_from(["constraint", "egnn", "signed", "sigmoid", "flow"]))
def test_steps_turn_and_shift_and_reorder_with_their_input(seed, n, name):
    x, h, index, ok = cloud(seed, n)
    layer, call = steps()[name]
    layer, turn = layer.double(), turn_of(seed)
    out = call(layer, x, h, index, ok)
    assert torch.allclose(call(layer, x @ turn + 7, h, index, ok), out @ turn + 7, atol=1e-9)
    order = torch.randperm(n, generator=rng(seed))
    lists = candidate_edges(h[:, order], torch.ones(1, n, dtype=torch.bool), 3)
    assert torch.allclose(call(layer, x[:, order], h[:, order], *lists), out[:, order], atol=1e-9)


@given(st.integers(0, 99), st.integers(4, 20))
def test_positive_factors_only_contract(seed, n):
    x, h, index, ok = cloud(seed, n)
    weight = softmax_over(torch.randn(index.shape, generator=rng(seed)).double(), ok)
    closer = pulled(x, weight * torch.rand(index.shape, generator=rng(seed)).double(), index)
    assert torch.cdist(closer, closer).max() <= torch.cdist(x, x).max() + 1e-12
    assert (closer.amax(1) <= x.amax(1) + 1e-12).all() and (closer.amin(1) >= x.amin(1) - 1e-12).all()
    assert torch.cdist(apart := pulled(x, -weight, index), apart).max() > torch.cdist(closer, closer).max()


# ---- lengths

@given(st.integers(0, 99), st.sampled_from([LengthHead, PairHead]))
def test_heads_know_no_order_of_a_pair(seed, kind):
    torch.manual_seed(seed)
    head, a, b = kind(6, 4), torch.randn(9, 6), torch.randn(9, 6)
    assert all(torch.allclose(u, v, atol=1e-6) for u, v in zip(head(a, b), head(b, a)))


def test_noise_of_lengths_is_symmetric_and_does_not_see_padding():
    H, mask = torch.randn(2, 20, 4, generator=rng()), torch.ones(2, 20, dtype=torch.bool)
    index, ok = candidate_edges(H, mask, 3)
    e = on_edges(edge_noise(index, ok, rng(), H), index, ok)
    assert torch.equal(e, e.transpose(1, 2)) and 0.8 < e[e != 0].std() < 1.2
    wide, real = torch.cat([H, torch.full((2, 4, 4), 3.0)], 1), torch.arange(24).expand(2, -1) < 20
    lists = candidate_edges(wide, real, 3)
    assert torch.equal(on_edges(edge_noise(*lists, rng(), H), *lists)[:, :20, :20], e)


@given(st.floats(0.05, 2))
def test_the_best_spread_is_the_error(error):
    spread = torch.linspace(0.02, 3, 2981)
    mean = torch.tensor(1.0)
    best = spread[likelihood(mean, spread, torch.nn.functional.softplus(mean) + error).argmin()]
    assert best.item() == pytest.approx(error, abs=2e-3)


@pytest.mark.parametrize("model", [lambda: ConstraintEGNN(8, ConstraintEGNNConfig(layers=1)), lambda: EGNNDist(8, EGNNDistConfig(layers=1))])
def test_lengths_are_said_on_symmetric_edges_with_an_uncertainty_and_are_those_of_the_places_elsewhere(model):
    torch.manual_seed(0)
    out = model().eval()(torch.randn(2, 30, 8), None, rng())
    known, D, places = out.uncertainty.isfinite(), out.distances, torch.cdist(out.X, out.X)
    assert torch.equal(known, known.transpose(1, 2)) and 0.1 < known.float().mean() < 1 and not known.diagonal(dim1=1, dim2=2).any()
    assert torch.allclose(D, D.transpose(1, 2), atol=1e-5) and torch.allclose(D[~known], places[~known]) and not torch.allclose(D[known], places[known])
    assert (D[known] > 0).all() and (out.uncertainty[known] > 0).all()


# ---- flow

@given(st.floats(0.1, 3), st.integers(2, 20))
def test_the_quadratic_energy_decays_as_the_formula_says(rate, steps):
    x0 = torch.ones(1, 2, 2).double()
    times = torch.linspace(0, 1, steps + 1).double()
    E = lambda method: [x.square().sum().item() / 4 for x in odeint(lambda t, x: -rate * x, x0, times, method=method)]
    assert E("euler")[-1] == pytest.approx((1 - rate / steps) ** (2 * steps), abs=1e-9)
    if steps > 2 * rate:
        assert E("rk4") == pytest.approx([math.exp(-2 * rate * t) for t in times], abs=2e-3)


def test_descent_points_down_and_is_at_right_angles_to_the_gauge():
    X = gauge_fix(torch.randn(1, 60, 2, generator=rng()).double())
    targets = build_targets(gauge_fix(torch.rand(1, 60, 2, generator=rng(1))))
    down, E = downhill(X, targets), lambda X: energy(X, targets, form="ratio").total.item()
    assert E(X) - E(X + 1e-6 * down) == pytest.approx(1e-6 * down.square().sum().item(), rel=0.02)
    assert down.sum(1).abs().max() < 1e-6 and abs((down * X).sum()) < 1e-5                      # shift and scale
    assert abs((down @ torch.tensor([[0.0, 1], [-1, 0]]).double() * X).sum()) < 1e-5            # turn
    assert misalignment(down, -2 * down).item() == pytest.approx(2)


def test_a_flow_with_diffusion_differs_along_the_way_and_needs_euler():
    torch.manual_seed(0)
    calm, stirred = (GradientFlow(8, GradientFlowConfig(start=0.0, steps=4, diffusion=s)).eval() for s in (0.0, 0.5))
    stirred.load_state_dict(calm.state_dict())
    H, mask = torch.randn(1, 20, 8), torch.ones(1, 20, dtype=torch.bool)
    assert not calm.stochastic and stirred.stochastic and torch.equal(calm(H, None, rng(0)).X, calm(H, None, rng(1)).X)
    a, b = (stirred.flow(H, mask, rng(s))[0] for s in (0, 1))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    with pytest.raises(InputError, match="rk4 with a diffusion of 0.5"):
        GradientFlowConfig(diffusion=0.5, method="rk4")


def test_checkpoints_begin_and_end_the_flow():
    marks = lambda **own: GradientFlow(4, GradientFlowConfig(**own)).checkpoints()
    assert (marks(steps=8, watched=4), marks(steps=8, watched=3), marks(steps=2, watched=9)) == ([0, 2, 4, 6, 8], [0, 3, 5, 8], [0, 1, 2])


@pytest.mark.parametrize("name", ["constraint", "egnn", "signed", "flow"])
def test_a_stack_of_steps_is_exact_for_turns_mirrors_and_shifts(name):
    x, h, index, ok = cloud(3, 15)
    torch.manual_seed(0)
    layers = [steps()[name] for _ in range(5)]

    def run(x):
        for layer, call in layers:
            x = call(layer.double(), x, h, index, ok)
        return x
    out = run(x)
    for Q in (turn_of(1), turn_of(1) @ torch.diag(torch.tensor([1.0, -1])).double()):
        assert torch.allclose(run(x @ Q + 7), out @ Q + 7, atol=1e-9 * max(1, out.abs().max().item()))


# ---- operator

@given(st.integers(0, 99), st.integers(3, 15))
def test_symmetric_weights_are_in_balance(seed, n):
    W = torch.rand(1, n, n, generator=rng(seed)).double() + 0.1
    W = W + W.transpose(1, 2)
    share = stationary(T := W / W.sum(-1, keepdim=True), 300)
    assert torch.allclose(share, W.sum(-1) / W.sum(), atol=1e-6) and imbalance(T, share) < 1e-10


@given(st.integers(0, 99), st.floats(0, 1))
def test_collapse_is_balanced_and_seen_by_the_distance_of_rows_from_pi(seed, a):
    W = torch.rand(1, 10, 10, generator=rng(seed)).double() + 0.1
    T = (W + W.transpose(1, 2)) / (W + W.transpose(1, 2)).sum(-1, keepdim=True)
    pi = stationary(T, 300)
    mixed = (1 - a) * T + a * pi[:, None]
    away = lambda T: float((T - stationary(T, 300)[:, None]).abs().sum())
    assert away(mixed) == pytest.approx((1 - a) * away(T), abs=1e-6) and imbalance(mixed, stationary(mixed, 300)) < 1e-10  # the balance loss is blind to it
    rows = row_entropy(pi[:, None].expand(-1, 10, -1))
    assert torch.allclose(rows, rows[:, :1].expand_as(rows))


def test_a_ring_goes_round():
    ring = torch.roll(torch.eye(5), 1, 1)[None]
    assert imbalance(ring, stationary(ring)).item() == pytest.approx(2) and row_entropy(ring).abs().max() < 1e-6


def test_the_operator_stands_on_neighbours_in_expression_and_noise_is_asked_for():
    torch.manual_seed(0)
    model, H = OpNet(8, OpNetConfig(neighbours=4)).eval(), torch.randn(1, 25, 8)
    T = model(H).operator
    index, ok = candidate_edges(H, torch.ones(1, 25, dtype=torch.bool), 4)
    assert torch.allclose(T.sum(-1), torch.ones(1, 25)) and torch.equal((T > 0).sum(-1), ok.sum(-1)) and not model.stochastic
    conform(type("Noisy", (OpNet,), {"build": classmethod(lambda cls, dim_in, run: cls(dim_in, OpNetConfig(noise=0.5))), "__module__": __name__}))


# ---- recycling

def test_passes_are_weighed_to_one_and_views_are_compared_where_there_are_pairs():
    assert sum(pass_weights(5)) == pytest.approx(1) and pass_weights(2) == [1 / 3, 2 / 3]
    c = profile("smoke", **{"structure.model": {"name": "ipa-r", "settings": TINY["ipa-r"]}, "structure.miniset": 40, "structure.batch": 4, "progress": False})
    run, slides = Run(c.structure, c.targets), toy_slides()
    model = IPAR.build(16, run)
    layout, refine = model.stages(run)
    told = [stage.turns(model, next(iter(stage.batches(slides, run, rng()))), 0, rng()) for stage in (layout, refine)]
    assert "overlap" not in told[0] and told[1]["overlap"] > 0
    H, pairs = next(iter(paired_batches(slides, run, rng())))
    assert H.shape[0] == 4 and model.losses(H, pairs, None, rng())["overlap"].requires_grad


def test_a_record_holds_what_was_attended_to_also_along_true_edges_and_with_padding():
    torch.manual_seed(0)
    model, H = IPAR(8, IPARConfig(recycles=2, blocks=1)).train(), torch.randn(2, 30, 8)
    mask = torch.arange(30) < torch.tensor([[30], [22]])
    told = model.explain(H, mask)
    assert model.training and [t.n for t in told] == [30, 22] and all(t.graph == "H-gate" and set(t.terms) == {"qk", "pair", "geo"} for t in told)
    assert torch.allclose(torch.from_numpy(told[1].x[-1]), model.eval()(H, mask, rng(0)).X[1, :22], atol=1e-5)
    near = torch.cdist(H, H) < 2
    true = model.explain(H, edges=near | near.transpose(1, 2))
    assert true[0].graph == "T-edge" and len(true[0].row) == int((near[0] | near[0].T).sum())


# ---- settings, and the whole road

@pytest.mark.parametrize("kind, wrong, told", [
    (IPARConfig, {"width": 30}, "30 columns cannot be cut into 4 heads"), (IPARConfig, {"moves": "wild"}, "moves"), (GradientFlowConfig, {"steps": 0}, "steps"),
    (EGNNDistConfig, {"start": "zero"}, "start"), (OpNetConfig, {"noise": -1.0}, "noise"), (ConstraintEGNNConfig, {"layer": 3}, "did you mean 'layers'")])
def test_wrong_settings_are_one_line(kind, wrong, told):
    with pytest.raises(InputError, match=told):
        from_dict(wrong, kind)


def test_starting_from_noise_is_a_sampler():
    conform(type("FromNoise", (EGNNDist,), {"build": classmethod(lambda cls, dim_in, run: cls(dim_in, EGNNDistConfig(start="noise", layers=2))), "__module__": __name__}))


def test_an_exam_is_the_same_every_time():
    slide = toy_slides()[1]
    assert torch.equal(examined(slide, 2, 40)[0], examined(slide, 2, 40)[0]) and chance(examined(slide, 2, 40)) > 0.5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generators_c")
    for name, table in zip("abq", simulate("tiny", seed=0).slides):
        table.write_h5ad(folder / f"{name}.h5ad")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_gears_reconstructs_with_it(name, files, tmp_path, capsys):
    "From the command line, in the smoke profile: trained, placed, saved; loaded again it says the same."
    path = lambda x: str(files / f"{x}.h5ad")
    own = [f"structure.model.settings.{k}={v}" for k, v in TINY[name].items()]
    code = main(["reconstruct", "--slides", path("a"), path("b"), "--cells", path("q"), "--out", str(tmp_path / "r.h5ad"), "--profile", "smoke", "--quiet", "--model-dir",
                 str(tmp_path / "m"), "--model-kind", name, "--set", "structure.guess_epochs=1", "structure.epochs=1", "structure.minisets_per_epoch=4",
                 "structure.miniset=48", "encoder.epochs=1", *own])
    assert code == 0 and "cells placed" in capsys.readouterr().out
    made = Gears.load(tmp_path / "m")
    assert made.config.structure.model.name == name and made.config.structure.model.settings == TINY[name]
