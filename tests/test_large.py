"""A large query in blocks: the map of `Gears.reconstruct`, from a file that is never read whole, whatever blocks and threads."""
from __future__ import annotations

import warnings

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from gears_nb.benchmark.scale import measure_peer, until_stopped, write_cells
from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data.simulator import simulate, simulate_cells
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.large import in_blocks, keep_pairs, open_table, reconstruct_large, slices, survey
from gears_nb.reconstruct.settings import profile
from gears_nb.reconstruct.stitch import keep_edges


@pytest.fixture(scope="module")
def gears(tmp_path_factory):
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARS_CACHE", str(tmp_path_factory.mktemp("cache")))
        warnings.simplefilter("ignore")
        small = {"progress": False, "structure.miniset": 48, "structure.guess_epochs": 2, "structure.epochs": 2, "structure.members": 2}
        return Gears(profile("smoke", **small), model="plain").fit(simulate("tiny", 0).slides)


@pytest.fixture(scope="module")
def cells():
    """Two hundred cells: one without counts, one with a single count."""
    table = simulate("tiny", 3).cells
    X = table.X.tolil()
    X[5] = 0
    X[9] = 0
    X[9, 0] = 1
    table.X = sp.csr_matrix(X)
    return table


@pytest.fixture(scope="module")
def ordinary(gears, cells):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gears.reconstruct(cells)


