"""Probes: limit cases, invariances and bad input."""
import numpy as np
import pytest
import scipy.sparse as sp

from gears_nb.core.errors import InputError
from gears_nb.encoder import probes
from gears_nb.encoder.h1_qc_leakage import h1_verdict, pairwise_auc, qc_features
from gears_nb.encoder.h2_mean_shift import BROAD, gene_shifts, h2_verdict, kruskal_genes, typical_shift, zscored

RNG = np.random.default_rng(3)
H = RNG.normal(size=(240, 6))
SLIDES = np.tile(["a", "b", "c"], 80)
COORDS = RNG.uniform(size=(240, 2))
TURN = np.linalg.qr(RNG.normal(size=(6, 6)))[0]


def every_probe(H, slides, coords):
    halves = H[slides == "a"], H[slides == "b"]
    return {
        "accuracy": [probes.slide_accuracy(H, slides)], "mixing": [probes.mixing(H, slides)], "ilisi": [probes.ilisi(H, slides)],
        "overlap": list(probes.overlap(H, coords, slides).values()), "distance": list(probes.neighbour_distance(H, coords, slides).values()),
        "norms": list(probes.rms_norms(H, slides).values()), "ratio": [probes.norm_ratio(H, slides)], "spectrum": probes.covariance_spectrum(H),
        "angles": probes.principal_angles(*halves, top=3), "centroids": probes.centroid_distances(H, slides).ravel(),
    }


def test_probes_do_not_depend_on_the_order_of_spots():
    order = RNG.permutation(len(H))
    before, after = every_probe(H, SLIDES, COORDS), every_probe(H[order], SLIDES[order], COORDS[order])
    for name in before:
        assert np.allclose(before[name], after[name], atol=0.06 if name == "accuracy" else 1e-9), name


def test_probes_do_not_depend_on_the_basis_of_the_embedding():
    """Turning H and moving coordinates rigidly changes nothing but the classifier's scaling (and that hardly)."""
    before = every_probe(H, SLIDES, COORDS)
    after = every_probe(H @ TURN, SLIDES, 7 * COORDS[:, ::-1] + 3)
    for name in before:
        assert np.allclose(before[name], after[name], atol=0.06 if name == "accuracy" else 1e-6), name


def test_accuracy_from_chance_to_certainty():
    shift = np.eye(6)[np.unique(SLIDES, return_inverse=True)[1]]
    scores = [probes.slide_accuracy(H + d * shift, SLIDES) for d in (0, 1, 8)]
    assert abs(scores[0] - 1 / 3) < 0.1 and scores[0] < scores[1] < scores[2] and scores[2] > 0.99
    assert probes.slide_accuracy(H, SLIDES, seed=4) == probes.slide_accuracy(H, SLIDES, seed=4)


def test_accuracy_is_balanced():
    """Always guessing the large slide scores 1/2, not its share."""
    noise, uneven = RNG.normal(size=(400, 3)), np.repeat(["large", "small"], [380, 20])
    assert abs(probes.slide_accuracy(noise, uneven) - 0.5) < 0.06


def test_mixing_and_ilisi_limits():
    copies = np.concatenate([H, H, H])
    thrice = np.repeat(["a", "b", "c"], len(H))
    assert probes.mixing(copies, thrice) > 0.9 and probes.ilisi(copies, thrice) > 2.7
    islands = copies + 50 * np.repeat(np.arange(3), len(H))[:, None]
    assert probes.mixing(islands, thrice) == 0 and probes.ilisi(islands, thrice) == 1
    with pytest.raises(InputError, match="one slide"):
        probes.mixing(H, np.full(240, "a"))


def test_ilisi_against_its_definition():
    near = np.argsort(((H[:, None] - H[None]) ** 2).sum(-1) + 1e9 * np.eye(240), axis=1)[:, :12]
    brute = [1 / sum((np.mean(SLIDES[row] == s)) ** 2 for s in "abc") for row in near]
    assert np.isclose(probes.ilisi(H, SLIDES, k=12), np.mean(brute))


def test_perfect_embedding_has_perfect_place():
    assert set(probes.overlap(COORDS, COORDS, SLIDES, k=9).values()) == {1.0}
    nearest = probes.neighbour_distance(COORDS, COORDS, SLIDES, k=5)
    random = probes.neighbour_distance(H, COORDS, SLIDES, k=5)
    assert all(random[s] > 2 * nearest[s] for s in nearest)
    assert probes.neighbour_distance(H, 1000 * COORDS, SLIDES, k=5) == pytest.approx(random)


