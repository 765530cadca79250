"""cycle: closed-form effects, base, heads and classifier, the two turns, and runs that were killed."""
from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import types
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from forks import ended, forked, start
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gears_nb.core.config import at_profile
from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.cycle import training
from gears_nb.cycle.additive import fit_additive, gather
from gears_nb.cycle.chunks import open_chunks
from gears_nb.cycle.fields import Field, prepare
from gears_nb.cycle.loading import Batch, Stream
from gears_nb.cycle.model import Base, ContextClassifier, CycleNet, FieldHead, Generator, calibrate, grouped, network, start_head
from gears_nb.cycle.settings import SOURCE, CycleConfig, LossConfig
from gears_nb.cycle.simulator import simulate_contexts
from gears_nb.cycle.training import board, destinations, draw_targets, fit_net, schedule, take_gauge, terms, turns

seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Cells:
    x: np.ndarray
    labels: np.ndarray


def config(**changes) -> CycleConfig:
    return at_profile(CycleConfig, "smoke", **{"train.progress": False} | changes)


def design(labels, sizes):
    return np.concatenate([np.eye(c)[column] for c, column in zip(sizes, labels.T)], 1)


@functools.lru_cache
def cells_of(seed=2, n=900, genes=60, confounding=0.0):
    adata, truth = simulate_contexts(n_cells=n, n_genes=genes, seed=seed, confounding=confounding)
    chunks = open_chunks(adata, 400)
    return truth, chunks, prepare(chunks)


def stream(chunks, prepared, **how):
    return Stream(chunks, prepared, **{"batch": 64, "prefetch": 0} | how)


# closed form


@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 60))
def test_effects_are_least_squares_however_cells_are_dealt(seed, sizes, n):
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, rng.integers(1, c + 1), n) for c in sizes], 1)  # some categories have no cells
    x = rng.normal(2, 1, (n, 3)).astype(np.float32)
    cuts = np.sort(rng.integers(0, n + 1, 3))
    parts = [Cells(x[a:b], labels[a:b]) for a, b in itertools.pairwise([0, *cuts, n]) if b > a]
    found = fit_additive(parts, sizes)
    D = design(labels, sizes)
    fitted = D @ np.linalg.lstsq(D, x.astype(float), rcond=None)[0]
    assert np.allclose(found.predict(labels), fitted, atol=1e-6) and np.allclose(found.intercept, x.astype(float).mean(0))
    assert np.allclose(found.residual, np.square(x - fitted).mean(0), atol=1e-6) and np.allclose(found.variance, x.astype(float).var(0), atol=1e-6)
    for table, cells, column in zip(found.effects, found.cells, labels.T):
        assert cells.tolist() == np.bincount(column, minlength=len(table)).tolist()
        assert np.allclose(cells @ table, 0, atol=1e-6) and not table[cells == 0].any()
    rank = np.linalg.matrix_rank(D)
    full = 1 + sum(len(np.unique(column)) - 1 for column in labels.T)
    assert bool(found.confounded) == (rank < full)


def test_planted_effects_come_back_exactly_without_noise():
    rng = np.random.default_rng(0)
    labels = np.stack([np.r_[np.zeros(60, int), np.ones(40, int)], np.r_[rng.integers(0, 3, 60), rng.integers(1, 4, 40)]], 1)
    planted = [rng.normal(size=(c, 5)) for c in (2, 4)]
    x = 3 + sum(e[column] for e, column in zip(planted, labels.T))
    found = fit_additive([Cells(x, labels)], (2, 4))
    for ours, true in zip(found.effects, planted):
        assert np.allclose(np.diff(ours, axis=0), np.diff(true, axis=0))
    assert np.isclose(found.explained, 1) and not found.confounded


CONFOUNDED = {"function": "effects of sex cannot be told from those of line, where they are left", "same": "effects of line cannot be told from those of sex, where they are left",
              "part": "1 of 2 differences between categories of sex cannot be told from those of line, where they are left",
              "two": "2 of 3 differences between categories of sex cannot be told from those of line and batch, where they are left", "nearly": ""}


