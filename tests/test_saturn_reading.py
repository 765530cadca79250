"""What a macrogene says: top genes, differential macrogenes, gene sets, orthologues and pictures of an integrated table."""
from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.saturn.reading import (
    differential_macrogenes,
    enriched,
    orthologues_together,
    plot_integration,
    plot_macrogenes,
    plot_transfer,
    read_gene_sets,
    top_genes,
)
from gears_nb.saturn.species import Embeddings

MACROGENES, GENES = 12, 40


def integrated(seed: int = 0, n: int = 30, names: tuple[str, ...] = ("mouse", "human")) -> ad.AnnData:
    """A table as `integrate` makes it; macrogene t is raised in type t of every species, and genes j and 2 j + 1 of two species are alike."""
    rng = np.random.default_rng(seed)
    kind = np.tile(np.arange(3), n * len(names))[: n * len(names)]
    species = np.repeat(names, n)
    X = rng.gamma(20, 0.5, size=(len(kind), MACROGENES)) * rng.uniform(0.5, 3, size=(len(kind), 1))
    X[np.arange(len(kind)), kind] *= 3
    obs = pd.DataFrame({"species": pd.Categorical(species), "cell_type": pd.Categorical([f"type {k}" for k in kind])}, index=[f"{s}/{i}" for i, s in enumerate(species)])
    H = rng.normal(size=(len(kind), 4)) + 6 * np.eye(4)[kind]
    both = ad.AnnData(X.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"macrogene {j}" for j in range(MACROGENES)]), obsm={"X_saturn": H.astype(np.float32)})
    for name in names:
        both.varm[f"weights_{name}"] = sp.random(MACROGENES, GENES, density=0.3, random_state=rng, format="csr", dtype=np.float32)
    both.uns["saturn"] = {"genes": {name: np.array([f"{name[0].upper()}{j}" for j in range(GENES)], object) for name in names}, "seed": 0}
    return both


@pytest.fixture
def both() -> ad.AnnData:
    """Sixty cells of two species and three types."""
    return integrated()


@pytest.fixture(autouse=True)
def closed():
    """No figure is left open."""
    yield
    plt.close("all")


def frozen(both: ad.AnnData) -> tuple:
    """Everything that a function might change."""
    return both.X.copy(), both.obs.copy(), both.var.copy(), sorted(both.obsm), sorted(both.varm), sorted(both.obsp), sorted(both.layers), sorted(both.uns), both.varm["weights_human"].toarray()


def same(a: tuple, b: tuple) -> bool:
    """Two of `frozen` are equal."""
    return all(x.equals(y) if hasattr(x, "equals") else np.array_equal(x, y) for x, y in zip(a, b))


# --- genes of macrogenes

def test_top_genes_are_the_largest_weights(both):
    table = top_genes(both, 4)
    for name in ("human", "mouse"):
        W, genes = both.varm[f"weights_{name}"].toarray(), both.uns["saturn"]["genes"][name]
        for j, label in enumerate(both.var_names):
            own = table[(table["macrogene"] == label) & (table["species"] == name)]
            best = [g for g in np.argsort(-W[j], kind="stable")[:4] if W[j, g] > 0]
            assert own["gene"].tolist() == genes[best].tolist() and own["rank"].tolist() == list(range(1, len(best) + 1))
            np.testing.assert_array_equal(own["weight"], W[j, best])
    assert table["macrogene"].drop_duplicates().tolist() == both.var_names.tolist()


@given(st.integers(0, 1000), st.integers(1, 6))
def test_fewer_top_genes_are_the_first_of_more(seed, n):
    both = integrated(seed, 6)
    many = top_genes(both, 9)
    pd.testing.assert_frame_equal(top_genes(both, n), many[many["rank"] <= n].reset_index(drop=True))


def test_ties_go_by_order_and_zeros_are_no_weights(both):
    flat = np.zeros((MACROGENES, GENES), np.float32)
    flat[0, [7, 3, 20]] = 1
    both.varm["weights_human"] = sp.csr_matrix(flat)
    both.varm["weights_human"].data[0] = 0
    found = top_genes(both).query("species == 'human'")
    assert found["gene"].tolist() == ["H7", "H20"]


# --- differential macrogenes

