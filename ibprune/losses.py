"""What a model is trained and judged by: supervised, distillation and sensitivity losses by objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ibprune.errors import BadData
from ibprune.names import ANSWERS, TAGS, WRITES
from ibprune.processes import undistributed
from ibprune.task_heads import complete

OBJECTIVES = ("classification", "regression", "causal_lm", "masked_lm", WRITES, TAGS, ANSWERS, "encoder", "custom")
DIVERGENCES = ("forward", "reverse", "balanced")
LAYERED = ("hidden", "relations")
Batch = dict[str, torch.Tensor]
WORDS = "words"  # the key of the word that each token belongs to, -1 for none
DENSE = "dense_"  # begins the keys of what the dense model reads, where its tokens are not the pruned model's


@dataclass(frozen=True)
class Objective:
    """How outputs are compared.

    Attributes:
        name: One of `OBJECTIVES`.
        temperature: Softens both distributions in distillation (Hinton et al. 2015).
        divergence: How distributions are compared in distillation, one of `DIVERGENCES` (see `divergence`).
        layers: What of the blocks is distilled beside the outputs, one of `LAYERED` (see `distillation`); "": nothing.
        dims: Kept residual features, so that a narrower student meets the same features of its teacher; None while
            the widths are equal.
        pooler_dims: The same for the pooler's output.
        axes: Into which the student's residual stream was turned (`ibprune.rotation`), of which `dims` are then
            columns, (d, d); None where it was not.
        loss: For "custom": (output, labels) -> one loss per sample, (batch,); it is not distilled.
    """

    name: str
    temperature: float = 2.0
    divergence: str = "forward"
    layers: str = ""
    dims: tuple[int, ...] | None = None
    pooler_dims: tuple[int, ...] | None = None
    axes: torch.Tensor | None = None
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def real_tokens(batch: Batch, *, written: bool = False) -> torch.Tensor | None:
    """1 at tokens and 0 at padding, (batch, length); None where the batch does not say.

    Args:
        written: Of the text that an encoder-decoder's decoder is given, not of the one that is read. They differ where
            it writes: for a label it is given what the encoder reads.
    """
    if written and {"decoder_input_ids", "labels"} <= batch.keys():  # the one is the other, shifted by one
        return (batch["labels"] != -100).long()
    return batch.get("attention_mask")


class Logits(NamedTuple):
    """The output of a plain module, under the name that transformers gives it."""

    logits: torch.Tensor


def forward(model: nn.Module, batch: Batch):
    """The model's outputs on a batch, its labels left out (the losses here compute their own).

    A batch {"inputs": x, "labels": y} goes to `model(x)`, whose tensor counts as logits.

    Raises:
        BadData: Such a model returns neither a tensor nor something with logits.
    """
    if "inputs" in batch:
        outputs = model(batch["inputs"])
        if isinstance(outputs, torch.Tensor):
            return Logits(outputs)
        if not hasattr(outputs, "logits"):
            raise BadData(
                f"expected {type(model).__name__} to return a tensor or an output with 'logits', found "
                f"{type(outputs).__name__}: wrap it in a module that returns its logits."
            )
        return outputs
    own = {key: value for key, value in batch.items() if not key.startswith(DENSE)}
    return model(
        **complete(undistributed(model), {key: value for key, value in own.items() if key not in ("labels", WORDS)})
    )


def dense_batch(batch: Batch) -> Batch:
    """The same texts as the dense model reads them."""
    return {key.removeprefix(DENSE): value for key, value in batch.items() if key.startswith(DENSE)} or batch


def pooled(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens, (batch, length, d) -> (batch, d), as sentence embeddings are made."""
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)


def span_logits(outputs, batch: Batch) -> torch.Tensor:
    """Logits of where an answer starts and where it ends, (batch, 2, length), without hope at padding."""
    logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
    return logits.masked_fill(batch["attention_mask"].unsqueeze(1) == 0, -1e4)


