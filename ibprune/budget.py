"""The budget solver: from scores and a cost model to the units that stay, never above the limit."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ibprune.costs import CostModel, amount
from ibprune.errors import BadRecipe
from ibprune.groups import Site
from ibprune.ties import Keep, Scores, Tie, tied_costs, tied_names, tied_scores, tied_sites, untied

WIDTH_KINDS = ("ffn", "hidden", "embedding_rank", "vocab", "channels")
WIDE = 128  # features from which on a width is rounded, where it has two steps
FAR = 4.0  # times the pressures of an earlier plan: enough for a ranking that changed


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost.

    Attributes:
        cost: "params", "macs", "memory" or "latency".
        keep: Share of the dense cost that may stay, in (0, 1].
        scope: "model" counts everything, "blocks" leaves embeddings and heads out, as papers do.
        limit: The same in the unit of the cost.
        round_to: Widths (FFN, hidden, rank, vocabulary, channels) of at least 16 such steps, or of two steps and 128
            features, become multiples of it.
        ties: Sites that lose units together only.
    """

    cost: str
    keep: float
    scope: str
    limit: int
    round_to: int = 1
    ties: tuple[Tie, ...] = ()


def make_budget(
    model: CostModel, sites: dict[str, Site], *, keep: float, scope: str, round_to: int, ties: tuple[Tie, ...] = ()
) -> Budget:
    """The budget for a share of the dense cost.

    Raises:
        BadRecipe: `keep` lies outside (0, 1] or below what the sites can reach.
    """
    if not 0 < keep <= 1:
        raise BadRecipe(f"expected a budget in (0, 1], found {keep}: the share of the dense {model.cost} to keep.")
    full = {name: site.n_units for name, site in sites.items()}
    dense = model.of_dense(scope=scope)
    limit = int(keep * dense + 1e-9)
    reachable = least_cost(model, sites, scope=scope, round_to=round_to, ties=ties)
    if limit < reachable:
        share = np.ceil(reachable / dense * 1e4) / 1e4
        more = "cut more kinds, or leave out --vanilla" if ties else "or cut more kinds"
        if full and share >= 1:
            raise BadRecipe(f"the budget {keep:g} cannot be met: cutting {_kinds(sites)} saves no {model.cost} here.")
        raise BadRecipe(
            f"the budget {keep:g} allows {amount(limit, model.cost)}, but cutting {_kinds(sites)} cannot go below "
            f"{amount(reachable, model.cost)}: ask for at least {share:g}, {more}."
            if full
            else f"expected at least one kind to cut for the budget {keep:g}, found none."
        )
    return Budget(model.cost, keep, scope, limit, round_to, ties)


def least_cost(
    model: CostModel, sites: dict[str, Site], *, scope: str, round_to: int, ties: tuple[Tie, ...] = ()
) -> int:
    """The smallest cost the sites can reach; sites that are not given keep everything."""
    if ties:
        return least_cost(tied_costs(ties, model, sites), tied_sites(ties, sites), scope=scope, round_to=round_to)
    kept = dict(model.n_units)
    kept |= {name: site.min_units for name, site in sites.items()}
    kept |= {n: allowed_width(s.min_units, s, round_to, up=True) for n, s in sites.items() if s.kind in WIDTH_KINDS}
    return min(model(kept, scope=scope), model(model.n_units, scope=scope))


def solve_by_cost(scores: Scores, sites: dict[str, Site], model: CostModel, budget: Budget) -> Keep:
    """Cuts the units with the least score per cost, all kinds together, costs recomputed as others go.

    With scores = gate Fisher information this is the ranking that a converged VIB mask with
    beta proportional to cost would give (one division by cost, here and nowhere else).
    """
    if budget.ties:
        return _solve_tied(solve_by_cost, scores, sites, model, budget)
    table = _CostTable(model, budget.scope)
    order = {name: np.argsort(_array(scores[name]), kind="stable") for name in sites}
    ranked = {name: np.sort(_array(scores[name])) for name in sites}
    kept = np.array([model.n_units[name] for name in table.names])
    spots = [table.names.index(name) for name in sites]
    kept[spots] = [np.count_nonzero(ranked[name] > -np.inf) for name in sites]
    total = table.total(kept)
    while total > budget.limit:
        unit_costs = table.unit_costs(kept)
        best, best_ratio, best_count = -1, np.inf, 0
        for spot in spots:
            site = sites[table.names[spot]]
            lower = allowed_width(int(kept[spot]) - 1, site, budget.round_to)
            if lower < site.min_units or lower >= kept[spot] or unit_costs[spot] <= 0:
                continue
            removed = site.n_units - kept[spot]
            step = int(kept[spot]) - lower
            ratio = ranked[site.name][removed : removed + step].sum() / (step * unit_costs[spot])
            if ratio < best_ratio:
                best, best_ratio, best_count = spot, ratio, lower
        kept[best] = best_count
        total = table.total(kept)
    keep = {
        name: tuple(sorted(order[name][sites[name].n_units - kept[table.names.index(name)] :].tolist()))
        for name in sites
    }
    return fill(keep, scores, sites, model, budget)


