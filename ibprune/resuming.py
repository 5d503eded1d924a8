"""What a run has done so far, kept beside its output, so that `--resume` takes it up again."""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ibprune.console import Quiet
from ibprune.errors import BadRecipe, first_line
from ibprune.processes import n_processes, process_index, shared
from ibprune.recipe import WHERE, Recipe

FORMAT = "ibprune.state/3"  # in 1, nothing told the model and the data; in 2, not the number of processes
RECIPE = "recipe.json"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One file of a state: what a part of the run made, or what a phase of training has come to.

    Attributes:
        tensors: By name, on the CPU.
        facts: The rest, as JSON.
        rng: Where all random generators stood, as `rng_state` gives it.
    """

    tensors: Tensors
    facts: dict
    rng: tuple[Tensors, dict]

    def part(self, prefix: str) -> Tensors:
        """The tensors whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}


class Journal:
    """Remembers nothing: for what is not part of a run that can be resumed.

    Attributes:
        data: The generator with which batches are made, beside the seeds of their order: it hides tokens of masked
            language models and changes pictures.
        resumed: Whether anything of an earlier run was taken up.
    """

    data: torch.Generator | None = None
    resumed: bool = False

    def read(self, name: str) -> Entry | None:
        """What was written under a name; the generators are as they were then only after `restore`."""
        return None

    def restore(self, entry: Entry) -> None:
        """Sets all generators to where they were when the entry was written."""

    def write(self, name: str, tensors: Tensors, facts: dict | None = None) -> None:
        """Keeps this, and the states of all generators, under a name; a failure to write is said and not raised."""

    def due(self) -> bool:
        """Whether it is time that a phase of training writes where it stands."""
        return False

    def kept(self) -> str:
        """What can be said of the state when a run stops."""
        return "nothing was saved of this phase; --resume starts it anew."

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives, or gave when the run was here before; the generators go on from there alike."""
        entry = self.read(name)
        if entry is not None:
            self.restore(entry)
            return entry.tensors
        made = shared(make())
        self.write(name, made)
        return made


NO_JOURNAL = Journal()


class FolderJournal(Journal):
    """Keeps a file of safetensors per entry, in a folder that appears with the first.

    The main process writes and says what is there; each of them reads.

    Args:
        folder: Where.
        recipe: Of the run; `open_journal` compares it.
        minutes: Between two saves of a phase of training.
        before: What the interrupted run was bound to.
    """

    def __init__(self, folder: Path, recipe: Recipe, minutes: float, console: Quiet, before: dict | None = None):
        self.folder, self.recipe, self.seconds, self.console = folder, recipe, 60 * minutes, console
        self.before, self.subject = before, {}
        self.written = time.monotonic()

    def bind(self, subject: dict[str, str], data: torch.Generator | None) -> None:
        """Takes what the run works on, once it is loaded.

        Args:
            subject: Digests of the model and the data, under words for them.
            data: As the attribute.

        Raises:
            BadRecipe: The interrupted run worked on others.
        """
        subject = subject | {"the number of processes": str(n_processes())}
        for what, digest in subject.items():
            if self.before is not None and self.before.get(what) != digest:
                raise BadRecipe(
                    f"--resume: {what} changed since the run in '{self.folder}' was interrupted: bring the same back, "
                    "or delete the folder to start anew."
                )
        self.subject, self.data = subject, data

    def read(self, name: str) -> Entry | None:
        path = self._path(name)
        if not shared(path.exists()):
            return None
        try:
            with safe_open(path, "pt") as file:
                text = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            facts = json.loads(text["facts"])
            whole = text["format"] == FORMAT and text["sha256"] == _digest(tensors, text["facts"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, first_line(error)) from error
        if not whole:
            raise _damaged(path, "its contents differ from their checksum")
        self.resumed = True
        self.console.say(f"taken up from {path}")
        own = {key: tensors[key] for key in facts["order"]}
        rng = {key: value for key, value in tensors.items() if key not in own}
        return Entry(own, facts["facts"], (rng, facts["rng"]))

    def restore(self, entry: Entry) -> None:
        set_rng_state(*entry.rng, self.data)

    def write(self, name: str, tensors: Tensors, facts: dict | None = None) -> None:
        if process_index():
            return
        states, rng = rng_state(self.data)
        text = json.dumps({"order": list(tensors), "facts": facts or {}, "rng": rng})
        tensors = {key: _plain(value) for key, value in (tensors | states).items()}
        metadata = {"format": FORMAT, "facts": text, "sha256": _digest(tensors, text)}
        path = self._path(name)
        unfinished = path.with_suffix(".unfinished")
        try:
            if not (self.folder / RECIPE).exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                record = {"format": FORMAT, "recipe": _comparable(self.recipe), "subject": self.subject}
                (self.folder / "recipe.unfinished").write_text(json.dumps(record, indent=1) + "\n")
                os.replace(self.folder / "recipe.unfinished", self.folder / RECIPE)
            save_file(tensors, unfinished, metadata)
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())  # a name must not outlive the power that its contents were waiting for
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            self.console.say(f"warning: the state of the run was not saved to '{path}': {first_line(error)}")
            unfinished.unlink(missing_ok=True)
        self.written = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.seconds

    def kept(self) -> str:
        return f"its state is in '{self.folder}', and the same command with --resume goes on from there."

    def remove(self) -> None:
        """Deletes the state: the run is done."""
        if process_index():
            return
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.safetensors"


def open_journal(recipe: Recipe, output: Path, console: Quiet) -> FolderJournal:
    """The journal of a run, in "<output>.partial"; it holds something only where `recipe.resume` takes it up.

    Raises:
        BadRecipe: Something is there and `resume` does not say to go on with it, or it is of another recipe.
    """
    folder = output.with_name(f"{output.name}.partial")
    journal = FolderJournal(folder, recipe, recipe.save_every, console)
    if not folder.is_dir() or not any(folder.iterdir()):
        if folder.exists() and not folder.is_dir():
            raise BadRecipe(f"expected to keep the state of the run in '{folder}', found a file: move it.")
        if recipe.resume:
            console.say(f"nothing to resume in {folder}: starting from the beginning")
        return journal
    try:
        record = json.loads((folder / RECIPE).read_text())
        theirs = record["recipe"] if record["format"] == FORMAT else None
        journal.before = dict(record["subject"]) if theirs is not None else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / RECIPE, first_line(error), folder=True) from error
    if theirs is None:
        raise _damaged(folder / RECIPE, f"its format is not {FORMAT}", folder=True)
    if not recipe.resume:
        raise BadRecipe(
            f"found the state of an interrupted run in '{folder}': take it up with --resume, or delete it to start "
            "anew."
        )
    ours = _comparable(recipe)
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            raise BadRecipe(
                f"--resume: expected the recipe of the interrupted run in '{folder}', whose {key} is "
                f"{theirs.get(key)!r}, found {ours.get(key)!r}: give the same, or delete the folder to start anew."
            )
    return journal


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


def _comparable(recipe: Recipe) -> dict:
    """What decides the parts of a run, as JSON gives it back; not what `at_least` asks for: it chooses among them."""
    return json.loads(recipe.model_dump_json(exclude=WHERE)) | {"at_least": recipe.at_least is not None}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU that has its memory to itself, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _digest(tensors: Tensors, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _damaged(path: Path, reason: str, *, folder: bool = False) -> BadRecipe:
    what = "the folder to start anew" if folder else "it to do that part again, or the folder to start anew"
    return BadRecipe(f"expected the state of an interrupted run in '{path}', but: {reason.rstrip('.')}. Delete {what}.")
