"""H3 and H5: the rulers on cases with a known answer, verdicts with one cause switched off, and bad input."""

from dataclasses import replace

import numpy as np
import pytest

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import PRESETS
from gears_nb.encoder.h3_composition import (
    Shares,
    composition,
    contingency,
    h3,
    kmeans,
    panel_spread,
    spatial_blocks,
    within_clusters,
)
from gears_nb.encoder.h5_biology import (
    amplitude,
    elasticities,
    gradients,
    h5,
    program_levels,
    slide_directions,
    span_cosines,
)
from gears_nb.encoder.markers import choose_panels
from gears_nb.encoder.probes import load_slides, stack_slides

SPOTS = tuple(replace(s, size=400) for s in PRESETS["liver_crossslide"].sources if s.kind == "spots")


def liver(seed: int, **switches: float) -> list:
    return load_slides("liver_crossslide", seed, sources=SPOTS, **switches)


@pytest.fixture(scope="module")
def on():
    return liver(13)


def test_blocks_cover_and_balance():
    coords = np.random.default_rng(0).uniform(size=(500, 2))
    block = spatial_blocks(coords, 5)
    assert np.bincount(block).tolist() == [20] * 25
    assert all(np.ptp(coords[block == b], axis=0).max() < 0.5 for b in range(25))
    assert len(np.unique(spatial_blocks(coords[:9]))) == 4


@pytest.mark.parametrize("level", [0.5, 4.0])
def test_relative_variance_ignores_level_and_gene_shifts(level):
    rng = np.random.default_rng(1)
    cells = 0.05 + rng.binomial(10, 0.1, 3000)
    block = np.repeat(np.arange(30), 100)
    plain = panel_spread(rng.poisson(np.outer(cells, [2, 2, 2, 2])).astype(float), block, rng)[0]
    shifted = panel_spread(rng.poisson(level * np.outer(cells, [1, 2, 3, 4])).astype(float), block, rng)[0]
    assert abs(plain - shifted) < 0.15


def test_relative_variance_follows_share():
    rng = np.random.default_rng(2)
    block = np.repeat(np.arange(30), 100)
    found = [panel_spread(rng.poisson(np.outer(rng.binomial(10, p, 3000), [2, 2, 2])).astype(float), block, rng)[0] for p in (0.05, 0.1, 0.2)]
    expected = [np.log((1 - p) / (10 * p)) for p in (0.05, 0.1, 0.2)]
    assert np.allclose(found, expected, atol=0.15)


def test_shares_test_is_calibrated_and_sees_differences():
    rng = np.random.default_rng(3)
    error = np.full((3, 4), 0.1)

    def drawn(spread: float) -> dict:
        return Shares(("a", "b", "c"), tuple("wxyz"), rng.normal(size=(3, 4)) * np.hypot(0.1, spread), error, "t").test()

    null = np.array([drawn(0.0)["p"] for _ in range(400)])
    assert 0.02 < (null < 0.05).mean() < 0.09
    assert np.mean([drawn(0.4)["effect"] for _ in range(50)]) == pytest.approx(0.4, abs=0.1)
    assert np.isnan(Shares((), tuple("wxyz"), np.zeros((0, 4)), np.zeros((0, 4)), "t").test()["p"])


def test_contingency_by_hand():
    groups, labels = np.array([0, 0, 0, 1]), np.array(["a", "a", "b", "b"])
    found = contingency(groups, labels)
    assert found["chi2"] == pytest.approx(4 / 3) and found["cramers_v"] == pytest.approx(np.sqrt(1 / 3)) and found["tvd"] == 0.5
    assert contingency(np.zeros(4), labels)["cramers_v"] == 0


def test_within_clusters_sees_a_shift_and_not_a_mixture():
    rng = np.random.default_rng(4)
    labels = np.repeat(["a", "b"], 200)
    kind = rng.uniform(size=400) < np.where(labels == "a", 0.2, 0.8)
    mixture = rng.normal(size=(400, 3)) * 0.3 + 5 * kind[:, None]
    groups, soft = kmeans(mixture, 2)
    assert np.allclose(soft.sum(1), 1) and within_clusters(mixture, groups, labels)[0] < 0.65
    assert within_clusters(mixture + (labels == "a")[:, None], groups, labels)[0] > 0.9
    assert np.isnan(within_clusters(mixture, np.arange(400), labels)[0])


