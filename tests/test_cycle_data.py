"""Chunks, tables in pickles, and fields: every format gives the same cells, strangers' pickles run nothing, and one pass finds what a plain count finds."""
import base64
import builtins
import copyreg
import functools
import gzip
import operator
import os
import pickle
import struct
import warnings
import zlib

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.cycle.chunks import open_chunks, read_contexts, write_chunks
from gears_nb.cycle.fields import RARE, UNKNOWN, Field, dependences, load, make_field, prepare, save
from gears_nb.cycle.tables import ALLOWED, read_plain_pickle
from gears_nb.data.preprocess import highly_variable, normalise
from gears_nb.data.registry import data_root
from gears_nb.lab.rows import in_fresh_process


def cells(n=60, g=7, seed=0):
    """Counts of `n` cells with an assay (one missing), a line, a number and a truth value."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"assay": pd.Categorical(rng.choice(["10x", "CEL-seq2"], n)), "line": rng.choice(["K", "M", "P"], n), "age": rng.integers(20, 60, n).astype(float),
                        "dead": rng.random(n) < 0.5}, index=[f"cell {i}" for i in range(n)])
    obs.loc["cell 3", "assay"] = None
    return anndata.AnnData(sp.csr_matrix(rng.poisson(0.6, (n, g)).astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(g)]))


def words(column):
    """Labels as texts, '' for a missing one, whole numbers without a point."""
    return ["" if pd.isna(v) else str(v).removesuffix(".0") for v in column.tolist()]


def same(chunks, adata):
    """The cells of a set of chunks are those of `adata`, in order."""
    assert chunks.genes == tuple(adata.var_names) and chunks.columns == tuple(adata.obs.columns) and chunks.sizes.sum() == adata.n_obs
    pieces = [chunks.read(i) for i in range(len(chunks))]
    assert all(X.dtype == np.float32 and X.shape[0] == len(t) == size for (X, t), size in zip(pieces, chunks.sizes))
    assert np.array_equal(sp.vstack([X for X, _ in pieces]).toarray(), adata.X.toarray() if sp.issparse(adata.X) else adata.X)
    for name in adata.obs:
        assert sum((words(t[name]) for _, t in pieces), []) == words(adata.obs[name]), name


def refused(call, *said):
    """The error of `call` is one line that says all of `said`."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and "Remedy" in text and all(word in text for word in said), text


# formats --------------------------------------------------------------------------------------------------------------

