"""saturn: simulated species with planted homology, and the ruler of cross-species spaces."""
from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, nbinom
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from gears_nb.core.errors import InputError
from gears_nb.data.validate import check_counts
from gears_nb.saturn import scores, simulator
from gears_nb.saturn.scores import counterpart_auroc, integration_scores, transfer, transfer_scores
from gears_nb.saturn.simulator import simulate_species
from gears_nb.saturn.species import gather_species

seeds = st.integers(0, 2**32 - 1)
SMALL = {"n_cells": 60, "n_genes": 80, "n_programs": 8}


def same(one, two) -> bool:
    "Equal tables: counts, annotation and genes."
    return (one.X != two.X).nnz == 0 and one.obs.equals(two.obs) and one.var.equals(two.var)


@pytest.fixture(scope="module")
def made():
    return simulate_species(seed=5)


# the simulator ----------------------------------------------------------------------------------------------------------


def test_tables_are_whole_counts_with_their_annotation(made):
    for name, table in made.tables.items():
        check_counts(table, name)
        assert sp.issparse(table.X) and table.X.format == "csr" and table.X.dtype == np.float32 and table.shape == (500, 400)
        assert table.obs_names.is_unique and table.var_names.is_unique and table.obs["cell_type"].value_counts().min() >= 5
        assert set(table.obs["batch"]) == {"batch 1", "batch 2"}
        assert np.issubdtype(table.var["program"].dtype, np.integer) and np.issubdtype(table.var["family"].dtype, np.integer)
        assert np.array_equal(made.embeddings[name].genes, table.var_names) and made.embeddings[name].vectors.dtype == np.float32


def test_orthologues_are_one_gene_a_species_and_names_do_not_tell_them(made):
    human, mouse = made.tables.values()
    pairs = made.orthologues
    assert list(pairs.columns) == ["human", "mouse"] and len(pairs) == 240 and all(pairs[c].is_unique for c in pairs)
    assert np.array_equal(human.var.loc[pairs["human"], "family"], mouse.var.loc[pairs["mouse"], "family"])
    assert not set(human.var_names) & set(mouse.var_names)
    assert np.mean([a.upper().removeprefix("HUMAN") == b.upper().removeprefix("MOUSE") for a, b in zip(pairs["human"], pairs["mouse"])]) < 0.03


def test_own_types_are_in_one_species_and_the_others_in_all(made):
    kinds = {name: set(table.obs["cell_type"]) for name, table in made.tables.items()}
    assert kinds["human"] & kinds["mouse"] == {f"type {i}" for i in range(1, 7)}
    assert {name: tuple(sorted(own - kinds["human" if name == "mouse" else "mouse"])) for name, own in kinds.items()} == made.own_types


def test_composition_depth_and_dropout_differ_as_asked():
    made = simulate_species(seed=1, depth=(2000, 500), dropout=(0.0, 0.5), n_cells=400, n_genes=100, n_programs=10)
    human, mouse = made.tables.values()
    totals = [np.asarray(t.X.sum(1)).mean() for t in (human, mouse)]
    assert np.allclose(totals, np.array([2000, 250]) * np.exp(0.045), rtol=0.08)
    shares = [t.obs["cell_type"].value_counts(normalize=True) for t in (human, mouse)]
    assert shares[0].sub(shares[1], fill_value=0).abs().max() > 0.05


@given(seed=seeds)
def test_the_same_seed_gives_the_same_bits(seed):
    one, two = (simulate_species(seed=seed, **SMALL) for _ in range(2))
    assert all(same(one.tables[n], two.tables[n]) and np.array_equal(one.embeddings[n].vectors, two.embeddings[n].vectors) for n in one.tables)
    assert one.orthologues.equals(two.orthologues)


@given(seed=seeds, strength=st.floats(0, 1), related=st.booleans())
def test_embeddings_have_a_stream_of_their_own(seed, strength, related):
    plain, other = simulate_species(seed=seed, **SMALL), simulate_species(seed=seed, strength=strength, related=related, dim=7, **SMALL)
    assert all(same(plain.tables[n], other.tables[n]) for n in plain.tables)
    assert all(np.isfinite(e.vectors).all() and e.vectors.shape == (80, 7) for e in other.embeddings.values())


def test_a_species_does_not_depend_on_those_behind_it():
    two, three = simulate_species(**SMALL), simulate_species(("human", "mouse", "fish"), **SMALL)
    assert all(same(two.tables[n], three.tables[n]) for n in two.tables) and three.orthologues[["human", "mouse"]].equals(two.orthologues)
    assert np.asarray(three.tables["fish"].X.sum(1)).mean() > 1.5 * np.asarray(three.tables["mouse"].X.sum(1)).mean()  # depths are repeated


