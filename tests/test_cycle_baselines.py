"""Plain counterfactuals in closed form, and the board: nothing leaks, scores mean what they say, the same seed gives the same rows."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.config import TrainConfig
from gears_nb.core.errors import InputError
from gears_nb.cycle import board
from gears_nb.cycle.baselines import PLAIN, category_means, counterfactual, factor_model, fit_effects, fitted, learn
from gears_nb.cycle.board import DATASETS, ENOUGH, FILES, METHODS, answer, board_row, by_method, context_task, fit_judge, hold_out, leading_genes, scores, sources_of, tellable
from gears_nb.cycle.simulator import simulate_contexts
from gears_nb.data.registry import data_root

QUICK = TrainConfig(epochs=2, lr=2e-3, progress=False)
seeds = st.integers(0, 10_000)


def planted(n=900, genes=30, held=(1, 2, 0), **options):
    "Values without noise and state, labels, mask of training cells, and the context that is not among them."
    _, truth = simulate_contexts(n_cells=n, n_genes=genes, **options)
    target = np.array(held)
    return truth.contexts(truth.labels), truth, (truth.labels != target).any(1), target


# baselines

@pytest.mark.parametrize("confounding", [0.0, 0.6])
def test_additive_effects_give_a_context_that_was_never_seen(confounding):
    X, truth, train, target = planted(confounding=confounding)
    near = train & ((truth.labels != target).sum(1) == 2)
    own = np.random.default_rng(0).normal(size=(near.sum(), 30))  # whatever a cell is beside its contexts
    made = counterfactual("additive", X[train], truth.labels[train], X[near] + own, truth.labels[near], target)
    assert np.allclose(made, truth.contexts(target[None]) + own, atol=1e-4)
    shifted = counterfactual("mean_shift", X[train], truth.labels[train], X[near] + own, truth.labels[near], target)
    error = abs(shifted - truth.contexts(target[None]) - own).max()
    assert error > 0.05, "differences of marginal means are wrong when contexts are unbalanced, and one held out unbalances them"


def test_in_balanced_data_marginal_means_are_enough():
    X, truth, _, _ = planted(n=960)
    means, effects = category_means(X, truth.labels), fit_effects(X, truth.labels)
    assert all(np.allclose(m - m.mean(0), e - e.mean(0)) for m, e in zip(means, effects))


def test_sampling_error_of_additive_effects():
    """With noise, the error of the held-out mean is of the size that least squares gives it."""
    adata, truth = simulate_contexts(n_cells=2400, n_genes=200, states=1, spread=0.5)
    target = np.array([1, 2, 0])
    train = (truth.labels != target).any(1)
    X = truth.contexts(truth.labels) + 0.5 * np.random.default_rng(0).normal(size=adata.shape)
    one_hot = np.concatenate([np.eye(size)[column] for size, column in zip((2, 4, 3), truth.labels[train].T)], 1)
    row = np.concatenate([np.eye(size)[c] for size, c in zip((2, 4, 3), target)])
    expected = 0.5 * np.sqrt(row @ np.linalg.pinv(one_hot.T @ one_hot) @ row)
    error = (fitted(fit_effects(X[train], truth.labels[train]), target[None]) - truth.contexts(target[None]))[0]
    assert 0.85 < error.std() / expected < 1.15


@given(seeds)
def test_least_squares_is_that_of_numpy(seed):
    rng = np.random.default_rng(seed)
    labels, X = rng.integers(0, [2, 3], size=(40, 2)), rng.normal(size=(40, 5))
    design = np.concatenate([np.eye(2)[labels[:, 0]], np.eye(3)[labels[:, 1]]], 1)
    wanted = design @ np.linalg.lstsq(design, X, rcond=None)[0]
    assert np.allclose(fitted(fit_effects(X, labels), labels), wanted)


def test_the_factor_model_with_its_residual_kept_would_be_additive():
    """Its cells scatter around those of `additive`, by the posterior of their factors and the noise; their covariance is that of real cells."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=(4000, 2))
    loading = rng.normal(size=(2, 12))
    X = labels @ rng.normal(size=(2, 12)) + rng.normal(size=(4000, 2)) @ loading + 0.4 * rng.normal(size=(4000, 12))
    target = np.ones_like(labels)
    made, plain = factor_model(X, labels, 0)(X, labels, target), counterfactual("additive", X, labels, X, labels, target)
    assert abs((made - plain).mean(0)).max() < 0.05
    assert np.allclose(np.cov(made.T), loading.T @ loading + 0.16 * np.eye(12), atol=0.35)
    assert (made != factor_model(X, labels, 1)(X, labels, target)).any() and (made == factor_model(X, labels, 0)(X, labels, target)).all()


