"""The audit of models that read pictures, and of modules: which layers, exact anchors, statuses, what a run leaves."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from cnn_models import NETS, ResNet, build_net, net_input, pictures, save_pictures
from conftest import HEADS, build, inputs_of
from test_audit import FAST
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ibprune
from ibprune import cli
from ibprune.auditing import Side, audit
from ibprune.checks import untouched
from ibprune.errors import BadData, BadRecipe, UnsupportedModel
from ibprune.features import block_layers, collect, find_layers
from ibprune.inputs import Inputs
from ibprune.stages import stage_layers

SIDES = ("before", "after")
FAMILIES = sorted((f, h) for f, heads in HEADS.items() for h in heads if "ForImageClassification" in h)


def given(shape: tuple[int, ...], *, key: str, n: int = 220) -> Inputs:
    generator = torch.Generator().manual_seed(7)
    x, labels = torch.randn(n, *shape, generator=generator), torch.arange(n) % 2
    x[labels == 1, ..., : shape[-1] // 2] += 1.0
    return Inputs("noise", [{key: part} for part in x.split(64)], labels.tolist(), 0, 0, "")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Few pictures to train on and enough to audit on, two of them twice and one of the training ones."""
    path = tmp_path_factory.mktemp("pictures") / "data.npz"
    (x, y), (x_val, y_val) = pictures(48), pictures(212, seed=1)
    x_val, y_val = np.concatenate([x_val, x_val[:2], x[:1]]), np.concatenate([y_val, y_val[:2], y[:1]])
    np.savez(path, x_train=x, y_train=y, x_val=x_val, y_val=y_val)
    return str(path)


@pytest.mark.parametrize("family,head", FAMILIES)
def test_every_vision_transformer_is_read_after_its_blocks_and_at_its_classifier(family, head):
    model = build(family, head, dtype=torch.float32)
    batch = inputs_of(model)
    layers = find_layers(model, batch=batch)
    names = list(layers)
    heads = [name for name in names if "classifier" in name]
    assert names[0] == "embeddings" and len(names) == 4 + len(heads) == len(block_layers(model)) + len(heads)
    found = collect(model, [batch], layers, poolings=("mean",))["mean"]
    with torch.no_grad():
        logits = model(**batch).logits
    assert np.allclose(np.mean([found[name] for name in heads], axis=0), logits, atol=1e-6)


@pytest.mark.parametrize("family,head", [("vit", "ViTForImageClassification"), ("swin", "SwinForImageClassification")])
def test_a_copy_of_a_vision_transformer_loses_exactly_nothing(family, head):
    dense, inputs = build(family, head, dtype=torch.float32), given((3, 8, 8), key="pixel_values")
    found = audit(Side("a", dense), Side("b", copy.deepcopy(dense)), inputs, settings=FAST)
    assert [layer["kind"] for layer in found["layers"]] == ["residual_stream"] * 4 + ["module"]
    for layer in found["layers"]:
        assert layer["I_XL"]["delta"] == {"value": 0.0, "ci95": [0.0, 0.0], "paired": True}
        assert layer["V_LY"]["delta"]["value"] == 0.0 and layer["heads"] is None
    assert all(check["status"] == "pass" for check in found["checks"])


@pytest.mark.parametrize("name", sorted(name for name in NETS if name.startswith("hf_")))
def test_the_stages_of_every_cnn_lie_before_its_classifier(name):
    dense = build_net(name, dtype=torch.float32)
    batch = {"pixel_values": net_input(name, dtype=torch.float32)}
    layers = find_layers(dense, batch=batch)
    *stages, last = layers
    assert 5 <= len(stages) < 12 and last.startswith("classifier")
    found = collect(dense, [batch], layers, poolings=("mean",))["mean"]
    assert all(found[stage].shape[0] == 2 for stage in stages)
    with torch.no_grad():
        assert np.array_equal(found[last], dense(**batch).logits)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        next(changed.get_submodule("classifier").parameters()).mul_(0.5)
    assert untouched(dense, changed, layers) == stages
    first = next(iter(changed.state_dict()))
    changed.state_dict()[first].mul_(0.5)
    assert untouched(dense, changed, layers) == []


