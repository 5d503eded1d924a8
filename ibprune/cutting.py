"""Decides which units stay, by score and shares, and compacts a copy of the dense model."""

import copy
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ibprune.budget import Budget, Keep, effective_fractions, make_budget, present, solve_by_cost, solve_by_shares
from ibprune.candidates import probe_loss, reader, recovered_loss
from ibprune.channels import Found
from ibprune.choosing import Choice, refit_, score_units
from ibprune.collating import token_counts
from ibprune.console import Quiet
from ibprune.decisions import make_decision, make_path, rank_kinds
from ibprune.distillation import loss_with
from ibprune.embeddings import TokenUse, cut_vocab_, gradient_moment, named_rows
from ibprune.feeding import Feed
from ibprune.inject import MASKS, inject_
from ibprune.lora import RANK, Lora
from ibprune.losses import Batch, Objective
from ibprune.masks import MaskSet
from ibprune.models import Source
from ibprune.names import MODULE_KINDS
from ibprune.plans import PruningPlan
from ibprune.processes import shared
from ibprune.quantised import bits, copied, whole_skeleton
from ibprune.recipe import Recipe
from ibprune.resuming import NO_JOURNAL, Journal
from ibprune.rotation import principal_axes
from ibprune.scores import LEARNED, ranking
from ibprune.shards import compact_checkpoint
from ibprune.shares import as_pressure, equal_pressure, probe_shares
from ibprune.sites import came_factorized, find_family
from ibprune.structure import Structure, budgeted, check_vocab, choose_kinds, prepare_, prepare_traced_, with_latency
from ibprune.surgery import compact_traced_
from ibprune.timing import timed_text
from ibprune.trainer import TrainSettings
from ibprune.vanilla import plain_structure
from ibprune.vib import learn_masks
from ibprune.vocabulary import RankedRows, keep_rows, rank_rows

ADAPTER_RATE = 10  # times the rate of weights: what suits LoRA (docs/results.md, recovery by adapters)
CALIBRATION = 512  # samples that score the units
PROBE = 256  # samples on which candidate cuts are compared
USAGE = 400  # batches of 256 texts in which the tokens are counted that a vocabulary is cut by


