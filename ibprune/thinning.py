"""Parts of the training rows: a small share of every class to learn from, and some held back to judge by."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ibprune.errors import BadData

SHARE = 0.03  # VTrans (Dutta et al. 2024, arXiv 2406.05276): Fast-VTrans learns from 3 % of the data
LEAST = 512  # rows that there should be even so
HELD_BACK = 512  # rows at most, and an eighth of them at most


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


def hold_back(rows: Dataset, *, seed: int) -> tuple[Dataset, Dataset]:
    """The rows that are learned from, in their order, and those held back: `HELD_BACK`, but an eighth at the most.

    Windows are taken from the end, because neighbours share a text; of other rows a random part is.

    Raises:
        BadData: There are fewer than eight.

    Example:
        >>> [len(part) for part in hold_back(Dataset.from_dict({"text": ["a"] * 80}), seed=0)]
        [70, 10]
    """
    n = min(HELD_BACK, len(rows) // 8)
    if not n:
        raise BadData(
            f"--eval-every holds an eighth of the training rows back: expected at least 8, found {len(rows)}."
        )
    places = np.arange(len(rows))
    if "input_ids" not in rows.column_names:
        places = np.random.default_rng(seed).permutation(places)
    return rows.select(np.sort(places[:-n])), rows.select(np.sort(places[-n:]))
