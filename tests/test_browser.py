"""The widgets in a real Chromium: in JupyterLab, in voila through `gears explore`, and as a file; what is marked is what the record says."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import psutil
import pytest

from gears_nb.attention.browser import chromium, lab, run_in_lab, watch_network, why_no_browser
from gears_nb.attention.explore import gather, write_notebook
from gears_nb.attention.rules import true_neighbours
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.models.trace import step_size, values

pytestmark = pytest.mark.skipif(why_no_browser() is not None, reason=f"no browser to test in: {why_no_browser()}")
GEARS = str(Path(sys.executable).parent / "gears")
LOOPBACK = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
PATIENCE = 120_000  # milliseconds; on a busy machine a page can take long, and a test that passes does not wait
NAMES = ("attention", "recycles", "gate", "reconstruction", "distortion")
EXPLORERS = ("attention", "recycles", "gate", "distortion")  # of an exported page, whose reconstruction is a map above them

PIXEL = """([view, x, y, panel]) => {
    const plot = document.querySelector(`[data-gears-view="${view}"][data-gears-panel="${panel}"]`);
    const {xaxis: xa, yaxis: ya} = plot._fullLayout;
    plot.scrollIntoView({block: "center"});
    const box = plot.getBoundingClientRect();
    return [box.left + xa._offset + xa.d2p(x), box.top + ya._offset + ya.d2p(y)];
}"""
IN_KERNEL = """async code => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    let said = "";
    const job = kernel.requestExecute({code});
    job.onIOPub = m => { if (m.header.msg_type === "stream") said += m.content.text; };
    await job.done;
    return said;
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: a section of 150 spots placed by a tiny model, which is kept."""
    from gears_nb.data.io import write_h5ad
    from gears_nb.data.simulator import simulate
    from gears_nb.reconstruct.facade import Gears
    from gears_nb.reconstruct.settings import profile
    folder = tmp_path_factory.mktemp("run")
    *slides, held_out = simulate("tiny", 0).slides
    model = Gears(profile("smoke", **{"encoder.train.progress": False, "structure.train.progress": False})).fit(slides, workdir=folder / "work")
    write_h5ad(model.reconstruct(held_out), folder / "ST3.h5ad")
    model.save(folder / "model")
    return folder


@pytest.fixture(scope="module")
def runs(run):
    """The records that the widgets show, by graph."""
    (found,) = gather(run).traces.values()
    return found


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def opened(browser, **options):
    """A fresh page that waits patiently."""
    page = browser.new_page(**{"viewport": {"width": 1300, "height": 900}, **options})
    page.set_default_timeout(PATIENCE)
    return page


@pytest.fixture(scope="module")
def page(browser, run):
    """A page with JupyterLab, in which a notebook shows all five widgets."""
    show = ["from gears_nb.attention.explore import what_to_explore\n\nshown = what_to_explore('.')", *[f"shown[{name!r}]" for name in NAMES]]
    write_notebook(run / "all.ipynb", [("code", source) for source in show])
    with lab(run) as address:
        page = opened(browser, viewport={"width": 1500, "height": 1000})
        page.beyond = watch_network(page, LOOPBACK)
        run_in_lab(page, address, "all.ipynb")
        for name in NAMES:
            page.wait_for_selector(f'.js-plotly-plot[data-gears-view="{name}"]')
        yield page
        page.close()


class Widget:
    """One widget on a page: its controls, its spots, its marks."""

    def __init__(self, page, view):
        self.page, self.view = page, view
        self.root = page.locator(".gears-explorer", has=page.locator(f'[data-gears-view="{view}"]')).first

    def kept(self, what):
        return self.root.evaluate(f"root => root.__gears.{what}")

    @property
    def marks(self):
        return self.kept("marks")

    @property
    def state(self):
        return self.kept("state")

    def control(self, key):
        return self.root.locator(f'[data-gears-control="{key}"]')

    def choose(self, key, value):
        self.control(key).select_option(value=json.dumps(value))

    def press(self, key, *strokes):
        """Keys on a focused control, as a reader without a mouse would."""
        self.control(key).focus()
        for stroke in strokes:
            self.page.keyboard.press(stroke)

    def pixel(self, x, y, panel="map"):
        return self.page.evaluate(PIXEL, [self.view, float(x), float(y), panel])

    def click(self, x, y, panel="map"):
        at = self.pixel(x, y, panel)
        self.page.mouse.move(at[0] - 3, at[1] - 3)
        self.page.mouse.move(*at)
        self.page.wait_for_timeout(100)
        self.page.mouse.click(*at)

    def until(self, **wanted):
        """Wait until the state holds all of `wanted`."""
        test = "([root, wanted]) => Object.entries(wanted).every(([k, v]) => JSON.stringify(root.__gears.state[k]) === JSON.stringify(v))"
        self.page.wait_for_function(test, arg=[self.root.element_handle(), wanted])


@pytest.fixture
def widget(page):
    return lambda view: Widget(page, view)


def in_kernel(page, code):
    return page.evaluate(IN_KERNEL, code)


def candidates(trace, query, term, recycle, head):
    """Value by candidate of a cell, itself left out, straight from the record."""
    mine = slice(trace.indptr[query], trace.indptr[query + 1])
    found = values(trace, term, recycle, head)[mine].astype(float)
    return {int(c): v for c, v in zip(trace.col[mine], found) if c != query}


def resolution(trace, term):
    """Half a step of the 256 in which terms travel, for a sum of terms the sum of theirs, for attention what that changes in its softmax at most."""
    parts = trace.terms.values() if term in ("attention", "total") else [trace.terms[term]]
    half = sum(float(max(p.max(), 0) - min(p.min(), 0)) for p in parts) / 255 / 2 + 1e-6
    return float(trace.attention.max()) * float(np.expm1(2 * half)) if term == "attention" else half


def agrees(marks, trace, query, term="attention", recycle=-1, head=None, top=10):
    """The marked edges are the strongest of the record, with its values."""
    true, atol = candidates(trace, query, term, recycle, head), resolution(trace, term)
    assert len(marks["cols"]) == len(set(marks["cols"])) == min(top, len(true))
    np.testing.assert_allclose(marks["values"], [true[c] for c in marks["cols"]], atol=atol, rtol=0)
    np.testing.assert_allclose(marks["values"], sorted(true.values(), reverse=True)[:top], atol=atol, rtol=0)


def places(trace):
    return gauge_fix(trace.truth.astype(float))


def test_attention_explorer(page, widget, runs):
    """Click a spot, move recycle and head, change the term, toggle H-gate and T-edge: the marks are the record's values, and the kernel knows."""
    seen, gate, edge = widget("attention"), runs["H-gate"], runs["T-edge"]
    agrees(seen.marks, gate, seen.state["query"])
    first = seen.marks
    spot = int(np.argmax(places(gate)[:, 0]))            # the rightmost: nothing lies on it
    assert spot != seen.state["query"]
    seen.click(*places(gate)[spot])
    seen.until(query=spot)
    agrees(seen.marks, gate, spot)
    assert seen.marks["cols"] != first["cols"]
    seen.press("recycle", "ArrowLeft")
    seen.until(recycle=gate.recycles - 2)
    agrees(seen.marks, gate, spot, recycle=gate.recycles - 2)
    seen.choose("head", 2)
    seen.until(head=2)
    agrees(seen.marks, gate, spot, recycle=gate.recycles - 2, head=2)
    for term in ("qk", "gate", "total"):
        seen.choose("term", term)
        seen.until(term=term)
        agrees(seen.marks, gate, spot, term, gate.recycles - 2, 2)
    seen.choose("term", "attention")
    seen.choose("graph", "T-edge")
    seen.until(graph="T-edge", term="attention")
    agrees(seen.marks, edge, spot, recycle=edge.recycles - 2, head=2)
    assert seen.marks["cols"] and "gate" not in seen.control("term").inner_text().splitlines()
    seen.choose("graph", "H-gate")
    seen.until(graph="H-gate")
    kernel = json.loads(in_kernel(page, "import json; print(json.dumps([shown['attention'].state, shown['attention'].marks()]))"))
    assert kernel[0] == seen.state and kernel[1]["cols"] == seen.marks["cols"]
    np.testing.assert_allclose(kernel[1]["values"], seen.marks["values"], rtol=1e-12)
    assert set(seen.marks["neighbours"]) == set(true_neighbours(places(gate), 10)[spot].tolist())


