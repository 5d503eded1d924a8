"""Time of the steps that touch structure only: the plan and compaction of BERT-base, sites and masks of LLaMA-2-7B.

python scripts/structure_speed.py --rounds 5
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
import transformers

import ibprune
from ibprune.embeddings import factorize_
from ibprune.inject import inject_, remove_
from ibprune.plans import PruningPlan
from ibprune.sites import find_sites
from ibprune.surgery import compact_


def measure(name: str, rounds: int, step: Callable, prepare: Callable = tuple) -> None:
    """Prints wall-clock and processor seconds of `step`, given what `prepare` makes anew for every round."""
    wall, processor = [], []
    for _ in range(rounds):
        arguments = prepare()
        started = time.perf_counter(), time.process_time()
        step(*arguments)
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    print(f"{name}: median {median(wall):.2f} s (processor {median(processor):.2f} s), least {min(wall):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    config = transformers.BertConfig(architectures=["BertForSequenceClassification"])
    measure("plan of BERT-base at 0.3, from its config", rounds, lambda: ibprune.plan(config, 0.3))
    bert = transformers.BertForSequenceClassification(config).eval()
    measure("factorising its embedding", rounds, factorize_, lambda: (copy.deepcopy(bert),))
    factorize_(bert)
    sites = find_sites(bert)
    n_units = {name: site.n_units for name, site in sites.items()}
    keep = {name: tuple(range(0, units, 2 if units > 1 else 1)) for name, units in n_units.items()}
    half = PruningPlan("bert", n_units, keep)
    measure("compaction to half of every kind", rounds, compact_, lambda: (copy.deepcopy(bert), half))

    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        )
    sites = find_sites(llama)
    measure("sites of LLaMA-2-7B on the meta device", rounds, lambda: find_sites(llama))
    measure("injecting its masks", rounds, lambda model: inject_(model, sites), lambda: (copy.deepcopy(llama),))
    measure("removing them", rounds, lambda masks: remove_(llama), lambda: (inject_(llama, sites),))


if __name__ == "__main__":
    main()
