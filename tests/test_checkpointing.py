"""Blocks that run again in the backward pass give the gradients of blocks that keep what they computed."""

import pytest
import torch
from cnn_models import build_net, pictures, save_pictures
from conftest import HEADS, TINY, build, inputs_of, random_keep
from transformers import ResNetForImageClassification

import ibprune
from ibprune.errors import BadRecipe
from ibprune.inject import inject_
from ibprune.plans import PruningPlan
from ibprune.sites import find_sites
from ibprune.surgery import compact_
from ibprune.trainer import checkpoint_blocks_

SAVES = [family for family in TINY if not family.startswith(("albert", "mpnet"))]  # transformers saves nothing there


def gradients(model, batch: dict) -> tuple[dict[str, torch.Tensor], int]:
    """Of every parameter, and how many modules ran."""
    runs, leaves = [], [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_pre_hook(lambda *_: runs.append(1)) for module in leaves]
    torch.manual_seed(5)  # for dropout
    outputs = model(**batch)
    first = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    first.float().square().mean().backward()
    for handle in handles:
        handle.remove()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, len(runs)


@pytest.mark.parametrize("family", SAVES)
@pytest.mark.parametrize("masked", [True, False])
def test_the_gradients_are_the_same_under_noise_and_when_cut(family, masked):
    model = build(family, HEADS[family][-1], dtype=torch.float32)
    sites = find_sites(model)
    keep = random_keep(sites, 0)
    if masked:
        masks = inject_(model, sites)
        masks.set_draw(1, 2, share=(0, 1))
    else:
        plan = PruningPlan(model.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)
        compact_(model, plan)
    batch = inputs_of(model)
    model.train()
    theirs, once = gradients(model, batch)
    checkpoint_blocks_(model)
    ours, twice = gradients(model, batch)
    assert ours.keys() == theirs.keys() and twice > once
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-7) for name in theirs)


def test_a_run_gives_the_same_plan_and_says_where_there_is_nothing_to_save(folders, reviews, tmp_path):
    values = dict(data=reviews, mask_steps=6, recover_steps=4, batch_size=16, max_length=16, seed=3, audit=False)
    model = folders["BertForSequenceClassification"]
    plain = ibprune.prune(model, 0.4, output=str(tmp_path / "plain"), **values)
    saving = ibprune.prune(model, 0.4, output=str(tmp_path / "saving"), gradient_checkpointing=True, **values)
    assert plain.plan == saving.plan
    ours, theirs = plain.model.state_dict(), saving.model.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.model.modules())
    config = build_net("hf_resnet").config
    config.num_labels = 2
    ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    save_pictures(tmp_path / "pictures" / "train", *pictures(16), ("down", "up"))
    save_pictures(tmp_path / "pictures" / "val", *pictures(8, seed=1), ("down", "up"))
    with pytest.raises(BadRecipe, match="transformers has none for 'resnet'"):
        ibprune.prune(str(tmp_path / "net"), 0.5, data=str(tmp_path / "pictures"), gradient_checkpointing=True,
                      output=str(tmp_path / "out"))  # fmt: skip
