"""The dry run: what can be cut, what a budget reaches and how the result will load, from the config alone."""

import copy
import os
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ibprune.budget import fractions_kept, least_cost, make_budget, present
from ibprune.channels import find_channels
from ibprune.costs import FEMTOSECONDS_PER_MS
from ibprune.embeddings import named_rows
from ibprune.errors import BadRecipe
from ibprune.examples import image_shape
from ibprune.feeding import tokens_read
from ibprune.folders import tier_of
from ibprune.groups import Site
from ibprune.images import input_shape
from ibprune.latency import read_latency
from ibprune.models import build_model, find_source, load_config, load_processor, model_class, stored_dtype
from ibprune.names import WRITES
from ibprune.recipe import Recipe, make_recipe
from ibprune.sites import is_traced
from ibprune.skeletons import equal_keep, prepare_skeleton_
from ibprune.structure import LOOKED_UP, Costs, Structure, budgeted, check_cnn, check_vocab, prepare_traced_
from ibprune.surgery import compact_traced_
from ibprune.task_heads import keeps_cache
from ibprune.ties import tied_names


def plan(
    model: str | os.PathLike | PreTrainedConfig,
    budget: float | tuple[float, ...] | str = 1.0,
    *,
    cost: str = "params",
    scope: str = "model",
    kinds: tuple[str, ...] = (),
    round_to: int = 8,
    vanilla: bool = False,
    rotate: bool = False,
    image_size: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    latency_table: str | os.PathLike | None = None,
) -> dict:
    """Predicts a pruned model without its weights: sizes, reach, loading way, and the groups.

    The prediction shares the cut equally between kinds; a run decides the shares by measuring, and
    meets the same budget. A config that names no architecture is planned as the base model; a CNN is planned as
    a classifier that reads pictures of `image_size`, else of the size in its image processor or config, else 224.
    With `vanilla`, the result says under "whole" which kinds cannot be cut for plain transformers, and why. With
    `rotate`, a stream behind LayerNorms is refused here; what only weights show (as in Gemma 2), in a run alone.

    Args:
        budget: A share of the dense cost, or several, also as text ("0.5,0.3", "0.1..0.9"). Then the result has under
            "budgets" what one share gives at its top ("budget", "predicted", "kept", "tier") once for each, the
            largest first; those below what can be reached have "keep" and "unreachable", the reason.
        latency_table: A latency.json of a run on this model, of whatever device and size of input: "dense" and
            "predicted" then say "latency_ms" too, and "latency" what these hold for. The cost "latency" needs one.

    Under "groups" the result says of each kind which share of the dense cost bears its units ("owns": parameters that
    two kinds of units multiply count for both), and the least share that is left when it is cut alone ("alone").

    Of the cost "memory", `batch_size` and `max_length` say how many sequences of how many tokens a key-value cache
    holds, by default those of a run. A model that a run loads in 4 or 8 bits keeps the directions of its embedding.

    Raises:
        IBPruneError: An unknown model or kind, or no budget that can be reached.

    Example:
        >>> from transformers import BertConfig
        >>> plan(BertConfig(), 0.5)["dense"]["params"]
        109482240
    """
    named = model if isinstance(model, str | os.PathLike) else None
    if named is None and not isinstance(model, PreTrainedConfig):
        raise BadRecipe(f"expected a model folder, a Hub id, an alias or a config, found a {type(model).__name__}.")
    recipe = make_recipe({"model": named or "config", "budget": budget, "cost": cost, "scope": scope, "kinds": kinds,
                          "round_to": round_to, "vanilla": vanilla, "rotate": rotate,
                          "image_size": image_size, "max_length": max_length,
                          "load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit,
                          **({} if batch_size is None else {"batch_size": batch_size})})  # fmt: skip
    cost, scope = recipe.cost, recipe.scope
    if cost == "latency" and latency_table is None:
        raise BadRecipe("--cost: a latency is measured in the run itself: plan with params or macs, or with the "
                        "latency.json that a run left (--latency-table).")  # fmt: skip
    if cost == "latency" and vanilla:
        raise BadRecipe("--vanilla: which widths go together under a latency is found in the run: leave one out.")
    if cost != "memory" and (batch_size or max_length):
        raise BadRecipe("expected --cost memory beside --batch-size and --max-length, which size the key-value cache.")
    source = find_source(recipe.model) if named else None
    config = load_config(source) if source else copy.deepcopy(model)
    cls, dtype = model_class(config, classify=False), stored_dtype(config)
    shape, refused, whole = None, {}, {}
    if is_traced(config.model_type):
        check_cnn(recipe, config.model_type)
        shape = input_shape(config, load_processor(source.location) if source else None, recipe.image_size)
        skeleton = build_model(config, cls, device="cpu")
        example = torch.zeros(2, *shape)
        found = find_channels(skeleton, example)
        refused = found.refused
        structure = prepare_traced_(skeleton, found.sites, example, compact_traced_)
        structure = budgeted(structure, skeleton, recipe, dtype)
    else:
        skeleton = build_model(config, cls, device="meta")
        shape = image_shape(skeleton)
        if recipe.image_size:
            raise BadRecipe(f"--image-size: '{config.model_type}' reads what its config says: leave it out.")
        if keeps_cache(skeleton):
            objective = WRITES if config.is_encoder_decoder else "causal_lm"
            recipe = recipe.model_copy(update={"max_length": tokens_read(max_length, config, objective)})
        structure, whole = prepare_skeleton_(skeleton, recipe, dtype)
    if latency_table is not None:
        table = read_latency(latency_table, structure.everything, without=LOOKED_UP)
        structure = replace(structure, costs=replace(structure.costs, latency=table))
    everything, sites, costs = structure.everything, structure.sites, structure.costs
    fixed = sorted(named_rows(skeleton)) if "vocab" in sites else []  # what else a tokenizer needs, no config says
    sites = {name: site.at_least(len(fixed)) if name == "vocab" else site for name, site in sites.items()}
    cost_model = costs.of(cost)
    if "vocab" in sites:
        check_vocab(cost_model, recipe)
    structure = replace(structure, sites=sites)
    points = _points(recipe, structure, skeleton, fixed)
    least = least_cost(cost_model, sites, scope=scope, round_to=recipe.round_to, ties=structure.ties)
    return {
        "model_type": config.model_type,
        "macs_length": costs.macs.length,
        "pictures": {"shape": list(shape)} if shape else None,
        "refused": refused,
        "whole": whole,
        "dense": {"params": costs.params.of_dense(), "macs": costs.macs.of_dense()} | _latency(costs),
        "latency": _measured(costs),
        "reachable_keep": least / cost_model.of_dense(scope=scope),
        "groups": _groups(recipe, structure, everything),
    } | ({"budgets": points} if isinstance(recipe.budget, tuple) else points[0])


