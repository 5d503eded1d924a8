"""Positions for the drawings of a report page: units, intervals of layers, curves; no figure is new."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import EngFormatter, MaxNLocator

from ibprune.plots import short_name
from ibprune.statuses import layer_status

ONE_BY_ONE = ("heads", "kv_groups", "experts")  # few enough units to be looked at singly
LISTED = "kept units"  # the column of places that are no blocks
SUBLAYER = "_sublayer"
INSIDE = {"attention": ("heads", "kv_groups"), "ffn": ("ffn", "experts", "expert_ffn")}  # what goes with a sub-layer
BLOCK = re.compile(r"(?P<stack>.+)\.(?P<number>\d+)\.(?P<kind>[^\d].*)")


@dataclass(frozen=True)
class Cell:
    """The units of one site.

    Attributes:
        name: The site's name in the plan.
        units: Of every unit whether it stays, in order; empty where the share alone is drawn.
        gone: Whether the sub-layer that holds the units went, and all of them with it.
    """

    name: str
    kept: int
    total: int
    units: tuple[bool, ...] = ()
    gone: bool = False

    @property
    def share(self) -> float:
        return self.kept / self.total

    def words(self) -> str:
        """What the drawing shows, for who cannot see it."""
        removed = [str(i) for i, stays in enumerate(self.units) if not stays]
        which = f", removed: {', '.join(removed)}" if removed and not self.gone else ""
        return f"{self.name}: {self.kept:,} of {self.total:,} kept{', the sub-layer was removed' * self.gone}{which}"


@dataclass(frozen=True)
class Stack:
    """A table of cells: a row per block (or site), a column per kind; None where a block has no such units."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def unit_map(plan: dict) -> tuple[dict[str, Cell], tuple[Stack, ...]]:
    """The network of a transformer's plan: the units of the whole model by name, and every stack of blocks.

    The units inside a sub-layer that was removed are drawn as removed: nothing reads their entries in the plan.

    Args:
        plan: The dict of plan.json.

    Example:
        >>> plan = {"n_units": {"h.0.ffn": 8, "hidden": 4}, "keep": {"h.0.ffn": [0, 1], "hidden": [0, 1, 2]}}
        >>> whole, stacks = unit_map(plan)
        >>> whole["hidden"].words(), [(stack.title, stack.columns, len(stack.rows)) for stack in stacks]
        ('hidden: 3 of 4 kept', [('h', ('ffn',), 1)])
    """
    whole: dict[str, Cell] = {}
    stacks: dict[str, dict[str, dict[str, Cell]]] = {}
    for name, total in plan["n_units"].items():
        place, kept = BLOCK.fullmatch(name), plan["keep"][name]
        kind = place["kind"] if place else name
        units = ()
        if kind.rpartition(".")[2] in ONE_BY_ONE:
            stays = set(kept)
            units = tuple(i in stays for i in range(total))
        cell = Cell(name, len(kept), total, units)
        if place is None:
            whole[name] = cell
        else:
            stacks.setdefault(place["stack"], {}).setdefault(place["number"], {})[kind] = cell
    found = []
    for title, blocks in stacks.items():
        rows = {number: _within_sublayers(cells) for number, cells in blocks.items()}
        columns = tuple(dict.fromkeys(kind for cells in rows.values() for kind in cells))
        found.append(Stack(title, columns, tuple(
            (number, tuple(cells.get(kind) for kind in columns)) for number, cells in rows.items()
        )))  # fmt: skip
    return whole, tuple(found)


def listed(title: str, cells: Iterable[Cell]) -> Stack:
    """Cells of any places, a row each."""
    return Stack(title, (LISTED,), tuple((cell.name, (cell,)) for cell in cells))


def _within_sublayers(cells: dict[str, Cell]) -> dict[str, Cell]:
    """The cells of a block, with those of its sub-layers told by what is inside them, where something is."""
    found = dict(cells)
    for kind, cell in cells.items():
        if not kind.endswith(SUBLAYER):
            continue
        prefix, _, name = kind.removesuffix(SUBLAYER).rpartition(".")
        inside = [inner for part in INSIDE.get(name, ()) if (inner := f"{prefix}.{part}".lstrip(".")) in cells]
        if inside:
            del found[kind]
        for inner in inside if not cell.kept else ():
            old = cells[inner]
            found[inner] = Cell(old.name, 0, old.total, (False,) * len(old.units), gone=True)
    return found


