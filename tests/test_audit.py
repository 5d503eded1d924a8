"""The audit of real modules: anchors, checks, statuses, the command, and what it leaves behind."""

import copy
import itertools
import json
import random

import numpy as np
import pytest
import torch
from conftest import WORDS, build, inputs_of, random_keep
from datasets import Dataset
from torch import nn

import ibprune
from ibprune import cli
from ibprune.audit_output import audit_section, audit_table, further_table
from ibprune.auditing import Side, audit
from ibprune.data import TextData
from ibprune.embeddings import factorize_
from ibprune.errors import BadData, BadRecipe
from ibprune.features import collect, find_layers
from ibprune.inputs import Inputs, draw_tokens, encode_inputs
from ibprune.measures import AuditSettings, measure_layer
from ibprune.mi.samples import BadSamples
from ibprune.model_card import model_card
from ibprune.plans import PruningPlan
from ibprune.plots import retained
from ibprune.sites import find_sites
from ibprune.statuses import layer_status
from ibprune.surgery import compact_

FAST = AuditSettings(repeats=1, curve=(0.5, 2.0))


def inputs(n: int = 240, *, labels: bool = True, length: int = 9) -> Inputs:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 61, (n, length), generator=generator)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(50)]
    return Inputs("random", batches, (ids[:, 0] % 2).tolist() if labels else None, 0, 0, "")


def pruned(dense, seed: int = 1):
    small = copy.deepcopy(dense)
    factorize_(small)
    sites = find_sites(small)
    keep = random_keep(sites, seed)
    return compact_(small, PruningPlan(dense.config.model_type, {n: s.n_units for n, s in sites.items()}, keep))


def test_an_unpruned_copy_loses_exactly_nothing():
    dense = build("bert", "BertModel", dtype=torch.float32)
    found = audit(Side("a", dense), Side("b", copy.deepcopy(dense)), inputs(), settings=FAST)
    assert [layer["name"] for layer in found["layers"]] == ["embeddings", *(f"encoder.layer.{i}" for i in range(3))]
    for layer in found["layers"]:
        assert layer["I_XL"]["delta"] == {"value": 0.0, "ci95": [0.0, 0.0], "paired": True}
        assert layer["V_LY"]["delta"]["value"] == 0.0 and layer["I_XL"]["retained"] == 1.0
    assert all(check["status"] == "pass" for check in found["checks"])


@pytest.mark.parametrize("family,head", [("bert", "BertForSequenceClassification"), ("llama-tied", "LlamaForCausalLM")])
def test_pruned_models_of_every_family_are_audited(family, head):
    dense = build(family, head, dtype=torch.float32)
    found = audit(Side("a", dense), Side("b", pruned(dense)), inputs(labels=False), settings=FAST)
    json.dumps(found, allow_nan=False)
    assert len(found["layers"]) == 4 and len(audit_table(found)[1]) == 4
    assert found["layers"][-1]["I_XL"]["delta"]["value"] != 0.0
    assert found["layers"][-1]["V_LY"]["status"] == "not_applicable" and found["layers"][-1]["V_LY"]["before"] is None


def test_layers_before_the_first_change_are_an_exact_anchor():
    dense = build("bert", "BertModel", dtype=torch.float32)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.encoder.layer[2].output.dense.weight.mul_(0.5)
    found = audit(Side("a", dense), Side("b", changed), inputs(), settings=FAST)
    anchor = next(check for check in found["checks"] if check["id"] == "anchor_equal")
    assert anchor["status"] == "pass"
    deltas = [layer["I_XL"]["delta"]["value"] for layer in found["layers"]]
    assert deltas[:3] == [0.0, 0.0, 0.0] and deltas[3] != 0.0


def test_a_broken_anchor_makes_the_layer_inconsistent():
    dense = build("bert", "BertModel", dtype=torch.float32)
    haunted = copy.deepcopy(dense)  # equal weights, other features
    haunted.encoder.layer[1].register_forward_hook(lambda module, args, output: output * 1.5)
    found = audit(Side("a", dense), Side("b", haunted), inputs(), settings=FAST)
    anchor = next(check for check in found["checks"] if check["id"] == "anchor_equal")
    assert anchor["status"] == "fail" and anchor["layers"] == ["encoder.layer.1", "encoder.layer.2"]
    assert found["layers"][2]["I_XL"]["after"]["status"] == "inconsistent"
    assert found["layers"][1]["I_XL"]["after"]["status"] != "inconsistent" and found["headline"] is None


