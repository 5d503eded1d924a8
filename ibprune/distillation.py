"""What a student learns from its teacher: its outputs, and of its blocks their states or how these relate tokens."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn

from ibprune.inject import MASKS
from ibprune.losses import (
    Batch,
    Objective,
    dense_batch,
    forward,
    real_tokens,
    relations,
    relations_apart,
    training_loss,
)
from ibprune.plans import PruningPlan
from ibprune.rebuild import full_path
from ibprune.sites import block_paths, find_family

TAUGHT = 4  # blocks of a teacher that are matched, in each stack
RELATED = 256  # tokens of a sequence whose relations are compared, evenly spaced where it has more
States = tuple[list[torch.Tensor], list[torch.Tensor]]


@contextmanager
def watched(model: nn.Module) -> Iterator[States]:
    """Collects the residual stream after every run of a block while the model runs: an encoder's, then a decoder's.

    A model with one stack fills the first list. States are (batch, length, features).

    Raises:
        UnsupportedModel: No row describes the model, so that nothing says where its blocks are.
    """
    family = find_family(model.config.model_type)
    states: States = ([], [])
    handles = []
    for path in block_paths(model, family):
        written = bool(family.decoder_blocks) and path.startswith(family.decoder_blocks.removesuffix("*"))

        def note(module: nn.Module, args: tuple, output: torch.Tensor | tuple, to: list = states[written]) -> None:
            to.append((output[0] if isinstance(output, tuple) else output).clone())  # what follows may write into it

        handles.append(model.get_submodule(full_path(model, path)).register_forward_hook(note))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def layers_apart(objective: Objective, student: nn.Module, ours: States, theirs: States, batch: Batch) -> torch.Tensor:
    """How far the student's blocks are from the teacher's, a sum over the matched ones, per sequence, (batch,).

    In each stack `TAUGHT` blocks of the teacher, evenly spaced up to the last, are matched to the student's blocks that
    are nearest on this batch, in the same order (CoFi, Xia et al. 2022, arXiv 2204.00408, section 3.2; its code goes
    greedily from the last one down, here `match` finds the least total). A student with fewer blocks has each matched.

    `objective.layers` "hidden" compares hidden states h, by the mean over the real tokens of

        |h_student - h_teacher|^2 / |h_teacher|^2,

    on the features that the student has at present, or its directions where its stream was turned (`objective.axes`),
    so that nothing is projected. Behind a LayerNorm, where all |h| are alike, this is CoFi's mean squared error but for
    its scale; it suits residual streams that grow on their way, too.
    "relations" compares the softmax over the other real tokens of the cosines between hidden states by
    KL(teacher || student), the mean over the real tokens: the loss of MiniLMv2 (Wang et al. 2021, arXiv 2012.15828)
    on hidden states in the place of queries, keys and values. No rotation of the features changes it.

    Args:
        ours, theirs: As `watched` collects them, the teacher's without gradients.
    """
    total = torch.zeros(len(next(iter(batch.values()))), device=next(student.parameters()).device)
    for written, (students, teachers) in enumerate(zip(ours, theirs)):
        n = min(TAUGHT, len(teachers), len(students))
        taught = [teachers[(i + 1) * len(teachers) // n - 1] for i in range(n)]
        if not taught:
            continue
        real = real_tokens(batch, written=bool(written))
        students = [_on_kept(state, student, None) for state in students]
        if objective.axes is not None:
            taught = [state.float() @ objective.axes.to(state.device, torch.float32) for state in taught]
        taught = [_on_kept(state, student, objective.dims) for state in taught]
        with torch.no_grad():
            distances = [[float(_apart(objective, s, t, real).mean()) for s in students] for t in taught]
        for place, target in zip(match(distances), taught):
            total = total + _apart(objective, students[place], target, real)
    return total


def match(distances: list[list[float]]) -> list[int]:
    """The column of every row, in rising order, so that the total is least; exactly, by dynamic programming.

    Args:
        distances: A row for each of the teacher's blocks, a column for each of the student's, at least as many;
            `math.inf` where two cannot be matched.

    Example:
        >>> match([[5.0, 1.0, 9.0], [0.0, 4.0, 3.0]])
        [1, 2]
    """
    n = len(distances[0])
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (n + 1)  # of the rows so far, within the first i columns
    for row in distances:
        found: list[tuple[float, list[int]]] = [(math.inf, [])]
        for column in range(n):
            total, places = best[column]
            taken = total + row[column], [*places, column]
            found.append(taken if taken[0] < found[-1][0] else found[-1])
        best = found
    return best[-1][1]


def _on_kept(state: torch.Tensor, student: nn.Module, dims: tuple[int, ...] | None) -> torch.Tensor:
    """A state on the features that the student has: of a masked one the others are 0, whatever still writes there."""
    state = state.float()
    masks = getattr(student, MASKS, ())
    if "hidden" in masks:
        return state * masks["hidden"].hard
    return state if dims is None else state[..., list(dims)]


def _apart(objective: Objective, ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The distance of one pair of states, per sequence, (batch,); infinite where their shapes say other things.

    Args:
        real: 1 at tokens and 0 at padding, (batch, length); None: no padding.
    """
    real = ours.new_ones(ours.shape[:2]) if real is None else real.float()
    if objective.layers == "relations" and ours.shape[:2] == theirs.shape[:2]:
        step = -(-ours.shape[1] // RELATED)
        real = real[:, ::step]
        each = relations_apart(*(relations(state[:, ::step], real) for state in (ours, theirs)))
    elif objective.layers == "hidden" and ours.shape == theirs.shape:
        each = (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-12)
    else:  # stages of a Swin
        return ours.new_full((len(ours),), math.inf)
    return (each * real).sum(1) / real.sum(1).clamp_min(1)


def on_kept_features(objective: Objective, plan: PruningPlan) -> Objective:
    """Compares a narrower model with the same features of the dense one, where features are compared."""
    if objective.name != "encoder" and not objective.layers:
        return objective
    cut_dims = {
        site: plan.keep[site]
        for site in ("hidden", "pooler")
        if site in plan.keep and len(plan.keep[site]) < plan.n_units[site]
    }
    return replace(objective, dims=cut_dims.get("hidden"), pooler_dims=cut_dims.get("pooler"))


def loss_with(
    objective: Objective, teacher: nn.Module | None, accelerator: Accelerator
) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """The training loss as a function of (model, batch), distilled from the teacher where there is one."""

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        target = None
        if teacher is not None:
            with torch.no_grad(), accelerator.autocast():
                target = forward(teacher, dense_batch(batch))
        return training_loss(objective, forward(model, batch), target, batch)

    def loss_with_layers(model: nn.Module, batch: Batch) -> torch.Tensor:
        student = accelerator.unwrap_model(model)
        with torch.no_grad(), accelerator.autocast(), watched(teacher) as theirs:
            target = forward(teacher, batch)
        with watched(student) as ours:
            outputs = forward(model, batch)
        apart = layers_apart(objective, student, ours, theirs, batch).mean()
        return training_loss(objective, outputs, target, batch) + apart

    return loss_with_layers if objective.layers and teacher is not None else loss_of
