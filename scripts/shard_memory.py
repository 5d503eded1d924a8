"""The memory that `compact_checkpoint` takes: a random LLaMA of about a billion parameters in eight files, cut to half.

    python scripts/shard_memory.py --scratch /tmp/shards --output benchmarks/shard_memory.json

The peak is the resident memory of a process of its own, mapped pages of the files included, beyond what it held before
the cut and beyond the pruned model that it leaves. Nothing of the dense model is ever whole in memory, not even when it
is made.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from ibprune.costs import count_params, params_model
from ibprune.models import Source, build_model
from ibprune.plans import PruningPlan
from ibprune.report import versions
from ibprune.shards import AT_ONCE, INDEX, compact_checkpoint
from ibprune.sites import find_sites

FILES, SEED, SHARE = 8, 0, 0.5
CONFIG = transformers.LlamaConfig(
    hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
    vocab_size=32000, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip


def skeleton():
    return build_model(CONFIG, transformers.LlamaForCausalLM, device="meta")


def make(folder: Path) -> None:
    """Writes random weights, one file after the other."""
    folder.mkdir(parents=True)
    CONFIG.save_pretrained(folder)
    state, where, number, held = skeleton().to(torch.bfloat16).state_dict(), {}, 0, {}
    most = sum(tensor.nbytes for tensor in state.values()) / FILES
    torch.manual_seed(SEED)
    for i, (name, tensor) in enumerate(state.items()):
        held[name] = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-0.03, 0.03)
        if sum(t.nbytes for t in held.values()) >= most or i == len(state) - 1:
            file = f"model-{number + 1:05}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(held, file)
            number, held = number + 1, {}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def random_plan(model) -> tuple[PruningPlan, float]:
    """Random units of every kind, the same share of each, so that half of the parameters stays; and what stays."""
    sites, draw = find_sites(model), random.Random(SEED)
    cost, n_units = params_model(model, sites), {name: site.n_units for name, site in sites.items()}
    fixed = {name for name, site in sites.items() if site.kind in ("layers", "vocab")}
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        kept = {n: u if n in fixed else max(1, int(share * u)) for n, u in n_units.items()}
        low, high = (low, share) if cost(kept) > SHARE * cost.of_dense() else (share, high)
    kept = {n: u if n in fixed else max(1, int(low * u)) for n, u in n_units.items()}
    keep = {name: tuple(sorted(draw.sample(range(n_units[name]), count))) for name, count in kept.items()}
    return PruningPlan("llama", n_units, keep), cost(kept) / cost.of_dense()


def resident(key: str) -> int:
    """Bytes of this process by /proc: "VmRSS" now, "VmHWM" the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def cut(source: Path) -> dict:
    """Runs the cut in this process and says what it took."""
    transformers.logging.disable_progress_bar()
    model = skeleton()
    plan, share = random_plan(model)
    means = {name: torch.ones(units) for name, units in plan.n_units.items() if not name.endswith("vocab")}
    before, start = resident("VmRSS"), time.perf_counter()
    small = compact_checkpoint(Source(str(source), str(source)), model, plan, means=means)
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    files, result = [file.stat().st_size for file in source.glob("*.safetensors")], 4 * count_params(small)
    return {
        "dense_params": count_params(model), "pruned_params": count_params(small), "share": share, "files": len(files),
        "source_bytes": sum(files), "largest_file_bytes": max(files), "at_once_bytes": AT_ONCE,
        "pruned_bytes": result, "peak_bytes": peak, "beyond_pruned_bytes": peak - result,
        "beyond_pruned_per_largest_file": (peak - result) / max(files), "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="a new folder, which is removed")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    source = arguments.scratch / "dense"
    if arguments.measure:
        arguments.output.write_text(json.dumps(cut(source)))
        return
    make(source)
    result = arguments.scratch / "result.json"
    command = [sys.executable, __file__, "--scratch", str(arguments.scratch), "--output", str(result), "--measure"]
    subprocess.run(command, check=True)
    found = json.loads(result.read_text()) | {"seed": SEED, "versions": versions()}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(arguments.scratch)


if __name__ == "__main__":
    main()
