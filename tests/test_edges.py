"""Edges of generators: order, ties and padding; walks and what their support keeps; triangles, overlap, repulsion."""
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.config import at_profile
from gears_nb.generators.edges import (EdgeMLP, candidate_edges, content_order, dense, edge_walk, embedding_distances, geometry_terms, landmarks, overlap_loss, paired_batches,
                                       reach_in, repulsion, rows_at, triangle_excess, walk_mismatch, walk_of, with_landmarks)
from gears_nb.geometry.neighbours import neighbour_sets
from gears_nb.models.batches import Run
from gears_nb.models.conformance import toy_slides
from gears_nb.models.settings import StructureConfig
from gears_nb.targets.builder import build_targets, directed_edges
from gears_nb.targets.settings import TargetConfig


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def ragged(seed, more=0, round_to=None):
    "Embeddings of minisets of 14 and 9 cells, padded with garbage."
    H = torch.randn(2, 14 + more, 3, generator=rng(seed))
    H = H.round() if round_to else H
    mask = torch.arange(14 + more) < torch.tensor([[14], [9]])
    return torch.where(mask[..., None], H, 0.01 * H), mask


@given(st.integers(0, 99), st.integers(1, 20), st.booleans())
def test_the_graph_knows_no_order_no_padding_and_is_symmetric(seed, k, ties):
    H, mask = ragged(seed, 6, ties)
    near = directed_edges(*candidate_edges(H, mask, k))
    order = torch.randperm(20, generator=rng(seed + 1))
    again = directed_edges(*candidate_edges(H[:, order], mask[:, order], k))
    assert torch.equal(near[:, order][:, :, order], again) and torch.equal(near, near.transpose(1, 2))
    assert not near[~mask].any() and not near.diagonal(dim1=1, dim2=2).any() and (near.sum(-1)[mask] >= torch.tensor(min(k, 8))).all()
    short = directed_edges(*candidate_edges(H[:1, :14], mask[:1, :14], k))
    assert torch.equal(near[:1, :14, :14], short)
    if not ties:
        one = neighbour_sets(H[:1, :14], k)
        assert torch.equal(short, one | one.transpose(1, 2))


@given(st.integers(0, 99), st.integers(1, 9), st.booleans())
def test_landmarks_are_contents_not_numbers(seed, count, ties):
    H, mask = ragged(seed, 4, ties)
    marks, ok = landmarks(H, mask, count)
    order = torch.randperm(18, generator=rng(seed))
    moved, moved_ok = landmarks(H[:, order], mask[:, order], count)
    assert torch.equal(ok, moved_ok) and torch.equal(rows_at(H, marks)[ok], rows_at(H[:, order], moved)[ok])
    assert mask.gather(1, marks)[ok].all() and ok.any(1).all()
    for h, m, o in zip(H, marks, ok):
        assert len(h[m[o]].unique(dim=0)) == int(o.sum())


def test_lists_put_valid_entries_first_and_name_nobody_twice():
    H, mask = ragged(3, 4)
    index, ok = with_landmarks(*candidate_edges(H, mask, 3), *landmarks(H, mask, 4), mask)
    assert (ok.int().diff(dim=-1) <= 0).all()
    assert all(len(set(i[o].tolist())) == int(o.sum()) for i, o in zip(index.flatten(0, 1), ok.flatten(0, 1)))
    near, marks = directed_edges(index, ok), landmarks(H, mask, 4)[0]
    for b in range(2):
        for m in marks[b].tolist():
            assert (near[b, :, m] | (torch.arange(18) == m))[mask[b]].all()
    d = embedding_distances(H, mask)
    first, first_ok = candidate_edges(H, mask, 3)
    near = d.gather(2, first).masked_fill(~first_ok, torch.inf)
    assert (near[..., 1:] >= near[..., :-1]).all()


def test_content_order_is_lexicographic():
    H = torch.tensor([[[1.0, 2], [0, 5], [1, 1], [0, 0]]])
    assert content_order(H, torch.tensor([[True, True, True, False]])).tolist() == [[1, 2, 0, 3]]


@given(st.integers(0, 50))
def test_walks_are_rows_that_sum_to_one_and_logits_of_a_walk_give_it_back(seed):
    H, mask = ragged(seed, 3)
    index, ok = candidate_edges(H, mask, 4)
    logits = 3 * torch.randn(ok.shape, generator=rng(seed))
    T = edge_walk(logits, index, ok)
    assert torch.allclose(T.sum(-1), torch.ones(2, 17)) and torch.equal(T > 0, directed_edges(index, ok) | torch.diag_embed(~mask))
    W = dense(logits.exp(), index, ok)
    assert torch.allclose(walk_of(W), T, atol=1e-6) and torch.allclose(walk_of(7 * W), T, atol=1e-6)
    S = (W + W.transpose(1, 2)) / 2
    pi = S.sum(-1) / S.sum((1, 2))[:, None]
    flow = (pi[..., None] * walk_of(S))[0, :14, :14]
    assert torch.allclose(flow, flow.T, atol=1e-6)  # a walk on symmetric weights is reversible


