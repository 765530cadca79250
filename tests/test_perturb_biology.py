"""Sentinel genes and enrichment: planted answers, noise, names, missing genes and files that are none."""
from __future__ import annotations

import builtins

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gears_nb.core.errors import InputError
from gears_nb.perturb.biology import (
    PATHWAYS,
    SENTINELS,
    agree,
    checklist,
    concerns,
    enrichment,
    enrichment_agreement,
    plot_checklist,
    random_sets,
    read_gmt,
)
from gears_nb.perturb.screens import Conditions

GENES = np.array([*dict.fromkeys(gene for _, own in PATHWAYS.values() for gene in own), *(f"gene{j}" for j in range(120))])


def table(*rows):
    return Conditions(*(np.array(column) for column in zip(*rows)), np.full(len(rows), 100.0))


@pytest.mark.parametrize("sentinel", SENTINELS, ids=lambda s: s.name)
def test_each_sentinel_passes_its_own_answer_and_fails_the_opposite(sentinel):
    asked = table((sentinel.lines[0] if sentinel.lines else "A549", sentinel.compounds[0]))
    right = sentinel.direction * np.isin(GENES, PATHWAYS[sentinel.pathway][1])[None] + np.random.default_rng(0).normal(0, 0.2, (1, len(GENES)))
    outcome = lambda delta: checklist(delta, asked, GENES).set_index("sentinel").loc[sentinel.name, "outcome"]
    assert outcome(right) == "pass" and outcome(-right) == "fail" and outcome(0 * right) == "fail" and outcome(0 * right + sentinel.direction) == "fail"
    assert outcome(right * np.nan) == "not measurable"


def test_who_is_asked():
    by_name = {s.name: s for s in SENTINELS}
    damage, mek, gamma = by_name["DNA damage"], by_name["MEK inhibitor"], by_name["interferon gamma pathway lost"]
    assert concerns(damage, "A549", "Doxorubicin (Adriamycin)") and not any(concerns(damage, line, "doxorubicin") for line in ("K562", "K-562", "THP-1"))
    assert concerns(mek, "K562", "TRAMETINIB") and not any(concerns(mek, "K562", name) for name in ("control", "trametinibx", "trametinib+vorinostat"))
    assert concerns(gamma, "THP1", "JAK2") and not concerns(gamma, "THP1", "JAK20") and not concerns(by_name["BRAF inhibitor"], "A549", "vemurafenib")
    assert checklist(np.zeros((1, 3)), table(("K562", "water")), ["a", "b", "c"]).empty


def test_noise_passes_one_time_in_twenty_also_by_spread():
    rng = np.random.default_rng(3)
    spread = rng.gamma(1, 1, len(GENES))
    asked = table(*[("A549", "dexamethasone")] * 1000)
    share = (checklist(spread * rng.normal(size=(1000, len(GENES))), asked, GENES, spread)["outcome"] == "pass").sum()
    assert stats.binomtest(int(share), 1000, 0.05).pvalue > 1e-3


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_outcomes_do_not_depend_on_size_and_case(seed, scale):
    delta = np.random.default_rng(seed).normal(size=(2, len(GENES)))
    asked = table(("MCF7", "fulvestrant"), ("A549", "vorinostat"))
    first = checklist(delta, asked, GENES)
    assert checklist(scale * delta, asked, GENES)["outcome"].equals(first["outcome"]) and checklist(delta, asked, np.char.lower(GENES)).equals(first)


def test_missing_genes_and_wrong_shapes():
    asked = table(("A549", "lovastatin"))
    few = checklist(np.ones((1, 3)), asked, ["HMGCR", "x", "y"])
    assert few["outcome"].tolist() == ["not measurable"] and few["genes_there"].tolist() == [1] and few["mean_change"].tolist() == [1]
    assert np.isnan(checklist(np.ones((1, 2)), asked, ["x", "y"])["mean_change"][0])
    for bad in ((np.ones((2, 3)), None), (np.ones((1, 2)), None), (np.ones((1, 3)), np.ones(2))):
        with pytest.raises(InputError, match="checklist"):
            checklist(bad[0], asked, ["HMGCR", "x", "y"], bad[1])


def test_random_sets_are_sets():
    sets = random_sets(30, 7, seed=1)
    assert sets.shape == (2000, 30) and (np.diff(sets.indptr) == 7).all() and np.allclose(sets.sum(1), 1) and (sets != random_sets(30, 7, seed=1)).nnz == 0
    assert np.allclose((sets > 0).mean(0), 7 / 30, atol=0.05) and max(np.bincount(row).max() for row in sets.indices.reshape(-1, 7)[:50]) == 1


