"""Binds the rows of a family to a model: every place where units can be removed."""

import re
from dataclasses import replace

from torch import nn

from ibprune.errors import UnsupportedModel, did_you_mean
from ibprune.families import FAMILIES, TRACED
from ibprune.groups import Cut, Family, Group, Site, axis_dims, axis_width
from ibprune.rebuild import full_path

MOST_UNITS = 2**24  # that scores are held for; Llama 3.1 405B has seven million


def find_family(model_type: str) -> Family:
    """The row of `families` for a model type.

    Raises:
        UnsupportedModel: No row; the message lists the rows and says how to add one.
    """
    known = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in known:
        raise UnsupportedModel(
            f"no family describes model_type '{model_type}': {did_you_mean(model_type, [*known, *TRACED])}. "
            "A row in ibprune/families adds one (CONTRIBUTING.md, 'Adding a family')."
        )
    return known[model_type]


def reads_pictures(model_type: str) -> bool:
    """Whether a model of this type reads images instead of tokens."""
    return is_traced(model_type) or not find_family(model_type).embedding


def has_row(model: nn.Module) -> bool:
    """Whether a row describes a module: it is a transformer, and neither a CNN nor a plain module."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return any(model_type in family.model_types for family in FAMILIES)


def is_traced(model_type: str) -> bool:
    """Whether a model type is a CNN, whose channels are traced instead of described by a row."""
    return model_type in TRACED


def check_model_type(model_type: str) -> None:
    """Raises `UnsupportedModel` unless a row describes the model type, or its channels are traced."""
    if not is_traced(model_type):
        find_family(model_type)


def check_unquantised(config: object, name: str) -> None:
    """Raises `UnsupportedModel` where a config says that the weights are packed integers."""
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"'{name}' is quantised: prune the full-precision model, then quantise.")


def _is_packed(package: str) -> bool:
    return ".quantized." in package or package.startswith("bitsandbytes.")


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every place of a transformers model where units can be removed, by name, in model order.

    Raises:
        UnsupportedModel: The family is unknown, a module of its row is missing, the model is quantised, or has
            parameters that no row owns, so that cutting would be a guess.
    """
    family = find_family(model.config.model_type)
    check_unquantised(model.config, type(model).__name__)
    modules = dict(model.named_modules())
    packed = next((path for path, module in modules.items() if _is_packed(type(module).__module__)), None)
    if packed:
        raise UnsupportedModel(f"'{packed}' is quantised: prune the full-precision model, then quantise.")
    sites: dict[str, Site] = {}
    for block in ("", *block_paths(model, family)):
        for group in family.groups:
            if group.per_block == bool(block) and block.startswith(group.stack.removesuffix("*")):
                site = _bind(model, modules, group, block)
                if site is not None:
                    sites[site.name] = site
    _check_coverage(model, modules, family, sites)
    units = sum(site.n_units for site in sites.values())
    if units > MOST_UNITS:
        raise UnsupportedModel(f"expected a model of at most {MOST_UNITS:,} units, found one of {units:,}.")
    return sites


def came_factorized(model: nn.Module) -> bool:
    """Whether the embedding was factorised by an earlier cut, which took directions: then it is never one matrix.

    A module without a config has no such embedding.
    """
    return bool((getattr(getattr(model, "config", None), "ibprune", None) or {}).get("embedding"))


def is_counted(site: Site, name: str) -> bool:
    """Whether a name in `Family.config_keys` speaks for a site."""
    start, _, last = name.rpartition(".")
    return site.name.startswith(start) and site.name.rpartition(".")[2] == last


def block_lists(model: nn.Module, family: Family) -> list[str]:
    """Paths of the module lists that hold the blocks, from the backbone, in order; an encoder's, then a decoder's."""
    modules = dict(model.named_modules())
    found = []
    for pattern in filter(None, (family.blocks, family.decoder_blocks)):
        outer, *inner = pattern.removesuffix(".*").split(".*.")
        paths = [outer]
        for name in inner:
            paths = [f"{path}.{i}.{name}" for path in paths for i in range(_length(model, path))]
        found += [path for path in paths if not _missing(model, modules, path)]  # an encoder may be used alone
    return found


def block_paths(model: nn.Module, family: Family) -> list[str]:
    """Paths of the blocks from the backbone, in order."""
    return [f"{path}.{i}" for path in block_lists(model, family) for i in range(_length(model, path))]


def _length(model: nn.Module, path: str) -> int:
    return len(model.get_submodule(full_path(model, path)))


