"""SpatialData stores written by the package itself, stacks of sections, tables that stay on disk, and folders as vendors lay them out."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from test_formats import CELLS, PLACES, cosmx, h5_of_10x, mtx_of_10x, positions, same
from test_formats import X as TOY

from gears_nb.core.errors import GearsWarning, InputError, speaking
from gears_nb.data.readers import backed, depth_levels, is_spatialdata, places_of, read, read_many, split_by_depth, tables_of

GENES = ["GLUL", "ALB", "TBCE", "CPS1"]
COUNTS = np.random.default_rng(5).poisson(3.0, (24, 4)).astype(np.float32)
N = 12


def table(rows: slice, **obs: object) -> ad.AnnData:
    X = COUNTS[rows]
    return ad.AnnData(sp.csr_matrix(X), obs=pd.DataFrame(obs, index=[f"r{i}" for i in range(24)][rows]), var=pd.DataFrame(index=GENES))


def refused(source: object, *words: str, how=read, **options: object) -> str:
    """The one line that refuses `source`."""
    with pytest.raises(InputError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        how(source, **({"spatial": True} | options if how in (read, read_many) else options))
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text and "Remedy: " in text, text
    return text


def quietly(source: object, **how: object) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        return read(source, **({"spatial": True} | how))


# ---------------------------------------------------------------- SpatialData


def outlines(rng: np.random.Generator, n: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """`n` polygons of 3 to 7 corners as vertices and offsets."""
    rings = []
    for _ in range(n):
        angle = np.sort(rng.random(rng.integers(3, 8)) * 2 * np.pi)
        ring = rng.random(2) * 100 + np.c_[np.cos(angle), np.sin(angle)] * (1 + 3 * rng.random((len(angle), 1)))
        rings.append(np.r_[ring, ring[:1]])
    return np.concatenate(rings), (np.r_[0, np.cumsum([len(r) for r in rings])], np.arange(n + 1))


@pytest.fixture(scope="module")
def tissue():
    """A store in memory with every kind of element: two sections of spots, outlines, points, a mask."""
    sd = pytest.importorskip("spatialdata", reason="spatialdata, which comes with the extra squidpy, is not installed")
    from spatialdata.models import Labels2DModel, PointsModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation, set_transformation

    rng = np.random.default_rng(0)
    shapes = {name: ShapesModel.parse(rng.random((N, 2)) * 100, geometry=0, radius=5.0, index=np.arange(N)) for name in ("left", "right")}
    set_transformation(shapes["left"], Scale([2.0, 3.0], ("x", "y")), "global")
    turn = Affine([[0, -1, 5], [1, 0, 7], [0, 0, 1]], ("x", "y"), ("x", "y"))
    set_transformation(shapes["right"], Sequence([Scale([2.0, 2.0], ("x", "y")), turn]), "global")
    set_transformation(shapes["right"], Identity(), "downscaled")
    V, offsets = outlines(rng, N)
    shapes["cells"] = ShapesModel.parse(V, geometry=3, offsets=offsets, index=[f"cell-{i}" for i in range(N)])
    set_transformation(shapes["cells"], Translation([10.0, 20.0], ("x", "y")), "mouse")
    mask = np.zeros((40, 60), np.int32)
    for i in range(N):
        mask[3 * i + 1 : 3 * i + 3, 2 + i * i % 7 : 9 + 2 * i] = i + 1
    labels = Labels2DModel.parse(mask, dims=("y", "x"))
    set_transformation(labels, Sequence([Scale([0.5, 0.5], ("y", "x")), Translation([4.0, 9.0], ("y", "x"))]), "global")
    points = PointsModel.parse(pd.DataFrame(rng.random((N, 3)), columns=list("xyz")))
    join = partial(TableModel.parse, region_key="where", instance_key="which")
    spots = table(slice(None), where=pd.Categorical(["left"] * N + ["right"] * N), which=[*range(N), *range(N)][::1])
    tables = {
        "spots": join(spots, region=["left", "right"]),
        "outlined": join(table(slice(N), where=pd.Categorical(["cells"] * N), which=[f"cell-{i}" for i in range(N)][::-1]), region="cells"),
        "masked": join(table(slice(N), where=pd.Categorical(["mask"] * N), which=range(1, N + 1)), region="mask"),
        "pointed": join(table(slice(N), where=pd.Categorical(["points"] * N), which=range(N)), region="points"),
    }
    return sd.SpatialData(shapes=shapes, labels={"mask": labels}, points={"points": points}, tables=tables)


def middles(tissue, name: str, system: str = "global") -> pd.DataFrame:
    from spatialdata import get_centroids

    return get_centroids(tissue[name], coordinate_system=system).compute()


@pytest.fixture(scope="module")
def stores(tissue, tmp_path_factory) -> dict[str, Path]:
    """The store as Zarr 3 and as Zarr 2, in the present container format and the one before."""
    from spatialdata._io import format as formats

    folder, out = tmp_path_factory.mktemp("stores"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in (("v3", {}), ("v2", {"sdata_formats": formats.SpatialDataContainerFormatV01()})):
            out[name] = folder / f"{name}.zarr"
            tissue.write(out[name], **kind)
    return out


@pytest.mark.parametrize("version", ["v3", "v2"])
def test_places_are_those_of_the_package(tissue, stores, version):
    store = stores[version]
    assert is_spatialdata(store) and sorted(tables_of(store)) == ["masked", "outlined", "pointed", "spots"]
    slide = read(f"{store}#spots", spatial=True)
    np.testing.assert_allclose(slide.obsm["spatial"], np.concatenate([middles(tissue, n) for n in ("left", "right")]), rtol=1e-9)
    np.testing.assert_array_equal(slide.X.toarray(), COUNTS)
    assert list(slide.obs["slide"]) == ["left"] * N + ["right"] * N
    outlined = read(f"{store}#outlined", spatial=True)
    np.testing.assert_allclose(outlined.obsm["spatial"], middles(tissue, "cells").to_numpy()[::-1], rtol=1e-6)
    masked = read(f"{store}#masked", spatial=True, slide_key="none")
    np.testing.assert_allclose(masked.obsm["spatial"], middles(tissue, "mask")[["x", "y"]].loc[range(1, N + 1)], rtol=1e-9)
    pointed = read(f"{store}#pointed", spatial=True, plane="xz")
    np.testing.assert_allclose(pointed.obsm["spatial"], middles(tissue, "points")[["x", "y", "z"]], rtol=1e-9)


def test_a_region_a_table_and_both(stores):
    store = stores["v3"]
    for name in ("left", "spots/left"):
        assert list(read(f"{store}#{name}", spatial=True).obs["where"]) == ["left"] * N
    assert read(store / "tables" / "spots", spatial=True).n_obs == 24
    assert [part.obs["slide"].iloc[0] for part in read_many([f"{store}#spots"], spatial=True)] == ["left", "right"]
    assert read(f"{store}#spots", spatial=True, slide_key="none").obs["slide"].nunique() == 1
    refused(store, "tables: there are 4: masked, outlined, pointed, spots", "name one, such as v3.zarr#masked")
    refused(f"{store}#up", "there is no 'up', only masked, outlined")
    refused(f"{store}#spots/up", "tables/spots: has no region 'up', only left, right")
    assert read(f"{store}#masked", spatial=False).n_obs == N


def test_geoarrow_and_the_first_format_of_shapes(tissue, stores, tmp_path):
    import spatialdata as sd
    from spatialdata._io import format as formats
    from spatialdata.models import ShapesModel

    V, offsets = outlines(np.random.default_rng(3), N)
    several = ShapesModel.parse(V, geometry=6, offsets=(*offsets, np.array([0, 2, 3, N])))  # cells of two parts, of one, and of all others
    small = sd.SpatialData(shapes={"left": tissue["left"], "one": ShapesModel.parse(V, geometry=3, offsets=offsets), "several": several})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.write(tmp_path / "binary.zarr")
        sd.settings.shapes_geometry_encoding = "geoarrow"
        try:
            small.write(tmp_path / "arrow.zarr")
        finally:
            sd.settings.shapes_geometry_encoding = "WKB"
        del small.shapes["several"]
        small.write(tmp_path / "first.zarr", sdata_formats=[formats.SpatialDataContainerFormatV01(), formats.ShapesFormatV01()])
        small["several"] = several
    assert (tmp_path / "first.zarr" / "shapes" / "one" / "offset0").exists()
    for name, stored in (("left", "binary arrow first"), ("one", "binary arrow first"), ("several", "binary arrow")):
        expected = middles(small, name)[["x", "y"]]
        for store in stored.split():
            found = places_of(tmp_path / f"{store}.zarr" / "shapes" / name, np.arange(len(expected)))
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_half_and_wrong_stores(stores, tmp_path, monkeypatch):
    copy = lambda name: Path(shutil.copytree(stores["v2"], tmp_path / name))
    store = copy("lost.zarr")
    shutil.rmtree(store / "shapes" / "right")
    refused(f"{store}#spots", "region 'right': is annotated by spots, but is not among the shapes, points and labels")
    assert read(f"{store}#left", spatial=True).n_obs == N and read(f"{store}#spots", spatial=False).n_obs == 24
    (store / "shapes" / "left" / "shapes.parquet").write_bytes(b"PAR1")
    refused(f"{store}#left", "shapes.parquet: file: cannot be read as Parquet")
    shutil.rmtree(store / "tables")
    refused(store, "tables: there is none: this SpatialData store has shapes or images only")
    store = copy("attributes.zarr")
    about = store / "shapes" / "left" / ".zattrs"
    about.write_text(about.read_text().replace('"scale"', '"bijection"', 1))
    refused(f"{store}#left", "coordinateTransformations: cannot be applied")
    shutil.rmtree(store / "tables" / "spots" / "uns" / "spatialdata_attrs")
    refused(f"{store}#spots", "tables/spots: annotates no region, and has no obsm['spatial']", "or pass it as cells")
    (store / "tables" / "spots" / "X" / ".zattrs").write_text("{")
    refused(f"{store}#spots", "is not a readable AnnData table")
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(f"{stores['v2']}#left", "pyarrow, which reads it, is not installed", "pip install pyarrow")


def test_own_positions_stand_in(stores, tmp_path):
    store = Path(shutil.copytree(stores["v2"], tmp_path / "own.zarr"))
    whole = ad.read_zarr(store / "tables" / "spots")
    whole.obsm["spatial"] = np.random.default_rng(1).random((24, 2))
    shutil.rmtree(store / "tables" / "spots")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.write_zarr(store / "tables" / "spots")
    shutil.rmtree(store / "shapes" / "right")
    with pytest.warns(GearsWarning, match="positions are those of obsm.'spatial'. of spots: region 'right': is annotated"):
        slide = read(f"{store}#spots", spatial=True)
    np.testing.assert_array_equal(slide.obsm["spatial"], whole.obsm["spatial"])


def test_tables_that_lie_apart_are_sections(tissue, tmp_path):
    import spatialdata as sd
    from spatialdata.models import TableModel
    from spatialdata.transformations import Identity, set_transformation

    join = TableModel.parse(table(slice(N), where=pd.Categorical(["left"] * N), which=range(N)), region="left", region_key="where", instance_key="which")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = sd.SpatialData(shapes={name: tissue[name] for name in ("left", "cells")}, tables={"spots": join, "outlined": tissue["outlined"]})
        apart = sd.deepcopy(parts)
        apart.write(tmp_path / "together.zarr")
        refused([tmp_path / "together.zarr"], "tables: there are 2", how=read_many)
        set_transformation(apart["cells"], {"mouse 2": Identity()}, set_all=True)
        apart.write(tmp_path / "apart.zarr")
    assert [part.n_obs for part in read_many([tmp_path / "apart.zarr"], spatial=True)] == [N, N]


# ---------------------------------------------------------------- chunks that are not there


@pytest.fixture(params=[2, 3])
def zarr_store(request, tmp_path):
    """Writes a slide of 60 spots as a store of either version, chunked where it is dense."""

    def write(name: str, X: object) -> Path:
        path = tmp_path / f"{name}.zarr"
        slide = ad.AnnData(X, obs=pd.DataFrame(index=[f"r{i}" for i in range(60)]), var=pd.DataFrame(index=GENES), obsm={"spatial": PLACE})
        before = ad.settings.zarr_write_format
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ad.settings.zarr_write_format = request.param
            slide.write_zarr(path, chunks=None if sp.issparse(X) else (20, 4))
        ad.settings.zarr_write_format = before
        return path

    return write


PLACE = np.random.default_rng(7).random((60, 2)) * 100
WHOLE = np.random.default_rng(6).poisson(3.0, (60, 4)).astype(np.float32)


def chunk_files(array: Path) -> list[Path]:
    return sorted(p for p in array.rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr")))


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_a_sparse_store_with_a_gap_is_refused(zarr_store, part):
    store = zarr_store("sparse", sp.csr_matrix(WHOLE))
    assert quietly(store).X.sum() == WHOLE.sum()
    chunk_files(store / "X" / part)[-1].unlink()
    for how in (read, backed):
        refused(store, "sparse.zarr", f"X/{part}: 0 of 1 chunks are there", how=how)


def test_a_dense_store_tells_the_rows_it_empties(zarr_store):
    store = zarr_store("dense", WHOLE)
    chunk_files(store / "X")[-1].unlink()
    with pytest.warns(GearsWarning, match=r"dense.zarr: X: 1 of 3 chunks are not there .* empties 20 of 60 rows"):
        assert not read(store, spatial=True).X[40:].any()
    shutil.rmtree(store / "X")
    refused(store, "dense.zarr", "X:")
    empty = zarr_store("empty", sp.csr_matrix(WHOLE.shape, dtype=np.float32))  # zarr leaves these out itself
    assert read(empty, spatial=True, counts=False).X.nnz == 0
    lost = zarr_store("lost", sp.csr_matrix(WHOLE))
    shutil.rmtree(lost / "obsm" / "spatial")
    refused(lost, "lost.zarr")


# ---------------------------------------------------------------- depth


def stack(levels: list[float], each: int = 12, jitter: float = 0.0) -> ad.AnnData:
    rng = np.random.default_rng(2)
    n = each * len(levels)
    out = ad.AnnData(sp.csr_matrix(rng.poisson(3.0, (n, 4)).astype(np.float32)), obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=GENES))
    out.obsm["spatial"] = np.c_[rng.random((n, 2)) * 30, np.repeat(levels, each) + jitter * rng.normal(size=n)]
    return out[rng.permutation(n)].copy()


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_a_stack_is_read_as_sections(tmp_path, jitter):
    whole = stack([0, 10, 25], 40, jitter)
    whole.write_h5ad(tmp_path / "stack.h5ad")
    with pytest.warns(GearsWarning, match="z takes 3 levels, read as sections of a stack; as one section: plane='xy'"):
        parts = read_many([tmp_path / "stack.h5ad"], spatial=True)
    assert [p.n_obs for p in parts] == [40] * 3 and all(p.obsm["spatial"].shape == (40, 2) for p in parts)
    for part in parts:
        assert np.ptp(part.obs["z"]) <= 10 * jitter
        np.testing.assert_array_equal(part.obsm["spatial"], whole[part.obs_names].obsm["spatial"][:, :2])
        np.testing.assert_array_equal(part.obs["z"], whole[part.obs_names].obsm["spatial"][:, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error", GearsWarning)
        named = read(tmp_path / "stack.h5ad", spatial=True, slide_key="z")
        assert named.obs["slide"].nunique() == 3
        alone = read(f"{tmp_path}/stack.h5ad#{named.obs['slide'].iloc[0]}", spatial=True, slide_key="z")
    assert set(alone.obs["slide"]) == {named.obs["slide"].iloc[0]}
    refused(tmp_path / "stack.h5ad", "third column varies", "plane='xy'", min_spots=50)  # levels too small to be sections that nobody named
    refused(tmp_path / "stack.h5ad", "40 spots, at least 50 are needed", min_spots=50, slide_key="z")


@pytest.mark.parametrize("seed", range(5))
def test_levels_are_found_and_not_made_up(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 12, 3000)
    where = np.cumsum(rng.uniform(50, 400, 12))
    np.testing.assert_array_equal(depth_levels(where[truth] + rng.normal(size=3000)), truth)
    np.testing.assert_array_equal(depth_levels(where[truth]), truth)
    for n in (20, 200, 2000):
        assert depth_levels(rng.random(n)) is None and depth_levels(rng.normal(size=n)) is None
        assert depth_levels(np.r_[rng.random(n), 5.0]) is None  # a cell far off is no section


def test_helper_keeps_order_and_leaves_the_table_alone():
    whole = stack([7, -3])
    before = whole.copy()
    parts = split_by_depth(whole)
    assert [p.obs["slide"].iloc[0] for p in parts] == ["z=-3", "z=7"] and np.array_equal(whole.obsm["spatial"], before.obsm["spatial"])
    assert list(whole.obs.columns) == []
    whole.obsm["spatial"] = whole.obsm["spatial"][:, [0, 2, 1]]
    assert [p.obs["slide"].iloc[0] for p in split_by_depth(whole, axis="y")] == ["y=-3", "y=7"]
    assert depth_levels(np.repeat([0.0, 1, 2, 30, 31], 4), tolerance=2).max() == 1
    refused(whole, "form no levels", "plane='xy'", how=split_by_depth)
    whole.obsm["spatial"] = whole.obsm["spatial"][:, :2]
    refused(whole, "has shape (24, 2), not (24, 3)", how=split_by_depth)


def test_a_block_is_refused_or_projected_aloud(tmp_path):
    block = stack([0.0])
    block.obsm["spatial"][:, 2] = np.random.default_rng(0).random(12) * 50
    block.write_h5ad(tmp_path / "block.h5ad")
    with speaking("shell"):
        refused(tmp_path / "block.h5ad", "third column varies", "--plane")
        refused(tmp_path / "block.h5ad", "z takes 12 values", "form no levels", "--plane xy", slide_key="z")
    with pytest.warns(GearsWarning, match="projected onto xy: the thickness along z is .* times the distance of neighbours in the plane"):
        flat = read(tmp_path / "block.h5ad", spatial=True, plane="xy")
    assert flat.obsm["spatial"].shape == (12, 3)  # the plane is taken where slides are validated
    block.obsm["spatial"][:, 2] = 4.0
    block.write_h5ad(tmp_path / "flat.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GearsWarning)
        assert read(tmp_path / "flat.h5ad", spatial=True).n_obs == 12
    block.obsm["spatial"] = block.obsm["spatial"][:, :2]
    block.write_h5ad(tmp_path / "two.h5ad")
    refused(tmp_path / "two.h5ad", "has shape (12, 2), not (12, 3), so there is no depth", slide_key="z")


def test_sections_that_are_named_go_first(tmp_path):
    whole = stack([0, 10])
    whole.obs["sample"] = np.where(whole.obsm["spatial"][:, 2] > 5, "upper", "lower")
    whole.write_h5ad(tmp_path / "named.h5ad")
    assert set(read(tmp_path / "named.h5ad", spatial=True).obs["slide"]) == {"upper", "lower"}


# ---------------------------------------------------------------- tables that stay on disk


def written(path: Path, n: int = 300, g: int = 50, kind: str = "csr", dtype: type = np.float32) -> ad.AnnData:
    rng = np.random.default_rng(4)
    X = sp.csr_matrix(rng.poisson(0.4, (n, g)).astype(dtype))
    X.data[X.indptr[3] : X.indptr[4]] = 0  # an empty row
    X.eliminate_zeros()
    out = ad.AnnData(X, obs=pd.DataFrame({"batch": "b"}, index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=[f"Gene{j}" for j in range(g)]))
    out.layers["twice"] = (2 * X).tocsr()
    out.raw = out.copy()
    stored = out.copy()
    stored.X = X.toarray() if kind == "dense" else X.tocsc() if kind == "csc" else X
    stored.write_zarr(path) if path.suffix == ".zarr" else stored.write_h5ad(path)
    return out


@pytest.mark.parametrize("kind, ending, dtype", [("csr", ".h5ad", np.float32), ("csr", ".zarr", np.int64), ("csc", ".h5ad", np.int64), ("csc", ".zarr", np.float32),
                                                 ("dense", ".h5ad", np.float32), ("dense", ".zarr", np.int64)])
def test_taking_genes_from_disk(tmp_path, kind, ending, dtype):
    whole = written(tmp_path / f"q{ending}", kind=kind, dtype=dtype)
    file, wanted = backed(tmp_path / f"q{ending}"), ["Gene40", "Gene3", "gene7", "Gene49"]
    expected = whole[:, ["Gene40", "Gene3", "Gene7", "Gene49"]].X.toarray()
    taken = file.take(wanted, values=100)
    assert taken.X.dtype == np.float32 and sp.issparse(taken.X) and taken.X.has_canonical_format and list(taken.var_names) == wanted
    np.testing.assert_array_equal(taken.X.toarray(), expected)
    np.testing.assert_array_equal(np.concatenate([b.X.toarray() for b in file.blocks(wanted, cells=77)]), expected)
    np.testing.assert_array_equal(file.take().X.toarray(), whole.X.toarray())
    assert list(taken.obs_names) == list(whole.obs_names) and list(taken.obs["batch"]) == ["b"] * 300
    with pytest.warns(GearsWarning, match="1 of 2 genes are missing and set to zero"):
        np.testing.assert_array_equal(file.take(["Other", "Gene3"]).X.toarray(), np.c_[np.zeros(300), whole[:, "Gene3"].X.toarray()])


def test_layers_raw_and_stores(tmp_path, stores):
    whole = written(tmp_path / "q.h5ad")
    np.testing.assert_array_equal(backed(tmp_path / "q.h5ad", layer="twice").take().X.toarray(), 2 * whole.X.toarray())
    np.testing.assert_array_equal(backed(tmp_path / "q.h5ad", layer="raw").take().X.toarray(), whole.X.toarray())
    np.testing.assert_array_equal(backed(f"{stores['v3']}#spots").take(GENES[::-1]).X.toarray(), COUNTS[:, ::-1])
    refused(tmp_path / "q.h5ad", "has no layer 'other' (layers: twice, raw)", how=backed, layer="other")


def test_bad_values_are_found_in_every_block(tmp_path):
    whole = written(tmp_path / "q.h5ad")
    take = lambda path, **how: backed(path, **how).take(["Gene1"], values=100)
    whole.X.data[4500] = -1
    whole.write_h5ad(tmp_path / "q.h5ad")
    said = refused(tmp_path / "q.h5ad", "X: negative (1 values, first at cell 'c", how=take)
    assert refused(tmp_path / "q.h5ad", "negative", spatial=False).startswith(said.partition(" Remedy")[0])
    whole.X.data[4500] = np.nan
    whole.write_h5ad(tmp_path / "q.h5ad")
    refused(tmp_path / "q.h5ad", "X: NaN or infinite", how=take)
    whole.X.data[:] = 0.5
    whole.write_h5ad(tmp_path / "q.h5ad")
    refused(tmp_path / "q.h5ad", "100.0% of the non-zero values are not whole numbers", how=take)
    assert take(tmp_path / "q.h5ad", counts=False).n_obs == 300
    refused(tmp_path / "q.h5ad", "none of the 1 genes is there", how=lambda p: backed(p, counts=False).take(["Foo"]))
    whole.obs_names = ["c0"] * 300
    whole.write_h5ad(tmp_path / "q.h5ad")
    refused(tmp_path / "q.h5ad", "obs_names (barcodes): 1 names occur more than once", how=backed)
    (tmp_path / "x.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    refused(tmp_path / "x.h5ad", "truncated or damaged", how=backed)
    refused(tmp_path, "is not an .h5ad or .h5 file or a Zarr table", how=backed)


def test_an_h5_of_cell_ranger_stays_on_disk(tmp_path):
    path = h5_of_10x(tmp_path / "counts.h5", ["Gene Expression", "Antibody Capture", *["Gene Expression"] * 2])
    with pytest.warns(GearsWarning, match="1 features that are not genes were left out"):
        file = backed(path)
    assert file.shape == (5, 3) and list(file.obs.index) == CELLS and list(file.var["gene_ids"]) == ["ENSG0", "ENSG2", "ENSG3"]
    np.testing.assert_array_equal(file.take().X.toarray(), TOY[:, [0, 2, 3]])
    np.testing.assert_array_equal(file.take(["CPS1", "GLUL"]).X.toarray(), TOY[:, [3, 0]])
    np.testing.assert_array_equal(next(file.blocks(["TBCE"], cells=2)).X.toarray(), TOY[:2, [2]])


def taken(path: Path, genes: list[str]) -> int:
    return backed(path).take(genes).X.nnz


def test_the_counts_are_held_once(tmp_path):
    """In a process of its own, the peak beyond what is loaded anyway, against the matrix of the wanted genes."""
    pytest.importorskip("cloudpickle", reason="cloudpickle, which comes with the extra lab, is not installed")
    from gears_nb.lab.rows import in_fresh_process

    n, g, each = 12_000, 4_000, 1_600
    rows = np.arange(each, dtype=np.int32) * 2 + np.arange(7, dtype=np.int32)[:, None]  # seven kinds of cells
    indices = rows[np.arange(n) % 7].ravel()
    X = sp.csr_matrix((np.ones(len(indices), np.float32), indices, np.arange(0, len(indices) + 1, each)), shape=(n, g))
    names = [f"Gene{j}" for j in range(g)]
    ad.AnnData(X, obs=pd.DataFrame(index=np.arange(n).astype(str)), var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "many.h5ad")
    kept = X[:, : g // 2]
    size = (kept.data.nbytes + kept.indices.nbytes + kept.indptr.nbytes) / 2**20
    written(small := tmp_path / "small.h5ad")
    found = in_fresh_process(lambda _: taken(tmp_path / "many.h5ad", names[: g // 2]), lambda: taken(small, ["Gene1"]))  # a first call loads what any needs
    assert found.value == kept.nnz and size > 50
    assert found.peak_mb < 1.3 * size, f"{found.peak_mb:.0f} MiB for {size:.0f}"


# ---------------------------------------------------------------- folders as vendors lay them out


def beside(folder: Path, *names: str) -> None:
    """Files that come along and must not confuse."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def with_empty_spots() -> pd.DataFrame:
    """Positions of the toy in another order, and of two spots beside the tissue, which the matrix does not have."""
    off = positions().iloc[:2].assign(barcode=["ZZ1-1", "ZZ2-1"], in_tissue=0)
    return pd.concat([off, positions().iloc[::-1]])


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("counts", ["h5 and folder", "folder"])
def test_space_ranger_outs(tmp_path, generation, counts):
    outs = tmp_path / "outs"
    beside(outs, "web_summary.html", "metrics_summary.csv", "cloupe.cloupe", "spatial/scalefactors_json.json", "spatial/tissue_hires_image.png",
           "analysis/clustering/graphclust/clusters.csv", "raw_feature_bc_matrix/matrix.mtx.gz", "raw_feature_bc_matrix.h5")
    mtx_of_10x(outs / "filtered_feature_bc_matrix")
    if counts != "folder":
        h5_of_10x(outs / "filtered_feature_bc_matrix.h5")
    name, header = ("tissue_positions_list.csv", False) if generation == 1 else ("tissue_positions.csv", True)
    with_empty_spots().to_csv(outs / "spatial" / name, index=False, header=header)
    same(read(outs, spatial=True))
    refused(tmp_path, "is not the output itself", f"give {outs}")
    (outs / "spatial" / name).unlink()
    refused(outs, "spatial/tissue_positions*.csv: is missing", "complete 'outs' folder")


