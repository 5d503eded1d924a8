"""What a run takes, before it starts: memory, disk, floating point operations and time of each of its phases."""

import copy
import os
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ibprune.console import Quiet
from ibprune.costs import count_params
from ibprune.cutting import CALIBRATION, PROBE, probe_steps
from ibprune.dry_steps import DryRun
from ibprune.errors import BadRecipe, IBPruneError, UnsupportedModel
from ibprune.examples import image_shape
from ibprune.images import input_shape
from ibprune.limits import free_bytes
from ibprune.losses import Objective
from ibprune.models import build_model, find_source, load_config, load_processor, model_class, stored_dtype
from ibprune.processes import n_processes
from ibprune.quantised import bits, check_packable, check_quantised
from ibprune.rates import block_rate
from ibprune.recipe import Recipe, make_recipe
from ibprune.scores import LEARNED, ranking
from ibprune.shares import MOST_RECOVERED, most_compared
from ibprune.sites import block_paths, find_family, is_traced, reads_pictures
from ibprune.sizing import Work, dry_run, measure, objective_of
from ibprune.structure import check_cnn
from ibprune.task_heads import CLASSIFIERS
from ibprune.vib import MaskSettings

WEIGHT = 4  # bytes: weights are trained, and kept, in float32
MOMENTS = 2  # of AdamW
UTILISATION = 0.4  # of a given rate: what training reaches of a GPU's best, by common report; measured it is none
SHORTFALL = (
    1.3  # what runs took of an estimate, at the most of those measured (docs/results.md): data, libraries, allocator
)
TIMED = 1e11  # floating point operations of a block that is timed on a CPU, at the most: a second or two
NEW_HEAD_STEPS = 2000  # that a new head is trained for at the most
HELPS = (
    "--gradient-checkpointing, a smaller --batch-size with more --grad-accum, a shorter --max-length or --mode faster"
)


@dataclass(frozen=True)
class Phase:
    """One part of a run, in one process.

    Attributes:
        name: As the progress bar calls it.
        batches: Of forward passes, and of backward ones where it trains.
        memory: Bytes at once, by what holds them.
        flops, teacher_flops: Of the model that is cut, and of the dense one beside it.
    """

    name: str
    batches: int
    memory: dict[str, int]
    flops: int
    teacher_flops: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def estimate(
    model: str | os.PathLike | PreTrainedConfig,
    budget: float = 1.0,
    *,
    num_processes: int = 1,
    flops_per_second: float | None = None,
    utilisation: float = UTILISATION,
    **recipe: object,
) -> dict:
    """What a run would take, from the config alone: nothing is loaded, and no data are read.

    Without `flops_per_second`, the run is on this device, whose rate is measured in a few seconds. With it, on a GPU of
    that rate, of which training reaches the `utilisation`. What the model is for follows from `task` and its class.
    Where adapters alone recover, the operations are counted as if all weights trained: an upper bound.

    Args:
        num_processes: That divide each batch.
        recipe: By name, fields of `ibprune.recipe.Recipe`, such as batch_size=16.

    Returns:
        "phases", each with its "memory" in bytes by what holds them, "flops", "teacher_flops" and "seconds"; "memory"
        of the largest phase, of which runs took up to `SHORTFALL`; "disk" bytes of "state" and "folder"; "seconds" of
        all; "rate" and where it is from.

    Raises:
        IBPruneError: As `plan`; or a model whose operations depend on what it reads.

    Example:
        >>> from transformers import BertConfig
        >>> found = estimate(BertConfig(num_hidden_layers=1), 0.5, flops_per_second=1e12)
        >>> found["phases"][-1]["memory"]["moments"] == 2 * found["phases"][-1]["memory"]["gradients"]
        True
    """
    named = model if isinstance(model, str | os.PathLike) else None
    asked = make_recipe({"model": named or "config", "budget": budget} | recipe)
    for name, value, most in (("flops-per-second", flops_per_second, float("inf")), ("utilisation", utilisation, 1.0)):
        if value is not None and not 0 < value <= most:
            raise BadRecipe(f"--{name}: expected a number above 0" + f" and at most {most:g}" * (most == 1.0)
                            + f", found {value:g}.")  # fmt: skip
    if bits(asked):
        check_quantised(asked)
    if num_processes < 1:
        raise BadRecipe(f"--num-processes: expected at least 1, found {num_processes}.")
    source = find_source(asked.model) if named else None
    config = load_config(source) if source else copy.deepcopy(model)
    if bits(asked):
        check_packable(config, asked)
    pictures, trained = reads_pictures(config.model_type), str((config.architectures or [""])[0])
    cls = model_class(config, classify=bool(asked.task) or pictures)
    name = objective_of(asked, cls, config)
    how = dry_run(asked, None if flops_per_second else present_device())
    shape = None
    if is_traced(config.model_type):
        check_cnn(asked, config.model_type)
        shape = input_shape(config, load_processor(source.location) if source else None, asked.image_size)
    work = measure(
        asked, config, cls, name, how, processes=num_processes, shape=shape,
        new_head=bool(asked.task) and not trained.endswith(CLASSIFIERS),
    )  # fmt: skip
    rate, source_of_rate = flops_per_second, f"given, {utilisation:.0%} of it reached"
    if rate is None:
        utilisation, source_of_rate = 1.0, "measured: a block forwards and backwards"
        rate = measured_rate(work, config, cls, name, how, shape)
    found = phases(work)
    seconds = [(each.flops + each.teacher_flops) / (rate * utilisation) for each in found]
    return {
        "objective": name,
        "precision": how.precision,
        "batch": {"sequences": work.rows, "length": work.recipe.max_length},
        "num_processes": num_processes,
        "device": "given" if flops_per_second else str(present_device()),
        "phases": [
            {"phase": each.name, "batches": each.batches, "memory": each.memory, "total": each.total,
             "flops": each.flops, "teacher_flops": each.teacher_flops, "seconds": time}
            for each, time in zip(found, seconds)
        ],
        "memory": max(each.total for each in found),
        "available": None if flops_per_second else free_memory(present_device()),
        "process": 0 if flops_per_second or present_device().type != "cpu" else psutil.Process().memory_info().rss,
        "disk": disk(work, stored_dtype(config)),
        "seconds": sum(seconds),
        "rate": {"flops_per_second": rate, "utilisation": utilisation, "source": source_of_rate},
    }  # fmt: skip


