"""The verb export: other runtimes compute what torch does, at batches and lengths that were never traced."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers
from cnn_models import build_net
from conftest import build, random_keep
from test_folders import cut
from torch import nn

import ibprune
from ibprune import cli
from ibprune.channels import find_channels
from ibprune.errors import BadRecipe
from ibprune.exporting import GRAPHS
from ibprune.folders import write_model
from ibprune.module_files import save_module
from ibprune.onnx_files import expected_outputs, flat_model, onnx_runtime, probe_batches, write_transformer_onnx
from ibprune.plans import PruningPlan
from ibprune.surgery import compact_traced_

pytest.importorskip("onnxruntime")
TWO = dict(num_hidden_layers=2)
# Family, head, the sub-layers that go, and the outputs' names.
CASES = [
    ("bert", "BertForSequenceClassification", ("encoder.layer.0.ffn_sublayer",), ["logits"], TWO),
    ("bert", "BertModel", ("encoder.layer.0.ffn_sublayer",), ["last_hidden_state", "pooler_output"],
     dict(num_hidden_layers=1)),
    ("gpt2", "GPT2LMHeadModel", ("h.1.attention_sublayer",), ["logits"], dict(n_layer=2)),
    ("llama-tied", "LlamaForCausalLM", ("layers.0.attention_sublayer",), ["logits"], TWO),
    ("t5", "T5ForConditionalGeneration", ("encoder.block.1.ffn_sublayer",), ["logits", "encoder_last_hidden_state"],
     dict(num_layers=2, num_decoder_layers=1)),
    ("vit", "ViTForImageClassification", ("layers.0.ffn_sublayer",), ["logits"], TWO),
]  # fmt: skip


def small(family, head, gone, changes):
    """A pruned model of two layers, with different widths everywhere and a sub-layer removed."""

    def keep_of(sites):
        keep = random_keep(sites, 3)
        layers = {name: () if name.endswith(gone) else (0,) for name, site in sites.items() if site.kind == "layers"}
        assert not gone or () in layers.values(), sorted(layers)
        return keep | layers

    return cut(build(family, head, dtype=torch.float32, **changes), keep_of)


@pytest.mark.parametrize("family,head,gone,outputs,changes", CASES, ids=[case[1] for case in CASES])
def test_onnx_and_openvino_compute_what_torch_does_at_any_size(family, head, gone, outputs, changes, tmp_path):
    model, _ = small(family, head, gone, changes)
    flat = flat_model(model)
    write_transformer_onnx(flat, probe_batches(flat), tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    others = probe_batches(flat, sizes=((5, 33), (1, 2), (2, 47)))
    assert flat.names == ("pixel_values",) or all((batch["attention_mask"] == 0).any() for batch in others[::2])
    runs = [onnx_runtime(tmp_path / "model.onnx")]
    if find_spec("openvino"):
        from ibprune.openvino_files import openvino_runtime, write_openvino

        write_openvino(tmp_path / "model.onnx", others, expected_outputs(flat, others), tmp_path / "model.xml")
        runs.append(openvino_runtime(tmp_path / "model.xml"))
    for batch, expected in zip(others, expected_outputs(flat, others)):
        assert list(expected) == outputs
        with torch.no_grad():  # with the model's own attention, not the one that was traced
            own = model(**batch)
        for run in runs:
            found = run(batch)
            for name in outputs:
                assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
                assert torch.allclose(found[name], own[name], atol=1e-4 * float(own[name].abs().max()))


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    """The folder of a pruned classifier that plain transformers cannot build."""
    model, plan = small(*CASES[0][:3], CASES[0][4])
    folder = tmp_path_factory.mktemp("bert") / "small"
    folder.mkdir()
    assert write_model(model, tokenizer, plan, folder) == "remote_code"
    return folder


def test_the_verb_writes_a_folder_that_users_of_the_runtime_can_read(bert, capsys):
    assert cli.main(["export", str(bert), "--to", "onnx", "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    out = bert.with_name("small-onnx")
    assert found["output"] == str(out) and found["max_diff"] <= 1e-5
    assert set(found["latency_ms"]) == {"torch", "ONNX Runtime"} and "ONNX Runtime" in found["notes"][0]
    names = {"config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.architectures == ["BertForSequenceClassification"] and not hasattr(config, "ibprune")
    texts = ["the film is good", "a dull plot but a warm and very fine actor", "bad"]
    batch = transformers.AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = ibprune.load(bert)(**batch).logits
    assert torch.allclose(onnx_runtime(out / "model.onnx")(dict(batch))["logits"], expected, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_pruned_cnn_is_written_at_the_size_of_its_pictures(to, tmp_path):
    pytest.importorskip("onnxruntime" if to == "onnx" else to)
    net = build_net("hf_resnet", dtype=torch.float32).eval()
    sites = find_channels(net, torch.randn(2, 3, 32, 32)).sites
    plan = PruningPlan("resnet", {n: s.n_units for n, s in sites.items()}, random_keep(sites, 1))
    model = compact_traced_(net, sites, plan)
    (tmp_path / "cnn").mkdir()
    write_model(model, None, plan, tmp_path / "cnn")
    with pytest.raises(BadRecipe, match="expected an image processor"):
        ibprune.export(tmp_path / "cnn", to=to)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "cnn")
    found = ibprune.export(tmp_path / "cnn", to=to, output=tmp_path / "out")
    assert found["notes"][0].startswith("1×3×32×32 in one call")
    files = {"onnx": {"model.onnx"}, "openvino": {"openvino_model.bin", "openvino_model.xml"}}[to]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "preprocessor_config.json"} | files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cnn", "out"]
    batch = {"pixel_values": torch.randn(5, 3, 32, 32)}
    with torch.no_grad():
        expected = model(**batch).logits
    graph = GRAPHS[to]
    assert torch.allclose(graph.run(tmp_path / "out" / graph.file)(batch)["logits"], expected, atol=1e-4)


def test_what_does_not_compute_the_same_or_cannot_be_traced_leaves_nothing(bert, tmp_path, monkeypatch, capsys):
    model, plan = small(*CASES[-1][:3], CASES[-1][4])
    (tmp_path / "vit").mkdir()
    write_model(model, None, plan, tmp_path / "vit")
    monkeypatch.setattr("ibprune.onnx_files.torch.onnx.export", _wrong_bias)
    assert cli.main(["export", str(tmp_path / "vit"), "--to", "onnx", "--output", str(tmp_path / "out")]) == 2
    assert "expected the ONNX file to compute what the model does, found it off by" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("ibprune.onnx_files.torch.onnx.export", _cannot)
    assert cli.main(["export", str(bert), "--to", "onnx", "--output", str(tmp_path / "out")]) == 2
    assert "could not be written as ONNX: a loop over values" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def _wrong_bias(model, *args, **kwargs):
    """Exports another function: what was right when traced is wrong later."""
    from torch.onnx._internal.exporter._compat import export_compat

    with torch.no_grad():
        model.model.classifier.bias += 0.1
    return export_compat(model, *args, **{k: v for k, v in kwargs.items() if k != "dynamo"})


def _cannot(*args, **kwargs):
    try:
        raise ValueError("a loop over values\nand its trace")
    except ValueError as error:
        raise RuntimeError("step 1 of 3 failed") from error


def test_bad_input_is_one_line_and_writes_nothing(bert, tmp_path, monkeypatch, capsys):
    def refused(expected, folder, *flags):
        assert cli.main(["export", str(folder), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error, error

    out = ("--output", str(tmp_path / "out"))
    refused("unknown --to 'onx': did you mean 'onnx'? Expected one of onnx, openvino, gguf", bert, "--to", "onx", *out)
    refused("expected an exported folder with a config.json", tmp_path / "none", "--to", "onnx", *out)
    refused("expected --dtype with --to gguf only", bert, "--to", "onnx", "--dtype", "f16", *out)
    refused("required: --to", bert)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    refused("expected a new or empty output folder", bert, "--to", "onnx", "--output", str(tmp_path / "taken"))
    save_module(nn.Linear(2, 2), PruningPlan("Linear", {}, {}), tmp_path / "module")
    refused("found a plain module's in", tmp_path / "module", "--to", "gguf", *out)
    refused("write its ONNX file with result.save(folder, onnx=True)", tmp_path / "module", "--to", "onnx", *out)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused("expected onnxruntime for ONNX, found none: pip install 'ibprune[onnx]'", bert, "--to", "onnx", *out)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = "expected openvino for OpenVINO, found none: pip install 'ibprune[openvino]'"
    refused(missing, bert, "--to", "openvino", *out)
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["module", "taken"]