def test_a_change_of_scale_is_named_and_not_quoted_as_information():
    dense = build("bert", "BertModel", dtype=torch.float32)
    louder = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in louder.encoder.layer[2].output.LayerNorm.parameters():
            parameter.mul_(4.0)
    found = audit(Side("a", dense), Side("b", louder), inputs(), settings=FAST)
    last = found["layers"][-1]
    assert last["I_XL"]["retained"] > 1.3 and last["I_XL"]["retained_relative"] == pytest.approx(1.0, abs=0.02)
    assert layer_status(last) != "ok" and "SCALE_CHANGED" in [w["code"] for w in last["warnings"]]
    assert found["headline"] is None
    for side in ("before", "after"):  # of 40 inputs nothing else is to be quoted either
        last["I_XL"][side]["status"] = "ok"
    bars = retained({"layers": [last]}).axes[0].patches
    assert bars and all(bar.get_hatch() for bar in bars)
    last["warnings"] = []
    assert not any(bar.get_hatch() for bar in retained({"layers": [last]}).axes[0].patches)


def test_a_plain_module_with_layers_named_by_the_user():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))
    images = torch.randn(240, 3, 8, 8)
    given = Inputs("images", [{"inputs": part} for part in images.split(60)], None, 0, 0, "")
    found = audit(Side("a", cnn), Side("b", copy.deepcopy(cnn)), given, layers=("0", "2", "4"), settings=FAST)
    assert [layer["d_before"] for layer in found["layers"]] == [6, 8, 2]
    assert {layer["kind"] for layer in found["layers"]} == {"module"}
    with pytest.raises(BadRecipe, match="unknown layer '7'"):
        audit(Side("a", cnn), Side("b", cnn), given, layers=("7",), settings=FAST)


@pytest.mark.parametrize("n,d,stay", [(400, 8, 4), (1000, 8, 4), (1000, 24, 6)])
def test_the_retained_interval_holds_the_true_share(n, d, stay):
    """Of Gaussian features the pruned layer holds as large a share of the bits as of the features."""
    held = []
    for seed in range(8):
        before = np.random.default_rng([seed, 5]).standard_normal((n, d))
        after = before.copy()
        after[:, stay:] = 0.0
        settings = AuditSettings(repeats=1, curve=(1.0, 2.0), seed=seed)
        found = measure_layer(before, after, None, settings)["I_XL"]
        assert found["before"]["status"] == found["after"]["status"] == "ok"
        low, high = found["retained_ci95"]
        assert low <= found["retained"] <= high and high - low < 0.15
        held.append(low <= stay / d <= high)
    assert sum(held) >= 7  # of 8


def test_a_split_that_lies_class_by_class_is_read_all_over(tokenizer):
    """The texts of an audit are evenly spaced, as pictures are: both classes in their shares."""
    texts = [f"{a} {b} {c} {d}" for a, b, c, d in itertools.product(WORDS[:7], repeat=4)][:2000]
    rows = Dataset.from_dict({"text": texts, "label": [int(i >= 1500) for i in range(2000)]})
    data = TextData("sorted", rows, rows, ("text",), "label", ("a", "b"), ("accuracy",))
    found = encode_inputs(data, tokenizer, max_length=16, most=240)
    assert len(found.labels) == 240 and sum(found.labels) == 60


def test_inputs_in_bfloat16_are_audited_and_a_misspelt_probe_is_one_line():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).to(torch.bfloat16)
    pairs = [(part, torch.arange(60) % 2) for part in torch.randn(240, 8).to(torch.bfloat16).split(60)]
    found = ibprune.audit(net, net, data=pairs, layers=("0",))
    assert found["data"]["n"] == 240 and found["layers"][0]["I_XL"]["retained"] == 1
    with pytest.raises(BadRecipe, match="--probe: found 'mlpp': did you mean 'mlp'"):
        ibprune.audit(net, net, data=pairs, probe="mlpp")


def test_constant_and_nan_layers():
    dense = build("bert", "BertModel", dtype=torch.float32)
    dead = copy.deepcopy(dense)
    with torch.no_grad():
        dead.encoder.layer[2].output.LayerNorm.weight.zero_()
    found = audit(Side("a", dead), Side("b", dense), inputs(), settings=FAST)
    last = found["layers"][-1]
    assert last["I_XL"]["before"] == {**last["I_XL"]["before"], "lower": None, "status": "degenerate"}
    assert last["V_LY"]["before"]["value"] is None and last["I_XL"]["retained"] is None
    whole = found["layers"][0]  # missing is null, never an absent key
    assert set(last["I_XL"]) == set(whole["I_XL"]) and set(last["V_LY"]) == set(whole["V_LY"])
    with torch.no_grad():
        dead.encoder.layer[1].output.LayerNorm.bias[0] = float("nan")
    with pytest.raises(BadData, match="encoder.layer.1.*NaN"):
        audit(Side("a", dense), Side("b", dead), inputs(), settings=FAST)