@pytest.mark.parametrize("reference", ["rest", "type 2"])
def test_scores_are_those_of_scipy(both, reference):
    table = differential_macrogenes(both, reference=reference)
    R = both.X / both.X.mean(1, keepdims=True)
    kind = both.obs["cell_type"].astype(str).to_numpy()
    assert list(table["group"].unique()) == [t for t in ("type 0", "type 1", "type 2") if t != reference]
    for group, own in table.groupby("group"):
        assert (np.diff(own["score"]) <= 0).all()
        own = own.set_index("macrogene").loc[both.var_names]
        a, b = R[kind == group], R[kind != group if reference == "rest" else kind == reference]
        p = stats.mannwhitneyu(a.astype(float), b.astype(float), method="asymptotic", use_continuity=False).pvalue
        np.testing.assert_allclose(own["p"], p, rtol=1e-6)
        np.testing.assert_allclose(own["fdr"], stats.false_discovery_control(p), rtol=1e-6)
        np.testing.assert_allclose(own["log2_fold"], np.log2(a.mean(0) / b.mean(0)), atol=1e-5)
        assert (np.sign(own["score"]) == np.sign(stats.mannwhitneyu(a, b).statistic - len(a) * len(b) / 2)).all()


def test_ties_are_corrected(both):
    both.X = np.round(both.X / both.X.mean(1, keepdims=True))
    both.X[:, 0] = both.X.sum(1).max() + 1 - both.X[:, 1:].sum(1)  # all cells have one mean, so that ties stay
    own = differential_macrogenes(both).query("group == 'type 1'").set_index("macrogene").loc[both.var_names]
    inside = (both.obs["cell_type"] == "type 1").to_numpy()
    X = both.X.astype(float)
    p = stats.mannwhitneyu(X[inside], X[~inside], method="asymptotic", use_continuity=False).pvalue
    np.testing.assert_allclose(own["p"], np.where(np.ptp(X, axis=0) == 0, 1.0, p), rtol=1e-6)  # scipy: NaN for a macrogene that is constant


def test_the_planted_macrogene_comes_first_and_names_its_genes(both):
    first = differential_macrogenes(both).groupby("group").head(1)
    assert first["macrogene"].tolist() == ["macrogene 0", "macrogene 1", "macrogene 2"] and (first["fdr"] < 1e-6).all()
    told = top_genes(both, 5).query("macrogene == 'macrogene 1' and species == 'mouse'")["gene"]
    assert first["genes_mouse"].iloc[1] == ", ".join(told)


@given(st.integers(0, 1000))
def test_depth_and_order_of_cells_change_nothing(seed):
    both, rng = integrated(seed, 12), np.random.default_rng(seed)
    table = differential_macrogenes(both)
    moved = both[rng.permutation(both.n_obs)].copy()
    moved.X = moved.X * 2.0 ** rng.integers(-3, 4, (both.n_obs, 1)).astype(np.float32)
    again = differential_macrogenes(moved)
    pd.testing.assert_frame_equal(again, table, check_exact=False, rtol=1e-5)


def test_under_the_null_p_is_uniform():
    both = integrated(n=100)
    both.obs["drawn"] = np.random.default_rng(5).permutation(np.repeat(["a", "b"], 100))
    both.X = np.random.default_rng(6).gamma(5, size=both.shape).astype(np.float32)
    p = differential_macrogenes(both, "drawn").query("group == 'a'")["p"]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_one_species_is_the_table_of_its_cells(both):
    own = differential_macrogenes(both, species="mouse")
    pd.testing.assert_frame_equal(own, differential_macrogenes(both[both.obs["species"] == "mouse"]))


def test_unlabelled_cells_and_single_ones(both):
    labels = both.obs["cell_type"].astype(object).copy()
    labels.iloc[:5], labels.iloc[5], labels.iloc[6] = "unlabelled", np.nan, "alone"
    both.obs["cell_type"] = labels
    with pytest.warns(GearsWarning, match=r"1 groups have one cell.*\(alone\)"):
        table = differential_macrogenes(both)
    assert sorted(table["group"].unique()) == ["type 0", "type 1", "type 2"]
    with pytest.warns(GearsWarning):
        pd.testing.assert_frame_equal(table, differential_macrogenes(both[6:]))


def test_a_file_read_back_and_other_layouts_give_the_same(both, tmp_path: Path):
    table = differential_macrogenes(both)
    both.write_h5ad(tmp_path / "both.h5ad")
    sparse = both.copy()
    sparse.X = sp.csr_matrix(both.X)
    for other in (ad.read_h5ad(tmp_path / "both.h5ad"), ad.read_h5ad(tmp_path / "both.h5ad", backed="r"), sparse):
        pd.testing.assert_frame_equal(differential_macrogenes(other), table)
        pd.testing.assert_frame_equal(top_genes(other), top_genes(both))


# --- gene sets

