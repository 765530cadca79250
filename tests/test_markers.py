"""Marker panels: the right table for the data, names recognised, scores as defined."""
import numpy as np
import pytest
import scipy.sparse as sp

from gears_nb.core.errors import InputError
from gears_nb.data import simulator
from gears_nb.encoder import markers


def test_tables_are_well_formed():
    for tissue, panels in markers.PANELS.items():
        for genes in panels.values():
            assert len(genes) == len(set(genes)) >= 5
            assert all((g == g.upper()) == tissue.startswith("human") for g in genes if g[-1].isalpha() and len(g) > 2), tissue
    assert "mito" in markers.PANELS["human breast"] and len(markers.PANELS["human breast"]) == 9


def test_liver_table_holds_the_simulators_markers():
    for panel, genes in markers.PANELS["mouse liver"].items():
        assert set(simulator.PANELS[panel.replace(" ", "_")]) <= set(genes)


@pytest.mark.parametrize("tissue", list(markers.PANELS))
def test_each_tissue_is_recognised_by_its_genes(tissue):
    names = [g for panel in markers.PANELS[tissue].values() for g in panel]
    chosen = markers.choose_panels([*names, *(f"Other{i}" for i in range(500))])
    assert chosen.tissue == tissue and chosen.share == 1 and not any(chosen.missing.values())


def test_species_is_told_by_spelling():
    mouse = [g for panel in markers.PANELS["mouse liver"].values() for g in panel]
    assert markers.panel_shares([g.upper() for g in mouse])["mouse liver"] == 0
    assert markers.choose_panels(["x", "y", "mt-Nd1"]).genes == {"mito": ("mt-Nd1",)}
    with pytest.raises(InputError, match="moon"):
        markers.choose_panels(mouse, tissue="moon")


def test_simulated_and_real_sections_get_their_table():
    from gears_nb.data.registry import PROTOCOLS, available
    from gears_nb.encoder.probes import load_slides
    assert markers.choose_panels(load_slides("tiny", 21)[0].var_names).tissue == "mouse liver"
    here = available()
    for name, tissue in {"her2st_E": "human breast", "mob": "mouse olfactory bulb"}.items():
        if here[PROTOCOLS[name].dataset]:
            assert markers.choose_panels(load_slides(name)[0].var_names).tissue == tissue


@pytest.mark.parametrize("name,kind", [
    ("mt-Co1", "mito"), ("MT-ND4L", "mito"), ("Mt1", "other"), ("MTOR", "other"), ("RPL7A", "ribo"), ("Rps6", "ribo"), ("RPS6KB1", "other"), ("RPSA", "ribo"),
    ("RPLP1", "ribo"), ("MRPL13", "other"), ("JUNB", "stress"), ("JUP", "other"), ("Hspa8", "stress"), ("HSPA5", "other"), ("Apoa1", "ambient"), ("APOL1", "other"),
    ("IGHG3", "ambient"), ("IGHMBP2", "other"), ("Tfrc", "other"), ("TF", "ambient"), ("Mup3", "ambient"), ("HPRT1", "other"), ("Alb", "ambient"), ("Albfm1", "other")])
def test_gene_classes(name, kind):
    assert markers.gene_classes([name]).tolist() == [kind]


def test_scores_are_plain_means():
    X = np.random.default_rng(0).poisson(2.0, (20, 6)).astype(np.float32)
    columns = {"first": np.array([0, 3]), "none": np.array([], int), "second": np.array([5])}
    names, scores = markers.program_scores(X, columns)
    assert names == ["first", "second"] and np.allclose(scores, np.column_stack([X[:, [0, 3]].mean(1), X[:, 5]]))
    assert np.allclose(markers.program_scores(sp.csr_matrix(X), columns)[1], scores)
    with pytest.raises(InputError, match="no panel"):
        markers.program_scores(X, {"none": np.array([], int)})
    panels = markers.choose_panels(["Glul", "Alb"], tissue="mouse liver")
    assert {k: v.tolist() for k, v in panels.columns(["Alb", "x", "Glul"]).items() if len(v)} == {"pericentral": [2], "hepatocyte core": [0]}
