"""Whether an audit predicts accuracy: rank correlations over many pruned models, before and after recovery.

    python scripts/audit_predicts.py --model runs/minilm-sst2 --data ../shared/data/sst2 \\
        --test ../shared/data/sst2/test-labeled.tsv --output benchmarks/audit_predicts.json

Heads and FFN units are cut to each budget (of the blocks) by each score and seed. The held-out rows are audited,
accuracy is measured on the test file. Beside the audit stand the plain predictors that it has to beat: accuracy and
cross-entropy on the audited rows, and the budget itself. A cell that is in the output file already is not run again.
"""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr
from torch.nn import functional as F

from ibprune.console import Quiet
from ibprune.cutting import cut, train_settings
from ibprune.data import load_data, read_file
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.features import collect, find_layers
from ibprune.feeding import make_feed
from ibprune.inputs import Inputs, encode_inputs
from ibprune.losses import forward
from ibprune.mi.channel import calibrate_sigma, draw_noise, readout_bracket
from ibprune.mi.probes import v_information
from ibprune.models import find_source, load_dense
from ibprune.recipe import make_recipe
from ibprune.trainer import train

PREDICTORS = (
    "v_last", "v_mean", "i_last", "i_mean", "i_own_scale_last", "held_out_accuracy", "held_out_minus_ce", "budget",
)  # fmt: skip


def read_layers(model, inputs: Inputs, dense: dict | None) -> tuple[dict, dict]:
    """The audit's two quantities at every block, in nats, and the plain predictors on the same inputs.

    The first model read sets the noise.
    """
    where = find_layers(model, batch=inputs.batches[0]) | {"classifier": ("classifier", "out")}
    features = collect(model, inputs.batches, where, poolings=("mean",))["mean"]
    logits = torch.from_numpy(features.pop("classifier"))
    names = list(features)[1:]  # the embeddings are no block
    noise = draw_noise(*features[names[0]].shape, repeats=2, seed=0)
    sigma = dense["sigma"] if dense else {name: calibrate_sigma(features[name]) for name in names}
    scale = {name: float(np.sqrt(features[name].astype(np.float64).var(axis=0).sum())) for name in names}
    lower = {name: readout_bracket(features[name], sigma[name], noise=noise).lower for name in names}
    label = {name: v_information(features[name], inputs.labels).value for name in names}
    last = names[-1]
    own = readout_bracket(features[last], sigma[last] * scale[last] / (dense or {"scale": scale})["scale"][last],
                          noise=noise).lower  # fmt: skip
    found = {
        "v_last": label[last],
        "v_mean": float(np.mean([label[name] for name in names])),
        "i_last": lower[last],
        "i_mean": float(np.mean([lower[name] for name in names])),
        "i_own_scale_last": own,
        "held_out_accuracy": accuracy(logits, inputs.labels),
        "held_out_minus_ce": -float(F.cross_entropy(logits, torch.tensor(inputs.labels))),
    }
    return found, {"sigma": sigma, "scale": scale}


def accuracy(logits: torch.Tensor, labels: list[int]) -> float:
    return float((logits.argmax(-1) == torch.tensor(labels)).float().mean())


@torch.no_grad()
def judge(model, test: Inputs) -> dict:
    """Accuracy on the test rows."""
    model.eval()
    return {"test_accuracy": accuracy(torch.cat([forward(model, b).logits.float() for b in test.batches]), test.labels)}


def correlation(cells: list[dict], predictor: str, measured: str, outcome: str) -> str:
    """Spearman over all models with a bootstrap interval, and the mean over budgets of Spearman within each."""
    x = np.array([c["budget"] if predictor == "budget" else c[measured][predictor] for c in cells])
    y = np.array([c[outcome]["test_accuracy"] for c in cells])
    rng = np.random.default_rng([0, 7])
    draws = [rng.integers(0, len(x), len(x)) for _ in range(2000)]
    low, high = np.quantile([np.corrcoef(rankdata(x[d]), rankdata(y[d]))[0, 1] for d in draws], (0.025, 0.975))
    text = f"{spearmanr(x, y)[0]:.2f} [{low:.2f}, {high:.2f}]"
    if predictor == "budget":
        return text
    groups = [[c["budget"] == budget for c in cells] for budget in dict.fromkeys(c["budget"] for c in cells)]
    return text + f", {np.mean([spearmanr(x[g], y[g])[0] for g in groups]):.2f}"


