"""Published tools run in a process of their own, see no place of the query, and never take a table down."""
import json
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from forks import command, forked

from gears_nb.benchmark import adapters, own, peers
from gears_nb.benchmark.peers import PEERS, Peer, PeerFailed, ask, install_peer, peer_row, peer_rows, pooled, read_pins
from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.runs.cli import main

PROLOGUE = """
import json, os, sys, time
import anndata, numpy as np
job = json.load(open("job.json"))
reference, query = anndata.read_h5ad("reference.h5ad"), anndata.read_h5ad("query.h5ad")
assert not list(query.obsm) and not list(query.obs.columns) and not list(query.uns) and not list(query.layers), "a place of the query got out"
assert not os.environ.get("PYTHONPATH") and all(name[0] == "c" and name[1:].isdigit() for name in query.obs_names), "a place in a name"
n, m = query.n_obs, reference.n_obs
cost = dict(seconds=1.0, process_seconds=2.0, wall_seconds=1.5, peak_mb=64.0)
places = reference.obsm["spatial"][np.arange(n) % m]
"""
BODIES = {
    "good": "np.savez('answer.npz', positions=places + job['seed'], **cost)",
    "weights": "np.savez('answer.npz', positions=places, variance=np.full(n, 4.0), index=np.tile([1, 0], (n, 1)), weight=np.tile([.75, .25], (n, 1)), **cost)",
    "crash": "print('noise', file=sys.stderr); raise ValueError('the plan is\\nnot finite')",
    "mute": "sys.exit(3)", "killed": "os.kill(os.getpid(), 9)", "slow": "time.sleep(60)", "busy": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (int(job['cpu_limit']) + 2, -1)) or [None for _ in iter(int, 1)]", "silent": "pass",
    "shape": "np.savez('answer.npz', positions=places[:-1], **cost)", "text": "open('answer.npz', 'w').write('no archive')",
    "objects": "np.savez('answer.npz', positions=np.array([{}] * n), **cost)", "nan": "np.savez('answer.npz', positions=places * np.nan, **cost)",
    "keys": "np.savez('answer.npz', places=places)",
    "far": "np.savez('answer.npz', positions=places, variance=np.zeros(n), index=np.full((n, 1), m), weight=np.ones((n, 1)), **cost)",
    "hungry": "import resource; resource.setrlimit(resource.RLIMIT_DATA, (int(job['memory_gb'] * 2**30),) * 2); np.ones(2**29)",
}


@pytest.fixture(scope="module")
def tissue():
    """Two reference sections and a query whose every corner holds its places."""
    made = simulate("tiny", 0)
    query = made.slides[2].copy()
    query.obs["x"] = query.obsm["spatial"][:, 0]
    query.uns["spatial"], query.layers["place"] = {"x": 1}, query.X.copy()
    query.obs_names = [f"{x:.1f}x{y:.1f}" for x, y in query.obsm["spatial"]]
    return made.slides[:2], query


@pytest.fixture(scope="module")
def question(tissue):
    return pooled(*tissue)


@pytest.fixture
def fake(tmp_path):
    """A tool of one line, run by this interpreter."""
    def make(name):
        script = tmp_path / f"{name}.py"
        script.write_text(PROLOGUE + BODIES[name])
        return Peer(name, name, "", (f"{name}==1",), script, sys.executable)
    return make


def test_places_come_back(fake, question):
    run = ask(fake("good"), question, seed=2)
    n = question.query.shape[0]
    assert np.allclose(run.X, question.coords[np.arange(n) % len(question.coords)] + 2)
    assert (run.seconds, run.process_seconds, run.wall_seconds, run.peak_rss_mb) == (1, 2, 1.5, 64) and run.weights is None
    assert run.distances(np.array([0]), np.array([1])) == pytest.approx(np.linalg.norm(run.X[0] - run.X[1]))


