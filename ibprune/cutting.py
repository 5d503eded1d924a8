"""Decides which units stay, by the recipe's score and shares, and compacts a copy of the dense model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ibprune import channels
from ibprune.budget import Budget, Keep, make_budget, solve_by_cost, solve_by_shares
from ibprune.channels import Found
from ibprune.console import Quiet
from ibprune.costs import CostModel, macs_model, module_macs_model, params_model
from ibprune.data import token_counts
from ibprune.errors import BadRecipe, did_you_mean
from ibprune.feeding import Feed
from ibprune.groups import ATTENTION_KINDS, MODULE_KINDS, Site
from ibprune.inject import inject_
from ibprune.losses import Batch, Objective, forward, training_loss
from ibprune.masks import MaskSet
from ibprune.plans import PruningPlan, model_type
from ibprune.recipe import CNN_KINDS, Recipe
from ibprune.scores import fisher_scores, magnitude_scores, random_scores
from ibprune.shares import equal_pressure, probe_shares
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_, compact_traced_, factorize_
from ibprune.trainer import TrainSettings
from ibprune.vib import learn_masks

MACS_LENGTH = 128  # tokens of the sequence whose MACs are counted, where the model reads so many
CALIBRATION = 512  # samples that score the units
PROBE = 256  # samples on which candidate cuts are compared


@dataclass(frozen=True)
class Costs:
    """The cost models of one model, over all its sites."""

    params: CostModel
    macs: CostModel

    def of(self, cost: str) -> CostModel:
        return self.params if cost == "params" else self.macs


@dataclass(frozen=True)
class Structure:
    """What can be cut of a model.

    Attributes:
        everything: All its sites; those that are not cut keep all their units.
        sites: Those to cut.
        costs: Over all sites.
        compact: Removes, in place, what a plan does not keep.
    """

    everything: dict[str, Site]
    sites: dict[str, Site]
    costs: Costs
    compact: Callable[[nn.Module, PruningPlan], nn.Module]


def choose_kinds(model: PreTrainedModel, kinds: tuple[str, ...], *, headless_encoder: bool = False) -> tuple[str, ...]:
    """The kinds to cut: those asked for, or all the family has. "heads" means KV groups under GQA.

    An encoder without a head keeps its `hidden` width unless asked: its embeddings are its interface,
    and stay comparable, feature by feature, with the dense model's.

    Raises:
        BadRecipe: A kind the family does not have.
    """
    family = find_family(model.config.model_type)
    known = tuple(dict.fromkeys(group.kind for group in family.groups))
    if "kv_groups" in known:
        kinds = tuple("kv_groups" if kind == "heads" else kind for kind in kinds)
    for kind in kinds:
        if kind not in known:
            why = dict(family.uncut).get("heads" if kind in ATTENTION_KINDS else kind)
            hint = f"{why}. Its kinds: {', '.join(known)}" if why else did_you_mean(kind, known)
            raise BadRecipe(f"'{model.config.model_type}' has no units '{kind}': {hint}.")
    return kinds or tuple(kind for kind in known if not (headless_encoder and kind == "hidden"))


def check_cnn(recipe: Recipe, model_type: str) -> None:
    """Raises `BadRecipe` where a recipe asks of a CNN what only transformers have."""
    for kind in recipe.kinds:
        if kind not in CNN_KINDS:
            raise BadRecipe(f"'{model_type}' has no units '{kind}': {did_you_mean(kind, CNN_KINDS)}.")
    if recipe.scope != "model":
        raise BadRecipe(
            f"--scope: '{recipe.scope}' is for transformers; '{model_type}' has no embeddings to leave out."
        )


def prepare_(model: PreTrainedModel, kinds: tuple[str, ...], counts: torch.Tensor | None) -> Structure:
    """What can be cut of a transformer; factorises its embedding if the rank is to be cut."""
    headless_encoder = model.base_model is model
    kinds = choose_kinds(model, kinds, headless_encoder=headless_encoder)
    if "embedding_rank" in kinds:
        factorize_(model, counts)
    everything = find_sites(model)
    chosen = {name: site for name, site in everything.items() if site.kind in kinds}
    length = min(MACS_LENGTH, find_family(model.config.model_type).max_tokens(model.config) or MACS_LENGTH)
    costs = Costs(params_model(model, everything), macs_model(model, everything, length=length))
    return Structure(everything, chosen, costs, compact_)


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


def cut(
    dense: PreTrainedModel,
    recipe: Recipe,
    feed: Feed,
    accelerator: Accelerator,
    console: Quiet,
    *,
    found: Found | None = None,
) -> tuple[PreTrainedModel, PruningPlan, Budget, Structure]:
    """The pruned model before recovery, its plan, the budget and what could be cut.

    Args:
        found: The channels of a CNN.
    """
    student = copy.deepcopy(dense)
    if found is not None:
        example = feed.example()["pixel_values"].to(accelerator.device)
        structure = prepare_traced_(student, found.sites, example, compact_traced_)
    else:
        counts = token_counts(feed.unshuffled(), dense.config.vocab_size, batches=100)
        structure = prepare_(student, recipe.kinds, counts)
    cost_model = structure.costs.of(recipe.cost)
    budget = make_budget(cost_model, structure.sites, keep=recipe.budget, scope=recipe.scope, round_to=recipe.round_to)
    student, plan = choose_and_compact_(
        student, structure, budget, score=recipe.score, shares=recipe.shares, seed=recipe.seed,
        objective=feed.objective, batches=feed.calibration(CALIBRATION, accelerator.device), make_batches=feed.train,
        judge=dense, teacher=dense if recipe.distill else None, settings=train_settings(recipe, recipe.mask_steps),
        accelerator=accelerator, console=console,
    )  # fmt: skip
    return student, plan, budget, structure


def choose_and_compact_(
    student: nn.Module,
    structure: Structure,
    budget: Budget,
    *,
    score: str,
    shares: str,
    seed: int,
    objective: Objective,
    batches: list[Batch],
    make_batches: Callable[[int], DataLoader],
    judge: nn.Module | None,
    teacher: nn.Module | None,
    settings: TrainSettings,
    accelerator: Accelerator,
    console: Quiet,
) -> tuple[nn.Module, PruningPlan]:
    """Scores the units, shares the cut between kinds, learns masks where `score` is "vib", and cuts.

    Args:
        batches: For scores and for comparing candidate cuts, on the device.
        make_batches: Training batches of an epoch, by its seed.
        judge: The dense model, to which candidate cuts are compared; None leaves the labels alone.
        teacher: What the masked model is distilled from, if anything.
        settings: Of mask learning.
    """
    sites, cost_model = structure.sites, structure.costs.of(budget.cost)
    masks = inject_(student, sites)
    if score == "magnitude":
        scores = magnitude_scores(student, sites)
    elif score == "random":
        scores = random_scores(sites, seed=seed)
    else:
        with accelerator.autocast():
            scores = fisher_scores(student, masks, batches, objective, seed=seed, total=len(batches), console=console)
    if shares == "probe":
        few = batches[: max(1, PROBE // len(next(iter(batches[0].values()))))]
        loss_of = probe_loss(student, masks, judge, few, objective, accelerator)
        keep = probe_shares(loss_of, scores, sites, cost_model, budget, console=console)
    elif shares == "cost":
        keep = solve_by_cost(scores, sites, cost_model, budget)
    else:
        keep = solve_by_shares(scores, sites, cost_model, budget, equal_pressure(sites))
    masks.set_keep({name: tuple(range(site.n_units)) for name, site in sites.items()})
    if score == "vib":
        # Channels of one kind differ in cost, and log_alpha is a score per cost: so is where it starts.
        start = {
            name: score / cost_model.unit_cost(cost_model.n_units, name) if sites[name].kind in MODULE_KINDS else score
            for name, score in scores.items()
        }
        keep, _, _ = learn_masks(
            student, masks, sites, cost_model, budget, start, keep, loss_with(objective, teacher, accelerator),
            make_batches, settings, accelerator=accelerator, console=console,
        )  # fmt: skip
    keep = {name: keep.get(name, tuple(range(site.n_units))) for name, site in structure.everything.items()}
    plan = PruningPlan(model_type(student), {name: site.n_units for name, site in structure.everything.items()}, keep)
    return structure.compact(student, plan), plan


@torch.no_grad()
def probe_loss(
    student: nn.Module,
    masks: MaskSet,
    dense: nn.Module | None,
    batches: list[Batch],
    objective: Objective,
    accelerator: Accelerator,
) -> Callable[[Keep], float]:
    """A function that cuts by masks and returns the loss on a few batches, to the dense model where there is one."""
    with accelerator.autocast():
        teacher = [forward(dense, batch) if dense is not None else None for batch in batches]

    @torch.no_grad()
    def loss_of(keep: Keep) -> float:
        masks.set_keep(keep)
        with accelerator.autocast():
            losses = [
                training_loss(objective, forward(student, batch), target, batch)
                for batch, target in zip(batches, teacher)
            ]
        return float(torch.stack(losses).mean())

    return loss_of


def loss_with(
    objective: Objective, teacher: nn.Module | None, accelerator: Accelerator
) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """The training loss as a function of (model, batch), distilled from the teacher where there is one."""

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        target = None
        if teacher is not None:
            with torch.no_grad(), accelerator.autocast():
                target = forward(teacher, batch)
        return training_loss(objective, forward(model, batch), target, batch)

    return loss_of


def train_settings(recipe: Recipe, steps: int) -> TrainSettings:
    return TrainSettings(steps=steps, lr=recipe.lr, grad_accum=recipe.grad_accum, seed=recipe.seed)
