"""What a widget is given and what it must show: payloads, marks, states, exported pages; and the browser's marks against Python's."""
import json
import math
import random
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.attention.browser import chromium, watch_network, why_no_browser
from gears_nb.attention.explore import export_page, gather, records, what_to_explore
from gears_nb.attention.export import page, write_html
from gears_nb.attention.views import (
    MARKS,
    MOST,
    SHARE,
    STRONG,
    TOP,
    VIEWS,
    attention_marks,
    attention_view,
    distortion_view,
    fit_state,
    gate_marks,
    gate_view,
    pack,
    pack_steps,
    reconstruction_marks,
    reconstruction_view,
    recycles_view,
    start,
    stretch,
    true_places,
    unpack,
)
from gears_nb.attention.widgets import (
    attention_explorer,
    distortion_map,
    gate_explorer,
    reconstruction_explorer,
    recycle_player,
    script,
    stylesheet,
)
from gears_nb.core.errors import InputError
from gears_nb.core.page import POLICY, contents, squeeze
from gears_nb.core.style import THEMES, contrast, css_variables
from gears_nb.geometry.gauge import gauge_fix, procrustes
from gears_nb.models.trace import AttentionTrace, step_size, values


def a_trace(n=30, recycles=3, heads=2, seed=0, truth=True, graph="H-gate", share=0.4):
    """A made-up record whose attention is the softmax of its terms."""
    rng = np.random.default_rng(seed)
    near = rng.uniform(size=(n, n)) < share
    near |= near.T | np.eye(n, dtype=bool)
    row, col = (i.astype(np.int32) for i in near.nonzero())
    gated = graph == "H-gate"
    gate = rng.normal(size=len(row)).astype(np.float32)
    terms = {"qk": rng.normal(size=(recycles, heads, len(row))), "gate": np.broadcast_to(0.7 * gate, (recycles, heads, len(row))), "geo": -rng.exponential(size=(recycles, heads, len(row)))}
    terms = {k: v.astype(np.float32) for k, v in terms.items() if gated or k != "gate"}
    e = np.exp(sum(terms.values()))
    start_of = np.searchsorted(row, np.arange(n))
    attention = (e / np.add.reduceat(e, start_of, axis=-1)[..., row]).astype(np.float32)
    x = gauge_fix(rng.normal(size=(recycles + 1, n, 2))).astype(np.float32)
    places = rng.uniform(size=(n, 2)).astype(np.float32) * [300, 100] if truth else None
    return AttentionTrace(row, col, attention, terms, x, gate if gated else None, graph, places, {"seed": seed})


def some_traces(sizes=(30, 12), **options):
    return {f"miniset {i}": {"H-gate": a_trace(n, seed=i, **options), "T-edge": a_trace(n, seed=i, graph="T-edge", recycles=2, **options)} for i, n in enumerate(sizes)}