def test_elasticities_survive_noise_and_level():
    rng = np.random.default_rng(5)
    cells = rng.gamma(2, 1, 4000)
    rate = np.stack([cells, cells, cells, 2 - 0 * cells], 1) * np.array([1, 2, 0.5, 1])
    slope = elasticities(rng.poisson(rate).astype(float), [np.arange(3)], np.repeat(["a", "b"], 2000))[:, 0]
    assert np.allclose(slope, [1, 1, 1, 0], atol=0.1)
    assert elasticities(rate, [], np.repeat(["a", "b"], 2000)).shape == (4, 0)


def test_amplitude_ignores_gene_shifts_and_sees_steepness():
    rng = np.random.default_rng(6)
    z, block = rng.uniform(-1, 1, 2000), np.repeat(np.arange(20), 100)

    def measured(steep: float, shift: np.ndarray) -> float:
        rate = np.exp(steep * np.outer(z, np.repeat([-1.0, 1.0], 6))) * shift * 5
        return amplitude(rng.poisson(rate).astype(float), np.arange(6), np.arange(6, 12), block, rng)[0]

    plain = measured(0.5, np.ones(12))
    assert abs(measured(0.5, np.exp(rng.normal(size=12) * 0.3)) - plain) < 0.08
    assert measured(0.75, np.ones(12)) - plain > 0.2


def test_slide_direction_finds_the_shifted_genes():
    rng = np.random.default_rng(7)
    labels = np.repeat(["a", "b"], 150)
    X = rng.normal(size=(300, 40))
    X[150:, :5] += 2
    cosine = span_cosines(slide_directions(X, labels), {"shifted": np.arange(5), "other": np.arange(5, 10)})
    assert cosine["shifted"] > 0.8 and cosine["other"] < 0.3


def test_h3_verdicts(on):
    assert h3(on, clusters=())["verdict"] == "CONFIRMED"
    assert h3(liver(13, composition=0.0), clusters=())["verdict"] == "FALSIFIED"


def test_h5_verdicts(on):
    assert h5(on, tables=False)["verdict"] == "CONFIRMED"
    assert h5(liver(13, biology=0.0), tables=False)["verdict"] == "FALSIFIED"


def test_levels_follow_planted_programs():
    group = liver(13, mean_shift=0.0, composition=0.0)
    stacked = stack_slides(group)
    panels = choose_panels(stacked.genes)
    found = program_levels(stacked, panels, composition(stacked, panels))
    truth = np.array([[s.uns["truth"]["program_level"][p] for s in group] for p in ("pericentral", "periportal", "mito")])
    level = found.level[[found.programs.index(p) for p in ("pericentral", "periportal", "mito")]]
    assert np.corrcoef((truth - truth.mean(1, keepdims=True)).ravel(), level.ravel())[0, 1] > 0.8
    assert gradients(stacked, panels)["p"] < 0.01


def test_same_seed_same_numbers_and_input_untouched(on):
    before = [s.X.copy() for s in on]
    first, second = (h3(on, clusters=(5,), folds=2) for _ in range(2))
    assert first == second and h5(on, tables=False) == h5(on, tables=False)
    assert all((a != s.X).nnz == 0 for a, s in zip(before, on))


def test_tables_are_complete(on):
    row = h3(on, clusters=(5,), folds=2)
    assert row["clusters"][0]["raw_cramers_v"] > 0.9 and row["accuracy"]["raw"] > 0.95 and set(row["panels"]) == {"Kupffer", "endothelial", "stellate"}
    row = h5(on, folds=2)
    assert row["accuracy"]["raw"] > 0.95 and row["accuracy"]["centred"] < 0.5
    assert set(row["programs"]) == set(row["cosine"]) and all(p["fold"] >= 1 for p in row["programs"].values())


def test_unknown_genes_fall_back():
    group = liver(13)
    for s in group:
        s.var_names = [f"G{i}" for i in range(s.n_vars)]
    assert h3(group, clusters=(5,), folds=2)["basis"] == "clusters"
    assert h5(group, tables=False)["verdict"] == "UNDECIDED"


def test_one_slide_is_refused(on):
    for hypothesis in (h3, h5):
        with pytest.raises(InputError, match="slide"):
            hypothesis(on[:1])
