"""Pages of maps: ten thousand cells by WebGL in a real browser, keys, palettes, linked selection, saved files; what is recognised of every chapter; what may be concluded."""
import json
import re
import warnings
import xml.etree.ElementTree as ET

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from gears_nb.attention.browser import chromium, watch_network, why_no_browser
from gears_nb.attention.maps import LEVELS, MapView, category, maps_page, number, place, place_map, ramps, write_maps
from gears_nb.attention.widgets import attention_explorer
from gears_nb.core.errors import InputError
from gears_nb.core.page import contents
from gears_nb.core.style import COLOURS
from gears_nb.models.trace import AttentionTrace
from gears_nb.runs.explore_any import KINDS, explore_page, explore_result, needs_kernel, open_result, recognise, result_page, samples_view
from gears_nb.runs.panels import NAMES, RULE, Trust, result_files, settings_rows, trust_of, verdict
from gears_nb.runs.report import render_report, tissue_view

needs_browser = pytest.mark.skipif(why_no_browser() is not None, reason=f"no browser to test in: {why_no_browser()}")
PATIENCE = 120_000  # milliseconds
N, FEWER = 10_000, 2000
CSV = "cell,x,y\nä,1,2\n"
ANSWERS = "() => document.documentElement.dataset.ready && document.documentElement.dataset.answers"
COLOURING = "() => document.getElementById('map0').data[0].marker"


def many(n=N):
    """Truth and a noisy map of cells, with a category of nine levels, a number and a diverging one."""
    rng = np.random.default_rng(0)
    xy = rng.normal(size=(n, 2))
    kind = np.digitize(np.arctan2(xy[:, 1], xy[:, 0]), np.linspace(-3.2, 3.2, 10)[1:-1])
    return MapView("many <cells>", (place_map("truth", xy), place_map("map", xy[:, ::-1] + 0.1 * rng.normal(size=(n, 2)))), ([f"cell{i}" for i in range(n)],),
                   (place(), category("kind", [f"kind {k}" for k in kind]), number("x", xy[:, 0], unit="radii"), number("change", xy[:, 1], diverging=True)), (f"{n} cells.",))


