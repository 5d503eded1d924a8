"""Entropies of Gram matrices and diffusion operators: rank-like summaries of a layer, not Shannon information.

All values are in nats. `von_neumann_entropy` and `effective_rank` describe how many directions a layer uses
and are part of the audit; the others are options for comparison with papers that print them.
"""

import math
from dataclasses import replace

import numpy as np
from scipy.spatial.distance import pdist
from scipy.special import entr

from ibprune.mi.samples import FEW, BadSamples, Estimate, as_labels, as_pair, as_samples

NEAR_CAP = 0.7  # of ln n: above it a kernel is so narrow that every sample is its own cluster
NOT_SHANNON = "depends on the kernel and its width; not in general a Shannon entropy or information"


def von_neumann_entropy(features) -> Estimate:
    """-sum_i l_i ln l_i over the eigenvalues of X^T X / n with rows of length 1 (Skean et al. 2025, arXiv 2502.02013).

    Rows of zeros have no direction and are left out, with a note.

    Args:
        features: (n, d).

    Returns:
        At most ln min(n, d); "undersampled" with fewer samples than features, which lowers it.

    Raises:
        BadSamples: As in `as_samples`.

    Example:
        >>> von_neumann_entropy(np.random.default_rng(12).normal(size=(300, 20))).value * NATS_TO_BITS
        4.273208...
    """
    x = as_samples(features, "features")
    lengths = np.linalg.norm(x, axis=1)
    notes = (f"left out {(lengths == 0).sum()} rows of zeros",) if (lengths == 0).any() else ()
    x = x[lengths > 0] / lengths[lengths > 0, None]
    n, d = x.shape
    if n == 0:
        return Estimate(None, "degenerate", "von Neumann", 0, notes=notes)
    # Both products have the same eigenvalues above 0.
    value = _spectral_entropy(np.linalg.eigvalsh((x.T @ x if d <= n else x @ x.T) / n))
    status = "undersampled" if n < max(FEW, d) else "ok"
    return Estimate(value, status, f"von Neumann, at most ln {min(n, d)}", n, notes=notes)


def effective_rank(features) -> float | None:
    """Number of directions that the rows of a feature matrix use, exp of `von_neumann_entropy`, from 1 to min(n, d).

    As in Roy & Vetterli (2007, "The effective rank", definition 1), on the squared singular values of the rows
    scaled to length 1 in place of the singular values. None where every row is 0.

    Raises:
        BadSamples: As in `as_samples`.

    Example:
        >>> effective_rank(np.tile([1.0, 2.0], (10, 1)))
        1.0
    """
    value = von_neumann_entropy(features).value
    return None if value is None else math.exp(value)


def gram(x, *, kernel: str = "gaussian", width: float | None = None) -> np.ndarray:
    """Kernel matrix with trace 1, (n, n): K_ij / (n sqrt(K_ii K_jj)) (Sanchez Giraldo, Rao & Principe 2015).

    Args:
        x: Samples, (n, d).
        kernel: "gaussian", exp(-|x_i - x_j|^2 / (2 width^2)), or "cosine", the cosine of the two rows: as it is,
            since clamping it at 0 would make the matrix indefinite.
        width: Of the Gaussian, in the unit of x; None takes the median distance between two samples.

    Raises:
        BadSamples: As in `as_samples`; a row of zeros with "cosine"; all samples alike and no width.
        ValueError: Unknown kernel.
    """
    x = as_samples(x)
    if kernel == "cosine":
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        if (lengths == 0).any():
            raise BadSamples("expected no row of zeros with the cosine kernel.")
        return (x / lengths) @ (x / lengths).T / len(x)
    if kernel != "gaussian":
        raise ValueError(f"expected 'gaussian' or 'cosine' as the kernel, found '{kernel}'.")
    width = float(np.median(pdist(x[:1000]))) if width is None else width
    if not width > 0:
        raise BadSamples("expected a width above 0: give one where most samples are alike.")
    return _gaussian(x, width) / len(x)


def matrix_entropy(x, *, alpha: float = 1.0, kernel: str = "gaussian", width: float | None = None) -> Estimate:
    """Matrix-based Renyi entropy ln(sum_i l_i^alpha) / (1 - alpha), l the eigenvalues of `gram`.

    Sanchez Giraldo, Rao & Principe (2015, arXiv 1211.2459); alpha = 1 is its limit, the
    von Neumann entropy -sum_i l_i ln l_i.

    Args:
        x: Samples, (n, d).
        alpha: Order, above 0; the papers on networks use 1.01 or 2.
        kernel: As in `gram`.
        width: As in `gram`.

    Returns:
        At most ln n, "saturated" from 0.7 ln n on.

    Raises:
        BadSamples: As in `gram`.
        ValueError: Unknown kernel, or an order of 0 or less.

    Example:
        >>> matrix_entropy(layer, alpha=2.0, kernel="cosine").value
    """
    value = _renyi(gram(x, kernel=kernel, width=width), alpha)
    return _judged(value, value, len(x), f"matrix Renyi, alpha={alpha:g}, {kernel}")


