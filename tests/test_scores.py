"""One-shot scores against brute force."""

import pytest
import torch
from conftest import build, token_ids

from ibprune.console import Quiet
from ibprune.embeddings import factorize_
from ibprune.inject import inject_
from ibprune.losses import Objective, forward, supervised_loss
from ibprune.scores import fisher_scores, magnitude_scores, random_scores
from ibprune.sites import find_sites


@pytest.mark.parametrize(
    "family,head", [("bert", "BertForSequenceClassification"), ("deberta-v3", "DebertaV2ForSequenceClassification")]
)
def test_fisher_is_the_mean_of_squared_gate_gradients_per_sequence(family, head):
    model = build(family, head)
    sites = find_sites(model)
    masks = inject_(model, sites)
    ids = token_ids(batch=4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    objective = Objective("classification")
    found = fisher_scores(model, masks, [batch], objective, seed=0, total=1, console=Quiet())
    one = {name: torch.zeros(site.n_units, dtype=torch.float64) for name, site in sites.items()}
    for i in range(4):
        single = {key: value[i : i + 1] for key, value in batch.items()}
        model.zero_grad()
        supervised_loss(objective, forward(model, single), single).sum().backward()
        for name, mask in masks.items():
            one[name] += mask.mu.grad.double().square() / 4
    assert set(found) == set(sites) - {"vocab"}
    for name in found:
        shared = family != "bert" and name == "hidden"  # also acts on the table of relative positions, of no sequence
        assert shared or torch.allclose(found[name], one[name], rtol=1e-4, atol=1e-10), name


def test_an_encoder_without_labels_gets_the_gauss_newton_curvature():
    """E[(v . df/dz)^2] = ||df/dz||^2: averaged over draws it matches the finite-difference norm."""
    model = build("bert", "BertModel")
    masks = inject_(model, {n: s for n, s in find_sites(model).items() if n == "encoder.layer.2.ffn"})
    ids = token_ids(batch=2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = fisher_scores(model, masks, [batch] * 300, Objective("encoder"), seed=0, total=300, console=Quiet())
    scores = found["encoder.layer.2.ffn"]
    exact = torch.zeros(20, dtype=torch.float64)
    mask = masks["encoder.layer.2.ffn"]

    def features():
        out = forward(model, batch)
        hidden = torch.nn.functional.normalize(out.last_hidden_state, dim=-1) / 7**0.5
        mean = torch.nn.functional.normalize(out.last_hidden_state.mean(1), dim=-1)
        return torch.cat([mean, hidden.flatten(1), (0.1 / 24) ** 0.5 * out.pooler_output], dim=1)

    with torch.no_grad():
        for unit in range(20):
            ends = []
            for step in (1e-2, -1e-2):
                mask.mu.data[unit] = 1 + step
                ends.append(features())
                mask.mu.data[unit] = 1
            exact[unit] = ((ends[0] - ends[1]) / 2e-2).square().sum(1).mean()
    assert torch.corrcoef(torch.stack([scores, exact]))[0, 1] > 0.98
    assert torch.allclose(scores.sum(), exact.sum(), rtol=0.15)


def test_magnitude_counts_every_weight_of_a_unit_once():
    for family, head in (("bert", "BertForMaskedLM"), ("llama-tied", "LlamaForCausalLM")):
        model = build(family, head)
        factorize_(model)
        sites = find_sites(model)
        scores = magnitude_scores(model, sites)
        site = next(s for s in sites.values() if s.kind == "ffn")
        expected = torch.zeros(site.n_units, dtype=torch.float64)
        for cut in site.cuts:
            module = model.get_submodule(cut.path)
            weight = module.weight.detach()
            expected += (weight if cut.axis == "out" else weight.T).square().sum(1)
            if cut.axis == "out" and module.bias is not None:
                expected += module.bias.detach().square()
        assert torch.allclose(scores[site.name], expected)
        assert all(len(scores[name]) == s.n_units for name, s in sites.items())


def test_random_scores_follow_the_seed():
    sites = find_sites(build("bert", "BertModel"))
    first, again, other = (random_scores(sites, seed=seed)["hidden"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
