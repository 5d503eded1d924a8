"""Brackets of I(X; L) through a channel that is known exactly: a layer's features plus noise, or VIB masks.

A deterministic network has infinite or constant I(X; layer). With noise whose density we know nothing has to be
learned: the mixture over the other samples gives a lower bound (InfoNCE with the true density, van den Oord et
al. 2018, eq. 4) and an upper bound (leave-one-out, Poole et al. 2019, eq. 10); the Gaussian of the same covariance
gives a cap that stays finite where those two saturate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from ibprune.mi.samples import FEW, BadSamples, as_labels, as_samples, share_of_duplicates

CHUNK = 512  # rows of the N x N table held at once
SATURATED = 0.7  # of ln N: past it the lower bound sticks to its ceiling


@dataclass(frozen=True)
class Bracket:
    """Bounds of I(X; L + noise), in nats.

    Attributes:
        lower, upper: None where the samples allow none. `upper` is the lesser of `loo` and `cap`.
        loo: Leave-one-out bound.
        cap: 1/2 sum log(1 + lambda/sigma^2), None for channels without one.
        ci95: From the lower bound minus its error to the upper bound plus its error.
        ceiling: ln N: the lower bound cannot show more.
        status: As in `ibprune.mi.samples.STATUSES`.
        lower_terms, upper_terms: One per sample, (n,), mean over repeats.
    """

    lower: float | None
    upper: float | None
    loo: float | None
    cap: float | None
    ci95: tuple[float, float] | None
    ceiling: float
    n: int
    status: str
    notes: tuple[str, ...] = ()
    lower_terms: np.ndarray | None = field(default=None, repr=False, compare=False)
    upper_terms: np.ndarray | None = field(default=None, repr=False, compare=False)


def readout_bracket(features, sigma: float, *, noise: np.ndarray | None = None, repeats: int = 4, seed: int = 0):
    """Brackets I(X; f(X) + sigma z), z ~ N(0, I).

    Args:
        features: f(x_i) of independent inputs, (n, d).
        sigma: Standard deviation of the noise, in the units of the features.
        noise: (repeats, n, d) standard normal draws: give the same to two models to compare them.
        repeats: Draws when `noise` is None; more only shrinks the noise's own error.

    Raises:
        BadSamples: Unusable features, or sigma not above 0.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(1000, 4))
        >>> bracket = readout_bracket(x, 1.0)      # true: 2 ln 2 = 1.386
        >>> bracket.lower < 1.45 and bracket.upper > 1.32
        True
    """
    return readout_curve(features, [sigma], noise=noise, repeats=repeats, seed=seed)[0]


def readout_curve(
    features, sigmas: Sequence[float], *, noise: np.ndarray | None = None, repeats: int = 4, seed: int = 0
) -> list[Bracket]:
    """`readout_bracket` at several noise levels, which share every distance and every draw.

    With common draws the exact-density bounds fall with sigma up to their sampling error, and the
    cap falls exactly.
    """
    f = as_samples(features, "features")
    if min(sigmas) <= 0 or not np.isfinite(sigmas).all():
        raise BadSamples(f"expected noise levels above 0, found {list(sigmas)}.")
    f = f - f.mean(axis=0)  # distances do not change, rounding shrinks
    n, d = f.shape
    if noise is None:
        noise = draw_noise(n, d, repeats=repeats, seed=seed)
    if noise.shape[1:] != f.shape:
        raise BadSamples(f"expected noise of shape (repeats, {n}, {d}), found {noise.shape}.")
    lower = np.zeros((len(sigmas), n))
    upper = np.zeros((len(sigmas), n))
    for rows, own, distance, along in _tables(f, noise):
        for k, sigma in enumerate(sigmas):
            # log p(l_i | x_j) - log p(l_i | x_i): the squared length of the noise itself cancels
            lo, up = _terms(torch.add(along, distance, alpha=0.5 / sigma).mul_(-1 / sigma), own, n)
            lower[k, rows] += lo / len(noise)
            upper[k, rows] += up / len(noise)
    flaws, parts = _flaws(f), spectrum(f)
    return [
        _bracket(lower[k], upper[k], _cap(*parts, sigma), n, flaws, wide=d > n / 5) for k, sigma in enumerate(sigmas)
    ]


def mask_bracket(features, mu, sd, *, floor: float, repeats: int = 4, seed: int = 0) -> Bracket:
    """Brackets I(X; L) where L = f(X) * (mu + sd * eps) + floor * eps': a VIB mask in sampling mode.

    `floor` is noise added so that features that are exactly 0 (ReLU) keep a density; it belongs to the
    channel. The trainer's KL is not this quantity: it leaves out what |f| reveals (`penalty_bound`).

    Args:
        features: (n, d). mu, sd: (d,), the mask's mean and standard deviation.

    Raises:
        BadSamples: Unusable features or a floor not above 0.
    """
    f = as_samples(features, "features")
    mu, sd = np.broadcast_to(mu, f.shape[1]).astype(float), np.broadcast_to(sd, f.shape[1]).astype(float)
    if floor <= 0:
        raise BadSamples(f"expected a floor above 0, found {floor}.")
    n, d = f.shape
    mean, var = torch.from_numpy(f * mu), torch.from_numpy((f * sd) ** 2 + floor**2)
    precision, weighted = 1 / var, mean / var
    constant = (mean * weighted + var.log()).sum(1)
    lower, upper = np.zeros(n), np.zeros(n)
    for z in draw_noise(n, d, repeats=repeats, seed=seed):
        sample = mean + var.sqrt() * torch.from_numpy(z)
        for start in range(0, n, CHUNK):
            rows = slice(start, min(n, start + CHUNK))
            own = torch.arange(start, rows.stop)
            part = sample[rows]
            log_p = -0.5 * ((part * part) @ precision.T - 2 * part @ weighted.T + constant)
            ratio = log_p - log_p[own - start, own][:, None]
            lo, up = _terms(ratio, own, n)
            lower[rows] += lo / repeats
            upper[rows] += up / repeats
    return _bracket(lower, upper, None, n, _flaws(f), wide=False)


def penalty_bound(features, mu, sd) -> tuple[float, float]:
    """(VIB penalty, upper bound of I) of a mask, in nats, summed over features.

    The penalty 1/2 log(1 + mu^2/sd^2) drops psi = 1/2 (log E f^2 - E log f^2) >= 0, what the noise's own
    scale tells about |f|; the penalty alone bounds nothing.
    """
    f = as_samples(features, "features")
    mu, sd = np.broadcast_to(mu, f.shape[1]).astype(float), np.broadcast_to(sd, f.shape[1]).astype(float)
    penalty = 0.5 * np.log1p((mu / sd) ** 2).sum()
    square = f**2
    with np.errstate(divide="ignore"):
        psi = 0.5 * (np.log(square.mean(axis=0)) - np.log(square).mean(axis=0)).sum()
    return float(penalty), float(penalty + psi)


def bracket_given(features, labels, sigma: float, *, noise: np.ndarray, least: int = 50) -> Bracket:
    """Brackets I(X; L | Y): the classes' own brackets, weighted by their sizes.

    Classes of fewer than `least` samples make the status "undersampled".
    """
    f, y = as_samples(features, "features"), as_labels(labels)
    parts = []
    for label in range(int(y.max()) + 1):
        chosen = np.flatnonzero(y == label)
        if len(chosen) < 10:
            return replace(_missing(len(f), "undersampled"), notes=(f"a class has {len(chosen)} samples",))
        parts.append((len(chosen) / len(f), readout_bracket(f[chosen], sigma, noise=noise[:, chosen])))
    if any(part.lower is None for _, part in parts):
        return _missing(len(f), "degenerate")
    ends = [sum(w * getattr(part, name) for w, part in parts) for name in ("lower", "upper", "loo", "cap")]
    ci95 = tuple(sum(w * part.ci95[i] for w, part in parts) for i in (0, 1))
    worst = next((part.status for _, part in parts if part.status != "ok"), "ok")
    if min(part.n for _, part in parts) < least:
        worst = "undersampled"
    return Bracket(*ends, ci95, sum(w * part.ceiling for w, part in parts), len(f), worst)


def calibrate_sigma(features, *, target: float = 0.6, n: int = 800, seed: int = 0) -> float:
    """The noise at which the lower bound reads `target` * ln n on n samples, evenly spaced, in feature units.

    The noise is the unit of measurement: too little and every layer reads ln N, too much and all read 0.
    Found on the dense model and then frozen.

    Raises:
        BadSamples: The features are constant.
    """
    f = as_samples(features, "features")
    f = f[np.linspace(0, len(f) - 1, min(n, len(f))).round().astype(int)]  # inputs may come in order of their length
    scale = float(np.sqrt(f.var(axis=0).sum()))
    if scale == 0.0 or not _varies(f):
        raise BadSamples("expected features that vary, found a constant layer: there is no noise level to calibrate.")
    tables = list(_tables(f - f.mean(axis=0), draw_noise(*f.shape, repeats=1, seed=seed)))
    low, high = np.log(scale * 1e-6), np.log(scale * 1e3)
    for _ in range(24):
        sigma = np.exp((low + high) / 2)
        terms = [
            _terms(-(distance / (2 * sigma**2) + along / sigma), own, len(f))[0] for _, own, distance, along in tables
        ]
        above = np.concatenate(terms).mean() > target * np.log(len(f))
        low, high = (np.log(sigma), high) if above else (low, np.log(sigma))
    return float(np.exp((low + high) / 2))


def gaussian_cap(features: np.ndarray, sigma: float) -> tuple[float, np.ndarray]:
    """1/2 sum log(1 + lambda/sigma^2) over the eigenvalues of Cov f: I is at most this, whatever f's distribution.

    A sample covariance makes the sum too small; its first-order bias for Gaussian features,
    ((sum r)^2 + sum r^2) / 4n with r = lambda / (lambda + sigma^2), is added back.

    Returns:
        The cap and its first-order contribution of each sample, (n,), for its standard error.
    """
    return _cap(*spectrum(features), sigma)[:2]


def spectrum(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of Cov f, (k,), and the squared principal coordinates of each sample, (n, k)."""
    f = features - features.mean(axis=0)
    if f.shape[1] > len(f):
        left, singular, _ = np.linalg.svd(f, full_matrices=False)
        return singular**2 / len(f), (left * singular) ** 2
    values, vectors = np.linalg.eigh(f.T @ f / len(f))  # a quarter of the time of the decomposition of f itself
    return np.maximum(values, 0.0), (f @ vectors) ** 2


