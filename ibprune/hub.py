"""The Hugging Face Hub as a place to read from: whether it can be reached, and a repo's files as a folder."""

import functools
import os
from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download

from ibprune.errors import BadRecipe


@functools.cache
def hub_reachable() -> bool:
    """True when the Hub's endpoint answers within three seconds and HF_HUB_OFFLINE is not set.

    The libraries retry for half a minute per file before they say the same.
    """
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # noqa: BLE001 - the client's error classes differ between releases of huggingface_hub
        return False
    return True


def repo_folder(repo: str, patterns: tuple[str, ...], *, revision: str | None = None) -> Path:
    """The folder of a repo's files in the cache; they are fetched where the Hub is in reach.

    Args:
        repo: "user/model".
        patterns: Of the files that are needed, as "*.json".
        revision: Branch, tag or commit.

    Raises:
        BadRecipe: It cannot be read.

    Example:
        >>> repo_folder("user/model", ("*.json",))  # doctest: +SKIP
    """
    offline = not hub_reachable()
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # noqa: BLE001 - the client's error classes differ between releases of huggingface_hub
        where = "its cache, as the Hub is out of reach" if offline else constants.ENDPOINT
        raise BadRecipe(
            f"expected a folder or a Hub repo '{repo}'{at(revision)}, but could not get it from {where}: "
            f"{reason(error)} Check the name, the network and, for a private repo, the token."
        ) from error


def reason(error: Exception) -> str:
    """The first two lines of the client's message: the first alone is often a number; their causes are nearer.

    Example:
        >>> reason(OSError("404\\n\\nNot found\\nmore"))
        '404 Not found.'
    """
    while error.__cause__ is not None and not str(error).strip():
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]).rstrip(".") + "."


def at(revision: str | None) -> str:
    """The revision in a message, or nothing.

    Example:
        >>> at("v1")
        " at 'v1'"
    """
    return f" at '{revision}'" if revision else ""
