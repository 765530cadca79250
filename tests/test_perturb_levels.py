"""Levels of controls and their use in `Perturb`: by loops, by projection and by stacked least squares, with planted faults, poisoned cells, few cells, saved and read."""
from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.optimize import lsq_linear

from gears_nb.core.errors import InputError
from gears_nb.core.store import Store
from gears_nb.perturb import perturb as module
from gears_nb.perturb.levels import INSIDE, PRIOR, STRENGTH, Levels, _solved, fit_levels, of_conditions, pulls
from gears_nb.perturb.perturb import PERTURB_FORMAT, Fitted, Perturb, ask, load, predict, predicted, save
from gears_nb.perturb.prepare import SEPARATOR, Deltas, deltas, partners
from gears_nb.perturb.screens import CONTROL, Screen, conditions
from gears_nb.perturb.simulator import simulate_screen

seeds = st.integers(0, 10**6)
few = settings(max_examples=4)
ANCHOR = {"first.epochs": 0, "second.epochs": 0, "anchor": "genes", "n_hvg": None}
DOSES = (100.0, 10000.0)


def new(**changes) -> Perturb:
    return Perturb(profile="smoke", progress=False, **ANCHOR | changes)


def drawn_levels(seed: int, k: int = 6, q: int = 2, lines: str = "KM") -> tuple[Levels, np.random.Generator]:
    "Levels of random numbers, and a generator for more."
    rng = np.random.default_rng(seed)
    components = np.linalg.qr(rng.normal(size=(k, q)))[0].T
    weights = {kind: rng.random(4) for kind in PRIOR}
    return Levels(components, rng.uniform(0.5, 2, k), rng.uniform(0.5, 8, 2), {name: rng.normal(size=k) for name in lines}, weights), rng


def logs(seed: int, k: int = 12, lines: str = "KM", batches: int = 3, few_controls: dict[str, int] | None = None) -> Screen:
    "Logarithmic values of all combinations of lines, batches and two drugs: 5 treated cells of each, 6 controls of a batch (or as `few_controls` says)."
    rng, rows = np.random.default_rng(seed), []
    for m in lines:
        for b in range(batches):
            names = ["A"] * 5 + ["B"] * 5 + [CONTROL] * (few_controls or {}).get(f"{m}{b}", 6)
            rows += [(name, m, f"b{b}") for name in names]
    name, line, batch = (np.array(column) for column in zip(*rows))
    base = {m: rng.normal(size=k) for m in lines} | {f"b{b}": 0.5 * rng.normal(size=k) for b in range(batches)} | {"A": rng.normal(size=k), "B": rng.normal(size=k), CONTROL: np.zeros(k)}
    values = np.stack([base[a] + base[b] + base[c] for a, b, c in rows]) + 0.7 * rng.normal(size=(len(rows), k)) + 5
    order = rng.permutation(len(rows))
    made = Screen(sp.csr_matrix(values.astype(np.float32)), False, np.array([f"g{j}" for j in range(k)]), np.array([f"c{i}" for i in range(len(rows))]), name, np.where(name == CONTROL, np.nan, 10.0), line, batch)
    return made.take(order)


def learned(screen: Screen, train=None, given=None, estimate=None, seed: int = 0) -> tuple[Levels, Deltas]:
    train = np.ones(screen.n, bool) if train is None else train
    given = train & screen.control if given is None else given
    taught = deltas(screen, screen.values, train, given)
    return fit_levels(screen, screen.values, train, given, taught, 0.6 * taught.delta if estimate is None else estimate, seed), taught


REMEMBERED: dict[bytes, module.Anchor] = {}


def remembered(taught: Deltas, *, real=module.fit_anchor, **more) -> module.Anchor:
    "Anchors of differences that were there before are not fitted again."
    key = taught.delta.tobytes()
    REMEMBERED[key] = REMEMBERED.get(key) or real(taught, **more)
    return REMEMBERED[key]


def alike(one: Levels, two: Levels, tol: float = 1e-6) -> bool:
    "The same levels up to the signs of components."
    pairs = [(one.components.T @ one.components, two.components.T @ two.components), (one.spread, two.spread), (one.within, two.within), *((one.lines[m], two.lines[m]) for m in one.lines), *((one.weights[k], two.weights[k]) for k in PRIOR)]
    return list(one.lines) == list(two.lines) and all(np.allclose(a, b, atol=tol, rtol=tol) for a, b in pairs)


def same(one: Levels, two: Levels) -> bool:
    "The same bits."
    bits = lambda v: [v.components, v.spread, v.within, *v.lines.values(), *v.weights.values()]
    return list(one.lines) == list(two.lines) and all(np.array_equal(a, b) for a, b in zip(bits(one), bits(two), strict=True))


