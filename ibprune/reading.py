"""Rows that are read as they are trained on, for data that do not fit into memory or on the disk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset

from ibprune.errors import BadData, IBPruneError, first_line
from ibprune.json_files import parse_json

STREAMED = {".csv": "csv", ".tsv": "csv", ".jsonl": "", ".parquet": "parquet", ".txt": ""}  # and datasets' reader
LONGEST = 16_000_000  # characters of a text
LOOKED_AT = 1_000_000  # characters of a txt file that say how its texts are divided
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, eq=False)
class Stream(torch.utils.data.IterableDataset):
    """Training rows that are read anew at every pass, and never held all at once.

    Attributes:
        make: The rows of a pass from their start, in their order.
        name: Of the data, for messages.
        buffer: Rows from which the next is drawn where they are shuffled.
        seed: Of the shuffling; None leaves the order as it is.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a", "b", "c"]}).to_iterable_dataset()
        >>> [row["text"] for row in Stream(lambda: rows, "letters", buffer=2)]
        ['a', 'b', 'c']
    """

    make: Callable[[], IterableDataset]
    name: str
    buffer: int
    seed: int | None = None

    def mapped(self, change: Callable[[IterableDataset], IterableDataset]) -> "Stream":
        """The same rows, changed as they come; `change` is called at every pass, and may remember within one."""
        return replace(self, make=lambda: change(self.make()))

    def shuffled(self, seed: int) -> "Stream":
        """The rows in an order that is a function of the seed: files at random, and rows drawn from the buffer.

        Files keep their order where the first rows are held out, or the number of rows is limited.
        """
        return replace(self, seed=seed)

    def __iter__(self) -> Iterator[dict]:
        """The rows.

        Raises:
            BadData: A row that cannot be read.
        """
        with reading(self.name):
            rows = self.make()
            yield from rows if self.seed is None else rows.shuffle(seed=self.seed, buffer_size=self.buffer)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what goes wrong while rows are read into `BadData`, in one line."""
    try:
        yield
    except IBPruneError:
        raise
    except Exception as error:  # every reader has error classes of its own
        raise BadData(f"could not read on in '{name}': {first_line(error)}") from error


def open_files(files: list[Path]) -> IterableDataset:
    """The rows of files of one kind, one file after the other; a txt file has a row per text.

    Texts end at <|endoftext|> where the first million characters hold it, otherwise at blank lines.

    Raises:
        BadData: Files that cannot be read little by little, or of several kinds.
    """
    endings = sorted({file.suffix for file in files})
    if len(endings) > 1 or endings[0] not in STREAMED:
        raise BadData(
            f"--streaming: expected files of one of {', '.join(STREAMED)}, found {', '.join(endings)}: convert them, "
            "or leave --streaming out."
        )
    features = None
    if endings[0] == ".parquet":
        with reading(str(files[0])):
            features = _with_reader(str(files[0])).features
    return IterableDataset.from_generator(_rows, features=features, gen_kwargs={"files": [str(file) for file in files]})


def limited(rows: Dataset | Stream, most: int | None, *, seed: int) -> Dataset | Stream:
    """At most so many rows, all where it is None: of a stream the first, otherwise some by the seed, in their order.

    Example:
        >>> limited(Dataset.from_dict({"text": ["a", "b", "c"]}), 2, seed=0)["text"]
        ['a', 'c']
    """
    if most is None:
        return rows
    if isinstance(rows, Stream):
        return rows.mapped(lambda rows: rows.take(most))
    if most >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:most]))


def _rows(files: list[str]) -> Iterator[dict]:
    readers = {".jsonl": _json_lines, ".txt": _texts}
    for file in files:
        with reading(file):
            yield from readers.get(Path(file).suffix, _with_reader)(file)


def _with_reader(file: str) -> IterableDataset:
    suffix = Path(file).suffix
    return load_dataset(STREAMED[suffix], data_files=file, split="train", streaming=True, **table_options(suffix))


def table_options(suffix: str) -> dict:
    """How the rows of a file with this ending are read: cells that say None, NA or null are words, not gaps.

    Example:
        >>> table_options(".jsonl")
        {}
    """
    gaps = {"keep_default_na": False, "na_values": ["", "nan", "NaN"]}
    return {".csv": gaps, ".tsv": {"sep": "\t", "quoting": 3} | gaps}.get(suffix, {})


def _json_lines(file: str) -> Iterator[dict]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line) if line.strip() else {}
            except ValueError as error:
                raise BadData(f"could not read line {number:,} of '{file}' as JSON: {error}") from error
            if not isinstance(row, dict):
                raise BadData(f"expected an object in line {number:,} of '{file}', found {line.strip():.40}.")
            if row:
                yield row


def _texts(file: str) -> Iterator[dict]:
    with open(file, encoding="utf-8-sig") as lines:
        marked = END_OF_TEXT in lines.read(LOOKED_AT)
        lines.seek(0)
        text = ""
        for line in lines:
            *ended, rest = line.split(END_OF_TEXT) if marked else ([line, ""] if line.isspace() else [line])
            for part in ended:
                if text.strip() or part.strip():
                    yield {"text": (text + part).strip()}
                text = ""
            text += rest
            if len(text) > LONGEST:
                raise BadData(
                    f"expected texts that end at {END_OF_TEXT} or a blank line in '{file}', found one of more than "
                    f"{LONGEST:,} characters."
                )
        if text.strip():
            yield {"text": text.strip()}
