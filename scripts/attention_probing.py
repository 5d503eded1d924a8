"""Do kept heads look elsewhere than removed ones? One table over plans, as the attention probing of VTrans asks.

    python scripts/attention_probing.py --model runs/minilm-sst2 --data ../shared/data/sst2 --budget 0.5 \\
        --scope blocks --scores vib:probe:0,fisher:cost:0,random:equal:0 --mask-steps 40 --max-length 64

All measures are of the dense model's heads on held-out texts. Plans come from pruned folders (--pruned) and from
scores (score:shares:seed). The difference kept - removed is adjusted for layers; the interval and p are those of
random plans with the same counts in every layer. Task keywords are chosen on the training rows.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ibprune.attention import ENTROPY, PATTERNS, kept_units, read_heads
from ibprune.console import Quiet, Terminal
from ibprune.cutting import cut
from ibprune.data import TextData
from ibprune.engine import make_accelerator
from ibprune.feeding import find_data, make_feed
from ibprune.head_patterns import HeadContrast, choose_keywords, head_contrasts
from ibprune.inputs import encode_inputs, special_ids
from ibprune.labels import match_labels
from ibprune.models import Loaded, find_source, load_config, load_dense
from ibprune.plans import PruningPlan
from ibprune.recipe import make_recipe


def make_plan(arguments: argparse.Namespace, name: str, loaded: Loaded, data: TextData, console: Quiet) -> PruningPlan:
    """The plan of one "score:shares:seed"; nothing is trained but the masks of vib."""
    score, shares, seed = name.split(":")
    values = {key: getattr(arguments, key) for key in ("model", "data", "budget", "scope", "mask_steps", "max_length")}
    recipe = make_recipe(values | {"score": score, "shares": shares, "seed": seed})
    accelerator = make_accelerator(recipe.precision, grad_accum=recipe.grad_accum, seed=recipe.seed)
    recipe, feed = make_feed(recipe, loaded.model, loaded.tokenizer, data)
    return cut(loaded.model.to(accelerator.device), recipe, feed, accelerator, console)[1]


def find_keywords(data: TextData, loaded: Loaded, max_length: int) -> tuple[int, ...]:
    """Task keywords of labelled data, none of other data."""
    if not data.labels:
        return ()
    columns = [[str(text or "") for text in data.train[column]] for column in data.text_columns]
    rows = loaded.tokenizer(*columns, truncation=True, max_length=max_length, verbose=False)["input_ids"]
    return choose_keywords(rows, data.train[data.label_column], skip=special_ids(loaded.tokenizer))


def print_table(found: dict[str, dict[str, HeadContrast | None]]) -> None:
    print("| measure | plan | heads kept, removed | kept | removed | difference in layers | null 95 % | p |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for measure in (*PATTERNS, ENTROPY):
        for plan, contrasts in found.items():
            one = contrasts[measure]
            if one is None:
                print(f"| {measure} | {plan} | | | | not defined | | |")
                continue
            means = ["" if value is None else f"{value:.4f}" for value in (one.kept, one.removed)]
            tested = ["no layer has both", "", ""]
            if one.difference is not None:
                low, high = one.null95
                tested = [f"{one.difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{one.p_value:.4f}"]
            print(f"| {measure} | {plan} | {one.n_kept}, {one.n_removed} | {' | '.join([*means, *tested])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the dense checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pruned", nargs="*", default=[], help="pruned folders of this model")
    parser.add_argument("--scores", default="", help="plans to make, score:shares:seed, separated by commas")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--scope", default="blocks")
    parser.add_argument("--mask-steps", type=int, default=40)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-inputs", type=int, default=2400)
    parser.add_argument("--permutations", type=int, default=10_000)
    parser.add_argument("--output", help="a JSON file with the heads that each plan keeps and every figure")
    arguments = parser.parse_args()
    console = Terminal()
    source = find_source(arguments.model)
    recipe = make_recipe({"model": arguments.model, "data": arguments.data, "budget": arguments.budget})
    data = match_labels(find_data(recipe, console), load_config(source), source.name)
    loaded = load_dense(source, n_labels=(len(data.labels) or 1) if data.label_column else None)
    keywords = find_keywords(data, loaded, arguments.max_length)
    if keywords:
        print(f"{len(keywords)} task keywords: {' '.join(loaded.tokenizer.convert_ids_to_tokens(list(keywords)))}\n")
    inputs = encode_inputs(data, loaded.tokenizer, max_length=arguments.max_length, most=arguments.max_inputs)
    plans = {folder: PruningPlan.load(Path(folder) / "plan.json") for folder in arguments.pruned}
    for name in filter(None, arguments.scores.split(",")):
        plans[name] = make_plan(arguments, name, loaded, data, console)
    reading = read_heads(loaded.model, inputs.batches, special=inputs.special, keywords=keywords)
    if reading is None:
        raise SystemExit("the model gives no attention probabilities")
    units = {name: kept_units(plan, loaded.model) for name, plan in plans.items()}
    found = {name: head_contrasts(reading, units[name], permutations=arguments.permutations) for name in plans}
    for name, blocks in units.items():
        print(f"{name}: heads kept per block {', '.join(f'{len(kept)}/{count}' for count, kept in blocks.values())}")
    print(f"\n{inputs.n} held-out texts; {arguments.permutations:,} random plans for each null\n")
    print_table(found)
    if arguments.output:
        record = {
            "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
            "inputs": {"n": inputs.n, "sha256": inputs.sha256},
            "keywords": loaded.tokenizer.convert_ids_to_tokens(list(keywords)),
            "kept": {name: {block: kept for block, (_, kept) in blocks.items()} for name, blocks in units.items()},
            "contrasts": {
                plan: {measure: one and asdict(one) for measure, one in contrasts.items()}
                for plan, contrasts in found.items()
            },
        }
        Path(arguments.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
