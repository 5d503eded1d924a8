"""The token embedding of a transformer: its factors, and the rows of its vocabulary."""

import torch
from torch import nn

from ibprune.errors import PlanMismatch, UnsupportedModel
from ibprune.plans import PruningPlan
from ibprune.rebuild import FactorizedEmbedding, FactorizedUnembedding, factorize_modules, full_path, replace_module
from ibprune.sites import find_family, find_sites
from ibprune.slicing import slice_


def factorize_(model: nn.Module, token_counts: torch.Tensor | None = None) -> None:
    """Writes the token embedding W (V, d) as A (V, d) times B (d, d), its principal directions in order.

    The model's output is unchanged (to rounding). The directions are the right singular vectors of
    diag(sqrt(w)) W, so that keeping the first k of them loses the least of the embeddings that the
    data use. The weights are w = counts + mean(counts): half what the data show, half uniform, so
    that tokens absent from the data keep a share. An output tied to the embedding follows it.

    Args:
        model: A transformers model of a known family.
        token_counts: How often each token id occurs in the data, (V,); None weighs all alike.

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
    counts = torch.ones(len(work), dtype=work.dtype) if token_counts is None else token_counts.to(work)
    weights = (counts + counts.mean().clamp_min(1e-12)).to(work.device)
    moment = work.T @ (work * weights[:, None])  # (d, d): its eigenvectors are the right singular vectors
    directions = torch.linalg.eigh(moment).eigenvectors.flip(1)  # (d, d), largest first
    factorize_modules(model, path, hidden, tied)
    factors = model.get_submodule(path)
    with torch.no_grad():
        factors.weight.copy_(work @ directions)
        factors.projection.weight.copy_(directions)


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