@dataclass(frozen=True)
class Axis:
    """Numbers as percentages of a length, with round ticks: (position, label)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def make_axis(values: Iterable[float], *, unit: str = "", most: int = 5, from_zero: bool = False) -> Axis:
    """An axis that holds all finite values with a little room.

    Args:
        unit: "share" writes ticks as percentages, "count" with SI prefixes, "power" as powers of ten, whose exponents
            the values are; else plain numbers.
        most: Intervals between ticks.

    Example:
        >>> make_axis([0.0, 1.0], unit="share", most=2).ticks
        ((4.55, '0%'), (95.45, '100%'))
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    low = min(low, 0.0) if from_zero else low
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axis = Axis(low if from_zero else low - room, high + room, ())
    forms = {"share": "{:.0%}".format, "count": EngFormatter(sep=""), "power": "1e{:g}".format}
    form, whole = forms.get(unit, "{:g}".format), unit == "power"
    ticks = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(axis.low, axis.high)
    inside = [float(tick) for tick in ticks if axis.low <= tick <= axis.high]
    return Axis(axis.low, axis.high, tuple((axis.at(tick), form(round(tick, 9))) for tick in inside))


@dataclass(frozen=True)
class Chart:
    """A curve: its axes, and per point the position, a label and whether it is the dense model's."""

    x_label: str
    y_label: str
    x: Axis
    y: Axis
    points: tuple[tuple[float, float, str, bool], ...]


def make_chart(
    x_label: str, y_label: str, points: Iterable[tuple[float, float, str, bool]], *, unit: str = ""
) -> Chart | None:
    """A chart of (x, y, label, dense) points, or None where fewer than two are finite.

    Args:
        unit: Of x, as for `make_axis`.
    """
    finite = sorted(point for point in points if math.isfinite(point[0]) and math.isfinite(point[1]))
    if len(finite) < 2:
        return None
    x = make_axis((point[0] for point in finite), unit=unit, most=4)
    y = make_axis((point[1] for point in finite), most=4)
    return Chart(x_label, y_label, x, y, tuple((x.at(a), y.at(b), label, dense) for a, b, label, dense in finite))


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


@dataclass(frozen=True)
class Layers:
    """The layers of an audit on two axes: shares of the dense layer's information, and bits about the labels."""

    lines: tuple[AuditLine, ...]
    shares: Axis
    bits: Axis | None

    @property
    def whole(self) -> float:
        """Where the dense layer itself is."""
        return self.shares.at(1.0)


def draw_layers(found: dict) -> Layers:
    """What stayed in every layer of an audit, as `audit.json` has it."""
    layers = found["layers"]
    kept = [layer["I_XL"] for layer in layers if layer["I_XL"]["retained"] is not None]
    sides = [layer["V_LY"][side] for layer in layers for side in ("before", "after")]
    probed = [side for side in sides if side and side["value"] is not None]
    shares = make_axis(
        [1.0, *(x for info in kept for x in info["retained_ci95"])], unit="share", most=2, from_zero=True
    )
    bits = make_axis([x for side in probed for x in side["ci95"]], most=2, from_zero=True)
    return Layers(tuple(_audit_line(layer, shares, bits) for layer in layers), shares, bits if probed else None)


def _audit_line(layer: dict, shares: Axis, bits: Axis) -> AuditLine:
    info, labels = layer["I_XL"], layer["V_LY"]
    retained = None
    if info["retained"] is not None:
        retained = _interval(info["retained"], info["retained_ci95"], shares, "{:.0%}", "{value} retained")
    found = []
    for name, side in (("dense", labels["before"]), ("pruned", labels["after"])):
        measured = side and side["value"] is not None
        words = f"{name} {{value}} bits"
        found.append(_interval(side["value"], side["ci95"], bits, "{:.3f}", words) if measured else None)
    return AuditLine(short_name(layer["name"]), layer_status(layer), retained, tuple(found))


def _interval(value: float, ci95: Sequence[float], axis: Axis, form: str, words: str) -> Interval:
    low, high = ci95
    said = f"{words.format(value=form.format(value))}, 95% interval {form.format(low)} to {form.format(high)}"
    return Interval(axis.at(value), axis.at(low), axis.at(high), said)
