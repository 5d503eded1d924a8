"""The other estimators of the literature: reference values, and the failures that keep them from being the default."""

import math

import numpy as np
import pytest

from ibprune.mi.codes import autoencoder_codes, pca_codes
from ibprune.mi.historic import binned_entropy, binned_mi, kernel_mi
from ibprune.mi.samples import NATS_TO_BITS, BadSamples
from ibprune.mi.spectral import (
    diffusion_entropy,
    diffusion_mi,
    effective_rank,
    gram,
    matrix_entropy,
    matrix_mi,
    von_neumann_entropy,
)
from ibprune.mi.weighted import compressed_mi, neighbour_weights, weighted_kl_entropy, weighted_kl_mi


def equicorrelated(n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """5 + 5 Gaussian dimensions, all correlations 0.5, 0.592812 nats."""
    covariance = np.full((10, 10), 0.5) + 0.5 * np.eye(10)
    both = np.random.default_rng(1).multivariate_normal(np.zeros(10), covariance, n, method="cholesky")
    return both[:, :5], both[:, 5:]


def clusters(shift: float) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(500) // 100
    centres = np.random.default_rng(4).normal(size=(5, 16))
    return np.random.default_rng(3).normal(size=(500, 16)) + shift * centres[labels], labels


def bits(estimate) -> float:
    return estimate.value * NATS_TO_BITS


# Binning and kernels


@pytest.mark.parametrize("equal_mass", [False, True])
def test_binning_saturates_at_log_n_whatever_the_labels(equal_mass):
    layer = np.random.default_rng(0).normal(size=(1000, 30))
    labels = np.random.default_rng(1).integers(0, 4, 1000)
    entropy = binned_entropy(layer, equal_mass=equal_mass)
    assert entropy.value == pytest.approx(math.log(1000)) and entropy.status == "saturated"
    assert entropy.value > binned_entropy(layer[:500], equal_mass=equal_mass).value + math.log(2) - 1e-9
    shares = np.bincount(labels) / 1000
    mi = binned_mi(layer, labels, equal_mass=equal_mass)
    assert mi.value == pytest.approx(-(shares * np.log(shares)).sum()), "random labels look perfectly known"
    assert mi.status == "saturated"


def test_binning_counts_what_it_is_given():
    labels = np.arange(400) % 4
    assert binned_mi(np.eye(4)[labels], labels, bins=2).value == pytest.approx(math.log(4))
    assert binned_entropy(np.arange(400.0) ** 3, bins=8, equal_mass=True).value == pytest.approx(math.log(8))
    assert binned_entropy(np.arange(400.0) ** 3, bins=8).value < 0.8 * math.log(8)
    assert binned_entropy(np.ones(400)).value == 0.0


def test_equal_mass_bins_follow_distinct_values_not_the_zeros_of_a_relu():
    layer = np.maximum(np.random.default_rng(0).normal(-2, 1, size=(2000, 1)), 0)
    assert binned_entropy(layer, equal_mass=True, bins=10).value > 0
    assert len(np.unique(layer)) > 20


def test_kernel_bounds_enclose_the_information_of_well_separated_samples():
    layer = np.repeat([[-1.0], [1.0]], 500, axis=0)
    labels = np.arange(1000) // 500
    upper, lower = (kernel_mi(layer, noise=0.05, bound=b) for b in ("upper", "lower"))
    assert upper.value == pytest.approx(math.log(2)) and lower.value == pytest.approx(math.log(2))
    assert upper.status == "upper_only" and lower.status == "lower_only"
    assert kernel_mi(layer, labels, noise=0.05).value == pytest.approx(math.log(2))
    # Two points with s = 1: 0.3368 nats, from quadrature.
    wide = [kernel_mi(layer, noise=1.0, adaptive=False, bound=b).value for b in ("lower", "upper")]
    assert wide[0] < 0.336831 < wide[1]


def test_adaptive_noise_takes_the_scale_away_and_fixed_noise_does_not():
    layer = np.random.default_rng(0).normal(size=(500, 8))
    assert kernel_mi(10 * layer).value == pytest.approx(kernel_mi(layer).value)
    fixed = [kernel_mi(scale * layer, noise=1.0, adaptive=False).value for scale in (1, 10)]
    assert fixed[1] > fixed[0] + 1
    assert kernel_mi(10 * layer, noise=1.0, adaptive=False).status == "saturated"


# Weighted Kozachenko-Leonenko


def test_neighbour_weights_cancel_the_leading_bias():
    assert neighbour_weights(10, 5).round(1).tolist() == [13.9, -12.2, -10.5, -1.2, 11.1]
    for dims, k in ((1, 1), (2, 5), (5, 5), (5, 20), (10, 1), (32, 10)):
        weights = neighbour_weights(dims, k)
        assert len(weights) == k and weights.sum() == pytest.approx(1)
    assert neighbour_weights(3, 5)[[0, 2, 4]] == pytest.approx(1 / 3), "no condition below 4 dimensions"


def test_weighted_kl_reference_values():
    both = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.75], [0.75, 1]], 2000, method="cholesky")
    assert weighted_kl_mi(both[:, 0], both[:, 1], k=1).value == pytest.approx(0.372826, abs=1e-5)
    entropy = weighted_kl_entropy(np.random.default_rng(2).normal(size=(2000, 5)), k=5)
    assert entropy.value == pytest.approx(7.114466, abs=1e-5) and entropy.status == "ok"


