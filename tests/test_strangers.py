"""Inputs that strangers bring: each gives the right value, or one line, exit code 2 and no file. The right value is always another run that must agree to the bit."""
from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from forks import ended, forked, start
from test_cli import GEARS, refused, tissue

import gears_nb.reconstruct.facade as facade
from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.page import contents
from gears_nb.core.store import content_digest
from gears_nb.reconstruct.facade import MODEL_FORMAT, Gears
from gears_nb.reconstruct.settings import profile, training_digest
from gears_nb.runs.cli import main

QUICK = {"structure.guess_epochs": 2, "structure.epochs": 1, "structure.minisets_per_epoch": 8, "solve.iterations": 20}
SET = ["--profile", "smoke", "--quiet", "--set", *[f"{k}={v}" for k, v in QUICK.items()]]


def config(**changes):
    return profile("smoke", progress=False, **QUICK, **changes)


def trained_once(folder):
    """`train_all`, which trains the same reference with the same settings once: most tests here ask whether an input is
    another spelling of the slides of `home`, and if it is not, it is trained on. That two trainings agree is asked in
    tests/test_facade.py, and of processes below.
    """

    def train(reference, settings, checkpoints):
        key = training_digest(settings), reference.origin, reference.match.genes, reference.slides
        home = folder / content_digest(*key)
        if not home.exists():
            facade.write_fitted(home, TRAIN_ALL(reference, settings, checkpoints), settings)
        return facade.read_fitted(home, settings)

    return train


