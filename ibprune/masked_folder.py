"""The folder of a model that was cut in a training loop of one's own; its report says what it cannot know."""

import copy
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ibprune.budget import Budget
from ibprune.checksums import write_report
from ibprune.console import Quiet
from ibprune.decisions import write_decision
from ibprune.folders import staged, verify, write_model
from ibprune.model_card import model_card
from ibprune.models import build_model
from ibprune.pipeline import kept_by_kind, side
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe
from ibprune.report import Report, versions
from ibprune.report_page import write_page
from ibprune.sizing import OBJECTIVES
from ibprune.structure import Structure
from ibprune.surgery import SPEC
from ibprune.task_heads import auto_class
from ibprune.timing import time_forward, timed_text

LENGTH = 64  # tokens of a text that is timed, where the model reads so many
UNKNOWN = (
    "It was trained in a loop of its own. What it was trained on, and how, nobody told: there is no data set, no "
    "metric, no recipe and no audit here, and the seed is that of the masks alone.",
    "The dense model's latency is that of its architecture with random weights.",
)


def write_folder(
    folder: Path,
    model: PreTrainedModel,
    preprocessor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    plan: PruningPlan,
    structure: Structure,
    budget: Budget,
    recipe: Recipe,
    decision: dict,
    *,
    steps: int,
    seconds: float,
) -> dict:
    """Writes a cut model, proven in a fresh process, with report, card and page; returns the dict of report.json.

    Args:
        model: In the type that is stored; its mode stays.
        decision: What decided which units stay (`ibprune.decisions.make_decision`).
        steps, seconds: Of the training with masks.
    """
    mode, dtype, device, costs = model.training, model.dtype, model.device, structure.costs
    inputs = timed_text(model, recipe.batch_size, LENGTH)
    dense = build_model(_dense_config(model), type(model), device=device).to(dtype)
    latencies = time_forward(dense, model, inputs, console=Quiet())
    del dense
    shape = next(iter(inputs.values())).shape
    names = ("batch", "length") if len(shape) == 2 else ("batch", "channels", "height", "width")
    report = Report(
        dense=side(costs, None, {}, latencies[0]),
        pruned=side(costs, plan.kept(), {}, latencies[1]),
        budget=costs.achieved(budget, plan),
        score=recipe.score,
        shares=recipe.shares,
        seed=recipe.seed,
        model=recipe.model,
        data=None,
        objective=OBJECTIVES.get(auto_class(type(model).__name__, model.config.model_type), "classification"),
        macs_length=costs.macs.length,
        latency_input=dict(zip(names, shape)),
        command=_call(recipe, steps),
        hub={"model": None, "data": None},
        kept=kept_by_kind(plan, structure),
        audit_note="the training was a loop of its own: `ibprune audit DENSE FOLDER --data DATA` compares both models",
        world_size=1,
        device=str(device),
        precision=str(dtype).removeprefix("torch."),
        unknown=list(UNKNOWN),
        recovery={"recovery": "own loop", "steps": steps},
        timings_s={"train": round(seconds, 2)},
        versions=versions(),
    )
    with staged(folder) as temporary:
        tier = write_model(model, preprocessor, plan, temporary)
        write_decision(decision, temporary)
        report.verify = verify(model, temporary, tier)
        report.dense.file_bytes = report.dense.params * dtype.itemsize
        report.pruned.file_bytes = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        written = write_report(report.to_dict(), temporary)
        (temporary / "README.md").write_text(model_card(written, None, name=folder.name))
        write_page(temporary)
    model.train(mode)
    return written


def _call(recipe: Recipe, steps: int) -> str:
    given = recipe.model_dump(exclude_defaults=True, exclude={"model", "budget"})
    more = "".join(f", {name}={value!r}" for name, value in given.items())
    return (
        f"ibprune.MaskedTraining(model, {recipe.budget:g}, batches=batches{more}).begin(steps={steps})"
        "  # and a training of so many steps"
    )


def _dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    for key, value in config.__dict__.pop(SPEC)["dense"].items():
        setattr(config, key, value)
    return config
