"""Reading a screen: names, units, columns and controls as people write them; files in chunks; a line for every kind of bad input."""
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.data.registry import data_root
from gears_nb.perturb.prepare import deltas, log_values
from gears_nb.perturb.reading import CONTROLS, check_screen, factor, fold, merged, read_controls, read_rows, read_screen, report, split_dose, split_name
from gears_nb.perturb.screens import CONTROL, canonical, parts

COUNTS = np.random.default_rng(0).poisson(1.5, (12, 5)) + np.eye(12, 5)
NAMES = ["DMSO", "DMSO", "A", "A", "B", "B"] * 2


def table(X=COUNTS, layers=None, **columns):
    """Twelve cells, five genes; columns of `obs` as given, `drug` unless there is another."""
    obs = pd.DataFrame(columns if "drug" in columns or "other" in columns else {"drug": NAMES, **columns}, index=[f"c{i}" for i in range(12)])
    return anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(5)]), layers=layers or {})


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_screen(*args, **options)


def same(one, other):
    """Two screens agree in everything but their notes."""
    assert np.array_equal(one.values.toarray(), other.values.toarray()) and one.counts == other.counts and one.smiles == other.smiles
    for name in ("genes", "cells", "perturbation", "line", "batch"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(one.dose, other.dose, equal_nan=True)


# names ----------------------------------------------------------------------------------------------------------------

WORDS = st.text("abCD12-_ ", min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(WORDS)
def test_folding_forgets_case_and_separators_and_nothing_else(word):
    assert fold(word) == fold(word.upper()) == fold(word.replace(" ", "_")) == fold(fold(word)) == fold(f" {word} ")
    assert fold(word).replace("-", "") == "".join(c for c in word.casefold() if c.isalnum())


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(WORDS, st.integers(1, 9), min_size=1, max_size=8))
def test_merging_keeps_the_most_frequent_spelling(words):
    found = merged(words)
    assert set(found) == set(words)
    for word, best in found.items():
        group = [other for other in words if fold(other) == fold(word)]
        assert best in group and words[best] == max(words[other] for other in group)
        assert {found[other] for other in group} == {best}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc12-", min_size=1, max_size=4).filter(lambda w: w[0].isalnum() and w[-1].isalnum()), min_size=1, max_size=4), st.sampled_from(["+", " + "]))
def test_combinations_split_where_they_were_joined(words, joint):
    assert split_name(joint.join(words)) == words


@pytest.mark.parametrize(("name", "expected"), [("(+)-JQ1", ["(+)-JQ1"]), ("[+/-]-x", ["[+/-]-x"]), ("CD4+", ["CD4+"]), ("+A", ["+A"]), ("Na+ blocker", ["Na+ blocker"]), ("A +B", ["A +B"]),
                                                ("A+(+)-JQ1", ["A", "(+)-JQ1"]), ("  A  +  B ", ["A", "B"]), ("A+ctrl", ["A", "ctrl"]), ("", [""])])
def test_a_plus_joins_only_two_names(name, expected):
    assert split_name(name) == expected


def test_names_survive_the_containers_own_splitting():
    """A compound's own plus would be taken for a combination by `parts`, so none is left."""
    screen = quiet(table(drug=["DMSO", "(+)-JQ1", "A", "A+(+)-JQ1", "(+)-JQ1 + A", "Na+ x"] * 2))
    assert set(screen.singles) == {"(plus)-JQ1", "A", "Naplus x"}
    assert all(canonical(name) == name for name in screen.perturbation) and screen.perturbation[3] == screen.perturbation[4] == "(plus)-JQ1+A"
    assert parts("(plus)-JQ1+A") == ("(plus)-JQ1", "A")


@pytest.mark.parametrize("word", ["control", "CTRL", "Vehicle", "dmso", "DMSO_control", "untreated", "PBS", "Non-Targeting", "NT", "negative control", "unperturbed", " dmso "])
def test_usual_controls_are_known(word):
    assert fold(word) in CONTROLS
    assert quiet(table(drug=[word, "A"] * 6)).control.tolist() == [True, False] * 6


def test_controls_by_the_user_and_by_a_column():
    assert quiet(table(drug=["mock", "veh. 2", "A"] * 4), control=["Mock", "VEH. 2"]).control.tolist() == [True, True, False] * 4
    assert quiet(table(drug=["DMSO", "mock", "A"] * 4), control="mock").control.tolist() == [False, True, False] * 4
    for marks in ([True, False], [1, 0], ["True", "False"]):
        assert quiet(table(drug=["mock", "A"] * 6, is_control=marks * 6)).control.tolist() == [True, False] * 6
    assert quiet(table(drug=["dmso", "A"] * 6, control=[0, 1] * 6)).control.tolist() == [True, False] * 6


# doses ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 1e4), st.sampled_from(["", " "]), st.sampled_from(["pM", "nM", "uM", "UM", "um", "\u00b5M", "\u03bcM", "mM"]))
def test_doses_in_any_unit(number, gap, unit):
    power = {"p": -3, "n": 0, "u": 3, "\u00b5": 3, "\u03bc": 3, "m": 6}[unit[0].lower()]
    value, found = split_dose(f"{number!r}{gap}{unit}")
    assert value == number and found == unit and factor(found) == pytest.approx(10.0**power)
    screen = quiet(table(dose=[f"{number!r}{gap}{unit}"] * 12))
    assert screen.dose[2] == pytest.approx(number * 10.0**power, rel=1e-11) and np.isnan(screen.dose[0])


@pytest.mark.parametrize("columns, options", [
    ({"dose": [10, 0.04] * 6}, {"unit": "uM"}), ({"dose_uM": [10, 0.04] * 6}, {}), ({"dose (uM)": [10, 0.04] * 6}, {"dose_key": "dose (uM)"}), ({"Dose (uM)": [10, 0.04] * 6}, {}), ({"DOSE[\u00b5M]": [10, 0.04] * 6}, {}), ({"conc_uM": [10, 0.04] * 6}, {}), ({"dose": [10, 0.04] * 6, "Dose.Unit": ["um"] * 12}, {}),
    ({"pert_dose": [10, 0.04] * 6, "pert_dose_unit": ["uM", "um"] * 6}, {}), ({"dose": [10, 40] * 6, "dose_unit": ["uM", "nM"] * 6}, {}), ({"dose": ["10 uM", "40nM"] * 6}, {}),
    ({"dose": pd.Categorical(["10.0 um", "0.04 um"] * 6)}, {}), ({"dose": [10000, 40] * 6}, {}), ({"dose": [1, 1] * 6, "pert_idose": ["10 uM", "0.04 uM"] * 6}, {}),
    ({"dose": ["1e4 nM", "40"] * 6}, {"unit": "nM"}), ({"dose": ["0.00001 M", "0.00004 mM"] * 6}, {})])
def test_the_same_doses_however_they_are_written(columns, options):
    screen = quiet(table(**columns), **options)
    assert screen.dose[2:6].tolist() == [10000, 40, 10000, 40] and np.isnan(screen.dose[:2]).all()


def test_a_unit_is_for_doses_without_one():
    """Neither the column of units nor the column's name is overruled by `unit`, and the remedy for a gap in the units does what it says."""
    gaps = {"dose": [10, 10000] * 6, "dose_unit": ["uM", None] * 6}
    with pytest.raises(InputError, match="say what the bare numbers are, for example unit='nM'"):
        read_screen(table(**gaps))
    assert set(quiet(table(**gaps), unit="nM").dose[2:6]) == {10000}
    for columns in ({"dose_uM": [10, 0.04] * 6}, {"dose": [10, 0.04] * 6, "dose_unit": ["uM"] * 12}, {"dose": ["10 uM", "0.04 uM"] * 6}):
        with pytest.warns(GearsWarning, match="8 doses of obs.* keep it, unit='nM' is for those without"):
            assert read_screen(table(**columns), unit="nM").dose[2:4].tolist() == [10000, 40]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_screen(table(**columns), unit="uM")


@pytest.mark.parametrize("dose", ["0,1 uM", "0,1", "0-100 nM", "0 - 100 nM", "1,000 nM", "0 ug/ml", "1 to 10 uM", "0 x"])
def test_what_is_no_number_with_a_unit_never_makes_a_control(dose):
    with pytest.raises(InputError, match="is no unit of concentration. Remedy: .*dose_key='none'") as caught:
        read_screen(table(dose=["1 uM", "1 uM", dose, "1 uM"] * 3))
    assert repr(dose) in str(caught.value) and "\n" not in str(caught.value)
    screen = quiet(table(dose=[dose, dose, "1 uM", "1 uM", "0 uM", "1 uM"] * 2))  # whatever stands beside a control
    assert screen.dose[2] == 1000 and screen.control.tolist() == [True, True, False, False, True, False] * 2


@pytest.mark.parametrize(("doses", "loud"), [([-8, -6.5], True), ([-2, 0], True), ([-666, -666], False), ([-666, 5], False), ([-1, 5], False)])
def test_logarithms_of_doses_are_suspected(doses, loud):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_screen(table(drug=["DMSO", "A"] * 6, dose=[1, doses[0]] * 3 + [1, doses[1]] * 3))
    assert any("1e9 * 10**dose" in str(w.message) for w in said) == loud


def test_coded_and_zero_doses():
    screen = quiet(table(dose=[5, -666, -666, 0, -999, np.nan, 1, 1, 2, 2, 3, 3]))
    assert np.isnan(screen.dose[[2, 3, 4, 5, 6, 7]]).all() and screen.dose[8:].tolist() == [2, 2, 3, 3]
    assert screen.control.tolist() == [True, True, False, True] + [False] * 2 + [True, True] + [False] * 4
    notes = " ".join(screen.notes)
    assert "nanomolar assumed" in notes and "at dose 0" in notes and "negative dose" in notes


def test_remarks_on_doses():
    assert any("one dose only" in note for note in quiet(table(dose=[7] * 12)).notes)
    assert any("units are mixed" in note for note in quiet(table(dose=["1 nM", "1 uM"] * 6)).notes)
    with pytest.warns(GearsWarning, match="eight powers of ten"):
        read_screen(table(dose=["1 pM", "1 M"] * 6))
    assert np.isnan(quiet(table(dose=["high"] * 12), dose_key="none").dose).all()
    assert np.isnan(quiet(table(dose=[-666.0] * 12)).dose).all()


# columns --------------------------------------------------------------------------------------------------------------


def test_columns_are_guessed_and_said():
    screen = quiet(table(other=NAMES, Condition=NAMES, target=["x"] * 12, Cell_Line=["k562", "K562 ", "K-562"] * 4, Plate=[1.0, 2.0] * 6, SMILES=["C", "O"] * 6))
    assert set(screen.line) <= {"k562", "K562", "K-562"} and len(set(screen.line)) == 1 and set(screen.batch) == {"1", "2"} and set(screen.smiles) == {"A", "B"}
    assert "perturbation: obs['Condition'] (also there: 'target')" in screen.notes
    plain = quiet(table())
    assert set(plain.line) == {"line"} and set(plain.batch) == {"batch"} and plain.smiles == {} and np.isnan(plain.dose).all()


def test_a_column_that_names_cells_is_passed_over():
    adata = anndata.AnnData(np.ones((60, 2)), obs=pd.DataFrame({"drug": ["DMSO", "A"] * 30, "cell_id": [f"x{i}" for i in range(60)]}, index=[f"c{i}" for i in range(60)]))
    assert set(quiet(adata).line) == {"line"} and set(quiet(table(batch=range(12))).batch) == {str(i) for i in range(12)}


def test_structures_of_single_perturbations():
    screen = quiet(table(drug=["DMSO", "A", "A", "A", "B", "A+B"] * 2, smiles=["CS(C)=O", "CC", "C", "C", "-666", "N"] * 2))
    assert screen.smiles == {"A": "C"} and any("more than one structure" in note for note in screen.notes)


# cells and values -----------------------------------------------------------------------------------------------------


def test_cells_left_out_are_counted():
    X = COUNTS.copy()
    X[3] = 0
    adata = table(X, drug=["DMSO", "A", "A", "A", "unassigned", None, "nan", "", "DMSO", "A", "DMSO", "A"], cell_line=["K"] * 10 + ["L", None])
    with pytest.warns(GearsWarning) as said:
        screen = read_screen(adata)
    assert screen.cells.tolist() == ["c0", "c1", "c2", "c8", "c9", "c10"]
    told = " | ".join(str(w.message) for w in said)
    assert "unknown for 4 of 12 cells" in told and "1 cell without any value" in told and "line: unknown for 1" in told and all("AnnData: " in str(w.message) for w in said)


def test_a_line_without_controls_is_left_out():
    with pytest.warns(GearsWarning, match="line 'L' has no controls, 4 cells left out"):
        screen = read_screen(table(drug=["DMSO", "A", "A"] * 4, cell_line=["K", "K", "L"] * 4))
    assert set(screen.line) == {"K"} and screen.n == 8


def test_counts_are_found_where_they_are(tmp_path):
    logged = np.log1p(COUNTS)
    assert quiet(table()).counts and not quiet(table(logged)).counts
    for layers in ({"counts": COUNTS}, {"spliced": COUNTS * 2, "RAW": COUNTS}):
        screen = quiet(table(logged, layers))
        assert screen.counts and np.array_equal(screen.values.toarray(), COUNTS)
    assert quiet(table(logged - 1, {"counts": COUNTS})).counts
    adata = table(logged)
    adata.raw = table(COUNTS)
    screen = quiet(adata[:, :2].copy())
    assert screen.counts and screen.g == 5 and np.array_equal(screen.values.toarray(), COUNTS)
    adata.write_h5ad(tmp_path / "raw.h5ad")
    same(quiet(tmp_path / "raw.h5ad"), quiet(adata))
    assert np.allclose(quiet(adata, layer="X").values.toarray(), logged) and quiet(adata, layer="raw").counts


def test_genes_and_rows_of_choice():
    screen = quiet(table(), genes=["g4", "G0"], keep=lambda obs: obs["drug"] != "B")
    assert screen.genes.tolist() == ["g4", "G0"] and np.array_equal(screen.values.toarray(), COUNTS[[0, 1, 2, 3, 6, 7, 8, 9]][:, [4, 0]])


def test_the_callers_table_is_left_alone():
    adata = table(drug=["dmso ", "A", "a"] * 4, dose=["1 uM"] * 12)
    before = adata.copy()
    first, second = quiet(adata), quiet(adata)
    same(first, second)
    assert first.notes == second.notes and np.array_equal(adata.X, before.X)
    pd.testing.assert_frame_equal(adata.obs, before.obs)


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, lambda X: X.astype(np.int64), lambda X: X.astype(np.float32)])
@pytest.mark.parametrize("way", ["memory", "file", "backed", "zipped"])
def test_every_storage_reads_the_same(kind, way, tmp_path):
    columns = {"dose": ["1 uM", "2 uM", "3 uM"] * 4, "cell_line": ["K", "L"] * 6, "smiles": ["C"] * 12}
    adata = table(kind(COUNTS), **columns)
    expected = quiet(table(**columns))
    if way != "memory":
        adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip" if way == "zipped" else None)
    source = {"memory": adata, "backed": None}.get(way, tmp_path / "a.h5ad")
    if way == "backed":
        source = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    same(quiet(source), expected)
    same(quiet(str(tmp_path / "a.h5ad") if way == "file" else source, genes=["g3", "g1"]), quiet(table(**columns), genes=["g3", "g1"]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_chunks_do_not_change_what_is_read(n, g, step, seed):
    from gears_nb.perturb import reading

    rng = np.random.default_rng(seed)
    X = rng.poisson(0.7, (n, g)).astype(float)
    rows, columns = np.flatnonzero(rng.random(n) < 0.6), rng.permutation(g)[: rng.integers(1, g + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK_ROWS", step)
        patch.setattr(reading, "CHUNK_VALUES", 2 * step)
        for matrix in (X, sp.csr_matrix(X), sp.csc_matrix(X)):
            found = read_rows(matrix, rows, columns)
            assert np.array_equal(found.toarray(), X[rows][:, columns]) and found.has_sorted_indices and found.nnz == np.count_nonzero(found.toarray())


def test_a_dense_file_is_never_whole_in_memory(tmp_path):
    """20000 x 500 dense (80 MB as float64, 40 as float32) with 1% of values: the peak is that of a chunk and of the non-zeros."""
    n, g, rng = 20000, 500, np.random.default_rng(0)
    adata = anndata.AnnData(obs=pd.DataFrame({"drug": pd.Categorical(["DMSO", "A"] * (n // 2))}, index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=[f"g{j}" for j in range(g)]))
    adata.write_h5ad(tmp_path / "big.h5ad")
    with h5py.File(tmp_path / "big.h5ad", "a") as file:
        file.pop("X", None)
        X = file.create_dataset("X", (n, g), np.float64)
        X.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, n, 5000):
            X[start : start + 5000] = rng.poisson(0.01, (5000, g))
    table().write_h5ad(tmp_path / "small.h5ad")
    code = """
import sys, tracemalloc, warnings
from gears_nb.core.machine import peak_rss_mb
from gears_nb.perturb.reading import read_screen
warnings.simplefilter("ignore")
read_screen(sys.argv[1])
before = peak_rss_mb()
tracemalloc.start()
screen = read_screen(sys.argv[2])
print(tracemalloc.get_traced_memory()[1] / 2**20, peak_rss_mb() - before, screen.values.nnz, screen.n)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "small.h5ad", tmp_path / "big.h5ad"], capture_output=True, text=True, check=True)
    traced, grown, nnz, kept = map(float, done.stdout.split())
    assert 50_000 < nnz < 150_000 and kept > 0.98 * n
    assert traced < 45 and grown < 65, done.stdout


# bad input ------------------------------------------------------------------------------------------------------------

BAD = {
    "list": (lambda: [1, 2], {}, "is of type list"),
    "no file": (lambda: "nowhere.h5ad", {}, "does not exist"),
    "folder": (lambda: Path(__file__).parent, {}, "is a folder"),
    "text": (lambda: __file__, {}, "not an HDF5 file"),
    "no controls": (lambda: table(drug=["A", "B"] * 6), {}, "no control cells.*'A'.*control="),
    "only controls": (lambda: table(drug=["DMSO"] * 12), {}, "no line has both"),
    "control apart": (lambda: table(drug=["DMSO", "A"] * 6, line=["K", "L"] * 6), {}, "no line has both"),
    "unknown control": (lambda: table(), {"control": "DMS"}, "no cell is called 'DMS'.*'DMSO'"),
    "missing column": (lambda: table(), {"perturbation_key": "drugs"}, "no such column.*perturbation_key='drug'"),
    "far column": (lambda: table(), {"line_key": "zzz"}, "no such column.*line_key='none'"),
    "no perturbations": (lambda: table(other=NAMES), {}, "no column is known.*'other'.*perturbation_key="),
    "bare and not": (lambda: table(dose=["10 uM", "10"] * 6), {}, "without a unit.*unit='nM'"),
    "word": (lambda: table(dose=["low", "high"] * 6), {}, "cannot be read as a dose.*dose_key='none'"),
    "foreign unit": (lambda: table(dose=["3 Gy"] * 12), {}, "'Gy' is no unit of concentration"),
    "unit": (lambda: table(dose=[1] * 12), {"unit": "mg"}, "'mg' is no unit"),
    "layer": (lambda: table(layers={"counts": COUNTS}), {"layer": "count"}, "no 'count'.*layer='counts'"),
    "gene": (lambda: table(), {"genes": ["g0", "TP53"]}, "1 of 2 genes.*'TP53'"),
    "keep nobody": (lambda: table(), {"keep": lambda obs: obs["drug"] == "x"}, "does not choose cells"),
    "keep names": (lambda: table(), {"keep": lambda obs: obs["drug"]}, "does not choose cells"),
    "z-scores": (lambda: table(COUNTS - 3), {}, "negative.*cell 'c0', gene 'g"),
    "nan": (lambda: table(np.where(np.eye(12, 5) > 0, np.nan, COUNTS)), {}, "NaN or infinite.*cell 'c0', gene 'g0'"),
    "not logarithms": (lambda: table(COUNTS * 100.5 + 0.25), {}, "neither counts nor logarithms"),
    "zeros": (lambda: table(np.zeros((12, 5))), {}, "no value other than 0 in 12 cells.*layer="),
    "controls of zeros": (lambda: table(COUNTS * (np.array(NAMES) != "DMSO")[:, None]), {}, "no value other than 0 in 4 control cells.*layer="),
    "empty": (lambda: table()[:0], {}, "there are no cells in the table"),
    "blank controls": (lambda: table(drug=[None, "A"] * 6), {}, "no control cells, and 6 cells without a name.*is_control"),
    "control without a name": (lambda: table(drug=["", "A"] * 6), {"control": ""}, "name is empty.*is_control"),
    "controls of no line": (lambda: table(cell_line=[None, None, "K", "K", "K", "K"] * 2), {}, "line is unknown for 4 control cells.*line_key='none'"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case):
    make, options, pattern = BAD[case]
    with pytest.raises(InputError, match=pattern) as caught:
        read_screen(make(), **options)
    assert "\n" not in str(caught.value) and "Remedy: " in str(caught.value)


# controls alone -------------------------------------------------------------------------------------------------------

GENES = [f"g{j}" for j in range(5)]


def test_controls_say_what_they_leave_out():
    X = COUNTS.copy()
    X[1] = 0
    adata = table(X, cell_line=["K"] * 6 + [None] + ["K"] * 5)
    with pytest.warns(GearsWarning) as said:
        found = read_controls(adata, GENES)
    told = " | ".join(str(w.message) for w in said)
    assert found.cells.tolist() == ["c0", "c7"] and len(said) == 2
    assert "AnnData: line: unknown for 1 of 4 control cells, left out" in told and "1 control cell without any value, left out" in told
    assert "perturbation: 8 of 12 cells are no controls, left out" in found.notes


def test_controls_need_only_the_genes_that_are_needed():
    adata = table()[:, ["g4", "g0", "g2"]].copy()
    found = read_controls(adata, GENES, needed=["g2", "g0"])
    assert found.genes.tolist() == ["g0", "g2", "g4"] and np.array_equal(found.values.toarray(), COUNTS[[0, 1, 6, 7]][:, [0, 2, 4]])
    assert "genes: 2 of 5 are not in the table, and are not needed ('g1', 'g3')" in found.notes
    same(read_controls(table(), GENES, needed=["g2"]), read_controls(table(), GENES))
    with pytest.raises(InputError, match="1 of 2 genes are not in the table .'g1'"):
        read_controls(adata, GENES, needed=["g1", "g2"])
    with pytest.raises(InputError, match="2 of 5 genes"):
        read_controls(adata, GENES)


@pytest.mark.parametrize(("make", "options", "pattern"), [
    (lambda: table(), {"linekey": "x"}, "linekey: is no option. Remedy: did you mean line_key?"), (lambda: table(), {"zzz": None}, "zzz: is no option"),
    (lambda: table()[:0], {}, "there are no cells in the table"), (lambda: table(np.zeros((12, 5))), {}, "no value other than 0 in 4 cells.*layer="),
    (lambda: table(cell_line=[None] * 12), {}, "line is unknown for 4 control cells"), (lambda: table(drug=["A"] * 12), {}, "no control cells.*perturbation_key='none'")])
def test_controls_that_cannot_be_used(make, options, pattern):
    with pytest.raises(InputError, match=pattern) as caught:
        read_controls(make(), GENES, **options)
    assert "\n" not in str(caught.value) and "Remedy: " in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["obs", "var"])
def test_repeated_names_are_refused(what, tmp_path):
    adata = table()
    setattr(adata, f"{what}_names", ["x", "x", *getattr(adata, f"{what}_names")[2:]])
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="more than once"):
        read_screen(tmp_path / "a.h5ad")


def test_a_zarr_store_is_read(tmp_path):
    pytest.importorskip("zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table().write_zarr(tmp_path / "a.zarr")
    same(quiet(tmp_path / "a.zarr"), quiet(table()))


@pytest.mark.filterwarnings("ignore")
def test_damaged_files(tmp_path):
    table().write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "a.h5ad").read_bytes()[:3000])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_screen(tmp_path / "cut.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match="not a readable AnnData"):
        read_screen(tmp_path / "other.h5ad")


# summary --------------------------------------------------------------------------------------------------------------


def test_report_and_check():
    screen = quiet(table(drug=["DMSO", "A", "A+B"] * 4, dose=["1 nM", "1 nM", "1 uM"] * 4, cell_line=["K"] * 6 + ["L"] * 6, batch=[1, 2, 1] * 4))
    lines = report(screen).splitlines()
    assert lines[0] == "12 cells x 5 genes (counts); 2 lines, 2 perturbations (1 combined), 2 doses (1 to 1000 nM), batches: 2"
    assert lines[1] == "  K: 2 control, 4 treated cells; 2 perturbations, 2 conditions" and len(lines) == 3 and len(report(screen, 1).splitlines()) == 3
    mind = check_screen(screen)
    assert len(mind) == 2 and mind[0].startswith("2 batches have no controls") and mind[1].startswith("4 of 4 conditions")


def test_prepared_as_it_should_be():
    """A screen that was read goes through the next page without a further word."""
    screen = quiet(table(dose=["1 uM"] * 12))
    found = deltas(screen, log_values(screen), np.ones(12, bool), np.ones(12, bool))
    logged = np.log2(1 + 1e4 * COUNTS / COUNTS.sum(1, keepdims=True))
    mask = np.array(NAMES)
    assert found.conditions.names == ["line, A, 1000 nM", "line, B, 1000 nM"]
    assert np.allclose(found.delta[0], logged[mask == "A"].mean(0) - logged[mask == "DMSO"].mean(0), atol=1e-4)


# real tables ----------------------------------------------------------------------------------------------------------

REAL = {  # file: cells, controls, lines, perturbations, doses, counts, structures
    "perturb_kang_ifnb/kang_pbmc_2000": (2000, 1000, 9, 1, 0, True, 0),
    "perturb_l1000_dose/l1000_a375_ljp005": (377, 26, 1, 59, 6, False, 0),
    "perturb_l1000_smiles/perturb_l1000_ht115_smiles": (681, 20, 1, 349, 52, False, 349),
    "perturb_papalexi_eccite/perturb_papalexi_eccite": (16192, 1923, 1, 25, 0, True, 0),
    "perturb_norman_mcfaline/perturb_norman_mcfaline_mini": (5961, 400, 4, 33, 0, False, 0),
}


@pytest.mark.parametrize("file", REAL)
def test_published_tables_need_no_option(file):
    root = data_root()
    if root is None or not (root / f"{file}.h5ad").is_file():
        pytest.skip("the public tables are not here")
    screen = quiet(root / f"{file}.h5ad")
    found = screen.n, int(screen.control.sum()), len(set(screen.line)), len(set(screen.perturbation) - {CONTROL}), len(np.unique(screen.dose[screen.dose > 0])), screen.counts, len(screen.smiles)
    assert found == REAL[file]
    adata = anndata.read_h5ad(root / f"{file}.h5ad")[screen.cells]
    assert abs(adata.X - screen.values).max() == 0
    if "pert_dose" in adata.obs:
        assert np.allclose(screen.dose[~screen.control], 1000 * adata.obs["pert_dose"].to_numpy(float)[~screen.control], rtol=1e-9)
