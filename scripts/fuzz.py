"""Feeds mutated files to every parser and records whatever comes out that is none of ibprune's own errors.

    pip install atheris
    python scripts/fuzz.py --seconds 1200 --output benchmarks/fuzz.json

A process per parser runs atheris (libFuzzer, guided by the coverage of the modules that read) on valid files: half of
the changes are of bytes, half of structure (a value of JSON replaced by a hostile one, dropped or nested). Its address
space is limited, so that a size that is only claimed cannot be reserved, and an execution that takes longer than ten
seconds counts as a defect. Times are of the processor. An input that broke something is left beside the output.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
SHARES = {  # of the time
    "recipe": 4, "flags": 3, "budget": 3, "plan": 3, "report": 3, "card": 2, "audit": 2, "latency": 3, "state": 3,
    "run": 2, "module": 3, "config": 10, "dense config": 6, "shards": 2, "weights": 5, "csv": 3, "tsv": 3, "jsonl": 5,
    "json": 5, "txt": 2, "conll": 3, "jsonl stream": 3, "txt stream": 2, "csv stream": 2,
}  # fmt: skip
READERS = (
    "annotations", "audit_output", "checksums", "claims", "data", "flags", "json_files", "latency", "loading", "models",
    "model_card", "module_files", "plans", "reading", "rebuild", "recipe", "report", "resuming", "saves",
)  # fmt: skip
MEMORY = 4 << 30  # bytes beyond what the process has when it starts to fuzz
LONGEST = 10  # seconds of an execution
HOSTILE = (
    None, True, -1, 0, 1, 2, 10**12, 2**63, 10**400, -(10**12), 0.5, 1e308, float("inf"), float("nan"), "", "x", "\0",
    "../x", "/etc/passwd", "a" * 300, "\x1b[2J", "<b>", "9" * 5000, [], {}, [[]], [None], {"": None}, [10**12],
    {"x": 10**12},
)  # fmt: skip


class TooLong(BaseException):
    """An execution that did not end in time."""


def changed(data: bytes, seed: int, atheris_mutate: Callable[[bytes, int], bytes], most: int) -> bytes:
    """A mutant: of the structure where the bytes are JSON, or begin with it as safetensors do, else of bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return atheris_mutate(data, most)
    head, body, tail = b"", data, b""
    if len(data) > 9 and data[8:9] == b"{":
        size = struct.unpack("<Q", data[:8])[0]
        body, tail = data[8 : 8 + size], data[8 + size :]
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return atheris_mutate(data, most)
    try:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            value = _changed_value(value, rng)
        body = json.dumps(value).encode()
    except (ValueError, RecursionError):
        return atheris_mutate(data, most)
    head = struct.pack("<Q", len(body)) if tail else b""
    whole = head + body + tail
    return whole if len(whole) <= most else atheris_mutate(data, most)


def _changed_value(value: object, rng: random.Random) -> object:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.08:
        kind = rng.randrange(6)
        if kind == 0:
            deep: object = value
            for _ in range(rng.choice((1, 3, 900))):
                deep = [deep]
            return deep
        if kind == 1 and isinstance(value, int | float):
            return rng.choice((value + 1, -value, value * 1000, float(value) if abs(value) < 1e300 else 0))
        if kind == 2:
            return str(value)[:100]
        return rng.choice(HOSTILE)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return {(k if k != key else str(rng.choice(HOSTILE))[:50]): v for k, v in value.items()}
        return value | {key: _changed_value(value[key], rng)}
    spot = rng.randrange(len(value))
    if rng.random() < 0.15:
        return value[:spot] + value[spot + 1 :] if rng.random() < 0.5 else value + [value[spot]]
    return value[:spot] + [_changed_value(value[spot], rng)] + value[spot + 1 :]