def store(kind, adata, folder):
    """`adata` written as `kind`, and opened."""
    if kind in ("csv", "parquet"):
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        return write_chunks(adata, folder / "set", 25, table=kind)
    if kind in ("csv.gz", "tsv", "tsv.gz", "pkl"):
        write_chunks(adata, folder / "set", 25)
        for i, (a, b) in enumerate(((0, 25), (25, 50), (50, 60))):
            (folder / "set" / f"chunk_0000{i}.csv").unlink()
            table, path = adata.obs[a:b], folder / "set" / f"chunk_0000{i}.{kind}"
            table.to_pickle(path) if kind == "pkl" else table.to_csv(path, sep="\t" if "tsv" in kind else ",", index_label="")
        return open_chunks(folder / "set")
    if kind == "memory":
        return open_chunks(adata, 25)
    layers = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray(), "int": adata.X.astype(np.int64)}
    whole = anndata.AnnData(None, obs=adata.obs, var=adata.var, layers=layers)
    path = folder / ("cells.zarr" if kind.startswith("zarr") else "cells.h5ad")
    if kind.startswith("zarr"):
        pytest.importorskip("zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.write_zarr(path) if kind.startswith("zarr") else whole.write_h5ad(path, convert_strings_to_categoricals=False)
        return open_chunks(path, 25, layer=kind.split("-")[1])


KINDS = ["csv", "parquet", "csv.gz", "tsv", "tsv.gz", "pkl", "memory", *(f"{place}-{layout}" for place in ("h5ad", "zarr") for layout in ("csr", "csc", "dense", "int"))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_cells(kind, tmp_path):
    adata = cells()
    chunks = store(kind, adata, tmp_path)
    assert chunks.sizes.tolist() == [25, 25, 10]
    same(chunks, adata)
    same(pickle.loads(pickle.dumps(chunks)), adata)  # a worker process gets a copy
    # the same vocabulary, too; a text table does not know that ages are numbers, and so they are found to be
    assert prepare(chunks, rare=2).digest == prepare(open_chunks(adata), rare=2).digest


def test_raw_has_genes_of_its_own(tmp_path):
    adata = cells()
    small = adata[:, :3].copy()
    small.raw = adata
    small.write_h5ad(tmp_path / "r.h5ad")
    for source in (small, tmp_path / "r.h5ad"):
        chunks = open_chunks(source, 40, layer="raw")
        assert chunks.genes == tuple(adata.var_names) and np.array_equal(chunks.read(1)[0].toarray(), adata.X[40:].toarray())
        assert open_chunks(source).genes == ("g0", "g1", "g2")


def test_a_list_of_sources_is_one_set(tmp_path):
    adata = cells()
    write_chunks(adata[:30], tmp_path / "a", 20), adata[30:45].copy().write_h5ad(tmp_path / "b.h5ad"), write_chunks(adata[45:], tmp_path / "c")
    same(open_chunks([tmp_path / "a", tmp_path / "b.h5ad", tmp_path / "c" / "chunk_00000.npz"]), adata)
    write_chunks(adata[:, ::-1], tmp_path / "d")
    refused(lambda: open_chunks([tmp_path / "a", tmp_path / "d"]), "d/chunk_00000.csv", "differ first at number 0")


def test_numbers_in_names_count_as_numbers(tmp_path):
    for name in ("part10", "part2", "part1"):
        sp.save_npz(tmp_path / f"{name}.npz", sp.csr_matrix(np.full((1, 2), len(name) + int(name[4:]), np.float32)))
        (tmp_path / f"{name}.csv").write_text("assay\n10x\n")
    chunks = open_chunks(tmp_path)
    assert [part.matrix.stem for part in chunks.parts] == ["part1", "part2", "part10"] and chunks.genes == ("0", "1")
    (tmp_path / "genes.csv").write_text("Xist,ENSG1\nActb,ENSG2\n")
    assert open_chunks(tmp_path).genes == ("Xist", "Actb")
    assert open_chunks(tmp_path / "part2.npz").sizes.tolist() == [1]


def test_words_survive_a_text_table(tmp_path):
    adata = cells(6)
    adata.obs = pd.DataFrame({"treatment": ["None", "NA", "null", "a,b", 'say "x"', None], "id": ["01", "1", "1.0", "1e3", "007", "x"]}, index=adata.obs_names)
    chunks = write_chunks(adata, tmp_path / "w")
    table = chunks.read(0)[1]
    assert table["treatment"].tolist()[:5] == adata.obs["treatment"].tolist()[:5] and table["treatment"].isna().tolist() == [False] * 5 + [True]
    assert table["id"].tolist() == adata.obs["id"].tolist() and table.index.tolist() == adata.obs_names.tolist()


@settings(max_examples=15)
@given(st.integers(1, 23), st.integers(1, 30), st.integers(0, 2**32))
def test_any_size_of_chunk_gives_all_cells(n, size, seed):
    adata = cells(max(n, 4), seed=seed)
    chunks = open_chunks(adata, size)
    assert chunks.sizes.max() <= size and (chunks.sizes[:-1] == size).all()
    same(chunks, adata)


def test_nothing_of_the_users_is_changed(tmp_path):
    adata = cells()
    adata.X.data[::3] = 0  # stored zeros, and unsorted indices below
    adata.X.has_sorted_indices = False
    before = [adata.X.data.copy(), adata.X.indices.copy(), adata.obs.copy()]
    chunks = open_chunks(adata, 100)
    prepare(chunks, rare=2)
    X, table = chunks.read(0)
    X.data[:] = -1
    table.iloc[:, 1] = "other"
    assert np.array_equal(adata.X.data, before[0]) and np.array_equal(adata.X.indices, before[1]) and adata.obs.equals(before[2])


def test_the_digest_of_a_set(tmp_path):
    adata = cells()
    one = write_chunks(adata, tmp_path / "a", 25)
    assert one.digest == open_chunks(tmp_path / "a").digest != write_chunks(adata, tmp_path / "b", 20).digest
    other = adata.copy()
    other.X.data[0] += 1
    assert open_chunks(adata, 25).digest == open_chunks(adata.copy(), 25).digest != open_chunks(other, 25).digest
    (tmp_path / "a" / "chunk_00001.csv").write_text("assay\n" + "10x\n" * 25)
    assert open_chunks(tmp_path / "a").digest != one.digest


def test_a_byte_order_mark_is_no_name(tmp_path):
    adata = cells()
    write_chunks(adata, tmp_path / "a", 25)
    first = sorted((tmp_path / "a").glob("*.csv"))[0]
    first.write_bytes(b"\xef\xbb\xbf" + first.read_bytes())
    found, plain = open_chunks(tmp_path / "a"), open_chunks(adata, 25)
    assert found.columns == plain.columns and found.read(0)[1].index.tolist() == plain.read(0)[1].index.tolist()


# memory ---------------------------------------------------------------------------------------------------------------

def wide(n, g=4000):
    """Cells with a thousand of four thousand genes: 8 KB each, 16 KB dense."""
    obs = pd.DataFrame({"assay": ["10x", "CEL-seq2"] * (n // 2)}, index=[f"c{i}" for i in range(n)])
    rng = np.random.default_rng(0)
    X = sp.csr_matrix((np.ones(n * g // 4, np.float32), (rng.permuted(np.tile(np.arange(0, g, 4), (n, 1)), axis=1) + rng.integers(0, 4, (n, 1))).ravel(), np.arange(n + 1) * (g // 4)), shape=(n, g))
    return anndata.AnnData(X, obs=obs)


def read_all(path, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunks = open_chunks(path, size)
    for i in range(len(chunks)):
        chunks.read(i)


def peaks(tiny, jobs):
    """MiB of peak during each job, beyond what was held after the imports that `tiny` jobs need."""
    from gears_nb.cycle import chunks
    from gears_nb.lab.rows import measure_here
    chunks.BLOCK = 2**17  # half a MiB, so that small files show what large ones would
    for job in tiny:
        read_all(*job)
    start, out = None, []
    for job in jobs:
        found = measure_here(None, functools.partial(read_all, *job))
        start = found["before_mb"] if start is None else start
        out.append(found["before_mb"] + found["peak_mb"] - start)
    return out


def test_memory_is_that_of_a_chunk_and_not_of_the_set(tmp_path):
    large, tiny = wide(4000), cells(6)
    write_chunks(tiny, tmp_path / "tiny"), tiny.write_h5ad(tmp_path / "tiny.h5ad")
    write_chunks(large[:1000], tmp_path / "small", 500), write_chunks(large, tmp_path / "large", 500), write_chunks(large, tmp_path / "tall", 2000)
    large.write_h5ad(tmp_path / "csr.h5ad"), anndata.AnnData(large.X.tocsc(), obs=large.obs).write_h5ad(tmp_path / "csc.h5ad")
    anndata.AnnData(large.X.toarray(), obs=large.obs).write_h5ad(tmp_path / "dense.h5ad")
    jobs = [(tmp_path / name, 500) for name in ("small", "large", "csr.h5ad", "dense.h5ad", "csc.h5ad", "tall")]
    call = functools.partial(peaks, [(tmp_path / "tiny", 500), (tmp_path / "tiny.h5ad", 500)], jobs)
    small, most, csr, dense, csc, tall = in_fresh_process(call).value
    if small is not None:  # None where the system does not tell; a chunk takes 3.8 MiB, the set 30 MiB, dense 61 MiB
        assert max(small, most) < 12 and abs(most - small) < 3
        assert tall > 12  # four times as many cells
        assert csr < 16 and dense < 24 and csc < 28


# bad chunks -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """Three chunks of 100, 100 and 40 cells."""
    write_chunks(cells(240), tmp_path / "set", 100)
    return tmp_path / "set"


def lines(path, keep):
    path.write_text("\n".join(path.read_text().splitlines()[keep]) + "\n")


def test_a_table_that_lost_its_last_row(folder):
    lines(folder / "chunk_00001.csv", slice(0, -1))
    refused(lambda: open_chunks(folder).read(1), "chunk_00001.csv", "100 rows, the table 99")
    refused(lambda: prepare(open_chunks(folder)), "chunk_00001.csv", "100 rows, the table 99")


def test_a_chunk_without_its_table_or_its_matrix(folder):
    (folder / "chunk_00001.csv").rename(folder / "other.csv")
    refused(lambda: open_chunks(folder), "chunk_00001.npz", "no table beside", "chunk_00001.csv")
    (folder / "chunk_00001.npz").rename(folder / "another.npz"), (folder / "other.csv").rename(folder / "chunk_00001.csv")
    (folder / "chunk_00001.csv").with_name("another.csv").write_text((folder / "chunk_00001.csv").read_text())
    refused(lambda: open_chunks(folder), "chunk_00001.csv", "no matrix beside", "chunk_00001.npz")


def test_a_second_table_of_a_chunk(folder):
    (folder / "chunk_00001.tsv").write_text("assay\n")
    refused(lambda: open_chunks(folder), "chunk_00001.tsv", "second table", "chunk_00001.csv")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99])
def test_a_cut_matrix(folder, share):
    path = folder / "chunk_00002.npz"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(lambda: open_chunks(folder), "chunk_00002.npz", "cut", "copy it again")


def test_a_matrix_with_a_flipped_byte_is_not_read(folder):
    path = folder / "chunk_00002.npz"
    whole = path.read_bytes()
    found = 0
    for place in np.linspace(100, len(whole) - 400, 25).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            X = open_chunks(folder).read(2)[0]
        except InputError as error:
            assert "chunk_00002.npz" in str(error)
            found += 1
        else:  # a byte of a name or a date in the archive
            assert X.shape == (40, 7)
    assert found > 15


@pytest.mark.parametrize("change, said", [
    ({"indices": lambda a: a + 7}, "indices"), ({"indptr": lambda a: a[::-1].copy()}, "ind"), ({"indptr": lambda a: a + 1}, "ind"), ({"indices": lambda a: -a - 1}, "ind"),
    ({"data": lambda a: a[:-1]}, "damaged"), ({"indices": lambda a: a.astype(float)}, "type"), ({"data": lambda a: a.astype(str)}, "type"), ({"shape": lambda a: a[:1]}, "damaged"),
    ({"format": lambda a: np.array("csc")}, "csr"), ({"data": lambda a: np.array([print] * len(a), dtype=object)}, "allow_pickle")])
def test_arrays_that_do_not_make_a_matrix(change, said, folder):
    path = folder / "chunk_00000.npz"
    arrays = dict(np.load(path))
    arrays |= {name: make(arrays[name]) for name, make in change.items()}
    np.savez(path, **arrays)
    refused(lambda: open_chunks(folder).read(0), "chunk_00000.npz", said)


@pytest.mark.parametrize("value, place", [(-1.0, 0), (np.nan, 57), (np.inf, 99), (1e38, 3)])
def test_values_that_are_no_expression(value, place, folder, tmp_path):
    adata = cells(240)
    start = adata.X.indptr[100 + place : 102 + place]
    assert start[0] < start[1]
    adata.X.data[start[0]] = value
    gene = adata.var_names[adata.X.indices[start[0]]]
    sp.save_npz(folder / "chunk_00001.npz", adata.X[100:200])
    refused(lambda: open_chunks(folder).read(1), "chunk_00001.csv", f"row {place}, gene '{gene}'")
    adata.write_h5ad(tmp_path / "bad.h5ad")
    for source in (adata, tmp_path / "bad.h5ad"):  # here rows are counted in the whole file
        refused(lambda source=source: open_chunks(source, 100).read(1), f"row {100 + place}, gene '{gene}'")


def test_columns_that_differ_between_chunks(folder):
    path = folder / "chunk_00001.csv"
    path.write_text("\n".join(line.rsplit(",", 1)[0] for line in path.read_text().splitlines()))
    chunks = open_chunks(folder)
    assert chunks.columns == ("assay", "line", "age")
    refused(lambda: chunks.column("dead"), "chunk_00001.csv", "'dead'", "absent")
    refused(lambda: prepare(chunks, ["line", "dead"]), "chunk_00001.csv", "'dead'", "absent")
    refused(lambda: prepare(chunks, ["sex"]), "'sex'", "does not exist", "assay, line, age")
    assert any("dead" in note and "chunk_00001.csv" in note for note in prepare(chunks).notes)
    lines(path, slice(0, 0))
    refused(lambda: open_chunks(folder).read(1), "chunk_00001.csv")


def test_columns_that_occur_twice(folder):
    for name, header in (("a.csv", ",assay,assay\nc,1,2\n"), ("a.tsv", "assay\tassay\n1\t2\n"), ("b.csv", "assay, assay\n1,2\n")):
        (folder.parent / name).write_text(header)
        refused(lambda name=name: read_contexts(folder.parent / name), name, "'assay'", "more than once")
    pd.DataFrame([[1, 2]], columns=["x", "x"]).to_pickle(folder.parent / "c.pkl")
    refused(lambda: read_contexts(folder.parent / "c.pkl"), "'x'", "more than once")


@pytest.mark.parametrize("name", ["csv.gz", "parquet", "pkl", "tsv"])
def test_a_cut_or_foreign_table(name, folder):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    path, table = folder / f"chunk_00001.{name}", read_contexts(folder / "chunk_00001.csv")
    (folder / "chunk_00001.csv").unlink()
    {"parquet": table.to_parquet, "pkl": table.to_pickle}.get(name, table.to_csv)(path)
    path.write_bytes(path.read_bytes()[:200] if name != "tsv" else bytes(range(256)) * 20)
    refused(lambda: open_chunks(folder).read(1), f"chunk_00001.{name}")


def test_chunks_with_other_genes(folder):
    sp.save_npz(folder / "chunk_00002.npz", cells(40, 8).X)
    refused(lambda: open_chunks(folder), "chunk_00002.npz", "8 columns, the first chunk has 7")
    chunks = write_chunks(cells(240), folder.parent / "two", 100)
    sp.save_npz(folder.parent / "two" / "chunk_00002.npz", cells(40, 8).X)  # changed after it was opened
    refused(lambda: chunks.read(2), "chunk_00002", "8 columns", "7 genes")


@pytest.mark.parametrize("text, said", [("a\nb\n", "2 names for 7"), ("a\n" * 7, "occurs before"), ("gene\n" + "".join(f"g{i}\n" for i in range(7)), "8 names for 7")])
def test_a_list_of_genes_that_does_not_fit(text, said, folder):
    (folder / "genes.txt").write_text(text)
    refused(lambda: open_chunks(folder), "genes.txt", said)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir(), (tmp_path / "x.h5ad").write_bytes(b"no"), (tmp_path / "y.loom").write_bytes(b"no")
    refused(lambda: open_chunks(tmp_path / "empty"), "no chunks", "write_chunks")
    refused(lambda: open_chunks(tmp_path / "nowhere"), "nowhere", "does not exist")
    refused(lambda: open_chunks(tmp_path / "x.h5ad"), "x.h5ad", "damaged")
    refused(lambda: open_chunks(tmp_path / "y.loom"), "Loom")
    refused(lambda: open_chunks(3), "int")
    refused(lambda: open_chunks([]), "list")
    refused(lambda: open_chunks(cells(), 0), "size")
    refused(lambda: open_chunks(cells(), layer="counts"), "counts", "X")
    adata = cells()
    adata.write_h5ad(tmp_path / "z.h5ad")
    refused(lambda: open_chunks(tmp_path / "z.h5ad", layer="counts"), "layers/counts", "X")
    refused(lambda: open_chunks(anndata.read_h5ad(tmp_path / "z.h5ad", backed="r")), "z.h5ad", "give the file itself")
    whole = (tmp_path / "z.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    refused(lambda: open_chunks(tmp_path / "cut.h5ad"), "cut.h5ad", "damaged")
    adata.var_names = ["g"] * 7
    refused(lambda: open_chunks(adata), "row 1", "'g'")


def test_writing_is_whole_or_nothing(tmp_path):
    adata = cells()
    adata.X.data[-1] = -1  # the last chunk cannot be read
    refused(lambda: write_chunks(adata, tmp_path / "set", 25), "negative")
    assert list(tmp_path.iterdir()) == []
    adata.X.data[-1] = 1
    (tmp_path / "set").mkdir()
    same(write_chunks(adata, tmp_path / "set", 25), adata)  # an empty folder is taken
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "set").iterdir())
    refused(lambda: write_chunks(adata, tmp_path / "set", 10), "not empty")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "set").iterdir()) == before and [p.name for p in tmp_path.iterdir()] == ["set"]
    refused(lambda: write_chunks(adata, tmp_path / "new", table="xlsx"), "xlsx")
    refused(lambda: write_chunks(adata, tmp_path / "set" / "genes.txt" / "new"), "cannot be written")


def test_a_file_is_cut_into_chunks(tmp_path):
    adata = cells()
    adata.write_h5ad(tmp_path / "a.h5ad")
    same(write_chunks(tmp_path / "a.h5ad", tmp_path / "set", 17), adata)


# pickles --------------------------------------------------------------------------------------------------------------

HERE, MARK = __name__, "GEARS_TEST_MARK"


def witness(*arguments):
    """What a hostile pickle calls: it leaves a mark in the environment."""
    os.environ[MARK] = "called"


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Box:
    call = staticmethod(witness)


class Sub(pd.DataFrame):
    """A table of a class of its own."""

    def __setstate__(self, state):
        witness()
        super().__setstate__(state)


class Builder:
    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        witness()


def objects(*members):
    out = np.empty(len(members), dtype=object)
    out[:] = members
    return out


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


TABLE = pd.DataFrame({"assay": pd.Categorical(["10x", "CEL-seq2", None]), "cells": [1, 2, 3], "line": ["K", None, "M"]}, index=["a", "b", "c"])
NOTED = TABLE.copy()
NOTED.attrs["note"] = Calls(witness)
CODE = f"__import__('sys').modules['{HERE}'].witness()"
IMPORT = f"cbuiltins\n__import__\n(S'{HERE}'\ntR".encode()
EVIL = {  # every one of these calls `witness` when it is unpickled
    "a function": pickle.dumps(Calls(witness)),
    "in a list beside a table": pickle.dumps([TABLE, Calls(witness)]),
    "in a cell": pickle.dumps(pd.DataFrame({"a": objects(1, Calls(witness))})),
    "in an array of objects": pickle.dumps(objects("x", Calls(witness))),
    "in the index": pickle.dumps(pd.DataFrame({"a": [1, 2]}, index=pd.Index(objects("x", Calls(witness))))),
    "in the attributes": pickle.dumps(NOTED),
    "in an argument": pickle.dumps(Calls(str, Calls(str, Calls(witness)))),
    "a subclass of a table": pickle.dumps(Sub({"a": [1]})),
    "a state": pickle.dumps(Builder()),
    "copyreg._reconstructor": pickle.dumps(Builder(), protocol=1),
    "copyreg._reconstructor, text": pickle.dumps(Builder(), protocol=0),
    "GLOBAL": f"c{HERE}\nwitness\n(tR.".encode(),
    "STACK_GLOBAL": b"\x80\x04" + short(HERE) + short("witness") + b"\x93)R.",
    "STACK_GLOBAL with a path": b"\x80\x04" + short(HERE) + short("Box.call") + b"\x93)R.",
    "INST": f"(i{HERE}\nwitness\n.".encode(),
    "OBJ": f"(c{HERE}\nwitness\no.".encode(),
    "eval": pickle.dumps(Calls(eval, CODE)),
    "exec": pickle.dumps(Calls(exec, CODE)),
    "getattr": b"cbuiltins\ngetattr\n(" + IMPORT + b"S'witness'\ntR(tR.",
    "functools.partial": pickle.dumps(Calls(functools.partial(witness))),
    "operator.methodcaller": pickle.dumps(Calls(operator.methodcaller("call"), Box)),
    "map": pickle.dumps(Calls(list, Calls(map, witness, [1]))),
    "EXT1": b"\x80\x02\x82\xfb)R.",
}


@pytest.fixture
def trap(tmp_path):
    """Reads content as a plain table; afterwards the mark must not be there."""
    path = tmp_path / "contexts.pkl"
    os.environ.pop(MARK, None)
    copyreg.add_extension(HERE, "witness", 0xFB)

    def read(content):
        path.write_bytes(content)
        return read_plain_pickle(path)

    yield read
    copyreg.remove_extension(HERE, "witness", 0xFB)
    copyreg.clear_extension_cache()
    assert os.environ.pop(MARK, None) is None, "a pickle was obeyed"


@pytest.mark.parametrize("name", EVIL)
def test_a_hostile_pickle_is_not_obeyed(name, trap):
    pickle.loads(EVIL[name])  # pickle obeys: the trap is real, and what it caches is there now
    assert os.environ.pop(MARK) == "called"
    refused(lambda: trap(EVIL[name]), "contexts.pkl", "to_parquet", "nothing was run")


@pytest.mark.parametrize("maker", [lambda path: Calls(pd.read_pickle, path), lambda path: Calls(np.load, path, None, True), lambda path: Calls(pd.eval, CODE)])
def test_a_pickle_does_not_open_another_one(maker, trap, tmp_path):
    (tmp_path / "inner.pkl").write_bytes(EVIL["a function"])
    if maker("").function is not pd.eval:  # pandas refuses this text; others have got through
        pickle.loads(pickle.dumps(maker(str(tmp_path / "inner.pkl"))))
        assert os.environ.pop(MARK) == "called"
    refused(lambda: trap(pickle.dumps(maker(str(tmp_path / "inner.pkl")))), "asks for", "nothing was run")


def raw(module, name):
    return f"c{module}\n{name}\n".encode()


ODD = {  # nothing but allowed names, or none; a reader that called them would be misled, changed or filled up
    "an allowed module with a path": b"\x80\x04" + short("pandas.core.frame") + short("DataFrame.query") + b"\x93)R.",
    "an attribute set on a class": raw("pandas.core.frame", "DataFrame") + b"(N}S'query'\nI1\nstb.",
    "an attribute set on a function": raw("pandas.core.indexes.base", "_new_Index") + b"}S'__defaults__'\n)sb.",
    "any codec": raw("_codecs", "encode") + b"(S'x'\nS'rot13'\ntR.",
    "a scalar of objects": raw("numpy.core.multiarray", "scalar") + b"(" + raw("numpy", "dtype") + b"(S'O8'\ntRS'x'\ntR.",
    "a type and no object": raw("pandas.core.frame", "DataFrame") + b".",
    "an object from outside": b"\x80\x02N\x8c\x01aQ.",
    "an object from outside, text": b"Pname\n.",
    "a place far out in memory": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "a text of a terabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "bytes of a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a million columns of nothing": pickle.dumps(pd.DataFrame(np.empty((0, 10**6)))),
    "a number": pickle.dumps(3), "a list": pickle.dumps([1]), "a series": pickle.dumps(TABLE["cells"]), "an array": pickle.dumps(np.ones(3)),
    "dates": pickle.dumps(TABLE.assign(day=pd.Timestamp("2020-01-01"))), "intervals": pickle.dumps(TABLE.assign(part=pd.cut([1, 2, 3], 2))),
    "complex numbers": pickle.dumps(TABLE.assign(z=[1j, 2, 3])), "nested columns": pickle.dumps(TABLE.set_index(["cells", "line"])),
    "lists in cells": pickle.dumps(TABLE.assign(z=[[1], [2], [3]])), "records": pickle.dumps(np.zeros(2, dtype=[("a", int)])),
    "nothing": b"", "no pickle": b"assay,line\n10x,K\n", "half a pickle": pickle.dumps(TABLE)[:400], "zipped": gzip.compress(pickle.dumps(TABLE)),
}


@pytest.mark.parametrize("name", ODD)
def test_a_pickle_that_holds_no_plain_table(name, trap):
    before = pd.DataFrame.query, pd.core.indexes.base._new_Index.__defaults__
    refused(lambda: trap(ODD[name]), "contexts.pkl")
    assert before == (pd.DataFrame.query, pd.core.indexes.base._new_Index.__defaults__)


def test_parts_of_a_true_table_put_together_wrongly(trap):
    whole = pickle.dumps(TABLE, protocol=4)
    trap(whole)
    changed = 0
    for place in range(20, len(whole) - 1, 7):  # whatever a byte turns into: an error of one line, or a table
        try:
            found = trap(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        except InputError:
            changed += 1
        else:
            assert isinstance(found, pd.DataFrame) and type(found) is pd.DataFrame
    assert changed > 100


VALUES = {
    "int": st.integers(-(2**40), 2**40), "float": st.floats(allow_infinity=False) | st.none(), "bool": st.booleans(), "text": st.text(max_size=6) | st.none(),
    "category": st.sampled_from(["10x", "CEL-seq2", "Drop-seq"]) | st.none(), "Int64": st.integers(-9, 9) | st.none(), "boolean": st.booleans() | st.none(),
    "Float64": st.floats(-9, 9) | st.none(), "int8": st.integers(-9, 9), "float32": st.floats(-9, 9, width=32),
}


@st.composite
def frames(draw):
    n = draw(st.integers(1, 6))
    kinds = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=5))
    columns = {f"{kind} {i}": pd.Series(draw(st.lists(VALUES[kind], min_size=n, max_size=n)), dtype={"text": object, "int": "int64", "float": "float64"}.get(kind, kind)) for i, kind in enumerate(kinds)}
    index = draw(st.sampled_from([pd.RangeIndex(n), pd.Index([f"c{i}" for i in range(n)]), pd.Index(np.arange(n) * 1.5), pd.Index(np.arange(n)[::-1])]))
    return pd.DataFrame(columns).set_axis(index, axis=0), draw(st.integers(2, 5))


@settings(max_examples=40)
@given(frames())
def test_plain_tables_come_back_as_they_were(tmp_path_factory, drawn):
    table, protocol = drawn
    path = tmp_path_factory.mktemp("p") / "t.pkl"
    table.to_pickle(path, protocol=protocol)
    pd.testing.assert_frame_equal(read_plain_pickle(path), table)


# written by pandas 1.5 (with an index of integers) and pandas 3.1: other names for the same parts
OLD = (
    'c-oCrO>fgc5RGG-mKH<-0R^fG353F-QHv1e0HQRZQfmkjA2+Ji+TLWXI8N|~+DKHuA*GS#)}g<JpT@1s+75AOQSrgE_Rj2k^JZqhnm;zoQu@H<9uHg|Rh@1qs?Csh1j6|`kNHNrKEwy#a1SeBuudyP'
    'SS-4GK`g?6`%$&S1Ktv0gm7Wq?>g<***Aq(;Cddye9w-?F$kAf67)Q$?F(kBAo7N*6V5ygd7nHN80+<S$L@{#3$?S(owjgQ*aWRCs_O7qw7Q|^a35i|R`@!^t)Cx1Tx@*Dw+J_jp>Evoi6}P+bA_n7'
    '`Zv~NW^}yro1aw06}xnZ%_Gush6Q4WZK{71EN_81TBoYIq%^{{AnEk_S$HS$V=qmC#AKmxx<M3&i4&_l&D0TLir`Y0L$pc*tZ6o?WGa?sl?N#Af$8RSq5S3v4iB<j9kkEbXf(Et=}BMK^BC>nHc`=6'
    'mUj`RYcF3dMdH&#6tn?GpqikO>?@_Fx}hsV5`380aHT+*mVz`Qm02_FcI>3t%xZt6XI)m(j!P()pzN)TxyY4CCM5#2^Z|la!<bz5C?y-F?ZhKN0#ezGe9sYS%9N+3j<L$>EobGk%F%p|RnF}Q+sJK3'
    'U_y+icnSs0()Ur;6$NQ2LH`YvKWmx!^(C`&YbjK-043j_2~@W9zku$_`>MFIGAeBru&m0}0Br|lpo&DXx@DXsIm*AJWvSa|X+O!wu*~9_F%qg=kc-r|^3F+a<{)PVCXXW3yjp;u(=C8t_+FrlE4Z8X'
    'm0ZnQN-n_d(?;h{L(Oak@#9B@i6Q9!D)l?nNqH`-a+sotw2KW!lR<Z!n!M3{$2ubB=_qbfoAEfNn`{r^9BcZ#l`d~^-|y~3%uRaKgf#lh=eD3*>>x_)>Tjw|_yP')
NEW = (
    'c-oy*-%r#)5We2E{8S_%L1PH&gXWBS0n`K&6OcoURL(?RC7W%#ciYfw&vqNQC_x`UNcPQ<|HD7cH{Nh|+j4iPA-WH{+s@2>-+VhepRMmdtdbsbs6#`KCLl*wsi12yZ8P`=_rJg%RHaGUtr+BN=2LT{'
    'nAQAHusEbaQft$Ywpfg@S5|_^-QLK)F}y0L^AHmFPST43d5xrD$9J~_MjRD{-g0WdnZ_~gqUQ`Do$hYWy|Ma2SyrgK%{&a_B{^QFg0-U9cWHos)^82{G#g*xow7~#*;Ylj)0ftmo0}NI+!##GW4kP='
    'IW%D)$4JO_$ZPd4!?TLL7RN)ufKSM)`3VK_@l6r?VN0{U$SSuLgi!vj;86&#_D{15IYd7>9j5J0w?;Ilb{Ys@pN&G3n7L7yh&XkHinp{U$YErV<JqMHs2dI_#HwxB<pbakrR5cn<+qD)e3V%$()a|8'
    'Mq~X9ho0;u0nYIj=2w}Y+XXpNfBEK7!aghjL&G6B(hOCNG*ZoUIEp<M<9!^bj-2YJjeCaTqa36eM{Or<HnZ9|F-!R{&Pu?a%CbM-BgCH#(kUUTZ61I$>LAcXF&J@DA2kV4YbyzSm+7oARYM(Om$la8'
    'e64zNyFkj<a=upbwV;yG7|`W8{DFvJn}@(R6cN6uwEa6|HcprF&2s*|pRJS28nW33$=_cJShgz{04MmJzWTb$?+p|Zf52<19Qa&O45%bu)YogIy`q!G4)Blp1tU(yHh)jdJlE35^l~n{wn6fyZS@~2'
    '09o*xd<NeVpZ(`Vtn)-Hnk4FN7$L|CHXx8@;D>7Q81;&><;z*c{y$<*y0SZu&&XX+(_=L~xroB_<1h)nIqa;eQ8aaDm7}E11l65m3#*q3f&Ft2`v7SMw57M#X%Iv^3Gvbn);4x35>SU>?>tIUr}hh!'
    'E*(n')


def test_tables_of_other_versions_of_pandas(trap):
    old, new = (trap(zlib.decompress(base64.b85decode(text))) for text in (OLD, NEW))
    assert new.index.tolist() == ["c1", "c2", "c3", "c4"] and old.index.tolist() == [2, 3, 4]
    for table, rows in ((new, slice(0, 4)), (old, slice(1, 4))):
        assert words(table["assay"]) == ["10x", "CEL-seq2", "", "10x"][rows] and isinstance(table["assay"].dtype, pd.CategoricalDtype)
        assert table["n"].tolist() == [1, 2, 3, 4][rows] and words(table["age"]) == ["1.5", "2", "", "4"][rows]
        assert words(table["line"]) == ["u", "", "w", "w"][rows] and table["dead"].tolist() == [True, False, True, False][rows]


def test_the_allowed_names_name_no_function_that_acts():
    for name in ALLOWED:
        module, _, last = name.rpartition(".")
        assert module not in ("os", "posix", "sys", "subprocess", "builtins.eval", "importlib", "operator", "functools") and last not in dir(builtins) or last == "slice", name


# fields ---------------------------------------------------------------------------------------------------------------

def table_of(**columns):
    """An AnnData with these columns; every cell has the counts 1, 2, 3."""
    n = len(next(iter(columns.values())))
    return anndata.AnnData(np.tile(np.float32([1, 2, 3]), (n, 1)), obs=pd.DataFrame(columns, index=[f"c{i}" for i in range(n)]))


LABELS = st.lists(st.tuples(st.sampled_from(["A", "B", "C", " A", None]), st.sampled_from(["x", "y", "z", "unknown"])), min_size=12, max_size=60)


@settings(max_examples=40)
@given(LABELS, st.integers(1, 8), st.integers(1, 70), st.randoms())
def test_vocabulary_and_combinations_are_those_of_a_plain_count(rows, rare, size, random):
    adata = table_of(a=[r[0] for r in rows], b=[r[1] for r in rows])
    try:
        found = prepare(open_chunks(adata, size), ["a", "b"], rare=rare)
    except InputError:
        return
    clean = pd.DataFrame({"a": [UNKNOWN if r[0] is None else r[0].strip() for r in rows], "b": [r[1] for r in rows]})
    for field in found.fields:
        known = clean[field.name][clean[field.name] != UNKNOWN].value_counts()
        pool = [name for name in known.index if known[name] < rare]
        pool = sorted(pool) if len(pool) > 1 else []
        clean[field.name] = clean[field.name].replace(dict.fromkeys(pool, RARE))
        counts = clean[field.name].value_counts()
        assert field.categories == (UNKNOWN, *sorted(set(known.index) - set(pool)), *([RARE] if pool else [])) and field.pooled == tuple(pool)
        assert field.counts == tuple(int(counts.get(name, 0)) for name in field.categories) and sum(field.counts) == len(rows)
    joint = clean.value_counts()
    assert {tuple(row): cells for row, cells in zip(found.decode(found.contexts).to_numpy().tolist(), found.cells.tolist())} == joint.to_dict()
    labels = found.encode(adata.obs)
    assert found.decode(labels).equals(clean[["a", "b"]].astype(object)) and not found.distance(labels).any()
    order = list(range(len(rows)))
    random.shuffle(order)
    assert prepare(open_chunks(adata[order].copy(), 7), ["a", "b"], rare=rare).digest == found.digest  # the order of cells does not matter


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 25), st.floats(0, 0.6))
def test_scale_and_genes_do_not_depend_on_chunks(seed, size, n_genes, min_share):
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.3, 2, 30), (50, 30)).astype(np.float32)
    X[X.sum(1) == 0, 0] = 1
    adata = anndata.AnnData(sp.csr_matrix(X), obs=pd.DataFrame({"a": rng.choice(["x", "y"], 50)}, index=[f"c{i}" for i in range(50)]))
    found = prepare(open_chunks(adata, size), rare=1, n_genes=n_genes, min_share=min_share)
    assert found.target_sum == np.median(X.sum(1)) and found.digest == prepare(open_chunks(adata, 50), rare=1, n_genes=n_genes, min_share=min_share).digest
    seen = np.flatnonzero((X > 0).sum(0) >= max(min_share * 50, 1))
    variance = np.log1p(X * (1e4 / X.sum(1, dtype=np.float64)[:, None])).var(0)
    assert set(found.columns) <= set(seen) and len(found.columns) == min(n_genes, len(seen)) and (np.diff(found.columns) > 0).all()
    left = np.setdiff1d(seen, found.columns)
    assert not len(left) or variance[left].max() <= variance[found.columns].min() + 1e-8
    whole = np.asarray(normalise(adata.X, found.target_sum)[:, found.columns].toarray())
    assert np.allclose(found.values(adata.X).toarray(), whole, rtol=1e-6) and found.values(adata.X).dtype == np.float32
    assert found.genes == tuple(adata.var_names[found.columns]) and np.array_equal(adata.X.toarray(), X)


