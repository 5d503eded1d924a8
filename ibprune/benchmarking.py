"""Measures a dense and a pruned checkpoint side by side: speed, memory and size, and says what they amount to."""

import inspect
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from ibprune.console import Quiet
from ibprune.costs import count_params
from ibprune.errors import BadData, BadRecipe, did_you_mean, first_line
from ibprune.examples import example_inputs
from ibprune.footprint import Footprint, footprint, lookup_params, tensor_bytes
from ibprune.images import input_shape
from ibprune.loading import load_any
from ibprune.losses import Batch, forward
from ibprune.models import find_source, load_dense, load_processor
from ibprune.names import ANSWERS, TAGS
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, is_traced, reads_pictures
from ibprune.task_heads import HEADS, auto_of, dense_name
from ibprune.timing import interleave, now, quartiles, share_of_layers, stopwatch
from ibprune.verdict import verdict
from ibprune.walls import macs_per_ms, operation_ms, read_ms, width_times

SCHEMA = "ibprune.bench/1"
RUNTIMES = ("eager", "compile")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (32, 128)
STEPS = 16  # tokens that a decoder writes in a timed run
Forward = Callable[..., object]


@torch.inference_mode()
def bench(
    dense: str,
    pruned: str,
    *,
    batches: Sequence[int] = (1, 8, 32),
    lengths: Sequence[int] | None = None,
    runtimes: Sequence[str] = ("eager",),
    rounds: int = 15,
    precision: str = "fp32",
    image_size: int | None = None,
    output: str | None = None,
    console: Quiet | None = None,
) -> dict:
    """How fast, how large and how hungry a dense and a pruned checkpoint are, and why it is not more.

    Runs of both alternate on made-up inputs. A decoder is timed apart while it reads (prefill) and while it writes with
    its cache (decode, milliseconds of one step); other models in a forward pass.

    Args:
        dense, pruned: Hub ids, folders or aliases of one family. A dense model without the pruned one's head gets one.
        batches: Inputs at a time.
        lengths: Tokens of each; default 32 and 128, as far as the model takes so many. Pictures have none.
        runtimes: "eager" and "compile" (torch.compile, where decode is left out).
        rounds: Timed runs of each model in each cell.
        precision: "fp32" or "bf16".
        image_size: Pixels of a side, for a CNN that brings no image processor.
        output: A JSON file for the result.

    Returns:
        Both models' sizes, `env`, a cell for each runtime, phase, batch and length (milliseconds with quartiles, per
        second, MACs, operations, bytes at the peak, and the walls that `ibprune.walls` measures), and `verdict`, lines.

    Raises:
        IBPruneError: Models that do not belong together, or a setting that cannot be used.

    Example:
        >>> found = bench("minilm", "pruned", batches=(1, 8))  # doctest: +SKIP
        >>> print("\\n".join(found["verdict"]))  # doctest: +SKIP
    """
    console = console or Quiet()
    _check(batches, lengths, runtimes, rounds, precision, output)
    models = _models(dense, pruned)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), PRECISIONS[precision]
    models = [model.to(device, dtype).eval() for model in models]
    lengths, shape = _inputs(models[0], dense, lengths, image_size)
    sides = [_size(name, model) for name, model in zip((dense, pruned), models)]
    speed, start = macs_per_ms(device, dtype), operation_ms(device, dtype)
    reading = [read_ms(side["read_bytes"], device) for side in sides]
    cells, heaviest = [], ()
    for runtime in runtimes:
        for batch in batches:
            for length in lengths:
                inputs = _example(models, batch, length, shape, device)
                for phase, runs in _phases(models, inputs, runtime).items():
                    what = f"{phase} {batch} x {length}" if length else f"{phase} {batch}"
                    prints = [footprint(model, run) for model, run in zip(models, runs["once"])]
                    cell = {"runtime": runtime, "phase": phase, "batch": batch, "length": length}
                    cell |= _time(runs["timed"], rounds, runtime, what, console)
                    tokens = length if phase == "prefill" else 1
                    for i, side in enumerate(("dense", "pruned")):
                        walls = {
                            "operations": prints[i].operations * start if runtime == "eager" else None,
                            "weights": reading[i],
                            "products": prints[i].macs / speed,
                        }
                        layers = None
                        if runtime == "eager":
                            shares = [share_of_layers(models[i], runs["once"][i]) for _ in range(3)]
                            layers = cell[side]["ms"]["median"] * quartiles(shares)[1]
                        cell[side] |= _counted(prints[i], sides[i]) | {
                            "per_second": 1000 * batch * tokens / cell[side]["ms"]["median"],
                            "layers_ms": layers,
                            "walls_ms": walls,
                        }
                    heaviest = max(heaviest, prints[1].layers, key=_work)
                    cells.append(cell)
    found = {
        "schema": SCHEMA,
        "dense": sides[0],
        "pruned": sides[1],
        "unit": "tokens per second in prefill and decode, inputs per second else",
        "env": _environment(device, precision),
        "rounds": rounds,
        "cells": cells,
        "widths": width_times(heaviest, device, dtype),
    }
    found["verdict"] = verdict(found)
    if output:
        path = Path(output)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.rename(path)
    return found


