"""The package is what the notebooks export; notebooks stay readable. That they run is shown in `test_book_first.py`, `test_book_second.py` and `test_book_third.py`."""
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from book import NBS, NOTEBOOKS, name

ROOT = NBS.parent
MODULES = sorted(p for p in (ROOT / "gears_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c, "".join(c["source"])) for c in found if kind in (None, c["cell_type"])]


def exported(source):
    return any(re.match(r"#\|\s*export", line) for line in source.splitlines())


def test_export_leaves_no_diff(tmp_path):
    """The committed package is exactly what `nbdev_export` writes from the committed notebooks."""
    for part in ("nbs", "gears_nb"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for part in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / part, tmp_path / part)
    subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=tmp_path, check=True, capture_output=True)
    made = {p.relative_to(tmp_path) for p in (tmp_path / "gears_nb").rglob("*.py")}
    kept = {p.relative_to(ROOT) for p in (ROOT / "gears_nb").rglob("*.py")}
    assert made == kept
    differing = [str(p) for p in sorted(made) if not filecmp.cmp(tmp_path / p, ROOT / p, shallow=False)]
    assert not differing, f"run `make export`: {differing}"


def test_scripts_are_what_the_notebooks_export(tmp_path):
    """Every `.js` and `.css` file of the package comes from raw cells of a notebook."""
    from gears_nb.core.scripts import export_scripts
    made = {p.relative_to(tmp_path): p.read_text(encoding="utf-8") for p in export_scripts(NBS, tmp_path)}
    kept = {p.relative_to(ROOT / "gears_nb"): p.read_text(encoding="utf-8") for p in (ROOT / "gears_nb").rglob("*") if p.suffix in (".js", ".css")}
    assert made == kept and made, "run `make export`"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_names_a_living_notebook(path):
    """A deleted notebook would leave its module behind."""
    named = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
    assert named, "not an exported module"
    assert (path.parent / named.group(1)).resolve() in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_reads_like_an_essay(path):
    """A text cell for every two code cells, small exported cells, a title and a subtitle."""
    text, code = cells(path, "markdown"), cells(path, "code")
    assert 2 * len(text) >= sum(bool(source.strip()) for _, source in code) - 1
    long = [source.splitlines()[1] for _, source in code if exported(source) and len(source.splitlines()) > 48]
    assert not long, f"exported cells above 40 lines: {long}"
    assert text[0][1].startswith("# ") and "\n> " in text[0][1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_is_clean(path):
    """Outputs are small, free of errors and machine paths; only the metadata that is needed is kept."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in content["metadata"]
    assert path.stat().st_size < 1_500_000
    outputs = [o for c in content["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not [o["ename"] for o in outputs if o["output_type"] == "error"]
    text = path.read_text(encoding="utf-8")
    assert str(ROOT.parent) + "/" not in text and str(Path.home()) + "/" not in text
    assert all(set(c["metadata"]) <= {"tags"} for c in content["cells"])


OPENINGS = [(cell, key[1]) for path in NOTEBOOKS for cell, source in cells(path, "code") if (key := re.search(r'(?m)^on_file\("([\w/]+)"', source))]


@pytest.mark.parametrize("cell, key", OPENINGS, ids=[key for _, key in OPENINGS])
def test_a_page_opens_with_the_record_on_file(cell, key):
    """What a page keeps of its record is of the record that is on file, with a figure; or it says that there is none."""
    record, kept = ROOT / "figures" / key / "results.json", json.dumps(cell["outputs"])
    if not record.is_file():
        assert "No complete run on file yet" in kept, "keep the outputs of this page again"
        return
    digest = json.loads(record.read_text(encoding="utf-8"))["notebook"]["digest"][:8]
    assert f"code {digest}" in kept, f"of an older run: keep the outputs of this page again (record {digest})"
    assert any(kind.startswith("image/") for output in cell["outputs"] for kind in output.get("data", {})), "no figure: is it larger than a page may keep?"


def test_parameter_tags_survive_cleaning(tmp_path):
    """nbdev's cleaner must keep papermill's tag, or every experiment silently loses its parameters."""
    from gears_nb.lab.runner import catalogue
    experiments = [book for book in catalogue() if book.parameter_source]
    assert experiments, "no notebook has a parameters cell"
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    copy = shutil.copy(experiments[0].path, tmp_path / "nbs" / "a.ipynb")
    subprocess.run([str(Path(sys.executable).parent / "nbdev_clean"), "--fname", str(copy)], cwd=tmp_path, check=True, capture_output=True)
    assert any("parameters" in c["metadata"].get("tags", []) for c, _ in cells(Path(copy), "code"))


def test_imports_run_downwards():
    """Modules and notebooks import from lower floors only; neighbours on one floor stay apart."""
    floors = ["core", "geometry", "data", "lab", "encoder targets", "models", "structure generators alignment saturn perturb cycle", "reconstruct", "benchmark", "attention", "runs"]
    level = {chapter: i for i, floor in enumerate(floors) for chapter in floor.split()}
    code = {path: path.read_text(encoding="utf-8") for path in MODULES} | {path: "\n".join(source for _, source in cells(path, "code")) for path in NOTEBOOKS}
    wrong = []
    for path, source in code.items():
        chapter = path.relative_to(ROOT / "gears_nb" if path.suffix == ".py" else NBS).parts[0]
        for line in source.splitlines():
            used = re.match(r"\s*(?:from|import) (?:gears_nb|\.)\.(\w+)\.?\w*", line)
            if used and used.group(1) in level and used.group(1) != chapter and level[used.group(1)] >= level.get(chapter, 99):
                wrong.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_readme_is_the_index():
    """README.md is the conversion of the committed index notebook."""
    from gears_nb.runs.readme import readme_text
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text(), "run `make readme`"
