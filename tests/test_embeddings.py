"""Directions of the token embedding: exact together, ordered by what they change, read off the loss's gradient."""

import copy

import pytest
import torch
from conftest import build, outputs, token_ids

from ibprune.embeddings import METRIC_FLOOR, UNSEEN, TokenUse, factorize_, gradient_moment
from ibprune.losses import Objective


def metric_of(width: int) -> torch.Tensor:
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return root @ torch.diag(torch.logspace(0, -3, width, dtype=torch.float64)) @ root.T


def change(model, weight, rank, counts, metric):
    """What keeping the first directions changes: the weighted sum of D G D^T that `factorize_` promises is least."""
    factors = model.embeddings.word_embeddings
    kept = (factors.weight.double()[:, :rank] @ factors.projection.weight.double()[:, :rank].T).detach()
    difference = weight.double() - kept
    floored = metric / metric.diagonal().mean() + METRIC_FLOOR * torch.eye(len(metric), dtype=torch.float64)
    weights = counts + UNSEEN * counts.mean()
    return float((weights[:, None] * difference @ floored * difference).sum())


@pytest.mark.parametrize("family,head", [("bert", "BertModel"), ("roberta", "RobertaModel"), ("llama", "LlamaModel")])
def test_all_directions_together_are_the_embedding(family, head):
    model = build(family, head)
    before = outputs(model)
    factorize_(model, TokenUse(torch.arange(61.0), metric_of(24)))
    assert torch.allclose(outputs(model), before, atol=1e-6 if family == "llama" else 1e-10)


@pytest.mark.parametrize("rank", [1, 7, 16])
def test_the_first_directions_change_least_of_what_the_metric_feels(rank):
    dense = build("bert", "BertModel")
    counts = torch.randint(0, 90, (61,), generator=torch.Generator().manual_seed(1)).double()
    metric, weight = metric_of(24), dense.embeddings.word_embeddings.weight.detach()
    found = {}
    for name, use in (("metric", TokenUse(counts, metric)), ("counts", TokenUse(counts)), ("nothing", None)):
        model = copy.deepcopy(dense)
        factorize_(model, use)
        found[name] = change(model, weight, rank, counts, metric)
    assert found["metric"] < 0.95 * min(found["counts"], found["nothing"])
    # Eckart and Young: what is left are the singular values beyond the rank
    values, vectors = torch.linalg.eigh(metric / metric.diagonal().mean() + METRIC_FLOOR * torch.eye(24))
    felt = weight @ vectors @ values.sqrt().diag()
    singular = torch.linalg.svdvals(felt * (counts + UNSEEN * counts.mean()).sqrt()[:, None])
    assert found["metric"] == pytest.approx(float(singular[rank:].square().sum()), rel=1e-6)


def test_the_moment_is_that_of_the_losses_gradients():
    model = build("bert", "BertForSequenceClassification")
    batch = {
        "input_ids": token_ids(3),
        "attention_mask": torch.ones(3, 7, dtype=torch.long),
        "labels": torch.tensor([0, 1, 1]),
    }
    batch["attention_mask"][1, 4:] = 0
    found = gradient_moment(model, [batch, batch], Objective("classification"))
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = torch.zeros(24, 24, dtype=torch.float64)
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        vectors = model.bert.embeddings.word_embeddings(one["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=vectors, attention_mask=one["attention_mask"]).logits
        torch.nn.functional.cross_entropy(logits, one["labels"]).backward()
        gradient = vectors.grad[one["attention_mask"].bool()]
        expected += 2 * gradient.T @ gradient
    assert torch.allclose(found, expected, rtol=1e-8)
    assert not model.bert.embeddings.word_embeddings._forward_hooks


def test_no_moment_where_it_would_not_be_the_whole_truth():
    batch = {"input_ids": token_ids(2), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert gradient_moment(build("bert", "BertModel"), [batch], Objective("encoder")) is None
    labelled = batch | {"labels": batch["input_ids"]}
    assert gradient_moment(build("llama-tied", "LlamaForCausalLM"), [labelled], Objective("causal_lm")) is None
    assert gradient_moment(build("llama", "LlamaForCausalLM"), [labelled], Objective("causal_lm")) is not None
