"""Latency of two models side by side: interleaved runs, median and spread."""

import time
from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ibprune.console import Quiet
from ibprune.examples import example_inputs
from ibprune.losses import Batch, forward


def measure_latency(
    dense: nn.Module, pruned: nn.Module, *, batch: int, length: int, rounds: int = 15, console: Quiet
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a forward pass of two transformers on the same made-up inputs: {"median", "iqr"} each."""
    smaller = min(dense, pruned, key=lambda model: getattr(model.config, "vocab_size", 0))  # its token ids are both's
    inputs = example_inputs(smaller, batch=batch, length=length)
    return time_forward(dense, pruned, inputs, rounds=rounds, console=console)


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
    calls = (lambda: forward(dense, batch), lambda: forward(pruned, batch))
    times = time_calls(calls, device=device, rounds=rounds, console=console)
    shares: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(1, rounds // 3)):
        for model, found in zip(models, shares):
            found.append(_share_of_layers(model, batch))
    return tuple(_summary(*pair) for pair in zip(times, shares))


def time_calls(
    calls: tuple[Callable[[], object], ...], *, device: torch.device, rounds: int = 15, console: Quiet
) -> tuple[list[float], ...]:
    """Milliseconds of each of `rounds` runs of every call, in turns; a first run of each is not timed."""
    for call in calls:
        call()
    times: tuple[list[float], ...] = tuple([] for _ in calls)
    for _ in console.track(range(rounds), "timing", rounds):
        for call, found in zip(calls, times):
            start = _now(device)
            call()
            found.append(1000 * (_now(device) - start))
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _share_of_layers(model: nn.Module, batch: Batch) -> float:
    """The share of one forward pass that linear layers and convolutions take."""
    device = next(model.parameters()).device
    spent, started = 0.0, 0.0

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal started
        started = _now(device)

    def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal spent
        spent += _now(device) - started

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D, nn.modules.conv._ConvNd))]
    handles = [
        handle for m in layers for handle in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
    ]
    try:
        start = _now(device)
        forward(model, batch)
        return spent / (_now(device) - start)
    finally:
        for handle in handles:
            handle.remove()


def _summary(values: list[float], shares: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    layers = median * float(torch.tensor(shares).median())
    return {"median": round(median, 3), "iqr": round(high - low, 3), "layers": round(layers, 3)}
