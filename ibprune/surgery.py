"""The only file that changes a model's weights' shapes: factorise, fold, cut, and describe the result."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ibprune.errors import PlanMismatch, UnsupportedModel
from ibprune.groups import Cut, Family, Site, axis_dims, axis_width, get_tensor, is_norm
from ibprune.inject import MASKS, norm_paths, remove_, unnormed
from ibprune.plans import PruningPlan, check_plan
from ibprune.rebuild import (
    STUBS,
    FactorizedEmbedding,
    FactorizedUnembedding,
    SelectedLinear,
    factorize_modules,
    full_path,
    pin_rotary_,
    renumber_layers_,
    replace_module,
    set_parameter,
    set_sizes,
)
from ibprune.sites import block_lists, block_paths, find_family, find_sites

SPEC = "ibprune"
FORMAT = 1
SPEC_KEYS = ("format", "model_type", "architecture", "dense", "dropped_blocks", "stubs", "embedding", "shapes")


def factorize_(model: nn.Module, token_counts: torch.Tensor | None = None) -> None:
    """Writes the token embedding W (V, d) as A (V, d) times B (d, d), its principal directions in order.

    The model's output is unchanged (to rounding). The directions are the right singular vectors of
    diag(sqrt(w)) W, so that keeping the first k of them loses the least of the embeddings that the
    data use. The weights are w = counts + mean(counts): half what the data show, half uniform, so
    that tokens absent from the data keep a share. An output tied to the embedding follows it.

    Args:
        model: A transformers model of a known family.
        token_counts: How often each token id occurs in the data, (V,); None weighs all alike.

    Raises:
        UnsupportedModel: The model reads no tokens, or its embedding is not a plain `nn.Embedding`.
    """
    family = find_family(model.config.model_type)
    if not family.embedding:
        raise UnsupportedModel(f"'{model.config.model_type}' reads no tokens: it has no embedding to factorise.")
    path, output = full_path(model, family.embedding), family.output.removeprefix("/")
    embedding = model.get_submodule(path)
    if type(embedding) is not nn.Embedding:
        raise UnsupportedModel(
            f"expected '{path}' to be an nn.Embedding, found {type(embedding).__name__}: it cannot be factorised. "
            "Leave 'embedding_rank' out of the kinds."
        )
    tied = output if _shares(model, output, embedding.weight) else None
    weight = embedding.weight.detach()
    hidden = weight.shape[1]
    if weight.is_meta:
        factorize_modules(model, path, hidden, tied)
        return
    work = weight.double()
    counts = torch.ones(len(work), dtype=work.dtype) if token_counts is None else token_counts.to(work)
    weights = (counts + counts.mean().clamp_min(1e-12)).to(work.device)
    moment = work.T @ (work * weights[:, None])  # (d, d): its eigenvectors are the right singular vectors
    directions = torch.linalg.eigh(moment).eigenvectors.flip(1)  # (d, d), largest first
    factorize_modules(model, path, hidden, tied)
    factors = model.get_submodule(path)
    with torch.no_grad():
        factors.weight.copy_(work @ directions)
        factors.projection.weight.copy_(directions)


def merge_(model: nn.Module) -> None:
    """Multiplies the factors of an embedding back into one matrix; the opposite of `factorize_`."""
    family = find_family(model.config.model_type)
    path, output = full_path(model, family.embedding), family.output.removeprefix("/")
    factors = dict(model.named_modules()).get(path)
    if not isinstance(factors, FactorizedEmbedding):
        return
    weight = (factors.weight.detach().double() @ factors.projection.weight.detach().double().T).to(factors.weight.dtype)
    embedding = nn.Embedding(*weight.shape, padding_idx=factors.padding_idx, device="meta")
    embedding.weight = nn.Parameter(weight, requires_grad=factors.weight.requires_grad)
    replace_module(model, path, embedding)
    unembedding = dict(model.named_modules()).get(output)
    if isinstance(unembedding, FactorizedUnembedding):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=unembedding.bias is not None, device="meta")
        linear.weight, linear.bias = embedding.weight, unembedding.bias
        replace_module(model, output, linear)
        model._tied_weights_keys = type(model)._tied_weights_keys


def cut_vocab_(model: nn.Module, rows: tuple[int, ...]) -> None:
    """Removes the rows of the vocabulary that are not among `rows`, from the embedding and from the output layer.

    Row i is then the token whose id was `rows[i]`, and the config names its tokens by their new ids. What
    is left is an ordinary model of a smaller vocabulary: `config.vocab_size` says all of it.

    Args:
        rows: Sorted ids; `ibprune.vocabulary.keep_rows` makes the tokenizer to them.

    Raises:
        PlanMismatch: A row that the config names is not among them; nothing is changed then.
    """
    site = find_sites(model)["vocab"]
    new_id = {row: i for i, row in enumerate(rows)}
    gone = sorted(named_rows(model) - set(rows))
    if gone:
        raise PlanMismatch(
            f"expected the plan to keep the row {gone[0]} of the vocabulary, found it cut: the model's config or its "
            "positions need it."
        )
    _slice_(model, {"vocab": site}, PruningPlan(model.config.model_type, {"vocab": site.n_units}, {"vocab": rows}))
    for config in (model.config, getattr(model, "generation_config", None)):
        for key, value in _token_ids(config).items():
            new = [new_id.get(row, row) for row in value] if isinstance(value, list) else new_id.get(value, value)
            setattr(config, key, new)
    for module in model.modules():  # some backbones and heads hold the config's number themselves
        if vars(module).get("vocab_size") == site.n_units:
            module.vocab_size = len(rows)
    embedding = model.get_submodule(site.cuts[0].path)
    embedding.padding_idx = new_id.get(embedding.padding_idx)
    model.config.vocab_size = len(rows)


def named_rows(model: nn.Module) -> set[int]:
    """Rows of the embedding that the model needs whatever the text.

    Those are the ids in its configs and the padding's; where positions count from the padding's id, all before it too.
    """
    family = find_family(model.config.model_type)
    embedding = model.get_submodule(full_path(model, family.embedding))
    rows = set() if embedding.padding_idx is None else {embedding.padding_idx}
    if family.reserved_positions:
        rows |= set(range(embedding.padding_idx or 0))
    for config in (model.config, getattr(model, "generation_config", None)):
        for value in _token_ids(config).values():
            rows |= set(value) if isinstance(value, list) else {value}
    return {row for row in rows if 0 <= row < embedding.num_embeddings}


def _token_ids(config: object) -> dict[str, int | list[int]]:
    """The tokens that a config, or a generation config, names; nothing where there is none."""
    values = config.to_dict() if config is not None else {}
    return {key: value for key, value in values.items() if key.endswith("_token_id") and value is not None}


def compact_(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Removes every unit that the plan does not keep and returns the model.

    The result computes what the masked model computes. Masks, where present, are folded into the
    weights first (mu scales the features that its unit owns) and taken out. A factorised embedding
    that keeps all its directions becomes one matrix again. Where the vocabulary is cut, the result reads
    the new ids (`cut_vocab_`). `model.config` tells the new structure.

    Raises:
        PlanMismatch: The plan does not fit the model; nothing is changed then.
    """
    family = find_family(model.config.model_type)
    sites = find_sites(model)
    masked = hasattr(model, MASKS)
    rank = [name for name in plan.keep if name.endswith("embedding_rank")]
    if rank and rank[0] not in sites:
        factorize_(model)
        try:
            return compact_(model, plan)
        except PlanMismatch:
            merge_(model)
            raise
    check_plan(plan, model, sites)
    if "vocab" in sites and len(plan.keep["vocab"]) < sites["vocab"].n_units:
        cut_vocab_(model, plan.keep["vocab"])
    sites = {name: site for name, site in sites.items() if site.kind != "vocab"}
    native = {id(module) for module in model.modules() if type(module) in STUBS.values()}
    dense = {key: copy.copy(getattr(model.config, key)) for key in _size_keys(model)}
    before = _shapes(model)
    if masked:
        with torch.no_grad():
            _fold_(model, sites, norm_offset=family.norm_offset)
        remove_(model)
    pin_rotary_(model)
    sizes = _new_sizes(model, sites, plan)
    widths = {
        key: plan.kept()[name] for name, key in family.config_keys.items() if name in sites and not sites[name].block
    }
    for site in sites.values():  # sub-layers first: their inner units need no cutting
        if all(cut.axis == "whole" for cut in site.cuts) and not plan.keep[site.name]:
            for cut in site.cuts:
                replace_module(model, cut.path, STUBS[cut.stub]())
    _slice_(model, sites, plan)
    set_sizes(model, sizes)
    if rank and len(plan.keep[rank[0]]) == plan.n_units[rank[0]]:
        merge_(model)
    modules = dict(model.named_modules())
    owners = {path: modules.get(path.rpartition(".")[0]) for path in sizes}
    dropped = _drop_empty_blocks_(model, family)
    _retype_layers_(model, family)
    renumber_layers_(model, dense.get("layer_types"))
    if family.router:
        _settle_experts_(model)
    for key, width in widths.items():
        setattr(model.config, key, width)
    now = {id(module): path for path, module in model.named_modules()}  # blocks behind a dropped one moved up
    sizes = {
        f"{now[id(owners[path])]}.{path.rpartition('.')[2]}": size
        for path, size in sizes.items()
        if id(owners[path]) in now
    }
    _describe_(model, dense, before, dropped, sizes, native)
    return model


