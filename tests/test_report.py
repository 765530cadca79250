"""The report is one file, needs no network, survives odd names, and draws what it was given."""
import re
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from gears_nb.attention.browser import find_browser
from gears_nb.benchmark.compare import risk_coverage, score_row
from gears_nb.core.errors import InputError
from gears_nb.core.page import contents
from gears_nb.geometry.metrics import METRICS
from gears_nb.lab.results import SCORE_KEYS
from gears_nb.runs.report import (
    compared,
    facts,
    informative_genes,
    position_colours,
    render_report,
    tissue_view,
    why_unscored,
    write_report,
)

BROWSER = find_browser()


def placed(n=60, genes=12, seed=0):
    """A reconstructed table (turned, mirrored, scaled truth with one missing cell) and its truth."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 10, (n, 2))
    X = rng.poisson(2.0, (n, genes)).astype(np.float32)
    X[:, 0] = np.rint(5 * truth[:, 0])
    X[:, 1] += 60                                   # the rest of a cell's counts, so that totals stay comparable
    table = ad.AnnData(X, obs=pd.DataFrame({"type": np.where(truth[:, 1] > 5, "a<b", "c&d")}, index=[f"cell{i}" for i in range(n)]),
                       var=pd.DataFrame(index=["</script><b>0", *[f"g{i}" for i in range(1, genes)]]))
    table.obs["gears_confidence"] = rng.uniform(size=n)
    table.obsm["X_gears"] = (truth @ np.array([[0.0, -4.0], [-4.0, 0.0]]) + 9)
    table.obsm["X_gears"][5] = np.nan
    return table, truth


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    table, truth = placed()
    slide = ad.AnnData(table.X[:30].copy(), var=table.var.copy(), obs=pd.DataFrame(index=[f"s{i}" for i in range(30)]), obsm={"spatial": truth[:30]})
    rng, rows = np.random.default_rng(1), []
    for seed in (0, 1):
        rows += [score_row(table.obsm["X_gears"], truth, protocol="own", dataset="toy", method="gears", seed=seed, seconds=1.0),
                 score_row(rng.normal(size=truth.shape), truth, protocol="own", dataset="toy", method="random", seed=seed, seconds=1.0)]
    history = [{"epoch": i, "loss": 5.0 / (i + 1), "validate": None, "part": float("nan")} for i in range(5)]
    path = write_report(
        tmp_path_factory.mktemp("report") / "r.html", "Tissue <1>",
        [tissue_view("known", table, truth), tissue_view("unknown", table, reference=slide)], scores={"toy": rows},
        risk={"toy": risk_coverage(table.obsm["X_gears"], truth, table.obs["gears_confidence"].to_numpy())}, histories={"encoder": history},
        diagnostics={"toy": {"warnings": ["lost <4> genes"], "graph": {"components": 1}, "gene_matching": {"shared": 12, "examples": ["a", "b"]}}})
    return path


def own_part(text):
    """The page without what is packed: plotly's own script and the data."""
    before, rest = text.split('id="packed">', 1)
    return before + rest.split("</script>", 1)[1]


def data_of(text):
    return contents(text)["data"]


def test_one_file_without_network(page):
    text = page.read_text()
    assert contents(text)["libraries"] == [] and len(re.findall(r"\* plotly\.js v", data_of(text)["plotly"])) == 1
    assert not re.search(r"https?:|//cdn|@import|<link|<img|src\s*=|url\(", own_part(text))
    assert "default-src 'none'" in text
    assert [p.name for p in page.parent.iterdir()] == ["r.html"]


def test_everything_from_files_is_escaped(page):
    own = own_part(page.read_text())
    assert "Tissue &lt;1&gt;" in own and "lost &lt;4&gt; genes" in own
    assert own.count("</script>") == 2, "a gene name closed a script element"
    names = [c["name"] for c in data_of(page.read_text())["tissues"][0]["colours"]]
    assert "gene </script><b>0" in names


def test_truth_and_reconstruction_coincide(page):
    """The reconstruction is the truth turned, mirrored and scaled: after alignment both maps are the same."""
    true, made = data_of(page.read_text())["tissues"][0]["maps"]
    np.testing.assert_allclose([true["x"], true["y"]], [made["x"], made["y"]], atol=2e-4)
    assert len(true["x"]) == 59                              # the cell without a position is left out
    assert np.mean(np.square(true["x"]) + np.square(true["y"])) == pytest.approx(1, abs=1e-3)


