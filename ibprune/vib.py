"""Learns which units to keep while the weights train under a ramped hard budget: VIB masks, or gradual Fisher."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ibprune.budget import Budget, Keep, fractions_kept, keep_within, solve_by_shares
from ibprune.console import Quiet
from ibprune.costs import CostModel
from ibprune.engine import draw
from ibprune.errors import BadRecipe
from ibprune.groups import Site
from ibprune.losses import Batch
from ibprune.masks import MaskSet
from ibprune.processes import n_processes, process_index
from ibprune.resuming import NO_JOURNAL, Journal
from ibprune.trainer import TrainSettings, TrainState, train

NOISELESS_KINDS = ("hidden", "embedding_rank")  # one draw would hit every norm, or every token, at once


@dataclass(frozen=True)
class MaskSettings:
    """How masks are learned; the shares of the steps add up from the start.

    Attributes:
        beta: Weight of the KL, per share of the dense cost: beta_j = beta * c_j / C, c_j the unit's cost.
        lr_mu, lr_log_var: Learning rates of the masks (Adam, no decay, constant).
        best, worst: log_alpha at the start for the first and last unit of each kind's Fisher ranking.
        ramp: Share of the steps after which the hard budget is reached.
        settle: Share after which noise and KL are off and the units that stay are fixed.
        rescored: How often a gradual score is taken anew on the ramp, at even distances.
    """

    beta: float = 0.2
    lr_mu: float = 0.01
    lr_log_var: float = 0.05
    best: float = -8.0
    worst: float = -4.0
    ramp: float = 0.6
    settle: float = 0.75
    rescored: int = 8


def learn_masks(
    model: nn.Module,
    masks: MaskSet,
    sites: dict[str, Site],
    cost_model: CostModel,
    budget: Budget,
    start: dict[str, torch.Tensor],
    target: Keep,
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
    make_batches: Callable[[int], DataLoader],
    train_settings: TrainSettings,
    *,
    accelerator: Accelerator,
    console: Quiet,
    settings: MaskSettings = MaskSettings(),
    frozen: bool = False,
    rescore: Callable[[], dict[str, torch.Tensor]] | None = None,
    journal: Journal = NO_JOURNAL,
    phase: str = "learning masks",
    within: Keep | None = None,
) -> tuple[Keep, dict[str, torch.Tensor], TrainState]:
    """Learns masks, with the weights unless these are `frozen`; returns (kept units, scores, training state).

    The masks start from the Fisher ranking. The hard mask is the exact top-k of the present -log_alpha
    within each kind, as many units as fit under a limit that follows a ramp from the dense cost down to
    the budget, cut between kinds as in the target; so no controller is needed. When the noise ends, the
    exact budget is taken once, rounding and all, and the last steps train what stays. The loss is

        loss + sum_j beta_j * KL_j,   beta_j = beta * cost_j / dense cost   (VIBNet eq. 10 with gamma = cost)

    Noise acts on heads, FFN units, sub-layers and channels that one layer reads; the shared residual
    mask, channels that several layers read and the embedding directions learn their means only.
    With `train_settings.steps` 0 the target is returned as it is.

    Args:
        rescore: Scores of the model as it is now, on the CPU. With it nothing is learned but the weights: the
            masks stay at 1 without noise or KL, and the ranking is that of the newest scores (gradual pruning, Zhu &
            Gupta 2017, arXiv 1710.01878, with a score of one's own). All else is the same: the control of what
            learned masks add.
        within: What an earlier, larger budget left, where the masks have learned for that: only these units may stay,
            the masks go on from where they are, and the ramp starts from the cost of these units.
    """
    if train_settings.steps == 0:
        return target, start, TrainState(phase)
    pressure = {kind: -float(np.log(max(share, 1e-9))) for kind, share in fractions_kept(target, sites).items()}
    noisy = [name for name, site in sites.items() if rescore is None and is_noisy(site)]
    ranks = dict(start)  # of a gradual score
    dense = top = cost_model(cost_model.n_units, scope=budget.scope)
    if within is not None:
        top = cost_model(cost_model.n_units | {name: len(units) for name, units in within.items()}, scope=budget.scope)
    elif rescore is None:
        _start_from_ranks_(masks, sites, start, settings)

    def scores() -> dict[str, torch.Tensor]:
        return only(_scores(masks) if rescore is None else ranks, within)

    beta = torch.cat(
        [
            torch.full((site.n_units,), cost_model.unit_cost(cost_model.n_units, name, scope=budget.scope) / dense)
            for name, site in sites.items()
        ]
    ).mul(settings.beta)
    device = next(model.parameters()).device
    beta = beta.to(device)
    steps = train_settings.steps
    settled_at = math.ceil(settings.settle * steps)
    again = max(1, int(settings.ramp * steps) // settings.rescored)
    settled: Keep = {}  # what stays, from `settled_at` on
    started = False
    share, now, passes = (process_index(), n_processes()), 0, 0  # the step, and the batches of it that were read

    def before_step(step: int) -> None:
        nonlocal started, now, passes
        now, passes = step, 0
        if not started:  # where the run was resumed, the units in the model come from a file
            masks.set_keep(masks.kept())
            started = True
        if step >= settled_at:
            if not settled:
                masks.set_noise(0.0, sites=noisy)
                settled.update(final_keep() if step == settled_at else masks.kept())
                masks.set_keep(settled)
            return
        masks.set_noise(1.0, sites=noisy)
        if rescore is not None and 0 < step < settings.ramp * steps and step % again == 0:
            model.eval()
            for name, score in rescore().items():  # what is cut stays behind, in its order
                ranks[name] = torch.where(masks[name].hard.cpu() > 0, score, ranks[name] * 1e-12)
            model.train()
        if step % 5 == 0:
            progress = min(1.0, (step + 1) / max(1, settings.ramp * steps))
            ramped = replace(budget, limit=int(top - progress * (top - budget.limit)), round_to=1)
            # t = 1 is the target: no need to look far, or closely
            masks.set_keep(keep_within(scores(), sites, cost_model, ramped, pressure, most=4.0, halvings=12))
            if accelerator.trackers:
                draw(accelerator, facts(ramped.limit))

    def facts(limit: int) -> dict[str, float]:
        """Of the masks as they are: shares of the dense cost, units by site, and KL by kind in nats."""
        kept = {name: mask.n_kept for name, mask in masks.items()}
        cost = cost_model(cost_model.n_units | kept, scope=budget.scope)
        found = {"masks/cost": cost / dense, "masks/limit": limit / dense}
        found |= {f"masks/kept/{name}": float(n) for name, n in kept.items()}
        for kind in dict.fromkeys(site.kind for site in sites.values()):
            of_kind = [mask.kl().detach() for name, mask in masks.items() if sites[name].kind == kind]
            found[f"masks/kl/{kind}"] = torch.cat(of_kind).sum().item()
        return found

    def final_keep() -> Keep:
        try:
            return solve_by_shares(scores(), sites, cost_model, budget, pressure)
        except BadRecipe:  # some kinds stay whole in the target and the others cannot go lower: it is met unit by unit
            return target

    def loss_with_kl(prepared: nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal passes
        masks.set_draw(train_settings.seed, now, passes, share=share)
        passes += 1
        loss = loss_of(prepared, batch)
        if settled or rescore is not None:
            return loss
        return loss + (beta * torch.cat([mask.kl() for _, mask in masks.items()])).sum()

    masks.set_noise(0.0, sites=[name for name in sites if name not in noisy])
    groups = [
        {"params": [mask.mu for _, mask in masks.items() if rescore is None], "lr": settings.lr_mu},
        {"params": [masks[name].log_var for name in noisy], "lr": settings.lr_log_var},
    ]
    for name in sites:
        masks[name].log_var.requires_grad_(name in noisy)
        masks[name].mu.requires_grad_(rescore is None)
    state = train(
        model,
        loss_with_kl,
        make_batches,
        train_settings,
        accelerator=accelerator,
        phase=phase,
        console=console,
        extra_groups=[group for group in groups if group["params"]],
        before_step=before_step,
        frozen=frozen,
        journal=journal if rescore is None else NO_JOURNAL,  # the newest scores are in no file: from its start again
    )
    keep = masks.kept() if settled_at < steps else final_keep()
    masks.set_keep(keep)
    return keep, scores(), state


def is_noisy(site: Site) -> bool:
    """Whether a site's mask learns under noise: not where one draw would act in many places at once."""
    shared = site.mask_at.side == "consumers" and len(site.consumers()) > 1
    return site.kind not in NOISELESS_KINDS and not shared


def only(scores: dict[str, torch.Tensor], within: Keep | None) -> dict[str, torch.Tensor]:
    """The scores, -inf for units that are not among those `within`, if that is given: they never stay."""
    if within is None:
        return scores
    found = {name: torch.full_like(score, -torch.inf) for name, score in scores.items()}
    for name, score in scores.items():
        found[name][list(within[name])] = score[list(within[name])]
    return found


def _scores(masks: MaskSet) -> dict[str, torch.Tensor]:
    """-log_alpha by site: the signal-to-noise ratio of each unit, already a score per cost."""
    return {name: -mask.log_alpha().detach() for name, mask in masks.items()}


def _start_from_ranks_(
    masks: MaskSet, sites: dict[str, Site], scores: dict[str, torch.Tensor], settings: MaskSettings
) -> None:
    """Sets mu = 1 and log_var between `best` and `worst` by each unit's place in its kind's ranking."""
    for kind in dict.fromkeys(site.kind for site in sites.values()):
        members = [name for name, site in sites.items() if site.kind == kind]
        values = torch.cat([scores[name].double() for name in members])
        place = torch.empty(len(values))
        place[torch.argsort(-values, stable=True)] = torch.linspace(0, 1, len(values))
        for name, part in zip(members, place.split([sites[name].n_units for name in members])):
            with torch.no_grad():
                masks[name].mu.fill_(1.0)
                masks[name].log_var.copy_(settings.best + (settings.worst - settings.best) * part)
