"""How much memory a long run holds while it goes on: resident bytes, Python objects and open files by step.

    python scripts/long_run.py --steps 2000 --output benchmarks/long_run.json

prunes a tiny BERT of random weights on made-up reviews, a quarter of the steps training the dense model, half of them
learning masks, a quarter recovering, and looks every fifth of each phase. Within a phase nothing may grow; between
phases models come and go.
"""

import argparse
import gc
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from kill_and_resume import make_inputs

import ibprune
from ibprune.console import Quiet
from ibprune.report import versions

LOOKS = 5  # at each phase
ALLOWED_MB = 8.0  # that a phase may hold more at its end than after its first fifth


class Watching(Quiet):
    """Notes what the process holds while steps are made."""

    def __init__(self):
        self.seen: list[dict] = []
        self.process = psutil.Process()

    def track(self, items: Iterable, what: str, total: int) -> Iterator:
        for done, item in enumerate(items, 1):
            yield item
            if total >= 100 and done % (total // LOOKS) == 0:
                gc.collect()
                held = {
                    "resident_mb": round(self.process.memory_info().rss / 2**20, 1),
                    "objects": len(gc.get_objects()),
                    "files": len(self.process.open_files()),
                    "threads": self.process.num_threads(),
                }
                self.seen.append({"phase": what, "step": done} | held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/long_run.json"))
    args = parser.parse_args()
    logging.disable(logging.INFO)
    console, quarter = Watching(), args.steps // 4
    with tempfile.TemporaryDirectory() as folder:
        model, data = make_inputs(Path(folder))
        ibprune.prune(
            model, 0.4, data=data, output=str(Path(folder) / "out"), console=console, finetune_steps=quarter,
            mask_steps=2 * quarter, recover_steps=quarter, probe_steps=0, batch_size=8, max_length=12, audit=False,
        )  # fmt: skip
    phases = {}
    for each in console.seen:
        phases.setdefault(each["phase"], []).append(each)
    grown = {
        name: {key: round(looks[-1][key] - looks[0][key], 1) for key in ("resident_mb", "objects", "files", "threads")}
        for name, looks in phases.items()
    }
    args.output.write_text(
        json.dumps({"steps": args.steps, "grown": grown, "seen": console.seen, "versions": versions()}, indent=1) + "\n"
    )
    print(json.dumps(grown, indent=1))
    return int(any(each["resident_mb"] > ALLOWED_MB or each["files"] > 0 for each in grown.values()))


if __name__ == "__main__":
    raise SystemExit(main())
