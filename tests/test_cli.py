"""Bad input: exit code 2, one line with file, field and remedy, nothing written. Good input: the whole road in smoke size."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from gears_nb.core.page import contents
from gears_nb.lab.results import load_results
from gears_nb.runs.cli import main

GEARS = str(Path(sys.executable).parent / "gears")
GENES = [f"Gene{i}" for i in range(90)]


def tissue(seed, n=100, genes=GENES, spatial=True, prefix="s"):
    """Counts (n, genes) whose first ten genes depend on the place."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 10, (n, 2))
    rate = np.full((n, len(genes)), 3.0)
    centres = rng.permutation(np.linspace(0, 10, 20)).reshape(10, 2)[: min(10, len(genes))]
    rate[:, : len(centres)] += 20 * np.exp(-((xy[:, None] - centres[None]) ** 2).sum(-1) / 8)
    table = ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=pd.DataFrame(index=[f"{prefix}{i}" for i in range(n)]),
                       var=pd.DataFrame(index=list(genes)))
    table.obsm["spatial" if spatial else "truth"] = xy
    return table


@pytest.fixture
def files(tmp_path):
    """Two good slides and good cells on disk; returns the folder."""
    for name, table in {"a": tissue(0), "b": tissue(1), "q": tissue(2, spatial=False, prefix="c")}.items():
        table.write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path


def changed(folder, name, change):
    """A copy of a good file with one thing made wrong, as `bad.h5ad`."""
    table = ad.read_h5ad(folder / f"{name}.h5ad")
    table = change(table) or table
    table.write_h5ad(folder / "bad.h5ad")
    return folder / "bad.h5ad"


def reconstruct(folder, slides=("a.h5ad", "b.h5ad"), cells="q.h5ad", out="r.h5ad", *more):
    return main(["reconstruct", "--slides", *[str(folder / s) for s in slides], "--cells", str(folder / cells), "--out", str(folder / out),
                 "--profile", "smoke", "--quiet", *more])


def refused(capsys, folder, call, *words):
    """The call ends with code 2, says one line that contains all words, and leaves the folder as it was."""
    before = sorted(p.name for p in folder.rglob("*"))
    code = call()
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert code == 2, said
    assert len(said) == 1, said
    for word in (*words, "Remedy: "):
        assert word in said[0], said[0]
    assert sorted(p.name for p in folder.rglob("*")) == before


def dense(table):
    table.X = table.X.toarray()


def poke(value):
    def change(table):
        dense(table)
        table.X[3, 4] = value
    return change


def no_place(table):
    del table.obsm["spatial"]


def fractions(table):
    dense(table)
    table.X = table.X / 3 + 0.1


def twice(axis):
    def change(table):
        names = getattr(table, f"{axis}_names").to_numpy().copy()
        names[1] = names[0]
        setattr(table, f"{axis}_names", names)
    return change


BAD_SLIDES = {
    "no coordinates": (no_place, "obsm['spatial']"), "nan": (poke(np.nan), "X"), "inf": (poke(np.inf), "X"), "negative": (poke(-1), "negative"),
    "not counts": (fractions, "counts"), "barcodes twice": (twice("obs"), "barcodes"), "genes twice": (twice("var"), "genes"),
    "few spots": (lambda t: t[:20].copy(), "at least 64 are needed"),
}


@pytest.mark.filterwarnings("ignore:.*names are not unique")
@pytest.mark.parametrize("fault", BAD_SLIDES)
def test_bad_slide(fault, files, capsys):
    change, word = BAD_SLIDES[fault]
    bad = changed(files, "b", change)
    refused(capsys, files, lambda: reconstruct(files, ("a.h5ad", "bad.h5ad")), bad.name, word)


@pytest.mark.filterwarnings("ignore:.*names are not unique")
@pytest.mark.parametrize("fault", ["nan", "negative", "not counts", "barcodes twice", "genes twice"])
def test_bad_cells(fault, files, capsys):
    change, word = BAD_SLIDES[fault]
    bad = changed(files, "q", change)
    refused(capsys, files, lambda: reconstruct(files, cells="bad.h5ad"), bad.name, word)