@pytest.mark.parametrize(("k", "expected"), [(5, 1.326), (20, 0.594)])
def test_weighted_kl_depends_on_k_more_than_on_the_data(k, expected):
    """True: 0.593. For k = 1 the reference has 2.226: there its weights do not sum to 1, ours (0.505) do."""
    estimate = weighted_kl_mi(*equicorrelated(), k=k)
    assert estimate.value == pytest.approx(expected, abs=5e-4) and estimate.status == "biased"


def test_weighted_kl_has_no_value_where_samples_coincide():
    x = np.random.default_rng(0).integers(0, 5, size=(500, 1))
    for estimate in (weighted_kl_mi(x, x), weighted_kl_entropy(x)):
        assert estimate.value is None and estimate.status == "degenerate"


def test_weighted_kl_on_codes_leaves_the_possible_range():
    """16 + 16 dimensions with 5 nats: far off, and said to be."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 16))
    rho = math.sqrt(1 - math.exp(-2 * 5 / 16))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=x.shape)
    found = [compressed_mi(x, y, dims=16, estimator="wkl", k=k) for k in (3, 10)]
    assert all(e.status in ("biased", "inconsistent") for e in found)
    assert max(abs(e.value - 5) for e in found) > 1


def test_pca_codes_lose_a_signal_of_low_variance():
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=(2000, 1)), 5 * rng.normal(size=(2, 2000, 4))
    x, y = (np.hstack([signal + 0.1 * rng.normal(size=(2000, 1)), noise[i]]) for i in (0, 1))
    assert compressed_mi(x, y, dims=2).value < 0.1 < 1 < compressed_mi(x[:, :1], y[:, :1], dims=2).value
    assert pca_codes(x, 2).shape == (2000, 2) and pca_codes(x, 9).shape == (2000, 5)
    assert "2+1" in compressed_mi(x, y, dims=(2, 1), estimator="wkl").estimator


def test_autoencoder_codes_hold_what_varies_and_no_more():
    rng = np.random.default_rng(0)
    angle = rng.uniform(-2.5, 2.5, size=(2000, 1))
    arc = np.hstack([np.cos(angle), np.sin(angle)]) @ rng.normal(size=(2, 8)) + 0.02 * rng.normal(size=(2000, 8))
    codes = autoencoder_codes(arc, 2)
    assert codes.shape == (2000, 2) and np.array_equal(codes, autoencoder_codes(arc, 2))
    other = angle + 0.3 * rng.normal(size=(2000, 1))
    found = compressed_mi(arc, other, dims=(2, 1), codes="autoencoder")
    assert "autoencoder codes 2+1" in found.estimator
    assert abs(found.value - compressed_mi(angle, other, dims=1).value) < 0.15
    assert compressed_mi(rng.normal(size=(2000, 8)), other, dims=(2, 1), codes="autoencoder").value < 0.1
    assert autoencoder_codes(arc, 99).shape == (2000, 8)


# Spectral


def test_von_neumann_reference_values():
    x = np.random.default_rng(12).normal(size=(300, 20))
    assert bits(von_neumann_entropy(x)) == pytest.approx(4.273208, abs=1e-5)
    assert bits(matrix_entropy(x, kernel="cosine")) == pytest.approx(4.273208, abs=1e-5)
    assert bits(matrix_entropy(x, kernel="cosine", alpha=2)) == pytest.approx(4.227338, abs=1e-5)
    assert effective_rank(x) == pytest.approx(2**4.273208, abs=1e-4)
    assert von_neumann_entropy(x).value < math.log(20)


def test_von_neumann_does_not_see_scale_and_counts_directions():
    x = np.random.default_rng(0).normal(size=(400, 6))
    assert von_neumann_entropy(100 * x).value == pytest.approx(von_neumann_entropy(x).value)
    assert effective_rank(np.eye(8)[np.arange(400) % 8]) == pytest.approx(8)
    assert effective_rank(np.tile([1.0, 2.0], (400, 1))) == pytest.approx(1)
    wide = np.random.default_rng(1).normal(size=(300, 1000))
    assert von_neumann_entropy(wide).value < math.log(300) and von_neumann_entropy(wide).status == "undersampled"


def test_rows_of_zeros_are_named_and_left_out():
    x = np.random.default_rng(0).normal(size=(400, 6))
    padded = von_neumann_entropy(np.vstack([x, np.zeros((3, 6))]))
    assert (
        padded.value == pytest.approx(von_neumann_entropy(x).value) and padded.n == 400 and "3 rows" in padded.notes[0]
    )
    assert von_neumann_entropy(np.zeros((300, 4))).value is None and effective_rank(np.zeros((300, 4))) is None


def test_matrix_information():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    same, other = matrix_mi(x, x, width=2.0).value, matrix_mi(x, rng.normal(size=(400, 2)), width=2.0).value
    assert same > 2 * other > 0, "independent samples do not give 0"
    assert matrix_mi(x, x, width=0.01).status == "saturated"
    assert np.trace(gram(x)) == pytest.approx(1)
    near = [matrix_entropy(x, alpha=a, width=1.0).value for a in (0.999, 1.0, 1.001)]
    assert near[0] > near[1] > near[2] and near[0] - near[2] < 0.01


def test_diffusion_reference_values():
    x = np.random.RandomState(0).uniform(0, 1, (1000, 256))
    assert bits(diffusion_entropy(x)) == pytest.approx(2.308107, abs=1e-5)
    assert bits(diffusion_entropy(x, t=2)) == pytest.approx(0.004915, abs=1e-5)
    narrow = diffusion_entropy(x, width=1.0)
    assert bits(narrow) == pytest.approx(9.965784, abs=1e-5) and narrow.status == "saturated"
    assert bits(diffusion_entropy(clusters(0)[0])) == pytest.approx(1.286972, abs=1e-5)
    assert bits(diffusion_entropy(clusters(5)[0])) == pytest.approx(3.557957, abs=1e-5)


def test_diffusion_entropy_moves_with_the_scale_alone():
    assert bits(diffusion_entropy(10 * clusters(0)[0])) == pytest.approx(8.961054, abs=1e-5)


@pytest.mark.parametrize(("shift", "expected"), [(0, 0.0039), (1, 0.631), (5, 2.158)])
def test_diffusion_information_grows_with_the_distance_of_classes(shift, expected):
    """Within 0.01 bits: which subsets the reference drew is not known."""
    assert bits(diffusion_mi(*clusters(shift))) == pytest.approx(expected, abs=0.01)
    assert diffusion_mi(*clusters(shift)).value == diffusion_mi(*clusters(shift)).value


# Wrong input


@pytest.mark.parametrize(
    "call",
    [
        lambda x: binned_entropy(x, bins=1),
        lambda x: binned_mi(x, np.zeros(3, int)),
        lambda x: kernel_mi(0 * x),
        lambda x: kernel_mi(x, np.zeros(3, int)),
        lambda x: weighted_kl_entropy(x, k=len(x)),
        lambda x: weighted_kl_mi(x, x[:-1]),
        lambda x: diffusion_entropy(x, width=0),
        lambda x: diffusion_mi(x, np.arange(len(x))),
        lambda x: gram(0 * x),
        lambda x: gram(0 * x, kernel="cosine"),
        lambda x: von_neumann_entropy(np.full((20, 2), np.nan)),
    ],
)
def test_unusable_samples_are_refused(call):
    with pytest.raises(BadSamples):
        call(np.random.default_rng(0).normal(size=(50, 3)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kernel_mi(x, bound="middle"),
        lambda x: gram(x, kernel="linear"),
        lambda x: matrix_entropy(x, alpha=0),
        lambda x: compressed_mi(x, x, estimator="mine"),
        lambda x: compressed_mi(x, x, codes="zip"),
        lambda x: pca_codes(x, 0),
        lambda x: autoencoder_codes(x, 0),
        lambda x: neighbour_weights(0, 3),
    ],
)
def test_unknown_options_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call(np.random.default_rng(0).normal(size=(50, 3)))
