"""Settings, network, training, the `Perturb` object and the board: by loops and scipy, with poisoned test cells, killed and resumed, saved and read, with screens of hardly anything."""
from __future__ import annotations

import copy
import itertools
import os
import re
import signal
import warnings
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from forks import ended, forked, start
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from gears_nb.core.config import at_profile, from_dict, to_dict
from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.perturb import board, training
from gears_nb.perturb.board import by_method, contrasts
from gears_nb.perturb.descriptors import Descriptors
from gears_nb.perturb.network import Context, Facts, coexpressed, mlp, network
from gears_nb.perturb.perturb import Perturb, ask, fit_screen, load, predict, predicted, save, smallest_as_good
from gears_nb.perturb.prepare import deltas, partners
from gears_nb.perturb.screens import CONTROL, Conditions, Screen, conditions
from gears_nb.perturb.settings import PerturbConfig
from gears_nb.perturb.simulator import simulate_screen
from gears_nb.perturb.splits import split
from gears_nb.perturb.training import COUNT_WEIGHT, Dealer, counts_loss, terms, watched
from gears_nb.perturb.transport import energy_distance

seeds = st.integers(0, 10**6)
TINY = {"anchor": "both", "network.latent": 4, "network.hidden": 8, "network.context": 4, "network.modules": 2, "network.head": 3, "n_hvg": None}
ANCHOR = {"first.epochs": 0, "second.epochs": 0, "anchor": "genes"}
COLUMNS = ("cells", "perturbation", "dose", "line", "batch")
ASKED = Conditions(np.array(["line1", "line2", "line1"]), np.array(["drug01", "drug02", "drug03"]), np.array([100.0, 10000.0, 10000.0]))


def config(**changes) -> PerturbConfig:
    return at_profile(PerturbConfig, "smoke", **{"first.progress": False, "second.progress": False} | TINY | changes)


def new(seed: int = 0, **changes) -> Perturb:
    return Perturb(profile="smoke", seed=seed, progress=False, **TINY | changes)


def refused(call) -> InputError | None:
    "What a call is refused with, None if it works; any other error is a failure, told in a line."
    try:
        call()
    except InputError as error:
        assert "\n" not in str(error) and "Remedy" in str(error)
        return error
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}", pytrace=False)
    return None


def one_line(call, hint: str = ".") -> None:
    error = refused(call)
    assert error is not None and re.search(hint, str(error)), error


def bits(found) -> list[np.ndarray]:
    "All numbers of a fit."
    out, a, d = [np.float64(found.share)], found.anchor, found.describer
    out += [d.norm.columns, d.norm.mean, d.norm.spread, np.array(d.norm.dose_ends), d.basis.mean, d.basis.components, *d.lines.values()]
    out += [] if a is None else [a.left_out, a.taught.delta, a.taught.sampling, *(x for v in a.views for x in (v.variances, v.weights, v.basis))]
    return out + ([] if found.net is None else [v.numpy() for v in found.net.state_dict().values()])


def same(one, two) -> bool:
    a, b = bits(one), bits(two)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def moved(table) -> np.ndarray:
    return table.X - table.layers["control"]


