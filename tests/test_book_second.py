"""Every notebook of the chapters of `UPPER` runs."""
import pytest
from book import NBS, NOTEBOOKS, UPPER, forked, name, passes


@forked
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.relative_to(NBS).parts[0] in UPPER], ids=name)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    passes(path)
