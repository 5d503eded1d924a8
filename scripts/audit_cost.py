"""What an audit costs: one of seven layers and both models, and one layer against the number of inputs and features.

    python scripts/audit_cost.py --model runs/minilm-sst2 --data ../shared/data/sst2 --output benchmarks/audit_cost.json

The texts are training rows: only the clock is read here. Draws the curves beside the output file.
"""

import argparse
import copy
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from ibprune.auditing import Side, audit
from ibprune.console import Quiet
from ibprune.data import load_data
from ibprune.inputs import encode_inputs
from ibprune.measures import DEFAULTS, measure_layer
from ibprune.models import find_source, load_dense

SAMPLES = (600, 1200, 2400, 4800)
FEATURES = (96, 384, 768, 1536)


def one_layer(n: int, d: int) -> float:
    """Seconds for one labelled layer of both models on one thread, as an audit takes each, on Gaussian features."""
    rng = np.random.default_rng([n, d])
    labels = rng.integers(0, 2, n)
    before = rng.standard_normal((n, d)) @ np.diag(np.linspace(2.0, 0.1, d)) + 0.5 * labels[:, None]
    after = before + 0.5 * rng.standard_normal((n, d))
    start = time.perf_counter()
    with threadpool_limits(1):
        measure_layer(before.astype(np.float32), after.astype(np.float32), labels, DEFAULTS)
    return time.perf_counter() - start


def whole(arguments: argparse.Namespace) -> dict:
    """Seconds and memory of a labelled audit of 2,400 inputs."""
    loaded, data = load_dense(find_source(arguments.model)), load_data(arguments.data)
    rows = replace(data, held_out=data.train.select(range(6000)))
    inputs = encode_inputs(rows, loaded.tokenizer, max_length=64, most=2400)
    dense = loaded.model.float()
    other = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = audit(Side("dense", dense), Side("noisy", other), inputs, console=Quiet())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"layers": len(found["layers"]), "inputs": inputs.n, "seconds": found["env"]["seconds"],
            "peak_gib": round(peak, 2), "peak_gib_before": round(before, 2)}  # fmt: skip


def draw(record: dict, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for i, (what, values, other) in enumerate((("inputs", SAMPLES, FEATURES), ("features", FEATURES, SAMPLES))):
        axes = figure.add_subplot(1, 2, i + 1)
        for fixed in other:
            key = [(v, fixed) if what == "inputs" else (fixed, v) for v in values]
            axes.plot(values, [record["layer_s"][f"{n},{d}"] for n, d in key], "o-", label=str(fixed))
        axes.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds a layer, both models")
        axes.legend(title="features" if what == "inputs" else "inputs", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    record = {"threads": torch.get_num_threads(), "audit": whole(arguments), "layer_s": {}}
    print(record["audit"], flush=True)
    torch.set_num_threads(1)
    print("\n| inputs | " + " | ".join(f"{d} features" for d in FEATURES) + " |\n|---|" + "---|" * len(FEATURES))
    for n in SAMPLES:
        for d in FEATURES:
            record["layer_s"][f"{n},{d}"] = round(one_layer(n, d), 2)
        print(f"| {n} | " + " | ".join(f"{record['layer_s'][f'{n},{d}']} s" for d in FEATURES) + " |", flush=True)
    path = Path(arguments.output)
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
