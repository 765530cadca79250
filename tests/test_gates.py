"""Candidate graphs, gates and distillation: supports, symmetries, directions, closed forms."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.structure.distil import distil_distances, distil_walk
from gears_nb.structure.gate import (
    EdgeGateSoft,
    GateLogits,
    candidate_mask,
    candidate_pairs,
    gate_kl,
    gate_targets,
    off_diagonal,
    oracle_edges,
    place_logits,
    random_support,
)
from gears_nb.structure.gateformer import (
    ContextualGate,
    HeadGate,
    gate_metrics,
    rank_loss,
    top_hits,
    trust_kl,
)
from gears_nb.structure.graphs import (
    GRAPHS,
    Projection,
    candidate_precision,
    candidate_recall,
    fit_projection,
    graph,
    graph_report,
    mutual,
    oracle_intersection,
    principal,
    projection_loss,
)
from gears_nb.structure.ipa import drop_edges
from gears_nb.targets.builder import build_targets

GATES = {"edge": lambda d: EdgeGateSoft(dim_in=d, dim=8, hidden=8), "head": lambda d: HeadGate(d, heads=3, dim=8, hidden=8),
         "context": lambda d: ContextualGate(d, dim=16, heads=2, edge=8)}
seeds = st.integers(0, 999)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(B: int = 2, n: int = 40, d: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, n, d, generator=seeded(seed))


def tissue(B: int = 2, n: int = 60, k: int = 8, seed: int = 0):
    "Embeddings that know their position up to noise, and the targets."
    law, rng = seeded(7), seeded(50 + seed)
    waves = 2 * torch.randn(2, 12, generator=law)
    pos = torch.rand(B, n, 2, generator=rng)
    return torch.sin(pos @ waves) + 0.2 * torch.randn(B, n, 12, generator=rng), build_targets(pos, k=k)


def awake(name: str, d: int = 16, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return GATES[name](d).double().eval()


def permuted(M: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return M[..., order, :][..., order]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    "Largest difference of two sets of logits, which must be -inf at the same places."
    assert torch.equal(torch.isinf(a), torch.isinf(b))
    return (a - b)[~torch.isinf(a)].abs().max().item()


# ---------------------------------------------------------------- candidate graphs


@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=12, deadline=None)
@given(seed=seeds, k=st.integers(1, 60), real=st.integers(8, 40))
def test_graphs_keep_their_promises(name, seed, k, real):
    H, mask = embeddings(seed=seed), torch.arange(40).expand(2, -1) < real
    M = graph(name)(H, k, mask)
    assert M.dtype == torch.bool and torch.equal(M, M.transpose(1, 2)) and M.diagonal(dim1=1, dim2=2).all()
    assert torch.equal(off_diagonal(M).any(-1), mask)  # every real row has an edge, no padded one
    assert torch.equal(M, graph(name)(H, k, mask))
    order = torch.randperm(40, generator=seeded(seed))
    assert torch.equal(graph(name)(H[:, order], k, mask[:, order]), permuted(M, order))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_see_no_padding_and_no_other_miniset(name):
    H = embeddings()
    alone = graph(name)(H, 6, None)
    wide = torch.cat([H, torch.full((2, 9, 16), torch.nan)], 1)
    M = graph(name)(wide, 6, torch.arange(49).expand(2, -1) < 40)
    assert torch.equal(M[:, :40, :40], alone)
    assert torch.equal(graph(name)(H[1:], 6, None), alone[1:])
    mask = torch.arange(40).expand(2, -1) < torch.tensor([[12], [40]])
    assert torch.equal(graph(name)(H, 6, mask)[1:], alone[1:])


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_ignore_autocast(name):
    H = embeddings(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(graph(name)(H, 6, None), graph(name)(H.clone(), 6, None))
        rough = graph(name)(H, 6, None)
    assert torch.equal(rough, graph(name)(H, 6, None))


@pytest.mark.parametrize("name", ["euclid", "pca32", "whitened", "mutual"])
def test_equal_cells_are_treated_alike(name):
    H = embeddings(1)
    H = torch.cat([H, H[:, :5]], 1)  # five exact twins
    M = graph(name)(H, 7, None)[0]
    for i in range(5):
        others = [j for j in range(45) if j not in (i, 40 + i)]
        assert torch.equal(M[i, others], M[40 + i, others])


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_invariances_of_the_metrics(seed):
    H = embeddings(1, seed=seed).double()
    Q = torch.linalg.qr(torch.randn(16, 16, generator=seeded(seed), dtype=torch.float64))[0]
    for name in ("euclid", "pca32", "whitened", "mutual"):  # rotation, shift, scale
        assert torch.equal(graph(name)(3 * H @ Q + 2, 6, None), graph(name)(H, 6, None)), name
    lengths = 0.5 + torch.rand(1, 40, 1, generator=seeded(seed))
    assert torch.equal(graph("cosine")(lengths * H, 6, None), graph("cosine")(H, 6, None))
    stretch = torch.diag(torch.linspace(0.5, 3, 16)).double()  # few enough components to whiten all: any linear map
    assert torch.equal(candidate_mask(principal(H @ stretch, whiten=True), 6), candidate_mask(principal(H, whiten=True), 6))


def test_principal_components_by_hand():
    H = embeddings(2, 50)
    Z = principal(H, dim=5, whiten=True)
    assert Z.shape == (2, 50, 5) and torch.allclose(Z.transpose(1, 2) @ Z / 50, torch.eye(5).expand(2, -1, -1), atol=1e-4)
    s = torch.linalg.svdvals(H - H.mean(1, keepdim=True))
    assert torch.allclose(principal(H, dim=5).square().sum((1, 2)), s[:, :5].square().sum(1), rtol=1e-4)
    flat = torch.cat([H[..., :3], torch.zeros(2, 50, 20)], -1)  # directions without variance stay out
    assert torch.allclose(principal(flat, whiten=True).square().sum(-1).mean(1), torch.full((2,), 3.0), atol=1e-4)


def test_mutual_is_a_subset_by_definition():
    H, k = embeddings(1, 30), 8
    d = torch.cdist(H.double(), H.double())[0].fill_diagonal_(math.inf)
    N = [set(d[i].argsort()[:k].tolist()) for i in range(30)]
    for jaccard in (0.0, 0.3):
        M = mutual(H, k, jaccard=jaccard)[0]
        want = torch.eye(30, dtype=torch.bool)
        for i, j in itertools.permutations(range(30), 2):
            a, b = N[i] | {i}, N[j] | {j}
            want[i, j] = j in N[i] and i in N[j] and len(a & b) / len(a | b) >= jaccard
        for i in range(30):
            if want[i].sum() == 1:
                j = int(d[i].argmin())
                want[i, j] = want[j, i] = True
        assert torch.equal(M, want)
    assert (mutual(H, k) <= candidate_mask(H, k)).all()


def test_unknown_graph():
    with pytest.raises(InputError, match="choose from"):
        graph("knn")


def test_grades_by_hand():
    targets = build_targets(torch.tensor([[[0.0, 0], [1, 0], [2.1, 0], [3.3, 0], [4.6, 0]]]), k=2)
    M = torch.eye(5, dtype=torch.bool)[None].clone()
    M[0, 0, 1] = M[0, 1, 0] = M[0, 0, 4] = M[0, 4, 0] = True
    # neighbours: 0: 1 2; 1: 0 2; 2: 1 3; 3: 2 4; 4: 3 2
    assert candidate_recall(M, targets, 2).item() == pytest.approx(2 / 10)
    assert candidate_recall(M, targets, 1).item() == pytest.approx(2 / 5)
    assert candidate_precision(M, targets).item() == pytest.approx(1 / 2)
    met = oracle_intersection(M, targets)
    assert off_diagonal(met).sum() == 2 and met[0, 0, 1] and met.diagonal(dim1=1, dim2=2).all()
    assert graph_report(M, targets, 2)["degree"] == pytest.approx(4 / 5)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_recall_grows_with_candidates_and_ignores_padding(seed):
    H, targets = tissue(seed=seed)
    grades = [candidate_recall(candidate_mask(H, k), targets, 8) for k in (4, 12, 30, 59)]
    assert all((a <= b + 1e-6).all() for a, b in itertools.pairwise(grades)) and torch.equal(grades[-1], torch.ones(2))
    pos, mask = torch.rand(1, 50, 2, generator=seeded(seed)), torch.arange(50)[None] < 40
    short, long = build_targets(pos[:, :40], k=6), build_targets(pos, mask, k=6)
    M = random_support(candidate_mask(embeddings(1, 40, seed=seed), 9), seeded(seed))
    wide = torch.eye(50, dtype=torch.bool)[None].clone()
    wide[:, :40, :40] = M
    assert torch.allclose(candidate_recall(wide, long), candidate_recall(M, short))
    assert graph_report(wide, long) == pytest.approx(graph_report(M, short))


def test_projection_learns_what_neighbours_are():
    train, (H, targets) = [tissue(seed=s) for s in range(6)], tissue(seed=99)
    noise = lambda H, s: torch.cat([0.5 * H, 2 * torch.randn(*H.shape[:2], 6, generator=seeded(s))], -1)
    train, H = [(noise(h, s), t) for s, (h, t) in enumerate(train)], noise(H, 99)
    torch.manual_seed(0)
    model = Projection(18, 8)
    before = projection_loss(model, (H, targets))["loss"].item()
    curve = fit_projection(model, train, 60, lr=1e-2)
    assert len(curve) == 60 and projection_loss(model, (H, targets))["loss"].item() < 0.8 * before
    gain = candidate_recall(model.candidates(H, 10), targets, 8).mean() / candidate_recall(candidate_mask(H, 10), targets, 8).mean()
    assert gain > 1.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.candidates(H, 10), model.candidates(H.clone(), 10))


def test_projection_loss_sees_no_padding():
    pos, H, mask = torch.rand(1, 50, 2, generator=seeded()), embeddings(1, 50), torch.arange(50)[None] < 40
    torch.manual_seed(0)
    model = Projection(16, 4)
    short = projection_loss(model, (H[:, :40], build_targets(pos[:, :40], k=6)))["loss"]
    long = projection_loss(model, (H.masked_fill(~mask[..., None], torch.nan), build_targets(pos, mask, k=6)))["loss"]
    assert long.item() == pytest.approx(short.item(), rel=1e-5)


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("name", GATES)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_gates_are_equivariant_and_blind_to_padding(name, seed):
    net, H = awake(name, seed=seed), embeddings(n=30, seed=seed).double()
    M = candidate_mask(H, 6)
    g = net(H, M).logits
    order = torch.randperm(30, generator=seeded(seed))
    assert apart(net(H[:, order], permuted(M, order)).logits, permuted(g, order)) < 1e-10
    wide, mask = torch.cat([H, torch.full((2, 5, 16), 9.0)], 1).double(), torch.arange(35).expand(2, -1) < 30
    assert apart(net(wide, candidate_mask(wide, 6, mask)).logits[..., :30, :30], g) < 1e-10
    assert apart(net(H[1:], M[1:]).logits, g[1:]) < 1e-10  # nor to other minisets


@pytest.mark.parametrize("name", GATES)
def test_gates_live_on_their_support_and_are_bounded(name):
    net, H = awake(name), 100 * embeddings().double()
    M = candidate_mask(H, 6)
    for p in net.parameters():
        p.data *= 20
    gate = net(H, M)
    g = gate.logits if gate.logits.ndim == 4 else gate.logits[:, None]
    assert torch.equal(torch.isinf(g), ~M[:, None].expand_as(g)) and gate.on(M) is gate.logits
    assert (g.diagonal(dim1=-2, dim2=-1) == 0).all() and g[~torch.isinf(g)].abs().max() <= 5.0
    with pytest.raises(ValueError, match="another support"):
        gate.on(candidate_mask(H, 7))


@pytest.mark.parametrize("name", GATES)
def test_gates_survive_lonely_rows_and_empty_graphs(name):
    (H, targets), net = tissue(), awake(name, 12).float()
    M = candidate_mask(H, 5)
    M[0, 7, :] = M[0, :, 7] = False
    M[0, 7, 7] = True
    loss = gate_kl(net(H, M), targets) + rank_loss(net(H, M), targets)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in net.parameters())
    bare = torch.eye(60, dtype=torch.bool).expand(2, -1, -1)
    empty = net(H, bare)
    assert gate_kl(empty, targets) == 0 and rank_loss(empty, targets) == 0 and trust_kl(empty, empty) == 0
    assert all(math.isfinite(v) for v in gate_metrics(empty, targets, empty).values())


def test_edge_drop_leaves_the_contextual_gate_something_to_say():
    (H, targets), net = tissue(), awake("context", 12).float()
    thin = drop_edges(candidate_mask(H, 5), 0.95, seeded())
    assert off_diagonal(thin).any(-1).all() and torch.isfinite(gate_kl(net(H, thin), targets))


def test_context_reaches_two_steps_and_no_further():
    "A chain of candidates: the logit of an edge hears cells within two layers of attention."
    n, net = 12, awake("context")
    M = torch.eye(n, dtype=torch.bool)
    M = M | M.roll(1, 0).triu(-1).tril(1) | M.roll(-1, 0).triu(-1).tril(1)
    H = embeddings(1, n).double().requires_grad_()
    (heard,) = torch.autograd.grad(net(H, M[None]).logits[0, 0, 1], H)
    heard = heard[0].abs().amax(-1) > 0
    assert heard[:4].all() and not heard[4:].any()


def test_contextual_gate_equals_loops():
    "One layer, written edge by edge."
    torch.manual_seed(0)
    net, H = ContextualGate(8, dim=8, layers=1, heads=2, edge=4).double(), embeddings(1, 9, 8).double()
    M = candidate_mask(H, 3)
    x = net.norm(H)[0]
    h, c = net.project(x), net.context(x)
    first, second = net.nodes(h).chunk(2, -1)

    def feature(i, j):
        cos = torch.nn.functional.cosine_similarity(x[i], x[j], dim=0)[None]
        return net.norms[0](first[i] + second[j] + net.pairs(torch.cat([(h[i] - h[j]).abs(), h[i] * h[j], cos])))

    layer, (q, k, v) = net.layers[0], net.layers[0].qkv(c).chunk(3, -1)
    heads = lambda t: t.view(9, 2, 4)
    heard = []
    for i in range(9):
        js = M[0, i].nonzero()[:, 0].tolist()
        score = torch.stack([(heads(q)[i] * heads(k)[j]).sum(-1) / 2 + (layer.bias(feature(i, j)) if j != i else 0) for j in js])
        heard.append((score.softmax(0)[..., None] * heads(v)[js]).sum(0).flatten())
    c = layer.norm(c + torch.stack(heard))
    c = c + layer.mlp(c)
    near, far = net.score.ends(c).chunk(2, -1)
    for i, j in off_diagonal(M)[0].nonzero().tolist():
        u = net.score.out(torch.relu(net.score.edge(feature(i, j)) + near[i] + far[j]))
        assert net(H, M).logits[0, i, j].item() == pytest.approx(5 * math.tanh(u.item() / 5), abs=1e-10)


def test_contextual_gate_has_the_size_asked_for():
    assert 100_000 <= sum(p.numel() for p in ContextualGate(128).parameters()) <= 300_000


def test_pairs_are_placed_there_and_back():
    M = candidate_mask(embeddings(2, 15), 4)
    row, col = candidate_pairs(M)
    assert 2 * len(row) == off_diagonal(M).sum()
    ids = torch.arange(2.0 * len(row))[:, None] * torch.tensor([[1.0, -1.0]])
    g = place_logits(ids, row, col, M)
    assert g.shape == (2, 2, 15, 15)
    for e, (r, c) in enumerate(zip(row.tolist(), col.tolist())):
        b, i, j = r // 15, r % 15, c % 15
        assert i < j and g[b, 0, i, j] == e and g[b, 0, j, i] == e + len(row) and g[b, 1, i, j] == -e


def test_head_gate_with_equal_heads_is_the_edge_gate():
    (H, targets), edge, heads = tissue(), awake("edge", 12), awake("head", 12)
    H = H.double()
    heads.load_state_dict({**edge.state_dict(), "out.weight": edge.out.weight.expand(3, -1).clone()})
    M = candidate_mask(H, 9)
    one, many = edge(H, M), heads(H, M)
    assert apart(many.logits, one.logits[:, None].expand(-1, 3, -1, -1)) < 1e-12
    for loss in (gate_kl, rank_loss):
        assert loss(many, targets).item() == pytest.approx(loss(one, targets).item(), abs=1e-9)
    a, b = gate_metrics(many, targets, many), gate_metrics(one, targets, one)
    assert a == pytest.approx(b, abs=1e-4)


def test_each_head_gets_its_own_gate():
    H = embeddings().double()
    g = awake("head")(H, candidate_mask(H, 6)).logits
    assert not torch.equal(g[:, 0], g[:, 1])


# ---------------------------------------------------------------- losses of a gate


def test_gate_targets_are_means_of_renormalised_walks():
    H, targets = tissue()
    edges = off_diagonal(candidate_mask(H, 9))
    parts = [targets.rw_transitions[s] * edges for s in (1, 2)]
    alone = [p / p.sum(-1, keepdim=True) for p in parts]
    p, rows = gate_targets(targets, edges, (1, 2))
    both = (parts[0].sum(-1) > 0) & (parts[1].sum(-1) > 0)
    assert torch.allclose(p[both], ((alone[0] + alone[1]) / 2)[both], atol=1e-6)
    assert torch.allclose(p[rows].sum(-1), torch.ones(int(rows.sum())), atol=1e-5) and (p[~edges] == 0).all()
    only = rows & ~(parts[0].sum(-1) > 0)
    assert torch.allclose(p[only], alone[1][only], atol=1e-6)
    for steps in ((), (0,), (1, 17)):
        with pytest.raises(InputError, match="use steps"):
            gate_targets(targets, edges, steps)


def test_gate_loss_direction_and_diagonal():
    H, targets = tissue(1)
    M = torch.ones(1, 60, 60, dtype=torch.bool)
    torch.manual_seed(0)
    gate = EdgeGateSoft(dim_in=12)(H, M)
    p = targets.rw_transitions[1][0].double()
    q = gate.logits[0].detach().double().fill_diagonal_(-math.inf).softmax(-1)
    live = p > 0
    forward = (torch.where(live, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0)).sum(-1).mean()
    assert gate_kl(gate, targets).item() == pytest.approx(forward.item(), abs=1e-5)
    selfish = GateLogits(gate.logits + 6 * torch.eye(60), M)
    assert gate_kl(selfish, targets).item() == pytest.approx(gate_kl(gate, targets).item(), abs=1e-6)
    assert gate_kl(selfish, targets, diagonal=True) > gate_kl(gate, targets, diagonal=True) > gate_kl(gate, targets)


def test_rank_loss_equals_loops():
    H, targets = tissue(1, 25, 4)
    torch.manual_seed(0)
    gate = EdgeGateSoft(dim_in=12)(H, candidate_mask(H, 8))
    g, T, M = gate.logits[0].detach(), targets.rw_transitions[1][0], off_diagonal(gate.support)[0]
    rows = []
    for i in range(25):
        js = M[i].nonzero()[:, 0].tolist()
        right = sorted((j for j in js if T[i, j] > 0), key=lambda j: -T[i, j])[:3]
        wrong = [j for j in js if T[i, j] == 0]
        if right and wrong:
            rows.append(sum(max(0.0, 0.5 - g[i, a].item() + g[i, b].item()) for a in right for b in wrong) / (len(right) * len(wrong)))
    assert rank_loss(gate, targets, 0.5, positives=3).item() == pytest.approx(sum(rows) / len(rows), abs=1e-5)


def test_trust_has_one_direction_and_one_receiver():
    H, _ = tissue()
    M, now, before = candidate_mask(H, 6), awake("context", 12).float(), awake("context", 12, seed=1).float()
    loss = trust_kl(now(H, M), before(H, M))
    loss.backward()
    assert loss > 0 and all(p.grad is None for p in before.parameters()) and any(p.grad.abs().max() > 0 for p in now.parameters())
    sure = torch.zeros(1, 3, 3)
    sure[0, 0, 1] = 20.0
    M = torch.ones(1, 3, 3, dtype=torch.bool)
    flat, sure = GateLogits(torch.zeros(1, 3, 3), M), GateLogits(sure, M)
    assert trust_kl(sure, flat) > 3 > math.log(2) / 3 + 1e-3 > trust_kl(flat, sure)  # forgetting an option is what costs
    assert trust_kl(flat, flat) == 0


@settings(max_examples=25, deadline=None)
@given(seed=seeds, k=st.integers(1, 12), levels=st.integers(1, 4))
def test_top_hits_is_the_mean_over_tie_orders(seed, k, levels):
    rng = seeded(seed)
    score = torch.randint(levels, (1, 1, 10), generator=rng).float()
    edges, truth = (torch.rand(1, 1, 10, generator=rng) < 0.8 for _ in range(2))
    hits, taken = top_hits(score, edges, truth & edges, k)
    draws = []
    for _ in range(400):
        order = torch.argsort(torch.where(edges, score, -9.0)[0, 0] + 0.5 * torch.rand(10, generator=rng), descending=True)[:k]
        draws.append((truth & edges)[0, 0, order].sum().item())
    assert taken.item() == min(k, int(edges.sum())) and hits.item() == pytest.approx(sum(draws) / 400, abs=0.35)


@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_metrics_ignore_order_and_padding_and_tell_good_from_bad(seed):
    H, targets = tissue(1, seed=seed)
    M = candidate_mask(H, 20)
    T = targets.rw_transitions[1]
    good = GateLogits((T + 1e-4).log().masked_fill(~M, -math.inf).masked_fill(torch.eye(60, dtype=torch.bool), 0.0), M)
    bad = GateLogits(-good.logits.masked_fill(~M, 0.0).masked_fill(~M, math.inf), M)
    a, b = gate_metrics(good, targets, k=8), gate_metrics(bad, targets, k=8)
    assert a["kl"] < b["kl"] and a["correlation"] > 0.9 > 0 > b["correlation"] and a["precision30"] > b["precision30"] and a["recall30"] > b["recall30"]
    assert a["recall20"] == b["recall20"] and "drift" not in a and gate_metrics(good, targets, bad)["drift"] > 0
    pos, order = torch.rand(1, 40, 2, generator=seeded(seed)), torch.randperm(40, generator=seeded(seed))
    H, mask = embeddings(1, 40, seed=seed).double(), torch.arange(47)[None] < 40
    net = awake("edge", seed=seed)
    plain = gate_metrics(net(H, candidate_mask(H, 15)), build_targets(pos.double(), k=6))
    mixed = gate_metrics(net(H[:, order], candidate_mask(H[:, order], 15)), build_targets(pos[:, order].double(), k=6))
    wide, far = torch.cat([H, torch.zeros(1, 7, 16)], 1).double(), torch.cat([pos, torch.zeros(1, 7, 2)], 1).double()
    padded = gate_metrics(net(wide, candidate_mask(wide, 15, mask)), build_targets(far, mask, k=6))
    assert mixed == pytest.approx(plain, abs=1e-5) and padded == pytest.approx(plain, abs=1e-5)


def test_context_learns_and_repeats():
    def curve():
        torch.manual_seed(0)
        net = ContextualGate(12, dim=32, edge=8)
        optimiser, out = torch.optim.AdamW(net.parameters(), lr=3e-3), []
        for step in range(30):
            H, targets = tissue(seed=step % 3)
            gate = net(H, candidate_mask(H, 20))
            loss = gate_kl(gate, targets) + 0.02 * rank_loss(gate, targets)
            optimiser.zero_grad(), loss.backward(), optimiser.step()
            out.append(loss.item())
        return out
    first = curve()
    assert first[-1] < 0.6 * first[0] and first == curve()


def test_half_precision_stays_finite():
    (H, targets), net = tissue(), awake("context", 12).float()
    M = candidate_mask(H, 9)
    exact = gate_kl(net(H, M), targets).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gate_kl(net(H, M), targets)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.1) and all(torch.isfinite(p.grad).all() for p in net.parameters())


# ---------------------------------------------------------------- distillation

LOSSES = {"walk": distil_walk, "metric": distil_distances, "log": lambda *a: distil_distances(*a, form="log")}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, angle=st.floats(0, 6.3), mirror=st.booleans(), scale=st.floats(0.01, 100))
def test_distillation_is_gauge_free(name, seed, angle, mirror, scale):
    rng, loss = seeded(seed), LOSSES[name]
    x, y = (torch.randn(2, 30, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    c, s = math.cos(angle), math.sin(angle)
    Q = torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ torch.diag(torch.tensor([1.0, -1.0 if mirror else 1.0], dtype=torch.float64))
    move = lambda z: scale * z @ Q + 3
    assert loss(move(x), x).item() == pytest.approx(0, abs=1e-9)
    value = loss(x, y).item()
    assert value > 0 and loss(move(x), y).item() == pytest.approx(value, rel=1e-6) and loss(x, move(y)).item() == pytest.approx(value, rel=1e-6)
    order = torch.randperm(30, generator=rng)
    assert loss(x[:, order], y[:, order]).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_distillation_sees_no_padding_and_teaches_one_way(name):
    rng, loss = seeded(), LOSSES[name]
    x, y = (torch.randn(2, 30, 2, generator=rng).requires_grad_() for _ in range(2))
    value = loss(x, y)
    value.backward()
    assert y.grad is None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    wide = [torch.cat([z, torch.full((2, 6, 2), 8.0)], 1) for z in (x, y)]
    mask = torch.arange(36).expand(2, -1) < 30
    assert loss(*wide, mask).item() == pytest.approx(value.item(), rel=1e-5)
    with pytest.raises(InputError, match="same minisets"):
        loss(x, y[:, :9])


@pytest.mark.parametrize("name", LOSSES)
def test_distillation_leads_to_the_teacher(name):
    from gears_nb.geometry.gauge import procrustes

    y = torch.rand(1, 40, 2, generator=seeded())
    x = (y + 0.15 * torch.randn(1, 40, 2, generator=seeded(1))).requires_grad_()
    before = procrustes(x.detach(), y, scale=True).error.item()
    optimiser = torch.optim.Adam([x], lr=1e-2)
    for _ in range(150):
        loss = LOSSES[name](x, y)
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    assert procrustes(x.detach(), y, scale=True).error.item() < 0.4 * before


def test_distillation_forms():
    x = torch.randn(2, 30, 2, generator=seeded())
    assert distil_distances(torch.zeros_like(x), x).item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(InputError, match="metric or log"):
        distil_distances(x, x, form="cubic")
    for loss in LOSSES.values():  # student in half precision, teacher exact
        assert torch.isfinite(loss(x.bfloat16(), x))


def test_walk_of_the_teacher_is_the_target_walk():
    pos = torch.rand(2, 50, 2, generator=seeded())
    targets, x = build_targets(pos, k=7), torch.randn(2, 50, 2, generator=seeded(1))
    from gears_nb.targets.energy import energy
    one = build_targets(pos, k=7, rw_steps=1)
    assert distil_walk(x, pos, k=7).item() == pytest.approx(energy(x, one).rw.mean().item(), rel=1e-4)
    assert off_diagonal(oracle_edges(targets)).any(-1).all()
