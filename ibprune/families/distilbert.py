"""The row of DistilBERT."""

from ibprune.families.parts import embedding_rank, ffn, heads, reads_and_writes, sublayer, vocab, width
from ibprune.groups import Cut, Family, MaskAt

_QKV = ("attention.q_lin", "attention.k_lin", "attention.v_lin")

DISTILBERT = Family(
    model_types=("distilbert",),
    blocks="transformer.layer.*",
    embedding="embeddings.word_embeddings",
    output="/vocab_projector",
    attention="attention",
    context="attention.out_lin",
    config_keys={"hidden": "dim", "heads": "n_heads", "ffn": "hidden_dim"},
    ties=("hidden", "heads", "head"),
    groups=(
        heads(_QKV, "attention.out_lin", unit="attention.attention_head_size"),
        # Post-norm: the LayerNorm after a removed sub-layer stays.
        sublayer(
            "attention_sublayer",
            cuts=(Cut("attention", "whole", stub="no_attention"),),
            mask_at=MaskAt("out", "attention.out_lin"),
        ),
        ffn(
            cuts=(Cut("ffn.lin1", "out"), Cut("ffn.lin2", "in")),
            mask_at=MaskAt("in", "ffn.lin2"),
        ),
        sublayer(
            "ffn_sublayer",
            cuts=(Cut("ffn", "whole", stub="zeros"),),
            mask_at=MaskAt("out", "ffn.lin2"),
        ),
        width(
            "hidden",
            cuts=(
                Cut("embeddings.LayerNorm", "out"),
                Cut("embeddings.word_embeddings", "out"),
                Cut("embeddings.position_embeddings", "out"),
                *reads_and_writes("transformer.layer.*", _QKV, "attention.out_lin"),
                Cut("transformer.layer.*.sa_layer_norm", "out"),
                *reads_and_writes("transformer.layer.*", ("ffn.lin1",), "ffn.lin2"),
                Cut("transformer.layer.*.output_layer_norm", "out"),
                # The transform feeds the output tied to the word embeddings: its features are the residual's.
                Cut("/vocab_transform", "in", optional=True),
                Cut("/vocab_transform", "out", optional=True),
                Cut("/vocab_layer_norm", "out", optional=True),
                Cut("/vocab_projector", "in", optional=True),
                Cut("/pre_classifier", "in", optional=True),
                Cut("/classifier", "in", optional=True, without="/pre_classifier"),
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        width(
            "head",
            cuts=(
                Cut("/pre_classifier", "out", optional=True),
                Cut("/classifier", "in", optional=True, needs="/pre_classifier"),
            ),
            mask_at=MaskAt("out", "/pre_classifier"),  # before the ReLU
        ),
        embedding_rank("embeddings.word_embeddings", "/vocab_projector"),
        vocab("embeddings.word_embeddings", "/vocab_projector"),
    ),
)
