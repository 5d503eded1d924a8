"""The steps of a run in order: load, measure, cut, recover, measure again, export."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from ibprune.audit_output import audit_section, write_audit
from ibprune.auditing import Side as AuditSide
from ibprune.auditing import audit
from ibprune.bench import measure_latency
from ibprune.budget import Budget
from ibprune.console import Quiet
from ibprune.costs import CostModel, count_params
from ibprune.cutting import Costs, cut, loss_with, train_settings
from ibprune.data import TextData
from ibprune.errors import BadData
from ibprune.evaluation import evaluate_model
from ibprune.export import check_output, staged, verify, write_model
from ibprune.features import default_pooling
from ibprune.feeding import Feed, find_data, make_feed
from ibprune.groups import KINDS
from ibprune.inputs import MOST_INPUTS, encode_inputs
from ibprune.labels import match_labels
from ibprune.losses import Objective
from ibprune.measures import AuditSettings
from ibprune.mi.samples import BadSamples
from ibprune.model_card import model_card
from ibprune.models import Loaded, check_finite, find_source, load_config, load_dense
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe
from ibprune.report import Report, Side, versions
from ibprune.task_heads import auto_class
from ibprune.trainer import make_accelerator, train
from ibprune.vocabulary import compare_tokenizers

TEXTS = 2000  # held-out texts on which tokenizers are compared


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns: the pruned model in eval mode, the plan, and the dict of report.json."""

    model: PreTrainedModel
    plan: PruningPlan
    report: dict


def run(recipe: Recipe, console: Quiet) -> PruneResult:
    """Carries out a recipe. The output folder appears complete, or not at all."""
    folder = check_output(recipe.output, model=recipe.model)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        accelerator = make_accelerator(recipe.precision, grad_accum=recipe.grad_accum, seed=recipe.seed)
        source = find_source(recipe.model)
        if source.note:
            console.say(source.note)
        data = find_data(recipe, console)
        data = match_labels(data, load_config(source), source.name)
        if data.note:
            console.say(data.note)
        n_labels = (len(data.labels) or 1) if data.label_column else None
        loaded = load_dense(source, n_labels=n_labels, regression=bool(data.label_column and not data.labels))
        if loaded.new_head and data.labels:
            loaded.model.config.id2label = dict(enumerate(data.labels))
            loaded.model.config.label2id = {label: i for i, label in enumerate(data.labels)}
        recipe, feed = make_feed(recipe, loaded.model, loaded.tokenizer, data)
        dense = loaded.model.to(accelerator.device)
    console.say(
        f"{type(dense).__name__} of {source.name}: {count_params(dense):,} parameters; "
        f"{data.name}: {len(feed.train_set):,} training rows; {feed.objective.name}"
    )
    with _timed(seconds, "finetune"):
        finetune_(dense, recipe, feed, accelerator, console, new_head=loaded.new_head)
    with _timed(seconds, "evaluate"):
        try:
            dense_metrics = evaluate_model(dense, feed, feed.objective, console=console, what="evaluating dense")
        except IndexError as error:
            rows = dense.get_input_embeddings().num_embeddings
            raise BadData(
                f"the tokenizer of '{source.name}' makes token ids beyond the model's {rows:,} embeddings: they do not "
                "belong together."
            ) from error
    with _timed(seconds, "cut"):
        student, plan, budget, costs, own_feed = cut(dense, recipe, feed, accelerator, console)
    objective = _on_kept_features(feed.objective, plan)
    with _timed(seconds, "recover"):
        teacher = dense if recipe.distill else None
        steps = train_settings(recipe, recipe.recover_steps)
        train(student, loss_with(objective, teacher, accelerator), own_feed.train, steps,
              accelerator=accelerator, phase="recovering", console=console)  # fmt: skip
    check_finite(student, "the recovered model")
    student = student.to(loaded.dtype).float()  # what is measured is what is stored
    with _timed(seconds, "evaluate"):
        metrics = evaluate_model(student, own_feed, objective, dense=dense, console=console, what="evaluating pruned")
    own, texts = loaded, []
    if own_feed is not feed:  # the vocabulary was cut
        own = replace(loaded, tokenizer=own_feed.collate.tokenizer)
        texts = [text for column in data.text_columns for text in data.held_out[:TEXTS][column]]
    with _timed(seconds, "audit"):
        found = None
        if recipe.audit and texts:
            console.say("No audit: the two models read different tokens, because the vocabulary was cut.")
        elif recipe.audit:
            found = _audit(dense, student, plan, data, loaded, recipe, console)
    with _timed(seconds, "bench"):
        shape = {"batch": min(recipe.batch_size, 16), "length": min(recipe.max_length, 64)}
        latencies = measure_latency(dense, student, **shape, console=console)
    report = Report(
        dense=_side(costs, costs.params.n_units, dense_metrics, latencies[0]),
        pruned=_side(costs, plan.kept(), metrics, latencies[1]),
        budget=_budget_record(budget, costs.of(budget.cost), plan),
        score=recipe.score,
        shares=recipe.shares,
        seed=recipe.seed,
        model=source.name,
        data=data.name,
        objective=feed.objective.name,
        macs_length=costs.macs.length,
        latency_input=shape,
        kept=kept_by_kind(plan),
        vocabulary=compare_tokenizers(loaded.tokenizer, own.tokenizer, texts) if texts else None,
        world_size=accelerator.num_processes,
        device=str(accelerator.device),
        precision="fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        timings_s=seconds,
        versions=versions(),
    )
    console.say("writing and checking the folder in a fresh process")
    with staged(folder) as temporary:
        _export(student, dense, own, plan, recipe, report, found, texts, temporary, folder)
    return PruneResult(student.eval(), plan, report.to_dict())


