"""Which task a transformers class is for, as transformers' own tables say."""

from transformers.models.auto import modeling_auto

CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")  # how the names of such classes end
_MAPPINGS = (
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("AutoModelForPreTraining", "MODEL_FOR_PRETRAINING_MAPPING_NAMES"),
    ("AutoModel", "MODEL_MAPPING_NAMES"),
)


def auto_class(cls_name: str, model_type: str) -> str:
    """The transformers Auto class that serves a model class.

    Example:
        >>> auto_class("GPT2LMHeadModel", "gpt2")
        'AutoModelForCausalLM'
    """
    for auto, mapping in _MAPPINGS:
        if getattr(modeling_auto, mapping).get(model_type) == cls_name:
            return auto
    return "AutoModel"
