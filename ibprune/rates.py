"""How fast a device trains a model: one block of it, of its real width, forwards and backwards."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from ibprune.console import Quiet
from ibprune.dry_steps import DryRun, hollow, made_up_batch, mixed
from ibprune.footprint import Watch
from ibprune.losses import Objective, forward
from ibprune.rebuild import full_path
from ibprune.sites import block_paths, find_family, is_traced
from ibprune.timing import interleave, quartiles, stopwatch

ROUNDS = 3


def block_rate(
    skeleton: PreTrainedModel,
    objective: Objective,
    rows: int,
    length: int,
    shape: tuple[int, int, int] | None,
    how: DryRun,
    device: torch.device,
) -> float:
    """Floating point operations a second of the model's second block with random weights; of a CNN, of all of it.

    Only products are counted, but what a block does beside them (norms, softmax, dropout) takes its time, as in a run.

    Args:
        skeleton: The dense model on the device "meta"; it is of no use afterwards.
        rows, length: Sequences and their tokens.
        shape: Of a picture, where it reads pictures.
    """
    path = ""
    if not is_traced(skeleton.config.model_type):
        paths = block_paths(skeleton, find_family(skeleton.config.model_type))
        path = full_path(skeleton, paths[min(1, len(paths) - 1)])
    block = skeleton.get_submodule(path)
    real = _with_values(copy.deepcopy(block), device)
    seen: list[tuple[tuple, dict]] = []
    block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with hollow(skeleton), torch.no_grad():
        forward(skeleton, made_up_batch(skeleton, objective, rows, length, shape))
    args, kwargs = seen[0]
    args, kwargs = tree_map(_made_up(device), (args, {k: v for k, v in kwargs.items() if "past_key" not in k}))

    def run() -> None:
        with mixed(device, how):
            output = real(*args, **kwargs)
        sum(x.float().mean() for x in tree_leaves(output) if isinstance(x, torch.Tensor)).backward()

    with Watch() as watch:
        run()
    (times,) = interleave([stopwatch(run, device)], rounds=ROUNDS, console=Quiet(), what="")
    return 1000 * watch.flops / quartiles(times)[1]


@torch.no_grad()
def _with_values(module: nn.Module, device: torch.device) -> nn.Module:
    module = module.to_empty(device=device).train()
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.02)
    for buffer in module.buffers():
        buffer.fill_(1)
    return module


def _made_up(device: torch.device) -> Callable[[object], object]:
    """Puts random values of the same shape in the place of tensors; activations ask for their gradients."""

    def made(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, dtype=x.dtype, device=device, requires_grad=x.ndim > 2)
        return torch.ones(x.shape, dtype=x.dtype, device=device)

    return made
