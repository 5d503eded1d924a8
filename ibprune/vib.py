"""Learns which units to keep while the weights train under a ramped hard budget: VIB masks, or gradual Fisher."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ibprune.budget import Budget, Keep, effective_fractions, keep_within, present, solve_by_shares
from ibprune.console import Quiet
from ibprune.costs import CostModel
from ibprune.decisions import rank_kinds
from ibprune.engine import draw
from ibprune.groups import Site
from ibprune.losses import Batch
from ibprune.masks import MaskSet
from ibprune.processes import n_processes, process_index
from ibprune.resuming import NO_JOURNAL, Journal
from ibprune.shares import as_pressure
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


class MaskLearning:
    """Masks from step to step while the weights train: the ramp of the budget, the noise and the KL, whoever trains.

    The masks start from a ranking. The hard mask is the exact top-k of the present -log_alpha within each kind (each
    pool, `ibprune.budget.pool_of`), as many units as fit under a limit that follows a ramp from the dense cost down
    to the budget, shared between them as in the target; so no controller is needed. When the noise ends, the exact
    budget is taken once, rounding and all, and the last steps train what stays. The loss is

        loss + sum_j beta_j * KL_j,   beta_j = beta * cost_j / dense cost   (VIBNet eq. 10 with gamma = cost)

    Noise acts on heads, FFN units, sub-layers and channels that one layer reads; the shared residual
    mask, channels that several layers read and the embedding directions learn their means only.

    A trainer calls `to_step` before each step, `draw` before each forward pass, adds `penalty` to the loss, trains
    `groups` beside the weights, and in the end takes `keep`.

    Args:
        start: Scores by which the masks start, by site, (n_units,).
        target: The units that these would keep: it says how the cut is shared between kinds.
        steps, seed: Of the training.
        rescore, within: As for `learn_masks`.
        share: Which part of a batch's rows is here, and of how many.
        tell: Takes what `facts` says whenever the units were chosen anew.

    Attributes:
        notes: What a report tells of it, as JSON: "path", (step, share of the dense cost, share allowed) whenever the
            units were chosen anew, and "kinds", the scores of the last choice (`ibprune.decisions.rank_kinds`).
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        sites: dict[str, Site],
        cost_model: CostModel,
        budget: Budget,
        start: dict[str, torch.Tensor],
        target: Keep,
        *,
        steps: int,
        seed: int,
        settings: MaskSettings = MaskSettings(),
        rescore: Callable[[], dict[str, torch.Tensor]] | None = None,
        within: Keep | None = None,
        share: tuple[int, int] = (0, 1),
        tell: Callable[[dict[str, float]], None] | None = None,
    ):
        self.model, self.masks, self.sites, self.cost_model, self.budget = model, masks, sites, cost_model, budget
        self.steps, self.seed, self.settings = steps, seed, settings
        self.rescore, self.within, self.share, self.tell = rescore, within, share, tell
        self.pressure = as_pressure(effective_fractions(target, sites, cost_model))
        self.noisy = [name for name, site in sites.items() if rescore is None and is_noisy(site)]
        self.ranks = dict(start)  # of a gradual score
        self.dense = self.top = cost_model(cost_model.n_units, scope=budget.scope)
        if within is not None:
            kept = {name: len(units) for name, units in within.items()}
            self.top = cost_model(cost_model.n_units | kept, scope=budget.scope)
        elif rescore is None:
            _start_from_ranks_(masks, sites, start, settings)
        self.beta = torch.cat(
            [
                torch.full(
                    (site.n_units,), cost_model.unit_cost(cost_model.n_units, name, scope=budget.scope) / self.dense
                )
                for name, site in sites.items()
            ]
        ).mul(settings.beta)
        self.beta = self.beta.to(next(model.parameters()).device)
        self.settled_at = math.ceil(settings.settle * steps)
        self.settled: Keep = {}  # what stays, from `settled_at` on
        self.behind: dict[str, torch.Tensor] = {}  # units whose gradual score is only that of their cut, by site
        self.notes: dict = {"path": [], "kinds": {}}
        self.started = False
        self.now, self.passes = 0, 0  # the step, and the forward passes of it
        masks.set_noise(0.0, sites=[name for name in sites if name not in self.noisy])
        for name in sites:
            masks[name].log_var.requires_grad_(name in self.noisy)
            masks[name].mu.requires_grad_(rescore is None)

    def to_step(self, step: int) -> None:
        """Moves the ramp on: which units are in the model, and whether under noise, in this step."""
        self.now, self.passes = step, 0
        if not self.started:  # where the run was resumed, the units in the model come from a file
            self.masks.set_keep(self.masks.kept())
            self.started = True
        if step >= self.settled_at:
            if not self.settled:
                self.masks.set_noise(0.0, sites=self.noisy)
                self.settled.update(self._final_keep() if step == self.settled_at else self.masks.kept())
                self.masks.set_keep(self.settled)
                if step == self.settled_at:
                    self._note(self.budget.limit)
            return
        self.masks.set_noise(1.0, sites=self.noisy)
        ramp = self.settings.ramp * self.steps
        again = max(1, int(ramp) // self.settings.rescored)
        if self.rescore is not None and 0 < step < ramp and step % again == 0:
            self.model.eval()
            self.behind = {name: mask.hard.cpu() == 0 for name, mask in self.masks.items()}
            for name, score in self.rescore().items():  # what is cut stays behind, in its order
                self.ranks[name] = torch.where(self.behind[name], self.ranks[name] * 1e-12, score)
            self.model.train()
        if step % 5 == 0:
            limit = int(self.top - min(1.0, (step + 1) / max(1, ramp)) * (self.top - self.budget.limit))
            ramped = replace(self.budget, limit=limit, round_to=1)
            keep = keep_within(  # not closely: the limit moves on
                self.scores(), self.sites, self.cost_model, ramped, self.pressure, effective=True, halvings=12
            )
            self.masks.set_keep(keep)
            self._note(limit)
            if self.tell is not None:
                self.tell(self.facts(limit))

    def draw(self) -> None:
        """Keys the noise of the next forward pass: by the seed, the step and the passes of it."""
        self.masks.set_draw(self.seed, self.now, self.passes, share=self.share)
        self.passes += 1

    def penalty(self) -> torch.Tensor:
        """sum_j beta_j * KL_j of the step, a scalar: 0 without a gradient where nothing is learned any more."""
        if self.settled or self.rescore is not None:
            return self.beta.new_zeros(())
        return (self.beta * torch.cat([mask.kl() for _, mask in self.masks.items()])).sum()

    def groups(self) -> list[dict]:
        """What learns of the masks, as optimiser groups with rates of their own (Adam, no decay, constant)."""
        groups = [
            {
                "params": [mask.mu for _, mask in self.masks.items() if self.rescore is None],
                "lr": self.settings.lr_mu,
            },
            {"params": [self.masks[name].log_var for name in self.noisy], "lr": self.settings.lr_log_var},
        ]
        return [group for group in groups if group["params"]]

    def keep(self) -> Keep:
        """The units that stay, exactly within the budget; the others are cut from here on."""
        keep = self.masks.kept() if self.settled_at < self.steps else self._final_keep()
        self.masks.set_keep(keep)
        self.now = self.steps
        self._note(self.budget.limit)
        return keep

    def scores(self) -> dict[str, torch.Tensor]:
        """Of the units as the masks are now, by site, (n_units,)."""
        return only(_scores(self.masks) if self.rescore is None else self.ranks, self.within)

    def facts(self, limit: int) -> dict[str, float]:
        """Of the masks as they are: shares of the dense cost, units by site, and KL by kind in nats."""
        found = {"masks/cost": self._share(), "masks/limit": limit / self.dense}
        found |= {f"masks/kept/{name}": float(mask.n_kept) for name, mask in self.masks.items()}
        for kind in dict.fromkeys(site.kind for site in self.sites.values()):
            of_kind = [mask.kl().detach() for name, mask in self.masks.items() if self.sites[name].kind == kind]
            found[f"masks/kl/{kind}"] = torch.cat(of_kind).sum().item()
        return found

    def _share(self) -> float:
        """Of the dense cost, what the units in the model have."""
        kept = {name: mask.n_kept for name, mask in self.masks.items()}
        return self.cost_model(self.cost_model.n_units | kept, scope=self.budget.scope) / self.dense

    def _note(self, limit: int) -> None:
        self.notes["path"].append([self.now, self._share(), limit / self.dense])

    def _final_keep(self) -> Keep:
        scores = self.scores()
        keep = solve_by_shares(scores, self.sites, self.cost_model, self.budget, self.pressure, effective=True)
        known = scores | {name: scores[name].masked_fill(behind, -torch.inf) for name, behind in self.behind.items()}
        self.notes["kinds"] = rank_kinds(known, present(keep, self.sites, self.cost_model), self.sites)
        return keep


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

    The state's notes are those of `MaskLearning`.

    How they learn says `MaskLearning`; the ranking is by Fisher information, or a score of one's own.
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
    learning = MaskLearning(
        model, masks, sites, cost_model, budget, start, target, steps=train_settings.steps, seed=train_settings.seed,
        settings=settings, rescore=rescore, within=within, share=(process_index(), n_processes()),
        tell=partial(draw, accelerator) if accelerator.trackers else None,
    )  # fmt: skip

    def loss_with_kl(prepared: nn.Module, batch: Batch) -> torch.Tensor:
        learning.draw()
        return loss_of(prepared, batch) + learning.penalty()

    state = train(
        model,
        loss_with_kl,
        make_batches,
        train_settings,
        accelerator=accelerator,
        phase=phase,
        console=console,
        extra_groups=learning.groups(),
        before_step=learning.to_step,
        frozen=frozen,
        notes=learning.notes,
        journal=journal if rescore is None else NO_JOURNAL,  # the newest scores are in no file: from its start again
    )
    return learning.keep(), learning.scores(), state


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
