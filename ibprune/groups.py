"""Prunable structure as data: which feature axis of which module belongs to which unit."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ibprune.rebuild import FactorizedEmbedding, FactorizedUnembedding, SelectedLinear


@dataclass(frozen=True)
class Cut:
    """One feature axis of one module that loses slices when units go.

    Attributes:
        path: Module path relative to the group's block, or to the backbone for groups of the whole
            model ("*" stands for every layer), or to the whole model when it starts with "/".
        axis: "in" or "out" features, "rank" of a factorised embedding, "rows" of an embedding, "own" for the
            tensors a module holds itself (a layer scale), "tensor.d": dimension d of one of these (the experts of
            "down_proj.0"), or "whole": the module goes and a stub takes its place.
        stub: For "whole": a key of `ibprune.rebuild.STUBS`.
        optional: The module may be absent (a task head, a pooler).
        needs, without: Modules (paths as `path`, or from the backbone) that must exist, or must not, for this cut to
            apply.
        offset, width: Unit j owns the features offset + j * width … offset + (j + 1) * width - 1, so that
            several sites may share an axis (concatenation). Width 0: the units share the whole axis equally.
        chunk, chunks: The units share only this one of so many equal parts of the axis (fused projections,
            such as query, key and value in one layer); a bound cut says it by offset and width.
    """

    path: str
    axis: str
    stub: str = ""
    optional: bool = False
    needs: str = ""
    without: str = ""
    offset: int = 0
    width: int = 0
    chunk: int = 0
    chunks: int = 1

    def span(self, n_units: int, features: int) -> tuple[int, int]:
        """First feature and features per unit, on an axis of so many features."""
        return self.offset, self.width or features // n_units


@dataclass(frozen=True)
class MaskAt:
    """Where a mask acts: the "in" or "out" features of a module, its "own" ones, "norms", "rank" or nowhere ("none").

    At "out" it folds into what makes the features, at "own" into the scale that the module holds itself.
    At "norms" the mask multiplies the output of every norm among the group's cuts and the norm takes
    its statistics over the kept features only, so that slicing is exact afterwards; so are the features of
    the module at `path`, where there is one, on the axis of its cut: a projection that is read without a
    norm ("out"), or a layer that reads without one ("in"). At "rank" it acts on the directions of a
    factorised embedding and of the output tied to it. At "consumers" it multiplies what every "in" cut of
    the site reads, and a LayerNorm on the way takes its statistics as at "norms". At "none" there is no mask:
    which rows of a vocabulary are read is decided by the tokenizer. At "router" the router at `path` chooses among
    the kept units only, and what a chosen one adds is multiplied.
    `into` is the axis that takes the mean in, where it is not that of the module at `path` (an activation between
    stacked weights).
    `flattened` says that some of these modules see (batch * length) rows, or windows of an image, instead
    of whole sequences, `tables` that some see a table that all sequences share, `mixed` that rows come in an order of
    their own (each expert's one after the other), so that nothing says which are of one sequence.
    """

    side: str
    path: str = ""
    into: Cut | None = None
    flattened: bool = False
    tables: bool = False
    mixed: bool = False


@dataclass(frozen=True)
class Group:
    """One kind of unit of a family, as a row of the table.

    Attributes:
        name: Last part of a site's name, such as "heads".
        kind: One of `names.KINDS` or `names.MODULE_KINDS`.
        cuts: What goes with a unit. The first cut counts the units.
        mask_at: Where the mask acts.
        per_block: One site in every block, or one for the whole model.
        unit: Attribute path (relative to the block) with the width of one unit on the first cut.
        min_units: The least that must stay.
        floor: Attribute path (relative to the block) with a larger such number (how many experts a token takes).
        sizes: Integer attributes (paths as those of cuts) that the family's forward reads and that
            count in proportion to the units.
        stack: The pattern of the blocks that have it, where an encoder's and a decoder's differ.
    """

    name: str
    kind: str
    cuts: tuple[Cut, ...]
    mask_at: MaskAt
    per_block: bool = True
    unit: str = ""
    min_units: int = 1
    floor: str = ""
    sizes: tuple[str, ...] = ()
    stack: str = ""


@dataclass(frozen=True)
class Family:
    """The rows of one architecture.

    Attributes:
        model_types: The `config.model_type` values it covers.
        blocks: Path pattern of the blocks in the backbone, ending in ".*"; blocks within stages have two. A block may
            run several times.
        decoder_blocks: The same for the decoder of an encoder-decoder, whose encoder `blocks` are.
        groups: The prunable kinds.
        attention: Path from the block to the module that computes attention probabilities.
        context: Path from the block to the linear layer that reads the attention's result.
        router, experts: Paths from the block to the module that chooses experts for each token, and to the one that
            holds their stacked weights: it is called with (tokens, chosen experts, weights of each).
        cross_attention, cross_context: The same in a decoder's blocks for the attention to the encoder.
        config_keys: Config key that holds the number of units of a uniform model, by the last part of the sites'
            names ("ffn"), or of those that begin alike ("decoder.ffn").
        embedding: The token embedding in the backbone, "" where it reads no tokens.
        output: The output layer that may be tied to it ("/…": in the whole model).
        ties: Sites, by the last part of their names, whose widths follow from each other in plain transformers: without
            code of ours they stay in the dense model's ratio.
        follows: Pairs of config keys of which the first says what the second does wherever both say the same.
        ratio_key: Config key that holds the FFN's width as a multiple of the width it reads.
        sizes_in: Part of the config that holds all these keys.
        divided: Whether the config's number of heads must divide its width.
        per_layer: Config keys that list one value per block.
        free: Modules ("/…" in the whole model, "*" for every layer) whose parameters no unit owns.
        causal: Whether a token sees only those before it.
        norm_offset: What the norms add to their weight before they multiply by it (Gemma: 1).
        scales: Names of integer attributes that a forward turns into a scale: they stay as they are.
        reserved_positions: Positions of `max_position_embeddings` that no token can take.
        uncut: Kinds that cannot be cut exactly in this family, with the reason ("heads" for KV groups too).
    """

    model_types: tuple[str, ...]
    blocks: str
    groups: tuple[Group, ...]
    attention: str
    context: str
    config_keys: dict[str, str]
    embedding: str = ""
    output: str = ""
    decoder_blocks: str = ""
    cross_attention: str = ""
    cross_context: str = ""
    router: str = ""
    experts: str = ""
    ties: tuple[str, ...] = ()
    follows: tuple[tuple[str, str], ...] = ()
    ratio_key: str = ""
    sizes_in: str = ""
    divided: bool = False
    per_layer: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    causal: bool = False
    norm_offset: float = 0.0
    scales: tuple[str, ...] = ()
    reserved_positions: int = 0
    uncut: tuple[tuple[str, str], ...] = ()

    @property
    def factorizes(self) -> bool:
        """Whether units are directions of an embedding that is factorised first."""
        return any(group.mask_at.side == "rank" for group in self.groups)

    def max_tokens(self, config: object) -> int | None:
        """The longest sequence that a config of the family can place, None where nothing bounds it."""
        positions = getattr(config, "max_position_embeddings", None)
        return positions - self.reserved_positions if positions else None


@dataclass(frozen=True)
class Site:
    """A group bound to one place of a model. `name` is its key in masks, plans, reports and logs.

    Attributes:
        cuts: The group's cuts with paths from the model's root; absent optional modules left out.
        mask_at: The same with a path from the root.
        n_units: Units present now.
        block: Path of the block from the model's root, "" for the whole model.
        sizes: The group's `sizes` with paths from the root.
        counts: The only numbers of units that may stay, ascending; empty: as rounding has it.
    """

    name: str
    group: Group
    block: str
    cuts: tuple[Cut, ...]
    mask_at: MaskAt
    n_units: int
    sizes: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        return self.group.kind

    @property
    def min_units(self) -> int:
        return self.group.min_units

    def at_least(self, n_units: int) -> "Site":
        """The site with another floor: how many units must stay, where only the data tell."""
        return replace(self, group=replace(self.group, min_units=n_units))

    def consumers(self) -> list[Cut]:
        """The cuts that read the site's features."""
        return [cut for cut in self.cuts if cut.axis == "in"]


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1


def axis_dims(module: nn.Module, axis: str) -> tuple[tuple[str, int], ...]:
    """The (parameter or buffer, dimension) pairs that make up one feature axis of a module.

    Example:
        >>> axis_dims(nn.Linear(3, 5), "out")
        (('weight', 0), ('bias', 0))
    """
    named, _, dim = axis.rpartition(".")
    match module, axis:
        case _, _ if named:
            dims = ((named, int(dim)),)
        case FactorizedEmbedding(), "out":
            dims = (("projection.weight", 0),)
        case ((FactorizedEmbedding() | nn.Embedding()), "rows"):
            dims = (("weight", 0),)
        case FactorizedUnembedding(), "in":
            dims = (("projection.weight", 0),)
        case FactorizedEmbedding() | FactorizedUnembedding(), "rank":
            dims = (("weight", 1), ("projection.weight", 1))
        case FactorizedUnembedding(), "out":
            dims = (("weight", 0), ("bias", 0))
        case SelectedLinear(), "in":
            dims = (("weight", 1), ("index", 0))
        case nn.Linear(), "in":
            dims = (("weight", 1),)
        case Conv1D(), "in":  # GPT-2's linear layer holds its weight as (in, out)
            dims = (("weight", 0),)
        case Conv1D(), "out":
            dims = (("weight", 1), ("bias", 0))
        case nn.modules.conv._ConvTransposeNd(), "in" | "out" if module.groups == 1:
            dims = (("weight", 0),) if axis == "in" else (("weight", 1), ("bias", 0))
        case nn.modules.conv._ConvNd(), "in" if module.groups == 1:
            dims = (("weight", 1),)
        case nn.modules.conv._ConvNd(), "out" if not module.transposed:
            dims = (("weight", 0), ("bias", 0))
        case nn.modules.conv._ConvNd(), _:  # what a grouped convolution reads goes with its groups
            dims = ()
        case nn.modules.batchnorm._NormBase(), "out":
            dims = (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))
        case nn.Linear(), "out":
            dims = (("weight", 0), ("bias", 0))
        case nn.Embedding(), "out":
            dims = (("weight", 1),)
        case _, "own":
            named = [(name, p) for name, p in module.named_parameters(recurse=False) if p.ndim]
            wide = [(name, p) for name, p in named if p.numel() != 1] or named  # a stream may have one feature left
            dims = tuple((name, _feature_dim(p.shape)) for name, p in wide)
        case _, "out" if is_norm(module):
            dims = (("weight", 0), ("bias", 0))
        case _:
            dims = ()
    return tuple((name, dim) for name, dim in dims if get_tensor(module, name) is not None)


def _feature_dim(shape: torch.Size) -> int:
    """Where the features of a module's own tensor are: last, but first in a scale over a map, (C, 1, 1)."""
    over_map = len(shape) > 2 and shape[0] > 1 and set(shape[1:]) == {1}
    return 0 if over_map else len(shape) - 1


def axis_width(model: nn.Module, cut: Cut) -> int:
    """Number of features on the axis of a resolved cut; 0 where the module has no such axis."""
    module = model.get_submodule(cut.path)
    packed = isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    if packed and cut.axis in ("in", "out"):
        return module.in_features if cut.axis == "in" else module.out_features
    dims = axis_dims(module, cut.axis)
    return get_tensor(module, dims[0][0]).shape[dims[0][1]] if dims else 0


def get_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer by its path from the module, None where there is none."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module
