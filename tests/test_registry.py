"""Registry and pseudo-spots: names mean fixed slides, files are verified once, and no task asks for what it taught."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data import registry
from gears_nb.data.pseudospots import (
    choose_pitch,
    disjoint_halves,
    pseudo_spots,
    spot_grid,
)
from gears_nb.data.registry import (
    CHECKSUMS,
    DATASETS,
    PROTOCOLS,
    available,
    data_root,
    files_of,
    load_protocol,
    protocols,
    verify,
)

needs_data = pytest.mark.skipif(data_root() is None or not all(available().values()), reason="the data folder (GEARS_DATA) is absent or incomplete")


def imaged(n=600, genes=5, seed=0, slides=("s",)):
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"slide": np.resize(slides, n), "patient": "p"}, index=[f"c{i}" for i in range(n)])
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(1.0, (n, genes)).astype(np.float32)), obs=obs)
    adata.var_names = [f"g{i}" for i in range(genes)]
    adata.obsm["spatial"] = rng.uniform(0, 100, (n, 2)).astype(np.float32)
    return adata


def test_every_protocol_is_consistent():
    for protocol in PROTOCOLS.values():
        assert protocol.kind in "ABC"
        assert protocol.query not in protocol.reference
        assert (protocol.kind == "C") == bool(protocol.reference)
        assert all(file in CHECKSUMS for file in files_of(protocol))
    assert {"her2st_A", "her2st_G", "her2st_H", "seqfish_embryo12", "starmap_BZ9", "liver_crossslide"} <= set(protocols())
    assert not PROTOCOLS["bdtnp"].counts
    assert set(DATASETS) == {p.dataset for p in PROTOCOLS.values()}


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean seqfish_embryo12"):
        load_protocol("seqfish_embryo_12")


def test_missing_folder_and_file_name_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("GEARS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="GEARS_DATA.*not a folder"):
        load_protocol("mob")
    monkeypatch.setenv("GEARS_DATA", str(tmp_path))
    with pytest.raises(InputError, match="st_mob_4sections.h5ad.*Remedy: set GEARS_DATA"):
        load_protocol("mob")
    monkeypatch.delenv("GEARS_DATA")
    monkeypatch.setattr(registry, "_repo_root", lambda: None)
    assert data_root() is None
    with pytest.raises(InputError, match="data folder was not found"):
        load_protocol("mob")


def test_slides_are_sliced_by_name_and_missing_slides_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("GEARS_DATA", str(tmp_path))
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "starmap_mpfc"
    folder.mkdir()
    imaged(300, slides=("BZ5", "BZ9", "BZ14")).write_h5ad(folder / "starmap_mpfc.h5ad")
    with pytest.warns(GearsWarning, match="not comparable"):
        task = load_protocol("starmap_BZ9")
    assert [set(r.obs["slide"]) for r in task.reference] == [{"BZ5"}, {"BZ14"}]
    assert set(task.query.obs["slide"]) == {"BZ9"} and task.query.n_obs == 100
    imaged(300, slides=("BZ5", "BZ14")).write_h5ad(folder / "starmap_mpfc.h5ad")
    with pytest.warns(GearsWarning), pytest.raises(InputError, match="no slide 'BZ9'"):
        load_protocol("starmap_BZ9")


def test_verification_hashes_once_and_again_after_a_change(monkeypatch, tmp_path):
    name = next(iter(CHECKSUMS))
    file, cache = tmp_path / name, tmp_path / "cache.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    calls = []
    original = registry.sha256
    monkeypatch.setattr(registry, "sha256", lambda path: calls.append(path) or original(path))
    for _ in range(2):
        with pytest.warns(GearsWarning, match="content differs"):
            assert verify(name, tmp_path, cache) is False
    assert len(calls) == 1
    file.write_bytes(b"another")
    monkeypatch.setitem(CHECKSUMS, name, original(file))
    assert verify(name, tmp_path, cache) is True
    assert len(calls) == 2 and json.loads(cache.read_text())[str(file)]["stamp"][1] == 7


def test_a_broken_cache_is_rebuilt(tmp_path):
    name, cache = next(iter(CHECKSUMS)), tmp_path / "cache.json"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"x")
    cache.write_text("{ not json")
    with pytest.warns(GearsWarning):
        verify(name, tmp_path, cache)
    assert str(tmp_path / name) in json.loads(cache.read_text())


def test_pseudo_spots_conserve_counts_and_leave_the_input_alone():
    cells = imaged()
    before = cells.copy()
    spots = pseudo_spots(cells, cells_per_spot=6)
    member = spot_grid(np.asarray(cells.obsm["spatial"], float), spots.uns["pseudo_spots"]["pitch"]).member
    for spot in (0, spots.n_obs - 1):
        np.testing.assert_array_equal(spots.X[spot].toarray()[0], np.asarray(cells.X[member == spot].sum(0))[0])
    assert spots.obs["n_cells"].min() >= 3 and abs(spots.obs["n_cells"].mean() - 6) < 0.5
    assert list(spots.var_names) == list(cells.var_names) and set(spots.obs["slide"]) == {"s"}
    assert (before.X != cells.X).nnz == 0 and list(before.obs.columns) == list(cells.obs.columns)


def test_pitch_scales_with_the_unit():
    coords = np.random.default_rng(0).uniform(0, 1, (4000, 2))
    assert choose_pitch(1000 * coords) == pytest.approx(1000 * choose_pitch(coords), rel=1e-3)


def test_pseudo_spots_refuse_what_they_cannot_do():
    cells = imaged(4)
    with pytest.raises(InputError, match="no square holds"):
        pseudo_spots(cells, min_cells=5, pitch=1.0)
    del cells.obsm["spatial"]
    with pytest.raises(InputError, match="no coordinates"):
        pseudo_spots(cells)


def test_halves_partition():
    a, b = disjoint_halves(101, np.random.default_rng(0))
    assert sorted([*a, *b]) == list(range(101)) and abs(len(a) - len(b)) == 1


def test_simulated_tasks_need_no_files(monkeypatch):
    monkeypatch.setenv("GEARS_DATA", "")
    task = load_protocol("tiny", seed=1)
    assert [r.obs["slide"].iloc[0] for r in task.reference] == ["ST1", "ST2"]
    assert task.query.obs["slide"].iloc[0] == "ST3" and "spatial_true" in task.extra["SC"].obsm


@needs_data
@pytest.mark.parametrize(
    ("name", "references", "query", "genes"),
    [
        ("her2st_G", ["G1", "G2"], ["G3"], 16011),
        ("starmap_BZ9", ["BZ5", "BZ14"], ["BZ9"], 166),
        ("mob", ["MOB1", "MOB2"], ["MOB3"], 1000),
        ("seqfish_embryo12", ["embryo1_z2", "embryo1_z5"], ["embryo2_z2"], 351),
    ],
)
def test_real_protocol_c(name, references, query, genes):
    task = load_protocol(name)
    assert [r.obs["slide"].unique().tolist() for r in task.reference] == [[r] for r in references]
    assert task.query.obs["slide"].unique().tolist() == query
    assert task.query.n_vars == genes and task.query.obsm["spatial"].shape == (task.query.n_obs, 2)


@needs_data
def test_real_protocols_a_b_and_subsample():
    a, b = load_protocol("seqfish_embryo1_A"), load_protocol("seqfish_embryo1_B")
    assert a.query.n_obs == 10150 and 950 < a.reference[0].n_obs < 1060
    assert b.query.n_obs == 5075 and b.reference[0].obs["n_cells"].sum() <= 5075
    assert list(b.query.obs_names) != list(load_protocol("seqfish_embryo1_B", seed=1).query.obs_names)
    x = load_protocol("xenium_visium")
    assert x.query.n_obs == 8000 and list(x.query.obs_names) == list(load_protocol("xenium_visium").query.obs_names)
    atlas = load_protocol("bdtnp")
    assert not atlas.counts and atlas.reference[0].X.max() <= atlas.query.X.max()


def test_experiments_run_on_what_is_there(monkeypatch, capsys):
    monkeypatch.setattr(registry, "data_root", lambda: None)
    assert registry.runnable("tiny, her2st_A, liver_crossslide:2", []) == ["tiny", "liver_crossslide:2"]
    assert "her2st_A is skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="GEARS_DATA"):
        registry.runnable("", ["her2st_A"])
    with pytest.raises(InputError, match="unknown name 'nonsense'"):
        registry.runnable("tiny, nonsense", [])
