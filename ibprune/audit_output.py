"""What an audit leaves behind: audit.json, its plots, and the table of the model card and the terminal."""

import json
from pathlib import Path

from ibprune.markdown import code, plain
from ibprune.plots import draw_audit
from ibprune.statuses import layer_status


def write_audit(found: dict, folder: Path) -> None:
    """Writes `audit.json`, strict JSON, and the plots under `audit/`."""
    (folder / "audit.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    plots = folder / "audit"
    plots.mkdir()
    draw_audit(found, plots)


def audit_table(found: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and one row per layer: brackets in bits, "-" where nothing was measured."""
    labelled = found["labels"] is not None
    header = ("layer", "I(X; L), dense", "I(X; L), pruned", "retained", "at own scale")
    header += ("V-info, dense", "V-info, pruned", "status") if labelled else ("status",)
    rows = []
    for layer in found["layers"]:
        info, label = layer["I_XL"], layer["V_LY"]
        kept = own = "-"
        if info["retained"] is not None:
            kept = f"{info['retained']:.0%} [{info['retained_ci95'][0]:.0%}, {info['retained_ci95'][1]:.0%}]"
            own = "-" if info["retained_relative"] is None else f"{info['retained_relative']:.0%}"
        values = [_value(label[side]) for side in ("before", "after")] if labelled else []
        brackets = [_bracket(info[side]) for side in ("before", "after")]
        rows.append((layer["name"], *brackets, kept, own, *values, layer_status(layer)))
    return header, rows


def further_table(found: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of what was asked beyond the labels, tokens and the pair; no rows if nothing was."""
    asked = [key for key in ("V_token", "V_next", "I_pair") if any(layer[key] for layer in found["layers"])]
    names = {
        "V_token": ("this token, dense", "this token, pruned"),
        "V_next": ("next token, dense", "next token, pruned"),
        "I_pair": ("dense with itself", "dense with pruned"),
    }
    header = ("layer", *(name for key in asked for name in names[key]), "status")
    rows = []
    for layer in found["layers"] if asked else ():
        values, statuses = [], []
        for key in asked:
            sides = ("self", "value") if key == "I_pair" else ("before", "after")
            record = layer[key] or dict.fromkeys(sides) | {"status": "not_applicable"}
            values += [_value(record[side]) for side in sides]
            statuses.append(record["status"])
        rows.append((layer["name"], *values, next((status for status in statuses if status != "ok"), "ok")))
    return header, rows


def audit_intro(found: dict) -> str:
    """What the figures of the table are, in Markdown."""
    return (
        f"Information in bits on {found['data']['n']:,} held-out inputs of {code(found['data']['name'])} "
        f"({found['layers'][0]['pooling']} pooling). I(X; L) is a bracket through a known noise, calibrated on the "
        "dense model and then frozen; 'at own scale' lets the noise follow the scale of the pruned features; V-info is "
        "what a cross-fitted probe can use about the labels. Statuses other than ok say why a figure must not be "
        "quoted (`audit.json`)."
    )


def audit_section(found: dict) -> str:
    """The section of the model card."""
    header, rows = audit_table(found)
    lines = ["## What each layer kept", "", audit_intro(found), "", *_markdown(header, rows)]
    header, rows = further_table(found)
    if rows:
        lines += [
            "V-information about frequent tokens, and a lower bound of what both models share, in bits:",
            "",
            *_markdown(header, rows),
        ]
    if found["headline"]:
        lines += [plain(found["headline"]), ""]
    failed = [check["id"] for check in found["checks"] if check["status"] == "fail"]
    if failed:
        lines += [f"Failed checks: {', '.join(failed)}.", ""]
    return "\n".join(lines)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 2) + "---|"]
    return [*lines, *("| " + " | ".join(map(plain, row)) + " |" for row in rows), ""]


def _bracket(side: dict) -> str:
    return "-" if side["lower"] is None else f"{side['lower']:.2f} to {max(side['upper'], side['lower']):.2f}"


def _value(side: dict | None) -> str:
    if side is None or side["value"] is None:
        return "-"
    return f"{side['value']:.2f} ± {(side['ci95'][1] - side['ci95'][0]) / 2:.2f}"
