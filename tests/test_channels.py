"""The contract of any traced module: masked == compacted at the predicted cost, or refused with the reason."""

import copy
import functools

import pytest
import torch
from cnn_models import NETS, ResNet, build_net, net_input
from conftest import random_keep
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ibprune.channels import Found, find_channels, prepare_
from ibprune.console import Quiet
from ibprune.costs import count_params, module_macs_model, params_model
from ibprune.errors import BadData, BadRecipe, PlanMismatch, UnsupportedModel
from ibprune.inject import inject_, remove_
from ibprune.losses import Objective, forward, supervised_loss
from ibprune.plans import PruningPlan, full_plan, model_type
from ibprune.scores import fisher_scores, magnitude_scores
from ibprune.surgery import compact_module_
from ibprune.tracing import tensors
from ibprune.vib import is_noisy

REFUSED = {  # what must stay, by network: a part of each site's name and of the reason
    "resnet_pad": {"conv1": "multiplying them by 0", "stage2.0.conv2": "16 channels meet the 8"},
    "hf_convnextv2": {f"{layer}.pwconv1": "mixes channels" for layer in ("0.layers.0", "0.layers.1", "1.layers.0")},
}
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@functools.cache
def traced(name: str, kinds: tuple[str, ...]) -> Found:
    return find_channels(build_net(name), net_input(name), kinds=kinds)


def found(name: str, kinds: tuple[str, ...] = ("channels",)) -> tuple[nn.Module, Found]:
    """A network of its own, and what can be cut of all its kind: sites are data and hold no modules."""
    return build_net(name), traced(name, kinds)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensors(model(x))[0]


def plan_of(model, sites, keep) -> PruningPlan:
    return PruningPlan(model_type(model), {name: site.n_units for name, site in sites.items()}, keep)


def cut_by_masks_and_surgery(model, sites, keep, x):
    """Outputs with masks, and after compaction, of a prepared model that ends up compacted."""
    masks = inject_(model, sites)
    torch.manual_seed(0)
    for _, mask in masks.items():
        mask.mu.data.uniform_(0.5, 1.5)
    masks.set_keep(keep)
    masked = output(model, x)
    compact_module_(model, sites, plan_of(model, sites, keep))
    return masked, output(model, x)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETS)
def test_masked_equals_compacted_at_the_predicted_cost(name, seed):
    model, channels = found(name)
    sites, x = channels.sites, net_input(name)
    params, macs = params_model(model, sites), module_macs_model(model, sites, x)
    keep = random_keep(sites, seed)
    masked, compacted = cut_by_masks_and_surgery(model, sites, keep, x)
    assert (masked - compacted).abs().max() < 1e-10 * max(1.0, masked.abs().max())
    kept = {site: len(units) for site, units in keep.items()}
    assert params(kept) == count_params(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x[:1])
    assert macs(kept) == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NETS)
