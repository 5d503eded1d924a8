"""The steps of a run in order: load, measure, cut, recover, measure again, export."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ibprune.audit_output import write_audit
from ibprune.auditing import Side as AuditSide
from ibprune.auditing import audit
from ibprune.bench import measure_latency, time_forward
from ibprune.budget import Budget
from ibprune.checksums import checksums
from ibprune.console import Quiet
from ibprune.costs import CostModel, count_params
from ibprune.cutting import cut, loss_with, on_kept_features, train_settings
from ibprune.data import TextData, hub_data
from ibprune.errors import BadData
from ibprune.evaluation import evaluate_model
from ibprune.features import default_pooling
from ibprune.feeding import Feed
from ibprune.folders import check_output, staged, verify, write_model
from ibprune.groups import Site
from ibprune.hub_folders import check_target, push
from ibprune.images import ImageData
from ibprune.inputs import MOST_INPUTS, encode_inputs, encode_pictures
from ibprune.measures import AuditSettings
from ibprune.mi.samples import BadSamples
from ibprune.model_card import model_card
from ibprune.models import check_finite
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe
from ibprune.report import Report, Side, Timer, versions
from ibprune.structure import Costs
from ibprune.subject import Subject, known_tokens, load_subject
from ibprune.trainer import make_accelerator, train
from ibprune.training import finetune_
from ibprune.vocabulary import compare_tokenizers

TEXTS = 2000  # held-out texts on which tokenizers are compared


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns: the pruned model in eval mode, the plan, and the dict of report.json."""

    model: PreTrainedModel
    plan: PruningPlan
    report: dict


def run(recipe: Recipe, console: Quiet) -> PruneResult:
    """Carries out a recipe. The output folder appears complete, or not at all; then it is pushed, if asked for."""
    folder = check_output(recipe.output, model=recipe.model)
    if recipe.push_to_hub:
        check_target(recipe.push_to_hub, private=recipe.private, revision=recipe.revision, empty=True)
    command = recipe.command()
    timer = Timer()
    with timer("load"):
        accelerator = make_accelerator(recipe.precision, grad_accum=recipe.grad_accum, seed=recipe.seed)
        subject = load_subject(recipe, console)
    recipe, source, data, feed, loaded = subject.recipe, subject.source, subject.data, subject.feed, subject.loaded
    dense = loaded.model.to(accelerator.device)
    if loaded.new_head:
        console.say("The checkpoint has no head for this task.")
    with timer("finetune"), known_tokens(subject):
        finetune_(dense, recipe, feed, accelerator, console, needed=loaded.new_head)
    with timer("evaluate"), known_tokens(subject):
        dense_metrics = evaluate_model(dense, feed, feed.objective, console=console, what="evaluating dense")
    with timer("cut"):
        student, plan, budget, structure, own_feed = cut(dense, recipe, feed, accelerator, console, found=subject.found)
    objective = on_kept_features(feed.objective, plan)
    with timer("recover"):
        teacher = dense if recipe.distill else None
        steps = train_settings(recipe, recipe.recover_steps)
        train(student, loss_with(objective, teacher, accelerator), own_feed.train, steps,
              accelerator=accelerator, phase="recovering", console=console)  # fmt: skip
    check_finite(student, "the recovered model")
    student = student.to(loaded.dtype).float()  # what is measured is what is stored
    with timer("evaluate"):
        metrics = evaluate_model(student, own_feed, objective, dense=dense, console=console, what="evaluating pruned")
    texts = []
    if own_feed is not feed:  # the vocabulary was cut
        texts = [text for column in data.text_columns for text in data.held_out[:TEXTS][column]]
    with timer("audit"):
        audited, why_not = _audit(dense, student, plan, data, (feed, own_feed), recipe, console)
        if why_not and recipe.audit:
            console.say(f"No audit: {why_not}")
    with timer("bench"):
        shape, latencies = _latency(dense, student, recipe, feed, console)
    costs = structure.costs
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
        command=command,
        hub={
            "model": None if Path(source.name).is_dir() else source.name,
            "data": hub_data(recipe.task, recipe.data),
        },
        kept=kept_by_kind(plan, structure.everything),
        vocabulary=compare_tokenizers(feed.preprocessor, own_feed.preprocessor, texts) if texts else None,
        pictures=feed.pictures(),
        refused=subject.found.refused if subject.found else {},
        audit="audit.json" if audited is not None else None,
        audit_note=why_not,
        world_size=accelerator.num_processes,
        device=str(accelerator.device),
        precision="fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        timings_s=timer.seconds,
        versions=versions(),
    )
    console.say("writing and checking the folder in a fresh process")
    with staged(folder) as temporary:
        _export(student, dense, subject, own_feed, plan, report, audited, texts, temporary, folder)
    if recipe.push_to_hub:
        console.say(f"{folder} is written; pushing it to {recipe.push_to_hub}")
        url = push(folder, recipe.push_to_hub, private=recipe.private, revision=recipe.revision,
                   commit_message=recipe.commit_message)  # fmt: skip
        console.say(f"pushed: {url}")
    return PruneResult(student.eval(), plan, report.to_dict())


