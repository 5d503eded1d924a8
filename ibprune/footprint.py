"""What one run of a model takes, counted and not timed: products, operations, memory and bytes of weights."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ibprune.rebuild import FactorizedEmbedding

BATCHED = ("bmm", "baddbmm")  # products of activations with each other, as in an attention


@dataclass(frozen=True)
class Footprint:
    """One run.

    Attributes:
        macs: Multiply-accumulates, all in all.
        batched_macs: Those of them between activations, as of queries and keys.
        operations: What torch starts one by one; views are none.
        activation_bytes: The most that is held at once beside the weights: by torch's allocator on a GPU, by the
            tensors that live between operations on a CPU (what an operation takes inside is not seen there).
        layers: Rows, inputs and outputs of every linear layer, as often as it runs.
    """

    macs: int
    batched_macs: int
    operations: int
    activation_bytes: int
    layers: tuple[tuple[int, int, int], ...]


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
FLOPS = dict(flop_registry) | {  # torch knows the formula of a GPU's attention, and leaves out the CPU's
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_FLASH],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_FLASH_BACKWARD],
}


class Watch(TorchDispatchMode):
    """Counts what runs under it, where the tensors have storage and where they have none.

    Attributes:
        operations: What torch starts one by one; views are none.
        flops: Floating point operations of products, two for a multiply-accumulate, by torch's formulas.
        live, peak: Bytes of the tensors that were made here and are held: now, and at the most.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.flops, self.live, self.peak = 0, 0, 0, 0
        self.known: set[int] = set()  # storages that are held, or that nothing here made: weights and inputs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self.known:
                self._hold(tensor, size=0)
        made = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self.known:
                self._hold(tensor, size=tensor.untyped_storage().nbytes())
        return made

    def _hold(self, tensor: torch.Tensor, *, size: int) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def footprint(model: nn.Module, run: Callable[[], object]) -> Footprint:
    """Counts one run of a model, whose attention is eager while products are counted: others hide them.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        >>> found = footprint(net, lambda: net(torch.ones(2, 3)))
        >>> found.macs, found.operations, found.activation_bytes, found.layers
        (30, 3, 104, ((2, 3, 5),))
    """
    watch = Watch()
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with watch:
        run()
    held = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else watch.peak
    with _eager(model), _linear_layers(model) as layers, FlopCounterMode(display=False) as counter:
        run()
    flops = {str(op): count for op, count in counter.get_flop_counts().get("Global", {}).items()}
    batched = sum(count for op, count in flops.items() if op.removeprefix("aten.") in BATCHED)
    return Footprint(sum(flops.values()) // 2, batched // 2, watch.operations, held, tuple(layers))


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """With an attention whose products can be seen."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _linear_layers(model: nn.Module) -> Iterator[list[tuple[int, int, int]]]:
    """Notes rows, inputs and outputs of each linear layer that runs."""
    found: list[tuple[int, int, int]] = []

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        into, out = args[0].shape[-1], output.shape[-1]
        found.append((output.numel() // out, into, out))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def lookup_params(model: nn.Module) -> int:
    """Parameters that are only looked up: rows of embeddings that no output shares. They take no multiplication.

    Example:
        >>> lookup_params(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)))
        40
    """
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, (nn.Embedding, FactorizedEmbedding))}
    others = {
        id(p)
        for m in model.modules()
        if not isinstance(m, (nn.Embedding, FactorizedEmbedding))
        for p in m.parameters(recurse=False)
    }
    return sum(weight.numel() for key, weight in tables.items() if key not in others)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
