"""What `ibprune plan --estimate` says of MiniLM on this CPU, beside real short runs: memory and time of each phase.

python scripts/estimate_check.py --output benchmarks/estimate_check.json

Each run is a process of its own; its resident memory is sampled every 5 ms. The rate is measured before and after it,
so that a machine with other work is seen.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

CASES = {
    "batches of 32 x 64": {"batch_size": 32, "max_length": 64},
    "the same, blocks run again": {"batch_size": 32, "max_length": 64, "gradient_checkpointing": True},
    "batches of 8 x 32": {"batch_size": 8, "max_length": 32},
}
STEPS = {"mask_steps": 10, "recover_steps": 10, "shares": "equal", "data": "prose", "precision": "fp32", "audit": False}


def measured(options: dict) -> dict:
    """Peak resident bytes and seconds of every phase of a run, and what the process took before it."""
    from ibprune import prune
    from ibprune.console import Quiet

    process, phases, current = psutil.Process(), {}, []

    def sample() -> None:
        while True:
            for name in current[-1:]:
                phases[name]["bytes"] = max(phases[name]["bytes"], process.memory_info().rss)
            time.sleep(0.005)

    class Clock(Quiet):
        def track(self, items: Iterable, what: str, total: int) -> Iterator:
            phases.setdefault(what, {"bytes": 0, "seconds": 0.0})
            current.append(what)
            start = time.perf_counter()
            yield from items
            phases[what]["seconds"] += time.perf_counter() - start
            current.pop()

    import ibprune.api  # noqa: F401  what a run imports is the process itself

    before = process.memory_info().rss
    threading.Thread(target=sample, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        prune("minilm", 0.3, output=str(Path(folder) / "small"), console=Clock(), **options)
    return {"process": before, "phases": phases}


def estimated(options: dict) -> dict:
    from ibprune import estimate

    return estimate("minilm", 0.3, **options)


def in_a_process(what: str, options: dict) -> dict:
    """Calls a function of this file in a process of its own."""
    command = [sys.executable, __file__, "--call", what, json.dumps(options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def compared(options: dict) -> list[dict]:
    first = in_a_process("estimated", options)
    run = in_a_process("measured", options)
    second = in_a_process("estimated", options)
    rates = [found["rate"]["flops_per_second"] for found in (first, second)]
    rows = []
    for phase in first["phases"]:
        seen = run["phases"][phase["phase"]]
        flops = phase["flops"] + phase["teacher_flops"]
        rows.append(
            {
                "phase": phase["phase"],
                "estimated_bytes": phase["total"] + run["process"],
                "measured_bytes": seen["bytes"],
                "estimated_seconds": 2 * flops / sum(rates),
                "measured_seconds": seen["seconds"],
                "rates": rates,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/estimate_check.json")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        name, options = arguments.call
        print(json.dumps({"measured": measured, "estimated": estimated}[name](json.loads(options))))
        return
    found = {}
    for name, options in CASES.items():
        found[name] = compared(options | STEPS)
        for row in found[name]:
            memory, seconds = (row[f"estimated_{what}"] / row[f"measured_{what}"] - 1 for what in ("bytes", "seconds"))
            print(
                f"{name} | {row['phase']} | {row['estimated_bytes'] / 1e9:.2f} | {row['measured_bytes'] / 1e9:.2f} | "
                f"{memory:+.0%} | {row['estimated_seconds']:.1f} | {row['measured_seconds']:.1f} | {seconds:+.0%}",
                flush=True,
            )
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    record = {"command": "python scripts/estimate_check.py", "model": "minilm", "threads": threads, "options": STEPS}
    Path(arguments.output).write_text(json.dumps(record | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
