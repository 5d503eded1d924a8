"""Which kinds of units each model type has, and how a folder loads when one kind, or all, lose units evenly.

    python scripts/family_table.py > docs/families.md

From default configs with few layers. Every layer keeps the first three quarters of its units of a kind; of the layers,
the last block goes.
"""

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ibprune.channels import find_channels
from ibprune.export import tier_of
from ibprune.families import FAMILIES, TRACED
from ibprune.models import build_model, model_class
from ibprune.plans import PruningPlan
from ibprune.sites import block_paths, find_family, is_traced
from ibprune.structure import Structure, choose_kinds, prepare_, prepare_traced_
from ibprune.surgery import compact_traced_, named_rows

WAYS = {"vanilla": "plain", "remote_code": "code"}
KINDS = ("heads", "kv_groups", "ffn", "layers", "hidden", "embedding_rank", "vocab", "channels")
HEAD = """# Model types, kinds of units, and how folders load

Made by `python scripts/family_table.py > docs/families.md`: every layer keeps three quarters of its units of a kind; of
`layers`, the last block goes. **plain**: plain transformers builds the shapes, no code is needed. **code**:
`trust_remote_code=True`, one small file in the folder. `ibprune.load` reads both and runs no code of the folder. Uneven
widths need code, or `ibprune.load`. A dash: the family has no such units; `ibprune plan --kinds …` says why.
"""


def load(config: PreTrainedConfig, kind: str):
    """The model without trained weights, and what can be cut of it."""
    cls = model_class(config, classify=False)
    if is_traced(config.model_type):
        model, example = build_model(config, cls, device="cpu"), torch.zeros(2, config.num_channels, 64, 64)
        return model, prepare_traced_(model, find_channels(model, example).sites, example, compact_traced_)
    model = build_model(config, cls, device="meta")
    return model, prepare_(model, choose_kinds(model, (kind,) if kind else ()), None)


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
    if kind == "channels" and not is_traced(config.model_type):
        return "–"
    if kind and not is_traced(config.model_type):
        if kind not in {group.kind for group in find_family(config.model_type).groups}:
            return "–"
    if kind not in ("", "channels") and is_traced(config.model_type):
        return "–"
    model, structure = load(config, kind)
    last = "" if is_traced(config.model_type) else block_paths(model, find_family(config.model_type))[-1]
    keep = keep_evenly(model, structure, last)
    n_units = {name: site.n_units for name, site in structure.everything.items()}
    structure.compact(model, PruningPlan(config.model_type, n_units, keep))
    return WAYS[tier_of(model)]


def small_config(model_type: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(model_type, num_hidden_layers=2)
    except (AttributeError, NotImplementedError):
        return AutoConfig.for_model(model_type)  # Swin and CNNs count their layers by stage


def main() -> None:
    print(HEAD)
    print("| model type | " + " | ".join(f"`{kind}`" for kind in KINDS) + " | all but `vocab` |")
    print("|---|" + "---|" * (len(KINDS) + 1))
    for model_type in (*(name for family in FAMILIES for name in family.model_types), *TRACED):
        cells = [way(small_config(model_type), kind) for kind in (*KINDS, "")]
        print(f"| `{model_type}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
