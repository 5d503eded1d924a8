"""A state's files: the last saves are kept, damage is told from what can be gone on from, one run writes at a time."""

import os
import resource
import signal
import time
from contextlib import contextmanager

import pytest
import torch

from ibprune import locking
from ibprune.console import Quiet
from ibprune.errors import BadRecipe, IBPruneError
from ibprune.folders import staged
from ibprune.locking import alone
from ibprune.recipe import make_recipe
from ibprune.resuming import FolderJournal

DAMAGES = {
    "cut off": lambda good: good[:-100],
    "cut off in its header": lambda good: good[:5],
    "empty": lambda good: b"",
    "flipped": lambda good: good[:-9] + bytes([good[-9] ^ 1]) + good[-8:],
    "of another part": lambda good: good.replace(b'"after":"', b'"after":"0', 1),
}


class Saying(Quiet):
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


def journal_in(folder, **values) -> FolderJournal:
    return FolderJournal(folder, make_recipe({"model": "m", "budget": 1} | values), 10, Saying())


def value(journal: FolderJournal, name: str = "fit", **how) -> float | None:
    entry = journal.read(name, **how)
    return None if entry is None else float(entry.tensors["x"])


def write(journal: FolderJournal, *values: float, name: str = "fit") -> None:
    for number in values:
        journal.write(name, {"x": torch.tensor(number)})