def test_in_float32_too_and_the_attributes_are_true(name):
    model, channels = found(name)
    model, x = model.float(), net_input(name, dtype=torch.float32)
    masked, compacted = cut_by_masks_and_surgery(model, channels.sites, random_keep(channels.sites, 3), x)
    assert (masked - compacted).abs().max() < 1e-5 * max(1.0, masked.abs().max())
    for module in model.modules():
        match module:
            case nn.ConvTranspose2d():
                expected = (module.in_channels, module.out_channels // module.groups)
                assert module.weight.shape[:2] == expected
            case nn.Conv2d():
                assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
                assert module.in_channels % module.groups == module.out_channels % module.groups == 0
            case nn.Linear():
                assert module.weight.shape == (module.out_features, module.in_features)
            case nn.BatchNorm2d():
                assert module.num_features == len(module.weight) == len(module.running_mean) == len(module.running_var)
            case nn.InstanceNorm2d():
                assert module.num_features == len(module.weight)
            case nn.GroupNorm():
                assert module.num_channels == len(module.weight) and module.num_groups == module.num_channels // 3
            case nn.LayerNorm():
                assert module.normalized_shape == tuple(module.weight.shape)
            case nn.PReLU():
                assert module.num_parameters == len(module.weight)
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", NETS)
def test_injection_and_keeping_everything_change_nothing(name):
    model, channels = found(name)
    x, keys = net_input(name), set(model.state_dict())
    before = output(model, x)
    inject_(model, channels.sites)
    assert torch.equal(output(model, x), before)
    assert keys == {key for key in model.state_dict() if not key.startswith("vib_masks")}
    twin = copy.deepcopy(model)
    for _, mask in twin.vib_masks.items():  # a copy reads its own masks
        mask.cut((0,))
    assert not torch.equal(output(twin, x), before) and torch.equal(output(model, x), before)
    remove_(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    compact_module_(model, channels.sites, full_plan(model, channels.sites))
    assert torch.equal(output(model, x), before)


@pytest.mark.parametrize("name", NETS)
def test_what_cannot_be_cut_is_refused_with_the_reason_and_nothing_else(name):
    _, channels = found(name)
    expected = REFUSED.get(name, {})
    assert len(channels.refused) == len(expected)
    for part, reason in expected.items():
        (text,) = [text for site, text in channels.refused.items() if part in site]
        assert reason in text


@pytest.mark.parametrize("name", NETS)
def test_inputs_and_outputs_stay_and_every_mask_learns(name):
    model, channels = found(name)
    layers = [path for path, module in model.named_modules() if isinstance(module, LAYERS)]
    cut = {(cut.path, cut.axis) for site in channels.sites.values() for cut in site.cuts}
    assert (layers[0], "in") not in cut and (layers[-1], "out") not in cut
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masks = inject_(model, channels.sites).train()
    torch.manual_seed(0)
    tensors(model(net_input(name)))[0].square().sum().backward()
    for site, mask in masks.items():
        assert mask.mu.grad is not None and (mask.mu.grad != 0).any(), site
        assert mask.log_var.grad is not None and (mask.log_var.grad != 0).any(), site


def test_sites_are_the_channels_that_go_together():
    sites = {name: found(name)[1].sites for name in ("lenet5", "resnet", "squeeze_excite", "densenet", "gated")}
    assert [c.width for c in sites["lenet5"]["3"].cuts] == [1, 16]  # flattened: 4 x 4 positions a channel
    stream = {c.path for c in sites["resnet"]["conv1"].cuts if c.axis == "out"}
    assert stream == {"conv1", "bn1", *(f"stage1.{i}.{part}" for i in range(2) for part in ("conv2", "bn2"))}
    assert {c.path for c in sites["squeeze_excite"]["3.expand.0"].consumers()} == {"3.squeeze.fc1", "3.project.0"}
    grown = {
        name: site for name, site in sites["densenet"].items() if (("6", "in") in {(c.path, c.axis) for c in site.cuts})
    }
    spans = sorted((c.offset, s.n_units) for s in grown.values() for c in s.cuts if (c.path, c.axis) == ("6", "in"))
    assert spans == [(0, 8), (8, 4), (12, 4), (16, 4)]  # one axis, four owners
    halves = [(c.offset, c.width) for c in sites["gated"]["conv2"].cuts if c.axis == "out"]
    assert halves == [(0, 1), (6, 1)]


class Straight(nn.Module):
    """A layer that reads and writes one stream, so that its cost is a square."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 3)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        return self.conv3(torch.relu(x + self.conv2(x)))


def test_the_cost_of_a_unit_is_what_its_removal_saves():
    for model, x in ((Straight(), torch.randn(2, 1, 9, 9)), (build_net("densenet"), net_input("densenet"))):
        sites = find_channels(model, x).sites
        for costs in (params_model(model, sites), module_macs_model(model.to(x.dtype), sites, x)):
            for name in sites:
                fewer = costs.n_units | {name: costs.n_units[name] - 1}
                assert costs.unit_cost(costs.n_units, name) == costs(costs.n_units) - costs(fewer) > 0


def test_noise_acts_where_one_layer_reads_and_not_on_streams():
    _, channels = found("squeeze_excite")
    noisy = {name for name, site in channels.sites.items() if is_noisy(site)}
    assert noisy == {"3.squeeze.fc1", "4.squeeze.fc1", "4.project.0", "5"}
    model, channels = found("lenet5")
    masks = inject_(model, channels.sites).train()
    seen = {}
    model[3].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1.0)
    model(net_input("lenet5", batch=3))
    assert (seen["x"] == seen["x"][:, :, :1, :1]).all() and len(seen["x"][:, :, 0, 0].unique()) == 18
    assert masks["0"].training


@pytest.mark.parametrize("name", ["lenet5", "mlp"])
@pytest.mark.parametrize("seed", [0, 1])
def test_input_features_are_units_of_the_layers_that_read_no_channel(name, seed):
    """Alone on a LeNet (the flattened features), beside channels on an MLP (its pixels)."""
    kinds = ("channels", "inputs") if name == "mlp" else ("inputs",)
    model, channels = found(name, kinds=kinds)
    x, sites = net_input(name), channels.sites
    assert [n for n, s in sites.items() if s.kind == "inputs"] == ["1.inputs" if name == "mlp" else "7.inputs"]
    before, layers = output(model, x), [type(module) for module in model]
    prepare_(model, sites)
    assert torch.equal(output(model, x), before) and [type(module) for module in model] != layers
    compact_module_(model, sites, full_plan(model, sites))
    assert torch.equal(output(model, x), before) and [type(module) for module in model] == layers
    prepare_(model, sites)
    params, macs = params_model(model, sites), module_macs_model(model, sites, x)
    keep = random_keep(sites, seed)
    masked, compacted = cut_by_masks_and_surgery(model, sites, keep, x)
    assert (masked - compacted).abs().max() < 1e-10
    kept = {site: len(units) for site, units in keep.items()}
    assert params(kept) == count_params(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x[:1])
    assert macs(kept) == counter.get_total_flops() // 2


def test_input_features_of_a_compacted_model_can_be_cut_again():
    model, channels = found("lenet5")
    x = net_input("lenet5")
    cut_by_masks_and_surgery(model, channels.sites, random_keep(channels.sites, 1), x)
    for seed in (1, 2):
        sites = find_channels(model, x, kinds=("inputs",)).sites
        prepare_(model, sites)
        masked, compacted = cut_by_masks_and_surgery(model, sites, random_keep(sites, seed), x)
        assert (masked - compacted).abs().max() < 1e-10
    assert len(model[7].index) == model[7].in_features < 144


def test_fisher_is_the_mean_of_squared_channel_gradients_per_sample():
    model, channels = found("squeeze_excite")
    masks = inject_(model, channels.sites)
    batch = {"inputs": net_input("squeeze_excite", batch=4), "labels": torch.tensor([0, 1, 4, 2])}
    objective = Objective("classification")
    scores = fisher_scores(model, masks, [batch], objective, seed=0, total=1, console=Quiet())
    one = {name: torch.zeros(site.n_units, dtype=torch.float64) for name, site in channels.sites.items()}
    for i in range(4):
        single = {key: value[i : i + 1] for key, value in batch.items()}
        model.zero_grad()
        supervised_loss(objective, forward(model, single), single).sum().backward()
        for name, mask in masks.items():
            one[name] += mask.mu.grad.double().square() / 4
    for name in channels.sites:
        assert torch.allclose(scores[name], one[name], rtol=1e-4, atol=1e-10), name


def test_magnitude_is_the_squared_weight_of_everything_that_goes():
    """Removing a unit must shrink the model's squared norm by its score."""
    for name in ("densenet", "grouped", "gated", "lenet5"):
        model, channels = found(name)
        scores = magnitude_scores(model, channels.sites)
        norm = sum(p.detach().square().sum() for p in model.parameters())
        for site_name in channels.sites:
            keep = {n: tuple(range(s.n_units)) for n, s in channels.sites.items()}
            keep[site_name] = keep[site_name][1:]
            small = compact_module_(copy.deepcopy(model), channels.sites, plan_of(model, channels.sites, keep))
            left = sum(p.detach().square().sum() for p in small.parameters())
            assert torch.allclose(norm - left, scores[site_name][0]), (name, site_name)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.conv2(self.conv1(x).detach()).detach()


class Softmaxed(nn.Module):
    """Channels compete: removing one is not multiplying it by 0."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 3)

    def forward(self, x):
        return self.conv3(torch.relu(self.conv2(torch.softmax(self.conv1(x), 1))))


class Folded(nn.Module):
    """Layers that read patches, several of each sample."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.conv2(self.conv1(x.reshape(-1, 1, 6, 6))).reshape(len(x), -1)


class Attentive(nn.Module):
    """Features that a layer without a cut takes in."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.third(torch.relu(self.second(x))).mean(1)


class Recurrent(nn.Module):
    """A recurrent layer in both directions, and an attention whose keys and values are of other widths."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(10, 2)
        self.read = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.look = nn.MultiheadAttention(10, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = self.read(x)[0]
        return self.last(self.look(y, key=x, value=x[..., :4], need_weights=False)[0]).mean(1)


def test_layers_that_are_never_cut_cost_what_they_multiply():
    """At each of 5 positions; products of activations with each other are left out."""
    x = torch.randn(3, 5, 4)
    lstm = 2 * 4 * 5 * ((6 + 5) + (10 + 5))  # both directions, four gates, two layers: what is read and what was said
    for model, weights in (
        (Attentive(), 4 * 6 + 4 * 6 * 6 + 6 * 7 + 7 * 2),
        (Recurrent(), 4 * 6 + lstm + 10 * 10 + 10 * 6 + 10 * 4 + 10 * 10 + 10 * 2),
        (nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 2)),
         4 * 8 + 4 * 8 * 8 + 2 * 8 * 12 + 8 * 2),
    ):  # fmt: skip
        sites = {} if isinstance(model, Recurrent) else find_channels(model, x).sites  # which no trace follows
        costs = module_macs_model(model.to(x.dtype), sites, x)
        assert costs(costs.n_units) == 5 * weights
        for name in sites:  # what is cut saves what the layers around it save
            assert costs.unit_cost(costs.n_units, name) > 0


class Shuffled(nn.Module):
    """Channels change places in a way that the trace does not see (ShuffleNet)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.conv3(torch.relu(self.conv2(x)))


def test_bad_input_says_what_is_wrong():
    net, x = build_net("lenet5"), net_input("lenet5")
    with pytest.raises(BadData, match=r"forward fails on float64 of shape \(2, 1, 9, 9\)"):
        find_channels(net, x[:, :, :9, :9])
    with pytest.raises(BadData, match=r"expected an example tensor \(batch, \.\.\.\), found \(3,\)"):
        find_channels(net, torch.zeros(3))
    with pytest.raises(BadData, match="found str"):
        find_channels(net, "image")
    with pytest.raises(BadRecipe, match="unknown kind 'channel': did you mean 'channels'"):
        find_channels(net, x, kinds=("channel",))
    with pytest.raises(UnsupportedModel, match="expected a model with parameters"):
        find_channels(nn.ReLU(), x)
    with pytest.raises(UnsupportedModel, match="found none: no layer's features are read"):
        find_channels(nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), x)
    with pytest.raises(UnsupportedModel, match="cannot be traced, .*: it computes its output without gradients"):
        find_channels(Untraceable(), x)
    with pytest.raises(UnsupportedModel, match="0: they are one unit, which must stay"):
        find_channels(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 2, 3)), x)
    with pytest.raises(UnsupportedModel, match="conv1: without some of them the forward fails"):
        find_channels(Folded(), torch.randn(2, 1, 12, 12))
    with pytest.raises(UnsupportedModel, match="conv1: removing them is not multiplying them by 0"):
        find_channels(Shuffled(), x)
    with pytest.raises(UnsupportedModel, match="0: 'between' normalises over 3 axes at once"):
        layers = nn.Sequential()
        layers.add_module("0", nn.Conv2d(1, 4, 3))
        layers.add_module("between", nn.LayerNorm([4, 26, 26]))
        layers.add_module("2", nn.Conv2d(4, 2, 3))
        find_channels(layers, x)


def test_one_bad_site_does_not_spoil_the_others():
    channels = find_channels(Softmaxed(), net_input("lenet5"))
    assert list(channels.sites) == ["conv2"]
    assert "mixes channels" in channels.refused["conv1"]
    channels = find_channels(Attentive(), torch.randn(2, 3, 4))
    assert list(channels.sites) == ["second"]
    assert channels.refused == {"first": "they reach 'attention', a MultiheadAttention, which cannot be cut"}


def test_a_stream_that_is_an_output_stays():
    class Features(ResNet):
        def forward(self, x):
            x = self.stage1(torch.relu(self.bn1(self.conv1(x))))
            return x, self.fc(self.stage2(x).mean((2, 3)))

    channels = find_channels(Features("conv"), net_input("resnet"))
    assert channels.refused == {"conv1": "they are the model's output"}
    assert "stage2.0.conv2" in channels.sites


def test_a_plan_of_another_model_changes_nothing():
    model, channels = found("gated")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PlanMismatch, match="the plan is for model_type 'ResNet', the model is 'Gated'"):
        compact_module_(model, channels.sites, PruningPlan("ResNet", {}, {}))
    keep = {name: () for name in channels.sites}
    with pytest.raises(PlanMismatch, match="must keep at least 1 unit"):
        compact_module_(model, channels.sites, plan_of(model, channels.sites, keep))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
