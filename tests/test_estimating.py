"""Estimates from the config alone: exact sizes, and steps without weights against the same steps with them."""

import weakref

import pytest
import torch
from conftest import TINY, build
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

import ibprune
from ibprune import cli
from ibprune.costs import count_params
from ibprune.cutting import PROBE
from ibprune.dry_steps import DryRun, Step, hollow, made_up_batch, over_depth, train_step
from ibprune.errors import BadRecipe, IBPruneError, UnsupportedModel
from ibprune.estimating import check_weights, estimate, warn_of_memory
from ibprune.lora import Lora, adapted, count_adapters
from ibprune.losses import Objective, forward, training_loss
from ibprune.models import build_model
from ibprune.recipe import make_recipe
from ibprune.shares import most_compared

CASES = {"bert": (BertForSequenceClassification, "classification"), "llama": (LlamaForCausalLM, "causal_lm")}
ROWS, LENGTH = 4, 16


def exact(step: Step) -> tuple[int, ...]:
    return step.flops, step.forward_flops, step.teacher_flops, step.kept_bytes


def kept_by_hooks(model, objective, batch) -> int:
    """Bytes of the tensors that autograd saves for the backward pass, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), *batch.values())}
    saved = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = training_loss(objective, forward(model, batch), None, batch)
        total = sum(saved.values())
    del loss
    return total


@pytest.mark.parametrize("family", CASES)
def test_a_step_without_weights_counts_what_one_with_weights_does(family):
    cls, name = CASES[family]
    objective, config = Objective(name), TINY[family]()
    config.use_cache = False  # which lives too, and is not saved
    skeleton = build_model(config, cls, device="meta")
    with hollow(skeleton):
        batch = made_up_batch(skeleton, objective, ROWS, LENGTH, None)
        found = train_step(skeleton, None, objective, batch, DryRun())
    real = build_model(config, cls, device="cpu").train()
    batch = made_up_batch(real, objective, ROWS, LENGTH, None)
    batch["attention_mask"][0, -1] = 0  # else it needs no mask, which only values tell
    same = train_step(real, None, objective, batch, DryRun())
    assert exact(found) == exact(same)
    assert found.activation_bytes == pytest.approx(same.activation_bytes, rel=0.01)  # some are let go a little later
    hooks = kept_by_hooks(real, objective, batch)
    assert hooks <= found.kept_bytes <= 1.1 * hooks  # the outputs live too
    real.set_attn_implementation("eager")  # whose products torch's counter sees
    counted = train_step(real, None, objective, batch, DryRun())
    with FlopCounterMode(display=False) as counter:
        training_loss(objective, forward(real, batch), None, batch).backward()
    assert counted.flops == counter.get_total_flops()


def test_two_depths_give_all():
    objective, config = Objective("causal_lm"), TINY["llama"]()
    config.num_hidden_layers = 5
    steps = []
    for by_depth in (True, False):
        model = build_model(config, LlamaForCausalLM, device="meta")
        with hollow(model):
            batch = made_up_batch(model, objective, ROWS, LENGTH, None)

            def run(model=model, batch=batch):
                return (train_step(model, None, objective, batch, DryRun()),)

            steps += over_depth((model,), run) if by_depth else run()
    assert exact(steps[0]) == exact(steps[1])
    assert steps[0].activation_bytes == pytest.approx(steps[1].activation_bytes, rel=0.05)  # tiny: its peak moves


def test_weights_gradients_and_moments_are_exact():
    config = TINY["bert"]()
    config.architectures = ["BertForSequenceClassification"]
    found = ibprune.estimate(config, 0.85, task="sst2", kinds=("ffn",), flops_per_second=1e12, max_length=8)
    dense = count_params(build_model(config, BertForSequenceClassification, device="meta"))
    by_name = {row["phase"]: row["memory"] for row in found["phases"]}
    units = 4 * 2 * config.num_hidden_layers * config.intermediate_size  # mean and variance of each, in float32
    student = 4 * dense + units
    masks = by_name["learning masks"]
    assert masks["dense"] == 4 * dense
    assert masks["student"] == masks["gradients"] == student and masks["moments"] == 2 * student
    small = ibprune.plan(config, 0.85, kinds=("ffn",))["predicted"]["params"]
    assert by_name["recovering"]["gradients"] == 4 * small
    assert found["seconds"] == pytest.approx(sum(r["flops"] + r["teacher_flops"] for r in found["phases"]) / 0.4e12)


def test_skeletons_are_emptied_although_somebody_knows_their_tensors():
    """Tensors without storage that are moved once more; torch's own way swaps them, and raises then."""
    model = build_model(TINY["llama"](), LlamaForCausalLM, device="meta")
    model.tie_weights()
    with hollow(model):
        known = [weakref.ref(parameter) for parameter in model.parameters()]
    tied = len({id(p) for p in model.parameters()})
    with hollow(model):
        assert all(p.device.type == "cpu" for p in (*model.parameters(), *model.buffers()))
    assert len({id(p) for p in model.parameters()}) == tied == len(known)


