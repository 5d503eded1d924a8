"""What an estimate would be of endless samples: its values on ever smaller subsamples, drawn out to 1/n = 0."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ibprune.mi.samples import Estimate, as_pair

CURVATURE = 0.1  # of the slope: above it the estimates have not yet begun to change like 1/n
FEWEST = 4  # points of a line
SHIFT = 0.2  # of the value, when the largest sample is left out


@dataclass(frozen=True)
class Extrapolation:
    """A line through the estimates of n / gamma samples.

    Attributes:
        estimate: Its value at gamma = 0; "biased" where the line cannot be trusted, with the reason in its notes.
        gammas: Into how many parts the samples were split.
        means: Mean estimate over the parts, nats.
        slope: Change per unit of gamma.
    """

    estimate: Estimate
    gammas: tuple[int, ...]
    means: tuple[float, ...]
    slope: float


def extrapolate(
    x, y, estimator: Callable[[np.ndarray, np.ndarray], Estimate], *, most: int = 6, seed: int = 0
) -> Extrapolation:
    """Removes the part of an estimator's bias that falls like 1/n (Strong et al. 1998, eq. 4; Holmes & Nemenman 2019).

    The samples are split at random into gamma = 1 .. `most` parts, the estimate of each part is taken, and a
    line is fitted to their means by weighted least squares. While a parabola bends by more than a tenth of the
    slope the largest gamma is left out.

    Args:
        x, y: Samples, (n, d_x) and (n, d_y).
        estimator: Of I(x; y), with a status.
        most: Largest number of parts; the cost is about `most` times that of one estimate.

    Returns:
        "biased" with the line's value where it bends still, or where leaving out the whole sample moves it
        by more than a fifth; "undersampled" without a value where the parts give none.

    Raises:
        BadSamples: As in `as_pair`.
        ValueError: `most` below 4.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((4000, 1))
        >>> y = 0.6 * x + 0.8 * rng.standard_normal((4000, 1))
        >>> extrapolate(x, y, ksg).estimate.value  # true: 0.223
    """
    x, y = as_pair(x, y)
    if most < FEWEST:
        raise ValueError(f"expected at least {FEWEST} points of a line, found {most}.")
    order = np.random.default_rng([seed, 179_424_673]).permutation(len(x))
    means, errors, name = [], [], ""
    for gamma in range(1, most + 1):
        found = [estimator(x[part], y[part]) for part in np.array_split(order, gamma)]
        name = f"{found[0].estimator}, extrapolated"
        values = np.array([e.value for e in found if e.value is not None])
        if len(values) < len(found):
            break
        means.append(float(values.mean()))
        errors.append(float(values.std(ddof=1) / np.sqrt(gamma)) if gamma > 1 else np.nan)
    used = len(means)
    if used < FEWEST:
        notes = (f"only {used} of {FEWEST} subsample sizes give a value",)
        return Extrapolation(Estimate(None, "undersampled", name, len(x), notes=notes), (), tuple(means), 0.0)
    # one value has no spread of its own: it is the best of all, so it takes the smallest seen
    weights = 1.0 / np.maximum(np.array([np.nanmin(errors), *errors[1:]]), 1e-9 + 1e-3 * np.abs(means[0]))
    gammas, values = np.arange(1, used + 1), np.array(means)
    notes = []
    while used > FEWEST and _bends(gammas[:used], values[:used], weights[:used]):
        used -= 1
    if _bends(gammas[:used], values[:used], weights[:used]):
        notes.append("the estimates do not yet change in proportion to 1/n")
    slope, value = np.polyfit(gammas[:used], values[:used], 1, w=weights[:used])
    without = np.polyfit(gammas[1:used], values[1:used], 1, w=weights[1:used])[1]
    if abs(without - value) > SHIFT * max(abs(value), 0.05):
        notes.append(f"without the whole sample the line ends at {without:.3f} nats")
    interval = _interval(gammas[:used], weights[:used], value)
    estimate = Estimate(float(value), "biased" if notes else "ok", name, len(x), interval, tuple(notes))
    return Extrapolation(estimate, tuple(gammas[:used].tolist()), tuple(means[:used]), float(slope))


def _bends(gammas: np.ndarray, values: np.ndarray, weights: np.ndarray) -> bool:
    """Whether a parabola's bend is both a tenth of its slope and more than its own error."""
    design = np.vander(gammas, 3) * weights[:, None]
    bend, slope, _ = np.linalg.lstsq(design, values * weights, rcond=None)[0]
    error = np.sqrt(np.linalg.inv(design.T @ design)[0, 0])
    return bool(abs(bend) > CURVATURE * abs(slope) and abs(bend) > 2 * error)


def _interval(gammas: np.ndarray, weights: np.ndarray, value: float) -> tuple[float, float]:
    """95 % of the intercept, from the spread over the parts of each size."""
    design = np.vander(gammas, 2) * weights[:, None]
    half = 1.96 * float(np.sqrt(np.linalg.inv(design.T @ design)[1, 1]))
    return float(value) - half, float(value) + half
