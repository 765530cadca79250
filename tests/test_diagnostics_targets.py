"""Measures of the target diagnostics: exact cases, invariances, and sections that are present or say why not."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from gears_nb.core.errors import InputError
from gears_nb.data.registry import data_root
from gears_nb.geometry.neighbours import jaccard, neighbour_sets
from gears_nb.targets.builder import build_targets
from gears_nb.targets.diagnostics import (
    ARRAYS,
    SECTIONS,
    SIGNATURES,
    draw_minisets,
    load_section,
    present,
    quantiles,
    signatures,
    tie_share,
    walk_entropy,
    walk_spectrum,
)


def cloud(count=3, n=48, seed=0):
    return torch.randn(count, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_spectrum_is_that_of_the_walk():
    T = build_targets(cloud(1), rw_steps=1).rw_transitions[1].double()
    plain = np.sort(np.linalg.eigvals(T[0].numpy()).real)[::-1]
    np.testing.assert_allclose(walk_spectrum(T, 10)[0].numpy(), plain[1:11], atol=1e-6)


def test_entropy_between_certain_and_uniform():
    permutation = torch.eye(6).roll(1, 0)[None]
    assert float(walk_entropy(permutation).abs().max()) == 0
    assert torch.allclose(walk_entropy((1 - torch.eye(6))[None] / 5), torch.ones(1, 6, dtype=torch.float64))


def test_neighbours_and_jaccard():
    X = cloud()
    A = neighbour_sets(X, 5)
    assert (A.sum(-1) == 5).all() and not A.diagonal(dim1=1, dim2=2).any()
    assert torch.equal(jaccard(A, A), torch.ones(3))
    nested = jaccard(A, neighbour_sets(X, 10))
    assert torch.allclose(nested, torch.full((3,), 0.5))


@pytest.mark.parametrize("family", [f for f in SIGNATURES if f not in ("f3", "f4")])
def test_signatures_see_no_pose_and_no_order(family):
    X, rng = cloud(2), torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=rng, dtype=torch.float64))[0]
    moved = (0.3 * X @ turn - 7)[:, torch.randperm(48, generator=rng)]
    assert torch.allclose(signatures(X)[family], signatures(moved)[family], atol=1e-6)


def test_signatures_tell_a_lattice_from_a_cloud():
    side = torch.arange(7.0, dtype=torch.float64)
    lattice = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(1, -1, 2)
    scattered = 7 * torch.rand(1, 49, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = signatures(lattice), signatures(scattered)
    assert all(torch.isfinite(s).all() for s in [*one.values(), *other.values()])
    assert float(one["f7"][0, :10].std()) < 0.1 * float(other["f7"][0, :10].std())  # a lattice merges at one radius
    assert float(tie_share(lattice, 1)) == 1 and float(tie_share(scattered, 1)) < 0.1


def test_quantiles_ignore_what_is_masked():
    values = torch.cat([torch.linspace(0, 1, 21), torch.full((5,), 99.0)])[None]
    mask = values < 50
    assert torch.allclose(quantiles(values, mask), quantiles(values[:, :21]))
    assert quantiles(values, mask).max() < 1


def test_windows_are_complete_and_minisets_are_subsets():
    grid = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2)
    rng = torch.Generator().manual_seed(0)
    for window in (False, True):
        X = draw_minisets(grid, 30, 4, rng, window)
        assert X.shape == (4, 30, 2) and all(len(x.unique(dim=0)) == 30 for x in X)
    spans = (X.amax(1) - X.amin(1)).amax()
    assert spans < 11  # thirty of a window lie close together
    with pytest.raises(InputError, match="the section has 144"):
        draw_minisets(grid, 200, 1, rng, True)


def test_unknown_section_is_refused():
    for call in (load_section, lambda name: present([name])):
        with pytest.raises(InputError, match="is no section"):
            call("moon")


def test_absent_sections_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("GEARS_DATA", str(tmp_path))
    assert present(["tiny", "osmfish"]) == (["tiny"], {"osmfish": "file absent"})
    with pytest.raises(InputError, match="not found"):
        load_section("osmfish")


@pytest.mark.skipif(data_root() is None, reason="no real data beside the repository")
@pytest.mark.parametrize("name", ["her2st_A", "osmfish", "mob"])
def test_real_sections(name):
    if not present([name])[0]:
        pytest.skip(f"{SECTIONS[name]} is absent")
    section = load_section(name)
    assert section.coords.ndim == 2 and section.coords.shape[1] == 2 and len(section.coords) > 300 and np.isfinite(section.coords).all()
    assert (name in ARRAYS) == (name != "osmfish")
    assert section.regions is None or len(section.regions) == len(section.coords)
