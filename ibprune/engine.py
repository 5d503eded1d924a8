"""The engine that everything trains on: Accelerate's devices, precision, processes and trackers."""

import ctypes
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, tracking
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)

from ibprune.errors import BadRecipe, IBPruneError, did_you_mean

PRECISIONS = ("auto", "fp32", "bf16")
PATIENCE = timedelta(hours=12)  # that processes wait while the main one measures and writes
# Ways of Accelerate to divide a model: masks and cuts need it whole.
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


def make_accelerator(
    precision: str, *, grad_accum: int = 1, seed: int = 0, log_with: str | None = None, logs: str | Path = "logs"
) -> Accelerator:
    """The engine: device, mixed precision and processes are Accelerate's.

    "auto" takes bfloat16 autocast where the hardware multiplies it natively.

    Args:
        log_with: A tracker of Accelerate's that draws losses and masks as the run goes, if any; `logs` is its folder.

    Raises:
        BadRecipe: An unknown precision, or a tracker that is not known or not installed.
        IBPruneError: An engine that divides the model, or processes that do not find each other.
    """
    if precision not in PRECISIONS:
        raise BadRecipe(f"expected a precision of {', '.join(PRECISIONS)}, found '{precision}'.")
    set_seed(seed)
    AcceleratorState._reset_state()  # a second run in one process may ask for other settings
    GradientState._reset_state()
    for name in SHARDED:  # on CPUs Accelerate passes over some of them in silence
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            _check_whole(name)
    mixed = "bf16" if multiplies_in(precision) == torch.bfloat16 else "no"
    # A step is always grad_accum batches, also across the end of an epoch.
    accumulation = GradientAccumulationPlugin(num_steps=grad_accum, sync_with_dataloader=False)
    wrapping = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads that no loss reads, experts
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # unless it is told, it takes one of several processes for all
        mixed_precision=mixed,
        gradient_accumulation_plugin=accumulation,
        log_with=log_with and check_tracker(log_with),
        project_dir=logs,
        kwargs_handlers=[wrapping, InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    _check_whole(accelerator.distributed_type.name)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise IBPruneError(
            f"expected {started} processes to train together, as WORLD_SIZE says, found {accelerator.num_processes}: "
            "start them with --num-processes, torchrun or accelerate launch."
        )
    accelerator.init_trackers("ibprune")
    if accelerator.device.type == "cpu" and sys.platform == "linux":
        _reuse_freed_memory()
    return accelerator


def _check_whole(name: str) -> None:
    """Raises `IBPruneError` where processes do not each hold the model."""
    if name in SHARDED:
        raise IBPruneError(
            f"expected processes that each hold the model, found {name}, which divides it: launch without its "
            "configuration (docs/scaling.md says why)."
        )


def check_tracker(name: str) -> str:
    """The name of a tracker, which Accelerate would pass over in silence where it cannot be had.

    Raises:
        BadRecipe: It is not known, or not installed.
    """
    if name not in tracking.LOGGER_TYPE_TO_CLASS:
        raise BadRecipe(f"--log-with: found '{name}': {did_you_mean(name, tracking.LOGGER_TYPE_TO_CLASS)}.")
    if name not in map(str, tracking.get_available_trackers()):
        raise BadRecipe(f"--log-with: {name} is not installed: pip install {name}, or leave it out.")
    return name


def _reuse_freed_memory() -> None:
    """Lets glibc keep freed blocks for reuse.

    By default it hands the large activations of every step back to the kernel, and each step then
    waits for its pages to be mapped and zeroed anew: scripts/mask_overhead.py gives 1.17 without this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no such switch
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # names of malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def multiplies_in(precision: str) -> torch.dtype:
    """The dtype in which layers multiply at a precision of `PRECISIONS` on this device.

    Example:
        >>> multiplies_in("fp32")
        torch.float32
    """
    half = precision == "bf16" or (precision == "auto" and native_bf16())
    return torch.bfloat16 if half else torch.float32


def native_bf16() -> bool:
    """Whether the device multiplies bfloat16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def draw(accelerator: Accelerator, values: dict[str, float], *, steps: int = 0) -> None:
    """Shows values to the trackers, if there are any, at the steps that all phases have made: they may only rise.

    Args:
        steps: Made since the last call.
    """
    if accelerator.trackers:
        accelerator.steps_made = getattr(accelerator, "steps_made", 0) + steps
        accelerator.log(values, step=accelerator.steps_made)


def finish_trackers(accelerator: Accelerator, dense: dict[str, float], pruned: dict[str, float]) -> None:
    """Draws what both models measure, and lets the trackers write what they hold back."""
    values = {f"dense/{key}": value for key, value in dense.items()}
    draw(accelerator, values | {f"pruned/{key}": value for key, value in pruned.items()})
    for tracker in accelerator.trackers:
        tracker.finish()