def _bind(model: nn.Module, modules: dict[str, nn.Module], group: Group, block: str) -> Site | None:
    """The group at one block, or None where it has nothing to cut."""
    cuts = []
    for cut in group.cuts:
        if cut.needs and not _is_there(model, modules, block, cut.needs):
            continue
        if cut.without and _is_there(model, modules, block, cut.without):
            continue
        pattern = _path(model, block, cut.path)
        found = _matching(modules, pattern)
        if not found and not cut.optional:
            if block and modules.get(full_path(model, block)) is not None and _stubbed(modules, model, group, block):
                return None
            raise UnsupportedModel(
                f"expected a module '{pattern}' in {type(model).__name__}, found none: the model was renamed, "
                f"wrapped or quantised, or is a variant of '{model.config.model_type}' that is not covered. Load the "
                "plain transformers model."
            )
        cuts += [replace(cut, path=path) for path in found]
    for path in (cut.path for cut in cuts if cut.axis == "out"):
        if isinstance(modules[path], nn.LayerNorm) and modules[path].weight is None:
            raise UnsupportedModel(
                f"expected the norm '{path}' to have a weight, found none: a variant of '{model.config.model_type}' "
                "that is not covered."
            )
    cuts = [cut for cut in dict.fromkeys(cuts) if cut.axis == "whole" or axis_dims(modules[cut.path], cut.axis)]
    for path in {cut.path for cut in cuts if getattr(modules[cut.path], "groups", 1) > 1}:
        raise UnsupportedModel(f"expected '{path}' to be one convolution, found {modules[path].groups} groups of it.")
    whole = all(cut.axis == "whole" for cut in cuts)
    if not cuts or (whole and _stubbed(modules, model, group, block)):
        return None
    n_units = 1
    if not whole:
        width = _attribute(model, _path(model, block, group.unit)) if group.unit else 1
        n_units = axis_width(model, cuts[0]) // cuts[0].chunks // width
    name = f"{block}.{group.name}" if block else group.name
    mask_at = group.mask_at
    if mask_at.path:
        mask_at = replace(mask_at, path=_path(model, block, mask_at.path))
    if mask_at.into:
        mask_at = replace(mask_at, into=replace(mask_at.into, path=_path(model, block, mask_at.into.path)))
    for cut in cuts:
        if cut.axis != "whole" and axis_width(model, cut) % (n_units * cut.chunks):
            raise UnsupportedModel(
                f"expected the {cut.axis} features of '{cut.path}' to be a multiple of {n_units * cut.chunks} "
                f"({group.kind}), found {axis_width(model, cut)}: a variant of '{model.config.model_type}' that is "
                "not covered."
            )
    cuts = [_placed(cut, axis_width(model, cut), n_units) if cut.chunks > 1 else cut for cut in cuts]
    sizes = []
    for pattern, _, size in (_path(model, block, path).rpartition(".") for path in group.sizes):
        found = [path for path in _matching(modules, pattern) if hasattr(modules[path], size)]
        sizes += [f"{path}.{size}" if path else size for path in found]
    site = Site(name, group, full_path(model, block) if block else "", tuple(cuts), mask_at, n_units, tuple(sizes))
    return site.at_least(_attribute(model, _path(model, block, group.floor))) if group.floor else site


def _placed(cut: Cut, features: int, n_units: int) -> Cut:
    """A cut of one of several equal chunks of an axis, by offset and width."""
    size = features // cut.chunks
    return replace(cut, offset=cut.chunk * size, width=size // n_units, chunk=0, chunks=1)


def _matching(modules: dict[str, nn.Module], pattern: str) -> list[str]:
    """Paths of the modules of a pattern, in which "*" stands for every layer."""
    matches = re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch
    return [path for path in modules if matches(path)] if "*" in pattern else [pattern] * (pattern in modules)


def _stubbed(modules: dict[str, nn.Module], model: nn.Module, group: Group, block: str) -> bool:
    """Whether the sub-layer was removed earlier: nothing of the group holds parameters any more."""
    paths = [_path(model, block, cut.path) for cut in group.cuts]
    return not any(list(modules[p].parameters()) for p in paths if p in modules)


def _path(model: nn.Module, block: str, path: str) -> str:
    return full_path(model, path if path.startswith("/") or not block else f"{block}.{path}")


def _is_there(model: nn.Module, modules: dict[str, nn.Module], block: str, path: str) -> bool:
    return _path(model, block, path) in modules or full_path(model, path) in modules


def _missing(model: nn.Module, modules: dict[str, nn.Module], path: str) -> bool:
    return modules.get(full_path(model, path)) is None


def _attribute(model: nn.Module, path: str) -> int:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _check_coverage(model: nn.Module, modules: dict[str, nn.Module], family: Family, sites: dict[str, Site]) -> None:
    """Raises when some parameter belongs to no cut: an unknown head must not be left at a stale width."""
    owned = {(cut.path, cut.axis) for site in sites.values() for cut in site.cuts if cut.axis != "whole"}
    tied = {id(p) for path, axis in owned for p in modules[path].parameters(recurse=axis != "own")}
    free = [re.compile(re.escape(full_path(model, path)).replace(r"\*", r"\d+")) for path in family.free]
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        known = id(parameter) in tied or owner.startswith("vib_masks") or any(f.fullmatch(owner) for f in free)
        if not known:
            raise UnsupportedModel(
                f"{type(model).__name__} has a parameter '{name}' that the family '{family.model_types[0]}' does "
                "not describe. Use one of the standard task heads, or add the module to its row in ibprune/families."
            )