def cut(
    dense: PreTrainedModel,
    recipe: Recipe,
    feed: Feed,
    accelerator: Accelerator,
    console: Quiet,
    *,
    found: Found | None = None,
    dtype: torch.dtype = torch.float32,
    source: Source | None = None,
    journal: Journal = NO_JOURNAL,
) -> tuple[PreTrainedModel, PruningPlan, Budget, Structure, Feed, dict]:
    """The pruned model before recovery, its plan, the budget, what could be cut, the feed of what it reads, and what
    decided it (`ibprune.decisions.make_decision`).

    A vocabulary is cut before everything else, because its rows have no masks: candidate cuts of all kinds say how
    many stay, and what the other kinds give; then these are scored and learned on what the rewritten tokenizer makes
    of the texts.

    Args:
        found: The channels of a CNN.
        dtype: Of the checkpoint.
        source: From which the weights are read that stay, where `dense` is quantised.
    """
    student, structure, choice, kinds, counts = prepare_cut(
        dense, recipe, feed, accelerator, console, found=found, dtype=dtype, source=source, journal=journal
    )
    cost_model = structure.costs.of(recipe.cost)
    if "vocab" not in structure.sites:
        sites = structure.sites
        budget = make_budget(cost_model, sites, keep=recipe.budget, scope=recipe.scope, round_to=recipe.round_to,
                             ties=structure.ties)  # fmt: skip
        student, plan, decision = choose_and_compact_(student, structure, budget, choice)
        return student, plan, budget, structure, feed, decision
    check_vocab(cost_model, recipe)
    ranked = rank_rows(feed.collate.tokenizer, counts, named=named_rows(dense))
    sites = structure.sites | {"vocab": structure.sites["vocab"].at_least(ranked.n_needed)}
    budget = make_budget(cost_model, sites, keep=recipe.budget, scope=recipe.scope, round_to=recipe.round_to,
                         ties=structure.ties)  # fmt: skip
    _, _, keep = one_shot(student, replace(structure, sites=sites), budget, choice, ranked=ranked, feed=feed)
    pressure = as_pressure(effective_fractions(keep, sites, cost_model)) if choice.shares == "probe" else None
    n_units, rows = {name: site.n_units for name, site in structure.everything.items()}, keep["vocab"]
    student = copy.deepcopy(dense)
    if len(rows) < n_units["vocab"]:
        cut_vocab_(student, rows)
        feed = feed.retokenised(keep_rows(feed.collate.tokenizer, rows))
        counts = shared(token_counts(feed.unshuffled(), len(rows), batches=100))
        batches = feed.calibration(CALIBRATION, accelerator.device)
        choice = replace(choice, batches=batches, make_batches=feed.train)
    kinds = tuple(kind for kind in kinds if kind != "vocab")
    use = token_use(student, kinds, counts, choice.batches, feed.objective)
    rest = budgeted(prepare_(student, kinds, use, axes=structure.axes), student, recipe, dtype)
    if recipe.vanilla and kinds:
        rest, _ = plain_structure(student, rest, rest.costs.of(recipe.cost), round_to=recipe.round_to)
    student, plan, decision = choose_and_compact_(student, rest, budget, choice, pressure=pressure)
    plan = replace(plan, n_units=n_units, keep=plan.keep | {"vocab": rows})  # in the dense model's rows
    decision["kinds"] |= rank_kinds({"vocab": ranked.scores}, keep, {"vocab": sites["vocab"]})
    return student, plan, budget, structure, feed, decision


def prepare_cut(
    dense: PreTrainedModel,
    recipe: Recipe,
    feed: Feed,
    accelerator: Accelerator,
    console: Quiet,
    *,
    found: Found | None = None,
    dtype: torch.dtype = torch.float32,
    source: Source | None = None,
    journal: Journal = NO_JOURNAL,
) -> tuple[PreTrainedModel, Structure, Choice, tuple[str, ...], torch.Tensor | None]:
    """A copy of the dense model, what can be cut of it and how that is chosen, the kinds, and the counts of tokens."""
    student, kinds, counts = copied(dense), (), None
    whole = whole_skeleton(dense) if bits(recipe) else student  # whose shapes are those of the weights
    batches = feed.calibration(CALIBRATION, accelerator.device)
    if found is not None:
        example = feed.example()["pixel_values"].to(accelerator.device)
        structure = prepare_traced_(student, found.sites, example, compact_traced_)
    else:
        kinds = choose_kinds(dense, recipe.kinds, cost=recipe.cost, vanilla=recipe.vanilla, rotate=recipe.rotate,
                             quantised=bool(bits(recipe)))  # fmt: skip
        if find_family(dense.config.model_type).embedding:
            most = USAGE if "vocab" in kinds else 100
            masked = feed.objective.name == "masked_lm"
            counts = shared(token_counts(feed.unshuffled(), dense.config.vocab_size, batches=most, masked=masked))
        axes = None
        if recipe.rotate:
            axes = journal.once("axes", lambda: {"axes": principal_axes(student, batches)})["axes"]
        use = token_use(student, kinds, counts, batches, feed.objective)
        structure = prepare_(whole, kinds, use, axes=axes)
        params = structure.costs.params
        more = params(params.n_units) - params.of_dense()
        if more:
            console.say(f"--rotate parts the output from the embedding: {more:,} parameters more, before any cut.")
    structure = budgeted(structure, whole, recipe, dtype)
    if recipe.cost == "latency":
        entry = journal.read("latency")
        structure = with_latency(
            structure, student, timed_inputs(dense, recipe, feed), seed=recipe.seed, round_to=recipe.round_to,
            table=recipe.latency_table if entry is None else entry.facts, console=console,
        )  # fmt: skip
        if recipe.budget is not None:  # no state is left of a run that cannot be
            least = min(recipe.budget) if isinstance(recipe.budget, tuple) else recipe.budget
            make_budget(structure.costs.of("latency"), structure.sites, keep=least, scope=recipe.scope,
                        round_to=recipe.round_to)  # fmt: skip
        if entry is None:
            journal.write("latency", {}, structure.costs.latency.to_dict())
    if recipe.vanilla:
        structure, uncut = plain_structure(
            whole, structure, structure.costs.of(recipe.cost), round_to=recipe.round_to,
            kinds=kinds if recipe.kinds else (),
        )  # fmt: skip
        for kind, reason in uncut.items():
            console.say(f"'{kind}' stays whole for plain transformers: {reason}")
    if bits(recipe):
        structure = replace(structure, compact=partial(_compact_source, source, whole))
    choice = Choice(
        recipe.score, recipe.shares, recipe.seed, replace(feed.objective, axes=structure.axes), batches, feed.train,
        judge=dense, teacher=dense if recipe.distill != "none" else None,
        settings=phases(recipe, feed.objective)[0], accelerator=accelerator, console=console,
        probe_steps=probe_steps(recipe.probe_steps, recipe.recover_steps), reconstruct=recipe.reconstruct,
        start=recipe.start, lora=lora_of(recipe), frozen=recipe.mode == "faster", journal=journal,
    )  # fmt: skip
    return student, structure, choice, kinds, counts