@pytest.mark.parametrize("method", PLAIN)
def test_methods_depend_on_their_seed_and_on_nothing_else(method):
    adata, truth = simulate_contexts(n_cells=240, n_genes=20)
    X, target = adata.X, np.array([1, 0, 2])
    run = lambda seed: counterfactual(method, X, truth.labels, X[:9], truth.labels[:9], target, seed, QUICK)
    first = run(0)
    torch.manual_seed(5)
    np.random.seed(5)
    assert (first == run(0)).all() and first.dtype == np.float32 and first.shape == (9, 20)
    assert (first != run(1)).any() == (method in ("factor", "arithmetic", "cvae"))
    each = counterfactual(method, X, truth.labels, X[:9], truth.labels[:9], np.tile(target, (9, 1)), 0, QUICK)
    assert (first == each).all()


@pytest.mark.parametrize("method", [m for m in PLAIN if m != "copy"])
def test_categories_without_training_cells_are_refused(method):
    adata, truth = simulate_contexts(n_cells=240, n_genes=20, categories={"assay": 2, "type": 3})
    train = truth.labels[:, 1] != 1
    move = learn(method, adata.X[train], truth.labels[train], 0, QUICK)
    for wrong in ([0, 1], [0, 7], [-1, 0]):
        with pytest.raises(InputError, match="has no training cells"):
            move(adata.X[:1], truth.labels[train][:1], np.array([wrong]))


def test_bad_calls():
    with pytest.raises(InputError, match="choose one of copy"):
        learn("magic", np.zeros((4, 2)), np.zeros((4, 1), int))
    with pytest.raises(InputError, match="have shapes"):
        learn("additive", np.zeros((4, 2)), np.zeros((3, 1), int))
    with pytest.raises(InputError, match="2 training cells have values that are not finite"):
        learn("additive", np.where(np.eye(4) * [1, 1, 0, 0], np.nan, 0.0), np.zeros((4, 1), int))


def test_networks_learn_what_a_context_does():
    adata, truth = simulate_contexts(n_cells=2000, n_genes=40, spread=0.2)
    target = np.array([1, 2, 0])
    train, near = (truth.labels != target).any(1), (truth.labels == [0, 2, 0]).all(1)
    step = truth.contexts(target[None])[0] - truth.contexts(np.array([[0, 2, 0]]))[0]
    for method in ("arithmetic", "cvae"):
        made = counterfactual(method, adata.X[train], truth.labels[train], adata.X[near], truth.labels[near], target, train=TrainConfig(epochs=60, lr=2e-3, progress=False))
        assert np.corrcoef(made.mean(0) - adata.X[near].mean(0), step)[0, 1] > 0.85, method


# the board: tasks