@pytest.mark.parametrize("case", CONFOUNDED)
def test_what_cannot_be_told_apart_is_said_and_left_with_the_finer_field(case):
    rng = np.random.default_rng(1)
    line, batch = rng.integers(0, 6, 400), rng.integers(0, 5, 400)
    sex = {"function": line // 3, "same": line, "part": np.where(line < 2, 0, rng.integers(1, 3, 400)), "two": (line // 3) + 2 * (batch // 3),
           "nearly": np.where(rng.random(400) < 0.02, 1 - line // 3, line // 3)}[case]
    labels = np.stack([sex, line, batch], 1)
    found = fit_additive([Cells(rng.normal(size=(400, 4)), labels)], labels.max(0) + 1, ["sex", "line", "batch"])
    assert "; ".join(found.confounded) == CONFOUNDED[case]
    silent = [np.allclose(table, 0, atol=1e-6) for table in found.effects]
    assert silent == [case == "function", case == "same", False]  # of two that divide the cells alike the first has it


def test_thousands_of_categories_are_group_means_and_need_no_square():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 5000, (12000, 1))
    x = rng.normal(size=(12000, 4))
    sums = gather([Cells(x[i : i + 500], labels[i : i + 500]) for i in range(0, 12000, 500)], (5000,))
    assert sums.pairs.nnz <= 5000
    found = fit_additive([Cells(x, labels)], (5000,))
    own = labels[:, 0] == labels[7, 0]
    assert np.allclose(found.predict(labels[7:8])[0], x[own].mean(0))


def test_no_cells_are_refused():
    with pytest.raises(InputError, match="there are none"):
        fit_additive([], (2,))


# base


@pytest.mark.parametrize("sign", ["projected", "softplus", "free"])
@pytest.mark.parametrize("tied", [True, False])
def test_base_is_linear_without_bias_and_its_weights_keep_their_sign(sign, tied):
    torch.manual_seed(0)
    base, x = Base(20, 4, tied=tied, sign=sign), torch.rand(50, 20)
    optimiser = torch.optim.SGD(base.parameters(), lr=0.5)
    for _ in range(5):
        base.project()
        optimiser.zero_grad(), (base.decode(base.encode(x)) - x).square().mean().backward(), optimiser.step()
    way = lambda v: base.decode(base.encode(v))
    assert torch.allclose(way(2 * x - 3 * x.flip(0)), 2 * way(x) - 3 * way(x.flip(0)), atol=1e-4) and not way(torch.zeros(1, 20)).any()
    assert (base.weight.min() >= 0) == (sign != "free") and len(list(base.parameters())) == (1 if tied else 2)
    if tied:
        W = base.weight.detach()
        assert torch.allclose(way(x), x @ W.T @ W, atol=1e-5)
    before = way(x)
    base.project()
    assert torch.equal(way(x), before)  # what was used is what stays


def test_an_untrained_base_keeps_the_size_of_a_flat_cell():
    torch.manual_seed(0)
    for genes, dim in ((50, 4), (400, 64)):
        base, x = Base(genes, dim), torch.ones(1, genes)
        assert 0.8 < float(base.decode(base.encode(x)).mean().detach()) < 1.25


# heads


def looped(head, z, category):
    "One category after the other, one cell after the other."
    d, out = head.dim, []
    for cell, c in zip(z, category.tolist()):
        flat = head.networks[c]
        first, second, a, b = flat[: d * d].view(d, d), flat[d * d : 2 * d * d].view(d, d), flat[2 * d * d : -d], flat[-d:]
        out.append(torch.relu(cell @ first + a) @ second + b)
    return torch.stack(out) @ head.decoder.weight.T


@given(seeds, st.integers(1, 12), st.integers(1, 40))
def test_grouped_heads_are_the_plain_loop_in_any_order(seed, categories, n):
    torch.manual_seed(seed)
    head, z, category = FieldHead(7, 5, categories), torch.randn(n, 5), torch.randint(0, categories, (n,))
    added, varies = head(z, category)
    assert torch.allclose(added, looped(head, z, category), atol=1e-5)
    order = torch.randperm(n)
    assert torch.allclose(head(z[order], category[order])[0], added[order], atol=1e-5)
    constant = torch.stack([head.networks[c][-5:] for c in category.tolist()]) @ head.decoder.weight.T
    assert torch.isclose(varies, (added - constant).square().mean(), atol=1e-5, rtol=1e-4)


def test_grouped_pads_with_zeros_and_finds_every_row():
    x, category = torch.arange(1.0, 6)[:, None], torch.tensor([7, 2, 7, 7, 2])
    cells, own, at = grouped(x, category)
    assert own.tolist() == [2, 7] and cells[..., 0].tolist() == [[2, 5, 0], [1, 3, 4]] and torch.equal(cells.view(-1, 1)[at], x)


def test_only_categories_of_the_batch_are_moved():
    torch.manual_seed(0)
    head = FieldHead(6, 4, 30)
    before = [p.detach().clone() for p in head.networks]
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.1)
    for category in (torch.tensor([3, 5, 3]), torch.tensor([5, 8, 9])):
        optimiser.zero_grad(), head(torch.randn(3, 4), category)[0].square().sum().backward()
        assert {i for i, p in enumerate(head.networks) if p.grad is not None} == set(category.tolist())
        optimiser.step()
    assert {i for i, (a, b) in enumerate(zip(before, head.networks)) if not torch.equal(a, b)} == {3, 5, 8, 9}


