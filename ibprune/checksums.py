"""Checksums of a folder's files: written into its report.json, compared before anything of it is read."""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath

from ibprune.errors import PlanMismatch, first_line
from ibprune.json_files import read_json

REPORT = "report.json"
CARD = "README.md"  # for people to edit: nothing reads it
PAGE = "report.html"  # drawn from the report, and may be drawn again
SUMS = "sha256"  # of the other files, in the report
OWN = "own_sha256"  # of the report's figures, in the report


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


def own_sum(report: dict) -> str:
    """The digest of what a report says, without its sums: its lines may stand otherwise, its figures may not."""
    said = {key: value for key, value in json.loads(json.dumps(report)).items() if key not in (SUMS, OWN)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def write_report(report: dict, folder: Path) -> dict:
    """Writes `report.json` into a folder that is complete but for it and the card; returns the report with its sums."""
    report = report | {SUMS: checksums(folder), OWN: own_sum(report)}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def check_own(report: dict, path: Path) -> None:
    """Raises `PlanMismatch` where a report, read from this path, says something else than was written."""
    if report.get(OWN, own_sum(report)) != own_sum(report):
        raise PlanMismatch(
            f"expected the figures in {path} to be those that were written, found others: the file was altered. Get it "
            f"again, or, if you changed it yourself, remove '{OWN}' there."
        )


def check_files(folder: Path, *, needed: tuple[str, ...] = (), compared: tuple[str, ...] = ("*",)) -> None:
    """Compares the files of a folder with the checksums in its report; one without a report, or without sums, passes.

    Files that the report does not name may lie beside them. The sums find damage, not malice: who can change a file
    can change the report too.

    Args:
        needed: Patterns of the files that must be there if the report names them.
        compared: Patterns of the files that are compared.

    Raises:
        PlanMismatch: A file was altered or cut short, or a needed one is gone, or the report is no report.
    """
    path = folder / REPORT
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise PlanMismatch(f"expected a file {path}, found a folder: get the folder again.")
        return
    try:
        report = read_json(path)
    except (OSError, ValueError) as error:
        raise PlanMismatch(f"could not read {path}: {first_line(error)}. Get the folder again.") from error
    sums = report.get(SUMS, {}) if isinstance(report, dict) else None
    if not isinstance(sums, dict) or not all(_inside(name) and isinstance(sums[name], str) for name in sums):
        raise PlanMismatch(f"expected checksums by file name under '{SUMS}' in {path}: get the folder again.")
    check_own(report, path)
    for name, expected in sums.items():
        file = folder / name
        if not _matches(name, compared):
            continue
        try:
            found = sha256(file) if file.is_file() else None
        except OSError as error:
            raise PlanMismatch(f"could not read {file}: {error.strerror or error}.") from error
        if found is None and _matches(name, needed):
            raise PlanMismatch(f"expected the file '{name}' that {path} names, found none: get the folder again.")
        if found not in (None, expected):
            raise PlanMismatch(
                f"expected sha256 {expected[:12]}… for {file}, as in {REPORT}, found {found[:12]}…: the file was "
                "altered or cut short. Get it again, or, if you changed it yourself, remove its line there."
            )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in patterns)


def _inside(name: str) -> bool:
    """Whether a path stays in the folder: a report may come from anywhere."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def inside(folder: str | Path) -> str:
    """A hint for who names a folder of several budgets where one model is expected; "" for any other folder."""
    found = sorted(path.parent.name for path in Path(folder).glob(f"*/{REPORT}")) if os.path.isdir(folder) else []
    return f" It holds the folders {', '.join(found)}: name one of them." if found else ""
