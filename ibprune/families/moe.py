"""Rows of the mixture-of-experts decoders: Mixtral and Qwen3-MoE."""

from dataclasses import replace

from ibprune.families.decoders import LLAMA
from ibprune.families.parts import ffn, sublayer
from ibprune.groups import Cut, Group, MaskAt

_LLAMA = {group.name: group for group in LLAMA.groups}

# One unit is an expert: its slices of the stacked weights and its row of the router.
_EXPERTS = Group(
    "experts",
    kind="experts",
    cuts=(
        Cut("mlp.experts", "gate_up_proj.0", needs="mlp.experts"),
        Cut("mlp.experts", "down_proj.0", needs="mlp.experts"),
        Cut("mlp.gate", "weight.0", needs="mlp.experts"),
    ),
    mask_at=MaskAt("router", "mlp.gate", into=Cut("mlp.experts", "down_proj.0")),
    floor="mlp.gate.top_k",
    sizes=("mlp.experts.num_experts", "mlp.gate.num_experts", "/num_experts"),
)

# Stacked weights have one inner width: a unit is the feature of that number in every expert of the layer.
_EXPERT_FFN = replace(
    ffn(
        cuts=(
            Cut("mlp.experts", "down_proj.2", needs="mlp.experts"),
            Cut("mlp.experts", "gate_up_proj.1", needs="mlp.experts", chunk=0, chunks=2),
            Cut("mlp.experts", "gate_up_proj.1", needs="mlp.experts", chunk=1, chunks=2),
        ),
        mask_at=MaskAt("out", "mlp.experts.act_fn", into=Cut("mlp.experts", "down_proj.2"), mixed=True),
    ),
    name="expert_ffn",
    sizes=("mlp.experts.intermediate_dim",),
)

_EXPERTS_SUBLAYER = sublayer(
    "ffn_sublayer",
    cuts=(
        Cut("mlp", "whole", stub="zeros", needs="mlp.experts"),
        Cut("post_attention_layernorm", "whole", stub="identity", needs="mlp.experts"),
    ),
    mask_at=MaskAt("out", "mlp", into=Cut("mlp.experts", "down_proj.1")),
)

_HIDDEN = replace(
    _LLAMA["hidden"],
    cuts=(
        *_LLAMA["hidden"].cuts,
        Cut("layers.*.mlp.gate", "weight.1", optional=True),
        Cut("layers.*.mlp.experts", "gate_up_proj.2", optional=True),
        Cut("layers.*.mlp.experts", "down_proj.1", optional=True),
    ),
    sizes=("layers.*.mlp.gate.hidden_dim", "layers.*.mlp.experts.hidden_dim"),
)

MIXTRAL = replace(
    LLAMA,
    model_types=("mixtral",),
    router="mlp.gate",
    experts="mlp.experts",
    config_keys={
        "hidden": "hidden_size",
        "kv_groups": "num_key_value_heads",
        "experts": "num_local_experts",
        "expert_ffn": "intermediate_size",
    },
    divided=False,
    per_layer=(),
    free=(),
    groups=(
        _LLAMA["kv_groups"],
        _LLAMA["attention_sublayer"],
        _EXPERTS,
        _EXPERT_FFN,
        _EXPERTS_SUBLAYER,
        _HIDDEN,
        _LLAMA["embedding_rank"],
        _LLAMA["vocab"],
    ),
)


def _where_dense(group: Group) -> Group:
    """The group in those layers that have one FFN for all tokens."""
    return replace(group, cuts=tuple(replace(cut, needs="mlp.down_proj") for cut in group.cuts))


QWEN3_MOE = replace(
    MIXTRAL,
    model_types=("qwen3_moe",),
    config_keys=LLAMA.config_keys | {"experts": "num_experts", "expert_ffn": "moe_intermediate_size"},
    free=LLAMA.free,  # norms on the features of each head
    groups=(*MIXTRAL.groups, _where_dense(_LLAMA["ffn"]), _where_dense(_LLAMA["ffn_sublayer"])),
)
