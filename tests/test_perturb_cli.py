"""`gears perturb` as processes of their own: a file in, a model out; words in, a table out; one line for what cannot be used."""
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from forks import command, forked

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data.io import write_h5ad
from gears_nb.perturb.descriptors import Descriptors
from gears_nb.perturb.perturb import Perturb, ask, load, predict
from gears_nb.perturb.simulator import simulate_screen
from gears_nb.runs.cli import main
from gears_nb.runs.screens import _controls_for, asked_conditions, described_in, fold_names, read_described

pytestmark = forked
SCREEN, _ = simulate_screen(n_cells=240, n_genes=30, n_drugs=4, n_lines=2, n_modules=4, doses=(100.0, 1000.0), combinations=2, seed=0)
FIT = ("fit", "--screen", "screen.h5ad", "--profile", "smoke", "--quiet")
ASKED = ("--perturbation", "Drug-01", "drug02+drug01", "--dose", "100", "1uM")
PREDICT = ("predict", "--model", "model", "--quiet")


def table(screen, control="DMSO"):
    obs = {"drug": np.where(screen.control, control, screen.perturbation), "dose": screen.dose, "cell_line": screen.line, "plate": screen.batch}
    return AnnData(screen.values, obs=pd.DataFrame(obs, index=screen.cells), var=pd.DataFrame(index=screen.genes))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Files, and a model of the screen; what the fit said is in `fit.txt`."""
    folder = tmp_path_factory.mktemp("screens")
    write_h5ad(table(SCREEN), folder / "screen.h5ad"), write_h5ad(table(SCREEN, control="water"), folder / "water.h5ad")
    write_h5ad(table(SCREEN)[:, :20].copy(), folder / "few.h5ad")
    untouched = table(SCREEN)[SCREEN.control & (SCREEN.line == "line1")].copy()
    untouched.obs = untouched.obs[[]]
    write_h5ad(untouched, folder / "untouched.h5ad")
    other = table(SCREEN)
    other.obs["cell_line"] = np.where(SCREEN.line == "line1", "LINE-1", "HeLa")
    write_h5ad(other, folder / "spelt.h5ad")
    pd.DataFrame(np.eye(2), index=["x", "y"]).to_csv(folder / "strange.csv")
    (folder / "taken").mkdir(), (folder / "taken" / "notes.txt").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARS_CACHE", str(folder / "cache"))
        done = perturb(folder, *FIT, "--model", "model")
        assert done.returncode == 0, done.stderr
        (folder / "fit.txt").write_text(done.stdout)
        yield folder


def perturb(home, *words):
    return command("perturb", *words, folder=home)


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


@pytest.fixture(scope="module")
def python(home):
    """What the same calls make in Python."""
    return quiet(Perturb(profile="smoke", progress=False).fit, home / "screen.h5ad")


def test_fit_tells_what_was_read_and_leaves_a_model_and_nothing_else(home, python):
    told = (home / "fit.txt").read_text().splitlines()
    assert told[0].startswith("240 cells x 30 genes (counts); 2 lines, 6 perturbations (2 combined), 2 doses (100 to 1000 nM)")
    for note in ("  perturbation: obs['drug']", "  perturbation: controls are called 'DMSO'", "  dose: obs['dose'] has no unit, nanomolar assumed (--unit uM says otherwise)"):
        assert note in told
    assert told[-1].startswith("30 genes are predicted, ") and told[-1].endswith(": model")
    assert {path.name.split(".")[0] for path in (home / "model").iterdir()} == {"perturb"} and not list((home / "cache" / "fits").iterdir())
    kept, same = load(home / "model"), python
    assert kept.config == same.config and kept.fitted.share == same.fitted.share and np.array_equal(kept.fitted.anchor.taught.delta, same.fitted.anchor.taught.delta)
    for name, weights in same.fitted.net.state_dict().items():
        assert np.array_equal(weights.numpy(), kept.fitted.net.state_dict()[name].numpy()), name


def test_predict_writes_what_python_predicts(home, python):
    done = perturb(home, *PREDICT, *ASKED, "--cells", "10", "--out", "new/folder/out.h5ad")  # folders are made
    assert done.returncode == 0 and not done.stderr, done.stderr
    out = read_h5ad(home / "new" / "folder" / "out.h5ad")
    asked = ask(["drug01", "drug01+drug02"], dose=[100.0, 1000.0], line=["line1", "line2"])  # all lines, as none is named
    same = predict(python, asked, cells=10)
    assert np.array_equal(out.X, same.X) and np.array_equal(out.layers["control"], same.layers["control"]) and out.obs.astype(str).equals(same.obs.astype(str))
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and lines[0].split() == ["condition", "cells", "rests", "on", "strongest", "genes", "(log2)"]
    assert lines[1].split()[:6] == ["line1,", "drug01,", "100", "nM", "10", "seen"] and lines[-1] == "80 cells of 8 conditions, 30 genes: new/folder/out.h5ad"
    gene, change = lines[1].split("seen")[1].split(",")[0].split()
    mean = (same.X - same.layers["control"])[:10].mean(0)
    assert gene == same.var_names[np.abs(mean).argmax()] and abs(float(change) - mean[np.abs(mean).argmax()]) < 0.006


def test_untouched_cells_of_another_line_and_names_that_nobody_knows(home):
    done = perturb(home, *PREDICT, "--perturbation", "drugg01", "--dose", "20000", "--line", "HeLa", "--controls", "untouched.h5ad", "--out", "hela.h5ad")
    assert done.returncode == 0, done.stderr
    out = read_h5ad(home / "hela.h5ad")
    assert set(out.obs["line"]) == {"HeLa"} and out.n_obs == int((SCREEN.control & (SCREEN.line == "line1")).sum()) and set(out.obs["rests_on"]) == {"mean"}
    said = done.stderr.splitlines()
    assert len(said) == 4 and all(line.startswith("warning: ") for line in said)
    for words in ("line 'HeLa' was not learned from: predicted from its controls", "doses outside 100 to 1000 nM", "near names are drug01", "nothing is known of drugg01"):
        assert sum(words in line for line in said) == 1


@pytest.mark.parametrize(("args", "words"), [
    ((*FIT, "--screen", "absent.h5ad", "--model", "m"), "absent.h5ad: file: does not exist"),
    ((*FIT, "--screen", "water.h5ad", "--model", "m"), "name the controls: --control NAME"),
    ((*FIT, "--model", "m", "--control", "DMSOO"), "such as 'DMSO'"),
    ((*FIT, "--model", "m", "--line-key", "cel_line"), "did you mean --line-key cell_line?"),
    ((*FIT, "--model", "m", "--unit", "furlong"), "'furlong' is no unit"),
    ((*FIT, "--model", "m", "--expects", "pairs"), "invalid choice: 'pairs'"),
    ((*FIT, "--model", "m", "--set", "network.layer=3"), "network.layers"),
    ((*FIT, "--model", "m", "--set", "seed=3"), "write --seed 1"),
    ((*FIT, "--model", "m", "--descriptors", "absent.csv"), "absent.csv"),
    ((*FIT, "--model", "m", "--descriptors", "strange.csv"), "strange.csv: names: 0 of 4 perturbations of the screen are described (here are 'x', 'y', there 'drug01'"),
    ((*PREDICT, *ASKED, "--out", "x.h5ad", "--line-key", "cell_line"), "--line-key: says how a file of controls is read, and none is given. Remedy: add --controls FILE.h5ad"),
    ((*PREDICT, "--perturbation", " ", "--dose", "100", "--out", "x.h5ad"), "--perturbation: is empty"),
    ((*PREDICT, "--perturbation", "drug01", "--dose", "0,1uM", "--out", "x.h5ad"), "'0,1uM' is no dose"),
    ((*FIT, "--model", "model"), "holds a model already"),
    ((*FIT, "--model", "taken"), "holds other files"),
    ((*FIT, "--model", "screen.h5ad"), "is a file"),
    ((*PREDICT, *ASKED, "--line", "line3", "--out", "x.h5ad"), "'line3' has no control cells here (there are line1, line2)"),
    ((*PREDICT, *ASKED, "--model", "nowhere", "--out", "x.h5ad"), "holds no saved Perturb"),
    ((*PREDICT, *ASKED), "required: --out"),
    ((*PREDICT, *ASKED, "--out", "x.csv"), "call it x.h5ad"),
    ((*PREDICT, *ASKED, "--out", "screen.h5ad/x.h5ad"), "is not a folder"),
    ((*PREDICT, *ASKED, "--controls", "screen.h5ad", "--out", "screen.h5ad"), "is also an input"),
    ((*PREDICT, *ASKED, "--controls", "few.h5ad", "--out", "x.h5ad"), "10 of 30 genes are not in the table"),
    ((*PREDICT, *ASKED, "--controls", "water.h5ad", "--out", "x.h5ad"), "--control NAME"),
    ((*PREDICT, *ASKED, "--cells", "0", "--out", "x.h5ad"), "--cells"),
    ((*PREDICT, "--perturbation", "drug01", "--out", "x.h5ad"), "knows doses from 100 to 1000 nM"),
    ((*PREDICT, "--perturbation", "drug01", "--dose", "high", "--out", "x.h5ad"), "'high' is no dose"),
    ((*PREDICT, "--perturbation", "vehicle", "--dose", "100", "--out", "x.h5ad"), "'vehicle' is a control"),
])
def test_bad_input_is_one_line_and_writes_nothing(home, monkeypatch, capsys, args, words):
    """In this process, for there are many; the frame is the same."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = sorted(path.relative_to(home) for path in home.rglob("*"))
    code, said = main(["perturb", *args]), capsys.readouterr().err
    assert code == 2 and words in said and said.count("\n") == 1 and "Remedy: " in said, said
    assert sorted(path.relative_to(home) for path in home.rglob("*")) == before


