"""Modes: a few rows of every class, masks alone, and what the report says of it."""

import pytest
import torch
from datasets import Dataset

import ibprune
from ibprune.cutting import mask_and_recovery, phases
from ibprune.errors import BadRecipe
from ibprune.losses import Objective
from ibprune.recipe import make_recipe
from ibprune.thinning import LEAST, SHARE, thin
from ibprune.trainer import TrainSettings

SHORT = dict(mask_steps=6, batch_size=16, max_length=16, audit=False, shares="equal")


def test_every_class_keeps_its_share_of_the_rows():
    labels = [0] * 30_000 + [1] * 9_990 + [2] * 10
    rows = Dataset.from_dict({"row": list(range(len(labels))), "label": labels})
    few = thin(rows, labels, seed=0)
    assert [few["label"][:].count(label) for label in (0, 1, 2)] == [900, 300, 1]
    assert few["row"][:] == sorted(few["row"])
    assert few["row"][:] == thin(rows, labels, seed=0)["row"][:] != thin(rows, labels, seed=1)["row"][:]


@pytest.mark.parametrize("n,expected", [(100, 100), (LEAST, LEAST), (5_000, LEAST), (50_000, int(SHARE * 50_000))])
def test_there_are_never_too_few(n, expected):
    rows = Dataset.from_dict({"row": list(range(n))})
    assert len(thin(rows, None, seed=0)) == expected


@pytest.mark.parametrize("mode", ["fast", "faster"])
def test_a_run_in_each_mode(mode, folders, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr("ibprune.thinning.LEAST", 32)
    out = tmp_path / "out"
    model = folders["BertForSequenceClassification"]
    result = ibprune.prune(model, 0.6, data=reviews, mode=mode, output=str(out), kinds="heads,ffn", **SHORT,
                           **({} if mode == "faster" else {"recover_steps": 2}))  # fmt: skip
    assert result.report["budget"]["achieved"] <= result.report["budget"]["limit"]
    assert f"--mode {mode}" in result.report["command"]
    dense = ibprune.models.load_dense(ibprune.models.find_source(model)).model
    same = torch.equal(
        dense.bert.embeddings.word_embeddings.weight, result.model.bert.embeddings.word_embeddings.weight
    )
    assert same == (mode == "faster")  # which trains the masks alone, and does not recover unless told to


def test_masks_learned_alone_can_be_refitted(folders, reviews, tmp_path, monkeypatch):
    """Of weights that stayed as they were, those that read cut units are refitted; the units are the same."""
    monkeypatch.setattr("ibprune.thinning.LEAST", 32)
    common = dict(
        model=folders["BertForSequenceClassification"], data=reviews, mode="faster", kinds="heads,ffn", **SHORT
    )
    common |= dict(budget=0.6, shares="equal")
    plain = ibprune.prune(**common, output=tmp_path / "plain")
    refitted = ibprune.prune(**common, reconstruct=True, output=tmp_path / "refitted")
    assert plain.plan == refitted.plan and "--reconstruct" in refitted.report["command"]
    before, after = plain.model.state_dict(), refitted.model.state_dict()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ and all("output.dense" in name for name in differ)


def test_what_has_nothing_left_to_train_is_refused(folders):
    with pytest.raises(BadRecipe, match="gradual trains the weights alone"):
        ibprune.prune(folders["BertModel"], 0.5, mode="faster", score="gradual")


def test_an_unknown_mode_is_refused(folders):
    with pytest.raises(BadRecipe, match="did you mean 'faster'"):
        ibprune.prune(folders["BertModel"], 0.5, mode="fastre")


def test_masks_and_recovery_share_a_schedule_only_where_the_weights_learn_in_both():
    common = TrainSettings(steps=0, lr=1.0, seed=3)
    masks, recovery = mask_and_recovery(common, "vib", 40, 60)
    assert (masks.steps, masks.before, masks.after) == (40, 0, 60)
    assert (recovery.steps, recovery.before, recovery.after) == (60, 40, 0) and recovery.seed != masks.seed
    for score, mask_steps, apart in (("fisher", 40, False), ("vib", 40, True), ("vib", 0, False)):
        masks, recovery = mask_and_recovery(common, score, mask_steps, 60, apart=apart)
        assert recovery == TrainSettings(steps=60, lr=1.0, seed=3)
        assert masks.after == (60 if score == "vib" and not apart else 0)
    recipe = make_recipe({"model": "m", "budget": 0.5, "mask_steps": 40, "recover_steps": 60, "lr": 1.0})
    assert phases(recipe, Objective("classification"))[1].before == 40
    assert phases(recipe, Objective("encoder"))[1].before == 0