def test_the_ranking_of_genes_is_that_of_the_other_chapters():
    adata = cells(300, 20)
    found = prepare(open_chunks(adata, 70), n_genes=8, min_share=0)
    assert np.array_equal(found.columns, highly_variable(normalise(adata.X, 1e4), np.zeros(300), 8))


def test_logarithms_stay_as_they_are_and_kinds_are_not_mixed():
    adata = cells(60)
    logs = anndata.AnnData(normalise(adata.X), obs=adata.obs)
    found = prepare(open_chunks(logs, 20), rare=2, min_share=0)
    assert found.target_sum is None and np.array_equal(found.values(logs.X).toarray(), logs.X.toarray()) and any("logarithms" in note for note in found.notes)
    mixed = anndata.AnnData(sp.vstack([adata.X[:20], logs.X[20:]], format="csr"), obs=adata.obs)
    refused(lambda: prepare(open_chunks(mixed, 20), rare=2), "fractions", "before whole numbers")
    refused(lambda: prepare(open_chunks(anndata.AnnData(logs.X * 50, obs=adata.obs)), rare=2), "neither counts nor logarithms")
    refused(lambda: prepare(open_chunks(anndata.AnnData(adata.X * 0, obs=adata.obs)), rare=2), "without counts")
    counted = prepare(open_chunks(adata, 20), rare=2)
    refused(lambda: counted.values(logs.X), "prepared were counts")
    refused(lambda: counted.values(adata.X[:, :3]), "3 columns")


