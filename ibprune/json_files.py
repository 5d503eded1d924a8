"""JSON that others may have written: read to values, or one kind of error."""

import codecs
import json
import mmap
import re
from pathlib import Path

SPACE, NULL, LATER_NULL = re.compile(rb"\s*"), re.compile(rb"null"), re.compile(rb"\n[ \t\r]*null")


def read_json(path: str | Path) -> object:
    """The values in a file of JSON.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds no JSON, or numbers or nesting beyond what Python reads.
    """
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str) -> object:
    """The values in a text of JSON.

    Raises:
        ValueError: As in `read_json`.

    Example:
        >>> parse_json('{"a": [1]}')
        {'a': [1]}
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def check_rows(path: Path) -> None:
    """Raises `ValueError` for rows of a JSON file that are null: the parser behind datasets ends the process there."""
    if not path.stat().st_size:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = SPACE.match(data, 3 if data[:3] == codecs.BOM_UTF8 else 0).end()
        end = data.find(b"\n", start)
        row = data[start : len(data) if end < 0 else end].strip()
        whole = row[:1] == b"[" or (path.suffix == ".json" and row[:1] == b"{" and row[-1:] != b"}")
        # One value over many lines may have lines of null.
        null = None if whole else NULL.match(data, start) or LATER_NULL.search(data, start)
        if null:
            line = 1 + data[: null.end()].count(b"\n")
            raise ValueError(f"line {line:,} is null: take such rows out")
