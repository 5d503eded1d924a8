"""Finished runs side by side: a row for each, from the report.json of its folder alone."""

from collections.abc import Iterable
from pathlib import Path

from ibprune.errors import PlanMismatch
from ibprune.report import MODULE_SCHEMA, read_report, run_folders

COSTS = ("params", "macs", "file_bytes")


def contrast(folders: Iterable[str | Path]) -> dict:
    """What runs cost and reached.

    Args:
        folders: What `prune` wrote; one of several budgets stands for the folders inside.

    Returns:
        {"runs", "notes"}. A run has its "folder", "model", "data" (None of a module), "device", "score", "seed" and
        "budget", the pair [dense, pruned] of "params", "macs", "file_bytes" (None of a module) and each of "metrics",
        and "latency_ratio", pruned over dense, of an input and precision in words ("timed"). Notes say what must not be
        compared.

    Raises:
        BadRecipe: A folder without the report of a pruned model.
        PlanMismatch: A report that cannot be read.

    Example:
        >>> contrast(["small", "smaller"])["runs"][0]["params"]  # doctest: +SKIP
        [22713216, 6813688]
    """
    runs = [_run(folder) for each in folders for folder in run_folders(Path(each))]
    return {"runs": runs, "notes": list(_notes(runs))}


def _run(folder: Path) -> dict:
    report = read_report(folder)
    try:
        how = report["settings"] if report["schema"] == MODULE_SCHEMA else report
        dense, pruned = report["dense"], report["pruned"]
        return {
            "folder": str(folder),
            "model": report["model"],
            "data": report.get("data"),
            "device": report["device"],
            "timed": _timed(report),
            "score": how["score"],
            "seed": how["seed"],
            "budget": report["budget"],
            **{key: [dense[key], pruned[key]] if key in dense else None for key in COSTS},
            "latency_ratio": pruned["latency_ms"]["median"] / dense["latency_ms"]["median"],
            "metrics": {name: [dense["metrics"][name], pruned["metrics"][name]] for name in dense["metrics"]},
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise PlanMismatch(f"expected the report of a run in '{folder}', found one without {error}.") from error


def _timed(report: dict) -> str:
    """What the latencies are of, for people."""
    shape = report.get("latency_input") or {"shape": tuple(report.get("example_shape") or ())}
    return f"{' x '.join(f'{size}' for size in shape.values())} in {report.get('precision', 'fp32')}"


def _notes(runs: list[dict]) -> Iterable[str]:
    """What differs between runs and so forbids a comparison."""
    for key, those, what in (
        ("data", "data", "metrics"),
        ("device", "devices", "latency ratios"),
        ("timed", "inputs", "latency ratios"),
    ):
        found = sorted({str(run[key] or "unknown") for run in runs})
        if len(found) > 1:
            yield f"{what} are not to be compared: the {those} differ ({', '.join(found)})"
    if len(runs) > 1 and any(run["data"] is None for run in runs):
        yield "a report without data does not say what its metrics are of"
