"""Every estimator by name, on known distributions and on a user's own pair of arrays."""

import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ibprune.mi.critics import infonce, mine, nwj, smile
from ibprune.mi.gaussian import gaussian_mi
from ibprune.mi.historic import binned_mi, kernel_mi
from ibprune.mi.neighbours import gaussianize, ksg, ross
from ibprune.mi.probes import Probe, v_information
from ibprune.mi.samples import BadSamples, Estimate, as_labels, as_pair, as_samples
from ibprune.mi.spectral import diffusion_mi, matrix_mi
from ibprune.mi.tasks import Task, exact_mi, sample
from ibprune.mi.weighted import compressed_mi, weighted_kl_mi

Estimator = Callable[..., Estimate]


def pairwise(x, y, *, seed: int = 0) -> Estimate:
    """The default for two continuous variables: KSG on normal scores for one dimension each, else InfoNCE.

    Neighbours are the most accurate in one dimension and lose the signal from five on; the critic is the
    other way round (`ibprune mi-benchmark` shows both).
    """
    x, y = as_pair(x, y)
    return ksg(x, y, gaussianize=True) if x.shape[1] == y.shape[1] == 1 else infonce(x, y, seed=seed)


def labelled(x, y, *, seed: int = 0) -> Estimate:
    """The default for a continuous variable and a label: Ross up to two dimensions, else V-information."""
    x = as_samples(x)
    return ross(x, y) if x.shape[1] <= 2 else v_information(x, y, seed=seed)


PAIRWISE: dict[str, Estimator] = {
    "pairwise": pairwise,
    "infonce": infonce,
    "ksg": lambda x, y, seed: ksg(x, y),
    "ksg-chebyshev": lambda x, y, seed: ksg(x, y, metric="chebyshev"),
    "ksg-copula": lambda x, y, seed: ksg(x, y, gaussianize=True),
    "gaussian": lambda x, y, seed: gaussian_mi(x, y),
    "gaussian-copula": lambda x, y, seed: gaussian_mi(gaussianize(x), gaussianize(y)),
    "mine": mine,
    "nwj": nwj,
    "smile": smile,
    "weighted-kl": lambda x, y, seed: weighted_kl_mi(x, y),
    "pca-ksg": lambda x, y, seed: compressed_mi(x, y),
    "pca-wkl": lambda x, y, seed: compressed_mi(x, y, estimator="wkl"),
    "autoencoder-ksg": lambda x, y, seed: compressed_mi(x, y, codes="autoencoder", seed=seed),
    "autoencoder-wkl": lambda x, y, seed: compressed_mi(x, y, estimator="wkl", codes="autoencoder", seed=seed),
    "renyi": lambda x, y, seed: matrix_mi(x, y),
}
LABELLED: dict[str, Estimator] = {
    "labelled": labelled,
    "logistic": v_information,
    "mlp": partial(v_information, probe=Probe("mlp")),
    "ross": lambda x, y, seed: ross(x, y),
    "binning": lambda x, y, seed: binned_mi(x, y),
    "ebab": lambda x, y, seed: binned_mi(x, y, equal_mass=True),
    "akde": lambda x, y, seed: kernel_mi(x, y),
    "dsmi": diffusion_mi,
}
MOST_FOR_KERNELS = 2000  # samples: these build an n x n matrix and decompose it
KERNELS = ("renyi", "dsmi")


@dataclass(frozen=True)
class Result:
    """One estimator on one task; `error` is estimate minus truth, None where it gave no value."""

    task: str
    estimator: str
    seed: int
    truth: float
    estimate: Estimate
    seconds: float

    @property
    def error(self) -> float | None:
        return None if self.estimate.value is None else self.estimate.value - self.truth


def run_benchmark(
    tasks: tuple[Task, ...], estimators: tuple[str, ...], *, n: int = 10_000, seeds: tuple[int, ...] = (0,)
) -> Iterator[Result]:
    """Estimates of every estimator on every task, one after the other.

    Raises:
        BadSamples: An estimator that is not in `PAIRWISE`.
    """
    for name in estimators:
        if name not in PAIRWISE:
            raise BadSamples(f"expected an estimator of {', '.join(PAIRWISE)}, found '{name}'.")
    for task in tasks:
        for seed in seeds:
            x, y = sample(task, n, seed)
            for name in estimators:
                rows = slice(MOST_FOR_KERNELS if name in KERNELS else None)
                start = time.perf_counter()
                estimate = PAIRWISE[name](x[rows], y[rows], seed=seed)
                yield Result(task.name, name, seed, exact_mi(task), estimate, time.perf_counter() - start)


def estimate_file(path: str | Path, *, estimators: tuple[str, ...] = (), seed: int = 0) -> dict:
    """Estimates the information between the arrays `x` and `y` of an npz file; integer `y` means labels.

    Returns:
        {"estimate": {"value", "unit", "ci95", "status", "estimator"}, "estimators": {name: the same}}.

    Raises:
        BadSamples: No such file or arrays, objects inside, or samples that cannot be used.
    """
    try:
        with np.load(path) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:  # a npy file: TypeError
        reason = str(error).splitlines()[0]
        raise BadSamples(f"expected a npz file with the arrays 'x' and 'y' at '{path}': {reason}") from error
    discrete = y.ndim == 1 and y.dtype.kind in "iubUS"
    known, default = (LABELLED, "labelled") if discrete else (PAIRWISE, "pairwise")
    as_samples(x)
    if discrete and len(as_labels(y)) != len(x):
        raise BadSamples(f"expected as many labels as samples ({len(x)}), found {len(y)}.")
    for name in estimators:
        if name not in known:
            raise BadSamples(f"expected an estimator of {', '.join(known)}, found '{name}'.")
    found = {name: _record(known[name](x, y, seed=seed)) for name in dict.fromkeys((default, *estimators))}
    return {"estimate": found[default], "estimators": found}


def _record(estimate: Estimate) -> dict:
    found = estimate.to_dict()
    return {"value": found["value"], "unit": "nats"} | {
        key: found[key] for key in ("ci95", "status", "estimator", "n", "notes")
    }
