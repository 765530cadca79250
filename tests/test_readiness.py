"""The go/no-go table: thresholds and their corner cases, planted faults, and the same table from files."""
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.runs.cli import main
from gears_nb.runs.diagnose_report import readiness_files
from gears_nb.structure import experiments as lab
from gears_nb.structure.readiness import LINES, LISTS, MODEL, Limit, judge, readiness, rows_of, size_measure, std_interval
from gears_nb.structure.rungs import Ladder

GOOD = {"variant": MODEL, "fold": "a", "seed": 0, "h_gate": 0.2, "t_edge": 0.15, "guess": 0.3, "gate_off": 0.3, "recall20": 0.97, "precision30": 0.8, "attention30": 0.6,
        "logit_std": 4.0, "diverged": 0.0, "attention30_least": 0.6, "rho_qk": 0.5, "rho_gate": 0.5, "aspect10_ok": 1.0, "pair05": 0.2, "pair_cv": 0.5,
        "cv_edge": 0.5, "cv_edge_std": 0.02, "overlap20": 0.7, "best_epoch": 5, "fair_ok": 1.0, "clumping": 1.1, **{f"{k}{s}": 1.0 for k in lab.HEALTH for s in ("", "_ok", "_true_ok")}}


def table(**changes):
    """Two folds, three seeds, one other candidate graph; `changes` go into the row of fold b, seed 2."""
    rows = [GOOD | {"fold": f, "seed": s, "h_gate": 0.2 + 0.005 * s} for f in "ab" for s in range(3)]
    rows[-1] |= changes
    return pd.DataFrame([*rows, GOOD | {"variant": "k 100", "h_gate": 0.21}])


def embeddings(shift=0.0, scale=1.0):
    rng = np.random.default_rng(0)
    return {"one": rng.normal(size=(200, 8)), "two": rng.normal(size=(200, 8)) * scale + shift}


def verdicts(findings):
    return {f.key: f.verdict or f.severity for f in findings}


def test_a_good_model_goes():
    findings = judge(table(), embeddings(), np.random.default_rng(1).normal(size=(150, 8)))
    assert [f.key for f in findings] == ["verdict", *LINES] and findings[0].verdict == "GO"
    assert all(f.verdict == "PASS" and f.advice == "Nothing to do." for f in findings[1:])


@pytest.mark.parametrize("line, changes", [
    ("gap", {"t_edge": -0.5}), ("energy", {"h_gate": 1.5}), ("seeds", {"h_gate": 0.30}), ("folds", {"h_gate": 0.40}), ("k", {"h_gate": 0.20}), ("aspect", {"aspect_ok": 0.98}),
    ("nearest", {"nearest_ok": 0.9}), ("spread", {"spread_ok": 0.9}), ("attention", {"attention30": 0.3}), ("logits", {"logit_std": 1.9}), ("logits", {"logit_std": 11.0})])
def test_each_fault_is_found(line, changes):
    rows = table(**changes)
    if line == "k":
        rows.loc[rows.variant == "k 100", "h_gate"] = 0.25
    findings = judge(rows, embeddings())
    assert verdicts(findings)[line] == "FAIL" and findings[0].verdict == "NO GO" and line in findings[0].numbers["failed"]
    assert next(f for f in findings if f.key == line).advice == LINES[line].advice


@pytest.mark.parametrize("changes, line, outcomes", [
    ({"h_gate": 0.27}, "seeds", {"first": True, "second": True, "third": False}),
    ({"aspect_ok": 0.9}, "aspect", {"first": True, "third": False}),
    ({"aspect10_ok": 0.9}, "aspect", {"first": False, "third": True}),
    ({"attention30_least": 0.3}, "attention", {"first": True, "second": True, "third": False}),
    ({"attention30": 0.5}, "attention", {"first": True, "second": False, "third": True}),
    ({"logit_high": 20.0}, "logits", {"first": True, "third": False}),
    ({"diverged": 1.0}, "finite", {"second": False, "third": False}),
    ({"best_epoch": 9}, "epoch", {"third": False}),
    ({"pair05": 0.01}, "pair", {"second": False}), ({"pair_cv": 0.6}, "cv", {"second": False}), ({"rho_gate": 0.2}, "rho_gate", {"first": False}), ({"rho_qk": 0.3}, "rho_qk", {"first": False}),
    ({"overlap20": 0.6}, "overlap", {"embedding": False})])
def test_every_list_judges_by_its_own_thresholds(changes, line, outcomes):
    """The same rows fail one list and pass another; the others of a line stand beside the one that decides."""
    found = next(f for f in judge(table(**changes), embeddings()) if f.key == line)
    assert {k: v["pass"] for k, v in found.numbers["lists"].items()} == outcomes
    decides = LINES[line].decides or next(reversed(outcomes))
    assert found.verdict == ("PASS" if outcomes[decides] else "FAIL") and found.numbers["pass"] == outcomes[decides]
    assert all(f"{name.capitalize()} list" in found.summary for name in outcomes if name != decides)


