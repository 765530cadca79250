"""Set transformer and GEARS v2: order and padding, noise and its wrapping, frames, the curriculum; the whole road with a saved model."""
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from forks import command, forked
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.generators import gears_v2
from gears_nb.generators.gears_v2 import (GearsV2, GearsV2Config, Views, aligned, centred, draw_views, gram_loss, gram_target, heun, karras_levels, neighbour_losses,
                                          noise_cap, noise_levels, overlap_shape, preconditioning, principal_axes, scale_loss, score_weight, shared_rows)
from gears_nb.generators.set_transformer import ISAB, MAB, PMA, SAB
from gears_nb.geometry.gauge import gauge_fix, procrustes
from gears_nb.models.batches import Run
from gears_nb.models.conformance import conform, toy_slides
from gears_nb.models.fit import fit_member
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.settings import profile
from gears_nb.runs.cli import main

TINY = {"width": 16, "inducing": 4, "heads": 2, "context_depth": 1, "base_depth": 1, "denoiser_depth": 1, "dims": 6, "steps": 4}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def smoke(**own):
    return profile("smoke", progress=False, **{"structure.model": {"name": "gears-v2", "settings": {**TINY, **own}}, "structure.miniset": 48, "structure.batch": 2,
                                               "structure.minisets_per_epoch": 4, "structure.guess_epochs": 2, "structure.epochs": 2})


def tiny_model(**own):
    torch.manual_seed(0)
    c = smoke(**own)
    return GearsV2.build(16, Run(c.structure, c.targets)), Run(c.structure, c.targets)


# ---- set transformer

@given(st.integers(0, 99), st.integers(2, 9), st.integers(0, 5), st.sampled_from(["pre", "post"]), st.sampled_from([SAB, ISAB]))
def test_blocks_know_no_order_and_no_padding(seed, n, more, norm, kind):
    torch.manual_seed(seed)
    block, x, order = kind(8, heads=2, norm=norm).double(), torch.randn(2, n, 8).double(), torch.randperm(n)
    wide, mask = torch.cat([x, 1e5 * torch.randn(2, more, 8).double()], 1), (torch.arange(n + more) < n).expand(2, -1)
    out = block(x)
    assert torch.allclose(block(x[:, order]), out[:, order], atol=1e-10) and torch.allclose(block(wide, mask)[:, :n], out, atol=1e-10)
    pool = PMA(8, heads=2, seeds=3, norm=norm).double()
    assert torch.allclose(pool(x[:, order]), pool(x), atol=1e-10) and torch.allclose(pool(wide, mask), pool(x), atol=1e-10)


def test_the_gradient_of_a_real_row_does_not_see_padding():
    torch.manual_seed(0)
    block, x = MAB(8, heads=2).double(), torch.randn(1, 6, 8).double().requires_grad_()
    block(x, x, torch.tensor([[True] * 4 + [False] * 2]))[:, :4].sum().backward()
    assert x.grad[:, 4:].abs().max() == 0 and x.grad[:, :4].abs().max() > 0


# ---- target and frame

@given(st.integers(0, 99))
def test_the_target_has_the_gram_matrix_of_the_places_and_is_turned_not_scaled(seed):
    P, mask = 9 + torch.randn(2, 12, 2, generator=rng(seed)).double(), torch.arange(12) < torch.tensor([[12], [7]])
    V, Y = gram_target(torch.where(mask[..., None], P, 1e6), mask, 5), centred(P, mask)
    assert torch.allclose(V @ V.transpose(1, 2), Y @ Y.transpose(1, 2), atol=1e-9) and V[~mask].abs().max() == 0
    al = aligned(V, base := centred(torch.randn(2, 12, 5, generator=rng(seed + 1)).double(), mask), mask)
    assert torch.allclose(al @ al.transpose(1, 2), V @ V.transpose(1, 2), atol=1e-9)
    turns = [torch.linalg.qr(torch.randn(5, 5, generator=rng(s)).double())[0] for s in range(20)]
    assert all((al - base).square().sum() <= (V @ Q - base).square().sum() + 1e-9 for Q in turns)
    assert torch.allclose(aligned(V @ turns[0], base, mask), al, atol=1e-8)  # whatever the factor, the same place