@pytest.mark.parametrize(("strength", "related", "expected"), [
    (0.8, True, (0.964, 0.324, 0.64, 0.0)), (0.8, False, (0.64, 0.0, 0.64, 0.0)), (0.0, True, (0.9, 0.9, 0.0, 0.0)), (0.0, False, (0.0,) * 4), (1.0, True, (1.0, 0.0, 1.0, 0.0))])
def test_cosines_of_genes_have_their_closed_form(strength, related, expected):
    made = simulate_species(seed=3, strength=strength, related=related, n_cells=40, dim=128)
    (a, b), (V, W) = ([t.var for t in made.tables.values()], [e.vectors for e in made.embeddings.values()])
    cosine = (V / np.linalg.norm(V, axis=1, keepdims=True)) @ (W / np.linalg.norm(W, axis=1, keepdims=True)).T
    program = a["program"].to_numpy()[:, None] == b["program"].to_numpy()
    kin = (a["family"].to_numpy()[:, None] == b["family"].to_numpy()) & (a["family"].to_numpy() >= 0)[:, None]
    found = [cosine[mask].mean() for mask in (kin & program, kin & ~program, ~kin & program, ~kin & ~program)]
    assert np.allclose(found, expected, atol=0.03)


@pytest.mark.parametrize("moved", [0.0, 0.25, 1.0])
def test_moved_is_the_share_of_orthologues_in_another_program(moved):
    still, gone = simulate_species(moved=0.0, n_cells=40), simulate_species(moved=moved, n_cells=40)
    for name, table in still.tables.items():
        other, kin = gone.tables[name].var, table.var["family"] >= 0
        assert (other["program"] != table.var["program"])[kin].sum() == round(moved * 240)
        assert (other["program"] == table.var["program"])[~kin].all()


def test_counts_are_negative_binomial():
    counts = simulator._drawn(np.zeros((40_000, 2)), np.full(40_000, 8.0), 0.0, np.random.default_rng(0)).toarray().ravel()
    expected = nbinom(2, 2 / (2 + 4)).pmf(np.arange(8))
    assert np.allclose(np.bincount(counts.astype(int), minlength=8)[:8] / len(counts), expected, atol=0.005)


def test_batches_shift_genes_by_a_fifth():
    made = simulate_species(seed=2, n_cells=4000, n_genes=60, n_programs=6, n_own=0, dropout=0.0, depth=4000)
    table = made.tables["human"]
    first = (table.obs["batch"] == "batch 1").to_numpy()
    one, two = (np.asarray(table.X[rows].sum(0)).ravel() for rows in (first, ~first))
    assert abs(np.log(one / two).std() - 0.2 * np.sqrt(2)) < 0.1


def test_it_fits_the_reader_of_species(made):
    species = gather_species(made.tables, made.embeddings, n_hvg=None, batch_key="batch")
    assert [s.name for s in species] == ["human", "mouse"] and all(s.vectors.shape == (400, 64) and s.report.kept == 400 for s in species)


@pytest.mark.parametrize(("how", "said"), [
    ({"names": ["human"]}, "names"), ({"names": "human"}, "list of at least two"), ({"names": ("a", "A")}, "different names"), ({"names": ("a", "")}, "names"),
    ({"strength": 1.1}, "strength: is 1.1"), ({"strength": float("nan")}, "strength"), ({"moved": -0.1}, "moved"), ({"orthologue_share": 2}, "orthologue_share"),
    ({"dropout": (0.1, 1.5)}, "dropout"), ({"dropout": ()}, "dropout"), ({"depth": (0, 1)}, "depth"), ({"depth": ()}, "depth"), ({"n_cells": 34}, "use at least 35"),
    ({"n_programs": 1}, "n_programs"), ({"n_programs": 401}, "401 for 400"), ({"n_types": 1}, "n_types"), ({"n_own": -1}, "n_own"), ({"dim": 0}, "dim"), ({"batches": 0}, "batches")])
def test_what_cannot_be_is_refused_in_one_line(how, said):
    with pytest.raises(InputError, match=said) as caught:
        simulate_species(**how)
    assert "\n" not in str(caught.value) and caught.value.source == "simulate_species"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_orthologues_and_nothing_else(share):
    made = simulate_species(orthologue_share=share, **SMALL)
    assert len(made.orthologues) == 80 * share and list(made.orthologues.columns) == ["human", "mouse"]


# transfer ---------------------------------------------------------------------------------------------------------------


