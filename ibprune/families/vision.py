"""Rows of vision transformers: ViT and DeiT, DINOv2, CLIP, BEiT, Swin."""

from dataclasses import replace

from ibprune.families.parts import ffn, heads, reads_and_writes, sublayer, width
from ibprune.groups import Cut, Family, MaskAt

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_HEADS = heads(_QKV, "attention.o_proj", unit="attention.head_dim")

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
    *reads_and_writes("layers.*", _QKV, "attention.o_proj"),
    Cut("layers.*.layernorm_after", "out", optional=True),
    *reads_and_writes("layers.*.mlp", ("fc1",), "fc2"),
)

_UNCUT = tuple((kind, "it reads patches, not tokens of a vocabulary") for kind in ("embedding_rank", "vocab"))

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

# Behind each sub-layer stands a scale per feature, which goes with it.
_DINOV2_BLOCKS = (
    _HEADS,
    sublayer(
        "attention_sublayer",
        cuts=(
            Cut("attention", "whole", stub="no_attention"),
            Cut("norm1", "whole", stub="identity"),
            Cut("layer_scale1", "whole", stub="identity"),
        ),
        mask_at=MaskAt("own", "layer_scale1"),
    ),
    ffn(
        cuts=(Cut("mlp.fc1", "out", optional=True), Cut("mlp.fc2", "in", optional=True)),
        mask_at=MaskAt("in", "mlp.fc2"),
    ),
    ffn(  # of the models with use_swiglu_ffn
        cuts=(
            Cut("mlp.gate_proj", "out", optional=True),
            Cut("mlp.up_proj", "out", optional=True),
            Cut("mlp.down_proj", "in", optional=True),
        ),
        mask_at=MaskAt("in", "mlp.down_proj"),
    ),
    sublayer(
        "ffn_sublayer",
        cuts=(
            Cut("mlp", "whole", stub="zeros"),
            Cut("norm2", "whole", stub="identity"),
            Cut("layer_scale2", "whole", stub="identity"),
        ),
        mask_at=MaskAt("own", "layer_scale2"),
    ),
)

DINOV2 = Family(
    model_types=("dinov2", "dinov2_with_registers"),
    blocks="encoder.layer.*",
    attention="attention",
    context="attention.o_proj",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads"},
    ties=("hidden", "ffn"),  # its config counts the FFN in whole multiples of the width
    uncut=_UNCUT,
    groups=(
        *_DINOV2_BLOCKS,
        width(
            "hidden",
            cuts=(
                Cut("layernorm", "out"),
                *_EMBEDDINGS_RESIDUAL,
                Cut("encoder.layer.*.norm1", "out", optional=True),
                *reads_and_writes("encoder.layer.*", _QKV, "attention.o_proj"),
                Cut("encoder.layer.*.layer_scale1", "own", optional=True),
                Cut("encoder.layer.*.norm2", "out", optional=True),
                *reads_and_writes("encoder.layer.*.mlp", ("fc1",), "fc2"),
                *reads_and_writes("encoder.layer.*.mlp", ("gate_proj", "up_proj"), "down_proj"),
                Cut("encoder.layer.*.layer_scale2", "own", optional=True),
                # It reads the first token beside the mean of the patches.
                Cut("/classifier", "in", optional=True, chunk=0, chunks=2),
                Cut("/classifier", "in", optional=True, chunk=1, chunks=2),
            ),
            mask_at=MaskAt("norms"),
        ),
    ),
)

_CLIP_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_CLIP_BLOCKS = (
    heads(_CLIP_QKV, "self_attn.out_proj", unit="self_attn.head_dim"),
    sublayer(
        "attention_sublayer",
        cuts=(Cut("self_attn", "whole", stub="no_attention"), Cut("layer_norm1", "whole", stub="identity")),
        mask_at=MaskAt("out", "self_attn.out_proj"),
    ),
    _FFN,
    sublayer(
        "ffn_sublayer",
        cuts=(Cut("mlp", "whole", stub="zeros"), Cut("layer_norm2", "whole", stub="identity")),
        mask_at=MaskAt("out", "mlp.fc2"),
    ),
)

