"""The script that writes small models and splits of the data at hand: nothing is trained on what judges it."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA

from ibprune.data import load_data

ROOT = Path(__file__).parents[1]


@pytest.mark.data
def test_splits_are_apart_and_models_have_their_heads(tmp_path):
    main = runpy.run_path(str(ROOT / "scripts" / "small_models.py"))["main"]
    main([str(DATA), "--output", str(tmp_path)])
    stories = load_data(str(tmp_path / "data" / "stories"))
    test = (tmp_path / "data" / "stories" / "test.txt").read_text().split("<|endoftext|>")
    assert (len(stories.train), len(stories.held_out), len(test)) == (1917, 200, 200)
    seen = set(stories.train["text"])
    assert not seen & {*stories.held_out["text"], *(story.strip() for story in test)}
    train, judged = (np.load(tmp_path / "data" / "cifar10" / f"{name}.npz") for name in ("train", "test"))
    assert train["x_train"].shape == (24_000, 32, 32, 3) and train["x_val"].shape == (1000, 32, 32, 3)
    assert (
        len(train["y_train"]) == 24_000
        and judged["x_val"].shape == (1000, 32, 32, 3)
        and set(judged["y_val"]) == set(range(10))
    )
    assert not (train["x_train"][-1000:] == judged["x_val"]).all((1, 2, 3)).any()
    config = json.loads((tmp_path / "gpt2-untrained" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["vocab_size"] == 512
    assert (tmp_path / "gpt2-untrained" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "vit-untrained" / "config.json").read_text())["image_size"] == 32
