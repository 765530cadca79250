"""`gears cycle`: chunks in, contexts and a model out; cells in another context; one line for what cannot be used."""
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import read_h5ad
from forks import command, ended, forked, start

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.cycle.chunks import open_chunks, write_chunks
from gears_nb.cycle.cycle import CycleAE, load
from gears_nb.cycle.fields import load as load_contexts
from gears_nb.cycle.fields import prepare
from gears_nb.cycle.simulator import simulate_contexts
from gears_nb.data.io import write_h5ad
from gears_nb.runs.cli import main

pytestmark = forked
CELLS, _ = simulate_contexts(n_cells=240, n_genes=40, noise="counts", missing=({"assay": "assay 2", "type": "type 4"},), seed=0)
PREPARE = ("preprocess", "--data", "chunks", "--quiet")
FIT = ("fit", "--data", "chunks", "--profile", "smoke", "--quiet")
FINE = ("--set", "cells.checkpoint=70", "train.epochs=2")  # a part ends inside a chunk
MOVE = ("counterfactual", "--model", "model", "--cells", "cells.h5ad", "--quiet")
PARTS = ("contributions", "--model", "model", "--cells", "cells.h5ad", "--quiet")


class Payload:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def spoilt(home):
    """Folders of chunks, each with one thing wrong, and files of cells."""
    def copy(name):
        shutil.copytree(home / "chunks", home / name)
        return home / name

    table = copy("misaligned") / "chunk_00002.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    (copy("no_table") / "chunk_00001.csv").unlink(), (copy("no_matrix") / "chunk_00003.npz").unlink()
    for end in ("csv", "npz"):
        (home / "missing" if end == "npz" else copy("missing")).joinpath(f"chunk_00003.{end}").unlink()
    cut = copy("cut") / "chunk_00001.npz"
    cut.write_bytes(cut.read_bytes()[:-200])
    bad = copy("malicious")
    (bad / "chunk_00000.csv").unlink(), (bad / "chunk_00000.pkl").write_bytes(pickle.dumps(Payload()))
    other = copy("other") / "chunk_00001.csv"
    lines = other.read_text().splitlines(keepends=True)
    lines[5] = lines[5].replace("type ", "typo ")
    other.write_text("".join(lines))
    lacking = copy("lacking") / "chunk_00001.csv"
    pd.read_csv(lacking, index_col=0).drop(columns="donor").to_csv(lacking, index_label="")
    edited = shutil.copytree(home / "contexts", home / "edited")
    text = (edited / "contexts.json").read_text()
    assert text.count('"donor 1"') == 1
    (edited / "contexts.json").write_text(text.replace('"donor 1"', '"donor 9"'))
    write_chunks(CELLS[:, :30].copy(), home / "narrow", size=60)
    write_h5ad(CELLS[:, 5:].copy(), home / "few.h5ad")
    strange, empty = CELLS.copy(), CELLS.copy()
    strange.obs["type"] = np.where(np.arange(240) == 7, "type 7", strange.obs["type"].astype(str))
    empty.X = sp.diags((np.arange(240) != 3).astype(np.float32)) @ empty.X
    fieldless = CELLS.copy()
    fieldless.obs = fieldless.obs[[]]
    write_h5ad(fieldless, home / "fieldless.h5ad")
    write_h5ad(strange, home / "strange.h5ad"), write_h5ad(empty, home / "empty.h5ad")
    (home / "taken").mkdir(), (home / "taken" / "notes.txt").touch(), (home / "nothing").mkdir()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Chunks, contexts of them and a model; what was said is in `prepare.txt` and `fit.txt`."""
    folder = tmp_path_factory.mktemp("cycle")
    write_chunks(CELLS, folder / "chunks", size=60), write_h5ad(CELLS, folder / "cells.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARS_CACHE", str(folder / "cache"))
        for name, words in (("prepare", (*PREPARE, "--out", "contexts")), ("fit", (*FIT, "--contexts", "contexts", "--model", "model"))):
            done = command("cycle", *words, folder=folder)
            assert done.returncode == 0 and not done.stderr, done.stderr
            (folder / f"{name}.txt").write_text(done.stdout)
        spoilt(folder)
        yield folder


@pytest.fixture
def here(home, monkeypatch):
    """The folder, entered."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    return home