def test_shipped_sets_are_read_and_packaged():
    sets = read_gene_sets()
    assert len(sets) == 15 and all(len(g) == len(set(g)) >= 8 for g in sets.values())
    assert {"INS", "IAPP"} <= set(sets["beta cell"]) and "*.gmt" in (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")


def test_gene_sets_of_a_file(tmp_path: Path):
    path = tmp_path / "mine.gmt"
    path.write_bytes("\ufeffone\tabout\tA\tB\tA\t\r\n\r\ntwo words\t\tC \r\n".encode())
    assert read_gene_sets(path) == {"one": ["A", "B"], "two words": ["C"]}


@pytest.mark.parametrize("content, says", [
    (b"a,b,c\n", "line 1: has 1 fields"), (b"a\tb\n", "line 1: has 2 fields"), (b"a\tb\tC\n\tb\tC\n", "line 2"), (b"a\t\tX\na\t\tY\n", "names the set 'a' a second time"),
    (b"\n \n", "holds no sets"), (b"\x1f\x8b\xff\xfe\x00", "cannot be read as text")])
def test_a_bad_gmt_is_one_line(tmp_path: Path, content, says):
    (tmp_path / "bad.gmt").write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        read_gene_sets(tmp_path / "bad.gmt")
    assert "\n" not in str(error.value)


@given(st.integers(0, 10_000))
def test_enriched_is_the_hypergeometric_law(seed):
    pytest.importorskip("gseapy")
    rng = np.random.default_rng(seed)
    background = [f"Gene{i}" for i in range(rng.integers(20, 120))]
    sets = {f"s{i}": [str(g).upper() for g in rng.choice(background, rng.integers(1, 15), replace=False)] + ["ELSEWHERE"] for i in range(4)}
    genes = rng.choice(background, rng.integers(1, 15), replace=False).tolist()
    table = enriched(genes, sets | {"foreign": ["NONE"]}, background)
    assert sorted(table["set"]) == sorted(sets)
    for row in table.itertuples():
        hits = {g.upper() for g in genes} & set(sets[row.set])
        assert row.overlap == len(hits) == len([g for g in row.genes.split(", ") if g in genes]) and row.size == len(sets[row.set]) - 1
        np.testing.assert_allclose(row.p, stats.hypergeom.sf(len(hits) - 1, len(background), row.size, len(genes)), rtol=1e-9)
        assert np.isclose(row.expected, len(genes) * row.size / len(background))
    np.testing.assert_allclose(table["fdr"], stats.false_discovery_control(table["p"]))
    assert table["p"].is_monotonic_increasing


def test_sets_without_a_hit_count_in_the_correction():
    pytest.importorskip("gseapy")
    background = [f"g{i}" for i in range(50)]
    hit = {"hit": background[:5]}
    alone = enriched(background[:5], hit, background)
    among = enriched(background[:5], hit | {f"empty {i}": [background[40 + i]] for i in range(9)}, background)
    assert np.isclose(among["fdr"][0], 10 * alone["fdr"][0]) and (among["p"][1:] == 1).all()
    assert enriched(["g49"], hit, background)["p"].tolist() == [1.0]


@pytest.mark.parametrize("numbers", [["11", "12", "13", "14"], ["a1", "B2", "c3", "D4"]])
def test_names_that_gseapy_would_guess_about(numbers):
    pytest.importorskip("gseapy")
    found = enriched(numbers[:1], {"s": [g.upper() for g in numbers[:2]]}, numbers)
    assert np.isclose(found["p"][0], 0.5) and found["genes"][0] == numbers[0]


@pytest.mark.parametrize("call, says", [
    ((["x"], {"s": ["a"]}, ["a", "b"]), r"1 of 1 genes are not in the background \(X\)"), (([], {"s": ["a"]}, ["a"]), "there are none"),
    ((["a"], {"s": ["q"]}, ["a"]), r"no gene of the 1 sets \(q\) is in the background"), ((["a"], {}, ["a"]), "no gene of the 0 sets"),
    (("a", {"s": ["a"]}, ["a"]), "are str, dict, list"), ((["a"], ["s"], ["a"]), "are list, list, list")])
def test_what_enriched_refuses(call, says):
    pytest.importorskip("gseapy")
    with pytest.raises(InputError, match=says):
        enriched(*call)


# --- orthologues

def paired(both: ad.AnnData, share: float = 1.0) -> pd.DataFrame:
    """Orthologues j of both species; the first `share` of the mouse's genes get the human's weights."""
    W = both.varm["weights_human"].toarray()
    V = both.varm["weights_mouse"].toarray()
    cut = round(share * GENES)
    V[:, :cut] = W[:, :cut]
    V[0, V.max(0) == 0], W[0, W.max(0) == 0] = 1, 1
    both.varm["weights_mouse"], both.varm["weights_human"] = sp.csr_matrix(V), sp.csr_matrix(W)
    return pd.DataFrame({"human": [f"H{j}" for j in range(GENES)], "mouse": [f"M{j}" for j in range(GENES)]})


def test_orthologues_with_equal_weights_are_together(both):
    pairs = paired(both)
    found = orthologues_together(both, pairs)
    assert found["pairs"] == GENES and found["together"] == 1.0 and found["nearest"] is None
    first = both.varm["weights_human"].toarray().argmax(0)
    assert np.isclose(found["chance"], np.mean(first[:, None] == first[None]))


def test_share_together_against_a_dense_count(both):
    pairs = paired(both, 0.5)
    found = orthologues_together(both, pairs)
    a, b = (both.varm[f"weights_{s}"].toarray().argmax(0) for s in ("human", "mouse"))
    assert found["together"] == np.mean(a == b) >= 0.5 and np.isclose(found["chance"], np.mean(a[:, None] == b[None]))


def test_pairs_that_are_not_one_to_one_are_left_out(both):
    pairs = paired(both)
    more = pd.concat([pairs, pd.DataFrame({"human": ["H0", "unknown"], "mouse": ["M1", "M2"]})], ignore_index=True)
    assert orthologues_together(both, more)["pairs"] == GENES - 3  # H0, M1 and M2 stand in two rows each


def test_nearest_against_a_dense_count(both, rng):
    pairs = paired(both)
    H = rng.normal(size=(GENES, 6)).astype(np.float32)
    M = (H + 0.8 * rng.normal(size=H.shape)).astype(np.float32)
    order = rng.permutation(GENES)
    given_ = {"human": Embeddings(np.array([f"h{j}" for j in range(GENES)]), H, "h"), "mouse": Embeddings(np.array([f"M{j}" for j in order]), M[order], "m")}
    Z = stats.zscore(np.concatenate([H, M]))
    Z /= np.linalg.norm(Z, axis=1, keepdims=True)
    S = Z[:GENES] @ Z[GENES:].T
    mutual = (S.argmax(1) == np.arange(GENES)) & (S.argmax(0) == np.arange(GENES))
    found = orthologues_together(both, pairs, given_)["nearest"]
    assert np.isclose(found, mutual.mean()) and 0 < found < 1


def test_three_species_must_all_agree():
    both = integrated(names=("human", "mouse", "rat"))
    pairs = paired(both).assign(rat=[f"R{j}" for j in range(GENES)])
    two, three = orthologues_together(both, pairs[["human", "mouse"]]), orthologues_together(both, pairs)
    assert two["together"] == 1 and three["together"] < 1 and three["chance"] < two["chance"]


@pytest.mark.parametrize("bad, says", [
    ([("H0", "M0")], "are a list"), (pd.DataFrame({"human": ["H0"]}), "has no column for mouse"), (pd.DataFrame({"human": ["a", "b"], "mouse": ["c", "d"]}), "0 pairs")])
def test_orthologues_that_do_not_fit(both, bad, says):
    with pytest.raises(InputError, match=says):
        orthologues_together(both, bad)


def test_embeddings_that_do_not_fit(both):
    pairs, V = paired(both), np.ones((3, 2), np.float32)
    with pytest.raises(InputError, match=r"lack 40 of 40 genes \(H0"):
        orthologues_together(both, pairs, {"human": Embeddings(np.array(list("abc")), V, "h"), "mouse": Embeddings(np.array(list("abc")), V, "m")})
    with pytest.raises(InputError, match="has nothing for human"):
        orthologues_together(both, pairs, {})


# --- pictures

def test_the_picture_of_an_integration_is_seeded_and_changes_nothing(both):
    before, state = frozen(both), np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GearsWarning)
        first, again = (plot_integration(both, seed=3) for _ in range(2))
    places = [np.concatenate([c.get_offsets() for c in f.axes[0].collections]) for f in (first, again)]
    assert np.array_equal(*places) and places[0].shape == (both.n_obs, 2) and [a.get_title() for a in first.axes] == ["species", "cell_type"]
    assert same(before, frozen(both)) and np.array_equal(state, np.random.get_state()[1])
    shades = first.axes[1].collections[0].get_facecolor()
    assert len(np.unique(shades, axis=0)) == 3