def prepare(place: Path) -> None:
    """What the parsers read, as a run leaves it: folders of a dense and a pruned model, of a module, and data."""
    import torch
    from kill_and_resume import make_inputs

    import ibprune

    torch.set_num_threads(1)
    model, data = make_inputs(place)
    steps = dict(finetune_steps=2, mask_steps=4, recover_steps=2, probe_steps=1, batch_size=16, max_length=16)
    steps |= dict(score="magnitude", shares="equal", audit=False)
    ibprune.prune(model, 0.5, data=data, output=str(place / "pruned"), **steps)
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    net = small_net()
    batches = torch.utils.data.DataLoader(list(zip(x, (x[:, 0] > 0).long())), batch_size=8)
    ibprune.prune(net, 0.6, train_loader=batches, mask_steps=2, recover_steps=2).save(place / "module")


def small_net():
    from torch import nn

    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def parser_of(target: str, place: Path) -> tuple[list[bytes], Callable[[bytes], None]]:
    """Valid inputs of a parser, and what reads one."""
    import torch
    from safetensors.torch import load_file

    import ibprune
    from ibprune.checksums import check_files
    from ibprune.console import Quiet
    from ibprune.costs import CostModel, Term
    from ibprune.data import find_splits, load_data
    from ibprune.embeddings import factorize_
    from ibprune.flags import prune_parser
    from ibprune.latency import LatencyTable, device_name, load_latency
    from ibprune.model_card import renamed_card
    from ibprune.module_files import load_module
    from ibprune.planning import plan
    from ibprune.plans import PruningPlan, check_plan
    from ibprune.recipe import make_recipe
    from ibprune.resuming import open_journal
    from ibprune.saves import make_entry, read_entry, rng_state, write_entry
    from ibprune.sites import find_sites

    pruned, dense, module = place / "pruned", place / "model", place / "module"
    quiet = Quiet()

    def beside(folder: Path, name: str, read: Callable[[Path], None]) -> tuple[list[bytes], Callable[[bytes], None]]:
        """A file of a folder; without the folder's checksums, which would refuse every mutant."""
        file = folder / name
        seed = file.read_bytes()
        (folder / "report.json").unlink(missing_ok=True)

        def run(data: bytes) -> None:
            file.write_bytes(data)
            read(folder)

        return [seed], run

    def a_file(name: str, seeds: list[str], read: Callable[[Path], object]) -> tuple[list[bytes], Callable]:
        file = place / name

        def run(data: bytes) -> None:
            file.write_bytes(data)
            read(file)

        return [seed.encode() for seed in seeds], run

    def streamed(file: Path) -> None:
        rows = find_splits(str(file), streaming=True)["train"]
        from ibprune.reading import Stream

        for _ in Stream(lambda: rows, file.name, buffer=4):
            pass

    if target == "recipe":
        recipe = (pruned / "recipe.yaml").read_text()
        more = ["model: &a [x, *a]\nbudget: 2020-01-01\n", "model: m\nbudget: 0.5,0.3\nat_least: accuracy=99%\n"]
        return a_file("recipe.yaml", [recipe, *more], lambda file: make_recipe({}, file=file))
    if target == "flags":
        seeds = ["--model\nm\n--budget\n0.5\n--kinds\nheads,ffn", "--recipe\nx\n--lr\n1e-3\n--seed\n7\n--no-audit"]

        parser = prune_parser()

        def flags(data: bytes) -> None:
            words = [word for word in data.decode("utf-8", "surrogateescape").split("\n") if "\0" not in word]
            found = parser.parse_args([w for w in words if not w.startswith(("-h", "--h", "--v"))])
            values = {k: v for k, v in vars(found).items() if v is not None}
            make_recipe(
                {k: v for k, v in values.items() if k not in ("recipe", "num_processes", "debug", "quiet", "json")}
            )

        return [seed.encode() for seed in seeds], flags
    if target == "budget":

        def budget(data: bytes) -> None:
            text = data.decode("utf-8", "surrogateescape")
            make_recipe({"model": "m", "at_least" if "=" in text else "budget": text})

        return [b"0.3", b"0.5,0.3", b"accuracy=99%", b"f1=0.8", b"1e-3"], budget
    if target == "plan":
        model = ibprune.load(dense)
        factorize_(model)  # as a run does
        sites = find_sites(model)
        seeds, _ = beside(pruned, "plan.json", lambda folder: None)
        return a_file("plan.json", [seeds[0].decode()], lambda f: check_plan(PruningPlan.load(f), model, sites))
    if target in ("report", "card", "audit"):
        card = shutil.copytree(ROOT / "model_cards" / "minilm-0.3", place / "card")
        file = card / ("audit.json" if target == "audit" else "report.json")

        def report(data: bytes) -> None:
            file.write_bytes(data)
            check_files(card, needed=("config.json",))

        def renamed(data: bytes) -> None:
            file.write_bytes(data)
            renamed_card(card, "me/small")

        return [file.read_bytes()], report if target == "report" else renamed
    if target == "latency":
        sites = {name: site for name, site in find_sites(ibprune.load(dense)).items()}
        n_units = {name: site.n_units for name, site in sites.items()}
        first = next(iter(n_units))
        inputs = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
        costs = CostModel("latency", (Term(1000, (), False), Term(10, (first,), False)), n_units)
        table = LatencyTable(device_name(torch.device("cpu")), {"input_ids": [2, 8]}, costs, 1.0, 0.01, ())

        def latency(file: Path) -> None:
            found = load_latency(file, sites, torch.device("cpu"), inputs)
            found.model(n_units)
            f"{found.error:.1%} {found.dense_ms:.2f}"

        return a_file("latency.json", [json.dumps(table.to_dict())], latency)
    if target == "state":
        entry = make_entry({"x": torch.ones(3)}, {"step": 3}, rng_state(None), after="0")
        write_entry(place / "entry.safetensors", entry)
        file = place / "entry.safetensors"
        seed = file.read_bytes()

        def state(data: bytes) -> None:
            file.write_bytes(data)
            read_entry(file)

        return [seed], state
    if target == "run":
        recipe = make_recipe({"model": "m", "budget": 0.5, "resume": True})
        with open_journal(recipe, place / "out", quiet) as journal:
            journal.write("part", {"x": torch.ones(1)})
        file = place / "out.partial" / "recipe.json"
        seed = file.read_bytes()

        def run(data: bytes) -> None:
            file.write_bytes(data)
            with open_journal(recipe, place / "out", quiet) as journal:
                journal.bind({}, None)

        return [seed], run
    if target == "module":
        return beside(module, "ibprune.json", lambda folder: load_module(folder, small_net))
    if target == "config":
        return beside(pruned, "config.json", ibprune.load)
    if target == "dense config":
        return beside(dense, "config.json", lambda folder: plan(str(folder), 0.5))
    if target == "shards":
        tensors = load_file(pruned / "model.safetensors")
        (pruned / "model.safetensors").rename(pruned / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (pruned / "model.safetensors.index.json").write_text(json.dumps(index))
        return beside(pruned, "model.safetensors.index.json", ibprune.load)
    if target == "weights":
        return beside(pruned, "model.safetensors", ibprune.load)

    rows = [{"text": f"word {i} and more", "label": i % 2} for i in range(24)]
    table = "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    spans = [{"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}] * 24
    asked = [{"question": "q", "answers": [{"text": "b", "answer_start": 2}]}] * 24
    squad = {"data": [{"paragraphs": [{"context": "a b", "qas": asked}]}]}
    tags = "".join("Ada B-PER\nran O\n\n" for _ in range(24))
    texts = {
        "csv": [table.replace("\t", ",")], "tsv": [table], "jsonl": [lines], "conll": [tags],
        "json": [json.dumps(found) for found in (rows, spans, squad)],
        "txt": [mark.join(row["text"] for row in rows) for mark in ("\n\n", "<|endoftext|>")],
    }  # fmt: skip
    kind, _, stream = target.partition(" ")
    return a_file(f"rows.{kind}", texts[kind], streamed if stream else lambda file: load_data(str(file)))


