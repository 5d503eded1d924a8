"""The row of DeBERTa-v2 and v3, whose attention adds products with relative positions."""

from ibprune.families.encoders import BERT
from ibprune.families.parts import embedding_rank, heads, reads_and_writes, vocab, width
from ibprune.groups import Cut, Family, MaskAt

_LAYERS = "encoder.layer.*"

_QKV = ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj")
# Relative positions have projections of their own, or share those of queries and keys.
_POSITIONS = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")

DEBERTA_V2 = Family(
    model_types=("deberta-v2",),
    blocks=_LAYERS,
    embedding="embeddings.word_embeddings",
    output="/cls.predictions.decoder",
    attention="attention.self",
    context="attention.output.dense",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"},
    ties=("hidden", "heads", "pooler"),
    follows=(("pooler_hidden_size", "hidden_size"),),
    free=("/cls.predictions", "/cls.predictions.decoder"),  # vocabulary biases
    groups=(
        heads(
            _QKV,
            "attention.output.dense",
            unit="attention.self.attention_head_size",
            more=tuple(Cut(path, "out", optional=True) for path in _POSITIONS),
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
                *reads_and_writes(_LAYERS, (*_QKV, *_POSITIONS), "attention.output.dense", stays=True),
                Cut(f"{_LAYERS}.attention.output.LayerNorm", "out"),
                *reads_and_writes(_LAYERS, ("intermediate.dense",), "output.dense", stays=True),
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
