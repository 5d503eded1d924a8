"""The row of BART, an encoder-decoder with norms after the sub-layers."""

from dataclasses import replace

from ibprune.families.parts import ffn, sublayer, width
from ibprune.groups import Cut, Family, Group, MaskAt

_ENCODER, _DECODER = "encoder.layers.*", "decoder.layers.*"


def _heads(name: str, attention: str, stack: str = "") -> Group:
    return Group(
        name,
        kind="heads",
        unit=f"{attention}.head_dim",
        cuts=(
            Cut(f"{attention}.q_proj", "out"),
            Cut(f"{attention}.k_proj", "out"),
            Cut(f"{attention}.v_proj", "out"),
            Cut(f"{attention}.out_proj", "in"),
        ),
        mask_at=MaskAt("in", f"{attention}.out_proj"),
        stack=stack,
    )


def _residual(attention: str) -> tuple[Cut, ...]:
    return (
        Cut(f"{attention}.q_proj", "in", optional=True),
        Cut(f"{attention}.k_proj", "in", optional=True),
        Cut(f"{attention}.v_proj", "in", optional=True),
        Cut(f"{attention}.out_proj", "out", optional=True),
        Cut(f"{attention}_layer_norm", "out"),
    )


def _ffn_residual(stack: str) -> tuple[Cut, ...]:
    return (
        Cut(f"{stack}.fc1", "in", optional=True),
        Cut(f"{stack}.fc2", "out", optional=True),
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
    uncut=(
        ("embedding_rank", "encoder, decoder and output each hold the embedding, which may be scaled"),
        ("vocab", "encoder, decoder and output each hold the embedding"),
    ),
    groups=(
        _heads("heads", "self_attn"),
        _heads("cross.heads", "encoder_attn", _DECODER),
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
                *_residual(f"{_ENCODER}.self_attn"),
                *_ffn_residual(_ENCODER),
                *_residual(f"{_DECODER}.self_attn"),
                *_residual(f"{_DECODER}.encoder_attn"),
                *_ffn_residual(_DECODER),
                Cut("/lm_head", "in", optional=True),
                Cut("/classification_head.dense", "in", optional=True),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        width(
            "head",
            cuts=(
                Cut("/classification_head.dense", "out", optional=True),
                Cut("/classification_head.out_proj", "in", optional=True),
            ),
            mask_at=MaskAt("out", "/classification_head.dense"),  # before the tanh
        ),
    ),
)
