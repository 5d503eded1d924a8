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
from ibprune.losses import Batch, Objective, dense_batch, forward, training_loss
from ibprune.masks import MaskSet
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe
from ibprune.scores import fisher_scores, magnitude_scores, random_scores
from ibprune.shares import equal_pressure, probe_shares
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_, cut_vocab_, factorize_, named_rows
from ibprune.task_heads import is_headless
from ibprune.trainer import TrainSettings
from ibprune.vib import learn_masks
from ibprune.vocabulary import RankedRows, keep_rows, rank_rows

MACS_LENGTH = 128  # tokens of the sequence whose MACs are counted, where the model reads so many
CALIBRATION = 512  # sequences that score the units
PROBE = 256  # sequences on which candidate cuts are compared
USAGE = 400  # batches of 256 texts in which the tokens are counted that a vocabulary is cut by


@dataclass(frozen=True)
class Costs:
    """The cost models of one model, over all its sites."""

    params: CostModel
    macs: CostModel

    def of(self, cost: str) -> CostModel:
        return self.params if cost == "params" else self.macs


def choose_kinds(model: PreTrainedModel, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds to cut: those asked for, or all the family has but `vocab`. "heads" means KV groups under GQA.

    An encoder without a head keeps its `hidden` width unless asked: its embeddings are its interface,
    and stay comparable, feature by feature, with the dense model's. A cut vocabulary changes the tokenizer,
    so that it is cut only where it is named.

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
    unasked = ("vocab", "hidden") if is_headless(model) else ("vocab",)
    return kinds or tuple(kind for kind in known if kind not in unasked)


def prepare_(
    model: PreTrainedModel, kinds: tuple[str, ...], counts: torch.Tensor | None
) -> tuple[dict[str, Site], dict[str, Site], Costs]:
    """Factorises the embedding if its rank is to be cut; returns all sites, those to cut, and the costs."""
    if "embedding_rank" in kinds and find_family(model.config.model_type).factorizes:
        factorize_(model, counts)
    everything = find_sites(model)
    chosen = {name: site for name, site in everything.items() if site.kind in kinds}
    length = min(MACS_LENGTH, find_family(model.config.model_type).max_tokens(model.config) or MACS_LENGTH)
    return everything, chosen, Costs(params_model(model, everything), macs_model(model, everything, length=length))


def cut(
    dense: PreTrainedModel, recipe: Recipe, feed: Feed, accelerator: Accelerator, console: Quiet
) -> tuple[PreTrainedModel, PruningPlan, Budget, Costs, Feed]:
    """The pruned model before recovery, its plan, the budget, the costs, and the feed of the tokens it reads.

    A vocabulary is cut before everything else, because its rows have no masks: candidate cuts of all kinds say how
    many stay; then the others are scored, shared and learned on what the rewritten tokenizer makes of the texts.
    """
    kinds = choose_kinds(dense, recipe.kinds)
    student = copy.deepcopy(dense)
    counts = token_counts(feed.unshuffled(), dense.config.vocab_size, batches=USAGE if "vocab" in kinds else 100)
    everything, sites, costs = prepare_(student, kinds, counts)
    n_units = {name: site.n_units for name, site in everything.items()}
    ranked = None
    if "vocab" in sites:
        _check_vocab(costs.of(recipe.cost), recipe)
        ranked = rank_rows(feed.collate.tokenizer, counts, named=named_rows(dense))
        sites["vocab"] = sites["vocab"].at_least(ranked.n_needed)
    model = costs.of(recipe.cost)
    budget = make_budget(model, sites, keep=recipe.budget, scope=recipe.scope, round_to=recipe.round_to)
    masks, scores, keep = _share(student, dense, sites, model, budget, ranked, recipe, feed, accelerator, console)
    rows = keep.pop("vocab", ())
    sites.pop("vocab", None)
    if rows and len(rows) < n_units["vocab"]:
        student = copy.deepcopy(dense)
        cut_vocab_(student, rows)
        feed = feed.retokenised(keep_rows(feed.collate.tokenizer, rows))
        counts = token_counts(feed.unshuffled(), len(rows), batches=100)
        everything, sites, smaller = prepare_(student, tuple(kind for kind in kinds if kind != "vocab"), counts)
        model = smaller.of(recipe.cost)
        masks, scores, keep = _share(student, dense, sites, model, budget, None, recipe, feed, accelerator, console)
    if recipe.score == "vib" and sites:
        loss_of = loss_with(feed.objective, dense if recipe.distill else None, accelerator)
        settings = train_settings(recipe, recipe.mask_steps)
        keep, _, _ = learn_masks(
            student, masks, sites, model, budget, scores, keep, loss_of, feed.train, settings,
            accelerator=accelerator, console=console,
        )  # fmt: skip
    keep = {name: keep.get(name, tuple(range(site.n_units))) for name, site in everything.items()}
    plan = PruningPlan(student.config.model_type, {name: site.n_units for name, site in everything.items()}, keep)
    student = compact_(student, plan)
    if rows:  # the plan counts in the dense model's rows
        plan = PruningPlan(plan.model_type, n_units, keep | {"vocab": rows})
    return student, plan, budget, costs, feed


def _check_vocab(model: CostModel, recipe: Recipe) -> None:
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


def _share(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    sites: dict[str, Site],
    model: CostModel,
    budget: Budget,
    ranked: RankedRows | None,
    recipe: Recipe,
    feed: Feed,
    accelerator: Accelerator,
    console: Quiet,
) -> tuple[MaskSet, dict[str, torch.Tensor], Keep]:
    """The student's masks, all open, the scores, and the units that one-shot scores would keep under the budget.

    Args:
        ranked: The rows of the vocabulary, where they are to be cut.
    """
    masks = inject_(student, sites)
    batches = feed.calibration(CALIBRATION, accelerator.device)
    scores = _one_shot_scores(student, masks, sites, batches, recipe, feed, accelerator, console)
    if ranked is not None:
        scores["vocab"] = ranked.scores
    if recipe.shares == "probe" and sites:
        few = batches[: max(1, PROBE // recipe.batch_size)]
        read = None if ranked is None else _reader(feed, len(few), accelerator.device)
        loss_of = probe_loss(student, masks, dense, few, feed.objective, accelerator, read=read)
        keep = probe_shares(loss_of, scores, sites, model, budget, console=console)
    elif recipe.shares == "cost":
        keep = solve_by_cost(scores, sites, model, budget)
    else:
        keep = solve_by_shares(scores, sites, model, budget, equal_pressure(sites))
    masks.set_keep({name: tuple(range(site.n_units)) for name, site in sites.items()})
    return masks, scores, keep


def _reader(feed: Feed, n_batches: int, device: torch.device) -> Callable[[Keep], list[Batch]]:
    """The calibration batches as a cut vocabulary reads them, in the ids of the whole one: the rows are still there."""
    tokenizer = feed.collate.tokenizer
    known: dict[tuple[int, ...], list[Batch]] = {}

    def read(keep: Keep) -> list[Batch]:
        rows = keep["vocab"]
        if rows not in known:
            batches = feed.retokenised(keep_rows(tokenizer, rows)).calibration(CALIBRATION, device)[:n_batches]
            old = torch.tensor(rows, device=device)
            known[rows] = [batch | {"input_ids": old[batch["input_ids"]]} for batch in batches]
        return known[rows]

    return read


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
    if not list(masks):
        return {}
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
    *,
    read: Callable[[Keep], list[Batch]] | None = None,
) -> Callable[[Keep], float]:
    """A function that cuts by masks and returns the loss on a few batches, to the dense model where there is one.

    Args:
        read: The same batches as the student reads them under a cut, where that changes its tokens.
    """
    with accelerator.autocast():
        teacher = [forward(dense, dense_batch(batch)) if dense is not None else None for batch in batches]

    @torch.no_grad()
    def loss_of(keep: Keep) -> float:
        masks.set_keep(keep)
        with accelerator.autocast():
            losses = [
                training_loss(objective, forward(student, batch), target, batch)
                for batch, target in zip(batches if read is None else read(keep), teacher)
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
                target = forward(teacher, dense_batch(batch))
        return training_loss(objective, forward(model, batch), target, batch)

    return loss_of


def train_settings(recipe: Recipe, steps: int) -> TrainSettings:
    return TrainSettings(steps=steps, lr=recipe.lr, grad_accum=recipe.grad_accum, seed=recipe.seed)
