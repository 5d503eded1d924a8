"""What a candidate cut loses: right after it, and after a short recovery."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn

from ibprune.budget import Keep
from ibprune.choosing import Choice
from ibprune.distillation import loss_with, on_kept_features
from ibprune.feeding import Feed
from ibprune.lora import adapted
from ibprune.losses import Batch, Objective, dense_batch, forward, training_loss
from ibprune.masks import MaskSet
from ibprune.processes import shared
from ibprune.quantised import copied
from ibprune.structure import Structure
from ibprune.trainer import TrainSettings, train
from ibprune.vocabulary import keep_rows


@dataclass(frozen=True)
class Reading:
    """The texts as a cut vocabulary reads them.

    Attributes:
        feed: Of tokens under their new ids.
        batches: Its calibration batches, on the device.
        rows: The ids of the same tokens in the whole vocabulary, (n_rows,): under a mask all rows are there.
    """

    feed: Feed
    batches: list[Batch]
    rows: torch.Tensor

    def under_old_ids(self, batch: Batch) -> Batch:
        return batch | {"input_ids": self.rows[batch["input_ids"]]}


def reader(feed: Feed, n_samples: int, device: torch.device) -> Callable[[Keep], Reading]:
    """A function that reads the texts by the rows that a cut keeps.

    Args:
        n_samples: Of the calibration batches.
    """
    known: dict[tuple[int, ...], Reading] = {}

    def read(keep: Keep) -> Reading:
        rows = keep["vocab"]
        if rows not in known:
            own = feed.retokenised(keep_rows(feed.collate.tokenizer, rows))
            known[rows] = Reading(own, own.calibration(n_samples, device), torch.tensor(rows, device=device))
        return known[rows]

    return read


@torch.no_grad()
def probe_loss(
    student: nn.Module,
    masks: MaskSet,
    dense: nn.Module | None,
    batches: list[Batch],
    objective: Objective,
    accelerator: Accelerator,
    *,
    read: Callable[[Keep], Reading] | None = None,
) -> Callable[[Keep, float], float]:
    """A function that cuts by masks and returns the loss on a few batches, to the dense model where there is one.

    Its second argument is a loss above which it is of no use: what the batches so far lost is then enough to stop, and
    infinity is returned. Only losses of one's own can be negative, and are always summed to the end.

    Args:
        read: The same texts, and more, as the student reads them under a cut, where that changes its tokens.
    """
    with accelerator.autocast():
        teacher = [forward(dense, dense_batch(batch)) if dense is not None else None for batch in batches]

    @torch.no_grad()
    def loss_of(keep: Keep, at_most: float = math.inf) -> float:
        masks.set_keep(keep)
        losses, reading = [], None if read is None else read(keep)
        with accelerator.autocast():
            for batch, target in zip(batches if reading is None else reading.batches, teacher):
                batch = batch if reading is None else reading.under_old_ids(batch)
                losses.append(training_loss(objective, forward(student, batch), target, batch))
                if objective.name != "custom" and float(sum(losses)) > at_most * len(batches):
                    return shared(math.inf)
        return shared(float(torch.stack(losses).mean()))

    return loss_of


def recovered_loss(
    student: nn.Module,
    structure: Structure,
    choice: Choice,
    settings: TrainSettings,
    *,
    read: Callable[[Keep], Reading] | None = None,
) -> Callable[[Keep], float]:
    """A function that cuts a copy of the student, recovers it for a few steps and returns its loss.

    Args:
        settings: Of the short recovery.
        read: As in `probe_loss`.
    """
    tries = itertools.count(1)

    def loss_of(keep: Keep) -> float:
        return float(choice.journal.once(f"cut tried {next(tries)}", lambda: {"loss": loss_after(keep)})["loss"])

    def loss_after(keep: Keep) -> torch.Tensor:
        reading = None if read is None else read(keep)
        make_batches = choice.make_batches if reading is None else reading.feed.train
        plan = structure.plan(student, keep)
        small = structure.compact(copied(student), plan)
        objective = on_kept_features(choice.objective, plan)
        with adapted(small, choice.lora):
            train(
                small, loss_with(objective, choice.teacher, choice.accelerator), make_batches, settings,
                accelerator=choice.accelerator, phase="trying a cut", console=choice.console,
            )  # fmt: skip
        judged = loss_with(replace(objective, layers=""), choice.judge, choice.accelerator)
        batches = choice.batches if reading is None else reading.batches
        with torch.no_grad(), choice.accelerator.autocast():
            return torch.stack([judged(small.eval(), batch) for batch in batches]).mean()

    return loss_of
