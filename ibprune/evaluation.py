"""Measures a model on held-out data: the metrics of its objective."""

import torch
from torch import nn
from torch.nn import functional as F

from ibprune.collating import no_answer
from ibprune.console import Quiet
from ibprune.feeding import Feed
from ibprune.losses import Objective, dense_batch, forward, pooled, span_logits
from ibprune.metrics import load_metric
from ibprune.names import ANSWERS, TAGS, WRITES
from ibprune.processes import on_main

LONGEST_ANSWER = 30  # tokens
LOWER_IS_BETTER = ("perplexity",)


def evaluate_model(
    model: nn.Module,
    feed: Feed,
    objective: Objective,
    *,
    dense: nn.Module | None = None,
    console: Quiet,
    what: str,
) -> dict[str, float]:
    """Metrics on the held-out batches, in eval mode and full precision.

    Classification and regression: the named metrics. Tags: accuracy and F1 over the tagged words that are read.
    Questions: exact match and F1 of the best span over all windows of the context. Language models: perplexity, exp
    of the mean negative log-likelihood a token. Encoders: mean cosine of the pooled embedding to the dense model's
    (1 for the dense model itself), and recall@1 of each text's second half among all second halves, looked up by
    its first half. Of several processes the main one measures.

    Args:
        dense: The dense model, for encoders; None when `model` is it.
    """
    model.eval()
    return on_main(lambda: _measured(model, feed, objective, dense, console, what))


@torch.no_grad()
def _measured(
    model: nn.Module, feed: Feed, objective: Objective, dense: nn.Module | None, console: Quiet, what: str
) -> dict[str, float]:
    loader = feed.held_out()
    batches = console.track(loader, what, len(loader))
    device = next(model.parameters()).device
    on_device = ({key: value.to(device) for key, value in batch.items()} for batch in batches)
    if objective.name in ("classification", "regression"):
        return _labelled(model, on_device, objective, feed.metrics)
    if objective.name == TAGS:
        return _tagged(model, on_device, feed)
    if objective.name == ANSWERS:
        return _answered(model, on_device, feed)
    if objective.name in ("causal_lm", "masked_lm", WRITES):
        return _perplexity(model, on_device, objective)
    return _encoder(model, on_device, feed, objective, dense)


def metric_names(feed: Feed) -> tuple[str, ...]:
    """What `evaluate_model` gives for a feed."""
    if feed.objective.name in ("causal_lm", "masked_lm", WRITES):
        return ("perplexity",)
    if feed.objective.name == "encoder":
        return ("cosine_to_dense", "recall_at_1")
    return tuple(
        name for metric in feed.metrics for name in (("exact_match", "f1") if metric == "squad" else (metric,))
    )


def _labelled(model: nn.Module, batches, objective: Objective, metrics: tuple[str, ...]) -> dict[str, float]:
    predictions, references = [], []
    for batch in batches:
        logits = forward(model, batch).logits.float()
        predicted = logits.argmax(-1) if objective.name == "classification" else logits.squeeze(-1)
        predictions += predicted.cpu().tolist()
        references += batch["labels"].cpu().tolist()
    return _compute(metrics, predictions, references)


def _compute(metrics: tuple[str, ...], predictions: list, references: list) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in metrics:
        found |= load_metric(name).compute(predictions=predictions, references=references)
    return {name: float(value) for name, value in found.items()}


def _tagged(model: nn.Module, batches, feed: Feed) -> dict[str, float]:
    predictions, references = [], []  # tags of each text's words
    for batch in batches:
        predicted, labels = forward(model, batch).logits.argmax(-1), batch["labels"]
        for ours, theirs in zip(predicted, labels):
            predictions.append(ours[theirs != -100].tolist())
            references.append(theirs[theirs != -100].tolist())
    names, found = feed.collate.data.labels, {}
    for name in feed.metrics:
        code = (lambda rows: [[names[tag] for tag in row] for row in rows]) if name == "entity_f1" else _flat
        found |= _compute((name,), code(predictions), code(references))
    return found