def clouds(seed: int, n: int = 40, d: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "A source, its labels, and a target."
    rng = np.random.default_rng(seed)
    centres, code = rng.normal(size=(3, d)) * 1.5, rng.permutation(np.arange(n) % 3)
    return centres[code] + rng.normal(size=(n, d)), np.array(["a", "b", "c"])[code], centres[rng.integers(3, size=25)] + rng.normal(size=(25, d))


@given(seed=seeds, k=st.sampled_from([1, 3, 7]))
def test_votes_are_those_of_scikit_learn(seed, k):
    source, labels, target = clouds(seed)
    scale = StandardScaler().fit(source)
    other = KNeighborsClassifier(k).fit(scale.transform(source), labels)
    share = other.predict_proba(scale.transform(target))
    named, doubt = transfer(source, labels, target, k=k)
    assert np.allclose(doubt, 1 - share.max(1))
    clear = np.sort(share, 1)[:, -1] > np.sort(share, 1)[:, -2] + 1e-9
    assert np.array_equal(named[clear], other.predict(scale.transform(target))[clear])


@pytest.mark.parametrize("how", ["knn", "logistic"])
@given(seed=seeds, factor=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_scale_and_common_shift_change_nothing(how, seed, factor, shift):
    source, labels, target = clouds(seed)
    unit = np.array([factor, 1, 1 / factor, 2])
    one, two = transfer(source, labels, target, how=how), transfer(source * unit + shift, labels, target * unit + shift, how=how)
    assert np.array_equal(one[0], two[0]) and np.allclose(one[1], two[1], atol=1e-4)


@given(seed=seeds)
def test_order_of_the_source_and_constant_columns_do_not_matter(seed):
    source, labels, target = clouds(seed)
    order = np.random.default_rng(seed).permutation(len(source))
    one, two = transfer(source, labels, target), transfer(np.c_[source, np.full(40, 1e6)][order], labels[order], np.c_[target, np.full(25, 1e6)])
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1])


def test_unlabelled_cells_do_not_teach_and_ties_go_to_the_nearer():
    line = np.array([[0.0], [1], [5], [6]])
    assert transfer(line, list("abab"), [[0.1]], k=2)[0] == ["a"] and transfer(line, list("baba"), [[0.1]], k=2)[0] == ["b"]
    assert set(transfer(line, ["unlabelled", "a", "b", "unlabelled"], line, k=1)[0]) == {"a", "b"}


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), most=st.integers(1, 60), seed=seeds)
def test_thinning_is_even_and_keeps_rare_types(sizes, most, seed):
    names = np.repeat([f"t{i}" for i in range(len(sizes))], sizes)
    kept = scores._thinned(names, most, seed)
    assert len(kept) == min(most, len(names)) and (np.diff(kept) > 0).all()
    left = np.array([(names[kept] == f"t{i}").sum() for i in range(len(sizes))])
    cut = left < sizes
    assert not cut.any() or left[cut].max() - left[cut].min() <= 1 and left.max() <= left[cut].max() + 1


@pytest.mark.parametrize(("change", "said"), [
    ({"how": "svm"}, "how"), ({"k": 0}, "how, k"), ({"labels": ["a"] * 40}, "1 cell types"), ({"labels": ["a"]}, "1 of them for 40 rows"), ({"H_target": np.zeros((2, 3))}, "3 columns"),
    ({"H_target": np.full((2, 4), np.nan)}, "2 rows are not finite"), ({"H_source": np.zeros(4)}, r"shape \(4,\)"), ({"H_target": np.zeros((0, 4))}, r"shape \(0, 4\)")])
def test_transfer_refuses_in_one_line(change, said):
    source, labels, target = clouds(0)
    with pytest.raises(InputError, match=said):
        transfer(**({"H_source": source, "labels": labels, "H_target": target} | change))


