"""Readers, sections, writing, gene matching."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data.genes import locate, match_genes, spoken_names
from gears_nb.data.io import (
    POSITION_COLUMNS,
    array_positions,
    parse_source,
    read,
    read_h5ad,
    read_many,
    split_slides,
    write_h5ad,
)
from gears_nb.data.registry import data_root
from gears_nb.data.validate import validate_slide


def counts_frame(n: int = 6, g: int = 5, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(1 + rng.poisson(2.0, size=(n, g)), index=[f"c{i}" for i in range(n)], columns=[f"Gene{j}" for j in range(g)])


# ---------------------------------------------------------------- text tables


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ending", [".tsv", ".tsv.gz"])
def test_st_table(tmp_path: Path, turned: bool, ending: str):
    frame = counts_frame()
    frame.index = ["1x2", "3.5x4", "5x6.25", "7x8", "9x10", "-1x0"]
    (frame.T if turned else frame).to_csv(tmp_path / f"s{ending}", sep="\t")
    slide = read(tmp_path / f"s{ending}", spatial=True)
    np.testing.assert_array_equal(slide.X.toarray(), frame.to_numpy())
    np.testing.assert_allclose(slide.obsm["spatial"], [[1, 2], [3.5, 4], [5, 6.25], [7, 8], [9, 10], [-1, 0]])
    assert list(slide.var_names) == list(frame.columns) and list(slide.obs_names) == list(frame.index)
    assert set(slide.obs["slide"]) == {"s"}


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_any_position_survives_its_row_name(places):
    names = [f"{x:.3f}x{y:.3f}" for x, y in places]
    np.testing.assert_allclose(array_positions(names), np.array(places), atol=6e-4)


def test_st_table_errors(tmp_path: Path):
    counts_frame().to_csv(tmp_path / "a.tsv", sep="\t")
    with pytest.raises(InputError, match="row names: 6 of 6 row names are not positions"):
        read(tmp_path / "a.tsv", spatial=True)
    assert read(tmp_path / "a.tsv", spatial=False).shape == (6, 5)
    (tmp_path / "b.tsv").write_text("\tA\tB\n1x1\t1\tmany\n2x1\t1\t2\n")
    with pytest.raises(InputError, match="column 'B': holds text"):
        read(tmp_path / "b.tsv", spatial=True)
    (tmp_path / "c.tsv").write_text("\tA\tA\n1x1\t1\t5\n2x1\t1\t2\n3x1\t0\t2\n")
    with pytest.raises(InputError, match=r"var_names \(genes\): 1 names occur more than once \(A\)"):
        read(tmp_path / "c.tsv", spatial=True)
    (tmp_path / "d.tsv").write_text("")
    with pytest.raises(InputError, match="cannot be read as a text table"):
        read(tmp_path / "d.tsv", spatial=True)
    (tmp_path / "e.tsv.gz").write_bytes(gzip.compress(b"\tA\tB\n1x1\t1\t5\n" * 500)[:-40])
    with pytest.raises(InputError, match="cannot be read as a text table"):
        read(tmp_path / "e.tsv.gz", spatial=True)


# ---------------------------------------------------------------- pairs


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(6)))
def test_pair_join_does_not_depend_on_row_order(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("pair")
    frame = counts_frame()
    places = pd.DataFrame({"x": np.arange(6.0), "y": np.arange(6.0) ** 2}, index=frame.index)
    frame.to_csv(folder / "expr.csv")
    places.iloc[list(order)].to_csv(folder / "coords.csv")
    slide = read(folder, spatial=True)
    np.testing.assert_array_equal(slide.obsm["spatial"], places.to_numpy(dtype=np.float32))
    np.testing.assert_array_equal(slide.X.toarray(), frame.to_numpy())


def test_pair_given_as_two_paths_with_other_names_and_columns(tmp_path: Path):
    frame = counts_frame()
    frame.to_csv(tmp_path / "first.csv")
    places = pd.DataFrame({"region": list("aabbcc"), "u": np.arange(6), "v": np.arange(6)[::-1] ** 2}, index=frame.index)
    places.to_csv(tmp_path / "second.tsv", sep="\t")
    slide = read(f"{tmp_path}/first.csv+{tmp_path}/second.tsv", spatial=True)
    np.testing.assert_array_equal(slide.obsm["spatial"], places[["u", "v"]].to_numpy())


def test_pair_errors(tmp_path: Path):
    frame = counts_frame()
    frame.to_csv(tmp_path / "expr.csv")
    places = pd.DataFrame({"x": np.arange(6.0), "y": np.arange(6.0)}, index=frame.index)
    places.iloc[1:].to_csv(tmp_path / "coords.csv")
    with pytest.raises(InputError, match=r"1 \(c0\) only here, 0 only there"):
        read(tmp_path, spatial=True)
    places.iloc[[0, 0, 1, 2, 3, 4, 5]].to_csv(tmp_path / "coords.csv")
    with pytest.raises(InputError, match="coords.csv: barcodes: 'c0' occurs more than once"):
        read(tmp_path, spatial=True)
    places[["x"]].to_csv(tmp_path / "coords.csv")
    with pytest.raises(InputError, match="coords.csv: columns: no x and y among x"):
        read(tmp_path, spatial=True)
    with pytest.raises(InputError, match="none.csv: file: does not exist"):
        read(f"{tmp_path}/expr.csv+{tmp_path}/none.csv", spatial=True)


def test_a_plus_sign_elsewhere_is_an_ordinary_character(tmp_path: Path):
    with pytest.raises(InputError, match=r"HER2\+/none.h5ad: file: does not exist"):
        read(tmp_path / "HER2+" / "none.h5ad", spatial=True)


# ---------------------------------------------------------------- Space Ranger


def space_ranger(root: Path, *, header: bool, positions: str | None = None, symbols: tuple[str, ...] = ("GLUL", "TBCE", "TBCE")) -> np.ndarray:
    """An `outs` folder with the HDF5 matrix of four spots and three genes; returns the (4, 3) counts."""
    root.mkdir(exist_ok=True)
    X = np.array([[4, 0, 7], [0, 1, 0], [9, 0, 2], [1, 1, 0]])
    by_gene = sp.csc_matrix(X.T)
    with h5py.File(root / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array([b"AA-1", b"CC-1", b"GG-1", b"TT-1"])
        matrix["data"], matrix["indices"], matrix["indptr"] = by_gene.data.astype("i4"), by_gene.indices.astype("i8"), by_gene.indptr.astype("i8")
        matrix["shape"] = np.array([3, 4], dtype="i4")
        features = matrix.create_group("features")
        features["id"], features["name"] = np.array([b"ENSG1", b"ENSG2", b"ENSG3"]), np.array([s.encode() for s in symbols])
        features["feature_type"], features["genome"] = np.array([b"Gene Expression"] * 3), np.array([b"GRCh38"] * 3)
    (root / "spatial").mkdir(exist_ok=True)
    rows = positions or "TT-1,1,3,3,40,4\nAA-1,1,0,0,10,1\nZZ-1,0,9,9,90,9\nCC-1,0,1,1,20,2\nGG-1,1,2,2,30,3\n"
    name, top = ("tissue_positions.csv", ",".join(POSITION_COLUMNS) + "\n") if header else ("tissue_positions_list.csv", "")
    (root / "spatial" / name).write_text(top + rows)
    return X


@pytest.mark.parametrize("header", [False, True])
def test_space_ranger_both_generations(tmp_path: Path, header: bool):
    X = space_ranger(tmp_path / "outs", header=header)
    with pytest.warns(GearsWarning, match="2 genes with a repeated symbol"):
        slide = read(tmp_path / "outs", spatial=True)
    assert list(slide.obs_names) == ["AA-1", "GG-1", "TT-1"]
    assert list(slide.var_names) == ["GLUL", "ENSG2", "ENSG3"]
    np.testing.assert_array_equal(slide.X.toarray(), X[[0, 2, 3]])
    np.testing.assert_array_equal(slide.obsm["spatial"], [[1, 10], [3, 30], [4, 40]])


def test_space_ranger_errors(tmp_path: Path):
    space_ranger(tmp_path / "a", header=True, positions="AA-1,1,0,0,10,1\n", symbols=("A", "B", "C"))
    with pytest.raises(InputError, match="3 barcodes of the matrix have no position .first: CC-1"):
        read(tmp_path / "a", spatial=True)
    (tmp_path / "a" / "spatial" / "tissue_positions.csv").unlink()
    with pytest.raises(InputError, match="tissue_positions.*: is missing"):
        read(tmp_path / "a", spatial=True)
    assert read(tmp_path / "a", spatial=False).shape == (4, 3)
    (tmp_path / "a" / "filtered_feature_bc_matrix.h5").write_bytes(b"no")
    with pytest.raises(InputError, match="counts: cannot be read"):
        read(tmp_path / "a", spatial=True)


# ---------------------------------------------------------------- sections, writing


def sections() -> ad.AnnData:
    adata = ad.AnnData(sp.csr_matrix(counts_frame(8).to_numpy(dtype=np.float32)))
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(size=(8, 2))
    adata.obs["slide"], adata.obs["cell_type"] = list("bbbbaaaa"), list("xyxyxyxy")
    return adata


def test_sections_by_name_and_in_order(tmp_path: Path):
    path = write_h5ad(sections(), tmp_path / "p.h5ad")
    assert [s.obs["slide"].iloc[0] for s in split_slides(sections())] == ["b", "a"]
    slides = read_many([f"{path}#a", path], spatial=True)
    assert [list(s.obs_names) for s in slides] == [list("4567"), list("0123"), list("4567")]


def test_a_hash_in_a_real_file_name_is_part_of_it(tmp_path: Path):
    path = write_h5ad(sections(), tmp_path / "p#1.h5ad")
    assert parse_source(path) == (str(path), None)
    assert read(path, spatial=True).n_obs == 8
    assert parse_source("p.h5ad#A1") == ("p.h5ad", "A1")
    assert parse_source(f"{path}#a") == (str(path), "a") and read(f"{path}#a", spatial=True).n_obs == 4


def test_a_hash_in_a_folder_or_in_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adata = sections()
    adata.obs["slide"] = ["b#1"] * 4 + ["a"] * 4
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for folder in (Path("run#1"), Path("run")):
        path = write_h5ad(adata, folder / "q.h5ad")
        assert parse_source(f"{path}#b#1") == (str(path), "b#1")
        assert list(read(f"{path}#b#1", spatial=True).obs_names) == list("0123") and read(f"{path}#a", spatial=True).n_obs == 4
    counts_frame().to_csv("run#1/e.csv")
    counts_frame().to_csv("run#1/c.csv")
    for text, parts in {"run#1/e.csv+run#1/c.csv#b#1": ("run#1/e.csv+run#1/c.csv", "b#1"), "run#1/none.h5ad#b#1": ("run#1/none.h5ad", "b#1"),
                        "none.csv.gz#b": ("none.csv.gz", "b"), "run#1#b": ("run#1", "b"), "none#b": ("none", "b"), "#b": ("", "b")}.items():
        assert parse_source(text) == parts


def test_write_is_whole_and_leaves_the_table_alone(tmp_path: Path):
    adata = sections()
    before = adata.copy()
    path = write_h5ad(adata, tmp_path / "new" / "r.h5ad")
    assert [p.name for p in path.parent.iterdir()] == ["r.h5ad"]
    assert adata.obs.dtypes.to_dict() == before.obs.dtypes.to_dict()
    back = read(path, spatial=True)
    np.testing.assert_array_equal(back.X.toarray(), adata.X.toarray())
    assert list(back.obs["cell_type"]) == list(adata.obs["cell_type"])


def with_nothing(path: Path) -> Path:
    """A slide written by a newer anndata: `raw` and `uns/nothing` are elements encoded as `null`."""
    write_h5ad(sections(), path)
    with h5py.File(path, "a") as file:
        file.pop("raw", None)
        for name in ("raw", "uns/nothing"):
            file.create_dataset(name, data=h5py.Empty("f")).attrs.update({"encoding-type": "null", "encoding-version": "0.1.0"})
    return path


def test_elements_that_hold_nothing_are_none(tmp_path: Path):
    slide = read(with_nothing(tmp_path / "new.h5ad"), spatial=True)
    assert slide.raw is None and slide.uns["nothing"] is None
    np.testing.assert_array_equal(slide.X.toarray(), sections().X.toarray())
    np.testing.assert_array_equal(slide.obsm["spatial"], sections().obsm["spatial"])


def test_an_old_anndata_is_taught_what_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The anndata of Python 3.10, on any Python: take the reader of `null` away and call the version an old one."""
    specs = pytest.importorskip("anndata._io.specs.registry", reason="this anndata keeps its readers elsewhere")
    path = with_nothing(tmp_path / "new.h5ad")
    monkeypatch.delitem(specs._REGISTRY.read, (h5py.Dataset, specs.IOSpec("null", "0.1.0"), frozenset()), raising=False)
    with pytest.raises(specs.IORegistryError, match="null"):
        ad.read_h5ad(path)
    monkeypatch.setattr("gears_nb.data.io.version", lambda name: {"anndata": "0.11.4"}[name])
    assert read_h5ad(path).uns["nothing"] is None