# the sum


@pytest.mark.parametrize("sees", ["rest", "all"])
@pytest.mark.parametrize("scale", [1.0, 0.0159])
def test_generator_is_the_formula(sees, scale):
    torch.manual_seed(0)
    net = Generator(9, (3, 4), config(**{"net.base_sees": sees, "net.scale": scale, "net.base": 3, "net.head": 4}).net)
    with torch.no_grad():
        net.intercept.normal_()
        x, own, to = torch.rand(6, 9), torch.randint(0, 3, (6, 2)), torch.randint(0, 3, (6, 2))
        adds = lambda labels: [scale * looped(head, head.encoder(x), labels[:, f]) for f, head in enumerate(net.heads)]
        W = net.base.encoder.clamp(min=0)
        rest = x - net.intercept - (sum(adds(own)) if sees == "rest" else 0)
        way = net(x, own, to)
        for made, labels in ((way.stays, own), (way.goes, to)):
            assert torch.allclose(made, net.intercept + rest @ W.T @ W + sum(adds(labels)), atol=1e-5)
        assert torch.equal(way.goes, way.intercept + way.base + sum(way.to))  # the parts are the sum, to the bit
        net.gauge.normal_()
        again = net(x, own, to)
        assert torch.allclose(again.goes, way.goes, atol=1e-5) and torch.allclose(again.base, way.base, atol=1e-5)
        assert all(torch.allclose(a, b - g, atol=1e-5) for a, b, g in zip(again.to, way.to, net.gauge))
        order = torch.randperm(6)
        assert torch.allclose(net(x[order], own[order], to[order]).goes, again.goes[order], atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.0159, 20.0])
def test_additive_start_is_the_additive_model_at_any_scale(scale):
    truth, chunks, prepared = cells_of()
    additive = fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes)
    net = network(additive, config(**{"net.scale": scale}).net).generator
    batch = next(iter(stream(chunks, prepared).epoch(0)))
    to = batch.labels.flip(0)
    with torch.no_grad():
        way = net(batch.x, batch.labels, to)
    assert np.allclose((way.goes - way.base).numpy(), additive.predict(to.numpy()), atol=1e-3) and float(way.spread) == 0


def test_a_head_that_is_too_narrow_begins_with_the_nearest_effects_and_says_so():
    effects = np.random.default_rng(0).normal(size=(12, 40))
    torch.manual_seed(0)
    head = FieldHead(40, 5, 12)
    kept = start_head(head, effects, 2.0)
    u, s, v = np.linalg.svd(effects)
    nearest = (u[:, :5] * s[:5]) @ v[:5]
    with torch.no_grad():
        assert np.allclose(2.0 * head(torch.randn(12, 5), torch.arange(12))[0].numpy(), nearest, atol=1e-4)
    assert np.isclose(kept, np.square(s[:5]).sum() / np.square(s).sum())
    labels = np.arange(600)[:, None] % 12
    additive = fit_additive([Cells(effects[labels[:, 0]], labels)], (12,))
    with pytest.warns(GearsWarning, match=r"width 4 starts with \d\d% of the effects of the 12 categories of line"):
        network(additive, config(**{"net.head": 4}).net, names=["line"])


def test_networks_depend_on_the_seed_and_not_on_what_ran_before():
    truth, chunks, prepared = cells_of()
    additive = fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes)
    torch.manual_seed(5)
    first = network(additive, config().net, seed=1).state_dict()
    torch.rand(7)
    assert all(torch.equal(v, first[k]) for k, v in network(additive, config().net, seed=1).state_dict().items())
    assert not torch.equal(network(additive, config().net, seed=2).generator.base.encoder, first["generator.base.encoder"])


