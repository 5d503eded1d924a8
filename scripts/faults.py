"""Damages every file of a finished folder in every way and asks each verb that reads it; kills exports half-way.

    python scripts/faults.py --flips 5 --output benchmarks/faults.json

The folder is of a tiny BERT, pruned by magnitude. Each fault must end in one of two ways: refused by a line that names
the file, by every verb that reads it; or read to the very same outputs and tokens. What `audit`, `bench` and `export`
compute is not repeated where a fault is harmless: they read by `load_any`, which is asked. An export that is killed
must leave the source as it was, and no folder under the output's name that is not whole.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants
from kill_and_resume import make_inputs

import ibprune
from ibprune.cli import main as command
from ibprune.errors import IBPruneError
from ibprune.folders import staged, write_model
from ibprune.loading import load_any
from ibprune.models import find_source, load_tokenizer

TEXTS = ["the film was good", "a dull story and a bad actor"]


def faults(rng: random.Random, flips: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Names and deeds."""

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)

    def cut(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: rng.randrange(1, len(content))])

    def replace(file: Path, make: Callable[[Path], None]) -> None:
        file.unlink()
        make(file)

    for i in range(flips):
        yield f"flipped {i}", flip
    yield "cut short", cut
    yield "empty", lambda file: file.write_bytes(b"")
    yield "gone", Path.unlink
    yield "a folder", lambda file: replace(file, Path.mkdir)
    yield "a link to nothing", lambda file: replace(file, lambda path: path.symlink_to("nowhere"))
    yield "a link to another file", lambda file: replace(file, lambda path: path.symlink_to("/etc/hostname"))


def said_of(folder: Path, read: Callable[[str], object], words: Path) -> str:
    """A digest of a model's outputs and of the tokens that the tokenizer in `words` makes."""
    model = read(str(folder))
    tokens = load_tokenizer(find_source(str(words)))(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**tokens).logits
    return hashlib.sha256(outputs.numpy().tobytes() + str(tokens["input_ids"].tolist()).encode()).hexdigest()


def verdict(name: str, ask: Callable[[], str], good: str) -> str:
    """How a verb took a fault: "refused", "same", or what is wrong."""
    try:
        found = ask()
    except IBPruneError as error:
        line = str(error)
        named = name in line or Path(name).name in line
        return "refused" if named and "\n" not in line else f"not named: {line[:200]}"
    except Exception as error:  # noqa: BLE001 - whatever comes is what is looked for
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    return "same" if found == good else "other numbers"


def by_command(name: str, *words: str) -> str:
    """How the command line took a fault that its loader refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = command(list(words))
    except Exception as error:  # noqa: BLE001
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    lines = said.getvalue().splitlines()
    named = code == 2 and lines and Path(name).name in lines[-1]
    return "refused" if named else f"exit code {code}: {' '.join(lines)[-200:]}"


def try_faults(folder: Path, dense: str, data: str, scratch: Path, flips: int, seed: int) -> list[dict]:
    """A record of each file and fault: how `ibprune.load`, and the verbs, took it."""
    rng, records = random.Random(seed), []
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    good = said_of(folder, ibprune.load, folder)
    for name in names:
        for fault, do in faults(rng, flips):
            copy = shutil.copytree(folder, scratch / "copy")
            do(copy / name)
            found = {
                "load": verdict(name, partial(said_of, copy, ibprune.load, folder), good),  # which reads no tokenizer
                "compare": verdict(name, partial(said_of, copy, load_any, copy), good),
            }
            if found["compare"] == "refused":
                out = str(scratch / "out")
                for verb, words in {
                    "audit": ("audit", dense, str(copy), "--data", data, "--quiet"),
                    "bench": ("bench", dense, str(copy), "--quiet"),
                    "export": ("export", str(copy), "--to", "onnx", "--output", out),
                }.items():
                    found[verb] = by_command(name, *words)
            pushed = by_command(name, "push", str(copy), "me/small")
            found["push"] = "passed on" if "HF_HUB_OFFLINE" in pushed else pushed  # the next that is asked
            left = [path for path in scratch.iterdir() if path.name != "copy"]
            records.append({"file": name, "fault": fault, "verbs": found, "left": [path.name for path in left]})
            shutil.rmtree(copy)
    return records


def kill_exports(model: str, scratch: Path, kills: int, seed: int) -> Counter:
    """What is under the output's name after a process that was writing it is killed, as counts."""
    rng, seen = random.Random(seed), Counter()
    loaded, tokenizer = ibprune.load(model), load_tokenizer(find_source(model))
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(model).iterdir()}

    def export(output: Path) -> None:
        with staged(output) as temporary:
            write_model(loaded, tokenizer, None, temporary)

    good = said_of(Path(model), ibprune.load, Path(model))
    start = time.monotonic()
    export(scratch / "whole")
    took = time.monotonic() - start
    for i in range(kills):
        output = scratch / f"export{i}"
        number = os.fork()
        if number == 0:
            export(output)
            os._exit(0)
        time.sleep(rng.uniform(0, 1.2 * took))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(model).iterdir()}
        whole = output.exists() and said_of(output, ibprune.load, output) == good
        seen["source changed" if after != before else "whole" if whole else "half" if output.exists() else "none"] += 1
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=5, help="of a bit in each file")
    parser.add_argument("--kills", type=int, default=40, help="of exports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    settings = parser.parse_args()
    constants.HF_HUB_OFFLINE = True  # a push gets as far as its checks of the folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        dense, data = make_inputs(place)
        ibprune.prune(
            dense, 0.5, data=data, output=str(place / "small"), score="magnitude", shares="equal", audit=False,
            finetune_steps=2, recover_steps=2, batch_size=16, max_length=16,
        )  # fmt: skip
        (place / "scratch").mkdir()
        records = try_faults(place / "small", dense, data, place / "scratch", settings.flips, settings.seed)
        kills = kill_exports(dense, place, settings.kills, settings.seed)
    fine = ("refused", "same", "passed on")
    bad = [record for record in records if record["left"] or any(v not in fine for v in record["verbs"].values())]
    found = {
        "asked": {key: getattr(settings, key) for key in ("flips", "kills", "seed")},
        "files": len({record["file"] for record in records}),
        "faults": len(records),
        "verdicts": {verb: Counter(r["verbs"][verb] for r in records if verb in r["verbs"] and r["verbs"][verb] in fine)
                     for verb in ("load", "compare", "audit", "bench", "export", "push")},
        "wrong": bad,
        "kills": kills,
    }  # fmt: skip
    settings.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