def a_table(n=80, seed=0):
    """Cells with places, a bent reconstruction, colours of every kind, and two cells that have no place."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(size=(n, 2)) * [400, 200]
    bent = np.c_[places[:, 0] ** 1.3 / 300, places[:, 1] / 100] @ [[0.6, 0.8], [0.8, -0.6]]
    bent[[3, 50]] = np.nan
    obs = {"layer": np.where(places[:, 0] < 200, "left", "right"), "depth": rng.uniform(size=n), "constant": np.ones(n), "gears_confidence": rng.uniform(size=n)}
    table = ad.AnnData(rng.poisson(3, size=(n, 20)).astype(np.float32), obs=obs, obsm={"X_gears": bent, "spatial": places})
    table.obs["depth"] = table.obs["depth"].where(np.arange(n) != 7)
    return table


def explorers():
    traces, table = some_traces(), a_table()
    return [attention_explorer(traces), recycle_player(traces), gate_explorer(traces), reconstruction_explorer(table), distortion_map(table)]


# ---- arrays

@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 99), st.sampled_from([1e-4, 1.0, 1e4]))
def test_steps_are_fine_enough(recycles, heads, edges, seed, scale):
    a = (np.random.default_rng(seed).normal(size=(recycles, heads, edges)) * scale).astype(np.float32)
    p = pack_steps(a)
    assert p["shape"] == list(a.shape) or min(p["shape"]) == 1
    assert np.abs(unpack(p) - a).max() <= p["step"] / 2 * (1 + 1e-6) and p["step"] <= (max(a.max(), 0) - min(a.min(), 0)) / 255 * (1 + 1e-6)


def test_a_term_that_heads_share_is_sent_once():
    t = a_trace()
    t.terms["pair"] = np.broadcast_to(np.sin(np.arange(len(t.row), dtype=np.float32)), t.attention.shape)
    view = attention_view({"H-gate": t})["graphs"]["H-gate"]["values"]
    assert view["pair"]["shape"] == [1, 1, len(t.row)] and view["qk"]["shape"] == [3, 2, len(t.row)]


def test_what_can_be_told_is_not_sent():
    """Attention, a gate with a weight and a squared distance are not sent as numbers; attention that is no softmax is, finely."""
    t = a_trace()
    apart = np.square(t.x[:-1][:, t.row] - t.x[:-1][:, t.col]).sum(-1)[:, None]
    terms = {**t.terms, "geo": (-0.04 * apart * np.ones((1, 2, 1))).astype(np.float32)}
    e = np.exp(sum(terms.values()).astype(np.float64))
    share = (e / np.add.reduceat(e, t.indptr[:-1], axis=-1)[..., t.row]).astype(np.float32)
    known = AttentionTrace(t.row, t.col, share, terms, t.x, t.gate, "H-gate", t.truth)
    graph = attention_view({"H-gate": known})["graphs"]["H-gate"]
    assert list(graph["values"]) == ["qk"] and {k: d["of"] for k, d in graph["derived"].items()} == {"gate": "gate", "geo": "distance", "attention": "terms"}
    for term in ("gate", "geo", "total", "attention"):
        for query in (0, 7):
            mine = {int(c): float(x) for r, c, x in zip(t.row, t.col, values(known, term, 1, 1)) if r == query and c != query}
            marks = attention_marks({"graphs": {"H-gate": graph}, "near": pack(np.zeros((30, 0)), "int32"), "known": False}, {"graph": "H-gate", "recycle": 1, "head": 1, "term": term, "query": query})
            assert np.allclose(marks["values"], [mine[c] for c in marks["cols"]], atol=1e-4 if term in ("gate", "geo") else graph["values"]["qk"]["step"])
    odd = AttentionTrace(t.row, t.col, 0.5 * share, terms, t.x, t.gate, "H-gate", t.truth)
    sent = attention_view({"H-gate": odd})["graphs"]["H-gate"]["values"]["attention"]
    assert sent["dtype"] == "uint16" and np.abs(unpack(sent) - odd.attention).max() <= sent["step"]


def test_views_of_one_miniset_share_what_they_are_sent():
    traces = {"a": {"H-gate": a_trace(60)}}
    alone, both = (len(squeeze([e.packed() for e in made])) for made in ([attention_explorer(traces)], [attention_explorer(traces), recycle_player(traces), gate_explorer(traces)]))
    assert both < 1.15 * alone


# ---- marks against the record

@given(st.integers(8, 40), st.integers(0, 20), st.data())
def test_attention_marks_are_those_of_the_record(n, seed, data):
    t = a_trace(n, seed=seed)
    view = attention_view({"H-gate": t})
    state = {"graph": "H-gate", "recycle": data.draw(st.integers(0, 2)), "head": data.draw(st.sampled_from(["mean", 0, 1])),
             "term": data.draw(st.sampled_from(["attention", "total", "qk", "gate", "geo"])), "query": data.draw(st.integers(0, n - 1))}
    marks = attention_marks(view, state)
    v = values(t, state["term"], state["recycle"], None if state["head"] == "mean" else state["head"])
    mine = {int(c): float(x) for r, c, x in zip(t.row, t.col, v) if r == state["query"] and c != state["query"]}
    slack = 3 * max(p["step"] for p in view["graphs"]["H-gate"]["values"].values())
    assert len(marks["cols"]) == min(TOP, len(mine)) and marks["values"] == sorted(marks["values"], reverse=True)
    assert np.allclose(marks["values"], [mine[c] for c in marks["cols"]], atol=slack)
    assert np.allclose(marks["values"], sorted(mine.values(), reverse=True)[:TOP], atol=slack)
    apart = np.linalg.norm(t.truth - t.truth[state["query"]], axis=1)
    assert set(marks["neighbours"]) == set(np.argsort(apart)[1 : 1 + len(marks["neighbours"])].tolist()) and marks["hits"] == len({*marks["cols"]} & {*marks["neighbours"]})


def test_ties_go_to_the_lower_cell():
    t = a_trace(12, recycles=1, heads=1)
    flat = AttentionTrace(t.row, t.col, np.ones_like(t.attention), {"qk": np.zeros_like(t.attention)}, t.x[:2], None, "T-edge", t.truth)
    marks = attention_marks(attention_view({"T-edge": flat}), {"graph": "T-edge", "recycle": 0, "head": 0, "term": "qk", "query": 4})
    others = [int(c) for r, c in zip(t.row, t.col) if r == 4 and c != 4]
    assert marks["cols"] == others[:TOP]


def test_recycle_player_turns_layouts_and_changes_none():
    t = a_trace()
    view = recycles_view({"H-gate": t})
    g, layouts = view["graphs"]["H-gate"], unpack(view["graphs"]["H-gate"]["layouts"]).astype(float)
    assert np.allclose(g["step"], step_size(t), atol=1e-6) and len(g["energy"]) == 4
    for shown, given_x in zip(layouts, t.x):
        assert procrustes(gauge_fix(given_x.astype(float)), shown).error < 1e-5
    last = layouts[-1]
    assert all(procrustes(x, last).error >= np.sqrt(((x - last) ** 2).sum(1).mean()) - 1e-5 for x in layouts), "every layout is turned onto the last"
    marks = MARKS["recycles"](view, {"graph": "H-gate", "recycle": 2, "query": 5})
    assert len(marks["cols"]) == STRONG and np.allclose(marks["place"], layouts[2, 5]) and marks["step"] == g["step"][1]


def by_the_rule(t, beta, k):
    """Edges that the gate keeps, in plain Python."""
    kept = set()
    for i in range(t.n):
        mine = sorted(((-float(g), int(c)) for r, c, g in zip(t.row, t.col, t.gate) if r == i and c != i))
        weights = [math.exp(-beta * g) for g, _ in mine]
        held = 0.0
        for count, ((_, c), w) in enumerate(zip(mine, weights)):
            if count == k or held >= SHARE * sum(weights):
                break
            kept.add((i, c))
            held += w
    return kept


@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("k", [1, 6, MOST])
def test_gate_keeps_what_the_rule_says(beta, k):
    t = a_trace(25, seed=3)
    view = gate_view({"H-gate": t})
    marks, kept = gate_marks(view, {"beta": beta, "k": k, "query": 4}), by_the_rule(t, beta, k)
    near = {(i, c) for i in range(25) for c in unpack(view["near"])[i].tolist()}
    assert marks["edges"] == len(kept) and marks["hits"] == len(kept & near)
    assert marks["precision"] == pytest.approx(len(kept & near) / len(kept)) and marks["recall"] == pytest.approx(len(kept & near) / len(near))
    assert set(marks["cols"]) == {c for i, c in kept if i == 4} and marks["ceiling"] >= marks["recall"]


def test_the_gate_weight_of_the_model_is_found():
    assert gate_view({"H-gate": a_trace()})["beta"] == 0.7


@given(st.integers(3, 30), st.integers(2, 5), st.integers(0, 20))
def test_stretch_is_a_ratio_of_mean_distances(n, k, seed):
    rng = np.random.default_rng(seed)
    Y, group = rng.normal(size=(n, 2)), np.arange(n) % min(k, n)
    assert np.allclose(np.nan_to_num(stretch(3 * Y @ [[0, 1], [-1, 0]], Y, group, min(k, n)), nan=3.0), 3.0)
    X = rng.normal(size=(n, 2))
    d = lambda A, a, b: sum(np.linalg.norm(A[i] - A[j]) for i in np.flatnonzero(group == a) for j in np.flatnonzero(group == b))
    assert stretch(X, Y, group, min(k, n))[0, 1] == pytest.approx(d(X, 0, 1) / d(Y, 0, 1))


# ---- tables

def test_reconstruction_leaves_out_cells_without_a_place():
    table = a_table()
    view = reconstruction_view(table, genes=["5"])
    assert view["n"] == 78 and view["names"] == [n for i, n in enumerate(table.obs_names) if i not in (3, 50)]
    names = [c["name"] for c in view["colours"]]
    assert names[:4] == ["place", "confidence", "layer", "depth"] and "constant" not in names and names[4] == "gene 5" and len(names) in (16, 17)
    assert reconstruction_marks(view, {"colour": "depth", "selected": [6]})["mean"] is None, "cell 7 of the table, now the 6th, has no depth"
    marks = reconstruction_marks(view, {"colour": "layer", "selected": [5, 5, 1, 200]})
    assert marks["selected"] == [1, 5] and sum(marks["count"].values()) == 2


def test_large_tables_are_thinned_for_display_only():
    big = a_table(7000)
    view = reconstruction_view(big)
    assert (view["n"], view["of"]) == (3000, 6998) and len(set(view["names"])) == 3000
    assert distortion_view(big)["n"] == 3000


def test_tables_that_cannot_be_shown():
    table = a_table()
    lost = table.copy()
    lost.obsm["X_gears"][3:] = np.nan
    with pytest.raises(InputError, match="only 3 cells|only 2 cells"):
        reconstruction_explorer(lost[1:])
    with pytest.raises(InputError, match="one true place per cell"):
        distortion_map(table, truth=np.zeros((3, 2)))
    del table.obsm["spatial"]
    assert "true" not in reconstruction_view(table)["maps"]
    with pytest.raises(InputError, match="is not known"):
        distortion_map(table)
    del table.obsm["X_gears"]
    with pytest.raises(InputError, match="gears reconstruct"):
        reconstruction_explorer(table)


# ---- what the cells came with

def far(C):
    C = C.copy()
    C[9] = 1e6
    return C


def sentinels(C):
    C = C.copy()
    C[[1, 2, 7, 12, 60]] = -1
    return C


def gaps(C):
    C = C.copy()
    C[10:30] = np.nan
    return C


def two_known(C):
    C = np.full_like(C, np.nan)
    C[:2] = [[1, 2], [3, 4]]
    return C


NO_TRUTH = {"zeros": np.zeros_like, "one column": lambda C: C[:, :1], "text": lambda C: C.astype(str), "no number": lambda C: np.full_like(C, np.nan), "one place": lambda C: np.full_like(C, 7.0),
            "a third column that varies": lambda C: np.c_[C, C[:, 0] ** 2], "four columns": lambda C: np.c_[C, C], "two cells": two_known, "truth values": lambda C: C > 100}
TRUTH = {"as it was": (lambda C: C, 78), "sparse": (sp.csr_matrix, 78), "a flat third column": (lambda C: np.c_[C, np.ones(len(C))], 78), "far": (far, 77), "sentinels": (sentinels, 73),
         "gaps": (gaps, 58), "far from zero": (lambda C: C + 1e12, 78), "huge": (lambda C: C * 1e300, 78), "whole numbers": (lambda C: (C * 100).astype(int), 78)}


def kept(table, folder, name="out.h5ad"):
    table.write_h5ad(folder / name)
    return folder / name


@pytest.mark.parametrize("spoil", NO_TRUTH.values(), ids=NO_TRUTH)
def test_places_that_are_no_truth(spoil, tmp_path):
    """Never an exception, and nothing that needs the truth is shown."""
    table = a_table()
    table.obsm["spatial"] = spoil(np.asarray(table.obsm["spatial"]))
    if table.obsm["spatial"].dtype.kind == "U":
        table.obsm["spatial"] = pd.DataFrame(table.obsm["spatial"], index=table.obs_names, columns=["x", "y"])
    assert true_places(table) is None and not reconstruction_view(table)["known"]
    _, names, _ = export_page(kept(table, tmp_path), tmp_path / "page.html")
    assert names == ["reconstruction"]


@pytest.mark.parametrize("spoil, count", TRUTH.values(), ids=TRUTH)
def test_places_that_are_a_truth(spoil, count, tmp_path):
    """What is usable is used: both maps hold the cells with two places, and a remark says how many that are."""
    table = a_table()
    whole = distortion_view(table)
    table.obsm["spatial"] = spoil(np.asarray(table.obsm["spatial"]))
    view = distortion_view(table)
    assert view["known"] and view["n"] == count and reconstruction_view(table)["n"] == count
    assert all(np.isfinite(unpack(m)).all() and 0.1 < np.abs(unpack(m)).max() < 10 for m in view["maps"].values())
    if count == 78:
        assert np.allclose(unpack(view["maps"]["true"]), unpack(whole["maps"]["true"]), atol=1e-3)
    _, names, remarks = export_page(kept(table, tmp_path), tmp_path / "page.html")
    assert names == ["reconstruction", "distortion"]
    assert [f"known for {count} of 78 cells" in r for r in remarks] == ([True, False] if count < 78 else [False])


def test_a_frame_of_places():
    table = a_table()
    before = reconstruction_view(table)
    table.obsm["spatial"] = pd.DataFrame(table.obsm["spatial"], index=table.obs_names, columns=["x", "y"])
    assert reconstruction_view(table)["maps"] == before["maps"]


class Listener:
    """Stands for a model: notes what it is asked to explain."""

    def __init__(self):
        self.asked = []

    def explain(self, h, truth=None, about=None, edges=None):
        self.asked.append((h[0].numpy(), None if truth is None else truth[0].numpy(), about))
        t = a_trace(h.shape[1], truth=truth is not None, graph="H-gate" if edges is None else "T-edge")
        t.about.update(about)
        return [t]


@pytest.mark.parametrize("spoil, cells, known", [(lambda C: C, 78, True), (gaps, 58, True), (np.zeros_like, 78, False), (two_known, 78, False), (lambda C: C * 1e300, 78, True), (lambda C: C + 1e12, 78, True),
                                                 (lambda C: np.where(np.arange(80)[:, None] < 20, C, np.nan), 78, False)],
                         ids=["all", "gaps", "zeros", "two", "huge", "far from zero", "a quarter"])
def test_records_know_all_places_or_none(spoil, cells, known):
    table, model = a_table(), Listener()
    table.obsm["spatial"] = spoil(np.asarray(table.obsm["spatial"]))
    table.obsm["H_gears"] = np.arange(80.0)[:, None] * np.ones((1, 4))
    made = records(model, table, "t")
    assert [sorted(runs) for runs in made.values()] == [["H-gate", "T-edge"] if known else ["H-gate"]]
    h, truth, about = model.asked[0]
    assert len(h) == cells == len(set(about["cells"])) and not {"3", "50"} & {*about["cells"]}
    assert (truth is not None) == known
    if known:
        assert np.isfinite(truth).all() and len(np.unique(truth, axis=0)) == cells


@pytest.mark.parametrize("rows", [slice(None), slice(2, None)], ids=["none", "two"])
def test_nobody_has_a_place(tmp_path, rows):
    table = a_table()
    table.obsm["X_gears"][rows] = np.nan
    for source in (kept(table, tmp_path), tmp_path):
        with pytest.raises(InputError, match="fewer than three cells have a position") as refused:
            what_to_explore(source)
        assert "out.h5ad: obsm['X_gears']" in str(refused.value) and "\n" not in str(refused.value)
    kept(a_table(), tmp_path, "good.h5ad")
    found = gather(tmp_path)
    assert list(found.tables) == ["good"] and found.remarks[0].startswith("out: fewer than three")


@pytest.mark.parametrize("wrong", [np.ones((80, 3)), np.full((80, 2), "a").astype(object)], ids=["three columns", "text"])
def test_places_of_another_kind_are_refused(wrong):
    table = a_table()
    table.obsm["X_gears"] = wrong
    with pytest.raises(InputError, match="not two numbers per cell"):
        reconstruction_explorer(table)


def test_every_section_opens_on_its_own(tmp_path):
    """Sections have frames of their own: one table each, in the order of the rows; those without a map are named in a remark."""
    table = a_table()
    table.obs["gears_section"] = ["x, section 1"] * 40 + ["b"] * 38 + ["tiny"] * 2
    table.obs_names = [f"cell {i}" for i in range(80)]
    source = kept(table, tmp_path)
    found = gather(source)
    assert list(found.tables) == ["out, section x, section 1", "out, section b"] and [t.n_obs for t in found.tables.values()] == [40, 38]
    assert found.remarks[0] == "out, section tiny: fewer than three cells have a position: not shown"
    shown = what_to_explore(source)
    assert list(shown) == [f"{kind} of out, section {label}" for label in ("x, section 1", "b") for kind in ("reconstruction", "distortion")]
    one = reconstruction_view(table[:40].copy())
    assert one["maps"] == reconstruction_view(found.tables["out, section x, section 1"])["maps"]
    table.obs["gears_section"] = ["b"] * 60 + [""] * 20
    table.obsm["X_gears"][60:] = np.nan
    (name, only), = gather(kept(table, tmp_path)).tables.items()
    assert (name, only.n_obs) == ("out, section b", 60)


def test_a_view_does_not_touch_the_table():
    table = a_table()
    before = table.copy()
    reconstruction_explorer(table), distortion_map(table)
    assert np.array_equal(table.X, before.X) and np.array_equal(table.obsm["X_gears"], before.obsm["X_gears"], equal_nan=True) and table.obs.equals(before.obs)


# ---- states

def test_every_view_starts_with_a_state_that_fits():
    for e in explorers():
        data = e.data(e.state["miniset"])
        assert fit_state(e.view, data, start(e.view, data)) == start(e.view, data)
        assert {"view", *e.state} < set(e.marks()) and json.dumps(e.marks())


def test_settings_follow_to_a_smaller_miniset():
    e = attention_explorer(some_traces(), query=25, recycle=2, term="gate")
    e.state = {**e.state, "miniset": "miniset 1"}
    assert e.state["query"] == e.data("miniset 1")["query"] and e.state["term"] == "gate" and list(e.payload["minisets"]) == ["miniset 1"]
    e.state = {**e.state, "graph": "T-edge", "term": "qk", "recycle": 1}
    assert e.marks()["cols"]


@pytest.mark.parametrize("wrong", [{"colour": "blue"}, {"query": 99}, {"term": "geometry"}, {"recycle": 3}, {"head": 2}, {"graph": "kNN"}])
def test_wrong_settings_are_refused_and_change_nothing(wrong):
    e = attention_explorer(some_traces())
    before = dict(e.state)
    with pytest.raises(InputError):
        e.state = {**e.state, **wrong}
    with pytest.raises(InputError):
        attention_explorer(some_traces(), **wrong)
    assert e.state == before


def test_without_truth_the_last_layout_is_drawn():
    traces = some_traces(truth=False)
    view = attention_view(traces["miniset 0"])
    assert not view["known"] and np.allclose(unpack(view["places"]), gauge_fix(traces["miniset 0"]["H-gate"].x[-1].astype(float)), atol=1e-6)
    assert attention_explorer(traces).marks()["hits"] is None and recycle_player(traces).marks()["energy"] is None
    marks = gate_explorer(traces).marks()
    assert marks["precision"] is None and marks["edges"] > 0


def test_minisets_of_three_cells():
    tiny = {"a": {"H-gate": a_trace(3, share=1.0)}}
    assert len(attention_explorer(tiny, query=0).marks()["cols"]) == 2
    assert gate_explorer(tiny, beta=0.0, k=MOST).marks()["edges"] == 6
    assert recycle_player(tiny, recycle=0).marks()["cols"] == []


def test_plotly_is_sent_when_it_is_asked_for():
    e, sent = explorers()[0], []
    e.send = lambda content, buffers=None: sent.append((content, buffers))
    e._send_plotly(e, {"ask": "something else"}, [])
    assert not sent
    e._send_plotly(e, {"ask": "plotly"}, [])
    assert sent[0][0] == {"tell": "plotly"} and len(sent[0][1][0]) > 10**6


# ---- pages and sources

def test_the_script_names_no_address_and_knows_every_view():
    code = script()
    assert "://" not in code and "fetch(" not in code and "XMLHttpRequest" not in code and "://" not in stylesheet()
    for part in ("MARKS", "CONTROLS", "FIGURES", "TELL", "PANELS"):
        assert set(VIEWS) == {v for v in VIEWS if re.search(rf"^  {v}\b", code[code.index(f"const {part} = {{") :].split("\n};")[0], re.M)}, part


def test_a_page_holds_everything_and_says_so(tmp_path):
    traces = {"</script><b>": some_traces()["miniset 0"], "other": some_traces()["miniset 1"]}
    e = attention_explorer(traces, query=3)
    path = e.export(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    (read,) = contents(text)["data"]
    assert POLICY in text and "default-src 'none'" in POLICY and set(read["payload"]["minisets"]) == set(traces) and read["state"]["query"] == 3
    sent = read["payload"]["minisets"]["other"]["graphs"]["H-gate"]["values"]["qk"]
    assert sent["bytes"] == e.data("other")["graphs"]["H-gate"]["values"]["qk"]["bytes"]
    assert not re.findall(r"<(?:link|img|iframe|script[^>]*src)\b", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    assert page([e], "<i>title</i>").count("<title>&lt;i&gt;title&lt;/i&gt;</title>") == 1
    with pytest.raises(InputError, match="use .html"):
        write_html([e], tmp_path / "page.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html"]
    with pytest.raises(TypeError):
        squeeze({"a": object()})


def test_themes_have_the_same_roles_and_can_be_read():
    assert set(THEMES["light"]) == set(THEMES["dark"])
    for theme in THEMES.values():
        for ground in ("paper", "card"):
            assert contrast(theme["ink"], theme[ground]) >= 7 and contrast(theme["soft"], theme[ground]) >= 4.5
            assert all(contrast(theme[mark], theme[ground]) >= 3 for mark in ("truth", "query", "wrong", "accent"))
    assert css_variables().count("--accent:") == 2


# ---- the browser's marks

def same(seen, told, at=""):
    if isinstance(told, dict):
        assert set(seen) == set(told), at
        for k in told:
            same(seen[k], told[k], f"{at}.{k}")
    elif isinstance(told, list):
        assert len(seen) == len(told), at
        for i, (a, b) in enumerate(zip(seen, told)):
            same(a, b, f"{at}[{i}]")
    elif isinstance(told, float):
        assert seen == pytest.approx(told, rel=1e-12, abs=1e-12), at
    else:
        assert seen == told, at


def turn_a_knob(knob, rng):
    """Choose something with a control, as a reader would; what it was."""
    name, kind = knob.get_attribute("data-gears-control"), knob.evaluate("e => e.type")
    if kind == "select-one":
        knob.select_option(rng.choice(knob.evaluate("e => [...e.options].map(o => o.value)")))
    elif kind == "button":
        knob.click()
    else:
        low, high, step = (float(knob.get_attribute(a)) for a in ("min", "max", "step"))
        value = round(low + step * rng.randint(0, round((high - low) / step)), 6)
        knob.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event(e.type === 'range' ? 'input' : 'change')); }", int(value) if value.is_integer() else value)
    return name


@pytest.mark.skipif(why_no_browser() is not None, reason=f"no browser to test in: {why_no_browser()}")
def test_marks_in_the_browser_are_those_of_python(tmp_path):
    """All five on one page, so that they could disturb each other; whatever is chosen, both languages say the same."""
    shown, rng = explorers(), random.Random(0)
    path = write_html(shown, tmp_path / "all.html", "All")
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.set_default_timeout(120_000)
        beyond, errors = watch_network(tab), []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(path.as_uri())
        tab.wait_for_function("document.querySelectorAll('.gears-explorer').length === 5 && [...document.querySelectorAll('.gears-explorer')].every(e => e.__gears.marks)")
        roots = tab.query_selector_all(".gears-explorer")
        for e, root in zip(shown, roots):
            for _ in range(8):
                knob = rng.choice([c for c in root.query_selector_all("[data-gears-control]") if c.get_attribute("data-gears-control") != "play"])
                name = turn_a_knob(knob, rng)
                seen = root.evaluate("e => e.__gears.marks")
                e.state = {k: seen[k] for k in e.state}
                same(seen, e.marks(), f"{e.view} after {name}")
                told = root.query_selector("figcaption").inner_text()
                assert len(told) > 20 and "undefined" not in told and "NaN" not in told
        for e, root in zip(shown, roots):
            same(root.evaluate("async e => { await e.__gears.drawn; return e.__gears.marks; }"), e.marks(), f"{e.view}, after the others were used")
            assert root.evaluate("e => [...e.querySelectorAll('[data-gears-control]')].every(c => c.type === 'button' ? c.textContent : c.labels.length === 1 && c.labels[0].textContent)")
        assert not beyond and not errors
