"""What an audit measures at one layer of two models: brackets, label information, spectra, in bits."""

from dataclasses import dataclass

import numpy as np

from ibprune.mi.channel import (
    Bracket,
    bracket_given,
    calibrate_sigma,
    difference,
    draw_noise,
    readout_bracket,
    readout_curve,
)
from ibprune.mi.codes import pca_codes
from ibprune.mi.critics import Training, infonce
from ibprune.mi.entropies import label_entropy
from ibprune.mi.extrapolation import extrapolate
from ibprune.mi.neighbours import ross
from ibprune.mi.probes import LEAST_PER_CLASS, LOGISTIC, Probe, fold_codes, shuffled_control, v_information
from ibprune.mi.samples import FEW, NATS_TO_BITS, BadSamples, Estimate, mean_with_interval
from ibprune.mi.spectral import effective_rank, von_neumann_entropy
from ibprune.mi.twins import Twin, channel_twin, probe_twin

KNN_DIMS = 4
PAIR_DIMS = 32  # principal coordinates of either side that the critic sees: what it finds there is a lower bound
PAIR_STEPS = 300
COMPARED = ("delta", "retained", "retained_ci95", "retained_range", "relative_sigma_after", "retained_relative")
LABEL_KEYS = ("family", "before", "after", "delta", "twin_bias", "shuffled", "H_ceiling")
SCALE_TOLERANCE = 0.25  # between the retained shares at equal noise and at equal relative noise


@dataclass(frozen=True)
class AuditSettings:
    """How an audit measures.

    Attributes:
        pooling: Of token features: mean, cls, last or random.
        target: Share of ln N that the dense layer's lower bound reads at the chosen noise.
        repeats: Noise draws per bracket, the same for both models.
        curve: Noise levels of the resolution curve, as multiples of the chosen one.
        probe: Family of the V-information.
        folds: Of the cross-fit.
        tokens: So many of the most frequent tokens are targets too, at one of their occurrences in each input and
            as the token after it; 0 leaves that out.
        pair: Whether to estimate I(dense layer; pruned layer) as well, which takes a trained critic per layer.
        least_retained: Brackets below this many bits in the dense model give no retained share.
    """

    pooling: str = "mean"
    target: float = 0.6
    repeats: int = 2
    curve: tuple[float, ...] = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)
    probe: Probe = LOGISTIC
    folds: int = 5
    tokens: int = 0
    pair: bool = False
    seed: int = 0
    least_retained: float = 0.05


DEFAULTS = AuditSettings()


def measure_layer(before: np.ndarray, after: np.ndarray, labels: np.ndarray | None, settings: AuditSettings) -> dict:
    """Everything measured at one layer, as `audit.json` holds it.

    Args:
        before, after: Features of the dense and of the pruned model on the same inputs, (n, d) and (n, d').
        labels: One per input, or None.
    """
    warnings: list[dict] = []
    n, d = before.shape
    try:
        sigma = calibrate_sigma(before, target=settings.target, seed=settings.seed)
    except BadSamples:
        sigma = None
        warnings.append({"code": "CONSTANT_LAYER", "msg": "the dense layer is constant: nothing to measure"})
    record = {
        "d_before": d,
        "d_after": after.shape[1],
        "pooling": settings.pooling,
        "noise": {"mode": "fixed", "beta": None, "sigma": sigma, "target": settings.target},
    }
    if sigma is None:
        record["I_XL"] = {"before": _no_bracket(), "after": _no_bracket()} | dict.fromkeys((*COMPARED, "curve"))
        record["I_XL_given_Y"] = None
    else:
        record["noise"]["beta"] = sigma / float(np.sqrt(before.astype(np.float64).var(axis=0).mean()))
        width = max(d, after.shape[1])
        noise = draw_noise(n, width, repeats=settings.repeats, seed=settings.seed)
        record["I_XL"] = _input_information(before, after, sigma, noise, settings, warnings)
        record["I_XL_given_Y"] = None
        if labels is not None:
            record["I_XL_given_Y"] = {
                side: _bits(bracket_given(f, labels, sigma, noise=noise[:, :, : f.shape[1]]))
                for side, f in (("before", before), ("after", after))
            }
    record["V_LY"] = label_information(before, after, labels, settings)
    record["I_pair"] = pair_information(before, after, sigma, settings) if settings.pair and sigma else None
    ranks = [effective_rank(f) for f in (before, after)]
    entropies = [von_neumann_entropy(f) for f in (before, after)]
    record["spectral"] = {
        "vne": [None if e.value is None else e.value * NATS_TO_BITS for e in entropies],
        "eff_rank": ranks,
        "status": _worst([e.status for e in entropies]),
    }
    record["knn"] = _knn(before, after, labels)
    record["heads"] = None
    record["warnings"] = warnings
    return record


