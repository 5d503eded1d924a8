"""Prunes any module from a loader of (input, target) pairs: find channels, score, learn masks, compact, recover."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from ibprune.budget import make_budget
from ibprune.channels import check_weights, find_channels
from ibprune.choosing import Choice
from ibprune.console import Quiet
from ibprune.costs import COSTS
from ibprune.cutting import CALIBRATION, choose_and_compact_, mask_and_recovery, probe_steps
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.errors import BadData, BadRecipe, UnsupportedModel, did_you_mean
from ibprune.latency import LatencyTable
from ibprune.losses import DIVERGENCES, Objective
from ibprune.models import check_finite
from ibprune.module_files import save_module
from ibprune.pairs import Pairs
from ibprune.plans import PruningPlan, model_type
from ibprune.processes import on_main
from ibprune.recipe import UNFIT, UNSTARTED, UNTAUGHT
from ibprune.report import MODULE_SCHEMA, Timer, versions
from ibprune.scores import LEARNED, SCORES, STARTS
from ibprune.shares import SHARES
from ibprune.structure import prepare_traced_, with_latency, with_memory
from ibprune.surgery import compact_module_
from ibprune.timing import time_forward
from ibprune.trainer import SCHEDULES, TrainSettings, train

Metrics = float | dict[str, float]


@dataclass(frozen=True)
class ModuleSettings:
    """How a module is pruned; the words are those of `ibprune.recipe.Recipe`.

    Attributes:
        budget: Share of the dense cost to keep, in (0, 1].
        cost: "params", "macs" (of one sample, its size from the example), "memory" (bytes of the parameters) or
            "latency" (of the example, as it is).
        latency_table: A latency.json measured on this device before (cost "latency").
        score: One of `ibprune.scores.SCORES`.
        start: One of `ibprune.scores.STARTS`: the ranking that learned masks start from (score "vib").
        reconstruct: Refit by least squares what reads the cut units (scores that leave the weights).
        shares: How the cut is spread: "cost" by score per cost, "equal" by score alone with the same share of each
            kind, "probe" by the measured loss of candidates.
        kinds: "channels", "inputs" or both.
        round_to: Wide layers become multiples of this.
        mask_steps: Steps of the scores "vib" and "gradual".
        recover_steps: Steps of recovery after the cut.
        probe_steps: Steps of recovery before candidate cuts are compared (shares "probe"); by default an eighth of
            `recover_steps`.
        lr, weight_decay: Of the weights (AdamW); the rate is the peak.
        schedule: How the rate falls, one of `ibprune.trainer.SCHEDULES`.
        distill: "logits" (or True): learn from the dense model's logits too (not with a loss of one's own); "none".
        divergence: How they are compared, one of `ibprune.losses.DIVERGENCES`.
    """

    budget: float
    cost: str = "params"
    latency_table: str | None = None
    score: str = "vib"
    shares: str = "probe"
    kinds: tuple[str, ...] = ("channels",)
    round_to: int = 1
    mask_steps: int = 300
    recover_steps: int = 900
    probe_steps: int | None = None
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "linear"
    distill: str | bool = "logits"
    divergence: str = "forward"
    reconstruct: bool = False
    start: str = "fisher"
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.budget, str | tuple | list):
            raise BadRecipe(f"budget: expected one share of the dense cost for a module, found {self.budget!r}.")
        if isinstance(self.distill, bool):
            object.__setattr__(self, "distill", "logits" if self.distill else "none")
        listed = {"cost": COSTS, "score": SCORES, "start": STARTS, "shares": SHARES, "schedule": SCHEDULES}
        for name, valid in (listed | {"divergence": DIVERGENCES, "distill": ("logits", "none")}).items():
            value = getattr(self, name)
            if value not in valid:
                raise BadRecipe(f"{name}: found '{value}': {did_you_mean(str(value), valid)}.")
        if isinstance(self.kinds, str) or not self.kinds:
            raise BadRecipe(f"kinds: expected a tuple such as ('channels', 'inputs'), found {self.kinds!r}.")
        whole = {"round_to": 1, "mask_steps": 0, "recover_steps": 0, "seed": 0}
        for name, least in (whole if self.probe_steps is None else whole | {"probe_steps": 0}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BadRecipe(f"{name}: expected a whole number of at least {least}, found {value!r}.")
        if self.reconstruct and self.score in LEARNED and self.mask_steps:
            raise BadRecipe(f"{UNFIT}.")
        if self.start != "fisher" and self.score != "vib":
            raise BadRecipe(f"{UNSTARTED}.")
        if self.divergence != "forward" and self.distill == "none":
            raise BadRecipe(UNTAUGHT + ".")
        if not (isinstance(self.lr, (int, float)) and math.isfinite(self.lr) and self.lr > 0):
            raise BadRecipe(f"lr: expected a number above 0, found {self.lr!r}.")
        decay = self.weight_decay
        if not (isinstance(decay, (int, float)) and math.isfinite(decay) and decay >= 0):
            raise BadRecipe(f"weight_decay: expected a number of at least 0, found {decay!r}.")


@dataclass(frozen=True)
class ModuleResult:
    """What `ibprune.prune` returns for a module: the compacted module in eval mode, the plan, and the report.

    `example` is the input that it was measured on, `latency` the table of a budget on latency, `decision` what decided
    which units stay (`ibprune.decisions.make_decision`).
    """

    model: nn.Module
    plan: PruningPlan
    report: dict
    example: torch.Tensor
    latency: LatencyTable | None = None
    decision: dict | None = None

    def save(self, folder: str | Path, *, onnx: bool = False) -> None:
        """Writes a folder that `ibprune.load(folder, model=...)` reads, on request with `model.onnx`.

        See `ibprune.module_files.save_module` for what it raises.
        """
        save_module(self.model, self.plan, folder, report=self.report, latency=self.latency,
                    decision=self.decision, onnx_example=self.example if onnx else None)  # fmt: skip


def make_settings(values: dict) -> ModuleSettings:
    """Settings from keyword arguments.

    Raises:
        BadRecipe: An unknown name (with the nearest valid one), no budget, or a value out of range.
    """
    valid = [field.name for field in fields(ModuleSettings)]
    for key in values:
        if key not in valid:
            raise BadRecipe(f"unknown argument '{key}' for a module: {did_you_mean(key, valid)}.")
    if "budget" not in values:
        raise BadRecipe("expected budget=, the share of the dense cost to keep in (0, 1], found none.")
    return ModuleSettings(**values)


def prune_module(
    model: nn.Module,
    settings: ModuleSettings,
    *,
    train_loader: Iterable,
    eval_fn: Callable[[nn.Module], Metrics] | None = None,
    example: torch.Tensor | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    console: Quiet,
) -> ModuleResult:
    """Prunes a copy of the module; the module itself stays as it is.

    Args:
        train_loader: Gives batches (inputs, targets) and can be gone through again, such as a DataLoader.
        eval_fn: Judges a model, called on the dense and the pruned one in eval mode without gradients.
        example: An input (batch, ...) whose size counts for MACs; default: the loader's first.
        loss: (output, target) -> a loss per sample, (batch,); default: cross entropy on logits.

    Raises:
        IBPruneError: Anything the user can mend, in one line.
    """
    for name, given in (("loss", loss), ("eval_fn", eval_fn)):
        if given is not None and not callable(given):
            raise BadRecipe(f"{name}: expected a function, found {type(given).__name__}.")
    trains = [parameter.requires_grad for parameter in model.parameters()]
    if trains and not any(trains):
        raise BadRecipe("expected weights that train, found all of them frozen: call model.requires_grad_(True) first.")
    timer = Timer()
    accelerator = make_accelerator("fp32", seed=settings.seed)
    device = accelerator.device
    pairs = Pairs(train_loader)
    batches = pairs.first(CALIBRATION, device)
    example = batches[0]["inputs"][:2] if example is None else example
    check_weights(model)
    check_finite(model, "the module")
    dense = copy.deepcopy(model).to(device).eval()
    with timer("trace"):
        found = find_channels(dense, example, kinds=settings.kinds)
    example = example.to(device)
    _check_modes(dense, batches[0]["inputs"][:8])
    console.say(f"{type(model).__name__}: {len(found.sites)} places to cut, {len(found.refused)} refused.")
    with timer("evaluate"):
        dense_metrics = _judge(dense, eval_fn)
    objective = Objective("classification" if loss is None else "custom", divergence=settings.divergence, loss=loss)
    teacher = dense if settings.distill != "none" and loss is None else None
    with timer("cut"):
        student = copy.deepcopy(dense)
        structure = prepare_traced_(student, found.sites, example, compact_module_)
        if settings.cost == "memory":
            structure = with_memory(structure, student, dtype=_dtype(student), batch=0, length=0)
        if settings.cost == "latency":
            structure = with_latency(
                structure, student, {"inputs": example}, table=settings.latency_table, round_to=settings.round_to,
                seed=settings.seed, console=console,
            )  # fmt: skip
        costs = structure.costs
        cost_model = costs.of(settings.cost)
        budget = make_budget(cost_model, found.sites, keep=settings.budget, scope="model", round_to=settings.round_to)
        choice = Choice(
            settings.score, settings.shares, settings.seed, objective, batches, pairs.loader, judge=teacher,
            teacher=teacher, settings=_phases(settings)[0],
            probe_steps=probe_steps(settings.probe_steps, settings.recover_steps), accelerator=accelerator,
            console=console, reconstruct=settings.reconstruct,
            start=settings.start,
        )  # fmt: skip
        student, plan, decision = choose_and_compact_(student, structure, budget, choice)
    with timer("recover"):
        _, steps = _phases(settings)
        train(student, loss_with(objective, teacher, accelerator), pairs.loader, steps,
              accelerator=accelerator, phase="recovering", console=console)  # fmt: skip
    check_finite(student, "the recovered model")
    with timer("evaluate"):
        metrics = _judge(student, eval_fn)
    with timer("bench"):
        latencies = on_main(lambda: time_forward(dense, student, {"inputs": example}, console=console))
    sides = [
        {"params": costs.params(kept), "macs": costs.macs(kept), "metrics": found_metrics, "latency_ms": latency}
        | ({"memory_bytes": costs.memory.model(kept)} if costs.memory else {})
        for kept, found_metrics, latency in zip((plan.n_units, plan.kept()), (dense_metrics, metrics), latencies)
    ]
    report = {
        "schema": MODULE_SCHEMA,
        "model": model_type(model),
        "dense": sides[0],
        "pruned": sides[1],
        "budget": costs.achieved(budget, plan),
        "kept": {name: [len(units), plan.n_units[name]] for name, units in plan.keep.items()},
        "refused": found.refused,
        "settings": {field.name: getattr(settings, field.name) for field in fields(settings)},
        "example_shape": list(example.shape),
        "device": str(device),
        "timings_s": timer.seconds,
        "versions": versions(),
    }  # fmt: skip
    return ModuleResult(student.eval(), plan, report, example.cpu(), costs.latency, decision)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of all parameters.

    Raises:
        BadRecipe: They differ.
    """
    found = {parameter.dtype for parameter in model.parameters()}
    if len(found) > 1:
        raise BadRecipe(
            f"cost: 'memory' counts parameters of one dtype, found {', '.join(sorted(map(str, found)))}: use 'params', "
            "or cast the module."
        )
    return found.pop()


