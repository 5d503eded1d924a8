"""CNNs by the command line: every model type exports, reloads and repeats, and what cannot be is refused whole."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cnn_models import NETS, build_net, pictures, save_pictures
from safetensors.torch import load_file

import ibprune
from ibprune import cli
from ibprune.costs import count_params
from ibprune.families import TRACED

SHORT = ["--mask-steps", "4", "--recover-steps", "3", "--batch-size", "16", "--quiet"]
NAMES = ("down", "up")
HF = sorted(name for name in NETS if name.startswith("hf_"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder / "train", *pictures(64), NAMES)
    save_pictures(folder / "val", *pictures(24, seed=1), NAMES)
    return str(folder)


def save_net(name: str, folder, **changes) -> str:
    """A tiny dense classifier of two named classes, its statistics far from their initial values."""
    model = build_net(name, dtype=torch.float32)
    config = type(model.config).from_dict(model.config.to_dict() | {"num_labels": 2} | changes)
    config.id2label, config.label2id = {0: "up", 1: "down"}, {"up": 0, "down": 1}
    state = {k: v[:2] if k.startswith("classifier") else v for k, v in model.state_dict().items()}
    fresh = type(model)(config)
    fresh.load_state_dict(
        {k: v if v.shape == fresh.state_dict()[k].shape else fresh.state_dict()[k] for k, v in state.items()}
    )
    fresh.save_pretrained(folder)
    return str(folder)


def logits(model, x) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x).logits


def test_the_table_of_traced_model_types_is_tested_whole():
    assert {build_net(name).config.model_type for name in HF} == set(TRACED)


@pytest.mark.parametrize("name", HF)
def test_the_main_job_of_every_model_type(name, data, tmp_path, capsys):
    dense, out = save_net(name, tmp_path / "dense"), tmp_path / "out"
    flags = ["--model", dense, "--data", data, "--budget", "0.5", "--cost", "macs", "--image-size", "32", *SHORT]
    shares = "probe" if name == "hf_resnet" else "cost"
    assert cli.main([*flags, "--output", str(out), "--shares", shares]) == 0, capsys.readouterr().err
    assert "loads with trust_remote_code=True or ibprune.load" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert 0.9 * report["budget"]["limit"] < report["budget"]["achieved"] <= report["budget"]["limit"]
    assert report["budget"]["limit"] == report["dense"]["macs"] // 2 and set(report["kept"]) == {"channels"}
    assert report["verify"]["ways"] == ["ibprune", "transformers"]
    assert report["audit"] is None and "at least 200 distinct inputs to audit" in report["audit_note"]
    assert report["pictures"]["shape"] == [3, 32, 32] and report["pictures"]["normalised_by"] == "the training pictures"
    assert set(report["pruned"]["metrics"]) == {"accuracy"} and report["latency_input"]["height"] == 32
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "modeling_ibprune.py", "plan.json", "preprocessor_config.json",
        "README.md", "recipe.yaml", "report.json", "report.html", "decision.json",
    }  # fmt: skip
    model = ibprune.load(out)
    assert count_params(model) == report["pruned"]["params"] < report["dense"]["params"]
    assert model.config.id2label == {0: "up", 1: "down"}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    auto = transformers.AutoModelForImageClassification.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(logits(auto, x), logits(model, x))
    assert report["verify"]["max_abs_diff"] <= 1e-5 * max(1.0, logits(model, x).abs().max())  # another process rounds
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            expected = (module.out_channels, module.in_channels // module.groups)
            assert module.weight.shape[:2] == expected, path
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean) == len(module.weight), path
    with pytest.raises(RuntimeError, match="mismatch"):  # rather than fill the gaps with random weights
        getattr(transformers, type(model).__name__.removeprefix("Pruned")).from_pretrained(out)
    backbone = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(backbone.eval()(x)[0], getattr(model, model.base_model_prefix)(x)[0])


def test_a_run_repeats_and_the_model_learns_and_uses_its_own_processor(data, tmp_path, capsys):
    """From a config alone: trained, pruned from its recipe twice, better than chance."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[12, 16], depths=[1, 1], layer_type="basic", downsample_in_first_stage=False
    )
    config.save_pretrained(tmp_path / "config")
    common = ["--data", data, "--batch-size", "16", "--augment", "flip", "--lr", "5e-3", "--quiet"]
    flags = ["train", "--model", str(tmp_path / "config"), "--finetune-steps", "40", *common]
    assert cli.main([*flags, "--output", str(tmp_path / "dense")]) == 0, capsys.readouterr().err
    trained = json.loads((tmp_path / "dense" / "report.json").read_text())
    assert trained["metrics"]["after"]["accuracy"] > 0.9 and trained["verify"]["tier"] == "vanilla"
    assert trained["steps"] == 40 and trained["pictures"]["augment"] == ["flip"]
    dense = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert dense.config.id2label == {0: "down", 1: "up"} and count_params(dense) == trained["params"]
    flags = ["--model", str(tmp_path / "dense"), "--budget", "0.5", *common, "--mask-steps", "15"]
    assert cli.main([*flags, "--recover-steps", "15", "--output", str(tmp_path / "first")]) == 0
    assert cli.main(["--recipe", str(tmp_path / "first" / "recipe.yaml"), "--output", str(tmp_path / "second")]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report["dense"]["metrics"] == trained["metrics"]["after"]
    assert report["pruned"]["metrics"]["accuracy"] > 0.9
    assert report["pictures"] == trained["pictures"] | {"normalised_by": "the model's image processor"}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "first", backend="pil")
    assert list(processor.image_mean) == trained["pictures"]["mean"]


