"""The report of a run: what was asked, what was reached, what it cost, as JSON and as a table."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SCHEMA = "ibprune.report/1"
PACKAGES = ("ibprune", "torch", "transformers", "accelerate", "datasets", "safetensors")


@dataclass
class Side:
    """One model, dense or pruned.

    Attributes:
        params: Parameters, tied tensors once.
        macs: Multiply-accumulates of one sequence of `macs_length` tokens (a MAC is two FLOPs).
        file_bytes: Size of the safetensors.
        metrics: By name, on the held-out data.
        latency_ms: {"median", "iqr"} of a forward pass.
        params_blocks, macs_blocks: The same without embeddings and heads.
    """

    params: int
    macs: int
    file_bytes: int
    metrics: dict[str, float]
    latency_ms: dict[str, float]
    params_blocks: int = 0
    macs_blocks: int = 0


@dataclass
class Report:
    """Everything a run found; `report.json` in the output folder.

    `vocabulary` says what a cut vocabulary means for held-out texts, dense and pruned: its rows, the tokens of a
    text, and the share of unknown ones; None where it was not cut.
    """

    dense: Side
    pruned: Side
    budget: dict
    score: str
    seed: int
    model: str
    data: str
    objective: str
    macs_length: int
    latency_input: dict[str, int]
    kept: dict[str, float]
    world_size: int
    device: str
    precision: str
    shares: str
    vocabulary: dict[str, list[float]] | None = None
    verify: dict = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA

    def to_dict(self) -> dict:
        return asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def rows(report: dict) -> list[tuple[str, str, str, str]]:
    """The closing table from a report's dict: (what, dense, pruned, pruned/dense)."""
    dense, pruned = report["dense"], report["pruned"]
    table = []

    def add(name: str, a: float, b: float, form: str) -> None:
        table.append((name, form.format(a), form.format(b), f"{b / a:.3f}" if a else "-"))

    add("parameters", dense["params"], pruned["params"], "{:,}")
    add("  in blocks", dense["params_blocks"], pruned["params_blocks"], "{:,}")
    add(f"MACs ({report['macs_length']} tokens)", dense["macs"] / 1e6, pruned["macs"] / 1e6, "{:,.1f} M")
    add("  in blocks", dense["macs_blocks"] / 1e6, pruned["macs_blocks"] / 1e6, "{:,.1f} M")
    add("file", dense["file_bytes"] / 1e6, pruned["file_bytes"] / 1e6, "{:,.1f} MB")
    forms = {"rows": ("vocabulary", "{:,}"), "tokens_per_text": ("tokens per held-out text", "{:.2f}")}
    forms["unknown"] = ("unknown tokens", "{:.3%}")
    for key, (name, form) in forms.items() if report["vocabulary"] else ():
        add(name, *report["vocabulary"][key], form)
    shape = report["latency_input"]
    latency = [
        f"{side['latency_ms']['median']:.1f} ± {side['latency_ms']['iqr'] / 2:.1f} ms" for side in (dense, pruned)
    ]
    ratio = pruned["latency_ms"]["median"] / dense["latency_ms"]["median"]
    table.append((f"latency ({shape['batch']} x {shape['length']})", *latency, f"{ratio:.3f}"))
    for name in dense["metrics"]:
        add(name, dense["metrics"][name], pruned["metrics"][name], "{:.4f}")
    return table
