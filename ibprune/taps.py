"""The features that masks multiply, seen while a model runs: what scores of activations and refits are made from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ibprune.budget import Keep
from ibprune.groups import Cut, Site, axis_width
from ibprune.inject import norm_paths
from ibprune.losses import Batch, forward, real_tokens
from ibprune.rebuild import SelectedLinear


@dataclass(frozen=True)
class Tap:
    """A place where a site's features pass.

    Attributes:
        path: The module that they enter ("in") or leave ("out").
        dim: The dimension of the features, -1 or 1.
        offset, width: Unit j owns the features offset + j * width …; width 0: the units share all of them equally.
    """

    site: Site
    path: str
    side: str
    dim: int = -1
    offset: int = 0
    width: int = 0

    def units(self, features: torch.Tensor) -> torch.Tensor:
        """The site's own part of the features, (..., features) -> (..., n_units, width)."""
        width = self.width or features.shape[-1] // self.site.n_units
        own = features[..., self.offset : self.offset + self.site.n_units * width]
        return own.unflatten(-1, (self.site.n_units, width))


See = Callable[[Tap, torch.Tensor, Batch], None]


def taps_of(model: nn.Module, site: Site) -> list[Tap]:
    """Every place where the site's mask acts; none for a vocabulary. Of the two ends of a tied embedding the input."""
    at = site.mask_at
    match at.side:
        case "none":
            return []
        case "norms":
            bare = [Tap(site, cut.path, cut.axis) for cut in site.cuts if cut.path == at.path]
            return [Tap(site, path, "out") for path in norm_paths(model, site)] + bare
        case "rank":
            return [Tap(site, f"{at.path}.projection", "in")]
        case "consumers":
            return [_consumer(model, site, cut) for cut in site.consumers()]
        case "in":
            return [Tap(site, at.path, "in")]
        case _:  # "out", "own", and a router's weights
            return [Tap(site, at.path, "out")]


def readers(model: nn.Module, site: Site) -> list[Tap]:
    """The linear layers and plain 2-d convolutions that alone read the site's features; [] where others do too."""
    if site.mask_at.side == "in":
        found = [Tap(site, site.mask_at.path, "in")]
    elif site.mask_at.side == "consumers":
        found = [_consumer(model, site, cut) for cut in site.consumers()]
    else:
        return []
    return found if all(is_readable(model.get_submodule(tap.path)) for tap in found) else []


def is_readable(module: nn.Module) -> bool:
    """Whether outputs are a matrix times rows of inputs: a linear layer or a plain convolution."""
    plain = isinstance(module, nn.Conv2d) and module.groups == 1
    return isinstance(module, (nn.Linear, Conv1D)) or (
        plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )


def weight_rows(module: nn.Module) -> torch.Tensor:
    """The weight of a readable layer with a row per input feature, (features, out).

    Of a convolution the features are (channel, row, column) of its kernel.
    """
    weight = module.weight.detach()
    return weight if isinstance(module, Conv1D) else weight.flatten(1).T


@torch.no_grad()
def set_weight_rows_(module: nn.Module, rows: torch.Tensor) -> None:
    """Writes what `weight_rows` reads."""
    module.weight.copy_(rows if isinstance(module, Conv1D) else rows.T.reshape(module.weight.shape))


def input_rows(module: nn.Module, x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What `weight_rows` multiplies, (rows, features): a row per token that is no padding, or per output pixel.

    Args:
        x: As `watch` shows it, features last.
    """
    if isinstance(module, nn.Conv2d):
        x = x.movedim(-1, 1)
        patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return real_rows(x, batch)


def real_rows(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(..., features) -> (rows, features), padding left out where x has a row per token."""
    real = batch.get("attention_mask")
    rows = x.reshape(-1, x.shape[-1])
    per_token = real is not None and (x.shape[:-1] == real.shape or (x.ndim == 2 and len(x) == real.numel()))
    return rows[real.flatten().bool()] if per_token else rows


def gone(site: Site, keep: Keep) -> torch.Tensor:
    """Which units of a site go, bool, (n_units,)."""
    cut = torch.ones(site.n_units, dtype=torch.bool)
    cut[list(keep[site.name])] = False
    return cut


def in_features(model: nn.Module, path: str) -> int:
    """Input features (of a convolution: channels) of a readable layer."""
    return axis_width(model, Cut(path, "in"))


def row_features(model: nn.Module, tap: Tap, units: torch.Tensor) -> torch.Tensor:
    """Which rows of the reader's weight belong to these units, bool, (features of `weight_rows`,)."""
    width = in_features(model, tap.path)
    per_feature = torch.zeros(width, dtype=torch.bool)
    tap.units(per_feature)[:] = units.unsqueeze(-1)
    return per_feature.repeat_interleave(len(weight_rows(model.get_submodule(tap.path))) // width)


@torch.no_grad()
def watch(model: nn.Module, batches: Iterable[Batch], taps: list[Tap], see: See, *, calls: int = 0) -> None:
    """Runs the batches and calls `see(tap, features, batch)` wherever features of a tap pass, before any mask at "in".

    Features come last, (..., features). Of a router they are the weights that its experts get, 0 for the others.

    Args:
        calls: Ends each forward after so many calls, where that is known; 0 runs all of it.
    """
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    written = [tap for tap in taps if both and "decoder" in tap.path.split(".")]
    seen: list[int] = []
    current: list[Batch] = [{}]

    def note(tap: Tap, x: torch.Tensor | tuple) -> None:
        if isinstance(x, tuple):
            _, weights, chosen = x
            x = weights.new_zeros(len(weights), tap.site.n_units).scatter(1, chosen, weights)
        batch = current[0]
        if tap in written:
            batch = batch | {"attention_mask": real_tokens(batch, written=True)}
        see(tap, x.movedim(tap.dim, -1), batch)
        seen.append(1)
        if calls and len(seen) == calls:
            raise _Enough

    handles = []
    for tap in taps:
        module = model.get_submodule(tap.path)
        if tap.side == "in":
            module = module.selected if isinstance(module, SelectedLinear) else module
            hook = module.register_forward_pre_hook(lambda _, args, tap=tap: note(tap, args[0]), prepend=True)
        else:
            hook = module.register_forward_hook(lambda _, args, output, tap=tap: note(tap, output))
        handles.append(hook)
    try:
        for batch in batches:
            seen.clear()
            current[0] = batch
            try:
                forward(model, batch)
            except _Enough:
                pass
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """All that was to be seen of a batch was seen."""


def _consumer(model: nn.Module, site: Site, cut: Cut) -> Tap:
    module = model.get_submodule(cut.path)
    dim = -1 if isinstance(module, (nn.Linear, Conv1D)) else 1
    return Tap(site, cut.path, "in", dim, *cut.span(site.n_units, axis_width(model, cut)))
