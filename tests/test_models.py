"""The contract of models: one suite over the catalogue, several optimisers, names, and a stranger's model in a notebook outside the package."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from book import run_alone
from forks import ended, forked, start

from gears_nb.core.config import at_profile
from gears_nb.core.errors import InputError
from gears_nb.models.batches import Run
from gears_nb.models.catalogue import BUILT_IN, MODELS, addresses, model_class
from gears_nb.models.conformance import conform, toy_slides
from gears_nb.models.fit import fit_member
from gears_nb.models.trace import AttentionTrace
from gears_nb.reconstruct.facade import Gears
from gears_nb.reconstruct.settings import profile
from gears_nb.runs.cli import main
from gears_nb.targets.settings import TargetConfig

SMOKE = profile("smoke", **{"structure.miniset": 48, "structure.batch": 2, "structure.minisets_per_epoch": 4, "structure.guess_epochs": 2, "structure.k_cand": 12,
                            "structure.epochs": 2, "progress": False})


def settings(name, **more):
    return profile("smoke", **{"structure.model": name, "structure.miniset": 48, "structure.batch": 2, "structure.minisets_per_epoch": 4, "structure.guess_epochs": 2,
                               "structure.gate_pretrain": 2, "structure.k_cand": 12, "structure.epochs": 2, "progress": False, **more})


FEWER_LEVELS = {"gears-v2": {"steps": 4}, "layout-sde": {"steps": 8}}  # of samplers that take up to a minute for the suite; all other settings are the defaults


def slides():
    made = toy_slides()
    return [s.H.numpy() for s in made], [s.coords.numpy() for s in made]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_model_meets_the_contract(name):
    kind, fewer = model_class(name), FEWER_LEVELS.get(name)
    conform(kind, fewer and Run(at_profile(kind.Training, "smoke", miniset=48, batch=2, progress=False, model={"name": name, "settings": fewer}), TargetConfig()))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_model_is_trained_killed_resumed_saved_and_loaded(name, tmp_path):
    "All stages run; stopped before the last one it ends with the same weights; its weights are its state; sealed it still answers."
    H, coords = slides()
    c = settings(name)
    whole, histories = fit_member(H, coords, c.structure, c.targets, checkpoints=tmp_path / "a")
    run = Run(c.structure, c.targets)
    assert list(histories) == [s.name for s in whole.stages(run) if s.settings.epochs] and not whole.training

    def stop(model):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fit_member(H, coords, c.structure, c.targets, checkpoints=tmp_path / "b", prepare=stop)
    resumed, _ = fit_member(H, coords, c.structure, c.targets, checkpoints=tmp_path / "b")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    again = model_class(name).build(H[0].shape[1], run)
    again.load_state_dict(whole.state_dict())
    rng = lambda: torch.Generator().manual_seed(3)
    query = torch.from_numpy(H[0][None])
    a, b = whole.seal()(query, None, rng()), again.eval().seal()(query, None, rng())
    assert torch.equal(a.X, b.X)


@pytest.mark.parametrize("name", sorted(name for name, address in BUILT_IN.items() if address.startswith("gears_nb.structure.")))
def test_what_a_rung_tells_is_a_record_and_the_oracle_is_refused(name):
    torch.manual_seed(0)
    model = model_class(name).build(16, Run(SMOKE.structure, SMOKE.targets)).eval().seal()
    H = torch.randn(2, 40, 16)
    told = model.explain(H)
    assert [type(t) for t in told] == [AttentionTrace] * 2 and np.array_equal(told[0].x[-1], model(H).X[0].detach().numpy())
    with pytest.raises(InputError, match="oracle=True"):
        model(H, edges=torch.ones(2, 40, 40, dtype=torch.bool))


def test_a_generator_has_nothing_to_tell_and_latent_places():
    torch.manual_seed(0)
    model = model_class("small-vae").build(16, Run(SMOKE.structure, SMOKE.targets)).eval()
    out = model(torch.randn(1, 30, 16), None, torch.Generator().manual_seed(0))
    assert model.explain(torch.randn(1, 30, 16)) is None and out.V.shape == (1, 30, 8)
    assert torch.allclose(out.operator.sum(-1), torch.ones(1, 30)) and out.operator.diagonal(dim1=1, dim2=2).abs().max() < 1e-30


def test_own_settings_are_checked():
    run = lambda name, **own: Run(settings(name, **{f"structure.model.settings.{k}": v for k, v in own.items()}).structure, SMOKE.targets)
    assert model_class("small-vae").build(16, run("small-vae", latent=3)).config.latent == 3
    with pytest.raises(InputError, match="structure.model.settings.latnt"):
        model_class("small-vae").build(16, run("small-vae", latnt=3))
    with pytest.raises(InputError, match=r"structure.model.settings.latent: is 0, outside \[1, inf\]"):
        model_class("small-vae").build(16, run("small-vae", latent=0))
    built = model_class("v2").build(16, run("v2", eta="learned")).rung
    assert (built.eta, built.shared) == ("learned", False)  # a change to the choices of v2, not to those of the default rung
    with pytest.raises(InputError, match="structure.model.settings.eta"):
        model_class("v2").build(16, run("v2", eta="fast"))


def test_gears_takes_a_model_by_name_and_says_at_once_what_is_wrong():
    assert Gears(SMOKE, model="egnn").config.structure.model.name == "egnn" and Gears(SMOKE).config == SMOKE
    own = Gears(SMOKE, model={"name": "small-vae", "settings": {"latent": 3}}).config.structure.model
    assert (own.name, own.settings) == ("small-vae", {"latent": 3})
    for model, told in (("d8", "unknown model 'd8'"), ({"name": "d7", "settings": {"etta": "fixed"}}, "did you mean 'eta'"), (3, "structure.model: is 3")):
        with pytest.raises(InputError, match=told):
            Gears(SMOKE, model=model)


def test_names_are_lazy_and_do_not_depend_on_imports():
    code = ("import sys; from gears_nb.models.catalogue import addresses, model_class; assert not {'gears_nb.structure.rungs', 'gears_nb.generators.small_vae'} & set(sys.modules); "
            "assert 'd7' in addresses(); print(*(model_class(name).__name__ for name in ('d7', 'small-vae')))\n"
            "import pkgutil, importlib, gears_nb; from gears_nb.models import catalogue; before = catalogue.addresses()\n"
            "[importlib.import_module(m.name) for c in ('encoder', 'targets', 'models', 'structure', 'generators', 'reconstruct') "
            "for m in pkgutil.iter_modules([f'{gears_nb.__path__[0]}/{c}'], f'gears_nb.{c}.')]; "
            "assert catalogue.addresses() == before and not catalogue._given; print(len(before))")
    *names, count = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert names == ["D7", "SmallVAE"] and int(count) >= len(BUILT_IN)
    assert set(BUILT_IN) <= set(MODELS) == set(addresses())
    with pytest.raises(InputError, match="did you mean 'topo'"):
        model_class("topoo")


def test_the_command_line_lists_models(capsys):
    assert main(["list", "models"]) == 0
    told = capsys.readouterr().out
    assert "d7" in told and "small-vae" in told and "gears_nb.structure.rungs:D7" in told


def test_an_entry_point_is_a_name(tmp_path, monkeypatch):
    "An installed package announces a model; nothing of ours is touched."
    (tmp_path / "theirs.py").write_text("from gears_nb.models.contract import GeometryModel\nclass Theirs(GeometryModel):\n    pass\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gears_nb.models]\ntheir-model = theirs:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_class("their-model").__name__ == "Theirs" and model_class("theirs:Theirs") is model_class("their-model")


NOTEBOOK = ['''
import numpy as np, torch
from torch import nn
from dataclasses import dataclass
from gears_nb import Gears, profile
from gears_nb.core.config import Section
from gears_nb.geometry.gauge import gauge_fix
from gears_nb.data.simulator import simulate
from gears_nb.models.catalogue import add_model
from gears_nb.models.conformance import conform
from gears_nb.models.contract import Geometry, GeometryModel
from gears_nb.models.trace import AttentionTrace
from gears_nb.targets.energy import energy
''', '''
@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    width: int = 32

class Stranger(GeometryModel):
    "Two layers, and even attention over everybody as its story."
    Config = Settings

    def __init__(self, dim_in, config):
        super().__init__(dim_in, config)
        self.net = nn.Sequential(nn.Linear(dim_in, config.width), nn.GELU(), nn.Linear(config.width, 2))

    def forward(self, H, mask=None, rng=None):
        return Geometry(gauge_fix(self.net(H), mask))

    def losses(self, H, batch, mask=None, rng=None, epoch=0):
        E = energy(self(H, mask).X, batch, form="metric")
        return {"loss": E.stress.mean() + 0.1 * E.rw.mean()}

    def explain(self, H, mask=None, truth=None, about=None, **_):
        n = H.shape[1]
        row, col = np.divmod(np.arange(n * n, dtype=np.int32), np.int32(n))
        even = np.full((1, 1, n * n), 1 / n, np.float32)
        return [AttentionTrace(row, col, even, {"qk": np.zeros_like(even)}, np.stack([x, x]), about=about or {}) for x in self(H).X.detach().numpy()]

add_model("stranger", Stranger)
conform(Stranger)
''', '''
tissue = simulate("tiny", seed=0)
*slides, query = tissue.slides
scores = {}
for name in ("stranger", "plain"):
    config = profile("smoke", progress=False, **{"structure.model": name, "structure.epochs": 4, "structure.minisets_per_epoch": 32})
    model = Gears(config).fit(slides)
    placed = model.reconstruct(query)
    from gears_nb.geometry.metrics import score
    scores[name] = score(placed.obsm["X_gears"], query.obsm["spatial"])["spearman"]
    assert model.fitted.models[0].explain(torch.from_numpy(placed.obsm["H_gears"][:50][None]).float())[0].n == 50
model.save(folder + "/plain")
print(sorted(scores), {k: round(v, 2) for k, v in scores.items()})
assert scores["stranger"] > 0.3 and scores["plain"] > 0.3
''', '''
kept = Gears(profile("smoke", progress=False, **{"structure.model": {"name": "stranger", "settings": {"width": 8}}, "structure.epochs": 1})).fit(slides)
kept.save(folder + "/stranger")
again = Gears.load(folder + "/stranger", {"progress": False}).reconstruct(query)
assert np.array_equal(again.obsm["X_gears"], kept.reconstruct(query).obsm["X_gears"])
from gears_nb.data.io import write_h5ad
from gears_nb.attention.explore import what_to_explore
write_h5ad(again, folder + "/placed.h5ad")
views = what_to_explore(folder + "/placed.h5ad", folder + "/stranger")
print(list(views))
assert "attention" in views
''']


@forked
def test_a_stranger_adds_a_model_in_one_notebook(tmp_path, monkeypatch):
    "Defined, trained, reconstructed, traced, saved, explored and compared with `plain`, outside the package; no file of the repository is touched."
    root = Path(__file__).resolve().parents[1]
    before = {p: p.stat().st_mtime_ns for p in (root / "gears_nb").rglob("*.py")}
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"folder = {str(tmp_path)!r}"), *map(nbformat.v4.new_code_cell, NOTEBOOK)])
    book.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(book, tmp_path / "stranger.ipynb")
    monkeypatch.setenv("GEARS_CACHE", str(tmp_path / "cache"))
    assert ended(start(run_alone, tmp_path / "stranger.ipynb"), seconds=170) == 0, "its error is printed above"
    assert {p: p.stat().st_mtime_ns for p in (root / "gears_nb").rglob("*.py")} == before
    assert json.loads((tmp_path / "stranger" / "gears.json").read_text())["meta"]["config"]["structure"]["model"] == {"name": "stranger", "settings": {"width": 8}}
