"""The token embedding of a transformer: its factors, and the rows of its vocabulary."""

from dataclasses import dataclass

import torch
from torch import nn

from ibprune.errors import PlanMismatch, UnsupportedModel
from ibprune.losses import Batch, Objective, forward, supervised_loss
from ibprune.plans import PruningPlan
from ibprune.rebuild import FactorizedEmbedding, FactorizedUnembedding, factorize_modules, full_path, replace_module
from ibprune.sites import find_family, find_sites
from ibprune.slicing import slice_

METRIC_FLOOR = 0.1  # of its mean: what every direction counts at the least
UNSEEN = 0.1  # of the mean count: what a token counts at the least, where labels say what the model is for


@dataclass(frozen=True)
class TokenUse:
    """What the data make of the token embedding.

    Attributes:
        counts: How often each token id occurs, (V,).
        metric: Second moment of the loss's gradient at the embedding's output, (d, d); None where there are no labels,
            or where an output is tied to the embedding.
    """

    counts: torch.Tensor
    metric: torch.Tensor | None = None


def factorize_(model: nn.Module, use: TokenUse | None = None) -> None:
    """Writes the token embedding W (V, d) as A (V, d) times B (d, d), its most needed directions first.

    The model's output is unchanged (to rounding). Keeping the first k directions is the change D of W of that rank
    with the least sum_t w_t D_t G D_t^T over the tokens t: G is the metric of `use` with a floor, or the identity, and
    then the directions are the principal ones of the embeddings that the data use. They are the right singular vectors
    V of diag(sqrt(w)) W G^(1/2), with A = W G^(1/2) V and B = V^T G^(-1/2). With a metric the weights are the counts,
    w = counts + mean(counts) / 10; without one, what the model is for is not known, and they are half uniform, so that
    tokens absent from the data keep a share. An output tied to the embedding follows it.

    Args:
        model: A transformers model of a known family.
        use: What the data make of it; None weighs all tokens and directions alike.

    Raises:
        UnsupportedModel: The model reads no tokens, or its embedding is not a plain `nn.Embedding`.
    """
    family = find_family(model.config.model_type)
    if not family.embedding:
        raise UnsupportedModel(f"'{model.config.model_type}' reads no tokens: it has no embedding to factorise.")
    path, output = full_path(model, family.embedding), family.output.removeprefix("/")
    embedding = model.get_submodule(path)
    if type(embedding) is not nn.Embedding:
        raise UnsupportedModel(
            f"expected '{path}' to be an nn.Embedding, found {type(embedding).__name__}: it cannot be factorised. "
            "Leave 'embedding_rank' out of the kinds."
        )
    tied = output if _shares(model, output, embedding.weight) else None
    weight = embedding.weight.detach()
    hidden = weight.shape[1]
    if weight.is_meta:
        factorize_modules(model, path, hidden, tied)
        return
    work = weight.double()
    counts = torch.ones(len(work), dtype=work.dtype) if use is None else use.counts.to(work)
    metric = None if use is None else use.metric
    weights = (counts + (1.0 if metric is None else UNSEEN) * counts.mean().clamp_min(1e-12)).to(work.device)
    root = inverse = torch.eye(hidden, dtype=work.dtype, device=work.device)
    if metric is not None:
        scaled = metric.to(work) / metric.diagonal().mean().clamp_min(1e-30)
        values, vectors = torch.linalg.eigh(scaled + METRIC_FLOOR * root)
        root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    felt = work @ root  # (V, d): embeddings in units of what they change
    moment = felt.T @ (felt * weights[:, None])  # (d, d): its eigenvectors are the right singular vectors
    directions = torch.linalg.eigh(moment).eigenvectors.flip(1)  # (d, d), largest first
    factorize_modules(model, path, hidden, tied)
    factors = model.get_submodule(path)
    with torch.no_grad():
        factors.weight.copy_(felt @ directions)
        factors.projection.weight.copy_(inverse @ directions)


