"""reconstruct.facade on the tiny tissue: the output contract, repeatability, poison pills against leaks, damage; and its neighbours `even`, `average_neighbours`."""
from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from forks import ended, forked, start
from scipy.spatial import cKDTree

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.store import content_digest
from gears_nb.data.simulator import simulate
from gears_nb.geometry.gauge import gauge_fix, procrustes, rms
from gears_nb.reconstruct import facade
from gears_nb.reconstruct.even import even_out
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.settings import GearsConfig, profile, training_digest

pytestmark = pytest.mark.filterwarnings("ignore::gears_nb.core.errors.GearsWarning")


def settings(**changes) -> GearsConfig:
    "Seconds of training; such embeddings may fall into islands, which is not the question here."
    return profile("smoke", progress=False, device="cpu", **({"patches.allow_islands": True} | changes))


NETWORK = settings(**{"encoder.kind": "network"})  # the trained encoder in place of the closed form


def parts():
    "Two sections to learn from, a third to place, and dissociated cells."
    tissue = simulate("tiny", seed=0)
    return tissue.slides[:2], tissue.slides[2], tissue.cells


def coordinates(adata) -> np.ndarray:
    return adata.obsm["X_gears"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GEARS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def data():
    return parts()


@pytest.fixture(scope="module")
def gears(data):
    slides, _, cells = data
    return Gears(settings()).fit(slides, cells)


@pytest.fixture(scope="module")
def networked(data):
    slides, _, cells = data
    return Gears(NETWORK).fit(slides, cells)


@pytest.fixture(scope="module")
def placed(gears, data):
    return gears.reconstruct(data[1])


@pytest.fixture(scope="module")
def networked_place(networked, data):
    return coordinates(networked.reconstruct(data[1]))


@pytest.fixture(scope="module")
def again(data, tmp_path_factory):
    "What `gears` is, trained once more, in a folder that is kept; and the folder."
    slides, _, cells = data
    folder = tmp_path_factory.mktemp("again")
    return Gears(settings()).fit(slides, cells, workdir=folder), folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    "Fitted without cells, in a folder that is kept; and the folder."
    folder = tmp_path_factory.mktemp("alone")
    return Gears(settings()).fit(data[0], workdir=folder), folder


def train_only(monkeypatch, gears):
    """What a fit measures after training is taken from `gears`: half of its time, where training alone is asked about.

    Whatever differs between such fits then differs in what was trained.
    """
    monkeypatch.setattr(facade, "measure_evidence", lambda *_, **__: gears.fitted.evidence)
    monkeypatch.setattr(facade, "rehearse_all", lambda *_, **__: gears.fitted.rehearsal)


@pytest.fixture
def training_only(monkeypatch, gears):
    train_only(monkeypatch, gears)


@pytest.fixture
def quick_adapter(monkeypatch):
    "Fine-tune for fewer steps."
    import gears_nb.alignment.align as module

    monkeypatch.setattr(module, "finetune", functools.partial(module.finetune, steps=20))


# output ---------------------------------------------------------------------------------------------------------------


def test_output_contract(placed, data):
    query, n = data[1], data[1].n_obs
    X, D, sure = coordinates(placed), placed.obsp["gears_distances"], placed.obs["gears_confidence"].to_numpy()
    assert list(placed.obs_names) == list(query.obs_names) and list(placed.var_names) == list(query.var_names)
    assert X.shape == (n, 2) and X.dtype == np.float64 and np.isfinite(X).all()
    assert rms(X) == pytest.approx(1) and np.abs(X.mean(0)).max() < 1e-9
    assert placed.obsm["H_gears"].shape == (n, 128) and np.isfinite(placed.obsm["H_gears"]).all()
    assert sp.issparse(D) and D.shape == (n, n) and D.nnz < n * n and (D.data > 0).all() and D.diagonal().sum() == 0
    assert abs(D - D.T).max() < 1e-12
    assert ((sure > 0) & (sure <= 1)).all() and sure.std() > 0


def test_the_story_of_a_run_is_json_text(placed):
    about = placed.uns["gears"]
    assert set(about) == {"alignment", "config", "model", "evidence", "fusion", "gene_matching", "graph", "stitching", "solve", "dropped", "warnings"}
    read = {name: json.loads(text) for name, text in about.items()}
    assert read["config"]["profile"] == "smoke" and read["graph"]["cells"] == placed.n_obs
    assert read["solve"]["reason"] and isinstance(read["warnings"], list)


def test_a_result_survives_h5ad(placed, tmp_path):
    import anndata as ad

    placed.write_h5ad(tmp_path / "r.h5ad")
    back = ad.read_h5ad(tmp_path / "r.h5ad")
    assert np.array_equal(coordinates(back), coordinates(placed)) and back.uns["gears"] == placed.uns["gears"]
    assert abs(back.obsp["gears_distances"] - placed.obsp["gears_distances"]).max() == 0


def test_distances_are_in_the_units_of_the_map(placed):
    D = placed.obsp["gears_distances"].tocoo()
    X = gauge_fix(coordinates(placed))
    ratio = np.median(np.linalg.norm(X[D.row] - X[D.col], axis=1) / D.data)
    assert 0.7 < ratio < 1.4


def test_nothing_that_was_given_is_changed(gears, data):
    "The tables that `gears` was fitted on, and those that it placed, are what a new simulation gives."
    slides, query, cells = data
    gears.embed(query), gears.reconstruct(cells)
    as_given, others, cells_as_given = parts()
    digests = lambda tables: [content_digest(a, a.obs.to_csv(), sorted(a.obsm), sorted(a.uns)) for a in tables]
    assert digests((*slides, query, cells)) == digests((*as_given, others, cells_as_given))


def test_embed_gives_the_embeddings_of_reconstruct(gears, placed, data):
    out = gears.embed(data[1])
    assert np.array_equal(out.obsm["H_gears"], placed.obsm["H_gears"]) and "X_gears" not in out.obsm


def test_an_empty_cell_keeps_its_barcode_and_gets_nan(gears, placed, data):
    query = data[1].copy()
    query.X = query.X.toarray()
    query.X[[3, 40]] = 0
    with pytest.warns(GearsWarning):
        out = gears.reconstruct(query)
    gone = np.zeros(query.n_obs, bool)
    gone[[3, 40]] = True
    assert list(out.obs_names) == list(query.obs_names)
    for values in (coordinates(out), out.obsm["H_gears"], out.obs["gears_confidence"].to_numpy()[:, None]):
        assert np.isnan(values[gone]).all() and np.isfinite(values[~gone]).all()
    D = out.obsp["gears_distances"]
    assert D[gone].nnz == 0 == D[:, gone].nnz and D.nnz > 0
    assert np.isnan(gears.embed(query).obsm["H_gears"][gone]).all()
    assert json.loads(out.uns["gears"]["dropped"])


def test_histories_and_reports(gears, networked):
    assert list(gears.history) == ["guess-0", "gate-0", "refine-0"]
    assert list(networked.history) == ["encoder", *gears.history]
    assert all(np.isfinite(row["loss"]) for rows in gears.history.values() for row in rows)
    assert gears.report["gene_matching"] and len(gears.report["reference"]) == 3  # two slides and the cells


def test_cells_are_placed_too(gears, data):
    out = gears.reconstruct(data[2])
    assert np.isfinite(coordinates(out)).all() and list(out.obs_names) == list(data[2].obs_names)


def test_the_adapter_moves_queries_only(gears, data, quick_adapter, training_only):
    slides, _, cells = data
    plain, adapted = gears, Gears(settings(**{"encoder.align": "adapter"})).fit(slides, cells)
    assert plain.config.encoder.align == "auto"
    assert content_digest(plain.fitted.embedding.state()[0], plain.fitted.cloud) == content_digest(adapted.fitted.embedding.state()[0], adapted.fitted.cloud)
    cloud, a, b = plain.fitted.cloud, plain.embed(cells).obsm["H_gears"], adapted.embed(cells).obsm["H_gears"]
    gap = lambda H: np.linalg.norm(H.mean(0) - cloud.mean(0)) + np.linalg.norm(np.cov(H.T) - np.cov(cloud.T))
    assert gap(b) < 0.7 * gap(a)


def test_transport_moves_queries_into_the_cloud_and_says_so(gears, data):
    """Asked of a trained model: the move belongs to the query, so nothing is trained again, and the cells' names and order stay."""
    moving = Gears(settings(**{"encoder.align": "transport"}))
    moving._fitted = gears.fitted
    cells, cloud = data[2], gears.fitted.cloud
    H = moving.embed(cells).obsm["H_gears"]
    low, high = cloud.min(0), cloud.max(0)
    assert (H >= low - 1e-5).all() and (H <= high + 1e-5).all() and not np.array_equal(H, gears.embed(cells).obsm["H_gears"])
    said = json.loads(moving.reconstruct(cells).uns["gears"]["alignment"])
    assert said["align"] == "transport" and 0 <= said["separable"] <= 1
    assert training_digest(moving.config) == training_digest(gears.config)


def test_the_adapter_follows_the_order_of_cells(networked, data, quick_adapter):
    """With 32 dimensions: in 128, two hundred cells leave directions empty, in which Adam turns rounding into steps."""
    model, order = Gears(settings(**{"encoder.kind": "network", "encoder.align": "adapter"})), np.random.default_rng(0).permutation(data[2].n_obs)
    model._fitted = networked.fitted
    a, b = (model.embed(cells).obsm["H_gears"] for cells in (data[2], data[2][order].copy()))
    np.testing.assert_allclose(b, a[order], atol=1e-3)


# repeatability --------------------------------------------------------------------------------------------------------


def test_same_seed_same_coordinates_other_seed_other_coordinates(placed, again, data, training_only):
    slides, query, cells = data
    same = again[0].reconstruct(query)
    other = Gears(settings(seed=1)).fit(slides, cells).reconstruct(query)
    digests = [content_digest(coordinates(a)) for a in (placed, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert content_digest(placed.obsp["gears_distances"]) == content_digest(same.obsp["gears_distances"])


def test_reconstruction_has_no_memory(gears, placed, data):
    gears.reconstruct(data[2])
    assert np.array_equal(coordinates(gears.reconstruct(data[1])), coordinates(placed))


def test_permuted_cells_give_permuted_results(gears, placed, data):
    order = np.random.default_rng(0).permutation(data[1].n_obs)
    out = gears.reconstruct(data[1][order].copy())
    np.testing.assert_allclose(coordinates(out), coordinates(placed)[order], atol=1e-3)
    np.testing.assert_allclose(out.obs["gears_confidence"], placed.obs["gears_confidence"].to_numpy()[order], atol=1e-3)


def test_sparse_and_dense_and_shuffled_genes_make_no_difference(gears, placed, data):
    query = data[1].copy()
    query.X = query.X.toarray() if sp.issparse(query.X) else sp.csr_matrix(query.X)
    np.testing.assert_allclose(coordinates(gears.reconstruct(query)), coordinates(placed), atol=1e-3)
    genes = np.random.default_rng(0).permutation(query.n_vars)
    np.testing.assert_allclose(coordinates(gears.reconstruct(data[1][:, genes].copy())), coordinates(placed), atol=1e-3)


def train_and_die(module, loss, at):
    "Fit, and be killed at call number `at` of a loss."
    where, calls = importlib.import_module(module), []
    right = getattr(where, loss)

    def dies(*arguments):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*arguments)

    setattr(where, loss, dies)
    slides, _, cells = parts()
    Gears(NETWORK).fit(slides, cells)


@forked
@pytest.mark.parametrize(
    ("module", "loss", "at", "untouched"),
    [
        ("gears_nb.encoder.presets", "encoder_loss", 6, None),  # second epoch of five steps
        ("gears_nb.structure.rungs", "guess_loss", 6, "gears_nb.encoder.presets.encoder_loss"),
    ],
)
def test_kill_minus_nine_then_the_same_call_gives_the_same_coordinates(
    tmp_path, monkeypatch, networked_place, data, module, loss, at, untouched
):
    "The gears command is killed in tests/test_cli.py, which has a new process for it."
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    assert ended(start(train_and_die, module, loss, at)) == -signal.SIGKILL
    left = [p.name for p in (tmp_path / "fits").rglob("*.json")]
    assert "encoder.json" in left
    if untouched:  # a finished phase is loaded, not trained again
        monkeypatch.setattr(untouched, lambda *a: pytest.fail("the encoder was trained again"))
    slides, query, cells = data
    resumed = Gears(NETWORK).fit(slides, cells)
    assert content_digest(coordinates(resumed.reconstruct(query))) == content_digest(networked_place)
    assert not any((tmp_path / "fits").iterdir())


def test_a_workdir_of_other_settings_is_not_taken_over(data, alone, training_only):
    slides, query, _ = data
    folder = alone[1]
    other = settings(**{"encoder.temperature": 0.5, "structure.h_noise": 0.9})
    fresh = coordinates(Gears(other).fit(slides).reconstruct(query))
    try:
        reused = coordinates(Gears(other).fit(slides, workdir=folder).reconstruct(query))
    except InputError:
        return  # refusing is as good as training anew
    assert np.array_equal(reused, fresh)


def test_a_finished_workdir_is_loaded(data, again, placed):
    slides, query, cells = data
    first, folder = again
    runs = [first, Gears(settings()).fit(slides, cells, workdir=folder)]
    assert all(np.array_equal(coordinates(run.reconstruct(query)), coordinates(placed)) for run in runs)
    assert runs[0].history == runs[1].history and any(folder.iterdir())


def test_a_model_of_an_older_format_is_one_line(gears, tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(facade, "MODEL_FORMAT", facade.MODEL_FORMAT - 1)
        gears.save(tmp_path / "old")
    with pytest.raises(InputError, match=f"format: is {facade.MODEL_FORMAT - 1}, this version reads {facade.MODEL_FORMAT}.*train again") as caught:
        Gears.load(tmp_path / "old")
    assert "\n" not in str(caught.value)


def test_a_saved_model_keeps_the_settings_of_its_model(data, tmp_path, training_only):
    slides, query, _ = data
    model = {"name": "small-vae", "settings": {"latent": 3}}
    made = Gears(settings(**{"structure.guess_epochs": 1, "structure.epochs": 1}), model=model).fit(slides)
    again = Gears.load(made.save(tmp_path / "model"), {"progress": False})
    assert again.config == made.config and again.fitted.models[0].config.latent == 3
    assert np.array_equal(coordinates(again.reconstruct(query)), coordinates(made.reconstruct(query)))


# leaks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", ["nan", "huge", "text", "absent"])
def test_poison_the_query_s_positions_and_labels_are_not_read(gears, placed, data, garbage):
    query = data[1].copy()
    rng = np.random.default_rng(0)
    if garbage == "absent":
        query.obsm.clear()
        query.uns.clear()
        query.obs = query.obs[[]]
    else:
        fill = {"nan": np.nan, "huge": 1e30, "text": rng.normal(size=(query.n_obs, 2))}[garbage]
        query.obsm["spatial"] = np.full((query.n_obs, 2), fill) if garbage != "text" else fill
        query.obs["slide"] = "ST1" if garbage == "huge" else rng.permutation([f"s{i % 7}" for i in range(query.n_obs)])
        query.obs["cell_type"] = rng.permutation([f"t{i % 5}" for i in range(query.n_obs)])
        query.uns["truth"] = {"garbage": 1}
    # labels that divide the rows into sections are another matter: they are read unless that is declined
    assert np.array_equal(coordinates(gears.reconstruct(query, slide_key="none")), coordinates(placed))


def test_poison_only_the_gene_names_of_cells_reach_the_model(gears, data, training_only):
    slides, _, cells = data
    other = cells.copy()
    other.X = other.X[::-1].copy() * 2
    other.obsm.clear()
    model = Gears(settings()).fit(slides, other)
    assert content_digest(model.fitted.embedding.state()[0], model.fitted.models[0].state_dict()) == content_digest(
        gears.fitted.embedding.state()[0], gears.fitted.models[0].state_dict())


def test_poison_a_gene_that_is_silent_in_the_cells_still_teaches(gears, data, training_only):
    slides, _, cells = data
    other = cells.copy()
    other.X = np.asarray(other.X.todense())
    other.X[:, 5] = 0
    quick = settings(**{"encoder.epochs": 0, "structure.epochs": 0, "structure.guess_epochs": 0})
    assert Gears(quick).fit(slides, other).fitted.genes == gears.fitted.genes


def test_normaliser_is_fitted_on_slides_only(gears, alone, data):
    without, beside = (model.fitted.embedding.preprocessor for model in (alone[0], gears))
    assert without.target_sum == beside.target_sum
    assert np.array_equal(without.centring.mu_global, beside.centring.mu_global)
    totals = np.concatenate([np.asarray(s[:, list(beside.input_genes)].X.sum(1)).ravel() for s in data[0]])
    assert beside.target_sum == pytest.approx(np.median(totals))


def test_labels_and_truth_of_the_slides_are_not_read(gears, data, training_only):
    slides = [s.copy() for s in data[0]]
    for i, s in enumerate(slides):
        s.obs = s.obs[["slide"]].assign(patient=f"other{i}", cell_type="x")
        for key in [k for k in s.obsm if k != "spatial"]:
            del s.obsm[key]
        s.uns.clear()
    model = Gears(settings()).fit(slides, data[2])
    assert content_digest(model.fitted.models[0].state_dict()) == content_digest(gears.fitted.models[0].state_dict())


def test_units_and_orientation_of_a_section_do_not_matter(gears, data, monkeypatch):
    """Positions enter as distances within a section in its own unit. Spots are jittered first: on a lattice, equal distances are told apart by rounding."""
    slides, query, _ = data
    rng = np.random.default_rng(0)
    turn = np.array([[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]])
    plain, turned = [], []
    for slide in slides:
        where = np.asarray(slide.obsm["spatial"], dtype=np.float64)
        where = where + 0.2 * np.median(cKDTree(where).query(where, 2)[0][:, 1]) * rng.normal(size=where.shape)
        for kept, coords in ((plain, where), (turned, 3 * where @ turn * (1, -1))):
            kept.append(slide.copy())
            kept[-1].obsm["spatial"] = coords
    X, Y = (coordinates(Gears(settings()).fit(s).reconstruct(query)) for s in (plain, turned))
    assert procrustes(X, Y).error < 0.02
    wrong = [s.copy() for s in plain]
    for s in wrong:
        s.obsm["spatial"] = rng.permutation(s.obsm["spatial"])
    train_only(monkeypatch, gears)
    assert procrustes(X, coordinates(Gears(settings()).fit(wrong).reconstruct(query))).error > 0.1  # positions are read at all


# bad states and damage ------------------------------------------------------------------------------------------------


def test_an_unfitted_model_says_so(data, tmp_path):
    for act in (lambda g: g.reconstruct(data[1]), lambda g: g.embed(data[1]), lambda g: g.history, lambda g: g.report, lambda g: g.save(tmp_path / "m")):
        with pytest.raises(InputError, match=r"call fit\(slides\)"):
            act(Gears(settings()))
    assert not (tmp_path / "m").exists()


def test_no_slides_and_small_slides_are_refused_by_name(data):
    with pytest.raises(InputError, match="at least one slide"):
        Gears(settings()).fit([])
    small = data[0][1][:40].copy()
    small.obs["slide"] = "biopsy7"
    with pytest.raises(InputError, match="biopsy7.*40"):
        Gears(settings()).fit([data[0][0], small])


def test_cells_without_the_model_s_genes_are_refused(gears, data):
    query = data[1].copy()
    query.var_names = [f"unheard{i}" for i in range(query.n_vars)]
    with pytest.raises(InputError, match="genes"):
        gears.reconstruct(query)


def test_save_and_load_with_a_trained_encoder(networked, networked_place, data, tmp_path):
    loaded = Gears.load(networked.save(tmp_path / "model"))
    assert np.array_equal(coordinates(loaded.reconstruct(data[1])), networked_place)
    assert "encoder" in loaded.history


def test_save_and_load(gears, placed, data, tmp_path):
    folder = gears.save(tmp_path / "model")
    again = Gears.load(folder)
    assert again.config == gears.config and again.history == gears.history and again.report == gears.report
    result = again.reconstruct(data[1])
    assert np.array_equal(coordinates(result), coordinates(placed))
    assert np.array_equal(again.embed(data[1]).obsm["H_gears"], placed.obsm["H_gears"])
    gears.save(folder)
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(InputError, match="holds no saved Gears"):
        Gears.load(tmp_path)


@pytest.fixture(scope="module")
def saved(gears, tmp_path_factory):
    return gears.save(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "half a record"])
def test_a_damaged_folder_is_refused(saved, tmp_path, damage):
    folder = Path(shutil.copytree(saved, tmp_path / "m"))
    weights, record = next(folder.glob("*.safetensors")), folder / "gears.json"
    raw = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        weights.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    elif damage == "missing":
        weights.unlink()
    else:
        record.write_text(record.read_text()[:200])
    with pytest.raises(InputError) as caught:
        Gears.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


EDITS = {
    "no genes": lambda meta: meta.pop("genes"),
    "unknown setting": lambda meta: meta["config"].update(colour="red"),
    "mistyped setting": lambda meta: meta["config"].update(seed="one"),
    "another member of the metric": lambda meta: meta["config"]["encoder"]["metric"].update(contexts=[0, 10, 30]),
    "another maker of H": lambda meta: meta["config"]["encoder"].update(kind="network"),
    "more members": lambda meta: meta.update(models=2),
    "no preprocessor": lambda meta: meta["embedding"].clear(),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edited_record_is_refused(saved, tmp_path, edit):
    folder = Path(shutil.copytree(saved, tmp_path / "m"))
    record = json.loads((folder / "gears.json").read_text())
    EDITS[edit](record["meta"])
    (folder / "gears.json").write_text(json.dumps(record))
    with pytest.raises(InputError):
        Gears.load(folder)


# even density ---------------------------------------------------------------------------------------------------------


def crowded(n: int = 600) -> np.ndarray:
    "A disc whose inside is pulled to the middle."
    rng = np.random.default_rng(0)
    r, t = np.sqrt(rng.random(n)), 2 * np.pi * rng.random(n)
    return (r**1.8)[:, None] * np.stack([np.cos(t), np.sin(t)], 1)


def unevenness(X: np.ndarray, k: int = 15) -> float:
    "Spread of the logarithm of local density over the inner points."
    X = gauge_fix(X)
    inner = np.linalg.norm(X, axis=1) < np.quantile(np.linalg.norm(X, axis=1), 0.8)
    return float(np.log(cKDTree(X).query(X, k + 1)[0][inner, -1]).std())


def test_crowding_is_relieved_and_neighbours_stay():
    X = crowded()
    Y = even_out(X)
    assert unevenness(Y) < 0.75 * unevenness(X)
    near = [cKDTree(Z).query(Z, 11)[1][:, 1:] for Z in (X, Y)]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*near)]) > 0.8
    strengths = [unevenness(even_out(X, s)) for s in (0.0, 0.3, 1.0)]
    assert strengths[0] > strengths[1] > strengths[2]


