"""Patchwise reconstruction, everything but the model: an oracle knows the true positions and hides them behind a random gauge."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.geometry.gauge import gauge_fix, procrustes
from gears_nb.geometry.neighbours import knn
from gears_nb.models.contract import Geometry, GeometryModel, NoSettings
from gears_nb.reconstruct.patches import build_graph, sample_patches
from gears_nb.reconstruct.patchwise import estimate_memory, patch_geometry, reconstruct
from gears_nb.reconstruct.settings import PatchConfig, SolveConfig
from gears_nb.reconstruct.stitch import PatchGeometry, edge_pattern, keep_edges, observe, patch_scales, weighted_median

PATCHES = PatchConfig(size=96, landmarks=24, allow_islands=False, k_graph=12, batch=16)
SOLVE = SolveConfig(iterations=200, landmarks=64, even=0)


class Oracle(GeometryModel):
    """True coordinates (the first two columns of H) with noise, randomly rotated or mirrored, in unit-RMS gauge."""

    def __init__(self, noise: float = 0.0, uneven: bool = False, spoil: int | None = None, explicit: bool = False):
        super().__init__(2, NoSettings())
        self.noise, self.uneven, self.spoil, self.explicit, self.calls = noise, uneven, spoil, explicit, 0

    def forward(self, H, mask=None, rng=None):
        level = self.noise * (1 + 4 * (H[..., 2:3] > 0)) if self.uneven else self.noise
        X = gauge_fix(H[..., :2])
        X = X + level * torch.randn(X.shape, generator=rng)
        if self.spoil == self.calls:
            X[0] = torch.randn(X[0].shape, generator=rng)
        self.calls += 1
        X = gauge_fix(X @ torch.linalg.qr(torch.randn(len(X), 2, 2, generator=rng))[0])
        return Geometry(X, distances=3 * torch.cdist(X, X) if self.explicit else None)


def tissue(n: int, seed: int = 0, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (n, 2))
    waves = np.tanh(1.5 * X @ rng.normal(size=(2, dim)) + rng.normal(size=dim))
    return np.concatenate([X, rng.normal(size=(n, 1)) * 0.05, waves], 1).astype(np.float32), X


def error(X: np.ndarray, truth: np.ndarray) -> float:
    return float(procrustes(np.asarray(X, float), gauge_fix(truth), scale=True).error)


@pytest.fixture(scope="module")
def cells():
    return tissue(600)


@pytest.fixture(scope="module")
def exact(cells):
    return reconstruct(Oracle(), cells[0], PATCHES, SOLVE)


def test_exact_recovery(cells, exact):
    truth = cells[1]
    assert exact.diagnostics["patches"] > 10
    assert error(exact.X, truth) < 1e-3
    assert spearmanr(pdist(exact.X), pdist(truth))[0] > 0.999
    assert exact.confidence.min() > 0.99 and exact.confidence.max() <= 1


def test_graph_holds_distances_in_units_of_the_map(exact):
    place = exact.graph.tocoo()
    assert np.allclose(place.data, np.linalg.norm(exact.X[place.row] - exact.X[place.col], axis=1), atol=1e-3)
    assert abs(exact.graph - exact.graph.T).max() == 0
    assert np.diff(exact.graph.indptr).min() >= 8


def test_diagnostics_are_json(exact):
    assert json.loads(json.dumps(exact.diagnostics))["converged"] is True


def test_noise_is_graceful_and_lowers_confidence(cells):
    H, truth = cells
    runs = [reconstruct(Oracle(noise), H, PATCHES, SOLVE) for noise in (0.02, 0.1, 0.3)]
    errors = [error(r.X, truth) for r in runs]
    assert errors == sorted(errors) and all(e < np.sqrt(2) * noise for e, noise in zip(errors, (0.02, 0.1, 0.3)))
    confidence = [r.confidence.mean() for r in runs]
    assert confidence == sorted(confidence, reverse=True)


def test_confidence_finds_the_bad_cells(cells):
    H, truth = cells
    result = reconstruct(Oracle(0.05, uneven=True), H, PATCHES, SOLVE)
    aligned = procrustes(result.X, gauge_fix(truth), scale=True).aligned
    off = np.linalg.norm(aligned - gauge_fix(truth), axis=1)
    assert spearmanr(result.confidence, -off)[0] > 0.5
    sure = result.confidence > np.quantile(result.confidence, 0.75)
    assert off[sure].mean() < 0.5 * off.mean()


def test_ensemble_beats_its_members(cells):
    H, truth = cells
    alone = error(reconstruct(Oracle(0.15), H, PATCHES, SOLVE).X, truth)
    crew = reconstruct([Oracle(0.15) for _ in range(4)], H, PATCHES, SOLVE)
    assert crew.diagnostics["members"] == 4 and error(crew.X, truth) < 0.8 * alone


def test_subtracting_noise_brings_neighbours_back(cells):
    H, truth = cells
    near = lambda X: np.argsort(np.linalg.norm(X[:, None] - X[None], axis=-1), axis=1)[:, 1:21]
    recall = lambda X: np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(near(X), near(truth))])
    raw, corrected = (reconstruct([Oracle(0.3)] * 3, H, PATCHES, SOLVE, **k) for k in ({"subtract": 0.0}, {}))
    assert recall(corrected.X) > recall(raw.X) + 0.1
    assert error(corrected.X, truth) < error(raw.X, truth)


def test_outlier_patch_is_silenced(cells):
    H, truth = cells
    single = PatchConfig(size=96, landmarks=24, allow_islands=False, k_graph=12, batch=1)
    result = reconstruct(Oracle(0.02, spoil=4), H, single, SOLVE)
    clean = reconstruct(Oracle(0.02), H, single, SOLVE)
    assert result.diagnostics["unreliable_patches"] == 1
    assert error(result.X, truth) < 1.6 * error(clean.X, truth) + 0.01


def test_order_of_cells_does_not_matter(cells):
    H, _ = cells
    order = np.random.default_rng(1).permutation(len(H))
    one, two = (reconstruct(Oracle(0.1), h, PATCHES, SOLVE) for h in (H, H[order]))
    assert (two.X == one.X[order]).all()
    assert (two.confidence == one.confidence[order]).all()
    assert abs(two.graph - one.graph[order][:, order]).max() == 0


def test_same_seed_same_bits_other_seed_other_bits(cells):
    H, _ = cells
    one, two, other = (reconstruct(Oracle(0.1), H, PATCHES, SOLVE, seed=s) for s in (0, 0, 1))
    assert one.X.tobytes() == two.X.tobytes() and one.graph.data.tobytes() == two.graph.data.tobytes()
    assert (one.X != other.X).any()


def test_distances_given_by_the_model_are_used(cells):
    H, truth = cells
    assert error(reconstruct(Oracle(explicit=True), H, PATCHES, SOLVE).X, truth) < 1e-3


@pytest.mark.parametrize("n", [4, 30, 96, 97, 110])
def test_few_cells(n):
    H, truth = tissue(n, seed=3)
    result = reconstruct(Oracle(), H, PATCHES, SOLVE)
    assert result.X.shape == (n, 2) and (result.diagnostics["patches"] == 1) == (n <= 96)
    assert error(result.X, truth) < 1e-3


def test_identical_cells_are_harmless():
    H, _ = tissue(150)
    result = reconstruct(Oracle(0.05), np.concatenate([H, H[:40], H[:40]]), PATCHES, SOLVE)
    assert np.isfinite(result.X).all() and np.isfinite(result.confidence).all()


def two_islands() -> np.ndarray:
    H, _ = tissue(300)
    far = np.zeros((300, 8), np.float32)
    far[:180, :4], far[180:, 4:] = 30, 30
    return np.concatenate([H, far], 1)


def test_disconnected_graph_warns_and_is_bridged():
    H = two_islands()
    with pytest.warns(GearsWarning, match="2 islands"):
        graph = build_graph(H, 10)
    assert graph.n_islands == 2 and np.bincount(graph.islands).tolist() == [180, 120]
    assert connected_components(graph.adjacency)[0] == 1
    with pytest.warns(GearsWarning, match="islands"):
        result = reconstruct(Oracle(), H, PATCHES, SOLVE)
    assert result.diagnostics["islands"] == [180, 120] and np.isfinite(result.X).all()


def test_a_graph_without_a_main_part_is_refused():
    H, _ = tissue(300)
    far = np.zeros((300, 12), np.float32)
    for part in range(3):
        far[100 * part : 100 * part + 100, 4 * part : 4 * part + 4] = 30
    H = np.concatenate([H, far], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        with pytest.raises(InputError, match="disconnected, parts of 100, 100, 100 cells.*allow_islands"):
            reconstruct(Oracle(), H, PATCHES, SOLVE)
        assert np.isfinite(reconstruct(Oracle(), H, dataclasses.replace(PATCHES, allow_islands=True), SOLVE).X).all()


def test_connected_graph_does_not_warn(cells):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_graph(cells[0], 12).n_islands == 1


def test_inverted_lists_agree_with_all_pairs(cells):
    exact, fast = (knn(cells[0], 8, metric="cosine", exact=e, candidates=200)[1] for e in (True, False))
    assert np.mean([len(np.intersect1d(a, b)) / 8 for a, b in zip(exact, fast)]) > 0.95


@settings(max_examples=15, deadline=None)
@given(n=st.integers(70, 400), size=st.integers(24, 64), overlap=st.integers(1, 4), seed=st.integers(0, 99))
def test_patches_cover_and_overlap(n, size, overlap, seed):
    H, _ = tissue(n, seed)
    patches = sample_patches(build_graph(H, 6), H, size=size, landmarks=8, overlap=overlap, seed=seed)
    assert patches.coverage.min() >= overlap
    assert all(len(np.unique(row)) == size for row in patches.index)
    assert (patches.index[:, :8] == patches.landmarks).all() and patches.overlaps().min() >= 8
    assert len(patches.index) <= 2.5 * n * overlap / (size - 8) + 3


def test_every_measurement_is_of_cells_in_that_patch(cells):
    H, truth = cells
    graph = build_graph(H, 12)
    patches = sample_patches(graph, H, size=96, landmarks=24)
    geometry = PatchGeometry(truth[patches.index][None].astype(np.float32))
    obs = observe(geometry, patches, edge_pattern(geometry, patches, graph, H))
    d = np.linalg.norm(truth[obs.pairs[:, 0]] - truth[obs.pairs[:, 1]], axis=1)
    assert np.allclose(np.exp(obs.value[0]), d[obs.edge], atol=1e-4)
    member = patches.membership.toarray() > 0
    together = (member[obs.pairs[:, 0]] & member[obs.pairs[:, 1]]).sum(1)
    assert (np.bincount(obs.edge) == together).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_patch_scales_match_dense_least_squares(seed):
    rng = np.random.default_rng(seed)
    edge, patch = np.repeat(np.arange(12), 3), np.concatenate([rng.choice(5, 3, replace=False) for _ in range(12)])
    patch[:5] = np.arange(5)
    value, weight = rng.normal(size=36), rng.uniform(0.2, 2, 36)
    A = np.zeros((37, 17))
    A[np.arange(36), edge] = A[np.arange(36), 12 + patch] = np.sqrt(weight)
    A[36, 12:] = 1
    expected = np.linalg.lstsq(A, np.r_[np.sqrt(weight) * value, 0], rcond=None)[0][12:]
    assert np.allclose(patch_scales(edge, patch, value, 5, weight), expected, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_weighted_median_splits_the_weight(values, seed):
    v, w = np.array(values), np.random.default_rng(seed).uniform(0.1, 2, len(values))
    m = weighted_median(np.zeros(len(v), int), v, w)[0]
    assert w[v < m - 1e-12].sum() <= w.sum() / 2 + 1e-9 and w[v > m + 1e-12].sum() <= w.sum() / 2 + 1e-9
    assert np.isclose(weighted_median(np.zeros(len(v), int), v, np.ones(len(v)))[0], np.median(v))


def test_filters_never_starve_a_cell():
    pairs = np.stack(np.triu_indices(30, 1), 1)
    keep = keep_edges(pairs, np.ones(len(pairs), bool), np.random.default_rng(0).random(len(pairs)), 30, min_edges=4)
    assert np.bincount(pairs[keep].ravel(), minlength=30).min() >= 4 and keep.mean() < 0.5


def test_model_mode_is_restored_and_bad_numbers_refused(cells):
    H, _ = cells
    patches = sample_patches(build_graph(H, 12), H, size=96, landmarks=24)
    model = Oracle().train()
    patch_geometry([model], H, patches)
    assert model.training
    with pytest.raises(InputError, match="not finite"):
        patch_geometry([Oracle(float("nan"))], H, patches)


def test_bad_input_is_refused(cells):
    H, _ = cells
    with pytest.raises(InputError, match="4 finite rows"):
        reconstruct(Oracle(), np.full((50, 4), np.nan), PATCHES, SOLVE)
    with pytest.raises(InputError, match="landmarks"):
        reconstruct(Oracle(), H, PatchConfig(size=32, landmarks=30, allow_islands=False), SOLVE)


def test_memory_estimate_is_linear():
    one, two = (estimate_memory(n, 128, PATCHES) for n in (50_000, 100_000))
    assert 1.8 < two / one < 2.05