TRAIN_ALL = facade.train_all


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(facade, "train_all", trained_once(tmp_path_factory.mktemp("trained")))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Two slides, cells with their places, a model trained on the slides, and the cells placed by it."
    folder = tmp_path_factory.mktemp("home")
    for name, table in {"a": tissue(0), "b": tissue(1, prefix="t"), "q": tissue(2, prefix="c")}.items():
        table.write_h5ad(folder / f"{name}.h5ad")
    assert main(["fit", "--slides", str(folder / "a.h5ad"), str(folder / "b.h5ad"), "--cells", str(folder / "q.h5ad"), "--model", str(folder / "model"), *SET]) == 0
    assert main(["reconstruct", "--model", str(folder / "model"), "--cells", str(folder / "q.h5ad"), "--out", str(folder / "placed.h5ad"), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def placed(home):
    return ad.read_h5ad(home / "placed.h5ad")


@pytest.fixture
def here(home, tmp_path):
    "A folder of one's own with links to the shared files."
    for path in home.iterdir():
        os.symlink(path, tmp_path / path.name)
    return tmp_path


def place(here, cells, out="out.h5ad", *more):
    "Place cells (a table or a file name) with the saved model; the exit code."
    if not isinstance(cells, str):
        cells.write_h5ad(here / "cells.h5ad")
        cells = "cells.h5ad"
    return main(["reconstruct", "--model", str(here / "model"), "--cells", str(here / cells), "--out", str(here / out), "--quiet", *more])


def learn(here, slides, cells="q.h5ad", out="out.h5ad", *more):
    "Learn from slides (tables or file names) and place; the exit code."
    names = []
    for i, slide in enumerate(slides):
        if not isinstance(slide, str):
            slide.write_h5ad(here / f"slide{i}.h5ad")
            slide = f"slide{i}.h5ad"
        names.append(str(here / slide))
    return main(["reconstruct", "--slides", *names, "--cells", str(here / cells), "--out", str(here / out), *SET, *more])


def where(path):
    return ad.read_h5ad(path).obsm["X_gears"]


def cells_of(home):
    return ad.read_h5ad(home / "q.h5ad")


# no input is ever written over ----------------------------------------------------------------------------------------


def _spellings(here):
    "Ten names of the file `q.h5ad`, which is an input."
    os.makedirs(here / "deep")
    os.symlink(here / "q.h5ad", here / "link.h5ad")
    os.symlink("link.h5ad", here / "second.h5ad")
    os.symlink(here, here / "deep" / "up")
    os.symlink("nowhere.h5ad", here / "dangling.h5ad")
    real = os.path.realpath(here / "q.h5ad")
    return {"plain": here / "q.h5ad", "dot": f"{here}/./q.h5ad", "up and down": here / "deep" / ".." / "q.h5ad", "link": here / "link.h5ad", "link to a link": here / "second.h5ad",
            "linked folder": here / "deep" / "up" / "q.h5ad", "real": real, "double slash": f"{here}//q.h5ad", "relative": os.path.relpath(here / "q.h5ad"),
            "through a link and back": here / "deep" / "up" / "deep" / ".." / "q.h5ad"}


SPELLINGS = ["plain", "dot", "up and down", "link", "link to a link", "linked folder", "real", "double slash", "relative", "through a link and back"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_input_is_never_an_output(spelling, here, capsys):
    before, out = (here / "q.h5ad").read_bytes(), str(_spellings(here)[spelling])
    run = lambda cells, *more: lambda: main(["reconstruct", "--model", str(here / "model"), "--cells", cells, "--out", out, "--quiet", *more])
    refused(capsys, here, run(str(here / "q.h5ad")), "--out", "is also an input")
    refused(capsys, here, run(f"{here / 'q.h5ad'}#somewhere"), "--out", "is also an input")
    assert (here / "q.h5ad").read_bytes() == before


def test_other_outputs_and_commands_ask_the_same_question(here, capsys):
    "Report, model folder, exported page, diagnosis; a hard link; a page that is a link to an input; a file of an input folder; a Zarr store."
    shutil.copy(here / "q.h5ad", here / "own.h5ad")
    os.symlink(here / "own.h5ad", here / "page.html")
    os.link(here / "own.h5ad", here / "hard.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a format to come
        ad.read_h5ad(here / "a.h5ad").write_zarr(here / "a.zarr")
    (here / "pair").mkdir()
    table = ad.read_h5ad(here / "a.h5ad")
    table.to_df().to_csv(here / "pair" / "expr.csv")
    pd.DataFrame(table.obsm["spatial"], index=table.obs_names, columns=["x", "y"]).to_csv(here / "pair" / "coords.csv")
    os.symlink(here / "pair" / "coords.csv", here / "chart.html")
    base = ["reconstruct", "--model", str(here / "model"), "--cells", str(here / "own.h5ad"), "--quiet", "--out"]
    new = [*base, str(here / "o.h5ad")]
    page = str(here / "page.html")
    for argv, word in ((new + ["--report", page], "--report"), ([*base, str(here / "hard.h5ad")], "--out"),
                       (["explore", str(here / "own.h5ad"), "--export", page], "--export"),
                       (["diagnose", "--slides", str(here / "own.h5ad"), str(here / "a.h5ad"), "--report", page], "--report"),
                       (["readiness", "--slides", str(here / "own.h5ad"), str(here / "a.h5ad"), "--report", page], "--report"),
                       (["fit", "--slides", str(here / "pair"), "--model", str(here / "pair"), *SET], "--model-dir"),
                       (["reconstruct", "--slides", str(here / "pair"), "--cells", str(here / "q.h5ad"), "--out", str(here / "o.h5ad"), "--report", str(here / "chart.html")], "--report"),
                       (["reconstruct", "--slides", str(here / "a.zarr"), "--cells", str(here / "q.h5ad"), "--out", str(here / "a.zarr" / "X" / "o.h5ad")], "--out"),
                       (["fit", "--slides", str(here / "a.zarr"), "--model", str(here / "a.zarr" / "model"), *SET], "--model-dir"),
                       ([*base, str(here / "m.h5ad"), "--model", str(here / "m.h5ad")], "m.h5ad")):
        refused(capsys, here, lambda argv=argv: main(argv), word)


# no evidence, no position ---------------------------------------------------------------------------------------------


def test_cells_without_counts_and_shallow_ones_get_a_note(here, home, placed, capsys):
    cells = cells_of(home)
    X = cells.X.toarray()
    X[[3, 4]] = 0
    floor = json.loads(placed.uns["gears"]["evidence"])["floor"]
    cells = ad.concat([ad.AnnData(X, obs=cells.obs, var=cells.var), ad.AnnData(np.eye(1, 91, 90, dtype=np.float32), obs=pd.DataFrame(index=["elsewhere"]),
                                                                              var=pd.DataFrame(index=[*cells.var_names, "Unshared"]))], join="outer", fill_value=0)
    assert place(here, cells) == 0
    out, err = capsys.readouterr()
    result = ad.read_h5ad(here / "out.h5ad")
    notes = result.obs["gears_note"].astype(str)
    assert list(notes[["c3", "c4", "elsewhere", "c5"]]) == ["no counts", "no counts", "no counts in the shared genes", ""]
    lost = notes != ""
    assert np.isnan(result.obsm["X_gears"][lost]).all() and np.isfinite(result.obsm["X_gears"][~lost]).all()
    assert result.obs["gears_confidence"][lost].isna().all() and lost.sum() == 3
    assert "98 of 101 cells placed" in out and "2 without a place: no counts" in out
    printed = {line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")}
    assert printed and printed <= set(json.loads(result.uns["gears"]["warnings"])) and floor >= 1


def test_the_floor_is_measured_and_confidence_knows_depth(home):
    "With a model that needs 40 counts: cells with fewer have no place, and thinner cells are never surer."
    model = Gears.load(home / "model")
    model._fitted.evidence = facade.Evidence((1.0, 40.0, 80.0, 160.0), (0.0, 0.05, 0.5, 1.0))
    cells = cells_of(home)
    full = model.reconstruct(cells).obs["gears_confidence"]
    thin, rng = cells.copy(), np.random.default_rng(0)
    thin.X = cells.X.toarray()
    for row, n in ((0, 20), (1, 60), (2, 100)):
        thin.X[row] = rng.binomial(thin.X[row].astype(int), n / thin.X[row].sum())
    with pytest.warns(GearsWarning, match="fewer than"):
        result = model.reconstruct(thin)
    sure = result.obs["gears_confidence"]
    assert np.isnan(sure.iloc[0]) and result.obs["gears_note"].iloc[0].startswith("fewer than")
    assert sure.iloc[1] < 0.6 * full.iloc[1] and sure.iloc[2] < 0.9 * full.iloc[2]


def test_nothing_but_shallow_cells_is_refused_and_little_more_is_said(home):
    model, cells = Gears.load(home / "model"), cells_of(home)
    model._fitted.evidence = facade.Evidence((1.0, 1e6, 1e7), (0.0, 0.05, 1.0))
    with pytest.raises(InputError, match="no cell has"):
        model.reconstruct(cells)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_map_needs_four_cells(n, here, home, capsys):
    few = cells_of(home)[:n].copy()
    few.write_h5ad(here / "few.h5ad")
    refused(capsys, here, lambda: main(["reconstruct", "--slides", str(here / "a.h5ad"), str(here / "b.h5ad"), "--cells", str(here / "few.h5ad"), "--out", str(here / "o.h5ad"),
                                        "--report", str(here / "o.html"), *SET]), "few.h5ad", "n_obs", "at least 4")
    with pytest.raises(InputError, match="at least 4"):
        Gears.load(home / "model").reconstruct(few)


def test_a_handful_is_placed_and_called_rough(here, home, capsys):
    assert place(here, cells_of(home)[:12].copy(), "twelve.h5ad", "--report", str(here / "twelve.html")) == 0
    assert "Spearman" in (here / "twelve.html").read_text()
    assert place(here, cells_of(home)[:6].copy(), "out.h5ad", "--report", str(here / "out.html")) == 0
    assert "6 cells are few" in capsys.readouterr().err
    assert np.isfinite(where(here / "out.h5ad")).all()
    assert "Too few cells for scores" in (here / "out.html").read_text()


# the query's places never spoil a run ---------------------------------------------------------------------------------


PLACES = {"nan": lambda n: np.full((n, 2), np.nan), "some nan": lambda n: np.r_[np.full((30, 2), np.nan), np.random.default_rng(0).random((n - 30, 2))],
          "zeros": lambda n: np.zeros((n, 2)), "one column": lambda n: np.arange(n, dtype=float)[:, None], "three columns": lambda n: np.random.default_rng(0).random((n, 3)),
          "sentinels": lambda n: np.r_[np.full((20, 2), -1.0), np.random.default_rng(0).random((n - 20, 2))], "infinite": lambda n: np.full((n, 2), np.inf),
          "huge": lambda n: np.random.default_rng(0).random((n, 2)) * 1e300, "integers": lambda n: np.arange(2 * n).reshape(n, 2), "line": lambda n: np.c_[np.arange(n), np.zeros(n)]}


@pytest.mark.parametrize("kind", PLACES)
def test_places_of_the_query_never_spoil_a_run(kind, here, home, placed):
    cells = cells_of(home)
    cells.obsm["spatial"] = PLACES[kind](cells.n_obs)
    assert place(here, cells, "out.h5ad", "--report", str(here / "out.html")) == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])
    tissues = contents((here / "out.html").read_text())["data"]["tissues"]
    assert len(tissues) == 1 and tissues[0]["maps"][-1]["title"].startswith("reconstructed")


# sections -------------------------------------------------------------------------------------------------------------


def two_sections(home, **columns):
    two = ad.concat([cells_of(home), tissue(9, n=70, prefix="r")])
    for name, labels in columns.items():
        two.obs[name] = np.repeat(labels, [100, 70])
    return two


@pytest.mark.parametrize("column", ["slide", "library_id", "sample", "patient"])
def test_sections_of_a_query_are_placed_apart(column, here, home, placed, capsys):
    "Each as if it were alone; also from Python; `none` puts them together."
    two = two_sections(home, **{column: ["A", "B"]})
    more = ["--slide-key", "patient"] if column == "patient" else []
    assert place(here, two, "out.h5ad", *more, "--report", str(here / "out.html")) == 0
    assert "2 sections" in capsys.readouterr().err
    result, model = ad.read_h5ad(here / "out.h5ad"), Gears.load(home / "model", {"progress": False})
    alone = model.reconstruct(tissue(9, n=70, prefix="r")).obsm["X_gears"]
    np.testing.assert_array_equal(result.obsm["X_gears"], np.r_[placed.obsm["X_gears"], alone])
    assert list(result.obs["gears_section"].unique()) == ["A", "B"] and result.obsp["gears_distances"][:100, 100:].nnz == 0
    assert [t["name"] for t in contents((here / "out.html").read_text())["data"]["tissues"]] == ["cells.h5ad, section A", "cells.h5ad, section B"]
    with pytest.warns(GearsWarning, match="2 sections"):
        np.testing.assert_array_equal(model.reconstruct(two, slide_key="patient" if more else None).obsm["X_gears"], result.obsm["X_gears"])
    together = model.reconstruct(two, slide_key="none").obsm["X_gears"]
    assert "gears_section" not in model.reconstruct(two, slide_key="none").obs and not np.array_equal(together, result.obsm["X_gears"])


def test_a_tiny_section_is_left_without_places(home):
    two = two_sections(home, slide=["A", "B"])[:102].copy()
    with pytest.warns(GearsWarning, match="2 sections"), pytest.warns(GearsWarning, match="section B has 2 cells"):
        result = Gears.load(home / "model", {"progress": False}).reconstruct(two)
    assert np.isnan(result.obsm["X_gears"][100:]).all() and set(result.obs["gears_note"][100:]) == {"fewer than 4 cells in this section"}


def test_evaluate_wants_one_section_of_several(here, home, capsys):
    assert place(here, two_sections(home, slide=["A", "B"])) == 0
    capsys.readouterr()
    refused(capsys, here, lambda: main(["evaluate", str(here / "out.h5ad"), str(here / "q.h5ad")]), "gears_section", "#A")
    assert main(["evaluate", f"{here / 'out.h5ad'}#A", str(here / "q.h5ad"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 100


def test_sections_of_slides_are_those_of_two_files(here, home, placed):
    "However two sections come in one table, they teach what two files teach; also turned and overlapping."
    a, b = ad.read_h5ad(here / "a.h5ad"), ad.read_h5ad(here / "b.h5ad")
    one = ad.concat([a, b])
    for column, more in (("library_id", []), ("sample", []), ("batch", ["--slide-key", "batch"])):
        table = one.copy()
        table.obs[column] = np.repeat(["L1", "L2"], [a.n_obs, b.n_obs])
        table.uns["spatial"] = {"L1": {"scalefactors": {}}, "L2": {"scalefactors": {}}}
        assert learn(here, [table], "q.h5ad", "out.h5ad", *more) == 0
        np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])
    one.obs["batch"] = np.repeat(["L1", "L2"], [a.n_obs, b.n_obs])
    together = Gears(config()).fit(one, slide_key="batch")
    assert together.fitted.origin == Gears(config()).fit([a, b]).fitted.origin


def test_several_sections_without_a_key_are_refused(here, home, capsys):
    one = ad.concat([ad.read_h5ad(here / "a.h5ad"), ad.read_h5ad(here / "b.h5ad")])
    one.uns["spatial"] = {"L1": {"scalefactors": {}}, "L2": {"scalefactors": {}}}
    one.write_h5ad(here / "one.h5ad")
    refused(capsys, here, lambda: learn(here, ["one.h5ad"]), "one.h5ad", "L1, L2", "--slide-key")
    with pytest.raises(InputError, match="slide_key="):
        Gears(config()).fit(one)
    refused(capsys, here, lambda: main(["reconstruct", "--model", str(here / "model"), "--cells", str(here / "one.h5ad"), "--out", str(here / "o.h5ad")]), "one.h5ad", "--slide-key none")


def test_a_slide_without_a_list_and_a_backed_one(here, home):
    a = ad.read_h5ad(here / "a.h5ad")
    alone = Gears(config()).fit(a).fitted.origin
    assert alone == Gears(config()).fit([ad.read_h5ad(here / "a.h5ad", backed="r")]).fitted.origin == Gears(config()).fit([a]).fitted.origin
    with pytest.raises(InputError, match="not an AnnData"):
        Gears(config()).fit([str(here / "a.h5ad")])
    backed = ad.read_h5ad(here / "q.h5ad", backed="r")
    model = Gears.load(home / "model", {"progress": False})
    np.testing.assert_array_equal(model.reconstruct(backed).obsm["X_gears"], where(home / "placed.h5ad"))


def test_the_same_section_twice_is_said_and_used_once(here, capsys):
    assert learn(here, ["a.h5ad", "b.h5ad", "a.h5ad"]) == 0
    assert "used once" in capsys.readouterr().err
    np.testing.assert_array_equal(where(here / "out.h5ad"), where(here / "placed.h5ad"))
    assert any("used once" in line for line in json.loads(ad.read_h5ad(here / "out.h5ad").uns["gears"]["warnings"]))
    assert learn(here, ["a.h5ad", "b.h5ad"], "a.h5ad") == 0
    assert "no prediction" in capsys.readouterr().err


# positions that are not positions -------------------------------------------------------------------------------------


def moved(here, change):
    slides = [ad.read_h5ad(here / f"{n}.h5ad") for n in "ab"]
    for slide in slides:
        slide.obsm["spatial"] = change(np.asarray(slide.obsm["spatial"], dtype=np.float64))
    return slides


@pytest.mark.parametrize("change", [lambda c: c + 1e12, lambda c: c * 2.0**100, lambda c: c * 2.0**-100, lambda c: c * 2.0**600, lambda c: -c], ids=["offset", "large", "tiny", "enormous", "negative"])
def test_unit_and_origin_do_not_matter(change, here, placed):
    assert learn(here, moved(here, change)) == 0
    np.testing.assert_allclose(where(here / "out.h5ad"), placed.obsm["X_gears"], atol=0.02)


def test_a_far_spot_and_placeholders_are_set_aside_as_if_they_were_absent(here, capsys):
    bad = ad.read_h5ad(here / "a.h5ad")
    bad.obsm["spatial"][0] = 1e9
    bad.obsm["spatial"][[5, 6, 7]] = -1.0
    assert learn(here, [bad, "b.h5ad"]) == 0
    said = capsys.readouterr().err
    assert "far off (s0)" in said and "placeholder position" in said
    got = where(here / "out.h5ad")
    clean = ad.read_h5ad(here / "a.h5ad")
    keep = np.setdiff1d(np.arange(clean.n_obs), [0, 5, 6, 7])
    assert learn(here, [clean[keep].copy(), "b.h5ad"]) == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), got)


def test_a_plane_of_three_axes(here, placed, capsys):
    slides = moved(here, lambda c: np.c_[c[:, 0], np.random.default_rng(0).random(len(c)), c[:, 1]])
    for i, slide in enumerate(slides):
        slide.write_h5ad(here / f"deep{i}.h5ad")
    refused(capsys, here, lambda: learn(here, ["deep0.h5ad", "deep1.h5ad"]), "obsm['spatial']", "--plane")
    assert learn(here, ["deep0.h5ad", "deep1.h5ad"], "q.h5ad", "out.h5ad", "--plane", "xz") == 0
    np.testing.assert_allclose(where(here / "out.h5ad"), placed.obsm["X_gears"], atol=0.02)


# training is not thrown away ------------------------------------------------------------------------------------------


def never(*_, **__):
    pytest.fail("trained again")


@pytest.mark.parametrize("fault", ["interrupt", "full disk", "unwritable report"])
def test_a_fault_after_training_costs_the_layout_only(fault, here, placed, monkeypatch, tmp_path_factory, capsys):
    import gears_nb.data.io as io

    cache = tmp_path_factory.mktemp("own")
    monkeypatch.setenv("GEARS_CACHE", str(cache))
    report = ["--report", str(here / "out.html"), "--model", str(here / "new")]
    with monkeypatch.context() as patch:
        if fault == "interrupt":
            def stop(*_, **__):
                raise KeyboardInterrupt
            patch.setattr(facade, "lay_out", stop)
        elif fault == "full disk":
            def full(*_, **__):
                raise OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(io, "write_h5ad", full)
        else:
            import gears_nb.runs.report as report_module

            def refuse(*_, **__):
                raise InputError("report", "x", "cannot be made", "wait")
            patch.setattr(report_module, "render_report", refuse)
        code = learn(here, ["a.h5ad", "b.h5ad"], "q.h5ad", "out.h5ad", *report)
    said = capsys.readouterr().err
    assert code == {"interrupt": 130, "full disk": 1, "unwritable report": 2}[fault], said
    assert not (here / "out.h5ad").exists() and not (here / "out.html").exists() and not [p for p in here.rglob("*") if ".tmp" in p.name]
    if fault == "full disk":
        assert "No space left" in said and "not the training" in said
    else:
        assert not (here / "new").exists()
    monkeypatch.setattr(facade, "train_all", never)
    assert learn(here, ["a.h5ad", "b.h5ad"], "q.h5ad", "out.h5ad", *report) == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])
    assert not list((cache / "fits").iterdir()) and (here / "new" / "gears.json").is_file()


