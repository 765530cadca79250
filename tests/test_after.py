"""The life of a model after `reconstruct`: transfer, align, stack, many samples, and the plots of scanpy and squidpy."""
from __future__ import annotations

import argparse
import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError, speaking
from gears_nb.data.simulator import simulate
from gears_nb.reconstruct.alike import Alike, alike
from gears_nb.reconstruct.frames import SURE, Similarity, align_to, find_frame, fit_pairs, frame_from_landmarks, robust_pairs, turn
from gears_nb.reconstruct.stack import chained, stack
from gears_nb.reconstruct.transfer import foretold, gene_values, near, transfer
from gears_nb.runs import after

pytestmark = pytest.mark.filterwarnings("ignore::gears_nb.core.errors.GearsWarning")

poses = st.builds(lambda angle, mirrored, scale, x, y: Similarity(turn(angle, mirrored), scale, np.array([x, y])),
                  st.floats(0, 360), st.booleans(), st.floats(0.01, 100), st.floats(-50, 50), st.floats(-50, 50))


def organ(table):
    return np.asarray(table.obsm["organ_true"], float)


def rms(d):
    return float(np.sqrt(np.square(d).sum(1).mean()))


@pytest.fixture(scope="module")
def tissue():
    return simulate("tiny", seed=0)


@pytest.fixture(scope="module")
def placed(tissue):
    "What a result looks like, without the training: the truth of section 3, spoiled, in a frame of its own; two cells have no place."
    table = tissue.slides[2].copy()
    del table.obsm["spatial"]
    table.uns = {}
    rng = np.random.default_rng(0)
    table.obsm["X_gears"] = (organ(table) - organ(table).mean(0) + 120 * rng.normal(size=(table.n_obs, 2))) / 450 @ turn(200, True)
    table.obsm["X_gears"][[3, 7]] = np.nan
    table.obs["gears_confidence"] = np.where(np.isin(np.arange(table.n_obs), [3, 7]), np.nan, rng.uniform(0.2, 0.9, table.n_obs))
    table.obs["gears_note"] = np.where(np.isin(np.arange(table.n_obs), [3, 7]), "no counts", "")
    return table


@pytest.fixture(scope="module")
def files(tissue, placed, tmp_path_factory):
    "Two slides with zones, a result, and cells, as files."
    folder = tmp_path_factory.mktemp("after")
    for name, table in (("st1", tissue.slides[0]), ("st2", tissue.slides[1]), ("placed", placed), ("sc", tissue.cells)):
        table = table.copy()
        table.uns, table.obs["zone"] = {}, np.where(table.obs["z"] > 0.6, "outer", "inner")
        table.write_h5ad(folder / f"{name}.h5ad")
    return folder


# similarities, landmarks -----------------------------------------------------------------------------------------------


@given(poses, poses)
def test_similarities_form_a_group(a, b):
    X = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_allclose(a.then(b).apply(X), b.apply(a.apply(X)), atol=1e-6)
    np.testing.assert_allclose(a.then(a.inverse()).apply(X), X, atol=1e-6)
    assert a.then(b).mirrored == (a.mirrored != b.mirrored)
    np.testing.assert_allclose(chained([a, b])[2].apply(X), a.apply(b.apply(X)), atol=1e-6)


@given(poses, st.integers(3, 12))
def test_landmarks_give_back_any_pose(pose, n):
    X = np.random.default_rng(n).normal(size=(40, 2))
    found = frame_from_landmarks(X[:n], pose.apply(X[:n])).similarity
    np.testing.assert_allclose(found.apply(X), pose.apply(X), atol=1e-6 * (1 + pose.scale))


def test_a_third_of_the_landmarks_may_be_wrong():
    rng = np.random.default_rng(0)
    X, pose = rng.normal(size=(30, 2)), Similarity(turn(40, True), 3.0, np.array([1.0, 2.0]))
    Y = pose.apply(X)
    Y[:10] += rng.normal(0, 30, (10, 2))
    found, off = robust_pairs(X, Y)
    np.testing.assert_allclose(found.apply(X), pose.apply(X), atol=1e-6)
    assert (off[10:] < 1e-6).all()