def solve_by_shares(
    scores: Scores,
    sites: dict[str, Site],
    model: CostModel,
    budget: Budget,
    pressure: Mapping[str, float],
    *,
    effective: bool = False,
) -> Keep:
    """Keeps the best units within each kind; kind k keeps the fraction exp(-t * pressure[k]).

    One t for all kinds is found by bisection so that the budget is met. Kinds that `pressure` does
    not name, or names with 0, keep everything. Equal shares are pressure 1 for every kind but "layers".

    Args:
        effective: Whether the pressures are those of an earlier plan (`effective_fractions`), and its widths come back
            however the units rank now: those inside sub-layers that go count for nothing, no more of these go, where
            the budget can be met so, and counts and widths are rounded to the nearest. Else what such units take of a
            share is lost, and what rounding down takes, and left for all kinds to fill.

    Raises:
        BadRecipe: The kinds under pressure cannot reach the budget by themselves.
    """
    if budget.ties:
        pressed = _tied_pressure(budget.ties, sites, pressure)
        return _solve_tied(solve_by_shares, scores, sites, model, budget, pressed, effective=effective)
    keep = keep_within(scores, sites, model, budget, pressure, effective=effective)
    if _cost(keep, model, budget) > budget.limit:
        raise BadRecipe(
            f"cutting {', '.join(kind for kind, p in pressure.items() if p > 0)} alone leaves "
            f"{amount(_cost(keep, model, budget), model.cost)}, above the limit {amount(budget.limit, model.cost)}: "
            "use --shares probe."
        )
    return fill(keep, scores, sites, model, budget)


def keep_within(
    scores: Scores,
    sites: dict[str, Site],
    model: CostModel,
    budget: Budget,
    pressure: Mapping[str, float],
    *,
    effective: bool = False,
    halvings: int = 60,
) -> Keep:
    """The fractions of `solve_by_shares` for one budget; above its limit where the pressed kinds cannot reach it.

    Args:
        effective: As there.
        halvings: How often the interval of t is halved.
    """
    if budget.ties:
        pressed = _tied_pressure(budget.ties, sites, pressure)
        return _solve_tied(keep_within, scores, sites, model, budget, pressed, effective=effective, halvings=halvings)
    layers = [name for name, site in sites.items() if site.kind == "layers" and site.block] if effective else []
    pools = {name: pool_of(site) if effective else site.kind for name, site in sites.items()}
    ranking = Ranking(scores, sites, {name: _inner_sites(model, sites, name) for name in layers}, pools)

    def keep_at(t: float, deepest: float) -> Keep:
        deep = {pool: min(t, deepest) if of[0].kind == "layers" else t for pool, of in ranking.pools.items()}
        fractions = {pool: float(np.exp(-t * pressure.get(pool, 0.0))) for pool, t in deep.items()}
        return ranking.keep(fractions, budget.round_to, nearest=effective)

    low, high = 0.0, 20.0 / min([value for value in pressure.values() if value > 0], default=1.0)
    if _cost(keep_at(low, math.inf), model, budget) <= budget.limit:
        return keep_at(low, math.inf)
    # The earlier plan is at t = 1. A sub-layer more than it cut would leave so much that all kinds got other shares: so
    # first no more of these go, then more of them, and only then what it kept whole, under next to no pressure.
    near = [(0.0, FAR, 1.0), (1.0, FAR, math.inf)] if effective and FAR < high else []
    for start, end, deepest in near:
        if _cost(keep_at(end, deepest), model, budget) <= budget.limit:
            low, high = start, end
            break
    else:
        low, deepest = (FAR if near else 0.0), math.inf
    for _ in range(halvings):
        middle = math.sqrt(low * high) if near and high > FAR else (low + high) / 2
        below = _cost(keep_at(middle, deepest), model, budget) <= budget.limit
        low, high = (low, middle) if below else (middle, high)
    return keep_at(high, deepest)


