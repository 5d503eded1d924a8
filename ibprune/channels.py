"""Finds the channels of any module that can be cut: traced, bound as sites, and each proven on an example."""

import copy
import random
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from ibprune.errors import BadData, BadRecipe, UnsupportedModel, did_you_mean, first_line
from ibprune.groups import Cut, Group, MaskAt, Site, axis_dims
from ibprune.inject import inject_
from ibprune.names import MODULE_KINDS
from ibprune.plans import PruningPlan, model_type
from ibprune.slicing import select_inputs_
from ibprune.surgery import compact_module_
from ibprune.tracing import FORWARD_ERRORS, Place, Unit, tensors, trace_units

TOLERANCE = 1e-8  # of the largest output, in float64: rounding stays below it, another function does not


@dataclass(frozen=True)
class Found:
    """What can be cut and what cannot.

    Attributes:
        sites: By name, in model order. A site of channels bears the name of the layer that makes them.
        refused: Why other channels cannot be cut, by the same kind of name.
    """

    sites: dict[str, Site]
    refused: dict[str, str]


def find_channels(model: nn.Module, example: torch.Tensor, *, kinds: tuple[str, ...] = ("channels",)) -> Found:
    """Every place of a module where units can be removed, each proven: masked == compacted.

    Torch-Pruning's dependency graph proposes which features are coupled. The proof runs on a float64
    copy with random weights, so that nothing passes because some weight happens to be 0: a random plan
    carried out by masks must equal the same plan carried out by surgery. What fails is refused with
    the reason, site by site.

    Args:
        example: An input that the model reads, (batch, ...).
        kinds: "channels", and "inputs": single input features of linear layers. Those of a layer that
            reads channels come in a call with kinds ("inputs",) alone, best on the compacted model.

    Raises:
        BadRecipe: An unknown kind.
        BadData: The model cannot read the example.
        UnsupportedModel: The forward cannot be traced, or nothing can be cut.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> find_channels(net, torch.zeros(1, 3, 8, 8)).sites["0"].n_units
        8
    """
    for kind in kinds:
        if kind not in MODULE_KINDS:
            raise BadRecipe(f"unknown kind '{kind}': {did_you_mean(kind, MODULE_KINDS)}.")
    if not isinstance(example, torch.Tensor) or example.ndim < 2:
        found = tuple(example.shape) if isinstance(example, torch.Tensor) else type(example).__name__
        raise BadData(f"expected an example tensor (batch, ...), found {found}.")
    if not example.is_floating_point():
        raise BadData(
            f"expected an example of floating-point numbers, found {example.dtype}. Transformers that read token ids "
            "are pruned by name or folder."
        )
    twin = _random_twin(model)
    example = example.detach().to("cpu", torch.float64)
    example = example if len(example) > 1 else example.repeat(2, *[1] * (example.ndim - 1))
    _check_example(twin, example)
    channels, refused = _bind(twin, trace_units(twin, example))
    sites = channels if "channels" in kinds else {}
    if "inputs" in kinds:
        sites = sites | _input_sites(twin, channels, alone="channels" not in kinds)
    sites, failed = _proven(twin, sites, example)
    refused = refused | failed if "channels" in kinds else failed
    if not sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise UnsupportedModel(
            f"expected {' or '.join(kinds)} that can be cut in {type(model).__name__}, found none"
            + (f" ({reasons})." if reasons else ": no layer's features are read by another layer.")
        )
    return Found(sites, refused)


def check_weights(model: nn.Module) -> None:
    """Raises `UnsupportedModel` for weights that are made of others (weight_norm, spectral_norm) or not made yet."""
    for name, module in model.named_modules():
        if is_parametrized(module) or hasattr(module, "weight_g"):  # the older weight_norm has no other sign
            raise UnsupportedModel(
                f"expected weights that are parameters, found '{name}' with weights computed from others: call "
                "torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) on it first."
            )
        if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters(recurse=False)):
            raise UnsupportedModel(f"expected weights, found none yet in '{name}': run the model once before.")


def prepare_(model: nn.Module, sites: dict[str, Site]) -> None:
    """Makes the linear layers of `inputs` sites ones that can read a selection; outputs are unchanged."""
    for site in sites.values():
        if site.kind == "inputs":
            select_inputs_(model, site.cuts[0].path)


def _random_twin(model: nn.Module) -> nn.Module:
    """A float64 copy on the CPU, in eval mode, with random weights that keep activations in range."""
    if not any(True for _ in model.parameters()):
        raise UnsupportedModel(f"expected a model with parameters, found none in {type(model).__name__}.")
    twin = copy.deepcopy(model).to("cpu", torch.float64).eval().requires_grad_(True)  # not every device has float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim > 1:
                scale = sqrt(2 / max(1, parameter[0].numel()))
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            else:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in twin.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return twin


def _check_example(twin: nn.Module, example: torch.Tensor) -> None:
    try:
        with torch.no_grad():
            found = tensors(twin(example))
    except FORWARD_ERRORS as error:
        raise BadData(
            f"expected an example that {type(twin).__name__} reads, but its forward fails on float64 of shape "
            f"{tuple(example.shape)}: {first_line(error)} Give a batch of inputs as the loader makes it."
        ) from error
    if not found:
        raise UnsupportedModel(f"expected {type(twin).__name__} to return tensors, found none.")