def supervised_loss(objective: Objective, outputs, batch: Batch) -> torch.Tensor:
    """Loss on the labels, per sequence, (batch,); zeros for an encoder, which has none."""
    match objective.name:
        case "classification":
            return _class_loss(outputs.logits.float(), batch["labels"])
        case "regression":
            return (outputs.logits.float().squeeze(-1) - batch["labels"]).square()
        case "causal_lm":
            return _token_loss(outputs.logits[:, :-1], batch["labels"][:, 1:])
        case "masked_lm" | "seq2seq_lm" | "token_classification":
            return _token_loss(outputs.logits, batch["labels"])
        case "question_answering":  # the mean of start and end
            each = F.cross_entropy(span_logits(outputs, batch).transpose(1, 2), batch["labels"], reduction="none")
            return each.mean(1)
        case "custom":
            losses = objective.loss(outputs.logits, batch["labels"])
            if not isinstance(losses, torch.Tensor):
                raise BadData(
                    f"expected a tensor from loss(output, target), a loss per sample, found {type(losses).__name__}."
                )
            if losses.shape != (len(batch["labels"]),):
                raise BadData(
                    f"expected a loss per sample, ({len(batch['labels'])},), from loss(output, target), found "
                    f"{tuple(losses.shape)}: use reduction='none' and average over each sample's own outputs."
                )
            return losses
        case _:
            return outputs.last_hidden_state.new_zeros(len(batch["input_ids"]))


def _class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy per sample, (batch,), with classes (batch,) or their shares (batch, classes).

    Raises:
        BadData: Outputs and labels of any other kind, as a module of the user's own may have.
    """
    fits = labels.shape == (logits.shape if labels.is_floating_point() else logits.shape[:1])
    if logits.dim() != 2 or not fits:
        raise BadData(
            "expected outputs (batch, classes), with classes (batch,) or shares (batch, classes), for cross entropy, "
            f"found {tuple(logits.shape)} and {tuple(labels.shape)} of {labels.dtype}: give loss=, a function of both."
        )
    labels = labels if labels.is_floating_point() else labels.long()  # classes may come in fewer bits, or as truth
    try:
        return F.cross_entropy(logits, labels, reduction="none")
    except IndexError as error:  # on a CPU
        raise BadData(f"expected classes from 0 to {logits.shape[1] - 1}, found {labels.max().item()}.") from error


def _token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # mean over each sequence's labels
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp_min(1)


def distill_loss(objective: Objective, student, teacher, batch: Batch) -> torch.Tensor:
    """How far the student is from the dense model, per sequence, (batch,).

    Classifiers and language models: the `divergence` of the logits, of a token classifier at the tokens that have a
    tag: at the others nobody reads its outputs, and nothing trained the teacher's. Question answering: the mean of both
    ends, over the tokens of the window. Regression: squared difference. Encoders: cosine distance of tokens and of
    pooled embeddings, the KL between their similarities to the other sequences of the batch, and the squared difference
    of the pooler output.
    Where the two models read different tokens, words take the place of tokens.
    """
    match objective.name:
        case "classification":
            return divergence(objective, student.logits, teacher.logits)
        case "regression":
            return (student.logits - teacher.logits).float().square().squeeze(-1)
        case "causal_lm":
            real = batch["attention_mask"].float()
            return (divergence(objective, student.logits, teacher.logits) * real).sum(1) / real.sum(1)
        case "question_answering":
            return divergence(objective, *(span_logits(outputs, batch) for outputs in (student, teacher))).mean(1)
        case "masked_lm" | "seq2seq_lm" | "token_classification":
            real = (batch["labels"] != -100).float()
            each = divergence(objective, student.logits, teacher.logits)
            return (each * real).sum(1) / real.sum(1).clamp_min(1)
        case _:
            return _encoder_distance(objective, student, teacher, batch)


def divergence(objective: Objective, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """T^2 times how far two softened distributions are apart, of logits (..., classes) -> (...), in nats.

    With t the teacher's and s the student's softmax(logits / T): "forward" is KL(t || s) (Hinton et al. 2015),
    "reverse" KL(s || t), and "balanced" both, weighted for each distribution by whose entropy is larger (the student's
    loss of BD-KD, Amara et al. 2022, arXiv 2212.12965):

        2/3 KL(t || s) + 1/3 KL(s || t)   where H(s) < H(t): a student too sure is to cover what the teacher does,
        1/3 KL(t || s) + 2/3 KL(s || t)   elsewhere.

    The weights 2 and 1 are ours, divided by their sum, so that the size is that of the other two.

    Example:
        >>> logits = torch.log(torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
        >>> divergence(Objective("classification", temperature=1.0), *logits)
        tensor(0.1308)
    """
    temperature = objective.temperature
    ours, theirs = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    match objective.divergence:
        case "forward":
            found = _kl(theirs, ours)
        case "reverse":
            found = _kl(ours, theirs)
        case _:
            forward, reverse = _kl(theirs, ours), _kl(ours, theirs)
            too_sure = _entropy(ours.detach()) < _entropy(theirs)
            found = torch.where(too_sure, 2 * forward + reverse, forward + 2 * reverse) / 3
    return temperature**2 * found


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probabilities, (..., classes) -> (...)."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def _entropy(logs: torch.Tensor) -> torch.Tensor:
    return -(logs.exp() * logs).sum(-1)


def _encoder_distance(objective: Objective, student, teacher, batch: Batch) -> torch.Tensor:
    mask, their_mask = batch["attention_mask"], dense_batch(batch)["attention_mask"]
    ours, theirs = student.last_hidden_state.float(), teacher.last_hidden_state.float()
    own = theirs if objective.dims is None else theirs[..., list(objective.dims)]
    # A masked student has all features, the cut ones 0: there dims is None and their absence counts.
    our_mean, their_mean = pooled(ours, mask), pooled(theirs, their_mask)
    loss = 1 - F.cosine_similarity(our_mean, pooled(own, their_mask), dim=-1)
    real = mask.float()
    if their_mask is not mask:  # other tokens of the same words
        words, their_words = batch[WORDS], dense_batch(batch)[WORDS]
        n_words = int(torch.maximum(words.max(), their_words.max())) + 1
        (ours, real), (own, there) = (_word_means(*side, n_words) for side in ((ours, words), (own, their_words)))
        real = real * there
    tokens = ((1 - F.cosine_similarity(ours, own, dim=-1)) * real).sum(1) / real.sum(1).clamp_min(1)
    loss = tokens + loss
    if len(ours) > 2:
        loss = loss + relations_apart(relations(our_mean), relations(their_mean))
    if getattr(student, "pooler_output", None) is not None:
        target = teacher.pooler_output.float()
        target = target if objective.pooler_dims is None else target[..., list(objective.pooler_dims)]
        loss = loss + 0.1 * (student.pooler_output.float() - target).square().mean(-1)
    return loss


def _word_means(hidden: torch.Tensor, words: torch.Tensor, n_words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over each word's tokens, (batch, n_words, d), and whether it has any, (batch, n_words)."""
    member = F.one_hot(words + 1, n_words + 1)[..., 1:].transpose(1, 2).to(hidden.dtype)  # (batch, n_words, length)
    count = member.sum(-1)
    return member @ hidden / count.clamp_min(1).unsqueeze(-1), (count > 0).to(hidden.dtype)


def relations(x: torch.Tensor, real: torch.Tensor | None = None, temperature: float = 0.05) -> torch.Tensor:
    """Log-softmax of the cosines of each vector to the others of its set, (..., n, d) -> (..., n, n).

    Args:
        real: 0 for vectors to which none is related, (..., n).
        temperature: For d = 400 features as scaled dot products of vectors that a LayerNorm left, of length sqrt(d).
    """
    x = F.normalize(x, dim=-1)
    away = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    if real is not None:
        away = away | (real == 0).unsqueeze(-2)
    return F.log_softmax((x @ x.transpose(-1, -2) / temperature).masked_fill(away, -1e4), dim=-1)


def relations_apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) of each vector's relations, (..., n, n) -> (..., n)."""
    return _kl(theirs, ours)


