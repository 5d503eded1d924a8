"""Experts as units: who is routed to, how they are computed, and what of it a folder keeps."""

import json

import pytest
import torch
import transformers
from conftest import TINY, build, outputs, random_keep, token_ids
from safetensors.torch import load_file
from test_folders import uniform

import ibprune
from ibprune import cli
from ibprune.budget import make_budget, solve_by_cost
from ibprune.console import Quiet
from ibprune.errors import BadRecipe, PlanMismatch
from ibprune.folders import tier_of, verify, write_model
from ibprune.inject import inject_
from ibprune.losses import Objective
from ibprune.plans import PruningPlan
from ibprune.scores import fisher_scores
from ibprune.sites import find_sites
from ibprune.structure import choose_kinds, prepare_
from ibprune.surgery import compact_

MIXTRAL, QWEN = ("mixtral", "MixtralForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM")


def cut(model, keep_of):
    sites = find_sites(model)
    plan = PruningPlan(model.config.model_type, {n: s.n_units for n, s in sites.items()}, keep_of(sites))
    return compact_(model, plan), plan


def routes(model, layer: int = 0) -> dict[str, torch.Tensor]:
    """What the router of a layer hands on at the next passes: logits, weights and chosen experts of every token."""
    seen = {}
    gate = model.model.layers[layer].mlp.gate
    gate.register_forward_hook(lambda module, args, out: seen.update(zip(("logits", "weights", "chosen"), out)))
    return seen


@pytest.mark.parametrize("family,head", [MIXTRAL, QWEN])
def test_tokens_are_routed_among_the_kept_experts_only(family, head):
    model = build(family, head)
    sites = find_sites(model)
    masks = inject_(model, sites)
    seen = routes(model)
    outputs(model)
    dense = seen.copy()
    gone = dense["chosen"].mode().values[0].item()  # a popular one
    kept = tuple(i for i in range(sites["layers.0.experts"].n_units) if i != gone)
    masks["layers.0.experts"].cut(kept)
    outputs(model)
    assert gone in dense["chosen"] and gone not in seen["chosen"]
    assert torch.isneginf(seen["logits"][:, gone]).all()
    assert torch.allclose(seen["logits"][:, kept], dense["logits"][:, kept])
    shares = dense["logits"][:, kept].float().softmax(-1).topk(seen["chosen"].shape[1]).values
    if family == "mixtral":
        shares = shares / shares.sum(-1, keepdim=True)
    assert torch.allclose(seen["weights"], shares.to(seen["weights"]), atol=1e-6)


def test_an_expert_s_noise_is_shared_by_the_tokens_of_a_sequence():
    model = build(*MIXTRAL)
    seen = routes(model)
    outputs(model)
    before = seen["weights"]
    mask = inject_(model, find_sites(model))["layers.0.experts"].train()
    again = routes(model)  # behind the mask
    torch.manual_seed(0)
    outputs(model)
    assert torch.equal(seen["chosen"], again["chosen"])
    factors, (batch, length) = again["weights"] / before, token_ids().shape
    for expert in range(len(mask.mu)):
        taken = [
            factors[i * length : (i + 1) * length][again["chosen"][i * length : (i + 1) * length] == expert]
            for i in range(batch)
        ]
        assert all(torch.allclose(row, row[:1], atol=1e-6) for row in taken)
    first, second = factors[:length], factors[length:]
    assert not torch.isin(first.round(decimals=7), second.round(decimals=7)).any()