def _solve_tied(
    solve: Callable[..., Keep], scores: Scores, sites: dict[str, Site], model: CostModel, budget: Budget,
    *more: object, **options: object,
) -> Keep:  # fmt: skip
    """What a solver finds in terms of the budget's ties, for the sites themselves."""
    ties = budget.ties
    known = {name: scores[name] for name in sites}
    found = solve(
        tied_scores(ties, known), tied_sites(ties, sites), tied_costs(ties, model, sites), replace(budget, ties=()),
        *more, **options,
    )  # fmt: skip
    return untied(ties, found, known)


def _tied_pressure(ties: tuple[Tie, ...], sites: dict[str, Site], pressure: Mapping[str, float]) -> Mapping[str, float]:
    """The pressures with those on the ties that have pools of their own: what is tied has one share."""
    pools = {tie.site.name: pool_of(sites[tied_names(tie)[0]]) for tie in ties}
    return {**pressure, **{name: pressure[pool] for name, pool in pools.items() if pool in pressure}}


def fractions_kept(keep: Keep, sites: dict[str, Site]) -> dict[str, float]:
    """Kept share of the units of each kind."""
    return _fractions({name: len(units) for name, units in keep.items()}, sites, lambda site: site.kind)


def effective_fractions(keep: Keep, sites: dict[str, Site], model: CostModel) -> dict[str, float]:
    """Kept share of the units of each pool (`pool_of`), of a plan whose shares are to come back (`solve_by_shares`)."""
    return _fractions({name: len(units) for name, units in present(keep, sites, model).items()}, sites, pool_of)


def present(keep: Keep, sites: dict[str, Site], model: CostModel) -> Keep:
    """The units of a plan that are in the model: none inside sub-layers that go, whatever a plan lists of these.

    A plan lists as many as their floors say, or as all layers keep alike.
    """
    found = dict(keep)
    for layer, site in sites.items():
        if site.kind == "layers" and site.block and not keep[layer]:
            found |= {name: () for name in _inner_sites(model, sites, layer)}
    return found


def _fractions(kept: Mapping[str, int], sites: dict[str, Site], pool: Callable[[Site], str]) -> dict[str, float]:
    total: dict[str, list[int]] = {}
    for name, site in sites.items():
        counts = total.setdefault(pool(site), [0, 0])
        counts[0] += kept[name]
        counts[1] += site.n_units
    return {name: kept / units for name, (kept, units) in total.items()}


def pool_of(site: Site) -> str:
    """Whose units are ranked together where an earlier plan says how many stay: those of a kind, if they are alike.

    The residual stream and what else has a width of its own (a pooler, a task's head) are one kind, "hidden", and have
    a share each, and so have sub-layers of attention and of FFNs. One of these costs many times another, so that a few
    that change places would take steps of width from all else, or leave more FFN units than the FFNs that stay have.
    """
    return site.name if site.kind == "hidden" else site.group.name if site.kind == "layers" else site.kind


