"""ONNX files as OpenVINO's, compared with the model on OpenVINO's CPU runtime before they stay."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ibprune.errors import BadRecipe, PlanMismatch, first_line
from ibprune.losses import Batch
from ibprune.onnx_files import Run, check_parity, need_onnx


def write_openvino(
    onnx: Path, batches: Sequence[Batch], expected: Sequence[dict[str, torch.Tensor]], path: str | Path
) -> float:
    """Writes a .xml and a .bin for OpenVINO and returns the largest difference to the model's outputs, as a share.

    Weights stay in float32: OpenVINO's tools make less of them.

    Args:
        onnx: The same model as ONNX, from `ibprune.onnx_files`.
        batches: What the runtime reads before the files are kept.
        expected: The model's outputs on them, by name.
        path: Of the .xml.

    Raises:
        BadRecipe: openvino is missing.
        PlanMismatch: The file cannot be converted, or computes something else.

    Example:
        >>> write_openvino(Path("model.onnx"), batches, expected, "openvino_model.xml")  # doctest: +SKIP
    """
    need_openvino()
    import openvino

    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        temporary = Path(scratch) / path.name
        try:
            openvino.save_model(openvino.convert_model(onnx), temporary, compress_to_fp16=False)
            run = openvino_runtime(temporary)
        except Exception as error:  # noqa: BLE001  the converter and the runtime raise what they like
            raise PlanMismatch(f"'{onnx.name}' could not be written for OpenVINO: {first_line(error)}") from error
        worst = check_parity(run, batches, expected, "OpenVINO file")
        for suffix in (".bin", ".xml"):
            temporary.with_suffix(suffix).rename(path.with_suffix(suffix))
    return worst


def openvino_runtime(path: Path) -> Run:
    """A .xml for OpenVINO as a function of named tensors, in float32, with as many threads as torch takes.

    Raises:
        BadRecipe: openvino is missing.
    """
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    need_openvino()
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", threads)

    def run(batch: Batch) -> dict[str, torch.Tensor]:
        found = compiled({name: value.numpy() for name, value in batch.items()})
        return {port.get_any_name(): torch.from_numpy(values.copy()) for port, values in found.items()}

    return run


def need_openvino() -> None:
    """Raises `BadRecipe` where a package is missing: the model is written as ONNX first."""
    need_onnx()
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise BadRecipe(f"expected {error.name} for OpenVINO, found none: pip install 'ibprune[openvino]'.") from error