def test_what_cannot_be_written_back_is_found_before_training(here, home, placed, capsys, monkeypatch):
    cells = cells_of(home)
    cells.obs["mixed"] = ["a", 1] * 50
    cells.uns["secret"] = object()
    model = Gears.load(home / "model", {"progress": False})
    with pytest.warns(GearsWarning) as seen:
        result = model.reconstruct(cells)
    assert any("mixed" in str(w.message) for w in seen) and any("secret" in str(w.message) for w in seen)
    result.write_h5ad(here / "own.h5ad")  # anndata's own writer
    assert list(ad.read_h5ad(here / "own.h5ad").obs["mixed"][:2]) == ["a", "1"] and "secret" in cells.uns
    with ad.settings.override(allow_write_nullable_strings=True):
        cells = cells_of(home)
        cells.obs["label"] = pd.array(["u", None] * 50, dtype="string")
        cells.obs.index, cells.var.index = cells.obs.index.astype("string"), cells.var.index.astype("string")
        cells.write_h5ad(here / "cells.h5ad")
    assert place(here, "cells.h5ad") == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])
    assert ad.read_h5ad(here / "out.h5ad").obs["label"].isna().sum() == 50


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/sys").is_dir(), reason="needs a place where nobody may write")
@pytest.mark.parametrize("flag", ["--out", "--report", "--model"])
def test_a_place_that_takes_no_write_is_found_first(flag, here, capsys):
    targets = {"--out": "/proc/sys/out.h5ad", "--report": "/proc/sys/out.html", "--model": "/proc/sys/model"}
    more = [] if flag == "--out" else [flag, targets[flag]]
    out = targets["--out"] if flag == "--out" else str(here / "o.h5ad")
    run = lambda: main(["reconstruct", "--slides", str(here / "a.h5ad"), "--cells", str(here / "q.h5ad"), "--out", out, *SET, *more])
    refused(capsys, here, run, "cannot be written", flag if flag != "--model" else "--model-dir")