def test_a_mixture_of_experts_has_no_estimate():
    config = TINY["mixtral"]()
    with pytest.raises(UnsupportedModel, match="which experts of a 'mixtral' a token takes depends on what is read"):
        estimate(config, 0.9, flops_per_second=1e9)


def test_moments_in_a_byte_a_best_step_and_more_saves_are_counted():
    config = BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    plain = estimate(config, 0.8, flops_per_second=1e9)
    small = estimate(config, 0.8, flops_per_second=1e9, optimizer="adamw-8bit")
    last, narrow = (found["phases"][-1]["memory"] for found in (plain, small))
    assert last["moments"] == 4 * narrow["moments"] and last["gradients"] == narrow["gradients"]
    best = estimate(config, 0.8, flops_per_second=1e9, eval_every=10)["phases"][-1]["memory"]
    assert best["student"] == 2 * last["student"]
    assert estimate(config, 0.8, flops_per_second=1e9, keep_last=3)["disk"]["state"] > plain["disk"]["state"]


def test_where_adapters_recover_they_alone_have_gradients_and_moments():
    pytest.importorskip("peft")
    config = TINY["gpt2"]()
    config.architectures = ["GPT2LMHeadModel"]
    model, lora = build_model(config, GPT2LMHeadModel, device="cpu"), Lora(2, 4.0)
    counted = count_adapters(model, lora)
    with adapted(model, lora) as trained:
        assert trained == counted
    full, adapters = (
        estimate(config, 0.8, flops_per_second=1e9, recovery=recovery, lora_rank=rank)
        for recovery, rank in (("full", None), ("lora", 2))
    )
    last, narrow = (found["phases"][-1]["memory"] for found in (full, adapters))
    assert narrow["gradients"] == 4 * counted and narrow["moments"] == 8 * counted
    assert narrow["student"] == last["student"] + 4 * counted
    for one, other in zip(full["phases"], adapters["phases"]):
        assert (one == other) == (one["phase"] not in ("trying a cut", "recovering"))


def test_a_vocabulary_is_searched_for_with_the_rest_and_scored_before_it():
    config = BertConfig(
        vocab_size=601, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    asked = dict(budget=0.95, task="sst2", flops_per_second=1e9)
    found = [
        {phase["phase"]: phase["batches"] for phase in estimate(config, kinds=kinds, **asked)["phases"]}
        for kinds in (("heads", "ffn"), ("heads", "ffn", "vocab"))
    ]
    assert found[0]["allocating between kinds"] == most_compared(2) * PROBE // 32
    assert found[1]["allocating between kinds"] == most_compared(3, vocab=True) * PROBE // 32
    assert found[1]["scoring units"] == 2 * found[0]["scoring units"]


def test_bad_input_is_one_line(folders, capsys):
    with pytest.raises(BadRecipe, match="--utilisation: expected a number above 0 and at most 1, found 2"):
        ibprune.estimate(folders["BertModel"], 0.5, flops_per_second=1e12, utilisation=2)
    assert cli.main(["plan", "--model", folders["BertModel"], "--flops-per-second", "1e12"]) == 2
    assert "expected --estimate beside --flops-per-second" in capsys.readouterr().err


class Lines:
    def __init__(self):
        self.lines = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_too_little_memory_is_said_and_weights_that_do_not_fit_are_refused(monkeypatch):
    model, console = build("bert", "BertForSequenceClassification", dtype=torch.float32), Lines()
    recipe = make_recipe({"model": "x", "budget": 0.5, "max_length": 8, "mask_steps": 1, "recover_steps": 1})
    warn_of_memory(recipe, model, Objective("classification"), None, console)
    assert not console.lines
    monkeypatch.setattr("ibprune.estimating.free_memory", lambda device: 9 * count_params(model))
    warn_of_memory(recipe, model, Objective("classification"), None, console)
    assert "--gradient-checkpointing" in console.lines[0] and "'learning masks' takes 0.0 GB" in console.lines[0]
    check_weights(model.config, type(model))
    monkeypatch.setattr("ibprune.estimating.free_memory", lambda device: 7 * count_params(model))
    with pytest.raises(IBPruneError, match="for the weights of a BertForSequenceClassification and of the copy"):
        check_weights(model.config, type(model))
