"""Baselines: what they must know, what they must not look at, and the field's own numbers on real data."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from gears_nb.benchmark import baselines
from gears_nb.benchmark.baselines import BASELINES, METHODS, prepare, run_baselines
from gears_nb.core.errors import InputError
from gears_nb.data.io import read_h5ad
from gears_nb.data.registry import data_root
from gears_nb.geometry.metrics import score


def tissue(n: int, seed: int, angle: float = 0.0, depth: float = 1.0, genes: int = 30) -> ad.AnnData:
    bumps = np.random.default_rng(77).random((genes, 2))
    rng = np.random.default_rng(seed)
    place = rng.random((n, 2)) * [1, 0.6]
    rate = 8 * depth * np.exp(-((place[:, None] - bumps) ** 2).sum(-1) / 0.05) + 0.2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    out = ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=pd.DataFrame(index=[f"{seed}-{i}" for i in range(n)]))
    out.var_names = [f"g{i}" for i in range(genes)]
    out.obsm["spatial"] = 50 * place @ turn
    return out


@pytest.fixture(scope="module")
def slides() -> tuple[list[ad.AnnData], ad.AnnData]:
    return [tissue(220, 1), tissue(180, 2, angle=2.2, depth=0.6)], tissue(150, 3, angle=-0.8)


@pytest.fixture(scope="module")
def runs(slides):
    return run_baselines(*slides, seed=0)


def test_names_are_those_of_the_results_contract(runs):
    names = {"knn1", "knn5", "knn20", "smoothed_knn20", "ridge", "krr", "extratrees", "mlp", "ot", "pca2", "random"}
    assert set(BASELINES) == set(METHODS) == set(runs) == names


@pytest.mark.parametrize("name", list(METHODS))
def test_layout_is_finite_deterministic_and_informative(name, slides, runs):
    reference, query = slides
    X = runs[name].X
    assert X.shape == (150, 2) and np.isfinite(X).all()
    assert np.array_equal(BASELINES[name](reference, query, 0), X)
    spearman = score(X, query.obsm["spatial"])["spearman"]
    assert spearman > {"random": -0.1, "pca2": 0.2}.get(name, 0.6)
    assert name != "random" or spearman < 0.1


def test_seed_changes_what_is_random(slides, runs):
    for name in ("extratrees", "mlp", "random"):
        assert not np.array_equal(BASELINES[name](*slides, 1), runs[name].X)


def test_truth_of_the_query_is_never_read_and_inputs_stay_untouched(slides, runs):
    reference, query = [s.copy() for s in slides[0]], slides[1].copy()
    del query.obsm["spatial"]
    before = [(s.X.copy(), s.obsm["spatial"].copy()) for s in reference]
    again = run_baselines(reference, query, seed=0)
    assert all(np.array_equal(again[n].X, runs[n].X) for n in runs)
    assert all((s.X != X).nnz == 0 and np.array_equal(s.obsm["spatial"], Y) for s, (X, Y) in zip(reference, before))


@pytest.mark.parametrize("name", ["knn5", "smoothed_knn20", "ridge", "krr", "ot"])
def test_pose_of_each_reference_slide_does_not_matter(name, slides, runs):
    reference, query = [s.copy() for s in slides[0]], slides[1]
    reference[1].obsm["spatial"] = reference[1].obsm["spatial"] @ np.array([[0, -4.0], [-4.0, 0]]) + 100
    assert score(BASELINES[name](reference, query, 0), runs[name].X)["stress1"] < 1e-4


def test_second_slide_joins_the_frame_of_the_first(slides):
    task = prepare(*slides)
    assert [r.used for r in task.registrations] == [True, True] and len(task.coords) == 400
    truth = np.concatenate([s.obsm["spatial"] @ np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]).T for s, a in zip(slides[0], (0, 2.2))])
    assert score(task.coords, truth)["stress1"] < 0.1


def test_unrelated_slide_is_left_out(slides):
    reference, query = slides
    alien = reference[1].copy()
    alien.obsm["spatial"] = np.random.default_rng(0).permutation(alien.obsm["spatial"])
    task = prepare([reference[0], alien], query)
    kept = [r.slide for r in task.registrations if r.used]
    assert len(kept) == 1 and len(task.coords) == reference[kept[0]].n_obs


def test_per_source_centring_removes_a_batch_effect(slides):
    (first, _), query = slides
    shifted = query.copy()
    boost = np.ones(query.n_vars)
    boost[::3] = 5
    shifted.X = sp.csr_matrix(query.X.toarray() * boost)
    scores = [score(BASELINES["knn20"]([first], q, 0), query.obsm["spatial"])["spearman"] for q in (query, shifted)]
    assert scores[1] > scores[0] - 0.1


def test_transport_memory_is_bounded(slides):
    task = prepare(*slides)
    seen = []
    original = baselines.transport_positions
    try:
        baselines.transport_positions = lambda cost, coords: seen.append(cost.size) or original(cost, coords)
        X = baselines.ot(task, pairs=20_000)
    finally:
        baselines.transport_positions = original
    assert max(seen) <= 20_000 and np.isfinite(X).all() and len(seen) > 1


def test_constant_and_empty_cells_do_not_break(slides):
    (first, _), query = slides
    odd = query.copy()
    X = odd.X.toarray()
    X[0], X[1] = 0, 3
    odd.X = sp.csr_matrix(X)
    with pytest.warns(UserWarning, match="1 cells have no counts"):
        assert all(np.isfinite(run.X).all() for run in run_baselines([first], odd).values())


def test_non_counts_are_accepted():
    first, query = tissue(150, 1), tissue(100, 2)
    for a in (first, query):
        a.X = a.X.toarray() / 20
    assert score(BASELINES["knn5"]([first], query, 0), query.obsm["spatial"])["spearman"] > 0.6


def test_oracle_is_the_nearest_spot():
    spots, query = tissue(60, 1), tissue(40, 2)
    X = baselines.oracle_nearest_spot([spots], query)
    gap = np.linalg.norm(spots.obsm["spatial"][None] - query.obsm["spatial"][:, None], axis=-1)
    assert np.allclose(np.linalg.norm(X - query.obsm["spatial"], axis=1), gap.min(1))
    with pytest.raises(InputError, match="one slide"):
        baselines.oracle_nearest_spot([spots, spots], query)


def test_bad_input_is_one_line(slides):
    (first, _), query = slides
    bare = first.copy()
    del bare.obsm["spatial"]
    other = first.copy()
    other.var_names = [f"z{i}" for i in range(other.n_vars)]
    for reference, words in (([], "no slide"), ([bare], "is missing"), ([other], "genes shared")):
        with pytest.raises(InputError, match=words) as error:
            prepare(reference, query)
        assert "\n" not in str(error.value)


# --- the field's numbers (protocol C, one section of another animal; per-source centring, log-normalised) ---

needs_data = pytest.mark.skipif(data_root() is None, reason="real data folder not found (set GEARS_DATA)")


@needs_data
def test_starmap_numbers_of_the_field():
    cells = read_h5ad(data_root() / "starmap_mpfc/starmap_mpfc.h5ad")
    reference, query = (cells[cells.obs["slide"] == s].copy() for s in ("BZ5", "BZ9"))
    runs = run_baselines([reference], query, names=["knn20", "smoothed_knn20", "extratrees"])
    for name, expected in {"knn20": 0.285, "smoothed_knn20": 0.282, "extratrees": 0.303}.items():
        assert score(runs[name].X, query.obsm["spatial"])["spearman"] == pytest.approx(expected, abs=0.03), name


@needs_data
def test_embryo_numbers_of_the_field():
    folder = data_root() / "seqfish_mouse_embryo"
    reference, query = (read_h5ad(folder / f"embryo{i}_z2.h5ad") for i in (1, 2))
    runs = run_baselines([reference], query, names=["knn20", "smoothed_knn20"])
    rows = {name: score(run.X, query.obsm["spatial"]) for name, run in runs.items()}
    assert rows["knn20"]["spearman"] == pytest.approx(0.541, abs=0.03)
    smooth = rows["smoothed_knn20"]
    for metric, expected in {"spearman": 0.629, "stress1": 0.395, "edge_auc": 0.869, "bap": 0.887, "shell_f1": 0.266, "trust20": 0.860, "swd": 0.118, "w1_knn": 0.031}.items():
        assert smooth[metric] == pytest.approx(expected, abs=0.02), metric
