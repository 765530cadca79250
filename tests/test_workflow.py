"""`gears workflow`: what it writes and refuses, and that Snakemake runs it, goes on after a kill, and finds what one process finds."""
import argparse
import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from gears_nb.core.errors import InputError
from gears_nb.lab import runner
from gears_nb.runs import workflow

pytest.importorskip("snakemake")
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
ODD = "it's {a} \"b\" $c"
PAGE = [("markdown", "# A walk\n> As far as its seed goes"),
        ("parameters", 'profile = "toy"\nseed = 0\nlabel = ""\nout = ""'),
        ("code", """import random
from gears_nb.lab.experiment import Experiment
e = Experiment("toys", "walk", params={"profile": profile, "seed": seed, "label": label}, seed=seed, root=out or None)
steps = random.Random(seed)
far = sum(steps.gauss(0, 1) for _ in range(1000))
e.path("walk.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text>{far}</text></svg>')
e.write({"far": far});""")]


def command(*arguments):
    """`gears workflow` in this process."""
    parser = argparse.ArgumentParser()
    workflow.workflow_arguments(parser)
    return workflow.workflow_command(parser.parse_args(list(map(str, arguments))))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A repository with one experiment of a tenth of a second."""
    root = tmp_path_factory.mktemp("toys")
    cells = [{"cell_type": "markdown" if kind == "markdown" else "code", "id": f"c{i}", "metadata": {"tags": [kind]} if kind == "parameters" else {}, "source": text,
              **({} if kind == "markdown" else {"outputs": [], "execution_count": None})} for i, (kind, text) in enumerate(PAGE)]
    (root / "nbs/toys").mkdir(parents=True)
    (root / "settings.ini").touch()
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    (root / "nbs/toys/01_walk.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    # the real command, told to take that repository for its own
    (root / "gears.py").write_text("import sys\nfrom pathlib import Path\nimport gears_nb.lab.runner as runner\n"
                                   "runner.repo_root = lambda: Path(__file__).parent\nfrom gears_nb.runs.cli import main\nsys.exit(main())\n")
    return root


@pytest.fixture
def walks(toys, tmp_path, monkeypatch):
    """A workflow of four walks, a table, and the goal `all`: six jobs by Snakemake's count. They go to that repository."""
    monkeypatch.setattr(runner, "repo_root", lambda: toys)
    monkeypatch.setattr(workflow, "program", lambda name: f"{sys.executable} {toys / 'gears.py'}" if name == "gears" else sys.executable)
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "my walks"
    command("walk", "--profile", "smoke", "-p", f"label={ODD}", "--seeds", 0, 1, 2, 3, "--out", out)
    return out