TRIANGLE = torch.tensor([[[0.0, 0], [3, 0], [0, 4]]]).double()  # sides 3, 4, 5
WHOLE = torch.ones(1, 3, dtype=torch.bool)


def test_the_gram_matrix_of_a_triangle():
    V = gram_target(TRIANGLE + 7, WHOLE, 4)
    G = (V @ V.transpose(1, 2))[0]
    assert torch.allclose(9 * G, torch.tensor([[25.0, -2, -23], [-2, 52, -50], [-23, -50, 73]]).double(), atol=1e-9)
    assert [round((G[i, i] + G[j, j] - 2 * G[i, j]).item(), 9) for i, j in ((0, 1), (0, 2), (1, 2))] == [9, 16, 25]
    assert V[..., 2:].abs().max() == 0 and V[0, :, 0].norm() > V[0, :, 1].norm() > 0


def test_a_mirrored_base_leaves_no_residual_and_a_large_one_is_not_scaled_away():
    V = gram_target(TRIANGLE, WHOLE, 2)
    mirrored = V * torch.tensor([1.0, -1]).double()
    angles = torch.linspace(0, 2 * torch.pi, 361).double()
    turns = torch.stack([torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)], -2)
    assert min((V[0] @ Q - mirrored[0]).square().sum() for Q in turns) > 0.5  # no turn does it
    assert torch.allclose(aligned(V, mirrored, WHOLE), mirrored, atol=1e-10)
    assert torch.allclose(aligned(V, 3 * mirrored, WHOLE) - 3 * mirrored, -2 * mirrored, atol=1e-10)


# ---- noise

@given(st.floats(1e-3, 1e2), st.floats(1e-2, 10))
def test_preconditioning_keeps_the_variance_of_input_and_target_at_one(s, sd):
    skip, out, into, noise = preconditioning(s := torch.tensor(s).double(), sd)
    assert into**2 * (s**2 + sd**2) == pytest.approx(1) and (1 - skip) ** 2 * sd**2 + skip**2 * s**2 == pytest.approx(out**2)
    assert score_weight(s, sd) * out**2 == pytest.approx(1) and noise == pytest.approx(s.log() / 4)


@pytest.mark.parametrize("sd", [0.05, 0.5, 2.0])
def test_without_noise_the_answer_is_the_input_and_in_noise_alone_it_is_the_network(sd):
    skip, out, into, _ = preconditioning(torch.tensor([1e-8, 1e8]).double(), sd)
    assert skip.tolist() == pytest.approx([1, 0], abs=1e-9) and out.tolist() == pytest.approx([0, sd], abs=1e-7)
    assert into[0] == pytest.approx(1 / sd) and into[1] * 1e8 == pytest.approx(1)


def test_levels_fall_to_zero_and_heun_is_exact_on_a_line():
    levels = karras_levels(0.02, 5, 18)
    assert len(levels) == 19 and levels[-1] == 0 and all(a > b for a, b in zip(levels, levels[1:])) and levels[0] == pytest.approx(5)
    assert karras_levels(0.02, 5, 1) == pytest.approx([5, 0])
    point = torch.tensor([[1.0, 2.0]]).double()
    assert torch.allclose(heun(lambda U, s, seen: point, 5 * torch.ones(1, 2).double(), levels), point)


def test_the_cap_rises_by_thirds_and_levels_fill_their_strata():
    caps = GearsV2Config().caps
    assert [noise_cap(d, caps) for d in (0, 0.2, 0.4, 0.6, 0.8, 1.0)] == [1, 1, 2.5, 2.5, 5, 5]
    s = noise_levels(16, 0.02, 5.0, rng(), torch.zeros(1))
    assert (s.diff() > 0).all() and 0.02 <= s[0] < s[-1] <= 5
    model, run = tiny_model()
    seen = []
    model.losses = lambda H, batch, mask, rng, epoch, *, done: seen.append(done)
    [stage] = GearsV2.stages(model, run)
    for epoch in range(stage.settings.epochs):
        stage.turns(model, (None, Views(torch.zeros(1), None, 0)), epoch, None)
    assert seen == sorted(seen) and 0 < seen[0] < 0.34 and 0.66 < seen[-1] < 1