def test_attention_hover(page, widget, runs):
    """Hovering over a spot tells its name in the table, its number and value."""
    seen = widget("attention")
    spot = int(np.argmin(places(runs["H-gate"])[:, 0]))
    page.mouse.move(*seen.pixel(*places(runs["H-gate"])[spot]))
    page.wait_for_function("text => document.querySelector('[data-gears-view=attention] .hoverlayer')?.textContent.includes(text)", arg=f"{runs['H-gate'].about['cells'][spot]}cell {spot}")


def test_recycle_player(widget, runs):
    """Play runs to the last recycle; each one shows the step and the place of the record."""
    seen, gate = widget("recycles"), runs["H-gate"]
    step = step_size(gate)
    query = seen.state["query"]
    seen.press("recycle", "Home")
    seen.until(recycle=0)
    assert seen.marks["step"] is None and seen.marks["cols"] == []
    seen.control("play").click()
    seen.until(recycle=gate.recycles)
    assert seen.marks["step"] == pytest.approx(step[-1], abs=1e-6)
    agrees(seen.marks, gate, query, recycle=-1, top=5)
    shown = np.array(seen.marks["place"])
    seen.press("recycle", "ArrowLeft")
    seen.until(recycle=gate.recycles - 1)
    assert seen.marks["step"] == pytest.approx(step[-2], abs=1e-6)
    assert np.linalg.norm(np.array(seen.marks["place"]) - shown) > 0
    assert np.linalg.norm(shown) == pytest.approx(np.linalg.norm(gauge_fix(gate.x[-1].astype(float))[query]), abs=1e-5)