def test_the_heat_map_shows_folds_within_species(both):
    both = both[~((both.obs["species"] == "mouse") & (both.obs["cell_type"] == "type 1"))].copy()
    before, table = frozen(both), differential_macrogenes(both)
    figure = plot_macrogenes(both, table, n=1)
    assert same(before, frozen(both)) and [ax.get_title() for ax in figure.axes[:2]] == ["human", "mouse"]
    R = both.X / both.X.mean(1, keepdims=True)
    own = (both.obs["species"] == "human").to_numpy()
    mean = np.stack([R[own & (both.obs["cell_type"] == f"type {t}").to_numpy()].mean(0) for t in range(3)])[:, :3]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), np.log2(mean / mean.mean(0)), atol=1e-4)
    assert np.ma.getmaskarray(figure.axes[1].images[0].get_array()).all(1).tolist() == [False, True, False]
    assert figure.axes[0].get_xticklabels()[2].get_text() == f"{top_genes(both, 1).query('species == @own_name', local_dict={'own_name': 'human'})['gene'].iloc[2]} 2"


def test_confusion_is_that_of_sklearn():
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    truth = rng.choice(["a", "b", "c", "own"], 200)
    called = np.where(rng.uniform(size=200) < 0.6, np.where(truth == "own", "a", truth), rng.choice(["a", "b", "other"], 200))
    figure = plot_transfer(called, truth)
    ax = figure.axes[0]
    rows, columns = [t.get_text().split(" (")[0] for t in ax.get_yticklabels()], [t.get_text() for t in ax.get_xticklabels()]
    assert rows == ["a", "b", "c", "own"] and columns == ["a", "b", "c", "other"]
    known = confusion_matrix(truth, called, labels=["a", "b", "c", "own", "other"], normalize="true")
    np.testing.assert_allclose(ax.images[0].get_array(), known[:4][:, [0, 1, 2, 4]])


