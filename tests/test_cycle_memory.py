"""More cells than memory: under a limit that the system enforces a set is trained on that cannot be read at once, and nothing grows with the number of chunks."""
import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from gears_nb.core.errors import InputError
from gears_nb.cycle.chunks import open_chunks
from gears_nb.lab.rows import in_fresh_process, measure_here

CHUNKS, CELLS, GENES, ROOM_MB = 40, 2000, 500, 64
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds on Linux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Chunks of 3.8 MiB, 150 MiB of them; the matrices differ in their contexts only."""
    home, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    at = 2 * np.arange(GENES // 2) + rng.integers(2, size=(CELLS, GENES // 2))
    X = sp.csr_matrix((rng.integers(1, 6, at.size).astype(np.float32), at.ravel().astype(np.int32), (np.arange(CELLS + 1) * (GENES // 2)).astype(np.int32)), (CELLS, GENES))
    for i in range(CHUNKS):
        sp.save_npz(home / f"c{i:02d}.npz", X, compressed=False)
        pd.DataFrame({name: rng.choice(list("abcd"[:kinds]), CELLS) for name, kinds in (("assay", 2), ("type", 4))}).to_csv(home / f"c{i:02d}.csv", index=False)
    return str(home)


def fit(chunks):
    """A pass of training, from the files on; whether all weights are finite."""
    from gears_nb.cycle.cycle import CycleAE

    settings = {"cells.n_genes": 50, "train.epochs": 1, "train.progress": False, "batch": 250}
    net = CycleAE("smoke", **settings).fit(chunks).fitted.net
    return all(bool(p.isfinite().all()) for p in net.parameters())


def under_a_limit(folder):
    """Peaks of a fit to three chunks, and, with `ROOM_MB` more than the process then has, to all of them; and what reading all at once gives."""
    import resource

    chunks = open_chunks(folder)
    few = measure_here(None, functools.partial(fit, replace(chunks, parts=chunks.parts[:3])))
    has = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")) / 1024
    resource.setrlimit(resource.RLIMIT_DATA, (int((has + ROOM_MB) * 2**20), resource.RLIM_INFINITY))
    every = measure_here(None, functools.partial(fit, chunks))
    held = []
    try:
        held.extend(chunks.read(i) for i in range(len(chunks)))
        said = "all were read"
    except (MemoryError, InputError) as error:
        said = f"{type(error).__name__} {error}"
    held.clear()
    return {"few": few["before_mb"] + few["peak_mb"], "every": every["before_mb"] + every["peak_mb"], "finite": few["value"] and every["value"], "said": said}


def test_a_set_that_cannot_be_held_is_trained_on_and_the_process_does_not_grow(folder, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)  # of `make test`: memory that is freed and kept would be room beyond the limit
    size = sum(path.stat().st_size for path in Path(folder).glob("*.npz")) / 2**20
    found = in_fresh_process(functools.partial(under_a_limit, folder)).value
    assert size > 2 * ROOM_MB and "memory" in found["said"].lower(), found["said"]
    assert found["finite"] and found["every"] - found["few"] < 0.1 * size  # 37 more chunks would be 141 MiB


def test_chunks_that_are_held_would_be_seen(folder):
    """The measure itself: a list of all chunks grows the process by the set."""
    held = in_fresh_process(functools.partial(read_all, folder))
    assert held.value == CHUNKS and held.peak_mb > 0.8 * CHUNKS * CELLS * GENES / 2 * 8 / 2**20


def read_all(folder):
    chunks = open_chunks(folder)
    return len([chunks.read(i) for i in range(len(chunks))])
