"""Modules and transformers as ONNX files, free in what batches vary in, compared with the model before they stay."""

import contextlib
import copy
import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ibprune.errors import BadRecipe, PlanMismatch, first_line
from ibprune.examples import example_inputs, image_shape
from ibprune.losses import Batch
from ibprune.sites import find_family

INPUT, OUTPUT = "inputs", "outputs"
TOLERANCE = 1e-4  # of the largest output: another runtime adds in another order
LARGEST = 1_500_000_000  # bytes of weights in one file, whose format ends at 2 GiB; above, they lie beside it
SIZES = ((3, 11), (1, 5), (4, 19), (2, 1))  # (batch, length); the first is traced

# Named arrays to named arrays, as a runtime computes them.
Run = Callable[[Batch], dict[str, torch.Tensor]]


class Flat(nn.Module):
    """A transformers model as a function of tensors, in the order of `names`, to the tuple of its output tensors."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*values).values())

    def named(self, *values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.model(**dict(zip(self.names, values)), return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def write_onnx(model: nn.Module, example: torch.Tensor, path: str | Path) -> float:
    """Writes the module for ONNX Runtime and returns the largest difference of their outputs, as a share of them.

    The file takes "inputs" of any batch size and gives "outputs". Both runtimes read the example and batches of
    one and of three before the file is kept.

    Args:
        model: Reads one tensor and gives one tensor, (batch, ...) each.
        example: What it reads, at least one sample; its other sizes are fixed in the file.

    Raises:
        BadRecipe: onnx, onnxscript or onnxruntime is missing.
        PlanMismatch: The module cannot be written, or the file computes something else.

    Example:
        >>> write_onnx(net, images[:2], "net.onnx")  # doctest: +SKIP
    """
    model = copy.deepcopy(model).cpu().eval()
    example = example.detach().cpu()
    batches = [{INPUT: example.repeat(3, *[1] * (example.ndim - 1))[:size]} for size in (3, len(example), 1)]
    with torch.no_grad():
        expected = [{OUTPUT: model(batch[INPUT])} for batch in batches]
    return _write(model, type(model).__name__, ({0: "batch"},), batches, expected, Path(path))


def flat_model(model: PreTrainedModel, *, types: bool = True) -> Flat:
    """A copy of a transformers model as exporters can trace it: float32, no cache, plain attention.

    It reads ids and attention mask, token types where it knows several, an encoder-decoder also the ids that were
    written so far; or pixels.

    Args:
        types: Whether to read token types: what a graph reads must be given to it.
    """
    model = copy.deepcopy(model).float().cpu().eval()
    model.config.use_cache = False
    model.set_attn_implementation("eager")  # fused attentions choose by the layout, which a trace would fix
    if model.main_input_name == "pixel_values":
        return Flat(model, ("pixel_values",))
    names = ["input_ids", "attention_mask"]
    known = getattr(model.config, "type_vocab_size", 0) or 0
    if types and known > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        names.append("token_type_ids")
    if "decoder_input_ids" in example_inputs(model, batch=1, length=2):
        names.append("decoder_input_ids")
    return Flat(model, names)


def probe_batches(
    flat: Flat, *, sizes: Sequence[tuple[int, int]] = SIZES, image: tuple[int, int, int] | None = None
) -> list[Batch]:
    """Made-up inputs of several batch sizes and lengths, padded on the right; the first is what is traced.

    What an encoder-decoder has written is twice as long as what it reads.

    Args:
        sizes: (batch, length) pairs.
        image: Channels, height and width of pictures; default: as the config says.
    """
    found = []
    if flat.names == ("pixel_values",):
        shape, draws = image or image_shape(flat.model), torch.Generator().manual_seed(0)
        return [{"pixel_values": torch.randn(batch, *shape, generator=draws)} for batch, _ in sizes]
    config = flat.model.config
    most = find_family(config.model_type).max_tokens(config)
    for batch, length in sizes:
        length = min(length, most or length)
        values = example_inputs(flat.model, batch=batch, length=length)
        values["attention_mask"] = torch.ones_like(values["input_ids"])
        for row in range(1, batch):
            values["attention_mask"][row, max(1, length - 2 * row) :] = 0
        if "token_type_ids" in flat.names:
            values["token_type_ids"] = (torch.arange(length) >= length // 2).long().repeat(batch, 1)
        if "decoder_input_ids" in flat.names:
            longer = values["decoder_input_ids"].repeat(1, 2)
            values["decoder_input_ids"] = longer[:, : min(2 * length, most or 2 * length)]
        found.append({name: values[name] for name in flat.names})
    return found


def write_transformer_onnx(flat: Flat, batches: Sequence[Batch], path: str | Path) -> float:
    """Writes a transformers model for ONNX Runtime and returns the largest difference of their outputs, as a share.

    The file takes the inputs of `flat_model` by name, of any batch size and length (pictures: of any batch size), and
    gives the outputs by transformers' names: the logits of a whole text, or its hidden states, without a cache.

    Args:
        batches: What both runtimes read before the file is kept; the first is traced.

    Raises:
        BadRecipe: onnx, onnxscript or onnxruntime is missing.
        PlanMismatch: The model cannot be written, or the file computes something else.

    Example:
        >>> flat = flat_model(ibprune.load("small"))  # doctest: +SKIP
        >>> write_transformer_onnx(flat, probe_batches(flat), "model.onnx")  # doctest: +SKIP
    """
    lengths = {"decoder_input_ids": "decoder_sequence"}
    axes = tuple(
        {0: "batch"} if batches[0][name].ndim > 2 else {0: "batch", 1: lengths.get(name, "sequence")}
        for name in flat.names
    )
    return _write(flat, type(flat.model).__name__, axes, batches, expected_outputs(flat, batches), Path(path))


@torch.no_grad()
def expected_outputs(flat: Flat, batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    """What torch makes of batches, by the outputs' names."""
    return [flat.named(*(batch[name] for name in flat.names)) for batch in batches]


