"""The CIFAR-10 ResNets cut to a share of their MACs and of their measured time: what both give, side by side.

    python scripts/latency_budget.py --weights ../shared/data/models/resnet_cifar10/resnet20-12fca82f.th --budget 0.5

How long a cut model takes does not depend on which channels went: scores are magnitudes, shares equal, nothing is
trained and no data are read. Both models run in turns on batches of 32.
"""

import argparse
import json
from pathlib import Path

import torch
from cifar_resnet import load_dense

import ibprune
from ibprune.console import Quiet
from ibprune.timing import time_forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--round-to", default="1,8")
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    dense = load_dense(arguments.weights, shortcut="conv")
    example = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [(example, torch.arange(32) % 10)]
    for cost in ("macs", "latency"):
        for round_to in map(int, arguments.round_to.split(",")):
            result = ibprune.prune(
                dense, arguments.budget, cost=cost, score="magnitude", shares="equal", round_to=round_to,
                train_loader=batches, example=example, recover_steps=0,
            )  # fmt: skip
            times = time_forward(dense, result.model, {"inputs": example}, rounds=arguments.rounds, console=Quiet())
            before, after = (side["macs"] for side in (result.report["dense"], result.report["pruned"]))
            record = {"cost": cost, "round_to": round_to, "macs": round(after / before, 4)}
            record["latency"] = round(times[1]["median"] / times[0]["median"], 4)
            record["speedup / MAC ratio"] = round(record["macs"] / record["latency"], 3)
            record |= {"ms": [side["median"] for side in times], "iqr": [side["iqr"] for side in times]}
            record["in layers"] = [side["layers"] for side in times]
            if cost == "latency":
                record |= {"predicted": round(result.report["budget"]["achieved"] / result.latency.dense_ms, 4)}
                record |= {"table error": result.latency.error}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