def test_grey_arrays_a_new_head_and_nothing_cut(tmp_path, capsys):
    images, labels = pictures(80, shape=(12, 12))
    np.savez(tmp_path / "a.npz", X_train=images, y_train=labels, X_test=images[:30], y_test=labels[:30])
    config = transformers.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[12], depths=[1])
    torch.manual_seed(0)
    transformers.ResNetModel(config).save_pretrained(tmp_path / "base")
    flags = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "a.npz"), "--budget", "1.0", *SHORT]
    assert cli.main([*flags, "--finetune-steps", "5", "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verify"]["tier"] == "vanilla" and report["pictures"]["shape"] == [1, 12, 12]
    assert report["kept"] == {"channels": 1.0} and report["pruned"]["params"] == report["dense"]["params"]
    config = ibprune.load(tmp_path / "out").config
    assert config.id2label == {0: "0", 1: "1"} and not hasattr(config, "ibprune")


def test_plan_from_the_config_alone_says_what_a_run_finds(data, tmp_path, capsys):
    dense = save_net("hf_convnextv2", tmp_path / "dense")
    found = ibprune.plan(dense, 0.6, cost="macs", image_size=32)
    assert found["pictures"] == {"shape": [3, 32, 32]} and found["tier"] == "remote_code"
    assert found["budget"]["achieved"] == found["predicted"]["macs"] <= found["budget"]["limit"]
    assert set(found["groups"]) == {"channels"} and all("mixes channels" in why for why in found["refused"].values())
    flags = ["--model", dense, "--data", data, "--budget", "0.6", "--cost", "macs", "--image-size", "32", *SHORT]
    assert cli.main([*flags, "--score", "magnitude", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["budget"] | {"achieved": 0} == found["budget"] | {"achieved": 0}
    assert report["dense"]["macs"] == found["dense"]["macs"] and set(report["refused"]) == set(found["refused"])
    assert ibprune.plan(dense, image_size=16)["dense"]["macs"] < found["dense"]["macs"]
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[12], depths=[1], num_channels=1)
    assert ibprune.plan(config)["pictures"] == {"shape": [1, 224, 224]}
    capsys.readouterr()
    assert cli.main(["plan", "--model", dense, "--budget", "0.6", "--image-size", "32"]) == 0
    shown = capsys.readouterr().out
    assert "(3 x 32 x 32)" in shown and "channels" in shown and "refused" in shown


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> str:
    return save_net("hf_resnet", tmp_path_factory.mktemp("resnet"))


def test_bad_input_is_one_line_and_nothing_is_written(resnet, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(match: str, *flags: str, model=resnet, source=data, verb=()):
        argv = [*verb, "--model", str(model), *(["--data", str(source)] if source else []), *flags]
        argv += [] if verb or "--budget" in flags else ["--budget", "0.5"]
        assert cli.main([*argv, "--output", "out", "--quiet"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("ibprune: error: ") and match in line, line
        assert not (tmp_path / "out").exists()

    refused("expected pictures: name", source=None)
    refused("--task: the model reads pictures", "--task", "sst2")
    refused("--max-length: the model reads pictures", "--max-length", "8")
    refused("has no units 'ffn'", "--kinds", "ffn")
    refused("--scope: 'blocks' is for transformers", "--scope", "blocks")
    refused("did you mean 'flip'", "--augment", "flips")
    refused("--image-size", "--image-size", "0")
    refused("found nothing at", source="./none")
    refused("ask for at least", "--budget", "0.0001", *SHORT)
    images, labels = pictures(40)
    np.savez("three.npz", x=images, y=np.arange(40) % 3)
    refused("trained for 2 outputs, the data have 3 labels (0, 1, 2)", source="three.npz")
    save_pictures(tmp_path / "one", images, labels * 0, NAMES)
    refused("at least two classes", source="one")
    save_pictures(tmp_path / "broken", images, labels, NAMES)
    whole = (tmp_path / "broken" / "up" / "0001.png").read_bytes()
    for i in range(1, 40, 2):  # whichever is held out
        (tmp_path / "broken" / "up" / f"{i:04}.png").write_bytes(whole[:200])
    refused("as a picture", source="broken")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[12], depths=[1])
    config.save_pretrained(tmp_path / "untrained")
    refused("`ibprune train` makes them", model="untrained")
    refused("unknown flag or argument '--budget'", "--budget", "0.5", verb=("train",))
    alone = transformers.ResNetConfig(embedding_size=1, hidden_sizes=[1], depths=[1], layer_type="basic", num_labels=2)
    transformers.ResNetForImageClassification(alone).save_pretrained(tmp_path / "alone")
    refused("they are one unit, which must stay", model="alone")
    transformers.LevitConfig().save_pretrained(tmp_path / "levit")
    refused("no family describes model_type 'levit'", model="levit")


def test_pictures_that_the_model_cannot_read_are_refused_before_anything_is_trained(tmp_path, capsys):
    model = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=16)
    model.save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "small.npz", x=pictures(40, shape=(8, 8, 3))[0], y=np.arange(40) % 2)
    flags = ["train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "small.npz"), "--quiet"]
    assert cli.main([*flags, "--output", str(tmp_path / "out")]) == 2
    assert "shape (2, 3, 8, 8)" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_example_of_the_page_on_cnns_runs(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers.ResNetConfig(embedding_size=8, hidden_sizes=[12], depths=[1]).save_pretrained("my-resnet")
    (tmp_path / "photos").symlink_to(data)
    lines = (Path(__file__).parents[1] / "docs" / "howto" / "cnn.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("ibprune") and "--data photos" in line]
    *runs, audit = commands
    assert len(runs) == 2 and audit.startswith("ibprune audit dense small")  # test_picture_audit.py runs it
    for command in runs:
        flags = shlex.split(command)[1:]
        flags += ["--finetune-steps", "3"] if flags[0] == "train" else SHORT
        assert cli.main([*flags, "--quiet"]) == 0, capsys.readouterr().err
    assert count_params(ibprune.load("small")) < count_params(ibprune.load("dense"))
    card = Path("small/README.md").read_text()
    assert "AutoModelForImageClassification.from_pretrained" in card and "pipeline_tag: image-classification" in card
    assert "It reads pictures of 3 x 16 x 16" in card
