"""Positions by one rule: what is refused, what is set aside and why, what is left alone; numbers of any unit and origin."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.benchmark.baselines import prepare
from gears_nb.core.errors import GearsWarning, InputError, speaking
from gears_nb.data.validate import (
    EMPTY,
    FAR,
    MISSING,
    PLACEHOLDER,
    check,
    coordinates,
    positions,
    validate_cells,
    validate_slide,
)
from gears_nb.encoder.probes import morans_i
from gears_nb.geometry.gauge import rescaled
from gears_nb.geometry.metrics import score
from gears_nb.models.batches import EmbeddedSlide


def spots(C: object, n: int | None = None, **obs: object) -> ad.AnnData:
    n = len(C) if n is None else n
    X = sp.csr_matrix(1 + np.random.default_rng(0).poisson(2.0, (n, 60)).astype(np.float32))
    adata = ad.AnnData(X, obs=pd.DataFrame(obs, index=[f"s{i}" for i in range(n)]))
    adata.var_names = [f"Gene{j}" for j in range(60)]
    adata.obsm["spatial"] = C
    return adata


def tissue(n: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 2)) * 1000 + 500


def lattice(rows: int = 12, columns: int = 10) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(float(columns)), np.arange(float(rows))), -1).reshape(-1, 2)


def solid(n: int = 30) -> np.ndarray:
    return np.random.default_rng(3).random((n, 3)) * 100


def mixed() -> np.ndarray:
    C = tissue(30).astype(object)
    C[3, 1] = "here"
    return C


NOT_POSITIONS: dict[str, tuple[ad.AnnData, str | None, str]] = {
    "text": (spots(tissue(30).astype(str)), None, "not numbers"),
    "text among numbers": (spots(mixed()), None, "not numbers"),
    "truth values": (spots(np.ones((30, 2), bool)), None, "not numbers"),
    "complex": (spots(tissue(30) * 1j), None, "not numbers"),
    "dates": (spots(np.full((30, 2), np.datetime64("2020-01-01"))), None, "not numbers"),
    "text column": (spots(pd.DataFrame({"x": 1.0, "y": "a"}, index=[f"s{i}" for i in range(30)])), None, "not numbers"),
    "one column": (spots(tissue(30)[:, :1]), None, "one column, x and y are needed"),
    "no column": (spots(tissue(30)[:, :0]), None, "(30, 0)"),
    "four columns": (spots(np.tile(tissue(30), 2)), None, "(30, 4), not (30, 2)"),
    "images": (spots(np.zeros((30, 2, 2))), None, "(30, 2, 2)"),
    "solid": (spots(solid()), None, "plane='xy' or plane='xz' or plane='yz'"),
    "two heights": (spots(np.c_[tissue(30), np.arange(30) // 15]), None, "third column varies (0 to 1)"),
    "unknown plane": (spots(solid()), "zx", "there is no 'zx'"),
    "a plane of two columns": (spots(tissue(30)), "yz", "has two columns, so no plane yz"),
}

UNUSABLE_SLIDES: dict[str, tuple[ad.AnnData, str]] = {
    "one NaN": (spots(np.r_[tissue(), [[np.nan, 3.0]]]), "NaN or infinite for 1 spots (s120)"),
    "all NaN": (spots(tissue() * np.nan), "NaN or infinite for 120 spots"),
    "infinite": (spots(np.r_[tissue(), [[np.inf, 3.0]]]), "NaN or infinite for 1 spots (s120)"),
    "all zero": (spots(np.zeros((120, 2))), "positions collapse to 1 place, all 120 spots lie in one point"),
    "two places": (spots(np.repeat([[0.0, 0], [1, 1]], 60, axis=0)), "positions collapse to 2 places"),
    "a tenth at zero": (spots(np.r_[tissue(), np.zeros((12, 2))]), "12 of 132 spots (9.1%) are unusable (12 placeholder position; first s120, s121, s122"),
    "half at minus one": (spots(np.r_[tissue(), np.full((120, 2), -1.0)]), "(50.0%)"),
    "many far off": (spots(np.r_[tissue(), 1e9 * (1 + tissue(10))]), "10 position far off"),
    "both": (spots(np.r_[tissue(), np.zeros((5, 2)), 1e9 * (1 + tissue(5))]), "5 placeholder position, 5 position far off"),
    "one section of two": (spots(np.r_[tissue(), tissue(20), np.zeros((9, 2))], slide=["A"] * 120 + ["B"] * 29), "9 of 29 spots of obs['slide'] == 'B'"),
    "offset beyond double": (spots(tissue() + 1e18), "positions collapse to"),
    "offset beyond single": (spots((tissue() + 1e9).astype(np.float32)), "distance from zero 1e+09"),
    "offset, all rounded": (spots(tissue() + 1e22), "one point"),
    "x is constant": (spots(tissue() * [0, 1] + [5, 0]), "all 120 spots lie on one line. Remedy: give both coordinates"),
    "y is constant": (spots(tissue() * [1, 0] + [0, 5]), "all 120 spots lie on one line"),
    "y is x": (spots(np.repeat(tissue()[:, :1], 2, axis=1)), "all 120 spots lie on one line"),
    "y has no scale": (spots(tissue() * [1, 1e-12]), "all 120 spots lie on one line"),
    "a huge line": (spots(tissue() * [1e300, 0]), "all 120 spots lie on one line"),
    "a line but for placeholders": (spots(np.r_[tissue() * [1, 0] + [0, 5], np.full((3, 2), -999.0)]), "all 120 spots lie on one line"),
    "one section is a line": (spots(np.r_[tissue(), tissue(30) * [1, 0]], slide=["A"] * 120 + ["B"] * 30), "all 30 spots lie on one line"),
    "offset and placeholders": (spots(np.r_[tissue() + 1e18, np.zeros((3, 2))]), "positions collapse to"),
}


@pytest.mark.parametrize("case", NOT_POSITIONS)
def test_what_is_no_table_of_positions_is_refused_everywhere(case: str):
    adata, plane, words = NOT_POSITIONS[case]
    for ask in (positions, coordinates, validate_slide):
        with pytest.raises(InputError) as refused:
            ask(adata, "A.h5ad", plane=plane)
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_entry_is_named():
    adata = spots(tissue())
    with pytest.raises(InputError, match=r"obsm\['spatial3d'\]: is missing \(obsm has spatial\)"):
        positions(adata, "A.h5ad", key="spatial3d")
    adata.obsm["spatial3d"] = np.c_[tissue(), np.zeros(120)]
    assert positions(adata, "A.h5ad", key="spatial3d").usable.all()


@pytest.mark.parametrize("case", UNUSABLE_SLIDES)
def test_slides_beyond_repair_are_refused(case: str):
    adata, words = UNUSABLE_SLIDES[case]
    for ask in (lambda: check(adata, "A.h5ad", spatial=True), lambda: validate_slide(adata, "A.h5ad")):
        with pytest.raises(InputError) as refused:
            ask()
        assert words in str(refused.value) and str(refused.value).startswith("A.h5ad: obsm['spatial']: ")


# ---------------------------------------------------------------- set aside, or left alone

SHARED = np.repeat(lattice() + 3, np.random.default_rng(1).poisson(8, 120) + 1, axis=0)
ASIDE: dict[str, tuple[np.ndarray, list[list[float]], str]] = {
    "zero twice": (tissue(), [[0, 0]] * 2, PLACEHOLDER),
    "minus one twice": (tissue(), [[-1, -1]] * 2, PLACEHOLDER),
    "minus 999 four times": (tissue(), [[-999, -999]] * 4, PLACEHOLDER),
    "zero and minus one": (tissue(), [[0, 0]] * 2 + [[-1, -1]] * 3, PLACEHOLDER),
    "a crowd in the tissue": (tissue(), [[1001.5, 1002.5]] * 5, PLACEHOLDER),
    "two crowds": (tissue(), [[1001.5, 1002.5]] * 3 + [[700, 702]] * 4, PLACEHOLDER),
    "a crowd beside pairs": (np.r_[tissue(), tissue()[:20]], [[1001.5, 1002.5]] * 6, PLACEHOLDER),
    "a crowd of cells on shared spots": (SHARED, [[4.5, 4.5]] * 90, PLACEHOLDER),
    "zero beside shared spots": (SHARED, [[0, 0]] * 50, PLACEHOLDER),
    "a crowd far away": (tissue(), [[1e9, 1e9]] * 3, PLACEHOLDER),
    "one far off": (tissue(), [[1e9, 1e9]], FAR),
    "several far off": (tissue(), [[1e9, 0], [-1e9, 3], [5, 1e12], [1e300, 1e300], [-1.7e308, 1.7e308]], FAR),
    "just beyond": (lattice(), [[80, 5.5]], FAR),
    "missing": (tissue(), [[np.nan, 1], [1, np.nan], [np.nan, np.nan]], MISSING),
    "infinite": (tissue(), [[np.inf, 1], [-np.inf, 2]], MISSING),
    "one minus 999": (tissue(), [[-999, -999]], PLACEHOLDER),
    "one minus one": (tissue(), [[-1, -1]], PLACEHOLDER),
    "one zero": (tissue(), [[0, 0]], PLACEHOLDER),
    "one minus 999 beside a lattice": (lattice(), [[-999, -999]], PLACEHOLDER),
    "minus one in x": (tissue(), [[-1, 600], [-1, 700], [-1, 801]], PLACEHOLDER),
    "zero in y": (tissue(), [[600, 0], [700, 0], [801, 0], [900, 0]], PLACEHOLDER),
    "minus 999 in one column each": (lattice(), [[-999, 3]] * 3 + [[5, -999]] * 3, PLACEHOLDER),
}


def two_pieces(share: float, apart: float) -> np.ndarray:
    rng = np.random.default_rng(2)
    radius, angle = 0.5 * np.sqrt(rng.random(1000)), 2 * np.pi * rng.random(1000)
    disc = np.c_[radius * np.cos(angle), radius * np.sin(angle)]
    return disc + np.c_[np.where(np.arange(1000) < share * 1000, 0, apart), np.zeros(1000)]


LEGITIMATE: dict[str, np.ndarray] = {
    "tissue": tissue(), "lattice from zero": lattice(), "lattice about zero": lattice() - 5, "two spots": np.array([[0.0, 0], [1, 0]]),
    "hexagons": lattice() * [1, np.sqrt(0.75)] + np.c_[np.repeat(np.arange(12) % 2, 10) / 2, np.zeros(120)],
    "cells on shared spots": SHARED, "few cells on shared spots": np.repeat(lattice(), np.random.default_rng(2).poisson(0.5, 120) + 1, axis=0),
    "shared lattice from zero": np.repeat(lattice(), np.random.default_rng(4).poisson(8, 120) + 1, axis=0),
    "every spot twice": np.repeat(tissue(), 2, axis=0), "one pair": np.r_[tissue(), tissue()[:1]],
    "rounded": np.random.default_rng(5).integers(0, 50, (1000, 2)).astype(float), "cells of one spot each": np.repeat(tissue(6), 5, axis=0),
    "two pieces": two_pieces(0.5, 5), "a small piece": two_pieces(0.9, 5), "strip": np.c_[np.linspace(0, 1e5, 300), np.sin(np.arange(300))],
    "ring": np.c_[np.cos(np.arange(300)), np.sin(np.arange(300))],
    "three cores": np.concatenate([tissue(60), tissue(60, 1) + [4000, 0], tissue(60, 2) + [0, 4000]]),
    "a lattice of three rows": lattice(3), "a lattice of two rows": lattice(2, 40), "few rows": lattice(5, 5), "two sentinels by chance": np.r_[tissue(), [[450, -1], [460, -1]]],
    "lattice about minus one": lattice() - [1, 1], "one-row strip": np.c_[np.linspace(0, 1e5, 300), 3e-1 * np.sin(np.arange(300))],
    "gaussian": np.random.default_rng(6).normal(size=(5000, 2)), "tiny": tissue() * 1e-300, "huge": tissue() * 1e300, "offset": tissue() + 1e12,
}


@pytest.mark.parametrize("case", ASIDE)
def test_rows_without_a_measured_position_are_set_aside(case: str):
    good, bad, reason = ASIDE[case]
    found = positions(spots(np.r_[good, bad]), "truth.h5ad")
    assert list(found.reasons) == [""] * len(good) + [reason] * len(bad)
    assert np.array_equal(found.xy[: len(good)], good) and np.isnan(found.xy[len(good) :]).all()
    assert found.xy.dtype == np.float64 and np.array_equal(found.usable, found.reasons == "")
    assert len(found.notes) == 1 and f"{len(bad)} of {len(good) + len(bad)} rows set aside, {reason}" in found.notes[0]
    assert f"(s{len(good)}" in found.notes[0]


@pytest.mark.parametrize("case", LEGITIMATE)
def test_honest_positions_are_left_alone(case: str):
    C = LEGITIMATE[case]
    found = positions(spots(C), "truth.h5ad")
    assert found.usable.all() and found.notes == () and np.array_equal(found.xy, C)


@pytest.mark.parametrize("C", [np.c_[np.arange(100.0), np.zeros(100)], tissue() * [0, 1], np.repeat(tissue()[:, :1], 2, axis=1), tissue() * [1, 1e-12]])
def test_a_line_is_a_note_where_positions_are_only_read(C: np.ndarray):
    found = positions(spots(C), "truth.h5ad")
    assert found.usable.all() and found.notes == (f"truth.h5ad: obsm['spatial']: all {len(C)} spots lie on one line",)


def test_a_plane_over_few_heights_asks_for_sections():
    C = np.c_[tissue(), np.repeat([0.0, 10.0], 60)]
    with pytest.warns(GearsWarning, match="A.h5ad: obsm..spatial..: z takes 2 values, probably sections: add a column of obs that names them"):
        clean, _ = validate_slide(spots(C), "A.h5ad", plane="xy")
    assert np.array_equal(clean.obsm["spatial"], tissue())
    with pytest.warns(GearsWarning, match="y takes 2 values"):
        validate_slide(spots(C[:, [0, 2, 1]]), "A.h5ad", plane="xz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_slide(spots(C, slide=["A"] * 60 + ["B"] * 60), "A.h5ad", plane="xy")
        validate_slide(spots(np.c_[tissue(), tissue(seed=1)[:, 0]]), "A.h5ad", plane="xy")
        validate_slide(spots(np.c_[tissue(), np.zeros(120)]), "A.h5ad", plane="xy")


def test_a_section_that_is_too_small_is_named_and_no_setting_is_offered_that_is_refused():
    adata = spots(tissue(149), slide=["A"] * 120 + ["B"] * 29)
    with pytest.raises(InputError, match=r"A.h5ad: obs\['slide'\] == 'B': 29 spots, at least 64 are needed \(one training piece\)\. Remedy: drop this section\.$"):
        validate_slide(adata, "A.h5ad", min_spots=64)
    with pytest.raises(InputError, match="structure.miniset': 30"):
        validate_slide(spots(tissue(30)), "A.h5ad", min_spots=64)


def test_sections_are_asked_one_by_one():
    C = np.r_[tissue(), tissue(20) + 1e6, [[0, 0]] * 2]
    labels = np.array(["A"] * 120 + ["B"] * 22)
    assert list(np.flatnonzero(~positions(spots(C), "A.h5ad").usable)) == list(range(120, 142))  # far, as long as all are one section
    assert list(np.flatnonzero(~positions(spots(C), "A.h5ad", labels=labels).usable)) == [140, 141]


def test_all_zero_positions_are_no_truth():
    assert not positions(spots(np.zeros((120, 2))), "truth.h5ad").usable.any()
    assert not positions(spots(np.zeros((2, 2))), "truth.h5ad").usable.any()


moves = st.tuples(st.floats(0, 2 * np.pi), st.floats(-20, 20), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.booleans())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 20), crowd=st.integers(0, 6), far=st.lists(st.floats(100, 1e9), max_size=4), move=moves)
def test_shift_turn_and_unit_do_not_change_what_is_set_aside(seed: int, crowd: int, far: list[float], move: tuple):
    angle, unit, x, y, mirrored = move
    distance = 1000 * np.array(far).reshape(-1, 1)
    C = np.r_[tissue(seed=seed), np.full((crowd, 2), 900.25), 1000 + distance * [0.6, 0.8] + distance * np.arange(len(far))[:, None]]
    flip = -1 if mirrored else 1
    turned = np.c_[np.cos(angle) * C[:, 0] - np.sin(angle) * C[:, 1], flip * (np.sin(angle) * C[:, 0] + np.cos(angle) * C[:, 1])]
    moved = (turned + [x, y]) * 10**unit
    before, after = positions(spots(C), "A.h5ad"), positions(spots(moved), "A.h5ad")
    assert list(before.reasons) == list(after.reasons)
    assert (before.reasons == PLACEHOLDER).sum() == (crowd if crowd > 2 else 0) and (before.reasons == FAR).sum() == len(far)


# ---------------------------------------------------------------- columns and types


@pytest.mark.parametrize("plane", ["xy", "xz", "yz"])
def test_a_plane_chooses_two_columns(plane: str):
    C = solid()
    expected = C[:, ["xyz".index(axis) for axis in plane]]
    clean, _ = validate_slide(spots(C), "A.h5ad", plane=plane)
    assert np.array_equal(clean.obsm["spatial"], expected) and np.array_equal(coordinates(spots(C), "A.h5ad", plane=plane), expected)


def test_the_plane_is_asked_for_in_the_language_of_the_command_line():
    with speaking("shell"), pytest.raises(InputError, match="--plane xy or --plane xz or --plane yz"):
        positions(spots(solid()), "A.h5ad")


@pytest.mark.parametrize("depth", [0.0, 7.5, np.nan])
def test_a_constant_third_column_is_left_out(depth: float):
    with pytest.warns(GearsWarning, match="third column left out, it is constant"):
        clean, report = validate_slide(spots(np.c_[tissue(), np.full(120, depth)]), "A.h5ad")
    assert np.array_equal(clean.obsm["spatial"], tissue()) and report.kept.all()


def test_sections_at_different_heights_are_flat():
    adata = spots(np.c_[tissue(), np.repeat([0.0, 10.0], 60)], slide=["A"] * 60 + ["B"] * 60)
    with pytest.warns(GearsWarning, match="third column"):
        assert validate_slide(adata, "A.h5ad")[0].obsm["spatial"].shape == (120, 2)


NAMES = [f"s{i}" for i in range(120)]
TYPES = {
    "float32": tissue().astype(np.float32), "float16": lattice().astype(np.float16), "int": np.rint(tissue()).astype(int), "uint8": lattice().astype(np.uint8),
    "object": tissue().astype(object), "frame": pd.DataFrame(tissue(), index=NAMES), "sparse": sp.csr_matrix(lattice()),
    "frame of integers": pd.DataFrame(np.rint(tissue()).astype(int), index=NAMES), "column order": np.asfortranarray(tissue()),
    "nullable frame": pd.DataFrame(tissue(), index=NAMES).astype("Float64"), "sparse columns": sp.csc_matrix(lattice()),
    "mixed frame": pd.DataFrame({"x": np.arange(120), "y": np.linspace(0, 9, 120) ** 2}, index=NAMES),
}


@pytest.mark.parametrize("kind", TYPES)
def test_positions_come_in_many_types(kind: str):
    C = TYPES[kind]
    expected = np.asarray(C.toarray() if sp.issparse(C) else C, dtype=np.float64)
    clean, _ = validate_slide(spots(C, 120), "A.h5ad")
    assert clean.obsm["spatial"].dtype == np.float64 and np.array_equal(clean.obsm["spatial"], expected)


# ---------------------------------------------------------------- what a slide loses, and the record of it


def faulty() -> ad.AnnData:
    adata = spots(np.r_[tissue(), [[0, 0]] * 2, [[1e9, 1e9]]])
    X = adata.X.toarray()
    X[7] = 0
    adata.X = sp.csr_matrix(X)
    return adata


def test_a_few_faults_are_dropped_counted_and_remembered():
    adata = faulty()
    before = adata.copy()
    with pytest.warns(GearsWarning) as seen:
        clean, report = validate_slide(adata, "A.h5ad", min_spots=50)
    assert [str(w.message) for w in seen] == list(report.warnings) == [
        "A.h5ad: obsm['spatial']: 2 of 123 rows set aside, placeholder position (0, 0) (s120, s121)",
        "A.h5ad: obsm['spatial']: 1 of 123 rows set aside, position far off (s122)",
        "A.h5ad: 1 all-zero cells dropped, kept in the output as NaN (s7)",
    ]
    assert clean.n_obs == 119 and report.dropped_cells == ("s7", "s120", "s121", "s122")
    assert {i: r for i, r in enumerate(report.notes) if r} == {7: EMPTY, 120: PLACEHOLDER, 121: PLACEHOLDER, 122: FAR}
    assert report.to_dict()["cells_dropped_by_reason"] == {EMPTY: 1, PLACEHOLDER: 2, FAR: 1} and report.to_dict()["cells_dropped"] == 4
    restored = report.restore(clean.obsm["spatial"])
    assert np.array_equal(np.isnan(restored).all(1), ~report.kept) and np.array_equal(restored[:7], adata.obsm["spatial"][:7])
    assert np.array_equal(adata.obsm["spatial"], before.obsm["spatial"]) and (adata.X != before.X).nnz == 0


def test_cells_keep_whatever_positions_they_have():
    for C in (np.zeros((120, 2)), np.full((120, 2), np.nan), tissue()[:, :1], np.r_[tissue(119), [[1e9, 0]]]):
        clean, report = validate_cells(spots(C), "Q.h5ad")
        assert report.kept.all() and np.array_equal(clean.obsm["spatial"], C, equal_nan=True) and set(report.notes) == {""}


def test_what_is_left_must_be_enough():
    adata = spots(np.r_[tissue(49), [[1e9, 1e9]]])
    with pytest.raises(InputError, match=r"49 spots, at least 50 are needed \(one training piece\)"):
        validate_slide(adata, "A.h5ad", min_spots=50)
    with speaking("shell"), pytest.raises(InputError, match=r"drop this section, or lower it: --set structure.miniset=120\."):
        validate_slide(spots(tissue()), "A.h5ad", min_spots=192)


@pytest.mark.parametrize("sparse", [True, False])
def test_backed_tables_are_read(tmp_path: Path, sparse: bool):
    adata = faulty()
    adata.X = adata.X if sparse else adata.X.toarray()
    adata.write_h5ad(tmp_path / "A.h5ad")
    backed = ad.read_h5ad(tmp_path / "A.h5ad", backed="r")
    with pytest.warns(GearsWarning):
        assert validate_slide(backed, "A.h5ad")[0].shape == (119, 60)
        assert validate_cells(backed, "Q.h5ad")[0].shape == (122, 60)
    assert backed.isbacked and len(check(backed, "A.h5ad", spatial=True)) == 2


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_tables_stay_refused(shape: tuple[int, int]):
    for validate in (validate_slide, validate_cells):
        with pytest.raises(InputError, match="is empty"):
            validate(ad.AnnData(np.zeros(shape)), "A.h5ad")


def test_hidden_counts_are_named_with_the_option_that_takes_them():
    adata = spots(tissue())
    adata.raw = adata.copy()
    adata.layers["raw_counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    with pytest.raises(InputError, match=r"layers\['raw_counts'\] may hold them: layer='raw_counts'; adata.raw may hold them: layer='raw'\), or counts=False"):
        validate_cells(adata, "Q.h5ad")
    with speaking("shell"), pytest.raises(InputError, match="--layer raw_counts; .*--layer raw.*, or --set counts=false to use"):
        validate_cells(adata, "Q.h5ad")


# ---------------------------------------------------------------- any unit, any origin

UNITS = [(1e-33, 0.0), (1e-30, 0.0), (1e-3, 0.0), (1.0, 1e6), (1.0, 1e12), (1e27, 0.0), (1e30, -1e33), (1e200, 0.0), (1e-300, 0.0), (1e300, 0.0), (-1.0, 0.0)]


@pytest.mark.parametrize(("unit", "offset"), UNITS)
def test_training_scoring_and_probes_see_the_same_slide(unit: float, offset: float):
    C = tissue()
    moved = C * unit + offset
    sign = np.sign(unit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean, _ = validate_slide(spots(moved), "A.h5ad")
        trained = EmbeddedSlide(np.zeros((120, 3)), clean.obsm["spatial"]).coords
        scored, values = score(moved, C), C[:, 0]
        assert trained.dtype == torch.float32
        assert torch.allclose(trained * sign, EmbeddedSlide(np.zeros((120, 3)), C).coords, atol=2e-6)
        assert scored["stress1"] < 1e-6 and scored["spearman"] > 1 - 1e-6
        assert score(C, moved)["stress1"] < 1e-6
        assert np.isclose(morans_i(values, moved), morans_i(values, C))


def test_baselines_read_positions_of_any_unit():
    slide, query = spots(tissue()), spots(tissue(40))
    plain = prepare([slide], query, min_genes=10).coords
    for unit, offset in UNITS:
        assert np.allclose(np.sign(unit) * prepare([spots(tissue() * unit + offset)], query, min_genes=10).coords, plain, atol=1e-6)
    with pytest.raises(InputError, match=r"slide 1: obsm\['spatial'\]: NaN or infinite for 120 spots"):
        prepare([spots(tissue() * np.nan)], query, min_genes=10)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 50), exponent=st.integers(-290, 290))
def test_rescaled_changes_nothing_but_origin_and_unit(seed: int, exponent: int):
    C = tissue(20, seed) * 10.0**exponent
    out = rescaled(C)
    assert (out[0] == 0).all() and 0.5 <= np.abs(out).max() < 1
    ratio = np.abs(C - C[0]).max() / np.abs(out).max()
    assert np.allclose(out, (C - C[0]) / ratio, rtol=1e-12, atol=1e-15)
