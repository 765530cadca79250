"""Screens, preparation, splits and the simulator: against loops, under permutation, with poisoned test cells, and with input that cannot be."""
from __future__ import annotations

import re
from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gears_nb.core.errors import InputError
from gears_nb.perturb import simulator
from gears_nb.perturb.prepare import FLOOR, Normaliser, control_means, deltas, fit_normaliser, log_values, partners
from gears_nb.perturb.screens import CONTROL, Conditions, Screen, canonical, conditions, parts
from gears_nb.perturb.simulator import response, simulate_screen
from gears_nb.perturb.splits import RULES, split

seeds = st.integers(0, 10**6)
COLUMNS = ("cells", "perturbation", "dose", "line", "batch")
SIZES = {"n_cells": 400, "n_genes": 30, "n_drugs": 4, "n_modules": 4, "doses": (10.0, 300.0, 10000.0)}


def made(rng, n=60, g=12, drugs=("A", "B", "A+B"), doses=(np.nan, 3.0, 40.0), lines=("L1", "L2"), batches=("x", "y")) -> Screen:
    "A random screen, where every line has a control cell."
    name = np.where(rng.random(n) < 0.4, CONTROL, rng.choice(drugs, n))
    name[: len(lines)] = CONTROL
    line = rng.choice(lines, n)
    line[: len(lines)] = lines
    dose = np.where(name == CONTROL, np.nan, rng.choice(doses, n))
    return Screen(sp.csr_matrix(rng.poisson(2.0, (n, g)).astype(np.float32)), True, np.array([f"g{j}" for j in range(g)]), np.array([f"c{i}" for i in range(n)]), name, dose, line, rng.choice(batches, n))


def genes_of(screen: Screen, order) -> Screen:
    return replace(screen, values=screen.values[:, order], genes=screen.genes[order])


def same(a, b) -> bool:
    "Equal to the bit, field by field."
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name), equal_nan=f.name in ("dose", "dose_ends")) for f in fields(a) if f.name != "conditions")


def one_line(call, hint: str = ".") -> None:
    "The call is refused with an `InputError` in a line that names a remedy."
    try:
        call()
    except InputError as error:
        assert "\n" not in str(error) and "Remedy" in str(error) and re.search(hint, str(error)), error
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}", pytrace=False)
    else:
        pytest.fail("nothing was refused", pytrace=False)


def poisoned(screen: Screen, hidden: np.ndarray, *, line: bool = True) -> Screen:
    "The screen with other counts, doses, batches and lines in the cells of mask `hidden`; lines only among those that are there."
    values = screen.values.toarray()
    values[hidden] = values[hidden][:, ::-1] * 7 + 3
    changed = {"dose": np.where(hidden, 1e7, screen.dose), "batch": np.where(hidden, screen.batch[0], screen.batch)}
    if line:
        changed["line"] = np.where(hidden, screen.line[0], screen.line)
    return replace(screen, values=sp.csr_matrix(values), **changed)


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(seed=3, combinations=3, **SIZES)[0]


# screens

words = st.lists(st.sampled_from(["A", "B", "C c", "d-1", CONTROL, ""]), max_size=5)


@given(words, st.randoms())
def test_one_spelling_of_a_combination(found, random):
    name = "+".join(found)
    mixed = random.sample(found, len(found))
    wanted = sorted({w for w in found if w not in ("", CONTROL)})
    assert list(parts(name)) == wanted and canonical("+".join(mixed)) == canonical(name) == ("+".join(wanted) or CONTROL)
    assert canonical(canonical(name)) == canonical(name) and parts(canonical(name)) == parts(name)


