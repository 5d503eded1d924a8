"""A dense model held in 4 or 8 bits: what is written is cut from the full-precision checkpoint; what cannot be."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, build, inputs_of, outputs
from safetensors.torch import load_file, save_file
from test_cli import refused
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, ResNetConfig

import ibprune
from ibprune import quantised
from ibprune.console import Quiet
from ibprune.errors import BadRecipe, Stopped
from ibprune.estimating import estimate, warn_of_memory
from ibprune.inject import inject_
from ibprune.lora import adapted_layers
from ibprune.losses import Objective
from ibprune.models import find_source, load_dense
from ibprune.plans import PruningPlan
from ibprune.quantised import check_quantised, copied, packed_bytes, whole_skeleton
from ibprune.recipe import make_recipe
from ibprune.sites import find_sites
from ibprune.structure import prepare_
from ibprune.surgery import compact_

pytest.importorskip("bitsandbytes")
SHORT = dict(batch_size=16, max_length=16, audit=False, seed=3, shares="cost", round_to=1)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def classifier(folders, reviews):
    return dict(model=folders["BertForSequenceClassification"], budget=0.5, data=reviews) | SHORT


def test_what_is_scored_in_4_bits_is_cut_from_the_checkpoint_bit_for_bit(classifier, tmp_path):
    folder = tmp_path / "out"
    result = ibprune.prune(**classifier, score="fisher", recover_steps=0, load_in_4bit=True, output=folder)
    plan = PruningPlan.load(folder / "plan.json")
    assert not any(name.endswith("embedding_rank") for name in plan.keep)
    sliced = compact_(load_dense(find_source(classifier["model"])).model, plan).state_dict()
    written = ibprune.load(folder).state_dict()
    assert written.keys() == sliced.keys() and all(torch.equal(written[name], sliced[name]) for name in sliced)
    report = result.report
    assert report["quantised"] == 4 and "--load-in-4bit" in report["command"]
    assert report["budget"]["achieved"] == sum(p.numel() for p in result.model.parameters())
    assert report["dense"]["file_bytes"] == 4 * report["dense"]["params"]
    assert "held in 4 bits: its metrics and its latency" in (folder / "README.md").read_text()


def test_masks_learned_in_8_bits_are_folded_into_the_checkpoint_and_adapters_recover_it(folders, stories, tmp_path):
    values = SHORT | dict(model=folders["LlamaForCausalLM"], budget=0.6, data=stories, load_in_8bit=True)
    values |= dict(mode="faster", mask_steps=6, lr=1e-3)
    plain = ibprune.prune(**values, output=tmp_path / "plain")
    sliced = compact_(load_dense(find_source(values["model"])).model, plain.plan)
    assert plain.report["recovery"]["steps"] == 0
    written = ibprune.load(tmp_path / "plain")
    assert torch.allclose(outputs(written), outputs(plain.model), atol=1e-5)
    assert {n: p.shape for n, p in written.named_parameters()} == {n: p.shape for n, p in sliced.named_parameters()}
    ratio = written.model.norm.weight / sliced.model.norm.weight  # what the masks learned of each feature
    assert 0.5 < ratio.min() < ratio.max() < 1.5
    recovered = ibprune.prune(**values, recovery="lora", lora_rank=2, recover_steps=6, output=tmp_path / "recovered")
    assert recovered.plan == plain.plan and recovered.report["recovery"]["steps"] == 6
    again = ibprune.load(tmp_path / "recovered").state_dict()
    changed = {name for name, tensor in written.state_dict().items() if not torch.equal(tensor, again[name])}
    assert changed and all("_proj" in name for name in changed)


def test_a_run_that_was_cut_short_goes_on(classifier, tmp_path):
    class Asked(Quiet):
        def track(self, items, what, total):
            for i, item in enumerate(items):
                self.stopping = what == "learning masks" and i == 2
                yield item

    values = classifier | dict(mode="faster", mask_steps=6, load_in_4bit=True)
    whole = ibprune.prune(**values, output=tmp_path / "whole")
    with pytest.raises(Stopped):
        ibprune.prune(**values, output=tmp_path / "out", console=Asked())
    saved = load_file(next((tmp_path / "out.partial").rglob("learning-masks.safetensors")))
    assert not [name for name, tensor in saved.items() if tensor.dtype == torch.uint8 and name.startswith("model/")]
    result = ibprune.prune(**values, output=tmp_path / "out", resume=True)
    assert result.plan == whole.plan
    names = [folder / "model.safetensors" for folder in (tmp_path / "whole", tmp_path / "out")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("family,head", [("gpt2", "GPT2LMHeadModel"), ("t5", "T5ForConditionalGeneration")])
def test_a_copy_shares_what_is_packed_and_masks_act_on_it_as_on_whole_weights(family, head, tmp_path, tokenizer):
    build(family, head, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    dense = load_dense(find_source(str(tmp_path)), quantisation=NF4, device=torch.device("cpu")).model
    assert any(p.dtype == torch.uint8 for p in dense.parameters())
    assert not any(p.requires_grad for p in dense.parameters())
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in dense.modules())
    student = copied(dense)
    ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (student, dense))
    assert ours == theirs
    skeleton = whole_skeleton(dense)
    sites = prepare_(skeleton, ("heads", "ffn", "hidden"), None).sites
    whole = build(family, head, dtype=torch.float32)
    assert {n: s.n_units for n, s in sites.items()} == {n: find_sites(whole)[n].n_units for n in sites}
    before = outputs(student)
    masks = inject_(student, sites)
    assert torch.equal(outputs(student), before) and torch.equal(outputs(dense), before)
    student(**inputs_of(student))[0].square().sum().backward()
    assert all(mask.mu.grad is not None and mask.mu.grad.abs().sum() > 0 for _, mask in masks.items())


BOTH = "expected one of --load-in-4bit and --load-in-8bit, found both"


@pytest.mark.parametrize("changed,said", [
    (dict(load_in_8bit=True), BOTH),
    (dict(score="magnitude"), "score magnitude reads or changes weights, and these are packed: use vib, fisher"),
    (dict(start="flap"), "score flap reads or changes weights"),
    (dict(score="gradual", mode="full"), "score gradual reads or changes weights"),
    (dict(mode="fast"), "mode fast trains them while masks learn: use --mode faster, or a one-shot --score"),
    (dict(recover_steps=5), "--recovery full trains all weights: use --recovery lora, or --recover-steps 0"),
    (dict(mode="full", score="fisher"), "--recovery full trains all weights"),
    (dict(finetune_steps=5), "leave --finetune-steps out"),
    (dict(budget=(0.5, 0.3)), "cuts one model, to one --budget"),
    (dict(at_least="accuracy=99%"), "leave other budgets and --at-least out"),
    (dict(rotate=True), "--rotate turns weights, and with --load-in-4bit these are read last"),
    (dict(score="fisher", reconstruct=True), "--reconstruct changes weights"),
    (dict(cost="latency"), "--cost latency times candidate cuts"),
    (dict(kinds="heads,vocab"), "--kinds vocab rewrites the embedding"),
    (dict(kinds="heads,embedding_rank"), "--kinds embedding_rank factorises the embedding"),
])  # fmt: skip
def test_what_packed_weights_cannot_do_is_said(changed, said):
    values = dict(model="bert-base", budget=0.5, mode="faster", load_in_4bit=True)
    with pytest.raises(BadRecipe, match=said):
        check_quantised(make_recipe(values | changed))


def test_it_needs_its_package_and_one_process(monkeypatch):
    recipe = make_recipe(dict(model="bert-base", budget=0.5, mode="faster", load_in_8bit=True))
    check_quantised(recipe)
    monkeypatch.setattr(quantised, "n_processes", lambda: 2)
    with pytest.raises(BadRecipe, match="--load-in-8bit: expected one process, found 2"):
        check_quantised(recipe)
    monkeypatch.setattr(quantised, "n_processes", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadRecipe, match=r'needs bitsandbytes: pip install "ibprune\[bnb\]"'):
        check_quantised(recipe)


def test_models_that_cannot_be_packed_or_read_are_refused_before_they_are_loaded(
    folders, reviews, stories, tmp_path, capsys, monkeypatch
):
    def said(model, data) -> str:
        flags = ("--budget", "0.5", "--mode", "faster", "--load-in-4bit", "--no-audit", "--max-length", "16")
        message = refused(capsys, "--model", model, "--data", data, "--output", tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()
        return message

    def folder(name: str, like: str, weights: dict | None) -> Path:
        """The config and tokenizer of one model, with other weights as safetensors; None: as a pickle."""
        shutil.copytree(folders[like], tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        if weights is None:
            torch.save({}, tmp_path / name / "pytorch_model.bin")
        else:
            save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    state, broken = load_file(f"{folders['LlamaForCausalLM']}/model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    nan = folder("nan", "LlamaForCausalLM", state | {broken: state[broken] * torch.nan})
    assert f"NaN or infinity in '{broken}" in said(nan, stories)
    base = load_file(f"{folders['BertModel']}/model.safetensors")
    no_head = folder("no head", "BertForSequenceClassification", {f"bert.{name}": base[name] for name in base})
    assert "trains no new one: make one with `ibprune train`" in said(no_head, reviews)
    monkeypatch.setattr("ibprune.models._read_checkpoint", lambda *args: sys.exit("a checkpoint was read"))
    assert "trains no new one" in said(folders["BertModel"], reviews)
    assert "Weights in another format are read after" in said(folder("bin", "LlamaForCausalLM", None), stories)
    TINY["mixtral"]().save_pretrained(tmp_path / "mixtral")
    ResNetConfig(architectures=["ResNetForImageClassification"]).save_pretrained(tmp_path / "resnet")
    assert "'mixtral' keeps its weights in the stacked weights of experts" in said(tmp_path / "mixtral", stories)
    assert "'resnet' keeps its weights in convolutions" in said(tmp_path / "resnet", stories)


def test_training_does_not_take_it(classifier, tmp_path):
    values = {key: classifier[key] for key in ("model", "data", "batch_size", "max_length")}
    with pytest.raises(BadRecipe, match="leaves weights as they are, and here they are trained"):
        ibprune.train(**values, load_in_4bit=True, output=tmp_path / "out")


@pytest.mark.parametrize("width", [4, 8])
def test_an_estimate_counts_the_bytes_that_are_held(width, tokenizer, tmp_path):
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=61, num_hidden_layers=2, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    how = NF4 if width == 4 else BitsAndBytesConfig(load_in_8bit=True)
    held = load_dense(find_source(str(tmp_path)), quantisation=how, device=torch.device("cpu")).model
    size = sum(p.numel() * p.element_size() for p in held.parameters())
    for layer in adapted_layers(model):
        weight = held.get_submodule(layer).weight
        size += 4 * (weight.quant_state.absmax.numel() if width == 4 else weight.SCB.numel())
    assert packed_bytes(model, width) == size
    asked = {f"load_in_{width}bit": True} | dict(mode="faster", recovery="lora", recover_steps=4, max_length=16)
    phases = {
        each["phase"]: each["memory"] for each in estimate(model.config, 0.6, flops_per_second=1e12, **asked)["phases"]
    }
    assert {memory["dense"] for memory in phases.values()} == {size}
    assert phases["scoring units"]["student"] == 0  # it shares them
    assert phases["learning masks"]["student"] == phases["learning masks"]["gradients"]
    adapters = phases["recovering"]["gradients"] // 4
    plan = ibprune.plan(model.config, 0.6, **{f"load_in_{width}bit": True})["predicted"]
    assert phases["recovering"]["student"] == 4 * (plan["params"] + adapters)


def test_a_plan_says_what_such_a_run_cuts(classifier):
    groups = ibprune.plan(classifier["model"], 0.6, load_in_4bit=True, round_to=1)["groups"]
    assert {kind for kind, group in groups.items() if group["cut"]} == {"heads", "ffn", "layers", "hidden"}


def test_too_little_memory_for_what_is_quantised_is_said(folders, monkeypatch):
    """Its weights are held already; what else a run takes is compared with what is left."""
    source, lines = find_source(folders["LlamaForCausalLM"]), []
    recipe = make_recipe(dict(model="x", budget=0.5, max_length=16, load_in_4bit=True, mode="faster", mask_steps=2))
    model = load_dense(source, quantisation=NF4, device=torch.device("cpu")).model
    console = SimpleNamespace(say=lines.append)
    held = model.get_memory_footprint()
    for free, said in ((10**9, 0), (held, 1)):
        monkeypatch.setattr("ibprune.estimating.free_memory", lambda device, free=free: free)
        warn_of_memory(recipe, model, Objective("causal_lm"), None, console)
        assert len(lines) == said
    assert "--mode faster" in lines[0] and "are free on 'cpu'" in lines[0]