def test_landmarks_that_do_not_say_which_side_is_up_are_refused():
    line = np.c_[np.linspace(0, 1, 5), np.linspace(0, 2, 5)]
    with pytest.raises(InputError, match="one line"):
        frame_from_landmarks(line, line)
    with pytest.raises(InputError, match="2 cells .* 3 are needed"):
        frame_from_landmarks(line[:2], line[:2])
    assert frame_from_landmarks(line[:2], line[:2], mirror=False).residual < 1e-9


# align -----------------------------------------------------------------------------------------------------------------


def test_a_map_comes_to_lie_on_its_slide(placed, tissue):
    one = tissue.slides[0]
    result = align_to(placed, one)
    truth = fit_pairs(organ(one), np.asarray(one.obsm["spatial"], float)).apply(organ(placed))
    here = np.isfinite(placed.obsm["X_gears"]).all(1)
    about = json.loads(result.uns["gears_frame"])["sections"][""]
    assert rms((result.obsm["spatial"] - truth)[here]) < 0.55 * rms(truth - truth.mean(0))
    assert about["support"] >= SURE and about["used"] == here.sum() == placed.n_obs - 2
    assert np.isnan(result.obsm["spatial"][~here]).all() and "spatial" not in placed.obsm
    np.testing.assert_array_equal(result.obsm["X_gears"], placed.obsm["X_gears"])


@settings(max_examples=3)
@given(poses)
def test_it_lies_there_however_the_map_is_turned(placed, tissue, pose):
    one = tissue.slides[0]
    moved = placed.copy()
    moved.obsm["X_gears"] = pose.apply(placed.obsm["X_gears"])
    expected, found = (align_to(p, one).obsm["spatial"] for p in (placed, moved))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.nanstd(expected))


@settings(max_examples=3)
@given(poses)
def test_it_moves_with_the_slide(placed, tissue, pose):
    one = tissue.slides[0]
    other = one.copy()
    other.obsm["spatial"] = pose.apply(one.obsm["spatial"])
    np.testing.assert_allclose(align_to(placed, other).obsm["spatial"], pose.apply(align_to(placed, one).obsm["spatial"]), atol=2e-3 * pose.scale * np.std(one.obsm["spatial"]))


def test_the_order_of_spots_does_not_matter(placed, tissue):
    one = tissue.slides[0]
    order = np.random.default_rng(0).permutation(one.n_obs)
    np.testing.assert_allclose(align_to(placed, one[order].copy()).obsm["spatial"], align_to(placed, one).obsm["spatial"], atol=1e-2 * np.std(one.obsm["spatial"]))


def layers(rng, n=160):
    "Places in a square, and features that know only how high a place is."
    p = rng.uniform(-1, 1, (n, 2))
    return p, np.c_[np.sin(2 * p[:, 1]), np.cos(2 * p[:, 1]), np.sin(p[:, 1])] + rng.normal(0, 0.1, (n, 3))


def test_a_layered_tissue_is_refused_and_a_hint_helps():
    rng = np.random.default_rng(0)
    (X, F), (Y, G) = layers(rng), layers(rng)
    with pytest.raises(InputError, match=r"(?s)map: frame: its mirror image fits nearly as well \(support 0\.\d+.*margin .*landmarks=table.*mirror=False"):
        find_frame(X, Y, alike(F, G))
    frame = find_frame(X, Y, alike(F, G), mirror=False)
    assert not frame.similarity.mirrored and abs(frame.similarity.angle) < 15


def test_sections_are_aligned_one_by_one_and_a_hopeless_one_is_told(placed, tissue):
    two = placed.copy()
    two.obs["gears_section"] = np.where(np.arange(two.n_obs) < 100, "a", "b")
    lost = two.obs["gears_section"].eq("b").to_numpy()
    two.obsm["X_gears"][lost] = np.random.default_rng(0).normal(size=(lost.sum(), 2))
    with pytest.warns(GearsWarning, match="#b: frame"):
        result = align_to(two, tissue.slides[0])
    assert np.isnan(result.obsm["spatial"][lost]).all() and np.isfinite(result.obsm["spatial"][~lost]).all(1).sum() == 98
    assert list(json.loads(result.uns["gears_frame"])["sections"]) == ["a"]


# stack -----------------------------------------------------------------------------------------------------------------


def test_sections_lie_upon_each_other(tissue):
    block = stack(tissue.slides, spacing=80)
    flat, true = block.obsm["spatial_3d"][:, :2], np.concatenate([organ(s) for s in tissue.slides])
    assert rms(fit_pairs(flat, true, scale=1.0).apply(flat) - true) < 100  # spots are 100 apart
    assert sorted(set(block.obsm["spatial_3d"][:, 2])) == [0, 80, 160] and block.obs_names.is_unique
    assert "drift_degrees" in json.loads(block.uns["gears_stack"])["steps"][1]