# ---- views and losses

def test_views_share_their_first_rows_and_are_of_random_size():
    slide, c = toy_slides(n=150)[0], GearsV2Config()
    index, shared = draw_views(slide, 100, 2, rng(), c)
    assert index.shape == (4, 100) and shared == 32 and torch.equal(index[:2, :32], index[2:, :32])
    assert all(len(row.unique()) == 100 for row in index) and all(set(a.tolist()) != set(b.tolist()) for a, b in zip(index[:2], index[2:]))
    assert draw_views(slide, 148, 1, rng(), c)[1] == 37
    V = torch.randn(4, 100, 5, generator=rng()).double()
    other = torch.cat([V[:, :shared], 9 * torch.randn(4, 100 - shared, 5, generator=rng(1)).double()], 1)
    assert all(torch.equal(a, b) for a, b in zip(shared_rows(V, shared), shared_rows(other, shared)))  # the other rows have no say
    model, run = tiny_model(variant="intrinsic", smallest=0.5)
    batches = list(model.batches()([slide], run, rng()))
    assert all(24 <= H.shape[1] <= 48 and b.targets is not None for H, b in batches) and len({H.shape[1] for H, _ in batches}) > 1


def test_place_losses_are_blind_to_turns_and_zero_at_the_truth():
    mask = torch.ones(2, 30, dtype=torch.bool)
    W = centred(torch.randn(2, 30, 4, generator=rng()).double(), mask)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=rng(1)).double())[0]
    assert gram_loss(W @ Q, W).max() < 1e-12 and scale_loss(W @ Q, W).max() < 1e-12 and neighbour_losses(W @ Q, W, mask, 8)[1].max() < 1e-12
    assert torch.allclose(gram_loss(3 * W, W), torch.full((2,), 64.0).double()) and overlap_shape(*shared_rows(torch.cat([W, 5 * W @ Q]), 12)).max() < 1e-12


@pytest.mark.parametrize("own", [{}, {"mode": "plain"}, {"variant": "intrinsic"}, {"refiner": False}, {"samples": 3, "readout": "all"}], ids=str)
def test_losses_and_answers_do_not_see_padding(own):
    model, run = tiny_model(h_noise=0.0, h_dropout=0.0, **own)
    model.double().eval()
    H, batch = next(iter(model.batches()(toy_slides(), run, rng())))
    places, n = batch.places.double(), H.shape[1]
    garbage = lambda x: torch.cat([x.double(), 77 * torch.ones(*x.shape[:1], 5, x.shape[-1])], 1)
    mask = (torch.arange(n + 5) < n).expand(len(H), -1)
    short, long = Views(places, batch.mask, batch.shared, batch.targets), Views(garbage(places), mask, batch.shared, batch.targets)
    if own.get("variant") != "intrinsic":  # whose targets bring a padding of their own
        a, b = model.losses(H.double(), short, rng=rng()), model.losses(garbage(H), long, rng=rng())
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-8) for k in a)
    with torch.no_grad():
        a, b = model(H.double(), None, rng()), model(garbage(H), mask, rng())
    assert torch.allclose(a.X, b.X[:, :n], atol=1e-8) and b.X[:, n:].abs().max() == 0 and b.V[:, n:].abs().max() == 0
    assert (a.uncertainty is None) == ("samples" not in own) and (a.distances is None) == ("readout" not in own)


