"""What comes in: vectors of genes from files, genes matched to them, and tables of several species."""
from __future__ import annotations

import os
import pickle
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data.registry import data_root
from gears_nb.saturn.species import UNLABELLED, Embeddings, _match, gather_species, read_embeddings

GENES = [f"G{i}" for i in range(60)]


def table(X, genes=GENES, **obs):
    X = X if sp.issparse(X) else np.asarray(X)
    return anndata.AnnData(X, obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(X.shape[0])]), var=pd.DataFrame(index=list(genes)))


def counts(n=30, g=60, seed=0, strength=2.0):
    rng = np.random.default_rng(seed)
    return rng.poisson(strength * np.exp(rng.normal(size=g)) * rng.gamma(1.0, 1.0, (n, g))).astype(np.float32) + np.eye(n, g, dtype=np.float32)


def vectors(genes=GENES, p=5, seed=0, name="toy"):
    return Embeddings(np.array(genes), np.random.default_rng(seed).normal(size=(len(genes), p)).astype(np.float32), name)


def pair(**more):
    return {"human": table(counts(), cell_type=["a", "b"] * 15), "mouse": table(counts(seed=1), cell_type=["a", "c"] * 15)} | more


BOTH = {"human": vectors(), "mouse": vectors(seed=1)}


# files

def written(folder, kind, genes, V, species=None):
    """The same vectors in one kind of file."""
    path = folder / f"e{kind}"
    more = {} if species is None else {"species": np.array(species)}
    if kind == ".npz":
        np.savez(path, gene=np.array(genes), narrow=V[:, :1], wide=V, length=np.arange(len(V)), **more)
    elif kind in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            file["symbol"], file["wide"] = list(genes), V
            if species is not None:
                file["species"] = list(species)
    elif kind in (".pt", ".pth"):
        torch.save({"genes": list(genes), "wide": torch.tensor(V)} | ({} if species is None else {"species": list(species)}), path)
    else:
        frame = pd.DataFrame(V, columns=[f"d{i}" for i in range(V.shape[1])]).assign(**more)
        frame.insert(0, "gene", list(genes))
        frame = frame if kind == ".csv" else frame.set_index("gene")
        frame.to_parquet(path) if kind == ".parquet" else frame.to_csv(path, index=kind != ".csv", sep="\t" if "tsv" in kind else ",")
    return path


@pytest.mark.parametrize("kind", [".npz", ".h5", ".hdf5", ".pt", ".pth", ".csv", ".csv.gz", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same(kind, tmp_path):
    """Names, averaged rows, order and species, against a pandas group-by."""
    rng = np.random.default_rng(0)
    genes, species = [f"Z{i % 7}" for i in range(20)], ["human"] * 13 + ["mouse"] * 7
    V = rng.normal(size=(20, 3)).astype(np.float32)
    got = read_embeddings(written(tmp_path, kind, genes, V, species), species="HUMAN")
    expected = pd.DataFrame(V[:13]).groupby(genes[:13], sort=False).mean()
    assert got.genes.tolist() == expected.index.tolist() and got.vectors.dtype == np.float32
    assert np.allclose(got.vectors, expected, atol=1e-6)
    plain = read_embeddings(written(tmp_path, kind, GENES, np.arange(180, dtype=np.float32).reshape(60, 3)), species="anything")
    assert plain.genes.tolist() == GENES and np.array_equal(plain.vectors[7], [21, 22, 23])


@pytest.mark.parametrize("kind", ["npz", "h5", "pt"])
def test_one_array_a_gene(kind, tmp_path):
    path, arrays = tmp_path / f"e.{kind}", {"B": np.array([1.0, 2.0], np.float32), "A": np.array([[3.0, 4.0]], np.float16)}
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            for gene, a in arrays.items():
                file[gene] = a
    else:
        torch.save({g: torch.tensor(a, dtype=torch.bfloat16, requires_grad=True) for g, a in arrays.items()}, path)
    got = read_embeddings(path)
    assert dict(zip(got.genes.tolist(), got.vectors.tolist())) == {"B": [1, 2], "A": [3, 4]}


def test_field_and_the_widest(tmp_path):
    path = written(tmp_path, ".npz", GENES, np.ones((60, 4)))
    assert read_embeddings(path).vectors.shape == (60, 4) and read_embeddings(path, field="narrow").vectors.shape == (60, 1)
    np.savez(tmp_path / "whole.npz", gene=np.array(["A", "B"]), whole=np.arange(6).reshape(2, 3))
    assert read_embeddings(tmp_path / "whole.npz", field="whole").vectors.tolist() == [[0, 1, 2], [3, 4, 5]]


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12), st.integers(0, 5))
def test_rows_of_a_gene_are_averaged(names, seed):
    """Against a dict of lists; the order is that of first appearance, and reading tidied vectors again changes nothing."""
    V = np.random.default_rng(seed).normal(size=(len(names), 2))
    rows = {}
    for name, v in zip(names, V):
        rows.setdefault(name, []).append(v)
    genes = np.array(names + GENES)
    own = Embeddings(genes, np.r_[V, np.ones((60, 2))], "own")
    tables = {s: table(counts(g=len(rows) + 60), [*rows, *GENES]) for s in ("x", "y")}
    got, _ = gather_species(tables, {"x": own, "y": own}, label_key=None)
    assert got.genes.tolist() == [*rows, *GENES]
    assert np.allclose(got.vectors[: len(rows)], [np.mean(v, axis=0) for v in rows.values()], atol=1e-6)


