"""The 40 tasks of the Beyond Normal benchmark (arXiv 2306.11078): samples whose information is known exactly."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from ibprune.mi.gaussian import additive_uniform_mi, mi_from_covariance, student_mi
from ibprune.mi.samples import BadSamples


@dataclass(frozen=True)
class Normal:
    """Gaussian X and Y with unit variances.

    Attributes:
        dim: Coordinates of X, and of Y.
        correlation: Of each pair (X_i, Y_i) with i < `pairs`, or of all coordinates of both if that is None.
        pairs: Number of correlated pairs; all other coordinates are independent of everything.
    """

    dim: int
    correlation: float
    pairs: int | None = None


@dataclass(frozen=True)
class Student:
    """Jointly Student-t X and Y, uncorrelated: all they share is the random scale.

    Attributes:
        dim: Coordinates of X, and of Y.
        dof: Degrees of freedom; no covariance exists up to 2.
    """

    dim: int
    dof: int


@dataclass(frozen=True)
class AdditiveUniform:
    """X uniform on (0, 1), Y = X + E with E uniform on (-epsilon, epsilon)."""

    epsilon: float


@dataclass(frozen=True)
class Task:
    """One distribution of (X, Y) with known information.

    Attributes:
        name: As in "half_cube-normal-2pair-5x5".
        source: What is drawn.
        maps: One-to-one maps of X and of Y, in the order applied; they change no information. Names as
            `_mapped` knows them.
    """

    name: str
    source: Normal | Student | AdditiveUniform
    maps: tuple[str, ...] = ()


_BINORMAL = Normal(1, 0.75)
_SIZES = (3, 5, 25)

TASKS: tuple[Task, ...] = (
    Task("1v1-normal-0.75", _BINORMAL),
    Task("normal_cdf-1v1-normal-0.75", _BINORMAL, ("normal_cdf",)),
    Task("1v1-additive-0.1", AdditiveUniform(0.1)),
    Task("1v1-additive-0.75", AdditiveUniform(0.75)),
    Task("1v1-bimodal-0.75", _BINORMAL, ("normal_cdf", "bimodal")),
    Task("wiggly-1v1-normal-0.75", _BINORMAL, ("wiggly",)),
    Task("half_cube-1v1-normal-0.75", _BINORMAL, ("half_cube",)),
    Task("student-1x1-dof1", Student(1, 1)),
    Task("asinh-student-1x1-dof1", Student(1, 1), ("asinh",)),
    Task("swissroll-1v1-normal-0.75", _BINORMAL, ("normal_cdf", "swissroll")),
    *(Task(f"normal-dense-{d}x{d}", Normal(d, 0.5)) for d in (2, 3, 5, 25, 50)),
    *(Task(f"normal-2pair-{d}x{d}", Normal(d, 0.8, pairs=2)) for d in (2, *_SIZES)),
    *(
        Task(f"student-{d}x{d}-dof{dof}", Student(d, dof))
        for d, dof in ((2, 1), (2, 2), (3, 2), (3, 3), (5, 2), (5, 3))
    ),
    *(
        Task("-".join((*reversed(maps), f"normal-2pair-{d}x{d}")), Normal(d, 0.8, pairs=2), maps)
        for maps in (("normal_cdf",), ("half_cube",), ("spiral",), ("normal_cdf", "spiral"))
        for d in _SIZES
    ),
    *(Task(f"asinh-student-{d}x{d}-dof{dof}", Student(d, dof), ("asinh",)) for d, dof in ((2, 1), (3, 2), (5, 2))),
)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        BadSamples: No task has it.

    Example:
        >>> find_task("asinh-student-2x2-dof1").source
        Student(dim=2, dof=1)
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise BadSamples(f"expected a task of {', '.join(task.name for task in TASKS)}, found '{name}'.")


def exact_mi(task: Task) -> float:
    """I(X; Y) in nats, from the closed form of the source: the maps are one-to-one and change nothing.

    Example:
        >>> round(exact_mi(find_task("1v1-normal-0.75")), 6)
        0.413339
    """
    match task.source:
        case Normal() as source:
            return mi_from_covariance(_covariance(source), source.dim)
        case Student(dim, dof):
            return student_mi(dim, dim, dof)
        case AdditiveUniform(epsilon):
            return additive_uniform_mi(epsilon)


def sample(task: Task, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws n independent pairs, x (n, d_x) and y (n, d_y), float64; the same ones for the same seed.

    The distributions are those of the benchmark; its own random numbers are not reproduced.

    Example:
        >>> x, y = sample(find_task("swissroll-1v1-normal-0.75"), 100, seed=0)
        >>> x.shape, y.shape
        ((100, 2), (100, 1))
    """
    x, y = _drawn(task.source, n, np.random.default_rng(seed))
    for name in task.maps:
        x, y = _mapped(name, x, y)
    return x, y