def test_truth_is_matched_by_the_names_of_cells(both):
    truth = both.obs["cell_type"]
    called = pd.DataFrame({"label": truth[truth.index.str.startswith("mouse")].astype(str), "uncertainty": 0.0})
    for given_ in (truth, truth[::-1], truth[: len(called)].to_numpy()):
        np.testing.assert_allclose(plot_transfer(called, given_).axes[0].images[0].get_array(), np.eye(3))
    with pytest.raises(InputError, match=r"has the shape \(7,\), called has \(30,\)"):
        plot_transfer(called, truth.to_numpy()[:7])
    with pytest.raises(InputError, match="holds no labels"):
        plot_transfer(["a"], ["unlabelled"])


# --- bad input

@pytest.mark.parametrize("call", [top_genes, differential_macrogenes, plot_integration, lambda t: orthologues_together(t, pd.DataFrame())])
@pytest.mark.parametrize("table", [ad.AnnData(np.ones((4, 3))), "both.h5ad", None])
def test_another_table_is_refused(call, table):
    with pytest.raises(InputError, match="lacks uns"):
        call(table)


@pytest.mark.parametrize("call, says", [
    (lambda b: top_genes(b, 0), "is 0"), (lambda b: differential_macrogenes(b, "leiden"), "no obs column 'leiden'. Remedy: choose one of species, cell_type"),
    (lambda b: differential_macrogenes(b, species="rat"), "no cells of 'rat'"), (lambda b: differential_macrogenes(b, reference="type 9"), "compare with 'type 9'"),
    (lambda b: differential_macrogenes(b[b.obs["cell_type"] == "type 1"]), r"type 1 \(20\)"), (lambda b: plot_integration(b, label_key="leiden"), "X_saturn, leiden"),
    (lambda b: plot_integration(b, use="X_pca"), "obsm has X_saturn"), (lambda b: plot_integration(b[:3]), "3 cells"), (lambda b: plot_macrogenes(b, pd.DataFrame()), "are a DataFrame and 3"),
    (lambda b: plot_macrogenes(b, differential_macrogenes(b), n=0), "and 0"), (lambda b: plot_macrogenes(b[:, 4:], differential_macrogenes(b)), "macrogenes that both lacks")])
def test_bad_arguments_are_one_line(both, call, says):
    with pytest.raises(InputError, match=says) as error:
        call(both)
    assert "\n" not in str(error.value)


def test_values_that_were_scaled_and_genes_that_were_lost_are_refused(both):
    scaled = both.copy()
    scaled.X = scaled.X - scaled.X.mean(0)
    with pytest.raises(InputError, match="without scaling or centring"):
        differential_macrogenes(scaled)
    both.uns["saturn"]["genes"]["human"] = both.uns["saturn"]["genes"]["human"][:5]
    with pytest.raises(InputError, match=r"has the shape \(12, 40\) for 5 genes"):
        top_genes(both)