class Ranking:
    """The units of each pool in one order over all its sites, best first, floors in front.

    Args:
        inside: The sites inside each sub-layer, of which none but the floors stay when it goes.
        pools: The pool of each site, such as its kind.
    """

    def __init__(
        self, scores: Scores, sites: dict[str, Site], inside: Mapping[str, list[str]], pools: Mapping[str, str]
    ):
        self.sites, self.inside = sites, inside
        self.pools: dict[str, list[Site]] = {}
        for name, site in sites.items():
            self.pools.setdefault(pools[name], []).append(site)
        self.order: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # site, unit, and whether it may stay
        for pool, members in self.pools.items():
            values, owner, unit = [], [], []
            for i, site in enumerate(members):
                score = _array(scores[site.name]).copy()
                score[np.argsort(-score, kind="stable")[: site.min_units]] = np.inf
                values.append(score)
                owner.append(np.full(site.n_units, i))
                unit.append(np.arange(site.n_units))
            values = np.concatenate(values)
            best = np.argsort(-values, kind="stable")
            self.order[pool] = np.concatenate(owner)[best], np.concatenate(unit)[best], values[best] > -np.inf

    def keep(self, fractions: Mapping[str, float], round_to: int = 1, *, nearest: bool = False) -> Keep:
        """The best `fractions[pool]` of the units of each pool; counts and widths rounded down, or to the nearest."""
        keep: Keep = {}
        gone: set[str] = set()
        for pool in sorted(self.pools, key=lambda pool: self.pools[pool][0].kind != "layers"):
            members, (owner, unit, may_stay) = self.pools[pool], self.order[pool]
            lost = np.array([site.name in gone for site in members])[owner]
            total = int(fractions[pool] * len(owner) + (0.5 if nearest else 1e-9))
            total = max(sum(site.min_units for site in members if site.name not in gone), total)
            chosen = np.bincount(owner[np.flatnonzero(may_stay & ~lost)[:total]], minlength=len(members))
            for i, site in enumerate(members):
                units = unit[(owner == i) & (may_stay | (site.name in gone))]
                width = max(allowed_width(int(chosen[i]), site, round_to), site.min_units)
                if nearest:
                    above = allowed_width(int(chosen[i]), site, round_to, up=True)
                    width = above if above - chosen[i] <= chosen[i] - width and above <= len(units) else width
                if site.name in gone:
                    width = site.min_units
                keep[site.name] = tuple(sorted(units[:width].tolist()))
            if members[0].kind == "layers":
                gone |= {name for site in members if not keep[site.name] for name in self.inside.get(site.name, ())}
        return {name: keep[name] for name in self.sites}


def fill(keep: Keep, scores: Scores, sites: dict[str, Site], model: CostModel, budget: Budget) -> Keep:
    """Gives what is left under the limit back, to the best units that still fit, one step at a time.

    A sub-layer that was cut comes back last, at its least width, and then grows like the others.
    """
    may_stay = {name: _array(scores[name]) > -np.inf for name in sites}
    keep = _drop_useless_rank(dict(keep), {n: s for n, s in sites.items() if may_stay[n].all()}, model, budget)
    table = _CostTable(model, budget.scope)
    spot = {name: i for i, name in enumerate(table.names)}
    order = {name: np.argsort(-_array(scores[name]), kind="stable") for name in sites}
    rank = {name: np.argsort(order[name]) / sites[name].n_units for name in sites}
    layers = [name for name, site in sites.items() if site.kind == "layers" and site.block]
    inside = {name: _inner_sites(model, sites, name) for name in layers}
    dormant = {inner for name, inners in inside.items() if not keep[name] for inner in inners}
    for name in dormant:
        least = allowed_width(sites[name].min_units, sites[name], budget.round_to, up=True)
        keep[name] = tuple(sorted(order[name][:least].tolist()))
    kept = np.array([len(keep[name]) if name in keep else model.n_units[name] for name in table.names])
    left = {n: order[n][~np.isin(order[n], keep[n]) & may_stay[n][order[n]]].tolist() for n in sites}
    closed: set[str] = set()
    while True:
        best = None
        for name, site in sites.items():
            if name in closed or name in dormant or name in inside or not left[name]:
                continue
            step = allowed_width(len(keep[name]) + 1, site, budget.round_to, up=True) - len(keep[name])
            if step > len(left[name]):
                closed.add(name)
                continue
            trial = kept.copy()
            trial[spot[name]] += step
            if table.total(trial) > budget.limit:
                closed.add(name)  # costs only grow as units come back
                continue
            new = left[name][:step]
            if best is None or rank[name][new[0]] < best[0]:
                best = rank[name][new[0]], name, trial, new
        if best is None:
            for name in sorted(
                (n for n in inside if not keep[n] and may_stay[n].all()), key=lambda n: -float(scores[n])
            ):
                trial = kept.copy()
                trial[spot[name]] = 1
                if table.total(trial) <= budget.limit:
                    best = 0.0, name, trial, [0]
                    dormant -= set(inside[name])
                    break
        if best is None:
            whole = _drop_useless_rank(keep, {n: s for n, s in sites.items() if may_stay[n].all()}, model, budget)
            return keep if whole == keep else fill(whole, scores, sites, model, budget)
        _, name, kept, new = best
        keep[name] = tuple(sorted({*keep[name], *new}))
        left[name] = left[name][len(new) :]


