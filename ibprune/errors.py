"""The errors that ibprune raises for its users, and the hint for a misspelt name."""

import difflib
from collections.abc import Iterable


class IBPruneError(ValueError):
    """A mistake the user can mend. The message says what was expected, what was found, what to do."""


class UnsupportedModel(IBPruneError):
    """No row of `ibprune.families` describes the model, or nothing of a traced module can be cut."""


class BadRecipe(IBPruneError):
    """A flag, a recipe key or its value cannot be used."""


class PlanMismatch(IBPruneError):
    """A pruning plan, or an exported folder, does not fit the model it is applied to."""


class BadData(IBPruneError):
    """A data set, a column or a metric cannot be used."""


class Stopped(Exception):
    """A run was asked to stop, and did so after a step of training; what was saved of it is said."""


def did_you_mean(name: str, valid: Iterable[str], *, listed: Iterable[str] | None = None) -> str:
    """Returns the end of an error message: the nearest valid name, then all of them, or those `listed` where given.

    Example:
        >>> did_you_mean("fischer", ["vib", "fisher"])
        "did you mean 'fisher'? Expected one of fisher, vib"
    """
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    names = ", ".join(valid if listed is None else listed)
    return f"{hint}Expected one of {names}" if hint else f"expected one of {names}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the next where it ends in a colon, for the middle of another's."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def about_file(error: OSError) -> str:
    """What is said of a file that could not be read or written: a full disk, no permission, a name too long.

    Example:
        >>> about_file(OSError(36, "File name too long", "a.csv"))
        "could not read or write 'a.csv': File name too long."
    """
    name = f" '{error.filename}'" if error.filename is not None else ""
    return f"could not read or write{name}: {error.strerror or first_line(error)}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, under a limit, or on the whole machine.

    Python, torch and the libraries that map files each have a class, or words, of their own for it.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
        True
    """
    said = str(error)
    words = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(word in said for word in words)