def _check(
    batches: Sequence[int], lengths: Sequence[int] | None, runtimes: Sequence[str], rounds: int, precision: str,
    output: str | None,
) -> None:  # fmt: skip
    for flag, values in (("--batches", batches), ("--lengths", lengths), ("--rounds", (rounds,))):
        if values is None:
            continue
        if not isinstance(values, list | tuple) or not values or any(type(v) is not int or v < 1 for v in values):
            found = ", ".join(map(str, values)) if isinstance(values, list | tuple) else repr(values)
            raise BadRecipe(f"{flag}: expected whole numbers of at least 1, found {found}.")
    for names, valid, flag in ((runtimes, RUNTIMES, "--runtimes"), ((precision,), PRECISIONS, "--precision")):
        for name in names or ("",):
            if name not in valid:
                raise BadRecipe(f"{flag}: found '{name}': {did_you_mean(name, valid)}.")
    parent = Path(output or "").absolute().parent
    if output and (os.path.isdir(output) or not parent.is_dir() or not os.access(parent, os.W_OK)):
        raise BadRecipe(f"--output: expected a file that can be written, found '{output}'.")


def _models(dense: str, pruned: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models, with one head and one vocabulary."""
    small = load_any(pruned)
    source = find_source(dense)
    large = load_any(dense)
    types = [model.config.model_type for model in (large, small)]
    if types[0] != types[1]:
        raise BadData(f"expected two models of one family, found '{types[0]}' and '{types[1]}'.")
    names = [dense_name(model) for model in (large, small)]
    if names[0] != names[1]:
        objective = next((o for o, ends in HEADS.items() if names[1].endswith(ends)), None)
        if objective is None:
            raise BadData(f"expected two models with one head, found {names[0]} and {names[1]}.")
        objective = objective if objective in (TAGS, ANSWERS) else ""
        large = load_dense(source, n_labels=small.config.num_labels, objective=objective).model
    rows = [_vocabulary(model) for model in (large, small)]
    if rows[0] != rows[1] and rows[0] != _rows_before(pruned):
        raise BadData(f"expected models with one vocabulary, found {rows[0]:,} and {rows[1]:,} rows.")
    return large, small


def _vocabulary(model: PreTrainedModel) -> int:
    return 0 if reads_pictures(model.config.model_type) else model.get_input_embeddings().num_embeddings


def _rows_before(pruned: str) -> int | None:
    """Rows of the vocabulary that a folder's plan cut."""
    path = Path(find_source(pruned).location) / "plan.json"
    return PruningPlan.load(path).n_units.get("vocab") if path.exists() else None


def _inputs(
    model: PreTrainedModel, name: str, lengths: Sequence[int] | None, image_size: int | None
) -> tuple[Sequence[int], tuple[int, int, int] | None]:
    """The lengths to take, (0,) for pictures, and the shape of one picture of a CNN."""
    model_type = model.config.model_type
    if image_size is not None and not is_traced(model_type):
        raise BadRecipe(f"--image-size: '{model_type}' reads what its config says: leave it out.")
    if reads_pictures(model_type):
        if lengths is not None:
            raise BadRecipe(f"--lengths: '{model_type}' reads pictures, which have none: leave it out.")
        if not is_traced(model_type):
            return (0,), None
        return (0,), input_shape(model.config, load_processor(find_source(name).location), image_size)
    most = find_family(model_type).max_tokens(model.config)
    written = STEPS if _writes(model) else 0
    if lengths is None:
        return [n for n in LENGTHS if most is None or n + written <= most] or [most - written], None
    if most is not None and max(lengths) + written > most:
        wanted = f"{max(lengths)} and {written} to write" if written else f"{max(lengths)}"
        raise BadRecipe(f"--lengths: expected at most {most} tokens of this model, found {wanted}.")
    return lengths, None


def _writes(model: PreTrainedModel) -> bool:
    return auto_of(model) == "AutoModelForCausalLM"


def _size(name: str, model: PreTrainedModel) -> dict:
    folder = Path(find_source(name).location)
    kinds = ("*.safetensors", "pytorch_model*.bin") if folder.is_dir() else ()
    files = next((found for found in (list(folder.glob(kind)) for kind in kinds) if found), [])  # what is loaded first
    lookups = lookup_params(model)
    return {
        "id": name,
        "params": count_params(model),
        "lookup_params": lookups,
        "weight_bytes": tensor_bytes(model),
        "read_bytes": tensor_bytes(model) - lookups * next(model.parameters()).element_size(),
        "file_bytes": sum(f.stat().st_size for f in files) or None,
    }


def _example(
    models: Sequence[PreTrainedModel], batch: int, length: int, shape: tuple[int, int, int] | None, device: torch.device
) -> Batch:
    """The same made-up inputs for both: ids that the smaller vocabulary has."""
    if shape is not None:
        pixels = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels.to(device, models[0].dtype)}
    smaller = min(models, key=_vocabulary)
    return {key: value.to(device) for key, value in example_inputs(smaller, batch=batch, length=length).items()}


