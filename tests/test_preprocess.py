"""Neighbours, smoothing, normalisation, gene choice and centring."""

from __future__ import annotations

import tracemalloc

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from gears_nb.core.errors import GearsWarning, InputError
from gears_nb.core.store import Store
from gears_nb.data.genes import match_genes
from gears_nb.data.preprocess import (
    Centring,
    Preprocessor,
    averaging_matrix,
    group_means,
    highly_variable,
    normalise,
    smooth_expression,
)
from gears_nb.geometry.neighbours import knn


def slide(n: int, g: int = 40, *, seed: int = 0, depth: float = 1.0, name: str | None = "one", sparse: bool = True) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    X = rng.poisson(depth * rng.uniform(0.5, 4.0, size=(1, g)) * rng.uniform(0.5, 2.0, size=(n, 1)), size=(n, g)).astype(np.float32)
    X[:, 0] += 1
    adata = ad.AnnData(sp.csr_matrix(X) if sparse else X)
    adata.var_names = [f"g{j}" for j in range(g)]
    adata.obs_names = [f"{name}{i}" for i in range(n)]
    if name:
        adata.obs["slide"] = name
    return adata


# ---------------------------------------------------------------- smoothing


def test_smoothing_is_the_plain_mean_over_self_and_neighbours():
    F = np.random.default_rng(4).normal(size=(60, 7)).astype(np.float32)
    idx = knn(F, 4, metric="cosine")[1]
    loop = np.array([F[[i, *idx[i]]].mean(0) for i in range(60)])
    np.testing.assert_allclose(smooth_expression(F, 4), loop, atol=1e-6)
    np.testing.assert_allclose(smooth_expression(F, 4, steps=2), smooth_expression(smooth_expression(F, 4), 4), atol=1e-6)
    np.testing.assert_allclose(averaging_matrix(idx, 60).sum(1), 1.0, rtol=1e-6)


def test_smoothing_follows_a_permutation_and_leaves_its_input():
    F = np.random.default_rng(5).normal(size=(80, 9)).astype(np.float32)
    before, order = F.copy(), np.random.default_rng(6).permutation(80)
    np.testing.assert_allclose(smooth_expression(F[order], 5, 2), smooth_expression(F, 5, 2)[order], atol=1e-5)
    np.testing.assert_array_equal(F, before)
    np.testing.assert_array_equal(smooth_expression(F, 5, 2), smooth_expression(F, 5, 2))


def test_smoothing_within_groups_does_not_mix_them():
    F = np.random.default_rng(7).normal(size=(40, 6)).astype(np.float32)
    groups = np.repeat(["a", "b"], 20)
    grouped = smooth_expression(F, 3, groups=groups)
    np.testing.assert_array_equal(grouped[:20], smooth_expression(F[:20], 3))
    np.testing.assert_array_equal(grouped[20:], smooth_expression(F[20:], 3))


def test_smoothing_recovers_a_noisy_gradient():
    rng = np.random.default_rng(8)
    t = np.linspace(0, 1, 300)[:, None]
    signal = np.concatenate([np.cos(np.pi * t * w) for w in (1, 2, 3)] * 8, axis=1)
    noisy = signal + rng.normal(scale=0.7, size=signal.shape)
    assert np.linalg.norm(smooth_expression(noisy, 15) - signal) < 0.6 * np.linalg.norm(noisy - signal)


# ---------------------------------------------------------------- normalise, choose, centre


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), target=st.floats(1.0, 1e5))
def test_normalise_hits_the_target_sparse_and_dense(seed, target):
    X = np.random.default_rng(seed).poisson(1.5, size=(12, 9)).astype(np.float32)
    X[:, 0] += 1
    dense, sparse = normalise(X, target), normalise(sp.csc_matrix(X), target)
    np.testing.assert_allclose(np.expm1(dense.astype(float)).sum(1), target, rtol=1e-4)
    np.testing.assert_allclose(sparse.toarray(), dense, rtol=1e-5)
    assert sp.issparse(sparse) and sparse.dtype == dense.dtype == np.float32


def test_a_cell_without_counts_stays_zero_and_is_counted():
    X = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 4.0]])
    with pytest.warns(GearsWarning, match="1 cells have no counts"):
        Y = normalise(X)
    assert np.isfinite(Y).all() and (Y[1] == 0).all()


def test_group_means_match_pandas():
    pd = pytest.importorskip("pandas")
    X, labels = np.random.default_rng(9).normal(size=(50, 4)), np.random.default_rng(10).choice(list("abc"), 50)
    names, means = group_means(sp.csr_matrix(X), labels)
    expected = pd.DataFrame(X).groupby(labels).mean()
    assert list(names) == list(expected.index)
    np.testing.assert_allclose(means, expected.to_numpy(), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), groups=st.integers(1, 4))
def test_centring_is_idempotent_and_sparse_equals_dense(seed, groups):
    rng = np.random.default_rng(seed)
    X, labels = rng.poisson(1.0, size=(30, 5)).astype(np.float32), np.arange(30) % groups
    centring = Centring.fit(X)
    once = centring.apply(X, labels)
    np.testing.assert_allclose(centring.apply(sp.csr_matrix(X), labels), once, atol=1e-6)
    np.testing.assert_allclose(centring.apply(once, labels), once, atol=1e-5)
    np.testing.assert_allclose(group_means(once, labels)[1], np.tile(centring.mu_global, (groups, 1)), atol=1e-5)


