"""The experiment runner: folds without leaks, rows that are computed once, failures that cost one row."""
import json

import numpy as np
import pytest
import torch

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.core.store import Store
from gears_nb.data.registry import available
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.lab.rows import FailedRows
from gears_nb.structure import experiments as lab
from gears_nb.structure.gate import oracle_edges
from gears_nb.targets.builder import build_targets

TINY = dict(data="tiny", profile="smoke", jobs=1, show=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def table(store):
    return lab.run_variants("test", {"base": {}, "short": {"structure.recycles": 1}}, seeds=[0, 1], store=store, **TINY)


def rows_of(store):
    return {p: p.stat().st_mtime_ns for p in (store.root / "rows").glob("*.json")}


def test_table_is_tidy(table):
    assert len(table) == 4 and not table.isna().any().any()
    assert set(zip(table.variant, table.seed)) == {(v, s) for v in ("base", "short") for s in (0, 1)}
    for column in ("h_gate", "t_edge", "gate_off", "guess", "recall20", "precision30", "recall30", "attention30", "logit_std", "aspect", "nearest", "spread"):
        assert np.isfinite(table[column]).all(), column
    assert (table.guess < table.chance).all()
    assert table[table.seed == 0].groupby("variant").chance.first().nunique() == 1, "all variants must sit the same evaluation"


def test_second_call_reads(table, store):
    before = rows_of(store)
    again = lab.run_variants("another notebook", {"renamed": {}}, seeds=[1], store=store, **TINY)
    assert rows_of(store) == before, "a renamed variant was computed again"
    assert again.h_gate[0] == table[(table.variant == "base") & (table.seed == 1)].h_gate.item()


def test_resumes_after_a_kill(table, store):
    before = rows_of(store)
    lost = sorted(before)[0]
    was = json.loads(lost.read_text())
    lost.unlink()
    again = lab.run_variants("test", {"base": {}, "short": {"structure.recycles": 1}}, seeds=[0, 1], store=store, **TINY)
    after = rows_of(store)
    assert set(after) == set(before) and [p for p in after if after[p] != before[p]] == [lost], "more than the lost row was computed"
    clocks = ["seconds", "evaluation_seconds"]
    assert again.drop(columns=clocks).equals(table.drop(columns=clocks))
    bare = lambda row: {k: v for k, v in row["result"].items() if k not in clocks}
    assert bare(json.loads(lost.read_text())) == bare(was)


def test_workers_do_not_change_results(table, tmp_path):
    parallel = lab.run_variants("test", {"short": {"structure.recycles": 1}}, seeds=[0, 1], store=Store(tmp_path), **{**TINY, "jobs": 2})
    clocks = ["seconds", "evaluation_seconds"]
    assert parallel.drop(columns=clocks).equals(table[table.variant == "short"].reset_index(drop=True).drop(columns=clocks))


def test_a_failed_row_is_named_and_loses_no_other(store, monkeypatch):
    train = lab.train_variant

    def fails(v, fold, seed):
        if v.config.structure.recycles == 3 and seed == 1:
            raise RuntimeError("boom")
        return train(v, fold, seed)

    monkeypatch.setattr(lab, "train_variant", fails)
    asked = {"base": {}, "bad": {"structure.recycles": 3}}
    with pytest.raises(FailedRows, match="variant bad, data tiny, fold test 3, seed 1.*boom") as caught:
        lab.run_variants("test", asked, seeds=[0, 1], store=store, **TINY)
    assert len(caught.value.failures) == 1 and len(caught.value.table) == 3
    with pytest.warns(GearsWarning, match="boom"):
        assert len(lab.run_variants("test", asked, seeds=[0, 1], strict=False, store=store, **TINY)) == 3


def test_edges(store):
    asked = {"oracle": {"edges": "oracle"}, "plain": {"edges": "plain"}}
    table = lab.run_variants("test", asked, seeds=[0], store=store, **TINY).set_index("variant")
    assert table.loc["oracle"].h_gate == table.loc["oracle"].t_edge and table.loc["plain"].h_gate == table.loc["plain"].gate_off
    assert table.loc["oracle"].h_gate != table.loc["plain"].h_gate and table.precision30.isna().all()


@pytest.mark.parametrize("diff", [{"structure.recycle": 1}, {"rung.nonsense": 1}, {"edges": "true"}, {"structure.recycles": "many"}, {"rung.geo": "cubic"}])
def test_bad_variants_are_refused(diff, store):
    with pytest.raises(InputError):
        lab.run_variants("test", {"bad": diff}, seeds=[0], store=store, **TINY)


def test_rungs_change_the_row(store):
    table = lab.run_variants("test", {"base": {}, "beta": {"rung.beta": 0.5}, "v1": {"structure.model": "v1"}}, seeds=[0], store=store, **TINY)
    assert table.h_gate.nunique() == 3


@pytest.mark.parametrize("name", ["tiny:x", "her2st_A:3", "nowhere"])
def test_bad_data_is_refused(name):
    with pytest.raises(InputError):
        lab.folds(name)


def test_test_slide_stays_out_of_the_embedding():
    config = lab.base_config("smoke")
    ((_, train, test),) = lab.split("tiny", 0)
    spoilt = test[:80].copy()
    spoilt.X = spoilt.X * 3
    one, two = lab.embed_slides(train, test, config), lab.embed_slides(train, spoilt, config)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(one[:2], two[:2]))


