"""The most memory that a run takes with and without --streaming, on files of two sizes.

    python scripts/streaming_memory.py --scratch /tmp/streaming

writes jsonl files of made-up words into the scratch folder, trains a tiny decoder for a few steps on each, in a process
of its own, and keeps the peak of its resident memory in benchmarks/streaming_memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ibprune.report import versions

ROOT = Path(__file__).parents[1]
SIZES = (20, 80)  # MB
RUNS = {"in memory": (), "streaming": ("--streaming",)}
STEPS = ("--finetune-steps", "3", "--batch-size", "16", "--max-length", "128", "--precision", "fp32", "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the files")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "streaming_memory.json")
    arguments = parser.parse_args()
    scratch = arguments.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    words = [f"w{i}" for i in range(2000)]
    write_model(scratch / "model", words)
    found = {"steps": " ".join(STEPS), "runs": [], "versions": versions()}
    for size in SIZES:
        file = scratch / f"{size}.jsonl"
        rows = write_rows(file, words, size)
        for name, flags in RUNS.items():
            run = {"data_mb": size, "rows": rows, "run": name} | peak(scratch, file, flags, name)
            found["runs"].append(run)
            sys.stdout.write(f"{run}\n")
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def write_model(folder: Path, words: list[str]) -> None:
    """A decoder without weights, and a tokenizer of whole words."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


def write_rows(file: Path, words: list[str], size: int) -> int:
    """So many MB of texts of 20 to 400 words; returns how many."""
    rng, rows, written = np.random.default_rng(0), 0, 0
    with file.open("w") as lines:
        while written < size * 1_000_000:
            text = " ".join(words[i] for i in rng.integers(len(words), size=rng.integers(20, 400)))
            written += lines.write(json.dumps({"text": text}) + "\n")
            rows += 1
    return rows


def peak(scratch: Path, file: Path, flags: tuple[str, ...], name: str) -> dict[str, float]:
    """Resident memory at its most and seconds of one run, without what datasets kept of an earlier one."""
    label = f"{file.stem}-{name.replace(' ', '-')}"
    command = [sys.executable, "-m", "ibprune", "train", "--model", str(scratch / "model"), "--data", str(file)]
    env = os.environ | {"HF_HOME": str(scratch / "cache" / label), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    process = subprocess.Popen([*command, *STEPS, *flags, "--output", str(scratch / "out" / label)], env=env)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"'{name}' ended with {os.waitstatus_to_exitcode(status)}")
    return {"peak_mb": round(usage.ru_maxrss / 1024, 1), "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
