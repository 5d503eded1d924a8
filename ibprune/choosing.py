"""Carries out a score: what it says of every unit, and what it does to those that stay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ibprune.activations import activation_scores, compensate_, flap_scores
from ibprune.budget import Keep
from ibprune.console import Quiet
from ibprune.groups import Site
from ibprune.lora import Lora
from ibprune.losses import Batch, Objective
from ibprune.masks import MaskSet
from ibprune.refit import reconstruct_, rescale_
from ibprune.resuming import NO_JOURNAL, Journal
from ibprune.scores import (
    LEARNED,
    blocks_again,
    fisher_scores,
    gate_gradients,
    magnitude_scores,
    random_scores,
    ranking,
    taylor_scores,
)
from ibprune.second_order import obs_multipliers, obs_scores, rearrange
from ibprune.taps import readers
from ibprune.trainer import TrainSettings


@dataclass(frozen=True)
class Choice:
    """How the units that stay are chosen.

    Attributes:
        score, start, shares, seed: As in `ibprune.recipe.Recipe`.
        batches: For scores and for comparing candidate cuts, on the device.
        make_batches: Training batches of an epoch, by its seed.
        judge: The dense model, to which candidate cuts are compared; None leaves the labels alone.
        teacher: What the masked model is distilled from, if anything.
        settings: Of mask learning.
        probe_steps: Steps of recovery after which the last candidate cuts are compared; 0 compares them as they are.
        lora: Adapters that train in these; None: all weights do.
        frozen: Whether the weights stay as they are while masks are learned.
        reconstruct: Whether what reads the cut units is refitted by least squares.
        journal: Keeps scores, shares, what candidate cuts gave, and where mask learning stands.
    """

    score: str
    shares: str
    seed: int
    objective: Objective
    batches: list[Batch]
    make_batches: Callable[[int], DataLoader]
    judge: nn.Module | None
    teacher: nn.Module | None
    settings: TrainSettings
    probe_steps: int
    accelerator: Accelerator
    console: Quiet
    reconstruct: bool = False
    start: str | None = None
    lora: Lora | None = None
    frozen: bool = False
    journal: Journal = NO_JOURNAL


def score_units(student: nn.Module, sites: dict[str, Site], masks: MaskSet, choice: Choice) -> dict[str, torch.Tensor]:
    """The one-shot scores that a score takes or starts from, of the sites with masks."""
    batches, console, score = choice.batches, choice.console, ranking(choice.score, choice.start)
    if not sites:  # nothing but the vocabulary is cut
        return {}
    if score == "flap" and choice.score in LEARNED:
        read = {name: site for name, site in sites.items() if readers(student, site)}
        others = score_units(student, sites, masks, replace(choice, start="fisher"))
        return in_order(others, score_units(student, read, masks, replace(choice, score="flap")), sites)
    with _scoring(student, choice):
        match score:
            case "magnitude":
                return magnitude_scores(student, sites)
            case "random":
                return random_scores(sites, seed=choice.seed)
            case "activation" | "flap":
                of = activation_scores if score == "activation" else flap_scores
                return of(student, sites, batches, total=len(batches), console=console)
            case "obs":
                return obs_scores(_gradients(student, masks, choice))
            case _:
                of = taylor_scores if score == "taylor" else fisher_scores
                return of(
                    student, masks, batches, choice.objective, seed=choice.seed, total=len(batches), console=console
                )


def in_order(
    values: dict[str, torch.Tensor], order: dict[str, torch.Tensor], sites: dict[str, Site]
) -> dict[str, torch.Tensor]:
    """The same values, each kind's in the order of another score among the units that this one ranks.

    So units are in the order of the one, and kinds compare by the other.

    Args:
        order: Scores of some of the sites.
    """
    found = dict(values)
    for kind in dict.fromkeys(sites[name].kind for name in order):
        names = [name for name in order if sites[name].kind == kind]
        had, rank = (torch.cat([scores[name].double() for name in names]) for scores in (values, order))
        mine = torch.empty_like(had)
        mine[torch.argsort(-rank, stable=True)] = had.sort(descending=True).values
        found |= dict(zip(names, mine.split([sites[name].n_units for name in names])))
    return found


def refit_(
    student: nn.Module,
    masks: MaskSet,
    sites: dict[str, Site],
    keep: Keep,
    choice: Choice,
    *,
    within: Keep | None = None,
) -> Keep:
    """What a score does to the units that stay, in place; returns them, exchanged where the score does so.

    Args:
        within: The units among which it may exchange; None: all.
    """
    batches, console = choice.batches, choice.console
    gradients = _gradients(student, masks, choice) if choice.score in ("kwon", "obs") else {}
    if choice.score == "kwon":
        keep = rearrange(keep, gradients, within=within)
    if choice.reconstruct:
        reconstruct_(student, masks, sites, keep, batches, console=console)
    elif choice.score == "kwon":
        rescale_(student, masks, sites, keep, batches, console=console)
    elif choice.score == "obs":
        for name, factors in obs_multipliers(gradients, keep).items():
            masks[name].mu.data.copy_(factors)
    elif choice.score == "flap":
        without = compensate_(student, sites, keep, batches)
        if without:
            console.say(f"{len(without)} layers have no bias that could make up for their cut units.")
    return keep


@contextmanager
def _scoring(student: nn.Module, choice: Choice) -> Iterator[None]:
    """The precision of a run, and its way to save memory, while units are scored."""
    again = blocks_again(student) if choice.settings.checkpointing else nullcontext()
    with choice.accelerator.autocast(), again:
        yield


def _gradients(student: nn.Module, masks: MaskSet, choice: Choice) -> dict[str, torch.Tensor]:
    """Of each calibration sequence by each unit's multiplier, by site, (sequences, n_units), on the CPU."""
    batches, parts = choice.batches, {name: [] for name in masks}
    with _scoring(student, choice):
        for found in gate_gradients(
            student, masks, batches, choice.objective, seed=choice.seed, total=len(batches), console=choice.console
        ):
            for name, gradient in found.items():
                parts[name].append(gradient.cpu())
    return {name: torch.cat(gradients) for name, gradients in parts.items()}
