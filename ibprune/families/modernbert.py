"""The row of ModernBERT."""

from ibprune.families.parts import embedding_rank, ffn, reads_and_writes, sublayer, vocab, width
from ibprune.groups import Cut, Family, Group, MaskAt

MODERNBERT = Family(
    model_types=("modernbert",),
    blocks="layers.*",
    embedding="embeddings.tok_embeddings",
    output="/decoder",
    attention="attn",
    context="attn.Wo",
    config_keys={"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"},
    ties=("hidden", "heads", "head"),
    per_layer=("layer_types",),
    groups=(
        Group(
            "heads",
            kind="heads",
            unit="attn.head_dim",
            cuts=(
                Cut("attn.Wo", "in"),
                Cut("attn.Wqkv", "out", chunk=0, chunks=3),
                Cut("attn.Wqkv", "out", chunk=1, chunks=3),
                Cut("attn.Wqkv", "out", chunk=2, chunks=3),
            ),
            mask_at=MaskAt("in", "attn.Wo"),
        ),
        sublayer(
            "attention_sublayer",
            # The first block reads the normed embeddings: its norm is an identity.
            cuts=(Cut("attn", "whole", stub="no_attention"), Cut("attn_norm", "whole", stub="identity")),
            mask_at=MaskAt("out", "attn.Wo"),
        ),
        ffn(
            cuts=(
                Cut("mlp.Wo", "in"),
                Cut("mlp.Wi", "out", chunk=0, chunks=2),
                Cut("mlp.Wi", "out", chunk=1, chunks=2),
            ),
            mask_at=MaskAt("in", "mlp.Wo"),
        ),
        sublayer(
            "ffn_sublayer",
            cuts=(Cut("mlp", "whole", stub="zeros"), Cut("mlp_norm", "whole", stub="identity")),
            mask_at=MaskAt("out", "mlp.Wo"),
        ),
        width(
            "hidden",
            cuts=(
                Cut("final_norm", "out"),
                Cut("embeddings.norm", "out"),
                Cut("embeddings.tok_embeddings", "out"),
                Cut("layers.*.attn_norm", "out", optional=True),
                *reads_and_writes("layers.*.attn", ("Wqkv",), "Wo"),
                Cut("layers.*.mlp_norm", "out", optional=True),
                *reads_and_writes("layers.*.mlp", ("Wi",), "Wo"),
                Cut("/head.dense", "in", optional=True),
                # Before an output tied to the embeddings, the head's features are the residual's.
                Cut("/head.dense", "out", optional=True, needs="/decoder"),
                Cut("/head.norm", "out", optional=True, needs="/decoder"),
                Cut("/decoder", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        width(
            "head",
            cuts=(
                Cut("/head.norm", "out", optional=True, without="/decoder"),
                Cut("/head.dense", "out", optional=True, without="/decoder"),
                Cut("/classifier", "in", optional=True),
            ),
            mask_at=MaskAt("norms"),
        ),
        embedding_rank("embeddings.tok_embeddings", "/decoder"),
        vocab("embeddings.tok_embeddings", "/decoder"),
    ),
)
