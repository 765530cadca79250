"""Every notebook of the lower chapters runs."""
import pytest
from book import LOWER, NBS, NOTEBOOKS, forked, name, passes


@forked
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.relative_to(NBS).parts[0] in LOWER], ids=name)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    passes(path)