def compact_module_(model: nn.Module, sites: dict[str, Site], plan: PruningPlan) -> nn.Module:
    """Removes the units that the plan does not keep from any module with traced sites; returns it.

    As `compact_`, for models whose structure is found by `ibprune.channels` rather than by a family.

    Raises:
        PlanMismatch: The plan does not fit the model; nothing is changed then.
    """
    check_plan(plan, model, sites)
    if hasattr(model, MASKS):
        with torch.no_grad():
            _fold_(model, sites)
        remove_(model)
    _slice_(model, sites, plan)
    for site in sites.values():
        if site.kind == "inputs":
            _restore_inputs_(model, site.cuts[0].path)
    return model


def compact_traced_(model: PreTrainedModel, sites: dict[str, Site], plan: PruningPlan) -> PreTrainedModel:
    """As `compact_module_` for a transformers model: `model.config` tells the new structure.

    Raises:
        PlanMismatch: The plan does not fit the model; nothing is changed then.
    """
    before = _shapes(model)
    compact_module_(model, sites, plan)
    model.config.ibprune = _spec(model, before, full_path(model, ""))
    return model


def select_inputs_(model: nn.Module, path: str) -> None:
    """Puts a `SelectedLinear` that reads everything in the place of a linear layer; outputs are unchanged."""
    linear = model.get_submodule(path)
    if isinstance(linear, SelectedLinear):
        return
    selected = SelectedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    selected.to(linear.weight.device)
    selected.weight, selected.bias = linear.weight, linear.bias
    replace_module(model, path, selected)


