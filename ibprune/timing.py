"""Latency of two models side by side: interleaved runs, median and spread."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ibprune.console import Quiet
from ibprune.examples import example_inputs
from ibprune.losses import Batch, forward
from ibprune.rebuild import FactorizedUnembedding


def timed_text(model: nn.Module, batch_size: int, max_length: int) -> Batch:
    """Made-up texts on which a transformer is timed: of at most 16 sequences and 64 tokens."""
    return example_inputs(model, batch=min(batch_size, 16), length=min(max_length, 64))


@torch.inference_mode()
def time_forward(
    dense: nn.Module, pruned: nn.Module, batch: Batch, *, rounds: int = 15, console: Quiet
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a forward pass of both models on a batch: {"median", "iqr", "layers"} each.

    The runs alternate, so that a busy machine slows both alike; read the ratio, not the values. "layers" is the part
    of the median that goes to linear layers and convolutions, whose MACs a budget counts: the rest bounds the speed-up.
    """
    device = next(dense.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    models = (dense.eval(), pruned.eval())
    runs = [stopwatch(lambda model=model: forward(model, batch), device) for model in models]
    times = interleave(runs, rounds=rounds, console=console, what="timing")
    shares: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(1, rounds // 3)):
        for model, found in zip(models, shares):
            found.append(share_of_layers(model, lambda model=model: forward(model, batch)))
    return tuple(_summary(*pair) for pair in zip(times, shares))


def stopwatch(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """What runs it and returns the milliseconds that it took."""

    def timed() -> float:
        start = now(device)
        run()
        return 1000 * (now(device) - start)

    return timed


def interleave(runs: Sequence[Callable[[], float]], *, rounds: int, console: Quiet, what: str) -> list[list[float]]:
    """The milliseconds that the runs return, `rounds` times each, in turns, so that a busy machine slows all alike.

    A first turn is not counted.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in console.track(range(rounds), what, rounds):
        for run, found in zip(runs, times):
            found.append(run())
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one.

    Example:
        >>> quartiles([3.0, 1.0, 2.0, 5.0, 4.0])
        (2.0, 3.0, 4.0)
    """
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return low, median, high


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def share_of_layers(model: nn.Module, run: Callable[[], object]) -> float:
    """The share of one run of a model that its linear layers and convolutions take."""
    device = next(model.parameters()).device
    spent, started = 0.0, 0.0

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal started
        started = now(device)

    def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal spent
        spent += now(device) - started

    kinds = (nn.Linear, Conv1D, nn.modules.conv._ConvNd, FactorizedUnembedding)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    handles = [
        handle for m in layers for handle in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
    ]
    try:
        start = now(device)
        run()
        return spent / (now(device) - start)
    finally:
        for handle in handles:
            handle.remove()


def _summary(values: list[float], shares: list[float]) -> dict[str, float]:
    low, median, high = quartiles(values)
    layers = median * float(torch.tensor(shares).median())
    return {"median": round(median, 3), "iqr": round(high - low, 3), "layers": round(layers, 3)}
