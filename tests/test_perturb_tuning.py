"""perturb.tuning: the same trials whether a study was interrupted or not, a kill that loses one trial, bad input, and a value that is a ratio."""
import itertools
import math
import os
import signal
import sqlite3
import sys

import numpy as np
import pytest
from forks import ended, forked, start
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.perturb import tuning
from gears_nb.perturb.board import board_row
from gears_nb.perturb.tuning import check_space, relative, study

SPACE = {"loss.delta": (0.3, 3.0), "network.latent": [8, 16]}
FIRST = {"loss.delta": 1.0, "network.latent": 16}
QUICK = {"anchor": "none"}


def trained(changes):
    "A value of the smallest network on the smallest screen; the error alone, without an anchor."
    lines = board_row("tiny", "pair", "perturb", 10, "smoke", inner=True, changes=QUICK | changes)
    return {"value": float(np.mean([line["mse"] for line in lines])), "cells": lines[0]["cells"]}


def valley(changes):
    return {"value": math.log(changes["a"]) ** 2 + abs(changes["b"] - 3), "twice": 2.0 * changes["b"]}


def told(made):
    return [(t.number, t.params, t.value, t.user_attrs, t.state.name) for t in made.trials]


def killed_in(trial, folder):
    seen = itertools.count()

    def objective(changes):
        if next(seen) == trial:
            os.kill(os.getpid(), signal.SIGKILL)
        return trained(changes)

    study(objective, SPACE, 4, "tiny", 3, folder, first=FIRST)


@forked
def test_kill_minus_nine_loses_the_trial_it_came_in(tmp_path):
    assert ended(start(killed_in, 2, tmp_path / "killed")) == -signal.SIGKILL
    asked = []
    resumed = study(lambda changes: (asked.append(changes), trained(changes))[1], SPACE, 4, "tiny", 3, tmp_path / "killed", first=FIRST)
    assert len(asked) == 2, "a trial that had ended was computed again"
    assert [t.number for t in resumed.trials] == [0, 1, 2, 3] and asked == [t.params for t in resumed.trials[2:]]
    assert told(resumed) == told(study(trained, SPACE, 4, "tiny", 3, tmp_path / "whole", first=FIRST))


def test_an_exception_keeps_what_was_done(tmp_path):
    calls = itertools.count()

    def fails_once(changes):
        if next(calls) == 3:
            raise RuntimeError("boom")
        return valley(changes)

    space = {"a": (0.01, 100.0), "b": [1, 2, 3, 4]}
    with pytest.raises(RuntimeError, match="boom"):
        study(fails_once, space, 8, "x", 0, tmp_path / "one")
    assert told(study(fails_once, space, 8, "x", 0, tmp_path / "one")) == told(study(valley, space, 8, "x", 0, tmp_path / "two"))
    assert not [p for p in (tmp_path / "one").iterdir() if p.suffix != ".sqlite"], "a lock was left behind"


def test_trials_depend_on_the_seed_and_not_on_global_state(tmp_path):
    space = {"a": (0.01, 100.0), "b": [1, 2, 3, 4]}
    np.random.seed(0)
    one = study(valley, space, 7, "x", 0, tmp_path / "one")
    np.random.seed(1)
    two = study(valley, space, 7, "x", 0, tmp_path / "two")
    three = study(valley, space, 7, "x", 1, tmp_path / "three")
    assert told(one) == told(two) and all(a.params != b.params for a, b in zip(one.trials, three.trials))
    for trial in one.trials:
        assert 0.01 <= trial.params["a"] <= 100 and trial.params["b"] in space["b"] and trial.user_attrs == {"twice": 2.0 * trial.params["b"]}


def test_the_search_learns(tmp_path):
    "Later trials are nearer to the smallest value than those that are drawn without looking."
    made = study(valley, {"a": (0.001, 1000.0), "b": [1, 2, 3, 4]}, 30, "x", 2, tmp_path)
    values = np.array([t.value for t in made.trials])
    assert np.median(values[15:]) < np.median(values[:5]) / 2 and made.best_trial.params["b"] == 3


