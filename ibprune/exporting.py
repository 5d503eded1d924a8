"""The verb export: the model of a folder as files for other runtimes, which appear only if they compute the same."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ibprune.console import Quiet
from ibprune.errors import BadRecipe, did_you_mean
from ibprune.folders import check_output, staged
from ibprune.gguf_files import write_gguf
from ibprune.hub_folders import fetch
from ibprune.images import blank_shape
from ibprune.loading import load
from ibprune.losses import Batch
from ibprune.models import READ, Source, load_processor, load_tokenizer
from ibprune.module_files import ONNX, is_module_folder
from ibprune.onnx_files import (
    Flat,
    Run,
    expected_outputs,
    flat_model,
    need_onnx,
    onnx_runtime,
    probe_batches,
    write_transformer_onnx,
)
from ibprune.openvino_files import need_openvino, openvino_runtime, write_openvino
from ibprune.sites import find_family, is_traced
from ibprune.surgery import SPEC
from ibprune.task_heads import complete, dense_name
from ibprune.timing import interleave, stopwatch

OPENVINO = "openvino_model.xml"
TEXTS = (
    "The film opens slowly, but the last hour is worth the wait.",
    "Nobody at the station knew when the next train would leave.",
    "A short one.",
    "She put the letter back into its envelope, locked the drawer, and went out to look for the dog before it rained.",
    "Prices rose by four per cent in March, the bank said on Tuesday.",
)
TIMED = (1, 128)  # batch and length whose latency is shown
COMPANIONS = (  # what users of a runtime read beside the model
    "*token*.json", "*.model", "vocab.*", "merges.txt", "chat_template*", "generation_config.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """A runtime that takes a computation graph: its name, the main file, its packages, and how to write and run it."""

    runtime: str
    file: str
    need: Callable[[], None]
    write: Callable[[Flat, Sequence[Batch], Path], float]
    run: Callable[[Path], Run]


def _openvino_by_onnx(flat: Flat, batches: Sequence[Batch], path: Path) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        onnx = Path(scratch) / ONNX
        write_transformer_onnx(flat, batches, onnx)
        return write_openvino(onnx, batches, expected_outputs(flat, batches), path)


GRAPHS = {
    "onnx": Graph("ONNX Runtime", ONNX, need_onnx, write_transformer_onnx, onnx_runtime),
    "openvino": Graph("OpenVINO", OPENVINO, need_openvino, _openvino_by_onnx, openvino_runtime),
}
GGUF = "gguf"
TARGETS = (*GRAPHS, GGUF)


def export(
    folder: str | Path,
    *,
    to: str,
    output: str | Path | None = None,
    dtype: str | None = None,
    console: Quiet | None = None,
) -> dict:
    """Writes the model of a folder, pruned or dense, for another runtime; returns what was written and measured.

    "onnx" and "openvino" make a folder with the model, free in batch size and length of texts (of pictures, in batch
    size), its config and its tokenizer or image processor. The runtime must give the model's outputs on batches of
    several sizes, to 1e-4 of the largest. A language model gives the logits of a whole text: there is no cache.
    "gguf" makes one file for llama.cpp, of a causal language model of LLaMA's kind.

    Args:
        folder: What `prune` or `train` wrote for a transformer or a CNN of transformers, also as a Hub repo.
        to: One of `TARGETS`.
        output: What to write; default: the folder's name with "-onnx", "-openvino" or ".gguf" behind it.
        dtype: Of a GGUF's matrices, "f32" or "f16"; default: f16 where the folder's are, f32 otherwise.

    Returns:
        {"to", "output", "notes"}, for graphs also "max_diff" and "latency_ms" (medians of torch and the runtime).

    Raises:
        BadRecipe: An unknown target, a module's folder, an output that holds something, or a package is missing.
        PlanMismatch: The folder does not load, or the runtime cannot take the model or computes something else.
        UnsupportedModel: The target has no place for the model.

    Example:
        >>> export("small", to="onnx")["max_diff"]  # doctest: +SKIP
    """
    if to not in TARGETS:
        raise BadRecipe(f"unknown --to '{to}': {did_you_mean(to, TARGETS, listed=TARGETS)}.")
    if dtype is not None and to != GGUF:
        raise BadRecipe(f"expected --dtype with --to gguf only, found '{dtype}': graphs are written in float32.")
    named, folder, console = Path(folder), fetch(folder), console or Quiet()
    if is_module_folder(folder):
        more = "" if to == GGUF else ": write its ONNX file with result.save(folder, onnx=True)"
        raise BadRecipe(f"expected the folder of a transformer, found a plain module's in '{folder}'{more}.")
    source = named.absolute() if named == folder else Path(named.name).absolute()  # of a repo, in this folder
    path = Path(output) if output else source.with_name(source.name + (".gguf" if to == GGUF else f"-{to}"))
    if to == GGUF:
        if os.path.lexists(path):
            raise BadRecipe(f"expected a new file, found something at '{path}': choose another --output.")
        model = load(folder, needed=READ)
        with _new_file(path) as temporary:
            notes = write_gguf(model, folder, temporary, dtype=dtype)
        return {"to": to, "output": str(path), "notes": notes}
    check_output(path)
    GRAPHS[to].need()
    model = load(folder, needed=READ)
    console.say(f"tracing {type(model).__name__.removeprefix('Pruned')}")
    with staged(path) as temporary:
        found = _write_graph(model, folder, GRAPHS[to], temporary, console)
    return {"to": to, "output": str(path)} | found


def _write_graph(model: PreTrainedModel, folder: Path, graph: Graph, into: Path, console: Quiet) -> dict:
    tokenizer = _tokenizer(folder)
    flat = flat_model(model, types=tokenizer is None or "token_type_ids" in tokenizer.model_input_names)
    image = _image_shape(model, folder)
    batches = [*probe_batches(flat, image=image), *_real_batches(flat, tokenizer)]
    worst = graph.write(flat, batches, into / graph.file)
    _write_config(model, into)
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            shutil.copyfile(file, into / file.name)
    (batch,) = probe_batches(flat, sizes=(TIMED,), image=image)
    run, model = graph.run(into / graph.file), model.float().cpu()
    with torch.inference_mode():
        calls = [stopwatch(call, torch.device("cpu")) for call in (lambda: model(**batch), lambda: run(batch))]
        times = interleave(calls, rounds=15, console=console, what="timing")
    medians = [round(float(torch.tensor(found).median()), 3) for found in times]
    shape = "×".join(str(size) for size in next(iter(batch.values())).shape)
    notes = [f"{shape} in one call: {medians[0]:g} ms in torch, {medians[1]:g} ms in {graph.runtime}, in turns"]
    return {"max_diff": worst, "latency_ms": dict(zip(("torch", graph.runtime), medians)), "notes": notes}


def _image_shape(model: PreTrainedModel, folder: Path) -> tuple[int, int, int] | None:
    """Channels, height and width of the pictures of a CNN, which only its image processor knows."""
    if not is_traced(model.config.model_type):
        return None
    processor = load_processor(str(folder))
    if processor is None:
        raise BadRecipe(f"expected an image processor in '{folder}' to know the size of its pictures, found none.")
    return blank_shape(processor, model.config.num_channels)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not (folder / "tokenizer_config.json").exists():
        return None
    return load_tokenizer(Source(str(folder), str(folder)))


def _real_batches(flat: Flat, tokenizer: PreTrainedTokenizerBase | None) -> list[Batch]:
    """Texts as the folder's tokenizer reads them, padded to the longest; none where it cannot."""
    if tokenizer is None or tokenizer.pad_token is None:
        return []
    config = flat.model.config
    most = min(find_family(config.model_type).max_tokens(config) or TIMED[1], TIMED[1])
    found = []
    for texts in (TEXTS, TEXTS[:2]):
        read = tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        values = complete(flat.model, {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]})
        values["token_type_ids"] = read.get("token_type_ids", torch.zeros_like(read["input_ids"]))
        found.append({name: values[name] for name in flat.names})
    return found


def _write_config(model: PreTrainedModel, into: Path) -> None:
    """The family's config, without what only ibprune's loader reads: the weights are in the graph."""
    raw = model.config.to_dict()
    for key in (SPEC, "auto_map", "_name_or_path"):
        raw.pop(key, None)
    raw["architectures"] = [dense_name(model)]
    (into / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary name beside a file that is not there yet; it takes the file's name at the end, or vanishes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise BadRecipe(f"expected to write '{path}', but: {error.strerror or error}.") from error
    with scratch as name:
        temporary = Path(name) / path.name
        yield temporary
        temporary.rename(path)
