"""Budgets on latency: the formula finds what a clock is made of, tables are read strictly, and runs stay below."""

import json
import re
from pathlib import Path

import pytest
import torch
from cnn_models import build_net
from conftest import TINY, build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ibprune
from ibprune import cli
from ibprune.channels import find_channels
from ibprune.console import Quiet
from ibprune.costs import FEMTOSECONDS_PER_MS
from ibprune.errors import BadRecipe
from ibprune.latency import LatencyTable, load_latency, measure_latency, time_modules
from ibprune.module_pipeline import compact_module_
from ibprune.structure import choose_kinds, prepare_, prepare_traced_, with_latency
from ibprune.timing import timed_text

SHORT = dict(mask_steps=4, recover_steps=2, batch_size=8, max_length=16, audit=False)
READ = {"inputs": torch.zeros(2, 3, 12, 12)}  # by the measured ResNet


HEADS = {"bert": ("BertForSequenceClassification", {}), "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True})}


def structure_of(name):
    if name != "resnet":
        head, changes = HEADS[name]
        model = build(name, head, dtype=torch.float32, **changes)
        return model, prepare_(model, choose_kinds(model, (), cost="latency"), None)
    model = build_net("resnet", dtype=torch.float32)
    example = torch.zeros(2, 3, 12, 12)
    return model, prepare_traced_(model, find_channels(model, example).sites, example, compact_module_)


def made_up_seconds(model: nn.Module) -> tuple[float, dict[str, float]]:
    """A clock that goes by shapes: a constant for every module, its features and their product."""
    own = {}
    for path, module in model.named_modules():
        if next(module.parameters(), None) is None:
            continue
        own[path] = 2e-6
        for name, weight in module.named_parameters(recurse=False):
            if name == "weight" and weight.ndim > 1:
                own[path] += 1e-7 * weight.shape[1] + 3e-7 * weight.shape[0] + 1e-9 * weight.numel()
            elif name == "weight":
                own[path] += 5e-7 * len(weight)
    return 1.25 * sum(own.values()) + 1e-5, own


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_the_formula_is_what_the_clock_is_made_of(name):
    model, structure = structure_of(name)

    def compacted(kept):
        keep = {site: tuple(range(count)) for site, count in kept.items()}
        fresh, again = structure_of(name)
        return again.compact(fresh, again.plan(fresh, keep))

    def clock(model, inputs):
        return made_up_seconds(model)

    table = measure_latency(
        model, structure.everything, structure.sites, compacted, {}, round_to=1, seed=0, console=Quiet(), clock=clock
    )
    assert table.error < 1e-6
    assert table.dense_ms == pytest.approx(1000 * made_up_seconds(model)[0], abs=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        kept = {
            site.name: int(torch.randint(max(site.min_units, 1), site.n_units + 1, (), generator=generator))
            for site in structure.sites.values()
        }
        said = table.model(table.model.n_units | kept) / FEMTOSECONDS_PER_MS
        assert said == pytest.approx(1000 * made_up_seconds(compacted(kept))[0], rel=1e-5)
    if name == "bert":  # a sub-layer that goes takes its modules' time along
        gone = [site for site in structure.sites if structure.sites[site].kind == "layers"][0]
        fewer = table.model.n_units | {gone: 0}
        assert table.model(fewer) < table.model(table.model.n_units)


def test_modules_are_timed_without_those_they_call():
    model = build_net("resnet", dtype=torch.float32)
    whole, own = time_modules(model, {"inputs": torch.zeros(2, 3, 12, 12)})
    assert whole > 0 and all(seconds > 0 for seconds in own.values())
    assert set(own) == {path for path, module in model.named_modules() if next(module.parameters(), None) is not None}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def by_shapes(monkeypatch):
    """Tiny models take all their time to start operations: what a budget reaches would be left to chance."""
    monkeypatch.setattr("ibprune.latency.time_modules", lambda model, inputs: made_up_seconds(model))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    model, structure = structure_of("resnet")
    found = with_latency(structure, model, READ, table=None, round_to=1, seed=0, console=Quiet())
    path = tmp_path_factory.mktemp("latency") / "latency.json"
    found.costs.latency.save(path)
    return model, structure, found.costs.latency, path


def test_a_table_comes_back_as_it_was_saved(measured):
    model, structure, table, path = measured
    assert load_latency(path, structure.everything, torch.device("cpu"), READ) == table


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda data: data | {"format": "ibprune.plan/1"}, "expected format"),
        (lambda data: data | {"device": "an abacus"}, "measured on 'an abacus'"),
        (lambda data: data | {"shape": {"inputs": [8, 3, 12, 12]}}, "give the same --batch-size"),
        (lambda data: data | {"extra": 1}, "could not read"),
        (
            lambda data: data | {"model": data["model"] | {"n_units": data["model"]["n_units"] | {"conv1": 3}}},
            "another model",
        ),
        (lambda data: data | {"model": data["model"] | {"terms": [[-1, "conv1"]]}}, "at least 0"),
        (lambda data: data | {"model": data["model"] | {"terms": [[5, "nowhere"]]}}, "'nowhere'"),
        (lambda data: [1], "expected format"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, said, measured, tmp_path):
    model, structure, _, path = measured
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BadRecipe, match=said):
        load_latency(bad, structure.everything, torch.device("cpu"), READ)


