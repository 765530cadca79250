"""What is known of perturbations: likeness, combinations, structures, genes' loadings, tables from files."""
from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.perturb.descriptors import Descriptors, combine, fingerprints, gene_vectors, multi_hot, read_descriptors, similarity


def some(rng, p=5, d=8, kind="vectors"):
    values = rng.normal(size=(p, d)) if kind == "vectors" else rng.integers(0, 2, (p, d))
    return Descriptors(np.array([f"d{j}" for j in range(p)]), values.astype(np.float32), kind)


@given(st.integers(0, 10**6))
def test_tanimoto_is_the_share_of_sets(seed):
    a = some(np.random.default_rng(seed), kind="fingerprint")
    sets = [set(np.flatnonzero(row)) for row in a.values]
    assert np.allclose(similarity(a, a), [[len(x & y) / len(x | y) if x | y else 0 for y in sets] for x in sets])


@given(st.integers(0, 10**6))
def test_cosine_is_scipys(seed):
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(seed)
    a, b = some(rng), some(rng, p=3)
    assert np.allclose(similarity(a, b), 1 - cdist(a.values, b.values, "cosine"), atol=1e-5)


def test_different_kinds_are_not_compared(rng):
    for b in (some(rng, kind="fingerprint"), some(rng, d=7)):
        with pytest.raises(InputError, match="against"):
            similarity(some(rng), b)


@given(st.permutations(["d0", "d3", "d4"]))
def test_a_combination_is_the_sum_in_any_order(order):
    known = some(np.random.default_rng(0))
    row = combine(known, multi_hot(["+".join(order)], known.names))[0]
    assert np.allclose(row, known.values[[0, 3, 4]].sum(0), atol=1e-6)
    assert not combine(known, multi_hot(["control", "nobody"], known.names)).any()
    with pytest.raises(InputError, match="columns"):
        combine(known, np.ones((1, 2)))


def test_fingerprints_of_one_molecule_written_twice():
    pytest.importorskip("rdkit")
    with pytest.warns(GearsWarning, match="1 of 4 structures.*bad"):
        found = fingerprints({"a": "OCC", "b": "CCO", "salt": "CCN.Cl", "bad": "c1cc"}, bits=256)
    assert found.names.tolist() == ["a", "b", "salt"] and found.values.shape == (3, 256) and found.kind == "fingerprint" and set(np.unique(found.values)) == {0, 1}
    assert similarity(found, found)[0, 1] == 1 and similarity(found, found)[0, 2] < 1
    with pytest.raises(InputError, match="none of 2 structures"):
        fingerprints({"x": "", "y": None})


def test_without_rdkit_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(InputError, match=r"pip install 'gears_nb\[perturb\]'"):
        fingerprints({"a": "CCO"})


@given(st.integers(0, 10**6))
def test_loadings_give_back_the_covariance(seed):
    rng = np.random.default_rng(seed)
    X = sp.csr_matrix(np.maximum(rng.normal(0.5, 1, (9, 14)), 0).astype(np.float32))
    genes = np.array([f"g{j}" for j in range(14)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        found = gene_vectors(X, genes, genes, dim=99, seed=seed)
    kept = [int(name[1:]) for name in found.names]
    assert found.values.shape[1] == 8 and np.allclose(found.values @ found.values.T, np.cov(X.toarray().T)[np.ix_(kept, kept)], atol=1e-3)


def test_gene_vectors_of_the_same_cells_are_the_same_numbers(rng):
    X, genes = sp.random(60, 30, 0.4, format="csr", random_state=1), np.array([f"g{j}" for j in range(30)])
    wanted = ["g4", "g9", "g4"]
    a, b = (gene_vectors(X, genes, wanted, dim=5, seed=3) for _ in range(2))
    assert a.names.tolist() == ["g4", "g9"] and np.array_equal(a.values, b.values)
    X = X.tolil()
    X[:, 4] = 0
    with pytest.warns(GearsWarning, match="1 of 2 targets.*g4"):
        assert gene_vectors(X.tocsr(), genes, wanted, dim=5).names.tolist() == ["g9"]
    with pytest.raises(InputError, match="none of 1 targets"):
        gene_vectors(X.tocsr(), genes, ["TP53"])
    with pytest.raises(InputError, match="at least two control cells"):
        gene_vectors(X.tocsr()[:1], genes, wanted)


def test_files_of_all_kinds_hold_the_same(tmp_path, rng):
    import pandas as pd

    known = some(rng)
    frame = pd.DataFrame(known.values, columns=[f"x{j}" for j in range(8)]).assign(name=known.names)[["name", *(f"x{j}" for j in range(8))]]
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    np.savez(tmp_path / "a.npz", names=known.names, values=known.values)
    files = ["a.csv", "a.tsv", "a.npz"]
    try:
        frame.to_parquet(tmp_path / "a.parquet", index=False)
        frame.set_index("name").to_parquet(tmp_path / "b.parquet")
        files += ["a.parquet", "b.parquet"]
    except ImportError:
        pass
    for file in files:
        found = read_descriptors(tmp_path / file)
        assert found.names.tolist() == known.names.tolist() and np.allclose(found.values, known.values, rtol=1e-5) and found.kind == "vectors", file


def test_bad_files_are_one_line(tmp_path, rng):
    (tmp_path / "text.csv").write_text("name,x\nA,low\n")
    (tmp_path / "gaps.csv").write_text("name,x\nA,\nB,\n")
    (tmp_path / "twice.csv").write_text("name,x\nA,1\nA,2\n")
    (tmp_path / "a.docx").write_text("A")
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    np.savez(tmp_path / "other.npz", rows=np.ones(3))
    np.savez(tmp_path / "shape.npz", names=np.array(["A"]), values=np.ones(3))
    np.savez(tmp_path / "objects.npz", names=np.array(["A", None], object), values=np.ones((2, 2)))
    for name in ("text.csv", "gaps.csv", "twice.csv", "a.docx", "broken.npz", "other.npz", "shape.npz", "objects.npz", "absent.csv"):
        with pytest.raises(InputError) as told:
            read_descriptors(tmp_path / name)
        assert "\n" not in str(told.value) and "Remedy" in str(told.value)
    (tmp_path / "some.csv").write_text("name,x,y\nA,1,0\nB,,1\nC,0,inf\n")
    with pytest.warns(GearsWarning, match="2 of 3 rows"):
        found = read_descriptors(tmp_path / "some.csv")
    assert found.names.tolist() == ["A"] and found.kind == "fingerprint"
