"""The command line: recipes and flags agree, bad input is one line and exit code 2, nothing is half-written."""

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from conftest import TINY, build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import ibprune
from ibprune import cli, doctor, flags, hub, recipe_files
from ibprune.console import Quiet
from ibprune.errors import BadRecipe, is_out_of_memory
from ibprune.models import ALIASES
from ibprune.recipe import Recipe, make_recipe, parse_settings, parse_shares

ROOT = Path(__file__).parents[1]


def run(capsys, *argv) -> tuple[int, str]:
    code = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.err


def refused(capsys, *argv) -> str:
    code, message = run(capsys, *argv)
    last = message.strip().splitlines()[-1]
    assert code == 2 and last.startswith("ibprune: error: ") and "Traceback" not in message
    return last


def test_every_recipe_key_is_a_flag_and_every_flag_a_key():
    actions = {a.dest for a in flags.prune_parser()._actions if not isinstance(a, argparse._HelpAction)}
    assert actions - {"recipe", "set", "num_processes", "debug", "quiet", "json"} == set(Recipe.model_fields)
    own = {"recipe", "set", "num_processes", "estimate", "sensitivity", "flops_per_second", "utilisation"}
    assert {a.dest for a in flags.plan_parser()._actions} - {"help", "debug", "json"} - own <= set(Recipe.model_fields)


def test_a_home_folder_is_found_where_no_shell_did_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = make_recipe({"model": Path("~/model"), "budget": 0.5, "data": "~/rows.tsv", "output": "~/out"})
    assert (found.model, found.data, found.output) == tuple(str(tmp_path / x) for x in ("model", "rows.tsv", "out"))
    assert make_recipe({"model": "user/~name", "budget": 0.5}).model == "user/~name"


def test_the_command_of_a_recipe_makes_the_same_recipe():
    """It stands on the model card, without where the result went."""
    for values in (
        {"task": "sst2"},
        {"data": "my films.tsv", "text_columns": ("a b", "c"), "audit": False, "distill": False, "lr": 1e-5},
        {"data": "photos", "augment": (), "image_size": 32, "kinds": "channels", "cost": "macs", "seed": 7},
    ):
        recipe = make_recipe({"model": "bert-base", "budget": 0.3} | values)
        words = shlex.split(make_recipe(recipe.model_dump() | {"output": "o", "push_to_hub": "a/b"}).command())
        given = cli._given(flags.prune_parser().parse_args(words[1:]), without=())
        assert words[0] == "ibprune" and make_recipe({k: given[k] for k in given if k in Recipe.model_fields}) == recipe


def test_every_recipe_parses_and_its_budget_can_be_planned_from_the_published_config():
    published = json.loads((ROOT / "scripts" / "published_configs.json").read_text())
    for name, file in recipe_files.shipped().items():
        recipe = make_recipe({}, file=name)
        assert make_recipe({}, file=file) == recipe and recipe_files.purpose(file)
        values = dict(published[ALIASES[recipe.model]]["config"])
        asked = {key: getattr(recipe, key) for key in ("cost", "scope", "kinds", "round_to")}
        if recipe.model == "resnet-50":
            asked["image_size"] = 32  # its convolutions are really run, for where their channels go
        found = ibprune.plan(AutoConfig.for_model(values.pop("model_type"), **values), recipe.budget, **asked)
        assert 0.95 * found["budget"]["limit"] < found["budget"]["achieved"] <= found["budget"]["limit"], name


