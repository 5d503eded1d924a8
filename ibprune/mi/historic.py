"""Binning and kernel estimators of the literature, for comparison and never the default.

All values are in nats. `ibprune.mi.channel` says what a layer retains; these say what earlier papers would
have printed. Every one of them returns a number on deterministic networks, where the quantity itself is
infinite or constant (Goldfeld et al. 2019, arXiv 1810.05728): they measure how samples cluster.
"""

import math

import numpy as np
from scipy.special import logsumexp
from scipy.stats import entropy as plug_in

from ibprune.mi.samples import FEW, BadSamples, Estimate, as_labels, as_samples

TRUSTED_SHARE = 0.7  # of ln N: above it a value says how many samples there are, not how they depend


def binned_entropy(layer, *, bins: int = 30, equal_mass: bool = False) -> Estimate:
    """Entropy H(bin(L)) of a layer cut into cells, which the binning papers call I(X;L).

    Shwartz-Ziv & Tishby (2017, arXiv 1703.00810, section 3): one set of equal-width bins for all units, a
    sample's cell is the tuple of its units' bins, I(X;bin(L)) = H(bin(L)) as L is a function of X.
    With `equal_mass` the edges are quantiles of the layer's distinct values instead (EBAB, Chelombiev,
    Houghton & O'Donnell 2019, arXiv 1902.09037).

    Args:
        layer: Activations, (n, d).
        bins: Bins per unit, at least 2.
        equal_mass: Edges at quantiles in place of equal widths.

    Returns:
        At most ln n, reached once every sample has a cell to itself; "saturated" from 0.7 ln n on.

    Raises:
        BadSamples: As in `as_samples`, or fewer than 2 bins.

    Example:
        >>> binned_entropy(np.random.default_rng(0).normal(size=(1000, 8))).status
        'saturated'
    """
    layer = as_samples(layer, "layer")
    cells = _cells(layer, bins, equal_mass)
    value = _discrete_entropy(cells)
    status, notes = _judge(value, len(layer))
    return Estimate(value, status, _binning_name(bins, equal_mass), len(layer), notes=notes)


def binned_mi(layer, labels, *, bins: int = 30, equal_mass: bool = False) -> Estimate:
    """I(bin(L);Y) = H(bin(L)) - H(bin(L)|Y) by counting cells, as in `binned_entropy`.

    Args:
        layer: Activations, (n, d).
        labels: Classes, (n,).
        bins: Bins per unit, at least 2.
        equal_mass: Edges at quantiles in place of equal widths.

    Returns:
        Between 0 and the plug-in H(Y), which it reaches for any labels, random ones too, once every sample
        has a cell to itself: "saturated" where H(bin(L)) is above 0.7 ln n.

    Raises:
        BadSamples: As in `as_samples` and `as_labels`, differing lengths, or fewer than 2 bins.

    Example:
        >>> binned_mi(np.eye(4)[labels], labels, bins=2).value  # = H(Y)
    """
    layer, labels = _labelled(layer, labels)
    cells = _cells(layer, bins, equal_mass)
    whole = _discrete_entropy(cells)
    value = whole - sum(np.mean(labels == c) * _discrete_entropy(cells[labels == c]) for c in np.unique(labels))
    status, notes = _judge(whole, len(layer))
    return Estimate(float(value), status, _binning_name(bins, equal_mass), len(layer), notes=notes)


