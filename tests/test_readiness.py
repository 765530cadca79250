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
from gears_nb.structure.readiness import LINES, MODEL, judge, readiness, rows_of
from gears_nb.structure.rungs import Ladder

GOOD = {"variant": MODEL, "fold": "a", "seed": 0, "h_gate": 0.2, "t_edge": 0.15, "guess": 0.3, "gate_off": 0.3, "recall20": 0.97, "precision30": 0.8, "attention30": 0.6,
        "logit_std": 4.0, "diverged": 0.0, **{f"{k}{s}": 1.0 for k in lab.HEALTH for s in ("", "_ok", "_true_ok")}}


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
    assert {k for k, v in told.items() if v == "skipped"} == {"seeds", "folds", "k", "slides", "domain", "norms"}
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
