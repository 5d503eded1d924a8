"""How the time of a step grows with parameters, tokens and processes, on random LLaMAs, for docs/scaling.md.

    python scripts/scaling.py --output benchmarks/scaling.json

A step of training the weights, one of learning masks with them (both without distillation) and one batch of scoring
(Fisher) take turns, so that other work on the machine meets them alike. Two processes divide the same batch, by DDP.
At first two processes hold a model in halves by torch's `fully_shard` (FSDP2), while its masks are whole in both: their
losses stand beside those of one process. What the output has already is not measured again.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from ibprune.budget import make_budget, solve_by_shares
from ibprune.console import Quiet
from ibprune.costs import count_params
from ibprune.distillation import loss_with
from ibprune.engine import make_accelerator
from ibprune.inject import inject_
from ibprune.losses import Objective
from ibprune.processes import n_processes, process_index
from ibprune.report import versions
from ibprune.scores import fisher_scores
from ibprune.shares import equal_pressure
from ibprune.sites import find_sites
from ibprune.structure import choose_kinds, prepare_
from ibprune.trainer import TrainSettings, train
from ibprune.vib import learn_masks

VOCAB, ROWS, STEPS, SEED = 1024, 8, 4, 0
SIZES = ((128, 4), (256, 4), (256, 8), (384, 8))  # width and blocks
LENGTHS = (16, 256)  # tokens of a row, of the second size, beside 64


def llama(width: int, blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 32, num_key_value_heads=width // 64,
        intermediate_size=11 * width // 4, vocab_size=VOCAB,
    ))  # fmt: skip


def batches(length: int, seed: int):
    """Random tokens, without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(0, VOCAB, (ROWS, length), generator=draw)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def step_times(width: int, blocks: int, length: int, rounds: int) -> dict:
    """Seconds of the steps of each kind, in this process and those beside it."""
    accelerator, objective = make_accelerator("fp32"), Objective("causal_lm")
    dense = llama(width, blocks)
    student = copy.deepcopy(dense)
    structure = prepare_(student, choose_kinds(student, ()), None)
    sites, costs = structure.sites, structure.costs
    budget = make_budget(costs.params, sites, keep=0.5, scope="model", round_to=1)
    scores = {name: torch.rand(site.n_units) for name, site in sites.items()}
    target = solve_by_shares(scores, sites, costs.params, budget, equal_pressure(sites))
    masks = inject_(student, sites)
    stamps: list[float] = []
    plain = loss_with(objective, None, accelerator)

    def loss_of(model, batch):
        stamps.append(time.perf_counter())
        return plain(model, batch)

    def make(seed: int):
        return batches(length, seed)

    settings = TrainSettings(steps=STEPS, lr=1e-6)
    found: dict[str, list[float]] = {"weights": [], "masks": [], "scoring": []}
    for _ in range(rounds):
        stamps.clear()
        train(dense, loss_of, make, settings, accelerator=accelerator, phase="weights", console=Quiet())
        found["weights"] += [b - a for a, b in zip(stamps[1:], stamps[2:])]  # the first step warms up
        stamps.clear()
        learn_masks(student, masks, sites, costs.params, budget, scores, target, loss_of, make, settings,
                    accelerator=accelerator, console=Quiet())  # fmt: skip
        found["masks"] += [b - a for a, b in zip(stamps[1:], stamps[2:])]
        if n_processes() == 1:  # the main process scores
            few = [batch for batch, _ in zip(make(SEED), range(2))]
            masks.set_keep({name: tuple(range(site.n_units)) for name, site in sites.items()})
            masks.set_noise(0.0, sites=list(sites))
            student.eval()
            start = time.perf_counter()
            fisher_scores(student, masks, few, objective, seed=SEED, total=2, console=Quiet())
            found["scoring"].append((time.perf_counter() - start) / len(few))
    params = count_params(dense)
    record = {"width": width, "blocks": blocks, "params": params, "tokens": ROWS * length, "processes": n_processes(),
              "masks_per_weights": median(found["masks"]) / median(found["weights"])}  # fmt: skip
    for kind, times in found.items():
        if times:
            low, middle, high = quantiles(times, n=4)
            record[kind] = {"median_s": middle, "quartiles_s": [low, high], "n": len(times)}
    return record


def sharded_losses(whole: bool) -> list[float]:
    """Losses of five steps with masks and their noise: of one process, or of two that hold a half each."""
    model = llama(64, 2).train()
    masks = inject_(model, find_sites(model))
    own = list(masks.parameters())
    if not whole:
        mesh = dist.init_device_mesh("cpu", (n_processes(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, ignored_params=set(own))
        fully_shard(model, mesh=mesh, ignored_params=set(own))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step, batch in zip(range(5), batches(16, SEED)):
        n, index = (1, 0) if whole else (n_processes(), process_index())
        masks.set_draw(SEED, step, share=(index, n))
        ids = batch["input_ids"].chunk(n)[index]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        value = loss.detach() / n
        if not whole:
            for parameter in own:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(n))
            dist.all_reduce(value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def in_processes(n: int, case: dict) -> dict:
    """What a case gives in n processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__]
    done = subprocess.run([*command, "--case", json.dumps(case)], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # in processes of their own
    arguments = parser.parse_args()
    if arguments.case is not None:
        if "sharded" in arguments.case:
            make_accelerator("fp32")
            found = {"whole": sharded_losses(True), "sharded": sharded_losses(False)}
        else:
            found = step_times(**arguments.case)
        if not process_index():
            print(json.dumps(found))
        dist.destroy_process_group() if n_processes() > 1 else None
        return
    wanted = [{"width": w, "blocks": b, "length": 64, "processes": 1} for w, b in SIZES]
    wanted += [wanted[1] | {"length": length} for length in LENGTHS] + [wanted[1] | {"processes": 2}]
    record = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"cases": []}
    record["sharded"] = record.get("sharded") or in_processes(2, {"sharded": True})
    for case in wanted:
        if all(case != {key: found[key] for key in case} for found in record["cases"]):
            n = case["processes"]
            asked = {key: value for key, value in case.items() if key != "processes"} | {"rounds": arguments.rounds}
            record["cases"].append(in_processes(n, asked) | case)
            arguments.output.write_text(json.dumps(record | {"versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
