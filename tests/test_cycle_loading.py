"""The stream of batches: every cell once in a pass, the same batches for any number of workers, going on inside a chunk, nothing left behind."""
import functools
import gc
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import psutil
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.config import TrainConfig
from gears_nb.core.errors import InputError
from gears_nb.core.seeding import np_rng
from gears_nb.core.training import train
from gears_nb.cycle.chunks import Held, open_chunks, write_chunks
from gears_nb.cycle.fields import prepare
from gears_nb.cycle.loading import Stream, batch_edges
from gears_nb.lab.rows import in_fresh_process


def numbered(sizes, kind=Held):
    """Chunks of these sizes; the first gene of a cell tells its number, its line whether that is odd."""
    n = sum(sizes)
    X = np.full((n, 3), 0.5, np.float32)
    X[:, 0] = (np.arange(n) + 0.5) / 64
    obs = pd.DataFrame({"line": np.where(np.arange(n) % 2, "K", "M")}, index=[f"c{i}" for i in range(n)])
    whole, ends = open_chunks(AnnData(X, obs=obs), n), np.cumsum(sizes)
    held = whole.parts[0]
    return replace(whole, parts=tuple(kind(held.X, held.obs, int(b - a), int(b)) for a, b in zip(sizes, ends)))


def dealt(part):
    """Numbers of the cells of each batch; that labels belong to them is checked on the way."""
    out = []
    for batch in part:
        cells = np.floor(batch.x[:, 0].numpy() * 64).astype(int)
        assert batch.x.dtype == torch.float32 and batch.labels.dtype == torch.int64 and (batch.x[:, 1:] == 0.5).all()
        assert batch.labels[:, 0].tolist() == [1 if cell % 2 else 2 for cell in cells]
        out.append(cells.tolist())
    return out


def run(chunks, prepared, epochs, **how):
    with Stream(chunks, prepared, **how) as stream:
        return [dealt(stream.epoch(e)) for e in epochs]


def refused(call, *said):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in said), str(caught.value)
    return str(caught.value)


