"""Nearest-neighbour and Gaussian estimators: closed forms, golden values of other implementations, and the gates."""

import numpy as np
import pytest
from sklearn.feature_selection._mutual_info import _compute_mi_cd

from ibprune.mi.gaussian import (
    additive_uniform_mi,
    awgn_mi,
    bpsk_mi,
    gaussian_mi,
    mi_from_covariance,
    mixture_mi,
    student_mi,
)
from ibprune.mi.neighbours import _counts_by_blocks, _counts_by_tree, gaussianize, kl_entropy, ksg, ross
from ibprune.mi.samples import BadSamples


def equicorrelated(dim: int, rho: float) -> np.ndarray:
    return np.full((dim, dim), rho) + (1 - rho) * np.eye(dim)


def normal_pair(n: int, rho: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    return x, rho * x + np.sqrt(1 - rho**2) * rng.standard_normal(n)


@pytest.fixture(scope="module")
def golden_1():
    rng = np.random.default_rng(0)
    both = rng.multivariate_normal(np.zeros(2), equicorrelated(2, 0.75), size=2000, method="cholesky")
    return both[:, 0], both[:, 1]


@pytest.fixture(scope="module")
def golden_5():
    rng = np.random.default_rng(1)
    both = rng.multivariate_normal(np.zeros(10), equicorrelated(10, 0.5), size=2000, method="cholesky")
    return both[:, :5], both[:, 5:]


def three_classes(n: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    return 1.5 * labels + rng.standard_normal(n), labels


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (mi_from_covariance(equicorrelated(2, 0.75), 1), 0.413339),
        (awgn_mi(np.eye(4), np.eye(4), 1.0), 1.386294),
        (bpsk_mi(0.5), 0.632720),
        (bpsk_mi(1.0), 0.336831),
        (bpsk_mi(2.0), 0.111421),
        (mixture_mi([0.0, 1.5, 3.0]), 0.447161),
        (additive_uniform_mi(0.1), 1.709438),
        (additive_uniform_mi(0.75), 0.333333),
        (student_mi(1, 1, 1), 0.224171),
    ],
)
def test_closed_forms(found, expected):
    assert found == pytest.approx(expected, abs=6e-7)


def test_closed_forms_agree_with_each_other():
    pairs = np.kron([[1, 0.6], [0.6, 1]], np.eye(3))
    assert mi_from_covariance(pairs, 3) == pytest.approx(-1.5 * np.log(1 - 0.36))
    scale = np.diag([3.0, 1e-3, 1, 7, 1, 1e4])
    assert mi_from_covariance(scale @ pairs @ scale, 3) == pytest.approx(-1.5 * np.log(1 - 0.36))
    joint = np.array([[2.0, 2.0], [2.0, 2.25]])  # Y = X + Z / 2, var X = 2
    assert awgn_mi(np.eye(1), 2 * np.eye(1), 0.5) == pytest.approx(mi_from_covariance(joint, 1))
    assert student_mi(1, 1, 1e7, dispersion=equicorrelated(2, 0.75)) == pytest.approx(0.413339, abs=1e-5)
    assert mixture_mi([0, 1e6], weights=[0.25, 0.75]) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))
    assert mixture_mi([2, 2, 2]) == pytest.approx(0, abs=1e-12)
    with pytest.raises(BadSamples, match="positive definite"):
        mi_from_covariance(equicorrelated(2, 1.0), 1)


@pytest.mark.parametrize(("k", "one", "five"), [(1, 0.376342, 0.543246), (3, 0.408632, 0.530267)])
def test_ksg_gives_the_golden_values(golden_1, golden_5, k, one, five):
    assert ksg(*golden_1, k=k, metric="chebyshev").value == pytest.approx(one, abs=1e-5)
    assert ksg(*golden_5, k=k, metric="chebyshev").value == pytest.approx(five, abs=1e-5)


@pytest.mark.parametrize(("k", "one", "five"), [(5, 0.419432, 0.530181), (10, 0.415702, 0.509170)])
def test_ksg_gives_the_golden_values_for_more_neighbours(golden_1, golden_5, k, one, five):
    assert ksg(*golden_1, k=k, metric="chebyshev").value == pytest.approx(one, abs=1e-5)
    assert ksg(*golden_5, k=k, metric="chebyshev").value == pytest.approx(five, abs=1e-5)


