"""The public face: what `import gears_nb` gives and costs, what an installation needs, and that every link leads somewhere."""
import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest

import gears_nb

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


# ---------------------------------------------------------------- import gears_nb

def test_import_is_light():
    """No torch, no numpy, and far under 0.3 s."""
    done = python("import sys, time; t = time.perf_counter(); import gears_nb; print(time.perf_counter() - t, *sorted(sys.modules))")
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 0.3
    assert not {"torch", "numpy", "scipy", "pandas", "anndata", "scanpy"} & set(modules)


def test_public_names():
    from gears_nb import Gears, InputError, profile, read
    from gears_nb.core.errors import InputError as error
    from gears_nb.data.readers import read as reader
    from gears_nb.reconstruct.facade import Gears as facade
    from gears_nb.reconstruct.settings import profile as named
    assert (Gears, InputError, profile, read) == (facade, error, named, reader)
    assert {"Gears", "InputError", "profile", "read", "__version__"} == set(gears_nb.__all__) <= set(dir(gears_nb))
    everything = {}
    exec("from gears_nb import *", everything)
    assert everything["Gears"] is facade
    unknown = "Grars"
    with pytest.raises(AttributeError, match="'gears_nb' has no attribute 'Grars'"):
        getattr(gears_nb, unknown)


def test_names_can_be_seen_before_they_are_imported():
    done = python("import sys, gears_nb; print(*dir(gears_nb)); print('torch' in sys.modules); gears_nb.InputError; print('torch' in sys.modules)")
    names, before, after = done.stdout.splitlines()
    assert {"Gears", "read"} <= set(names.split()) and (before, after) == ("False", "False")


def test_a_new_version_keeps_the_rest_of_init(tmp_path):
    """nbdev writes the version of settings.ini into `__init__.py` at every export."""
    from nbdev.config import _re_version
    text = (ROOT / "gears_nb/__init__.py").read_text(encoding="utf-8")
    assert len(_re_version.findall(text)) == 1
    changed = _re_version.sub('__version__ = "9.9.9"', text)
    assert [a for a, b in zip(text.splitlines(), changed.splitlines()) if a != b] == [f'__version__ = "{gears_nb.__version__}"']


def test_type_check_sees_the_public_names_and_bites(tmp_path):
    """mypy, as `make types` sets it, finds a misspelt method and a wrong argument behind `from gears_nb import`."""
    pytest.importorskip("mypy")
    settings = (ROOT / "mypy.ini").read_text(encoding="utf-8").replace("packages = gears_nb\n", "")
    (tmp_path / "mypy.ini").write_text(settings)
    wrong = "from gears_nb import Gears, read\nGears().recontruct(1)\nread('a', smaple='b')\n"
    (tmp_path / "wrong.py").write_text(wrong)
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(ROOT / ".mypy_cache" / "face"),
                           str(tmp_path / "wrong.py")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert '"Gears" has no attribute "recontruct"' in done.stdout and '"smaple" for "read"' in done.stdout


# ---------------------------------------------------------------- packages

IMPORTED_AS = {"umap-learn": "umap", "scvi-tools": "scvi", "scikit-learn": "sklearn", "pot": "ot", "lightning-fabric": "lightning_fabric"}
# started by name, or brought along so that another package can do something
NOT_IMPORTED = {"jupyterlab": "make lab", "voila": "gears explore", "ipykernel": "the kernel of every notebook", "igraph": "Leiden clusters of scanpy",
                "execnb": "nbdev breaks with newer ones", "ghapi": "nbdev breaks with newer ones", "setuptools": "setup.py", "ruff": "make lint",
                "mypy": "make types", "coverage": "make coverage", "pre-commit": "hooks", "pytest-xdist": "make test", "mkdocs-material": "make docs", "mkdocs-jupyter": "make docs", "mkdocstrings": "make docs",
                "snakemake": "gears workflow", "snakemake-executor-plugin-slurm": "gears workflow, on a cluster",
                "tensorboard": "torch.utils.tensorboard"}
# parts of declared packages, or pulled in by them for certain
COMES_ALONG = {"IPython": "ipykernel", "traitlets": "anywidget", "jupyter_client": "ipykernel", "PIL": "matplotlib", "packaging": "anndata",
               "threadpoolctl": "scikit-learn", "zarr": "anndata", "statsmodels": "scanpy", "spatialdata": "squidpy", "mkdocs": "mkdocs-material", "yaml": "snakemake"}


