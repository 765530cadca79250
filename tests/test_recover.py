"""Recovery of coordinates from targets: exactness, padding, degenerate and bad input, false edges, large sparse graphs."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.geometry.distances import point_spread, tidy_edges
from gears_nb.geometry.gauge import gauge_fix, procrustes
from gears_nb.geometry.mds import landmark_mds
from gears_nb.geometry.neighbours import neighbour_recall
from gears_nb.targets.builder import build_targets
from gears_nb.targets.energy import energy
from gears_nb.targets.recover import recover, recover_sparse, sparse_multiscale_graph


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lattice(rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()


def error(X, truth) -> float:
    return float(procrustes(X, gauge_fix(truth)).error)


def spoilt(targets, share: float, seed: int):
    "Targets of one miniset with `share` of its edges added as random pairs of a short length; a pair known already takes the false length."
    rng, n = np.random.default_rng(seed), targets.mask.shape[1]
    true = targets.multiscale_edges[0].numpy()
    false = rng.integers(n, size=(int(share * len(true)), 2))
    lengths = np.concatenate([float(targets.sigma_local.median()) * rng.random(len(false)), targets.ref_distances[0].double().numpy()])
    edges, lengths = tidy_edges(n, np.concatenate([false, true]), lengths)
    return replace(targets, multiscale_edges=torch.from_numpy(edges)[None], ref_distances=torch.from_numpy(lengths)[None],
                   edge_mask=torch.ones(1, len(edges), dtype=torch.bool))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(3, 90), stretch=st.floats(0.05, 1), seed=st.integers(0, 10**6))
def test_exact_for_any_cloud(n, stretch, seed):
    X = cloud(1, n, seed=seed) * torch.tensor([1.0, stretch])
    answer = recover(build_targets(X))
    assert answer.converged.all() and answer.stress < 1e-6
    assert error(answer.X[0], X[0]) < 1e-6
    assert abs(float(answer.scale) - 1) < 1e-6


@pytest.mark.parametrize("n", [128, 384])
def test_goal_in_single_precision(n):
    truth = torch.stack([cloud(n), lattice(n // 8, 8)])
    answer = recover(build_targets(truth.float()))
    for X, Y in zip(answer.X, truth):
        assert error(X, Y) < 1e-5 and neighbour_recall(X.numpy(), Y.numpy()) > 0.999
    assert energy(answer.X, build_targets(truth.float())).total.max() < 1e-4


def test_padding_changes_nothing():
    parts = [cloud(30, seed=1), cloud(57, seed=2), lattice(4, 5)]
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=float("nan"))
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(p) for p in parts])[:, None]
    both = recover(build_targets(padded, mask))
    for b, part in enumerate(parts):
        alone = recover(build_targets(part))
        assert error(both.X[b, : len(part)], alone.X[0]) < 1e-9
        assert (both.X[b, len(part):] == 0).all()
        assert error(both.X[b, : len(part)], part) < 1e-6


def test_deterministic_and_independent_of_the_batch():
    targets = build_targets(cloud(3, 70))
    first, again = recover(targets), recover(targets)
    assert torch.equal(first.X, again.X)
    for b in range(3):
        assert error(recover(targets[b]).X[0], first.X[b]) < 1e-9


def test_init_decides_the_orientation_only():
    targets, free = build_targets(cloud(1, 60)), recover(build_targets(cloud(1, 60)))
    for seed in range(3):
        init = cloud(1, 60, seed=seed + 10)
        answer = recover(targets, X0=init)
        assert error(answer.X[0], free.X[0]) < 1e-9
        turned = procrustes(answer.X, init).aligned
        assert (turned - turned.mean(1, keepdim=True) - answer.X).abs().max() < 1e-9
    with pytest.raises(InputError, match="X0"):
        recover(targets, X0=cloud(1, 59))


def test_shortest_paths_replace_missing_landmark_rows():
    truth = cloud(1, 80)
    targets = build_targets(truth)
    hub = torch.isin(targets.multiscale_edges, targets.landmarks).any(-1)
    near = targets.ref_distances < targets.sigma_local.max()
    thinned = replace(targets, edge_mask=targets.edge_mask & (~hub | near))
    assert thinned.edge_mask.sum() < targets.edge_mask.sum()
    assert error(recover(thinned).X[0], truth[0]) < 1e-5


def test_coincident_points_and_lines():
    doubled = torch.cat([cloud(20), cloud(20)])
    assert error(recover(build_targets(doubled)).X[0], doubled) < 1e-5
    line = torch.linspace(0, 1, 50).double()[:, None] * torch.tensor([2.0, 1.0])
    answer = recover(build_targets(line.float()))
    assert torch.isfinite(answer.X).all() and error(answer.X[0], line) < 1e-3


def test_bad_targets_are_refused():
    targets = build_targets(cloud(1, 40))
    with pytest.raises(InputError, match="landmarks: fewer than 3.*Remedy"):
        recover(build_targets(cloud(1, 40), n_landmarks=2))
    with pytest.raises(InputError, match="ref_distances: 1 lengths are not finite"):
        recover(replace(targets, ref_distances=targets.ref_distances.index_fill(1, torch.tensor(3), float("nan"))))
    touches = (targets.multiscale_edges == 7).any(-1)
    with pytest.raises(InputError, match="multiscale_edges of miniset 0: .* no path.*Remedy"):
        recover(replace(targets, edge_mask=targets.edge_mask & ~touches))


@pytest.mark.parametrize("seed", range(3))
def test_robust_beats_plain_under_false_edges(seed):
    truth = torch.rand(1, 150, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bad = spoilt(build_targets(truth), 0.1, seed)
    plain, robust = recover(bad, robust=False, iterations=20), recover(bad)
    recall = [neighbour_recall(r.X[0].numpy(), truth[0].numpy()) for r in (plain, robust)]
    assert recall[1] > 0.97 and recall[1] > recall[0] + 0.2


def test_landmark_mds_needs_no_iteration():
    X = cloud(1, 50)
    marks = torch.tensor([[0, 5, 9, 31]])
    Y = landmark_mds(torch.cdist(X[:, marks[0]], X), marks, torch.ones(1, 4, dtype=torch.bool))
    assert error(gauge_fix(Y[0]), X[0]) < 1e-10


def test_point_spread_is_the_median_of_the_points_edges():
    edges = torch.tensor([[[0, 1], [0, 2], [0, 3], [1, 2], [0, 0]]])
    mask = torch.tensor([[True, True, True, True, False]])
    out = point_spread(torch.tensor([[1.0, 2.0, 5.0, 7.0, 99.0]], dtype=torch.float64), edges, mask, 5) / 1.4826
    assert out[0].tolist() == pytest.approx([2.0, 7.0, 7.0, 5.0, 0.0])


@pytest.mark.parametrize("landmarks", [16, 0])
def test_sparse_graph(landmarks):
    place = np.random.default_rng(3).random((1200, 2))
    edges, lengths, marks = sparse_multiscale_graph(place, k=15, landmarks=landmarks)
    assert len(marks) == landmarks and len(edges) < 1200 * (15 + 4 + landmarks)
    answer = recover_sparse(1200, edges, lengths)
    assert neighbour_recall(answer.X, place) > 0.99 and error(answer.X, place) < 0.01
    size = np.sqrt(np.square(place - place.mean(0)).sum(1).mean())
    assert answer.scale == pytest.approx(size, rel=0.01)
    order = np.random.default_rng(0).permutation(len(edges))
    shuffled = recover_sparse(1200, edges[order][:, ::-1], lengths[order])
    assert np.array_equal(shuffled.X, answer.X)


def test_sparse_robust_beats_plain_under_false_edges():
    rng = np.random.default_rng(5)
    place = rng.random((1000, 2))
    edges, lengths, _ = sparse_multiscale_graph(place, landmarks=0)
    false = rng.integers(1000, size=(len(edges) // 10, 2))
    edges, lengths = np.concatenate([edges, false]), np.concatenate([lengths, np.median(lengths) * rng.random(len(false))])
    edges, lengths = tidy_edges(1000, edges, lengths)
    recall = [neighbour_recall(recover_sparse(1000, edges, lengths, robust=r, iterations=15).X, place) for r in (False, True)]
    assert recall[1] > 0.9 and recall[1] > recall[0] + 0.2


def test_sparse_bad_input():
    edges = np.array([[0, 1], [1, 2], [0, 2], [3, 4], [4, 5], [3, 5]])
    with pytest.raises(InputError, match="pairs: 3 of 6 points have no path.*Remedy"):
        recover_sparse(6, edges, np.ones(6))
    with pytest.raises(InputError, match="lengths: 1 are negative or not finite"):
        recover_sparse(6, edges, np.array([1, 1, 1, 1, 1, np.inf]))
    with pytest.raises(InputError, match="lengths: 5 lengths for 6 pairs"):
        recover_sparse(6, edges, np.ones(5))
    with pytest.raises(InputError, match="number the points"):
        recover_sparse(5, edges, np.ones(6))
