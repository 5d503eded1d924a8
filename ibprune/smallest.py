"""The smallest model that keeps a metric: candidates of one mask run, of which a bisection lets few recover."""

import math
from pathlib import Path

from ibprune.console import Quiet
from ibprune.errors import BadRecipe, did_you_mean
from ibprune.evaluation import LOWER_IS_BETTER, metric_names
from ibprune.folders import check_output
from ibprune.hub_folders import check_target
from ibprune.ladder import climb_down, rungs
from ibprune.pipeline import Job, Pruned, PruneResult, begin, finish, recover, run
from ibprune.recipe import Goal, Recipe, parse_goal
from ibprune.resuming import open_journal
from ibprune.saves import rng_state, set_rng_state
from ibprune.subject import Subject

CANDIDATES = 7  # budgets between the dense model and the least, in equal ratios: three of them recover
LEAST = 0.1  # share of the dense cost that the last candidate keeps, if so little can be reached


def carry_out(recipe: Recipe, console: Quiet) -> PruneResult | tuple[PruneResult, ...]:
    """Carries out a recipe: one result for one budget or `at_least`, one for each of several, the largest first."""
    if recipe.at_least is not None:
        return choose(recipe, console)
    return climb_down(recipe, console) if isinstance(recipe.budget, tuple) else run(recipe, console)


def choose(recipe: Recipe, console: Quiet) -> PruneResult:
    """Prunes to the smallest candidate that keeps a metric on the held-out rows.

    Candidates are the recipe's budgets, where it has several; else `CANDIDATES` of them down to its budget. A bisection
    takes it that a smaller model is never better; so at most log2(candidates + 1), rounded up, recover.

    Raises:
        BadRecipe: An unknown metric, or neither the dense model nor any candidate keeps it.
    """
    goal = parse_goal(recipe.at_least)
    folder = check_output(recipe.output, model=recipe.model)
    if recipe.push_to_hub:
        check_target(recipe.push_to_hub, private=recipe.private, revision=recipe.revision, empty=True)
    with open_journal(recipe, folder, console) as journal:
        return _choose(begin(recipe, journal, console, check=lambda subject: check_metric(goal, subject)), goal, folder)


def _choose(job: Job, goal: Goal, folder: Path) -> PruneResult:
    recipe, journal, console = job.recipe, job.journal, job.console
    threshold = threshold_of(goal, job.metrics[goal.metric])
    word = "at most" if goal.metric in LOWER_IS_BETTER else "at least"
    if not keeps(goal, job.metrics[goal.metric], threshold):
        raise BadRecipe(
            f"--at-least: expected {goal.metric} {word} {threshold:.4g}, but the dense model itself has "
            f"{job.metrics[goal.metric]:.4g}: ask for less, or train it further."
        )
    candidates = [(small.cpu(), *rest) for small, *rest in rungs(job, lambda least: budgets(recipe.budget, least))]
    rng = rng_state(journal.data)  # of every recovery, whichever others were tried
    low, high = 0, len(candidates)  # candidates before `low` keep the metric, those from `high` on do not
    tried, best = [], None
    while low < high:
        middle = (low + high) // 2
        small, plan, budget, structure, decision = candidates[middle]
        set_rng_state(*rng, journal.data)
        pruned = recover(job, small.to(job.accelerator.device), plan, budget, structure, job.subject.feed, decision,
                         phase=f"recovering {budget.keep:g}")  # fmt: skip
        value = pruned.metrics[goal.metric]
        kept = keeps(goal, value, threshold)
        tried.append({"budget": budget.keep, "value": value, "kept": kept})
        console.say(f"{goal.metric} {value:.4f} at {budget.keep:g}: {'kept' if kept else 'lost'}")
        if kept:
            best, low = pruned, middle + 1
        else:
            high = middle
    if best is None:
        raise BadRecipe(
            f"--at-least: expected {goal.metric} {word} {threshold:.4g}, but the largest candidate, "
            f"{candidates[0][2].keep:g} of the {recipe.cost}, has {tried[-1]['value']:.4g}: ask for less with "
            f"--resume, or delete '{journal.folder}' and give more --recover-steps."
        )
    return finish(job, best, folder, chosen=_record(recipe, goal, threshold, word, [c[2].keep for c in candidates],
                                                    tried, best))  # fmt: skip


def _record(
    recipe: Recipe, goal: Goal, threshold: float, word: str, candidates: list[float], tried: list[dict], best: Pruned
) -> dict:
    note = (
        f"The budget {best.budget.keep:g} was chosen as the smallest of {len(candidates)} candidates with "
        f"{goal.metric} {word} {threshold:.4g}; {len(tried)} of them were tried, on the same held-out rows that the "
        f"metrics are of: on other rows expect less."
    )
    record = {"at_least": recipe.at_least, "metric": goal.metric, "threshold": threshold}
    return record | {"candidates": candidates, "tried": tried, "note": note}


def budgets(asked: float | tuple[float, ...] | None, reachable: float) -> tuple[float, ...]:
    """The candidates, the largest first.

    Args:
        asked: The recipe's budget: the candidates themselves, or the least of them.
        reachable: The least share that can be reached.

    Example:
        >>> budgets(0.2, 0.05)
        (0.795, 0.631, 0.502, 0.399, 0.317, 0.252, 0.2)
    """
    if isinstance(asked, tuple):
        return asked
    least = asked or max(LEAST, math.ceil(1000 * reachable) / 1000)
    steps = (round(least ** (i / CANDIDATES), 3) for i in range(1, CANDIDATES))
    return tuple(dict.fromkeys((*steps, least)))


def check_metric(goal: Goal, subject: Subject) -> None:
    """Raises `BadRecipe` where the held-out rows are not judged by a metric, with the nearest name."""
    names = metric_names(subject.feed)
    if goal.metric not in names:
        raise BadRecipe(f"--at-least: '{subject.data.name}' is not judged by '{goal.metric}': "
                        f"{did_you_mean(goal.metric, names)}.")  # fmt: skip


def threshold_of(goal: Goal, dense: float) -> float:
    """What the metric must come to, by that of the dense model: of a perplexity, 80 % and 125 % say the same."""
    if not goal.relative:
        return goal.value
    inverse = goal.metric in LOWER_IS_BETTER and goal.value < 1
    return dense / goal.value if inverse else dense * goal.value


def keeps(goal: Goal, value: float, threshold: float) -> bool:
    """Whether a value is as good as the threshold; NaN is not."""
    return value <= threshold if goal.metric in LOWER_IS_BETTER else value >= threshold
