"""A compacted module as an ONNX file, free in its batch size and compared with the module before it is kept."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ibprune.errors import BadRecipe, PlanMismatch, first_line

INPUT, OUTPUT = "inputs", "outputs"
TOLERANCE = 1e-4  # of the largest output: another runtime adds in another order


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
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter asks for it late, in the middle of its work
    except ImportError as error:
        raise BadRecipe(f"expected {error.name} for ONNX, found none: pip install 'ibprune[onnx]'.") from error
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    model = copy.deepcopy(model).cpu().eval()
    example = example.detach().cpu()
    sizes = [example.repeat(3, *[1] * (example.ndim - 1))[:size] for size in (len(example), 1, 3)]
    try:
        with _quiet():
            torch.onnx.export(
                model, (sizes[2],), temporary, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=[INPUT], output_names=[OUTPUT],
            )  # fmt: skip
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  the exporter and the runtime raise what they like
        temporary.unlink(missing_ok=True)
        raise PlanMismatch(f"{type(model).__name__} could not be written as ONNX: {first_line(error)}") from error
    worst = 0.0
    for batch in sizes:
        with torch.no_grad():
            expected = model(batch)
        found = torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0])
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
    if not worst <= TOLERANCE:
        temporary.unlink()
        raise PlanMismatch(f"expected the ONNX file to compute what the module does, found it off by {worst:.2g}.")
    temporary.rename(path)
    return worst


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
