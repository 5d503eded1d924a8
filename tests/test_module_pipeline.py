"""Any module by the Python API: exact budgets, better than chance, untouched source, and folders that load strictly."""

import copy
import json
import sys

import pytest
import torch
from cnn_models import ResNet, SqueezeExcite, build_net, lenet5, mlp, net_input
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ibprune
from ibprune.costs import count_params
from ibprune.errors import BadData, BadRecipe, IBPruneError, PlanMismatch, UnsupportedModel
from ibprune.module_files import save_module
from ibprune.plans import PruningPlan
from ibprune.rebuild import SelectedLinear
from ibprune.scores import LEARNED, SCORES


def task(shape: tuple[int, ...], samples: int = 256) -> TensorDataset:
    """Images whose brighter half is the label."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, *shape, generator=generator)
    y = torch.arange(samples) % 2
    half = shape[-1] // 2
    x[y == 1, ..., :half] += 0.5
    x[y == 0, ..., half:] += 0.5
    return TensorDataset(x, y)


def accuracy_on(data: TensorDataset):
    x, y = data.tensors

    def accuracy(model) -> float:
        assert not model.training
        outputs = model(x)
        return float((getattr(outputs, "logits", outputs).argmax(1) == y).float().mean())

    return accuracy


def trained(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, TensorDataset]:
    model, data = build_net(name, dtype=torch.float32).train(), task(shape)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for x, y in DataLoader(data, batch_size=32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, data


@pytest.fixture(scope="module")
def resnet():
    return trained("resnet", (3, 12, 12))


@pytest.fixture(scope="module")
def pixels():
    return trained("mlp", (1, 7, 7))


def quick(**changes) -> dict:
    return {"mask_steps": 20, "recover_steps": 10} | changes


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("score", SCORES)
def test_a_module_is_pruned_to_the_budget_and_stays_itself(resnet, cost, score):
    model, data = resnet
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = DataLoader(data, batch_size=32, shuffle=True)
    result = ibprune.prune(
        model, 0.5, cost=cost, score=score, train_loader=loader, eval_fn=accuracy_on(data), example=data.tensors[0][:1],
        **quick(),
    )  # fmt: skip
    report = result.report
    assert 0.97 * report["budget"]["limit"] < report["budget"]["achieved"] <= report["budget"]["limit"]
    assert report["budget"]["limit"] == report["dense"][cost] // 2
    assert report["pruned"]["params"] == count_params(result.model)
    assert report["dense"]["params"] == count_params(model)
    assert report["pruned"]["metrics"]["metric"] > 0.8
    assert not result.model.training and model.training  # as they were given, or ready to use
    assert not hasattr(result.model, "vib_masks") and not hasattr(model, "vib_masks")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert json.loads(json.dumps(report))["settings"]["score"] == score


@pytest.mark.parametrize("score", [score for score in SCORES if score not in LEARNED])
def test_a_module_is_refitted_and_better_at_once_for_it(pixels, score):
    model, data = pixels
    loader = DataLoader(data, batch_size=32)
    apart = []
    for reconstruct in (False, True):
        result = ibprune.prune(
            model, 0.3, score=score, shares="equal", recover_steps=0, reconstruct=reconstruct, train_loader=loader
        )
        with torch.no_grad():
            x = data.tensors[0]
            apart.append(float((model.eval()(x) - result.model(x)).square().mean()))
    assert apart[1] < apart[0]


def test_the_same_seed_gives_the_same_model(resnet):
    model, data = resnet
    found = []
    for seed in (0, 0, 1):
        loader = DataLoader(data, batch_size=32, shuffle=True)
        found.append(ibprune.prune(model, 0.4, seed=seed, train_loader=loader, **quick(shares="cost")))
    states = [result.model.state_dict() for result in found]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values()))


def test_pixels_go_with_the_channels_and_the_folder_keeps_the_choice(pixels, tmp_path):
    model, data = pixels
    loader = DataLoader(data, batch_size=32, shuffle=True)
    kinds = ("channels", "inputs")
    steps = quick(shares="equal")
    result = ibprune.prune(model, 0.2, kinds=kinds, train_loader=loader, eval_fn=accuracy_on(data), **steps)
    first = result.model[1]
    assert isinstance(first, SelectedLinear) and len(first.index) == first.in_features < 49
    assert tuple(first.index.tolist()) == result.plan.keep["1.inputs"]
    assert result.report["pruned"]["metrics"]["metric"] > 0.8
    result.save(tmp_path / "small")
    for maker in (mlp, mlp(), model):
        loaded = ibprune.load(tmp_path / "small", model=maker)
        assert torch.equal(loaded(data.tensors[0]), result.model(data.tensors[0]))
    assert type(model[1]) is nn.Linear and model[1].in_features == 49


@pytest.mark.parametrize("name", ["densenet", "grouped", "hf_regnet", "hf_convnext", "hf_mobilenet_v2"])
def test_folders_of_every_structure_reload_equal(name, tmp_path):
    model = build_net(name, dtype=torch.float32)
    x = net_input(name, dtype=torch.float32)
    if name == "grouped":
        model.add_module("last", nn.Flatten())
    loader = DataLoader(TensorDataset(x, torch.zeros(2, dtype=torch.long)), batch_size=2)
    result = ibprune.prune(model, 0.6, score="random", train_loader=loader, shares="cost", recover_steps=0)
    result.save(tmp_path / "small")
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
        loaded = ibprune.load(tmp_path / "small", model=fresh)
        first, second = (getattr(out, "logits", out) for out in (loaded(x), result.model(x)))
    assert torch.equal(first, second) and not loaded.training
    assert [str(m) for m in loaded.children()] == [str(m) for m in result.model.children()]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "decision.json", "ibprune.json", "model.safetensors", "report.html", "report.json",
    ]  # fmt: skip


def test_a_folder_that_does_not_fit_is_refused(resnet, tmp_path):
    model, data = resnet
    loader = DataLoader(data, batch_size=32)
    result = ibprune.prune(model, 0.5, score="magnitude", train_loader=loader, recover_steps=0, shares="cost")
    folder = tmp_path / "small"
    result.save(folder)
    with pytest.raises(BadRecipe, match="expected model= for"):
        ibprune.load(folder)
    with pytest.raises(BadRecipe, match="new or empty output folder"):
        result.save(folder)
    with pytest.raises(PlanMismatch, match="expected model= to make an nn.Module, found str"):
        ibprune.load(folder, model="ResNet")
    with pytest.raises(PlanMismatch, match="found none: is model= the dense one"):
        ibprune.load(folder, model=lenet5)
    wider = ResNet("conv")
    wider.extra = nn.Linear(1, 1)
    with pytest.raises(PlanMismatch, match="expected 'extra.weight' of ResNet"):
        ibprune.load(folder, model=wider)
    del wider.extra, wider.fc
    with pytest.raises(PlanMismatch, match="holds a tensor 'fc.bias' that ResNet lacks"):
        ibprune.load(folder, model=wider)
    narrow = ResNet("conv")
    narrow.fc = nn.Linear(1, 4)
    with pytest.raises(PlanMismatch, match="'fc.weight': .* cannot have been cut to"):
        ibprune.load(folder, model=narrow)
    with pytest.raises(PlanMismatch, match="found int"):
        ibprune.load(folder, model=lambda: 3)
    with pytest.raises(PlanMismatch, match="expected a folder with ibprune.json"):
        ibprune.load(tmp_path / "none", model=model)
    spec = json.loads((folder / "ibprune.json").read_text())
    (folder / "ibprune.json").write_text(json.dumps(spec | {"format": "ibprune.module/9"}))
    with pytest.raises(PlanMismatch, match="found 'ibprune.module/9'"):
        ibprune.load(folder, model=model)
    (folder / "ibprune.json").write_text(json.dumps(spec))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(PlanMismatch, match="the file was altered"):
        ibprune.load(folder, model=model)


def test_a_loss_of_ones_own_is_one_value_per_sample(resnet):
    model, data = resnet
    loader = DataLoader(data, batch_size=32)

    def squared(output, target):
        return (output[:, 0] - target).square()

    result = ibprune.prune(model, 0.5, train_loader=loader, loss=squared, **quick(shares="cost"))
    assert result.report["pruned"]["params"] < 0.51 * result.report["dense"]["params"]
    with pytest.raises(BadData, match=r"expected a loss per sample, \(32,\), .* found \(\)"):
        ibprune.prune(model, 0.5, train_loader=loader, loss=nn.functional.cross_entropy, **quick())


class Attends(nn.Module):
    """Layers with the names of what a dictionary does."""

    def __init__(self):
        super().__init__()
        self.keys, self.values, self.pop = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.items = nn.ModuleDict({"1/2": nn.Linear(8, 8), "1/4": nn.Linear(8, 8)})

    def forward(self, x):
        mixed = self.keys(x).relu() * self.values(x)
        return self.pop(self.items["1/2"](mixed).relu() + self.items["1/4"](mixed).relu())


def test_layers_may_have_any_name(tmp_path):
    loader = [(torch.randn(16, 6), torch.randint(3, (16,)))] * 3
    torch.manual_seed(0)
    result = ibprune.prune(Attends(), 0.6, train_loader=loader, **quick(score="vib"))
    result.save(tmp_path / "out")
    assert result.report["pruned"]["params"] <= 0.6 * result.report["dense"]["params"]
    x = torch.randn(4, 6)
    assert torch.allclose(ibprune.load(tmp_path / "out", model=Attends())(x), result.model(x), atol=1e-6)


def test_outputs_that_are_no_classes_need_a_loss(resnet):
    """A softmax over the width of a picture would run, where it is as wide as there are classes."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    for labels in (torch.randint(4, (8, 8, 8)), torch.randint(4, (8,))):
        with pytest.raises(BadData, match=r"outputs \(batch, classes\).* found \(8, 4, 8, 8\).*: give loss="):
            ibprune.prune(net, 0.6, train_loader=[(torch.randn(8, 3, 8, 8), labels)] * 3, **quick())
    model, data = resnet
    x = data.tensors[0][:8]
    for labels, words in (
        (torch.rand(8), "classes"),
        (torch.full((8,), 40), "expected classes from 0 to .*, found 40"),
    ):
        with pytest.raises(BadData, match=words):
            ibprune.prune(model, 0.6, train_loader=[(x, labels)] * 3, **quick())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.bool])
