"""Trained-critic bounds: near the truth where it is known, not above it where nothing depends, never clipped."""

import math

import numpy as np
import pytest
import torch

from ibprune.mi.critics import Training, infonce, mine, nwj, smile
from ibprune.mi.density_ratio import Critic, Pairs, as_tensor, gaussian_parts, network_inputs
from ibprune.mi.neighbours import gaussianize
from ibprune.mi.samples import BadSamples

QUICK = Training(steps=60, batch=128, width=32, rank=8)
ALL = (infonce, mine, nwj, smile)


def correlated(n: int, d: int, mi: float, seed: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """d independent pairs of Gaussians sharing `mi` nats together."""
    rng = np.random.default_rng(seed)
    rho = math.sqrt(1 - math.exp(-2 * mi / d))
    x = rng.normal(size=(n, d))
    return x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=(n, d))


@pytest.mark.parametrize("bound", ALL)
def test_correlated_gaussians(bound):
    estimate = bound(*correlated(2000, 3, 1.0), training=QUICK)
    assert estimate.value == pytest.approx(1.0, abs=0.1) and estimate.status == "ok"
    assert estimate.ci95[0] < estimate.value < estimate.ci95[1]
    assert len(estimate.terms) == estimate.n == 2000 and estimate.terms.mean() == pytest.approx(estimate.value)


def test_marginal_maps_do_not_matter_to_the_ranks():
    x, y = correlated(2000, 1, 0.5)
    assert infonce(x, y, training=QUICK).value == infonce(x**3, np.exp(y), training=QUICK).value


def test_what_no_gaussian_sees_is_learned():
    rng = np.random.default_rng(100)
    x = rng.normal(size=(2000, 1))
    y = x**2 + 0.3 * rng.normal(size=x.shape)
    start = infonce(x, y, training=Training(steps=0)).value
    learned = infonce(x, y, training=Training(steps=200, batch=128, width=32, rank=8)).value
    assert start < 0.1 and learned > start + 0.6


@pytest.mark.parametrize(("bound", "repeats"), [(infonce, 4), (mine, 2), (nwj, 2), (smile, 2)])
def test_independent_samples_give_at_most_nothing_and_are_not_clipped(bound, repeats):
    rng = np.random.default_rng(101)
    samples = [(rng.normal(size=(1000, 2)), rng.normal(size=(1000, 2))) for _ in range(repeats)]
    estimates = [bound(x, y, training=QUICK) for x, y in samples]
    assert all(e.ci95[0] <= 0 for e in estimates)
    assert min(e.value for e in estimates) < 0 and max(e.value for e in estimates) < 0.01


def test_the_same_seed_gives_the_same_value_and_leaves_the_global_one_alone():
    x, y = correlated(600, 2, 0.5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (infonce(x, y, training=QUICK, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert first == again and np.array_equal(first.terms, again.terms) and first.value != other.value


def test_near_the_ceiling_infonce_says_so_and_stays_below():
    estimate = infonce(*correlated(1500, 4, 12.0), training=QUICK)
    assert estimate.status == "saturated" and estimate.value < math.log(500)
    assert "500" in estimate.notes[0]


def test_smile_is_no_bound_and_says_so():
    x, y = correlated(1500, 4, 4.0)
    low, high = (smile(x, y, tau=tau, training=QUICK) for tau in (0.5, 20.0))
    assert low.value > high.value + 0.2 and low.ci95[0] > 4.0, "true: 4"
    assert "not a bound" in low.notes[0] and low.status in ("ok", "saturated")


def test_few_or_constant_samples():
    x, y = correlated(400, 1, 0.5)
    assert infonce(x, y, training=QUICK).status == "undersampled"
    few = infonce(x[:50], y[:50])
    assert few.value is None and few.status == "undersampled"
    constant = infonce(np.ones(400), y)
    assert constant.value is None and constant.status == "degenerate"
    with pytest.raises(BadSamples):
        infonce(x, y[:-1])
    with pytest.raises(BadSamples):
        infonce(x, y, training=Training(folds=1))
    with pytest.raises(ValueError, match="tau"):
        smile(x, y, tau=0)


def test_integers_and_copies_of_a_feature_are_no_obstacle():
    x, y = correlated(600, 2, 0.8)
    doubled = np.hstack([x, x, np.zeros((600, 1))])
    assert infonce(doubled, y, training=QUICK).value == pytest.approx(0.8, abs=0.2)
    assert infonce(np.sign(x), y, training=QUICK).value > 0.2


def test_the_untrained_critic_is_the_gaussian_log_density_ratio():
    x, y = correlated(20000, 1, 0.5)
    rho2 = 1 - math.exp(-1)
    parts = gaussian_parts(x, y, np.arange(len(x)))
    pairs = Pairs(as_tensor(network_inputs(x, gaussianize(x))), as_tensor(y), *map(as_tensor, parts)).take(
        np.arange(50)
    )
    values = Critic(pairs.x.shape[1], 1, 8, 4)(pairs).detach().numpy()
    a, b = x[:50], y[:50].T
    expected = -0.5 * math.log(1 - rho2) + (math.sqrt(rho2) * a * b - rho2 * (a**2 + b**2) / 2) / (1 - rho2)
    assert np.abs(values - expected).max() < 0.2


def test_many_features_do_not_overfit_the_gaussian():
    """50 + 50 dimensions with one shared direction: uncorrected correlations lose 0.2 nats on new samples."""
    rng = np.random.default_rng(100)
    covariance = np.full((100, 100), 0.5) + 0.5 * np.eye(100)
    both = rng.standard_normal((6000, 100)) @ np.linalg.cholesky(covariance).T
    estimate = infonce(both[:, :50], both[:, 50:], training=Training(steps=0))
    assert estimate.value == pytest.approx(1.624265, abs=0.08)
