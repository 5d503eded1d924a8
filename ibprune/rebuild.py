"""Turns a dense architecture into the shapes of a pruned checkpoint; also shipped inside every export.

This file imports nothing of ibprune, because its text is copied into the `modeling_ibprune.py` of
exports that plain transformers cannot express: what loads there is what loads here.
"""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class FactorizedEmbedding(nn.Module):
    """An embedding of rank k: rows of `weight` (vocabulary, k), then `projection` (hidden, k)."""

    def __init__(self, vocab_size: int, rank: int, hidden: int, padding_idx: int | None = None):
        super().__init__()
        self.padding_idx = padding_idx
        self.weight = nn.Parameter(torch.empty(vocab_size, rank))
        self.projection = nn.Linear(rank, hidden, bias=False)

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.projection.weight.shape[0]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # (batch, length) -> (batch, length, hidden)
        return self.projection(nn.functional.embedding(input_ids, self.weight, self.padding_idx))


class FactorizedUnembedding(nn.Module):
    """The tied output of a `FactorizedEmbedding`: hidden -> k -> vocabulary."""

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight = embedding.weight
        self.projection = embedding.projection
        self.codes = nn.Identity()  # a place for a mask on the directions
        self.bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # (..., hidden) -> (..., vocabulary)
        return nn.functional.linear(self.codes(hidden @ self.projection.weight), self.weight, self.bias)


class SelectedLinear(nn.Linear):
    """A linear layer that reads only the features `index` (int64, (in_features,)) of the `n_features` it is given."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.n_features = in_features
        self.register_buffer("index", torch.arange(in_features))
        self.selected = nn.Identity()  # a place for a mask on the features

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., n_features) -> (..., out_features)
        return nn.functional.linear(self.selected(x.index_select(-1, self.index)), self.weight, self.bias)


class Zeros(nn.Module):
    """Stands where a sub-layer was removed: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NoAttention(nn.Module):
    """Stands where an attention was removed: (zeros, no attention weights).

    Where a decoder has no attention to itself left, the first of these `counts` the tokens in the key-value cache:
    learned positions are taken from how many it holds.
    """

    counts = False

    def forward(
        self, hidden_states: torch.Tensor, *args, past_key_values=None, key_value_states=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        if self.counts and past_key_values is not None and key_value_states is None:
            tokens = hidden_states[:, None, :, :1]  # (batch, 1, length, 1)
            getattr(past_key_values, "self_attention_cache", past_key_values).update(tokens, tokens, 0)
        return torch.zeros_like(hidden_states), None


class NoBiasedAttention(nn.Module):
    """Stands where an attention of T5 was removed: (zeros, the position bias for the next layer, no weights)."""

    def forward(
        self, hidden_states: torch.Tensor, *args, position_bias: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        return torch.zeros_like(hidden_states), position_bias, None


class NoBias(nn.Module):
    """Stands where the position bias of a removed attention was."""

    def forward(self, *args, **kwargs) -> float:
        return 0.0


STUBS = {
    "zeros": Zeros,
    "no_attention": NoAttention,
    "no_biased_attention": NoBiasedAttention,
    "no_bias": NoBias,
    "identity": nn.Identity,
}


def full_path(model: nn.Module, path: str) -> str:
    """A path of the spec, relative to the backbone or ("/x") to the whole model, as a path from `model`."""
    if path.startswith("/"):
        return path[1:]
    backbone = getattr(model, "base_model", model)
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    return f"{prefix}.{path}" if prefix else path


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new.train(model.training))


def factorize_modules(model: nn.Module, embedding: str, rank: int, output: str | None) -> None:
    """Replaces the embedding (and the output tied to it) by factors of the given rank, not yet filled."""
    dense = model.get_submodule(embedding)
    with torch.device(dense.weight.device):  # on the meta device nothing is reserved or drawn
        factors = FactorizedEmbedding(dense.num_embeddings, rank, dense.embedding_dim, dense.padding_idx)
    factors.to(dtype=dense.weight.dtype)
    replace_module(model, embedding, factors)
    if output is not None:
        bias = model.get_submodule(output).bias
        replace_module(model, output, FactorizedUnembedding(factors, bias))
        model._tied_weights_keys = dict(model._tied_weights_keys or {}) | {
            f"{output}.projection.weight": f"{embedding}.projection.weight"
        }


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Sets a parameter or buffer of another shape and the size attributes that modules print and check."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if leaf not in module._buffers and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, leaf, value)
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = value.shape
    elif isinstance(module, Conv1D) and leaf == "weight":
        module.nx, module.nf = value.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and leaf == "weight":
        out, into = value.shape[:2] if not module.transposed else (value.shape[1], value.shape[0])
        if module.groups > 1:  # whole groups go, each with its inputs
            module.groups = module.groups * out // module.out_channels
        module.out_channels, module.in_channels = out, into * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase) and value.ndim == 1:
        module.num_features = len(value)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(value) // module.num_channels
        module.num_channels = len(value)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(value)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = value.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(value.shape)


