"""The steps of a run in order: load, measure, cut, recover, measure again, export."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from ibprune.audit_output import write_audit
from ibprune.auditing import Side as AuditSide
from ibprune.auditing import audit
from ibprune.budget import Budget, present
from ibprune.checksums import write_report
from ibprune.console import Quiet
from ibprune.costs import CostModel
from ibprune.cutting import cut, for_adapters, lora_of, phases, timed_inputs
from ibprune.data import TextData, hub_data
from ibprune.decisions import write_decision
from ibprune.distillation import loss_with, on_kept_features
from ibprune.engine import finish_trackers, make_accelerator
from ibprune.errors import BadData
from ibprune.estimating import warn_of_memory
from ibprune.evaluation import evaluate_model
from ibprune.features import default_pooling
from ibprune.feeding import Feed
from ibprune.folders import check_output, staged, verify, write_model
from ibprune.hub_folders import check_target, push
from ibprune.images import ImageData
from ibprune.inputs import MOST_INPUTS, encode_inputs, encode_pictures
from ibprune.latency import LATENCY, LatencyTable
from ibprune.lora import adapted
from ibprune.losses import Objective
from ibprune.measures import AuditSettings
from ibprune.mi.samples import BadSamples
from ibprune.model_card import model_card
from ibprune.models import check_finite
from ibprune.optimizers import check_optimizer
from ibprune.plans import PruningPlan
from ibprune.processes import check_batch_size, on_main
from ibprune.quantised import bits, flag
from ibprune.recipe import Recipe
from ibprune.report import Report, Side, Timer, versions
from ibprune.report_page import write_page
from ibprune.resuming import FolderJournal, open_journal
from ibprune.structure import Costs, Structure
from ibprune.subject import Subject, fingerprints, known_tokens, load_subject
from ibprune.timing import time_forward
from ibprune.trainer import TrainState, Validation, train
from ibprune.training import finetune_
from ibprune.vocabulary import compare_tokenizers

TEXTS = 2000  # held-out texts on which tokenizers are compared


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns: the pruned model in eval mode, the plan, and the dict of report.json.

    A model to train on and save again is that of the folder (`ibprune.load`), whose config says what shapes there are.
    """

    model: PreTrainedModel
    plan: PruningPlan
    report: dict


@dataclass(frozen=True)
class Job:
    """A dense model bound to its data, trained where it must be, and measured: what every cut of it starts from.

    Attributes:
        recipe: As it was given; `subject.recipe` has the defaults filled in.
        dense: On the device.
        metrics: Of the dense model.
    """

    recipe: Recipe
    subject: Subject
    dense: PreTrainedModel
    metrics: dict[str, float]
    accelerator: Accelerator
    journal: FolderJournal
    timer: Timer
    console: Quiet


@dataclass(frozen=True)
class Pruned:
    """A model that was cut and has recovered.

    Attributes:
        feed: Of what it reads.
        decision: What decided which units stay (`ibprune.decisions.make_decision`).
        objective: As it was trained and judged.
        metrics: Of the model as it is stored.
        recovery: What the report says of how it recovered.
    """

    model: PreTrainedModel
    plan: PruningPlan
    budget: Budget
    structure: Structure
    feed: Feed
    decision: dict
    objective: Objective
    metrics: dict[str, float]
    recovery: dict


def run(recipe: Recipe, console: Quiet) -> PruneResult:
    """Carries out a recipe. The output folder appears complete, or not at all; then it is pushed, if asked for."""
    folder = check_output(recipe.output, model=recipe.model)
    if recipe.push_to_hub:
        check_target(recipe.push_to_hub, private=recipe.private, revision=recipe.revision, empty=True)
    with open_journal(recipe, folder, console) as journal:
        job = begin(recipe, journal, console)
        with job.timer("cut"):
            found = cut(job.dense, job.subject.recipe, job.subject.feed, job.accelerator, console,
                        found=job.subject.found, dtype=job.subject.loaded.dtype, source=job.subject.source,
                        journal=journal)  # fmt: skip
        return finish(job, recover(job, *found), folder)