def _inner_sites(model: CostModel, sites: dict[str, Site], layer: str) -> list[str]:
    """Sites whose units live inside a sub-layer: their every cost goes when it goes."""
    return [
        name
        for name, site in sites.items()
        if site.block == sites[layer].block
        and site.kind != "layers"
        and all(layer in term.sites for term in model.terms if name in term.sites)
    ]


def _drop_useless_rank(keep: Keep, sites: dict[str, Site], model: CostModel, budget: Budget) -> Keep:
    """A rank so high that the factors outweigh the matrix is given up: all directions stay, as one matrix."""
    for name, site in sites.items():
        if site.kind == "embedding_rank" and len(keep[name]) < site.n_units:
            full = keep | {name: tuple(range(site.n_units))}
            if _cost(full, model, budget) <= _cost(keep, model, budget):
                return full
    return keep


class _CostTable:
    """The cost model as arrays, for solvers that evaluate it thousands of times."""

    def __init__(self, model: CostModel, scope: str):
        self.names = list(model.n_units)
        spot = {name: i for i, name in enumerate(self.names)}
        terms = [term for term in model.terms if scope == "model" or term.in_blocks]
        self.n_units = np.array([model.n_units[name] for name in self.names])
        self.coefficient = np.array([term.coefficient for term in terms], dtype=np.float64)
        width = max([len(term.sites) for term in terms], default=0)
        padding = len(self.names)  # a site that always keeps one unit
        self.sites = np.array(
            [[spot[s] for s in term.sites] + [padding] * (width - len(term.sites)) for term in terms], dtype=np.int64
        ).reshape(len(terms), width)
        self.rank = next((spot[term.rank] for term in terms if term.rank), -1)
        self.when = np.array([0 if not term.rank else 2 if term.dense else 1 for term in terms])

    def _values(self, kept: np.ndarray) -> np.ndarray:
        padded = np.append(kept, 1).astype(np.float64)
        values = self.coefficient * padded[self.sites].prod(axis=1)
        if self.rank >= 0:
            full = kept[self.rank] >= self.n_units[self.rank]
            values = np.where(self.when == (1 if full else 2), 0.0, values)
        return values

    def total(self, kept: np.ndarray) -> float:
        return float(self._values(kept).sum())

    def unit_costs(self, kept: np.ndarray) -> np.ndarray:
        """Cost per unit of each site as things stand; a rank in its factored form."""
        active = kept
        if self.rank >= 0 and kept[self.rank] >= self.n_units[self.rank]:
            active = kept.copy()
            active[self.rank] -= 1
        values = self._values(active)
        padded = np.append(active, 1).astype(np.float64)
        per_unit = values[:, None] / np.maximum(padded[self.sites], 1)
        return np.bincount(self.sites.ravel(), weights=per_unit.ravel(), minlength=len(padded))[:-1]


def allowed_width(count: int, site: Site, round_to: int, *, up: bool = False) -> int:
    """The nearest permitted count at or below (or above) `count`; the dense width is always permitted."""
    if site.counts:
        place = bisect_left(site.counts, count) if up else bisect_right(site.counts, count) - 1
        return site.counts[max(0, min(place, len(site.counts) - 1))]
    wide = site.kind in WIDTH_KINDS and site.n_units >= min(16 * round_to, max(WIDE, 2 * round_to))
    step = round_to if wide else 1
    if count >= site.n_units:
        return site.n_units
    rounded = (count + step - 1) // step * step if up else count // step * step
    return min(max(rounded, min(step, site.n_units) if site.min_units else 0), site.n_units)


def _cost(keep: Keep, model: CostModel, budget: Budget) -> int:
    return model(model.n_units | {name: len(units) for name, units in keep.items()}, scope=budget.scope)


def _array(score: torch.Tensor) -> np.ndarray:
    return score.detach().cpu().double().numpy()


def _kinds(sites: dict[str, Site]) -> str:
    return ", ".join(dict.fromkeys(site.kind for site in sites.values()))
