"""saturn: both stages, the face and the plain ways: mathematics, the same bits again, what labels may do, kept models, tables of every kind."""
from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData, read_h5ad
from forks import ended, forked, start
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info

from gears_nb.core.config import at_profile, override
from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.core.store import Store, content_digest
from gears_nb.saturn import baselines, pretraining, saturn, triplets
from gears_nb.saturn.baselines import PLAIN, log_scaled, own_scale, plain_embedding, shared_columns, untrained_values
from gears_nb.saturn.pretraining import Cells, OwnScale, centre, held_out, pretrain_terms, reconstruction, similarity_gap, split
from gears_nb.saturn.saturn import SATURN_FORMAT, Saturn, components, dealt, embedded, first_stage, integrate, load, network, save, second_stage, transfer_labels, weights
from gears_nb.saturn.scores import remoteness
from gears_nb.saturn.settings import PretrainConfig, SaturnConfig, TripletConfig
from gears_nb.saturn.simulator import simulate_species
from gears_nb.saturn.species import UNLABELLED, gather_species
from gears_nb.saturn.triplets import DISTANCES, CrossSpeciesMiner, clustered, distance_of, label_numbers, label_pairs, learn_metric, metric_terms, mutual_pairs, triplet_loss

seeds = st.integers(0, 2**32 - 1)
TINY = {"macrogenes": 12, "keep": 6, "n_hvg": None, "pretrain.hidden": 8, "pretrain.dim": 4, "pretrain.pairs": 16, "pretrain.similarity_dim": 5, "pretrain.batch": 48, "triplets.batch": 48,
        "triplets.neighbours": 2, "triplets.labelled": "any", "pretrain.rate": 1.0, "pretrain.train.lr": 1e-2, "triplets.train.lr": 1e-2}


def config(**changes) -> SaturnConfig:
    return at_profile(SaturnConfig, "smoke", **{"progress": False} | TINY | changes)


def new(seed: int = 0, **changes) -> Saturn:
    return Saturn(profile="smoke", seed=seed, progress=False, **TINY | changes)


def how(**changes) -> TripletConfig:
    return at_profile(TripletConfig, "smoke", **changes)


def fit(tables, embeddings, seed: int = 0, settings=(), **keys) -> Saturn:
    return new(seed, **dict(settings)).fit(tables, embeddings, **{"batch_key": "batch"} | keys)


def fit_stages(species, settings, *, seed: int = 0, checkpoint=None):
    "Both stages: the network, and the history of each that there is."
    net, first = first_stage(species, settings, seed=seed, checkpoint=checkpoint)
    net, second = second_stage(net, species, settings, seed=seed, checkpoint=checkpoint)
    return net, {name: found for name, found in (("pretraining", first), ("triplets", second)) if found is not None}


def bits(net) -> dict[str, np.ndarray]:
    return {k: v.numpy().copy() for k, v in net.state_dict().items()}


def same(one, two) -> bool:
    "Equal to the bit: networks, or lists of arrays."
    if hasattr(one, "state_dict"):
        one, two = bits(one), bits(two)
        return one.keys() == two.keys() and all(np.array_equal(v, two[k]) for k, v in one.items())
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two))


def moved(one, two) -> set[str]:
    "Parts of two networks that differ."
    one, two = bits(one), bits(two)
    return {k.split(".")[0] for k, v in one.items() if not np.array_equal(v, two[k])}


def counts(table) -> np.ndarray:
    return table.X.toarray()


def changed(tables, name: str, **obs) -> dict[str, AnnData]:
    "Copies of the tables, with other columns of `obs` in one of them."
    out = {k: t.copy() for k, t in tables.items()}
    for key, values in obs.items():
        out[name].obs[key] = values
    return out


def refused(call) -> InputError | None:
    "What a call is refused with, None if it works; any other error is a failure, told in a line (a whole traceback takes half a second)."
    try:
        call()
    except InputError as error:
        assert "\n" not in str(error) and "Remedy" in str(error)
        return error
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}", pytrace=False)
    return None


def one_line(call, hint: str = ".") -> None:
    "The call is refused with an `InputError` in a line that matches `hint`."
    error = refused(call)
    assert error is not None and re.search(hint, str(error)), error


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "A cache of this file's own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def toy():
    return simulate_species(n_cells=60, n_genes=80, n_programs=10, n_types=3, seed=0)


@pytest.fixture(scope="module")
def three():
    return simulate_species(("human", "mouse", "fish"), n_cells=50, n_genes=70, n_programs=8, n_types=3, seed=1)


@pytest.fixture(scope="module")
def pair(toy):
    return gather_species(toy.tables, toy.embeddings, n_hvg=None, batch_key="batch")


@pytest.fixture(scope="module")
def vectors(pair):
    return [torch.from_numpy(s.vectors) for s in pair]


@pytest.fixture(scope="module")
def fitted(toy):
    "Models of the toy by seed and settings, fitted once. Not to be changed."
    return functools.cache(lambda seed=0, **settings: fit(toy.tables, toy.embeddings, seed, settings.items()))


@pytest.fixture(scope="module")
def model(fitted):
    return fitted()


@pytest.fixture(scope="module")
def both(model, toy):
    return integrate(model, toy.tables)


@pytest.fixture(scope="module")
def net(pair):
    "A network whose weights are nowhere at their start, in evaluation mode."
    return perturbed(network(pair, config()))


def perturbed(net, seed: int = 3):
    rng = torch_rng(seed, "test")
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.add_(0.3 * torch.rand(value.shape, generator=rng) if name.endswith("spread") else 0.3 * torch.randn(value.shape, generator=rng))
    return net.eval()


def batch_of(pair, n: int = 7) -> dict:
    return {"counts": [torch.from_numpy(s.counts[:n].toarray()) for s in pair], "batch": [torch.from_numpy(s.batch[:n]) + 2 * i for i, s in enumerate(pair)], "rows": [torch.arange(n)] * len(pair)}


# the network and its losses, in NumPy -----------------------------------------------------------------------------------


def layer_norm(v):
    return (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)


