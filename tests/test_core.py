"""core: errors, gauge, config, seeding, store, progress, training, style."""
from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ended, forked, start
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.linalg import orthogonal_procrustes
from torch import nn

from gears_nb.core import config as cfg
from gears_nb.core.config import TrainConfig
from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.progress import progress
from gears_nb.core.seeding import np_rng, randn, seed_everything, stream_seed, torch_rng
from gears_nb.core.store import Store, atomic_path, content_digest, write_json
from gears_nb.core.training import TrainingError, to_device, train
from gears_nb.geometry.gauge import gauge_fix, procrustes, rms
from gears_nb.reconstruct import settings

seeds = st.integers(0, 2**32 - 1)


def points(seed: int, n: int, d: int) -> np.ndarray:
    """n >= 2 distinct random points in d dimensions, with unequal axes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * rng.uniform(0.2, 3.0, size=d) + rng.normal(size=d)


def orthogonal(seed: int, d: int) -> np.ndarray:
    """A random element of O(d); half of them are reflections."""
    rng = np.random.default_rng(seed + 1)
    Q, R = np.linalg.qr(rng.normal(size=(d, d)))
    return Q * np.sign(np.diag(R))


# errors ---------------------------------------------------------------------------------------------------------------


@given(st.text(), st.text(), st.text(), st.text())
def test_an_input_error_is_always_one_line(source, field, problem, remedy):
    assert len(str(InputError(source, field, problem, remedy)).splitlines()) == 1


def test_an_input_error_survives_a_process_boundary():
    error = InputError("a.h5ad", "X", "has NaN", "remove them")
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error) and (back.source, back.remedy) == ("a.h5ad", "remove them")
    assert issubclass(InputError, ValueError) and issubclass(GearsWarning, UserWarning)


# gauge ----------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 30), st.integers(1, 4))
def test_gauge_is_centred_unit_rms_and_idempotent(seed, n, d):
    G = gauge_fix(points(seed, n, d))
    np.testing.assert_allclose(G.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(rms(G), 1, atol=1e-12)
    np.testing.assert_allclose(gauge_fix(G), G, atol=1e-12)


@given(seeds, st.integers(2, 30), st.integers(1, 4), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_gauge_ignores_translation_and_scale_and_commutes_with_rotation_and_reflection(seed, n, d, shift, factor):
    X, Q = points(seed, n, d), orthogonal(seed, d)
    np.testing.assert_allclose(gauge_fix(factor * X + shift), gauge_fix(X), atol=1e-6)
    np.testing.assert_allclose(gauge_fix(X @ Q), gauge_fix(X) @ Q, atol=1e-10)


@given(seeds, st.integers(4, 30), st.integers(2, 3))
def test_masked_gauge_is_the_gauge_of_the_subset(seed, n, d):
    X = points(seed, n, d)
    mask = np.random.default_rng(seed).random(n) < 0.5
    mask[:2] = True
    garbage = np.where(mask[:, None], X, np.nan)
    G = gauge_fix(garbage, mask)
    np.testing.assert_allclose(G[mask], gauge_fix(X[mask]), atol=1e-12)
    assert (G[~mask] == 0).all()
    np.testing.assert_allclose(rms(garbage, mask), rms(X[mask]))


@given(seeds, st.integers(2, 20))
def test_gauge_is_permutation_equivariant_and_batches_do_not_mix(seed, n):
    X, Y = points(seed, n, 2), points(seed + 1, n, 2) * 50
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_allclose(gauge_fix(X[order]), gauge_fix(X)[order], atol=1e-12)
    np.testing.assert_allclose(gauge_fix(np.stack([X, Y])), np.stack([gauge_fix(X), gauge_fix(Y)]), atol=1e-12)


def test_gauge_of_a_point_is_the_origin_with_a_finite_gradient():
    X = torch.full((5, 2), 3.0, requires_grad=True)
    out = gauge_fix(X)
    out.sum().backward()
    assert (out == 0).all() and X.grad.isfinite().all()
    assert (gauge_fix(torch.zeros(2, 3, 2), torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gauge_and_procrustes_keep_dtype(dtype):
    X = torch.randn(2, 20, 2, generator=torch_rng(0)).to(dtype)
    assert gauge_fix(X).dtype == dtype == procrustes(X, X).aligned.dtype


def test_gauge_gradient(shape):
    X = torch.tensor(shape[:8], requires_grad=True)
    assert torch.autograd.gradcheck(gauge_fix, (X,))


def test_gauge_refuses_shapes_that_do_not_fit():
    with pytest.raises(InputError, match="expected"):
        gauge_fix(np.zeros(3))
    with pytest.raises(InputError, match="one boolean per point"):
        gauge_fix(np.zeros((3, 2)), mask=np.ones(4, bool))
    with pytest.raises(InputError, match="same points"):
        procrustes(np.zeros((3, 2)), np.zeros((4, 2)))


# Procrustes -----------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(4, 30), st.integers(2, 4))
def test_procrustes_agrees_with_scipy(seed, n, d):
    X, Y = points(seed, n, d), points(seed + 7, n, d)
    Xc, Yc = X - X.mean(0), Y - Y.mean(0)
    R, nuclear = orthogonal_procrustes(Xc, Yc)
    ours = procrustes(X, Y)
    np.testing.assert_allclose(ours.rotation, R, atol=1e-8)
    np.testing.assert_allclose(ours.error, rms(Xc @ R - Yc), rtol=1e-8)
    scaled = procrustes(X, Y, scale=True)
    np.testing.assert_allclose(scaled.scale, nuclear / (Xc**2).sum(), rtol=1e-8)
    assert scaled.error <= ours.error + 1e-12


@given(seeds, st.integers(3, 30), st.integers(2, 3), st.floats(0.1, 10), st.booleans())
def test_procrustes_undoes_every_similarity(seed, n, d, factor, scale):
    X, Q = points(seed, n, d), orthogonal(seed, d)
    Y = (factor if scale else 1.0) * X @ Q + 4.0
    fit = procrustes(X, Y, scale=scale)
    np.testing.assert_allclose(fit.aligned, Y, atol=1e-7)
    np.testing.assert_allclose(fit.scale * X @ fit.rotation + fit.translation, fit.aligned, atol=1e-7)
    np.testing.assert_allclose(fit.rotation @ fit.rotation.T, np.eye(d), atol=1e-10)
    assert fit.error < 1e-6


def test_procrustes_no_orthogonal_map_does_better(shape, rng):
    Y = rng.normal(size=shape.shape)
    best = procrustes(shape, Y).error
    Xc, Yc = shape - shape.mean(0), Y - Y.mean(0)
    angles = np.linspace(0, 2 * np.pi, 361)
    turns = np.stack([[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in angles])
    every = np.concatenate([turns, turns * [1, -1]])
    assert best <= rms(Xc @ every - Yc).min() + 1e-12


def test_procrustes_batches_and_masks_equal_single_runs(rng):
    X, Y = rng.normal(size=(3, 10, 2)), rng.normal(size=(10, 2))
    mask = rng.random((3, 10)) < 0.6
    mask[:, :3] = True
    batch = procrustes(torch.tensor(np.where(mask[..., None], X, np.nan)), torch.tensor(Y), torch.tensor(mask), scale=True)
    for b in range(3):
        one = procrustes(X[b][mask[b]], Y[mask[b]], scale=True)
        np.testing.assert_allclose(batch.aligned[b][mask[b]], one.aligned, atol=1e-10)
        np.testing.assert_allclose(batch.error[b], one.error, atol=1e-10)


def test_procrustes_error_gradient_is_exact_also_for_a_round_shape():
    t = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    circle = torch.stack([t.cos(), t.sin()], -1)
    target = circle + 0.1 * torch.randn(8, 2, dtype=torch.float64, generator=torch_rng(0))
    assert torch.autograd.gradcheck(lambda X: procrustes(X, target).error, (circle.requires_grad_(),))


# config ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(cfg.PROFILES))
def test_profiles_survive_json(name):
    config = settings.profile(name)
    assert config.profile == name
    back = cfg.from_dict(json.loads(json.dumps(cfg.to_dict(config))), settings.GearsConfig)
    assert back == config and cfg.digest(back) == cfg.digest(config)


def test_configs_are_frozen_and_profiles_differ():
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.profile("smoke").seed = 3
    assert len({cfg.digest(settings.profile(name)) for name in cfg.PROFILES}) == len(cfg.PROFILES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure.epoch": 3}, "did you mean 'structure.epochs'?"),
        ({"strcture.epochs": 3}, "did you mean 'structure.epochs'?"),
        ({"structure.train": 3}, "not a known setting"),
        ({"epochs.structure": 3}, "not a known setting"),
        ({"structure.epochs": 2.5}, "not of type int"),
        ({"structure.epochs": True}, "not of type int"),
        ({"structure.heads": "four"}, "structure.heads"),
        ({"encoder.train.lr": float("nan")}, "encoder.train.lr"),
        ({"encoder.lr": -1.0}, "outside"),
        ({"encoder.dropout": 1.5}, "outside [0, 1]"),
        ({"targets.stress": "cubic"}, "choose one of"),
        ({"progress": "no"}, "not of type bool"),
        ({"encoder.metric.contexts": (0, -1)}, "encoder.metric.contexts: is -1, outside"),
        ({"structure.patience": "soon"}, "not of type int | None"),
        ({"structure.model": 7}, "structure.model: is 7"),
        ({"structure.model": {"nam": "d7"}}, "did you mean 'name'?"),
        ({"structure.model.settings": 3}, "structure.model.settings: is 3"),
        ({"structure.model.sttings.width": 3}, "not a known setting"),
        ({"seed.width": 3}, "not a known setting"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError) as caught:
        settings.profile("toy", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_setting_can_be_overridden_by_its_own_path_and_changes_the_digest():
    base = settings.profile("smoke")
    for path in cfg.paths(settings.GearsConfig):
        *parents, last = path.split(".")
        node = base
        for name in parents:
            node = getattr(node, name)
        same = cfg.override(base, {path: getattr(node, last)})
        assert same == base, path
    changes = {"encoder.width": [8], "targets.k": 9, "seed": 1, "device": "cpu", "min_genes": 3, "structure.model": "plain", "structure.model.settings.eta": "fixed"}
    for key, value in changes.items():
        assert cfg.digest(cfg.override(base, {key: value})) != cfg.digest(base), key


def test_unknown_and_missing_fields_are_refused():
    tree, read = cfg.to_dict(settings.profile("toy")), lambda data: cfg.from_dict(data, settings.GearsConfig)
    with pytest.raises(InputError, match="structure.hops"):
        read({**tree, "structure": {**tree["structure"], "hops": 3}})
    with pytest.raises(InputError, match="encoder.n_hvg: is missing"):
        read({**tree, "encoder": {k: v for k, v in tree["encoder"].items() if k != "n_hvg"}})
    with pytest.raises(InputError, match="patches: is missing"):
        read({k: v for k, v in tree.items() if k != "patches"})
    with pytest.raises(InputError, match="profile"):
        settings.profile("huge")


def test_command_line_overrides():
    parsed = cfg.parse_overrides(["seed=3", "encoder.width=[8, 20]", "structure.patience=None", "device=cpu"])
    config = settings.profile("toy", **parsed)
    assert (config.seed, config.encoder.width, config.structure.train.patience) == (3, (8, 20), None)
    assert config.encoder.train.device == config.structure.train.device == "cpu"
    with pytest.raises(InputError, match="key=value"):
        cfg.parse_overrides(["seed"])


def test_a_value_lives_in_one_place():
    for key, row in settings.TABLE.items():
        assert len(row) == len(cfg.PROFILES)
        assert len(set(map(repr, row))) > 1, f"{key} is the same in every profile: make it a default"


def test_every_number_of_every_section_says_its_range():
    "A field without a range would take a negative width."
    free = {path for path, hint in cfg.paths(settings.GearsConfig).items()
            if {int, float} & {hint, *typing.get_args(hint)} and typing.get_origin(hint) is not typing.Annotated}
    assert not free


def test_overrides_leave_the_settings_they_start_from_alone():
    base = settings.profile("smoke", **{"structure.model": {"name": "small-vae", "settings": {"latent": 3}}})
    changed = cfg.override(base, {"structure.model.settings.latent": 5})
    assert (base.structure.model.settings, changed.structure.model.settings) == ({"latent": 3}, {"latent": 5})
    assert cfg.override(base, {"structure.model": "d7"}).structure.model.settings == {}


def test_the_command_line_names_a_model_and_its_settings():
    parsed = cfg.parse_overrides(["structure.model=small-vae", "structure.model.settings.latent=3"])
    model = settings.profile("smoke", **parsed).structure.model
    assert (model.name, model.settings) == ("small-vae", {"latent": 3})


def test_settings_of_a_training_are_those_of_a_run_without_the_layout():
    from gears_nb.structure.settings import FitConfig
    from gears_nb.structure.settings import profile as at
    run, fit = settings.profile("toy", seed=2), at("toy", seed=2)
    assert isinstance(run, FitConfig) and settings.training_digest(run) == settings.training_digest(fit)
    assert set(cfg.to_dict(run)) - set(cfg.to_dict(fit)) == {"patches", "solve"}
    shaping = {"seed": 3, "counts": False, "encoder.kind": "network", "targets.k": 9, "structure.beta": 1.0, "structure.model": "plain"}
    assert all(settings.training_digest(cfg.override(run, {k: v})) != settings.training_digest(run) for k, v in shaping.items())
    assert settings.training_digest(cfg.override(run, {"patches.overlap": 4, "solve.even": 0, "progress": False})) == settings.training_digest(run)


# seeding --------------------------------------------------------------------------------------------------------------


@given(seeds, st.lists(st.one_of(st.text(), st.integers()), max_size=3), st.lists(st.one_of(st.text(), st.integers()), max_size=3))
def test_streams_are_a_function_of_seed_and_names(seed, a, b):
    assert stream_seed(seed, *a) == stream_seed(seed, *a)
    assert (stream_seed(seed, *a) == stream_seed(seed, *b)) == (a == b)


def test_generators_repeat_and_do_not_touch_the_global_state():
    seed_everything(0)
    before = torch.random.get_rng_state()
    first = randn(torch_rng(5, "a"), 3)
    assert torch.equal(first, randn(torch_rng(5, "a"), 3)) and torch.equal(before, torch.random.get_rng_state())
    assert (np_rng(5, "a").random(3) == np_rng(5, "a").random(3)).all()
    assert randn(torch_rng(0), 2, like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


# store ----------------------------------------------------------------------------------------------------------------


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "deep" / "out.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"a": 1} and os.listdir(target.parent) == ["out.json"]


def test_unwritable_places_and_nan_in_json_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), atomic_path(tmp_path / "file" / "out.txt"):
        pass
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == ["file"]


@given(seeds)
def test_digests_of_sparse_matrices_do_not_depend_on_their_history(seed):
    X = sparse.random(12, 7, 0.4, random_state=np.random.default_rng(seed), format="coo")
    order = np.random.default_rng(seed).permutation(X.nnz)
    shuffled = sparse.coo_matrix((X.data[order], (X.row[order], X.col[order])), shape=X.shape)
    forms = [X.tocsr(), X.tocsc(), sparse.csr_array(X), shuffled]
    assert len({content_digest(form) for form in forms}) == 1
    changed = X.tocsr()
    changed.data = changed.data + 1e-9
    assert content_digest(changed) != content_digest(X)


def test_digests_tell_contents_apart():
    import anndata as ad
    import pandas as pd

    A = np.arange(6.0).reshape(2, 3)
    slide = ad.AnnData(A, obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["x", "y", "z"]))
    moved = slide.copy()
    moved.obsm["spatial"] = np.zeros((2, 2))
    renamed = slide.copy()
    renamed.obs_names = ["a", "c"]
    things = [A, A.T, A[:, ::-1], A.astype("f4"), {"a": A}, [A], [A, A], "A", b"A", 1, 1.0, True, None, slide, moved, renamed, settings.profile("toy")]
    assert len({content_digest(t) for t in things}) == len(things)
    assert content_digest(slide) == content_digest(slide.copy())
    assert content_digest(torch.tensor(A)) == content_digest(A) == content_digest(np.asfortranarray(A))
    assert content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="cannot digest"):
        content_digest({1, 2})


def test_store_round_trip_and_replacement(tmp_path):
    store = Store(tmp_path)
    W = torch.randn(3, 4, generator=torch_rng(0))
    store.save("a/b", {"w": W, "tied": W, "t": W.T, "i": np.arange(3)}, {"note": "x", "n": 1})
    tensors, meta = store.load("a/b")
    assert torch.equal(tensors["t"], W.T) and tensors["i"].dtype == torch.int64 and meta == {"note": "x", "n": 1}
    for n in range(3):
        store.save("a/b", {"w": W + n}, {"n": n})
    assert store.load("a/b")[1] == {"n": 2} and len(os.listdir(tmp_path / "a")) == 2
    assert store.has("a/b") and not store.has("a/c")


@pytest.mark.parametrize("key", ["../up", "/abs", "", "a//b", ".hidden", "a b", "a/../b"])
def test_store_refuses_keys_that_are_paths(tmp_path, key):
    with pytest.raises(InputError, match="plain name"):
        Store(tmp_path).has(key)


def test_a_crash_before_the_commit_leaves_the_old_artifact(tmp_path, monkeypatch):
    from gears_nb.core import store as module

    store = Store(tmp_path)
    store.save("model", {"w": torch.zeros(2)}, {"epoch": 1})

    def crash(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", crash)
        with pytest.raises(OSError, match="no space"):
            store.save("model", {"w": torch.ones(2)}, {"epoch": 2})
    tensors, meta = store.load("model")
    assert meta == {"epoch": 1} and (tensors["w"] == 0).all()
    store.save("model", {"w": torch.full((2,), 3.0)}, {"epoch": 3})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "record"])
def test_damaged_artifacts_are_refused(tmp_path, damage):
    store = Store(tmp_path)
    record = store.save("m", {"w": torch.ones(8)})
    data = next(tmp_path.glob("*.safetensors"))
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    {
        "flip": lambda: data.write_bytes(raw),
        "truncate": lambda: data.write_bytes(raw[:20]),
        "remove": data.unlink,
        "record": lambda: record.write_text("[]"),
    }[damage]()
    with pytest.raises(InputError, match="is damaged"):
        store.load("m")


# progress -------------------------------------------------------------------------------------------------------------


def test_progress_passes_items_through_and_can_be_silent(capsys):
    assert list(progress(range(5), enabled=False)) == list(range(5)) and capsys.readouterr().err == ""
    assert list(progress(iter("abc"), total=3, desc="letters")) == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert "letters: 100%" in shown.err and "left" in shown.err and shown.out == ""


# training -------------------------------------------------------------------------------------------------------------

QUIET = TrainConfig(epochs=6, lr=0.05, device="cpu", progress=False)


def job(folder: str | Path | None, kill_at: int | None = None, elsewhere: int = 0):
    """Train a small net with dropout and noise, validated; optionally die in the middle of epoch `kill_at`.

    `elsewhere` is the state other code has left the global generator in; it must not matter.
    """
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
    torch.manual_seed(elsewhere)
    X = randn(torch_rng(0, "X"), 32, 3)
    y = X.sum(1, keepdim=True)
    calls: list[int] = []

    def shuffled(epoch, rng):
        return [(X[i], y[i]) for i in torch.randperm(32, generator=rng).split(8)]

    def loss_fn(module, batch, epoch, rng):
        calls.append(epoch)
        if kill_at is not None and calls.count(kill_at) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        x = batch[0] + 0.1 * randn(rng, *batch[0].shape, like=batch[0])
        return {"loss": (module(x) - batch[1]).square().mean()}

    history = train(
        net, shuffled, loss_fn, QUIET, seed=4, name="job", checkpoint=folder and Path(folder) / "job",
        validate=lambda m: (m(X) - y).square().mean(),
    )  # fmt: skip
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    return history, content_digest(net.state_dict(), rows, history.best_epoch, history.best_value)


def batches(epoch, rng):
    x = torch.randn(12, 1, generator=rng)
    return [(x[i], 2 * x[i] - 1) for i in torch.arange(12).split(4)]


def squared(module, batch, epoch, rng):
    return {"loss": (module(batch[0]) - batch[1]).square().mean()}


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


@forked
@pytest.mark.parametrize("kill_at", [0, 3])
def test_kill_minus_nine_then_the_same_command_gives_the_same_numbers(tmp_path, kill_at):
    assert ended(start(job, tmp_path, kill_at)) == -signal.SIGKILL
    assert (tmp_path / "job.log.jsonl").read_text().count("\n") == kill_at
    history, digest = job(tmp_path, elsewhere=99)
    assert history.resumed_from == kill_at
    assert digest == job(None)[1]
    assert [json.loads(row)["epoch"] for row in (tmp_path / "job.log.jsonl").read_text().splitlines()] == list(range(6))


def test_a_finished_run_is_loaded_and_not_trained(tmp_path):
    first, digest = job(tmp_path)
    again, same = job(tmp_path)
    assert digest == same and again.resumed_from == 6 and again.rows == first.rows


def test_training_depends_on_the_seed_and_leaves_global_randomness_alone():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    net = nn.Linear(1, 1)
    torch.manual_seed(9)
    train(net, batches, squared, QUIET)
    assert torch.equal(torch.rand(3), expected)
    nets = [line() for _ in range(3)]
    for module, seed in zip(nets, (0, 0, 1)):
        train(module, batches, squared, QUIET, seed=seed)
    assert torch.equal(nets[0].weight, nets[1].weight) and not torch.equal(nets[0].weight, nets[2].weight)


def test_every_epoch_has_its_own_streams():
    drawn: dict[str, list[float]] = {"batches": [], "loss": [], "global": []}

    def one_batch(epoch, rng):
        drawn["batches"].append(torch.rand(1, generator=rng).item())
        return [torch.ones(1, 1)]

    def loss_fn(module, batch, epoch, rng):
        drawn["loss"].append(torch.rand(1, generator=rng).item())
        drawn["global"].append(torch.rand(1).item())
        return {"loss": module(batch).sum()}

    train(line(), one_batch, loss_fn, QUIET)
    assert len({value for values in drawn.values() for value in values}) == 3 * QUIET.epochs


def test_ctrl_c_loses_at_most_one_epoch_and_is_passed_on(tmp_path):
    whole, broken = line(), line()
    seen: list[torch.Tensor] = []

    def interrupting(module, batch, epoch, rng):
        if epoch == 4:
            raise KeyboardInterrupt
        return squared(module, batch, epoch, rng)

    with pytest.raises(KeyboardInterrupt):
        train(broken, batches, interrupting, QUIET, checkpoint=tmp_path / "m", on_epoch=lambda row: seen.append(broken.weight.detach().clone()))
    assert len(seen) == 4 and torch.equal(broken.weight, seen[-1])
    history = train(line(), batches, squared, QUIET, checkpoint=tmp_path / "m")
    reference = train(whole, batches, squared, QUIET)
    assert history.resumed_from == 4 and history.column("loss") == reference.column("loss")


def test_the_best_weights_survive_an_interruption(tmp_path):
    start = line().weight.item()

    def validate(module):  # the slope passes this value in epoch 1 and moves on
        return abs(module.weight.item() - start - 0.25)

    def interrupting(module, batch, epoch, rng):
        if epoch == 4:
            raise KeyboardInterrupt
        return squared(module, batch, epoch, rng)

    with pytest.raises(KeyboardInterrupt):
        train(line(), batches, interrupting, QUIET, checkpoint=tmp_path / "m", validate=validate)
    resumed, whole = line(), line()
    history = train(resumed, batches, squared, QUIET, checkpoint=tmp_path / "m", validate=validate)
    train(whole, batches, squared, QUIET, validate=validate)
    assert history.best_epoch < 4 and validate(resumed) == history.best_value
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("change", ["config", "seed", "name", "tag", "weights"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    train(line(), batches, squared, QUIET, checkpoint=tmp_path / "m", name="a", tag="data 1")
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    module = nn.Linear(1, 2) if change == "weights" else line()
    config = dataclasses.replace(QUIET, lr=0.1) if change == "config" else QUIET
    names = {"seed": 0, "name": "a", "tag": "data 1"} | {k: v for k, v in {"seed": 1, "name": "b", "tag": "data 2"}.items() if k == change}
    with pytest.raises(InputError, match=f"another {change}"):
        train(module, batches, squared, config, checkpoint=tmp_path / "m", **names)
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


def test_progress_does_not_belong_to_the_identity_of_a_run(tmp_path):
    train(line(), batches, squared, QUIET, checkpoint=tmp_path / "m")
    history = train(line(), batches, squared, dataclasses.replace(QUIET, progress=True), checkpoint=tmp_path / "m")
    assert history.resumed_from == 6


def test_early_stopping_keeps_the_best_weights():
    values = iter([5.0, 3.0, 4.0, 3.5, 9.0, 9.0])
    weights: list[torch.Tensor] = []
    module = line()

    def validate(m):
        weights.append(m.weight.detach().clone())
        return next(values)

    config = dataclasses.replace(QUIET, patience=2)
    history = train(module, batches, squared, config, validate=validate)
    assert (history.stop_reason, history.best_epoch, history.best_value, len(history.rows)) == ("patience", 1, 3.0, 4)
    assert torch.equal(module.weight, weights[1])


def test_patience_waits_for_the_ramp():
    values = iter([1.0, 2.0, 3.0, 2.9, 2.8, 2.95])
    config = dataclasses.replace(QUIET, patience=1, patience_after=2)
    history = train(line(), batches, squared, config, validate=lambda module: next(values))
    assert (history.best_epoch, history.stop_reason, len(history.rows)) == (4, "epochs", 6)


@pytest.mark.parametrize("what", ["loss", "gradient", "validate"])
def test_values_that_are_not_finite_stop_training_before_they_reach_the_weights(what):
    module, done = line(), []

    def loss_fn(m, batch, epoch, rng):
        loss = squared(m, batch, epoch, rng)["loss"]
        if epoch == 2 and what == "loss":
            loss = loss * float("nan")
        if epoch == 2 and what == "gradient":
            loss = loss + 0 * (m.weight - m.weight.detach()).abs().sum().sqrt()
        return {"loss": loss}

    def validate(m):
        return float("inf") if len(done) == 2 else 0.0

    with pytest.raises(TrainingError, match="fit: epoch 2.*Remedy"):
        train(module, batches, loss_fn, QUIET, name="fit", validate=validate if what == "validate" else None, on_epoch=done.append)
    assert module.weight.isfinite().all() and len(done) == 2


def test_an_empty_epoch_and_a_missing_device_are_input_errors():
    with pytest.raises(InputError, match="epoch 0 has none"):
        train(line(), lambda e, rng: [], squared, QUIET)
    with pytest.raises(InputError, match="not available"):
        train(line(), batches, squared, dataclasses.replace(QUIET, device="cuda:99"))


def test_zero_epochs_change_nothing():
    module = line()
    before = module.weight.detach().clone()
    history = train(module, batches, squared, dataclasses.replace(QUIET, epochs=0))
    assert torch.equal(module.weight, before) and history.rows == [] and history.stop_reason == "epochs"


def test_mixed_precision_trains():
    module = line()
    dtypes = set()

    def loss_fn(m, batch, epoch, rng):
        out = m(batch[0])
        dtypes.add(out.dtype)
        return {"loss": (out.float() - batch[1]).square().mean()}

    history = train(module, batches, loss_fn, dataclasses.replace(QUIET, precision="bf16-mixed"))
    assert dtypes == {torch.bfloat16} and module.weight.dtype == torch.float32
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


def test_checkpoints_may_be_rarer_than_epochs(tmp_path):
    config = dataclasses.replace(QUIET, checkpoint_every=4)

    def interrupting(module, batch, epoch, rng):
        if epoch == 5:
            raise KeyboardInterrupt
        return squared(module, batch, epoch, rng)

    with pytest.raises(KeyboardInterrupt):
        train(line(), batches, interrupting, config, checkpoint=tmp_path / "m")
    resumed, whole = line(), line()
    assert train(resumed, batches, squared, config, checkpoint=tmp_path / "m").resumed_from == 4
    train(whole, batches, squared, config)
    assert torch.equal(resumed.weight, whole.weight)
    assert len((tmp_path / "m.log.jsonl").read_text().splitlines()) == 6


def test_batches_of_any_container_are_moved():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        x: torch.Tensor
        label: str

    moved = to_device([Pair(torch.ones(1), "a"), {"y": (torch.ones(2), 3)}], "meta")
    assert moved[0].x.device.type == "meta" == moved[1]["y"][0].device.type
    assert moved[0].label == "a" and moved[1]["y"][1] == 3


# style ----------------------------------------------------------------------------------------------------------------


def test_figures_are_reproducible_and_their_format_is_checked(tmp_path):
    import matplotlib.pyplot as plt

    from gears_nb.core.style import COLOURS, save_figure, scalebar, use_style

    use_style()

    def draw(path: Path) -> bytes:
        fig, ax = plt.subplots(figsize=(1, 1))
        ax.scatter([0, 1], [0, 1], color=COLOURS["blue"])
        scalebar(ax, 0.5, "half")
        save_figure(fig, path)
        plt.close(fig)
        return path.read_bytes()

    for kind in ("svg", "png"):
        assert draw(tmp_path / f"a.{kind}") == draw(tmp_path / "deep" / f"b.{kind}")
    with pytest.raises(InputError, match="not supported"):
        draw(tmp_path / "a.tiff")
    assert not (tmp_path / "a.tiff").exists()


# imports --------------------------------------------------------------------------------------------------------------


def test_light_modules_do_not_pull_in_torch():
    heavy = "print(*(m for m in ('torch', 'matplotlib', 'lightning_fabric') if m in sys.modules))"
    code = f"import sys, gears_nb.core.config, gears_nb.reconstruct.settings, gears_nb.core.store, gears_nb.core.seeding, gears_nb.core.style; {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr
