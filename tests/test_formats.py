"""Formats of instruments, counts that are elsewhere, sections, files behind a source, tables that can always be written."""

from __future__ import annotations

import gzip
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.io import mmwrite

from gears_nb.core.errors import GearsWarning, InputError, speaking
from gears_nb.data.formats import FOREIGN, hdf5_kind, is_zarr, read_parquet
from gears_nb.data.genes import match_genes, take_genes
from gears_nb.data.io import (
    POSITION_COLUMNS,
    find_pair,
    read,
    read_h5ad,
    read_many,
    real_files,
    take_layer,
    take_sample,
    writable,
    write_h5ad,
)
from gears_nb.data.validate import validate_slide

X = np.array([[4, 0, 7, 1], [0, 1, 0, 2], [9, 0, 2, 0], [1, 1, 0, 5], [2, 3, 1, 0]], dtype=np.float32)
CELLS, GENES = [f"AC{i}-1" for i in range(5)], ["GLUL", "ALB", "TBCE", "CPS1"]
PLACES = 1e7 + np.array([[0.125, 2], [1.5, 3], [5, 5], [4, 0.5], [8, 0.25]])  # more digits than float32 has


@pytest.fixture
def table() -> ad.AnnData:
    adata = ad.AnnData(sp.csr_matrix(X), obs=pd.DataFrame(index=CELLS), var=pd.DataFrame(index=GENES))
    adata.obsm["spatial"] = PLACES.copy()
    return adata


def same(slide: ad.AnnData, places: np.ndarray | None = PLACES, genes: list[str] = GENES) -> None:
    """The toy, whatever it was read from; positions to the last bit."""
    np.testing.assert_array_equal(slide.X.toarray(), X[:, : len(genes)])
    assert list(slide.var_names) == genes
    if places is not None:
        assert slide.obsm["spatial"].dtype == np.float64
        np.testing.assert_array_equal(slide.obsm["spatial"], places)


def refused(source: object, words: str, **how: object) -> str:
    """The one line that refuses `source`."""
    with pytest.raises(InputError) as error:
        read(source, **({"spatial": True} | how))
    text = str(error.value)
    assert words in text and "\n" not in text and "Remedy: " in text, text
    return text


def quietly(source: object, **how: object) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        return read(source, **({"spatial": True} | how))


def h5_of_10x(path: Path, types: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    by_gene = sp.csc_matrix(X.T)
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"], matrix["shape"] = np.array(CELLS, "S"), np.array(by_gene.shape, "i4")
        for name, kind in (("data", "i4"), ("indices", "i8"), ("indptr", "i8")):
            matrix[name] = getattr(by_gene, name).astype(kind)
        features = matrix.create_group("features")
        features["id"], features["name"] = np.array([f"ENSG{j}" for j in range(4)], "S"), np.array(GENES, "S")
        features["feature_type"], features["genome"] = np.array(types or ["Gene Expression"] * 4, "S"), np.array(["X"] * 4, "S")
    return path


def mtx_of_10x(folder: Path, *, packed: bool = True, old: bool = False, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    mmwrite(folder / "m.mtx", sp.coo_matrix(X.T.astype(int)))
    kind = "" if old else "\tGene Expression"
    parts = {
        "matrix.mtx": (folder / "m.mtx").read_text(),
        "barcodes.tsv": "\n".join(CELLS) + "\n",
        "genes.tsv" if old else "features.tsv": "".join(f"ENSG{j}\t{name}{kind}\n" for j, name in enumerate(GENES)),
    }
    (folder / "m.mtx").unlink()
    for name, text in parts.items():
        target = folder / f"{prefix}{name}{'.gz' if packed else ''}"
        target.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return folder


def positions() -> pd.DataFrame:
    frame = pd.DataFrame({"barcode": CELLS, "in_tissue": 1, "array_row": range(5), "array_col": range(5)})
    return frame.assign(pxl_row_in_fullres=PLACES[:, 1], pxl_col_in_fullres=PLACES[:, 0])[list(POSITION_COLUMNS)]


# ---------------------------------------------------------------- 10x


def test_cell_ranger_h5_is_cells_and_no_slide(tmp_path: Path):
    path = h5_of_10x(tmp_path / "outs" / "filtered_feature_bc_matrix.h5")
    assert hdf5_kind(path) == "10x"
    same(read(path, spatial=False), None)
    assert "the whole output folder" in refused(path, "positions: are not in the counts")
    (tmp_path / "outs" / "spatial").mkdir()
    assert refused(path, "positions").endswith(f"give the folder that holds them, {tmp_path / 'outs'}.")
    path.rename(tmp_path / "anything.h5ad")
    same(read(tmp_path / "anything.h5ad", spatial=False), None)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "GSM1_"])