@pytest.mark.parametrize("own", [{}, {"mode": "plain"}, {"samples": 2, "readout": "all"}, {"refiner": False}], ids=str)
def test_the_answer_turns_with_the_order_of_the_cells(own, monkeypatch):
    "Noise belongs to a cell: where it is carried along, so is everything else."
    model, _ = tiny_model(**own)
    model.double().eval()
    drawn, order = torch.randn(4, 2, 30, 6, generator=rng(5)).double(), torch.randperm(30, generator=rng(6))

    def answer(H, rows):
        kept = iter(drawn)
        monkeypatch.setattr(gears_v2, "cell_noise", lambda mask, width, rng, like: next(kept)[:, rows])
        with torch.no_grad():
            return model(H)
    H = torch.randn(2, 30, 16, generator=rng(7)).double()
    a, b = answer(H, torch.arange(30)), answer(H[:, order], order)
    assert torch.allclose(a.X[:, order], b.X, atol=1e-7)
    if a.uncertainty is not None:
        assert torch.allclose(a.uncertainty[:, order], b.uncertainty, atol=1e-7) and torch.allclose(a.distances[:, order][:, :, order], b.distances, atol=1e-7)


def test_one_seed_one_answer_and_one_loss():
    model, run = tiny_model()
    H, batch = next(iter(model.batches()(toy_slides(), run, rng())))
    again, same = next(iter(model.batches()(toy_slides(), run, rng())))
    assert torch.equal(H, again) and torch.equal(batch.places, same.places)

    def told(seed):
        model.train()
        model.sd.fill_(0.2)  # it follows the data while training
        with torch.no_grad():
            loss = model.losses(H, batch, rng=rng(seed))["loss"]
            return loss, model.eval()(H, None, rng(seed)).X
    (loss, X), (repeated, X2), (other, X3) = told(0), told(0), told(1)
    assert loss == repeated and torch.equal(X, X2) and loss != other and not torch.equal(X, X3)


def test_uncertainty_is_how_far_draws_stray_from_their_mean():
    model, _ = tiny_model(samples=4)
    model.double().eval()
    H, mask = torch.randn(2, 30, 16, generator=rng()).double(), torch.arange(30) < torch.tensor([[30], [22]])
    with torch.no_grad():
        out = model(H, mask, rng(3))
        context, base = model.proposed(H, mask)
        same = rng(3)
        draws = torch.stack([model.sample(context, base, mask, same) for _ in range(4)])
    assert torch.allclose(out.V, draws.mean(0)) and out.uncertainty.shape == (2, 30)
    plane = out.V @ principal_axes(out.V)
    for b, n in enumerate(mask.sum(1)):
        unit = plane[b, :n].square().sum(-1).mean().sqrt()
        assert torch.allclose(out.uncertainty[b, :n], (draws[:, b, :n] - out.V[b, :n]).square().sum(-1).mean(0).sqrt() / unit)
    assert out.uncertainty[mask].min() > 0 and out.uncertainty[~mask].abs().max() == 0
    alone, _ = tiny_model(samples=4, refiner=False)
    assert alone.eval()(H.float(), mask, rng()).uncertainty is None


def test_directions_have_a_sign_and_distances_the_unit_of_x():
    V = torch.randn(2, 20, 6, generator=rng()).double() * torch.tensor([5, 3, 1, 1, 1, 1.0])
    axes = principal_axes(V - V.mean(1, keepdim=True))
    assert torch.allclose(axes.transpose(1, 2) @ axes, torch.eye(2).double().expand(2, -1, -1)) and (axes.abs().amax(1) == axes.amax(1)).all()
    model, _ = tiny_model(readout="all")
    out = model.eval()(torch.randn(1, 30, 16, generator=rng(1)), None, rng())
    flat = torch.cdist(out.X, out.X, compute_mode="donot_use_mm_for_euclid_dist")
    assert (out.distances + 1e-4 >= flat).all()  # a plane cannot be longer than the space around it


@pytest.mark.parametrize("own", [{"mode": "plain"}, {"variant": "intrinsic"}, {"refiner": False}, {"weights": {"overlap_scale": 0.1, "overlap_kl": 0.1}}], ids=str)
def test_every_choice_meets_the_contract(own):
    c = smoke(**own)
    conform(GearsV2, Run(dataclasses.replace(c.structure), c.targets))


