"""Macrogenes (centroids, first weights, the layer) and the distribution of counts (NB, ZINB)."""
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.profiler import ProfilerActivity, profile

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.saturn import macrogenes
from gears_nb.saturn.counts import nb_log_prob, zinb_log_prob
from gears_nb.saturn.macrogenes import MacrogeneLayer, centroids, gene_scores, standardised

SLOW = ("kmeans", "minibatch", "hierarchical")
HOW = (*SLOW, "sample", "random")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    return tmp_path / "saturn"


def species(rng: np.random.Generator, sizes: tuple[int, ...] = (40, 60), p: int = 6) -> list[np.ndarray]:
    """Vectors of genes with dimensions of unequal size."""
    return [rng.normal(size=(g, p)) * np.arange(1, p + 1) + 3 for g in sizes]


# --- one scale

def test_standardised_is_the_scaler_of_the_stack(rng):
    from sklearn.preprocessing import StandardScaler

    tables = species(rng)
    scaler = StandardScaler().fit(np.concatenate(tables))
    for found, table in zip(standardised(tables), tables):
        np.testing.assert_allclose(found, scaler.transform(table), atol=1e-5)
        assert found.dtype == np.float32


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_standardised_ignores_units_and_repeats(seed, factor, shift):
    tables = species(np.random.default_rng(seed), (8, 5), 3)
    once = standardised(tables)
    for other in (standardised([factor * t + shift for t in tables]), standardised(once), standardised(tables[::-1])[::-1]):
        for a, b in zip(once, other):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_constant_dimension_counts_nothing(rng):
    tables = [np.c_[t, np.full(len(t), 1e6)] for t in species(rng)]
    assert not any(z[:, -1].any() for z in standardised(tables))
    assert (centroids(tables, 5)[:, -1] == 1e6).all()


@pytest.mark.parametrize("tables", [[], [np.ones(3)], [np.ones((3, 2)), np.ones((3, 4))], [np.array([[1.0, np.inf]])]])
def test_tables_that_do_not_fit_are_refused(tables):
    with pytest.raises(InputError, match="macrogenes: vectors"):
        standardised(tables)


# --- centroids