def np_block(v, p, name):
    v = layer_norm(v @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"])
    return np.maximum(0, v * p[f"{name}.1.weight"] + p[f"{name}.1.bias"])


def np_hidden(net, X, s):
    p = {k: v.double().numpy() for k, v in net.state_dict().items()}
    v = layer_norm(np.log1p(X.astype(float)) @ net.macrogenes.weights(s).toarray().astype(float))
    if net.config.centred:
        v = (v - p[f"encoder.centre.{s}.mean"]) / p[f"encoder.centre.{s}.spread"]
    return np_block(v, p, "encoder.body"), p


def np_embed(net, X, s):
    hidden, p = np_hidden(net, X, s)
    return hidden @ p["encoder.mean.weight"].T + p["encoder.mean.bias"]


def np_decode(net, h, total, s, batch):
    p = {k: v.double().numpy() for k, v in net.state_dict().items()}
    hidden = np_block(np.c_[h, np.eye(net.species)[np.full(len(h), s)], np.eye(net.batches)[batch]], p, "decoder")
    levels = np.maximum(0, hidden @ p["levels.weight"].T + p["levels.bias"])
    share = np.exp(levels @ net.macrogenes.weights(s).toarray().T.astype(float))
    return total[:, None] * share / share.sum(1, keepdims=True), np.exp(p[f"dispersion.{s}"]), hidden @ p[f"zeros.{s}.weight"].T + p[f"zeros.{s}.bias"]


def np_nll(kind, x, mean, dispersion, logit):
    if kind == "poisson":
        return -stats.poisson.logpmf(x, mean).mean()
    nb = stats.nbinom.pmf(x, dispersion, dispersion / (dispersion + mean))
    zero = 1 / (1 + np.exp(-logit)) if kind == "zinb" else 0.0
    return -np.log(zero * (x == 0) + (1 - zero) * nb).mean()


@pytest.mark.parametrize("centred", [True, False])
def test_encoder_and_decoder_are_those_of_numpy(centred, pair):
    net = perturbed(network(pair, config(**{"pretrain.centred": centred})))
    for s, own in enumerate(pair):
        X = own.counts[:9].toarray()
        h = net.embed(torch.from_numpy(X), s)
        np.testing.assert_allclose(h.detach(), np_embed(net, X, s), atol=2e-5)
        batch = own.batch[:9] + 2 * s
        found = net.decode(h, torch.from_numpy(X.sum(1)), s, torch.from_numpy(batch))
        for a, b in zip(found, np_decode(net, h.detach().double().numpy(), X.sum(1).astype(float), s, batch)):
            np.testing.assert_allclose(a.detach(), b, rtol=2e-4, atol=1e-5)


def test_own_scale_keeps_what_it_was_fitted_to():
    A = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    A[:, 2] = 5
    scale = OwnScale(4)
    assert torch.equal(scale(torch.from_numpy(A)), torch.from_numpy(A)) and not list(scale.parameters())
    scale.fit(torch.from_numpy(A))
    told = (A - A.mean(0)) / np.maximum(A.std(0), 1e-3)
    for mode in (scale.train(), scale.eval()):  # of a cell, whatever its company
        np.testing.assert_allclose(mode(torch.from_numpy(A)), told, atol=1e-4)
        np.testing.assert_allclose(mode(torch.from_numpy(A[7:8])), told[7:8], atol=1e-4)
    scale.fit(torch.from_numpy(A[:10]))
    np.testing.assert_allclose(scale.mean, A[:10].mean(0), rtol=1e-5)


@pytest.mark.parametrize("most", [7, 2000])
def test_centring_is_read_from_even_rows_of_every_species(most, pair, monkeypatch):
    monkeypatch.setattr(pretraining, "CENTRED_BY", most)
    net = network(pair, config())
    before = [p.detach().clone() for p in net.parameters()]
    centre(net, dealt(pair, net.config))
    for s, own in enumerate(pair):
        X = own.counts[np.round(np.linspace(0, own.n - 1, min(own.n, most))).astype(int)].toarray()
        v = layer_norm(np.log1p(X.astype(float)) @ net.macrogenes.weights(s).toarray().astype(float))
        np.testing.assert_allclose(net.encoder.centre[s].mean, v.mean(0), atol=1e-5)
        np.testing.assert_allclose(net.encoder.centre[s].spread, np.maximum(v.std(0), 1e-3), atol=1e-5)
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_reconstruction_is_scipys_likelihood_per_gene(kind, pair):
    net = perturbed(network(pair, config(**{"pretrain.likelihood": kind})))
    step = batch_of(pair)
    for s, (x, where) in enumerate(zip(step["counts"], step["batch"])):
        h = net.embed(x, s)
        told = np_decode(net, h.detach().double().numpy(), x.double().sum(1).numpy(), s, where.numpy())
        assert float(reconstruction(net, h, x, s, where).detach()) == pytest.approx(np_nll(kind, x.numpy(), *told), rel=1e-4)


@given(seeds)
def test_similarity_is_the_gap_of_cosines_over_pairs_drawn(net, vectors, seed):
    pairs, rng = net.config.pairs, torch_rng(seed)
    drawn = [(s, int(g)) for s, own in enumerate(vectors) for g in torch.randint(len(own), (2 * pairs,), generator=rng)]
    drawn = [drawn[i] for i in torch.randperm(len(drawn), generator=rng).tolist()]
    table = [net.macrogenes.weights(s).toarray() @ net.protein.detach().numpy() for s in range(2)]
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    gaps = [cosine(table[s][g], table[t][k]) - cosine(vectors[s][g].numpy(), vectors[t][k].numpy()) for (s, g), (t, k) in zip(drawn[: 2 * pairs], drawn[2 * pairs :])]
    assert float(similarity_gap(net, vectors, torch_rng(seed)).detach()) == pytest.approx(np.mean(np.square(gaps)), rel=1e-3)


@pytest.mark.parametrize("kind", ["zinb", "none"])
def test_the_terms_of_a_variational_encoder(kind, pair, vectors):
    changes = {"pretrain.vae": True, "pretrain.kl_weight": 0.7, "pretrain.l1_weight": 0.3, "pretrain.reconstruction_weight": 2.0, "pretrain.similarity_weight": 4.0, "pretrain.likelihood": kind}
    net, step = perturbed(network(pair, config(**changes))), batch_of(pair)
    found = {k: float(v.detach()) for k, v in pretrain_terms(net, step, vectors, torch_rng(5)).items()}
    rng, kl, nll = torch_rng(5), 0.0, 0.0
    for s, (x, where) in enumerate(zip(step["counts"], step["batch"])):
        hidden, p = np_hidden(net, x.numpy(), s)
        mean = torch.from_numpy(hidden @ p["encoder.mean.weight"].T + p["encoder.mean.bias"])
        spread = torch.from_numpy(np.exp(0.5 * np.clip(hidden @ p["encoder.log_variance.weight"].T + p["encoder.log_variance.bias"], -10, 10)))
        normal = torch.distributions.Normal
        kl += float(torch.distributions.kl_divergence(normal(mean, spread), normal(torch.zeros_like(mean), torch.ones_like(spread))).mean()) / 2
        h = mean + torch.randn(mean.shape, generator=rng) * spread
        nll += np_nll(kind, x.numpy(), *np_decode(net, h.numpy(), x.double().sum(1).numpy(), s, where.numpy())) / 2
    assert found["kl"] == pytest.approx(0.7 * kl, rel=1e-4)
    assert found.get("reconstruction", 2 * nll) == pytest.approx(2 * nll, rel=1e-4) and ("reconstruction" in found) == (kind != "none")
    assert found["l1"] == pytest.approx(0.3 * np.mean([net.macrogenes.weights(s).data.mean() for s in range(2)]), rel=1e-5)
    assert found["similarity"] == pytest.approx(4 * float(similarity_gap(net, vectors, rng).detach()), rel=1e-5)  # the stream goes on where the noise left it
    assert found["loss"] == pytest.approx(sum(v for k, v in found.items() if k != "loss"), rel=1e-6)


def test_every_part_learns_from_the_terms_that_know_it(pair, vectors):
    net, step = network(pair, config(**{"pretrain.vae": True, "pretrain.l1_weight": 1.0})), batch_of(pair)
    reached = lambda term: {k.split(".")[0] for k, p in net.named_parameters() for g in torch.autograd.grad(pretrain_terms(net, step, vectors, torch_rng(0))[term], p, allow_unused=True) if g is not None and g.any()}
    assert reached("l1") == {"macrogenes"} and reached("similarity") == {"macrogenes", "protein"} and reached("kl") == {"macrogenes", "encoder"}
    assert reached("reconstruction") == {"macrogenes", "encoder", "decoder", "levels", "zeros", "dispersion"}


# dealing ----------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_an_epoch_deals_every_cell_once_in_even_steps(seed, n, m, size):
    rng = np.random.default_rng(seed)
    tables = [sp.csr_matrix(rng.poisson(1.0, (k, 3)).astype(np.float32)) for k in (n, m)]
    batch = [rng.integers(0, 3, k) for k in (n, m)]
    cells = Cells(tables, batch, [None, None], at_profile(PretrainConfig, "smoke", batch=size))
    steps = list(cells.epoch(0, torch_rng(seed)))
    assert len(steps) == cells.steps == max(1, min(round((n + m) / size), max(n, m))) == len(cells.epoch(0, torch_rng(seed)))
    for s, k in enumerate((n, m)):
        rows = [step["rows"][s].numpy() for step in steps]
        assert sorted(np.concatenate(rows)) == list(range(k)) and np.ptp([len(r) for r in rows]) <= 1
        assert all(np.array_equal(step["counts"][s], tables[s][r].toarray()) and np.array_equal(step["batch"][s], batch[s][r]) for step, r in zip(steps, rows))


def test_balanced_deals_types_alike_and_cells_of_a_type_alike():
    labels = np.repeat(["a", "b", "c"], [85, 12, 3])
    table = sp.csr_matrix(np.ones((100, 2), np.float32))
    cells = Cells([table] * 2, [np.zeros(100)] * 2, [labels, None], at_profile(PretrainConfig, "smoke", balanced=True))
    drawn = torch.cat([cells.order(0, torch_rng(i)) for i in range(200)]).numpy()
    for kind in "abc":
        seen = np.bincount(drawn, minlength=100)[labels == kind]
        assert seen.sum() / len(drawn) == pytest.approx(1 / 3, abs=0.02) and stats.chisquare(seen).pvalue > 1e-3
    assert sorted(cells.order(1, torch_rng(0)).tolist()) == list(range(100))  # nobody told its types


@given(seeds, st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_a_tenth_is_held_out(seed, sizes):
    masks = held_out(sizes, seed)
    assert [int(m.sum()) for m in masks] == [max(1, round(0.1 * n)) for n in sizes] and same(masks, held_out(sizes, seed))
    assert same(masks[:1], held_out(sizes[:1], seed))  # of a species, whatever the others


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_a_split_deals_every_cell_to_one_side(seed, sizes):
    rng = np.random.default_rng(seed)
    tables, batch = [sp.csr_matrix(rng.poisson(1.0, (n, 3)).astype(np.float32)) for n in sizes], [rng.integers(0, 3, n) for n in sizes]
    labels = [None if s == 1 else rng.choice(list("abc"), n) for s, n in enumerate(sizes)]
    sides = split(Cells(tables, batch, labels, at_profile(PretrainConfig, "smoke")), seed)
    for s, mask in enumerate(held_out(sizes, seed)):
        for cells, rows in zip(sides, (~mask, mask)):
            assert np.array_equal(cells.counts[s].toarray(), tables[s].toarray()[rows]) and np.array_equal(cells.batch[s], batch[s][rows])
            assert cells.labels[s] is None if labels[s] is None else np.array_equal(cells.labels[s], labels[s][rows])


@pytest.mark.parametrize("balanced", [False, True])
def test_cells_that_are_held_out_validate_and_never_teach(balanced, pair, monkeypatch):
    seen: dict[bool, set] = {True: set(), False: set()}
    whole = pretraining.pretrain_terms

    def spy(net, batch, *rest):
        seen[net.training] |= {(s, row.numpy().tobytes()) for s, x in enumerate(batch["counts"]) for row in x}
        return whole(net, batch, *rest)

    monkeypatch.setattr(pretraining, "pretrain_terms", spy)
    own = config(**{"pretrain.balanced": balanced, "triplets.train.epochs": 0})
    fit_stages(pair, own, seed=4)
    kept = {(s, row.tobytes()) for s, (own, mask) in enumerate(zip(pair, held_out([s.n for s in pair], 4))) for row in own.counts[mask].toarray()}
    assert not seen[True] & kept and (seen[False] <= kept if balanced else seen[False] == kept)


@pytest.mark.parametrize("settings", [{"triplets.pairs": "mutual"}, {"triplets.pairs": "mutual", "triplets.unfreeze": True}, {"triplets.reconstruction": 1.0, "triplets.pairs": "label"}])
def test_cells_that_are_held_out_do_not_teach_in_the_second_stage(settings, pair):
    settings, rng = config(**settings), np.random.default_rng(0)
    first, _ = first_stage(pair, settings, seed=4)

    def second(side: bool):
        "The second stage, with other counts and labels where cells are held out (True), or are not."
        other = []
        for own, kept in zip(pair, held_out([s.n for s in pair], 4)):
            rows, X, labels = np.flatnonzero(kept == side), own.counts.toarray(), own.labels.copy()
            X[rows], labels[rows] = rng.permuted(X[rows], axis=1), rng.permutation(labels[rows])
            other.append(dataclasses.replace(own, counts=sp.csr_matrix(X), labels=labels))
        return second_stage(first, other, settings, seed=4)[0]

    def weights_of(net) -> list[np.ndarray]:
        "All that is learned; the centring of macrogenes that moved is read from all cells in the end."
        return [v for k, v in bits(net).items() if not k.startswith("encoder.centre")]

    told = weights_of(second_stage(first, pair, settings, seed=4)[0])
    assert same(weights_of(second(True)), told) and not same(weights_of(second(False)), told)


# pairs and triplets, by force -------------------------------------------------------------------------------------------


def np_far(z: np.ndarray, name: str) -> np.ndarray:
    "Distances `(n, n)`, larger for farther."
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    gaps = z[:, None] - z[None]
    return {"cosine": lambda: -unit @ unit.T, "dot": lambda: -z @ z.T, "euclidean": lambda: np.sqrt((gaps**2).sum(2)), "snr": lambda: gaps.var(2, ddof=1) / z.var(1, ddof=1)[:, None]}[name]()


def drawn(seed: int, sizes=(7, 5, 9), d: int = 4, types: int = 3):
    "Embeddings, species and labels (-1: none) in random order."
    rng = np.random.default_rng(seed)
    species = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return rng.normal(size=(len(species), d)), species, rng.integers(-1, types, len(species))


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_what_they_are_called(name):
    z = drawn(0)[0]
    found = distance_of(name)
    np.testing.assert_allclose(found(torch.from_numpy(z)) * (-1 if found.is_inverted else 1), np_far(z, name), atol=1e-6)


@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 8))
def test_mutual_pairs_by_force(seed, sizes, k):
    rng = np.random.default_rng(seed)
    species = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    far = rng.permuted(np.arange(float(len(species) ** 2))).reshape(len(species), len(species))  # no ties, not symmetric
    near = functools.cache(lambda i, s: set(sorted(np.flatnonzero(species == s), key=lambda j: far[i, j])[:k]))
    told = {(i, j) for i, j in itertools.product(range(len(species)), repeat=2) if species[i] != species[j] and j in near(i, species[j]) and i in near(j, species[i])}
    a, p = mutual_pairs(torch.from_numpy(far), torch.from_numpy(species), k)
    assert sorted(zip(a.tolist(), p.tolist())) == sorted(told)
    order = torch.from_numpy(rng.permutation(len(species)))
    b, q = mutual_pairs(torch.from_numpy(far)[order][:, order], 7 - torch.from_numpy(species)[order], k)
    assert set(zip(order[b].tolist(), order[q].tolist())) == told