def kept_edges(trace, beta, k):
    """Edges of the gate's rule, written down once more: candidates by falling logit until 90 % of softmax(beta g) is held, at most k."""
    out = set()
    for i in range(trace.n):
        mine = slice(trace.indptr[i], trace.indptr[i + 1])
        pairs = sorted(((-float(g), int(c)) for g, c in zip(trace.gate[mine], trace.col[mine]) if c != i))
        weights = np.exp(beta * (np.array([-p[0] for p in pairs]) + pairs[0][0]))
        held = 0.0
        for (_, c), w in list(zip(pairs, weights))[:k]:
            if held >= 0.9 * weights.sum():
                break
            out.add((i, c))
            held += w
    return out


def test_gate_explorer(widget, runs):
    """Keys on the k and beta sliders: edges, precision and recall are those of the rule."""
    seen, gate = widget("gate"), runs["H-gate"]
    true = {(i, int(j)) for i, row in enumerate(true_neighbours(places(gate), 10)) for j in row}
    before = seen.marks["edges"]
    for key, strokes in (("k", ["ArrowLeft"] * 4), ("beta", ["ArrowRight"] * 3)):
        seen.press(key, *strokes)
        seen.page.wait_for_timeout(100)
        marks = seen.marks                                # state included; every look goes to the browser and back
        edges = kept_edges(gate, marks["beta"], marks["k"])
        assert marks["edges"] == len(edges)
        assert marks["precision"] == pytest.approx(len(edges & true) / len(edges))
        assert marks["recall"] == pytest.approx(len(edges & true) / len(true))
        assert set(marks["cols"]) == {c for i, c in edges if i == marks["query"]}
    assert marks["k"] == 6 and marks["edges"] < before


