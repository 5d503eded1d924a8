"""The information audit: what each layer of a model knew of its input and its labels before and after pruning."""

import time
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from ibprune.attention import add_heads_
from ibprune.checks import apply_checks_, hard_checks, headline, untouched
from ibprune.console import Quiet
from ibprune.errors import BadData
from ibprune.features import block_layers, collect, find_layers
from ibprune.inputs import Inputs
from ibprune.mi.channel import (
    Bracket,
    bracket_given,
    calibrate_sigma,
    difference,
    draw_noise,
    readout_bracket,
    readout_curve,
)
from ibprune.mi.entropies import label_entropy
from ibprune.mi.neighbours import ross
from ibprune.mi.probes import LOGISTIC, Probe, shuffled_control, v_information
from ibprune.mi.samples import NATS_TO_BITS, BadSamples, Estimate
from ibprune.mi.spectral import effective_rank, von_neumann_entropy
from ibprune.mi.twins import Twin, channel_twin, probe_twin
from ibprune.mi.weighted import pca_codes
from ibprune.plans import PruningPlan

SCHEMA = "ibprune.mi_audit/1"
KNN_DIMS = 4
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
        least_retained: Brackets below this many bits in the dense model give no retained share.
    """

    pooling: str = "mean"
    target: float = 0.6
    repeats: int = 2
    curve: tuple[float, ...] = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)
    probe: Probe = LOGISTIC
    folds: int = 5
    seed: int = 0
    least_retained: float = 0.05


@dataclass(frozen=True)
class Side:
    """One of the two models: a name for the report and the module."""

    id: str
    model: nn.Module

    def to_dict(self) -> dict:
        return {"id": self.id, "params": sum(p.numel() for p in self.model.parameters())}


def audit(
    before: Side,
    after: Side,
    inputs: Inputs,
    *,
    layers: tuple[str, ...] = (),
    settings: AuditSettings = AuditSettings(),
    plan: PruningPlan | None = None,
    console: Quiet | None = None,
) -> dict:
    """Audits two models on the same inputs with the same noise; the dict of `audit.json`, in bits.

    Per layer: a bracket of I(X; L + noise) through a noise calibrated on the dense model and then frozen,
    V-information about the labels where there are any, spectra, and beside each the error of the same
    estimator on a synthetic twin. Blocks also tell where their attention heads look. Hard checks turn statuses
    to "inconsistent".

    Args:
        layers: Names from `features.find_layers`; default: the residual stream after every block.
        plan: That made the pruned model, to tell which of its heads is which of the dense one's.

    Raises:
        BadData: NaN in a layer, or too few inputs.
        BadRecipe: An unknown layer or pooling.
    """
    console = console or Quiet()
    start = time.perf_counter()
    where_before = find_layers(before.model, layers)
    where_after = find_layers(after.model, layers)
    if list(where_before) != list(where_after):
        raise BadData(
            f"expected the same layers in both models, found {len(where_before)} and {len(where_after)}: "
            "name common ones with --layers."
        )
    features = [
        collect(side.model, console.track(inputs.batches, f"reading {what}", len(inputs.batches)), where,
                pooling=settings.pooling, seed=settings.seed)
        for side, where, what in ((before, where_before, "dense"), (after, where_after, "pruned"))
    ]  # fmt: skip
    labels = None if inputs.labels is None else np.asarray(inputs.labels)
    stream = block_layers(before.model) if hasattr(before.model, "config") else {}
    records = [
        {"name": name, "kind": "residual_stream" if name in stream else "module"}
        | _layer(features[0][name], features[1][name], labels, settings)
        for name in console.track(where_before, "auditing layers", len(where_before))
    ]
    add_heads_(records, before.model, after.model, inputs.batches, plan=plan, special=inputs.special, console=console)
    checks = hard_checks(untouched(before.model, after.model, where_before), *features, records)
    apply_checks_(records, checks)
    n = len(features[0][next(iter(where_before))])
    found = {
        "schema": SCHEMA,
        "unit": "bits",
        "seed": settings.seed,
        "data": {
            "name": inputs.name,
            "n": n,
            "split": "held_out",
            "dedup_removed": inputs.removed,
            "sha256": inputs.sha256,
            "overlap_with_pruning": inputs.overlap,
        },
        "models": {"before": before.to_dict(), "after": after.to_dict()},
        "labels": _labels(labels),
        "layers": records,
        "checks": checks,
        "env": {
            "torch": version("torch"),
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - start, 1),
        },
    }
    return found | {"headline": headline(found)}


def _layer(before: np.ndarray, after: np.ndarray, labels: np.ndarray | None, settings: AuditSettings) -> dict:
    """Everything measured at one layer."""
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
    record["V_LY"] = _label_information(before, after, labels, settings)
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
        found["delta"] = {"value": value * NATS_TO_BITS, "ci95": _scaled(ci95), "paired": True}
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
                "lower": [_bit(b.lower) for b in curves[side]],
                "upper": [_bit(b.upper) for b in curves[side]],
                "cap": [_bit(b.cap) for b in curves[side]],
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
    """Share of the dense lower bound that stayed, with the delta-method interval of paired terms."""
    if before.lower * NATS_TO_BITS < settings.least_retained:
        return {}
    ratio = after.lower / before.lower
    terms = (after.lower_terms - ratio * before.lower_terms) / before.lower
    half = 1.96 * float(terms.std(ddof=1)) / np.sqrt(before.n)
    return {
        "retained": ratio,
        "retained_ci95": [ratio - half, ratio + half],
        "retained_range": [after.lower / before.upper, after.upper / before.lower],
    }


def _label_information(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray | None, settings: AuditSettings
) -> dict:
    """V-information about the labels in both models, on the same folds, with the twin's bias."""
    options = {"probe": settings.probe, "folds": settings.folds, "seed": settings.seed}
    if labels is None:
        return dict.fromkeys(LABEL_KEYS) | {"status": "not_applicable"}
    same = before.shape == after.shape and np.array_equal(before, after)
    estimates = {"before": v_information(before, labels, **options)}
    twins = {"before": probe_twin(before, labels, **options)}
    estimates["after"] = estimates["before"] if same else v_information(after, labels, **options)
    twins["after"] = twins["before"] if same else probe_twin(after, labels, **options)
    found: dict = {"family": estimates["before"].estimator}
    for side, estimate in estimates.items():
        found[side] = _estimate_bits(estimate)
        twin = twins[side]
        if twin is not None and estimate.value is not None:
            found[side]["corrected"] = (estimate.value - twin.error) * NATS_TO_BITS
    found["delta"] = None
    if estimates["before"].terms is not None and estimates["after"].terms is not None:
        terms = estimates["after"].terms - estimates["before"].terms
        half = 1.96 * float(terms.std(ddof=1)) / np.sqrt(len(terms))
        value = float(terms.mean())
        found["delta"] = {"value": value * NATS_TO_BITS, "ci95": _scaled((value - half, value + half)), "paired": True}
    found["twin_bias"] = {side: None if t is None else t.error * NATS_TO_BITS for side, t in twins.items()}
    found["shuffled"] = _bit(shuffled_control(before, labels, **options).value)
    found["H_ceiling"] = _bit(label_entropy(labels).value)
    biased = [t is not None and not t.trusted for t in twins.values()]
    found["status"] = _worst([e.status for e in estimates.values()] + ["biased"] * any(biased))
    return found


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
        "value": [_bit(e.value) for e in estimates],
        "status": _worst([e.status for e in estimates]),
    }