def test_cells_without_counts_stay_zero_and_are_noted():
    adata = cells(40)
    adata.X.data[adata.X.indptr[5] : adata.X.indptr[8]] = 0  # stored zeros
    found = prepare(open_chunks(adata), rare=2)
    assert not found.values(adata.X)[5:8].toarray().any() and np.isfinite(found.values(adata.X).data).all() and found.target_sum == np.median(np.delete(adata.X.toarray().sum(1), [5, 6, 7]))
    assert any("3 cells without counts" in note for note in found.notes)


def test_which_columns_are_fields_by_themselves():
    n = 1000
    rng = np.random.default_rng(0)
    columns = {"assay": rng.choice(["10x", "CEL-seq2"], n), "dead": rng.random(n) < 0.5, "cluster": pd.Categorical(rng.choice(list("123"), n)), "barcode": [f"b{i}" for i in range(n)],
               "umis": rng.integers(0, 9, n), "score": rng.random(n), "number as text": rng.choice(["1", "2"], n), "organ": "liver", "empty": [None] * n,
               "well": [f"w{i % 300}" for i in range(n)], "tiny": [f"t{i % 190}" for i in range(n)], "pair": ["twin", *["other"] * (n - 1)]}
    found = prepare(open_chunks(table_of(**columns), 300))
    assert [field.name for field in found.fields] == ["assay", "dead", "cluster", "pair"] and found.fields[1].categories == ("unknown", "False", "True")
    told = "\n".join(found.notes)
    for name, reason in {"barcode": "more than 200", "umis": "numbers", "score": "more than 200", "number as text": "numbers", "organ": "one category", "empty": "no known label",
                         "well": "more than 200", "tiny": "no two categories with 10"}.items():
        assert any(f"'{name}'" in note and reason in note for note in found.notes), (name, told)
    asked = prepare(open_chunks(table_of(**columns), 300), ["well", "umis"], rare=1)
    assert [len(field) for field in asked.fields] == [301, 10] and asked.fields[1].categories[1:3] == ("0", "1")


