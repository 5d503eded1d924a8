"""Low-rank adapters in a transformer's blocks, to train instead of its weights, which take them up afterwards."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ibprune.errors import BadRecipe
from ibprune.rebuild import full_path
from ibprune.sites import block_paths, find_family

RANK = 16  # by default; the scale alpha / rank is 2 then


@dataclass(frozen=True)
class Lora:
    """Adapters W + alpha / rank * B A of rank `rank` (Hu et al. 2022, arXiv 2106.09685, section 4.1); B starts at 0."""

    rank: int
    alpha: float


def need_peft() -> None:
    """Raises `BadRecipe` where the package is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BadRecipe(f"expected {error.name} for LoRA, found none: pip install 'ibprune[lora]'.") from error


def adapted_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers in the blocks, and of no other: an embedding and a tied output share their weight."""
    blocks = [full_path(model, path) for path in block_paths(model, find_family(model.config.model_type))]
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(path.startswith(f"{block}.") for block in blocks)
    ]


def count_adapters(model: PreTrainedModel, lora: Lora) -> int:
    """Parameters of the adapters that `adapted` puts beside a model's layers, which may be on the device "meta"."""
    layers = (model.get_submodule(path) for path in adapted_layers(model))
    return sum(lora.rank * sum(layer.weight.shape) for layer in layers)


@contextmanager
def adapted(model: PreTrainedModel, lora: Lora | None) -> Iterator[int]:
    """While it is open, adapters beside the linear layers of all blocks are all that trains of a model; then the
    weights have taken them up, and the model is as it was but for its values.

    Args:
        lora: None leaves every weight to be trained.

    Yields:
        How many parameters train.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if lora is None:
        yield sum(p.numel() for p in model.parameters() if p.requires_grad)
        return
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    layers = adapted_layers(model)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=layers)
    config.fan_in_fan_out = any(isinstance(model.get_submodule(path), Conv1D) for path in layers)
    with warnings.catch_warnings():  # it names the experts of a mixture as older checkpoints did, and finds none so
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        tuner = LoraModel(model, config, "default")
    yield sum(p.numel() for p in model.parameters() if p.requires_grad)
    tuner.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