def weights(folder):
    return {name: tensor.numpy() for name, tensor in load(folder).fitted.net.state_dict().items()}


def equal(some, others):
    return some.keys() == others.keys() and all(np.array_equal(some[name], others[name]) for name in some)


def moved(model, to, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        return model.counterfactual(CELLS, to, **options)


def test_preprocess_says_what_it_found_and_keeps_it(home):
    told = (home / "prepare.txt").read_text().splitlines()
    assert told[0].startswith("240 cells in 4 chunks, 40 of 40 genes kept, logarithms of counts scaled to ") and told[1] == "21 of 24 combinations of contexts occur"
    assert told[2].startswith("  assay: 2 categories, 0 pooled, 0 cells unknown: assay 1 (") and told[-1] == "contexts: contexts"
    assert load_contexts(home / "contexts").digest == prepare(open_chunks(CELLS)).digest
    assert {path.name.split(".")[0] for path in (home / "contexts").iterdir()} == {"contexts"}


def test_options_of_preprocess_reach_it(here, capsys):
    table = CELLS.copy()
    table.obs["sex"] = table.obs["donor"].map({"donor 1": "f", "donor 2": "m", "donor 3": "f"}).astype(str)
    table.obs["type"] = np.where(np.arange(240) < 2, ["lone", "sole"] * 120, np.where(np.arange(240) < 12, "", table.obs["type"].astype(str)))
    write_h5ad(table, "wide.h5ad")
    assert main(["cycle", "preprocess", "--data", "wide.h5ad", "--out", "wide", "--fields", "type", "sex", "donor", "--rare", "4", "--genes", "15", "--quiet"]) == 0
    said, kept = capsys.readouterr().out, load_contexts("wide")
    assert [field.name for field in kept.fields] == ["type", "sex", "donor"] and len(kept.genes) == 15
    assert kept.digest == prepare(open_chunks(table), ["type", "sex", "donor"], rare=4, n_genes=15).digest
    for words in ("15 of 40 genes kept", "2 pooled, 10 cells unknown", "sex is a function of donor", "with fewer than 4 cells were pooled ('lone', 'sole')"):
        assert words in said


def test_fit_is_what_python_fits_with_contexts_and_without(here, capsys):
    assert main(["cycle", *FIT, "--model", "plain"]) == 0
    assert not list((here / "cache" / "fits").iterdir())
    told = capsys.readouterr().out.splitlines()[-1]
    assert equal(weights("plain"), weights("model"))
    same = CycleAE("smoke", progress=False).fit("chunks")
    assert equal(weights("plain"), {name: tensor.numpy() for name, tensor in same.fitted.net.state_dict().items()})
    assert told.startswith("Mean norm of what each adds to a cell (log units): base ") and "Additivity" in told and told.endswith("Model: plain")
    for name in ("assay", "type", "donor"):
        assert f"{name} {same.fitted.history[-1][f'norm.{name}']:.2f}" in told


def test_several_sources_are_one_set(here):
    write_chunks(CELLS[:120].copy(), "first", size=60), write_chunks(CELLS[120:].copy(), "second", size=60)
    assert main(["cycle", *FIT, "--data", "first", "second", "--model", "joint"]) == 0  # the last --data counts
    assert equal(weights("joint"), weights("model"))


def test_counterfactual_writes_what_python_makes(home):
    done = command("cycle", *MOVE, "--to", "assay=assay 2", "donor=donor 3", "--out", "new/moved.h5ad", folder=home)  # folders are made
    assert done.returncode == 0, done.stderr
    out, same = read_h5ad(home / "new" / "moved.h5ad"), moved(load(home / "model"), {"assay": "assay 2", "donor": "donor 3"})
    assert np.array_equal(out.X, same.X) and np.array_equal(out.layers["difference"], same.layers["difference"]) and out.obs.astype(str).equals(same.obs.astype(str))
    assert list(out.obs_names) == list(CELLS.obs_names) and set(out.obs["assay"]) == {"assay 2"}
    lone = (CELLS.obs["type"] == "type 4").to_numpy()
    assert np.array_equal(out.obs["contexts_apart"].to_numpy(int) > 0, lone)
    said = done.stderr.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: cycle: never seen together: assay=assay 2, type=type 4 (nearest trained: ")
    lines, mean = done.stdout.splitlines(), same.layers["difference"].mean(0)
    assert lines[0] == f"{240 - lone.sum()} cells are in combinations that were seen together, {lone.sum()} are not"
    top = np.abs(mean).argmax()
    assert lines[1].startswith(f"strongest genes: {same.var_names[top]} {mean[top]:+.2f}") and lines[-1] == "240 cells, 40 genes: new/moved.h5ad"


def test_mode_and_unknown_reach_the_model(here, capsys):
    assert main(["cycle", *MOVE, "--to", "type=type 1", "--mode", "generated", "--out", "g.h5ad"]) == 0
    assert np.array_equal(read_h5ad("g.h5ad").X, moved(load("model"), {"type": "type 1"}, mode="generated").X)
    assert not capsys.readouterr().err
    assert main(["cycle", *MOVE, "--cells", "strange.h5ad", "--to", "type=type 1", "--unknown", "pool", "--out", "g.h5ad"]) == 0  # written over
    out, said = read_h5ad("g.h5ad").obs, capsys.readouterr().err
    assert out["type_before"].iloc[7] == "unknown" and np.flatnonzero(out["own_unknown"]).tolist() == [7] and said.count("\n") == 1 and "1 of 240 cells is unknown" in said


def test_layer_names_the_matrix_of_the_cells(here, capsys):
    cells = CELLS.copy()
    cells.layers["counts"], cells.X = cells.X, cells.X * 0
    write_h5ad(cells, "layered.h5ad")
    for step, more in ((MOVE, ("--to", "type=type 1")), (PARTS, ())):
        asked = ["cycle", *step, "--cells", "layered.h5ad", *more, "--out", "layered_out.h5ad", "--layer"]
        assert main([*asked, "nope"]) == 2
        assert (said := capsys.readouterr().err).endswith("say which: --layer NAME.\n") and said.count("\n") == 1 and not Path("layered_out.h5ad").exists()
        assert main([*asked, "counts"]) == 0 and main(["cycle", *step, *more, "--out", "plain_out.h5ad"]) == 0
        assert np.array_equal(read_h5ad("layered_out.h5ad").X, read_h5ad("plain_out.h5ad").X)
        Path("layered_out.h5ad").unlink()


def test_white_space_in_a_request_is_forgiven(here):
    for name, to in (("neat", "assay=assay 2"), ("loose", " assay = assay   2 ")):
        assert main(["cycle", *MOVE, "--to", to, "--out", f"{name}.h5ad"]) == 0
    assert np.array_equal(read_h5ad("neat.h5ad").X, read_h5ad("loose.h5ad").X)


def test_what_cannot_be_told_apart_is_said_with_every_answer(here, capsys):
    cells = CELLS.copy()
    cells.obs["batch"] = cells.obs["assay"].astype(str) + np.where(np.arange(240) % 2, " x", " y")  # every batch is of one assay
    write_h5ad(cells, "nested.h5ad")
    assert main(["cycle", *FIT, "--data", "nested.h5ad", "--fields", "assay", "batch", "type", "--model", "nested"]) == 0
    sentence, alone = "effects of assay cannot be told from those of batch, where they are left", "what assay does may be in batch: this answer moves nothing of it"
    assert sentence in capsys.readouterr().out
    asked = ["cycle", *MOVE, "--model", "nested", "--cells", "nested.h5ad", "--out", "nested_out.h5ad", "--to"]
    for to, lines, moves in ((("assay=assay 2",), [sentence, alone], False), (("type=type 1",), [sentence], True), (("assay=assay 2", "batch=assay 2 x"), [sentence], True)):
        assert main([*asked, *to]) == 0
        assert capsys.readouterr().out.splitlines()[2:-1] == lines
        assert read_h5ad("nested_out.h5ad").layers["difference"].any() == moves
    assert main(["cycle", *PARTS, "--model", "nested", "--cells", "nested.h5ad", "--out", "nested_out.h5ad"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told if line.endswith("not told apart")] == ["assay"] and sentence in told and " 0.0%" not in " ".join(told)


def test_contributions_say_that_contexts_do_not_add_up(here, capsys, monkeypatch):
    from dataclasses import replace

    model = load("model")
    for adds_up in (None, True, False):
        model._fitted = replace(model.fitted, adds_up=adds_up, additivity="Additivity fails: so it is.")
        monkeypatch.setattr("gears_nb.cycle.cycle.load", lambda folder: model)
        assert main(["cycle", *PARTS, "--out", "sum.h5ad"]) == 0
        assert ("Additivity fails: so it is." in capsys.readouterr().out.splitlines()) == (adds_up is False)


def test_contributions_are_written_with_their_parts(here, capsys):
    assert main(["cycle", *PARTS, "--parts", "--out", "parts.h5ad"]) == 0
    out, same, said = read_h5ad("parts.h5ad"), load("model").contributions(CELLS, parts=True), capsys.readouterr()
    assert np.allclose(out.obsm["norms"], same.obsm["norms"]) and all(np.array_equal(out.layers[name], same.layers[name]) for name in ("base", "assay", "type", "donor"))
    assert [line.split()[0] for line in said.out.splitlines()] == ["part", "base", "assay", "type", "donor", "residual", "240"] and not said.err
    assert f"{same.obsm['norms']['type'].mean():.2f}" in said.out and f"{same.uns['cycle']['influence'].loc['all', 'type']:.1%}" in said.out


def kill_in_part(folder, words, part):
    """`gears` with `words`, killed when part `part` of the training begins: no handler runs."""
    os.chdir(folder)
    from gears_nb.core import training

    real = training._epoch

    def deadly(job, state, bar):
        if state.epoch == part:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(job, state, bar)

    training._epoch = deadly
    main(words)


def test_killed_inside_a_chunk_it_goes_on_to_the_same_model(home, monkeypatch):
    monkeypatch.chdir(home)
    words = ["cycle", *FIT, *FINE]
    assert main([*words, "--model", "whole"]) == 0
    again = [*words, "--model", "again"]
    assert ended(start(kill_in_part, str(home), again, 5)) == -signal.SIGKILL
    assert not Path("again").exists() and len(list((home / "cache" / "fits").glob("cycle-*/cycle.json"))) == 1
    seen = []
    with monkeypatch.context() as patch:
        from gears_nb.core import training

        real = training._epoch
        patch.setattr(training, "_epoch", lambda job, state, bar: seen.append(state.epoch) or real(job, state, bar))
        assert main(again) == 0
    assert seen == [5, 6, 7]  # of 2 x 4 parts
    assert equal(weights("again"), weights("whole")) and not list((home / "cache" / "fits").iterdir())


def test_workers_do_not_change_the_model(here):
    assert main(["cycle", *FIT, "--workers", "1", "--model", "worked", "--set", "train.epochs=1"]) == 0
    assert main(["cycle", *FIT, "--model", "alone", "--set", "train.epochs=1"]) == 0
    assert equal(weights("worked"), weights("alone"))


def test_what_is_saved_halfway_is_not_there(here, monkeypatch, capsys):
    def halfway(model, folder):
        folder.mkdir()
        (folder / "cycle.json").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gears_nb.cycle.cycle.save", halfway)
        assert main(["cycle", *FIT, "--model", "half"]) == 130
    assert "gears cycle: interrupted. The same command continues" in capsys.readouterr().err
    assert not [path for path in here.iterdir() if "half" in path.name]
    assert main(["cycle", *FIT, "--model", "half"]) == 0 and equal(weights("half"), weights("model"))


def test_tensorboard_gets_a_log_of_its_own(here):
    pytest.importorskip("tensorboard")
    assert main(["cycle", *FIT, "--model", "logged", "--tensorboard", "logs"]) == 0
    assert list(Path("logs").glob("events*")) and equal(weights("logged"), weights("model"))


def test_training_that_was_complete_says_that_nothing_was_logged(here, monkeypatch, capsys):
    def stopped(model, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gears_nb.cycle.cycle.save", stopped)
        assert main(["cycle", *FIT, "--model", "late"]) == 130
    assert main(["cycle", *FIT, "--model", "late", "--tensorboard", "late_logs"]) == 0 and not Path("late_logs").exists()
    assert "Training was complete before this run, in the cache: nothing was written to late_logs. Model: late" in capsys.readouterr().out


def test_fit_tells_one_chunk_numbered_genes_and_cells_without_counts(here, capsys):
    few = CELLS.copy()
    few.X = sp.diags((np.arange(240) > 2).astype(np.float32)) @ few.X
    write_chunks(few, "numbered", size=300)
    (here / "numbered" / "genes.txt").unlink()
    words = "genes have numbers, not names: write genes.txt beside the chunks"
    assert main(["cycle", *PREPARE, "--data", "numbered", "--out", "numbers"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("240 cells in 1 chunk, ") and said[0].endswith(f"{load_contexts('numbers').target_sum:g} a cell (the median total)") and words in said
    assert main(["cycle", *FIT, "--data", "numbered", "--model", "numbered_model"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert words in said and "3 of 240 training cells have no counts" in said[-1]
    told = "".join((here / f"{name}.txt").read_text() for name in ("prepare", "fit"))
    assert words not in told and "have no counts" not in told and "in 4 chunks" in told


@pytest.mark.parametrize(("args", "words"), [
    ((*PREPARE, "--data", "misaligned", "--out", "x"), ("misaligned/chunk_00002.csv: rows: the matrix has 60 rows, the table 59", "in the order of the matrix")),
    ((*PREPARE, "--data", "no_table", "--out", "x"), ("no_table/chunk_00001.npz: contexts: there is no table beside this matrix", "chunk_00001.csv")),
    ((*PREPARE, "--data", "no_matrix", "--out", "x"), ("no_matrix/chunk_00003.csv: matrix: there is no matrix beside this table",)),
    ((*PREPARE, "--data", "cut", "--out", "x"), ("cut/chunk_00001.npz: file: is cut, damaged",)),
    ((*PREPARE, "--data", "malicious", "--out", "x"), ("malicious/chunk_00000.pkl: content: asks for posix.system", ".parquet or .csv")),
    ((*PREPARE, "--data", "lacking", "--out", "x", "--fields", "donor"), ("lacking/chunk_00001.csv: column 'donor': is absent",)),
    ((*PREPARE, "--data", "nothing", "--out", "x"), ("nothing: folder: there are no chunks in it",)),
    ((*PREPARE, "--data", "nowhere", "--out", "x"), ("nowhere: --data: there is no such file or folder",)),
    ((*PREPARE, "--data", "chunks", "narrow", "--out", "x"), ("narrow/chunk_00000.csv: genes: 30 genes, chunks/chunk_00000.csv has 40",)),
    ((*PREPARE, "--out", "x", "--fields", "asay"), ("column 'asay': does not exist", "assay, type, donor")),
    ((*PREPARE, "--out", "x", "--rare", "0"), ("rare: is 0",)),
    ((*PREPARE, "--out", "x", "--genes", "0"), ("n_genes: is 0",)),
    ((*PREPARE, "--out", "x", "--min-share", "2"), ("min_share: is 2.0",)),
    ((*PREPARE, "--out", "contexts"), ("contexts: --out: holds contexts already", "give another folder")),
    ((*PREPARE, "--out", "chunks"), ("chunks: --out: holds other files",)),
    ((*PREPARE, "--out", "cells.h5ad"), ("--out: is a file",)),
    ((*PREPARE,), ("required: --out",)),
    ((*FIT, "--data", "other", "--contexts", "contexts", "--model", "x"), ("other/chunk_00001.csv: row 4, column 'type': the category 'typo ", "write 'type ", "if that is meant, or preprocess these cells, or leave --contexts out.")),
    ((*FIT, "--data", "missing", "--contexts", "contexts", "--model", "x"), ("--contexts: are those of 240 cells, here are 180", "preprocess these cells")),
    ((*FIT, "--data", "narrow", "--contexts", "contexts", "--model", "x"), ("genes: 30 genes, prepared were 40", "prepare again")),
    ((*FIT, "--data", "misaligned", "--contexts", "contexts", "--model", "x"), ("misaligned/chunk_00002.csv: rows",)),
    ((*FIT, "--data", "cut", "--contexts", "contexts", "--model", "x"), ("cut/chunk_00001.npz",)),
    ((*FIT, "--contexts", "edited", "--model", "x"), ("edited/contexts",)),
    ((*FIT, "--contexts", "taken", "--model", "x"), ("taken: --contexts: holds no contexts", "gears cycle preprocess")),
    ((*FIT, "--contexts", "contexts", "--fields", "assay", "--model", "x"), ("--fields: were decided",)),
    ((*FIT, "--contexts", "contexts", "--model", "x", "--set", "cells.rare=3"), ("cells.rare: was decided when the contexts were prepared",)),
    ((*FIT, "--model", "x", "--set", "cells.workers=1"), ("write --workers 2",)),
    ((*FIT, "--model", "x", "--set", "seed=1"), ("write --seed 1",)),
    ((*FIT, "--model", "x", "--set", "net.bas=3"), ("net.base",)),
    ((*FIT, "--model", "x", "--workers", "-1"), ("workers",)),
    ((*FIT, "--model", "x", "--profile", "huge"), ("profile",)),
    ((*FIT, "--model", "model"), ("model: --model: holds a model already",)),
    ((*FIT, "--model", "taken"), ("holds other files but no model of ours",)),
    ((*FIT, "--model", "chunks"), ("holds other files",)),
    ((*FIT, "--contexts", "contexts", "--model", "contexts"), ("contexts: --model:",)),
    ((*FIT, "--model", "x", "--tensorboard", "x"), ("cannot both be there",)),
    ((*FIT, "--model", "x", "--tensorboard", "x/logs"), ("x/logs: --tensorboard: is within x",)),
    ((*FIT, "--model", "x", "--tensorboard", "chunks/logs"), ("chunks/logs: --tensorboard: is within chunks",)),
    ((*FIT, "--data", "cut", "--contexts", "contexts", "--model", "x", "--tensorboard", "contexts"), ("contexts: --tensorboard: is within contexts",)),  # before anything is read
    ((*FIT, "--data", "cut", "--model", "x", "--tensorboard", "cells.h5ad"), ("cells.h5ad: --tensorboard: is a file", "give a folder")),
    ((*PREPARE, "--data", "cells.h5ad", "--layer", "nope", "--out", "x"), ("layers/nope: does not exist", "say which: --layer NAME.")),
    ((*PREPARE, "--data", "fieldless.h5ad", "--out", "x"), ("fields: no column can be one", "name the fields: --fields COLUMN.")),
    ((*MOVE, "--to", "assay=asay 2", "--out", "x.h5ad"), ("assay 'asay 2': has no training cells", "did you mean 'assay 2'?")),
    ((*MOVE, "--to", "assy=assay 2", "--out", "x.h5ad"), ("field 'assy': is not one of the model's", "assay, type, donor")),
    ((*MOVE, "--to", "assay", "--out", "x.h5ad"), ("--to: 'assay' is no field=value",)),
    ((*MOVE, "--to", "assay=assay 1", "assay=assay 2", "--out", "x.h5ad"), ("assay comes twice",)),
    ((*MOVE, "--cells", "few.h5ad", "--to", "assay=assay 1", "--out", "x.h5ad"), ("few.h5ad: genes: 5 of the model's 40 genes are missing (first: gene 1,",)),
    ((*MOVE, "--cells", "strange.h5ad", "--to", "assay=assay 1", "--out", "x.h5ad"), ("strange.h5ad: row 7, column 'type': the category 'type 7'", "--unknown pool")),
    ((*MOVE, "--cells", "empty.h5ad", "--to", "assay=assay 1", "--out", "x.h5ad"), ("has no counts in these genes (1 such cells)",)),
    ((*MOVE, "--cells", "nowhere.h5ad", "--to", "assay=assay 1", "--out", "x.h5ad"), ("nowhere.h5ad: --cells: there is no such file or folder",)),
    ((*MOVE, "--model", "taken", "--to", "assay=assay 1", "--out", "x.h5ad"), ("taken: model: holds no saved CycleAE",)),
    ((*MOVE, "--to", "assay=assay 1", "--out", "x.csv"), ("call it x.h5ad",)),
    ((*MOVE, "--to", "assay=assay 1", "--out", "cells.h5ad"), ("is also an input",)),
    ((*MOVE, "--to", "assay=assay 1", "--out", "x.h5ad", "--mode", "kep"), ("invalid choice: 'kep'",)),
    ((*MOVE, "--out", "x.h5ad"), ("required: --to",)),
    ((*PARTS, "--out", "cells.h5ad"), ("is also an input",)),
    ((*PARTS, "--cells", "few.h5ad", "--out", "x.h5ad"), ("few.h5ad: genes: 5 of the model's 40 genes are missing",)),
    (("learn",), ("invalid choice: 'learn'",)),
])
def test_bad_input_is_one_line_and_writes_nothing(here, capsys, args, words):
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    code, said = main(["cycle", *args]), capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "Remedy: " in said and all(word in said for word in words), said
    found = sorted(path.relative_to(here) for path in here.rglob("*"))
    assert [path for path in found if path.parts[0] != "cache"] == [path for path in before if path.parts[0] != "cache"]  # of a set that fails in training a lock may stay there
    assert not (here / "owned").exists()


def test_a_model_cut_short_is_refused(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for name in ("cycle", "contexts"):
        broken = shutil.copytree(home / "model", tmp_path / name)
        file = next(broken.glob(f"{name}.*.safetensors"))
        file.write_bytes(file.read_bytes()[:-50])
        assert main(["cycle", *MOVE, "--model", str(broken), "--to", "assay=assay 1", "--out", str(tmp_path / "x.h5ad")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{name}." in said and not (tmp_path / "x.h5ad").exists()


@pytest.mark.parametrize(("step", "words"), [
    ("preprocess", ("gears cycle preprocess --data chunks --out contexts", "scipy.sparse.save_npz", "a row of contexts for every cell", "pooled as `rare`", "a single small one stays", "without a name holds the barcodes", "nested", "median total")),
    ("fit", ("gears cycle fit --data chunks --contexts contexts --model model --workers 2", "cells.checkpoint=100000", "the same command goes on", "gives other weights, equally good", "cannot be told apart")),
    ("counterfactual", ("gears cycle counterfactual --model model --cells cells.h5ad --to assay='10x v3' --out moved.h5ad", "contexts_apart", "0: seen together", "--layer NAME", "own_unknown", "median total", "relative to the average training cell")),
    ("contributions", ("gears cycle contributions --model model --cells cells.h5ad --out parts.h5ad", "obsm['norms']", "varm['effects_FIELD']", "--layer NAME", "log1p of counts", "Norms do not add up", "mostly noise")),
])
def test_help_teaches(capsys, step, words):
    with pytest.raises(SystemExit) as done:
        main(["cycle", step, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0 and all(word in text for word in words)


def test_help_and_early_refusals_import_nothing_heavy():
    heavy = "{'torch', 'scanpy', 'anndata', 'pandas', 'sklearn', 'matplotlib', 'lightning_fabric'}"
    code = f"import sys; from gears_nb.runs.cli import main\ntry: main(['cycle', 'fit', '--help'])\nexcept SystemExit: pass\nmain(['cycle', 'fit'])\nprint({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "set()"


def test_a_set_folder_is_made_whole_or_not_at_all(tmp_path):
    from gears_nb.runs.contexts import whole

    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), whole(tmp_path / "file" / "new"):
        raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "new") as stage:
        stage.mkdir()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_answer_larger_than_memory_is_refused(here, monkeypatch, capsys):
    from types import SimpleNamespace

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=240 * 40 * 4 * 14 - 1))
    assert main(["cycle", *PARTS, "--parts", "--out", "fits.h5ad"]) == 0  # 12 tables
    assert main(["cycle", *MOVE, "--to", "assay=assay 1", "--out", "x.h5ad"]) == 2
    assert "cells.h5ad: cells: an answer about 240 of them needs about" in (said := capsys.readouterr().err) and "ask about 239 at a time" in said and not Path("x.h5ad").exists()