@pytest.mark.parametrize("how", HOW)
def test_centroids_are_repeatable_and_the_input_stays(rng, how):
    tables = species(rng)
    before = copy.deepcopy(tables)
    C = centroids(tables, 7, how=how)
    assert C.shape == (7, 6) and C.dtype == np.float32 and np.isfinite(C).all()
    for again in (centroids(tables, 7, how=how), centroids(tables, 7, how=how, cache=False)):
        np.testing.assert_array_equal(C, again)
    if how != "hierarchical":  # all genes take part, so nothing is drawn
        assert not np.array_equal(C, centroids(tables, 7, how=how, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(tables, before))


@pytest.mark.parametrize("how", ["kmeans", "hierarchical"])
def test_separate_clouds_have_their_means(rng, how):
    places = np.array([[0, 0, 0], [30, 0, 1e3], [0, 30, -1e3], [30, 30, 0.0]])
    clouds = places[:, None] + rng.normal(size=(4, 25, 3))
    C = centroids([clouds[:, :10].reshape(-1, 3), clouds[:, 10:].reshape(-1, 3)], 4, how=how)
    for mean in clouds.mean(1):
        assert np.abs(C - mean).sum(1).min() < 1e-3


def test_kmeans_is_a_fixed_point(rng):
    Z = np.concatenate(standardised(species(rng)))
    C = centroids([Z], 8, how="kmeans")
    group = np.linalg.norm(Z[:, None] - C, axis=2).argmin(1)
    np.testing.assert_allclose(C, [Z[group == m].mean(0) for m in range(8)], atol=1e-4)


def test_sampled_and_random_centroids(rng):
    tables = species(rng)
    stack = np.concatenate(tables)
    for row in centroids(tables, 20, how="sample"):
        assert np.abs(stack - row).max(1).min() < 1e-4
    noise = np.concatenate([centroids(tables, 100, how="random", seed=s) for s in range(20)])
    np.testing.assert_allclose(noise.std(0), stack.std(0), rtol=0.08)
    assert (np.abs(noise.mean(0) - stack.mean(0)) < 0.1 * stack.std(0)).all()


def test_ward_looks_at_a_sample(rng, monkeypatch):
    monkeypatch.setattr(macrogenes, "WARD_ROWS", 30)
    tables = species(rng)
    assert not np.array_equal(centroids(tables, 5, how="hierarchical"), centroids(tables, 5, how="hierarchical", seed=1))
    with pytest.raises(InputError, match="31 macrogenes of 30"):
        centroids(tables, 31, how="hierarchical")


@pytest.mark.parametrize("n", [0, -1, 101])
def test_more_centroids_than_genes_are_refused(rng, n):
    with pytest.raises(InputError, match="choose n from 1 to 100"):
        centroids(species(rng), n)


def test_equal_vectors_count_once(rng):
    with pytest.raises(InputError, match="of 3 different gene vectors"):
        centroids([np.repeat(rng.normal(size=(3, 2)), 5, 0)], 4)


def test_another_way_is_refused(rng):
    with pytest.raises(InputError, match="choose one of kmeans, minibatch"):
        centroids(species(rng), 3, how="k-means")


@pytest.mark.parametrize("how", HOW)
def test_only_slow_ways_are_kept(rng, cache, how):
    centroids(species(rng), 5, how=how)
    assert bool(list(cache.rglob("centroids-*.json"))) == (how in SLOW)


def test_cache_is_used_and_follows_content(rng, cache, monkeypatch):
    tables, calls = species(rng), []
    fit = macrogenes._fit
    monkeypatch.setattr(macrogenes, "_fit", lambda *args: calls.append(args[2]) or fit(*args))
    for change in ({}, {}, {"seed": 1}, {"how": "kmeans"}, {"n": 6}):
        centroids(tables, **({"n": 5} | change))
    assert calls == ["minibatch", "minibatch", "kmeans", "minibatch"]
    tables[0][0, 0] += 1
    centroids(tables, 5)
    assert len(calls) == 5


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_damaged_files_are_made_again(rng, cache, ending):
    C = centroids(species(np.random.default_rng(0)), 5)
    file, = cache.glob(f"*.{ending}")
    file.write_bytes(file.read_bytes()[:20])
    np.testing.assert_array_equal(centroids(species(np.random.default_rng(0)), 5), C)
    assert len(next(cache.glob(f"*.{ending}")).read_bytes()) > 20


def test_a_cache_that_cannot_be_written_warns(rng, cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(GearsWarning, match="not kept"):
        C = centroids(species(rng), 5)
    assert C.shape == (5, 6)


# --- first weights

@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([2, 30]))
def test_scores_are_ranks_of_all_distances(seed, keep, p):
    rng = np.random.default_rng(seed)
    genes, centres = rng.normal(size=(15, p)), rng.normal(size=(9, p))
    columns, scores = gene_scores(genes, centres, keep=keep)
    kept = min(keep, 9)
    np.testing.assert_array_equal(columns, np.linalg.norm(genes[:, None] - centres, axis=2).argsort(1)[:, :kept])
    np.testing.assert_allclose(scores, np.tile(2 * np.log(1 + 1 / np.arange(1, kept + 1)) ** 2, (15, 1)), rtol=1e-6)


def test_forms_of_the_score(rng):
    genes, centres = rng.normal(size=(5, 3)), rng.normal(size=(8, 3))
    columns, scores = gene_scores(genes, centres, how="smoothed", keep=3)
    np.testing.assert_allclose(scores, np.tile([1, 1 / 2, 1 / 3], (5, 1)), rtol=1e-6)
    nearest, one = gene_scores(genes, centres, how="one_hot")
    np.testing.assert_array_equal(nearest, columns[:, :1])
    assert one.tolist() == [[1.0]] * 5 and columns.dtype == np.int64 and scores.dtype == np.float32


def test_ties_go_to_the_lower_number():
    corners = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert gene_scores(np.zeros((2, 2)), corners, keep=3)[0].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(("genes", "centres", "how", "message"), [
    (np.ones((3, 2)), np.ones((3, 4)), "default", "same number of columns"), (np.ones(3), np.ones((3, 1)), "default", "same number of columns"),
    (np.ones((3, 2)), np.ones((3, 2)), "rank", "choose one of default")])
def test_scores_refuse(genes, centres, how, message):
    with pytest.raises(InputError, match=message):
        gene_scores(genes, centres, how=how)


def test_scores_want_a_positive_keep(rng):
    with pytest.raises(InputError, match="whole number from 1"):
        gene_scores(rng.normal(size=(3, 2)), rng.normal(size=(4, 2)), keep=0)


# --- the layer

def layer_of(seed: int, sizes: tuple[int, ...] = (11, 8), n: int = 9, k: int = 3, **how: bool) -> MacrogeneLayer:
    """A layer with random patterns and weights; its last macrogene has no gene."""
    rng = torch.Generator().manual_seed(seed)
    columns = [torch.stack([torch.randperm(n - 1, generator=rng)[:k] for _ in range(g)]) for g in sizes]
    return MacrogeneLayer(columns, [torch.rand(g, k, generator=rng) + 0.1 for g in sizes], n, **how)


def dense(layer: MacrogeneLayer, s: int, log_weights: torch.Tensor) -> torch.Tensor:
    """The weights as a dense table, differentiable."""
    columns = layer.pattern(s).columns.long()
    return torch.zeros(len(columns), layer.n, dtype=log_weights.dtype).scatter(1, columns, log_weights.exp().view(columns.shape))


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 8))
def test_layer_against_a_dense_table(seed, b, k):
    layer = layer_of(seed, k=k).double()
    rng = torch.Generator().manual_seed(seed)
    for s, g in enumerate((11, 8)):
        x, v = torch.randn(b, g, generator=rng, dtype=torch.float64), torch.randn(b, 9, generator=rng, dtype=torch.float64)
        x, v, log_w = x.requires_grad_(), v.requires_grad_(), layer.log_weights[s].detach().clone().requires_grad_()
        W = dense(layer, s, log_w)
        value, expected = (layer(x, s), layer.transpose(v, s)), (x @ W, v @ W.T)
        for a, e in zip(value, expected):
            torch.testing.assert_close(a, e)
        loss = lambda pair: pair[0].sin().sum() + pair[1].square().sum()
        found, known = torch.autograd.grad(loss(value), (x, v, layer.log_weights[s])), torch.autograd.grad(loss(expected), (x, v, log_w))
        for a, e in zip(found, known):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("back", [False, True])
