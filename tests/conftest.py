"""Shared set-up: one thread, few and repeatable hypothesis examples, tiny fixtures."""
from __future__ import annotations

import os
import shutil
import tempfile

# for child processes, and for numba: its first parallel function (under UMAP, say) would set torch to as many as there are
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = "1"

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from hypothesis import settings
from threadpoolctl import threadpool_limits

torch.set_num_threads(1)
LIMIT = threadpool_limits(1)  # numpy may have been imported, with more threads, before this file was read
settings.register_profile("tiny", deadline=None, max_examples=15, derandomize=True, database=None)
settings.load_profile("tiny")

# two processes share the files (`make test`): the longest come first, so that both end together; test_browser.py mostly waits
LONGEST = ("test_book_second.py", "test_browser.py", "test_workflow.py", "test_maps.py", "test_book_third.py", "test_book_first.py", "test_perturb_model.py", "test_saturn_model.py", "test_cli.py", "test_after.py",
           "test_align.py", "test_face.py", "test_lab.py", "test_fusion.py", "test_strangers.py", "test_rungs.py", "test_generators.py", "test_generators_b.py", "test_facade.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))  # stable: the others as they came


def pytest_configure(config):
    """A folder for what pages train (`book.train_once`), one for all processes of this run."""
    if "GEARS_TEST_TRAINED" not in os.environ:
        config.gears_trained = os.environ["GEARS_TEST_TRAINED"] = tempfile.mkdtemp(prefix="gears-trained-")


def pytest_unconfigure(config):
    if folder := getattr(config, "gears_trained", None):
        del os.environ["GEARS_TEST_TRAINED"]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def one_thread_still():
    """What a test leaves behind would change the last digits of the tests after it."""
    yield
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    assert found == 1, f"torch was left with {found} threads"


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator that starts the same in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def shape(rng: np.random.Generator) -> np.ndarray:
    """Forty points in the plane, off centre and not round."""
    return rng.normal(size=(40, 2)) * [3.0, 1.0] + [10.0, -5.0]
