"""Trains a dense model on labelled data with the project's own loop and saves it as a folder.

python scripts/finetune.py --model minilm --data ../shared/data/sst2 --output runs/minilm-sst2 --max-length 64
"""

import argparse
import json
import time
from pathlib import Path

from ibprune.console import Terminal
from ibprune.engine import make_accelerator
from ibprune.evaluation import evaluate_model
from ibprune.feeding import find_data, make_feed
from ibprune.folders import check_output, staged
from ibprune.models import find_source, load_dense
from ibprune.recipe import make_recipe
from ibprune.training import finetune_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, help="default: one epoch")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = check_output(arguments.output)
    console = Terminal()
    recipe = make_recipe(
        {
            "model": arguments.model,
            "budget": 1.0,
            "data": arguments.data,
            "max_length": arguments.max_length,
            "seed": arguments.seed,
            "finetune_steps": arguments.steps,
        }
    )
    accelerator = make_accelerator(recipe.precision, seed=recipe.seed)
    data = find_data(recipe, console)
    loaded = load_dense(find_source(recipe.model), n_labels=len(data.labels) or 1, regression=not data.labels)
    recipe, feed = make_feed(recipe, loaded.model, loaded.tokenizer, data)
    if recipe.finetune_steps is None:
        recipe = recipe.model_copy(update={"finetune_steps": len(feed.train_set) // recipe.batch_size})
    start = time.perf_counter()
    finetune_(loaded.model, recipe, feed, accelerator, console, needed=False)
    seconds = time.perf_counter() - start
    metrics = evaluate_model(loaded.model, feed, feed.objective, console=console, what="evaluating")
    with staged(folder) as temporary:
        loaded.model.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        record = {"steps": recipe.finetune_steps, "seed": recipe.seed, "seconds": round(seconds, 1), "metrics": metrics}
        (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(Path(folder), record)


if __name__ == "__main__":
    main()