@given(seeds)
def test_label_pairs_by_force(seed):
    _, species, labels = drawn(seed)
    told = [(i, j) for i, j in itertools.product(range(len(labels)), repeat=2) if species[i] != species[j] and labels[i] == labels[j] >= 0]
    assert sorted(zip(*(t.tolist() for t in label_pairs(torch.from_numpy(species), torch.from_numpy(labels))))) == told


def np_triplets(z, species, labels, settings) -> dict[tuple[int, int, int], float]:
    "All triplets before mining, and the gap of each: far(anchor, negative) less far(anchor, positive)."
    far, n = np_far(z, settings.distance), len(z)
    near = functools.cache(lambda i, s: set(sorted(np.flatnonzero(species == s), key=lambda j: far[i, j])[: settings.neighbours]))
    like = lambda i, j: labels[i] == labels[j] >= 0 if settings.pairs == "label" else j in near(i, species[j]) and i in near(j, species[i])
    return {(i, j, k): far[i, k] - far[i, j] for i in range(n) for j in range(n) if species[i] != species[j] and like(i, j)
            for k in range(n) if species[k] == species[i] and labels[k] != labels[i] and labels[i] >= 0 and labels[k] >= 0}


KEEP = {"hard": lambda gap, m: gap <= 0, "semihard": lambda gap, m: 0 < gap <= m, "all": lambda gap, m: gap <= m}
mined = pytest.mark.parametrize(("mining", "name"), list(itertools.product(KEEP, DISTANCES)))


def found_by(settings, z, species, labels, seed=0):
    return list(zip(*(t.tolist() for t in CrossSpeciesMiner(settings).triplets(*map(torch.from_numpy, (z, species, labels)), torch_rng(seed)))))


@mined
@pytest.mark.parametrize("pairs", ["mutual", "label"])
def test_triplets_and_their_loss_by_force(mining, name, pairs):
    for seed in range(4):
        settings = how(pairs=pairs, mining=mining, distance=name, margin=0.5, neighbours=1 + seed % 2)
        z, species, labels = drawn(seed)
        told = {t: gap for t, gap in np_triplets(z, species, labels, settings).items() if KEEP[mining](gap, 0.5)}
        found = found_by(settings, z, species, labels)
        assert len(found) == len(set(found)) and set(found) == set(told)
        costs = [0.5 - gap for gap in told.values() if gap < 0.5]
        loss = triplet_loss(CrossSpeciesMiner(settings), *map(torch.from_numpy, (z, species, labels)), torch_rng(0))
        assert float(loss) == pytest.approx(np.mean(costs) if costs else 0.0, rel=1e-6)


@given(seeds, st.sampled_from(list(KEEP)), st.sampled_from(list(DISTANCES)), st.sampled_from(["mutual", "label"]))
def test_triplets_follow_the_order_of_cells_and_ignore_what_labels_are_called(seed, mining, name, pairs):
    settings, (z, species, labels) = how(pairs=pairs, mining=mining, distance=name), drawn(seed)
    told, rng = set(found_by(settings, z, species, labels)), np.random.default_rng(seed)
    order, names = rng.permutation(len(z)), np.r_[rng.permutation(50)[:3], -1]  # the last is for -1
    assert {tuple(order[list(t)]) for t in found_by(settings, z[order], species[order], names[labels][order])} == told


@pytest.mark.parametrize("pairs", ["mutual", "label"])
def test_random_mining_takes_one_negative_of_each_pair_all_alike(pairs):
    settings, (z, species, labels) = how(pairs=pairs, mining="random", neighbours=2), drawn(11)
    told = np_triplets(z, species, labels, settings)
    runs = [found_by(settings, z, species, labels, seed) for seed in range(200)]
    assert runs[0] == found_by(settings, z, species, labels, 0) != runs[1] and set().union(*runs) == set(told)
    assert all(Counter(t[:2] for t in run) == dict.fromkeys({t[:2] for t in told}, 1) for run in runs)
    seen, choices = Counter(itertools.chain(*runs)), Counter(t[:2] for t in told)
    wide = max(choices, key=choices.get)
    assert choices[wide] > 3 and stats.chisquare([seen[t] for t in told if t[:2] == wide]).pvalue > 1e-3


@given(seeds, st.sampled_from([*KEEP, "random"]))
def test_even_keeps_as_many_anchors_of_each_species(seed, mining):
    z, species, labels = drawn(seed, (12, 4, 7))
    more, few = (found_by(how(pairs="label", mining=mining, even=even), z, species, labels) for even in (False, True))
    before, after = (Counter(species[[t[0] for t in found]].tolist()) for found in (more, few))
    assert set(after) == set(before) and set(after.values()) == ({min(before.values())} if before else set()) and len(set(few)) == len(few)
    assert set(few) <= (set(more) if mining != "random" else set(np_triplets(z, species, labels, how(pairs="label"))))


@pytest.mark.parametrize("mining", [*KEEP, "random"])
@pytest.mark.parametrize("lost", ["species", "labels", "cells"])
def test_where_there_is_no_triplet_nothing_is_paid(mining, lost):
    z, species, labels = map(torch.from_numpy, drawn(2))
    z, species, labels = {"species": (z, species * 0, labels), "labels": (z, species, labels * 0 - 1), "cells": (z[:0], species[:0], labels[:0])}[lost]
    loss = triplet_loss(CrossSpeciesMiner(how(mining=mining, even=True)), z.requires_grad_(), species, labels, torch_rng(0))
    loss.backward()
    assert loss == 0 and not z.grad.any()


def test_the_loss_of_triplets_has_the_gradient_of_its_formula():
    z, species, labels = drawn(3)
    t = torch.from_numpy(z).requires_grad_()
    for name in DISTANCES:
        miner, rest = CrossSpeciesMiner(how(pairs="label", distance=name, mining="hard")), (torch.from_numpy(species), torch.from_numpy(labels))
        assert torch.autograd.gradcheck(lambda v, miner=miner, rest=rest: triplet_loss(miner, v, *rest, torch_rng(0)), t, atol=1e-4), name


@pytest.mark.parametrize(("warmup", "epochs", "told"), [(0.0, 4, [1, 1, 1, 1]), (0.5, 8, [0.25, 0.5, 0.75, 1, 1]), (1.0, 5, [0.2, 0.4, 0.6, 0.8, 1]), (0.1, 4, [1, 1, 1, 1])])
def test_the_weight_of_triplets_rises_and_stays(warmup, epochs, told, net, pair, monkeypatch):
    monkeypatch.setattr(triplets, "triplet_loss", lambda miner, z, *rest: 3.0 + 0 * z.sum())
    miner = CrossSpeciesMiner(how(warmup=warmup, **{"train.epochs": epochs}))
    tags = [torch.zeros(s.n, dtype=torch.long) for s in pair]
    found = [metric_terms(net, batch_of(pair), tags, miner, e, torch_rng(0), False) for e in range(len(told))]
    assert [float(f["loss"].detach()) for f in found] == pytest.approx([3 * t for t in told]) and all(f["loss"] is f["triplets"] for f in found)


words = st.lists(st.sampled_from(["a", "b", "1/a", "cluster 1", UNLABELLED]), min_size=1, max_size=6)


@given(st.lists(words, min_size=1, max_size=12), st.booleans())
def test_label_numbers_are_equal_where_words_are(labels, shared):
    numbers = label_numbers([np.array(own) for own in labels], shared)
    flat = [(s, word, int(n)) for s, (own, found) in enumerate(zip(labels, numbers)) for word, n in zip(own, found)]
    assert [len(n) for n in numbers] == [len(own) for own in labels] and all((n == -1) == (word == UNLABELLED) for _, word, n in flat)
    for (s, a, n), (t, b, m) in itertools.product([f for f in flat if f[1] != UNLABELLED], repeat=2):
        assert (n == m) == (a == b and (shared or s == t))


def test_clusters_are_of_directions_and_repeat():
    rng = np.random.default_rng(0)
    h = np.eye(4)[np.arange(40) % 4] + 0.05 * rng.normal(size=(40, 4))
    found = clustered(h, 4, seed=3)
    assert len(set(found)) == 4 and all(len(set(found[i::4])) == 1 for i in range(4))
    assert np.array_equal(found, clustered(h * rng.uniform(0.1, 9, (40, 1)), 4, seed=3)) and len(set(clustered(h[:3], 20))) == 3


# the same bits again ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_gives_others(toy, fitted, model):
    again = fit(toy.tables, toy.embeddings)
    assert same(again.net, model.net) and [strip(again.history[k]) for k in again.history] == [strip(model.history[k]) for k in model.history]
    assert same(again.fit(toy.tables, toy.embeddings, batch_key="batch").net, model.net)  # what was learned before plays no part
    assert moved(fitted(seed=1).net, model.net) == {"macrogenes", "encoder", "decoder", "levels", "zeros", "dispersion", "protein"}
    assert np.isfinite(np.concatenate([v.ravel() for v in bits(model.net).values()])).all()


def strip(rows) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Killed(BaseException):
    "What a kill looks like from inside: nothing catches it."


def dies_in_call(monkeypatch, module, name: str, call: int, what=Killed):
    "Let the `call`-th use of a function die."
    whole, seen = getattr(module, name), itertools.count()
    monkeypatch.setattr(module, name, lambda *a: whole(*a) if next(seen) != call else (_ for _ in ()).throw(what))


LONGER = {"pretrain.train.epochs": 3, "triplets.train.epochs": 3}  # of two steps each, and one that validates
KINDS = {"plain": {"triplets.clusters": 5}, "unfrozen": {"triplets.unfreeze": True, "triplets.mining": "random", "triplets.even": True},
         "all": {"triplets.reconstruction": 0.5, "triplets.warmup": 1.0, "pretrain.vae": True, "pretrain.balanced": True, "pretrain.train.patience": 5}}


@pytest.fixture(scope="module")
def whole(pair):
    "Uninterrupted runs, of a species with labels and one without."
    half = (pair[0], dataclasses.replace(pair[1], labels=None))
    runs = {}

    def run(kind):
        call = functools.partial(fit_stages, half, config(**LONGER | KINDS[kind]), seed=7)
        if kind not in runs:
            runs[kind] = call()
        return call, *runs[kind]

    return run


@pytest.mark.parametrize(("kind", "where", "call", "first", "second"), [
    ("plain", (pretraining, "pretrain_terms"), 1, 0, None), ("plain", (pretraining, "pretrain_terms"), 5, 1, None),
    ("plain", (triplets, "macrogene_values"), 1, 3, None), ("plain", (triplets, "metric_terms"), 0, 3, 0), ("plain", (triplets, "metric_terms"), 3, 3, 1),
    ("unfrozen", (triplets, "metric_terms"), 5, 3, 2),
    ("all", (pretraining, "pretrain_terms"), 4, 1, None), ("all", (triplets, "metric_terms"), 3, 3, 1)])
def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(kind, where, call, first, second, whole, tmp_path, monkeypatch):
    run, net, history = whole(kind)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_in_call(patch, *where, call)
        run(checkpoint=tmp_path / "run")
    found, resumed = run(checkpoint=tmp_path / "run")
    assert (resumed["pretraining"].resumed_from, resumed["triplets"].resumed_from) == (first, second)
    assert same(found, net) and all(strip(resumed[k].rows) == strip(history[k].rows) for k in history)
    again, read = run(checkpoint=tmp_path / "run")  # finished: only read
    assert same(again, net) and [h.resumed_from for h in read.values()] == [3, 3]


