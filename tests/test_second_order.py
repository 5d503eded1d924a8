"""Choices by whole Fisher matrices against brute force."""

import itertools

import pytest
import torch

from ibprune.second_order import obs_multipliers, obs_scores, rearrange


def test_exchanges_find_the_pair_that_cancels_out():
    """Two units whose gradients are opposite cost nothing together, though each alone costs the most."""
    gradients = torch.tensor([[2.0, -2.0, 1.0, 1.0], [1.0, -1.0, 1.0, -0.5]])
    keep = rearrange({"ffn": (0, 1), "whole": (0,)}, {"ffn": gradients, "whole": torch.ones(2, 1)})
    assert keep == {"ffn": (2, 3), "whole": (0,)}


def test_exchanges_never_raise_the_estimated_loss():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradients = torch.randn(6, 12, generator=generator)
        order = gradients.square().sum(0).argsort(descending=True)
        keep = tuple(sorted(order[:5].tolist()))
        found = rearrange({"ffn": keep}, {"ffn": gradients})["ffn"]

        def loss(kept, gradients=gradients):
            return gradients[:, [u for u in range(12) if u not in kept]].sum(1).square().sum()

        assert len(found) == 5 and loss(found) <= loss(keep)
        swaps = [[u for u in found if u != a] + [b] for a in found for b in range(12) if b not in found]
        assert min(map(loss, swaps)) >= loss(found) - 1e-5


def gradients_of(n_units: int = 7, sequences: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sequences, 3, generator=generator) @ torch.randn(3, n_units, generator=generator) + torch.randn(
        sequences, n_units, generator=generator
    )


def least(fisher: torch.Tensor, kept: tuple[int, ...]) -> tuple[float, torch.Tensor]:
    """The least 1/2 (w - 1)^T F (w - 1) with w = 0 at the others, and where: by a solver of linear systems."""
    gone = [j for j in range(len(fisher)) if j not in kept]
    w = torch.zeros(len(fisher), dtype=fisher.dtype)
    if kept:
        w[list(kept)] = 1 + torch.linalg.lstsq(fisher[kept, :][:, kept], fisher[kept, :][:, gone].sum(1)).solution
    return float(0.5 * (w - 1) @ fisher @ (w - 1)), w


@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_the_surgeon_takes_the_unit_whose_loss_rises_least_with_the_others_free(shrink):
    gradients = gradients_of()
    fisher = gradients.double().T @ gradients.double() / len(gradients)
    fisher = (1 - shrink) * fisher + shrink * torch.diag(fisher.diagonal())
    scores = obs_scores({"ffn": gradients}, shrink=shrink)["ffn"]
    kept, before, highest = tuple(range(7)), 0.0, 0.0
    while kept:
        rest = [tuple(u for u in kept if u != unit) for unit in kept]
        losses = [least(fisher, units)[0] for units in rest]
        best = min(range(len(kept)), key=losses.__getitem__)
        highest = max(highest, losses[best] - before)
        assert scores[kept[best]] == pytest.approx(highest, rel=1e-6)
        kept, before = rest[best], losses[best]
    assert scores.argsort().unique().numel() == 7


def test_shrunk_to_the_diagonal_it_is_half_the_fisher_score():
    gradients = gradients_of()
    assert torch.allclose(obs_scores({"a": gradients}, shrink=1.0)["a"], gradients.double().square().mean(0) / 2)


def test_multipliers_are_where_the_loss_is_least():
    gradients = gradients_of()
    fisher = gradients.double().T @ gradients.double() / len(gradients)
    for kept in itertools.combinations(range(7), 4):
        found = obs_multipliers(
            {"ffn": gradients, "whole": gradients}, {"ffn": kept, "whole": tuple(range(7))}, shrink=0
        )
        assert torch.allclose(found["ffn"][list(kept)], least(fisher, kept)[1][list(kept)], atol=1e-6)
        assert (found["whole"] == 1).all() and (found["ffn"][[j for j in range(7) if j not in kept]] == 1).all()


def test_units_without_a_gradient_go_first_and_break_nothing():
    gradients = torch.cat([gradients_of(4), torch.zeros(40, 2)], dim=1)
    scores = obs_scores({"ffn": gradients})["ffn"]
    assert scores.isfinite().all() and scores[4:].max() < scores[:4].min()