def members(screen: Screen, given: np.ndarray, c: int) -> tuple[str, np.ndarray]:
    "Name of the group that a cell is compared with, and its controls."
    line = given & screen.control & (screen.line == screen.line[c])
    own = line & (screen.batch == screen.batch[c])
    return (screen.line[c] + SEPARATOR + screen.batch[c], own) if own.any() else (str(screen.line[c]), line)


# shares


def shares_by_loops(levels: Levels, d: np.ndarray, cells: int) -> np.ndarray:
    inside, outside = np.zeros(len(d)), np.zeros(len(d))
    for basis, part in ((levels.components, inside), (null_space(levels.components).T, outside)):
        for row in basis:
            part += sum(row[j] * d[j] for j in range(len(d))) * row
    out = []
    for part, v in ((inside, levels.within[0]), (outside, levels.within[1])):
        length = cells * sum((part[j] / levels.spread[j]) ** 2 for j in range(len(d)))
        s = 1.0 if length <= v else v / length
        out += [-s * part, -(1 - s) * part]
    return np.array(out)


@drawn(seeds, st.integers(1, 4), st.sampled_from([1, 3, 50, 10**6]))
def test_shares_by_loops_and_by_an_explicit_basis(seed, q, cells):
    levels, rng = drawn_levels(seed, q=q)
    d = rng.normal(size=6) * 10.0 ** rng.integers(-2, 2)
    found = levels.shares(d, cells)
    assert found.shape == (4, 6) and np.allclose(found, shares_by_loops(levels, d, cells), atol=1e-9)
    assert np.allclose(found.sum(0), -d) and np.allclose(found[2:] @ levels.components.T, 0) and np.allclose(found[:2] @ null_space(levels.components), 0)


@drawn(seeds)
def test_with_more_cells_sampling_never_explains_more(seed):
    levels, rng = drawn_levels(seed)
    d = rng.normal(size=6)
    size = np.array([[np.linalg.norm(row) for row in levels.shares(d, n)] for n in (1, 2, 5, 20, 100, 10**5)])
    assert (np.diff(size[:, [0, 2]], axis=0) <= 1e-12).all() and (np.diff(size[:, [1, 3]], axis=0) >= -1e-12).all() and (size[-1, [0, 2]] < 1e-3).all()


def test_without_a_deviation_there_is_nothing_to_share():
    levels, _ = drawn_levels(0)
    assert not levels.shares(np.zeros(6), 5).any() and not replace(levels, within=np.zeros(2)).shares(np.zeros(6), 5).any()
    assert np.allclose(levels.shares(levels.components[0] * 3, 5)[2:], 0)
    whole = replace(levels, components=np.eye(6), within=np.array([6.0, 0.0]))
    assert np.allclose(whole.shares(np.ones(6), 3)[2:], 0) and np.isfinite(whole.shares(np.ones(6), 3)).all()


# pulls


@drawn(seeds, st.integers(1, 40), st.integers(0, 40))
def test_a_pull_by_hand(seed, cells, more):
    levels, rng = drawn_levels(seed, lines="KMR")
    mean = rng.normal(size=6)
    middle = (levels.lines["K"] + levels.lines["M"] + levels.lines["R"]) / 3
    batch, line = shares_by_loops(levels, mean - levels.lines["M"], cells), shares_by_loops(levels, levels.lines["M"] - middle, cells + more)
    wanted = sum(levels.weights["batch"][i] * batch[i] + levels.weights["line"][i] * line[i] for i in range(4))
    assert np.allclose(levels.pull("M", mean, cells, cells + more), wanted, atol=1e-9)


@drawn(seeds)
def test_a_line_that_was_not_trained_is_compared_with_lines_alone(seed):
    levels, rng = drawn_levels(seed)
    mean = rng.normal(size=6)
    wanted = levels.weights["line"] @ shares_by_loops(levels, mean - (levels.lines["K"] + levels.lines["M"]) / 2, 30)
    assert np.allclose(levels.pull("never seen", mean, 4, 30), wanted) and np.array_equal(levels.pull("never seen", mean, 4, 30), levels.pull("never seen", mean, 9, 30))
    assert np.allclose(levels.pull("never seen", (levels.lines["K"] + levels.lines["M"]) / 2, 4, 30), 0)


@drawn(seeds)
def test_a_group_like_its_reference_is_not_pulled(seed):
    levels, rng = drawn_levels(seed, lines="K")
    assert not levels.pull("K", levels.lines["K"], 7, 20).any()
    two = replace(levels, lines={"K": levels.lines["K"], "M": levels.lines["K"]})
    assert not two.pull("M", levels.lines["K"], 7, 20).any() and two.pull("M", rng.normal(size=6), 7, 20).any()