def test_fields_that_are_none_are_refused_when_asked_for():
    adata = table_of(barcode=[f"b{i}" for i in range(30)], organ=["liver"] * 30, empty=[None] * 30, assay=["10x"] * 15 + ["CEL"] * 15, few=[f"f{i // 3}" for i in range(30)])
    for name, reason in {"barcode": "identifier", "organ": "one category", "empty": "no known label", "few": "no two categories with 10"}.items():
        refused(lambda name=name: prepare(open_chunks(adata), ["assay", name]), f"'{name}'", reason)
    refused(lambda: prepare(open_chunks(adata[:, :][:, :]), []), "fields")
    refused(lambda: prepare(open_chunks(adata), "assay"), "list")
    refused(lambda: prepare(open_chunks(adata), ["assay", "assay"]), "different")
    refused(lambda: prepare(open_chunks(adata), ["essay"]), "'essay'", "assay")
    refused(lambda: prepare(open_chunks(adata), ["assay"], rare=0), "rare")
    refused(lambda: prepare(open_chunks(adata), ["assay"], n_genes=0), "n_genes")
    refused(lambda: prepare(open_chunks(adata), ["assay"], min_share=1.5), "min_share")
    refused(lambda: prepare(open_chunks(table_of(organ=["liver"] * 9))), "no column", "organ")


