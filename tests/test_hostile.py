"""What is damaged, made up or meant ill: files that were found by fuzzing, and names that are markup."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, random_keep
from safetensors.torch import load_file, save_file

import ibprune
from ibprune import plots
from ibprune.audit_output import audit_section
from ibprune.checksums import REPORT, check_files, write_report
from ibprune.cli import main
from ibprune.console import Terminal, printable
from ibprune.data import load_data
from ibprune.errors import BadData, BadRecipe, IBPruneError, PlanMismatch, UnsupportedModel
from ibprune.flags import prune_parser
from ibprune.folders import write_model
from ibprune.json_files import read_json
from ibprune.latency import LatencyTable
from ibprune.legacy import read_state
from ibprune.loading import load_any
from ibprune.markdown import block, code, plain, quoted
from ibprune.model_card import model_card, renamed_card
from ibprune.models import find_source, load_dense
from ibprune.module_files import load_module
from ibprune.planning import plan
from ibprune.plans import PruningPlan
from ibprune.recipe import make_recipe
from ibprune.resuming import open_journal
from ibprune.sites import find_sites
from ibprune.surgery import compact_
from ibprune.tables import table

DEEP = "[" * 20_000 + "]" * 20_000
LONG = "9" * 5_000
CARDS = Path(__file__).parents[1] / "model_cards"
HOSTILE = '<img src=x onerror=alert(1)>\n```\n# "quoted" `code` $x$ [a](javascript:b) | \x1b[2J\u202e'


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """A pruned folder with a report, as a run leaves it."""
    path = tmp_path_factory.mktemp("hostile") / "small"
    path.mkdir()
    model = build("bert", "BertForMaskedLM", dtype=torch.float32)
    sites = find_sites(model)
    found = PruningPlan("bert", {n: s.n_units for n, s in sites.items()}, random_keep(sites, 5))
    write_model(compact_(model, found), tokenizer, found, path)
    write_report({"schema": "ibprune.report/1", "pruned": {"params": 12345}}, path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "small")


def edited(folder, change, file="config.json"):
    """The folder with a file of it changed, and no sums that would say so."""
    (folder / REPORT).unlink(missing_ok=True)
    raw = json.loads((folder / file).read_text())
    change(raw)
    (folder / file).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("text", [DEEP, LONG])
def test_nesting_and_numbers_beyond_python_are_refused_wherever_json_is_read(text, folder, tmp_path):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ValueError):
        read_json(file)
    with pytest.raises(PlanMismatch, match="file.json"):
        PruningPlan.load(file)
    state = tmp_path / "out.partial"
    state.mkdir()
    (state / "recipe.json").write_text(text)
    with (
        pytest.raises(BadRecipe, match="recipe.json"),
        open_journal(make_recipe({"model": "m", "budget": 1}), tmp_path / "out", Terminal()),
    ):
        pass
    for name, read in ((REPORT, ibprune.load), ("config.json", ibprune.load), ("config.json", lambda f: plan(str(f)))):
        copy = shutil.copytree(folder, tmp_path / f"{name}-{read.__name__}", dirs_exist_ok=True)
        (copy / name).write_text(text)
        if name != REPORT:
            (copy / REPORT).unlink()
        with pytest.raises(IBPruneError, match=name):
            read(copy)


@pytest.mark.parametrize("record", ['{"format": "ibprune.state/4", "recipe": [1], "subject": {}}', "[]", "3"])
def test_a_state_of_another_shape_is_refused(record, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "recipe.json").write_text(record)
    recipe = make_recipe({"model": "m", "budget": 1, "resume": True})
    with pytest.raises(BadRecipe, match="recipe.json"), open_journal(recipe, tmp_path / "out", Terminal()):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "model: m\nbudget: 1" + "0" * 400,
        "model: 2026-13-45",
        "model: !!int ''\nbudget: 1",
        "model: " + "[" * 5_000,
        "a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\nbudget: 0.5",
    ],
)
def test_recipes_that_yaml_itself_chokes_on_are_refused(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(BadRecipe):
        make_recipe({}, file=tmp_path / "recipe.yaml")


def test_a_value_that_refers_to_itself_a_million_times_is_not_written_out(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "model: *a11", "budget: *a11"]))
    for key in ("model", "budget", "score"):
        (tmp_path / "recipe.yaml").write_text("\n".join([lines[0].replace("a0:", "seed:"), *lines[1:], f"{key}: *a11"]))
        with pytest.raises(BadRecipe) as error:
            make_recipe({"model": "m", "budget": 1} if key == "score" else {}, file=tmp_path / "recipe.yaml")
        assert len(str(error.value)) < 5_000


@pytest.mark.parametrize("key", ["budget", "at_least", "kinds", "score"])  # a path may be no text
def test_bytes_of_a_command_line_that_are_no_text_are_refused(key):
    with pytest.raises(BadRecipe):
        make_recipe({"model": "m", "budget": 0.5} | {key: "x\udcff"})


def test_bytes_of_a_data_file_that_are_no_text_are_refused(tmp_path):
    rows = b"".join(b'{"text": "a word \xcd", "label": %d}\n' % (i % 2) for i in range(24))
    (tmp_path / "rows.jsonl").write_bytes(rows)
    with pytest.raises(BadData, match="UTF-8"):
        load_data(str(tmp_path / "rows.jsonl"))


def test_an_argument_of_line_breaks_is_refused():
    with pytest.raises(BadRecipe):
        prune_parser().parse_args(["--model", "m", "\u2028"])


@pytest.mark.parametrize(
    "change",
    [
        {"error": "x"},
        {"error": "0.1"},
        {"dense_ms": math.nan},
        {"dense_ms": True},
        {"model": {"n_units": {}, "terms": [[10**400]]}},
        {"model": {"n_units": {}, "terms": [["5"]]}},
        {"model": {"n_units": {"a": "5"}, "terms": [[5, "a"]]}},
        {"model": {"n_units": "{'a': 5}", "terms": [[5, "a"]]}},
    ],
)
def test_latency_tables_of_another_kind_are_refused(change):
    good = {"format": "ibprune.latency/1", "device": "cpu", "shape": {}, "model": {"n_units": {}, "terms": [[5]]},
            "dense_ms": 1.0, "error": 0.1, "plans": []}  # fmt: skip
    assert LatencyTable.from_dict(good).model({}) == 5
    with pytest.raises((ValueError, TypeError)):
        LatencyTable.from_dict(good | change)


@pytest.mark.parametrize("selected", [[["x"]], [1], "ab"])
def test_a_module_s_folder_of_another_shape_is_refused(selected, tmp_path):
    (tmp_path / "ibprune.json").write_text(
        json.dumps({"format": "ibprune.module/1", "shapes": {}, "selected": selected, "sha256": ""})
    )
    with pytest.raises(PlanMismatch, match="selected"):
        load_module(tmp_path, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "key,value",
    [
        ("intermediate_size", 10**12),
        ("intermediate_size", 2**30),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 3000),
        ("num_labels", 10**9),
        ("hidden_size", 12 * 10**7),
    ],
)
def test_a_config_that_claims_what_no_weights_bear_out_reserves_nothing(key, value, folder, folders, tmp_path):
    """What it claims would not fit into any memory; the limit on it shows that nobody tries."""

    def claim(raw):
        raw[key] = value
        if key in raw.get("ibprune", {}).get("dense", {}):
            raw["ibprune"]["dense"][key] = value

    params = sum(p.numel() for p in ibprune.load(folder).parameters())
    if key in ("intermediate_size", "hidden_size") and value < 2**31:  # overruled by the shapes in the folder
        assert sum(p.numel() for p in ibprune.load(edited(folder, claim)).parameters()) == params
    else:
        with pytest.raises(UnsupportedModel, match=key):
            ibprune.load(edited(folder, claim))
    dense = edited(shutil.copytree(folders["BertForMaskedLM"], tmp_path / "dense"), claim)
    with pytest.raises(IBPruneError):
        load_any(str(dense))
    with pytest.raises(UnsupportedModel):
        plan(str(dense), 0.5)


@pytest.mark.parametrize("named", ["2", 2, "nn", "save"])
def test_a_config_cannot_name_a_dtype_that_is_none(named, folders, tmp_path):
    """Such a name may be that of something else in torch."""
    dense = edited(shutil.copytree(folders["BertForMaskedLM"], tmp_path / "dense"), lambda raw: raw.update(dtype=named))
    with pytest.raises(IBPruneError):
        plan(str(dense), 0.5)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_cannot_name_code_of_the_hub(key, folder, folders, tmp_path):
    """transformers fetches and runs a kernel where a config has the name of its repo as the attention."""
    named = lambda raw: raw.update({key: "someone/kernel"})  # noqa: E731
    with pytest.raises(UnsupportedModel, match="no code of others"):
        ibprune.load(edited(folder, named))
    dense = edited(shutil.copytree(folders["BertForMaskedLM"], tmp_path / "dense"), named)
    for read in (load_any, plan):
        with pytest.raises(UnsupportedModel, match="no code of others"):
            read(str(dense))


def test_weights_come_from_the_folder_alone(folder, tmp_path):
    """A list of shards could name files elsewhere, an adapter's config another model."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (folder / REPORT).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PlanMismatch, match="beside it"):
        ibprune.load(folder)
    (tmp_path / "elsewhere.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index | {"weight_map": dict.fromkeys(tensors, "part.safetensors")})
    )
    assert ibprune.load(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(PlanMismatch, match="adapter"):
        ibprune.load(folder)


@pytest.mark.parametrize("names", [None, 3, {}, [], [3], ["PreTrainedModel"], ["os"]])
def test_architectures_of_another_kind_are_refused(names, folder):
    def name(raw):
        raw["architectures"] = raw["ibprune"]["architecture"] = names

    with pytest.raises(IBPruneError):
        ibprune.load(edited(folder, name))


def test_a_digit_that_changed_in_the_report_is_noticed(folder):
    assert ibprune.load(folder)
    path = folder / REPORT
    text = path.read_text()
    path.write_text(text.replace("12345", "12346"))
    with pytest.raises(PlanMismatch, match="figures in .*report.json"):
        ibprune.load(folder)
    path.write_text(json.dumps(json.loads(text), indent=4))  # other lines, the same figures
    assert ibprune.load(folder)
    raw = json.loads(text)
    del raw["own_sha256"]  # of an older version
    path.write_text(json.dumps(raw))
    assert ibprune.load(folder)


def test_damage_to_a_folder_that_plain_transformers_loads_is_noticed(tmp_path, tokenizer):
    """Its config says nothing of ibprune, so that it was read as any dense checkpoint, without its checksums."""
    model = build("bert", "BertForMaskedLM", dtype=torch.float32)
    assert write_model(model, tokenizer, None, tmp_path) == "vanilla"
    write_report({}, tmp_path)
    assert load_any(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanMismatch, match="model.safetensors.*altered"):
        load_any(str(tmp_path))
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"intermediate_size": 20', '"intermediate_size": 28'))
    with pytest.raises(PlanMismatch, match="config.json.*altered"):
        plan(str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "plan.json"])