def test_an_even_map_stays():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(25.0), np.arange(25.0)), -1).reshape(-1, 2) + 0.2 * rng.normal(size=(625, 2))
    assert procrustes(even_out(grid), gauge_fix(grid)).error < 0.06


def test_strength_zero_and_few_points_return_the_gauge_fixed_map():
    X = crowded() * 7 + 3
    assert np.array_equal(even_out(X, 0), gauge_fix(X)) and np.array_equal(even_out(X[:9]), gauge_fix(X[:9]))


def test_even_out_is_in_gauge_deterministic_and_leaves_its_input_alone():
    X = crowded()
    before = X.copy()
    Y = even_out(X)
    assert np.array_equal(X, before) and np.array_equal(even_out(X), Y)
    assert rms(Y) == pytest.approx(1) and np.abs(Y.mean(0)).max() < 1e-9
    np.testing.assert_allclose(even_out(40 * X - 9), Y, atol=1e-6)


def test_even_out_follows_the_order_of_points():
    X, order = crowded(), np.random.default_rng(1).permutation(600)
    np.testing.assert_allclose(even_out(X[order]), even_out(X)[order], atol=1e-6)


def test_even_out_of_degenerate_maps_is_finite():
    line = np.stack([np.linspace(0, 1, 50), np.zeros(50)], 1)
    for X in (np.zeros((30, 2)), line, np.repeat([[0.0, 0.0], [1.0, 1.0]], 20, axis=0)):
        assert np.isfinite(even_out(X)).all()