def test_words_that_differ_in_case_are_two_and_a_warning():
    adata = table_of(assay=["10x"] * 15 + ["10X"] * 15 + [" 10x "] * 5)
    with pytest.warns(GearsWarning, match="'10X', '10x' differ in case only"):
        found = prepare(open_chunks(adata, 10))
    assert found.fields[0].categories == ("unknown", "10X", "10x") and found.fields[0].counts == (0, 15, 20)


def test_a_pool_of_one_and_a_pool_of_the_users_own():
    assert make_field("a", {"A": 50, "B": 2}, 0, 10) == Field("a", ("unknown", "A", "B"), (0, 50, 2))
    own = make_field("a", {"A": 50, "B": 2, "rare": 30}, 1, 10)
    assert own.categories == ("unknown", "A", "rare") and own.counts == (1, 50, 32) and own.number["B"] == own.number["rare"] == 2
    assert make_field("a", {"A": 50, "rare": 30}, 0, 10).categories == ("unknown", "A", "rare")


def test_unseen_labels_have_a_row_and_a_remedy(tmp_path):
    adata = table_of(line=["K"] * 20 + ["M"] * 20 + ["P"] * 3 + ["Q"] * 3, assay=["10x", "CEL"] * 23)
    found = prepare(open_chunks(adata))
    new = pd.DataFrame({"line": ["K", "Q", "rare", None, "M2", "X"], "assay": ["10x", "CEL", "N/A", "", "10x", "10x"]})
    assert found.encode(new[:4]).tolist() == [[1, 1], [3, 2], [3, 0], [0, 0]]
    refused(lambda: found.encode(new, "new.csv", first=100), "new.csv", "row 104", "column 'line'", "'M2'", "prepare and train again", "unknown='pool'")
    assert found.encode(new, unknown="pool").tolist()[4:] == [[0, 1], [0, 1]]
    refused(lambda: found.encode(new[["line"]][:4], "new.csv"), "'assay'", "absent")
    refused(lambda: found.encode(new[:4], unknown="drop"), "drop")
    refused(lambda: found.decode(np.array([[1, 9]])), "(1, 2)")
    refused(lambda: found.decode(np.array([1, 1])), "(2,)")
    refused(lambda: found.distance(np.array([[0.5, 1]])), "(1, 2)")


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from("xy"), st.sampled_from("123")), min_size=20, max_size=40), st.integers(0, 2**31))
def test_distance_is_the_number_of_fields_that_differ_from_the_nearest(rows, seed):
    columns = [pd.Categorical([row[i] for row in rows]) for i in range(3)]
    try:
        found = prepare(open_chunks(table_of(a=columns[0], b=columns[1], c=columns[2])), ["a", "b", "c"], rare=1)
    except InputError:
        return
    asked = np.stack([np.random.default_rng(seed + i).integers(0, size, 30) for i, size in enumerate(found.sizes)], axis=1)
    seen = found.encode(table_of(a=columns[0], b=columns[1], c=columns[2]).obs)
    assert found.distance(asked).tolist() == [min(sum(x != y for x, y in zip(row, other)) for other in seen.tolist()) for row in asked.tolist()]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=14))
