"""Plots of an audit (information plane, shares, resolution, labels, calibration, heads) and of several budgets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ibprune.statuses import scale_changed

DENSE, PRUNED = "#4477aa", "#cc6677"  # told apart by colour-blind readers and in grey print
FORMATS = ("png", "svg")
LISTS = ("layer", "layers", "h", "block", "blocks")  # what transformers call their lists of blocks
NAMES = {"text.parse_math": False}  # a layer may be called anything, and a dollar is no formula


def draw_audit(found: dict, folder: Path) -> list[str]:
    """Writes every plot that the audit has figures for, as PNG and SVG; returns the names without endings."""
    names = []
    for name, draw in PLOTS.items():
        with rc_context(NAMES):
            figure = draw(found)
        if figure is not None:
            _save(figure, folder, name)
            names.append(name)
    return names


def draw_pareto(found: dict, folder: Path) -> None:
    """Writes what each budget costs against every metric, as pareto.png and pareto.svg.

    Args:
        found: The dict of pareto.json, from `ibprune.ladder.pareto`.
    """
    cost, metrics = found["points"][0]["budget"]["cost"], list(found["dense"]["metrics"])
    label, key = {"latency": ("latency (ms)", ""), "memory": ("memory (bytes)", "memory_bytes")}.get(cost, (cost, cost))
    figure = Figure(figsize=(4.5 * len(metrics), 3.5), layout="constrained")
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), i + 1)
        sides = [found["dense"], *found["points"]]
        spent = [s["latency_ms"]["median"] if cost == "latency" else s[key] for s in sides]
        axes.plot(spent, [s["metrics"][metric] for s in sides], color=PRUNED, zorder=1)
        for side, x, colour in zip(sides, spent, [DENSE] + [PRUNED] * len(found["points"])):
            axes.scatter(x, side["metrics"][metric], color=colour, zorder=2)
            axes.annotate(
                side.get("folder", "dense"), (x, side["metrics"][metric]), xytext=(3, 4), textcoords="offset points"
            )
        axes.set(xlabel=label, ylabel=metric)
    _save(figure, folder, "pareto")


def _save(figure: Figure, folder: Path, name: str) -> None:
    for form in FORMATS:
        metadata = {"Date": None} if form == "svg" else None  # no date inside: the same figures give the same file
        figure.savefig(folder / f"{name}.{form}", dpi=150, bbox_inches="tight", metadata=metadata)


def information_plane(found: dict) -> Figure | None:
    """Input information against label information, a rectangle of both intervals per layer and model."""
    layers = [layer for layer in _measured(found) if layer["V_LY"]["before"] and layer["V_LY"]["before"]["ci95"]]
    if not layers:
        return None
    figure, axes = _figure(7, 5)
    for layer in layers:
        centres = []
        for side, colour in (("before", DENSE), ("after", PRUNED)):
            (x0, x1), (y0, y1) = layer["I_XL"][side]["ci95"], layer["V_LY"][side]["ci95"]
            patch = Rectangle((x0, y0), max(x1 - x0, 1e-3), y1 - y0, facecolor=colour, edgecolor=colour, alpha=0.3)
            axes.add_patch(patch)
            centres.append(((x0 + x1) / 2, (y0 + y1) / 2))
        axes.annotate("", xy=centres[1], xytext=centres[0], arrowprops={"arrowstyle": "->", "color": "0.3"})
        axes.annotate(short_name(layer["name"]), centres[0], fontsize=8, ha="center", va="bottom")
    axes.autoscale_view()
    ceiling = layers[0]["I_XL"]["before"]["ceiling"]
    if axes.get_xlim()[1] > 0.7 * ceiling:
        axes.axvspan(0.7 * ceiling, axes.get_xlim()[1], color="0.9", zorder=0)
    axes.set(xlabel="I(X; L + noise), bits", ylabel="V-information about the labels, bits")
    _legend(axes)
    return figure


def retained(found: dict) -> Figure | None:
    """Share of the dense layer's resolved information that the pruned one keeps, with 95 % intervals."""
    layers = [layer for layer in _measured(found) if layer["I_XL"]["retained"] is not None]
    if not layers:
        return None
    figure, axes = _figure(7, 0.45 * len(layers) + 1.2)
    for i, layer in enumerate(layers):
        value, (low, high) = layer["I_XL"]["retained"], layer["I_XL"]["retained_ci95"]
        hatch = "" if _ok(layer) and not scale_changed(layer) else "///"
        axes.barh(i, value, color=PRUNED, alpha=0.6, hatch=hatch)
        axes.plot([low, high], [i, i], color="black", linewidth=1.5)
    axes.axvline(1.0, color=DENSE, linewidth=1)
    axes.set_yticks(range(len(layers)), [short_name(layer["name"]) for layer in layers])
    axes.invert_yaxis()
    axes.set(xlabel="share of the dense layer's resolved information (hatched: not to be quoted)")
    return figure