def test_a_run_on_a_budget_of_latency_and_again_by_its_table(folders, reviews, tmp_path, by_shapes):
    first, second = tmp_path / "first", tmp_path / "second"
    job = dict(data=reviews, cost="latency", **SHORT)
    model = folders["BertForSequenceClassification"]
    result = ibprune.prune(model, 0.8, output=str(first), **job)
    budget = result.report["budget"]
    assert budget["cost"] == "latency" and budget["achieved"] <= budget["limit"] and budget["error"] >= 0
    assert all(len(result.plan.keep[name]) == result.plan.n_units[name] for name in ("vocab", "embedding_rank")
               if name in result.plan.keep)  # fmt: skip
    assert "ms, by a measured table" in (first / "README.md").read_text()
    assert "latency.json" in result.report["sha256"]
    again = ibprune.prune(model, 0.8, output=str(second), latency_table=str(first / "latency.json"), **job)
    assert again.plan == result.plan
    _check_planned(model, first / "latency.json", result.report["budget"], tmp_path)


def _check_planned(model: str, path: Path, budget: dict, tmp_path: Path) -> None:
    """A plan says what a run's table says of what stays, on whatever device the table was measured."""
    data = json.loads(path.read_text()) | {"device": "an abacus"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    table = LatencyTable.from_dict(data)
    found = ibprune.plan(model, 0.6, latency_table=other)
    assert found["latency"] == {"device": "an abacus", "shape": table.shape, "error": table.error}
    dense, small = found["dense"]["latency_ms"], found["predicted"]["latency_ms"]
    assert dense == pytest.approx(table.model(table.model.n_units) / FEMTOSECONDS_PER_MS)
    assert max(found["kept"][kind] for kind in ("heads", "ffn")) < 1 and 0.3 * dense < small < dense
    assert "latency_ms" not in ibprune.plan(model, 0.6)["dense"] and ibprune.plan(model, 0.6)["latency"] is None
    timed = ibprune.plan(model, 0.8, cost="latency", latency_table=path)
    assert timed["budget"]["limit"] == budget["limit"] >= timed["budget"]["achieved"]
    assert timed["predicted"]["latency_ms"] == pytest.approx(timed["budget"]["achieved"], abs=1e-4)
    with pytest.raises(BadRecipe, match="was measured on another model"):
        ibprune.plan(TINY["llama"](), 0.6, latency_table=path)
    with pytest.raises(BadRecipe, match="under a latency is found in the run"):
        ibprune.plan(model, 0.8, cost="latency", vanilla=True, latency_table=path)


@pytest.mark.parametrize("budget", [0.01, (0.9, 0.01)])
def test_a_budget_that_no_latency_reaches_leaves_no_state(budget, folders, reviews, tmp_path, by_shapes):
    job = dict(data=reviews, cost="latency", output=str(tmp_path / "out"), **SHORT)
    with pytest.raises(BadRecipe, match="ask for at least"):
        ibprune.prune(folders["BertForSequenceClassification"], budget, **job)
    assert not any(tmp_path.iterdir())


def test_a_module_on_a_budget_of_latency(by_shapes, tmp_path):
    model = build_net("resnet", dtype=torch.float32)
    data = TensorDataset(torch.rand(16, 3, 12, 12), torch.arange(16) % 2)
    job = dict(cost="latency", train_loader=DataLoader(data, batch_size=2), score="fisher", recover_steps=0)
    result = ibprune.prune(model, 0.7, **job)
    assert result.report["budget"]["achieved"] <= result.report["budget"]["limit"]
    result.save(tmp_path / "small")
    again = ibprune.prune(model, 0.7, latency_table=str(tmp_path / "small" / "latency.json"), **job)
    assert again.plan == result.plan and again.latency == result.latency


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--latency-table", "t.json"], "expected --cost latency beside --latency-table"),
        (["--cost", "latency", "--scope", "blocks"], "a latency is that of the whole model"),
        (["--cost", "latency", "--kinds", "ffn,vocab"], "'vocab' takes no time to cut for"),
        (["--cost", "latency", "--latency-table", "nowhere.json"], "could not read 'nowhere.json'"),
    ],
)
def test_bad_flags(flags, said, folders, reviews, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", folders["BertForSequenceClassification"], "--data", reviews, "--budget", "0.5", "--quiet"]
    assert cli.main([*words, "--output", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_plan_says_that_it_cannot_time(folders, capsys):
    assert cli.main(["plan", "--model", folders["BertForSequenceClassification"], "--cost", "latency"]) == 2
    assert "plan with params or macs" in capsys.readouterr().err


def test_a_plan_prints_what_its_table_says(measured, tmp_path, capsys, by_shapes):
    TINY["bert"]().save_pretrained(tmp_path / "bert")
    model, structure = structure_of("bert")
    table = with_latency(structure, model, timed_text(model, 2, 8), table=None, round_to=1, seed=0, console=Quiet())
    table.costs.latency.save(tmp_path / "latency.json")
    words = ["plan", "--model", str(tmp_path / "bert"), "--latency-table"]
    assert cli.main([*words, str(measured[3])]) == 2  # of a CNN
    assert "was measured on another model" in capsys.readouterr().err
    words.append(str(tmp_path / "latency.json"))
    assert cli.main([*words, "--budget", "0.6"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"dense [\d,]+ parameters, [\d.]+ M MACs, [\d.]+ ms", said) and "input_ids 2 x 8" in said
    assert cli.main([*words, "--budget", "0.9,0.7", "--cost", "latency"]) == 0
    said = capsys.readouterr().out
    assert "latency" in said and "ms per unit" in said and " ms " in said