@pytest.mark.parametrize("family,head", [MIXTRAL, QWEN])
def test_every_way_of_computing_experts_agrees_masked_and_compacted(family, head):
    model = build(family, head, dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    sites = find_sites(model)
    masks = inject_(model, sites)
    keep = uniform(sites, experts=4, ffn=8, hidden=16)
    masks.set_keep(keep)
    torch.manual_seed(0)
    for _, mask in masks.items():
        mask.mu.data.uniform_(0.5, 1.5)

    def found():
        made = []
        for way in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(way)
            made.append(outputs(model))
        return made

    masked = found()
    cut(model, lambda sites: keep)
    assert all(torch.allclose(made, masked[0], atol=1e-5) for made in (*masked, *found()))


@pytest.mark.parametrize("units", [{"experts": 4, "kv_groups": 2}, {"experts": 4, "ffn": 6}])
@pytest.mark.parametrize("family,head", [MIXTRAL, QWEN])
def test_evenly_many_experts_load_with_plain_transformers(family, head, units, tmp_path, tokenizer):
    """Widths that the fastest product does not take say so in the config."""
    model = build(family, head, dtype=torch.float32)
    model.config._experts_implementation = "grouped_mm"  # the default
    model, plan = cut(model, lambda sites: uniform(sites, **({"ffn": 8} | units)))
    assert write_model(model, tokenizer, plan, tmp_path) == "vanilla"
    names = load_file(tmp_path / "model.safetensors")  # as the published checkpoints'
    apart = "block_sparse_moe.experts.3.w2" if family == "mixtral" else "mlp.experts.3.down_proj"
    assert f"model.layers.2.{apart}.weight" in names and "model.layers.2.mlp.experts.down_proj" not in names
    assert torch.allclose(outputs(ibprune.load(tmp_path)), outputs(model), atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_local_experts"] == 4 and "ibprune" not in config
    assert config.get("experts_implementation") == (None if "kv_groups" in units else "eager")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = token_ids()
    assert torch.allclose(outputs(plain), outputs(model), atol=1e-5)
    losses = [m(ids, output_router_logits=True).aux_loss for m in (model, plain)]
    assert torch.allclose(*losses) and losses[0] > 0


def test_a_config_that_asks_for_the_loss_of_balance_is_pruned_without_it(tmp_path, tokenizer):
    model = build(*MIXTRAL, dtype=torch.float32)
    model.config.output_router_logits = True
    whole = lambda sites: {n: (0,) for n, s in sites.items() if s.kind == "layers"}  # noqa: E731
    model, plan = cut(model, lambda sites: random_keep(sites, 5) | whole(sites))
    counts = [layer.mlp.gate.num_experts for layer in model.model.layers]
    assert len(set(counts)) > 1 and counts == [len(layer.mlp.experts.down_proj) for layer in model.model.layers]
    tier = write_model(model, tokenizer, plan, tmp_path)
    assert tier == tier_of(model) == "remote_code" and verify(model, tmp_path, tier)["max_abs_diff"] <= 1e-5
    loaded = ibprune.load(tmp_path)
    assert not loaded.config.output_router_logits
    assert [layer.mlp.gate.num_experts for layer in loaded.model.layers] == counts


def test_layers_with_one_ffn_among_the_sparse_ones_keep_it():
    model = build(*QWEN)
    sites = find_sites(model)
    named = {layer: {n.rpartition(".")[2] for n in sites if n.startswith(f"layers.{layer}.")} for layer in range(3)}
    assert "ffn" in named[1] and not {"experts", "expert_ffn"} & named[1]
    assert all({"experts", "expert_ffn"} <= named[layer] and "ffn" not in named[layer] for layer in (0, 2))
    assert {sites["layers.1.ffn"].n_units, sites["layers.0.expert_ffn"].n_units} == {20, 12}
    keep = uniform(sites) | {n: () for n in sites if n.startswith("layers.0.") and n.endswith("_sublayer")}
    model, _ = cut(model, lambda sites: keep)
    assert model.config.num_hidden_layers == 2 and hasattr(model.model.layers[0].mlp, "gate_proj")
    assert tier_of(model) == "remote_code"  # the config counts its dense layers from the dense model's first


def test_scores_are_of_whole_sequences_and_experts_without_tokens_score_nothing():
    model = build(*QWEN, dtype=torch.float32)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.top_k = 1
    sites = find_sites(model)
    masks = inject_(model, sites)
    ids = token_ids(length=2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    options = dict(seed=0, console=Quiet())
    both = fisher_scores(model, masks, [batch], Objective("causal_lm"), total=1, **options)
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    apart = fisher_scores(model, masks, single, Objective("causal_lm"), total=2, **options)
    assert all(torch.allclose(both[name], apart[name]) for name in both)
    for name in ("layers.0.experts", "layers.2.experts"):
        assert 1 <= (both[name] > 0).sum() <= 4 and (both[name] == 0).any()  # 4 tokens choose among 6 experts
    assert (both["layers.0.expert_ffn"] > 0).all()


def test_as_many_experts_stay_as_a_token_takes():
    model = build(*MIXTRAL)
    with pytest.raises(PlanMismatch, match=r"at least 2 unit\(s\), the plan keeps 1"):
        cut(model, lambda sites: uniform(sites) | {"layers.1.experts": (3,)})
    config = TINY["mixtral"]()
    config.architectures = ["MixtralForCausalLM"]
    with pytest.raises(BadRecipe, match="cutting experts cannot go below.*ask for at least"):
        ibprune.plan(config, 0.2, kinds=("experts",))
    found = ibprune.plan(config, 0.6, kinds=("experts",))
    assert found["groups"]["experts"]["min_units"] == 6 and found["budget"]["achieved"] <= found["budget"]["limit"]
    with pytest.raises(BadRecipe, match="'llama' has no units 'experts': every token runs through all of each FFN"):
        choose_kinds(build("llama", "LlamaForCausalLM"), ("experts",))


def test_a_layer_that_comes_back_has_as_many_experts_as_a_token_takes():
    structure = prepare_(build(*MIXTRAL, dtype=torch.float32), ("experts", "ffn", "layers"), None)
    sites, params = structure.sites, structure.costs.params
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(site.n_units, generator=generator) ** 8 for name, site in sites.items()}
        scores |= {name: 1e-3 * score for name, score in scores.items() if name.endswith("sublayer")}  # these go first
        budget = make_budget(params, sites, keep=0.6, scope="model", round_to=1)
        keep = solve_by_cost(scores, sites, params, budget)
        assert all(len(keep[name]) >= site.min_units for name, site in sites.items())


def test_an_expert_costs_no_more_macs_than_its_row_of_the_router():
    config = TINY["mixtral"]()
    config.architectures = ["MixtralForCausalLM"]
    params, macs = (ibprune.plan(config, 0.99, cost=cost, kinds=("experts", "ffn")) for cost in ("params", "macs"))
    assert params["groups"]["experts"]["cost_per_unit"] == 24 + 3 * 20 * 24
    assert macs["groups"]["experts"]["cost_per_unit"] == 24 * macs["macs_length"]
    assert macs["groups"]["ffn"]["cost_per_unit"] == 2 * 3 * 24 * macs["macs_length"]  # two experts a token


@pytest.mark.parametrize("cost,budget", [("params", 0.5), ("macs", 0.7)])
def test_a_whole_run_on_a_mixture_of_experts(cost, budget, stories, tokenizer, tmp_path, capsys):
    dense, out = tmp_path / "dense", tmp_path / "out"
    build(*MIXTRAL, dtype=torch.float32).save_pretrained(dense)  # one tensor for every matrix of every expert
    tokenizer.save_pretrained(dense)
    assert cli.main(["plan", "--model", str(dense), "--budget", str(budget), "--cost", cost, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    flags = ["--model", str(dense), "--data", stories, "--budget", str(budget), "--cost", cost, "--batch-size", "16"]
    flags += ["--mask-steps", "6", "--recover-steps", "4", "--max-length", "16", "--kinds", "kv_groups,experts,ffn"]
    assert cli.main([*flags, "--output", str(out), "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dense"]["params"] == planned["dense"]["params"]
    assert report["budget"]["achieved"] <= report["budget"]["limit"]
    loaded = ibprune.load(out)
    assert sum(p.numel() for p in loaded.parameters()) == report["pruned"]["params"]
    assert all(2 <= layer.mlp.gate.num_experts <= 5 for layer in loaded.model.layers)
