"""Rows of the encoder families."""

from ibprune.groups import Cut, Family, Group, MaskAt

BERT = Family(
    model_types=("bert",),
    blocks="encoder.layer.*",
    embedding="embeddings.word_embeddings",
    output="/cls.predictions.decoder",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"},
    free=("/cls.predictions", "/cls.predictions.decoder"),  # vocabulary biases
    groups=(
        Group(
            "heads",
            kind="heads",
            unit="attention.self.attention_head_size",
            cuts=(
                Cut("attention.self.query", "out"),
                Cut("attention.self.key", "out"),
                Cut("attention.self.value", "out"),
                Cut("attention.output.dense", "in"),
            ),
            mask_at=MaskAt("in", "attention.output.dense"),
        ),
        # Post-norm: the LayerNorm after a removed sub-layer stays, as it does while its mask nears zero.
        Group(
            "attention_sublayer",
            kind="layers",
            min_units=0,
            cuts=(
                Cut("attention.self", "whole", stub="no_attention"),
                Cut("attention.output.dense", "whole", stub="identity"),
            ),
            mask_at=MaskAt("out", "attention.output.dense"),
        ),
        Group(
            "ffn",
            kind="ffn",
            cuts=(Cut("intermediate.dense", "out"), Cut("output.dense", "in")),
            mask_at=MaskAt("in", "output.dense"),
        ),
        Group(
            "ffn_sublayer",
            kind="layers",
            min_units=0,
            cuts=(Cut("intermediate", "whole", stub="zeros"), Cut("output.dense", "whole", stub="identity")),
            mask_at=MaskAt("out", "output.dense"),
        ),
        Group(
            "hidden",
            kind="hidden",
            per_block=False,
            cuts=(
                Cut("embeddings.LayerNorm", "out"),
                Cut("embeddings.word_embeddings", "out"),
                Cut("embeddings.position_embeddings", "out"),
                Cut("embeddings.token_type_embeddings", "out"),
                Cut("encoder.layer.*.attention.self.query", "in", optional=True),
                Cut("encoder.layer.*.attention.self.key", "in", optional=True),
                Cut("encoder.layer.*.attention.self.value", "in", optional=True),
                Cut("encoder.layer.*.attention.output.dense", "out"),
                Cut("encoder.layer.*.attention.output.LayerNorm", "out"),
                Cut("encoder.layer.*.intermediate.dense", "in", optional=True),
                Cut("encoder.layer.*.output.dense", "out"),
                Cut("encoder.layer.*.output.LayerNorm", "out"),
                Cut("pooler.dense", "in", optional=True),
                Cut("/cls.predictions.transform.dense", "in", optional=True),
                # The transform feeds the output tied to the word embeddings: its features are the residual's.
                Cut("/cls.predictions.transform.dense", "out", optional=True),
                Cut("/cls.predictions.transform.LayerNorm", "out", optional=True),
                Cut("/cls.predictions.decoder", "in", optional=True),
                Cut("/classifier", "in", optional=True, without="pooler"),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        Group(
            "pooler",
            kind="hidden",
            per_block=False,
            cuts=(
                Cut("pooler.dense", "out", optional=True),
                Cut("/classifier", "in", optional=True, needs="pooler"),
                Cut("/cls.seq_relationship", "in", optional=True),
            ),
            mask_at=MaskAt("out", "pooler.dense"),  # before the tanh, and tanh(0) = 0
        ),
        Group(
            "embedding_rank",
            kind="embedding_rank",
            per_block=False,
            cuts=(Cut("embeddings.word_embeddings", "rank"), Cut("/cls.predictions.decoder", "rank", optional=True)),
            mask_at=MaskAt("rank", "embeddings.word_embeddings"),
        ),
    ),
)