@given(seeds, st.booleans(), st.booleans())
def test_conditions_are_those_of_a_loop(seed, doses, some):
    rng = np.random.default_rng(seed)
    screen = made(rng, doses=(np.nan, 3.0, 40.0) if doses else (np.nan,))
    rows = np.flatnonzero(rng.random(screen.n) < 0.7) if some else np.arange(screen.n)
    table, own = conditions(screen, rows)
    key = lambda i: (str(screen.line[i]), str(screen.perturbation[i]), np.inf if np.isnan(screen.dose[i]) else float(screen.dose[i]))
    wanted = sorted({key(i) for i in rows})
    told = [(line, p, np.inf if np.isnan(d) else d) for line, p, d in zip(table.line, table.perturbation, table.dose)]
    assert told == wanted and [told[c] for c in own] == [key(i) for i in rows]
    mask = np.isin(np.arange(screen.n), rows)
    assert conditions(screen, mask)[0].names == table.names and conditions(screen, mask)[1].tolist() == own[np.argsort(rows)].tolist()


@given(seeds)
def test_conditions_of_permuted_cells(seed):
    rng = np.random.default_rng(seed)
    screen = made(rng)
    order = rng.permutation(screen.n)
    (a, own), (b, moved) = conditions(screen), conditions(screen.take(order))
    assert a.names == b.names and np.array_equal(own[order], moved)


@given(seeds)
def test_take_by_mask_and_by_number(seed):
    rng = np.random.default_rng(seed)
    screen, rows = made(rng), rng.random(60) < 0.5
    a, b = screen.take(rows), screen.take(np.flatnonzero(rows))
    assert all(np.array_equal(getattr(a, k), getattr(b, k), equal_nan=k == "dose") for k in COLUMNS) and (a.values != b.values).nnz == 0 and a.n == rows.sum()
    assert a.control.tolist() == [p == CONTROL for p in screen.perturbation[rows]]


@pytest.mark.parametrize("name", [*COLUMNS, "genes"])
def test_a_short_column_is_refused(name, rng):
    screen = made(rng)
    one_line(lambda: replace(screen, **{name: getattr(screen, name)[:-1]}), name)


def test_without_cells_there_are_no_conditions(rng):
    table, own = conditions(made(rng), np.zeros(60, bool))
    assert len(table) == len(own) == 0 and table.names == []


def test_distinct_conditions_have_distinct_names(rng):
    screen = replace(made(rng), dose=np.where(np.arange(60) % 2, 333.33333, 333.33334))
    names = conditions(screen)[0].names
    assert len(set(names)) == len(names)


# preparation


@given(seeds)
def test_log_values_by_hand(seed):
    screen = made(np.random.default_rng(seed))
    X = screen.values.toarray().astype(float)
    wanted = np.log2(X / np.maximum(X.sum(1, keepdims=True), 1e-12) * 1e4 + 1)
    assert np.allclose(log_values(screen).toarray(), wanted, atol=2e-5) and np.allclose(log_values(screen, np.arange(5)).toarray(), wanted[:5], atol=2e-5)
    assert np.array_equal(log_values(replace(screen, counts=False)).toarray(), screen.values.toarray())


def test_a_cell_without_counts_stays_at_zero(rng):
    screen = made(rng)
    screen = replace(screen, values=sp.csr_matrix(screen.values.toarray() * (np.arange(60) > 0)[:, None], dtype=np.float32))
    assert not log_values(screen)[0].nnz and np.isfinite(log_values(screen).data).all()