def _labels(labels: np.ndarray | None) -> dict | None:
    if labels is None:
        return None
    entropy = label_entropy(labels)
    return {
        "n_classes": len(np.unique(labels)),
        "H": _bit(entropy.value),
        "H_ci95": _scaled(entropy.ci95),
        "status": entropy.status,
    }


def _bits(bracket: Bracket, twin: Twin | None = None) -> dict:
    found = {
        "lower": _bit(bracket.lower),
        "upper": _bit(bracket.upper),
        "upper_kind": None if bracket.upper is None else "loo" if bracket.upper == bracket.loo else "gauss_cap",
        "loo": _bit(bracket.loo),
        "ci95": None if bracket.ci95 is None else _scaled(bracket.ci95),
        "ceiling": _bit(bracket.ceiling),
        "status": bracket.status,
    }
    if twin is not None:
        found["self_check"] = {key: _bit(getattr(twin, key)) for key in ("truth", "lower", "upper", "error")}
        if bracket.status == "ok" and not twin.trusted:
            found["status"] = "biased"
    return found


def _no_bracket() -> dict:
    return {"lower": None, "upper": None, "upper_kind": None, "loo": None, "ci95": None, "ceiling": None,
            "status": "degenerate"}  # fmt: skip


def _estimate_bits(estimate: Estimate) -> dict:
    ci95 = None if estimate.ci95 is None else _scaled(estimate.ci95)
    return {"value": _bit(estimate.value), "ci95": ci95, "status": estimate.status}


def _bit(nats: float | None) -> float | None:
    return None if nats is None else float(nats) * float(NATS_TO_BITS)


def _scaled(pair: tuple[float, float]) -> list[float]:
    return [_bit(value) for value in pair]


def _worst(statuses: list[str]) -> str:
    return next((status for status in statuses if status != "ok"), "ok")
