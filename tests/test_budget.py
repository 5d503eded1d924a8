"""The solver: exact, never above the limit, rounded inside, and one division by cost."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from ibprune.budget import (
    effective_fractions,
    fill,
    keep_within,
    least_cost,
    make_budget,
    solve_by_cost,
    solve_by_shares,
)
from ibprune.console import Quiet
from ibprune.costs import CostModel, Term, amount, macs_model, params_model
from ibprune.embeddings import factorize_
from ibprune.errors import BadRecipe
from ibprune.memory import measure_memory
from ibprune.shares import MOST_RECOVERED, as_pressure, equal_pressure, probe_shares
from ibprune.sites import find_sites
from ibprune.structure import prepare_
from ibprune.vanilla import plain_structure


def setting(config=None, length=16):
    with torch.device("meta"):
        model = BertModel(config or TINY["bert"]())
    factorize_(model)
    sites = find_sites(model)
    return sites, params_model(model, sites), macs_model(model, sites, length=length)


def remembering(config):
    """A language model with a cache that is larger than its weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    factorize_(model)
    sites = find_sites(model)
    params = params_model(model, sites)
    return sites, measure_memory(model, params, sites, dtype=torch.float16, batch=8, length=64).model


def spent(model, keep, scope="model"):
    return model(model.n_units | {name: len(units) for name, units in keep.items()}, scope=scope)


WIDE = BertConfig(vocab_size=500, hidden_size=128, num_hidden_layers=3, num_attention_heads=8, intermediate_size=512)

GROUPED = LlamaConfig(vocab_size=200, hidden_size=128, num_hidden_layers=3, num_attention_heads=8,
                      num_key_value_heads=4, intermediate_size=512)  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_unit_costs_what_the_model_loses_with_it(share, grouped):
    """With one matrix for the embedding or two. A rank that is whole is left out: two may be more than one."""
    models = [remembering(GROUPED)[1]] if grouped else setting(WIDE)[1:]
    for model in models:
        kept = {name: max(1, int(share * n)) for name, n in model.n_units.items()}
        for name, count in kept.items():
            if share < 1 or "rank" not in name:
                fewer = model(kept | {name: count - 1})
                assert model.unit_cost(kept, name) == model(kept) - fewer >= 0


def test_what_an_attention_multiplies_is_of_its_block():
    """Beyond the blocks a BERT multiplies in its pooler alone, one token of each text."""
    sites, _, macs = setting(WIDE)
    assert macs.of_dense(scope="model") - macs.of_dense(scope="blocks") == WIDE.hidden_size**2


def test_a_cost_that_no_unit_has_a_part_in_is_met_by_all_of_them_or_refused():
    """As a latency may be that was fitted on a machine too busy to tell widths apart."""
    sites, params, _ = setting()
    model = CostModel("latency", (Term(7, (), False),), params.n_units)
    scores = {name: torch.rand(site.n_units) for name, site in sites.items()}
    budget = make_budget(model, sites, keep=1.0, scope="model", round_to=1)
    for keep in (solve_by_cost(scores, sites, model, budget),
                 solve_by_shares(scores, sites, model, budget, equal_pressure(sites))):  # fmt: skip
        assert {name: len(units) for name, units in keep.items()} == {name: s.n_units for name, s in sites.items()}
    with pytest.raises(BadRecipe, match="saves no latency here"):
        make_budget(model, sites, keep=0.9, scope="model", round_to=1)


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("cost", ["params", "macs", "memory"])
def test_budgets_are_met_within_one_step_and_never_exceeded(cost, round_to):
    if cost == "memory":
        sites, model = remembering(GROUPED)
    else:
        sites, params, macs = setting(WIDE)
        model = params if cost == "params" else macs
    rng = random.Random(0)
    for trial in range(25):
        kinds = rng.sample(list(dict.fromkeys(s.kind for s in sites.values() if s.kind != "vocab")), rng.randint(2, 5))
        chosen = {n: s for n, s in sites.items() if s.kind in kinds}
        scope = rng.choice(["model", "blocks"])
        torch.manual_seed(trial)
        scores = {n: torch.rand(s.n_units) ** 3 for n, s in chosen.items()}
        try:
            budget = make_budget(model, chosen, keep=rng.uniform(0.1, 1.0), scope=scope, round_to=round_to)
        except BadRecipe:
            continue
        keeps = [solve_by_cost(scores, chosen, model, budget)]
        if set(kinds) & {"heads", "kv_groups", "ffn", "hidden"}:
            try:
                keeps.append(solve_by_shares(scores, chosen, model, budget, equal_pressure(chosen)))
            except BadRecipe:
                pass
        for keep in keeps:
            achieved = spent(model, keep, scope)
            assert achieved <= budget.limit
            kept = model.n_units | {n: len(u) for n, u in keep.items()}
            steps = [
                model.unit_cost(kept, name, scope=scope) * (round_to if site.n_units >= 16 * round_to else 1)
                for name, site in chosen.items()
                if site.kind != "layers" and len(keep[name]) < site.n_units
            ]
            steps = [step for step in steps if step > 0]
            if steps:
                assert budget.limit - achieved < min(steps) * 1.01 + 1
            for name, site in chosen.items():
                assert site.min_units <= len(keep[name]) <= site.n_units
                assert list(keep[name]) == sorted(set(keep[name]))
                if site.kind in ("ffn", "hidden", "embedding_rank") and site.n_units >= 16 * round_to:
                    assert len(keep[name]) % round_to == 0 or len(keep[name]) == site.n_units