def snakemake(folder, *arguments):
    done = subprocess.run([*SNAKEMAKE, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(folder):
    return {path.parent.name: path for path in folder.glob("results/toys/*/results.json")}


def test_six_jobs_killed_and_resumed_are_those_of_one_process(walks, toys, tmp_path):
    plan = snakemake(walks, "-n")
    for count in ("experiment 4", "table 1", "all 1", "total 6"):
        assert any(line.split() == count.split() for line in plan.splitlines()), plan
    with open(tmp_path / "first.log", "w") as log:  # not a pipe, which would fill
        first = subprocess.Popen([*SNAKEMAKE, "--cores", "2", "--nolock"], cwd=walks, stdout=log, stderr=log, start_new_session=True)
    finished = lambda: (tmp_path / "first.log").read_text().count("Finished job")
    end = time.monotonic() + 150
    while not finished() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {name: path.stat().st_mtime_ns for name, path in results(walks).items()}
    assert 1 <= finished() < 4, (tmp_path / "first.log").read_text()

    again = snakemake(walks, "--cores", "2")
    made = {name: path.stat().st_mtime_ns for name, path in results(walks).items()}
    kept = [name for name in made if before.get(name) == made[name]]
    assert len(made) == 4 and len(kept) >= 1
    assert again.count("rule experiment:") == 4 - len(kept) and again.count("rule table:") == 1  # only what was missing

    lines = {line["job"]: line for line in csv.DictReader((walks / "table.csv").open())}
    records = {name: json.loads(path.read_text()) for name, path in results(walks).items()}
    assert {record["seed"] for record in records.values()} == set(range(4)) and {record["params"]["label"] for record in records.values()} == {ODD}
    for name, record in records.items():
        steps = random.Random(record["seed"])
        assert record["metrics"]["far"] == float(lines[name]["far"]) == sum(steps.gauss(0, 1) for _ in range(1000))
        assert (walks / f"results/toys/{name}/notebook.ipynb").is_file()
    name = next(name for name in made if name not in kept)
    runner.run("walk", "smoke", {"seed": records[name]["seed"], "label": ODD, "out": str(tmp_path / "alone")}, root=toys, out=tmp_path)
    alone = json.loads((tmp_path / "alone/toys/walk/results.json").read_text())
    same = lambda record: {key: value for key, value in record.items() if key not in ("seconds", "date")}
    assert same(records[name]) == same(alone)
    assert (walks / f"results/toys/{name}/figures/walk.svg").read_bytes() == (tmp_path / "alone/toys/walk/walk.svg").read_bytes()


# what is refused ------------------------------------------------------------------------------------------------------

def refused(out, *arguments, says):
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(InputError) as told:
        command(*arguments, "--out", out)
    for word in (says, "Remedy: "):
        assert word in str(told.value) and "\n" not in str(told.value)
    assert (sorted(out.rglob("*")) if out.exists() else None) == before


@pytest.mark.parametrize("arguments, says", [
    (["walks"], "perhaps walk was meant"),
    (["walk", "-p", "sed=1"], "perhaps seed was meant"),
    (["walk", "-p", "seed=x"], "of type str"),
    (["walk", "-p", "seed"], "not of the form name=value"),
    (["walk", "--profile", "tiny"], "tiny"),
    (["walk", "--parts", "2"], "--parts: is an option of queries"),
    ([], "nothing to do"),
    (["--model", "m"], "no cells to place"),
    (["walk", "--model", "m", "--cells", "q"], "both experiments and queries"),
    (["--model", "m", "--cells", "q", "--parts", "0"], "give at least 1"),
    (["--model", "m", "--cells", "q", "--seeds", "1"], "options of experiments"),
    (["--model", "m", "--cells", "q"], "holds no saved Gears"),
])
def test_bad_input_is_one_line_and_writes_nothing(toys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setattr(runner, "repo_root", lambda: toys)
    refused(tmp_path / "out", *arguments, says=says)


def test_a_folder_with_anything_in_it_is_left_alone(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "repo_root", lambda: toys)
    (tmp_path / "mine.txt").touch()
    refused(tmp_path, "walk", says="is not empty")
    refused(tmp_path / "mine.txt", "walk", says="is a file")


def test_without_snakemake_there_is_one_line(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "find_spec", lambda name: None if name == "snakemake" else True)
    refused(tmp_path / "out", "walk", says="pip install 'gears_nb[workflow]'")


def test_the_command_line_has_workflow(capsys):
    """Through the front door: exit code 2 and one line."""
    from gears_nb.runs.cli import build_parser, main
    if "workflow" not in build_parser().format_help():
        pytest.skip("not registered yet")
    assert main(["workflow", "--out", "x"]) == 2 and "nothing to do" in capsys.readouterr().err


# what is written ------------------------------------------------------------------------------------------------------

def test_a_grid_is_a_job_each(toys, tmp_path, monkeypatch):
    yaml = pytest.importorskip("yaml")
    monkeypatch.setattr(runner, "repo_root", lambda: toys)
    command("walk", "-p", "label=no,'a: b, #c'", "-p", "label=[1]", "--seeds", 3, 4, "--out", tmp_path / "w")
    config = yaml.safe_load((tmp_path / "w/config.yaml").read_text())
    assert list(config["jobs"]) == ["walk-labelno-seed3", "walk-labelno-seed4", "walk-labela_b_c-seed3", "walk-labela_b_c-seed4", "walk-label_1_-seed3", "walk-label_1_-seed4"]
    job = config["jobs"]["walk-labela_b_c-seed4"]
    assert job["options"] == ["--profile", "toy", "-p", "label=a: b, #c", "-p", "seed=4"]
    assert job["title"] == "A walk" and (job["mem_mb"], job["minutes"]) == (8000, 60)
    assert config["environment"]["OMP_NUM_THREADS"] == "1"
    text = (tmp_path / "w/Snakefile").read_text()
    assert text.startswith("# Written by `gears workflow`") and "snakemake --profile profiles/slurm" in text and "report(" in text
    for profile in ("slurm", "default"):
        assert yaml.safe_load((tmp_path / f"w/profiles/{profile}/config.yaml").read_text())["rerun-incomplete"] is True
    assert yaml.safe_load((tmp_path / "w/profiles/slurm/config.yaml").read_text())["executor"] == "slurm"


def test_every_text_of_a_user_is_quoted():
    """In the shell lines, what comes from names and options stands with `:q` or within a quoted option."""
    for text in (workflow.EXPERIMENTS, workflow.QUERIES + workflow.WHOLE, workflow.QUERIES + workflow.PARTS):
        shell = [line for line in text.splitlines() if "{params." in line or "{input" in line or "{output" in line or "{log" in line]
        shell = [line for line in shell if not line.strip().startswith(("output:", "log:", "input:"))]
        loose = [word for line in shell for word in re.findall(r"\{((?:params|input|output|log|MODEL)[^}]*)\}", line) if not word.endswith(":q")]
        assert not loose, loose


# one query in parts ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A saved model of the smallest tissue, that of pages in reconstruct/ (trained once for all), and cells to place in two sections."""
    from gears_nb.data.simulator import simulate
    from gears_nb.reconstruct import facade
    from gears_nb.reconstruct.settings import profile
    home = tmp_path_factory.mktemp("trained")
    *slides, cells = simulate("tiny", 0).slides
    cells.obsm.pop("spatial")
    small = {"progress": False, "structure.miniset": 48, "structure.guess_epochs": 6, "structure.epochs": 6}
    with pytest.MonkeyPatch.context() as patch, facade.keep_training():
        patch.setattr(facade, "cache_root", lambda: Path(os.environ.get("GEARS_TEST_TRAINED", home)))
        gears = facade.Gears(profile("smoke", **small), model="plain").fit(slides, cells)
    gears.save(home / "model")
    cells.obs["slide"] = np.where(np.arange(cells.n_obs) % 3 == 0, "b", "a")
    cells.X = cells.X.toarray()
    cells.X[5] = 0  # a cell without counts
    cells.write_h5ad(home / "q 1's.h5ad")
    return home


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ["--set", "patches.allow_islands=true", "patches.batch=2"]


@pytest.mark.filterwarnings("ignore::gears_nb.core.errors.GearsWarning")
def test_parts_give_the_file_of_one_process(trained, tmp_path, lenient):
    """Plan, parts in any order, one lost and made again, merge: what `gears reconstruct` writes, bit for bit."""
    from gears_nb.runs.files import reconstruct_files
    cells, model, folder = str(trained / "q 1's.h5ad"), str(trained / "model"), tmp_path / "parts"
    step = lambda name, *more: workflow.main([name, "--model", model, "--folder", str(folder), *map(str, more)])
    reconstruct_files([], cells, tmp_path / "whole.h5ad", model_dir=model, overrides=lenient[1:], progress=False)
    assert step("part", "--part", 0) == 2  # no plan yet
    assert step("plan", "--cells", cells, "--parts", 3, *lenient) == 0
    for part in (2, 0, 1):
        assert step("part", "--part", part) == 0
    (folder / "part-1.json").unlink()  # what Snakemake does to the output of a job that was killed
    merge = lambda: step("merge", "--cells", cells, "--out", tmp_path / "merged.h5ad", "--report", tmp_path / "merged.html")
    assert merge() == 2 and not (tmp_path / "merged.h5ad").exists()
    assert step("part", "--part", 1) == 0 and merge() == 0
    whole, merged = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("whole", "merged"))
    assert np.array_equal(whole.obsm["X_gears"], merged.obsm["X_gears"], equal_nan=True) and np.isfinite(whole.obsm["X_gears"]).all(1).sum() == whole.n_obs - 1
    assert whole.obs.equals(merged.obs) and list(whole.obs["gears_section"].unique()) == ["b", "a", ""]
    assert (whole.obsp["gears_distances"] != merged.obsp["gears_distances"]).nnz == 0
    assert whole.uns["gears"]["warnings"] == merged.uns["gears"]["warnings"] and "[\"" in whole.uns["gears"]["warnings"]
    assert "<html" in (tmp_path / "merged.html").read_text()[:200]
    line, = workflow.write_table(tmp_path / "table.csv", [tmp_path / "merged.h5ad"])
    assert (line["cells"], line["placed"], line["notes"]) == (whole.n_obs, whole.n_obs - 1, "1 no counts")


@pytest.mark.filterwarnings("ignore::gears_nb.core.errors.GearsWarning")
def test_noise_comes_in_order(trained, tmp_path):
    """A model that draws: parts in the middle begin where the parts before them would have left the stream."""
    from dataclasses import replace

    from gears_nb.models.batches import Run
    from gears_nb.models.catalogue import model_class
    from gears_nb.reconstruct.facade import Gears
    from gears_nb.reconstruct.parts import merge_parts, plan_parts, work_part
    gears = Gears.load(trained / "model", {"patches.allow_islands": True, "patches.batch": 2})
    cells = ad.read_h5ad(trained / "q 1's.h5ad")
    members = [model_class("autoregressive").build(gears.fitted.cloud.shape[1], Run(gears.config.structure, gears.config.targets)) for _ in range(2)]
    gears._fitted = replace(gears.fitted, models=members)
    assert members[0].stochastic
    whole = gears.reconstruct(cells, slide_key="none")
    plan_parts(gears, cells, tmp_path, 3, slide_key="none")
    for part in (1, 2, 0):
        work_part(gears, tmp_path, part)
    assert np.array_equal(merge_parts(gears, cells, tmp_path, slide_key="none").obsm["X_gears"], whole.obsm["X_gears"], equal_nan=True)
    record = json.loads((tmp_path / "part-1.json").read_text())
    other = Gears(replace(gears.config, seed=1))
    other._fitted = gears.fitted
    with pytest.raises(InputError, match="settings: is not that of the plan"):
        merge_parts(other, cells, tmp_path)
    assert record["meta"]["joints"][0]["from"] != record["meta"]["joints"][0]["to"]


def test_a_workflow_of_queries_names_every_job(trained, tmp_path, lenient):
    """Plan, three parts, merge and table: Snakemake sees six jobs, and quotes what is odd."""
    out = tmp_path / "large"
    command("--model", trained / "model", "--cells", trained / "q 1's.h5ad", "--parts", 3, *lenient, "--out", out)
    plan = snakemake(out, "-n", "--printshellcmds")
    for count in ("plan 1", "part 3", "merge 1", "table 1", "all 1"):
        assert any(line.split() == count.split() for line in plan.splitlines()), plan
    assert "'\"'\"'" in plan and "--set patches.allow_islands=true patches.batch=2" in plan
    line, = [line for line in plan.splitlines() if "runs.workflow plan" in line]
    words = shlex.split(line.split(" > ")[0])
    assert words[words.index("plan"):][:6] == ["plan", "--model", str(trained / "model"), "--cells", str(trained / "q 1's.h5ad"), "--folder"]
    twice = [trained / "q 1's.h5ad", tmp_path / "q 1's.h5ad"]
    shutil.copy(*twice)
    assert list(workflow.query_jobs(list(map(str, twice)))) == ["q_1_s", "q_1_s-2"]
    assert list(workflow.query_jobs([str(shutil.copy(twice[0], tmp_path / name)) for name in ("клетки 1.h5ad", "мышь 1.h5ad", "сам.h5ad")])) == ["клетки_1", "мышь_1", "сам"]
    with pytest.raises(InputError, match="braces"):
        workflow.query_jobs([str(shutil.copy(twice[0], tmp_path / "{a}.h5ad"))])


def test_a_file_that_cannot_be_placed_is_told_now(trained, tmp_path):
    """Cut off, of another species, without the layer or the column: one line with the file, and no folder. The table says which file a job is."""
    cells = trained / "q 1's.h5ad"
    half, other = tmp_path / "half.h5ad", tmp_path / "other.h5ad"
    half.write_bytes(cells.read_bytes()[: cells.stat().st_size // 2])
    table = ad.read_h5ad(cells)
    table.var_names = [f"LOC{i}" for i in range(table.n_vars)]
    table.write_h5ad(other)
    for file, more, says in ((half, [], "half.h5ad: --cells: cannot be opened"), (other, [], "other.h5ad: var_names (genes): 0 of the model's"),
                             (cells, ["--layer", "spliced"], "layers/spliced"), (cells, ["--slide-key", "batch"], "obs['batch']")):
        refused(tmp_path / "out", "--model", trained / "model", "--cells", cells, file, *more, says=says)
    out = tmp_path / "maps"
    shutil.copy(cells, tmp_path / "клетки 1.h5ad")
    command("--model", trained / "model", "--cells", tmp_path / "клетки 1.h5ad", "--out", out)
    assert workflow.inputs_of(out / "config.yaml") == {"клетки_1": str(tmp_path / "клетки 1.h5ad")}
    plan = snakemake(out, "-n", "--printshellcmds")
    assert "placed/клетки_1.h5ad" in plan and "--config config.yaml" in plan