def test_visium_hd_outs(tmp_path):
    pytest.importorskip("pyarrow")
    for size in ("002", "008", "016"):
        square = tmp_path / "binned_outputs" / f"square_{size}um"
        beside(square, "raw_feature_bc_matrix.h5", "spatial/scalefactors_json.json")
        h5_of_10x(square / "filtered_feature_bc_matrix.h5")
        mtx_of_10x(square / "filtered_feature_bc_matrix")
        with_empty_spots().reset_index(drop=True).to_parquet(square / "spatial" / "tissue_positions.parquet", index=False)
        same(slide := read(square, spatial=True))
        assert set(slide.obs["slide"]) == {tmp_path.name}  # not the name that all slides of this size have
    refused(tmp_path, "bins of several sizes (square_002um, square_008um, square_016um)")
    (square / "spatial" / "tissue_positions.parquet").write_bytes(b"PAR1")
    refused(square, "cannot be read as Parquet")


def test_cells_of_visium_hd(tmp_path):
    cells = tmp_path / "segmented_outputs"
    beside(cells, "raw_feature_cell_matrix.h5", "nucleus_segmentations.geojson", "spatial/scalefactors_json.json")
    path = h5_of_10x(cells / "filtered_feature_cell_matrix.h5")
    import h5py

    with h5py.File(path, "a") as file:
        file["matrix/barcodes"][...] = np.array(["c"] * 5, "S")
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array([f"cellid_{i:09d}-1" for i in range(1, 6)], "S")
    refused(cells, "cell_segmentations.geojson: is missing", "complete folder of Space Ranger")
    around = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1.0]])
    shape = lambda i: {"type": "Feature", "properties": {"cell_id": i}, "geometry": {"type": "Polygon", "coordinates": [(PLACES[i - 1] + around).tolist()]}}
    features = [shape(i) for i in (5, 3, 4, 1, 2)]
    (cells / "cell_segmentations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    slide = read(cells, spatial=True)
    same(slide, None)
    np.testing.assert_allclose(slide.obsm["spatial"], PLACES, rtol=1e-12)
    same(read(cells, spatial=False), None)
    (cells / "cell_segmentations.geojson").write_text(json.dumps({"features": features[:-1]}))
    refused(cells, "1 barcodes of the matrix have no position (first: cellid_000000002-1)")


@pytest.mark.parametrize("matrix", ["h5", "folder"])
@pytest.mark.parametrize("places", ["cells.parquet", "cells.csv.gz"])
def test_xenium_output(tmp_path, matrix, places):
    beside(tmp_path, "experiment.xenium", "transcripts.parquet", "cell_boundaries.parquet", "gene_panel.json", "morphology.ome.tif",
           "cells.zarr.zip", "analysis/clustering/gene_expression_graphclust/clusters.csv")
    h5_of_10x(tmp_path / "cell_feature_matrix.h5") if matrix == "h5" else mtx_of_10x(tmp_path / "cell_feature_matrix")
    cells = pd.DataFrame({"cell_id": CELLS, "x_centroid": PLACES[:, 0], "y_centroid": PLACES[:, 1], "transcript_counts": 9, "cell_area": 1.5})
    if places == "cells.parquet":
        pytest.importorskip("pyarrow")
        cells.assign(cell_id=[name.encode() for name in CELLS]).iloc[::-1].to_parquet(tmp_path / places, index=False)
    else:
        cells.iloc[::-1].to_csv(tmp_path / places, index=False)
    same(read(tmp_path, spatial=True))
    (tmp_path / places).unlink()
    refused(tmp_path, "cells.csv.gz: is missing", "complete output folder of Xenium")


def test_merscope_region(tmp_path):
    names = [str(110883424764611924400221639916314253469 + i) for i in range(5)]  # longer than any integer type
    beside(tmp_path, "images/manifest.json", "summary.png", "detected_transcripts.csv", "cell_boundaries.parquet", "cell_categories.csv")
    frame = pd.DataFrame(TOY.astype(int), columns=GENES).assign(**{"Blank-1": 2})
    frame.insert(0, "cell", names)
    frame.to_csv(tmp_path / "cell_by_gene.csv", index=False)
    about = pd.DataFrame({"EntityID": names, "fov": 0, "volume": 7.5, "center_x": PLACES[:, 0], "center_y": PLACES[:, 1], "min_x": 0, "max_x": 1})
    about.iloc[::-1].to_csv(tmp_path / "cell_metadata.csv", index=False)
    with pytest.warns(GearsWarning, match="1 control probes are not genes"):
        slide = read(tmp_path, spatial=True)
    same(slide)
    assert list(slide.obs_names) == names
    about.iloc[1:].to_csv(tmp_path / "cell_metadata.csv", index=False)
    refused(tmp_path, "barcodes: do not agree with cell_metadata.csv: 1", "give two tables of the same spots")
    (tmp_path / "cell_metadata.csv").unlink()
    refused(tmp_path, "holds the counts of the cells, but no cell_metadata.csv", "complete folder", "or pass it as cells")
    assert quietly(tmp_path, spatial=False).n_obs == 5


def test_counts_of_cosmx_with_and_without_places(tmp_path):
    path = cosmx(tmp_path)[1]
    assert quietly(tmp_path).n_obs == 5
    path.rename(tmp_path / "S0_metadata.csv")
    assert quietly(tmp_path).n_obs == 5
    (tmp_path / "S0_metadata.csv").unlink()
    refused(tmp_path, "holds the counts of the cells, but no metadata_file.csv")  # fov_positions_file.csv is not about cells
