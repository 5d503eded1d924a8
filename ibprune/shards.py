"""Cuts a checkpoint that is never loaded whole: a few tensors at a time go through `compact_` into the pruned model."""

import copy
import gc
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ibprune.errors import BadRecipe, IBPruneError, PlanMismatch, first_line
from ibprune.models import Source
from ibprune.plans import PruningPlan
from ibprune.rebuild import set_parameter
from ibprune.surgery import compact_

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AT_ONCE = 2**27  # bytes of tensors that are read at once, or a single larger one


def checkpoint_files(source: Source) -> dict[str, Path]:
    """The safetensors file of every tensor of a checkpoint.

    Raises:
        BadRecipe: There are none, one is damaged, or the index names files that are not there.
    """
    folder = Path(source.location)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(source.location, allow_patterns=("*.safetensors", INDEX)))
        if (folder / INDEX).is_file():
            named = json.loads((folder / INDEX).read_text())["weight_map"]
            found = {name: folder / file for name, file in named.items()}
        else:
            with safe_open(folder / WHOLE, "pt") as file:
                found = dict.fromkeys(file.keys(), folder / WHOLE)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise BadRecipe(
            f"expected {WHOLE} or {INDEX} in '{source.name}', could not read either: {first_line(error)}. Weights in "
            "another format are read after from_pretrained(…).save_pretrained(…)."
        ) from error
    gone = sorted({path.name for path in found.values() if not path.is_file()})
    if gone:
        raise BadRecipe(f"expected the file '{gone[0]}' that {INDEX} of '{source.name}' names: get it again.")
    return found


def compact_checkpoint(
    source: Source,
    skeleton: PreTrainedModel,
    plan: PruningPlan,
    *,
    means: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """What `compact_` makes of a checkpoint, on the CPU; the dense model is never held.

    A few tensors are loaded into the skeleton, whose others stay on the device "meta"; `compact_` cuts all of it; those
    that are no longer on "meta" go into the pruned model. So it is the same cut, tensor by tensor. At once are held
    what is kept, and the tensors that are cut (`AT_ONCE`), twice.

    Args:
        skeleton: The dense architecture on the device "meta", in the dtype of the result; buffers that are in no
            checkpoint hold values. It stays as it is.
        means: As in `compact_`.

    Raises:
        BadRecipe: The checkpoint cannot be read.
        PlanMismatch: The plan does not fit, or the checkpoint lacks a tensor or has one of another shape.
        IBPruneError: A tensor holds NaN or infinity.
    """
    files = checkpoint_files(source)
    shapes = _shapes(source, files)
    _check_shapes(skeleton, shapes, source)
    small = compact_(copy.deepcopy(skeleton), plan, means=means)
    tied = small.get_expanded_tied_weights_keys(all_submodels=True)
    for names in _batches(skeleton, shapes):
        part = copy.deepcopy(skeleton)
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in {files[name] for name in names}}
            _load_(part, {name: opened[files[name]].get_slice(name) for name in names}, "cpu")
        part.tie_weights()
        compact_(part, plan, means=means)
        for name, tensor in part.state_dict().items():
            if tensor.is_meta or name in tied:
                continue
            if not torch.isfinite(tensor).all():
                raise IBPruneError(
                    f"expected finite weights in '{source.name}', found NaN or infinity in '{name}': mend the model."
                )
            set_parameter(small, name, tensor)
        del part, tensor
        gc.collect()  # modules and their hooks refer to each other, and hold the tensors until then
    small.tie_weights()
    unread = [name for name, tensor in small.state_dict().items() if tensor.is_meta]
    if unread:
        raise PlanMismatch(f"the cut of '{source.name}' left '{unread[0]}' without values.")
    return small.eval()


def _shapes(source: Source, files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the files' headers."""
    found = {}
    for path in dict.fromkeys(files.values()):
        try:
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if name in files}
        except SafetensorError as error:
            raise BadRecipe(f"'{source.name}' holds a damaged safetensors file: {first_line(error)}") from error
    return found


def _check_shapes(skeleton: PreTrainedModel, shapes: dict[str, tuple[int, ...]], source: Source) -> None:
    """Raises `PlanMismatch` unless every tensor is there, and of its shape: a load without weights."""
    model = copy.deepcopy(skeleton)
    info = _load_(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, "meta")
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    broken = sorted({*info.missing_keys, *(str(key[0]) for key in info.mismatched_keys)} - tied.keys())
    if broken:
        raise PlanMismatch(
            f"expected every tensor of {type(model).__name__} in '{source.name}', but {len(broken)} are missing or of "
            f"another shape, such as '{broken[0]}': the checkpoint does not fit its config."
        )


def _load_(model: PreTrainedModel, state: dict, device: str):
    """Loads tensors, or slices of files, as transformers does, and nothing else: what is missing stays as it is."""
    mapping = get_model_conversion_mapping(model)
    info, _ = convert_and_load_state_dict_in_model(
        model, state, LoadStateDictConfig(device_map={"": device}, weight_mapping=mapping)
    )
    return info


def _batches(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The checkpoint's names, those of one tensor of the model together, up to `AT_ONCE` bytes at a time."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    parts: dict[str, list[str]] = {name: [] for name in state}
    for name in shapes:
        for rules in ((renamings, converters), ([], [])):  # as transformers does, which tries names as they are too
            target, _ = rename_source_key(name, *rules, model.base_model_prefix, state)
            if target in parts:
                parts[target].append(name)
                break
    batch, size = [], 0
    for target, names in parts.items():
        more = sum(torch.Size(shapes[name]).numel() for name in names) * state[target].dtype.itemsize
        if batch and size + more > AT_ONCE:
            yield batch
            batch, size = [], 0
        batch, size = batch + names, size + more
    yield batch
