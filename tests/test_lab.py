"""The laboratory: rows that are computed once, digests of what a function can reach, verdicts that can come out otherwise, experiments that are whole or absent."""
from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.seeding import np_rng
from gears_nb.lab.digests import closure, code_digest, module_digest, reachable
from gears_nb.lab.experiment import Experiment, on_file, provenance, verdict_table
from gears_nb.lab.judge import CARE, Question, Verdict, check, compare
from gears_nb.lab.results import load_results, read_record
from gears_nb.lab.rows import FailedRows, Row, budget, compute_rows, growth_exponent, in_fresh_process
from gears_nb.models.catalogue import add_model, model_code
from gears_nb.models.contract import GeometryModel

SCALE = 2


def square(x: int) -> dict[str, float]:
    "A row."
    return {"y": SCALE * x * x}


def busy(x: int) -> dict[str, float]:
    end = time.process_time() + 0.15
    while time.process_time() < end:
        pass
    return square(x)


def drawn(x: int) -> dict[str, float]:
    return {"y": float(np_rng(x, "row").random())}


def refuses(x: int) -> dict[str, float]:
    if x == 2:
        raise ValueError("no\nsuch row")
    return square(x)


def several(x: int) -> list[dict[str, float]]:
    return [{"method": m, "y": x + i} for i, m in enumerate("ab")]


def asked(function, values, **more):
    return [Row({"x": x}, functools.partial(function, x), **more) for x in values]


# ---------------------------------------------------------------- rows

def test_rows_are_computed_once(tmp_path):
    first = compute_rows("lab/test", asked(square, [1, 2]), show=False, folder=tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("[!.]*.json")}
    again = compute_rows("lab/test", asked(square, [1, 2, 3]), show=False, folder=tmp_path)
    assert first.lines == again.lines[:2] == [{"x": 1, "y": 2}, {"x": 2, "y": 8}]
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items()) and len(list(tmp_path.glob("[!.]*.json"))) == 3
    assert again.seconds >= first.seconds, "seconds are those of the computation, also for a row that was only read"


def test_processes_do_not_change_rows(tmp_path):
    one = compute_rows("lab/test", asked(drawn, range(4)), show=False, folder=tmp_path / "one")
    two = compute_rows("lab/test", asked(drawn, range(4)), show=False, folder=tmp_path / "two", jobs=2)
    assert one.lines == two.lines


def test_a_row_may_be_several_lines(tmp_path):
    table = compute_rows("lab/test", asked(several, [5]), show=False, folder=tmp_path)
    assert table.frame.to_dict("records") == [{"x": 5, "method": "a", "y": 5}, {"x": 5, "method": "b", "y": 6}]


def test_a_failed_row_loses_no_other(tmp_path):
    with pytest.raises(FailedRows, match=r"x 2: ValueError in refuses: no such row") as caught:
        compute_rows("lab/test", asked(refuses, [1, 2, 3]), show=False, folder=tmp_path)
    assert [line["x"] for line in caught.value.table] == [1, 3] and len(caught.value.failures) == 1
    with pytest.warns(GearsWarning, match="no such row"):
        assert len(compute_rows("lab/test", asked(refuses, [1, 2, 3]), show=False, folder=tmp_path, strict=False)) == 2
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"], "half files are left"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"labels": {}}', "\x00\x01", '{"seconds": null, "result": {}}', '{"seconds": "abc", "result": {}}',
                                    '{"seconds": 1, "result": 5}', '{"seconds": 1, "result": [1, 2]}', '{"seconds": 1, "result": "ab"}'])
def test_a_damaged_row_is_computed_again(tmp_path, damage):
    first = compute_rows("lab/test", asked(square, [1, 2]), show=False, folder=tmp_path)
    lost = sorted(tmp_path.glob("[!.]*.json"))[0]
    lost.write_text(damage)
    assert compute_rows("lab/test", asked(square, [1, 2]), folder=tmp_path).lines == first.lines
    assert json.loads(lost.read_text())["result"]


