"""Training a dense model for its own sake: from a config alone, from a checkpoint, and its errors."""

import json

import pytest
import transformers
from conftest import TINY

import ibprune
from ibprune import cli
from ibprune.errors import BadRecipe, PlanMismatch

QUICK = dict(batch_size=16, max_length=16, lr=3e-3)


def test_a_text_model_is_trained_from_its_config_and_then_further(tokenizer, reviews, tmp_path, capsys):
    config = TINY["bert"]()
    config.num_labels = 5  # a config without weights has no classes of its own
    config.save_pretrained(tmp_path / "config")
    tokenizer.save_pretrained(tmp_path / "config")
    report = ibprune.train(
        tmp_path / "config", data=reviews, output=str(tmp_path / "dense"), finetune_steps=100, **QUICK
    )
    assert report["metrics"]["after"]["accuracy"] > 0.8 and report["pictures"] is None
    assert report == json.loads((tmp_path / "dense" / "report.json").read_text())
    assert {path.name for path in (tmp_path / "dense").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    loaded, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert loaded.config.id2label == {0: "0", 1: "1"} and not any(info.values())
    flags = ["train", "--model", str(tmp_path / "dense"), "--data", reviews, "--batch-size", "16", "--quiet"]
    assert cli.main([*flags, "--output", str(tmp_path / "further"), "--json"]) == 0
    further = json.loads(capsys.readouterr().out)
    assert further["metrics"]["before"] == report["metrics"]["after"] and further["steps"] == 10  # an epoch
    assert further["verify"]["tier"] == "vanilla" and further["verify"]["max_abs_diff"] <= 1e-5


def test_what_cannot_be_trained(tokenizer, reviews, folders, tmp_path):
    TINY["bert"]().save_pretrained(tmp_path / "config")
    with pytest.raises(BadRecipe, match="expected --model"):
        ibprune.train(data=reviews)
    with pytest.raises(BadRecipe, match="expected a tokenizer"):
        ibprune.train(tmp_path / "config", data=reviews, output=str(tmp_path / "out"))
    tokenizer.save_pretrained(tmp_path / "config")
    with pytest.raises(BadRecipe, match="`ibprune train` makes them"):
        ibprune.prune(tmp_path / "config", 0.5, data=reviews, output=str(tmp_path / "out"))
    with pytest.raises(BadRecipe, match="--image-size: the model reads text"):
        ibprune.train(folders["BertModel"], data=reviews, image_size=8, output=str(tmp_path / "out"))
    with pytest.raises(BadRecipe, match="outside the model's folder"):
        ibprune.train(folders["BertModel"], data=reviews, output=folders["BertModel"] + "/out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlanMismatch, match="found none"):
        ibprune.load(tmp_path / "out")


def test_an_encoder_without_a_head_cannot_be_trained_without_a_teacher(folders, stories, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out"), "--quiet"]
    for flags, message in (
        (["train"], "an encoder without a head has nothing to be"),
        (["--budget", "0.5", "--no-distill"], "leave --no-distill out"),
    ):
        assert cli.main([*flags, "--model", folders["BertModel"], "--data", stories, *output]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
