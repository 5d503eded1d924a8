"""What a run has done so far, kept beside its output, so that `--resume` takes it up again."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from ibprune.console import Quiet
from ibprune.errors import BadRecipe, first_line
from ibprune.json_files import read_json
from ibprune.locking import LOCK, alone
from ibprune.processes import n_processes, on_main, process_index, shared
from ibprune.recipe import WHERE, Recipe
from ibprune.saves import FORMAT, Damaged, Entry, Tensors, make_entry, read_entry, rng_state, set_rng_state, write_entry

RECIPE = "recipe.json"
UNFINISHED = ".unfinished"  # a file that is being written


class Journal:
    """Remembers nothing: for what is not part of a run that can be resumed.

    Attributes:
        data: The generator with which batches are made, beside the seeds of their order: it hides tokens of masked
            language models and changes pictures.
        resumed: Whether anything of an earlier run was taken up.
    """

    data: torch.Generator | None = None
    resumed: bool = False

    def read(self, name: str, *, again: bool = True) -> Entry | None:
        """What was written under a name; the generators are as they were then only after `restore`.

        Args:
            again: Whether a part whose file is damaged is to be done again.
        """
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
        return "nothing of it was saved, and it starts anew."

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
    """Keeps a file of safetensors per entry, and of a phase of training its last saves, in a folder.

    The main process writes and says what is there; each of them reads. An entry rests on those before it. Where one
    of these was done again and came out differently, as it may on a GPU, the entry is not used.

    Args:
        folder: Where.
        recipe: Of the run; `open_journal` compares it.
        minutes: Between two saves of a phase of training.
        before: What the interrupted run was bound to.
    """

    def __init__(self, folder: Path, recipe: Recipe, minutes: float, console: Quiet, before: dict | None = None):
        self.folder, self.recipe, self.seconds, self.console = folder, recipe, 60 * minutes, console
        self.before, self.subject = before, {}
        self.digests: dict[str, str] = {}  # of the entries that this run has come by, in their order
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

    def read(self, name: str, *, again: bool = True) -> Entry | None:
        """As in `Journal`.

        Raises:
            BadRecipe: Everything under the name is damaged, and it is not to be done `again`.
        """
        entry = None

        def newest() -> Path | None:
            nonlocal entry
            path, entry = self._newest(name, again)
            return path

        path = on_main(newest)
        if path is None:
            return None
        try:
            entry = read_entry(path) if entry is None else entry
        except Damaged as error:  # in a process that does not see the main one's disk
            raise _damaged(path, str(error)) from error
        self.digests[name] = entry.digest
        self.resumed = True
        self.console.say(f"taken up from {path}")
        return entry

    def _newest(self, name: str, again: bool) -> tuple[Path | None, Entry | None]:
        """The newest save under a name that is whole, and where it stands; damaged ones go, so that it stays."""
        damaged: list[tuple[Path, str]] = []
        entry = None
        for path in filter(Path.exists, self._paths(name)):
            try:
                entry = read_entry(path)
                break
            except Damaged as error:
                damaged.append((path, str(error)))
        if entry is None and damaged and not again:
            raise _damaged(*damaged[0], before=len(damaged) - 1)
        fits = entry is not None and entry.after == self._after(name)
        for bad, reason in damaged:
            then = "going on from the save before it" if fits else "its part is done again"
            self.console.say(f"warning: '{bad}' is damaged ({reason.rstrip('.')}): {then}")
            with suppress(OSError):
                bad.unlink()
        if entry is not None and not fits:
            self.console.say(f"'{path}' is not used: what it rests on was done again, and came out differently")
        return (path, entry) if fits else (None, None)

    def restore(self, entry: Entry) -> None:
        set_rng_state(*entry.rng, self.data)

    def write(self, name: str, tensors: Tensors, facts: dict | None = None) -> None:
        if process_index():
            return
        entry = make_entry(tensors, facts or {}, rng_state(self.data), after=self._after(name))
        self.digests[name] = entry.digest
        paths = self._paths(name)
        unfinished = paths[0].with_suffix(UNFINISHED)
        try:
            self._begin()
            write_entry(unfinished, entry)
            for newer, older in reversed(list(zip(paths, paths[1:]))):  # only now: until here the old ones were good
                if newer.exists():
                    os.replace(newer, older)
            os.replace(unfinished, paths[0])
        except (OSError, SafetensorError) as error:
            self.console.say(f"warning: the state of the run was not saved to '{paths[0]}': {first_line(error)}")
            self.tidy()
        self.written = time.monotonic()

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        before = dict(self.digests)

        def alone() -> Tensors:
            made = make()
            self.digests = before  # what was kept on the way is not asked for where the whole is there
            return made

        return super().once(name, alone)

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.seconds

    def kept(self) -> str:
        if not any(self.folder.glob("*.safetensors")):
            return super().kept()
        return f"its state is in '{self.folder}', and the same command with --resume goes on from there."

    def remove(self) -> None:
        """Deletes the state: the run is done."""
        if process_index():
            return
        shutil.rmtree(self.folder, ignore_errors=True)

    def tidy(self) -> None:
        """Deletes what was being written when the disk was full, or when the run was killed."""
        for path in self.folder.glob(f"*{UNFINISHED}"):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _begin(self) -> None:
        if (self.folder / RECIPE).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"format": FORMAT, "recipe": _comparable(self.recipe), "subject": self.subject}
        unfinished = (self.folder / RECIPE).with_suffix(UNFINISHED)
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(unfinished, self.folder / RECIPE)

    def _paths(self, name: str) -> list[Path]:
        """Where the saves under a name stand, the newest first."""
        ages = ("", *(f".{age}" for age in range(1, self.recipe.keep_last)))
        return [self.folder / f"{name.replace(' ', '-')}{age}.safetensors" for age in ages]

    def _after(self, name: str) -> str:
        """A digest of the entries before that of a name."""
        others = [pair for pair in self.digests.items() if pair[0] != name]
        return hashlib.sha256(json.dumps(others).encode()).hexdigest()


@contextmanager
def open_journal(recipe: Recipe, output: Path, console: Quiet) -> Iterator[FolderJournal]:
    """The journal of a run, in "<output>.partial"; it holds something only where `recipe.resume` takes it up.

    No other run can open it until it is closed.

    Raises:
        BadRecipe: Another run is at work there, or something is there and `resume` does not say to go on with it, or
            it is of another recipe.
    """
    folder = output.with_name(f"{output.name}.partial")
    if folder.exists() and not folder.is_dir():
        raise BadRecipe(f"expected to keep the state of the run in '{folder}', found a file: move it.")
    with nullcontext() if process_index() else alone(folder, output, console):
        journal = _take_up(recipe, folder, console)
        if not process_index():
            journal.tidy()
        yield journal


def _take_up(recipe: Recipe, folder: Path, console: Quiet) -> FolderJournal:
    journal = FolderJournal(folder, recipe, recipe.save_every, console)
    if not folder.is_dir() or all(path.name == LOCK or path.suffix == UNFINISHED for path in folder.iterdir()):
        if recipe.resume:
            console.say(f"nothing to resume in {folder}: starting from the beginning")
        return journal
    try:
        record = read_json(folder / RECIPE)
        theirs = dict(record["recipe"]) if record["format"] == FORMAT else None
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


def _comparable(recipe: Recipe) -> dict:
    """What decides the parts of a run, as JSON gives it back; not what `at_least` asks for: it chooses among them."""
    return json.loads(recipe.model_dump_json(exclude=WHERE)) | {"at_least": recipe.at_least is not None}


def _damaged(path: Path, reason: str, *, before: int = 0, folder: bool = False) -> BadRecipe:
    """The error for a file of a state; so many saves `before` it are no better."""
    reason = reason.rstrip(".") + (f", and of {before} saved before it none is whole" if before else "")
    part = f"{'them' if before else 'it'} to do that part again, or the folder to start anew"
    what = "the folder to start anew" if folder else part
    return BadRecipe(f"expected the state of an interrupted run in '{path}', but: {reason}. Delete {what}.")