def test_lines_of_a_file_of_controls_are_those_of_the_model(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert main(["perturb", *PREDICT, *ASKED, "--line", "Line 1", "hela", "--controls", "spelt.h5ad", "--out", "spelt_out.h5ad"]) == 0
    out, said = read_h5ad(home / "spelt_out.h5ad"), capsys.readouterr()
    assert set(out.obs["line"]) == {"line1", "HeLa"} and "controls: line: 'LINE-1' is 'line1' of the model" in said.out.splitlines()
    assert said.err.count("\n") == 1 and "line 'HeLa' was not learned from: predicted from its controls (lines learned from are line1, line2)" in said.err
    same = predict(load(home / "model"), ask(["drug01", "drug01+drug02"], dose=[100.0, 1000.0], line="line1"))
    assert np.array_equal(out[out.obs["line"] == "line1"].X, same.X)  # as of the model's own cells
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(_controls_for(load(home / "model"), home / "spelt.h5ad", ["line1"], {})[0].line) == {"line1", "HeLa"}


def test_controls_without_genes_that_the_model_does_not_use(home):
    model = quiet(Perturb(profile="smoke", progress=False, n_hvg=20, **{"first.epochs": 0, "second.epochs": 0}).fit, SCREEN)
    few = table(SCREEN)[:, np.sort(model.genes)].copy()
    own, told = _controls_for(model, few, [], {})
    assert own.g == 20 and any(note.startswith("genes: 10 of 30 are not in the table") for note in told)
    with pytest.warns(GearsWarning, match="depth of the control cells is read from 20 of 30 genes"):
        predict(model, ask("drug01", dose=100.0, line="line1"), controls=own)
    with pytest.raises(InputError, match="of 20 genes are not in the table"):
        _controls_for(model, few[:, :19].copy(), [], {})


def test_names_of_descriptors_are_those_of_the_screen():
    assert fold_names(["DRUG-01", "drug 02", "new"], ["drug01", "drug02", "drug03"], "d") == ["drug01", "drug02", "new"]
    with pytest.warns(GearsWarning, match="1 of 4 perturbations of the screen are described .not 'drug02', 'drug03', 'drug04'"):
        found = described_in(Descriptors(np.array(["Drug_01", "x"]), np.eye(2, dtype=np.float32)), SCREEN, "d.csv")
    assert found.names.tolist() == ["drug01", "x"]
    for names, words in ((["x"], "0 of 4 perturbations"), (["drug01", "DRUG 01"], "are one name")):
        with pytest.raises(InputError, match=words):
            fold_names(names, SCREEN.singles, "d.csv")


def test_a_measured_compound_goes_before_a_descriptor():
    describer = SimpleNamespace(parts=["drug01"], descriptors=SimpleNamespace(names=["DRUG-01", "new-1"]), lines={"line1": 0}, norm=SimpleNamespace(dose_ends=(2.0, 3.0)))
    model = SimpleNamespace(fitted=SimpleNamespace(describer=describer))
    found = asked_conditions(model, ["DRUG-01", "New 1"], ["1uM"], ["line1"], SCREEN)
    assert found.perturbation.tolist() == ["drug01", "new-1"]


def test_a_new_compound_with_a_structure_can_be_asked_for(home, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rdkit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    pd.DataFrame({"name": ["Drug-01", "drug02", "drug03", "drug04", "Novum 7"], "SMILES": ["CCO", "c1ccccc1", "CC(=O)O", "CCN", "CCCO"]}).to_csv("new.csv", index=False)
    off = ("--set", "first.epochs=0", "second.epochs=0")
    assert main(["perturb", *FIT[:1], "--screen", str(home / "screen.h5ad"), *FIT[3:], "--model", "m", "--descriptors", "new.csv", "--expects", "perturbation", *off]) == 0
    assert main(["perturb", *PREDICT, "--model", "m", "--perturbation", "novum-7", "--dose", "100", "--out", "out.h5ad"]) == 0
    out, said = read_h5ad("out.h5ad"), capsys.readouterr().err
    assert set(out.obs["perturbation"]) == {"Novum 7"} and set(out.obs["rests_on"]) == {"descriptor"} and not said


def test_structures_of_a_file_join_those_of_the_screen(tmp_path):
    pytest.importorskip("rdkit")
    (tmp_path / "a.csv").write_text("name,smiles\nNovum,CCCO\nempty,\n")
    found = read_described(tmp_path / "a.csv")
    assert found == {"Novum": "CCCO"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert described_in(found, replace(SCREEN, smiles=dict.fromkeys(SCREEN.singles, "CCO")), "a.csv").names.tolist() == [*SCREEN.singles, "Novum"]
    with pytest.raises(InputError, match="0 of 4 perturbations"):
        described_in(found, SCREEN, "a.csv")
    (tmp_path / "b.csv").write_text("name,smiles\nA,CCCO\nA,C\n")
    with pytest.raises(InputError, match="'A' is there more than once"):
        read_described(tmp_path / "b.csv")


def test_what_was_trained_before_an_interruption_is_not_trained_again(home, python, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with monkeypatch.context() as patch:
        patch.setattr("gears_nb.perturb.perturb.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["perturb", *FIT, "--model", "again"]) == 130
    assert "gears perturb: interrupted. The same command continues" in capsys.readouterr().err
    assert not (home / "again").exists() and len(list((home / "cache" / "fits").glob("perturb-*/perturb-second.json"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr("gears_nb.core.training._epoch", None)  # no epoch is left
        assert main(["perturb", *FIT, "--model", "again"]) == 0
    assert not list((home / "cache" / "fits").iterdir())
    asked = ask("drug01", dose=100.0, line="line1")
    assert np.array_equal(predict(load(home / "again"), asked).X, predict(python, asked).X)


def test_help_teaches(capsys):
    for step, words in {"fit": ("nanomolar (nM)", "DMSO", "--expects", "known perturbation in a known line", "examples", "--perturbation-key guide"),
                        "predict": ("obs['rests_on']", "layers['control']", "JQ1+trametinib", "--controls hela.h5ad", "in nanomolar, or with a unit")}.items():
        with pytest.raises(SystemExit) as ended:
            main(["perturb", step, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0 and all(word in text for word in words)
