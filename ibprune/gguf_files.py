"""Decoders of LLaMA's kind as GGUF files for llama.cpp: even ones as themselves, uneven ones as DeciLM."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ibprune.embeddings import merge_
from ibprune.errors import BadRecipe, PlanMismatch, UnsupportedModel, did_you_mean
from ibprune.gguf_vocab import Vocabulary, vocabulary
from ibprune.models import Source, load_tokenizer
from ibprune.rebuild import NoAttention, Zeros
from ibprune.task_heads import dense_name

UNEVEN = "deci"  # llama.cpp's only architecture of this kind with widths by layer
BLOCK = 256  # features of a row that a k-quant packs together
DTYPES = {"f32": torch.float32, "f16": torch.float16}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp reads a model type whose layers are all alike.

    Attributes:
        name: Its `general.architecture`.
        pairs: Whether it rotates neighbouring features of a head, where transformers rotates its halves.
        square: Whether queries must be as wide as the residual stream.
        norms: Whether queries and keys have norms, for which `UNEVEN` has no place.
        factors: Whether it takes factors of the rotary frequencies.
    """

    name: str
    pairs: bool
    square: bool = False
    norms: bool = False
    factors: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True, factors=True),
    "mistral": Architecture("llama", pairs=True, factors=True),
    "qwen2": Architecture("qwen2", pairs=False, square=True),
    "qwen3": Architecture("qwen3", pairs=False, norms=True),
}
_DECI = Architecture(UNEVEN, pairs=True, factors=True)


@dataclass(frozen=True)
class Layer:
    """The widths of a block: heads of queries, heads of keys and values, FFN units; 0 where a sub-layer is gone."""

    heads: int
    kv_heads: int
    ffn: int


def write_gguf(model: PreTrainedModel, folder: Path, path: str | Path, *, dtype: str | None = None) -> list[str]:
    """Writes a causal language model and its tokenizer for llama.cpp; returns what a user should know of the file.

    Args:
        model: As `ibprune.load` gives it.
        folder: Where its tokenizer is.
        dtype: Of matrices, "f32" or "f16"; vectors stay in float32. Default: f16 where the model's are, f32 otherwise.

    Raises:
        BadRecipe: gguf is missing, another dtype, or no tokenizer.
        UnsupportedModel: llama.cpp has no place for the model, its rotary frequencies or its tokenizer.
        PlanMismatch: No place for the plan's shapes, or a weight that float16 cannot hold.

    Example:
        >>> write_gguf(ibprune.load("small"), Path("small"), "small.gguf")  # doctest: +SKIP
    """
    try:
        import gguf
    except ImportError as error:
        raise BadRecipe(f"expected {error.name} for GGUF, found none: pip install 'ibprune[gguf]'.") from error
    if dtype is not None and re.match(r"i?q\d", dtype.lower()):
        raise BadRecipe(
            f"--dtype: expected f32 or f16, found '{dtype}': quantise the file with llama.cpp's llama-quantize. "
            f"k-quants take rows of a multiple of {BLOCK}, which --round-to {BLOCK} prunes to."
        )
    if dtype is not None and dtype not in DTYPES:
        raise BadRecipe(f"unknown --dtype '{dtype}': {did_you_mean(dtype, DTYPES)}.")
    half = dtype == "f16" or (dtype is None and model.dtype == torch.float16)
    _check_model(model)
    notes: list[str] = []
    model = copy.deepcopy(model).float()
    if type(model.get_input_embeddings()) is not nn.Embedding:
        merge_(model)
        notes.append("the factors of the embedding became one matrix again: the file is larger for it")
    width = _head_width(model)
    layers = [_layer(block, width) for block in model.model.layers]
    architecture = _architecture(model, layers)
    layers = [_stood_in(i, layer, model.config, notes) for i, layer in enumerate(layers)]
    tokens = vocabulary(load_tokenizer(Source(str(folder), str(folder))), model.get_input_embeddings().num_embeddings)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(folder.absolute().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(tokens.tokens))
    writer.add_embedding_length(model.get_input_embeddings().embedding_dim)
    _add_sizes(writer, model.config, layers, width, even=architecture is not _DECI, notes=notes)
    _add_vocabulary(writer, tokens)
    rows: dict[int, int] = {}
    for name, tensor in _tensors(model, layers, architecture):
        if tensor.ndim == 2:
            rows[tensor.shape[1]] = rows.get(tensor.shape[1], 0) + 1
        tensor = tensor.half() if half and tensor.ndim == 2 else tensor
        if not torch.isfinite(tensor).all():
            raise PlanMismatch(f"expected weights that float16 can hold, found more in '{name}': take --dtype f32.")
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    odd = [f"{width} ({count} tensors)" for width, count in sorted(rows.items()) if width % BLOCK]
    if odd:
        notes.append(f"k-quants pack {BLOCK} features of a row: llama.cpp packs rows of {', '.join(odd)} otherwise")
    return [f"architecture {architecture.name}, {'f16' if half else 'f32'}", *notes]


