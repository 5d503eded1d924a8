"""The training loop: accumulation, seeds, groups, states, and a loss that is not a number."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import ibprune
from ibprune.console import Quiet
from ibprune.engine import make_accelerator
from ibprune.errors import BadRecipe, IBPruneError
from ibprune.masks import MaskSet, VIBMask
from ibprune.optimizers import make_optimizer
from ibprune.recipe import make_recipe
from ibprune.resuming import FolderJournal
from ibprune.trainer import SCHEDULES, TrainSettings, TrainState, decay, rate, train


def rows(n: int = 48) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, generator=generator), "y": torch.randn(1, generator=generator)} for _ in range(n)]


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def fit(batch_size: int, loss_of=squared, **settings):
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    settings = TrainSettings(**({"lr": 0.1} | settings))
    accelerator = make_accelerator("fp32", grad_accum=settings.grad_accum)
    state = train(
        model,
        loss_of,
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


def test_two_phases_of_one_schedule_fall_as_one_and_each_warms_up():
    one = [rate(TrainSettings(steps=100, lr=1.0), step) for step in range(100)]
    assert max(one) == one[9] == 1.0 and one[-1] == pytest.approx(1 / 90)
    first = [rate(TrainSettings(steps=40, lr=1.0, after=60), step) for step in range(40)]
    second = [rate(TrainSettings(steps=60, lr=1.0, before=40), step) for step in range(60)]
    assert first[10:] == pytest.approx(one[10:40])
    assert second[6:] == pytest.approx(one[46:])
    assert first[0] == 1 / 4 and second[0] == pytest.approx(1 / 6)


def test_no_steps_change_nothing():
    model, state = fit(16, steps=0)
    assert torch.equal(model.weight, torch.full((1, 3), 0.1)) and state.step == 0


def test_schedules_fall_from_the_peak_to_nothing_as_their_papers_say(monkeypatch):
    lefts = [i / 40 for i in range(41)]
    for schedule in SCHEDULES:
        shares = [decay(left, schedule) for left in lefts]
        assert shares[0] == pytest.approx(0, abs=1e-12) and shares[-1] == decay(1.5, schedule) == 1
        assert shares == sorted(shares)
    assert decay(0.3, "linear") == 0.3
    cosine = [(1 + math.cos(math.pi * (1 - left))) / 2 for left in lefts]
    assert [decay(left, "cosine") for left in lefts] == pytest.approx(cosine)
    assert decay(0.5, "uba") == pytest.approx(2 / 7)  # c = 1: 2 / (2 phi + 2 - phi)
    monkeypatch.setattr("ibprune.trainer.PHI", 2.0)
    assert [decay(left, "uba") for left in lefts] == pytest.approx(cosine)
    monkeypatch.setattr("ibprune.trainer.PHI", 1e-9)  # a constant rate
    assert min(decay(left, "uba") for left in lefts[2:]) > 0.999
    with pytest.raises(BadRecipe, match="did you mean 'cosine'"):
        decay(0.5, "cosin")


def test_the_weights_follow_the_schedule():
    """Where the gradient is always 1, AdamW's steps are as long as the rate."""
    for schedule in SCHEDULES:
        model, _ = fit(16, lambda m, batch: m.weight.sum(), steps=10, lr=1e-3, weight_decay=0.0, schedule=schedule)
        rates = [1.0, *(decay((10 - step) / 9, schedule) for step in range(1, 10))]
        assert torch.allclose(0.1 - model.weight, torch.tensor(1e-3 * sum(rates)), rtol=1e-4)


def journalled(folder: Path, loss_of, width: int = 4, **settings):
    """Trains for twelve steps of grad_accum 2, three epochs and a half, saving each one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
    journal = FolderJournal(folder, make_recipe({"model": "m", "budget": 1}), 0.0, Quiet())
    settings = TrainSettings(**(dict(steps=12, lr=0.1, grad_accum=2) | settings))
    state = train(
        model, loss_of, lambda seed: DataLoader(rows(), batch_size=7, shuffle=True), settings,
        accelerator=make_accelerator("fp32", grad_accum=2), phase="fit", console=Quiet(), journal=journal,
    )  # fmt: skip
    return [p.detach().clone() for p in model.parameters()], state


class Failing:
    """A loss that is NaN at one call."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self, model, batch):
        self.left -= 1
        return squared(model, batch) * (float("nan") if self.left == 0 else 1)