@forked
def test_kill_minus_nine_in_the_second_stage(whole, tmp_path):
    run, net, _ = whole("plain")
    assert ended(start(killed_in_the_second_stage, run, tmp_path / "run")) == -signal.SIGKILL
    found, history = run(checkpoint=tmp_path / "run")
    assert same(found, net) and history["triplets"].resumed_from == 1


def killed_in_the_second_stage(run, path) -> None:
    real, seen = triplets.metric_terms, itertools.count()
    triplets.metric_terms = lambda *a: real(*a) if next(seen) != 3 else os.kill(os.getpid(), signal.SIGKILL)
    run(checkpoint=path)


@pytest.mark.parametrize(("where", "call", "told"), [((pretraining, "pretrain_terms"), 7, {"pretraining": 2, "triplets": None}), ((triplets, "metric_terms"), 5, {"pretraining": 3, "triplets": 2})])
def test_an_interruption_loses_at_most_the_epoch_it_came_in(where, call, told, toy, tmp_path, monkeypatch):
    model = new(7, **LONGER)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_in_call(patch, *where, call, KeyboardInterrupt)
        model.fit(toy.tables, toy.embeddings, checkpoint=tmp_path / "run")
    one_line(lambda: model.net, "not fitted")
    rows = {stage: (tmp_path / f"run-{stage}.log.jsonl") for stage in told}
    assert {stage: path.read_text().count("\n") if path.exists() else None for stage, path in rows.items()} == told
    assert same(model.fit(toy.tables, toy.embeddings, checkpoint=tmp_path / "run").net, fit(toy.tables, toy.embeddings, 7, LONGER, batch_key=None).net)


def other(pair, what: str):
    "The same species but for one thing."
    s, rest = pair
    X, labels, batch, vectors, genes = s.counts.copy(), s.labels.copy(), s.batch.copy(), s.vectors.copy(), s.genes.copy()
    X.data[5] += 1
    labels[3], batch[3], vectors[2, 1], genes[0] = "other", 1 - batch[3], vectors[2, 1] + 1e-3, "other"
    own = {"count": {"counts": X}, "label": {"labels": labels}, "no labels": {"labels": None}, "batch": {"batch": batch}, "vector": {"vectors": vectors}, "gene": {"genes": genes},
           "cell": {"counts": s.counts[:-1], "labels": s.labels[:-1], "batch": s.batch[:-1], "cells": s.cells[:-1]}}
    return (dataclasses.replace(s, **own[what]), rest) if what in own else (pair[::-1] if what == "order" else pair)


@pytest.mark.parametrize(("what", "gone"), [*((what, "none") for what in ("count", "label", "no labels", "batch", "vector", "gene", "cell", "order", "seed", "setting")), ("count", "pretraining"), ("label", "pretraining")])
def test_a_checkpoint_of_other_data_or_settings_is_refused_in_either_stage(what, gone, pair, checkpoints, tmp_path):
    for path in checkpoints.iterdir():
        if gone not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = config(**{"triplets.margin": 0.3} if what == "setting" else {})
    one_line(lambda: fit_stages(other(pair, what), settings, seed=int(what == "seed"), checkpoint=tmp_path / "run"), "was written by a run with another")


@pytest.fixture(scope="module")
def checkpoints(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    fit_stages(pair, config(), checkpoint=folder / "run")
    return folder


def test_a_checkpoint_does_not_ask_for_the_same_progress_bar(toy, tmp_path, capsys):
    for progress in (False, True):
        Saturn(profile="smoke", progress=progress, **TINY).fit(toy.tables, toy.embeddings, checkpoint=tmp_path / "run")


def test_a_checkpoint_of_the_second_stage_is_not_read_for_another_network(pair, tmp_path):
    nets = [first_stage(pair, config(), seed=seed)[0] for seed in (0, 1)]
    second_stage(nets[0], pair, config(), checkpoint=tmp_path / "run")
    one_line(lambda: second_stage(nets[1], pair, config(), checkpoint=tmp_path / "run"), "another")


def surroundings() -> tuple:
    draws = random.getstate(), tuple(map(str, np.random.get_state())), torch.get_rng_state().tolist()
    return (draws, torch.get_num_threads(), [p["num_threads"] for p in threadpool_info()], list(warnings.filters), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ), np.geterr(),
            torch.are_deterministic_algorithms_enabled(), logging.getLogger().level, os.getcwd())


def test_nothing_outside_is_changed_and_nothing_outside_matters(toy, pair, model, tmp_path):
    plain_embedding("macrogenes_harmony", pair, n=10, dim=3)  # what is imported late is imported
    before = surroundings()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    seeded = surroundings()
    made = fit(toy.tables, toy.embeddings)
    found = integrate(load(save(made, tmp_path / "m")), toy.tables)
    transfer_labels(found, "human", "mouse"), transfer_labels(found, "human", "mouse", how="logistic")
    for method in PLAIN:
        plain_embedding(method, pair, orthologues=toy.orthologues, n=10, dim=3)
    assert surroundings() == seeded and seeded[1:] == before[1:] and same(made.net, model.net)


def snapshot(toy) -> str:
    parts = [(t.X, t.obs_names.to_numpy(str), t.var_names.to_numpy(str), *(t.obs[c] for c in t.obs), *(t.var[c] for c in t.var), sorted(t.uns), sorted(t.obsm), sorted(t.layers)) for t in toy.tables.values()]
    return content_digest(*(list(p) for p in parts), *(e.vectors for e in toy.embeddings.values()), *(list(e.genes) for e in toy.embeddings.values()), *(toy.orthologues[c] for c in toy.orthologues))


def test_what_is_given_is_not_changed(toy, pair, model):
    before, species = snapshot(toy), content_digest(*(list(dataclasses.asdict(s).values())[1:7] for s in pair))
    start = bits(model.net)
    fit(toy.tables, toy.embeddings), integrate(model, toy.tables), fit_stages(pair, config())
    plain_embedding("orthologues", pair, orthologues=toy.orthologues), plain_embedding("random", pair, n=10)
    learn_metric(model.net, dealt(pair, model.config.pretrain), [s.vectors for s in pair], how(unfreeze=True, **{"train.progress": False}))
    assert snapshot(toy) == before and content_digest(*(list(dataclasses.asdict(s).values())[1:7] for s in pair)) == species
    assert same(list(start.values()), list(bits(model.net).values())) and not model.net.training


# what labels may do -----------------------------------------------------------------------------------------------------


def swapped(labels, seed: int = 0) -> list[str]:
    "The labels under each other's names."
    names = sorted(set(labels))
    return [dict(zip(names, names[1:] + names[:1]))[label] for label in labels]


@pytest.mark.parametrize("settings", [{}, {"pretrain.balanced": True, "triplets.mining": "random", "triplets.even": True}, {"triplets.unfreeze": True, "triplets.distance": "snr"}])
@pytest.mark.parametrize("rename", [swapped, lambda labels: [f"{label} (mouse)" for label in labels]])
def test_words_are_never_matched_across_species(rename, settings, toy, fitted):
    other = changed(toy.tables, "mouse", cell_type=rename(toy.tables["mouse"].obs["cell_type"].tolist()))
    assert same(fit(other, toy.embeddings, settings=settings).net, fitted(**settings).net)


def test_but_with_pairs_by_label_they_are(toy, fitted):
    settings = {"triplets.pairs": "label"}
    words = toy.tables["mouse"].obs["cell_type"].tolist()
    together = changed(changed(toy.tables, "mouse", cell_type=[f"x{w}" for w in words]), "human", cell_type=[f"x{w}" for w in toy.tables["human"].obs["cell_type"]])
    assert not same(fit(changed(toy.tables, "mouse", cell_type=swapped(words)), toy.embeddings, settings=settings).net, fitted(**settings).net)
    assert same(fit(together, toy.embeddings, settings=settings).net, fitted(**settings).net)


def test_labels_dealt_to_other_cells_change_the_second_stage_and_nothing_of_the_first(toy, fitted):
    words = np.random.default_rng(0).permutation(toy.tables["mouse"].obs["cell_type"].to_numpy())
    other = lambda **settings: fit(changed(toy.tables, "mouse", cell_type=words), toy.embeddings, settings=settings).net
    assert moved(other(), fitted().net) == {"encoder"}
    assert same(other(**{"triplets.train.epochs": 0}), fitted(**{"triplets.train.epochs": 0}).net)
    balanced = {"triplets.train.epochs": 0, "pretrain.balanced": True}
    assert "macrogenes" in moved(other(**balanced), fitted(**balanced).net)


def test_unlabelled_cells_are_neither_anchors_nor_negatives(toy, monkeypatch):
    words = toy.tables["mouse"].obs["cell_type"].astype(object)
    blank = words.where(np.arange(60) % 3 > 0, None)
    seen, real = [], CrossSpeciesMiner.triplets

    def spy(self, z, species, labels, rng, guide=None):
        a, p, n = real(self, z, species, labels, rng, guide)
        seen.append((species, labels, a, p, n))
        return a, p, n

    monkeypatch.setattr(CrossSpeciesMiner, "triplets", spy)
    made = [fit(changed(toy.tables, "mouse", cell_type=blank.fillna(value)), toy.embeddings).net for value in ("  ", UNLABELLED)] + [fit(changed(toy.tables, "mouse", cell_type=blank), toy.embeddings).net]
    assert all(same(made[0], net) for net in made) and len(seen) == 12
    for species, labels, a, p, n in seen:
        assert (labels[species == 0] >= 0).all() and (labels[species == 1] < 0).any() and len(a)
        assert (labels[a] >= 0).all() and (labels[n] >= 0).all() and (labels[a] != labels[n]).all() and (species[a] == species[n]).all() and (species[a] != species[p]).all()


def test_cells_of_a_species_without_labels_are_positives_only(toy, pair, monkeypatch):
    seen, real = [], CrossSpeciesMiner.triplets
    monkeypatch.setattr(CrossSpeciesMiner, "triplets", lambda self, z, species, *rest: seen.append([species[t].unique().tolist() for t in real(self, z, species, *rest)]) or real(self, z, species, *rest))
    half = [pair[0], dataclasses.replace(pair[1], labels=None)]
    net, history = fit_stages(half, config())
    assert all(found == [[0], [1], [0]] for found in seen) and len(seen) == 4 and history["triplets"].rows[0]["triplets"] > 0
    first, _ = first_stage(half, config())
    assert moved(first, net) == {"encoder"}


