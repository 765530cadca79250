"""gears_nb.alignment: what may be read, the same bits again, every method, the mathematics of terms and scores, kept and resumed runs."""
from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import sys
import types
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData, read_h5ad
from hypothesis import given
from hypothesis import strategies as st

import gears_nb.alignment.align as align_module
from gears_nb.alignment import adversaries, board, moves, scores
from gears_nb.alignment.adversaries import Critic, Wasserstein, averaged
from gears_nb.alignment.align import METHODS, TERMS, UNEQUAL, align, fit_alignment, mapped, method_config, method_of
from gears_nb.alignment.architecture import Cycle, SourceNorm, by_source
from gears_nb.alignment.board import LEVELS, board_row, material, picture, sized
from gears_nb.alignment.contrast import mutual_partners, nearest_partners, partners_of
from gears_nb.alignment.method import AlignConfig, AlignDealer, Method
from gears_nb.alignment.moments import mean_over_pairs, moment_gap
from gears_nb.alignment.scores import (
    centroid_scores,
    conservation_scores,
    even_sample,
    knn_accuracy,
    laid_out,
    locality_scores,
    mixing_scores,
    program_score,
    reconstruction_scores,
    rejection,
    within_rms,
)
from gears_nb.alignment.self_training import mapped_places, pseudo_places
from gears_nb.alignment.sources import FEWEST_ROWS, Sources, another_machine, gather, load_sources
from gears_nb.alignment.transport import pairwise_sinkhorn, transport_map
from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.core.store import content_digest
from gears_nb.data.registry import data_root
from gears_nb.encoder import presets
from gears_nb.encoder.alignment import coral, mmd
from gears_nb.encoder.presets import Places, Rows, Scattered, encode, new_encoder

seeds = st.integers(0, 2**32 - 1)
SMOKE = LEVELS["smoke"]["network"]
RUNNABLE = [name for name in METHODS if name != "scvi"]


def table(seed: int = 0, n: int = 30, g: int = 25, *, placed: bool = True, prefix: str = "g", empty: int = 0) -> AnnData:
    "Sparse counts that vary over the unit square; the last `empty` rows have none."
    rng = np.random.default_rng(seed)
    place = rng.random((n, 2))
    X = rng.poisson(np.exp(1 + np.cos(place @ np.random.default_rng(1).normal(size=(2, g)) * 4))).astype(np.float32)
    X[n - empty :] = 0
    adata = AnnData(sp.csr_matrix(X))
    adata.var_names = [f"{prefix}{i}" for i in range(g)]
    if placed:
        adata.obsm["spatial"] = place * 100
    return adata


def pair(**kwargs) -> Sources:
    "A taught slide and cells."
    return gather({"slide": table(0), "cells": table(1, placed=False)}, **kwargs)


def clouds(seed: int, sizes: tuple[int, ...] = (20, 35, 50), d: int = 4) -> list[np.ndarray]:
    "Clouds with centres and spreads of their own."
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, d)) * rng.uniform(0.5, 2) + 2 * rng.normal(size=d) for n in sizes]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch_rng(seed, "test"))


def same(A, B) -> bool:
    "Equal to the bit."
    return len(A) == len(B) and all(np.array_equal(a, b) for a, b in zip(A, B))


@pytest.fixture(scope="module")
def sources() -> Sources:
    "Two taught slides, one held out, and cells whose places are known for scoring."
    return load_sources("tiny", 0)


@pytest.fixture(scope="module", autouse=True)
def short_finetune():
    "The adapter takes three steps, not 500."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_module, "finetune", functools.partial(align_module.finetune, steps=3))
        yield


def smoke(method: str, sources: Sources, **changes) -> AlignConfig:
    return align_module.override(sized(method, sources, "smoke"), changes)


@pytest.fixture(scope="module")
def fitted(sources):
    "Every method at the board's smoke level, fitted once."
    return functools.cache(lambda method, seed=0: fit_alignment(sources, smoke(method, sources), seed=seed))


@pytest.fixture
def flat(sources) -> list[np.ndarray]:
    "Embeddings as good as they get: the places themselves."
    return [np.asarray(p, np.float32) for p in sources.places]


# bad input --------------------------------------------------------------------------------------------------------------


BAD = {
    "nothing": (lambda: {}, {}, "there are no sources"),
    "one source": (lambda: {"a": table()}, {}, "there is one source"),
    "few rows": (lambda: {"a": table(), "b": table(1, empty=30 - FEWEST_ROWS + 1)}, {}, f"b: n_obs: {FEWEST_ROWS - 1} rows"),
    "other genes": (lambda: {"a": table(), "b": table(1, prefix="h")}, {}, "genes"),
    "few genes": (lambda: {"a": table(), "b": table(1, g=19)}, {}, "19 genes shared.*20 are needed"),
    "a kind of nobody": (lambda: {"a": table(), "b": table(1)}, {"kinds": {"c": "ST"}}, "kinds: names 'c', which is no source"),
    "a kind that is none": (lambda: {"a": table(), "b": table(1)}, {"kinds": {"a": "XX"}}, "a is 'XX'"),
    "nobody's places": (lambda: {"a": table(), "b": table(1)}, {"taught": ["c"]}, "taught: names 'c', which is no source"),
    "no places": (lambda: {"a": table(), "b": table(1, placed=False)}, {"taught": ["b"]}, "b has no obsm"),
}


@pytest.mark.parametrize(("tables", "how", "hint"), BAD.values(), ids=BAD)
def test_bad_sources_are_an_input_error_in_one_line(tables, how, hint):
    with pytest.raises(InputError, match=hint) as caught:
        gather(tables(), **how)
    assert "\n" not in str(caught.value) and "Remedy" in str(caught.value)


def test_the_limits_are_where_they_are_said_to_be():
    few = gather({"a": table(), "b": table(1, g=19, empty=30 - FEWEST_ROWS)}, min_genes=19)
    assert few.sizes == (30, FEWEST_ROWS) and [t.n_vars for t in few.tables] == [19, 19]


def test_gather_reads_kinds_places_patients_and_labels_and_changes_nothing():
    a, b, c = table(0, empty=3), table(1, placed=False), table(2)
    a.obs["patient"], b.obs["cell_type"] = "P1", ["x", "y"] * 15
    c.obsm["spatial_true"] = c.obsm.pop("spatial")
    c.var_names, c = c.var_names, c[:, ::-1].copy()
    before = content_digest(a, b, c)
    made = gather({"a": a, "b": b, "c": c}, kinds={"c": "ST"})
    assert content_digest(a, b, c) == before
    assert (made.names, made.kinds, made.taught, made.patients) == (("a", "b", "c"), ("ST", "SC", "ST"), (True, False, False), ("P1", "", ""))
    assert made.sizes == (27, 30, 30) and made.member.tolist() == [0] * 27 + [1] * 30 + [2] * 30
    np.testing.assert_array_equal(made.places[0], a.obsm["spatial"][:27])  # empty rows lose their places too
    assert made.places[1] is None and np.array_equal(made.places[2], c.obsm["spatial_true"])
    assert made.labels[0] is None and made.labels[1].tolist() == ["x", "y"] * 15
    assert all(list(t.var_names) == list(a.var_names) for t in made.tables) and [t is made.tables[0] for t in made.teachers] == [True]
    np.testing.assert_array_equal(made.tables[2].X.toarray(), c.X.toarray()[:, ::-1])
    told = gather({"a": a, "c": table(2)}, taught=["c"])
    assert told.taught == (False, True) and told.kinds == ("ST", "ST") and told.places[0] is not None


@pytest.fixture(scope="module")
def untaught() -> Sources:
    with pytest.warns(GearsWarning, match="no source may teach places"):
        return gather({"slide": table(0, n=40), "cells": table(1, placed=False, n=40)}, taught=[])


def test_without_a_teacher_the_spatial_part_is_left_out(untaught):
    assert len(untaught.teachers) == 2
    found = fit_alignment(untaught, smoke("none", untaught, **{"n_hvg": None}))
    assert found.config.nce_weight == 0 and "nce" not in found.history.rows[0]
    assert "nce" in fit_alignment(pair(), smoke("none", pair(), **{"n_hvg": None})).history.rows[0]
    again = fit_alignment(untaught, smoke("self_training", untaught, **{"n_hvg": None}))
    assert same(again.H, found.H)  # nobody to be placed on
    assert np.isfinite(np.concatenate(fit_alignment(untaught, smoke("coral_after", untaught, **{"n_hvg": None})).H)).all()


@pytest.mark.parametrize("name", ["metric", "metric_transport", "metric_coral", "adapter", "transport_after"])
def test_without_a_teacher_metric_adapter_and_transport_refuse(name, untaught):
    with pytest.raises(InputError, match="no source is taught|none is taught") as caught:
        fit_alignment(untaught, smoke(name, untaught, **{"n_hvg": None}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n, c in METHODS.items() if c.get("across") == "kind"])
