"""One file of a run's state: tensors, facts and where the random generators stood, under a checksum."""

import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ibprune.errors import first_line
from ibprune.json_files import parse_json

FORMAT = "ibprune.state/4"  # 1 did not know the model and the data, 2 the number of processes, 3 what came before
Tensors = dict[str, torch.Tensor]


class Damaged(Exception):
    """A file of a state that is cut off, changed or unreadable; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """One file of a state: what a part of the run made, or what a phase of training has come to.

    Attributes:
        tensors: By name, on the CPU.
        facts: The rest, as JSON.
        rng: Where all random generators stood, as `rng_state` gives it.
        after: A digest of the parts that came before it, on which it may rest.
        digest: Of all of this.
    """

    tensors: Tensors
    facts: dict
    rng: tuple[Tensors, dict]
    after: str
    digest: str

    def part(self, prefix: str) -> Tensors:
        """The tensors whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}


def read_entry(path: Path) -> Entry:
    """What `write_entry` wrote.

    Raises:
        Damaged: Not that.
    """
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        facts, after = parse_json(text["facts"]), text["after"]
        digest = _digest(tensors, text["facts"], after)
        whole = text["format"] == FORMAT and text["sha256"] == digest
        own = {key: tensors[key] for key in facts["order"]} if whole else {}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise Damaged(first_line(error)) from error
    if not whole:
        raise Damaged("its contents differ from their checksum")
    rng = {key: value for key, value in tensors.items() if key not in own}
    return Entry(own, facts["facts"], (rng, facts["rng"]), after, digest)


def make_entry(tensors: Tensors, facts: dict, rng: tuple[Tensors, dict], *, after: str) -> Entry:
    """An entry of tensors that may stand anywhere and share memory."""
    tensors, states = ({key: _plain(value) for key, value in group.items()} for group in (tensors, rng[0]))
    return Entry(tensors, facts, (states, rng[1]), after, _digest(tensors | states, _text(tensors, facts, rng), after))


def write_entry(path: Path, entry: Entry) -> None:
    """Writes an entry, to the disk and not only to its cache.

    Raises:
        OSError, SafetensorError: It could not be written; what stands under the path is to be deleted.
    """
    text = {"format": FORMAT, "facts": _text(entry.tensors, entry.facts, entry.rng), "after": entry.after}
    save_file(entry.tensors | entry.rng[0], path, text | {"sha256": entry.digest})
    with open(path, "rb+") as file:
        os.fsync(file.fileno())  # a name must not outlive the power that its contents were waiting for


def rng_state(data: torch.Generator | None) -> tuple[Tensors, dict]:
    """Where all random generators stand, as tensors and JSON."""
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    if data is not None:
        tensors["rng/data"] = data.get_state()
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return tensors, {"numpy": [name, keys.tolist(), *rest], "python": [version, list(numbers), gauss]}


def set_rng_state(tensors: Tensors, facts: dict, data: torch.Generator | None) -> None:
    """Puts the generators back to where `rng_state` found them."""
    torch.set_rng_state(tensors["rng/torch"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    if data is not None and "rng/data" in tensors:
        data.set_state(tensors["rng/data"])
    name, keys, *rest = facts["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = facts["python"]
    random.setstate((version, tuple(numbers), gauss))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU that has its memory to itself, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _text(tensors: Tensors, facts: dict, rng: tuple[Tensors, dict]) -> str:
    return json.dumps({"order": list(tensors), "facts": facts, "rng": rng[1]})


def _digest(tensors: Tensors, *texts: str) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
