"""Cuts a checkpoint that is never loaded whole: a few tensors at a time go through `compact_` into the pruned model."""

import copy
import gc
import json
import math
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
AT_ONCE = 2**26  # bytes of tensors that are read at once, or a single larger one


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
    the pruned model, and the tensors that are cut, from one file where the model allows it (`AT_ONCE`; a larger one
    alone), in the dtype of their file, up to twice: as they are read, and with one of their axes cut.

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
    headers = _headers(source, files)
    _check_shapes(skeleton, headers, source)
    small, folded = _pruned(skeleton, plan, means)
    dtypes = {name: tensor.dtype for name, tensor in small.state_dict().items()}
    tied = small.get_expanded_tied_weights_keys(all_submodels=True)
    parts = _parts(skeleton, headers)
    stored = _as_stored(skeleton, parts, headers, folded)
    for names in _batches(parts, headers, files):
        part = copy.deepcopy(stored)
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in {files[name] for name in names}}
            _load_(part, {name: opened[files[name]].get_slice(name) for name in names}, "cpu")
        part.tie_weights()
        compact_(part, plan, means=means)
        for name, tensor in part.state_dict().items():
            if tensor.is_meta or name in tied:
                continue
            if not _finite(tensor):
                raise IBPruneError(
                    f"expected finite weights in '{source.name}', found NaN or infinity in '{name}': mend the model."
                )
            set_parameter(small, name, tensor.to(dtypes[name]))
        del part, tensor
        gc.collect()  # modules and their hooks refer to each other, and hold the tensors until then
    small.tie_weights()
    unread = [name for name, tensor in small.state_dict().items() if tensor.is_meta]
    if unread:
        raise PlanMismatch(f"the cut of '{source.name}' left '{unread[0]}' without values.")
    return small.eval()


def _headers(source: Source, files: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Every tensor without its values: shape and dtype, from the files' headers."""
    found = {}
    for path in dict.fromkeys(files.values()):
        try:
            with safe_open(path, "pt") as file:
                for name in (name for name in file.keys() if name in files):
                    part = file.get_slice(name)
                    dtype = (part[:0] if part.get_shape() else file.get_tensor(name)).dtype
                    found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except SafetensorError as error:
            raise BadRecipe(f"'{source.name}' holds a damaged safetensors file: {first_line(error)}") from error
    return found


def _pruned(
    skeleton: PreTrainedModel, plan: PruningPlan, means: dict[str, torch.Tensor] | None
) -> tuple[PreTrainedModel, list[str]]:
    """The pruned model on the device "meta", and the parameters that means are folded into."""
    small = copy.deepcopy(skeleton)
    before = [(name, parameter, parameter._version) for name, parameter in small.named_parameters()]
    compact_(small, plan, means=means)
    return small, [name for name, parameter, version in before if parameter._version != version]  # written in place


def _as_stored(
    skeleton: PreTrainedModel, parts: dict[str, list[str]], headers: dict[str, torch.Tensor], folded: list[str]
) -> PreTrainedModel:
    """The skeleton in the dtypes of the files: half of float32 often. What is multiplied by means stays as it is."""
    stored = copy.deepcopy(skeleton)
    for name, parameter in stored.named_parameters():
        if parts[name] and name not in folded:
            parameter.data = parameter.data.to(headers[parts[name][0]].dtype)
    return stored


def _check_shapes(skeleton: PreTrainedModel, headers: dict[str, torch.Tensor], source: Source) -> None:
    """Raises `PlanMismatch` unless every tensor is there, and of its shape: a load without weights."""
    model = copy.deepcopy(skeleton)
    info = _load_(model, dict(headers), "meta")
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


def _parts(model: PreTrainedModel, headers: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """The checkpoint's names by the tensor of the model that they make up."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    parts: dict[str, list[str]] = {name: [] for name in state}
    for name in headers:
        for rules in ((renamings, converters), ([], [])):  # as transformers does, which tries names as they are too
            target, _ = rename_source_key(name, *rules, model.base_model_prefix, state)
            if target in parts:
                parts[target].append(name)
                break
    return parts


def _batches(
    parts: dict[str, list[str]], headers: dict[str, torch.Tensor], files: dict[str, Path]
) -> Iterator[list[str]]:
    """The checkpoint's names, up to `AT_ONCE` bytes at a time: those of one tensor of the model together, and no two
    files that it does not need at once, because a file is mapped whole, which counts under a limit of `ulimit`.
    """
    batch, size = [], 0
    for names in (names for names in parts.values() if names):
        more = sum(headers[name].nbytes for name in names)
        elsewhere = {files[name] for name in names} != {files[name] for name in batch}
        if batch and (size + more > AT_ONCE or elsewhere):
            yield batch
            batch, size = [], 0
        batch, size = batch + names, size + more
    yield batch


def _finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; without a copy of the tensor, which `torch.isfinite` makes."""
    return not tensor.numel() or all(math.isfinite(value) for value in torch.aminmax(tensor))
