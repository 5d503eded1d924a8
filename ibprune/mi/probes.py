"""V-information: what a cross-fitted probe can say about labels or tokens from features, a lower bound on average."""

import itertools
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ibprune.mi.samples import FEW, BadSamples, Estimate, as_labels, as_samples, copies, mean_with_interval

PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
LEAST_PER_CLASS = 10
PROBES = ("logistic", "mlp")


@dataclass(frozen=True)
class Probe:
    """A family V of predictors.

    Attributes:
        kind: "logistic" (multinomial, L2) or "mlp" (one hidden layer).
        dims: Numbers of principal components to keep after standardising; a small number needs fewer samples, a
            large one sees what depends on directions of low variance.
        penalties: L2 weights. Both are chosen on an inner split and used in every fold.
        hidden: Units of the MLP.
    """

    kind: str = "logistic"
    dims: tuple[int, ...] = (128, 512)
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    hidden: int = 128

    def __post_init__(self):
        if self.kind not in PROBES:
            raise ValueError(f"expected a probe of {' or '.join(PROBES)}, found '{self.kind}'.")


LOGISTIC = Probe()


@dataclass(frozen=True)
class Folds:
    """Codes of every fold of a cross-fit, which several targets of the same features share.

    Attributes:
        parts: (rows fitted, rows held out, codes of the former, codes of the latter) of each fold.
        inner: The same for the split that chooses the penalty, inside the first fold's fitted rows.
    """

    parts: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]
    inner: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def fold_codes(features, labels, *, probe: Probe = LOGISTIC, folds: int = 5, seed: int = 0) -> Folds:
    """Standardises and projects the features once per fold; the folds are stratified by the labels.

    Raises:
        BadSamples: As in `as_samples` and `as_labels`, their lengths differ, or a class is smaller than `folds`.
    """
    x, y = _checked(features, labels)
    if np.bincount(y).min() < folds:
        raise BadSamples(f"expected at least {folds} samples of each class, found {np.bincount(y).min()}.")
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y))
    train = splits[0][0]
    fit, held_out = next(StratifiedKFold(4, shuffle=True, random_state=seed).split(train, y[train]))
    rows = [*splits, (train[fit], train[held_out])]
    parts = tuple((fit, held_out, *_codes(x[fit], x[held_out], probe)) for fit, held_out in rows)
    return Folds(parts[:-1], parts[-1])


def v_information(
    features,
    labels,
    *,
    probe: Probe = LOGISTIC,
    folds: int = 5,
    seed: int = 0,
    shared: Folds | None = None,
    discrete: bool = False,
) -> Estimate:
    """I_V(L -> Y) = H_V(Y) - H_V(Y | L), in nats (Xu et al. 2020, def. 2), by cross-fitting.

    Each sample's term is log q(y|l) - log p(y), q and p fitted on the other folds (PVI of Ethayarajh et al.
    2022), so that in expectation the mean is at most I(L; Y). It may be negative, and may rise with depth:
    computation makes information usable.

    Args:
        features: (n, d). labels: (n,), integers or strings.
        folds: Stratified; the same seed gives two models the same folds, so that differences are paired.
        shared: Codes of these features from `fold_codes`, where they stand already.
        discrete: Rows may repeat others because the features are draws of something discrete, and no copies.

    Returns:
        Status "undersampled" below 200 samples or 10 of a class, "degenerate" for one class or constant features (no
        value) and where rows are copies of others, of which the held-out ones were trained on.

    Raises:
        BadSamples: As in `as_samples` and `as_labels`, or their lengths differ.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(0, 2, 1000)
        >>> estimate = v_information(y[:, None] + 0.1 * rng.normal(size=(1000, 3)), y)
        >>> 0.6 < estimate.value < np.log(2)
        True
    """
    x, y, name = *_checked(features, labels), probe.kind
    counts = np.bincount(y)
    if len(counts) < 2 or not np.ptp(x, axis=0).any():
        what = "the labels have one class" if len(counts) < 2 else "the features are constant"
        return Estimate(None, "degenerate", name, len(y), notes=(what,))
    if counts.min() < folds:
        return Estimate(None, "undersampled", name, len(y), notes=(f"a class has {counts.min()} samples",))
    shared = shared or fold_codes(x, y, probe=probe, folds=folds, seed=seed)
    widths = sorted({min(dims, shared.inner[2].shape[1]) for dims in probe.dims})
    choices = list(itertools.product(widths, probe.penalties))
    dims, penalty = max(choices, key=lambda choice: _fold_terms(shared.inner, y, probe, *choice, seed).mean())
    name = f"{probe.kind}_pca{dims}"
    terms = np.zeros(len(y))
    for part in shared.parts:
        terms[part[1]] = _fold_terms(part, y, probe, dims, penalty, seed)
    value, ci95 = mean_with_interval(terms)
    few = len(y) < FEW or counts.min() < LEAST_PER_CLASS
    copied = "" if discrete else copies(x, y)
    notes = (f"penalty {penalty:g}",) + ((f"the least class has {counts.min()} samples",) if few else ())
    notes += (copied,) if copied else ()
    status = "degenerate" if copied else "undersampled" if few else "ok"
    return Estimate(value, status, name, len(y), ci95, notes, terms)