def test_matrix_market_folder(tmp_path: Path, old: bool, packed: bool, prefix: str):
    folder = mtx_of_10x(tmp_path / "filtered_feature_bc_matrix", packed=packed, old=old, prefix=prefix)
    same(read(folder, spatial=False), None)
    refused(folder, "positions: are not in the counts")


def test_matrix_market_folder_with_a_short_list(tmp_path: Path):
    folder = mtx_of_10x(tmp_path / "m", packed=False)
    (folder / "barcodes.tsv").write_text("AC0-1\n")
    refused(folder, "4 x 5 values for 4 features and 1 barcodes", spatial=False)
    (folder / "barcodes.tsv").unlink()
    for spatial in (True, False):
        refused(folder, "folder: holds a matrix.mtx, but not one barcodes.tsv, so the counts have no names", spatial=spatial)
    (folder / "features.tsv").unlink()
    refused(folder, "not one barcodes.tsv and features.tsv (or genes.tsv)", spatial=False)


def test_other_features_are_left_out_and_counted(tmp_path: Path):
    path = h5_of_10x(tmp_path / "raw.h5", ["Gene Expression"] * 3 + ["Antibody Capture"])
    with pytest.warns(GearsWarning, match="1 features that are not genes were left out .Antibody Capture"):
        same(read(path, spatial=False), None, GENES[:3])


def test_names_of_genes_are_taken_literally(tmp_path: Path):
    folder = mtx_of_10x(tmp_path / "m", packed=False, old=True)
    (folder / "genes.tsv").write_text("1\tNA\n2\tnan\n3\tnull\n4\tA\n")
    assert list(read(folder, spatial=False).var_names) == ["NA", "nan", "null", "A"]


# ---------------------------------------------------------------- Space Ranger


@pytest.mark.parametrize("name", ["filtered_feature_bc_matrix.h5", "V1_Heart_filtered_feature_bc_matrix.h5"])
def test_space_ranger_keeps_the_digits(tmp_path: Path, name: str):
    h5_of_10x(tmp_path / name)
    (tmp_path / "spatial").mkdir()
    positions().to_csv(tmp_path / "spatial" / "tissue_positions.csv", index=False)
    same(read(tmp_path, spatial=True))


