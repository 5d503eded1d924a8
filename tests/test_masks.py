"""The mathematics of a mask: the KL, its invariance, and the closed form of the quadratic toy."""

import math

import pytest
import torch

from ibprune.masks import VIBMask


def test_kl_is_the_closed_form_and_does_not_change_with_scale():
    mask = VIBMask(3)
    mask.mu.data = torch.tensor([1.0, -0.5, 2.0])
    mask.log_var.data = torch.tensor([-9.0, 0.0, 1.0])
    expected = [0.5 * math.log1p(m * m / math.exp(v)) for m, v in zip((1.0, -0.5, 2.0), (-9.0, 0.0, 1.0))]
    assert mask.kl().tolist() == pytest.approx(expected, rel=1e-5)
    before = mask.kl()
    mask.mu.data *= 3
    mask.log_var.data += 2 * math.log(3)
    assert torch.allclose(mask.kl(), before, atol=1e-5)


def test_large_log_alpha_means_prune():
    mask = VIBMask(2)
    mask.log_var.data = torch.tensor([-8.0, 3.0])
    assert mask.log_alpha()[1] > 0 > mask.log_alpha()[0]


def test_eval_and_noise_off_are_deterministic():
    mask = VIBMask(4)
    mask.mu.data = torch.arange(4.0)
    mask.cut((1, 3))
    assert mask.eval()(7).tolist() == [[0.0, 1.0, 0.0, 3.0]]
    mask.train().noise = 0.0
    assert mask(7).tolist() == [[0.0, 1.0, 0.0, 3.0]]
    mask.noise = 1.0
    assert mask(7).shape == (7, 4) and not torch.equal(mask(7), mask(7))


def test_a_quadratic_gate_is_kept_exactly_when_its_curvature_exceeds_twice_beta():
    """Loss 1/2 H (z - 1)^2 + beta KL: mu* = 1 - b, sigma^2* = b (1 - b), b = beta/H, keep iff H > 2 beta."""
    ratio = torch.tensor([0.5, 0.8, 2.5, 4.0, 10.0, 50.0])  # H / beta
    beta = 1.0
    mask = VIBMask(len(ratio), log_alpha=-2.0)
    optimizer = torch.optim.Adam(mask.parameters(), lr=0.05)
    for step in range(3000):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 3000)
        variance = mask.log_var.exp()
        expected_loss = 0.5 * ratio * ((mask.mu - 1) ** 2 + variance)
        optimizer.zero_grad()
        (expected_loss.sum() + beta * mask.kl().sum()).backward()
        optimizer.step()
    assert (mask.log_alpha() < 0).tolist() == (ratio > 2).tolist()
    kept = ratio > 2
    assert torch.allclose(mask.log_alpha()[kept], -torch.log(ratio[kept] - 1), atol=0.05)
    assert torch.allclose(mask.mu[kept], 1 - 1 / ratio[kept], atol=0.02)
