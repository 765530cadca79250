"""A process that may be killed, or run beside another one.

It is a fork of a server that has imported what takes seconds and has run nothing that starts a thread. A fork of pytest
itself may wait for ever: threads that an earlier test has started (numba's under UMAP, say) don't live on in it, their locks do.
"""
import multiprocessing
import multiprocessing.forkserver
import os
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