def test_settings_that_do_not_fit_together_are_refused():
    for wrong in ({"width": 30, "heads": 4}, {"caps": ()}, {"caps": (2.0, 1.0)}, {"s_min": 1.0}, {"dims": 1}, {"variant": "gramm"}, {"weights": {"gram": -1.0}}):
        with pytest.raises(InputError):
            tiny_model(**wrong)


def test_training_lowers_the_error_and_follows_the_sigma():
    slides = toy_slides(n=120)
    c = profile("smoke", progress=False, **{"structure.model": {"name": "gears-v2", "settings": {**TINY, "refiner": True}}, "structure.miniset": 64, "structure.lr": 3e-3,
                                            "structure.minisets_per_epoch": 16, "structure.guess_epochs": 25, "structure.epochs": 2})
    model, histories = fit_member([slides[0].H.numpy()], [slides[0].coords.numpy()], c.structure, c.targets)
    rows = histories["refine"].rows
    assert rows[-1]["gen_align"] < rows[0]["gen_align"] / 3 and rows[-1]["sigma"] == pytest.approx(float(model.sd), rel=0.2) and float(model.sd) < 0.3
    with torch.no_grad():
        base, drawn = model.unrefined(slides[1].H[None]).X[0], model(slides[1].H[None], None, rng()).X[0]
    error = lambda x: procrustes(x, gauge_fix(slides[1].coords)).error.item()
    assert error(base) < 0.6 and error(drawn) < 0.8


# ---- the whole road

def test_gears_learns_places_saves_and_loads(tmp_path):
    *slides, query = simulate("tiny", seed=0).slides
    g = Gears(profile("smoke", progress=False), model={"name": "gears-v2", "settings": TINY}).fit(slides)
    assert isinstance(g.fitted.models[0], GearsV2) and g.config.structure.model.name == "gears-v2"
    X = g.reconstruct(query).obsm["X_gears"]
    assert X.shape == (query.n_obs, 2) and np.isfinite(X).any() and np.array_equal(X, g.reconstruct(query).obsm["X_gears"], equal_nan=True)
    g.save(tmp_path / "model")
    again = Gears.load(tmp_path / "model", {"progress": False})
    np.testing.assert_array_equal(again.reconstruct(query).obsm["X_gears"], X)
    assert torch.equal(again.fitted.models[0].sd, g.fitted.models[0].sd)


@forked
def test_the_command_line_takes_a_kind_of_model(tmp_path, monkeypatch, capsys):
    "A right name in a process of its own; a wrong one is one line and exit code 2, and nothing is written."
    for name, table in zip("abq", simulate("tiny", seed=0).slides):
        table.write_h5ad(tmp_path / f"{name}.h5ad")
    small = [f"structure.model.settings.{k}={v}" for k, v in TINY.items()]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path / "cache"))
    words = ["reconstruct", "--slides", "a.h5ad", "b.h5ad", "--cells", "q.h5ad", "--out", "r.h5ad", "--profile", "smoke", "--quiet",
             "--model-dir", "m", "--model-kind"]
    capsys.readouterr()
    assert main([*words, "gears_v3"]) == 2 and not (tmp_path / "r.h5ad").exists()
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and "did you mean 'gears-v2'" in said
    words += ["gears_v2", "--set", "structure.epochs=1", "structure.guess_epochs=1", *small]
    right = command(*words)
    assert right.returncode == 0 and "cells placed: r.h5ad" in right.stdout, right.stderr
    made = Gears.load(tmp_path / "m").config.structure.model
    assert (made.name, made.settings["dims"]) == ("gears-v2", 6)


def test_two_names_of_a_model_are_one_line(capsys):
    words = ["fit", "--slides", "a.h5ad", "--model", "m", "--model-kind", "d7", "--set"]
    assert main([*words, "structure.model=opnet"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and "--model-kind" in told and "opnet" in told
    address = ["fit", "--slides", "a.h5ad", "--model", "m", "--model-kind", "gears_nb.generators.opnet:OpNet"]
    assert main(address) == 2 and "a.h5ad" in capsys.readouterr().err  # an address keeps its underscores
    assert main([*words, "structure.model=d7"]) == 2 and "a.h5ad" in capsys.readouterr().err  # the same name twice: on to the files