def test_reconstruction_explorer(page, widget, run):
    """A lasso around spots in one map lights the same spots in the other; the mean of the chosen gene is theirs."""
    table = ad.read_h5ad(run / "ST3.h5ad")
    seen, Y = widget("reconstruction"), gauge_fix(np.asarray(table.obsm["spatial"], float))
    seen.choose("colour", "confidence")
    seen.until(colour="confidence")
    low, high = np.quantile(Y, 0.1, axis=0), np.quantile(Y, 0.55, axis=0)
    corners = [seen.pixel(*c, "true") for c in ((low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1]), (low[0], low[1]))]
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*corner, steps=8)
    page.mouse.up()
    page.wait_for_function("root => root.__gears.state.selected.length > 0", arg=seen.root.element_handle())
    chosen = seen.marks["selected"]
    inside = np.flatnonzero(((Y > low + 1e-2) & (Y < high - 1e-2)).all(1))
    around = np.flatnonzero(((Y > low - 1e-2) & (Y < high + 1e-2)).all(1))
    assert len(inside) >= 10 and set(inside) <= set(chosen) <= set(around)
    assert seen.marks["mean"] == pytest.approx(table.obs["gears_confidence"].to_numpy()[chosen].mean(), rel=1e-5)
    lit = page.evaluate("""() => [...document.querySelectorAll('[data-gears-view=reconstruction]')].map(d => d.data.find(t => t.name === 'cells').selectedpoints)""")
    assert lit == [chosen, chosen]
    seen.control("clear").click()
    seen.until(selected=[])


def test_distortion_map(page, widget, run):
    """Hovering over the heat map lights both groups; the stretch is that of their distances."""
    table = ad.read_h5ad(run / "ST3.h5ad")
    X, Y = (gauge_fix(np.asarray(table.obsm[key], float)) for key in ("X_gears", "spatial"))
    seen = widget("distortion")
    for a, b in ((1, 4), (6, 2)):
        page.mouse.move(*seen.pixel(b, a, "heat"))
        seen.until(a=a, b=b)
        one, other = (np.array(cells) for cells in seen.marks["cells"])
        across = [np.linalg.norm(Z[one][:, None] - Z[other][None], axis=-1).sum() for Z in (X, Y)]
        assert seen.marks["stretch"] == pytest.approx(across[0] / across[1], rel=1e-5)
    colours = page.evaluate("() => document.querySelector('[data-gears-view=distortion][data-gears-panel=true]').data.find(t => t.name === 'cells').marker.color")
    assert len({colours[i] for i in one}) == 1 and colours[one[0]] != colours[other[0]]


def test_lab_asked_this_machine_only(page):
    assert page.beyond == []


def served(run, home, *more):
    """`gears explore` as a process whose temporary files lie in `home`: the process and the address it printed."""
    process = subprocess.Popen([GEARS, "explore", str(run), "--no-browser", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "TMPDIR": str(home), "OMP_NUM_THREADS": "1"})
    lines = []
    while not (lines and lines[-1].startswith("http")):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    return process, lines[-1].split()[0]


