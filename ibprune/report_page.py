"""The report.html of an output folder: its JSON files made for looking, on a page without network and scripts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from ibprune.audit_output import audit_intro, audit_table, further_table
from ibprune.checksums import PAGE
from ibprune.curves import RANKED_BY, draw_descent, draw_ranked
from ibprune.drawing import Cell, Chart, Stack, draw_layers, listed, make_chart, unit_map
from ibprune.errors import BadRecipe, PlanMismatch
from ibprune.model_card import limits
from ibprune.names import DECISION, DECISION_SCHEMA, MODULE_KINDS
from ibprune.report import (
    MODULE_SCHEMA,
    PARETO,
    PARETO_SCHEMA,
    budget_line,
    kept_names,
    read_object,
    read_report,
    recovery_line,
    rows,
    run_folders,
    whole_line,
)

COSTS = {"params": "parameters", "macs": "MACs", "memory": "bytes", "latency": "latency"}
LACKING = {"verify": None, "recovery": {}, "budgets": [], "chosen": None, "resumed": False}  # of a module, or older
LOADS = {
    "vanilla": "loads with plain transformers",
    "remote_code": "loads with `trust_remote_code=True` or `ibprune.load`",
}


@dataclass(frozen=True)
class Row:
    """A row of the table before and after; `part` belongs to the row above it, `ratio` is None where there is none."""

    name: str
    dense: str
    pruned: str
    ratio: float | None
    part: bool
    metric: bool


def write_page(folder: str | Path) -> list[Path]:
    """Writes `report.html` into a folder of a run, and of several budgets into the folders inside too.

    The page is a function of the folder's report.json, plan.json, audit.json and decision.json, or of pareto.json
    alone, and the same at every time. It replaces one that is there. What a missing file would show is left out.

    Raises:
        BadRecipe: No such folder, none that a run of ibprune wrote, or it cannot be written.
        PlanMismatch: One of these files cannot be read.

    Example:
        >>> write_page("pruned")  # doctest: +SKIP
        [PosixPath('pruned/report.html')]
    """
    folder = Path(folder)
    if (folder / PARETO).is_file():
        found = read_object(folder / PARETO)
        return [
            _write(folder, pareto_page, found),
            *(path for each in run_folders(folder) for path in write_page(each)),
        ]
    report = read_report(folder)
    optional = ("plan.json", "audit.json", DECISION)
    more = [read_object(folder / name) if (folder / name).is_file() else None for name in optional]
    return [_write(folder, page, report, *more)]


def _write(folder: Path, draw, *found: dict | None) -> Path:
    try:
        text = draw(*found)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError, UndefinedError) as error:
        raise PlanMismatch(f"expected the report of a run in '{folder}', found one without {error}.") from error
    path = folder / PAGE
    temporary = folder / f".{PAGE}.part"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadRecipe(f"expected to write '{path}', but: {error.strerror or error}.") from error
    return path


def page(report: dict, plan: dict | None, audit: dict | None, decision: dict | None = None) -> str:
    """The page of one pruned model.

    Args:
        report: The dict of report.json, of a transformer or of a module.
        plan: The dict of plan.json; without it, the map of a transformer is left out.
        audit: The dict of audit.json, where there is one.
        decision: The dict of decision.json, where there is one.
    """
    is_module = report["schema"] == MODULE_SCHEMA
    view = LACKING | (_as_transformer(report) if is_module else report)
    kept, stacks = _units(view, plan)
    budget = view["budget"]
    return _render(
        "report.html",
        title=f"{_base(view['model'])}, pruned to {100 * budget['keep']:g}% of its {COSTS[budget['cost']]}",
        report=view,
        budget=budget | {"share": budget["keep"] * budget["achieved"] / budget["limit"], "line": budget_line(budget)},
        made=_how_made(report, is_module),
        whole=_code(whole_line(view)),
        rows=_rows(view),
        kept=kept,
        stacks=stacks,
        audit=_audit(audit),
        **_chosen(decision),
        loads=_code(LOADS[view["verify"]["tier"]]) if view["verify"] else None,
        recovery=recovery_line(view["recovery"]),
        validation=_validation(view["recovery"]),
        limits=[_code(line) for line in (_module_limits(view) if is_module else limits(report, audit))],
        timings=_timings(view["timings_s"]),
    )


def pareto_page(found: dict) -> str:
    """The page of several budgets from one mask run.

    Args:
        found: The dict of pareto.json; one of an older version has no path.

    Raises:
        BadRecipe: It is of another version.
    """
    if found.get("schema") != PARETO_SCHEMA:
        raise BadRecipe(f"expected a pareto.json of '{PARETO_SCHEMA}', found '{found.get('schema')}'.")
    cost = found["points"][0]["budget"]["cost"]
    sides = [("dense", found["dense"]), *((point["folder"], point) for point in found["points"])]
    charts = [
        make_chart(
            "milliseconds" if cost == "latency" else COSTS[cost],
            metric,
            ((_spent(side, cost), side["metrics"][metric], name, name == "dense") for name, side in sides),
            unit="" if cost == "latency" else "count",
        )
        for metric in found["dense"]["metrics"]
    ]
    return _render(
        "pareto.html",
        title=f"{_base(found['model'])} at {len(found['points'])} shares of its {COSTS[cost]}",
        found=found,
        sides=sides,
        metrics=list(found["dense"]["metrics"]),
        memory=cost == "memory",
        charts=[chart for chart in charts if chart],
        descent=draw_descent(found["path"]) if found.get("path") else None,
    )


@cache
def _environment() -> Environment:
    """The templates; each is compiled once, which takes longer than to fill it in."""
    return Environment(
        loader=PackageLoader("ibprune"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(template: str, **values: object) -> str:
    return _environment().get_template(template).render(**values)


def _base(model: str) -> str:
    return model.rstrip("/").split("/")[-1]


def _spent(side: dict, cost: str) -> float:
    return side["latency_ms"]["median"] if cost == "latency" else side[{"memory": "memory_bytes"}.get(cost, cost)]


def _code(line: str) -> Markup:
    """A line of Markdown whose only marks are backticks."""
    parts = line.split("`")
    return Markup("").join(
        Markup(f"<code>{escape(part)}</code>") if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def _as_transformer(report: dict) -> dict:
    """A module's report in the words of a transformer's."""
    shape, settings = report["example_shape"], report["settings"]
    counts = list(report["kept"].values())
    kind = " and ".join(settings["kinds"])
    blocks = {"params_blocks": 0, "macs_blocks": 0}
    return report | {
        "dense": report["dense"] | blocks,
        "pruned": report["pruned"] | blocks,
        "pictures": {"shape": shape[1:]},
        "latency_input": {str(i): size for i, size in enumerate(shape)},
        "vocabulary": None,
        "sites": report["kept"],
        "kept": {kind: sum(kept for kept, _ in counts) / max(1, sum(total for _, total in counts))},
        "score": settings["score"],
        "seed": settings["seed"],
        "data": None,
        "audit_note": "modules are audited apart, by ibprune.audit(net, small, data=loader)",
    }


def _units(report: dict, plan: dict | None) -> tuple[list[tuple[str, float, str]], tuple[Stack, ...]]:
    """The kept share of every kind, with numbers where one place has all units of a kind, and the map of the others."""
    whole, stacks = {}, ()
    if set(report["kept"]) <= set(MODULE_KINDS):
        cells = [Cell(name, kept, total) for name, (kept, total) in report.get("sites", {}).items()]
        if plan is not None:
            cells = [Cell(name, len(units), plan["n_units"][name]) for name, units in plan["keep"].items()]
        stacks = (listed("place by place", cells),) if cells else ()
    elif plan is not None:
        whole, stacks = unit_map(plan)
    names, kinds = kept_names(report), []
    for kind, share in report["kept"].items():
        alone = kind in whole and math.isclose(whole[kind].share, share)
        cell = whole.pop(kind) if alone else None
        kinds.append((names[kind], share, f"{cell.kept:,} of {cell.total:,}" if cell else ""))
    return kinds, (*([listed("whole model", whole.values())] if whole else []), *stacks)


def _how_made(report: dict, is_module: bool) -> str:
    """The command line, or a module's call: what only its user has is left open."""
    if not is_module:
        return report["command"]
    given = ", ".join(f"{key}={value!r}" for key, value in report["settings"].items())
    return f"ibprune.prune(model, train_loader=..., eval_fn=..., {given})"