def child(target: str, place: Path, executions: int, seconds: float, seed: int, found: Path) -> None:
    """Fuzzes one parser, and writes what it found."""
    seeds, read = parser_of(target, place)
    from ibprune.errors import IBPruneError
    from ibprune.saves import Damaged

    corpus = place / "corpus"
    corpus.mkdir()
    for i, one in enumerate(seeds):
        (corpus / str(i)).write_bytes(one)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    record = {
        "executions": 0,
        "refused": 0,
        "accepted": 0,
        "seconds": 0.0,
        "longest_s": 0.0,
        "peak_mb": 0,
        "defects": {},
    }
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def late(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, late)

    def once(data: bytes) -> None:
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        outcome, defect = "refused", None
        try:
            read(data)
            outcome = "accepted"
        except (IBPruneError, Damaged):
            pass
        except BaseException as error:  # noqa: BLE001 - whatever comes is what is looked for
            defect = error
        signal.setitimer(signal.ITIMER_PROF, 0)
        if defect is None:
            record[outcome] += 1
        else:
            trace = defect.__traceback__
            places = []
            while trace is not None:
                file = Path(trace.tb_frame.f_code.co_filename)
                places += [f"{file.name}:{trace.tb_frame.f_code.co_name}"] if file.parent.name in ("ibprune",) else []
                trace = trace.tb_next
            name = f"{type(defect).__name__} in {places[-1] if places else '?'}"
            seen = record["defects"].setdefault(name, {"times": 0, "message": str(defect)[:200]})
            if not seen["times"]:
                (found.parent / f"{target}-{len(record['defects'])}.bin").write_bytes(data)
            seen["times"] += 1
        record["executions"] += 1
        now = time.process_time()
        record["longest_s"] = round(max(record["longest_s"], now - start), 2)
        if record["executions"] >= executions or now - began >= seconds:
            record["seconds"] = round(now - began, 1)
            record["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            found.write_text(json.dumps(record))
            os._exit(0)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        return changed(data, number, atheris.Mutate, most)

    longest = max(len(one) for one in seeds)
    options = [
        f"-seed={seed + 1}",
        "-timeout=3600",
        "-rss_limit_mb=0",
        "-verbosity=0",
        f"-max_len={2 * longest + 4096}",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], once, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(target: str, base: Path, settings: argparse.Namespace, seconds: float, scratch: Path) -> dict:
    """The record of a process of its own, in a copy of the folders."""
    place, found = scratch / "place", scratch / "found" / "record.json"
    shutil.copytree(base, place)
    found.parent.mkdir()
    number = os.fork()
    if number == 0:
        silent = os.open(found.parent / "said", os.O_CREAT | os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.chdir(place)
        try:
            child(target, place, settings.executions, seconds, settings.seed, found)
        finally:
            traceback.print_exc()
            os._exit(1)  # libFuzzer's own end waits for an interpreter that is gone
    os.waitpid(number, 0)
    said = (found.parent / "said").read_text(errors="replace")
    record = json.loads(found.read_text()) if found.exists() else {"executions": 0, "defects": {"died": said[-300:]}}
    for file in found.parent.glob("*.bin"):
        shutil.copy(file, settings.output.parent)
    shutil.rmtree(found.parent)
    shutil.rmtree(place)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200, help="of all parsers together")
    parser.add_argument("--executions", type=int, default=150_000, help="of one parser at the most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SHARES), help="comma list of parsers")
    parser.add_argument("--prepared", type=Path, help="a folder for what is mutated, which is made if it is not there")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file, to which records are added")
    settings = parser.parse_args()
    names = settings.only.split(",")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": f"{folder}/cache"}
        with atheris.instrument_imports(include=[f"ibprune.{name}" for name in READERS]):
            base = settings.prepared or Path(folder) / "base"
            if not base.exists():
                base.mkdir()
                prepare(base)
            import ibprune.cli  # noqa: F401
            import ibprune.hub_folders  # noqa: F401
            import ibprune.planning  # noqa: F401
        for name in names:
            seconds = settings.seconds * SHARES[name] / sum(SHARES[n] for n in names)
            record = {"seed": settings.seed} | fuzz(name, base, settings, seconds, Path(folder))
            print(name, json.dumps(record), flush=True)
            add(settings.output, name, record)


def add(output: Path, name: str, record: dict) -> None:
    """Puts a parser's record into the file, in the place of an older one."""
    records = json.loads(output.read_text())["parsers"] if output.exists() else {}
    records |= {name: record}
    result = {
        "limits": {"memory_bytes": MEMORY, "seconds_each": LONGEST},
        "executions": sum(record["executions"] for record in records.values()),
        "defects": sum(len(record["defects"]) for record in records.values()),
        "parsers": records,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
