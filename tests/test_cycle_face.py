"""cycle: `CycleAE` from file to answer: the same from any source, counterfactuals and contributions that add up, warnings, kept models, and what is refused."""
from __future__ import annotations

import functools
import json
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.store import Store, content_digest
from gears_nb.cycle import cycle
from gears_nb.cycle.chunks import open_chunks, write_chunks
from gears_nb.cycle.contributions import Parts, draw_cell, influence, leading_genes, show_cell, ways
from gears_nb.cycle.cycle import CYCLE_FORMAT, CycleAE, load, save
from gears_nb.cycle.fields import Field, prepare
from gears_nb.cycle.settings import SOURCE
from gears_nb.cycle.simulator import simulate_contexts
from gears_nb.data.preprocess import normalise

FIELDS = ["assay", "type", "donor"]
GAP = ({"assay": "assay 2", "type": "type 3"},)


@functools.lru_cache
def simulated(noise="log", seed=1, n=600, genes=40, **more):
    return simulate_contexts(n_cells=n, n_genes=genes, seed=seed, noise=noise, depth=150.0, **{"missing": GAP} | more)


def new(seed=0, **changes):
    return CycleAE("smoke", seed=seed, progress=False, **{"cells.chunk": 250} | changes)


@functools.lru_cache
def fitted(noise="log", **changes):
    return new(**changes).fit(simulated(noise)[0], FIELDS)


def quiet(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GearsWarning)
        return call()


def same(a, b):
    return all(torch.equal(v, b.fitted.net.state_dict()[k]) for k, v in a.fitted.net.state_dict().items())


def refused(call, *said):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and "Remedy: " in text and all(word in text for word in said), text


# fitting


def test_the_same_from_a_table_a_file_chunks_and_a_chunk_set(tmp_path):
    adata, model = simulated()[0], fitted()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    write_chunks(adata, tmp_path / "chunks", 250)
    for source in (tmp_path / "cells.h5ad", str(tmp_path / "chunks"), open_chunks(adata, 250)):
        assert same(new().fit(source, FIELDS), model)
    found = prepare(open_chunks(adata, 250), FIELDS, n_genes=200)
    assert same(new().fit(adata, prepared=found), model)
    refused(lambda: new().fit(adata, FIELDS, prepared=found), "fields", "given twice")
    refused(lambda: new().fit(adata[:, :30].copy(), prepared=found), "30 genes, prepared were 40")


def test_seeds():
    adata = simulated()[0]
    assert same(new().fit(adata, FIELDS), fitted()) and not same(new(seed=1).fit(adata, FIELDS), fitted())
    for seed in (-1, 2**32, 1.0, "0"):
        refused(lambda seed=seed: CycleAE(seed=seed), "seed")


def test_the_users_table_is_not_touched():
    adata = simulated("counts")[0].copy()
    before = content_digest(adata, [list(adata.obs[name]) for name in adata.obs])
    model = new().fit(adata, FIELDS)
    model.counterfactual(adata[:20], {"donor": "donor 1"}), model.contributions(adata[:20])
    assert content_digest(adata, [list(adata.obs[name]) for name in adata.obs]) == before and list(adata.obs) == FIELDS and not adata.layers


def test_a_run_goes_on_where_it_was(tmp_path):
    adata = simulated()[0]
    whole = new(**{"cells.checkpoint": 200}).fit(adata, FIELDS)
    new(**{"cells.checkpoint": 200}).fit(adata, FIELDS, checkpoint=tmp_path / "run")
    again = new(**{"cells.checkpoint": 200}).fit(adata, FIELDS, checkpoint=tmp_path / "run")
    other = new(**{"cells.checkpoint": 200, "cells.workers": 1}).fit(adata, FIELDS, checkpoint=tmp_path / "run")  # other readers, the same run
    assert same(whole, again) and same(whole, other) and len(whole.fitted.history) == 6 and [r["loss"] for r in again.fitted.history] == [r["loss"] for r in whole.fitted.history]
    changed = adata.copy()
    changed.X[3, 4] += 1
    refused(lambda: new(**{"cells.checkpoint": 200}).fit(changed, FIELDS, checkpoint=tmp_path / "run"), "another tag")


