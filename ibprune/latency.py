"""What a forward pass takes on the present device, as a formula of how many units each site keeps: measured."""

import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.stats import qmc
from torch import nn

from ibprune.budget import allowed_width
from ibprune.console import Quiet
from ibprune.costs import CostModel, Owners, Product, Term, dimension_owners, parameter_products
from ibprune.errors import BadRecipe, first_line
from ibprune.groups import Site
from ibprune.json_files import read_json
from ibprune.losses import Batch, forward
from ibprune.timing import now

FORMAT = "ibprune.latency/1"
LATENCY = "latency.json"  # in a folder
PLANS = 16  # compacted models that are timed to fit the formula
HELD_OUT = 4  # further ones, on which it is judged
ROUNDS = 5  # runs of each, beside as many of the dense model
FEMTOSECONDS = 1e15  # of a second: a cost is a whole number
LARGEST = 1e300  # of any figure in a file
MOST = 86_400 * FEMTOSECONDS  # a day
NARROWEST = 0.1  # share of the units that a timed model keeps of a site at the least


@dataclass(frozen=True)
class LatencyTable:
    """A measured latency: of `CostModel` terms in femtoseconds, and what they hold for.

    Attributes:
        device: Its name, and the threads of a CPU.
        shape: Sizes of the input by its name.
        model: The cost model.
        dense_ms: Median of the dense model.
        error: Median relative error of what the formula says of compacted models that it was not fitted to.
        plans: Units kept and milliseconds of every model that was timed.
    """

    device: str
    shape: dict[str, list[int]]
    model: CostModel
    dense_ms: float
    error: float
    plans: tuple[dict, ...]

    def to_dict(self) -> dict:
        """The table as JSON takes it."""
        terms = [[term.coefficient, *term.sites] for term in self.model.terms]
        data = asdict(self)
        return {"format": FORMAT} | data | {"model": {"n_units": self.model.n_units, "terms": terms}}

    @classmethod
    def from_dict(cls, data: dict) -> "LatencyTable":
        """Reads what `to_dict` made.

        Raises:
            ValueError, TypeError, KeyError: It is none.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"expected format '{FORMAT}'")
        n_units = data["model"]["n_units"]
        if not isinstance(n_units, dict):
            raise ValueError(f"expected the units of each site, found {n_units!r}")
        terms = tuple(
            Term(int(_number(first)), tuple(map(str, sites)), False) for first, *sites in data["model"]["terms"]
        )
        if not all(0 <= term.coefficient < MOST for term in terms):
            raise ValueError("expected times of at least 0, and below a day")
        for site in (site for term in terms for site in term.sites if site not in n_units):
            raise ValueError(f"it has no site '{site}'")
        for value in (data["dense_ms"], data["error"], *n_units.values()):
            _number(value)
        rest = {key: value for key, value in data.items() if key != "format"}
        return cls(**rest | {"model": CostModel("latency", terms, n_units), "plans": tuple(data["plans"])})

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def _number(value: object) -> float:
    """A finite figure; JSON may hold one as text.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise ValueError(f"expected a finite number, found {value!r}")
    return value


Clock = Callable[[nn.Module, Batch], tuple[float, dict[str, float]]]