@pytest.mark.parametrize("kind", ["ST", "SC"])
def test_a_method_across_kinds_wants_both(name, kind):
    alike = gather({"a": table(0), "b": table(1)}, kinds={"a": kind, "b": kind})
    with pytest.raises(InputError, match=f"all sources are of kind {kind}"):
        fit_alignment(alike, smoke(name, alike))
    assert method_of(smoke(name, pair()), pair()).group.tolist() == [0, 1]


def test_very_unequal_sizes_are_warned_about():
    odd = gather({"big": table(0, n=20 * UNEQUAL + 1), "small": table(1, n=20, placed=False)})
    with pytest.warns(GearsWarning, match=f"small has 20 rows beside {20 * UNEQUAL + 1}"):
        fit_alignment(odd, smoke("none", odd))
    even = dataclasses.replace(odd, tables=(odd.tables[0][:-1].copy(), odd.tables[1]), places=(odd.places[0][:-1], None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GearsWarning)
        fit_alignment(odd, smoke("mmd", odd))  # deals as many of both
        fit_alignment(odd, smoke("harmony", odd, map=""))
        fit_alignment(even, smoke("none", even))


@pytest.mark.parametrize(("name", "changes", "hint"), [("sinkhorm", {}, "did you mean 'sinkhorn'"), ("zzzz", {}, "choose one of none, adversary_kind"), ("none", {"wieght": 1.0}, "did you mean 'weight'"),
                                                       ("none", {"base": "magic"}, "base"), ("none", {"pseudo": 2.0}, "pseudo"), ("none", {"dim": "8"}, "dim")])
def test_misspelt_methods_and_bad_settings_are_refused(name, changes, hint):
    with pytest.raises(InputError, match=hint):
        method_config(name, **changes)
    with pytest.raises(InputError, match=hint):
        align(pair(), name, **changes)


def test_a_data_set_that_is_none_or_not_here_is_refused(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="there is no 'tinny'.*use one of tiny"):
        load_sources("tinny")
    for where in (None, tmp_path):
        monkeypatch.setattr("gears_nb.data.registry.data_root", lambda where=where: where)
        for name in ("her2st", "her2st_dev", "pdac", "breast"):
            with pytest.raises(InputError, match="GEARS_DATA: this data set is not here") as caught:
                load_sources(name)
            assert "\n" not in str(caught.value)


def test_without_scvi_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(InputError, match="scvi-tools is not installed.*pip install") as caught:
        fit_alignment(pair(), method_config("scvi"))
    assert "\n" not in str(caught.value)


def test_scvi_is_asked_with_the_source_as_batch_and_its_rows_are_given_back(monkeypatch):
    seen = {}

    class Model:
        def __init__(self, whole): self.whole = whole
        def train(self, **how): seen.update(how)
        def get_latent_representation(self): return self.whole.X.toarray().astype(np.float64)

    Model.setup_anndata = staticmethod(lambda whole, batch_key: seen.update(batch=whole.obs[batch_key].tolist()))
    stub = types.SimpleNamespace(settings=types.SimpleNamespace(seed=None), model=types.SimpleNamespace(SCVI=Model))
    monkeypatch.setitem(sys.modules, "scvi", stub)
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "scvi")}
    two = pair()
    H = fit_alignment(two, method_config("scvi"), seed=5).H
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    assert same(H, [t.X.toarray() for t in two.tables]) and H[0].dtype == np.float32
    assert seen["batch"] == ["slide"] * 30 + ["cells"] * 30 and seen["max_epochs"] == align_module.SCVI_EPOCHS and stub.settings.seed == 5


# what may be read -------------------------------------------------------------------------------------------------------


def poisoned(sources: Sources) -> Sources:
    "The same expression and the same taught places; everything else that a table knows is garbage."
    rng, tables = np.random.default_rng(9), []
    for whole, own in zip(sources.tables, sources.taught):
        bare = AnnData(whole.X.copy(), obs=whole.obs[["slide"]].copy() if "slide" in whole.obs else None)
        bare.var_names, bare.obs_names = whole.var_names, whole.obs_names
        bare.obs["cell_type"] = rng.choice(["x", "y", "z"], whole.n_obs)
        for key, value in whole.obsm.items():
            bare.obsm[key] = value.copy() if own and key == "spatial" else np.full(np.shape(value), np.nan)
        tables.append(bare)
    places = [p if own else np.full_like(p, np.nan) for own, p in zip(sources.taught, sources.places)]
    labels = [rng.choice(["x", "y", "z"], n) for n in sources.sizes]
    return dataclasses.replace(sources, tables=tuple(tables), places=tuple(places), labels=tuple(labels), patients=("?",) * len(sources))


POISON = ["none", "centred", "adversary_kind", "wasserstein", "contrast_mutual", "contrast_nearest", "self_training", "source_norm",
          "cycle", "transport_after", "adapter", "metric_transport", "harmony"]


@pytest.mark.parametrize("name", POISON)
def test_no_method_reads_hidden_places_or_cell_types(name, sources, fitted):
    hidden = poisoned(sources)
    assert not np.isfinite(hidden.places[2]).any() and hidden.labels[3].tolist() != sources.labels[3].tolist()
    assert same(fit_alignment(hidden, smoke(name, hidden)).H, fitted(name).H)


@pytest.mark.parametrize("name", ["none", "self_training", "metric"])
def test_but_taught_places_are_read(name, sources, fitted):
    "The poison above would be felt if it were taken."
    swap = np.random.default_rng(0).permutation(sources.sizes[0])
    tables = [t.copy() for t in sources.tables]
    tables[0].obsm["spatial"] = tables[0].obsm["spatial"][swap]
    moved = dataclasses.replace(sources, tables=tuple(tables), places=(sources.places[0][swap], *sources.places[1:]))
    assert not np.array_equal(fit_alignment(moved, smoke(name, moved)).H[3], fitted(name).H[3])


def test_the_geometry_model_is_taught_by_taught_slides_only(sources, flat, monkeypatch):
    given_to = []
    monkeypatch.setattr(scores, "geometry_model", lambda H, coords, **how: given_to.append((H, coords, how)) or perfect)
    reconstruction_scores(flat, sources, seed=4, epochs=2)
    ((H, coords, how),) = given_to
    assert same(H, flat[:2]) and same(coords, sources.places[:2]) and how == {"miniset": 150, "epochs": 2, "seed": 4}


# the same bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "contrast_mutual", "wasserstein", "self_training", "adapter", "metric", "harmony"])
def test_same_seed_same_bits_whatever_the_global_streams_and_another_seed_other_bits(name, sources, fitted):
    torch.manual_seed(123), np.random.seed(123)
    state, kept = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    again = fit_alignment(sources, smoke(name, sources)).H
    assert torch.equal(torch.random.get_rng_state(), state)  # and they are left alone
    assert name == "harmony" or np.array_equal(np.random.get_state()[1], kept)
    assert same(again, fitted(name).H)
    assert not np.array_equal(fit_alignment(sources, smoke(name, sources), seed=1).H[3], again[3])


def test_harmony_leaves_the_global_stream_alone(sources):
    np.random.seed(123)
    kept = np.random.get_state()[1].copy()
    fit_alignment(sources, smoke("harmony", sources))
    assert np.array_equal(np.random.get_state()[1], kept)


def test_the_order_of_rows_does_not_matter_to_the_metric(sources, fitted):
    rng = np.random.default_rng(0)
    order = [rng.permutation(n) for n in sources.sizes]
    mixed = dataclasses.replace(sources, tables=tuple(t[o].copy() for t, o in zip(sources.tables, order)), places=tuple(p[o] for p, o in zip(sources.places, order)))
    for h, o, plain in zip(fit_alignment(mixed, smoke("metric", mixed)).H, order, fitted("metric").H):
        assert (np.linalg.norm(h - plain[o], axis=1) < 1e-3 * np.linalg.norm(plain[o], axis=1)).all()


def test_sources_are_not_changed_by_a_fit(sources):
    before = content_digest(*sources.tables), content_digest(*sources.places), [sorted(t.obs) for t in sources.tables]
    fit_alignment(sources, smoke("metric_transport", sources)), fit_alignment(sources, smoke("self_training", sources))
    assert before == (content_digest(*sources.tables), content_digest(*sources.places), [sorted(t.obs) for t in sources.tables])


# every method -----------------------------------------------------------------------------------------------------------


