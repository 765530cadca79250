"""Distances between populations, cells with planted effects, and whether effects add up: against scipy, statsmodels, closed forms and repetition."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist

from gears_nb.core.errors import InputError
from gears_nb.cycle.additivity import FOLDS, Moments, basis, check_additivity, gather_moments, interaction_share, moments_of, one_hot, sum_of_squares, variance_partition
from gears_nb.cycle.chunks import open_chunks
from gears_nb.cycle.fields import prepare
from gears_nb.cycle.simulator import simulate_contexts
from gears_nb.data.preprocess import normalise
from gears_nb.geometry import populations
from gears_nb.geometry.populations import energy_distance, energy_ratio

seeds = st.integers(0, 10_000)


# populations

@given(seeds, st.integers(2, 30), st.integers(2, 30))
def test_energy_distance_is_that_of_scipy(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 1)), rng.normal(size=(m, 1)) + 1
    assert np.isclose(energy_distance(a, b, selves=True), stats.energy_distance(a[:, 0], b[:, 0]) ** 2)


@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(1, 4))
def test_energy_distance_pairs_and_symmetries(seed, n, m, d):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    mean = lambda A, B: np.mean([np.linalg.norm(x - y) for i, x in enumerate(A) for j, y in enumerate(B) if A is not B or i != j])
    found = energy_distance(a, b)
    assert np.isclose(found, 2 * mean(a, b) - mean(a, a) - mean(b, b))
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert np.isclose(found, energy_distance(b, a)) and np.isclose(found, energy_distance(a @ turn + 3, b @ turn + 3))
    assert np.isclose(energy_distance(2 * a, 2 * b), 2 * found) and energy_distance(a, b, selves=True) >= -1e-12


@given(seeds, st.integers(6, 12), st.integers(4, 20))
def test_energy_ratio_is_the_mean_over_draws(seed, m, n):
    """The closed form replaces drawing halves; all pairs of disjoint halves would be too many, so a few thousand are drawn."""
    rng = np.random.default_rng(seed)
    made, real = rng.normal(size=(m, 2)) + 0.5, rng.normal(size=(n, 2))
    h = min(n // 2, m)
    M, R, MR = cdist(made, made), cdist(real, real), cdist(made, real)
    draws = np.zeros((1500, 2))
    for i in range(len(draws)):
        order, own = rng.permutation(n), rng.permutation(m)[:h]
        one, two = order[:h], order[h : 2 * h]
        inside = R[np.ix_(one, one)].mean()
        draws[i] = (2 * MR[np.ix_(own, one)].mean() - M[np.ix_(own, own)].mean() - inside, 2 * R[np.ix_(two, one)].mean() - R[np.ix_(two, two)].mean() - inside)
    top, bottom = draws.mean(0)
    error = np.abs(top / bottom) * np.sqrt((draws.std(0) ** 2 / len(draws) / np.array([top, bottom]) ** 2).sum())
    assert abs(energy_ratio(made, real) - top / bottom) < 5 * error


def test_a_perfect_generator_has_ratio_one_and_cells_that_are_all_alike_do_not():
    rng = np.random.default_rng(0)
    ratios = np.array([energy_ratio(rng.normal(size=(60, 10)), rng.normal(size=(80, 10))) for _ in range(60)])
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(60) and ratios.std() < 0.2
    real = rng.normal(size=(80, 10))
    assert energy_ratio(np.zeros((60, 10)), real) > 5, "the mean is right, the population is not"
    assert energy_ratio(rng.normal(size=(60, 10)) + 0.3, real) > 1.2


def test_energy_ratio_sees_small_errors_only_with_many_cells():
    rng = np.random.default_rng(1)
    few, many = (np.mean([energy_ratio(rng.normal(size=(n, 5)) + 0.2, rng.normal(size=(n, 5))) for _ in range(10)]) for n in (20, 300))
    assert few < 1.3 and many > 1.5


def test_energy_ratio_of_degenerate_and_of_many_cells(monkeypatch):
    same = np.ones((6, 2))
    assert energy_ratio(same, same) == 1 and energy_ratio(same + 1, same) == np.inf
    rng = np.random.default_rng(0)
    made, real = rng.normal(size=(90, 3)), rng.normal(size=(120, 3))
    monkeypatch.setattr(populations, "MOST", 50)
    assert energy_ratio(made, real, seed=1) == energy_ratio(made, real, seed=1) != energy_ratio(made, real, seed=2)


@pytest.mark.parametrize("made, real, word", [(np.zeros((1, 2)), np.zeros((5, 2)), "made"), (np.zeros((5, 3)), np.zeros((5, 2)), "made"), (np.zeros((5, 2)), np.zeros(5), "real"),
                                              (np.zeros((5, 2)), np.full((5, 2), np.nan), "not finite")])
def test_bad_populations(made, real, word):
    with pytest.raises(InputError, match=word):
        energy_ratio(made, real)


# simulator

def test_the_same_seed_gives_the_same_cells_and_a_switch_moves_only_its_own():
    base, truth = simulate_contexts(n_cells=300, n_genes=40)
    again = simulate_contexts(n_cells=300, n_genes=40)[0]
    assert (base.X == again.X).all() and base.obs.equals(again.obs)
    assert (simulate_contexts(n_cells=300, n_genes=40, seed=1)[0].X != base.X).any()
    for change in ({"interaction": 0.2}, {"noise": "counts"}, {"spread": 0.1}, {"states": 2}):
        other = simulate_contexts(n_cells=300, n_genes=40, **change)[1]
        assert (other.labels == truth.labels).all() and all((other.effects[f] == truth.effects[f]).all() for f in truth.effects)
        assert np.allclose(other.programs[:2], truth.programs[:2])
    assert list(base.obs) == ["assay", "type", "donor"] and all(isinstance(base.obs[c].dtype, pd.CategoricalDtype) for c in base.obs)


@given(seeds, st.integers(2, 4), st.integers(2, 4), st.floats(0.01, 0.9))
def test_effects_are_centred_and_the_interaction_has_its_share(seed, a, b, share):
    truth = simulate_contexts(seed=seed, n_cells=30, n_genes=30, categories={"a": a, "b": b, "c": 2}, interaction=share)[1]
    assert all(abs(effect.sum(0)).max() < 1e-9 for effect in truth.effects.values())
    table = truth.interactions["a", "b"]
    assert max(abs(table.sum(0)).max(), abs(table.sum(1)).max()) < 1e-9
    every = np.stack(np.meshgrid(range(a), range(b), range(2), indexing="ij"), -1).reshape(-1, 3)
    between = np.square(truth.contexts(every) - truth.base).sum()
    assert np.isclose(np.square(table).sum() * 2 / between, share)


@given(seeds, st.floats(0, 1), st.integers(20, 400))
def test_contexts_are_dealt_as_asked(seed, confounding, n):
    truth = simulate_contexts(seed=seed, n_cells=n, n_genes=3, categories={"a": 2, "b": 4}, confounding=confounding)[1]
    count = np.zeros((2, 4))
    np.add.at(count, tuple(truth.labels.T), 1)
    agree = np.arange(2)[:, None] == np.arange(4) % 2
    assert count.sum() == n and abs(count - n * np.where(agree, 1 + confounding, 1 - confounding) / 8).max() < 1 + 1e-9


def test_missing_combinations_have_no_cells():
    adata = simulate_contexts(n_cells=500, n_genes=5, missing=[{"assay": "assay 2", "type": "type 3"}, {"donor": "donor 1", "type": "type 1"}])[0]
    obs = adata.obs.astype(str)
    assert not ((obs.assay == "assay 2") & (obs.type == "type 3")).any() and not ((obs.donor == "donor 1") & (obs.type == "type 1")).any()
    assert len(obs.drop_duplicates()) == 24 - 3 - 2


@pytest.mark.parametrize("options", [{}, {"state_shift": 0.6}, {"interaction": 0.3}, {"confounding": 0.5}])
def test_context_means_are_those_of_the_truth(options):
    adata, truth = simulate_contexts(n_cells=6000, n_genes=40, categories={"assay": 2, "type": 3}, **options)
    contexts, number, cells = np.unique(truth.labels, axis=0, return_inverse=True, return_counts=True)
    means = np.stack([adata.X[number.ravel() == u].mean(0) for u in range(len(contexts))])
    error = np.stack([adata.X[number.ravel() == u].std(0) for u in range(len(contexts))]) / np.sqrt(cells)[:, None]
    assert (abs(means - truth.context_mean(contexts)) < 5.5 * error).all()
    moved = np.ptp(np.stack([truth.state[truth.labels[:, 1] == c].mean(0) for c in range(3)]), 0).max()
    assert (moved > 0.3) == ("state_shift" in options), "states depend on the type only if asked to"


def test_clean_values_and_true_counterfactuals():
    adata, truth = simulate_contexts(n_cells=400, n_genes=30, spread=0.0)
    assert np.allclose(adata.X, truth.clean(), atol=1e-5) and adata.X.min() >= 0
    target = np.tile([1, 0, 2], (400, 1))
    step = truth.clean(target) - truth.clean()
    wanted = sum(effect[target[:, i]] - effect[truth.labels[:, i]] for i, effect in enumerate(truth.effects.values()))
    assert np.allclose(step, wanted), "the cell's own state stays"
    assert (truth.programs >= 0).all() and (truth.state >= 0).all()


def test_counts_are_counts_of_the_truth():
    adata, truth = simulate_contexts(n_cells=3000, n_genes=50, noise="counts", depth=500, spread=0.0)
    assert sp.issparse(adata.X) and adata.X.format == "csr" and (adata.X.data == np.round(adata.X.data)).all()
    rate = np.exp(truth.clean())
    rate *= 500 / rate.sum(1, keepdims=True)
    assert abs(adata.X.sum() / rate.sum() - 1) < 0.01
    z = (adata.X.toarray() - rate) / np.sqrt(rate)
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02, "Poisson: the variance is the mean"


def test_encode_is_the_way_back():
    adata, truth = simulate_contexts(n_cells=60, n_genes=5)
    assert (truth.encode(adata.obs) == truth.labels).all()
    with pytest.raises(InputError, match="'type 9' is unknown"):
        truth.encode(adata.obs.astype(str).assign(type="type 9"))


@pytest.mark.parametrize("options, word", [({"n_cells": 0}, "n_cells"), ({"categories": {"a": 1}}, "categories"), ({"categories": {}}, "categories"), ({"strength": {"assay": 1.0}}, "strength"),
                                           ({"interaction": 1.0}, "interaction"), ({"interaction": 0.1, "categories": {"a": 2}}, "interaction"), ({"interaction": 0.1, "strength": 0.0}, "interaction"),
                                           ({"confounding": 1.5}, "confounding"), ({"missing": [{"assay": "x"}]}, "missing"), ({"missing": [{}]}, "missing"), ({"depth": 0.0}, "depth"),
                                           ({"missing": [{"assay": "assay 1"}, {"assay": "assay 2"}]}, "no combination")])
def test_impossible_simulations(options, word):
    with pytest.raises(InputError, match=word):
        simulate_contexts(**{"n_cells": 50, "n_genes": 5} | options)


# additivity

def share(seed=0, n=700, genes=60, **options):
    adata, truth = simulate_contexts(seed=seed, n_cells=n, n_genes=genes, **options)
    values = adata.X if options.get("noise") != "counts" else normalise(adata.X)
    return interaction_share(moments_of(values, truth.labels, seed), list(truth.categories), seed)


@pytest.mark.parametrize("options", [{}, {"noise": "counts"}, {"confounding": 0.5}, {"missing": [{"assay": "assay 1", "type": "type 1"}]}, {"state_shift": 0.5}])
def test_additive_truths_are_called_additive(options):
    verdicts = [share(seed, **options) for seed in range(10)]
    assert sum(v.additive is True for v in verdicts) >= 9
    assert all("Additivity holds" in str(v) for v in verdicts if v.additive)
    assert abs(np.mean([v.share for v in verdicts])) < 0.01


@pytest.mark.parametrize("options", [{}, {"noise": "counts"}, {"confounding": 0.5}, {"n": 300}])
def test_interactions_are_called_by_name(options):
    verdicts = [share(seed, interaction=0.3, **options) for seed in range(10)]
    assert sum(v.additive is False for v in verdicts) >= 9
    failed = [v for v in verdicts if v.additive is False]
    assert all("Additivity fails" in str(v) and "between assay and type" in str(v) for v in failed)
    if "confounding" not in options:
        assert abs(np.mean([v.share for v in verdicts]) - 0.3) < 0.02 and all(v.pairs["assay", "type"] > 5 * abs(v.pairs["type", "donor"]) for v in failed)


def test_the_interval_covers_and_the_test_keeps_its_level():
    null = [share(100 + seed, n=400, genes=40) for seed in range(40)]
    assert np.mean([v.p < 0.05 for v in null]) <= 0.15 and np.mean([v.low > 0 for v in null]) <= 0.15
    some = [share(100 + seed, n=400, genes=40, interaction=0.2) for seed in range(20)]
    assert np.mean([v.low <= 0.2 <= v.high for v in some]) >= 0.8 and all(v.p < 0.05 for v in some)
    assert np.mean([v.high - v.low for v in some]) < 8 * np.std([v.share for v in some]), "not by being endless"


def test_sums_of_squares_are_unbiased_where_plain_ones_are_not():
    rng = np.random.default_rng(0)
    contexts, n = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([10, 14, 20, 12])
    mean = np.array([[0.0], [1], [2], [4]])  # the interaction is 1, or 1/4 in each context
    labels, root = np.repeat(contexts, n, axis=0), np.sqrt(n)
    plus, exact = basis(one_hot(contexts), root), np.zeros((4, 1))
    wanted = (sum_of_squares(mean, exact, root) - sum_of_squares(mean, exact, root, plus))[0]
    own, plain = [], []
    for _ in range(400):
        moments = moments_of(np.repeat(mean, n, axis=0) + 2 * rng.normal(size=(n.sum(), 1)), labels)
        m, v = moments.means()
        own.append((sum_of_squares(m, v, root) - sum_of_squares(m, v, root, plus))[0])
        plain.append((sum_of_squares(m, 0 * v, root) - sum_of_squares(m, 0 * v, root, plus))[0])
    error = np.std(own) / np.sqrt(len(own))
    assert abs(np.mean(own) - wanted) < 4 * error < np.mean(plain) - wanted - 2


@given(seeds)
def test_names_and_order_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, [2, 3, 2], size=(900, 3))
    X = rng.normal(size=(900, 6)) + rng.normal(size=(2, 6))[labels[:, 0]] + rng.normal(size=(3, 6))[labels[:, 1]]
    moments = moments_of(X, labels, seed)
    first = interaction_share(moments, ["a", "b", "c"])
    order, turn = rng.permutation(3), rng.permutation(len(moments.contexts))
    moved = Moments(moments.contexts[turn][:, order] * 7 + 2, moments.cells[:, turn], moments.sums[:, turn], moments.squares[turn])
    second = interaction_share(moved, [*np.array(["a", "b", "c"])[order]])
    assert np.isclose(first.share, second.share) and np.allclose(first.genes, second.genes) and np.isclose(first.fields["b"], second.fields["b"])
    assert np.isclose(interaction_share(moments_of(3 * X + 5, labels, seed), ["a", "b", "c"]).share, first.share), "units and levels do not matter"


def test_what_cannot_be_told():
    for found, word in ((share(categories={"a": 2, "b": 2}, confounding=1.0), "crossed"), (share(n=100), "no context has 10 cells"), (share(categories={"a": 3}), "crossed")):
        assert found.additive is None and np.isnan(found.share) and "cannot be told" in str(found) and word in str(found)


def test_noise_is_no_verdict():
    verdicts = [share(seed, strength=0.0) for seed in range(10)]
    assert sum(v.additive is None for v in verdicts) >= 9, "contexts that do not differ are neither additive nor not"
    assert all("do not differ" in str(v) or "so few cells" in str(v) for v in verdicts if v.additive is None)


def test_a_weak_field_is_named():
    doubtful = share(n=3000, strength={"assay": 0.15, "type": 1.0}, categories={"assay": 2, "type": 3}, interaction=0.03)
    assert doubtful.additive and "Moves in assay are in doubt" in str(doubtful)
    assert "doubt" not in str(share(n=3000, interaction=0.03))


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_blocks_change_nothing_but_the_folds(seed, sizes):
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    labels, X = rng.integers(0, 3, size=(n, 2)), rng.poisson(1.0, (n, 4)).astype(float)
    contexts, cuts = np.unique(labels, axis=0), np.cumsum(sizes)[:-1]
    parts = gather_moments(zip(map(sp.csr_matrix, np.split(X, cuts)), np.split(labels, cuts)), contexts, seed)
    whole = moments_of(X, labels, seed)
    assert (parts.cells.sum(0) == whole.cells.sum(0)).all() and np.ptp(parts.cells, 0).max() <= 1
    assert np.allclose(parts.sums.sum(0), whole.sums.sum(0)) and np.allclose(parts.squares, whole.squares)


def test_chunks_give_the_verdict_of_all_cells_and_pools_are_left_out():
    adata, truth = simulate_contexts(n_cells=1500, n_genes=50, interaction=0.3)
    adata.obs["donor"] = adata.obs["donor"].astype(str)
    adata.obs.loc[adata.obs_names[:6], "donor"] = "stray"
    adata.obs.loc[adata.obs_names[6:10], "donor"] = "other"
    adata.obs.loc[adata.obs_names[10:40], "donor"] = ""
    chunks = open_chunks(adata, size=400)
    prepared = prepare(chunks)
    found = check_additivity(chunks, prepared)
    assert found.contexts == 24 and found.left_out == len(prepared.contexts) - 24 > 0
    assert found.additive is False and abs(found.share - 0.3) < 0.03 and found.genes.shape == (50,)
    assert found.share == check_additivity(chunks, prepared).share
    strange = type("Other", (), {"__len__": lambda self: 0})()
    with pytest.raises(InputError, match="there are none"):
        check_additivity(strange, prepared)


def test_unlisted_combinations_are_refused():
    with pytest.raises(InputError, match=r"\[1, 1\] is not in the table"):
        gather_moments([(np.zeros((2, 3)), np.array([[0, 0], [1, 1]]))], np.array([[0, 0], [0, 1]]))
    assert FOLDS == gather_moments([(np.zeros((2, 3)), np.zeros((2, 1), int))], np.zeros((1, 1), int)).sums.shape[0]


@pytest.mark.parametrize("confounding", [0.0, 0.6])
def test_variance_partition_is_type_two_anova(confounding):
    formula = pytest.importorskip("statsmodels.formula.api")
    anova = pytest.importorskip("statsmodels.stats.anova")
    adata, truth = simulate_contexts(n_cells=240, n_genes=4, confounding=confounding)
    parts = variance_partition(moments_of(adata.X.astype(float), truth.labels), list(truth.categories))
    for j in range(4):
        frame = adata.obs.assign(y=adata.X[:, j].astype(float))
        table = anova.anova_lm(formula.ols("y ~ C(assay) + C(type) + C(donor)", frame).fit(), typ=2)["sum_sq"]
        total = np.square(frame["y"] - frame["y"].mean()).sum()
        assert np.allclose([parts[name][j] for name in truth.categories], table.iloc[:3] / total) and np.isclose(parts["residual"][j], table["Residual"] / total)
    assert np.allclose(sum(parts.values()), 1) and (abs(parts["shared"]).max() < 1e-9) == (confounding == 0)


def test_a_field_that_follows_from_another_has_no_share():
    adata, truth = simulate_contexts(n_cells=600, n_genes=20)
    sex = truth.labels[:, 1] % 2
    labels = np.column_stack([truth.labels[:, :2], sex])
    parts = variance_partition(moments_of(adata.X, labels), ["assay", "type", "sex"])
    assert abs(parts["sex"]).max() < 1e-9 < parts["type"].max()
    constant = variance_partition(moments_of(np.column_stack([adata.X[:, :2], np.full(600, 2.0)]), labels), ["assay", "type", "sex"])
    assert all(part[2] == 0 for part in constant.values())
