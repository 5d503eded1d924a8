"""Puts VIB masks into a model and takes them out again; no base parameter changes name."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ibprune.errors import PlanMismatch
from ibprune.groups import Cut, Site, axis_width, is_norm
from ibprune.masks import MaskSet, VIBMask
from ibprune.rebuild import FactorizedUnembedding, SelectedLinear

MASKS = "vib_masks"


class _InputHook:
    """Multiplies a module's input features by the mask, each unit spanning `width` features."""

    def __init__(self, mask: VIBMask, width: int):
        self.mask, self.width = mask, width

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (_multiply(self.mask, args[0], self.width), *args[1:])


class _OutputHook:
    """Multiplies a module's output features by the mask."""

    def __init__(self, mask: VIBMask):
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return _multiply(self.mask, output, 1)


class _RouterHook:
    """Makes a router choose among the kept experts only, and multiplies what each expert adds by the mask.

    The router is run again with the kept rows of its weights, so that it does what its class does with so many
    experts; the logits of the others are -inf. The weight of an expert that a token takes multiplies all that this
    expert adds for it: there the mask acts, whatever way the experts are computed.
    """

    def __init__(self, mask: VIBMask):
        self.mask = mask
        self.batch = 1  # sequences; their tokens reach the router one after the other

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Counts the sequences, at the module that holds the router."""
        self.batch = len(args[0])

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        logits, weights, chosen = output  # (tokens, n_units), (tokens, k), (tokens, k)
        if self.mask.n_kept < len(self.mask.hard):
            kept = self.mask.hard.nonzero().flatten()
            small = copy.copy(module)
            vars(small)["_parameters"] = {name: tensor[kept] for name, tensor in module.named_parameters()}
            own, weights, chosen = type(module).forward(small, *args)
            logits = torch.full_like(logits, -torch.inf).index_copy(1, kept, own)
            chosen = kept[chosen]
        z = self.mask(self.batch)
        z = z.repeat_interleave(len(chosen) // len(z), dim=0)  # (tokens, n_units)
        return logits, weights * z.gather(1, chosen).to(weights.dtype), chosen


class _MaskedLayerNorm:
    """Stands in for a LayerNorm's `forward`: statistics over the kept features, then the mask.

    With d' of d features kept, the others are set to the mean of the kept ones. The mean is then
    theirs and the variance d'/d of theirs, which eps * d'/d and a weight times sqrt(d'/d) undo. A mask
    without noise is folded into weight and bias: this runs at every norm of every step, and on a CPU
    each pass over the activations counts.
    """

    def __init__(self, norm: nn.LayerNorm, mask: VIBMask):
        self.norm, self.mask = norm, mask

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm, hard = self.norm, self.mask.hard
        n_units, kept = len(hard), self.mask.n_kept
        if kept != n_units:
            x = x * hard.to(x.dtype)
            x = torch.addcmul(x, x.sum(-1, keepdim=True), (1 - hard).to(x.dtype), value=1 / kept)
        z = self.mask(x.shape[0])
        fold = z[0] if z.shape[0] == 1 else torch.ones_like(z[0])
        weight = (kept / n_units) ** 0.5 * fold.to(norm.weight.dtype) * norm.weight
        bias = None if norm.bias is None else fold.to(norm.bias.dtype) * norm.bias
        output = nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps * kept / n_units)
        return output if z.shape[0] == 1 else _scale(output, z)


class _NormInputHook:
    """Prepares an RMSNorm's input so that its statistics cover the kept features only.

    With d' of d features kept, the norm sees sqrt(d/d') * kept * x, whose mean square is that of the
    kept features, whatever the norm's class does with its weight. Each unit spans `width` features.
    """

    def __init__(self, mask: VIBMask, width: int = 1):
        self.mask, self.width = mask, width

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        hard, kept = self.mask.hard, self.mask.n_kept
        if kept == len(hard):
            return args
        scale = (hard * (len(hard) / kept) ** 0.5).repeat_interleave(self.width)
        return (args[0] * scale.to(args[0].dtype), *args[1:])


class _NormOutputHook:
    """Undoes the scale of `_NormInputHook` and, where `multiply` is set, multiplies by the mask."""

    def __init__(self, mask: VIBMask, multiply: bool = True):
        self.mask, self.multiply = mask, multiply

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        z = self.mask(output.shape[0]) if self.multiply else torch.ones(1, 1, device=output.device)
        return _scale(output, z * (self.mask.n_kept / len(self.mask.hard)) ** 0.5)


@dataclass(frozen=True)
class _Part:
    """A mask's place on a feature axis: unit j acts on the features offset + j * width … of it."""

    mask: VIBMask
    offset: int
    width: int