def test_dependences_are_those_of_a_plain_search(pairs):
    fields = [make_field("a", dict.fromkeys("ABCD", 20), 0, 10), make_field("b", dict.fromkeys("xyz", 20), 0, 10)]
    contexts = np.unique(np.array(pairs), axis=0)
    def function(i, j):
        goes = {}
        for row in contexts.tolist():
            goes.setdefault(row[i], set()).add(row[j])
        return len(goes) > 1 and all(len(v) == 1 for v in goes.values()) and len(set.union(*goes.values())) > 1
    expected = [("a", "b")] * function(0, 1) + [("b", "a")] * function(1, 0)
    assert dependences(fields, contexts) == expected


def test_what_is_kept_in_a_folder(tmp_path):
    adata = cells(80)
    found = prepare(open_chunks(adata, 30), ["assay", "line", "age"], rare=3, n_genes=4)
    path = save(found, tmp_path / "run")
    again = load(tmp_path / "run")
    assert path.name == "contexts.json" and again.digest == found.digest == pickle.loads(pickle.dumps(found)).digest
    for name in ("fields", "genes", "target_sum", "inputs", "notes", "sizes"):
        assert getattr(again, name) == getattr(found, name), name
    for name in ("columns", "contexts", "cells"):
        assert np.array_equal(getattr(again, name), getattr(found, name)) and getattr(again, name).dtype == np.int64, name
    assert np.array_equal(again.encode(adata.obs), found.encode(adata.obs))
    text = path.read_text()
    data = next((tmp_path / "run").glob("*.safetensors"))
    for spoil, said in ((lambda: path.write_text(text.replace('"K"', '"L"')), "damaged"), (lambda: path.write_text(text[:-60]), "damaged"),
                        (lambda: (path.write_text(text), data.write_bytes(data.read_bytes()[:-1])), "damaged"), (lambda: data.unlink(), "damaged"), (lambda: path.unlink(), "does not exist")):
        spoil()
        refused(lambda: load(tmp_path / "run"), said)