# scores -----------------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_transfer_scores_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth, named = (np.array(list("abc"))[rng.integers(3, size=30)] for _ in range(2))
    found, keep = transfer_scores(named, truth, "ab"), np.isin(truth, ["a", "b"])
    t, p = truth[keep], named[keep]
    assert np.isclose(found["accuracy"], accuracy_score(t, p)) and np.isclose(found["macro_f1"], f1_score(t, p, average="macro", labels=np.unique(t), zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about predicted types that are not among the true ones
        assert np.isclose(found["balanced"], balanced_accuracy_score(t, p))


@given(seed=seeds)
def test_auroc_counts_pairs_and_knows_only_the_order(seed):
    rng = np.random.default_rng(seed)
    value, truth = rng.integers(0, 8, 40).astype(float), np.where(np.arange(40) < 15, "new", "a")
    found = counterpart_auroc(value, truth, {"a"})
    assert np.isclose(found, mannwhitneyu(value[:15], value[15:]).statistic / (15 * 25))
    assert np.isclose(found, counterpart_auroc(np.exp(value) - 3, truth, {"a"})) and np.isclose(found, 1 - counterpart_auroc(-value, truth, {"a"}))
    padded = counterpart_auroc(np.r_[value, 100.0], [*truth, "unlabelled"], {"a"})
    assert np.isclose(found, padded)


def test_scores_without_cells_are_none_and_bad_values_are_refused():
    assert transfer_scores(["a"], ["new"], []) == {"accuracy": None, "balanced": None, "macro_f1": None}
    assert transfer_scores(["a", "a"], ["a", "unlabelled"], ["a", "unlabelled"])["accuracy"] == 1
    assert counterpart_auroc([1.0, 2.0], ["a", "b"], ["a", "b"]) is None
    for call in (lambda: transfer_scores(["a"], ["a", "b"], "a"), lambda: counterpart_auroc([1.0], ["a", "b"], "a"), lambda: counterpart_auroc([np.nan, 1], ["a", "b"], "a")):
        with pytest.raises(InputError):
            call()


def space(seed: int, shift: float = 0.0, spread: float = 30.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    "Two species of three shared types and one of their own."
    rng = np.random.default_rng(seed)
    names = [np.repeat(["a", "b", "c", f"own {s}"], 40) for s in range(2)]
    at = {"a": (0, 0), "b": (1, 0), "c": (0, 1), "own 0": (1, 1), "own 1": (2, 2)}
    return [np.array([at[n] for n in own]) * spread + rng.normal(size=(160, 2)) + s * shift for s, own in enumerate(names)], names


@given(seed=seeds)
def test_integration_scores_know_the_limits(seed):
    H, names = space(seed)
    right = integration_scores(H, names)
    assert right["ilisi"] > 0.85 and right["clisi"] > 0.99 and right["asw"] > 0.9 and min(right["ari"], right["nmi"]) > 0.8
    assert integration_scores(*space(seed, shift=1000))["ilisi"] == 0
    heap = integration_scores(*space(seed, spread=0))
    assert heap["ilisi"] > 0.85 and heap["clisi"] < 0.25 and abs(heap["asw"] - 0.5) < 0.08 and heap["ari"] < 0.1


@given(seed=seeds, angle=st.floats(0, 6))
def test_integration_scores_do_not_depend_on_axes_or_on_names_of_species(seed, angle):
    H, names = space(seed, spread=3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    one, two = integration_scores(H, names), integration_scores([h @ turn for h in H[::-1]], names[::-1])
    assert all(np.isclose(one[key], two[key], atol=0.02) for key in ("ilisi", "clisi", "asw"))


def test_unlabelled_rows_are_left_out_of_integration():
    H, names = space(0)
    padded = integration_scores([np.concatenate([H[0], np.full((30, 2), 500.0)]), H[1]], [np.r_[names[0], ["unlabelled"] * 30], names[1]])
    assert padded == integration_scores(H, names)


@pytest.mark.parametrize(("H", "labels", "said"), [
    ([np.zeros((3, 2))], [["a"] * 3], "1 tables"), ([np.zeros((3, 2))] * 2, [["a"] * 3], "2 tables and 1 lists"), ([np.zeros((3, 2)), np.zeros((3, 1))], [["a"] * 3] * 2, "1 and 2 columns"),
    ([np.zeros((3, 2))] * 2, [["a"] * 3] * 2, "1 types for 6"), ([np.zeros((3, 2))] * 2, [["a"] * 2] * 2, r"labels\[0\]"), ([np.full((3, 2), np.inf)] * 2, [["a"] * 3] * 2, r"H\[0\]")])
def test_integration_scores_refuse_in_one_line(H, labels, said):
    with pytest.raises(InputError, match=said):
        integration_scores(H, labels)


# what is planted --------------------------------------------------------------------------------------------------------


def test_programs_carry_types_over_and_orthologues_do_so_less(made):
    from gears_nb.data.preprocess import normalise

    cells = []
    for table in made.tables.values():
        logs = normalise(table.X).toarray()
        cells.append((logs - logs.mean(0)) / np.maximum(logs.std(0), 1e-6))
    kinds = [t.obs["cell_type"].to_numpy() for t in made.tables.values()]
    shared = set(kinds[0]) & set(kinds[1])
    found = {}
    for what, n in (("program", 40), ("family", 240)):
        member = [t.var[what].to_numpy()[:, None] == np.arange(n) for t in made.tables.values()]
        A, B = (z @ m / m.sum(0) for z, m in zip(cells, member))
        found[what] = transfer_scores(transfer(A, kinds[0], B, how="logistic")[0], kinds[1], shared)["accuracy"]
    assert found["program"] >= 0.95 and found["family"] < found["program"] - 0.05
