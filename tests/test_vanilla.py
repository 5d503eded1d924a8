"""--vanilla: every plan that comes of it loads as plain transformers, without any code, within its budget."""

import random
from pathlib import Path

import pytest
import torch
from conftest import CLASSIFIERS, HEADS, build, inputs_of, outputs
from transformers import AutoConfig, BertConfig, LlamaConfig

import ibprune
from ibprune.budget import fractions_kept, keep_within, least_cost, make_budget, solve_by_cost, solve_by_shares
from ibprune.cli import main
from ibprune.errors import BadRecipe
from ibprune.folders import verify, write_model
from ibprune.inject import inject_
from ibprune.planning import plan
from ibprune.shares import equal_pressure
from ibprune.sites import find_family
from ibprune.structure import choose_kinds, prepare_
from ibprune.ties import tied_costs, tied_sites, untied
from ibprune.vanilla import plain_structure

# The classifier of each model type, and a case of every other config.
ROWS = [*CLASSIFIERS.values(), *((f, HEADS[f][-1]) for f in HEADS if f not in {f for f, _ in CLASSIFIERS.values()})]
ONE_OF_EACH = [("bert", "BertForMaskedLM"), ("llama", "LlamaForCausalLM"), ("bart", "BartForConditionalGeneration")]
QUICK = dict(batch_size=16, max_length=16, audit=False, recover_steps=2, shares="equal", vanilla=True, round_to=1)


def limited(model, kinds=(), round_to=1):
    structure = prepare_(model, choose_kinds(model, kinds, vanilla=True), None)
    return plain_structure(model, structure, structure.costs.params, kinds=kinds, round_to=round_to)


def budget_of(structure, keep, *, round_to=1):
    costs, ties = structure.costs.params, structure.ties
    least = least_cost(costs, structure.sites, scope="model", round_to=round_to, ties=ties)
    share = max(keep, 1.01 * least / costs(costs.n_units))
    return make_budget(costs, structure.sites, keep=share, scope="model", round_to=round_to, ties=ties)


def random_scores(sites, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(site.n_units, generator=generator) for name, site in sites.items()}


@pytest.mark.parametrize("family,head", ROWS)
def test_every_row_loads_without_code(family, head, tmp_path):
    model = build(family, head, dtype=torch.float32)
    structure, whole = limited(model)
    assert not {site.kind for site in structure.sites.values()} & set(whole)
    budget = budget_of(structure, 0.6)
    scores = random_scores(structure.sites)
    keep = solve_by_cost(scores, structure.sites, structure.costs.params, budget)
    assert any(len(keep[name]) < site.n_units for name, site in structure.sites.items())
    masks = inject_(model, structure.sites)
    masks.set_keep(keep)
    masked = outputs(model)
    found = structure.plan(model, keep)
    small = structure.compact(model, found)
    assert structure.costs.params(found.kept()) == sum(p.numel() for p in small.parameters()) <= budget.limit
    compacted = outputs(small)
    if compacted.shape != masked.shape:
        masked = masked[..., list(keep["hidden"])]
    assert torch.allclose(compacted, masked, atol=1e-4)
    assert write_model(small, None, found, tmp_path) == "vanilla"
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).model_type == model.config.model_type
    record = verify(
        small, tmp_path, "vanilla", inputs_of(small)
    )  # AutoModel….from_pretrained, with no code, in a fresh process
    assert record["tier"] == "vanilla" and record["ways"] == ["ibprune", "transformers"]


@pytest.mark.parametrize("family,head", ONE_OF_EACH)
def test_ties_are_the_same_cost_in_other_terms(family, head):
    structure, _ = limited(build(family, head))
    ties, sites = structure.ties, structure.sites
    rng = random.Random(0)
    for costs in (structure.costs.params, structure.costs.macs):
        tied = tied_costs(ties, costs, sites)
        for _ in range(20):
            kept = {name: tuple(range(rng.choice(s.counts or range(1, s.n_units + 1))))
                    for name, s in tied_sites(ties, sites).items()}  # fmt: skip
            whole = {name: len(units) for name, units in untied(ties, kept, random_scores(sites)).items()}
            for scope in ("model", "blocks"):
                counted = tied(tied.n_units | {name: len(units) for name, units in kept.items()}, scope=scope)
                assert counted == costs(costs.n_units | whole, scope=scope)


@pytest.mark.parametrize(
    "family,head", [*ONE_OF_EACH, ("gpt2", "GPT2LMHeadModel"), ("vit", "ViTForImageClassification")]
)
def test_solvers_and_ramps_keep_the_ties(family, head):
    structure, _ = limited(build(family, head))
    costs, sites = structure.costs.params, structure.sites
    for seed, share in enumerate((0.9, 0.7, 0.5)):
        scores = random_scores(sites, seed)
        budget = budget_of(structure, share)
        pressure = {kind: 1.0 for kind in equal_pressure(sites)}
        for keep in (
            solve_by_cost(scores, sites, costs, budget),
            solve_by_shares(scores, sites, costs, budget, pressure),
            keep_within(scores, sites, costs, budget, pressure, halvings=12),
        ):
            assert set(keep) == set(sites)
            assert costs(costs.n_units | {n: len(units) for n, units in keep.items()}) <= budget.limit
            for tie in structure.ties:
                shares = {len(keep[name]) / sites[name].n_units for name in tie.members}
                assert len(shares) <= 1
                assert all(len({len(keep[name]) for name in block}) == 1 for block in tie.blocks)
            for name, units in keep.items():  # the best of each site, whatever the others have
                if sites[name].kind != "layers" and len(units) < sites[name].n_units:
                    assert set(units) == set(torch.topk(scores[name], len(units)).indices.tolist())
            assert 0 < min(fractions_kept(keep, sites).values()) < 1


