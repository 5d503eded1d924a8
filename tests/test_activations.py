"""Scores of activations against their formulas by hand, and means that move into biases."""

import pytest
import torch
from conftest import CASES, TINY, build, inputs_of, token_ids
from torch import nn

from ibprune.activations import activation_scores, compensate_, flap_scores
from ibprune.channels import find_channels
from ibprune.console import Quiet
from ibprune.embeddings import factorize_
from ibprune.errors import BadRecipe
from ibprune.groups import Site
from ibprune.inject import inject_
from ibprune.sites import find_family, find_sites

ONE = dict(total=1, console=Quiet())


def padded_batch() -> dict[str, torch.Tensor]:
    ids = token_ids(batch=3)
    real = torch.ones_like(ids)
    real[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": real}


def read_by(model, path: str, batch) -> torch.Tensor:
    """What a module reads of a batch."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return torch.cat(seen)


def dense_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    return net, {"inputs": torch.randn(40, 5).double()}


def read_by_layer(net: nn.Module, x: torch.Tensor, path: str) -> dict[str, Site]:
    sites = find_channels(net, x[:2]).sites
    return {name: site for name, site in sites.items() if site.consumers()[0].path == path}


def test_activation_is_the_root_sum_over_sequences_of_squared_mean_sizes():
    model, batch = build("llama", "LlamaModel"), padded_batch()
    sites = {n: s for n, s in find_sites(model).items() if s.kind != "vocab"}
    inject_(model, sites)
    scores = activation_scores(model, sites, [batch], **ONE)
    real = batch["attention_mask"].unsqueeze(-1)
    for site, path, width in (("layers.1.ffn", "mlp.down_proj", 1), ("layers.1.kv_groups", "self_attn.o_proj", None)):
        x = read_by(model, f"layers.1.{path}", batch).abs()
        means = (x * real).sum(1) / real.sum(1)  # (sequences, features)
        expected = means.square().sum(0).view(sites[site].n_units, width or -1).sum(1).sqrt()
        assert torch.allclose(scores[site], expected), site
    assert set(scores) == set(sites)


@pytest.mark.parametrize(
    "family, head", [("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")]
)
def test_a_decoders_padding_is_that_of_the_text_it_writes(family, head):
    """Both texts are equally long here, so that nothing but the values tells the masks apart."""
    model, batch = build(family, head), padded_batch()
    batch |= {"labels": batch["input_ids"].clone(), "decoder_input_ids": batch["input_ids"].roll(1, 1)}
    batch["labels"][0, 3:] = -100
    sites = {n: s for n, s in find_sites(model).items() if s.kind == "ffn"}
    scores = activation_scores(model, sites, [batch], **ONE)
    for name, site in sites.items():
        real = (batch["labels"] != -100 if "decoder" in name else batch["attention_mask"]).unsqueeze(-1)
        x = read_by(model, site.mask_at.path, batch).abs()
        assert torch.allclose(scores[name], ((x * real).sum(1) / real.sum(1)).square().sum(0).sqrt()), name


def test_fluctuation_is_the_variance_times_the_weights_that_read_it():
    model, batch = build("bert", "BertModel"), padded_batch()
    sites = {n: s for n, s in find_sites(model).items() if s.kind in ("heads", "ffn")}
    scores = flap_scores(model, sites, [batch], **ONE)
    raw = {}
    for name, path in (("ffn", "output.dense"), ("heads", "attention.output.dense")):
        for i in range(3):
            layer = model.get_submodule(f"encoder.layer.{i}.{path}")
            x = read_by(model, f"encoder.layer.{i}.{path}", batch)[batch["attention_mask"].bool()]
            each = x.var(0, unbiased=False) * layer.weight.detach().square().sum(0)
            each = each.view(sites[f"encoder.layer.{i}.{name}"].n_units, -1).sum(1)
            raw[f"encoder.layer.{i}.{name}"] = (each - each.mean()) / each.std(unbiased=False)
    least = min(score.min() for score in raw.values())
    assert set(scores) == set(raw)
    for name, score in raw.items():
        assert torch.allclose(scores[name], score - least), name


def test_a_convolution_reads_a_channel_through_its_kernel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2))
    net, x = net.double().eval(), torch.rand(5, 2, 6, 6).double()
    sites = read_by_layer(net, x, "2")
    (site,) = sites
    score = flap_scores(net, sites, [{"inputs": x}], **ONE)[site]
    patches = nn.functional.unfold(net[1](net[0](x)), 3, padding=1).transpose(1, 2).flatten(0, 1).detach()
    each = patches.var(0, unbiased=False) * net[2].weight.detach().flatten(1).square().sum(0)
    each = each.view(4, 9).sum(1)
    assert torch.allclose(score, (each - each.min()) / each.std(unbiased=False))


def test_the_mean_of_what_goes_moves_into_the_bias():
    net, batch = dense_net()
    sites = read_by_layer(net, batch["inputs"], "2")
    (site,) = sites
    with torch.no_grad():
        net[0].weight[2] = 0  # a constant unit: the mean is all it has
        net[0].bias[2] = 1.5
        before = net(batch["inputs"])
        keep = {site: tuple(j for j in range(8) if j != 2)}
        assert compensate_(net, sites, keep, [batch]) == []
        net[0].bias[2] = 0  # as if cut
        assert torch.allclose(net(batch["inputs"]), before)


def test_a_reader_without_a_bias_is_named_and_left_alone():
    model, batch = build("llama", "LlamaModel"), padded_batch()
    sites = {n: s for n, s in find_sites(model).items() if s.kind == "ffn"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keep = {name: (0, 3) for name in sites}
    assert compensate_(model, sites, keep, [batch]) == [f"layers.{i}.mlp.down_proj" for i in range(3)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fluctuation_refuses_units_that_norms_read():
    model = build("bert", "BertModel")
    sites = {n: s for n, s in find_sites(model).items() if s.kind in ("heads", "hidden", "layers")}
    with pytest.raises(BadRecipe, match="hidden, layers are not: use --kinds heads, or another score"):
        flap_scores(model, sites, [padded_batch()], **ONE)


@pytest.mark.parametrize("family", TINY)
def test_every_unit_of_every_family_has_activations(family):
    """Every mask's features are seen, as many as there are units, and never as zeros alone."""
    model = build(family, dict(CASES)[family])
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = {n: s for n, s in find_sites(model).items() if s.kind != "vocab"}
    inject_(model, sites)
    batch = inputs_of(model)
    for key in [key for key in batch if "decoder" in key and batch[key] is None]:
        del batch[key]
    scores = activation_scores(model, sites, [batch], **ONE)
    unused = ("pooler", "head", "pre_head")  # by the last model of the row
    for name, site in sites.items():
        assert scores[name].shape == (site.n_units,)
        assert name.rpartition(".")[2] in unused or scores[name].max() > 0, name


def test_features_are_seen_before_the_mask_and_no_hook_stays():
    model, batch = build("bert", "BertModel"), padded_batch()
    sites = {n: s for n, s in find_sites(model).items() if n == "encoder.layer.0.ffn"}
    masks = inject_(model, sites)
    before = activation_scores(model, sites, [batch], **ONE)
    masks.set_keep({"encoder.layer.0.ffn": (1,)})
    after = activation_scores(model, sites, [batch], **ONE)
    assert torch.equal(before["encoder.layer.0.ffn"], after["encoder.layer.0.ffn"])
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert hooks == 1
