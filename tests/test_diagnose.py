"""`gears diagnose`: planted causes are found, absent ones are not, the page stands alone, bad input is one line and writes nothing."""
import json
import re

import anndata as ad
import numpy as np
import pytest
from forks import command, forked

from gears_nb.core.errors import InputError
from gears_nb.data.simulator import simulate
from gears_nb.encoder.diagnose import CHECKS, diagnose, prepare
from gears_nb.lab.findings import SEVERITIES
from gears_nb.runs.cli import main
from gears_nb.runs.diagnose_report import diagnose_files, render_diagnosis, write_report

SEED = 33  # not one of the switchboard's


def quick(tissue, **options):
    return diagnose(tissue.slides, options.pop("cells", None), profile="smoke", training=False, **options)


@pytest.fixture(scope="module")
def tissue():
    return simulate("tiny", SEED)


@pytest.fixture(scope="module")
def found(tissue):
    return diagnose(tissue.slides, tissue.cells, profile="smoke", training=False)


@pytest.fixture(scope="module")
def files(tissue, tmp_path_factory):
    """Three slides and cells on disk."""
    folder = tmp_path_factory.mktemp("slides")
    for slide in tissue.slides:
        slide.write_h5ad(folder / f"{slide.obs['slide'].iloc[0]}.h5ad")
    tissue.cells.write_h5ad(folder / "cells.h5ad")
    return folder


def slides_of(folder):
    return [str(folder / f"ST{i}.h5ad") for i in (1, 2, 3)]


def test_every_check_answers_once(found):
    assert [f.key for f in found.findings] == list(CHECKS)
    assert all(f.severity in SEVERITIES and f.summary and f.advice for f in found.findings)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["genes"] == 240


@pytest.mark.parametrize("hypothesis, cause", [("H1", "qc_shift"), ("H2", "mean_shift"), ("H5", "biology")])
def test_a_cause_that_is_off_is_rejected_and_one_that_is_on_is_found(hypothesis, cause):
    on, off = (quick(simulate("tiny", SEED + 1, **{cause: strength})).verdicts[hypothesis] for strength in (1.5, 0.0))
    assert (on, off) == ("CONFIRMED", "FALSIFIED")


def test_depth_and_genes_are_noticed(tissue):
    thin = tissue.slides[1].copy()
    thin.X = thin.X.copy()
    thin.X.data = np.random.default_rng(0).binomial(thin.X.data.astype(int), 0.02).astype(np.float32)
    seen = diagnose([tissue.slides[0], thin[:, :200].copy(), tissue.slides[2]], profile="smoke", training=False)
    assert seen["depth"].severity == "warning" and "ST2" in seen["depth"].advice
    assert seen["depth"].numbers["ST2"]["median_counts"] < 0.05 * seen["depth"].numbers["ST1"]["median_counts"]
    assert seen["genes"].numbers["common"] <= 200 and seen["genes"].severity in ("warning", "problem")
    assert seen.verdicts["H1"] == "CONFIRMED"


def test_equal_sources_raise_no_alarm(tissue):
    """The halves of one slide, spot by spot, are one slide: nothing may tell them apart."""
    one = tissue.slides[0]
    order = np.random.default_rng(0).permutation(one.n_obs)
    halves = [one[np.sort(order[i::2])].copy() for i in (0, 1)]
    seen = diagnose(halves, profile="smoke", training=False)
    assert [s["name"] for s in seen.sources] == ["ST1", "ST1 (2)"]
    assert {seen[k].severity for k in ("genes", "depth", "accuracy", "centroids", "mixing")} == {"ok"}
    assert seen.verdicts["H1"] == seen.verdicts["H2"] == "FALSIFIED"


def test_advice_leaves_to_gears_what_gears_does(tissue):
    """Centring and depth are nobody's task; what is left is said in the reader's language."""
    from gears_nb.core.errors import speaking
    from gears_nb.encoder.diagnose import ADVICE
    shifted = simulate("tiny", SEED, mean_shift=1.5, qc_shift=1.5)
    seen = quick(shifted)
    for key in ("centroids", "H1", "H2"):
        assert seen[key].advice.startswith("Nothing to do: Gears ") and seen[key].severity == "note", key
    every = [advice for verdicts in ADVICE.values() for _, advice in verdicts.values()] + [f.advice for f in seen.findings]
    assert not [a for a in every if a.startswith(("Centre ", "Normalise ", "Subtract ", "Use "))]
    with speaking("shell"):
        cells = quick(tissue, cells=tissue.cells)
    assert all("encoder.align" not in f.advice or "`--set encoder.align=harmony`" in f.advice for f in cells.findings)