def finetune_(
    model: PreTrainedModel, recipe: Recipe, feed: Feed, accelerator: Accelerator, console: Quiet, *, new_head: bool
) -> None:
    """Trains the dense model when its task head is new, or when steps are asked for."""
    steps = recipe.finetune_steps
    if steps is None:
        steps = min(2000, -(-len(feed.train_set) // recipe.batch_size)) if new_head else 0
    if steps and new_head:
        console.say(f"The checkpoint has no head for this task: training the dense model for {steps} steps first.")
    settings = replace(train_settings(recipe, steps), seed=recipe.seed + 17)  # other batches than the recovery's
    loss_of = loss_with(feed.objective, None, accelerator)
    train(model, loss_of, feed.train, settings, accelerator=accelerator, phase="training dense", console=console)


def _export(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    loaded: Loaded,
    plan: PruningPlan,
    recipe: Recipe,
    report: Report,
    found: dict | None,
    texts: list[str],
    folder: Path,
    final: Path,
) -> None:
    """Writes everything into the staged folder and proves that it loads.

    Args:
        loaded: With the tokenizer of the student; loaded again, it must make the same tokens of the `texts`.
    """
    student = student.to(loaded.dtype)
    tier = write_model(student, loaded.tokenizer, plan, folder)
    recipe.save(folder / "recipe.yaml")
    report.verify = verify(student, folder, tier, tokenizer=loaded.tokenizer, texts=texts)
    student.float()
    report.dense.file_bytes = count_params(dense) * loaded.dtype.itemsize
    report.pruned.file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report.save(folder / "report.json")
    auto = auto_class(type(student).__name__, student.config.model_type)
    card = model_card(report.to_dict(), auto_class=auto, folder=final.name)
    if found is not None:
        write_audit(found, folder)
        card += "\n" + audit_section(found)
    (folder / "README.md").write_text(card)


def _audit(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    plan: PruningPlan,
    data: TextData,
    loaded: Loaded,
    recipe: Recipe,
    console: Quiet,
) -> dict | None:
    """The audit of both models on the held-out texts, or None where there can be none: no run is lost for it."""
    settings = AuditSettings(pooling=default_pooling(dense), seed=recipe.seed)
    sides = AuditSide(recipe.model, dense), AuditSide(recipe.output, student)
    try:
        inputs = encode_inputs(data, loaded.tokenizer, max_length=recipe.max_length, most=MOST_INPUTS)
        return audit(*sides, inputs, settings=settings, plan=plan, console=console)
    except (BadData, BadSamples) as error:
        console.say(f"No audit: {error}")
        return None


def _side(costs: Costs, kept: dict[str, int], metrics: dict[str, float], latency: dict[str, float]) -> Side:
    return Side(
        params=costs.params(kept),
        macs=costs.macs(kept),
        file_bytes=0,
        metrics=metrics,
        latency_ms=latency,
        params_blocks=costs.params(kept, scope="blocks"),
        macs_blocks=costs.macs(kept, scope="blocks"),
    )


def _budget_record(budget: Budget, model: CostModel, plan: PruningPlan) -> dict:
    return {
        "cost": budget.cost,
        "scope": budget.scope,
        "keep": budget.keep,
        "limit": budget.limit,
        "achieved": model(plan.kept(), scope=budget.scope),
    }


def kept_by_kind(plan: PruningPlan) -> dict[str, float]:
    """Kept share of the units of each kind; sub-layers of attention and FFN together are "layers"."""
    totals: dict[str, list[int]] = {}
    for name, units in plan.keep.items():
        last = name.rpartition(".")[2]
        kind = last if last in KINDS else "layers" if last.endswith("_sublayer") else "hidden"
        totals.setdefault(kind, [0, 0])
        totals[kind][0] += len(units)
        totals[kind][1] += plan.n_units[name]
    return {kind: kept / total for kind, (kept, total) in totals.items()}


def _on_kept_features(objective: Objective, plan: PruningPlan) -> Objective:
    """Compares a narrower encoder with the same features of the dense one."""
    if objective.name != "encoder":
        return objective
    cut_dims = {
        site: plan.keep[site]
        for site in ("hidden", "pooler")
        if site in plan.keep and len(plan.keep[site]) < plan.n_units[site]
    }
    return replace(objective, dims=cut_dims.get("hidden"), pooler_dims=cut_dims.get("pooler"))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