def test_the_table_of_methods_holds_the_study_and_nothing_that_is_not_there():
    terms = {c.get("term") for c in METHODS.values()} - {None}
    assert terms == set(TERMS) and {c.get("map") for c in METHODS.values()} == {None, "coral", "adapter", "harmony", "transport"}
    assert METHODS["none"] == {} and method_config("none") == AlignConfig()
    assert [METHODS[n]["n_hvg"] for n in ("genes_28", "genes_88", "genes_all")] == [28, 88, None]
    assert METHODS["coral_pairs"]["weight"] == 500 and METHODS["coral_kind"] == {"term": "moments", "across": "kind", "weight": 10.0}
    assert len({json.dumps(c, sort_keys=True) for c in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_method_embeds_all_sources(name, sources, fitted):
    found, config = fitted(name), smoke(name, sources)
    width = {"network": 8, "components": 8, "metric": 128}[config.base]
    assert [h.shape for h in found.H] == [(n, width) for n in sources.sizes] and found.config == config
    for h in found.H:
        assert h.dtype == np.float32 and np.isfinite(h).all() and np.linalg.matrix_rank(h - h.mean(0)) > 1
    if config.base != "network":
        assert found.encoder is found.method is found.history is None
        return
    assert len(found.history.rows) == config.train.epochs == 1 and not found.encoder.training and not found.method.training
    paid = set(found.history.rows[0])
    assert {"nce", "var", "inv"} <= paid and paid & set(TERMS) == ({config.term} if config.term else set())
    assert config.term in ("", "norm") or found.history.rows[0][config.term] != 0
    assert any(k.startswith("critic") for k in paid - {"critic"}) == (name in ("wasserstein", "feature_matching"))
    assert found.encoder.body[0].in_features == {"genes_28": 28, "genes_88": 88, "genes_all": 240, "coral_pairs_28": 28, "coral_pairs_all": 240}.get(name, 120)


@pytest.mark.parametrize("name", [n for n in RUNNABLE if METHODS[n].get("base", "network") == "network" and METHODS[n] and "map" not in METHODS[n]])
def test_every_method_of_training_changes_something(name, fitted):
    assert not same(fitted(name).H, fitted("none").H)


@pytest.mark.parametrize(("after", "before"), [("transport_after", "none"), ("adapter", "none"), ("centred_transport_after", "centred"), ("metric_transport", "metric"), ("metric_adapter", "metric")])
def test_a_map_into_the_taught_leaves_the_taught_alone(after, before, fitted):
    moved, plain = fitted(after).H, fitted(before).H
    assert same(moved[:2], plain[:2]) and not any(np.array_equal(a, b) for a, b in zip(moved[2:], plain[2:]))
    target = np.concatenate(plain[:2])
    away = lambda h: np.linalg.norm(h.mean(0) - target.mean(0))
    assert before == "metric" or all(away(a) < away(b) for a, b in zip(moved[2:], plain[2:]))


def test_coral_gives_all_sources_the_same_two_moments(fitted):
    for name in ("coral_after", "centred_coral_after"):
        H = [h.astype(np.float64) for h in fitted(name).H]
        scale = within_rms(H)
        for h in H[1:]:
            np.testing.assert_allclose(h.mean(0), H[0].mean(0), atol=1e-4 * scale)
            np.testing.assert_allclose(np.cov(h.T), np.cov(H[0].T), atol=0.1 * scale**2 / h.shape[1])
    gap = [np.linalg.norm(np.cov(fitted("none").H[3].T) - np.cov(fitted("none").H[0].T)), np.linalg.norm(np.cov(H[3].T) - np.cov(H[0].T))]
    assert gap[1] < 0.3 * gap[0]


def test_no_map_is_no_change_and_a_copy_of_the_list(fitted, sources):
    H = fitted("none").H
    assert all(a is b for a, b in zip(mapped(H, sources, ""), H))


@pytest.mark.parametrize(("how", "name"), [("transport", "transport_map"), ("adapter", "adapted")])
def test_a_map_is_given_the_taught_rows_and_the_seed(how, name, sources, flat, monkeypatch):
    asked = []
    monkeypatch.setattr(align_module, name, lambda h, target, seed: asked.append((h, target, seed)) or -h)
    out = mapped(flat, sources, how, 5)
    assert same(out, [flat[0], flat[1], -flat[2], -flat[3]]) and [seed for *_, seed in asked] == [5, 5]
    assert same([h for h, *_ in asked], flat[2:]) and all(np.array_equal(t, np.concatenate(flat[:2])) for _, t, _ in asked)


@pytest.mark.parametrize(("given", "field"), [({"stem": 4}, "stem"), ({"term": "mmd", "pseudo": 0.5}, "pseudo")])
def test_settings_that_no_method_can_follow_are_refused_in_one_line(given, field):
    with pytest.raises(InputError, match=field) as caught:
        AlignConfig(**given)
    assert "\n" not in str(caught.value)


# terms ------------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(3, 25), st.integers(1, 5))
def test_distances_of_equal_clouds_are_zero(seed, n, d):
    A = normal(seed, n, d)
    mixed = A[torch.randperm(n, generator=torch_rng(seed))]
    for other in (A, mixed):
        assert abs(float(moment_gap(A, other))) < 1e-12 and abs(float(pairwise_sinkhorn([A, other]))) < 1e-5


@given(seeds, st.integers(8, 25), st.integers(8, 25), st.integers(1, 4))
def test_distances_are_symmetric_and_positive_for_other_clouds(seed, n, m, d):
    A, B = normal(seed, n, d), 2 * normal(seed + 1, m, d) + 1
    for distance in (moment_gap, lambda a, b: pairwise_sinkhorn([a, b])):
        ab, ba = float(distance(A, B)), float(distance(B, A))
        assert ab > 1e-3 and ab == pytest.approx(ba, rel=1e-5)


@given(seeds, st.floats(0.01, 100.0))
def test_sinkhorn_has_no_unit_and_moments_have_that_of_squares(seed, scale):
    A, B = normal(seed, 12, 3), normal(seed + 1, 15, 3) + 1
    assert float(pairwise_sinkhorn([scale * A, scale * B])) == pytest.approx(float(pairwise_sinkhorn([A, B])), rel=1e-4)
    shift = torch.tensor([scale, 0.0, 0.0])
    assert float(moment_gap(A, A + shift)) == pytest.approx(scale**2 / 3, rel=1e-6) and float(coral(A, A + shift)) < 1e-9 * scale**2


def test_sinkhorn_is_the_mean_over_pairs_and_pulls_together():
    A, B, C = (normal(s, 16, 3) + shift for s, shift in ((0, 0.0), (1, 1.0), (2, 3.0)))
    spread = lambda parts: torch.stack([p - p.mean(0) for p in parts]).square().sum(-1).mean()
    raw = [float(pairwise_sinkhorn([x, y], blur=0.01) * spread([x, y])) for x, y in itertools.combinations((A, B, C), 2)]
    assert float(pairwise_sinkhorn([A, B, C], blur=0.01) * spread([A, B, C])) == pytest.approx(np.mean(raw), rel=0.02)
    C = C.requires_grad_()
    pairwise_sinkhorn([A, B, C]).backward()
    assert (C.grad.mean(0) > 0).all()  # C lies too far up


def test_equal_moments_do_not_imply_overlap():
    "A cross and a square: nothing is shared, and neither mean nor covariance tells."
    rng = np.random.default_rng(0)
    t = rng.integers(0, 4, 400) * np.pi / 2
    cross, square = (np.stack([np.cos(t + s), np.sin(t + s)], 1) for s in (0, np.pi / 4))
    white = lambda X: (X - X.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(X.T))).T
    A, B = (torch.from_numpy(white(X)) for X in (cross, square))
    assert float(moment_gap(A, B)) < 1e-20
    assert float(mmd(A, B)) > 0.01 and float(pairwise_sinkhorn([A, B])) > 0.05
    jitter = 0.01 * rng.normal(size=(800, 2))
    Z, label = np.concatenate([A, B]) + jitter, np.repeat([0, 1], 400)
    assert centroid_scores([A.numpy(), B.numpy()])["centroid_max"] < 1e-9 and knn_accuracy(Z, label) > 0.99 and rejection(Z, label) > 0.99


def test_mean_over_pairs_counts_every_pair_once():
    parts = [torch.full((3, 2), float(v)) for v in (0, 1, 3)]
    assert float(mean_over_pairs(lambda a, b: (a.mean() - b.mean()).abs(), parts)) == pytest.approx(2.0)
    assert float(mean_over_pairs(coral, parts[:1])) == 0


@given(seeds)
def test_transport_carries_rows_into_the_target(seed):
    Z, Y = normal(seed, 23, 3).numpy().astype(np.float32) * 3 + 5, normal(seed + 1, 31, 3).numpy()
    out = transport_map(Z, Y)
    assert out.dtype == np.float32 and out.shape == Z.shape
    assert (out >= Y.min(0) - 1e-5).all() and (out <= Y.max(0) + 1e-5).all()
    assert np.array_equal(transport_map(Z, Y, most=31), out) and np.array_equal(transport_map(Z, Y, most=1000), out)
    blocks = transport_map(Z, Y, most=12, seed=seed)
    assert (blocks >= Y.min(0) - 1e-5).all() and (blocks <= Y.max(0) + 1e-5).all() and not np.array_equal(blocks, out)
    order = np.random.default_rng(seed).permutation(23)
    np.testing.assert_allclose(transport_map(Z[order], Y), out[order], atol=1e-4)


@pytest.mark.parametrize("most", [2000, 60])
def test_transport_keeps_groups_though_their_shares_differ(most):
    "Nine in ten rows are of the first kind, half of the target: nobody is sent to the other kind to make the books balance."
    rng = np.random.default_rng(0)
    place = np.array([[0.0, 0.0], [10.0, 0.0]])
    kind, there = np.repeat([0, 1], [180, 20]), np.repeat([0, 1], [100, 100])
    Z, Y = place[kind] + 1 + 0.3 * rng.normal(size=(200, 2)), place[there] + 0.3 * rng.normal(size=(200, 2))
    out = transport_map(Z, Y, most=most)
    assert np.linalg.norm(out - place[kind], axis=1).max() < 2


@given(seeds, st.lists(st.integers(3, 12), min_size=1, max_size=4))
def test_by_source_standardises_every_source(seed, sizes):
    slide = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    u = normal(seed, len(slide), 3)
    out = by_source(u, slide)
    for s in range(len(sizes)):
        own = out[slide == s]
        torch.testing.assert_close(own.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
        assert (own.var(0, correction=0) < 1).all()
        torch.testing.assert_close(by_source(u[slide == s], None), own)
    moved = u + 7.0 * slide[:, None]
    torch.testing.assert_close(by_source(moved, slide), out)
    torch.testing.assert_close(by_source(100 * u, slide).square().mean(), torch.tensor(1.0, dtype=torch.float64), atol=0.01, rtol=0)


def test_by_source_survives_a_source_without_rows_and_one_without_variance():
    slide = torch.tensor([0, 0, 2, 2])
    out = by_source(torch.tensor([[1.0], [3.0], [5.0], [5.0]]), slide)
    torch.testing.assert_close(out, torch.tensor([[-1.0], [1.0], [0.0], [0.0]]), atol=1e-4, rtol=0)


def new_method(kind: type[Method], sizes: tuple[int, ...] = (30, 60), **changes) -> Method:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(torch.arange(len(sizes)), sizes, dataclasses.replace(AlignConfig(), dim=6, width=(10,), **changes))


@pytest.fixture
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_encoder(dataclasses.replace(AlignConfig(), dim=6, width=(10,)), 5).eval()


def test_source_norm_does_not_feel_a_shift_of_the_source(encoder, rng):
    X = rng.normal(size=(40, 5)).astype(np.float32)
    shift, norm, plain = np.float32([3, -2, 1, 0, 5]), new_method(SourceNorm), new_method(Method)
    at = lambda method, x: method.encode(encoder, Rows(x, 0.0), "SC")
    np.testing.assert_allclose(at(norm, X + shift), at(norm, X), atol=1e-3)
    assert np.abs(at(plain, X + shift) - at(plain, X)).max() > 0.1
    np.testing.assert_array_equal(at(plain, X), encode(encoder, Rows(X, 0.0)))
    stacked, slide = torch.from_numpy(np.concatenate([X, X + shift])), torch.arange(2).repeat_interleave(40)
    first, second = norm.embed(encoder, stacked, slide).chunk(2)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)  # the same in training


def test_the_cycle_starts_as_no_change_and_translates_cells_only(encoder, rng):
    cycle, rows = new_method(Cycle).requires_grad_(False), Rows(rng.normal(size=(12, 5)).astype(np.float32), 0.0)
    assert np.array_equal(cycle.encode(encoder, rows, "SC"), encode(encoder, rows))
    z = torch.randn(10, 6, generator=torch_rng(0))
    slide = torch.arange(2).repeat_interleave(10)
    assert float(cycle.loss(encoder, torch.cat([z, z]), {"slide": slide}, 0.5)) == pytest.approx(0, abs=1e-5)
    assert float(cycle.loss(encoder, torch.cat([z, z + 1]), {"slide": slide}, 0.5)) > 0.1
    assert float(cycle.loss(encoder, z, {"slide": slide[:10]}, 0.5)) == 0
    torch.nn.init.normal_(cycle.there[-1].weight, generator=torch_rng(0))
    assert np.array_equal(cycle.encode(encoder, rows, "ST"), encode(encoder, rows)) and not np.array_equal(cycle.encode(encoder, rows, "SC"), encode(encoder, rows))


def test_the_cure_counts_every_group_the_same():
    worth = lambda **how: new_method(Critic, (10, 20, 300), **how).importance
    assert torch.equal(worth(), torch.ones(3))
    torch.testing.assert_close(worth(cure=True) * torch.tensor([10.0, 20, 300]), torch.full((3,), 110.0))
    torch.testing.assert_close(worth(cure=True, balanced=True), torch.ones(3))
    kinds = Critic(torch.tensor([0, 0, 1]), [10, 20, 300], dataclasses.replace(AlignConfig(), cure=True, balanced=True))
    torch.testing.assert_close(kinds.importance * torch.tensor([2.0, 1.0]), torch.full((2,), 1.5))  # two sources deal for one


def test_the_critic_learns_while_the_encoder_unlearns_and_only_after_the_warm_up(encoder):
    critic, slide = new_method(Critic, adversary_warmup=0.5), torch.arange(2).repeat_interleave(8)
    z = torch.randn(16, 6, generator=torch_rng(0)).requires_grad_()
    slope = {p: torch.autograd.grad(critic.loss(encoder, z, {"slide": slide}, p), [z, critic.critic.body[0].weight]) for p in (0.0, 0.25, 0.5, 0.9)}
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(critic.critic(z), slide), z)[0]
    assert not slope[0.0][0].any()
    torch.testing.assert_close(slope[0.25][0], -plain / 2)
    torch.testing.assert_close(slope[0.9][0], -plain)
    assert all(torch.equal(s[1], slope[0.0][1]) and s[1].any() for s in slope.values())


