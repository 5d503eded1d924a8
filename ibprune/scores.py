"""What the loss and the weights say of every unit: the baselines that a learned mask must beat, and where it starts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from ibprune.console import Quiet
from ibprune.groups import Site, axis_dims, get_tensor
from ibprune.losses import Batch, Objective, forward, sensitivity
from ibprune.masks import MaskSet
from ibprune.rebuild import full_path
from ibprune.sites import block_paths, find_family, is_traced

SCORES = ("vib", "gradual", "fisher", "kwon", "obs", "taylor", "flap", "activation", "magnitude", "random")
LEARNED = ("vib", "gradual")  # these decide while the weights train
STARTS = ("fisher", "obs", "taylor", "flap", "activation", "magnitude", "random")  # a ranking masks can start from


def ranking(score: str, start: str | None) -> str:
    """The one-shot score that ranks the units while nothing is learned yet.

    Example:
        >>> ranking("vib", "flap"), ranking("gradual", None), ranking("taylor", None)
        ('flap', 'fisher', 'taylor')
    """
    return start or "fisher" if score in LEARNED else score


def _without_cache(forward: Callable, *args: object, **options: object) -> object:
    """A block's outputs, to be computed again; what it would remember of its keys would be there twice then."""
    args, options = tree_map(lambda x: None if isinstance(x, Cache) else x, (args, options))
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


@contextmanager
def blocks_again(model: nn.Module) -> Iterator[None]:
    """While it is open, a transformer's blocks run again in the backward pass and keep nothing until then.

    transformers' own way needs the training mode, in which dropout would make the scores noisy. A CNN stays as it is.
    """
    kind = model.config.model_type
    paths = [] if is_traced(kind) else block_paths(model, find_family(kind))
    blocks = {id(block): block for block in (model.get_submodule(full_path(model, path)) for path in paths)}
    for block in blocks.values():
        block.forward = partial(_without_cache, block.forward)
    try:
        yield
    finally:
        for block in blocks.values():
            del block.forward


def gate_gradients(
    model: nn.Module,
    masks: MaskSet,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    seed: int,
    total: int,
    console: Quiet,
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of the loss of each sequence by each unit's multiplier, batch after batch: by site, (batch, n_units).

    Each mask is given one multiplier per (sequence, unit), 1 everywhere, and its gradient is read. Units that are cut
    already have none. The model should be in eval mode. Its weights are frozen meanwhile, so that nothing is kept for
    gradients of theirs, and autocast keeps no copies of them.

    Args:
        total: Number of batches, for the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)

    def value(batch: Batch) -> torch.Tensor:
        return sensitivity(objective, forward(model, batch), batch, generator).sum()

    return gradients_by_gates(model, masks, console.track(batches, "scoring units", total), value)


def gradients_by_gates(
    model: nn.Module, masks: MaskSet, batches: Iterable[Batch], value_of: Callable[[Batch], torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """As `gate_gradients`, of any function of a batch that is the sum of what its sequences have, a scalar."""
    mixed = any(mask.mixed for _, mask in masks.items())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for batch in _single(batches, mixed):
            size = len(next(iter(batch.values())))
            for _, mask in masks.items():
                mask.probe = torch.ones(size, len(mask.mu), device=mask.mu.device, requires_grad=True)
            probes = {name: mask.probe for name, mask in masks.items()}
            with torch.enable_grad():
                found = torch.autograd.grad(value_of(batch), list(probes.values()), allow_unused=True)
            yield {  # a pooler that the outputs do not use has no gradient
                name: torch.zeros_like(probe) if gradient is None else gradient
                for (name, probe), gradient in zip(probes.items(), found)
            }
    finally:
        for _, mask in masks.items():
            mask.probe = None
        for parameter in trained:
            parameter.requires_grad_(True)


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

    Gradients are squared per sequence (Kwon et al. 2022, arXiv 2204.09656, eq. 9, squares sums over minibatches). In
    the quadratic approximation a unit's removal costs half its score. Molchanov et al. 2019 (arXiv 1906.10771),
    (gradient times weight)^2 put on gates, is the same figure. Arguments as those of `gate_gradients`.
    """
    return _mean(gate_gradients(model, masks, batches, objective, seed=seed, total=total, console=console), masks, 2)


def fisher_of_loss(
    model: nn.Module, masks: MaskSet, batches: Iterable[Batch], loss_of: Callable[[nn.Module, Batch], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """As `fisher_scores`, of a loss that is the mean over the sequences of a batch, a scalar."""

    def value(batch: Batch) -> torch.Tensor:
        return loss_of(model, batch) * len(next(iter(batch.values())))

    return _mean(gradients_by_gates(model, masks, batches, value), masks, 2)


def taylor_scores(
    model: nn.Module,
    masks: MaskSet,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    seed: int,
    total: int,
    console: Quiet,
) -> dict[str, torch.Tensor]:
    """First-order estimate of what a removal changes, E|z_j d loss / d z_j| at z = 1, by site, (n_units,).

    Molchanov et al. 2017 (arXiv 1611.06440, eq. 8): the sum of gradient times activation over a unit's features is
    the gradient by its multiplier; the absolute value is taken per sequence. Arguments as those of `gate_gradients`.
    """
    return _mean(gate_gradients(model, masks, batches, objective, seed=seed, total=total, console=console), masks, 1)


def _mean(gradients: Iterable[dict[str, torch.Tensor]], masks: MaskSet, power: int) -> dict[str, torch.Tensor]:
    scores = {name: torch.zeros(len(mask.mu), dtype=torch.float64) for name, mask in masks.items()}
    count = 0
    for found in gradients:
        for name, gradient in found.items():
            scores[name] += gradient.double().abs().pow(power).sum(0).cpu()
        count += len(next(iter(found.values())))
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
