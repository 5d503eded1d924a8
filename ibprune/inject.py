"""Puts VIB masks into a model and takes them out again; no base parameter changes name."""

import torch
from torch import nn

from ibprune.errors import PlanMismatch
from ibprune.groups import Site, is_norm
from ibprune.masks import MaskSet, VIBMask
from ibprune.rebuild import FactorizedUnembedding

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
        if self.mask.probe is not None:
            kept = n_units  # a probe asks for gradients at the dense model
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
    kept features, whatever the norm's class does with its weight.
    """

    def __init__(self, mask: VIBMask):
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        hard, kept = self.mask.hard, self.mask.n_kept
        if self.mask.probe is not None or kept == len(hard):
            return args
        return (args[0] * (hard * (len(hard) / kept) ** 0.5).to(args[0].dtype), *args[1:])


class _NormOutputHook:
    """Undoes the scale of `_NormInputHook` and multiplies by the mask."""

    def __init__(self, mask: VIBMask):
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        z = self.mask(output.shape[0])
        if self.mask.probe is None:
            z = z * (self.mask.n_kept / len(self.mask.hard)) ** 0.5
        return _scale(output, z)


_HOOKS = (_InputHook, _OutputHook, _NormInputHook, _NormOutputHook)


def _multiply(mask: VIBMask, x: torch.Tensor, width: int) -> torch.Tensor:  # (batch, ..., n_units * width)
    z = mask(x.shape[0])
    return _scale(x, z.repeat_interleave(width, dim=1) if width > 1 and z.shape[1] > 1 else z)


def _scale(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:  # (batch, ..., features) by (batch or 1, features or 1)
    return x * z.to(x.dtype).view(z.shape[0], *[1] * (x.ndim - 2), z.shape[1])


def inject_(model: nn.Module, sites: dict[str, Site], *, log_alpha: float = -9.0) -> MaskSet:
    """Adds one mask per site. In eval mode the model's output is unchanged.

    The masks live in `model.vib_masks`, so that they move, save, copy and train with the model.

    Raises:
        PlanMismatch: The model carries masks already.
    """
    if hasattr(model, MASKS):
        raise PlanMismatch("expected a model without masks, found some: call remove_(model) first.")
    device = next(model.parameters()).device
    masks = MaskSet({name: VIBMask(site.n_units, log_alpha=log_alpha) for name, site in sites.items()})
    masks.to(device).train(model.training)
    setattr(model, MASKS, masks)
    for name, site in sites.items():
        mask = masks[name]
        if site.mask_at.side == "norms":
            for path in norm_paths(model, site):
                norm = model.get_submodule(path)
                if isinstance(norm, nn.LayerNorm):
                    norm.forward = _MaskedLayerNorm(norm, mask)
                else:
                    norm.register_forward_pre_hook(_NormInputHook(mask))
                    norm.register_forward_hook(_NormOutputHook(mask))
            continue
        module = model.get_submodule(site.mask_at.path)
        if site.mask_at.side == "rank":
            module.projection.register_forward_pre_hook(_InputHook(mask, 1))
            for cut in site.cuts:
                output = model.get_submodule(cut.path)
                if isinstance(output, FactorizedUnembedding):
                    output.codes.register_forward_hook(_OutputHook(mask))
        elif site.mask_at.side == "in":
            module.register_forward_pre_hook(_InputHook(mask, module.weight.shape[1] // site.n_units))
        else:
            module.register_forward_hook(_OutputHook(mask))
    return masks


def norm_paths(model: nn.Module, site: Site) -> list[str]:
    return [cut.path for cut in site.cuts if is_norm(model.get_submodule(cut.path))]


def remove_(model: nn.Module) -> None:
    """Takes all masks out; the model is as it was before `inject_`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _MaskedLayerNorm):
            del module.forward
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _HOOKS)]:
                del hooks[key]
    if hasattr(model, MASKS):
        delattr(model, MASKS)
