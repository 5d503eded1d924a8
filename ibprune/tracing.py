"""Which features of a module only go together: Torch-Pruning's dependency graph, read out feature by feature."""

import warnings
from dataclasses import dataclass

import torch
import torch_pruning
from torch import nn

from ibprune.errors import UnsupportedModel, first_line
from ibprune.groups import Cut, axis_width

# What a forward raises when it meets something it was not written for.
FORWARD_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
Place = tuple[str, str]  # module path, axis
Feature = tuple[str, str, int]  # module path, axis, index


@dataclass(frozen=True)
class Unit:
    """Features that only go together, by place in model order, and why they must stay, or ""."""

    features: dict[Place, tuple[int, ...]]
    reason: str


def trace_units(model: nn.Module, example: torch.Tensor) -> list[Unit]:
    """The smallest sets of features that only go together, in model order.

    The coupling is that of the dependency graph (Fang et al. 2023, arXiv 2301.12900); features of one
    convolution group, or of one GroupNorm group, go together besides. What this says is a proposal:
    `ibprune.channels` proves it.

    Raises:
        UnsupportedModel: The forward cannot be traced.
    """
    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph.build_dependency(model, example, output_transform=_marked, verbose=False)
            return _Coupling(model, graph).units()
    except FORWARD_ERRORS as error:
        raise UnsupportedModel(
            f"the forward of {type(model).__name__} cannot be traced, so nothing says which channels belong together: "
            f"{first_line(error)}"
        ) from error


def tensors(output: object) -> list[torch.Tensor]:
    """The tensors of a module's output: one, a tuple or list of them, or a dict (transformers' outputs)."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    return [x for part in output for x in tensors(part)] if isinstance(output, (tuple, list)) else []


def _marked(output: object) -> list[torch.Tensor]:
    """The outputs behind one more operation: a graph that ends in a layer would not show its end."""
    marked = [x * 1.0 for x in tensors(output) if x.grad_fn is not None]
    if not marked:
        raise RuntimeError("it computes its output without gradients.")
    return marked


class _Coupling:
    """Union-find over the features of a model, with a reason for those that must stay."""

    def __init__(self, model: nn.Module, graph: torch_pruning.DependencyGraph):
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.paths: dict[nn.Module | nn.Parameter, Place] = {}
        self.widths: dict[Place, int] = {}
        self.parent: dict[Feature, Feature] = {}
        self.reasons: dict[Feature, str] = {}
        for path, module in self.modules.items():
            self.widths |= {(path, axis): width for axis, width in _widths(module).items()}
            self._join_groups(path, module)
        for path, module in self.modules.items():
            if module in graph.module2node and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                self._walk(path, module)

    def units(self) -> list[Unit]:
        features: dict[Feature, dict[Place, list[int]]] = {}
        for place, width in self.widths.items():
            for i in range(width):
                if (*place, i) in self.parent:
                    features.setdefault(self._find((*place, i)), {}).setdefault(place, []).append(i)
        reasons = {self._find(feature): reason for feature, reason in self.reasons.items()}
        return [
            Unit({place: tuple(found) for place, found in places.items()}, reasons.get(root, ""))
            for root, places in features.items()
        ]

    def _find(self, feature: Feature) -> Feature:
        root = feature
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[feature] != root:
            self.parent[feature], feature = root, self.parent[feature]
        return root

    def _join(self, a: Feature, b: Feature) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self.parent[b] = a

    def _join_groups(self, path: str, module: nn.Module) -> None:
        """The features of one group go together; without groups a convolution mixes, a GroupNorm is one group."""
        match module:
            case nn.GroupNorm():
                groups = module.num_groups
            case nn.modules.conv._ConvNd() if module.groups > 1:
                groups = module.groups
            case _:
                return
        for axis, width in _widths(module).items():
            for i in range(width):
                group = i * groups // width
                self._join((path, "out", group * self.widths[path, "out"] // groups), (path, axis, i))

    def _walk(self, path: str, module: nn.Module) -> None:
        """Joins everything that the graph reaches from a layer's outputs."""
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        first = self.graph.get_pruning_group(module, prune, [0])
        # A walk with all channels names each place once: where a channel reaches others of its own layer
        # (a gate made by splitting it) every channel needs a walk of its own.
        folded = any(item.dep.target.module is module and len(item.idxs) > 1 for item in first.items)
        width = self.widths[path, "out"]
        for channels in [[i] for i in range(width)] if folded else [list(range(width))]:
            for item in self.graph.get_pruning_group(module, prune, channels).items:
                for feature, root in zip(item.idxs, item.root_idxs):
                    self._reach((path, "out", root), item.dep, feature)

    def _reach(self, root: Feature, dep, feature: int) -> None:
        target = dep.target.module
        if isinstance(target, torch_pruning.ops._OutputOp):
            self._join(root, root)
            self.reasons[root] = "they are the model's output"
            return
        place = self._place(target, dep)
        if place is None:
            return
        width = self.widths.get(place, 0)
        if feature < width:
            self._join(root, (*place, feature))
            return
        self._join(root, root)
        if width:
            reason = (
                f"{self.widths[root[:2]]} channels meet the {width} of '{place[0]}': a width is written in the forward"
            )
        else:
            reason = f"they reach '{place[0]}', a {type(target).__name__}, which cannot be cut"
        self.reasons.setdefault(root, reason)

    def _place(self, target: nn.Module | nn.Parameter, dep) -> Place | None:
        """Where a step of the walk arrives; None for operations that hold no features."""
        if not self.paths:
            self.paths = {module: (path, "") for path, module in self.modules.items()}
            for path, module in self.modules.items():
                self.paths |= {p: (path, "own") for p in module.parameters(recurse=False)}
        path, axis = self.paths.get(target, (None, ""))
        if path is None:
            return None
        return path, axis or ("out" if self.graph.is_out_channel_pruning_fn(dep.handler) else "in")


def _widths(module: nn.Module) -> dict[str, int]:
    """Features by axis of the modules that can be cut, also where no tensor holds one slice for each."""
    match module:
        case nn.modules.conv._ConvNd():
            return {"out": module.out_channels, "in": module.in_channels}
        case nn.Linear():
            return {"out": module.out_features, "in": module.in_features}
        case nn.modules.batchnorm._NormBase():
            return {"out": module.num_features}
        case nn.GroupNorm():
            return {"out": module.num_channels}
        case nn.LayerNorm():
            return {"out": module.normalized_shape[-1]}
        case nn.PReLU():
            return {"out": module.num_parameters}
        case nn.Embedding() | nn.MultiheadAttention() | nn.RNNBase():
            return {}
        case _:
            own = axis_width(module, Cut("", "own"))
            return {"own": own} if own > 1 else {}
