"""Cuts feature axes of a module: index-selects tensors, and makes linear layers read a selection."""

import torch
from torch import nn

from ibprune.groups import Site, axis_dims, get_tensor
from ibprune.plans import PruningPlan
from ibprune.rebuild import SelectedLinear, replace_module, set_parameter


def slice_(model: nn.Module, sites: dict[str, Site], plan: PruningPlan) -> None:
    """Index-selects every cut axis, each tensor once, however many modules share it."""
    modules = dict(model.named_modules())
    kept: dict[int, dict[int, torch.Tensor]] = {}  # by tensor identity, then dimension: which features stay
    for site in sites.values():
        gone = torch.ones(site.n_units, dtype=torch.bool)
        gone[list(plan.keep[site.name])] = False
        for cut in site.cuts:
            if cut.axis == "whole" or cut.path not in modules or not gone.any():
                continue
            for name, dim in axis_dims(modules[cut.path], cut.axis):
                tensor = get_tensor(modules[cut.path], name)
                offset, width = cut.span(site.n_units, tensor.shape[dim])
                stays = kept.setdefault(id(tensor), {}).setdefault(dim, torch.ones(tensor.shape[dim], dtype=torch.bool))
                stays[offset : offset + site.n_units * width] &= ~gone.repeat_interleave(width)
    new: dict[int, torch.Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) in kept:
            if id(tensor) not in new:
                value = tensor.detach()
                for dim, stays in kept[id(tensor)].items():
                    value = value.index_select(dim, stays.nonzero().flatten().to(value.device))
                value = value.contiguous()
                is_parameter = isinstance(tensor, nn.Parameter)
                new[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
            set_parameter(model, name, new[id(tensor)])


def select_inputs_(model: nn.Module, path: str) -> None:
    """Puts a `SelectedLinear` that reads everything in the place of a linear layer; outputs are unchanged."""
    linear = model.get_submodule(path)
    if isinstance(linear, SelectedLinear):
        return
    selected = SelectedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    selected.to(linear.weight.device)
    selected.weight, selected.bias = linear.weight, linear.bias
    replace_module(model, path, selected)


def restore_inputs_(model: nn.Module, path: str) -> None:
    """Puts a plain linear layer back where everything is read after all."""
    selected = model.get_submodule(path)
    if len(selected.index) == selected.n_features:
        linear = nn.Linear(selected.in_features, selected.out_features, selected.bias is not None, device="meta")
        linear.weight, linear.bias = selected.weight, selected.bias
        replace_module(model, path, linear)
