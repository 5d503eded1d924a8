"""The dry run: what can be cut, what a budget reaches and how the result will load, from the config alone."""

import copy
import os

import torch
from transformers import PreTrainedConfig

from ibprune.budget import least_cost, make_budget, solve_by_cost, solve_by_shares
from ibprune.cutting import choose_kinds, prepare_
from ibprune.errors import BadRecipe
from ibprune.export import tier_of
from ibprune.models import build_meta, find_source, load_config, model_class
from ibprune.plans import PruningPlan
from ibprune.recipe import make_recipe
from ibprune.shares import equal_pressure
from ibprune.surgery import compact_, named_rows


def plan(
    model: str | os.PathLike | PreTrainedConfig,
    budget: float = 1.0,
    *,
    cost: str = "params",
    scope: str = "model",
    kinds: tuple[str, ...] = (),
    round_to: int = 8,
) -> dict:
    """Predicts a pruned model without its weights: sizes, reach, loading way, and the groups.

    The prediction shares the cut equally between kinds; a run decides the shares by measuring, and
    meets the same budget. A config that names no architecture is planned as the base model.

    Raises:
        IBPruneError: An unknown model or kind, or a budget that cannot be reached.

    Example:
        >>> from transformers import BertConfig
        >>> plan(BertConfig(), 0.5)["dense"]["params"]
        109482240
    """
    named = model if isinstance(model, str | os.PathLike) else None
    recipe = make_recipe({"model": named or "config", "budget": budget, "cost": cost, "scope": scope, "kinds": kinds,
                          "round_to": round_to})  # fmt: skip
    cost, scope, kinds = recipe.cost, recipe.scope, recipe.kinds
    config = load_config(find_source(recipe.model)) if named else copy.deepcopy(model)
    skeleton = build_meta(config, model_class(config, classify=False))
    everything, sites, costs = prepare_(skeleton, choose_kinds(skeleton, kinds), None)
    named = sorted(named_rows(skeleton))  # what else a tokenizer needs, the config does not say
    sites = {name: site.at_least(len(named)) if name == "vocab" else site for name, site in sites.items()}
    cost_model = costs.of(cost)
    target = make_budget(cost_model, sites, keep=budget, scope=scope, round_to=round_to)
    scores = {name: torch.arange(site.n_units, 0.0, -1.0) for name, site in sites.items()}
    if "vocab" in sites:
        scores["vocab"][named] += sites["vocab"].n_units
    try:
        keep = solve_by_shares(scores, sites, cost_model, target, equal_pressure(sites))
    except BadRecipe:  # equal widths alone do not reach it: whole sub-layers go too
        keep = solve_by_cost(scores, sites, cost_model, target)
    keep = {name: keep.get(name, tuple(range(site.n_units))) for name, site in everything.items()}
    n_units = {name: site.n_units for name, site in everything.items()}
    compact_(skeleton, PruningPlan(config.model_type, n_units, keep))
    kept = {name: len(units) for name, units in keep.items()}
    full = cost_model.n_units
    dense_cost = cost_model(full, scope=scope)
    groups = {}
    for site in everything.values():
        group = groups.setdefault(
            site.kind, {"sites": 0, "units": 0, "min_units": 0, "cost_per_unit": 0, "cut": site.name in sites}
        )
        group["sites"] += 1
        group["units"] += site.n_units
        group["min_units"] += site.min_units
        group["cost_per_unit"] = max(group["cost_per_unit"], int(cost_model.unit_cost(full, site.name, scope=scope)))
    return {
        "model_type": config.model_type,
        "macs_length": costs.macs.length,
        "dense": {"params": costs.params(full), "macs": costs.macs(full)},
        "predicted": {"params": costs.params(kept), "macs": costs.macs(kept)},
        "budget": {
            "cost": cost,
            "scope": scope,
            "keep": budget,
            "limit": target.limit,
            "achieved": cost_model(kept, scope=scope),
        },
        "reachable_keep": least_cost(cost_model, sites, scope=scope, round_to=round_to) / dense_cost,
        "tier": tier_of(skeleton),
        "groups": groups,
    }
