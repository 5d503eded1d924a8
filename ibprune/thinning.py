"""A small share of the training rows, of every class its part."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

SHARE = 0.03  # VTrans (Dutta et al. 2024, arXiv 2406.05276): Fast-VTrans learns from 3 % of the data
LEAST = 512  # rows that there should be even so


def thin(rows: Dataset, labels: Sequence[int] | None, *, seed: int) -> Dataset:
    """`SHARE` of the rows but at least `LEAST`, in their order, and of every class the same share, at least a row.

    Args:
        labels: The class of each row, where there are classes.

    Example:
        >>> len(thin(Dataset.from_dict({"text": ["a"] * 50_000}), None, seed=0))
        1500
    """
    share = max(SHARE, LEAST / max(1, len(rows)))
    if share >= 1:
        return rows
    generator = np.random.default_rng(seed)
    classes = np.zeros(len(rows), int) if labels is None else np.asarray(labels)
    chosen = []
    for each in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == each))
        chosen.append(members[: max(1, round(share * len(members)))])
    return rows.select(np.sort(np.concatenate(chosen)))