def kernel_mi(layer, labels=None, *, noise: float = 0.03, adaptive: bool = True, bound: str = "upper") -> Estimate:
    """I(X;L + noise), or I(L + noise;Y) where labels are given, from pairwise Gaussian kernels.

    -1/n sum_i log 1/n sum_j exp(-|l_i - l_j|^2 / (2 s^2)) bounds the first from above, with 4 s^2 for s^2 from
    below (Kolchinsky & Tracey 2017, arXiv 1706.02419, on mixtures of Gaussians; used on layers by Saxe et al.
    2018). The second is the difference to the same on each class and bounds nothing.
    The bounds hold for the uniform mixture of the n samples: they speak of these samples, not of the population.

    Args:
        layer: Activations, (n, d).
        labels: Classes, (n,); None for I(X;L + noise).
        noise: Standard deviation of the noise; with `adaptive` as a share of the layer's largest absolute
            activation (aKDE, Chelombiev et al. 2019; that it is the deviation which scales, and not the
            variance, is our reading, and makes the value independent of the layer's scale).
        adaptive: See `noise`.
        bound: "upper" or "lower".

    Returns:
        At most ln n; "saturated" where the unconditional term is above 0.7 ln n.

    Raises:
        BadSamples: As in `as_samples` and `as_labels`, differing lengths, or a noise of 0.
        ValueError: Unknown bound.

    Example:
        >>> kernel_mi(layer, labels, noise=0.1).value
    """
    if bound not in ("upper", "lower"):
        raise ValueError(f"expected 'upper' or 'lower' as the bound, found '{bound}'.")
    classes = None if labels is None else as_labels(labels)
    layer = as_samples(layer, "layer") if classes is None else _labelled(layer, classes)[0]
    scale = noise * np.abs(layer).max() if adaptive else noise
    if not scale > 0:
        raise BadSamples("expected noise above 0 and a layer that is not all 0.")
    variance = scale**2 * (1.0 if bound == "upper" else 4.0)
    whole = _mixture_term(layer, variance)
    value = whole
    if classes is not None:
        value -= sum(np.mean(classes == c) * _mixture_term(layer[classes == c], variance) for c in np.unique(classes))
    status, notes = _judge(whole, len(layer))
    if status == "ok" and classes is None:
        status = f"{bound}_only"
    name = f"{'aKDE' if adaptive else 'KDE'}, {bound}, noise {scale:.3g}"
    return Estimate(float(value), status, name, len(layer), notes=notes)


def _cells(layer: np.ndarray, bins: int, equal_mass: bool) -> np.ndarray:
    if bins < 2:
        raise BadSamples(f"expected at least 2 bins, found {bins}.")
    if equal_mass:
        # Quantiles of distinct values: a ReLU's zeros would otherwise take most of the edges.
        edges = np.quantile(np.unique(layer), np.linspace(0, 1, bins + 1)[1:-1])
    else:
        edges = np.linspace(layer.min(), layer.max(), bins + 1)[1:-1]
    codes = np.searchsorted(edges, layer, side="right")
    return np.unique(codes, axis=0, return_inverse=True)[1].ravel()


def _discrete_entropy(cells: np.ndarray) -> float:
    return float(plug_in(np.unique(cells, return_counts=True)[1]))


def _mixture_term(layer: np.ndarray, variance: float) -> float:
    """-1/n sum_i log 1/n sum_j exp(-|l_i - l_j|^2 / (2 variance)), in blocks of rows."""
    squares = (layer**2).sum(axis=1)
    sums = np.empty(len(layer))
    for start in range(0, len(layer), 1000):
        rows = slice(start, start + 1000)
        distances = np.maximum(squares[rows, None] + squares - 2 * layer[rows] @ layer.T, 0.0)
        sums[rows] = logsumexp(-distances / (2 * variance), axis=1)
    return float(math.log(len(layer)) - sums.mean())


def _labelled(layer, labels) -> tuple[np.ndarray, np.ndarray]:
    layer, labels = as_samples(layer, "layer"), as_labels(labels)
    if len(layer) != len(labels):
        raise BadSamples(f"expected a label per row of 'layer' ({len(layer)}), found {len(labels)}.")
    return layer, labels


def _judge(entropy: float, n: int) -> tuple[str, tuple[str, ...]]:
    if entropy > TRUSTED_SHARE * math.log(n):
        return "saturated", (f"H or I(X;L) = {entropy:.2f} of at most ln n = {math.log(n):.2f} nats",)
    return ("undersampled" if n < FEW else "ok"), ()


def _binning_name(bins: int, equal_mass: bool) -> str:
    return f"EBAB, {bins} bins" if equal_mass else f"equal-width binning, {bins} bins"
