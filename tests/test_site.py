"""The website: a small one is laid out, built and looked at, as text and in Chromium; `make docs-check` does the same with all of it."""
import json
import re
import shutil
from pathlib import Path

import pytest

from gears_nb.attention.browser import why_no_browser
from gears_nb.core.errors import InputError
from gears_nb.core.machine import repo_root
from gears_nb.lab.runner import find
from gears_nb.runs.site import HEAVY, build_site, exhibits, foreign_table, picture_of, refusal_table, site_nav, stage_site
from gears_nb.runs.site_check import check_browser, check_text, main, read_page

ROOT = repo_root()
ONLY = ("geometry/gauge", "models/contract", "generators/small_vae", "encoder/h1_qc")
for package in ("latex2mathml", "mkdocs", "mkdocs_jupyter", "mkdocstrings"):
    pytest.importorskip(package, reason="pip install 'gears_nb[docs]'")


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """The sources of a site with four notebooks."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    assert stage_site(folder, ONLY) == len(ONLY)
    return folder


@pytest.fixture(scope="module")
def site(docs):
    """Its pages."""
    build_site(docs, docs.with_name("out"))
    return docs.with_name("out")


def text_of(path):
    return "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")


def test_formulas_need_no_script(docs):
    """Each formula of the notebooks is MathML in the sources of the site, and none is left as LaTeX."""
    for key in ONLY:
        path = find(key).path
        before, after = text_of(path), text_of(docs / path.relative_to(ROOT))
        assert ("$" in before) == ("<math" in after) and not re.search(r"\\(mathbb|sum|frac|mathcal)", after)


def test_a_stale_result_is_marked(tmp_path, docs):
    """What the gallery says of a result: its command, its claims, and that its code has changed."""
    folder = tmp_path / "figures/encoder/h1"
    shutil.copytree(ROOT / "figures/encoder/h1", folder)
    record = json.loads((folder / "results.json").read_text())
    record["notebook"]["digest"] = "0"
    (folder / "results.json").write_text(json.dumps(record))
    (one,) = exhibits(tmp_path / "figures")
    assert one.stale and "changed since" in one.stale and (one.key, one.command) == ("encoder/h1", "gears run encoder/h1_qc --profile toy")
    outcomes = list(record["verdicts"].values())
    assert one.verdicts[0] == sum(v is True for v in outcomes) and sum(one.verdicts) == len(outcomes)
    page = (docs / "gallery.md").read_text(encoding="utf-8")
    assert one.command in page and one.book.subtitle[:20] in page and one.date in page and "nbs/encoder/10_h1_qc.html" in page


def test_pictures_of_the_gallery_are_light(docs):
    page = (docs / "gallery.md").read_text(encoding="utf-8")
    images = re.findall(r'<img loading="lazy" src="([^"]+)"', page)
    assert len(images) == 1 and all((docs / src).stat().st_size < HEAVY for src in images)
    chosen = [picture_of(path.parent) for path in (ROOT / "figures").glob("*/*/results.json")]
    heavy = [p.parent.name for p in chosen if p is None or (p.suffix == ".svg" and p.stat().st_size > 2 * HEAVY)]
    assert heavy == [], "give these a preview.png"


def test_guides_quote_what_the_code_says(docs):
    page = (docs / "nbs/site/slides.md").read_text(encoding="utf-8")
    assert refusal_table() in page and foreign_table() in page and "<!--" not in page
    assert "Remedy: give raw counts, not z-scores" in page and "`.loom`" in page


def test_guides_can_be_read_in_the_clone():
    """Their links lead to files that are there, and a table that only the website has leaves no heading without a sentence."""
    for path in sorted((ROOT / "nbs/site").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        dead = [link for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text) if not (path.parent / link).exists()]
        assert not dead, (path.name, dead)
        assert not re.search(r"^## .*\n+<!--", text, re.MULTILINE), path.name


def test_every_page_is_in_the_navigation(docs):
    def leaves(node):
        for entry in node:
            inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from leaves(inside) if isinstance(inside, list) else [inside]
    listed = list(leaves(site_nav(docs)))
    pages = {p.relative_to(docs).as_posix() for p in docs.rglob("*") if p.suffix in (".md", ".ipynb") and "figures" not in p.parts}
    assert set(listed) == pages and len(listed) == len(pages)


def lead_out(fault):
    """Whether a dead link leads to a notebook or module that is there, but not part of the small site."""
    page, address = re.fullmatch(r"(\S+): (\S+) leads nowhere", fault).groups()
    place = (ROOT / page).parent / address.partition("#")[0]
    target = Path(*place.parts).resolve()
    module = ROOT / "gears_nb" / target.relative_to(ROOT / "api") if target.is_relative_to(ROOT / "api") else target
    return target.with_suffix(".ipynb").is_file() or module.with_suffix(".py").is_file() or target.is_file()


def test_no_dead_link_no_broken_picture_nothing_from_outside(site):
    faults = [f for f in check_text(site) if not (f.endswith("leads nowhere") and lead_out(f))]
    assert faults == []


def test_pages_share_what_all_have(site):
    page = (site / "nbs/geometry/01_gauge.html").read_text(encoding="utf-8")
    assert "<math" in page and not re.search("cdnjs|mathjax_url|mermaid", page)
    assert len(re.sub(r'src="data:[^"]*"', "", page)) < 200_000
    assert sum(p.suffix == ".css" for p in (site / "assets").iterdir()) >= 3


def test_search_knows_prose_and_reference_but_not_cells(site):
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    gauge = " ".join(d["text"] for d in found if d["location"].startswith("nbs/geometry/01_gauge.html"))
    assert "plt.subplots" not in gauge and len(gauge) > 1000
    assert any(d["location"] == "api/geometry/gauge.html#gears_nb.geometry.gauge.procrustes" for d in found)


def test_reference_has_signatures_and_ways_to_other_pages(site):
    page = (site / "api/generators/small_vae.html").read_text(encoding="utf-8")
    assert "nbs/generators/01_small_vae.html" in page and "../models/contract.html#gears_nb.models.contract.GeometryModel" in page
    assert 'id="gears_nb.generators.small_vae.losses"' in page, "what @patch adds to a class is missing"


@pytest.mark.skipif(why_no_browser() is not None, reason=f"no browser: {why_no_browser()}")
def test_in_a_browser_without_a_network(site):
    """Front page, gallery, a notebook with formulas and a figure to turn, a page of the reference: nothing fails, and search finds a word, served or from the folder."""
    pages = ["index.html", "gallery.html", "nbs/generators/01_small_vae.html"]
    visits, faults = check_browser(site, pages, "procrustes", "procrustes", ways=[(True, 400)])
    assert faults == []
    assert all(v.requests >= 3 and v.seconds > 0 for v in visits)


def test_a_site_that_is_not_there(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="make docs"):
        check_text(tmp_path)
    monkeypatch.setattr("gears_nb.runs.site_check.repo_root", lambda: tmp_path)
    assert main([]) == 2 and "make docs" in capsys.readouterr().err


def test_the_check_bites(tmp_path):
    (tmp_path / "a.html").write_text('<html lang="en"><title>a</title><h2 id="b">b</h2><a href="#b">1</a><a href="#c">2</a><a href="../../etc/passwd">3</a>')
    assert check_text(tmp_path) == ["a.html: #c leads to no heading", "a.html: ../../etc/passwd leads nowhere"]
    assert read_page("<img src=x alt='a > b'>").wordless == ()
