"""What a student learns from its teacher: divergences of the outputs."""

import math

import pytest
import torch

import ibprune
from ibprune import cli
from ibprune.errors import BadRecipe
from ibprune.losses import DIVERGENCES, Objective, distill_loss, divergence
from ibprune.recipe import make_recipe

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
    with pytest.raises(BadRecipe, match="--divergence says how outputs are distilled"):
        distill(distill=False, divergence="balanced")
    given = cli._prune_parser().parse_args(["--model", "m", "--no-distill"])
    assert given.distill == "none" and cli._prune_parser().parse_args([]).distill is None


def test_what_gives_no_distribution_has_no_divergence(folders, stories, tmp_path, capsys):
    flags = ["--model", folders["BertModel"], "--data", stories, "--budget", "0.5", "--quiet"]
    assert cli.main([*flags, "--divergence", "reverse", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "give no distributions to compare: leave it out" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_divergence_decides_what_the_model_becomes(folders, stories, tmp_path):
    weights = []
    for kind in DIVERGENCES:
        result = ibprune.prune(
            folders["LlamaForCausalLM"], 0.7, data=stories, score="vib", shares="cost", mask_steps=4, recover_steps=4,
            batch_size=8, max_length=16, divergence=kind, audit=False, output=str(tmp_path / kind),
        )  # fmt: skip
        assert all(math.isfinite(value) for value in result.report["pruned"]["metrics"].values())
        weights.append(torch.cat([p.flatten() for p in result.model.parameters()]))
    assert not any(len(a) == len(b) and torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1]))