def poisoned(screen: Screen, hidden: np.ndarray) -> Screen:
    "Other counts, doses, batches, perturbations and lines (of those that are there) in the cells of mask `hidden`."
    values = screen.values.toarray()
    values[hidden] = values[hidden][:, ::-1] * 7 + 3
    put = lambda name, value: np.where(hidden, value, getattr(screen, name))
    return replace(screen, values=sp.csr_matrix(values), dose=put("dose", 1e7), batch=put("batch", "another plate"), line=put("line", screen.line[0]), perturbation=put("perturbation", "another"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(seed=1, n_cells=300, n_genes=24, n_drugs=4, n_modules=3, n_lines=2, doses=(100.0, 10000.0))[0]


@pytest.fixture(scope="module")
def described():
    return Descriptors(np.array([f"drug{i:02d}" for i in range(1, 7)]), np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32))


@pytest.fixture(scope="module")
def whole(screen, described):
    "A fit with everything in it; all of the network is used."
    model = new(3, **{"network.counts": "zinb"}).fit(screen, descriptors=described)
    model._fitted = replace(model._fitted, share=1.0)
    return model


@pytest.fixture(scope="module")
def alone(screen):
    "The anchor alone."
    return new(**ANCHOR).fit(screen)


# settings


@pytest.mark.parametrize("name", ["smoke", "toy", "paper"])
def test_settings_survive_a_dictionary(name):
    own = at_profile(PerturbConfig, name)
    assert from_dict(to_dict(own), PerturbConfig) == own and own.profile == name and own.trains


@pytest.mark.parametrize("wrong", [{"anchor": "none", "first.epochs": 0, "second.epochs": 0}, {"loss.delta": 0.0, "loss.leading": 0.0, "loss.population": 0.0}, {"network.dropout": 1.5}, {"groups": 0}, {"anchor": "both of them"},
                                   {"network.refiner": "spline"}, {"loss.epsilon": 0.0}, {"netwrk.latent": 3}, {"n_hvg": 0}, {"loss.pairing": "best"}, {"loss.noise": float("nan")}])
def test_settings_that_cannot_be(wrong):
    one_line(lambda: at_profile(PerturbConfig, "smoke", **wrong))
    one_line(lambda: Perturb(profile="smoke", **wrong))


# network


def facts(rng, b=5, p=3, d=2, q=4) -> Facts:
    t = lambda a: torch.from_numpy(np.asarray(a, np.float32))
    return Facts(t(rng.integers(0, 2, (b, p))), t(rng.normal(size=(b, d))), t(rng.integers(0, 2, b)), t(rng.random(b)), t(rng.normal(size=(b, q))), torch.from_numpy(rng.integers(0, 3, b)))


def shaken(net, seed=0):
    "Nothing is zero any more."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return net.eval()


@given(seeds, st.booleans(), st.integers(0, 3), st.sampled_from(["flow", "residual", "none"]))
@torch.no_grad()
def test_decoder_by_loops(seed, see, modules, refiner):
    rng = np.random.default_rng(seed)
    net = shaken(network(6, 3, 2, 4, 2, config(**{"network.heads_see_context": see, "network.modules": modules, "network.refiner": refiner}).network, 1, np.arange(6) % modules if modules else None), seed)
    own, x = facts(rng), torch.from_numpy(rng.normal(size=(5, 6)).astype(np.float32))
    out, D = net(x, own), net.decoder
    context = net.context(own).numpy().astype(float)
    z = out.refined.numpy().astype(float)
    w = lambda a: a.detach().numpy().astype(float)
    for i in range(5):
        seen = np.r_[z[i], context[i]] if see else z[i]
        for j in range(6):
            value = w(D.everywhere.bias)[j] + w(D.everywhere.weight)[j] @ seen
            for m in range(modules):
                share = special.softmax(w(D.assign)[j])[m]
                gate = 2 * special.expit(w(D.gate.weight)[m] @ context[i] + w(D.gate.bias)[m])
                for h in range(D.head):
                    u = w(D.inside.weight)[m * D.head + h] @ seen + w(D.inside.bias)[m * D.head + h]
                    value += share * gate * u * stats.norm.cdf(u) * w(D.out)[m, h, j]
            assert np.isclose(value, float(out.delta[i, j]), atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_context_by_loops(rng):
    net, own = shaken(Context(3, 2, 4, 4, 0.5)), facts(rng)
    table, describe = net.table.numpy(), net.describe.weight.numpy()
    wanted = [sum(own.parts[i, p].item() * table[p] for p in range(3)) + own.unknown[i].item() * table.mean(0) + describe @ own.descriptor[i].numpy() for i in range(5)]
    assert np.allclose(net.perturbation(own).numpy(), wanted, atol=1e-5)
    made = net.fuse(torch.cat([torch.tensor(np.array(wanted)), net.dose(own.dose[:, None])], 1))
    assert torch.allclose(net(own), made * (1 + torch.tanh(own.line @ net.line.weight.T + net.line.bias)), atol=1e-5)


@torch.no_grad()
def test_forgetting_moves_a_part_to_what_is_unknown(rng):
    net, own = Context(3, 0, 4, 4, 1.0).train(), facts(rng, d=0)
    assert torch.allclose(net.perturbation(own), (own.unknown + own.parts.sum(1))[:, None] * net.table.mean(0), atol=1e-6)
    both, own = Context(3, 2, 4, 4, 1.0).train(), facts(rng)
    assert torch.allclose(both.perturbation(own), own.unknown[:, None] * both.table.mean(0) + both.describe(own.descriptor), atol=1e-6)


@pytest.mark.parametrize("refiner", ["flow", "residual", "none"])
@torch.no_grad()
def test_an_untrained_network_adds_nothing_and_repeats(refiner, rng):
    net = network(6, 3, 2, 4, 2, config(**{"network.refiner": refiner}).network, 1).eval()
    own, x = facts(rng), torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    out = net(x, own, repeat=2)
    assert not out.delta.any() and torch.equal(out.z, out.refined) and not out.volume.any()
    shaken(net)
    rows = torch.arange(5).repeat_interleave(2)
    assert torch.allclose(net(x, own, repeat=2).delta, net(x, own.take(rows)).delta, atol=1e-6)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(net(x[order], own.take(rows[order])).delta, net(x, own.take(rows)).delta[order], atol=1e-5)


def test_weights_are_drawn_by_the_seed_alone():
    state = torch.random.get_rng_state()
    a, b, c = (network(6, 3, 2, 4, 2, config().network, s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and any(not torch.equal(v, c[k]) for k, v in a.items()) and torch.equal(state, torch.random.get_rng_state())


def test_coexpressed_finds_planted_modules(rng):
    from sklearn.metrics import adjusted_rand_score

    module = np.arange(30) % 3
    X = rng.normal(size=(200, 3))[:, module] + 0.3 * rng.normal(size=(200, 30))
    assert adjusted_rand_score(module, coexpressed(X, 3)) == 1 and np.array_equal(coexpressed(X, 3), coexpressed(X, 3)) and coexpressed(X[:, :2], 4).max() < 2


def test_layers_of_an_mlp():
    assert [type(part).__name__ for part in mlp([3, 4, 2])] == ["Linear", "LayerNorm", "GELU", "Dropout", "Linear"] and len(mlp([3, 2])) == 1


# training


@given(seeds, st.booleans())
def test_counts_loss_is_that_of_scipy(seed, zeros):
    rng = np.random.default_rng(seed)
    g, counts = 5, rng.poisson(2.0, (4, 5)).astype(np.float32)
    params = rng.normal(size=(4, (3 if zeros else 2) * g)).astype(np.float32)
    mean = special.softmax(params[:, :g].astype(float), 1) * counts.sum(1, keepdims=True)
    r = np.log1p(np.exp(params[:, g : 2 * g].astype(float))) + 1e-3
    p = stats.nbinom.pmf(counts, r, r / (r + mean))
    if zeros:
        pi = special.expit(params[:, 2 * g :].astype(float))
        p = pi * (counts == 0) + (1 - pi) * p
    found = float(counts_loss(torch.from_numpy(params), torch.from_numpy(counts), "zinb" if zeros else "nb"))
    assert np.isclose(found, -np.log(p).mean(), rtol=1e-3, atol=1e-4)


def test_counts_loss_of_an_empty_cell_and_of_many_counts_is_finite():
    params = torch.zeros(2, 6, requires_grad=True)
    for kind in ("nb", "zinb"):
        loss = counts_loss(params if kind == "zinb" else params[:, :4], torch.tensor([[0.0, 0.0], [1e6, 0.0]]), kind)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(params.grad).all()


@pytest.fixture(scope="module")
def dealt(screen, whole):
    "A dealer of all cells and what it was made of."
    describer, own = whole.fitted.describer, config(groups=3, cells=5)
    X, every = describer.norm.logged(screen), np.ones(screen.n, bool)
    found = deltas(screen, X, every, every)
    offset = np.random.default_rng(0).normal(size=found.delta.shape).astype(np.float32)
    return Dealer(screen, X, every, every, describer, found.delta, offset, own, screen.values), found, offset, X


def test_a_step_holds_cells_of_its_conditions_and_controls_of_their_lines_and_batches(screen, whole, dealt):
    dealer, found, offset, X = dealt
    norm, dense = whole.fitted.describer.norm, X.toarray()
    z = ((dense - norm.mean) / norm.spread).astype(np.float32)
    row = {v.tobytes(): i for i, v in enumerate(z)}
    table, rng, seen = found.conditions, np.random.default_rng(0), set()
    assert len(row) == screen.n and sum(dealer.size) == (~screen.control).sum() and len(dealer.size) == len(set(zip(conditions(screen, ~screen.control)[1], partners(screen, np.ones(screen.n, bool))[0][~screen.control])))
    for u in range(0, len(dealer.size), 3):
        step = dealer.step(np.arange(u, min(u + 3, len(dealer.size))), rng)
        for i in range(len(step.target)):
            treated, control = ([row[v.numpy().tobytes()] for v in side[i]] for side in (step.treated, step.control))
            (c,) = {(screen.line[t], screen.perturbation[t], screen.dose[t], screen.batch[t]) for t in treated}
            at = int(np.flatnonzero((table.line == c[0]) & (table.perturbation == c[1]) & (table.dose == c[2]))[0])
            seen.add(at)
            assert screen.control[control].all() and {(screen.line[b], screen.batch[b]) for b in control} == {(c[0], c[3])}
            assert np.allclose(step.target[i], found.delta[at] / norm.spread, atol=1e-5) and np.allclose(step.offset[i], offset[at] / norm.spread, atol=1e-5)
            assert np.array_equal(step.counts[i], screen.values[treated].toarray()) and step.facts.dose[i] == norm.dose([c[2]])[0]
            assert step.leads[i].sum() == 24 and int(step.facts.batch[i]) == 1 + int(np.flatnonzero(whole.fitted.describer.batches == c[3])[0])
    assert seen == set(range(len(table)))


def test_an_epoch_has_every_condition_before_one_comes_again(dealt):
    dealer = dealt[0]
    epoch = dealer.epoch(0, torch.Generator().manual_seed(0))
    steps = list(epoch)
    assert len(steps) == len(dealer) and all(len(s) == 1 and len(s[0].target) == 3 for s in steps)
    units = [u.numpy().tobytes() for s in steps for u in s[0].target]
    first = units[: len(dealer.size)]
    assert max(first.count(u) for u in first) <= 2  # units of two batches share a target
    again = list(dealer.epoch(0, torch.Generator().manual_seed(0)))
    assert all(torch.equal(a[0].treated, b[0].treated) for a, b in zip(steps, again))


def basis_of(model) -> torch.Tensor:
    d = model.fitted.describer
    return torch.from_numpy((d.basis.components * d.norm.spread).T.astype(np.float32))


@torch.no_grad()
def test_terms_by_hand(whole, dealt):
    own = config(**{"loss.noise": 0.0, "loss.masked": 0.0, "loss.leading": 0.7, "loss.population": 0.3, "network.counts": "zinb"})
    net, step, basis = shaken(copy.deepcopy(whole.fitted.net)), dealt[0].step(np.arange(3), np.random.default_rng(0)), basis_of(whole)
    found = terms(net, step, own, basis, False, 0)
    out = net(step.control.reshape(15, 24), step.facts, repeat=5)
    delta = out.delta.view(3, 5, 24) + step.offset[:, None]
    square = (delta.mean(1) - step.target).square()
    far = [2 * torch.cdist(a @ basis, b @ basis).mean() - torch.cdist(a @ basis, a @ basis).mean() - torch.cdist(b @ basis, b @ basis).mean() for a, b in zip(step.control + delta, step.treated)]
    unit = [torch.cdist(a @ basis, b @ basis).mean() for a, b in zip(step.control, step.treated)]
    wanted = {"delta": square.mean(), "leading": 0.7 * square[step.leads > 0].mean(), "population": 0.3 * torch.stack([f / u for f, u in zip(far, unit)]).mean(), "counts": COUNT_WEIGHT * counts_loss(out.counts, step.counts.view(15, 24), "zinb")}
    assert set(found) == {*wanted, "loss"} and all(np.isclose(float(found[k]), float(v), rtol=1e-3, atol=1e-4) for k, v in wanted.items())
    assert np.isclose(float(found["loss"]), float(sum(wanted.values())), rtol=1e-3)
    second = terms(net, step, own, basis, True, 0)
    assert set(second) - set(found) == {"volume", "cost", "refine"} and np.isclose(float(second["volume"]), 0.01 * float((out.volume / 4).square().mean()), rtol=1e-3)
    assert float(energy_distance(step.treated @ basis, step.treated @ basis).abs().max()) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"loss.match": "mmd"}, {"loss.match": "none"}, {"loss.pairing": "plan"}, {"loss.pairing": "random"}, {"network.counts": "zinb", "network.dropout": 0.3}])
def test_accumulation_and_checkpointing_give_the_plain_gradient(changes, whole, dealt):
    def gradients(checkpointing):
        own = config(**changes, checkpointing=checkpointing, accumulate=2)
        net = shaken(network(24, 4, whole.fitted.describer.descriptors.values.shape[1], 8, 2, own.network, 1)).train()
        rng = np.random.default_rng(0)
        steps = [dealt[0].step(np.arange(3 * i, 3 * i + 3), rng) for i in range(2)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = training._loss(own, basis_of(whole), True)(net, steps, 0, torch.Generator().manual_seed(5))
            loss["loss"].backward()
        return net, steps, own, loss, [p.grad for p in net.parameters()]

    net, steps, own, loss, plain = gradients(False)
    _, _, _, other, saved = gradients(True)
    assert float(loss["loss"].detach()) == float(other["loss"].detach()) and all((a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6)) for a, b in zip(plain, saved))
    net.zero_grad()
    many = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step, seed in zip(steps, many):
            (terms(net, step, own, basis_of(whole), True, seed)["loss"] / 2).backward()
    (own.loss.norm * sum(p.square().sum() for p in net.parameters())).backward()
    assert all(a is None or torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(plain, net.parameters()))


def test_describing_conditions_by_hand(whole, described):
    d = whole.fitted.describer
    table = Conditions(np.repeat("line1", 5), np.array(["drug01", "drug02+drug05", "drug05", "zzz", "drug01+zzz"]), np.array([100.0, np.nan, 1e4, 1e3, 100.0]))
    own = d.facts(table, np.array(["plate1", "plate2", "nowhere", "plate1", "plate1"]))
    assert own.parts.sum(1).tolist() == [1, 1, 0, 0, 1] and own.unknown.tolist() == [0, 0, 0, 1, 1] and own.batch.tolist() == [1, 2, 0, 1, 1] and np.allclose(own.dose, [0, 0, 1, 0.5, 0])
    rows = dict(zip(d.descriptors.names, d.descriptors.values))
    assert np.allclose(own.descriptor, [rows["drug01"], rows["drug02"] + rows["drug05"], rows["drug05"], 0 * rows["drug01"], rows["drug01"]], atol=1e-6)
    assert d.fallback(table).tolist() == ["seen", "descriptor", "descriptor", "mean", "partly"]
    a, b = d.descriptors.values, described.values - described.values.mean(0)
    assert np.allclose(a @ a.T / np.trace(a @ a.T), b @ b.T / np.trace(b @ b.T), atol=1e-5) and np.isclose(np.square(a).sum(1).mean(), 1, rtol=1e-3)


def test_kinship_of_lines_by_hand(whole):
    d = whole.fitted.describer
    square = np.square(d.lines["line1"] - d.lines["line2"]).sum()
    assert np.allclose(d.kinship(np.array(["line1", "line2"]), np.array(["line1", "line2"])), [[1, np.exp(-1)], [np.exp(-1), 1]]) and square > 0


@given(seeds, st.integers(1, 9))
def test_watched_takes_whole_conditions_if_there_are_enough(seed, c):
    rng = np.random.default_rng(seed)
    own, fold = rng.integers(c, size=50), rng.integers(3, size=c)
    table = Conditions(np.repeat("L", c), np.array([f"d{i}" for i in range(c)]), np.full(c, np.nan))
    found = watched(table, own, fold, rng)
    whole = c >= training.FEW and 0 < (fold[own] == 0).sum() < 50
    assert found.shape == (50,) and found.any() and not found.all() and (not whole or np.array_equal(found, fold[own] == 0))


@given(seeds, st.integers(2, 12))
def test_the_smallest_share_that_is_as_good_by_loops(seed, n):
    table = np.random.default_rng(seed).normal(size=(n, 5)) + np.array([1, 0.6, 0.2, 0, 0.1])
    best = int(np.argmin(table.mean(0)))
    for j in range(5):
        gap = table[:, j] - table[:, best]
        if gap.mean() <= np.sqrt(np.square(gap - gap.mean()).sum() / (n - 1) / n) + 1e-12:
            break
    assert smallest_as_good(table) == j


# leakage


@pytest.mark.parametrize("how", ["pair", "perturbation", "random", "dose"])
def test_what_is_learned_does_not_depend_on_test_cells(how, screen):
    own = simulate_screen(seed=1, n_cells=240, n_genes=20, n_drugs=4, n_modules=3, n_lines=2, doses=(10.0, 300.0, 10000.0))[0] if how == "dose" else screen
    held = split(own, how, 0)
    changes = {} if how == "pair" else ANCHOR
    clean, bad = (fit_screen(s, held.train, config(**changes), expects=how, seed=2) for s in (own, poisoned(own, held.test)))
    assert same(clean, bad)


def test_the_line_of_a_test_cell_does_not_matter(screen):
    held = split(screen, "pair", 0)
    fit_screen(replace(screen, line=np.where(held.test, "elsewhere", screen.line)), held.train, config(**ANCHOR))


def test_a_line_that_was_held_out_can_be_asked_for(screen):
    held = split(screen, "line", 0)
    model = new(**ANCHOR).fit(screen, train=held.train, expects="line")
    assert predict(model, ask("drug01", dose=100, line=list(held.held)), controls=screen.take(held.given)).n_obs


# the object


def test_the_same_seed_gives_the_same_bits_and_nothing_is_moved_or_touched(screen, described):
    before = {k: getattr(screen, k).copy() for k in COLUMNS}, screen.values.copy(), described.values.copy()
    torch.manual_seed(5)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    a = new(3).fit(screen, descriptors=described)
    made = predict(a, ASKED, cells=9)
    torch.manual_seed(77)
    torch.rand(5)
    b = new(3).fit(screen, descriptors=described)
    assert same(a.fitted, b.fitted) and np.array_equal(made.X, predict(b, ASKED, cells=9).X)
    torch.manual_seed(5)
    predict(a, ASKED, cells=9)
    assert torch.equal(state, torch.random.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])
    assert all(np.array_equal(v, getattr(screen, k), equal_nan=k == "dose") for k, v in before[0].items()) and np.array_equal(before[1].data, screen.values.data) and np.array_equal(before[2], described.values)


