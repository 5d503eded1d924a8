"""Information of Gaussian data, and the closed forms that estimators are tested against; nats throughout."""

import numpy as np
from scipy.special import gammaln, logsumexp, psi

from ibprune.mi.samples import FEW, BadSamples, Estimate, as_pair, copies, mean_with_interval

HEAVY_TAILS = 20.0  # kurtosis above which a covariance says little


def gaussian_mi(x, y, *, debias: bool = True) -> Estimate:
    """I(X; Y) if x and y are jointly Gaussian; for other data neither a lower nor an upper bound.

    The value is -1/2 sum log(1 - rho_i^2) over the canonical correlations rho_i, which equals
    1/2 (log|Sx| + log|Sy| - log|S|) for the sample covariances (Cover & Thomas, Elements of Information
    Theory, 2nd ed., Example 8.5.1), but stands collinear features. Debiasing subtracts what the logarithms of Wishart
    determinants add on average (Misra, Singh & Demchuk 2005), as much as p q / 2n for large n.
    The terms are the information densities under the fit: their spread gives the interval.

    Args:
        x: Samples, (n, p).
        y: Samples, (n, q).

    Returns:
        Nats. "degenerate" without a value where one side is constant or determines a part of the other,
        "undersampled" below 200 samples or 5 samples per feature, "biased" where tails are heavy.

    Raises:
        BadSamples: As in `as_pair`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal(5000)
        >>> round(gaussian_mi(x, 0.6 * x + 0.8 * rng.standard_normal(5000)).value, 1)  # -1/2 log(1 - 0.36) = 0.22
        0.2
    """
    x, y = as_pair(x, y)
    n, name = len(x), "gaussian, debiased" if debias else "gaussian"
    basis_x, basis_y = _orthonormal(x), _orthonormal(y)
    p, q = basis_x.shape[1], basis_y.shape[1]
    if p == 0 or q == 0:
        return Estimate(None, "degenerate", name, n, notes=("One side is constant.",))
    if p + q >= n - 1:
        note = f"{p} + {q} independent features need more than {n} samples."
        return Estimate(None, "undersampled", name, n, notes=(note,))
    left, rho, right = np.linalg.svd(basis_x.T @ basis_y, full_matrices=False)
    if rho[0] ** 2 > 1 - 1e-12:
        note = "A combination of features of one side is a linear function of the other side."
        return Estimate(None, "degenerate", name, n, notes=(note,))
    u, v = np.sqrt(n) * basis_x @ left, np.sqrt(n) * basis_y @ right.T
    quadratic = (u**2 - 2 * rho * u * v + v**2) / (1 - rho**2) - u**2 - v**2
    terms = -0.5 * (np.log1p(-(rho**2)) + quadratic).sum(axis=1)
    if debias:
        terms = terms - 0.5 * (_wishart(n, p) + _wishart(n, q) - _wishart(n, p + q))
    value, ci95 = mean_with_interval(terms)
    status, notes = "ok", []
    tails = max(_kurtosis(x), _kurtosis(y))
    if tails > HEAVY_TAILS:
        status = "biased"
        notes.append(f"Kurtosis up to {tails:.0f}: the samples are far from Gaussian.")
    if n < FEW or n < 5 * (p + q):
        status = "undersampled"
        notes.append(f"{n} samples for {p} + {q} features.")
    copied = copies(x, y)
    if copied:
        status = "degenerate"
        notes.append(copied)
    return Estimate(value, status, name, n, ci95=ci95, notes=tuple(notes), terms=terms)


def mi_from_covariance(covariance: np.ndarray, dim_x: int) -> float:
    """I of jointly Gaussian X and Y, 1/2 (log|Sx| + log|Sy| - log|S|), nats (Cover & Thomas, Example 8.5.1).

    Args:
        covariance: Of (X, Y), (dim_x + dim_y, dim_x + dim_y); any positive scale of X and Y.
        dim_x: Number of coordinates of X, which come first.

    Raises:
        BadSamples: Not symmetric and positive definite, or no coordinate left for X or Y.

    Example:
        >>> round(mi_from_covariance(np.array([[1, 0.75], [0.75, 1]]), 1), 6)
        0.413339
    """
    if not 0 < dim_x < len(covariance):
        raise BadSamples(f"expected 'dim_x' from 1 to {len(covariance) - 1}, found {dim_x}.")
    parts = covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance
    of_x, of_y, of_both = (_log_det(part) for part in parts)
    return 0.5 * (of_x + of_y - of_both)


