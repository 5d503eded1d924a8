"""Masks in a training loop of one's own, and in transformers' Trainer: the model is cut to the budget and loads."""

import itertools
import json

import pytest
import torch
import transformers
from conftest import build, inputs_of, outputs, token_ids
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import ibprune
from ibprune import cli
from ibprune.costs import count_params
from ibprune.errors import BadData, BadRecipe, PlanMismatch, UnsupportedModel
from ibprune.inject import MASKS
from ibprune.model_card import model_card

EXACT = ("heads", "ffn", "layers")  # kinds whose masks of ones multiply and nothing else


def classifier(**changes):
    return build("bert", "BertForSequenceClassification", dtype=torch.float32, **changes).train()


def rows(n: int, *, seed: int = 0) -> list[dict]:
    """Random texts whose label is whether the first word is one of the first thirty: a tiny model learns that."""
    ids = torch.randint(5, 61, (n, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones(9, dtype=torch.long), "labels": int(row[0] < 30)}
            for row in ids]  # fmt: skip


def batches(n: int, size: int = 8, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    texts = rows(n * size, seed=seed)
    return [
        {key: torch.stack([torch.as_tensor(row[key]) for row in texts[i : i + size]]) for key in texts[0]}
        for i in range(0, n * size, size)
    ]


def train(model, masked, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in itertools.islice(itertools.cycle(batches(8, seed=1)), steps):
        loss = model(**batch).loss
        loss.backward()
        if masked is not None:
            masked.advance()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def looped(tmp_path_factory, tokenizer):
    """A plain loop: the model, its dense size, what masks learned on the way, the folder and its report."""
    model = classifier()
    dense = count_params(model)
    masked = ibprune.MaskedTraining(model, 0.5, batches=batches(4), round_to=1)
    masked.begin(steps=40)
    before = {name: (mask.mu.detach().clone(), mask.log_var.detach().clone()) for name, mask in masked.masks.items()}
    train(model, masked, 40)
    folder = tmp_path_factory.mktemp("looped") / "small"
    return model, dense, masked, before, folder, masked.save(folder, tokenizer)


def test_a_plain_loop_ends_on_the_budget_and_in_a_folder(looped):
    model, dense, masked, _, folder, report = looped
    assert count_params(model) == report["budget"]["achieved"] == report["pruned"]["params"] <= dense // 2
    assert report["budget"]["achieved"] > 0.45 * dense and report["dense"]["params"] == dense
    assert not hasattr(model, MASKS) and not model._forward_pre_hooks
    torch.testing.assert_close(outputs(ibprune.load(folder)), outputs(model.eval()))
    other = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(outputs(other.eval()), outputs(model.eval()))


def test_gradients_and_noise_teach_the_masks(looped):
    _, _, masked, before, _, _ = looped
    moved = {name for name, mask in masked.masks.items() if not torch.equal(mask.mu, before[name][0])}
    assert moved == set(before)
    noisy = {name for name, mask in masked.masks.items() if not torch.equal(mask.log_var, before[name][1])}
    assert noisy == set(masked.learning.noisy) and noisy < set(before)


def test_its_report_says_what_it_does_not_know(looped, capsys):
    _, _, _, _, folder, report = looped
    assert report == json.loads((folder / "report.json").read_text())
    assert report["data"] is None and "no data set" in report["unknown"][0] and report["audit"] is None
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    for text in (card, page):
        assert "no data set" in text and "random weights" in text and "recipe.yaml" not in text
        assert "MaskedTraining(model, 0.5" in text and "held-out" not in text
        assert ".begin(steps=40)" in text and "\\n" not in text
    decision = json.loads((folder / "decision.json").read_text())
    assert decision["score"] == "vib" and decision["path"]["stops"] == [[40, 0.5]] and "over 40 steps of mask" in page
    shares = {kind: found["kept"] / found["units"] for kind, found in decision["kinds"].items()}
    assert shares and shares.items() <= report["kept"].items()
    stranger = report | {"unknown": ["<script>x</script>", "a | b"]}
    assert "<script>" not in model_card(stranger, None, name="small") and "a \\| b" in model_card(
        stranger, None, name="x"
    )
    assert cli.main(["compare", str(folder)]) == 0 and cli.main(["report", str(folder)]) == 0
    assert "0.5 params" in capsys.readouterr().out
    assert (folder / "report.html").read_text() == page


def test_the_loss_is_the_users_own_until_masks_learn_and_after_they_went():
    model, plain = classifier(), classifier()
    names = [name for name, _ in model.named_parameters()]
    batch = batches(1, seed=2)[0]
    masked = ibprune.MaskedTraining(model, 0.5, batches=batches(2), kinds=EXACT, round_to=1)
    for mode in (True, False):
        losses = []
        for each in (model, plain):
            torch.manual_seed(0)
            losses.append(each.train(mode)(**batch).loss)
        assert torch.equal(*losses)
    assert [name for name, _ in model.named_parameters()] == names  # no mask among them
    assert train(model, None, 3) == train(plain, None, 3)  # nor does a training without begin() differ
    assert masked.remove() is model and not hasattr(model, MASKS)
    assert train(model, None, 3) == train(plain, None, 3)
    again = ibprune.MaskedTraining(model, 0.5, batches=batches(2), round_to=1)  # factors of the embedding come
    again.remove()
    assert set(model.state_dict()) == set(plain.state_dict())  # and go
    torch.testing.assert_close(outputs(model.eval()), outputs(plain.eval()))


def test_the_penalty_is_added_by_its_gradient_alone():
    model = classifier()
    masked = ibprune.MaskedTraining(model, 0.5, batches=batches(2), kinds=EXACT, round_to=1)
    masked.begin(steps=100)
    value = masked.penalty()
    assert value > 0 and value.requires_grad
    log_var = [mask.log_var for name, mask in masked.masks.items() if name in masked.learning.noisy]
    wanted = torch.autograd.grad(value, log_var)
    model.eval()  # no noise: the loss gives log_var no gradient
    model(**batches(1)[0]).loss.backward()
    seen = []
    masked.optimizer.register_step_pre_hook(lambda *_: seen.extend(x.grad.clone() for x in log_var))
    masked.advance()
    assert all(torch.equal(*pair) for pair in zip(wanted, seen)) and len(seen) == len(wanted)


def arguments(tmp_path, **more) -> TrainingArguments:
    settings = dict(per_device_train_batch_size=8, num_train_epochs=2, logging_steps=1, save_strategy="no",
                    learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True)  # fmt: skip
    return TrainingArguments(output_dir=tmp_path / "runs", **settings | more)


def test_the_trainer_takes_masks_by_a_callback(tmp_path, tokenizer):
    model = classifier()
    dense = count_params(model)
    masked = ibprune.MaskedTraining(model, 0.4, batches=batches(4), round_to=1)
    settings = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Trainer(model, settings, train_dataset=rows(128), eval_dataset=rows(16, seed=3),
                      callbacks=[ibprune.MaskCallback(masked)])  # fmt: skip
    trainer.train()
    assert masked.done == trainer.state.max_steps == 16
    small = masked.cut()
    assert small is model and count_params(small) <= 0.4 * dense
    loss = trainer.evaluate()["eval_loss"]
    report = masked.save(tmp_path / "small", tokenizer)
    assert report["budget"]["achieved"] == count_params(small) and report["recovery"]["steps"] == 16
    again = ibprune.load(tmp_path / "small")
    assert Trainer(again, arguments(tmp_path), eval_dataset=rows(16, seed=3)).evaluate()["eval_loss"] == pytest.approx(
        loss, rel=1e-5
    )


def test_the_trainers_loss_has_no_penalty_and_the_same_seed_cuts_the_same(tmp_path):
    plans, logs = [], []
    for _ in range(2):
        model = classifier()
        masked = ibprune.MaskedTraining(model, 0.5, batches=batches(2), kinds=EXACT, round_to=1)
        trainer = Trainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=rows(64),
                          callbacks=[ibprune.MaskCallback(masked)])  # fmt: skip
        trainer.train()
        masked.cut()
        plans.append(masked.plan)
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert plans[0] == plans[1] and logs[0] == logs[1]
    assert all(value < 3 for value in logs[0])  # of two classes; the KL of the masks alone is more
    assert masked.learning.beta.sum() > 0


@pytest.mark.parametrize("settings,expected", [
    (dict(fp16=True), "found fp16"), (dict(load_best_model_at_end=True), "load_best_model_at_end=False"),
    (dict(torch_compile=True), "torch_compile=False"),
])  # fmt: skip
def test_what_the_trainer_cannot_do_with_masks_is_refused(settings, expected, tmp_path):
    model = classifier()
    masked = ibprune.MaskedTraining(model, 0.5, batches=batches(1), round_to=1, shares="equal")
    callback = ibprune.MaskCallback(masked)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(8))
    for name, value in settings.items():
        object.__setattr__(trainer.args, name, value)
    with pytest.raises(BadRecipe, match=expected):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