def workers_alive():
    """Processes that this one started and that read chunks."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "resource_tracker" not in " ".join(child.cmdline()) and "spawn_main" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def threads_alive():
    return [t for t in threading.enumerate() if t.name.startswith("cycle chunks")]


# what is dealt --------------------------------------------------------------------------------------------------------

SETS = st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 3)


@settings(max_examples=40)
@given(SETS, st.integers(1, 12), st.none() | st.integers(1, 60), st.integers(0, 99), st.integers(0, 2), st.booleans())
def test_every_cell_once_in_a_pass(sizes, batch, cells, seed, prefetch, shuffle):
    chunks = numbered(sizes)
    with Stream(chunks, prepare(chunks, rare=1), batch=batch, cells=cells, seed=seed, prefetch=prefetch, shuffle=shuffle) as stream:
        parts = [dealt(stream.epoch(e)) for e in range(2 * stream.parts)]
        assert [len(p) for p in parts] == [len(stream.epoch(e)) for e in range(2 * stream.parts)] and all(len(p) > 0 for p in parts)
        assert stream.parts == (1 if cells is None else min(stream.total, -(-sum(sizes) // cells)))
    home = np.repeat(np.arange(len(sizes)), sizes)
    for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :]):
        batches = sum(half, [])
        assert sorted(sum(batches, [])) == list(range(sum(sizes)))
        assert all(len(set(home[b])) == 1 for b in batches)  # none crosses chunks
        single = [b for b in batches if len(b) == 1]
        assert batch == 1 or all(sizes[home[b[0]]] == 1 for b in single)  # a batch of one only where the chunk is one cell
        assert max(map(len, batches)) <= batch + (batch > 1)
        if not shuffle:
            assert sum(batches, []) == list(range(sum(sizes)))


def test_batches_are_those_of_a_plain_loop():
    """The order that the stream promises, written down once more."""
    sizes, batch, seed = [13, 5, 9, 1], 4, 7
    chunks, starts = numbered(sizes), np.r_[0, np.cumsum([13, 5, 9])]
    expected = []
    for number in range(3):
        rows = []
        for chunk in np_rng(seed, "cycle chunks", number).permutation(4).tolist():
            cells = starts[chunk] + np_rng(seed, "cycle cells", number, chunk).permutation(sizes[chunk])
            cut = list(range(0, sizes[chunk], batch))
            groups = [cells[a : a + batch].tolist() for a in cut]
            if len(groups) > 1 and len(groups[-1]) == 1:
                groups[-2:] = [groups[-2] + groups[-1]]
            rows += groups
        expected.append(rows)
    assert run(chunks, prepare(chunks, rare=1), range(3), batch=batch, seed=seed) == expected


@given(st.integers(1, 200), st.integers(1, 50))
def test_edges_of_batches(cells, batch):
    sizes = np.diff(batch_edges(cells, batch))
    assert sizes.sum() == cells and (sizes[:-1] == batch).all() and (sizes > 0).all()
    assert sizes[-1] <= batch + (batch > 1) and (sizes[-1] > 1 or batch == 1 or cells == 1)


def test_another_seed_another_order_and_passes_differ():
    chunks = numbered([20, 20, 20])
    prepared = prepare(chunks, rare=1)
    one, two = (run(chunks, prepared, range(2), batch=5, seed=seed) for seed in (0, 1))
    assert one != two and one[0] != one[1] and one == run(chunks, prepared, range(2), batch=5, seed=0)


# going on -------------------------------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(SETS, st.integers(1, 9), st.integers(1, 40), st.integers(0, 2), st.lists(st.integers(0, 12), min_size=1, max_size=5))
def test_any_part_in_any_order_is_that_of_a_straight_run(sizes, batch, cells, prefetch, asked):
    chunks = numbered(sizes)
    prepared = prepare(chunks, rare=1)
    straight = run(chunks, prepared, range(13), batch=batch, cells=cells)
    assert run(chunks, prepared, asked, batch=batch, cells=cells, prefetch=prefetch) == [straight[e] for e in asked]


class Counted(Held):
    """A chunk that tells when it is read."""

    log = []

    def read(self):
        self.log.append(self.start)
        return super().read()


def test_a_resumed_run_reads_only_the_chunk_it_is_in():
    sizes = [40, 25, 33, 41]
    plain, chunks = numbered(sizes), numbered(sizes, Counted)
    prepared = prepare(plain, rare=1)
    straight = run(plain, prepared, range(14), batch=8, cells=20)
    home = np.repeat(np.r_[0, np.cumsum(sizes[:-1])], sizes)
    for start in range(13):
        with Stream(chunks, prepared, batch=8, cells=20, prefetch=0) as stream:
            Counted.log.clear()
            for e in (start, start + 1):
                assert dealt(stream.epoch(e)) == straight[e]
            needed = list(dict.fromkeys(home[b[0]] for b in straight[start] + straight[start + 1]))
            assert Counted.log == needed  # each chunk once, though two parts go through it, and none before


def test_a_single_chunk_is_read_once():
    chunks = numbered([30], Counted)
    prepared = prepare(numbered([30]), rare=1)
    for prefetch in (0, 2):
        Counted.log.clear()
        with Stream(chunks, prepared, batch=7, cells=10, prefetch=prefetch) as stream:
            assert sorted(sum((sum(dealt(stream.epoch(e)), []) for e in range(3 * stream.parts)), [])) == sorted(list(range(30)) * 3)
        assert Counted.log == [0]


def test_no_more_is_read_ahead_than_asked_for():
    sizes = [6] * 9
    prepared = prepare(numbered(sizes), rare=1)
    for prefetch in (0, 1, 3):
        Counted.log.clear()
        with Stream(numbered(sizes, Counted), prepared, batch=3, prefetch=prefetch) as stream:
            seen = set()
            for batch in stream.epoch(0):
                seen.add(int(batch.x[0, 0] * 64) // 6)
                assert len(seen) <= len(Counted.log) <= len(seen) + prefetch
    assert not threads_alive()


def test_the_next_chunk_is_read_while_this_one_is_used():
    """By events, not by the clock: with a chunk read ahead the second reading begins before the first chunk is used up."""
    begun = threading.Semaphore(0)

    class Told(Held):
        def read(self):
            begun.release()
            return super().read()

    prepared = prepare(numbered([8, 8]), rare=1)
    with Stream(numbered([8, 8], Told), prepared, batch=4, prefetch=1) as stream:
        batches = iter(stream.epoch(0))
        next(batches)
        assert begun.acquire(timeout=60) and begun.acquire(timeout=60)  # two, at the first batch
        batches.close()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.drop = torch.nn.Dropout(0.3)  # uses the global random numbers

    def forward(self, x):
        return self.layer(self.drop(x))


def fitted(chunks, prepared, place, stop=None, **how):
    torch.manual_seed(0)
    net = Net()
    config = TrainConfig(epochs=9, lr=0.05, device="cpu", progress=False)

    def loss(module, batch, epoch, rng):
        return {"loss": torch.nn.functional.cross_entropy(module(batch.x), batch.labels[:, 0] - 1)}

    def on_epoch(row):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    with Stream(chunks, prepared, batch=8, cells=20, **how) as stream:
        history = train(net, stream.epoch, loss, config, checkpoint=place, on_epoch=on_epoch)
    return net.state_dict(), history


def test_training_that_was_interrupted_inside_a_chunk_ends_with_the_same_weights(tmp_path):
    chunks = numbered([40, 25, 33])
    prepared = prepare(chunks, rare=1)
    whole, history = fitted(chunks, prepared, tmp_path / "a")
    for stop, prefetch in ((1, 0), (4, 2)):
        with pytest.raises(KeyboardInterrupt):
            fitted(chunks, prepared, tmp_path / f"b{stop}", stop=stop, prefetch=prefetch)
        assert not threads_alive()
        again, resumed = fitted(chunks, prepared, tmp_path / f"b{stop}", prefetch=prefetch)
        assert resumed.resumed_from == stop + 1 and all(torch.equal(whole[name], again[name]) for name in whole)
        assert resumed.column("loss") == history.column("loss")


def test_the_global_random_numbers_are_left_alone():
    chunks = numbered([10, 10])
    prepared = prepare(chunks, rare=1)
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(chunks, prepared, range(3), batch=4), run(chunks, prepared, [2], batch=4, prefetch=0)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


# workers --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A folder of four chunks of counts, and what was prepared for it."""
    rng = np.random.default_rng(0)
    n = 130
    obs = pd.DataFrame({"line": rng.choice(["K", "M"], n), "assay": rng.choice(["10x", "CEL-seq2"], n)}, index=[f"c{i}" for i in range(n)])
    adata = AnnData(rng.poisson(1.0, (n, 12)).astype(np.float32), obs=obs)
    chunks = write_chunks(adata, tmp_path_factory.mktemp("disk") / "set", 40)
    return chunks, prepare(chunks, n_genes=8)


