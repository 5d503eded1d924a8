"""Trains a dense model, as a run does before it prunes, and as the verb `train` does for its own sake."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from ibprune.checksums import write_report
from ibprune.console import Quiet
from ibprune.costs import count_params
from ibprune.cutting import train_settings
from ibprune.distillation import loss_with
from ibprune.engine import finish_trackers, make_accelerator
from ibprune.errors import BadRecipe
from ibprune.evaluation import evaluate_model
from ibprune.feeding import Feed
from ibprune.folders import check_output, staged, verify, write_model
from ibprune.models import check_finite
from ibprune.optimizers import check_optimizer
from ibprune.processes import check_batch_size, n_processes, on_main
from ibprune.recipe import Recipe
from ibprune.report import Timer, versions
from ibprune.resuming import NO_JOURNAL, FolderJournal, Journal, open_journal
from ibprune.subject import Subject, fingerprints, known_tokens, load_subject
from ibprune.trainer import train

SCHEMA = "ibprune.train_report/1"


def finetune_(
    model: PreTrainedModel,
    recipe: Recipe,
    feed: Feed,
    accelerator: Accelerator,
    console: Quiet,
    *,
    needed: bool,
    journal: Journal = NO_JOURNAL,
) -> int:
    """Trains the dense model for the steps asked for; by default for an epoch where it is needed. Returns the steps.

    Args:
        needed: Whether its task head, or all of it, is new.
    """
    steps = recipe.finetune_steps
    if steps is None:
        epoch = 2000 if feed.n_rows is None else -(-feed.n_rows // recipe.batch_size)
        steps = min(2000, epoch) if needed else 0
    if steps and feed.objective.name == "encoder":
        raise BadRecipe(
            "an encoder without a head has nothing to be trained on but a dense model: give labelled data and a "
            "classifier, or leave --finetune-steps out."
        )
    if steps:
        console.say(f"Training the dense model for {steps} steps.")
    settings = replace(train_settings(recipe, steps), seed=recipe.seed + 17)  # other batches than the recovery's
    loss_of = loss_with(feed.objective, None, accelerator)
    train(model, loss_of, feed.train, settings, accelerator=accelerator, phase="training dense", console=console,
          journal=journal)  # fmt: skip
    return steps


def train_dense(recipe: Recipe, console: Quiet) -> dict:
    """Trains the model that a recipe names and writes a folder that loads; the dict of its report.json.

    A folder with a config and no weights starts from random ones. The folder appears complete, or not at all.

    Raises:
        IBPruneError: Anything the user can mend, in one line.
    """
    folder = check_output(recipe.output, model=recipe.model)
    with open_journal(recipe, folder, console) as journal:
        return _train(recipe, folder, journal, console)


def _train(recipe: Recipe, folder: Path, journal: FolderJournal, console: Quiet) -> dict:
    timer = Timer()
    with timer("load"):
        accelerator = make_accelerator(
            recipe.precision, grad_accum=recipe.grad_accum, seed=recipe.seed, log_with=recipe.log_with,
            logs=f"{recipe.output}.logs",
        )  # fmt: skip
        check_batch_size(recipe.batch_size)
        check_optimizer(recipe.optimizer, accelerator.device)
        subject = load_subject(recipe, console, untrained=True)
    recipe, feed, loaded = subject.recipe, subject.feed, subject.loaded
    model = loaded.model.to(accelerator.device)
    journal.bind(fingerprints(subject), feed.generator)
    with timer("evaluate"), known_tokens(subject):
        before = evaluate_model(model, feed, feed.objective, console=console, what="evaluating before")
    with timer("train"), known_tokens(subject):
        steps = finetune_(model, recipe, feed, accelerator, console, needed=True, journal=journal)
    check_finite(model, "the trained model")
    model = model.to(loaded.dtype).float()  # what is measured is what is stored
    with timer("evaluate"):
        after = evaluate_model(model, feed, feed.objective, console=console, what="evaluating after")
    report = on_main(lambda: _write(model, subject, (before, after), steps, folder, journal, timer, console))
    journal.remove()
    finish_trackers(accelerator, before, after)
    return report


def _write(
    model: PreTrainedModel,
    subject: Subject,
    metrics: tuple[dict[str, float], dict[str, float]],
    steps: int,
    folder: Path,
    journal: Journal,
    timer: Timer,
    console: Quiet,
) -> dict:
    recipe, feed, dtype = subject.recipe, subject.feed, subject.loaded.dtype
    report = {
        "schema": SCHEMA,
        "model": subject.source.name,
        "first": subject.first,
        "data": subject.data.name,
        "objective": feed.objective.name,
        "params": count_params(model),
        "metrics": dict(zip(("before", "after"), metrics)),
        "steps": steps,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "seed": recipe.seed,
        "resumed": journal.resumed,
        "overlap": subject.overlap,
        "pictures": feed.pictures(),
        "world_size": n_processes(),
        "device": str(model.device),
        "timings_s": timer.seconds,
        "versions": versions(),
    }
    console.say("writing and checking the folder in a fresh process")
    with staged(folder, kept=journal.kept()) as temporary:
        model.to(dtype)
        tier = write_model(model, feed.preprocessor, None, temporary)
        report["verify"] = verify(model, temporary, tier, feed.probe())
        return write_report(report, temporary)
