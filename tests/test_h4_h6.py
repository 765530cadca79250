"""H4 and H6: oddness of slides with a known answer, maps after training, the cache of fits, verdicts with one cause switched off, and bad input."""

from dataclasses import replace

import numpy as np
import pytest

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import PRESETS
from gears_nb.encoder import h4_infonce as module
from gears_nb.encoder.h4_infonce import (
    SCHEDULES,
    Embedded,
    Trial,
    changes,
    embedded,
    expression_tables,
    fit_settings,
    h4,
    h4_verdict,
    lag_covariances,
    locality,
    organisation,
    places,
    shape,
    stored_preset,
    trial,
)
from gears_nb.encoder.h6_alignment import aligned_row, dealt, h6, h6_verdict, mapped, remedy_verdict
from gears_nb.encoder.presets import fit_preset
from gears_nb.encoder.probes import load_slides

QUICK = SCHEDULES["smoke"] | {"steps": 12}
SMALL = tuple(replace(s, size=400) for s in PRESETS["liver_crossslide"].sources if s.kind == "spots")


@pytest.fixture(scope="module")
def tiny():
    return trial("tiny", 12)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fits")


def waves(length: float, seed: int, amplitude: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    "Two patterns on a 20 x 20 lattice, one of them a wave of `length` spacings, with noise in ten columns."
    rng = np.random.default_rng(seed)
    xy = np.stack(np.meshgrid(*[np.arange(20.0)] * 2), -1).reshape(-1, 2)
    wave = np.sin(2 * np.pi * xy[:, 0] / length + rng.uniform(0, 6)) + np.sin(2 * np.pi * xy[:, 1] / length + rng.uniform(0, 6))
    F = 0.1 * rng.normal(size=(400, 10))
    F[:, 0] += 3 * amplitude * wave
    F[:, 1] += 0.2 * xy[:, 0]
    return F, xy


def test_oddness_sees_length_and_not_amplitude():
    made = [waves(6, 0), waves(6, 1, amplitude=0.5), waves(6, 2)]
    same = organisation([F for F, _ in made], [xy for _, xy in made], list("abc"), pcs=5)
    other = waves(10, 2)
    odd = organisation([made[0][0], made[1][0], other[0]], [made[0][1], made[1][1], other[1]], list("abc"), pcs=5)
    assert same["odd"] < 0.1 and odd["odd"] > 0.4 and max(odd["oddness"], key=odd["oddness"].get) == "c"


def test_oddness_ignores_shifts_rotation_and_scale_of_coordinates():
    made = [waves(6, s) for s in range(3)]
    plain = organisation([F for F, _ in made], [xy for _, xy in made], list("abc"), pcs=5)
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    moved = organisation([F + i for i, (F, _) in enumerate(made)], [100 * xy @ turn + i for i, (_, xy) in enumerate(made)], list("abc"), pcs=5)
    assert np.allclose(list(plain["oddness"].values()), list(moved["oddness"].values()), atol=1e-3)


def test_lag_covariance_by_hand():
    xy, F = np.stack([np.arange(6.0), np.zeros(6)], 1), np.array([[1.0, -1, 1, -1, 1, -1]]).T
    assert np.allclose(lag_covariances(F, xy, (1, 2))[:, 0, 0], [-1, 1])


@pytest.mark.parametrize("switch", [1.0, 0.0])
def test_organisation_is_found_only_when_on(switch):
    slides = load_slides("liver_crossslide", 13, sources=SMALL, organisation=switch)
    found = organisation(expression_tables(slides), [places(s) for s in slides], ["ST1", "ST2", "ST3"])
    assert (found["odd"] >= module.ODD) == bool(switch)
    if switch:
        assert max(found["oddness"], key=found["oddness"].get) == "ST3"


def test_trial_adds_a_slide_and_changes_none():
    plain, of = load_slides("tiny", 3), trial("tiny", 3, organisation=1.0)
    assert len(of.train) == 3 and of.foreign is of.cells
    assert all((a.X != b.X).nnz == 0 for a, b in zip(of.train[:2], plain[:2])) and (of.train[2].X != plain[2].X).nnz > 0
    assert of.held.uns["truth"] != {} and of.held.obs["slide"].iloc[0] == "held"


def test_steps_become_epochs(tiny):
    assert fit_settings(tiny.train, 30, batch=150) == {"batch": 150, "epochs": 10}
    assert fit_settings(tiny.train, 3)["epochs"] == 3


def test_a_stored_fit_is_the_fit(tiny, root):
    fresh = fit_preset("v3", tiny.train, seed=1, **fit_settings(tiny.train, **QUICK))
    for _ in range(2):
        kept = stored_preset("v3", tiny.train, seed=1, root=root, **QUICK)
        assert all(np.array_equal(a, b) for a, b in zip(kept.embed([*tiny.train, tiny.cells]), fresh.embed([*tiny.train, tiny.cells])))
    assert kept.history.column("loss") == fresh.history.column("loss")


def test_the_key_knows_seed_settings_data_and_code(tiny, root, monkeypatch):
    def known(**changed) -> int:
        stored_preset("v3", changed.pop("slides", tiny.train), root=root, **(QUICK | {"steps": 3} | changed))
        return len(list(root.rglob("*.json")))

    start = known()
    assert known() == start
    assert known(seed=5) == start + 1
    assert known(lr=1e-3) == start + 2
    assert known(slides=tiny.train[:2]) == start + 3
    monkeypatch.setattr(module, "code_digest", lambda chapters: "other")
    assert known() == start + 4


def test_h4_table_and_verdict(tiny, root):
    found = h4(tiny, root=root, **QUICK)
    v3, twin = found["encoders"]["v3"], found["encoders"]["vicreg_only"]
    assert 0 < v3["overlap20_held"] < 1 and set(v3["rms"]) == {"ST1", "ST2", "ST3"} and v3["dim_std_min"] > 0
    assert found["change"]["norm_ratio"] == pytest.approx(v3["norm_ratio"] - twin["norm_ratio"])
    assert set(found["network"]) == {"v3", "vicreg_only"} and set(found["network"]["v3"]) == {"ST1", "ST2", "ST3"}
    assert found["verdict"] == h4_verdict(found["organisation"]["odd"], max(found["network"]["vicreg_only"].values()), found["change"])
    assert np.isclose(sum(v3["spectra"]["ST1"]), 1, atol=0.05)


def test_h4_verdicts():
    none, large = {"top_share": 0.0, "norm_ratio": 0.0, "angle_mean": 0.0}, {"top_share": 0.3, "norm_ratio": 0.0, "angle_mean": 0.0}
    assert [h4_verdict(o, 0.5, c) for o in (0.05, 0.5) for c in (none, large)] == ["FALSIFIED", "FALSIFIED", "PARTIAL", "CONFIRMED"]
    assert h4_verdict(0.5, 0.05, large) == "PARTIAL" and h4_verdict(0.05, 0.5, large) == "FALSIFIED"


@pytest.mark.parametrize("switch", [1.0, 0.0])
def test_a_network_without_coordinates_carries_the_organisation(switch, root):
    slides = load_slides("liver_crossslide", 13, sources=SMALL, organisation=switch)
    fit = stored_preset("vicreg_only", slides, seed=13, root=root, **(SCHEDULES["smoke"] | {"steps": 250, "n_hvg": 700}))
    found = organisation(fit.embed(slides), [places(s) for s in slides], ["ST1", "ST2", "ST3"])["oddness"]
    assert (max(found.values()) >= module.ODD) == bool(switch)
    if switch:
        assert max(found, key=found.get) == "ST3"


def test_no_held_slide_leaves_none(tiny, root):
    E = embedded(stored_preset("v5", tiny.train, root=root, **QUICK), Trial(tiny.train, None, None))
    row = locality(E)
    assert row["overlap20_held"] is None and row["overlap20_train"] == pytest.approx(np.mean(list(row["overlap20"].values())))
    assert "overlap20_held" not in changes(row | shape(E) | {"slide_acc": 1.0}, row | shape(E) | {"slide_acc": 1.0})


def test_global_map_hides_slides_and_keeps_the_embedding():
    rng = np.random.default_rng(0)
    xy = [rng.uniform(size=(200, 2)) for _ in range(3)]
    H = [np.pad(c, ((0, 0), (0, 2))) @ rng.normal(size=(4, 4)) + 9 * i + 0.05 * rng.normal(size=(200, 4)) for i, c in enumerate(xy)]
    E = Embedded([h.copy() for h in H], xy, list("abc"), (H[0].copy(), xy[0]))
    row = aligned_row(mapped(E))
    assert aligned_row(E)["slide_acc"] > 0.99 and row["slide_acc"] < 0.45
    assert all(np.array_equal(a, b) for a, b in zip(E.H, H))
    assert aligned_row(mapped(E, 3))["slide_acc"] > row["slide_acc"] - 0.05


def test_h6_off_is_rejected_and_rows_are_complete(tiny, root):
    found = h6(tiny, coral_weight=0.0, clusters=(2, 20), root=root, **SCHEDULES["smoke"])
    assert found["verdict"] == "FALSIFIED"
    assert list(found["embeddings"]) == ["v3", "trained", "global", "conditional 2", "conditional 20"]
    assert found["cost"]["v3"] == {"loss": 0, "removed": 0, "loss_held": 0} and found["remedy"] in ("CONFIRMED", "PARTIAL", "FALSIFIED")


def test_h6_rejects_a_penalty_too_weak_to_matter(tiny, root):
    weak = h6(tiny, coral_weight=0.02, clusters=(), root=root, **SCHEDULES["smoke"])
    assert weak["verdict"] == "FALSIFIED" and weak["coral_weight"] == 0.02


def test_dealt_slides_hold_every_spot_once_and_a_strip_of_each(tiny):
    deck = dealt(tiny.train)
    names = [n for s in deck for n in s.obs_names]
    assert len(deck) == 3 and len(set(names)) == len(names) == sum(s.n_obs for s in tiny.train)
    for new in deck:
        owner = np.array([n.split("_")[0] for n in new.obs_names])
        assert sorted(np.unique(owner)) == ["0", "1", "2"] and np.bincount(owner.astype(int)).max() <= 51
        middle = np.array([places(new)[owner == o].mean(0) for o in "012"])
        size = max(np.ptp(places(s), axis=0).max() for s in tiny.train)
        assert np.abs(np.diff(middle[:, 0])).min() > size / 2
    first = deck[0].obs_names[0].split("_", 1)[1]
    assert np.array_equal(deck[0].X[0].toarray(), tiny.train[0][first].X.toarray())
    assert places(tiny.train[0]).shape == (150, 2) and "slide" in tiny.train[0].obs


def test_h6_verdicts():
    row = lambda near, acc: {"overlap20_train": near, "slide_acc": acc}
    assert [h6_verdict(x) for x in (0.43, 0.06, 0.0, -0.3)] == ["CONFIRMED", "PARTIAL", "FALSIFIED", "FALSIFIED"]
    rows = [{"global": row(0.5, 0.2), "conditional 20": r} for r in (row(0.6, 0.22), row(0.6, 0.6), row(0.4, 0.1))]
    assert [remedy_verdict(r) for r in rows] == ["CONFIRMED", "PARTIAL", "FALSIFIED"]


@pytest.mark.parametrize("function", [h4, h6])
def test_one_slide_is_refused(function, tiny):
    with pytest.raises(InputError, match="at least two"):
        function(tiny.train[:1])
