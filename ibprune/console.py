"""What the user sees while a run goes on, stage lines and progress bars or nothing, and whether it is to stop."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def printable(text: str) -> str:
    """The text with all but its lines and what can be seen written out: a name must not move a terminal's cursor.

    Example:
        >>> printable("red \x1b[31m, and \u202e backwards")
        'red \\x1b[31m, and \\u202e backwards'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Quiet:
    """Says nothing; the default for Python callers.

    Attributes:
        stepping: Whether steps of training are being made, so that a run that is to stop does so after one.
        stopping: Whether the user asked for that (`errors.Stopped`).
    """

    stepping: bool = False
    stopping: bool = False

    def say(self, line: str) -> None:
        """Shows one line."""

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Passes the items on, showing how far it is."""
        yield from items


class Terminal(Quiet):
    """Lines and rich progress bars on stderr; stdout stays free for results."""

    def __init__(self):
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)

    def say(self, line: str) -> None:
        self.console.print(printable(line), soft_wrap=True)

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if not self.console.is_terminal:  # a log file: a line every tenth
            yield from self._log(items, what, total)
            return
        columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(what, total=total)
            for item in items:
                yield item
                progress.advance(task)

    def _log(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        import time

        start = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            if done * 10 // total > (done - 1) * 10 // total:
                self.say(f"{what}: {done}/{total}, {time.perf_counter() - start:.0f} s")