@given(seeds, st.integers(1, 12), st.floats(0, 0.5))
def test_normaliser_is_that_of_numpy(seed, n_hvg, share):
    rng = np.random.default_rng(seed)
    screen = made(rng)
    screen = replace(screen, values=sp.csr_matrix(screen.values.toarray() * (rng.random((60, 12)) < np.linspace(0.2, 1, 12))))
    rows = rng.random(60) < 0.6
    norm = fit_normaliser(screen, rows, n_hvg=n_hvg, min_share=share)
    raw, X = screen.values.toarray()[rows], log_values(screen).toarray().astype(float)[rows]
    seen = np.flatnonzero((raw > 0).sum(0) >= max(1, share * len(raw)))
    within = np.mean([X[screen.batch[rows] == b].var(0) for b in np.unique(screen.batch[rows])], 0)
    wanted = np.sort(seen[np.argsort(-within[seen], kind="stable")[:n_hvg]])
    assert np.array_equal(norm.columns, wanted) and list(norm.genes) == [f"g{j}" for j in wanted]
    sd = X[:, wanted].std(0)
    assert np.allclose(norm.mean, X[:, wanted].mean(0), atol=1e-4) and np.allclose(norm.spread, np.maximum(sd, FLOOR * np.median(sd)), atol=1e-3)
    dose = screen.dose[rows & ~screen.control]
    dose = dose[dose > 0]
    assert norm.dose_ends == ((np.log10(dose.min()), np.log10(dose.max())) if len(dose) else (0.0, 0.0))
    z = norm.scaled(norm.logged(screen, rows))
    assert z.dtype == np.float32 and np.allclose(z.mean(0), 0, atol=1e-3) and np.array_equal(fit_normaliser(screen, np.flatnonzero(rows), n_hvg=n_hvg, min_share=share).mean, norm.mean)


@given(seeds)
def test_normaliser_reads_nothing_but_its_rows(seed):
    rng = np.random.default_rng(seed)
    screen = made(rng)
    rows = rng.random(60) < 0.6
    a = fit_normaliser(screen, rows, n_hvg=6)
    b = fit_normaliser(replace(poisoned(screen, ~rows), line=np.where(rows, screen.line, "another"), perturbation=np.where(rows, screen.perturbation, "Z")), rows, n_hvg=6)
    assert same(a, b)


@given(seeds)
def test_normaliser_of_permuted_cells_and_genes_and_renamed_batches(seed):
    rng = np.random.default_rng(seed)
    screen, order, genes = made(rng), rng.permutation(60), rng.permutation(12)
    a = fit_normaliser(screen, np.ones(60, bool), n_hvg=None)
    for other in (screen.take(order), replace(screen, batch=np.where(screen.batch == "x", "zebra", "apple"))):
        b = fit_normaliser(other, np.ones(60, bool), n_hvg=None)
        assert np.array_equal(a.columns, b.columns) and np.allclose(a.mean, b.mean, atol=1e-4) and np.allclose(a.spread, b.spread, atol=1e-3) and a.dose_ends == b.dose_ends
    b = fit_normaliser(genes_of(screen, genes), np.ones(60, bool), n_hvg=None)
    assert np.allclose(a.mean[genes], b.mean, atol=1e-4) and np.allclose(a.spread[genes], b.spread, atol=1e-3) and list(b.genes) == list(screen.genes[genes])


@pytest.mark.parametrize("kind", ["csc", "float64", "int64", "array", "unsorted"])
def test_other_forms_of_values(kind, screen):
    V = screen.values
    turned = {"csc": V.tocsc, "float64": lambda: V.astype(float), "int64": lambda: V.astype(np.int64), "array": lambda: sp.csr_array(V), "unsorted": lambda: V.tocsc().tocsr()[:, ::-1][:, ::-1]}[kind]()
    other, all_cells = replace(screen, values=turned), np.ones(screen.n, bool)
    a, b = fit_normaliser(screen, all_cells, n_hvg=10), fit_normaliser(other, all_cells, n_hvg=10)
    assert np.array_equal(a.columns, b.columns) and np.allclose(a.mean, b.mean, atol=1e-4) and np.allclose(a.spread, b.spread, atol=1e-3)
    assert np.allclose(deltas(screen, a.logged(screen), all_cells, all_cells).delta, deltas(other, b.logged(other), all_cells, all_cells).delta, atol=1e-4)


