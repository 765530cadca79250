"""Target families: closed forms, checks against libraries, invariances, gradients, batches."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.targets.builder import build_targets
from gears_nb.targets.energy import energy, stress, walk_divergence
from gears_nb.targets.families import (
    FAMILIES,
    RADII,
    SHORTEST_LIFE,
    convex_window,
    distance_quantiles,
    edge_weights,
    in_batch,
    ripley_k,
    ripley_l,
    triplet_loss,
    window_area,
    window_overlap,
)

EXACT = [name for name, family in FAMILIES.items() if family.exact]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, 2, generator=seeded(seed), dtype=torch.float64)


def rotation(angle: float, flip: bool) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, s], [s, -c] if flip else [-s, c]], dtype=torch.float64)


def test_the_catalogue():
    assert list(FAMILIES) == ["f1", "f2", "f3", "f4", "f5", "f6", "f7", "gram", "f1+f2", "f2+f1reg", "f2+f4"]
    assert all(name == family.name and family.invariances == ("rotation", "reflection", "translation", "scale") for name, family in FAMILIES.items())


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), angle=st.floats(0, 6.3), scale=st.floats(0.5, 2.0), flip=st.booleans())
def test_neither_targets_nor_layouts_have_a_gauge(name, seed, angle, scale, flip):
    X, family = cloud(1, 40, seed=seed), FAMILIES[name]
    moved = lambda A: scale * A @ rotation(angle, flip) + 7
    t, u = family.build(X, k=8), family.build(moved(X), k=8)
    wrong = X + 0.1 * cloud(1, 40, seed=seed + 1)
    loss = family.loss(wrong, t)
    assert torch.allclose(family.loss(moved(wrong), t), loss, rtol=1e-7, atol=1e-12)
    assert torch.allclose(family.loss(wrong, u), loss, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_at_the_truth_where_promised_and_worse_elsewhere(name):
    X, family = cloud(3, 60), FAMILIES[name]
    t = family.build(X)
    jittered = X + 0.1 * torch.randn(X.shape, generator=seeded(2))
    truth, near, far = family.loss(X, t), family.loss(jittered, t), family.loss(cloud(3, 60, seed=9), t)
    assert (truth < (1e-12 if name in EXACT else near)).all() and (truth < near).all()
    assert (near < far).all() or name == "f6"  # which forgets who is who: another cloud in the same square is as good


def test_which_families_are_exact():
    assert set(FAMILIES) - set(EXACT) == {"f1", "f5", "f1+f2", "f2+f1reg"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_for_any_layout(name, dtype):
    family, X = FAMILIES[name], cloud(3, 50).to(dtype)
    t = family.build(X)
    noise = torch.randn(X.shape, generator=seeded(3)).to(dtype)
    in_a_row = torch.stack([X[0, :, 0], 0 * X[0, :, 0]], -1)
    twins = noise[1].clone()
    twins[1::2] = twins[::2]
    start = torch.stack([noise[0], in_a_row, twins]).requires_grad_()
    loss = family.loss(start, t)
    loss.sum().backward()
    assert loss.dtype == dtype and torch.isfinite(loss).all() and torch.isfinite(start.grad).all() and (start.grad.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("f1+f2", "f2+f1reg")])  # two builders draw in turn; their parts are here
def test_a_batch_equals_its_minisets(name):
    family, X, wrong = FAMILIES[name], cloud(3, 50), cloud(3, 50, seed=4)
    both, rng = family.loss(wrong, family.build(X, rng=seeded(1))), seeded(1)
    one = torch.cat([family.loss(wrong[b : b + 1], family.build(X[b], rng=rng)) for b in range(3)])
    assert torch.allclose(both, one, rtol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seed_decides(name):
    family, X, wrong = FAMILIES[name], cloud(1, 80), cloud(1, 80, seed=4)
    a, b, c = (family.loss(wrong, family.build(X, rng=seeded(s))) for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert torch.equal(a, c) == (name in ("f2", "f5", "f6", "f7", "gram"))


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_minisets(name):
    family, X = FAMILIES[name], cloud(1, 5)
    assert torch.isfinite(family.loss(cloud(1, 5, seed=1), family.build(X))).all()


@pytest.mark.parametrize("bad", [torch.zeros(5), torch.zeros(2, 3, 4, 2), torch.full((6, 2), torch.nan), torch.zeros(6, 2, dtype=torch.long), torch.zeros(2, 2)])
def test_bad_coordinates_are_told(bad):
    with pytest.raises(InputError, match="families: coords"):
        in_batch(bad)


def test_combinations_are_their_parts():
    X, wrong = cloud(2, 60), cloud(2, 60, seed=1)
    geo, gauged = build_targets(X), gauge_fix(wrong)
    t = FAMILIES["f1+f2"].build(X)
    fuzzy, walk = FAMILIES["f1"].loss(wrong, t.fuzzy), walk_divergence(gauged, geo)
    assert torch.allclose(FAMILIES["f2"].loss(wrong, geo), walk) and torch.allclose(FAMILIES["f4"].loss(wrong, geo), stress(gauged, geo))
    assert torch.allclose(FAMILIES["f1+f2"].loss(wrong, t), fuzzy + 0.3 * walk)
    assert torch.allclose(FAMILIES["f2+f1reg"].loss(wrong, t), walk + 0.05 * fuzzy)
    assert torch.allclose(FAMILIES["f2+f4"].loss(wrong, geo), energy(wrong, geo).total)


# F1, F3, F5 with plain loops


def test_fuzzy_loss_by_hand():
    X, wrong = cloud(12), cloud(12, seed=1)
    t = FAMILIES["f1"].build(X, k=4)
    Y, Z = gauge_fix(X).tolist(), gauge_fix(wrong).tolist()
    near = [sorted((j for j in range(12) if j != i), key=lambda j: math.dist(Y[i], Y[j]))[:4] for i in range(12)]
    sigma = [math.dist(Y[i], Y[near[i][-1]]) for i in range(12)]
    mu = lambda P, i, j: math.exp(-math.dist(P[i], P[j]) ** 2 / (sigma[i] * sigma[j]))
    assert t.neighbours[0].tolist() == near
    pos = [-mu(Y, i, j) * math.log(mu(Z, i, j)) - (1 - mu(Y, i, j)) * math.log(1 - mu(Z, i, j)) for i in range(12) for j in near[i]]
    neg = [-math.log(1 - mu(Z, i, j)) for i in range(12) for j in t.negatives[0, i].tolist()]
    assert FAMILIES["f1"].loss(wrong[None], t).item() == pytest.approx(np.mean(pos) + 0.5 * np.mean(neg), rel=1e-6)


def test_negatives_are_half_ring_half_anywhere():
    X = cloud(1, 150)
    t = FAMILIES["f1"].build(X)
    rank = torch.cdist(X[0], X[0]).argsort(1).argsort(1).gather(1, t.negatives[0])
    k, ring = t.neighbours.shape[-1], t.negatives.shape[-1] - t.negatives.shape[-1] // 2
    assert t.negatives.shape == t.neighbours.shape and rank.min() > k
    assert rank[:, :ring].max() <= 3 * k and rank[:, ring:].max() > 5 * k
    assert abs(float(rank[:, ring:].double().mean()) - (150 + k) / 2) < 5


def test_triplets_only_know_the_order():
    t = FAMILIES["f3"].build(cloud(1, 90), k=20)
    rank = torch.cdist(cloud(1, 90)[0], cloud(1, 90)[0]).argsort(1).argsort(1)
    near, far = rank.gather(1, t.near[0]), rank.gather(1, t.far[0])
    assert near.min() >= 1 and near.max() <= 10 and far.min() >= 21 and far.max() <= 60
    X = gauge_fix(cloud(1, 90, seed=1))[0]
    gaps = [max(0.0, 0.1 + float((X[i] - X[j]).square().sum() - (X[i] - X[m]).square().sum()))
            for i in range(90) for j, m in zip(t.near[0, i].tolist(), t.far[0, i].tolist())]
    assert triplet_loss(X[None], t, margin=0.1).item() == pytest.approx(np.mean(gaps), rel=1e-9)


def test_linear_weights_solve_the_large_system():
    X = gauge_fix(cloud(30))
    t = FAMILIES["f5"].build(X, k=7)
    for i in range(30):
        Z = (X[i] - X[t.neighbours[0, i]]).numpy()
        w = np.linalg.solve(Z @ Z.T + 1e-3 * np.trace(Z @ Z.T) * np.eye(7), np.ones(7))
        assert np.allclose(t.weights[0, i], w / w.sum(), rtol=1e-8)
    inner = X.norm(dim=-1) < 0.7
    mixed = (t.weights[0, ..., None] * X[t.neighbours[0]]).sum(1)
    assert ((mixed - X).norm(dim=-1)[inner] < 0.02).all()


def test_linear_loss_is_the_relative_residual():
    X, t = gauge_fix(cloud(1, 40, seed=1)), FAMILIES["f5"].build(cloud(1, 40))
    residual = X[0] - (t.weights[0, ..., None] * X[0][t.neighbours[0]]).sum(1)
    assert FAMILIES["f5"].loss(X, t).item() == pytest.approx(float(residual.square().sum() / X.square().sum()), rel=1e-9)


# F6 against libraries


def clipped_area(corners: list, shift: tuple) -> float:
    "Area of a convex counter-clockwise polygon cut by a moved copy of itself (Sutherland and Hodgman)."
    cut = [tuple(c) for c in corners]
    moved = [(x + shift[0], y + shift[1]) for x, y in corners]
    for (ax, ay), (bx, by) in zip(moved, moved[1:] + moved[:1]):
        side = lambda p, ax=ax, ay=ay, bx=bx, by=by: (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax)
        kept = []
        for p, q in zip(cut, cut[1:] + cut[:1]):
            if side(p) >= 0:
                kept.append(p)
            if (side(p) >= 0) != (side(q) >= 0):
                s = side(p) / (side(p) - side(q))
                kept.append((p[0] + s * (q[0] - p[0]), p[1] + s * (q[1] - p[1])))
        cut = kept
    return abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(cut, cut[1:] + cut[:1]))) / 2 if cut else 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(3, 40))
def test_window_overlap_equals_clipping(seed, n):
    corners = convex_window(cloud(n, seed=seed))
    moves = torch.cat([2 * cloud(20, seed=seed + 1) - 1, corners.roll(1, 0) - corners])
    wanted = [clipped_area(corners.tolist(), tuple(m)) for m in moves.tolist()]
    assert torch.allclose(window_overlap(corners, moves), torch.tensor(wanted, dtype=torch.float64), atol=1e-10)
    assert window_overlap(corners, torch.zeros(1, 2).double()).item() == pytest.approx(float(window_area(corners)))


@pytest.mark.parametrize("seed", range(3))
def test_ripley_equals_astropy(seed):
    from astropy.stats import RipleysKEstimator

    X = cloud(120, seed=seed) * torch.tensor([3.0, 2.0], dtype=torch.float64)
    window = torch.tensor([[0.0, 0], [3, 0], [3, 2], [0, 2]], dtype=torch.float64)
    radii = torch.linspace(0.05, 0.8, 12, dtype=torch.float64)
    theirs = RipleysKEstimator(area=6.0, x_min=0.0, x_max=3.0, y_min=0.0, y_max=2.0)
    area = torch.tensor([6.0], dtype=torch.float64)
    bare = 1 - torch.eye(120, dtype=torch.float64)[None]
    assert np.allclose(ripley_k(X[None], bare, area, radii, soft=0)[0], theirs.evaluate(X.numpy(), radii.numpy(), mode="none"), rtol=1e-12)
    weights = edge_weights(X, window, reach=10.0)[None]
    corrected = theirs.evaluate(X.numpy(), radii.numpy(), mode="translation")
    assert np.allclose(ripley_k(X[None], weights, area, radii, soft=0)[0], corrected, rtol=1e-10)
    assert np.allclose(ripley_k(X[None], weights, area, radii, soft=1e-7)[0], corrected, rtol=1e-3)


def test_soft_ripley_of_randomness_is_the_radius():
    found = torch.stack([FAMILIES["f6"].build(cloud(250, seed=s)).ripley[0] - RADII for s in range(8)])
    assert (found.mean(0).abs() < 3 * found.std(0) / 8**0.5 + 0.01).all()
    bare = 1 - torch.eye(250, dtype=torch.float64)[None]
    X = gauge_fix(cloud(1, 250))
    assert (ripley_l(ripley_k(X, bare, window_area(convex_window(X[0]))[None]))[0, -1] - RADII[-1]) < -0.05


def test_quantiles_are_sorted_distances():
    X = cloud(2, 12)
    q = distance_quantiles(X, levels=66)
    i, j = torch.triu_indices(12, 12, 1)
    assert torch.allclose(q, (X[:, i] - X[:, j]).norm(dim=-1).sort(-1).values, atol=1e-6)
    assert distance_quantiles(X, levels=5).shape == (2, 5)


def test_spots_in_a_row_have_no_window():
    with pytest.raises(InputError, match="on a line"):
        FAMILIES["f6"].build(torch.stack([torch.arange(9.0), torch.zeros(9)], -1))


# F7


def test_merges_are_the_spanning_tree():
    from scipy.sparse.csgraph import minimum_spanning_tree
    from scipy.spatial.distance import pdist, squareform

    X = gauge_fix(cloud(80))
    tree = np.sort(minimum_spanning_tree(squareform(pdist(X))).data) / 2
    assert np.allclose(np.sort(FAMILIES["f7"].build(X).merge_radii[0]), tree, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_radii_equal_the_library_s_filtration(seed):
    import gudhi

    X = gauge_fix(cloud(90, seed=seed))
    tree = gudhi.AlphaComplex(points=X.numpy()).create_simplex_tree()
    tree.compute_persistence()
    diagram = np.sqrt(tree.persistence_intervals_in_dimension(1))
    diagram = diagram[diagram[:, 1] - diagram[:, 0] > SHORTEST_LIFE]
    t = FAMILIES["f7"].build(X)
    ours = torch.stack([t.births[0], t.deaths[0]], -1).numpy()
    assert len(ours) == len(diagram) > 10
    assert gudhi.bottleneck_distance(ours, diagram) < 1e-7
    assert float(t.weights.sum()) == pytest.approx(1)


def test_a_lattice_has_one_kind_of_hole():
    X = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)).double()
    t, unit = FAMILIES["f7"].build(X), float(gauge_fix(X).diff(dim=0)[0].norm())
    assert t.births.shape == (1, 25) and torch.allclose(t.births, torch.full_like(t.births, unit / 2))
    assert torch.allclose(t.deaths, torch.full_like(t.deaths, unit / 2**0.5))


def test_gram_is_relative_and_blind_to_the_unit():
    X = gauge_fix(cloud(1, 30))
    t, Z = FAMILIES["gram"].build(5 * X), gauge_fix(cloud(1, 30, seed=2))
    G, F = X[0] @ X[0].T, Z[0] @ Z[0].T
    assert torch.allclose(t.G[0], G) and FAMILIES["gram"].loss(3 * Z, t).item() == pytest.approx(float(((F - G) ** 2).sum() / (G**2).sum()))