# job arrays -----------------------------------------------------------------------------------------------------------


def _as_a_fork(argv, folder, cache, said):
    os.chdir(folder)
    os.environ["GEARS_CACHE"] = str(cache)
    facade.train_all = TRAIN_ALL
    sys.stderr = open(said, "w")
    sys.exit(main(argv))


def at_once(commands, folder, cache):
    "gears commands, each in a process of its own, a fork, which imports nothing again: exit codes and what they said."
    said = [folder / f"said{i}.txt" for i in range(len(commands))]
    runs = [start(_as_a_fork, argv, folder, cache, path) for argv, path in zip(commands, said)]
    return [ended(run) for run in runs], [path.read_text() for path in said]


@forked
def test_two_runs_with_one_reference_share_the_training(here, placed, tmp_path_factory):
    cache = tmp_path_factory.mktemp("shared")
    command = ["reconstruct", "--slides", "a.h5ad", "b.h5ad", "--cells", "q.h5ad", "--model", "both", *SET, "--out"]
    codes, said = at_once([[*command, f"{n}.h5ad"] for n in "xy"], here, cache)
    assert codes == [0, 0], said
    for n in "xy":
        np.testing.assert_array_equal(where(here / f"{n}.h5ad"), placed.obsm["X_gears"])
    assert not list((cache / "fits").iterdir())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_no_half_file(how, here, tmp_path_factory):
    "Stopped while it trains; one line, the right exit code, nothing left beside the inputs."
    env = {**os.environ, "GEARS_CACHE": str(tmp_path_factory.mktemp("stopped")), "OMP_NUM_THREADS": "1"}
    before = sorted(p.name for p in here.iterdir())
    run = subprocess.Popen([GEARS, "reconstruct", "--slides", "a.h5ad", "b.h5ad", "--cells", "q.h5ad", "--out", "o.h5ad", "--profile", "smoke", "--set", "structure.guess_epochs=100000"],
                           cwd=here, env=env, stderr=subprocess.PIPE, bufsize=0,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell lets what it starts in the background ignore SIGINT
    seen = b""
    while b"guess-0" not in seen and run.poll() is None:
        seen += run.stderr.read(64)
    run.send_signal(how)
    seen += run.communicate(timeout=60)[1]
    assert run.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[how] and b"same command continues" in seen
    assert sorted(p.name for p in here.iterdir()) == before


# model folders --------------------------------------------------------------------------------------------------------


def test_a_model_of_python_is_one_of_the_command_line(here, placed):
    tables = [ad.read_h5ad(here / f"{n}.h5ad") for n in "ab"]
    Gears(config()).fit(tables, cells_of(here)).save(here / "python")
    assert learn(here, ["a.h5ad", "b.h5ad"], "q.h5ad", "out.h5ad", "--model", str(here / "python")) == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])
    again = Gears.load(here / "model", {"progress": False}).reconstruct(cells_of(here))
    np.testing.assert_array_equal(again.obsm["X_gears"], placed.obsm["X_gears"])


