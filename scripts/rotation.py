"""What cutting the residual width costs, by features and by principal directions: at once, and after a short recovery.

    python scripts/rotation.py --model ../shared/data/models/stories260K \
        --data ../shared/data/tinystories/tinystories_sample.txt --widths 48,32 --steps 100

Nothing but `hidden` is cut. "features" are those of the dense model by Fisher, "directions" those of the turned stream
by Fisher or in the order of their axes. Where turning parts a tied output from the embedding, two more rows have as
many parameters: more features of the dense model, tied as it is, and as many of a copy whose output is untied.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ibprune.console import Quiet
from ibprune.cutting import CALIBRATION
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.evaluation import evaluate_model
from ibprune.inject import inject_, remove_
from ibprune.recipe import make_recipe
from ibprune.rotation import principal_axes
from ibprune.scores import fisher_scores
from ibprune.structure import Structure, prepare_
from ibprune.subject import load_subject
from ibprune.trainer import TrainSettings, train


def fisher_order(model: PreTrainedModel, structure: Structure, batches: list[dict], objective) -> list[int]:
    """The `hidden` units, the most needed first."""
    masks = inject_(model, structure.sites)
    scores = fisher_scores(model, masks, batches, objective, seed=0, total=len(batches), console=Quiet())
    remove_(model)
    return scores["hidden"].argsort(descending=True).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--widths", default="48,32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=400, help="rows that the perplexity is of, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="a JSON file for the rows")
    asked = parser.parse_args()
    recipe = make_recipe({"model": asked.model, "data": asked.data, "budget": 0.5, "batch_size": asked.batch_size,
                          "max_length": asked.max_length, "seed": asked.seed})  # fmt: skip
    accelerator = make_accelerator("fp32", grad_accum=1, seed=asked.seed)
    subject = load_subject(recipe, Quiet())
    feed, dense, objective = subject.feed, subject.loaded.model.eval(), subject.feed.objective
    feed = replace(feed, held_out_set=feed.held_out_set.select(range(min(asked.held_out, len(feed.held_out_set)))))
    batches = feed.calibration(CALIBRATION, torch.device("cpu"))

    def measured(model: PreTrainedModel) -> float:
        return evaluate_model(model, feed, objective, console=Quiet(), what="evaluating")["perplexity"]

    sides = {}
    turned = principal_axes(dense, batches)
    for side, axes in {"features": None, "untied features": torch.eye(len(turned)), "directions": turned}.items():
        model = copy.deepcopy(dense)
        structure = prepare_(model, ("hidden",), None, axes=axes)
        sides[side] = model, structure, fisher_order(model, structure, batches, objective)
    rows = [{"units": "dense", "params": sides["features"][1].costs.params.of_dense(), "at_once": measured(dense)}]
    print(rows[0], flush=True)

    def row(side: str, width: int, order: list[int] | None, name: str) -> None:
        model, structure, _ = sides[side]
        keep = tuple(range(width)) if order is None else tuple(sorted(order[:width]))
        small = structure.compact(copy.deepcopy(model), structure.plan(model, {"hidden": keep}))
        found = {"units": name, "width": width, "params": sum(p.numel() for p in small.parameters())}
        found["at_once"] = measured(small)
        if asked.steps:
            settings = TrainSettings(steps=asked.steps, lr=subject.recipe.lr, grad_accum=1, seed=asked.seed)
            train(small, loss_with(objective, dense, accelerator), feed.train, settings, accelerator=accelerator,
                  phase="recovering", console=Quiet())  # fmt: skip
            found[f"after_{asked.steps}"] = measured(small.eval())
        rows.append(found)
        print(found, flush=True)

    for width in map(int, asked.widths.split(",")):
        row("features", width, sides["features"][2], "features, Fisher")
        row("directions", width, None, "directions, in order")
        row("directions", width, sides["directions"][2], "directions, Fisher")
        tied, untied = (sides[side][1].costs.params for side in ("features", "directions"))
        whole, limit = tied.n_units, untied(untied.n_units | {"hidden": width})
        same = max(w for w in range(1, whole["hidden"] + 1) if tied(whole | {"hidden": w}) <= limit)
        if same > width:  # the rotation has parted the output from the embedding
            row("features", same, sides["features"][2], "features, Fisher, as many parameters")
            row("untied features", width, sides["untied features"][2], "features, Fisher, output untied before")
    if asked.output:
        Path(asked.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
