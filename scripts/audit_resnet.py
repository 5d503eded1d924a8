"""Audits the trained CIFAR-10 ResNet-20, a plain module, at its residual blocks before and after pruning.

    python scripts/audit_resnet.py --data ../shared/data/cifar10 --output benchmarks/audit_resnet20.json \\
        --weights ../shared/data/models/resnet_cifar10/resnet20-12fca82f.th

The 1,000 test images are read; nothing is chosen by what is found.
"""

import argparse
import json
from pathlib import Path

import torch
from cifar_resnet import Augmented, ResNet, load_dense, load_images, log_likelihoods
from torch.utils.data import DataLoader, TensorDataset

import ibprune
from ibprune.audit_output import audit_table
from ibprune.console import Terminal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--budgets", default="0.5,0.25", help="shares of the dense MACs to keep")
    parser.add_argument("--recover-steps", type=int, default=100)
    parser.add_argument("--layers", default="", help="comma list (default: what ibprune.audit chooses)")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    x, y = load_images(arguments.data, list(range(25)), slice(0, 25_000))
    x_test, y_test = load_images(arguments.data, [50], slice(50_000, 51_000))
    loader = DataLoader(TensorDataset(x_test, y_test), batch_size=250)
    dense = load_dense(arguments.weights, shortcut="pad")
    torch.manual_seed(0)
    models = {"random weights": ResNet(3).eval()}
    for budget in map(float, arguments.budgets.split(",")):
        for steps in dict.fromkeys((0, arguments.recover_steps)):
            result = ibprune.prune(
                dense, budget, cost="macs", score="fisher", train_loader=Augmented(x, y), example=x[:2],
                recover_steps=steps, console=Terminal(),
            )  # fmt: skip
            models[f"{budget:g}, {steps} steps"] = result.model
    layers = tuple(name for name in arguments.layers.split(",") if name)
    found = {
        name: ibprune.audit(dense, model, data=loader, layers=layers)
        for name, model in ({"copy": dense} | models).items()
    }
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
