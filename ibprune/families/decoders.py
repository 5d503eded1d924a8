"""Rows of LLaMA and the decoders that share most of its blocks: Mistral, Qwen, OLMo2, Gemma and Phi-3."""

from dataclasses import replace

from ibprune.families.parts import DECODER_HEADS, embedding_rank, ffn, reads_and_writes, sublayer, vocab, width
from ibprune.groups import Cut, Family, Group, MaskAt

_CONFIG_KEYS = {"hidden": "hidden_size", "kv_groups": "num_key_value_heads", "ffn": "intermediate_size"}

# One unit is a key-value head with the query heads k*g .. k*g+g-1 that read it.
_KV_GROUPS = Group(
    "kv_groups",
    kind="kv_groups",
    unit="self_attn.head_dim",
    cuts=(
        Cut("self_attn.k_proj", "out"),
        Cut("self_attn.v_proj", "out"),
        Cut("self_attn.q_proj", "out"),
        Cut("self_attn.o_proj", "in"),
    ),
    mask_at=MaskAt("in", "self_attn.o_proj"),
)

_FFN = ffn(
    cuts=(Cut("mlp.gate_proj", "out"), Cut("mlp.up_proj", "out"), Cut("mlp.down_proj", "in")),
    mask_at=MaskAt("in", "mlp.down_proj"),
)

