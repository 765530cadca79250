"""Every notebook of all other chapters, and every page of no chapter, runs."""
import pytest
from book import LOWER, NBS, NOTEBOOKS, UPPER, forked, name, passes


@forked
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.relative_to(NBS).parts[0] not in (*LOWER, *UPPER)], ids=name)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    passes(path)
