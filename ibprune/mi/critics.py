"""Lower bounds on information from trained critics, always evaluated on samples the critic has not seen; nats.

`infonce` is the one to use for two continuous variables with no known channel between them. `mine`, `nwj` and
`smile` differ only in the objective and are there for comparison: they blow up where InfoNCE saturates.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import softplus

from ibprune.mi.density_ratio import Critic, Pairs, as_tensor, gaussian_parts, network_inputs
from ibprune.mi.neighbours import gaussianize
from ibprune.mi.samples import BadSamples, Estimate, as_pair, copies, mean_with_interval

LEAST = 100  # samples below which there is nothing left to evaluate on
SAMPLES_SAFE = 1000
SATURATION = 0.7  # of the ceiling
MOST_NEGATIVES = 4096  # per sample; the matrix of all pairs then takes 64 MiB
MOST_CHOSEN_ON = 1000  # samples that choose when to stop
CHECK_EVERY = 50
PATIENCE = 5  # checks without a better value


@dataclass(frozen=True)
class Training:
    """How a critic is trained.

    Attributes:
        folds: Parts of the samples; each is evaluated by a critic trained on the others.
        steps: At most, per fold.
        batch: Pairs per step; each is contrasted with all others of the batch.
        width: Units of each of the two hidden layers.
        rank: Length of the vectors whose product is the learned part of the critic.
        lr: Largest learning rate of Adam, reached after 50 steps and lowered to 0 along a cosine.
        held_out: Share of the training samples that only choose when to stop.
    """

    folds: int = 3
    steps: int = 600
    batch: int = 256
    width: int = 64
    rank: int = 32
    lr: float = 5e-3
    held_out: float = 0.15


@dataclass(frozen=True)
class _Bound:
    """A bound as functions of the critic's values of all pairs, (n, n), own pairs on the diagonal."""

    name: str
    objective: Callable[[torch.Tensor], torch.Tensor]  # to raise; a scalar
    terms: Callable[[torch.Tensor], torch.Tensor]  # (n,), the value is their mean, their spread its error
    ceiling: bool = False  # cannot exceed ln n
    notes: tuple[str, ...] = ()


def infonce(x, y, *, training: Training | None = None, seed: int = 0) -> Estimate:
    """I(x;y) from below by InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), Gaussian plus learned critic.

    mean_i [T_ii - 1/2 ln mean_j exp T_ij - 1/2 ln mean_j exp T_ji], the mean of the bound of Poole et al. (2019,
    arXiv 1905.06922, eq. 10) in both directions. Each feature is replaced by its normal scores, which changes no
    information. T is the log-density ratio of the Gaussian with the canonical correlations of the training
    samples, corrected for their number, times a learned scale, plus f(x)^T g(y) + a(x) + b(y) of two small
    networks that start at 0 and also see the distance of a sample from the centre.

    Args:
        x: Samples, (n, d_x).
        y: Samples, (n, d_y), row i belonging to row i of x.
        training: None for the defaults, which take about 1800 steps for n = 10,000.
        seed: Of folds, networks and batches; the same seed gives the same value.

    Returns:
        At most ln of the samples contrasted with (a third of n, at most 4096), "saturated" from 0.7 of it on,
        "undersampled" below 1000 samples, "degenerate" without a value where one side is constant. Negative
        where the critic learned nothing that holds on new samples; the interval is that of the bound, not of I.

    Raises:
        BadSamples: As in `as_pair`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal(5000)
        >>> infonce(x, 0.6 * x + 0.8 * rng.standard_normal(5000)).value  # true: 0.223
    """
    return _estimate(x, y, _Bound("infonce", _infonce, _infonce_terms, ceiling=True), training, seed)


def mine(x, y, *, training: Training | None = None, seed: int = 0) -> Estimate:
    """I(x;y) from below by mean T_ii - ln mean_(i != j) exp T_ij (MINE, Belghazi et al. 2018, arXiv 1801.04062).

    The critic and its arguments are those of `infonce`; batches contrast all pairs, so the moving average of
    the paper's gradient is not needed. The variance of the second term grows with exp(I) (Song & Ermon 2020).

    Returns:
        As `infonce`, but with no ceiling below I: "saturated" here says that the largest values of exp T,
        on which the second term rests, are not in the sample.

    Raises:
        BadSamples: As in `as_pair`.

    Example:
        >>> mine(x, y, seed=1).value
    """
    return _estimate(x, y, _Bound("mine (Donsker-Varadhan)", _dv, _dv_terms), training, seed)