def test_classes_of_any_whole_type_are_classes(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2))
    loader = [(torch.randn(16, 5), torch.randint(2, (16,)).to(kind)) for _ in range(4)]
    assert ibprune.prune(net, 0.6, train_loader=loader, **quick()).report["budget"]["achieved"] > 0


class Helped(nn.Module):
    """A head that helps in training alone (GoogLeNet's)."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(5, 12), nn.Linear(12, 2), nn.Linear(12, 2)

    def forward(self, x):
        x = torch.relu(self.body(x))
        if self.training:
            self.last = self.aux(x)
        return self.head(x)


def test_layers_that_run_in_training_alone_are_refused():
    loader = [(torch.randn(16, 5), torch.randint(2, (16,))) for _ in range(4)]
    with pytest.raises(UnsupportedModel, match="found 'aux' in training alone"):
        ibprune.prune(Helped(), 0.6, train_loader=loader, **quick())


def test_weights_that_are_computed_or_not_made_yet_are_refused_by_name():
    loader = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,)))] * 3
    for layer, words in (
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), "'0' with weights computed from others: call"),
        (nn.LazyConv2d(8, 3), "expected weights, found none yet in '0'"),
    ):
        net = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4))
        with pytest.raises(UnsupportedModel, match=words):
            ibprune.prune(net, 0.6, train_loader=loader, **quick())


def test_bad_arguments_say_what_to_do(resnet):
    model, data = resnet
    loader = DataLoader(data, batch_size=32)

    def attempt(error: type[IBPruneError], match: str, **changes):
        with pytest.raises(error, match=match):
            ibprune.prune(model, **({"budget": 0.5, "train_loader": loader} | changes))

    attempt(BadRecipe, "unknown argument 'mask_step' for a module: did you mean 'mask_steps'", mask_step=3)
    attempt(BadRecipe, "cost: found 'mac': did you mean 'macs'", cost="mac")
    attempt(BadRecipe, "schedule: found 'cosin': did you mean 'cosine'", schedule="cosin")
    attempt(BadRecipe, "start: found 'flpa': did you mean 'flap'", start="flpa")
    attempt(BadRecipe, "the masks of score vib start to learn: leave it out", start="flap", score="fisher")
    attempt(BadRecipe, "divergence: found 'both'", divergence="both")
    attempt(BadRecipe, "distill: found 'hidden': expected one of logits, none", distill="hidden")
    attempt(BadRecipe, "and distill none that they are not", distill=False, divergence="reverse")
    attempt(BadRecipe, "recover_steps: expected a whole number of at least 0, found -1", recover_steps=-1)
    attempt(BadRecipe, "lr: expected a number above 0", lr=float("nan"))
    attempt(BadRecipe, "weight_decay: expected a number of at least 0, found -1", weight_decay=-1)
    attempt(BadRecipe, r"kinds: expected a tuple .*, found 'channels'", kinds="channels")
    attempt(BadRecipe, "expected budget=", budget=None)
    attempt(BadRecipe, r"expected a budget in \(0, 1\]", budget=1.5)
    attempt(BadRecipe, "cannot go below .* ask for at least", budget=1e-4)
    attempt(BadRecipe, "expected train_loader=", train_loader=None)
    attempt(BadRecipe, "expected no recipe with a module", recipe="some.yaml")
    attempt(BadData, "gone through again", train_loader=iter(loader))
    attempt(BadData, "expected batches from train_loader, found none", train_loader=[])
    attempt(BadData, r"two tensors, found \(Tensor\)", train_loader=[(data.tensors[0],)])
    attempt(
        BadData, "as many targets as inputs, found 256 and 3", train_loader=[(data.tensors[0], data.tensors[1][:3])]
    )
    attempt(BadData, r"forward fails on float64 of shape \(2, 1, 12, 12\)", example=data.tensors[0][:2, :1])
    attempt(BadData, "found torch.int64. Transformers that read token ids", example=torch.zeros(2, 3, dtype=torch.long))
    attempt(BadRecipe, "loss: expected a function, found str", loss="cross_entropy")
    attempt(BadRecipe, "eval_fn: expected a function, found int", eval_fn=3)
    attempt(BadData, "expected a tensor from loss.*found float", loss=lambda output, target: 0.5)
    attempt(BadData, "a number or a dict of numbers, found None", eval_fn=lambda model: None)

    with pytest.raises(BadRecipe, match=r"found all of them frozen: call model.requires_grad_\(True\)"):
        ibprune.prune(copy.deepcopy(model).requires_grad_(False), 0.5, train_loader=loader)

    broken = copy.deepcopy(model)
    next(broken.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(IBPruneError, match="expected finite weights in 'the module', found NaN"):
        ibprune.prune(broken, 0.5, train_loader=loader)

    class Pair(ResNet):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(BadData, match="expected Pair to return a tensor or an output with 'logits', found tuple"):
        ibprune.prune(Pair("conv"), 0.5, train_loader=loader)
    with pytest.raises(UnsupportedModel, match="found none"):
        ibprune.prune(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), 0.5, train_loader=loader)


def test_a_squeeze_layer_alone_has_channels_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.squeeze, self.fc = SqueezeExcite(3, 4), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.squeeze(x).mean((2, 3)))

    data = task((3, 6, 6), samples=64)
    result = ibprune.prune(Net(), 0.7, train_loader=DataLoader(data, batch_size=32), **quick())
    assert result.plan.kept() == {"squeeze.fc1": result.model.squeeze.fc1.out_channels}


def test_the_folder_holds_an_onnx_file_on_request(resnet, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, data = resnet
    loader = DataLoader(data, batch_size=32)
    result = ibprune.prune(model, 0.5, train_loader=loader, **quick(score="magnitude", shares="cost"))
    result.save(tmp_path / "small", onnx=True)
    session = onnxruntime.InferenceSession(tmp_path / "small" / "model.onnx")
    for batch in (data.tensors[0][:1], data.tensors[0][:5]):
        expected = result.model(batch).detach()
        found = torch.from_numpy(session.run(["outputs"], {"inputs": batch.numpy()})[0])
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert ibprune.load(tmp_path / "small", model=model) is not None


def test_a_module_that_onnx_cannot_hold_leaves_no_folder(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    example = torch.randn(2, 4)
    plan = PruningPlan("Odd", {}, {})
    with pytest.raises(PlanMismatch, match="Odd could not be written as ONNX"):
        save_module(Odd(), plan, tmp_path / "odd", onnx_example=example)
    monkeypatch.setattr("ibprune.onnx_files.TOLERANCE", -1.0)
    with pytest.raises(PlanMismatch, match="found it off by"):
        save_module(nn.Linear(4, 4), plan, tmp_path / "odd", onnx_example=example)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadRecipe, match=r"expected onnxruntime for ONNX, found none: pip install 'ibprune\[onnx\]'"):
        save_module(nn.Linear(4, 4), plan, tmp_path / "odd", onnx_example=example)
    assert not list(tmp_path.iterdir())


class Odd(nn.Module):
    """Its way depends on the values it reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x