def test_calibration_is_the_spread_of_the_parts_and_balances_them():
    truth, chunks, prepared = cells_of()
    additive = fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes)
    theirs = config(**SOURCE).net
    net = network(additive, theirs).generator
    batches = list(stream(chunks, prepared).epoch(0))
    found = calibrate(net, batches)
    with torch.no_grad():
        way = net(*(torch.cat([getattr(b, name) for b in batches]) for name in ("x", "labels", "labels")))
    size = lambda part: float((part - part.mean(0)).square().sum(1).mean().sqrt())
    assert np.isclose(found.base, size(way.base), rtol=1e-3) and np.isclose(found.heads, size(sum(way.own)), rtol=1e-3)
    assert np.allclose(found.fields, [size(part) for part in way.own], rtol=1e-3)
    balanced = calibrate(network(additive, replace(theirs, scale=found.scale)).generator, batches)
    assert np.isclose(balanced.base, balanced.heads, rtol=1e-3)


def test_classifier_takes_no_part_in_unknown_labels():
    torch.manual_seed(0)
    judge, x = ContextClassifier(5, (3, 4), 8), torch.randn(6, 5)
    labels = torch.tensor([[1, 0], [2, 0], [0, 0], [1, 0], [2, 0], [1, 0]])
    known = [0, 1, 3, 4, 5]
    assert torch.isclose(judge.loss(x, labels), F.cross_entropy(judge(x[known])[0], labels[known, 0]) / 2)
    judge.loss(x, labels).backward()
    assert not judge.outputs[1].weight.grad.any() and judge.calls(x).min() >= 1


# the turns

FIELDS = (Field("type", ("unknown", "a", "b", "rare"), (3, 9, 9, 4), ("c", "d")), Field("assay", ("unknown", "x", "y"), (0, 12, 13)), Field("odd", ("unknown", "rare"), (5, 20)))


def test_targets_are_known_categories_all_alike():
    allowed = destinations(FIELDS)
    assert [own.tolist() for own in allowed] == [[1, 2], [1, 2], [1]]  # a category that is called rare is no pool
    assert [own.tolist() for own in destinations(FIELDS, True)] == [[0, 1, 2, 3], [1, 2], [0, 1]]
    drawn = draw_targets(6000, allowed, torch_rng(0, "t"))
    counts = np.unique(drawn[:, :2].numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 4 and np.abs(counts - 1500).max() < 150
    assert torch.equal(drawn, draw_targets(6000, allowed, torch_rng(0, "t")))
    with pytest.raises(InputError, match="field 'type': has no category to go to"):
        destinations([Field("type", ("unknown", "rare"), (5, 20), ("c", "d"))])


def small_net(**changes):
    truth, chunks, prepared = cells_of()
    own = config(**changes)
    additive = fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes)
    batch = next(iter(stream(chunks, prepared).epoch(0)))
    return network(additive, own.net), own, prepared, batch, draw_targets(len(batch.x), destinations(prepared.fields), torch_rng(3, "t"))


def test_losses_are_what_the_table_says():
    net, own, _, batch, to = small_net(**{"net.start": "random", "loss.reconstruction": 2.0, "loss.cycle": 3.0, "loss.integration": 5.0, "loss.target": 7.0, "loss.spread": 11.0})
    found, made = terms(net, batch, to, own.loss)
    back = net.generator(made.goes, to, batch.labels)
    by_hand = {"reconstruction": 2 * F.mse_loss(made.stays, batch.x), "cycle": 3 * F.mse_loss(back.goes, batch.x), "target": 7 * net.classifier.loss(made.goes, to),
               "integration": 5 * sum(F.mse_loss(a, b) for a, b in zip(made.hidden, back.hidden)) / 4}
    varying = [F.mse_loss(looped(h, h.encoder(batch.x), c), torch.stack([h.networks[i][-h.dim :] for i in c.tolist()]) @ h.decoder.weight.T)
               for labels in (batch.labels, to) for h, c in zip(net.generator.heads, labels.T)]
    by_hand["spread"] = 11 * sum(varying) / 2
    assert set(found) == set(by_hand) and all(torch.isclose(found[name], value, rtol=1e-4) for name, value in by_hand.items())


@pytest.mark.parametrize("name", ["reconstruction", "cycle", "integration", "target", "spread"])
def test_a_loss_of_weight_zero_is_left_out(name):
    net, own, _, batch, to = small_net(**{f"loss.{name}": 0.0})
    ways = []
    net.generator.register_forward_hook(lambda *a: ways.append(1))
    found, _ = terms(net, batch, to, own.loss)
    assert set(found) == {"reconstruction", "cycle", "integration", "target", "spread"} - {name} and len(ways) == 2
    alone, _ = terms(net, batch, to, LossConfig(cycle=0.0, integration=0.0))
    assert set(alone) == {"reconstruction", "target", "spread"} and len(ways) == 3  # nothing travels back


