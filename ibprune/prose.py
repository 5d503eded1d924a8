"""English prose that every Python carries, for runs without data."""

import ast
import itertools
import random
import re
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from ibprune.console import Quiet
from ibprune.data import PROSE, TextData


def load_prose(*, seed: int = 0, limit: int = 24_000, console: Quiet | None = None) -> TextData:
    """English that is already on this machine: Python's language reference and library docstrings.

    Sentences of 8 to 40 words from `pydoc_data.topics` and from the docstrings of the standard library
    and of packages that ibprune needs. Nothing is imported or run; a tenth (at most 2,000) is held out.
    """
    passages = list(dict.fromkeys(itertools.islice(_sentences(console or Quiet()), limit)))
    order = list(range(len(passages)))
    random.Random(seed).shuffle(order)
    cut = min(2000, len(order) // 10)
    held_out, train = order[:cut], order[cut:]
    return TextData(
        name=PROSE,
        train=Dataset.from_dict({"text": [passages[i] for i in train]}),
        held_out=Dataset.from_dict({"text": [passages[i] for i in held_out]}),
        text_columns=("text",),
    )


def _sentences(console: Quiet) -> Iterator[str]:
    import pydoc_data.topics

    for text in pydoc_data.topics.topics.values():
        yield from _english(text)
    library = Path(sysconfig.get_path("stdlib"))
    site = Path(sysconfig.get_path("purelib"))
    skip = {"site-packages", "tests", "test", "externals"}
    chosen: list[Path] = []
    for root in [site / name for name in ("sklearn", "scipy", "numpy", "transformers", "datasets")] + [library]:
        files = sorted(path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts))
        chosen += files[:: max(1, len(files) // 150)]
    for file in console.track(chosen, "reading prose", len(chosen)):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a file of broken syntax is not prose
        for node in _documented(tree):
            yield from _english(ast.get_docstring(node) or "")


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """What may have a docstring, the outermost first; expressions, most of a file, are not looked into."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield node
        for statements in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, statements, ()))


def _english(text: str) -> Iterator[str]:
    """Sentences that read as English: 8 to 40 words, mostly letters."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph):
            words = sentence.split()
            if not 8 <= len(words) <= 40:
                continue
            line = " ".join(words)
            letters = sum(map(str.isalpha, line)) + line.count(" ")
            if letters > 0.88 * len(line) and ">>>" not in line:
                yield line