def test_cells_without_truth_are_placed_and_not_scored(fake, question, tissue):
    truth = tissue[1].obsm["spatial"].astype(float)
    truth[:30] = np.nan
    row = peer_row(fake("good"), question, truth, protocol="sim", dataset="tiny")
    assert row["n_scored"] == len(truth) - 30 and np.isfinite(row["spearman"])


def test_weights_come_back(fake, question):
    run = ask(fake("weights"), question)
    assert run.weights.shape == (question.query.shape[0], question.reference.shape[0])
    assert np.allclose(run.weights[3, [0, 1]].toarray(), [[0.25, 0.75]])
    pair = np.array([0, 2]), np.array([1, 2])
    assert np.allclose(run.distances(*pair), [np.sqrt(np.square(run.X[0] - run.X[1]).sum() + 8), 0])


REASONS = {"crash": "not finite", "mute": "exit code 3", "killed": "SIGKILL", "silent": "without an answer", "shape": "shape", "text": "cannot be read",
           "objects": "cannot be read", "nan": "placed 0 of", "keys": "cannot be read", "far": "spots that are not there"}


@pytest.mark.parametrize("name", REASONS)
def test_a_failure_is_a_row(name, fake, question, tissue):
    row = peer_row(fake(name), question, tissue[1].obsm["spatial"], protocol="sim", dataset="tiny", seed=1)
    assert set(row) == {"protocol", "dataset", "method", "version", "seed", "failed"}
    assert REASONS[name] in row["failed"] and "\n" not in row["failed"] and row["method"] == name


def test_memory_limit_is_a_row(fake, question, tissue):
    row = peer_row(fake("hungry"), question, tissue[1].obsm["spatial"], protocol="sim", dataset="tiny", memory_gb=2.0)
    assert "Unable to allocate" in row["failed"]


def test_memory_of_a_tool_is_its_own():
    held = np.ones(2**27)  # a gigabyte that the process which asks holds
    told = subprocess.run([sys.executable, "-c", "from gears_nb.benchmark.adapters import peak_mb; print(peak_mb())"], capture_output=True, text=True, check=True)
    assert held.nbytes == 2**30 and 5 < float(told.stdout) < (800 if sys.platform == "linux" else 2000)


def test_limit_of_cpu_seconds_is_a_row(fake, question, tissue):
    row = peer_row(fake("busy"), question, tissue[1].obsm["spatial"], protocol="sim", dataset="tiny", cpu_limit=1)
    assert row["failed"] == "stopped after 1 CPU seconds"


def test_weights_give_a_row_of_distances(fake, question, tissue):
    truth = tissue[1].obsm["spatial"].astype(float)
    truth[:30] = np.nan
    about = dict(protocol="sim", dataset="tiny", seed=1)
    places, apart = peer_rows(fake("weights"), question, truth, **about)
    assert apart["method"] == "weights:distances" and apart["n_scored"] == places["n_scored"] and "trust20" not in apart
    assert apart["spearman"] == pytest.approx(places["spearman"], abs=1e-3) and apart["stress1"] != pytest.approx(places["stress1"], abs=1e-3)
    assert [row["method"] for row in peer_rows(fake("good"), question, truth, **about)] == ["good"]
    assert ["failed" in row for row in peer_rows(fake("mute"), question, truth, **about)] == [True]


def test_time_limit_ends_the_process(fake, question):
    start = time.perf_counter()
    with pytest.raises(PeerFailed, match="stopped after 1 s"):
        ask(fake("slow"), question, timeout=1)
    assert time.perf_counter() - start < 20


def test_not_installed_is_a_row(question, tissue, tmp_path, monkeypatch):
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    row = peer_row(PEERS["moscot"], question, tissue[1].obsm["spatial"], protocol="sim", dataset="tiny")
    assert row["failed"] == "not installed: gears peers install moscot"


def test_the_inputs_are_not_touched(tissue):
    reference, query = tissue
    before = query.obsm["spatial"].copy(), reference[0].X.copy()
    asked = pooled(reference, query)
    assert np.array_equal(query.obsm["spatial"], before[0]) and (reference[0].X != before[1]).nnz == 0
    assert asked.reference.shape[0] == len(asked.coords) and asked.counts