def test_agreement_of_checklists():
    asked = table(("A549", "trametinib"), ("A549", "vorinostat"), ("A549", "lovastatin"), ("A549", "dexamethasone"))
    observed = checklist(np.random.default_rng(0).normal(0, 0.1, (4, len(GENES))), asked, GENES)
    observed["outcome"] = ["pass", "pass", "fail", "not measurable"]
    predicted = observed.assign(outcome=["pass", "fail", "pass", "pass"])
    assert agree(predicted, observed) == {"asked": 3, "observed_pass": 2, "same": 1 / 3, "kept": 0.5, "unfounded": 1.0}
    assert agree(predicted[::-1], observed) == agree(predicted, observed)
    assert agree(predicted[3:], observed) == {"asked": 0, "observed_pass": 0, "same": None, "kept": None, "unfounded": None}


def test_picture():
    asked = table(("A549", "trametinib"), ("A549", "vorinostat"))
    found = checklist(np.ones((2, len(GENES))), asked, GENES)
    fig = plot_checklist(found)
    ax = fig.axes[0]
    assert len(ax.patches) == len(found) and [t.get_text() for t in ax.get_xticklabels()] == list(dict.fromkeys(found["condition"]))
    plt.close(fig)
    with pytest.raises(InputError, match="no rows"):
        plot_checklist(found[:0])


def test_gmt_files(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("a\tx\tG1\tG2\tG1\t\n\nb\t\tG3\n")
    assert read_gmt(path) == {"a": ["G1", "G2"], "b": ["G3"]}
    for text in ("a\tx\n", "\tx\tG1\n", "a\tx\tG1\na\tx\tG2\n", "\n"):
        path.write_text(text)
        with pytest.raises(InputError):
            read_gmt(path)
    path.write_bytes(b"\xff\xfe\x00")
    for where in (path, tmp_path / "none.gmt"):
        with pytest.raises(InputError, match="cannot be read"):
            read_gmt(where)


def planted(seed=0):
    rng = np.random.default_rng(seed)
    names = np.array([f"G{j}" for j in range(150)])
    delta = rng.normal(0, 0.5, 150)
    delta[:12], delta[20:32] = delta[:12] + 1.5, delta[20:32] - 1.5
    sets = {"up": names[:12], "down": names[20:32], **{f"random {i}": rng.choice(names[40:], 12, replace=False) for i in range(4)}}
    return delta, names, sets


def test_enrichment_of_planted_sets(tmp_path):
    pytest.importorskip("gseapy")
    delta, names, sets = planted()
    found = enrichment(delta, names, sets)
    nes = found.set_index("set")["nes"]
    assert set(found["set"][:2]) == {"up", "down"} and nes["up"] > 0 > nes["down"] and (found["fdr"][:2] < 0.1).all()
    assert set(found["leading"][0]) <= set(sets[found["set"][0]])
    path = tmp_path / "sets.gmt"
    path.write_text("".join("\t".join([name, "", *own]) + "\n" for name, own in sets.items()))
    mixed = np.random.default_rng(1).permutation(150)
    assert enrichment(delta[mixed], np.char.lower(names[mixed]), path).equals(found), "neither order nor case of genes matters, nor does the file"
    turned = enrichment_agreement(enrichment(-delta, names, sets), found, fdr=0.1)
    assert turned["same_sign"] == 0 and turned["significant"] >= 2 and turned["spearman"] < -0.8
    assert enrichment_agreement(found, found, fdr=0.1) == {"spearman": pytest.approx(1), "significant": turned["significant"], "same_sign": 1.0}


def test_enrichment_of_nothing():
    pytest.importorskip("gseapy")
    delta, names, sets = planted()
    flat = enrichment(0 * delta, names, sets)
    assert not flat["nes"].any() and (flat["p"] == 1).all() and flat["set"].tolist() == list(sets)
    observed = enrichment(delta, names, sets)
    assert enrichment_agreement(flat, observed, fdr=0.1) == {"spearman": 0.0, "significant": int((observed["fdr"] <= 0.1).sum()), "same_sign": 0.0}
    assert enrichment_agreement(flat[:0], observed) == {"spearman": None, "significant": 0, "same_sign": None}
    twice, foreign = np.where(names == "G1", "G0", names), {"other": ["ENSG1", "ENSG2", "ENSG3"]}
    for change in (dict(sets=foreign), dict(delta=delta * np.nan), dict(delta=delta[:9]), dict(genes=twice)):
        with pytest.raises(InputError):
            enrichment(**{"delta": delta, "genes": names, "sets": sets} | change)


def test_without_gseapy(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("gseapy"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    delta, names, sets = planted()
    with pytest.raises(InputError, match=r"gears_nb\[perturb\]"):
        enrichment(delta, names, sets)