@pytest.mark.parametrize("workers,size", [(1, 2**19), (2, 301)])
def test_blocks_and_threads_give_the_same_map(gears, cells, ordinary, workers, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = reconstruct_large(gears, cells, workers=workers, size=size)
    assert (found.obs["gears_note"] == ordinary.obs["gears_note"]).all() and (found.obs["gears_note"] != "").sum() == 2
    for name in ("X_gears", "H_gears"):
        np.testing.assert_allclose(found.obsm[name], ordinary.obsm[name], atol=1e-6)
    for name in ("gears_error", "gears_confidence"):
        np.testing.assert_allclose(found.obs[name], ordinary.obs[name], atol=1e-6)
    assert abs(found.obsp["gears_distances"] - ordinary.obsp["gears_distances"]).max() < 1e-5
    assert set(found.uns["gears"]) == set(ordinary.uns["gears"])
    assert found.X is None  # counts are not carried along


def test_a_file_is_copied_with_its_counts_and_gets_the_map(gears, cells, ordinary, tmp_path):
    source, out = tmp_path / "cells.h5ad", tmp_path / "map.h5ad"
    cells.write_h5ad(source)
    before = source.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reconstruct_large(gears, source, out)
    back = anndata.read_h5ad(out)
    assert source.read_bytes() == before
    assert (back.X != cells.X).nnz == 0 and list(back.obs_names) == list(cells.obs_names)
    assert list(back.obs.columns[: cells.obs.shape[1]]) == list(cells.obs.columns)
    np.testing.assert_allclose(back.obsm["X_gears"], ordinary.obsm["X_gears"], atol=1e-6)
    assert not [p for p in tmp_path.iterdir() if p not in (source, out)]


def test_a_file_is_opened_and_not_read(gears, cells, tmp_path, monkeypatch):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    table = open_table(tmp_path / "cells.h5ad")
    assert table.isbacked
    monkeypatch.setattr(type(table), "to_memory", lambda self: pytest.fail("the table was read whole"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        assert survey(table, gears).query.kept.sum() == 198


def test_what_cannot_be_placed_is_refused_in_one_line(gears, cells, tmp_path):
    one = cells.copy()
    one.X = sp.csc_matrix(one.X)
    one.write_h5ad(tmp_path / "columns.h5ad")
    two = cells.copy()
    two.obs["slide"] = np.where(np.arange(two.n_obs) < 90, "a", "b")
    other = cells.copy()
    other.var_names = [f"x{i}" for i in range(other.n_vars)]
    (tmp_path / "text.h5ad").write_text("no table")
    for source, more, word in ((tmp_path / "columns.h5ad", {}, "by columns"), (two, {}, "2 sections"), (other, {}, "genes"), (tmp_path / "none.h5ad", {}, "not there"),
                               (tmp_path / "text.h5ad", {}, "no .h5ad"), (cells, {"out": tmp_path / "x.h5ad"}, "file"), (cells, {"workers": 0}, "whole numbers")):
        with pytest.raises(InputError, match=word) as error, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reconstruct_large(gears, source, **more)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x.h5ad").exists()


def test_only_poor_cells_are_sorted_and_the_pairs_are_the_same(rng):
    pairs = np.unique(np.sort(rng.integers(0, 60, (900, 2)), 1), axis=0)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    for share in (0.0, 0.5, 0.95, 1.0):
        bad, spread = rng.uniform(size=len(pairs)) < share, rng.integers(0, 5, len(pairs)) / 5.0
        assert (keep_pairs(pairs, bad, spread, 60) == keep_edges(pairs, bad, spread, 60)).all()


def test_blocks_cover_everything_in_order():
    assert in_blocks(lambda s: list(range(10))[s], slices(10, 4), workers=3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(ZeroDivisionError):
        in_blocks(lambda x: 1 / x, [1, 0], workers=2)


def test_simulated_cells_go_to_a_file_block_by_block(tmp_path):
    places = write_cells(tmp_path / "cells.h5ad", 4099, 2)  # a block of the simulator, and three cells
    written, known = anndata.read_h5ad(tmp_path / "cells.h5ad"), simulate_cells(4099, 2).cells
    assert (written.X != known.X).nnz == 0 and list(written.obs_names) == list(known.obs_names) and list(written.var_names) == list(known.var_names)
    assert not list(written.obsm) and not list(written.obs.columns)  # nothing tells where the cells are
    assert np.allclose(places, known.obsm["organ_true"], rtol=1e-5)


def test_a_tool_that_stops_is_not_asked_again():
    asked = []
    rows = until_stopped(lambda n: asked.append(n) or {"n": n, "failed": "out of memory" if n > 20 else ""}, [10, 20, 30, 40])
    assert asked == [10, 20, 30] and rows[-1]["failed"] == "out of memory"
    with pytest.raises(InputError, match="tangram"):
        measure_peer("tangran", 40, 0)


def test_the_command_refuses_in_one_line_before_it_reads(gears, cells, tmp_path, capsys):
    from gears_nb.runs.cli import main
    gears.save(tmp_path / "model")
    scaled = cells.copy()
    scaled.X = scaled.X * 0.37
    scaled.layers["counts"] = cells.X.copy()
    cells[:1].copy().write_h5ad(tmp_path / "one.h5ad"), cells[:3].copy().write_h5ad(tmp_path / "three.h5ad"), scaled.write_h5ad(tmp_path / "scaled.h5ad")
    empty = cells[:50].copy()
    empty.X = sp.csr_matrix(empty.X.toarray() * (np.arange(50) < 3)[:, None])
    empty.write_h5ad(tmp_path / "empty.h5ad")
    (tmp_path / "store.zarr").mkdir()
    for name, word in (("one.h5ad", "give at least 4"), ("three.h5ad", "give at least 4"), ("scaled.h5ad", "trained on counts"), ("store.zarr", "a Zarr store"), ("empty.h5ad", "fewer than 4 cells have counts")):
        assert main(["large", "--quiet", "--model", str(tmp_path / "model"), "--cells", str(tmp_path / name), "--out", str(tmp_path / "map.h5ad")]) == 2
        told = capsys.readouterr()
        line = told.err.strip().splitlines()[-1]
        assert name in line and word in line and "--set" not in line and "--layer" not in line and told.out == ""
        assert name == "empty.h5ad" or told.err.count("\n") == 1, told.err  # nothing was said before
    assert not (tmp_path / "map.h5ad").exists()
