"""Decides which units stay, by the recipe's score and shares, and compacts a copy of the dense model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ibprune.budget import Budget, Keep, make_budget, solve_by_cost, solve_by_shares
from ibprune.console import Quiet
from ibprune.costs import CostModel, macs_model, params_model
from ibprune.data import token_counts
from ibprune.errors import BadRecipe, did_you_mean
from ibprune.feeding import Feed
from ibprune.groups import ATTENTION_KINDS, Site
from ibprune.inject import inject_
from ibprune.losses import Batch, Objective, forward, training_loss
from ibprune.masks import MaskSet
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe
from ibprune.scores import fisher_scores, magnitude_scores, random_scores
from ibprune.shares import equal_pressure, probe_shares
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_, factorize_
from ibprune.task_heads import auto_class
from ibprune.trainer import TrainSettings
from ibprune.vib import learn_masks

MACS_LENGTH = 128  # tokens of the sequence whose MACs are counted, where the model reads so many
CALIBRATION = 512  # sequences that score the units
PROBE = 256  # sequences on which candidate cuts are compared


@dataclass(frozen=True)
class Costs:
    """The cost models of one model, over all its sites."""

    params: CostModel
    macs: CostModel

    def of(self, cost: str) -> CostModel:
        return self.params if cost == "params" else self.macs


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


def prepare_(
    model: PreTrainedModel, kinds: tuple[str, ...], counts: torch.Tensor | None
) -> tuple[dict[str, Site], dict[str, Site], Costs]:
    """Factorises the embedding if its rank is to be cut; returns all sites, those to cut, and the costs."""
    auto = auto_class(type(model).__name__, model.config.model_type)
    headless_encoder = model.base_model is model and auto == "AutoModel"  # CLIP's classifier holds no other model
    kinds = choose_kinds(model, kinds, headless_encoder=headless_encoder)
    if "embedding_rank" in kinds:
        factorize_(model, counts)
    everything = find_sites(model)
    chosen = {name: site for name, site in everything.items() if site.kind in kinds}
    length = min(MACS_LENGTH, find_family(model.config.model_type).max_tokens(model.config) or MACS_LENGTH)
    return everything, chosen, Costs(params_model(model, everything), macs_model(model, everything, length=length))


def cut(
    dense: PreTrainedModel, recipe: Recipe, feed: Feed, accelerator: Accelerator, console: Quiet
) -> tuple[PreTrainedModel, PruningPlan, Budget, Costs]:
    """The pruned model before recovery, its plan, the budget and the costs."""
    student = copy.deepcopy(dense)
    counts = token_counts(feed.unshuffled(), dense.config.vocab_size, batches=100)
    everything, sites, costs = prepare_(student, recipe.kinds, counts)
    model = costs.of(recipe.cost)
    budget = make_budget(model, sites, keep=recipe.budget, scope=recipe.scope, round_to=recipe.round_to)
    masks = inject_(student, sites)
    batches = feed.calibration(CALIBRATION, accelerator.device)
    scores = _one_shot_scores(student, masks, sites, batches, recipe, feed, accelerator, console)
    if recipe.shares == "probe":
        few = batches[: max(1, PROBE // recipe.batch_size)]
        loss_of = probe_loss(student, masks, dense, few, feed.objective, accelerator)
        keep = probe_shares(loss_of, scores, sites, model, budget, console=console)
    elif recipe.shares == "cost":
        keep = solve_by_cost(scores, sites, model, budget)
    else:
        keep = solve_by_shares(scores, sites, model, budget, equal_pressure(sites))
    masks.set_keep({name: tuple(range(site.n_units)) for name, site in sites.items()})
    if recipe.score == "vib":
        loss_of = loss_with(feed.objective, dense if recipe.distill else None, accelerator)
        settings = train_settings(recipe, recipe.mask_steps)
        keep, _, _ = learn_masks(
            student, masks, sites, model, budget, scores, keep, loss_of, feed.train, settings,
            accelerator=accelerator, console=console,
        )  # fmt: skip
    keep = {name: keep.get(name, tuple(range(site.n_units))) for name, site in everything.items()}
    plan = PruningPlan(student.config.model_type, {name: site.n_units for name, site in everything.items()}, keep)
    return compact_(student, plan), plan, budget, costs


def _one_shot_scores(
    student: nn.Module,
    masks: MaskSet,
    sites: dict[str, Site],
    batches: list[Batch],
    recipe: Recipe,
    feed: Feed,
    accelerator: Accelerator,
    console: Quiet,
) -> dict[str, torch.Tensor]:
    if recipe.score == "magnitude":
        return magnitude_scores(student, sites)
    if recipe.score == "random":
        return random_scores(sites, seed=recipe.seed)
    with accelerator.autocast():
        return fisher_scores(
            student, masks, batches, feed.objective, seed=recipe.seed, total=len(batches), console=console
        )


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