def _input_information(
    before: np.ndarray,
    after: np.ndarray,
    sigma: float,
    noise: np.ndarray,
    settings: AuditSettings,
    warnings: list[dict],
) -> dict:
    """I(X; L + sigma z) of both models at the noise calibrated on the dense one, and the curve over noise."""
    same = before.shape == after.shape and np.array_equal(before, after)
    sides = {"before": before} if same else {"before": before, "after": after}
    brackets = {side: readout_bracket(f, sigma, noise=noise[:, :, : f.shape[1]]) for side, f in sides.items()}
    twins = {
        side: channel_twin(f, sigma, noise=noise[:1, :, : f.shape[1]], seed=settings.seed)
        for side, f in sides.items()
        if brackets[side].lower is not None
    }
    levels = [sigma * factor for factor in settings.curve]
    curves = {side: readout_curve(f, levels, noise=noise[:1, :, : f.shape[1]]) for side, f in sides.items()}
    if same:
        brackets["after"], curves["after"] = brackets["before"], curves["before"]
        twins |= {"after": twins["before"]} if "before" in twins else {}
    found = {side: _bits(brackets[side], twins.get(side)) for side in ("before", "after")}
    for side in found:
        for note in brackets[side].notes:
            warnings.append({"code": f"I_XL_{side.upper()}", "msg": note})
    found |= dict.fromkeys(COMPARED)
    if brackets["before"].lower is not None and brackets["after"].lower is not None:
        value, ci95 = difference(brackets["after"], brackets["before"])
        found["delta"] = {"value": value * NATS_TO_BITS, "ci95": interval_bits(ci95), "paired": True}
        found |= _retained(brackets["before"], brackets["after"], settings)
        scale = [float(np.sqrt(f.astype(np.float64).var(axis=0).sum())) for f in (before, after)]
        relative = readout_bracket(after, sigma * scale[1] / scale[0], noise=noise[:, :, : after.shape[1]])
        found["relative_sigma_after"] = {k: v for k, v in _bits(relative).items() if k in ("lower", "upper", "status")}
        if found["retained"] is not None and relative.lower is not None:
            found["retained_relative"] = relative.lower / brackets["before"].lower
            if abs(found["retained_relative"] - found["retained"]) > SCALE_TOLERANCE:
                warnings.append(
                    {
                        "code": "SCALE_CHANGED",
                        "msg": f"the features' scale changed by {scale[1] / scale[0]:.2f}: at the same noise the layer "
                        f"reads {found['retained']:.0%} of the dense one, at its own scale "
                        f"{found['retained_relative']:.0%}",
                    }
                )
    found["curve"] = {
        "sigma": levels,
        **{
            side: {
                "lower": [to_bits(b.lower) for b in curves[side]],
                "upper": [to_bits(b.upper) for b in curves[side]],
                "cap": [to_bits(b.cap) for b in curves[side]],
                "rises": _rises(curves[side]),
            }
            for side in ("before", "after")
        },
    }
    return found