def test_the_critic_reports_its_collapse():
    critic = new_method(Critic, (30, 60, 90))
    last = critic.critic.body[-1]
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    told = critic.report([np.zeros((n, 6), np.float32) for n in (30, 60, 90)])
    assert told == {"critic_acc": pytest.approx(1 / 3), "critic_majority": 1.0}
    assert new_method(Method).report([]) == {}


def test_wasserstein_sees_a_shift_and_not_the_order_of_rows():
    method, slide = new_method(Wasserstein), torch.arange(2).repeat_interleave(32)
    z = torch.randn(32, 6, generator=torch_rng(0))
    apart, equal = torch.cat([z, z + 5]), torch.cat([z, z])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        gaps = [float(method.gaps(x, slide).abs()) for x in (apart, equal)]
    assert gaps[0] > 5 * gaps[1]
    assert [t.parts for t in method.rival()] == [("method.critics",)] * 2 and len({t.name for t in method.rival()}) == 2


def test_averaged_is_the_mean_of_runs():
    z = torch.arange(10.0)[:, None]
    assert averaged(z, 4)[:, 0].tolist() == [1.5, 5.5] and torch.equal(averaged(z, 1), z)


# who belongs together ---------------------------------------------------------------------------------------------------


def unit(X: np.ndarray) -> np.ndarray:
    return X / np.linalg.norm(X, axis=1, keepdims=True)


@given(seeds, st.integers(1, 4))
def test_partners_are_mutual_neighbours_by_cosine_and_the_relation_is_symmetric(seed, k):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(n, 3)) for n in (9, 14, 6)]
    table, start = mutual_partners(parts, k).numpy(), np.cumsum([0, 9, 14, 6])
    assert table.shape == (29, 3)
    for a, b in itertools.permutations(range(3), 2):
        likeness = unit(parts[a]) @ unit(parts[b]).T
        mine, yours = np.argsort(-likeness, 1)[:, :k], np.argsort(-likeness.T, 1)[:, :k]
        for i in range(len(parts[a])):
            mutual = [j for j in mine[i] if i in yours[j]]
            found = table[start[a] + i, b]
            assert found == (start[b] + mutual[0] if mutual else -1)
            if mutual:  # the other has a partner here too, and this row is one of its mutual neighbours
                back = table[found, a]
                assert start[a] <= back < start[a + 1] and i in yours[found - start[b]]
    assert all((table[start[s] : start[s + 1], s] == -1).all() for s in range(3))