def _check_model(model: PreTrainedModel) -> None:
    """Raises where llama.cpp would compute something else."""
    config, name = model.config, dense_name(model)
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"'{config.model_type}' has no GGUF architecture here: {did_you_mean(config.model_type, ARCHITECTURES)}."
        )
    if not name.endswith("ForCausalLM"):
        raise UnsupportedModel(f"expected a causal language model for GGUF, found {name}.")
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"expected an FFN with silu, llama.cpp's, found '{config.hidden_act}'.")
    rotary = model.model.rotary_emb
    widths = {block.self_attn.head_dim for block in model.model.layers if hasattr(block.self_attn, "head_dim")}
    if config.rope_parameters["rope_type"] not in ("default", "linear", "llama3") or rotary.attention_scaling != 1:
        raise UnsupportedModel(
            f"expected plain, linear or llama3 rotary positions, found '{config.rope_parameters['rope_type']}'."
        )
    if not widths <= {_head_width(model)}:
        raise UnsupportedModel("expected rotary positions over whole heads, found some over a part of them.")


def _head_width(model: PreTrainedModel) -> int:
    """Features of a head: the rotary frequencies count its pairs."""
    return 2 * len(model.model.rotary_emb.inv_freq)


def _layer(block: nn.Module, width: int) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    ffn = 0 if isinstance(mlp, Zeros) else mlp.up_proj.out_features
    if isinstance(attention, NoAttention):
        return Layer(0, 0, ffn)
    return Layer(attention.q_proj.out_features // width, attention.k_proj.out_features // width, ffn)


def _architecture(model: PreTrainedModel, layers: list[Layer]) -> Architecture:
    """The model type's own where all layers are alike and it can hold them, else `UNEVEN`."""
    own = ARCHITECTURES[model.config.model_type]
    reasons = []
    if len(set(layers)) > 1 or not all(layers[0].__dict__.values()):
        reasons.append("layers of different widths")
    if own.square and layers[0].heads * _head_width(model) != model.get_input_embeddings().weight.shape[1]:
        reasons.append("queries of another width than the residual stream")
    if not own.factors and _rotary_factors(model) is not None:
        reasons.append("scaled rotary frequencies")
    if not reasons:
        return own
    if own.norms:
        raise PlanMismatch(
            f"llama.cpp cannot hold this {model.config.model_type}: it has {' and '.join(reasons)}, and '{UNEVEN}', "
            "the architecture for those, has no norms of queries and keys. Prune equally many units in every layer."
        )
    return _DECI


def _stood_in(i: int, layer: Layer, config: object, notes: list[str]) -> Layer:
    """The layer with sub-layers of zeros where llama.cpp cannot do without: they add nothing, exactly.

    It leaves a layer without FFN at once, and forgets what the attention there has added; and it takes the width of a
    head from the first layer's.
    """
    if layer.ffn == 0:
        notes.append(f"layer {i}: one FFN unit of zeros, for llama.cpp skips the attention of a layer without FFN")
        layer = Layer(layer.heads, layer.kv_heads, 1)
    if layer.heads == 0 and i == 0:
        notes.append("layer 0: one head of zeros, for llama.cpp takes the width of a head from the first layer")
        layer = Layer(1, 1, layer.ffn)
    return layer


def _rotary_factors(model: PreTrainedModel) -> torch.Tensor | None:
    """What divides the rotary frequencies of the base, (head_dim / 2,), None where nothing does."""
    frequencies, width = model.model.rotary_emb.inv_freq.double(), _head_width(model)
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    factors = model.config.rope_parameters["rope_theta"] ** -steps / frequencies
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


def _add_sizes(writer, config: object, layers: list[Layer], width: int, *, even: bool, notes: list[str]) -> None:
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if (
        window
        and window < context
        and "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    ):
        context = window
        notes.append(f"the context is {context} tokens, the window of its attention: llama.cpp has none here")
    writer.add_context_length(context)
    writer.add_block_count(len(layers))
    for add, key in (
        (writer.add_head_count, "heads"),
        (writer.add_head_count_kv, "kv_heads"),
        (writer.add_feed_forward_length, "ffn"),
    ):
        widths = [getattr(layer, key) for layer in layers]
        add(widths[0] if even else widths)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(writer, tokens: Vocabulary) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    for role, number in tokens.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    for what, whether in tokens.adds.items():
        getattr(writer, f"add_add_{what}")(whether)


def _tensors(
    model: PreTrainedModel, layers: list[Layer], architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by llama.cpp's names; zeros in the sub-layers that only stand in."""
    embedding = model.get_input_embeddings().weight
    yield "token_embd.weight", embedding
    yield "output_norm.weight", model.model.norm.weight
    if model.lm_head.weight is not embedding:
        yield "output.weight", model.lm_head.weight
    factors = _rotary_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors
    width, hidden = _head_width(model), embedding.shape[1]  # a pruned width that a config refuses is not in it
    for i, (block, layer) in enumerate(zip(model.model.layers, layers)):
        begin, attention, mlp = f"blk.{i}.", block.self_attn, block.mlp
        if isinstance(attention, NoAttention):
            if layer.heads:
                yield begin + "attn_norm.weight", torch.ones(hidden)
                for name in "qkv":
                    yield f"{begin}attn_{name}.weight", torch.zeros(width, hidden)
                yield begin + "attn_output.weight", torch.zeros(hidden, width)
        else:
            yield begin + "attn_norm.weight", block.input_layernorm.weight
            for name, module in (("q", attention.q_proj), ("k", attention.k_proj)):
                for leaf, tensor in module.named_parameters():
                    yield f"{begin}attn_{name}.{leaf}", _paired(tensor, width) if architecture.pairs else tensor
            for name, module in (("v", attention.v_proj), ("output", attention.o_proj)):
                for leaf, tensor in module.named_parameters():
                    yield f"{begin}attn_{name}.{leaf}", tensor
            if architecture.norms:
                yield begin + "attn_q_norm.weight", attention.q_norm.weight
                yield begin + "attn_k_norm.weight", attention.k_norm.weight
        if isinstance(mlp, Zeros):
            yield begin + "ffn_norm.weight", torch.ones(hidden)
            yield begin + "ffn_gate.weight", torch.zeros(layer.ffn, hidden)
            yield begin + "ffn_up.weight", torch.zeros(layer.ffn, hidden)
            yield begin + "ffn_down.weight", torch.zeros(hidden, layer.ffn)
        else:
            yield begin + "ffn_norm.weight", block.post_attention_layernorm.weight
            for name, module in (("gate", mlp.gate_proj), ("up", mlp.up_proj), ("down", mlp.down_proj)):
                for leaf, tensor in module.named_parameters():
                    yield f"{begin}ffn_{name}.{leaf}", tensor


def _paired(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of heads whose first half rotates with the second, so that neighbours rotate: 0, h, 1, h + 1, …"""
    return tensor.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