def edited(here, change):
    "A copy of the model whose record was changed by hand."
    folder = here / "edited"
    shutil.copytree(here / "model", folder)
    text = (folder / "gears.json").read_text()
    (folder / "gears.json").write_text(change(text))
    return folder


EDITS = {"future format": (lambda t: t.replace('"format": 2', '"format": 99'), "format"), "future model": (lambda t: t.replace(f'"format": {MODEL_FORMAT}', '"format": 99'), "seal"),
         "cut short": (lambda t: t[: len(t) // 2], "not readable"), "empty": (lambda t: "", "not readable"), "no object": (lambda t: "[1]", "not readable"),
         "another seed": (lambda t: t.replace('"seed": 0', '"seed": 1'), "edited"), "another gene": (lambda t: t.replace("Gene7\"", "Gene700\""), "edited"),
         "another weight file": (lambda t: t.replace(".safetensors", "x.safetensors"), "edited"), "a file elsewhere": (lambda t: t.replace('"tensors": "', '"tensors": "../'), "edited"), "no seal": (lambda t: t.replace('"seal"', '"sea"'), "edited"),
         "text": (lambda t: "pickle", "not readable")}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_one_line(edit, here, capsys):
    change, word = EDITS[edit]
    folder = edited(here, change)
    refused(capsys, here, lambda: main(["reconstruct", "--model", str(folder), "--cells", str(here / "q.h5ad"), "--out", str(here / "o.h5ad")]), "gears.json", word)


def test_weights_are_sealed_and_folders_are_for_the_group(here, capsys):
    folder = edited(here, lambda t: t)
    weights = next(folder.glob("*.safetensors"))
    assert weights.stat().st_mode & 0o044 == 0o044 & ~_umask()
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(bytes(raw))
    refused(capsys, here, lambda: main(["reconstruct", "--model", str(folder), "--cells", str(here / "q.h5ad"), "--out", str(here / "o.h5ad")]), "does not match its digest")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_settings_of_the_layout_may_change_and_those_of_training_may_not(here, placed, capsys):
    assert place(here, "q.h5ad", "out.h5ad", "--set", "solve.even=0", "patches.overlap=4", "--seed", "3") == 0
    about = json.loads(ad.read_h5ad(here / "out.h5ad").uns["gears"]["config"])
    assert about["patches"]["overlap"] == 4 and about["seed"] == 3 and not np.array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])
    assert place(here, "q.h5ad", "moved.h5ad", "--set", "encoder.align=transport") == 0  # how a query is moved is no matter of training
    assert json.loads(ad.read_h5ad(here / "moved.h5ad").uns["gears"]["alignment"])["align"] == "transport"
    assert not np.array_equal(where(here / "moved.h5ad"), placed.obsm["X_gears"])
    for made in ("out.h5ad", "moved.h5ad"):
        (here / made).unlink()
    for more in (["--set", "structure.heads=2"], ["--profile", "toy"], ["--min-genes", "20"], ["--set", "encoder.metric.dim=8"]):
        refused(capsys, here, lambda more=more: place(here, "q.h5ad", "out.h5ad", *more), "model", "training")
    with pytest.raises(InputError, match="shaped the training"):
        Gears.load(here / "model", {"structure.beta": 1.0})


