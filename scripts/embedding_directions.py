"""What a token embedding of few directions costs at once, by how the directions are ordered; nothing else is cut.

    python scripts/embedding_directions.py --model runs/minilm-sst2 --data ../shared/data/sst2 --ranks 48,96
    python scripts/embedding_directions.py --model minilm --stsb ../shared/data/stsb/sts-dev.orig.tsv --ranks 80

Orders: "uniform" weighs all tokens alike, "half" adds the mean count to every token's count, "tenth" a tenth of it, and
"metric" is tenth in the metric of the loss's gradients (`ibprune.embeddings.gradient_moment`); of an encoder without
labels the gradients are those of random projections of its outputs, which ibprune itself does not use. No training: the
held-out metrics right after the cut, and for labelled data the distilled loss on 512 training rows.
"""

import argparse
import copy
import csv

import torch
from scipy.stats import spearmanr
from stsb import embed

from ibprune.collating import token_counts
from ibprune.console import Quiet
from ibprune.cutting import CALIBRATION
from ibprune.distillation import loss_with
from ibprune.embeddings import TokenUse, factorize_, gradient_moment
from ibprune.engine import make_accelerator
from ibprune.evaluation import evaluate_model
from ibprune.losses import forward, sensitivity
from ibprune.recipe import make_recipe
from ibprune.sites import find_sites
from ibprune.structure import prepare_
from ibprune.subject import load_subject


def projected_moment(model: torch.nn.Module, batches: list[dict], objective) -> torch.Tensor:
    """As `gradient_moment`, of the gradients of random projections of an encoder's outputs, (d, d)."""
    generator, found, total = torch.Generator().manual_seed(0), [], 0.0
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: found.append(output))
    for batch in batches:
        found.clear()
        loss = sensitivity(objective, forward(model, batch), batch, generator).sum()
        gradient = torch.autograd.grad(loss, found[0])[0][batch["attention_mask"].bool()].double()
        total = total + gradient.T @ gradient
    handle.remove()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--ranks", default="48,96")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--stsb", help="also Spearman on this STS-B file, for encoders")
    arguments = parser.parse_args()
    asked = {"model": arguments.model, "data": arguments.data, "budget": 0.5, "max_length": arguments.max_length}
    subject = load_subject(make_recipe({key: value for key, value in asked.items() if value}), Quiet())
    feed, dense, objective = subject.feed, subject.loaded.model, subject.feed.objective
    batches = feed.calibration(CALIBRATION, torch.device("cpu"))
    counts = token_counts(feed.unshuffled(), dense.config.vocab_size, batches=100)
    metric = gradient_moment(dense, batches, objective)
    metric = projected_moment(dense, batches, objective) if metric is None else metric
    orders = {
        "uniform": None,
        "half": TokenUse(counts),
        "tenth": TokenUse(counts, torch.eye(len(metric))),
        "metric": TokenUse(counts, metric),
    }
    loss_of = loss_with(objective, dense, make_accelerator("fp32"))
    for rank in (None, *map(int, arguments.ranks.split(","))):
        for name, use in orders.items() if rank else (("dense", None),):
            model = copy.deepcopy(dense)
            if rank:
                factorize_(model, use)
                site = next(name for name in find_sites(model) if name.endswith("embedding_rank"))
                structure = prepare_(model, (), None)
                model = structure.compact(model, structure.plan(model, {site: tuple(range(rank))}))
            found = evaluate_model(model, feed, objective, dense=dense, console=Quiet(), what="held out")
            if feed.metrics:
                with torch.no_grad():
                    found["loss"] = float(torch.stack([loss_of(model, batch) for batch in batches]).mean())
            if arguments.stsb:
                with open(arguments.stsb, encoding="utf-8") as file:
                    rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
                first, second = (embed(model, feed.preprocessor, [row[column] for row in rows]) for column in (5, 6))
                scores = [float(row[4]) for row in rows]
                found["STS-B Spearman"] = float(spearmanr((first * second).sum(1).tolist(), scores)[0])
            print(rank or "all", name, {key: round(value, 4) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