def test_a_species_without_labels_may_get_clusters_of_its_own_embedding(toy, pair, monkeypatch):
    asked, real = [], triplets.learn_metric
    monkeypatch.setattr(triplets, "learn_metric", lambda net, cells, *rest, **more: asked.append((net, cells)) or real(net, cells, *rest, **more))
    del (tables := {k: t.copy() for k, t in toy.tables.items()})["mouse"].obs["cell_type"]
    with pytest.warns(GearsWarning, match="mouse: there is no obs\\['cell_type'\\]"):
        model = fit(tables, toy.embeddings, settings={"triplets.clusters": 5})
    (net, cells), = asked
    assert np.array_equal(cells.labels[0], pair[0].labels) and np.array_equal(cells.labels[1], np.char.add("mouse ", clustered(embedded(net, cells, 1)[1], 5))) and len(set(cells.labels[1])) == 5
    found = integrate(model, tables)
    assert set(found.obs["cell_type"][60:]) == {UNLABELLED} and found.obs["cell_type"].tolist()[:60] == pair[0].labels.tolist()
    assert set(transfer_labels(found, "human", "mouse")["label"]) <= set(pair[0].labels)
    one_line(lambda: transfer_labels(found, "mouse", "human"), "mouse has 0 labelled cells")


def test_without_any_labels_there_is_no_second_stage_or_there_are_clusters(toy, fitted):
    with pytest.warns(GearsWarning, match="no species has labels, so there is no second stage"):
        model = fit(toy.tables, toy.embeddings, label_key=None)
    assert set(model.history) == {"pretraining"} and same(model.net, fitted(**{"triplets.train.epochs": 0}).net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fit(toy.tables, toy.embeddings, settings=CLUSTERS, label_key=None)
        assert set(integrate(model, toy.tables).obs["cell_type"]) == {UNLABELLED} and set(model.history) == {"pretraining", "triplets"}
    bare = {k: AnnData(t.X, obs=t.obs[["batch"]], var=t.var) for k, t in toy.tables.items()}
    assert same(fit(bare, toy.embeddings, settings=CLUSTERS, label_key=None).net, model.net)


CLUSTERS = {"triplets.clusters": 5}


def test_a_column_without_any_label_is_no_column(toy):
    blank = changed(toy.tables, "mouse", cell_type="")
    none = {"human": toy.tables["human"], "mouse": AnnData(toy.tables["mouse"].X, obs=toy.tables["mouse"].obs[["batch"]], var=toy.tables["mouse"].var)}
    with pytest.warns(GearsWarning):
        bare = fit(none, toy.embeddings, settings=CLUSTERS)
    assert same(fit(blank, toy.embeddings, settings=CLUSTERS).net, bare.net)


def test_a_second_stage_without_labels_is_said(toy, fitted):
    with pytest.warns(GearsWarning, match="no species has labels, so there is no second stage"):
        model = fit(changed(changed(toy.tables, "mouse", cell_type=""), "human", cell_type=""), toy.embeddings)
    assert set(model.history) == {"pretraining"} and same(model.net, fitted(**{"triplets.train.epochs": 0}).net)


LABEL = {"triplets.pairs": "label"}
IDLE = {"no word in common": lambda t: changed(t, "mouse", cell_type=[f"x{w}" for w in t["mouse"].obs["cell_type"]]), "one species unlabelled": lambda t: changed(t, "mouse", cell_type=""),
        "only unlabelled in common": lambda t: changed(t, "mouse", cell_type=np.where(np.arange(60) % 2, UNLABELLED, "x"))}


@pytest.mark.parametrize("clusters", [0, 5])
@pytest.mark.parametrize("make", IDLE.values(), ids=IDLE)
def test_pairs_by_label_want_a_word_that_two_species_share(make, clusters, toy):
    settings = LABEL | {"triplets.clusters": clusters, "pretrain.train.epochs": 0}
    one_line(lambda: fit(make(toy.tables), toy.embeddings, settings=settings), "triplets.pairs: is label, and no word")


def test_clusters_alone_are_no_words_that_species_share(toy):
    one_line(lambda: fit(toy.tables, toy.embeddings, settings=CLUSTERS | LABEL, label_key=None), "triplets.pairs: is label, and no word")


def test_clusters_are_not_matched_by_their_number_beside_species_with_labels(pair, monkeypatch):
    seen, real = set(), CrossSpeciesMiner.triplets
    four = [dataclasses.replace(s, name=f"{s.name} {i}", labels=s.labels if i < 2 else None) for i, s in enumerate([*pair, *pair])]

    def spy(self, z, species, labels, rng, guide=None):
        a, p, n = real(self, z, species, labels, rng, guide)
        seen.update(zip(species[a].tolist(), species[p].tolist()))
        return a, p, n

    monkeypatch.setattr(CrossSpeciesMiner, "triplets", spy)
    fit_stages(four, config(**LABEL | {"triplets.clusters": 3, "triplets.mining": "all", "pretrain.train.epochs": 0}))
    assert seen == {(0, 1), (1, 0)}


@pytest.mark.parametrize(("seed", "labelled"), [(0, False), (2**32 - 1, False), (2**32 - 1, True)])
def test_seeds_of_a_fit_are_any_whole_numbers_of_32_bits(seed, labelled, toy):
    made = fit(toy.tables, toy.embeddings, seed, CLUSTERS, label_key="cell_type" if labelled else None)
    assert made.seed == seed and set(made.history) == {"pretraining", "triplets"}


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "0", None])
def test_other_seeds_are_refused_before_there_is_a_fit(seed):
    one_line(lambda: new(seed), "seed: is .*whole number from 0 to 2\\*\\*32 - 1")


# species, batches, stages -----------------------------------------------------------------------------------------------


def test_three_species_and_any_of_them_again(three):
    model = fit(three.tables, three.embeddings)
    all_three = integrate(model, three.tables)
    assert list(model.genes) == list(three.tables) == list(all_three.obs["species"].unique()) and all_three.n_obs == 150 and len(model.net.zeros) == 3
    part = integrate(model, {name: three.tables[name] for name in ("fish", "human")})
    assert same([part.obsm["X_saturn"]], [np.concatenate([all_three.obsm["X_saturn"][100:], all_three.obsm["X_saturn"][:50]])])
    assert set(part.varm) == {"weights_fish", "weights_human"} and set(part.uns["saturn"]["genes"]) == {"fish", "human"}
    twice = fit({**three.tables, "mouse": three.tables["fish"]}, {**three.embeddings, "mouse": three.embeddings["fish"]})
    assert twice.net.species == 3 and same([weights(twice, "mouse").shape], [weights(twice, "fish").shape])


def test_triplets_join_each_two_of_three_species(three, monkeypatch):
    seen, real = set(), CrossSpeciesMiner.triplets

    def spy(self, z, species, labels, rng, guide=None):
        a, p, n = real(self, z, species, labels, rng, guide)
        seen.update(zip(species[a].tolist(), species[p].tolist()))
        return a, p, n

    monkeypatch.setattr(CrossSpeciesMiner, "triplets", spy)
    fit(three.tables, three.embeddings, settings={"triplets.train.epochs": 6})
    assert seen == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_batches_are_told_to_the_decoder_and_to_nobody_else(toy, pair, model):
    cells = dealt(pair, model.config.pretrain)
    assert [sorted(set(b.tolist())) for b in cells.batch] == [[0, 1], [2, 3]] and model.net.batches == 4
    alone = fit(toy.tables, toy.embeddings, batch_key=None)
    assert alone.net.batches == 2 and alone.net.decoder[0].in_features == 4 + 2 + 2
    renamed = changed(changed(toy.tables, "human", batch=[f"x{b}" for b in toy.tables["human"].obs["batch"]]), "mouse", batch=[f"y{b}" for b in toy.tables["mouse"].obs["batch"]])
    assert same(fit(renamed, toy.embeddings).net, model.net)
    mixed = changed(toy.tables, "mouse", batch=np.random.default_rng(0).permutation(toy.tables["mouse"].obs["batch"].to_numpy()))
    assert not same(fit(mixed, toy.embeddings).net, model.net)
    assert same([integrate(model, mixed).obsm["X_saturn"]], [integrate(model, toy.tables).obsm["X_saturn"]])
    unknown = integrate(model, changed(toy.tables, "mouse", batch="another"))
    assert set(unknown.obs["batch"][60:]) == {"another"} and same([unknown.obsm["X_saturn"]], [integrate(model, toy.tables).obsm["X_saturn"]])


@pytest.mark.parametrize("settings", [{}, {"triplets.unfreeze": True}, {"triplets.reconstruction": 1.0}])
def test_frozen_macrogenes_are_frozen_in_both_stages(settings, pair):
    settings = config(**{"pretrain.frozen": True, "pretrain.l1_weight": 1.0} | settings)
    start, (net, _) = network(pair, settings), fit_stages(pair, settings)
    assert moved(start, net) == {"encoder", "decoder", "levels", "zeros", "dispersion", "protein"}


STAGES = {"kept": ({}, {"encoder"}), "unfrozen": ({"triplets.unfreeze": True}, {"encoder", "macrogenes"}),
          "reconstructed": ({"triplets.reconstruction": 1.0}, {"encoder", "macrogenes", "decoder", "levels", "zeros", "dispersion", "protein"})}


@pytest.mark.parametrize(("settings", "told"), STAGES.values(), ids=STAGES)
def test_the_second_stage_moves_what_it_is_said_to_move(settings, told, pair):
    first, _ = fit_stages(pair, config(**{"triplets.train.epochs": 0} | settings))
    second, history = fit_stages(pair, config(**settings))
    assert moved(first, second) == told and ("reconstruction" in history["triplets"].rows[0]) == ("triplets.reconstruction" in settings)


def test_no_epochs_in_a_stage_are_no_stage(toy, pair, fitted, model, monkeypatch):
    only_first, only_second, none = ({f"{stage}.train.epochs": 0 for stage in stages} for stages in (["triplets"], ["pretrain"], ["pretrain", "triplets"]))
    assert [set(fitted(**s).history) for s in (only_first, only_second, none)] == [{"pretraining"}, {"triplets"}, set()]
    start = network(pair, model.config)
    assert all(map(torch.equal, start.parameters(), fitted(**none).net.parameters()))
    centre(start, dealt(pair, model.config.pretrain))
    assert same(fitted(**none).net, start) and moved(fitted(**only_second).net, start) == {"encoder"}
    assert fitted(**only_first).history["pretraining"] and strip(fitted(**only_first).history["pretraining"]) == strip(model.history["pretraining"])
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    assert same(fit(toy.tables, toy.embeddings, settings=only_first).net, fitted(**only_first).net)  # needs no library
    one_line(lambda: fit(toy.tables, toy.embeddings), "pytorch-metric-learning is not installed.*pip install")


def test_macrogenes_start_as_the_nearest_of_every_gene_and_training_moves_them(pair, model):
    start = network(pair, model.config)
    for s, own in enumerate(pair):
        W, moved_to = start.macrogenes.weights(s).toarray(), weights(model, own.name).toarray()
        np.testing.assert_allclose(np.sort(W, 1)[:, ::-1][:, :6], np.tile(1 / np.arange(1, 7), (own.g, 1)), rtol=1e-5)
        assert W.shape == (own.g, 12) and np.array_equal(W > 0, moved_to > 0) and not np.allclose(W, moved_to)
    assert model.genes["mouse"].tolist() == pair[1].genes.tolist()


CENTRED = {"untrained": ({"pretrain.train.epochs": 0, "triplets.train.epochs": 0}, 1e-4), "pretrained": ({"triplets.train.epochs": 0}, 1e-4), "best epoch": ({"pretrain.train.epochs": 4, "pretrain.train.patience": 1}, 1e-4), "both stages": ({}, 1e-4),
           "unfrozen": ({"triplets.unfreeze": True}, 1e-4), "reconstructed": ({"triplets.reconstruction": 1.0}, 1e-4)}