def test_a_model_of_other_slides_is_refused_and_one_of_these_is_used(here, placed, capsys, monkeypatch):
    refused(capsys, here, lambda: learn(here, ["a.h5ad"], "q.h5ad", "o.h5ad", "--model", str(here / "model")), "--model-dir", "slides")
    monkeypatch.setattr(facade, "train_all", never)
    assert learn(here, ["a.h5ad", "b.h5ad"], "q.h5ad", "out.h5ad", "--model", str(here / "model")) == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])


def test_quiet_is_quiet_with_a_saved_model(here, capsys):
    assert place(here, "q.h5ad") == 0
    assert "patches" not in capsys.readouterr().err
    assert main(["reconstruct", "--model", str(here / "model"), "--cells", str(here / "q.h5ad"), "--out", str(here / "loud.h5ad")]) == 0
    assert "patches" in capsys.readouterr().err


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more, words", [
    (["--seed", "-1"], ["seed", "-1"]), (["--set", "seed=5"], ["seed", "--seed 5"]), (["--set", "structure.heads=7"], ["structure.heads", "--set structure.heads=8"]),
    (["--set", "profile=toy"], ["profile", "--profile toy"]), (["--set", "device=cuda:7"], ["device", "auto"]), (["--set", "structure.model=d8"], ["structure.model", "d7"]),
    (["--set", "patches.size=16"], ["patches.landmarks", "--set patches.landmarks=4"]), (["--slide-key", "nowhere"], ["nowhere", "obs"]), (["--layer", "nowhere"], ["nowhere"]),
    (["--plane", "yx"], ["--plane"]), (["--set", "patches.allow_islands=perhaps"], ["allow_islands"]),
])
def test_an_option_that_cannot_be_is_refused_before_training(more, words, here, capsys, monkeypatch):
    monkeypatch.setattr(facade, "train_all", never)
    argv = ["reconstruct", "--slides", str(here / "a.h5ad"), str(here / "b.h5ad"), "--cells", str(here / "q.h5ad"), "--out", str(here / "o.h5ad"), "--profile", "smoke", "--quiet"]
    refused(capsys, here, lambda: main([*argv, *more]), *words)