def test_stages_before_the_first_change_are_an_exact_anchor():
    """The statistics of a BatchNorm lie where it does, not behind all weights."""
    dense, inputs = build_net("hf_resnet", dtype=torch.float32), given((3, 32, 32), key="pixel_values")
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.resnet.encoder.stages[1].layers[0].layer[0].normalization.running_mean.add_(0.5)
    found = audit(Side("a", dense), Side("b", changed), inputs, settings=FAST)
    names = [layer["name"] for layer in found["layers"]]
    before = [name for name in names if "embedder" in name or "stages.0" in name]
    same = [layer["name"] for layer in found["layers"] if layer["I_XL"]["delta"]["value"] == 0.0]
    assert same == before == names[: len(before)] and len(before) == 4
    assert found["checks"][0] == {"id": "anchor_equal", "status": "pass", "layers": []}
    haunted = copy.deepcopy(changed)  # equal weights up to there, other features
    haunted.get_submodule(before[-1]).register_forward_hook(lambda module, args, output: output * 1.5)
    found = audit(Side("a", dense), Side("b", haunted), inputs, settings=FAST, layers=(before[-1],))
    assert found["checks"][0]["layers"] == [before[-1]] and found["headline"] is None


def test_the_stages_of_a_network():
    def stages(name: str) -> list[str]:
        return stage_layers(NETS[name][0](), {"inputs": net_input(name, dtype=torch.float32)})

    assert stages("resnet") == ["bn1", "stage1.0", "stage1.1", "stage2.0", "stage2.1", "fc"]
    assert stages("lenet5") == ["2", "5", "8", "9"]  # what the next layer reads: behind activation and pooling
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(30)))
    found = stage_layers(deep, {"inputs": torch.zeros(3, 4)})
    assert len(found) == 12 and found[0] == "0" and found[-1] == "29"
    net = ResNet("conv").train()
    net.stage1.eval()
    stage_layers(net, {"inputs": torch.zeros(2, 3, 12, 12)})
    assert net.training and net.stage2.training and not net.stage1[0].training  # as they were
    with pytest.raises(UnsupportedModel, match="layers inside Linear"):
        stage_layers(nn.Linear(3, 2), {"inputs": torch.zeros(2, 3)})
    with pytest.raises(BadData, match="inputs that ResNet reads"):
        stage_layers(net, {"inputs": torch.zeros(2, 1, 12, 12)})


def test_what_is_written_in_place_afterwards_is_not_what_a_layer_gave():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    inputs = given((6,), key="inputs")
    found = audit(Side("a", net), Side("b", nn.Sequential(net[0], nn.Identity(), net[2])), inputs, layers=("0",),
                  settings=FAST)  # fmt: skip
    assert found["layers"][0]["I_XL"]["delta"]["value"] == 0.0


