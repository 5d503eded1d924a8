"""The stages of a network that no row describes: about a dozen of its modules, in the order in which they run."""

from math import prod

import torch
from torch import nn

from ibprune.errors import BadData, UnsupportedModel, first_line
from ibprune.losses import Batch
from ibprune.task_heads import complete
from ibprune.tracing import FORWARD_ERRORS

FEWEST, MOST = 6, 12  # stages; fewer where the modules lie no deeper
ROWS = 2  # inputs that are run to see the order


def call(model: nn.Module, batch: Batch) -> object:
    """The output of a model for a batch without labels; its "inputs", where it has them, are all that is read."""
    return model(batch["inputs"]) if "inputs" in batch else model(**complete(model, batch))


@torch.no_grad()
def stage_layers(model: nn.Module, batch: Batch) -> list[str]:
    """Paths of the modules whose outputs tell what a network knows on the way, in the order in which they run.

    Modules are opened level by level, until there are at least six stages or nothing is left to open, and thinned
    out evenly, the first and the last kept, where they are more than a dozen. A norm, an activation or a pooling
    that follows a layer stands for it, because that is what the next layer reads.

    Args:
        batch: That the model reads, (batch, ...); two rows of it are run.

    Raises:
        BadData: The model cannot read the batch.
        UnsupportedModel: No module inside it gives a tensor with a row per input.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> stage_layers(net, {"inputs": torch.zeros(2, 8)})
        ['1', '2']
    """
    shapes = _shapes(model, batch)
    stages: list[str] = []
    level = [""]
    while len(stages) < FEWEST:
        deeper = [part for path in level for part in (_parts(path, shapes) or [path])]
        if deeper == level:
            break
        level = deeper
        found = _ends(model, [path for path in shapes if path in set(level)], shapes)
        stages = found or stages
    if not stages:
        raise UnsupportedModel(f"expected layers inside {type(model).__name__} to audit, found none.")
    last = len(stages) - 1
    chosen = range(len(stages)) if last < MOST else (round(i * last / (MOST - 1)) for i in range(MOST))
    return [stages[i] for i in chosen]


def _shapes(model: nn.Module, batch: Batch) -> dict[str, tuple[int, ...]]:
    """Shapes of all modules' outputs by path, in the order in which the modules end; () without a row per input."""
    few = {key: value[:ROWS] for key, value in batch.items() if key != "labels"}
    device = next(model.parameters()).device
    size = len(next(iter(few.values())))
    shapes: dict[str, tuple[int, ...]] = {}

    def note(path: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            shapes.pop(path, None)  # of the last run
            per_input = isinstance(first, torch.Tensor) and first.ndim > 1 and len(first) == size
            shapes[path] = tuple(first.shape) if per_input else ()

        return hook

    training = [module for module in model.modules() if module.training]
    handles = [module.register_forward_hook(note(path)) for path, module in model.named_modules()]
    try:
        call(model.eval(), {key: value.to(device) for key, value in few.items()})
    except FORWARD_ERRORS as error:
        raise BadData(f"expected inputs that {type(model).__name__} reads: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return shapes


def _parts(path: str, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The nearest modules inside a module that run; lists of modules do not."""
    inside = [p for p in shapes if p != path and (not path or p.startswith(f"{path}."))]
    return [p for p in inside if not any(p.startswith(f"{other}.") for other in inside)]


def _ends(model: nn.Module, level: list[str], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """One path per module that makes features: its own, or the last one's that only scales or pools them.

    A pooling over all positions does not count: it is what an audit reads of a map anyway.
    """
    ends: list[str] = []
    for path in level:
        shape = shapes[path]
        if not shape:
            continue
        if any(parameter.ndim > 1 for parameter in model.get_submodule(path).parameters()):
            ends.append(path)
        elif ends and len(shape) == len(shapes[ends[-1]]) and (prod(shape[2:]) > 1 or len(shape) == 2):
            ends[-1] = path
    return ends
