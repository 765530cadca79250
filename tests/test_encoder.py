"""encoder: losses in closed form and at their limits, context features, the stem, training, and the adapter."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gears_nb.core.errors import InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.core.store import Store, content_digest
from gears_nb.encoder.adapter import (
    SCAdapter,
    coral,
    finetune,
    matrix_power_psd,
    mmd,
    shrunk_covariance,
)
from gears_nb.encoder.losses import (
    far_pairs,
    off_diagonal_covariance,
    spatial_infonce,
    variance_hinge,
    vicreg,
)
from gears_nb.encoder.model import SharedEncoder, context_features, new_encoder, principal_axes
from gears_nb.encoder.presets import Dealer, Places, Rows, encode, encoder_from, fit_encoder, two_views
from gears_nb.encoder.settings import EncoderConfig
from gears_nb.reconstruct.settings import profile

seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch_rng(seed, "test"))


def tissue(seed: int, n: int = 80, g: int = 12) -> tuple[np.ndarray, np.ndarray]:
    "Centred expression `(n, g)` of smooth waves over the unit square under noise, and positions `(n, 2)`."
    rng = np.random.default_rng(seed)
    place = rng.random((n, 2))
    waves = np.random.default_rng(1).normal(size=(2, g)) * 4
    X = (np.cos(place @ waves) + 0.2 * rng.normal(size=(n, g))).astype(np.float32)
    return X - X.mean(0), place


def config(**changes) -> EncoderConfig:
    small = {"encoder.width": [16], "encoder.dim": 12, "encoder.stem": 6, "encoder.batch": 53, "encoder.epochs": 4}
    return profile("smoke", progress=False, device="cpu", **(small | changes)).encoder


# VICReg ---------------------------------------------------------------------------------------------------------------


def test_vicreg_is_zero_for_equal_spread_and_uncorrelated_views():
    signs = torch.tensor([[a, b, a * b] for a in (-2.0, 2.0) for b in (-2.0, 2.0)])  # orthogonal columns, standard deviation above 1
    terms = vicreg(signs, signs, 25.0, 50.0, 1.0)
    assert all(float(terms[name]) == 0 for name in ("loss", "inv", "var", "cov"))


def test_vicreg_of_a_collapsed_embedding_is_the_full_hinge():
    flat = torch.ones(10, 4)
    terms = vicreg(flat, flat, 25.0, 50.0, 1.0)
    hinge = 2 * (1 - math.sqrt(1e-4))
    assert float(terms["var"]) == pytest.approx(hinge) and float(terms["loss"]) == pytest.approx(50 * hinge)
    assert float(terms["inv"]) == float(terms["cov"]) == 0


def test_copied_dimensions_cost_covariance_in_closed_form():
    z = normal(0, 50, 1)
    variance = float(z.var())
    for d in (2, 3, 5):
        expected = (d * d - d) * variance**2 / d
        assert float(off_diagonal_covariance(z.expand(-1, d))) == pytest.approx(expected)


@given(seeds, st.integers(3, 20), st.integers(2, 6))
def test_vicreg_equals_its_definition_and_weights_are_linear(seed, n, d):
    a, b = normal(seed, n, d), normal(seed + 1, n, d)
    terms = vicreg(a, b, 2.0, 3.0, 5.0, gamma=1.5)
    inv = ((a - b) ** 2).mean()
    var = sum(np.maximum(0, 1.5 - np.sqrt(np.var(z.numpy(), axis=0, ddof=1) + 1e-4)).mean() for z in (a, b))
    cov = 0.0
    for z in (a, b):
        C = np.cov(z.numpy().T)
        cov += sum(C[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    for name, value in {"inv": float(inv), "var": var, "cov": cov}.items():
        assert float(terms[name]) == pytest.approx(value)
    assert float(terms["loss"]) == pytest.approx(2 * float(inv) + 3 * var + 5 * cov)
    assert float(vicreg(b, a, 2.0, 3.0, 5.0, gamma=1.5)["loss"]) == pytest.approx(float(terms["loss"]))


def test_variance_hinge_stops_where_the_spread_is_enough():
    z = normal(0, 30, 3)
    z = z / z.std(0)
    above = (2 * z).clone().requires_grad_()
    below = (0.5 * z).clone().requires_grad_()
    variance_hinge(above).backward()
    variance_hinge(below).backward()
    assert (above.grad == 0).all() and (below.grad != 0).any()


# Spatial InfoNCE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_infonce_of_orthogonal_anchors_has_a_closed_form(temperature):
    n = 5
    far = ~torch.eye(n, dtype=torch.bool)
    eye = torch.eye(n, dtype=torch.float64)
    expected = math.log(1 + (n - 1) * math.exp(-1 / temperature))
    assert float(spatial_infonce(3 * eye, eye, far, temperature)) == pytest.approx(expected)


def test_infonce_limits():
    z, n = normal(0, 6, 3), 6
    far = ~torch.eye(n, dtype=torch.bool)
    assert float(spatial_infonce(z, z, torch.zeros(n, n, dtype=torch.bool))) == 0  # nobody repels
    same = z[:1].expand(n, -1)
    assert float(spatial_infonce(same, same, far)) == pytest.approx(math.log(n))  # collapse: chance level
    assert float(spatial_infonce(z, -z, far)) > float(spatial_infonce(z, z, far))
    assert float(spatial_infonce(7 * z, 0.1 * z, far)) == pytest.approx(float(spatial_infonce(z, z, far)))  # cosine: length is nothing


@given(seeds, st.integers(3, 12))
def test_infonce_equals_plain_loops(seed, n):
    a, p = normal(seed, n, 4), normal(seed + 1, n, 4)
    negatives = normal(seed + 2, n, n) > 0
    cosine = lambda u, v: float(u @ v / u.norm() / v.norm())
    rows = []
    for i in range(n):
        near = math.exp(cosine(a[i], p[i]) / 0.2)
        rows.append(-math.log(near / (near + sum(math.exp(cosine(a[i], a[j]) / 0.2) for j in range(n) if negatives[i, j]))))
    assert float(spatial_infonce(a, p, negatives, 0.2)) == pytest.approx(np.mean(rows))


def test_infonce_sends_no_gradient_to_anchors_that_are_not_negatives():
    a, p = normal(0, 8, 3).requires_grad_(), normal(1, 8, 3)
    negatives = torch.zeros(8, 8, dtype=torch.bool)
    negatives[0, 5] = True
    spatial_infonce(a, p, negatives).backward()
    assert (a.grad[[1, 2, 3, 4, 6, 7]].abs() < 1e-12).all() and (a.grad[[0, 5]].abs().sum(1) > 1e-6).all()


def test_far_pairs_never_cross_slides_and_never_hold_close_spots():
    coords, slide = normal(0, 40, 2), torch.arange(40) % 3
    far = far_pairs(coords, 1.0, slide)
    i, j = far.nonzero(as_tuple=True)
    assert len(i) and (slide[i] == slide[j]).all() and ((coords[i] - coords[j]).norm(dim=1) > 1.0).all()
    assert torch.equal(far, far.T) and not far.diagonal().any()
    assert torch.equal(far_pairs(coords, 1.0), far_pairs(coords, 1.0, torch.zeros(40)))


def dealer(U: list[np.ndarray], coords: list[np.ndarray], settings: EncoderConfig) -> Dealer:
    return Dealer(rows(U), [Places(c, settings.positives) for c in coords], settings)


def rows(U: list[np.ndarray]) -> list[Rows]:
    return [Rows(u, 0.0) for u in U]


def test_pairs_of_a_batch_stay_on_their_slide():
    deal = dealer([np.full((30, 3), s, np.float32) for s in range(3)], [tissue(s, 30)[1] for s in range(3)], config())
    for batch in deal.epoch(torch_rng(0)):
        sizes = [len(p) for p in batch["positive"]]
        assert [len(far) for far in batch["far"]] == sizes and batch["slide"].unique().tolist() == [0, 1, 2]
        for s, (x, positive) in enumerate(zip(batch["x"].split(sizes), batch["positive"])):
            assert (x == s).all() and (positive < len(x)).all()


@pytest.mark.parametrize("n", [4, 12])
def test_a_slide_smaller_than_the_neighbourhood_still_makes_batches(n):
    U, place = tissue(0, n)
    (batch,) = dealer([U], [place], config(**{"encoder.positives": 20})).epoch(torch_rng(0))
    assert batch["x"].shape == (n, 12) and batch["positive"][0].shape == (n,) and batch["far"][0].shape == (n, n)


# context and stem -----------------------------------------------------------------------------------------------------


def test_context_features_are_centred_and_start_with_the_cell_itself():
    X, _ = tissue(0)
    U = context_features(X, 10, own=0.5)
    assert U.shape == (80, 36) and U.dtype == np.float32
    np.testing.assert_allclose(U.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(U[:, :12], 0.5 * X, atol=1e-6)
    assert max(U[:, s : s + 12].var() for s in (12, 24)) < X.var()  # averages are smoother


@given(seeds)
def test_context_features_follow_the_order_of_cells(seed):
    X, _ = tissue(3)
    order = np.random.default_rng(seed).permutation(len(X))
    np.testing.assert_allclose(context_features(X[order], 8), context_features(X, 8)[order], atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_context_features_of_few_cells(n):
    U = context_features(tissue(0)[0][:n], 30)
    assert U.shape == (n, 36) and np.isfinite(U).all()
    np.testing.assert_allclose(U.mean(0), 0, atol=1e-6)


def test_context_is_narrow_in_small_sources():
    X, _ = tissue(0)
    np.testing.assert_array_equal(context_features(X, 30), context_features(X, 5))  # 80 cells allow 5 neighbours
    assert not np.array_equal(context_features(X, 5), context_features(X, 4))


def test_principal_axes_are_orthogonal_scaled_and_signed():
    X, _ = tissue(0)
    mean, axes = principal_axes(X + 3, 5)
    np.testing.assert_allclose(mean, (X + 3).mean(0), atol=1e-5)
    gram = axes.T @ axes
    np.testing.assert_allclose(gram, np.eye(5) * gram[0, 0], atol=1e-5 * gram[0, 0])
    scores = (X + 3 - mean) @ axes
    assert np.square(scores).sum(0).mean() / (len(X) - 1) == pytest.approx(1, rel=1e-4)
    assert (np.diff(scores.var(0)) <= 1e-6).all()
    assert (axes[np.abs(axes).argmax(0), np.arange(5)] > 0).all()


def test_principal_axes_do_not_flip(monkeypatch):
    from sklearn import decomposition

    class Flipped(decomposition.PCA):
        def fit(self, U):
            super().fit(U)
            self.components_ = self.components_ * np.array([[-1], [1], [-1], [-1]])
            return self

    X, _ = tissue(0)
    _, axes = principal_axes(X, 4)
    with monkeypatch.context() as patch:
        patch.setattr(decomposition, "PCA", Flipped)
        assert np.array_equal(principal_axes(X, 4)[1], axes)
    for other in (X, X[::-1].copy(), X + 7):
        np.testing.assert_allclose(principal_axes(other, 4)[1], axes, atol=1e-3)
    assert np.array_equal(principal_axes(X, 4)[1], axes)
    assert principal_axes(X[:4], 9)[1].shape == (12, 3)


# the encoder ----------------------------------------------------------------------------------------------------------


def features(count: int = 2) -> tuple[list[np.ndarray], list[np.ndarray]]:
    made = [tissue(s) for s in range(count)]
    return [context_features(X, 5) for X, _ in made], [place for _, place in made]


def untrained(U: list[np.ndarray], settings: EncoderConfig) -> SharedEncoder:
    mean, axes = map(torch.from_numpy, principal_axes(np.concatenate(U), settings.stem))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_encoder(settings, U[0].shape[1], mean, axes)


def test_encoder_is_a_frozen_stem_beside_a_learned_half():
    U, coords = features()
    for model in (untrained(U, config()), fit_encoder(rows(U), coords, config())[0]):
        H = encode(model, rows(U)[0])
        assert H.shape == (80, 12) and H.dtype == np.float32 and not model.training
        np.testing.assert_allclose(H[:, :6], (U[0] - model.mean.numpy()) @ model.axes.numpy(), atol=1e-5)
        np.testing.assert_allclose(H[:, 6:].mean(1), 0, atol=1e-5)
        np.testing.assert_allclose(H[:, 6:].std(1), 1, atol=1e-3)
        assert {name for name, _ in model.named_parameters()}.isdisjoint({"mean", "axes"})


def test_blocks_do_not_change_embeddings():
    U, _ = features(1)
    model, (table,) = untrained(U, config()), rows(U)
    np.testing.assert_allclose(encode(model, table, block=7), encode(model, table), atol=1e-5)


def test_encoder_survives_the_store(tmp_path):
    U, coords = features()
    model, _ = fit_encoder(rows(U), coords, config(), seed=3)
    Store(tmp_path).save("encoder", {k: v.contiguous() for k, v in model.state_dict().items()}, {})
    again = encoder_from(Store(tmp_path).load("encoder")[0], config(), genes=12)
    assert np.array_equal(encode(again, rows(U)[1]), encode(model, rows(U)[1])) and not again.training


def test_same_seed_same_bits_other_seed_other_bits():
    U, coords = features()
    torch.manual_seed(5)
    first, history = fit_encoder(rows(U), coords, config(), seed=1)
    torch.manual_seed(6)
    again, _ = fit_encoder(rows(U), coords, config(), seed=1)
    other, _ = fit_encoder(rows(U), coords, config(), seed=2)
    digests = [content_digest(m.state_dict()) for m in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(history.rows) == 4 and {"loss", "inv", "var", "cov", "nce"} <= set(history.rows[0])


def test_an_interrupted_encoder_resumes_to_the_same_bits(tmp_path, monkeypatch):
    import gears_nb.encoder.presets as module

    U, coords = features()
    whole, _ = fit_encoder(rows(U), coords, config(), seed=1)
    right, calls = module.encoder_loss, []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 8:  # in the third epoch of three steps
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(module, "encoder_loss", breaks)
    with pytest.raises(KeyboardInterrupt):
        fit_encoder(rows(U), coords, config(), seed=1, checkpoint=tmp_path / "encoder", tag="a")
    monkeypatch.setattr(module, "encoder_loss", right)
    resumed, history = fit_encoder(rows(U), coords, config(), seed=1, checkpoint=tmp_path / "encoder", tag="a")
    assert history.resumed_from == 2 and content_digest(resumed.state_dict()) == content_digest(whole.state_dict())


def test_a_checkpoint_of_other_data_is_not_taken_over(tmp_path):
    U, coords = features()
    fit_encoder(rows(U), coords, config(), seed=1, checkpoint=tmp_path / "encoder", tag="a")
    turned = [c[::-1].copy() for c in coords]
    with pytest.raises(InputError):
        fit_encoder(rows(U), turned, config(), seed=1, checkpoint=tmp_path / "encoder", tag="b")


def test_training_only_uses_distances_between_spots_of_a_slide():
    U, coords = features()
    first, _ = fit_encoder(rows(U), coords, config(), seed=1)
    moved, _ = fit_encoder(rows(U), [coords[0] * 4, coords[1] * 0.5], config(), seed=1)  # powers of two: exact in floating point
    assert content_digest(first.state_dict()) == content_digest(moved.state_dict())


def test_training_brings_physical_neighbours_together():
    U, coords = features()
    settings = config(**{"encoder.epochs": 50, "encoder.lr": 3e-3})

    def meeting(model: SharedEncoder) -> float:
        z = nn.functional.normalize(torch.from_numpy(encode(model, rows(U)[0])[:, 6:]), dim=1)
        return float((z[:, None] * z[Places(coords[0], 5).near]).sum(-1).mean() - (z @ z.T).mean())

    trained, history = fit_encoder(rows(U), coords, settings, seed=0)
    assert meeting(trained) > meeting(untrained(U, settings)) + 0.03
    assert history.rows[-1]["nce"] < 0.9 * history.rows[0]["nce"]


def test_a_view_without_augmentation_is_the_input():
    U = torch.from_numpy(features(1)[0][0])
    off = {"encoder.gene_dropout": 0.0, "encoder.gene_gain": 0.0, "encoder.scale_jitter": 0.0, "encoder.noise": 0.0}
    view = lambda slide=None, **on: two_views(U, config(**(off | {f"encoder.{k}": v for k, v in on.items()})), 1.0, torch_rng(0), slide)
    assert torch.allclose(view(), U.repeat(2, 1))
    assert (view(gene_dropout=1.0) == 0).float().mean() > 0.98
    one = view(gene_dropout=0.5) == 0
    assert torch.equal(one[:, :12], one[:, 12:24]) and torch.equal(one[:, :12], one[:, 24:])  # a gene is lost at all ranges at once
    gain = (view(torch.arange(80) % 2, gene_gain=0.3) / U.repeat(2, 1)).nan_to_num(1.0)
    torch.testing.assert_close(gain[:80:2], gain[:1].expand(40, -1), rtol=1e-3, atol=1e-3)  # one gain per gene, slide and view
    assert not torch.allclose(gain[0], gain[1], atol=0.05) and not torch.allclose(gain[0], gain[80], atol=0.05)
    torch.testing.assert_close(gain[0, :12], gain[0, 12:24], rtol=1e-3, atol=1e-3)


# the adapter ----------------------------------------------------------------------------------------------------------


def clouds(n: int = 300, m: int = 260, d: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    sc = (normal(0, n, d) @ normal(1, d, d) + 3).float()
    return sc, (normal(2, m, d) @ normal(3, d, d) - 1).float()


def test_an_adapter_starts_as_the_identity():
    sc, _ = clouds()
    assert torch.equal(SCAdapter(4)(sc), sc)


def test_whitening_and_colouring_maps_mean_and_covariance_exactly():
    sc, st_ = clouds()
    moved = SCAdapter(4).solve(sc, st_, shrink=0.0)(sc).detach().double()
    scale = float(torch.cov(st_.double().T).abs().max())
    assert (torch.cov(moved.T) - torch.cov(st_.double().T)).abs().max() < 1e-4 * scale
    assert (moved.mean(0) - st_.double().mean(0)).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("shrink", [0.02, 0.5])
def test_with_shrinkage_the_shrunk_covariances_are_mapped(shrink):
    sc, st_ = clouds()
    W = SCAdapter(4).solve(sc, st_, shrink).W.detach().double()
    wanted = shrunk_covariance(st_, shrink)
    assert (W @ shrunk_covariance(sc, shrink) @ W.T - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_cloud_that_fits_already_is_left_alone():
    sc, _ = clouds()
    fitted = SCAdapter(4).solve(sc, sc)
    assert (fitted.W - torch.eye(4)).abs().max() < 1e-5 and fitted.b.abs().max() < 1e-4


def test_matrix_powers():
    C = shrunk_covariance(clouds()[0])
    half = matrix_power_psd(C, 0.5)
    assert torch.allclose(half @ half, C) and torch.allclose(half, half.T)
    assert torch.allclose(matrix_power_psd(C, -0.5) @ half, torch.eye(4, dtype=torch.float64))


def test_coral_and_mmd_are_zero_for_equal_clouds_and_positive_else():
    sc, st_ = clouds()
    for distance in (coral, mmd):
        assert abs(float(distance(sc, sc))) < 1e-6
        assert abs(float(distance(sc, sc.flip(0)))) < 1e-5 * float(distance(sc, st_)) + 1e-6
        assert float(distance(sc, st_)) > 1e-3
        assert float(distance(sc, st_)) == pytest.approx(float(distance(st_, sc)), rel=1e-4)
    assert abs(float(coral(sc, sc + 5))) < 1e-6 and float(mmd(sc, sc + 5)) > 0.1  # only the second sees a shift
    assert float(mmd(sc, sc + 5)) > float(mmd(sc, sc + 1)) > 0


def test_coral_in_closed_form():
    A = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # covariances diag(2, 0) and diag(0, 2)
    assert float(coral(A, A.flip(1))) == pytest.approx((4 + 4) / 16)


def test_finetuning_helps_repeats_and_touches_neither_cloud():
    sc, st_ = clouds()
    before = content_digest(sc, st_)
    runs = []
    for seed in (0, 0, 1):
        adapter = SCAdapter(4)
        adapter.b.data += 2.0
        losses = finetune(adapter, sc, st_, steps=40, lr=0.05, batch=64, seed=seed)
        runs.append((adapter.W.detach().clone(), losses))
    assert content_digest(sc, st_) == before and sc.grad is None and st_.grad is None
    assert np.mean(runs[0][1][-5:]) < 0.7 * np.mean(runs[0][1][:5])
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])