def test_input_is_not_changed_and_findings_repeat(tissue):
    before = [(s.X.copy(), list(s.obs.columns), list(s.var_names)) for s in tissue.slides]
    first, second = quick(tissue), quick(tissue)
    assert all((a != s.X).nnz == 0 and c == list(s.obs.columns) and g == list(s.var_names) for (a, c, g), s in zip(before, tissue.slides))
    strip = lambda d: [{k: v for k, v in f.items() if k != "seconds"} for f in d.to_dict()["findings"]]
    assert strip(first) == strip(second)


def test_many_cells_are_sampled_and_said(tissue):
    cells = ad.concat([tissue.cells] * 4)
    cells.obs_names_make_unique()
    samples = prepare(tissue.slides, cells, profile="smoke")
    assert samples.cells.n_obs == 500 and samples.given[-1] == 800 and samples.names[-1] == "cells"


def test_training_answers_the_last_two_and_leaves_no_files(tissue, monkeypatch, tmp_path):
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path))
    seen = diagnose(tissue.slides, profile="smoke")
    assert set(seen.verdicts) == {"H1", "H2", "H3", "H4", "H5", "H6"} and not list(tmp_path.iterdir())
    assert seen["H4"].numbers["encoders"]["v3"]["overlap20_train"] == seen["H6"].numbers["embeddings"]["v3"]["overlap20_train"]  # one training for both
    assert {f.key: f.severity for f in quick(tissue).findings}["H4"] == "skipped"


def test_the_page_stands_alone(found, tmp_path):
    page = write_report(tmp_path / "d.html", found, "Mine & <yours>").read_text(encoding="utf-8")
    assert "http" not in re.sub(r'<meta http-equiv="Content-Security-Policy"', "", page)
    assert not re.search(r"<(script|link|img|iframe)\b|url\(|\bsrc=", page) and "Mine &amp; &lt;yours&gt;" in page
    assert all(f'id="{f.key}"' in page for f in found.findings) and page.count("<svg") >= 8
    assert [p.name for p in tmp_path.iterdir()] == ["d.html"]


def test_the_page_is_text_before_it_is_a_file(found, tmp_path):
    text = render_diagnosis(found, "Mine")
    assert write_report(tmp_path / "d.html", found, "Mine").read_text(encoding="utf-8") == text
    assert all(f"--{name}:" in text for name in re.findall(r"var\(--(\w+)\)", text)), "every colour that is asked for is there"
    tables = "".join(re.findall(r"<table.*?</table>", text, re.S))
    assert not re.search(r"[{\[]&#x27;|[{\[]\d|\.\d*[1-9]\d{4}|>True<|>None<", re.sub(r"<code>.*?</code>", "", tables)), "raw Python on the page"


@forked
def test_command(files, found, tmp_path):
    """As a user calls it: text on stdout, progress on stderr, a page; the same findings as in Python."""
    page = tmp_path / "new" / "out.html"
    done = command("diagnose", "--slides", *slides_of(files), "--cells", files / "cells.h5ad", "--report", page, "--profile", "smoke", "--no-training")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {page}" and "Traceback" not in done.stderr and "diagnose:" in done.stderr
    assert all(f.summary in done.stdout for f in found.findings) and page.stat().st_size < 300_000