OF_THEIR_OWN = {"novosparc", "moscot", "tangram", "CeLEry"}  # imported by benchmark/adapters.py in environments that peers.ini describes


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def declared():
    """{extra, or '' for the core: names}"""
    plain = lambda text: [re.split(r"[<>=;\[]", item)[0] for item in text.split()]
    return {key.removesuffix("requirements").rstrip("_"): plain(value) for key, value in settings().items() if key.endswith("requirements")}


def imports(source):
    for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def imported():
    sources = [p.read_text(encoding="utf-8") for folder in ("gears_nb", "tests") for p in (ROOT / folder).rglob("*.py")] + [(ROOT / "setup.py").read_text()]
    for path in NOTEBOOKS:
        sources += ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    own = {p.stem for p in (ROOT / "tests").glob("*.py")} | {"gears_nb"}
    return {name for source in sources for name in imports(source)} - set(sys.stdlib_module_names) - own


def test_every_package_is_needed_and_every_need_is_declared():
    names = {name for group in declared().values() for name in group}
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}
    found = imported()
    idle = {name for name in names if IMPORTED_AS.get(name, name.replace("-", "_")) not in found} - set(NOT_IMPORTED)
    assert not idle, f"in settings.ini, imported nowhere: {idle}"
    missing = found - modules - set(COMES_ALONG) - OF_THEIR_OWN
    assert not missing, f"imported, not in settings.ini: {missing}"


def test_packages_the_project_builds_on_stay():
    names = {name for group in declared().values() for name in group}
    assert {"jupyterlab", "nbdev", "torch", "scanpy", "anndata", "geomloss", "pot", "plotly", "papermill", "anywidget", "igraph"} <= names


def test_every_package_is_pinned():
    """constraints.txt holds everything that `make install` brings, dependencies of dependencies too."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from gears_nb.runs.doctor import pinned_versions
    pins = {canonicalize_name(name) for name in pinned_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))}
    brought = [group for extra, group in declared().items() if extra != "peers"]  # outside references, which nobody needs
    waiting, seen = [(name, frozenset()) for group in brought for name in group], set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            wanted = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # an extra that is not installed here
            wanted = []
        waiting += [(r.name, frozenset(r.extras)) for r in wanted if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras or {""})]
    assert not {canonicalize_name(name) for name, _ in seen} - pins
    assert version("torch").split("+")[0] == "2.13.0" or "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


CORE = '''
import sys

class Without:
    """A finder that does not know the blocked packages."""
    blocked = set(sys.argv[1].split(","))

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.blocked else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
from pathlib import Path
from gears_nb.data.registry import load_protocol
from gears_nb.runs.cli import main
task, folder = load_protocol("tiny", 0), Path(sys.argv[2])
slides = [str(folder / f"slide{i}.h5ad") for i in range(len(task.reference))]
for path, slide in zip(slides, task.reference):
    slide.write_h5ad(path)
cells, out = str(folder / "cells.h5ad"), str(folder / "out.h5ad")
task.query.write_h5ad(cells)
steps = [["reconstruct", "--slides", *slides, "--cells", cells, "--out", out, "--report", str(folder / "out.html"), "--profile", "smoke", "--quiet"],
         ["fit", "--slides", *slides, "--model", str(folder / "model"), "--profile", "smoke", "--quiet"], ["evaluate", out, cells], ["--help"]]
for step in steps:
    try:
        code = main(step)
    except SystemExit as end:
        code = end.code
    assert not code, (step, code)
'''


def test_core_works_without_the_extras(tmp_path):
    """reconstruct with its report, fit and evaluate where no package of any extra can be imported."""
    groups = declared()
    extra = {name for key, group in groups.items() if key for name in group} - set(groups[""]) - {"setuptools", "joblib", "cloudpickle"}
    blocked = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in extra} | {"IPython", "jupyter_client", "traitlets"}
    done = python(CORE, ",".join(sorted(blocked)), str(tmp_path))
    assert done.returncode == 0, done.stderr[-1500:]
    assert (tmp_path / "out.h5ad").is_file() and (tmp_path / "out.html").is_file() and "spearman" in done.stdout


# ---------------------------------------------------------------- links

def prose(text):
    """Markdown without code, where brackets mean something else."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1", "", text))


def links(text):
    text = prose(text)
    yield from (target for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text))
    yield from re.findall(r"(?:href|src)=[\"']([^\"']+)[\"']", text)


def markdown(path):
    if path.suffix == ".ipynb":
        return "\n\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    return path.read_text(encoding="utf-8")