_BLOCKS_RESIDUAL = (
    *reads_and_writes("layers.*.self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    *reads_and_writes("layers.*.mlp", ("gate_proj", "up_proj"), "down_proj"),
)

_ATTENTION_SUBLAYER = sublayer(
    "attention_sublayer",
    cuts=(
        Cut("self_attn", "whole", stub="no_attention"),
        Cut("input_layernorm", "whole", stub="identity"),
    ),
    mask_at=MaskAt("out", "self_attn.o_proj"),
)

_FFN_SUBLAYER = sublayer(
    "ffn_sublayer",
    cuts=(
        Cut("mlp", "whole", stub="zeros"),
        Cut("post_attention_layernorm", "whole", stub="identity"),
    ),
    mask_at=MaskAt("out", "mlp.down_proj"),
)

_HIDDEN = width(
    "hidden",
    cuts=(
        Cut("norm", "out"),
        Cut("embed_tokens", "out"),
        Cut("layers.*.input_layernorm", "out", optional=True),
        *_BLOCKS_RESIDUAL,
        Cut("layers.*.post_attention_layernorm", "out", optional=True),
        *DECODER_HEADS,
    ),
    mask_at=MaskAt("norms"),
)

_EMBEDDING_RANK = embedding_rank("embed_tokens", "/lm_head")
_VOCAB = vocab("embed_tokens", "/lm_head")

LLAMA = Family(
    causal=True,
    model_types=("llama",),
    blocks="layers.*",
    embedding="embed_tokens",
    output="/lm_head",
    attention="self_attn",
    context="self_attn.o_proj",
    config_keys=_CONFIG_KEYS,
    divided=True,
    per_layer=("layer_types", "no_rope_layers"),
    # Qwen3's q_norm and k_norm act on the features of each head: no unit owns them.
    free=("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"),
    groups=(_KV_GROUPS, _ATTENTION_SUBLAYER, _FFN, _FFN_SUBLAYER, _HIDDEN, _EMBEDDING_RANK, _VOCAB),
)

QWEN = replace(LLAMA, model_types=("mistral", "qwen2", "qwen3", "smollm3"), divided=False)

# OLMo2 and Gemma 2: a norm acts on what a sub-layer adds to the residual stream. The mask of the sub-layer
# acts behind it: before the norm, a scale would have no effect.
_NORMED_ATTENTION = sublayer(
    "attention_sublayer",
    cuts=(
        Cut("self_attn", "whole", stub="no_attention"),
        Cut("input_layernorm", "whole", stub="identity", optional=True),
        Cut("post_attention_layernorm", "whole", stub="identity"),
    ),
    mask_at=MaskAt("out", "post_attention_layernorm"),
)

_NORMED_FFN = sublayer(
    "ffn_sublayer",
    cuts=(
        Cut("mlp", "whole", stub="zeros"),
        Cut("pre_feedforward_layernorm", "whole", stub="identity", optional=True),
        Cut("post_feedforward_layernorm", "whole", stub="identity"),
    ),
    mask_at=MaskAt("out", "post_feedforward_layernorm"),
)

OLMO2 = Family(
    causal=True,
    model_types=("olmo2",),
    blocks="layers.*",
    embedding="embed_tokens",
    output="/lm_head",
    attention="self_attn",
    context="self_attn.o_proj",
    config_keys=_CONFIG_KEYS,
    free=("norm", "layers.*.post_attention_layernorm", "layers.*.post_feedforward_layernorm", "/score"),
    uncut=(("hidden", "attention and FFN read the residual stream itself, without a norm that could be masked"),),
    groups=(
        # The norms of queries and keys act on all heads at once: they take their statistics over the kept ones.
        replace(_KV_GROUPS, cuts=(*_KV_GROUPS.cuts, Cut("self_attn.q_norm", "out"), Cut("self_attn.k_norm", "out"))),
        _NORMED_ATTENTION,
        _FFN,
        _NORMED_FFN,
        _EMBEDDING_RANK,
        _VOCAB,
    ),
)

_SCALED = "the embedding multiplies its rows by a fixed scale, which a factorised one would lose"

GEMMA = Family(
    causal=True,
    model_types=("gemma",),
    blocks="layers.*",
    embedding="embed_tokens",
    output="/lm_head",
    attention="self_attn",
    context="self_attn.o_proj",
    config_keys=_CONFIG_KEYS,
    per_layer=("layer_types",),
    norm_offset=1.0,
    uncut=(("embedding_rank", _SCALED),),
    groups=(_KV_GROUPS, _ATTENTION_SUBLAYER, _FFN, _FFN_SUBLAYER, _HIDDEN, _VOCAB),
)

GEMMA2 = Family(
    causal=True,
    # Gemma 3's q_norm and k_norm act on the features of each head: no unit owns them.
    model_types=("gemma2", "gemma3_text"),
    blocks="layers.*",
    embedding="embed_tokens",
    output="/lm_head",
    attention="self_attn",
    context="self_attn.o_proj",
    config_keys=_CONFIG_KEYS,
    divided=True,
    per_layer=("layer_types",),
    free=("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"),
    norm_offset=1.0,
    uncut=(("embedding_rank", _SCALED),),
    groups=(
        _KV_GROUPS,
        _NORMED_ATTENTION,
        _FFN,
        _NORMED_FFN,
        replace(
            _HIDDEN,
            cuts=(
                *_HIDDEN.cuts,
                Cut("layers.*.pre_feedforward_layernorm", "out", optional=True),
                Cut("layers.*.post_feedforward_layernorm", "out", optional=True),
            ),
        ),
        _VOCAB,
    ),
)

PHI3 = Family(
    causal=True,
    model_types=("phi3",),
    blocks="layers.*",
    embedding="embed_tokens",
    output="/lm_head",
    attention="self_attn",
    context="self_attn.o_proj",
    config_keys={"hidden": "hidden_size", "ffn": "intermediate_size"},
    uncut=(("heads", "its attention splits the fused projection by the config's number of heads, one for all layers"),),
    groups=(
        _ATTENTION_SUBLAYER,
        ffn(
            cuts=(
                Cut("mlp.down_proj", "in"),
                Cut("mlp.gate_up_proj", "out", chunk=0, chunks=2),
                Cut("mlp.gate_up_proj", "out", chunk=1, chunks=2),
            ),
            mask_at=MaskAt("in", "mlp.down_proj"),
        ),
        _FFN_SUBLAYER,
        replace(
            _HIDDEN,
            cuts=(
                *_HIDDEN.cuts,
                Cut("layers.*.self_attn.qkv_proj", "in", optional=True),
                Cut("layers.*.mlp.gate_up_proj", "in", optional=True),
            ),
        ),
        _EMBEDDING_RANK,
        _VOCAB,
    ),
)