@pytest.mark.parametrize(
    "family,head,last", [("vit", "ViTModel", "layers.2"), ("swin", "SwinModel", "encoder.layers.1.blocks.0")]
)
def test_tokens_of_a_vision_model_are_pooled_as_tokens(family, head, last):
    model = build(family, head, dtype=torch.float32)
    pixels = inputs_of(model)["pixel_values"]
    poolings = ("mean", "cls")
    found = [
        collect(model, [{key: pixels}], find_layers(model, batch={key: pixels}), poolings=poolings)
        for key in ("pixel_values", "inputs")
    ]
    with torch.no_grad():
        stream = model(pixels, output_hidden_states=True).hidden_states[-1]
    for features in found:
        assert np.allclose(features["mean"][last], stream.mean(1), atol=1e-6)
        assert np.allclose(features["cls"][last], stream[:, 0], atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "random"])
def test_padding_changes_no_feature(pooling):
    model = build("bert", "BertModel", dtype=torch.float64)
    ids = torch.randint(1, 61, (6, 5), generator=torch.Generator().manual_seed(0))
    plain = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    wide = torch.cat([ids, torch.zeros(6, 3, dtype=torch.long)], 1)
    padded = [{"input_ids": wide, "attention_mask": (torch.arange(8) < 5).long().expand(6, 8)}]
    layers = find_layers(model, batch=plain[0])
    first, second = (collect(model, batches, layers, poolings=(pooling,))[pooling] for batches in (plain, padded))
    for name in layers:
        assert np.allclose(first[name], second[name], atol=1e-5)