@given(seeds, st.integers(2, 4), st.integers(2, 4), st.floats(0.3, 1))
def test_held_out_contexts_can_be_told_from_the_others(seed, a, b, share):
    rng = np.random.default_rng(seed)
    every = np.stack(np.meshgrid(range(a), range(b), range(2), indexing="ij"), -1).reshape(-1, 3)
    contexts = every[rng.random(len(every)) < share]
    cells = rng.integers(20, 100, len(contexts))
    try:
        out = hold_out(contexts, cells, seed)
    except InputError:
        rest = lambda i: np.delete(contexts, i, 0)
        assert not any(len(sources_of(contexts[i], rest(i))) and tellable(contexts[i], rest(i)) for i in np.flatnonzero(cells >= ENOUGH)), "it could have"
        return
    assert 1 <= out.sum() <= 4 and (cells[out] >= ENOUGH).all() and (out == hold_out(contexts, cells, seed)).all()
    rng = np.random.default_rng(0)
    effects = [rng.normal(size=(size, 3)) for size in (a, b, 2)]
    mean = sum(table[column] for table, column in zip(effects, contexts.T))
    assert np.allclose(fitted(fit_effects(mean[~out], contexts[~out]), contexts[out]), mean[out]), "any additive truth is known exactly"


@pytest.mark.parametrize("dataset", ["tiny", "simulated_counts", *FILES])
def test_tasks_are_what_they_say(dataset):
    if dataset in FILES and (data_root() is None or not all((data_root() / f).is_file() for f in FILES[dataset])):
        pytest.skip("the data are not on this machine")
    task = context_task(dataset)
    fields = list(task.categories)
    assert task.X.shape == (len(task.labels), len(task.genes)) and np.isfinite(task.X).all() and task.X.shape[1] <= 1000
    assert 1 <= len(task.asked) <= 4
    for one in task.asked:
        real = np.flatnonzero((task.labels == one.target).all(1))
        assert not task.train[real].any() and len(real) >= ENOUGH and set(real) == {*one.known, *one.other} and abs(len(one.known) - len(one.other)) <= 1
        assert task.train[one.source].all() and len(one.source) <= board.MOST
        differs = task.labels[one.source] != one.target
        assert (differs.sum(1) == 1).all() and differs[:, fields.index(one.changed)].all()
    assert task.train.sum() + sum(len(one.known) + len(one.other) for one in task.asked) == len(task.X)
    table = task.table(task.train)
    assert list(table.obs) == fields and (table.X == task.X[task.train]).all() and table.obs.iloc[0].tolist() == task.name(task.labels[task.train][0]).split(", ")


def test_genes_and_scale_come_from_training_cells():
    adata = board.load("simulated_counts")
    task = context_task("simulated_counts")
    train = task.train
    assert np.isclose(np.expm1(task.X[train]).sum(1).mean(), np.median(np.asarray(adata.X[np.flatnonzero(train)].sum(1))), rtol=0.01)
    changed = adata.X.copy().tolil()
    changed[np.flatnonzero(~train)[:50]] = 3
    X, kept = board._prepared(changed.tocsr(), train, 60)
    again, same = board._prepared(adata.X, train, 60)
    assert (kept == same).all() and (X[train] == again[train]).all() and (X != again).any()


def test_unknown_and_absent_data(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="'nowhere' is unknown"):
        context_task("nowhere")
    monkeypatch.setenv("GEARS_DATA", str(tmp_path))
    with pytest.raises(InputError, match="is not here"):
        board.load("pancreas")
    assert set(FILES) < set(DATASETS)


# the board: rows

def tiny():
    return context_task("tiny")


@pytest.mark.parametrize("method", PLAIN)
def test_held_out_cells_are_never_read(method):
    task = tiny()
    poisoned = replace(task, X=np.where(task.train[:, None], task.X, np.nan).astype(np.float32))
    made, again = answer(poisoned, method, 0, QUICK), answer(task, method, 0, QUICK)
    assert all(np.isfinite(m).all() and (m == a).all() for m, a in zip(made, again))