def nwj(x, y, *, training: Training | None = None, seed: int = 0) -> Estimate:
    """I(x;y) from below by 1 + mean T_ii - mean_(i != j) exp T_ij (Nguyen, Wainwright & Jordan 2010, arXiv 0809.0853).

    Written for the critic less 1, so that the best T is the log-density ratio as in the others. The critic and
    its arguments are those of `infonce`.

    Returns:
        As in `mine`. The least stable of the four: exp T enters without a logarithm.

    Raises:
        BadSamples: As in `as_pair`.

    Example:
        >>> nwj(x, y).ci95
    """
    return _estimate(x, y, _Bound("nwj", _nwj, _nwj_terms), training, seed)


def smile(x, y, *, tau: float = 5.0, training: Training | None = None, seed: int = 0) -> Estimate:
    """mean T_ii - ln mean_(i != j) exp(clip(T_ij, -tau, tau)) (SMILE, Song & Ermon 2020, arXiv 1910.06222, section 5).

    The critic is that of `infonce`, trained on the Jensen-Shannon objective as the authors do. Clipping lowers
    the variance and gives up the bound: above tau nats the value is too high without limit.

    Args:
        x: Samples, (n, d_x).
        y: Samples, (n, d_y).
        tau: Largest and smallest log-density ratio that the second term may see, above 0.
        training: As in `infonce`.
        seed: As in `infonce`.

    Raises:
        BadSamples: As in `as_pair`.
        ValueError: tau is not above 0.

    Example:
        >>> smile(x, y, tau=5.0).notes
        ('not a bound: clipping can raise it above the information',)
    """
    if not tau > 0:
        raise ValueError(f"expected tau above 0, found {tau}.")
    notes = ("not a bound: clipping can raise it above the information",)
    bound = _Bound(f"smile, tau={tau:g}", _jensen_shannon, lambda t: _dv_terms(t, t.clamp(-tau, tau)), notes=notes)
    return _estimate(x, y, bound, training, seed)


def _estimate(x, y, bound: _Bound, training: Training | None, seed: int) -> Estimate:
    x, y = as_pair(x, y)
    training = training or Training()
    if training.folds < 2:
        raise BadSamples(f"expected at least 2 folds, found {training.folds}: a value on training samples is no bound.")
    n = len(x)
    for side, samples in (("x", x), ("y", y)):
        if (samples == samples[0]).all():
            return Estimate(None, "degenerate", bound.name, n, notes=(f"'{side}' is constant.",))
    if n < LEAST:
        return Estimate(None, "undersampled", bound.name, n, notes=(f"{n} samples, fewer than {LEAST}.",))
    terms = np.empty(n)
    negatives = n
    rng = np.random.default_rng(seed)
    folds = np.array_split(rng.permutation(n), training.folds)
    scores = gaussianize(x), gaussianize(y)
    inputs = [as_tensor(network_inputs(raw, score)) for raw, score in zip((x, y), scores)]
    for i, fold in enumerate(folds):
        others = np.concatenate([other for j, other in enumerate(folds) if j != i])
        chosen_on = min(int(training.held_out * len(others)), MOST_CHOSEN_ON)
        gaussian = gaussian_parts(*scores, others[chosen_on:])
        data = Pairs(*inputs, *(as_tensor(part) for part in gaussian))
        critic = _train(data, others[chosen_on:], others[:chosen_on], bound, training, seed + i)
        # Each part is contrasted only with samples that no critic has seen either.
        for part in np.array_split(fold, math.ceil(len(fold) / MOST_NEGATIVES)):
            with torch.no_grad():
                terms[part] = bound.terms(critic(data.take(part)).double()).numpy()
            negatives = min(negatives, len(part))
    return _judged(terms, bound, negatives, copies(x, y))