class _ConsumerHook:
    """Multiplies what a layer reads by the masks of the sites that share its input features."""

    def __init__(self, features: int, dim: int, parts: list[_Part]):
        self.features, self.dim, self.parts = features, dim, parts

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        parts = [(part, part.mask(x.shape[0])) for part in self.parts]
        z = torch.ones(max(len(z) for _, z in parts), self.features, device=x.device)
        return (x * _along(_place(z, parts).to(x.dtype), x, self.dim), *args[1:])


class _KeptNormHook:
    """Makes a LayerNorm take its statistics over the kept features, whatever the layout of its input.

    With d' of d features kept, the kept ones are moved from their mean m to m + sqrt(d/d') (x - m) and the
    others set to m: mean and variance over all d are then those of the kept ones, eps included, and
    the output is sqrt(d/d') times too large, which `undo` mends.
    """

    def __init__(self, norm: nn.LayerNorm, parts: list[_Part]):
        self.features, self.parts = norm.normalized_shape[0], parts
        self.channels_first = getattr(norm, "data_format", "") == "channels_first"

    def _kept(self, x: torch.Tensor) -> tuple[torch.Tensor, int, float]:
        hard = torch.ones(1, self.features, device=x.device)
        hard = _place(hard, [(part, part.mask.hard.unsqueeze(0)) for part in self.parts])
        count = self.features - sum((len(p.mask.hard) - p.mask.n_kept) * p.width for p in self.parts)
        dim = 1 if self.channels_first or x.shape[-1] != self.features else -1
        return _along(hard.to(x.dtype), x, dim), dim, count

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        hard, dim, count = self._kept(args[0])
        if count == self.features:
            return args
        x = args[0] * hard
        mean = x.sum(dim, keepdim=True) / count
        return (mean + (self.features / count) ** 0.5 * hard * (x - mean), *args[1:])

    def undo(self, module: nn.LayerNorm, args: tuple, output: torch.Tensor) -> torch.Tensor:
        _, dim, count = self._kept(output)
        if count == self.features:
            return output
        bias = 0.0 if module.bias is None else _along(module.bias.unsqueeze(0), output, dim)
        return bias + (count / self.features) ** 0.5 * (output - bias)


_HOOKS = (_InputHook, _OutputHook, _RouterHook, _NormInputHook, _NormOutputHook, _ConsumerHook, _KeptNormHook)


def _place(full: torch.Tensor, parts: list[tuple[_Part, torch.Tensor]]) -> torch.Tensor:
    """`full` (rows, features) with the values (rows or 1, n_units) of each part in its place."""
    pieces, position = [], 0
    for part, values in sorted(parts, key=lambda pair: pair[0].offset):
        values = values.expand(len(full), -1).repeat_interleave(part.width, dim=1)
        pieces += [full[:, position : part.offset], values]
        position = part.offset + values.shape[1]
    return torch.cat([*pieces, full[:, position:]], dim=1)


