"""Do the heads that a plan keeps look elsewhere than those it removes? Task keywords, and a test within layers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from ibprune.attention import Reading, head_means
from ibprune.errors import BadData
from ibprune.mi.samples import BadSamples


@dataclass(frozen=True)
class HeadContrast:
    """Kept against removed heads of the dense model, in one measure.

    Attributes:
        kept, removed: Mean over the heads of all layers; None where there is none.
        difference: Kept - removed within layers; None where no layer has both.
        null95: 95 % of the differences of random plans with the same counts in every layer.
        p_value: Of the absolute difference under the same random plans; where their distribution is skewed it can
            disagree with null95.
        n_kept, n_removed: Units: heads, or groups of heads that go together.
        layers: Layers that have both.
    """

    kept: float | None
    removed: float | None
    difference: float | None
    null95: tuple[float, float] | None
    p_value: float | None
    n_kept: int
    n_removed: int
    layers: int


def choose_keywords(
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    *,
    most: int = 50,
    least: int = 20,
    skip: Collection[int] = (),
) -> tuple[int, ...]:
    """Tokens whose presence in a text tells most about its label, most telling first.

    Ranked by the mutual information of presence and label. Only tokens whose association is beyond chance are
    taken: G = 2 N I above the chi-square quantile at 5 % over all tokens tested (Bonferroni), so that labels
    without relation to the text give none.

    Args:
        rows: Token ids of each training text.
        labels: Class of each text, (n,).
        most: At most so many tokens.
        least: Texts that must have the token, and that must lack it.
        skip: Ids never chosen, such as special tokens.

    Raises:
        BadData: Numbers of texts and labels that differ, or fewer than two classes.

    Example:
        >>> choose_keywords([[5, 7], [5, 8]] * 50, [0, 1] * 50)
        (7, 8)
    """
    if len(rows) != len(labels):
        raise BadData(f"expected a label for each of {len(rows):,} texts, found {len(labels):,}.")
    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) < 2:
        raise BadData(f"expected labels of at least two classes to find keywords, found {len(classes)}.")
    total = np.bincount(y).astype(np.float64)  # (classes,)
    present = np.zeros((1 + max((max(row, default=0) for row in rows), default=0), len(classes)))
    for row, label in zip(rows, y):
        present[np.unique(np.asarray(row, dtype=np.int64)), label] += 1  # texts with the token, (tokens, classes)
    often = present.sum(1)
    tested = np.flatnonzero((often >= least) & (len(rows) - often >= least))
    tested = tested[~np.isin(tested, list(skip))]
    information = sum(_terms(part, total, len(rows)) for part in (present[tested], total - present[tested]))
    if not len(tested):
        return ()
    telling = 2 * len(rows) * information > chi2.isf(0.05 / len(tested), len(classes) - 1)
    order = np.argsort(-information, kind="stable")
    return tuple(int(tested[i]) for i in order[telling[order]][:most])


def _terms(counts: np.ndarray, total: np.ndarray, n: int) -> np.ndarray:
    """Sum over classes of p(w, y) ln p(w, y) / (p(w) p(y)) for one state of presence, nats, (tokens,)."""
    joint = counts / n
    independent = joint.sum(1, keepdims=True) * (total / n)
    return np.where(counts > 0, joint * np.log(np.where(counts > 0, joint / independent, 1.0)), 0.0).sum(1)


def contrast(
    values: Sequence[np.ndarray], kept: Sequence[Collection[int]], *, permutations: int = 10_000, seed: int = 0
) -> HeadContrast:
    """Kept minus removed, adjusted for layers, against random plans with the same counts in every layer.

    The layer's mean over its units is subtracted from the values and from the indicator of being kept, and
    the one is regressed on the other: S / sum_l n_l p_l (1 - p_l) with S the adjusted values summed over the
    kept units and p_l the kept share. An effect that is the same in every layer is recovered exactly whatever
    the counts, which a difference of adjusted means is not; where the counts are equal the two agree. A layer
    that keeps all, or nothing, says nothing.

    Args:
        values: Per layer, one value per unit, (units,).
        kept: Per layer, indices of the kept units.
        permutations: Random plans.

    Raises:
        BadSamples: Other numbers of layers, an index out of range, or values that are not finite.

    Example:
        >>> found = contrast([np.array([0.1, 0.1, 0.9, 0.9]), np.array([1.1, 1.1, 1.9, 1.9])], [(2, 3), (2, 3)])
        >>> round(found.difference, 3)
        0.8
    """
    if len(values) != len(kept):
        raise BadSamples(f"expected the kept units of {len(values)} layers, found {len(kept)}.")
    values = [np.asarray(layer, dtype=np.float64) for layer in values]
    if not all(np.isfinite(layer).all() for layer in values):
        raise BadSamples("expected finite values, found NaN or infinity.")
    chosen = [np.zeros(len(layer), dtype=bool) for layer in values]
    for mask, units in zip(chosen, kept):
        if units and not 0 <= min(units) <= max(units) < len(mask):
            raise BadSamples(f"expected kept units in 0..{len(mask) - 1}, found {sorted(units)}.")
        mask[list(units)] = True
    flat, inside = np.concatenate(values), np.concatenate(chosen)
    found = {
        "kept": float(flat[inside].mean()) if inside.any() else None,
        "removed": float(flat[~inside].mean()) if not inside.all() else None,
        "n_kept": int(inside.sum()),
        "n_removed": int((~inside).sum()),
    }
    telling = [(layer - layer.mean(), mask) for layer, mask in zip(values, chosen) if 0 < mask.sum() < len(mask)]
    if not telling:
        return HeadContrast(**found, difference=None, null95=None, p_value=None, layers=0)
    scale = sum(len(mask) * mask.mean() * (1 - mask.mean()) for _, mask in telling)
    difference = float(sum(layer[mask].sum() for layer, mask in telling) / scale)
    rng = np.random.default_rng(seed)
    null = np.zeros(permutations)
    for layer, mask in telling:
        null += rng.permuted(np.tile(layer, (permutations, 1)), axis=1)[:, mask].sum(1)
    null /= scale
    # rounding must not make an equal plan look smaller
    extreme = int((np.abs(null) >= abs(difference) - 1e-12 * np.abs(null).max()).sum())
    low, high = np.quantile(null, [0.025, 0.975])
    return HeadContrast(
        **found,
        difference=difference,
        null95=(float(low), float(high)),
        p_value=(1 + extreme) / (1 + permutations),
        layers=len(telling),
    )


def head_contrasts(
    reading: Reading,
    units: Mapping[str, tuple[int, tuple[int, ...]]],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> dict[str, HeadContrast | None]:
    """`contrast` of every measure of the dense model's heads under one plan; None where no input defines it.

    Heads of a group that goes together are averaged first: the group is what a plan chooses.

    Args:
        reading: From `attention.read_heads` of the dense model.
        units: From `attention.kept_units`.

    Raises:
        BadSamples: The plan has other blocks, or units that do not divide the heads.
    """
    means = {block: head_means(measures) for block, measures in reading.items()}
    if set(means) - set(units):
        raise BadSamples(f"expected a plan of the blocks {', '.join(means)}, found {', '.join(units) or 'none'}.")
    found: dict[str, HeadContrast | None] = {}
    for name in next(iter(means.values()), {}):
        values = []
        for block in means:
            heads, count = means[block][name], units[block][0]
            if heads is not None and len(heads) % count:
                raise BadSamples(f"expected a multiple of {count} heads in '{block}', found {len(heads)}.")
            values.append(None if heads is None else heads.reshape(count, -1).mean(1))
        kept = [units[block][1] for block in means]
        known = all(layer is not None for layer in values)
        found[name] = contrast(values, kept, permutations=permutations, seed=seed) if known else None
    return found