def test_stored_zeros_are_no_detections(rng):
    screen = made(rng)
    V = screen.values.toarray()
    V[:, 3] = 0
    kept = sp.csr_matrix(np.where(V == 0, 1, V))
    kept.data = V[V >= 0].astype(np.float32)  # all entries are stored
    assert np.array_equal(kept.toarray(), V)
    every = np.ones(60, bool)
    assert np.array_equal(fit_normaliser(replace(screen, values=sp.csr_matrix(V)), every).columns, fit_normaliser(replace(screen, values=kept), every).columns)


def test_spread_of_values_far_from_zero(rng):
    X = (12 + rng.normal(size=(3000, 6)) * np.array([0.05, 0.5, 0.5, 0.5, 0.5, 0.5])).astype(np.float32)
    screen = replace(made(rng, n=3000, g=6), values=sp.csr_matrix(X), counts=False)
    norm = fit_normaliser(screen, np.ones(3000, bool))
    assert np.allclose(norm.spread, X.astype(float).std(0), rtol=1e-5) and np.allclose(norm.mean, X.astype(float).mean(0), rtol=1e-6)
    every = np.ones(3000, bool)
    near, far = (deltas(s, s.values, every, every).sampling for s in (replace(screen, values=sp.csr_matrix(X - 12)), screen))
    assert np.allclose(near, far, rtol=1e-4)


@given(st.lists(st.floats(1e-3, 1e9), min_size=2, max_size=8), st.floats(-2, 3), st.floats(0.1, 5))
def test_the_dose_axis_is_monotone(doses, low, width):
    norm = Normaliser(np.arange(1), np.array(["g"]), np.zeros(1), np.ones(1), (low, low + width))
    at = norm.dose([0.0, *np.sort(doses)])
    assert (np.diff(at) >= 0).all() and np.allclose(norm.dose(10 ** np.array([low, low + width])), [0, 1], atol=1e-5) and (norm.dose([np.nan, 0, -3, np.inf]) == 0).all()
    assert (replace(norm, dose_ends=(low, low)).dose(doses) == 0).all()


def test_no_dose_is_not_above_a_small_one():
    norm = Normaliser(np.arange(1), np.array(["g"]), np.zeros(1), np.ones(1), (1.0, 4.0))
    none, zero, little, lowest, above = norm.dose([np.nan, 0.0, 1.0, 10.0, 11.0])
    assert none <= zero <= little <= lowest < above and none == lowest == 0


@given(seeds, st.booleans())
def test_deltas_by_loops(seed, lonely):
    rng = np.random.default_rng(seed)
    screen = made(rng)
    if lonely:  # no controls in batch y of line L1
        out = screen.control & (screen.line == "L1") & (screen.batch == "y")
        screen = replace(screen, batch=np.where(out, "x", screen.batch))
    rows, may = rng.random(60) < 0.8, screen.control & ((rng.random(60) < 0.8) | (np.arange(60) < 2))
    if not (rows & ~screen.control).any():
        return
    X = log_values(screen)
    D, found = X.toarray().astype(float), deltas(screen, X, rows, may)
    table, own = conditions(screen, np.flatnonzero(rows & ~screen.control))
    cells = np.flatnonzero(rows & ~screen.control)

    def partner(i):
        mine = may & (screen.line == screen.line[i])
        return mine & (screen.batch == screen.batch[i]) if (mine & (screen.batch == screen.batch[i])).any() else mine

    each = np.array([D[i] - D[partner(i)].mean(0) for i in cells])
    assert found.controls.tolist() == [np.any([partner(i) for i in cells[own == c]], axis=0).sum() for c in range(len(table))]
    assert found.conditions.names == table.names and found.cells.tolist() == np.bincount(own).tolist()
    assert np.allclose(found.delta, [each[own == c].mean(0) for c in range(len(table))], atol=1e-4)
    used = np.flatnonzero(rows | may)
    groups = {}
    for i in used:
        groups.setdefault((screen.line[i], screen.perturbation[i], str(screen.dose[i]), screen.batch[i]), []).append(D[i])
    square = sum(np.square(np.array(g) - np.mean(g, 0)).sum(0) for g in groups.values())
    assert np.allclose(found.sampling, np.maximum(square / max(1, len(used) - len(groups)), 1e-6), rtol=1e-5, atol=1e-6)
    means, size, number = control_means(screen, X, may)
    for i in cells:
        assert np.allclose(means[number[i]], D[partner(i)].mean(0), atol=1e-6) and size[number[i]] == partner(i).sum()