def shuffled_control(
    features, labels, *, probe: Probe = LOGISTIC, folds: int = 5, seed: int = 0, shared: Folds | None = None
) -> Estimate:
    """`v_information` with the labels permuted: nothing above 0 may be found."""
    permuted = np.random.default_rng([seed, 15_485_863]).permutation(as_labels(labels))
    return v_information(features, permuted, probe=probe, folds=folds, seed=seed, shared=shared)


def online_code(features, labels, *, probe: Probe = LOGISTIC, seed: int = 0) -> Estimate:
    """MDL information of the prequential code, nats a sample (Voita & Titov 2020, section 3.2, eq. 3).

    The labels are sent in portions, each coded by the probe fitted on what was sent before, the first
    uniformly; the value is H(Y) minus the code's length per sample, so that slow learning costs too.
    """
    dims = probe.dims[0]
    x, y, name = *_checked(features, labels), f"online code, {probe.kind}_pca{dims}"
    n, classes = len(y), int(y.max()) + 1
    if classes < 2 or not np.ptp(x, axis=0).any():
        return Estimate(None, "degenerate", name, n)
    order = np.random.default_rng([seed, 32_452_843]).permutation(n)
    x, y = x[order], y[order]
    ends = sorted({max(2, int(np.ceil(portion * n))) for portion in PORTIONS})
    length = ends[0] * np.log(classes)
    middle = probe.penalties[len(probe.penalties) // 2]
    for start, end in zip(ends, ends[1:]):
        if len(np.unique(y[:start])) < 2:
            length += (end - start) * np.log(classes)
            continue
        codes = [part[:, :dims] for part in _codes(x[:start], x[start:end], probe)]
        model = _fit(codes[0], y[:start], probe, middle, seed)
        length -= _log_q(model, codes[1], y[start:end], classes).sum()
    share = np.bincount(y) / n
    entropy = -float((share * np.log(share)).sum())
    return Estimate(entropy - float(length) / n, "ok" if n >= FEW else "undersampled", name, n)


def _checked(features, labels) -> tuple[np.ndarray, np.ndarray]:
    x, y = as_samples(features, "features"), as_labels(labels)
    if len(x) != len(y):
        raise BadSamples(f"expected one label per sample ({len(x)}), found {len(y)}.")
    return x, y


def _fold_terms(part: tuple, y: np.ndarray, probe: Probe, dims: int, penalty: float, seed: int) -> np.ndarray:
    """log q(y|l) - log p(y) of the rows held out of one fold, by the first `dims` components."""
    fit, held_out, *both = part
    fitted_codes, codes = (each[:, :dims] for each in both)
    if len(np.unique(y[fit])) < 2:
        return np.zeros(len(held_out))  # nothing was there to learn: q is the prior
    model = _fit(fitted_codes, y[fit], probe, penalty, seed)
    return _log_q(model, codes, y[held_out], int(y.max()) + 1) - _log_prior(y[fit], y[held_out], int(y.max()) + 1)


def _codes(fitted: np.ndarray, held_out: np.ndarray, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Both parts standardised and projected as the first part says."""
    # not the randomised solver, which gives identical layers different codes
    solver = "covariance_eigh" if fitted.shape[1] <= len(fitted) else "full"
    reduce = PCA(min(max(probe.dims), fitted.shape[1], len(fitted) - 1), svd_solver=solver)
    transform = make_pipeline(StandardScaler(), reduce).fit(fitted)
    return transform.transform(fitted), transform.transform(held_out)


def _fit(codes: np.ndarray, y: np.ndarray, probe: Probe, penalty: float, seed: int) -> ClassifierMixin:
    if probe.kind == "logistic":
        predict = LogisticRegression(C=1.0 / (penalty * len(codes)), max_iter=300)
    else:
        predict = MLPClassifier(
            (probe.hidden,), alpha=penalty, early_stopping=True, n_iter_no_change=20, tol=1e-5, max_iter=300,
            learning_rate_init=3e-3, random_state=seed,
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a weaker predictor is still a valid bound
        return predict.fit(codes, y)


def _log_q(model: ClassifierMixin, x: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    """log q(y|x), (n,), one part in a thousand spread evenly: no single surprise may outweigh all the rest."""
    q = np.zeros((len(x), classes))
    q[:, model.classes_] = model.predict_proba(x)
    return np.log(0.999 * q + 0.001 / classes)[np.arange(len(y)), y]


def _log_prior(fitted: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    counts = np.bincount(fitted, minlength=classes) + 0.5
    return np.log(counts / counts.sum())[y]