@drawn(seeds, st.sampled_from([0.125, 8.0]))
def test_pulls_have_the_unit_of_the_values(seed, unit):
    levels, rng = drawn_levels(seed)
    mean, scaled = rng.normal(size=6), replace(levels, spread=unit * levels.spread, lines={m: unit * v for m, v in levels.lines.items()})
    for line in ("K", "never seen"):
        assert np.allclose(scaled.pull(line, unit * mean, 5, 9), unit * levels.pull(line, mean, 5, 9), rtol=1e-9)


@few
@drawn(seeds)
def test_pulls_by_a_loop_over_groups(seed):
    screen = logs(seed, few_controls={"K1": 0, "M2": 1})
    levels, given = replace(drawn_levels(seed, k=12)[0]), screen.control & (np.arange(screen.n) % 5 > 0)
    found, D, wanted = pulls(levels, screen, screen.values, given), screen.values.toarray().astype(float), {}
    for c in range(screen.n):
        name, own = members(screen, given, c)
        if own.any():
            wanted[name] = levels.pull(str(screen.line[c]), D[own].mean(0), int(own.sum()), int((given & (screen.line == screen.line[c])).sum()))
    assert found.keys() == wanted.keys() and all(np.allclose(found[k], wanted[k], atol=1e-6) for k in found)
    assert "K" in found and "K" + SEPARATOR + "b1" not in found


@few
@drawn(seeds)
def test_of_conditions_by_a_loop_over_cells(seed):
    screen = logs(seed, few_controls={"K1": 0})
    rng, given = np.random.default_rng(seed), screen.control
    rows = rng.random(screen.n) < 0.6
    pulled = {name: rng.normal(size=12) for name in partners(screen, given)[2]}
    pulled.pop("M" + SEPARATOR + "b2")  # a group without a pull gets nothing
    table = conditions(screen, rows & ~screen.control)[0]
    found = of_conditions(pulled, screen, rows, given)
    for i in range(len(table)):
        cells = [c for c in range(screen.n) if rows[c] and (screen.line[c], screen.perturbation[c]) == (table.line[i], table.perturbation[i])]
        assert np.allclose(found[i], np.mean([pulled.get(members(screen, given, c)[0], np.zeros(12)) for c in cells], 0))
    assert found.shape == (len(table), 12)


# weights


@drawn(seeds, st.integers(1, 6))
def test_weights_are_a_ridge_by_stacked_rows(seed, n):
    rng = np.random.default_rng(seed)
    spread, prior = rng.uniform(0.5, 2, 7), rng.random(4)
    features, wanted = [rng.normal(size=(4, 7)) for _ in range(n)], [rng.normal(size=7) for _ in range(n)]
    A, b = np.concatenate([(f / spread).T for f in features]), np.concatenate([w / spread for w in wanted])
    held = np.sqrt(STRENGTH * np.square(A).sum(0) / n + 1e-9)  # as many average groups, which want the prior
    stacked, target = np.concatenate([A, np.diag(held)]), np.concatenate([b, held * prior])
    found, free = _solved(features, wanted, spread, prior), np.linalg.lstsq(stacked, target, rcond=None)[0]
    if ((free > 0) & (free < 1)).all():
        assert np.allclose(found, free, atol=1e-4)
    cost = lambda w: np.square(stacked @ w - target).sum()
    assert cost(free) <= cost(found) + 1e-9 and all(cost(found) <= cost(w) + 1e-6 for w in [np.clip(free, 0, 1), prior, *rng.random((50, 4))])


@drawn(seeds)
def test_weights_that_are_planted_are_found_and_few_groups_leave_the_prior(seed):
    rng = np.random.default_rng(seed)
    spread, prior, truth = np.ones(9), np.array([1.0, 0.0, 1.0, 0.3]), rng.random(4)
    features = [rng.normal(size=(4, 9)) for _ in range(400)]
    assert np.allclose(_solved(features, [truth @ f for f in features], spread, prior), truth, atol=0.03)
    orthogonal = [np.eye(4, 9)]
    assert np.allclose(_solved(orthogonal, [truth @ orthogonal[0]], spread, prior), (truth + STRENGTH * prior) / (1 + STRENGTH))
    assert np.array_equal(_solved([], [], spread, prior), prior)


def test_a_part_that_no_group_speaks_of_keeps_its_prior():
    prior, f = np.array(PRIOR["batch"]), np.zeros((4, 9))
    f[:3, :3] = np.eye(3)
    assert np.allclose(_solved([f, f], [f[0], f[0]], np.ones(9), prior)[3], 0.3, atol=1e-3)


