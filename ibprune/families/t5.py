"""The row of T5: encoder-decoders, and its encoder alone."""

from dataclasses import replace

from ibprune.families.parts import ffn, reads_and_writes, sublayer, tanh_head, width
from ibprune.groups import Cut, Family, Group, MaskAt

_ENCODER, _DECODER = "encoder.block.*", "decoder.block.*"
_SELF, _CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_BIAS = f"{_SELF}.relative_attention_bias"


def _heads(name: str, attention: str, *first: Cut, unit: str = "", sizes: tuple[str, ...] = ()) -> Group:
    """Heads of all blocks of a stack together: each has a column in a table of position biases that all blocks read."""
    return Group(
        name,
        kind="heads",
        unit=unit,
        cuts=(
            *first,
            Cut(f"{attention}.o", "in", optional=True),
            Cut(f"{attention}.q", "out", optional=True),
            Cut(f"{attention}.k", "out", optional=True),
            Cut(f"{attention}.v", "out", optional=True),
        ),
        mask_at=MaskAt("consumers"),
        per_block=False,
        sizes=sizes,
    )


def _ffn(layer: str, stack: str) -> tuple[Group, Group]:
    dense = f"{layer}.DenseReluDense"
    inner = ffn(
        cuts=(
            Cut(f"{dense}.wo", "in"),
            Cut(f"{dense}.wi", "out", optional=True),
            Cut(f"{dense}.wi_0", "out", optional=True),  # with a gate
            Cut(f"{dense}.wi_1", "out", optional=True),
        ),
        mask_at=MaskAt("in", f"{dense}.wo"),
    )
    whole = sublayer(
        "ffn_sublayer",
        cuts=(Cut(dense, "whole", stub="zeros"), Cut(f"{layer}.layer_norm", "whole", stub="identity")),
        mask_at=MaskAt("out", f"{dense}.wo"),
    )
    return replace(inner, stack=stack), replace(whole, stack=stack)


def _residual(stack: str, ffn_layer: str) -> tuple[Cut, ...]:
    return (
        *reads_and_writes(f"{stack}.{_SELF}", ("q", "k", "v"), "o"),
        Cut(f"{stack}.layer.*.layer_norm", "out", optional=True),
        *reads_and_writes(f"{stack}.{ffn_layer}.DenseReluDense", ("wi", "wi_0", "wi_1"), "wo"),
    )


T5 = Family(
    model_types=("t5",),
    blocks=_ENCODER,
    decoder_blocks=_DECODER,
    embedding="shared",
    output="/lm_head",
    attention=_SELF,
    context=f"{_SELF}.o",
    cross_attention=_CROSS,
    cross_context=f"{_CROSS}.o",
    config_keys={"hidden": "d_model", "heads": "num_heads", "ffn": "d_ff"},
    ties=("hidden", "head"),
    scales=("model_dim",),  # before a tied output the states are divided by its root
    uncut=tuple((kind, "encoder, decoder and output each hold the embedding") for kind in ("embedding_rank", "vocab")),
    groups=(
        _heads("encoder.heads", f"{_ENCODER}.{_SELF}", Cut(f"encoder.block.0.{_BIAS}", "out")),
        _heads("decoder.heads", f"{_DECODER}.{_SELF}", Cut(f"decoder.block.0.{_BIAS}", "out", optional=True)),
        _heads(
            "decoder.cross.heads",
            f"{_DECODER}.{_CROSS}",
            unit=f"decoder.block.0.{_SELF}.key_value_proj_dim",
            sizes=(f"{_DECODER}.{_CROSS}.n_heads",),  # of the zeros that the first makes as the bias of all
        ),
        sublayer(
            "attention_sublayer",
            cuts=(  # the first block's, which makes the bias of all, stays
                Cut(_SELF, "whole", stub="no_biased_attention", without=_BIAS),
                Cut("layer.0.layer_norm", "whole", stub="identity", without=_BIAS),
            ),
            mask_at=MaskAt("out", f"{_SELF}.o"),
        ),
        replace(
            sublayer(
                "cross.attention_sublayer",
                cuts=(
                    Cut(_CROSS, "whole", stub="no_biased_attention"),
                    Cut("layer.1.layer_norm", "whole", stub="identity"),
                ),
                mask_at=MaskAt("out", f"{_CROSS}.o"),
            ),
            stack=_DECODER,
        ),
        *_ffn("layer.1", _ENCODER),
        *_ffn("layer.2", _DECODER),
        width(
            "hidden",  # one width for both: the decoder reads the encoder's features, and they share the embedding
            cuts=(
                Cut("encoder.final_layer_norm", "out"),
                Cut("decoder.final_layer_norm", "out", optional=True),
                Cut("shared", "out"),
                Cut("encoder.embed_tokens", "out"),
                Cut("decoder.embed_tokens", "out", optional=True),
                *_residual(_ENCODER, "layer.1"),
                *_residual(_DECODER, "layer.2"),
                *reads_and_writes(f"{_DECODER}.{_CROSS}", ("q", "k", "v"), "o"),
                Cut("/lm_head", "in", optional=True),
                Cut("/classification_head.dense", "in", optional=True),
                Cut("/classifier", "in", optional=True),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        tanh_head("/classification_head"),
    ),
)