def test_controls_are_counted_once(rng):
    screen = made(rng, drugs=("A",), doses=(np.nan,), lines=("L1",))
    screen = replace(screen, batch=np.where(screen.control, "x", screen.batch))
    every = np.ones(60, bool)
    assert deltas(screen, log_values(screen), every, every).controls.tolist() == [screen.control.sum()]


@given(seeds)
def test_deltas_of_permuted_cells_renamed_batches_and_an_own_constant_per_line(seed):
    rng = np.random.default_rng(seed)
    screen = replace(made(rng), counts=False)
    every, order = np.ones(60, bool), rng.permutation(60)
    if screen.control.all():
        return
    a = deltas(screen, log_values(screen), every, every)
    for other in (screen.take(order), replace(screen, batch=np.where(screen.batch == "x", "zebra", "apple")), replace(screen, values=sp.csr_matrix(screen.values.toarray() + 3.0 * (screen.line == "L1")[:, None]))):
        b = deltas(other, log_values(other), every, every)
        assert a.conditions.names == b.conditions.names and np.allclose(a.delta, b.delta, atol=1e-4) and np.allclose(a.sampling, b.sampling, atol=1e-2) and np.array_equal(a.controls, b.controls)


@given(seeds)
def test_deltas_do_not_see_what_is_neither_given_nor_asked_for(seed):
    rng = np.random.default_rng(seed)
    screen = made(rng)
    rows = (rng.random(60) < 0.6) | screen.control
    if not (rows & ~screen.control).any():
        return
    bad = poisoned(screen, ~rows)
    a, b = (deltas(s, log_values(s), rows, rows) for s in (screen, bad))
    assert same(a, b) and a.conditions.names == b.conditions.names


def test_a_line_that_is_not_asked_for_needs_no_controls(rng):
    screen = made(rng)
    rows = screen.line == "L1"
    found = deltas(screen, log_values(screen), rows, rows)
    assert set(found.conditions.line) == {"L1"}


def test_what_preparation_refuses(rng):
    screen, every, none = made(rng), np.ones(60, bool), np.zeros(60, bool)
    one_line(lambda: fit_normaliser(screen, none), "no training cells")
    one_line(lambda: fit_normaliser(replace(screen, values=sp.csr_matrix((60, 12), dtype=np.float32)), every), "detected")
    one_line(lambda: deltas(screen, log_values(screen), screen.control, every), "no treated cells")
    one_line(lambda: deltas(screen, log_values(screen), every, none), "no 'control' cells")
    number, members, _ = partners(screen, none)
    assert (members == -1).all() and number.shape == (60,)
    norm = fit_normaliser(screen, every)
    one_line(lambda: norm.logged(genes_of(screen, np.arange(11))), "genes")
    assert np.allclose(norm.logged(genes_of(screen, np.arange(12)[::-1])).toarray(), norm.logged(screen).toarray(), atol=1e-6)  # found by name


def test_a_line_is_told_as_text(rng):
    screen = made(rng)
    with pytest.raises(InputError) as told:
        deltas(screen, log_values(screen), np.ones(60, bool), np.zeros(60, bool))
    assert "np.str_" not in str(told.value)