def _compact_source(
    source: Source, skeleton: PreTrainedModel, student: PreTrainedModel, plan: PruningPlan
) -> PreTrainedModel:
    """The full-precision weights that a plan keeps, with what the masks of a quantised student learned folded in."""
    means = {name: mask.mu.detach().cpu() for name, mask in getattr(student, MASKS).items()}
    return compact_checkpoint(source, skeleton, plan, means=means).to(student.device)


def token_use(
    model: PreTrainedModel,
    kinds: tuple[str, ...],
    counts: torch.Tensor | None,
    batches: list[Batch],
    objective: Objective,
) -> TokenUse | None:
    """What the data make of the token embedding, where its directions are cut; None for models that read no tokens."""
    if counts is None or "embedding_rank" not in kinds or not find_family(model.config.model_type).factorizes:
        return None
    if came_factorized(model):  # its directions are in order already
        return None
    return TokenUse(counts, gradient_moment(model, batches, objective))


def timed_inputs(model: PreTrainedModel, recipe: Recipe, feed: Feed) -> Batch:
    """What a forward pass is timed on: made-up texts, or held-out pictures."""
    if feed.probe() is None:
        return timed_text(model, recipe.batch_size, recipe.max_length)
    return feed.example(min(recipe.batch_size, 16))


def choose_and_compact_(
    student: nn.Module,
    structure: Structure,
    budget: Budget,
    choice: Choice,
    *,
    pressure: dict[str, float] | None = None,
) -> tuple[nn.Module, PruningPlan, dict]:
    """Scores the units, shares the cut between kinds, learns where the score is learned, and cuts.

    What decided it is returned too, as `ibprune.decisions.make_decision` has it.

    Args:
        pressure: The shares, where a search has found them, by `pool_of`: pool p keeps exp(-t * pressure[p]) of its
            units.
    """
    sites, notes = structure.sites, {}
    masks, scores, keep = one_shot(student, structure, budget, choice, pressure=pressure) if sites else (None, {}, {})
    if sites and is_learned(choice):
        start = per_cost(scores, structure, budget)
        keep, _, notes = learn_keep(student, masks, structure, budget, start, keep, choice)
    if sites and (choice.reconstruct or not is_learned(choice)):
        keep = refit_(student, masks, sites, keep, choice)
    keep = as_before(choice.journal, "kept units", keep)
    plan = structure.plan(student, keep)
    path = make_path(notes.get("path", []), [[choice.settings.steps, budget.keep]], budget)
    kinds = notes.get("kinds") or rank_kinds(scores, present(keep, sites, structure.costs.params), sites)
    decision = make_decision(ranked_by(choice), kinds, path)
    return structure.compact(student, plan), plan, decision


