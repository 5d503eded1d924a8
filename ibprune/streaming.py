"""Data of which only the first rows are read before anything is trained."""

from dataclasses import replace

from datasets import Dataset, IterableDataset, concatenate_datasets

from ibprune.data import HELD_OUT, LEAST, TextData, data_name, find_columns, find_splits, held_out_size
from ibprune.errors import BadData
from ibprune.names import ANSWERS, TAGS
from ibprune.reading import Stream, reading

AHEAD = 10_000  # rows that are looked at first
CHARACTERS = 16_000_000  # of these rows, where they are long


def stream_data(
    source: str,
    *,
    text_columns: tuple[str, ...] = (),
    label_column: str = "",
    writes: bool = False,
    held_out: int | None = None,
    buffer: int,
) -> TextData:
    """The same data, of which only the first rows are read: columns and classes are found in these.

    The held-out rows are the first of their split. Without one they are the first of all rows, which are then never
    trained on; as many as `held_out_size` says for the rows that were read.

    Args:
        held_out: How many, if not so.
        buffer: Rows from which the next is drawn where they are shuffled.

    Raises:
        BadData: As `load_data`; files that cannot be read little by little, words with tags, answers.
    """
    name, streams = data_name(source), find_splits(source, streaming=True)
    rows = streams["train"]
    with reading(source):
        known = _rows_ahead(rows, AHEAD + (held_out or 0))
        if "held_out" in streams:
            judged = _rows_ahead(streams["held_out"], held_out or HELD_OUT)
            known = concatenate_datasets([judged, known])
        elif len(known) < LEAST:
            raise BadData(f"expected at least {LEAST} rows in '{source}', found {len(known)}.")
        else:
            n = held_out or held_out_size(len(known))
            if n >= len(known):
                raise BadData(f"--max-eval-samples: expected fewer than the {len(known):,} rows of '{source}'.")
            judged, rows = known.select(range(n)), rows.skip(n)
    data = find_columns(source, {"train": known, "held_out": judged}, text_columns, label_column, writes)
    if data.objective in (TAGS, ANSWERS):
        raise BadData(
            f"--streaming: words with tags, and answers, are not streamed, found them in '{name}': leave it out."
        )
    first = data.train.select(range(len(data.held_out), len(data.train)))
    text, label = data.text_columns, data.label_column
    rows = _whole(rows, name, text, label).select_columns([*text, *((label,) if label else ())])
    if label:
        declared = getattr(known.features[label], "names", None)
        rows = _numbered(rows, name, label, {str(i) if declared else code: i for i, code in enumerate(data.labels)})
    note = (
        f"'{name}' is a stream: columns and classes are those of its first {len(first):,} rows, "
        f"{len(data.held_out):,} rows are held out, and rows without text or label are left out."
    )
    return replace(data, train=first, note=note, stream=Stream(lambda: rows, name, buffer))


def _rows_ahead(rows: IterableDataset, most: int) -> Dataset:
    """The first rows, at most so many, held in memory; fewer where they are long (`CHARACTERS`)."""
    found, size = [], 0
    for row in rows.take(most):
        found.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size > CHARACTERS and len(found) >= LEAST:
            break
    return Dataset.from_list(found, features=rows.features if found else None)


def _whole(rows: IterableDataset, name: str, text: tuple[str, ...], label: str | None) -> IterableDataset:
    """Those rows that have a text in every column, and a label where there is a column of labels.

    Raises:
        BadData: As they are read: a row without one of the columns, or with something else than text.
    """

    def is_whole(row: dict) -> bool:
        for column in (*text, *((label,) if label else ())):
            if column not in row:
                raise BadData(
                    f"expected a column '{column}' in every row of '{name}', found a row with {', '.join(row)}."
                )
        for column in text:
            if not isinstance(row[column], str | None):
                raise BadData(f"expected text in '{column}' of '{name}', found {row[column]!r:.60}.")
        known = label is None or (row[label] is not None and row[label] == row[label])
        return known and all(row[column] and row[column].strip() for column in text)

    return rows.filter(is_whole)


def _numbered(rows: IterableDataset, name: str, label: str, codes: dict[str, int]) -> IterableDataset:
    """The rows with the numbers of their classes; with none given, with labels that are decimals.

    Raises:
        BadData: As they are read: a class that is not among them.
    """

    def number(row: dict) -> dict:
        value = row[label]
        if not codes:
            return {label: float(value)}
        key = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        if key not in codes:
            raise BadData(
                f"'{name}': the class '{key}' is not among those of the first rows ({', '.join(list(codes)[:5])}), by "
                "which classes are numbered: bring a row of every class to the front, or leave --streaming out."
            )
        return {label: codes[key]}

    return rows.map(number)