def present_device() -> torch.device:
    """Where a run on this machine trains."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes() if device.type == "cpu" else None


def phases(work: Work) -> tuple[Phase, ...]:
    """The parts of a run that compute; not what data decide: evaluation, audit, checks of the folder."""
    recipe, step, score = work.recipe, work.step, work.score
    learned, probed = recipe.score in LEARNED and recipe.mask_steps > 0, recipe.shares == "probe"
    batches = max(1, CALIBRATION // recipe.batch_size)
    forward, taught = step.forward_flops / work.rows, step.teacher_flops / work.rows
    small = int(work.small_share * step.flops)
    student = 0 if work.packed else work.student  # it shares the dense model's weights then
    accum, steps, vocab = recipe.grad_accum, recipe.finetune_steps, "vocab" in recipe.kinds
    found = []

    def add(name: str, batches: int, memory: dict[str, int], flops: float, teacher_flops: float) -> None:
        if batches:
            found.append(Phase(name, batches, memory, int(flops), int(teacher_flops)))

    if steps is None:
        steps = NEW_HEAD_STEPS if work.new_head else 0
    add("training dense", steps * accum, _memory(work, work.dense, 0, step.activation_bytes, copies=0),
        steps * accum * step.flops, 0)  # fmt: skip
    if ranking(recipe.score, recipe.start) not in ("magnitude", "random"):
        times = 1 + vocab + (learned and recipe.score == "gradual") * MaskSettings().rescored
        add("scoring units", times * batches, _memory(work, 0, student, score.activation_bytes),
            times * batches * score.flops, 0)  # fmt: skip
    compared = most_compared(work.kinds, vocab=vocab) * probed
    add("allocating between kinds", compared * max(1, PROBE // recipe.batch_size),
        _memory(work, 0, student, score.activation_bytes),
        compared * PROBE * forward, PROBE * taught)  # fmt: skip
    tried = MOST_RECOVERED * probe_steps(recipe.probe_steps, recipe.recover_steps) * accum
    tried *= probed and work.kinds > 1
    judged = MOST_RECOVERED * CALIBRATION if tried else 0
    trained, held = (work.adapters, work.small) if work.adapters else (work.small, 0)
    memory = _memory(work, trained, held + student, step.activation_bytes)
    add("trying a cut", tried, memory, tried * small + judged * work.small_share * forward,
        tried * step.teacher_flops + judged * taught)  # fmt: skip
    masked = recipe.mask_steps * accum if learned else 0
    learning = work.masks if recipe.mode == "faster" else student + work.masks
    add("learning masks", masked, _memory(work, learning, student + work.masks - learning, step.activation_bytes),
        masked * step.flops, masked * step.teacher_flops)  # fmt: skip
    recovered = recipe.recover_steps * accum
    best = work.small if recipe.eval_every else 0  # the weights of the best step so far
    add("recovering", recovered, _memory(work, trained, held + best, step.activation_bytes),
        recovered * small, recovered * step.teacher_flops)  # fmt: skip
    return tuple(found)


def _memory(work: Work, trained: int, held: int, activations: int, *, copies: int = 1) -> dict[str, int]:
    """Bytes of a phase.

    Args:
        trained, held: Parameters that are trained, and that are held beside them and the dense model.
        copies: Of the dense model. Processes that train together hold a second set of gradients, to exchange them.
    """
    return {
        "dense": copies * (work.packed or WEIGHT * work.dense),
        "student": WEIGHT * (trained + held),
        "gradients": WEIGHT * trained * (2 if work.processes > 1 else 1),
        "moments": MOMENTS * _moment(work.recipe) * trained,
        "activations": activations,
    }


def disk(work: Work, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the state of a run at the most, while one more save is written, and of the model's file."""
    student, saves, moment = (
        WEIGHT * (work.student * (not work.packed) + work.masks),
        work.recipe.keep_last + 1,
        _moment(work.recipe),
    )
    moments = MOMENTS * moment * (work.masks if work.recipe.mode == "faster" else work.student + work.masks)
    first = WEIGHT * work.dense if work.new_head or work.recipe.finetune_steps else 0
    recovering = saves * (WEIGHT * (work.small + work.adapters) + MOMENTS * moment * (work.adapters or work.small))
    return {
        "state": first + max(saves * (student + moments), student + recovering),
        "folder": dtype.itemsize * work.small,
    }