def test_morans_i_against_a_double_loop_and_with_sparse_blocks():
    values = RNG.poisson(1.0, (240, 11)).astype(np.float32)
    W = probes.spatial_weights(COORDS, 5).toarray()
    assert np.allclose(W.sum(1), 1) and (np.diag(W) == 0).all()
    Z = values - values.mean(0)
    brute = np.einsum("ig,ij,jg->g", Z, W, Z) / (Z**2).sum(0)
    for form in (values, sp.csr_matrix(values), sp.csc_matrix(values)):
        assert np.allclose(probes.morans_i(form, COORDS, 5, block=4), brute, atol=1e-6)
    assert abs(brute.mean() + 1 / 239) < 0.06 and np.isclose(probes.morans_i(values[:, 2], COORDS, 5), brute[2])


def test_morans_i_is_high_for_a_gradient_and_invariant_to_units():
    gradient = COORDS @ [1.0, 2.0]
    assert probes.morans_i(gradient, COORDS) > 0.85
    assert np.isclose(probes.morans_i(5 + 3 * gradient, 9 * COORDS), probes.morans_i(gradient, COORDS))
    assert np.isnan(probes.morans_i(np.ones(240), COORDS))


def test_collapse_is_seen():
    flat = H.copy()
    flat[:, 2] = 1.0
    assert probes.dim_std(flat)[2] == 0 and probes.covariance_spectrum(flat)[-1] < 1e-12 < probes.covariance_spectrum(H)[-1]
    assert probes.norm_ratio(np.array([[0.0, 0], [1, 0]]), ["a", "b"]) == float("inf")


def test_one_thousandfold_slide_changes_norms_not_angles():
    scaled = H * np.where(SLIDES == "b", 3.0, 1.0)[:, None]
    assert np.isclose(probes.norm_ratio(scaled, SLIDES) / 3, 1, atol=0.15)
    ours = [probes.principal_angles(X[SLIDES == "a"], X[SLIDES == "b"], top=3) for X in (H, scaled)]
    assert np.allclose(*ours)


@pytest.mark.parametrize("labels", [["a"] * 240, ["a"] * 239 + ["b"]])
def test_accuracy_refuses_what_it_cannot_score(labels):
    with pytest.raises(InputError, match="two groups"):
        probes.slide_accuracy(H, labels)


def test_load_slides_is_deterministic_and_refuses_nonsense():
    a, b = (probes.load_slides("tiny", 21) for _ in range(2))
    assert len(a) == 3 and all((x.X != y.X).nnz == 0 and list(x.var_names) == list(y.var_names) for x, y in zip(a, b))
    table = probes.stack_slides(a, n_hvg=100)
    assert table.X.shape == (450, 100) and set(table.labels) == {"ST1", "ST2", "ST3"}
    assert np.allclose(table.centred[table.labels == "ST1"].mean(0), table.centred[table.labels == "ST3"].mean(0), atol=1e-4)
    with pytest.raises(InputError, match="no preset"):
        probes.load_slides("tinny")
    with pytest.raises(InputError, match="at least two"):
        probes.stack_slides(a[:1])


def test_load_slides_from_a_file(tmp_path):
    import anndata

    both = anndata.concat(probes.load_slides("tiny", 21)[:2])
    both.X = both.X.multiply((np.arange(300) > 0)[:, None]).tocsr()  # an empty position of the array
    both.write_h5ad(tmp_path / "two.h5ad")
    slides = probes.load_slides(str(tmp_path / "two.h5ad"))
    assert [s.n_obs for s in slides] == [149, 150] and slides[0].obsm["spatial"].shape == (149, 2)
    with pytest.raises(InputError, match="switches"):
        probes.load_slides("mob", mean_shift=0.0)
    del both.obs["slide"]
    both.write_h5ad(tmp_path / "nameless.h5ad")
    with pytest.raises(InputError, match="slide"):
        probes.load_slides(str(tmp_path / "nameless.h5ad"))


