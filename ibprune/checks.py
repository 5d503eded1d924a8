"""What an audit must not contradict, and the sentence that may be quoted when it does not."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ibprune.statuses import scale_changed

SIDES = ("before", "after")


def hard_checks(equal_layers: list[str], before: dict, after: dict, records: list[dict]) -> list[dict]:
    """What cannot be otherwise if the figures are right; each names the layers that break it.

    Args:
        equal_layers: From `untouched`.
        before, after: Features by layer, (n, d).
        records: The layers of the audit.
    """
    names = [record["name"] for record in records]
    differ = [name for name in equal_layers if not np.array_equal(before[name], after[name])]
    labelled = [record["name"] for record in records if record["V_LY"]["status"] != "not_applicable"]
    return [
        _check("anchor_equal", differ, equal_layers, "layers before the first changed weight differ"),
        _check("dpi_label", [r["name"] for r in records if _above_labels(r)], labelled, "exceeds the labels' entropy"),
        _check("monotone_in_sigma", [r["name"] for r in records if _rises(r)], names, "information rises with noise"),
        _check(
            "bounds_ordered", [r["name"] for r in records if _crossed(r)], names, "the bounds contradict each other"
        ),
    ]


def apply_checks_(records: list[dict], checks: list[dict]) -> None:
    """A failed check turns the statuses of its layers to "inconsistent"."""
    for check in checks:
        for record in records:
            if record["name"] not in check["layers"]:
                continue
            record["warnings"].append({"code": check["id"].upper(), "msg": check["msg"]})
            if check["id"] != "dpi_label":
                for side in SIDES:
                    record["I_XL"][side]["status"] = "inconsistent"
            if check["id"] in ("anchor_equal", "dpi_label"):
                record["V_LY"]["status"] = "inconsistent"


def untouched(before: nn.Module, after: nn.Module, layers: dict[str, tuple[str, str]]) -> list[str]:
    """Layers that read only weights which are equal in both models.

    In a transformers model the order of registration is the order of use, so everything before the
    first changed weight counts; in another module only when no weight changed at all.
    """
    mine, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (before, after))
    changed = {
        name
        for name in mine.keys() | theirs.keys()
        if name not in mine
        or name not in theirs
        or not torch.equal(mine[name].detach().cpu(), theirs[name].detach().cpu())
    }
    if not changed:
        return list(layers)
    if not isinstance(before, PreTrainedModel):
        return []
    places = {path: i for i, path in enumerate(path for path, _ in before.named_modules())}
    order = sorted(mine, key=lambda name: places[name.rpartition(".")[0]])  # buffers beside their parameters
    found = []
    for layer, (path, side) in layers.items():
        inside: list[int] = []
        while not inside and path:  # an activation reads what is made around it
            inside = [i for i, name in enumerate(order) if name.startswith(path + ".")]
            path = path.rpartition(".")[0]
        if inside and changed <= set(order[inside[0] if side == "in" else inside[-1] + 1 :]):
            found.append(layer)
    return found


def headline(found: dict) -> str | None:
    """The sentence to quote; None unless every status behind it is ok."""
    last = found["layers"][-1]
    info, label = last["I_XL"], last["V_LY"]
    if any(info[side]["status"] != "ok" for side in SIDES) or info["retained"] is None:
        return None
    if label["status"] not in ("ok", "not_applicable") or scale_changed(last):
        return None
    low, high = info["retained_ci95"]
    text = (
        f"At {last['name']} the pruned model keeps {info['retained']:.0%} [{low:.0%}, {high:.0%}] of the "
        f"{info['before']['lower']:.1f} bits about its input that the dense model resolves at the audit's noise"
    )
    if label["status"] == "not_applicable":
        return text + f" ({found['data']['n']:,} inputs)."
    change = label["delta"]
    return text + (
        f", and {label['after']['value']:.2f} of {label['before']['value']:.2f} bits of usable label information "
        f"(change {change['value']:+.2f} [{change['ci95'][0]:+.2f}, {change['ci95'][1]:+.2f}]; "
        f"{found['data']['n']:,} inputs)."
    )


def _check(id: str, broken: list[str], applies: list, why: str) -> dict:
    status = "not_applicable" if not applies else "fail" if broken else "pass"
    return {"id": id, "status": status, "layers": broken, **({"msg": why} if broken else {})}


def _above_labels(record: dict) -> bool:
    sides = [record["V_LY"][side] for side in SIDES]
    return any(side and side["ci95"] and side["ci95"][0] > record["V_LY"]["H_ceiling"] + 1e-9 for side in sides)


def _rises(record: dict) -> bool:
    curve = record["I_XL"].get("curve")
    return bool(curve) and any(curve[side]["rises"] for side in SIDES)


def _crossed(record: dict) -> bool:
    sides = [record["I_XL"][side] for side in SIDES]
    return any(side["ci95"] is not None and side["ci95"][1] < side["ci95"][0] for side in sides)