def _restore_inputs_(model: nn.Module, path: str) -> None:
    """Puts a plain linear layer back where everything is read after all."""
    selected = model.get_submodule(path)
    if len(selected.index) == selected.n_features:
        linear = nn.Linear(selected.in_features, selected.out_features, selected.bias is not None, device="meta")
        linear.weight, linear.bias = selected.weight, selected.bias
        replace_module(model, path, linear)


def _slice_(model: nn.Module, sites: dict[str, Site], plan: PruningPlan) -> None:
    """Index-selects every cut axis, each tensor once, however many modules share it."""
    modules = dict(model.named_modules())
    kept: dict[int, dict[int, torch.Tensor]] = {}  # by tensor identity, then dimension: which features stay
    for site in sites.values():
        gone = torch.ones(site.n_units, dtype=torch.bool)
        gone[list(plan.keep[site.name])] = False
        for cut in site.cuts:
            if cut.axis == "whole" or cut.path not in modules or not gone.any():
                continue
            for name, dim in axis_dims(modules[cut.path], cut.axis):
                tensor = get_tensor(modules[cut.path], name)
                offset, width = cut.span(site.n_units, tensor.shape[dim])
                stays = kept.setdefault(id(tensor), {}).setdefault(dim, torch.ones(tensor.shape[dim], dtype=torch.bool))
                stays[offset : offset + site.n_units * width] &= ~gone.repeat_interleave(width)
    new: dict[int, torch.Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) in kept:
            if id(tensor) not in new:
                value = tensor.detach()
                for dim, stays in kept[id(tensor)].items():
                    value = value.index_select(dim, stays.nonzero().flatten().to(value.device))
                value = value.contiguous()
                is_parameter = isinstance(tensor, nn.Parameter)
                new[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
            set_parameter(model, name, new[id(tensor)])


def _new_sizes(model: nn.Module, sites: dict[str, Site], plan: PruningPlan) -> dict[str, int]:
    """What the integer attributes that follow the units will be, by path."""
    found = {}
    for site in sites.values():
        for path in site.sizes:
            owner, _, name = path.rpartition(".")
            size = getattr(model.get_submodule(owner), name)
            found[path] = size * len(plan.keep[site.name]) // site.n_units
    return found


def _fold_(model: nn.Module, sites: dict[str, Site], *, norm_offset: float = 0.0) -> None:
    """Multiplies each mask's mean into the weights that make, or read, its unit's features."""
    for name, mask in getattr(model, MASKS).items():
        site, mu = sites[name], mask.mu.detach()
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
                weight[..., offset : offset + site.n_units * width].mul_(mu.repeat_interleave(width).to(weight.dtype))
            continue
        at = site.mask_at.into or Cut(site.mask_at.path, site.mask_at.side)
        module = model.get_submodule(at.path)
        if at.axis == "rank":
            module.projection.weight.mul_(mu.to(module.weight.dtype))  # shared by the input and the tied output
        elif at.axis == "out" and is_norm(module):
            _scale_norm_(module, mu.repeat_interleave(len(module.weight) // site.n_units), norm_offset)
        else:
            _scale_features_(module, at.axis, mu.repeat_interleave(axis_width(model, at) // site.n_units))


def _scale_features_(module: nn.Module, axis: str, scale: torch.Tensor) -> None:
    for name, dim in axis_dims(module, axis):
        tensor = module.get_parameter(name).movedim(dim, -1)
        tensor.mul_(scale.to(tensor.dtype))


def _scale_norm_(norm: nn.Module, mu: torch.Tensor, offset: float) -> None:
    """Scales a norm's output, which is its normalised input times (offset + weight), plus a bias."""
    for name, parameter in norm.named_parameters():
        scale, shift = mu.to(parameter.dtype), offset if name == "weight" else 0.0
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
    native: set[int],
) -> None:
    """Writes the structure into the config: uniform sizes as plain keys, all of it in `config.ibprune`."""
    config = model.config
    family = find_family(config.model_type)
    old = getattr(config, SPEC, None) or {"dense": dense, "shapes": {}, "stubs": {}, "dropped_blocks": []}
    if old["dropped_blocks"] or (old["shapes"] and dropped):
        raise PlanMismatch("expected a model with all its blocks, found one pruned of whole blocks: start from dense.")
    backbone = full_path(model, "")
    factors = dict(model.named_modules()).get(full_path(model, family.embedding))
    embedding = None
    if isinstance(factors, FactorizedEmbedding):
        tied = isinstance(dict(model.named_modules()).get(family.output.removeprefix("/")), FactorizedUnembedding)
        embedding = {
            "path": family.embedding,
            "rank": factors.weight.shape[1],
            "output": family.output if tied else None,
        }
    stubs = dict(old["stubs"])
    for path, module in model.named_modules():
        stub = next((key for key, cls in STUBS.items() if type(module) is cls and id(module) not in native), None)
        if stub:
            stubs[_spec_path(path, backbone)] = stub
    spec = _spec(model, before, backbone)
    config.ibprune = spec | {
        "dense": old["dense"],
        "dropped_blocks": dropped,
        "stubs": stubs,
        "embedding": embedding,
        "shapes": old["shapes"] | spec["shapes"],
        "sizes": old.get("sizes", {}) | {_spec_path(path, backbone): size for path, size in sizes.items()},
    }


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


def _shares(model: nn.Module, path: str, weight: nn.Parameter) -> bool:
    module = dict(model.named_modules()).get(path)
    return module is not None and getattr(module, "weight", None) is weight
