"""The row of MPNet."""

from ibprune.families.parts import embedding_rank, ffn, reads_and_writes, sublayer, tanh_head, vocab, width
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
                *reads_and_writes("encoder.layer.*.attention.attn", ("q", "k", "v"), "o"),
                Cut("encoder.layer.*.attention.LayerNorm", "out"),
                *reads_and_writes("encoder.layer.*", ("intermediate.dense",), "output.dense", stays=True),
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
        tanh_head("/classifier"),
        embedding_rank("embeddings.word_embeddings", "/lm_head.decoder"),
        vocab("embeddings.word_embeddings", "/lm_head.decoder", bias="/lm_head"),
    ),
)
