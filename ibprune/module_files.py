"""A pruned module as a folder, safetensors and JSON over the user's constructor: saved whole, loaded strictly."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ibprune.checksums import check_files, sha256, write_report
from ibprune.decisions import write_decision
from ibprune.errors import PlanMismatch, first_line
from ibprune.folders import check_output, staged
from ibprune.json_files import read_json
from ibprune.latency import LATENCY, LatencyTable
from ibprune.models import check_finite
from ibprune.onnx_files import write_onnx
from ibprune.plans import PruningPlan
from ibprune.rebuild import SelectedLinear, resize_
from ibprune.report_page import write_page
from ibprune.slicing import select_inputs_

SPEC_FILE = "ibprune.json"
WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
FORMAT = "ibprune.module/1"


def save_module(
    model: nn.Module,
    plan: PruningPlan,
    folder: str | Path,
    *,
    report: dict | None = None,
    latency: LatencyTable | None = None,
    decision: dict | None = None,
    onnx_example: torch.Tensor | None = None,
) -> None:
    """Writes `model.safetensors`, `ibprune.json` and, where given, a report with its page, `decision.json` and
    `latency.json`: all, or nothing.

    Args:
        onnx_example: An input; with one, `model.onnx` is written too, by `ibprune.onnx_files.write_onnx`.

    Raises:
        BadRecipe: The folder exists and is not empty, or cannot be written; no ONNX packages.
        PlanMismatch: The module cannot be written as ONNX.
    """
    path = check_output(folder)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with staged(path) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        spec = {
            "format": FORMAT,
            "class": type(model).__name__,
            "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
            "selected": [path for path, module in model.named_modules() if isinstance(module, SelectedLinear)],
            "plan": plan.to_dict(),
            "sha256": sha256(temporary / WEIGHTS),
        }
        (temporary / SPEC_FILE).write_text(json.dumps(spec, indent=1) + "\n")
        if onnx_example is not None:
            write_onnx(model, onnx_example, temporary / ONNX)
        if latency is not None:
            latency.save(temporary / LATENCY)
        if decision is not None:
            write_decision(decision, temporary)
        if report is not None:
            write_report(report, temporary)
            write_page(temporary)


def is_module_folder(folder: str | Path) -> bool:
    return os.path.isfile(Path(folder) / SPEC_FILE)


def load_module(folder: str | Path, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The pruned module of a folder in eval mode, built from the dense one's constructor.

    Args:
        model: What makes the dense module when called, or the dense module itself (it is copied).

    Raises:
        PlanMismatch: No such folder, an altered file, or a tensor missing, extra or of a shape that the dense
            module cannot have been cut to.

    Example:
        >>> load_module("small", lambda: LeNet())  # doctest: +SKIP
    """
    folder = Path(folder)
    shapes, selected, digest = _read(folder)
    check_files(folder, needed=(WEIGHTS,))
    if isinstance(model, nn.Module):
        module = copy.deepcopy(model)
    else:
        module = model() if callable(model) else model
    if not isinstance(module, nn.Module):
        raise PlanMismatch(f"expected model= to make an nn.Module, found {type(module).__name__}.")
    if not (folder / WEIGHTS).is_file():
        raise PlanMismatch(f"expected {folder / WEIGHTS}, found none.")
    if sha256(folder / WEIGHTS) != digest:
        raise PlanMismatch(f"expected sha256 {digest} for {folder / WEIGHTS}, found another: the file was altered.")
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise PlanMismatch(f"could not read {folder / WEIGHTS}: {first_line(error)}") from error
    modules = dict(module.named_modules())
    for path in selected:
        if not isinstance(modules.get(path), nn.Linear):
            raise PlanMismatch(f"expected a linear layer '{path}' in {type(module).__name__}, found none.")
        select_inputs_(module, path)
    _resize_(module, state, shapes, folder)
    module.load_state_dict(state, strict=True)
    check_finite(module, str(folder))
    return module.eval()


def _read(folder: Path) -> tuple[dict[str, list[int]], list[str], str]:
    path = folder / SPEC_FILE
    try:
        spec = read_json(path)
    except OSError as error:
        raise PlanMismatch(f"expected a folder with {SPEC_FILE} at '{folder}', found none.") from error
    except ValueError as error:
        raise PlanMismatch(f"could not read {path}: {error}") from error
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        found = spec.get("format") if isinstance(spec, dict) else type(spec).__name__
        raise PlanMismatch(f"{path}: expected format '{FORMAT}', found {found!r}: was it written by a newer version?")
    shapes, selected, digest = spec.get("shapes"), spec.get("selected"), spec.get("sha256")
    names = isinstance(selected, list) and all(isinstance(name, str) for name in selected)
    if not isinstance(shapes, dict) or not names or not isinstance(digest, str):
        raise PlanMismatch(f"{path}: expected 'shapes', 'selected' and 'sha256', found {sorted(spec)}.")
    PruningPlan.from_dict(spec.get("plan"), name=str(path))
    return shapes, selected, digest


def _resize_(module: nn.Module, state: dict[str, torch.Tensor], shapes: dict[str, list[int]], folder: Path) -> None:
    """Gives every tensor of the dense module the shape and type of the file's; tied tensors stay tied."""
    dense = module.state_dict(keep_vars=True)
    name = type(module).__name__
    for key in dense:
        if key not in state:
            raise PlanMismatch(f"expected '{key}' of {name} in '{folder}', found none: is model= the dense one?")
    changed = {}
    for key, tensor in state.items():
        shape = tuple(tensor.shape)
        if key not in dense:
            raise PlanMismatch(f"'{folder}' holds a tensor '{key}' that {name} lacks: is model= the dense one?")
        if list(shape) != shapes.get(key):
            raise PlanMismatch(f"expected shape {shapes.get(key)} for '{key}' in '{folder}', found {list(shape)}.")
        old = dense[key]
        if old.ndim != tensor.ndim or any(now > before for now, before in zip(shape, old.shape)):
            raise PlanMismatch(
                f"'{key}': {tuple(old.shape)} in {name} cannot have been cut to {shape}: is model= the dense one?"
            )
        if tuple(old.shape) != shape or old.dtype != tensor.dtype:
            changed[key] = tensor
    resize_(module, {k: list(t.shape) for k, t in changed.items()}, {k: t.dtype for k, t in changed.items()})
