"""Prunes one model by several scores and seeds at equal budget and equal total steps, and prints one table.

    python scripts/compare_scores.py --model runs/minilm-sst2 --data ../shared/data/sst2 --budget 0.3 \\
        --test ../shared/data/sst2/test-labeled.tsv --output benchmarks/sst2_params_0.3.json

A cell is "score:shares" or "score:shares:kinds", with the kinds of units to cut joined by "+". One-shot scores get the
mask-learning steps of VIB as further recovery steps. A cell that is in the output file already is not run again.
Accuracy on the test file, where given, is computed for the finished models only.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import ibprune
from ibprune.console import Quiet, Terminal
from ibprune.data import load_data, read_file
from ibprune.evaluation import evaluate_model
from ibprune.feeding import make_feed
from ibprune.models import find_source, load_tokenizer
from ibprune.recipe import make_recipe


def run_cell(arguments: argparse.Namespace, score: str, shares: str, kinds: str, seed: int) -> dict:
    """Prunes once and returns the figures of the table."""
    mask_steps = arguments.mask_steps if score == "vib" else 0
    values = {
        "model": arguments.model,
        "budget": arguments.budget,
        "cost": arguments.cost,
        "scope": arguments.scope,
        "data": arguments.data,
        "score": score,
        "shares": shares,
        "kinds": tuple(kinds.split("+")) if kinds else (),
        "seed": seed,
        "max_length": arguments.max_length,
        "audit": False,
        "mask_steps": mask_steps,
        "recover_steps": arguments.total_steps - mask_steps,
    }
    if arguments.lr:
        values["lr"] = arguments.lr
    with tempfile.TemporaryDirectory() as scratch:
        values["output"] = str(Path(scratch) / "out")
        result = ibprune.prune(**values, console=Terminal())
        report = result.report
        cell = {
            "score": score,
            "shares": shares,
            "kinds": kinds,
            "seed": seed,
            "steps": [mask_steps, arguments.total_steps - mask_steps],
            "params": report["pruned"]["params"],
            "macs": report["pruned"]["macs"],
            "latency_ratio": report["pruned"]["latency_ms"]["median"] / report["dense"]["latency_ms"]["median"],
            "dense": report["dense"]["metrics"],
            "held_out": report["pruned"]["metrics"],
            "kept": report["kept"],
            "seconds": sum(report["timings_s"].values()),
        }
        if report["vocabulary"]:
            cell["vocabulary"] = report["vocabulary"]
        if arguments.test:
            cell["test"] = test_metrics(result.model, values, arguments.test)
    return cell


def test_metrics(model, values: dict, test: str) -> dict[str, float]:
    recipe, data = make_recipe(values), load_data(values["data"])
    tokenizer = load_tokenizer(find_source(values["output"]))  # the pruned model's own
    _, feed = make_feed(recipe, model, tokenizer, data)
    feed = replace(feed, held_out_set=read_file(Path(test)))
    return evaluate_model(model, feed, feed.objective, console=Quiet(), what="test")


def print_table(cells: list[dict], total_steps: int) -> None:
    names = list(cells[0]["held_out"])
    heads = ["score", "shares", "kinds", "seeds", *names, *(f"test {n}" for n in names if "test" in cells[0])]
    print(f"\nequal total steps: {total_steps}; mean ± standard deviation over seeds; dense: {cells[0]['dense']}\n")
    print("| " + " | ".join([*heads, "parameters", "MACs (M)", "latency ratio", "kept"]) + " |")
    print("|" + "---|" * (len(heads) + 4))
    for key in dict.fromkeys(_key(cell) for cell in cells):
        mine = [cell for cell in cells if _key(cell) == key]

        def spread(values: list[float]) -> str:
            return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")

        row = [*key, ",".join(str(c["seed"]) for c in mine)]
        row += [spread([c[part][n] for c in mine]) for part in ("held_out", "test") if part in mine[0] for n in names]
        row += [f"{mean(c['params'] for c in mine):,.0f}", f"{mean(c['macs'] for c in mine) / 1e6:,.1f}"]
        row += [f"{mean(c['latency_ratio'] for c in mine):.2f}"]
        row += [", ".join(f"{kind} {mean(c['kept'][kind] for c in mine):.0%}" for kind in mine[0]["kept"])]
        print("| " + " | ".join(row) + " |")


def _key(cell: dict) -> tuple[str, str, str]:
    return cell["score"], cell["shares"], cell.get("kinds", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", help="a labelled file, reported once for the finished models")
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--cost", default="params")
    parser.add_argument("--scope", default="model")
    parser.add_argument("--scores", default="vib:probe,fisher:probe,fisher:cost,magnitude:probe,random:probe")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--mask-steps", type=int, default=200)
    parser.add_argument("--total-steps", type=int, default=700)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "scores", "seeds")}
    record = {"settings": settings, "machine": f"{platform.machine()}, CPU", "cells": []}
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            raise SystemExit(f"{path} holds cells of other settings: choose another --output")
    done = {(*_key(cell), cell["seed"]) for cell in record["cells"]}
    for seed in map(int, arguments.seeds.split(",")):
        for cell in arguments.scores.split(","):
            score, shares, kinds = (cell.split(":") + [""])[:3]
            if (score, shares, kinds, seed) not in done:
                record["cells"].append(run_cell(arguments, score, shares, kinds, seed))
                record["versions"] = {"ibprune": ibprune.__version__}
                path.write_text(json.dumps(record, indent=1) + "\n")
    print_table(record["cells"], arguments.total_steps)


if __name__ == "__main__":
    main()
