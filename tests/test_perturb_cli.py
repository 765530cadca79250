"""`gears perturb` as processes of their own: a file in, a model out; words in, a table out; one line for what cannot be used."""
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from forks import command, forked

from gears_nb.data.io import write_h5ad
from gears_nb.perturb.perturb import Perturb, ask, load, predict
from gears_nb.perturb.simulator import simulate_screen
from gears_nb.runs.cli import main

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
    assert len(said) == 3 and all(line.startswith("warning: ") for line in said)
    for words in ("doses outside 100 to 1000 nM", "near names are drug01", "nothing is known of drugg01"):
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