def test_amounts_carry_the_unit_of_their_cost():
    assert [amount(1200, cost) for cost in ("macs", "memory", "params")] == [
        "1,200 macs", "1,200 bytes of memory", "1,200 params"
    ]  # fmt: skip
    assert amount(2_500_000_000_000, "latency") == "2.500 ms of latency"


@pytest.mark.parametrize("vanilla", [False, True])
def test_rows_for_k_quants_are_whole_blocks_where_they_are_asked_for(vanilla):
    """--round-to 256: from two such steps on, every width of a row is a multiple of it."""
    config = LlamaConfig(vocab_size=700, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=4, intermediate_size=2816)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    structure = prepare_(model, ("ffn", "hidden"), None)
    if vanilla:
        structure, _ = plain_structure(model, structure, structure.costs.params, round_to=256)
    costs, sites = structure.costs.params, structure.sites
    for share in (0.3, 0.5, 0.8):
        budget = make_budget(costs, sites, keep=share, scope="model", round_to=256, ties=structure.ties)
        scores = {name: torch.rand(site.n_units) for name, site in sites.items()}
        keep = solve_by_shares(scores, sites, costs, budget, equal_pressure(sites))
        assert spent(costs, keep) <= budget.limit
        assert {len(units) % 256 for units in keep.values()} == {0}
        assert any(len(keep[name]) < site.n_units for name, site in sites.items())


def test_scores_are_divided_by_cost_exactly_once():
    """One head costs as much as some FFN units: the solver cuts by score/cost, not score or score/cost^2."""
    sites, params, _ = setting()
    chosen = {n: s for n, s in sites.items() if s.kind in ("heads", "ffn")}
    head = params.unit_cost(params.n_units, "encoder.layer.0.heads")
    unit = params.unit_cost(params.n_units, "encoder.layer.0.ffn")
    assert head > 5 * unit
    budget = make_budget(params, chosen, keep=0.97, scope="model", round_to=1)
    cheap_heads = {n: torch.full((s.n_units,), 0.9 * head if s.kind == "heads" else unit) for n, s in chosen.items()}
    keep = solve_by_cost(cheap_heads, chosen, params, budget)
    assert any(len(keep[n]) < s.n_units for n, s in chosen.items() if s.kind == "heads")
    dear_heads = {n: torch.full((s.n_units,), 1.1 * head if s.kind == "heads" else unit) for n, s in chosen.items()}
    keep = solve_by_cost(dear_heads, chosen, params, budget)
    assert all(len(keep[n]) == s.n_units for n, s in chosen.items() if s.kind == "heads")


def test_the_best_units_stay():
    sites, params, _ = setting()
    chosen = {n: s for n, s in sites.items() if s.kind == "ffn"}
    scores = {n: torch.arange(float(s.n_units)) for n, s in chosen.items()}
    budget = make_budget(params, chosen, keep=0.9, scope="model", round_to=1)
    for keep in (
        solve_by_cost(scores, chosen, params, budget),
        solve_by_shares(scores, chosen, params, budget, {"ffn": 1.0}),
    ):
        for units in keep.values():
            assert units == tuple(range(20 - len(units), 20))


