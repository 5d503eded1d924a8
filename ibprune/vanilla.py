"""What can be cut of a transformer so that plain transformers loads the result without any code."""

import copy
import math
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ibprune.budget import allowed_width
from ibprune.costs import CostModel
from ibprune.errors import BadRecipe, PlanMismatch
from ibprune.folders import tier_of
from ibprune.groups import Family, Site
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, is_counted
from ibprune.structure import Structure
from ibprune.ties import Tie, tie_blocks, tie_sites, tied_costs

TIED = "tied widths"


def plain_structure(
    model: PreTrainedModel,
    structure: Structure,
    cost_model: CostModel,
    *,
    kinds: tuple[str, ...] = (),
    round_to: int,
) -> tuple[Structure, dict[str, str]]:
    """The structure with only those cuts that a config of plain transformers can say, and the ties between them.

    All sites that one key of the config speaks for keep equally many units; widths that follow from each other keep
    the dense ratio; of the sub-layers, whole blocks go. Each of these is tried on a copy without weights: what
    transformers does not build the same stays whole.

    Args:
        cost_model: Of the budget, over all sites.
        kinds: That the user named.
        round_to: Of the budget.

    Returns:
        The structure, whose `compact` refuses other plans, and why a kind of `structure.sites` stays whole.

    Raises:
        BadRecipe: A kind that the user named would stay whole, or all would.
    """
    family = find_family(model.config.model_type)
    vocab = {name: site for name, site in structure.sites.items() if site.kind == "vocab"}
    reasons, ties, cut = {}, [], set(vocab)
    for tie, reason in _widths(family, model, structure, round_to):
        if not reason and not _loads(model, structure, tie):
            reason = "plain transformers builds no model in which it is narrower"
        reasons |= {structure.sites[name].kind: reason for name in tie.members if reason and name in structure.sites}
        ties += [] if reason else [tie]
        cut |= set() if reason else set(tie.members)
    blocks = {site.block: () for site in structure.sites.values() if site.kind == "layers"}
    for name, site in structure.sites.items():
        if site.kind == "layers":
            blocks[site.block] += (name,)
    if blocks:
        tie = tie_blocks("blocks", blocks.values())
        inside = {name for block in tie.blocks for name in block}
        reason = _why_blocks_stay(model, structure, (*ties, tie), cost_model, cut | inside)
        reasons |= {"layers": reason} if reason else {}
        ties += [] if reason else [tie]
        cut |= set() if reason else inside
    sites = {name: site for name, site in structure.sites.items() if name in cut}
    whole = {kind: reason for kind, reason in reasons.items() if kind not in {s.kind for s in sites.values()}}
    model_type = model.config.model_type
    for kind in kinds:
        if kind in whole:
            raise BadRecipe(f"--vanilla: '{kind}' of '{model_type}' must stay whole: {whole[kind]}.")
    if not sites:
        found = "; ".join(f"{kind}: {reason}" for kind, reason in whole.items())
        raise BadRecipe(f"--vanilla: nothing of this '{model_type}' can be cut: {found}.")

    def compact(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
        small = structure.compact(model, plan)
        if tier_of(small) != "vanilla":
            raise PlanMismatch(
                f"--vanilla: expected a plan that plain transformers builds of '{model_type}', found one that it does "
                "not: choose another budget, or leave out --vanilla."
            )
        return small

    return replace(structure, sites=sites, compact=compact, ties=tuple(ties)), whole


def _widths(family: Family, model: PreTrainedModel, structure: Structure, round_to: int) -> list[tuple[Tie, str]]:
    """The ties of all units within sub-layers and of the whole model, each with a reason why it stays whole, or ""."""
    classes: dict[str, list[Site]] = {}
    for site in structure.everything.values():
        if site.kind not in ("layers", "vocab"):
            classes.setdefault(_class_of(family, site), []).append(site)
    found = []
    for name, sites in classes.items():
        if not any(site.name in structure.sites for site in sites):
            continue
        left = ", ".join(dict.fromkeys(site.kind for site in sites if site.name not in structure.sites))
        counts = _counts(family, model, sites, round_to)
        reason = f"without code its size follows that of '{left}', which is not cut" if left else ""
        if not reason and len(counts) < 2:
            reason = "its units cannot go evenly"
        found.append((tie_sites(name, sites, counts), reason))
    return found


def _why_blocks_stay(
    model: PreTrainedModel, structure: Structure, ties: tuple[Tie, ...], cost_model: CostModel, sites: set[str]
) -> str:
    """Why no block can go, or "".

    Args:
        ties: All that there would be, the blocks' last.
        sites: All that would be cut.
    """
    if len(ties[-1].blocks) < 2:
        return "there is but one block"
    try:
        tied_costs(ties, cost_model, sites)
    except ValueError:
        return "blocks differ in cost, so that a number of them says too little"
    return "" if _loads(model, structure, ties[-1]) else "what is left of a removed block has no place in the config"


def _class_of(family: Family, site: Site) -> str:
    """The name of what speaks for a site: a tie of the family, a key of the config, or the site alone."""
    if site.name.rpartition(".")[2] in family.ties:
        return TIED
    return next((name for name in family.config_keys if is_counted(site, name)), site.group.name)


def _counts(family: Family, model: PreTrainedModel, sites: list[Site], round_to: int) -> tuple[int, ...]:
    """What sites in one ratio may keep of the greatest common divisor of their units, ascending."""
    n_units = math.gcd(*(site.n_units for site in sites))
    steps = {site: site.n_units // n_units for site in sites}
    heads = getattr(model.config, "num_attention_heads", 1) if family.divided else 1

    def fits(count: int, site: Site) -> bool:
        kept = count * steps[site]
        if family.divided and site.kind == "kv_groups" and site.n_units % kept:
            return False
        if site.name == "hidden" and (kept % heads or kept == 1):  # a table one wide no longer shows which axis it is
            return False
        return kept >= site.min_units and allowed_width(kept, site, round_to) == kept

    return tuple(count for count in range(1, n_units + 1) if all(fits(count, site) for site in sites))


def _loads(model: PreTrainedModel, structure: Structure, tie: Tie) -> bool:
    """Whether plain transformers builds the model with the most, some and the least that a tie cuts."""
    counts = tie.site.counts
    return all(_loads_at(model, structure, tie, count) for count in {counts[-2], counts[len(counts) // 2], counts[0]})


def _loads_at(model: PreTrainedModel, structure: Structure, tie: Tie, count: int) -> bool:
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    everything = structure.everything
    keep = {name: tuple(range(everything[name].n_units * count // tie.site.n_units)) for name in tie.members}
    keep |= {name: () for block in tie.blocks[count:] for name in block}
    return tier_of(structure.compact(skeleton, structure.plan(skeleton, keep))) == "vanilla"