def fake_pyarrow(monkeypatch: pytest.MonkeyPatch, frame: pd.DataFrame | Exception | None) -> None:
    """A pyarrow that reads `frame` from every file, fails, or (None) is not installed."""
    def read_it(path: Path) -> SimpleNamespace:
        if isinstance(frame, Exception):
            raise frame
        return SimpleNamespace(to_pandas=lambda: frame.copy())

    parquet = None if frame is None else SimpleNamespace(read_table=read_it)
    monkeypatch.setitem(sys.modules, "pyarrow", None if frame is None else SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


def test_visium_hd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for size in ("008", "016"):
        square = tmp_path / "binned_outputs" / f"square_{size}um"
        h5_of_10x(square / "filtered_feature_bc_matrix.h5")
        (square / "spatial").mkdir()
        (square / "spatial" / "tissue_positions.parquet").write_bytes(b"PAR1 PAR1")
    assert refused(tmp_path, "bins of several sizes (square_008um, square_016um)").endswith(f"give one of them, such as {square}.")
    fake_pyarrow(monkeypatch, positions())
    same(read(square, spatial=True))
    fake_pyarrow(monkeypatch, OSError("bad"))
    refused(square, "cannot be read as Parquet")
    fake_pyarrow(monkeypatch, None)
    assert "pip install pyarrow" in refused(square, "pyarrow, which reads it, is not installed")
    same(read(square, spatial=False), None)


def test_real_parquet(tmp_path: Path):
    pytest.importorskip("pyarrow")
    positions().to_parquet(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(read_parquet(tmp_path / "p.parquet").astype({"barcode": object}), positions())
    (tmp_path / "q.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_parquet(tmp_path / "q.parquet")


def test_the_folder_above(tmp_path: Path):
    h5_of_10x(tmp_path / "outs" / "filtered_feature_bc_matrix.h5")
    assert refused(tmp_path, "is not the output itself").endswith(f"give {tmp_path / 'outs'}.")


# ---------------------------------------------------------------- Xenium, MERSCOPE, CosMx


def cells_of_xenium() -> pd.DataFrame:
    return pd.DataFrame({"cell_id": CELLS, "x_centroid": PLACES[:, 0], "y_centroid": PLACES[:, 1], "area": 1.0}).iloc[::-1]


@pytest.mark.parametrize("matrix", ["h5", "folder"])
@pytest.mark.parametrize("places", ["cells.csv.gz", "cells.csv", "cells.parquet"])
def test_xenium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: str, places: str):
    make = h5_of_10x if matrix == "h5" else mtx_of_10x
    make(tmp_path / ("cell_feature_matrix.h5" if matrix == "h5" else "cell_feature_matrix"))
    frame = cells_of_xenium()
    if places.endswith("parquet"):
        frame["cell_id"] = [name.encode() for name in frame["cell_id"]]
        (tmp_path / places).write_bytes(b"PAR1")
        fake_pyarrow(monkeypatch, frame)
    else:
        frame.to_csv(tmp_path / places, index=False)
    same(read(tmp_path, spatial=True))


def test_xenium_controls_and_errors(tmp_path: Path):
    path = h5_of_10x(tmp_path / "cell_feature_matrix.h5", ["Gene Expression"] * 3 + ["Negative Control Probe"])
    with pytest.warns(GearsWarning, match="Negative Control Probe"), pytest.raises(InputError, match="cells.csv.gz: is missing"):
        read(tmp_path, spatial=True)
    cells_of_xenium().to_csv(tmp_path / "cells.csv.gz", index=False)
    with pytest.warns(GearsWarning, match="1 features that are not genes were left out"):
        same(read(tmp_path, spatial=True), genes=GENES[:3])
    h5_of_10x(path)
    cells_of_xenium().iloc[1:].to_csv(tmp_path / "cells.csv.gz", index=False)
    refused(tmp_path, "1 barcodes of the matrix have no position (first: AC4-1)")
    cells_of_xenium().drop(columns="y_centroid").to_csv(tmp_path / "cells.csv.gz", index=False)
    refused(tmp_path, "columns: y_centroid missing")
    (tmp_path / "cells.csv.gz").write_bytes(b"no")
    refused(tmp_path, "cells.csv.gz: file: cannot be read")
    path.write_bytes(b"x")
    refused(tmp_path, "counts: cannot be read")


@pytest.mark.parametrize("whole", [True, False])
def test_merscope(tmp_path: Path, whole: bool):
    frame = pd.DataFrame(X.astype(int), index=CELLS, columns=GENES).assign(**{"Blank-1": 9, "Blank-22": 0})
    frame.to_csv(tmp_path / "cell_by_gene.csv")
    metadata = pd.DataFrame({"fov": 0, "volume": 1.5, "center_x": PLACES[:, 0], "center_y": PLACES[:, 1], "min_x": 0.0}, index=CELLS)
    metadata.iloc[::-1].to_csv(tmp_path / "cell_metadata.csv")
    (tmp_path / "detected_transcripts.csv").write_text("gene,global_x\n")
    source = tmp_path if whole else f"{tmp_path}/cell_by_gene.csv+{tmp_path}/cell_metadata.csv"
    with pytest.warns(GearsWarning, match="2 control probes are not genes and were left out .Blank-1, Blank-22"):
        same(read(source, spatial=True))
    same(quietly(tmp_path / "cell_by_gene.csv", spatial=False), None)


def cosmx(folder: Path, ending: str = "") -> tuple[Path, Path]:
    """Two fields of view, each with a cell 1; the last row of the counts is background."""
    field, number = [1, 1, 1, 2, 2], [1, 2, 3, 1, 2]
    counts = pd.DataFrame(X.astype(int), columns=GENES).assign(NegPrb1=3, SystemControl2=1)
    counts.insert(0, "cell_ID", number)
    counts.insert(0, "fov", field)
    counts.loc[5] = [2, 0, *[90] * 6]
    local = {"CenterX_local_px": 0, "CenterY_local_px": 0}
    places = pd.DataFrame({"fov": field, "cell_ID": number, **local, "CenterX_global_px": PLACES[:, 0], "CenterY_global_px": PLACES[:, 1]})
    paths = folder / f"S0_exprMat_file.csv{ending}", folder / f"S0_metadata_file.csv{ending}"
    counts.to_csv(paths[0], index=False)
    places.iloc[::-1].to_csv(paths[1], index=False)
    (folder / "S0_fov_positions_file.csv").write_text("fov,x_global_px,y_global_px\n1,0,0\n")
    return paths


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_cosmx(tmp_path: Path, ending: str):
    expression, metadata = cosmx(tmp_path, ending)
    for source in (tmp_path, f"{expression}+{metadata}"):
        with pytest.warns(GearsWarning) as seen:
            slide = read(source, spatial=True)
        told = " ".join(str(w.message) for w in seen)
        assert "1 rows with cell_ID 0 are background" in told and "2 control probes" in told
        same(slide)
        assert list(slide.obs_names) == ["1_1", "1_2", "1_3", "2_1", "2_2"] and list(slide.obs["fov"]) == [1, 1, 1, 2, 2]
    same(quietly(expression, spatial=False), None)
    refused(expression, "positions: are in the metadata of CosMx")


def test_cosmx_errors(tmp_path: Path):
    expression, metadata = cosmx(tmp_path)
    frame = pd.read_csv(metadata)
    frame.iloc[1:].to_csv(metadata, index=False)
    with pytest.warns(GearsWarning), pytest.raises(InputError, match="1 barcodes of the matrix have no position .first: 2_2"):
        read(tmp_path, spatial=True)
    frame.drop(columns="CenterX_global_px").to_csv(metadata, index=False)
    refused(tmp_path, "columns: CenterX_global_px missing")
    frame.to_csv(metadata, index=False)
    pd.concat([pd.read_csv(expression)] * 2).to_csv(expression, index=False)
    refused(tmp_path, "'1_1' occurs more than once")


# ---------------------------------------------------------------- tables without a header


def test_a_coordinate_table_without_a_header(tmp_path: Path):
    pd.DataFrame(X.astype(int), index=CELLS, columns=GENES).to_csv(tmp_path / "expr.csv")
    frame = pd.DataFrame(PLACES, index=CELLS)
    for how in ({"header": False}, {}, {"index_label": "barcode"}, {"header": ["x", "y"]}):
        frame.to_csv(tmp_path / "coords.csv", **how)
        slide = read(tmp_path, spatial=True)
        np.testing.assert_allclose(slide.obsm["spatial"], PLACES, rtol=1e-15)
        assert slide.obsm["spatial"].dtype == np.float64
    frame.to_csv(tmp_path / "coords.tsv.gz", header=False, sep="\t")
    (tmp_path / "coords.csv").unlink()
    np.testing.assert_allclose(read(tmp_path, spatial=True).obsm["spatial"], PLACES, rtol=1e-15)


def test_damaged_text_is_one_line(tmp_path: Path):
    whole = gzip.compress(("cell,x,y\n" + "".join(f"c{i},{i},{i * i}\n" for i in range(3000))).encode())
    for name in ("expr.csv.gz", "coords.csv.gz"):
        (tmp_path / name).write_bytes(whole)
    for damaged in (whole[:200], whole[:500] + bytes(200) + whole[700:], b"\xff\xfe\x00" * 50, b""):
        (tmp_path / "expr.csv.gz").write_bytes(damaged)
        refused(tmp_path, "expr.csv.gz: file: cannot be read as a text table")


# ---------------------------------------------------------------- Zarr and what is not read


def test_zarr(tmp_path: Path, table: ad.AnnData):
    pytest.importorskip("zarr")
    table.write_zarr(tmp_path / "s.zarr")
    slide = read(tmp_path / "s.zarr", spatial=True)
    same(slide)
    assert set(slide.obs["slide"]) == {"s"}
    inside = tmp_path / "tissue.zarr" / "tables" / "cells"
    table.write_zarr(inside)
    (tmp_path / "tissue.zarr" / "zarr.json").write_text("{}")
    assert f"give the table in it, {inside}" in refused(tmp_path / "tissue.zarr", "is a SpatialData store, not one table")
    same(read(inside, spatial=True))
    (tmp_path / "empty.zarr").mkdir()
    refused(tmp_path / "empty.zarr", "is not a readable AnnData table")


@pytest.mark.parametrize("ending", FOREIGN)
def test_what_is_not_read_says_what_it_is(tmp_path: Path, ending: str):
    path = tmp_path / f"data{ending}"
    path.write_bytes(b"anything")
    for spatial in (True, False):
        assert f"is {FOREIGN[ending][0]}" in refused(path, "which is not read here", spatial=spatial)


def test_content_tells_what_a_name_hides(tmp_path: Path, table: ad.AnnData):
    path = tmp_path / "a.h5ad"
    path.write_bytes(gzip.compress(b"\x89HDF\r\n\x1a\n and more"))
    refused(path, "an AnnData file packed with gzip by its content, so not an .h5ad")
    path.write_bytes(gzip.compress(b"anything"))
    refused(path, "packed with gzip by its content, so not an .h5ad; no HDF5 inside")
    path.write_bytes(gzip.compress(b"BAM\1 and more"))
    refused(path, "a BAM file, aligned reads packed with gzip, by its content")
    path.write_bytes(b"PK\x03\x04 and more")
    refused(path, "an archive by its content")
    for groups, kind in ((("matrix", "row_attrs", "col_attrs"), "Loom"), (("mod", "obs", "var"), "MuData"), (("cell.names", "assays"), "SeuratDisk")):
        with h5py.File(path, "w") as file:
            for name in groups:
                file.create_group(name)
        refused(path, f"a {kind} file by its content")


# ---------------------------------------------------------------- nullable text, backed tables, layers


def test_nullable_text_is_read(tmp_path: Path, table: ad.AnnData):
    if not hasattr(ad.settings, "allow_write_nullable_strings"):
        pytest.skip("this anndata does not write nullable text")
    table.obs["label"] = pd.array(["u", None, "v", None, "u"], dtype="string")
    table.obs.index, table.var.index = table.obs.index.astype("string"), table.var.index.astype("string")
    with ad.settings.override(allow_write_nullable_strings=True):
        table.write_h5ad(tmp_path / "n.h5ad")
    slide = read(tmp_path / "n.h5ad", spatial=True)
    same(slide)
    assert slide.obs_names.dtype == slide.var_names.dtype == object and list(slide.obs["label"].isna()) == [False, True, False, True, False]
    back = quietly(write_h5ad(slide, tmp_path / "m.h5ad"))
    assert list(back.obs["label"].astype(object).fillna("-")) == ["u", "-", "v", "-", "u"]


def test_backed_tables(tmp_path: Path, table: ad.AnnData):
    table.obs["slide"] = list("aaabb")
    table.layers["counts"] = table.X.copy()
    table.write_h5ad(tmp_path / "b.h5ad")
    backed = lambda: ad.read_h5ad(tmp_path / "b.h5ad", backed="r")
    same(read(write_h5ad(backed(), tmp_path / "c.h5ad"), spatial=True, min_spots=2))
    assert not take_layer(backed(), "counts", "b").isbacked and not writable(backed(), "b")[0].isbacked
    assert list(take_sample(backed(), "b", "b").obs_names) == CELLS[3:]


def test_counts_in_a_layer_or_in_raw(tmp_path: Path, table: ad.AnnData):
    table.layers["raw_counts"], table.raw = table.X.copy(), table.copy()
    table.X = np.log1p(table.X.toarray())
    small = table[:, ["CPS1", "GLUL"]].copy()
    path = write_h5ad(small, tmp_path / "a.h5ad")
    refused(path, "counts are needed")
    for layer in ("raw_counts", "raw"):
        slide = read(path, spatial=True, layer=layer)
        np.testing.assert_array_equal(slide.X.toarray(), X[:, [3, 0]])
        assert list(slide.var_names) == ["CPS1", "GLUL"] and "raw_counts" in slide.layers
        assert [s.n_obs for s in read_many([path], spatial=True, layer=layer)] == [5]
    refused(path, "layers: has no layer 'counts' (layers: raw_counts, raw). Remedy: name one of them, such as layer='raw_counts'", layer="counts")
    with speaking("shell"):
        refused(path, "such as --layer raw_counts", layer="counts")
    plain = ad.AnnData(sp.csr_matrix(X))
    for name in ("raw", "X"):
        with pytest.raises(InputError, match=f"q: layers: has no layer '{name}' \\(layers: none\\). Remedy: leave this option out, then X is read"):
            take_layer(plain, name, "q")


def test_taking_a_layer_copies_and_changes_nothing(table: ad.AnnData):
    table.layers["c"] = table.X * 2
    taken = take_layer(table, "c", "a")
    assert taken.X is table.layers["c"] and take_layer(table, None, "a") is table
    taken.obs["new"], taken.uns["new"], taken.obsm["new"] = 1, 1, np.zeros((5, 1))
    assert "new" not in table.obs and "new" not in table.uns and "new" not in table.obsm
    same(table)


def test_raw_without_a_gene_of_the_table(table: ad.AnnData):
    table.raw = table[:, :3].copy()
    with pytest.raises(InputError, match="raw: does not have 1 of the 4 genes of the table .such as CPS1"):
        take_layer(table, "raw", "a.h5ad")


# ---------------------------------------------------------------- sections


def test_sections_of_any_column(tmp_path: Path):
    rng = np.random.default_rng(0)
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(3.0, (8, 3)).astype(np.float32)), obs=pd.DataFrame({"library_id": list("qqqqpppp"), "mouse": list("mnmnmnmn")}))
    adata.obs_names, adata.obsm["spatial"] = [f"c{i}" for i in range(8)], rng.random((8, 2))
    path = write_h5ad(adata, tmp_path / "two.h5ad")
    assert [s.obs["slide"].iloc[0] for s in read_many([path], spatial=True)] == ["q", "p"]
    assert [list(s.obs_names) for s in read_many([path], spatial=True, slide_key="mouse")] == [["c0", "c2", "c4", "c6"], ["c1", "c3", "c5", "c7"]]
    assert [s.obs["slide"].iloc[0] for s in read_many([path], spatial=True, slide_key="none")] == ["two"]
    assert list(read(path, spatial=True).obs["slide"]) == list("qqqqpppp")
    assert list(read(f"{path}#p", spatial=True).obs_names) == ["c4", "c5", "c6", "c7"]
    assert list(read(f"{path}#n", spatial=True, slide_key="mouse").obs_names) == ["c1", "c3", "c5", "c7"]
    refused(f"{path}#r", "has no 'r', only p, q")
    refused(path, "there is no such column", slide_key="nothing")


