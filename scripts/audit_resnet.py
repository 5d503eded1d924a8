"""Audits the trained CIFAR-10 ResNet-20, a plain module whose layers are named here, before and after pruning.

    python scripts/audit_resnet.py --data ../shared/data/cifar10 --output benchmarks/audit_resnet20.json \\
        --weights ../shared/data/models/resnet_cifar10/resnet20-12fca82f.th

The 1,000 test images are read; nothing is chosen by what is found.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from cifar_resnet import Augmented, ResNet, load_dense, load_images, log_likelihoods

import ibprune
from ibprune.audit_output import audit_table
from ibprune.auditing import Side, audit
from ibprune.console import Terminal
from ibprune.inputs import Inputs

LAYERS = ("conv1", "layer1.2", "layer2.2", "layer3.2", "linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--budgets", default="0.5,0.25", help="shares of the dense MACs to keep")
    parser.add_argument("--recover-steps", type=int, default=100)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    x, y = load_images(arguments.data, list(range(25)), slice(0, 25_000))
    x_test, y_test = load_images(arguments.data, [50], slice(50_000, 51_000))
    digest = hashlib.sha256(x_test.numpy().tobytes()).hexdigest()
    inputs = Inputs("cifar10 test", [{"inputs": part} for part in x_test.split(250)], y_test.tolist(), 0, 0, digest)
    dense = load_dense(arguments.weights)
    torch.manual_seed(0)
    models = {"random weights": ResNet(3).eval()}
    for budget in map(float, arguments.budgets.split(",")):
        for steps in (0, arguments.recover_steps):
            result = ibprune.prune(
                dense, budget, cost="macs", score="fisher", train_loader=Augmented(x, y), example=x[:2],
                recover_steps=steps, console=Terminal(),
            )  # fmt: skip
            models[f"{budget:g}, {steps} steps"] = result.model
    found = {"copy": audit(Side("dense", dense), Side("copy", dense), inputs, layers=LAYERS)}
    found |= {name: audit(Side("dense", dense), Side(name, model), inputs, layers=LAYERS)
              for name, model in models.items()}  # fmt: skip
    for name, one in found.items():
        error = 100 * float(1 - log_likelihoods(models.get(name, dense), x_test, y_test)[1].mean())
        one["test_error"] = error
        header, rows = audit_table(one)
        print(f"\n{name}: test error {error:.1f} %, {one['models']['after']['params']:,} parameters\n")
        print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
        print("failed checks:", [check["id"] for check in one["checks"] if check["status"] == "fail"] or "none")
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
