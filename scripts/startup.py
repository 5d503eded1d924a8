"""How long commands take to start, in CPU seconds and as ratios of bare Python: python scripts/startup.py [ROUNDS]."""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = str(ROOT / "model_cards" / "minilm-0.3")
PYTHON = [sys.executable]
COMMANDS = {
    "bare Python": [*PYTHON, "-c", "pass"],
    "import ibprune": [*PYTHON, "-c", "import ibprune"],
    "ibprune --help": [*PYTHON, "-m", "ibprune", "--help"],
    "ibprune plan --help": [*PYTHON, "-m", "ibprune", "plan", "--help"],
    "ibprune recipes": [*PYTHON, "-m", "ibprune", "recipes"],
    "ibprune compare": [*PYTHON, "-m", "ibprune", "compare", FOLDER],
    "ibprune report": [*PYTHON, "-c", "import sys; from ibprune.report_page import page; from ibprune.report import "
                       f"read_report; from pathlib import Path; page(read_report(Path({FOLDER!r})), None, None)"],
}  # fmt: skip


def seconds(command: list[str]) -> float:
    """CPU seconds of a command: on a busy machine the clock says little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=False, capture_output=True, env=environment, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(rounds: int = 5) -> None:
    for command in COMMANDS.values():
        seconds(command)  # its files are in memory then, and its bytecode is written
    found = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            found[name].append(seconds(command))
    medians = {name: statistics.median(times) for name, times in found.items()}
    print("| command | CPU s | times bare Python |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| `{name}` | {value:.3f} | {value / medians['bare Python']:.1f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