def _export(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    subject: Subject,
    feed: Feed,
    plan: PruningPlan,
    report: Report,
    audited: dict | None,
    texts: list[str],
    folder: Path,
    final: Path,
) -> None:
    """Writes everything into the staged folder and proves that it loads.

    Args:
        feed: Of the student. Loaded again, its tokenizer must make the same tokens of the `texts`.
    """
    dtype = subject.loaded.dtype
    student = student.to(dtype)
    tier = write_model(student, feed.preprocessor, plan, folder)
    subject.recipe.save(folder / "recipe.yaml")
    report.verify = verify(student, folder, tier, feed.probe(), tokenizer=feed.preprocessor, texts=texts)
    student.float()
    report.dense.file_bytes = count_params(dense) * dtype.itemsize
    report.pruned.file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if audited is not None:
        write_audit(audited, folder)
    report.sha256 = checksums(folder)
    report.save(folder / "report.json")
    (folder / "README.md").write_text(model_card(report.to_dict(), audited, name=final.name))


def _audit(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    plan: PruningPlan,
    data: TextData | ImageData,
    feeds: tuple[Feed, Feed],
    recipe: Recipe,
    console: Quiet,
) -> tuple[dict | None, str]:
    """The audit of both models, each with its feed, on the held-out rows.

    Or None and why there is none: no run is lost for it.
    """
    if not recipe.audit:
        return None, "--no-audit"
    settings = AuditSettings(pooling=default_pooling(dense), seed=recipe.seed)
    sides = AuditSide(recipe.model, dense), AuditSide(recipe.output, student)
    try:
        if isinstance(data, ImageData):
            inputs = encode_pictures(feeds[0].collate.judging(), most=MOST_INPUTS)
        else:
            tokenizer, own = (feed.preprocessor for feed in feeds)
            own = None if own is tokenizer else own
            inputs = encode_inputs(data, tokenizer, max_length=recipe.max_length, most=MOST_INPUTS, own=own)
        return audit(*sides, inputs, settings=settings, plan=plan, console=console), ""
    except (BadData, BadSamples) as error:
        return None, str(error)


def _latency(
    dense: PreTrainedModel, student: PreTrainedModel, recipe: Recipe, feed: Feed, console: Quiet
) -> tuple[dict[str, int], tuple[dict[str, float], dict[str, float]]]:
    """What both models read, and their milliseconds."""
    batch = min(recipe.batch_size, 16)
    if feed.probe() is None:
        shape = {"batch": batch, "length": min(recipe.max_length, 64)}
        return shape, measure_latency(dense, student, **shape, console=console)
    inputs = feed.example(batch)
    shape = dict(zip(("batch", "channels", "height", "width"), inputs["pixel_values"].shape))
    return shape, time_forward(dense, student, inputs, console=console)


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


def kept_by_kind(plan: PruningPlan, sites: dict[str, Site]) -> dict[str, float]:
    """Kept share of the units of each kind; sub-layers of attention and FFN together are "layers"."""
    totals: dict[str, list[int]] = {}
    for name, units in plan.keep.items():
        kind = sites[name].kind
        totals.setdefault(kind, [0, 0])
        totals[kind][0] += len(units)
        totals[kind][1] += plan.n_units[name]
    return {kind: kept / total for kind, (kept, total) in totals.items()}