def test_twins_are_partners(rng):
    A = rng.normal(size=(12, 4))
    assert mutual_partners([A, 3 * A], 1).tolist() == [[-1, 12 + i] for i in range(12)] + [[i, -1] for i in range(12)]


@given(seeds)
def test_nearest_partners_are_for_cells_and_are_spots(seed):
    rng = np.random.default_rng(seed)
    parts, start = [rng.normal(size=(n, 3)) for n in (7, 5, 6)], [0, 7, 12, 18]
    table = nearest_partners(parts, ["ST", "SC", "ST"]).numpy()
    assert (table[:7] == -1).all() and (table[12:] == -1).all() and (table[:, 1] == -1).all()
    for b in (0, 2):
        assert table[7:12, b].tolist() == (start[b] + (unit(parts[1]) @ unit(parts[b]).T).argmax(1)).tolist()


def test_mutual_partners_do_not_feel_a_gain_of_a_source_and_nearest_do(rng):
    A = rng.normal(size=(60, 12)).astype(np.float32)
    B = A[:50] + 0.1 * rng.normal(size=(50, 12)).astype(np.float32)
    shift = np.float32(10 * rng.normal(size=12))
    plain, moved = (partners_of([A, b], ["ST", "SC"], "mutual") for b in (B, B + shift))
    assert float((plain == moved).float().mean()) > 0.98 and (plain[60:, 0] == torch.arange(50)).float().mean() > 0.95
    near, far = (partners_of([A, b], ["ST", "SC"], "nearest") for b in (B, B + shift))
    assert (near[60:, 0] == torch.arange(50)).float().mean() > 0.95 and (far[60:, 0] == torch.arange(50)).float().mean() < 0.5


def dealer(balanced: bool, batch: int = 24, sizes: tuple[int, ...] = (40, 20, 12)) -> AlignDealer:
    "Rows hold the number of their source and their own."
    config = dataclasses.replace(AlignConfig(), batch=batch, balanced=balanced, positives=3, nce_weight=5.0)
    rows = [Rows(np.stack([np.full(n, s), np.arange(n)], 1).astype(np.float32), 0.0) for s, n in enumerate(sizes)]
    places = [Places(np.random.default_rng(s).random((n, 2)), 3) if s < 2 else Scattered(n) for s, n in enumerate(sizes)]
    return AlignDealer(rows, places, config)


@given(seeds)
def test_a_balanced_dealer_deals_the_same_of_every_source(seed):
    deal = dealer(True)
    batches = list(deal.epoch(torch_rng(seed)))
    assert len(batches) == deal.steps == 3
    for batch in batches:
        assert torch.bincount(batch["slide"]).tolist() == [8, 8, 8] and torch.equal(batch["x"][:, 0].long(), batch["slide"])
        assert [len(p) for p in batch["positive"]] == [8, 8, 8] and (batch["positive"][2] == -1).all()
    small = [int(b["x"][i, 1]) for b in batches for i in torch.nonzero(b["slide"] == 2)[:, 0]]
    assert len(small) == 24 and sorted(small[:12]) == sorted(small[12:]) == list(range(12))  # pass after pass
    plain = list(dealer(False).epoch(torch_rng(seed)))
    assert sum(torch.bincount(b["slide"], minlength=3) for b in plain).tolist() == [40, 20, 12]


@given(seeds)
def test_a_mate_is_a_partner_of_its_anchor(seed):
    deal, rng = dealer(False), np.random.default_rng(seed)
    start, own = np.array([0, 40, 60, 72]), np.repeat([0, 1, 2], [40, 20, 12])
    partner = np.where(rng.random((72, 3)) < 0.4, start[:3] + (rng.random((72, 3)) * [40, 20, 12]).astype(int), -1)
    partner[np.arange(72), own] = -1
    deal.partners = torch.from_numpy(partner)
    for batch in deal.epoch(torch_rng(seed)):
        row = start[batch["slide"].numpy()] + batch["x"][:, 1].numpy().astype(int)
        has = np.flatnonzero((partner[row] >= 0).any(1))
        assert sorted(batch["anchor"].tolist()) == has.tolist()
        mate = start[batch["mate"][:, 0].numpy().astype(int)] + batch["mate"][:, 1].numpy().astype(int)
        assert all(m in partner[r] for m, r in zip(mate, row[batch["anchor"]]))


@given(seeds)
def test_mapped_places_are_means_of_the_most_similar(seed):
    rng = np.random.default_rng(seed)
    query, ref, coords = rng.normal(size=(7, 3)), rng.normal(size=(15, 3)), rng.normal(size=(15, 2))
    where, spread = mapped_places(query, ref, coords, 4)
    near = coords[np.argsort(-unit(query) @ unit(ref).T, 1)[:, :4]]
    np.testing.assert_allclose(where, near.mean(1))
    np.testing.assert_allclose(spread, np.sqrt(((near - near.mean(1, keepdims=True)) ** 2).sum(2).mean(1)))
    where, spread = mapped_places(ref, ref, coords, 1)
    assert np.array_equal(where, coords) and not spread.any()


@pytest.mark.parametrize(("share", "count"), [(0.5, 30), (0.1, 20), (1.0, 60)])
def test_pseudo_places_go_to_the_surest_of_those_that_are_not_taught(share, count, rng):
    H, places = [rng.normal(size=(n, 3)) for n in (40, 50, 60)], [None, rng.normal(size=(50, 2)), None]
    out = pseudo_places(H, (False, True, False), places, share)
    assert out[1] is None and len(out[2][0]) == count and len(out[0][0]) == max(20, int(40 * share))
    where, spread = mapped_places(H[2], H[1], places[1])
    sure = out[2][0]
    assert len(np.unique(sure)) == count and np.array_equal(out[2][1], where[sure])
    assert count == 60 or spread[sure].max() <= np.delete(spread, sure).min()


# scores -----------------------------------------------------------------------------------------------------------------


def rotation(seed: int, d: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


@given(seeds, st.floats(1e-3, 1e3))
def test_centroid_scores_cannot_be_bought_by_shrinking(seed, scale):
    H = clouds(seed)
    plain, moved = centroid_scores(H), centroid_scores([scale * h @ rotation(seed, 4) + 100 * scale for h in H])
    for key in ("centroid_max", "centroid_mean"):
        assert moved[key] == pytest.approx(plain[key], rel=1e-6)
    np.testing.assert_allclose(moved["matrix"], plain["matrix"], atol=1e-6 * plain["centroid_max"])
    assert moved["centroid_raw"] == pytest.approx(scale * plain["centroid_raw"], rel=1e-6)  # the number that is met by the trick


def test_the_shrink_trick_meets_the_raw_number_and_no_other():
    H = clouds(0, (60, 60, 60))
    small = [0.01 * h for h in H]
    assert centroid_scores(H)["centroid_raw"] > 1 and centroid_scores(H)["centroid_max"] > 1
    assert centroid_scores(small)["centroid_raw"] < 1 and centroid_scores(small)["centroid_max"] > 1


def test_centroid_scores_are_those_of_the_definition():
    ring = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    H = [ring, ring + [3, 0], 2 * np.repeat(ring, 5, axis=0) + [0, 4]]  # sizes don't matter
    unit = np.sqrt((1 + 1 + 4) / 3)
    found = centroid_scores(H)
    assert within_rms(H) == pytest.approx(unit) and found["centroid_raw"] == pytest.approx(5)
    assert found["centroid_max"] == pytest.approx(5 / unit) and found["centroid_mean"] == pytest.approx(4 / unit)
    np.testing.assert_allclose(found["matrix"], np.array([[0, 3, 4], [3, 0, 5], [4, 5, 0]]) / unit)


def test_more_than_ten_sources_keep_their_order():
    H = [np.full((2, 1), float(s)) + [[-0.1], [0.1]] for s in range(12)]
    matrix = np.array(centroid_scores(H)["matrix"])
    assert (np.diff(matrix[0]) > 0).all()


@given(seeds)
def test_rejection_is_its_level_where_labels_are_mixed_and_one_where_they_are_apart(seed):
    rng = np.random.default_rng(seed)
    Z, labels = rng.normal(size=(600, 3)), rng.permutation(np.repeat([0, 1, 2], [300, 200, 100]))
    assert 0.005 < rejection(Z, labels) < 0.12
    assert rejection(Z, labels, level=0.5) == pytest.approx(0.5, abs=0.15)
    assert rejection(Z + 20 * labels[:, None], labels) == 1


@given(seeds, st.integers(2, 5))
def test_knn_accuracy_is_chance_for_mixed_labels_and_one_for_labels_apart(seed, many):
    rng = np.random.default_rng(seed)
    Z, labels = rng.normal(size=(400, 3)), np.arange(400) % many
    assert knn_accuracy(Z, labels) == pytest.approx(1 / many, abs=0.1)
    assert knn_accuracy(Z + 20 * labels[:, None], labels) == 1
    assert knn_accuracy(Z + 20 * labels[:, None], np.array(["b", "a", "d", "c", "e"])[labels]) == 1


def test_a_row_is_not_its_own_neighbour():
    Z, labels = np.repeat(np.arange(10.0), 2)[:, None], np.tile([0, 1], 10)  # the twin has the other label
    assert knn_accuracy(Z, labels, k=1) == 0


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 50))
def test_even_sample_is_the_same_number_of_every_source(seed, sizes, most):
    rows, member = even_sample(sizes, most, seed % 100), np.repeat(np.arange(len(sizes)), sizes)
    assert len(np.unique(rows)) == len(rows) and np.bincount(member[rows], minlength=len(sizes)).tolist() == [min(*sizes, most)] * len(sizes)
    assert np.array_equal(rows, even_sample(sizes, most, seed % 100))


