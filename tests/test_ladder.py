"""Several budgets from one mask run: nested plans, a folder each, the smallest that keeps a metric."""

import json

import pytest
import torch
from test_resuming import STEPS, Stopping, same, unverified  # noqa: F401

import ibprune
from ibprune import cli, smallest
from ibprune.errors import BadRecipe
from ibprune.plans import PruningPlan
from ibprune.plots import draw_pareto

BUDGETS = (0.7, 0.5, 0.35)


@pytest.fixture(scope="module")
def classifier(folders, reviews):
    return dict(model=folders["BertForSequenceClassification"], data=reviews) | STEPS | dict(recover_steps=4)


def check_nested(plans: list[PruningPlan]) -> None:
    for large, small in zip(plans, plans[1:]):
        assert all(set(small.keep[name]) <= set(large.keep[name]) for name in large.keep)
        assert sum(small.kept().values()) < sum(large.kept().values())


@pytest.fixture(scope="module")
def whole(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder") / "out"
    console = Stopping()
    results = ibprune.prune(**classifier, budget=BUDGETS, output=folder, console=console)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    return folder, results, console.ran


def test_each_budget_is_met_in_a_folder_of_its_own_and_plans_are_nested(whole):
    folder, results, ran = whole
    beside = {"pareto.json", "pareto.png", "pareto.svg", "report.html"}
    assert {path.name for path in folder.iterdir()} == {"0.7", "0.5", "0.35"} | beside
    plans = [PruningPlan.load(folder / f"{keep:g}" / "plan.json") for keep in BUDGETS]
    check_nested(plans)
    for keep, plan, result in zip(BUDGETS, plans, results):
        report = json.loads((folder / f"{keep:g}" / "report.json").read_text())
        assert report == result.report and result.plan == plan
        assert report["budget"]["keep"] == keep and report["budgets"] == list(BUDGETS)
        assert 0.9 * report["budget"]["limit"] <= report["budget"]["achieved"] <= report["budget"]["limit"]
        assert "--budget 0.7,0.5,0.35" in report["command"]
        assert f'ibprune.load("out/{keep:g}")' in (folder / f"{keep:g}" / "README.md").read_text()
        model = ibprune.load(folder / f"{keep:g}")
        assert sum(p.numel() for p in model.parameters()) == report["pruned"]["params"]
    learned = [stage for stage in ran if stage[0].startswith("learning masks")]
    assert learned == [("learning masks 0.7", 4), ("learning masks 0.5", 3), ("learning masks 0.35", 2)]  # 9 steps
    assert [total for what, total in ran if what.startswith("recovering")] == [4, 4, 4]
    decisions = [json.loads((folder / f"{keep:g}" / "decision.json").read_text()) for keep in BUDGETS]
    stops = [[4, 0.7], [7, 0.5], [9, 0.35]]
    assert [decision["path"]["stops"] for decision in decisions] == [stops[:1], stops[:2], stops]
    steps = [step for step, *_ in decisions[-1]["path"]["points"]]
    assert steps == sorted(steps) and steps[-1] == 9 and 4 in steps
    ends = {step: spent for step, spent, _ in decisions[-1]["path"]["points"]}
    assert ends[9] <= 0.35 < ends[4] <= 0.7
    assert any(None in kind["scores"] for kind in decisions[-1]["kinds"].values())  # cut by a larger budget
    assert not any(None in kind["scores"] for kind in decisions[0]["kinds"].values())
    page = (folder / "report.html").read_text()
    assert "asked was 0.7 after step 4, 0.5 after step 7, 0.35 after step 9" in page
    found = json.loads((folder / "pareto.json").read_text())
    assert [point["folder"] for point in found["points"]] == ["0.7", "0.5", "0.35"]
    assert [point["params"] for point in found["points"]] == [r.report["pruned"]["params"] for r in results]


@pytest.mark.parametrize("command", ["push {} user/model", "bench {} {}", "audit {} {}", "export {} --to onnx"])
def test_who_names_the_folder_of_all_budgets_is_shown_those_inside(command, whole, capsys):
    assert cli.main([part.format(whole[0]) for part in command.split()]) == 2
    error = capsys.readouterr().err
    assert "It holds the folders 0.35, 0.5, 0.7: name one of them" in error and error.count("\n") == 1


def test_the_saved_recipe_of_any_folder_repeats_them_all(whole, tmp_path, capsys):
    folder = whole[0]
    flags = ["--recipe", str(folder / "0.5" / "recipe.yaml"), "--output", str(tmp_path / "again"), "--quiet"]
    assert cli.main(flags) == 0
    for keep in ("0.7", "0.5", "0.35"):
        same(folder / keep, tmp_path / "again" / keep)
    out = capsys.readouterr().out
    assert "pareto.json has this table" in out and "0.35" in out and "accuracy" in out


@pytest.mark.parametrize("what,n", [("learning masks 0.5", 1), ("recovering 0.5", 2), ("recovering 0.35", 3)])
def test_a_ladder_goes_on_where_it_was_cut_short(what, n, whole, classifier, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**classifier, budget=BUDGETS, output=tmp_path / "out", console=Stopping(what, n))
    assert not (tmp_path / "out").exists()
    console = Stopping()
    results = ibprune.prune(**classifier, budget=BUDGETS, output=tmp_path / "out", resume=True, console=console)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(results) == 3
    assert not any(stage == "recovering 0.7" for stage, _ in console.ran)
    for keep in ("0.7", "0.5", "0.35"):
        same(whole[0] / keep, tmp_path / "out" / keep)


def test_folders_that_are_complete_stay_where_drawing_fails(classifier, tmp_path, monkeypatch):
    def stop(found, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("ibprune.ladder.draw_pareto", stop)
    values = classifier | dict(score="magnitude", shares="equal", recover_steps=0)
    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**values, budget=(0.9, 0.8), output=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out.partial" / "done").iterdir()} == {"0.9", "0.8"}


@pytest.mark.parametrize(
    "head,data,values",
    [
        ("LlamaForCausalLM", "stories", dict(score="fisher", shares="cost")),
        ("LlamaForCausalLM", "stories", dict(score="magnitude", shares="equal", cost="macs")),
        ("BertModel", "stories", dict(shares="equal", round_to=2, kinds="heads,ffn,layers,hidden,embedding_rank")),
        ("BertForSequenceClassification", "reviews", dict(shares="cost", round_to=1)),
        ("BertForSequenceClassification", "reviews", dict(score="gradual", shares="equal")),
        ("BertForSequenceClassification", "reviews", dict(score="kwon", shares="equal", round_to=1)),
    ],
)
def test_plans_are_nested_whatever_scores_and_shares_the_units(head, data, values, folders, request, tmp_path):
    source = request.getfixturevalue(data)
    values = dict(model=folders[head], data=source, budget="0.8,0.6,0.4", output=tmp_path / "out") | STEPS | values
    results = ibprune.prune(**values | dict(recover_steps=0))
    check_nested([result.plan for result in results])
    assert all(r.report["budget"]["achieved"] <= r.report["budget"]["limit"] for r in results)


def test_each_budget_is_refitted(classifier, tmp_path):
    common = classifier | dict(shares="equal", recover_steps=0, budget=(0.9, 0.8), score="fisher")
    plain = ibprune.prune(**common, output=tmp_path / "plain")
    refitted = ibprune.prune(**common, reconstruct=True, output=tmp_path / "refitted")
    assert [result.plan for result in plain] == [result.plan for result in refitted]
    for before, after in zip(plain, refitted):
        before, after = (result.model.state_dict() for result in (before, after))
        differ = {name for name in before if not torch.equal(before[name], after[name])}
        assert any("output.dense" in name for name in differ) and not any("word_embeddings" in n for n in differ)


def test_the_smallest_model_that_keeps_a_metric_is_found(classifier, tmp_path, monkeypatch):
    """The metric is made up: the share of parameters that stayed, so that the right answer is known."""

    def share(model, feed, objective, *, dense=None, console, what):
        count = sum(p.numel() for p in model.parameters())
        dense_count.append(count) if dense is None else None
        return {"accuracy": count / dense_count[0]}

    dense_count: list[int] = []
    monkeypatch.setattr("ibprune.pipeline.evaluate_model", share)
    values = classifier | dict(recover_steps=1, score="magnitude", shares="equal")
    result = ibprune.prune(**values, at_least="accuracy=42%", budget=0.3, output=tmp_path / "out")
    chosen, candidates = result.report["chosen"], smallest.budgets(0.3, 0.0)
    assert candidates == tuple(chosen["candidates"]) and len(candidates) == 7 and len(chosen["tried"]) == 3
    right = next(i for i, keep in enumerate(candidates) if keep < 0.42) - 1
    assert result.report["budget"]["keep"] == candidates[right]
    assert [step["kept"] for step in chosen["tried"]] == [step["value"] >= 0.42 for step in chosen["tried"]]
    assert "on other rows expect less" in chosen["note"]
    assert chosen["note"] in (tmp_path / "out" / "README.md").read_text()
    assert "--at-least accuracy=42% --budget 0.3" in result.report["command"].replace("'", "") or (
        "--budget 0.3 --at-least accuracy=42%" in result.report["command"].replace("'", "")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    values |= dict(budget=(0.9, 0.6, 0.3), output=tmp_path / "listed")
    assert ibprune.prune(**values, at_least="accuracy=0.5").report["budget"]["keep"] == 0.6
    with pytest.raises(
        BadRecipe, match="accuracy at least 0.95, but the largest candidate, 0.9 of the params, has 0.8"
    ):
        ibprune.prune(**values | dict(output=tmp_path / "none"), at_least="accuracy=0.95")
    console = Stopping()
    values |= dict(output=tmp_path / "none", resume=True, console=console)
    assert ibprune.prune(**values, at_least="accuracy=0.7").report["budget"]["keep"] == 0.9  # of the same candidates
    assert not any(what.startswith(("learning masks", "recovering")) for what, _ in console.ran)
    same(tmp_path / "none", afresh(**values | dict(output=tmp_path / "afresh"), at_least="accuracy=0.7"))


def afresh(output, **values):
    ibprune.prune(**values, output=output)
    return output


def test_what_cannot_be_kept_or_is_no_metric(classifier, folders, stories, tmp_path, capsys):
    common = [
        "--model",
        classifier["model"],
        "--data",
        classifier["data"],
        "--output",
        str(tmp_path / "out"),
        "--quiet",
    ]
    common += ["--finetune-steps", "3"]

    def refused(*flags) -> str:
        assert cli.main([*common, *flags]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("ibprune: error: ")
        return message

    assert "not judged by 'acuracy': did you mean 'accuracy'?" in refused("--at-least", "acuracy=0.8")
    assert list(tmp_path.iterdir()) == []  # said before anything was trained
    for text in ("accuracy", "accuracy=high", "=0.5", "accuracy=-1%", "accuracy=nan"):
        assert "expected METRIC=VALUE" in refused("--at-least", text)
    assert "the dense model itself has" in refused("--at-least", "accuracy=1.01", "--finetune-steps", "0")
    assert list(tmp_path.iterdir()) == []
    assert "differ in their first six digits" in refused("--budget", "0.5,0.50000001")
    assert "push a folder of the several" in refused("--budget", "0.5,0.3", "--push-to-hub", "me/small")
    assert "'vocab' is cut for one budget" in refused("--budget", "0.5,0.3", "--kinds", "ffn,vocab")


@pytest.mark.parametrize("text,dense,good,bad", [
    ("perplexity=20", 10.0, 20.0, 20.1), ("perplexity=80%", 10.0, 12.5, 12.6),
    ("perplexity=125%", 10.0, 12.5, 12.6), ("accuracy=80%", 0.5, 0.4, 0.39),
    ("accuracy=0.8", 0.5, 0.8, float("nan")),
])  # fmt: skip
def test_a_lower_perplexity_is_a_better_one(text, dense, good, bad):
    goal = smallest.parse_goal(text)
    threshold = smallest.threshold_of(goal, dense)
    assert smallest.keeps(goal, good, threshold) and not smallest.keeps(goal, bad, threshold)


def test_budgets_are_read_alike_from_flags_yaml_and_python(tmp_path):
    from ibprune.recipe import make_recipe

    file = tmp_path / "recipe.yaml"
    for text in ("[0.2, 0.5, 0.3]", "0.3,0.5,0.2"):
        file.write_text(f"model: m\nbudget: {text}\n")
        assert make_recipe({}, file=file).budget == (0.5, 0.3, 0.2)
    assert make_recipe({"model": "m", "budget": [0.5, 0.5]}).budget == 0.5
    for bad in ("0.5,", "0.5,2", [], [0.5, None], {"a": 1}):
        with pytest.raises(BadRecipe, match="expected a share"):
            make_recipe({"model": "m", "budget": bad})


@pytest.mark.parametrize("cost", ["params", "macs", "memory", "latency"])
def test_the_plot_is_over_what_the_budget_counts(cost, tmp_path):
    side = {"params": 10, "macs": 20, "memory_bytes": 25, "latency_ms": {"median": 30.0}, "metrics": {"accuracy": 0.5}}
    point = side | {"folder": "0.5", "budget": {"cost": cost}}
    draw_pareto({"dense": side, "points": [point]}, tmp_path)
    assert (tmp_path / "pareto.png").exists() and (tmp_path / "pareto.svg").exists()


def test_names_of_metrics_are_those_that_are_measured(folders, reviews, stories):
    from ibprune.console import Quiet
    from ibprune.evaluation import evaluate_model, metric_names
    from ibprune.recipe import make_recipe
    from ibprune.subject import load_subject

    for head, data in (
        ("BertForSequenceClassification", reviews), ("BertModel", stories), ("LlamaForCausalLM", stories),
        ("BartForConditionalGeneration", stories),
    ):  # fmt: skip
        subject = load_subject(make_recipe({"model": folders[head], "budget": 1, "data": data}), Quiet())
        model, feed = subject.loaded.model, subject.feed
        found = evaluate_model(model, feed, feed.objective, console=Quiet(), what="")
        assert tuple(found) == metric_names(feed)


def test_held_out_rows_that_training_has_too_are_counted(folders, tmp_path):
    from ibprune.recipe import make_recipe
    from ibprune.subject import load_subject

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "the film was good\t1\nthe plot is dull\t0\n" * 20)
    (folder / "dev.tsv").write_text("sentence\tlabel\nthe  film was good \t1\na story\t0\nthe plot is dull\t0\n")
    console = Stopping()
    recipe = make_recipe({"model": folders["BertForSequenceClassification"], "budget": 1, "data": str(folder)})
    assert load_subject(recipe, console).overlap == 2
    assert any(line.startswith("warning: 2 of the 3 held-out rows") for line in console.said)
