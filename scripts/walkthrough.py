"""Walks through ibprune as on a fresh machine and writes down commands and output: python scripts/walkthrough.py.

It installs this checkout into an environment of its own first; --installed takes the Python that runs it instead.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"
INSTALL = (
    f"pip install -q -c {ROOT}/constraints.txt torch",
    f"pip install -q -c {ROOT}/constraints.txt '{ROOT}[demo]'",
)
INDEX_WARNING = "WARNING: Location 'file:"  # of pip, on package folders that a machine's settings name and it lacks
LOAD = """python -c "
import ibprune
model = ibprune.load('smoke')
print(type(model).__name__, sum(p.numel() for p in model.parameters()), 'parameters')
\""""
STEPS = (
    ("What this machine has, and what will be slow.", "ibprune doctor"),
    ("What comes along to start from.", "ibprune recipes"),
    ("What budgets would leave of MiniLM, from its config alone.", "ibprune plan --model minilm --budget 0.1..0.9"),
    ("A whole run, as small as one can be: a sentence encoder cut to three quarters.", "ibprune --recipe smoke"),
    ("What it left: a folder that loads, with a page to look at.", "ls smoke"),
    ("The model in Python.", LOAD),
    ("The run in one line; several folders would stand side by side.", "ibprune compare smoke"),
    ("A mistake is one line that says what to do.", "ibprune --model minilm --budget 3"),
)
HEAD = """# A walk-through

Written by `python scripts/walkthrough.py{flags}`, which ran these commands in an empty folder, one after the other, on
{machine}. Nothing was downloaded{but}: the model and the texts come with `ibprune[demo]` and with
Python. Times are those of that machine, which had other work to do.
"""


def run(command: str, folder: Path, environment: dict[str, str]) -> tuple[str, float]:
    """What a command says on both streams, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)  # fmt: skip
    if done.returncode not in (0, 2):
        sys.exit(f"{command}: ended with {done.returncode}\n{done.stdout}")
    lines = done.stdout.splitlines()
    said = "\n".join(line for line in lines if not line.startswith(INDEX_WARNING))
    return said, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--installed", action="store_true", help="skip the installation")
    installed = parser.parse_args().installed
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "work")
        folder.mkdir()
        bin_folder, steps = Path(sys.executable).parent, list(STEPS)
        if not installed:
            venv.create(Path(scratch, "venv"), with_pip=True)
            bin_folder = Path(scratch, "venv", "bin")
            steps = [("Install.", command) for command in INSTALL] + steps
        environment = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        machine = f"{os.cpu_count()} CPU cores under {platform.system()}, Python {platform.python_version()}"
        but = "" if installed else " but the packages"
        parts = [HEAD.format(flags=" --installed" if installed else "", machine=machine, but=but)]
        for why, command in steps:
            said, seconds = run(command, folder, environment)
            said = said.replace(scratch, "~").rstrip()
            shown = command.replace(str(ROOT), "ibprune-checkout")
            parts.append(f"{why}\n\n```console\n$ {shown}\n{said}\n```\n\n({seconds:.0f} s)\n")
    partial = PAGE.with_name(f".{PAGE.name}.part")
    partial.write_text("\n".join(parts), encoding="utf-8")
    partial.replace(PAGE)


if __name__ == "__main__":
    main()
