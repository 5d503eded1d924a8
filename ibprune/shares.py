"""How much of each kind to keep: found by measuring the loss of candidate cuts, not by a formula."""

import math
from collections.abc import Callable

from ibprune.budget import Budget, Keep, Scores, fractions_kept, least_cost, present, solve_by_cost, solve_by_shares
from ibprune.console import Quiet
from ibprune.costs import CostModel, amount
from ibprune.errors import BadRecipe
from ibprune.groups import Site

SHARES = ("probe", "cost", "equal")
MOST_RECOVERED = 6  # candidates that get a short recovery
SMALL = 1e-6  # a share, or a pressure, that is as good as none
ROUNDS, FACTORS = 2, (2.0, 0.5)  # of the search, and by which it scales the pressure on a kind


def equal_pressure(sites: dict[str, Site]) -> dict[str, float]:
    """The same kept fraction for every kind of width; whole sub-layers stay unless they are all there is."""
    kinds = dict.fromkeys(site.kind for site in sites.values())
    return {kind: 0.0 if kind == "layers" and len(kinds) > 1 else 1.0 for kind in kinds}


def as_pressure(kept: dict[str, float]) -> dict[str, float]:
    """The pressures at which each kind keeps the given share of its units, by kind.

    What stays whole is under a very small one: it gives where nothing else can.

    Example:
        >>> {kind: round(value, 3) for kind, value in as_pressure({"heads": 0.5, "ffn": 0.25}).items()}
        {'heads': 0.693, 'ffn': 1.386}
    """
    return {kind: max(-math.log(max(share, SMALL)), SMALL) for kind, share in kept.items()}


def most_compared(kinds: int, *, vocab: bool = False) -> int:
    """How many cuts `probe_shares` compares right after the cut, at the most.

    Args:
        vocab: Whether a vocabulary is among the kinds.

    Example:
        >>> most_compared(4), most_compared(4, vocab=True)
        (22, 24)
    """
    return 2 + 2 * vocab + kinds + ROUNDS * len(FACTORS) * kinds


def probe_shares(
    loss_of: Callable[[Keep, float], float],
    scores: Scores,
    sites: dict[str, Site],
    model: CostModel,
    budget: Budget,
    *,
    console: Quiet,
    recovered_loss_of: Callable[[Keep], float] | None = None,
) -> Keep:
    """The cut with the least measured loss found by a coordinate search over the kinds.

    A curvature at the dense point says which unit of a kind matters, but little about cutting half of
    a kind: so candidates are cut for real (by masks) and their loss on calibration data decides.
    The search starts from score-per-cost, from equal shares, from equal shares with one kind spared, and from more
    pressure on a vocabulary, then scales the pressure on one kind at a time. Kind k keeps exp(-t * pressure[k]) of
    its units.

    Args:
        loss_of: The loss right after a cut, or any larger number where it is above a bound, from which on it need not
            be known.
        recovered_loss_of: The loss after a cut and a short recovery. It has the last word between few candidates:
            what hurts most at once is not what stays lost.
    """
    tried: set[tuple] = set()
    best: tuple[float, Keep, dict[str, float]] | None = None

    def consider(pressure: dict[str, float] | None) -> None:
        nonlocal best
        try:
            keep = (
                _by_cost(scores, sites, model, budget)
                if pressure is None
                else solve_by_shares(scores, sites, model, budget, pressure)
            )
        except BadRecipe:  # the kinds under pressure cannot reach the budget alone
            return
        key = tuple(len(units) for units in keep.values())
        if key in tried:
            return
        tried.add(key)
        loss = loss_of(keep, math.inf if best is None else best[0])
        loss = math.inf if math.isnan(loss) else loss  # nothing is less than a NaN
        if best is None or loss < best[0]:
            kept = fractions_kept(keep, sites)
            best = loss, keep, pressure or {kind: 1.0 - share for kind, share in kept.items()}

    kinds = list(dict.fromkeys(site.kind for site in sites.values()))
    equal = equal_pressure(sites)
    starts = [None, equal] + [equal | {kind: 0.0} for kind in kinds if len(kinds) > 1 and equal[kind]]
    if "vocab" in kinds and len(kinds) > 1:  # most of its rows may go unused
        starts += [equal | {"vocab": 2.0}, equal | {"vocab": 4.0}]
    moves = [(kind, factor) for factor in FACTORS for kind in kinds]
    total = len(starts) + ROUNDS * len(moves)
    steps = iter(console.track(range(total), "allocating between kinds", total))
    for pressure in starts:
        next(steps)
        consider(pressure)
    if best is None:
        raise BadRecipe(f"expected a cut that meets the limit {amount(budget.limit, model.cost)}, found none.")
    for power in [1.0 / (i + 1) for i in range(ROUNDS)]:  # steps of 2, then 1.41
        for kind, factor in moves:
            next(steps)
            pressure = best[2]
            typical = max(pressure.values())
            start = pressure.get(kind, 0.0) or (0.1 * typical if factor > 1 else 0.0)
            consider(pressure | {kind: start * factor**power})
    list(steps)
    if recovered_loss_of is None:
        return best[1]

    def solved(pressure: dict[str, float]) -> tuple[Keep, dict[str, float]] | None:
        try:
            return solve_by_shares(scores, sites, model, budget, pressure), pressure
        except BadRecipe:
            return None

    return _after_recovery(recovered_loss_of, best[1:], solved, sites, model, console)