def by_loops(screen: Screen, train: np.ndarray, given: np.ndarray, taught: Deltas, estimate: np.ndarray) -> Levels:
    "`fit_levels`, dense and slow."
    D, spread = screen.values.toarray().astype(float), np.sqrt(taught.sampling)
    place = {(m, p, d): i for i, (m, p, d) in enumerate(zip(taught.conditions.line, taught.conditions.perturbation, taught.conditions.dose))}
    groups: dict[str, list[int]] = {}
    for c in np.flatnonzero(train & ~screen.control):
        groups.setdefault(members(screen, given, c)[0], []).append(c)
    base = {g: members(screen, given, cells[0])[1] for g, cells in groups.items()}
    missed = {g: np.mean([D[c] - estimate[place[screen.line[c], screen.perturbation[c], screen.dose[c]]] for c in cells], 0) - D[base[g]].mean(0) for g, cells in groups.items()}
    of = {m: sorted(g for g in groups if g.split(SEPARATOR)[0] == m) for m in sorted({g.split(SEPARATOR)[0] for g in groups})}
    lines = {m: sum(len(groups[g]) * D[base[g]].mean(0) for g in own) / sum(len(groups[g]) for g in own) for m, own in of.items()}
    components = np.linalg.svd(D[train] - D[train].mean(0), full_matrices=False)[2][: min(INSIDE, min(D[train].shape) - 1)]
    own_group = {c: members(screen, given, c)[0] for c in np.flatnonzero(given & screen.control)}
    residual = np.stack([D[c] - D[[d for d in own_group if own_group[d] == own_group[c]]].mean(0) for c in own_group]) @ components.T
    inside = sum((residual[:, i] ** 2).sum() / max(len(residual) - len(set(own_group.values())), 1) * ((row / spread) ** 2).sum() for i, row in enumerate(components))
    blank = Levels(components, spread, np.array([inside, max(0.0, D.shape[1] - inside)]), lines, {})
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"batch": [], "line": []}
    for m, own in of.items():
        common = sum(missed[g] for g in own) / len(own)
        for g in (g for g in own if SEPARATOR in g):
            rest = [h for h in own if h != g and SEPARATOR in h]
            if rest:
                pooled = sum(base[h].sum() * D[base[h]].mean(0) for h in rest) / sum(base[h].sum() for h in rest)
                rows["batch"].append((shares_by_loops(blank, D[base[g]].mean(0) - pooled, base[g].sum()), missed[g] - common))
        if len(of) > 1:
            away = lines[m] - sum(lines[h] for h in of if h != m) / (len(of) - 1)
            rows["line"].append((shares_by_loops(blank, away, (given & screen.control & (screen.line == m)).sum()), common))
    weights = {}
    for kind, own in rows.items():
        A, b = (np.concatenate([f(*pair) for pair in own]) if own else np.zeros((0, 4)) for f in (lambda f, w: (f / spread).T, lambda f, w: w / spread))
        held = np.sqrt(STRENGTH * np.square(A).sum(0) / max(len(own), 1) + 1e-9)
        weights[kind] = lsq_linear(np.concatenate([A, np.diag(held)]), np.concatenate([b, held * PRIOR[kind]]), (0, 1)).x if own else np.array(PRIOR[kind])
    return replace(blank, weights=weights)


@few
@drawn(seeds, st.sampled_from(["K", "KM", "KMR"]), st.integers(1, 3))
def test_levels_by_loops(seed, lines, batches):
    screen = logs(seed, k=14, lines=lines, batches=batches, few_controls={"K0": 3})
    train = np.random.default_rng(seed).random(screen.n) < 0.9
    found, taught = learned(screen, train, screen.control)
    assert alike(found, by_loops(screen, train, screen.control, taught, 0.6 * taught.delta), 1e-4)
    assert np.allclose(found.components @ found.components.T, np.eye(len(found.components)), atol=1e-8) and all(((w >= 0) & (w <= 1)).all() for w in found.weights.values())


def test_weights_are_the_best_between_0_and_1():
    d, prior = np.ones(5), np.array([0.0, 0.0, 1.0, 0.3])
    features = [np.stack([0 * d, 0 * d, -0.01 * d, -0.99 * d]) for _ in range(30)]
    found = _solved(features, [-d] * 30, np.ones(5), prior)  # all of it should go back: weights (., ., 1, 1)
    A = np.concatenate([f.T for f in features] + [np.diag(np.sqrt(STRENGTH * np.square(features[0]).sum(1)))])
    best = lsq_linear(A, np.concatenate([-np.ones(150), np.sqrt(STRENGTH * np.square(features[0]).sum(1)) * prior]), (0, 1)).x
    assert best[3] > 0.9 and np.allclose(found[2:], best[2:], atol=0.02)


