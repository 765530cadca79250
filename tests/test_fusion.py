"""Evidence that adds up: look-ups, weights from the rehearsal, expected errors; tasks and their marks."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.benchmark import tasks
from gears_nb.core.errors import InputError
from gears_nb.data.preprocess import Preprocessor
from gears_nb.data.simulator import simulate
from gears_nb.geometry.gauge import gauge_fix, procrustes
from gears_nb.reconstruct.agreement import TOO_FEW, Skills, corrections, correlations, fit_skill
from gears_nb.reconstruct.atlas import Atlas, atlas_from, make_atlas
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.fusion import DOUBTS, LOST, SOURCES, Fusion, confidence, expected_distances, in_one_unit, look_up, own_reach, per_cell, reach
from gears_nb.reconstruct.rehearsal import LEAST, Rehearsal, folds_of, rehearsal_from, spoiled
from gears_nb.reconstruct.settings import profile
from gears_nb.reconstruct.stitch import Stitched

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def slides():
    return simulate("tiny", 0).slides


@pytest.fixture(scope="module")
def fitted(slides):
    return Gears(profile("smoke", progress=False)).fit(list(slides[:2]))


@pytest.fixture(scope="module")
def query(slides):
    bare = slides[2].copy()
    del bare.obsm
    return bare


def a_rehearsal(shift, weights):
    "One without doubts in which all sources have half of a skill and errors of their own."
    n, K = len(shift), len(SOURCES)
    return Rehearsal(shift, weights, (0.0,) * (len(DOUBTS) + 1), ((0.5,) * K,) * n, (tuple(map(tuple, np.eye(K))),) * n, (0.1,) * n)


def an_atlas(n=80, sections=2, d=6):
    U = [RNG.normal(size=(n, 2)) for _ in range(sections)]
    H = tuple(np.c_[u, RNG.normal(0, 0.1, (n, d - 2))].astype(np.float32) for u in U)
    return Atlas(H, H, tuple(gauge_fix(u).astype(np.float32) for u in U), np.eye(d))


# ---------------------------------------------------------------- the sum

@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=10, max_size=10), st.lists(st.floats(0.1, 100), min_size=10, max_size=10))
def test_the_unit_of_a_source_does_not_matter(weights, units):
    d = np.random.default_rng(1).random((40, 10)) + 0.1
    assert np.allclose(in_one_unit(d) @ weights, in_one_unit(d * units) @ weights)


def test_a_look_up_does_not_know_frames_or_order():
    atlas, query = an_atlas(), RNG.normal(size=(30, 6)).astype(np.float32)
    pairs = np.stack(np.triu_indices(30, 1), 1)
    turned = Atlas(atlas.H, atlas.plain, (atlas.coords[0][:, ::-1] * [1, -1], atlas.coords[1] @ [[0.6, 0.8], [-0.8, 0.6]]), atlas.axes)
    turned = Atlas(turned.H, turned.plain, tuple(np.ascontiguousarray(c, np.float32) for c in turned.coords), turned.axes)
    plain = look_up(query, query, atlas).distances(pairs)
    same = [name not in ("regression", "regions") for name in SOURCES[1:]]  # those are fitted to coordinates
    assert np.allclose(plain[:, same], look_up(query, query, turned).distances(pairs)[:, same], atol=1e-4)
    order = RNG.permutation(30)
    there = np.argsort(order)
    assert np.allclose(look_up(query[order], query[order], atlas).distances(there[pairs]), plain, atol=1e-4)


@pytest.mark.parametrize("sections", [1, 2])
def test_a_spot_never_finds_itself(sections):
    "Noise that says nothing of a place: a spot that found itself would know where it is."
    n = 150
    H = tuple(RNG.normal(size=(n, 8)).astype(np.float32) for _ in range(sections))
    atlas = Atlas(H, H, tuple(gauge_fix(RNG.normal(size=(n, 2))).astype(np.float32) for _ in range(sections)), np.eye(8))
    pairs = np.stack(np.triu_indices(n, 1), 1)
    true = np.linalg.norm(atlas.coords[0][pairs[:, 0]] - atlas.coords[0][pairs[:, 1]], axis=1)
    found = look_up(H[0], H[0], atlas, skip=0).distances(pairs)
    assert np.abs([np.corrcoef(d, true)[0, 1] for d in found.T]).max() < 0.12


def test_a_model_that_went_wrong_about_some_cells_raises_their_expected_error():
    atlas = an_atlas(200, 1)
    U, rows = atlas.coords[0], atlas.H[0]
    pairs = np.stack(np.triu_indices(200, 1), 1)
    true = np.linalg.norm(U[pairs[:, 0]] - U[pairs[:, 1]], axis=1)
    wrong = np.where((pairs < 20).any(1), RNG.permutation(true), true)  # a patch of noise
    given = lambda d: Stitched(pairs, d, *[np.ones(len(pairs))] * 2, np.ones(200), np.ones((1, 1)), np.zeros((1, 1)), 0)
    fusion = Fusion(look_up(rows, rows, atlas), np.r_[9, np.ones(len(SOURCES) - 1)], np.zeros(len(DOUBTS) + 1))
    good, bad = (fusion.fuse(given(d))[1] for d in (true, wrong))
    assert np.median(bad[:20]) > 3 * np.median(bad[20:]) and bad[:20].mean() > 3 * good[:20].mean()


def test_a_model_that_is_wrong_about_everything_loses_weight_and_raises_every_error():
    atlas = an_atlas(200, 1)
    U, rows = atlas.coords[0], atlas.H[0]
    pairs = np.stack(np.triu_indices(200, 1), 1)
    true = np.linalg.norm(U[pairs[:, 0]] - U[pairs[:, 1]], axis=1)
    given = lambda d: Stitched(pairs, d, *[np.ones(len(pairs))] * 2, np.ones(200), np.ones((1, 1)), np.zeros((1, 1)), 0)
    told = Skills(np.full(len(SOURCES), 0.8), np.eye(len(SOURCES)) * 0.5 + 0.5)
    fusion = Fusion(look_up(rows, rows, atlas), np.ones(len(SOURCES)), np.zeros(len(DOUBTS) + 1), told, usual=0.2)
    (_, well, right), (_, ill, wrong) = (fusion.fuse(given(d)) for d in (true, RNG.permutation(true)))
    assert wrong[0] < 0.2 * right[0] and np.isclose(wrong.sum(), 1) and (wrong >= 0).all()
    assert np.median(ill) < np.median(well) + 0.05  # nobody listens to it
    alone = Fusion(fusion.looked, np.r_[9, np.ones(len(SOURCES) - 1)], fusion.error, usual=0.2)  # agreement is not asked
    assert np.quantile(alone.fuse(given(RNG.permutation(true)))[1], 0.1) > 0.2


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 8), st.integers(0, 10**6))
def test_agreement_finds_skills_and_does_not_know_units_or_order(k, seed):
    rng = np.random.default_rng(seed)
    skill, true = rng.uniform(0.2, 0.95, k), rng.normal(size=6000)
    table = true[:, None] * skill + rng.normal(size=(6000, k)) * np.sqrt(1 - skill**2)
    told = Skills(np.full(k, 0.5), np.eye(k))
    found, order = fit_skill(correlations([table]), told, pull=1e-4), rng.permutation(k)
    if np.sort(skill)[-3] > 0.4:  # three that agree with each other
        assert np.abs(found - skill).max() < 0.12
    w = corrections(table, told)
    units = rng.uniform(0.1, 10, k)
    assert (w >= 0).all() and np.allclose(corrections((table * units)[:, order], told), w[order], rtol=0.02)


def test_few_pairs_are_hearsay_and_a_liar_loses_its_weight():
    told = Skills(np.array([0.9, 0.5, 0.5]), np.eye(3))
    draw = lambda n: np.c_[RNG.normal(size=n), RNG.normal(size=(n, 1)) * [0.8, 0.8] + RNG.normal(size=(n, 2)) * 0.6]
    assert (corrections(draw(TOO_FEW - 1), told) == 1).all()
    w = corrections(draw(5000), told)  # the first agrees with nobody, the others with each other
    assert w[0] < 0.05 and w[1:].min() > 1


def test_from_three_sections_on_the_embedding_is_fitted_without_the_asked_one(slides):
    atlas, seen = an_atlas(sections=3), []

    def refit(some):
        seen.append(len(some))
        return len, len, an_atlas(sections=2)

    found = folds_of(len, len, [*slides[:2], slides[0]], atlas, refit)
    assert seen == [2, 2, 2] and [f.skip for f in found] == [None] * 3 and [f.section for f in found] == [0, 1, 2]
    assert [f.skip for f in folds_of(len, len, slides[:2], an_atlas(), refit)] == [0, 1] and len(seen) == 3


def test_no_weights_leave_the_model_alone_and_per_cell_means_are_means():
    pairs = np.stack(np.triu_indices(12, 1), 1)
    atlas, rows = an_atlas(), RNG.normal(size=(12, 6)).astype(np.float32)
    stitched = Stitched(pairs, RNG.random(len(pairs)) + 0.1, *[np.ones(len(pairs))] * 2, np.ones(12), np.ones((1, 1)), np.zeros((1, 1)), 0)
    fused, error, share = Fusion(look_up(rows, rows, atlas), np.zeros(len(SOURCES)), np.r_[np.zeros(len(DOUBTS)), 0.3]).fuse(stitched)
    assert share[0] == 1 and np.allclose(fused.distance, stitched.distance) and error.min() >= 0.3 and np.median(error) < 0.6
    slow = [stitched.distance[(pairs == i).any(1)].mean() for i in range(12)]
    assert np.allclose(per_cell(stitched.distance, pairs, 12), slow)


def test_expected_distances_never_fall_below_the_map_and_confidence_falls_with_the_error():
    X, e = RNG.normal(size=(50, 2)), RNG.random(50)
    pairs = np.stack(np.triu_indices(50, 1), 1)
    flat = np.linalg.norm(X[pairs[:, 0]] - X[pairs[:, 1]], axis=1)
    assert (expected_distances(X, e, pairs) >= flat).all() and np.allclose(expected_distances(X, 0 * e, pairs), flat)
    c = confidence(np.linspace(0, 2, 50))
    assert c[0] == 1 and (np.diff(c) <= 0).all() and c[-1] > 0 and confidence(np.array([LOST]))[0] == 0.01


# ---------------------------------------------------------------- the rehearsal

def test_shift_is_one_among_equals_and_grows():
    draw = lambda: (RNG.normal(size=(300, 5)) * [3, 3, 1, 1, 1]).astype(np.float32)
    sections = [draw(), draw()]
    assert abs(reach(draw(), sections) / own_reach(sections) - 1) < 0.1
    far = [reach(draw() + [0, 0, k, 0, 0], sections) for k in (0, 2, 4)]
    assert far == sorted(far)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.lists(st.floats(0.5, 5), min_size=4, max_size=4))
def test_weights_lie_between_those_of_the_levels(shift, shifts):
    levels = np.random.default_rng(2).random((4, len(SOURCES)))
    w = a_rehearsal(tuple(shifts), tuple(map(tuple, levels))).weights_at(shift)
    assert (w >= levels[LEAST:].min(0) - 1e-12).all() and (w <= levels[LEAST:].max(0) + 1e-12).all()


def test_a_damaged_record_of_a_rehearsal_is_refused():
    good = a_rehearsal((1.0, 2.0), ((0.0,) * len(SOURCES),) * 2).to_dict()
    assert rehearsal_from(json.loads(json.dumps(good))).shift == (1.0, 2.0)
    for change in ({"error": (0.0,) * 5}, {"weights": ((0.0,) * len(SOURCES),)}, {"weights": ((0.0,) * 5,) * 2}):
        with pytest.raises(ValueError, match="another size"):
            rehearsal_from(good | change)


def test_spoiling_keeps_shape_and_leaves_the_slide_alone(slides):
    before = slides[0].X.copy()
    out = spoiled(slides[0], 1.0, 0.1, np.random.default_rng(0))
    assert out.shape == slides[0].shape and abs(slides[0].X - before).sum() == 0 and (np.asarray(out.X.sum(1)) > 0).all()
    other = spoiled(slides[0], 0.0, 0.5, np.random.default_rng(0), counts=False)
    assert abs(other.X - slides[0].X).sum() == 0, "what is no count is not thinned"


def test_the_rehearsal_never_looks_at_the_query(slides, fitted):
    "Two queries, one of them nonsense: what was learned is the same object, and it is in the saved model."
    before = fitted.fitted.rehearsal.to_dict()
    odd = slides[2].copy()
    odd.X = odd.X[:, RNG.permutation(odd.n_vars)]
    del odd.obsm
    fitted.reconstruct(odd)
    assert fitted.fitted.rehearsal.to_dict() == before


# ---------------------------------------------------------------- the whole way

def test_truth_in_the_query_changes_nothing(slides, fitted, query):
    poisoned = slides[2].copy()
    poisoned.obsm["spatial"] = poisoned.obsm["spatial"] * 0 + 7e5
    a, b = fitted.reconstruct(query), fitted.reconstruct(poisoned)
    assert np.array_equal(a.obsm["X_gears"], b.obsm["X_gears"]) and np.array_equal(a.obs["gears_error"], b.obs["gears_error"])


def test_errors_and_places_follow_the_order_of_cells(fitted, query):
    order = np.random.default_rng(3).permutation(query.n_obs)
    a, b = fitted.reconstruct(query), fitted.reconstruct(query[order].copy())
    off = lambda rows: np.abs(a.obs["gears_error"].to_numpy()[rows] - b.obs["gears_error"].to_numpy()).max()
    assert off(order) < 1e-4 < 1e-2 < off(order[::-1])  # embeddings are float32, and rounding differs from one processor to the next
    assert procrustes(b.obsm["X_gears"], a.obsm["X_gears"][order]).error < 1e-3


def test_saved_models_know_their_atlas_and_rehearsal(tmp_path, fitted, query):
    again = Gears.load(fitted.save(tmp_path / "m"))
    a, b = fitted.reconstruct(query), again.reconstruct(query)
    assert np.array_equal(a.obsm["X_gears"], b.obsm["X_gears"]) and np.array_equal(a.obs["gears_error"], b.obs["gears_error"])
    alone = Gears.load(tmp_path / "m", {"solve.fusion": False}).reconstruct(query)
    assert "gears_error" not in alone.obs and json.loads(alone.uns["gears"]["fusion"]) == {}
    about = json.loads(a.uns["gears"]["fusion"])
    assert set(about["weights"]) == set(SOURCES) and about["shift"] > 0


def test_one_section_is_enough(slides, query):
    placed = Gears(profile("smoke", progress=False)).fit(slides[0]).reconstruct(query)
    assert np.isfinite(placed.obsm["X_gears"]).all() and (placed.obs["gears_error"] > 0).all()


def test_the_atlas_of_a_table_survives_a_file(slides):
    prep = Preprocessor.fit(slides[:2], slide_key=None)
    atlas = make_atlas(prep, slides[:2], [np.zeros((s.n_obs, 3)) for s in slides[:2]])
    state = atlas.state()
    assert len(atlas_from(state)) == 2
    with pytest.raises(KeyError):
        atlas_from({k: v for k, v in state.items() if k != "plain.1"})


# ---------------------------------------------------------------- tasks

def test_what_was_used_for_choices_is_marked():
    assert set(tasks.REPORTED) & set(tasks.DEVELOPMENT) <= set(tasks.USED) <= set(tasks.REPORTED)
    with pytest.raises(InputError, match="did you mean hippocampus"):
        tasks.load_task("hipocampus")


def test_both_queries_of_the_demo_are_reported():
    from gears_nb.runs.demo import demo_task
    _, _, truth = demo_task("toy", 3)
    for name, asked in (("liver_crossslide", "ST3"), ("liver_sc:3", "SC")):
        task = tasks.load_task(name, 3)
        assert name.partition(":")[0] in tasks.REPORTED and np.allclose(tasks.blind(task.query)[1], truth[asked])
        assert not list(tasks.blind(task.query)[0].obsm)


def test_a_task_is_trained_once(monkeypatch, tmp_path):
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    task = tasks.load_task("tiny")
    config = tasks.settings_of(task, "smoke")
    first = tasks.trained(task, config)
    monkeypatch.setattr(Gears, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = tasks.trained(task, tasks.settings_of(task, "smoke", fusion=False))
    assert again.fitted.rehearsal == first.fitted.rehearsal and again.config.solve.fusion is False
