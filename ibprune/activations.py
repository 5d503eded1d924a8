"""Scores that read activations and no gradients: their size, and how much they fluctuate."""

from collections.abc import Iterable

import torch
from torch import nn

from ibprune.budget import Keep
from ibprune.console import Quiet
from ibprune.errors import BadRecipe
from ibprune.groups import Site
from ibprune.losses import Batch
from ibprune.taps import (
    Tap,
    gone,
    in_features,
    input_rows,
    readers,
    real_rows,
    row_features,
    taps_of,
    watch,
    weight_rows,
)


def activation_scores(
    model: nn.Module, sites: dict[str, Site], batches: Iterable[Batch], *, total: int, console: Quiet
) -> dict[str, torch.Tensor]:
    """Size of the features that each unit's mask multiplies, by site, (n_units,).

    Minitron (Muralidharan et al. 2024, arXiv 2407.14679, sec. 2.2): |a| averaged over the positions of a sequence, then
    the root of the sum of squares over sequences, and over the features of a unit. Neurons are read after the
    activation and the gate, heads before the output layer, the residual width behind every norm (squares add up).
    A sub-layer is one unit whose features are what it adds to the residual stream: the paper's measure for whole
    blocks, 1 - cos(input, output), is not used. An expert's feature is the weight that a router gives it. The features
    of a mixture's experts pass in the experts' order: all rows of a batch are averaged there.
    """
    squares = {name: torch.zeros(site.n_units, dtype=torch.float64) for name, site in sites.items()}

    def see(tap: Tap, x: torch.Tensor, batch: Batch) -> None:
        size = len(next(iter(batch.values())))
        if tap.site.mask_at.mixed or len(x) % size:
            means = real_rows(x, batch).abs().double().mean(0, keepdim=True)
        else:
            x = x.reshape(size, -1, x.shape[-1]).abs().double()
            real = batch.get("attention_mask")
            real = real if real is not None and real.shape == x.shape[:2] else torch.ones_like(x[..., 0])
            means = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp_min(1)  # (batch, features)
        squares[tap.site.name] += tap.units(means).square().sum((0, -1)).cpu()

    taps = [tap for site in sites.values() for tap in taps_of(model, site)]
    watch(model, console.track(batches, "scoring units", total), taps, see)
    return {name: square.sqrt() for name, square in squares.items()}


def flap_scores(
    model: nn.Module, sites: dict[str, Site], batches: Iterable[Batch], *, total: int, console: Quiet
) -> dict[str, torch.Tensor]:
    """Fluctuation of each unit's features times the weights that read them, by site, (n_units,).

        S_j = sum over the features f of unit j of  Var(x_f) ||W_:f||^2,   score_j = (S_j - mean S) / std S

    FLAP (An et al. 2024, arXiv 2312.11983): the variance of a feature over all positions times the squared norm of the
    weights that read it, summed over a unit's features; then standardised over the units of a site, so that sites
    compare. Standard scores have both signs: the least of all is subtracted, which changes no order and lets a score be
    divided by a cost.

    Raises:
        BadRecipe: A site whose features are not read by linear layers or plain convolutions alone.
    """
    found = check_read_linearly(model, sites)
    taps = [tap for each in found.values() for tap in each]
    raw = {name: torch.zeros(site.n_units, dtype=torch.float64) for name, site in sites.items()}
    for tap, (mean, square) in moments(model, taps, console.track(batches, "scoring units", total)).items():
        module = model.get_submodule(tap.path)
        each = (square - mean.square()).clamp_min(0) * weight_rows(module).double().square().sum(1).cpu()
        per_feature = each.view(in_features(model, tap.path), -1).sum(1)  # a convolution reads it through its kernel
        raw[tap.site.name] += tap.units(per_feature).sum(-1)
    standard = {
        name: (score - score.mean()) / (score.std(unbiased=False) + 1e-12) if len(score) > 1 else score * 0
        for name, score in raw.items()
    }
    least = min(float(score.min()) for score in standard.values())
    return {name: score - least for name, score in standard.items()}


def check_read_linearly(model: nn.Module, sites: dict[str, Site]) -> dict[str, list[Tap]]:
    """The layers that read each site's features.

    Raises:
        BadRecipe: A site whose features are not read by linear layers or plain convolutions alone.
    """
    found = {name: readers(model, site) for name, site in sites.items()}
    bad = sorted({sites[name].kind for name, taps in found.items() if not taps})
    if bad:
        good = sorted({site.kind for site in sites.values()} - set(bad))
        hint = f"use --kinds {','.join(good)}, or another score" if good else "use another score"
        raise BadRecipe(
            f"--score flap needs units that only linear layers or plain convolutions read, which "
            f"{', '.join(bad)} are not: {hint}."
        )
    return found


def compensate_(model: nn.Module, sites: dict[str, Site], keep: Keep, batches: Iterable[Batch]) -> list[str]:
    """Adds what the cut units contribute on average to the biases of the layers that read them, in place.

    FLAP (arXiv 2312.11983): B = W_C mean(x_C), C what goes. Returns the readers without a bias, where nothing is done:
    the budget counts every tensor of the dense model and no other.
    """
    taps = [tap for name, site in sites.items() if len(keep[name]) < site.n_units for tap in readers(model, site)]
    without = {tap.path for tap in taps if model.get_submodule(tap.path).bias is None}
    for tap, (mean, _) in moments(model, [tap for tap in taps if tap.path not in without], batches).items():
        module = model.get_submodule(tap.path)
        lost, rows = row_features(model, tap, gone(tap.site, keep)), weight_rows(module)
        with torch.no_grad():
            module.bias += mean[lost].to(rows) @ rows[lost.to(rows.device)]
    return sorted(without)


def moments(
    model: nn.Module, taps: list[Tap], batches: Iterable[Batch]
) -> dict[Tap, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and mean square of what each reader reads (`input_rows`), by tap, float64, (features,)."""
    sums: dict[Tap, list] = {}

    def see(tap: Tap, x: torch.Tensor, batch: Batch) -> None:
        rows = input_rows(model.get_submodule(tap.path), x, batch).double()
        found = (len(rows), rows.sum(0).cpu(), rows.square().sum(0).cpu())
        sums[tap] = [old + new for old, new in zip(sums.get(tap, (0, 0, 0)), found)]

    watch(model, batches, taps, see)
    return {tap: (total / count, square / count) for tap, (count, total, square) in sums.items()}
