"""alignment: distances between clouds, the adversary's gradients, slide scale, and maps that make slides equal."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.errors import InputError
from gears_nb.core.seeding import torch_rng
from gears_nb.encoder import adapter
from gears_nb.encoder.alignment import (
    DomainCritic,
    adversary_loss,
    conditional_coral_map,
    coral,
    coral_map,
    harmony,
    matrix_power_psd,
    mmd,
    reverse_gradient,
    sinkhorn,
    slide_scale,
)

seeds = st.integers(0, 2**32 - 1)
DISTANCES = {"coral": coral, "mmd": mmd, "sinkhorn": sinkhorn}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch_rng(seed, "test"))


def slides(seed: int, sizes: tuple[int, ...] = (40, 60, 90), d: int = 4) -> tuple[np.ndarray, np.ndarray]:
    "Clouds of different means and full covariances, rows shuffled."
    rng = np.random.default_rng(seed)
    Z = np.concatenate([rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3 * rng.normal(size=d) for n in sizes])
    labels, order = np.repeat([f"s{i}" for i in range(len(sizes))], sizes), rng.permutation(sum(sizes))
    return Z[order], labels[order]


# distances ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTANCES)
@given(seed=seeds, n=st.integers(3, 25), d=st.integers(1, 5))
def test_a_distance_is_zero_for_equal_samples_in_any_order(name, seed, n, d):
    A = normal(seed, n, d)
    shuffled = A[torch.randperm(n, generator=torch_rng(seed))]
    assert abs(float(DISTANCES[name](A, A))) < 1e-9
    assert abs(float(DISTANCES[name](A, shuffled))) < 1e-9


@pytest.mark.parametrize("name", DISTANCES)
@given(seed=seeds, n=st.integers(12, 30), m=st.integers(12, 30), d=st.integers(1, 4))
def test_a_distance_is_positive_otherwise_and_symmetric(name, seed, n, m, d):
    A, B = normal(seed, n, d), 2 * normal(seed + 1, m, d) + 1
    ab, ba = float(DISTANCES[name](A, B)), float(DISTANCES[name](B, A))
    assert ab > 1e-6 and ab == pytest.approx(ba, rel=1e-6)


@given(seeds, st.integers(2, 6))
def test_coral_equals_its_definition_and_ignores_shifts(seed, d):
    A, B = normal(seed, 20, d), normal(seed + 1, 30, d) * 2
    expected = ((np.cov(A.numpy().T) - np.cov(B.numpy().T)) ** 2).sum() / (4 * d * d)
    assert float(coral(A + 7, B)) == pytest.approx(expected)


def test_mmd_equals_plain_loops_with_the_median_bandwidth():
    A, B = normal(0, 6, 3), normal(1, 5, 3) + 1
    Z = torch.cat([A, B]).numpy()
    D = ((Z[:, None] - Z[None]) ** 2).sum(-1)
    unit = torch.tensor(D[D > 0]).median().item()
    k = np.mean([np.exp(-D / (s * unit)) for s in (0.5, 1.0, 2.0)], axis=0)
    assert float(mmd(A, B)) == pytest.approx(k[:6, :6].mean() + k[6:, 6:].mean() - 2 * k[:6, 6:].mean())


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_mmd_has_no_unit_and_sinkhorn_has_that_of_a_squared_length(scale):
    A, B = normal(0, 12, 3), normal(1, 10, 3) + 1
    assert float(mmd(scale * A, scale * B)) == pytest.approx(float(mmd(A, B)), rel=1e-6)
    assert float(sinkhorn(scale * A, scale * B)) == pytest.approx(scale**2 * float(sinkhorn(A, B)), rel=1e-3)


@given(seeds, st.floats(0.1, 5.0))
def test_sinkhorn_of_a_shift_is_half_its_square(seed, shift):
    A = normal(seed, 20, 3)
    assert float(sinkhorn(A, A + shift, scaling=0.9)) == pytest.approx(1.5 * shift**2, rel=0.02)


@pytest.mark.parametrize("name", ["mmd", "sinkhorn"])
def test_descending_a_distance_brings_the_clouds_together(name):
    A, B = normal(0, 30, 2), (normal(1, 30, 2) + 2).requires_grad_()
    (grad,) = torch.autograd.grad(DISTANCES[name](A, B), B)
    assert (grad.mean(0) > 0).all()  # B lies too far up: down is nearer


def test_the_adapter_uses_these_very_functions():
    assert adapter.coral is coral and adapter.mmd is mmd


# adversary ------------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.0, 3.0))
def test_gradient_reversal_is_the_identity_and_turns_the_gradient(seed, strength):
    z = normal(seed, 5, 3).requires_grad_()
    out = reverse_gradient(z, strength)
    assert torch.equal(out, z)
    weights = normal(seed + 1, 5, 3)
    (out * weights).sum().backward()
    torch.testing.assert_close(z.grad, -strength * weights)


def test_one_step_helps_the_critic_and_hurts_it_through_the_embedding():
    torch.manual_seed(0)
    critic, labels = DomainCritic(3, 2).double(), torch.arange(40) % 2
    z = (normal(0, 40, 3) + labels[:, None]).requires_grad_()
    before = adversary_loss(critic, z, labels)
    grads = torch.autograd.grad(before, [z, *critic.parameters()])
    with torch.no_grad():
        worse = adversary_loss(critic, z - 5.0 * grads[0], labels)
        for p, g in zip(critic.parameters(), grads[1:]):
            p -= 0.05 * g
        better = adversary_loss(critic, z, labels)
    assert better < before < worse


def test_an_adversary_learns_to_separate_what_can_be_separated():
    torch.manual_seed(0)
    critic, labels = DomainCritic(2, 3).double(), torch.arange(90) % 3
    z = normal(0, 90, 2) * 0.1 + torch.eye(3, 2, dtype=torch.float64)[labels] * 3
    optimiser = torch.optim.Adam(critic.parameters(), lr=0.05)
    for _ in range(60):
        loss = adversary_loss(critic, z, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (critic(z).argmax(1) == labels).all()


# slide scale ----------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 4), st.floats(0.1, 10))
def test_slide_scale_is_the_squared_variation_of_norms_without_unit(seed, count, scale):
    z, slide = normal(seed, 30, 3), torch.arange(30) % count
    rms = np.array([np.sqrt((z[slide == s].numpy() ** 2).sum(1).mean()) for s in range(count)])
    assert float(slide_scale(z, slide)) == pytest.approx((rms.std() / rms.mean()) ** 2, abs=1e-12)
    assert float(slide_scale(scale * z, slide)) == pytest.approx(float(slide_scale(z, slide)), abs=1e-12)


def test_slide_scale_leaves_out_slides_without_a_row():
    z = normal(0, 20, 3)
    assert float(slide_scale(z, torch.arange(20) % 2 * 3)) == pytest.approx(float(slide_scale(z, torch.arange(20) % 2)))


# maps -----------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 4), st.integers(2, 5))
def test_whitening_colouring_maps_covariances_exactly(seed, count, d):
    Z, labels = slides(seed, tuple(30 + 10 * i for i in range(count)), d)
    names = np.unique(labels)
    pooled = sum((labels == s).mean() * np.cov(Z[labels == s].T) for s in names)
    out, before = coral_map(Z, labels), Z.copy()
    for s in names:
        np.testing.assert_allclose(np.cov(out[labels == s].T), pooled, atol=1e-5 * np.trace(pooled))
        np.testing.assert_allclose(out[labels == s].mean(0), Z.mean(0), atol=1e-8)
    assert np.array_equal(Z, before)
    np.testing.assert_allclose(coral_map(out, labels), out, atol=1e-4)


def test_one_slide_stays_where_it_is_and_dtype_is_kept():
    Z, _ = slides(0)
    np.testing.assert_allclose(coral_map(Z, ["a"] * len(Z)), Z, atol=1e-6)
    assert coral_map(Z.astype(np.float32), [0] * len(Z)).dtype == np.float32


def test_a_slide_with_fewer_rows_than_dimensions_needs_shrinkage_and_then_is_finite():
    Z, labels = slides(0, (6, 50), 10)
    out = coral_map(Z, labels, shrink=0.2)
    assert np.isfinite(out).all() and np.abs(out).max() < 20 * np.abs(Z).max()


def test_labels_must_fit_rows():
    with pytest.raises(InputError, match="labels"):
        coral_map(np.zeros((5, 2)), ["a", "b"])


def test_conditional_map_matches_inside_clusters_only():
    (A, a), (B, b) = slides(0), slides(1)
    Z, labels, cluster = np.concatenate([A, B + 50]), np.concatenate([a, b]), np.repeat([0, 1], [len(A), len(B)])
    out = conditional_coral_map(Z, labels, cluster, shrink=0.0)
    np.testing.assert_allclose(out[cluster == 0], coral_map(A, a), atol=1e-8)
    np.testing.assert_allclose(out[cluster == 1], coral_map(B + 50, b), atol=1e-8)
    np.testing.assert_allclose(conditional_coral_map(Z, labels, 2, shrink=0.0), out, atol=1e-8)  # k-means finds the same two


def test_conditional_map_leaves_small_groups_alone():
    Z, labels = slides(0, (10, 60, 60))
    out = conditional_coral_map(Z, labels, np.zeros(len(Z)), min_rows=20)
    moved = (out != Z).any(1)
    assert not moved[labels == "s0"].any() and moved[labels != "s0"].all()
    assert np.array_equal(conditional_coral_map(Z, labels, np.zeros(len(Z)), min_rows=61), Z)


def test_harmony_brings_shifted_slides_together_and_keeps_shape():
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(120, 5)).astype(np.float32)
    labels = np.repeat(["a", "b"], 60)
    Z[60:] += 2
    out = harmony(Z, labels, seed=1)
    gap = lambda A: np.linalg.norm(A[:60].mean(0) - A[60:].mean(0))
    assert out.shape == Z.shape and out.dtype == np.float32 and gap(out) < 0.6 * gap(Z)
    np.testing.assert_array_equal(out, harmony(Z, labels, seed=1))


def test_a_missing_harmony_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "harmonypy", None)
    with pytest.raises(InputError, match="pip install harmonypy"):
        harmony(np.zeros((4, 2)), ["a", "a", "b", "b"])


@given(seeds, st.floats(-1.0, 1.0))
def test_powers_of_a_matrix_add_up(seed, power):
    A = normal(seed, 4, 4)
    C = A @ A.T + torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(matrix_power_psd(C, power) @ matrix_power_psd(C, 1 - power), C)
