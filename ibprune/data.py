"""Text data: GLUE tasks, Hub data sets and local files."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    load_dataset,
)
from huggingface_hub import constants

from ibprune.annotations import (
    TEXT,
    check_answers,
    check_tags,
    find_annotations,
    flatten_squad,
    is_squad,
    read_conll,
    tag_metrics,
)
from ibprune.errors import BadData, did_you_mean, first_line
from ibprune.hub import hub_reachable
from ibprune.json_files import check_rows
from ibprune.names import ANSWERS, TAGS, WRITES
from ibprune.reading import END_OF_TEXT, Stream, open_files, table_options

GLUE = {  # task: (text columns, metrics); the validation split of mnli has its own name
    "cola": (("sentence",), ("matthews_correlation",)),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "sst2": (("sentence",), ("accuracy",)),
    "stsb": (("sentence1", "sentence2"), ("spearmanr",)),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}
GLUE_REPO = "nyu-mll/glue"
PROSE = "prose"  # the data set of `ibprune.prose`
PAIR_COLUMNS = (  # what is read and what is written
    ("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "summary"),
    ("source", "target"), ("src", "tgt"), ("input", "target"), ("input", "output"), ("question", "answer"),
)  # fmt: skip
TEXT_COLUMNS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence",), ("text",), ("content",))
LABEL_COLUMNS = ("label", "labels", "score")
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
READERS |= {".conll": "conll"}
MISSING = {"NA", "N/A", "NaN", "nan", "None", "null"}  # among numbers; among words they are words
EXACT = 2**53  # below it every whole number is a float of its own
LEAST = 20  # rows of which some can be held out
HELD_OUT = 2000  # rows held out at most, where nothing says how many
AUDITABLE = 400  # rows held out of small data where a fifth allows it: an audit of fewer than 200 says nothing
SPLITS = {"train": ("train",), "held_out": ("validation", "dev", "valid", "validation_matched")}


@dataclass(frozen=True)
class TextData:
    """Texts, with labels where there are any.

    Attributes:
        name: What the report calls it.
        train, held_out: Columns `text_columns` and, when labelled, `label_column`.
        labels: Class names; empty for unlabelled texts and for regression. Of answers the two outputs.
        metrics: Names of the metrics the task is judged by.
        note: What the user must know about the rows, or "".
        objective: `TAGS`, where the text is a list of words and the label one of tags; `ANSWERS`, where the texts are
            question and context and the label the answers; `WRITES`, where the second text is written by a model that
            reads the first; "" for texts, where the model decides.
        stream: The training rows, where these are read as they are trained on; `train` is then what was read ahead.
    """

    name: str
    train: Dataset
    held_out: Dataset
    text_columns: tuple[str, ...]
    label_column: str | None = None
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    note: str = ""
    objective: str = ""
    stream: Stream | None = None


def load_task(task: str) -> TextData:
    """A GLUE task by name, from the Hub.

    Raises:
        BadData: An unknown task, or the Hub cannot be reached.
    """
    if task not in GLUE:
        raise BadData(f"expected a GLUE task, found '{task}': {did_you_mean(task, GLUE)}. Other data: --data.")
    splits = _from_hub(GLUE_REPO, task)
    columns, metrics = GLUE[task]
    return _describe(task, splits, columns, "label", metrics)


def load_data(
    source: str,
    *,
    text_columns: tuple[str, ...] = (),
    label_column: str = "",
    seed: int = 0,
    writes: bool = False,
) -> TextData:
    """Data from a local file or folder, or from the Hub.

    A folder holds files named train.* and validation.* (or dev.*). Without a held-out split, some of
    the training rows are held out by the seed (`held_out_size`).

    Args:
        writes: Whether the model reads one text and writes another: two columns of text without a label are that.

    Raises:
        BadData: Nothing there, an unknown format or column, or the Hub cannot be reached.
    """
    splits = hold_out(find_splits(source), source, seed=seed)
    return find_columns(source, splits, text_columns, label_column, writes)


def find_columns(
    source: str, splits: dict[str, Dataset], text_columns: tuple[str, ...], label_column: str, writes: bool
) -> TextData:
    """The splits as texts with labels, or what else their columns hold.

    Raises:
        BadData: A column that is not there, bytes that are no text, or nothing to train on.
    """
    try:
        return _find_columns(source, splits, text_columns, label_column, writes)
    except UnicodeDecodeError as error:  # Arrow looks at the bytes of a string only when it is asked for
        raise BadData(f"expected text in UTF-8 in '{source}', found other bytes: {error.reason}.") from error


def _find_columns(
    source: str, splits: dict[str, Dataset], text_columns: tuple[str, ...], label_column: str, writes: bool
) -> TextData:
    names = splits["train"].column_names
    check_columns((*text_columns, *((label_column,) if label_column else ())), names, source)
    label = label_column or next((c for c in LABEL_COLUMNS if c in names), "")
    pair = text_columns if len(text_columns) == 2 else next((c for c in PAIR_COLUMNS if set(c) <= set(names)), ())
    if writes and pair and not label:
        return replace(_describe(data_name(source), splits, pair, "", ()), objective=WRITES)
    plain = next((c for c in TEXT_COLUMNS if set(c) <= set(names)), ())
    objective, text_columns, label_column = find_annotations(
        splits["train"].features, text_columns, label_column, source, plain=bool(plain)
    )
    if objective:
        return _describe_annotated(data_name(source), splits, text_columns, label_column, objective)
    text_columns = text_columns or plain
    if not text_columns:
        raise BadData(f"expected a text column in '{source}', found {', '.join(names)}: name it with --text-columns.")
    label_column = label_column or next((c for c in LABEL_COLUMNS if c in names), "")
    return _describe(data_name(source), splits, text_columns, label_column, ())


def find_splits(
    source: str, names: Mapping[str, tuple[str, ...]] = SPLITS, *, streaming: bool = False
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """The rows of a file, a folder of files or a Hub data set ("repo" or "repo:config"): "train", maybe "held_out".

    Args:
        names: What files and splits may be called.
        streaming: Whether they are read as they are asked for; then a folder may hold train-*.* or train/*.* too.

    Raises:
        BadData: Nothing there, no training rows, or the Hub cannot be reached.
    """
    path = Path(source)
    if os.path.exists(source):
        return _from_files(path, names, streaming)
    if path.suffix in READERS or source.startswith((".", "/", "~")):
        raise BadData(f"expected a data file or folder, found nothing at '{source}'.")
    repo, _, config = source.partition(":")
    return _from_hub(repo, config or None, names, streaming)


def hold_out(splits: dict[str, Dataset], source: str, *, seed: int) -> dict[str, Dataset]:
    """The splits, with some of the training rows held out by the seed where no split says which.

    Raises:
        BadData: Fewer than 20 rows to share.
    """
    if "held_out" in splits:
        return splits
    rows = splits["train"]
    if len(rows) < LEAST:
        ends = f" A text of a txt file ends at a blank line or {END_OF_TEXT}." if source.endswith(".txt") else ""
        raise BadData(f"expected at least {LEAST} rows in '{source}', found {len(rows)}.{ends}")
    parts = rows.train_test_split(test_size=held_out_size(len(rows)), seed=seed)
    return {"train": parts["train"], "held_out": parts["test"]}


def check_columns(columns: Iterable[str], names: list[str], source: str) -> None:
    """Raises `BadData` with the nearest name for the first column that the data lack."""
    for column in columns:
        if column not in names:
            raise BadData(f"expected a column '{column}' in '{source}', found none: {did_you_mean(column, names)}.")


def data_name(source: str) -> str:
    """What the report calls the data: the file's or folder's own name, or the Hub id."""
    return Path(source).name if Path(source).exists() else source


def hub_data(task: str | None, source: str | None) -> str | None:
    """The Hub data set behind a run's --task or --data, as "repo" or "repo:config"; None for local data.

    Example:
        >>> hub_data("sst2", None), hub_data(None, "imdb"), hub_data(None, "prose")
        ('nyu-mll/glue:sst2', 'imdb', None)
    """
    if task is not None:
        return f"{GLUE_REPO}:{task}"
    return None if source in (None, PROSE) or Path(source).exists() else source


def held_out_size(rows: int) -> int:
    """Rows held out where no split says so: a twentieth, more of small data, at most 2,000.

    Example:
        >>> [held_out_size(rows) for rows in (10, 1_000, 4_000, 20_000, 100_000)]
        [2, 200, 400, 1000, 2000]
    """
    return min(HELD_OUT, max(1, rows // 20, min(AUDITABLE, rows // 5)))


def _from_files(
    path: Path, names: Mapping[str, tuple[str, ...]], streaming: bool
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    if path.is_file():
        return {"train": open_files([path]) if streaming else read_file(path)}
    splits = {}
    for split, called in names.items():
        patterns = [f"{name}{more}" for name in called for more in ((".*", "-*.*", "/*.*") if streaming else (".*",))]
        found = [f for pattern in patterns for f in sorted(path.glob(pattern)) if f.suffix in READERS]
        if found:
            splits[split] = open_files(found) if streaming else read_file(found[0])
    if "train" not in splits:
        files = ", ".join(sorted(f.name for f in path.iterdir())[:8])
        raise BadData(f"expected a train.* file ({', '.join(READERS)}) in '{path}', found: {files or 'nothing'}.")
    return splits


def read_file(path: Path) -> Dataset:
    """The rows of one file; a txt file is split at <|endoftext|> marks or blank lines, SQuAD's nesting unfolded.

    Raises:
        BadData: Another ending, or a file its reader cannot parse.
    """
    if path.suffix not in READERS:
        raise BadData(f"expected one of {', '.join(READERS)}, found '{path.name}'.")
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8-sig")
            parts = text.split(END_OF_TEXT) if END_OF_TEXT in text else re.split(r"\n\s*\n", text)
            return Dataset.from_dict({"text": [part.strip() for part in parts if part.strip()]})
        if path.suffix == ".conll":
            return read_conll(path.read_text(encoding="utf-8-sig"))
        if READERS[path.suffix] == "json":
            check_rows(path)
        rows = load_dataset(READERS[path.suffix], data_files=str(path), split="train", **table_options(path.suffix))
        return flatten_squad(rows) if is_squad(rows.features) else rows
    except BadData:
        raise
    except Exception as error:  # datasets wraps every parser's own error class
        cause = str(error.__cause__ or error)
        if "StopIteration" in repr(error) + repr(error.__cause__) or "corresponds to no data" in cause:
            raise BadData(f"expected rows in '{path}', found none.") from error
        reason = first_line(error.__cause__ or error)
        raise BadData(f"could not read '{path}' as {READERS[path.suffix]}: {reason}") from error


def _from_hub(
    repo: str, config: str | None, names: Mapping[str, tuple[str, ...]] = SPLITS, streaming: bool = False
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    if not hub_reachable() and not constants.HF_HUB_OFFLINE:  # datasets would retry for half a minute
        raise BadData(
            f"expected to load the data set '{repo}' from the Hub, which is out of reach: give local files with "
            "--data, or set HF_HUB_OFFLINE=1 to use a cached copy."
        )
    try:
        found: DatasetDict | IterableDatasetDict = load_dataset(repo, config, streaming=streaming)
    except Exception as error:  # network, missing repo, gated repo: many classes, one meaning here
        reason = first_line(error)
        raise BadData(
            f"could not load the data set '{repo}' from the Hub ({reason}). Check the name and the network, or give "
            "local files with --data."
        ) from error
    splits = {}
    for split, called in names.items():
        name = next((name for name in called if name in found), None)
        if name:
            splits[split] = found[name]
    if "train" not in splits:
        raise BadData(f"expected a split 'train' in '{repo}', found {', '.join(found)}.")
    return splits


def _describe(
    name: str, splits: dict[str, Dataset], text: tuple[str, ...], label: str, metrics: tuple[str, ...]
) -> TextData:
    splits = _as_numbers(splits, label)
    parts = [_complete(name, split, splits[split], text, label) for split in ("train", "held_out")]
    train, held_out = (rows for rows, _, _ in parts)
    left_out = sum(count for _, count, _ in parts)
    note = f"Left out {left_out:,} rows of '{name}' without text or label." if left_out else ""
    if not label:
        return TextData(name, train, held_out, text, note=note)
    gaps = any(gaps for *_, gaps in parts)
    if gaps and all(_whole(rows, label) for rows in (train, held_out)):  # which the gaps made decimals
        train, held_out = (
            rows.cast_column(label, Value("int64")) if _is_decimal(rows, label) else rows for rows in (train, held_out)
        )
    train, held_out, labels = number_classes(name, train, held_out, label)
    metrics = metrics or (("accuracy",) if labels else ("spearmanr",))
    return TextData(name, train, held_out, text, label, labels, metrics, note)


def _describe_annotated(
    name: str, splits: dict[str, Dataset], text: tuple[str, ...], label: str, objective: str
) -> TextData:
    check = check_tags if objective == TAGS else check_answers
    columns = (text[0], label) if objective == TAGS else (text, label)
    parts = [check(name, split, splits[split], *columns) for split in ("train", "held_out")]
    train, held_out = (rows for rows, _ in parts)
    left_out = sum(count for _, count in parts)
    note = f"Left out {left_out:,} rows of '{name}' without text." if left_out else ""
    if objective == ANSWERS:
        return TextData(name, train, held_out, text, "answers", ("start", "end"), ("squad",), note, ANSWERS)
    train, held_out, labels = number_classes(name, train, held_out, label)
    return TextData(name, train, held_out, text, label, labels, tag_metrics(labels), note, TAGS)


def number_classes(
    name: str, train: Dataset, held_out: Dataset, label: str
) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Both splits with classes numbered from 0, and the class names; decimals are left, as no classes.

    Raises:
        BadData: A class of the held-out rows never occurs in training, or there is only one.
    """
    feature = train.features[label]
    feature = feature.feature if isinstance(feature, List | LargeList) else feature  # a list of tags
    labels = tuple(getattr(feature, "names", None) or ())
    if not labels and not feature.dtype.startswith("float"):
        values = sorted(_unique(train, label))
        labels = tuple(str(value) for value in values)
        unknown = _unique(held_out, label) - set(values)
        if unknown:
            raise BadData(f"'{name}': the held-out labels {sorted(map(str, unknown))[:5]} never occur in training.")
        if values != list(range(len(values))):
            index = {value: i for i, value in enumerate(values)}
            train, held_out = (recode(rows, label, index.__getitem__, "int64") for rows in (train, held_out))
    if not labels and not _is_decimal(held_out, label):
        raise BadData(
            f"expected decimals in the column '{label}' of the held-out rows of '{name}', as in training, found "
            f"{_kind(held_out, label)}."
        )
    if labels and len(labels) < 2:
        raise BadData(f"expected at least two classes in the column '{label}' of '{name}', found {len(labels)}.")
    return train, held_out, labels


def _unique(rows: Dataset, column: str) -> set:
    if isinstance(rows.features[column], List | LargeList):
        return {value for row in rows[column] for value in row}
    return set(rows.unique(column))


def recode(rows: Dataset, column: str, code: Callable, kind: str) -> Dataset:
    """The rows with one column's values, or those in its lists, replaced by a function of them, now of type `kind`."""
    feature = Value(kind)
    if isinstance(rows.features[column], List | LargeList):
        values, feature = [[code(value) for value in row] for row in rows[column]], List(feature)
    else:
        values = [code(value) for value in rows[column]]
    return rows.remove_columns(column).add_column(column, values, feature=feature)


def _complete(name: str, split: str, rows: Dataset, text: tuple[str, ...], label: str) -> tuple[Dataset, int, bool]:
    """The rows with a text in every column and a label, how many had none, and whether a label was missing.

    Raises:
        BadData: A column is missing, holds no text, or no finite label a row, or nothing is left.
    """
    for column in (*text, *((label,) if label else ())):
        if column not in rows.column_names:
            raise BadData(f"expected the column '{column}' in the {split} rows of '{name}', found none.")
    for column in text:
        if _kind(rows, column) not in (*TEXT, "null"):
            raise BadData(f"expected text in '{column}' of '{name}', found {_kind(rows, column)}.")
    if label and not isinstance(rows.features[label], Value | ClassLabel):
        raise BadData(f"expected one label a row in '{label}' of '{name}', found {_kind(rows, label)}.")
    columns = [[bool(value and value.strip()) for value in rows[column]] for column in text]
    if label:
        columns.append([value is not None and value == value for value in rows[label]])
        if any(value in (math.inf, -math.inf) for value in rows[label]):
            raise BadData(f"expected finite numbers in '{label}' of '{name}', found an infinite one.")
    kept = [i for i, whole in enumerate(zip(*columns)) if all(whole)]
    left_out = len(rows) - len(kept)
    if not kept:
        raise BadData(f"expected rows with text{' and a label' if label else ''} in '{name}', found none.")
    gaps = bool(label) and not all(columns[-1])
    return (rows.select(kept) if left_out else rows), left_out, gaps


def _as_numbers(splits: dict[str, Dataset], column: str) -> dict[str, Dataset]:
    """The splits with a column as numbers, where only words for a missing one, in any of them, had made it text."""
    present = {split: rows for split, rows in splits.items() if column in rows.column_names}
    for split, rows in present.items():
        if _kind(rows, column).startswith("decimal"):  # decimal128(10, 2), or whole: decimal128(10, 0)
            kind = "int64" if _kind(rows, column).endswith(", 0)") else "float64"
            splits = splits | {split: rows.cast_column(column, Value(kind))}
    texts = [split for split, rows in present.items() if _kind(rows, column) in TEXT]
    values = {value for split in texts for value in splits[split].unique(column)} - {None}
    try:
        known = {value: float(value) for value in values - MISSING}
    except ValueError:  # classes by name, one of which may be such a word
        return splits
    if not known or not values & MISSING:
        return splits
    return splits | {split: recode(splits[split], column, known.get, "float64") for split in texts}


def _is_decimal(rows: Dataset, column: str) -> bool:
    return _kind(rows, column).startswith("float")


def _whole(rows: Dataset, column: str) -> bool:
    """Whether a column holds whole numbers, of whatever type."""
    if _is_decimal(rows, column):
        return all(value.is_integer() and abs(value) < EXACT for value in rows[column])
    return _kind(rows, column).startswith(("int", "uint"))


def _kind(rows: Dataset, column: str) -> str:
    """What a column holds, for people: nested values have no dtype."""
    feature = rows.features[column]
    return str(getattr(feature, "dtype", type(feature).__name__.lower()))
