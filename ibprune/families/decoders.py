"""Rows of the decoder families."""

from ibprune.groups import Cut, Family, Group, MaskAt

LLAMA = Family(
    causal=True,
    model_types=("llama",),
    blocks="layers.*",
    embedding="embed_tokens",
    output="/lm_head",
    config_keys={"hidden": "hidden_size", "kv_groups": "num_key_value_heads", "ffn": "intermediate_size"},
    groups=(
        # One unit is a key-value head with the query heads k*g .. k*g+g-1 that read it.
        Group(
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
        ),
        Group(
            "attention_sublayer",
            kind="layers",
            min_units=0,
            cuts=(
                Cut("self_attn", "whole", stub="no_attention"),
                Cut("input_layernorm", "whole", stub="identity"),
            ),
            mask_at=MaskAt("out", "self_attn.o_proj"),
        ),
        Group(
            "ffn",
            kind="ffn",
            cuts=(Cut("mlp.gate_proj", "out"), Cut("mlp.up_proj", "out"), Cut("mlp.down_proj", "in")),
            mask_at=MaskAt("in", "mlp.down_proj"),
        ),
        Group(
            "ffn_sublayer",
            kind="layers",
            min_units=0,
            cuts=(
                Cut("mlp", "whole", stub="zeros"),
                Cut("post_attention_layernorm", "whole", stub="identity"),
            ),
            mask_at=MaskAt("out", "mlp.down_proj"),
        ),
        Group(
            "hidden",
            kind="hidden",
            per_block=False,
            cuts=(
                Cut("norm", "out"),
                Cut("embed_tokens", "out"),
                Cut("layers.*.input_layernorm", "out", optional=True),
                Cut("layers.*.self_attn.q_proj", "in", optional=True),
                Cut("layers.*.self_attn.k_proj", "in", optional=True),
                Cut("layers.*.self_attn.v_proj", "in", optional=True),
                Cut("layers.*.self_attn.o_proj", "out", optional=True),
                Cut("layers.*.post_attention_layernorm", "out", optional=True),
                Cut("layers.*.mlp.gate_proj", "in", optional=True),
                Cut("layers.*.mlp.up_proj", "in", optional=True),
                Cut("layers.*.mlp.down_proj", "out", optional=True),
                Cut("/lm_head", "in", optional=True),
                Cut("/score", "in", optional=True),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        Group(
            "embedding_rank",
            kind="embedding_rank",
            per_block=False,
            cuts=(Cut("embed_tokens", "rank"), Cut("/lm_head", "rank", optional=True)),
            mask_at=MaskAt("rank", "embed_tokens"),
        ),
    ),
)
