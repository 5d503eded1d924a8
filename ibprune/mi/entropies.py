"""Entropies of discrete things: labels, and where attention heads look; nats."""

import numpy as np
import torch

from ibprune.mi.samples import FEW, BadSamples, Estimate, as_labels


def label_entropy(labels) -> Estimate:
    """H(Y), plug-in with the Miller-Madow correction (K - 1) / 2n (Miller 1955): the ceiling of every I(.; Y).

    Args:
        labels: Integers or strings, (n,).

    Example:
        >>> round(label_entropy([0, 1] * 500).value, 4)      # ln 2 = 0.6931
        0.6936
    """
    y = as_labels(labels)
    n = len(y)
    share = np.bincount(y) / n
    value = -float((share * np.log(share)).sum()) + (len(share) - 1) / (2 * n)
    terms = -np.log(share[y])
    half = 1.96 * float(terms.std(ddof=1)) / np.sqrt(n)
    status = "degenerate" if len(share) < 2 else "ok" if n >= FEW else "undersampled"
    return Estimate(value, status, "plug-in, Miller-Madow", n, (value - half, value + half))


def attention_entropy(attention: torch.Tensor, attention_mask: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Entropy of each head's attention over its largest possible value, mean over real queries, (batch, heads).

    0 where a head always looks at one token, 1 where it looks at all visible ones alike. Queries that see a
    single token are left out. Not an information: never to be added to one.

    Args:
        attention: Probabilities, (batch, heads, queries, keys), from `attn_implementation="eager"`.
        attention_mask: 1 for real tokens, (batch, keys).
        causal: Whether a query sees only the tokens up to its own.

    Raises:
        BadSamples: The shapes do not belong together.
    """
    if attention.ndim != 4 or attention_mask.shape != (attention.shape[0], attention.shape[3]):
        raise BadSamples(
            f"expected attention (batch, heads, queries, keys) and a mask (batch, keys), found "
            f"{tuple(attention.shape)} and {tuple(attention_mask.shape)}."
        )
    real = attention_mask.to(attention.device, torch.float64)
    visible = real.cumsum(1) if causal else real.sum(1, keepdim=True).expand_as(real)
    entropy = torch.special.entr(attention.double()).sum(-1)  # (batch, heads, queries)
    counts = (real > 0) & (visible > 1)
    share = entropy / torch.log(visible.clamp_min(2))[:, None]
    return (share * counts[:, None]).sum(-1) / counts.sum(-1).clamp_min(1)[:, None]
