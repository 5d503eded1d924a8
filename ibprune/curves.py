"""Curves of a report page from a run's decision.json: scores in order with their cut, and the cost on its way down."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ibprune.drawing import Axis, make_axis

RANKED_BY = {  # what a score says, for the page
    "vib": "the masks learned: −log α, how far the mean of a unit's multiplier stands above its noise",
    "gradual": "the squared gradient of the loss by a unit's multiplier, taken anew while the weights trained",
    "fisher": "the squared gradient of the loss by a unit's multiplier (Fisher information)",
    "kwon": "the squared gradient of the loss by a unit's multiplier; then units were exchanged by their Fisher matrix",
    "obs": "what the loss is expected to rise by without a unit, the others making up for it (Fisher matrix)",
    "taylor": "the gradient of the loss by a unit's multiplier, without its sign",
    "flap": "how much a unit's features vary, times the weights that read them",
    "activation": "the mean size of a unit's features",
    "magnitude": "the squared weights that go with a unit",
    "random": "chance",
}
SEEN = 100.0  # times the least score above 0 that the largest one is, from which on powers of ten are drawn
DECADES = 8  # that are drawn at the most


@dataclass(frozen=True)
class Ranked:
    """The units of one kind in the order of their scores.

    Attributes:
        points: (place, score), as percentages of both axes.
        cut: Where as many of the best units end as stay, as a percentage; None where all or none do.
        runs: (start, width, share that stays) of stretches of units, as percentages and a share.
        words, beyond: What it shows; the second of units on the other side of the cut, "" without any.
        short: Whether some units have no score: they had been cut before.
    """

    kind: str
    y: Axis
    points: tuple[tuple[float, float], ...]
    cut: float | None
    runs: tuple[tuple[float, float, float], ...]
    words: str
    beyond: str
    short: bool


@dataclass(frozen=True)
class Descent:
    """The cost of the units in a model, and what was allowed, over the steps of mask learning; all as percentages.

    Attributes:
        spent, allowed: (x, y).
        stops: (x, y, label) of every budget that was reached.
    """

    x: Axis
    y: Axis
    spent: tuple[tuple[float, float], ...]
    allowed: tuple[tuple[float, float], ...]
    stops: tuple[tuple[float, float, str], ...]
    words: str


def draw_ranked(kind: str, found: dict) -> Ranked:
    """The curve of a kind, as `decision.json` has it.

    Example:
        >>> found = {"units": 4, "kept": 1, "threshold": 2.5, "beyond": 0, "scores": [2.5, 2.0, 1.0, None]}
        >>> drawn = draw_ranked("heads", found | {"stays": [1.0, 0.0, 0.0, 0.0]})
        >>> drawn.words, drawn.cut, drawn.runs
        ('1 of 4 stay, from 2.5 up', 25.0, ((0.0, 25.0, 1.0), (25.0, 75.0, 0.0)))
    """
    units, kept, scores, stays = (found[key] for key in ("units", "kept", "scores", "stays"))
    finite = [float(score) for score in scores if score is not None]
    least = min((x for x in finite if x > 0), default=0.0)
    powers = bool(finite) and finite[-1] >= 0 and finite[0] > SEEN * least > 0  # learned scores may be negative
    least = max(least, finite[0] * 10.0**-DECADES) if powers else 0.0
    heights = [math.log10(max(score, least)) if powers else score for score in finite]
    axis = make_axis(heights, unit="power" if powers else "", most=3)
    n, threshold, beyond = len(scores), found["threshold"], found["beyond"]
    points = tuple((round(100 * (i + 0.5) / n, 2), axis.at(height)) for i, height in enumerate(heights))
    words = f"{kept:,} of {units:,} stay" + (f", from {threshold:.3g} up" if threshold is not None else "")
    return Ranked(
        kind,
        axis,
        points,
        round(100 * kept / units, 2) if 0 < kept < units else None,
        _runs(stays),
        words,
        f"{beyond:,} below it stay for as many above it" if beyond else "",
        len(finite) < n,
    )


def _runs(stays: Sequence[float]) -> tuple[tuple[float, float, float], ...]:
    """Stretches of which equally much stays, to a tenth."""
    found, at, width = [], 0, 100 / len(stays)
    for share, run in groupby(round(10 * share) / 10 if 0.05 < share < 0.95 else round(share) for share in stays):
        length = len(list(run))
        found.append((round(at * width, 2), round(length * width, 2), float(share)))
        at += length
    return tuple(found)


def draw_descent(found: dict) -> Descent:
    """The path of a cost, as `decision.json` has it."""
    points, stops = found["points"], found["stops"]
    x = make_axis([0.0, *(point[0] for point in points)], most=4)
    y = make_axis([0.0, 1.0], unit="share", most=4)
    first, last = points[0], points[-1]
    down = next((step for step, spent, _ in points if spent <= 1.02 * last[1]), last[0])
    said = ", ".join(f"{keep:g} after step {step:,}" for step, keep in stops)
    return Descent(
        x,
        y,
        tuple((x.at(step), y.at(spent)) for step, spent, _ in points),
        tuple((x.at(step), y.at(limit)) for step, _, limit in points),
        tuple((x.at(step), y.at(keep), f"{keep:g}") for step, keep in stops),
        f"The cost of the units in the model over {last[0]:,} steps of mask learning: {first[1]:.2f} of the dense one "
        f"at first, {last[1]:.2f} from step {down:,} on; asked was {said}",
    )