def test_the_page_of_recipes_has_them_all():
    """Its figures take minutes to make again (`scripts/recipe_table.py`)."""
    rows = re.findall(r"^\| (\S+) \| (\S+) \| ([\d.]+) of", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    made = {name: make_recipe({}, file=name) for name in recipe_files.shipped()}
    assert rows == [(name, recipe.model, f"{recipe.budget:g}") for name, recipe in made.items()]


def test_recipes_are_listed_shown_and_copied_but_never_over_a_file(tmp_path, capsys):
    assert cli.main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(recipe_files.shipped())
    assert cli.main(["recipes", "copy", "smoke", str(tmp_path)]) == 0
    assert cli.main(["recipes", "show", "smoke"]) == 0
    assert capsys.readouterr().out.endswith((tmp_path / "smoke.yaml").read_text())
    assert cli.main(["recipes", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(Recipe.model_fields)
    (tmp_path / "smoke.yaml").write_text("mine")
    for words, message in (
        (["copy", "smoke", str(tmp_path)], "expected a new file, found"),
        (["copy", "smoke", str(tmp_path / "no" / "x.yaml")], "expected a folder"),
        (["copy", "smoke", "/proc/x.yaml"], "could not write"),
        (["show", "smok"], "did you mean 'smoke'"),
        (["show"], "expected the name of a recipe after show"),
    ):
        assert cli.main(["recipes", *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["--recipe", "smok"]) == 2 and "did you mean 'smoke'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.yaml"]
    assert (tmp_path / "smoke.yaml").read_text() == "mine"


def test_the_doctor_says_what_is_there_and_what_it_lacks(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and found["optional"]["peft"]
    assert found["disk"]["cache"] > 0 and not found["hub"]["reachable"]  # offline, as all tests are
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "packages" in out and all(f"note: {note}" in out for note in found["notes"])
    rich = found | {"devices": {"a GPU": 8e10}, "bf16": True, "memory": 1e11, "disk": {"here": 1e12, "cache": 1e12}}
    rich |= {
        "hub": found["hub"] | {"reachable": True, "token": True},
        "optional": dict.fromkeys(found["optional"], "1"),
    }
    assert doctor.notes(rich) == []
    poor = rich | {"disk": {"here": 1e9, "cache": 1e12}, "optional": rich["optional"] | {"peft": None}}
    full, missing = doctor.notes(poor)
    assert full == "1.0 GB are free on the disk of this folder." and missing.endswith("peft (--recovery lora).")


@pytest.mark.parametrize(
    "line,key,value",
    [
        ("seed=3", "seed", 3),
        ("batch-size=8", "batch_size", 8),
        ("lr=1e-4", "lr", 1e-4),
        ("lr=null", "lr", None),
        ("kinds=[heads, ffn]", "kinds", ("heads", "ffn")),
        ("kinds=heads,ffn", "kinds", ("heads", "ffn")),
        ("budget=[0.3, 0.5]", "budget", (0.5, 0.3)),
        ("budget=0.1..0.2", "budget", (0.2, 0.1)),
        ("at_least=accuracy=99%", "at_least", "accuracy=99%"),
        ("distill=no", "distill", "none"),
        ("audit=false", "audit", False),
        ("augment=[]", "augment", ()),
        ("data=2024", "data", "2024"),
        ("data=null", "data", None),
        ("data=a: [b", "data", "a: [b"),
        ('data="a # b"', "data", "a # b"),
        ("label_column=", "label_column", ""),
        ("output = x=y ", "output", "x=y"),
    ],
)
def test_a_recipe_takes_its_keys_one_by_one(line, key, value):
    assert getattr(make_recipe({"model": "m", "budget": 0.5} | parse_settings([line])), key) == value


@pytest.mark.parametrize(
    "words,expected",
    [
        ("--set scroe=vib", "--set: unknown recipe key 'scroe': did you mean 'score'?"),
        ("--set score=fischer", "--score: found 'fischer': did you mean 'fisher'?"),
        ("--set kinds=[heads,fnn]", "--kinds: unknown kind 'fnn': did you mean 'ffn'?"),
        ("--set kinds=[heads", "--set: could not read the value of 'kinds', '[heads'"),
        ("--set kinds={heads:1}", "--kinds: "),
        ("--set text_columns=[1]", "--text-columns: "),
        ("--set seed=soon", "--seed: "),
        ("--set seed=yes", "--seed: expected a number or text, found True"),
        ("--set seed", "--set: expected KEY=VALUE, such as seed=1, found 'seed'"),
        ("--set =3", "--set: expected KEY=VALUE"),
        ("--set seed=1 --set seed=2", "--set: 'seed' is given twice"),
        ("--seed 1 --set seed=2", "--set: 'seed' is given twice"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "plan"])
def test_what_cannot_be_set_is_named_in_one_line(verb, words, expected, capsys):
    assert cli.main([verb, "--model", "m", "--budget", "0.5", *shlex.split(words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and "Traceback" not in line


def test_what_is_set_reaches_a_plan_over_its_recipe(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    transformers.BertConfig(num_hidden_layers=2).save_pretrained(tmp_path / "m")
    file.write_text(f"model: {tmp_path / 'm'}\nbudget: 0.5\nscore: fisher\nmask_steps: 0\n")
    flags = ["plan", "--recipe", str(file), "--json"]
    assert cli.main([*flags, "--set", "kinds=[ffn]", "--set", "budget=0.9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget"]["keep"] == 0.9 and [kind for kind in found["groups"] if found["groups"][kind]["cut"]] == [
        "ffn"
    ]
    assert cli.main([*flags, "--set", "lr=1e-3"]) == 2
    assert "expected --estimate beside --lr" in capsys.readouterr().err


def test_recipes_are_strict_and_flags_override_them(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: minilm\nbudget: 0.3\nscore: fisher\n")
    assert make_recipe({"score": "random"}, file=file).score == "random"
    assert make_recipe({}, file=file).score == "fisher"
    file.write_text("model: minilm\nbuget: 0.3\n")
    with pytest.raises(BadRecipe, match="unknown recipe key 'buget': did you mean 'budget'"):
        make_recipe({}, file=file)
    for text in ("- a\n", "model: [", "model: minilm\nbudget: two\n", "model: minilm\nbudget: 0.3\nseed: -1\n"):
        file.write_text(text)
        with pytest.raises(BadRecipe):
            make_recipe({}, file=file)
    saved = make_recipe({"model": "minilm", "budget": 0.3, "kinds": "ffn,heads"})
    saved.save(file)
    assert make_recipe({}, file=file) == saved
    assert yaml.safe_load(file.read_text())["kinds"] == ["ffn", "heads"]


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--model", "bert-bse", "--budget", "0.5"], "did you mean 'bert-base'"),
        (["--model", "./nowhere", "--budget", "0.5"], "found './nowhere'"),
        (["--model", "minilm", "--budget", "0"], "(0, 1]"),
        (["--model", "minilm", "--budget", "1.5"], "(0, 1]"),
        (["--model", "minilm", "--budget", "nan"], "(0, 1]"),
        (
            ["--model", "minilm", "--budget", "half"],
            "expected a share in (0, 1], such as 0.3, or several, such as 0.5,0.3 or 0.1..0.9, found 'half'",
        ),
        (["--model", "minilm"], "--budget"),
        (["--budget", "0.5"], "--model"),
        (["--model", "minilm", "--budget", "0.5", "--scor", "vib"], "did you mean '--score'"),
        (["--model", "minilm", "--budget", "0.5", "--score", "fischer"], "did you mean 'fisher'"),
        (["--model", "minilm", "--budget", "0.5", "--cost", "flops"], "expected one of latency, macs, memory, params"),
        (["--model", "minilm", "--budget", "0.5", "--kinds", "head"], "did you mean 'heads'"),
        (["--model", "minilm", "--budget", "0.5", "--batch-size", "0"], "--batch-size"),
        (["--model", "minilm", "--budget", "0.5", "--lr", "inf"], "--lr"),
        (["--model", "minilm", "--budget", "0.5", "--seed", "99999999999"], "--seed"),
        (["--recipe", "missing.yaml"], "could not read the recipe"),
        (["prun", "--model", "minilm"], "did you mean 'prune'"),
        (["plan", "--model", "minilm", "--budgte", "1"], "did you mean '--budget'"),
        (["plan", "--model", "minilm", "--lr", "1"], "expected --estimate beside --lr"),
    ],
)
def test_bad_flags(flags, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *flags)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_said_in_a_line(folders, reviews, capsys, tmp_path, monkeypatch):
    def too_much(*_, **__):
        torch.empty(2**45)  # the allocator's own error

    monkeypatch.setattr("ibprune.training.evaluate_model", too_much)
    line = refused(
        capsys, "train", "--model", folders["BertForSequenceClassification"], "--data", reviews, "--max-length", "16",
        "--output", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert line.startswith("ibprune: error: memory ran out (") and "tried to allocate" in line and "--resume" in line
    assert list(tmp_path.iterdir()) == []
    for error in (MemoryError(), torch.OutOfMemoryError("no"), OSError(12, "Cannot allocate memory")):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_bad_models_data_and_folders(folders, reviews, stories, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.hub_reachable.cache_clear()
    bert, classifier = folders["BertModel"], folders["BertForSequenceClassification"]
    common = ["--budget", "0.5", "--mask-steps", "0", "--recover-steps", "0", "--output", "out", "--quiet"]
    assert "out of reach" in refused(capsys, "--model", "bert-base", "--budget", "0.5")
    assert "did you mean 'sst2'" in refused(capsys, "--model", bert, "--task", "sst", *common)
    assert "Hub" in refused(capsys, "--model", bert, "--task", "sst2", *common)
    assert "found both" in refused(capsys, "--model", bert, "--task", "sst2", "--data", reviews, *common)
    assert "found nothing at" in refused(capsys, "--model", bert, "--data", "none.csv", *common)
    columns = ["--data", reviews, "--text-columns", "sentense"]
    assert "did you mean 'sentence'" in refused(capsys, "--model", classifier, *columns, *common)
    assert "needs labelled data" in refused(capsys, "--model", classifier, "--data", stories, *common)
    assert "no units 'kv_groups'" in refused(
        capsys, "--model", bert, "--data", stories, "--kinds", "kv_groups", *common
    )
    low = ["--model", bert, "--data", stories, *common, "--budget", "0.001"]
    assert "ask for at least" in refused(capsys, *low)
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "bertt"}')
    assert "did you mean 'bert'" in refused(capsys, "--model", "unknown", *common)
    (tmp_path / "unknown" / "config.json").write_text("{")
    assert "could not read" in refused(capsys, "--model", "unknown", *common)
    shutil.copytree(bert, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["pooler.dense.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    assert "'pooler.dense.bias'" in refused(capsys, "--model", "nan", "--data", stories, *common)
    weights.pop("pooler.dense.bias")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    assert "missing" in refused(capsys, "--model", "nan", "--data", stories, *common)
    (tmp_path / "out").mkdir()
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "out" / "keep.txt").write_text("mine")
    assert "new or empty" in refused(capsys, "--model", bert, "--data", stories, *common)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "unknown", "nan"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep.txt"]


@pytest.mark.parametrize(
    "change,expected",
    [
        ([1, 2], "expected keys and values"),
        (None, "expected keys and values"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 0}, "does not describe"),
        ({"num_attention_heads": 5}, "multiple"),
        ({"architectures": ["LlamaForCausalLM"]}, "expected a bert class"),
        ({"architectures": "BertModel"}, "expected a bert class"),
    ],
)
def test_configs_that_describe_no_model(change, expected, stories, tmp_path, capsys):
    raw = TINY["bert"]().to_dict() | change if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert expected in refused(capsys, "plan", "--model", tmp_path, "--budget", "0.5")
    flags = ["--budget", "0.5", "--data", stories, "--output", tmp_path.parent / "never", "--quiet"]
    refused(capsys, "--model", tmp_path, *flags)


def test_a_model_without_a_tokenizer_is_refused(folders, stories, tmp_path, capsys):
    shutil.copytree(folders["BertModel"], tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    message = refused(capsys, "--model", tmp_path / "model", "--budget", "0.5", "--data", stories, "--quiet",
                      "--output", tmp_path / "out")  # fmt: skip
    assert "expected a tokenizer" in message


def test_python_callers_may_pass_paths_and_are_checked_alike(folders, tmp_path):
    for _ in range(2):  # a submodule of the same name would take the function's place after the first call
        assert ibprune.plan(Path(folders["BertModel"]), 0.5)["budget"]["cost"] == "params"
    for wrong in ({"cost": "bogus"}, {"scope": "bogus"}, {"kinds": ("head",)}):
        with pytest.raises(BadRecipe):
            ibprune.plan(folders["BertModel"], 0.5, **wrong)
    assert make_recipe({"model": Path("m"), "budget": 0.5, "output": Path("o")}).output == "o"
    with pytest.raises(BadRecipe, match="found True"):
        make_recipe({"model": "minilm", "budget": True})
    assert make_recipe({"model": "minilm", "budget": 0.5, "kinds": "heads, ffn"}).kinds == ("heads", "ffn")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(BadRecipe):
        cli.main(["--model", "nowhere", "--budget", "0.5", "--debug"])


def test_plan_from_the_config_alone(tmp_path, capsys):
    TINY["bert"]().save_pretrained(tmp_path)
    assert cli.main(["plan", "--model", str(tmp_path), "--budget", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= {"dense", "predicted", "budget", "reachable_keep", "tier", "groups"}
    assert found["budget"]["achieved"] == found["predicted"]["params"] <= found["budget"]["limit"]
    assert found["budget"]["limit"] == found["dense"]["params"] // 2
    assert found["tier"] == "remote_code" and set(found["groups"]) >= {"heads", "ffn", "layers", "embedding_rank"}
    TINY["llama"]().save_pretrained(tmp_path)
    assert cli.main(["plan", "--model", str(tmp_path), "--kinds", "heads"]) == 0
    assert "kv_groups" in capsys.readouterr().out


def test_a_plan_of_several_budgets_is_a_line_for_each(tmp_path, capsys):
    TINY["bert"]().save_pretrained(tmp_path)
    model, kinds = str(tmp_path), ("heads", "ffn", "layers")
    assert cli.main(["plan", "--model", model, "--budget", "0.1..0.9", "--kinds", ",".join(kinds), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    points = {point["keep"]: point for point in found["budgets"] if "unreachable" in point}
    reached = [point for point in found["budgets"] if "budget" in point]
    assert [*(p["budget"]["keep"] for p in reached), *points] == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert all(share < found["reachable_keep"] for share in points) and points
    assert all(point["budget"]["keep"] >= found["reachable_keep"] for point in reached)
    for point in reached[:2]:  # as it is planned alone
        alone = ibprune.plan(model, point["budget"]["keep"], kinds=kinds)
        assert point == {key: alone[key] for key in point} and set(point["kept"]) == set(kinds)
    assert cli.main(["plan", "--model", model, "--budget", "0.7,1", "--kinds", ",".join(kinds)]) == 0
    said = capsys.readouterr().out
    assert "trust_remote_code" in said and "plain transformers" in said  # what is cut by layers, and what is whole
    assert cli.main(["plan", "--model", model, "--budget", "0.001,0.002"]) == 2
    assert "the budget 0.002 allows" in capsys.readouterr().err


def test_a_plan_says_what_each_kind_owns_and_reaches_alone(tmp_path):
    TINY["bert"]().save_pretrained(tmp_path)
    model = str(tmp_path)
    groups = ibprune.plan(model)["groups"]
    for kind in ("heads", "ffn", "layers", "embedding_rank"):
        assert groups[kind]["alone"] == ibprune.plan(model, kinds=(kind,))["reachable_keep"] < 1
    assert groups["hidden"]["alone"] is None and groups["hidden"]["owns"] > 0.9  # is not cut here, and is in all
    bert = transformers.BertModel(TINY["bert"]())
    ffn = sum(
        p.numel() for layer in bert.encoder.layer for p in (*layer.intermediate.parameters(), layer.output.dense.weight)
    )
    assert groups["ffn"]["owns"] == pytest.approx(ffn / bert.num_parameters())
    config = TINY["bert"]()
    config.architectures = ["BertForMaskedLM"]
    head = ibprune.plan(config, vanilla=True)["groups"]
    assert head["heads"]["alone"] == head["hidden"]["alone"] < head["ffn"]["alone"] < 1  # tied: they go together


@pytest.mark.parametrize("text,expected", [
    ("0.3", (0.3,)), ("0.3,0.5,0.3", (0.5, 0.3)), ("0.2..0.4", (0.4, 0.3, 0.2)), ("0.4..0.2", (0.4, 0.3, 0.2)),
    ("0.1..0.3,0.25", (0.3, 0.25, 0.2, 0.1)), ("0.15..0.35", (0.35, 0.25, 0.15)), ("0.7..1", (1.0, 0.9, 0.8, 0.7)),
    ([0.5, "0.3"], (0.5, 0.3)), (1, (1.0,)), ("0.3..0.3", (0.3,)),
])  # fmt: skip
def test_shares_are_read_in_one_way(text, expected):
    assert parse_shares(text) == expected


@pytest.mark.parametrize("text,expected", [
    *((text, "expected a share in (0, 1], such as 0.3, or several, such as 0.5,0.3 or 0.1..0.9, found ")
      for text in ("0.1..0.95", "0.1..", "..", "0.1..0.2..0.3", "half", True, {"a": 1})),
    ("0..0.5", "found 0"), ("0.5..1e300", "found 1e+300"), ("0.5..inf", "found inf"), ("nan..nan", "found nan"),
    ("nan", "found nan"), ((), "found 0"),
])  # fmt: skip
def test_other_shares_are_refused(text, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        parse_shares(text)


def test_a_vision_model_is_planned_from_its_config_and_asks_for_pictures(stories, tmp_path, capsys):
    build("vit", "ViTForImageClassification", dtype=torch.float32).save_pretrained(tmp_path / "vit")
    assert cli.main(["plan", "--model", str(tmp_path / "vit"), "--budget", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs_length"] == 5 and set(found["groups"]) == {"hidden", "heads", "layers", "ffn"}
    output = tmp_path / "out"
    common = ["--quiet"]
    flags = ["--model", tmp_path / "vit", "--budget", "0.5", "--output", output, *common]
    assert "expected pictures" in refused(capsys, *flags)
    assert "picture" in refused(capsys, *flags, "--data", stories)
    assert "picture" in refused(capsys, "audit", tmp_path / "vit", tmp_path / "vit", "--data", stories, *common)
    assert not output.exists()


def test_the_width_is_cut_by_default_where_there_is_a_head():
    for family, head, cut in (("clip", "CLIPForImageClassification", True), ("clip_vision_model", None, False)):
        config = TINY[family]()
        config.architectures = [head] if head else None
        assert ibprune.plan(config, 0.5)["groups"]["hidden"]["cut"] == cut


def test_importing_ibprune_and_asking_for_help_load_nothing_heavy():
    code = "import sys, ibprune; ibprune.__version__; from ibprune import cli, flags; "
    code += "flags.prune_parser().format_help(); "
    code += "print([m for m in ('torch', 'numpy', 'transformers', 'pydantic', 'rich', 'shtab') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_report_and_compare_start_without_torch(tmp_path):
    folder = shutil.copytree(ROOT / "model_cards" / "minilm-0.3", tmp_path / "run")
    code = f"import sys; from ibprune import cli; codes = [cli.main([verb, {str(folder)!r}]) for verb in "
    code += "('report', 'compare')]; print(codes, [m for m in ('torch', 'transformers', 'scipy', 'pydantic') "
    code += "if m in sys.modules], file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[0, 0] []"


def test_a_command_leaves_the_signals_as_they_were(folders, stories, tmp_path, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    class Looking(Quiet):
        def track(self, items, what, total):
            seen.append(signal.getsignal(signal.SIGTERM))
            yield from items

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "Quiet", Looking)
        flags = ["--data", stories, "--max-length", "16", "--score", "magnitude", "--recover-steps", "1", "--no-audit"]
        flags += ["--quiet", "--output", str(tmp_path / "out")]
        assert cli.main(["--model", folders["BertModel"], "--budget", "0.5", *flags]) == 0
    assert seen and seen[0] not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
