"""What no model can beat on this machine: reading its weights, multiplying, starting operations; and widths."""

import torch
from torch import nn

from ibprune.console import Quiet
from ibprune.timing import interleave, now, quartiles, stopwatch

ROUNDS = 5
LARGE = 1024  # sides of a product that runs as fast as products do
MOST_BYTES = 1 << 30
SHAPES = 3  # that are timed of a model
ROUND_TO = (8, 64)


@torch.inference_mode()
def read_ms(n_bytes: int, device: torch.device) -> float:
    """Milliseconds to read so many bytes once: one product of a matrix of that size with a vector.

    A cache that is larger serves this product as it serves the model's weights.
    """
    taken = min(max(n_bytes, 4 * LARGE), MOST_BYTES)
    matrix = torch.ones(taken // (4 * LARGE), LARGE, device=device)
    vector = torch.ones(LARGE, device=device)
    return _median(lambda: torch.mv(matrix, vector), device) * n_bytes / (matrix.numel() * 4)


@torch.inference_mode()
def macs_per_ms(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-accumulates in a millisecond of one large product: the best that a layer can hope for."""
    square = torch.ones(LARGE, LARGE, device=device, dtype=dtype)
    return LARGE**3 / _median(lambda: square @ square, device)


@torch.inference_mode()
def operation_ms(device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds that an operation takes before it computes: a linear layer of 8 features at one row."""
    layer = nn.Linear(8, 8, device=device, dtype=dtype)
    row = torch.ones(1, 8, device=device, dtype=dtype)

    def many() -> None:
        for _ in range(100):
            layer(row)

    return _median(many, device) / 100


@torch.inference_mode()
def width_times(
    layers: tuple[tuple[int, int, int], ...], device: torch.device, dtype: torch.dtype
) -> list[dict[str, float | list[int]]]:
    """What rounding widths up would change: the heaviest linear layers as they are, and with rounder widths.

    Args:
        layers: Rows, inputs and outputs, as `footprint` finds them.

    Returns:
        For each shape with a width that is no multiple of 64: {"shape", "ms", "ms_at_8", "ms_at_64", "share_at_8",
        "share_at_64"}: medians, and the upper quartile of the share of the time that the rounder widths take.
    """
    work: dict[tuple[int, int, int], int] = {}
    for rows, into, out in layers:
        if (into % 64 or out % 64) and min(into, out) >= 64:
            work[rows, into, out] = work.get((rows, into, out), 0) + rows * into * out
    found = []
    for shape in sorted(work, key=work.__getitem__, reverse=True)[:SHAPES]:
        sizes = [shape, *((shape[0], *(-(-width // to) * to for width in shape[1:])) for to in ROUND_TO)]
        runs = []
        for rows, into, out in sizes:
            x = torch.ones(rows, into, device=device, dtype=dtype)
            weight = torch.ones(out, into, device=device, dtype=dtype)
            runs.append(stopwatch(lambda x=x, weight=weight: nn.functional.linear(x, weight), device))
        times = interleave(runs, rounds=4 * ROUNDS, console=Quiet(), what="")
        record: dict[str, float | list[int]] = {"shape": list(shape), "ms": quartiles(times[0])[1]}
        for to, values in zip(ROUND_TO, times[1:]):
            record[f"ms_at_{to}"] = quartiles(values)[1]
            record[f"share_at_{to}"] = quartiles([new / old for old, new in zip(times[0], values)])[2]
        found.append(record)
    return found


def _median(run, device: torch.device) -> float:
    (times,) = interleave([stopwatch(run, device)], rounds=ROUNDS, console=Quiet(), what="")
    now(device)
    return quartiles(times)[1]