def test_inputs_of_preparation_are_not_touched(screen):
    before = screen.values.copy(), {k: getattr(screen, k).copy() for k in COLUMNS}
    for own in (screen, replace(screen, counts=False)):
        every = np.ones(screen.n, bool)
        norm = fit_normaliser(own, every, n_hvg=10)
        X = norm.logged(own)
        norm.scaled(X), deltas(own, X, every, every), split(own, "pair")
    assert np.array_equal(before[0].data, screen.values.data) and np.array_equal(before[0].indices, screen.values.indices)
    assert all(np.array_equal(v, getattr(screen, k), equal_nan=k == "dose") for k, v in before[1].items())


# splits


@given(st.sampled_from(sorted(RULES)), seeds, st.booleans())
def test_splits_are_disjoint_and_exhaustive(how, seed, inner):
    screen = SPLIT_SCREEN
    among = np.random.default_rng(seed).random(screen.n) < 0.8 if inner else np.ones(screen.n, bool)
    found = split(screen, how, seed, among=among if inner else None)
    assert not (found.train & found.test).any() and not (found.test & screen.control).any() and found.test.any() and (found.train & ~screen.control).any()
    assert np.array_equal(found.given, among & screen.control) and np.array_equal(found.train | found.test | found.given, among) and not ((found.train | found.test | found.given) & ~among).any()
    again = split(screen, how, seed, among=among if inner else None)
    assert all(np.array_equal(getattr(found, k), getattr(again, k)) for k in ("train", "test", "given")) and found.held == again.held


SPLIT_SCREEN = simulate_screen(seed=3, combinations=3, **SIZES)[0]


@given(st.sampled_from(sorted(RULES)), seeds)
def test_what_is_held_out_is_not_in_training(how, seed):
    screen = SPLIT_SCREEN
    found = split(screen, how, seed)
    train, test = screen.take(found.train & ~screen.control), screen.take(found.test)
    if how in ("line", "batch"):
        label = lambda s: set(getattr(s, how))
        assert label(test) == set(found.held) and not label(test) & set(getattr(screen.take(found.train), how)) and len(found.held) == 1
    if how == "perturbation":
        assert not set(train.singles) & set(found.held) and all(set(parts(p)) & set(found.held) for p in test.perturbation)
    if how == "combination":
        assert all(len(parts(p)) > 1 for p in test.perturbation) and not set(test.perturbation) & set(train.perturbation)
    if how == "pair":
        pair = lambda s: set(zip(s.line, s.perturbation))
        assert not pair(train) & pair(test)
    if how == "dose":
        level = lambda s: set(zip(s.perturbation, s.dose))
        assert not level(train) & level(test)


@given(st.sampled_from(sorted(set(RULES) - {"random"})), seeds)
def test_splits_by_label_move_with_the_cells_and_ignore_the_counts(how, seed):
    screen = SPLIT_SCREEN
    order = np.random.default_rng(seed).permutation(screen.n)
    a, b, c = split(screen, how, seed), split(screen.take(order), how, seed), split(replace(screen, values=screen.values * 3), how, seed)
    assert all(np.array_equal(getattr(a, k)[order], getattr(b, k)) and np.array_equal(getattr(a, k), getattr(c, k)) for k in ("train", "test", "given")) and a.held == b.held


def test_what_splits_refuse(rng):
    screen = made(rng, drugs=("A",), doses=(np.nan,), lines=("L1",), batches=("x",))
    for how in ("perturbation", "line", "pair", "dose", "combination", "batch", "unheard of"):
        one_line(lambda how=how: split(screen, how), "split")


def test_random_never_holds_out_nothing_or_everything():
    screen = made(np.random.default_rng(0), n=6, drugs=("A",), lines=("L1",))
    for seed in range(30):
        try:
            found = split(screen, "random", seed)
        except InputError:
            continue
        assert found.test.any() and (found.train & ~screen.control).any()


def test_a_dose_of_the_vehicle_is_not_held_out(rng):
    screen = made(rng, doses=(1.0, 10.0, 100.0))
    screen = replace(screen, dose=np.where(screen.control, np.array([1.0, 10.0, 100.0])[np.arange(60) % 3], screen.dose))
    assert not [h for h in split(screen, "dose").held if h.startswith(CONTROL)]