@pytest.mark.parametrize("name", ["vit", "hf_resnet"])
def test_a_run_on_pictures_ends_with_an_audit(name, data, tmp_path, capsys):
    dense, out = tmp_path / "dense", tmp_path / "out"
    if name == "vit":
        build("vit", "ViTForImageClassification", dtype=torch.float32).save_pretrained(dense)
        expected = ["embeddings", "layers.0", "layers.1", "layers.2", "classifier"]
    else:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[12, 16, 16, 16], depths=[1] * 4, num_labels=2
        )
        torch.manual_seed(0)
        transformers.ResNetForImageClassification(config).save_pretrained(dense)
        expected = ["resnet.embedder.pooler", *(f"resnet.encoder.stages.{i}" for i in range(4)), "classifier.1"]
    flags = ["--model", str(dense), "--data", data, "--budget", "0.5", "--mask-steps", "2", "--recover-steps", "2"]
    flags += ["--shares", "equal", "--round-to", "1", "--quiet", "--output", str(out)]
    assert cli.main(flags + (["--image-size", "32"] if name == "hf_resnet" else [])) == 0, capsys.readouterr().err
    report, found = (json.loads((out / file).read_text()) for file in ("report.json", "audit.json"))
    assert report["audit"] == "audit.json" and report["audit_note"] == ""
    assert [layer["name"] for layer in found["layers"]] == expected
    assert found["data"] | {"sha256": ""} == {
        "name": "data.npz", "n": 213, "split": "held_out", "dedup_removed": 2, "sha256": "", "overlap_with_pruning": 1,
    }  # fmt: skip
    assert found["labels"]["n_classes"] == 2 and abs(found["labels"]["H"] - 1) < 0.01
    assert [side["params"] for side in found["models"].values()] == [report[s]["params"] for s in ("dense", "pruned")]
    for layer in found["layers"]:
        assert layer["I_XL"]["before"]["status"] in ("ok", "saturated", "biased", "undersampled")
        assert layer["V_LY"]["status"] in ("ok", "biased", "undersampled") and layer["heads"] is None
        assert layer["V_token"] is None and layer["V_next"] is None and layer["I_pair"] is None
        for side in SIDES:
            info = layer["I_XL"][side]
            assert (info["lower"] is None) == (info["upper"] is None)
            assert layer["V_LY"][side]["ci95"][0] <= found["labels"]["H"]
    assert not [check for check in found["checks"] if check["status"] == "fail"]
    card = (out / "README.md").read_text()
    assert "What each layer kept" in card and f"| {expected[-1]} |" in card
    assert {"information_plane.png", "retained.svg"} <= {path.name for path in (out / "audit").iterdir()}
    capsys.readouterr()
    flags = ["audit", str(dense), str(out), "--data", data, "--layers", expected[-1], "--json", "--quiet"]
    assert cli.main(flags) == 0  # the pruned folder's processor makes the pixels: the dense model brings none
    (again,) = json.loads(capsys.readouterr().out)["layers"]
    assert again["name"] == expected[-1]
    last = found["layers"][-1]["I_XL"]
    assert again["I_XL"]["before"]["lower"] == pytest.approx(last["before"]["lower"], rel=1e-3)
    assert again["I_XL"]["after"]["lower"] == pytest.approx(last["after"]["lower"], rel=1e-3)


def test_the_class_token_can_be_asked_for_and_knows_nothing_at_first(data, tmp_path):
    build("vit", "ViTForImageClassification", dtype=torch.float32).save_pretrained(tmp_path)
    found = ibprune.audit(str(tmp_path), str(tmp_path), data=data, pooling="cls")
    first, last = found["layers"][0], found["layers"][-2]
    assert first["pooling"] == "cls" and first["I_XL"]["before"]["status"] == "degenerate"
    assert first["I_XL"]["before"]["lower"] is None and first["I_XL"]["retained"] is None
    assert last["I_XL"]["before"]["lower"] > 0


def test_a_folder_s_pictures_are_audited_over_all_classes(tmp_path):
    save_pictures(tmp_path / "data" / "train", *pictures(24), ("down", "up"))
    save_pictures(tmp_path / "data" / "val", *pictures(420, seed=1), ("down", "up"))
    build("vit", "ViTForImageClassification", dtype=torch.float32).save_pretrained(tmp_path / "vit")
    model = str(tmp_path / "vit")
    found = ibprune.audit(model, model, data=str(tmp_path / "data"), max_inputs=210)
    assert found["data"]["n"] == 210 and found["labels"]["n_classes"] == 2 and found["labels"]["H"] > 0.99


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, DataLoader]:
    """A network that tells bright tops from bright bottoms, and held-out pictures."""
    net = build_net("resnet", dtype=torch.float32).train()
    sets = [pictures(n, shape=(12, 12, 3), seed=seed) for n, seed in ((256, 0), (400, 1))]
    train, test = (
        TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y)) for x, y in sets
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(8):
        for x, y in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net, DataLoader(test, batch_size=64)


def test_a_module_is_audited_from_python_and_stays_itself(trained, tmp_path):
    net, loader = trained
    state = copy.deepcopy(net.state_dict())
    result = ibprune.prune(net, 0.5, score="magnitude", shares="cost", train_loader=loader, recover_steps=0)
    found = ibprune.audit(net, result.model, data=loader, output=str(tmp_path / "audit"))
    assert net.training and not result.model.training and not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert [layer["name"] for layer in found["layers"]] == ["bn1", "stage1.0", "stage1.1", "stage2.0", "stage2.1", "fc"]
    assert found["data"]["split"] == "given" and found["data"]["n"] == 400
    assert found["data"]["overlap_with_pruning"] is None and found["labels"]["n_classes"] == 2
    assert found["layers"][1]["d_before"] == 8
    assert found["models"]["after"]["params"] < found["models"]["before"]["params"]
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == json.loads(json.dumps(found))
    few = ibprune.audit(net, result.model, data=loader, layers=["stage1", "fc"], max_inputs=210)
    assert [layer["name"] for layer in few["layers"]] == ["stage1", "fc"] and few["data"]["n"] == 210