def test_folds_are_cached_and_equal(store):
    (one,), (two,) = lab.folds("tiny", store=store), lab.folds("tiny", store=store)
    assert one.digest == two.digest and np.array_equal(one.test[0], two.test[0]) and len(one.train) == 2
    assert lab.folds("tiny:11", store=store)[0].digest != one.digest


def test_slides_of_a_caller_rotate(store):
    ((_, train, test),) = lab.split("tiny", 0)
    made = lab.folds([*train, test], config=lab.base_config("smoke"), store=store)
    assert [f.name for f in made] == ["test 3", "test 2", "test 1"] and [len(f.train) for f in made] == [2, 2, 2]
    assert len(made[2].test[0]) == train[0].n_obs
    with pytest.raises(InputError, match="at least two"):
        lab.folds([test])


@pytest.mark.skipif(not available()["her2st"], reason="no her2st in the data folder")
def test_her2st_has_three_folds():
    parts = list(lab.split("her2st_B"))
    assert [name for name, *_ in parts] == ["test 3", "test 2", "test 1"]
    assert all(len(train) == 2 and not any(t.obs["slide"].iloc[0] == test.obs["slide"].iloc[0] for t in train) for _, train, test in parts)


def test_exam_does_not_depend_on_the_variant():
    source = np.zeros((200, 4), np.float32), np.random.default_rng(0).random((200, 2)).astype(np.float32)
    s = lab.EvaluationSettings(miniset=40, batch=4, global_fraction=(1.0, 0.5), k=None, rw_steps=None, count=10)
    one, two = lab.evaluation_set(source, s), lab.evaluation_set(source, s)
    assert len(one) == 10 and all(torch.equal(a[1], b[1]) for a, b in zip(one.batches, two.batches))


def test_found_by_hand():
    X = gauge_fix(torch.randn(2, 40, 2, generator=torch_rng(0, "found")))
    t = build_targets(X, k=8)
    full = torch.ones(2, 40, 40, dtype=torch.bool)
    assert (lab.found(-torch.cdist(X, X), full, X, t, k=5) == 1).all()
    assert (lab.found(-torch.cdist(X, X), oracle_edges(t), X, t) < 1).all(), "few edges cannot hold thirty neighbours"


def test_health_sees_collapse():
    X = gauge_fix(torch.randn(3, 60, 2, generator=torch_rng(0, "health")))
    line, clump = X * torch.tensor([1.0, 0.01]), torch.cat([X[:, :40] * 1e-4, X[:, 40:]], 1)
    ok = {k: (v >= lab.HEALTH[k]).all() for k, v in lab.health(X).items() if k != "nearest"}
    assert all(ok.values())
    assert (lab.health(gauge_fix(line))["aspect"] < 0.15).all() and (lab.health(gauge_fix(clump))["nearest"] < 0.05).all()
    padded = torch.cat([X, torch.full((3, 9, 2), 0.0)], 1)
    mask = torch.arange(69).expand(3, -1) < 60
    for k, v in lab.health(padded, mask).items():
        assert torch.allclose(v, lab.health(X)[k], atol=1e-6), k