def test_missing_file(files, capsys):
    refused(capsys, files, lambda: reconstruct(files, ("a.h5ad", "nowhere.h5ad")), "nowhere.h5ad", "--slides")
    refused(capsys, files, lambda: reconstruct(files, cells="nowhere.h5ad"), "nowhere.h5ad", "--cells")


def test_not_an_h5ad(files, capsys):
    (files / "text.h5ad").write_text("gene,cell\n")
    refused(capsys, files, lambda: reconstruct(files, ("a.h5ad", "text.h5ad")), "text.h5ad")


def test_truncated_h5ad(files, capsys):
    whole = (files / "a.h5ad").read_bytes()
    (files / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    refused(capsys, files, lambda: reconstruct(files, ("cut.h5ad", "b.h5ad")), "cut.h5ad")


def test_too_few_shared_genes_shows_both_sides(files, capsys):
    tissue(2, genes=[*GENES[:20], *[f"Other{i}" for i in range(70)]], spatial=False).write_h5ad(files / "other.h5ad")
    refused(capsys, files, lambda: reconstruct(files, cells="other.h5ad"), "20", "Gene", "Other")


@pytest.mark.parametrize("out", ["a.h5ad", "r.csv", "a.h5ad/r.h5ad", "folder.h5ad"])
def test_unwritable_output(out, files, capsys):
    (files / "folder.h5ad").mkdir()
    refused(capsys, files, lambda: reconstruct(files, out=out), "--out")


def test_unwritable_report(files, capsys):
    refused(capsys, files, lambda: reconstruct(files, ("a.h5ad", "b.h5ad"), "q.h5ad", "r.h5ad", "--report", str(files / "q.h5ad" / "r.html")), "--report")


@pytest.mark.parametrize("more, words", [
    (["--profile", "tiny"], ["profile", "toy"]), (["--set", "structure.recycels=2"], ["structure.recycels", "structure.recycles"]),
    (["--set", "structure.recycles=two"], ["recycles", "int"]), (["--genes", "gene3"], ["--genes", "Gene3"]), (["--seed", "x"], ["--seed"]),
    (["--nonsense"], ["--nonsense"]),
])
def test_bad_settings(more, words, files, capsys):
    refused(capsys, files, lambda: reconstruct(files, ("a.h5ad", "b.h5ad"), "q.h5ad", "r.h5ad", *more), *words)


@pytest.mark.parametrize("more, words", [
    (["runs/demo", "-p", "sed=1"], ["sed", "perhaps seed was meant"]), (["runs/demo", "-p", "seed=one"], ["seed", "int"]),
    (["runs/demo", "-p", "seed"], ["name=value"]), (["runs/demoo"], ["runs/demo"]), (["runs/demo", "--profile", "huge"], ["profile", "smoke"]),
    (["runs/cli", "-p", "seed=1"], ["no parameters"]), (["encoder/h1_qc", "-p", "seed=-1"], ["seed", "whole number from 0"]), (["structure/stability", "-p", "seeds=-1"], ["seeds", "whole number from 0"]),
])
def test_bad_notebook_parameter(more, words, tmp_path, capsys):
    refused(capsys, tmp_path, lambda: main(["run", *more]), *words)


def test_out_is_read_from_where_the_caller_stands(tmp_path, monkeypatch):
    """A notebook runs in its own folder; a relative `out` must not end up there."""
    from gears_nb.lab.runner import check_parameters, find
    monkeypatch.chdir(tmp_path)
    assert check_parameters(find("structure/recipe"), {"out": "here"})["out"] == str(tmp_path / "here")
    assert check_parameters(find("structure/recipe"), {"out": ""})["out"] == ""


@pytest.mark.parametrize("more, words", [((), "one of the slides"), (("--cells", "T", "--timeout", "0"), "--timeout"), (("--cells", "T", "--model-kind", "nonsense"), "unknown model")])
def test_benchmark_refuses(more, words, files, capsys):
    """A query that every method has seen, no time, a model that does not exist."""
    tissue(2, prefix="c").write_h5ad(files / "t.h5ad")
    given = ["benchmark", "--slides", str(files / "a.h5ad"), str(files / "b.h5ad"), "--cells", str(files / "a.h5ad"), "--methods", "knn5", "--out", str(files / "t.csv"), "--profile", "smoke",
             *(str(files / "t.h5ad") if word == "T" else word for word in more)]
    assert main(given) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told and not (files / "t.csv").exists()


def test_evaluate_matches_barcodes(files, capsys):
    truth, order = ad.read_h5ad(files / "a.h5ad"), np.random.default_rng(0).permutation(100)
    placed = truth[order].copy()
    placed.obsm["X_gears"] = -3 * placed.obsm["spatial"][:, ::-1] + 1
    placed.write_h5ad(files / "p.h5ad")
    assert main(["evaluate", str(files / "p.h5ad"), str(files / "a.h5ad"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["spearman"] == pytest.approx(1) and scores["stress1"] == pytest.approx(0, abs=1e-6) and scores["cells"] == 100
    assert main(["evaluate", str(files / "p.h5ad"), str(files / "a.h5ad")]) == 0
    assert "spearman" in capsys.readouterr().out


def test_evaluate_takes_one_section_of_the_truth(files, capsys):
    two = ad.concat([ad.read_h5ad(files / "a.h5ad"), ad.read_h5ad(files / "b.h5ad")], keys=["one", "two"], index_unique="-", label="slide")
    two.write_h5ad(files / "two.h5ad")
    one = two[two.obs["slide"] == "one"].copy()
    one.write_h5ad(files / "one.h5ad")
    assert main(["evaluate", str(files / "one.h5ad"), f"{files / 'two.h5ad'}#one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unmatched"] == 0
    refused(capsys, files, lambda: main(["evaluate", str(files / "one.h5ad"), f"{files / 'two.h5ad'}#three"]), "two.h5ad")


def test_evaluate_refuses(files, capsys):
    refused(capsys, files, lambda: main(["evaluate", str(files / "q.h5ad"), str(files / "a.h5ad")]), "q.h5ad", "barcodes")
    refused(capsys, files, lambda: main(["evaluate", str(files / "none.h5ad"), str(files / "a.h5ad")]), "none.h5ad")
    bad = changed(files, "a", no_place)
    refused(capsys, files, lambda: main(["evaluate", str(files / "a.h5ad"), str(bad)]), "bad.h5ad", "obsm['spatial']")


def test_the_whole_road(files, capsys):
    """Empty cells and constant genes are counted and kept as NaN; fewer genes are fine when allowed; a kept model is used again."""
    cells = tissue(2, genes=[*GENES[:40], *[f"Other{i}" for i in range(10)]], spatial=False, prefix="c")
    dense(cells)
    cells.X[7] = 0
    cells.X[:, 39] = 2
    cells.X[7, 39] = 0
    cells.write_h5ad(files / "q2.h5ad")
    more = ["--min-genes", "30", "--report", str(files / "r.html"), "--model-dir", str(files / "model"), "--genes", "Gene3"]
    assert reconstruct(files, ("a.h5ad", "b.h5ad"), "q2.h5ad", "r.h5ad", *more) == 0
    told = capsys.readouterr()
    assert "99 of 100 cells placed" in told.out
    assert "1 all-zero cells" in told.err and "constant gene" in told.err
    placed = ad.read_h5ad(files / "r.h5ad")
    assert list(placed.obs_names) == list(cells.obs_names)
    X = placed.obsm["X_gears"]
    assert np.isnan(X[7]).all() and np.isfinite(np.delete(X, 7, axis=0)).all() and X.shape == (100, 2)
    assert placed.obsp["gears_distances"].shape == (100, 100) and sp.issparse(placed.obsp["gears_distances"])
    assert {"config", "gene_matching", "graph", "stitching", "solve", "warnings", "dropped"} <= set(placed.uns["gears"])
    assert "gene Gene3" in [c["name"] for c in contents((files / "r.html").read_text())["data"]["tissues"][0]["colours"]]
    assert not [p for p in files.rglob("*") if ".tmp" in p.name]
    # the same command again: the kept model, the same numbers
    assert reconstruct(files, ("a.h5ad", "b.h5ad"), "q2.h5ad", "again.h5ad", *more) == 0
    np.testing.assert_array_equal(ad.read_h5ad(files / "again.h5ad").obsm["X_gears"], X)
    capsys.readouterr()
    # another seed wants another model
    refused(capsys, files, lambda: reconstruct(files, ("a.h5ad", "b.h5ad"), "q2.h5ad", "third.h5ad", *more, "--seed", "1"), "--model-dir", "settings")


def test_explore_refuses(files, capsys):
    """No reconstruction, no model where one is named, a port in use, a page that cannot be one."""
    import socket
    explore = lambda *argv: lambda: main(["explore", *map(str, argv), "--no-browser"])
    refused(capsys, files, explore(files / "none.h5ad"), "none.h5ad", "RUN_OR_H5AD")
    refused(capsys, files, explore(files / "a.h5ad"), "a.h5ad", "X_gears")
    refused(capsys, files, explore(files), str(files), "holds no reconstruction")
    (files / "notes.txt").write_text("no table")
    refused(capsys, files, explore(files / "notes.txt"), "notes.txt", ".h5ad")
    placed = ad.read_h5ad(files / "q.h5ad")
    placed.obsm["X_gears"] = placed.obsm["truth"]
    for i in range(5):
        placed.write_h5ad(files / f"placed{i}.h5ad")
    refused(capsys, files, explore(files), "5 reconstructions", "placed0.h5ad")
    one = files / "placed0.h5ad"
    refused(capsys, files, explore(one, "--model-dir", files), "--model-dir", "no saved model")
    refused(capsys, files, explore(one, "--export", "page.pdf"), "page.pdf", "--export", ".html")
    refused(capsys, files, explore(one, "--export", files), str(files), "--export")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(capsys, files, explore(one, "--port", taken.getsockname()[1]), "--port", "in use")


def test_explore_exports(files, capsys):
    """A reconstruction without its model is shown without attention, which is said; the page is whole or not there."""
    placed = ad.read_h5ad(files / "q.h5ad")
    placed.obsm["X_gears"] = placed.obsm["truth"]
    placed.write_h5ad(files / "placed.h5ad")
    assert main(["explore", str(files / "placed.h5ad"), "--export", str(files / "page.html")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "attention is not shown" in told[0] and told[1].endswith("page.html: reconstruction")
    text = (files / "page.html").read_text(encoding="utf-8")
    assert text.lower().startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert not [p for p in files.rglob("*") if ".tmp" in p.name]


def test_list_and_results(capsys):
    assert main(["list"]) == 0
    assert "The command line" in capsys.readouterr().out
    assert main(["results"]) == 0
    lines = capsys.readouterr().out
    named = [line.split()[0] for line in lines.splitlines() if line.startswith(" ") and "/" in line.split(" ")[1]]
    assert sorted(named) == sorted(load_results()), "each has one row of the table"
    assert main(["results", "first_light"]) == 0
    assert "smoothed_knn20" in capsys.readouterr().out
    assert main(["results", "first_lihgt"]) == 2
    assert "did you mean first_light?" in capsys.readouterr().err


def test_a_notebook_that_refuses_its_input_is_bad_input(tmp_path, capsys):
    """The name of a data set is checked inside the notebook, in another process: code 2 nevertheless, 1 for all other failures."""
    assert main(["run", "reconstruct/poison", "--profile", "smoke", "-p", "data=no_such_set", "-p", f"out={tmp_path}"]) == 2
    assert "InputError" in (said := capsys.readouterr().err) and "no_such_set" in said and ".." not in said


def test_help_is_light_and_fast():
    """No heavy package is imported for help, list or an early refusal; as a process it takes less than a second."""
    heavy = "{'torch', 'scanpy', 'anndata', 'papermill', 'plotly', 'ot', 'umap', 'pandas', 'sklearn', 'matplotlib', 'lightning_fabric'}"
    for argv in (["--help"], ["list"], ["reconstruct", "--slides", "x.h5ad", "--cells", "y.h5ad", "--out", "z.h5ad"], ["explore", "x.h5ad"], ["explore", "--help"], ["perturb", "fit", "--help"]):
        code = f"import sys; from gears_nb.runs.cli import main\ntry: main({argv!r})\nexcept SystemExit: pass\nprint({heavy} & set(sys.modules), file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "set()", (argv, done.stderr)
    shown = subprocess.run([GEARS, "--help"], capture_output=True, text=True, timeout=20, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert shown.returncode == 0 and "examples" in shown.stdout


def test_as_a_process(files):
    """Exit code and stderr as a shell sees them."""
    done = subprocess.run([GEARS, "reconstruct", "--slides", "a.h5ad", "nowhere.h5ad", "--cells", "q.h5ad", "--out", "r.h5ad"],
                          capture_output=True, text=True, cwd=files)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nowhere.h5ad: --slides: there is no such file or folder. Remedy: check the spelling and the working directory.\n"


def test_a_crash_is_one_line_and_code_1(monkeypatch, capsys):
    from gears_nb.runs import cli
    monkeypatch.setitem(cli._COMMANDS, "list", lambda args: {}["gone"])
    monkeypatch.delenv("GEARS_DEBUG", raising=False)
    assert main(["list"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_reached_limit_of_iterations_is_not_told(monkeypatch, capsys):
    """The limit is a budget of ours; a warning of any other kind is still shown."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    def warn(args):
        warnings.warn("lbfgs failed to converge", ConvergenceWarning, stacklevel=2)
        warnings.warn("something else", RuntimeWarning, stacklevel=2)
        return 0

    monkeypatch.setitem(sys.modules["gears_nb.runs.cli"]._COMMANDS, "list", warn)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` replaces it; put back after the test
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["list"]) == 0
    told = capsys.readouterr().err
    assert "something else" in told and "lbfgs" not in told


def test_interrupt(monkeypatch, capsys):
    from gears_nb.runs import cli

    def stop(args):
        raise KeyboardInterrupt
    monkeypatch.setitem(cli._COMMANDS, "demo", stop)
    assert main(["demo"]) == 130
    assert "same command continues" in capsys.readouterr().err


def test_killed_training_continues_with_the_same_numbers(files, tmp_path_factory, monkeypatch, capsys):
    """kill -9 in the middle of training; the same command continues from a checkpoint, with the same coordinates.

    Only what is killed needs a process of its own; the run without a fault and the one that continues are this process.
    """
    monkeypatch.chdir(files)
    command = ["reconstruct", "--slides", "a.h5ad", "b.h5ad", "--cells", "q.h5ad", "--profile", "smoke", "--quiet",
               "--set", "structure.guess_epochs=40", "--out"]

    def run(out, cache):
        monkeypatch.setenv("GEARS_CACHE", str(cache))
        assert main([*command, out]) == 0
        assert capsys.readouterr().out.startswith("100 of 100")

    run("whole.h5ad", tmp_path_factory.mktemp("a"))
    cache = tmp_path_factory.mktemp("b")
    env = {**os.environ, "GEARS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([GEARS, *command, "killed.h5ad"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(cache.rglob("guess*.json")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9 and list(cache.rglob("guess*.json")), "training was over before it could be killed"
    assert not (files / "killed.h5ad").exists()
    run("killed.h5ad", cache)
    one, other = (ad.read_h5ad(files / f"{n}.h5ad") for n in ("whole", "killed"))
    np.testing.assert_array_equal(one.obsm["X_gears"], other.obsm["X_gears"])
    np.testing.assert_array_equal(one.obs["gears_confidence"], other.obs["gears_confidence"])


def test_run_executes_a_notebook_elsewhere(tmp_path):
    """An experiment runs with its parameters, and leaves nothing below nbs/ (its export cells would take over a module)."""
    from gears_nb.core.machine import repo_root
    from gears_nb.lab.runner import run
    before = sorted(p for p in (repo_root() / "nbs").rglob("*") if ".ipynb_checkpoints" not in p.parts)
    copy = run("encoder/h1_qc", "smoke", {"seed": 1}, out=tmp_path)
    text = copy.read_text(encoding="utf-8")
    assert copy.parent == tmp_path and [p.name for p in tmp_path.iterdir()] == [copy.name]
    assert "injected-parameters" in text and "seed = 1" in text
    assert sorted(p for p in (repo_root() / "nbs").rglob("*") if ".ipynb_checkpoints" not in p.parts) == before