def is_learned(choice: Choice) -> bool:
    """Whether what stays is found while the weights train."""
    return choice.score in LEARNED and choice.settings.steps > 0


def ranked_by(choice: Choice) -> str:
    """The score that ranks in the end: one that is learned starts from another, and without steps stays there."""
    return choice.score if is_learned(choice) else ranking(choice.score, choice.start)


def as_before(journal: Journal, name: str, keep: Keep) -> Keep:
    """The units that stay, or those that stayed when the run was here before: weights recovered since are theirs.

    On a GPU the same steps may round to another order of the units.
    """
    entry = journal.read(name)
    if entry is not None:
        return {site: tuple(units.tolist()) for site, units in entry.tensors.items()}
    keep = shared(keep)
    journal.write(name, {site: torch.tensor(units, dtype=torch.int64) for site, units in keep.items()})
    return keep


def per_cost(scores: dict[str, torch.Tensor], structure: Structure, budget: Budget) -> dict[str, torch.Tensor]:
    """Channels of one kind differ in cost, and what is learned is ranked per cost."""
    cost_model = structure.costs.of(budget.cost)
    return {
        name: score / max(cost_model.unit_cost(cost_model.n_units, name), 1)  # of a latency it may be 0
        if structure.sites[name].kind in MODULE_KINDS
        else score
        for name, score in scores.items()
    }


def learn_keep(
    student: nn.Module,
    masks: MaskSet,
    structure: Structure,
    budget: Budget,
    start: dict[str, torch.Tensor],
    target: Keep,
    choice: Choice,
    *,
    steps: int | None = None,
    before: int = 0,
    **more: object,
) -> tuple[Keep, dict[str, torch.Tensor], dict]:
    """The units that stay after mask learning, their scores, and what was noted (`ibprune.vib.MaskLearning`).

    Args:
        steps: By default all of the choice's.
        before: Steps already made of those.
        more: For `learn_masks`.
    """

    def rescored() -> dict[str, torch.Tensor]:
        return per_cost(shared(score_units(student, structure.sites, masks, choice)), structure, budget)

    settings = choice.settings
    if steps is not None:
        left = settings.steps - before - steps
        settings = replace(settings, steps=steps, before=before, after=settings.after and settings.after + left)
    loss_of = loss_with(choice.objective, choice.teacher, choice.accelerator)
    keep, scores, state = learn_masks(
        student, masks, structure.sites, structure.costs.of(budget.cost), budget, start, target, loss_of,
        choice.make_batches, settings, accelerator=choice.accelerator, console=choice.console, frozen=choice.frozen,
        journal=choice.journal, rescore=None if choice.score == "vib" else rescored, **more,
    )  # fmt: skip
    return keep, scores, state.notes