def test_a_removed_sublayer_comes_back_narrower_when_there_is_room():
    sites, params, _ = setting()
    scores = {n: torch.ones(s.n_units) * (1e-9 if s.kind == "layers" else 1.0) for n, s in sites.items()}
    budget = make_budget(params, sites, keep=0.9, scope="model", round_to=1)
    keep = solve_by_cost(scores, sites, params, budget)
    head = params.unit_cost(params.n_units, "encoder.layer.0.heads")
    assert budget.limit - spent(params, keep) < head


def test_shares_of_a_plan_come_back_however_sub_layers_rank():
    """Units inside sub-layers that go must not use up the share of their kind: all shares would drift."""
    config = BertConfig(**WIDE.to_diff_dict() | {"num_hidden_layers": 8})
    sites, params, _ = setting(config)
    generator = torch.Generator().manual_seed(0)

    def scores():
        return {name: torch.rand(site.n_units, generator=generator) for name, site in sites.items()}

    pressure = as_pressure({"hidden": 0.8, "heads": 0.5, "layers": 0.75, "ffn": 0.4, "embedding_rank": 0.5})
    budget = make_budget(params, sites, keep=0.35, scope="model", round_to=1)
    asked = effective_fractions(solve_by_shares(scores(), sites, params, budget, pressure), sites, params)
    drift = {True: 0.0, False: 0.0}
    for _ in range(6):
        ranked = scores()
        for effective in drift:
            keep = solve_by_shares(ranked, sites, params, budget, as_pressure(asked), effective=effective)
            assert spent(params, keep) <= budget.limit
            found = effective_fractions(keep, sites, params)
            drift[effective] = max(drift[effective], *(abs(found[kind] - asked[kind]) for kind in asked))
    assert drift[True] < 0.05 < 0.1 < drift[False]


def test_narrow_kinds_keep_their_width_however_the_units_rank():
    """Rounding down, a share that is wanted a little smaller took a whole step of a rank, and other kinds got it."""
    sites, params, _ = setting(BertConfig(**WIDE.to_diff_dict() | {"vocab_size": 4000}))
    generator = torch.Generator().manual_seed(0)

    def scores():
        return {name: torch.rand(site.n_units, generator=generator) for name, site in sites.items()}

    pressure = as_pressure({"hidden": 0.7, "heads": 0.5, "layers": 0.67, "ffn": 0.4, "embedding_rank": 0.2})
    budget = make_budget(params, sites, keep=0.25, scope="model", round_to=8)
    target = solve_by_shares(scores(), sites, params, budget, pressure)
    asked = as_pressure(effective_fractions(target, sites, params))
    narrow = ("hidden", "embedding_rank")
    assert all(len(target[name]) < sites[name].n_units for name in narrow)
    drifted = 0
    for _ in range(12):
        ranked = scores()
        keep = solve_by_shares(ranked, sites, params, budget, asked, effective=True)
        assert spent(params, keep) <= budget.limit
        assert {name: len(keep[name]) for name in narrow} == {name: len(target[name]) for name in narrow}
        other = solve_by_shares(ranked, sites, params, budget, asked)
        drifted += any(len(other[name]) != len(target[name]) for name in narrow)
    assert drifted


def test_a_plan_comes_back_with_its_own_scores():
    """The floors of what is inside sub-layers that go were counted as kept, and given to the sub-layers that stay."""
    sites, params, _ = setting(BertConfig(**WIDE.to_diff_dict() | {"num_hidden_layers": 8, "vocab_size": 2000}))
    generator = torch.Generator().manual_seed(0)
    for budgeted, layers in ((0.3, 0.75), (0.2, 0.6), (0.15, 0.5)):
        scores = {name: torch.rand(site.n_units, generator=generator) for name, site in sites.items()}
        budget = make_budget(params, sites, keep=budgeted, scope="model", round_to=8)
        pressure = as_pressure({"hidden": 0.8, "heads": 0.5, "layers": layers, "ffn": 0.4, "embedding_rank": 0.5})
        target = solve_by_shares(scores, sites, params, budget, pressure)
        asked = as_pressure(effective_fractions(target, sites, params))
        keep = solve_by_shares(scores, sites, params, budget, asked, effective=True)
        for name, site in sites.items():
            if site.kind in ("layers", "embedding_rank") or name == "hidden":
                assert keep[name] == target[name], name
        heads = [sum(len(plan[n]) for n, s in sites.items() if s.kind == "heads") for plan in (target, keep)]
        assert heads[0] == heads[1]