@pytest.mark.parametrize(("result", "message"), [(None, "not NoneType"), (5, "not int"), ("ab", "not str"), ([1, 2], "not list"), ({"x": 3}, "returns x, other than its labels say"),
                                                 ([{"y": 1}, {"x": 3}], "returns x"), ({1: 2, "1": 3}, "two columns of the same name")])
def test_what_is_no_row_is_a_named_failure(tmp_path, result, message):
    with pytest.raises(FailedRows, match=f"1 row failed: x 1: .*{message}"):
        compute_rows("lab/test", [Row({"x": 1}, lambda: result, shared="one")], show=False, folder=tmp_path)
    assert not list(tmp_path.glob("*.json")), "it was kept"


def dies(x: int) -> dict[str, float]:
    if x == 1:
        os._exit(3)
    return square(x)


def test_a_worker_that_dies_and_a_row_that_cannot_travel_are_named(tmp_path):
    with pytest.raises(FailedRows, match="x 1: not computed, TerminatedWorkerError"):
        compute_rows("lab/test", asked(dies, [0, 1, 2]), show=False, folder=tmp_path / "dies", jobs=2)
    held = threading.Lock()
    with pytest.raises(FailedRows, match="not computed, "):
        compute_rows("lab/test", [Row({"x": i}, lambda: held and {}, shared=f"row{i}") for i in range(2)], show=False, folder=tmp_path / "held", jobs=2)


def test_a_row_that_another_process_kept_meanwhile_is_not_computed_again(tmp_path):
    def other_process() -> dict[str, float]:
        compute_rows("lab/test", [second], show=False, folder=tmp_path)
        return {"y": 1}

    calls: list[int] = []
    second = Row({"x": 2}, lambda: calls.append(1) or {"y": 2}, shared="second")
    table = compute_rows("lab/test", [Row({"x": 1}, other_process, shared="first"), second], show=False, folder=tmp_path)
    assert table.lines == [{"x": 1, "y": 1}, {"x": 2, "y": 2}] and calls == [1]


def test_many_failures_stay_readable(tmp_path):
    def long() -> None:
        raise ValueError("word " * 10_000)

    with pytest.raises(FailedRows, match="7 rows failed.*; and 2 more") as caught:
        compute_rows("lab/test", [Row({"x": i}, long, shared=f"row{i}") for i in range(7)], show=False, folder=tmp_path)
    assert len(str(caught.value)) < 3000 and len(caught.value.failures) == 7


def test_rows_have_a_place_or_say_so_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    calls: list[int] = []
    with pytest.raises(InputError, match="GEARS_CACHE"):
        compute_rows("lab/test", [Row({"x": 1}, lambda: calls.append(1) or {}, shared="one")], show=False, folder=tmp_path / "file" / "rows")
    assert not calls
    for name in ("../outside", "/outside", ""):
        with pytest.raises(InputError, match="use chapter/name"):
            compute_rows(name, asked(square, [1]), show=False)


def test_budget_is_printed_before_the_work(tmp_path, capsys):
    compute_rows("lab/test", asked(square, [1]), folder=tmp_path)
    assert "1 rows: 0 kept, 1 to compute (their cost is not known yet)" in capsys.readouterr().out
    compute_rows("lab/test", asked(square, [1, 2]), folder=tmp_path)
    assert "2 rows: 1 kept, 1 to compute (about" in capsys.readouterr().out
    compute_rows("lab/test", asked(square, [1, 2]), folder=tmp_path)
    assert capsys.readouterr().out == ""
    for i, seconds in enumerate((10.0, 30.0, 20.0)):
        (tmp_path / f"{i}.json").write_text(json.dumps({"seconds": seconds}))
    (tmp_path / "one").mkdir()
    assert "CPU seconds a row" in budget(tmp_path, 3, 6, jobs=2)


