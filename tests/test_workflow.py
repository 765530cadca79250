"""`gears workflow`: what it writes, refuses, and that Snakemake runs it, goes on after a kill, and finds what one process finds."""
import argparse
import csv
import json
import os
import random
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
    """A workflow of five walks and a table, whose jobs go to that repository."""
    monkeypatch.setattr(runner, "repo_root", lambda: toys)
    monkeypatch.setattr(workflow, "program", lambda name: f"{sys.executable} {toys / 'gears.py'}" if name == "gears" else sys.executable)
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "my walks"
    command("walk", "--profile", "smoke", "-p", f"label={ODD}", "--seeds", 0, 1, 2, 3, 4, "--out", out)
    return out


def snakemake(folder, *arguments):
    done = subprocess.run([*SNAKEMAKE, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(folder):
    return {path.parent.name: path for path in folder.glob("results/toys/*/results.json")}


def test_six_jobs_killed_and_resumed_are_those_of_one_process(walks, toys, tmp_path):
    plan = snakemake(walks, "-n")
    for count in ("experiment 5", "table 1", "all 1"):  # six jobs, and the goal
        assert any(line.split() == count.split() for line in plan.splitlines()), plan
    with open(tmp_path / "first.log", "w") as log:  # not a pipe, which would fill
        first = subprocess.Popen([*SNAKEMAKE, "--cores", "2", "--nolock"], cwd=walks, stdout=log, stderr=log, start_new_session=True)
    finished = lambda: (tmp_path / "first.log").read_text().count("Finished job")
    end = time.monotonic() + 150
    while finished() < 2 and first.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {name: path.stat().st_mtime_ns for name, path in results(walks).items()}
    assert 2 <= finished() < 5, (tmp_path / "first.log").read_text()

    again = snakemake(walks, "--cores", "2")
    made = {name: path.stat().st_mtime_ns for name, path in results(walks).items()}
    kept = [name for name in made if before.get(name) == made[name]]
    assert len(made) == 5 and len(kept) >= 2
    assert again.count("rule experiment:") == 5 - len(kept) and again.count("rule table:") == 1  # only what was missing

    lines = {line["job"]: line for line in csv.DictReader((walks / "table.csv").open())}
    records = {name: json.loads(path.read_text()) for name, path in results(walks).items()}
    assert {record["seed"] for record in records.values()} == set(range(5)) and {record["params"]["label"] for record in records.values()} == {ODD}
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