def _cap(values: np.ndarray, squares: np.ndarray, sigma: float) -> tuple[float, np.ndarray, float]:
    """As `gaussian_cap`, and how much of the cap is the bias added back."""
    ratio = values / (values + sigma**2)
    bias = (ratio.sum() ** 2 + (ratio**2).sum()) / (4 * len(squares))
    return float(0.5 * np.log1p(values / sigma**2).sum() + bias), 0.5 * squares @ (1 / (values + sigma**2)), float(bias)


def draw_noise(n: int, d: int, *, repeats: int, seed: int) -> np.ndarray:
    """Standard normal draws, (repeats, n, d), from a stream of their own.

    A caller's data may come from `default_rng(seed)` itself; noise equal to the data reads as information.
    """
    return np.random.default_rng([seed, 104_729]).standard_normal((repeats, n, d))


def difference(after: Bracket, before: Bracket) -> tuple[float, tuple[float, float]]:
    """Lower bound after minus before, with the paired 95 % interval: both must stem from the same inputs and noise.

    Raises:
        BadSamples: One of them is missing, or they stem from different inputs.
    """
    if after.lower_terms is None or before.lower_terms is None or after.n != before.n:
        raise BadSamples("expected two brackets of the same samples, found a missing one or other sizes.")
    change = after.lower_terms - before.lower_terms
    half = 1.96 * change.std(ddof=1) / np.sqrt(after.n)
    value = float(change.mean())
    return value, (value - float(half), value + float(half))