def test_every_part_is_in_the_digest():
    import dataclasses
    found = prepare(open_chunks(cells(80), 30), ["assay", "line"], rare=3)
    line = found.fields[1]
    for change in ({"fields": (found.fields[0], dataclasses.replace(line, categories=("unknown", "K", "M", "X")))}, {"fields": (found.fields[0], dataclasses.replace(line, pooled=("X",)))},
                   {"genes": ("other", *found.genes[1:])}, {"target_sum": 1.0}, {"cells": found.cells + 1}, {"contexts": found.contexts[::-1]}, {"inputs": ("other", *found.inputs[1:])}):
        assert dataclasses.replace(found, **change).digest != found.digest, change
    assert dataclasses.replace(found, notes=()).digest == found.digest


def test_chunks_with_other_genes_or_columns_are_refused():
    adata = cells(80)
    found = prepare(open_chunks(adata), ["assay", "line"], rare=2)
    found.check(open_chunks(adata, 7))
    refused(lambda: found.check(open_chunks(adata[:, ::-1].copy())), "differ first at number 0")
    refused(lambda: found.check(open_chunks(adata[:, :5].copy())), "5 genes, prepared were 7")
    other = adata.copy()
    del other.obs["line"]
    refused(lambda: found.check(open_chunks(other)), "'line'")


MIXOLOGY = "multicontext_mixology/multicontext_sc_mixology.h5ad"


@pytest.mark.skipif(data_root() is None or not (data_root() / MIXOLOGY).is_file(), reason="needs the data set multicontext_mixology")
def test_sex_of_a_cell_line_is_found_to_be_a_function_of_the_line():
    chunks = open_chunks(data_root() / MIXOLOGY, 300)
    found = prepare(chunks, ["assay", "cell_type", "sex"], n_genes=1000)
    assert any("sex is a function of cell_type" in note for note in found.notes) and found.target_sum is not None
    assert found.cells.sum() == chunks.sizes.sum() == 1408 and len(found.genes) == 1000
    whole = anndata.read_h5ad(data_root() / MIXOLOGY)
    assert found.target_sum == np.median(np.asarray(whole.X.sum(1)).ravel()) and not found.distance(found.encode(whole.obs)).any()
    assert found.digest == prepare(open_chunks(whole, 5000), ["assay", "cell_type", "sex"], n_genes=1000).digest