def test_explore_in_voila(run, runs, browser, tmp_path):
    """The real command: the page works, asks this machine only, and Ctrl-C leaves no process and no file."""
    process, address = served(run, tmp_path)
    try:
        page = opened(browser)
        beyond = watch_network(page, LOOPBACK)
        page.goto(address)
        for name in NAMES:
            page.wait_for_selector(f'.js-plotly-plot[data-gears-view="{name}"]')
        seen, gate = Widget(page, "attention"), runs["H-gate"]
        spot = int(np.argmin(places(gate)[:, 1]))
        seen.click(*places(gate)[spot])
        seen.until(query=spot)
        seen.press("recycle", "Home")
        seen.until(recycle=0)
        agrees(seen.marks, gate, spot, recycle=0)
        assert page.locator(".gears-explorer").count() == 5 and beyond == []
        page.close()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2                           # voila and a kernel
        token = address.partition("token=")[2]
        told = b" ".join(Path(f"/proc/{p.pid}/cmdline").read_bytes() for p in [psutil.Process(process.pid), *family])
        assert len(token) >= 16 and b"voila" in told and token.encode() not in told    # other users of the machine see command lines
        (folder,) = tmp_path.iterdir()
        holders = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink() and f.stat().st_size < 10**5 and token.encode() in f.read_bytes()]
        assert folder.stat().st_mode & 0o077 == 0 and [f.name for f in holders] and all(f.stat().st_mode & 0o077 == 0 for f in holders)
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)
    assert (process.returncode, said[1]) == (0, "")
    deadline = time.monotonic() + 5
    while alive := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_the_browser_is_led_by_a_private_file(run, browser, monkeypatch, tmp_path, capsys):
    """What is handed to the browser is a file that only its owner can read; it leads to the explorers."""
    import webbrowser

    from gears_nb.attention.explore import serve
    seen = {}

    def open_it(url):
        path = Path(url.removeprefix("file://"))
        seen.update(url=url, mode=path.stat().st_mode & 0o777, home=path.parent.stat().st_mode & 0o777)
        page = opened(browser)
        page.goto(url)
        page.wait_for_url("http://127.0.0.1:*/**")
        seen["landed"] = page.url
        page.close()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(webbrowser, "open", open_it)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    serve(run / "ST3.h5ad")
    assert "token" not in seen["url"] and (seen["mode"], seen["home"]) == (0o600, 0o700) and seen["landed"].startswith("http://127.0.0.1:")
    assert seen["landed"].split("?")[0] in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_explore_can_be_terminated(run, tmp_path):
    """kill ends it as Ctrl-C does; the port is the one that was asked for."""
    from gears_nb.attention.explore import free_port
    port = free_port()
    process, address = served(run / "ST3.h5ad", tmp_path, "--port", str(port))
    assert f":{port}/" in address
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 0 and list(tmp_path.iterdir()) == []
    assert family and not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The page that the command writes."""
    target = tmp_path_factory.mktemp("page") / "page.html"
    subprocess.run([GEARS, "explore", str(run), "--export", str(target)], check=True, capture_output=True)
    return target


def read_on(page):
    """Scroll through the page, as a reader does: the explorers below the maps are drawn when they come near."""
    page.wait_for_selector(".js-plotly-plot")
    for box in page.locator("[data-view]").all():
        box.scroll_into_view_if_needed()


def test_exported_page(exported, runs, browser):
    """One file, opened from disk: hover, sliders and query selection work, and nothing is asked for beyond the file."""
    page = opened(browser, offline=True)
    beyond, errors = watch_network(page), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(exported.as_uri())
    read_on(page)
    for name in EXPLORERS:
        page.wait_for_selector(f'.js-plotly-plot[data-gears-view="{name}"]')
    seen, gate = Widget(page, "attention"), runs["H-gate"]
    spot = int(np.argmax(places(gate)[:, 1]))
    seen.click(*places(gate)[spot])
    seen.until(query=spot)
    assert page.locator("[data-gears-view=attention] .hoverlayer").first.text_content().startswith(f"{gate.about['cells'][spot]}cell {spot}")
    seen.press("recycle", "Home")
    seen.choose("head", 1)
    seen.until(recycle=0, head=1)
    agrees(seen.marks, gate, spot, recycle=0, head=1)
    gated = Widget(page, "gate")
    gated.press("k", "Home", "ArrowRight")
    gated.until(k=2)
    assert gated.marks["edges"] == len(kept_edges(gate, gated.state["beta"], 2))
    assert (beyond, errors) == ([], [])
    page.close()


def test_dark_page(exported, browser):
    """Where the reader's system is dark, so is the page."""
    shades = []
    for scheme in ("light", "dark"):
        page = opened(browser, color_scheme=scheme)
        page.goto(exported.as_uri())
        read_on(page)
        page.wait_for_selector('.js-plotly-plot[data-gears-view="distortion"]')
        shades.append(page.evaluate("() => getComputedStyle(document.querySelector('.gears-explorer')).backgroundColor.match(/[0-9]+/g).map(Number)"))
        page.close()
    assert max(shades[1]) < 80 < 200 < min(shades[0])