def test_random_weights_know_less_of_the_labels_and_nothing_exceeds_their_entropy(trained):
    net, loader = trained
    torch.manual_seed(3)
    found = ibprune.audit(net, ResNet("conv"), data=loader)
    labels = found["labels"]["H"]
    for layer in found["layers"]:
        for side in SIDES:
            assert layer["V_LY"][side]["ci95"][0] <= labels <= layer["V_LY"]["H_ceiling"] + 1e-9
    last = found["layers"][-1]
    assert last["V_LY"]["before"]["value"] > 0.8 and last["V_LY"]["delta"]["ci95"][1] < -0.2
    assert last["I_XL"]["delta"]["ci95"][1] < 0
    assert not [check for check in found["checks"] if check["status"] == "fail"]


def test_targets_that_are_no_classes_are_no_labels():
    x = torch.randn(220, 6, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    for targets in (x[:, 0], torch.zeros(220, 2, dtype=torch.long)):
        found = ibprune.audit(net, net, data=DataLoader(TensorDataset(x, targets), batch_size=50))
        assert found["labels"] is None and found["layers"][-1]["V_LY"]["status"] == "not_applicable"
        assert found["layers"][-1]["V_LY"]["before"] is None


def test_what_cannot_be_audited_of_modules_is_said(trained):
    net, loader = trained

    def refused(error: type, match: str, *models, **options) -> None:
        with pytest.raises(error, match=match):
            ibprune.audit(*(models or (net, net)), **({"data": loader} | options))

    refused(BadRecipe, "unknown layer 'stage1.00': did you mean 'stage1.0'", layers=("stage1.00",))
    refused(BadRecipe, "unknown layer 'stage2.1.con1': did you mean 'stage2.1.conv1'", layers=("stage2.1.con1",))
    refused(BadRecipe, "expected data=, a loader of", data=None)
    refused(BadRecipe, "expected data=, a loader of", data="photos")
    refused(BadRecipe, "pooling: expected none with modules", pooling="cls")
    refused(BadRecipe, "two names or two modules", net, "folder")
    refused(BadRecipe, "two names or two modules", "folder", net)
    refused(BadData, "expected data= that can be gone through again", data=iter(loader))
    refused(BadData, "at least 200 distinct inputs", data=[(torch.zeros(300, 3, 12, 12), torch.zeros(300))])
    refused(BadRecipe, "unknown layer 'bn1'", net, nn.Sequential(nn.Flatten(), nn.Linear(432, 2)))


def test_what_cannot_be_asked_of_pictures_is_one_line(data, tmp_path, capsys):
    build("vit", "ViTForImageClassification", dtype=torch.float32).save_pretrained(tmp_path / "vit")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[12], depths=[1], num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    for model, flags, message in (
        ("vit", ["--tokens", "5"], "leave --tokens out"),
        ("vit", ["--max-length", "9"], "--max-length: the model reads pictures"),
        ("vit", ["--layers", "layer.1"], "did you mean 'layers.1'"),
        ("resnet", ["--pooling", "cls"], "'cls' is of tokens"),
    ):
        argv = ["audit", str(tmp_path / model), str(tmp_path / model), "--data", data, *flags, "--quiet"]
        assert cli.main(argv) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line, line


def test_a_layer_of_a_vision_transformer_can_be_named():
    model = build("vit", "ViTForImageClassification", dtype=torch.float32)
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    found = find_layers(model, ("layers.1", "vit.layers.1.mlp"), batch=batch)
    assert found == {"layers.1": ("vit.layers.1", "out"), "vit.layers.1.mlp": ("vit.layers.1.mlp", "out")}
