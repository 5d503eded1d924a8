"""What a bench says in words: how much faster, beside the MACs, and what was measured that held it back."""

LITTLE = 0.5  # of the gain in MACs: less speed than that asks for a reason
ROUNDER = 0.9  # rounder widths must take less than this share of the time in three of four runs to be named


def verdict(found: dict) -> list[str]:
    """Lines for each runtime and phase, from the figures of `ibprune.bench` alone.

    A cell whose gain in speed is below half of its gain in MACs is explained by what was measured there: the time to
    start operations, to read weights, and outside of layers; attention's products; rows of embeddings; widths.
    """
    lines = []
    for runtime, phase in dict.fromkeys((cell["runtime"], cell["phase"]) for cell in found["cells"]):
        cells = [cell for cell in found["cells"] if (cell["runtime"], cell["phase"]) == (runtime, phase)]
        least, most = (choose(cells, key=speed) for choose in (min, max))
        range_ = f"{speed(least):.2f}" if least is most else f"{speed(least):.2f} to {speed(most):.2f}"
        lines.append(
            f"{phase}, {runtime}: {range_} times as fast, least at {size(least)}, where MACs are 1/{fewer(least):.2f} "
            f"of the dense model's{_doubt(least)}"
        )
        slow = [cell for cell in cells if speed(cell) - 1 < LITTLE * max(fewer(cell) - 1, 0.1)]
        if slow:
            worst = min(slow, key=lambda cell: (speed(cell) - 1) / max(fewer(cell) - 1, 0.1))
            reasons = _reasons(found, worst) or ["no wall that was measured explains it"]
            lines += [f"  at {size(worst)}: {reason}" for reason in reasons]
    return lines


def speed(cell: dict) -> float:
    """How many times as fast the pruned model is."""
    return cell["speedup"]["median"]


def fewer(cell: dict) -> float:
    """How many times fewer MACs it takes."""
    return cell["dense"]["macs"] / cell["pruned"]["macs"]


def size(cell: dict) -> str:
    """The size of a cell's input."""
    return f"{cell['batch']}" + (f" x {cell['length']} tokens" if cell["length"] else " picture(s)")


def _doubt(cell: dict) -> str:
    low, high = cell["speedup"]["q1"], cell["speedup"]["q3"]
    return " (its quartiles hold 1: no difference can be told)" if low <= 1 <= high else ""


def _reasons(found: dict, cell: dict) -> list[str]:
    return [*_lookups(found), *_walls(found, cell), *_elsewhere(cell), *_attention(cell), *_widths(found, cell)]


def _lookups(found: dict) -> list[str]:
    dense, pruned = found["dense"], found["pruned"]
    removed, rows = (dense[key] - pruned[key] for key in ("params", "lookup_params"))
    if removed <= 0 or rows < 0.2 * removed:
        return []
    return [f"{rows / removed:.0%} of the {removed:,} removed parameters were looked up in embeddings: no MACs there"]


def _walls(found: dict, cell: dict) -> list[str]:
    """What no width changes (starting operations), and what falls with the bytes rather than with the MACs."""
    dense, pruned = cell["dense"], cell["pruned"]
    total, walls = pruned["ms"]["median"], pruned["walls_ms"]
    lines = []
    if walls["operations"] is not None and walls["operations"] > 0.3 * total:
        lines.append(
            f"starting {pruned['operations']:,} operations (dense: {dense['operations']:,}) takes at least "
            f"{walls['operations']:.2f} of {total:.2f} ms, whatever their widths"
        )
    if walls["weights"] > 0.5 * total and walls["weights"] > walls["products"]:
        ratio = found["dense"]["read_bytes"] / found["pruned"]["read_bytes"]
        lines.append(
            f"reading {found['pruned']['read_bytes'] / 1e6:,.1f} MB of weights once takes about {walls['weights']:.2f} "
            f"of {total:.2f} ms, so the bound is their ratio: {ratio:.2f} times"
        )
    return lines


def _elsewhere(cell: dict) -> list[str]:
    dense, pruned = cell["dense"], cell["pruned"]
    if pruned["layers_ms"] is None:
        return []
    outside = [side["ms"]["median"] - side["layers_ms"] for side in (dense, pruned)]
    total = pruned["ms"]["median"]
    if outside[1] < 0.3 * total or outside[0] / outside[1] > 0.8 * fewer(cell):
        return []
    return [
        f"{outside[1]:.2f} of {total:.2f} ms pass outside of linear layers and convolutions, {outside[0]:.2f} in the "
        f"dense model; operations started: {pruned['operations']:,}, and {dense['operations']:,} in the dense model"
    ]


def _attention(cell: dict) -> list[str]:
    dense, pruned = cell["dense"], cell["pruned"]
    if pruned["batched_macs"] < 0.15 * pruned["macs"]:
        return []
    batched = dense["batched_macs"] / pruned["batched_macs"]
    others = (dense["macs"] - dense["batched_macs"]) / max(pruned["macs"] - pruned["batched_macs"], 1)
    if batched > 0.9 * others:
        return []
    return [
        f"attention's products are {pruned['batched_macs'] / pruned['macs']:.0%} of the MACs and fell "
        f"{batched:.2f} times only, those of layers {others:.2f} times"
    ]


def _widths(found: dict, cell: dict) -> list[str]:
    """Where a MAC became dearer, and whether rounder widths would have helped."""
    dense, pruned = (cell[side]["macs"] / cell[side]["ms"]["median"] / 1e6 for side in ("dense", "pruned"))
    lines = []
    if pruned < 0.8 * dense:
        lines.append(f"MACs pass at {pruned:.1f} G per second, at {dense:.1f} G in the dense model")
    for timed in found["widths"]:
        rows, into, out = timed["shape"]
        to = min((8, 64), key=lambda to: timed[f"share_at_{to}"])
        if timed[f"share_at_{to}"] < ROUNDER:
            lines.append(
                f"a layer of {into} x {out} takes {timed['ms']:.3f} ms at {rows} rows, but {timed[f'ms_at_{to}']:.3f} "
                f"with both widths rounded up to multiples of {to}"
            )
    return lines
