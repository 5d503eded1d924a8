"""Critics: log-density ratios of all pairs of two samples, a fitted Gaussian one plus a learned product."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
from torch import nn

from ibprune.mi.neighbours import gaussianize

HARMONICS = 8


@dataclass(frozen=True)
class Pairs:
    """What critics see of n pairs: inputs of the two networks and the Gaussian log-density ratio in parts.

    The ratio of x_i and y_j is left_i . right_j + of_x_i + of_y_j.
    """

    x: torch.Tensor
    y: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    of_x: torch.Tensor
    of_y: torch.Tensor

    def take(self, rows) -> "Pairs":
        rows = torch.as_tensor(rows)
        return Pairs(*(part[rows] for part in (self.x, self.y, self.left, self.right, self.of_x, self.of_y)))


class Critic(nn.Module):
    """scale * Gaussian log-density ratio + f(x)^T g(y) + a(x) + b(y), of all pairs, (n, n)."""

    def __init__(self, d_x: int, d_y: int, width: int, rank: int):
        super().__init__()
        self.of_x, self.of_y = _network(d_x, width, rank + 1), _network(d_y, width, rank + 1)
        # At the start the critic is the Gaussian one, so a layer that is Gaussian loses nothing by the networks.
        nn.init.zeros_(self.of_x[-1].weight)
        nn.init.zeros_(self.of_y[-1].weight[-1:])
        for network in (self.of_x, self.of_y):
            nn.init.zeros_(network[-1].bias)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pairs: Pairs) -> torch.Tensor:
        f, g = self.of_x(pairs.x), self.of_y(pairs.y)
        left = torch.cat([self.scale * pairs.left, f[:, :-1] / math.sqrt(f.shape[1] - 1)], dim=1)
        right = torch.cat([pairs.right, g[:, :-1]], dim=1)
        rows = self.scale * pairs.of_x + f[:, -1]
        return left @ right.T + rows[:, None] + (self.scale * pairs.of_y + g[:, -1])


def _network(d: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def network_inputs(raw: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """What a network sees of one side: normal scores, and what a product of networks learns only slowly from them.

    Those are, of one feature, cosines of its rank, for edges and folds; of more, the distance from the centre
    before and after taking scores, since a common scale of all features is a frequent way to depend.
    """
    if scores.shape[1] == 1:
        # From the scores, so that equal values stay equal: an order among them would carry other information.
        ranks = ndtr(scores)
        return np.hstack([scores, math.sqrt(2) * np.cos(math.pi * ranks * np.arange(1, HARMONICS + 1))])
    low, middle, high = np.quantile(raw, [0.25, 0.5, 0.75], axis=0)
    spread = np.where(high > low, high - low, 1.0)
    before = (((raw - middle) / spread) ** 2).sum(axis=1)
    after = (scores**2).sum(axis=1)
    return np.hstack([scores, gaussianize(np.column_stack([before, after]))])


def gaussian_parts(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Log-density ratio of a Gaussian fitted to `rows`, in the parts that `Pairs` holds, for all rows.

    With canonical coordinates a, b and correlations r it is the sum over coordinates of
    r/(1-r^2) a b - r^2/(1-r^2) (a^2 + b^2)/2 - ln(1-r^2)/2. With p = d_x/n and q = d_y/n, a sample correlation
    stands for the r that solves r_sample^2 = (r^2 (1-p) + p)(r^2 (1-q) + q)/r^2 (Bao et al. 2019,
    arXiv 1704.02408), and for 0 below the largest that independent samples show.
    """
    n = len(rows)
    to_a, to_b = (_whitening(side[rows], most=max(1, n // 8)) for side in (x, y))
    centre_x, centre_y = x[rows].mean(axis=0), y[rows].mean(axis=0)
    a, b = (x - centre_x) @ to_a, (y - centre_y) @ to_b
    left, found, right = np.linalg.svd(a[rows].T @ b[rows] / n, full_matrices=False)
    p, q = a.shape[1] / n, b.shape[1] / n
    edge = p + q - 2 * p * q + 2 * math.sqrt(p * q * (1 - p) * (1 - q))
    found = found[: np.count_nonzero(found**2 > edge)]
    linear, square = p * (1 - q) + q * (1 - p) - found**2, (1 - p) * (1 - q)
    r2 = (-linear + np.sqrt(np.maximum(linear**2 - 4 * square * p * q, 0.0))) / (2 * square)
    r2 = np.clip(r2, 0.0, 1 - 1e-4)
    a, b = a @ left[:, : len(r2)], b @ right[: len(r2)].T
    weight = r2 / (1 - r2)
    of_x = -0.5 * (a**2 @ weight) - 0.5 * np.log1p(-r2).sum()
    return a * (np.sqrt(r2) / (1 - r2)), b, of_x, -0.5 * (b**2 @ weight)


def _whitening(x: np.ndarray, most: int) -> np.ndarray:
    """Maps centred rows to at most `most` uncorrelated coordinates of variance 1, (d, kept)."""
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x.T, bias=True)))
    kept = np.flatnonzero(values > 1e-6 * values[-1])[-most:]
    return vectors[:, kept] / np.sqrt(values[kept])