def _tables(f: np.ndarray, noise: np.ndarray) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Row blocks of |f_i - f_j|^2 and z_i . (f_i - f_j), once per draw: (rows, own columns, distance, along)."""
    n = len(f)
    ft = torch.from_numpy(f)
    square = (ft * ft).sum(1)
    for start in range(0, n, CHUNK):
        rows = slice(start, min(n, start + CHUNK))
        own = torch.arange(start, rows.stop)
        distance = (square[rows, None] + square[None] - 2 * ft[rows] @ ft.T).clamp_(min=0)
        distance[own - start, own] = 0.0
        for z in noise:
            along = torch.from_numpy(np.ascontiguousarray(z[rows])) @ ft.T
            yield rows, own, distance, along[own - start, own][:, None] - along


def _terms(ratio: torch.Tensor, own: torch.Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and leave-one-out terms from log p(l_i|x_j) - log p(l_i|x_i), 0 at j = i; overwrites `ratio`."""
    ratio[own - own[0], own] = -torch.inf
    others = torch.logsumexp(ratio, 1)
    upper = np.log(n - 1) - others
    lower = np.log(n) - nn.functional.softplus(others, threshold=700)  # log(1 + exp(others)) without a second table
    return lower.numpy(), upper.numpy()


def _bracket(
    lower: np.ndarray,
    upper: np.ndarray,
    cap: tuple[float, np.ndarray, float] | None,
    n: int,
    flaws: tuple[str, ...],
    wide: bool,
) -> Bracket:
    if "constant" in flaws:
        return replace(_missing(n, "degenerate"), notes=("the features are constant",))
    lo, loo = float(lower.mean()), float(upper.mean())
    lo_error, up_error = (1.96 * float(t.std(ddof=1)) / np.sqrt(n) for t in (lower, upper))
    ends = [loo + up_error]
    if cap is not None:
        unsure = cap[2] if wide else 0.0  # a first-order correction is itself off then, by less than itself
        ends.append(cap[0] + 1.96 * float(cap[1].std(ddof=1)) / np.sqrt(n) + unsure)
    notes = []
    if wide:
        notes.append("more features than a fifth of the samples: the cap rests on a bias correction")
    status = "ok"
    if flaws:
        status, notes = "degenerate", [*notes, *flaws]
    elif n < FEW:
        status = "undersampled"
    elif lo > SATURATED * np.log(n):
        status, notes = "saturated", [*notes, f"above {SATURATED:g} ln N: read it as at least the lower bound"]
    up = loo if cap is None else min(loo, cap[0])
    return Bracket(
        lower=lo,
        upper=up,  # may lie below `lower` by sampling error; the interval says how large that is
        loo=loo,
        cap=None if cap is None else cap[0],
        ci95=(lo - lo_error, min(ends)),
        ceiling=float(np.log(n)),
        n=n,
        status=status,
        notes=tuple(notes),
        lower_terms=lower,
        upper_terms=upper,
    )


def _missing(n: int, status: str) -> Bracket:
    return Bracket(None, None, None, None, None, float(np.log(n)), n, status)


def _varies(f: np.ndarray) -> bool:
    spread = np.abs(f - f[0]).max()
    return bool(spread > 1e-12 * max(1.0, np.abs(f).max()))


def _flaws(f: np.ndarray) -> tuple[str, ...]:
    if not _varies(f):
        return ("constant",)
    repeated = share_of_duplicates(f)
    return (f"{repeated:.1%} of the samples repeat others",) if repeated > 0.01 else ()