def test_what_gives_texts_and_units_their_numbers_must_be_there_to_compare(file, folder):
    (folder / file).unlink()
    assert ibprune.load(folder)  # which reads none of them
    with pytest.raises(PlanMismatch, match=f"'{file}'.*found none"):
        load_any(str(folder))
    (folder / file).mkdir()
    with pytest.raises(PlanMismatch, match=f"'{file}'.*found none"):
        load_any(str(folder))


def test_a_report_that_is_a_folder_is_no_report(folder):
    (folder / REPORT).unlink()
    (folder / REPORT).mkdir()
    with pytest.raises(PlanMismatch, match=REPORT):
        check_files(folder)


def test_a_push_sends_nothing_from_beyond_the_folder(folder, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(BadRecipe, match="link 'notes.txt'"):
        ibprune.push(str(folder), "me/small")
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to(folder / "config.json")
    with pytest.raises(BadRecipe, match="HF_HUB_OFFLINE"):  # the next thing that is asked
        ibprune.push(str(folder), "me/small")


def test_the_longest_names_are_refused_as_others_are():
    for refused, call in (
        (BadRecipe, lambda name: plan(name)),
        (BadData, lambda name: load_data(name)),
        (IBPruneError, lambda name: load_any(name)),
    ):
        for name in ("x" * 300, "x" * 5_000):
            with pytest.raises(refused):
                call(name)


@pytest.mark.parametrize("verb", [
    ["report", "x" * 300], ["compare", "x" * 300], ["convert-legacy", "x" * 300, "--output", "out"],
    ["recipes", "copy", "smoke", "x" * 300], ["--recipe", "x" * 300], ["mi-benchmark", "--xy", "x" * 300],
])  # fmt: skip
def test_what_the_file_system_refuses_is_one_line(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(verb) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "too long" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [
    lambda: ibprune.plan(torch.nn.Linear(2, 2), 0.5), lambda: ibprune.plan(None, 0.5),
    lambda: ibprune.bench(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), lambda: ibprune.load(None),
    lambda: ibprune.load(3),
])  # fmt: skip
def test_objects_where_names_belong_are_named(call):
    with pytest.raises(BadRecipe, match="found a (Linear|NoneType|int)"):
        call()


def test_paths_are_names(folder):
    assert find_source(folder) == find_source(str(folder))


def test_a_reader_that_leaves_ends_the_command_in_silence(tmp_path):
    script = f"{sys.executable} -m ibprune recipes show smoke | true; exit ${{PIPESTATUS[0]}}"
    plain = os.environ | {"PYTHONUNBUFFERED": "1"}
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=plain)
    assert run.stderr == "" and run.returncode in (0, 141)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
