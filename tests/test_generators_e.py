"""Shaken embeddings and engression: a proper score in closed form, noise that scales with its columns, losses that fit their settings."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gears_nb.core.config import from_dict
from gears_nb.core.errors import InputError
from gears_nb.generators.jittered import Engression, EngressionConfig, Jittered, JitteredConfig, deviations, energy_score
from gears_nb.generators.trial import examined
from gears_nb.models.conformance import toy_slides

TINY = {"width": 16, "heads": 2, "points": 4, "latent": 3}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def built(kind=Jittered, config=JitteredConfig, dim=8, **own):
    torch.manual_seed(0)
    return kind(dim, config(**TINY, **own)).eval()


@given(st.integers(0, 99), st.integers(2, 6), st.floats(-5, 5), st.floats(0.1, 3))
def test_the_score_knows_no_order_moves_with_its_input_and_is_the_error_of_draws_that_agree(seed, S, shift, scale):
    d, true = torch.randn(S, 7, generator=rng(seed)).double(), torch.randn(7, generator=rng(seed + 1)).double()
    score = energy_score(d, true)
    assert torch.allclose(energy_score(d.flip(0), true), score)
    assert torch.allclose(energy_score(scale * d + shift, scale * true + shift), scale * score)
    assert torch.allclose(energy_score(d[:1].expand(S, -1), true), (d[0] - true).abs())


@given(st.floats(0.0, 4.0))
def test_a_spread_that_is_not_the_truths_costs_what_the_formula_says(sigma):
    """Draws N(0, sigma^2) for a truth N(0, 1): proper, so never below the honest 1 / sqrt(pi)."""
    xi = torch.randn(3, 60_000, generator=rng(0)).double()
    found = energy_score(sigma * xi[:2], xi[2]).mean().item()
    formula = math.sqrt(2 * (1 + sigma**2) / math.pi) - sigma / math.sqrt(math.pi)
    assert found == pytest.approx(formula, abs=0.03) and formula >= 1 / math.sqrt(math.pi) - 1e-12


@given(st.integers(0, 99), st.integers(1, 6))
def test_deviations_do_not_see_padding(seed, more):
    H = torch.randn(2, 9, 5, generator=rng(seed)).double()
    padded = torch.cat([H, torch.full((2, more, 5), 7.0).double()], 1)
    mask = (torch.arange(9 + more) < 9).expand(2, -1)
    assert torch.allclose(deviations(padded, mask)[:, 0], H.std(1, correction=0))


@given(st.integers(0, 99), st.floats(0.1, 10))
def test_the_unit_of_a_column_does_not_change_what_a_shake_is(seed, unit):
    """Without trunk: the noise that is added, over the deviation of its column."""
    H = torch.randn(1, 40, 3, generator=rng(seed)).double()
    scaled = deviations(H * torch.tensor([1.0, unit, 1.0]).double(), torch.ones(1, 40, dtype=torch.bool))
    assert torch.allclose(scaled, deviations(H, torch.ones(1, 40, dtype=torch.bool)) * torch.tensor([1.0, unit, 1.0]).double())


def test_more_shaking_is_more_spread():
    H = torch.randn(1, 50, 8, generator=rng(3))

    def spread(jitter):
        model = built(jitter=jitter)
        with torch.no_grad():
            return torch.stack([torch.cdist(x, x) for x in (model(H, None, rng(s)).X for s in range(6))]).std(0).mean().item()

    assert spread(0.0) < spread(0.5) < spread(2.0)


def test_a_second_draw_is_made_where_the_score_counts():
    H, targets = examined(toy_slides(dim=8)[0], 2, 48)
    plain, scored = (model.train().losses(H, targets, rng=rng(1)) for model in (built(), built(Engression, EngressionConfig)))
    assert set(scored) - set(plain) == {"score"} and torch.equal(plain["loss"], plain["energy"])
    assert torch.allclose(scored["loss"], 0.1 * scored["energy"] + scored["score"])
    assert torch.equal(plain["energy"], scored["energy"])  # the first draw is the same


def test_wrong_settings_are_one_line():
    with pytest.raises(InputError, match="jitter"):
        from_dict({"jitter": -1.0}, JitteredConfig, "structure.model.settings.")