def _phases(settings: ModuleSettings) -> tuple[TrainSettings, TrainSettings]:
    """How the masks and the recovery train."""
    common = TrainSettings(
        steps=0, lr=settings.lr, schedule=settings.schedule, weight_decay=settings.weight_decay, seed=settings.seed
    )
    return mask_and_recovery(common, settings.score, settings.mask_steps, settings.recover_steps)


@torch.no_grad()
def _check_modes(model: nn.Module, inputs: torch.Tensor) -> None:
    """Raises `UnsupportedModel` where layers run in training alone: what is cut is found, and proven, in eval mode."""

    def ran(training: bool) -> set[str]:
        twin, seen = copy.deepcopy(model).train(training), set()  # a pass in training moves statistics
        for name, module in twin.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_hook(lambda *_, name=name: seen.add(name))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            twin(inputs)
        return seen

    only = sorted(ran(True) - ran(False))
    if only:
        raise UnsupportedModel(
            f"expected layers that run in eval mode too, found '{only[0]}' in training alone, where it would read what "
            "was cut around it: take it out, or let it run in both."
        )


def _judge(model: nn.Module, eval_fn: Callable[[nn.Module], Metrics] | None) -> dict[str, float]:
    if eval_fn is None:
        return {}
    model.eval()
    found = on_main(lambda: eval_fn(model))
    try:
        return {str(k): float(v) for k, v in found.items()} if isinstance(found, dict) else {"metric": float(found)}
    except (TypeError, ValueError) as error:
        raise BadData(f"expected eval_fn(model) to return a number or a dict of numbers, found {found!r}.") from error