def measure_latency(
    dense: nn.Module,
    everything: dict[str, Site],
    sites: dict[str, Site],
    compacted: Callable[[dict[str, int]], nn.Module],
    inputs: Batch,
    *,
    round_to: int,
    seed: int,
    console: Quiet,
    clock: Clock | None = None,
) -> LatencyTable:
    """Times the dense model and random compactions of it, and fits what each module takes to the units it keeps.

    A module's own time, without that of the modules it calls, is taken as a sum of a constant, of what its input and
    output features take, and of what their product takes, each at least 0, so that cutting never seems to cost time.
    The runs of compacted models alternate with runs of the dense one, and count relative to them: a busy machine slows
    both alike. A last fit makes up for what timing every module adds.

    Args:
        everything: All sites of `dense`.
        sites: Those to cut. Sub-layers stay in the timed models.
        compacted: Makes a smaller copy of `dense` that keeps so many units of each of `sites`.
        inputs: What both read.
        round_to: Of the budget (`ibprune.budget.Budget`): the widths that it allows are timed.
        clock: Seconds of one forward pass, and each module's own ones by path.
    """
    clock = clock or time_modules
    plans = _random_plans(sites, seed, round_to)
    device = next(dense.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    timed = []
    for kept in console.track(plans, "timing widths", len(plans)):
        timed.append(_time(dense, compacted(kept).eval(), inputs, clock))
    n_units = {name: site.n_units for name, site in everything.items()}
    kepts = [n_units | kept for kept in plans]
    base = float(np.median([dense_s for dense_s, _, _ in timed]))
    whole = np.array([base * small_s / dense_s for dense_s, small_s, _ in timed])
    own = [{path: base * s / dense_s for path, s in parts.items()} for dense_s, _, parts in timed]
    terms = _fit_modules(dense, everything, kepts[:-HELD_OUT], own[:-HELD_OUT])
    model = _scaled(terms, n_units, kepts[:-HELD_OUT], whole[:-HELD_OUT])
    said = np.array([model(kept) / FEMTOSECONDS for kept in kepts])
    error = float(np.median(np.abs(said / whole - 1)[-HELD_OUT:]))
    return LatencyTable(
        device_name(device),
        _sizes(inputs),
        model,
        round(1000 * base, 4),
        round(error, 4),
        tuple({"kept": kept, "ms": round(1000 * float(s), 4)} for kept, s in zip(kepts, whole)),
    )


def read_latency(path: str | Path, everything: dict[str, Site], *, without: tuple[str, ...] = ()) -> LatencyTable:
    """Reads a table, of whatever device and inputs.

    Args:
        without: Kinds of sites that it need not know.

    Raises:
        BadRecipe: No table, or one of another model.
    """
    try:
        table = LatencyTable.from_dict(read_json(path))
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadRecipe(f"--latency-table: could not read '{path}': {first_line(error)}.") from error
    known = table.model.n_units
    n_units = {name: site.n_units for name, site in everything.items() if name in known or site.kind not in without}
    if known != n_units:
        raise BadRecipe(f"--latency-table: '{path}' was measured on another model: leave it out, and it is measured.")
    return table


def load_latency(path: str | Path, everything: dict[str, Site], device: torch.device, inputs: Batch) -> LatencyTable:
    """Reads a table for a run.

    Raises:
        BadRecipe: No table, or one of another model or device, or of inputs of other sizes.
    """
    table = read_latency(path, everything)
    if table.device != device_name(device):
        raise BadRecipe(
            f"--latency-table: '{path}' was measured on '{table.device}', this is '{device_name(device)}': leave it "
            "out, and it is measured."
        )
    if table.shape != _sizes(inputs):
        raise BadRecipe(
            f"--latency-table: '{path}' was measured on inputs of {table.shape}, this run times "
            f"{_sizes(inputs)}: give the same --batch-size and --max-length or --image-size, or leave it "
            "out, and it is measured."
        )
    return table


def _sizes(inputs: Batch) -> dict[str, list[int]]:
    """Sizes of inputs by name."""
    return {name: list(value.shape) for name, value in inputs.items()}


def device_name(device: torch.device) -> str:
    """The device as a table names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def time_modules(model: nn.Module, inputs: Batch) -> tuple[float, dict[str, float]]:
    """Seconds of one forward pass, and of every module with parameters without the modules it calls.

    Modules without parameters, such as activations, count for the one that calls them.
    """
    device = next(model.parameters()).device
    own: dict[str, float] = {}
    open_: list[list[float]] = []  # [started, spent in modules it called]

    def enter(module: nn.Module, args: tuple) -> None:
        open_.append([now(device), 0.0])

    def leave_to(path: str):
        def leave(module: nn.Module, args: tuple, output: object) -> None:
            started, inside = open_.pop()
            spent = now(device) - started
            own[path] = own.get(path, 0.0) + spent - inside
            if open_:
                open_[-1][1] += spent

        return leave

    handles = []
    for path, module in model.named_modules():
        if next(module.parameters(), None) is not None:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave_to(path))]
    try:
        forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    start = now(device)
    forward(model, inputs)
    return now(device) - start, own


def _time(dense: nn.Module, small: nn.Module, inputs: Batch, clock: Clock) -> tuple[float, float, dict[str, float]]:
    """Median seconds of both models, and of the small one's modules, from alternating runs."""
    clock(small, inputs)  # warm
    runs = [(clock(dense, inputs)[0], *clock(small, inputs)) for _ in range(ROUNDS)]
    parts = {path: float(np.median([run[2][path] for run in runs])) for path in runs[0][2]}
    return float(np.median([run[0] for run in runs])), float(np.median([run[1] for run in runs])), parts


def _random_plans(sites: dict[str, Site], seed: int, round_to: int) -> list[dict[str, int]]:
    """Units kept by site: everything, the least, and between them a Latin hypercube with a common part.

    A plan of widths drawn apart for every site costs about the same as any other: the common part makes some wide and
    some narrow everywhere.
    """
    names = [name for name, site in sites.items() if site.kind != "layers"]
    n = PLANS + HELD_OUT - 2
    draws = qmc.LatinHypercube(len(names) + 1, rng=np.random.default_rng(seed)).random(n)
    shares = [np.ones(len(names)), np.zeros(len(names)), *((draws[:, :1] + draws[:, 1:]) / 2)]
    plans = []
    for row in shares:
        kept = {name: site.n_units for name, site in sites.items()}
        for name, share in zip(names, row):
            site = sites[name]
            least = max(site.min_units, 1, int(NARROWEST * site.n_units))
            kept[name] = allowed_width(least + round(float(share) * (site.n_units - least)), site, round_to, up=True)
        plans.append(kept)
    return plans


def _fit_modules(
    dense: nn.Module, everything: dict[str, Site], kepts: list[dict[str, int]], own: list[dict[str, float]]
) -> dict[tuple[str, ...], float]:
    """Coefficients of every module's own time, in femtoseconds, by the sites whose kept units multiply them."""
    dims, whole = dimension_owners(dense, everything)
    n_units = {name: site.n_units for name, site in everything.items()}
    terms: dict[tuple[str, ...], float] = {}
    for path in own[0]:
        seconds = FEMTOSECONDS * np.array([parts[path] for parts in own])
        sums = _regressors(dense, path, n_units, dims)
        columns = np.array([[_value(products, kept) for products in sums] for kept in kepts], dtype=float)
        scale = columns.max(axis=0)
        weights, _ = nnls(columns / scale, seconds)
        for weight, products in zip(weights / scale, sums):
            for coefficient, sites in products:
                factors = tuple(sorted((*sites, *whole.get(path, ()))))
                terms[factors] = terms.get(factors, 0.0) + weight * coefficient
    return terms


def _regressors(model: nn.Module, path: str, n_units: dict[str, int], dims: Owners) -> list[list[Product]]:
    """What a module's time is a sum of: a constant, its features on each side, and the product of them.

    A module that only calls others works on what its children make and read.
    """
    module = model.get_submodule(path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # owners know a tied one by its first
    own = [(path, name) for name, _ in module.named_parameters(recurse=False)]
    near = own or [
        (f"{path}.{child}".removeprefix("."), name)
        for child, inner in module.named_children()
        for name, _ in inner.named_parameters(recurse=False)
    ]
    sides: list[list[Product]] = []
    products: list[list[Product]] = []
    for owner, name in near:
        parameter = model.get_parameter(f"{owner}.{name}".removeprefix("."))
        full, shape = names[id(parameter)], parameter.shape
        for dim in range(len(shape)):
            side = parameter_products("", shape[dim : dim + 1], n_units, {("", 0): dims.get((full, dim), [])})
            if any(sites for _, sites in side):
                sides.append(side)
        if own and len(shape) > 1:
            products.append(parameter_products(full, shape, n_units, dims))
    found = [[(1, ())], *sides, *products]
    return [each for i, each in enumerate(found) if each not in found[:i]]


def _value(products: list[Product], kept: Mapping[str, int]) -> int:
    return sum(coefficient * math.prod(kept[site] for site in sites) for coefficient, sites in products)


def _scaled(
    terms: dict[tuple[str, ...], float], n_units: dict[str, int], kepts: list[dict[str, int]], seconds: np.ndarray
) -> CostModel:
    """The terms so scaled, and with such a constant, that they say what whole forward passes take."""
    said = np.array([sum(c * math.prod(kept[site] for site in sites) for sites, c in terms.items()) for kept in kepts])
    columns = np.stack([np.ones(len(said)), said / said.max()], axis=1)
    (constant, slope), _ = nnls(columns, FEMTOSECONDS * seconds)
    slope /= said.max()
    whole = {sites: slope * c for sites, c in terms.items()}
    whole[()] = whole.get((), 0.0) + constant
    return CostModel("latency", tuple(Term(round(c), sites, False) for sites, c in whole.items() if round(c)), n_units)