def test_the_map_s_evenness_is_a_setting(data, gears, placed):
    raw = Gears(settings(**{"solve.even": 0.0}))
    raw._fitted = gears.fitted
    result = raw.reconstruct(data[1])
    assert not np.allclose(coordinates(result), coordinates(placed))
    assert np.array_equal(result.obs["gears_confidence"], placed.obs["gears_confidence"])


# averages over neighbours ---------------------------------------------------------------------------------------------


def waves(n: int, g: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    X = np.cos(rng.random((n, 2)) @ rng.normal(size=(2, g)) * 3) + 0.1 * rng.normal(size=(n, g))
    return (X - X.mean(0)).astype(np.float32)


def test_average_neighbours_is_smooth_expression_for_thousands():
    from gears_nb.data.neighbours import average_neighbours
    from gears_nb.data.preprocess import smooth_expression

    X = waves(300)
    for k in (1, 7, 30):
        assert np.array_equal(average_neighbours(X, k), smooth_expression(X, k))


def test_average_neighbours_stays_close_when_neighbours_are_searched_in_lists():
    from gears_nb.data.neighbours import average_neighbours
    from gears_nb.geometry.neighbours import EXACT_BELOW, unit_rows

    X, k = waves(EXACT_BELOW + 1), 20
    rows = np.random.default_rng(1).choice(len(X), 150, replace=False)
    U = unit_rows(X)
    likeness = U[rows] @ U.T
    likeness[np.arange(150), rows] = np.inf  # itself first
    exact = X[np.argsort(-likeness, axis=1)[:, : k + 1]].mean(1)
    ours = average_neighbours(X, k)
    assert ours.shape == X.shape and ours.dtype == np.float32
    apart = np.linalg.norm(ours[rows] - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.median(apart) < 0.05 and apart.mean() < 0.1
    np.testing.assert_array_equal(ours, average_neighbours(X, k))


def test_a_profile_name_is_no_settings():
    with pytest.raises(InputError, match="config: is 'toy'. Remedy: pass the settings themselves"):
        Gears("toy")
