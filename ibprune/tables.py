"""What the verbs print: tables on stdout through rich, and the lines below them."""

import sys

from ibprune.console import printable

WAYS = {"vanilla": "plain transformers", "remote_code": "trust_remote_code=True or ibprune.load"}


def _put(text: str) -> None:
    sys.stdout.write(printable(text))


def table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=printable(title), title_justify="left")
    for i, name in enumerate(header):
        drawn.add_column(printable(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(printable, row))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a file or a pipe has no edge to wrap at
        console.width = max(console.width, 160)
    console.print(drawn)


def print_report(report: dict, output: str) -> None:
    from ibprune.report import budget_line, kept_names, recovery_line, rows

    budget = report["budget"]
    table(
        f"{report['model']} at {budget['keep']:g} of its {budget['cost']} ({budget['scope']}), score {report['score']}",
        ("", "dense", "pruned", "ratio"),
        rows(report),
    )
    names = kept_names(report)
    kept = ", ".join(f"{names[kind]} {share:.0%}" for kind, share in report["kept"].items())
    loads = WAYS[report["verify"]["tier"]]
    _put(
        f"budget {budget_line(budget)}; kept: {kept}\n"
        f"written to {output} in {sum(report['timings_s'].values()):.0f} s; loads with {loads} "
        f"(checked, max difference {report['verify']['max_abs_diff']:.1e})\n"
    )
    if recovery_line(report["recovery"]):
        _put(f"{recovery_line(report['recovery'])}\n")
    if report["chosen"]:
        _put(f"{report['chosen']['note']}\n")
    if report["quantised"]:
        held = f"metrics and latency of the dense model are those of its form in {report['quantised']} bits"
        _put(f"note: {held}; the weights written are full-precision.\n")
    elif report["pruned"]["latency_ms"]["median"] > 0.95 * report["dense"]["latency_ms"]["median"]:
        _put("note: no speed was gained on this device at this input size; the model is smaller only.\n")


def print_machine(found: dict) -> None:
    def listed(versions: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {number}" for name, number in versions.items() if number)

    disk, hub = found["disk"], found["hub"]
    devices = [f"{name}, {free / 1e9:.1f} GB free" for name, free in found["devices"].items()]
    lines = {
        "packages": listed(found["versions"]),
        "optional": listed(found["optional"]) or "none",
        "devices": "; ".join(devices) or f"CPU, {found['cores']} cores",
        "memory": f"{found['memory'] / 1e9:.1f} GB free",
        "disk": f"{disk['here'] / 1e9:.1f} GB free here, {disk['cache'] / 1e9:.1f} GB in {hub['cache']}",
        "Hub": f"{hub['endpoint']} {'answers' if hub['reachable'] else 'does not answer'}, "
        f"{'a token is' if hub['token'] else 'no token is'} set",
    }
    _put("".join(f"{name:<10}{text}\n" for name, text in lines.items()))
    _put("".join(f"note: {note}\n" for note in found["notes"]))


def print_pareto(found: dict, output: str) -> None:
    cost = found["points"][0]["budget"]["cost"]
    names = list(found["dense"]["metrics"])
    memory = cost == "memory"
    sides = [("dense", found["dense"]), *((point["folder"], point) for point in found["points"])]
    table(
        f"{found['model']} at shares of its {cost}",
        ("", "parameters", "MACs", "file", *(["memory"] if memory else []), "latency", *names),
        [
            (
                name,
                f"{side['params']:,}",
                f"{side['macs'] / 1e6:,.1f} M",
                f"{side['file_bytes'] / 1e6:,.1f} MB",
                *([f"{side['memory_bytes'] / 1e6:,.1f} MB"] if memory else []),
                f"{side['latency_ms']['median']:.1f} ms",
                *(f"{side['metrics'][metric]:.4f}" for metric in names),
            )
            for name, side in sides
        ],
    )
    folders = ", ".join(point["folder"] for point in found["points"])
    _put(f"written to {output}: {folders}, each a folder that loads; pareto.json has this table\n")


def print_contrast(found: dict) -> None:
    def pair(values: list[float] | None, form: str, scale: float = 1.0) -> str:
        if values is None:
            return "-"
        dense, pruned = values
        return f"{form.format(pruned / scale)} ({pruned / dense:.3f})" if dense else form.format(pruned / scale)

    metrics = list(dict.fromkeys(name for run in found["runs"] for name in run["metrics"]))
    table(
        "finished runs: pruned (ratio to dense)",
        ("run", "model", "data", "score", "budget", "parameters", "MACs", "file", "latency", *metrics),
        [
            (
                run["folder"],
                run["model"].rstrip("/").split("/")[-1],
                run["data"] or "-",
                run["score"],
                f"{run['budget']['keep']:g} {run['budget']['cost']}",
                pair(run["params"], "{:,.0f}"),
                pair(run["macs"], "{:,.1f} M", 1e6),
                pair(run["file_bytes"], "{:,.1f} MB", 1e6),
                f"({run['latency_ratio']:.3f})",
                *(pair(run["metrics"].get(name), "{:.4f}") for name in metrics),
            )
            for run in found["runs"]
        ],
    )
    _put("".join(f"note: {note}\n" for note in found["notes"]))


def print_training(report: dict, output: str) -> None:
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    changes = ", ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in before)
    _put(f"{changes} in {report['steps']} steps; written to {output}\n")


def print_export(found: dict) -> None:
    checked = f" (checked, max difference {found['max_diff']:.1e} of the outputs)" if "max_diff" in found else ""
    _put(f"written to {found['output']}{checked}\n")
    for note in found["notes"]:
        _put(f"note: {note}\n")


def print_plan(found: dict) -> None:
    from ibprune.report import macs_input

    several = "budgets" in found
    points = found["budgets"] if several else [found]
    reached = [point for point in points if "budget" in point]
    cost, scope = reached[0]["budget"]["cost"], reached[0]["budget"]["scope"]
    unit = {"memory": "bytes", "latency": "ms"}.get(cost, cost)
    table(
        f"what can be cut in this {found['model_type']} model",
        ("kind", "sites", "units", "at least", f"{unit} per unit", f"owns of the {unit}", "alone down to", "cut"),
        [
            (
                kind,
                *(f"{g[k]:,}" for k in ("sites", "units", "min_units", "cost_per_unit")),
                f"{g['owns']:.1%}",
                "-" if g["alone"] is None else f"{g['alone']:.1%}",
                "yes" if g["cut"] else "no",
            )
            for kind, g in found["groups"].items()
        ],
    )
    if several:
        table(
            f"shares of the {cost} ({scope}), with equal shares of each kind",
            ("budget", "parameters", "MACs", *["latency"] * bool(found["latency"]), *reached[0]["kept"], "loads with"),
            [_reached(point) for point in reached],
        )
    lines = [
        f"dense      {', '.join(_sizes(found['dense']))} ({macs_input(found)})",
        *([] if several else _one_budget(found)),
        f"reachable  {found['reachable_keep']:.4f} of the dense {cost} at the least",
        *([_measured(found["latency"])] if found["latency"] else []),
        *(f"too small  {point['unreachable']}" for point in points if "unreachable" in point),
        *([] if several else [f"loading    {WAYS[found['tier']]} (with equal shares)"]),
        *(f"refused    {name}: {reason}" for name, reason in found["refused"].items()),
        *(f"whole      {kind}: {reason}" for kind, reason in found["whole"].items()),
    ]
    _put("\n".join(lines) + "\n")


def _reached(point: dict) -> tuple[str, ...]:
    sizes = (size.removesuffix(" parameters").removesuffix(" MACs") for size in _sizes(point["predicted"]))
    kept = (f"{share:.0%}" for share in point["kept"].values())
    return (f"{point['budget']['keep']:g}", *sizes, *kept, WAYS[point["tier"]])


def _sizes(side: dict) -> list[str]:
    """What a plan says of a model: parameters, MACs and, by a table, milliseconds."""
    found = [f"{side['params']:,} parameters", f"{side['macs'] / 1e6:,.1f} M MACs"]
    return found + ([f"{side['latency_ms']:,.2f} ms"] if "latency_ms" in side else [])


def _measured(latency: dict) -> str:
    read = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in latency["shape"].items())
    return (
        f"latency    by a table measured on {latency['device']} at {read}, {latency['error']:.1%} off on other widths; "
        "elsewhere, and at other sizes, expect others"
    )


def _one_budget(found: dict) -> list[str]:
    from ibprune.report import budget_line

    kept = ", ".join(f"{kind} {share:.0%}" for kind, share in found["kept"].items())
    return [
        f"predicted  {', '.join(_sizes(found['predicted']))}",
        f"kept       {kept}",
        f"budget     {budget_line(found['budget'])} ({found['budget']['scope']})",
    ]


def print_estimate(found: dict) -> None:
    parts = ("dense", "student", "gradients", "moments", "activations")
    length = f" of {found['batch']['length']} tokens" if found["batch"]["length"] else ""
    table(
        f"what the run takes: {found['objective']}, {found['precision']}, {found['batch']['sequences']} rows{length} "
        f"in each of {found['num_processes']} process(es), memory in GB",
        ("phase", "batches", *parts, "together", "TFLOP", "of the teacher", "time"),
        [
            (
                row["phase"],
                f"{row['batches']:,}",
                *(f"{row['memory'][part] / 1e9:,.2f}" for part in parts),
                f"{row['total'] / 1e9:,.2f}",
                *(f"{row[key] / 1e12:,.1f}" for key in ("flops", "teacher_flops")),
                duration(row["seconds"]),
            )
            for row in found["phases"]
        ],
    )
    rate, disk = found["rate"], found["disk"]
    there = "" if found["available"] is None else f"; {found['available'] / 1e9:,.1f} GB are free on {found['device']}"
    process = f", and {found['process'] / 1e9:,.1f} GB of the process itself" if found["process"] else ""
    _put(
        f"memory     {found['memory'] / 1e9:,.1f} GB in the largest phase{process}; runs took up to a third more"
        f"{there}\n"
        f"disk       {disk['state'] / 1e9:,.1f} GB for the state of the run, {disk['folder'] / 1e9:,.1f} GB for the "
        "model\n"
        f"time       {duration(found['seconds'])} at {rate['flops_per_second'] / 1e12:,.3g} TFLOP/s "
        f"({rate['source']}); evaluation, the audit and the checks of the folder come on top\n"
    )


def print_sensitivity(found: dict) -> None:
    """A row for each place, in the model's order, and what the figures are."""
    of = "its distance from itself" if found["objective"] == "encoder" else "the loss on the data"
    table(
        f"closing {found['share']:.0%} of one place's units alone, those that {found['score']} ranks last",
        ("place", "units", "closed", f"saves of the {found['cost']}", "loss rises by"),
        [
            (row["site"], f"{row['units']:,}", f"{row['closed']:,}", f"{row['saves']:.2%}", f"{row['rise']:+.4f}")
            for row in found["sites"]
        ],
    )
    _put(
        f"loss       {found['loss']:.4f} with all units ({of}), on {found['sequences']:,} training rows of "
        f"{found['data']}; nothing was trained, and places closed together lose otherwise than the sum\n"
    )


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(42.1), duration(5000)
        ('42 s', '1.4 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def print_audit(found: dict) -> None:
    from ibprune.audit_output import audit_table, further_table

    table(f"information in bits, {found['data']['n']:,} inputs of {found['data']['name']}", *audit_table(found))
    header, rows = further_table(found)
    if rows:
        table("V-information about frequent tokens, and what both models share (lower bound), in bits", header, rows)
    failed = [check["id"] for check in found["checks"] if check["status"] == "fail"]
    if failed:
        _put(f"failed checks: {', '.join(failed)}\n")
    if found["headline"]:
        _put(found["headline"] + "\n")


def print_conversion(report: dict, output: str) -> None:
    _put(
        f"{report['pruned']['params']:,} of {report['dense']['params']:,} parameters; written to {output}; loads with "
        f"{WAYS[report['verify']['tier']]} (checked, max difference {report['verify']['max_abs_diff']:.1e})\n"
    )


def print_speeds(found: dict) -> None:
    from ibprune.verdict import fewer, size

    rows = []
    for cell in found["cells"]:
        sides = [cell["dense"], cell["pruned"]]
        ms = [f"{s['ms']['median']:.2f} ({s['ms']['q1']:.2f}-{s['ms']['q3']:.2f})" for s in sides]
        rate = " -> ".join(f"{s['per_second']:,.0f}" for s in sides)
        peak = " -> ".join(f"{s['peak_bytes'] / 1e6:,.1f}" for s in sides)
        gain = f"{cell['speedup']['median']:.2f} ({cell['speedup']['q1']:.2f}-{cell['speedup']['q3']:.2f})"
        what = f"{cell['phase']}, {cell['runtime']}, {size(cell)}"
        rows.append((what, *ms, rate, peak, gain, f"{fewer(cell):.2f}"))
    env, sides = found["env"], (found["dense"], found["pruned"])
    header = ("", "dense ms", "pruned ms", "per second", "peak MB", "times as fast", "times fewer MACs")
    table(f"{found['dense']['id']} and {found['pruned']['id']}, medians (quartiles)", header, rows)
    params = " -> ".join(f"{s['params']:,}" for s in sides)
    files = " -> ".join("-" if s["file_bytes"] is None else f"{s['file_bytes'] / 1e6:,.1f} MB" for s in sides)
    _put(
        f"parameters {params}; file {files}\n"
        f"{env['device']}, {env['threads']} thread(s), {env['precision']}; {found['unit']}; peak: {env['memory']}\n"
        + "".join(f"{line}\n" for line in found["verdict"])
    )


def print_benchmark(results: list, estimators: tuple[str, ...], n: int, n_seeds: int) -> None:
    def mean_error(chosen: list) -> str:
        errors = [abs(r.error) for r in chosen if r.error is not None]
        return f"{sum(errors) / len(errors):.3f}" if len(errors) == len(chosen) else f"{len(errors)}/{len(chosen)}"

    def total_error(name: str) -> str:
        return mean_error([r for r in results if r.estimator == name])

    rows = []
    for task in dict.fromkeys(r.task for r in results):
        mine = [r for r in results if r.task == task]
        values = []
        for name in estimators:
            found = [r.estimate.value for r in mine if r.estimator == name and r.estimate.value is not None]
            values.append(f"{sum(found) / len(found):.3f}" if found else "-")
        rows.append((task, f"{mine[0].truth:.3f}", *values))
    rows.append(
        ("mean absolute error", "", *(mean_error([r for r in results if r.estimator == e]) for e in estimators))
    )
    table(f"nats, mean over {n_seeds} seed(s), {n:,} samples", ("task", "true", *estimators), rows)


def estimate_line(found: dict) -> str:
    lines = []
    for record in found["estimators"].values():
        value = "-" if record["value"] is None else f"{record['value']:.4f}"
        spread = "" if record["ci95"] is None else f" [{record['ci95'][0]:.4f}, {record['ci95'][1]:.4f}]"
        lines.append(f"{value}{spread} nats, {record['status']} ({record['estimator']}, n = {record['n']:,})")
    return "\n".join(lines) + "\n"
