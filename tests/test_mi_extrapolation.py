"""Extrapolation to endless samples, on estimators whose bias is known."""

import numpy as np
import pytest

from ibprune.mi.extrapolation import extrapolate
from ibprune.mi.gaussian import gaussian_mi
from ibprune.mi.samples import BadSamples, Estimate


def pair(n: int, d: int = 6, rho: float = 0.5, seed: int = 0):
    rng = np.random.default_rng([seed, 3])
    x = rng.standard_normal((n, d))
    return x, rho * x + np.sqrt(1 - rho**2) * rng.standard_normal((n, d))


def plug_in(x, y) -> Estimate:
    """The biased Gaussian estimate: its error is close to d_x d_y / 2n."""
    s = np.cov(np.hstack([x, y]).T)
    d = x.shape[1]
    logdet = [np.linalg.slogdet(block)[1] for block in (s[:d, :d], s[d:, d:], s)]
    return Estimate(0.5 * (logdet[0] + logdet[1] - logdet[2]), "ok", "plug-in", len(x))


def test_a_bias_in_one_over_n_is_removed():
    raw, mended = [], []
    for seed in range(10):
        x, y = pair(1200, d=8, seed=seed)
        unbiased = gaussian_mi(x, y).value  # of the same samples: its own error is exactly known and taken out
        found = extrapolate(x, y, plug_in)
        raw.append(plug_in(x, y).value - unbiased)
        mended.append(found.estimate.value - unbiased)
        assert found.slope > 0 and found.gammas[0] == 1 and len(found.gammas) >= 4
    assert np.mean(raw) > 0.025 > 5 * abs(np.mean(mended))


def test_an_estimate_without_bias_stays():
    x, y = pair(3000)
    found = extrapolate(x, y, lambda a, b: gaussian_mi(a, b))
    assert found.estimate.status == "ok"
    assert abs(found.estimate.value - gaussian_mi(x, y).value) < 0.02
    low, high = found.estimate.ci95
    assert low < found.estimate.value < high and "extrapolated" in found.estimate.estimator


@pytest.mark.parametrize("most", [4, 6])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(most):
    truth, found = -2 * np.log(1 - 0.5**2), []
    for seed in range(60):
        found.append(extrapolate(*pair(600, d=4, seed=seed), plug_in, most=most).estimate)
    values = np.array([estimate.value for estimate in found])
    low, high = np.array([estimate.ci95 for estimate in found]).T
    assert np.mean((low < truth) & (truth < high)) >= 0.85  # of 60: three standard errors below .95
    assert 0.75 < np.median(high - low) / (2 * 1.96 * values.std()) < 1.75  # of four sizes Student's t alone is 1.25


def test_a_line_that_bends_is_called_biased():
    x, y = pair(2000)
    found = extrapolate(x, y, lambda a, b: Estimate((2000 / len(a)) ** 2, "ok", "bent", len(a)))
    assert found.estimate.status == "biased" and any("1/n" in note for note in found.estimate.notes)


def test_subsamples_without_a_value_give_none():
    x, y = pair(2000)
    found = extrapolate(x, y, lambda a, b: Estimate(1.0 if len(a) > 900 else None, "ok", "short", len(a)))
    assert found.estimate.value is None and found.estimate.status == "undersampled"


def test_the_samples_are_split_into_one_to_most_parts():
    (x, y), sizes = pair(1200), []

    def counted(a, b):
        sizes.append(len(a))
        return gaussian_mi(a, b)

    found = extrapolate(x, y, counted, most=4)
    assert found.gammas == (1, 2, 3, 4) and sizes == [1200, 600, 600, 400, 400, 400, 300, 300, 300, 300]


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_units_of_measurement_change_neither_the_gaussian_estimate_nor_its_status(unit):
    (x, y), rng = pair(2000), np.random.default_rng(0)
    first, other = gaussian_mi(x, y), gaussian_mi(unit * x, y)
    assert (first.status, other.status) == ("ok", "ok") and other.value == pytest.approx(first.value, abs=1e-9)
    heavy = unit * rng.standard_t(2, size=(2000, 1))
    assert gaussian_mi(heavy, y).status == "biased"


def test_bad_input_is_refused():
    x, y = pair(100)
    with pytest.raises(BadSamples):
        extrapolate(x, y[:50], plug_in)
    with pytest.raises(ValueError, match="at least 4"):
        extrapolate(x, y, plug_in, most=2)
