"""Folders across versions of transformers: written with one, loaded with another, by their own code and without it.

    IBPRUNE_OTHER_PYTHON=/path/to/other/bin/python python -m pytest tests/test_versions.py

The other interpreter needs ibprune's requirements and pytest, with another version of transformers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cnn_models import build_net
from conftest import inputs_of, random_keep
from safetensors.torch import save_file
from test_folders import pruned

from ibprune.channels import find_channels
from ibprune.folders import write_model
from ibprune.plans import PruningPlan
from ibprune.surgery import compact_traced_
from ibprune.task_heads import auto_class
from ibprune.verify import main as differences

OTHER = os.environ.get("IBPRUNE_OTHER_PYTHON", "")
CASES = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama-tied": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "hf_resnet": "ResNetForImageClassification",
}


def halved():
    """A ResNet with every other of its channels, and the plan."""
    model = build_net("hf_resnet", dtype=torch.float32)
    sites = find_channels(model, torch.zeros(2, 3, 32, 32)).sites
    units = {name: site.n_units for name, site in sites.items()}
    plan = PruningPlan(model.config.model_type, units, {name: tuple(range(0, n, 2)) for name, n in units.items()})
    return compact_traced_(model, sites, plan).eval(), plan


def write(root: Path) -> None:
    """A folder per case, with what its model makes of some inputs beside it."""
    for family, head in CASES.items():
        model, plan = halved() if family == "hf_resnet" else pruned(family, head, lambda sites: random_keep(sites, 5))
        (root / family).mkdir(parents=True)
        assert write_model(model, None, plan, root / family) == "remote_code"
        inputs = {"pixel_values": torch.ones(2, 3, 32, 32)} if family == "hf_resnet" else inputs_of(model)
        with torch.no_grad():
            expected = model(**inputs)[0]
        save_file({**inputs, "expected": expected}, root / f"{family}.safetensors")
        (root / f"{family}.json").write_text(json.dumps({"texts": []}))


def check(root: Path) -> dict[str, dict[str, float]]:
    """Largest differences of what is loaded, by case and way."""
    found = {}
    for family, head in CASES.items():
        auto = auto_class(head, family.partition("-")[0].removeprefix("hf_"))
        found[family] = differences(str(root / family), str(root / f"{family}.safetensors"), auto, "remote_code")
    return found


def by_the_other(verb: str, root: Path) -> dict:
    """The same in the other interpreter: its version of transformers and what it found."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    run = subprocess.run(
        [OTHER, __file__, verb, str(root)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(not OTHER, reason="IBPRUNE_OTHER_PYTHON names no second environment")
@pytest.mark.parametrize("written", ["here", "there"])
def test_folders_load_with_the_other_version(written, tmp_path):
    if written == "here":
        write(tmp_path)
        found = by_the_other("check", tmp_path)
    else:
        found = by_the_other("write", tmp_path) | {"found": check(tmp_path)}
    assert found["transformers"] != transformers.__version__, "expected another version than the one here"
    assert set(found["found"]) == set(CASES)
    worst = max(value for ways in found["found"].values() for value in ways.values())
    assert worst <= 1e-5, found


def main(verb: str, root: str) -> None:
    done = {"write": write, "check": check}[verb](Path(root))
    sys.stdout.write("\n" + json.dumps({"transformers": transformers.__version__, "found": done}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