@pytest.mark.parametrize("kind", ["npz", "h5ad"])
def test_a_mended_data_set_is_not_continued(tmp_path, kind):
    """Labels that were shifted by a row are put right: files of the same names and sizes, and yet other data."""
    adata, home = simulated()[0], tmp_path / "data"
    wrong = adata.copy()
    wrong.obs = wrong.obs.iloc[np.roll(np.arange(len(wrong)), 1)].set_index(adata.obs_names)
    place = home if kind == "npz" else tmp_path / "data.h5ad"
    for n, data in enumerate((wrong, adata)):
        if kind == "npz":
            shutil.rmtree(home, ignore_errors=True)
            write_chunks(data, home, 200)
        else:
            data.write_h5ad(place)
        if n:
            refused(lambda: new().fit(place, FIELDS, checkpoint=tmp_path / "run"), "another tag")
        else:
            new().fit(place, FIELDS, checkpoint=tmp_path / "run")


def test_contexts_of_other_cells_are_refused():
    adata = simulated()[0]
    other = adata[adata.obs["donor"] != "donor 1"].copy()
    refused(lambda: new(check=False).fit(adata, prepared=prepare(open_chunks(other), FIELDS)), "donor")
    most = adata[:-1].copy()
    refused(lambda: new(check=False).fit(most, prepared=prepare(open_chunks(adata), FIELDS)), "field 'assay'", "where contexts were found")


def test_names_that_answers_need_are_no_fields():
    adata = simulated()[0].copy()
    for name in ("base", "residual", "contexts_apart", "own_unknown", "type_before", "a/b"):
        adata.obs[name] = adata.obs["type"].to_numpy()
        refused(lambda name=name: new().fit(adata, ["assay", name]), name, "rename the column")


def test_fields_that_cannot_be_told_apart_are_told_and_get_nothing():
    adata = simulated()[0].copy()
    adata.obs["sex"] = np.where(adata.obs["type"].isin(["type 1", "type 2"]), "f", "m")
    with pytest.warns(GearsWarning, match="effects of sex cannot be told from those of type, where they are left"):
        model = new(**{"train.epochs": 3}).fit(adata, [*FIELDS, "sex"])
    table = model.contributions(adata[:50])
    assert table.obsm["norms"]["sex"].max() == 0 < table.obsm["norms"]["type"].min() and "sex" in table.uns["cycle"]["confounded"][0]


