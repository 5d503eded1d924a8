"""The one training loop, on Accelerate: it learns masks, recovers accuracy and trains dense models alike."""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import nn
from torch.utils.data import DataLoader

from ibprune.console import Quiet
from ibprune.errors import BadRecipe, IBPruneError
from ibprune.losses import Batch

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainSettings:
    """How one phase trains.

    Attributes:
        steps: Optimiser steps; 0 trains nothing.
        lr: Peak learning rate of the weights; linear warm-up over `warmup` of the steps, then to 0.
        grad_accum: Batches per optimiser step.
        max_grad_norm: Gradients of the weights are clipped to this norm.
    """

    steps: int
    lr: float
    warmup: float = 0.1
    weight_decay: float = 0.01
    grad_accum: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass
class TrainState:
    """Everything that changes while a phase runs, apart from tensors; JSON as it stands.

    The batches are a function of (seed, step), so that step alone says where in the data a run is.
    """

    phase: str
    step: int = 0
    epoch: int = 0
    losses: list[float] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "TrainState":
        return cls(**data)


def make_accelerator(precision: str, *, grad_accum: int = 1, seed: int = 0) -> Accelerator:
    """The engine: device, mixed precision and processes are Accelerate's.

    "auto" takes bfloat16 autocast where the hardware multiplies it natively.
    """
    if precision not in PRECISIONS:
        raise BadRecipe(f"expected a precision of {', '.join(PRECISIONS)}, found '{precision}'.")
    if precision == "auto":
        precision = "bf16" if _native_bf16() else "fp32"
    set_seed(seed)
    AcceleratorState._reset_state()  # a second run in one process may ask for other settings
    GradientState._reset_state()
    mixed = "bf16" if precision == "bf16" else "no"
    # A step is always grad_accum batches, also across the end of an epoch.
    accumulation = GradientAccumulationPlugin(num_steps=grad_accum, sync_with_dataloader=False)
    accelerator = Accelerator(mixed_precision=mixed, gradient_accumulation_plugin=accumulation)
    if accelerator.device.type == "cpu" and sys.platform == "linux":
        _reuse_freed_memory()
    return accelerator


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


def _native_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
    make_batches: Callable[[int], DataLoader],
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    phase: str,
    console: Quiet,
    extra_groups: list[dict] | None = None,
    before_step: Callable[[int], None] | None = None,
    frozen: bool = False,
) -> TrainState:
    """Trains the model's weights in place, and `extra_groups` of parameters at learning rates of their own.

    Args:
        loss_of: Mean loss of a batch under the (prepared) model.
        make_batches: A loader for the given epoch seed.
        extra_groups: Optimiser groups with "params" and "lr" (masks); weight decay 0, not clipped.
        before_step: Called with the step's number, to move schedules on.
        frozen: Whether the weights stay as they are and only the `extra_groups` are trained.

    Raises:
        IBPruneError: The loss is NaN or infinite.
    """
    state = TrainState(phase)
    if settings.steps == 0:
        return state
    groups = _parameter_groups(model, settings, extra_groups or [])
    if frozen:
        groups = groups[2:]
    held = [p for p in model.parameters() if p.requires_grad] if frozen else []
    trained = {id(p) for group in groups for p in group["params"]}
    held = [p for p in held if id(p) not in trained]
    for parameter in held:  # no gradient is computed for it either
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), fused=True)
    warmup = max(1, int(settings.warmup * settings.steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (settings.steps - step) / max(1, settings.steps - warmup)))

    flat = [lambda step: 1.0] * len(extra_groups or [])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [factor] * (len(groups) - len(flat)) + flat)
    weights = [p for group in groups[: len(groups) - len(flat)] for p in group["params"]]
    prepared, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    batches = _endless(make_batches, settings.seed, accelerator, state)
    for step in console.track(range(settings.steps), phase, settings.steps):
        if before_step is not None:
            before_step(step)
        total = 0.0
        for _ in range(settings.grad_accum):
            batch = next(batches)
            with accelerator.accumulate(prepared):
                loss = loss_of(prepared, batch)
                total += loss.detach().item() / settings.grad_accum
                accelerator.backward(loss)
                if accelerator.sync_gradients and weights:
                    accelerator.clip_grad_norm_(weights, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        if not math.isfinite(total):
            raise IBPruneError(
                f"the loss became {total} at step {step} of '{phase}': lower --lr, or use --precision fp32."
            )
        state.step = step + 1
        state.losses.append(total)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerator.free_memory()
    for parameter in held:
        parameter.requires_grad_(True)
    model.eval()
    return state


def _parameter_groups(model: nn.Module, settings: TrainSettings, extra: list[dict]) -> list[dict]:
    """Weights with decay, vectors (biases, norms) without, then the extra groups."""
    taken = {id(p) for group in extra for p in group["params"]}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
    named = [(n, p) for n, p in named if not n.startswith("vib_masks")]
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        *({"weight_decay": 0.0} | group for group in extra),
    ]


def _endless(
    make_batches: Callable[[int], DataLoader], seed: int, accelerator: Accelerator, state: TrainState
) -> Iterator[Batch]:
    while True:
        loader = accelerator.prepare_data_loader(make_batches(seed + state.epoch))
        yield from loader
        state.epoch += 1