def begin(
    recipe: Recipe, journal: FolderJournal, console: Quiet, *, check: Callable[[Subject], None] | None = None
) -> Job:
    """Loads what a recipe names, trains a head that is new, and measures the dense model.

    Args:
        check: Looks at what was loaded before anything is trained.
    """
    timer = Timer()
    with timer("load"):
        accelerator = make_accelerator(
            recipe.precision, grad_accum=recipe.grad_accum, seed=recipe.seed, log_with=recipe.log_with,
            logs=f"{recipe.output}.logs",
        )  # fmt: skip
        check_batch_size(recipe.batch_size)
        check_optimizer(recipe.optimizer, accelerator.device)
        subject = load_subject(recipe, console)
    if check is not None:
        check(subject)
    if recipe.eval_every:
        subject = replace(subject, feed=subject.feed.holding_back())
        console.say(f"{len(subject.feed.held_back):,} training rows are held back: they judge the recovery as it goes")
    feed, loaded = subject.feed, subject.loaded
    shape = feed.pictures()
    warn_of_memory(subject.recipe, loaded.model, feed.objective, shape and tuple(shape["shape"]), console)
    dense = loaded.model.to(accelerator.device)
    journal.bind(fingerprints(subject), feed.generator)
    if loaded.new_head:
        console.say("The checkpoint has no head for this task.")
    with timer("finetune"), known_tokens(subject):
        finetune_(dense, subject.recipe, feed, accelerator, console, needed=loaded.new_head, journal=journal)
    if recipe.mode != "full":
        feed = feed.thinned()
        subject = replace(subject, feed=feed)
        console.say(f"mode {recipe.mode}: masks and recovery learn from {len(feed.few):,} rows")
    with timer("evaluate"), known_tokens(subject):
        metrics = evaluate_model(dense, feed, feed.objective, console=console, what="evaluating dense")
    return Job(recipe, subject, dense, metrics, accelerator, journal, timer, console)


def recover(
    job: Job,
    student: PreTrainedModel,
    plan: PruningPlan,
    budget: Budget,
    structure: Structure,
    feed: Feed,
    decision: dict,
    *,
    phase: str = "recovering",
) -> Pruned:
    """Trains what `cut` left, and measures it."""
    recipe, console = job.subject.recipe, job.console
    objective = on_kept_features(replace(job.subject.feed.objective, axes=structure.axes), plan)
    with job.timer("recover"):
        teacher = job.dense if recipe.distill != "none" else None
        _, steps = phases(recipe, objective)
        validation = None
        if recipe.eval_every:
            validation = Validation(lambda: feed.judging(feed.held_back), recipe.eval_every, recipe.patience)
        lora = lora_of(recipe)
        with adapted(student, lora) as trained:
            state = train(
                student, loss_with(objective, teacher, job.accelerator), feed.train, for_adapters(steps, lora),
                accelerator=job.accelerator, phase=phase, console=console, validation=validation, journal=job.journal,
            )  # fmt: skip
    check_finite(student, "the recovered model")
    student = student.to(job.subject.loaded.dtype).float()  # what is measured is what is stored
    with job.timer("evaluate"):
        metrics = evaluate_model(student, feed, objective, dense=job.dense, console=console, what="evaluating pruned")
    return Pruned(student, plan, budget, structure, feed, decision, objective, metrics,
                  recovery_record(recipe, state, trained, feed))  # fmt: skip


def recovery_record(recipe: Recipe, state: TrainState, trained: int, feed: Feed) -> dict:
    """What a report says of a recovery.

    Args:
        trained: Parameters that it trained.
    """
    record = {"recovery": recipe.recovery, "trained_params": trained, "steps": state.step}
    if recipe.recovery == "lora":
        lora = lora_of(recipe)
        record |= {"lora_rank": lora.rank, "lora_alpha": lora.alpha}
    if state.validation:
        step, loss = state.validation[state.best]
        record |= {"held_back": len(feed.held_back), "best_step": step, "best_loss": loss}
        record["validation"] = state.validation
    return record


def finish(job: Job, pruned: Pruned, folder: Path, **more: object) -> PruneResult:
    """Audits, times, writes and checks a pruned model, and pushes it where that is asked for; the run is done.

    Args:
        more: Further fields of the report.
    """
    recipe, console = job.recipe, job.console
    result = write(job, pruned, folder, **more)
    job.journal.remove()
    finish_trackers(job.accelerator, job.metrics, pruned.metrics)
    if recipe.push_to_hub:
        console.say(f"{folder} is written; pushing it to {recipe.push_to_hub}")
        how = {"private": recipe.private, "revision": recipe.revision, "commit_message": recipe.commit_message}
        url = on_main(lambda: push(folder, recipe.push_to_hub, **how))
        console.say(f"pushed: {url}")
    return result


def write(job: Job, pruned: Pruned, folder: Path, **more: object) -> PruneResult:
    """Audits, times, writes and checks a pruned model: the main process does."""
    report = on_main(lambda: _write(job, pruned, folder, **more))
    return PruneResult(pruned.model.eval(), pruned.plan, report)