def test_remedies_speak_the_language_of_the_reader(here, home, capsys):
    few = ad.read_h5ad(here / "q.h5ad")
    few.var_names = [*few.var_names[:20], *[f"Other{i}" for i in range(70)]]
    few.write_h5ad(here / "few.h5ad")
    refused(capsys, here, lambda: learn(here, ["a.h5ad"], "few.h5ad"), "--min-genes")
    with pytest.raises(InputError, match="min_genes=") as caught:
        Gears(config()).fit([ad.read_h5ad(here / "a.h5ad")], few)
    assert "--" not in caught.value.remedy
    small = ad.read_h5ad(here / "a.h5ad")[:40].copy()
    small.write_h5ad(here / "small.h5ad")
    refused(capsys, here, lambda: learn(here, ["small.h5ad"]), "small.h5ad", "40 spots", "--set structure.miniset=")


def test_the_version_and_a_folder_as_truth(here, capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out.startswith("gears_nb ")
    (here / "folder").mkdir()
    refused(capsys, here, lambda: main(["evaluate", str(here / "placed.h5ad"), str(here / "folder")]), "folder")


def test_counts_in_a_layer(here, home, placed, capsys):
    for name in "abq":
        table = ad.read_h5ad(here / f"{name}.h5ad")
        table.layers["raw_counts"] = table.X.copy()
        table.X = np.log1p(table.X.toarray() / 7)
        table.write_h5ad(here / f"log-{name}.h5ad")
    refused(capsys, here, lambda: learn(here, ["log-a.h5ad", "log-b.h5ad"], "log-q.h5ad"), "log-a.h5ad", "--layer raw_counts")
    assert learn(here, ["log-a.h5ad", "log-b.h5ad"], "log-q.h5ad", "out.h5ad", "--layer", "raw_counts") == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])


def test_many_cells_say_where_they_are_within_two_seconds(home, monkeypatch, capsys):
    "Every stage without a bar of its own is announced when it lasts."
    import time

    import gears_nb.reconstruct.patchwise as patchwise

    slow = lambda f: lambda *a, **k: (time.sleep(1.3), f(*a, **k))[1]
    for name in ("build_graph", "_stitched", "solve_distances"):
        monkeypatch.setattr(patchwise, name, slow(getattr(patchwise, name)))
    Gears.load(home / "model", {"progress": True}).reconstruct(cells_of(home))
    said = capsys.readouterr().err
    for words in ("neighbour graph of 100 cells", "stitching the patches", "solving one map"):
        assert words in said


# what a tester found ---------------------------------------------------------------------------------------------------