def awgn_mi(weight: np.ndarray, covariance: np.ndarray, sigma: float) -> float:
    """I(X; W X + sigma Z) for Gaussian X, 1/2 logdet(1 + W S W^T / sigma^2), nats (Cover & Thomas, section 9.5).

    Args:
        weight: W, (d, dim_x).
        covariance: S, of X, (dim_x, dim_x).
        sigma: Standard deviation of the noise in each of the d outputs.

    Example:
        >>> round(awgn_mi(np.eye(4), np.eye(4), 1.0), 6)
        1.386294
    """
    weight, covariance = np.asarray(weight, dtype=float), np.asarray(covariance, dtype=float)
    return 0.5 * _log_det(np.eye(len(weight)) + weight @ covariance @ weight.T / sigma**2)


def mixture_mi(means, *, weights=None, sigma: float = 1.0) -> float:
    """I(C; X) for a class C and X = means[C] + sigma Z, one-dimensional, nats, by quadrature (10 digits).

    Args:
        means: Of the classes, (K,).
        weights: Their probabilities, (K,); equal if not given.
        sigma: Standard deviation within every class.

    Example:
        >>> round(mixture_mi([0.0, 1.5, 3.0]), 6)
        0.447161
    """
    means = np.asarray(means, dtype=float) / sigma
    weights = np.full(len(means), 1 / len(means)) if weights is None else np.asarray(weights, dtype=float)
    z = np.linspace(-12, 12, 4801)  # the trapezoid rule converges geometrically for functions of Gaussian decay
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    total = 0.0
    for mean, weight in zip(means, weights):
        x = (mean + z)[:, None]
        log_ratio = -0.5 * z**2 - logsumexp(-0.5 * (x - means) ** 2, b=weights, axis=1)
        total += weight * np.sum(density * log_ratio) * (z[1] - z[0])
    return float(total)


def bpsk_mi(sigma: float) -> float:
    """I(X; X + sigma Z) for X = -1 or 1 with equal chance, nats, by quadrature.

    Example:
        >>> round(bpsk_mi(0.5), 6)
        0.63272
    """
    return mixture_mi([-1.0, 1.0], sigma=sigma)


def additive_uniform_mi(epsilon: float) -> float:
    """I(X; X + E) for X uniform on (0, 1) and E uniform on (-epsilon, epsilon), nats (arXiv 2306.11078).

    Example:
        >>> round(additive_uniform_mi(0.1), 6), additive_uniform_mi(0.75)
        (1.709438, 0.3333333333333333)
    """
    return 0.25 / epsilon if epsilon > 0.5 else float(epsilon - np.log(2 * epsilon))


def student_mi(dim_x: int, dim_y: int, dof: float, *, dispersion: np.ndarray | None = None) -> float:
    """I of jointly Student-t X and Y, h(X) + h(Y) - h(X, Y), nats (Arellano-Valle et al. 2013).

    Not zero for the identity as dispersion: the coordinates share one random scale.

    Args:
        dispersion: (dim_x + dim_y, dim_x + dim_y); the identity if not given.

    Example:
        >>> round(student_mi(1, 1, 1), 6)
        0.224171
    """
    shared_scale = _student_entropy(dim_x, dof) + _student_entropy(dim_y, dof) - _student_entropy(dim_x + dim_y, dof)
    return shared_scale + (0.0 if dispersion is None else mi_from_covariance(dispersion, dim_x))


def _student_entropy(dim: int, dof: float) -> float:
    """Differential entropy of a Student-t vector with the identity as dispersion."""
    half, upper = dof / 2, (dof + dim) / 2
    log_norm = gammaln(half) - gammaln(upper) + dim / 2 * np.log(dof * np.pi)
    return float(log_norm + upper * (psi(upper) - psi(half)))


def _log_det(matrix: np.ndarray) -> float:
    sign, value = np.linalg.slogdet(matrix)
    if sign <= 0 or not np.allclose(matrix, np.transpose(matrix)):
        raise BadSamples(f"expected a symmetric positive definite matrix, found log|S| = {value:g}, sign {sign:g}.")
    return float(value)


def _wishart(n: int, dim: int) -> float:
    """Bias of log|S|, less the terms that cancel between X, Y and both together."""
    return float(psi((n - 1 - np.arange(dim)) / 2).sum())


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span the centred features, (n, rank)."""
    centred = x - x.mean(axis=0)
    scale = np.sqrt((centred**2).mean(axis=0))
    varies = scale > 1e-12 * np.abs(x).max(axis=0)
    if not varies.any():
        return np.empty((len(x), 0))
    # Features in unlike units may not be lost as small beside each other.
    left, size, _ = np.linalg.svd(centred[:, varies] / scale[varies], full_matrices=False)
    return left[:, size > 1e-10 * size[0]]


def _kurtosis(x: np.ndarray) -> float:
    """Largest kurtosis of a feature; 3 for Gaussian ones."""
    centred = x - x.mean(axis=0)
    scale = np.sqrt((centred**2).mean(axis=0))
    return float(((centred / np.where(scale > 0, scale, 1)) ** 4).mean(axis=0).max())