def resize_(model: nn.Module, shapes: dict[str, list[int]], dtypes: dict[str, torch.dtype] | None = None) -> None:
    """Gives parameters and buffers, by name, other shapes and, where given, types; what they hold is unset.

    Names that share one tensor go on sharing one.
    """
    new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old one too: its id must stay its own
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(model.get_submodule(path), leaf)
        if id(old) not in new:
            value = torch.empty(tuple(shape), dtype=(dtypes or {}).get(name, old.dtype), device=old.device)
            is_parameter = isinstance(old, nn.Parameter)
            new[id(old)] = old, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value
        set_parameter(model, name, new[id(old)][1])


def rebuild_(model: nn.Module, spec: dict) -> None:
    """Gives a freshly built dense model the structure described by `spec` (`config.ibprune`).

    The weights are left unset: the checkpoint fills them, and every key of it must match.
    """
    for path in spec["dropped_blocks"]:
        parent, _, index = full_path(model, path).rpartition(".")
        model.get_submodule(parent)[int(index)] = None
    for name, child in list(model.named_modules()):
        if isinstance(child, nn.ModuleList) and any(block is None for block in child):
            replace_module(model, name, nn.ModuleList(block for block in child if block is not None))
    for path, stub in spec["stubs"].items():
        replace_module(model, full_path(model, path), STUBS[stub]())
    if spec["embedding"] is not None:
        output = spec["embedding"]["output"]
        output = full_path(model, output) if output and _has(model, full_path(model, output)) else None
        factorize_modules(model, full_path(model, spec["embedding"]["path"]), spec["embedding"]["rank"], output)
    shapes = {full_path(model, path): shape for path, shape in spec["shapes"].items()}
    present = {name for name, _ in model.named_modules()}  # a head may be absent: AutoModel of a classifier's folder
    resize_(model, {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] in present})
    sizes = {full_path(model, path): size for path, size in spec.get("sizes", {}).items()}  # absent in older folders
    set_sizes(model, sizes)
    renumber_layers_(model, spec["dense"].get("layer_types"))


def set_sizes(model: nn.Module, sizes: dict[str, int]) -> None:
    """Sets the integer attributes that a forward reads, by path, where their module is still there."""
    for path, size in sizes.items():
        owner, _, name = path.rpartition(".")
        if hasattr(dict(model.named_modules()).get(owner), name):
            setattr(model.get_submodule(owner), name, size)


def renumber_layers_(model: nn.Module, old_types: list[str] | None) -> None:
    """Numbers the attentions that remain 0, 1, 2…: the key-value cache takes its length from number 0.

    Attentions at the same place of their blocks share a cache: a decoder's attentions to itself have one, those to the
    encoder another.
    Where the config gives each layer a type of attention (sliding or full), the cache keeps a store of that
    type under its number: then an attention takes the lowest free number of its own type.

    Args:
        old_types: `config.layer_types` that the present numbers count in; None where the config has none.
    """
    blocks = {id(block) for child in model.modules() if isinstance(child, nn.ModuleList) for block in child}
    places, removed = {}, {}
    for name, module in model.named_modules():
        place = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if hasattr(module, "layer_idx") and id(module) not in blocks:
            places.setdefault(place, []).append(module)
        elif isinstance(module, NoAttention):
            removed.setdefault(place, []).append(module)
    for place, stubs in removed.items():
        stubs[0].counts = place not in places
    new_types = getattr(model.config, "layer_types", None) if old_types else None
    for attentions in places.values():
        numbers = sorted({module.layer_idx for module in attentions})
        free = list(range(len(new_types or numbers)))
        order = {}
        for old in numbers:
            order[old] = next(new for new in free if new_types is None or new_types[new] == old_types[old])
            free.remove(order[old])
        for module in attentions:
            module.layer_idx = order[module.layer_idx]


def pin_rotary_(model: nn.Module) -> None:
    """Gives modules with rotary frequencies a config of their own, while the model's still is the dense one.

    transformers computes the frequencies again after loading, and for long texts, from the width of a head; where
    the config has no `head_dim` that is the model's width over the number of heads.
    """
    config = model.config
    dense = copy.deepcopy(config)
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            module.config = dense if module.config is config else module.config


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


class Pruned:
    """Mixed into a transformers class: builds the dense architecture, then takes the pruned shapes."""

    def __init__(self, config, *args, **kwargs):
        spec = config.ibprune
        pruned = {key: getattr(config, key) for key in spec["dense"]}
        for key, value in spec["dense"].items():
            setattr(config, key, value)
        # A generic head builds its backbone through AutoModel, which must see the dense family's own config.
        own, auto_map = type(config), config.__dict__.pop("auto_map", None)
        config.__class__ = super().config_class
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = own
            if auto_map is not None:
                config.auto_map = auto_map
        pin_rotary_(self)
        for key, value in pruned.items():
            setattr(config, key, value)
        rebuild_(self, spec)
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """None: a static cache that is filled in chunks cannot be reserved by one shape for all layers."""