KILLED = """
import functools, sys, time
from pathlib import Path
from gears_nb.lab.rows import Row, compute_rows
def slow(x):
    time.sleep(0.2)
    return {"y": x}
rows = [Row({"x": x}, functools.partial(slow, x), shared=f"row{x}") for x in range(8)]
print(len(compute_rows("lab/killed", rows, show=False, folder=Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_kill_and_resume(tmp_path, how):
    run = [sys.executable, "-c", KILLED, str(tmp_path)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the shell of this test ignores it
    child = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heard)
    limit = time.time() + 60
    while len(list(tmp_path.glob("[!.]*.json"))) < 2 and time.time() < limit:
        time.sleep(0.02)
    child.send_signal(how)
    child.wait(30)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("[!.]*.json")}
    assert 2 <= len(before) < 8 and all(json.loads((tmp_path / n).read_text())["result"] for n in before)
    assert subprocess.run(run, capture_output=True, text=True).stdout == "8\n"
    assert all((tmp_path / n).stat().st_mtime_ns == t for n, t in before.items()), "a row was computed again"


def test_keys_hang_on_labels_settings_and_code(monkeypatch):
    base = Row({"x": 1}, functools.partial(square, 1)).key
    assert base == Row({"x": 1}, functools.partial(square, 1)).key
    others = [Row({"x": 2}, functools.partial(square, 1)), Row({"x": 1}, functools.partial(square, 2)), Row({"x": 1}, functools.partial(square, 1), using=(1,)),
              Row({"x": 1}, functools.partial(drawn, 1))]
    assert len({base, *(row.key for row in others)}) == 5
    monkeypatch.setitem(globals(), "SCALE", 3)
    assert Row({"x": 1}, functools.partial(square, 1)).key != base, "a global that the function reads is part of it"
    assert Row({"x": 1}, functools.partial(square, 1), shared="mine").key == "mine"


# ---------------------------------------------------------------- code

def test_reachable_follows_the_package():
    assert reachable(drawn) != reachable(square)
    seeding = closure(["core/seeding"])
    assert "core/seeding" in seeding

    def other(x: int) -> dict[str, float]:
        return {"y": float(np_rng(x, "row").random())}
    assert reachable(drawn) != reachable(functools.partial(drawn, 1)) != reachable(other)


def test_reachable_does_not_run_in_circles():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n > 0 and even(n - 1)
    assert reachable(even) == reachable(even)


@pytest.mark.parametrize("one, two, same", [
    ("x = 1\n", "x = 1  \n\n# why\n", True),
    ('"""A."""\nx = 1\n', '"""B,\n\nlonger."""\nx = 1\n', True),
    ('def f():\n    "A."\n    return 1\n', "def f():\n    return 1\n", True),
    ("x = 1\n", "x = 2\n", False),
    ('x = "A."\n', 'x = "B."\n', False),
    ('class C:\n    "A."\n    y = 1\n', 'class C:\n    "B."\n    y = 2\n', False),
])
def test_words_are_no_code(tmp_path, one, two, same):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(one), b.write_text(two)
    assert (module_digest(a) == module_digest(b)) is same


def test_code_digest_of_what_is_not_there():
    with pytest.raises(KeyError):
        code_digest("core/stroe")


def test_code_of_a_strangers_model():
    class One(GeometryModel):
        def forward(self, H, mask=None, rng=None):
            return H + 1

    class Two(GeometryModel):
        def forward(self, H, mask=None, rng=None):
            return H + 2
    add_model("one-test", One), add_model("two-test", Two)
    assert model_code("one-test") == model_code("one-test") != model_code("two-test")
    assert model_code("d7") != model_code("small-vae")


# ---------------------------------------------------------------- fresh processes

def ones(start: np.ndarray) -> float:
    return float((start[:1] + np.ones(6 * 2**20)).sum())


def test_memory_of_a_fresh_process_is_its_own():
    ballast = np.ones(40 * 2**20 // 8 * 8)  # this process is larger than the child; the child must not inherit that
    small = in_fresh_process(functools.partial(ones, np.ones(1)))
    assert ballast[0] == 1 and small.value == 2 * 6 * 2**20
    assert np.isnan(small.peak_mb) or 40 < small.peak_mb < 200
    prepared = in_fresh_process(ones, prepare=lambda: np.ones(20 * 2**20))
    assert np.isnan(prepared.peak_mb) or prepared.peak_mb < 200, "what was prepared is not counted"


def test_a_fresh_process_that_fails():
    with pytest.raises(RuntimeError, match="such row"):
        in_fresh_process(functools.partial(refuses, 2))


@given(power=st.floats(0.2, 3), factor=st.floats(0.01, 100))
def test_growth_exponent(power, factor):
    sizes = np.array([10.0, 100.0, 5000.0])
    assert abs(growth_exponent(sizes, factor * sizes**power) - power) < 1e-8


# ---------------------------------------------------------------- verdicts

def table(values, seeds=3, noise=0.0):
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"variant": v, "data": "d", "fold": "f", "seed": s, "h_gate": x + 0.3 * s + noise * rng.normal()} for v, x in values.items() for s in range(seeds)])


def test_compare_against_scipy():
    t = table({"base": 1.0, "arm": 0.9}, seeds=8, noise=0.1)
    wide = t.pivot_table(index="seed", columns="variant", values="h_gate")
    line = compare(t).loc["arm"]
    error = stats.sem(wide.arm - wide.base)
    assert np.isclose(line.error, error) and np.isclose(line.difference, (wide.arm - wide.base).mean())
    assert np.isclose(line.detectable, max(2 * error, CARE * wide.base.mean()))
    assert (line.effect != "none") == (abs(line.difference) > line.detectable)


@pytest.mark.parametrize("arm, better, effect", [(0.5, "lower", "better"), (0.5, "higher", "worse"), (0.999, "lower", "none"), (np.nan, "lower", "worse")])
def test_effects(arm, better, effect):
    assert compare(table({"base": 1.0, "arm": arm}), better=better).effect["arm"] == effect


def test_a_question_says_what_it_could_see():
    says = {"better": "use {arm}.", "none": "nothing.", "worse": "keep it."}
    ask = lambda arm, seeds: Question(("arm",), says, base="base").verdict("arm", table({"base": 1.0, "arm": arm}, seeds)).outcome
    assert ask(0.5, 3) == "better: use arm."
    assert ask(0.999, 3).startswith("none: nothing. An effect below") and "Screen" not in ask(0.999, 3)
    assert ask(0.5, 2).endswith("Screen of 2 pairs.") and ask(1.5, 3) == "worse: keep it."
    assert ask(0.5, 1).startswith("not decided")


@pytest.mark.parametrize("value, relation, bound, outcome", [(1, "<", 2, True), (2, "<", 2, False), (2, "<=", 2, True), (3, ">", 2, True), (2, ">=", 3, False), (2, "==", 2, True),
                                                             (np.nan, "<", 2, None), (None, "<", 2, None), (1, "<", np.inf, None)])
def test_check(value, relation, bound, outcome):
    assert check("a", "b", value, relation, bound).outcome is outcome


# ---------------------------------------------------------------- experiments

def experiment(tmp_path, **more):
    return Experiment("lab", "experiment", params={"profile": "toy"}, root=tmp_path, **more)


def test_the_same_run_reports_the_same_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path / "cache"))
    grid, lines, total = [{"x": x} for x in range(3)], [], []
    for _ in range(2):
        opened = experiment(tmp_path)
        lines.append(opened.rows(busy, grid).lines)
        total.append((opened.row_seconds, time.process_time() - opened.started))
    assert lines[0] == lines[1] and total[0][0] == total[1][0] > 0.3, "a run that reads its rows reports what they cost"
    assert max(own for _, own in total) < 0.3, "rows of this process are counted twice"


def test_a_record_is_whole_or_absent(tmp_path):
    opened = experiment(tmp_path, required=("rows", "best"))
    with pytest.raises(InputError, match=r"lab/experiment: metrics.best: is missing"):
        opened.write({"rows": []})
    assert not list(tmp_path.rglob("*.json"))
    opened.judge(check("grows", "y", 2.0, ">", 1), Verdict("odd", "a rule in words", None, "PARTIAL"))
    opened.write({"rows": [], "best": 1})
    record = load_results(tmp_path)["lab/experiment"]
    assert record["verdicts"] == {"grows": True, "odd": "PARTIAL"} and record["rules"]["grows"] == {"rule": "y > 1", "value": 2.0}
    path = tmp_path / "lab" / "experiment" / "results.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        read_record(path)


def test_smoke_says_nothing_about_outcomes(tmp_path, capsys):
    opened = Experiment("lab", "experiment", params={"profile": "smoke"}, root=tmp_path)
    opened.judge(check("grows", "y", 0.0, ">", 1))
    assert capsys.readouterr().out == "1 rules evaluated\n"


def test_failures_come_first(tmp_path):
    opened = experiment(tmp_path, seed=[0, 1], data_name="toy data")
    opened.judge(check("good", "y", 2.0, ">", 1), check("bad", "y", 0.0, ">", 1), check("unknown", "y", np.nan, ">", 1))
    opened.write({"rows": []})
    record = read_record(opened.folder / "results.json")
    assert [line.split("|")[1:3] for line in verdict_table(record).splitlines()[2:]] == [[" bad ", " **no** "], [" good ", " yes "], [" unknown ", " not decided "]]
    assert "toy data, 2 seeds" in provenance(record)


def test_on_file_copes_with_old_and_absent_records(tmp_path, capsys):
    on_file("lab/experiment", root=tmp_path)
    opened = experiment(tmp_path)
    opened.write({"rows": []})
    path = opened.folder / "results.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("date", "rules", "required")}
    path.write_text(json.dumps(old))
    on_file("lab/experiment", root=tmp_path, table=lambda m: m["rows"])
    assert "undated" in provenance(old)


def test_on_file_says_when_the_code_has_moved_on(tmp_path, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(getattr(thing, "data", "")))
    opened = experiment(tmp_path)
    opened.judge(check("it is two", "value", 2.0, "==", 2))
    opened.write({"rows": []})
    path = opened.folder / "results.json"
    on_file("lab/experiment", root=tmp_path)
    assert "Older than its code" not in shown[0] and "| it is two | yes | value == 2 | 2 |" in shown[-1]
    record = json.loads(path.read_text())
    record["notebook"]["modules"]["lab/judge"] = "0"
    del record["rules"]
    path.write_text(json.dumps(record))
    on_file("lab/experiment", root=tmp_path)
    assert "Older than its code** (lab/judge changed since): `gears run lab/experiment --profile toy` renews" in shown[-2] and "| it is two | yes |" in shown[-1].splitlines()


def test_no_notebook_keeps_plumbing_of_its_own():
    """Row caches, judges and digests live in `lab`."""
    nbs, wrong = Path(__file__).resolve().parents[1] / "nbs", []
    forbidden = ("inspect.getsource", "notebook_digest(", "class Question", "write_json(path, plain(", "getrusage")
    for path in sorted(nbs.glob("*/*.ipynb")):
        if path.parent.name in ("lab", "core"):
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if not any("parameters" in c["metadata"].get("tags", []) for c in cells):
            continue
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        wrong += [f"{path.relative_to(nbs)}: {word}" for word in forbidden if word in code]
    assert not wrong, "\n".join(wrong)
