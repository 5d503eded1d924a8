"""The row of BART, an encoder-decoder with norms after the sub-layers."""

from dataclasses import replace

from ibprune.families.parts import ffn, heads, reads_and_writes, sublayer, tanh_head, width
from ibprune.groups import Cut, Family, MaskAt

_ENCODER, _DECODER = "encoder.layers.*", "decoder.layers.*"


_SELF, _CROSS = (
    tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    for attention in ("self_attn", "encoder_attn")
)


def _residual(stack: str) -> tuple[Cut, ...]:
    return (
        *reads_and_writes(stack, _SELF, "self_attn.out_proj"),
        Cut(f"{stack}.self_attn_layer_norm", "out"),
        *reads_and_writes(stack, ("fc1",), "fc2"),
        Cut(f"{stack}.final_layer_norm", "out"),
    )


BART = Family(
    model_types=("bart",),
    blocks=_ENCODER,
    decoder_blocks=_DECODER,
    embedding="shared",
    output="/lm_head",
    attention="self_attn",
    context="self_attn.out_proj",
    cross_attention="encoder_attn",
    cross_context="encoder_attn.out_proj",
    config_keys={
        "hidden": "d_model",
        "encoder.heads": "encoder_attention_heads",
        "decoder.heads": "decoder_attention_heads",
        "encoder.ffn": "encoder_ffn_dim",
        "decoder.ffn": "decoder_ffn_dim",
    },
    ties=("hidden", "heads", "head"),
    uncut=(
        ("embedding_rank", "encoder, decoder and output each hold the embedding, which may be scaled"),
        ("vocab", "encoder, decoder and output each hold the embedding"),
    ),
    groups=(
        heads(_SELF, "self_attn.out_proj", unit="self_attn.head_dim"),
        heads(_CROSS, "encoder_attn.out_proj", unit="encoder_attn.head_dim", name="cross.heads", stack=_DECODER),
        # Post-norm: the LayerNorm after a removed sub-layer stays.
        sublayer(
            "attention_sublayer",
            cuts=(Cut("self_attn", "whole", stub="no_attention"),),
            mask_at=MaskAt("out", "self_attn.out_proj"),
        ),
        replace(
            sublayer(
                "cross.attention_sublayer",
                cuts=(Cut("encoder_attn", "whole", stub="no_attention"),),
                mask_at=MaskAt("out", "encoder_attn.out_proj"),
            ),
            stack=_DECODER,
        ),
        ffn(cuts=(Cut("fc1", "out"), Cut("fc2", "in")), mask_at=MaskAt("in", "fc2")),
        sublayer(
            "ffn_sublayer",
            cuts=(Cut("fc1", "whole", stub="zeros"), Cut("fc2", "whole", stub="zeros")),
            mask_at=MaskAt("out", "fc2"),
        ),
        width(
            "hidden",  # one width for both: the decoder reads the encoder's features, and they share the embedding
            cuts=(
                Cut("encoder.layernorm_embedding", "out"),
                Cut("decoder.layernorm_embedding", "out"),
                Cut("shared", "out"),
                Cut("encoder.embed_tokens", "out"),
                Cut("decoder.embed_tokens", "out"),
                Cut("encoder.embed_positions", "out"),
                Cut("decoder.embed_positions", "out"),
                *_residual(_ENCODER),
                *_residual(_DECODER),
                *reads_and_writes(_DECODER, _CROSS, "encoder_attn.out_proj"),
                Cut(f"{_DECODER}.encoder_attn_layer_norm", "out"),
                Cut("/lm_head", "in", optional=True),
                Cut("/classification_head.dense", "in", optional=True),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        tanh_head("/classification_head"),
    ),
)
