"""One vector per input from named layers of a model, in one pass with hooks."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from ibprune.errors import BadData, BadRecipe, did_you_mean
from ibprune.losses import Batch
from ibprune.rebuild import full_path
from ibprune.sites import block_paths, find_family, has_row, reads_pictures
from ibprune.stages import call, stage_layers

POOLINGS = ("mean", "cls", "last", "random")
TOKEN = "token"  # the pooling at columns that the caller chose
EMBEDDINGS = "embeddings"


def default_pooling(model: nn.Module) -> str:
    """The last token of a decoder, which alone has seen the whole text, and the mean over an encoder's.

    The mean over the patches of a picture too: until late, the token that a classifier reads has seen little of it.
    """
    return "last" if has_row(model) and find_family(model.config.model_type).causal else "mean"


def block_layers(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The residual stream before the first block and after each: {name: (module path, "in" or "out")}.

    Names count the blocks of the dense model. A block that was removed whole passes its input on, so
    that its layer is the output of the block before it. A block that runs several times (ALBERT) is read
    before its first run and after its last.
    """
    family = find_family(model.config.model_type)
    names = block_paths(model, family)
    present = [full_path(model, path) for path in names]
    dropped = set((getattr(model.config, "ibprune", None) or {}).get("dropped_blocks", ()))
    if dropped:  # never where blocks are in several lists
        names = [family.blocks.replace("*", str(i)) for i in range(len(present) + len(dropped))]
    where = present[0], "in"
    layers = {EMBEDDINGS: where}
    for name in names:
        if name not in dropped:
            where = present.pop(0), "out"
        layers[name] = where
    return layers


def find_layers(model: nn.Module, names: tuple[str, ...] = (), *, batch: Batch) -> dict[str, tuple[str, str]]:
    """Where to read each named layer: {name: (module path, "in" or "out")}; sensible ones when no name is given.

    A name is one of `block_layers`, where a row describes the model, or the path of any module of the model. The
    default is the residual stream of a transformer, with the classifier's output where it reads pictures, and the
    stages of any other network (`ibprune.stages`).

    Args:
        batch: That the model reads; some of it is, to see what runs when.

    Raises:
        BadRecipe: A name that is neither.
        UnsupportedModel: No names given, and no layers to be found.
    """
    known = _default_layers(model, batch)
    modules = [path for path, _ in model.named_modules()]
    for name in names:
        if name not in known and name not in modules:
            hint = did_you_mean(name, [*known, *modules], listed=[*known, "or the path of any module"])
            raise BadRecipe(f"unknown layer '{name}': {hint}.")
    return {name: known.get(name, (name, "out")) for name in names or known}


def _default_layers(model: nn.Module, batch: Batch) -> dict[str, tuple[str, str]]:
    if not has_row(model):
        return {path: (path, "out") for path in stage_layers(model, batch)}
    layers = block_layers(model)
    if reads_pictures(model.config.model_type):  # what its classifier reads: a token, the mean, or both
        layers |= {path: (path, "out") for path, child in model.named_children() if isinstance(child, nn.Linear)}
    return layers


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: dict[str, tuple[str, str]],
    *,
    poolings: tuple[str, ...],
    columns: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, dict[str, np.ndarray]]:
    """Features of every layer, pooled to one vector per input, float32, {pooling: {name: (n, d)}}.

    Args:
        batches: Batches in a fixed order; "inputs", where a batch has them, are the only positional input.
        layers: From `find_layers`.
        poolings: For token features (batch, length, d), those of a batch with an attention mask or of a
            transformers model: "mean" over real tokens, the first ("cls"), the last real one, or a "random"
            real one, the same for every model by the seed, or the "token" in the column that `columns` names.
            Feature maps (batch, channels, ...) are averaged over their positions.
        columns: Of the padded batch, (n,), one per input.

    Raises:
        BadRecipe: An unknown pooling.
        BadData: A layer gives NaN or infinity, or another number of vectors than inputs.
    """
    for pooling in poolings:
        if pooling not in POOLINGS and not (pooling == TOKEN and columns is not None):
            raise BadRecipe(f"unknown pooling '{pooling}': {did_you_mean(pooling, POOLINGS)}.")
    model.eval()
    device = next(model.parameters()).device
    caught: dict[str, torch.Tensor] = {}
    handles = []
    for name, (path, side) in layers.items():
        module = model.get_submodule(path)
        if side == "in":
            handles.append(module.register_forward_pre_hook(_catch_input(caught, name), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_catch_output(caught, name)))
    found: dict[str, dict[str, list[np.ndarray]]] = {pooling: {name: [] for name in layers} for pooling in poolings}
    start = 0
    draw = np.random.default_rng([seed, 961_748_941])
    try:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            size = len(next(iter(batch.values())))
            draws = draw.random(size)
            chosen = None if columns is None else columns[start : start + size]
            start += size
            caught.clear()
            call(model, batch)
            for name in layers:
                if name not in caught:
                    raise BadData(f"the layer '{name}' was never computed for these inputs.")
                mask = batch.get("attention_mask")
                if mask is None and hasattr(model, "config") and caught[name].ndim == 3:
                    mask = torch.ones(caught[name].shape[:2], dtype=torch.long, device=device)
                for pooling in poolings:
                    pooled = _pool(caught[name].float(), mask, pooling, draws, chosen)
                    if len(pooled) != size:
                        raise BadData(f"expected {size} vectors from the layer '{name}', found {len(pooled)}.")
                    found[pooling][name].append(pooled.cpu().numpy())
    finally:
        for handle in handles:
            handle.remove()
    features = {
        pooling: {name: np.concatenate(parts) for name, parts in by_name.items()} for pooling, by_name in found.items()
    }
    for by_name in features.values():
        for name, values in by_name.items():
            bad = int((~np.isfinite(values)).any(axis=1).sum())
            if bad:
                raise BadData(f"the layer '{name}' gives NaN or infinity for {bad} of {len(values)} inputs.")
    return features


def _catch_input(caught: dict[str, torch.Tensor], name: str):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if name not in caught:  # of the first run of a shared block
            caught[name] = (args[0] if args else kwargs["hidden_states"]).clone()

    return hook


def _catch_output(caught: dict[str, torch.Tensor], name: str):
    def hook(module: nn.Module, args: tuple, output) -> None:
        caught[name] = (output[0] if isinstance(output, tuple) else output).clone()  # what follows may write into it

    return hook


def _pool(
    x: torch.Tensor, mask: torch.Tensor | None, pooling: str, draws: np.ndarray, columns: np.ndarray | None
) -> torch.Tensor:
    if x.ndim <= 2:
        return x.reshape(len(x), -1)
    if mask is None or x.shape[:2] != mask.shape:  # a feature map: (batch, channels, ...)
        return x.flatten(2).mean(-1)
    if pooling == TOKEN:
        return x[torch.arange(len(x), device=x.device), torch.from_numpy(columns).to(x.device)]
    lengths = mask.sum(1)
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp_min(1)
    first = mask.argmax(1)  # padding may be on the left
    offset = {
        "cls": torch.zeros_like(lengths),
        "last": lengths - 1,
        "random": (torch.from_numpy(draws).to(lengths.device) * lengths).long(),
    }[pooling]
    return x[torch.arange(len(x), device=x.device), first + offset.clamp_min(0)]
