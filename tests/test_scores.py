"""One-shot scores against brute force."""

import copy
from typing import get_args

import pytest
import torch
from conftest import build, inputs_of, random_keep, token_ids
from torch.nn import functional as F

from ibprune.choosing import in_order
from ibprune.console import Quiet
from ibprune.cutting import probe_loss
from ibprune.embeddings import factorize_
from ibprune.engine import make_accelerator
from ibprune.inject import inject_
from ibprune.losses import Objective, forward, supervised_loss
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe, make_recipe
from ibprune.scores import SCORES, STARTS, blocks_again, fisher_scores, magnitude_scores, random_scores, taylor_scores
from ibprune.sites import find_sites
from ibprune.surgery import compact_


@pytest.mark.parametrize(
    "family,head", [("bert", "BertForSequenceClassification"), ("deberta-v3", "DebertaV2ForSequenceClassification")]
)
def test_gradients_are_those_of_each_sequence_alone(family, head):
    """Fisher is the mean of their squares, Taylor that of their absolute values."""
    model = build(family, head)
    sites = find_sites(model)
    masks = inject_(model, sites)
    ids = token_ids(batch=4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    objective = Objective("classification")
    how = dict(seed=0, total=1, console=Quiet())
    found = fisher_scores(model, masks, [batch], objective, **how)
    taylor = taylor_scores(model, masks, [batch], objective, **how)
    one, absolute = ({n: torch.zeros(s.n_units, dtype=torch.float64) for n, s in sites.items()} for _ in range(2))
    for i in range(4):
        single = {key: value[i : i + 1] for key, value in batch.items()}
        model.zero_grad()
        supervised_loss(objective, forward(model, single), single).sum().backward()
        for name, mask in masks.items():
            one[name] += mask.mu.grad.double().square() / 4
            absolute[name] += mask.mu.grad.double().abs() / 4
    assert set(found) == set(sites) - {"vocab"}
    for name in found:
        shared = family != "bert" and name == "hidden"  # also acts on the table of relative positions, of no sequence
        assert shared or torch.allclose(found[name], one[name], rtol=1e-4, atol=1e-10), name
        assert shared or torch.allclose(taylor[name], absolute[name], rtol=1e-4, atol=1e-7), name


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


@pytest.mark.parametrize("family,head", [("bert", "BertForSequenceClassification"), ("llama", "LlamaForCausalLM")])
def test_a_cut_model_is_scored_as_the_smaller_model_that_it_is(family, head):
    """The gradual score: what is cut has none, and the others score as in the compacted model."""
    model = build(family, head)
    keep = random_keep(find_sites(model), seed=2) | {"hidden": tuple(range(3, 20))}
    ids = token_ids(batch=3)
    labels = torch.tensor([0, 1, 1]) if "Sequence" in head else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = []
    for compacted in (False, True):
        twin = copy.deepcopy(model)
        if compacted:
            sites = find_sites(twin)
            n_units = {name: site.n_units for name, site in sites.items()}
            whole = {name: tuple(range(n)) for name, n in n_units.items()}
            keep = {name: keep[name] if sites[name].kind not in ("vocab", "layers") else whole[name] for name in whole}
            twin = compact_(twin, PruningPlan(family, n_units, keep))
        masks = inject_(twin, find_sites(twin))
        if not compacted:
            keep = {n: units if "sublayer" not in n else (0,) for n, units in keep.items()}
            masks.set_keep({name: keep[name] for name in masks})
        objective = Objective("classification" if "Sequence" in head else "causal_lm")
        found.append(fisher_scores(twin, masks, [batch], objective, seed=0, total=1, console=Quiet()))
    for name, scores in found[0].items():
        gone = torch.ones(len(scores), dtype=torch.bool)
        gone[list(keep[name])] = False
        assert (scores[gone] == 0).all(), name
        assert torch.allclose(scores[~gone], found[1][name], rtol=1e-4, atol=1e-10), name


def test_the_recipe_and_the_scores_name_the_same():
    assert get_args(Recipe.model_fields["score"].annotation) == SCORES
    assert get_args(get_args(Recipe.model_fields["start"].annotation)[0]) == STARTS


def test_a_kind_takes_the_order_of_another_score_and_keeps_its_values():
    """FFN units change places, across layers too; sites that the other score leaves out stay as they are."""
    sites = find_sites(build("llama", "LlamaForCausalLM"))
    values = random_scores(sites, seed=0)
    ffn = [name for name, site in sites.items() if site.kind == "ffn"]
    order = {name: score for name, score in random_scores(sites, seed=1).items() if name in ffn}
    found = in_order(values, order, sites)
    assert all(torch.equal(found[name], values[name]) for name in sites if name not in ffn)
    had, rank, mine = (torch.cat([scores[name] for name in ffn]) for scores in (values, order, found))
    assert torch.equal(mine.sort().values, had.sort().values) and torch.equal(mine.argsort(), rank.argsort())
    assert not torch.equal(mine, had)


def test_the_command_of_a_refitted_run_asks_for_it():
    recipe = make_recipe({"model": "minilm", "budget": 0.3, "score": "taylor", "reconstruct": True, "distill": False})
    assert recipe.command() == "ibprune --model minilm --budget 0.3 --score taylor --reconstruct --distill none"


def test_a_candidate_that_cannot_win_is_not_read_to_its_end():
    """The bound changes no loss below it, and is not used on losses of one's own: these may be negative."""
    model = build("bert", "BertForSequenceClassification").eval()
    sites = {name: site for name, site in find_sites(model).items() if site.kind in ("heads", "ffn")}
    masks = inject_(model, sites)
    read = []
    model.register_forward_hook(lambda *_: read.append(1))
    ids = token_ids(batch=2)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}] * 3
    whole = {name: tuple(range(site.n_units)) for name, site in sites.items()}
    objectives = [
        Objective("classification"),
        Objective("custom", loss=lambda output, labels: F.cross_entropy(output, labels, reduction="none") - 9),
    ]
    for objective in objectives:
        loss_of = probe_loss(model, masks, None, batches, objective, make_accelerator("fp32"))
        loss, read[:] = loss_of(whole), []
        assert loss_of(whole, loss + 1e-6) == loss and len(read) == 3
        read.clear()
        custom = objective.name == "custom"
        assert (loss_of(whole, 0.1) == loss) == custom and len(read) == (3 if custom else 1)