def placed(n=60, seed=0):
    """A small reconstruction with confidence, diagnostics and truth."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(size=(n, 2))
    table = ad.AnnData(rng.poisson(2.0, (n, 8)).astype(np.float32), obs=pd.DataFrame({"type": np.where(xy[:, 1] > 0.5, "a<b", "c&d"), "gears_confidence": rng.uniform(0.5, 0.7, n)}, index=[f"cell{i}" for i in range(n)]))
    table.obs["gears_error"] = 0.66 * (1 - table.obs["gears_confidence"])
    table.obsm["X_gears"], table.obsm["spatial"] = xy @ [[0.0, -4.0], [-4.0, 0.0]] + 9, xy
    table.obsm["X_gears"][3] = np.nan
    table.uns["gears"] = {"config": json.dumps({"profile": "toy", "seed": 0}), "fusion": json.dumps({"shift": 1.1}), "graph": json.dumps({"cells": n, "islands": [n], "reattached": 1, "bridges": 0}), "solve": json.dumps({"stress": 0.05})}
    return table


def changed(kind, n=40):
    """A prediction, a counterfactual or contributions as the chapters write them."""
    rng = np.random.default_rng(1)
    before = rng.normal(size=(n, 6)).astype(np.float32)
    after = before + np.eye(6, dtype=np.float32)[2]
    obs = pd.DataFrame({"perturbation": ["JQ1", "none"] * (n // 2), "line": "K562"}, index=[f"c{i}" for i in range(n)])
    parts = {"prediction": {"layers": {"control": before, "difference": after - before}}, "counterfactual": {"layers": {"generated": after, "difference": after - before}, "uns": {"cycle": {"to": {"assay": "10x"}}}},
             "contributions": {"obsm": {"norms": pd.DataFrame(rng.uniform(size=(n, 3)), columns=["base", "assay", "residual"], index=obs.index)}, "uns": {"cycle": {"fields": ["assay"]}}}}
    return ad.AnnData(after, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(6)]), **parts[kind])


def embedded(key, n=40):
    rng = np.random.default_rng(2)
    obs = pd.DataFrame({"species": ["human", "mouse"] * (n // 2), "source": "one"}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(rng.poisson(3.0, (n, 6)).astype(np.float32), obs=obs, obsm={key: rng.normal(size=(n, 5)), **({"X_saturn_aligned": rng.normal(size=(n, 5))} if key == "X_saturn" else {})})


def carried(kind, n=40):
    """Forty spots with a zone and two genes carried over, or as a stack of two layers."""
    table = embedded("spatial", n)
    table.obsm["spatial"] = table.obsm["spatial"][:, :2]
    if kind == "transfer":
        table.obs["gears_zone"] = ["a", "b"] * (n // 2)
        table.obs["gears_zone_probability"] = np.linspace(0.5, 1, n)
        table.obsm["gears_genes"] = np.c_[np.linspace(0, 1, n), np.linspace(2, 0, n)]
        table.uns["gears_transfer"] = json.dumps({"labels": {"zone": {}}, "genes": {"genes": {"Glul": {"told": True}, "Alb": {"told": False}}}})
    else:
        table.obs["gears_layer"] = ["one", "two"] * (n // 2)
        table.obsm["spatial_3d"], table.uns["gears_stack"] = np.c_[table.obsm.pop("spatial"), np.tile([0.0, 7.5], n // 2)], "{}"
    return table


TABLES = {"reconstruction": placed, **{k: (lambda k=k: changed(k)) for k in ("prediction", "counterfactual", "contributions")}, "species": lambda: embedded("X_saturn"), "alignment": lambda: embedded("X_aligned"), "embedding": lambda: embedded("H_gears"),
          "transfer": lambda: carried("transfer"), "stack": lambda: carried("stack")}


# ---- what a page is made of

def test_one_page_with_everything_once():
    text = maps_page("Ten <thousand>", [many()], files=[{"name": "p.csv", "label": "positions", "type": "text/csv", "text": CSV}])
    held = contents(text)
    assert held["libraries"] == [] and held["data"]["plotly"].count("* plotly.js v") == 1
    own = text.replace(text.split('id="packed">', 1)[1].split("</script>", 1)[0], "")
    assert not re.search(r"https?:|//cdn|@import|<link|<img|src\s*=", own) and "Ten &lt;thousand&gt;" in own
    assert [len(m["x"]) for m in held["data"]["tissues"][0]["maps"]] == [4 * N] * 2 and len(text) < 3e6


def test_views_that_do_not_fit_are_refused(tmp_path):
    good = many()
    for bad, message in ((MapView("v", good.maps, (["a"],), good.colours), "10000 points for 1 names"), (MapView("v", good.maps, good.names, (number("x", [1.0]),)), "x has"), (MapView("v", (), good.names, good.colours), "at least one map")):
        with pytest.raises(InputError, match=message):
            write_maps(tmp_path / "p.html", "t", [bad])
    with pytest.raises(InputError, match="use .html"):
        write_maps(tmp_path / "p.pdf", "t", [good])
    assert not list(tmp_path.iterdir())


def test_scales_are_those_of_matplotlib():
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    for name in ("viridis", "cividis"):
        assert ramps()[name][8] == to_hex(colormaps[name](0.5))
    assert set(LEVELS) - {"ink"} <= set(COLOURS.values())


# ---- what may be concluded

def test_the_verdict_follows_its_rule():
    good = Trust(100, 100, 0.64, 0.9, 0.24)
    assert [verdict(Trust(100, 100, c)).level for c in (0.1, 0.3, 0.6, 0.9)] == [0, 1, 2, 3]
    assert verdict(Trust(10, 0)).level == 0 and "no cell has a position" in verdict(Trust(10, 0)).may
    assert verdict(good).may.startswith("Regions and gradients") and "neighbours are wrong" in verdict(good).may_not
    for limit in ("0.25", "0.5", "0.8", "2 times", "0.4", "quarter"):
        assert limit in RULE


def test_trust_is_read_from_the_file(tmp_path):
    trust = trust_of(placed())
    assert (trust.cells, trust.placed, trust.shift, trust.stress, trust.pieces, sum(trust.histogram)) == (60, 59, 1.1, 0.05, 1, 59)
    broken = placed()
    broken.uns["gears"] = {"fusion": "{no json"}
    assert trust_of(broken).shift is None
    sections = placed()
    sections.obs["gears_section"] = np.where(np.arange(60) < 30, "A", "B")
    sections.uns["gears"]["graph"] = json.dumps({"A": {"islands": [10, 20]}, "B": {"islands": [30]}})
    part = trust_of(sections[:30])
    assert (part.sections, part.pieces) == (2, 2) and any("frame of its own" in w for w in verdict(part).within)


def test_the_report_says_it_and_hands_out_files():
    table = placed()
    told = {"t": {name: json.loads(part) for name, part in table.uns["gears"].items()}}
    text = render_report("t", [tissue_view("my tissue", table, table.obsm["spatial"])], diagnostics=told)
    own = text.split('id="packed">')[0]
    assert NAMES[2] in own and "<h2>What may be concluded?</h2>" in own and "isolated cells" in own and "another section of it" in own
    files = {f["name"]: f["text"] for f in contents(text)["data"]["files"]}
    assert list(files) == ["my_tissue_positions.csv", "my_tissue_confidence.csv", "gears_settings.json"]
    back = pd.read_csv(__import__("io").StringIO(files["my_tissue_positions.csv"]), index_col="cell")
    np.testing.assert_allclose(back[["x", "y"]], table.obsm["X_gears"], rtol=1e-6)
    assert json.loads(files["gears_settings.json"]) == told


def test_settings_are_told_with_their_meaning():
    from gears_nb.core.config import to_dict
    from gears_nb.reconstruct.settings import profile
    rows = {name: (value, meaning) for name, value, meaning in settings_rows(to_dict(profile("toy", **{"patches.size": 200})))}
    assert rows["patches.size"] == ("200 (profile: 256)", "cells per patch") and rows["structure.train.lr"][1]
    assert [r[:2] for r in settings_rows({"profile": "of another version", "x": [1]})] == [("profile", "of another version"), ("x", "1")]


def test_names_with_commas_and_quotes_survive():
    table = placed(5)
    table.obs_names = ['a,"b"', "line\nbreak", "c", "d", "e"]
    back = pd.read_csv(__import__("io").StringIO(result_files("t", table)[0]["text"]))
    assert list(back["cell"]) == list(table.obs_names)


# ---- every chapter

@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_is_recognised_and_drawn(kind):
    table = TABLES[kind]()
    assert recognise(table) == kind
    before = table.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = result_page(kind, {kind: table})
    held = contents(text)["data"]
    view = held["tissues"][0]
    assert [f["name"] for f in held["files"]] == (["reconstruction_positions.csv", "reconstruction_confidence.csv"] if kind == "reconstruction" else [f"{kind}_coordinates.csv"])
    assert len(view["maps"]) == {"contributions": 1, "stack": 3}.get(kind, 2) and len(view["colours"]) > 2
    assert view["shared"] == (kind in ("prediction", "counterfactual", "contributions", "stack"))
    pd.testing.assert_frame_equal(table.obs, before.obs)
    np.testing.assert_array_equal(table.X, before.X)


def test_all_kinds_are_tested():
    assert set(TABLES) == set(KINDS)


def test_before_and_after_are_what_the_file_says():
    for kind in ("prediction", "counterfactual"):
        (view,) = explore_result(changed(kind))
        x = [np.frombuffer(m["x"], "<f4") for m in view.maps]
        shift = x[1] - x[0]
        np.testing.assert_allclose(shift, shift[0], atol=1e-4)                    # all cells moved alike
        assert view.colours[0]["name"] == "perturbation"
        assert "change of g2" in [c["name"] for c in view.colours] and "change of g1" not in [c["name"] for c in view.colours]


def test_what_was_carried_over_comes_first_and_says_whether_it_is_told():
    (view,) = explore_result(carried("transfer"), genes=["Alb"])
    assert [m["title"] for m in view.maps] == ["places", "expression: principal components"]
    names = [c["name"] for c in view.colours]
    assert names[:2] == ["carried over: zone", "carried over: zone probability"] and {"foretold Glul", "foretold Alb (not told)"} <= set(names)
    with pytest.raises(InputError, match="nope"):
        explore_result(carried("transfer"), genes=["nope"])
    nowhere = carried("transfer")
    del nowhere.obsm["spatial"]
    assert len(explore_result(nowhere)[0].maps) == 1  # by expression alone


def test_layers_of_a_stack_are_drawn_together_and_alone():
    table = carried("stack")
    (view,) = explore_result(table)
    assert [m["title"] for m in view.maps] == ["all layers, from above", "one, z = 0", "two, z = 7.5"] and view.colours[0]["name"] == "layer"
    alone = np.isfinite(np.frombuffer(view.maps[2]["x"], "<f4"))
    assert (alone == (table.obs["gears_layer"] == "two")).all()


def test_a_map_in_the_frame_of_a_slide_is_no_truth():
    table = placed()
    table.obsm["spatial"], table.uns["gears_frame"] = 100 * table.obsm["X_gears"], "{}"
    titles = lambda: [m["title"] for m in explore_result(table)[0].maps]
    assert titles() == ["reconstructed", "in the frame of the slide"]
    table.obsm["spatial_before"] = placed().obsm["spatial"]
    assert titles() == ["true positions", "reconstructed (aligned)", "in the frame of the slide"]


def test_the_seed_and_the_cells_decide_the_map():
    one, two = (explore_result(embedded("X_aligned"))[0].maps for _ in range(2))
    assert one == two


def test_samples_of_a_generator():
    rng = np.random.default_rng(0)
    view = samples_view(rng.normal(size=(4, 20, 2)), "vae")
    assert [m["title"] for m in view.maps] == ["sample 1 of 4", "sample 2 of 4", "sample 3 of 4"] and np.frombuffer(view.colours[1]["values"][0], "<f4").min() > 0
    for bad in (np.ones((4, 20)), np.ones((1, 20, 2)), np.full((2, 20, 2), np.nan)):
        with pytest.raises(InputError, match="layouts"):
            samples_view(bad)


def test_bad_files_get_one_line_and_nothing_is_written(tmp_path):
    plain, cut, text = tmp_path / "plain.h5ad", tmp_path / "cut.h5ad", tmp_path / "notes.txt"
    ad.AnnData(np.ones((5, 3), np.float32)).write_h5ad(plain)
    cut.write_bytes(plain.read_bytes()[:900])
    text.write_text("x")
    there = tmp_path / "p.h5ad"
    changed("prediction").write_h5ad(there)
    for source, options, words in ((plain, {}, "X_gears"), (cut, {}, "cut.h5ad"), (text, {}, ".h5ad"), (tmp_path / "none.h5ad", {}, "no such"), (there, {"genes": ["nope"]}, "nope"),
                                   (there, {"model_dir": tmp_path}, "leave it out"), (tmp_path, {}, "holds no reconstruction")):
        with pytest.raises(InputError) as error:
            explore_page(source, tmp_path / "out.html", **options)
        assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.html").exists()
    assert [needs_kernel(p) for p in (there, plain, text, tmp_path)] == [False, False, True, True]


def test_the_command(tmp_path, capsys):
    import argparse

    from gears_nb.runs.explore_any import explore_arguments, explore_command
    parser = argparse.ArgumentParser()
    explore_arguments(parser)
    changed("prediction").write_h5ad(tmp_path / "p.h5ad")
    assert explore_command(parser.parse_args([str(tmp_path / "p.h5ad"), "--export", str(tmp_path / "p.html"), "--gene", "g4"])) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p.html'}: prediction\n" and "change of g4" in str([c["name"] for c in contents((tmp_path / "p.html").read_text())["data"]["tissues"][0]["colours"]])
    with pytest.raises(InputError, match="is also an input|does not end"):
        explore_command(parser.parse_args([str(tmp_path / "p.h5ad"), "--export", str(tmp_path / "p.h5ad")]))


def test_aligned_sources_of_a_folder_are_one_table(tmp_path):
    for name in ("slide", "cells"):
        embedded("X_aligned").write_h5ad(tmp_path / f"{name}.h5ad")
    (table,) = open_result(tmp_path).tables.values()
    assert table.n_obs == 80 and set(table.obs["file"]) == {"slide", "cells"} and not needs_kernel(tmp_path)


# ---- in a browser

@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def opened(browser, path, **options):
    """A page with maps that answer, what it asked for beyond the file, and what it complained of (the driver of a machine without a graphics card aside)."""
    tab = browser.new_page(offline=True, **{"viewport": {"width": 1200, "height": 900}, **options})
    tab.set_default_timeout(PATIENCE)
    beyond, said = watch_network(tab), []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") and "GL Driver Message" not in message.text else None)
    tab.goto(path.as_uri())
    tab.wait_for_function(ANSWERS)
    return tab, beyond, said


@pytest.fixture(scope="module")
def ten(browser, tmp_path_factory):
    tab, beyond, said = opened(browser, write_maps(tmp_path_factory.mktemp("maps") / "ten.html", "Ten thousand", [many()]))
    yield tab, beyond, said
    tab.close()


@pytest.fixture(scope="module")
def two(browser, tmp_path_factory):
    """Two thousand cells, which are drawn by WebGL as well and faster."""
    files = [{"name": "p.csv", "label": "positions", "type": "text/csv", "text": CSV}]
    tab, *_ = opened(browser, write_maps(tmp_path_factory.mktemp("maps") / "two.html", "Two thousand", [many(FEWER)], files=files))
    yield tab
    tab.close()


@pytest.fixture
def tab(two):
    """The page of two thousand cells as it was when it opened."""
    tab = two
    tab.evaluate("() => { document.getElementById('help').close(); document.activeElement.blur(); }")
    for control, value in (("colour", "0"), ("palette", "viridis")):
        tab.select_option(f"#{control}", value)
    tab.uncheck("#shapes")
    tab.evaluate("() => document.activeElement.blur()")
    tab.keyboard.press("Escape")
    return tab


@needs_browser
def test_ten_thousand_cells_are_drawn_by_webgl(ten, capsys):
    tab, beyond, said = ten
    painted, answers = tab.evaluate("() => [+document.documentElement.dataset.painted, +document.documentElement.dataset.answers]")
    with capsys.disabled():
        print(f"\n10,000 cells: first points after {painted / 1000:.2f} s, maps that answer after {answers / 1000:.2f} s")
    assert tab.evaluate("() => [...document.querySelectorAll('.map')].map(d => [d.data[0].type, d.data[0].x.length])") == [["scattergl", N]] * 2
    assert 0 < painted < answers and tab.locator(".map > canvas").count() == 0
    assert "WebGL is not supported" not in tab.locator("#maps").inner_text()
    shot = np.asarray(__import__("PIL.Image", fromlist=["open"]).open(__import__("io").BytesIO(tab.locator("#map1").screenshot())).convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.ptp(shot, 1) > 40).mean() > 0.03, "no coloured points in the picture"
    assert (beyond, said) == ([], [])


@needs_browser
def test_keys_do_what_a_mouse_does(tab):
    marker = lambda: tab.evaluate(COLOURING)
    at = lambda: tab.evaluate("() => document.getElementById('map0')._fullLayout.xaxis.range")
    first = marker()["color"][:50]
    tab.keyboard.press("ArrowRight")
    assert tab.input_value("#colour") == "1" and marker()["color"][:50] != first
    tab.keyboard.press("ArrowLeft"), tab.keyboard.press("ArrowLeft")
    assert tab.input_value("#colour") == "3"
    wide = at()
    tab.keyboard.press("+")
    near = at()
    assert near[1] - near[0] == pytest.approx((wide[1] - wide[0]) / 1.3, rel=1e-3)
    tab.keyboard.press("0")
    assert at() == pytest.approx(wide, rel=0.05)
    tab.keyboard.press("?")
    assert tab.locator("#help").is_visible() and "whole map" in tab.locator("#help").inner_text()
    tab.keyboard.press("Escape")
    assert not tab.locator("#help").is_visible()
    tab.focus("#colour")
    tab.keyboard.press("p")                                                      # a letter in a list is the list's
    assert tab.input_value("#palette") == "viridis"


@needs_browser
def test_a_level_of_the_legend_selects_in_both_maps(tab):
    tab.select_option("#colour", "1")
    kinds = np.array([c for c in tab.evaluate(COLOURING)["color"]])
    tab.focus("#legend [data-level='2']")
    tab.keyboard.press("Enter")
    chosen = tab.evaluate("() => [...document.querySelectorAll('.map')].map(d => d.data[0].selectedpoints)")
    assert chosen[0] == chosen[1] and set(kinds[chosen[0]]) == {LEVELS[2]} and (kinds == LEVELS[2]).sum() == len(chosen[0])
    assert tab.locator("#selection").inner_text() == f"{len(chosen[0])} cells selected: kind 2 {len(chosen[0])}."
    assert tab.get_attribute("#legend [data-level='2']", "aria-pressed") == "true"
    with tab.expect_download() as download:
        tab.click("[data-selected]")
    rows = open(download.value.path(), encoding="utf-8").read().splitlines()
    assert rows[0] == "cell,kind" and rows[1:] == [f"cell{i},kind 2" for i in chosen[0]] and download.value.suggested_filename == "many_cells_selected.csv"
    tab.keyboard.press("Escape")
    assert tab.evaluate("() => document.getElementById('map1').data[0].selectedpoints") is None and tab.locator("[data-selected]").is_disabled()


@needs_browser
def test_palettes_change_colours(tab):
    seen = {}
    for colour in ("0", "2", "3"):
        for palette in ("viridis", "cividis", "greys"):
            tab.select_option("#colour", colour), tab.select_option("#palette", palette)
            seen[colour, palette] = tuple(tab.evaluate(COLOURING)["color"][:200])
    assert len({seen["0", p] for p in ("viridis", "cividis", "greys")}) == 3 and len({seen["2", p] for p in ("viridis", "cividis", "greys")}) == 3
    blue = lambda c: int(c[5:], 16) - int(c[1:3], 16)
    assert max(map(blue, seen["2", "cividis"])) > 0 > min(map(blue, seen["2", "cividis"])), "cividis runs from blue to yellow"
    assert all(len({c[1:3], c[3:5], c[5:]}) == 1 for c in seen["2", "greys"])
    assert seen["3", "viridis"] == seen["3", "cividis"] != seen["3", "greys"]      # a change has two hues that every eye tells apart
    tab.select_option("#palette", "viridis"), tab.select_option("#colour", "1")
    assert set(tab.evaluate(COLOURING)["symbol"]) == {"circle", "square"}       # nine levels, seven colours
    tab.evaluate("() => document.activeElement.blur()")
    tab.keyboard.press("s")
    assert len(set(tab.evaluate(COLOURING)["symbol"])) > 4 and tab.is_checked("#shapes")
    pairs = tab.evaluate("() => { const m = document.getElementById('map0').data[0].marker; return [...new Set(m.color.map((c, i) => c + m.symbol[i]))].length; }")
    assert pairs == 9, "two levels look alike"


@needs_browser
def test_saved_files_are_the_right_bytes(tab):
    def saved(selector):
        with tab.expect_download() as download:
            tab.click(selector)
        return download.value.suggested_filename, open(download.value.path(), "rb").read()

    assert saved("[data-file='0']") == ("p.csv", CSV.encode())
    tab.select_option("#colour", "2")
    name, svg = saved("[data-figure=svg]")
    marks = [e for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")]
    assert name == "many_cells_x.svg" and len(marks) == 2 * FEWER
    assert [e.get("fill") for e in marks[:100]] == tab.evaluate(COLOURING)["color"][:100]
    name, png = saved("[data-figure=png]")
    assert name == "many_cells_x.png" and png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 2 * 920


@needs_browser
def test_lasso_in_one_map_selects_in_the_other(tab):
    box = tab.locator("#map0").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 40, y - 40)
    tab.mouse.down()
    for dx, dy in ((40, -40), (40, 40), (-40, 40), (-40, -38)):
        tab.mouse.move(x + dx, y + dy, steps=4)
    tab.mouse.up()
    tab.wait_for_function("() => document.getElementById('map1').data[0].selectedpoints")
    assert 50 < len(tab.evaluate("() => document.getElementById('map1').data[0].selectedpoints")) < FEWER


@needs_browser
def test_a_page_with_explorers_draws_them_when_they_are_near(browser, tmp_path):
    n, rng = 12, np.random.default_rng(0)
    places = rng.uniform(size=(n, 2)).astype(np.float32)
    row, col = (i.astype(np.int32) for i in np.indices((n, n)).reshape(2, -1))
    qk = -np.square(places[row] - places[col]).sum(1)[None, None].astype(np.float32)
    share = np.exp(qk).reshape(1, 1, n, n)
    trace = AttentionTrace(row, col, (share / share.sum(-1, keepdims=True)).reshape(1, 1, -1).astype(np.float32), {"qk": qk}, np.stack([places, places]), None, "H-gate", places)
    path = tmp_path / "r.html"
    path.write_text(result_page("r", {"r": placed()}, explorers=[attention_explorer({"only": {"H-gate": trace}})]), encoding="utf-8")
    tab, beyond, said = opened(browser, path, viewport={"width": 400, "height": 700}, color_scheme="dark")
    assert tab.evaluate("() => document.documentElement.scrollWidth") == 400, "wider than the screen of a telephone"
    assert tab.evaluate("() => document.getElementById('map0').data[0].type") == "scatter"
    tab.locator("[data-view='0']").scroll_into_view_if_needed()
    tab.wait_for_selector(".gears-explorer .main-svg")
    assert (beyond, said) == ([], [])
    tab.close()
