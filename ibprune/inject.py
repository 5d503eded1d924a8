"""Puts VIB masks into a model by hooks and takes them out again; no base parameter changes name."""

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


class _NormInputHook:
    """Prepares a norm's input so that its statistics cover the kept features only.

    With d' of d features kept, s = sqrt(d/d'), the norm sees s * kept * (x - mean over kept): its own
    mean is then 0 and its own mean square that of the kept features, for any LayerNorm or RMSNorm.
    """

    def __init__(self, mask: VIBMask):
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        hard, kept = self.mask.hard, self.mask.n_kept
        if self.mask.probe is not None or kept == len(hard):
            return args
        x = args[0]
        if isinstance(module, nn.LayerNorm):
            x = x - (x * hard.to(x.dtype)).sum(-1, keepdim=True) / kept
        return (x * (hard * (len(hard) / kept) ** 0.5).to(x.dtype), *args[1:])


class _NormOutputHook:
    """Undoes the scale of `_NormInputHook` and multiplies by the mask."""

    def __init__(self, mask: VIBMask):
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        n_units, kept = len(self.mask.hard), self.mask.n_kept
        if self.mask.probe is None and kept != n_units:
            scale = (kept / n_units) ** 0.5
            bias = getattr(module, "bias", None)
            output = output * scale if bias is None else (output - bias) * scale + bias
        return _multiply(self.mask, output, 1)


_HOOKS = (_InputHook, _OutputHook, _NormInputHook, _NormOutputHook)


def _multiply(mask: VIBMask, x: torch.Tensor, width: int) -> torch.Tensor:  # (batch, ..., n_units * width)
    z = mask(x.shape[0]).to(x.dtype)
    if width > 1 and len(mask.mu) > 1:
        z = z.repeat_interleave(width, dim=1)
    return x * z.view(z.shape[0], *[1] * (x.ndim - 2), z.shape[1])


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
            for norm in norm_paths(model, site):
                model.get_submodule(norm).register_forward_pre_hook(_NormInputHook(mask))
                model.get_submodule(norm).register_forward_hook(_NormOutputHook(mask))
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
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _HOOKS)]:
                del hooks[key]
    if hasattr(model, MASKS):
        delattr(model, MASKS)
