"""What decided which units stay, small enough to keep: their scores in order, and the cost on its way to the budget."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ibprune.budget import Budget
from ibprune.groups import Site
from ibprune.names import DECISION, DECISION_SCHEMA
from ibprune.ties import Keep, Scores

PARTS = 256  # of a kind's units in the order of their scores
POINTS = 200  # of a path


def rank_kinds(scores: Scores, keep: Keep, sites: dict[str, Site]) -> dict[str, dict]:
    """The scores of each kind over all its sites, best first, and which units stay, in at most `PARTS` parts.

    Args:
        scores: By site, (n_units,); one that is not finite belongs to a unit that was cut before.
        keep: The units that stay, by site (`ibprune.budget.present`).
        sites: Those to cut.

    Returns:
        By kind: "units" and "kept", numbers; "threshold", the least score among as many of the best units as stay, None
        where all stay or none; "beyond", how many of the units that stay are not among these; and of every part
        "scores", the score of its middle unit, None where it is not finite, and "stays", the share that stays.

    Example:
        >>> import torch
        >>> from ibprune.groups import Group, MaskAt
        >>> site = Site("0.ffn", Group("ffn", "ffn", (), MaskAt("in")), "0", (), MaskAt("in"), n_units=4)
        >>> found = rank_kinds({"0.ffn": torch.tensor([3.0, 1.0, 2.0, 0.5])}, {"0.ffn": (0, 1)}, {"0.ffn": site})["ffn"]
        >>> found["threshold"], found["beyond"], found["scores"], found["stays"]
        (2.0, 1, [3.0, 2.0, 1.0, 0.5], [1.0, 0.0, 1.0, 0.0])
    """
    found = {}
    for kind in dict.fromkeys(site.kind for site in sites.values()):
        names = [name for name, site in sites.items() if site.kind == kind]
        values = np.concatenate([scores[name].detach().cpu().double().numpy() for name in names])
        stays = np.concatenate([np.isin(np.arange(len(scores[name])), keep[name]) for name in names])
        order = np.argsort(-values, kind="stable")
        values, stays = values[order], stays[order]
        kept = int(stays.sum())
        parts = np.array_split(np.arange(len(values)), _edges(len(values)))
        found[kind] = {
            "units": len(values),
            "kept": kept,
            "threshold": _rounded(values[kept - 1]) if 0 < kept < len(values) else None,
            "beyond": int(stays[kept:].sum()),
            "scores": [_rounded(values[part[len(part) // 2]]) for part in parts],
            "stays": [round(float(stays[part].mean()), 3) for part in parts],
        }
    return found


def _edges(units: int) -> list[int]:
    """Where the second part and those after it begin: parts that differ in size lie evenly among each other."""
    parts = min(PARTS, units)
    return [part * units // parts for part in range(1, parts)]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def make_path(points: Sequence[Sequence[float]], stops: Sequence[Sequence[float]], budget: Budget) -> dict | None:
    """How the cost went down while masks were learned; None where no steps were made.

    Args:
        points: (step, share of the dense cost that the units in the model have, share allowed), in order.
        stops: (step, budget) at which the learning of one model ended, in order.
        budget: Says what the cost is.

    Returns:
        "cost" and "scope", as in a budget; "stops"; and "points", at most `POINTS` of them, the first and the last too.
    """
    if not points:
        return None
    chosen = sorted({round(i) for i in np.linspace(0, len(points) - 1, min(POINTS, len(points)))})
    return {
        "cost": budget.cost,
        "scope": budget.scope,
        "stops": [list(stop) for stop in stops],
        "points": [[int(points[i][0]), *(round(share, 5) for share in points[i][1:])] for i in chosen],
    }


def make_decision(score: str, kinds: dict[str, dict], path: dict | None = None) -> dict:
    """What `decision.json` holds.

    Args:
        score: What ranked the units in the end, one of `ibprune.scores.SCORES`.
        kinds: As `rank_kinds` gives it.
        path: As `make_path` gives it.
    """
    return {"schema": DECISION_SCHEMA, "score": score, "kinds": kinds, "path": path}


def write_decision(decision: dict, folder: Path) -> None:
    """Writes `decision.json` into a folder."""
    (folder / DECISION).write_text(json.dumps(decision) + "\n")
