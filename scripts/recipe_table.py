"""What each recipe that comes with ibprune takes, by the estimate that `ibprune plan --estimate` makes, as a page.

    python scripts/recipe_table.py > docs/recipes.md

From the published configs in `published_configs.json`: nothing is loaded. The GPU is the smallest of `GPUS` whose
memory holds the estimate and the most by which runs exceeded one.
"""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

import ibprune
from ibprune.estimating import SHORTFALL, UTILISATION
from ibprune.models import ALIASES
from ibprune.recipe import Recipe, make_recipe
from ibprune.recipe_files import purpose, shipped

PUBLISHED = Path(__file__).parent / "published_configs.json"
GPUS = {"RTX 4090": (24e9, 165e12), "A100 40 GB": (40e9, 312e12), "A100 80 GB": (80e9, 312e12)}  # bytes, bf16 a second
HEAD = """# Recipes

Made by `python scripts/recipe_table.py > docs/recipes.md`. `ibprune --recipe NAME` runs one, with flags over its keys;
`--set KEY=VALUE` sets any key as YAML would (`--set kinds=[heads,ffn] --set lr=null`), in `plan` too;
`ibprune recipes show NAME` prints it, `ibprune recipes copy NAME` gives you the file to start from, and
`ibprune recipes schema` the JSON Schema for an editor.

Memory is the estimate of the largest phase, from the config alone; runs took up to {shortfall:g} times as much, and the
GPU named is the smallest of {gpus} that holds that. Hours are those of its arithmetic at
{utilisation:.0%} of the rate in its data sheet: CNNs and small models reach less; evaluation, audit and reading the
data are not in it; and **none of these runs on GPUs was made**. What was measured of the estimates is in
[results.md](results.md); `ibprune plan --recipe NAME --estimate` times the device that it runs on instead. Disk is the
state of a run, for `--resume`, and the result.

| recipe | model | share kept | memory | GPU | hours | disk |
|---|---|---|---|---|---|---|"""


def config_of(recipe: Recipe) -> PreTrainedConfig:
    values = dict(json.loads(PUBLISHED.read_text())[ALIASES[recipe.model]]["config"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def row(name: str, recipe: Recipe) -> str:
    given = {key: getattr(recipe, key) for key in recipe.model_fields_set - {"model", "budget"}}

    found = ibprune.estimate(config_of(recipe), recipe.budget, flops_per_second=1e12, **given)
    gpu, (_, rate) = next(item for item in GPUS.items() if item[1][0] >= SHORTFALL * found["memory"])
    of = recipe.cost if recipe.scope == "model" else f"{recipe.cost} in blocks"
    hours = found["seconds"] * 1e12 / rate / 3600
    hours = f"{hours:.1f}" if hours >= 0.1 else "< 0.1"
    cells = (name, recipe.model, f"{recipe.budget:g} of {of}", f"{found['memory'] / 1e9:.1f} GB", gpu,
             hours, f"{sum(found['disk'].values()) / 1e9:.1f} GB")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    head = HEAD.format(shortfall=SHORTFALL, utilisation=UTILISATION, gpus=", ".join(GPUS))
    recipes = {name: make_recipe({}, file=path) for name, path in shipped().items()}
    print(head)
    for name, recipe in recipes.items():
        print(row(name, recipe), flush=True)
    print()
    print("\n".join(f"- **{name}**: {purpose(path)}" for name, path in shipped().items()))


if __name__ == "__main__":
    main()