@pytest.mark.parametrize("name,sections", [("her2st_A", 6), ("mob", 4)])
def test_registry_sets_give_all_their_sections(name, sections):
    from gears_nb.data.registry import PROTOCOLS, available
    if not available()[PROTOCOLS[name].dataset]:
        pytest.skip(f"no data for {name}")
    slides = probes.load_slides(name)
    assert len(slides) == sections == len({s.obs["slide"].iloc[0] for s in slides})
    assert all(s.obs["slide"].nunique() == 1 and list(s.var_names) == list(slides[0].var_names) for s in slides)


def test_qc_features_sparse_and_dense_agree():
    counts = RNG.poisson(0.7, (50, 30))
    dense, sparse = qc_features(counts), qc_features(sp.csr_matrix(counts))
    assert np.allclose(dense, sparse) and np.allclose(dense[:, 4], counts.var(1)) and np.allclose(dense[:, 3], (counts == 0).mean(1))


def test_pairwise_auc_against_scipy():
    from scipy.stats import mannwhitneyu
    values, labels = RNG.poisson(3.0, 90).astype(float), np.repeat(["a", "b"], [40, 50])
    expected = mannwhitneyu(values[:40], values[40:]).statistic / 2000
    assert np.isclose(pairwise_auc(values, labels)[0]["auc"], max(expected, 1 - expected))


def test_h1_verdicts():
    loud, quiet, noisy = ({"auc": a, "noise": n} for a, n in ((0.7, 0.01), (0.52, 0.001), (0.58, 0.05)))
    assert h1_verdict([quiet, loud], 0.9, 1 / 3) == "CONFIRMED"
    assert h1_verdict([loud], 0.35, 1 / 3) == "PARTIAL"
    assert h1_verdict([quiet, noisy], 0.9, 1 / 3) == "FALSIFIED"


def test_kruskal_against_scipy_with_ties():
    from scipy.stats import kruskal
    X = RNG.poisson(0.5, (240, 9)).astype(np.float64)
    Hs, p = kruskal_genes(X, SLIDES, block=2)
    for g in range(9):
        assert np.allclose((Hs[g], p[g]), kruskal(*[X[SLIDES == s, g] for s in "abc"]))


def test_h2_verdicts():
    assert h2_verdict(0.98, 0.2, 0.3, 1 / 3) == "CONFIRMED"
    assert h2_verdict(0.98, 0.8, 0.3, 1 / 3) == h2_verdict(0.4, 0.2, 0.3, 1 / 3) == "PARTIAL"
    assert h2_verdict(0.98, 0.2, 0.9 * BROAD, 1 / 3) == "FALSIFIED"


def test_shifts_along_a_direction_or_common_to_all_genes_are_no_technical_shift():
    X = RNG.uniform(1, 2, size=(240, 40))
    pattern = RNG.normal(size=40)
    pattern /= np.linalg.norm(pattern)
    base = gene_shifts(X, SLIDES, pattern[None])
    moved = X + (SLIDES == "b")[:, None] * 3 * pattern
    h = lambda M: np.mean(-np.expm1(-M), axis=0)
    assert np.allclose(gene_shifts(moved, SLIDES, pattern[None]) * h(moved) + 0, base * h(X), atol=0.05)
    assert np.median(gene_shifts(moved, SLIDES).std(0)) > 3 * np.median(gene_shifts(moved, SLIDES, pattern[None]).std(0))


def test_typical_shift_recovers_a_planted_factor_and_ignores_depth():
    depth = np.where(SLIDES == "c", 2.0, 1.0)[:, None]
    base, factor = RNG.uniform(5, 40, 80), np.exp(0.3 * RNG.normal(size=(3, 80)))[np.unique(SLIDES, return_inverse=True)[1]]
    scaled = lambda mean: (lambda C: np.log1p(2000 * C / C.sum(1, keepdims=True)))(RNG.poisson(mean * depth))
    with_shift, without = (typical_shift(scaled(base * f), SLIDES, q=2)["shift"] for f in (factor, np.ones_like(factor)))
    assert 0.15 < with_shift < 0.4 and without < 0.03


def test_zscore_is_idempotent_and_keeps_constants_at_zero():
    X = RNG.normal(size=(240, 5)).astype(np.float32)
    X[:, 1] = 3
    Z = zscored(X, SLIDES)
    assert np.allclose(Z, zscored(Z, SLIDES), atol=1e-5) and (Z[:, 1] == 0).all()