def test_rows_that_say_nothing_are_dropped_aloud(tmp_path):
    V = np.ones((5, 2), np.float32)
    V[1, 0], V[2, 1] = np.nan, np.inf
    np.savez(tmp_path / "e.npz", gene=np.array(["A", "B", "C", "", "E"]), v=V)
    with pytest.warns(GearsWarning, match="3 of 5 rows dropped .2 with numbers that are not finite, 1 without a name"):
        assert read_embeddings(tmp_path / "e.npz").genes.tolist() == ["A", "E"]


class Trap:
    """Makes a folder when a pickle of it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["npz", "npz_whole", "pt", "pth_old"])
def test_no_pickle_is_loaded(kind, tmp_path):
    sprung, path = tmp_path / "sprung", tmp_path / f"e.{kind.split('_')[0]}"
    if kind == "npz":
        np.savez(path, gene=np.array(["A", Trap(sprung)], dtype=object), v=np.ones((2, 2)))
    elif kind == "pt":
        torch.save({"A": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps({"A": Trap(sprung)}))
    with pytest.raises(InputError, match="pickle"):
        read_embeddings(path)
    assert not sprung.exists()


def _bad(folder):
    """Files that cannot be used, with a part of the message."""
    np.savez(folder / "short.npz", gene=np.array(["A"]), v=np.ones((2, 2)))
    np.savez(folder / "members.npz", gene=np.array(["A", "B"]), v=np.ones((2, 2)), species=np.array(["human"]))
    np.savez(folder / "nameless.npz", v=np.ones((2, 2)))
    np.savez(folder / "whole.npz", gene=np.array(["A", "B"]), v=np.ones((2, 2), int))
    np.savez(folder / "nothing.npz", gene=np.array(["A", "B"]), v=np.full((2, 2), np.nan))
    np.savez(folder / "empty.npz")
    np.save(folder / "array.npy", np.ones(3))
    (folder / "array.npy").rename(folder / "array.npz")
    (folder / "noise.h5").write_bytes(b"no file of this kind")
    (folder / "cut.npz").write_bytes((folder / "short.npz").read_bytes()[:200])
    (folder / "numbers.csv").write_text("d0,d1\n0.5,1\n0.25,2\n")
    (folder / "text.csv").write_text("gene,uniprot,d0\nA,P1,1.5\n")
    (folder / "e.xlsx").write_text("")
    torch.save({"A": torch.ones(2), "B": torch.ones(3)}, folder / "uneven.pt")
    torch.save(torch.ones(3), folder / "bare.pt")
    return {"missing.npz": "not found", "e.xlsx": "ending '.xlsx' is not known", "short.npz": "2 rows for 1 gene names", "members.npz": "species: has 1 rows for 2",
            "nameless.npz": "no gene names .arrays: v .2, 2.", "whole.npz": "no array of two dimensions", "nothing.npz": "none of the 2 rows", "empty.npz": "no gene names",
            "array.npz": "cannot be read", "noise.h5": "cannot be read", "cut.npz": "cannot be read", "numbers.csv": "no gene names .the first is '0.5'",
            "text.csv": "column 'uniprot'.*text", "uneven.pt": "2 numbers for A, 3 for B", "bare.pt": "no gene names"}


def test_bad_files_are_refused_in_one_line(tmp_path):
    for name, part in _bad(tmp_path).items():
        with pytest.raises(InputError, match=part) as caught:
            read_embeddings(tmp_path / name)
        assert "\n" not in str(caught.value) and "Remedy:" in str(caught.value), name
    path = written(tmp_path, ".npz", ["A", "A"], np.ones((2, 2)), ["human", "mouse"])
    for how, part in (({}, "holds 2 species .human, mouse"), ({"species": "rat"}, "no row is of 'rat' .there: human, mouse"),
                      ({"species": "human", "field": "esm"}, "no array 'esm'.*field='wide'|no array 'esm'.*field=wide")):
        with pytest.raises(InputError, match=part):
            read_embeddings(path, **how)


# matching

def reference(names, genes):
    """The rules of the page, gene by gene and slowly."""
    def bare(name):
        return name.split(".")[0] if name.startswith("ENSG") else name

    def only(key, name):
        here, there = [n for n in names if key(n) == key(name)], [g for g in genes if key(g) == key(name)]
        return there[0] if len(here) == len(there) == 1 else None

    return [name if name in genes else only(str.casefold, name) or only(bare, name) for name in names]


WORDS = st.lists(st.sampled_from(["Ab", "AB", "ab", "Cd", "CD", "ENSG00000000001", "ENSG00000000001.1", "ENSG00000000001.2", "ENSG00000000002.4", "ENSG00000000002",
                                  "H2.1", "H2"]), unique=True, min_size=1, max_size=8)


@given(WORDS, WORDS)
def test_matching_follows_the_rules(names, genes):
    row, how = _match(names, genes)
    expected = reference(names, genes)
    # a vector that a gene has as written is not given to a second one
    expected = [None if e is not None and e != n and e in names else e for n, e in zip(names, expected)]
    assert [genes[r] if r >= 0 else None for r in row] == expected
    assert len({r for r in row if r >= 0}) == (row >= 0).sum()
    assert all((h in ("as written", "case", "version removed")) == (r >= 0) for r, h in zip(row, how))


def test_names_in_a_column_of_var():
    """Ensembl identifiers in the table and symbols in the file: `gene_name` speaks; a symbol of two identifiers is ambiguous."""
    tables = pair()
    own = tables["human"]
    own.var["gene_name"] = [*GENES[:58], "G7", "other"]
    own.var_names = [f"ENSG{i:011d}" for i in range(60)]
    human, _ = gather_species(tables, BOTH)
    assert human.g == 57 and human.genes[0] == "ENSG00000000000" and np.array_equal(human.vectors[0], BOTH["human"].vectors[0])
    assert human.report.dropped["ambiguous"] == ("ENSG00000000007", "ENSG00000000058") and human.report.dropped["no embedding"] == ("ENSG00000000059",)


# gathering

def test_contents_and_order():
    tables = pair()
    human, mouse = gather_species(tables, {"mouse": BOTH["mouse"], "human": vectors(GENES[::-1], seed=3)})
    assert (human.name, mouse.name) == ("human", "mouse") and (human.n, human.g) == (30, 60)
    assert sp.isspmatrix_csr(human.counts) and human.counts.dtype == np.float32 and np.array_equal(human.counts.toarray(), tables["human"].X)
    assert human.genes.tolist() == GENES and np.array_equal(human.vectors, vectors(GENES[::-1], seed=3).vectors[::-1])
    assert human.cells.tolist() == [f"c{i}" for i in range(30)] and human.labels.tolist() == ["a", "b"] * 15
    assert human.batch.dtype.kind == "i" and not human.batch.any() and human.batches == ("all",)


@pytest.mark.filterwarnings("ignore:.*have no counts in the genes:gears_nb.core.errors.GearsWarning")
@given(st.integers(1, 60), st.integers(0, 3))
def test_variable_genes_are_the_reference(n_hvg, seed):
    """Variance of log-normalised counts within batches, averaged; the order of the table is kept."""
    X, batch = counts(seed=seed), np.array(["p", "q", "q"] * 10)
    tables = {name: table(X, donor=batch) for name in ("x", "y")}
    got, _ = gather_species(tables, {"x": BOTH["human"], "y": BOTH["human"]}, n_hvg=n_hvg, label_key=None, batch_key="donor")
    size = X.sum(1, keepdims=True)
    L = np.log1p(X / size * np.median(size))
    score = (L[batch == "p"].var(0) + L[batch == "q"].var(0)) / 2
    assert set(got.genes) == {GENES[i] for i in np.argsort(-score)[:n_hvg]} and got.genes.tolist() == [g for g in GENES if g in got.genes]
    assert got.report.kept == n_hvg and len(got.report.dropped["not variable"]) == 60 - n_hvg
    filled = X[:, [g in got.genes for g in GENES]].any(1)
    assert got.batches == ("p", "q") and got.batch.tolist() == (batch[filled] == "q").tolist() and got.n == filled.sum()
    assert set(got.genes) | {g for gone in got.report.dropped.values() for g in gone} == set(GENES)


def forms(X):
    """The same counts in every storage."""
    n, g = X.shape
    every = sp.csr_matrix((X[:, ::-1].ravel(), np.tile(np.arange(g)[::-1], n), np.arange(0, n * g + 1, g)), shape=X.shape)
    yield "csr", sp.csr_matrix(X)
    yield "csc", sp.csc_matrix(X)
    yield "csr_array", sp.csr_array(X)
    yield "int", X.astype(np.int64)
    yield "uint", X.astype(np.uint16)
    yield "float64", X.astype(np.float64)
    yield "zeros stored, columns unsorted", every


def test_every_storage_gives_the_same_and_is_left_alone(tmp_path):
    X = counts()
    expected = gather_species(pair(), BOTH, n_hvg=20)[0]
    for name, form in forms(X):
        given = pair(human=table(form, cell_type=["a", "b"] * 15))
        before = given["human"].copy()
        got = gather_species(given, BOTH, n_hvg=20)[0]
        assert got.genes.tolist() == expected.genes.tolist() and (got.counts != expected.counts).nnz == 0, name
        assert got.counts.has_sorted_indices and (got.counts.data > 0).all()
        assert type(given["human"].X) is type(before.X) and (given["human"].X != before.X).sum() == 0 and given["human"].X.dtype == before.X.dtype
        got.counts.data[:] = -1
        assert (given["human"].X != before.X).sum() == 0, f"{name}: memory is shared"
    pair()["human"].write_h5ad(tmp_path / "t.h5ad")
    backed = anndata.read_h5ad(tmp_path / "t.h5ad", backed="r")
    got = gather_species(pair(human=backed), BOTH, n_hvg=20)[0]
    assert (got.counts != expected.counts).nnz == 0 and backed.isbacked
    backed.file.close()


def test_layer_and_raw():
    tables = pair()
    expected = gather_species(tables, BOTH)
    for own in tables.values():
        own.raw, own.layers["counts"] = own.copy(), own.X.copy()
        own.X = np.log1p(own.X)
    for layer in ("counts", "raw"):
        assert all((a.counts != b.counts).nnz == 0 for a, b in zip(expected, gather_species(tables, BOTH, layer=layer)))
    with pytest.raises(InputError, match="human: X: counts are needed.*whole numbers.*layer='counts'") as caught:
        gather_species(tables, BOTH)
    assert "counts=False" not in str(caught.value)
    with pytest.raises(InputError, match="has no layer 'umi'"):
        gather_species(tables, BOTH, layer="umi")


def test_cells_without_counts_go_aloud():
    X = counts()
    X[[3, 9]] = 0
    X[5] = 0
    X[5, 59] = 4  # counts only in a gene without a vector
    given = {"human": table(X, cell_type=["a"] * 30, donor=["p"] * 3 + ["lone"] + ["q"] * 26), "mouse": table(counts(seed=1), cell_type=["a"] * 30, donor=["m"] * 30)}
    with pytest.warns(GearsWarning) as said:
        human, _ = gather_species(given, BOTH | {"human": vectors(GENES[:59])}, batch_key="donor")
    assert {w.filename for w in said} == {__file__} and [str(w.message) for w in said] == ["human: 3 of 30 cells have no counts in the genes that are used and were dropped"]
    assert human.n == 27 == len(human.labels) == len(human.batch) and human.counts.sum(1).min() > 0
    assert not {"c3", "c5", "c9"} & set(human.cells) and human.batches == ("p", "q")


def test_labels():
    """Missing ones have a name; a table without the column has none and says so; a column nowhere is an error unless it is the default."""
    odd = pd.Categorical(["a", None, "", " ", "b"] * 6)
    got = gather_species(pair(human=table(counts(), cell_type=odd)), BOTH)[0]
    assert got.labels.tolist() == ["a", UNLABELLED, UNLABELLED, UNLABELLED, "b"] * 6
    bare = table(counts())
    with pytest.warns(GearsWarning, match="human: there is no obs..cell_type.., so its cells have no types"):
        human, mouse = gather_species(pair(human=bare), BOTH)
    assert human.labels is None and mouse.labels is not None
    with pytest.warns(GearsWarning) as said:
        assert all(s.labels is None for s in gather_species({"human": bare, "mouse": bare}, BOTH))
    assert len(said) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gather_species({"human": bare, "mouse": bare}, BOTH, label_key=None)
    for how in ({"label_key": "Type"}, {"batch_key": "Type"}):
        with pytest.raises(InputError, match="no table has obs..Type.. .human has cell_type; mouse has cell_type"):
            gather_species(pair(), BOTH, **how)


def test_bad_input_is_refused_in_one_line():
    X, human = counts(), BOTH["human"]
    negative, broken, twice = X.copy(), X.copy(), table(X, cell_type=["a"] * 30)
    negative[0, 0], broken[1, 1] = -1, np.nan
    twice.var_names = ["G0", *GENES[:59]]
    cases = [({"human": table(X)}, BOTH, {}, "there is one species"), ({}, BOTH, {}, "there are none"), (table(X), BOTH, {}, "is a AnnData"),
             (pair(), {"human": human}, {}, "none for mouse .there: human"), (pair(), BOTH, {"n_hvg": 0}, "n_hvg: is 0"),
             (pair(human=table(negative)), BOTH, {}, "negative"), (pair(human=table(broken)), BOTH, {}, "NaN"), (pair(human=twice), BOTH, {}, "occur more than once"),
             (pair(human=table(X * 0)), BOTH, {}, "none of the 30 cells has counts"),
             (pair(), BOTH | {"mouse": vectors(p=7, name="esm")}, {}, "5 numbers for human .toy., 7 numbers for mouse .esm."),
             (pair(), BOTH | {"mouse": vectors(["INS", "GCG", *GENES[:10]])}, {}, "10 of 60 genes have an embedding, 50 are needed; without: G10, .*in toy: INS, GCG.*min_genes=10"),
             (pair(), BOTH | {"mouse": Embeddings(np.array(["A"]), np.ones((2, 5)), "odd")}, {}, "odd: vectors: there are 1 gene names"),
             (pair(), BOTH | {"mouse": "nowhere.npz"}, {}, "nowhere.npz: file: not found")]
    for tables, embeddings, how, part in cases:
        with warnings.catch_warnings(), pytest.raises(InputError, match=part) as caught:
            warnings.simplefilter("ignore", GearsWarning)
            gather_species(tables, embeddings, **how)
        assert "\n" not in str(caught.value)


def test_most_genes_without_a_vector_is_a_warning():
    with pytest.warns(GearsWarning, match="human: 40 of 60 genes have no embedding in half and were dropped .G20, G21"):
        human, _ = gather_species(pair(), BOTH | {"human": vectors(GENES[:20], name="half")}, min_genes=10)
    lines = str(human.report).splitlines()
    assert lines == ["human: 20 of 60 genes kept; embeddings found for 20 (20 as written)", "  no embedding: 40 (G20, G21, G22, G23, G24, ...)"]


def test_files_are_read_per_species_and_runs_repeat(tmp_path):
    path = written(tmp_path, ".npz", GENES * 2, np.r_[BOTH["human"].vectors, BOTH["mouse"].vectors], ["human"] * 60 + ["mouse"] * 60)
    first = gather_species(pair(), {"human": path, "mouse": str(path)}, n_hvg=25)
    again = gather_species(pair(), BOTH, n_hvg=25)
    for a, b in zip(first, again):
        assert np.array_equal(a.vectors, b.vectors) and a.genes.tolist() == b.genes.tolist() and (a.counts != b.counts).nnz == 0 and a.report == b.report


def test_three_species():
    got = gather_species(pair(frog=table(counts(12, seed=4), cell_type=["z"] * 12)), BOTH | {"frog": vectors(seed=9)})
    assert [s.name for s in got] == ["human", "mouse", "frog"] and [s.n for s in got] == [30, 30, 12]


def test_the_pancreas_of_two_species():
    """Real tables, where they are: most genes are found, and every gene is accounted for."""
    root = data_root()
    folder = root / "cross_species_pancreas" if root is not None else None
    if folder is None or not (folder / "protein_embeddings_human_mouse.npz").is_file():
        pytest.skip("the tables are not here")
    tables = {name: anndata.read_h5ad(folder / f"baron_pancreas_{name}.h5ad") for name in ("human", "mouse")}
    got = gather_species(tables, dict.fromkeys(tables, folder / "protein_embeddings_human_mouse.npz"), batch_key="donor", n_hvg=2000)
    for s, own in zip(got, tables.values()):
        assert s.g == 2000 and s.n == own.n_obs and s.vectors.shape == (2000, 128) and np.isfinite(s.vectors).all()
        assert s.report.kept + sum(map(len, s.report.dropped.values())) == own.n_vars and sum(s.report.matched_by.values()) > own.n_vars / 2
        assert "GCG" in {g.upper() for g in s.genes} and len(s.batches) == own.obs["donor"].nunique()
