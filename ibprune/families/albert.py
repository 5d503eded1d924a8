"""The row of ALBERT, whose blocks share their weights between layers."""

from ibprune.families.parts import ffn, heads, vocab, width
from ibprune.groups import Cut, Family, Group, MaskAt

_BLOCKS = "encoder.albert_layer_groups.*.albert_layers.*"

_QKV = ("attention.query", "attention.key", "attention.value")

ALBERT = Family(
    model_types=("albert",),
    blocks=_BLOCKS,
    embedding="embeddings.word_embeddings",
    output="/predictions.decoder",
    attention="attention",
    context="attention.dense",
    config_keys={
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "embedding_rank": "embedding_size",
    },
    ties=("hidden", "heads", "pooler"),
    free=("/predictions", "/predictions.decoder"),  # vocabulary biases
    uncut=(("layers", "its layers are the same few blocks run again and again, so that no single one can go"),),
    groups=(
        heads(_QKV, "attention.dense", unit="attention.attention_head_size"),
        ffn(
            cuts=(Cut("ffn", "out"), Cut("ffn_output", "in")),
            mask_at=MaskAt("in", "ffn_output"),
        ),
        width(
            "hidden",
            cuts=(
                Cut("encoder.embedding_hidden_mapping_in", "out"),
                Cut(f"{_BLOCKS}.attention.query", "in"),
                Cut(f"{_BLOCKS}.attention.key", "in"),
                Cut(f"{_BLOCKS}.attention.value", "in"),
                Cut(f"{_BLOCKS}.attention.dense", "out"),
                Cut(f"{_BLOCKS}.attention.LayerNorm", "out"),
                Cut(f"{_BLOCKS}.ffn", "in"),
                Cut(f"{_BLOCKS}.ffn_output", "out"),
                Cut(f"{_BLOCKS}.full_layer_layer_norm", "out"),
                Cut("pooler", "in", optional=True),
                Cut("/predictions.dense", "in", optional=True),
                Cut("/classifier", "in", optional=True, without="pooler"),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms", "encoder.embedding_hidden_mapping_in"),  # the first block reads it without a norm
        ),
        width(
            "pooler",
            cuts=(
                Cut("pooler", "out", optional=True),
                Cut("/classifier", "in", optional=True, needs="pooler"),
                Cut("/sop_classifier.classifier", "in", optional=True),
            ),
            mask_at=MaskAt("out", "pooler"),  # before the tanh, and tanh(0) = 0
        ),
        # The dense model has narrow embeddings and the matrix that widens them: the rank is their width.
        Group(
            "embedding_rank",
            kind="embedding_rank",
            cuts=(
                Cut("embeddings.LayerNorm", "out"),
                Cut("embeddings.word_embeddings", "out"),
                Cut("embeddings.position_embeddings", "out"),
                Cut("embeddings.token_type_embeddings", "out"),
                Cut("encoder.embedding_hidden_mapping_in", "in"),
                Cut("/predictions.dense", "out", optional=True),
                Cut("/predictions.LayerNorm", "out", optional=True),
                Cut("/predictions.decoder", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
            per_block=False,
        ),
        vocab("embeddings.word_embeddings", "/predictions.decoder", bias="/predictions"),
    ),
)
