"""Prunable structure as data: which feature axis of which module belongs to which unit."""

import re
from dataclasses import dataclass

import torch
from torch import nn

from ibprune.errors import UnsupportedModel, did_you_mean
from ibprune.rebuild import FactorizedEmbedding, FactorizedUnembedding, full_path

KINDS = ("heads", "kv_groups", "ffn", "layers", "hidden", "embedding_rank")
ATTENTION_KINDS = ("heads", "kv_groups")


@dataclass(frozen=True)
class Cut:
    """One feature axis of one module that loses slices when units go.

    Attributes:
        path: Module path relative to the group's block, or to the backbone for groups of the whole
            model ("*" stands for every layer), or to the whole model when it starts with "/".
        axis: "in" or "out" features, "rank" of a factorised embedding, or "whole": the module itself
            goes and a stub takes its place.
        stub: For "whole": a key of `ibprune.rebuild.STUBS`.
        optional: The module may be absent (a task head, a pooler).
        needs, without: Backbone modules that must exist, or must not, for this cut to apply.
    """

    path: str
    axis: str
    stub: str = ""
    optional: bool = False
    needs: str = ""
    without: str = ""


@dataclass(frozen=True)
class MaskAt:
    """Where a mask acts: the input ("in") or output ("out") features of a module, "norms" or "rank".

    At "norms" the mask multiplies the output of every norm among the group's cuts and the norm takes
    its statistics over the kept features only, so that slicing is exact afterwards. At "rank" it acts
    on the directions of a factorised embedding and of the output tied to it.
    """

    side: str
    path: str = ""


@dataclass(frozen=True)
class Group:
    """One kind of unit of a family, as a row of the table.

    Attributes:
        name: Last part of a site's name, such as "heads".
        kind: One of `KINDS`.
        cuts: What goes with a unit. The first cut counts the units.
        mask_at: Where the mask acts.
        per_block: One site in every block, or one for the whole model.
        unit: Attribute path (relative to the block) with the width of one unit on the first cut.
        min_units: The least that must stay.
    """

    name: str
    kind: str
    cuts: tuple[Cut, ...]
    mask_at: MaskAt
    per_block: bool = True
    unit: str = ""
    min_units: int = 1


@dataclass(frozen=True)
class Family:
    """The rows of one architecture.

    Attributes:
        model_types: The `config.model_type` values it covers.
        blocks: Path pattern of the blocks in the backbone, ending in ".*".
        groups: The prunable kinds.
        embedding: The token embedding in the backbone.
        output: The output layer that may be tied to it ("/…": in the whole model).
        config_keys: Config key that holds the number of units per kind in a uniform model.
        free: Modules ("/…" in the whole model) whose parameters no unit owns.
    """

    model_types: tuple[str, ...]
    blocks: str
    groups: tuple[Group, ...]
    embedding: str
    output: str
    config_keys: dict[str, str]
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A group bound to one place of a model. `name` is its key in masks, plans, reports and logs.

    Attributes:
        cuts: The group's cuts with paths from the model's root; absent optional modules left out.
        mask_at: The same with a path from the root.
        n_units: Units present now.
        block: Path of the block from the model's root, "" for the whole model.
    """

    name: str
    group: Group
    block: str
    cuts: tuple[Cut, ...]
    mask_at: MaskAt
    n_units: int

    @property
    def kind(self) -> str:
        return self.group.kind

    @property
    def min_units(self) -> int:
        return self.group.min_units


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1


def axis_dims(module: nn.Module, axis: str) -> tuple[tuple[str, int], ...]:
    """The (parameter, dimension) pairs that make up one feature axis of a module.

    Example:
        >>> axis_dims(nn.Linear(3, 5), "out")
        (('weight', 0), ('bias', 0))
    """
    match module, axis:
        case FactorizedEmbedding(), "out":
            dims = (("projection.weight", 0),)
        case FactorizedUnembedding(), "in":
            dims = (("projection.weight", 0),)
        case FactorizedEmbedding() | FactorizedUnembedding(), "rank":
            dims = (("weight", 1), ("projection.weight", 1))
        case nn.Linear(), "in":
            dims = (("weight", 1),)
        case nn.Linear(), "out":
            dims = (("weight", 0), ("bias", 0))
        case nn.Embedding(), "out":
            dims = (("weight", 1),)
        case _, "out" if is_norm(module):
            dims = (("weight", 0), ("bias", 0))
        case _:
            dims = ()
    return tuple((name, dim) for name, dim in dims if _get(module, name) is not None)


def axis_width(model: nn.Module, cut: Cut) -> int:
    """Number of features on the axis of a resolved cut; 0 where the module has no such axis."""
    module = model.get_submodule(cut.path)
    dims = axis_dims(module, cut.axis)
    return _get(module, dims[0][0]).shape[dims[0][1]] if dims else 0


def find_family(model_type: str) -> Family:
    """The row of `families` for a model type.

    Raises:
        UnsupportedModel: No row; the message lists the rows and says how to add one.
    """
    from ibprune.families import FAMILIES  # the rows are made of this file's classes

    known = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in known:
        raise UnsupportedModel(
            f"no family describes model_type '{model_type}': {did_you_mean(model_type, known)}. "
            "A row in ibprune/families adds one (ARCHITECTURE.md, 'Adding a family')."
        )
    return known[model_type]


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every place of a transformers model where units can be removed, by name, in model order.

    Raises:
        UnsupportedModel: The family is unknown, a module of its row is missing, or the model has
            parameters that no row owns, so that cutting would be a guess.
    """
    family = find_family(model.config.model_type)
    modules = dict(model.named_modules())
    sites: dict[str, Site] = {}
    for block in ("", *block_paths(model, family)):
        for group in family.groups:
            if group.per_block == bool(block):
                site = _bind(model, modules, group, block)
                if site is not None:
                    sites[site.name] = site
    _check_coverage(model, modules, family, sites)
    return sites


