"""Target families and energy: hand-made references, invariances, padding, numerical safety."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.targets.builder import (
    adaptive_k,
    adaptive_landmarks,
    adaptive_steps,
    build_targets,
    hashed_uniform,
    log_random_walk,
    log_support,
    miniset_rows,
    pack_edges,
    slide_neighbours,
)
from gears_nb.targets.energy import energy, js_rows, kl_rows, stress, walk_divergence

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


def test_edges_equal_plain_loops():
    X, n, k, m = cloud(70, seed=3), 70, 20, 8
    Y, u = gauge_fix(X).tolist(), hashed_uniform(torch.zeros(1, dtype=torch.long), n, 8)[0].tolist()
    order = [sorted((j for j in range(n) if j != i), key=lambda j: math.dist(Y[i], Y[j])) for i in range(n)]
    marks = [max(range(n), key=lambda i: math.hypot(*Y[i]))]
    while len(marks) < m:
        marks.append(max(range(n), key=lambda i: min(math.dist(Y[i], Y[j]) for j in marks)))
    pairs = {(min(i, j), max(i, j)) for i in range(n) for j in order[i][:k] + marks if i != j}
    for i in range(n):
        pairs |= {(min(i, j), max(i, j)) for j in (order[i][k + int(v * min(2 * k, n - 1 - k))] for v in u[i])}
    t = build_targets(X)
    assert t.landmarks[0].tolist() == marks and t.multiscale_edges[0].tolist() == [list(e) for e in sorted(pairs)]
    assert torch.allclose(t.ref_distances[0], torch.tensor([math.dist(Y[i], Y[j]) for i, j in sorted(pairs)]).double(), atol=1e-6)


def lattice(rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns))).double()


def same_targets(a, b, atol: float = 0.0) -> bool:
    "Whether two batches of targets agree wherever they are valid."
    exact = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("knn_mask", "multiscale_edges", "edge_mask", "landmarks", "k"))
    lists = torch.equal(a.knn_edges[a.knn_mask], b.knn_edges[b.knn_mask])
    close = [(a.sigma_local, b.sigma_local), (a.ref_distances, b.ref_distances), *((a.rw_transitions[s], b.rw_transitions[s]) for s in a.rw_transitions)]
    return exact and lists and all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in close)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("angle", [0.3, 1.1, 2.9])
def test_ties_on_a_lattice_do_not_see_the_gauge(dtype, atol, angle):
    X = lattice(14, 11) * torch.tensor([1.0, 3**0.5 / 2]).double()
    c, s = math.cos(angle), math.sin(angle)
    moved = 0.5 * X @ torch.tensor([[c, s], [s, -c]], dtype=X.dtype) - 3
    assert same_targets(build_targets(X.to(dtype)), build_targets(moved.to(dtype)), atol)


@pytest.mark.parametrize("slide", [cloud(150, seed=4), lattice(12, 11)], ids=["scattered", "lattice"])
@pytest.mark.parametrize("K", [5, 22, 60])
def test_slide_list_of_the_whole_slide_changes_nothing(slide, K):
    rows = miniset_rows(slide_neighbours(slide, K), torch.arange(len(slide))[None])
    assert (rows >= 0).all() and same_targets(build_targets(slide, slide_knn=rows), build_targets(slide))


@pytest.mark.parametrize("K", [5, 40, 200])
def test_euclidean_slide_list_changes_no_sparse_miniset(K):
    slide = cloud(600, seed=5)
    index = torch.stack([torch.randperm(600, generator=seeded(s))[:100] for s in range(3)])
    rows = miniset_rows(slide_neighbours(slide, K), index)
    assert 0 < (rows >= 0).double().mean() < 0.3
    assert same_targets(build_targets(slide[index], slide_knn=rows), build_targets(slide[index]))


def test_slide_neighbours_equal_brute_force():
    X = cloud(90, seed=6)
    d = torch.cdist(X, X).fill_diagonal_(torch.inf)
    assert torch.equal(slide_neighbours(X, 12), d.argsort(1)[:, :12])
    assert slide_neighbours(X[:4], 12).shape == (4, 3)
    doubled = torch.cat([X, X])  # a twin at distance zero comes first, the spot itself never
    assert torch.equal(slide_neighbours(doubled, 1)[:, 0], (torch.arange(180) + 90) % 180)


def test_rows_of_a_miniset_by_hand():
    lists = torch.tensor([[1, 2], [3, -1], [0, 4], [4, 2], [3, 0]])
    index, mask = torch.tensor([[4, 0, 3], [2, 1, 0]]), torch.tensor([[True, True, True], [True, True, False]])
    assert miniset_rows(lists, index, mask).tolist() == [[[2, 1], [-1, -1], [0, -1]], [[-1, -1], [-1, -1], [-1, -1]]]


def test_slide_neighbours_come_first_and_gaps_are_filled():
    X, lists = cloud(40, seed=7), torch.full((1, 40, 4), -1)
    far = torch.cdist(X, X).argsort(1, descending=True)
    lists[0, 3], lists[0, 8] = torch.tensor([far[3, 0], -1, far[3, 1], 3]), torch.tensor([-1, -1, -1, far[8, 0]])  # 3 itself is no neighbour
    full, sparse, own = build_targets(X, k=6, slide_knn=lists), build_targets(X, k=6, slide_knn=lists, fill=1), build_targets(X, k=6)
    assert full.knn_edges[0, 3].tolist() == [*far[3, :2].tolist(), *own.knn_edges[0, 3, :4].tolist()]
    assert full.knn_edges[0, 8].tolist() == [far[8, 0].item(), *own.knn_edges[0, 8, :5].tolist()]
    others = torch.tensor([i not in (3, 8) for i in range(40)])
    assert full.knn_mask.all() and torch.equal(full.knn_edges[0, others], own.knn_edges[0, others])
    assert sparse.knn_mask[0].sum(1).tolist() == [2 if i == 3 else 1 for i in range(40)]
    Y = gauge_fix(X)
    assert torch.allclose(sparse.sigma_local[0, 3], (Y[3] - Y[far[3, 0]]).norm(), atol=1e-12)
    assert torch.allclose(sparse.rw_transitions[1][0].sum(1), torch.ones(40).double(), atol=1e-12)
    assert energy(X, sparse).total.item() < 1e-12


@pytest.mark.parametrize("fill", [None, 3])
def test_padded_batch_with_slide_lists_equals_single_minisets(fill):
    slide = cloud(400, seed=8)
    folded = torch.stack([slide[:, 0], 5 * slide[:, 1].sign()], 1) + 0.1 * slide  # another geometry than the miniset's
    lists, sizes = slide_neighbours(folded, 30), (60, 90)
    index = torch.stack([torch.randperm(400, generator=seeded(s))[:90] for s in range(2)])
    mask = torch.arange(90) < torch.tensor(sizes)[:, None]
    both = build_targets(slide[index], mask, rng=seeded(1), slide_knn=miniset_rows(lists, index, mask), fill=fill)
    rng, own = seeded(1), build_targets(slide[index], mask, rng=seeded(1))
    assert not torch.equal(both.knn_edges[both.knn_mask], own.knn_edges[own.knn_mask])
    for b, n in enumerate(sizes):
        alone = index[b : b + 1, :n]
        one = build_targets(slide[alone], rng=rng, slide_knn=miniset_rows(lists, alone), fill=fill)
        assert torch.equal(both.knn_edges[b, :n][both.knn_mask[b, :n]], one.knn_edges[one.knn_mask])
        assert torch.equal(both.multiscale_edges[b][both.edge_mask[b]], one.multiscale_edges[0])
        assert torch.allclose(both.sigma_local[b, :n], one.sigma_local[0], atol=1e-12)
        assert torch.allclose(both.rw_transitions[3][b, :n, :n], one.rw_transitions[3][0], atol=1e-12)


@pytest.mark.parametrize("extra, message", [
    ({"slide_knn": torch.zeros(1, 8, 2, dtype=torch.long)}, "shape .1, 8, 2."),
    ({"slide_knn": torch.full((1, 9, 2), 9)}, "largest row 9"),
    ({"slide_knn": torch.zeros(1, 9, 2, dtype=torch.long), "fill": 0}, "at least one neighbour"),
    ({"fill": 3}, "give slide_knn"),
])
def test_bad_slide_lists_are_refused(extra, message):
    with pytest.raises(InputError, match=message) as error:
        build_targets(cloud(9), **extra)
    assert "\n" not in str(error.value)


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