def test_even_sample_is_drawn_at_random():
    assert not np.array_equal(even_sample((50, 90), 20, 0), even_sample((50, 90), 20, 1))
    assert even_sample((50, 90), 50, 0).max() > 120  # not the first rows


def test_mixing_scores_tell_mixed_from_apart():
    rng = np.random.default_rng(0)
    H = [rng.normal(size=(n, 4)) for n in (200, 300, 500)]
    mixed, apart = mixing_scores(H), mixing_scores([h + 20 * s for s, h in enumerate(H)])
    assert mixed["chance"] == apart["chance"] == 1 / 3
    assert abs(mixed["source_acc"] - 1 / 3) < 0.08 and abs(mixed["source_acc_knn"] - 1 / 3) < 0.08 and mixed["ilisi"] > 0.85 and mixed["entropy"] > 0.9 and mixed["rejection"] < 0.15
    assert (apart["source_acc"], apart["source_acc_knn"], apart["rejection"]) == (1, 1, 1) and apart["ilisi"] < 0.01 and apart["entropy"] < 0.01
    assert mixing_scores(H) == mixed != mixing_scores(H, 1)


@given(seeds)
def test_a_program_is_kept_by_what_it_is_made_of_and_lost_in_noise(seed):
    rng = np.random.default_rng(seed)
    latent = rng.random((300, 2))
    X = np.sin(latent @ rng.normal(size=(2, 20)) * 2) + 0.02 * rng.normal(size=(300, 20))
    assert program_score(latent, X) > 0.9 and program_score(X, X) > 0.9
    assert program_score(5 * X @ rotation(seed, 20) + 3, X) == pytest.approx(program_score(X, X), abs=0.01)
    assert program_score(rng.normal(size=(300, 2)), X) < 0.05


def test_what_is_not_known_is_not_scored(sources, flat):
    X = [t.X.toarray()[:, :30] for t in sources.tables]
    blank = lambda **known: dataclasses.replace(sources, **known)
    nobody = (None,) * 4
    assert conservation_scores(flat, X, blank(labels=nobody))["types"] is None
    assert conservation_scores(flat, X, blank(labels=(None, None, None, np.full(200, "one"))))["types"] is None
    told = conservation_scores(flat, X, blank(labels=(None, None, None, np.where(flat[3][:, 0] > np.median(flat[3][:, 0]), "a", "b"))))
    assert told["types"] > 0.9 and np.isfinite(told["programs"])
    assert set(reconstruction_scores(flat, blank(taught=(False,) * 4)).values()) == {None}
    half = blank(places=(*sources.places[:2], None, None))
    assert locality_scores(flat, half)["overlap20_held"] is locality_scores(flat, half)["distance_sc"] is None and locality_scores(flat, half)["overlap20_train"] == 1
    assert locality_scores(flat, blank(taught=(False,) * 4))["overlap20_train"] is None


def test_reconstruction_is_not_scored_where_no_place_is_known(sources, flat, monkeypatch):
    monkeypatch.setattr(scores, "geometry_model", lambda *a, **k: perfect)
    found = reconstruction_scores(flat, dataclasses.replace(sources, places=(*sources.places[:3], None)))
    assert found["spearman_sc"] is found["mapped_sc"] is None and found["spearman_st3"] > 0.999


def test_locality_is_one_for_the_places_and_chance_for_noise(sources, flat, rng):
    good = locality_scores(flat, sources)
    assert [good[f"overlap20_{w}"] for w in ("train", "held", "sc")] == [pytest.approx(1, abs=1e-3)] * 3
    bad = locality_scores([rng.normal(size=h.shape) for h in flat], sources)
    for which, n in (("train", 150), ("held", 150), ("sc", 200)):
        assert bad[f"overlap20_{which}"] == pytest.approx(20 / n, abs=0.05) and bad[f"distance_{which}"] > 1.5 * good[f"distance_{which}"]


def perfect(H, mask=None, rng=None):
    "A 'model' that knows the places, for embeddings that are the places."
    return types.SimpleNamespace(X=H[..., :2])


def test_laid_out_is_one_for_a_perfect_model_and_nothing_for_a_random_one(sources, flat):
    turned = lambda H, mask, rng: types.SimpleNamespace(X=-3 * H[..., :2] + 7)
    noise = lambda H, mask, rng: types.SimpleNamespace(X=torch.randn(*H.shape[:2], 2, generator=rng))
    place = np.random.default_rng(0).random((60, 2))
    for model in (perfect, turned):
        assert laid_out(model, place, place, size=48) == pytest.approx(1, abs=1e-9)
        assert laid_out(model, flat[2], sources.places[2], size=48) > 0.999  # on a lattice, rounding breaks ties
    assert abs(laid_out(noise, flat[2], sources.places[2], size=48)) < 0.2
    assert abs(laid_out(perfect, place, np.random.default_rng(1).permutation(place), size=48)) < 0.2  # places of other rows


def test_plain_mapping_finds_places_that_were_taught(sources):
    "Embeddings that are a smooth code of the place, the same on all slides of one shape."
    place = np.random.default_rng(0).random((150, 2))
    code = np.concatenate([np.cos(3 * place), np.sin(3 * place)], 1).astype(np.float32)
    alike = dataclasses.replace(sources, tables=sources.tables[:3], names=sources.names[:3], kinds=sources.kinds[:3], taught=sources.taught[:3], places=(place,) * 3, labels=(None,) * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "geometry_model", lambda *a, **k: perfect)
        assert reconstruction_scores([code] * 3, alike)["mapped_st3"] > 0.95
        assert abs(reconstruction_scores([code, code, code[::-1]], alike)["mapped_st3"]) < 0.3


# killed and resumed -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    "What a kill looks like from inside: nothing catches it."


def dies_in_call(monkeypatch, module, name: str, call: int):
    "Let the `call`-th use of a loss die."
    whole, seen = getattr(module, name), itertools.count()
    monkeypatch.setattr(module, name, lambda *a: whole(*a) if next(seen) != call else (_ for _ in ()).throw(Killed))


def numbers(history) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def states(found) -> list[np.ndarray]:
    return [v.numpy() for part in (found.encoder, found.method) for v in part.state_dict().values()]


LONGER = {"epochs": 3}  # of five batches each


@pytest.mark.parametrize(("name", "where", "call", "epoch"), [
    ("coral_pairs", (presets, "encoder_loss"), 0, 0), ("coral_pairs", (presets, "encoder_loss"), 12, 2), ("adversary_source_cured", (presets, "encoder_loss"), 14, 2),
    ("contrast_mutual", (presets, "encoder_loss"), 7, 1), ("wasserstein", (presets, "encoder_loss"), 12, 2), ("wasserstein", (adversaries, "_critic_pays"), 25, 2)])
def test_killed_and_resumed_gives_the_bits_of_an_uninterrupted_run(name, where, call, epoch, sources, tmp_path, monkeypatch):
    fit = functools.partial(fit_alignment, sources, smoke(name, sources, **LONGER), seed=7)
    whole = fit()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_in_call(patch, *where, call)
        fit(checkpoint=tmp_path / "run")
    resumed = fit(checkpoint=tmp_path / "run")
    assert resumed.history.resumed_from == epoch and len(resumed.history.rows) == 3
    assert numbers(resumed.history) == numbers(whole.history)
    assert same(states(resumed), states(whole)) and same(resumed.H, whole.H)
    again = fit(checkpoint=tmp_path / "run")  # finished: only read
    assert again.history.resumed_from == 3 and same(again.H, whole.H)


