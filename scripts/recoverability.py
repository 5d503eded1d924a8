"""How much of a cut's damage a recovery of so many steps mends, by how the cut is shared between kinds.

    python scripts/recoverability.py --model runs/minilm-sst2 --data ../shared/data/sst2 --budget 0.3 \\
        --pressures "heads=0.38,ffn=1,embedding_rank=2.03;heads=1,ffn=1,embedding_rank=1.26" --steps 0,25,50,100,160,500

Every cell cuts the dense model anew by one-shot Fisher scores, recovers it for that many steps (a schedule of its own)
and prints the distilled loss on the calibration rows and the metrics on the held-out ones. Kind k keeps the share
exp(-t * pressure[k]) of its units, with one t for all that meets the budget; kinds without a pressure stay whole.
"""

import argparse
import copy
import json

import torch

from ibprune.budget import fractions_kept, make_budget, solve_by_shares
from ibprune.collating import token_counts
from ibprune.console import Quiet
from ibprune.cutting import CALIBRATION, token_use, train_settings
from ibprune.distillation import loss_with, on_kept_features
from ibprune.engine import make_accelerator
from ibprune.evaluation import evaluate_model
from ibprune.inject import inject_
from ibprune.recipe import make_recipe
from ibprune.scores import fisher_scores
from ibprune.structure import choose_kinds, prepare_
from ibprune.subject import load_subject
from ibprune.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--pressures", required=True, help="kind=number,...;...")
    parser.add_argument("--steps", default="0,100,500")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    asked = {key: getattr(arguments, key) for key in ("model", "data", "budget", "max_length", "seed")}
    subject = load_subject(make_recipe(asked | {"score": "fisher"}), Quiet())
    recipe, feed, dense = subject.recipe, subject.feed, subject.loaded.model
    accelerator = make_accelerator("fp32", seed=recipe.seed)
    dense = dense.to(accelerator.device)
    student = copy.deepcopy(dense)
    kinds, batches = choose_kinds(dense, ()), feed.calibration(CALIBRATION, accelerator.device)
    counts = token_counts(feed.unshuffled(), dense.config.vocab_size, batches=100)
    structure = prepare_(student, kinds, token_use(student, kinds, counts, batches, feed.objective))
    costs, sites = structure.costs.params, structure.sites
    budget = make_budget(costs, sites, keep=recipe.budget, scope=recipe.scope, round_to=recipe.round_to)
    masks = inject_(student, sites)
    scores = fisher_scores(
        student, masks, batches, feed.objective, seed=recipe.seed, total=len(batches), console=Quiet()
    )
    for text in arguments.pressures.split(";"):
        pressure = {kind: float(number) for kind, number in (pair.split("=") for pair in text.split(","))}
        keep = solve_by_shares(scores, sites, costs, budget, pressure)
        plan = structure.plan(student, keep)
        objective = on_kept_features(feed.objective, plan)
        loss_of = loss_with(objective, dense, accelerator)
        for steps in map(int, arguments.steps.split(",")):
            small = structure.compact(copy.deepcopy(student), plan)
            train(
                small, loss_of, feed.train, train_settings(recipe, steps), accelerator=accelerator,
                phase="recovering", console=Quiet(),
            )  # fmt: skip
            with torch.no_grad():
                loss = float(torch.stack([loss_of(small.eval(), batch) for batch in batches]).mean())
            metrics = evaluate_model(small, feed, objective, dense=dense, console=Quiet(), what="held out")
            kept = {kind: round(share, 3) for kind, share in fractions_kept(keep, sites).items()}
            print(json.dumps({"kept": kept, "steps": steps, "loss": round(loss, 4)} | metrics), flush=True)


if __name__ == "__main__":
    main()
