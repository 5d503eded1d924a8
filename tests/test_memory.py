"""Budgets on memory: the formula is the bytes that weights and cache really take, for every row that writes text."""

import json

import pytest
import torch
from cnn_models import build_net
from conftest import LANGUAGE_MODELS, TINY, build, random_keep, token_ids
from torch.utils.data import DataLoader, TensorDataset
from transformers import EncoderDecoderCache

import ibprune
from ibprune import cli
from ibprune.costs import params_model
from ibprune.embeddings import factorize_
from ibprune.errors import BadRecipe
from ibprune.memory import measure_memory
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_
from ibprune.task_heads import complete, keeps_cache

SHORT = dict(score="magnitude", shares="cost", recover_steps=2, batch_size=8, max_length=16, audit=False, round_to=1)
WRITERS = [
    *((family, head) for family, head in LANGUAGE_MODELS.values() if head.endswith(("CausalLM", "LMHeadModel"))),
    ("t5", "T5ForConditionalGeneration"),
    ("bart", "BartForConditionalGeneration"),
]


@torch.no_grad()
def real_bytes(model, batch: int, length: int) -> int:
    """What the parameters take, and the cache after a forward pass."""
    ids = token_ids(batch, length)
    cache = model(**complete(model, {"input_ids": ids}), use_cache=True).past_key_values
    both = isinstance(cache, EncoderDecoderCache)
    stores = [cache.self_attention_cache, cache.cross_attention_cache] if both else [cache]
    layers = [layer for store in stores for layer in store.layers if layer.is_initialized]
    return sum(p.nbytes for p in model.parameters()) + sum(x.keys.nbytes + x.values.nbytes for x in layers)


@pytest.mark.parametrize("family,head", WRITERS)
def test_weights_and_cache_take_the_predicted_bytes(family, head):
    model = build(family, head, dtype=torch.float32)
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    keep = random_keep(sites, 2)
    first = next(name for name, site in sites.items() if site.kind in ("heads", "kv_groups", "layers"))
    keep[first] = keep[first] or (0,)  # some attention is left
    memory = measure_memory(model, params_model(model, sites), sites, dtype=torch.bfloat16, batch=3, length=9)
    plan = PruningPlan(model.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)
    assert memory.counts == "the weights in bfloat16 and the key-value cache of 3 x 9 tokens"
    small = compact_(model, plan).bfloat16()
    assert memory.model(plan.kept()) == real_bytes(small, 3, 9)


def test_only_what_writes_keeps_a_cache():
    for family, head in (("bert", "BertForMaskedLM"), ("llama", "LlamaForSequenceClassification"), ("t5", "T5Model")):
        model = build(family, head, dtype=torch.float32)
        sites = find_sites(model)
        params = params_model(model, sites)
        memory = measure_memory(model, params, sites, dtype=torch.float16, batch=3, length=9)
        assert not keeps_cache(model) and memory.counts == "the weights in float16"
        assert memory.model(params.n_units) == 2 * params(params.n_units)


@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_a_run_stays_below_its_budget_and_says_what_it_counts(scope, folders, stories, tmp_path):
    result = ibprune.prune(folders["LlamaForCausalLM"], 0.7, cost="memory", scope=scope, data=stories,
                           output=tmp_path / "out", **SHORT)  # fmt: skip
    budget, pruned, dense = (result.report[key] for key in ("budget", "pruned", "dense"))
    assert budget["counts"] == "the weights in float32 and the key-value cache of 8 x 16 tokens"
    assert 0.6 * budget["limit"] < budget["achieved"] <= budget["limit"]
    assert pruned["memory_bytes"] == real_bytes(ibprune.load(tmp_path / "out"), 8, 16)
    if scope == "model":
        assert budget["achieved"] == pruned["memory_bytes"] and budget["limit"] == int(0.7 * dense["memory_bytes"])
    else:  # embeddings and the final norm are left out
        assert budget["achieved"] < pruned["memory_bytes"]


def test_a_plan_counts_the_cache_that_it_is_asked_for(tmp_path, capsys):
    TINY["llama"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    flags = ["plan", "--model", str(tmp_path), "--budget", "0.5", "--cost", "memory"]
    assert cli.main([*flags, "--batch-size", "4", "--max-length", "10"]) == 0
    said = capsys.readouterr().out
    assert "bytes per unit" in said
    assert "bytes: the weights in bfloat16 and the key-value cache of 4 x 10 tokens" in " ".join(said.split())
    found = ibprune.plan(str(tmp_path), 0.5, cost="memory")["budget"]
    assert found["counts"].endswith("of 32 x 64 tokens")  # as a run trains: no more than the model can read
    plain, turned = (ibprune.plan(str(tmp_path), 0.6, cost="memory", **more) for more in ({}, {"rotate": True}))
    assert turned["budget"]["achieved"] <= turned["budget"]["limit"] == plain["budget"]["limit"]
    tied = ibprune.plan(str(tmp_path), 0.8, cost="memory", vanilla=True)
    assert tied["tier"] == "vanilla" and tied["budget"]["achieved"] <= tied["budget"]["limit"]
    for bad in (["--max-length", "65"], ["--cost", "params", "--batch-size", "4"]):
        assert cli.main([*flags, *bad]) == 2
        assert ("at most 64" in (said := capsys.readouterr().err)) or "expected --cost memory" in said


def test_a_module_is_held_by_its_parameters():
    net = build_net("resnet", dtype=torch.float32)
    x = torch.randn(16, 3, 12, 12)
    loader = DataLoader(TensorDataset(x, torch.randint(0, 3, (16,))), batch_size=8)
    settings = dict(cost="memory", train_loader=loader, score="magnitude", shares="cost", recover_steps=0)
    result = ibprune.prune(net, 0.5, **settings)
    assert result.report["budget"]["counts"] == "the weights in float32"
    achieved = result.report["budget"]["achieved"]
    assert achieved == sum(p.nbytes for p in result.model.parameters()) == result.report["pruned"]["memory_bytes"]
    assert achieved <= result.report["budget"]["limit"] == sum(p.nbytes for p in net.parameters()) // 2
    net.bn = torch.nn.BatchNorm2d(3).double()
    with pytest.raises(BadRecipe, match="one dtype"):
        ibprune.prune(net, 0.5, **settings)