def test_the_third_list_decides():
    """What only an earlier list asks for is told and counts in that list; it is no reason for NO GO."""
    verdict, *lines = judge(table(pair_cv=0.6, rho_gate=0.1, attention30=0.5), embeddings(), np.random.default_rng(1).normal(size=(150, 8)))
    assert verdict.verdict == "GO" and verdict.numbers["lists"]["first"]["failed"] == ["rho_gate"] and verdict.numbers["lists"]["second"]["failed"] == ["cv", "attention"]
    assert {f.key: f.severity for f in lines if f.severity != "ok"} == {"cv": "note", "rho_gate": "note"} and "second 6 of 8" in verdict.summary
    assert {name: c["tested"] for name, c in verdict.numbers["lists"].items()} == {"first": 10, "second": 8, "third": 10, "embedding": 4}


def test_what_stands_in_says_so():
    """Two figures of the third list are lost: the number of an earlier one is used for the verdict, and not counted as the third's."""
    findings = judge(table(t_edge=-0.5, spread_ok=0.5), embeddings())
    lost = {f.key: f for f in findings if f.key in ("gap", "spread")}
    assert all(f.verdict == "FAIL" and "stands in" in f.summary and "third" not in f.numbers["lists"] for f in lost.values())
    assert findings[0].verdict == "NO GO" and not set(lost) & set(findings[0].numbers["lists"]["third"]["failed"])


def test_ten_seeds_are_held_to_more():
    """The second list: 0.05 over five seeds, 0.04 over ten."""
    many = pd.DataFrame([GOOD | {"fold": "a", "seed": s, "h_gate": 0.2 + 0.09 * (s % 2)} for s in range(10)])
    of = lambda rows: next(f for f in judge(rows) if f.key == "seeds").numbers["lists"]
    assert of(many)["second"]["threshold"] == "at most 0.04" and not of(many)["second"]["pass"] and of(many)["first"]["pass"]
    assert of(many[many.seed < 6])["second"]["threshold"] == "at most 0.05"


def test_candidates_with_and_without_training_again():
    """The first list trains every size, the third keeps the model; each has rows of its own, and neither sees the other's."""
    rows = pd.concat([table(), pd.DataFrame([GOOD | {"variant": "retrained k 60", "h_gate": 0.24}, {"variant": "longer", "fold": "a", "seed": 0, "best_epoch": 5.0}])], ignore_index=True)
    lists = next(f for f in judge(rows) if f.key == "k").numbers["lists"]
    assert lists["first"]["value"] == pytest.approx(0.04) and lists["third"]["value"] == pytest.approx(0.01) and all(v["pass"] for v in lists.values())
    assert not size_measure(rows[rows.variant == MODEL], rows.iloc[:0]).values


def test_limits():
    """The limit itself passes unless it is strict, NaN never, and of several values the one with the least room counts."""
    band, strict = Limit(2.0, 10.0), Limit(high=1.1, strict=True)
    assert band.passes(2.0) and band.passes(10.0) and not band.passes(10.1) and not band.passes(float("nan")) and not strict.passes(1.1) and strict.passes(1.09)
    assert band.worst([3, 9.5, 5]) == 9.5 and band.worst([3, 12, 1.5]) == 12 and np.isnan(band.worst([3, float("nan")])) and (band.threshold, Limit(low=0.3, strict=True).threshold) == ("2 to 10", "above 0.3")
    assert std_interval(2.0, 5) == pytest.approx((1.1983, 5.7471), abs=1e-3) and np.isnan(std_interval(1.0, 1)).all() and set(LISTS) >= {n for line in LINES.values() for n in line.limits}


def test_no_go_says_what_it_decides():
    """Which decisions it changes and which not, in the text for a terminal and on the page; and settings in the reader's language."""
    from gears_nb.core.errors import speaking
    from gears_nb.lab.findings import Diagnosis
    from gears_nb.runs.diagnose_report import _READY, render_diagnosis
    with speaking("shell"):
        found = Diagnosis(judge(table(nearest_ok=0.5), embeddings()), (), 10, 0, "smoke")
    text, page = found.text(), render_diagnosis(found, "Readiness", _READY)
    for told in (text, page):
        assert "no generator" in told and "--set structure.repulsion=0.02" in told and "ordinary" in told
    assert "plain methods" in found["verdict"].advice and "gears evaluate" in found["verdict"].advice and found["verdict"].verdict == "NO GO"
    assert "no generator" not in judge(table(), embeddings())[0].advice
    assert "**{'structure.repulsion': 0.02}" in LINES["nearest"].advice


def test_settings_that_are_advised_exist():
    from gears_nb.reconstruct.settings import profile
    for line in LINES.values():
        for name, value in line.change:
            profile("smoke", **{name: value})


@pytest.mark.parametrize("line, H, cells", [("slides", embeddings(shift=3.0), None), ("norms", embeddings(scale=1.3), None), ("domain", embeddings(), np.full((150, 8), 2.0))])
def test_faults_of_the_embedding(line, H, cells):
    assert verdicts(judge(table(), H, cells))[line] == "FAIL"


