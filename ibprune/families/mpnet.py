"""The row of MPNet."""

from ibprune.families.parts import embedding_rank, ffn, sublayer, vocab, width
from ibprune.groups import Cut, Family, MaskAt

MPNET = Family(
    model_types=("mpnet",),
    blocks="encoder.layer.*",
    embedding="embeddings.word_embeddings",
    output="/lm_head.decoder",
    attention="attention.attn",
    context="attention.attn.o",
    config_keys={"hidden": "hidden_size", "ffn": "intermediate_size"},
    reserved_positions=2,  # positions count from the padding's index + 1
    free=("encoder.relative_attention_bias",),
    uncut=(("heads", "one table of relative positions, with a column per head, serves all layers"),),
    groups=(
        # Post-norm: the LayerNorm after a removed sub-layer stays.
        sublayer(
            "attention_sublayer",
            cuts=(Cut("attention.attn", "whole", stub="no_attention"),),
            mask_at=MaskAt("out", "attention.attn.o"),
        ),
        ffn(
            cuts=(Cut("intermediate.dense", "out"), Cut("output.dense", "in")),
            mask_at=MaskAt("in", "output.dense"),
        ),
        sublayer(
            "ffn_sublayer",
            cuts=(Cut("intermediate", "whole", stub="zeros"), Cut("output.dense", "whole", stub="identity")),
            mask_at=MaskAt("out", "output.dense"),
        ),
        width(
            "hidden",
            cuts=(
                Cut("embeddings.LayerNorm", "out"),
                Cut("embeddings.word_embeddings", "out"),
                Cut("embeddings.position_embeddings", "out"),
                Cut("encoder.layer.*.attention.attn.q", "in", optional=True),
                Cut("encoder.layer.*.attention.attn.k", "in", optional=True),
                Cut("encoder.layer.*.attention.attn.v", "in", optional=True),
                Cut("encoder.layer.*.attention.attn.o", "out", optional=True),
                Cut("encoder.layer.*.attention.LayerNorm", "out"),
                Cut("encoder.layer.*.intermediate.dense", "in", optional=True),
                Cut("encoder.layer.*.output.dense", "out"),
                Cut("encoder.layer.*.output.LayerNorm", "out"),
                Cut("pooler.dense", "in", optional=True),
                # The transform feeds the output tied to the word embeddings: its features are the residual's.
                Cut("/lm_head.dense", "in", optional=True),
                Cut("/lm_head.dense", "out", optional=True),
                Cut("/lm_head.layer_norm", "out", optional=True),
                Cut("/lm_head.decoder", "in", optional=True),
                Cut("/classifier.dense", "in", optional=True),
                Cut("/classifier", "in", optional=True),  # of tokens: a plain linear layer
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        width(
            "pooler",
            cuts=(Cut("pooler.dense", "out", optional=True),),
            mask_at=MaskAt("out", "pooler.dense"),
        ),
        width(
            "head",
            cuts=(Cut("/classifier.dense", "out", optional=True), Cut("/classifier.out_proj", "in", optional=True)),
            mask_at=MaskAt("out", "/classifier.dense"),  # before the tanh
        ),
        embedding_rank("embeddings.word_embeddings", "/lm_head.decoder"),
        vocab("embeddings.word_embeddings", "/lm_head.decoder", bias="/lm_head"),
    ),
)
