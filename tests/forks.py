"""A process that may be killed, or run beside another one.

It is a fork of a server that has imported what takes seconds and has run nothing that starts a thread. A fork of pytest
itself may wait for ever: threads that an earlier test has started (numba's under UMAP, say) don't live on in it, their locks do.
"""
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")
# imported late by whatever trains, shows a figure or runs a page; the last is of this folder
PRELOAD = ("anndata", "lightning_fabric", "matplotlib.pyplot", "nbdev.test", "ot", "sklearn.manifold", "torch._dynamo", "gears_nb.reconstruct.facade", "warm")


def start(target, *arguments):
    "Call `target`, a function of a module, in a process of its own, in the environment of this one."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    _serve()
    process = context.Process(target=_called, args=(dict(os.environ), os.getcwd(), target, arguments))
    process.start()
    return process


def _serve():
    "Start the server if there is none. It finds `warm` by its environment: Python 3.11 does not pass it the path."
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _called(environment, folder, target, arguments):
    "The server has the environment and the folder of the test that came first."
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    target(*arguments)


def ended(process, seconds=120):
    "Its exit code, -9 if it was killed; None if it is still running after `seconds`, which ends it."
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def command(*words, folder=".", seconds=300):
    """`gears` with these words, in `folder`: a process of its own that has imported everything; what `subprocess.run` gives, with text.

    That the installed script starts is asked by tests/test_cli.py; there and where a run is killed, a new Python is started.
    """
    with tempfile.TemporaryDirectory() as home:
        said = [Path(home) / name for name in ("out", "err")]
        code = ended(start(_gears, [str(w) for w in words], str(folder), [str(path) for path in said]), seconds)
        assert code is not None, f"gears {' '.join(map(str, words))}: still running after {seconds} s"
        return subprocess.CompletedProcess(["gears", *words], code, *(path.read_text() if path.is_file() else "" for path in said))


def _gears(words, folder, said):
    os.chdir(folder)
    for number, path in enumerate(said, 1):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["gears", *words]
    from gears_nb.runs.cli import main
    sys.exit(main(words))
