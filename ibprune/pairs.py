"""A user's loader of (inputs, targets) pairs as batches."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset

from ibprune.errors import BadData
from ibprune.losses import Batch


class Pairs(IterableDataset):
    """A user's loader of (inputs, targets) as batches {"inputs": (batch, ...), "labels": (batch, ...)}.

    Args:
        source: The loader.
        name: What the user calls it.

    Raises:
        BadData: It can be gone through only once, or (on the way) gives anything else.
    """

    def __init__(self, source: Iterable, name: str = "train_loader"):
        if not isinstance(source, Iterable) or iter(source) is source:
            raise BadData(
                f"expected {name}= that can be gone through again, such as a DataLoader, found {type(source).__name__}."
            )
        self.source, self.name = source, name

    def __iter__(self) -> Iterator[Batch]:
        for pair in self.source:
            parts = list(pair) if isinstance(pair, (tuple, list)) else [pair]
            if len(parts) != 2 or not all(isinstance(part, torch.Tensor) for part in parts):
                found = ", ".join(type(part).__name__ for part in parts)
                raise BadData(f"expected batches (inputs, targets) of two tensors, found ({found}).")
            if len(pair[0]) != len(pair[1]):
                raise BadData(f"expected as many targets as inputs, found {len(pair[0])} and {len(pair[1])}.")
            yield {"inputs": pair[0], "labels": pair[1]}

    def loader(self, seed: int) -> DataLoader:
        """The batches of one epoch; the source shuffles them, by torch's generator or its own."""
        return DataLoader(self, batch_size=None)

    def first(self, samples: int, device: torch.device) -> list[Batch]:
        """Batches with at least so many samples, or all, on the device.

        Raises:
            BadData: There are none.
        """
        taken, count = [], 0
        for batch in self:
            taken.append({key: value.to(device) for key, value in batch.items()})
            count += len(batch["inputs"])
            if count >= samples:
                break
        if not taken:
            raise BadData(f"expected batches from {self.name}, found none.")
        return taken
