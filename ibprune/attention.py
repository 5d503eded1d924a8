"""Where attention heads look: entropies and patterns of every head, dense and pruned, head by head."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ibprune.console import Quiet
from ibprune.features import block_layers
from ibprune.groups import Group
from ibprune.inputs import spread
from ibprune.losses import Batch
from ibprune.mi.entropies import attention_entropy
from ibprune.mi.samples import FEW, BadSamples
from ibprune.names import ATTENTION_KINDS
from ibprune.plans import PruningPlan
from ibprune.sites import find_family
from ibprune.task_heads import complete

MOST_READ = 256  # inputs that are read: on SST-2 no head's mean over them errs by more than 0.012 (one se)
ENTROPY = "entropy_norm"
PATTERNS = ("special", "current", "previous", "keywords")

Reading = dict[str, dict[str, np.ndarray]]


def attention_measures(
    attention: torch.Tensor,
    attention_mask: torch.Tensor,
    input_ids: torch.Tensor,
    *,
    causal: bool,
    special: Sequence[int] = (),
    keywords: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """What each head looks at, mean over real queries: {measure: (batch, heads)}, NaN where it is undefined.

    "entropy_norm" is that of `mi.entropies.attention_entropy`; the others are shares of attention, summed over
    keys (Clark et al. 2019, arXiv 1906.04341; VTrans, arXiv 2406.05276): "special" and "keywords" on the given
    tokens, NaN for an input without one; "current" on the query itself; "previous" on the token before it,
    over the queries that have one.

    Args:
        attention: Probabilities, (batch, heads, queries, keys), queries and keys the same tokens.
        attention_mask: 1 for real tokens, (batch, keys); padding on either side.
        input_ids: (batch, keys).
        causal: Whether a query sees only the tokens up to its own.
        special, keywords: Token ids.

    Raises:
        BadSamples: The shapes do not belong together.

    Example:
        >>> looks_back = torch.tensor([[[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]])
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> attention_measures(looks_back, torch.ones_like(ids), ids, causal=True)["previous"].tolist()
        [[1.0]]
    """
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3] or input_ids.shape != attention_mask.shape:
        raise BadSamples(
            f"expected attention (batch, heads, tokens, tokens) with ids and mask (batch, tokens), found "
            f"{tuple(attention.shape)}, {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}."
        )
    entropy = attention_entropy(attention, attention_mask, causal=causal)  # checks the shapes of attention and mask
    real = attention_mask.to(attention.device).bool()
    ids = input_ids.to(attention.device)
    attention = attention.double()
    found = {ENTROPY: torch.where((real.sum(1) > 1)[:, None], entropy, torch.nan)}
    found["special"] = _share_on(attention, real, ids, special)
    found["current"] = _mean(attention.diagonal(dim1=2, dim2=3), real)
    follows = real[:, 1:] & real[:, :-1]
    found["previous"] = _mean(attention[:, :, 1:, :-1].diagonal(dim1=2, dim2=3), follows)
    found["keywords"] = _share_on(attention, real, ids, keywords)
    return found


def _share_on(attention: torch.Tensor, real: torch.Tensor, ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    keys = real & torch.isin(ids, torch.tensor(list(tokens), dtype=ids.dtype, device=ids.device))
    share = _mean((attention * keys[:, None, None]).sum(-1), real)
    return torch.where(keys.any(1)[:, None], share, torch.nan)


def _mean(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of (batch, heads, queries) over the queries that count, NaN where none does."""
    n = counts.sum(-1)[:, None]
    total = torch.where(counts[:, None], values, 0.0).sum(-1)
    return torch.where(n > 0, total / n.clamp_min(1), torch.nan)


def largest_error(*readings: dict[str, np.ndarray]) -> dict[str, float | None]:
    """The largest standard error of any head's mean, by measure; None with fewer than two inputs that define it."""
    found: dict[str, float | None] = dict.fromkeys(readings[0])
    for name, values in (item for measures in readings for item in measures.items()):
        defined = values[~np.isnan(values).any(axis=1)]
        if len(defined) > 1:
            error = float(defined.std(axis=0, ddof=1).max() / np.sqrt(len(defined)))
            found[name] = max(error, found[name] or 0.0)
    return found


def attention_group(model: nn.Module) -> Group | None:
    """The row of the family that says what a head, or a group of heads, is; None where heads cannot be cut."""
    groups = find_family(model.config.model_type).groups
    return next((group for group in groups if group.kind in ATTENTION_KINDS), None)


def attention_modules(model: nn.Module) -> dict[str, str]:
    """Paths of the attentions of a transformers model by dense block; blocks removed whole are absent.

    Of an encoder-decoder, the encoder's: the decoder's attentions look at other texts.
    """
    family = find_family(model.config.model_type)
    inside, start = family.attention, family.blocks.partition("*")[0]
    found: dict[str, str] = {}
    for block, (path, side) in block_layers(model).items():
        attention = f"{path}.{inside}"
        seen = attention in found.values()  # a removed block shows the one before it
        if side == "out" and block.startswith(start) and not seen:
            found[block] = attention
    return found


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention that computes its probabilities, restored at the end: faster kernels never hold them."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@torch.no_grad()
def read_heads(
    model: nn.Module, batches: Iterable[Batch], *, special: Sequence[int] = (), keywords: Sequence[int] = ()
) -> Reading | None:
    """The measures of every head: {block of the dense model: {measure: (n, heads)}}, float64.

    One attention is held at a time: each is reduced as soon as it is computed. Blocks without an attention are
    absent; None where an attention gives no probabilities. A block that runs several times shows its last run.

    Args:
        batches: With "input_ids", and "attention_mask" where there is padding.
        special, keywords: Token ids, see `attention_measures`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=2))
        >>> read_heads(model, [{"input_ids": torch.tensor([[1, 2, 3]])}])["encoder.layer.0"]["current"].shape
        (1, 2)
    """
    model.eval()
    device = next(model.parameters()).device
    causal = find_family(model.config.model_type).causal
    modules = attention_modules(model)
    found: dict[str, dict[str, list[np.ndarray]]] = {block: {} for block in modules}
    silent: list[str] = []
    batch: Batch = {}
    caught: dict[str, dict[str, torch.Tensor]] = {}  # of the present batch

    def reduce(block: str):
        def hook(module: nn.Module, args: tuple, output) -> None:
            weights = output[-1] if isinstance(output, tuple) and len(output) > 1 else None
            if weights is None:
                silent.extend([block] * any(True for _ in module.parameters()))  # a stub of a removed one has none
                return
            ids = batch["input_ids"]
            mask = batch.get("attention_mask", torch.ones_like(ids))
            caught[block] = attention_measures(weights, mask, ids, causal=causal, special=special, keywords=keywords)

        return hook

    with eager_attention(model):
        handles = [model.get_submodule(path).register_forward_hook(reduce(block)) for block, path in modules.items()]
        try:
            for given in batches:
                batch = {key: value.to(device) for key, value in given.items() if key != "labels"}
                caught.clear()
                model(**complete(model, batch))
                for block, measures in caught.items():
                    for name, values in measures.items():
                        found[block].setdefault(name, []).append(values.cpu().numpy())
        finally:
            for handle in handles:
                handle.remove()
    if silent:
        return None
    return {
        block: {name: np.concatenate(parts) for name, parts in measures.items()}
        for block, measures in found.items()
        if measures
    }


def head_means(measures: dict[str, np.ndarray]) -> dict[str, np.ndarray | None]:
    """Mean of each measure over the inputs that define it, (heads,); None where none does."""
    defined = {name: values[~np.isnan(values).any(axis=1)] for name, values in measures.items()}
    return {name: values.mean(axis=0) if len(values) else None for name, values in defined.items()}


def kept_units(plan: PruningPlan, model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Per block of the dense model: how many units of attention it had, and which of them the plan keeps.

    A unit is a head, or a key-value head with the query heads that read it. A removed sub-layer keeps none.
    """
    group, family = attention_group(model), find_family(model.config.model_type)
    if group is None:
        return {}
    inside, start = family.attention, family.blocks.partition("*")[0]
    whole = [
        other.name for other in family.groups if any(cut.axis == "whole" and cut.path == inside for cut in other.cuts)
    ]
    found = {}
    for block in block_layers(model):
        site = f"{block}.{group.name}" if group.per_block else group.name
        if site in plan.keep and block.startswith(start):
            gone = any(plan.keep.get(f"{block}.{name}") == () for name in whole)
            found[block] = plan.n_units[site], () if gone else plan.keep[site]
    return found


def kept_heads(n_units: int, kept: Sequence[int], heads: int) -> list[int]:
    """Query heads of the kept units: unit k owns the heads k*g .. k*g+g-1 of `heads` = g * n_units.

    Example:
        >>> kept_heads(3, (0, 2), heads=6)
        [0, 1, 4, 5]
    """
    width = heads // n_units
    return [unit * width + i for unit in kept for i in range(width)]


def add_heads_(
    records: list[dict],
    before: nn.Module,
    after: nn.Module,
    batches: list[Batch],
    *,
    plan: PruningPlan | None,
    special: Sequence[int],
    console: Quiet,
) -> None:
    """Fills `heads` in the blocks' records of an audit; it stays null where no attention can be read.

    Each measure holds two lists, of the dense and of the pruned model, in the dense model's order of heads with
    null for a removed one; "se" has the largest standard error in either list. Without a plan the heads that are
    left cannot be told: they are listed in their own order, "aligned" is false, and a warning says so.

    Args:
        records: The layers of the audit.
        plan: That made the pruned model, where it is known.
        special: Ids of the special tokens.
    """
    if not all(hasattr(model, "config") for model in (before, after)) or "input_ids" not in batches[0]:
        return
    chosen = spread(batches, MOST_READ)
    dense, pruned = (
        read_heads(model, console.track(chosen, f"heads of the {what}", len(chosen)), special=special)
        for model, what in ((before, "dense"), (after, "pruned"))
    )
    if dense is None or pruned is None:
        return
    units = kept_units(plan, before) if plan is not None else {}
    n = sum(len(batch["input_ids"]) for batch in chosen)
    for record in records:
        block = record["name"]
        if block not in dense:
            continue
        sides = [reading.get(block, {}) for reading in (dense, pruned)]
        means = [head_means(side) for side in sides]
        counts = [len(m[ENTROPY]) if m.get(ENTROPY) is not None else 0 for m in means]
        kept = _kept(counts, units.get(block))
        record["heads"] = {
            f"attn_{name}": None if values is None else [values.tolist(), _placed(means[1].get(name), kept, counts[0])]
            for name, values in means[0].items()
            if name != "keywords"
        }
        errors = largest_error(*sides)
        record["heads"] |= {
            "se": {f"attn_{name}": errors[name] for name in errors if name != "keywords"},
            "aligned": kept is not None,
            "n": n,
            "status": "ok" if n >= FEW else "undersampled",
        }
        if kept is None:
            record["warnings"].append(
                {
                    "code": "HEADS_UNALIGNED",
                    "msg": f"{counts[1]} of {counts[0]} heads are left and no plan says which: they are listed in "
                    "their own order",
                }
            )


def _kept(counts: list[int], units: tuple[int, tuple[int, ...]] | None) -> list[int] | None:
    """Dense indices of the heads of the pruned model, None where they cannot be known."""
    if counts[1] in (0, counts[0]):
        return list(range(counts[1]))
    if units is None or counts[0] % units[0]:
        return None
    kept = kept_heads(*units, heads=counts[0])
    return kept if len(kept) == counts[1] else None  # else the plan is of another model


def _placed(values: np.ndarray | None, kept: list[int] | None, heads: int) -> list[float | None]:
    if kept is None:
        return [] if values is None else values.tolist()
    placed: list[float | None] = [None] * heads
    for head, value in zip(kept, () if values is None else values.tolist()):
        placed[head] = value
    return placed
