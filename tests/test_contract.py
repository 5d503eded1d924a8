"""The contract of every family row: masked == compacted == exported == reloaded, and exact costs."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    CASES,
    CLASSIFIERS,
    FLOAT32,
    LANGUAGE_MODELS,
    TINY,
    build,
    counted_macs,
    inputs_of,
    outputs,
    random_keep,
    token_ids,
    written,
)

from ibprune.costs import count_params, macs_model, params_model
from ibprune.embeddings import factorize_, merge_
from ibprune.errors import BadRecipe, UnsupportedModel
from ibprune.families import FAMILIES
from ibprune.inject import inject_, remove_
from ibprune.planning import plan
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, find_sites
from ibprune.structure import choose_kinds
from ibprune.surgery import compact_
from ibprune.task_heads import auto_class

CAUSAL = [(f, h) for f, h in CASES if auto_class(h, TINY[f]().model_type) == "AutoModelForCausalLM"]


def tolerance(family: str) -> float:
    return 1e-6 if family in FLOAT32 else 1e-12


def factorized(model):
    """Factorises the embedding where the family can."""
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    return model


def compacted(model, keep_of):
    sites = find_sites(model)
    n_units = {name: site.n_units for name, site in sites.items()}
    return compact_(model, PruningPlan(model.config.model_type, n_units, keep_of(sites)))


def test_every_row_has_a_case():
    assert {name for family in FAMILIES for name in family.model_types} == set(CLASSIFIERS)


@pytest.mark.parametrize("family,head", CASES)
def test_injection_and_factorising_change_nothing(family, head):
    model = build(family, head)
    before, keys = outputs(model), set(model.state_dict())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    sites = find_sites(model)
    inject_(model, sites)
    assert torch.equal(outputs(model), before)
    assert keys == {key for key in model.state_dict() if not key.startswith("vib_masks")}
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    for name, mask in twin.vib_masks.items():  # a copy reads its own masks, everywhere
        mask.cut(tuple(range(max(1, sites[name].min_units))))
    assert not torch.equal(outputs(twin), before) and torch.equal(outputs(model), before)
    norms = [module for module in twin.modules() if "forward" in vars(module)]
    assert all(module.forward.norm is module for module in norms)
    layer_norm = any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    assert bool(norms) == (layer_norm and any(site.mask_at.side == "norms" for site in sites.values()))
    remove_(model)
    assert not [m for m in model.modules() if "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks]
    assert set(model.state_dict()) == keys
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    factorized(model)
    assert torch.allclose(outputs(model), before, atol=100 * tolerance(family))
    merge_(model)
    assert set(model.state_dict()) == keys
    assert torch.allclose(outputs(model), before, atol=100 * tolerance(family))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family,head", CASES)
def test_masked_equals_compacted_at_the_predicted_cost(family, head, seed):
    masked_equals_compacted(build(family, head), tolerance(family), seed)


def masked_equals_compacted(model, allowed, seed):
    factorized(model)
    sites = find_sites(model)
    masks = inject_(model, sites)
    keep = random_keep(sites, seed)
    torch.manual_seed(seed)
    for _, mask in masks.items():
        mask.mu.data.uniform_(0.5, 1.5)
    masks.set_keep(keep)
    masked = outputs(model)
    params, macs = params_model(model, sites), macs_model(model, sites, length=7)
    plan = PruningPlan(model.config.model_type, {n: s.n_units for n, s in sites.items()}, keep)
    compact_(model, plan)
    small = outputs(model)
    if small.shape != masked.shape:  # a base model: its features are the residual's
        masked = masked[..., list(keep["hidden"])]
    assert (masked - small).abs().max() < allowed
    assert params(plan.kept()) == count_params(model)
    assert macs(plan.kept()) == counted_macs(model, {key: value[:1] for key, value in inputs_of(model).items()})


@pytest.mark.parametrize("family,head", [("bert", "BertForMaskedLM"), ("llama-tied", "LlamaForCausalLM")])
def test_keeping_everything_is_the_dense_model(family, head):
    model = build(family, head)
    before, size = outputs(model), count_params(model)
    factorize_(model)
    sites = find_sites(model)
    keep = {name: tuple(range(site.n_units)) for name, site in sites.items()}
    compact_(model, PruningPlan(model.config.model_type, {n: s.n_units for n, s in sites.items()}, keep))
    assert count_params(model) == size
    assert torch.allclose(outputs(model), before, atol=1e-6)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_every_mask_gets_a_gradient_and_only_masks_do(model_type):
    model = factorized(build(*CLASSIFIERS[model_type]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites = find_sites(model)
    masks = inject_(model, sites).train()
    torch.manual_seed(0)
    model(**inputs_of(model))[0].square().sum().backward()
    for name, mask in masks.items():
        assert mask.mu.grad is not None and mask.mu.grad.abs().sum() > 0, name
        assert mask.log_var.grad.abs().sum() > 0, name
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("vib_masks"))


def test_a_gqa_unit_is_a_key_value_head_with_the_query_heads_that_read_it():
    model = build("llama", "LlamaForCausalLM")
    sites = find_sites(model)
    masks = inject_(model, sites)
    layer, unit, group, width = 1, 2, 2, 4  # 6 query heads on 3 KV heads of width 4
    seen = {}
    attention = model.model.layers[layer].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    keep = {name: tuple(range(site.n_units)) for name, site in sites.items()}
    keep[f"layers.{layer}.kv_groups"] = tuple(i for i in range(3) if i != unit)
    masks.set_keep(keep)
    outputs(model)
    heads = seen["x"].view(2, 7, 6, width)
    gone = [h for h in range(6) if heads[:, :, h].abs().max() == 0]
    assert gone == list(range(unit * group, (unit + 1) * group))


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_eager_equals_sdpa_and_bfloat16_runs(model_type):
    model = compacted(
        factorized(build(*CLASSIFIERS[model_type], dtype=torch.float32)), lambda sites: random_keep(sites, 3)
    )
    eager = outputs(model)
    if type(model)._supports_sdpa:
        model.set_attn_implementation("sdpa")
    assert torch.allclose(outputs(model), eager, atol=1e-5)
    assert torch.isfinite(outputs(model.bfloat16())).all()


def test_masks_stay_in_float32_and_noise_is_shared_by_the_tokens_of_a_sequence():
    model = build("bert", "BertModel", dtype=torch.bfloat16)
    masks = inject_(model, find_sites(model)).bfloat16()
    assert all(p.dtype == torch.float32 for p in masks.parameters())
    mask = masks["encoder.layer.0.ffn"].train()
    z = mask(5)
    assert z.shape == (5, 20) and len(z.unique()) == 100


@pytest.mark.parametrize("family,head", CAUSAL)
def test_generation_with_and_without_cache_agrees_after_losing_the_first_attention(family, head):
    def keep_of(sites):
        keep = random_keep(sites, 4) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
        return keep | {name: () for name in sites if name.endswith(".0.attention_sublayer")}

    model = compacted(factorized(build(family, head, dtype=torch.float32)), keep_of)
    made = [
        model.generate(token_ids(), max_new_tokens=12, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*made)
    assert len(made[0][0]) == 19


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["bart", "bart-scaled", "t5", "t5-gated"])
def test_an_encoder_decoder_writes_alike_with_and_without_cache_after_losing_attentions(family, beams):
    def keep_of(sites):  # the first attentions of the decoder that can go
        keep = random_keep(sites, 4) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
        first = [name for name in keep if name.startswith("decoder") and name.endswith("attention_sublayer")][:2]
        assert len({name.rpartition(".0.")[2] for name in first}) == 2 or family.startswith("t5")
        return keep | dict.fromkeys(first, ())

    (head,) = (h for f, h in CASES if f == family and h.endswith("Generation"))
    model = compacted(build(family, head, dtype=torch.float32), keep_of)
    (ids, logits), (same, other) = (written(model, beams=beams, cache=cache) for cache in (True, False))
    assert torch.equal(ids, same) and torch.allclose(logits, other, atol=1e-5 * logits.abs().max())
    assert len(logits) == 8 and (logits[0] - logits[-1]).abs().max() > 1e-3 * logits.abs().max()


@pytest.mark.parametrize(
    "family,head,options",
    [
        ("vit", "ViTForImageClassification", {"interpolate_pos_encoding": True}),
        ("clip_vision_model", "CLIPVisionModelWithProjection", {"interpolate_pos_encoding": True}),
        ("dinov2", "Dinov2ForImageClassification", {}),
        ("beit", "BeitForImageClassification", {}),
    ],
)
def test_images_of_another_size_find_their_positions_after_pruning(family, head, options):
    model = build(family, head)
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sites = find_sites(model)
    keep = random_keep(sites, 2) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
    with torch.no_grad():
        inject_(model, sites).set_keep(keep)
        masked = model(pixel_values=image, **options)[0]
        compact_(model, PruningPlan(model.config.model_type, {n: s.n_units for n, s in sites.items()}, keep))
        assert (model(pixel_values=image, **options)[0] - masked).abs().max() < 1e-6


@pytest.mark.parametrize(
    "family,kind",
    [
        ("mpnet", "heads"),
        ("olmo2", "hidden"),
        ("phi3", "heads"),
        ("albert", "layers"),
        ("t5", "embedding_rank"),
        ("swin", "hidden"),
    ],
)
def test_the_error_for_a_kind_that_a_family_cannot_cut_says_why(family, kind):
    model = build(*LANGUAGE_MODELS[family])
    with pytest.raises(BadRecipe, match=dict(find_family(family).uncut)[kind]):
        choose_kinds(model, (kind,))


@pytest.mark.parametrize(
    "family,head",
    [
        ("albert", "AlbertForMaskedLM"),
        ("deberta-v3", "DebertaV2ForSequenceClassification"),
        ("bart", "BartForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_plans_are_made_from_the_config_alone_and_leave_it_as_it_is(family, head):
    config = TINY[family]()
    config.architectures = [head]
    before = config.to_dict()
    found = plan(config, 0.5, round_to=1)
    assert config.to_dict() == before
    assert found["dense"]["params"] == count_params(build(family, head))
    assert found["budget"]["achieved"] <= found["budget"]["limit"] and found["tier"] == "remote_code"


def test_models_outside_the_table_are_refused():
    with pytest.raises(UnsupportedModel, match="no family describes model_type 'xlnet'.*bert.*llama"):
        find_sites(
            transformers.XLNetModel(transformers.XLNetConfig(n_layer=1, d_model=8, n_head=2, d_inner=8, vocab_size=10))
        )
    model = build("bert", "BertModel")
    model.extra = torch.nn.Linear(24, 2)
    with pytest.raises(UnsupportedModel, match="'extra.weight'"):
        find_sites(model)
    model = build("llama", "LlamaForCausalLM")
    mlp = model.model.layers[1].mlp
    mlp.gate, mlp.gate_proj = mlp.gate_proj, None
    with pytest.raises(UnsupportedModel, match="gate_proj"):
        find_sites(model)
    for change, reason in (
        (dict(norm_rel_ebd="none"), "encoder.LayerNorm"),  # positions read without a norm
        (dict(conv_kernel_size=3, conv_groups=2), "found 2 groups"),
        (dict(legacy=False), "lm_predictions"),  # multiplies with the embeddings itself
        (dict(embedding_size=16), "word_embeddings"),  # widened by a matrix
    ):
        config = transformers.DebertaV2Config(**TINY["deberta-v3"]().to_dict() | change)
        with pytest.raises(UnsupportedModel, match=reason):
            find_sites(transformers.DebertaV2ForMaskedLM(config))
    with pytest.raises(UnsupportedModel, match=r"the norm 'model\.decoder\.\S+' to have a weight, found none"):
        find_sites(build("opt", "OPTForCausalLM", layer_norm_elementwise_affine=False))
    model = build("bert", "BertForMultipleChoice")  # reads several sequences at once
    with pytest.raises(UnsupportedModel, match="expected a BertForMultipleChoice to read a sequence of 7 tokens"):
        macs_model(model, find_sites(model), length=7)


DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)


@pytest.mark.parametrize(
    "family,head,changes",
    [
        ("llama", "LlamaForCausalLM", dict(rope_parameters=DYNAMIC, max_position_embeddings=6)),
        (
            "modernbert",
            "ModernBertForMaskedLM",
            dict(rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), DYNAMIC)),
        ),
        ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", dict(num_register_tokens=0)),
    ],
)
def test_frequencies_that_follow_the_length_and_tokens_that_are_none(family, head, changes):
    masked_equals_compacted(build(family, head, **changes), tolerance(family), 3)


def test_the_readme_lists_every_row_with_its_kinds():
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    for family in FAMILIES:
        for model_type in family.model_types:
            (row,) = (line for line in lines if line.startswith("|") and f"`{model_type}`" in line)
            kinds = tuple(dict.fromkeys(group.kind for group in family.groups))
            assert set(re.findall(r"`(\w+)`", row.rpartition("| ")[2])) == set(kinds), model_type


def test_the_table_of_loading_ways_has_every_row():
    """docs/families.md by scripts/family_table.py: a cell for every kind of the family, and no other."""
    lines = (Path(__file__).parents[1] / "docs" / "families.md").read_text().splitlines()
    (head,) = (line for line in lines if line.startswith("| model type"))
    columns = re.findall(r"\| `(\w+)` ", head)
    for family in FAMILIES:
        for model_type in family.model_types:
            (row,) = (line for line in lines if line.startswith(f"| `{model_type}` |"))
            cells = dict(zip(columns, [cell.strip() for cell in row.split("|")[2:]]))
            assert {kind for kind, cell in cells.items() if cell != "–"} == {g.kind for g in family.groups}, model_type