def _after_recovery(
    recovered_loss_of: Callable[[Keep], float],
    first: tuple[Keep, dict[str, float]],
    solved: Callable[[dict[str, float]], tuple[Keep, dict[str, float]] | None],
    sites: dict[str, Site],
    model: CostModel,
    console: Quiet,
) -> Keep:
    """The cut with the least loss after a short recovery, of at most `MOST_RECOVERED`.

    It starts from the first cut, or from equal shares of the kinds that this one cuts, and spares one kind at a time:
    every kind once, then the best of them again and again.

    Args:
        first: A cut and its pressures.
        solved: The cut, and its pressures, that meets the budget under some pressures, if one does.
    """
    losses: dict[tuple, float] = {}

    def recovered(cut: Keep) -> float:
        key = tuple(len(units) for units in cut.values())
        if key not in losses:
            losses[key] = recovered_loss_of(cut)
            shares = fractions_kept(present(cut, sites, model), sites)
            kept = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
            console.say(f"after a short recovery: loss {losses[key]:.4f} with {kept}")
        return losses[key]

    kinds = [kind for kind, share in fractions_kept(first[0], sites).items() if share < 1.0]
    if len(kinds) < 2:
        return first[0]
    equal = solved({kind: share if kind in kinds else 0.0 for kind, share in equal_pressure(sites).items()})
    best = min([first, equal] if equal else [first], key=lambda found: recovered(found[0]))
    while True:
        chosen, again = best, []
        for kind in kinds:
            spared = solved(best[1] | {kind: 0.5 * best[1].get(kind, 0.0)}) if len(losses) < MOST_RECOVERED else None
            if spared and recovered(spared[0]) < recovered(chosen[0]):
                chosen, again = spared, [kind]
        if chosen is best:
            return best[0]
        best, kinds = chosen, again


def _by_cost(scores: Scores, sites: dict[str, Site], model: CostModel, budget: Budget) -> Keep:
    """Score per cost; a vocabulary stays whole, because how often a token is used is no such score.

    Raises:
        BadRecipe: The other kinds cannot reach the budget alone.
    """
    whole = {name: tuple(range(site.n_units)) for name, site in sites.items() if site.kind == "vocab"}
    others = {name: site for name, site in sites.items() if name not in whole}
    least = least_cost(model, others, scope=budget.scope, round_to=budget.round_to, ties=budget.ties)
    if least > budget.limit:
        raise BadRecipe(f"cutting all but the vocabulary cannot go below {amount(least, model.cost)}: cut it too.")
    return solve_by_cost(scores, others, model, budget) | whole