@pytest.fixture(scope="module")
def faulty():
    "Controls of 24 batches with a fault of their own each, outside of what cells vary in, by the share of it that treated cells have: levels, pulls, faults around their mean."
    rng, k, batches = np.random.default_rng(0), 60, 24
    rows = [(name, b) for b in range(batches) for name in ["A"] * 20 + [CONTROL] * 60]
    name, batch = np.array([n for n, _ in rows]), np.array([b for _, b in rows])
    fault, effect, axes = 0.8 * rng.normal(size=(batches, k)), rng.normal(size=k), np.linalg.qr(rng.normal(size=(k, INSIDE)))[0].T
    fault, noise, out = fault - fault @ axes.T @ axes, 4 * rng.normal(size=(len(rows), INSIDE)) @ axes + 0.3 * rng.normal(size=(len(rows), k)), {}
    for shared in (0.0, 1.0):
        values = 5 + np.where((name == CONTROL)[:, None], fault[batch], shared * fault[batch] + effect) + noise
        own = Screen(sp.csr_matrix(values.astype(np.float32)), False, np.arange(k).astype(str), np.arange(len(rows)).astype(str), name, np.full(len(rows), np.nan), np.full(len(rows), "K"), np.array([f"b{b:02d}" for b in batch]))
        levels, _ = learned(own, estimate=effect[None].astype(np.float32))
        out[shared] = levels, np.stack([v for _, v in sorted(pulls(levels, own, own.values, own.control).items())]), fault - fault.mean(0)
    return out


@pytest.mark.parametrize(("shared", "low", "high"), [(0.0, -1.05, -0.5), (1.0, -0.25, 0.0)])
def test_faults_of_batches_are_pulled_back_as_far_as_treated_cells_do_not_share_them(shared, low, high, faulty):
    levels, pulled, fault = faulty[shared]
    assert low < (pulled * fault).sum() / np.square(fault).sum() < high and -high <= levels.weights["batch"][3] <= -low


def test_faults_that_treated_cells_do_not_share_are_pulled_back_whole(faulty):
    levels, pulled, fault = faulty[0.0]
    assert (pulled * fault).sum() / np.square(fault).sum() < -0.85


def test_cells_vary_as_much_as_one_says_they_do():
    screen = logs(3, k=40, lines="K", batches=1, few_controls={"K0": 400})
    levels, _ = learned(screen)
    R = screen.values.toarray()[screen.control] - screen.values.toarray()[screen.control].mean(0)
    inside = R @ levels.components.T @ levels.components
    assert np.allclose(levels.within, [np.square(part / levels.spread).sum(1).mean() for part in (inside, R - inside)], rtol=0.15)


def test_what_lines_differ_by_is_no_variance_of_a_single_cell():
    screen = logs(3, k=40, lines="KMR", batches=1, few_controls={f"{m}0": 150 for m in "KMR"})
    levels, _ = learned(screen)
    D = screen.values.toarray()
    R = np.concatenate([D[screen.control & (screen.line == m)] - D[screen.control & (screen.line == m)].mean(0) for m in "KMR"])
    inside = R @ levels.components.T @ levels.components
    assert np.allclose(levels.within, [np.square(part / levels.spread).sum(1).mean() for part in (inside, R - inside)], rtol=0.3)


def test_controls_of_a_line_are_counted_once(monkeypatch):
    screen, seen = logs(0, few_controls={"K1": 0}), []
    real = Levels.shares
    monkeypatch.setattr(Levels, "shares", lambda self, d, cells: seen.append(int(cells)) or real(self, d, cells))
    learned(screen)
    assert max(seen) <= max((screen.control & (screen.line == m)).sum() for m in "KM")


# what may not matter


@few
@drawn(seeds)
def test_order_of_cells_and_names_of_batches_do_not_matter(seed):
    screen, rng = logs(seed), np.random.default_rng(seed)
    (levels, _), given = learned(screen), screen.control
    mixed = screen.take(rng.permutation(screen.n))
    renamed = replace(screen, batch=np.array([{"b0": "z", "b1": "a plate", "b2": "m"}[b] for b in screen.batch]))
    found = pulls(levels, screen, screen.values, given)
    for other, name in ((mixed, lambda b: b), (renamed, {"b0": "z", "b1": "a plate", "b2": "m"}.get)):
        again = learned(other)[0]
        assert alike(levels, again, 1e-5)
        made = pulls(again, other, other.values, other.control)
        assert all(np.allclose(value, made[SEPARATOR.join([key.split(SEPARATOR)[0], name(key.split(SEPARATOR)[1])])], atol=1e-5) for key, value in found.items()) and len(made) == len(found)


@few
@drawn(seeds, st.sampled_from([0.25, 4.0]))
def test_a_fit_has_the_unit_of_the_values(seed, unit):
    screen = logs(seed)
    scaled = replace(screen, values=unit * screen.values)
    levels, again = learned(screen)[0], learned(scaled)[0]
    assert np.allclose(levels.within, again.within, rtol=1e-4) and all(np.allclose(levels.weights[k], again.weights[k], atol=1e-4) for k in PRIOR)
    one, two = pulls(levels, screen, screen.values, screen.control), pulls(again, scaled, scaled.values, scaled.control)
    assert all(np.allclose(unit * one[k], two[k], atol=1e-4) for k in one)