_CLIP_RESIDUAL = (
    Cut("pre_layrnorm", "out"),
    Cut("post_layernorm", "out"),
    Cut("embeddings", "own"),
    Cut("embeddings.patch_embedding", "out"),
    Cut("embeddings.position_embedding", "out"),
    Cut("encoder.layers.*.layer_norm1", "out", optional=True),
    *reads_and_writes("encoder.layers.*", _CLIP_QKV, "self_attn.out_proj"),
    Cut("encoder.layers.*.layer_norm2", "out", optional=True),
    *reads_and_writes("encoder.layers.*.mlp", ("fc1",), "fc2"),
)

_CLIP_KEYS = {"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"}

CLIP_VISION = Family(
    model_types=("clip_vision_model",),
    blocks="encoder.layers.*",
    attention="self_attn",
    context="self_attn.out_proj",
    config_keys=_CLIP_KEYS,
    ties=("hidden", "heads"),
    uncut=_UNCUT,
    groups=(
        *_CLIP_BLOCKS,
        width(
            "hidden",
            cuts=(*_CLIP_RESIDUAL, Cut("/visual_projection", "in", optional=True)),
            mask_at=MaskAt("norms"),
        ),
    ),
)

# A classifier on the vision tower, in the config of both towers.
CLIP = Family(
    model_types=("clip",),
    blocks="vision_model.encoder.layers.*",
    attention="self_attn",
    context="self_attn.out_proj",
    config_keys=_CLIP_KEYS,
    sizes_in="vision_config",
    ties=("hidden", "heads"),
    uncut=_UNCUT,
    groups=(
        *_CLIP_BLOCKS,
        width(
            "hidden",
            cuts=(
                *(replace(cut, path=f"vision_model.{cut.path}") for cut in _CLIP_RESIDUAL),
                Cut("classifier", "in", optional=True),
            ),
            mask_at=MaskAt("norms", "classifier"),  # it reads the residual stream itself
        ),
    ),
)

# The scales behind a removed sub-layer, held by the block itself, stay without effect.
_BEIT_HEADS = (*_HEADS.cuts, Cut("relative_position_bias", "own", optional=True))

BEIT = Family(
    model_types=("beit",),
    blocks="layers.*",
    attention="attention",
    context="attention.o_proj",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"},
    free=("shared_position_bias",),
    uncut=_UNCUT,
    groups=(
        # One table of positions for all blocks, with a column per head, would tie their heads together.
        replace(_HEADS, cuts=tuple(replace(cut, without="shared_position_bias") for cut in _BEIT_HEADS)),
        replace(
            _ATTENTION_SUBLAYER,
            cuts=(
                *_ATTENTION_SUBLAYER.cuts,
                Cut("relative_position_bias", "whole", stub="no_bias", optional=True),
            ),
        ),
        _FFN,
        _FFN_SUBLAYER,
        width(
            "hidden",
            cuts=(
                *_EMBEDDINGS_RESIDUAL,
                *_BLOCKS_RESIDUAL,
                Cut("layers.*", "own", optional=True),
                Cut("layernorm", "out", optional=True),
                Cut("pooler.layernorm", "out", optional=True),
                Cut("/classifier", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
    ),
)

# The attention of a window sees one of the image's windows as a row of the batch.
SWIN = Family(
    model_types=("swin",),
    blocks="encoder.layers.*.blocks.*",
    attention="attention",
    context="attention.o_proj",
    config_keys={},
    ties=("ffn",),
    ratio_key="mlp_ratio",
    free=(
        "embeddings",
        "embeddings.patch_embeddings.projection",
        "embeddings.norm",
        "encoder.layers.*.blocks.*.layernorm_before",
        "encoder.layers.*.blocks.*.layernorm_after",
        "encoder.layers.*.downsample.norm",
        "encoder.layers.*.downsample.reduction",
        "layernorm",
        "/classifier",
    ),
    uncut=(
        *_UNCUT,
        ("hidden", "every stage has a width of its own, and the norm between two sees four positions of it at once"),
    ),
    groups=(
        replace(
            _HEADS,
            cuts=(*_HEADS.cuts, Cut("attention.relative_position_bias", "own")),
            mask_at=replace(_HEADS.mask_at, flattened=True),
        ),
        replace(_ATTENTION_SUBLAYER, mask_at=replace(_ATTENTION_SUBLAYER.mask_at, flattened=True)),
        _FFN,
        _FFN_SUBLAYER,
    ),
)
