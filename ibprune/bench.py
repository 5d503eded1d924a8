"""Latency of two models side by side: interleaved runs, median and spread."""

import time

import torch
from torch import nn

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
    """Milliseconds of a forward pass of both models on a batch: {"median", "iqr"} each.

    The runs alternate, so that a busy machine slows both alike; read the ratio, not the values.
    """
    device = next(dense.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    models = (dense.eval(), pruned.eval())
    for model in models:
        forward(model, batch)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in console.track(range(rounds), "timing", rounds):
        for model, found in zip(models, times):
            start = time.perf_counter()
            forward(model, batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(1000 * (time.perf_counter() - start))
    return _summary(times[0]), _summary(times[1])


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"median": round(median, 3), "iqr": round(high - low, 3)}