def test_json(files, found, capsys):
    assert main(["diagnose", "--slides", *slides_of(files), "--cells", str(files / "cells.h5ad"), "--profile", "smoke", "--no-training", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {f["key"]: f["verdict"] for f in told["findings"] if f["verdict"]} == found.verdicts


def spoiled(files, folder, change):
    table = ad.read_h5ad(files / "ST2.h5ad")
    table = change(table) or table
    table.write_h5ad(folder / "bad.h5ad")
    return str(folder / "bad.h5ad")


def fractional(table):
    table.X = table.X.toarray() + 0.5


def nowhere(table):
    del table.obsm["spatial"]


def renamed(table):
    table.var_names = [f"other{i}" for i in range(table.n_vars)]


@pytest.mark.parametrize("change, words", [(fractional, ["raw counts"]), (nowhere, ["obsm['spatial']"]), (renamed, ["ST2", "genes shared"]),
                                           (lambda t: t[:5].copy(), ["5 spots"])], ids=["scaled", "no place", "other genes", "too small"])
def test_bad_tables_are_refused(files, tmp_path, capsys, change, words):
    bad, page = spoiled(files, tmp_path, change), tmp_path / "x.html"
    code = main(["diagnose", "--slides", slides_of(files)[0], bad, "--report", str(page), "--profile", "smoke", "--quiet"])
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(said) == 1 and "Remedy: " in said[0] and all(w in said[0] for w in words), said
    assert not page.exists()


@pytest.mark.parametrize("more, word", [(["--profile", "toyy"], "toyy"), (["--report", "x.txt"], ".html"), (["--cells", "none.h5ad"], "none.h5ad"), (["--min-genes", "x"], "min-genes")])
def test_bad_arguments_are_refused(files, capsys, monkeypatch, tmp_path, more, word):
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", "--slides", *slides_of(files), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and word in said and "Remedy: " in said and not list(tmp_path.iterdir())


def test_two_slides_in_one_table_must_be_split(tissue):
    with pytest.raises(InputError, match="names 2 slides"):
        diagnose([ad.concat(tissue.slides[:2])])


def stacked(files, folder):
    """Two slides in one table that tells them apart in a column of its own, in three dimensions, with the counts in a layer."""
    both = ad.concat([ad.read_h5ad(path) for path in slides_of(files)[:2]], index_unique="-")
    both.obs["piece"] = both.obs.pop("slide").to_numpy()
    both.obsm["spatial"] = np.c_[both.obsm["spatial"], np.arange(both.n_obs) * 5.0][:, [0, 2, 1]]
    both.layers["counts"] = both.X.copy()
    both.X = both.X.toarray() + 0.5
    both.write_h5ad(folder / "both.h5ad")
    return folder / "both.h5ad"


def test_what_the_remedies_name_can_be_given(files, tmp_path):
    """Key of the sections, plane and layer go all the way; without them the message names them."""
    table, quick = stacked(files, tmp_path), {"profile": "smoke", "training": False, "progress": False}
    with pytest.raises(InputError, match="plane='xz'"):
        diagnose_files([table], **quick)
    with pytest.raises(InputError, match="layer='counts'"):
        diagnose_files([table], plane="xz", **quick)
    found = diagnose_files([table], plane="xz", layer="counts", slide_key="piece", **quick)
    apart = diagnose_files(slides_of(files)[:2], **quick)
    assert [s["name"] for s in found.sources] == ["ST1", "ST2"] and found.verdicts == apart.verdicts
    spread = [f["depth"].numbers for f in (found, apart)]
    assert spread[0] == spread[1]


def test_sections_of_the_cells_do_not_matter(files, tmp_path):
    """Cells are one set: a column with gaps is nobody's business, nor is the key that divides the slides."""
    cells = ad.read_h5ad(files / "cells.h5ad")
    cells.obs["sample"] = np.where(np.arange(cells.n_obs) % 2, "a", None)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    found = diagnose_files(slides_of(files)[:2], tmp_path / "cells.h5ad", slide_key="slide", profile="smoke", training=False, progress=False)
    assert [s["kind"] for s in found.sources] == ["spots", "spots", "cells"]


def test_scaled_values_are_not_offered(files, tmp_path):
    """Nothing here can use them, so the remedy does not name the setting; where counts may be is said."""
    bad = spoiled(files, tmp_path, fractional)
    with pytest.raises(InputError) as refused:
        diagnose_files([slides_of(files)[0], bad], profile="smoke", training=False, progress=False)
    assert refused.value.remedy == "give raw counts"
    table = ad.read_h5ad(bad)
    table.layers["counts"] = np.rint(table.X)
    table.write_h5ad(bad)
    with pytest.raises(InputError) as refused:
        diagnose_files([slides_of(files)[0], bad], profile="smoke", training=False, progress=False)
    assert refused.value.remedy == "give raw counts (layers['counts'] may hold them: layer='counts')"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_are_none(files, capsys, seed):
    assert main(["diagnose", "--slides", *slides_of(files), "--seed", str(seed)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "seed" in said and "[0, 4294967295]" in said
