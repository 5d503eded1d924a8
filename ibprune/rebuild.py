"""Turns a dense architecture into the shapes of a pruned checkpoint; exports carry what they need of its text.

This file imports nothing of ibprune: `ibprune.remote_code` copies parts of it into the `modeling_ibprune.py` of exports
that plain transformers cannot express, so that what loads there is what loads here.
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

    num_embeddings = property(lambda self: self.weight.shape[0])
    embedding_dim = property(lambda self: self.projection.weight.shape[0])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # (batch, length) -> (batch, length, hidden)
        return self.projection(nn.functional.embedding(input_ids, self.weight, self.padding_idx))


class FactorizedUnembedding(nn.Module):
    """The tied output of a `FactorizedEmbedding`: hidden -> k -> vocabulary."""

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.projection, self.bias = embedding.weight, embedding.projection, bias
        self.codes = nn.Identity()  # a place for a mask on the directions

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
    """Stands where an attention was removed: (zeros, no attention weights)."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class CountingNoAttention(NoAttention):
    """As `NoAttention`, where no attention is left that counts the tokens in the cache, which give them positions."""

    def forward(
        self, hidden_states: torch.Tensor, *args, past_key_values=None, key_value_states=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        if past_key_values is not None and key_value_states is None:
            tokens = hidden_states[:, None, :, :1]  # (batch, 1, length, 1)
            getattr(past_key_values, "self_attention_cache", past_key_values).update(tokens, tokens, 0)
        return super().forward(hidden_states)


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
    "counting_no_attention": CountingNoAttention,
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
    """Puts a module in the place of another."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new.train(model.training))


def drop_blocks_(model: nn.Module, spec: dict) -> None:
    """Takes whole blocks out of their lists."""
    gone = {full_path(model, path) for path in spec["dropped_blocks"]}
    for path in {block.rpartition(".")[0] for block in gone}:
        left = (block for i, block in model.get_submodule(path).named_children() if f"{path}.{i}" not in gone)
        replace_module(model, path, nn.ModuleList(left))


def put_stubs_(model: nn.Module, spec: dict) -> None:
    """Puts stubs in the place of the sub-layers that are gone."""
    for path, stub in spec["stubs"].items():
        replace_module(model, full_path(model, path), STUBS[stub]())


def factorize_modules(model: nn.Module, embedding: str, rank: int, output: str | None) -> None:
    """Replaces the embedding (and the output tied to it, if any) by factors of the given rank, not yet filled."""
    dense = model.get_submodule(embedding)
    with torch.device(dense.weight.device):  # on the meta device nothing is reserved or drawn
        factors = FactorizedEmbedding(dense.num_embeddings, rank, dense.embedding_dim, dense.padding_idx)
    replace_module(model, embedding, factors.to(dtype=dense.weight.dtype))
    if output and output in dict(model.named_modules()):  # AutoModel of a language model has none
        replace_module(model, output, FactorizedUnembedding(factors, model.get_submodule(output).bias))
        model._tied_weights_keys = dict(model._tied_weights_keys or {}) | {
            f"{output}.projection.weight": f"{embedding}.projection.weight"
        }


def put_factors_(model: nn.Module, spec: dict) -> None:
    """Factorises the embedding."""
    if spec["embedding"]:
        path, output = (full_path(model, spec["embedding"][key] or "/") for key in ("path", "output"))
        factorize_modules(model, path, spec["embedding"]["rank"], output)


def note_linear(module: nn.Module, leaf: str, shape: torch.Size) -> None:
    """Sets what linear layers, embeddings and norms say of their size."""
    if leaf != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(shape)


def note_conv(module: nn.Module, leaf: str, shape: torch.Size) -> None:
    """Sets what convolutions, and the norms between them, say of their size."""
    if isinstance(module, nn.modules.conv._ConvNd) and leaf == "weight":
        out, into = shape[:2] if not module.transposed else (shape[1], shape[0])
        if module.groups > 1:  # whole groups go, each with its inputs
            module.groups = module.groups * out // module.out_channels
        module.out_channels, module.in_channels = out, into * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase) and len(shape) == 1:
        module.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * shape[0] // module.num_channels
        module.num_channels = shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]


NOTES = (note_linear, note_conv)


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Sets a parameter or buffer of another shape and the size attributes that modules print and check."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if leaf not in module._buffers and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, leaf, value)
    for note in NOTES:
        note(module, leaf, value.shape)


def resize_(model: nn.Module, shapes: dict[str, list[int]], dtypes: dict[str, torch.dtype] | None = None) -> None:
    """Gives parameters and buffers, by name, other shapes and, where given, types; what they hold is unset.

    Names that share one tensor go on sharing one.
    """
    new = {}  # by the old one's id; the old one too: its id must stay its own
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(model.get_submodule(path), leaf)
        if id(old) not in new:
            value = torch.empty(tuple(shape), dtype=(dtypes or {}).get(name, old.dtype), device=old.device)
            is_parameter = isinstance(old, nn.Parameter)
            new[id(old)] = old, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value
        set_parameter(model, name, new[id(old)][1])


def reshape_(model: nn.Module, spec: dict) -> None:
    """Gives all tensors the pruned shapes, unset: the checkpoint fills them."""
    present = {name for name, _ in model.named_modules()}  # a head may be absent: AutoModel of a classifier's folder
    shapes = {full_path(model, path): shape for path, shape in spec["shapes"].items()}
    resize_(model, {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] in present})


def set_sizes(model: nn.Module, sizes: dict[str, int]) -> None:
    """Sets the integer attributes that a forward reads, by path, where their module is still there."""
    modules = dict(model.named_modules())
    for path, size in sizes.items():
        owner, _, name = path.rpartition(".")
        if hasattr(modules.get(owner), name):
            setattr(modules[owner], name, size)


def put_sizes_(model: nn.Module, spec: dict) -> None:
    """Sets the integer attributes: widths that a forward splits by, and numbers of layers."""
    set_sizes(model, {full_path(model, path): size for path, size in spec.get("sizes", {}).items()})


def pin_rotary_(model: nn.Module, spec: dict | None = None) -> None:
    """Gives modules with rotary frequencies a config of their own, while the model's still is the dense one.

    transformers computes the frequencies again after loading, and for long texts, from the width of a head; where
    the config has no `head_dim` that is the model's width over the number of heads.
    """
    dense = copy.deepcopy(model.config)
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            module.config = dense if module.config is model.config else module.config


STEPS = (pin_rotary_, drop_blocks_, put_stubs_, put_factors_, reshape_, put_sizes_)


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
        super().__init__(config, *args, **kwargs)
        config.__class__ = own
        if auto_map is not None:
            config.auto_map = auto_map
        for step in STEPS:
            step(self, spec)
        for key, value in pruned.items():
            setattr(config, key, value)
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """None: a static cache that is filled in chunks cannot be reserved by one shape for all layers."""
