"""One run at a time writes to an output folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ibprune.console import Quiet
from ibprune.errors import BadRecipe, first_line
from ibprune.json_files import read_json

LOCK = "lock"


@contextmanager
def alone(folder: Path, output: Path, console: Quiet) -> Iterator[None]:
    """Holds the lock of an output, in a folder that is made for it, and goes again if it is empty in the end.

    The operating system holds the lock for the process and gives it back when that ends, however it ends: a lock file
    that a killed process left behind is taken over. The file says who has it. Where no file can be written or locked,
    that is said, and the run goes on without.

    Raises:
        BadRecipe: Another process holds it.
    """
    path, lock = folder / LOCK, None
    new = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise BadRecipe(
            f"expected no other run into '{output}', found {_holder(path)} at work on it: wait until it is done, or "
            "choose another --output."
        ) from None
    except OSError as error:
        lock = None
        console.say(f"warning: '{path}' cannot be locked, another run would not be noticed: {first_line(error)}")
    try:
        if lock is not None:
            with suppress(OSError):  # on a full disk it has no name
                path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            lock.release()
        for made in (folder, *new):
            with suppress(OSError):  # something is in it
                made.rmdir()


def _holder(path: Path) -> str:
    """Who wrote the lock file, for the middle of a message."""
    try:
        found = read_json(path)
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
