"""What a recipe can cut of a model, found without its weights: for plans, and before a run trains anything."""

import copy

import torch
from transformers import PreTrainedModel

from ibprune.activations import check_read_linearly
from ibprune.budget import Budget, Keep, Scores, make_budget, solve_by_cost, solve_by_shares
from ibprune.channels import Found
from ibprune.errors import BadRecipe
from ibprune.feeding import Feed
from ibprune.models import Loaded, build_model
from ibprune.quantised import bits
from ibprune.recipe import Recipe
from ibprune.rotation import any_axes
from ibprune.shares import equal_pressure
from ibprune.structure import Structure, budgeted, check_vocab, choose_kinds, prepare_, prepare_traced_
from ibprune.surgery import compact_traced_
from ibprune.taps import readers
from ibprune.vanilla import plain_structure


def prepare_skeleton_(
    skeleton: PreTrainedModel, recipe: Recipe, dtype: torch.dtype
) -> tuple[Structure, dict[str, str]]:
    """What a recipe cuts of a transformer on the device "meta", and why a kind stays whole for plain transformers.

    For a latency, which only a run measures, nothing is tied: how plain transformers loads it is found there.

    Args:
        dtype: Of the checkpoint.

    Raises:
        BadRecipe: A kind that the model has not, or that must stay whole.
        UnsupportedModel: A residual stream that cannot be turned, as far as the modules tell.
    """
    kinds = choose_kinds(skeleton, recipe.kinds, cost=recipe.cost, vanilla=recipe.vanilla, rotate=recipe.rotate,
                         quantised=bool(bits(recipe)))  # fmt: skip
    structure = prepare_(skeleton, kinds, None, axes=any_axes(skeleton) if recipe.rotate else None)
    structure = budgeted(structure, skeleton, recipe, dtype)
    if not recipe.vanilla or recipe.cost == "latency":
        return structure, {}
    return plain_structure(
        skeleton, structure, structure.costs.of(recipe.cost), round_to=recipe.round_to,
        kinds=kinds if recipe.kinds else (),
    )  # fmt: skip


def equal_keep(structure: Structure, target: Budget, scores: Scores) -> Keep:
    """The units that stay where all kinds give equal shares; where that does not reach the budget, sub-layers go too.

    Raises:
        BadRecipe: The budget cannot be reached.
    """
    cost_model = structure.costs.of(target.cost)
    try:
        keep = solve_by_shares(scores, structure.sites, cost_model, target, equal_pressure(structure.sites))
    except BadRecipe:
        keep = solve_by_cost(scores, structure.sites, cost_model, target)
    return {name: keep.get(name, tuple(range(site.n_units))) for name, site in structure.everything.items()}


def check_cut(recipe: Recipe, loaded: Loaded, feed: Feed, found: Found | None) -> None:
    """Raises `BadRecipe` where a recipe's budget or score cannot be had of a model, before anything is trained.

    What a latency can be, and what a vocabulary needs of the texts, is known only when they were measured.

    Args:
        found: The channels of a CNN.
    """
    model = loaded.model
    if found is not None:
        skeleton = copy.deepcopy(model)
        structure = prepare_traced_(skeleton, found.sites, feed.example()["pixel_values"], compact_traced_)
        structure = budgeted(structure, skeleton, recipe, loaded.dtype)
    else:
        skeleton = build_model(model.config, type(model), device="meta")
        structure, _ = prepare_skeleton_(skeleton, recipe, loaded.dtype)
    if recipe.score == "flap":
        check_read_linearly(skeleton, structure.sites)
    if recipe.reconstruct and not any(readers(skeleton, site) for site in structure.sites.values()):
        cut = ", ".join(dict.fromkeys(site.kind for site in structure.sites.values()))
        raise BadRecipe(
            f"--reconstruct refits what reads heads, FFN units or channels: of {cut}, nothing can be refitted."
        )
    if "vocab" in structure.sites:
        check_vocab(structure.costs.of(recipe.cost), recipe)
    if recipe.cost != "latency" and recipe.budget is not None:
        least = min(recipe.budget) if isinstance(recipe.budget, tuple) else recipe.budget
        make_budget(structure.costs.of(recipe.cost), structure.sites, keep=least, scope=recipe.scope,
                    round_to=recipe.round_to, ties=structure.ties)  # fmt: skip
