"""What a config may claim: sizes that its weights bear out, and no code from elsewhere."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ibprune.errors import UnsupportedModel

MOST = 2**31 - 1  # of anything that a config counts
MOST_LAYERS = 512  # modules are made for each, several times: 3 ms of a processor for a BERT block
MOST_LABELS = 2**20  # a name is made for each
LAYERS = re.compile(r"layers?$|depth|blocks?$|groups?$|repeats?$")
ATTENTIONS = ("eager", "sdpa", "flex_attention")  # for flash_attention_2 a kernel of the Hub may be taken
EXPERTS = ("eager", "batched_mm", "grouped_mm")
COPIES = 4  # of an embedding, at the most, that a file holds once: T5 ties four
SLACK = 2**24  # values of buffers that no file holds


def check_claims(raw: dict, name: str) -> None:
    """Raises `UnsupportedModel` for a number that no model has, or for code that transformers would fetch and run."""
    for key, value in _leaves(raw):
        if isinstance(value, str):
            known = {"attn_implementation": ATTENTIONS, "experts_implementation": EXPERTS}.get(key.strip("_"))
            if known and value not in known:
                raise UnsupportedModel(
                    f"expected '{key}' in the config of '{name}' to be one of {', '.join(known)}, found '{value}': no "
                    "code of others is fetched or run; take the key out."
                )
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = MOST_LABELS if key == "num_labels" else MOST_LAYERS if LAYERS.search(key) else MOST
            if abs(value) > most and (most < MOST or isinstance(value, int)):
                raise UnsupportedModel(
                    f"expected at most {most:,} for '{key}' in the config of '{name}', found {value:.6g}."
                    if abs(value) < 1e300
                    else f"expected at most {most:,} for '{key}' in the config of '{name}', found a number beyond all."
                )


def _leaves(raw: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every value in nested JSON with the key that is nearest to it."""
    if isinstance(raw, dict):
        for inner, value in raw.items():
            yield from _leaves(value, str(inner))
    elif isinstance(raw, list | tuple):
        for value in raw:
            yield from _leaves(value, key)
    else:
        yield key, raw


def check_fits(cls: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """Raises `UnsupportedModel` where a config claims a model far larger than the weights in the folder.

    transformers would reserve, and fill with random numbers, whatever the weights lack, and say so afterwards.
    """
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    values = count_values(cls, config)
    if stored and values > COPIES * stored + SLACK:
        raise UnsupportedModel(
            f"the config in '{folder}' describes a {cls.__name__} of {values:,} values, and the weights beside it are "
            f"of {stored:,} bytes: they do not belong together."
        )


def check_memory(cls: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raises `UnsupportedModel` where a config describes a model that this machine cannot hold."""
    needed, there = 4 * count_values(cls, config), psutil.virtual_memory().total
    if needed > there:
        raise UnsupportedModel(
            f"the config describes a {cls.__name__} of {needed / 1e9:,.1f} GB, this machine has {there / 1e9:,.1f} GB."
        )


def count_values(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """Numbers in all parameters and buffers of a model; nothing is reserved."""
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    tensors = {id(tensor): tensor.numel() for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
