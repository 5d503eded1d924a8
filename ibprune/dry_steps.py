"""One step of training without weights: what it computes and how much it holds, on tensors that have no storage."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ibprune.console import Quiet
from ibprune.errors import UnsupportedModel
from ibprune.footprint import Watch
from ibprune.losses import Batch, Objective, forward, training_loss
from ibprune.masks import MaskSet
from ibprune.names import ANSWERS, TAGS, WRITES
from ibprune.rebuild import full_path
from ibprune.scores import blocks_again, gate_gradients
from ibprune.sites import block_lists, find_family, is_traced
from ibprune.trainer import checkpoint_blocks_


@dataclass(frozen=True)
class Step:
    """What one batch takes.

    Attributes:
        flops: Of the model that is trained, forwards and backwards.
        forward_flops: Those of its forward pass.
        teacher_flops: Of the dense model's forward pass.
        kept_bytes: What lives between the forward and the backward pass.
        activation_bytes: The most that lives at once beside weights and their gradients; of these the newest.
    """

    flops: int = 0
    forward_flops: int = 0
    teacher_flops: int = 0
    kept_bytes: int = 0
    activation_bytes: int = 0


@dataclass(frozen=True)
class DryRun:
    """How a step runs.

    Attributes:
        precision: fp32 or bf16 (autocast; the weights stay in float32).
        fused: Whether attention keeps no products of queries and keys, as a GPU's kernels do; a CPU's do without
            dropout.
        checkpointing: Whether blocks run again in the backward pass.
        frozen: Whether masks alone are trained.
    """

    precision: str = "fp32"
    fused: bool = False
    checkpointing: bool = False
    frozen: bool = False


class _WithoutDropout(TorchFunctionMode):
    """Attention without dropout, for which a CPU has a kernel that keeps what a GPU's keep in either case."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def made_up_batch(
    model: PreTrainedModel, objective: Objective, rows: int, length: int, shape: tuple[int, int, int] | None
) -> Batch:
    """A batch of the sizes that a run reads, (rows, length) tokens or (rows, *shape) pixels, with labels.

    Under `hollow` it has no storage either.
    """
    if shape:
        batch = {"pixel_values": torch.zeros(rows, *shape)}
    else:
        batch = {name: torch.ones(rows, length, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    sizes = {ANSWERS: (rows, 2), "classification": (rows,), "regression": (rows,)}
    if objective.name in (TAGS, WRITES, "causal_lm", "masked_lm"):
        sizes[objective.name] = (rows, length)
    if objective.name == WRITES:
        batch["decoder_input_ids"] = torch.ones(rows, length, dtype=torch.int64)
    if objective.name in sizes:
        dtype = torch.float32 if objective.name == "regression" else torch.int64
        batch["labels"] = torch.zeros(sizes[objective.name], dtype=dtype)
    return batch


@contextmanager
def hollow(*models: PreTrainedModel) -> Iterator[None]:
    """The models, moved from the device "meta", and all tensors made here are of the CPU and hold nothing.

    Unlike on "meta", autocast works on them, and attention takes the kernel that a CPU takes.

    Raises:
        UnsupportedModel: What is computed depends on values.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models:
            _emptied_(model)
        try:
            yield
        except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
            raise UnsupportedModel(
                f"what a '{models[0].config.model_type}' model of this kind computes depends on what it reads: there "
                "is no estimate for it."
            ) from error


def _emptied_(model: nn.Module) -> None:
    """Gives a model tensors of the present mode, ties kept.

    `to_empty` meets a module that stands in two places twice, and would swap its tensors in place, which fails while
    anything knows them.
    """
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old ones are held: an id is given again
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    known[id(tensor)] = tensor, empty
                tensors[name] = known[id(tensor)][1]


def train_step(
    student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, batch: Batch, how: DryRun
) -> Step:
    """One batch forwards and backwards, distilled from the teacher where there is one, with real tensors or without.

    A gradient is let go as soon as it is there, so that what is counted are the activations.
    """
    student.train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not how.frozen or name.startswith("vib_masks"))
    if how.checkpointing:
        checkpoint_blocks_(student)
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for parameter in student.parameters()
        if parameter.requires_grad
    ]
    device = next(student.parameters()).device
    watch, target = Watch(), None
    with _attention(how), watch:
        if teacher is not None:
            with torch.no_grad(), mixed(device, how):
                target = forward(teacher, batch)
        taught = watch.flops
        with mixed(device, how):
            outputs = forward(student, batch)
        loss = training_loss(objective, outputs, target, batch)
        kept, seen = watch.live, watch.flops
        del outputs, target
        loss.backward()
    for handle in handles:
        handle.remove()
    return Step(watch.flops - taught, seen - taught, taught, kept, watch.peak)


def score_step(student: PreTrainedModel, masks: MaskSet, objective: Objective, batch: Batch, how: DryRun) -> Step:
    """One batch of the scores that read gate gradients."""
    watch, again = Watch(), blocks_again(student.eval()) if how.checkpointing else nullcontext()
    with _attention(how), mixed(next(student.parameters()).device, how), again, watch:
        list(gate_gradients(student.eval(), masks, [batch], objective, seed=0, total=1, console=Quiet()))
    return Step(flops=watch.flops, activation_bytes=watch.peak)


def mixed(device: torch.device, how: DryRun) -> torch.autocast:
    """The precision in which a forward pass runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bf16")


def _attention(how: DryRun) -> AbstractContextManager:
    return _WithoutDropout() if how.fused else nullcontext()


def over_depth(models: tuple[PreTrainedModel, ...], run: Callable[[], tuple[Step, ...]]) -> tuple[Step, ...]:
    """What steps of whole models take, found with their first two blocks where all others are like the second.

    Every block adds the same, so that two depths give all: with d blocks x(d) = x(1) + (d - 1) (x(2) - x(1)).
    Operations and what is kept are exact; the peak only where it lies at the same place at both depths. The models lose
    their blocks.

    Args:
        run: Steps of the models as they are.
    """
    depth = _depth(models[0])
    if depth <= 2 or any(_depth(model) != depth for model in models):
        return run()
    found = []
    for blocks in (2, 1):
        for model in models:
            _shorten_(model, blocks)
        found.append(run())
    return tuple(
        Step(*(one + (depth - 1) * (two - one) for two, one in zip(*map(astuple, pair)))) for pair in zip(*found)
    )


def _depth(model: PreTrainedModel) -> int:
    """How many blocks each stack has, or 0 where they differ beyond the first."""
    if is_traced(model.config.model_type):
        return 0
    shapes, depths = [], set()
    for path in block_lists(model, find_family(model.config.model_type)):
        blocks = model.get_submodule(full_path(model, path))
        depths.add(len(blocks))
        shapes += [[(name, p.shape) for name, p in block.named_parameters()] for block in list(blocks)[1:]]
        if any(other != shapes[-1] for other in shapes[1 - len(blocks) :]):
            return 0
    return depths.pop() if len(depths) == 1 else 0


def _shorten_(model: PreTrainedModel, blocks: int) -> None:
    for path in block_lists(model, find_family(model.config.model_type)):
        whole = full_path(model, path)
        parent, _, name = whole.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList(list(model.get_submodule(whole))[:blocks]))
