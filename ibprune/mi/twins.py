"""Twins: the same estimator on synthetic data of the same size, dimension and spectrum, whose truth is known."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.covariance import ledoit_wolf

from ibprune.mi.channel import Bracket, readout_bracket, spectrum
from ibprune.mi.gaussian import mi_from_covariance
from ibprune.mi.probes import LOGISTIC, Probe, v_information
from ibprune.mi.samples import NATS_TO_BITS, Estimate, as_labels, as_pair, as_samples

TOLERANCE = 0.1 / NATS_TO_BITS, 0.1  # 0.1 bit, or a tenth of the truth
DRAWS = 20_000  # Monte-Carlo draws for the truth of a mixture: its error is below 0.01 nats


@dataclass(frozen=True)
class Twin:
    """What the estimator made of data whose information is known, nats.

    Attributes:
        truth: The known value.
        lower, upper: Its estimate; equal for point estimators.
        error: 0 where the truth lies within [lower, upper], else the signed distance to it.
    """

    truth: float
    lower: float
    upper: float
    error: float

    @property
    def trusted(self) -> bool:
        """Within 0.1 bit or 10 % of the truth."""
        return abs(self.error) <= max(TOLERANCE[0], TOLERANCE[1] * self.truth)


def channel_twin(features, sigma: float, *, noise: np.ndarray | None = None, repeats: int = 4, seed: int = 0) -> Twin:
    """Twin of `readout_bracket`: Gaussian features of the layer's own spectrum.

    The truth is 1/2 sum log(1 + lambda/sigma^2) over its eigenvalues (Cover & Thomas, section 9.5).
    """
    f = as_samples(features, "features")
    f = f - f.mean(axis=0)
    values, _ = spectrum(f)
    draws = np.zeros_like(f)
    draws[:, : len(values)] = np.random.default_rng([seed, 49_979_687]).standard_normal((len(f), len(values)))
    draws[:, : len(values)] *= np.sqrt(values)
    bracket = readout_bracket(draws, sigma, noise=noise, repeats=repeats, seed=seed)
    truth = 0.5 * float(np.log1p(values / sigma**2).sum())
    return _twin(truth, *_ends(bracket))


def probe_twin(features, labels, *, probe: Probe = LOGISTIC, folds: int = 5, seed: int = 0) -> Twin | None:
    """Twin of `v_information`: Gaussian classes with the layer's pooled covariance and its class means.

    Means estimated from n_c samples in d dimensions spread too far even when nothing separates them: the
    singular values of the whitened means lose the noise's own energy, (sqrt C + sqrt d)^2 / n_c. The truth
    comes by Monte Carlo from the exact densities in the span of the means.

    Returns:
        The twin, whose error is the bias to expect of the probe, or None where the probe gives no value.
    """
    x, y = as_samples(features, "features"), as_labels(labels)
    counts = np.bincount(y)
    if len(counts) < 2 or counts.min() < folds or not np.ptp(x, axis=0).any():
        return None
    n, d, classes = len(x), x.shape[1], len(counts)
    share = counts / n
    means = np.stack([x[y == label].mean(axis=0) for label in range(classes)])
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov((x - means[y]).T, bias=True)))
    values = np.maximum(values, 1e-9 * x.var(axis=0).max())  # classes may have no width of their own: token embeddings
    values = shrunk_eigenvalues(values, n - classes)
    white = (means - share @ means) @ (vectors / np.sqrt(values))
    left, singular, right = np.linalg.svd(white, full_matrices=False)
    noise_energy = (np.sqrt(classes) + np.sqrt(d)) ** 2 * np.mean(1.0 / counts)
    singular = np.sqrt(np.maximum(singular**2 - noise_energy, 0.0))
    centres = left * singular  # in the span of the means: (C, at most min(C, d))
    rng = np.random.default_rng([seed, 67_867_967])
    whitened = rng.standard_normal((n, d)) + (centres @ right)[y]
    twin = whitened @ (vectors * np.sqrt(values)).T
    estimate = v_information(twin, y, probe=probe, folds=folds, seed=seed)
    truth = _mixture_information(centres, share, rng)
    return _twin(truth, estimate.value, estimate.value)


def shrunk_eigenvalues(values: np.ndarray, n: int) -> np.ndarray:
    """Eigenvalues of a covariance matrix from those of a sample one, each moved by its own amount, (d,).

    Those of n samples spread too far, and a common pull towards their mean hides the few that are small. The
    analytical nonlinear shrinkage of Ledoit & Wolf (2020, Annals of Statistics 48(5), eq. 4.3 and 4.7 to 4.9).

    Args:
        values: Ascending, (d,). n: Samples, less what was fitted to them.
    """
    d = len(values)
    if d >= n:  # no eigenvalue of its own below: all are pulled towards the mean
        return 0.5 * values + 0.5 * values.mean()
    width = n ** (-1 / 3) * values  # of the kernel, at each eigenvalue
    x = (values[:, None] - values[None]) / width[None]
    edge = np.sqrt(5.0)
    density = 0.75 / edge * np.mean(np.maximum(1 - x**2 / 5, 0) / width, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(np.abs((edge - x) / (edge + x)))
        near = -0.3 * x + np.where(np.isfinite(log), 0.75 / edge * (1 - x**2 / 5) * log, 0.0)
        far = -1 / x - 1 / x**3  # where the terms of `near` cancel: eigenvalues span many orders of magnitude
    hilbert = np.mean(np.where(np.abs(x) > 100, far, near) / np.pi / width, axis=1)
    ratio = np.pi * d / n * values
    return values / ((ratio * density) ** 2 + (1 - d / n - ratio * hilbert) ** 2)


def pair_twin(x, y, estimator: Callable[[np.ndarray, np.ndarray], Estimate], *, seed: int = 0) -> Twin | None:
    """Twin of an estimator of I(X; Y): a Gaussian pair with the same dimensions and canonical correlations.

    Returns:
        The twin, or None where the estimator gives no value.
    """
    x, y = as_pair(x, y)
    dims = x.shape[1] + y.shape[1]
    covariance, _ = ledoit_wolf(np.hstack([x, y]) / np.maximum(np.hstack([x, y]).std(axis=0), 1e-12))
    draws = np.random.default_rng([seed, 86_028_121]).multivariate_normal(
        np.zeros(dims), covariance, size=len(x), method="cholesky"
    )
    estimate = estimator(draws[:, : x.shape[1]], draws[:, x.shape[1] :])
    if estimate.value is None:
        return None
    return _twin(mi_from_covariance(covariance, x.shape[1]), estimate.value, estimate.value)


def _mixture_information(centres: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> float:
    """I(Y; m_Y + z) for unit Gaussian z, by Monte Carlo over exact densities."""
    y = rng.choice(len(share), size=DRAWS, p=share)
    points = centres[y] + rng.standard_normal((DRAWS, centres.shape[1]))
    log_p = -0.5 * ((points[:, None] - centres[None]) ** 2).sum(axis=-1)
    log_mixture = np.logaddexp.reduce(log_p + np.log(share), axis=1)
    return max(0.0, float((log_p[np.arange(DRAWS), y] - log_mixture).mean()))


def _ends(bracket: Bracket) -> tuple[float, float]:
    if bracket.lower is None:
        return np.nan, np.nan
    return bracket.ci95


def _twin(truth: float, lower: float, upper: float) -> Twin:
    error = lower - truth if truth < lower else upper - truth if truth > upper else 0.0
    return Twin(truth, float(lower), float(upper), float(error))