def _rises(curve: list[Bracket]) -> bool:
    """Whether information rises with the noise by more than its paired error allows."""
    if any(bracket.lower_terms is None for bracket in curve):
        return False
    for less, more in zip(curve, curve[1:]):
        change = more.lower_terms - less.lower_terms
        if change.mean() > 3 * change.std(ddof=1) / np.sqrt(more.n) or more.cap > less.cap:
            return True
    return False


def _retained(before: Bracket, after: Bracket, settings: AuditSettings) -> dict:
    """Share of the dense lower bound that stayed, and between which shares the truth lies.

    Both bounds fall short, and not alike: the dense one more, where it is nearer to the most that so many inputs can
    show. If the truth lies as far up in the one bracket as in the other, the true share lies between the ratio of the
    lower and the ratio of the upper bounds: `retained_ci95` is that, and on either side 95 % of the sampling error of
    the paired terms (delta method). `retained_range` takes no such thing for granted: all that the brackets allow.
    """
    if before.lower * NATS_TO_BITS < settings.least_retained:
        return {}
    ratio = after.lower / before.lower
    terms = (after.lower_terms - ratio * before.lower_terms) / before.lower
    half = 1.96 * float(terms.std(ddof=1)) / np.sqrt(before.n)
    low, high = sorted((ratio, after.upper / before.upper))
    return {
        "retained": ratio,
        "retained_ci95": [low - half, high + half],
        "retained_range": [after.lower / before.upper, after.upper / before.lower],
    }


def label_information(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray | None, settings: AuditSettings
) -> dict:
    """V-information about the labels in both models, on the same folds, with the twin's bias."""
    if labels is None:
        return dict.fromkeys(LABEL_KEYS) | {"status": "not_applicable"}
    options = {"probe": settings.probe, "folds": settings.folds, "seed": settings.seed}
    same = before.shape == after.shape and np.array_equal(before, after)
    usable = np.ptp(before, axis=0).any() and np.unique(labels, return_counts=True)[1].min() >= settings.folds
    shared = fold_codes(before, labels, **options) if usable else None
    own = options | {"discrete": True}  # inputs are distinct: features that repeat are no copies
    estimates = {"before": v_information(before, labels, **own, shared=shared)}
    twins = {"before": probe_twin(before, labels, **options)}
    estimates["after"] = estimates["before"] if same else v_information(after, labels, **own)
    twins["after"] = twins["before"] if same else probe_twin(after, labels, **options)
    found: dict = {"family": estimates["before"].estimator}
    for side, estimate in estimates.items():
        found[side] = _estimate_bits(estimate)
        twin = twins[side]
        if twin is not None and estimate.value is not None:
            found[side]["corrected"] = (estimate.value - twin.error) * NATS_TO_BITS
    found["delta"] = None
    if estimates["before"].terms is not None and estimates["after"].terms is not None:
        value, ci95 = mean_with_interval(estimates["after"].terms - estimates["before"].terms)
        found["delta"] = {"value": to_bits(value), "ci95": interval_bits(ci95), "paired": True}
    found["twin_bias"] = {side: None if t is None else t.error * NATS_TO_BITS for side, t in twins.items()}
    found["shuffled"] = to_bits(shuffled_control(before, labels, **options, shared=shared).value)
    found["H_ceiling"] = to_bits(label_entropy(labels).value)
    biased = [t is not None and not t.trusted for t in twins.values()]
    found["status"] = _worst([e.status for e in estimates.values()] + ["biased"] * any(biased))
    return found


def token_information(before: np.ndarray, after: np.ndarray, tokens: np.ndarray, settings: AuditSettings) -> dict:
    """V-information about a token, as `label_information`, over the inputs whose token is frequent enough.

    Args:
        before, after: Features at one token of each input, (n, d) and (n, d').
        tokens: The token to tell, (n,), -1 where there is none. Tokens of fewer than ten inputs are left out.
    """
    values, counts = np.unique(tokens[tokens >= 0], return_counts=True)
    rows = np.isin(tokens, values[counts >= LEAST_PER_CLASS])
    size = {"n": int(rows.sum()), "n_classes": int((counts >= LEAST_PER_CLASS).sum())}
    if size["n"] < FEW:
        return dict.fromkeys(LABEL_KEYS) | size | {"status": "undersampled"}
    return label_information(before[rows], after[rows], tokens[rows], settings) | size


