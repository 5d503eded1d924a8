"""Audits one dense model against an unpruned copy, cuts of its blocks before and after recovery, and random weights.

    python scripts/audit_levels.py --model runs/minilm-sst2 --data ../shared/data/sst2 --output benchmarks/audit_sst2

Writes one audit (JSON and plots) per model and prints two tables, and every place where more pruning reads as more
information.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from ibprune.audit_output import write_audit
from ibprune.auditing import Side, audit
from ibprune.console import Quiet, Terminal
from ibprune.cutting import cut, train_settings
from ibprune.data import load_data
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.evaluation import evaluate_model
from ibprune.feeding import make_feed
from ibprune.inputs import encode_inputs
from ibprune.measures import AuditSettings
from ibprune.models import find_source, load_dense
from ibprune.recipe import make_recipe
from ibprune.trainer import train


def print_table(audits: dict[str, dict], title: str, cell) -> None:
    print(f"\n{title}\n\n| layer | " + " | ".join(audits) + " |\n|---|" + "---|" * len(audits))
    for i, layer in enumerate(next(iter(audits.values()))["layers"]):
        print(f"| {layer['name']} | " + " | ".join(cell(found["layers"][i]) for found in audits.values()) + " |")


def retained(layer: dict) -> str:
    info = layer["I_XL"]
    status = "" if info["after"]["status"] == "ok" else f" ({info['after']['status']})"
    return f"{info['retained']:.0%} [{info['retained_ci95'][0]:.0%}, {info['retained_ci95'][1]:.0%}]{status}"


def own_scale(layer: dict) -> str:
    share = layer["I_XL"]["retained_relative"]
    return "-" if share is None else f"{share:.0%}"


def label(layer: dict) -> str:
    side, delta = layer["V_LY"]["after"], layer["V_LY"]["delta"]
    half = (delta["ci95"][1] - delta["ci95"][0]) / 2
    return f"{side['value']:.2f}, corrected {side['corrected']:.2f} ({delta['value']:+.2f} ± {half:.2f})"


def violations(audits: dict[str, dict], order: list[str]) -> list[str]:
    """Places where the later of two neighbours in `order` reads as more, and whether beyond its paired error."""
    found = []
    for less, more in zip(order, order[1:]):
        for a, b in zip(audits[less]["layers"], audits[more]["layers"]):
            for key, value in (("I(X; L)", ("I_XL", "after", "lower")), ("V-info", ("V_LY", "after", "value"))):
                x, y = (record[value[0]][value[1]][value[2]] for record in (a, b))
                if y > x + 1e-9:
                    half = (a[value[0]]["delta"]["ci95"][1] - a[value[0]]["delta"]["ci95"][0]) / 2
                    other = (b[value[0]]["delta"]["ci95"][1] - b[value[0]]["delta"]["ci95"][0]) / 2
                    beyond = y - x > (half**2 + other**2) ** 0.5
                    found.append(f"{a['name']}, {key}: {less} {x:.2f} < {more} {y:.2f} bits"
                                 f"{', beyond its error' if beyond else ''}")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--budgets", default="0.5,0.1")
    parser.add_argument("--score", default="fisher")
    parser.add_argument("--recover-steps", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    folder, console = Path(arguments.output), Terminal()
    loaded, data = load_dense(find_source(arguments.model)), load_data(arguments.data)
    dense = loaded.model.float()
    inputs = encode_inputs(data, loaded.tokenizer, max_length=arguments.max_length, most=2400)
    torch.manual_seed(arguments.seed)
    models, plans = {"copy": copy.deepcopy(dense)}, {}
    for budget in map(float, arguments.budgets.split(",")):
        recipe = make_recipe({
            "model": arguments.model, "data": arguments.data, "budget": budget, "scope": "blocks",
            "score": arguments.score, "shares": "cost", "max_length": arguments.max_length, "seed": arguments.seed,
            "recover_steps": arguments.recover_steps,
        })  # fmt: skip
        accelerator = make_accelerator(recipe.precision, seed=arguments.seed)
        recipe, feed = make_feed(recipe, dense, loaded.tokenizer, data)
        student, plan, *_ = cut(dense, recipe, feed, accelerator, console)
        plans |= {f"{budget:g}": plan, f"{budget:g} recovered": plan}
        models[f"{budget:g}"] = copy.deepcopy(student)
        train(student, loss_with(feed.objective, dense, accelerator), feed.train,
              train_settings(recipe, recipe.recover_steps), accelerator=accelerator, phase="recovering",
              console=console)  # fmt: skip
        models[f"{budget:g} recovered"] = student
    models["random weights"] = AutoModelForSequenceClassification.from_config(dense.config).eval()
    audits, accuracy = {}, {}
    for name, model in models.items():
        settings = AuditSettings(seed=arguments.seed)
        audits[name] = audit(
            Side("dense", dense), Side(name, model), inputs, settings=settings, plan=plans.get(name), console=console
        )
        what = {"console": Quiet(), "what": name}
        accuracy[name] = evaluate_model(model, feed, feed.objective, **what)["accuracy"]
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        write_audit(audits[name], place)
    (folder / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    print("accuracy, held-out: " + ", ".join(f"{name} {value:.4f}" for name, value in accuracy.items()))
    print_table(audits, "Retained at the dense model's noise (lower bounds)", retained)
    print_table(audits, "Retained at each model's own scale", own_scale)
    print_table(audits, "V-information about the label, bits", label)
    budgets = [f"{float(budget):g}" for budget in arguments.budgets.split(",")]
    for stage in ("", " recovered"):
        order = ["copy", *(budget + stage for budget in budgets), "random weights"]
        print(f"\nMore pruning, more information ({' > '.join(order)}):")
        print("\n".join(f"- {line}" for line in violations(audits, order)) or "- nowhere")
    failed = [
        (n, c["id"], c["layers"]) for n, found in audits.items() for c in found["checks"] if c["status"] == "fail"
    ]
    print(f"\nfailed checks: {failed or 'none'}; seconds: {[found['env']['seconds'] for found in audits.values()]}")


if __name__ == "__main__":
    main()
