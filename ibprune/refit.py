"""Least squares on calibration data that makes up for cut units in the layers that read them, before any training."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ibprune.budget import Keep
from ibprune.console import Quiet
from ibprune.groups import Site
from ibprune.losses import Batch
from ibprune.masks import MaskSet
from ibprune.taps import Tap, gone, input_rows, readers, row_features, set_weight_rows_, watch, weight_rows

RIDGE = 1e-2  # of the mean square of the features that stay
MOST_ROWS = 65_536  # tokens or output pixels that a layer is fitted to
LARGEST = 10.0  # Kwon et al. take no multiplier beyond it


@dataclass(frozen=True)
class _Reader:
    """A layer that reads features of which some go.

    Attributes:
        taps: Of the sites that share its input.
        gram: Sum of x x^T over the rows x that it reads, float64, (features, features).
        total: Sum of x, (features,); `count` is the number of rows.
        lost: Which features go, bool.
    """

    module: nn.Module
    taps: list[Tap]
    gram: torch.Tensor
    total: torch.Tensor
    count: int
    lost: torch.Tensor


def reconstruct_(
    model: nn.Module,
    masks: MaskSet,
    sites: dict[str, Site],
    keep: Keep,
    batches: list[Batch],
    *,
    console: Quiet,
    ridge: float = RIDGE,
) -> None:
    """Refits the weights by which layers read the units that stay, in place; the masks are cut to `keep`.

    What the masks of these units have learned to scale makes way for it: weights fitted here can say the same.

    For each layer that reads cut units of heads, FFNs, channels or inputs, in the order in which they run and on what
    the model cut so far makes them read (as SparseGPT, arXiv 2301.00774, and OSSCAR, arXiv 2403.12983, do):

        W'_S = argmin ||X W - X_S W'_S||^2 + lambda ||W'_S - W_S||^2 = W_S + (G_SS + lambda I)^-1 G_SC W_C

    S stays, C goes, G = X^T X; lambda is `ridge` times the mean of the diagonal of G_SS. A layer with a bias gets an
    intercept too: then G is centred, and the bias takes in what the means leave. Convolutions are linear in their
    patches. Residual widths, sub-layers, embedding directions and experts are left as they are.
    """

    def fit(reader: _Reader) -> None:
        weight, lost = weight_rows(reader.module).double().cpu(), reader.lost
        gram, mean = reader.gram, reader.total / reader.count
        bias = reader.module.bias
        if bias is not None:
            gram = gram - reader.count * torch.outer(mean, mean)
        change = _ridge(gram[~lost][:, ~lost], gram[~lost][:, lost] @ weight[lost], ridge)
        if bias is not None:
            with torch.no_grad():
                bias += (mean[lost] @ weight[lost] - mean[~lost] @ change).to(bias)
        weight[~lost] += change
        with torch.no_grad():
            for tap in reader.taps:
                masks[tap.site.name].mu.fill_(1.0)
        set_weight_rows_(reader.module, weight)

    _in_order(model, masks, sites, keep, batches, fit, console)


def rescale_(
    model: nn.Module,
    masks: MaskSet,
    sites: dict[str, Site],
    keep: Keep,
    batches: list[Batch],
    *,
    console: Quiet,
    ridge: float = RIDGE,
) -> None:
    """Gives every unit that stays the multiplier that makes up best for those that go, in its mask's mean.

    Kwon et al. 2022 (arXiv 2204.09656, sec. 4.3): least squares per layer over the multipliers m of its units,

        m_S = argmin ||sum_all c_j - sum_S m_j c_j||^2 + lambda ||m - 1||^2,   c_j = what unit j adds to the output

    from the Gram matrix of the c_j, which is that of the inputs times that of the weights, summed over units. Layers go
    in the order in which they run. Two differences from the paper: it aims at the dense model's residual stream, here
    each layer aims at its own output on the input that it gets; its damping is absolute (LSMR, 1), here it is relative.
    As there, a layer whose multipliers leave [-10, 10] is left alone; so is a site with several readers.
    """

    def fit(reader: _Reader) -> None:
        if len(reader.taps) > 1 or len(readers(model, reader.taps[0].site)) > 1:
            return
        (tap,) = reader.taps
        site, weight = tap.site, weight_rows(reader.module).double().cpu()
        own = row_features(model, tap, torch.ones(site.n_units, dtype=torch.bool))
        added = (reader.gram * (weight @ weight.T))[own][:, own]
        width = len(added) // site.n_units
        added = added.view(site.n_units, width, site.n_units, width).sum((1, 3))
        lost = gone(site, keep)
        factors = 1 + _ridge(added[~lost][:, ~lost], added[~lost][:, lost].sum(1, keepdim=True), ridge).squeeze(1)
        if factors.abs().max() <= LARGEST:
            mask = masks[site.name]
            with torch.no_grad():
                mask.mu[(~lost).to(mask.mu.device)] = factors.to(mask.mu)

    _in_order(model, masks, sites, keep, batches, fit, console)


def _ridge(gram: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    """(gram + ridge mean(diag) I)^-1 target; zeros where nothing was ever seen."""
    scale = gram.diagonal().mean()
    if not scale > 0:
        return torch.zeros_like(target)
    return torch.linalg.solve(gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype), target)


def _in_order(
    model: nn.Module,
    masks: MaskSet,
    sites: dict[str, Site],
    keep: Keep,
    batches: list[Batch],
    fit: Callable[[_Reader], None],
    console: Quiet,
) -> None:
    """Calls `fit` for each layer that reads cut units, in the order in which they run first."""
    masks.set_keep(keep)
    by_path: dict[str, list[Tap]] = {}
    for name, site in sites.items():
        if 0 < len(keep[name]) < site.n_units:
            for tap in readers(model, site):
                by_path.setdefault(tap.path, []).append(tap)
    calls: Counter[str] = Counter()
    first = [taps[0] for taps in by_path.values()]
    watch(model, batches[:1], first, lambda tap, x, batch: calls.update([tap.path]))
    for path in console.track(calls, "refitting layers", len(calls)):
        fit(_read(model, by_path[path], keep, batches, calls[path]))


def _read(model: nn.Module, taps: list[Tap], keep: Keep, batches: list[Batch], calls: int) -> _Reader:
    """Runs the batches until one layer has read its inputs, `calls` times each."""
    module, most = model.get_submodule(taps[0].path), max(1, MOST_ROWS // len(batches))
    generator = torch.Generator().manual_seed(0)
    sums: list = [0, 0, 0]

    def see(tap: Tap, x: torch.Tensor, batch: Batch) -> None:
        rows = input_rows(module, x, batch).double()
        if len(rows) > most:
            rows = rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]
        for i, value in enumerate(((rows.T @ rows).cpu(), rows.sum(0).cpu(), len(rows))):
            sums[i] += value

    watch(model, batches, taps[:1], see, calls=calls)
    lost = torch.stack([row_features(model, tap, gone(tap.site, keep)) for tap in taps]).any(0)
    return _Reader(module, taps, *sums, lost)
