"""Rules and measures of the attention chapter: who is shown does not depend on pose or order, and every number is what its name says."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from gears_nb.attention import claims, figures, measures, rules
from gears_nb.core.errors import InputError
from gears_nb.geometry import metrics
from gears_nb.geometry.gauge import canonical, gauge_fix
from gears_nb.lab.power import smallest_visible
from gears_nb.models.catalogue import model_class
from gears_nb.models.trace import AttentionTrace, row_std, values
from gears_nb.reconstruct.settings import profile
from gears_nb.structure.experiments import EvaluationSettings, evaluation_set
from gears_nb.structure.explain import record
from gears_nb.structure.gate import oracle_edges
from gears_nb.targets.builder import build_targets, squared_distances
from gears_nb.targets.energy import energy

SEEDS = st.integers(0, 2**16)


def cloud(seed, n=40):
    """Points without ties, axes of different lengths, skewed along both."""
    return np.random.default_rng(seed).gamma(2.0, size=(n, 2)) * [3.0, 1.0]


def shaken(name="d7", heads=2, recycles=2, n=30, seed=0):
    """A record of a model with random weights, its embeddings and its targets."""
    g = torch.Generator().manual_seed(seed)
    settings = profile("toy", **{"structure.k_cand": 10, "structure.heads": heads, "structure.recycles": recycles}).structure
    with torch.random.fork_rng():  # some draws put a cell on a kink of the loss, and its gradient shows the last digit
        torch.manual_seed(seed)
        model = model_class(name)(8, settings)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=g)
    H, X = torch.randn(1, n, 8, generator=g), torch.from_numpy(cloud(seed, n)).float()[None]
    targets = build_targets(X, k=6)
    return model, H, X, targets, record(model, H, truth=X)[0]


@pytest.fixture(scope="module")
def made():
    return shaken()


# ---------------------------------------------------------------- rules


@given(SEEDS, st.floats(0, 6.3), st.booleans(), st.floats(1e-3, 1e4), st.floats(-1e3, 1e3))
def test_chosen_cells_do_not_depend_on_the_pose_of_the_slide(seed, angle, mirrored, unit, shift):
    X, rng = cloud(seed), np.random.default_rng(seed + 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([1, -1 if mirrored else 1])
    entropies = rng.random((2, len(X)))
    assert rules.query_cells(unit * (X @ turn + shift), *entropies) == rules.query_cells(X, *entropies)


@given(SEEDS)
def test_chosen_cells_move_with_their_numbers(seed):
    X, rng = cloud(seed), np.random.default_rng(seed + 1)
    entropies, order = rng.permutation(80).reshape(2, 40) / 80, rng.permutation(40)
    before, after = rules.query_cells(X, *entropies), rules.query_cells(X[order], *entropies[:, order])
    assert {name: int(order[cell]) for name, cell in after.items() if name != "median gate entropy"} == {n: c for n, c in before.items() if n != "median gate entropy"}
    assert len(set(before.values())) == len(before) == 8


@given(SEEDS, st.floats(0, 6.3), st.floats(1e-2, 1e3))
def test_true_neighbours_and_families_do_not_depend_on_the_pose(seed, angle, unit):
    X = cloud(seed)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert np.array_equal(rules.true_neighbours(unit * X @ turn - 3, 7), rules.true_neighbours(X, 7))
    a, b = (rules.edge_families(build_targets(torch.from_numpy(x)[None], k=5)) for x in (X, unit * X @ turn - 3))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def test_true_neighbours_against_sorting():
    X = cloud(3)
    d = np.linalg.norm(X[:, None] - X[None], axis=-1) + np.diag(np.full(len(X), np.inf))
    assert np.array_equal(rules.true_neighbours(X, 9), np.argsort(d, 1)[:, :9])


def test_ties_go_to_the_lower_number():
    side = np.arange(6.0)
    lattice = np.stack(np.meshgrid(side, 2 * side), -1).reshape(-1, 2)
    chosen = rules.query_cells(lattice, np.zeros(36), np.zeros(36))
    near = rules.reach(canonical(lattice))
    assert chosen["densest"] == min(set(np.flatnonzero(near <= near.min() + rules.TIE)) - {chosen[q] for q in chosen if q.startswith("quadrant")})
    assert len(set(chosen.values())) == len(chosen) and chosen == rules.query_cells(lattice, np.zeros(36), np.zeros(36))


def test_median_entropy_is_in_the_middle():
    X, gate = cloud(5), np.random.default_rng(0).random(40)
    chosen = rules.query_cells(X, gate)
    below = int((gate < gate[chosen["median gate entropy"]]).sum())
    assert abs(below - 19) <= 6          # at most the six cells taken before it are out
    alone = rules.query_cells(X, np.where(np.arange(40) == 7, 0.0, gate + 1), -np.eye(40)[8])
    assert alone["highest T_ref entropy"] != 8


def test_gate_entropy_by_hand(made):
    *_, trace = made
    lone, off = rules.gate_entropy(trace), trace.row != trace.col
    for cell in (0, 11):
        mine = (trace.row == cell) & off
        p = np.exp(trace.gate[mine] - trace.gate[mine].max())
        p /= p.sum()
        assert np.isclose(lone[cell], -(p * np.log(p)).sum(), atol=1e-5)
    without = AttentionTrace(trace.row, trace.col, trace.attention, {}, trace.x)
    with pytest.raises(InputError, match="H-gate"):
        rules.gate_entropy(without)


def test_walk_entropy_is_largest_for_an_even_walk():
    X = torch.from_numpy(cloud(1))[None]
    targets = build_targets(X, k=5)
    e = rules.walk_entropy(targets)[0]
    support = (targets.rw_transitions[1][0] > 0).sum(-1).numpy()
    assert (e <= np.log(support) + 1e-6).all() and (e > 0).all()


def test_families_are_a_partition_of_the_stress_edges():
    targets = build_targets(torch.from_numpy(cloud(2, 60))[None], k=6)
    pairs, family = rules.edge_families(targets)
    assert len(pairs) == len(family) == int(targets.edge_mask.sum()) and set(np.unique(family)) == {0, 1, 2}
    true = oracle_edges(targets)[0].numpy()
    assert np.array_equal(family == 0, true[pairs[:, 0], pairs[:, 1]])
    with pytest.raises(InputError, match="minisets"):
        rules.edge_families(build_targets(torch.from_numpy(np.stack([cloud(2), cloud(3)])), k=5))


def test_minisets_are_the_first_and_no_others():
    base = profile("smoke")
    source = (np.random.default_rng(0).normal(size=(150, 4)).astype(np.float32), cloud(0, 150).astype(np.float32))
    evaluation = evaluation_set(source, EvaluationSettings.of(base, 8))
    taken = list(rules.first_minisets(evaluation, 6))
    assert [i for numbers, *_ in taken for i in numbers] == list(range(6))
    assert torch.equal(torch.cat([X for _, _, X, _ in taken]), torch.cat([X for _, X, _ in evaluation.batches])[:6])
    assert all(len(t) == len(X) == len(H) for _, H, X, t in taken)
    for wrong in (0, 9):
        with pytest.raises(InputError, match="asked for"):
            list(rules.first_minisets(evaluation, wrong))


def test_footnotes_carry_the_numbers_of_the_code():
    assert f"{rules.NEIGHBOURS} nearest" in rules.footnote("neighbours") and f"{rules.CROWD}th" in rules.footnote("queries").replace("\n", " ")
    assert max(map(len, rules.footnote(*rules.RULES, width=60).splitlines())) <= 60
    with pytest.raises(InputError, match="choose from"):
        rules.footnote("best")


def test_degree_counts_pairs_and_highest_is_a_landmark():
    targets = build_targets(torch.from_numpy(np.stack([cloud(2, 60), cloud(3, 60)])), k=6)
    degree = rules.multiscale_degree(targets)
    for b in range(2):
        pairs, _ = rules.edge_families(targets[b])
        assert np.array_equal(degree[b], np.bincount(pairs.ravel(), minlength=60))
        chosen = rules.query_cells(cloud(2 + b, 60), degree=degree[b])
        landmarks = set(targets.landmarks[b][targets.landmark_mask[b]].tolist()) - {cell for name, cell in chosen.items() if name != "highest degree"}
        assert chosen["highest degree"] == min(landmarks), "landmarks are paired with every cell; among equals the lowest number wins"


def test_degree_of_padded_cells_is_zero():
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 30:] = False
    degree = rules.multiscale_degree(build_targets(torch.from_numpy(cloud(1))[None], mask, k=5))[0]
    assert (degree[30:] == 0).all() and (degree[:30] > 0).all()


def test_nine_rules_want_nine_cells():
    nine = cloud(0, 9)
    assert len(rules.query_cells(nine, np.arange(9.0), np.arange(9.0), np.arange(9))) <= 9
    with pytest.raises(InputError, match="at least 9"):
        rules.query_cells(nine[:8], degree=np.arange(8))


# ---------------------------------------------------------------- measures


@given(SEEDS, st.integers(2, 12))
def test_ranks_are_those_of_scipy(seed, levels):
    a = np.random.default_rng(seed).integers(0, levels, (4, 3, 9)).astype(float)
    assert np.array_equal(metrics.ranks(a).mean, rankdata(a, axis=-1))


@pytest.mark.filterwarnings("ignore:An input array is constant")
@given(SEEDS)
def test_spearman_is_that_of_scipy_and_rows_do_not_mix(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, (5, 14)).astype(float), rng.normal(size=(5, 14)).round(1)
    valid = np.arange(14) < rng.integers(4, 15, (5, 1))
    expected = [spearmanr(x[v], y[v]).statistic for x, y, v in zip(a, b, valid)]
    found = metrics.spearman(a, b, valid, np.nan)
    assert np.allclose(found, expected, equal_nan=True, atol=1e-12)
    assert np.allclose(metrics.spearman(np.exp(a), -b, valid, np.nan), -found, equal_nan=True, atol=1e-12)


def test_rho_by_row_is_the_mean_of_scipy_over_cells(made):
    *_, trace = made
    a, b, off = trace.attention[1, 0], values(trace, "geo", 1, 0), trace.row != trace.col
    each = [spearmanr(a[(trace.row == i) & off], b[(trace.row == i) & off]).statistic for i in range(trace.n)]
    assert np.isclose(measures.rho_rows(trace, trace.attention, trace.terms["geo"])[1, 0], np.nanmean(each), atol=1e-6)
    assert np.isnan(measures.rho_rows(trace, trace.attention, np.zeros_like(trace.attention))).all()


def test_recall_by_counting(made):
    *_, trace = made
    near = rules.true_neighbours(trace.truth, 5)
    score = trace.attention[0, 0]
    shares = [len(set(near[i]) & set(figures.top_attended(trace, score, i, 5)[0])) / 5 for i in range(trace.n)]
    assert np.isclose(measures.recall(trace, score, near), np.mean(shares), atol=1e-6)
    places = -np.linalg.norm(trace.truth[trace.row] - trace.truth[trace.col], axis=-1)
    on = np.array([[j in trace.col[trace.row == i] for j in near[i]] for i in range(trace.n)])
    assert np.isclose(measures.recall(trace, places, near), on.mean(), atol=1e-6), "a score that knows the places finds all that are candidates"


def test_constant_score_counts_what_chance_finds(made):
    *_, trace = made
    near, k = rules.true_neighbours(trace.truth, 5), 5
    rng, total = np.random.default_rng(0), []
    for _ in range(400):
        total.append(float(measures.recall(trace, rng.random(len(trace.row)).astype(np.float32), near)))
    assert abs(np.mean(total) - float(measures.recall(trace, np.zeros(len(trace.row)), near))) < 4 * np.std(total) / 20 and k == near.shape[1]


@pytest.mark.parametrize("n", [12, 30])
def test_energy_of_distances_is_the_energy(n):
    g = torch.Generator().manual_seed(n)
    X = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
    targets, x = build_targets(X, k=5), gauge_fix(X + 0.4 * torch.randn(2, n, 2, generator=g, dtype=torch.float64))
    d = squared_distances(x).sqrt()
    assert torch.allclose(measures.energy_of_distances(d, targets), energy(x, targets, gauge=False).total, atol=1e-10)


def test_distance_gradient_by_finite_differences():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(1, 14, 2, generator=g, dtype=torch.float64)
    targets = build_targets(X, k=4)
    x = gauge_fix(X + 0.3 * torch.randn(1, 14, 2, generator=g, dtype=torch.float64))
    G, d, h = measures.distance_gradient(x.numpy(), targets)[0], squared_distances(x).sqrt(), 1e-5
    for i, j in ((0, 1), (3, 9), (5, 12)):
        step = torch.zeros_like(d)
        step[0, i, j] = step[0, j, i] = h
        slope = (measures.energy_of_distances(d + step, targets) - measures.energy_of_distances(d - step, targets)) / (2 * h)
        assert np.isclose(G[i, j], float(slope), atol=1e-7)
    assert np.allclose(G, G.T) and np.abs(measures.distance_gradient(gauge_fix(X).numpy(), targets)).max() < 1e-6


def test_alignment_sees_what_it_is_shown(made):
    """Scores that are the gradient itself correlate perfectly; reversed, perfectly wrong."""
    *_, targets, trace = made
    G = np.abs(measures.distance_gradient(trace.x[:-1].astype(np.float64), targets))
    own = G[:, trace.row, trace.col]
    found = measures.alignment(trace, targets, {"own": own, "wrong": -own, "by head": np.stack([own, -own], 1)})
    for family in (*rules.FAMILIES, "all"):
        assert np.allclose(found[f"own/{family}"], 1, atol=1e-6) and np.allclose(found[f"wrong/{family}"], -1, atol=1e-6)
        assert np.allclose(found[f"by head/{family}"], [[1, -1]] * trace.recycles, atol=1e-6) and 0 <= found[f"share/{family}"] <= 1


def test_families_carry_the_whole_gradient_and_no_more_than_all_attention(made):
    *_, targets, trace = made
    found = measures.carried(trace, targets)
    assert np.allclose(sum(found[f"total/{f}"] for f in rules.FAMILIES), 1) and np.isclose(sum(found[f"pairs/{f}"] for f in rules.FAMILIES), 1)
    mass = sum(found[f"mass/{f}"] for f in rules.FAMILIES)
    assert ((mass > 0) & (mass <= 1 + 1e-6)).all() and found["stress/energy"].shape == found["energy"].shape == (trace.recycles + 1,)
    assert ((found["stress/gradient"] > 0) & (found["stress/gradient"] < 1)).all()


def test_share_of_the_stress_is_that_of_the_energy(made):
    *_, targets, trace = made
    x = torch.from_numpy(trace.x).double()
    E = energy(x, targets.map(lambda t: t.expand(len(x), *t.shape[1:])), gauge=False)
    found = measures.carried(trace, targets)
    assert np.allclose(found["energy"], E.total) and np.allclose(found["stress/energy"], 0.1 * E.stress / E.total)


def test_even_attention_gives_a_family_what_it_has_of_the_candidates(made):
    *_, targets, trace = made
    even = AttentionTrace(trace.row, trace.col, np.ones_like(trace.attention), {}, trace.x)
    pairs, family = rules.edge_families(targets)
    there = set(zip(trace.row.tolist(), trace.col.tolist()))
    on = [sum((i, j) in there for i, j in np.r_[pairs[family == f], pairs[family == f][:, ::-1]].tolist()) for f in range(3)]
    found = measures.carried(even, targets)
    assert np.allclose([found[f"mass/{name}"][0] for name in rules.FAMILIES], np.array(on) / (trace.row != trace.col).sum())


def test_without_heads_the_mean_stays(made):
    _, H, _, targets, trace = made
    a, b = (measures.measure(trace, H[0].numpy(), targets, (5,), by_head=by_head) for by_head in (("recall", "rho"), ()))
    for name in ("rho/gate", "rho/qk", "rho/H", "gradient/attention/all"):
        assert b[name].shape == (trace.recycles, 1) and np.allclose(a[name][:, -1:], b[name], equal_nan=True)
    assert np.array_equal(a["recall5"][:, -1:], b["recall5"]) and a.keys() == b.keys()


def test_spread_over_edges_counts_what_is_constant_in_a_row(made):
    *_, trace = made
    by_cell = np.arange(trace.n, dtype=np.float32)[trace.row][None, None]
    assert np.allclose(row_std(trace, by_cell), 0) and np.isclose(measures.edge_std(trace, by_cell)[0, 0], by_cell[0, 0][trace.row != trace.col].std())


def test_pairs_off_the_graph_have_no_attention(made):
    *_, trace = made
    there = set(zip(trace.row.tolist(), trace.col.tolist()))
    pairs = np.array([(i, j) for i in range(trace.n) for j in range(i + 1, trace.n)])
    both = measures.both_ways(trace, trace.attention[0, 0], pairs)
    a = {e: v for e, v in zip(zip(trace.row.tolist(), trace.col.tolist()), trace.attention[0, 0])}
    for (i, j), v in zip(pairs.tolist(), both):
        assert np.isnan(v) if (i, j) not in there else np.isclose(v, (a[i, j] + a[j, i]) / 2)


def test_measures_do_not_depend_on_the_order_of_cells():
    model, H, X, targets, trace = shaken()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    other = record(model, H[:, order], truth=X[:, order])[0]
    a, b = measures.measure(trace, H[0].numpy(), targets, (5,)), measures.measure(other, H[0, order].numpy(), build_targets(X[:, order], k=6), (5,))
    for name in ("recall5", "recall5/gate", "rho/gate", "rho/geo", "entropy", "scale/total", "gradient/attention/local", "gradient/layout/local", "step"):
        assert np.allclose(a[name], b[name], atol=2e-3), name


@pytest.mark.parametrize("name", ["plain", "d2", "topo"])
def test_measure_of_other_rungs(name):
    _, H, _, targets, trace = shaken(name, recycles=3)
    found = measures.measure(trace, H[0].numpy(), targets, (5,))
    assert ("rho/gate" in found) == (name != "plain") and ("rho/pair" in found) == (name == "d2")
    assert found["recall5"].shape == (3, 3) and found["scale/total"].shape == (3, 2)
    if name == "topo":
        assert np.isnan(found["rho/geo"][:2]).all() and np.isfinite(found["rho/geo"][2]).all(), "its geometry speaks from the third recycle on"


def test_measure_wants_true_places(made):
    _, H, _, targets, trace = made
    with pytest.raises(InputError, match="truth="):
        measures.measure(AttentionTrace(trace.row, trace.col, trace.attention, {}, trace.x), H[0].numpy(), targets)


@given(SEEDS, st.floats(-5, 5), st.floats(0.1, 10))
def test_interval_moves_and_grows_with_the_values(seed, shift, unit):
    v = np.random.default_rng(seed).normal(size=(3, 20))
    a, b = measures.interval(v), measures.interval(unit * v + shift)
    assert a["ci_low"] <= a["mean"] <= a["ci_high"] and a["n"] == 60 and (a["seeds"], a["minisets"]) == (3, 20)
    assert all(np.isclose(b[k], unit * a[k] + shift) for k in ("mean", "ci_low", "ci_high"))
    wider = measures.interval(v + 3 * np.arange(3)[:, None])
    assert wider["ci_high"] - wider["ci_low"] > a["ci_high"] - a["ci_low"], "seeds that differ make it wider"


def test_interval_of_one_seed_is_students():
    from scipy.stats import t

    v = np.random.default_rng(0).normal(size=12)
    low, high = t.interval(0.95, 11, v.mean(), v.std(ddof=1) / np.sqrt(12))
    found = measures.interval(v)
    assert np.isclose(found["ci_low"], low) and np.isclose(found["ci_high"], high)
    assert np.isnan(measures.interval(np.ones((1, 1)))["ci_low"])


# ---------------------------------------------------------------- claims


def test_smallest_visible_difference_follows_the_noise_and_the_number():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(5, 50))
    assert np.isclose(claims.visible(3 * v), 3 * claims.visible(v)) and claims.visible(v) > claims.visible(np.tile(v, (1, 4))[:, :200] * 0.5)
    assert np.isclose(claims.visible(v[:1]), smallest_visible(v[0].std(ddof=1), 50)), "one training: its minisets alone"
    assert claims.visible(v + 4 * np.arange(5)[:, None]) > claims.visible(v), "trainings that differ hide more"


def test_a_difference_is_there_if_its_whole_interval_is():
    sure, unsure = np.full((3, 20), 0.1) + 0.01 * np.arange(20), np.tile([0.3, -0.2], (3, 10))
    assert claims.above("a", "x", sure).outcome is True and claims.above("a", "x", unsure).outcome is False
    assert claims.above("a", "x", sure, bound=0.5).outcome is False
    assert "visible from" in claims.above("a", "x", unsure).rule and "screen, 2 seeds" in claims.above("a", "x", unsure[:2]).rule


@given(st.floats(0, 40), st.floats(0, 5))
def test_our_reading_is_never_kinder_than_the_log_s(mean, half):
    c = [{"mean": mean, "ci_low": mean - half, "ci_high": mean + half}]
    for line in claims.HEALTH:
        log, ours = (v.outcome for v in claims.both_readings(line, c))
        assert not (ours and not log)


def test_a_line_looks_at_the_recycle_it_names():
    c = lambda *means: [{"mean": m, "ci_low": m - 0.01, "ci_high": m + 0.01} for m in means]
    line = lambda recycle: claims.Line("a list", "recall", "recall30", recycle, 0.4)
    outcomes = {r: claims.both_readings(line(r), c(0.3, 0.5, 0.6))[0].outcome for r in (0, -1, None)}
    assert outcomes == {0: False, -1: True, None: False}
    assert claims.both_readings(line(-1), c(0.3, np.nan))[1].outcome is None


# ---------------------------------------------------------------- figures


def test_top_attended_leaves_the_cell_out_and_breaks_ties_by_index(made):
    *_, trace = made
    even = np.ones(len(trace.row), np.float32)
    cells, score = figures.top_attended(trace, even, 4, 6)
    candidates = [c for c in trace.col[trace.row == 4] if c != 4]
    assert cells.tolist() == candidates[:6] and (score == 1).all()


@given(st.floats(0, 6.3), st.booleans())
def test_progression_is_in_one_gauge(angle, mirrored):
    *_, trace = shaken()
    turn = (np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([1, -1 if mirrored else 1])).astype(np.float32)
    x = trace.x.copy()
    x[:-1] = x[:-1] @ turn                     # earlier layouts come in another pose: the picture is the same
    moved = AttentionTrace(trace.row, trace.col, trace.attention, {}, x, truth=trace.truth @ turn)
    for a, b in zip(figures.aligned_layouts(trace), figures.aligned_layouts(moved)):
        assert np.allclose(a, b, atol=1e-4)


def test_templates_draw_every_recycle_and_head(made):
    import matplotlib.pyplot as plt

    *_, trace = made
    queries = {"one": 3, "two": 8}
    fig = figures.focus_maps(trace, queries, note=rules.footnote("neighbours"))
    panels = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    assert len(panels) == trace.recycles * (trace.heads + 1)
    scales = {c.get_clim() for ax in panels for c in ax.collections if c.get_array() is not None}
    assert len(scales) == 1, "one colour scale per figure"
    fig = figures.progression({"a": (trace, 3)})
    assert len(fig.axes) == trace.recycles + 2
    plt.close("all")