def _points(recipe: Recipe, structure: Structure, skeleton: PreTrainedModel, fixed: list[int]) -> list[dict]:
    """What each budget gives, or why it cannot be reached; that of the largest is raised where none can.

    Args:
        fixed: Rows of the vocabulary that stay.
    """
    shares = recipe.budget if isinstance(recipe.budget, tuple) else (recipe.budget,)
    costs, sites = structure.costs, structure.sites
    scores = {name: torch.arange(site.n_units, 0.0, -1.0) for name, site in sites.items()}
    if "vocab" in sites:
        scores["vocab"][fixed] += sites["vocab"].n_units
    points, first = [], None
    for keep in shares:
        try:
            target = make_budget(costs.of(recipe.cost), sites, keep=keep, scope=recipe.scope,
                                 round_to=recipe.round_to, ties=structure.ties)  # fmt: skip
        except BadRecipe as error:
            first = first or error
            points.append({"keep": keep, "unreachable": str(error)})
            continue
        found = structure.plan(skeleton, equal_keep(structure, target, scores))
        small = structure.compact(copy.deepcopy(skeleton), found)
        kept = found.kept()
        points.append({
            "predicted": {"params": costs.params(kept), "macs": costs.macs(kept)} | _latency(costs, kept),
            "budget": costs.achieved(target, found),
            "kept": fractions_kept(present(found.keep, sites, costs.params), sites),
            "tier": tier_of(small),
        })  # fmt: skip
    if all("unreachable" in point for point in points):
        raise first
    return points


def _latency(costs: Costs, kept: dict[str, int] | None = None) -> dict[str, float]:
    """What a table says of the units that stay, or of all; nothing where there is none."""
    if costs.latency is None:
        return {}
    model = costs.latency.model
    return {"latency_ms": _readable(model(model.n_units if kept is None else kept), "latency")}


def _measured(costs: Costs) -> dict | None:
    """What a table holds for."""
    table = costs.latency
    return table and {"device": table.device, "shape": table.shape, "error": table.error}


def _readable(cost: int, what: str) -> float:
    """A latency in milliseconds; any other cost as it is."""
    return round(cost / FEMTOSECONDS_PER_MS, 6) if what == "latency" else cost


def _groups(recipe: Recipe, structure: Structure, everything: dict[str, Site]) -> dict[str, dict]:
    """How many units of each kind there are, what they cost, and what cutting them alone reaches."""
    cost_model, sites, scope = structure.costs.of(recipe.cost), structure.sites, recipe.scope
    full = cost_model.n_units
    dense = cost_model(full, scope=scope)
    groups = {}
    for kind in dict.fromkeys(site.kind for site in everything.values()):
        members = {name: site for name, site in everything.items() if site.kind == kind}
        cut = {name for name in members if name in sites}
        ties = tuple(tie for tie in structure.ties if cut & set(tied_names(tie)))
        cut |= {name for tie in ties for name in tied_names(tie)}
        alone = least_cost(cost_model, {name: sites[name] for name in sites if name in cut}, scope=scope,
                           round_to=recipe.round_to, ties=ties)  # fmt: skip
        groups[kind] = {
            "sites": len(members),
            "units": sum(site.n_units for site in members.values()),
            "min_units": sum(site.min_units for site in members.values()),
            "cost_per_unit": _readable(
                max(int(cost_model.unit_cost(full, name, scope=scope)) for name in members), recipe.cost
            ),
            "owns": 1 - cost_model(full | dict.fromkeys(members, 0), scope=scope) / dense,
            "alone": alone / cost_model.of_dense(scope=scope) if cut else None,
            "cut": bool(cut),
        }
    return groups