def pair_information(before: np.ndarray, after: np.ndarray, sigma: float, settings: AuditSettings) -> dict:
    """I(dense layer + noise; pruned layer + noise) from below, and the same of the dense layer with itself.

    Without noise two deterministic layers share infinitely much. Each side gets noise of its own; the critic
    sees principal coordinates, so that its held-out bound is one of the layers too.
    """
    n, width = len(before), max(before.shape[1], after.shape[1])
    noise = sigma * draw_noise(n, width, repeats=2, seed=settings.seed + 1)
    x = pca_codes(before + noise[0][:, : before.shape[1]], PAIR_DIMS)

    def estimator(a: np.ndarray, b: np.ndarray) -> Estimate:  # training in proportion to the samples
        return infonce(a, b, training=Training(folds=2, steps=PAIR_STEPS * len(a) // n), seed=settings.seed)

    found: dict = {"estimator": f"infonce, {PAIR_DIMS} principal coordinates", "sigma": sigma}
    for name, other in (("self", before), ("value", after)):
        y = pca_codes(other + noise[1][:, : other.shape[1]], PAIR_DIMS)
        found[name] = _estimate_bits(estimator(x, y))
    found["extrapolated"] = _estimate_bits(extrapolate(x, y, estimator, most=4, seed=settings.seed).estimate)
    status = found["value"]["status"]
    return found | {"status": "lower_only" if status == "ok" else status}


def _knn(before: np.ndarray, after: np.ndarray, labels: np.ndarray | None) -> dict:
    """Nearest neighbours on a few principal components: a cross-check, blind to directions of low variance."""
    if labels is None or len(np.unique(labels)) < 2:
        return {"estimator": "ross", "dims": KNN_DIMS, "value": [None, None], "status": "not_applicable"}
    estimates = []
    for f in (before, after):
        if not np.ptp(f, axis=0).any():
            return {"estimator": "ross", "dims": KNN_DIMS, "value": [None, None], "status": "degenerate"}
        estimates.append(ross(pca_codes(f, min(KNN_DIMS, f.shape[1])), labels))
    return {
        "estimator": estimates[0].estimator,
        "dims": KNN_DIMS,
        "value": [to_bits(e.value) for e in estimates],
        "status": _worst([e.status for e in estimates]),
    }


def _bits(bracket: Bracket, twin: Twin | None = None) -> dict:
    found = {
        "lower": to_bits(bracket.lower),
        "upper": to_bits(bracket.upper),
        "upper_kind": None if bracket.upper is None else "loo" if bracket.upper == bracket.loo else "gauss_cap",
        "loo": to_bits(bracket.loo),
        "ci95": None if bracket.ci95 is None else interval_bits(bracket.ci95),
        "ceiling": to_bits(bracket.ceiling),
        "status": bracket.status,
    }
    if twin is not None:
        found["self_check"] = {key: to_bits(getattr(twin, key)) for key in ("truth", "lower", "upper", "error")}
        if bracket.status == "ok" and not twin.trusted:
            found["status"] = "biased"
    return found


def _no_bracket() -> dict:
    return {"lower": None, "upper": None, "upper_kind": None, "loo": None, "ci95": None, "ceiling": None,
            "status": "degenerate"}  # fmt: skip


def _estimate_bits(estimate: Estimate) -> dict:
    ci95 = None if estimate.ci95 is None else interval_bits(estimate.ci95)
    return {"value": to_bits(estimate.value), "ci95": ci95, "status": estimate.status}


def to_bits(nats: float | None) -> float | None:
    return None if nats is None else float(nats) * float(NATS_TO_BITS)


def interval_bits(pair: tuple[float, float]) -> list[float]:
    return [to_bits(value) for value in pair]


def _worst(statuses: list[str]) -> str:
    return next((status for status in statuses if status != "ok"), "ok")
