"""Several budgets from one mask run: nested plans, a folder each, and the trade between size and quality."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedModel

from ibprune.budget import (
    Budget,
    Keep,
    Scores,
    effective_fractions,
    least_cost,
    make_budget,
    present,
    solve_by_cost,
    solve_by_shares,
)
from ibprune.choosing import refit_
from ibprune.console import Quiet
from ibprune.cutting import as_before, is_learned, learn_keep, one_shot, per_cost, prepare_cut, ranked_by
from ibprune.decisions import make_decision, make_path, rank_kinds
from ibprune.engine import finish_trackers
from ibprune.folders import check_output, staged
from ibprune.inject import MASKS
from ibprune.loading import load
from ibprune.pipeline import Job, PruneResult, begin, recover, write
from ibprune.plans import PruningPlan
from ibprune.plots import draw_pareto
from ibprune.processes import on_main, shared
from ibprune.recipe import Recipe
from ibprune.report import PARETO, PARETO_SCHEMA
from ibprune.report_page import write_page
from ibprune.resuming import open_journal
from ibprune.saves import rng_state, set_rng_state
from ibprune.shares import as_pressure
from ibprune.structure import Structure
from ibprune.vib import only

Rung = tuple[PreTrainedModel, PruningPlan, Budget, Structure, dict]


def climb_down(recipe: Recipe, console: Quiet) -> tuple[PruneResult, ...]:
    """Prunes to several budgets. The output folder, with a folder per budget, appears complete or not at all.

    A folder that is complete stands in the state of the run until then, so that a resumed run takes it as it is.

    Raises:
        IBPruneError: Anything the user can mend, in one line.
    """
    folder = check_output(recipe.output, model=recipe.model)
    with open_journal(recipe, folder, console) as journal:
        job = begin(recipe, journal, console)
        done = journal.folder / "done"
        results = []
        for small, plan, budget, structure, decision in rungs(job, lambda least: recipe.budget):
            name = f"{budget.keep:g}"
            pruned = recover(job, small, plan, budget, structure, job.subject.feed, decision,
                             phase=f"recovering {name}")  # fmt: skip
            rng = rng_state(journal.data)
            if shared((done / name).is_dir()) and journal.read(f"written {name}") is not None:
                small = load(done / name)  # compares the report with its sums, too
                results.append(PruneResult(small, plan, json.loads((done / name / "report.json").read_text())))
                continue
            on_main(lambda place=done / name: shutil.rmtree(place, ignore_errors=True))  # of another plan
            results.append(write(job, pruned, done / name, budgets=list(recipe.budget)))
            set_rng_state(*rng, journal.data)  # what is measured and written decides nothing of the next
            journal.write(f"written {name}", {})
        reports, path = [result.report for result in results], decision["path"]
        on_main(lambda: _collect(reports, path, done, folder, kept=journal.kept()))
        journal.remove()
        finish_trackers(job.accelerator, job.metrics, results[-1].report["pruned"]["metrics"])
        return tuple(results)


def _collect(reports: list[dict], path: dict | None, done: Path, folder: Path, *, kept: str) -> None:
    """Moves the folders of all budgets into one, beside the trade between them and the path that led over them."""
    with staged(folder, kept=kept) as temporary:
        found = pareto(reports) | {"path": path}
        (temporary / PARETO).write_text(json.dumps(found, indent=1) + "\n")
        draw_pareto(found, temporary)
        write_page(temporary)
        for report in reports:  # last: what fails before leaves them in the state
            name = f"{report['budget']['keep']:g}"
            (done / name).rename(temporary / name)


def pareto(reports: list[dict]) -> dict:
    """What each budget costs and reaches, from the reports of one ladder."""
    keys = ("params", "macs", "memory_bytes", "file_bytes", "metrics", "latency_ms")
    points = [
        {"folder": f"{report['budget']['keep']:g}", "budget": report["budget"]}
        | {key: report["pruned"][key] for key in keys}
        for report in reports
    ]
    first = reports[0]
    dense = {key: first["dense"][key] for key in keys}
    return {
        "schema": PARETO_SCHEMA,
        "model": first["model"],
        "command": first["command"],
        "dense": dense,
        "points": points,
    }


def rungs(job: Job, choose: Callable[[float], tuple[float, ...]]) -> Iterator[Rung]:
    """What one mask run leaves at each budget, compacted and not recovered, and what decided it, the largest first.

    Scores, and how the cut is shared between kinds, come from the smallest budget: the others lie on the way there,
    where pool p (`ibprune.budget.pool_of`) keeps exp(-t * pressure[p]) of its units. Then the mask learning of one run
    goes down this way and stops at each budget: units that a budget cut never come back, so that plans are nested. Its
    steps are divided by how far each stretch goes down. Each model starts its recovery from the weights at its stop;
    the next stretch goes on from there without that recovery. One-shot scores refit each model apart, from the dense
    weights.

    Args:
        choose: The budgets, the largest first, by the least share that can be reached.

    Raises:
        BadRecipe: A budget cannot be reached.
    """
    recipe, subject = job.subject.recipe, job.subject
    with job.timer("cut"):
        student, structure, choice, _, _ = prepare_cut(
            job.dense, recipe, subject.feed, job.accelerator, job.console, found=subject.found,
            dtype=subject.loaded.dtype, journal=job.journal,
        )  # fmt: skip
        sites, cost_model = structure.sites, structure.costs.of(recipe.cost)
        least = least_cost(cost_model, sites, scope=recipe.scope, round_to=recipe.round_to, ties=structure.ties)
        shares = choose(least / cost_model.of_dense(scope=recipe.scope))
        budgets = [
            make_budget(cost_model, sites, keep=keep, scope=recipe.scope, round_to=recipe.round_to, ties=structure.ties)
            for keep in shares
        ]
        masks, scores, target = one_shot(student, structure, budgets[-1], choice)
        pressure = as_pressure(effective_fractions(target, sites, cost_model))
        start, within = per_cost(scores, structure, budgets[-1]), None
    above, done, points, stops, learned = 1.0, 0, [], [], is_learned(choice)
    for budget in budgets:
        with job.timer("cut"):
            known, notes = only(scores, within), {}
            keep = _target(known, structure, budget, pressure, shares=choice.shares)
            if learned:
                steps = max(1, round(recipe.mask_steps * (above - budget.keep) / max(1.0 - budgets[-1].keep, 1e-9)))
                keep, scores, notes = learn_keep(
                    student, masks, structure, budget, start, keep, choice, steps=steps, before=done, within=within,
                    phase=f"learning masks {budget.keep:g}",
                )  # fmt: skip
                points += [[done + step, *shares] for step, *shares in notes["path"]]
                done += steps
                stops.append([done, budget.keep])
                start = scores  # a gradual score goes on from its newest
            small = copy.deepcopy(student)
            if choice.reconstruct or not learned:
                keep = refit_(small, getattr(small, MASKS), sites, keep, choice, within=within)
            keep = as_before(choice.journal, f"kept units {budget.keep:g}", keep)
            plan = structure.plan(small, keep)
            small = structure.compact(small, plan)
            kinds = notes.get("kinds") or rank_kinds(known, present(keep, sites, structure.costs.params), sites)
            decision = make_decision(ranked_by(choice), kinds, make_path(points, stops, budget))
        yield small, plan, budget, structure, decision
        within, above = keep, budget.keep


def _target(scores: Scores, structure: Structure, budget: Budget, pressure: dict[str, float], *, shares: str) -> Keep:
    """The units that a budget keeps, on the way to the smallest."""
    sites, cost_model = structure.sites, structure.costs.of(budget.cost)
    if shares == "cost":
        return solve_by_cost(scores, sites, cost_model, budget)
    return solve_by_shares(scores, sites, cost_model, budget, pressure, effective=True)