def test_weights_of_pytorch_that_are_none_are_refused(content, tmp_path):
    """An empty file, a pointer of git-lfs, a file with objects: by the loader, and by what converts older tools."""
    folder = tmp_path / "model"
    build("bert", "BertModel").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if content is None:
        torch.save({"weight": Path("a")}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(BadRecipe, match="damaged, or hold more than tensors"):
        load_dense(find_source(str(folder)))
    with pytest.raises(BadRecipe, match="holds more than tensors" if content is None else "damaged one: get it again"):
        read_state(folder)


def test_names_in_a_card_are_shown_and_never_markup():
    report = json.loads((CARDS / "minilm-0.3" / "report.json").read_text())
    report |= {"model": HOSTILE, "data": HOSTILE, "command": f"ibprune --model {HOSTILE}", "device": HOSTILE}
    card = model_card(report, None, name=f"me/{HOSTILE}")
    body = card.split("\n---\n", 1)[1]
    assert "<img" not in body.replace(code(HOSTILE), "").replace(block(report["command"], "bash"), "").replace(
        quoted(f"me/{HOSTILE}"), ""
    )
    assert "\x1b" not in card and "\u202e" not in card
    (title,) = (line for line in body.splitlines() if line.startswith("# "))
    assert title.endswith("of its params")
    snippets = re.findall(r"^```python\n(.*?)\n```$", body, re.DOTALL | re.MULTILINE)
    assert snippets and all(compile(snippet, "card", "exec") for snippet in snippets)
    assert all("alert" not in name for snippet in snippets for name in compile(snippet, "card", "exec").co_names)


def test_spans_and_blocks_of_code_end_where_the_name_ends():
    assert code(HOSTILE).startswith("````") and "\n" not in code(HOSTILE)
    assert block(HOSTILE, "bash").splitlines()[0] == "````bash" and len(block(HOSTILE, "bash").splitlines()) == 3
    assert not set("<>\n\x1b") & set(plain(HOSTILE)) and json.loads(quoted('a"\n')) == 'a"\n'


def test_a_card_of_a_report_that_lacks_anything_is_left_as_it_is(tmp_path):
    (tmp_path / "README.md").write_text('Auto.from_pretrained("x")')
    whole = json.loads((CARDS / "minilm-0.3" / "report.json").read_text()) | {"audit": None}
    for report in ({}, {"schema": "ibprune.report/1"}, whole | {"model": 3}, []):
        (tmp_path / REPORT).write_text(json.dumps(report))
        assert renamed_card(tmp_path, "me/small") is None


def test_layers_of_any_name_are_drawn(tmp_path, monkeypatch):
    """A name with two dollars was read as a formula."""
    found = json.loads((CARDS / "minilm-0.3" / "audit.json").read_text())
    for layer in found["layers"]:
        layer["name"] = r"$\frac$ <b>"
    monkeypatch.setattr(plots, "PLOTS", {"retained": plots.PLOTS["retained"]})
    assert plots.draw_audit(found, tmp_path) == ["retained"]
    assert "<b>" not in (tmp_path / "retained.svg").read_text()


def test_layers_of_any_name_are_tabled():
    side = {"lower": None, "upper": None, "status": "too_few_samples"}
    layer = {"name": HOSTILE, "pooling": "mean", "I_XL": {"before": side, "after": side, "retained": None},
             "V_LY": {"status": "not_applicable", "before": None, "after": None}, "V_token": None, "V_next": None,
             "I_pair": None, "warnings": []}  # fmt: skip
    found = {"labels": None, "layers": [layer], "data": {"n": 3, "name": HOSTILE}, "headline": None, "checks": []}
    text = audit_section(found)
    assert "\x1b" not in text and sum(line.startswith("|") for line in text.splitlines()) == 3


def test_no_name_reaches_the_terminal_as_a_command(capsys):
    assert main(["--model", "x\x1b]0;title\x07\u202e", "--budget", "0.5"]) == 2
    Terminal().say("\x1b[2Jcleared [bold]")
    table("[/] \x1b[2J :smile:", ("[red]",), [("\x1b[1m[/x]",)])
    found = capsys.readouterr()
    for text in found:
        assert not set("\x1b\x07\u202e") & set(text)
    assert "[/]" in found.out and ":smile:" in found.out and "[bold]" in found.err
    assert printable("ä\n\t\x00") == "ä\n\\t\\x00"
