"""The row of DeBERTa-v2 and v3, whose attention adds products with relative positions."""

from ibprune.families.encoders import BERT
from ibprune.families.parts import embedding_rank, vocab, width
from ibprune.groups import Cut, Family, Group, MaskAt

_LAYERS = "encoder.layer.*"

DEBERTA_V2 = Family(
    model_types=("deberta-v2",),
    blocks=_LAYERS,
    embedding="embeddings.word_embeddings",
    output="/cls.predictions.decoder",
    attention="attention.self",
    context="attention.output.dense",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"},
    free=("/cls.predictions", "/cls.predictions.decoder"),  # vocabulary biases
    groups=(
        Group(
            "heads",
            kind="heads",
            unit="attention.self.attention_head_size",
            cuts=(
                Cut("attention.self.query_proj", "out"),
                Cut("attention.self.key_proj", "out"),
                Cut("attention.self.value_proj", "out"),
                # Relative positions have projections of their own, or share those of queries and keys.
                Cut("attention.self.pos_key_proj", "out", optional=True),
                Cut("attention.self.pos_query_proj", "out", optional=True),
                Cut("attention.output.dense", "in"),
            ),
            mask_at=MaskAt("in", "attention.output.dense"),
            sizes=("attention.self.num_attention_heads",),
        ),
        *(group for group in BERT.groups if group.per_block and group.kind != "heads"),
        width(
            "hidden",
            cuts=(
                Cut("embeddings.LayerNorm", "out"),
                Cut("embeddings.word_embeddings", "out"),
                Cut("embeddings.position_embeddings", "out", optional=True),
                Cut("embeddings.token_type_embeddings", "out", optional=True),
                # The table of relative positions is read through a norm; where it has none, the model is refused.
                Cut("encoder.rel_embeddings", "out", optional=True),
                Cut("encoder.LayerNorm", "out", needs="encoder.rel_embeddings"),
                Cut(f"{_LAYERS}.attention.self.query_proj", "in", optional=True),
                Cut(f"{_LAYERS}.attention.self.key_proj", "in", optional=True),
                Cut(f"{_LAYERS}.attention.self.value_proj", "in", optional=True),
                Cut(f"{_LAYERS}.attention.self.pos_key_proj", "in", optional=True),
                Cut(f"{_LAYERS}.attention.self.pos_query_proj", "in", optional=True),
                Cut(f"{_LAYERS}.attention.output.dense", "out"),
                Cut(f"{_LAYERS}.attention.output.LayerNorm", "out"),
                Cut(f"{_LAYERS}.intermediate.dense", "in", optional=True),
                Cut(f"{_LAYERS}.output.dense", "out"),
                Cut(f"{_LAYERS}.output.LayerNorm", "out"),
                Cut("encoder.conv.conv", "in", optional=True),
                Cut("encoder.conv.conv", "out", optional=True),
                Cut("encoder.conv.LayerNorm", "out", optional=True),
                # The transform feeds the output tied to the word embeddings: its features are the residual's.
                Cut("/cls.predictions.transform.dense", "in", optional=True),
                Cut("/cls.predictions.transform.dense", "out", optional=True),
                Cut("/cls.predictions.transform.LayerNorm", "out", optional=True),
                Cut("/cls.predictions.decoder", "in", optional=True),
                Cut("/pooler.dense", "in", optional=True),
                Cut("/classifier", "in", optional=True, without="/pooler"),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms", tables=True),
        ),
        width(
            "pooler",
            cuts=(
                Cut("/pooler.dense", "out", optional=True),
                Cut("/classifier", "in", optional=True, needs="/pooler"),
            ),
            mask_at=MaskAt("out", "/pooler.dense"),  # before the activation
        ),
        embedding_rank("embeddings.word_embeddings", "/cls.predictions.decoder"),
        vocab("embeddings.word_embeddings", "/cls.predictions.decoder", bias="/cls.predictions"),
    ),
)