def test_the_ramp_ends_where_the_final_choice_is():
    """Whatever sub-layers are liked less now: none that the ramp cut comes back, and what stayed whole stays whole."""
    sites, params, _ = setting(BertConfig(**WIDE.to_diff_dict() | {"num_hidden_layers": 8}))
    generator = torch.Generator().manual_seed(0)

    def scores(liked):
        return {
            name: torch.rand(site.n_units, generator=generator) + (site.group.name == liked)
            for name, site in sites.items()
        }

    chosen = {name: site for name, site in sites.items() if site.kind in ("layers", "hidden")}
    names = sorted({site.group.name for site in sites.values() if site.kind == "layers"})
    budget = make_budget(params, chosen, keep=0.6, scope="model", round_to=8)
    for first, then in (names, names[::-1]):
        target = solve_by_shares(scores(first), chosen, params, budget, {"layers": 1.0})
        asked = as_pressure(effective_fractions(target, chosen, params))
        ranked = scores(then)
        ramp = keep_within(ranked, chosen, params, replace(budget, round_to=1), asked, effective=True, halvings=12)
        keep = solve_by_shares(ranked, chosen, params, budget, asked, effective=True)
        kept = [{n for n, s in chosen.items() if s.kind == "layers" and plan[n]} for plan in (ramp, keep)]
        assert kept[0] <= kept[1] and len(keep["hidden"]) == len(ramp["hidden"]) == sites["hidden"].n_units


def test_a_rank_that_saves_nothing_is_given_up_after_filling_too():
    sites, params, _ = setting(BertConfig(**WIDE.to_diff_dict() | {"num_hidden_layers": 1}))
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for _ in range(60):
        scores = {name: torch.rand(site.n_units, generator=generator) for name, site in sites.items()}
        share = 0.3 + 0.6 * float(torch.rand((), generator=generator))
        budget = make_budget(params, sites, keep=share, scope="model", round_to=8)
        kept = dict(zip(("hidden", "heads", "layers", "ffn", "embedding_rank"), torch.rand(5, generator=generator)))
        keep = solve_by_shares(scores, sites, params, budget, as_pressure({k: float(v) for k, v in kept.items()}))
        (rank,) = (name for name, site in sites.items() if site.kind == "embedding_rank")
        whole = keep | {rank: tuple(range(sites[rank].n_units))}
        checked += len(keep[rank]) < sites[rank].n_units
        assert keep == whole or spent(params, whole) > spent(params, keep)
    assert checked > 5


def test_what_an_earlier_plan_kept_whole_stays_whole():
    """Its pressure is very small and not none: rounded down, that took a sub-layer, and a step of the stream."""
    sites, params, _ = setting(WIDE)
    generator = torch.Generator().manual_seed(0)

    def scores():
        return {name: torch.rand(site.n_units, generator=generator) for name, site in sites.items()}

    whole = ("hidden", "layers", "embedding_rank")
    pressure = {"heads": 1.0, "ffn": 1.0}
    budget = make_budget(params, sites, keep=0.6, scope="model", round_to=8)
    target = solve_by_shares(scores(), sites, params, budget, pressure)
    asked = as_pressure(effective_fractions(target, sites, params))
    for _ in range(6):
        keep = solve_by_shares(scores(), sites, params, budget, asked, effective=True)
        assert all(len(keep[name]) == site.n_units for name, site in sites.items() if site.kind in whole)
        assert spent(params, keep) <= budget.limit


