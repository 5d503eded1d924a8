"""Sites that may only lose units together, and a solver's problem put in terms of what they lose at once."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ibprune.costs import CostModel
from ibprune.groups import Group, MaskAt, Site

Keep = dict[str, tuple[int, ...]]
Scores = Mapping[str, torch.Tensor]  # by site, (n_units,)


@dataclass(frozen=True)
class Tie:
    """Sites that one number speaks for.

    Attributes:
        site: Stands for them in the solver. Of n_units, it keeps c.
        members: Sites that then keep their best c / n_units.
        blocks: Instead of members: the sites of each of n_units blocks, of which the best c stay whole.
    """

    site: Site
    members: tuple[str, ...] = ()
    blocks: tuple[tuple[str, ...], ...] = ()


def tie_sites(name: str, sites: Iterable[Site], counts: tuple[int, ...]) -> Tie:
    """The tie of sites whose units stay in the ratio of the dense model.

    Args:
        counts: What it may keep, of the greatest common divisor of the sites' units.
    """
    members = tuple(sites)
    kind = "hidden" if any(site.kind == "hidden" for site in members) else members[0].kind
    return Tie(_stand_in(name, kind, counts), members=tuple(site.name for site in members))


def tie_blocks(name: str, blocks: Iterable[tuple[str, ...]]) -> Tie:
    """The tie of sub-layers that go by whole blocks; one block stays."""
    blocks = tuple(blocks)
    return Tie(_stand_in(name, "layers", tuple(range(1, len(blocks) + 1))), blocks=blocks)


def _stand_in(name: str, kind: str, counts: tuple[int, ...]) -> Site:
    group = Group(name, kind, (), MaskAt("none"), per_block=False, min_units=counts[0])
    return Site(name, group, "", (), group.mask_at, counts[-1], counts=counts)


def tied_names(tie: Tie) -> tuple[str, ...]:
    """The sites that a tie speaks for."""
    return tie.members + tuple(name for block in tie.blocks for name in block)


def tied_sites(ties: tuple[Tie, ...], sites: dict[str, Site]) -> dict[str, Site]:
    """The sites that are in no tie, and one for each tie."""
    tied = set(_places(ties))
    return {name: site for name, site in sites.items() if name not in tied} | {t.site.name: t.site for t in ties}


def tied_scores(ties: tuple[Tie, ...], scores: Scores) -> dict[str, torch.Tensor]:
    """The scores of `tied_sites`: the members' best units make the first unit of a tie, and so on."""
    tied = set(_places(ties))
    found = {name: score for name, score in scores.items() if name not in tied}
    for tie in ties:
        if tie.blocks:
            found[tie.site.name] = torch.stack([sum(scores[name].sum() for name in block) for block in tie.blocks])
        else:
            ranked = (scores[name].double().sort(descending=True).values for name in tie.members)
            found[tie.site.name] = sum(score.view(tie.site.n_units, -1).sum(1) for score in ranked)
    return found


def tied_costs(ties: tuple[Tie, ...], model: CostModel, sites: Iterable[str]) -> CostModel:
    """The same cost as a function of what the ties keep.

    Args:
        sites: Those to cut, by name; the others keep all their units.

    Raises:
        ValueError: Blocks of a tie differ in cost.
    """
    places, sites = _places(ties), set(sites)
    ratios = {name: model.n_units[name] // t.site.n_units for t in ties for name in t.members}
    block_of = {name: i for tie in ties for i, block in enumerate(tie.blocks) for name in block}
    parts: dict[int | None, Counter] = {None: Counter()} | {i: Counter() for i in block_of.values()}
    for term in model.terms:
        coefficient, left = term.coefficient, []
        for name in term.sites:
            coefficient *= ratios.get(name, 1) if name in sites else model.n_units[name]
            if name in sites and (name not in block_of or places[name] not in left):
                left.append(places.get(name, name))
        block = next((block_of[name] for name in term.sites if name in block_of), None)
        parts[block][replace(term, coefficient=1, sites=tuple(sorted(left)))] += coefficient
    one, *others = [part for block, part in parts.items() if block is not None] or [Counter()]
    if any(part != one for part in others):
        raise ValueError("blocks differ in cost")
    terms = tuple(replace(term, coefficient=value) for part in (parts[None], one) for term, value in part.items())
    n_units = {name: n for name, n in model.n_units.items() if name not in places}
    return replace(model, terms=terms, n_units=n_units | {tie.site.name: tie.site.n_units for tie in ties})


def untied(ties: tuple[Tie, ...], keep: Keep, scores: Scores) -> Keep:
    """What the sites themselves keep where `tied_sites` keep this: of members the best units."""
    found = {name: units for name, units in keep.items() if name not in {tie.site.name for tie in ties}}
    for tie in ties:
        kept = keep[tie.site.name]
        for i, block in enumerate(tie.blocks):
            found |= {name: (0,) if i in kept else () for name in block}
        for name in tie.members:
            best = torch.argsort(-scores[name].double(), stable=True)
            found[name] = tuple(sorted(best[: len(kept) * len(best) // tie.site.n_units].tolist()))
    return found


def _places(ties: tuple[Tie, ...]) -> dict[str, str]:
    """The name of the tie of each tied site."""
    found = {name: tie.site.name for tie in ties for name in tie.members}
    return found | {name: tie.site.name for tie in ties for block in tie.blocks for name in block}