def test_a_maker_is_a_method():
    def perfect(task, seed):
        "Gives cells of the target back: what no method may do, and what the scores must then say."
        def move(cells, source, target):
            own = np.flatnonzero((task.labels == target[0]).all(1))
            return task.X[np.random.default_rng(seed).choice(own, len(cells))]
        return move

    lines = board_row("tiny", 0, "cheat", makers={"cheat": perfect})
    assert all(line["accuracy"] > 0.97 and line["e_distance_ratio"] < 1.1 and line["mean_correlation"] > 0.97 and 0.8 < line["variance_ratio"] < 1.25 for line in lines)
    with pytest.raises(InputError, match="choose one of copy, real, .*, cheat"):
        board_row("tiny", 0, "cheap", makers={"cheat": perfect})


def test_rows_are_the_same_again_and_name_what_they_are():
    for method in ("copy", "real", "additive"):
        lines = board_row("tiny", 1, method, "smoke")
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines] == [{k: v for k, v in line.items() if k != "seconds"} for line in board_row("tiny", 1, method, "smoke")]
        assert all(line["changed"] in ("assay", "type", "donor") and line["context"] != line["source"] and line["cells"] >= ENOUGH for line in lines)
    assert len({line["digest"] for seed in (0, 1) for line in board_row("tiny", seed, "copy")}) == 2


def test_the_table_orders_methods_as_the_truth_does():
    lines = [{"data": "tiny", "method": m, "seed": s, **line} for s in (0, 1) for m in ("copy", "real", "additive", "cvae") for line in board_row("tiny", s, m, "smoke")]
    table = by_method(lines).set_index("method")
    assert set(table.index) == {"copy", "real", "additive", "cvae"} < set(METHODS)
    assert table.accuracy["copy"] < 0.1 and table.accuracy["additive"] > 0.95 and table.mean_correlation["copy"] == 0
    assert table.e_distance_ratio["additive"] < 1.2 < table.e_distance_ratio["copy"] and abs(table.e_distance_ratio["real"] - 1) < 0.15
    assert table.variance_ratio["cvae"] < 0.5 < table.variance_ratio["additive"]


@pytest.mark.parametrize("dataset", ["interacting", "simulated"])
def test_additive_counterfactuals_fail_exactly_where_effects_interact(dataset):
    found = [line["e_distance_ratio"] for line in board_row(dataset, 0, "additive")]
    assert np.mean(found) < 1.1 and max(found) < 1.4 if dataset == "simulated" else min(found) > 5


def test_scores_refuse_cells_that_are_none():
    task = tiny()
    one = task.asked[0]
    real = task.X[one.known]
    for made in (real[:, :5], np.full_like(real, np.nan), real[0]):
        with pytest.raises(InputError, match="made cells"):
            scores(task, one, made, real)


def test_the_judge_is_the_classifier_of_sklearn():
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = np.column_stack([rng.integers(2, size=300), rng.integers(4, size=300) * 2])  # numbers with gaps
    X = rng.normal(size=(2, 15))[labels[:, 0]] + rng.normal(size=(8, 15))[labels[:, 1]] + 0.7 * rng.normal(size=(300, 15))
    judge, new = fit_judge(X, labels), X + 0.5 * rng.normal(size=X.shape)
    basis = PCA(14, svd_solver="full").fit(X)
    for i, column in enumerate(labels.T):
        wanted = LogisticRegression(max_iter=1000, tol=1e-6).fit(basis.transform(X), column).predict(basis.transform(new))
        assert (judge.calls(new)[:, i] == wanted).mean() > 0.99
    assert set(judge.calls(new)[:, 1]) == {0, 2, 4, 6}


def test_leading_genes_change_most_in_units_of_their_spread():
    rng = np.random.default_rng(0)
    source, real = rng.normal(size=(400, 6)) * [1, 1, 5, 1, 1, 1], rng.normal(size=(300, 6)) * [1, 1, 5, 1, 1, 1]
    real[:, [1, 2, 4]] += [2, 4, -1.5]
    assert leading_genes(source, real, 3).tolist() == [1, 4, 2]