def _phases(models: Sequence[PreTrainedModel], inputs: Batch, runtime: str) -> dict[str, dict[str, list]]:
    """What is run, once and timed, for each model, by phase."""
    calls = [_call(model, runtime) for model in models]
    device = models[0].device
    if not _writes(models[0]):
        once = [lambda call=call: forward(call, inputs) for call in (models if runtime == "eager" else calls)]
        plain = [lambda model=model: forward(model, inputs) for model in models]
        return {"forward": {"once": plain, "timed": [stopwatch(run, device) for run in once]}}
    plain = [lambda model=model: _read(model, model, inputs) for model in models]
    once = [lambda call=call, model=model: _read(call, model, inputs) for call, model in zip(calls, models)]
    found = {"prefill": {"once": plain, "timed": [stopwatch(run, device) for run in once]}}
    if runtime == "eager":
        steps = [lambda model=model: _write(model, inputs) for model in models]
        found["decode"] = {"once": [_one_step(model, inputs) for model in models], "timed": steps}
    return found


def _call(model: PreTrainedModel, runtime: str) -> Forward:
    """What computes a model's outputs in a runtime."""
    if runtime == "eager":
        return model
    torch.compiler.reset()  # shapes of other cells are not compiled again
    return torch.compile(model, dynamic=False)


def _read(call: Forward, model: PreTrainedModel, inputs: Batch):
    """Reads a prompt: the cache, and logits of its last token, as generation asks for."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    return call(**inputs, use_cache=True, **last)


def _write(model: PreTrainedModel, inputs: Batch) -> float:
    """Milliseconds of one step, as the mean of `STEPS` behind the prompt."""
    found = _read(model, model, inputs)
    start = now(model.device)
    for _ in range(STEPS):
        found = _step(model, found)
    return 1000 * (now(model.device) - start) / STEPS


def _step(model: PreTrainedModel, before):
    token = before.logits[:, -1:].argmax(-1)
    return model(input_ids=token, past_key_values=before.past_key_values, use_cache=True)


def _one_step(model: PreTrainedModel, inputs: Batch) -> Callable[[], object]:
    """One step behind the prompt, to be counted: what it does not count is the prompt."""
    before = []

    def step():
        return _step(model, before[-1])

    before.append(_read(model, model, inputs))
    return step


def _time(runs: Sequence[Callable[[], float]], rounds: int, runtime: str, what: str, console: Quiet) -> dict:
    """Quartiles of both models' times, and of their ratio in each round."""
    try:
        times = interleave(runs, rounds=rounds, console=console, what=what)
    except Exception as error:  # compilers raise what they like
        if runtime != "compile":
            raise
        raise BadRecipe(f"--runtimes: torch.compile does not work here: {first_line(error)}") from error
    ratios = [dense / pruned for dense, pruned in zip(*times)]
    spread = [dict(zip(("q1", "median", "q3"), quartiles(values))) for values in (*times, ratios)]
    return {"dense": {"ms": spread[0]}, "pruned": {"ms": spread[1]}, "speedup": spread[2]}


def _counted(counts: Footprint, side: dict) -> dict:
    found = {key: value for key, value in asdict(counts).items() if key != "layers"}
    return found | {"peak_bytes": side["weight_bytes"] + counts.activation_bytes}


def _work(layers: tuple[tuple[int, int, int], ...]) -> int:
    return sum(rows * into * out for rows, into, out in layers)


def _environment(device: torch.device, precision: str) -> dict:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "memory": "torch's allocator on the GPU" if cuda else "weights, and tensors that live between operations",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