def test_gradients_by_finite_differences(back):
    layer = layer_of(1).double()
    rows = torch.randn(4, 9 if back else 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def run(rows: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
        return macrogenes._Product.apply(rows, log_weights.exp(), layer.pattern(1), back)

    assert torch.autograd.gradcheck(run, (rows, layer.log_weights[1].detach().clone().requires_grad_()))


@given(st.integers(0, 1000))
def test_forward_and_transpose_are_adjoint(seed):
    layer = layer_of(seed).double()
    x, v = torch.randn(3, 11, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    torch.testing.assert_close((layer(x, 0) * v).sum(), (x * layer.transpose(v, 0)).sum())


def test_order_of_ranks_does_not_matter():
    columns, scores = torch.tensor([[4, 0, 2], [1, 3, 0]]), torch.tensor([[1.0, 0.5, 0.2], [0.9, 0.3, 0.1]])
    turn = torch.tensor([2, 0, 1])
    one, two = MacrogeneLayer([columns], [scores], 5), MacrogeneLayer([columns[:, turn]], [scores[:, turn]], 5)
    assert torch.equal(one.log_weights[0], two.log_weights[0])
    np.testing.assert_allclose(one.weights(0).toarray(), [[0.5, 0, 0.2, 0, 1], [0.1, 0.9, 0, 0.3, 0]], rtol=1e-6)
    assert one.weights(0).has_sorted_indices and one.weights(0).shape == (2, 5)


def test_layer_takes_arrays_as_gene_scores_gives_them(rng):
    tables = standardised(species(rng))
    C = centroids(tables, 10)
    found = [gene_scores(t, C, keep=4) for t in tables]
    layer = MacrogeneLayer([c for c, _ in found], [s for _, s in found], 10)
    assert layer(torch.ones(2, 60), 1).dtype == torch.float32
    assert [len(w) for w in layer.log_weights] == [160, 240]
    np.testing.assert_allclose(layer.weights(1).sum(1), found[1][1].sum(1)[:, None], rtol=1e-5)


def peak(step: Callable[[], object]) -> float:
    """Most bytes that are allocated at once while `step()` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return float(np.cumsum([e.nbytes() for e in events]).max())


def test_no_dense_table_is_made():
    g, n, k, b = 1500, 2000, 3, 4
    columns = (torch.arange(g)[:, None] + 600 * torch.arange(k)) % n
    layer, x = MacrogeneLayer([columns], [torch.ones(g, k)], n), torch.rand(b, g).requires_grad_()
    used = peak(lambda: layer.transpose(layer(x, 0).relu(), 0).square().sum().backward())
    assert 4 * b * g < used < 4 * g * n / 10
    assert peak(lambda: x @ dense(layer, 0, layer.log_weights[0])) > 4 * g * n


def test_frozen_weights_get_no_gradient():
    layer, x = layer_of(0, frozen=True), torch.rand(3, 11).requires_grad_()
    layer(x, 0).sum().backward()
    assert layer.log_weights[0].grad is None and x.grad is not None
    assert not any(p.requires_grad for p in layer.parameters()) and layer_of(0).log_weights[0].requires_grad


def test_weights_learn_and_stay_positive():
    layer, x, goal = layer_of(3), torch.rand(40, 11, generator=torch.Generator().manual_seed(1)), layer_of(3)
    with torch.no_grad():
        goal.log_weights[0].add_(torch.randn(33, generator=torch.Generator().manual_seed(2)))
        target = goal(x, 0)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x, 0) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0] and (layer.weights(0).data > 0).all()
    assert torch.equal(layer.log_weights[1], layer_of(3).log_weights[1])


def test_saved_layers_bring_their_pattern():
    first, second = layer_of(0), layer_of(1)
    x = torch.rand(2, 8)
    assert not torch.equal(first(x, 1), second(x, 1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, 1), second(x, 1)) and torch.equal(copy.deepcopy(first)(x, 1), first(x, 1))


def test_a_layer_says_nothing(recwarn):
    layer = layer_of(0)
    layer(torch.rand(2, 11), 0).sum().backward()
    assert not recwarn.list


@pytest.mark.parametrize(("columns", "scores", "message"), [
    ([[0, 1]], [[1.0]], "of one shape"), ([0, 1], [1.0, 1], "of one shape"), ([[0, 3]], [[1.0, 1]], "reach from 0 to 3, there are 3"),
    ([[-1, 0]], [[1.0, 1]], "reach from -1"), ([[1, 1]], [[1.0, 1]], "one macrogene twice"), ([[0, 1]], [[1.0, 0]], "not a positive"),
    ([[0, 1]], [[1.0, np.nan]], "not a positive")])
def test_layer_refuses_bad_tables(columns, scores, message):
    with pytest.raises(InputError, match=f"species 0: .*{message}"):
        MacrogeneLayer([torch.tensor(columns)], [torch.tensor(scores)], 3)


@pytest.mark.parametrize(("columns", "scores"), [([], []), ([torch.zeros(1, 1).long()], [])])
def test_layer_wants_both_tables_of_every_species(columns, scores):
    with pytest.raises(InputError, match="for every species"):
        MacrogeneLayer(columns, scores, 3)


@given(st.integers(1, 9))
def test_collapse_counts_macrogenes_in_use(used):
    columns = [(torch.arange(18) % used)[:, None], (torch.arange(2 * used) % used)[:, None]]
    layer = MacrogeneLayer(columns, [torch.full((len(c), 1), 0.3) for c in columns], 9)
    whole = np.bincount(columns[0].ravel(), minlength=9) / 18
    share = (whole + np.bincount(columns[1].ravel(), minlength=9) / (2 * used)) / 2
    assert layer.collapse() == pytest.approx(np.exp(stats.entropy(share)))
    assert used == 1 or 1 < layer.collapse() <= used + 1e-6


# --- counts

@given(st.floats(-9, 9), st.floats(-7, 7), st.lists(st.integers(0, 5000), min_size=1, max_size=6))
def test_nb_against_scipy(log_mean, log_dispersion, counts):
    m, t, x = np.exp(log_mean), np.exp(log_dispersion), np.array(counts)
    found = nb_log_prob(torch.tensor(x), torch.tensor(m, dtype=torch.float64), torch.tensor(t, dtype=torch.float64))
    np.testing.assert_allclose(found, stats.nbinom.logpmf(x, t, t / (t + m)), rtol=1e-7, atol=1e-7)


@given(st.floats(-6, 6), st.floats(-4, 6), st.floats(-8, 8))
def test_zinb_against_the_mixture(log_mean, log_dispersion, z):
    m, t, x, pi = np.exp(log_mean), np.exp(log_dispersion), np.arange(30), 1 / (1 + np.exp(-z))
    expected = np.logaddexp(np.where(x == 0, np.log(pi), -np.inf), np.log1p(-pi) + stats.nbinom.logpmf(x, t, t / (t + m)))
    for dtype, rtol in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        found = zinb_log_prob(torch.tensor(x), *(torch.tensor(v, dtype=dtype) for v in (m, t, z)))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(("m", "t", "z"), [(0.1, 0.3, -1.0), (4.0, 1.5, 0.5), (30.0, 50.0, 2.0)])
def test_zinb_is_a_distribution_with_its_moments(m, t, z):
    x = torch.arange(3000, dtype=torch.float64)
    p = zinb_log_prob(x, *(torch.tensor(v, dtype=torch.float64) for v in (m, t, z))).exp()
    pi, mean = 1 / (1 + np.exp(-z)), float((p * x).sum())
    assert float(p.sum()) == pytest.approx(1) and mean == pytest.approx((1 - pi) * m)
    assert float((p * x * x).sum()) - mean**2 == pytest.approx((1 - pi) * (m + m * m / t + pi * m * m))


def test_zinb_gradients():
    rng = torch.Generator().manual_seed(0)
    x = torch.tensor([[0, 3, 0, 40], [1, 0, 0, 7]])
    inputs = [torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in ((2, 4), (4,), (2, 1))]
    assert torch.autograd.gradcheck(lambda m, t, z: zinb_log_prob(x, m.exp(), t.exp(), z), inputs)


@given(st.sampled_from([0.0, 1.0, 1e4, 1e6]), st.sampled_from([0.0, 1e-38, 1e-6, 1.0, 1e8, 1e30]), st.sampled_from([0.0, 1e-30, 1.0, 1e6, 1e30, np.inf]),
       st.sampled_from([-np.inf, -1e30, -50.0, 0.0, 50.0, 1e30]))
def test_values_and_gradients_are_finite(x, m, t, z):
    given_ = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (m, t, z)]
    value = zinb_log_prob(torch.tensor(x), *given_)
    assert value.isfinite() and value <= 1e-5
    assert all(g.isfinite() for g in torch.autograd.grad(value, given_))


def test_limits():
    x, m = torch.arange(40), torch.tensor(6.0, dtype=torch.float64)
    infinite = torch.tensor(np.inf)
    np.testing.assert_allclose(nb_log_prob(x, m, infinite), stats.poisson.logpmf(x.numpy(), 6), atol=1e-5)
    assert torch.equal(zinb_log_prob(x, m, torch.tensor(2.0), -infinite), nb_log_prob(x, m, torch.tensor(2.0)))
    assert zinb_log_prob(torch.tensor(0), m, torch.tensor(2.0), torch.tensor(1e4)).abs() < 1e-3


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4), (4,)), ((4,), (3, 1), ()), ((), (3, 4), (4,)), ((3, 1), (4,), (3, 4)), ((), (), ()), ((0, 4), (0, 4), (4,))])
def test_shapes_are_broadcast(rng, shapes):
    x, m, t = rng.poisson(2, shapes[0]), rng.uniform(0.5, 3, shapes[1]), rng.uniform(0.5, 3, shapes[2])
    expected = stats.nbinom.logpmf(x, t, t / (t + m))
    assert nb_log_prob(*map(torch.tensor, (x, m, t))).shape == np.shape(expected)
    np.testing.assert_allclose(nb_log_prob(*map(torch.tensor, (x, m, t))), expected, rtol=1e-6)
    np.testing.assert_allclose(zinb_log_prob(*map(torch.tensor, (x, m, t)), torch.tensor(-np.inf)), expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_counts_that_are_none_are_refused(bad):
    with pytest.raises(InputError, match="counts: x: .*raw counts"):
        zinb_log_prob(torch.tensor([0.0, bad]), torch.ones(2), torch.ones(2), torch.zeros(2))


def test_nothing_is_changed_and_nothing_drawn(rng):
    given_ = [torch.tensor(rng.uniform(0.1, 2, (5, 6))) for _ in range(3)]
    x, before, state = torch.tensor(rng.poisson(1.0, (5, 6))), [v.clone() for v in given_], torch.get_rng_state()
    assert torch.equal(zinb_log_prob(x, *given_), zinb_log_prob(x, *given_))
    assert all(torch.equal(a, b) for a, b in zip(given_, before)) and torch.equal(state, torch.get_rng_state())


def test_against_scvi(rng):
    distributions = pytest.importorskip("scvi.distributions")
    x, m, t = torch.tensor(rng.poisson(2.0, (6, 5))).float(), torch.tensor(rng.uniform(0.1, 5, (6, 5))).float(), torch.tensor(rng.uniform(0.1, 5, 5)).float()
    z = torch.tensor(rng.normal(size=(6, 5))).float()
    theirs = distributions.ZeroInflatedNegativeBinomial(mu=m, theta=t, zi_logits=z)
    torch.testing.assert_close(zinb_log_prob(x, m, t, z), theirs.log_prob(x), rtol=1e-4, atol=1e-4)