def _judged(terms: np.ndarray, bound: _Bound, negatives: int, copied: str) -> Estimate:
    n = len(terms)
    if not np.isfinite(terms).all():
        return Estimate(None, "inconsistent", bound.name, n, notes=(*bound.notes, "the critic diverged"))
    # A critic that learned nothing is constant: what is left is rounding, and may not look like information.
    terms = np.where(np.abs(terms) < 1e-12, 0.0, terms)
    value, ci95 = mean_with_interval(terms)
    ceiling = math.log(negatives)
    notes = list(bound.notes)
    if bound.ceiling:
        notes.append(f"cannot exceed ln {negatives} = {ceiling:.2f} nats")
    status = "ok"
    if n < SAMPLES_SAFE:
        status = "undersampled"
        notes.append(f"{n} samples, fewer than {SAMPLES_SAFE}.")
    if value > SATURATION * ceiling:
        status = "saturated"
        notes.append(f"above {SATURATION} of ln {negatives}: the true value may be anything larger")
    if copied:
        status = "degenerate"
        notes.append(copied)
    return Estimate(value, status, bound.name, n, ci95=ci95, notes=tuple(notes), terms=terms)


def _train(
    data: Pairs, rows: np.ndarray, chosen_on: np.ndarray, bound: _Bound, training: Training, seed: int
) -> Critic:
    """The critic, an average over steps, at the check with the best objective on `chosen_on`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(data.x.shape[1], data.y.shape[1], training.width, training.rank)
        batches = _batches(rows, training.batch, torch.Generator().manual_seed(seed))
    average = copy.deepcopy(critic).requires_grad_(False)
    best, best_value, waited = copy.deepcopy(average), -math.inf, 0
    optimizer = torch.optim.AdamW(critic.parameters(), lr=training.lr, weight_decay=0.01, fused=True)
    held_out = data.take(chosen_on)
    for step in range(training.steps + 1):
        if step % CHECK_EVERY == 0 or step == training.steps:
            with torch.no_grad():
                value = float(bound.objective(average(held_out)))
            if value > best_value:
                best, best_value, waited = copy.deepcopy(average), value, 0
            else:
                waited += 1
            if waited == PATIENCE or step == training.steps:
                break
        for group in optimizer.param_groups:
            group["lr"] = training.lr * min(1.0, (step + 1) / 50) * _cosine(step / training.steps)
        loss = -bound.objective(critic(data.take(next(batches))))
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(critic.parameters()), max(0.02, 1 / (step + 2)))
    return best


def _batches(rows: np.ndarray, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches, each row once per pass."""
    rows, size = torch.as_tensor(rows), min(size, len(rows))
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _infonce(t: torch.Tensor) -> torch.Tensor:
    # One exponential for rows and columns; the shift by one maximum is safe as T of own pairs is near it.
    top = t.detach().max()
    ratios = (t - top).exp() + 1e-30
    partition = ratios.sum(0).log().mean() + ratios.sum(1).log().mean()
    return t.diagonal().mean() - 0.5 * partition - top + math.log(len(t))


def _infonce_terms(t: torch.Tensor) -> torch.Tensor:
    n, rows, columns = len(t), t.logsumexp(1), t.logsumexp(0)
    values = t.diagonal() - 0.5 * (rows + columns) + math.log(n)
    # A sample also enters as a negative of the others; these weights average to 0 and only correct the spread.
    as_negative = (t - rows[:, None]).exp().sum(0) + (t - columns).exp().sum(1)
    return values - 0.5 * as_negative + 1.0


def _partition(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ln of the mean over i != j of exp T_ij, and row plus column means as shares of it, (n,), averaging to 2."""
    n = len(t)
    off = t.masked_fill(torch.eye(n, dtype=torch.bool), -math.inf)
    log_mean = off.logsumexp((0, 1)) - math.log(n * (n - 1))
    shares = (off - log_mean).exp()
    return log_mean, (shares.sum(0) + shares.sum(1)) / (n - 1)


def _dv(t: torch.Tensor) -> torch.Tensor:
    return t.diagonal().mean() - _partition(t)[0]


def _dv_terms(t: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    log_mean, shares = _partition(t if seen is None else seen)
    return t.diagonal() - log_mean - (shares - 2)


def _nwj(t: torch.Tensor) -> torch.Tensor:
    return 1 + t.diagonal().mean() - _partition(t)[0].exp()


def _nwj_terms(t: torch.Tensor) -> torch.Tensor:
    log_mean, shares = _partition(t)
    return 1 + t.diagonal() - log_mean.exp() * (shares - 1)


def _jensen_shannon(t: torch.Tensor) -> torch.Tensor:
    n = len(t)
    own = t.diagonal()
    return -softplus(-own).mean() - (softplus(t).sum() - softplus(own).sum()) / (n * (n - 1))