@contextmanager
def full_disk(most: int = 512):
    """No file can grow beyond so many bytes: what a full disk does to who writes, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_save_gives_way_to_the_one_before_it(damage, tmp_path):
    write(journal_in(tmp_path), 1, 2, 3)
    names = ["fit.1.safetensors", "fit.safetensors"]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    newest = tmp_path / "fit.safetensors"
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    again = journal_in(tmp_path)
    assert value(again, again=False) == 2
    said, taken = again.console.said
    assert said.startswith(f"warning: '{newest}' is damaged (") and said.endswith(": going on from the save before it")
    assert taken == f"taken up from {tmp_path / 'fit.1.safetensors'}"
    write(again, 4)  # does not push the good one out
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    newest.write_bytes(b"")
    assert value(journal_in(tmp_path), again=False) == 2


def test_where_no_save_is_whole_a_phase_is_refused_and_a_part_done_again(tmp_path):
    write(journal_in(tmp_path), 1, 2)
    bad = {path: path.read_bytes()[:-1] for path in tmp_path.glob("fit*")}
    for path, contents in bad.items():
        path.write_bytes(contents)
    found = r"fit.safetensors', but: .*, and of 1 saved before it none is whole. Delete them to do that part again, or"
    with pytest.raises(BadRecipe, match=found):
        value(journal_in(tmp_path), again=False)
    assert {path: path.read_bytes() for path in tmp_path.glob("fit*")} == bad
    again = journal_in(tmp_path)
    assert again.once("fit", lambda: {"x": torch.tensor(5.0)})["x"] == 5
    assert [line.rpartition(": ")[2] for line in again.console.said] == ["its part is done again"] * 2
    assert value(journal_in(tmp_path)) == 5


@pytest.mark.parametrize("keep,left", [(1, {3.0}), (3, {1.0, 2.0, 3.0})])
def test_as_many_saves_stay_as_are_asked_for(keep, left, tmp_path):
    write(journal_in(tmp_path, keep_last=keep), 1, 2, 3)
    found = set()
    while any(tmp_path.glob("fit*")):
        found.add(value(journal_in(tmp_path, keep_last=3)))
        max(tmp_path.glob("fit*"), key=lambda path: path.stat().st_mtime_ns).unlink()
    assert found == left


def test_what_rests_on_a_part_that_came_out_differently_is_not_used(tmp_path):
    first = journal_in(tmp_path)
    for name in ("scores", "shares", "fit"):
        write(first, 1, name=name)
    same = journal_in(tmp_path)
    write(same, 1, name="scores")  # done again, to the same bits
    assert value(same, "shares") == 1 and value(same) == 1
    other = journal_in(tmp_path)
    write(other, 2, name="scores")
    assert value(other, "shares") is None
    assert "shares.safetensors' is not used: what it rests on was done again" in other.console.said[-1]


def test_what_was_kept_on_the_way_is_not_asked_for_where_the_whole_is_there(tmp_path):
    def whole(journal):
        journal.once("tried 1", lambda: {"x": torch.tensor(1.0)})
        return {"x": torch.tensor(2.0)}

    for _ in range(2):
        journal = journal_in(tmp_path)
        journal.once("shares", lambda journal=journal: whole(journal))
        write(journal, 3)
    journal = journal_in(tmp_path)
    assert value(journal, "shares") == 2 and value(journal) == 3
    (tmp_path / "shares.safetensors").unlink()
    journal = journal_in(tmp_path)
    journal.once("shares", lambda: whole(journal))
    assert journal.console.said == [f"taken up from {tmp_path / 'tried-1.safetensors'}"]
    assert value(journal) == 3


def test_a_disk_that_is_full_leaves_the_save_that_was_there_and_nothing_else(tmp_path):
    journal = journal_in(tmp_path / "state")
    assert journal.kept() == "nothing of it was saved, and it starts anew."
    with full_disk(most=8):
        write(journal, 0)  # not even the recipe
    assert list((tmp_path / "state").iterdir()) == []
    write(journal, 1)
    files = {path: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    with full_disk():
        write(journal, 2)
    assert {path: path.read_bytes() for path in (tmp_path / "state").iterdir()} == files
    said = journal.console.said
    assert len(said) == 2 and all(line.startswith("warning: the state of the run was not saved to") for line in said)
    assert all("File too large" in line for line in said)
    write(journal, 3)
    assert value(journal_in(tmp_path / "state")) == 3 and "--resume goes on from there" in journal.kept()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("Write failed (os error 28)"), None]
)
def test_a_folder_that_cannot_be_written_leaves_nothing_and_says_what_is_kept(error, tmp_path):
    with pytest.raises(IBPruneError, match=r"expected to write '.*out', but: .*\. Make room, or .*; its state is kept"):
        with full_disk(), staged(tmp_path / "out", kept="its state is kept") as temporary:
            (temporary / "first").write_text("something")
            if error is not None:
                raise error
            (temporary / "second").write_bytes(bytes(1000))
    assert list(tmp_path.iterdir()) == []


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    folder, out = tmp_path / "new" / "out.partial", tmp_path / "new" / "out"
    with alone(folder, out, Quiet()):
        with pytest.raises(BadRecipe, match=rf"no other run into '{out}', found process {os.getpid()} on .* at work"):
            with alone(folder, out, Quiet()):
                pass
        (folder / locking.LOCK).write_bytes(b"")  # on a full disk it has no name
        with pytest.raises(BadRecipe, match="found another process at work on it: wait"):
            with alone(folder, out, Quiet()):
                pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), alone(folder, out, Quiet()):
        (folder / "state").touch()
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["state"]


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    folder, out = tmp_path / "out.partial", tmp_path / "out"
    child = os.fork()
    if child == 0:
        with alone(folder, out, Quiet()):
            time.sleep(60)
        os._exit(0)
    for _ in range(200):
        if (folder / locking.LOCK).exists() and (folder / locking.LOCK).read_bytes():
            break
        time.sleep(0.02)
    with pytest.raises(BadRecipe, match=f"found process {child} on "), alone(folder, out, Quiet()):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / locking.LOCK).exists()
    with alone(folder, out, Quiet()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_locked_the_run_goes_on_and_says_so(tmp_path, monkeypatch):
    def never(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locking.FileLock, "acquire", never)
    console = Saying()
    with alone(tmp_path / "out.partial", tmp_path / "out", console):
        pass
    assert len(console.said) == 1 and "cannot be locked" in console.said[0] and "No locks" in console.said[0]
