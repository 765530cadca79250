"""Operator first, latent distances, Wasserstein flow: decoders and solvers against closed forms, gradients, settings; the whole road by the command line."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.generators import latent_distances, operator_first, wasserstein_flow
from gears_nb.generators.latent_distances import LatentDistances, solved
from gears_nb.generators.operator_first import OperatorFirst, descended, diffused, drawn_from_landmarks, orthogonal, path_lengths, plane_modes, spectral_places
from gears_nb.generators.wasserstein_flow import FreeEnergy, WassersteinFlow, heated, proximal, sinkhorn_pull, transport
from gears_nb.geometry.gauge import gauge_fix, procrustes
from gears_nb.geometry.mds import landmark_mds
from gears_nb.models.batches import Run
from gears_nb.models.catalogue import model_class
from gears_nb.models.conformance import conform, toy_slides
from gears_nb.models.trace import AttentionTrace
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.settings import profile
from gears_nb.runs.cli import main

TINY = {"width": 16, "heads": 2, "points": 4}
NAMES = {"operator-first": {**TINY, "latent": 3}, "latent-distances": {**TINY, "latent": 3}, "wasserstein-flow": {**TINY, "jko": 3, "inner": 2}}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def run_of(name, **own):
    c = profile("smoke", progress=False, **{"structure.model": {"name": name, "settings": {**NAMES[name], **own}}, "structure.miniset": 40, "structure.batch": 2})
    return Run(c.structure, c.targets)


def built(name, **own):
    torch.manual_seed(0)
    return model_class(name).build(16, run_of(name, **own))


def weights(n, seed):
    "Connected symmetric weights over `n` points, `(1, n, n)`."
    x = torch.randn(1, n, 2, generator=rng(seed)).double()
    return (-torch.cdist(x, x).square()).exp() * (1 - torch.eye(n)) + 1e-3 * (1 - torch.eye(n))


# ---- modes of the plane

@given(st.integers(0, 99), st.integers(5, 12))
def test_modes_are_those_of_eigh_and_the_gradient_is_its_own_where_that_is_defined(seed, n):
    W, pull = weights(n, seed), torch.rand(n, n, generator=rng(seed)).double()
    loss = lambda X: (pull * torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist").square()).sum()
    L = (torch.eye(n).double() - W / n).requires_grad_()
    mine, lam = plane_modes(L, 1)
    value, V = torch.linalg.eigh(L)
    theirs = V[..., 1:3] / value[:, None, 1:3].sqrt()
    assert torch.allclose(loss(mine), loss(theirs)) and torch.allclose(lam, value)
    a, = torch.autograd.grad(loss(mine) + lam[:, 3].sum(), L)
    b, = torch.autograd.grad(loss(theirs) + value[:, 3].sum(), L)
    gaps = value.diff()[0]
    if gaps[0] > 0.05 and gaps[2] > 0.05 and gaps[1] > 1e-3:
        sym = lambda g: (g + g.transpose(1, 2)) / 2
        assert torch.allclose(sym(a), sym(b), rtol=2e-3, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("n", [4, 8, 12])
def test_equal_eigenvalues_have_a_finite_gradient_that_is_right(n):
    ring = torch.diag(torch.ones(n - 1), 1)
    ring[0, -1] = 1
    W = (ring + ring.T)[None].double().requires_grad_()
    mask, probe = torch.ones(1, n, dtype=torch.bool), torch.rand(1, n, n, generator=rng(1)).double()

    def loss(W):
        X = gauge_fix(spectral_places((W + W.transpose(1, 2)) / 2, mask)[0])
        return (torch.linalg.norm(X - X.roll(1, 1), dim=-1) - torch.arange(n) / n).square().sum()
    grad, = torch.autograd.grad(loss(W), W)
    with torch.no_grad():
        slope = (loss(W + 1e-5 * probe) - loss(W - 1e-5 * probe)) / 2e-5
    assert torch.isfinite(grad).all() and float((grad * probe).sum()) == pytest.approx(float(slope), rel=1e-3, abs=1e-5)


@given(st.integers(0, 99), st.integers(0, 5))
def test_places_do_not_see_padding_and_survive_nothing_to_see(seed, more):
    W = weights(10, seed)
    wide = torch.nn.functional.pad(W, (0, more, 0, more))
    mask = torch.arange(10 + more)[None] < 10
    a, b = spectral_places(W, mask[:, :10])[0], spectral_places(wide, mask)[0]
    assert torch.allclose(a, b[:, :10], atol=1e-7) and b[:, 10:].abs().sum() == 0
    flat = torch.zeros(1, 6, 6).requires_grad_()
    X, _ = plane_modes(flat, 4)
    X.sum().backward()
    assert torch.isfinite(X).all() and torch.isfinite(flat.grad).all()


def test_slow_modes_of_a_chain_are_cosines():
    n = 15
    chain = torch.diag(torch.ones(n - 1), 1)
    X, lam = spectral_places((chain + chain.T)[None].double(), torch.ones(1, n, dtype=torch.bool))
    for k in (1, 2):
        wave = torch.cos(k * torch.pi * torch.arange(n).double() / (n - 1))
        assert torch.allclose((X[0, :, k - 1] / X[0, 0, k - 1]), wave, atol=1e-8) and float(lam[0, k]) == pytest.approx(1 - float(torch.cos(torch.tensor(k * torch.pi / (n - 1)))))


# ---- the other decoders

@given(st.integers(0, 50))
def test_paths_are_dijkstras_and_gradients_count_their_edges(seed):
    from scipy.sparse.csgraph import shortest_path
    W = weights(9, seed)
    edges = W > torch.quantile(W, 0.6)
    edges = edges | torch.diag(torch.ones(8), 1).bool() | torch.diag(torch.ones(8), -1).bool()
    lengths = torch.where(edges, 1 / W.clamp(min=1e-3), 0.0).requires_grad_()
    D = path_lengths(lengths, edges, torch.tensor([[0, 4]]))
    assert torch.allclose(D[0].detach(), torch.from_numpy(shortest_path(lengths[0].detach().numpy(), indices=[0, 4])))
    grad, = torch.autograd.grad(D.sum(), lengths)
    assert torch.allclose((grad * lengths).sum(), D.sum())  # lengths are linear on fixed paths


def test_diffusion_finds_the_slow_plane_and_descent_the_points():
    whole, n = torch.ones(1, 40, dtype=torch.bool), 40
    x = torch.stack([torch.arange(n) % 8, 1.3 * (torch.arange(n) // 8)], -1).double()[None]
    W = (-torch.cdist(x, x).square()).exp() * (1 - torch.eye(n))
    T = W / W.sum(-1, keepdim=True)
    far = orthogonal(diffused((T + torch.eye(n)) / 2, torch.randn(1, n, 2, generator=rng()).double(), whole, 200))
    psi = orthogonal(gauge_fix(spectral_places(W, whole)[0]))
    assert procrustes(gauge_fix(far), gauge_fix(psi)).error.item() < 0.05
    X = torch.randn(1, 40, 2, generator=rng(1)).double()
    marks = torch.arange(6)[None]
    D = torch.cdist(X[:, :6], X)
    noisy = (D * (1 + 0.1 * torch.randn(D.shape, generator=rng(2)))).requires_grad_()
    got = drawn_from_landmarks(noisy, marks, torch.ones(1, 6, dtype=torch.bool), whole)
    assert procrustes(got.detach(), X, scale=True).error.item() < 0.3
    grad, = torch.autograd.grad(got.square().sum(), noisy)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0
    ends = torch.combinations(torch.arange(40))[None]
    assert torch.allclose(descended(X, ends, (X[:, ends[0, :, 0]] - X[:, ends[0, :, 1]]).square().sum(-1).add(1e-4).sqrt(), torch.ones(1, 780, dtype=torch.bool)), X, atol=1e-9)


@pytest.mark.parametrize("long, wide, ok", [(10, 10, True), (24, 4, False)])
def test_the_spectral_decoder_recovers_a_grid_unless_the_second_wave_along_is_slower_than_the_first_across(long, wide, ok):
    x = torch.cartesian_prod(torch.arange(float(long)), torch.arange(float(wide)))[None].double()
    W = (-torch.cdist(x, x).square()).exp() * (1 - torch.eye(long * wide))
    X, lam = spectral_places(W, torch.ones(1, long * wide, dtype=torch.bool))
    truth, renamed = gauge_fix(x), torch.randperm(long * wide, generator=rng())
    error = procrustes(gauge_fix(X), truth).error.item()
    assert (error < 0.2) == ok and procrustes(gauge_fix(X[:, renamed]), truth).error.item() > 1
    assert (abs(lam[0, 2] / lam[0, 1] - 1) < 1e-6) == ok and (ok or 3.8 < lam[0, 2] / lam[0, 1] < 4)  # equal on a square; on the strip the same wave, twice as short


# ---- the solver of lengths

@given(st.integers(0, 99), st.integers(3, 7))
def test_true_lengths_are_solved_exactly_and_wrong_ones_have_a_finite_gradient(seed, m):
    X, whole = torch.randn(1, 12, 2, generator=rng(seed)).double(), torch.ones(1, 12, dtype=torch.bool)
    marks, ok = torch.arange(m)[None], torch.ones(1, m, dtype=torch.bool)
    D = torch.cdist(X[:, :m], X)
    got, lam = solved(D, marks, ok, whole)
    if float(lam[0, -2] / lam[0, -1]) > 2e-3:
        assert torch.allclose(torch.cdist(got, got), torch.cdist(X, X), atol=1e-6)
        assert torch.allclose(torch.cdist(landmark_mds(D, marks, ok), got), torch.cdist(got, got), atol=1e-6) or procrustes(landmark_mds(D, marks, ok), got).error < 1e-6
    wrong = torch.rand(1, m, 12, generator=rng(seed)).double().requires_grad_()
    out, _ = solved(wrong, marks, ok, whole)
    grad, = torch.autograd.grad((out - out.roll(1, 1)).square().sum(), wrong)
    assert torch.isfinite(out).all() and torch.isfinite(grad).all()


def test_lengths_are_symmetric_and_belong_to_pairs():
    model = built("latent-distances").double().eval()
    H, mask = torch.randn(2, 30, 16, generator=rng()).double(), torch.arange(30) < torch.tensor([[30], [21]])
    with torch.no_grad():
        a = model.lengths(H, mask, rng(1))
        D, out = a.matrix(30), model(H, mask, rng(1))
    assert torch.equal(D, D.transpose(1, 2)) and D[~mask].abs().max() == 0 and (a.spread > 0).all()
    assert (D.gather(1, a.marks[..., None].expand(-1, -1, 30)) > 0).sum() == sum(int(o.sum()) * (int(m.sum()) - 1) for o, m in zip(a.marks_ok, mask))
    assert torch.equal(out.distances, out.distances.transpose(1, 2)) and (out.uncertainty[mask] > 0).all() and out.uncertainty[~mask].abs().max() == 0


# ---- flow

@given(st.floats(0.05, 5), st.integers(0, 20))
def test_steps_contract_a_bowl_and_heat_widens_a_gaussian(tau, seed):
    x = torch.randn(1, 5, 2, generator=rng(seed)).double()
    assert torch.allclose(proximal(x, lambda y: y, tau, 200, 1 / (1 + tau)), x / (1 + tau), atol=1e-9)
    assert torch.allclose(proximal(x, lambda y: y, tau, 1), (1 - tau) * x)
    xi = torch.randn(1, 50_000, 1, generator=rng(seed))
    assert float(heated(0 * xi, 0.3, tau, xi).var()) == pytest.approx(0.6 * tau, rel=0.05)


@given(st.integers(0, 99), st.floats(0.05, 20))
def test_a_step_pays_for_its_way(seed, tau):
    n, g = 10, rng(seed)
    mask = torch.arange(13)[None] < n
    free = FreeEnergy(torch.combinations(torch.arange(n))[None], torch.rand(1, 45, generator=g) < 0.6, torch.rand(1, 45, generator=g).double(), 0.3 + torch.rand(1, 45, generator=g).double(),
                      mask, 0.2, 0.3)
    X = torch.where(mask[..., None], torch.randn(1, 13, 2, generator=g).double(), 0.0).requires_grad_()
    grad, = torch.autograd.grad(free.value(X).sum(), X)
    assert torch.allclose(free.force(X), n * grad, atol=1e-9) and grad[0, n:].abs().max() == 0
    turn = torch.linalg.qr(torch.randn(2, 2, generator=g).double())[0]
    assert torch.allclose(free.value(X @ turn + 3), free.value(X)) and torch.allclose(free.force(X @ turn + 3)[:, :n], (free.force(X) @ turn)[:, :n], atol=1e-9)
    Y = proximal(X, free.force, tau, 6, free.rate(tau))
    assert free.value(Y) + (Y - X).square().sum() / (2 * tau * n) <= free.value(X) + 1e-12


@given(st.integers(0, 49), st.floats(0.05, 20))
def test_a_path_of_steps_never_rises_where_an_explicit_one_may(seed, tau):
    n, g = 12, rng(seed)
    free = FreeEnergy(torch.combinations(torch.arange(n))[None], torch.ones(1, 66, dtype=torch.bool), torch.rand(1, 66, generator=g).double() + 0.1,
                      0.3 + torch.rand(1, 66, generator=g).double(), torch.ones(1, n, dtype=torch.bool))
    X = Z = torch.randn(1, n, 2, generator=g).double()
    for _ in range(6):
        Y = proximal(X, free.force, tau, 4, free.rate(tau))
        assert free.value(Y) + (Y - X).square().sum() / (2 * tau * n) <= free.value(X) + 1e-12
        X, Z = Y, proximal(Z, free.force, tau, 1)
    assert tau < 2 or free.value(Z) > free.value(X)  # a stiff explicit step overshoots


def test_names_and_no_names():
    pytest.importorskip("geomloss")
    x, h = torch.randn(1, 20, 2, generator=rng()), torch.randn(1, 20, 3, generator=rng(1))
    whole, order = torch.ones(1, 20, dtype=torch.bool), torch.randperm(20, generator=rng(2))
    assert transport(x[:, order], x, h, whole, 0.0, 0.01).item() < 1e-3 < transport(x[:, order], x, h, whole, 100.0, 0.01).item()
    wide = lambda a: torch.cat([a, 50 * torch.ones(1, 4, a.shape[-1])], 1)
    mask = torch.arange(24)[None] < 20
    y = x + 0.1
    pull = sinkhorn_pull(h, whole, 1.0, 0.05)(y, x)
    assert torch.allclose(sinkhorn_pull(wide(h), mask, 1.0, 0.05)(wide(y), wide(x))[:, :20], pull, atol=1e-5)
    assert torch.allclose(pull.mean(1), torch.full((1, 2), 0.1), atol=1e-3)  # a shift costs its square, with or without names


# ---- contract and settings

@pytest.mark.parametrize("name, own", [("operator-first", {"decoder": "diffusion", "edge_noise": True}), ("operator-first", {"decoder": "descent", "steps": 5}),
                                       ("latent-distances", {"steps": 5})], ids=str)
def test_every_choice_meets_the_contract(name, own):
    conform(model_class(name), run_of(name, **own))


def test_the_gap_loss_of_the_source_looks_at_both_gaps():
    H, targets = next(iter(built("operator-first").batches()(toy_slides(), run_of("operator-first"), rng())))
    terms = {inner: built("operator-first", inner_gap=inner).losses(H, targets, rng=rng()) for inner in (False, True)}
    assert terms[True]["operator"] == terms[False]["operator"] and terms[True]["gap"] != terms[False]["gap"]
    assert (terms[True]["loss"] - terms[False]["loss"]).item() == pytest.approx(0.01 * (terms[True]["gap"] - terms[False]["gap"]).item(), abs=1e-6)


def test_the_sinkhorn_cost_learns_too():
    pytest.importorskip("geomloss")
    model, run = built("wasserstein-flow", names="sinkhorn", jko=2, inner=1), run_of("wasserstein-flow")
    H, targets = next(iter(model.batches()(toy_slides(), run, rng())))
    terms = model.losses(H, targets, rng=rng())
    terms["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None) and torch.isfinite(terms["loss"])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_noise_is_carried_along_with_the_cells(name, monkeypatch):
    "With the noise of every cell given, another order of cells gives the same places in that order."
    model, order = built(name).double().eval(), torch.randperm(30, generator=rng(6))
    H = torch.randn(2, 30, 16, generator=rng(7)).double()

    def answer(H, rows):
        g = rng(5)
        for module in (operator_first, latent_distances, wasserstein_flow):
            monkeypatch.setattr(module, "cell_noise", lambda mask, width, rng, like: torch.randn(2, 30, width, generator=g).double()[:, rows])
        with torch.no_grad():
            return model(H)
    a, b = answer(H, torch.arange(30)), answer(H[:, order], order)
    assert torch.allclose(a.X[:, order], b.X, atol=1e-6)


@pytest.mark.parametrize("name", ["operator-first", "wasserstein-flow"])
def test_what_is_told_is_a_walk_of_the_model(name):
    model, mask = built(name).eval(), torch.arange(20) < torch.tensor([[20], [15]])
    told = model.explain(torch.randn(2, 20, 16, generator=rng()), mask)
    assert [type(t) for t in told] == [AttentionTrace] * 2 and [t.n for t in told] == [20, 15]
    for t in told:
        assert torch.allclose(torch.zeros(t.n).index_add(0, torch.from_numpy(t.row).long(), torch.from_numpy(t.attention[0, 0])), torch.ones(t.n), atol=1e-5)


def test_settings_are_checked():
    for name, wrong in (("operator-first", {"decoder": "spectrum"}), ("operator-first", {"tie": 0.0}), ("latent-distances", {"nll": -1.0}), ("wasserstein-flow", {"tau": 0.0}),
                        ("wasserstein-flow", {"names": "lost"}), ("wasserstein-flow", {"jkoo": 3})):
        with pytest.raises(InputError):
            built(name, **wrong)


@pytest.mark.parametrize("kind", [OperatorFirst, LatentDistances, WassersteinFlow])
def test_cells_that_are_all_alike_are_placed_without_nan(kind):
    name = next(n for n in NAMES if model_class(n) is kind)
    model, H = built(name).eval(), torch.ones(1, 12, 16)
    with torch.no_grad():
        assert torch.isfinite(model(H, None, rng()).X).all()


# ---- the whole road

@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for letter, table in zip("abq", simulate("tiny", seed=0).slides):
        table.write_h5ad(folder / f"{letter}.h5ad")
    return folder


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_command_line_places_cells_with_it(name, tables, monkeypatch, capsys):
    monkeypatch.chdir(tables)
    monkeypatch.setenv("GEARS_CACHE", str(tables / "cache"))
    small = [f"structure.model.settings.{k}={v}" for k, v in NAMES[name].items()]
    assert main(["reconstruct", "--slides", "a.h5ad", "b.h5ad", "--cells", "q.h5ad", "--out", f"{name}.h5ad", "--profile", "smoke", "--quiet", "--model-dir", name,
                 "--model-kind", name, "--set", "structure.epochs=1", "structure.minisets_per_epoch=8", *small]) == 0
    assert f"cells placed: {name}.h5ad" in capsys.readouterr().out
    assert Gears.load(tables / name).config.structure.model.name == name
