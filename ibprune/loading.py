"""Loads folders without remote code, and refuses any tensor that does not fit."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ibprune.checksums import check_files, inside
from ibprune.claims import check_fits
from ibprune.errors import IBPruneError, PlanMismatch, first_line
from ibprune.json_files import read_json
from ibprune.models import ADAPTER, NEEDED, READ, check_finite, find_source, load_dense
from ibprune.numbering import renumber_layers_
from ibprune.pruned_config import built_class, plain_class, plain_config, read_spec
from ibprune.sites import check_unquantised
from ibprune.surgery import SPEC

INDEX = "model.safetensors.index.json"


def load(folder: str | Path, *, dtype: torch.dtype | None = None, needed: tuple[str, ...] = NEEDED) -> PreTrainedModel:
    """The pruned model of an exported folder, in eval mode; no code is run but transformers', nothing read elsewhere.

    Args:
        needed: Patterns of the files that must be there if the report names them.

    Raises:
        PlanMismatch: No such folder, a file that differs from its checksum, an unknown structure, or a tensor missing,
            extra or misshapen.

    Example:
        >>> model = load("pruned")  # doctest: +SKIP
    """
    folder = Path(folder)
    path = folder / "config.json"
    check_files(folder, needed=needed)
    raw = _read(folder, path)
    spec = read_spec(raw, path)
    _check_places(folder)
    base = plain_class(raw, path)
    try:
        config = plain_config(raw, base)
        cls = built_class(base, config)
        check_unquantised(config, str(folder))
        check_fits(cls, config, folder)
        model, info = cls.from_pretrained(
            folder, config=config, dtype=dtype or "auto", output_loading_info=True, local_files_only=True,
            use_safetensors=True,
        )  # fmt: skip
    except IBPruneError:
        raise
    except Exception as error:  # every family checks its config, and fails on what it cannot build, in its own way
        raise PlanMismatch(f"'{folder}' does not load: {first_line(error)}") from error
    if spec and spec["format"] == 1:
        renumber_layers_(model, spec["dense"].get("layer_types"))
    check_loaded(info, str(folder))
    check_finite(model, str(folder))
    return model.eval()


def load_any(name: str) -> PreTrainedModel:
    """The model of a pruned folder, or of any dense checkpoint by folder, Hub id or alias.

    Raises:
        IBPruneError: It cannot be found, or does not load.
    """
    source = find_source(name)
    config = Path(source.location) / "config.json"
    try:
        raw = read_json(config) if config.exists() else {}
        pruned = isinstance(raw, dict) and SPEC in raw
    except (OSError, ValueError):
        pruned = False  # the loader of dense models says what is wrong with it
    return load(source.location, needed=READ) if pruned else load_dense(source).model


def _check_places(folder: Path) -> None:
    """Raises `PlanMismatch` where transformers would read weights from beyond the folder."""
    if (folder / ADAPTER).exists():
        raise PlanMismatch(
            f"expected a whole model in '{folder}', found an adapter's {ADAPTER}, which names another: move it."
        )
    path = folder / INDEX
    if not path.exists():
        return
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise PlanMismatch(f"could not read {path}: {first_line(error)}") from error
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise PlanMismatch(f"expected the file of each tensor under 'weight_map' in {path}.")
    for file in shards.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise PlanMismatch(f"expected names of safetensors files beside it in {path}, found '{file}'.")


def _read(folder: Path, path: Path) -> dict | list:
    """The JSON of the config."""
    try:
        return read_json(path)
    except OSError as error:
        raise PlanMismatch(
            f"expected an exported folder with a config.json at '{folder}', found none.{inside(folder)}"
        ) from error
    except ValueError as error:
        raise PlanMismatch(f"could not read {path}: {error}") from error


def check_loaded(info: dict, name: str) -> None:
    """Raises `PlanMismatch` unless every tensor of the checkpoint, and none else, went into the model."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise PlanMismatch(f"'{name}': {what.replace('_', ' ')}: {sorted(map(str, info[what]))[:3]}.")
