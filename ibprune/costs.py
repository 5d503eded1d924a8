"""What a model costs as an exact formula of how many units each site keeps."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from ibprune.errors import UnsupportedModel, first_line
from ibprune.examples import example_inputs, image_shape
from ibprune.groups import Cut, Family, Site, axis_dims, axis_width, get_tensor
from ibprune.rebuild import FactorizedEmbedding, FactorizedUnembedding, full_path
from ibprune.sites import block_paths, came_factorized, find_family
from ibprune.task_heads import reads_end

COSTS = ("params", "macs", "memory", "latency")
FEMTOSECONDS_PER_MS = 10**12
SCOPES = ("model", "blocks")


@dataclass(frozen=True)
class Term:
    """A cost of `coefficient` x the product of the kept units of `sites`.

    `rank` names the embedding_rank site for terms of a factorised embedding: the factored form
    (`dense` False) counts while some direction is cut, the dense form while all are kept.
    """

    coefficient: int
    sites: tuple[str, ...]
    in_blocks: bool
    rank: str = ""
    dense: bool = False


@dataclass(frozen=True)
class CostModel:
    """Sum over tensors (params) or products (MACs) of size x kept fractions; exact, one formula.

    Attributes:
        cost: "params", or "macs" of one sequence of `length` tokens, of one image where the model reads images; or
            "memory" in bytes (`ibprune.memory`), or "latency" in femtoseconds (`ibprune.latency`).
        dense: Cost of the dense model by scope, where this is of a model that costs more with all its units.
    """

    cost: str
    terms: tuple[Term, ...]
    n_units: dict[str, int]
    length: int = 0
    dense: Mapping[str, int] | None = None

    def of_dense(self, *, scope: str = "model") -> int:
        """What budgets are shares of."""
        return self(self.n_units, scope=scope) if self.dense is None else self.dense[scope]

    def __call__(self, kept: Mapping[str, int], *, scope: str = "model") -> int:
        """The exact cost when `kept[site]` units stay (the number matters, not which)."""
        return int(sum(self._values(kept, scope)))

    def _values(self, kept: Mapping[str, int], scope: str) -> list[int]:
        values = []
        for term in self.terms:
            if scope == "blocks" and not term.in_blocks:
                continue
            if term.rank and (kept[term.rank] >= self.n_units[term.rank]) != term.dense:
                continue
            value = term.coefficient
            for site in term.sites:
                value = value * kept[site]
            values.append(value)
        return values

    def unit_cost(self, kept: Mapping[str, int], site: str, *, scope: str = "model") -> float:
        """Cost that the next unit of a site takes with it, all else as in `kept` (factored form for a rank)."""
        total = 0
        for term in self.terms:
            if site in term.sites and not (term.rank == site and term.dense) and (scope == "model" or term.in_blocks):
                if term.rank and term.rank != site and (kept[term.rank] >= self.n_units[term.rank]) != term.dense:
                    continue
                value = term.coefficient
                for other in term.sites:
                    value *= kept[other] if other != site else 1
                often = term.sites.count(site)  # a layer that reads and writes one residual stream: twice
                total += value * (kept[site] ** often - (kept[site] - 1) ** often)
        return total


def amount(value: int, cost: str) -> str:
    """A cost with its unit, for people.

    Example:
        >>> amount(1200, "params"), amount(1200, "memory"), amount(2_500_000_000_000, "latency")
        ('1,200 params', '1,200 bytes of memory', '2.500 ms of latency')
    """
    if cost == "latency":
        return f"{value / FEMTOSECONDS_PER_MS:,.3f} ms of latency"
    return f"{value:,} bytes of memory" if cost == "memory" else f"{value:,} {cost}"


Product = tuple[int, tuple[str, ...]]  # coefficient, the sites whose kept units multiply it
Owners = dict[tuple[str, int], list[tuple[str, int]]]  # (parameter name, dimension): sites, features per unit


def dimension_owners(model: nn.Module, sites: dict[str, Site]) -> tuple[Owners, dict[str, list[str]]]:
    """Which sites cut each dimension of each parameter, and which sub-layer sites hold each module."""
    dims: Owners = {}
    whole: dict[str, list[str]] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for site in sites.values():
        for cut in site.cuts:
            if cut.axis == "whole":
                for path, _ in model.get_submodule(cut.path).named_modules(prefix=cut.path):
                    whole.setdefault(path, []).append(site.name)
                continue
            module = model.get_submodule(cut.path)
            for name, dim in axis_dims(module, cut.axis):
                tensor = get_tensor(module, name)
                if id(tensor) in names:  # not a buffer
                    _, width = cut.span(site.n_units, tensor.shape[dim])
                    owners = dims.setdefault((names[id(tensor)], dim), [])
                    if (site.name, width) not in owners or cut.width:  # tied modules own a parameter once
                        owners.append((site.name, width))
    return dims, whole


def parameter_products(name: str, shape: torch.Size, n_units: dict[str, int], dims: Owners) -> list[Product]:
    """The size of a parameter as a sum of (coefficient, sites): coefficient x the units the sites keep.

    A dimension that several sites share has as many features as they keep together, plus what nobody
    owns; multiplying the dimensions out gives the sum.
    """
    products: list[Product] = [(1, ())]
    for dim, size in enumerate(shape):
        owners = dims.get((name, dim), [])
        parts = [(width, (site,)) for site, width in owners]
        rest = size - sum(width * n_units[site] for site, width in owners)
        if rest:
            parts.append((rest, ()))
        products = [(c * width, (*s, *site)) for c, s in products for width, site in parts]
    return products


def params_model(model: nn.Module, sites: dict[str, Site]) -> CostModel:
    """Parameters of the model as a function of the plan; tied tensors count once.

    The counts equal `sum(p.numel() for p in model.parameters())` after compaction, exactly.
    """
    dims, whole = dimension_owners(model, sites)
    n_units = {name: site.n_units for name, site in sites.items()}
    rank = _rank_site(model, sites)
    terms = []
    for name, parameter in model.named_parameters():
        if name.startswith("vib_masks"):
            continue
        owner = name.rpartition(".")[0]
        for coefficient, cutters in parameter_products(name, parameter.shape, n_units, dims):
            in_rank = rank if rank and rank in cutters else ""
            factors = (*cutters, *whole.get(owner, ()))
            terms.append(Term(coefficient, factors, _in_blocks(sites, owner), in_rank))
            if in_rank and not owner.endswith(".projection"):  # while nothing is cut the two factors are one matrix
                projection = f"{owner}.projection.weight"  # of the embedding, or of a tied output that comes first
                width, hidden = _hidden(projection, model.get_parameter(projection).shape[0], n_units, dims)
                rows = tuple(site for site in cutters if site != rank)
                terms.append(Term(coefficient * width, (*rows, *hidden), False, in_rank, dense=True))
    return CostModel("params", tuple(terms), n_units)


def _hidden(projection: str, size: int, n_units: dict[str, int], dims: Owners) -> tuple[int, tuple[str, ...]]:
    """The output features of a factorised embedding as (coefficient, sites)."""
    (product,) = parameter_products(projection, torch.Size([size]), n_units, dims)
    return product


def macs_model(model: nn.Module, sites: dict[str, Site], *, length: int) -> CostModel:
    """Multiply-accumulates of one forward pass over one sequence of `length` tokens, read and, by a decoder, written.

    Linear layers and convolutions are counted on the rows they really see, and an attention's products
    of queries, keys and values at their real sizes: both are found by one forward pass without weights,
    with eager attention. One MAC is two FLOPs. Where the model reads images, it is one image of the
    config's size, and the result's `length` is the most rows that a layer sees.
    """
    dims, whole = dimension_owners(model, sites)
    names = {id(p): name for name, p in model.named_parameters()}
    n_units = {name: site.n_units for name, site in sites.items()}
    rank = _rank_site(model, sites)
    family = find_family(model.config.model_type)
    terms = []
    row_counts, products = _dry_run(model, length)
    for path in _routed(model, family.experts):
        rows = row_counts.pop(path)  # each runs through one expert, however many there are
        for name, tensor in model.get_submodule(path).named_parameters(prefix=path, recurse=False):
            each = {key: owners for key, owners in dims.items() if key != (name, 0)}
            for coefficient, cutters in parameter_products(name, torch.Size([1, *tensor.shape[1:]]), n_units, each):
                factors = (*cutters, *whole.get(path, ()))
                terms.append(Term(rows * coefficient, factors, _in_blocks(sites, path)))
    for path, rows in row_counts.items():
        module = model.get_submodule(path)
        weight = module.weight
        tensors = [weight]
        if isinstance(module, (FactorizedEmbedding, FactorizedUnembedding)):
            tensors = [module.projection.weight]
            if isinstance(module, FactorizedUnembedding):
                tensors.append(weight)
        for tensor in tensors:
            for coefficient, cutters in parameter_products(names[id(tensor)], tensor.shape, n_units, dims):
                in_rank = rank if rank in cutters else ""
                factors = (*cutters, *whole.get(path, ()))
                terms.append(Term(rows * coefficient, factors, _in_blocks(sites, path), in_rank))
        if rank and isinstance(module, FactorizedUnembedding):
            merged = names[id(module.projection.weight)], names[id(weight)]
            width, hidden = _hidden(merged[0], module.projection.weight.shape[0], n_units, dims)
            ((tokens, vocab),) = parameter_products(merged[1], weight.shape[:1], n_units, dims)
            terms.append(Term(rows * tokens * width, (*vocab, *hidden), False, rank, dense=True))
    for attention, path in attentions(model, family):
        made = products.get(attention, 0)
        if made:  # not where the attention was removed
            # what an attention multiplies is shared equally by the features that it hands on
            module = model.get_submodule(path)
            ((name, dim),) = axis_dims(module, "in")
            features = axis_width(model, Cut(path, "in"))
            owned = {(name, 0): dims.get((names[id(get_tensor(module, name))], dim), [])}
            for coefficient, cutters in parameter_products(name, torch.Size([features]), n_units, owned):
                factors = (*cutters, *whole.get(path, ()))
                terms.append(Term(made // features * coefficient, factors, True))
    if image_shape(model) is not None:
        length = max(row_counts.values())
    return CostModel("macs", tuple(terms), n_units, length)


def module_macs_model(model: nn.Module, sites: dict[str, Site], example: torch.Tensor) -> CostModel:
    """Multiply-accumulates of the layers' weights for one sample of any module.

    Each weight of a convolution or a linear layer is multiplied once per position: of the output, or of the input for
    a transposed convolution. The positions come from one forward pass on the example, (batch, ...). Weights of
    `nn.MultiheadAttention` and of recurrent layers, which are never cut, count as they are. Products of activations
    with each other, as in an attention, belong to no layer and are left out, as are weights used outside of a layer.
    """
    dims, _ = dimension_owners(model, sites)
    names = {id(p): name for name, p in model.named_parameters()}
    n_units = {name: site.n_units for name, site in sites.items()}
    terms = []
    positions, fixed = _positions(model, example)
    if fixed:
        terms.append(Term(fixed // len(example), (), False))
    for path, count in positions.items():
        weight = model.get_submodule(path).weight
        for coefficient, cutters in parameter_products(names[id(weight)], weight.shape, n_units, dims):
            terms.append(Term(count // len(example) * coefficient, cutters, False))
    return CostModel("macs", tuple(terms), n_units)


@torch.no_grad()
def _positions(model: nn.Module, example: torch.Tensor) -> tuple[dict[str, int], int]:
    """At how many positions of the whole example each layer's weight is multiplied, by module path.

    And the multiply-accumulates of what is never cut: attentions with packed weights, recurrent layers.
    """
    counts: dict[str, int] = {}
    fixed = 0

    def count(path: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            at = args[0] if getattr(module, "transposed", False) else output
            features = at.shape[-1] if isinstance(module, nn.Linear) else at.shape[1]
            counts[path] = counts.get(path, 0) + at.numel() // features

        return hook

    def count_fixed(module: nn.Module, args: tuple, named: dict, output: object) -> None:
        nonlocal fixed
        first = args[0] if args else named.get("query", named.get("input"))
        first = getattr(first, "data", first)  # of a packed sequence
        if isinstance(module, nn.RNNBase):  # every matrix at every step
            fixed += first.numel() // first.shape[-1] * sum(p.numel() for p in module.parameters() if p.ndim > 1)
            return
        key, value = (args[i] if len(args) > i else named[name] for i, name in ((1, "key"), (2, "value")))
        fixed += (2 * first.numel() + key.numel() + value.numel()) * module.embed_dim  # three projections in, one out

    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [module.register_forward_hook(count(path)) for path, module in layers]
    uncut = [module for module in model.modules() if isinstance(module, (nn.MultiheadAttention, nn.RNNBase))]
    handles += [module.register_forward_hook(count_fixed, with_kwargs=True) for module in uncut]
    training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return counts, fixed


class _Products(TorchDispatchMode):
    """Counts the multiply-accumulates of batched matrix products, by the attention that makes them."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}
        self.inside: list[str] = []  # the attention that runs; "" in a layer inside it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and self.inside and self.inside[-1]:
            path = self.inside[-1]
            self.counts[path] = self.counts.get(path, 0) + args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))

    def watch(self, module: nn.Module, path: str) -> None:
        def leave(module: nn.Module, args: tuple, output: object) -> None:
            self.inside.pop()

        module.register_forward_pre_hook(lambda *_: self.inside.append(path))
        module.register_forward_hook(leave)


