"""Kills a run at random moments with SIGKILL, resumes it, and compares what it leaves with a run that nobody killed.

    python scripts/kill_and_resume.py --kills 20 --output kills.json

The model is a tiny BERT of random weights on made-up reviews: what is tried is the state of the run, not its quality.
Each run is a process forked from this one, so that a kill costs seconds. The moments are uniform over the time that
the whole run took. A run that was killed is resumed until it ends; `--again` is the chance that a resumed run is
killed once more. No audit, which keeps no state; the process that checks a folder is forked as in the tests, by
`tests/fresh.py`.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import fresh  # noqa: E402

WORDS = "the a film story actor plot good bad fine dull warm cold long short is was not very and but it".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def make_inputs(folder: Path) -> tuple[str, str]:
    """A saved model with its tokenizer, and a folder of labelled rows."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCAB), hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=20,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder / "model")  # fmt: skip
    rng, rows = random.Random(0), {"train": 160, "dev": 64}
    (folder / "data").mkdir()
    for split, count in rows.items():
        lines = ["sentence\tlabel"]
        for i in range(count):
            words = rng.sample([word for word in WORDS if word not in ("good", "fine", "warm")], 6)
            lines.append(" ".join(words + (["good"] if i % 2 else [])) + f"\t{i % 2}")
        (folder / "data" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return str(folder / "model"), str(folder / "data")


def prune(model: str, data: str, output: Path, steps: int, resume: bool) -> None:
    import ibprune  # not above: a process that is fresh imports this file, and must know nothing of ibprune
    from ibprune import folders

    fresh.inherit()
    folders.subprocess.run = fresh.run
    ibprune.prune(
        model, 0.4, data=data, output=str(output), finetune_steps=steps, mask_steps=steps, recover_steps=steps,
        batch_size=16, max_length=16, save_every=0.002, audit=False, resume=resume,
    )  # fmt: skip


def left_by(folder: Path) -> dict[str, str]:
    """Digests of the weights and the plan, and the metrics."""
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.safetensors", "plan.json")
    }
    return found | {"metrics": json.loads((folder / "report.json").read_text())["pruned"]["metrics"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed")
    parser.add_argument("--again", type=float, default=0.3, help="chance that a resumed run is killed once more")
    parser.add_argument("--steps", type=int, default=60, help="of each phase of training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    context, rng, trials = multiprocessing.get_context("fork"), random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model, data = make_inputs(place)
        fresh.start()
        importlib.import_module("ibprune.api")  # once, for all forks

        def start(output: Path, resume: bool) -> multiprocessing.Process:
            process = context.Process(target=prune, args=(model, data, output, arguments.steps, resume))
            process.start()
            return process

        began = time.monotonic()
        start(place / "whole", False).join()
        whole, took = left_by(place / "whole"), time.monotonic() - began
        for number in range(arguments.kills):
            output, kills, resume = place / f"run{number}", [], False
            while True:
                process = start(output, resume)
                if not kills or rng.random() < arguments.again:
                    moment = rng.uniform(0, took)
                    process.join(moment)
                    if process.is_alive():
                        state = sorted(
                            path.stem for path in output.with_name(f"{output.name}.partial").glob("*.safetensors")
                        )
                        os.kill(process.pid, signal.SIGKILL)
                        kills.append({"seconds": moment, "state": state})
                process.join()
                if process.exitcode == 0 or output.exists():
                    break
                resume = True
            same = left_by(output) == whole
            trials.append({"kills": kills, "exit": process.exitcode, "same": same,
                           "state left": output.with_name(f"{output.name}.partial").exists()})  # fmt: skip
            print(json.dumps(trials[-1]), flush=True)
            record = {"settings": {k: str(v) for k, v in vars(arguments).items()}, "seconds": took, "trials": trials}
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    kills, same = sum(len(trial["kills"]) for trial in trials), sum(trial["same"] for trial in trials)
    print(f"{kills} kills in {len(trials)} runs, {same} of them to the same bytes")


if __name__ == "__main__":
    main()