# ---------------------------------------------------------------- genes


def genes(*names: str, **columns) -> ad.AnnData:
    adata = ad.AnnData(np.tile(np.arange(1.0, len(names) + 1, dtype=np.float32), (3, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.var_names = list(names)
    for name, values in columns.items():
        adata.var[name] = values
    return adata


@settings(max_examples=60, deadline=None)
@given(
    one=st.lists(st.sampled_from(["Glul", "GLUL", "glul", "Alb", "ALB", "Cps1", "Xist"]), max_size=8),
    other=st.lists(st.sampled_from(["Glul", "GLUL", "Alb", "aLB", "CPS1", "Sry"]), max_size=8),
)
def test_located_names_are_right_and_never_shared(one, other):
    wanted = list(dict.fromkeys(one))
    found = locate(wanted, other)
    hits = found.position[found.position >= 0]
    assert len(set(hits)) == len(hits)
    for name, position, how in zip(wanted, found.position, found.how, strict=True):
        assert (position >= 0) == (how in ("exact", "case"))
        if how == "exact":
            assert other[position] == name and other.count(name) == 1
        elif how == "case":
            assert other[position] != name and other[position].casefold() == name.casefold()
            assert len({o for o in other if o.casefold() == name.casefold()}) == 1
        elif how == "absent":
            assert name.casefold() not in {o.casefold() for o in other}


def test_case_is_rescued_only_when_unambiguous():
    with pytest.warns(GearsWarning, match="B: genes: 1 matched ignoring case .such as GLUL"):
        match = match_genes([genes("Glul", "Alb"), genes("ALB", "Alb", "GLUL")], ["A", "B"], min_genes=1)
    assert match.genes == ("Glul", "Alb")
    np.testing.assert_array_equal(match.apply(genes("ALB", "Alb", "GLUL")).X[0], [3, 2])
    with pytest.warns(GearsWarning, match="1 ambiguous|2 ambiguous"):
        match = match_genes([genes("Glul", "Alb"), genes("Alb", "GLUL", "gluL")], min_genes=1)
    assert match.genes == ("Alb",)
    assert match.fate[1].tolist() == ["matched", "ambiguous", "ambiguous"]


def test_translation_through_the_file_and_versions():
    atlas = genes("ENSG00000001.12", "ENSG00000002.3", "ENSG00000003.1", feature_name=["Alb", "Glul", "Glul"])
    with pytest.warns(GearsWarning, match="2 duplicated"):
        match = match_genes([genes("Glul", "Alb"), atlas], min_genes=1)
    assert (match.kind, match.genes) == ("symbol", ("Alb",))
    np.testing.assert_array_equal(match.apply(atlas).X[0], [1])
    visium = genes("Alb", "Glul", gene_ids=["ENSG00000001", "ENSG00000002"])
    plain = genes("ENSG00000002.9", "ENSG00000001.9")
    match = match_genes([visium, plain], min_genes=2)
    assert (match.kind, match.genes) == ("ensembl", ("ENSG00000001", "ENSG00000002"))
    np.testing.assert_array_equal(match.apply(plain).X[0], [2, 1])
    assert spoken_names(plain, "symbol") is None


def test_the_report_accounts_for_every_gene():
    tables = [genes("Xist", "Alb", "Glul", "Cps1"), genes("Glul", "ALB", "Cps1", "Sry"), genes("Cps1", "Cps1", "Glul", "Alb")]
    with pytest.warns(GearsWarning):
        match = match_genes(tables, list("ABC"), min_genes=2)
    table = match.table()
    assert len(table) == 12
    assert set(table["fate"]) <= {"matched", "case", "duplicated", "ambiguous", "not shared"}
    for entry in match.report()["sources"]:
        lost = sum(entry[word]["count"] for word in ("duplicated", "ambiguous", "not_shared"))
        assert entry["shared"] + lost == entry["genes"]


def test_apply_keeps_cells_and_fills_only_when_asked():
    match = match_genes([genes("A", "B", "C")] * 2, min_genes=3)
    late = genes("C", "A")
    late.obsm["spatial"] = np.arange(6.0).reshape(3, 2)
    with pytest.raises(InputError, match="late: .*1 of 3 common genes cannot be found: B .absent"):
        match.apply(late, "late")
    for sparse in (False, True):
        if sparse:
            late.X = sp.csr_matrix(late.X)
        with pytest.warns(GearsWarning, match="1 of 3 genes are missing and set to zero"):
            filled = match.apply(late, "late", fill_missing=True)
        np.testing.assert_array_equal(filled.X.toarray() if sparse else filled.X, [[2, 0, 1]] * 3)
        assert list(filled.var_names) == ["A", "B", "C"] and list(filled.obs_names) == list(late.obs_names)
        np.testing.assert_array_equal(filled.obsm["spatial"], late.obsm["spatial"])
    assert late.shape == (3, 2)


# ---------------------------------------------------------------- measured data

measured = pytest.mark.skipif(data_root() is None, reason="the folder of measured data is absent")


@measured
@pytest.mark.parametrize("name", ["her2st/patient_G.h5ad", "starmap_mpfc/starmap_mpfc.h5ad"])
def test_measured_files_hold_nothing_and_are_read(name: str):
    with h5py.File(data_root() / name) as file:
        assert file["raw"].attrs["encoding-type"] == "null"
    slide = read_h5ad(data_root() / name)
    assert slide.raw is None and slide.n_obs > 100


@measured
@pytest.mark.parametrize("name, shape, counts", [("st_melanoma/st_melanoma", (279, 15666), True), ("bdtnp_drosophila/bdtnp", (3039, 84), False)])
def test_measured_slides(name: str, shape: tuple[int, int], counts: bool):
    slide = read(data_root() / f"{name}.h5ad", spatial=True, counts=counts)
    assert slide.shape == shape
    clean, report = validate_slide(slide, name, counts=counts)
    assert clean.n_obs + len(report.dropped_cells) == shape[0]


@measured
def test_measured_scaled_atlas_is_refused_as_counts():
    with pytest.raises(InputError, match="counts=False"):
        read(data_root() / "bdtnp_drosophila" / "bdtnp.h5ad", spatial=True)


@measured
def test_measured_sections_share_their_genes():
    patient = data_root() / "her2st" / "patient_H.h5ad"
    slides = read_many([patient], spatial=True)
    assert [s.obs["slide"].iloc[0] for s in slides] == sorted({s.obs["slide"].iloc[0] for s in slides})
    other = read(data_root() / "st_melanoma" / "st_melanoma.h5ad", spatial=True)
    match = match_genes([slides[0], other], ["her2", "melanoma"])
    assert len(match.genes) > 5000 and set(match.genes) <= set(slides[0].var_names)