def test_contexts_that_do_not_add_up_are_told_at_the_fit_and_at_every_answer():
    adata = simulated(n=1200, missing=(), interaction=0.4)[0]
    with pytest.warns(GearsWarning, match="Additivity fails"):
        model = new(**{"train.epochs": 1}).fit(adata, FIELDS)
    assert model.fitted.adds_up is False
    with pytest.warns(GearsWarning, match="Additivity fails"):
        model.counterfactual(adata[:10], {"assay": "assay 1"})
    silent = new(check=False, **{"train.epochs": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert silent.fit(adata, FIELDS).fitted.adds_up is None and silent.fitted.additivity == ""
    assert fitted().fitted.adds_up is True and "Additivity holds" in fitted().fitted.additivity


def test_the_sources_recipe_runs_through_the_same_code():
    model = new(**SOURCE).fit(simulated()[0], FIELDS)
    row = model.fitted.history[-1]
    assert {"cycle", "integration", "target", "classifier.loss"} <= set(row) and not {"reconstruction", "spread"} & set(row)
    assert not model.fitted.net.generator.intercept.any() and model.fitted.net.generator.scale == 0.0159
    made = quiet(lambda: model.counterfactual(simulated()[0][:30], {"assay": "assay 1"}, "generated"))
    assert np.array_equal(made.X, made.layers["generated"]) and made.uns["cycle"]["mode"] == "generated"


def test_without_epochs_the_model_is_the_closed_form():
    adata = simulated()[0]
    model = new(**{"train.epochs": 0}).fit(adata, FIELDS)
    own = model.fitted.prepared.encode(adata.obs)
    to = own.copy()
    to[:, 2] = 2
    moved = quiet(lambda: model.counterfactual(adata, {"donor": "donor 2"}))
    additive = model.fitted.additive
    assert np.allclose(moved.layers["difference"], additive.predict(to) - additive.predict(own), atol=1e-4)


# counterfactuals


def test_kept_is_the_cell_plus_a_difference_and_generated_is_the_sum_alone():
    adata, model = simulated()[0][:80], fitted()
    kept = quiet(lambda: model.counterfactual(adata, {"assay": "assay 2", "donor": "donor 1"}))
    generated = quiet(lambda: model.counterfactual(adata, {"assay": "assay 2", "donor": "donor 1"}, "generated"))
    assert np.allclose(kept.X, adata[:, kept.var_names].X + kept.layers["difference"], atol=1e-5) and np.array_equal(generated.X, kept.layers["generated"])
    parts = model.contributions(adata, parts=True)
    own = parts.var["intercept"].to_numpy() + sum(parts.layers[name] for name in ("base", *FIELDS))
    assert np.allclose(kept.X - kept.layers["generated"], parts.X - own, atol=1e-4)  # the residual stays
    assert set(kept.obs["assay"]) == {"assay 2"} and kept.obs["assay_before"].tolist() == adata.obs["assay"].tolist() and kept.obs["type"].tolist() == adata.obs["type"].tolist()
    assert kept.obs_names.equals(adata.obs_names) and kept.X.dtype == np.float32


def test_there_and_back_and_nowhere_with_effects_alone():
    adata, model = simulated()[0][:60], new(**{"train.epochs": 0}).fit(simulated()[0], FIELDS)
    here = adata[adata.obs["donor"] == "donor 1"].copy()
    stays = quiet(lambda: model.counterfactual(here, {"donor": "donor 1"}))
    assert not stays.layers["difference"].any() and np.allclose(stays.X, here[:, stays.var_names].X, atol=1e-6)
    gone = quiet(lambda: model.counterfactual(here, {"donor": "donor 3"}))
    back = quiet(lambda: model.counterfactual(AnnData(gone.X, obs=gone.obs[FIELDS].copy(), var=gone.var), {"donor": "donor 1"}))
    assert np.allclose(back.X, stays.X, atol=1e-4)


def test_counts_are_scaled_as_in_training_and_do_not_fall_below_zero():
    adata, model = simulated("counts")[0], fitted("counts")
    made = quiet(lambda: model.counterfactual(adata[:100], {"type": "type 2"}))
    scaled = normalise(adata.X, model.fitted.prepared.target_sum)[:100].toarray()[:, model.fitted.prepared.columns]
    assert np.allclose(made.X, np.maximum(scaled + made.layers["difference"], 0), atol=1e-5) and made.X.min() == 0 and (scaled + made.layers["difference"]).min() < 0


def test_order_and_blocks_of_cells_and_genes_do_not_matter(monkeypatch):
    adata, model = simulated("counts")[0][:120], fitted("counts")
    ask = lambda cells: quiet(lambda: model.counterfactual(cells, {"assay": "assay 1"}))
    made = ask(adata)
    assert np.allclose(ask(adata[::-1, ::-1].copy())[made.obs_names].X, made.X, atol=1e-5)
    more = AnnData(sp.hstack([adata.X, sp.csr_matrix(np.ones((120, 1), np.float32))]).tocsr(), obs=adata.obs.copy(), var=pd.DataFrame(index=[*adata.var_names, "other"]))
    assert np.allclose(ask(more).X, made.X, atol=1e-5)  # a gene that the model does not know counts for nothing
    monkeypatch.setattr("gears_nb.cycle.contributions.BLOCK", 7)
    assert np.allclose(ask(adata).X, made.X, atol=1e-5)


def test_a_gene_that_only_counts_into_totals_may_be_missing():
    adata = simulated("counts")[0].copy()
    model = new(**{"cells.n_genes": 20}).fit(adata, FIELDS)
    spare = next(name for name in adata.var_names if name not in model.fitted.prepared.genes)
    few = adata[:30, adata.var_names != spare].copy()
    with pytest.warns(GearsWarning, match="1 of 40 genes are missing that the model does not need"):
        made = model.counterfactual(few, {"donor": "donor 1"})
    assert made.shape == (30, 20)
    refused(lambda: model.counterfactual(few[:, [n for n in few.var_names if n != model.fitted.prepared.genes[0]]].copy(), {"donor": "donor 1"}), "1 of the model's 20 genes are missing", model.fitted.prepared.genes[0])


def test_a_cell_whose_own_category_is_unknown_is_told_when_it_moves():
    adata = simulated()[0][:60].copy()
    adata.obs["donor"] = adata.obs["donor"].astype(object).where(np.arange(60) >= 5, None)
    with pytest.warns(GearsWarning, match="own donor of 5 of 60 cells is unknown"):
        moved = fitted().counterfactual(adata, {"donor": "donor 2"})
    assert moved.obs["own_unknown"].tolist() == [True] * 5 + [False] * 55
    assert not quiet(lambda: fitted().counterfactual(adata, {"assay": "assay 1"})).obs["own_unknown"].any()


def test_a_pooled_category_is_no_place_to_go_and_words_are_forgiving():
    adata = simulated()[0].copy()
    few = adata.obs["type"].astype(str)
    few.iloc[:3], few.iloc[3:6] = "type 8", "type 9"
    adata.obs["type"] = few
    model = quiet(lambda: new(**{"train.epochs": 1}).fit(adata, FIELDS))
    refused(lambda: model.counterfactual(adata[:9].copy(), {"type": "type 8"}), "type 8", "pooled", "cells.rare")
    assert quiet(lambda: model.counterfactual(adata[:9].copy(), {"type": " type  2 "})).obs["type"].unique().tolist() == ["type 2"]


def test_answers_read_a_layer_and_say_their_unit():
    adata = simulated("counts")[0].copy()
    model, wanted = fitted("counts"), quiet(lambda: fitted("counts").counterfactual(adata, {"assay": "assay 1"}))
    adata.layers["counts"], adata.X = adata.X.copy(), normalise(adata.X)
    found = quiet(lambda: model.counterfactual(adata, {"assay": "assay 1"}, layer="counts"))
    assert np.array_equal(found.X, wanted.X) and found.uns["cycle"]["target_sum"] == model.fitted.prepared.target_sum > 0
    assert model.contributions(adata, layer="counts").uns["cycle"]["target_sum"] == found.uns["cycle"]["target_sum"]


def test_combinations_never_seen_are_named_with_the_nearest_one():
    adata, model = simulated()[0], fitted()
    cells = adata[(adata.obs["assay"] == "assay 1")].copy()
    with pytest.warns(GearsWarning, match=r"never seen together: assay=assay 2, type=type 3 \(nearest trained: .*\); (\d+) of"):
        made = model.counterfactual(cells, {"assay": "assay 2"})
    assert ((made.obs["contexts_apart"] > 0) == (made.obs["type"] == "type 3")).all() and set(made.obs["contexts_apart"]) == {0, 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", GearsWarning)
        assert not model.counterfactual(cells, {"donor": "donor 2"}).obs["contexts_apart"].any()


def test_moved_cells_lie_on_the_planted_ones():
    adata, truth = simulated()
    model = new(**{"train.epochs": 10}).fit(adata, FIELDS)
    rows = np.flatnonzero(adata.obs["assay"] == "assay 1")
    made = quiet(lambda: model.counterfactual(adata[rows].copy(), {"assay": "assay 2"}))
    planted, table = truth.effects["assay"][1] - truth.effects["assay"][0], model.fitted.additive.effects[0]
    error = lambda difference: np.sqrt(np.square(difference - planted).mean())
    assert error(made.layers["difference"]) < 1.1 * error(table[2] - table[1]) < 0.25 * error(0)
    never = (made.obs["contexts_apart"] > 0).to_numpy()  # no worse where nobody was seen
    assert error(made.layers["difference"][never]) < 1.1 * error(table[2] - table[1])


# contributions


def test_contributions_add_up_and_are_centred():
    adata, model = simulated()[0], fitted()
    table = model.contributions(adata, parts=True)
    assert all(np.abs(table.layers[name].mean(0)).max() < 1e-3 for name in FIELDS)  # over the training cells
    own = table.var["intercept"].to_numpy() + sum(table.layers[name] for name in ("base", *FIELDS))
    norms = table.obsm["norms"]
    assert list(norms) == ["base", *FIELDS, "residual"] and np.allclose(np.linalg.norm(table.X - own, axis=1), norms["residual"], rtol=1e-3, atol=1e-3)
    assert np.allclose(np.linalg.norm(table.layers["type"], axis=1), norms["type"], rtol=1e-4)
    effects = table.varm["effects_type"]
    assert list(effects) == [f"type {i}" for i in range(1, 5)] and np.allclose(effects["type 2"], table.layers["type"][(table.obs["type"] == "type 2").to_numpy()].mean(0), atol=1e-3)
    assert list(table.uns["cycle"]["influence"].index) == ["all", *table.var_names] and table.uns["cycle"]["influence"].loc["all"].between(0, 1).all()
    small = model.contributions(adata[:9])
    assert not small.layers and np.allclose(small.obsm["norms"], norms[:9], atol=1e-4)


def test_a_category_that_was_not_seen_contributes_nothing():
    adata, model = simulated()[0][:40].copy(), fitted(**{"net.start": "random"})
    adata.obs["donor"] = "somebody"
    refused(lambda: model.contributions(adata), "row 0", "donor", "somebody")
    table = model.contributions(adata, unknown="pool", parts=True)
    assert not table.layers["donor"].any() and set(table.obs["donor"]) == {"unknown"} and table.layers["type"].any()
    made = quiet(lambda: model.counterfactual(adata, {"donor": "donor 1"}, unknown="pool"))
    assert set(made.obs["donor_before"]) == {"unknown"} and made.layers["difference"].any()


def test_parts_of_a_cell_by_hand():
    parts = Parts(np.array([[5.0, 1]]), np.array([3.0, 2]), np.array([[1.0, 0]]), np.array([[[0.6, -0.8]], [[0.0, 0]]]), np.array([[[0.0, 0]], [[0.0, 2]]]))
    assert np.allclose(parts.norms, [[1, 1, 0, np.sqrt(0.2)]]) and np.allclose(parts.generated + parts.residual, parts.x + parts.difference)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12))
def test_leading_genes_are_the_largest(seed, categories, genes, top):
    effects = np.random.default_rng(seed).normal(size=(categories, genes))
    effects[0, 0] = 0
    table = leading_genes(effects, [f"c{i}" for i in range(categories)], [f"g{j}" for j in range(genes)], top)
    for i in range(categories):
        own = table[table["category"] == f"c{i}"]
        assert len(own) == min(top, np.count_nonzero(effects[i])) and np.allclose(own["effect"].abs(), np.sort(np.abs(effects[i][effects[i] != 0]))[::-1][:top])
        assert all(effects[i, int(g[1:])] == e for g, e in zip(own["gene"], own["effect"])) and own["rank"].tolist() == list(range(1, len(own) + 1))


def test_influence_is_the_share_of_variance_of_a_balanced_design():
    rng = np.random.default_rng(0)
    labels = np.stack(np.meshgrid(range(2), range(3), range(50), indexing="ij"), -1).reshape(-1, 3)[:, :2]
    planted = [rng.normal(size=(c, 6)) for c in (2, 3)]
    planted = [e - e.mean(0) for e in planted]
    x = sum(e[column] for e, column in zip(planted, labels.T)) + rng.normal(size=(300, 6))
    table = influence(planted, [np.bincount(column) for column in labels.T], x.var(0), ["a", "b"])
    for f, name in enumerate("ab"):
        assert np.allclose(table[name][1:], planted[f][labels[:, f]].var(0) / x.var(0)) and np.isclose(table[name][0], planted[f][labels[:, f]].var(0).sum() / x.var(0).sum())
    assert not influence([np.zeros((2, 1))], [(1, 1)], np.zeros(1), ["a"]).to_numpy().any()


def test_a_figure_of_a_cell_shows_parts_that_end_at_its_value():
    table = fitted().contributions(simulated()[0][:5], parts=True)
    figure = show_cell(table, table.obs_names[2], top=3)
    left, right = figure.axes
    widths = [bar.get_width() for bar in left.patches][::-1]
    assert np.allclose(widths, table.obsm["norms"].iloc[2], rtol=1e-3)
    genes = [label.get_text() for label in right.get_yticklabels()]
    dots = {place: x for line in right.lines if line.get_marker() == "." for x, place in [(line.get_xdata()[0], line.get_ydata()[0])]}
    assert np.allclose([dots[i] for i in range(3)], table[2, genes].X[0], atol=1e-3)
    refused(lambda: show_cell(fitted().contributions(simulated()[0][:5]), 0), "layers", "parts=True")
    refused(lambda: show_cell(table, "nobody"), "'nobody' is not among the 5 cells")
    many = Parts(np.ones((1, 3)), np.zeros(3), np.zeros((1, 3)), np.ones((12, 1, 3)), np.ones((12, 1, 3)))
    assert len(draw_cell(many, 0, [str(i) for i in range(12)], list("abc"), ["x"] * 12).axes[0].patches) == 14


def test_ways_ignore_what_was_never_trained():
    net = fitted().fitted.net.generator
    fields = tuple(replace(field, counts=(0, *field.counts[1:])) for field in fitted().fitted.prepared.fields)
    own = np.array([[0, 1, 1], [1, 0, 1]])
    parts = ways(net, np.ones((2, net.gauge.shape[1]), np.float32), own, own, fields)
    assert not parts.own[0, 0].any() and not parts.own[1, 1].any() and parts.own[2].any() and isinstance(fields[0], Field)


# kept models


def test_saved_and_read_gives_the_same_bits(tmp_path):
    model, adata = fitted("counts"), simulated("counts")[0][:50]
    assert save(model, tmp_path / "model") == tmp_path / "model"
    back = load(tmp_path / "model")
    assert same(model, back) and back.config == model.config and back.seed == model.seed and back.fitted.additivity == model.fitted.additivity
    assert back.fitted.history == model.fitted.history and back.fitted.prepared.digest == model.fitted.prepared.digest
    ask = lambda m: quiet(lambda: m.counterfactual(adata, {"donor": "donor 2"}).X)
    assert np.array_equal(ask(back), ask(model))
    assert all(np.array_equal(a, b) for a, b in zip(back.fitted.effects, model.fitted.effects)) and np.array_equal(back.fitted.additive.predict(np.ones((1, 3), int)), model.fitted.additive.predict(np.ones((1, 3), int)))
    assert {p.suffix for p in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    pickle.dumps(back.fitted.prepared)


def test_what_is_no_model_is_refused(tmp_path):
    model = fitted()
    refused(lambda: load(tmp_path), "holds no saved CycleAE")
    refused(lambda: save(new(), tmp_path / "never"), "is not fitted")
    assert not (tmp_path / "never").exists()
    for case in ("format", "cut", "other contexts", "edited"):
        folder = save(model, tmp_path / case)
        if case == "format":
            tensors, about = Store(folder).load("cycle")
            Store(folder).save("cycle", tensors, about | {"format": CYCLE_FORMAT + 1})
            refused(lambda folder=folder: load(folder), "format", f"is {CYCLE_FORMAT + 1}")
        elif case == "cut":
            data = next(p for p in folder.iterdir() if p.name.startswith("cycle.") and p.suffix == ".safetensors")
            data.write_bytes(data.read_bytes()[:-9])
            refused(lambda folder=folder: load(folder), "damaged")
        elif case == "other contexts":
            for path in save(fitted("counts"), tmp_path / "counts").glob("contexts*"):
                shutil.copy(path, folder)
            refused(lambda folder=folder: load(folder), "contexts.json", "does not belong to this model")
        else:
            record = folder / "cycle.json"
            entry = json.loads(record.read_text())
            entry["meta"]["seed"] = 5
            record.write_text(json.dumps(entry))
            refused(lambda folder=folder: load(folder), "edited")


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    folder = save(fitted(), tmp_path / "model")
    monkeypatch.setattr(cycle, "_packed", lambda net: {}["no"])
    with pytest.raises(KeyError):
        save(fitted("counts"), folder)
    assert same(load(folder), fitted())


# what is refused


def lonely(adata):
    out = adata.copy()
    out.X[3] = 0
    return out


def without(adata, column):
    out = adata.copy()
    del out.obs[column]
    return out


WRONG = {
    "field": (lambda m, a: m.counterfactual(a, {"organ": "liver"}), ("field 'organ'", "choose among assay, type, donor")),
    "category": (lambda m, a: m.counterfactual(a, {"assay": "assay 22"}), ("assay 'assay 22'", "did you mean 'assay 2'?")),
    "unknown": (lambda m, a: m.counterfactual(a, {"assay": "unknown"}), ("has no training cells",)),
    "nothing": (lambda m, a: m.counterfactual(a, {}), ("name contexts",)),
    "words": (lambda m, a: m.counterfactual(a, "assay 2"), ("name contexts",)),
    "mode": (lambda m, a: m.counterfactual(a, {"assay": "assay 2"}, "half"), ("mode", "kept or generated")),
    "empty cell": (lambda m, a: m.counterfactual(lonely(a), {"assay": "assay 2"}), ("cell 'cell 4'", "no counts", "1 such cells")),
    "column": (lambda m, a: m.counterfactual(without(a, "donor"), {"assay": "assay 2"}), ("column 'donor'", "absent")),
    "counts": (lambda m, a: m.counterfactual(simulated("counts")[0][:9], {"assay": "assay 2"}), ("look like counts",)),
    "genes": (lambda m, a: m.contributions(a[:, 3:].copy()), ("3 of the model's 40 genes are missing", "gene 1, gene 2, gene 3")),
    "path": (lambda m, a: m.contributions("nowhere.h5ad"), ("nowhere.h5ad", "does not exist")),
    "source": (lambda m, a: m.contributions(3), ("source", "int")),
    "negative": (lambda m, a: m.contributions(AnnData(-a.X, obs=a.obs, var=a.var)), ("row 0, gene 'gene 1'", "negative")),
    "setting": (lambda m, a: CycleAE(**{"loss.targett": 1.0}), ("loss.targett", "loss.target")),
    "profile": (lambda m, a: CycleAE("huge"), ("profile", "'huge' is unknown")),
    "not fitted": (lambda m, a: CycleAE().counterfactual(a, {"assay": "assay 2"}), ("is not fitted",)),
    "fractions": (lambda m, a: fitted("counts").contributions(a), ("fractions", "counts")),
    "no field": (lambda m, a: new().fit(a, ["organ"]), ("organ",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case):
    call, said = WRONG[case]
    refused(lambda: call(fitted(), simulated()[0][:20].copy()), *said)


@settings(max_examples=8)
@given(st.data())
def test_any_combination_can_be_asked_for(data):
    model, adata = fitted(), simulated()[0]
    to = {field.name: data.draw(st.sampled_from(field.categories[1:])) for field in model.fitted.prepared.fields if data.draw(st.booleans())} or {"donor": "donor 1"}
    made = quiet(lambda: model.counterfactual(adata[:25], to))
    own = model.fitted.prepared.encode(made.obs[FIELDS])
    assert all((made.obs[name] == word).all() for name, word in to.items()) and np.isfinite(made.X).all()
    assert made.obs["contexts_apart"].tolist() == model.fitted.prepared.distance(own).tolist()


def test_a_file_is_asked_about_like_a_table(tmp_path):
    adata = simulated()[0][:30].copy()
    adata.write_h5ad(tmp_path / "new.h5ad")
    assert np.array_equal(fitted().contributions(Path(tmp_path / "new.h5ad")).obsm["norms"], fitted().contributions(adata).obsm["norms"])
