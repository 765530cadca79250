"""Target families and energy: hand-made references, invariances, padding, numerical safety."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.core.gauge import gauge_fix
from gears_nb.targets.energy import energy, js_rows, kl_rows, stress, walk_divergence
from gears_nb.targets.builder import (
    adaptive_k,
    adaptive_landmarks,
    adaptive_steps,
    build_targets,
    hashed_uniform,
    log_random_walk,
    log_support,
    pack_edges,
)

FORMS = ("log", "ratio", "sigma")


def cloud(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def walk_by_hand(X: torch.Tensor, k: int) -> tuple[list[list[float]], list[float]]:
    "T and sigma of one small miniset with plain Python loops."
    X = gauge_fix(X).tolist()
    n, d = len(X), [[math.dist(a, b) for b in X] for a in X]
    near = [sorted((j for j in range(n) if j != i), key=lambda j: d[i][j])[:k] for i in range(n)]
    sigma = [d[i][near[i][-1]] for i in range(n)]
    W = [[((j in near[i]) + (i in near[j])) / 2 * math.exp(-d[i][j] ** 2 / (sigma[i] * sigma[j])) for j in range(n)] for i in range(n)]
    return [[w / sum(row) for w in row] for row in W], sigma


def test_walk_equals_plain_loops():
    X = cloud(30)
    T, sigma = walk_by_hand(X, 6)
    targets = build_targets(X, k=6)
    assert torch.allclose(targets.rw_transitions[1][0], torch.tensor(T, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(targets.sigma_local[0], torch.tensor(sigma, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("n", [60, 150, 300])
def test_sizes_follow_the_miniset(n):
    t = build_targets(cloud(2, n))
    assert t.k.tolist() == [adaptive_k(n)] * 2 and t.knn_edges.shape == (2, n, adaptive_k(n))
    assert t.rw_steps.tolist() == [adaptive_steps(n)] * 2 and sorted(t.rw_transitions) == list(range(1, adaptive_steps(n) + 1))
    assert t.landmark_mask.sum(1).tolist() == [adaptive_landmarks(n)] * 2
    for s, T in t.rw_transitions.items():
        assert torch.allclose(T.sum(-1), torch.ones(2, n, dtype=T.dtype), atol=1e-12)
        assert torch.allclose(T, torch.linalg.matrix_power(t.rw_transitions[1], s), atol=1e-12)


def test_integer_and_tensor_sizes_agree():
    n = torch.arange(3, 800)
    for rule in (adaptive_k, adaptive_steps, adaptive_landmarks):
        assert rule(n).tolist() == [rule(i) for i in n.tolist()]
    assert adaptive_k(400) == max(20, int(0.15 * 400))


@pytest.mark.parametrize("sizes", [(30, 45), (100, 150, 260)])
def test_padded_batch_equals_single_minisets(sizes):
    clouds = [cloud(n, seed=n) for n in sizes]
    X = torch.nn.utils.rnn.pad_sequence(clouds, batch_first=True, padding_value=float("nan"))
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    both, rng = build_targets(X, mask, rng=seeded(1)), seeded(1)
    prediction = torch.where(mask[..., None], cloud(len(sizes), max(sizes), seed=9), 0.0)
    E = energy(prediction, both)
    for b, (n, c) in enumerate(zip(sizes, clouds)):
        one = build_targets(c, rng=rng)
        for s, T in one.rw_transitions.items():
            assert torch.allclose(both.rw_transitions[s][b, :n, :n], T[0], atol=1e-12)
            assert (both.rw_transitions[s][b, :n, n:] == 0).all()
        assert torch.equal(both.multiscale_edges[b][both.edge_mask[b]], one.multiscale_edges[0])
        assert torch.allclose(both.ref_distances[b][both.edge_mask[b]], one.ref_distances[0], atol=1e-12)
        assert torch.equal(both.landmarks[b][both.landmark_mask[b]], one.landmarks[0])
        alone = energy(prediction[b : b + 1, :n], one)
        for name in ("rw", "stress", "total"):
            assert torch.allclose(getattr(E, name)[b], getattr(alone, name)[0], atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), angle=st.floats(0, 6.3), scale=st.floats(0.5, 2.0), flip=st.booleans())
def test_targets_do_not_see_the_gauge(seed, angle, scale, flip):
    X = cloud(40, seed=seed)
    c, s = math.cos(angle), math.sin(angle)
    Q = torch.tensor([[c, s], [-s, c]], dtype=X.dtype) @ torch.diag(torch.tensor([1.0, -1.0 if flip else 1.0], dtype=X.dtype))
    a, b = build_targets(X), build_targets(scale * X @ Q + 7)
    assert torch.equal(a.multiscale_edges, b.multiscale_edges)
    assert torch.allclose(a.ref_distances, b.ref_distances, rtol=1e-9)
    assert all(torch.allclose(a.rw_transitions[i], b.rw_transitions[i], atol=1e-9) for i in a.rw_transitions)


def test_permutation_moves_rows_only():
    X, order = cloud(50), torch.randperm(50, generator=seeded(3))
    a, b = build_targets(X, n_ring=0), build_targets(X[order], n_ring=0)
    assert torch.allclose(a.rw_transitions[2][0][order][:, order], b.rw_transitions[2][0], atol=1e-12)
    assert torch.allclose(a.ref_distances.sort().values, b.ref_distances.sort().values, atol=1e-12)


def test_multiscale_edges_are_what_they_claim():
    X = cloud(120)
    t = build_targets(X, rng=seeded())
    k, edges = int(t.k[0]), t.multiscale_edges[0]
    pairs = {tuple(e) for e in edges.tolist()}
    assert len(pairs) == len(edges) and (edges[:, 0] < edges[:, 1]).all()
    assert torch.allclose(t.ref_distances[0], (gauge_fix(X)[edges[:, 0]] - gauge_fix(X)[edges[:, 1]]).norm(dim=-1), atol=1e-12)
    rank = torch.cdist(X, X).argsort(1).argsort(1)  # 0 is the spot itself
    marks = set(t.landmarks[0].tolist())
    closest = [min(int(rank[i, j]), int(rank[j, i])) for i, j in pairs if not {i, j} & marks]
    assert max(closest) <= 3 * k and sum(r > k for r in closest) > 100
    assert all((min(i, j), max(i, j)) in pairs for i in range(120) for j in t.knn_edges[0, i].tolist())
    assert all((min(i, j), max(i, j)) in pairs for i in marks for j in range(120) if i != j)


def test_ring_follows_its_generator():
    X = cloud(150)
    edges = [build_targets(X, rng=seeded(s)).multiscale_edges for s in (0, 0, 1)]
    assert torch.equal(edges[0], edges[1])
    assert edges[0].shape != edges[2].shape or not torch.equal(edges[0], edges[2])
    u = hashed_uniform(torch.tensor([5]), 300, 60)[0]
    assert 0 <= u.min() and u.max() < 1 and abs(torch.corrcoef(u.T)[0, 1]) < 0.2


def test_landmarks_spread_farther_than_chance():
    X = cloud(200)
    t = build_targets(X)
    chosen = torch.cdist(X[t.landmarks[0]], X).min(0).values.max()
    random = min(float(torch.cdist(X[torch.randperm(200, generator=seeded(s))[:12]], X).min(0).values.max()) for s in range(20))
    assert chosen < random


@pytest.mark.parametrize("n", [3, 5, 12])
def test_tiny_minisets(n):
    t = build_targets(cloud(n))
    assert t.k.item() == n - 1 and t.multiscale_edges.shape[1] == n * (n - 1) // 2
    assert energy(cloud(n), t).total.item() < 1e-9


def test_repeated_positions_stay_finite():
    X = cloud(60, dtype=torch.float32)
    X[:30] = X[0]
    t = build_targets(X)
    guess = cloud(1, 60, seed=2, dtype=torch.float32).requires_grad_()
    E = energy(guess, t)
    E.total.sum().backward()
    assert torch.isfinite(E.total).all() and torch.isfinite(guess.grad).all()
    assert energy(X, t).total.item() < 1e-4


def test_pack_edges_without_edges():
    edges, mask = pack_edges(torch.zeros(2, 4, 4, dtype=torch.bool))
    assert edges.shape == (2, 0, 2) and mask.shape == (2, 0)


def test_targets_index_like_a_batch_and_hold_no_coordinates():
    t = build_targets(cloud(4, 40))
    assert len(t) == 4 and len(t[1]) == 1 and len(t[-1]) == 1 and len(t[1:3]) == 2 and len(t[[0, 3]]) == 2
    assert torch.equal(t[-1].sigma_local[0], t.sigma_local[3])
    assert torch.equal(t[[3, 0]].rw_transitions[2][1], t.rw_transitions[2][0])
    assert not any("coord" in name or name == "X" for name in vars(t))


@pytest.mark.parametrize("X, mask, message", [
    (torch.zeros(2, 2), None, "fewer than 3 spots"),
    (torch.zeros(1, 9, 2), torch.zeros(1, 9, dtype=torch.bool), "fewer than 3 spots"),
    (torch.full((9, 2), float("inf")), None, "NaN or infinite"),
])
def test_bad_input_is_one_line(X, mask, message):
    with pytest.raises(InputError, match=message) as error:
        build_targets(X, mask)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n", [60, 150, 300])
def test_oracle_consistency(n):
    X = cloud(2, n, dtype=torch.float32)
    t = build_targets(X)
    T = log_random_walk(gauge_fix(5 * X + 1), log_support(t.knn_edges, t.knn_mask, t.mask), t.sigma_local).exp()
    for s, reference in t.rw_transitions.items():
        assert (torch.linalg.matrix_power(T, s) - reference).abs().max() < 1e-6
    E = energy(5 * X + 1, t)
    assert E.rw.abs().max() < 1e-5 and E.stress.max() < 1e-8


@pytest.mark.parametrize("form", FORMS)
def test_stress_forms(form):
    X = gauge_fix(cloud(2, 80))
    t = build_targets(X)
    assert stress(X, t, form).max() < 1e-20
    i, j = t.multiscale_edges[0][t.edge_mask[0]].T
    d, ref = (1.3 * X[0, i] - 1.3 * X[0, j]).norm(dim=-1), t.ref_distances[0][t.edge_mask[0]]
    plain = {"log": (d / ref).log() ** 2, "ratio": (d / ref - 1) ** 2, "sigma": (d - ref) ** 2 / (t.sigma_local[0, i] * t.sigma_local[0, j])}
    assert torch.allclose(stress(1.3 * X, t, form)[0], plain[form].mean(), rtol=0.02)  # softening is a small correction


def test_bandwidths_are_frozen():
    X = gauge_fix(cloud(1, 80))
    t = build_targets(X)
    assert walk_divergence(X, t).item() < 1e-9
    assert walk_divergence(2 * X, t).item() > 0.01  # a recomputed sigma would cancel the 2
    assert energy(2 * X, t).total.item() < 1e-9  # the gauge takes care of scale


def test_prediction_lives_on_reference_edges():
    t = build_targets(cloud(1, 60))
    T = log_random_walk(cloud(1, 60, seed=5), log_support(t.knn_edges, t.knn_mask, t.mask), t.sigma_local).exp()
    assert (T[t.rw_transitions[1] == 0] == 0).all()


def test_kl_rows_direction_and_zeros():
    P = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    Q = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])
    assert torch.allclose(kl_rows(P, Q.log()), torch.tensor([math.log(2), math.log(2)]))
    assert torch.allclose(js_rows(P, Q), js_rows(Q, P)) and (js_rows(P, Q) < math.log(2)).all()
    assert torch.isfinite(kl_rows(P, torch.tensor([[-0.7, -0.7, -torch.inf]] * 2))).all()


def test_energy_is_the_weighted_sum_of_all_walks():
    X, guess = cloud(1, 60), gauge_fix(cloud(1, 60, seed=1))
    t = build_targets(X)
    T = log_random_walk(guess, log_support(t.knn_edges, t.knn_mask, t.mask), t.sigma_local).exp()
    by_hand = sum(0.5 ** (s - 1) * kl_rows(P, torch.linalg.matrix_power(T, s).clamp(min=1e-12).log()).mean() for s, P in t.rw_transitions.items())
    E = energy(guess, t)
    assert torch.allclose(E.rw[0], by_hand, rtol=1e-6)
    assert torch.allclose(E.total, E.rw + 0.1 * E.stress)
    assert torch.allclose(energy(guess, t, stress_weight=2.0).total, E.rw + 2 * E.stress)


def test_energy_is_permutation_invariant():
    X, guess, order = cloud(60), cloud(60, seed=1), torch.randperm(60, generator=seeded(2))
    a, b = energy(guess, build_targets(X, n_ring=0)), energy(guess[order], build_targets(X[order], n_ring=0))
    assert torch.allclose(a.total, b.total, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_gradient(form, divergence):
    t = build_targets(cloud(1, 12), k=4)
    guess = cloud(1, 12, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: energy(X, t, form=form, divergence=divergence).total, guess)


@pytest.mark.parametrize("wild", ["point", "huge"])
def test_wild_predictions_have_finite_energy_and_gradient(wild):
    t = build_targets(cloud(1, 60, dtype=torch.float32))
    X = (torch.zeros(1, 60, 2) if wild == "point" else 1e4 * cloud(1, 60, seed=1, dtype=torch.float32)).requires_grad_()
    E = energy(X, t, gauge=False).total
    E.sum().backward()
    assert torch.isfinite(E).all() and torch.isfinite(X.grad).all()


def test_energy_ignores_autocast():
    t, guess = build_targets(cloud(1, 60, dtype=torch.float32)), cloud(1, 60, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = energy(guess, t).total.item()
    assert inside == energy(guess, t).total.item()


def test_energy_refuses_wrong_shapes_and_words():
    t = build_targets(cloud(2, 30))
    with pytest.raises(InputError, match="does not fit"):
        energy(cloud(1, 30), t)
    with pytest.raises(InputError, match="use log, ratio, sigma or metric"):
        energy(cloud(2, 30), t, form="cubic")
