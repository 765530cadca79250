"""Every kind of page in a real browser: the colours that are painted, light and dark; no errors, nothing asked for; and what a page says where it cannot draw."""
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.attention.browser import chromium, watch_network, why_no_browser
from gears_nb.attention.export import page as explorer_page
from gears_nb.attention.widgets import attention_explorer, reconstruction_explorer
from gears_nb.benchmark.compare import score_row
from gears_nb.core.page import POLICY, STILL, contents, page, squeeze, unsqueeze
from gears_nb.core.style import THEMES, contrast
from gears_nb.lab.findings import SEVERITIES, Bars, Diagnosis, Finding
from gears_nb.models.trace import AttentionTrace
from gears_nb.runs.diagnose_report import _READY, render_diagnosis
from gears_nb.runs.report import render_report, tissue_view

needs_browser = pytest.mark.skipif(why_no_browser() is not None, reason=f"no browser to test in: {why_no_browser()}")
PATIENCE = 120_000  # milliseconds
JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6) | st.binary(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("$ab<", max_size=3) | st.sampled_from(["$same", "$bytes"]), inner, max_size=4), max_leaves=12)


# ---- packing

@given(JSON)
def test_what_is_packed_comes_back(value):
    packed = squeeze([value, value])
    assert unsqueeze(packed) == [value, value] and packed == squeeze([value, value])
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", packed), "nothing in it can end an element"


def test_equal_things_are_kept_once():
    noise = np.random.default_rng(0).integers(0, 256, 30_000, np.uint8).tobytes()
    numbers = np.random.default_rng(1).random(2000).tolist()
    one = {"edges": noise, "x": {"deep": [numbers]}}
    assert len(squeeze({"a": one, "b": {"edges": bytes(noise), "x": numbers}})) < len(squeeze({"a": one})) + 150


def test_a_page_without_scripts_runs_none():
    still, moving = page("a<b", "<p>x</p>", footer="f&g"), page("t", "", scripts=["const a = '</script>'"], data=1)
    assert STILL in still and "<script" not in still and "<title>a&lt;b</title>" in still and "f&amp;g" in still
    assert POLICY in moving and moving.count("<script") == moving.count("</script>") == 3 and contents(moving) == {"libraries": [], "data": 1}
    assert "script-src" not in STILL and "unsafe-eval" not in POLICY and POLICY.startswith("default-src 'none'")


# ---- pages to look at

def a_diagnosis():
    """One finding of every severity, each with a chart that has a threshold."""
    chart = Bars("accuracy", ("raw", "centred"), (0.9, 0.4), "", 0.5, "chance")
    numbers = {"depth_pairs": [{"pair": ["a", "b"], "auc": 0.512345678901234}], "slide_acc": 0.512345678901234, "ok": True}
    findings = tuple(Finding(f"key-{s}", f"Is it {s}?", s, "A <summary> with `code`.", "Do `this`.", "FAIL" if s == "problem" else "", numbers, (chart,)) for s in SEVERITIES)
    source = {"name": "ST<1>", "kind": "spots", "given": 10, "used": 9, "genes": 5, "median_counts": 100.0, "median_genes": 4.0}
    return Diagnosis(findings, (source,), 5, 0, "smoke")


