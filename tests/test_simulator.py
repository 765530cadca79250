"""Simulator: deterministic, integer, switchable, and with every effect visible in the data it is said to shape."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import (
    PANELS,
    PRESETS,
    UNIT,
    Source,
    bleeding_matrix,
    build_programs,
    config_of,
    draw_effects,
    hex_centre,
    hex_round,
    lobule_distances,
    noisy_rates,
    profiles,
    simulate,
    simulate_cells,
    simulate_source,
    tissue_fields,
)

OFF = dict.fromkeys(UNIT, 0.0)


def panel_share(adata, panel):
    return float(adata[:, (adata.var["program"] == panel).to_numpy()].X.sum() / adata.X.sum())


@pytest.fixture(scope="module")
def tiny():
    return simulate("tiny", seed=0)


def test_tiny_is_complete_and_well_formed(tiny):
    assert [s.n_obs for s in tiny.slides] == [150] * 3 and tiny.cells.n_obs == 200
    for adata in (*tiny.slides, tiny.cells):
        assert sp.isspmatrix_csr(adata.X) or isinstance(adata.X, sp.csr_array)
        assert np.all(adata.X.data == np.rint(adata.X.data)) and adata.X.data.min() >= 0
        assert adata.obs_names.is_unique and adata.var_names.is_unique
    assert all(s.obsm["spatial"].shape == (150, 2) and s.obs["n_cells"].min() >= 3 for s in tiny.slides)
    assert "spatial" not in tiny.cells.obsm and tiny.cells.obsm["spatial_true"].shape == (200, 2)
    assert set(tiny.truth) == {"ST1", "ST2", "ST3", "SC"}
    assert tiny.cells.obs["patient"].unique().tolist() == ["P2"]


def test_same_seed_same_counts_and_samples_are_independent(tiny):
    again = simulate("tiny", seed=0)
    for one, two in zip((*tiny.slides, tiny.cells), (*again.slides, again.cells)):
        assert (one.X != two.X).nnz == 0
    np.testing.assert_array_equal(tiny.slides[0].obsm["spatial"], again.slides[0].obsm["spatial"])
    alone = simulate_source(PRESETS["tiny"], PRESETS["tiny"].sources[1], seed=0)
    assert (alone.X != tiny.slides[1].X).nnz == 0
    assert (simulate("tiny", seed=1).cells.X != tiny.cells.X).nnz > 0


def test_survives_a_file(tiny, tmp_path):
    import anndata as ad

    for adata in (tiny.slides[0], tiny.cells):
        adata.write_h5ad(tmp_path / "a.h5ad")
        back = ad.read_h5ad(tmp_path / "a.h5ad")
        np.testing.assert_allclose(back.uns["truth"]["mean_shift"], adata.uns["truth"]["mean_shift"])


def test_coordinates_are_a_rigid_motion_of_the_organ(tiny):
    from scipy.spatial.distance import pdist

    for slide in tiny.slides:
        np.testing.assert_allclose(pdist(slide.obsm["spatial"]), pdist(slide.obsm["organ_true"]), rtol=1e-3, atol=0.1)
    rotations = [t["rotation"] for t in tiny.truth.values()]
    assert all(np.allclose(r @ r.T, np.eye(2)) for r in rotations)
    assert len({t["mirrored"] for seed in range(4) for t in simulate("tiny", seed, **OFF).truth.values()}) == 2


@pytest.mark.parametrize("spacing", [0.7, 1.0, 550.0])
def test_hexagons_round_trip_and_distances_are_nearest(spacing):
    lattice = np.array([(q, r) for q in range(-6, 7) for r in range(-6, 7)])
    centres = hex_centre(lattice, spacing)
    np.testing.assert_array_equal(hex_round(centres, spacing), lattice)
    x = np.random.default_rng(0).uniform(-2, 2, (300, 2)) * spacing
    central, portal = lobule_distances(x, spacing)
    every = np.linalg.norm(x[:, None] - centres[None], axis=-1)
    np.testing.assert_allclose(central, every.min(1), atol=1e-6 * spacing)
    nearest = np.sort(every, axis=1)[:, :3]
    at_corner = np.ptp(nearest, axis=1) < 0.02 * spacing
    assert (portal[at_corner] < 0.03 * spacing).all()
    assert (central + portal >= spacing / np.sqrt(3) - 1e-6 * spacing).all()


def test_off_is_exactly_off():
    config = replace(PRESETS["tiny"], **OFF)
    programs = build_programs(config)
    for source in config.sources:
        quiet = draw_effects(config, source, programs, 0)
        assert not np.any(quiet.offset) and quiet.depth_factor == 1.0 and quiet.zonation_scale == 1.0
        assert not np.any(quiet.type_shift) and not np.any(quiet.dropout)
        assert quiet.ambient == quiet.bleeding == quiet.stress == quiet.organisation == 0.0


@pytest.mark.parametrize("switch", sorted(set(UNIT) - {"identifiability"}))
def test_one_switch_moves_its_own_truth_only(switch):
    moves = {
        "mean_shift": {"mean_shift"}, "qc_shift": {"depth_factor"}, "composition": {"type_shift"}, "organisation": {"organisation"},
        "biology": {"program_shift", "program_level", "zonation_scale"}, "ambient": {"ambient"}, "bleeding": {"bleeding"},
        "sc_dropout": {"dropout"}, "stress": {"stress"}, "patient": {"patient_shift"},
    }
    config = replace(PRESETS["tiny"], **OFF)
    programs = build_programs(config)
    moved = set()
    for source in config.sources:
        quiet, loud = (draw_effects(replace(config, **{switch: s}), source, programs, 0) for s in (0.0, 1.0))
        pairs = {name: (value, vars(loud)[name]) for name, value in vars(quiet).items()}
        moved |= {n for n, (a, b) in pairs.items() if (a != b if isinstance(a, dict) else np.any(np.asarray(a) != np.asarray(b)))}
    assert moved == moves[switch]


def test_strength_scales_the_same_draw():
    config = replace(PRESETS["tiny"], **OFF)
    programs = build_programs(config)
    for switch in ("mean_shift", "patient", "biology"):
        one, two = (draw_effects(replace(config, **{switch: s}), config.sources[0], programs, 0).offset for s in (1.0, 2.0))
        np.testing.assert_allclose(2 * one, two)


def test_patient_shift_is_shared_within_an_individual(tiny):
    truth = tiny.truth
    np.testing.assert_array_equal(truth["ST1"]["patient_shift"], truth["ST3"]["patient_shift"])
    assert np.abs(truth["ST1"]["patient_shift"] - truth["SC"]["patient_shift"]).max() > 0
    assert np.abs(truth["ST1"]["mean_shift"] - truth["ST3"]["mean_shift"]).max() > 0


def test_effects_reach_the_counts():
    quiet = simulate("tiny", 0, **OFF)
    stressed = simulate("tiny", 0, **(OFF | {"stress": 1.0}))
    assert panel_share(stressed.cells, "stress") > 2 * panel_share(quiet.cells, "stress")
    assert (stressed.slides[0].X != quiet.slides[0].X).nnz == 0
    dropped = simulate("tiny", 0, **(OFF | {"sc_dropout": 1.0})).cells
    assert dropped.X.nnz < quiet.cells.X.nnz and (dropped.X > quiet.cells.X).nnz == 0
    shifted = simulate("tiny", 0, **(OFF | {"biology": 3.0}))
    level = shifted.truth["ST1"]["program_level"]["mito"]
    ratio = np.log(panel_share(shifted.slides[0], "mito") / panel_share(quiet.slides[0], "mito"))
    assert np.sign(ratio) == np.sign(level)


def test_organisation_disorders_the_last_spot_slide_only():
    wild = simulate("tiny", 0, **(OFF | {"organisation": 1.5}))
    quiet = simulate("tiny", 0, **OFF)
    assert wild.slides[2].obs["z"].std() < quiet.slides[2].obs["z"].std()
    np.testing.assert_array_equal(wild.slides[0].obs["z"], quiet.slides[0].obs["z"])


def test_zonation_markers_follow_z():
    from scipy.stats import spearmanr

    cells = simulate("tiny", 0, sources=(Source("SC", "P2", "dissociated", 1500),)).cells
    hepatic = cells[cells.obs["cell_type"].str.startswith("hep").to_numpy()]
    for panel, sign in (("pericentral", -1), ("periportal", 1)):
        level = np.asarray(hepatic[:, list(PANELS[panel])].X.sum(1)).ravel() / np.asarray(hepatic.X.sum(1)).ravel()
        assert sign * spearmanr(level, hepatic.obs["z"]).statistic > 0.6
    kupffer = (cells.obs["cell_type"] == "Kupffer").to_numpy()
    marker = cells[:, "Clec4f"].X.toarray().ravel()
    assert marker[kupffer].mean() > 5 * max(marker[~kupffer].mean(), 1e-3)


def test_identifiability_zero_makes_lobules_equal():
    config = config_of("tiny", identifiability=0.0)
    u = np.random.default_rng(0).normal(size=(50, 2))
    assert not np.any(tissue_fields(u, config))
    weaker = tissue_fields(u, config_of("tiny", identifiability=0.5))
    np.testing.assert_allclose(2 * weaker, tissue_fields(u, config_of("tiny", identifiability=1.0)))


def test_counts_have_the_negative_binomial_moments():
    config = PRESETS["tiny"]
    programs = build_programs(config)
    design = np.zeros((20_000, len(programs.causes)), np.float32)
    design[:, 1] = 1
    offset = np.zeros(config.n_genes)
    rates = np.concatenate([r for _, r in noisy_rates(design, np.full(len(design), 800.0), programs, offset, np.random.default_rng(0))])
    counts = np.random.default_rng(1).poisson(rates)
    m = 800 * profiles(design[:1], programs, offset)[0]
    assert m.sum() == pytest.approx(800, rel=1e-4)
    common = m > 2
    np.testing.assert_allclose(counts.mean(0)[common] / m[common], 1, atol=0.05)
    np.testing.assert_allclose(counts.var(0)[common] / (m + m**2 / programs.shape)[common], 1, atol=0.15)


def test_bleeding_keeps_the_interior_and_loses_the_rim():
    centres = hex_centre(np.array([(q, r) for q in range(-3, 4) for r in range(-3, 4)]), 10.0)
    kept = np.asarray(bleeding_matrix(centres, 10.0, 0.3).sum(0)).ravel()
    middle = np.hypot(*centres.T).argmin()
    assert kept[middle] == pytest.approx(1.0) and kept.min() < 0.95


def test_presets_have_the_promised_sizes():
    sizes = {source.name: source.size for source in PRESETS["six_sources"].sources}
    assert sizes == {"P2_ST1": 1700, "P2_ST2": 1500, "P2_ST3": 1200, "P2_SC": 2700, "P10_ST3": 460, "P10_SC": 950}
    liver = PRESETS["liver_crossslide"]
    assert 3900 <= sum(s.size for s in liver.sources if s.kind == "spots") <= 4100


def test_embryo_and_scale():
    sources = tuple(Source(f"embryo{i}", f"E{i}", "imaged", 300) for i in (1, 2))
    embryo = simulate("embryo_single_cell", 0, sources=sources)
    assert embryo.cells is None and [s.n_obs for s in embryo.slides] == [300, 300]
    assert embryo.slides[0].obs["cell_type"].nunique() > 8
    small = (*PRESETS["tiny"].sources[:2], Source("SC", "P2", "dissociated", 5000))
    many = simulate_cells(5000, 0, sources=small, n_genes=200)
    assert len(many.slides) == 2 and many.cells.n_obs == 5000 and many.cells.obsm["spatial_true"].std() > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"preset": "livr"}, "preset"), ({"mean_shfit": 1.0}, "did you mean mean_shift"), ({"ambient": -0.1}, "ambient"),
        ({"tissue": "brain"}, "tissue"), ({"n_genes": 50}, "n_genes"), ({"sources": (Source("x", "P", "cells", 5),)}, "sources"),
        ({"stress": float("nan")}, "stress"),
    ],
)
def test_bad_settings_are_one_line(arguments, says):
    with pytest.raises(InputError) as caught:
        simulate(arguments.pop("preset", "tiny"), **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)
