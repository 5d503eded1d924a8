"""Matches the labels of data to the outputs of a classifier that was trained before."""

from collections.abc import Callable
from dataclasses import replace

from datasets import Dataset, Value
from transformers import PreTrainedConfig

from ibprune.data import TextData
from ibprune.errors import BadData

OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")


def match_labels(data: TextData, config: PreTrainedConfig, name: str) -> TextData:
    """The data with the class numbers that the model was trained with; unchanged for other models.

    A class is found by its name in `label2id`, else by its number; names that the model does not know
    are numbered in alphabetical order, which the note says.

    Raises:
        BadData: The model's head serves another task, or the labels cannot be its classes.
    """
    if not data.label_column:
        return data
    architecture = str((config.architectures or [""])[0])
    if architecture.endswith(OTHER_HEADS):
        raise BadData(
            f"'{name}' is a {architecture}, whose head labelled texts cannot train: give a sequence classifier or a "
            "base model."
        )
    if not architecture.endswith("ForSequenceClassification"):
        return data
    n = config.num_labels
    if n == 1:
        return replace(_recoded(data, float), labels=(), metrics=("spearmanr",))
    known = {str(key): int(value) for key, value in (config.label2id or {}).items()}
    found = data.labels or tuple(_whole_numbers(data))
    if set(found) <= set(known):
        codes = {label: known[label] for label in found}
    elif all(label.isdigit() and int(label) < n for label in found):
        codes = {label: int(label) for label in found}
    elif len(found) == n:
        codes = {label: i for i, label in enumerate(found)}
        text = ", ".join(f"{label} = {i}" for label, i in codes.items())
        data = replace(data, note=f"{data.note} The model does not name its classes; taken in order: {text}.".strip())
    else:
        raise BadData(
            f"'{name}' was trained for {n} outputs, the data have {len(found)} labels ({', '.join(found[:5])}): give "
            "data of its task, or the base model to train a new head."
        )
    names = {code: label for label, code in codes.items()}
    labels = tuple(names.get(i, str((config.id2label or {}).get(i, i))) for i in range(n))
    old = dict(enumerate(data.labels)) if data.labels else {float(label): label for label in found}
    metrics = data.metrics if data.labels else ("accuracy",)
    return replace(_recoded(data, lambda value: codes[old[value]]), labels=labels, metrics=metrics)


def _whole_numbers(data: TextData) -> list[str]:
    """Labels stored as 0.0, 1.0, … as class names; none where they are true decimals."""
    values = sorted({float(v) for rows in (data.train, data.held_out) for v in rows.unique(data.label_column)})
    return [str(int(value)) for value in values] if all(value.is_integer() for value in values) else []


def _recoded(data: TextData, code: Callable) -> TextData:
    column = data.label_column

    def recode(rows: Dataset) -> Dataset:
        values = [code(value) for value in rows[column]]
        kind = Value("float64" if code is float else "int64")
        return rows.remove_columns(column).add_column(column, values, feature=kind)

    try:
        return replace(data, train=recode(data.train), held_out=recode(data.held_out))
    except (KeyError, TypeError, ValueError) as error:
        raise BadData(f"'{data.name}': a label of the held-out rows cannot be matched: {error}.") from error
