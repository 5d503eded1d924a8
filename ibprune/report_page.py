"""The report.html of an output folder: its JSON files made for looking, on a page without network and scripts."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from ibprune.audit_output import audit_intro, audit_table, further_table, layer_status
from ibprune.checksums import PAGE, REPORT
from ibprune.drawing import Axis, Cell, Chart, Stack, listed, make_axis, make_chart, unit_map
from ibprune.errors import BadRecipe, PlanMismatch, did_you_mean
from ibprune.groups import MODULE_KINDS
from ibprune.model_card import limits
from ibprune.plots import short_name
from ibprune.report import MODULE_SCHEMA, PARETO, PARETO_SCHEMA, SCHEMA, budget_line, kept_names, recovery_line, rows

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


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, as percentages of an axis, and in words."""

    at: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class AuditLine:
    """What stayed in a layer: a share, and dense and pruned what a probe can use; None where nothing was measured."""

    name: str
    status: str
    retained: Interval | None
    labels: tuple[Interval | None, Interval | None]


def write_page(folder: str | Path) -> list[Path]:
    """Writes `report.html` into a folder of a run, and of several budgets into the folders inside too.

    The page is a function of the folder's report.json, plan.json and audit.json, or of pareto.json alone, and the same
    at every time. It replaces one that is there.

    Raises:
        BadRecipe: No such folder, none that a run of ibprune wrote, or it cannot be written.
        PlanMismatch: One of these files cannot be read.

    Example:
        >>> write_page("pruned")  # doctest: +SKIP
        [PosixPath('pruned/report.html')]
    """
    folder = Path(folder)
    if (folder / PARETO).is_file():
        found = _read(folder / PARETO)
        inside = [path.parent for path in sorted(folder.glob(f"*/{REPORT}"), reverse=True)]
        return [_write(folder, pareto_page, found), *(path for each in inside for path in write_page(each))]
    if not (folder / REPORT).is_file():
        raise BadRecipe(f"expected a folder that a run wrote, with a {REPORT} or {PARETO}, found none in '{folder}'.")
    optional = ("plan.json", "audit.json")
    more = [_read(folder / name) if (folder / name).is_file() else None for name in optional]
    return [_write(folder, page, _read(folder / REPORT), *more)]


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanMismatch(f"could not read {path}: {error}. Get the folder again.") from error
    if not isinstance(found, dict):
        raise PlanMismatch(f"expected keys and values in {path}, found {type(found).__name__}. Get the folder again.")
    return found


def _write(folder: Path, draw, *found: dict | None) -> Path:
    try:
        text = draw(*found)
    except (KeyError, TypeError, IndexError, AttributeError, UndefinedError) as error:
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


def page(report: dict, plan: dict | None, audit: dict | None) -> str:
    """The page of one pruned model.

    Args:
        report: The dict of report.json, of a transformer or of a module.
        plan: The dict of plan.json; without it, the map of a transformer is left out.
        audit: The dict of audit.json, where there is one.

    Raises:
        BadRecipe: The report is of something else than a pruned model.
    """
    if report.get("schema") not in (SCHEMA, MODULE_SCHEMA):
        raise BadRecipe(
            f"expected the report of a pruned model, found '{report.get('schema')}': "
            f"{did_you_mean(str(report.get('schema')), (SCHEMA, MODULE_SCHEMA))}"
        )
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
        rows=_rows(view),
        kept=kept,
        stacks=stacks,
        audit=_audit(audit),
        loads=_code(LOADS[view["verify"]["tier"]]) if view["verify"] else None,
        recovery=recovery_line(view["recovery"]),
        validation=_validation(view["recovery"]),
        limits=[_code(line) for line in (_module_limits(view) if is_module else limits(report, audit))],
        timings=_timings(view["timings_s"]),
    )


def pareto_page(found: dict) -> str:
    """The page of several budgets from one mask run.

    Args:
        found: The dict of pareto.json.

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
    )


def _render(template: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("ibprune"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


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
    layers = found["layers"]
    kept = [layer["I_XL"] for layer in layers if layer["I_XL"]["retained"] is not None]
    sides = [layer["V_LY"][side] for layer in layers for side in ("before", "after")]
    probed = [side for side in sides if side and side["value"] is not None]
    shares = make_axis([1.0, *(x for info in kept for x in info["retained_ci95"])], unit="share", from_zero=True)
    bits = make_axis([x for side in probed for x in side["ci95"]], from_zero=True)
    return {
        "intro": _code(audit_intro(found)),
        "lines": [_audit_line(layer, shares, bits) for layer in layers],
        "shares": shares,
        "whole": shares.at(1.0),
        "bits": bits if probed else None,
        "table": audit_table(found),
        "further": further_table(found),
        "headline": found["headline"],
        "failed": [check["id"] for check in found["checks"] if check["status"] == "fail"],
    }


def _audit_line(layer: dict, shares: Axis, bits: Axis) -> AuditLine:
    info, labels = layer["I_XL"], layer["V_LY"]
    retained = None
    if info["retained"] is not None:
        low, high = info["retained_ci95"]
        words = f"{info['retained']:.0%} retained, 95% interval {low:.0%} to {high:.0%}"
        retained = Interval(shares.at(info["retained"]), shares.at(low), shares.at(high), words)
    found = []
    for name, side in (("dense", labels["before"]), ("pruned", labels["after"])):
        if not side or side["value"] is None:
            found.append(None)
            continue
        low, high = side["ci95"]
        words = f"{name} {side['value']:.3f} bits, 95% interval {low:.3f} to {high:.3f}"
        found.append(Interval(bits.at(side["value"]), bits.at(low), bits.at(high), words))
    return AuditLine(short_name(layer["name"]), layer_status(layer), retained, tuple(found))


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