def _module_limits(report: dict) -> Iterable[str]:
    yield (
        f"One run with seed {report['seed']}: another seed gives other figures. The metrics are those of the function "
        "that the run was given; what was lost on other data is not known."
    )
    dense, pruned = (report[side]["latency_ms"]["median"] for side in ("dense", "pruned"))
    gain = "No speed was gained there: the model is smaller only. " if pruned > 0.95 * dense else ""
    yield f"Latency holds for {report['device']} at the size of input in the table. {gain}Other hardware was not tried."


def _rows(report: dict) -> list[Row]:
    found = []
    for name, dense, pruned, ratio in rows(report):
        metric = name in report["dense"]["metrics"]
        value = None if ratio == "-" else float(ratio)
        found.append(Row(name.strip(), dense, pruned, value, name.startswith("  "), metric))
    return found


def _audit(found: dict | None) -> dict | None:
    """What the page shows of an audit."""
    if found is None:
        return None
    return {
        "intro": _code(audit_intro(found)),
        "drawn": draw_layers(found),
        "table": audit_table(found),
        "further": further_table(found),
        "headline": found["headline"],
        "failed": [check["id"] for check in found["checks"] if check["status"] == "fail"],
    }


def _chosen(decision: dict | None) -> dict:
    """What the page shows of how the units were chosen; nothing where no file says so, or one of another version."""
    if decision is None or decision.get("schema") != DECISION_SCHEMA:
        return {"ranks": [], "ranked_by": "", "descent": None}
    return {
        "ranks": [draw_ranked(kind, found) for kind, found in decision["kinds"].items()],
        "ranked_by": RANKED_BY[decision["score"]],
        "descent": draw_descent(decision["path"]) if decision["path"] else None,
    }


def _validation(recovery: dict) -> Chart | None:
    """The loss on the rows held back from the recovery, where it was looked at."""
    points = recovery.get("validation", [])
    return make_chart("steps of recovery", "loss on rows held back", ((s, v, "", False) for s, v in points))


def _timings(seconds: dict[str, float]) -> list[tuple[str, float, float, float]]:
    """(stage, seconds, where its bar begins and how long it is, in percent), in the order of the run."""
    total, found, start = sum(seconds.values()) or 1.0, [], 0.0
    for stage, spent in seconds.items():
        width = 100 * spent / total
        found.append((stage, spent, round(start, 2), round(width, 2)))
        start += width
    return found