def test_a_plane_is_passed_on(tmp_path: Path, table: ad.AnnData):
    rng = np.random.default_rng(0)
    table.obsm["spatial"] = rng.random((5, 3))
    path = write_h5ad(table, tmp_path / "deep.h5ad")
    refused(path, "obsm['spatial']")
    assert read(path, spatial=True, plane="xz").n_obs == read_many([path], spatial=True, plane="xz")[0].n_obs == 5


def test_a_usual_name_of_sections_is_asked_about_once_per_slide(tmp_path: Path, table: ad.AnnData):
    table.obs["batch"] = list("aabbb")
    path = write_h5ad(table, tmp_path / "two.h5ad")
    with pytest.warns(GearsWarning) as seen:
        read_many([path], spatial=True)
    assert [str(w.message) for w in seen] == [f"{path}: obs['batch'] has 2 labels: if these are sections, name it with slide_key='batch'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_many([path], spatial=False)
        read_many([path], spatial=True, slide_key="none")


# ---------------------------------------------------------------- depth, and cells without places


def test_a_third_coordinate_of_a_pair_is_not_lost(tmp_path: Path):
    pd.DataFrame(X.astype(int), index=CELLS, columns=GENES).to_csv(tmp_path / "expr.csv")
    frame = pd.DataFrame({"x": PLACES[:, 0], "y": PLACES[:, 1], "z": [0.0, 3, 1, 7, 2]}, index=CELLS)
    frame.to_csv(tmp_path / "coords.csv")
    refused(tmp_path, "obsm['spatial']: has shape (5, 3), and the third column varies (0 to 7)")
    for plane, columns in (("xy", ["x", "y"]), ("xz", ["x", "z"]), ("yz", ["y", "z"])):
        slide = read(tmp_path, spatial=True, plane=plane)
        np.testing.assert_allclose(slide.obsm["spatial"], frame.to_numpy())
        np.testing.assert_allclose(validate_slide(slide, "A", plane=plane)[0].obsm["spatial"], frame[columns].to_numpy())
    frame.assign(z=4.0).to_csv(tmp_path / "coords.csv")
    np.testing.assert_allclose(read(tmp_path, spatial=True).obsm["spatial"], PLACES)


@pytest.mark.parametrize("places", ["missing", "damaged", "other cells", "no numbers"])
def test_cells_are_read_without_looking_at_places(tmp_path: Path, places: str):
    pd.DataFrame(X.astype(int), index=CELLS, columns=GENES).to_csv(tmp_path / "expr.csv")
    text = {"damaged": "\0\0", "other cells": "cell,x,y\na,1,2\n", "no numbers": "cell,x,y\n" + "".join(f"{c},?,\n" for c in CELLS)}
    if places in text:
        (tmp_path / "coords.csv").write_text(text[places])
    for source in (tmp_path, f"{tmp_path}/expr.csv+{tmp_path}/coords.csv"):
        same(quietly(source, spatial=False), None)
        with pytest.raises(InputError):
            read(source, spatial=True)


def test_folders_of_instruments_are_cells_without_places(tmp_path: Path):
    mtx_of_10x(tmp_path / "visium" / "filtered_feature_bc_matrix")
    mtx_of_10x(tmp_path / "xenium" / "cell_feature_matrix")
    (tmp_path / "xenium" / "cells.csv.gz").write_bytes(b"no")
    (tmp_path / "merscope").mkdir()
    pd.DataFrame(X.astype(int), index=CELLS, columns=GENES).to_csv(tmp_path / "merscope" / "cell_by_gene.csv")
    for name in ("visium", "xenium", "merscope"):
        same(quietly(tmp_path / name, spatial=False), None)
    (tmp_path / "cosmx").mkdir()
    cosmx(tmp_path / "cosmx")[1].unlink()
    assert quietly(tmp_path / "cosmx", spatial=False).shape == (5, 4)
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "folder: 0 expression tables found, one is needed", spatial=False)


