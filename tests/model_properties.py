"""Properties of pruning, for random models of every family row, random plans, budgets and dtypes.

`tests/test_properties.py` tries a few cases of each, `scripts/properties.py` thousands.
"""

from __future__ import annotations

import copy
import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from conftest import CASES, TINY, build, inputs_of, outputs
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ibprune.budget import Budget, Keep, make_budget, solve_by_cost, solve_by_shares
from ibprune.costs import CostModel, count_params, macs_model, params_model
from ibprune.embeddings import factorize_
from ibprune.errors import BadRecipe
from ibprune.folders import write_model
from ibprune.groups import Site, axis_dims, get_tensor
from ibprune.inject import inject_
from ibprune.loading import load
from ibprune.memory import measure_memory
from ibprune.plans import PruningPlan, check_plan
from ibprune.scores import magnitude_scores
from ibprune.shares import equal_pressure
from ibprune.sites import find_family, find_sites
from ibprune.structure import prepare_
from ibprune.surgery import compact_
from ibprune.task_heads import complete, with_end
from ibprune.vanilla import plain_structure
from ibprune.vib import only

DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers")
DEPTHS += ("decoder_layers",)
WIDTHS = ("intermediate_size", "hidden_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim")
WIDTHS += ("moe_intermediate_size",)
ROUNDING = 1e-12
RESIDUALS = ("hidden_size", "dim", "n_embd", "d_model")
# Where the size of one thing follows from another's in the config, it stays.
FIXED = {
    "swin": ("hidden_size",),
    "clip": (*DEPTHS, *WIDTHS, *RESIDUALS),
    "opt": RESIDUALS,
    "electra-wide": RESIDUALS,
    "albert-groups": DEPTHS,
}


class Exact(TorchFunctionMode):
    """While it is open, what a model computes in float32 whatever its dtype is computed in float64.

    Else its norms alone round so much that a defect could hide behind it: where a residual stream of few features is
    small, an RMSNorm makes a difference of 4e-9 one of 4e-6.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        kwargs = {key: torch.float64 if each is torch.float32 else each for key, each in (kwargs or {}).items()}
        return function(*args, **kwargs)

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*raised)


def exact(check: Callable[[Case], None]) -> Callable[[Case], None]:
    @functools.wraps(check)
    def run(case: Case) -> None:
        with Exact():
            check(case)

    return run


@dataclass(frozen=True)
class Case:
    """A random model: a row's tiny one with other sizes and weights, and the number that all else is drawn from."""

    family: str
    head: str
    changes: tuple[tuple[str, object], ...]
    seed: int
    dtype: torch.dtype = torch.float64

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        return build(self.family, self.head, dtype=dtype or self.dtype, seed=self.seed, **dict(self.changes))

    def rng(self) -> random.Random:
        return random.Random(self.seed)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), chosen: Callable = lambda case: True):
    """Cases of every row and head, or of those that `chosen` takes: (family, head)."""
    family, head = draw(st.sampled_from([case for case in CASES if chosen(case)]))
    config, changes = TINY[family](), {}
    fixed = FIXED.get(family, ())
    for key in DEPTHS:
        if isinstance(getattr(config, key, None), int) and key not in fixed:
            changes[key] = draw(st.integers(1, 3))
    for key in WIDTHS:
        if isinstance(getattr(config, key, None), int) and key not in fixed:
            changes[key] = draw(st.integers(2, 24))
    for key in RESIDUALS:
        if isinstance(getattr(config, key, None), int) and key not in fixed and draw(st.booleans()):
            changes[key] = 48
            changes |= {"pooler_hidden_size": 48} if hasattr(config, "pooler_hidden_size") else {}
    if changes and hasattr(config, "layer_types"):
        changes["layer_types"] = None  # drawn up anew from the depth
    if changes and hasattr(config, "out_features"):
        changes |= {"out_features": None, "out_indices": None}
    return Case(family, head, tuple(changes.items()), draw(st.integers(0, 10**6)), draw(st.sampled_from(dtypes)))


def factorized(model: nn.Module) -> nn.Module:
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    return model


