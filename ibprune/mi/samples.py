"""What estimators take and return: checked samples in, an estimate with a status out; nats throughout."""

from dataclasses import dataclass, field

import numpy as np

STATUSES = (
    "ok",
    "biased",  # the estimator's own twin is off by more than the tolerance
    "saturated",  # near the largest value that this many samples can show
    "lower_only",
    "upper_only",
    "undersampled",
    "degenerate",  # constant, duplicated or otherwise unusable samples
    "inconsistent",  # contradicts a hard check
    "not_applicable",
)
FEW = 200  # below this many samples nothing is called "ok"
NATS_TO_BITS = 1.0 / np.log(2.0)


class BadSamples(ValueError):
    """Samples that no estimator can use: wrong shapes, NaN, too few rows."""


@dataclass(frozen=True)
class Estimate:
    """One estimated quantity.

    Attributes:
        value: In nats; None where it could not be estimated, never 0 in its place. May be negative.
        status: One of `STATUSES`.
        estimator: Its name, with what was chosen ("ksg1, k=5").
        ci95: 95 % interval of the statistical error, where one is known.
        n: Samples used.
        notes: What a reader must know to trust it or not, one sentence each.
        terms: Contribution of each sample, (n,), where the value is their mean: differences of two
            estimates on the same samples are then paired.
    """

    value: float | None
    status: str
    estimator: str
    n: int
    ci95: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    terms: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"expected a status of {', '.join(STATUSES)}, found '{self.status}'.")

    def to_dict(self) -> dict:
        """Everything but the terms, as JSON takes it."""
        return {
            "value": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "status": self.status,
            "estimator": self.estimator,
            "n": self.n,
            "notes": list(self.notes),
        }


def as_samples(x, name: str = "x") -> np.ndarray:
    """Checked samples, float64, (n, d); a vector becomes (n, 1).

    Raises:
        BadSamples: Not numeric, not one row per sample, fewer than 10 rows, NaN or infinite values.
    """
    array = np.asarray(x)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise BadSamples(f"expected numbers in '{name}', found {array.dtype}.")
    array = array.astype(np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] == 0:
        raise BadSamples(f"expected '{name}' as (samples, features), found shape {np.shape(x)}.")
    if len(array) < 10:
        raise BadSamples(f"expected at least 10 samples in '{name}', found {len(array)}.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=1).sum())
        raise BadSamples(f"expected finite values in '{name}', found NaN or infinity in {bad} of {len(array)} rows.")
    return array


def as_pair(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Two checked sets of samples, row i of one belonging to row i of the other.

    Raises:
        BadSamples: As in `as_samples`, or their lengths differ.
    """
    x, y = as_samples(x, "x"), as_samples(y, "y")
    if len(x) != len(y):
        raise BadSamples(f"expected as many rows in 'y' as in 'x' ({len(x)}), found {len(y)}.")
    return x, y


def as_labels(y) -> np.ndarray:
    """Class numbers 0 to K-1, int64, (n,), in the order of the sorted label values.

    Raises:
        BadSamples: Not one integer, bool or string per sample.
    """
    array = np.asarray(y)
    if array.ndim != 1 or array.dtype.kind not in "iubUS":
        raise BadSamples(f"expected one integer or string label per sample, found {array.dtype} of {array.shape}.")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def share_of_duplicates(x: np.ndarray) -> float:
    """Share of rows that repeat an earlier row."""
    return 1.0 - len(np.unique(x, axis=0)) / len(x)


def copies(x: np.ndarray, y: np.ndarray) -> str:
    """What must be said where rows repeat others, both sides of them; "" where few do, or where rows are of few kinds.

    An independent draw of something continuous never comes twice: such rows are copies, and a held-out one was trained
    on. Rows of which each kind comes 20 times and more are taken for draws of something discrete.

    Args:
        x, y: (n, d_x) and (n, d_y) or (n,).
    """
    both = np.hstack([x, y.reshape(len(x), -1)])
    kinds = len(np.unique(both, axis=0))
    share = 1.0 - kinds / len(both)
    if share <= 0.01 or 20 * kinds < len(both):
        return ""
    return f"{share:.1%} of the rows repeat others, both sides: copies read as information"


def mean_with_interval(terms: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean of independent terms and its 95 % normal interval."""
    value = float(terms.mean())
    half = 1.96 * float(terms.std(ddof=1)) / np.sqrt(len(terms))
    return value, (value - half, value + half)
