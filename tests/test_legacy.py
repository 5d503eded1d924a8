"""Checkpoints of older tools, made here from their documented layouts: each becomes a folder that computes the same."""

import json

import pytest
import torch
from conftest import build, outputs, random_keep
from safetensors.torch import save_file
from test_cli import refused
from test_folders import cut

import ibprune
from ibprune import cli
from ibprune.plans import PruningPlan
from ibprune.sites import find_sites


def dense(family, head):
    return build(family, head, dtype=torch.float32)


def save(folder, model, state, **config):
    """A folder as old tools leave it: a dense config, and the tensors in a .bin file."""
    folder.mkdir()
    raw = dense_config(model) | config
    (folder / "config.json").write_text(json.dumps(raw))
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def dense_config(model) -> dict:
    raw = model.config.to_dict()
    raw.update(raw.pop("ibprune", {"dense": {}})["dense"])
    return raw | {"architectures": [type(model).__name__]}


def shaped(family, head, kinds):
    """A compacted model of which only some kinds lost units, and its plan."""
    model = dense(family, head)

    def keep(sites):
        return {n: u if sites[n].kind in kinds else tuple(range(sites[n].n_units))
                for n, u in random_keep(sites, 5).items()}  # fmt: skip

    return cut(model, keep, factorize=False)


@pytest.mark.parametrize("family,head", [
    ("bert", "BertForSequenceClassification"), ("roberta", "RobertaForMaskedLM"), ("distilbert", "DistilBertModel"),
    ("vit", "ViTForImageClassification"),
])  # fmt: skip
def test_heads_that_the_config_names_are_missing_in_the_tensors(family, head, tmp_path):
    model, plan = shaped(family, head, ("heads",))
    gone = {
        number: sorted(set(range(4)) - set(units))
        for number, units in enumerate(plan.keep[name] for name in plan.keep if name.endswith("heads"))
    }
    source = save(tmp_path / "old", model, model.state_dict(), pruned_heads={str(k): v for k, v in gone.items() if v})
    report = ibprune.convert_legacy(str(source), output=str(tmp_path / "new"))
    assert PruningPlan.load(tmp_path / "new" / "plan.json") == plan
    assert torch.allclose(outputs(ibprune.load(tmp_path / "new")), outputs(model), atol=1e-5)
    assert report["verify"]["max_abs_diff"] <= 1e-5 and report["known_units"] == sorted(plan.keep)
    assert report["pruned"]["params"] == sum(p.numel() for p in model.parameters())
    assert "another tool pruned" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("half", ["readers", "makers", "both"])
def test_units_of_zeros_are_really_cut(half, tmp_path):
    model = dense("bert", "BertForSequenceClassification")
    block = model.bert.encoder.layer[1]
    with torch.no_grad():
        attention, values = block.attention.self, slice(6, 12)  # the second of four heads
        if half != "makers":
            block.output.dense.weight[:, [0, 3, 19]] = 0
            block.attention.output.dense.weight[:, values] = 0
        if half != "readers":
            block.intermediate.dense.weight[[0, 3, 19]] = 0
            block.intermediate.dense.bias[[0, 3, 19]] = 0
            for layer in (attention.query, attention.key, attention.value):
                layer.weight[values] = 0
                layer.bias[values] = 0
    expected = outputs(model)
    source = save(tmp_path / "old", model, model.state_dict())
    assert cli.main(["convert-legacy", str(source), "--output", str(tmp_path / "new"), "--quiet"]) == 0
    found, plan = ibprune.load(tmp_path / "new"), PruningPlan.load(tmp_path / "new" / "plan.json")
    assert torch.allclose(outputs(found), expected, atol=1e-6)
    assert plan.keep["encoder.layer.1.heads"] == (0, 2, 3) and plan.keep["encoder.layer.0.heads"] == (0, 1, 2, 3)
    assert plan.keep["encoder.layer.1.ffn"] == tuple(u for u in range(20) if u not in (0, 3, 19))


def test_missing_heads_and_zeros_together_are_one_plan(tmp_path):
    model, plan = shaped("bert", "BertModel", ("heads",))
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[:, 5] = 0
        model.encoder.layer[2].output.dense.weight[:] = 0
    gone = {str(i): sorted(set(range(4)) - set(plan.keep[f"encoder.layer.{i}.heads"])) for i in range(3)}
    source = save(tmp_path / "old", model, model.state_dict(), pruned_heads=gone)
    ibprune.convert_legacy(str(source), output=str(tmp_path / "new"))
    found = PruningPlan.load(tmp_path / "new" / "plan.json")
    assert torch.allclose(outputs(ibprune.load(tmp_path / "new")), outputs(model), atol=1e-5)
    assert 5 not in found.keep["encoder.layer.0.ffn"] and found.keep["encoder.layer.2.ffn"] == (0,)
    assert all(found.keep[name] == plan.keep[name] for name in plan.keep if name.endswith("heads"))


