"""One-shot importance of every unit: the baselines that a learned mask must beat, and where it starts."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ibprune.console import Quiet
from ibprune.groups import Site, axis_dims, get_tensor
from ibprune.losses import Batch, Objective, forward, sensitivity
from ibprune.masks import MaskSet

SCORES = ("vib", "fisher", "magnitude", "random")


def fisher_scores(
    model: nn.Module,
    masks: MaskSet,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    seed: int,
    total: int,
    console: Quiet,
) -> dict[str, torch.Tensor]:
    """Mean squared gate gradient per unit, E[(d loss / d z_j)^2], by site, (n_units,).

    Gradients are squared per sequence (Kwon et al. 2022, arXiv 2204.09656, eq. 9, squares sums over
    minibatches): each mask is given one multiplier per (sequence, unit) and its gradient is read.
    In the quadratic approximation a unit's removal costs half its score.

    Args:
        total: Number of batches, for the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.zeros(len(mask.mu), dtype=torch.float64) for name, mask in masks.items()}
    count = 0
    mixed = any(mask.mixed for _, mask in masks.items())
    for batch in _single(console.track(batches, "scoring units", total), mixed):
        size = len(next(iter(batch.values())))
        for _, mask in masks.items():
            mask.probe = torch.ones(size, len(mask.mu), device=mask.mu.device, requires_grad=True)
        with torch.enable_grad():
            value = sensitivity(objective, forward(model, batch), batch, generator).sum()
            probes = [mask.probe for _, mask in masks.items()]
            gradients = torch.autograd.grad(value, probes, allow_unused=True)
        for (name, _), gradient in zip(masks.items(), gradients):
            if gradient is not None:  # a pooler that the outputs do not use
                scores[name] += gradient.double().square().sum(0).cpu()
        count += size
    for _, mask in masks.items():
        mask.probe = None
    return {name: score / max(count, 1) for name, score in scores.items()}


def _single(batches: Iterable[Batch], split: bool) -> Iterator[Batch]:
    """The batches, or one sequence after the other where `split` is set."""
    for batch in batches:
        rows = range(len(next(iter(batch.values())))) if split else ()
        yield from [{key: value[i : i + 1] for key, value in batch.items()} for i in rows] or [batch]


def magnitude_scores(model: nn.Module, sites: dict[str, Site]) -> dict[str, torch.Tensor]:
    """Sum of the squared weights that go with each unit, by site, (n_units,)."""
    scores = {}
    for site in sites.values():
        score = torch.zeros(site.n_units, dtype=torch.float64)
        counted: set[tuple[int, int, int]] = set()  # a tied parameter belongs to two modules
        for cut in site.cuts:
            module = model.get_submodule(cut.path)
            if cut.axis == "whole":
                score += sum(p.detach().double().square().sum().cpu() for p in module.parameters())
                continue
            for name, dim in axis_dims(module, cut.axis):
                tensor = get_tensor(module, name)
                if not isinstance(tensor, nn.Parameter) or (id(tensor), dim, cut.offset) in counted:
                    continue
                counted.add((id(tensor), dim, cut.offset))
                weight = tensor.detach().double()
                per_feature = weight.square().movedim(dim, 0).reshape(weight.shape[dim], -1).sum(1).cpu()
                offset, width = cut.span(site.n_units, len(per_feature))
                score += per_feature[offset : offset + site.n_units * width].view(site.n_units, -1).sum(1)
        scores[site.name] = score
    return scores


def random_scores(sites: dict[str, Site], *, seed: int) -> dict[str, torch.Tensor]:
    """Uniform scores, by site, (n_units,)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(site.n_units, generator=generator, dtype=torch.float64) for name, site in sites.items()}