def _bind(model: nn.Module, units: list[Unit]) -> tuple[dict[str, Site], dict[str, str]]:
    """Sites of the units that go alike (the same places, as many features at each), and what is refused."""
    alike: dict[tuple, list[Unit]] = {}
    for unit in units:
        key = (tuple((place, len(found)) for place, found in unit.features.items()), unit.reason)
        alike.setdefault(key, []).append(unit)
    sites: dict[str, Site] = {}
    refused: dict[str, str] = {}
    for (places, reason), members in alike.items():
        maker = _maker(model, [place for place, _ in places])
        if maker is None:
            continue  # what only reads: the model's input
        members = sorted(members, key=lambda unit: unit.features[maker][0])
        name = maker[0]
        if name in sites or name in refused:  # the layer's channels go several ways
            name = f"{name}:{members[0].features[maker][0]}"
        cuts = [_cuts(model, place, [unit.features[place] for unit in members]) for place, _ in places]
        failed = next((cut for cut in cuts if isinstance(cut, str)), "")
        flat = tuple(cut for found in cuts if not isinstance(found, str) for cut in found)
        if not failed and not any(cut.axis == "in" for cut in flat):
            continue  # no layer reads them: they are the model's output and nothing else
        if not reason and not failed and len(members) == 1:
            failed = "they are one unit, which must stay"
        if reason or failed:
            refused[name] = reason or failed
            continue
        group = Group("channels", "channels", flat, MaskAt("consumers"), per_block=False)
        sites[name] = Site(name, group, "", flat, group.mask_at, len(members))
    return sites, refused


def _maker(model: nn.Module, places: list[Place]) -> Place | None:
    """The first layer that computes the features."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    made = [place for place in places if place[1] == "out" and isinstance(model.get_submodule(place[0]), layers)]
    return made[0] if made else None


def _cuts(model: nn.Module, place: Place, features: list[tuple[int, ...]]) -> list[Cut] | str:
    """The cuts that give each unit its features on one axis, or why there are none."""
    path, axis = place
    module = model.get_submodule(path)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return f"'{path}' normalises over {len(module.normalized_shape)} axes at once"
    if not axis_dims(module, axis):
        if isinstance(module, nn.modules.conv._ConvNd):
            return []  # what a grouped convolution reads goes with its groups
        return f"'{path}' is a {type(module).__name__} without weights, whose width cannot be told from its tensors"
    cuts, start = [], 0
    first = features[0]
    for end in range(1, len(first) + 1):
        if end == len(first) or first[end] != first[end - 1] + 1:
            width = end - start
            expected = [first[start] + i * width for i in range(len(features))]
            if [unit[start] for unit in features] != expected or any(
                unit[start:end] != tuple(range(unit[start], unit[start] + width)) for unit in features
            ):
                return f"their features do not lie side by side in '{path}'"
            cuts.append(Cut(path, axis, offset=first[start], width=width))
            start = end
    return cuts


def _input_sites(model: nn.Module, channels: dict[str, Site], *, alone: bool) -> dict[str, Site]:
    """One site per linear layer whose input features are not channels of their own.

    Args:
        alone: Whether channels are left uncut: then features that a flattened channel spans count too.
    """
    read = [cut for site in channels.values() for cut in site.consumers()]
    owned = {cut.path for cut in read if cut.width == 1 or not alone}
    sites = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in owned and module.in_features > 1:
            cuts = (Cut(path, "in", width=1),)
            group = Group("inputs", "inputs", cuts, MaskAt("consumers"), per_block=False)
            name = f"{path}.inputs"
            sites[name] = Site(name, group, "", cuts, group.mask_at, module.in_features)
    return sites


def _proven(twin: nn.Module, sites: dict[str, Site], example: torch.Tensor) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites whose masks and surgery agree, together, and the reasons of the others.

    Raises:
        UnsupportedModel: Each agrees alone and together they do not.
    """
    if not sites or not _disagreement(twin, sites, example):
        return sites, {}
    refused = {}
    for name, site in sites.items():
        reason = _disagreement(twin, {name: site}, example)
        if reason:
            refused[name] = reason
    sites = {name: site for name, site in sites.items() if name not in refused}
    together = _disagreement(twin, sites, example) if sites else ""
    if together:
        raise UnsupportedModel(f"the channels of {type(twin).__name__} cannot be cut together: {together}.")
    return sites, refused


def _disagreement(twin: nn.Module, sites: dict[str, Site], example: torch.Tensor) -> str:
    """Why a random plan by masks is not the same plan by surgery, "" where it is."""
    rng = random.Random(0)
    keep = {}
    for name, site in sites.items():
        keep[name] = tuple(sorted(rng.sample(range(site.n_units), rng.randint(1, site.n_units - 1))))
    model = copy.deepcopy(twin)
    prepare_(model, sites)
    masks = inject_(model, sites)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for _, mask in masks.items():  # every layer must read whole samples, as scores and noise assume
                mask.probe = torch.ones(len(example), len(mask.mu), device=mask.mu.device)
            model(example)
            for _, mask in masks.items():
                mask.probe = None
                mask.mu.copy_(0.5 + torch.rand(len(mask.mu), generator=generator))
            masks.set_keep(keep)
            masked = tensors(model(example))
            plan = PruningPlan(model_type(model), {name: site.n_units for name, site in sites.items()}, keep)
            compacted = tensors(compact_module_(model, sites, plan)(example))
    except FORWARD_ERRORS as error:
        return f"without some of them the forward fails: {first_line(error).rstrip('.')}"
    for one, other in zip(masked, compacted):
        if one.shape != other.shape:
            return f"they are part of the output, whose shape changes from {tuple(one.shape)} to {tuple(other.shape)}"
        apart = float((one - other).abs().max())
        if not apart <= TOLERANCE * max(1.0, float(one.abs().max())):
            return (
                f"removing them is not multiplying them by 0 (the outputs differ by {apart:.1e}): something between "
                "the layers that make and read them mixes channels, or counts on their places"
            )
    return ""
