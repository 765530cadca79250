"""The check-up of a model: rules that decide, faults that are found, names that do not exist. Its notebook shows a fault for every item and is run with all others."""
import contextlib
import dataclasses
import io
import json
import math

import pytest
import torch
from book import NBS
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.lab.judge import RELATIONS
from gears_nb.lab.runner import RunError, find, parameters_of, run
from gears_nb.models.batches import EmbeddedSlide
from gears_nb.targets.builder import GeoTargets, build_targets

NOTEBOOK = NBS / "reconstruct" / "18_model_checkup.ipynb"


@pytest.fixture(scope="module")
def desk():
    """What the notebook defines, faults and all, up to the run; for the smallest model."""
    names = {"__name__": "checkup"}
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if source.startswith("## The run"):
                break
            if cell["cell_type"] == "code" and not source.startswith("on_file"):
                exec(compile(source, "checkup", "exec"), names)
                if "parameters" in cell["metadata"].get("tags", []):
                    names["model"] = "gears_nb.structure.rungs:PLAIN"
    return names


def test_it_is_found_by_its_name():
    book = find("model_checkup")
    assert book.path == NOTEBOOK
    assert {name: p.default for name, p in parameters_of(book).items()} == {"profile": "smoke", "seed": 0, "model": "", "data": "", "out": ""}


def test_an_unknown_model_ends_in_one_line(tmp_path):
    with pytest.raises(RunError, match="did you mean 'gears-v2'") as stop:
        run("model_checkup", "smoke", {"model": "gears_v2"}, out=tmp_path)
    assert stop.value.by_input and "\n" not in str(stop.value)


def test_every_item_has_a_rule_and_was_seen_to_fail(desk):
    items = desk["ITEMS"]
    assert len({i.name for i in items}) == len(items) and all(i.relation in RELATIONS and math.isfinite(i.bound) for i in items)
    assert {line["item that fails"] for line in desk["SHOWN"]} == {i.name for i in items}
    with pytest.raises(AssertionError, match="a fault that is none"):
        desk["must_fail"]("a fault that is none", "gauge", {"mean 0": 0.0, "RMS 1": 0.0}, "mean 0")


@given(st.integers(0, 18), st.floats(allow_nan=True, allow_infinity=True))
def test_an_item_passes_if_its_relation_holds(desk, which, value):
    item = desk["ITEMS"][which]
    line = desk["judged"](item, value)
    assert (line["outcome"] == "pass") == (math.isfinite(value) and RELATIONS[item.relation](value, item.bound))
    assert line["outcome"] != "not applicable" and (line["value"] is None) == (not math.isfinite(value)) and bool(line["note"]) == (not math.isfinite(value))
    skipped = desk["judged"](item, desk["Skip"]("no walks"))
    assert (skipped["outcome"], skipped["value"], skipped["note"]) == ("not applicable", None, "no walks")


def test_a_probe_that_stops_fails_all_of_its_items(desk):
    def stops():
        raise ValueError("two\nlines")
    made = desk["answered"]("use", stops)
    assert [line["outcome"] for line in made["lines"]] == ["fail"] * 3 and {line["note"] for line in made["lines"]} == {"stopped: ValueError: two lines"}
    assert made["drawn"] == {}


@dataclasses.dataclass(frozen=True)
class Wrapped:
    size: int
    inside: tuple


def test_targets_are_found_and_changed_at_any_depth(desk):
    t = build_targets(torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(0)))
    batch = (torch.zeros(2, 30, 4), Wrapped(3, ([t], None)))
    assert desk["targets_in"](batch) == [t] and desk["targets_in"]((torch.zeros(2), 1, None)) == []
    wide = desk["with_targets"](batch, lambda g: dataclasses.replace(g, sigma_local=2 * g.sigma_local))
    (changed,) = desk["targets_in"](wide)
    assert isinstance(changed, GeoTargets) and torch.equal(changed.sigma_local, 2 * t.sigma_local) and changed.knn_edges is t.knn_edges
    assert wide[0] is batch[0] and wide[1].size == 3 and desk["targets_in"](batch)[0] is t


def test_the_loss_falls_in_closed_form(desk):
    path = desk["grid_path"](steps=3, side=5, draws=2)
    assert path.shape == (3, 2, 25, 2) and torch.equal(path[-1, 0], path[-1, 1]) and not torch.equal(path[0, 0], path[0, 1])
    grid = build_targets(path[-1])
    found, falls = desk["check_loss"](path, grid, path[-1], grid, "metric")
    assert falls[0] > falls[1] > falls[2] and abs(falls[-1]) < 1e-5 and found["stress ~0 on the truth"] < 1e-9


def test_diffusion_distances_know_the_truth(desk):
    slide = EmbeddedSlide(*desk["toy"].test)
    X = slide.coords[:80].view(2, 40, 2)
    targets, turned = build_targets(X), torch.tensor([[0.0, -3.0], [3.0, 0.0]])
    assert desk["diffusion_spearman"](X @ turned + 5, targets) > 0.999
    assert abs(desk["diffusion_spearman"](X[:, torch.randperm(40, generator=torch.Generator().manual_seed(0))], targets)) < 0.2


def test_a_lesson_leaves_the_model_as_it_was(desk):
    model = desk["toy_model"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lines = desk["taught"](model, desk["H_toy"], desk["T_toy"], (1.0, 0.1), 3)
    assert len(lines) == 4 and lines[-1]["rw"] < lines[0]["rw"] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    class Silent(desk["Sound"]):
        def forward(self, H, mask=None, rng=None):
            with torch.no_grad():
                return super().forward(H, mask, rng)
    found, drawn = desk["check_lessons"](desk["toy_model"](Silent), desk["H_toy"], desk["T_toy"], 2)
    assert drawn == {} and all(isinstance(v, desk["Skip"]) for v in found.values())


def test_a_model_by_its_address(desk):
    lines = [line for group in ("targets", "gauge", "blindness", "data") for line in desk["group_row"](group)["lines"]]
    assert {line["outcome"] for line in lines} == {"pass"} and len(lines) == 8


def test_the_items_that_fail_are_named(desk):
    lines = [desk["judged"](item, -1.0) for item in desk["ITEMS"] if item.group == "targets"]
    with pytest.raises(desk["Unsound"], match=r"^d7 fails 2 of 3 items: sigma > 0 \(-1, rule: smallest bandwidth > 0\); delta > 0 \(.*\)$"):
        desk["verdict_of"]("d7", lines)
    desk["verdict_of"]("d7", lines[:1])