def test_euclidean_ksg_gaussian_and_entropy_give_the_golden_values(golden_5):
    assert ksg(*golden_5).value == pytest.approx(0.526073, abs=1e-5)
    assert gaussian_mi(*golden_5, debias=False).value == pytest.approx(0.591459, abs=1e-5)
    assert gaussian_mi(*golden_5).value == pytest.approx(0.585189, abs=1e-5)
    x = np.random.default_rng(2).standard_normal((2000, 5))
    assert kl_entropy(x) == pytest.approx(7.047947, abs=1e-5)


def test_ross_equals_sklearn_and_the_golden_value():
    x, labels = three_classes(2000)
    assert ross(x, labels, k=3).value == pytest.approx(0.447025, abs=1e-6)
    assert ross(x, labels, k=3).value == pytest.approx(_compute_mi_cd(x, labels, 3), abs=1e-10)
    x, labels = x[:400], np.where(np.arange(400) < 3, 7, labels[:400])  # a class of fewer than k samples
    labels[399] = 8  # and one of a single sample
    estimate = ross(x, labels)
    assert estimate.value == pytest.approx(_compute_mi_cd(x, labels, 5), abs=2e-5)  # its radius test errs by one once
    assert len(estimate.terms) == estimate.n == 399 and "1 samples alone" in " ".join(estimate.notes)
    names = np.array(["b", "a", "c"])[three_classes(400)[1]]
    assert ross(x, names).value == ross(x, three_classes(400)[1]).value


@pytest.mark.parametrize("metric", ["euclidean", "chebyshev"])
@pytest.mark.parametrize("dims", [(1, 1), (2, 1), (3, 3)])
def test_trees_and_blocks_count_as_the_definition_does(metric, dims):
    rng = np.random.default_rng(3)
    both = rng.standard_t(1, size=(700, sum(dims)))  # heavy tails: distances of very unlike size
    both[:, -1] += both[:, 0]
    both[:40] = both[40:80]
    x, y = both[:, : dims[0]], both[:, dims[0] :]
    order = 2 if metric == "euclidean" else np.inf
    of_x, of_y = (np.linalg.norm(side[:, None] - side, ord=order, axis=-1) for side in (x, y))
    radius = np.sort(np.maximum(of_x, of_y), axis=1)[:, 3:4]
    slow = [np.maximum((of_side < radius * (1 - 1e-12)).sum(axis=1) - 1, 0) for of_side in (of_x, of_y)]
    for counts in (_counts_by_tree(x, y, 3, metric), _counts_by_blocks(x, y, 3, metric)):
        assert (counts[0] == slow[0]).all() and (counts[1] == slow[1]).all()


def test_ross_and_entropy_hardly_change_between_tree_and_blocks():
    rng = np.random.default_rng(4)
    x, labels = three_classes(600)
    wide = np.hstack([x[:, None], np.zeros((600, 19))])  # blocks and matrix products, the same distances
    assert ross(wide, labels).value == pytest.approx(ross(x, labels).value, abs=1e-3)
    x[:100] = x[100:200]  # repeated rows: both count them all
    near = np.hstack([x[:, None], np.zeros((600, 9))])  # blocks of differences
    assert ross(near, labels).value == pytest.approx(ross(x, labels).value, abs=1e-10)
    pair = ross(rng.standard_normal(600), np.maximum(np.arange(600), 1))  # one class of two and 598 of one
    assert pair.ci95 is None and pair.n == 2 and pair.status == "undersampled"
    z = rng.standard_normal((600, 9))  # blocks: h of N(0, I_9) is 9/2 log(2 pi e), and KL is biased up
    assert kl_entropy(z) == pytest.approx(4.5 * np.log(2 * np.pi * np.e), abs=0.4)


def test_gaussianize_keeps_order_and_ties():
    scores = gaussianize(np.array([5.0, 1, 1, 9, 2, 3, 4, 6, 7, 1e9, 8]))[:, 0]
    assert scores[1] == scores[2] and scores[9] == scores.max() == pytest.approx(1.3829941)
    assert np.argmax(scores) == 9 and gaussianize(np.ones(20)).tolist() == [[0.0]] * 20
    x, y = normal_pair(1000, 0.75, seed=0)
    assert ksg(x, y, gaussianize=True).value == ksg(np.exp(3 * x), y**3, gaussianize=True).value


def test_permuted_rows_share_nothing():
    x, y = normal_pair(4000, 0.9, seed=1)
    order = np.random.default_rng(2).permutation(4000)
    labels = np.digitize(x, [-1, 0, 1])
    estimates = ksg(x, y[order]), ksg(x, y[order], gaussianize=True), ross(y[order], labels), gaussian_mi(x, y[order])
    for estimate in estimates:
        assert abs(estimate.value) < 0.03 and estimate.status == "ok", estimate
    assert min(e.value for e in estimates) > -0.03


