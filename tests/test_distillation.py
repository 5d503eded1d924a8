"""What a student learns from its teacher: divergences of the outputs, hidden states and relations of the blocks."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from cnn_models import build_net, pictures, save_pictures
from conftest import HEADS, TINY, build, inputs_of, random_keep

import ibprune
from ibprune import cli, distillation
from ibprune.distillation import RELATED, TAUGHT, layers_apart, loss_with, match, on_kept_features, watched
from ibprune.engine import make_accelerator
from ibprune.errors import BadRecipe
from ibprune.flags import prune_parser
from ibprune.inject import inject_
from ibprune.losses import DIVERGENCES, LAYERED, Objective, distill_loss, divergence, forward
from ibprune.plans import PruningPlan, full_plan
from ibprune.recipe import make_recipe
from ibprune.rotation import rotate_
from ibprune.sites import find_sites
from ibprune.surgery import compact_

HARD = torch.log(torch.tensor([0.75, 0.25]))
SOFT = torch.log(torch.tensor([0.5, 0.5]))


def apart(kind: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return divergence(Objective("classification", temperature=temperature, divergence=kind), student, teacher)


def test_divergences_have_the_values_that_a_hand_computes():
    to_soft = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # KL(soft || hard)
    to_hard = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # KL(hard || soft)
    assert apart("forward", HARD, SOFT).item() == pytest.approx(to_soft)
    assert apart("reverse", HARD, SOFT).item() == pytest.approx(to_hard)
    assert apart("balanced", HARD, SOFT).item() == pytest.approx((2 * to_soft + to_hard) / 3)  # the student is too sure
    assert apart("balanced", SOFT, HARD).item() == pytest.approx((to_hard + 2 * to_soft) / 3)
    both = apart("balanced", torch.stack([HARD, SOFT]), torch.stack([SOFT, HARD]))  # each with weights of its own
    assert torch.allclose(both, torch.stack([apart("balanced", HARD, SOFT), apart("balanced", SOFT, HARD)]))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_pulls_the_student_to_the_teacher(kind):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 7, generator=generator)
    assert apart(kind, teacher, teacher).abs().max() < 1e-6
    student = torch.randn(5, 7, generator=generator, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        apart(kind, student, teacher, temperature=2.0).sum().backward()
        optimizer.step()
    assert torch.allclose(student.softmax(-1), teacher.softmax(-1), atol=0.01)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_tokens_that_cannot_be_part_of_an_answer_count_nowhere(kind):
    """Their logits are far below all others: no divergence may become infinite there."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    far = torch.full((2, 3), -1e4)
    wide = [torch.cat([logits, far], dim=-1) for logits in (student, teacher)]
    assert torch.allclose(apart(kind, *wide), apart(kind, student, teacher), atol=1e-6)


def test_a_classifier_is_distilled_by_the_divergence_of_its_objective():
    class Out:
        logits = torch.stack([HARD, SOFT])

    class Dense:
        logits = torch.stack([SOFT, HARD])

    for kind in DIVERGENCES:
        objective = Objective("classification", divergence=kind)
        assert torch.equal(distill_loss(objective, Out, Dense, {}), divergence(objective, Out.logits, Dense.logits))


def test_a_recipe_says_what_is_distilled_in_words_or_as_before():
    def distill(**more) -> str:
        return make_recipe({"model": "m", "budget": 0.5} | more).distill

    assert distill() == distill(distill=True) == "logits" and distill(distill=False) == "none"
    with pytest.raises(BadRecipe, match="--distill: found 'logit': did you mean 'logits'"):
        distill(distill="logit")
    with pytest.raises(BadRecipe, match="divergence says how outputs are distilled"):
        distill(distill=False, divergence="balanced")
    given = prune_parser().parse_args(["--model", "m", "--no-distill"])
    assert given.distill == "none" and prune_parser().parse_args([]).distill is None


