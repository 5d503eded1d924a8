"""Attention heads in the audit: what a head looks at, which head is which, and kept against removed ones."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import WORDS, build, token_ids
from test_audit import FAST, inputs

import ibprune
from ibprune.attention import (
    attention_measures,
    attention_modules,
    eager_attention,
    head_means,
    kept_heads,
    kept_units,
    largest_error,
    read_heads,
)
from ibprune.auditing import Side, audit
from ibprune.errors import BadData, PlanMismatch
from ibprune.head_patterns import choose_keywords, contrast, head_contrasts
from ibprune.inputs import special_ids, spread
from ibprune.mi.samples import BadSamples
from ibprune.plans import PruningPlan, full_plan
from ibprune.plots import draw_audit, head_entropy
from ibprune.sites import find_sites
from ibprune.surgery import compact_

CLS, SEP, GOOD = 2, 3, 9
IDS = torch.tensor([[CLS, 7, GOOD, 8, SEP]])
ONES = torch.ones(1, 5, dtype=torch.long)


def looking(*targets: int) -> torch.Tensor:
    """A head whose query i looks at the one key targets[i], (tokens, tokens)."""
    return torch.eye(len(targets))[list(targets)]


def plan_for(model, keep: dict[str, tuple[int, ...]]) -> PruningPlan:
    full = full_plan(model, find_sites(model))
    return PruningPlan(full.model_type, full.n_units, full.keep | keep)


def measure(heads: list[torch.Tensor], ids=IDS, mask=ONES, *, causal: bool = False) -> dict[str, list[float]]:
    found = attention_measures(
        torch.stack(heads)[None], mask, ids, causal=causal, special=(CLS, SEP), keywords=(GOOD, 50)
    )
    return {name: values[0].tolist() for name, values in found.items()}


def test_heads_with_known_shares():
    even = torch.full((5, 5), 0.2)
    found = measure([looking(0, 0, 1, 2, 3), looking(0, 1, 2, 3, 4), looking(4, 0, 4, 0, 4), looking(*[2] * 5), even])
    assert found["previous"] == pytest.approx([1.0, 0.0, 0.25, 0.25, 0.2])  # of four queries: the first has none
    assert found["current"] == pytest.approx([0.2, 1.0, 0.2, 0.2, 0.2])
    assert found["special"] == pytest.approx([0.4, 0.4, 1.0, 0.0, 0.4])
    assert found["keywords"] == pytest.approx([0.2, 0.2, 0.0, 1.0, 0.2])
    assert found["entropy_norm"] == pytest.approx([0.0, 0.0, 0.0, 0.0, 1.0])


def test_an_even_causal_head_has_entropy_one():
    even = torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None]
    assert measure([even], causal=True)["entropy_norm"] == pytest.approx([1.0])
    assert measure([even])["entropy_norm"][0] < 0.8
    assert measure([even], causal=True)["current"] == pytest.approx([sum(1 / i for i in range(1, 6)) / 5])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_ignored(side):
    heads = torch.softmax(torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0)), -1)
    heads[0] = looking(0, 0, 1, 2, 3)
    first = 0 if side == "right" else 3
    wide = torch.full((3, 8, 8), 0.125)  # rows of padded queries hold anything
    wide[:, first : first + 5] = 0.0
    wide[:, first : first + 5, first : first + 5] = heads
    ids, mask = torch.full((1, 8), CLS), torch.zeros(1, 8, dtype=torch.long)  # the padding's id is a special one
    ids[:, first : first + 5], mask[:, first : first + 5] = IDS, 1
    expected, found = measure(list(heads)), measure(list(wide), ids, mask)
    assert expected["previous"][0] == 1.0
    for name in expected:
        assert found[name] == pytest.approx(expected[name]), name


def test_what_an_input_lacks_is_missing_and_never_zero():
    single = measure([torch.eye(5)], mask=torch.tensor([[1, 0, 0, 0, 0]]))
    assert math.isnan(single["entropy_norm"][0]) and math.isnan(single["previous"][0])
    assert math.isnan(single["keywords"][0]) and single["current"] == [1.0]
    with_keyword, without = np.array([[0.2, 0.4]]), np.array([[np.nan, np.nan]])
    means = head_means({"keywords": np.concatenate([with_keyword, without]), "special": without})
    assert means["keywords"].tolist() == [0.2, 0.4] and means["special"] is None
    spread_out = np.array([[0.0, 0.5], [0.4, 0.5], [np.nan, np.nan]])
    errors = largest_error({"keywords": with_keyword, "current": np.full((2, 2), 0.3)}, {"current": spread_out})
    assert errors == {"keywords": None, "current": pytest.approx(0.2)}  # sd 0.2828 over the root of 2


def test_shapes_that_do_not_belong_together():
    with pytest.raises(BadSamples, match="expected attention"):
        attention_measures(torch.ones(1, 2, 3, 4), torch.ones(1, 4), torch.ones(1, 4), causal=False)
    with pytest.raises(BadSamples, match="mask"):
        attention_measures(torch.ones(1, 2, 5, 5), torch.ones(2, 5), torch.ones(2, 5), causal=False)


@pytest.mark.parametrize(
    "family,head",
    [("bert", "BertForSequenceClassification"), ("llama-tied", "LlamaForCausalLM"), ("t5", "T5EncoderModel")],
)
def test_reading_agrees_with_the_attentions_of_transformers(family, head):
    model = build(family, head)
    model.set_attn_implementation("sdpa")
    ids = token_ids(3, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:]}]
    found = read_heads(model, batches, special=(int(ids[0, 0]),))
    assert model.config._attn_implementation == "sdpa"
    with eager_attention(model):
        given = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    for (block, measures), attention in zip(found.items(), given, strict=True):
        expected = attention_measures(attention, mask, ids, causal=family == "llama-tied", special=(int(ids[0, 0]),))
        assert block in attention_modules(model)
        for name, values in measures.items():
            assert np.allclose(values, expected[name].detach().numpy(), equal_nan=True, atol=1e-9), (block, name)


def test_a_block_that_runs_several_times_is_read_at_its_last_run():
    model = build("albert", "AlbertModel")
    (block,) = (found := read_heads(model, [{"input_ids": token_ids()}, {"input_ids": token_ids()}]))
    with eager_attention(model):
        last = model(input_ids=token_ids(), output_attentions=True).attentions[-1]
    expected = attention_measures(last, torch.ones_like(token_ids()), token_ids(), causal=False)
    for name in ("entropy_norm", "current"):
        values = expected[name].detach().numpy()
        assert np.allclose(found[block][name], np.concatenate([values, values]), atol=1e-9), name


@pytest.mark.parametrize("family,head", [("bart", "BartModel"), ("t5", "T5ForConditionalGeneration")])
def test_of_an_encoder_decoder_the_encoder_s_heads_are_read(family, head):
    model = build(family, head)
    site = "encoder.heads" if family == "t5" else "encoder.layers.1.heads"  # T5's are cut in all blocks alike
    kept = kept_units(plan_for(model, {site: (0, 3)}), model)
    found = read_heads(model, [{"input_ids": token_ids()}])
    assert list(found) == list(kept) == [path for path in attention_modules(model) if path.startswith("encoder")]
    assert list(kept.values())[1] == (4, (0, 3)) and all(v["current"].shape == (2, 4) for v in found.values())


def test_the_implementation_is_restored_after_an_error_too():
    model = build("bert", "BertModel")
    model.set_attn_implementation("sdpa")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(IndexError):
        read_heads(model, [{"input_ids": torch.tensor([[1, 10_000]])}])
    assert model.config._attn_implementation == "sdpa"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_attention_without_probabilities_is_not_read_as_removed(monkeypatch):
    model = build("bert", "BertModel", dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    assert read_heads(model, [{"input_ids": token_ids()}]) is None
    found = audit(Side("a", model), Side("b", copy.deepcopy(model)), inputs(labels=False), settings=FAST)
    assert all(layer["heads"] is None for layer in found["layers"])


def test_the_audit_of_a_pruned_bert_shows_removed_heads_as_null(tmp_path):
    dense = build("bert", "BertForSequenceClassification", dtype=torch.float32)
    site = "encoder.layer.{}.{}".format
    plan = plan_for(dense, {site(0, "heads"): (1, 3), site(2, "attention_sublayer"): ()})
    small = compact_(copy.deepcopy(dense), plan)
    found = audit(Side("a", dense), Side("b", small), inputs(labels=False), settings=FAST, plan=plan)
    json.dumps(found, allow_nan=False)
    heads = [layer["heads"] for layer in found["layers"]]
    assert heads[0] is None  # the embeddings have no attention
    first, second, third = (record["attn_entropy_norm"] for record in heads[1:])
    assert first[1][0] is None and first[1][2] is None and len(first[1]) == 4
    # before the cut of block 0 shows, its remaining heads read the same input as in the dense model
    assert [first[1][1], first[1][3]] == pytest.approx([first[0][1], first[0][3]], abs=1e-5)
    assert None not in second[0] + second[1] and second[0] != second[1]
    assert third[1] == [None] * 4 and None not in third[0]
    assert heads[1]["aligned"] and heads[1]["n"] == 240 and heads[1]["status"] == "ok"
    assert heads[1]["attn_previous"][1][0] is None and heads[1]["attn_special"] is None  # no special tokens given
    assert 0 < heads[1]["se"]["attn_entropy_norm"] < 0.05 and heads[1]["se"]["attn_special"] is None
    names = draw_audit(found, tmp_path)
    assert "head_entropy" in names and (tmp_path / "head_entropy.png").stat().st_size > 1000
    hatched = [[p for p in axes.patches if p.get_hatch()] for axes in head_entropy(found).axes[:2]]
    assert [len(patches) for patches in hatched] == [0, 6]


def test_heads_of_a_group_go_together_and_a_removed_block_is_null():
    dense = build("llama", "LlamaForCausalLM", dtype=torch.float32)
    site = "layers.{}.{}".format
    plan = plan_for(dense, {site(0, "kv_groups"): (2,), site(1, "attention_sublayer"): (), site(1, "ffn_sublayer"): ()})
    small = compact_(copy.deepcopy(dense), plan)
    assert list(attention_modules(small)) == ["layers.0", "layers.2"]
    found = audit(Side("a", dense), Side("b", small), inputs(labels=False), settings=FAST, plan=plan)
    first, second, third = (layer["heads"]["attn_entropy_norm"] for layer in found["layers"][1:])
    assert [value is None for value in first[1]] == [True] * 4 + [False] * 2
    assert first[1][4:] == pytest.approx(first[0][4:], abs=1e-5)
    assert second[1] == [None] * 6 and None not in third[1]


def test_without_a_plan_the_heads_left_are_listed_unaligned():
    dense = build("bert", "BertModel", dtype=torch.float32)
    plan = plan_for(dense, {"encoder.layer.1.heads": (0, 3)})
    small = compact_(copy.deepcopy(dense), plan)
    other = plan_for(dense, {"encoder.layer.1.heads": (3,)})
    for known in (None, other):  # a plan that does not fit says nothing either
        found = audit(Side("a", dense), Side("b", small), inputs(labels=False), settings=FAST, plan=known)
        first, second = found["layers"][1], found["layers"][2]
        assert first["heads"]["aligned"] and not second["heads"]["aligned"]
        assert [len(side) for side in second["heads"]["attn_entropy_norm"]] == [4, 2]
        assert None not in second["heads"]["attn_entropy_norm"][1]
        assert [w["code"] for w in second["warnings"] if "HEADS" in w["code"]] == ["HEADS_UNALIGNED"]
        assert head_entropy(found) is not None


def test_a_pruned_folder_brings_its_plan(folders, tmp_path):
    rng = random.Random(5)
    source, small, data = folders["BertModel"], tmp_path / "small", tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", 40), ("dev", 210)):
        lines = ["sentence", *(" ".join(rng.choices(WORDS, k=9)) for _ in range(rows))]
        (data / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    options = {"kinds": ("heads",), "scope": "blocks", "mask_steps": 0, "recover_steps": 0, "max_length": 16}
    plan = ibprune.prune(source, 0.75, data=str(data), output=str(small), **options).plan
    written = json.loads((small / "audit.json").read_text())["layers"][1:]
    block = next(f"encoder.layer.{i}" for i in range(3) if len(plan.keep[f"encoder.layer.{i}.heads"]) < 4)
    found = ibprune.audit(source, str(small), data=str(data), layers=(block,))["layers"]
    assert len(written) == 3 and len(found) == 1
    for layer in written + found:
        entropies = layer["heads"]["attn_entropy_norm"][1]
        kept = plan.keep[f"{layer['name']}.heads"]
        assert tuple(i for i, value in enumerate(entropies) if value is not None) == kept
        assert layer["heads"]["aligned"] and len(layer["heads"]["attn_special"][0]) == 4
    (small / "plan.json").write_text("{")
    with pytest.raises(PlanMismatch, match="plan.json"):
        ibprune.audit(source, str(small), data=str(data), layers=(block,))
    (small / "plan.json").unlink()
    with pytest.raises(PlanMismatch, match="expected the file 'plan.json'"):
        ibprune.audit(source, str(small), data=str(data), layers=(block,))
    (small / "report.json").unlink()  # nothing says then that there was one
    assert not ibprune.audit(source, str(small), data=str(data), layers=(block,))["layers"][0]["heads"]["aligned"]


def test_evenly_spaced_inputs():
    ids = torch.arange(100)[:, None]
    chosen = spread([{"input_ids": part} for part in ids.split(30)], 7)
    assert torch.cat([batch["input_ids"] for batch in chosen]).flatten().tolist() == [0, 14, 28, 42, 57, 71, 85]
    whole = spread([{"input_ids": ids[:3]}, {"input_ids": ids[3:5]}], 7)
    assert [len(batch["input_ids"]) for batch in whole] == [3, 2]


def test_special_ids_are_those_without_content(tokenizer):
    assert special_ids(tokenizer) == (CLS, SEP)  # not [UNK], [MASK] or [PAD]


def test_kept_units_of_plans():
    model = build("llama", "LlamaForCausalLM")
    plan = plan_for(model, {"layers.0.kv_groups": (0, 2), "layers.2.attention_sublayer": ()})
    assert kept_units(plan, model) == {"layers.0": (3, (0, 2)), "layers.1": (3, (0, 1, 2)), "layers.2": (3, ())}
    assert kept_heads(3, (0, 2), heads=6) == [0, 1, 4, 5]


def layers_of(effect: float, shift: float, seed: int = 0) -> tuple[list[np.ndarray], list[tuple[int, ...]]]:
    """Six layers of twelve heads; the kept ones differ by the effect, layers by the shift, with other counts each."""
    rng = np.random.default_rng(seed)
    kept = [tuple(rng.permutation(12)[:count].tolist()) for count in (11, 9, 7, 5, 3, 1)]
    values = [rng.normal(scale=0.05, size=12) + shift * i for i in range(6)]
    for layer, units in zip(values, kept):
        layer[list(units)] += effect
    return values, kept


def test_a_planted_effect_is_found_and_layers_are_not_taken_for_one():
    found = contrast(*layers_of(0.2, shift=1.0))
    assert found.difference == pytest.approx(0.2, abs=0.05) and found.p_value < 0.001
    assert found.null95[0] < 0 < found.null95[1] < found.difference
    assert found.kept - found.removed < -1  # what the layers alone would say
    assert (found.n_kept, found.n_removed, found.layers) == (36, 36, 6)
    exact = contrast([np.where(np.isin(np.arange(12), u), 0.3, 0.0) + i for i, u in enumerate(layers_of(0, 0)[1])],
                     layers_of(0, 0)[1])  # fmt: skip
    assert exact.difference == pytest.approx(0.3)


def test_random_plans_are_rejected_as_often_as_chance_says():
    p_values = [contrast(*layers_of(0.0, shift=1.0, seed=seed), permutations=300).p_value for seed in range(200)]
    assert 2 <= sum(p <= 0.05 for p in p_values) <= 20  # 10 expected
    assert 0.4 < np.mean(p_values) < 0.6


def test_layers_that_keep_all_or_nothing_say_nothing():
    values = [np.array([0.0, 1.0]), np.array([5.0, 6.0])]
    found = contrast(values, [(0, 1), ()])
    assert found.difference is None and found.p_value is None and found.null95 is None and found.layers == 0
    assert found.kept == 0.5 and found.removed == 5.5
    assert contrast(values, [(0, 1), (0, 1)]).removed is None
    equal = contrast([np.ones(4)], [(0, 1)])
    assert equal.difference == 0.0 and equal.p_value == 1.0


def test_groups_are_the_units_that_are_compared():
    reading = {"layers.0": {"current": np.tile([0.1, 0.3, 0.5, 0.7], (4, 1)), "special": np.full((4, 4), np.nan)}}
    found = head_contrasts(reading, {"layers.0": (2, (1,))})
    assert found["current"].difference == pytest.approx(0.4) and found["current"].n_kept == 1
    assert found["special"] is None
    with pytest.raises(BadSamples, match="multiple of 3"):
        head_contrasts(reading, {"layers.0": (3, (1,))})
    with pytest.raises(BadSamples, match="expected a plan of the blocks layers.0"):
        head_contrasts(reading, {"encoder.layer.0": (2, (1,))})


@pytest.mark.parametrize(
    "values,kept,words",
    [([[0.0, 1.0]], [], "kept units of 1 layers"), ([[0.0, 1.0]], [(2,)], "0..1"), ([[np.nan, 1.0]], [(0,)], "NaN")],
)
def test_contrasts_that_cannot_be(values, kept, words):
    with pytest.raises(BadSamples, match=words):
        contrast([np.array(layer) for layer in values], kept)


def test_keywords_tell_the_label_and_nothing_else_does():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=600)
    rows = [[CLS, *rng.integers(10, 40, size=6).tolist(), SEP] for _ in labels]
    for row, label in zip(rows, labels):
        if rng.random() < 0.4:
            row.insert(1, 50 + int(label))
        if label:
            row.append(60)  # says all, but is skipped
    rows[0].append(99)  # too rare to say anything
    assert set(choose_keywords(rows, labels.tolist(), skip=(60,))) == {50, 51}
    assert choose_keywords(rows, labels.tolist())[0] == 60
    assert len(choose_keywords(rows, labels.tolist(), most=1)) == 1
    assert choose_keywords(rows, rng.permutation(labels).tolist()) == ()
    assert choose_keywords(rows[:10], [0, 1] * 5) == ()
    with pytest.raises(BadData, match="two classes"):
        choose_keywords(rows, [1] * 600)
    with pytest.raises(BadData, match="a label for each of 600"):
        choose_keywords(rows, [0, 1])
