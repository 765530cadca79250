"""Stale results name the module that changed: the import closure of every experiment of the repository."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gears_nb.lab import digests
from gears_nb.lab.experiment import Experiment
from gears_nb.lab.results import is_stale, load_results
from gears_nb.lab.runner import catalogue

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = {book.key: book.path for book in catalogue() if book.parameter_source}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return Path(shutil.copytree(ROOT / "gears_nb", tmp_path_factory.mktemp("copy") / "gears_nb", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module")
def before(copied):
    "Modules of every experiment, of the copy that nobody has edited."
    return {key: digests.modules_of(path, copied) for key, path in EXPERIMENTS.items()}


@pytest.fixture
def package(copied, monkeypatch):
    "A copy of the package that may be edited; digests are taken there. What a test has edited is as before after it, times of change too."
    monkeypatch.setattr(digests, "PACKAGE", copied)
    yield copied
    for source in (ROOT / "gears_nb").rglob("*.py"):
        module = copied / source.relative_to(ROOT / "gears_nb")
        if module.stat().st_mtime_ns != source.stat().st_mtime_ns:
            shutil.copy2(source, module)


def edit(module: Path, text: str = "\nCHANGED = 1\n"):
    module.write_text(module.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_a_line_of_the_training_loop_concerns_whoever_trains(before, package):
    edit(package / "core" / "training.py")
    hit = {key for key, path in EXPERIMENTS.items() if digests.changed(before[key], digests.modules_of(path)) == ["core/training"]}
    assert hit == {key for key, modules in before.items() if "core/training" in modules}
    assert {"structure/ladder", "benchmark/first_light", "structure/recycles"} <= hit and len(hit) < len(EXPERIMENTS)


@pytest.mark.parametrize("change", ["\n# a comment\n", "\n\n\n"])
def test_comments_and_blank_lines_concern_nobody(before, package, change):
    edit(package / "core" / "training.py", change)
    assert all(digests.modules_of(path) == before[key] for key, path in EXPERIMENTS.items())


def test_another_chapter_concerns_nobody_who_does_not_use_it(package):
    ladder = EXPERIMENTS["structure/ladder"]
    before = digests.modules_of(ladder)
    for other in ("runs/cli", "attention/views", "generators/small_vae"):
        edit(package / f"{other}.py")
    assert digests.modules_of(ladder) == before and "core/training" in before and "structure/rungs" in before


def test_results_say_which_module_changed(package, tmp_path):
    Experiment("structure", "recycles", root=tmp_path / "figures").write({"x": 1.0})
    record = load_results(tmp_path / "figures")["structure/recycles"]
    assert is_stale(record) is None
    edit(package / "core" / "training.py")
    assert is_stale(record) == "core/training changed since"
    old = {**record, "notebook": {k: v for k, v in record["notebook"].items() if k != "modules"}}
    assert "recorded" in is_stale(old)
