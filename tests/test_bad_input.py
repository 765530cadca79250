"""Every kind of bad input is refused with one line that names the file, the field and the remedy, and nothing is written."""

from __future__ import annotations

import gzip
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data.genes import match_genes
from gears_nb.data.io import read, read_many, write_h5ad
from gears_nb.data.validate import validate_cells, validate_slide


def slide(n: int = 20, g: int = 60, *, sparse: bool = True) -> ad.AnnData:
    rng = np.random.default_rng(0)
    X = 1 + rng.poisson(2.0, size=(n, g)).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(X) if sparse else X)
    adata.obs_names = [f"spot{i}" for i in range(n)]
    adata.var_names = [f"Gene{j}" for j in range(g)]
    adata.obsm["spatial"] = rng.uniform(size=(n, 2)).astype(np.float32)
    return adata


def set_value(value: float, sparse: bool) -> ad.AnnData:
    adata = slide(sparse=sparse)
    X = adata.X.toarray() if sparse else adata.X
    X[3, 7] = value
    adata.X = sp.csr_matrix(X) if sparse else X
    return adata


def with_spatial(C: object) -> ad.AnnData:
    adata = slide()
    adata.obsm["spatial"] = C
    return adata


def coordinates_with(value: float) -> ad.AnnData:
    C = slide().obsm["spatial"].copy()
    C[5, 1] = value
    return with_spatial(C)


def no_spatial() -> ad.AnnData:
    adata = slide()
    del adata.obsm["spatial"]
    return adata


