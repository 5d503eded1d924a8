"""Rows of GPT-2, GPT-NeoX and OPT: decoders with LayerNorms."""

from ibprune.families.parts import DECODER_HEADS, embedding_rank, ffn, heads, reads_and_writes, sublayer, vocab, width
from ibprune.groups import Cut, Family, Group, MaskAt

GPT2 = Family(
    causal=True,
    model_types=("gpt2",),
    blocks="h.*",
    embedding="wte",
    output="/lm_head",
    attention="attn",
    context="attn.c_proj",
    config_keys={"hidden": "n_embd", "heads": "n_head", "ffn": "n_inner"},
    ties=("hidden", "heads"),
    groups=(
        Group(
            "heads",
            kind="heads",
            unit="attn.head_dim",
            cuts=(
                Cut("attn.c_proj", "in"),
                Cut("attn.c_attn", "out", chunk=0, chunks=3),
                Cut("attn.c_attn", "out", chunk=1, chunks=3),
                Cut("attn.c_attn", "out", chunk=2, chunks=3),
            ),
            mask_at=MaskAt("in", "attn.c_proj"),
            sizes=("attn.split_size",),  # where the forward parts queries, keys and values
        ),
        sublayer(
            "attention_sublayer",
            cuts=(Cut("attn", "whole", stub="no_attention"), Cut("ln_1", "whole", stub="identity")),
            mask_at=MaskAt("out", "attn.c_proj"),
        ),
        ffn(
            cuts=(Cut("mlp.c_fc", "out"), Cut("mlp.c_proj", "in")),
            mask_at=MaskAt("in", "mlp.c_proj"),
        ),
        sublayer(
            "ffn_sublayer",
            cuts=(Cut("mlp", "whole", stub="zeros"), Cut("ln_2", "whole", stub="identity")),
            mask_at=MaskAt("out", "mlp.c_proj"),
        ),
        width(
            "hidden",
            cuts=(
                Cut("ln_f", "out"),
                Cut("wte", "out"),
                Cut("wpe", "out"),
                Cut("h.*.ln_1", "out", optional=True),
                *reads_and_writes("h.*.attn", ("c_attn",), "c_proj"),
                Cut("h.*.ln_2", "out", optional=True),
                *reads_and_writes("h.*.mlp", ("c_fc",), "c_proj"),
                *DECODER_HEADS,
            ),
            mask_at=MaskAt("norms"),
        ),
        embedding_rank("wte", "/lm_head"),
        vocab("wte", "/lm_head"),
    ),
)

GPT_NEOX = Family(
    causal=True,
    model_types=("gpt_neox",),
    blocks="layers.*",
    embedding="embed_in",
    output="/lm_head",
    attention="attention",
    context="attention.dense",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"},
    ties=("hidden", "heads"),
    groups=(
        Group(
            "heads",
            kind="heads",
            unit="attention.head_size",
            # The fused projection holds query, key and value of one head after another.
            cuts=(Cut("attention.dense", "in"), Cut("attention.query_key_value", "out")),
            mask_at=MaskAt("in", "attention.dense"),
        ),
        sublayer(
            "attention_sublayer",
            cuts=(Cut("attention", "whole", stub="no_attention"), Cut("input_layernorm", "whole", stub="identity")),
            mask_at=MaskAt("out", "attention.dense"),
        ),
        ffn(
            cuts=(Cut("mlp.dense_h_to_4h", "out"), Cut("mlp.dense_4h_to_h", "in")),
            mask_at=MaskAt("in", "mlp.dense_4h_to_h"),
        ),
        sublayer(
            "ffn_sublayer",
            cuts=(Cut("mlp", "whole", stub="zeros"), Cut("post_attention_layernorm", "whole", stub="identity")),
            mask_at=MaskAt("out", "mlp.dense_4h_to_h"),
        ),
        width(
            "hidden",
            cuts=(
                Cut("final_layer_norm", "out"),
                Cut("embed_in", "out"),
                Cut("layers.*.input_layernorm", "out", optional=True),
                *reads_and_writes("layers.*.attention", ("query_key_value",), "dense"),
                Cut("layers.*.post_attention_layernorm", "out", optional=True),
                *reads_and_writes("layers.*.mlp", ("dense_h_to_4h",), "dense_4h_to_h"),
                *DECODER_HEADS,
            ),
            mask_at=MaskAt("norms"),
        ),
        embedding_rank("embed_in", "/lm_head"),
        vocab("embed_in", "/lm_head"),
    ),
)

_OPT_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

OPT = Family(
    causal=True,
    model_types=("opt",),
    blocks="decoder.layers.*",
    embedding="decoder.embed_tokens",
    output="/lm_head",
    attention="self_attn",
    context="self_attn.out_proj",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "ffn_dim"},
    ties=("hidden", "heads"),
    follows=(("word_embed_proj_dim", "hidden_size"),),
    groups=(
        heads(_OPT_QKV, "self_attn.out_proj", unit="self_attn.head_dim", sizes=("self_attn.num_heads",)),
        sublayer(
            "attention_sublayer",
            cuts=(
                Cut("self_attn", "whole", stub="no_attention"),
                Cut("self_attn_layer_norm", "whole", stub="identity"),
            ),
            mask_at=MaskAt("out", "self_attn.out_proj"),
        ),
        ffn(cuts=(Cut("fc1", "out"), Cut("fc2", "in")), mask_at=MaskAt("in", "fc2", flattened=True)),
        sublayer(
            "ffn_sublayer",
            cuts=(
                Cut("fc1", "whole", stub="zeros"),
                Cut("fc2", "whole", stub="zeros"),
                Cut("final_layer_norm", "whole", stub="identity"),
            ),
            mask_at=MaskAt("out", "fc2", flattened=True),
        ),
        width(
            "hidden",
            cuts=(
                # Only models with norms before the sub-layers have it: the others' first layer reads no norm.
                Cut("decoder.final_layer_norm", "out"),
                Cut("decoder.embed_tokens", "out"),
                Cut("decoder.embed_positions", "out"),
                Cut("decoder.layers.*.self_attn_layer_norm", "out", optional=True),
                *reads_and_writes("decoder.layers.*", _OPT_QKV, "self_attn.out_proj"),
                Cut("decoder.layers.*.final_layer_norm", "out", optional=True),
                *reads_and_writes("decoder.layers.*", ("fc1",), "fc2"),
                *DECODER_HEADS,
            ),
            mask_at=MaskAt("norms", flattened=True),
        ),
        embedding_rank("decoder.embed_tokens", "/lm_head"),
        vocab("decoder.embed_tokens", "/lm_head"),
    ),
)