@settings(max_examples=3)
@given(poses)
def test_a_stack_does_not_care_how_a_section_came(tissue, pose):
    slides = [s.copy() for s in tissue.slides]
    pose = Similarity(pose.rotation, 1.0, pose.shift)  # slides share a unit
    slides[1].obsm["spatial"] = pose.apply(slides[1].obsm["spatial"])
    expected, found = (stack(given, spacing=80).obsm["spatial_3d"] for given in (tissue.slides, slides))
    np.testing.assert_allclose(found, expected, atol=0.5)  # of 100 between spots


def test_a_stack_of_maps_takes_their_sizes(placed, tissue):
    "A slide and a map of another unit, one upon the other."
    slide = tissue.slides[0].copy()
    slide.obsm["X_gears"] = np.asarray(slide.obsm["spatial"], float) / 450
    other = placed.copy()
    other.obsm["X_gears"] = 7 * placed.obsm["X_gears"]
    a, b = (stack([slide, p], z=[0, 1]).obsm["spatial_3d"] for p in (placed, other))
    np.testing.assert_allclose(a, b, atol=1e-2)
    assert np.isnan(a[slide.n_obs + 3]).all()


@pytest.mark.parametrize("how, says", [({"z": [0, 1]}, "2 depths for 3"), ({"z": [0, 0, 1]}, "different"), ({"spacing": -1}, "above 0")])
def test_depths_that_mean_nothing_are_refused(tissue, how, says):
    with pytest.raises(InputError, match=says):
        stack(tissue.slides, **how)


# transfer --------------------------------------------------------------------------------------------------------------


def test_labels_and_genes_arrive_with_their_doubt(tissue):
    slides = [s.copy() for s in tissue.slides]
    for s in slides:
        s.obs["zone"] = pd.Categorical(np.where(s.obs["z"] > 0.6, "outer", "inner"))
    slides[0].obs.loc[slides[0].obs_names[:5], "zone"] = np.nan  # rows that nobody labelled
    hidden = list(slides[0].var_names[:20])
    cells = slides[2][:, 20:].copy()
    got = transfer(slides[:2], cells, labels=["zone"], genes=hidden)
    about = json.loads(got.uns["gears_transfer"])
    right = (got.obs["gears_zone"].astype(str) == slides[2].obs["zone"].astype(str)).to_numpy()
    sure = got.obs["gears_zone_probability"].to_numpy()
    assert right.mean() > about["labels"]["zone"]["overall"]["majority"] + 0.1
    assert right[sure > np.median(sure)].mean() > right[sure <= np.median(sure)].mean()  # doubt means something
    assert np.corrcoef(sure, got.obs["gears_zone_entropy"])[0, 1] < -0.9
    assert list(foretold(got).columns) == hidden and (foretold(got, "gears_genes_spread").to_numpy() > 0).all()
    assert set(about["genes"]["genes"]) == set(hidden) and "gears_zone" not in cells.obs


def test_noise_is_not_told(tissue):
    "A label and a gene that have nothing to do with the tissue are marked, in sections that look real otherwise."
    slides, rng = [s.copy() for s in tissue.slides], np.random.default_rng(0)
    tables = []
    for s in slides:
        s.obs["coin"] = rng.choice(["heads", "tails"], s.n_obs)
        dice = rng.poisson(np.asarray(s.X.sum(1)) / 200)  # as deep as the spot is
        tables.append(ad.AnnData(np.c_[s.X.toarray(), dice].astype(np.float32), obs=s.obs, var=pd.DataFrame(index=[*s.var_names, "dice"])))
    about = json.loads(transfer(tables[:2], tables[2], labels=["coin"], genes=["dice", str(tables[0].var_names[30])]).uns["gears_transfer"])
    assert not any(row["told"] for row in about["labels"]["coin"]["labels"].values())
    assert not about["genes"]["genes"]["dice"]["told"] and about["genes"]["genes"]["dice"]["skill"] < 0.05