@pytest.mark.parametrize("grouped", [False, True])
def test_whatever_the_shares_of_a_plan_a_budget_is_met_with_them_under_other_scores(grouped):
    """Kinds that stayed whole give where nothing else can: the solver has no other way out."""
    sites, model = remembering(GROUPED) if grouped else setting(WIDE)[:2]
    generator = torch.Generator().manual_seed(0)
    kinds, tight = sorted({site.kind for site in sites.values()}), 0
    for i in range(24):
        of = torch.randperm(len(kinds), generator=generator)[: 1 + i % len(kinds)].tolist()
        chosen = {name: site for name, site in sites.items() if site.kind in {kinds[j] for j in of}}
        draws = [{n: torch.rand(s.n_units, generator=generator) for n, s in chosen.items()} for _ in range(2)]
        round_to = (1, 8)[i % 2]
        least = least_cost(model, chosen, scope="model", round_to=round_to) / model.of_dense(scope="model")
        share = least + (1 - least) * (0.001, 0.3)[i % 3 > 0]
        budget = make_budget(model, chosen, keep=share, scope="model", round_to=round_to)
        asked = as_pressure(effective_fractions(solve_by_cost(draws[0], chosen, model, budget), chosen, model))
        keep = solve_by_shares(draws[1], chosen, model, budget, asked, effective=True)
        assert spent(model, keep) <= budget.limit
        tight += share < least + 0.01
    assert tight > 5


def test_the_search_follows_the_measured_loss():
    """A loss that only hidden features carry: the search must spare them, whatever the scores say."""
    sites, params, _ = setting(WIDE)
    torch.manual_seed(0)
    scores = {n: torch.rand(s.n_units) for n, s in sites.items()}
    budget = make_budget(params, sites, keep=0.4, scope="model", round_to=1)
    found = {}
    for spared in ("hidden", "ffn"):
        names = [n for n, s in sites.items() if s.kind == spared]
        keep = probe_shares(
            lambda keep, at_most, names=names: -float(sum(len(keep[n]) for n in names)),
            scores, sites, params, budget, console=Quiet(),
        )  # fmt: skip
        assert spent(params, keep) <= budget.limit
        found[spared] = keep
    assert len(found["hidden"]["hidden"]) > len(found["ffn"]["hidden"])


def test_a_short_recovery_has_the_last_word_between_few_candidates():
    """What hurts at once (cut FFN units) and what stays lost (cut hidden features) are not the same here."""
    sites, params, _ = setting(WIDE)
    torch.manual_seed(0)
    scores = {n: torch.rand(s.n_units) for n, s in sites.items()}
    budget = make_budget(params, sites, keep=0.4, scope="model", round_to=1)
    recovered = []

    def kept(keep, kind):
        return sum(len(keep[n]) for n, s in sites.items() if s.kind == kind)

    def after(keep):
        recovered.append(kept(keep, "hidden"))
        return -float(recovered[-1])

    def search(**after_recovery):
        return probe_shares(
            lambda keep, at_most: -float(kept(keep, "ffn")),
            scores,
            sites,
            params,
            budget,
            console=Quiet(),
            **after_recovery,
        )

    first, last = search(), search(recovered_loss_of=after)
    assert spent(params, last) <= budget.limit and kept(last, "hidden") > kept(first, "hidden")
    assert recovered[0] == kept(first, "hidden") and 1 < len(recovered) <= MOST_RECOVERED
    assert kept(last, "hidden") == max(recovered)


def test_unreachable_and_absurd_budgets_say_what_can_be_reached():
    sites, params, _ = setting()
    chosen = {n: s for n, s in sites.items() if s.kind == "heads"}
    with pytest.raises(BadRecipe, match=r"cutting heads cannot go below .* ask for at least 0\.\d+"):
        make_budget(params, chosen, keep=0.1, scope="model", round_to=1)
    for keep in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(BadRecipe, match=r"\(0, 1\]"):
            make_budget(params, chosen, keep=keep, scope="model", round_to=1)


def test_the_named_least_budget_can_really_be_asked_for():
    sites, params, _ = setting(WIDE)
    with pytest.raises(BadRecipe) as error:
        make_budget(params, sites, keep=1e-6, scope="model", round_to=8)
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    budget = make_budget(params, sites, keep=least, scope="model", round_to=8)
    scores = {n: torch.rand(s.n_units) for n, s in sites.items()}
    assert spent(params, solve_by_cost(scores, sites, params, budget)) <= budget.limit


def test_filling_uses_what_is_left():
    sites, params, _ = setting()
    scores = {n: torch.rand(s.n_units) for n, s in sites.items()}
    least = {n: tuple(range(max(s.min_units, 1))) for n, s in sites.items()}
    budget = make_budget(params, sites, keep=0.6, scope="model", round_to=1)
    keep = fill(least, scores, sites, params, budget)
    assert 0.99 * budget.limit < spent(params, keep) <= budget.limit