def test_the_trainer_must_have_the_masked_model_from_its_start(tmp_path):
    model, other = classifier(), classifier()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(8))
    early = trainer.create_optimizer()
    masked = ibprune.MaskedTraining(model, 0.5, batches=batches(1), round_to=1, shares="equal")  # factors the embedding
    callback = ibprune.MaskCallback(masked)
    begin = (trainer.args, trainer.state, trainer.control)
    with pytest.raises(BadRecipe, match="found another"):
        callback.on_train_begin(*begin, model=other, optimizer=early)
    with pytest.raises(BadRecipe, match="make it after the masks"):
        callback.on_train_begin(*begin, model=model, optimizer=early)
    trainer.state.global_step = 3
    with pytest.raises(BadRecipe, match="resumed at step 3"):
        callback.on_train_begin(*begin, model=model, optimizer=early)
    assert masked.learning is None


@pytest.mark.parametrize("family,head,dtype", [
    ("llama-tied", "LlamaForCausalLM", torch.bfloat16), ("gpt2", "GPT2LMHeadModel", torch.float32),
    ("mixtral", "MixtralForCausalLM", torch.float32),
])  # fmt: skip
def test_decoders_are_masked_too(family, head, dtype, tmp_path):
    model = build(family, head, dtype=dtype).train()
    if family == "gpt2":  # blocks run again in the backward pass, under the same noise; its hooks go with the embedding
        model.gradient_checkpointing_enable()
    batch = inputs_of(model) | {"labels": token_ids()}
    masked = ibprune.MaskedTraining(model, 0.6, batches=[batch], round_to=1)
    masked.begin(steps=6)
    for _ in range(6):
        model(**batch).loss.backward()
        masked.advance()
        model.zero_grad()
    assert count_params(masked.cut()) <= 0.6 * count_params(build(family, head))
    assert torch.isfinite(model(**batch).loss) and not any(m._forward_hooks for m in model.modules())
    if dtype == torch.bfloat16:
        report = masked.save(tmp_path / "small")
        assert report["budget"]["achieved"] == count_params(model) and report["dense"]["latency_ms"]["median"] > 0
        assert ibprune.load(tmp_path / "small").dtype == dtype