def random_plan(model: nn.Module, sites: dict[str, Site], rng: random.Random) -> PruningPlan:
    """Any plan that the sites allow: the least and the whole of a site are as likely as all between. The vocabulary
    stays: it changes what a model reads."""
    keep = {}
    for name, site in sites.items():
        count = rng.choice((site.min_units, site.n_units, rng.randint(site.min_units, site.n_units)))
        count = site.n_units if site.kind == "vocab" else count
        keep[name] = tuple(sorted(rng.sample(range(site.n_units), count)))
    return PruningPlan(model.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)


def masked_model(case: Case, dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, Site], PruningPlan]:
    """A model whose masks have random means and do what a random plan says."""
    model = factorized(case.model(dtype))
    sites = find_sites(model)
    plan = random_plan(model, sites, case.rng())
    masks = inject_(model, sites)
    torch.manual_seed(case.seed)
    for _, mask in masks.items():
        mask.mu.data.uniform_(0.5, 1.5)
    masks.set_keep(plan.keep)
    return model, sites, plan


def same_features(wide: torch.Tensor, small: torch.Tensor, plan: PruningPlan) -> torch.Tensor:
    """`wide` without the features that a base model lost."""
    return wide if wide.shape == small.shape else wide[..., list(plan.keep["hidden"])]


@exact
def masked_is_compacted_is_reloaded(case: Case) -> None:
    model, sites, plan = masked_model(case)
    masked = outputs(model)
    params, macs = params_model(model, sites), macs_model(model, sites, length=7)
    small = outputs(compact_(model, plan))
    wrong = (same_features(masked, small, plan) - small).abs().max()
    assert wrong < ROUNDING, f"masked and compacted differ by {wrong}"
    assert params(plan.kept()) == count_params(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**{key: value[:1] for key, value in inputs_of(model).items()})
    assert macs(plan.kept()) == counter.get_total_flops() // 2
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, None, plan, Path(folder))
        loaded = load(folder)
        assert PruningPlan.load(Path(folder) / "plan.json") == plan
    loaded.set_attn_implementation("eager")
    assert loaded.dtype == case.dtype and count_params(loaded) == count_params(model)
    wrong = (outputs(loaded) - small).abs().max()
    assert wrong < ROUNDING, f"reloaded is off by {wrong}"  # weights that lie elsewhere are added up otherwise
    tensors = loaded.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def rounded_alike(case: Case) -> None:
    """In a narrow type, what was compacted is as near to the exact outputs as what was masked."""
    model, _, plan = masked_model(case, torch.float64)
    model.to(case.dtype)
    exact = outputs(copy.deepcopy(model).double())  # of the same weights
    masked = outputs(model)
    small = outputs(compact_(model, plan))
    assert small.dtype == masked.dtype == case.dtype and torch.isfinite(small).all()
    exact, masked = same_features(exact, small, plan), same_features(masked, small, plan).double()
    allowed = 8 * (masked - exact).abs().max() + 64 * torch.finfo(case.dtype).eps * exact.abs().max()
    wrong = (small.double() - exact).abs().max()
    assert wrong <= allowed, f"compacted is off by {wrong}, masked by {(masked - exact).abs().max()}"


