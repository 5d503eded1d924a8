"""Information from nearest neighbours: KSG, Ross and Kozachenko-Leonenko, for few dimensions only; nats throughout."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import gammaln, ndtri, psi
from scipy.stats import rankdata, t

from ibprune.mi.samples import BadSamples, Estimate, as_labels, as_pair, as_samples, share_of_duplicates

METRICS = ("euclidean", "chebyshev")
DIMS_SAFE, DIMS_MOST = 4, 8  # of x and y together; the bias is small up to the first, large beyond the second
SAMPLES_SAFE = 1000
TIES_MOST = 0.01
SATURATION = 0.7  # of log N, the largest value that N samples can show
PARTS = 4
_BLOCK = 2**22  # entries of a block of distances, 32 MiB


def ksg(x, y, *, k: int = 5, metric: str = "euclidean", gaussianize: bool = False) -> Estimate:
    """I(X; Y) of two continuous variables, in nats (Kraskov, Stoegbauer & Grassberger 2004, eq. 8).

    psi(k) + psi(N) - mean[psi(n_x + 1) + psi(n_y + 1)]: the distance to the k-th neighbour is the larger
    of the distances in x and in y, n_x and n_y count the samples strictly closer than it. Biased down, the
    more so the more dimensions and the larger the information. Do not whiten before.

    Args:
        x: Samples, (n, d_x) or (n,).
        y: Samples, (n, d_y) or (n,), row i belonging to row i of x.
        k: Neighbours; more lower the variance and raise the bias.
        metric: "euclidean" or "chebyshev", within x and within y.
        gaussianize: Replace each feature by its normal scores first, which changes no information.

    Returns:
        The interval covers the statistical error only, from 4 disjoint parts of the samples: resampling
        with replacement would add duplicates and about 0.27 nats. Status "degenerate" for more than 1 %
        repeated rows (without a value if one side is constant), "undersampled" below 1000 samples,
        "saturated" near log N or where the value grows with log N as for y = f(x), "biased" for more than
        8 dimensions.

    Raises:
        BadSamples: As in `as_pair`, an unknown metric, or k outside 1 to n - 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal(5000)
        >>> ksg(x, 0.6 * x + 0.8 * rng.standard_normal(5000)).status  # true: -1/2 log(1 - 0.36) = 0.223
        'ok'
    """
    x, y = as_pair(x, y)
    n, name = len(x), f"ksg1, k={k}, {metric}{', normal scores' if gaussianize else ''}"
    if metric not in METRICS:
        raise BadSamples(f"expected a metric of {', '.join(METRICS)}, found '{metric}'.")
    _check_k(k, n)
    if gaussianize:
        x, y = _normal_scores(x), _normal_scores(y)
    for side, array in (("x", x), ("y", y)):
        if (array == array[0]).all():
            return Estimate(None, "degenerate", name, n, notes=(f"'{side}' is constant.",))
    terms = _ksg_terms(x, y, k, metric)
    parts = [_ksg_terms(x[part], y[part], k, metric).mean() for part in _split(n, k)]
    ties = max(share_of_duplicates(x), share_of_duplicates(y))
    return _judged(terms, parts, name, dims=x.shape[1] + y.shape[1], ties=ties)


def ross(x, labels, *, k: int = 5) -> Estimate:
    """I(X; Y) of a continuous variable and a label, in nats (Ross 2014, PLoS ONE 9(2), eq. 2).

    psi(N) + mean psi(k) - mean psi(N_c) - mean psi(m): the radius is the distance to the k-th neighbour
    within the class of N_c samples, m counts the samples of all classes strictly within it, the sample itself
    included. Classes of k samples or fewer use what they have; samples alone in their class are left out.

    Args:
        x: Samples, (n, d) or (n,).
        labels: Integers or strings, (n,).
        k: Neighbours.

    Returns:
        As for `ksg`; the dimensions are those of x.

    Raises:
        BadSamples: As in `as_samples` and `as_labels`, unlike lengths, or k outside 1 to n - 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 5000)
        >>> ross(1.5 * labels + rng.standard_normal(5000), labels).status  # true: 0.447
        'ok'
    """
    x, classes = as_samples(x), as_labels(labels)
    n, name = len(x), f"ross, k={k}"
    if len(classes) != n:
        raise BadSamples(f"expected as many labels as rows in 'x' ({n}), found {len(classes)}.")
    _check_k(k, n)
    counts = np.bincount(classes)
    if (x == x[0]).all() or len(counts) == 1 or counts.max() == 1:
        side = "'x' is constant" if (x == x[0]).all() else "the labels are all the same or all different"
        return Estimate(None, "degenerate", name, n, notes=(f"Not to be estimated: {side}.",))
    usable = counts[classes] > 1
    terms = _ross_terms(x, classes, k)
    of_parts = [_ross_terms(x[part], classes[part], k) for part in _split(n, k)]
    parts = [part.mean() for part in of_parts] if all(map(len, of_parts)) else []
    own_notes = []
    if not usable.all():
        own_notes.append(f"{(~usable).sum()} samples alone in their class were left out.")
    if counts.min() < 50:
        own_notes.append(f"The smallest of {len(counts)} classes has {counts.min()} samples.")
    return _judged(terms, parts, name, dims=x.shape[1], ties=share_of_duplicates(x), notes=own_notes)


def kl_entropy(x, *, k: int = 5) -> float:
    """Differential entropy, d mean log eps + log V_d + psi(N) - psi(k), in nats (Kozachenko & Leonenko 1987).

    eps is the Euclidean distance to the k-th neighbour and V_d the volume of the unit ball. It depends on
    the units of x: meant for checks, not for reports.

    Args:
        x: Samples, (n, d) or (n,).

    Raises:
        BadSamples: As in `as_samples`, k outside 1 to n - 1, or more than k samples at one point.

    Example:
        >>> x = np.random.default_rng(0).standard_normal(5000)
        >>> round(kl_entropy(x), 1)  # true: 1/2 log(2 pi e) = 1.419
        1.4
    """
    x = as_samples(x)
    n, d = x.shape
    _check_k(k, n)
    if d <= DIMS_MOST:
        radius = cKDTree(x).query(x, k + 1)[0][:, -1]
    else:
        points = _centred(x)
        radius = np.concatenate([_kth(_distances(points, rows), k).numpy() for rows in _blocks(n, n)])
    if (radius == 0).any():
        raise BadSamples(f"expected no more than {k} equal samples, found some: their entropy is minus infinity.")
    log_ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    return float(d * np.log(radius).mean() + log_ball + psi(n) - psi(k))


def gaussianize(x) -> np.ndarray:
    """Normal scores: each feature becomes the standard normal quantile of rank / (n + 1), (n, d).

    A strictly increasing map of each feature changes no information. Equal values share their mean rank.

    Raises:
        BadSamples: As in `as_samples`.

    Example:
        >>> float(gaussianize(np.arange(11.0) ** 3)[5, 0])
        0.0
    """
    return _normal_scores(as_samples(x))


def _normal_scores(x: np.ndarray) -> np.ndarray:
    return ndtri(rankdata(x, method="average", axis=0) / (len(x) + 1))


def _judged(
    terms: np.ndarray, parts: list[float], name: str, *, dims: int, ties: float, notes: list[str] | None = None
) -> Estimate:
    """An estimate with its interval, and every reason not to trust it; the gravest names the status."""
    n, value = len(terms), float(terms.mean())
    found = []  # gravest first
    if ties > TIES_MOST:
        found.append(("degenerate", f"{ties:.1%} of the rows repeat others, which inflates the value."))
    if n < SAMPLES_SAFE:
        found.append(("undersampled", f"{n} samples, fewer than {SAMPLES_SAFE}."))
    if value >= SATURATION * np.log(n):
        found.append(("saturated", f"Above {SATURATION} log N: the true value may be anything larger."))
    elif parts and value - np.mean(parts) > 0.5 * np.log(PARTS):
        found.append(("saturated", "Grows with log N, as it does where one side is a function of the other."))
    if dims > DIMS_MOST:
        found.append(("biased", f"{dims} dimensions, more than {DIMS_MOST}: too low by an unknown amount."))
    elif dims > DIMS_SAFE:
        found.append(("ok", f"{dims} dimensions, more than {DIMS_SAFE}: likely too low."))
    ci95 = None
    if parts:  # their standard error has 3 degrees of freedom: a normal interval would be too short
        half = float(t.ppf(0.975, PARTS - 1) * np.std(parts, ddof=1) / np.sqrt(PARTS))
        ci95 = (value - half, value + half)
    return Estimate(
        value,
        found[0][0] if found else "ok",
        name,
        n,
        ci95=ci95,
        notes=tuple(note for _, note in found) + tuple(notes or ()),
        terms=terms,
    )


def _split(n: int, k: int) -> list[np.ndarray]:
    """Disjoint random parts, the same ones for the same n; none where they would be too small."""
    if n < PARTS * max(10 * k, 50):
        return []
    order = np.random.default_rng(0).permutation(n)
    return [np.sort(order[i::PARTS]) for i in range(PARTS)]


def _ksg_terms(x: np.ndarray, y: np.ndarray, k: int, metric: str) -> np.ndarray:
    dims = x.shape[1] + y.shape[1]
    counts = _counts_by_tree if dims <= 6 else _counts_by_blocks  # trees lose their speed beyond
    n_x, n_y = counts(x, y, k, metric)
    return psi(k) + psi(len(x)) - psi(n_x + 1) - psi(n_y + 1)


def _counts_by_tree(x: np.ndarray, y: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    if metric == "chebyshev" or x.shape[1] == y.shape[1] == 1:
        p, radius = np.inf, cKDTree(np.hstack([x, y])).query(np.hstack([x, y]), k + 1, p=np.inf)[0][:, -1]
    else:
        p, radius = 2.0, _max_of_euclidean_radius(x, y, k)
    counts = []
    for side in (x, y):
        closer = cKDTree(side).query_ball_point(side, _just_below(radius), p=p, return_length=True) - 1
        counts.append(np.where(radius > 0, closer, 0))
    return counts[0], counts[1]


def _max_of_euclidean_radius(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """Distance to the k-th neighbour under max(|dx|, |dy|), which no tree offers.

    Samples beyond the m-th neighbour in the joint Euclidean distance are at least that over sqrt 2 away.
    """
    both = np.hstack([x, y])
    n, split = len(x), x.shape[1]
    tree, radius = cKDTree(both), np.empty(n)
    open_rows, m = np.arange(n), 4 * k
    while len(open_rows):
        m = min(2 * m, n - 1)
        unsure = []
        for rows in np.array_split(open_rows, -(-len(open_rows) * m * both.shape[1] // _BLOCK)):
            euclidean, neighbours = tree.query(both[rows], m + 1)
            gap = both[neighbours] - both[rows][:, None]
            distance = np.maximum(np.linalg.norm(gap[..., :split], axis=-1), np.linalg.norm(gap[..., split:], axis=-1))
            radius[rows] = np.partition(distance, k, axis=1)[:, k]  # the sample itself is among them, at 0
            if m < n - 1:
                unsure.append(rows[radius[rows] * np.sqrt(2) > euclidean[:, -1] * (1 - 1e-12)])
        open_rows = np.concatenate(unsure) if unsure else np.empty(0, dtype=int)
    return radius


def _counts_by_blocks(x: np.ndarray, y: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    points = _centred(x), _centred(y)
    counts = np.empty((2, len(x)), dtype=np.int64)
    for rows in _blocks(len(x), len(x)):
        of_x, of_y = (_distances(side, rows, metric) for side in points)
        radius = _kth(torch.maximum(of_x, of_y), k)[:, None]
        for i, distances in enumerate((of_x, of_y)):
            counts[i, rows] = np.count_nonzero((distances < radius).numpy(), axis=1)
    return counts[0], counts[1]


def _ross_terms(x: np.ndarray, classes: np.ndarray, k: int) -> np.ndarray:
    counts = np.bincount(classes)
    x, classes = x[counts[classes] > 1], classes[counts[classes] > 1]
    if len(x) == 0:  # no two samples share a class
        return np.empty(0)
    by_tree = x.shape[1] <= DIMS_MOST
    tree, points = (cKDTree(x) if by_tree else None), _centred(x)
    terms = np.empty(len(x))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        near = min(k, len(members) - 1)
        if by_tree:
            radius = cKDTree(x[members]).query(x[members], near + 1)[0][:, -1]
            within = tree.query_ball_point(x[members], _just_below(radius), return_length=True)
        else:
            within = np.empty(len(members))
            for rows in _blocks(len(members), len(x)):
                distances = _distances(points, members[rows])
                radius = _just_below(_kth(distances[:, members], near))
                within[rows] = 1 + np.count_nonzero((distances <= radius[:, None]).numpy(), axis=1)
        terms[members] = psi(len(x)) + psi(near) - psi(len(members)) - psi(within)
    return terms


def _distances(points: torch.Tensor, rows: np.ndarray, metric: str = "euclidean") -> torch.Tensor:
    """From some rows to all, infinite to themselves, (len(rows), n)."""
    if metric == "chebyshev":
        distances = torch.cdist(points[rows], points, p=torch.inf)
    else:  # the matrix product is faster for many dimensions, but loses distances below 1e-7 of the norms
        product = "use_mm_for_euclid_dist" if points.shape[1] > 16 else "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(points[rows], points, compute_mode=product)
    distances[np.arange(len(rows)), rows] = torch.inf
    return distances


def _kth(distances: torch.Tensor, k: int) -> torch.Tensor:
    return distances.topk(k, dim=1, largest=False).values[:, -1]


def _just_below(radius: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """A radius that leaves the k-th neighbour out of a closed ball, however distances are rounded; 0 stays 0."""
    return radius * (1 - 1e-12)


def _centred(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x - x.mean(axis=0))


def _blocks(n_rows: int, n_columns: int) -> Iterator[np.ndarray]:
    step = max(1, _BLOCK // n_columns)
    return (np.arange(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _check_k(k: int, n: int) -> None:
    if not 1 <= k < n:
        raise BadSamples(f"expected k from 1 to {n - 1}, found {k}.")