def test_what_is_left_under_the_limit_is_less_than_any_step():
    config = BertConfig(
        vocab_size=500, hidden_size=192, num_hidden_layers=3, num_attention_heads=12, intermediate_size=512
    )
    with torch.device("meta"):
        model = ibprune.models.build_model(config, type(build("bert", "BertModel")), device="meta")
    structure, _ = limited(model, ("heads", "hidden", "ffn"), round_to=8)
    costs, sites = structure.costs.params, structure.sites
    tied = tied_costs(structure.ties, costs, sites)
    for seed in range(10):
        budget = budget_of(structure, 0.2 + 0.07 * seed, round_to=8)
        keep = solve_by_cost(random_scores(sites, seed), sites, costs, budget)
        kept = {"tied widths": len(keep["encoder.layer.0.heads"]), "ffn": len(keep["encoder.layer.0.ffn"])}
        assert kept["ffn"] % 8 == 0 and len(keep["hidden"]) == 16 * kept["tied widths"]
        for name, step in (("tied widths", 1), ("ffn", 8)):
            if kept[name] < tied.n_units[name]:
                assert tied(tied.n_units | kept | {name: kept[name] + step}) > budget.limit


@pytest.mark.parametrize("score,steps", [("vib", 8), ("gradual", 8), ("kwon", 0)])
def test_a_run_ends_as_plain_transformers(folders, reviews, tmp_path, score, steps):
    out = tmp_path / "out"
    result = ibprune.prune(folders["BertForSequenceClassification"], 0.6, data=reviews, score=score, mask_steps=steps,
                           output=str(out), **QUICK)  # fmt: skip
    assert result.report["verify"]["tier"] == "vanilla" and "--vanilla" in result.report["command"]
    assert result.report["budget"]["achieved"] <= result.report["budget"]["limit"]
    assert result.report["kept"]["heads"] == result.report["kept"]["hidden"] and "embedding_rank" not in {
        kind for kind, share in result.report["kept"].items() if share < 1
    }
    assert not list(out.glob("*.py"))


def test_every_budget_of_several_does(folders, stories, tmp_path):
    out = tmp_path / "out"
    results = ibprune.prune(folders["LlamaForCausalLM"], (0.8, 0.5), data=stories, score="vib", mask_steps=8,
                            output=str(out), **QUICK)  # fmt: skip
    assert [result.report["verify"]["tier"] for result in results] == ["vanilla", "vanilla"]
    large, small = (result.plan.keep for result in results)
    assert all(set(small[name]) <= set(large[name]) for name in small)


def test_a_vocabulary_may_go_too(folders, reviews, tmp_path):
    found = plan(folders["BertForSequenceClassification"], 0.7, kinds=("heads", "hidden", "ffn", "vocab"), vanilla=True,
                 round_to=1)  # fmt: skip
    assert found["tier"] == "vanilla" and found["groups"]["vocab"]["cut"]


def test_what_cannot_be_is_said_in_one_line(folders, capsys):
    bert = folders["BertForSequenceClassification"]
    for arguments, reason in (
        (["--budget", "0.01"], ", cut more kinds, or leave out --vanilla"),
        (["--budget", "0.5", "--kinds", "ffn,embedding_rank"], "a factorised embedding takes code to load"),
        (
            ["--budget", "0.9", "--kinds", "heads,ffn"],
            "'heads' of 'bert' must stay whole: without code its size follows",
        ),
        (["--budget", "0.9", "--kinds", "layers,ffn"], "'layers' of 'bert' must stay whole: what is left of a removed"),
    ):
        assert main(["plan", "--model", bert, "--vanilla", *arguments]) == 2
        error = capsys.readouterr().err
        assert reason in error and len(error.splitlines()) == 1
    with pytest.raises(BadRecipe, match="no config of 'resnet' says that it has fewer channels"):
        plan(AutoConfig.for_model("resnet"), 0.5, vanilla=True)


def test_the_dry_run_says_what_stays_whole(folders, capsys):
    assert main(["plan", "--model", folders["BertModel"], "--budget", "0.9", "--vanilla", "--round-to", "1"]) == 0
    printed = capsys.readouterr().out
    assert "whole      heads: without code its size follows that of 'hidden'" in printed
    assert "loading    plain transformers" in printed


def test_the_number_of_heads_of_a_llama_divides_its_width():
    """Its config refuses anything else, and so do those of Gemma 2 and 3."""
    config = LlamaConfig(vocab_size=64, hidden_size=96, num_hidden_layers=2, num_attention_heads=12,
                         num_key_value_heads=6, intermediate_size=64)  # fmt: skip
    with torch.device("meta"):
        model = ibprune.models.build_model(config, type(build("llama", "LlamaForCausalLM")), device="meta")
    structure, _ = limited(model)
    counts = {tie.site.name: tie.site.counts for tie in structure.ties}
    assert counts["kv_groups"] == (1, 2, 3, 6) and counts["hidden"] == tuple(range(12, 97, 12))


@pytest.mark.parametrize("family,head", [("bert", "BertModel"), ("gemma", "GemmaModel"), ("swin", "SwinModel")])
def test_the_table_says_what_is_cut(family, head):
    """docs/families.md by scripts/family_table.py."""
    lines = (Path(__file__).parents[1] / "docs" / "families.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{family}` |"))
    model = build(family, head)
    kinds = {group.kind for group in find_family(family).groups} - {"vocab", "embedding_rank"}
    structure = prepare_(model, tuple(kinds), None)
    found, _ = plain_structure(model, structure, structure.costs.params, round_to=1)
    told = set(row.split("|")[-2].strip().split(", ")) - {"vocab"}
    assert told == {site.kind for site in found.sites.values()}
