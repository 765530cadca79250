"""Two readings of a hypothesis: rules of the log, what centring leaves, clusters of one slide, genes one by one."""

import numpy as np
import pytest

from gears_nb.core.errors import InputError
from gears_nb.encoder.markers import choose_panels
from gears_nb.encoder.probes import load_slides, slide_accuracy, stack_slides
from gears_nb.encoder.readings import (
    LogRule,
    after_centring,
    all_go,
    by_count,
    centred_by,
    difference,
    fold_accuracies,
    gene_morans,
    importances,
    inside_clusters,
    leading_genes,
    log_clusters,
    log_rows,
    owned_clusters,
    panel_hits,
    signs_text,
    told,
    tvd_pairs,
)
from gears_nb.encoder.replication import replicate


@pytest.fixture(scope="module")
def table():
    return stack_slides(load_slides("tiny", 12))


def found(**values):
    return replicate({name: {"x": v} for name, v in values.items()}, {"x": (0.9, lambda r: r["x"])}, {})


def test_a_rule_gives_every_data_set_a_word():
    rule = LogRule("H", "CONFIRMED", {"large": lambda v: v["x"] > 0.5, "positive": lambda v: v["x"] > 0})
    verdicts = rule.verdicts(found(a=0.7, b=0.2, c=-1.0, d=None, e=float("nan")))
    assert [v.outcome for v in verdicts] == ["CONFIRMED", "PARTIAL", "FALSIFIED", "UNDECIDED", "UNDECIDED"]
    assert [v.value for v in verdicts[:3]] == ["2 of 2", "1 of 2", "0 of 2"]
    assert verdicts[0].sentence == "H by the log's rule, a" and "large" in verdicts[0].rule and "CONFIRMED" in verdicts[0].rule
    text = signs_text(rule, found(a=0.7), {"a": "PARTIAL"})
    assert "by ours" in text and "PARTIAL" in text and "by the log's rule" in text


def test_a_rule_that_contradicts_the_log_is_refused():
    with pytest.raises(InputError, match="the log says"):
        LogRule("H", "FALSIFIED", {"large": lambda v: v["x"] > 0.5}).verdicts(found(a=0.1))


@pytest.mark.parametrize("signs, count, go", [((True, True), "CONFIRMED", "go"), ((True, False), "PARTIAL", "no-go"), ((False, None), "UNDECIDED", "no-go"), ((True, None), "UNDECIDED", "UNDECIDED")])
def test_from_signs_to_words(signs, count, go):
    assert (by_count(dict(enumerate(signs))), all_go(dict(enumerate(signs)))) == (count, go)


def test_the_logs_number_stands_beside_the_runs():
    assert log_rows(found(a=0.7, b=None)) == [{"quantity": "x", "dataset": "a", "log": 0.9, "run": 0.7}, {"quantity": "x", "dataset": "b", "log": 0.9, "run": None}]


def test_a_difference_carries_its_interval():
    sure, one = difference([0.1, 0.11, 0.09]), difference([0.1])
    assert sure["interval"][0] > 0 and sure["visible"] < 0.1 and sure["pairs"] == 3
    assert np.isnan(one["visible"]) and "no interval" in told(one)


def test_folds_are_those_of_the_probe():
    rng = np.random.default_rng(0)
    labels = np.repeat(list("ab"), 100)
    H = rng.normal(size=(200, 5)) + 0.6 * (labels == "b")[:, None]
    assert fold_accuracies(H, labels, seed=3).mean() == pytest.approx(slide_accuracy(H, labels, seed=3), abs=1e-9)


def test_centring_by_training_rows_ignores_the_others():
    H, labels, train = np.array([[0.0], [2.0], [100.0], [5.0]]), np.array(list("aaab")), np.array([True, True, False, True])
    assert centred_by(H, labels, train).ravel().tolist() == [-1.0, 1.0, 99.0, 0.0]


def test_below_chance_is_the_procedure_and_chance_is_too():
    rng = np.random.default_rng(1)
    labels = np.repeat(list("abc"), 120)
    noise = rng.normal(size=(360, 40))
    wide = noise * np.where(labels == "c", 1.7, 1.0)[:, None]
    seen, left = after_centring(noise, labels), after_centring(wide, labels)
    assert seen["with_slide"] < 0.2
    assert seen["by_fold"] == pytest.approx(1 / 3, abs=1e-9) == left["by_fold"]
    assert abs(seen["by_fold_curved"] - 1 / 3) < 0.1 and left["by_fold_curved"] > 0.5 and left["interval"][0] > 1 / 3


def test_clusters_of_one_slide():
    labels = np.repeat(["x", "y", "z"], 20)
    groups = np.r_[np.repeat([0, 1], [12, 8]), np.repeat([1, 2], 10), np.repeat([1, 2], 10)]
    pairs = tvd_pairs(groups, labels)
    assert pairs["y z"] == 0 and pairs["x y"] == pytest.approx(0.6)
    assert owned_clusters(groups, labels) == [{"cluster": 0, "slide": "x", "share": 0.6, "elsewhere": 0.0}]
    assert owned_clusters(np.zeros(60, int), labels) == []


def test_inside_clusters_a_missing_slide_is_left_out():
    rng = np.random.default_rng(2)
    labels = np.repeat(["x", "y", "z"], [40, 40, 4])
    H = rng.normal(size=(84, 3)) + 3 * (labels == "y")[:, None]
    row = inside_clusters(H, np.zeros(84, int), labels)
    assert row["valid"] == 1 and row["chance"] == 0.5 and row["accuracy"] > 0.9
    centred = inside_clusters(H, np.zeros(84, int), labels, by_fold=True)
    assert centred["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert np.isnan(inside_clusters(H, np.arange(84), labels)["accuracy"])


def test_log_clusters_where_each_cluster_is_a_slide():
    rng = np.random.default_rng(3)
    labels = np.repeat(["x", "y"], 60)
    H = rng.normal(size=(120, 3)) + 20 * (labels == "y")[:, None]
    row = log_clusters(H, centred_by(H, labels, np.ones(120, bool)), labels, 2)
    assert row["cramers_v"] > 0.95 and row["onehot"] == 1 and row["valid"] == 0 and np.isnan(row["within_raw"])
    assert [c["share"] for c in row["owned"]] == [1.0, 1.0]


def test_genes_one_by_one(table):
    genes = leading_genes(table, choose_panels(table.genes))
    assert "Glul" in genes and "Lyz2" not in genes
    rows = gene_morans(table, genes)
    assert set(rows["Glul"]["by_slide"]) == {"ST1", "ST2", "ST3"}
    assert rows["Glul"]["range"] == pytest.approx(np.ptp(list(rows["Glul"]["by_slide"].values())))


def test_importances_are_gone_by_construction(table):
    found = importances(table)
    assert found["raw_max"] > 0.01 and found["centred_max"] < 1e-3 * found["raw_max"]


def test_panel_hits_by_hand():
    hits = panel_hits({"panels": {"p": 3}, "classes": {"other": 90, "mito": 10}}, {"p": ["a", "b", "c"], "q": []}, 1000)
    assert hits == {"p": {"genes": 3, "hits": 3, "enrichment": 10.0}}