def test_a_model_is_an_input_once_it_is_there(here, capsys):
    model = here / "own"
    shutil.copytree(here / "model", model)
    before = (model / "gears.json").read_bytes()
    os.symlink(model / "gears.json", here / "page.html")
    os.symlink(next(model.glob("*.safetensors")), here / "weights.h5ad")
    run = lambda *more: lambda: main(["reconstruct", "--model", str(model), "--cells", str(here / "q.h5ad"), "--quiet", *more])
    refused(capsys, here, run("--out", str(here / "o.h5ad"), "--report", str(here / "page.html")), "--report", "is also an input")
    refused(capsys, here, run("--out", str(here / "weights.h5ad")), "--out", "is also an input")
    refused(capsys, here, lambda: main(["explore", str(here / "placed.h5ad"), "--model-dir", str(model), "--export", str(here / "page.html")]), "--export", "is also an input")
    refused(capsys, here, lambda: main(["reconstruct", "--model", str(here / "o.h5ad" / "m"), "--cells", str(here / "q.h5ad"), "--slides", str(here / "a.h5ad"), "--out", str(here / "o.h5ad")]),
            "cannot both be there")
    assert (model / "gears.json").read_bytes() == before


def test_the_key_that_a_query_is_offered_works(here, home, placed, capsys):
    "Libraries without a column, columns that disagree, a gap: each remedy of the refusal is followed."
    cells = cells_of(home)
    cells.uns["spatial"] = {"L1": {"images": {}}, "L2": {"images": {}}}
    cells.write_h5ad(here / "lib.h5ad")
    refused(capsys, here, lambda: place(here, "lib.h5ad"), "--slide-key none")
    assert place(here, "lib.h5ad", "out.h5ad", "--slide-key", "none") == 0
    np.testing.assert_array_equal(where(here / "out.h5ad"), placed.obsm["X_gears"])
    two = two_sections(home, library_id=["A", "B"])
    two.obs["sample"] = np.tile(["k", "l"], 85)
    two.write_h5ad(here / "two.h5ad")
    refused(capsys, here, lambda: place(here, "two.h5ad", "o2.h5ad"), "--slide-key library_id")
    assert place(here, "two.h5ad", "o2.h5ad", "--slide-key", "library_id") == 0
    np.testing.assert_array_equal(where(here / "o2.h5ad")[:100], placed.obsm["X_gears"])


def test_labels_may_hold_any_words(here, home):
    two = two_sections(home, slide=["liver, section 1", "liver, section 2"])
    assert place(here, two, "out.h5ad", "--report", str(here / "out.html")) == 0
    assert [t["name"] for t in contents((here / "out.html").read_text())["data"]["tissues"]] == ["cells.h5ad, section liver, section 1", "cells.h5ad, section liver, section 2"]


def test_a_placed_table_is_placed_again_and_old_columns_go(here, home, placed):
    assert place(here, two_sections(home, slide=["A", "B"])) == 0
    assert place(here, "out.h5ad", "again.h5ad", "--slide-key", "none") == 0
    assert "gears_section" not in ad.read_h5ad(here / "again.h5ad").obs
    cells = cells_of(home)
    cells.obs.index.name = "gears_note"
    with pytest.warns(GearsWarning, match="no longer called gears_note"):
        result = Gears.load(home / "model", {"progress": False}).reconstruct(cells)
    assert any("no longer called" in line for line in json.loads(result.uns["gears"]["warnings"]))


@forked
def test_two_fits_into_one_folder_do_not_both_win(here, tmp_path_factory):
    fits = [["fit", "--slides", f"{n}.h5ad", "--model", "mm", *SET] for n in "ab"]
    codes, said = at_once(fits, here, tmp_path_factory.mktemp("race"))
    assert sorted(codes) in ([0, 1], [0, 2]), said  # the later one was refused before training, or told after it
    assert not (here / "mm.train").exists()


def test_profiles_that_are_all_alike_are_refused(home):
    cells = cells_of(home)
    cells.X = np.tile(cells.X[0].toarray(), (cells.n_obs, 1))
    with pytest.raises(InputError, match="same profile"):
        Gears.load(home / "model", {"progress": False}).reconstruct(cells)


def test_a_cache_that_takes_no_write_is_found_first(here, capsys, monkeypatch):
    monkeypatch.setenv("GEARS_CACHE", "/proc/sys/cache")
    refused(capsys, here, lambda: learn(here, ["a.h5ad"]), "GEARS_CACHE")


def test_no_table_is_one_line_from_python_too(home):
    model = Gears.load(home / "model", {"progress": False})
    for wrong in ("q.h5ad", [cells_of(home)], None):
        with pytest.raises(InputError, match="not an AnnData"):
            model.reconstruct(wrong)
        if not isinstance(wrong, list):
            with pytest.raises(InputError, match="not an AnnData"):
                Gears(config()).fit(wrong)


def test_seeds_out_of_range_are_refused(here, capsys):
    refused(capsys, here, lambda: place(here, "q.h5ad", "o.h5ad", "--seed", str(2**32)), "seed")
    refused(capsys, here, lambda: main(["evaluate", str(here / "placed.h5ad"), str(here / "q.h5ad"), "--seed", "-1"]), "seed")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
