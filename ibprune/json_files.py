"""JSON that others may have written: read to values, or one kind of error."""

import json
from pathlib import Path


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
