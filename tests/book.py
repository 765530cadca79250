"""Every notebook is a test: how one is run. Two files share them, so that two processes can."""
import multiprocessing
import os
import sys
from pathlib import Path

# imported late by whatever trains, shows a figure or runs a page: here once, and not in every fork
import anndata  # noqa: F401
import lightning_fabric  # noqa: F401
import matplotlib.pyplot
import ot  # noqa: F401
import pytest
import sklearn.manifold  # noqa: F401
import torch._dynamo  # noqa: F401
from nbdev.test import test_nb as run_page

NBS = Path(__file__).resolve().parents[1] / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
LOWER = ("core", "geometry", "data", "lab", "encoder", "targets", "models", "structure")
name = lambda path: path.relative_to(NBS).as_posix()
forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="notebooks are run in forked processes")


def run_alone(path):
    """Run a notebook in this process, which ends with it: exit status 0 if it passed."""
    matplotlib.rcdefaults()
    os.cpu_count = lambda: 1  # experiments open a process pool for every core, and a pool inside a fork of pytest waits for ever
    os.chdir(path.parent)
    passed, _ = run_page(path, skip_flags=["slow", "gpu", "notest"], basepath=NBS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not passed)


def passes(path):
    """Run a notebook in a fork, which keeps what it changes (registries, figure style) to itself, without importing torch 150 times."""
    child = multiprocessing.get_context("fork").Process(target=run_alone, args=(path,))
    child.start()
    child.join(180)
    late = child.is_alive()
    child.kill()
    child.join()
    assert not late, f"{name(path)} took more than 180 s, notebooks should take less than 20"
    assert child.exitcode == 0, f"{name(path)} failed; its error is printed above"