def matrix_mi(x, y, *, alpha: float = 1.0, kernel: str = "gaussian", width: float | None = None) -> Estimate:
    """S(A) + S(B) - S(A o B / tr(A o B)) with A, B the `gram` matrices of x and y and o the entrywise product.

    Sanchez Giraldo, Rao & Principe (2015, arXiv 1211.2459), as Yu et al. (2019, arXiv 1804.06537)
    use on layers.

    Args:
        x: Samples, (n, d_x).
        y: Samples, (n, d_y).
        alpha: Order, above 0.
        kernel: As in `gram`.
        width: As in `gram`, in the unit of both; None takes the median distance of each.

    Returns:
        "saturated" where the joint entropy lies above 0.7 ln n. Not 0 for independent samples.

    Raises:
        BadSamples: As in `as_pair` and `gram`.
        ValueError: Unknown kernel, or an order of 0 or less.

    Example:
        >>> matrix_mi(x, y, alpha=1.01).value
    """
    x, y = as_pair(x, y)
    a, b = (gram(v, kernel=kernel, width=width) for v in (x, y))
    joint = a * b
    whole = _renyi(joint / np.trace(joint), alpha)
    value = _renyi(a, alpha) + _renyi(b, alpha) - whole
    return _judged(value, whole, len(x), f"matrix Renyi MI, alpha={alpha:g}, {kernel}")


def diffusion_entropy(x, *, width: float = 10.0, t: int = 1) -> Estimate:
    """Diffusion spectral entropy -sum_i p_i ln p_i, p_i = |l_i|^t / sum_j |l_j|^t (Liao et al. 2023, arXiv 2312.04823).

    l are the eigenvalues of D^-1/2 G D^-1/2, G_ij = exp(-|x_i - x_j|^2 / (2 width^2)), D its row sums. The width
    is absolute: the same layer times 10 goes from 1.29 to 8.96 bits, so pruning that only rescales moves it.

    Args:
        x: Samples, (n, d).
        width: Of the kernel, in the unit of x.
        t: Steps of diffusion; more keep only the largest eigenvalues.

    Returns:
        At most ln n, "saturated" from 0.7 ln n on.

    Raises:
        BadSamples: As in `as_samples`, or a width not above 0.

    Example:
        >>> diffusion_entropy(np.random.default_rng(3).normal(size=(500, 16))).value * NATS_TO_BITS
        1.286971...
    """
    x = as_samples(x)
    value = _diffusion_entropy(x, width, t)
    return _judged(value, value, len(x), f"DSE, width={width:g}, t={t}")


def diffusion_mi(x, labels, *, width: float = 10.0, t: int = 1, repeats: int = 5, seed: int = 0) -> Estimate:
    """Diffusion spectral mutual information S(x) - sum_c p_c S(x | c) (Liao et al. 2023, arXiv 2312.04823).

    S grows with the number of samples, so S(x) is taken on random subsets as large as each class, as there.

    Args:
        x: Samples, (n, d).
        labels: Classes, (n,), each of at least 2 samples.
        width: As in `diffusion_entropy`.
        t: As in `diffusion_entropy`.
        repeats: Subsets drawn per class.
        seed: Of the subsets.

    Returns:
        May be negative; "saturated" where S(x) of a subset lies above 0.7 of its logarithm of samples.

    Raises:
        BadSamples: As in `as_samples` and `as_labels`, differing lengths, a class of one sample, or a width
            not above 0.

    Example:
        >>> diffusion_mi(layer, labels).value
    """
    x, labels = as_samples(x), as_labels(labels)
    if len(x) != len(labels):
        raise BadSamples(f"expected a label per row of 'x' ({len(x)}), found {len(labels)}.")
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise BadSamples("expected at least 2 samples of each class.")
    whole, inside, filled = 0.0, 0.0, 0.0
    for c, count in enumerate(counts):
        subsets = [rng.choice(len(x), count, replace=False) for _ in range(repeats)]
        drawn = float(np.mean([_diffusion_entropy(x[rows], width, t) for rows in subsets]))
        whole += count / len(x) * drawn
        filled += count / len(x) * drawn / math.log(count)
        inside += count / len(x) * _diffusion_entropy(x[labels == c], width, t)
    found = _judged(whole - inside, filled, len(x), f"DSMI, width={width:g}, t={t}", cap=1.0)
    return replace(found, notes=(*found.notes, f"S(x) on {repeats} random subsets per class"))


def _gaussian(x: np.ndarray, width: float) -> np.ndarray:
    squares = (x**2).sum(axis=1)
    return np.exp(-np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0.0) / (2 * width**2))


def _diffusion_entropy(x: np.ndarray, width: float, t: int) -> float:
    if not width > 0 or t < 1:
        raise BadSamples(f"expected a width above 0 and at least one step, found {width} and {t}.")
    kernel = _gaussian(x, width)
    root = np.sqrt(kernel.sum(axis=1))
    powers = np.abs(np.linalg.eigvalsh(kernel / root[:, None] / root)) ** t
    return float(entr(powers / powers.sum()).sum())


def _renyi(matrix: np.ndarray, alpha: float) -> float:
    if not alpha > 0:
        raise ValueError(f"expected an order above 0, found {alpha}.")
    values = np.linalg.eigvalsh(matrix)
    if abs(alpha - 1) < 1e-9:
        return _spectral_entropy(values)
    # The rounding errors of a rank-deficient matrix would count as directions for alpha below 1.
    values = values[values > len(values) * np.finfo(float).eps]
    return float(np.log((values**alpha).sum()) / (1 - alpha))


def _spectral_entropy(values: np.ndarray) -> float:
    return float(entr(np.maximum(values, 0.0)).sum())


def _judged(value: float, fill: float, n: int, name: str, *, cap: float | None = None) -> Estimate:
    """The estimate, "saturated" where `fill` lies above 0.7 of its largest value, ln n unless given."""
    cap = math.log(n) if cap is None else cap
    status = "saturated" if fill > NEAR_CAP * cap else "undersampled" if n < FEW else "ok"
    return Estimate(float(value), status, name, n, notes=(NOT_SHANNON,))
