"""One table, several sections: told apart by a column, by the caller, or refused; and the same section given twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError, speaking
from gears_nb.data.sections import repeated_sections, section_labels, split_sections
from gears_nb.data.validate import validate_slide

LIBRARIES = {"L1": {"scalefactors": {"spot_diameter_fullres": 10.0}}, "L2": {"scalefactors": {"spot_diameter_fullres": 10.0}}}
HALVES = ["L1"] * 6 + ["L2"] * 6


def table(seed: int = 0, n: int = 12, uns: dict | None = None, **obs: object) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    X = sp.csr_matrix(rng.poisson(3.0, (n, 20)).astype(np.float32))
    adata = ad.AnnData(X, obs=pd.DataFrame(obs, index=[f"s{seed}-{i}" for i in range(n)]))
    adata.var_names = [f"Gene{j}" for j in range(20)]
    adata.obsm["spatial"] = rng.random((n, 2)) * 100
    if uns is not None:
        adata.uns["spatial"] = uns
    return adata


def unused_category() -> ad.AnnData:
    return table(slide=pd.Categorical(["A"] * 12, categories=["A", "B"]))


ACCEPTED: dict[str, tuple[Callable[[], ad.AnnData], str | None, list[str]]] = {
    "no column": (table, None, [""] * 12),
    "one slide": (lambda: table(slide=["A"] * 12), None, ["A"] * 12),
    "slide": (lambda: table(slide=HALVES), None, HALVES),
    "library_id": (lambda: table(library_id=pd.Categorical(HALVES)), None, HALVES),
    "sample": (lambda: table(sample=HALVES), None, HALVES),
    "library_id beside one slide": (lambda: table(slide=["A"] * 12, library_id=HALVES), None, HALVES),
    "libraries and their column": (lambda: table(uns=LIBRARIES, library_id=HALVES), None, HALVES),
    "libraries and another column": (lambda: table(uns=LIBRARIES, slide=[1] * 6 + [2] * 6), None, ["1"] * 6 + ["2"] * 6),
    "rows of one library": (lambda: table(uns=LIBRARIES, library_id=["L1"] * 12), None, [""] * 12),
    "one library": (lambda: table(uns={"L1": {"scalefactors": {}}}), None, [""] * 12),
    "a library without a name": (lambda: table(uns={"images": {}, "scalefactors": {}}), None, [""] * 12),
    "same division twice": (lambda: table(slide=["b"] * 6 + ["a"] * 6, sample=HALVES), None, ["b"] * 6 + ["a"] * 6),
    "same division, one with gaps": (lambda: table(slide=[None] * 6 + ["x"] * 6, sample=HALVES), None, HALVES),
    "whole numbers as floats": (lambda: table(sample=[1.0] * 6 + [2.0] * 6), None, ["1"] * 6 + ["2"] * 6),
    "truth values": (lambda: table(sample=[True] * 6 + [False] * 6), None, ["True"] * 6 + ["False"] * 6),
    "unused category": (unused_category, None, ["A"] * 12),
    "a name for every row": (lambda: table(sample=[f"c{i}" for i in range(12)]), None, [""] * 12),
    "named": (lambda: table(slide=["A"] * 12, region=HALVES), "region", HALVES),
    "named among several": (lambda: table(slide=list("aaabbbcccddd"), sample=HALVES), "sample", HALVES),
    "none of several": (lambda: table(slide=list("aaabbbcccddd"), sample=HALVES), "none", [""] * 12),
    "none with libraries": (lambda: table(uns=LIBRARIES), "none", [""] * 12),
    "none with gaps": (lambda: table(slide=["A"] * 6 + [None] * 6), "none", [""] * 12),
    "capitals": (lambda: table(Sample=HALVES), None, HALVES),
    "all capitals": (lambda: table(SLIDE=["A"] * 12, LIBRARY_ID=HALVES), None, HALVES),
    "both spellings": (lambda: table(Sample=["A"] * 12, sample=HALVES), None, HALVES),
    "a batch divides nothing": (lambda: table(batch=HALVES), None, [""] * 12),
    "nullable text": (lambda: table(slide=pd.array(HALVES, dtype="string")), None, HALVES),
}

REFUSED: dict[str, tuple[Callable[[], ad.AnnData], str | None, str, str]] = {
    "no such column": (lambda: table(region=HALVES), "regoin", "obs['regoin']", "(obs has region). Remedy: did you mean slide_key='region'?"),
    "no columns": (table, "slide", "obs['slide']", "(obs has no columns)"),
    "far from any column": (lambda: table(region=HALVES), "xyz", "obs['xyz']", "slide_key='none' for one section"),
    "empty key": (lambda: table(slide=HALVES), "", "obs['']", "there is no such column"),
    "gaps in the named column": (lambda: table(region=["a"] * 9 + [None] * 3), "region", "obs['region']", "3 of 12 rows have no value"),
    "gaps": (lambda: table(slide=["a"] * 4 + ["b"] * 4 + [None] * 4), None, "obs['slide']", "4 of 12 rows have no value"),
    "one label and gaps": (lambda: table(library_id=["a"] * 7 + [np.nan] * 5), None, "obs['library_id']", "5 of 12 rows have no value"),
    "blank text": (lambda: table(slide=["a"] * 10 + ["", "  "]), None, "obs['slide']", "2 of 12 rows have no value"),
    "numbers with gaps": (lambda: table(sample=[1.0] * 6 + [np.nan] * 6), None, "obs['sample']", "6 of 12 rows"),
    "nullable numbers": (lambda: table(sample=pd.array([1] * 6 + [None] * 6, dtype="Int64")), None, "obs['sample']", "6 of 12 rows"),
    "two divisions": (lambda: table(slide=list("aaabbbcccddd"), sample=HALVES), None, "obs", "(slide makes 4, sample makes 2)"),
    "crossed divisions": (lambda: table(library_id=HALVES, sample=["a", "b"] * 6), None, "obs", "library_id makes 2, sample makes 2"),
    "libraries": (lambda: table(uns=LIBRARIES), None, "uns['spatial']", "2 libraries (L1, L2), but no column"),
    "libraries, one slide": (lambda: table(uns=LIBRARIES, slide=["A"] * 12), None, "uns['spatial']", "add obs['library_id']"),
    "two divisions in capitals": (lambda: table(Slide=list("aaabbbcccddd"), Sample=HALVES), None, "obs", "choose with slide_key='Slide' or slide_key='Sample'"),
    "libraries in another column": (lambda: table(uns=LIBRARIES, batch=HALVES), None, "uns['spatial']", "slide_key='batch'"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_labels(case: str):
    make, key, labels = ACCEPTED[case]
    adata = make()
    before = adata.copy()
    assert list(section_labels(adata, "A.h5ad", key)) == labels
    parts = split_sections(adata, "A.h5ad", key)
    assert [p.obs["slide"].iloc[0] for p in parts] == list(dict.fromkeys(labels))
    assert sum(p.n_obs for p in parts) == 12
    for part in parts:
        assert part.obs["slide"].nunique() == 1
        assert len(split_sections(part, "again")) == 1
        rows = np.flatnonzero(np.array(labels) == part.obs["slide"].iloc[0])
        assert list(part.obs_names) == list(adata.obs_names[rows]) and (part.X != adata.X[rows]).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str):
    make, key, field, words = REFUSED[case]
    with pytest.raises(InputError) as refused:
        split_sections(make(), "A.h5ad", key)
    message = str(refused.value)
    assert message.startswith(f"A.h5ad: {field}: ") and words in message and "\n" not in message and "slide_key=" in message


def test_the_remedy_speaks_the_language_of_the_command_line():
    with speaking("shell"), pytest.raises(InputError, match=r"--slide-key slide or --slide-key sample, or --slide-key none"):
        section_labels(table(slide=list("aaabbbcccddd"), sample=HALVES), "A.h5ad")


def test_a_split_table_stays_split_until_it_is_joined_again():
    parts = split_sections(table(uns=LIBRARIES, library_id=HALVES, sample=["a", "b"] * 6), "A.h5ad", "library_id")
    assert [set(section_labels(p, "part")) for p in parts] == [{"L1"}, {"L2"}]
    joined = ad.concat(parts, uns_merge="first")
    with pytest.raises(InputError, match="columns divide the rows"):
        section_labels(joined, "joined")


def test_split_tables_survive_a_file(tmp_path: Path):
    part = split_sections(table(slide=list("aaabbbcccddd"), sample=HALVES), "A.h5ad", "sample")[0]
    part.write_h5ad(tmp_path / "part.h5ad")
    assert set(section_labels(ad.read_h5ad(tmp_path / "part.h5ad"), "part")) == {"L1"}


def test_backed_tables_are_split_into_memory(tmp_path: Path):
    table(slide=HALVES).write_h5ad(tmp_path / "A.h5ad")
    parts = split_sections(ad.read_h5ad(tmp_path / "A.h5ad", backed="r"), "A.h5ad")
    assert [(p.n_obs, p.isbacked) for p in parts] == [(6, False)] * 2


def test_a_slide_is_validated_section_by_section():
    adata = table(library_id=["L1"] * 10 + ["L2"] * 2)
    with pytest.raises(InputError, match=r"obs\['library_id'\] == 'L2': 2 spots, at least 3 are needed"):
        validate_slide(adata, "A.h5ad")
    assert validate_slide(adata, "A.h5ad", slide_key="none")[0].n_obs == 12


def said(adata: ad.AnnData, key: str | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        split_sections(adata, "A.h5ad", key)
    return [str(w.message) for w in seen if issubclass(w.category, GearsWarning)]


@pytest.mark.parametrize("name", ["batch", "Batch", "section", "section_id", "sample_id", "Sample.ID", "library", "slice", "orig.ident", "fov", "puck", "donor"])
def test_a_usual_name_of_sections_is_asked_about_once(name: str):
    adata = table(**{"fov": HALVES, name: HALVES})
    words = f"A.h5ad: obs['{name}'] has 2 labels: if these are sections, name it with slide_key='{name}'"
    assert said(adata) == [words]
    assert said(adata, name) == said(adata, "none") == []
    assert said(split_sections(adata, "A.h5ad", "none")[0]) == []
    with speaking("shell"):
        assert said(adata) == [words.replace("slide_key='", "--slide-key ").rstrip("'")]


def test_no_question_without_a_reason():
    assert said(table(batch=HALVES, sample=HALVES)) == said(table(batch=["a"] * 12)) == said(table(batch=[f"b{i}" for i in range(12)])) == []
    assert said(table(0, 104, batch=[f"b{i // 2}" for i in range(104)])) == [] and len(said(table(0, 100, batch=[f"b{i // 2}" for i in range(100)]))) == 1
    assert said(table(cluster=HALVES, cell_type=HALVES, total_counts=range(12))) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        section_labels(table(batch=HALVES), "Q.h5ad")  # a query


# ---------------------------------------------------------------- the same section twice


def shuffled(adata: ad.AnnData) -> ad.AnnData:
    rng = np.random.default_rng(5)
    return adata[rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)].copy()


def renamed(adata: ad.AnnData) -> ad.AnnData:
    adata = adata.copy()
    adata.obs_names = [f"{name}-1" for name in adata.obs_names]
    return adata


def moved(adata: ad.AnnData) -> ad.AnnData:
    adata = adata.copy()
    adata.obsm["spatial"] = adata.obsm["spatial"] * 7 + 3
    return adata


def dense(adata: ad.AnnData) -> ad.AnnData:
    adata = adata.copy()
    adata.X = adata.X.toarray().astype(np.int64)
    return adata


def single(adata: ad.AnnData) -> ad.AnnData:
    adata = adata.copy()
    adata.obsm["spatial"] = adata.obsm["spatial"].astype(np.float32)
    return renamed(adata)


def with_zeros(adata: ad.AnnData) -> ad.AnnData:
    X = sp.csr_matrix((np.r_[adata.X.data, 0.0], np.r_[adata.X.indices, 0], np.r_[adata.X.indptr[:-1], adata.X.nnz + 1]))
    adata = adata.copy()
    adata.X = sp.csr_matrix(X, shape=adata.shape)
    return adata


def bare(adata: ad.AnnData) -> ad.AnnData:
    adata = adata.copy()
    del adata.obsm["spatial"]
    return adata


def one_count_more(adata: ad.AnnData) -> ad.AnnData:
    adata = dense(adata)
    adata.X[3, 3] += 1
    return adata


def swapped(adata: ad.AnnData) -> ad.AnnData:
    "The same rows under each other's names and places."
    adata = adata.copy()
    adata.X = adata.X[::-1]
    return adata


def other_gene(adata: ad.AnnData) -> ad.AnnData:
    "Without one gene, one gene of another name."
    adata = adata[:, :19].copy()
    adata.var_names = [*adata.var_names[:18], "Other"]
    return adata


def shallow(seed: int) -> ad.AnnData:
    "Rows of three counts in five genes: chance makes many equal."
    adata = table(seed, 3000)
    X = np.zeros(adata.shape, np.float32)
    X[:, :5] = np.random.default_rng(seed).poisson(0.8, (3000, 5))
    adata.X = sp.csr_matrix(X)
    return adata


NEARLY = [one_count_more, swapped, lambda a: moved(renamed(a)), lambda a: renamed(bare(a)), lambda a: a[:11].copy(), lambda a: a[:, :19].copy(),
          lambda a: a[2:9].copy(), lambda a: shuffled(moved(renamed(a[:4].copy()))), other_gene, lambda a: ad.concat([a, table(7, 9)])]
SAME = [lambda a: a, shuffled, renamed, moved, dense, single, with_zeros, bare, lambda a: shuffled(renamed(a)), lambda a: bare(shuffled(dense(a)))]
OTHER = [lambda a: table(3), lambda a: ad.AnnData(obs=a.obs), lambda a: ad.concat([a[:6], table(7, 6)]), lambda a: a[:, :2].copy()]


@pytest.mark.parametrize("change", SAME)
def test_the_same_section_is_recognised(change: Callable[[ad.AnnData], ad.AnnData]):
    first = table(1)
    assert repeated_sections([table(2), first, change(first)]) == [(2, 1)]


@pytest.mark.parametrize("change", OTHER)
def test_another_section_is_not(change: Callable[[ad.AnnData], ad.AnnData]):
    first = table(1)
    assert repeated_sections([first, change(first), table(2)]) == []


@pytest.mark.parametrize("change", NEARLY)
def test_the_same_section_but_for_a_little_is_recognised(change: Callable[[ad.AnnData], ad.AnnData]):
    first = table(1)
    assert repeated_sections([table(2), first, change(first)]) == [(2, 1)]


def test_rows_that_are_equal_by_chance_are_no_repeat():
    assert repeated_sections([shallow(1), shallow(2), shallow(1)]) == [(2, 0)]
    assert repeated_sections([shallow(1), shallow(2)[:40].copy()]) == []


def test_other_genes_are_no_repeat():
    first, second = table(1), table(1)
    second.var_names = [f"Other{j}" for j in range(20)]
    assert repeated_sections([first, second]) == []


def test_each_repeat_is_paired_with_the_first():
    a, b = table(1), table(2)
    assert repeated_sections([a, b, a, shuffled(b), renamed(a)]) == [(2, 0), (3, 1), (4, 0)]
    assert repeated_sections([]) == repeated_sections([a]) == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=12, max_size=12), st.permutations(range(12)))
def test_splitting_follows_the_labels_whatever_their_order(labels: list[str], order: list[int]):
    adata = table(slide=labels)[order].copy()
    expected = [labels[i] for i in order]
    parts = split_sections(adata, "A.h5ad")
    assert [p.obs["slide"].iloc[0] for p in parts] == list(dict.fromkeys(expected))
    for part in parts:
        assert list(part.obs_names) == [n for n, label in zip(adata.obs_names, expected) if label == part.obs["slide"].iloc[0]]
