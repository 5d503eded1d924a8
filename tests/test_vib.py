"""Mask learning: the ramp follows the cost, and the last steps train the units that stay."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from ibprune.budget import make_budget, solve_by_shares
from ibprune.channels import find_channels
from ibprune.console import Quiet
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.inject import inject_
from ibprune.losses import Objective
from ibprune.shares import equal_pressure
from ibprune.structure import prepare_traced_
from ibprune.surgery import compact_module_
from ibprune.trainer import TrainSettings
from ibprune.vib import learn_masks

STEPS, KEEP = 40, 0.3


def _learn(seed: int = 0):
    """(kept units, the hard masks, noises and costs of every step, limits, notes) of a net of unlike layers."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(64, 1, 6, 6)
    y = x.flatten(1)[:, :3].argmax(1)
    found = find_channels(net, x[:2], kinds=("channels", "inputs"))
    structure = prepare_traced_(net, found.sites, x[:2], compact_module_)
    costs = structure.costs.params
    budget = make_budget(costs, structure.sites, keep=KEEP, scope="model", round_to=1)
    masks = inject_(net, structure.sites)
    accelerator = make_accelerator("fp32", seed=seed)
    batches = [{"inputs": x[i : i + 16], "labels": y[i : i + 16]} for i in range(0, 64, 16)]
    objective = loss_with(Objective("classification"), None, accelerator)
    scores = {name: torch.rand(site.n_units) for name, site in structure.sites.items()}
    target = solve_by_shares(scores, structure.sites, costs, budget, equal_pressure(structure.sites))
    hard, noise, spent = [], [], []

    def watched(model, batch):
        hard.append({name: tuple(mask.hard.nonzero().flatten().tolist()) for name, mask in masks.items()})
        noise.append({mask.noise for _, mask in masks.items()})
        spent.append(costs({name: len(units) for name, units in hard[-1].items()}))
        return objective(model, batch)

    keep, _, state = learn_masks(
        net, masks, structure.sites, costs, budget, scores, target, watched,
        lambda epoch: DataLoader(batches, batch_size=None), TrainSettings(steps=STEPS, lr=1e-2, seed=seed),
        accelerator=accelerator, console=Quiet(),
    )  # fmt: skip
    return keep, hard, noise, spent, (costs(costs.n_units), budget.limit), state.notes


def test_the_last_steps_train_exactly_what_stays_without_noise():
    keep, hard, noise, spent, (_, limit), _ = _learn()
    settled = int(0.75 * STEPS)
    assert all(now == keep for now in hard[settled:]) and spent[-1] <= limit
    assert noise[0] == {1.0} and all(now == {0.0} for now in noise[settled:])
    assert any(now != keep for now in hard[:settled])


def test_the_ramp_follows_the_cost_whatever_its_units_cost():
    _, _, _, spent, (dense, limit), notes = _learn()
    end = int(0.6 * STEPS)
    for step in range(0, end, 5):  # masks are cut anew at every fifth step
        allowed = dense - (step + 1) / end * (dense - limit)
        assert 0.8 * allowed <= spent[step] <= allowed
    assert all(0.9 * limit <= cost <= limit for cost in spent[end + 5 :])
    told = {step: (share, most) for step, share, most in notes["path"]}
    assert set(told) == {*range(0, int(0.75 * STEPS), 5), int(0.75 * STEPS), STEPS}
    for step, (share, most) in told.items():
        assert share == spent[min(step, STEPS - 1)] / dense <= most <= 1
    assert told[STEPS][1] == limit / dense


def test_the_scores_that_are_told_are_those_by_which_the_units_were_chosen():
    keep, _, _, _, _, notes = _learn()
    assert set(notes["kinds"]) == {"channels", "inputs"}
    assert sum(found["kept"] for found in notes["kinds"].values()) == sum(map(len, keep.values()))
    for found in notes["kinds"].values():
        assert found["scores"] == sorted(found["scores"], reverse=True) and len(found["scores"]) == found["units"]
        assert found["beyond"] <= 0.1 * found["units"]  # the room that is left is filled across kinds
        assert found["scores"][found["kept"] - 1] == found["threshold"]


def test_the_same_seed_keeps_the_same_units():
    assert _learn()[:2] == _learn()[:2]