def resolution_curves(found: dict) -> Figure | None:
    """I(s) of every layer, dense and pruned, over the noise; the Gaussian cap dashed."""
    layers = _measured(found)
    if not layers:
        return None
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * rows), layout="constrained")
    for i, layer in enumerate(layers):
        axes = figure.add_subplot(rows, columns, i + 1)
        curve, unit = layer["I_XL"]["curve"], layer["noise"]["sigma"]
        noise = [sigma / unit for sigma in curve["sigma"]]
        for side, colour in (("before", DENSE), ("after", PRUNED)):
            if None in curve[side]["lower"]:
                continue
            axes.fill_between(noise, curve[side]["lower"], curve[side]["upper"], color=colour, alpha=0.25)
            axes.plot(noise, curve[side]["lower"], color=colour, linewidth=1.2)
            axes.plot(noise, curve[side]["cap"], color=colour, linewidth=0.8, linestyle="--")
        axes.axvline(1.0, color="0.6", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1.15 * layer["I_XL"]["before"]["ceiling"])
        axes.set_title(short_name(layer["name"]), fontsize=9)
    figure.supxlabel("noise, in multiples of the audit's")
    figure.supylabel("bits")
    return figure


def label_information(found: dict) -> Figure | None:
    """Change of V-information about the labels, with paired 95 % intervals."""
    layers = [layer for layer in found["layers"] if layer["V_LY"].get("delta")]
    if not layers:
        return None
    figure, axes = _figure(7, 0.45 * len(layers) + 1.2)
    for i, layer in enumerate(layers):
        delta = layer["V_LY"]["delta"]
        axes.plot(delta["ci95"], [i, i], color=PRUNED, linewidth=2)
        marker = "o" if layer["V_LY"]["status"] == "ok" else "x"
        axes.plot(delta["value"], i, marker, color=PRUNED)
    axes.axvline(0.0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(layers)), [short_name(layer["name"]) for layer in layers])
    axes.invert_yaxis()
    axes.set(xlabel="change of V-information, bits (x: status not ok)")
    return figure


def calibration(found: dict) -> Figure | None:
    """What the bracket made of synthetic twins whose truth is known."""
    checks = [
        (side, layer["I_XL"][side]["self_check"])
        for layer in _measured(found)
        for side in ("before", "after")
        if "self_check" in layer["I_XL"][side]
    ]
    if not checks:
        return None
    figure, axes = _figure(5, 5)
    for side, check in checks:
        colour = DENSE if side == "before" else PRUNED
        axes.plot([check["truth"]] * 2, [check["lower"], check["upper"]], color=colour, linewidth=3, alpha=0.7)
    high = 1.1 * max(max(check["truth"], check["upper"]) for _, check in checks)
    axes.plot([0, high], [0, high], color="0.4", linewidth=1)
    axes.set(xlabel="true information of the twin, bits", ylabel="bracket, bits", xlim=(0, high), ylim=(0, high))
    _legend(axes)
    return figure


def head_entropy(found: dict) -> Figure | None:
    """Normalised attention entropy of every head, dense and pruned; removed heads hatched."""
    layers = [layer for layer in found["layers"] if layer["heads"] and layer["heads"]["attn_entropy_norm"]]
    if not layers:
        return None
    widest = max(len(side) for layer in layers for side in layer["heads"]["attn_entropy_norm"])
    figure = Figure(figsize=(0.5 * widest + 4, 0.4 * len(layers) + 1.6), layout="constrained")
    image = None
    for i, title in enumerate(("dense", "pruned")):
        axes = figure.add_subplot(1, 2, i + 1)
        cells = np.full((len(layers), widest), np.nan)
        for row, layer in enumerate(layers):
            values = layer["heads"]["attn_entropy_norm"][i]
            cells[row, : len(values)] = [np.nan if value is None else value for value in values]
            for head in (head for head, value in enumerate(values) if value is None):
                axes.add_patch(Rectangle((head - 0.5, row - 0.5), 1, 1, facecolor="0.95", edgecolor="0.5", hatch="///"))
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        names = [short_name(layer["name"]) + ("" if layer["heads"]["aligned"] else " *") for layer in layers]
        axes.set_yticks(range(len(layers)), names if i == 0 else [""] * len(names))
        axes.set(title=title, xlabel="head")
    figure.colorbar(image, ax=figure.axes, label="attention entropy, share of the largest")
    unknown = "; *: order of the pruned heads unknown" if not all(x["heads"]["aligned"] for x in layers) else ""
    figure.supxlabel(f"hatched: removed{unknown}", fontsize=8)
    return figure


PLOTS: dict[str, Callable[[dict], Figure | None]] = {
    "information_plane": information_plane,
    "retained": retained,
    "resolution_curves": resolution_curves,
    "label_information": label_information,
    "calibration": calibration,
    "head_entropy": head_entropy,
}


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _measured(found: dict) -> list[dict]:
    return [
        layer for layer in found["layers"] if all(layer["I_XL"][s]["lower"] is not None for s in ("before", "after"))
    ]


def _ok(layer: dict) -> bool:
    return all(layer["I_XL"][side]["status"] == "ok" for side in ("before", "after"))


def _legend(axes) -> None:
    handles = [Rectangle((0, 0), 1, 1, color=colour, alpha=0.5) for colour in (DENSE, PRUNED)]
    axes.legend(handles, ["dense", "pruned"], frameon=False)


def short_name(name: str) -> str:
    """A layer's name for a plot: one of a transformer's list of blocks by its number, any other as it is.

    Example:
        >>> short_name("encoder.layer.3"), short_name("stages.0.layers.1"), short_name("classifier.1")
        ('block 3', 'stages.0.layers.1', 'classifier.1')
    """
    head, _, tail = name.rpartition(".")
    above, _, last = head.rpartition(".")
    plain = last in LISTS and "." not in above and not any(letter.isdigit() for letter in above)
    return f"block {tail}" if tail.isdigit() and plain else name
