"""Several draws of one tissue: spread of distances, sections, refusals, the command line."""

import json

import anndata as ad
import numpy as np
import pytest
from forks import command, forked
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data.simulator import simulate
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.samples import reconstruct_samples, spread_of
from gears_nb.reconstruct.settings import profile
from gears_nb.runs.cli import main

SMALL = {"progress": False, "structure.miniset": 48, "structure.guess_epochs": 4, "structure.epochs": 4}


@pytest.fixture(scope="module")
def tissue():
    *slides, cells = simulate("tiny", 0).slides
    cells = cells[:150].copy()
    del cells.obsm["spatial"]
    return slides, cells


@pytest.fixture(scope="module")
def drawing(tissue):
    return Gears(profile("smoke", **SMALL), model="small-vae").fit(*tissue)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_spread_knows_no_pose_and_scales_with_the_unit(seed, unit):
    rng = np.random.default_rng(seed)
    maps = [rng.normal(size=(30, 2)) for _ in range(3)]
    angle = rng.uniform(0, 6, 3)
    turned = [X @ [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] * [1, -1] + a for X, a in zip(maps, angle)]
    assert np.allclose(spread_of(turned), spread_of(maps)) and np.allclose(spread_of([unit * X for X in maps]), unit * spread_of(maps))


def test_a_cell_that_moves_has_the_largest_spread():
    rng = np.random.default_rng(0)
    still = rng.normal(size=(60, 2))
    moved = [np.r_[rng.normal(size=(1, 2)), still[1:]] for _ in range(5)]
    spread = spread_of(moved)
    assert spread.argmax() == 0 and spread[0] > 3 * np.median(spread)


def test_sections_are_compared_each_on_its_own(drawing, tissue):
    both = tissue[1].copy()
    both.obs["slide"] = np.where(np.arange(both.n_obs) < 75, "one", "two")
    out = reconstruct_samples(drawing, both, samples=2, slide_key="slide")
    assert np.isfinite(out.obs["gears_spread"]).all() and json.loads(out.uns["gears"]["samples"]) == 2


def test_a_model_with_one_answer_says_so_and_one_sample_is_refused(drawing, tissue, monkeypatch):
    cells = tissue[1]
    with pytest.raises(InputError, match="draw at least 2"):
        reconstruct_samples(drawing, cells, samples=1)
    monkeypatch.setattr(drawing.fitted.models[0], "stochastic", False)
    with pytest.warns(GearsWarning, match="gives one answer"):
        reconstruct_samples(drawing, cells, samples=2)


@forked
def test_the_command_writes_the_spread_and_refuses_none(drawing, tissue, tmp_path, monkeypatch, capsys):
    drawing.save(tmp_path / "model")
    tissue[1].write_h5ad(tmp_path / "q.h5ad")
    monkeypatch.chdir(tmp_path)
    ask = ["reconstruct", "--model", "model", "--cells", "q.h5ad", "--out", "r.h5ad", "--quiet", "--samples"]
    capsys.readouterr()
    assert main([*ask, "0"]) == 2 and not (tmp_path / "r.h5ad").exists()
    said = capsys.readouterr().err
    assert "--samples" in said and said.strip().count("\n") == 0
    made = command(*ask, "2")
    assert made.returncode == 0, made.stderr
    assert np.isfinite(ad.read_h5ad(tmp_path / "r.h5ad").obs["gears_spread"]).all()
