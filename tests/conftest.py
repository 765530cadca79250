"""Shared set-up: one thread, few and repeatable hypothesis examples, tiny fixtures."""
from __future__ import annotations

import os

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
