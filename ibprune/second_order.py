"""Choices by the whole Fisher matrix of each site: what a unit costs depends on which others go with it."""

import torch

from ibprune.budget import Keep

ROUNDS = 10  # of exchanges; most sites settle in three
SHRINK = 0.5  # of what the matrix says beside its diagonal: it has more entries than there are sequences
LARGEST = 10.0  # no multiplier beyond it


def rearrange(keep: Keep, gradients: dict[str, torch.Tensor], *, within: Keep | None = None) -> Keep:
    """Swaps cut and kept units within each site while that lowers the estimated loss; as many stay.

    Kwon et al. 2022 (arXiv 2204.09656, sec. 4.2): with the Fisher matrix of each site whole instead of its
    diagonal, cutting the units C costs 1/2 sum over sequences of (sum over C of the gate gradients)^2. From the least
    important up, every cut unit is exchanged with the kept one that lowers this most, until a round changes nothing.

    Args:
        gradients: Of each sequence by each unit's multiplier, by site, (sequences, n_units).
        within: The only units that may stay, `keep` among them; None: all.

    Example:
        >>> both = torch.tensor([[1.0, -1.0, 1.1]])  # the first two cancel out
        >>> rearrange({"ffn": (1,)}, {"ffn": both})
        {'ffn': (2,)}
    """
    found = dict(keep)
    for name, gradient in gradients.items():
        rows = gradient.double().T.contiguous()  # (n_units, sequences)
        kept = torch.zeros(len(rows), dtype=torch.bool)
        kept[list(keep[name])] = True
        if kept.all() or not kept.any():
            continue
        squares = rows.square().sum(1)
        free = set(range(len(rows)) if within is None else within[name])
        order = [unit for unit in torch.argsort(squares, stable=True).tolist() if unit in free and not kept[unit]]
        total = rows[~kept].sum(0)
        for _ in range(ROUNDS):
            changed = False
            for place, unit in enumerate(order):
                rest = total - rows[unit]
                costs = squares + 2 * (rows @ rest)  # of cutting each unit beside the rest, less the rest's own
                best = int(torch.where(kept, costs, torch.inf).argmin())
                if costs[unit] - costs[best] > 1e-9 * squares[unit]:  # more than rounding
                    kept[unit], kept[best], order[place] = True, False, best
                    total, changed = rest + rows[best], True
            if not changed:
                break
        found[name] = tuple(kept.nonzero().flatten().tolist())
    return found


def obs_scores(gradients: dict[str, torch.Tensor], *, shrink: float = SHRINK) -> dict[str, torch.Tensor]:
    """What the loss rises by when each unit goes after all that are dearer to lose have stayed, by site, (n_units,).

    Optimal brain surgeon (Hassibi & Stork 1992) on the units' multipliers w, all 1 at first, with the empirical
    Fisher matrix F for the Hessian as in M-FAC (Frantar et al. 2021, arXiv 2107.03356): of those left, the unit with
    the least

        rho_j = w_j^2 / (2 [F^-1]_jj)      goes, and the others make up for it by    w -= w_j F^-1 e_j / [F^-1]_jj

    M-FAC damps F by a constant; here it is shrunk towards its diagonal, so that `shrink` 1 is the order of `fisher`. A
    score is the largest rho so far: those of a site follow the order in which its units go. Sites are independent.
    The time grows with the cube of a site's units.

    Args:
        gradients: Of each sequence by each unit's multiplier, by site, (sequences, n_units).

    Example:
        >>> obs_scores({"ffn": torch.tensor([[2.0, 0.0], [0.0, 4.0]])}, shrink=0.0)["ffn"].tolist()
        [1.0, 4.0]
    """
    found = {}
    for name, gradient in gradients.items():
        inverse = torch.linalg.inv(_fisher(gradient, shrink))
        w = torch.ones(len(inverse), dtype=torch.float64)
        left, highest = torch.ones(len(w), dtype=torch.bool), 0.0
        scores = torch.zeros_like(w)
        for _ in range(len(w)):
            diagonal = inverse.diagonal()
            costs = torch.where(left, w.square() / (2 * diagonal.clamp_min(1e-300)), torch.inf)
            unit = int(costs.argmin())
            highest = max(highest * (1 + 1e-12), float(costs[unit]))
            scores[unit], left[unit] = highest, False
            column = inverse[:, unit].clone()
            w -= column * (w[unit] / column[unit])
            w[unit] = 0.0
            inverse -= torch.outer(column, column / column[unit])
        found[name] = scores
    return found


def obs_multipliers(
    gradients: dict[str, torch.Tensor], keep: Keep, *, shrink: float = SHRINK
) -> dict[str, torch.Tensor]:
    """The multipliers at which the units that stay make up best for those that go, by site, (n_units,); the others 1.

    Where the steps of `obs_scores` end: the w_S that minimises (w - 1)^T F (w - 1) with w_C = 0, 1 + F_SS^-1 F_SC 1. A
    site of which some would leave [-10, 10] is left at 1.
    """
    found = {}
    for name, gradient in gradients.items():
        found[name] = torch.ones(gradient.shape[1], dtype=torch.float64)
        kept = torch.zeros(gradient.shape[1], dtype=torch.bool)
        kept[list(keep[name])] = True
        if kept.any() and not kept.all():
            fisher = _fisher(gradient, shrink)
            factors = 1 + torch.linalg.solve(fisher[kept][:, kept], fisher[kept][:, ~kept].sum(1))
            if factors.abs().max() <= LARGEST:
                found[name][kept] = factors
    return found


def _fisher(gradient: torch.Tensor, shrink: float) -> torch.Tensor:
    """Mean outer product of (sequences, n_units), shrunk towards its diagonal; of full rank, float64."""
    rows = gradient.double()
    fisher = rows.T @ rows / len(rows)
    diagonal = fisher.diagonal()
    floor = 1e-9 * diagonal.mean() + 1e-300  # units without any gradient
    return (1 - shrink) * fisher + torch.diag(shrink * diagonal + floor)