def renamed(axis: str) -> ad.AnnData:
    adata = slide()
    names = list(getattr(adata, f"{axis}_names"))
    names[1] = names[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(adata, f"{axis}_names", names)
    return adata


def log_normalised() -> ad.AnnData:
    adata = slide()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    return adata


def small_section() -> ad.AnnData:
    adata = slide()
    adata.obs["slide"] = ["big"] * 18 + ["tiny"] * 2
    return adata


TABLES: dict[str, tuple[Callable[[], ad.AnnData], str, str]] = {
    "no spatial": (no_spatial, "obsm['spatial']", "missing"),
    "NaN": (lambda: set_value(np.nan, True), "X", "first at cell 'spot3', gene 'Gene7'"),
    "NaN dense": (lambda: set_value(np.nan, False), "X", "first at cell 'spot3', gene 'Gene7'"),
    "infinite": (lambda: set_value(np.inf, True), "X", "infinite (1 values"),
    "negative": (lambda: set_value(-2.0, True), "X", "negative (1 values, first at cell 'spot3', gene 'Gene7'"),
    "negative dense": (lambda: set_value(-2.0, False), "X", "negative"),
    "NaN coordinate": (lambda: coordinates_with(np.nan), "obsm['spatial']", "1 spots (spot5)"),
    "infinite coordinate": (lambda: coordinates_with(np.inf), "obsm['spatial']", "1 spots (spot5)"),
    "three coordinates": (lambda: with_spatial(np.arange(60.0).reshape(20, 3)), "obsm['spatial']", "(20, 3)"),
    "one point": (lambda: with_spatial(np.ones((20, 2))), "obsm['spatial']", "one point"),
    "not counts": (log_normalised, "X", "not whole numbers"),
    "repeated barcode": (lambda: renamed("obs"), "obs_names (barcodes)", "spot0"),
    "repeated gene": (lambda: renamed("var"), "var_names (genes)", "Gene0"),
    "few spots": (slide, "obs", "20 spots, at least 96 are needed (one training piece)"),
    "few spots in one section": (small_section, "obs['slide'] == ", "spots, at least 96 are needed (one training piece)"),
    "no genes": (lambda: slide()[:, :0].copy(), "X", "is empty"),
}


def one_line(error: InputError, source: object, field: str, words: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.startswith(f"{source}: {field}")
    assert ". Remedy: " in message and len(message.split("Remedy: ")[1]) > 10
    assert words in message


@pytest.mark.parametrize("case", TABLES)
def test_bad_table_is_refused_when_read_and_when_validated(case: str, tmp_path: Path):
    make, field, words = TABLES[case]
    path = tmp_path / "A.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make().write_h5ad(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as refused:
        read(path, spatial=True, min_spots=96 if "few" in case else 3)
    one_line(refused.value, path, field, words)
    with pytest.raises(InputError) as refused:
        validate_slide(make(), "A.h5ad", min_spots=96 if "few" in case else 3)
    one_line(refused.value, "A.h5ad", field, words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("value", [2e38, 1e39, 1e300])
def test_values_beyond_single_precision_are_refused(value: float, sparse: bool):
    adata = slide()
    X = np.asarray(adata.X.todense() if sp.issparse(adata.X) else adata.X, dtype=np.float64)
    X[2, 4], X[3, 5] = value, value / 2
    adata.X = sp.csr_matrix(X) if sparse else X
    words = re.escape(f"A.h5ad: X: the largest value, {value:g} (cell '{adata.obs_names[2]}', gene '{adata.var_names[4]}'), does not fit")
    with pytest.raises(InputError, match=words):
        validate_cells(adata, "A.h5ad")


def test_the_message_says_where_the_counts_are():
    with pytest.raises(InputError, match=r"layers\['counts'\].*counts=False"):
        validate_cells(log_normalised(), "Q.h5ad")


def test_a_text_matrix_of_strings_is_refused():
    adata = slide(sparse=False)
    adata.X = adata.X.astype(str).astype(object)
    with pytest.raises(InputError, match="not numbers"):
        validate_cells(adata, "Q.h5ad")


# ---------------------------------------------------------------- files


def test_missing_file(tmp_path: Path):
    with pytest.raises(InputError) as refused:
        read(tmp_path / "none.h5ad", spatial=True)
    one_line(refused.value, tmp_path / "none.h5ad", "file", "does not exist")


@pytest.mark.parametrize("content", [b"", b"hello, this is text\n" * 50, gzip.compress(b"x" * 1000, mtime=0)])
def test_not_an_h5ad(tmp_path: Path, content: bytes):
    path = tmp_path / "A.h5ad"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read(path, spatial=True)
    one_line(refused.value, path, "file", "so not an .h5ad")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated_h5ad(tmp_path: Path, share: float):
    path = tmp_path / "A.h5ad"
    slide().write_h5ad(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError) as refused:
        read(path, spatial=True)
    one_line(refused.value, path, "file", "truncated or damaged")


def test_damaged_h5ad(tmp_path: Path):
    path = tmp_path / "A.h5ad"
    slide(200, 200).write_h5ad(path, compression="gzip")
    content = bytearray(path.read_bytes())
    for start in range(2048, len(content) - 64, 512):
        content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(InputError, match="file: "):
        read(path, spatial=True)


def test_hdf5_without_a_table(tmp_path: Path):
    path = tmp_path / "A.h5ad"
    with h5py.File(path, "w") as file:
        file.create_group("weights")["w"] = np.zeros(4)
    with pytest.raises(InputError) as refused:
        read(path, spatial=True)
    one_line(refused.value, path, "file", "not a readable AnnData")


def test_empty_folder(tmp_path: Path):
    with pytest.raises(InputError, match="0 expression and 0 coordinate tables"):
        read(tmp_path, spatial=True)


def test_unknown_section(tmp_path: Path):
    path = write_h5ad(small_section(), tmp_path / "A.h5ad")
    with pytest.raises(InputError, match="has no 'huge', only big, tiny"):
        read(f"{path}#huge", spatial=True)
    for spatial in (True, False):
        with pytest.raises(InputError, match="sections: has no 'huge': the file has one section. Remedy: give the whole file"):
            read(f"{write_h5ad(slide(), tmp_path / 'B.h5ad')}#huge", spatial=spatial)


def test_sections_of_cells_by_a_named_column(tmp_path: Path):
    adata = slide()
    adata.obs["batch"] = ["one"] * 8 + ["two"] * 12
    path = write_h5ad(adata, tmp_path / "Q.h5ad")
    assert read(f"{path}#two", spatial=False, slide_key="batch").n_obs == 12
    with pytest.raises(InputError, match="has no 'two': the file has one section. Remedy: if obs..batch.. names the sections, say so: slide_key='batch'"):
        read(f"{path}#two", spatial=False)
    with pytest.raises(InputError, match="has no 'three', only one, two. Remedy: name one of these"):
        read(f"{path}#three", spatial=False, slide_key="batch")


def test_unwritable_output(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "file" / "R.h5ad", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(InputError) as refused:
            write_h5ad(slide(), path)
        one_line(refused.value, path, "output", words)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_h5ad(slide(), tmp_path / "R.h5ad")
    before = path.read_bytes()

    def half(self, name, **_):
        Path(name).write_bytes(b"half of a file")
        raise OSError("cannot write more")
    monkeypatch.setattr("anndata.AnnData.write_h5ad", half)
    with pytest.raises(OSError, match="write"):
        write_h5ad(slide(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["R.h5ad"]


# ---------------------------------------------------------------- genes


def test_too_few_shared_genes_shows_both_sides():
    other = slide()
    other.var_names = [*other.var_names[:49], *(f"Other{j}" for j in range(11))]
    with pytest.raises(InputError) as refused:
        match_genes([slide(), other], ["A.h5ad", "B.h5ad"])
    one_line(refused.value, "B.h5ad", "var_names (genes)", "49 genes shared by all sources, 50 are needed")
    assert "only in A.h5ad: Gene49, Gene50, Gene51, Gene52, Gene53;" in str(refused.value)
    assert "only in B.h5ad: Other0, Other1, Other2, Other3, Other4." in str(refused.value)
    assert "min_genes=49" in str(refused.value)
    assert len(match_genes([slide(), other], min_genes=49).genes) == 49


def test_no_shared_genes_even_if_none_are_asked_for():
    other = slide()
    other.var_names = [f"Other{j}" for j in range(60)]
    with pytest.raises(InputError, match="0 genes shared"):
        match_genes([slide(), other], min_genes=0)


def test_ensembl_against_symbols():
    other = slide()
    other.var_names = [f"ENSMUSG{j:011d}.4" for j in range(60)]
    with pytest.raises(InputError) as refused:
        match_genes([slide(), other], ["A.h5ad", "B.h5ad"])
    one_line(refused.value, "B.h5ad", "var_names (genes)", "Ensembl identifiers (such as ENSMUSG00000000000.4)")
    assert "'gene_name'" in str(refused.value)


# ---------------------------------------------------------------- dropped, counted, remembered


@pytest.mark.parametrize("sparse", [True, False])
def test_empty_cells_and_constant_genes_are_dropped_and_remembered(sparse: bool):
    adata = slide(sparse=False)
    adata.X[[2, 11]] = 0
    adata.X[:, 5] = np.where(adata.X.sum(1) > 0, 3, 0)
    adata.X[:, 9] = 0
    if sparse:
        adata.X = sp.csr_matrix(adata.X)
    before = adata.copy()
    with pytest.warns(GearsWarning) as seen:
        clean, report = validate_cells(adata, "Q.h5ad")
    assert sorted(str(w.message).split(" (")[0] for w in seen) == [
        "Q.h5ad: 2 all-zero cells dropped, kept in the output as NaN",
        "Q.h5ad: 2 constant genes dropped",
    ]
    assert clean.shape == (18, 58)
    assert report.dropped_cells == ("spot2", "spot11") and report.dropped_genes == ("Gene5", "Gene9")
    assert report.obs_names == tuple(adata.obs_names)
    restored = report.restore(np.ones((18, 2)))
    assert np.isnan(restored[[2, 11]]).all() and np.isfinite(np.delete(restored, [2, 11], axis=0)).all()
    assert report.to_dict()["cells_dropped"] == 2
    assert (adata.X != before.X).sum() == 0 and adata.shape == before.shape
    assert validate_cells(before, "Q.h5ad", drop_constant=False)[0].n_vars == 60


def test_a_slide_that_falls_below_the_miniset_after_dropping_is_refused():
    adata = slide(sparse=False)
    adata.X[0] = 0
    with pytest.warns(GearsWarning), pytest.raises(InputError, match="19 spots, at least 20 are needed"):
        validate_slide(adata, "A.h5ad", min_spots=20)


def test_nothing_but_zeros_or_constants():
    with pytest.raises(InputError, match="all 20 cells are without counts"):
        adata = slide()
        adata.X = adata.X * 0
        validate_cells(adata, "Q.h5ad")
    with pytest.raises(InputError, match="none of the 60 genes varies"):
        adata = slide(sparse=False)
        adata.X[:] = 1
        validate_cells(adata, "Q.h5ad")


def test_stacked_spots_are_only_counted():
    C = slide().obsm["spatial"].copy()
    C[4] = C[3]
    with pytest.warns(GearsWarning, match="1 spots share their position"):
        clean, _ = validate_slide(with_spatial(C), "A.h5ad")
    assert clean.n_obs == 20


def test_scaled_intensities_need_to_be_declared(tmp_path: Path):
    adata = slide()
    adata.X = adata.X / adata.X.max()
    path = write_h5ad(adata, tmp_path / "atlas.h5ad")
    with pytest.raises(InputError, match="counts are needed"):
        read_many([path], spatial=True)
    assert read_many([path], spatial=True, counts=False)[0].shape == (20, 60)


def test_rounding_noise_passes_as_counts():
    adata = slide(sparse=False)
    adata.X += np.float32(2e-4)
    assert validate_cells(adata, "Q.h5ad")[0].shape == (20, 60)