def average(cells: list[dict], stage: str, what: str) -> float:
    return float(np.mean([cell[stage][what] for cell in cells]))


def print_tables(record: dict) -> None:
    cells = record["cells"]
    print(
        f"\n{len(cells)} pruned models; Spearman with test accuracy [95 % bootstrap], then the mean within a budget\n"
    )
    print("| predictor | measured before, accuracy before | before, after | after, after |\n|---|---|---|---|")
    for name in PREDICTORS:
        pairs = (("before", "before"), ("before", "after"), ("after", "after"))
        print(f"| {name} | " + " | ".join(correlation(cells, name, *pair) for pair in pairs) + " |")
    print(
        "\n| budget | score | test before | test after | V, last block (bits) before, after | I, mean before, after |"
    )
    print("|---|---|---|---|---|---|")
    for key in dict.fromkeys((c["budget"], c["score"]) for c in cells):
        mine = [c for c in cells if (c["budget"], c["score"]) == key]

        row = [f"{100 * average(mine, stage, 'test_accuracy'):.2f}" for stage in ("before", "after")]
        for what in ("v_last", "i_mean"):
            ends = [average(mine, stage, what) / np.log(2) for stage in ("before", "after")]
            row.append(f"{ends[0]:.2f}, {ends[1]:.2f}")
        print(f"| {key[0]} | {key[1]} | " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True, help="a labelled file; accuracy is measured there")
    parser.add_argument("--budgets", default="0.7,0.4,0.2,0.1")
    parser.add_argument("--scores", default="fisher,magnitude,random")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recover-steps", type=int, default=40)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    path = Path(arguments.output)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "budgets", "scores", "seeds")}
    record = json.loads(path.read_text()) if path.exists() else {"settings": settings, "cells": []}
    if record["settings"] != settings:
        raise SystemExit(f"{path} holds cells of other settings: choose another --output")
    loaded, data = load_dense(find_source(arguments.model)), load_data(arguments.data)
    dense = loaded.model.float()
    test_data = replace(data, held_out=read_file(Path(arguments.test)))
    inputs, test = (
        encode_inputs(rows, loaded.tokenizer, max_length=arguments.max_length, most=2400) for rows in (data, test_data)
    )
    reference = None
    done = {(c["budget"], c["score"], c["seed"]) for c in record["cells"]}
    grid = itertools.product(arguments.seeds.split(","), arguments.budgets.split(","), arguments.scores.split(","))
    for seed, budget, score in ((int(s), float(b), score) for s, b, score in grid):
        if (budget, score, seed) in done:
            continue
        recipe = make_recipe({
            "model": arguments.model, "data": arguments.data, "budget": budget, "scope": "blocks", "score": score,
            "shares": "equal", "kinds": "heads,ffn", "seed": seed, "max_length": arguments.max_length,
            "recover_steps": arguments.recover_steps,
        })  # fmt: skip
        accelerator = make_accelerator(recipe.precision, seed=seed)
        recipe, feed = make_feed(recipe, dense, loaded.tokenizer, data)
        if reference is None:
            found, reference = read_layers(dense, inputs, None)
            record["dense"] = found | judge(dense, test)
        student, *_ = cut(dense, recipe, feed, accelerator, Quiet())
        cell = {"budget": budget, "score": score, "seed": seed}
        cell["before"] = read_layers(student, inputs, reference)[0] | judge(student, test)
        train(student, loss_with(feed.objective, dense, accelerator), feed.train,
              train_settings(recipe, recipe.recover_steps), accelerator=accelerator, phase="recovering",
              console=Quiet())  # fmt: skip
        cell["after"] = read_layers(student, inputs, reference)[0] | judge(student, test)
        record["cells"].append(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(cell), flush=True)
    print_tables(record)


if __name__ == "__main__":
    main()