def _write(job: Job, pruned: Pruned, folder: Path, **more: object) -> dict:
    subject, dense, console, timer, accelerator = job.subject, job.dense, job.console, job.timer, job.accelerator
    student, plan, budget, own_feed = pruned.model, pruned.plan, pruned.budget, pruned.feed
    recipe, source, data, feed = subject.recipe, subject.source, subject.data, subject.feed
    texts = []
    if own_feed is not feed:  # the vocabulary was cut
        texts = [text for column in data.text_columns for text in data.held_out[:TEXTS][column]]
    with timer("audit"):
        audited, why_not = _audit(dense, student, plan, data, (feed, own_feed), recipe, console)
        if why_not and recipe.audit:
            console.say(f"No audit: {why_not}")
    with timer("bench"):
        shape, latencies = _latency(dense, student, recipe, feed, console)
    costs = pruned.structure.costs
    report = Report(
        dense=side(costs, None, job.metrics, latencies[0]),
        pruned=side(costs, plan.kept(), pruned.metrics, latencies[1]),
        budget=costs.achieved(budget, plan),
        score=recipe.score,
        shares=recipe.shares,
        seed=recipe.seed,
        recovery=pruned.recovery,
        resumed=job.journal.resumed,
        overlap=subject.overlap,
        model=source.name,
        data=data.name,
        objective=feed.objective.name,
        macs_length=costs.macs.length,
        latency_input=shape,
        command=job.recipe.command(),
        first=subject.first,
        hub={
            "model": None if Path(source.name).is_dir() else source.name,
            "data": hub_data(recipe.task, recipe.data),
        },
        kept=kept_by_kind(plan, pruned.structure),
        quantised=bits(recipe) or None,
        directions=[len(plan.keep["hidden"]), plan.n_units["hidden"]] if plan.rotated else None,
        vocabulary=compare_tokenizers(feed.preprocessor, own_feed.preprocessor, texts) if texts else None,
        pictures=feed.pictures(),
        refused=subject.found.refused if subject.found else {},
        audit="audit.json" if audited is not None else None,
        audit_note=why_not,
        world_size=accelerator.num_processes,
        device=str(accelerator.device),
        precision="fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        timings_s=dict(timer.seconds),
        versions=versions(),
        **more,
    )
    console.say("writing and checking the folder in a fresh process")
    with staged(folder, kept=job.journal.kept()) as temporary:
        _export(pruned, dense, subject, report, audited, texts, costs.latency, temporary, folder)
    return report.to_dict()


def _export(
    pruned: Pruned,
    dense: PreTrainedModel,
    subject: Subject,
    report: Report,
    audited: dict | None,
    texts: list[str],
    latency: LatencyTable | None,
    folder: Path,
    final: Path,
) -> None:
    """Writes everything into the staged folder and proves that it loads.

    Args:
        texts: Of which the pruned model's tokenizer, loaded again, must make the same tokens.
    """
    dtype, feed = subject.loaded.dtype, pruned.feed
    student = pruned.model.to(dtype)
    tier = write_model(student, feed.preprocessor, pruned.plan, folder)
    subject.recipe.save(folder / "recipe.yaml")
    write_decision(pruned.decision, folder)
    if latency is not None:
        latency.save(folder / LATENCY)
    report.verify = verify(student, folder, tier, feed.probe(), tokenizer=feed.preprocessor, texts=texts)
    student.float()
    report.dense.file_bytes = report.dense.params * dtype.itemsize
    report.pruned.file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if audited is not None:
        write_audit(audited, folder)
    written = write_report(report.to_dict(), folder)
    report.sha256, report.own_sha256 = written["sha256"], written["own_sha256"]
    name = f"{Path(subject.recipe.output).name}/{final.name}" if report.budgets else final.name
    (folder / "README.md").write_text(model_card(written, audited, name=name))
    write_page(folder)


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
    if bits(recipe):  # no layer of which equals the pruned model's
        return None, f"{flag(recipe)}: `ibprune audit` compares the folder with the full-precision model"
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
    smaller = min(dense, student, key=lambda model: getattr(model.config, "vocab_size", 0))  # its token ids are both's
    inputs = timed_inputs(smaller, recipe, feed)
    names = ("batch", "length") if feed.probe() is None else ("batch", "channels", "height", "width")
    shape = dict(zip(names, next(iter(inputs.values())).shape))
    return shape, time_forward(dense, student, inputs, console=console)


def side(costs: Costs, kept: dict[str, int] | None, metrics: dict[str, float], latency: dict[str, float]) -> Side:
    """What a model costs that keeps so many units of each site; the dense model where there is no number."""

    def cost(model: CostModel, scope: str) -> int:
        return model.of_dense(scope=scope) if kept is None else model(kept, scope=scope)

    return Side(
        params=cost(costs.params, "model"),
        macs=cost(costs.macs, "model"),
        file_bytes=0,
        metrics=metrics,
        latency_ms=latency,
        params_blocks=cost(costs.params, "blocks"),
        macs_blocks=cost(costs.macs, "blocks"),
        memory_bytes=cost(costs.memory.model, "model") if costs.memory else None,
    )


def kept_by_kind(plan: PruningPlan, structure: Structure) -> dict[str, float]:
    """Kept share of the units of each kind; sub-layers of attention and FFN together are "layers"."""
    totals: dict[str, list[int]] = {}
    sites = {name: structure.everything[name] for name in plan.keep}
    for name, units in present(plan.keep, sites, structure.costs.params).items():
        kind = sites[name].kind
        totals.setdefault(kind, [0, 0])
        totals[kind][0] += len(units)
        totals[kind][1] += plan.n_units[name]
    return {kind: kept / total for kind, (kept, total) in totals.items()}