def test_fit_and_load_leave_the_callers_stream_alone(screen, whole, tmp_path):
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    new().fit(screen, train=split(screen, "pair", 0).train)
    load(save(whole, tmp_path))
    assert torch.equal(state, torch.random.get_rng_state())


def written(path) -> None:
    "In a process of its own: fit, predict, write."
    screen = simulate_screen(seed=1, n_cells=300, n_genes=24, n_drugs=4, n_modules=3, n_lines=2, doses=(100.0, 10000.0))[0]
    np.save(path, predict(new(4).fit(screen), ASKED, cells=7).X)


@forked
def test_a_fresh_process_predicts_the_same(screen, tmp_path):
    assert ended(start(written, str(tmp_path / "made.npy"))) == 0
    assert np.array_equal(np.load(tmp_path / "made.npy"), predict(new(4).fit(screen), ASKED, cells=7).X)


def group_of(screen, X, c):
    "Mean and number of the controls of a cell's batch, and the number of those of its line."
    line = screen.control & (screen.line == screen.line[c])
    own = line & (screen.batch == screen.batch[c])
    return X[own].mean(0), int(own.sum()), int(line.sum())


def test_a_prediction_is_control_plus_anchor_plus_network_by_hand(whole, screen):
    made, f = predict(whole, ASKED, cells=6), whole.fitted
    norm, place = f.describer.norm, {c: i for i, c in enumerate(screen.cells)}
    X = norm.logged(screen).toarray()
    assert list(made.var_names) == list(whole.genes) and len(made) == 18 and set(made.obs["rests_on"]) == {"seen"}
    for i in range(18):
        c, at = place[made.obs["control"].iloc[i]], ASKED.take([i // 6])
        assert screen.control[c] and screen.line[c] == at.line[0] == made.obs["line"].iloc[i] and np.array_equal(made.layers["control"][i], X[c])
        with torch.no_grad():
            more = f.net(torch.from_numpy(norm.scaled(X[c : c + 1])), f.describer.facts(at, screen.batch[c : c + 1])).delta.numpy()
        together = [place[name] for name in made.obs["control"].iloc[6 * (i // 6) : 6 * (i // 6) + 6]]
        pull = np.mean([f.levels.pull(at.line[0], *group_of(screen, X, b)) for b in together], 0) if f.levels else 0
        assert np.allclose(made.X[i], np.maximum(X[c] + f.anchor.predict(at)[0] + pull + f.share * more[0] * norm.spread, 0), atol=1e-4)
    assert (made.X >= 0).all() and not made.obs["control"].iloc[:6].duplicated().any()


@given(seeds)
def test_predicted_cells_move_with_their_order_and_blocks_do_not_matter(seed):
    model, screen = FITTED["whole"], FITTED["screen"]
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(screen.control & (screen.line == "line1"))[:10]
    asked = ASKED.take(rng.choice([0, 2], len(rows)))
    X, order = model.fitted.describer.norm.logged(screen)[rows], rng.permutation(len(rows))
    made, delta = predicted(model.fitted, X, asked, screen.batch[rows])
    again, other = predicted(model.fitted, X[order], asked.take(order), screen.batch[rows][order], block=3)
    assert np.allclose(made[order], again, atol=1e-5) and np.allclose(delta[order], other, atol=1e-5) and np.allclose(made, np.maximum(X.toarray() + delta, 0), atol=1e-6)


FITTED: dict = {}


@pytest.fixture(autouse=True)
def kept(whole, screen):
    "For hypothesis, which takes no fixtures of a module."
    FITTED.update(whole=whole, screen=screen)


def test_a_condition_is_predicted_the_same_in_any_list(alone):
    a, b = predict(alone, ASKED, cells=5), predict(alone, ASKED.take([2, 1, 0]), cells=5)
    assert np.array_equal(a.X[:5], b.X[10:])


@pytest.mark.parametrize("settings", [{}, ANCHOR | {"anchor": "auto"}, {"anchor": "none"}, {"anchor": "programs", "network.refiner": "none", "network.modules": 0}])
@pytest.mark.filterwarnings("ignore::gears_nb.core.errors.GearsWarning")
def test_saved_and_read(settings, screen, described, tmp_path):
    train = split(screen, "pair", 0).train
    model = new(1, **settings).fit(screen, train=train, descriptors=described)
    model._fitted = replace(model.fitted, share=float(model.fitted.net is not None))
    again = load(save(model, tmp_path / "m"))
    assert same(model.fitted, again.fitted) and again.config == model.config and again.seed == 1 and again.fitted.histories == model.fitted.histories
    fresh = replace(screen.take(screen.control), line=np.where(screen.line[screen.control] == "line1", "line1", "never seen"))
    asked = ask(["drug01", "drug06", "drug02+drug05", "zzz"], dose=[100, 3e4], line=["line1", "never seen"])
    a, b = (predict(m, asked, controls=fresh, cells=4) for m in (model, again))
    assert np.array_equal(a.X, b.X) and a.obs.equals(b.obs) and np.isfinite(a.X).all() and a.uns["perturb"]["share"] == model.fitted.share
    assert a.obs.groupby("perturbation", observed=True)["rests_on"].first().to_dict() == {"drug01": "seen", "drug06": "descriptor", "drug02+drug05": "descriptor", "zzz": "mean"}
    a.write_h5ad(tmp_path / "made.h5ad")


def test_damaged_and_absent_models_are_refused(whole, tmp_path):
    one_line(lambda: load(tmp_path / "nothing"), "no saved")
    one_line(lambda: save(Perturb(profile="smoke"), tmp_path), "not fitted")
    home = save(whole, tmp_path / "m")
    (data,) = home.glob("*.safetensors")
    data.write_bytes(data.read_bytes()[:-3] + b"abc")
    one_line(lambda: load(home), "damaged")


KINDS = {"csc": lambda v: v.tocsc(), "float64": lambda v: v.astype(float), "int64": lambda v: v.astype(np.int64)}


@pytest.mark.parametrize("kind", ["float64", "int64", "csc"])
def test_other_forms_of_values(kind, screen, alone, tmp_path):
    model = new(**ANCHOR).fit(replace(screen, values=KINDS[kind](screen.values)))
    assert np.allclose(predict(model, ASKED, cells=5).X, predict(alone, ASKED, cells=5).X, atol=1e-3)
    assert np.array_equal(predict(load(save(model, tmp_path)), ASKED, cells=5).X, predict(model, ASKED, cells=5).X)


def test_the_order_of_cells_and_of_genes_and_names_of_batches_do_not_matter(screen, alone):
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(screen.n), rng.permutation(screen.g)
    wanted = alone.fitted.anchor.predict(ASKED)
    for other, back in ((screen.take(cells), slice(None)), (replace(screen, batch=np.where(screen.batch == "plate1", "zebra", "apple")), slice(None)), (replace(screen, values=screen.values[:, genes], genes=screen.genes[genes]), np.argsort(genes))):
        assert np.allclose(new(**ANCHOR).fit(other).fitted.anchor.predict(ASKED)[:, back], wanted, atol=0.01 * np.abs(wanted).max())


def test_a_combination_may_be_asked_for_in_any_order(whole):
    a, b = (predict(whole, ask(name, dose=100, line="line1"), cells=4) for name in ("drug01+drug03", "drug03+control+drug01"))
    assert np.array_equal(a.X, b.X) and a.obs.equals(b.obs)
    odd = Conditions(np.array(["line1"]), np.array(["drug03+drug01"]), np.array([100.0]))
    assert np.array_equal(predict(whole, odd, cells=4).X, a.X)


def test_unknown_parts_are_told(alone):
    with pytest.warns(GearsWarning, match="zzz") as told:
        made = predict(alone, ask(["drug01", "drug01+zzz"], dose=100, line="line1"), cells=10**6)
    assert "\n" not in str(told[0].message) and set(made.obs["rests_on"][made.obs["perturbation"] == "drug01+zzz"]) == {"partly"}
    one, two = (moved(made)[made.obs["perturbation"] == p].mean(0) for p in ("drug01", "drug01+zzz"))
    assert np.corrcoef(one, two)[0, 1] > 0.9


def test_unknown_doses_and_numbers_are_predicted(alone):
    made = predict(alone, ask("drug01", dose=[None, 1e-3, 1e9], line="line1"), cells=3)
    assert np.isfinite(made.X).all() and np.isnan(made.obs["dose"].iloc[0])


def test_doses_far_from_those_of_training_are_told(screen):
    model = new(**ANCHOR | {"levels": False}).fit(replace(screen, dose=np.where(screen.dose == 100, 10.0, screen.dose)))
    assert np.allclose(model.fitted.describer.norm.dose_ends, [1, 4])
    for dose in (0.01, 1e7, [100, 0.01]):
        with pytest.warns(GearsWarning, match="doses outside 10 to 10000 nM"):
            predict(model, ask("drug01", dose=dose, line="line1"), cells=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GearsWarning)
        predict(model, ask("drug01", dose=[10, 100, 9000, 10000], line="line1"), cells=3)


@pytest.mark.parametrize("case", ["one line", "one batch", "constant dose", "no dose", "one gene varies", "log values", "a batch without controls", "a batch per cell"])
def test_screens_of_hardly_anything(case, screen):
    own = {"one line": lambda: screen.take(screen.line == "line1"), "one batch": lambda: replace(screen, batch=np.full(screen.n, "b")), "constant dose": lambda: replace(screen, dose=np.where(screen.control, np.nan, 5.0)),
           "no dose": lambda: replace(screen, dose=np.full(screen.n, np.nan)), "one gene varies": lambda: replace(screen, values=sp.csr_matrix(np.c_[screen.values[:, :2].toarray(), np.ones((screen.n, 22))].astype(np.float32))),
           "log values": lambda: replace(screen, counts=False), "a batch without controls": lambda: screen.take(~(screen.control & (screen.line == "line1") & (screen.batch == "plate1"))),
           "a batch per cell": lambda: replace(screen, batch=screen.cells)}[case]()
    model = new(**{"first.epochs": 1, "second.epochs": 1} if case in ("one line", "a batch without controls") else ANCHOR).fit(own)
    made = predict(model, ask(["drug01", "drug02"], dose=[100, 10000], line="line1"), cells=5)
    assert np.isfinite(made.X).all() and made.n_obs == 20
    if case in ("constant dose", "no dose"):
        assert np.allclose(model.fitted.anchor.predict(ask("drug01", dose=[1, 1e6], line="line1")), model.fitted.anchor.predict(ask("drug01", line="line1")))


def little(screen, what: str):
    drug = np.flatnonzero((screen.perturbation == "drug01") & (screen.line == "line1"))
    base = np.flatnonzero(screen.control & (screen.line == "line1"))
    rows = {"one cell": drug[:1], "one condition": drug[screen.dose[drug] == 100], "one drug, four conditions": np.flatnonzero(screen.perturbation == "drug01"), "one line": np.flatnonzero(~screen.control & (screen.line == "line1"))}[what]
    return screen.take(np.union1d(rows, np.flatnonzero(screen.control) if what == "one drug, four conditions" else base))


LITTLE = [("one cell", "pair"), ("one condition", "pair"), ("one drug, four conditions", "perturbation"), ("one line", "line")]


@pytest.mark.parametrize(("what", "expects"), LITTLE)
def test_the_anchor_stands_with_hardly_any_conditions(what, expects, screen):
    model = new(**ANCHOR).fit(little(screen, what), expects=expects)
    assert np.isfinite(predict(model, ask("drug01", dose=100, line="line1"), cells=3).X).all()


@pytest.mark.parametrize(("what", "expects"), LITTLE)
def test_the_network_stands_with_hardly_any_conditions(what, expects, screen):
    error = refused(lambda: new().fit(little(screen, what), expects=expects))
    assert error is None or "Remedy" in str(error)


def test_another_line_in_the_table_does_not_change_the_prediction_of_this_one():
    own = simulate_screen(seed=2, n_cells=300, n_genes=24, n_drugs=4, n_modules=3, n_lines=3, doses=(100.0, 10000.0), modulation=0.5)[0]
    model, base = new(**ANCHOR).fit(own), own.take(own.control)
    odd = replace(base.take(base.line == "line2"), line=np.full((base.line == "line2").sum(), "far away"))
    odd = replace(odd, values=sp.csr_matrix(odd.values.toarray()[:, ::-1]), cells=np.char.add("odd", odd.cells))
    both = replace(base, values=sp.vstack([base.values, odd.values]).tocsr(), **{k: np.concatenate([getattr(base, k), getattr(odd, k)]) for k in COLUMNS})
    a, b = (predict(model, ask("drug01", dose=100, line="line1"), controls=c, cells=10**6) for c in (base, both))
    assert np.allclose(moved(a).mean(0), moved(b).mean(0), atol=1e-6)


def test_the_control_is_predicted_as_it_is(alone):
    made = predict(alone, ask(CONTROL, line="line1"), cells=5)
    assert np.allclose(made.X, made.layers["control"], atol=1e-3)


def test_controls_on_another_scale_are_refused_or_told(screen, alone):
    base = replace(screen.take(screen.control), counts=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        error = refused(lambda: predict(alone, ASKED, controls=base, cells=3))
    assert error is not None or told


def reordered(screen, genes=None):
    base = screen.take(screen.control)
    base = replace(base, values=base.values[:, ::-1], genes=base.genes[::-1])
    place = {g: i for i, g in enumerate(base.genes)}
    return base if genes is None else replace(base, values=base.values[:, [place[g] for g in genes]], genes=np.array(genes))


def test_genes_are_found_by_name(screen):
    model = new(**ANCHOR | {"n_hvg": 8}).fit(screen)
    straight = predict(model, ASKED, controls=screen, cells=4)
    assert np.allclose(predict(model, ASKED, controls=reordered(screen), cells=4).X, straight.X, atol=1e-5) and straight.var_names.tolist() == model.genes.tolist()
    one_line(lambda: predict(model, ASKED, controls=reordered(screen, model.genes[1:])), "genes")
    with pytest.warns(GearsWarning, match="depth"):
        predict(model, ASKED, controls=reordered(screen, model.genes), cells=4)


WRONG = {"unknown line": lambda m, s: predict(m, ask("drug01", line="HeLa")), "no controls": lambda m, s: predict(m, ASKED, controls=s.take(~s.control)), "not fitted": lambda m, s: Perturb(profile="smoke").genes,
         "expects": lambda m, s: new(**ANCHOR).fit(s, expects="luck"), "profile": lambda m, s: Perturb(profile="huge"), "seed": lambda m, s: Perturb(seed=-1), "seed text": lambda m, s: Perturb(seed="1"), "config": lambda m, s: Perturb({"groups": 3}),
         "setting": lambda m, s: Perturb(grups=3), "no training cells": lambda m, s: new(**ANCHOR).fit(s, train=np.zeros(s.n, bool)), "no controls to learn": lambda m, s: new(**ANCHOR).fit(s, train=~s.control),
         "no treated cells": lambda m, s: new(**ANCHOR).fit(s, train=s.control), "no such file": lambda m, s: new(**ANCHOR).fit("nowhere.h5ad"), "checkpoint": lambda m, s: new().fit(s.take(s.line == "line1"), checkpoint="with space/run 1")}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(what, alone, screen):
    one_line(lambda: WRONG[what](alone, screen))


UGLY = {"train of another length": lambda m, s: new(**ANCHOR).fit(s, train=np.ones(10, bool)), "train as numbers": lambda m, s: new(**ANCHOR).fit(s, train=np.arange(100)), "nothing asked": lambda m, s: ask([]),
        "no conditions": lambda m, s: predict(m, ASKED.take(np.zeros(0, int))), "no cells": lambda m, s: predict(FITTED["whole"], ASKED, cells=0), "fewer than no cells": lambda m, s: predict(m, ASKED, cells=-1),
        "a dose in words": lambda m, s: ask("drug01", dose="10 uM"), "a negative dose": lambda m, s: predict(m, ask("drug01", dose=-5, line="line1")), "an infinite dose": lambda m, s: predict(m, ask("drug01", dose=float("inf"), line="line1")),
        "no perturbation": lambda m, s: predict(m, ask("", line="line1"))}


@pytest.mark.parametrize("what", UGLY)
def test_what_should_be_refused(what, alone, screen):
    one_line(lambda: UGLY[what](alone, screen))


# killed and resumed

LONGER = {"first.epochs": 2, "second.epochs": 2, "rounds": 2, "anchor": "none", "groups": 8, "cells": 12}


class Killed(BaseException):
    "What a kill looks like from inside: nothing catches it."


@pytest.fixture(scope="module")
def longer(screen):
    return new(7, **LONGER).fit(screen)


@pytest.mark.parametrize("call", [0, 4, 7, 11, 16])
def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(call, longer, screen, tmp_path, monkeypatch):
    real, seen = training.terms, itertools.count()

    def dies(*a):
        if next(seen) == call:
            raise Killed
        return real(*a)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "terms", dies)
        new(7, **LONGER).fit(screen, checkpoint=tmp_path / "run")
    again = new(7, **LONGER).fit(screen, checkpoint=tmp_path / "run")
    strip = lambda h: {k: [{a: b for a, b in row.items() if a != "seconds"} for row in rows] for k, rows in h.items()}
    assert same(again.fitted, longer.fitted) and strip(again.fitted.histories) == strip(longer.fitted.histories) and list(longer.fitted.histories) == ["first", "second1", "second2"]
    assert {p.name for p in tmp_path.glob("*.json")} == {"run-first.json", "run-second1.json", "run-second2.json"}


def dies_hard(screen, path) -> None:
    real, seen = training.terms, itertools.count()
    training.terms = lambda *a: real(*a) if next(seen) != 10 else os.kill(os.getpid(), signal.SIGKILL)
    new(7, **LONGER).fit(screen, checkpoint=path)


@forked
def test_kill_minus_nine(longer, screen, tmp_path):
    assert ended(start(dies_hard, screen, tmp_path / "run")) == -signal.SIGKILL
    assert same(new(7, **LONGER).fit(screen, checkpoint=tmp_path / "run").fitted, longer.fitted)


SHORT = {"anchor": "none", "network.modules": 0}


@pytest.fixture(scope="module")
def checkpoints(screen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    new(**SHORT).fit(screen, checkpoint=folder / "run")
    return folder


def other(screen, what: str) -> Screen:
    name = screen.perturbation.copy()
    name[np.flatnonzero(~screen.control)[:2]] = ["drug02", "drug03"]
    values = screen.values.copy()
    values.data[5] += 1
    return replace(screen, **{"counts": {"values": values}, "perturbation": {"perturbation": name}, "line": {"line": np.where(screen.line == "line1", "line2", "line1")}, "dose": {"dose": np.where(screen.control, np.nan, 10300 - screen.dose)},
                              "batch": {"batch": np.where(screen.batch == "plate1", "plate2", "plate1")}}.get(what, {}))


@pytest.mark.parametrize("what", ["counts", "perturbation", "seed", "setting", "expects", "train", "line", "dose", "batch", "descriptors"])
def test_a_checkpoint_of_other_data_or_settings_is_refused(what, screen, described, checkpoints, tmp_path):
    for path in checkpoints.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = new(int(what == "seed"), **SHORT | ({"loss.noise": 0.2} if what == "setting" else {}))
    if what == "descriptors":  # of other values, in a network of the same shape
        folder = tmp_path / "d"
        new(**SHORT).fit(screen, descriptors=described, checkpoint=folder / "run")
        one_line(lambda: model.fit(screen, descriptors=replace(described, values=described.values[::-1]), checkpoint=folder / "run"), "another")
        return
    more = {"expects": "perturbation"} if what == "expects" else {"train": np.arange(screen.n) > 0} if what == "train" else {}
    one_line(lambda: model.fit(other(screen, what), checkpoint=tmp_path / "run", **more), "another")


def test_a_finished_run_is_only_read(screen, checkpoints, monkeypatch):
    plain = new(**SHORT).fit(screen)
    seen = []
    monkeypatch.setattr(training, "train", lambda *a, real=training.train, **k: seen.append(real(*a, **k)) or seen[-1])
    assert same(new(**SHORT).fit(screen, checkpoint=checkpoints / "run").fitted, plain.fitted)
    assert [h.resumed_from for h in seen] == [1, 1]


# board


@pytest.fixture(scope="module")
def small(screen):
    "The data set of this file, under a name of its own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "_screen", lambda dataset, seed: screen if dataset == "small" else (_ for _ in ()).throw(InputError("perturb", "data", "is unknown", "choose one of small")))
        board.task.cache_clear()
        yield
    board.task.cache_clear()


@pytest.mark.parametrize("how", ["pair", "line"])
def test_a_task_by_hand(how, small, screen):
    t = board.task("small", how, 0, None)
    held = split(screen, how, 0)
    assert np.array_equal(t.parts.train, held.train) and np.array_equal(t.parts.test, held.test) and np.array_equal(t.parts.given, held.given)
    wanted = deltas(screen, t.X, held.test, held.given)
    assert np.array_equal(wanted.delta, t.asked.delta) and [leads.shape[1] for leads in t.leads] == [20, 24]
    for c, (control, treated) in enumerate(zip(t.controls, t.treated)):
        at = t.asked.conditions.take([c])
        assert held.test[treated].all() and set(screen.perturbation[treated]) == set(at.perturbation) and set(screen.line[treated]) == set(at.line) == set(screen.line[control]) and screen.control[control].all()
        assert set(screen.batch[control]) == set(screen.batch[treated]) and len(treated) == t.asked.cells[c]


def test_inner_tasks_do_not_see_what_the_outer_split_holds_out(small, screen, monkeypatch):
    outer = split(screen, "pair", 0)
    clean = board.task("small", "pair", 0, 10, inner=True)
    assert not (clean.parts.test & outer.test).any() and not (clean.parts.train & outer.test).any()
    values = screen.values.toarray()
    values[outer.test] = values[outer.test][:, ::-1] * 7 + 3
    monkeypatch.setattr(board, "_screen", lambda dataset, seed: replace(screen, values=sp.csr_matrix(values)))
    board.task.cache_clear()
    bad = board.task("small", "pair", 0, 10, inner=True)
    board.task.cache_clear()
    assert all(np.array_equal(getattr(clean.norm, f.name), getattr(bad.norm, f.name)) for f in fields(clean.norm)) and np.array_equal(clean.taught.delta, bad.taught.delta) and np.array_equal(clean.asked.delta, bad.asked.delta)
    assert np.array_equal(clean.basis.components, bad.basis.components) and all(np.array_equal(a, b) for a, b in zip(clean.controls + clean.treated, bad.controls + bad.treated)) and all(np.array_equal(a, b) for a, b in zip(clean.leads, bad.leads))


def test_an_inner_task_of_lines():
    own = simulate_screen(seed=1, n_cells=240, n_genes=20, n_drugs=3, n_modules=3, n_lines=3, doses=(100.0,))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "_screen", lambda dataset, seed: own)
        board.task.cache_clear()
        try:
            assert board.task("another", "line", 0, None, inner=True).parts.test.any()
        finally:
            board.task.cache_clear()


@pytest.mark.parametrize("method", [board.PLAIN[0], "perturb"])
def test_a_row_of_the_board(method, small):
    lines, again = (board.board_row("small", "pair", method, 0, "smoke", changes=TINY | {"anchor": "genes"}) for _ in range(2))
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip(lines) == strip(again) and len(lines) == len(board.task("small", "pair", 0, 200).asked.conditions)
    assert all(row["cells"] > 0 and (row["e_distance"] is None or np.isfinite(row["e_distance"])) for row in lines) and len({row["digest"] for row in lines}) == 1


def test_what_the_board_refuses(small):
    one_line(lambda: board.board_row("small", "pair", "luck", 0, "smoke"), "unknown")
    one_line(lambda: board.board_row("small", "luck", "anchor", 0, "smoke"), "unknown")
    one_line(lambda: board.board_row("nothing", "pair", "anchor", 0, "smoke"), "unknown")


def lines_of(**scores):
    rng = np.random.default_rng(0)
    return [{"data": "d", "split": "pair", "method": m, "seed": s, "perturbation": f"p{i % 3}", "condition": f"c{i}", "seconds": 1.0, "mse": float(shift + 0.1 * i + 0.01 * s + 0.001 * rng.random()), "pcc_top20": float(1 - shift - 0.02 * i - 0.1 * s)}
            for m, shift in scores.items() for s in range(2) for i in range(6)]


def test_means_and_contrasts_by_hand():
    lines = lines_of(ours=0.1, theirs=0.3)
    table, frame = by_method(lines).set_index("method"), pd.DataFrame(lines)
    for m in ("ours", "theirs"):
        own = frame[frame.method == m]
        assert np.isclose(table.loc[m, "mse"], own.mse.mean()) and np.isclose(table.loc[m, "pcc_top20_std"], np.std([own[own.seed == s].pcc_top20.mean() for s in range(2)], ddof=1))
    for column in ("mse", "pcc_top20"):
        found = contrasts(lines, "ours", ["theirs", "absent"], column)
        assert found["other"].tolist() == ["theirs"] and np.isclose(found.loc[0, "difference"], 0.2, atol=2e-3) and found.loc[0, "low"] <= found.loc[0, "difference"] <= found.loc[0, "high"] and found.loc[0, "conditions"] == 12
    assert np.isclose(contrasts(lines, "theirs", ["ours"], "pcc_top20").loc[0, "difference"], -0.2)


def test_names_are_understood_as_the_model_spells_them(whole):
    a = predict(whole, ask(["Drug 01", " DRUG-02 "], dose=100, line="LINE 1"), cells=3)
    b = predict(whole, ask(["drug01", "drug02"], dose=100, line="line1"), cells=3)
    assert np.array_equal(a.X, b.X) and list(a.obs["perturbation"]) == list(b.obs["perturbation"]) and set(a.obs["line"]) == {"line1"}
    none = predict(whole, ask("DMSO", dose=100, line="line1"), cells=3)
    assert set(none.obs["perturbation"]) == {CONTROL} and not none.layers["difference"].any()


@pytest.mark.parametrize("wrong", [lambda m: ask(None), lambda m: ask(5), lambda m: ask("drug01", dose=True), lambda m: ask("drug01", line=3), lambda m: predict(m, "drug01"),
                                   lambda m: predict(m, ASKED, cells=2.5), lambda m: predict(m, ASKED, cells=True)])
def test_questions_that_are_none_are_refused_in_one_line(whole, wrong):
    with pytest.raises(InputError) as told:
        wrong(whole)
    assert "\n" not in str(told.value) and "Remedy" in str(told.value)
