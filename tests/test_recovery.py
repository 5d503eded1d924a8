"""Recovery by adapters that the weights take up, and to the best step by rows that were held back."""

import sys

import pytest
import torch
from conftest import build, inputs_of, outputs, random_keep
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

import ibprune
from ibprune import cli
from ibprune.console import Quiet
from ibprune.embeddings import factorize_
from ibprune.engine import make_accelerator
from ibprune.errors import BadData, BadRecipe, IBPruneError, Stopped
from ibprune.lora import Lora, adapted, adapted_layers
from ibprune.plans import PruningPlan
from ibprune.recipe import make_recipe
from ibprune.report import recovery_line
from ibprune.resuming import NO_JOURNAL, FolderJournal
from ibprune.sites import find_family, find_sites
from ibprune.structure import check_cnn
from ibprune.surgery import compact_
from ibprune.thinning import hold_back
from ibprune.trainer import TrainSettings, Validation, train

SHORT = dict(score="magnitude", shares="cost", batch_size=16, max_length=16, audit=False, seed=3)


@pytest.mark.parametrize(
    "family,head",
    [
        ("bert", "BertForSequenceClassification"),
        ("albert", "AlbertForSequenceClassification"),  # blocks that run several times
        ("llama-tied", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),  # weights the other way round
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        ("bart", "BartForConditionalGeneration"),
        ("t5", "T5ForConditionalGeneration"),
        ("swin", "SwinForImageClassification"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_pruned_model_takes_up_its_adapters_and_is_as_it_was_but_for_its_values(family, head):
    model = build(family, head, dtype=torch.float32)
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    keep = random_keep(sites, 5)
    compact_(model, PruningPlan(model.config.model_type, {name: s.n_units for name, s in sites.items()}, keep))
    for parameter in (first := next(model.parameters())), *model.parameters():
        parameter.requires_grad_(parameter is not first)  # what was frozen stays so
    before, weights = outputs(model), {name: p.clone() for name, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    layers = adapted_layers(model)
    with adapted(model, Lora(3, 6.0)) as trained:
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in own.values()) == trained > 0 and all("lora_" in name for name in own)
        assert torch.equal(outputs(model), before)
        model(**inputs_of(model))[0].square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in own.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        during = outputs(model)
    assert not torch.equal(during, before) and torch.allclose(outputs(model), during, atol=1e-5)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in weights.items()}
    assert [p.requires_grad for p in model.parameters()] == [p is not first for p in model.parameters()]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    linear = {f"{path}.weight" for path in layers}
    assert changed and (changed <= linear or "experts" in "".join(changed - linear))


@pytest.fixture(scope="module")
def classifier(folders, reviews):
    return dict(model=folders["BertForSequenceClassification"], budget=0.4, data=reviews, finetune_steps=3) | SHORT


@pytest.fixture(scope="module")
def recovered(classifier, tmp_path_factory):
    values = classifier | dict(recovery="lora", lora_rank=2, lr=1e-3, recover_steps=9, eval_every=2, patience=2)
    folder = tmp_path_factory.mktemp("lora") / "out"
    return values, folder, ibprune.prune(**values, output=folder)


def test_a_recovery_by_adapters_leaves_a_folder_like_any_other(recovered):
    values, folder, result = recovered
    assert not [name for name, _ in result.model.named_parameters() if "lora" in name]
    loaded = ibprune.load(folder)
    assert torch.allclose(outputs(loaded), outputs(result.model), atol=1e-5)
    found = result.report["recovery"]
    assert (found["recovery"], found["lora_rank"], found["lora_alpha"]) == ("lora", 2, 4.0)
    assert 0 < found["trained_params"] < result.report["pruned"]["params"]
    assert "--recovery lora --lora-rank 2" in result.report["command"]
    assert found["held_back"] == 20 and [step for step, _ in found["validation"]][:2] == [2, 4]
    assert found["best_loss"] == min(loss for _, loss in found["validation"])
    line = recovery_line(found)
    assert f"adapters of rank 2 ({found['trained_params']:,} parameters) trained and were merged" in line
    assert f"the best of {found['steps']} steps was {found['best_step']}, by the loss on 20 training rows" in line
    assert recovery_line({"recovery": "full", "trained_params": 9, "steps": 3}) == ""


def test_the_run_goes_on_where_it_was_cut_short(recovered, tmp_path):
    values, folder, result = recovered

    class Asked(Quiet):
        def track(self, items, what, total):
            for i, item in enumerate(items):
                self.stopping = self.stopping or (what, i) == ("recovering", 2)
                yield item

    with pytest.raises(Stopped, match="stopped after step 3 of 9 of 'recovering'"):
        ibprune.prune(**values, output=tmp_path / "out", console=Asked())
    again = ibprune.prune(**values, output=tmp_path / "out", resume=True)
    assert again.report["recovery"] == result.report["recovery"]
    weights = dict(result.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())


def test_candidate_cuts_are_tried_with_what_the_recovery_trains(classifier, tmp_path, monkeypatch):
    tried = []

    def watched(model, loss_of, batches, settings, **more):
        own = [name for name, p in model.named_parameters() if p.requires_grad]
        tried.append((more["phase"], settings.lr, all("lora_" in name for name in own)))
        return train(model, loss_of, batches, settings, **more)

    monkeypatch.setattr("ibprune.candidates.train", watched)
    values = classifier | dict(shares="probe", probe_steps=1, recover_steps=1, lr=1e-3, finetune_steps=1)
    ibprune.prune(**values, recovery="lora", output=tmp_path / "out")
    assert len(tried) > 1 and set(tried) == {("trying a cut", 1e-2, True)}


class Counting(nn.Linear):
    """A line that counts its steps of training, as a BatchNorm does."""

    def __init__(self):
        super().__init__(1, 1, bias=False)
        nn.init.zeros_(self.weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        return super().forward(x)


def fitted(losses: list[float], *, patience=None, journal=NO_JOURNAL, console=None):
    """A line trained for eight steps, whose loss on the rows held back, every second step, is told; and its state."""
    model = Counting()

    def loss_of(model, batch):
        if "held back" in batch:
            return torch.tensor(losses[int(model.steps) // 2 - 1])
        return (model(batch["x"]) - 1).square().mean()

    rows = [{"x": torch.ones(1)} for _ in range(6)]
    state = train(
        model, loss_of, lambda seed: DataLoader(rows, batch_size=2), TrainSettings(8, lr=0.05), phase="fit",
        accelerator=make_accelerator("fp32"), console=console or Quiet(), journal=journal,
        validation=Validation(lambda: [{"held back": torch.ones(1)}], 2, patience),
    )  # fmt: skip
    return model, state


def test_the_weights_of_the_best_step_stay():
    last, state = fitted([4.0, 3.0, 2.0, 1.0])
    assert state.validation == [[2, 4.0], [4, 3.0], [6, 2.0], [8, 1.0]] and state.best == 3 and int(last.steps) == 8
    best, state = fitted([3.0, 1.0, 2.0, 1.0])
    assert state.validation[state.best] == [4, 1.0] and int(best.steps) == 4  # the first of equals
    assert state.step == 8 and not state.ended and 0 < best.weight < last.weight and not best.training
    ended, state = fitted([3.0, 1.0, 2.0, 0.5], patience=1)
    assert state.ended and state.step == 6 == len(state.losses) and torch.equal(ended.weight, best.weight)


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 0.5, 3.0]])
def test_a_phase_that_stops_at_any_step_ends_in_the_same_weights(losses, tmp_path):
    whole, state = fitted(losses, patience=2)
    for at in range(state.step):

        class Asked(Quiet):
            def track(self, items, what, total, at=at):
                for i, item in enumerate(items):
                    self.stopping = self.stopping or i == at
                    yield item

        journal = FolderJournal(tmp_path / str(at), make_recipe({"model": "m", "budget": 0.5}), 60, Quiet())
        with pytest.raises(Stopped):
            fitted(losses, patience=2, journal=journal, console=Asked())
        for _ in range(2):  # goes on; then finds it done
            model, again = fitted(losses, patience=2, journal=journal)
            assert again == state and torch.equal(model.weight, whole.weight) and model.steps == whole.steps


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(IBPruneError, match="on the rows held back became nan after step 2 of 'fit'"):
        fitted([float("nan")] * 4)


def test_rows_are_held_back_of_the_training_rows_alone():
    rows = Dataset.from_dict({"text": [str(i) for i in range(80)]})
    left, held = hold_back(rows, seed=1)
    assert (len(left), len(held)) == (70, 10) and {*left["text"], *held["text"]} == {*rows["text"]}
    assert list(held["text"]) != list(hold_back(rows, seed=2)[1]["text"])
    windows = Dataset.from_dict({"input_ids": [[i] for i in range(9000)]})
    left, held = hold_back(windows, seed=1)
    assert len(held) == 512 and held["input_ids"][0] == [9000 - 512]
    with pytest.raises(BadData, match="expected at least 8, found 7"):
        hold_back(rows.select(range(7)), seed=0)


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--recovery", "lore"], "--recovery: found 'lore': did you mean 'lora'"),
        (["--lora-rank", "8"], "expected --recovery lora beside --lora-rank, found full"),
        (["--lora-alpha", "8"], "expected --recovery lora beside --lora-alpha, found full"),
        (["--recovery", "lora", "--lora-rank", "0"], "--lora-rank: "),
        (["--patience", "2"], "expected --eval-every STEPS beside --patience"),
        (["--eval-every", "0"], "--eval-every: "),
        (["--eval-every", "5", "--recover-steps", "0"], "--eval-every is of the recovery, which has no steps"),
        (["--recovery", "lora", "--recover-steps", "0"], "--recovery is of the recovery, which has no steps"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(flags, said, capsys):
    assert cli.main(["--model", "nowhere", "--budget", "0.5", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_cnn_has_no_blocks_to_adapt():
    with pytest.raises(BadRecipe, match="--recovery lora adapts the blocks of a transformer; 'resnet' has none"):
        check_cnn(make_recipe({"model": "m", "budget": 0.5, "recovery": "lora"}), "resnet")


def test_without_peft_the_extra_is_named(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadRecipe, match=r"expected peft for LoRA, found none: pip install 'ibprune\[lora\]'"):
        ibprune.prune(**classifier, recovery="lora", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