def test_the_mismatch_is_zero_for_the_reference_on_its_own_support_and_mass_is_counted():
    targets = build_targets(torch.rand(2, 30, 2, generator=rng()), torch.arange(30) < torch.tensor([[30], [22]]), k=6)
    T = targets.rw_transitions[1]
    loss, kept = walk_mismatch(T, T > 0, targets)
    assert loss.abs().max() < 1e-5 and torch.allclose(kept, torch.ones(2), atol=1e-5)
    cut = (T > 0) & (torch.rand(2, 30, 30, generator=rng(1)) < 0.6)
    W = (T * cut).requires_grad_()
    loss, less = walk_mismatch(walk_of(W), cut, targets)
    loss.sum().backward()
    assert (loss >= -1e-6).all() and (0 < less).all() and (less < 1).all() and torch.isfinite(W.grad).all()


def test_reach_counts_exact_steps():
    chain = torch.tensor([[[0, 1, 0], [1, 0, 1], [0, 1, 0]]]).bool()
    assert reach_in(chain, 2)[1][0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]


@given(st.integers(0, 50), st.integers(0, 6))
def test_true_distances_break_no_triangle_and_padding_draws_nothing(seed, more):
    H, mask = ragged(seed)
    wide, wide_mask = torch.cat([H, 99 * torch.ones(2, more, 3)], 1), torch.cat([mask, torch.zeros(2, more, dtype=torch.bool)], 1)
    excess = []
    for h, m in ((H, mask), (wide, wide_mask)):
        index, ok = candidate_edges(h, m, 5)
        D = torch.cdist(h, h, compute_mode="donot_use_mm_for_euclid_dist")
        told, counts = triangle_excess(D, index, ok, rng(seed), 200)
        assert told.max() < 1e-5 and counts.any(1).all()
        excess.append(triangle_excess(D.square(), index, ok, rng(seed), 200))
    assert torch.equal(excess[0][1], excess[1][1]) and torch.allclose(excess[0][0], excess[1][0])


def test_no_triangle_no_complaint():
    alone = torch.zeros(1, 4, 1, dtype=torch.long)
    told, counts = triangle_excess(torch.ones(1, 4, 4), alone, torch.zeros(1, 4, 1, dtype=torch.bool), rng(), 10)
    assert told.max() == 0 and not counts.any()


@given(st.integers(0, 50), st.floats(0.1, 20))
def test_overlap_is_blind_to_similarities_and_energy_to_the_gauge(seed, scale):
    x = torch.randn(2, 12, 2, generator=rng(seed)).double()
    Q = torch.linalg.qr(torch.randn(2, 2, generator=rng(seed + 1)).double())[0]
    assert overlap_loss(x, scale * x @ Q + 5).max() < 1e-9 < overlap_loss(x, x.roll(1, 1)).min()
    targets = build_targets(x.float(), k=5)
    assert geometry_terms(scale * x @ Q + 5, targets)["energy"] < 1e-5


def test_repulsion_does_not_see_padding_and_pushes_apart():
    X = torch.randn(1, 8, 2, generator=rng()).double().requires_grad_()
    wide = torch.cat([X, torch.zeros(1, 3, 2).double()], 1)
    assert torch.allclose(repulsion(wide, torch.arange(11)[None] < 8), repulsion(X, torch.ones(1, 8, dtype=torch.bool)))
    with torch.no_grad():
        X[0, 1] = X[0, 0] + 0.01
    grad, = torch.autograd.grad(repulsion(X, torch.ones(1, 8, dtype=torch.bool)).sum(), X)
    assert torch.isfinite(grad).all() and ((X[0, 1] - X[0, 0]) * (grad[0, 1] - grad[0, 0])).sum() < 0


def test_pairs_share_their_first_rows_and_edge_heads_are_local():
    run = Run(at_profile(StructureConfig, "smoke", miniset=40, batch=4, progress=False), TargetConfig())
    H, pairs = next(iter(paired_batches(toy_slides(), run, rng())))
    one, two = pairs.views(H)
    assert H.shape[:2] == (4, 40) == pairs.mask.shape and torch.equal(one, two) and one.shape[1] == pairs.shared
    assert pairs.to("cpu").shared == pairs.shared
    head = EdgeMLP(3, out=2, width=8)
    H, mask = ragged(0)
    index, ok = candidate_edges(H, mask, 3)
    out, far = head(H, index), H.clone()
    far[0, 5] += 9
    moved = (head(far, index) - out).abs().sum(-1)[0] > 1e-6
    assert torch.equal(moved, (index[0] == 5) | (torch.arange(14) == 5)[:, None])