# simulator


@given(st.floats(-2, 6), st.floats(-1, 4), st.booleans())
def test_response_is_a_share_and_the_hill_curve_is_half_at_half(at, half, falls):
    own = float(response(np.array(10.0**at), np.array(10.0**half), np.array(falls)))
    assert 0 <= own <= 1 + 1e-9 and np.isclose(response(np.array(10.0**half), np.array(10.0**half), np.array(False)), 0.5)
    grid = response(np.logspace(-3, 8, 400), np.array(10.0**half), np.array(falls))
    assert (np.diff(grid) >= -1e-12).all() != falls and grid.max() <= 1 + 1e-9


def test_the_screen_is_repeatable_and_says_what_is_there():
    (a, p), (b, q), (c, _) = (simulate_screen(seed=s, combinations=2, **SIZES) for s in (1, 1, 2))
    assert np.array_equal(a.values.toarray(), b.values.toarray()) and not np.array_equal(a.values.toarray(), c.values.toarray())
    assert all(np.array_equal(getattr(a, k), getattr(b, k), equal_nan=k == "dose") for k in COLUMNS) and all(np.array_equal(getattr(p, f.name), getattr(q, f.name)) for f in fields(p))
    assert np.isnan(a.dose[a.control]).all() and set(a.dose[~a.control]) <= set(SIZES["doses"]) and {canonical(x) for x in a.perturbation} == set(a.perturbation)
    assert set(a.singles) <= set(p.drugs) and a.values.dtype == np.float32 and (a.values.data == np.round(a.values.data)).all() and p.state.shape == (a.n, 2)


def test_effects_add_up_and_the_truth_of_the_control_is_zero():
    screen, planted = simulate_screen(seed=1, combinations=2, **SIZES)
    one, two = (planted.effect(d, 300.0, "line2") for d in ("drug01", "drug03"))
    assert np.allclose(planted.effect("drug03+drug01", 300.0, "line2"), one + two)
    table = Conditions(np.array(["line1", "line2"]), np.array([CONTROL, "drug01"]), np.array([np.nan, 300.0]))
    found = planted.delta(table, cells=60)
    assert not found[0].any() and np.corrcoef(found[1], one)[0, 1] > 0.5 and np.array_equal(found[1:], planted.delta(table.take([1]), cells=60))


def test_counts_have_the_moments_of_a_negative_binomial():
    rng = np.random.default_rng(0)
    rate = np.log2(np.array([1.0, 4.0, 15.0]))
    found = simulator._counts(np.tile(rate, (20000, 1)), np.full(20000, 20.0), rng).toarray()
    mean = np.array([1.0, 4.0, 15.0])
    assert np.allclose(found.mean(0), mean, rtol=0.03) and np.allclose(found.var(0), mean + mean**2 / simulator.DISPERSION, rtol=0.06)
    r = simulator.DISPERSION
    assert np.allclose([(found[:, 1] == k).mean() for k in range(5)], stats.nbinom.pmf(range(5), r, r / (r + 4.0)), atol=0.01)


@pytest.mark.parametrize("wrong", [{"n_drugs": 0}, {"n_lines": 0}, {"n_batches": 0}, {"n_modules": 0}, {"doses": ()}, {"n_genes": 2}, {"controls": 1.0}, {"controls": 0.0}])
def test_sizes_that_cannot_be(wrong):
    one_line(lambda: simulate_screen(**SIZES | wrong), "sizes|doses")


@pytest.mark.parametrize("wrong", [{"n_cells": 0}, {"depth": -1.0}, {"strength": 1.5}, {"doses": (-10.0, 10.0)}])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_that_cannot_be(wrong):
    one_line(lambda: simulate_screen(**SIZES | wrong))