def _covariance(source: Normal) -> np.ndarray:
    size = 2 * source.dim
    if source.pairs is None:
        return np.full((size, size), source.correlation) + (1 - source.correlation) * np.eye(size)
    covariance = np.eye(size)
    pair = np.arange(source.pairs)
    covariance[pair, source.dim + pair] = covariance[source.dim + pair, pair] = source.correlation
    return covariance


def _drawn(
    source: Normal | Student | AdditiveUniform, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    match source:
        case Normal(dim):
            both = rng.standard_normal((n, 2 * dim)) @ np.linalg.cholesky(_covariance(source)).T
            return both[:, :dim], both[:, dim:]
        case Student(dim, dof):
            both = rng.standard_normal((n, 2 * dim)) / np.sqrt(rng.chisquare(dof, size=(n, 1)) / dof)
            return both[:, :dim], both[:, dim:]
        case AdditiveUniform(epsilon):
            x = rng.uniform(0, 1, size=(n, 1))
            return x, x + rng.uniform(-epsilon, epsilon, size=(n, 1))


def _mapped(name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    match name:
        case "normal_cdf":
            return ndtr(x), ndtr(y)
        case "half_cube":
            return x * np.sqrt(np.abs(x)), y * np.sqrt(np.abs(y))
        case "asinh":
            return np.arcsinh(x), np.arcsinh(y)
        case "wiggly":
            return (
                x + 0.4 * np.sin(x) + 0.2 * np.sin(1.7 * x + 1) + 0.03 * np.sin(3.3 * x - 2.5),
                y - 0.4 * np.sin(0.4 * y) + 0.17 * np.sin(1.3 * y + 3.5) + 0.02 * np.sin(4.3 * y - 2.5),
            )
        case "bimodal":  # from uniform margins to mixtures of two Gaussians
            return _mixture_quantile(x, (0.3, 0.7), (0, 5)), _mixture_quantile(y, (0.5, 0.5), (-1, 3))
        case "swissroll":  # only x, from a uniform margin to the plane
            angle = 1.5 * np.pi * (1 + 2 * x)
            return np.hstack([angle * np.cos(angle), angle * np.sin(angle)]) / 21, y
        case "spiral":
            return _spiral(x, 0, 1), _spiral(y, 1, 2)
    raise ValueError(f"'{name}' is no map.")


def _spiral(x: np.ndarray, i: int, j: int) -> np.ndarray:
    """Turns coordinates i and j of each sample by the angle |x|^2 / d: it keeps |x|, so it can be undone."""
    angle = (x**2).sum(axis=1) / x.shape[1]
    turned = x.copy()
    turned[:, i] = np.cos(angle) * x[:, i] - np.sin(angle) * x[:, j]
    turned[:, j] = np.sin(angle) * x[:, i] + np.cos(angle) * x[:, j]
    return turned


def _mixture_quantile(u: np.ndarray, weights: tuple[float, ...], means: tuple[float, ...]) -> np.ndarray:
    """Quantiles of a mixture of Gaussians of unit variance, by bisection to 1e-14."""
    low, high = np.full(u.shape, min(means) - 9.0), np.full(u.shape, max(means) + 9.0)
    for _ in range(55):
        middle = (low + high) / 2
        below = sum(weight * ndtr(middle - mean) for weight, mean in zip(weights, means)) < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2