def test_self_training_killed_in_its_second_training_comes_to_the_same_bits(sources, tmp_path, monkeypatch):
    fit = functools.partial(fit_alignment, sources, smoke("self_training", sources, epochs=2), seed=7)
    whole = fit()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_in_call(patch, presets, "encoder_loss", 17)
        fit(checkpoint=tmp_path / "run")
    resumed = fit(checkpoint=tmp_path / "run")
    assert resumed.history.resumed_from == 1 and same(resumed.H, whole.H)


def test_a_map_into_the_cloud_of_the_taught_wants_one(sources):
    untaught = dataclasses.replace(sources, taught=(False,) * len(sources))
    for how in ("adapter", "transport"):
        with pytest.raises(InputError, match="none is taught"):
            mapped([np.zeros((n, 2)) for n in sources.sizes], untaught, how)


def test_shrinking_does_not_lower_the_transport_loss():
    clouds = [torch.randn(20, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64).add(s).requires_grad_() for s in range(3)]
    value = pairwise_sinkhorn(clouds)
    along = sum((g * c).sum() for g, c in zip(torch.autograd.grad(value, clouds), clouds))
    assert value > 0.1 and abs(along) < 1e-6


def test_a_checkpoint_of_another_seed_or_length_is_refused(sources, tmp_path):
    fit_alignment(sources, smoke("none", sources), checkpoint=tmp_path / "run")
    for changes, seed in (({}, 1), ({"epochs": 2}, 0), ({"dim": 9}, 0)):
        with pytest.raises(InputError, match="another"):
            fit_alignment(sources, smoke("none", sources, **changes), seed=seed, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("what", ["method", "setting", "data"])
def test_a_checkpoint_of_another_method_setting_or_data_is_refused(what, sources, tmp_path):
    fit_alignment(sources, smoke("mmd", sources), checkpoint=tmp_path / "run")
    tables = [t.copy() for t in sources.tables]
    tables[3] = another_machine(tables[3], "m", 0.5)
    other = {"method": (sources, smoke("sinkhorn", sources)), "setting": (sources, smoke("mmd", sources, weight=1.0)), "data": (dataclasses.replace(sources, tables=tuple(tables)), smoke("mmd", sources))}[what]
    with pytest.raises(InputError, match="another"):
        fit_alignment(*other, checkpoint=tmp_path / "run")


# the board --------------------------------------------------------------------------------------------------------------


def test_a_row_of_the_board_is_the_same_again_but_for_its_seconds():
    first = board_row("tiny", "adversary_source", 0, "smoke")
    material.cache_clear()
    again = board_row("tiny", "adversary_source", 0, "smoke")
    assert first.pop("seconds") > 0 and again.pop("seconds") > 0
    assert first == again == json.loads(json.dumps(first, allow_nan=False))
    told = {"centroid_max", "centroid_mean", "centroid_raw", "matrix", "source_acc", "source_acc_knn", "chance", "ilisi", "entropy", "rejection", "overlap20_train", "overlap20_held", "overlap20_sc",
            "distance_train", "distance_held", "distance_sc", "programs", "types", "spearman_st3", "spearman_sc", "mapped_st3", "mapped_sc", "critic_acc", "critic_majority", "digest"}
    assert set(first) == told and None not in first.values()
    assert np.shape(first["matrix"]) == (4, 4) and first["centroid_max"] >= first["centroid_mean"] > 0
    assert 0 <= first["overlap20_held"] <= 1 and 0 <= first["critic_acc"] <= 1 and first["chance"] == 0.25


def test_the_digest_of_a_row_is_that_of_its_data(sources):
    assert content_digest(*material("tiny", 0)[0].tables) == content_digest(*sources.tables) != content_digest(*load_sources("tiny", 1).tables)
    assert material("tiny", 0) is material("tiny", 0) and [x.shape for x in material("tiny", 0)[1]] == [(n, 240) for n in sources.sizes]


@pytest.mark.parametrize("level", LEVELS)
def test_all_methods_get_the_steps_of_the_level(level, sources):
    for name in METHODS:
        config = sized(name, sources, level)
        per_epoch = max(1, round(sum(sources.sizes) / config.batch))
        assert abs(config.train.epochs * per_epoch - LEVELS[level]["steps"]) <= per_epoch / 2 or config.train.epochs == 1
        assert all(getattr(config, k) == v for k, v in METHODS[name].items())  # what a method is, it stays
        assert all(getattr(config, k) == v for k, v in LEVELS[level]["network"].items() if k not in METHODS[name])


def test_a_picture_has_as_many_points_of_every_source(monkeypatch):
    seen = {}

    class UMAP:
        def __init__(self, **how): seen.update(how)
        def fit_transform(self, Z): return Z[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    drawn = picture("tiny", "none", 3, "smoke", most=20)
    assert np.shape(drawn["xy"]) == (80, 2) and np.bincount(drawn["member"]).tolist() == [20] * 4 and seen == {"random_state": 3, "n_jobs": 1}
    json.dumps(drawn, allow_nan=False)
    sources, _ = board.material("tiny", 3)
    H = np.concatenate(fit_alignment(sources, sized("none", sources, "smoke"), seed=3).H)
    np.testing.assert_allclose(drawn["xy"], H[even_sample(sources.sizes, 20, 3), :2], atol=1e-3)


# the verb ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), [("metric_transport", {}), ("sinkhorn", SMOKE | {"epochs": 1, "weight": 2.0})])
def test_align_gives_copies_with_embeddings_that_can_be_written(method, settings, sources, tmp_path):
    before = content_digest(*sources.tables), [(sorted(t.obs), sorted(t.obsm), sorted(t.uns)) for t in sources.tables]
    out = align(sources, method, seed=2, **settings)
    assert before == (content_digest(*sources.tables), [(sorted(t.obs), sorted(t.obsm), sorted(t.uns)) for t in sources.tables])
    H = fit_alignment(sources, method_config(method, **settings), seed=2).H
    for table, plain, h, name, kind in zip(out, sources.tables, H, sources.names, sources.kinds):
        assert table is not plain and np.array_equal(table.obsm["X_aligned"], h)
        assert set(table.obs["source"]) == {name} and set(table.obs["kind"]) == {kind}
        about = table.uns["alignment"]
        assert about["method"] == method and about["seed"] == 2 and set(about["settings"]) == set(METHODS[method]) | set(settings)
        assert all(about["settings"][k] == str(v) for k, v in settings.items())
        table.write_h5ad(tmp_path / f"{name}.h5ad")
        back = read_h5ad(tmp_path / f"{name}.h5ad")
        assert np.array_equal(back.obsm["X_aligned"], h) and back.uns["alignment"]["method"] == method and (back.X != plain.X).nnz == 0
        table.X.data[:] = 0
    assert before[0] == content_digest(*sources.tables)


def test_the_default_of_align_is_the_winner_of_the_scoreboard(sources, fitted):
    assert same([t.obsm["X_aligned"] for t in align(sources)], fitted("metric_harmony").H)


# another machine, and the data sets -------------------------------------------------------------------------------------


@given(seeds, st.floats(0.0, 2.0), st.floats(0.1, 1.5))
def test_another_machine_counts_whole_molecules_and_the_same_again(seed, strength, depth):
    own = table(seed)
    before = content_digest(own)
    made = another_machine(own, "m", strength, depth=depth, seed=seed % 7)
    assert content_digest(own) == before and np.array_equal(made.obsm["spatial"], own.obsm["spatial"]) and list(made.var_names) == list(own.var_names)
    X = made.X.toarray()
    assert (X >= 0).all() and np.array_equal(X, X.round()) and made.X.dtype == np.float32 and (made.X.data > 0).all()
    assert not X[own.X.toarray() == 0].any()  # nothing comes from nothing
    assert (made.X != another_machine(own, "m", strength, depth=depth, seed=seed % 7).X).nnz == 0
    dense = own.copy()
    dense.X = own.X.toarray()
    assert (made.X != another_machine(dense, "m", strength, depth=depth, seed=seed % 7).X).nnz == 0


def test_gains_belong_to_the_machine_and_depth_to_the_run():
    rich = [AnnData(sp.csr_matrix(np.random.default_rng(s).poisson(200, (60, 25)).astype(np.float32))) for s in range(2)]
    gain = lambda t, *how, **more: np.log(np.asarray(another_machine(t, *how, **more).X.mean(0) / t.X.mean(0))).ravel()
    first, second = (gain(t, "m", 1.0) for t in rich)
    np.testing.assert_allclose(first, second, atol=0.1)
    assert np.corrcoef(first, gain(rich[0], "other", 1.0))[0, 1] < 0.7 and np.abs(first - gain(rich[0], "m", 1.0, seed=1)).max() > 0.5
    assert 0.6 < first.std() < 1.5 and (another_machine(rich[0], "m", 0.0).X != rich[0].X).nnz == 0
    assert np.exp(gain(rich[0], "m", 0.0, depth=0.5)).mean() == pytest.approx(0.5, abs=0.02)


def whole_counts(made: Sources) -> bool:
    return all(np.array_equal(t.X.data, t.X.data.round()) and t.X.data.min() >= 0 for t in made.tables)


def test_the_six_simulated_sources_are_those_of_the_study():
    made = load_sources("six_sources", 0)
    assert dict(zip(made.names, made.sizes)) == {"P2_ST1": 1700, "P2_ST2": 1500, "P2_ST3": 1200, "P2_SC": 2700, "P10_ST3": 460, "P10_SC": 950}
    assert made.kinds == ("ST", "ST", "ST", "SC", "ST", "SC") and made.taught == (True, True, False, False, False, False) and made.patients == ("P2",) * 4 + ("P10",) * 2
    assert all(p.shape == (n, 2) for p, n in zip(made.places, made.sizes)) and whole_counts(made)
    assert all(("spatial" in t.obsm) == (kind == "ST") for t, kind in zip(made.tables, made.kinds))
    assert all((labels is not None) == (kind == "SC") for labels, kind in zip(made.labels, made.kinds))


needs_data = pytest.mark.skipif(data_root() is None, reason="the folder of measured data is absent (set GEARS_DATA)")


@needs_data
@pytest.mark.parametrize(("name", "first", "second", "sizes"), [("her2st", "A", "G", (346, 325, 359, 359, 441, 467))])
def test_her2st_teaches_two_sections_and_hides_the_places_of_two(name, first, second, sizes):
    made = load_sources(name, 0)
    assert made.names == tuple(f"{first}_{w}" for w in ("ST1", "ST2", "ST3", "SC")) + tuple(f"{second}_{w}" for w in ("ST3", "SC")) and made.sizes == sizes
    assert made.kinds == ("ST", "ST", "ST", "SC", "ST", "SC") and made.taught == (True, True, False, False, False, False) and made.patients == (first,) * 4 + (second,) * 2
    assert ["spatial" in t.obsm for t in made.tables] == [k == "ST" for k in made.kinds] and all(np.isfinite(p).all() for p in made.places)
    assert len({tuple(set(t.obs["slide"])) for t in made.tables}) == 6  # six sections, none twice
    assert whole_counts(made) and len(made.teachers) == 2
    assert made.tables[3].X.sum(1).mean() < 0.9 * np.mean([t.X.sum(1).mean() for t in made.tables[:3]])  # half the molecules


@needs_data
def test_pdac_teaches_one_half_of_the_spots():
    made, other = load_sources("pdac", 0), load_sources("pdac", 1)
    assert made.names == ("ST1", "ST3", "SC") and made.sizes == (214, 214, 1926) and made.taught == (True, False, False) and made.kinds == ("ST", "ST", "SC")
    assert made.places[2] is None and len(set(made.labels[2])) == 20 and whole_counts(made)
    halves = [set(t.obs_names) for t in made.tables[:2]]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == set.union(*(set(t.obs_names) for t in other.tables[:2])) and halves[0] != set(other.tables[0].obs_names)


@needs_data
def test_breast_teaches_spots_and_hides_the_places_of_cells():
    made = load_sources("breast", 0)
    assert made.names == ("ST1", "SC") and made.sizes == (709, 3000) and made.kinds == ("ST", "SC") and made.taught == (True, False)
    assert "spatial" not in made.tables[1].obsm and made.places[1].shape == (3000, 2) and np.isfinite(made.places[1]).all()
    assert len(set(made.tables[1].obs_names)) == 3000 and whole_counts(made)


# moves of a query -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sides():
    rng = np.random.default_rng(3)
    return {name: (rng.normal(size=(n, 4)) + shift).astype(np.float32) for name, n, shift in (("cloud", 300, 0.0), ("inside", 150, 0.0), ("outside", 150, 1.5))}


@pytest.mark.parametrize("how", ["harmony", "transport"])
def test_a_move_brings_a_query_nearer_and_follows_the_order_of_its_rows(how, sides):
    out, said = moves.move(sides["outside"], sides["cloud"], how, seed=1)
    assert said == {"asked": how, "align": how, "separable": moves.separable(sides["outside"][np.lexsort(sides["outside"].T[::-1])], sides["cloud"], 1)}
    assert moves.separable(out, sides["cloud"]) < said["separable"] - 0.15 and out.dtype == np.float32
    order = np.random.default_rng(0).permutation(150)
    np.testing.assert_allclose(moves.move(sides["outside"][order], sides["cloud"], how, seed=1)[0], out[order], atol=1e-3)


def test_auto_moves_only_what_is_apart_and_only_as_decided(sides, monkeypatch):
    assert moves.AUTO == "none" and moves.move(sides["outside"], sides["cloud"], "auto")[0] is sides["outside"]
    monkeypatch.setattr(moves, "AUTO", "transport")
    assert moves.move(sides["inside"], sides["cloud"], "auto")[0] is sides["inside"]
    assert moves.move(sides["outside"], sides["cloud"], "auto")[1]["align"] == "transport"
    assert moves.move(sides["outside"][:1], sides["cloud"], "transport")[1] == {"asked": "transport", "align": "none"}


def test_what_harmony_does_to_the_reference_is_taken_back(sides, monkeypatch):
    shift = np.array([5.0, 0, 0, 0], np.float32)
    monkeypatch.setattr(moves, "harmony", lambda Z, labels, seed: Z + shift)
    np.testing.assert_allclose(moves.harmonised(sides["outside"], sides["cloud"]), sides["outside"], atol=1e-5)


def test_a_package_that_is_missing_is_one_line(sides, monkeypatch):
    monkeypatch.setitem(sys.modules, "geomloss", None)
    with pytest.raises(InputError, match="geomloss is not installed") as caught:
        moves.move(sides["outside"], sides["cloud"], "transport")
    assert "\n" not in str(caught.value)


# what a stranger found


def test_values_that_are_no_counts_are_refused_by_name(sources):
    good = {n: t.copy() for n, t in zip(sources.names, sources.tables)}
    for value in (np.nan, -3.0, 0.5):
        bad = dict(good)
        name = list(bad)[1]
        table = bad[name].copy()
        X = np.asarray(table.X.todense() if sp.issparse(table.X) else table.X, dtype=np.float32)
        X[0, :] = value
        X = np.log1p(X) if value == 0.5 else X
        table.X = X
        with pytest.raises(InputError, match=name):
            gather(bad | {name: table})


def test_rows_without_counts_in_the_shared_genes_are_left_out(sources):
    tables = {n: t.copy() for n, t in zip(sources.names, sources.tables)}
    last = list(tables)[-1]
    own = tables[last]
    X = own.X.toarray() if sp.issparse(own.X) else np.array(own.X)
    X[:5, 1:], X[:5, 0] = 0, 3
    own.X = X
    for name in list(tables)[:-1]:
        tables[name] = tables[name][:, 1:].copy()
    with pytest.warns(GearsWarning, match=f"{last}: 5 of {own.n_obs} rows"):
        assert gather(tables).sizes[-1] == own.n_obs - 5


def test_names_settings_and_terms_that_cannot_be_meant(sources):
    a, b = sources.tables[:2]
    for call, words in ((lambda: gather({1: a, "1": b}), "two are called"), (lambda: gather([a, b]), "list"), (lambda: gather({"a": a, "b": b}, taught="a"), "is the text"),
                        (lambda: gather({"a": a, "b": None}), "NoneType"), (lambda: align(sources, "none", term="moment"), "moment"), (lambda: align({"a": a}), "dict"),
                        (lambda: align(sources, "metric", dim=7), "means nothing"), (lambda: align(sources, None), "there is no None"),
                        (lambda: method_of(method_config("cycle", across="source"), sources), "across"), (lambda: moves.move(np.zeros((9, 2)), np.zeros((9, 2)), "foo"), "foo")):
        with pytest.raises(InputError, match=words):
            call()


def test_methods_with_nothing_to_do_say_so(sources):
    slides = gather({n: t for n, t, k in zip(sources.names, sources.tables, sources.kinds) if k == "ST"})
    with pytest.raises(InputError, match="spots from cells"):
        method_of(method_config("contrast_nearest"), slides)
    with pytest.warns(GearsWarning, match="all sources are taught"):
        fit_alignment(slides, smoke("transport_after", slides))


def test_few_rows_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    assert moves.separable(rng.normal(size=(8, 3)) + 9, rng.normal(size=(300, 3))) is None
    assert moves.move(rng.normal(size=(8, 3)) + 9, rng.normal(size=(300, 3)), "auto")[1] == {"asked": "auto", "align": "none", "separable": None}