def test_what_gives_no_distribution_has_no_divergence(folders, stories, tmp_path, capsys):
    flags = ["--model", folders["BertModel"], "--data", stories, "--budget", "0.5", "--quiet"]
    assert cli.main([*flags, "--divergence", "reverse", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "give no distributions to compare: leave it out" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def seen(model, batch):
    """The states of all blocks on a batch."""
    with watched(model) as states:
        forward(model, batch)
    return states


def far(kind, student, teacher, batch, *, name="classification", dims=None, axes=None):
    """The distance of a student's blocks from its teacher's, (batch,)."""
    objective = Objective(name, layers=kind, dims=dims, axes=axes)
    with torch.no_grad():
        theirs = seen(teacher, batch)
    return layers_apart(objective, student, seen(student, batch), theirs, batch)


def test_layers_are_matched_in_order_at_the_least_total():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in itertools.product(range(1, 5), range(1, 8)):
        if rows > columns:
            continue
        distances = torch.rand(rows, columns, generator=generator)
        if columns > rows:
            distances[0, 0] = math.inf  # such as of stages of another width
        places = match(distances.tolist())
        assert places == sorted(set(places)) and len(places) == rows
        least = min(distances[range(rows), each].sum() for each in itertools.combinations(range(columns), rows))
        assert distances[range(rows), places].sum().item() == pytest.approx(least.item())
    assert match([[math.inf, math.inf]]) == []


@pytest.mark.parametrize("family", TINY)
def test_a_masked_model_is_as_far_from_its_teacher_as_the_compacted_one(family):
    """Of every row: blocks are found, a copy is at distance 0, and what was cut is compared nowhere."""
    teacher = build(family, HEADS[family][-1])
    batch = inputs_of(teacher)
    states = seen(teacher, batch)
    assert states[0] and bool(states[1]) == getattr(teacher.config, "is_encoder_decoder", False)
    assert all(state.ndim == 3 for stack in states for state in stack)
    student = copy.deepcopy(teacher)
    sites = find_sites(student)
    masks = inject_(student, sites)
    keep = random_keep(sites, 1)
    keep |= {name: tuple(range(site.n_units)) for name, site in sites.items() if site.kind == "layers"}
    assert all(far(kind, student, teacher, batch).abs().max() < 1e-6 for kind in LAYERED)
    torch.manual_seed(0)
    for _, mask in masks.items():
        mask.mu.data.uniform_(0.5, 1.5)
    masks.set_keep(keep)
    masked = {kind: far(kind, student, teacher, batch) for kind in LAYERED}
    plan = PruningPlan(teacher.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)
    student = compact_(student, plan)
    for kind in LAYERED:
        dims = on_kept_features(Objective("classification", layers=kind), plan).dims
        assert (dims is None) == ("hidden" not in sites or len(keep["hidden"]) == sites["hidden"].n_units)
        student.zero_grad()
        found = far(kind, student, teacher, batch, dims=dims)
        assert found.shape == (2,) and found.min() > 0 and torch.allclose(found, masked[kind], rtol=1e-4, atol=1e-6)
        found.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", LAYERED)
def test_blocks_that_are_gone_leave_the_others_matched(kind):
    """Of three blocks the middle one goes: the first and the last, which nothing changed before it, stay matched."""
    teacher = build("llama", "LlamaForCausalLM")
    batch = inputs_of(teacher)
    student = copy.deepcopy(teacher)
    sites = find_sites(student)
    keep = {name: tuple(range(site.n_units)) for name, site in sites.items()}
    keep |= {name: () for name, site in sites.items() if site.kind == "layers" and ".1." in name}
    n_units = {name: site.n_units for name, site in sites.items()}
    student = compact_(student, PruningPlan("llama", n_units, keep))
    ours, theirs = seen(student, batch)[0], seen(teacher, batch)[0]
    assert len(ours) == 2 and len(theirs) == 3 and torch.equal(ours[0], theirs[0])
    found = far(kind, student, teacher, batch)
    assert torch.isfinite(found).all() and found.min() > 0


def test_few_blocks_of_a_deep_teacher_are_matched():
    teacher, student = build("bert", "BertModel", num_hidden_layers=9), build("bert", "BertModel", num_hidden_layers=6)
    batch = inputs_of(teacher)
    theirs = seen(teacher, batch)
    objective = Objective("encoder", layers="hidden")
    assert len(theirs[0]) == 9
    taught = [theirs[0][i] for i in (1, 3, 5, 8)]  # evenly spaced, the last among them
    assert len(taught) == TAUGHT
    ours = ([*seen(student, batch)[0][:2], *(state + 0.01 for state in taught)], [])
    apart = sum(((0.01 * torch.ones_like(t)).square().sum(-1) / t.square().sum(-1)).mean(1) for t in taught)
    assert torch.allclose(layers_apart(objective, student, ours, theirs, batch), apart.float(), rtol=1e-3)


def test_relations_know_no_rotation_and_hidden_states_do():
    teacher = build("bert", "BertModel")
    batch = inputs_of(teacher)
    states = seen(teacher, batch)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turned = ([state @ rotation for state in states[0]], [])
    for kind, same in (("relations", True), ("hidden", False)):
        found = layers_apart(Objective("encoder", layers=kind), teacher, turned, states, batch)
        assert bool(found.abs().max() < 1e-5) == same
    wider = ([torch.cat([state, torch.zeros_like(state)], dim=-1) for state in states[0]], [])
    assert layers_apart(Objective("encoder", layers="relations"), teacher, wider, states, batch).abs().max() < 1e-5


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.parametrize("family,head", [("llama", "LlamaForCausalLM"), ("t5", "T5ForConditionalGeneration")])
def test_a_turned_student_meets_its_directions_of_the_teacher(family, head, kind):
    """Turned but not cut it is its teacher; masked it is as far from it as compacted."""
    teacher = build(family, head)
    batch = inputs_of(teacher)
    axes = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)).double()).Q
    student = copy.deepcopy(teacher)
    rotate_(student, axes)
    assert far(kind, student, teacher, batch, axes=axes).abs().max() < 1e-5
    assert kind == "relations" or far(kind, student, teacher, batch).min() > 0.1
    sites = find_sites(student)
    masks = inject_(student, sites)
    keep = {name: tuple(range(site.n_units)) for name, site in sites.items()} | {"hidden": tuple(range(0, 24, 2))}
    masks.set_keep(keep)
    masked = far(kind, student, teacher, batch, axes=axes)
    plan = replace(full_plan(student, sites), keep=keep)
    student = compact_(student, plan)
    objective = on_kept_features(Objective("causal_lm", layers=kind, axes=axes), plan)
    assert objective.dims == keep["hidden"] and objective.axes is axes
    found = far(kind, student, teacher, batch, dims=objective.dims, axes=axes)
    assert found.min() > 0 and torch.allclose(found, masked, rtol=1e-4, atol=1e-6)