def test_types_keep_relatives_apart_and_strangers_stay_empty(tissue):
    cells = tissue.cells.copy()
    half = np.arange(cells.n_obs) % 2 == 0
    source, target = cells[half].copy(), cells[~half].copy()
    source.obs["kind"], target.obs["kind"] = source.obs["cell_type"].astype(str), target.obs["cell_type"].astype(str)
    target.obs.loc[target.obs_names[0], "kind"] = "martian"
    got = transfer([source], target, labels=["kind"], types="kind")
    known = np.arange(target.n_obs) > 0
    assert (got.obs["gears_kind"].astype(str)[known] == target.obs["kind"][known]).mean() > 0.95
    assert got.obs["gears_kind"].isna().to_numpy()[0] and np.isnan(got.obs["gears_kind_probability"].to_numpy()[0])


def test_near_counts_places():
    lists = Alike(np.array([[0, 1], [0, 1]]), np.full((2, 2), 0.5, np.float32), 2)
    weights = near(lists, np.array([[0.0, 0], [np.nan, 0]]), np.array([[0.0, 0], [2.0, 0]]), 1.0).weight
    np.testing.assert_allclose(weights[0, 1] / weights[0, 0], np.exp(-2), rtol=1e-5)
    np.testing.assert_allclose(weights[1], 0.5)  # without a place: as it was


@pytest.mark.parametrize("how, says", [({"labels": ["nothing"]}, r"obs\['nothing'\]"), ({"labels": ["z"]}, "numbers"), ({"genes": ["nothing"]}, "not among"), ({}, "labels or genes"),
                                       ({"labels": ["slide"]}, "1 labels|has 1"), ({"labels": ["n_cells"], "reach": 3.0}, "one source|reach")])
def test_transfer_refuses_early(tissue, how, says):
    with pytest.raises(InputError, match=says):
        transfer(tissue.slides[:1] if "labels" in how and how["labels"] == ["slide"] else tissue.slides[:2], tissue.slides[2], **how)


# files and commands ----------------------------------------------------------------------------------------------------


def shell(what, *words):
    parser = argparse.ArgumentParser(prog=what)
    arguments, command = {"transfer": (after.transfer_arguments, after.transfer_command), "align": (after.align_arguments, after.align_command)}[what]
    arguments(parser)
    return command(parser.parse_args([*map(str, words), "--quiet"]))


def test_commands_write_what_they_say(files, tmp_path, capsys):
    assert shell("transfer", "--from", files / "st1.h5ad", files / "st2.h5ad", "--to", files / "placed.h5ad", "--labels", "zone", "--genes", "all", "--out", tmp_path / "t.h5ad") == 0
    assert shell("align", files / "placed.h5ad", files / "st1.h5ad", "--out", tmp_path / "a.h5ad") == 0
    assert shell("align", files / "st1.h5ad", files / "st2.h5ad", "--stack", "--z", 0, 50, "--out", tmp_path / "s.h5ad") == 0
    said = capsys.readouterr().out
    assert "right, the commonest label alone" in said and "are told" in said and "turned by" in said and said.count("written:") == 3
    t, a, s = (ad.read_h5ad(tmp_path / f"{x}.h5ad") for x in "tas")
    assert t.obsm["gears_genes"].shape == (150, 240) and "gears_zone" in t.obs
    assert a.obsm["spatial"].shape == (150, 2) and s.obsm["spatial_3d"].shape == (300, 3)


def test_a_landmark_table_and_a_partial_truth(files, tissue, tmp_path):
    three = tissue.slides[2].copy()
    three.uns = {}
    three[:60].copy().write_h5ad(tmp_path / "imaged.h5ad")
    pd.DataFrame(np.c_[three.obsm["spatial"][:40]], index=pd.Index(three.obs_names[:40], name="barcode"), columns=["x", "y"]).to_csv(tmp_path / "marks.csv")
    for flag, name in (("--truth", "imaged.h5ad"), ("--landmarks", "marks.csv")):
        out = tmp_path / f"{name}.h5ad"
        assert shell("align", files / "placed.h5ad", flag, tmp_path / name, "--out", out) == 0
        found = ad.read_h5ad(out).obsm["spatial"]
        here = np.isfinite(found).all(1)
        assert rms((found - three.obsm["spatial"])[here]) < 0.6 * rms(three.obsm["spatial"] - three.obsm["spatial"].mean(0))