def block_paths(model: nn.Module, family: Family) -> list[str]:
    """Paths of the blocks from the backbone, in order."""
    parent = family.blocks.removesuffix(".*")
    return [f"{parent}.{i}" for i in range(len(model.get_submodule(full_path(model, parent))))]


def _bind(model: nn.Module, modules: dict[str, nn.Module], group: Group, block: str) -> Site | None:
    """The group at one block, or None where it has nothing to cut."""
    cuts = []
    for cut in group.cuts:
        if cut.needs and _missing(model, modules, cut.needs):
            continue
        if cut.without and not _missing(model, modules, cut.without):
            continue
        pattern = _path(model, block, cut.path)
        matches = re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch
        found = [path for path in modules if matches(path)] if "*" in pattern else [pattern] * (pattern in modules)
        if not found and not cut.optional:
            if block and modules.get(full_path(model, block)) is not None and _stubbed(modules, model, group, block):
                return None
            raise UnsupportedModel(
                f"expected a module '{pattern}' in {type(model).__name__}, found none: the model was renamed, "
                "wrapped or quantised. Load the plain transformers model."
            )
        cuts += [Cut(path, cut.axis, cut.stub) for path in found]
    cuts = [cut for cut in cuts if cut.axis == "whole" or axis_dims(modules[cut.path], cut.axis)]
    whole = all(cut.axis == "whole" for cut in cuts)
    if not cuts or (whole and _stubbed(modules, model, group, block)):
        return None
    n_units = 1
    if not whole:
        width = _attribute(model, _path(model, block, group.unit)) if group.unit else 1
        n_units = axis_width(model, cuts[0]) // width
    name = f"{block}.{group.name}" if block else group.name
    mask_at = MaskAt(group.mask_at.side, _path(model, block, group.mask_at.path) if group.mask_at.path else "")
    for cut in cuts:
        if cut.axis != "whole" and axis_width(model, cut) % n_units:
            raise UnsupportedModel(
                f"expected the {cut.axis} features of '{cut.path}' to be a multiple of {n_units} {group.kind}, "
                f"found {axis_width(model, cut)}."
            )
    return Site(name, group, full_path(model, block) if block else "", tuple(cuts), mask_at, n_units)


def _stubbed(modules: dict[str, nn.Module], model: nn.Module, group: Group, block: str) -> bool:
    """Whether the sub-layer was removed earlier: nothing of the group holds parameters any more."""
    paths = [_path(model, block, cut.path) for cut in group.cuts]
    return not any(list(modules[p].parameters()) for p in paths if p in modules)


def _path(model: nn.Module, block: str, path: str) -> str:
    return full_path(model, path if path.startswith("/") or not block else f"{block}.{path}")


def _missing(model: nn.Module, modules: dict[str, nn.Module], path: str) -> bool:
    return modules.get(full_path(model, path)) is None


def _attribute(model: nn.Module, path: str) -> int:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _get(module: nn.Module, name: str) -> torch.Tensor | None:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _check_coverage(model: nn.Module, modules: dict[str, nn.Module], family: Family, sites: dict[str, Site]) -> None:
    """Raises when some parameter belongs to no cut: an unknown head must not be left at a stale width."""
    owned = {cut.path for site in sites.values() for cut in site.cuts if cut.axis != "whole"}
    tied = {id(p) for path in owned for p in modules[path].parameters()}
    free = tuple(full_path(model, path) for path in family.free)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if id(parameter) not in tied and not owner.startswith("vib_masks") and owner not in free:
            raise UnsupportedModel(
                f"{type(model).__name__} has a parameter '{name}' that the family '{family.model_types[0]}' does "
                "not describe. Use one of the standard task heads, or add the module to its row in ibprune/families."
            )
