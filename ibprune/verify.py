"""Run in a fresh process by the exporter: loads a folder in every way it claims and prints the differences."""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from ibprune.folders import probe_outputs
from ibprune.loading import check_loaded, load


def main(folder: str, probe: str, auto: str, tier: str) -> dict[str, float]:
    """Largest absolute difference of the outputs to the expected ones, by way of loading."""
    tokens = json.loads(Path(probe).with_suffix(".json").read_text())
    if tokens["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if tokenizer(tokens["texts"], verbose=False)["input_ids"] != tokens["input_ids"]:
            raise SystemExit("expected the tokenizer in the folder to make the tokens it was saved with, found others")
    inputs = load_file(probe)
    expected = inputs.pop("expected")
    theirs, info = getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=tier == "remote_code", dtype="auto", output_loading_info=True
    )
    check_loaded(info, folder)
    found = {}
    for way, model in (("transformers", theirs), ("ibprune", load(folder))):
        outputs = probe_outputs(model, inputs)
        if outputs.shape != expected.shape:
            raise SystemExit(f"{way}: expected outputs {tuple(expected.shape)}, found {tuple(outputs.shape)}")
        found[way] = float((outputs - expected).abs().max())
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