def test_generator_and_classifier_learn_from_their_own_turn_only():
    net, own, prepared, batch, _ = small_net(**{"loss.target": 1.0})
    both = turns(prepared.fields, own.loss)
    assert [t.name for t in both] == ["generator", "classifier"] and len(turns(prepared.fields, config(**{"loss.supervised": 0.0, "loss.target": 0.0}).loss)) == 1
    for turn in both:
        before = {k: v.clone() for k, v in net.state_dict().items()}
        optimiser = torch.optim.AdamW(turn.parameters(net), lr=1e-2)
        net.zero_grad()
        turn.loss(net, batch, 0, torch_rng(0, "t"))["loss"].backward()
        if turn.name == "generator":
            assert any(p.grad.any() for p in net.classifier.parameters())  # the loss asks the classifier
        optimiser.step()
        assert {k.split(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])} == {turn.name}


def test_classifier_never_learns_from_generated_cells():
    """Its weights after a run are those of a run in which the generator is another one."""
    truth, chunks, prepared = cells_of()
    additive, after = fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes), []
    for changes in ({"loss.target": 1.0}, {"loss.target": 0.0, "loss.cycle": 0.0, "loss.integration": 0.0}):
        own = config(**changes)
        net = network(additive, own.net)
        fit_net(net, stream(chunks, prepared), prepared.fields, own)
        after.append(net)
    assert all(torch.equal(a, b) for a, b in zip(after[0].classifier.parameters(), after[1].classifier.parameters()))
    assert not torch.equal(after[0].generator.base.encoder, after[1].generator.base.encoder)


# runs


def trained(path=None, cells=250, **changes):
    truth, chunks, prepared = cells_of()
    own = config(**changes)
    with stream(chunks, prepared) as first:
        net = network(fit_additive(first.epoch(0), prepared.sizes), own.net)
    return net, fit_net(net, stream(chunks, prepared, cells=cells), prepared.fields, own, checkpoint=path, tag="cells")


def same(a: CycleNet, b: CycleNet) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def strip(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_has_norms_no_negative_weights_and_its_last_weights():
    net, history = trained()
    assert len(history.rows) == 2 * 4 and history.best_epoch == 7 and net.generator.base.encoder.min() >= 0
    assert {"norm.base", "norm.assay", "norm.type", "norm.donor", "classifier.loss", "target"} <= set(history.rows[0])
    assert history.rows[-1]["reconstruction"] < history.rows[0]["reconstruction"] and history.rows[-1]["classifier.loss"] < history.rows[0]["classifier.loss"]
    again, _ = trained()
    assert same(net, again)


def test_reading_ahead_does_not_change_the_weights():
    truth, chunks, prepared = cells_of()
    nets = []
    for how in ({"prefetch": 0}, {"prefetch": 2}):
        net = network(fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes), config().net)
        fit_net(net, stream(chunks, prepared, **how), prepared.fields, config())
        nets.append(net)
    assert same(*nets)


@forked
@pytest.mark.parametrize(("call", "told"), [(3, 0), (13, 3), (30, 7)])
def test_killed_inside_a_chunk_and_resumed_gives_the_bits_of_an_uninterrupted_run(call, told, tmp_path):
    whole, history = trained()
    assert ended(start(killed, call, tmp_path / "run")) == -signal.SIGKILL
    net, resumed = trained(tmp_path / "run")
    assert same(net, whole) and resumed.resumed_from == told and strip(resumed.rows) == strip(history.rows)
    assert (tmp_path / "run.log.jsonl").read_text().count("\n") == len(history.rows)