def test_every_colouring_fits_its_points(page):
    for tissue in data_of(page.read_text())["tissues"]:
        for m in tissue["maps"]:
            assert len(m["x"]) == len(m["y"]) == len(tissue["names"][m["group"]])
        for colour in tissue["colours"]:
            assert [len(v) for v in colour["values"] if v] == [len(n) for n, v in zip(tissue["names"], colour["values"]) if v]


def test_baselines_stand_beside_ours(page):
    text = page.read_text()
    assert "<tr class=ours><td>gears" in text and "<td>random" in text
    assert text.index("<td>gears") < text.index("<td>random")
    for section in ("Maps", "Scores", "Training", "Genes", "Expression graph", "Warnings", "How to read this"):
        assert f"<h2>{section}</h2>" in text


def test_absent_parts_are_left_out(tmp_path):
    text = write_report(tmp_path / "r.html", "Empty").read_text()
    assert "<h2>Scores" not in text and "<h2>Maps" not in text and "How to read this" in text


def test_refusals(tmp_path):
    table, truth = placed()
    with pytest.raises(InputError, match="gears reconstruct"):
        tissue_view("t", ad.AnnData(np.ones((3, 2), np.float32)))
    with pytest.raises(InputError, match="nogene"):
        tissue_view("t", table, truth, genes=["nogene"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        write_report(tmp_path / "file" / "r.html", "t")


def test_nobody_has_a_position():
    table, truth = placed()
    table.obsm["X_gears"][:] = np.nan
    table.obs["gears_note"] = ["no counts"] * 40 + ["too few genes"] * 20
    for view in (tissue_view("t", table, truth), tissue_view("t", table)):
        assert (view.maps, view.notes[0], view.unplaced) == ((), "0 of 60 cells have a position.", {"no counts": 40, "too few genes": 20})
        text = own_part(render_report("t", [view]))
        assert "<h2>Cells without a position</h2>" in text and "<tr><td>no counts</td><td>40</td></tr>" in text


def test_truth_of_some_cells():
    """Where a third of the true places is not known all placed cells are drawn, the others decide the alignment, and the view says how many."""
    table, truth = placed()
    part = truth.copy()
    part[:20] = np.nan
    view, full = tissue_view("t", table, part), tissue_view("t", table, truth)
    true, made = view.maps
    assert len(true["x"]) == len(made["x"]) == 59 and true["x"].count(None) == 19 and None not in made["x"]
    assert "The true place of 40 of them is known; only these are compared." in view.notes
    np.testing.assert_allclose(true["x"][19:], made["x"][19:], atol=2e-4)
    d = lambda m: np.linalg.norm(np.diff(np.stack([m["x"], m["y"]]), axis=1), axis=0)
    ratio = d(made) / d(full.maps[1])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-2)
    assert view.colours[0]["values"][0][:19] == ["#9f9f9f"] * 19 and compared(table.obsm["X_gears"], part).sum() == 40


def test_too_few_for_scores(page):
    table, truth = placed()
    part = np.where(np.arange(60)[:, None] < 8, truth, np.nan)
    reason = why_unscored(table.obsm["X_gears"], part)
    assert reason == "Too few cells for scores: 7 have both a position and a known place, and 10 are needed." and reason in tissue_view("t", table, part).notes
    text = own_part(render_report("t", [tissue_view("t", table, part)], scores={"t": reason, "u": []}))
    assert reason in text and "Nothing was scored." in text and "mean rank" not in text and "Spearman" not in text
    assert why_unscored(table.obsm["X_gears"], truth) == ""


def test_one_method_has_no_rank(page):
    table, truth = placed()
    text = own_part(render_report("t", scores={"t": [score_row(table.obsm["X_gears"], truth, protocol="own", dataset="t", method="gears")]}))
    assert "mean rank" not in text and "<th>Spearman ↑</th>" in text and "<tr class=ours><td>gears</td><td><b>1.000</b></td>" in text
    assert "mean rank" in own_part(page.read_text()) and "<th>mean rank</th>" in page.read_text()


def test_diagnostics_are_told_in_words():
    """One row per source, numbers with four digits, no brackets and no names of variables; settings keep their names."""
    lost = {"count": 7, "examples": ["<g1>", "g2"]}
    told = {"gene_matching": {"common": 700, "vocabulary": "symbol", "sources": [{"source": s, "genes": 707, "shared": 700, "not_shared": lost} for s in ("ST1", "cells")]},
            "dropped": {"source": "cells", "cells_dropped": 0, "cells_dropped_examples": []}, "graph": {"islands": [2500], "reattached": 133},
            "stitching": {"patch_scale": [0.83356, 1.02208, 1.11981], "seconds": {"graph": 0.127}, "memory_estimate": 116440016},
            "solve": {"stress": 0.025141826080873543, "converged": True, "residuals": {"q50": 0.017704404708816963}, "reason": "converged"}, "config": {"structure": {"k_cand": 80}}}
    text = own_part(render_report("t", diagnostics={"t": told})).split("</head>")[1].split("<script")[0]
    assert "<tr><td>ST1</td><td>707</td><td>700</td><td>7 (&lt;g1&gt;, g2, …)</td></tr>" in text and "<th scope=row>structure.k_cand</th>" in text
    words, settings = text.split("<h2>Settings</h2>")
    raw = re.findall(r"[{}\[\]]|\b[a-z]\w*_\w+\b|\.\d*[1-9]\d{4}|\bTrue\b|\bNone\b", words)
    assert not raw, "raw Python on the page"
    assert "<td>yes</td>" in words and "0.02514" in words and "Genes" in words
    assert facts({}) == "" and "<td>none</td>" in facts({"x": []})


def test_several_sections_are_several_views():
    table, truth = placed()
    table.obsm["X_gears"][:30] = np.nan
    views = [tissue_view(f"section {i}", table[rows].copy(), truth[rows]) for i, rows in enumerate((slice(0, 30), slice(30, 60)))]
    data = data_of(render_report("t", views))
    assert [len(t["maps"]) for t in data["tissues"]] == [0, 2] and [t["name"] for t in data["tissues"]] == ["section 0", "section 1"]


def test_a_report_that_cannot_be_made_writes_nothing(tmp_path):
    with pytest.raises(AttributeError):
        write_report(tmp_path / "r.html", "t", scores=3)
    assert not list(tmp_path.iterdir())


def test_subsample_is_seeded_and_aligned_on_all_cells():
    table, truth = placed(n=400)
    views = [tissue_view("t", table, truth, max_points=50, seed=s) for s in (0, 0, 1)]
    assert views[0] == views[1] and views[0].names != views[2].names
    full = tissue_view("t", table, truth)
    where = {name: i for i, name in enumerate(full.names[0])}
    rows = [where[n] for n in views[0].names[0]]
    assert views[0].maps[1]["x"] == [full.maps[1]["x"][i] for i in rows]


def test_smooth_genes_are_preferred():
    table, truth = placed(n=300)
    assert informative_genes(table, truth, count=1) == ["</script><b>0"]


def test_position_colours_are_monotone_along_an_edge():
    xy = np.stack([np.linspace(0, 1, 6), np.zeros(6)], 1)
    red = [int(c[1:3], 16) for c in position_colours(np.vstack([xy, [[0, 1]]]))][:6]
    assert red == sorted(red) and red[0] < red[-1]


def test_score_keys_are_the_metrics():
    assert SCORE_KEYS == tuple(METRICS)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the page is not opened in a browser")
def test_in_a_browser(page, tmp_path):
    """The script runs to its end without an error and draws every point of both maps and the line charts."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=6000"]
    done = subprocess.run([BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert 'data-ready="yes"' in done.stdout
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    drawn = done.stdout.split('<script type="text/plain"')[0]
    maps = re.split(r'id="map\d"', drawn)[1:]
    assert len(maps) == 2
    assert [m.split('id="legend"')[0].count('class="point"') for m in maps] == [59, 59]
    assert len(re.findall(r"js-line", drawn)) >= 2


def test_the_doctor_misses_no_notebooks(monkeypatch, capsys):
    """Without what runs notebooks there is a note that names the extra, in full on the screen, and no fault."""
    from gears_nb.runs.doctor import check_notebooks, examine, show
    for name in ("jupyter_client", "jupyter_client.kernelspec"):
        monkeypatch.setitem(sys.modules, name, None)
    found = examine((check_notebooks,))
    assert [(f.topic, f.state) for f in found] == [("notebooks", "note")] and show(found) == 0
    said = capsys.readouterr().out
    assert "jupyter_client is not installed" in said and "gears_nb[lab]" in said
