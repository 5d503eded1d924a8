"""Which kinds of units each model type has, and how a folder loads when one kind, or all, lose units evenly.

    python scripts/family_table.py > docs/families.md

From default configs with few layers. Every layer keeps the first three quarters of its units of a kind; of the layers,
the last block goes.
"""

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ibprune.embeddings import named_rows
from ibprune.families import FAMILIES, TRACED
from ibprune.folders import tier_of
from ibprune.models import build_model, model_class
from ibprune.names import KINDS
from ibprune.plans import PruningPlan
from ibprune.sites import block_paths, find_family
from ibprune.structure import Structure, choose_kinds, prepare_
from ibprune.vanilla import plain_structure

WAYS = {"vanilla": "plain", "remote_code": "code"}
HEAD = """# Model types, kinds of units, and how folders load

Made by `python scripts/family_table.py > docs/families.md`: every layer keeps three quarters of its units of a kind; of
`layers`, the last block goes. **plain**: plain transformers builds the shapes, no code is needed. **code**:
`trust_remote_code=True`, one small file in the folder. `ibprune.load` reads both and runs no code of the folder. Uneven
widths need code, or `ibprune.load`. A dash: the family has no such units; `ibprune plan --kinds …` says why.
`--vanilla` cuts the kinds in the last column so that no code is needed, some in a fixed ratio (heads with `hidden`).
An OPT with its norms behind the sub-layers (opt-350m) is refused.
A T5 that writes keeps `hidden`: where its output is tied, a scale follows the width.
Fewer channels of a CNN ({traced}) always need code, or `ibprune.load`.
"""


def keep_evenly(model: nn.Module, structure: Structure, last_block: str) -> dict[str, tuple[int, ...]]:
    keep = {name: tuple(range(site.n_units)) for name, site in structure.everything.items()}
    for name, site in structure.sites.items():
        stays = max(site.min_units, site.n_units * 3 // 4)
        if site.kind == "layers":
            stays = 0 if site.block and site.block.endswith(last_block) else site.n_units
        keep[name] = tuple(sorted({*range(stays), *(named_rows(model) if site.kind == "vocab" else ())}))
    return keep


def way(config: PreTrainedConfig, kind: str = "") -> str:
    """How the folder loads; all kinds but the vocabulary where none is named."""
    family = find_family(config.model_type)
    if kind and kind not in {group.kind for group in family.groups}:
        return "–"
    model = build_model(config, model_class(config, classify=False), device="meta")
    structure = prepare_(model, choose_kinds(model, (kind,) if kind else ()), None)
    keep = keep_evenly(model, structure, block_paths(model, family)[-1])
    n_units = {name: site.n_units for name, site in structure.everything.items()}
    structure.compact(model, PruningPlan(config.model_type, n_units, keep))
    return WAYS[tier_of(model)]


def vanilla_kinds(config: PreTrainedConfig) -> str:
    """The kinds that `--vanilla` cuts if all are asked for."""
    model = build_model(config, model_class(config, classify=False), device="meta")
    kinds = dict.fromkeys(group.kind for group in find_family(config.model_type).groups)
    rank = () if find_family(config.model_type).factorizes else ("embedding_rank",)
    asked = tuple(kind for kind in kinds if kind not in ("vocab", "embedding_rank") or kind in rank)
    structure = prepare_(model, asked, None)
    limited, _ = plain_structure(model, structure, structure.costs.params, round_to=8)
    found = {site.kind for site in limited.sites.values()} | {"vocab"} & set(kinds)
    return ", ".join(kind for kind in KINDS if kind in found)


def small_config(model_type: str) -> PreTrainedConfig:
    if model_type == "clip":  # of its two towers, a classifier holds one
        return AutoConfig.for_model(model_type, architectures=["CLIPForImageClassification"])
    try:
        return AutoConfig.for_model(model_type, num_hidden_layers=2)
    except (AttributeError, NotImplementedError):
        return AutoConfig.for_model(model_type)  # Swin counts its layers by stage


def main() -> None:
    print(HEAD.format(traced=", ".join(f"`{name}`" for name in TRACED)))
    print("| model type | " + " | ".join(f"`{kind}`" for kind in KINDS) + " | all but `vocab` | `--vanilla` |")
    print("|---|" + "---|" * (len(KINDS) + 2))
    for model_type in (name for family in FAMILIES for name in family.model_types):
        cells = [way(small_config(model_type), kind) for kind in (*KINDS, "")]
        cells.append(vanilla_kinds(small_config(model_type)))
        print(f"| `{model_type}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