@pytest.mark.parametrize("words, says", [
    (["align", "placed.h5ad", "--out", "x.h5ad"], "one of SLIDE"), (["align", "st1.h5ad", "st2.h5ad", "--out", "x.h5ad"], "X_gears"),
    (["align", "placed.h5ad", "st1.h5ad", "st2.h5ad", "--out", "x.h5ad"], "add --stack"), (["align", "placed.h5ad", "gone.h5ad", "--out", "x.h5ad"], "no such file"),
    (["align", "placed.h5ad", "st1.h5ad", "--out", "st1.h5ad"], "also an input"), (["align", "st1.h5ad", "--stack", "--out", "x.h5ad"], "two or more"),
    (["transfer", "--from", "st1.h5ad", "--to", "st2.h5ad", "--out", "x.h5ad"], "nothing to carry over"),
    (["transfer", "--from", "st1.h5ad", "--to", "st2.h5ad", "--labels", "zon", "--out", "x.h5ad"], "st1.h5ad: obs"),
    (["transfer", "--from", "st1.h5ad", "--to", "st2.h5ad", "--labels", "zone", "--model", "none", "--out", "x.h5ad"], "none")])
def test_bad_words_cost_one_line_and_no_file(files, monkeypatch, words, says):
    monkeypatch.chdir(files)
    before = {p.name: p.stat().st_mtime_ns for p in files.iterdir()}
    with pytest.raises(InputError, match=says) as refusal:
        shell(*words)
    assert "\n" not in str(refusal.value) and before == {p.name: p.stat().st_mtime_ns for p in files.iterdir()}


