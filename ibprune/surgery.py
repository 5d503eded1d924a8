"""Compacts a model by a plan: folds its masks, cuts what goes, and describes the result in the config."""

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ibprune.embeddings import cut_vocab_, factorize_, merge_
from ibprune.errors import PlanMismatch
from ibprune.groups import Cut, Family, Site, axis_dims, axis_width, is_norm
from ibprune.inject import MASKS, norm_paths, remove_, unnormed
from ibprune.numbering import renumber_layers_
from ibprune.plans import PruningPlan, check_plan
from ibprune.rebuild import (
    STUBS,
    FactorizedEmbedding,
    FactorizedUnembedding,
    full_path,
    pin_rotary_,
    replace_module,
    set_sizes,
)
from ibprune.sites import block_lists, block_paths, came_factorized, find_family, find_sites
from ibprune.slicing import restore_inputs_, slice_

SPEC = "ibprune"
FORMAT = 2  # in 1, the numbers of attentions were left to the loader
SPEC_KEYS = ("format", "model_type", "architecture", "dense", "dropped_blocks", "stubs", "embedding", "shapes")


def compact_(model: nn.Module, plan: PruningPlan, *, means: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """Removes every unit that the plan does not keep and returns the model.

    The result computes what the masked model computes. Masks, where present, are folded into the
    weights first (mu scales the features that its unit owns) and taken out. A factorised embedding
    that keeps all its directions becomes one matrix again. Where the vocabulary is cut, the result reads
    the new ids (`cut_vocab_`). `model.config` tells the new structure. What is done to a tensor does not depend on what
    the others hold: those on the device "meta" take their new shapes.

    Args:
        means: What multiplies each unit's features, by site, (n_units,); default: the means of the model's masks.

    Raises:
        PlanMismatch: The plan does not fit the model; nothing is changed then.
    """
    family = find_family(model.config.model_type)
    sites = find_sites(model)
    rank = [name for name in plan.keep if name.endswith("embedding_rank")]
    if rank and rank[0] not in sites:
        factorize_(model)
        try:
            return compact_(model, plan, means=means)
        except PlanMismatch:
            merge_(model)
            raise
    check_plan(plan, model, sites)
    if "vocab" in sites and len(plan.keep["vocab"]) < sites["vocab"].n_units:
        cut_vocab_(model, plan.keep["vocab"])
    sites = {name: site for name, site in sites.items() if site.kind != "vocab"}
    native = {module for module in model.modules() if type(module) in STUBS.values()}  # held: an id is given again
    dense = {key: copy.copy(getattr(model.config, key)) for key in _size_keys(model)}
    before = _shapes(model)
    with torch.no_grad():
        _fold_(model, sites, _means(model) if means is None else means, norm_offset=family.norm_offset)
    remove_(model)
    pin_rotary_(model)
    sizes = _new_sizes(model, sites, plan)
    widths = {
        key: plan.kept()[name]
        for name, key in family.config_keys.items()
        if name in sites and not sites[name].block and key in dense
    }
    for site in sites.values():  # sub-layers first: their inner units need no cutting
        if all(cut.axis == "whole" for cut in site.cuts) and not plan.keep[site.name]:
            for cut in site.cuts:
                replace_module(model, cut.path, STUBS[cut.stub]())
    slice_(model, sites, plan)
    set_sizes(model, sizes)
    if rank and not came_factorized(model) and len(plan.keep[rank[0]]) == plan.n_units[rank[0]]:
        merge_(model)
    modules = dict(model.named_modules())
    owners = {path: modules.get(path.rpartition(".")[0]) for path in sizes}
    dropped = _drop_empty_blocks_(model, family)
    _retype_layers_(model, family)
    numbers = renumber_layers_(model, dense.get("layer_types"))
    if family.router:
        _settle_experts_(model)
    for key, width in widths.items():
        setattr(model.config, key, width)
    now = {id(module): path for path, module in model.named_modules()}  # blocks behind a dropped one moved up
    sizes = {
        f"{now[id(owners[path])]}.{path.rpartition('.')[2]}": size
        for path, size in sizes.items()
        if id(owners[path]) in now
    } | numbers
    _describe_(model, dense, before, dropped, sizes, native)
    return model


def compact_module_(model: nn.Module, sites: dict[str, Site], plan: PruningPlan) -> nn.Module:
    """Removes the units that the plan does not keep from any module with traced sites; returns it.

    As `compact_`, for models whose structure is found by `ibprune.channels` rather than by a family.

    Raises:
        PlanMismatch: The plan does not fit the model; nothing is changed then.
    """
    check_plan(plan, model, sites)
    with torch.no_grad():
        _fold_(model, sites, _means(model))
    remove_(model)
    slice_(model, sites, plan)
    for site in sites.values():
        if site.kind == "inputs":
            restore_inputs_(model, site.cuts[0].path)
    return model


def compact_traced_(model: PreTrainedModel, sites: dict[str, Site], plan: PruningPlan) -> PreTrainedModel:
    """As `compact_module_` for a transformers model: `model.config` tells the new structure.

    Raises:
        PlanMismatch: The plan does not fit the model; nothing is changed then.
    """
    before = _shapes(model)
    compact_module_(model, sites, plan)
    old = getattr(model.config, SPEC, None) or {"shapes": {}}
    spec = _spec(model, before, full_path(model, ""))
    model.config.ibprune = spec | {"shapes": old["shapes"] | spec["shapes"]}
    return model


def _new_sizes(model: nn.Module, sites: dict[str, Site], plan: PruningPlan) -> dict[str, int]:
    """What the integer attributes that follow the units will be, by path."""
    found = {}
    for site in sites.values():
        for path in site.sizes:
            owner, _, name = path.rpartition(".")
            size = getattr(model.get_submodule(owner), name)
            found[path] = size * len(plan.keep[site.name]) // site.n_units
    return found


def _means(model: nn.Module) -> dict[str, torch.Tensor]:
    """The means of the model's masks by site; nothing where it has none."""
    return {name: mask.mu.detach() for name, mask in getattr(model, MASKS).items()} if hasattr(model, MASKS) else {}


def _fold_(
    model: nn.Module, sites: dict[str, Site], means: dict[str, torch.Tensor], *, norm_offset: float = 0.0
) -> None:
    """Multiplies each unit's mean into the weights that make, or read, its features."""
    for name, mu in means.items():
        site = sites[name]
        if site.mask_at.side == "norms":
            for path in norm_paths(model, site):
                _scale_norm_(model.get_submodule(path), mu, norm_offset)
            for module, axis in unnormed(model, site):
                _scale_features_(module, axis, mu)
            continue
        if site.mask_at.side == "consumers":
            for cut in site.consumers():
                ((weight, dim), *_) = axis_dims(model.get_submodule(cut.path), "in")
                weight = model.get_submodule(cut.path).get_parameter(weight).movedim(dim, -1)
                offset, width = cut.span(site.n_units, weight.shape[-1])
                weight[..., offset : offset + site.n_units * width].mul_(mu.repeat_interleave(width).to(weight))
            continue
        at = site.mask_at.into or Cut(site.mask_at.path, site.mask_at.side)
        module = model.get_submodule(at.path)
        if at.axis == "rank":
            module.projection.weight.mul_(mu.to(module.weight))  # shared by the input and the tied output
        elif at.axis == "out" and is_norm(module):
            _scale_norm_(module, mu.repeat_interleave(len(module.weight) // site.n_units), norm_offset)
        else:
            _scale_features_(module, at.axis, mu.repeat_interleave(axis_width(model, at) // site.n_units))


def _scale_features_(module: nn.Module, axis: str, scale: torch.Tensor) -> None:
    for name, dim in axis_dims(module, axis):
        tensor = module.get_parameter(name).movedim(dim, -1)
        tensor.mul_(scale.to(tensor))


def _scale_norm_(norm: nn.Module, mu: torch.Tensor, offset: float) -> None:
    """Scales a norm's output, which is its normalised input times (offset + weight), plus a bias."""
    for name, parameter in norm.named_parameters():
        scale, shift = mu.to(parameter), offset if name == "weight" else 0.0
        parameter.copy_((parameter + shift) * scale - shift)


def _drop_empty_blocks_(model: nn.Module, family: Family) -> list[str]:
    """Removes blocks that hold no parameter any more (both sub-layers gone, norms included).

    In stages, and where encoder and decoder have a depth each, they stay, as stubs.
    """
    dropped = []
    for parent in block_lists(model, family) if not family.decoder_blocks and family.blocks.count("*") == 1 else ():
        blocks = list(model.get_submodule(full_path(model, parent)))
        stay = [bool(list(block.parameters())) for block in blocks]
        if all(stay) or not any(stay):
            continue
        kept = nn.ModuleList(block for block, stays in zip(blocks, stay) if stays)
        replace_module(model, full_path(model, parent), kept)
        for key in (key for key in family.per_layer if getattr(model.config, key, None)):
            values = getattr(model.config, key)
            setattr(model.config, key, [value for value, stays in zip(values, stay) if stays])
        model.config.num_hidden_layers = sum(stay)
        if hasattr(model.config, "stage_names"):  # of a possible backbone: the embeddings and every block
            model.config.stage_names = model.config.stage_names[: sum(stay) + 1]
            model.config.set_output_features_output_indices(None, None)  # the last one
        dropped += [f"{parent}.{i}" for i, stays in enumerate(stay) if not stays]
    return dropped


def _retype_layers_(model: nn.Module, family: Family) -> None:
    """Gives layers whose attention is gone the type of the first that is left, so that the cache's number 0 is used."""
    types = list(getattr(model.config, "layer_types", None) or ())
    paths = [full_path(model, f"{block}.{family.attention}") for block in block_paths(model, family)]
    has = [any(True for _ in model.get_submodule(path).parameters()) for path in paths]
    if family.causal and types and any(has):
        first = types[has.index(True)]
        model.config.layer_types = [old if stays else first for old, stays in zip(types, has)]


def _settle_experts_(model: nn.Module) -> None:
    """Sets how transformers runs experts whose sizes changed.

    Its loss for balance comes first among the outputs, and needs equally many experts in every layer. Its fastest
    way, a grouped product, takes rows of whole 16 bytes: 8 features in half precision.
    """
    model.config.output_router_logits = False
    widths = {size for p in model.parameters() if p.ndim == 3 for size in p.shape[1:]}
    if any(width % 8 for width in widths):
        model.config._experts_implementation = "eager"


def _size_keys(model: nn.Module) -> list[str]:
    family = find_family(model.config.model_type)
    keys = [*family.config_keys.values(), "num_attention_heads", "num_hidden_layers", *family.per_layer]
    return [key for key in dict.fromkeys(keys) if hasattr(model.config, key)]


def _describe_(
    model: nn.Module,
    dense: dict[str, int],
    before: dict[str, tuple[int, ...]],
    dropped: list[str],
    sizes: dict[str, int],
    native: set[nn.Module],
) -> None:
    """Writes the structure into the config: uniform sizes as plain keys, all of it in `config.ibprune`."""
    config = model.config
    family = find_family(config.model_type)
    old = getattr(config, SPEC, None) or {"dense": dense, "shapes": {}, "stubs": {}, "dropped_blocks": []}
    backbone = full_path(model, "")
    before = {
        full_path(model, new): before[full_path(model, path)]
        for path, new in _moved((_spec_path(name, backbone) for name in before), dropped).items()
    }
    factors = dict(model.named_modules()).get(full_path(model, family.embedding))
    embedding = None
    if isinstance(factors, FactorizedEmbedding):
        tied = isinstance(dict(model.named_modules()).get(family.output.removeprefix("/")), FactorizedUnembedding)
        embedding = {
            "path": family.embedding,
            "rank": factors.weight.shape[1],
            "output": family.output if tied else None,
        }
    stubs = {new: old["stubs"][path] for path, new in _moved(old["stubs"], dropped).items()}
    for path, module in model.named_modules():
        stub = next((key for key, cls in STUBS.items() if type(module) is cls and module not in native), None)
        if stub:
            stubs[_spec_path(path, backbone)] = stub
    spec = _spec(model, before, backbone)
    there, sized = _shapes(model), old.get("sizes", {})
    shapes = {new: old["shapes"][path] for path, new in _moved(old["shapes"], dropped).items()}
    config.ibprune = spec | {
        "dense": old["dense"],
        "dropped_blocks": [*old["dropped_blocks"], *_as_in_dense(dropped, old["dropped_blocks"])],
        "stubs": stubs,
        "embedding": embedding,
        "shapes": {path: shape for path, shape in shapes.items() if full_path(model, path) in there} | spec["shapes"],
        "sizes": {new: sized[path] for path, new in _moved(sized, dropped).items()}
        | {_spec_path(path, backbone): size for path, size in sizes.items()},
    }


def _moved(paths: Iterable[str], dropped: list[str]) -> dict[str, str]:
    """Where the paths of the spec stand once blocks have gone from their lists; those inside such a block nowhere.

    Example:
        >>> _moved(["layers.0.norm", "layers.1.norm", "layers.2.norm"], ["layers.1"])
        {'layers.0.norm': 'layers.0.norm', 'layers.2.norm': 'layers.1.norm'}
    """
    found = {}
    for path in paths:
        new = path
        for parent in {block.rpartition(".")[0] for block in dropped}:
            number, dot, rest = path.removeprefix(f"{parent}.").partition(".")
            if path.startswith(f"{parent}.") and number.isdigit():
                gone = [int(block.rpartition(".")[2]) for block in dropped if block.rpartition(".")[0] == parent]
                new = None if int(number) in gone else f"{parent}.{int(number) - sum(i < int(number) for i in gone)}"
                new = new and f"{new}{dot}{rest}"
        if new is not None:
            found[path] = new
    return found


def _as_in_dense(dropped: list[str], before: list[str]) -> list[str]:
    """Blocks by their numbers in the dense model, of which those in `before` had gone already.

    Example:
        >>> _as_in_dense(["layers.1"], ["layers.0", "layers.2"])
        ['layers.3']
    """
    found = []
    for parent, _, number in (block.rpartition(".") for block in dropped):
        left = (i for i in itertools.count() if f"{parent}.{i}" not in before)
        found.append(f"{parent}.{next(itertools.islice(left, int(number), None))}")
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _spec(model: PreTrainedModel, before: dict[str, tuple[int, ...]], backbone: str) -> dict:
    """What `ibprune.rebuild` needs for a model whose tensors, and nothing else, have other shapes than before."""
    changed = {path: shape for path, shape in _shapes(model).items() if shape != before.get(path)}
    return {
        "format": FORMAT,
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "dense": {},
        "dropped_blocks": [],
        "stubs": {},
        "embedding": None,
        "shapes": {_spec_path(path, backbone): list(shape) for path, shape in changed.items()},
        "sizes": {},
    }


def _spec_path(path: str, backbone: str) -> str:
    prefix = backbone.rstrip(".")
    if not prefix:
        return path
    return path.removeprefix(prefix + ".") if path.startswith(prefix + ".") else "/" + path