def one_shot(
    student: nn.Module,
    structure: Structure,
    budget: Budget,
    choice: Choice,
    *,
    ranked: RankedRows | None = None,
    feed: Feed | None = None,
    pressure: dict[str, float] | None = None,
) -> tuple[MaskSet, dict[str, torch.Tensor], Keep]:
    """The student's masks, all open, the scores, and the units that one-shot scores would keep under the budget.

    Args:
        ranked, feed: The rows of the vocabulary, where they are to be cut, and the texts that a cut is read through.
        pressure: As in `choose_and_compact_`; nothing is searched then.
    """
    sites, cost_model = structure.sites, structure.costs.of(budget.cost)
    masks = inject_(student, sites)
    batches, objective, accelerator = choice.batches, choice.objective, choice.accelerator
    first = "vocabulary " if ranked is not None else ""  # cut before the rest, with scores and shares of its own
    scores = choice.journal.once(
        f"{first}scores", lambda: score_units(student, {name: sites[name] for name in masks}, masks, choice)
    )
    if ranked is not None:
        scores["vocab"] = ranked.scores

    def probed() -> dict[str, torch.Tensor]:
        few = batches[: max(1, PROBE // len(next(iter(batches[0].values()))))]
        read = None if ranked is None else reader(feed, CALIBRATION, accelerator.device)
        loss_of = probe_loss(student, masks, choice.judge, few, objective, accelerator, read=read)
        recovered = None
        if choice.probe_steps:
            settings = for_adapters(replace(choice.settings, steps=choice.probe_steps, after=0), choice.lora)
            recovered = recovered_loss(student, structure, choice, settings, read=read)
        found = probe_shares(
            loss_of, scores, sites, cost_model, budget, console=choice.console, recovered_loss_of=recovered
        )
        return {name: torch.tensor(units, dtype=torch.int64) for name, units in found.items()}

    if pressure is not None:
        keep = solve_by_shares(scores, sites, cost_model, budget, pressure, effective=True)
    elif choice.shares == "probe":
        found = choice.journal.once(f"{first}shares", probed)
        keep = {name: tuple(found[name].tolist()) for name in sites}
    elif choice.shares == "cost":
        keep = solve_by_cost(scores, sites, cost_model, budget)
    else:
        keep = solve_by_shares(scores, sites, cost_model, budget, equal_pressure(sites))
    masks.set_keep({name: tuple(range(site.n_units)) for name, site in sites.items()})
    return masks, scores, keep


def probe_steps(asked: int | None, recover_steps: int) -> int:
    """Steps of recovery that a candidate cut gets: as asked, or an eighth of the whole recovery."""
    return recover_steps // 8 if asked is None else asked


def lora_of(recipe: Recipe) -> Lora | None:
    """The adapters that a recipe's recovery trains; None where it trains all weights."""
    if recipe.recovery == "full":
        return None
    rank = recipe.lora_rank or RANK
    return Lora(rank, recipe.lora_alpha or 2.0 * rank)


def for_adapters(settings: TrainSettings, lora: Lora | None) -> TrainSettings:
    """The same at the rate that adapters take, where they are what trains."""
    return settings if lora is None else replace(settings, lr=ADAPTER_RATE * settings.lr)


def train_settings(recipe: Recipe, steps: int) -> TrainSettings:
    return TrainSettings(
        steps=steps, lr=recipe.lr, schedule=recipe.schedule, optimizer=recipe.optimizer,
        grad_accum=recipe.grad_accum, seed=recipe.seed, checkpointing=recipe.gradient_checkpointing,
    )  # fmt: skip


def phases(recipe: Recipe, objective: Objective) -> tuple[TrainSettings, TrainSettings]:
    """How a recipe's masks and its recovery train: for an encoder without a head each by itself, which did better."""
    settings, apart = train_settings(recipe, 0), recipe.mode == "faster" or objective.name == "encoder"
    return mask_and_recovery(settings, recipe.score, recipe.mask_steps, recipe.recover_steps, apart=apart)


def mask_and_recovery(
    settings: TrainSettings, score: str, mask_steps: int, recover_steps: int, *, apart: bool = False
) -> tuple[TrainSettings, TrainSettings]:
    """How the masks and the recovery train: on one schedule and on different batches, where the weights learn in both.

    Args:
        apart: Whether each has a schedule of its own all the same, as where the weights stay while masks are learned.
    """
    together = score in LEARNED and not apart
    first = replace(settings, steps=mask_steps, after=recover_steps if together else 0)
    if not (together and mask_steps):
        return first, replace(settings, steps=recover_steps)
    return first, replace(settings, steps=recover_steps, before=mask_steps, seed=settings.seed + 31)
