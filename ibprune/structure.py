"""What can be cut of a model, by its family's row or by tracing, and what that costs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ibprune import channels
from ibprune.budget import Budget, Keep
from ibprune.console import Quiet
from ibprune.costs import FEMTOSECONDS_PER_MS, SCOPES, CostModel, macs_model, module_macs_model, params_model
from ibprune.embeddings import TokenUse, factorize_
from ibprune.errors import BadRecipe, did_you_mean
from ibprune.groups import Site
from ibprune.latency import LatencyTable, load_latency, measure_latency
from ibprune.losses import Batch
from ibprune.memory import Memory, measure_memory
from ibprune.names import ATTENTION_KINDS
from ibprune.plans import PruningPlan, is_rotated, model_type
from ibprune.processes import on_main
from ibprune.pruned_config import is_pruned
from ibprune.recipe import CNN_KINDS, Recipe
from ibprune.rotation import rotate_
from ibprune.sites import came_factorized, find_family, find_sites
from ibprune.surgery import compact_
from ibprune.task_heads import is_headless
from ibprune.ties import Tie

LOOKED_UP = ("vocab", "embedding_rank")  # kinds of a token embedding
MACS_LENGTH = 128  # tokens of the sequence whose MACs are counted, where the model reads so many


@dataclass(frozen=True)
class Costs:
    """The cost models of one model, over all its sites.

    Attributes:
        memory: None where nothing is budgeted by it.
        latency: None where it was not measured.
    """

    params: CostModel
    macs: CostModel
    memory: Memory | None = None
    latency: LatencyTable | None = None

    def of(self, cost: str) -> CostModel:
        measured = {"memory": self.memory, "latency": self.latency}
        return measured[cost].model if cost in measured else {"params": self.params, "macs": self.macs}[cost]

    def achieved(self, budget: Budget, plan: PruningPlan) -> dict:
        """What was asked and what a plan reaches, for a report; latencies in milliseconds."""
        unit = FEMTOSECONDS_PER_MS if budget.cost == "latency" else 1
        cost = self.of(budget.cost)(plan.kept(), scope=budget.scope)
        record = {"cost": budget.cost, "scope": budget.scope, "keep": budget.keep}
        record |= (
            {"limit": budget.limit, "achieved": cost}
            if unit == 1
            else {
                "limit": round(budget.limit / unit, 4),
                "achieved": round(cost / unit, 4),
                "error": self.latency.error,
            }
        )
        return record | ({"counts": self.memory.counts} if budget.cost == "memory" else {})


@dataclass(frozen=True)
class Structure:
    """What can be cut of a model.

    Attributes:
        everything: All its sites; those that are not cut keep all their units.
        sites: Those to cut.
        costs: Over all sites.
        compact: Removes, in place, what a plan does not keep.
        ties: Sites that lose units together only (`ibprune.vanilla`).
        axes: Of the residual stream, where it was turned, (d, d).
    """

    everything: dict[str, Site]
    sites: dict[str, Site]
    costs: Costs
    compact: Callable[[nn.Module, PruningPlan], nn.Module]
    ties: tuple[Tie, ...] = ()
    axes: torch.Tensor | None = None

    def plan(self, model: nn.Module, keep: Keep) -> PruningPlan:
        """The plan that keeps these units, and all units of the sites that `keep` does not name."""
        n_units = {name: site.n_units for name, site in self.everything.items()}
        keep = {name: keep.get(name, tuple(range(units))) for name, units in n_units.items()}
        return PruningPlan(model_type(model), n_units, keep, is_rotated(model))


def with_latency(
    structure: Structure,
    dense: nn.Module,
    inputs: Batch,
    *,
    table: str | dict | None,
    round_to: int,
    seed: int,
    console: Quiet,
) -> Structure:
    """The structure with a cost model of latency, measured on `dense` and these inputs.

    Args:
        table: Taken instead: a saved table's path, or its `LatencyTable.to_dict`.
    """
    everything = structure.everything

    def compacted(kept: dict[str, int]) -> nn.Module:
        plan = structure.plan(dense, {name: tuple(range(count)) for name, count in kept.items()})
        return structure.compact(copy.deepcopy(dense), plan)

    if isinstance(table, dict):
        found = LatencyTable.from_dict(table)
    elif table is not None:
        found = load_latency(table, everything, next(dense.parameters()).device, inputs)
    else:
        sites, seen = structure.sites, {"round_to": round_to, "seed": seed, "console": console}
        measured = on_main(lambda: measure_latency(dense, everything, sites, compacted, inputs, **seen).to_dict())
        found = LatencyTable.from_dict(measured)
        console.say(
            f"latency of the dense model {found.dense_ms:.2f} ms; a formula fitted to {len(found.plans)} widths is "
            f"{found.error:.1%} off on others"
        )
    return replace(structure, costs=replace(structure.costs, latency=found))


def with_memory(structure: Structure, model: nn.Module, *, dtype: torch.dtype, batch: int, length: int) -> Structure:
    """The structure with a cost model of what `model` holds in memory (`ibprune.memory.measure_memory`)."""
    found = measure_memory(model, structure.costs.params, structure.everything, dtype=dtype, batch=batch, length=length)
    return replace(structure, costs=replace(structure.costs, memory=found))


def budgeted(structure: Structure, model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype) -> Structure:
    """The structure with the cost model that a recipe's budget needs, where it follows from the model and the recipe.

    Args:
        dtype: Of the checkpoint.
    """
    if recipe.cost != "memory":
        return structure
    return with_memory(structure, model, dtype=dtype, batch=recipe.batch_size, length=recipe.max_length or 0)


def choose_kinds(
    model: PreTrainedModel,
    kinds: tuple[str, ...],
    *,
    cost: str = "params",
    vanilla: bool = False,
    rotate: bool = False,
    quantised: bool = False,
) -> tuple[str, ...]:
    """The kinds to cut: those asked for, or all the family has but `vocab`. "heads" means KV groups under GQA.

    An encoder without a head keeps its `hidden` width unless asked: its embeddings are its interface,
    and stay comparable, feature by feature, with the dense model's. A cut vocabulary changes the tokenizer,
    so that it is cut only where it is named. Of a quantised model the embedding is not factorised.

    Raises:
        BadRecipe: A kind the family does not have, or a rotation of what is not cut.
    """
    family = find_family(model.config.model_type)
    known = tuple(dict.fromkeys(group.kind for group in family.groups))
    if vanilla and is_pruned(model.config):
        raise BadRecipe("--vanilla: the model is pruned already, in shapes that take code to load: leave it out.")
    if "kv_groups" in known:
        kinds = tuple("kv_groups" if kind == "heads" else kind for kind in kinds)
    for kind in kinds:
        if kind not in known:
            why = dict(family.uncut).get("heads" if kind in ATTENTION_KINDS else kind)
            why = why or (kind == "experts" and "every token runs through all of each FFN")
            hint = f"{why}. Its kinds: {', '.join(known)}" if why else did_you_mean(kind, known)
            raise BadRecipe(f"'{model.config.model_type}' has no units '{kind}': {hint}.")
    unasked = ("vocab", "hidden") if is_headless(model) else ("vocab",)
    if vanilla and family.factorizes:  # a native rank is a width of the config
        if "embedding_rank" in kinds:
            raise BadRecipe("--vanilla: a factorised embedding takes code to load: leave 'embedding_rank' out.")
        unasked += ("embedding_rank",)
    if quantised:
        unasked += LOOKED_UP
    if cost == "latency":
        for kind in set(kinds) & set(LOOKED_UP):
            raise BadRecipe(f"'{kind}' takes no time to cut for: leave it out of --kinds, or budget params.")
        unasked += LOOKED_UP
    chosen = kinds or tuple(kind for kind in known if kind not in unasked)
    if rotate and "hidden" not in chosen:
        why = dict(family.uncut).get("hidden", "a model without a head keeps its width")
        raise BadRecipe(f"--rotate turns the axes in which 'hidden' is cut, and here it is not cut: {why}.")
    return chosen


def check_cnn(recipe: Recipe, model_type: str) -> None:
    """Raises `BadRecipe` where a recipe asks of a CNN what only transformers have."""
    if recipe.vanilla:
        raise BadRecipe(f"--vanilla: no config of '{model_type}' says that it has fewer channels: leave it out.")
    for kind in recipe.kinds:
        if kind not in CNN_KINDS:
            raise BadRecipe(f"'{model_type}' has no units '{kind}': {did_you_mean(kind, CNN_KINDS)}.")
    if recipe.recovery == "lora":
        raise BadRecipe(f"--recovery lora adapts the blocks of a transformer; '{model_type}' has none: use full.")
    if recipe.rotate:
        raise BadRecipe(f"--rotate turns the residual stream of a transformer; '{model_type}' has none.")
    if recipe.scope != "model":
        raise BadRecipe(
            f"--scope: '{recipe.scope}' is for transformers; '{model_type}' has no embeddings to leave out."
        )


def check_vocab(model: CostModel, recipe: Recipe) -> None:
    """Raises `BadRecipe` where cutting rows cannot be weighed against cutting other units, or saves nothing."""
    if recipe.shares == "cost":
        raise BadRecipe(
            "--shares cost compares kinds by their scores, and how often a token is used is no such score: use probe "
            "or equal with 'vocab'."
        )
    if not model.unit_cost(model.n_units, "vocab", scope=recipe.scope):
        raise BadRecipe(
            f"rows of the vocabulary cost no {recipe.cost} of the {recipe.scope} here: leave 'vocab' out of --kinds, "
            "or budget the params of the model."
        )


def prepare_(
    model: PreTrainedModel, kinds: tuple[str, ...], use: TokenUse | None, *, axes: torch.Tensor | None = None
) -> Structure:
    """What can be cut of a transformer; factorises its embedding if the rank is to be cut.

    Args:
        kinds: From `choose_kinds`.
        use: What the data make of the token embedding, which orders its directions.
        axes: Those into which the residual stream is turned first, (d, d); None leaves it.

    Raises:
        UnsupportedModel: The residual stream cannot be turned.
    """
    tied = None  # an output that is parted from the embedding costs more than the dense model does
    if axes is not None:
        dense = params_model(model, find_sites(model))
        tied = {scope: dense.of_dense(scope=scope) for scope in SCOPES}
        rotate_(model, axes)
        if use is not None and use.metric is not None:
            turn = axes.to(use.metric)
            use = replace(use, metric=turn.T @ use.metric @ turn)
    if "embedding_rank" in kinds and find_family(model.config.model_type).factorizes and not came_factorized(model):
        factorize_(model, use)
    everything = find_sites(model)
    chosen = {name: site for name, site in everything.items() if site.kind in kinds}
    length = min(MACS_LENGTH, find_family(model.config.model_type).max_tokens(model.config) or MACS_LENGTH)
    params = replace(params_model(model, everything), dense=tied)
    return Structure(
        everything, chosen, Costs(params, macs_model(model, everything, length=length)), compact_, axes=axes
    )


def prepare_traced_(
    model: nn.Module,
    sites: dict[str, Site],
    example: torch.Tensor,
    compact: Callable[[nn.Module, dict[str, Site], PruningPlan], nn.Module],
) -> Structure:
    """What can be cut of a traced module; its linear layers are made to read a selection where inputs are cut.

    Args:
        sites: From `ibprune.channels.find_channels`.
        example: An input whose size counts for MACs, (batch, ...).
        compact: Removes what a plan does not keep.
    """
    channels.prepare_(model, sites)
    costs = Costs(params_model(model, sites), module_macs_model(model, sites, example))
    return Structure(sites, sites, costs, lambda model, plan: compact(model, sites, plan))
