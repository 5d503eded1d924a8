"""Checkpoints cut a few tensors at a time: the same tensors as from the whole model, and what is refused."""

import math

import pytest
import torch
import transformers
from conftest import build, outputs, random_keep
from safetensors.torch import load_file, save_file

from ibprune import shards
from ibprune.errors import BadRecipe, IBPruneError, PlanMismatch
from ibprune.inject import inject_
from ibprune.models import Source
from ibprune.plans import PruningPlan
from ibprune.quantised import whole_skeleton
from ibprune.shards import INDEX, compact_checkpoint
from ibprune.sites import find_sites
from ibprune.surgery import compact_


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    """As little as the tiny models are small, so that there are several batches."""
    monkeypatch.setattr(shards, "AT_ONCE", 32_000)


def saved(folder, family, head, dtype=torch.float32):
    """A dense checkpoint of several files, read back, and a plan for it."""
    build(family, head, dtype=dtype).save_pretrained(folder, max_shard_size="16KB")
    model = getattr(transformers, head).from_pretrained(folder, dtype=torch.float32)
    sites = find_sites(model)
    n_units = {name: site.n_units for name, site in sites.items()}
    keep = {name: units for name, units in random_keep(sites, 5).items() if not name.endswith("embedding_rank")}
    return model, PruningPlan(model.config.model_type, {name: n_units[name] for name in keep}, keep)


@pytest.mark.parametrize("family,head,dtype", [
    ("bert", "BertForSequenceClassification", torch.float32),
    ("llama-tied", "LlamaForCausalLM", torch.bfloat16),
    ("gpt2", "GPT2LMHeadModel", torch.float32),
    ("mixtral", "MixtralForCausalLM", torch.float32),  # experts are stacked as they are read
    ("gemma", "GemmaForCausalLM", torch.float32),  # norms with an offset
    ("bart", "BartForConditionalGeneration", torch.float32),
])  # fmt: skip
def test_the_pruned_model_is_that_of_the_whole_one(family, head, dtype, tmp_path, monkeypatch):
    model, plan = saved(tmp_path, family, head, dtype)
    masks, draw = inject_(model, find_sites(model)), torch.Generator().manual_seed(0)
    for _, mask in masks.items():
        mask.mu.data.uniform_(0.5, 1.5, generator=draw)
    means = {name: mask.mu.detach().clone() for name, mask in masks.items()}
    skeleton = whole_skeleton(model)
    load, at_once = shards._load_, []

    def watched(part, state, device):
        if device == "cpu":
            at_once.append({name: math.prod(piece.get_shape()) * dtype.itemsize for name, piece in state.items()})
        return load(part, state, device)

    monkeypatch.setattr(shards, "_load_", watched)
    source = Source("dense", str(tmp_path))
    small = compact_checkpoint(source, skeleton, plan, means=means)
    stacked = family == "mixtral"  # a tensor of the model is several of the checkpoint
    assert all(stacked or len(sizes) == 1 or sum(sizes.values()) <= shards.AT_ONCE for sizes in at_once)
    files = shards.checkpoint_files(source)
    assert all(stacked or len({files[name] for name in sizes}) == 1 for sizes in at_once)
    assert len(set(files.values())) > 1 and sorted(name for sizes in at_once for name in sizes) == sorted(files)
    assert all(p.is_meta for p in skeleton.parameters())
    whole = compact_(model, plan)
    ours, theirs = small.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list(small.parameters())) == len(list(whole.parameters()))  # what was tied is
    assert torch.equal(outputs(small), outputs(whole))
    assert small.config.ibprune == whole.config.ibprune


@pytest.mark.parametrize("broken,error,message", [
    ("missing", PlanMismatch, "1 are missing or of another shape, such as 'pooler.dense.bias'"),
    ("shape", PlanMismatch, "1 are missing or of another shape, such as 'pooler.dense.bias'"),
    ("nan", IBPruneError, "NaN or infinity in 'pooler.dense.bias'"),
    ("damaged", BadRecipe, "could not read either"),
    ("gone", BadRecipe, f"expected the file 'model-00002.* that {INDEX} of 'dense' names"),
])  # fmt: skip
def test_a_checkpoint_that_cannot_be_cut_is_refused(broken, error, message, tmp_path):
    model, plan = saved(tmp_path, "bert", "BertModel")
    skeleton = whole_skeleton(model)
    if broken == "gone":
        next(tmp_path.glob("model-00002*")).unlink()
    else:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        bias = state.pop("pooler.dense.bias")
        if broken != "missing":
            state["pooler.dense.bias"] = bias[:-1].clone() if broken == "shape" else bias * torch.nan
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        save_file(state, tmp_path / "model.safetensors")
        assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    if broken == "damaged":
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(error, match=message):
        compact_checkpoint(Source("dense", str(tmp_path)), skeleton, plan)