def test_measures_of_cells_are_not_genes(tmp_path: Path):
    frame = pd.DataFrame(X.astype(int), index=CELLS, columns=GENES).assign(total_counts=9e5, n_genes=7, fov=1, cell_area=5.5, Volume=2.5, **{"nCount.RNA": 3})
    frame.to_csv(tmp_path / "expr.csv")
    pd.DataFrame(PLACES, index=CELLS, columns=["x", "y"]).to_csv(tmp_path / "coords.csv")
    for source, spatial in ((tmp_path, True), (tmp_path / "expr.csv", False)):
        with pytest.warns(GearsWarning, match="6 columns are measures of cells, not genes, and were left out .total_counts, n_genes, fov"):
            assert list(read(source, spatial=spatial).var_names) == GENES


def test_a_zarr_store_is_known_by_name_or_content_and_lightly(tmp_path: Path):
    (tmp_path / "plain" / "X").mkdir(parents=True)
    (tmp_path / "plain" / "zarr.json").write_text("{}")
    assert is_zarr(tmp_path / "plain") and is_zarr(str(tmp_path / "none.zarr")) and not is_zarr(tmp_path) and not is_zarr(tmp_path / "none")
    code = "import sys; from gears_nb.data.formats import is_zarr; is_zarr('x'); print({'pandas', 'anndata', 'scanpy', 'torch', 'h5py', 'zarr'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# ---------------------------------------------------------------- files behind a source