def killed(call, path):
    real, seen = training.terms, itertools.count()
    training.terms = lambda *a: real(*a) if next(seen) != call else os.kill(os.getpid(), signal.SIGKILL)
    trained(path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trained(tmp_path / "run")
    with pytest.raises(InputError, match="written by a run with another config"):
        trained(tmp_path / "run", **{"train.lr": 1e-4})


def test_schedule_counts_parts():
    own = config(**{"train.epochs": 3}).train
    assert (schedule(own, 4).epochs, schedule(own, 4).patience_after) == (12, 12)
    patient = config(**{"train.epochs": 3, "train.patience": 2, "train.patience_after": 1}).train
    assert (schedule(patient, 4).patience, schedule(patient, 4).patience_after) == (8, 4)


def test_gauge_makes_contributions_zero_on_average_and_reads_the_same_twice():
    truth, chunks, prepared = cells_of()
    net, _ = trained(**{"train.epochs": 1})
    batches = list(stream(chunks, prepared, shuffle=False).epoch(0))
    x, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("x", "labels"))
    with torch.no_grad():
        before = net.generator(x, labels, labels).stays
    effects = take_gauge(net.generator, batches, prepared.sizes)
    with torch.no_grad():
        way = net.generator(x, labels, labels)
    assert torch.allclose(way.stays, before, atol=1e-4) and all(part.mean(0).abs().max() < 1e-4 for part in way.own)
    for f, table in enumerate(effects):
        own = labels[:, f] == 2
        assert np.allclose(table[2], way.own[f][own].mean(0).numpy(), atol=1e-4) and not table[0].any()  # nobody is unknown
    again = take_gauge(net.generator, iter(batches), prepared.sizes)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(effects, again))


def recovered(changes, confounding=0.8, epochs=12):
    truth, chunks, prepared = cells_of(confounding=confounding, n=800)
    own = at_profile(CycleConfig, "toy", **{"train.progress": False, "train.epochs": epochs, "train.lr": 5e-3, "batch": 64, "net.base": 8, "net.head": 8} | changes)
    net = network(fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes), own.net)
    history = fit_net(net, stream(chunks, prepared), prepared.fields, own)
    effects = take_gauge(net.generator, stream(chunks, prepared).epoch(0), prepared.sizes)
    planted = [table - np.bincount(column, minlength=len(table)) / len(column) @ table for table, column in zip(truth.effects.values(), truth.labels.T)]
    with torch.no_grad():
        batch = next(iter(stream(chunks, prepared).epoch(0)))
        spread = float(net.generator(batch.x, batch.labels, batch.labels).spread)
    return [float(np.corrcoef(a[1:].ravel(), b.ravel())[0, 1]) for a, b in zip(effects, planted)], history, spread


def test_contributions_are_recovered_and_a_strong_target_loss_destroys_them():
    ours, history, _ = recovered({})
    pulled, *_ = recovered({"loss.target": 1.0})
    assert min(ours) > 0.95 and min(pulled) < min(ours) - 0.03
    assert history.rows[-1]["reconstruction"] < 0.8 * history.rows[0]["reconstruction"]  # the base learns the rest


def test_without_spread_heads_describe_the_cell_as_well():
    narrow = {"net.base": 1, "loss.integration": 0.0}  # leaves much to describe
    assert recovered(narrow | {"loss.spread": 0.0}, 0.0, 8)[2] > 5 * recovered(narrow, 0.0, 8)[2]


# logs


class Writer:
    made: list = []

    def __init__(self, folder, purge_step):
        self.rows = []
        Writer.made.append((folder, purge_step, self.rows))

    def add_scalar(self, *row):
        self.rows.append(row)

    def flush(self):
        pass


def test_tensorboard_gets_every_number_of_the_history(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    Writer.made.clear()
    truth, chunks, prepared = cells_of()
    net = network(fit_additive(stream(chunks, prepared).epoch(0), prepared.sizes), config().net)
    history = fit_net(net, stream(chunks, prepared), prepared.fields, config(), log=tmp_path / "board")
    (folder, first, rows), = Writer.made
    assert folder == str(tmp_path / "board") and first == 0 and ("norm/type", history.rows[1]["norm.type"], 1) in rows
    assert len(rows) == sum(isinstance(v, (int, float)) and k != "epoch" for row in history.rows for k, v in row.items())


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    write = board(tmp_path)
    for epoch in (4, 5):  # a resumed run
        write({"epoch": epoch, "loss": 0.5 * epoch, "norm.type": 2.0, "validate": None})
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "norm/type"} and [(e.step, e.value) for e in found.Scalars("loss")] == [(4, 2.0), (5, 2.5)]


def test_without_tensorboard_there_is_a_warning_and_no_log(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(GearsWarning, match="tensorboard is not installed"):
        assert board("somewhere") is None
    assert board(None) is None


def test_batch_is_moved_as_it_is():
    """The trainer's way to a device takes the stream's batches."""
    from gears_nb.core.training import to_device
    batch = to_device(Batch(torch.rand(2, 3), torch.zeros(2, 1, dtype=torch.int64)), "cpu")
    assert isinstance(batch, Batch) and batch.labels.dtype == torch.int64
