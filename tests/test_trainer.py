"""The training loop: accumulation, seeds, groups, and a loss that is not a number."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ibprune.console import Quiet
from ibprune.errors import IBPruneError
from ibprune.trainer import TrainSettings, TrainState, make_accelerator, train


def rows(n: int = 48) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, generator=generator), "y": torch.randn(1, generator=generator)} for _ in range(n)]


def fit(batch_size: int, **settings):
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    settings = TrainSettings(**({"lr": 0.1} | settings))
    accelerator = make_accelerator("fp32", grad_accum=settings.grad_accum)
    state = train(
        model,
        lambda m, batch: (m(batch["x"]) - batch["y"]).square().mean(),
        lambda seed: DataLoader(rows(), batch_size=batch_size),
        settings,
        accelerator=accelerator,
        phase="fit",
        console=Quiet(),
    )
    return model, state


def test_accumulated_small_batches_are_one_large_batch():
    large, _ = fit(16, steps=9)  # three epochs of three steps
    small, state = fit(8, steps=9, grad_accum=2)
    assert torch.allclose(large.weight, small.weight, atol=1e-5)
    assert state.step == 9 and len(state.losses) == 9


def test_the_loss_falls_and_the_state_survives_json():
    _, state = fit(16, steps=60)
    assert sum(state.losses[-4:]) < sum(state.losses[:4])
    assert TrainState.from_dict(state.to_dict()) == state


def test_no_steps_change_nothing():
    model, state = fit(16, steps=0)
    assert torch.equal(model.weight, torch.full((1, 3), 0.1)) and state.step == 0


def test_a_loss_that_is_not_finite_stops_with_a_reason():
    with pytest.raises(IBPruneError, match="lower --lr"):
        train(
            nn.Linear(3, 1),
            lambda m, batch: m(batch["x"]).mean() * float("nan"),
            lambda seed: DataLoader(rows(), batch_size=8),
            TrainSettings(steps=2, lr=0.1),
            accelerator=make_accelerator("fp32"),
            phase="fit",
            console=Quiet(),
        )


def test_extra_groups_keep_their_own_rate_and_no_decay():
    """A mask's parameter with no gradient force must not decay."""
    model = nn.Linear(3, 1)
    mask = nn.Parameter(torch.ones(4))
    model.register_parameter("mask", mask)
    train(
        model,
        lambda m, batch: (m(batch["x"]) - batch["y"]).square().mean() + 0 * mask.sum(),
        lambda seed: DataLoader(rows(), batch_size=8),
        TrainSettings(steps=5, lr=0.1, weight_decay=0.5),
        accelerator=make_accelerator("fp32"),
        phase="fit",
        console=Quiet(),
        extra_groups=[{"params": [mask], "lr": 0.5}],
    )
    assert torch.equal(mask, torch.ones(4))


def test_frozen_weights_stay_and_only_the_extra_groups_are_trained():
    model, mask = nn.Linear(3, 1), nn.Parameter(torch.ones(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = []

    def loss_of(m, batch):
        gradients.append([p.requires_grad for p in m.parameters()])
        return (m(batch["x"] * mask) - batch["y"]).square().mean()

    train(
        model, loss_of, lambda seed: DataLoader(rows(), batch_size=16), TrainSettings(steps=5, lr=0.1),
        accelerator=make_accelerator("fp32"), phase="fit", console=Quiet(), frozen=True,
        extra_groups=[{"params": [mask], "lr": 0.1}],
    )  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(mask, torch.ones(3))
    assert gradients == 5 * [[False, False]] and all(p.requires_grad for p in model.parameters())