def test_a_batch_that_the_loop_leaves_out_leaves_nothing_in_the_masks():
    """The model ends as if the batch had never been read; a gradient that is not a number is refused first."""
    ends = []
    for left_out in (False, True):
        torch.manual_seed(0)
        model = classifier()
        masked = ibprune.MaskedTraining(model, 0.5, batches=batches(2), round_to=1, shares="equal")
        masked.begin(steps=6)
        train(model, masked, 3)
        if left_out:
            (model(**batches(1)[0]).loss * float("nan")).backward()
            with pytest.raises(BadData, match=r"call skip\(\) instead of advance"):
                masked.advance()
            assert masked.done == 3
            (model(**batches(1)[0]).loss * 1e6).backward()
        model.zero_grad()
        masked.skip()
        ends.append({name: value.clone() for name, value in masked.masks.state_dict().items()})
        train(model, masked, 2)
        assert masked.cut() is model
        with pytest.raises(PlanMismatch, match="cut already"):
            masked.skip()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("shares", ["probe", "cost"])
def test_a_loss_that_is_not_a_number_ranks_nothing(shares):
    model = classifier()
    with pytest.raises(BadData, match="expected a finite loss on the batches that rank the units"):
        ibprune.MaskedTraining(
            model, 0.5, batches=batches(2), shares=shares, loss=lambda model, batch: model(**batch).loss * float("nan")
        )
    ibprune.MaskedTraining(model, 0.5, batches=batches(2), shares="equal").remove()  # no masks were left in it