def test_adapter_refuses_places(tmp_path, question):
    peers.write_question(question, tmp_path, "moscot", 0)
    query = ad.read_h5ad(tmp_path / "query.h5ad")
    query.obsm["spatial"] = np.zeros((query.n_obs, 2))
    query.write_h5ad(tmp_path / "query.h5ad")
    with pytest.raises(AssertionError, match="expression only"):
        adapters.run(tmp_path)


def test_pins_are_complete():
    """Every tool has an adapter, an exact version of everything pinned, and the same table format as ours."""
    assert list(PEERS) == list(adapters.TOOLS)
    first = {"novosparc": "novosparc==0.4.4", "moscot": "moscot==0.5.2", "tangram": "tangram-sc==1.0.4", "celery": "CeLEryPy==1.2.1"}
    for name, peer in PEERS.items():
        names = [pin.partition("==")[0] for pin in peer.pins]
        assert peer.pins[0] == first[name] and len(set(names)) == len(names) and peer.title and peer.paper
        assert {"numpy", "scipy", "anndata"} <= set(names) and all(pin.partition("==")[2] for pin in peer.pins)
    assert all("torch==2.13.0" in PEERS[name].pins for name in ("tangram", "celery"))
    assert len({peer.home for peer in PEERS.values()}) == len(PEERS)


def test_pins_without_a_version_are_refused(tmp_path):
    (tmp_path / "p.ini").write_text("[tool]\npins =\n    tool\n")
    with pytest.raises(InputError, match="without a version"):
        read_pins(tmp_path / "p.ini")
    assert read_pins(Path(peers.__file__).with_name("peers.ini")) == PEERS


def test_other_pins_are_another_environment():
    from dataclasses import replace
    peer = PEERS["moscot"]
    assert replace(peer, pins=(*peer.pins, "x==1")).home != peer.home


def test_unknown_tool_and_failed_installation(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="did you mean novosparc"):
        install_peer("novospark")
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    monkeypatch.setattr(peers, "_must", lambda what, *command: (_ for _ in ()).throw(PeerFailed(f"{what}: no space left")))
    with pytest.raises(PeerFailed, match="no space left"):
        install_peer("moscot")
    assert not PEERS["moscot"].installed


def test_methods_by_name():
    assert own.method_names([" gears", "knn5", "gears"]) == ["gears", "knn5"]
    for names, word in ((["smoothed_knn"], "did you mean smoothed_knn20"), ([""], "none is named")):
        with pytest.raises(InputError, match=word):
            own.method_names(names)
    own.method_names(own.DEFAULT)


def test_truth_must_be_there(tissue):
    query = tissue[1].copy()
    places = own.true_places(query)
    assert np.isfinite(places).all()
    query.obsm["spatial"][:5] = np.nan
    assert np.isnan(own.true_places(query)[:5]).all()
    query.obsm["spatial"][15:] = np.nan
    with pytest.raises(InputError, match="10 usable places"):
        own.true_places(query)
    with pytest.raises(InputError, match="2 of them"):
        own.true_places(ad.concat([tissue[1], tissue[1]], label="sample", index_unique="-"), slide_key="sample")


