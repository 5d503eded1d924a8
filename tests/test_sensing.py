"""What closing a part of one place costs: nothing where the part does nothing, and what a plan says that it saves."""

import json

import pytest
import torch
from cnn_models import pictures, save_pictures
from test_cnn_pipeline import NAMES, save_net
from transformers import AutoModelForSequenceClassification

import ibprune
from ibprune import cli
from ibprune.errors import BadRecipe

QUICK = dict(max_length=16, batch_size=16, score="fisher")


@pytest.fixture(scope="module")
def half_dead(folders, tmp_path_factory, tokenizer) -> str:
    """A classifier in whose first block every second FFN unit is read by nothing."""
    model = AutoModelForSequenceClassification.from_pretrained(folders["BertForSequenceClassification"])
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0
    folder = tmp_path_factory.mktemp("half") / "dead"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_what_does_nothing_costs_nothing_and_saves_what_a_plan_says(half_dead, reviews):
    found = ibprune.sensitivity(half_dead, data=reviews, kinds="heads,ffn,layers", **QUICK)
    rows = {row["site"]: row for row in found["sites"]}
    assert len(rows) == 3 * 4 and found["loss"] > 0 and found["sequences"] == 128 and found["score"] == "fisher"
    dead = rows["encoder.layer.0.ffn"]
    assert dead["closed"] == dead["units"] // 2
    others = [row["rise"] for name, row in rows.items() if name != "encoder.layer.0.ffn"]
    assert abs(dead["rise"]) < 1e-6 < min(map(abs, others))
    assert {row["closed"] for row in rows.values() if row["kind"] == "layers"} == {1}  # whole, or not at all
    groups, dense = (ibprune.plan(half_dead, kinds=("heads", "ffn", "layers"))[key] for key in ("groups", "dense"))
    for row in rows.values():
        if row["kind"] != "layers":  # both kinds of sub-layers are one kind there
            assert row["saves"] == pytest.approx(row["closed"] * groups[row["kind"]]["cost_per_unit"] / dense["params"])
    more = ibprune.sensitivity(half_dead, share=1.0, data=reviews, kinds="ffn", **QUICK)["sites"]
    assert [row["closed"] for row in more] == [row["units"] - 1 for row in more]  # one stays in each
    assert more[0]["rise"] != 0


def test_an_encoder_without_a_head_is_compared_with_itself_and_a_cnn_is_closed_by_channels(folders, stories, tmp_path):
    found = ibprune.sensitivity(folders["BertModel"], data=stories, kinds="ffn", **QUICK)
    assert found["objective"] == "encoder" and found["loss"] == pytest.approx(0, abs=1e-4)
    assert all(row["rise"] > 1e-4 for row in found["sites"])
    dense, data = save_net("hf_resnet", tmp_path / "dense"), str(tmp_path / "pictures")
    for split in ("train", "val"):
        save_pictures(tmp_path / "pictures" / split, *pictures(32), NAMES)
    found = ibprune.sensitivity(dense, share=0.25, data=data, cost="macs", image_size=32, batch_size=16)
    assert found["cost"] == "macs" and {row["kind"] for row in found["sites"]} == {"channels"}
    assert all(row["closed"] == max(1, round(row["units"] / 4)) and row["saves"] > 0 for row in found["sites"])


def test_a_plan_shows_it_behind_its_flag(half_dead, reviews, capsys):
    words = ["plan", "--model", half_dead, "--kinds", "ffn", "--data", reviews, "--max-length", "16"]
    assert cli.main([*words, "--sensitivity", "0.25", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sensitivity"]["share"] == 0.25 and said["sensitivity"]["score"] == "fisher"  # what vib starts from
    assert said["dense"]["params"] > 0
    assert cli.main([*words, "--sensitivity"]) == 0
    shown = capsys.readouterr().out
    assert "closing 50% of one place's units alone, those that fisher ranks last" in shown
    assert "encoder.layer.1.ffn" in shown and "nothing was trained" in shown


@pytest.mark.parametrize(
    "words,expected",
    [
        ("--data {reviews}", "expected --sensitivity beside --data"),
        ("--estimate --data {reviews}", "expected --sensitivity beside --data"),
        ("--sensitivity --recover-steps 3", "expected --estimate beside --recover-steps"),
        ("--sensitivity 1.5 --data {reviews}", "--sensitivity: expected a share in (0, 1], found 1.5"),
        ("--sensitivity half", "argument --sensitivity: invalid float value: 'half'"),
        ("--sensitivity --data nowhere.tsv", "nowhere.tsv"),
    ],
)
def test_what_it_cannot_do_is_one_line(words, expected, half_dead, reviews, capsys):
    assert cli.main(["plan", "--model", half_dead, *words.format(reviews=reviews).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_head_that_was_never_trained_is_refused(folders, reviews):
    with pytest.raises(BadRecipe, match="is new, and a loss of random outputs"):
        ibprune.sensitivity(folders["BertModel"], data=reviews, **QUICK)
    with pytest.raises(BadRecipe, match="leave --cost out"):
        ibprune.sensitivity(folders["BertModel"], cost="latency")