def test_the_command_and_its_folder(folders, tmp_path, capsys):
    rng = random.Random(2)
    lines = ["sentence\tlabel"]
    lines += [f"{' '.join(rng.choices(WORDS, k=9))}\t{i % 2}" for i in range(260)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.tsv").write_text("\n".join(lines[:40]) + "\n")
    (data / "dev.tsv").write_text("\n".join(lines[:1] + lines[40:]) + "\n")
    small = tmp_path / "small"
    source = folders["BertModel"]
    ibprune.prune(source, 0.5, data=str(data), output=str(small), mask_steps=0, recover_steps=0, max_length=16)
    assert json.loads((small / "audit.json").read_text())["schema"] == "ibprune.mi_audit/1"
    card = (small / "README.md").read_text()
    assert "What each layer kept" in card and "![retained](audit/retained.png)" in card
    report = json.loads((small / "report.json").read_text())
    assert card == model_card(report, json.loads((small / "audit.json").read_text()), name="small")
    out = tmp_path / "audit"
    command = ["audit", source, str(small), "--data", str(data), "--output", str(out), "--quiet", "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((out / "audit.json").read_text()) == found
    assert {p.suffix for p in (out / "audit").iterdir()} == {".png", ".svg"}
    assert found["data"]["n"] == 221 and found["labels"]["n_classes"] == 2
    again = ibprune.audit(source, str(small), data=str(data))
    assert again["layers"] == found["layers"]
    assert callable(ibprune.audit) and callable(ibprune.plan)  # a submodule must not take their place


def test_texts_longer_than_the_model_reads_are_cut(folders, tmp_path):
    rng = random.Random(3)
    (tmp_path / "long.txt").write_text("<|endoftext|>".join(" ".join(rng.choices(WORDS, k=90)) for _ in range(6000)))
    found = ibprune.audit(folders["BertModel"], folders["BertModel"], data=str(tmp_path / "long.txt"), max_inputs=200)
    assert found["data"]["n"] == 200  # 64 positions, 128 tokens asked for by default


def test_a_run_is_not_lost_for_its_audit(folders, stories, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise BadSamples("unusable")

    monkeypatch.setattr("ibprune.pipeline.encode_inputs", fails)
    out = tmp_path / "out"
    ibprune.prune(
        folders["BertModel"], 0.6, data=stories, output=str(out), mask_steps=0, recover_steps=0, max_length=16
    )
    assert (out / "model.safetensors").exists() and not (out / "audit.json").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["audit"] is None and report["audit_note"] == "unusable"


def test_audits_that_cannot_be_are_one_line(folders, reviews, tmp_path, capsys):
    for argv, words in (
        (["audit", folders["BertModel"], folders["BertModel"], "--data", reviews], "at least 200 distinct inputs"),
        (["audit", folders["BertModel"], folders["LlamaForCausalLM"], "--data", reviews], "one family"),
        (["audit", folders["BertModel"], "nowhere", "--data", reviews], "expected a model folder"),
        (["audit", folders["BertModel"]], "required"),
        (["audit", folders["BertModel"], folders["BertModel"], "--data", reviews, "--poling", "cls"], "--pooling"),
    ):
        assert cli.main([*argv, "--quiet"]) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("ibprune: error: ") and words in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_tokens_are_targets_like_labels():
    """The embeddings know the current token and nothing of the next one, which is random here."""
    dense = build("llama", "LlamaForCausalLM", dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 9, (700, 9), generator=generator)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(64)]
    given = Inputs("random", batches, None, 0, 0, "", special=(1,))
    settings = AuditSettings(repeats=1, curve=(1.0, 2.0), tokens=4)
    found = audit(Side("a", dense), Side("b", pruned(dense)), given, layers=("embeddings",), settings=settings)
    token, following = found["layers"][0]["V_token"], found["layers"][0]["V_next"]
    assert token["n_classes"] == following["n_classes"] == 4 and 500 < token["n"] and 200 < following["n"]
    assert token["before"]["value"] > 0.9 * token["H_ceiling"] and token["H_ceiling"] < 2.01
    assert following["before"]["ci95"][0] < 0.05
    json.dumps(found, allow_nan=False)
    header, rows = further_table(found)
    assert header[1:3] == ("this token, dense", "this token, pruned") and "±" in rows[0][1]
    assert "frequent tokens" in audit_section(found)


def test_drawn_tokens_stand_where_they_say():
    ids = torch.tensor([[9, 2, 3, 2, 5], [0, 0, 9, 3, 3], [9, 7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    given = Inputs("three", [{"input_ids": ids, "attention_mask": mask}], None, 0, 0, "", special=(9,))
    seen = set()
    for seed in range(20):
        drawn = draw_tokens(given, 2, seed=seed)
        assert list(drawn.current[:2]) == [int(ids[i, drawn.columns[i]]) for i in (0, 1)]
        assert set(drawn.current[:2]) <= {2, 3} and drawn.current[2] == -1  # 7 is not among the two most frequent
        after = {(0, 1): 3, (0, 2): 2, (0, 3): -1, (1, 3): 3, (1, 4): -1}
        assert [after[i, int(drawn.columns[i])] for i in (0, 1)] == list(drawn.following[:2])
        seen.add(tuple(drawn.columns))
    assert len(seen) > 3
    with pytest.raises(BadData, match="tokens"):
        draw_tokens(Inputs("x", [{"inputs": torch.zeros(2, 3)}], None, 0, 0, ""), 2)


def test_rare_tokens_give_no_figure():
    dense = build("bert", "BertModel", dtype=torch.float32)
    settings = AuditSettings(repeats=1, curve=(1.0, 2.0), tokens=60)
    found = audit(Side("a", dense), Side("b", dense), inputs(), layers=("embeddings",), settings=settings)
    assert found["layers"][0]["V_token"]["status"] == "undersampled"
    assert found["layers"][0]["V_token"]["before"] is None
    assert further_table(found)[1][0][1:] == ("-", "-", "-", "-", "undersampled")


def test_the_pair_shares_most_with_itself(monkeypatch):
    monkeypatch.setattr("ibprune.measures.PAIR_STEPS", 60)  # a critic that learned less is still one of a lower bound
    dense = build("bert", "BertModel", dtype=torch.float32)
    settings = AuditSettings(repeats=1, curve=(1.0, 2.0), pair=True)
    layers = ("encoder.layer.2",)
    same = audit(Side("a", dense), Side("b", copy.deepcopy(dense)), inputs(600), layers=layers, settings=settings)
    less = audit(Side("a", dense), Side("b", pruned(dense)), inputs(600), layers=layers, settings=settings)
    pair, own = (found["layers"][0]["I_pair"] for found in (less, same))
    assert own["value"]["value"] == own["self"]["value"] == pair["self"]["value"] > 0.2
    assert pair["value"]["ci95"][1] < own["value"]["ci95"][0] and pair["status"] == "undersampled"
    assert own["extrapolated"]["value"] is not None
    assert len(further_table(same)[0]) == 4


def test_layers_measured_side_by_side_read_the_same(monkeypatch):
    dense = build("bert", "BertModel", dtype=torch.float32)
    small, real = pruned(dense), torch.get_num_threads
    found = [audit(Side("a", dense), Side("b", small), inputs(), settings=FAST)]
    # only the map is told of more: with another number the models' own features differ in their last bits
    monkeypatch.setattr("ibprune.auditing.torch.get_num_threads", lambda: 3)
    found.append(audit(Side("a", dense), Side("b", small), inputs(), settings=FAST))
    assert real() == 3  # as it was found
    torch.set_num_threads(1)
    for one, other in zip(*(each["layers"] for each in found)):
        assert {k: v for k, v in one.items() if k != "heads"} == {k: v for k, v in other.items() if k != "heads"}