def test_levels_repeat_and_leave_everything_as_it_was():
    screen = logs(1)
    before, state = screen.values.copy(), np.random.get_state()[1].copy()
    assert same(learned(screen)[0], learned(screen)[0]) and alike(learned(screen)[0], learned(screen, seed=5)[0])
    assert np.array_equal(before.toarray(), screen.values.toarray()) and np.array_equal(state, np.random.get_state()[1])


def poisoned(screen: Screen, hidden: np.ndarray, names: bool) -> Screen:
    "Other values in the cells of mask `hidden`; with `names`, other lines, batches, perturbations and doses, too."
    D = screen.values.toarray()
    D[hidden] = D[hidden][:, ::-1] * 7 + 3
    columns = {"perturbation": "another", "batch": "another plate", "line": "another line", "dose": 1e7} if names else {}
    return replace(screen, values=sp.csr_matrix(D), **{k: np.where(hidden, v, getattr(screen, k)) for k, v in columns.items()})


@few
@drawn(seeds, st.booleans())
def test_test_cells_and_controls_that_are_not_given_are_not_read(seed, names):
    screen, rng = logs(seed), np.random.default_rng(seed)
    train, given = rng.random(screen.n) < 0.7, screen.control & (rng.random(screen.n) < 0.7)
    train &= ~screen.control | given
    bad = poisoned(screen, ~(train | given), names)
    assert (~(train | given) & screen.control).any() and (~(train | given) & ~screen.control).any()
    clean, (again, taught) = learned(screen, train, given), learned(bad, train, given)
    assert same(clean[0], again) and np.array_equal(clean[1].delta, taught.delta)
    one, two = pulls(clean[0], screen, screen.values, given), pulls(again, bad, bad.values, given)
    assert all(np.array_equal(one[k], two[k]) for k in one if SEPARATOR in k) and {k for k in one if SEPARATOR in k} == {k for k in two if SEPARATOR in k}
    assert np.array_equal(of_conditions(one, screen, train, given), of_conditions(two, bad, train, given))


# hardly anything


DEGENERATE = {"one group": {"lines": "K", "batches": 1}, "one line": {"lines": "K", "batches": 2}, "lines of a batch": {"lines": "KM", "batches": 1}, "one control": {"few_controls": {"K0": 1, "K1": 1, "K2": 1}}, "a control in all": {"lines": "K", "batches": 1, "few_controls": {"K0": 1}},
              "a batch without controls": {"few_controls": {"K1": 0}}, "a line with one batch of controls": {"few_controls": {"K1": 0, "K2": 0}}, "three genes": {"k": 3}}


