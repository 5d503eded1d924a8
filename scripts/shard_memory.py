"""The memory that `compact_checkpoint` takes: a random LLaMA of about a billion parameters in eight files, cut to half.

    python scripts/shard_memory.py --scratch /tmp/shards --output benchmarks/shard_memory.json

A process of its own cuts it and writes the folder, under a limit that the system enforces (RLIMIT_DATA, as by
`ulimit -d`): the pruned model, 1.3 of the largest file, and `CONSTANT`, beyond what the process held before. Mapped
files count in full there, read or not. The peak is its resident memory, mapped pages of the files included, beyond what
it held before and beyond the pruned model. Then another gets `TOO_LITTLE` of the largest file instead, which has to end
in a line. Nothing of the dense model is ever whole in memory, not even when it is made.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from ibprune.costs import count_params, params_model
from ibprune.errors import first_line, is_out_of_memory
from ibprune.folders import staged, write_model
from ibprune.models import Source, build_model
from ibprune.plans import PruningPlan
from ibprune.report import versions
from ibprune.shards import AT_ONCE, INDEX, compact_checkpoint
from ibprune.sites import find_sites

FILES, SEED, SHARE = 8, 0, 0.5
MOST, TOO_LITTLE = 1.3, 0.5  # of the largest file, beside the pruned model
CONSTANT = 64 * 2**20  # bytes: stacks of the threads that read, and what the allocator rounds up
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


def memory(key: str) -> int:
    """Bytes of this process by /proc: "VmRSS" is resident now, "VmHWM" was at most, "VmData" counts for a limit."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def cut(source: Path, output: Path, share_of_file: float) -> dict:
    """Runs the cut in this process, under a limit, and says what it took."""
    transformers.logging.disable_progress_bar()
    model = skeleton()
    plan, share = random_plan(model)
    means = {name: torch.ones(units) for name, units in plan.n_units.items() if not name.endswith("vocab")}
    files = [file.stat().st_size for file in source.glob("*.safetensors")]
    result = 4 * int(share * count_params(model))
    more = result + int(share_of_file * max(files)) + CONSTANT
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + more, resource.RLIM_INFINITY))
    before, start = memory("VmRSS"), time.perf_counter()
    small = compact_checkpoint(Source(str(source), str(source)), model, plan, means=means)
    seconds, peak, result = time.perf_counter() - start, memory("VmHWM") - before, 4 * count_params(small)
    with staged(output) as temporary:
        write_model(small.to(torch.bfloat16), None, plan, temporary)
    return {
        "dense_params": count_params(model), "pruned_params": count_params(small), "share": share, "files": len(files),
        "source_bytes": sum(files), "largest_file_bytes": max(files), "at_once_bytes": AT_ONCE,
        "limit_beyond_start_bytes": more, "constant_bytes": CONSTANT,
        "pruned_bytes": result, "peak_bytes": peak, "beyond_pruned_bytes": peak - result,
        "beyond_pruned_per_largest_file": (peak - result) / max(files), "seconds": round(seconds, 1),
        "written_bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
        "peak_with_writing_bytes": memory("VmHWM") - before,
    }  # fmt: skip


def in_its_own_process(scratch: Path, share_of_file: float) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, "--scratch", str(scratch), "--measure", str(share_of_file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="a new folder, which is removed")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    source, output = arguments.scratch / "dense", arguments.scratch / "pruned"
    if arguments.measure is not None:
        try:
            print(json.dumps(cut(source, output, arguments.measure)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sys.stderr.write(first_line(error))
            sys.exit(2)
        return
    make(source)
    enough = in_its_own_process(arguments.scratch, MOST)
    assert enough.returncode == 0 and (output / "model.safetensors").exists(), enough.stderr
    shutil.rmtree(output)
    short = in_its_own_process(arguments.scratch, TOO_LITTLE)
    left = sorted(path.name for path in arguments.scratch.iterdir())
    record = {"exit": short.returncode, "said": short.stderr, "left": left}
    found = json.loads(enough.stdout) | {
        "under_too_little": {"share_of_largest_file": TOO_LITTLE} | record, "seed": SEED, "versions": versions()
    }  # fmt: skip
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(arguments.scratch)


if __name__ == "__main__":
    main()