def _moment(recipe: Recipe) -> int:
    """Bytes of one of AdamW's moments of one weight."""
    return 1 if recipe.optimizer == "adamw-8bit" else WEIGHT


def measured_rate(
    work: Work,
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    name: str,
    how: DryRun,
    shape: tuple[int, int, int] | None,
) -> float:
    """Floating point operations a second of training on this device; a CPU is given fewer rows where all take long."""
    skeleton, device, rows = build_model(config, cls, device="meta"), present_device(), work.rows
    if shape:
        rows = min(rows, 2)
    elif device.type == "cpu":
        blocks = len(block_paths(skeleton, find_family(config.model_type)))
        rows = max(1, min(rows, int(rows * TIMED * blocks / work.step.flops)))
    shape = shape or image_shape(skeleton)
    return block_rate(skeleton, Objective(name), rows, work.recipe.max_length or 0, shape, how, device)


def check_weights(config: PreTrainedConfig, cls: type[PreTrainedModel], *, bits: int = 0) -> None:
    """Raises `IBPruneError` where the dense model and its copy alone cannot be held, before anything is loaded.

    Args:
        bits: Of a weight, where the model is quantised and its copy shares them.
    """
    device, params = present_device(), count_params(build_model(config, cls, device="meta"))
    free, needed = free_memory(device), params * bits // 8 or 2 * WEIGHT * params
    copied = "" if bits else " and of the copy that is cut"
    if free is not None and needed > free:
        raise IBPruneError(
            f"expected {_gb(needed)} for the weights of a {cls.__name__.removeprefix('Pruned')}{copied}, found "
            f"{_gb(free)} free on '{device}': take a device with more memory."
        )


def warn_of_memory(
    recipe: Recipe, model: PreTrainedModel, objective: Objective, shape: tuple[int, ...] | None, console: Quiet
) -> None:
    """Says in a line where a run takes more memory than there is, before it starts.

    Steps are measured only where a bound that costs nothing leaves it open: no layer keeps more numbers at a position
    than it has weights.

    Args:
        recipe: With its defaults filled in.
        model: The dense model, on the CPU.
        shape: Of a picture, where it reads pictures.
    """
    device, packed = present_device(), bits(recipe)
    free, params = free_memory(device), model.num_parameters() if packed else count_params(model)
    positions = shape[1] * shape[2] if shape else recipe.max_length
    if free is None or WEIGHT * params * (2 * (2 + MOMENTS) + recipe.batch_size * positions) < free:
        return
    if packed or device.type == "cpu":
        free += model.get_memory_footprint()  # is there already
    try:
        work = measure(recipe, model.config, type(model), objective.name, dry_run(recipe, device), shape=shape,
                       processes=n_processes())  # fmt: skip
    except (UnsupportedModel, RuntimeError):  # no estimate, no warning: no run is lost for advice
        return
    largest = max(phases(work), key=lambda phase: phase.total)
    if SHORTFALL * largest.total > free:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in largest.memory.items())
        console.say(
            f"warning: '{largest.name}' takes {_gb(largest.total)} ({parts}) and up to a third more, {_gb(free)} are "
            f"free on '{device}'. What helps: {HELPS}."
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