def tensors(stream, epochs):
    return [(batch.x, batch.labels) for e in epochs for batch in stream.epoch(e)]


def alike(one, other):
    return len(one) == len(other) and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other))


def test_workers_change_nothing_and_do_not_stay(on_disk):
    how = {"batch": 16, "cells": 40, "seed": 3}
    with Stream(*on_disk, prefetch=0, **how) as stream:
        expected = tensors(stream, range(8))
        later = tensors(stream, [6, 7])
    state = torch.get_rng_state()
    for workers, prefetch in ((1, 1), (2, 2)):
        with Stream(*on_disk, workers=workers, prefetch=prefetch, **how) as stream:
            found = tensors(stream, range(8))
            assert len(workers_alive()) == workers
            if workers == 1:
                assert alike(tensors(stream, [6, 7]), later)  # a jump back: started anew, no one is left over
                assert len(workers_alive()) == 1
        assert alike(found, expected) and not workers_alive()
    assert torch.equal(state, torch.get_rng_state())
    with Stream(*on_disk, workers=2, prefetch=0, **how) as stream:  # read when needed: nothing for workers to do
        assert alike(tensors(stream, range(8)), expected) and not workers_alive()


def test_leaving_in_the_middle_ends_workers_and_threads(on_disk):
    def leave(stream, how):
        for number, _ in enumerate(stream.epoch(0)):
            if number == 1:
                assert len(workers_alive()) == stream.hand.workers and len(threads_alive()) == (not stream.hand.workers)
                if how is not None:
                    raise how
                return

    for workers in (0, 1):
        for how in (None, KeyboardInterrupt, ValueError):
            if workers and how is not KeyboardInterrupt:  # the others are asked of threads only: starting a process takes a second
                continue
            stream = Stream(*on_disk, batch=16, workers=workers, prefetch=1)
            try:
                leave(stream, how)
            except (KeyboardInterrupt, ValueError):
                pass
            gc.collect()
            assert not workers_alive() and not threads_alive(), (workers, how)


def test_an_error_in_a_worker_is_the_one_line_that_it_is_without(on_disk, tmp_path):
    chunks = write_chunks(AnnData(np.ones((40, 12), np.float32), obs=pd.DataFrame({"line": "K", "assay": "10x"}, index=[f"c{i}" for i in range(40)])), tmp_path / "bad", 40)
    path = tmp_path / "bad" / "chunk_00000.csv"
    path.write_text(path.read_text().replace("K", "new line", 1))
    both = replace(on_disk[0], parts=on_disk[0].parts + chunks.parts)
    said = []
    for workers, prefetch in ((0, 0), (0, 2), (1, 1)):
        stream = Stream(both, on_disk[1], batch=16, workers=workers, prefetch=prefetch)
        said.append(refused(lambda stream=stream: list(stream.epoch(0)), "chunk_00000.csv", "row 0", "'line'", "new line"))
        assert not workers_alive() and not threads_alive()
    assert len(set(said)) == 1