def test_centring_removes_any_shift_of_a_slide():
    rng = np.random.default_rng(11)
    X, labels = rng.normal(size=(40, 6)), np.repeat([0, 1], 20)
    shifted = X + np.where(labels, 1.0, 0.0)[:, None] * rng.normal(scale=9.0, size=6)
    centring = Centring.fit(X)
    np.testing.assert_allclose(centring.apply(shifted, labels), centring.apply(X, labels), atol=1e-4)
    with pytest.raises(ValueError, match="5 genes given, 6 were fitted"):
        centring.apply(X[:, :5])


def test_all_genes_are_kept_when_more_are_asked_for():
    X = normalise(slide(30).X)
    np.testing.assert_array_equal(highly_variable(X, ["a"] * 30, 40), np.arange(40))
    assert len(highly_variable(X, ["a"] * 15 + ["b"] * 15, 7)) == 7


# ---------------------------------------------------------------- the fitted object


def test_only_training_slides_are_fitted():
    train = [slide(50, seed=1, name="one"), slide(60, seed=2, name="two", depth=3.0)]
    fitted = Preprocessor.fit(train, n_hvg=15)
    query = slide(40, seed=3, name="three", depth=9.0)
    Z = fitted.transform(query)
    np.testing.assert_allclose(Z.mean(0), fitted.centring.mu_global, atol=1e-4)
    pooled = np.concatenate([fitted.transform(s) for s in train])
    np.testing.assert_allclose(pooled.mean(0), fitted.centring.mu_global, atol=1e-4)
    again = Preprocessor.fit(train, n_hvg=15)
    assert again.genes == fitted.genes
    np.testing.assert_array_equal(again.transform(query), Z)


def test_depth_of_the_query_does_not_matter():
    fitted = Preprocessor.fit([slide(50, seed=1)])
    query = slide(40, seed=3)
    deep = query.copy()
    deep.X = deep.X * 7
    np.testing.assert_allclose(fitted.transform(deep), fitted.transform(query), atol=1e-4)


def test_storage_and_gene_order_of_the_query_do_not_matter_and_it_is_not_touched():
    fitted = Preprocessor.fit([slide(50, seed=1)], n_hvg=12)
    query = slide(40, seed=3)
    before, Z = query.X.toarray(), fitted.transform(query)
    for X in (query.X.toarray(), query.X.tocsc()):
        other = query.copy()
        other.X = X
        np.testing.assert_allclose(fitted.transform(other), Z, atol=1e-5)
    np.testing.assert_allclose(fitted.transform(query[:, ::-1].copy()), Z, atol=1e-5)
    np.testing.assert_array_equal(query.X.toarray(), before)


def test_each_section_of_one_table_is_centred_on_its_own():
    both = ad.concat([slide(30, seed=1, name="one"), slide(30, seed=2, name="two", depth=4.0)])
    fitted = Preprocessor.fit([both])
    Z = fitted.transform(both)
    for part in (Z[:30], Z[30:]):
        np.testing.assert_allclose(part.mean(0), fitted.centring.mu_global, atol=1e-4)
    np.testing.assert_allclose(fitted.transform(both, add_global=False)[:30].mean(0), 0.0, atol=1e-4)


def test_store_round_trip(tmp_path):
    torch = pytest.importorskip("torch")
    fitted, query = Preprocessor.fit([slide(50, seed=1)], n_hvg=12), slide(20, seed=5)
    tensors, meta = fitted.to_dict()
    store = Store(tmp_path)
    store.save("preprocessor", {name: torch.as_tensor(value) for name, value in tensors.items()}, meta)
    back = Preprocessor.from_dict(*store.load("preprocessor"))
    assert back.genes == fitted.genes and back.input_genes == fitted.input_genes
    np.testing.assert_array_equal(back.transform(query), fitted.transform(query))


def test_an_unmeasured_gene_filled_with_zeros_says_nothing():
    train = [slide(50, seed=1), slide(50, seed=2, name="two")]
    match = match_genes(train, min_genes=1)
    fitted = Preprocessor.fit([match.apply(s) for s in train])
    with pytest.warns(GearsWarning, match="4 of 40 genes are missing"):
        Z = fitted.transform(match.apply(slide(20, seed=3, name="three")[:, 4:].copy(), fill_missing=True))
    np.testing.assert_allclose(Z[:, :4], np.tile(fitted.centring.mu_global[:4], (20, 1)), atol=1e-6)


def test_smoothing_in_a_given_space():
    F, space = np.random.default_rng(12).normal(size=(2, 50, 6)).astype(np.float32)
    W = averaging_matrix(knn(space, 4, metric="cosine")[1], 50)
    np.testing.assert_allclose(smooth_expression(F, 4, 2, space=space), W @ (W @ F), atol=1e-6)


def test_missing_genes_are_refused():
    fitted = Preprocessor.fit([slide(50)])
    with pytest.raises(InputError, match="3 of 40 fitted genes are missing"):
        fitted.transform(slide(20)[:, 3:].copy())


def test_memory_grows_with_the_chosen_genes_only():
    columns = np.sort(np.random.default_rng(0).integers(0, 3_000, size=(20_000, 30)), axis=1).ravel()
    X = sp.csr_matrix((np.ones(len(columns), dtype=np.float32), columns, np.arange(0, len(columns) + 1, 30)), shape=(20_000, 3_000))
    X.sum_duplicates()
    query = ad.AnnData(X)
    query.var_names = [f"g{j}" for j in range(3_000)]
    genes = tuple(query.var_names)
    fitted = Preprocessor(genes, genes[:50], 1e3, Centring(np.zeros(50, dtype=np.float32)))
    tracemalloc.start()
    Z = fitted.transform(query)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert Z.shape == (20_000, 50)
    assert peak < 0.2 * 20_000 * 3_000 * 4