def training_loss(objective: Objective, student, teacher, batch: Batch) -> torch.Tensor:
    """Mean over the batch of supervised plus distillation loss; without a teacher, supervised alone."""
    loss = supervised_loss(objective, student, batch)
    if teacher is not None:
        loss = loss + distill_loss(objective, student, teacher, batch)
    return loss.mean()


def sensitivity(objective: Objective, outputs, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """A scalar per sequence whose squared gate gradient estimates the gate curvature, (batch,).

    With labels it is the supervised loss (empirical Fisher). An encoder has none, and the gradient of
    its distance to itself is 0: there it is a random projection v . f of the outputs, whose squared
    gradient has the expectation ||df/dz||^2, the Gauss-Newton curvature of the squared distance.
    """
    if objective.name != "encoder":
        return supervised_loss(objective, outputs, batch)
    hidden, mask = outputs.last_hidden_state.float(), batch["attention_mask"]
    parts = [F.normalize(pooled(hidden, mask), dim=-1)]
    tokens = F.normalize(hidden, dim=-1) * mask.unsqueeze(-1) / mask.sum(1).sqrt()[:, None, None]
    parts.append(tokens.flatten(1))
    if getattr(outputs, "pooler_output", None) is not None:
        parts.append((0.1 / outputs.pooler_output.shape[-1]) ** 0.5 * outputs.pooler_output.float())
    draws = [torch.randn(part.shape, generator=generator).to(part.device) for part in parts]
    return sum((part * draw).sum(-1) for part, draw in zip(parts, draws))