def _flat(rows: list[list[int]]) -> list[int]:
    return [value for row in rows for value in row]


def _answered(model: nn.Module, batches, feed: Feed) -> dict[str, float]:
    """The best span of a question is taken over its windows; "" where no answer scores higher, if data have such."""
    data, start = feed.collate.data, 0
    spans: dict[int, tuple[float, int, int]] = {}  # by question: score, first and last character
    nowhere: dict[int, float] = {}
    for batch in batches:
        logits = span_logits(forward(model, batch), batch)
        rows = feed.held_out_set[start : start + len(logits)]
        start += len(logits)
        for number, offsets, both, ids in zip(rows["row"], rows["offsets"], logits, rows["input_ids"]):
            first, last = both[:, : len(offsets)]
            inside = torch.tensor([a < b for a, b in offsets], device=both.device)
            scores = first[:, None] + last[None, :]
            allowed = inside[:, None] & inside[None, :]
            allowed &= torch.ones_like(allowed).triu() & ~torch.ones_like(allowed).triu(LONGEST_ANSWER)
            scores = scores.masked_fill(~allowed, -torch.inf)
            i, j = divmod(int(scores.argmax()), len(offsets))
            found = float(scores[i, j]), offsets[i][0], offsets[j][1]
            spans[number] = max(spans.get(number, found), found)
            none = no_answer(feed.preprocessor, ids)
            nowhere[number] = min(nowhere.get(number, torch.inf), float(first[none] + last[none]))
    unanswerable = any(not answers for answers in data.train[data.label_column])
    contexts, references = (data.held_out[column] for column in (data.text_columns[1], data.label_column))
    predictions = []
    for number, context in enumerate(contexts):
        score, a, b = spans[number]
        predictions.append("" if unanswerable and nowhere[number] > score else context[a:b])
    return _compute(feed.metrics, predictions, references)


def _perplexity(model: nn.Module, batches, objective: Objective) -> dict[str, float]:
    total, count = 0.0, 0
    for batch in batches:
        logits, labels = forward(model, batch).logits.float(), batch["labels"]
        if objective.name == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        total += F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum").double().item()
        count += int((labels != -100).sum())
    return {"perplexity": float(torch.tensor(total / max(count, 1), dtype=torch.float64).exp())}


def _encoder(model: nn.Module, batches, feed: Feed, objective: Objective, dense: nn.Module | None) -> dict[str, float]:
    cosines = []
    for batch in batches if dense is not None else ():
        mean = pooled(forward(model, batch).last_hidden_state.float(), batch["attention_mask"])
        their_batch = dense_batch(batch)
        theirs = pooled(forward(dense, their_batch).last_hidden_state.float(), their_batch["attention_mask"])
        theirs = theirs if objective.dims is None else theirs[:, list(objective.dims)]
        cosines.append(F.cosine_similarity(mean, theirs))
    queries, answers = (_embed_halves(model, feed, second) for second in (False, True))
    hits = ((queries @ answers.T).argmax(1) == torch.arange(len(queries), device=queries.device)).float()
    cosine = float(torch.cat(cosines).mean()) if cosines else 1.0
    return {"cosine_to_dense": cosine, "recall_at_1": float(hits.mean())}


def _embed_halves(model: nn.Module, feed: Feed, second: bool) -> torch.Tensor:
    """Normalised embeddings of the first or second half of each held-out text's words, (n, d)."""
    column = feed.collate.data.text_columns[0]
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(feed.held_out_set), feed.batch_size):
        texts = [text.split() for text in feed.held_out_set[start : start + feed.batch_size][column]]
        halves = [words[len(words) // 2 :] if second else words[: len(words) // 2] for words in texts]
        batch = feed.collate([{column: " ".join(words)} for words in halves])
        batch = {key: value.to(device) for key, value in batch.items()}
        hidden = forward(model, batch).last_hidden_state.float()
        found.append(F.normalize(pooled(hidden, batch["attention_mask"]), dim=-1))
    return torch.cat(found)