def _along(z: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """`z` (rows or 1, features) in the shape that multiplies the features of x on `dim` (1 or -1)."""
    if dim == 1:
        return z.view(*z.shape, *[1] * (x.ndim - 2))
    return z.view(len(z), *[1] * (x.ndim - 2), z.shape[1])


def _multiply(mask: VIBMask, x: torch.Tensor, width: int) -> torch.Tensor:  # (batch, ..., n_units * width)
    z = mask(x.shape[0])
    return _scale(x, z.repeat_interleave(width, dim=1) if width > 1 and z.shape[1] > 1 else z)


def _scale(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:  # (batch, ..., features) by (batch or 1, features or 1)
    return x * z.to(x.dtype).view(z.shape[0], *[1] * (x.ndim - 2), z.shape[1])


def inject_(model: nn.Module, sites: dict[str, Site], *, log_alpha: float = -9.0) -> MaskSet:
    """Adds one mask per site (none for a vocabulary). In eval mode the model's output is unchanged.

    The masks live in `model.vib_masks`, so that they move, save, copy and train with the model.

    Raises:
        PlanMismatch: The model carries masks already.
    """
    if hasattr(model, MASKS):
        raise PlanMismatch("expected a model without masks, found some: call remove_(model) first.")
    device = next(model.parameters()).device
    sites = {name: site for name, site in sites.items() if site.mask_at.side != "none"}
    masks = MaskSet(
        {
            name: VIBMask(
                site.n_units,
                log_alpha=log_alpha,
                flattened=site.mask_at.flattened,
                tables=site.mask_at.tables,
                mixed=site.mask_at.mixed,
            )
            for name, site in sites.items()
        }
    )
    masks.to(device).train(model.training)
    setattr(model, MASKS, masks)
    _inject_consumers_(model, sites, masks)
    for name, site in sites.items():
        mask = masks[name]
        if site.mask_at.side == "consumers":
            continue
        if site.mask_at.side == "norms":
            for path in norm_paths(model, site):
                norm = model.get_submodule(path)
                if isinstance(norm, nn.LayerNorm):
                    norm.forward = _MaskedLayerNorm(norm, mask)
                else:
                    norm.register_forward_pre_hook(_NormInputHook(mask))
                    norm.register_forward_hook(_NormOutputHook(mask))
            for module, axis in unnormed(model, site):
                if axis == "in":
                    module.register_forward_pre_hook(_InputHook(mask, 1))
                else:
                    module.register_forward_hook(_OutputHook(mask))
            continue
        module = model.get_submodule(site.mask_at.path)
        if site.mask_at.side == "rank":
            module.projection.register_forward_pre_hook(_InputHook(mask, 1))
            for cut in site.cuts:
                output = model.get_submodule(cut.path)
                if isinstance(output, FactorizedUnembedding):
                    output.codes.register_forward_hook(_OutputHook(mask))
        elif site.mask_at.side == "router":
            hook = _RouterHook(mask)
            model.get_submodule(site.mask_at.path.rpartition(".")[0]).register_forward_pre_hook(hook.enter)
            module.register_forward_hook(hook)
        elif site.mask_at.side == "in":
            width = axis_width(model, Cut(site.mask_at.path, "in")) // site.n_units
            module.register_forward_pre_hook(_InputHook(mask, width))
            for path in norm_paths(model, site):  # a norm over all heads: its statistics are those of the kept ones
                norm = model.get_submodule(path)
                norm.register_forward_pre_hook(_NormInputHook(mask, len(norm.weight) // site.n_units))
                norm.register_forward_hook(_NormOutputHook(mask, multiply=False))
        else:
            module.register_forward_hook(_OutputHook(mask))
    return masks


def _inject_consumers_(model: nn.Module, sites: dict[str, Site], masks: MaskSet) -> None:
    """One hook per layer that reads, or normalises over, features of traced sites."""
    modules = dict(model.named_modules())
    parts: dict[str, list[_Part]] = {}
    for site in sites.values():
        for cut in site.cuts if site.mask_at.side == "consumers" else ():
            if cut.axis == "in" or isinstance(modules[cut.path], nn.LayerNorm):
                span = cut.span(site.n_units, axis_width(model, cut))
                parts.setdefault(cut.path, []).append(_Part(masks[site.name], *span))
    for path, found in parts.items():
        module = modules[path]
        if isinstance(module, nn.LayerNorm):
            hook = _KeptNormHook(module, found)
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(hook.undo)
        else:
            place = module.selected if isinstance(module, SelectedLinear) else module
            width = axis_width(model, Cut(path, "in"))
            place.register_forward_pre_hook(_ConsumerHook(width, -1 if isinstance(module, nn.Linear) else 1, found))


def norm_paths(model: nn.Module, site: Site) -> list[str]:
    return [cut.path for cut in site.cuts if is_norm(model.get_submodule(cut.path))]


def unnormed(model: nn.Module, site: Site) -> list[tuple[nn.Module, str]]:
    """What makes ("out") or reads ("in") the features of a mask at the norms without a norm, where it is present."""
    return [(model.get_submodule(cut.path), cut.axis) for cut in site.cuts if cut.path == site.mask_at.path]


def remove_(model: nn.Module) -> None:
    """Takes all masks out; the model is as it was before `inject_`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _MaskedLayerNorm):
            del module.forward
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), _HOOKS)]:
                del hooks[key]
    if hasattr(model, MASKS):
        delattr(model, MASKS)
