"""Least squares after a cut: exact where the rest can stand for what goes, and the minimum where it cannot."""

import pytest
import torch
from conftest import build, outputs, token_ids
from test_activations import dense_net, padded_batch, read_by, read_by_layer
from torch import nn

from ibprune.channels import find_channels
from ibprune.console import Quiet
from ibprune.groups import Site
from ibprune.inject import inject_
from ibprune.plans import PruningPlan
from ibprune.refit import reconstruct_, rescale_
from ibprune.sites import find_sites
from ibprune.surgery import compact_, compact_module_

EXACT = dict(console=Quiet(), ridge=1e-12)


def some(sites: dict[str, Site], *, least: int = 1) -> dict[str, tuple[int, ...]]:
    """All but the last third of every site's units."""
    return {n: tuple(range(max(least, s.n_units - max(1, s.n_units // 3)))) for n, s in sites.items()}


def repeat_features_(model: nn.Module, site: Site, keep: tuple[int, ...]) -> None:
    """Makes every FFN unit that goes a copy of one that stays, with other weights to read it."""
    for cut in site.cuts:
        module = model.get_submodule(cut.path)
        if cut.axis == "out":
            with torch.no_grad():
                for unit in range(len(keep), site.n_units):
                    module.weight[unit] = module.weight[unit % len(keep)]
                    if module.bias is not None:
                        module.bias[unit] = module.bias[unit % len(keep)]


@pytest.mark.parametrize("family,head", [("bert", "BertForSequenceClassification"), ("llama", "LlamaForCausalLM")])
def test_units_that_the_others_can_stand_for_are_no_loss(family, head):
    model = build(family, head)
    sites = {n: s for n, s in find_sites(model).items() if s.kind == "ffn"}
    keep = some(sites)
    for name, site in sites.items():
        repeat_features_(model, site, keep[name])
    before = outputs(model)
    masks = inject_(model, sites)
    for name in sites:  # as if learned
        torch.nn.init.uniform_(masks[name].mu, 0.5, 2.0)
    batch = {"input_ids": token_ids(batch=8, length=12)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    reconstruct_(model, masks, sites, keep, [batch], **EXACT)
    everything = find_sites(model)
    n_units = {name: site.n_units for name, site in everything.items()}
    plan = PruningPlan(model.config.model_type, n_units, {n: keep.get(n, tuple(range(u))) for n, u in n_units.items()})
    assert all((masks[name].mu == 1).all() for name in sites)
    assert (outputs(compact_(model, plan)) - before).abs().max() < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_channels_that_are_combinations_of_others_are_no_loss(kernel, bias):
    """Linear layers, 1x1 and 3x3 convolutions, with stride; with a bias, sums that add up to a constant too."""
    torch.manual_seed(0)
    first = nn.Linear(5, 9) if not kernel else nn.Conv2d(2, 9, 3)
    second = nn.Linear(9, 4, bias=bias) if not kernel else nn.Conv2d(9, 4, kernel, stride=2, bias=bias)
    end = (
        [nn.ReLU(), nn.Linear(4, 2)]
        if not kernel
        else [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    )
    net = nn.Sequential(first, second, *end).double().eval()
    x = torch.randn(60, 5).double() if not kernel else torch.randn(12, 2, 9, 9).double()
    with torch.no_grad():  # no activation between: features 6, 7, 8 are sums of the first six, up to a constant
        mix = torch.randn(3, 6).double()
        first.weight[6:] = torch.tensordot(mix, first.weight[:6], dims=1)
        first.bias[6:] = mix @ first.bias[:6] + (1.0 if bias else 0.0)
        before = net(x)
    sites = read_by_layer(net, x, "1")
    (site,) = sites
    keep = {site: tuple(range(6))}
    masks = inject_(net, sites)
    reconstruct_(net, masks, sites, keep, [{"inputs": x[:6]}, {"inputs": x[6:]}], **EXACT)
    plan = PruningPlan("Sequential", {site: 9}, keep)
    assert (compact_module_(net, sites, plan)(x) - before).abs().max() < 1e-6


def test_the_refit_is_the_least_squares_solution_on_real_tokens():
    model, batch = build("llama", "LlamaModel"), padded_batch()
    sites = {n: s for n, s in find_sites(model).items() if n == "layers.0.ffn"}
    (site,), keep = sites, (0, 2, 5, 6, 9)
    masks = inject_(model, sites)
    layer = model.layers[0].mlp.down_proj
    x = read_by(model, "layers.0.mlp.down_proj", batch)[batch["attention_mask"].bool()]
    target = x @ layer.weight.detach().T
    expected = torch.linalg.lstsq(x[:, keep], target).solution
    reconstruct_(model, masks, sites, {site: keep}, [batch], **EXACT)
    assert torch.allclose(layer.weight.detach().T[list(keep)], expected, atol=1e-6)


def test_a_strong_ridge_leaves_the_weights_as_they_are():
    net, batch = dense_net()
    sites = find_channels(net, batch["inputs"][:2]).sites
    masks = inject_(net, sites)
    before = net[2].weight.detach().clone()
    reconstruct_(net, masks, sites, some(sites), [batch], console=Quiet(), ridge=1e9)
    assert torch.allclose(net[2].weight, before, atol=1e-6)


def test_later_layers_are_fitted_to_what_the_cut_earlier_ones_give_them():
    """Both layers cut: refitting in order beats refitting each on the dense model's inputs."""
    found = []
    for sequential in (True, False):
        net, batch = dense_net()
        target = net(batch["inputs"]).detach()
        sites = find_channels(net, batch["inputs"][:2]).sites
        keep = some(sites)
        masks = inject_(net, sites)
        order = sorted(sites, key=lambda name: sites[name].consumers()[0].path)
        parts = [sites] if sequential else [{name: sites[name]} for name in reversed(order)]
        for part in parts:
            open_ = {name: tuple(range(site.n_units)) for name, site in sites.items()}
            masks.set_keep(open_)
            reconstruct_(net, masks, part, open_ | {name: keep[name] for name in part}, [batch], **EXACT)
        masks.set_keep(keep)
        found.append(float((net(batch["inputs"]).detach() - target).square().mean()))
    assert found[0] < found[1]


def test_multipliers_are_the_least_squares_solution():
    net, batch = dense_net()
    sites = read_by_layer(net, batch["inputs"], "2")
    (site,), keep = sites, (0, 1, 4, 6)
    masks = inject_(net, sites)
    x = read_by_inputs(net, batch)
    added = torch.einsum("nj,oj->jno", x, net[2].weight.detach()).flatten(1)  # what each unit adds to the output
    expected = torch.linalg.lstsq(added[list(keep)].T, added.sum(0)).solution
    rescale_(net, masks, sites, {site: keep}, [batch], **EXACT)
    assert torch.allclose(masks[site].mu.detach()[list(keep)].double(), expected, atol=1e-5)
    assert (masks[site].mu[[2, 3, 5, 7]] == 1).all()
    masked = net(batch["inputs"])
    plan = PruningPlan("Sequential", {site: 8}, {site: keep})
    assert torch.allclose(compact_module_(net, sites, plan)(batch["inputs"]), masked)


def read_by_inputs(net: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.relu(net[0](batch["inputs"])).detach()


def test_wild_multipliers_are_left_alone():
    net, batch = dense_net()
    sites = read_by_layer(net, batch["inputs"], "2")
    (site,) = sites
    with torch.no_grad():  # the unit that stays would have to be a hundred times as large
        net[0].weight[1] = 100 * net[0].weight[0]
        net[0].bias[1] = 100 * net[0].bias[0]
        net[2].weight[:, 1] = net[2].weight[:, 0]
    masks = inject_(net, sites)
    rescale_(net, masks, sites, {site: (0, 2)}, [batch], **EXACT)
    assert (masks[site].mu == 1).all()


def test_heads_get_one_multiplier_each():
    model, batch = build("llama", "LlamaModel"), padded_batch()
    sites = {n: s for n, s in find_sites(model).items() if n == "layers.0.kv_groups"}
    (site,) = sites
    masks = inject_(model, sites)
    layer = model.layers[0].self_attn.o_proj
    x = read_by(model, "layers.0.self_attn.o_proj", batch)[batch["attention_mask"].bool()]
    n = sites[site].n_units
    added = torch.stack([p @ w.T for p, w in zip(x.chunk(n, 1), layer.weight.detach().chunk(n, 1))]).flatten(1)
    keep = tuple(range(n - 1))
    expected = torch.linalg.lstsq(added[list(keep)].T, added.sum(0)).solution
    rescale_(model, masks, sites, {site: keep}, [batch], **EXACT)
    assert torch.allclose(masks[site].mu.detach()[list(keep)].double(), expected, atol=1e-5)
