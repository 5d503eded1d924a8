"""Time of a mask-learning step against a dense fine-tuning step of the same batches, distillation off.

python scripts/mask_overhead.py --model minilm --length 32 --rounds 5
"""

import argparse
import copy
import time
from statistics import median

import torch
from datasets import Dataset

from ibprune.budget import make_budget, solve_by_shares
from ibprune.collating import Collate, make_loader
from ibprune.console import Quiet
from ibprune.data import TextData
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.inject import inject_
from ibprune.losses import Objective
from ibprune.models import find_source, load_dense
from ibprune.shares import equal_pressure
from ibprune.structure import choose_kinds, prepare_
from ibprune.trainer import TrainSettings, train
from ibprune.vib import learn_masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="steps per round and side")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    accelerator = make_accelerator("auto")
    loaded = load_dense(find_source(arguments.model), n_labels=2)
    words = " ".join(["word"] * arguments.length)
    rows = Dataset.from_dict({"text": [words] * 512, "label": [0, 1] * 256})
    data = TextData("words", rows, rows, ("text",), "label", ("0", "1"))
    collate = Collate(loaded.tokenizer, data, arguments.length)
    dense = loaded.model
    student = copy.deepcopy(dense)
    structure = prepare_(student, choose_kinds(student, ()), None)
    sites, costs = structure.sites, structure.costs
    budget = make_budget(costs.params, sites, keep=0.5, scope="model", round_to=1)
    scores = {name: torch.rand(site.n_units) for name, site in sites.items()}
    target = solve_by_shares(scores, sites, costs.params, budget, equal_pressure(sites))
    masks = inject_(student, sites)
    stamps: list[float] = []
    plain = loss_with(Objective("classification"), None, accelerator)

    def loss_of(model, batch):
        stamps.append(time.perf_counter())
        return plain(model, batch)

    def batches(seed: int):
        return make_loader(rows, collate, batch_size=arguments.batch_size, seed=seed)

    settings = TrainSettings(steps=arguments.steps, lr=1e-6)
    found: dict[str, list[float]] = {"dense": [], "masked": []}
    for _ in range(arguments.rounds):
        for side in found:
            stamps.clear()
            if side == "dense":
                train(dense, loss_of, batches, settings, accelerator=accelerator, phase=side, console=Quiet())
            else:
                learn_masks(
                    student, masks, sites, costs.params, budget, scores, target, loss_of, batches, settings,
                    accelerator=accelerator, console=Quiet(),
                )  # fmt: skip
            found[side] += [b - a for a, b in zip(stamps[1:], stamps[2:])]  # the first step warms up
    for side, times in found.items():
        low, high = sorted(times)[len(times) // 4], sorted(times)[3 * len(times) // 4]
        print(f"{side}: median {median(times):.3f} s a step, quartiles {low:.3f} to {high:.3f}, n = {len(times)}")
    print(f"ratio masked/dense: {median(found['masked']) / median(found['dense']):.3f}")


if __name__ == "__main__":
    main()
