"""Costs at full size: real configs without weights, on the meta device, against real counters."""

import pytest
import torch
import transformers
from conftest import random_keep
from torch.utils.flop_counter import FlopCounterMode

from ibprune.costs import count_params, macs_model, params_model
from ibprune.embeddings import factorize_
from ibprune.examples import example_inputs
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_

LENGTH = 128
_LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-5)
MODELS = {  # the published configs and parameter counts, from memory
    "bert-base-uncased": ("BertModel", transformers.BertConfig, {}, 109_482_240),
    "roberta-base": (
        "RobertaModel",
        transformers.RobertaConfig,
        dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
        124_645_632,
    ),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config, {}, 124_439_808),
    "vit-base-patch16-224": ("ViTForImageClassification", transformers.ViTConfig, dict(num_labels=1000), 86_567_656),
    "llama-2-7b": (
        "LlamaForCausalLM",
        transformers.LlamaConfig,
        _LLAMA | dict(vocab_size=32000, intermediate_size=11008, num_key_value_heads=32, max_position_embeddings=4096),
        6_738_415_616,
    ),
    "llama-3-8b": (
        "LlamaForCausalLM",
        transformers.LlamaConfig,
        _LLAMA | dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192),
        8_030_261_248,
    ),
    "qwen3-8b": (
        "Qwen3ForCausalLM",
        transformers.Qwen3Config,
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
        ),
        8_190_735_360,
    ),
}  # fmt: skip


def macs(model) -> int:
    """Multiply-accumulates of one sequence or image, by torch's own counter."""
    counter = FlopCounterMode(display=False)
    inputs = {key: value.to("meta") for key, value in example_inputs(model, batch=1, length=LENGTH).items()}
    with counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_costs_of_published_models_and_of_a_random_plan_are_exact(name):
    head, config_class, values, published = MODELS[name]
    with torch.device("meta"):
        model = getattr(transformers, head)(config_class(**values, attn_implementation="eager")).eval()
    assert count_params(model) == published
    dense = macs(model)
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    costs = params_model(model, sites), macs_model(model, sites, length=LENGTH)
    n_units = {site.name: site.n_units for site in sites.values()}
    assert [cost(n_units) for cost in costs] == [published, dense]
    plan = PruningPlan(model.config.model_type, n_units, random_keep(sites, 3))
    compact_(model, plan)
    assert [cost(plan.kept()) for cost in costs] == [count_params(model), macs(model)]
