"""Several budgets from one mask run against a run made for each: the loss of every held-out example, compared in pairs.

    python scripts/ladder.py benchmarks/ladder/stories.yaml

The YAML file is a recipe with several budgets, and `seeds`. Every seed is pruned once to all of them and once to each
alone, with the same `mask_steps` (divided among the budgets of the one run) and the same `recover_steps` for every
model. What a seed gave is kept in `cells/` beside the file, so that a run that stopped goes on; the record is written
as JSON beside it. Differences are those of `benchmark.py`: averaged over seeds, with 95 % bootstrap intervals over
examples, which say nothing of the seeds; what each seed has stands beside them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import yaml
from benchmark import judge, make_own_feed, paired

import ibprune
from ibprune.console import Terminal

KEYS = ("metrics", "params", "macs")


def run(values: dict, output: Path) -> tuple[dict[str, dict], float]:
    """Prunes to one budget or several: what each pruned model has and makes of every example; and the seconds."""
    started = time.perf_counter()
    results = ibprune.prune(**values, audit=False, output=str(output), console=Terminal())
    seconds = time.perf_counter() - started
    found, several = {}, isinstance(results, tuple)
    for result in results if several else (results,):
        budget = f"{result.report['budget']['keep']:g}"
        folder = output / budget if several else output
        feed = make_own_feed(values | {"output": str(folder)}, result.model)
        found[budget] = {key: result.report["pruned"][key] for key in KEYS}
        found[budget] |= {"kept": result.report["kept"], "nll": judge(result.model, feed)[0]}
        found[budget]["command"] = result.report["command"]
    return found, seconds


def run_seed(values: dict) -> dict:
    """Both ways to the budgets of a recipe, with one seed."""
    with tempfile.TemporaryDirectory() as scratch:
        together, seconds = run(values, Path(scratch) / "together")
        apart, each = {}, {}
        for budget in values["budget"]:
            found, took = run(values | {"budget": budget}, Path(scratch) / f"{budget:g}")
            apart |= found
            each[f"{budget:g}"] = took
    return {"together": together, "apart": apart, "seconds": {"together": seconds, "apart": each}}


def compare(seeds: list[dict], budget: str) -> dict:
    """The models of one budget: the one run's less those made for it."""
    pairs = [(seed["apart"][budget], seed["together"][budget]) for seed in seeds]
    difference, interval = paired([a for a, _ in pairs], [b for _, b in pairs], "nll")
    by_seed = [paired([a], [b], "nll")[0] for a, b in pairs]
    said = [[{key: way[key] for key in (*KEYS, "kept")} for way in pair] for pair in pairs]
    return {
        "budget": budget, "difference": difference, "interval": interval, "difference_by_seed": by_seed,
        "apart": [a for a, _ in said], "together": [b for _, b in said],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="YAML file")
    path = parser.parse_args().recipe
    values = yaml.safe_load(path.read_text())
    seeds, folder = values.pop("seeds"), path.parent / "cells" / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in seeds:
        file, asked = folder / f"{seed}.json", values | {"seed": seed}
        if not file.exists():
            temporary = file.with_suffix(".partial")
            temporary.write_text(json.dumps({"values": asked} | run_seed(asked)))
            temporary.rename(file)
        found.append(json.loads(file.read_text()))
        if found[-1]["values"] != asked:
            raise SystemExit(f"{file} was run with another recipe: delete it.")
    record = {
        "recipe": values, "seeds": seeds, "seconds": [seed["seconds"] for seed in found],
        "commands": [next(iter(seed["together"].values()))["command"] for seed in found],
        "budgets": [compare(found, f"{budget:g}") for budget in values["budget"]],
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    for line in record["budgets"]:
        low, high = line["interval"]
        print(f"{line['budget']}: {line['difference']:+.4f} [{low:+.4f}, {high:+.4f}] {line['difference_by_seed']}")


if __name__ == "__main__":
    main()