@pytest.mark.parametrize("text, says", [("a,1,2\n", "barcode,x,y"), ("barcode,x,y\na,1,z\n", "no numbers"), ("barcode,x,y\na,1,2\na,1,3\n", "comes twice"), ("", "cannot be read")])
def test_landmark_tables_that_are_wrong(tmp_path, text, says):
    (tmp_path / "marks.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        after.read_landmarks(tmp_path / "marks.csv")


class Instant:
    "A model that places every cell at once: what `reconstruct_many` does around it is the question."

    def __init__(self):
        from types import SimpleNamespace

        from gears_nb.reconstruct.settings import profile

        self.config, self.fitted, self.asked = profile("smoke", progress=False), SimpleNamespace(origin={"slides": "x"}), 0

    def reconstruct(self, table, *, slide_key=None):
        self.asked += 1
        if table.n_vars < 50:
            raise InputError("cells", "var_names (genes)", "too few", "give more")
        out = table.copy()
        out.obsm["X_gears"], out.obs["gears_confidence"] = np.zeros((table.n_obs, 2)), 0.5
        return out


def test_many_samples_go_on_and_resume(files, tissue, tmp_path):
    small = tissue.slides[0][:, :20].copy()
    small.uns = {}
    small.write_h5ad(tmp_path / "small.h5ad")
    queries, model, said = [files / "st1.h5ad", tmp_path / "small.h5ad", files / "sc.h5ad"], Instant(), []
    first = after.reconstruct_many(model, queries, tmp_path / "out", progress=False, say=said.append)
    assert [s.placed for s in first] == [150, 0, 200] and len(said) == 1 and "small.h5ad" in said[0]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["many.json", "sc.h5ad", "st1.h5ad"]
    (tmp_path / "out/sc.h5ad").unlink()  # as if interrupted before it
    again = after.reconstruct_many(model, queries, tmp_path / "out", progress=False)
    assert [s.again for s in again] == [True, False, False] and model.asked == 5
    model.fitted.origin = {"slides": "another"}
    assert not any(s.again for s in after.reconstruct_many(model, queries, tmp_path / "out", progress=False))


def test_two_samples_of_one_name_are_refused(files, tmp_path):
    (tmp_path / "st1.h5ad").write_bytes((files / "st1.h5ad").read_bytes())
    with pytest.raises(InputError, match="would be written to st1.h5ad"):
        after.reconstruct_many(Instant(), [files / "st1.h5ad", tmp_path / "st1.h5ad"], tmp_path / "out", progress=False)


@pytest.fixture(scope="module")
def odd(files):
    "Files that are wrong in one way each."
    folder = files / "odd"
    folder.mkdir()
    st1, placed = ad.read_h5ad(files / "st1.h5ad"), ad.read_h5ad(files / "placed.h5ad")
    st1[:3].copy().write_h5ad(folder / "three.h5ad")
    for name, table in (("scaled", st1.copy()), ("empty", st1.copy())):
        table.X = table.X * (0.37 if name == "scaled" else 0)
        table.write_h5ad(folder / f"{name}.h5ad")
    names = placed.obs_names.tolist()
    placed.obs_names = [names[1], *names[1:]]
    placed.write_h5ad(folder / "twice.h5ad")
    st1.obs["zone"] = np.where(st1.obs["zone"] == "outer", "outer / rim", "")
    st1.write_h5ad(folder / "one_label.h5ad")
    pd.DataFrame({"cell": names[1:9], "x": range(8), "y": range(8)}).to_csv(folder / "cell.csv", index=False)
    pd.DataFrame({"barcode": names[1:9], "x": range(8), "y": range(8)}).to_csv(folder / "marks.csv", index=False)
    return folder


@pytest.mark.parametrize("words, says", [
    (["transfer", "--from", "st1.h5ad", "--to", "st2.h5ad", "--labels", "zone", "--seed", "-1"], r"gears transfer: seed: is -1, outside \[0, 4294967295\]"),
    (["align", "placed.h5ad", "st1.h5ad", "--seed", "-1"], "gears align: seed: is -1"), (["align", "st1.h5ad", "st2.h5ad", "--stack", "--seed", "-1"], "gears align: seed: is -1"),
    (["transfer", "--from", "odd/three.h5ad", "--to", "st2.h5ad", "--labels", "zone"], "odd/three.h5ad: n_obs: 3 rows, 8 are needed"),
    (["transfer", "--from", "st1.h5ad", "odd/../st1.h5ad", "--to", "st2.h5ad", "--labels", "zone"], "--from: is given twice"),
    (["transfer", "--from", "odd/empty.h5ad", "--to", "st2.h5ad", "--labels", "zone"], "odd/empty.h5ad: X: none of its 150 rows has counts"),
    (["transfer", "--from", "odd/scaled.h5ad", "--to", "st2.h5ad", "--labels", "zone"], r"odd/scaled.h5ad: .*Remedy: give raw counts \(if they are not in X: --layer NAME\)\.$"),
    (["transfer", "--from", "odd/one_label.h5ad", "--to", "st2.h5ad", "--labels", "zone"], r"has 1 labels \(\d+ rows are empty and do not count\)"),
    (["align", "odd/twice.h5ad", "st1.h5ad"], "odd/twice.h5ad: obs_names"), (["align", "odd/twice.h5ad", "--landmarks", "odd/marks.csv"], "odd/twice.h5ad: obs_names"),
    (["align", "placed.h5ad", "odd/three.h5ad"], "odd/three.h5ad: n_obs: 3 rows have a place, a pose needs 20"), (["align", "placed.h5ad", "odd/empty.h5ad"], "odd/empty.h5ad: X: none of its"),
    (["align", "placed.h5ad", "odd/scaled.h5ad"], r"odd/scaled.h5ad: .*Remedy: give raw counts\.$"), (["align", "placed.h5ad", "--landmarks", "odd/cell.csv"], r"there is no barcode \(only cell, x, y\)"),
    (["align", "st1.h5ad", "st1.h5ad", "--stack"], "st1.h5ad: --stack: is given twice")])
def test_odd_files_cost_one_line(files, odd, monkeypatch, words, says):
    monkeypatch.chdir(files)
    with speaking("shell"), pytest.raises(InputError, match=says) as refusal, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        shell(*words, "--out", "odd.h5ad")
    assert "\n" not in str(refusal.value) and not (files / "odd.h5ad").exists()


def test_layers_of_one_file_name_keep_apart(files, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.h5ad").write_bytes((files / f"st{'ab'.index(name) + 1}.h5ad").read_bytes())
    assert shell("align", tmp_path / "a/s.h5ad", tmp_path / "b/s.h5ad", "--stack", "--out", tmp_path / "s.h5ad") == 0
    block = ad.read_h5ad(tmp_path / "s.h5ad")
    assert block.obs["gears_layer"].nunique() == 2 and block.obs_names.is_unique


def test_labels_with_a_slash_are_written_quietly(files, tmp_path):
    source = ad.read_h5ad(files / "st1.h5ad")
    source.obs["zone"] = source.obs["zone"].astype(str).replace("outer", "right / b")
    source.write_h5ad(tmp_path / "slash.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        shell("transfer", "--from", tmp_path / "slash.h5ad", "--to", files / "st2.h5ad", "--labels", "zone", "--out", tmp_path / "t.h5ad")
    got = ad.read_h5ad(tmp_path / "t.h5ad")
    assert set(got.obs["gears_zone"]) == {"inner", "right / b"} and list(got.obsm["gears_zone"].columns) == ["inner", "right | b"]


def test_spreads_hold_on_another_section_if_several_were_rehearsed(tissue):
    genes = list(tissue.slides[0].var_names[:120:3])
    asked = tissue.slides[2][:, [g for g in tissue.slides[2].var_names if g not in genes]].copy()
    truth, inside = np.asarray(gene_values([tissue.slides[2]], ["three"], genes).todense()), []
    for count in (2, 1):
        got = transfer(tissue.slides[:count], asked, genes=genes)
        inside.append(float((np.abs(truth - got.obsm["gears_genes"]) <= 1.645 * got.obsm["gears_genes_spread"]).mean()))
        assert ("that source only" in "".join(after.transfer_told(json.loads(got.uns["gears_transfer"])))) == (count == 1)
    assert 0.82 < inside[0] < 0.97 and inside[1] < inside[0]


def test_the_depth_of_slides_is_no_section_of_cells(files, tissue, tmp_path):
    "`slide_key='z'` for a stack; the cells have a continuous `obs['z']` of their own."
    from gears_nb.reconstruct.settings import profile
    from gears_nb.runs.files import read_inputs

    block = ad.concat([s[:, :].copy() for s in tissue.slides[:2]], index_unique="-")
    block.obs = pd.DataFrame(index=block.obs_names)
    block.obsm = {"spatial": np.c_[block.obsm["spatial"], np.repeat([0.0, 80.0], 150)]}
    block.write_h5ad(tmp_path / "stack.h5ad")
    cells = ad.read_h5ad(files / "sc.h5ad")
    cells.obs["z"] = np.random.default_rng(0).random(cells.n_obs)
    cells.write_h5ad(tmp_path / "sc.h5ad")
    got = read_inputs([tmp_path / "stack.h5ad"], tmp_path / "sc.h5ad", profile("smoke", progress=False), slide_key="z")
    assert len(got.slides) == 2 and got.slide_key is None
    cells.obs["z"] = np.repeat([0.0, 80.0], cells.n_obs // 2)  # as the slides have it: sections
    cells.write_h5ad(tmp_path / "sc.h5ad")
    assert read_inputs([tmp_path / "stack.h5ad"], tmp_path / "sc.h5ad", profile("smoke", progress=False), slide_key="z").slide_key == "z"


# scanpy and squidpy ----------------------------------------------------------------------------------------------------


def test_scanpy_draws_a_result_as_it_is(placed):
    sc = pytest.importorskip("scanpy")
    placed = placed.copy()
    placed.obs["kind"] = pd.Categorical(np.where(np.arange(placed.n_obs) % 2, "a", "b"))
    for colour in ("gears_confidence", "kind", placed.var_names[0]):
        ax = sc.pl.embedding(placed, basis="gears", color=colour, show=False)
        drawn = np.concatenate([c.get_offsets() for c in ax.collections if len(c.get_offsets()) > 2])
        assert np.isfinite(np.ma.filled(drawn, np.nan)).all(1).sum() == placed.n_obs - 2  # the two without a place are not drawn


def test_squidpy_takes_a_result(placed, tissue):
    pytest.importorskip("squidpy", reason="squidpy is an extra: pip install 'gears_nb[squidpy]'")
    import squidpy as sq

    placed = align_to(placed, tissue.slides[0])
    placed.obs["kind"] = pd.Categorical(np.where(np.arange(placed.n_obs) % 2, "a", "b"))
    for key in ("X_gears", "spatial"):
        there = placed[np.isfinite(placed.obsm[key]).all(1)].copy()  # as the page says
        sq.gr.spatial_neighbors(there, spatial_key=key, coord_type="generic")
        assert there.obsp["spatial_connectivities"].shape == (148, 148) and "gears_distances" not in there.obsp
        sq.pl.spatial_scatter(there, spatial_key=key, shape=None, color="kind")
    sq.gr.nhood_enrichment(there, cluster_key="kind", show_progress_bar=False)
    assert there.uns["kind_nhood_enrichment"]["zscore"].shape == (2, 2)
    torch.set_num_threads(1)  # numba's first parallel function sets torch to as many as there are
