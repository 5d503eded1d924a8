"""A base model that bitsandbytes holds in 4 or 8 bits: what that rules out, how it is loaded, copied and shaped."""

import copy
import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ibprune.costs import count_params
from ibprune.errors import BadRecipe, UnsupportedModel
from ibprune.lora import adapted_layers
from ibprune.processes import n_processes
from ibprune.pruned_config import is_pruned
from ibprune.recipe import Recipe
from ibprune.sites import find_family, is_traced

SCORED = ("vib", "fisher", "taylor", "activation", "random")  # these read no weight and change none


def bits(recipe: Recipe) -> int:
    """Bits of a weight of the base model's linear layers; 0 where they are loaded as they are.

    Example:
        >>> bits(Recipe(model="minilm", budget=0.3, load_in_4bit=True))
        4
    """
    return 4 if recipe.load_in_4bit else 8 if recipe.load_in_8bit else 0


def flag(recipe: Recipe) -> str:
    return f"--load-in-{bits(recipe)}bit"


def check_quantised(recipe: Recipe) -> None:
    """Raises `BadRecipe` where a recipe asks of a quantised base model what only whole weights have."""
    name = flag(recipe)
    if recipe.load_in_4bit and recipe.load_in_8bit:
        raise BadRecipe("expected one of --load-in-4bit and --load-in-8bit, found both.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadRecipe(f'{name} needs bitsandbytes: pip install "ibprune[bnb]", or leave it out.')
    if n_processes() > 1:
        raise BadRecipe(f"{name}: expected one process, found {n_processes()}: leave --num-processes out.")
    if isinstance(recipe.budget, tuple) or recipe.at_least:
        raise BadRecipe(f"{name} cuts one model, to one --budget: leave other budgets and --at-least out.")
    for asked in (recipe.score, recipe.start or "fisher"):
        if asked not in SCORED:
            raise BadRecipe(
                f"{name}: score {asked} reads or changes weights, and these are packed: use {', '.join(SCORED)}."
            )
    if recipe.score == "vib" and recipe.mode != "faster":
        raise BadRecipe(
            f"{name} leaves the weights as they are, and mode {recipe.mode} trains them while masks learn: use --mode "
            "faster, or a one-shot --score."
        )
    trains = recipe.recover_steps or (recipe.recover_steps is None and recipe.mode != "faster") or recipe.probe_steps
    if recipe.recovery == "full" and trains:
        raise BadRecipe(
            f"{name} is for want of memory, and --recovery full trains all weights: use --recovery lora, or "
            "--recover-steps 0."
        )
    if recipe.finetune_steps:
        raise BadRecipe(f"{name} leaves the weights as they are: leave --finetune-steps out.")
    for asked, what in (
        (recipe.rotate, "--rotate turns weights"),
        (recipe.reconstruct, "--reconstruct changes weights"),
        (recipe.cost == "latency", "--cost latency times candidate cuts of whole weights"),
        ("vocab" in recipe.kinds, "--kinds vocab rewrites the embedding before anything else is cut"),
        ("embedding_rank" in recipe.kinds, "--kinds embedding_rank factorises the embedding before it is masked"),
    ):
        if asked:
            raise BadRecipe(f"{what}, and with {name} these are read last, for the result: leave one of the two out.")


def check_packable(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raises `UnsupportedModel` where most of a model is in no linear layer, which is all that bitsandbytes packs."""
    kind = config.model_type
    if is_pruned(config):
        raise UnsupportedModel(
            f"{flag(recipe)} is for a dense model that does not fit otherwise, and this one is pruned: leave it out."
        )
    if is_traced(kind) or find_family(kind).experts:
        where = "convolutions" if is_traced(kind) else "the stacked weights of experts"
        raise UnsupportedModel(
            f"{flag(recipe)} packs linear layers, and '{kind}' keeps its weights in {where}: leave it out."
        )


def quantisation(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers loads the base model: NF4 (Dettmers et al. 2023, arXiv 2305.14314) or LLM.int8 (2208.07339).

    Args:
        dtype: In which packed layers multiply.
    """
    if not bits(recipe):
        return None
    if recipe.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def packed_bytes(model: PreTrainedModel, bits: int) -> int:
    """Bytes of a model whose blocks' linear layers are packed and whose other weights stay in float32.

    Four bits come with a float32 scale for every 64 weights (Dettmers et al. 2023, section 3, without their double
    quantisation), eight with one for every row.

    Args:
        model: With whole weights, which may be on the device "meta".
    """
    layers = [model.get_submodule(path) for path in adapted_layers(model)]
    weights = sum(layer.weight.numel() for layer in layers)
    rows = sum(layer.nf if isinstance(layer, Conv1D) else layer.out_features for layer in layers)
    scales = weights // 64 if bits == 4 else rows
    return weights * bits // 8 + 4 * (scales + count_params(model) - weights)


def copied(model: nn.Module) -> nn.Module:
    """A copy; of a quantised model one that shares its tensors, which nobody changes: masks are what is put into it."""
    shared = [*model.parameters(), *model.buffers()] if getattr(model, "hf_quantizer", None) is not None else []
    shared += [module.state for module in model.modules() if shared and hasattr(module, "init_8bit_state")]
    return copy.deepcopy(model, {id(value): value for value in shared})


def whole_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The full-precision architecture of a quantised model on the device "meta", which tells sizes as they are.

    Buffers that are in no checkpoint hold the model's values.
    """
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config)).eval()
    for path, module in skeleton.named_modules():
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            module._buffers[name] = model.get_submodule(path)._buffers[name].detach().to("cpu", copy=True)
    if skeleton.can_generate():
        skeleton.generation_config = copy.deepcopy(model.generation_config)
    return skeleton