def gradient_moment(model: nn.Module, batches: list[Batch], objective: Objective) -> torch.Tensor | None:
    """Second moment of the gradient of each sequence's loss at the token embedding's output, summed, (d, d) float64.

    None for an encoder without labels, whose use the texts at hand do not decide, and where an output is tied to the
    embedding, because the gradient there is not all that a direction does.
    """
    family = find_family(model.config.model_type)
    embedding = model.get_submodule(full_path(model, family.embedding))
    if objective.name == "encoder" or _shares(model, family.output.removeprefix("/"), embedding.weight):
        return None
    found: list[torch.Tensor] = []
    total = torch.zeros(embedding.weight.shape[1], embedding.weight.shape[1], dtype=torch.float64)
    handle = embedding.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        for batch in batches:
            found.clear()
            loss = supervised_loss(objective, forward(model, batch), batch).sum()
            (gradient,) = torch.autograd.grad(loss, found[0])
            gradient = gradient[batch["attention_mask"].bool()].double()
            total += (gradient.T @ gradient).cpu()
    finally:
        handle.remove()
    return total if bool(torch.isfinite(total).all()) and bool(total.any()) else None


def merge_(model: nn.Module) -> None:
    """Multiplies the factors of an embedding back into one matrix; the opposite of `factorize_`."""
    family = find_family(model.config.model_type)
    path, output = full_path(model, family.embedding), family.output.removeprefix("/")
    factors = dict(model.named_modules()).get(path)
    if not isinstance(factors, FactorizedEmbedding):
        return
    weight = (factors.weight.detach().double() @ factors.projection.weight.detach().double().T).to(factors.weight.dtype)
    embedding = nn.Embedding(*weight.shape, padding_idx=factors.padding_idx, device="meta")
    embedding.weight = nn.Parameter(weight, requires_grad=factors.weight.requires_grad)
    replace_module(model, path, embedding)
    unembedding = dict(model.named_modules()).get(output)
    if isinstance(unembedding, FactorizedUnembedding):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=unembedding.bias is not None, device="meta")
        linear.weight, linear.bias = embedding.weight, unembedding.bias
        replace_module(model, output, linear)
        model._tied_weights_keys = type(model)._tied_weights_keys


def cut_vocab_(model: nn.Module, rows: tuple[int, ...]) -> None:
    """Removes the rows of the vocabulary that are not among `rows`, from the embedding and from the output layer.

    Row i is then the token whose id was `rows[i]`, and the config names its tokens by their new ids. What
    is left is an ordinary model of a smaller vocabulary: `config.vocab_size` says all of it.

    Args:
        rows: Sorted ids; `ibprune.vocabulary.keep_rows` makes the tokenizer to them.

    Raises:
        PlanMismatch: A row that the config names is not among them; nothing is changed then.
    """
    site = find_sites(model)["vocab"]
    new_id = {row: i for i, row in enumerate(rows)}
    gone = sorted(named_rows(model) - set(rows))
    if gone:
        raise PlanMismatch(
            f"expected the plan to keep the row {gone[0]} of the vocabulary, found it cut: the model's config or its "
            "positions need it."
        )
    slice_(model, {"vocab": site}, PruningPlan(model.config.model_type, {"vocab": site.n_units}, {"vocab": rows}))
    for config in (model.config, getattr(model, "generation_config", None)):
        for key, value in _token_ids(config).items():
            new = [new_id.get(row, row) for row in value] if isinstance(value, list) else new_id.get(value, value)
            setattr(config, key, new)
    for module in model.modules():  # some backbones and heads hold the config's number themselves
        if vars(module).get("vocab_size") == site.n_units:
            module.vocab_size = len(rows)
    embedding = model.get_submodule(site.cuts[0].path)
    embedding.padding_idx = new_id.get(embedding.padding_idx)
    model.config.vocab_size = len(rows)


def named_rows(model: nn.Module) -> set[int]:
    """Rows of the embedding that the model needs whatever the text.

    Those are the ids in its configs and the padding's; where positions count from the padding's id, all before it too.
    """
    family = find_family(model.config.model_type)
    embedding = model.get_submodule(full_path(model, family.embedding))
    rows = set() if embedding.padding_idx is None else {embedding.padding_idx}
    if family.reserved_positions:
        rows |= set(range(embedding.padding_idx or 0))
    for config in (model.config, getattr(model, "generation_config", None)):
        for value in _token_ids(config).values():
            rows |= set(value) if isinstance(value, list) else {value}
    return {row for row in rows if 0 <= row < embedding.num_embeddings}


def _token_ids(config: object) -> dict[str, int | list[int]]:
    """The tokens that a config, or a generation config, names; nothing where there is none."""
    values = config.to_dict() if config is not None else {}
    return {key: value for key, value in values.items() if key.endswith("_token_id") and value is not None}


def _shares(model: nn.Module, path: str, weight: nn.Parameter) -> bool:
    module = dict(model.named_modules()).get(path)
    return module is not None and getattr(module, "weight", None) is weight