@pytest.mark.parametrize("case", DEGENERATE)
def test_levels_of_hardly_anything(case):
    screen = logs(2, **DEGENERATE[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels, taught = learned(screen)
        found = pulls(levels, screen, screen.values, screen.control)
        shift = of_conditions(found, screen, np.ones(screen.n, bool), screen.control)
    assert all(np.isfinite(v).all() for v in found.values()) and all(((w >= 0) & (w <= 1)).all() for w in levels.weights.values()) and shift.shape == taught.delta.shape and np.isfinite(shift).all()
    if case in ("one group", "a control in all"):
        assert not shift.any() and all(np.array_equal(levels.weights[k], PRIOR[k]) for k in PRIOR)
    if case in ("one line", "lines of a batch"):
        assert np.array_equal(levels.weights["line" if case == "one line" else "batch"], PRIOR["line" if case == "one line" else "batch"]) and shift.any()
    if "controls" in case:  # cells of such a batch have the pull of their line
        rows = (screen.batch == "b1") & (screen.line == "K")
        assert np.allclose(of_conditions(found, screen, rows, screen.control), found["K"])


def test_groups_that_are_all_alike_are_not_pulled():
    screen = logs(2)
    D = screen.values.toarray()
    D[screen.control] = np.tile(D[screen.control][:1], (screen.control.sum(), 1))
    screen = replace(screen, values=sp.csr_matrix(D))
    levels, _ = learned(screen)
    assert np.isfinite(levels.within).all() and all(np.isfinite(w).all() for w in levels.weights.values())
    assert all(np.allclose(v, 0, atol=1e-9) for v in pulls(levels, screen, screen.values, screen.control).values())


# in the model


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(seed=1, n_cells=240, n_genes=20, n_drugs=3, n_modules=3, n_lines=2, doses=DOSES, n_batches=3, batch_effect=0.5)[0]


@pytest.fixture(scope="module")
def levelled(screen):
    "The anchor alone, with levels whatever the rehearsal says."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "correlations", lambda predicted, taught: np.ones(len(predicted)))
        patch.setattr(module, "fit_anchor", remembered)
        return new().fit(screen)


def with_fit(model: Perturb, **changes) -> Perturb:
    other = Perturb(model.config, seed=model.seed)
    other._fitted, other._controls = replace(model.fitted, **changes), model._controls
    return other


def of_group(fitted: Fitted, line: str, batch: str) -> np.ndarray:
    return fitted.pulled[line + SEPARATOR + batch]


def test_the_pull_of_a_cell_is_that_of_its_group_or_the_mean_of_its_line(levelled):
    f, line, batch = levelled.fitted, np.array(["line2", "line1", "line2", "line1"]), np.array(["plate3", "plate1", "never seen", "plate1"])
    mean = {m: np.mean([of_group(f, m, f"plate{i}") for i in (1, 2, 3)], 0) for m in ("line1", "line2")}
    assert np.array_equal(f.pull(line, batch), [of_group(f, "line2", "plate3"), of_group(f, "line1", "plate1"), mean["line2"], of_group(f, "line1", "plate1")])
    assert np.array_equal(f.pull(line, None), [mean["line2"], mean["line1"], mean["line2"], mean["line1"]])
    far = np.array(["a line of which nobody heard", "line1"])
    assert not f.pull(far, None)[0].any() and not f.pull(far, np.array(["plate1", "plate2"]))[0].any() and np.array_equal(f.pull(far, np.array(["plate1", "plate2"]))[1], of_group(f, "line1", "plate2"))
    assert not replace(f, pulled={}).pull(line, batch).any() and replace(f, pulled={}).pull(line, None).shape == (4, 20)
    assert np.array_equal(f.pull(line.astype(object), batch.astype(object)), f.pull(line, batch))
    assert all(np.array_equal(v, w) for v, w in zip(f.pulled.values(), pulls(f.levels, levelled._controls, f.describer.norm.logged(levelled._controls), levelled._controls.control).values(), strict=True))


def test_batches_of_test_cells_do_not_change_the_pull_of_unknown_batches(levelled, screen):
    X, line = levelled.fitted.describer.norm.logged(screen), np.array(["line1", "line2"])
    test = ~screen.control & (np.arange(screen.n) % 7 == 0)
    one, two = (levelled.fitted.with_controls(replace(screen, batch=b), X, screen.control).pull(line, None) for b in (screen.batch, np.where(test, "another plate", screen.batch)))
    assert np.array_equal(one, two)


def test_new_controls_bring_pulls_of_their_own(levelled, screen):
    f, X = levelled.fitted, levelled.fitted.describer.norm.logged(screen)
    given = screen.control & (screen.batch != "plate1")
    part = f.with_controls(screen, X, given)
    wanted = pulls(f.levels, screen, X, given)
    assert part.pulled.keys() == wanted.keys() and all(np.array_equal(v, wanted[k]) for k, v in part.pulled.items()) and part.levels is f.levels
    far = replace(screen, line=np.where(screen.line == "line1", "far", screen.line))
    moved = f.with_controls(far, X, screen.control)
    own = screen.control & (screen.line == "line1")
    assert np.allclose(moved.pull(np.array(["far"]), np.array(["plate1"]))[0], f.levels.pull("far", X[own & (screen.batch == "plate1")].toarray().mean(0), 1, int(own.sum())), atol=1e-5) and "far" in moved.describer.lines
    assert not replace(f, levels=None).with_controls(screen, X, given).pulled


def test_a_prediction_is_moved_by_the_pull_and_nothing_else(levelled, screen):
    asked = ask(["drug01", "drug02+drug03", CONTROL], dose=[100, 3000], line=["line1", "line2"])
    f, own = levelled.fitted, levelled._controls
    rows = np.flatnonzero(own.line == "line1")[: len(asked)]
    X = f.describer.norm.logged(own, rows)
    treated = asked.perturbation != CONTROL
    for batch in (own.batch[rows], None):
        (_, with_pull), (_, without) = (predicted(v, X, asked, batch) for v in (f, replace(f, pulled={})))
        assert np.array_equal(with_pull[treated], without[treated] + f.pull(asked.line, batch).astype(np.float32)[treated]) and not with_pull[~treated].any()
    asked = asked.take(treated)
    a, b = predict(levelled, asked, cells=30), predict(with_fit(levelled, levels=None, pulled={}), asked, cells=30)
    place = {c: i for i, c in enumerate(own.cells)}
    at = [place[c] for c in a.obs["control"]]
    every, condition = f.pull(a.obs["line"].to_numpy(str), own.batch[at]), a.obs.groupby(["line", "perturbation", "dose"], observed=True, dropna=False).ngroup().to_numpy()
    pull = np.stack([every[condition == c].mean(0) for c in condition])  # cells of a condition move alike
    free = (a.X > 0) & (b.X > 0)  # nothing is clipped
    assert np.array_equal(a.obs["control"], b.obs["control"]) and free.mean() > 0.5 and np.abs(pull).max() > 0.01 and np.allclose((a.X - b.X)[free], pull[free], atol=1e-5)


@pytest.mark.parametrize(("with_levels", "kept"), [(0.49, False), (0.5, True), (0.51, True), (np.nan, False)])
def test_levels_are_kept_where_a_rehearsal_is_no_worse(with_levels, kept, screen, levelled, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "correlations", lambda predicted, taught: seen.append((predicted, taught)) or np.full(len(predicted), with_levels if len(seen) == 1 else 0.5))
    monkeypatch.setattr(module, "fit_anchor", remembered)
    found = new().fit(screen).fitted
    assert len(seen) == 2 and np.array_equal(seen[0][1].delta, seen[1][1].delta)  # both against what was observed
    assert (found.levels is not None) == kept == bool(found.pulled)
    X, every = found.describer.norm.logged(screen), np.ones(screen.n, bool)
    shift = of_conditions(levelled.fitted.pulled, screen, every, screen.control).astype(np.float32)
    plain = seen[1][1].delta
    assert np.array_equal(plain, deltas(screen, X, every, screen.control).delta) and np.array_equal(found.anchor.taught.delta, plain - shift if kept else plain)
    assert np.array_equal(seen[0][0], levelled.fitted.anchor.left_out + shift) and (kept or np.array_equal(found.anchor.left_out, seen[1][0]))


@pytest.mark.parametrize("changes", [{"levels": False}, {"anchor": "none", "first.epochs": 1}])
def test_without_levels(changes, screen, monkeypatch):
    monkeypatch.setattr(module, "fit_levels", lambda *a: pytest.fail("levels were fitted"))
    monkeypatch.setattr(module, "fit_anchor", remembered)
    small = {"network.latent": 4, "network.hidden": 8, "network.context": 4, "network.modules": 0, "groups": 16} if "anchor" in changes else {}
    model = new(**changes | small).fit(screen)
    assert model.fitted.levels is None and not model.fitted.pulled and np.isfinite(predict(model, ask("drug01", dose=100, line="line1"), cells=3).X).all()


def test_one_line_in_one_batch_is_the_same_with_levels_and_without(screen, monkeypatch):
    monkeypatch.setattr(module, "fit_anchor", remembered)
    own = replace(screen.take(screen.line == "line1"), batch=np.full((screen.line == "line1").sum(), "b"))
    one, two = (new(levels=on).fit(own) for on in (True, False))
    asked = ask("drug01", dose=100, line="line1")
    assert one.fitted.levels is not None and not np.stack(list(one.fitted.pulled.values())).any() and np.array_equal(predict(one, asked).X, predict(two, asked).X)


def test_a_model_with_levels_is_saved_and_read(levelled, screen, tmp_path):
    again = load(save(levelled, tmp_path / "m"))
    assert same(again.fitted.levels, levelled.fitted.levels) and all(np.allclose(v, again.fitted.pulled[k], rtol=0, atol=1e-12) for k, v in levelled.fitted.pulled.items()) and len(again.fitted.pulled) == 6
    asked, base = ask(["drug01", "drug03"], dose=DOSES, line=["line1", "line2"]), screen.take(screen.control)
    base = base.take(base.batch != "plate2")
    far = replace(base, line=np.where(base.line == "line2", "far", base.line), batch=np.full(base.n, "mine"))
    for controls, line in ((None, asked), (base, asked), (far, ask("drug02", dose=100, line=["line1", "far"]))):
        assert np.array_equal(predict(levelled, line, controls=controls, cells=9).X, predict(again, line, controls=controls, cells=9).X)
    plain = load(save(with_fit(levelled, levels=None, pulled={}), tmp_path / "plain"))
    assert plain.fitted.levels is None and not plain.fitted.pulled


def test_a_model_of_an_older_format_is_refused_in_one_line(levelled, tmp_path):
    store = Store(save(levelled, tmp_path))
    tensors, about = store.load("perturb")
    assert about["format"] == PERTURB_FORMAT == 2
    store.save("perturb", tensors, {k: v for k, v in about.items() if k != "levels"} | {"format": 1})
    with pytest.raises(InputError, match="format: is 1, this version reads 2") as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and "Remedy" in str(error.value)


def test_many_small_groups_of_controls_do_not_collapse_a_population():
    "A pull is about the mean of a group: with six cells in a group it is mostly their own error, and may not be taken from these cells."
    screen = simulate_screen(n_cells=700, n_genes=40, n_drugs=3, n_modules=4, n_lines=1, n_batches=1, seed=2)[0]
    wells = replace(screen, batch=np.array([f"well{i // 12:03d}" for i in range(screen.n)]))
    model = new().fit(wells)
    assert model.fitted.levels is not None and len(model.fitted.pulled) > 20
    made = predict(model, ask("drug01", dose=3000, line="line1"), cells=100)
    moved = made.layers["difference"]
    assert np.abs(moved - moved[0]).max() < 1e-5 and np.allclose(made.X, np.maximum(made.layers["control"] + moved, 0), atol=1e-5)