def test_files_behind_a_source(tmp_path: Path, table: ad.AnnData):
    real, link = tmp_path / "real.h5ad", tmp_path / "link.h5ad"
    real.write_bytes(b"1")
    link.symlink_to(real)
    (folder := tmp_path / "folder" / "deep").mkdir(parents=True)
    (folder / "a.csv").write_text("")
    (folder / "b.csv").symlink_to(real)
    (folder / "loop").symlink_to(tmp_path / "folder")
    assert real_files(link) == real_files(f"{link}#A1") == [real.resolve()]
    assert real_files(tmp_path / "folder") == sorted([real.resolve(), (folder / "a.csv").resolve()])
    assert real_files(f"{folder}/a.csv+{link}") == sorted([real.resolve(), (folder / "a.csv").resolve()])
    assert real_files(f"{folder}/a.csv+{folder}/none.csv") == [(folder / "a.csv").resolve()]
    assert real_files(tmp_path / "none.h5ad") == []


def test_listing_files_is_light():
    code = "import sys; from gears_nb.data.io import real_files; real_files('x'); print({'pandas', 'anndata', 'scanpy', 'torch', 'h5py'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# ---------------------------------------------------------------- writing what cannot be written


def awkward(table: ad.AnnData) -> ad.AnnData:
    """A table with everything that a user once put into one."""
    obs = table.obs
    obs["mixed"], obs["gap"] = ["a", 1, None, 2.5, True], ["a", None, "b", None, "a"]
    obs["nullable"], obs["full"] = pd.array(["u", None, "v", None, "u"], dtype="string"), pd.array(list("uvuvu"), dtype="string")
    obs["date"], obs["dict"] = pd.to_datetime(["2026-01-02"] * 4 + [None]), [{"a": 1}] * 5
    obs["kinds"], obs["whole"] = pd.Categorical(["a", 1, "a", None, 1]), pd.array([1, None, 2, 3, 4], dtype="Int64")
    obs["half"], obs["_index"] = pd.array([1.5, None, 2, 3, 4], dtype="Float64"), 1
    obs["fine"], obs["text"], obs[7] = np.arange(5.0), list("abcde"), 7
    table.uns |= {"function": print, "set": {1}, 3: 4, "nested": {"deep": {"bad": object(), "good": [1, 2]}, "frame": pd.DataFrame({"m": ["a", 1]})}, "/top": 1, "": 2}
    table.obsm["frame"] = pd.DataFrame({"m": ["a", 1, 2, 3, 4], "n": range(5)}, index=table.obs_names)
    table.obsm["a/b"], table.layers["c"] = np.zeros((5, 2)), table.X.copy()
    table.varm["v"] = np.zeros((4, 2))
    table.raw = table[:, :2].copy()
    table.obs.index.name = "fine"
    return table


