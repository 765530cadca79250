"""Every notebook is a test: how one is run. Three files share them, so that two processes can, and end together."""
import os
import sys
from pathlib import Path

from forks import ended, forked, start  # noqa: F401

NBS = Path(__file__).resolve().parents[1] / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
LOWER = ("core", "geometry", "data", "lab", "encoder", "targets", "models", "structure")
UPPER = ("generators", "alignment", "saturn", "perturb", "cycle")  # the other chapters, and pages of no chapter, are the third file
name = lambda path: path.relative_to(NBS).as_posix()


def draw_once():
    """A figure that a page shows is drawn once. IPython draws it three times (when the cell ends, for its borders, and with
    four times the pixels of a screen), which took a third of the time of a page with figures; nobody sees these."""
    from IPython.core import pylabtools
    from matplotlib import pyplot

    pyplot.draw_all = lambda force=False: None
    small = lambda fig, base64=False: pylabtools.print_figure(fig, "png", bbox_inches=None, base64=base64)
    pylabtools.retina_figure = lambda fig, base64=False, **_: (small(fig, base64), {}) if fig.axes or fig.lines else None


KEPT = []  # what ends with the process of a page


def train_once():
    """A model that one page of this run of the tests has trained is found by the next page that asks for the same: same slides, settings
    and code, as `Gears.fit` finds what another run is keeping. Ten pages fit the smallest tissue in the smallest size."""
    from gears_nb.reconstruct import facade

    if folder := os.environ.get("GEARS_TEST_TRAINED"):  # of conftest.py; the cache itself would hand models to the next run of the tests
        facade.cache_root = lambda: Path(folder)
        KEPT.append(facade.keep_training())
        KEPT[0].__enter__()


def run_alone(path):
    """Run a notebook in this process, which ends with it: exit status 0 if it passed."""
    import matplotlib
    from nbdev.test import test_nb as run_page

    matplotlib.use("Agg")
    draw_once()
    train_once()
    os.cpu_count = lambda: 1  # experiments open a process pool for every core
    os.chdir(path.parent)
    passed, _ = run_page(path, skip_flags=["slow", "gpu", "notest"], basepath=NBS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not passed)


def passes(path):
    """Run a notebook in a process that keeps what it changes (registries, figure style) to itself, without importing torch 150 times."""
    code = ended(start(run_alone, path), seconds=180)
    assert code is not None, f"{name(path)} took more than 180 s, notebooks should take less than 20"
    assert code == 0, f"{name(path)} failed; its error is printed above"