@pytest.mark.parametrize(("settings", "close"), CENTRED.values(), ids=CENTRED)
def test_centred_values_have_mean_0_and_deviation_1_over_the_cells_of_a_species(settings, close, pair, fitted):
    net = fitted(**settings).net
    for s, own in enumerate(pair):
        with torch.no_grad():
            values = net.encoder.centre[s](net.encoder.norm(net.values(torch.from_numpy(own.counts.toarray()), s)))
        assert values.mean(0).abs().max() < close and (values.std(0, unbiased=False) - 1).abs().max() < close


SMALL = {"120 beside 5": (120, 5, {"pretrain.batch": 16}), "120 beside 5, second stage": (120, 5, {"triplets.batch": 16, "pretrain.train.epochs": 0}),
         "two cells": (60, 2, {}), "one cell": (60, 1, {}), "a cell a step": (20, 20, {"pretrain.batch": 1}), "60 beside 5, not centred": (60, 5, {"pretrain.batch": 8, "pretrain.centred": False})}


@pytest.mark.parametrize(("n", "m", "settings"), SMALL.values(), ids=SMALL)
def test_a_small_species_beside_a_large_one_is_learned(n, m, settings):
    made = simulate_species(n_cells=n, n_genes=60, n_programs=8, n_types=3, seed=0)
    tables = {"human": made.tables["human"], "mouse": made.tables["mouse"][:m].copy()}
    model = fit(tables, made.embeddings, settings=settings)
    assert all(np.isfinite(v).all() for v in bits(model.net).values()) and np.isfinite(integrate(model, tables).obsm["X_saturn"]).all()
    assert all(np.isfinite(row["loss"]) for rows in model.history.values() for row in rows)


NO_TERM = {"pretrain.likelihood": "none", "pretrain.similarity_weight": 0.0}


def test_settings_that_leave_nothing_to_learn_are_refused(toy, fitted):
    one_line(lambda: fit(toy.tables, toy.embeddings, settings=NO_TERM), "pretrain.likelihood: is none.*nothing to learn")
    assert set(fitted(**NO_TERM | {"pretrain.train.epochs": 0}).history) == {"triplets"} and set(fitted(**NO_TERM | {"pretrain.l1_weight": 1.0}).history) == {"pretraining", "triplets"}


STOPS = {"frozen weights of which only the mean is a term": NO_TERM | {"pretrain.l1_weight": 1.0, "pretrain.frozen": True}, "no term to put beside the triplets": NO_TERM | {"pretrain.train.epochs": 0, "triplets.reconstruction": 1.0},
         "steps without a cell": {"pretrain.batch": 1, "pretrain.similarity_weight": 0.0}}


@pytest.mark.parametrize("settings", STOPS.values(), ids=STOPS)
def test_losses_without_a_term_are_refused_or_skipped(settings, toy):
    refused(lambda: fit({name: t[:15].copy() for name, t in toy.tables.items()}, toy.embeddings, settings=settings))


# one table --------------------------------------------------------------------------------------------------------------


def test_the_table_holds_what_the_network_makes(model, both, toy):
    assert both.obs_names.tolist() == [f"{k}/{c}" for k, t in toy.tables.items() for c in t.obs_names] and both.var_names[0] == "macrogene 0"
    for s, (name, table) in enumerate(toy.tables.items()):
        own = both[both.obs["species"] == name]
        order = table.var_names.get_indexer(model.genes[name])
        np.testing.assert_allclose(own.X, np.log1p(counts(table))[:, order] @ weights(model, name).toarray(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(own.obsm["X_saturn"], np_embed(model.net, counts(table)[:, order], s), atol=5e-5)
        assert (both.varm[f"weights_{name}"].T != weights(model, name)).nnz == 0 and both.uns["saturn"]["genes"][name].tolist() == model.genes[name].tolist()
        assert [own.obs[c].tolist() for c in ("barcode", "cell_type", "batch")] == [table.obs_names.tolist(), table.obs["cell_type"].tolist(), table.obs["batch"].tolist()]


FORMS = {"dense": lambda t, X, f: AnnData(X, t.obs, t.var), "whole numbers": lambda t, X, f: AnnData(X.astype(np.int64), t.obs, t.var), "sparse whole": lambda t, X, f: AnnData(sp.csr_matrix(X.astype(np.int32)), t.obs, t.var),
         "by column": lambda t, X, f: AnnData(sp.csc_matrix(X), t.obs, t.var), "double": lambda t, X, f: AnnData(sp.csr_matrix(X.astype(float)), t.obs, t.var), "view": lambda t, X, f: t[:, :],
         "backed": lambda t, X, f: (t.write_h5ad(f), read_h5ad(f, backed="r"))[1],
         "other genes": lambda t, X, f: AnnData(np.c_[X, X[:, :5] + 1], t.obs, pd.DataFrame(index=[*t.var_names, *(f"new{i}" for i in range(5))])), "other order": lambda t, X, f: t[:, ::-1]}


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_every_form_give_the_same(form, model, both, toy, tmp_path):
    tables = {name: FORMS[form](t, counts(t), tmp_path / f"{name}.h5ad") for name, t in toy.tables.items()}
    found = integrate(model, tables)
    assert same([found.X, found.obsm["X_saturn"]], [both.X, both.obsm["X_saturn"]]) and found.obs.equals(both.obs)
    if form == "backed":
        assert all(t.isbacked and np.array_equal(t.X[:].toarray(), counts(toy.tables[name])) for name, t in tables.items())
    if form in ("whole numbers", "by column", "backed"):
        assert same(fit(tables, toy.embeddings).net, model.net)


@given(seeds)
def test_integration_follows_the_order_of_cells_and_asks_nobody_for_company(model, both, toy, seed):
    rows = np.random.default_rng(seed).permutation(60)[: 1 + seed % 60]
    found = integrate(model, {"mouse": toy.tables["mouse"][rows]})
    np.testing.assert_allclose(found.obsm["X_saturn"], both.obsm["X_saturn"][60:][rows], atol=2e-6)
    np.testing.assert_allclose(found.X, both.X[60:][rows], rtol=1e-5)
    assert found.obs_names.tolist() == both.obs_names[60:][rows].tolist()


def test_missing_genes_count_as_zeros_until_they_are_most(model, toy):
    table = toy.tables["human"]
    with pytest.warns(GearsWarning, match="human: 20 of the model's 80 genes are missing"):
        found = integrate(model, {"human": table[:, 20:]})
    X = counts(table)
    X[:, :20] = 0
    assert same([found.obsm["X_saturn"]], [integrate(model, {"human": AnnData(X, table.obs, table.var)}).obsm["X_saturn"]])
    one_line(lambda: integrate(model, {"human": table[:, 45:]}), "human: var_names.*45 of the model's 80 genes are missing")
    one_line(lambda: integrate(model, {"human": toy.tables["mouse"]}), "80 of the model's 80 genes are missing")
    one_line(lambda: integrate(model, {"rat": table}), "'rat' was not among those fitted.*choose one of human, mouse")
    one_line(lambda: integrate(new(), toy.tables), "not fitted")
    one_line(lambda: integrate(model, {"human": AnnData(np.log1p(counts(table)), table.obs, table.var)}), "human: X.*not whole numbers")


def test_cells_without_counts_are_left_out_aloud(model, both, toy):
    X = counts(toy.tables["mouse"])
    X[[3, 7]] = 0
    table = AnnData(X, toy.tables["mouse"].obs, toy.tables["mouse"].var)
    with pytest.warns(GearsWarning, match="mouse: 2 of 60 cells have no counts"):
        found = integrate(model, {"mouse": table})
    stay = np.delete(np.arange(60), [3, 7])
    assert found.obs_names.tolist() == both.obs_names[60:][stay].tolist() and found.obs["cell_type"].tolist() == both.obs["cell_type"][60:].iloc[stay].tolist()
    np.testing.assert_allclose(found.obsm["X_saturn"], both.obsm["X_saturn"][60:][stay], atol=2e-6)
    one_line(lambda: integrate(model, {"mouse": AnnData(0 * X, table.obs, table.var)}), "none of the 60 cells")


def test_the_table_can_be_written_read_and_used_by_scanpy(both, tmp_path):
    scanpy = pytest.importorskip("scanpy")
    both.write_h5ad(tmp_path / "both.h5ad")
    back = read_h5ad(tmp_path / "both.h5ad")
    assert same([back.X, back.obsm["X_saturn"]], [both.X, both.obsm["X_saturn"]]) and back.obs.equals(both.obs) and back.uns["saturn"]["settings"] == both.uns["saturn"]["settings"]
    assert all((back.varm[k] != both.varm[k]).nnz == 0 for k in both.varm) and back.uns["saturn"]["genes"]["human"].tolist() == both.uns["saturn"]["genes"]["human"].tolist()
    pd.testing.assert_frame_equal(transfer_labels(back, "human", "mouse"), transfer_labels(both, "human", "mouse"))
    scanpy.pp.neighbors(back, n_neighbors=5, use_rep="X_saturn", method="gauss", transformer="sklearn")
    assert back.obsp["connectivities"].shape == (120, 120)


def test_a_slash_in_the_name_of_a_species_is_refused(toy):
    tables, embeddings = ({"C57BL/6": d["mouse"], "human": d["human"]} for d in (toy.tables, toy.embeddings))
    one_line(lambda: fit(tables, embeddings), "C57BL/6.*'/'")  # anndata would write such a key and could not read it


def test_labels_are_carried_to_every_cell_of_the_target(both):
    for kind in ("knn", "logistic"):
        told = transfer_labels(both, "human", "mouse", how=kind)
        assert told.index.tolist() == both.obs_names[60:].tolist() and list(told) == ["label", "uncertainty", "distance"] and told["uncertainty"].between(0, 1).all()
        assert set(told["label"]) <= set(both.obs["cell_type"][:60])
    hidden = both.copy()
    hidden.obs["cell_type"] = np.where(np.arange(120) % 2, both.obs["cell_type"].astype(str), UNLABELLED)
    only = both[np.r_[1:60:2, 60:120]].copy()
    pd.testing.assert_frame_equal(transfer_labels(hidden, "human", "mouse"), transfer_labels(only, "human", "mouse"))  # target labels are not read
    one_line(lambda: transfer_labels(both, "human", "rat"), "rat 0 cells.*species are human, mouse")
    one_line(lambda: transfer_labels(both, "human", "mouse", how="magic"), "'magic'")


NOT_MEANT = {"no table": (lambda m, b, t: integrate(m, {})), "a list": (lambda m, b, t: integrate(m, list(t.values()))), "None": (lambda m, b, t: integrate(m, {"human": None})),
             "another column": (lambda m, b, t: transfer_labels(b, "human", "mouse", label_key="type")), "another space": (lambda m, b, t: transfer_labels(b, "human", "mouse", use="X_pca")),
             "not integrated": (lambda m, b, t: transfer_labels(t["human"], "human", "mouse")), "a profile in place of settings": (lambda m, b, t: Saturn("smoke"))}


@pytest.mark.parametrize("call", NOT_MEANT.values(), ids=NOT_MEANT)
def test_calls_that_cannot_be_meant_are_an_input_error_in_a_line(call, model, both, toy):
    one_line(lambda: call(model, both, toy.tables))


# kept models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("model"))


ELSEWHERE = """
import pickle, sys
import numpy as np, torch
from anndata import read_h5ad
from gears_nb.saturn.saturn import integrate, load
def refuse(*a, **k): raise SystemExit("a pickle was read")
pickle.load = pickle.loads = torch.load = refuse
both = integrate(load(sys.argv[1]), {"mouse": read_h5ad(sys.argv[2])})
np.savez(sys.argv[3], X=both.X, H=both.obsm["X_saturn"])
"""


def test_a_saved_model_gives_the_same_bits_in_another_process(folder, both, toy, tmp_path):
    toy.tables["mouse"].write_h5ad(tmp_path / "mouse.h5ad")
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "mouse.h5ad"), str(tmp_path / "out.npz")], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as out:
        assert same([out["X"], out["H"]], [both.X[60:], both.obsm["X_saturn"][60:]])