def ids_of(model: nn.Module, rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids without a special one."""
    return torch.randint(5, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@exact
def is_alone_as_among_others(case: Case) -> None:
    """A row's outputs do not depend on the other rows of its batch, nor on the padding behind it."""
    model, _, plan = masked_model(case)
    compact_(model, plan)
    if model.main_input_name == "pixel_values":
        batch = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(case.seed), dtype=case.dtype)
        with torch.no_grad():
            together = model(pixel_values=batch)[0]
            wrong = (model(pixel_values=batch[1:2])[0] - together[1:2]).abs().max()
        assert wrong < ROUNDING, f"a picture among others is off by {wrong}"
        return
    short, long = with_end(model, ids_of(model, 1, 5, case.seed)), with_end(model, ids_of(model, 2, 8, case.seed + 1))
    pad = model.config.pad_token_id or 0
    padded = torch.cat([short, torch.full((1, 3), pad)], dim=1)
    seen = torch.ones(3, 8, dtype=torch.long)
    seen[0, 5:] = 0
    written = {}
    if model.config.is_encoder_decoder and "T5" in case.head and not case.head.endswith("EncoderModel"):
        written = {"decoder_input_ids": complete(model, {"input_ids": torch.cat([padded, long])})["decoder_input_ids"]}
    batch = complete(model, {"input_ids": torch.cat([padded, long]), "attention_mask": seen} | written)
    alone = complete(model, {"input_ids": short, "attention_mask": torch.ones_like(short)})
    with torch.no_grad():
        together, single = model(**batch)[0][:1], model(**alone)[0]
    if together.ndim > 1 and together.shape[1] == 8:
        together = together[:, :5]
    wrong = (together - single).abs().max()
    assert wrong < ROUNDING, f"a text among others is off by {wrong}"


def permuted_(model: nn.Module, site: Site, order: torch.Tensor, done: set[tuple[int, int, int]]) -> None:
    """Puts the units of a site into another order, in place."""
    for cut in site.cuts:
        module = model.get_submodule(cut.path)
        for name, dim in axis_dims(module, cut.axis):
            tensor = get_tensor(module, name)
            offset, width = cut.span(site.n_units, tensor.shape[dim])
            if (id(tensor), dim, offset) in done:  # a tied one belongs to two modules
                continue
            done.add((id(tensor), dim, offset))
            place = torch.arange(tensor.shape[dim])
            place[offset : offset + site.n_units * width] = (
                offset + (order[:, None] * width + torch.arange(width)).flatten()
            )
            tensor.data.copy_(tensor.data.index_select(dim, place))


@exact
def permuted_units_are_permuted_plans(case: Case) -> None:
    """With a site's units in another order, a score keeps the same units, and what is left computes the same."""
    model, rng = factorized(case.model()), case.rng()
    twin = copy.deepcopy(model)
    sites = find_sites(model)
    moved = [site for site in sites.values() if site.kind not in ("layers", "vocab", "hidden") and site.n_units > 1]
    orders, done = {}, set()
    for site in moved:
        orders[site.name] = torch.tensor(rng.sample(range(site.n_units), site.n_units))
        permuted_(twin, site, orders[site.name], done)
    assert (outputs(twin) - outputs(model)).abs().max() < ROUNDING
    chosen = {name: site for name, site in sites.items() if site.kind not in ("vocab", "layers")}
    costs = params_model(model, sites)
    try:
        budget = make_budget(costs, chosen, keep=rng.uniform(0.2, 1.0), scope="model", round_to=1)
    except BadRecipe:
        return  # below what this model can reach
    plans = []
    for each in (model, twin):
        scores = magnitude_scores(each, find_sites(each))
        scores = {name: (score * 1e9).round() for name, score in scores.items()}  # sums in another order
        keep = solve_by_cost(scores, chosen, costs, budget)
        n_units = {name: site.n_units for name, site in sites.items()}
        keep = {name: keep.get(name, tuple(range(units))) for name, units in n_units.items()}
        plans.append(PruningPlan(model.config.model_type, n_units, keep))
    for name, order in orders.items():
        assert plans[0].keep[name] == tuple(sorted(order[list(plans[1].keep[name])].tolist())), name
    small, other = outputs(compact_(model, plans[0])), outputs(compact_(twin, plans[1]))
    assert (small - other).abs().max() < ROUNDING


