"""Runs a table of models, budgets, scores and seeds from a YAML file; writes its JSON, a page and plots beside it.

    python scripts/benchmark.py benchmarks/sst2_scores.yaml

    total_steps: 500               # of every cell that names no steps: learned scores spend mask_steps before the cut
    mask_steps: 150
    seeds: [0, 1, 2]
    recipe: {max_length: 64}       # recipe keys of every cell
    rows:                          # each with recipe keys of its own
      - {name: sst2 0.3, model: runs/minilm-sst2, data: ../shared/data/sst2, budget: 0.3}
    scores:                        # the first is what the others are compared with
      - vib
      - {label: fisher refitted, score: fisher, reconstruct: true}

Every cell (row, score, seed) is a file in `cells/` beside the YAML file, so that a run that stopped goes on; a cell
whose settings changed is an error. Choices are made on dev. A row may name a labelled file `test`: it is read once, by
the finished model; leave it out while choosing. Of pictures it is an npz file, of which the held-out split is read.
Scores are compared example by example, on test where there is one: difference in negative log-likelihood and in
agreement with the dense model, averaged over seeds, with 95 % bootstrap intervals over examples, and McNemar's exact
test for every seed. The intervals say nothing about seeds: their deviation stands beside them.
`cifar_resnet.py` and `mnist_lenet.py` do the like for modules of one's own.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import nn

import ibprune
from ibprune.collating import windows
from ibprune.console import Quiet, Terminal
from ibprune.data import read_file
from ibprune.evaluation import evaluate_model
from ibprune.feeding import Feed, find_data, find_pictures, make_feed, make_picture_feed
from ibprune.images import load_images
from ibprune.losses import forward, supervised_loss
from ibprune.models import find_source, load_processor, load_tokenizer
from ibprune.recipe import make_recipe
from ibprune.scores import LEARNED
from ibprune.sites import reads_pictures
from ibprune.subject import load_subject

KEYS = {"total_steps", "mask_steps", "seeds", "recipe", "rows", "scores"}
RESAMPLES = 10_000


@dataclass(frozen=True)
class Cell:
    """One run of the table. `values` are recipe keys, `test` a labelled file or ""."""

    row: str
    label: str
    seed: int
    values: dict
    test: str

    @property
    def file(self) -> str:
        return "__".join(f"{part}".replace(" ", "_").replace("/", "_") for part in (self.row, self.label, self.seed))


def read_table(path: Path) -> list[Cell]:
    """All cells of a YAML file, checked as recipes before any is run."""
    table = yaml.safe_load(path.read_text())
    if not isinstance(table, dict) or set(table) - KEYS or not {"total_steps", "rows", "scores"} <= set(table):
        raise SystemExit(f"{path}: expected the keys {', '.join(sorted(KEYS))}, found {table!r:.200}")
    total, learning = table["total_steps"], table.get("mask_steps", 0)
    cells = []
    for row in table["rows"]:
        own = {key: value for key, value in row.items() if key not in ("name", "test")}
        for score in table["scores"]:
            score = {"score": score} if isinstance(score, str) else dict(score)
            label = score.pop("label", None) or " ".join(f"{value}" for value in score.values())
            steps = learning if score["score"] in LEARNED else 0
            for seed in table.get("seeds", [0]):
                values = {"audit": False, **table.get("recipe", {}), **own, **score, "seed": seed}
                values = {"mask_steps": steps, "recover_steps": total - steps} | values
                make_recipe(values)
                cells.append(Cell(row["name"], label, seed, values, str(row.get("test", ""))))
    if len({cell.file for cell in cells}) < len(cells):
        raise SystemExit(f"{path}: expected a different `label` for every score and `name` for every row.")
    return cells


def run_cell(cell: Cell) -> dict:
    """Prunes once; the figures of the cell and what its model makes of every example."""
    with tempfile.TemporaryDirectory() as scratch:
        values = cell.values | {"output": str(Path(scratch) / "out")}
        result = ibprune.prune(**values, console=Terminal())
        report = result.report
        own = splits(make_own_feed(values, result.model), cell)
        subject = load_subject(make_recipe(values | {"output": f"{scratch}/none"}), Quiet())
    dense = subject.loaded.model.to(next(result.model.parameters()).device).eval()
    read = splits(subject.feed, cell)  # with the dense model's own vocabulary
    found = {
        "settings": {"values": cell.values, "test": cell.test},
        "dense": report["dense"]["metrics"],
        "dev": report["pruned"]["metrics"],
        "kept": report["kept"],
        "params": report["pruned"]["params"],
        "macs": report["pruned"]["macs"],
        "latency_ratio": report["pruned"]["latency_ms"]["median"] / report["dense"]["latency_ms"]["median"],
        "seconds": {phase: report["timings_s"][phase] for phase in ("cut", "recover")},
        "command": report["command"],
        "versions": report["versions"],
        "examples": {split: per_example(result.model, own[split], dense, read[split]) for split in own},
    }
    if cell.test:
        feed = own["test"]
        found["test"] = evaluate_model(result.model, feed, feed.objective, console=Quiet(), what="test")
    return found


def splits(feed: Feed, cell: Cell) -> dict[str, Feed]:
    """What a finished model is judged on: the held-out rows, and those of the test file where there is one."""
    if not cell.test:
        return {"dev": feed}
    rows = load_images(cell.test).held_out if cell.test.endswith(".npz") else read_file(Path(cell.test))
    if feed.objective.name == "causal_lm":
        rows = windows(rows, "text", feed.preprocessor, cell.values["max_length"])
    return {"dev": feed, "test": replace(feed, held_out_set=rows)}


def make_own_feed(values: dict, model: nn.Module) -> Feed:
    """The data as the pruned model reads them, through the tokenizer or the image processor of its folder."""
    recipe, source = make_recipe(values), find_source(values["output"])
    if reads_pictures(model.config.model_type):
        return make_picture_feed(recipe, model, load_processor(source.location), find_pictures(recipe))[1]
    return make_feed(recipe, model, load_tokenizer(source), find_data(recipe, Quiet()))[1]


def per_example(model: nn.Module, feed: Feed, dense: nn.Module, read: Feed) -> dict[str, list]:
    """Loss on the labels of every held-out example; of a classifier whether it was right, and as the dense model."""
    losses, predicted, labels = judge(model, feed)
    _, before, _ = judge(dense, read)
    pairs = zip(predicted, labels, before)
    both = [(int(ours == label), int(ours == theirs)) for ours, label, theirs in pairs]
    return {"nll": losses, "right": [right for right, _ in both], "agrees": [agrees for _, agrees in both]}


@torch.no_grad()
def judge(model: nn.Module, feed: Feed) -> tuple[list[float], list[int], list[int]]:
    """Losses of the held-out examples, and the classes predicted and true, where there are classes."""
    losses, predicted, labels = [], [], []
    device = next(model.parameters()).device
    for batch in feed.held_out():
        batch = {key: value.to(device) for key, value in batch.items()}
        outputs = forward(model, batch)
        losses += [round(value, 6) for value in supervised_loss(feed.objective, outputs, batch).tolist()]
        if feed.objective.name == "classification":
            predicted += outputs.logits.argmax(-1).tolist()
            labels += batch["labels"].tolist()
    return losses, predicted, labels


def compare(first: list[dict], other: list[dict]) -> dict:
    """Two scores over the same seeds, example by example.

    Returns:
        Mean difference in loss (negative: the other is better), its 95 % interval, for every seed the examples
        that only the one or the other gets right, with McNemar's exact p, and of classifiers the difference in how
        often they predict what the dense model does, with its interval.
    """
    difference, interval = paired(first, other, "nll")
    found = {"difference": difference, "interval": interval, "mcnemar": []}
    if first[0]["agrees"]:
        found["agreement"], found["agreement_interval"] = paired(first, other, "agrees")
    for a, b in zip(first, other):
        if a["right"]:
            ours, theirs = np.array(a["right"], bool), np.array(b["right"], bool)
            only_first, only_other = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            p = binomtest(only_other, only_first + only_other).pvalue if only_first + only_other else 1.0
            found["mcnemar"].append({"only_first": only_first, "only_other": only_other, "p": float(p)})
    return found


def paired(first: list[dict], other: list[dict], what: str) -> tuple[float, list[float]]:
    """Mean difference of a figure per example over seeds, and its 95 % bootstrap interval over examples.

    Seeds that hold out the same examples are averaged first; where each holds out some of its own, these are drawn
    apart.
    """
    differences = [np.subtract(b[what], a[what]) for a, b in zip(first, other)]
    if len({len(each) for each in differences}) == 1:
        differences = [np.mean(differences, axis=0)]
    rng = np.random.default_rng(0)
    drawn = [each[rng.integers(0, len(each), (RESAMPLES, len(each)))].mean(1) for each in differences]
    interval = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return float(np.mean([each.mean() for each in differences])), interval.tolist()


def summarise(cells: list[Cell], found: dict[str, dict]) -> list[dict]:
    """One record per row and score."""
    records = []
    for row in dict.fromkeys(cell.row for cell in cells):
        labels = dict.fromkeys(cell.label for cell in cells if cell.row == row)
        by_label = {x: [found[c.file] for c in cells if (c.row, c.label) == (row, x)] for x in labels}
        split = "test" if all("test" in cell for mine in by_label.values() for cell in mine) else "dev"
        first = [cell["examples"][split] for cell in next(iter(by_label.values()))]
        for label, mine in by_label.items():
            records.append({
                "row": row, "score": label, "seeds": [c.seed for c in cells if (c.row, c.label) == (row, label)],
                "steps": [mine[0]["settings"]["values"][key] for key in ("mask_steps", "recover_steps")],
                "dense": {name: mean(values) for name, values in each(mine, "dense").items()},
                **{part: each(mine, part) for part in ("dev", "test") if part in mine[0]},
                "params": [c["params"] for c in mine], "macs": [c["macs"] for c in mine],
                "latency_ratio": [c["latency_ratio"] for c in mine],
                "seconds": each(mine, "seconds"), "kept": each(mine, "kept"),
                "agreement": [mean(c["examples"][split]["agrees"]) for c in mine if c["examples"][split]["agrees"]],
                "compared_on": split, "against_first": compare(first, [c["examples"][split] for c in mine]),
                "commands": [c["command"] for c in mine],
            })  # fmt: skip
    return records


def each(cells: list[dict], part: str) -> dict[str, list[float]]:
    """A figure of every cell under each of its names."""
    return {name: [cell[part][name] for cell in cells] for name in cells[0][part]}


def write_page(name: str, records: list[dict], folder: Path) -> None:
    """`<name>.md` with a table per row, and `<name>.png`."""
    lines = [f"# {name}", "", f"`python scripts/benchmark.py benchmarks/{name}.yaml` wrote this page.", ""]
    lines += [f"![differences in loss]({name}.png)", ""]
    for row, mine in by_row(records).items():
        metrics = [(part, n) for part in ("dev", "test") if part in mine[0] for n in mine[0][part]]
        dense = ", ".join(f"{n} {value:.4f}" for n, value in mine[0]["dense"].items())
        lines += [f"## {row}", "", f"Dense, dev: {dense}. Mean ± standard deviation over seeds "
                  f"{', '.join(map(str, mine[0]['seeds']))}; losses against {mine[0]['score']}, on "
                  f"{mine[0]['compared_on']}, with 95 % intervals over examples.", ""]  # fmt: skip
        heads = ["score", "steps", *(f"{part} {n}" for part, n in metrics), "loss against first", "McNemar p"]
        if mine[0]["agreement"]:
            heads += ["as the dense model", "less first's"]
        heads += ["parameters", "MACs (M)", "latency ratio", "seconds (cut, recovery)", "kept"]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for record in mine:
            against = record["against_first"]
            low, high = against["interval"]
            cells = [record["score"], "+".join(map(str, record["steps"]))]
            cells += [spread(record[part][n]) for part, n in metrics]
            cells += [f"{against['difference']:+.4f} [{low:+.4f}, {high:+.4f}]" if record is not mine[0] else ""]
            cells += [", ".join(f"{seed['p']:.3f}" for seed in against["mcnemar"]) if record is not mine[0] else ""]
            if record["agreement"]:
                low, high = against["agreement_interval"]
                cells += [spread(record["agreement"])]
                cells += [f"{against['agreement']:+.4f} [{low:+.4f}, {high:+.4f}]" if record is not mine[0] else ""]
            cells += [f"{mean(record['params']):,.0f}", f"{mean(record['macs']) / 1e6:,.1f}"]
            cells += [f"{mean(record['latency_ratio']):.2f}"]
            cells += [", ".join(f"{mean(values):.0f}" for values in record["seconds"].values())]
            cells += [", ".join(f"{kind} {mean(shares):.0%}" for kind, shares in record["kept"].items())]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    (folder / f"{name}.md").write_text("\n".join(lines))
    plot(records, folder / f"{name}.png")


def plot(records: list[dict], path: Path) -> None:
    """Differences in loss to the first score with their intervals, a panel per row of the table."""
    rows = by_row(records)
    figure = Figure(figsize=(4.5 * len(rows), 0.4 * len(records) / len(rows) + 1.6), layout="tight")
    for axis, (row, mine) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items()):
        for place, record in enumerate(mine):
            low, high = record["against_first"]["interval"]
            axis.plot([low, high], [place, place], color="tab:blue")
            axis.plot(record["against_first"]["difference"], place, "o", color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(mine)), [record["score"] for record in mine])
        axis.invert_yaxis()
        axis.set_title(row)
        axis.set_xlabel(f"loss on {mine[0]['compared_on']} minus that of {mine[0]['score']}")
    figure.savefig(path, dpi=120)


def by_row(records: list[dict]) -> dict[str, list[dict]]:
    return {row: [r for r in records if r["row"] == row] for row in dict.fromkeys(r["row"] for r in records)}


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="YAML file")
    path = parser.parse_args(argv).table
    cells, folder = read_table(path), path.parent / "cells" / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):  # a table that stops is whole for its first seeds
        file = folder / f"{cell.file}.json"
        if not file.exists():
            temporary = file.with_suffix(".partial")
            temporary.write_text(json.dumps(run_cell(cell)))
            temporary.rename(file)
        found[cell.file] = json.loads(file.read_text())
        if found[cell.file]["settings"] != {"values": cell.values, "test": cell.test}:
            raise SystemExit(f"{file} was run with other settings: delete it, or give the row or score another name.")
        if any("agrees" not in examples for examples in found[cell.file]["examples"].values()):
            raise SystemExit(f"{file} is of an older version of this script, which kept no agreement: delete it.")
    record = {
        "machine": f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}",
        "versions": found[cells[0].file]["versions"], "records": summarise(cells, found),
    }  # fmt: skip
    (path.parent / f"{path.stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    write_page(path.stem, record["records"], path.parent)
    print((path.parent / f"{path.stem}.md").read_text())


if __name__ == "__main__":
    main()