def anchors(path):
    """The ids of the headings, as GitHub writes them and as Jupyter does."""
    found = set()
    for title in re.findall(r"(?m)^#{1,6}\s+(.+?)\s*#*$", re.sub(r"(?ms)^```.*?^```", "", markdown(path))):
        title = re.sub(r"[*`]|\[|\]\([^)]*\)", "", title)
        found |= {title.replace(" ", "-"), re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")}
    return found | set(re.findall(r"(?:id|name)=[\"']([^\"']+)[\"']", markdown(path)))


def broken(path):
    out = []
    for target in links(markdown(path)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target, re.I):
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        if not file.exists():
            out.append(f"{target}: no such file")
        elif anchor and file.suffix in (".md", ".ipynb") and anchor not in anchors(file):
            out.append(f"{target}: no such heading")
    return out


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert not broken(path)


def test_the_link_test_bites(tmp_path):
    (tmp_path / "b.md").write_text("# A title, `here`\n")
    page = tmp_path / "a.md"
    page.write_text("[x](b.md) [y](b.md#a-title-here) ![z](<c.png>) [w](b.md#none) [v](https://example.org) `[u](no.md)` [t](#s)\n## s\n<a href='gone.html'>g</a>")
    assert broken(page) == ["c.png: no such file", "b.md#none: no such heading", "gone.html: no such file"]


# ---------------------------------------------------------------- the front page

def test_front_page_is_short_and_starts_with_the_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    first = "\n".join(lines[:12])
    assert "pip install" in first and "make " in first
    text = "\n".join(lines)
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 1 and (ROOT / pictures[0]).stat().st_size < 300_000
    assert "## What it does not do" in text and "nbs/runs/10_tables.ipynb" in text


def test_front_table_shows_every_task_and_losses_first():
    from gears_nb.benchmark.compare import mean_rank, tidy
    from gears_nb.runs.tables import contest_rows, standings
    rows = contest_rows()
    ranks, means = mean_rank(rows), tidy(rows).set_index(["task", "method"])["spearman"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if re.match(r"\| \w+ \|.*\d\.\d", line)]
    assert {line[0] for line in table} == set(ranks) and all(len(line) == 5 for line in table)
    lost = []
    for task, ours, other, rank, other_rank in table:
        rivals = [m for m in ranks[task] if m != "gears"]
        assert float(ours.strip("*")) == round(means[task, "gears"], 2) and float(rank.strip("*")) == round(ranks[task]["gears"], 1)
        assert float(other.split()[0].strip("*")) == round(max(means[task, m] for m in rivals), 2)
        assert float(other_rank.split()[0].strip("*")) == round(min(ranks[task][m] for m in rivals), 1)
        lost.append(means[task, "gears"] < max(means[task, m] for m in rivals) or ranks[task]["gears"] > min(ranks[task][m] for m in rivals))
    assert lost == sorted(lost, reverse=True) and lost == [s.lead < 0 for s in standings(rows)]


def test_page_of_tables_is_of_the_rows_on_file():
    from gears_nb.runs.tables import contest_table, distance_table, standing_table
    outputs = [o for c in json.loads((NBS / "runs/10_tables.ipynb").read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    shown = ["".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})]
    assert shown == [standing_table(), contest_table(), distance_table()], "run `make readme`"


# ---------------------------------------------------------------- what people expect beside the code

def test_citation_and_version_agree():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == settings()["version"] == gears_nb.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(cited) and cited["authors"] == [{"name": settings()["author"]}]
    assert f"## [{gears_nb.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflow_runs_the_whole_check_on_three_pythons():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12"]
    assert any("bash .ci/run" in step.get("run", "") for step in job["steps"])


def test_hooks_name_tools_that_are_there():
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["nbdev-clean", "nbdev-export", "ruff"]
    for hook in hooks:
        tool = hook["entry"].split()[0].rsplit("/", 1)[1]
        assert (Path(sys.executable).parent / tool).is_file() or shutil.which(tool), tool


@pytest.mark.parametrize("chapter, name", [("saturn", "Saturn"), ("perturb", "Perturb"), ("cycle", "CycleAE")])
def test_a_chapter_has_a_front_door(chapter, name):
    """`from gears_nb.perturb import Perturb` works, another name fails as it should, and the door is light: torch comes when it is opened."""
    code = f"import sys, gears_nb.{chapter} as chapter; assert 'torch' not in sys.modules; print(chapter.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == name, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Sturn'"):
        assert importlib.import_module(f"gears_nb.{chapter}").Sturn
