"""Matches the labels of data to the outputs of a classifier that was trained before."""

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedConfig

from ibprune.annotations import tag_metrics
from ibprune.data import TextData, recode
from ibprune.errors import BadData
from ibprune.images import Data
from ibprune.names import ANSWERS, TAGS
from ibprune.task_heads import HEADS

OTHER_HEADS = ("ForMultipleChoice", "ForNextSentencePrediction")
NEEDED = {"": "labelled texts", TAGS: "words with tags", ANSWERS: "questions with answers"}


def match_labels(data: Data, config: PreTrainedConfig, name: str) -> Data:
    """The data with the class numbers, or those of tags, that the model was trained with; unchanged for other models.

    A class is found by its name in `label2id`, else by its number; names that the model does not know
    are numbered in alphabetical order, which the note says.

    Raises:
        BadData: The model's head serves another task, or the labels cannot be its classes.
    """
    if not data.label_column:
        return data
    architecture = str((config.architectures or [""])[0])
    objective = data.objective if isinstance(data, TextData) else ""
    others = (*OTHER_HEADS, *(end for heads in HEADS.values() for end in heads if heads is not HEADS[objective]))
    if architecture.endswith(others):
        wanted = HEADS[objective][0].removeprefix("For")
        raise BadData(
            f"'{name}' is a {architecture}, whose head {NEEDED[objective]} cannot train: give a model for {wanted}, or "
            "a base model."
        )
    if not architecture.endswith(HEADS[objective]) or objective == ANSWERS:
        return data
    n = config.num_labels
    if n == 1 and not objective:
        values = dict(enumerate(data.labels))  # whole numbers have been taken for classes
        return replace(
            _recoded(data, lambda value: float(values.get(value, value)), "float64"), labels=(), metrics=("spearmanr",)
        )
    known = {str(key): int(value) for key, value in (config.label2id or {}).items()}
    found = data.labels or tuple(_whole_numbers(data))
    if set(found) <= set(known):
        codes = {label: known[label] for label in found}
    elif all(label.isdecimal() and int(label) < n for label in found):
        codes = {label: int(label) for label in found}
    elif len(found) == n:
        codes = {label: i for i, label in enumerate(found)}
        text = ", ".join(f"{label} = {i}" for label, i in codes.items())
        why = "The model does not name its classes" if unnamed(config) else "The model has other names for its classes"
        data = replace(data, note=f"{data.note} {why}; taken in order: {text}.".strip())
    else:
        raise BadData(
            f"'{name}' was trained for {n} outputs, the data have {len(found)} labels ({', '.join(found[:5])}): give "
            "data of its task, or the base model to train a new head."
        )
    names = {code: label for label, code in codes.items()}
    labels = tuple(names.get(i, str((config.id2label or {}).get(i, i))) for i in range(n))
    old = dict(enumerate(data.labels)) if data.labels else {float(label): label for label in found}
    metrics = data.metrics if data.labels else ("accuracy",)
    if objective == TAGS:
        if all(label.isdecimal() for label in found):  # the model names what the data number
            labels = tuple(str((config.id2label or {}).get(i, i)) for i in range(n))
        metrics = tag_metrics(labels)
    return replace(_recoded(data, lambda value: codes[old[value]]), labels=labels, metrics=metrics)


def unnamed(config: PreTrainedConfig) -> bool:
    """Whether a model's classes have no names but those that transformers makes up.

    Example:
        >>> from transformers import BertConfig
        >>> unnamed(BertConfig()), unnamed(BertConfig(id2label={0: "bad", 1: "good"}))
        (True, False)
    """
    return all(str(name) == f"LABEL_{i}" for i, name in (config.id2label or {}).items())


def _whole_numbers(data: Data) -> list[str]:
    """Labels stored as 0.0, 1.0, … as class names; none where they are true decimals."""
    values = sorted({float(v) for rows in (data.train, data.held_out) for v in rows.unique(data.label_column)})
    return [str(int(value)) for value in values] if all(value.is_integer() for value in values) else []


def _recoded(data: Data, code: Callable, kind: str = "int64") -> Data:
    try:
        train, held_out = (recode(rows, data.label_column, code, kind) for rows in (data.train, data.held_out))
        data = replace(data, train=train, held_out=held_out)
    except (KeyError, TypeError, ValueError) as error:
        raise BadData(f"'{data.name}': a label of the held-out rows cannot be matched: {error}.") from error
    if isinstance(data, TextData) and data.stream is not None:
        label = data.label_column
        stream = data.stream.mapped(lambda rows: rows.map(lambda row: {label: code(row[label])}))
        data = replace(data, stream=stream)
    return data
