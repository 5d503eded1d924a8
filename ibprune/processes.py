"""What the processes of one run agree on: the main one decides, reads the data and writes; the others train with it."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast, broadcast_object_list, send_to_device
from accelerate.utils.operations import get_data_structure, initialize_tensors, recursively_apply
from torch.nn.parallel import DistributedDataParallel

from ibprune.errors import BadRecipe, IBPruneError

T = TypeVar("T")


def n_processes() -> int:
    """How many processes train together: 1 before `torch.distributed` has started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process; 0 is the main one. It is known from the environment before the others are."""
    if n_processes() > 1:
        return dist.get_rank()
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def shared(value: T) -> T:
    """The main process's value, in all of them, tensors on the CPU; every process has to call it.

    What two devices compute alike may still differ in its last bits, and a cut must not.

    Example:
        >>> shared(0.5)  # alone, it is as it was
        0.5
    """
    if n_processes() == 1:
        return value
    box = [recursively_apply(torch.Tensor.cpu, value) if process_index() == 0 else None]
    broadcast_object_list(box)
    return box[0]


def on_main(make: Callable[[], T]) -> T:
    """What the main process makes of it while the others wait; it may call nothing that every process has to.

    Raises:
        IBPruneError: What `make` raises, in all processes. After any other error whatever started them ends them.
    """
    if n_processes() == 1:
        return make()
    made, error = None, None
    if process_index() == 0:
        try:
            made = make()
        except IBPruneError as found:
            error = found
    made, why = shared((made, None if error is None else str(error)))
    if error is not None:
        raise error
    if why is not None:
        raise IBPruneError(why)
    return made


def check_batch_size(batch_size: int) -> None:
    """Raises `BadRecipe` where the rows of a batch cannot be divided between the processes."""
    if batch_size % n_processes():
        raise BadRecipe(
            f"--batch-size: expected a multiple of the {n_processes()} processes, among which each batch is divided, "
            f"found {batch_size}."
        )


def divided(batches: Iterable[dict[str, torch.Tensor]], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """This process's rows of batches that the main process reads, on the device; equally many in every process.

    So a step takes the same rows, hidden tokens and padding however many processes there are. Of several, rows that
    are left over in the last batch of an epoch are not trained on, nor is a batch with fewer rows than processes.

    Raises:
        IBPruneError: What reading them raises, in all processes.
    """
    n, index = n_processes(), process_index()
    if n == 1:
        yield from (send_to_device(batch, device) for batch in batches)
        return
    iterator = iter(batches) if index == 0 else iter(())
    while True:
        batch, error = None, None
        try:
            batch = next(iterator, None)
        except IBPruneError as found:
            error = found
        structure = [str(error) if error else None if batch is None else get_data_structure(batch)]
        broadcast_object_list(structure)
        if isinstance(structure[0], str):
            raise error or IBPruneError(structure[0])
        if structure[0] is None:
            return
        batch = initialize_tensors(structure[0]) if batch is None else batch
        batch = broadcast(send_to_device(batch, device))
        rows = min(len(tensor) for tensor in batch.values()) // n
        if rows:
            yield {name: tensor[index * rows : (index + 1) * rows] for name, tensor in batch.items()}


def leave() -> None:
    """Parts from the other processes, at the end of a command."""
    if n_processes() > 1:
        dist.destroy_process_group()


def undistributed(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, where it is wrapped to train with other processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model