def attentions(model: nn.Module, family: Family) -> list[tuple[str, str]]:
    """Paths of every attention and of the layer that reads its result, where both are there."""
    modules = dict(model.named_modules())
    inside = [(family.attention, family.context), (family.cross_attention, family.cross_context)]
    pairs = [
        [full_path(model, f"{block}.{p}") for p in pair] for block in block_paths(model, family) for pair in inside
    ]
    return [(attention, context) for attention, context in pairs if attention in modules and context in modules]


def _routed(model: nn.Module, path: str) -> list[str]:
    """Paths of the routers, or of their experts, where blocks have them: `path` is that from the block."""
    modules = dict(model.named_modules())
    blocks = block_paths(model, find_family(model.config.model_type)) if path else ()
    return [path for path in (full_path(model, f"{block}.{path}") for block in blocks) if path in modules]


def _dry_run(model: nn.Module, length: int) -> tuple[dict[str, int], dict[str, int]]:
    """What one sequence of `length` tokens, or one image, takes: rows by path of the layer, products by that of the
    attention.

    Raises:
        UnsupportedModel: The model cannot read a plain sequence of this length, or image.
    """
    skeleton, inputs = dry_model(model, length)
    family = find_family(model.config.model_type)
    rows: dict[str, int] = {}
    products = _Products()

    def count(path: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            if path in experts:  # a row for each expert that a token takes
                found = args[1].numel()
            else:
                made = output[0] if path in routers else output
                found = made.numel() // made.shape[1 if isinstance(module, nn.modules.conv._ConvNd) else -1]
            rows[path] = rows.get(path, 0) + found

        return hook

    routers, experts = _routed(skeleton, family.router), _routed(skeleton, family.experts)
    for path in (*routers, *experts):
        skeleton.get_submodule(path).register_forward_hook(count(path))
    inside = [p for p, m in skeleton.named_modules() if isinstance(m, (FactorizedEmbedding, FactorizedUnembedding))]
    for path, module in skeleton.named_modules():
        factored = isinstance(module, (FactorizedEmbedding, FactorizedUnembedding))
        layer = isinstance(module, (nn.Linear, Conv1D, nn.modules.conv._ConvNd))
        if factored or (layer and path.rpartition(".")[0] not in inside):
            module.register_forward_hook(count(path))
        if layer:
            products.watch(module, "")
    for path, _ in attentions(model, family):
        products.watch(skeleton.get_submodule(path), path)
    try:
        with torch.no_grad(), products:
            skeleton(**inputs)  # no attention mask: its values would be read
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        read = "an image" if image_shape(model) is not None else f"a sequence of {length} tokens"
        raise UnsupportedModel(
            f"expected a {type(model).__name__} to read {read}, but it fails: {first_line(error)}"
        ) from error
    return rows, products.counts


def dry_model(model: nn.Module, length: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy of a transformers model without weights, and one sequence of `length` tokens, or an image, that it reads.

    They are on the meta device, but for heads that look for a token in the ids, whose values meta tensors lack: then on
    the CPU, with weights that all are one zero.
    """
    device = "cpu" if reads_end(model) else "meta"
    skeleton = _skeleton(model, device)
    for module in skeleton.modules():  # frequencies that follow the length are found by values, and multiply nothing
        kind = getattr(module, "rope_type", None)  # one for each type of attention, in some families
        if kind is not None:
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    skeleton.set_attn_implementation("eager")  # whose products are seen
    if find_family(model.config.model_type).experts:
        skeleton.config._experts_implementation = "batched_mm"  # whose steps depend on no values
    inputs = {key: value.to(device) for key, value in example_inputs(skeleton, batch=1, length=length).items()}
    skeleton.config.pad_token_id = None  # GPT-2 would look for padding among the ids
    return skeleton, inputs


def count_params(model: nn.Module) -> int:
    """Parameters by identity, masks left out."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vib_masks"))


def _skeleton(model: nn.Module, device: str) -> nn.Module:
    """The same structure without storage and without hooks."""

    def hollow(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)

    memo = {id(p): nn.Parameter(hollow(p), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): hollow(b) for b in model.buffers()}
    skeleton = copy.deepcopy(model, memo).eval()
    for module in skeleton.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return skeleton


def _rank_site(model: nn.Module, sites: dict[str, Site]) -> str:
    """The directions that are one matrix while none is cut; "" where some are gone already, so that factors stay."""
    if came_factorized(model):
        return ""
    return next((site.name for site in sites.values() if site.mask_at.side == "rank"), "")


def _in_blocks(sites: dict[str, Site], path: str) -> bool:
    return any(site.block and path.startswith(site.block + ".") for site in sites.values())