def test_intervals_cover_the_truth_in_one_dimension():
    hits = {"ksg": 0, "gaussian": 0}
    for seed in range(20):
        x, y = normal_pair(1000, 0.75, seed)
        for name, estimate in (("ksg", ksg(x, y)), ("gaussian", gaussian_mi(x, y))):
            low, high = estimate.ci95
            hits[name] += low <= 0.413339 <= high
            assert estimate.terms.mean() == pytest.approx(estimate.value) and estimate.status == "ok"
    assert min(hits.values()) >= 17


def test_gates():
    x, y = normal_pair(2000, 0.75, seed=3)
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((2000, 8))
    assert ksg(x[:500], y[:500]).status == "undersampled"
    assert ksg(x[:100], y[:100]).ci95 is None
    five = ksg(np.column_stack([x, noise[:, :3]]), y)
    assert five.status == "ok" and "5 dimensions" in five.notes[0]
    assert ksg(np.column_stack([x, noise])[:1000], y[:1000]).status == "biased"
    assert ksg(x[:1000], np.tanh(x[:1000])).status == "saturated"  # not above 0.7 log N yet, but growing
    assert ksg(x, np.tanh(x)).status == "saturated"
    ties = ksg(np.maximum(x, 0), y)
    assert ties.status == "degenerate" and "repeat" in ties.notes[0] and ties.value is not None
    for constant in (ksg(np.ones(2000), y), ross(x, np.zeros(2000, int)), gaussian_mi(x, np.ones(2000))):
        assert constant.value is None and constant.status == "degenerate"
    assert ross(noise, (x > 0).astype(int)).status == "ok"
    assert ross(np.column_stack([x, noise])[:1000], (x[:1000] > 0).astype(int)).status == "biased"


def test_gaussian_stands_collinear_features_and_says_where_it_fails():
    x, y = normal_pair(1000, 0.6, seed=5)
    plain = gaussian_mi(x, y)
    assert gaussian_mi(np.column_stack([x, 2e5 * x, np.ones(1000)]), 1e-4 * y + 3).value == pytest.approx(plain.value)
    assert gaussian_mi(x, np.column_stack([3 - x, y])).status == "degenerate"
    assert gaussian_mi(np.sinh(4 * x), y).status == "biased"
    rng = np.random.default_rng(6)
    assert gaussian_mi(rng.standard_normal((30, 16)), rng.standard_normal((30, 16))).value is None
    few = [gaussian_mi(rng.standard_normal((40, 4)), rng.standard_normal((40, 4))) for _ in range(100)]
    assert {e.status for e in few} == {"undersampled"}
    assert np.mean([e.value for e in few]) == pytest.approx(0, abs=0.03)  # without debiasing about 0.25


def test_an_estimate_says_what_it_is_of_and_where_there_is_none():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 300, 1))
    assert "normal scores" in ksg(x, y, gaussianize=True).estimator
    assert "normal scores" not in ksg(x, y, gaussianize=False).estimator
    for labels in (np.arange(300), np.zeros(300, int)):
        found = ross(x, labels)
        assert (found.value, found.status) == (None, "degenerate")
    wide = rng.standard_normal((21, 20))
    assert gaussian_mi(wide[:, :10], wide[:, 10:]).value is None  # 10 + 10 features of 21 samples
    assert gaussian_mi(wide[:, :9], wide[:, 9:18]).value is not None


def test_bad_inputs():
    x, y = normal_pair(50, 0.5, seed=6)
    with pytest.raises(BadSamples, match="as many rows"):
        ksg(x, y[:-1])
    with pytest.raises(BadSamples, match="finite"):
        ksg(np.where(np.arange(50) == 3, np.nan, x), y)
    with pytest.raises(BadSamples, match="metric"):
        ksg(x, y, metric="cosine")
    for k in (0, 50):
        with pytest.raises(BadSamples, match="from 1 to 49"):
            ksg(x, y, k=k)
    with pytest.raises(BadSamples, match="as many labels"):
        ross(x, np.zeros(49, int))
    with pytest.raises(BadSamples, match="integer or string"):
        ross(x, y)
    with pytest.raises(BadSamples, match="equal samples"):
        kl_entropy(np.repeat(np.arange(5.0), 10))
    with pytest.raises(BadSamples, match="dim_x"):
        mi_from_covariance(np.eye(3), 3)
