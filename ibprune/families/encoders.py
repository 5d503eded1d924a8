"""Rows of BERT and the encoders that share its blocks: RoBERTa and ELECTRA."""

from ibprune.families.parts import embedding_rank, ffn, heads, reads_and_writes, sublayer, tanh_head, vocab, width
from ibprune.groups import Cut, Family, MaskAt

_CONFIG_KEYS = {"hidden": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"}

_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")

_BLOCKS = (
    heads(_QKV, "attention.output.dense", unit="attention.self.attention_head_size"),
    # Post-norm: the LayerNorm after a removed sub-layer stays, as it does while its mask nears zero.
    sublayer(
        "attention_sublayer",
        cuts=(
            Cut("attention.self", "whole", stub="no_attention"),
            Cut("attention.output.dense", "whole", stub="identity"),
        ),
        mask_at=MaskAt("out", "attention.output.dense"),
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
)

_BLOCKS_RESIDUAL = (
    *reads_and_writes("encoder.layer.*", _QKV, "attention.output.dense", stays=True),
    Cut("encoder.layer.*.attention.output.LayerNorm", "out"),
    *reads_and_writes("encoder.layer.*", ("intermediate.dense",), "output.dense", stays=True),
    Cut("encoder.layer.*.output.LayerNorm", "out"),
)

_EMBEDDINGS_RESIDUAL = (
    Cut("embeddings.LayerNorm", "out"),
    Cut("embeddings.word_embeddings", "out"),
    Cut("embeddings.position_embeddings", "out"),
    Cut("embeddings.token_type_embeddings", "out"),
)

BERT = Family(
    model_types=("bert",),
    blocks="encoder.layer.*",
    embedding="embeddings.word_embeddings",
    output="/cls.predictions.decoder",
    attention="attention.self",
    context="attention.output.dense",
    config_keys=_CONFIG_KEYS,
    ties=("hidden", "heads", "pooler"),
    groups=(
        *_BLOCKS,
        width(
            "hidden",
            cuts=(
                *_EMBEDDINGS_RESIDUAL,
                *_BLOCKS_RESIDUAL,
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
        width(
            "pooler",
            cuts=(
                Cut("pooler.dense", "out", optional=True),
                Cut("/classifier", "in", optional=True, needs="pooler"),
                Cut("/cls.seq_relationship", "in", optional=True),
            ),
            mask_at=MaskAt("out", "pooler.dense"),  # before the tanh, and tanh(0) = 0
        ),
        embedding_rank("embeddings.word_embeddings", "/cls.predictions.decoder"),
        vocab("embeddings.word_embeddings", "/cls.predictions.decoder", bias="/cls.predictions"),
    ),
)

ROBERTA = Family(
    model_types=("roberta", "xlm-roberta", "camembert"),
    blocks="encoder.layer.*",
    embedding="embeddings.word_embeddings",
    output="/lm_head.decoder",
    attention="attention.self",
    context="attention.output.dense",
    config_keys=_CONFIG_KEYS,
    ties=("hidden", "heads", "pooler", "head"),
    reserved_positions=2,  # positions count from the padding's index + 1
    groups=(
        *_BLOCKS,
        width(
            "hidden",
            cuts=(
                *_EMBEDDINGS_RESIDUAL,
                *_BLOCKS_RESIDUAL,
                Cut("pooler.dense", "in", optional=True),
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

# Embeddings may be narrower than the residual stream: then `embeddings_project` reads them, and they, the
# generator's transform and the tied output have a width of their own.
_ELECTRA_EMBEDDINGS = (
    "embeddings.LayerNorm",
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
    "/generator_predictions.dense",
    "/generator_predictions.LayerNorm",
)

ELECTRA = Family(
    model_types=("electra",),
    blocks="encoder.layer.*",
    embedding="embeddings.word_embeddings",
    output="/generator_lm_head",
    attention="attention.self",
    context="attention.output.dense",
    config_keys=_CONFIG_KEYS | {"embedding": "embedding_size"},
    # Embeddings as wide as the residual stream would lose their projection.
    ties=("hidden", "heads", "embedding", "head", "discriminator"),
    follows=(("embedding_size", "hidden_size"),),
    groups=(
        *_BLOCKS,
        width(
            "hidden",
            cuts=(
                Cut("encoder.layer.0.output.LayerNorm", "out"),  # in every model, whoever owns the embeddings
                Cut("embeddings_project", "out", optional=True),
                *(Cut(path, "out", optional=True, without="embeddings_project") for path in _ELECTRA_EMBEDDINGS),
                Cut("/generator_lm_head", "in", optional=True, without="embeddings_project"),
                *_BLOCKS_RESIDUAL,
                Cut("/generator_predictions.dense", "in", optional=True),
                Cut("/discriminator_predictions.dense", "in", optional=True),
                Cut("/classifier.dense", "in", optional=True),
                Cut("/classifier", "in", optional=True),  # of tokens: a plain linear layer
                Cut("/qa_outputs", "in", optional=True),
            ),
            mask_at=MaskAt("norms", "embeddings_project"),  # the first block reads it without a norm
        ),
        width(
            "embedding",
            cuts=(
                *(Cut(path, "out", optional=True, needs="embeddings_project") for path in _ELECTRA_EMBEDDINGS),
                Cut("embeddings_project", "in", optional=True),
                Cut("/generator_lm_head", "in", optional=True, needs="embeddings_project"),
            ),
            mask_at=MaskAt("norms"),
        ),
        width(
            "head",
            cuts=(
                Cut("/classifier.dense", "out", optional=True),
                Cut("/classifier.out_proj", "in", optional=True),
            ),
            mask_at=MaskAt("in", "/classifier.out_proj"),
        ),
        width(
            "discriminator",
            cuts=(
                Cut("/discriminator_predictions.dense", "out", optional=True),
                Cut("/discriminator_predictions.dense_prediction", "in", optional=True),
            ),
            mask_at=MaskAt("in", "/discriminator_predictions.dense_prediction"),
        ),
        embedding_rank("embeddings.word_embeddings", "/generator_lm_head"),
        vocab("embeddings.word_embeddings", "/generator_lm_head"),
    ),
)