def a_table(n=60):
    """Cells with a true place, a turned reconstruction and a category."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 10, (n, 2))
    X = rng.poisson(2.0, (n, 8)).astype(np.float32)
    X[:, 0] = np.rint(5 * truth[:, 0])
    table = ad.AnnData(X, obs=pd.DataFrame({"type": np.where(truth[:, 1] > 5, "a<b", "c&d"), "gears_confidence": rng.uniform(size=n)}, index=[f"cell{i}" for i in range(n)]))
    table.obsm["X_gears"], table.obsm["spatial"] = truth @ [[0.0, -4.0], [-4.0, 0.0]] + 9, truth
    return table, truth


def a_report():
    table, truth = a_table()
    rows = [score_row(x, truth, protocol="own", dataset="toy", method=m) for m, x in (("gears", table.obsm["X_gears"]), ("random", np.random.default_rng(1).normal(size=truth.shape)))]
    return render_report("Report", [tissue_view("known", table, truth)], scores={"toy": rows}, histories={"encoder": [{"epoch": i, "loss": 1.0 / (i + 1)} for i in range(4)]})


def a_trace(n=12):
    """All cells attend to all, nearer ones more."""
    rng = np.random.default_rng(0)
    places = rng.uniform(size=(n, 2)).astype(np.float32)
    row, col = (i.astype(np.int32) for i in np.indices((n, n)).reshape(2, -1))
    qk = -np.square(places[row] - places[col]).sum(1)[None, None].astype(np.float32)
    share = np.exp(qk).reshape(1, 1, n, n)
    return AttentionTrace(row, col, (share / share.sum(-1, keepdims=True)).reshape(1, 1, -1).astype(np.float32), {"qk": qk}, np.stack([places, places]), None, "H-gate", places)


def an_export():
    return explorer_page([attention_explorer({"only": {"H-gate": a_trace()}}), reconstruction_explorer(a_table()[0])], "Explorers")


PAGES = {"diagnosis": lambda: render_diagnosis(a_diagnosis()), "readiness": lambda: render_diagnosis(a_diagnosis(), "Readiness", _READY), "report": a_report, "export": an_export}
DRAWN = {"report": "() => document.documentElement.dataset.ready === 'yes'",
         "export": "() => { const e = [...document.querySelectorAll('.gears-explorer')]; return e.length === 2 && e.every(x => x.querySelector('.main-svg .point, .main-svg .scatterlayer')); }"}


def as_hex(css):
    """`rgb(0, 114, 178)` as `#0072b2`."""
    return "#" + "".join(f"{int(v):02x}" for v in re.findall(r"\d+", css)[:3])


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in PAGES.items():
        (folder / f"{name}.html").write_text(make(), encoding="utf-8")
    return folder


def opened(browser, path, **options):
    """A page, what it asked for beyond the file, and what it complained of."""
    tab = browser.new_page(offline=True, **options)
    tab.set_default_timeout(PATIENCE)
    beyond, said = watch_network(tab), []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.goto(path.as_uri())
    return tab, beyond, said


def painted(tab, selector, name):
    """A computed colour of every element of a selector, as hex; what is filled with nothing (rings) is left out."""
    seen = "(all, name) => all.map(e => getComputedStyle(e)).filter(s => name !== 'fill' || s.fillOpacity !== '0').map(s => s[name])"
    return [as_hex(c) for c in tab.eval_on_selector_all(selector, seen, name)]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_colours_that_are_painted(files, browser, name, scheme):
    theme = {role: c.lower() for role, c in THEMES[scheme].items() if isinstance(c, str)}
    tab, beyond, said = opened(browser, files / f"{name}.html", color_scheme=scheme)
    if name in DRAWN:
        tab.wait_for_function(DRAWN[name])
    assert painted(tab, "body", "backgroundColor") == [theme["paper"]] and painted(tab, "body", "color") == [theme["ink"]]
    if name in ("diagnosis", "readiness"):
        bars, lines = painted(tab, "svg rect", "fill"), painted(tab, "svg .ref", "stroke")
        assert len(bars) == 10 and set(bars) == {theme["accent"]} and "#000000" not in bars
        assert len(lines) == 5 and all(contrast(line, theme["card"]) >= 3 for line in lines)
        assert tab.eval_on_selector_all("svg .ref", "all => all.every(e => getComputedStyle(e).stroke !== 'none' && parseFloat(getComputedStyle(e).strokeWidth) > 0)")
        badges = list(zip(painted(tab, ".badge", "color"), painted(tab, ".badge", "backgroundColor")))
        assert len(set(badges)) == len(SEVERITIES) and all(contrast(*pair) >= 4.5 for pair in badges)
        assert all(contrast(c, theme["card"]) >= 4.5 for c in painted(tab, "svg text", "fill"))
    else:
        marks = painted(tab, ".main-svg .point path, .main-svg path.point", "fill")
        assert len(marks) > 20 and "#000000" not in marks
        assert all(contrast(c, theme["card"]) >= 4.5 for c in painted(tab, ".main-svg .gtitle", "fill"))
    if name == "export":
        assert set(painted(tab, ".main-svg .barlayer .point path", "fill")) <= {theme["truth"], theme["faint"]}
    if name == "report":
        assert painted(tab, "tr.ours td:first-child", "color") == [theme["accent"]]
    assert (beyond, said) == ([], [])
    tab.close()


@needs_browser
@pytest.mark.parametrize("name", DRAWN)
def test_an_old_browser_gets_a_sentence(files, browser, name):
    tab = browser.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.add_init_script("delete globalThis.DecompressionStream")
    tab.goto((files / f"{name}.html").as_uri())
    assert "too old to unpack this page" in tab.locator("#trouble").inner_text() and tab.locator("h1").inner_text() in ("Report", "Explorers")
    tab.close()


@needs_browser
def test_a_file_that_was_cut_gets_a_sentence(files, browser, tmp_path):
    text = (files / "report.html").read_text(encoding="utf-8")
    start = text.index('id="packed">') + 12
    (tmp_path / "cut.html").write_text(text[: start + 4000] + text[text.index("</script>", start) :], encoding="utf-8")
    tab, _, said = opened(browser, tmp_path / "cut.html")
    assert "damaged" in tab.locator("#trouble").inner_text() and said
    tab.close()