SHAPES = {"vae": {"pretrain.vae": True}, "not centred": {"pretrain.centred": False}, "frozen": {"pretrain.frozen": True}, "one macrogene each": {"scores": "one_hot", "start": "sample"},
          "unfrozen": {"triplets.unfreeze": True}, "no stages": {"pretrain.train.epochs": 0, "triplets.train.epochs": 0}}


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_models_of_every_shape_come_back(settings, fitted, toy, tmp_path):
    model = fitted(**settings)
    back = load(save(model, tmp_path / "deep" / "model"))
    assert same(back.net, model.net) and back.history == model.history and back.seed == model.seed and back.genes.keys() == model.genes.keys()
    assert same(list(back.genes.values()), list(model.genes.values())) and (weights(back, "mouse") != weights(model, "mouse")).nnz == 0
    one, two = integrate(back, toy.tables), integrate(model, toy.tables)
    assert same([one.obsm["X_saturn"], one.X], [two.obsm["X_saturn"], two.X]) and one.obs.equals(two.obs) and not back.net.training
    assert load(save(back, tmp_path / "again")).history == model.history


def test_another_model_in_the_same_folder_takes_its_place(fitted, tmp_path):
    save(fitted(), tmp_path), save(fitted(seed=1), tmp_path)
    assert load(tmp_path).seed == 1 and same(load(tmp_path).net, fitted(seed=1).net)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_no_file_is_a_pickle_and_none_is_read(folder, monkeypatch):
    for path in folder.iterdir():
        with open(path, "rb") as file, pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError, UnicodeDecodeError, AttributeError, ImportError)):
            pickle.load(file)
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a pickle was read"))
    assert load(folder).net is not None