def test_a_loss_that_is_not_finite_keeps_the_last_state_which_goes_on_to_the_same_end(tmp_path):
    weights, state = journalled(tmp_path / "whole", squared)
    for call in (2, 9, 15):  # in the first epoch, at the second batch of a step, right after an epoch
        folder, step = tmp_path / str(call), (call - 1) // 2
        with pytest.raises(IBPruneError, match=f"became nan at step {step} of 'fit', first in the loss itself: lower"):
            journalled(folder, Failing(call))
        again, resumed = journalled(folder, squared)
        assert all(torch.equal(*pair) for pair in zip(weights, again)) and resumed == state
        done, known = journalled(folder, Failing(1))  # nothing is left to do
        assert all(torch.equal(*pair) for pair in zip(weights, done)) and known == state
    with pytest.raises(BadRecipe, match="does not fit the model, such as '0.weight'"):
        journalled(folder, squared, width=5)


def test_moments_in_8_bits_are_of_large_weights_alone_and_go_on_to_the_same_end(tmp_path):
    pytest.importorskip("bitsandbytes")
    eight = dict(optimizer="adamw-8bit", lr=0.01)
    weights, state = journalled(tmp_path / "whole", squared, width=2048, **eight)
    with pytest.raises(IBPruneError, match="became nan at step 7"):
        journalled(tmp_path / "state", Failing(15), width=2048, **eight)
    saved = load_file(tmp_path / "state" / "fit.safetensors")
    kinds = {name.split("/")[1]: x.dtype for name, x in saved.items() if name.endswith("/state1")}
    assert kinds == {"0": torch.uint8, "1": torch.float32, "2": torch.float32, "3": torch.float32}
    again, resumed = journalled(tmp_path / "state", squared, width=2048, **eight)
    assert all(torch.equal(*pair) for pair in zip(weights, again)) and resumed == state
    plain, losses = journalled(tmp_path / "plain", squared, width=2048, **eight | dict(optimizer="adamw"))
    assert not torch.equal(plain[0], weights[0])
    assert state.losses == pytest.approx(losses.losses, rel=0.05)  # step by step
    mask = nn.Parameter(torch.ones(5000))
    mask.grad = torch.ones_like(mask)
    optimizer = make_optimizer("adamw-8bit", [{"params": [mask], "optim_bits": 32}], 0.1)
    optimizer.step()
    assert optimizer.state[mask]["state1"].dtype == torch.float32


def test_an_optimizer_that_cannot_be_had_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    with pytest.raises(BadRecipe, match="--optimizer: found 'adam-8bit': did you mean 'adamw-8bit'"):
        make_recipe({"model": "m", "budget": 1, "optimizer": "adam-8bit"})
    values = dict(budget=0.5, optimizer="adamw-8bit", output=tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadRecipe, match=r'needs bitsandbytes: pip install "ibprune\[bnb\]", or use adamw'):
        ibprune.prune("bert-base", **values)
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes")

    def never(self, closure=None):
        raise NotImplementedError("no kernel for CPUs.")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", never)
    with pytest.raises(BadRecipe, match=r"does not run on cpu \(no kernel for CPUs\): it needs a GPU, or use adamw"):
        ibprune.prune("bert-base", **values)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    def poisoned(model, batch):
        loss = squared(model, batch)
        if len(poisoned.calls) == 10:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        poisoned.calls.append(1)
        return loss

    poisoned.calls = []
    with pytest.raises(IBPruneError, match="step 5 of 'fit' left NaN or infinity, first in '0.weight'"):
        journalled(tmp_path, poisoned)
    weights, _ = journalled(tmp_path, squared)
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_what_first_became_not_finite_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))

    def stopped(spoil) -> str:
        with pytest.raises(IBPruneError, match="lower --lr") as caught:
            train(
                model, lambda m, batch: squared(m, {"x": batch["x"] * spoil, "y": batch["y"]}),
                lambda seed: DataLoader(rows(), batch_size=8), TrainSettings(steps=2, lr=0.1),
                accelerator=make_accelerator("fp32"), phase="fit", console=Quiet(),
            )  # fmt: skip
        return str(caught.value)

    assert "first in the output of '0'" in stopped(float("inf"))
    with torch.no_grad():
        model[1].bias.fill_(float("nan"))
    assert "first in '1.bias'" in stopped(1)
    model.masks = MaskSet({"layers.0.ffn": VIBMask(2), "layers.1.ffn": VIBMask(2)})
    with torch.no_grad():
        model.masks["layers.1.ffn"].log_var[1] = float("inf")
    assert "first in the mask of 'layers.1.ffn'" in stopped(1)


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