def test_misuse_is_named():
    model = classifier()
    few = batches(1)
    for wrong in (few[0], [{"input_ids": [[1, 2]]}]):  # one batch, and lists
        with pytest.raises(BadData, match="expected a list of batches, each a dict of tensors"):
            ibprune.MaskedTraining(model, 0.5, batches=wrong)
    masked = ibprune.MaskedTraining(model, 0.5, batches=few, round_to=1, shares="equal")
    with pytest.raises(PlanMismatch, match="expected a model without masks"):
        ibprune.MaskedTraining(model, 0.5, batches=few)
    for call in (masked.advance, masked.cut, masked.penalty):
        with pytest.raises(BadRecipe, match="call begin"):
            call()
    for steps in (0, 2.5, True):
        with pytest.raises(BadRecipe, match="expected the number of optimiser steps"):
            masked.begin(steps)
    masked.begin(steps=4)
    with pytest.raises(BadRecipe, match="have not begun"):
        masked.begin(steps=4)
    with pytest.raises(BadRecipe, match=r"call advance\(\) after loss.backward"):
        masked.advance()
    train(model, masked, 3)
    with pytest.raises(BadRecipe, match="expected 4 steps before the cut.* found 3"):
        masked.cut()
    train(model, masked, 1)
    model(**few[0]).loss.backward()
    with pytest.raises(BadRecipe, match="found one more"):
        masked.advance()
    other = ibprune.MaskedTraining(classifier(), 0.5, batches=few, shares="equal")
    other.remove()
    for call in (lambda: other.begin(steps=2), other.advance, other.cut, other.remove):
        with pytest.raises(PlanMismatch, match="they were removed: make a MaskedTraining anew"):
            call()
    masked.cut()
    for call in (masked.cut, masked.advance, masked.remove):
        with pytest.raises(PlanMismatch, match="cut already"):
            call()
    with pytest.raises(PlanMismatch, match="ibprune has pruned"):
        ibprune.MaskedTraining(model, 0.5, batches=few)


@pytest.mark.parametrize("make,options,error,expected", [
    (lambda: nn.Linear(2, 2), {}, BadRecipe, r"ibprune.prune\(module"),
    (classifier, {"batches": []}, BadData, "found none"),
    (classifier, {"batches": [inputs_of(build("bert", "BertModel"), token_ids())]}, BadData, "expected a loss from"),
    (classifier, {"budget": 0.001}, BadRecipe, "ask for at least"),
    (classifier, {"budget": "0.5,0.3"}, BadRecipe, "expected one share"),
    (classifier, {"cost": "latency"}, BadRecipe, "expected one of params, macs"),
    (classifier, {"kinds": ("vocab",)}, BadRecipe, "'vocab' changes the tokenizer"),
    (classifier, {"kinds": ("experts",)}, BadRecipe, "has no units 'experts'"),
    (lambda: build("vit", "ViTForImageClassification"), {"batches": [{"pixel_values": torch.ones(1, 3, 8, 8)}]},
     BadData, "expected a loss from"),
])  # fmt: skip
def test_what_cannot_be_masked_is_refused_and_left_as_it_was(make, options, error, expected):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = model.training
    settings = dict(budget=0.5, batches=batches(1)) | options
    with pytest.raises(error, match=expected):
        ibprune.MaskedTraining(model, **settings)
    after = model.state_dict()
    assert set(after) == set(before) and not hasattr(model, MASKS) and model.training == training
    for name in before:
        torch.testing.assert_close(after[name], before[name])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_encoder_takes_a_loss_of_ones_own_and_a_cnn_is_sent_elsewhere():
    model = build("bert", "BertModel", dtype=torch.float32)
    target = torch.zeros(24)

    def loss(model, batch):
        return (model(**batch).last_hidden_state - target).square().mean()

    few = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches(2)]
    masked = ibprune.MaskedTraining(model, 0.6, batches=few, loss=loss, shares="cost", round_to=1)
    masked.begin(steps=5)
    for _ in range(5):
        loss(model.train(), few[0]).backward()
        masked.advance()
    assert count_params(masked.cut()) <= 0.6 * count_params(build("bert", "BertModel"))
    config = transformers.ResNetConfig(num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    with pytest.raises(UnsupportedModel, match="which traces it"):
        ibprune.MaskedTraining(transformers.ResNetForImageClassification(config), 0.5, batches=few)
