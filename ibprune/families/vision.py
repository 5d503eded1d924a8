"""Rows of ViT and DeiT."""

from ibprune.families.parts import ffn, sublayer, width
from ibprune.groups import Cut, Family, Group, MaskAt

_HEADS = Group(
    "heads",
    kind="heads",
    unit="attention.head_dim",
    cuts=(
        Cut("attention.o_proj", "in"),
        Cut("attention.q_proj", "out"),
        Cut("attention.k_proj", "out"),
        Cut("attention.v_proj", "out"),
    ),
    mask_at=MaskAt("in", "attention.o_proj"),
)

_FFN = ffn(cuts=(Cut("mlp.fc1", "out"), Cut("mlp.fc2", "in")), mask_at=MaskAt("in", "mlp.fc2"))

_ATTENTION_SUBLAYER = sublayer(
    "attention_sublayer",
    cuts=(Cut("attention", "whole", stub="no_attention"), Cut("layernorm_before", "whole", stub="identity")),
    mask_at=MaskAt("out", "attention.o_proj"),
)

_FFN_SUBLAYER = sublayer(
    "ffn_sublayer",
    cuts=(Cut("mlp", "whole", stub="zeros"), Cut("layernorm_after", "whole", stub="identity")),
    mask_at=MaskAt("out", "mlp.fc2"),
)

# Tokens and positions are tensors that `embeddings` holds itself.
_EMBEDDINGS_RESIDUAL = (Cut("embeddings.patch_embeddings.projection", "out"), Cut("embeddings", "own"))

_BLOCKS_RESIDUAL = (
    Cut("layers.*.layernorm_before", "out", optional=True),
    Cut("layers.*.attention.q_proj", "in", optional=True),
    Cut("layers.*.attention.k_proj", "in", optional=True),
    Cut("layers.*.attention.v_proj", "in", optional=True),
    Cut("layers.*.attention.o_proj", "out", optional=True),
    Cut("layers.*.layernorm_after", "out", optional=True),
    Cut("layers.*.mlp.fc1", "in", optional=True),
    Cut("layers.*.mlp.fc2", "out", optional=True),
)

_UNCUT = (("embedding_rank", "it reads patches, not tokens of a vocabulary"),)

VIT = Family(
    model_types=("vit", "deit"),
    blocks="layers.*",
    attention="attention",
    context="attention.o_proj",
    config_keys={
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "pooler": "pooler_output_size",
    },
    uncut=_UNCUT,
    groups=(
        _HEADS,
        _ATTENTION_SUBLAYER,
        _FFN,
        _FFN_SUBLAYER,
        width(
            "hidden",
            cuts=(
                Cut("layernorm", "out"),
                *_EMBEDDINGS_RESIDUAL,
                *_BLOCKS_RESIDUAL,
                Cut("pooler.dense", "in", optional=True),
                Cut("/classifier", "in", optional=True),
                Cut("/cls_classifier", "in", optional=True),
                Cut("/distillation_classifier", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        width(
            "pooler",
            cuts=(Cut("pooler.dense", "out", optional=True),),
            mask_at=MaskAt("out", "pooler.dense"),
        ),
    ),
)