def onnx_runtime(path: Path) -> Run:
    """An ONNX file as a function of named tensors, with as many threads as torch takes.

    Raises:
        BadRecipe: onnx, onnxscript or onnxruntime is missing.
    """
    need_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(batch: Batch) -> dict[str, torch.Tensor]:
        values = session.run(names, {name: value.numpy() for name, value in batch.items()})
        return dict(zip(names, map(torch.from_numpy, values)))

    return run


def need_onnx() -> None:
    """Raises `BadRecipe` where a package is missing."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter asks for it late, in the middle of its work
    except ImportError as error:
        raise BadRecipe(f"expected {error.name} for ONNX, found none: pip install 'ibprune[onnx]'.") from error


def check_parity(run: Run, batches: Sequence[Batch], expected: Sequence[dict[str, torch.Tensor]], what: str) -> float:
    """The largest difference between a runtime's outputs and the model's, as a share of the largest of that output.

    Raises:
        PlanMismatch: It is more than `TOLERANCE`, or an output has another shape.
    """
    worst = 0.0
    for batch, wanted in zip(batches, expected):
        found = run(batch)
        for name, value in wanted.items():
            if found[name].shape != value.shape:
                shapes = f"{tuple(value.shape)}, found {tuple(found[name].shape)}"
                raise PlanMismatch(f"expected '{name}' of the {what} to be of shape {shapes}.")
            apart = float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12))
            worst = max(worst, apart) if apart == apart else apart  # NaN stays
    if not worst <= TOLERANCE:
        raise PlanMismatch(f"expected the {what} to compute what the model does, found it off by {worst:.2g}.")
    return worst


def _write(
    model: nn.Module,
    name: str,
    axes: tuple[dict[int, str], ...],
    batches: Sequence[Batch],
    expected: Sequence[dict[str, torch.Tensor]],
    path: Path,
) -> float:
    """Traces the first batch, checks all, and lets the file appear; `axes` names what varies, by input."""
    need_onnx()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    shapes = {"values": axes} if isinstance(model, Flat) else axes
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        temporary = Path(scratch) / path.name
        try:
            with _quiet():
                torch.onnx.export(
                    model, tuple(batches[0].values()), temporary, dynamo=True, external_data=size > LARGEST,
                    verbose=False, dynamic_shapes=shapes, input_names=list(batches[0]), output_names=list(expected[0]),
                )  # fmt: skip
                run = onnx_runtime(temporary)
        except Exception as error:  # noqa: BLE001  the exporter and the runtime raise what they like
            raise PlanMismatch(f"{name} could not be written as ONNX: {_reason(error)}") from error
        worst = check_parity(run, batches, expected, "ONNX file")
        for file in Path(scratch).iterdir():
            file.rename(path.parent / file.name)
    return worst


def _reason(error: BaseException) -> str:
    """What stopped the exporter: the first line of the error below its own, which only says at which step."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not there and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