def test_relations_of_long_sequences_are_compared_at_some_tokens():
    """As many as fit: three in four of these patches change nothing."""
    teacher = build("vit", "ViTModel")
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 4 * RELATED, 6, generator=generator)
    theirs, objective = ours.clone(), Objective("classification", layers="relations")
    theirs[:, 1::4] += 1
    pixels = inputs_of(teacher)
    assert layers_apart(objective, teacher, ([ours], []), ([theirs], []), pixels).abs().max() < 1e-6
    theirs[:, ::4] += torch.randn(2, RELATED, 6, generator=generator)
    assert layers_apart(objective, teacher, ([ours], []), ([theirs], []), pixels).min() > 0


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.parametrize(
    "family,head", [("bert", "BertModel"), ("llama", "LlamaForCausalLM"), ("bart", "BartForConditionalGeneration")]
)
def test_padding_does_not_matter(kind, family, head):
    teacher, student = build(family, head), build(family, head, seed=1)
    name = "seq2seq_lm" if family == "bart" else "encoder"
    ids = torch.randint(5, 61, (3, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for extra in (0, 4):
        x = torch.nn.functional.pad(ids, (0, extra), value=0)
        mask = (torch.arange(6 + extra) < 6).long().expand_as(x)
        batch = {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}
        batch |= {"decoder_input_ids": torch.nn.functional.pad(x, (1, -1), value=2)} if family == "bart" else {}
        found.append(far(kind, student, teacher, batch, name=name))
    assert found[0].min() > 0 and torch.allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERED)
def test_a_student_comes_nearer_and_the_teacher_runs_once_a_batch(kind):
    """The loss is that of the outputs and of the blocks; without a teacher it is the labels' alone."""
    teacher, student = (build("bert", "BertForSequenceClassification", seed=seed) for seed in (0, 1))
    batch = inputs_of(teacher) | {"attention_mask": torch.ones(2, 7, dtype=torch.long), "labels": torch.tensor([0, 1])}
    objective, accelerator = Objective("classification", layers=kind), make_accelerator("fp32")
    loss_of, plain = (loss_with(each, teacher, accelerator) for each in (objective, replace(objective, layers="")))
    runs = []
    handle = teacher.register_forward_hook(lambda *_: runs.append(1))
    apart = far(kind, student, teacher, batch)
    runs.clear()
    assert torch.isclose(loss_of(student, batch), (plain(student, batch) + apart.mean()).to(torch.float32), rtol=1e-4)
    assert len(runs) == 2  # once by each of the two losses
    handle.remove()
    alone, as_plain = (loss_with(each, None, accelerator) for each in (objective, replace(objective, layers="")))
    assert torch.equal(alone(student, batch), as_plain(student, batch))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(student, batch).backward()
        optimizer.step()
    assert far(kind, student, teacher, batch).mean() < 0.5 * apart.mean()
    hooks = [module for model in (teacher, student) for module in model.modules() if module._forward_hooks]
    assert not hooks


@pytest.mark.parametrize(
    "head,data,kind,more",
    [
        (
            "BertForSequenceClassification",
            "reviews",
            "hidden",
            dict(divergence="balanced", shares="probe", probe_steps=1, kinds="heads,ffn,hidden", scope="blocks"),
        ),
        ("BertModel", "stories", "relations", dict(schedule="uba")),
        ("LlamaForCausalLM", "stories", "hidden", dict(divergence="reverse", schedule="cosine")),
        ("LlamaForCausalLM", "stories", "hidden", dict(rotate=True, shares="probe", probe_steps=1)),
        ("BartForConditionalGeneration", "stories", "relations", {}),
    ],
)
def test_a_run_learns_from_blocks_while_masks_learn_and_while_it_recovers(
    head, data, kind, more, folders, request, tmp_path, monkeypatch
):
    met = []

    def noted(objective, *rest):
        met.append((objective.layers, objective.divergence))
        assert (objective.axes is not None) == more.get("rotate", False)
        return layers_apart(objective, *rest)

    monkeypatch.setattr(distillation, "layers_apart", noted)
    out = tmp_path / "out"
    result = ibprune.prune(
        folders[head], 0.6, data=request.getfixturevalue(data), mask_steps=6, recover_steps=4, batch_size=8,
        max_length=16, distill=kind, output=str(out), audit=False, **(dict(shares="equal") | more),
    )  # fmt: skip
    assert set(met) == {(kind, more.get("divergence", "forward"))}
    tries = len(met) - 6 - 4  # at a step each; then candidate cuts are judged by their outputs alone
    assert 1 < tries <= 6 if "probe_steps" in more else tries == 0
    report = json.loads((out / "report.json").read_text())
    assert report["budget"]["achieved"] <= report["budget"]["limit"]
    given = {key: more[key] for key in ("divergence", "schedule") if key in more} | {"distill": kind}
    assert all(f"--{key} {value}" in report["command"] for key, value in given.items())
    assert all(math.isfinite(value) for value in result.report["pruned"]["metrics"].values())


@pytest.mark.parametrize("family,head", [("vit", "ViTForImageClassification"), ("swin", "SwinForImageClassification")])
def test_vision_transformers_learn_from_blocks_too(family, head, tmp_path, capsys):
    build(family, head, dtype=torch.float32).save_pretrained(tmp_path / "dense")
    save_pictures(tmp_path / "data" / "train", *pictures(32), ("down", "up"))
    save_pictures(tmp_path / "data" / "val", *pictures(16, seed=1), ("down", "up"))
    flags = ["--model", str(tmp_path / "dense"), "--data", str(tmp_path / "data"), "--budget", "0.6", "--quiet"]
    flags += ["--shares", "equal", "--mask-steps", "3", "--recover-steps", "2", "--batch-size", "16"]
    for kind in LAYERED:
        out = tmp_path / kind
        assert cli.main([*flags, "--distill", kind, "--output", str(out)]) == 0, capsys.readouterr().err
        assert json.loads((out / "report.json").read_text())["budget"]["cost"] == "params"


def test_where_blocks_cannot_be_compared_one_line_says_so(tmp_path, capsys):
    config = build_net("hf_resnet").config
    config.num_labels = 2
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "cnn")
    save_pictures(tmp_path / "data" / "train", *pictures(16), ("down", "up"))
    save_pictures(tmp_path / "data" / "val", *pictures(8, seed=1), ("down", "up"))
    capsys.readouterr()
    flags = ["--budget", "0.5", "--quiet", "--output", str(tmp_path / "out")]
    pictured = ["--model", str(tmp_path / "cnn"), "--data", str(tmp_path / "data"), "--image-size", "32"]
    for more, message in (
        ([*pictured, "--distill", "hidden"], "reads the blocks of a transformer, found a CNN ('resnet')"),
        (["--model", "m", "--kinds", "ffn,vocab", "--distill", "relations"], "pairs tokens, which 'vocab' changes"),
        (["--model", "m", "--distill", "hiden"], "--distill: found 'hiden': did you mean 'hidden'"),
    ):
        assert cli.main([*flags, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