@pytest.mark.parametrize(
    "family,head",
    [
        ("bart", "BartForSequenceClassification"),
        ("albert", "AlbertForSequenceClassification"),
        ("gpt2", "GPT2ForSequenceClassification"),  # it hands its cache on by place, the others by name
        ("opt", "OPTForSequenceClassification"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_blocks_that_run_again_give_the_same_scores_and_keep_less(family, head):
    """Some blocks drop out by their own flag of training: it stays as it is."""
    model = build(family, head).eval()
    sites = {name: site for name, site in find_sites(model).items() if site.kind in ("heads", "ffn", "layers")}
    masks, batch = inject_(model, sites), inputs_of(model) | {"labels": torch.tensor([0, 1])}
    how = dict(seed=0, total=1, console=Quiet())
    before = {name: module.forward for name, module in model.named_modules()}
    kept = []

    def scored() -> dict[str, torch.Tensor]:
        kept.append(0)

        def pack(x: torch.Tensor) -> torch.Tensor:
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return fisher_scores(model, masks, [batch], Objective("classification"), **how)

    plain = scored()
    with blocks_again(model):
        again = scored()
    assert all(torch.equal(plain[name], again[name]) and plain[name].any() for name in sites)
    assert kept[1] < 0.7 * kept[0] or family == "albert"
    assert {name: module.forward for name, module in model.named_modules()} == before
