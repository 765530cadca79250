"""encoder.spatial_metric and encoder.embedding: limits in closed form, invariance of pose, leaks, damage."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.config import at_profile
from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.encoder.embedding import embedding_from, fit_embedding
from gears_nb.encoder.probes import overlap
from gears_nb.encoder.settings import EncoderConfig, MetricConfig
from gears_nb.encoder.spatial_metric import (
    axes_of,
    fit_spatial_metric,
    gene_weights,
    metric_from,
    metric_state,
    neighbour_graph,
    neighbour_variance,
    pair_scatter,
)


def tissue(seed: int, n: int = 300, genes: int = 8, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    "Two smooth genes and noise on a random section, centred."
    rng = np.random.default_rng(seed)
    c = rng.uniform(size=(n, 2))
    X = np.concatenate([np.sin(3 * c) + noise * rng.normal(size=c.shape), rng.normal(size=(n, genes - 2))], 1).astype(np.float32)
    return X - X.mean(0), c


def turned(c: np.ndarray, angle: float, scale: float, flip: bool) -> np.ndarray:
    R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * c @ R.T * (np.array([-1, 1]) if flip else 1) + np.array([3.0, -40.0])


def test_scatter_is_the_mean_over_edges():
    X, c = tissue(0, n=60)
    A = neighbour_graph(c, 5).toarray()
    W, T = pair_scatter(X, c, 5)
    delta = X[:, None].astype(float) - X[None]
    direct = 0.5 * np.einsum("ij,ijp,ijq->pq", A, delta, delta) / len(X)
    np.testing.assert_allclose(W, direct, atol=1e-6)
    np.testing.assert_allclose(T, np.cov(X.T, bias=True), atol=1e-6)
    np.testing.assert_allclose(neighbour_variance(X, neighbour_graph(c, 5)), np.diag(direct), atol=1e-5)


def test_axes_solve_the_generalised_eigenproblem():
    X, c = tissue(1)
    W, T = pair_scatter(X, c, 10)
    V, ratio = axes_of(W, T, 0.0, 8)
    length = np.sqrt(np.clip(1 - 1 / ratio, 0, None))
    keep = length > 1e-3
    U = V[:, keep] / length[keep]
    np.testing.assert_allclose(U.T @ W @ U, np.eye(keep.sum()), atol=1e-6)
    np.testing.assert_allclose(T @ U, W @ U * ratio[keep], atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(angle=st.floats(0, 6.28), scale=st.floats(0.01, 1000), flip=st.booleans())
def test_pose_and_unit_of_the_reference_do_not_matter(angle, scale, flip):
    X, c = tissue(2, n=120)
    grid = np.stack(np.meshgrid(np.arange(10.0), np.arange(12.0)), -1).reshape(-1, 2)  # ties everywhere
    for where in (c, grid):
        before = neighbour_graph(where, 8)
        assert abs(before - neighbour_graph(turned(where, angle, scale, flip), 8)).max() < 1e-12
    config = MetricConfig(stem=6, dim=4, anchors=50)
    H = fit_spatial_metric([X], [c], config).embed(X)
    np.testing.assert_allclose(fit_spatial_metric([X], [turned(c, angle, scale, flip)], config).embed(X), H, atol=1e-4)
    np.testing.assert_allclose(H.mean(0), 0, atol=1e-5)


def test_order_of_cells_only_orders_rows():
    (X, c), (Q, _) = tissue(3), tissue(4)
    metric, order = fit_spatial_metric([X], [c]), np.random.default_rng(0).permutation(len(Q))
    np.testing.assert_allclose(metric.embed(Q[order]), metric.embed(Q)[order], atol=1e-4)


def test_noise_genes_weigh_little_and_pure_noise_is_an_error():
    (X, c), (Z, d) = tissue(5), tissue(6)
    w = gene_weights([X, Z], [c, d])
    assert w[:2].min() > 4 * w[2:].max()
    checks = np.indices((10, 10)).sum(0).ravel() % 2 * 2.0 - 1
    grid = np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), -1).reshape(-1, 2)
    with pytest.raises(InputError, match="none varies smoothly"):
        gene_weights([checks[:, None]], [grid], k=4)


def test_neighbours_on_an_unseen_section():
    (X, c), (Z, d), (Q, where) = tissue(7), tissue(8), tissue(9)
    share = lambda H: overlap(H, where, ["q"] * len(H))["q"]
    assert share(fit_spatial_metric([X, Z], [c, d]).embed(Q)) > 2 * share(Q)


def test_state_survives_and_missing_parts_are_noticed():
    X, c = tissue(10)
    metric = fit_spatial_metric([X], [c])
    state = metric_state(metric)
    assert np.array_equal(metric_from(state, metric.config).embed(X), metric.embed(X))
    with pytest.raises(KeyError):
        metric_from({k: v for k, v in state.items() if k != "0.axes"}, metric.config)


@pytest.mark.parametrize("kind", ["metric", "network"])
def test_embedding_reads_neither_positions_nor_other_sources(kind):
    *slides, third = simulate("tiny", seed=1).slides
    config = at_profile(EncoderConfig, "smoke", progress=False, kind=kind)
    embedding, history = fit_embedding(slides, config)
    H = embedding.embed(third)
    blind = third.copy()
    del blind.obsm["spatial"]
    assert np.array_equal(embedding.embed(blind), H) and bool(history.rows) == (kind == "network")
    tensors, record = embedding.state()
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())
    assert np.array_equal(embedding_from(tensors, record, config).embed(third), H)