def test_a_value_that_is_not_finite_fails_its_trial(tmp_path):
    made = study(lambda changes: {"value": math.nan if changes["b"] == 1 else changes["a"]}, {"a": (0.5, 2.0), "b": [1, 2]}, 8, "x", 0, tmp_path)
    assert all((t.state.name == "FAIL") == (t.params["b"] == 1) and (t.value is None) == (t.params["b"] == 1) for t in made.trials)
    assert len(made.trials) == 8 and {t.state.name for t in made.trials} == {"FAIL", "COMPLETE"} and np.isfinite(made.best_value)


def test_a_finished_study_is_only_read(tmp_path):
    space = {"a": (0.5, 2.0), "b": [1, 2]}
    made = study(valley, space, 3, "x", 0, tmp_path)
    again = study(lambda changes: pytest.fail("computed again"), space, 2, "x", 0, tmp_path)
    assert told(again) == told(made)
    with sqlite3.connect(tmp_path / "x.sqlite") as file:
        assert file.execute("select count(*), sum(state = 'RUNNING') from trials").fetchone() == (3, 0)


@pytest.mark.parametrize("other", [{"seed": 1}, {"space": {"a": (0.5, 3.0), "b": [1, 2]}}, {"first": {"a": 1.0, "b": 2}}])
def test_another_study_of_the_same_name_is_refused(other, tmp_path):
    asked = {"space": {"a": (0.5, 2.0), "b": [1, 2]}, "seed": 0}
    study(valley, trials=1, name="x", folder=tmp_path, **asked)
    with pytest.raises(InputError, match="begun with another") as error:
        study(valley, trials=2, name="x", folder=tmp_path, **asked | other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "a/b", "../a"])
def test_bad_names(name, tmp_path):
    with pytest.raises(InputError, match="name"):
        study(valley, {"a": (0.5, 2.0), "b": [1]}, 1, name, 0, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("space", "first"), [({}, {}), ({"a": (2.0, 1.0)}, {}), ({"a": (0.0, 1.0)}, {}), ({"a": (-1.0, 1.0)}, {}), ({"a": (1.0, math.inf)}, {}), ({"a": (1.0,)}, {}), ({"a": ()}, {}), ({"a": []}, {}),
                                              ({"a": (1.0, 2.0)}, {"a": 2.1}), ({"a": [1, 2]}, {"a": 3}), ({"a": [1], "b": [1]}, {"a": 1}), ({"a": [1]}, {"a": 1, "b": 1})])
def test_bad_spaces(space, first):
    with pytest.raises(InputError) as error:
        check_space(space, first)
    assert "\n" not in str(error.value)


def test_without_optuna_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"gears_nb\[perturb\]"):
        study(valley, {"a": (0.5, 2.0), "b": [1]}, 1, "x", 0, tmp_path)


def test_verbosity_is_left_as_it_was(tmp_path):
    import optuna

    before = optuna.logging.get_verbosity()
    study(valley, {"a": (0.5, 2.0), "b": [1]}, 1, "x", 0, tmp_path)
    assert optuna.logging.get_verbosity() == before and tuning.__all__


positive = st.floats(0.01, 100)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_value_is_a_ratio(rows, e, m):
    "Units cancel; equal to the base is 1; the value is the mean of both ratios."
    base = [{"e_distance": a, "mse": b} for a, b in rows]
    assert relative(base, base) == {"value": 1.0, "e_distance": 1.0, "mse": 1.0}
    found = relative([{"e_distance": e * r["e_distance"], "mse": m * r["mse"]} for r in base], base)
    assert np.isclose(found["e_distance"], e) and np.isclose(found["mse"], m) and np.isclose(found["value"], (e + m) / 2)


def test_conditions_without_a_population_are_left_out():
    base = [{"e_distance": 2.0, "mse": 1.0}, {"e_distance": None, "mse": 3.0}]
    found = relative([{"e_distance": None, "mse": 1.0}, {"e_distance": 3.0, "mse": 1.0}], base)
    assert found == {"value": 1.0, "e_distance": 1.5, "mse": 0.5} and math.isnan(relative([{"e_distance": None, "mse": 1.0}], base)["value"])
