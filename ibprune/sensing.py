"""What closing a share of one place's units costs, each place alone: how much the loss rises on a few batches."""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from ibprune.candidates import probe_loss
from ibprune.choosing import score_units
from ibprune.console import Quiet
from ibprune.cutting import prepare_cut, ranked_by
from ibprune.engine import make_accelerator
from ibprune.errors import BadRecipe
from ibprune.groups import Site
from ibprune.inject import inject_
from ibprune.quantised import bits, flag
from ibprune.recipe import make_recipe
from ibprune.subject import known_tokens, load_subject

SEQUENCES = 128  # of the batches on which units are scored and losses compared, about


def sensitivity(
    model: str | os.PathLike, *, share: float = 0.5, console: Quiet | None = None, **recipe: object
) -> dict:
    """How much the loss rises when the lowest-scored units of one site are closed, and those of no other.

    One site after the other, on the same few training batches; nothing is trained, and no file is written. What sites
    lose together is not the sum of it: a run measures whole cuts. The loss is that on the data's labels or tokens; of
    an encoder without a head, its distance from itself as it was.

    Args:
        model: Hub id, folder or alias.
        share: Of a site's units to close, in (0, 1]: at least one, and never more than may go.
        recipe: By name, fields of `ibprune.recipe.Recipe`, such as data="reviews.tsv"; `score` says what ranks the
            units, Fisher information where it is one that is learned.

    Returns:
        "data", "objective", "score" and "share"; "sequences"; "loss" with all units open; and "sites": for each its
        "site", "kind", "units", how many are "closed", the share of the dense cost that this "saves", and the "rise".

    Raises:
        IBPruneError: As a run; or a model whose head was never trained, or that is held in 4 or 8 bits.

    Example:
        >>> found = sensitivity("minilm", share=0.25)  # doctest: +SKIP
        >>> max(found["sites"], key=lambda each: each["rise"])["site"]  # doctest: +SKIP
        'hidden'
    """
    asked, console = make_recipe({"budget": 1.0, "model": model} | recipe), console or Quiet()
    if not 0 < share <= 1:
        raise BadRecipe(f"--sensitivity: expected a share in (0, 1], found {share:g}.")
    if bits(asked):
        raise BadRecipe(f"{flag(asked)}: sites are closed in the full-precision model: leave it out.")
    if asked.cost == "latency":
        raise BadRecipe("--sensitivity: what a site saves is counted in params, macs or memory: leave --cost out.")
    accelerator = make_accelerator(asked.precision, seed=asked.seed)
    subject = load_subject(asked, console)
    if subject.loaded.new_head:
        raise BadRecipe(
            f"--sensitivity: the head of '{subject.source.name}' for this task is new, and a loss of random outputs "
            "says nothing: train it first (ibprune train), and name that folder."
        )
    dense = subject.loaded.model.to(accelerator.device).eval()
    with known_tokens(subject):
        student, structure, choice, _, _ = prepare_cut(
            dense, subject.recipe, subject.feed, accelerator, console, found=subject.found, dtype=subject.loaded.dtype
        )
    rows = len(next(iter(choice.batches[0].values())))
    choice = replace(choice, batches=choice.batches[: max(1, SEQUENCES // rows)])
    masks = inject_(student, structure.sites)
    sites = {name: structure.sites[name] for name in masks}
    scores = score_units(student, sites, masks, choice)
    judge = dense if choice.objective.name == "encoder" else None
    loss_of = probe_loss(student, masks, judge, choice.batches, choice.objective, accelerator)
    whole = {name: tuple(range(site.n_units)) for name, site in sites.items()}
    loss, cost_model = loss_of(whole), structure.costs.of(asked.cost)
    full, dense_cost = cost_model.n_units, cost_model.of_dense(scope=asked.scope)
    found = []
    for name, site in console.track(sites.items(), "closing one place at a time", len(sites)):
        stay = staying(scores[name], site, share)
        closed = site.n_units - len(stay)
        if closed:
            saved = cost_model(full, scope=asked.scope) - cost_model(full | {name: len(stay)}, scope=asked.scope)
            rise = loss_of(whole | {name: stay}) - loss
            found.append({"site": name, "kind": site.kind, "units": site.n_units, "closed": closed,
                          "saves": saved / dense_cost, "rise": rise})  # fmt: skip
    return {
        "data": subject.data.name,
        "objective": choice.objective.name,
        "cost": asked.cost,
        "score": ranked_by(replace(choice, settings=replace(choice.settings, steps=0))),
        "share": share,
        "sequences": sum(len(next(iter(batch.values()))) for batch in choice.batches),
        "loss": loss,
        "sites": found,
    }


def staying(scores: torch.Tensor, site: Site, share: float) -> tuple[int, ...]:
    """The units of a site that stay when a share of them is closed, those with the lowest scores.

    Example:
        >>> from ibprune.groups import Group, MaskAt
        >>> site = Site("0.ffn", Group("ffn", "ffn", (), MaskAt("in")), "0", (), MaskAt("in"), n_units=4)
        >>> staying(torch.tensor([3.0, 1.0, 2.0, 0.5]), site, 0.5), staying(torch.ones(4), site, 1.0)
        ((0, 2), (0,))
    """
    closed = min(max(1, round(share * site.n_units)), site.n_units - site.min_units)
    order: Sequence[int] = torch.argsort(-scores.double(), stable=True).tolist()
    return tuple(sorted(order[: site.n_units - closed]))
