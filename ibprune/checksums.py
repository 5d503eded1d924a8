"""Checksums of a folder's files: written into its report.json, compared before anything of it is read."""

import hashlib
import json
from pathlib import Path, PurePosixPath

from ibprune.errors import PlanMismatch

REPORT = "report.json"
CARD = "README.md"  # for people to edit: nothing reads it
PAGE = "report.html"  # drawn from the report, and may be drawn again


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file, as the Hub shows it.

    Measured: 1.3 GB a second on one core with instructions for it.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder by its relative path, but for report, card and page."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    return {name: digest for name, digest in found.items() if name not in (REPORT, CARD, PAGE)}


def check_files(folder: Path, *, needed: tuple[str, ...] = ()) -> None:
    """Compares the files of a folder with the checksums in its report; one without a report, or without sums, passes.

    Files that the report does not name may lie beside them. The sums find damage, not malice: who can change a file
    can change the report too.

    Args:
        needed: Patterns of the files that must be there if the report names them.

    Raises:
        PlanMismatch: A file was altered or cut short, or a needed one is gone, or the report is no report.
    """
    path = folder / REPORT
    if not path.is_file():
        return
    try:
        report = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanMismatch(f"could not read {path}: {error}. Get the folder again.") from error
    sums = report.get("sha256", {}) if isinstance(report, dict) else None
    if not isinstance(sums, dict) or not all(_inside(name) and isinstance(sums[name], str) for name in sums):
        raise PlanMismatch(f"expected checksums by file name under 'sha256' in {path}: get the folder again.")
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            if any(PurePosixPath(name).match(pattern) for pattern in needed):
                raise PlanMismatch(f"expected the file '{name}' that {path} names, found none: get the folder again.")
            continue
        found = sha256(file)
        if found != expected:
            raise PlanMismatch(
                f"expected sha256 {expected[:12]}… for {file}, as in {REPORT}, found {found[:12]}…: the file was "
                "altered or cut short. Get it again, or, if you changed it yourself, remove its line there."
            )


def _inside(name: str) -> bool:
    """Whether a path stays in the folder: a report may come from anywhere."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def inside(folder: str | Path) -> str:
    """A hint for who names a folder of several budgets where one model is expected; "" for any other folder."""
    found = sorted(path.parent.name for path in Path(folder).glob(f"*/{REPORT}")) if Path(folder).is_dir() else []
    return f" It holds the folders {', '.join(found)}: name one of them." if found else ""
