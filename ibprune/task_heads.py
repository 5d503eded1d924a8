"""Which task a transformers class is for, as transformers' own tables say, and what it must be called with."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ibprune.names import ANSWERS, TAGS

CLASSIFIERS = (  # how the names of such classes end
    "ForSequenceClassification",
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
)
HEADS = {"": CLASSIFIERS, TAGS: ("ForTokenClassification",), ANSWERS: ("ForQuestionAnswering",)}
_MAPPINGS = (
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("AutoModelForPreTraining", "MODEL_FOR_PRETRAINING_MAPPING_NAMES"),
    ("AutoModel", "MODEL_MAPPING_NAMES"),
    ("AutoModelForTextEncoding", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
)


def auto_class(cls_name: str, model_type: str) -> str:
    """The transformers Auto class that serves a model class.

    Example:
        >>> auto_class("GPT2LMHeadModel", "gpt2")
        'AutoModelForCausalLM'
    """
    for auto, mapping in _MAPPINGS:
        names = getattr(modeling_auto, mapping).get(model_type)
        if cls_name in (names if isinstance(names, tuple) else (names,)):
            return auto
    return "AutoModel"


def dense_name(model: torch.nn.Module) -> str:
    """The name of the transformers class that a model is of, where it was loaded in pruned shapes too."""
    return type(model).__name__.removeprefix("Pruned")


def auto_of(model: PreTrainedModel) -> str:
    """The transformers Auto class that serves a model, pruned or not."""
    return auto_class(dense_name(model), model.config.model_type)


def writes(config: PreTrainedConfig) -> bool:
    """Whether a config names a model that reads one text and writes another.

    Example:
        >>> from transformers import T5Config
        >>> writes(T5Config(architectures=["T5ForConditionalGeneration"])), writes(T5Config())
        (True, False)
    """
    name = str((config.architectures or [""])[0])
    return auto_class(name, config.model_type) == "AutoModelForSeq2SeqLM"


def is_headless(model: PreTrainedModel) -> bool:
    """Whether a model ends in hidden states. T5 has heads without a backbone of its own."""
    return model.base_model is model and auto_of(model) in ("AutoModel", "AutoModelForTextEncoding")


def keeps_cache(model: PreTrainedModel) -> bool:
    """Whether a model writes text, so that it keeps keys and values of what it has read."""
    return auto_of(model) in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def reads_end(model: PreTrainedModel) -> bool:
    """Whether a model decides by the state at the last end token, of which all its inputs have equally many."""
    return model.config.is_encoder_decoder and auto_of(model) == "AutoModelForSequenceClassification"


def with_end(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Arbitrary token ids, (batch, length), as ids that the model's head can take: one end token where it reads one."""
    if not reads_end(model):
        return ids
    end = model.config.eos_token_id
    ids = ids.where(ids != end, (end + 1) % model.config.vocab_size)
    ids[:, -1] = end
    return ids


def complete(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with all that a transformers model is called with.

    An encoder-decoder writes what it reads, shifted by one token, where the batch has no `decoder_input_ids`: BART and
    the classifiers of T5 do that themselves.
    """
    config = getattr(model, "config", None)
    if "decoder_input_ids" in batch or not getattr(config, "is_encoder_decoder", False):
        return dict(batch)
    ids, start = batch["input_ids"], getattr(config, "decoder_start_token_id", None)
    first = torch.full_like(ids[:, :1], config.pad_token_id if start is None else start)
    return dict(batch) | {"decoder_input_ids": torch.cat([first, ids[:, :-1]], dim=1)}
