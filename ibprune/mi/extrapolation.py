"""What an estimate would be of endless samples: its values on ever smaller subsamples, drawn out to 1/n = 0."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
    line is fitted to their means by least squares. While a parabola bends by more than a tenth of the slope
    the largest gamma is left out. The interval is Student's, from the spread over the parts, pooled over all sizes.

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
    means, squares, name = [], [], ""
    for gamma in range(1, most + 1):
        found = [estimator(x[part], y[part]) for part in np.array_split(order, gamma)]
        name = f"{found[0].estimator}, extrapolated"
        values = np.array([e.value for e in found if e.value is not None])
        if len(values) < len(found):
            break
        means.append(float(values.mean()))
        squares.append(float(values.var(ddof=0)))  # (gamma - 1) times the variance of their mean
    used = len(means)
    if used < FEWEST:
        notes = (f"only {used} of {FEWEST} subsample sizes give a value",)
        return Extrapolation(Estimate(None, "undersampled", name, len(x), notes=notes), (), tuple(means), 0.0)
    # a mean over gamma parts errs about as much whatever gamma is, so that one error of all says more than one of each
    error = np.sqrt(sum(squares) / _freedom(used)) + 1e-9 + 1e-3 * abs(means[0])
    gammas, values = np.arange(1, used + 1), np.array(means)
    notes = []
    while used > FEWEST and _bends(gammas[:used], values[:used], error):
        used -= 1
    if _bends(gammas[:used], values[:used], error):
        notes.append("the estimates do not yet change in proportion to 1/n")
    slope, value = np.polyfit(gammas[:used], values[:used], 1)
    without = np.polyfit(gammas[1:used], values[1:used], 1)[1]
    if abs(without - value) > SHIFT * max(abs(value), 0.05):
        notes.append(f"without the whole sample the line ends at {without:.3f} nats")
    half = stats.t.ppf(0.975, _freedom(len(means))) * error * _leverage(gammas[:used])
    interval = float(value - half), float(value + half)
    estimate = Estimate(float(value), "biased" if notes else "ok", name, len(x), interval, tuple(notes))
    return Extrapolation(estimate, tuple(gammas[:used].tolist()), tuple(means[:used]), float(slope))


def _freedom(most: int) -> int:
    """Degrees of freedom of the spread over the parts of 1 .. `most` sizes."""
    return most * (most - 1) // 2


def _bends(gammas: np.ndarray, values: np.ndarray, error: float) -> bool:
    """Whether a parabola's bend is both a tenth of its slope and more than its own error."""
    design = np.vander(gammas, 3)
    bend, slope, _ = np.linalg.lstsq(design, values, rcond=None)[0]
    own = error * np.sqrt(np.linalg.inv(design.T @ design)[0, 0])
    return bool(abs(bend) > CURVATURE * abs(slope) and abs(bend) > 2 * own)


def _leverage(gammas: np.ndarray) -> float:
    """Error of the line's end per error of a mean, at least 1: what the sample errs by as a whole moves every mean."""
    design = np.vander(gammas, 2)
    return max(1.0, float(np.sqrt(np.linalg.inv(design.T @ design)[1, 1])))
