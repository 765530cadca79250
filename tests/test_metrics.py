"""Metrics against closed forms and independent implementations; ranks and tables."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import pearsonr, spearmanr, wasserstein_distance
from sklearn.manifold import trustworthiness as sklearn_trust
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from gears_nb.benchmark import compare
from gears_nb.core.errors import InputError
from gears_nb.geometry import metrics
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.geometry.metrics import METRICS, score
from gears_nb.lab.results import SCORE_KEYS


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    true = rng.random((240, 2)) * [3, 1]
    return true + 0.2 * rng.normal(size=true.shape), true


def rotation(angle: float, mirror: bool) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]]) @ np.diag([1, -1 if mirror else 1])


def test_ranked_metrics_are_those_of_the_results_contract():
    assert tuple(METRICS) == SCORE_KEYS


def test_against_independent_implementations(pair):
    pred, true = pair
    row, d_hat, d = score(pred, true), pdist(gauge_fix(pred)), pdist(gauge_fix(true))
    radius = np.median(np.sort(cdist(gauge_fix(true), gauge_fix(true)), axis=1)[:, 20])
    contact = d <= radius + 1e-9
    weight = np.where(contact, 0.5 / contact.sum(), 0.5 / (~contact).sum())
    scale = (d @ d_hat) / (d_hat @ d_hat)
    shell = lambda x: np.digitize(x, radius * np.array([0.5, 1, 1.5, 2]))
    knn = lambda X: np.sort(cdist(X, X), axis=1)[:, 20]
    expected = {
        "spearman": spearmanr(d_hat, d)[0], "pearson": pearsonr(d_hat, d)[0],
        "stress1": np.linalg.norm(scale * d_hat - d) / np.linalg.norm(d),
        "edge_auc": roc_auc_score(contact, -d_hat), "bap": average_precision_score(contact, -d_hat, sample_weight=weight),
        "shell_f1": f1_score(shell(d), shell(scale * d_hat), average="macro"),
        "trust20": sklearn_trust(true, pred, n_neighbors=20), "cont20": sklearn_trust(pred, true, n_neighbors=20),
        "w1_knn": wasserstein_distance(knn(gauge_fix(pred)), knn(gauge_fix(true))),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=2e-4 if name == "shell_f1" else 1e-7), name


def test_swd_by_one_dimensional_transport(pair):
    pred, true = (gauge_fix(x) for x in pair)
    angles = np.arange(128) * np.pi / 128
    square = [np.mean((np.sort(pred @ u) - np.sort(true @ u)) ** 2) for u in np.c_[np.cos(angles), np.sin(angles)]]
    assert metrics.swd(pred, true) == pytest.approx(math.sqrt(np.mean(square)))
    assert metrics.swd(true + [3, 4], true) == pytest.approx(5 / math.sqrt(2))


@pytest.mark.parametrize("angle,mirror,scale", [(0.0, False, 1.0), (1.1, True, 1e-4), (-2.5, False, 1e5)])
def test_pose_and_unit_of_either_side_do_not_matter(pair, angle, mirror, scale):
    pred, true = pair
    moved = scale * pred @ rotation(angle, mirror) + [10 * scale, -3 * scale]
    reference = score(pred, true)
    for row in (score(moved, true), score(pred, 7 * true @ rotation(-angle, not mirror) - 5)):
        assert row == pytest.approx(reference, abs=2e-4)


@pytest.mark.parametrize("true", [np.stack(np.meshgrid(np.arange(18.0), np.arange(15.0)), -1).reshape(-1, 2), np.random.default_rng(0).random((200, 2))],
                         ids=["lattice", "scattered"])
def test_perfect_copy_is_perfect(true):
    row = score(0.3 * true @ rotation(0.7, True) + 9, true)
    for name, sign in METRICS.items():
        assert row[name] == pytest.approx(1 if sign > 0 else 0, abs=1e-6), name
    for name in ("scale_error", "calibration_error", "lrmse10", "lrmse20", "lrmse50", "lrmse100"):
        assert row[name] == pytest.approx(0, abs=1e-6), name


def test_collapse_to_a_point_knows_nothing(pair):
    row = score(np.ones_like(pair[1]), pair[1])
    assert (row["spearman"], row["pearson"], row["stress1"], row["edge_auc"], row["bap"]) == (0, 0, 1, 0.5, 0.5)
    assert row["trust20"] == pytest.approx(0.5, abs=0.06) and row["cont20"] == pytest.approx(0.5, abs=0.06)
    assert row["swd"] == pytest.approx(math.sqrt(0.5))       # mean square projection of a unit-RMS cloud in the plane


def test_random_permutation_keeps_the_cloud_and_loses_the_cells(pair):
    true = pair[1]
    row = score(true[np.random.default_rng(3).permutation(len(true))], true)
    assert abs(row["spearman"]) < 0.05 and abs(row["edge_auc"] - 0.5) < 0.03 and abs(row["bap"] - 0.5) < 0.03
    assert row["w1_knn"] == pytest.approx(0, abs=1e-9) and abs(row["trust20"] - 0.5) < 0.05


def test_line_in_a_square_gets_one_axis():
    true = np.random.default_rng(4).random((300, 2))
    row = score(true * [1, 0], true)
    assert 0.4 < row["spearman"] < 0.9 and row["cont20"] > row["trust20"]


def test_ties_in_the_prediction_are_not_decided_by_file_order():
    true = np.c_[np.arange(300.0), np.zeros(300)]            # the file is sorted by position
    lumps = np.repeat(np.arange(3.0), 100)[:, None] * [100, 0]
    rows = [score(lumps[order], true[order])["trust20"] for order in (np.arange(300), np.random.default_rng(0).permutation(300))]
    assert rows[0] == pytest.approx(rows[1], abs=0.02)


def test_subsample_is_seeded_and_close():
    rng = np.random.default_rng(5)
    true = rng.random((1500, 2))
    pred = true + 0.1 * rng.normal(size=true.shape)
    whole, part = score(pred, true), score(pred, true, seed=1, max_cells=700)
    assert part == score(pred, true, seed=1, max_cells=700) and part != score(pred, true, seed=2, max_cells=700)
    assert part["n_scored"] == 700
    for name in ("spearman", "pearson", "stress1", "swd"):
        assert part[name] == pytest.approx(whole[name], abs=0.03), name


def test_calibration_and_scale_of_a_stretched_map(pair):
    d = pdist(gauge_fix(pair[1]))
    assert metrics.calibration_error(1.25 * d, d) == pytest.approx(0.25)
    assert metrics.scale_error(0.5 * d, d, np.quantile(d, 0.1)) == pytest.approx(math.log(2))


def test_cells_without_position_are_counted(pair):
    pred, true = pair[0].copy(), pair[1]
    pred[::10] = np.nan
    row = score(pred, true)
    placed = np.isfinite(pred).all(1)
    assert row["n_missing"] == 24 and row["n_scored"] == 216
    assert row["spearman"] == pytest.approx(score(pred[placed], true[placed])["spearman"])


@pytest.mark.parametrize("pred,true,field", [
    (np.zeros((4, 2)), np.zeros((5, 2)), "pred"), (np.zeros(5), np.zeros(5), "pred"),
    (np.zeros((9, 2)), np.full((9, 2), np.nan), "true"), (np.full((9, 2), np.nan), np.eye(9, 2), "pred"),
    (np.arange(18.0).reshape(9, 2), np.ones((9, 2)), "true"),
])
def test_bad_input_is_one_line(pred, true, field):
    with pytest.raises(InputError) as error:
        score(pred, true)
    assert error.value.field == field and "\n" not in str(error.value)


def test_three_dimensional_truth():
    true = np.random.default_rng(6).random((120, 3))
    assert score(true @ np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0], true)["spearman"] == pytest.approx(1)
    assert 0.3 < score(true[:, :2], true)["spearman"] < 1


# --- compare ---


def entry(method: str, good: float, *, dataset: str = "d", protocol: str = "C", seed: int = 0) -> dict:
    values = {m: good if sign > 0 else 1 - good for m, sign in METRICS.items()}
    return {"protocol": protocol, "dataset": dataset, "method": method, "seed": seed, **values}


def test_mean_rank_knows_every_direction():
    rows = [entry("a", 0.2), entry("b", 0.9), entry("c", 0.5)]
    assert compare.mean_rank(rows) == {"d": {"b": 1, "c": 2, "a": 3}}
    for metric, sign in METRICS.items():
        better = rows[0] | {metric: 2 if sign > 0 else -1}
        assert compare.mean_rank([better, *rows[1:]])["d"]["a"] == pytest.approx(2.8)


def test_seeds_are_averaged_before_ranking_and_ties_share():
    rows = [entry("lucky", g, seed=s) for s, g in enumerate((0.6, 0.6, 0.0))] + [entry("steady", 0.5, seed=s) for s in range(3)]
    assert compare.mean_rank(rows)["d"] == {"steady": 1, "lucky": 2}
    assert compare.mean_rank([entry("a", 0.5), entry("b", 0.5)])["d"] == {"a": 1.5, "b": 1.5}


def test_oracle_takes_no_rank_but_stands_in_the_table():
    rows = [entry("nearest_spot", 0.99), entry("a", 0.4), entry("b", 0.3)]
    assert compare.mean_rank(rows)["d"] == {"a": 1, "b": 2}
    lines = compare.table(rows, "d").splitlines()
    assert len(lines) == 5 and lines[-1].startswith("| nearest_spot |  |") and "**0.400**" in lines[2]


def test_protocols_of_one_data_set_stay_apart():
    rows = [entry(m, g, protocol=p) for p, better in (("A", "a"), ("B", "b")) for m, g in (("a", 0.6 + 0.1 * (better == "a")), ("b", 0.65))]
    ranks = compare.mean_rank(rows)
    assert list(ranks["d/A"]) == ["a", "b"] and list(ranks["d/B"]) == ["b", "a"]
    assert compare.mean_rank_all(rows) == {"A": {"a": 1, "b": 2}, "B": {"b": 1, "a": 2}}


def test_html_is_escaped():
    text = compare.table([entry("<script>", 0.5), entry("b", 0.4)], "d", "html")
    assert "&lt;script&gt;" in text and "<b>0.500</b>" in text


def test_risk_rises_with_coverage_for_an_honest_confidence():
    rng = np.random.default_rng(8)
    true, noise = rng.random((400, 2)), rng.random(400)
    pred = true + noise[:, None] * rng.normal(size=true.shape)
    honest, blind = (compare.risk_coverage(pred, true, c) for c in (-noise, rng.random(400)))
    assert list(honest.risk) == sorted(honest.risk) and honest.gain > 0.2 > abs(blind.gain)
    assert honest.risk[-1] == pytest.approx(score(pred, true)["stress1"])
    unsure = np.where(noise > 0.9, np.nan, -noise)
    assert compare.risk_coverage(pred, true, unsure).risk[-1] < honest.risk[-1]


@pytest.mark.parametrize("bad", [np.empty((0, 2)), np.ones((4, 3)), np.full((4, 2), np.nan), np.ones(4)])
def test_clouds_without_a_distance_are_refused(bad):
    with pytest.raises(InputError, match="two clouds of the same dimension"):
        metrics.swd(np.ones((4, 2)), bad)
    with pytest.raises(InputError, match="three cells or more"):
        metrics.trustworthiness(np.ones((2, 2)), np.ones((2, 2)))