def test_shapes_alone_tell_a_cofi_encoder_and_a_llama(tmp_path):
    for family, head, kinds in (
        ("bert", "BertForSequenceClassification", ("heads", "ffn", "hidden")),
        ("llama", "LlamaForCausalLM", ("kv_groups", "ffn")),
    ):
        model, plan = shaped(family, head, kinds)
        state = model.state_dict() | {"layer_transformation.weight": torch.ones(3, 3)} if family == "bert" else {
            **model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)
        }  # fmt: skip
        state = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in state.items()}
        prefix = "CoFi" if family == "bert" else ""
        source = save(tmp_path / family, model, state, architectures=[prefix + head])
        report = ibprune.convert_legacy(str(source), output=str(tmp_path / f"{family}-new"))
        found = ibprune.load(tmp_path / f"{family}-new")
        assert torch.allclose(outputs(found), outputs(model), atol=1e-5)
        assert {n: kept for n, (kept, _) in report["kept"].items()} == plan.kept()
        assert "hidden" not in report["known_units"] or len(plan.keep["hidden"]) == plan.n_units["hidden"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_objects_are_never_opened(tmp_path, capsys):
    model = dense("llama", "LlamaForCausalLM")
    trap = tmp_path / "trap"
    for name, content in (("evil", {"model": Evil(trap)}), ("module", {"model": model}), ("list", [torch.ones(2)])):
        source = save(tmp_path / name, model, content)
        message = refused(capsys, "convert-legacy", source, "--output", tmp_path / "out")
        assert ("state dict" in message) if name == "list" else ("torch.save(model.state_dict()" in message)
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_what_fits_no_plan_is_one_line(tmp_path, capsys):
    model = dense("bert", "BertModel")
    whole = model.state_dict()

    def message(name, state, **config):
        source = save(tmp_path / name, model, state, **config)
        return refused(capsys, "convert-legacy", source, "--output", tmp_path / "out")

    query = "encoder.layer.0.attention.self.query.weight"
    assert "whole units of 6 out of 24, found 7" in message("part", whole | {query: torch.ones(7, 24)})
    assert "expected (12,) as its neighbours have it, found (24,)" in message(
        "one", whole | {query: torch.ones(12, 24)}
    )
    assert "a whole sub-layer is gone" in message("none", {k: v for k, v in whole.items() if k != query})
    assert "leaves 3 of 4 heads" in message("heads", whole, pruned_heads={"0": [1]})
    for number, heads in enumerate(({"0": "x"}, [1, 2], "none", {"0": 3}, {"0": [0.5]}, {"0": [[0]]}, {"0": [-1]})):
        assert "to name numbers of heads by layer" in message(f"odd {number}", whole, pruned_heads=heads)
    assert "names layer 7, and the model has 3" in message("deep", whole, pruned_heads={"7": [0]})
    assert "expected names of classes as 'architectures'" in message("class", whole, architectures=[3])
    assert "holds packed integers" in message("int8", {name: value.to(torch.int8) for name, value in whole.items()})
    assert "names and tensors" in message("number", {1: torch.ones(2)})
    assert "found 'more' too" in message("more", whole | {"more": torch.ones(1)})
    norm = "encoder.layer.0.output.LayerNorm.bias"
    assert f"found no '{norm}'" in message("less", {k: v for k, v in whole.items() if k != norm})
    (tmp_path / "bare").mkdir()
    assert "config.json" in refused(capsys, "convert-legacy", tmp_path / "bare", "--output", tmp_path / "out")
    model.config.save_pretrained(tmp_path / "bare")
    assert "found neither" in refused(capsys, "convert-legacy", tmp_path / "bare", "--output", tmp_path / "out")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"x" * 20)
    assert "damaged" in refused(capsys, "convert-legacy", tmp_path / "bare", "--output", tmp_path / "out")
    assert "--output" in refused(capsys, "convert-legacy", tmp_path / "bare")
    assert not (tmp_path / "out").exists()


def test_a_dense_checkpoint_stays_whole(tmp_path):
    model = dense("bert", "BertModel")
    source = tmp_path / "old"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(dense_config(model)))
    save_file(model.state_dict(), source / "model.safetensors")
    report = ibprune.convert_legacy(str(source), output=str(tmp_path / "new"))
    assert report["verify"]["tier"] == "vanilla" and report["pruned"] == report["dense"]
    assert set(report["kept"]) == set(find_sites(model))