def random_budget(
    model: CostModel, sites: dict[str, Site], rng: random.Random, ties: tuple = ()
) -> tuple[Budget, dict[str, torch.Tensor]] | None:
    """A budget and scores, some of them equal or 0; None where the budget is below what can be reached."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    power, levels = rng.choice((0, 1, 4)), rng.choice((2, 10**6))
    scores = {
        name: (torch.rand(site.n_units, generator=generator, dtype=torch.float64) ** power * levels).floor()
        for name, site in sites.items()
    }
    scope, round_to = rng.choice(("model", "blocks")), rng.choice((1, 1, 2, 8))
    try:
        keep = rng.uniform(0.02, 1.0)
        return make_budget(model, sites, keep=keep, scope=scope, round_to=round_to, ties=ties), scores
    except BadRecipe:
        return None


def within_budget(keep: Keep, sites: dict[str, Site], model: CostModel, budget: Budget) -> None:
    """The keep costs no more than it may, and a model can take it."""
    spent = model(model.n_units | {name: len(units) for name, units in keep.items()}, scope=budget.scope)
    assert spent <= budget.limit, f"{spent} of {budget.limit}"
    for name, site in sites.items():
        assert list(keep[name]) == sorted(set(keep[name])), name
        assert site.min_units <= len(keep[name]) <= site.n_units, f"{name} keeps {len(keep[name])}"


def solved(scores: dict, sites: dict[str, Site], model: CostModel, budget: Budget, rng: random.Random) -> Keep:
    """The units that stay, by one of the solvers."""
    pressure = equal_pressure(sites)
    if rng.random() < 0.5:
        pressure |= {kind: rng.choice((0.0, rng.uniform(0.1, 3.0))) for kind in pressure}
    if rng.random() < 0.5:
        try:
            return solve_by_shares(scores, sites, model, budget, pressure)
        except BadRecipe:
            pass  # the kinds under pressure cannot reach it by themselves
    return solve_by_cost(scores, sites, model, budget)


def budgets_hold_and_nest(case: Case) -> None:
    """No solver spends more than it may, and a smaller budget keeps some of the units of a larger one."""
    rng = case.rng()
    with torch.device("meta"):
        model = getattr(transformers, case.head)(_config(case))
    model.eval()
    family = find_family(model.config.model_type)
    kinds = list(dict.fromkeys(group.kind for group in family.groups))
    structure = prepare_(model, tuple(rng.sample(kinds, rng.randint(1, len(kinds)))), None)
    sites, ties = structure.sites, ()
    cost = rng.choice(("params", "macs", "memory"))
    costs = structure.costs.params if cost == "params" else structure.costs.macs
    if cost == "memory":
        costs = measure_memory(
            model, costs if cost == "params" else structure.costs.params, structure.everything,
            dtype=rng.choice((torch.float32, torch.float16)), batch=rng.randint(1, 8), length=rng.randint(1, 64),
        ).model  # fmt: skip
    if rng.random() < 0.25:
        try:
            structure, _ = plain_structure(model, structure, costs, round_to=1)
        except BadRecipe:
            return  # the row has nothing that plain transformers could be told
        sites, ties = structure.sites, structure.ties
    found = random_budget(costs, sites, rng, ties)
    if not sites or found is None:
        return
    budget, scores = found
    keep = solved(scores, sites, costs, budget, rng)
    within_budget(keep, sites, costs, budget)
    check_plan(structure.plan(model, keep), model, structure.everything)
    try:
        share = budget.keep * rng.uniform(0.5, 1.0)
        smaller = make_budget(costs, sites, keep=share, scope=budget.scope, round_to=budget.round_to, ties=ties)
    except BadRecipe:
        return
    less = solved(only(scores, keep), sites, costs, smaller, rng)
    within_budget(less, sites, costs, smaller)
    assert all(set(less[name]) <= set(keep[name]) for name in sites)


def _config(case: Case) -> transformers.PreTrainedConfig:
    config = TINY[case.family]()
    return type(config).from_dict(config.to_dict() | dict(case.changes))


PROPERTIES: dict[str, tuple[Callable[[Case], None], dict]] = {
    "masked == compacted == reloaded, costs exact": (masked_is_compacted_is_reloaded, {}),
    "narrow types round alike": (
        rounded_alike,
        {"dtypes": (torch.float32, torch.bfloat16, torch.float16)},
    ),
    "a row alone as among others": (is_alone_as_among_others, {}),
    "permuted units, permuted plans": (permuted_units_are_permuted_plans, {}),
    "budgets hold, plans nest": (budgets_hold_and_nest, {}),
}