def test_a_run_that_blew_up_is_no_go():
    rows = table(diverged=1.0, **{k: np.nan for k in GOOD if k not in ("variant", "fold", "seed", "diverged")})
    assert verdicts(judge(rows))["finite"] == "FAIL"
    rows.loc[rows.variant == MODEL, "diverged"] = 1.0
    assert verdicts(judge(rows))["finite"] == "FAIL"


def test_what_was_not_measured_is_said():
    findings = judge(table().query("fold == 'a' and seed == 0 and variant == 'model'"))
    told = verdicts(findings)
    assert {k for k, v in told.items() if v == "skipped"} == {"seeds", "epoch", "folds", "k", "slides", "domain", "norms"}
    assert all(f.numbers["pass"] is None for f in findings if f.severity == "skipped")
    with pytest.raises(InputError, match="model"):
        judge(table().query("variant != 'model'"))


def test_trained_models_can_be_judged():
    config = lab.base_config("smoke")
    source = np.random.default_rng(0).normal(size=(90, 8)).astype(np.float32), np.random.default_rng(1).random((90, 2)).astype(np.float32)
    models = [Ladder(8, config.structure) for _ in range(2)]
    rows = rows_of(models, lab.evaluation_set(source, lab.EvaluationSettings.of(config)))
    assert len(rows) == 2 and judge(rows)[0].verdict == "NO GO"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, tissue = tmp_path_factory.mktemp("slides"), simulate("tiny", 33)
    for i, slide in enumerate(tissue.slides):
        slide.write_h5ad(folder / f"s{i}.h5ad")
    tissue.cells.write_h5ad(folder / "cells.h5ad")
    return folder


def test_from_files(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GEARS_CACHE", str(files / "cache"))
    call = ["readiness", "--slides", *(str(files / f"s{i}.h5ad") for i in range(2)), "--cells", str(files / "cells.h5ad"), "--profile", "smoke", "--seeds", "1", "--jobs", "1", "--quiet"]
    assert main([*call, "--report", str(tmp_path / "r.html")]) == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in LINES) and "r.html" in text
    page = (tmp_path / "r.html").read_text()
    assert "Readiness of s0.h5ad" in page and all(f'id="{name}"' in page for name in LINES) and "https:" not in page and "CONFIRMED" not in page
    assert main([*call, "--json", "--report", str(tmp_path / "r.json")]) == 0
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept == json.loads(capsys.readouterr().out) and [f["key"] for f in kept["findings"]] == ["verdict", *LINES]
    assert len(kept["sources"]) == 3


@pytest.mark.parametrize("extra, why", [(["--seeds", "0"], "--seeds"), (["--profile", "huge"], "--profile"), (["--report", "r.txt"], "--report"), (["--set", "structure.recycle=1"], "recycle"),
                                        (["--model", "d9"], "d9"), (["--seed", "-1"], "[0, 4294967291]"), (["--set", "min_genes=999"], "--set min_genes=")])
def test_bad_calls_are_one_line(files, extra, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["readiness", "--slides", str(files / "s0.h5ad"), str(files / "s1.h5ad"), "--profile", "smoke", "--quiet", *extra]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_one_slide_is_not_enough():
    with pytest.raises(InputError, match="at least two"):
        readiness(simulate("tiny", 33).slides[:1], profile="smoke")


def test_a_file_of_another_kind_is_not_replaced(files, tmp_path, capsys):
    """A .json that holds no diagnosis, such as the record of a model, is left as it is; one of ours is replaced."""
    call = ["readiness", "--slides", str(files / "s0.h5ad"), "--profile", "smoke", "--quiet", "--report"]
    for text in ('{"settings": 1}', "[1, 2]", "no json", ""):
        kept = tmp_path / "gears.json"
        kept.write_text(text)
        assert main([*call, str(kept)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "--report: exists and is not a report of ours" in said and kept.read_text() == text
    ours = tmp_path / "ours.json"
    ours.write_text(json.dumps({"findings": [], "sources": [], "genes": 1, "seed": 0, "profile": "smoke"}))
    assert main([*call, str(ours)]) == 2 and "at least two" in capsys.readouterr().err, "goes on to the next refusal"


def test_what_the_remedies_name_can_be_given(files, tmp_path):
    """Plane, layer and key reach the reading of slides; scaled values are not offered."""
    tables = []
    for i in (0, 1):
        table = ad.read_h5ad(files / f"s{i}.h5ad")
        table.obsm["spatial"] = np.c_[table.obsm["spatial"], np.arange(table.n_obs) * 5.0][:, [0, 2, 1]]
        table.layers["counts"], table.X = table.X.copy(), table.X.toarray() + 0.5
        table.obs["piece"] = "one"
        table.write_h5ad(tmp_path / f"t{i}.h5ad")
        tables.append(tmp_path / f"t{i}.h5ad")
    with pytest.raises(InputError, match="plane='xz'"):
        readiness_files(tables, profile="smoke", progress=False)
    with pytest.raises(InputError) as refused:
        readiness_files(tables, profile="smoke", progress=False, plane="xz")
    assert "layer='counts'" in refused.value.remedy and "counts=False" not in refused.value.remedy
    with pytest.raises(InputError, match="at least two"):
        readiness_files(tables[:1], profile="smoke", progress=False, plane="xz", layer="counts", slide_key="piece")