def edited(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"no weights": (lambda j, t: t.unlink(), "is missing"), "half of the weights": (lambda j, t: t.write_bytes(t.read_bytes()[: t.stat().st_size // 2]), "digest"), "a bit": (lambda j, t: flipped(t), "digest"),
          "no weights left": (lambda j, t: t.write_bytes(b""), "digest"), "pickle in place of weights": (lambda j, t: t.write_bytes(pickle.dumps([1])), "digest"), "no record": (lambda j, t: j.unlink(), "holds no saved Saturn"),
          "half of the record": (lambda j, t: j.write_text(j.read_text()[:200]), "not readable"), "binary record": (lambda j, t: j.write_bytes(b"\xff\xfe\x00"), "not readable"), "a list": (lambda j, t: j.write_text("[]"), "not readable"),
          "another seed": (lambda j, t: edited(j, lambda r: r["meta"].update(seed=5)), "edited"), "another setting": (lambda j, t: edited(j, lambda r: r["meta"]["config"].update(macrogenes=5)), "edited"),
          "another gene": (lambda j, t: edited(j, lambda r: r["meta"]["species"][0]["genes"].reverse()), "edited"), "another store": (lambda j, t: edited(j, lambda r: r.update(format=1)), "format")}


@pytest.mark.parametrize(("damage", "hint"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_edited_models_are_refused_in_a_line(damage, hint, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / "saturn.json", next(tmp_path.glob("*.safetensors")))
    one_line(lambda: load(tmp_path), hint)


def test_models_of_another_version_and_folders_without_one_are_refused(folder, tmp_path):
    state, about = Store(folder).load("saturn")
    Store(tmp_path).save("saturn", state, about | {"format": SATURN_FORMAT + 1})
    one_line(lambda: load(tmp_path), f"format: is {SATURN_FORMAT + 1}")
    Store(tmp_path).save("saturn", state, about | {"format": 1})  # weights without a rate: they would be read as their tenth powers
    one_line(lambda: load(tmp_path), "format: is 1, this version reads 2")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        one_line(lambda path=path: load(path), "holds no saved Saturn")
    one_line(lambda: save(load(folder), tmp_path / "file"), "cannot be written")
    Store(tmp_path).save("saturn", state, about | {"config": about["config"] | {"colour": 3}})
    one_line(lambda: load(tmp_path), "colour")


def test_a_model_that_is_not_fitted_is_not_saved(tmp_path):
    one_line(lambda: save(new(), tmp_path), "not fitted")


def test_settings_come_back_as_they_were(folder, model, both, toy):
    assert load(folder).config == model.config and integrate(load(folder), toy.tables).uns["saturn"]["settings"] == both.uns["saturn"]["settings"]


def test_settings_that_are_given_as_a_whole_stay():
    assert Saturn(config()).config == config()


def test_a_model_with_a_vanished_weight_comes_back(toy, tmp_path):
    model = fit(toy.tables, toy.embeddings)
    with torch.no_grad():
        model.net.macrogenes.log_weights[0][0] = -120.0
    assert same(load(save(model, tmp_path)).net, model.net)


def test_what_the_page_and_the_remedy_say_can_be_called():
    page = json.loads((Path(__file__).parents[1] / "nbs" / "saturn" / "07_saturn.ipynb").read_text())
    text = "".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")
    with pytest.raises(InputError) as caught:
        _ = Saturn().net
    for name in ("integrate", "load"):
        assert hasattr(Saturn, name) or (f"model.{name}(" not in text and f"Saturn.{name}" not in str(caught.value))


# settings ---------------------------------------------------------------------------------------------------------------


WRONG = [({"macrogene": 3}, "did you mean 'macrogenes'"), ({"macrogenes": 0}, "macrogenes: is 0"), ({"macrogenes": 500}, "500 macrogenes of"), ({"keep": 0}, "keep"), ({"n_hvg": -1}, "n_hvg"), ({"start": "kmean"}, "start"),
         ({"scores": "best"}, "scores"), ({"pretrain.likelihood": "zimb"}, "choose one of zinb"), ({"pretrain.dropout": 1.5}, "outside"), ({"pretrain.vae": 1}, "vae"), ({"pretrain.kl_weight": -1.0}, "kl_weight"),
         ({"triplets.margin": 0}, "margin"), ({"triplets.margin": float("nan")}, "margin"), ({"triplets.mining": "easy"}, "mining"), ({"triplets.distance": "l2"}, "distance"), ({"triplets.warmup": 2}, "warmup"),
         ({"triplets.neighbours": 0}, "neighbours"), ({"triplets.batch": 1.5}, "batch"), ({"triplets.train.device": "tpu"}, "'tpu' is not available"), ({"pretrain.train.lr": 0}, "lr"), ({"profile": "smok"}, "profile")]


@pytest.mark.parametrize(("settings", "hint"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_settings_are_one_line(settings, hint, toy):
    one_line(lambda: Saturn(**{"profile": "smoke", "progress": False} | TINY | settings).fit(toy.tables, toy.embeddings), hint)


def test_settings_may_be_given_as_a_whole_and_changed(toy, model):
    given_whole = Saturn(config(), progress=False, **{"triplets.margin": 0.3})
    assert given_whole.config.triplets.margin == 0.3 and override(given_whole.config, {"triplets.margin": 0.2}) == model.config
    assert same(Saturn(config(), progress=False).fit(toy.tables, toy.embeddings, batch_key="batch").net, model.net)
    wrong = {"one species": ({"human": toy.tables["human"]}, toy.embeddings, "one species"), "no vectors": (toy.tables, {"human": toy.embeddings["human"]}, "there are none for mouse")}
    for tables, embeddings, hint in wrong.values():
        one_line(lambda t=tables, e=embeddings: fit(t, e), hint)
    one_line(lambda: fit(toy.tables, toy.embeddings, label_key="typ"), "no table has obs\\['typ'\\]")
    one_line(lambda: fit(toy.tables, toy.embeddings, checkpoint="with space/run 1"), "not a plain name")


# plain ways -------------------------------------------------------------------------------------------------------------


def named(*lists):
    return [types.SimpleNamespace(name=f"s{i}", genes=np.array(genes)) for i, genes in enumerate(lists)]


@given(seeds, st.integers(2, 3), st.integers(0, 25))
def test_shared_columns_by_force(seed, n, rows):
    rng = np.random.default_rng(seed)
    pools = [[f"{'abc'[s]}{i}" for i in range(12)] for s in range(n)]
    species = named(*(rng.permutation(pool)[:9] for pool in pools))
    table = pd.DataFrame({f"s{s}": rng.choice(np.array([*pool, None], object), rows) for s, pool in enumerate(pools)} | {"score": 1.0})
    before = table.copy()
    seen = [Counter(table[f"s{s}"].astype(str)) for s in range(n)]
    told = [r for r in table[[f"s{s}" for s in range(n)]].astype(str).to_numpy() if all(seen[s][g] == 1 and g in species[s].genes for s, g in enumerate(r))]
    if len(told) < 2:
        one_line(lambda: shared_columns(species, table), f"{len(told)} pairs have both genes")
    else:
        found = shared_columns(species, table)
        assert [list(s.genes[c]) for s, c in zip(species, found)] == [list(column) for column in zip(*told)]
    pd.testing.assert_frame_equal(table, before)


def test_tables_of_orthologues_that_do_not_fit_are_refused(pair, toy):
    known = toy.orthologues
    for table, hint in ((known[["human"]], "has no column for mouse.*columns: human"), (known.rename(columns=str.upper), "no column for human, mouse"), (known[:0], "0 pairs"), (known[:1], "1 pairs"), (known + "x", "0 pairs"),
                        (None, "are not given")):
        one_line(lambda t=table: plain_embedding("orthologues", pair, orthologues=t), hint)
    one_line(lambda: plain_embedding("pca", pair), "there is no 'pca'.*choose one of orthologues")
    assert same(shared_columns(pair, known), shared_columns(pair, known.astype("category").iloc[:, ::-1].assign(more=1)))
    many = pd.concat([known, known[:3].assign(mouse="Mouse_new")])  # three genes of one species have two partners
    assert same(shared_columns(pair, many), [c[3:] for c in shared_columns(pair, known)])


def test_a_pair_listed_twice_is_one_pair(pair, toy):
    assert same(shared_columns(pair, pd.concat([toy.orthologues, toy.orthologues[::2]])), shared_columns(pair, toy.orthologues))


def test_the_parts_of_the_plain_ways_are_those_of_the_textbook(pair):
    own, X = pair[0], pair[0].counts.toarray().astype(float)
    np.testing.assert_allclose(log_scaled(own, 500.0).toarray(), np.log1p(500 * X / X.sum(1, keepdims=True)), rtol=1e-5)
    A = np.random.default_rng(0).normal(3, 2, (200, 4))
    A[0, 0] = 500
    np.testing.assert_allclose(own_scale(A), np.clip(StandardScaler().fit_transform(A), -10, 10), atol=1e-5)
    assert own_scale(A).max() == 10 and not own_scale(np.c_[A, np.zeros(200)])[:, 4].any() and np.isfinite(own_scale(np.zeros((3, 2)))).all()
    B = np.random.default_rng(1).normal(size=(50, 6)) * np.arange(1, 7)
    H = components([B[:30], B[30:]], dim=4)
    assert [len(h) for h in H] == [30, 20] and H[0].dtype == np.float32
    np.testing.assert_allclose(np.abs(np.concatenate(H)), np.abs(PCA(4, svd_solver="full").fit_transform(B)), atol=1e-4)
    of = np.concatenate(components([B[:30], B[30:]], dim=4, of=1))
    np.testing.assert_allclose(np.abs(of), np.abs(PCA(4, svd_solver="full").fit(B[30:]).transform(B)), atol=1e-4)
    assert components([B[:3], B[3:4]], dim=30)[0].shape == (3, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_columns_are_zero(dtype):
    assert not any(own_scale(np.full((n, 1), c, dtype)).any() for n in (10, 300, 1000) for c in (0.1, 1.2345, 7.7))


def test_untrained_values_are_sums_by_the_nearest_macrogenes(pair):
    n = 15
    found = untrained_values(pair, n)
    vectors = baselines.standardised([s.vectors for s in pair])
    centres = baselines.centroids(vectors, n)
    for values, s, v in zip(found, pair, vectors):
        rank = np.argsort(np.argsort(np.linalg.norm(v[:, None].astype(float) - centres[None], axis=2), axis=1), axis=1) + 1
        np.testing.assert_allclose(values, log_scaled(s).toarray() @ (2 * np.log1p(1 / rank) ** 2), rtol=1e-4)
    blind = [dataclasses.replace(s, vectors=np.random.default_rng(i).normal(size=s.vectors.shape)) for i, s in enumerate(pair)]
    assert same(untrained_values(pair, n, random=True), untrained_values(blind, n, random=True)) and not same(untrained_values(pair, n, random=True, seed=1), untrained_values(pair, n, random=True))
    assert not same(found, untrained_values(blind, n))


@pytest.mark.parametrize("method", PLAIN)
def test_plain_ways_repeat_read_no_labels_and_follow_the_order_of_cells(method, pair, toy):
    make = functools.partial(plain_embedding, method, orthologues=toy.orthologues, n=20, dim=5, seed=3)
    H = make(pair)
    assert [h.shape for h in H] == [(60, 5), (60, 5)] and np.isfinite(np.concatenate(H)).all()
    blind = [dataclasses.replace(s, labels=None, batch=0 * s.batch) for s in pair]
    assert same(H, make(pair)) and same(H, make(blind))
    order = np.random.default_rng(0).permutation(60)
    turned = make([pair[0], dataclasses.replace(pair[1], counts=pair[1].counts[order])])
    if not method.endswith("harmony"):  # whose clusters start where the order says
        np.testing.assert_allclose(turned[1], H[1][order], atol=5e-3)
        np.testing.assert_allclose(turned[0], H[0], atol=5e-3)
    assert not same(H, make(pair, seed=4)) or method.startswith("orthologues")


def test_plain_ways_take_three_species_and_no_more_components_than_there_are(three):
    species = gather_species(three.tables, three.embeddings, n_hvg=None)
    for method in PLAIN:
        H = plain_embedding(method, species, giver=2, orthologues=three.orthologues, n=15, dim=100)
        assert [h.shape for h in H] == [(50, H[0].shape[1])] * 3 and (method.startswith("orthologues") or H[0].shape[1] == 14)


def test_components_are_those_of_the_giver_or_with_harmony_of_all(pair, toy):
    make = lambda method, giver: plain_embedding(method, pair, giver=giver, orthologues=toy.orthologues, n=20, dim=5)
    for method in PLAIN:
        same_anyway = method.endswith("harmony")
        assert same(make(method, 0), make(method, 1)) == same_anyway
        tables = [own_scale(t) for t in untrained_values(pair, 20, random=method == "random")] if "macro" in method or method == "random" else baselines.orthologue_tables(pair, toy.orthologues)
        assert same_anyway or same(make(method, 1), components(tables, 5, of=1))


def test_orthologues_are_cut_to_those_that_vary_in_any_species(pair, toy, monkeypatch):
    from gears_nb.data.preprocess import highly_variable

    whole = baselines.orthologue_tables(pair, toy.orthologues)
    monkeypatch.setattr(baselines, "VARIABLE", 10)
    logs = [log_scaled(s)[:, c] for s, c in zip(pair, shared_columns(pair, toy.orthologues))]
    kept = sorted(set().union(*(highly_variable(x, ["all"] * x.shape[0], 10).tolist() for x in logs)))
    assert 10 <= len(kept) <= 20 < whole[0].shape[1] and same(baselines.orthologue_tables(pair, toy.orthologues), [t[:, kept] for t in whole])


MEANT = [({"dim": 0}, "dim 0"), ({"dim": -1}, "dim -1"), ({"n": 1}, "n 1"), ({"seed": -1}, "seed -1"), ({"giver": 2}, "giver 2"), ({"giver": -1}, "giver -1")]


@pytest.mark.parametrize(("how_many", "hint"), MEANT, ids=[hint for _, hint in MEANT])
@pytest.mark.parametrize("method", PLAIN)
def test_arguments_of_the_plain_ways_that_cannot_be_meant_are_refused_in_a_line(method, how_many, hint, pair, toy):
    one_line(lambda: plain_embedding(method, pair, **{"n": 10, "orthologues": toy.orthologues} | how_many), f"settings: .*{hint}")


@pytest.mark.parametrize(("what", "how_many"), [("macrogenes", {"seed": 2**32}), ("macrogenes", {"dim": 2.5}), ("orthologues", {"orthologues": "table.csv"})], ids=["seed", "dim", "orthologues"])
def test_more_arguments_of_the_plain_ways_are_refused_in_a_line_or_taken(what, how_many, pair):
    refused(lambda: plain_embedding(what, pair, **{"n": 10} | how_many))


# species side by side -----------------------------------------------------------------------------------------------------


def test_neighbours_may_be_looked_for_in_another_table(rng):
    miner = CrossSpeciesMiner(how(pairs="aligned", neighbours=1, mining="all", margin=100.0))
    species, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 3])
    z, guide = torch.from_numpy(rng.normal(size=(4, 3)).astype(np.float32)), torch.tensor([[0.0], [5.0], [5.1], [0.2]])
    a, p, n = miner.triplets(z, species, labels, torch_rng(0), guide)
    assert sorted(zip(a.tolist(), p.tolist(), n.tolist())) == [(0, 3, 1), (1, 2, 0), (2, 1, 3), (3, 0, 2)]


def test_the_guide_is_the_first_stage_after_harmony(pair, monkeypatch):
    settings, seen, real = config(**{"triplets.pairs": "aligned", "align_dim": 3}), [], triplets.learn_metric
    monkeypatch.setattr(triplets, "learn_metric", lambda *a, **k: seen.append(k["guide"]) or real(*a, **k))
    net, _ = first_stage(pair, settings)
    second_stage(net, pair, settings)
    cells = dealt(pair, settings.pretrain)
    assert same(seen[0], saturn.harmonised([embedded(net, cells, i)[1] for i in (0, 1)], 3)) and seen[0][0].shape == (pair[0].n, 3)
    second_stage(net, pair, config(**{"triplets.pairs": "mutual"}))
    assert seen[1] is None


def test_a_second_stage_wants_labels_of_all_species_unless_told_otherwise(pair):
    half = (pair[0], dataclasses.replace(pair[1], labels=None))
    with pytest.warns(GearsWarning, match="mouse without labels.*triplets.labelled=any"):
        net, history = fit_stages(half, config(**{"triplets.labelled": "all"}))
    assert set(history) == {"pretraining"}
    assert same(net, first_stage(half, config(**{"triplets.labelled": "all"}))[0])


def test_a_table_of_two_species_has_an_aligned_space_and_one_of_one_has_not(model, both, toy):
    assert both.obsm["X_saturn_aligned"].shape == (120, 3) and saturn.shared_space(both) == "X_saturn_aligned"
    H = saturn.harmonised([both.obsm["X_saturn"][:60], both.obsm["X_saturn"][60:]], model.config.align_dim, model.seed)
    np.testing.assert_array_equal(both.obsm["X_saturn_aligned"], np.concatenate(H))
    alone = integrate(model, {"mouse": toy.tables["mouse"]})
    assert saturn.shared_space(alone) == "X_saturn" and set(alone.obsm) == {"X_saturn"}
    np.testing.assert_array_equal(alone.obsm["X_saturn"], both.obsm["X_saturn"][60:])


@pytest.mark.parametrize("sizes", [(1, 1), (2, 30), (20, 20)])
def test_a_few_cells_are_aligned_too(sizes, rng):
    found = saturn.harmonised([rng.normal(size=(n, 6)) for n in sizes])
    assert [len(h) for h in found] == list(sizes) and all(np.isfinite(h).all() for h in found)


def test_distances_are_read_before_harmony_and_labels_after(both):
    told = transfer_labels(both, "human", "mouse")
    np.testing.assert_array_equal(told["distance"], remoteness(both.obsm["X_saturn"][:60], both.obsm["X_saturn"][60:]))
    assert told["label"].equals(transfer_labels(both, "human", "mouse", use="X_saturn_aligned")["label"])


@pytest.mark.parametrize(("sizes", "batch", "steps"), [((100, 100), 50, 4), ((3, 3), 1, 3), ((5, 1), 1, 5), ((1, 1), 512, 1), ((0, 4), 1, 4)])
def test_no_step_is_without_a_cell(sizes, batch, steps):
    assert pretraining.steps_of(sizes, batch) == steps


def test_the_rate_scales_steps_of_macrogene_weights_and_nothing_else(pair):
    slow, fast = (first_stage(pair, config(**{"pretrain.rate": rate, "pretrain.train.epochs": 1})) for rate in (1.0, 20.0))
    start = first_stage(pair, config(**{"pretrain.train.epochs": 0}))[0].macrogenes
    moved = [float((net.macrogenes.strengths(0).log() - start.strengths(0).log()).abs().mean()) for net, _ in (slow, fast)]
    assert moved[1] > 8 * moved[0] > 0
    np.testing.assert_allclose(first_stage(pair, config(**{"pretrain.rate": 20.0, "pretrain.train.epochs": 0}))[0].macrogenes.strengths(0).detach(), start.strengths(0).detach(), rtol=1e-5)