def test_a_worker_that_dies_is_said_and_the_stream_goes_on(on_disk):
    stream = Stream(*on_disk, batch=16, workers=1, prefetch=1, cells=40)
    batches = iter(stream.epoch(0))
    next(batches)
    (pid,) = workers_alive()
    os.kill(pid, signal.SIGKILL)

    def drained():
        try:
            return [list(batches), *(list(stream.epoch(e)) for e in range(1, 9))]
        except RuntimeError as error:  # torch's handler of dead children interrupts anything, also our error on its way
            raise (error.__context__ if isinstance(error.__context__, InputError) else error) from None

    refused(drained, "workers", "ended", "workers=0")
    assert not workers_alive()
    with Stream(*on_disk, batch=16, cells=40, prefetch=0) as plain:
        expected = tensors(plain, [1])
    stream.hand.workers = 0
    assert alike(tensors(stream, [1]), expected)
    stream.close()


# time and memory ------------------------------------------------------------------------------------------------------

def test_waiting_and_working_are_told_apart():
    class Slow(Held):
        def read(self):
            time.sleep(0.02)
            return super().read()

    chunks = numbered([10] * 4, Slow)
    prepared = prepare(numbered([10] * 4), rare=1)
    with Stream(chunks, prepared, batch=5, prefetch=0) as stream:
        assert stream.idle_share == 0 == stream.waited
        start = time.perf_counter()
        list(stream.epoch(0))
        whole = time.perf_counter() - start
        assert len(stream.waits) == 4 and stream.waited >= 4 * 0.02  # sleeping takes at least that long
        assert 0 < stream.worked <= whole - stream.waited and stream.idle_share == stream.waited / (stream.waited + stream.worked)
        waited = stream.waited
        for _ in stream.epoch(1):
            time.sleep(0.01)
        assert stream.worked >= 8 * 0.01 and len(stream.waits) == 8 and stream.waited > waited


def through(path, prepared_for, prefetch, cells):
    chunks = open_chunks(path)
    with Stream(chunks, prepared_for, batch=64, prefetch=prefetch, cells=cells) as stream:
        return sum(float(batch.x.sum()) > 0 for e in range(stream.parts) for batch in stream.epoch(e))


def peaks(tiny, jobs):
    from gears_nb.lab.rows import measure_here
    through(*tiny)
    start, out = None, []
    for job in jobs:
        found = measure_here(None, functools.partial(through, *job))
        start = found["before_mb"] if start is None else start
        out.append(found["before_mb"] + found["peak_mb"] - start)
    return out


def test_memory_is_that_of_the_chunks_in_hand(tmp_path):
    """Chunks of 500 cells take 3.8 MiB each; twenty-four of them need no more than two do."""
    X = np.zeros((500, 4000), np.float32)
    X[:, ::4] = np.random.default_rng(0).integers(1, 9, (500, 1000))
    obs = pd.DataFrame({"line": ["K", "M"] * 500}, index=[f"c{i}" for i in range(1000)])
    whole = AnnData(sp.vstack([sp.csr_matrix(X)] * 2, format="csr"), obs=obs)
    few = write_chunks(whole, tmp_path / "few", 500)
    write_chunks(whole[:8], tmp_path / "tiny", 4), (tmp_path / "many").mkdir()
    for i in range(24):
        for end in ("npz", "csv"):
            shutil.copy(tmp_path / "few" / f"chunk_0000{i % 2}.{end}", tmp_path / "many" / f"chunk_{i:05d}.{end}")
    prepared = prepare(few, rare=1)
    jobs = [(tmp_path / name, prepared, prefetch, 700) for name, prefetch in (("few", 0), ("many", 0), ("few", 1), ("many", 1))]
    found = in_fresh_process(functools.partial(peaks, (tmp_path / "tiny", prepared, 0, None), jobs)).value
    if found[0] is not None:  # None where the system does not tell; all chunks of the larger set are 92 MiB
        assert found[1] < found[0] + 6 and found[3] < found[2] + 12 and max(found) < 46, found


# bad settings ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how, said", [({"batch": 0}, "batch"), ({"batch": 2.5}, "batch"), ({"batch": 4, "workers": -1}, "workers"), ({"batch": 4, "prefetch": -1}, "prefetch"),
                                       ({"batch": 4, "cells": 0}, "cells"), ({"batch": 4, "workers": None}, "workers")])
def test_settings_out_of_range(how, said):
    chunks = numbered([10])
    refused(lambda: Stream(chunks, prepare(chunks, rare=1), **how), said, "whole number")


def test_chunks_that_were_not_prepared_for(on_disk):
    chunks = numbered([10])
    refused(lambda: Stream(on_disk[0], prepare(chunks, rare=1), batch=4), "12 genes, prepared were 3")
    with Stream(chunks, prepare(chunks, rare=1), batch=4) as stream:
        refused(lambda: stream.epoch(-1), "epoch")