def test_tables_hold_failures(tmp_path):
    rows = [{"dataset": "q", "protocol": "own", "method": "lost", "seed": 0, "version": "1", "failed": "no <reason>"}]
    assert "no <reason>" in own.text_table(rows) and "no &lt;reason&gt;" in own.report_page(rows, "t", "a")
    assert pd.read_csv(own.write_rows(rows, tmp_path / "t.csv")).failed[0] == "no <reason>"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two slides and a query with known places, on disk."""
    folder = tmp_path_factory.mktemp("own")
    made = simulate("tiny", 0)
    for name, table in zip("abq", made.slides):
        table.write_h5ad(folder / f"{name}.h5ad")
    blind = made.slides[2].copy()
    del blind.obsm["spatial"]
    blind.write_h5ad(folder / "blind.h5ad")
    return folder


def shell(folder, monkeypatch, *more, cells="q.h5ad"):
    """`gears benchmark` as a process of its own."""
    monkeypatch.setenv("GEARS_CACHE", str(folder / "cache"))
    return command("benchmark", "--slides", "a.h5ad", "b.h5ad", "--cells", cells, "--profile", "smoke", "--quiet", *more, folder=folder)


@forked
def test_benchmark_from_a_shell(files, monkeypatch):
    done = shell(files, monkeypatch, "--methods", "gears,h_knn20,knn5,random,tangram", "--out", "t.csv", "--report", "t.html")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(files / "t.csv").set_index("method")
    assert set(table.index) == {"gears", "h_knn20", "knn5", "random", "tangram"} and table.loc["tangram", "failed"].endswith("gears peers install tangram")
    assert table.loc["gears", "spearman"] > table.loc["random", "spearman"] + 0.3 and table.loc["h_knn20", "spearman"] > 0.3
    assert "gears peers install tangram" in done.stdout and "mean rank" in (files / "t.html").read_text()


def here(folder, monkeypatch, *more, cells="q.h5ad"):
    """`gears benchmark` in this process: its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GEARS_CACHE", str(folder / "cache"))
    return main(["benchmark", "--slides", "a.h5ad", "b.h5ad", "--cells", cells, "--profile", "smoke", "--quiet", *more])


@forked
def test_benchmark_is_repeatable(files, monkeypatch):
    """Also in another process."""
    asked = ("--methods", "knn5,extratrees", "--seed", "3", "--out")
    assert shell(files, monkeypatch, *asked, "x.json").returncode == here(files, monkeypatch, *asked, "y.json") == 0
    rows = [[{k: v for k, v in row.items() if k not in ("seconds", "peak_rss_mb")} for row in json.loads((files / name).read_text())["rows"]] for name in ("x.json", "y.json")]
    assert rows[0] == rows[1] and rows[0][0]["seed"] == 3


BAD = {"no truth": (["--out", "n.csv"], "blind.h5ad", "obsm['spatial']"), "unknown method": (["--methods", "knn6", "--out", "n.csv"], "q.h5ad", "did you mean knn"),
       "no table": (["--out", "n.txt"], "q.h5ad", ".csv"), "absent": (["--out", "n.csv"], "gone.h5ad", "gone.h5ad")}


@pytest.mark.parametrize("fault", BAD)
def test_bad_benchmark(fault, files, monkeypatch, capsys):
    more, cells, word = BAD[fault]
    capsys.readouterr()
    code, told = here(files, monkeypatch, *more, cells=cells), capsys.readouterr().err
    said = [line for line in told.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(said) == 1 and word in said[0] and "Remedy: " in said[0], told
    assert not (files / "n.csv").exists() and not (files / "n.txt").exists()


def test_peers_from_a_shell(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    assert main(["peers", "list"]) == 0
    said = capsys.readouterr().out
    assert said.count("not installed") == len(PEERS) == len(said.splitlines())
    for argv, word in ((["peers", "install"], "name one of"), (["peers", "install", "moscott"], "did you mean moscot"), (["peers"], "--help")):
        assert main(argv) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("name", PEERS)
def test_real_tool(name, tissue, question):
    """The tool itself, where it is installed."""
    if not PEERS[name].installed:
        pytest.skip(f"gears peers install {name}")
    run = ask(PEERS[name], question, timeout=600)
    assert np.isfinite(run.X).all() and run.peak_rss_mb > 50 and run.seconds > 0
    from gears_nb.geometry.metrics import score
    assert score(run.X, tissue[1].obsm["spatial"])["spearman"] > 0.1
    if name != "celery":
        assert run.weights.sum(1).max() < 1.001 and (run.variance >= 0).all()