def test_everything_can_be_written(tmp_path: Path, table: ad.AnnData):
    hard = awkward(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = hard.copy()
    copy, notes = writable(hard, "hard.h5ad")
    assert copy.X is hard.X and copy.layers["c"] is hard.layers["c"] and copy.obsm["spatial"] is hard.obsm["spatial"]
    for name in ("obs['mixed']", "obs['gap']", "obs['nullable']", "obs['full']", "obs['date']", "obs['dict']", "obs['kinds']", "obs['half']", "obs['_index']",
                 "'7'", "uns['function']", "uns['set']", "uns[3]", "uns['nested']['deep']['bad']", "uns['nested']['frame']['m']", "uns['/top']", "uns['']",
                 "obsm['frame']['m']", "obsm['a/b']", "index of obs"):
        assert sum(name in note for note in notes) == 1, (name, notes)
    assert len(notes) == 20, notes
    assert all(note.startswith("hard.h5ad: ") for note in notes)
    with pytest.warns(GearsWarning, match="obs.'mixed'. was written as categories"):
        path = write_h5ad(hard, tmp_path / "hard.h5ad")
    back = read_h5ad(path)
    same(back)
    assert set(back.obs) == {"mixed", "gap", "nullable", "full", "date", "kinds", "whole", "half", "fine", "text", "7"}
    assert back.obs["mixed"].astype(object).fillna("-").tolist() == ["a", "1", "-", "2.5", "True"]
    assert back.obs["kinds"].astype(object).fillna("-").tolist() == ["a", "1", "a", "-", "1"]
    np.testing.assert_array_equal(back.obs["half"].to_numpy(dtype=float, na_value=np.nan), [1.5, np.nan, 2, 3, 4])
    assert back.uns["nested"]["deep"]["good"].tolist() == [1, 2] and back.uns["nested"]["frame"]["m"].tolist() == ["a", "1"]
    assert set(back.obsm) == {"spatial", "frame"} and back.raw.shape == (5, 2) and set(back.varm) == {"v"}
    pd.testing.assert_frame_equal(hard.obs, before.obs)
    assert set(hard.uns) == set(before.uns) and set(hard.obsm) == set(before.obsm) and "gap" in hard.obs


def test_a_plain_table_passes_unchanged(tmp_path: Path, table: ad.AnnData):
    table.obs["type"], table.obs["text"], table.obs["a/b"] = pd.Categorical(list("ababa")), list("abcde"), 1
    table.uns["nothing"], table.uns["colours"] = None, np.array(["red", "blue"])
    copy, notes = writable(table, "a")
    pd.testing.assert_frame_equal(copy.obs, table.obs)
    assert copy.X is table.X
    if hasattr(ad.settings, "disallow_forward_slash_in_h5ad") and not ad.settings.disallow_forward_slash_in_h5ad:
        assert notes == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", GearsWarning)
        write_h5ad(table[:3], tmp_path / "view.h5ad")


def test_no_matrix_to_write(tmp_path: Path):
    adata = ad.AnnData(obs=pd.DataFrame(index=list("ab")), var=pd.DataFrame(index=list("xyz")))
    adata.obsm["X_gears"] = np.eye(2)
    assert ad.read_h5ad(write_h5ad(adata, tmp_path / "a.h5ad")).X is None


# ---------------------------------------------------------------- genes of two species, small panels


def genes(names: list[str]) -> ad.AnnData:
    return ad.AnnData(np.ones((2, len(names)), dtype=np.float32), var=pd.DataFrame(index=names))


def test_two_species_are_asked_about():
    mouse, human = genes([f"Actb{i}" for i in range(60)]), genes([f"ACTB{i}" for i in range(60)])
    with pytest.warns(GearsWarning) as seen:
        match = match_genes([mouse, human], ["m.h5ad", "h.h5ad"])
    asked = [str(w.message) for w in seen if "species" in str(w.message)]
    assert len(asked) == 1 and asked[0].startswith("h.h5ad: genes: 60 of 60 shared genes were matched only by ignoring case (ACTB0 here, Actb0 in m.h5ad)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match.apply(human, "h.h5ad")
    with pytest.warns(GearsWarning, match="different species"):
        match.apply(human, "late.h5ad")
    with pytest.warns(GearsWarning, match="different species"):
        take_genes(human, match.genes, match.kind)


@pytest.mark.parametrize("n, of, asked", [(20, 100, True), (19, 60, False), (20, 101, False)])
def test_a_few_names_in_other_case_are_no_other_species(n: int, of: int, asked: bool):
    other = genes([*(f"GENE{i}" for i in range(n)), *(f"Gene{i}" for i in range(n, of))])
    with pytest.warns(GearsWarning) as seen:
        match_genes([genes([f"Gene{i}" for i in range(of)]), other])
    assert any("different species" in str(w.message) for w in seen) == asked


def test_a_small_panel_is_not_another_species():
    large, panel = genes([f"g{i}" for i in range(7, 200)]), genes([f"g{i}" for i in range(40)])
    with pytest.raises(InputError, match="33 genes shared by all sources, 50 are needed; the panel of p.h5ad is small .40 genes") as error:
        match_genes([large, panel], ["v.h5ad", "p.h5ad"])
    assert "species" not in str(error.value) and error.value.source == "p.h5ad" and error.value.remedy.endswith("min_genes=33")
    with speaking("shell"), pytest.raises(InputError, match="--min-genes 33"):
        match_genes([panel, large], ["p.h5ad", "v.h5ad"])
    with pytest.raises(InputError, match="one species and one naming, or allow fewer, min_genes=3"):
        match_genes([large, genes([f"g{i}" for i in range(10)] + [f"h{i}" for i in range(90)])])
    with pytest.raises(InputError) as error:
        match_genes([large, genes([f"h{i}" for i in range(90)])])
    assert "min_genes" not in str(error.value)


def test_known_names_of_instruments_go_first(tmp_path: Path):
    for name in ("cell_by_gene.csv", "cell_metadata.csv", "counts.csv", "coords.csv"):
        (tmp_path / name).write_text("")
    assert [p.name for p in find_pair(tmp_path)] == ["cell_by_gene.csv", "cell_metadata.csv"]
