"""The Hub, on this machine: folders go there and come back equal; what is wrong with a push or a repo is one line."""

import hashlib
import json
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from cnn_models import NETS, build_net
from conftest import WORDS, build, inputs_of, random_keep
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from loopback_hub import USER, check_card, loopback_hub
from safetensors.torch import save_file

import ibprune
from ibprune import cli, hub
from ibprune.channels import find_channels
from ibprune.checksums import checksums
from ibprune.embeddings import factorize_
from ibprune.errors import BadRecipe, PlanMismatch
from ibprune.folders import write_model
from ibprune.hub_folders import fetch
from ibprune.model_card import renamed_card
from ibprune.plans import PruningPlan
from ibprune.recipe import make_recipe
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_, compact_traced_
from ibprune.task_heads import auto_class

ROOT = Path(__file__).parents[1]
TEXT = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}


@pytest.fixture
def loopback(monkeypatch, tmp_path):
    """A Hub that the client in this process takes for the only one."""
    constants = huggingface_hub.constants
    with loopback_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", server.environment(tmp_path)["HF_TOKEN"])
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
        hub.hub_reachable.cache_clear()
        yield server
        hub.hub_reachable.cache_clear()


def finish(folder: Path, text: str = "card") -> Path:
    """What a run leaves beside the model, as far as the Hub is concerned."""
    (folder / "README.md").write_text(text)
    (folder / "report.json").write_text(json.dumps({"sha256": checksums(folder)}))
    return folder


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder that can be pushed; nobody loads it."""
    folder = tmp_path / "small"
    (folder / "audit").mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    save_file({"b": torch.zeros(4)}, folder / "audit" / "more.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "plan.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("stays here")
    return finish(folder)


def sent(folder: Path) -> set[str]:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in names if not name.startswith(".")} | {".gitattributes"}


def refused(capsys, *argv) -> str:
    assert cli.main(["push", *map(str, argv)]) == 2
    *bars, message = capsys.readouterr().err.splitlines()
    assert message.startswith("ibprune: error: ") and not any("Traceback" in line for line in bars)
    return message


def pruned(family: str, head: str) -> tuple[torch.nn.Module, PruningPlan]:
    model = build(family, head, dtype=torch.float32)
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    plan = PruningPlan(model.config.model_type, {n: s.n_units for n, s in sites.items()}, random_keep(sites, 5))
    return compact_(model, plan), plan


ROUND_TRIP = """
import json, sys
import torch, transformers, ibprune
from safetensors.torch import load_file
found = {}
for repo, auto, file in json.loads(sys.argv[1]):
    probe = load_file(file)
    expected = probe.pop("expected")
    kind = getattr(transformers, auto)
    theirs, info = kind.from_pretrained(repo, trust_remote_code=True, attn_implementation="eager",
                                        output_loading_info=True)
    assert not any(info[key] for key in info), (repo, info)
    ours = ibprune.load(repo)
    with torch.no_grad():
        found[repo] = [float((m.eval()(**probe)[0] - expected).abs().max()) for m in (theirs, ours)]
print(json.dumps(found))
"""


def test_what_is_pushed_comes_back_equal_in_a_fresh_process_with_an_empty_cache(tmp_path, loopback, tokenizer):
    asked = []
    for family, head in TEXT.items():
        model, plan = pruned(family, head)
        asked.append(send(model, plan, tokenizer if family != "vit" else None, tmp_path))
    asked.append(send(*pruned_resnet(), None, tmp_path))
    command = [sys.executable, "-c", ROUND_TRIP, json.dumps(asked)]
    environment = os.environ | loopback.environment(tmp_path / "empty") | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    differences = json.loads(found.stdout.strip().splitlines()[-1])
    assert set(differences) == {repo for repo, *_ in asked} and len(differences) == 6
    assert all(max(pair) <= 1e-5 for pair in differences.values()), differences


def send(model, plan, preprocessor, tmp_path) -> tuple[str, str, str]:
    """Pushes a pruned model; returns the repo, its Auto class, and a file with inputs and the expected output."""
    kind = model.config.model_type
    folder = tmp_path / kind
    folder.mkdir()
    write_model(model, preprocessor, plan, folder)
    finish(folder)
    assert ibprune.push(folder, f"{USER}/{kind}", private=kind == "bert").startswith("http://127.0.0.1")
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = model(**inputs)[0].contiguous()
    save_file({k: v.contiguous() for k, v in inputs.items()} | {"expected": expected}, tmp_path / f"{kind}.probe")
    return f"{USER}/{kind}", auto_class(type(model).__name__, kind), str(tmp_path / f"{kind}.probe")


def pruned_resnet() -> tuple[torch.nn.Module, PruningPlan]:
    model, (_, shape) = build_net("hf_resnet", dtype=torch.float32), NETS["hf_resnet"]
    sites = find_channels(model, torch.zeros(2, *shape)).sites
    plan = PruningPlan("resnet", {n: s.n_units for n, s in sites.items()}, random_keep(sites, 5))
    return compact_traced_(model, sites, plan), plan


def test_an_upload_is_one_commit_of_what_is_not_hidden(loopback, small):
    ibprune.push(small, f"{USER}/small", private=True, commit_message="half the size")
    repo = loopback.repos["models", f"{USER}/small"]
    assert repo.private and repo.titles == ["half the size"] and len(repo.branches["main"]) == 2
    assert set(loopback.files(f"{USER}/small")) == sent(small)
    assert loopback.files(f"{USER}/small")["model.safetensors"] == (small / "model.safetensors").read_bytes()


def test_a_branch_is_its_own_and_can_be_loaded_from(loopback, small, capsys):
    ibprune.push(small, f"{USER}/small")
    (small / "config.json").write_text('{"a": 1}')
    finish(small)
    assert cli.main(["push", str(small), f"{USER}/small", "--revision", "v2"]) == 0
    assert capsys.readouterr().out.startswith(f"pushed: {loopback.url}/{USER}/small/commit/")
    assert loopback.files(f"{USER}/small", "v2")["config.json"] == b'{"a": 1}'
    assert loopback.files(f"{USER}/small")["config.json"] == b"{}"
    assert (fetch(f"{USER}/small", revision="v2") / "config.json").read_text() == '{"a": 1}'
    assert (fetch(f"{USER}/small") / "config.json").read_text() == "{}"
    assert fetch(small) == small
    with pytest.raises(BadRecipe, match="beside revision="):
        fetch(small, revision="v2")


def test_a_run_whose_result_could_not_be_pushed_does_not_begin(loopback, small, capsys, monkeypatch, tmp_path):
    ibprune.push(small, f"{USER}/small")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "no/model", "--budget", "0.5", "--quiet"]
    for more, expected in (
        (["--push-to-hub", f"{USER}/small"], "new or empty repo"),
        (["--push-to-hub", f"{USER}/small", "--private"], "found a public one"),
        (["--push-to-hub", "small"], "user/model"),
        (["--private"], "expected --push-to-hub REPO beside --private"),
        (["--revision", "v2"], "beside --revision"),
    ):
        assert cli.main([*flags, *more]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists() and not loopback.count("GET /api/models/no/model")


@pytest.mark.parametrize("where", ["/preupload/", "/large/", "/commit/"])
def test_an_interrupted_upload_goes_on_where_it_was(where, loopback, small, capsys):
    loopback.hang_up = where
    message = refused(capsys, small, f"{USER}/small")
    assert "interrupted" in message and f"ibprune push {small} {USER}/small" in message
    assert set(loopback.files(f"{USER}/small")) == {".gitattributes"}
    arrived, tries = len(loopback.large), loopback.count("PUT /large/")
    assert arrived == (2 if where == "/commit/" else 0)
    loopback.hang_up = ""
    ibprune.push(small, f"{USER}/small")
    assert set(loopback.files(f"{USER}/small")) == sent(small)
    assert loopback.count("PUT /large/") == tries + 2 - arrived  # what had arrived was not sent again
    commits = loopback.repos["models", f"{USER}/small"].branches["main"]
    ibprune.push(small, f"{USER}/small")  # nothing is left to do
    assert len(commits) == 2


def test_a_repo_that_exists_is_replaced_only_when_asked_for(loopback, small, capsys):
    loopback.create("models", f"{USER}/small").branches["main"].append({"README.md": b"mine", "old.bin": b"1"})
    message = refused(capsys, small, f"{USER}/small")
    assert "found README.md, old.bin" in message and "--overwrite" in message
    assert set(loopback.files(f"{USER}/small")) == {"README.md", "old.bin"} and not loopback.count("PUT")
    assert "found a public one" in refused(capsys, small, f"{USER}/small", "--private", "--overwrite")
    assert cli.main(["push", str(small), f"{USER}/small", "--overwrite"]) == 0
    assert set(loopback.files(f"{USER}/small")) == sent(small) - {".gitattributes"}


def test_pushes_that_cannot_be(loopback, small, capsys, monkeypatch, tmp_path):
    assert "user/model" in refused(capsys, small, "small")
    assert "user/model" in refused(capsys, small, "a/b/c")
    assert "report.json" in refused(capsys, tmp_path, f"{USER}/small")
    assert "no rights to create you/small" in refused(capsys, small, "you/small")
    assert "did you mean '--private'" in refused(capsys, small, f"{USER}/small", "--privat")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "Invalid" in refused(capsys, small, f"{USER}/small")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(capsys, small, f"{USER}/small")
    monkeypatch.setenv("HF_TOKEN", "hf_of_me")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, small, f"{USER}/small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.hub_reachable.cache_clear()
    assert "check the network" in refused(capsys, small, f"{USER}/small")
    (small / "plan.json").write_text("{ }")
    assert "altered or cut short" in refused(capsys, small, f"{USER}/small")
    (small / "plan.json").unlink()
    assert "'plan.json'" in refused(capsys, small, f"{USER}/small")
    assert not loopback.repos


def test_a_repo_that_was_tampered_with_is_refused_and_its_code_never_run(loopback, tmp_path, tokenizer):
    model, plan = pruned("bert", TEXT["bert"])
    folder = tmp_path / "bert"
    folder.mkdir()
    write_model(model, tokenizer, plan, folder)
    ibprune.push(finish(folder), f"{USER}/bert")
    whole = loopback.files(f"{USER}/bert")
    ran = tmp_path / "ran"
    for name, change in (
        ("modeling_ibprune.py", lambda text: text + f"\nopen({str(ran)!r}, 'w')\n".encode()),
        ("plan.json", lambda text: text.replace(b"bert", b"bort")),
        ("model.safetensors", lambda text: text[:-1]),
        ("config.json", lambda text: text.replace(b"24", b"25")),
    ):
        loopback.repos["models", f"{USER}/bert"].branches["main"].append(whole | {name: change(whole[name])})
        with pytest.raises(PlanMismatch, match=f"{name}, as in report.json"):
            ibprune.load(f"{USER}/bert")
    loopback.repos["models", f"{USER}/bert"].branches["main"].append(
        {name: text for name, text in whole.items() if name != "model.safetensors"}
    )
    with pytest.raises(PlanMismatch, match="'model.safetensors'"):
        ibprune.load(f"{USER}/bert")
    code = whole["modeling_ibprune.py"] + f"\nopen({str(ran)!r}, 'w')\n".encode()
    sums = json.loads(whole["report.json"])["sha256"] | {"modeling_ibprune.py": hashlib.sha256(code).hexdigest()}
    forged = {"modeling_ibprune.py": code, "report.json": json.dumps({"sha256": sums}).encode()}
    loopback.repos["models", f"{USER}/bert"].branches["main"].append(whole | forged)
    assert ibprune.load(f"{USER}/bert") and not ran.exists()


@pytest.mark.parametrize("how", ["broken", "halved", "hang_up"])
def test_a_download_that_fails_is_one_error_and_leaves_nothing_that_a_later_one_would_take(how, loopback, small):
    ibprune.push(small, f"{USER}/small")
    setattr(loopback, how, "/model.safetensors")
    with pytest.raises(BadRecipe, match=f"could not get it from {loopback.url}"):
        fetch(f"{USER}/small")
    setattr(loopback, how, "")
    assert (fetch(f"{USER}/small") / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_repos_that_cannot_be_loaded(loopback, small, tmp_path, monkeypatch):
    ibprune.push(small, f"{USER}/small")
    fetch(f"{USER}/small")
    with pytest.raises(BadRecipe, match=f"'{USER}/none'.*Repository Not Found"):
        ibprune.load(f"{USER}/none")
    loopback.create("models", f"{USER}/empty")
    with pytest.raises(PlanMismatch, match="config.json"):
        ibprune.load(f"{USER}/empty")
    with pytest.raises(BadRecipe, match="at 'v9'"):
        ibprune.load(f"{USER}/empty", revision="v9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.hub_reachable.cache_clear()
    with pytest.raises(BadRecipe, match="cache"):
        ibprune.load(f"{USER}/none")
    assert (fetch(f"{USER}/small") / "config.json").read_text() == "{}"  # from the cache
    with pytest.raises(PlanMismatch):
        ibprune.load(tmp_path / "nowhere")


def test_a_pruned_repo_is_pruned_again_like_a_folder(loopback, tokenizer, reviews, tmp_path, monkeypatch, capsys):
    model, plan = pruned("bert", TEXT["bert"])
    folder, repo, out = tmp_path / "bert", f"{USER}/bert", tmp_path / "twice"
    folder.mkdir()
    write_model(model, tokenizer, plan, folder)
    ibprune.push(finish(folder), repo)
    monkeypatch.chdir(tmp_path)
    flags = ["--model", repo, "--data", reviews, "--budget", "0.9", "--score", "magnitude", "--shares", "equal"]
    flags += ["--recover-steps", "1", "--max-length", "16", "--no-audit", "--quiet", "--output", str(out)]
    assert cli.main(flags) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    params = sum(p.numel() for p in model.parameters())
    assert report["model"] == report["hub"]["model"] == repo and report["dense"]["params"] == params
    assert ModelCard.load(out / "README.md").data.base_model == repo and report["first"] == {}
    assert ibprune.plan(repo, 0.9)["dense"]["params"] == params
    texts, rng = tmp_path / "texts.txt", random.Random(5)
    texts.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(1200)))
    few = dict(data=str(texts), max_inputs=200, max_length=16)
    assert ibprune.audit(repo, str(out), **few)["layers"][0]["name"] == "embeddings"
    found = ibprune.bench(repo, str(out), batches=(1,), lengths=(8,), rounds=2)
    assert found["dense"]["params"] == params and found["dense"]["file_bytes"] > 0
    monkeypatch.setattr("ibprune.exporting._write_graph", lambda model, *_: {"of": type(model).__name__})
    written = ibprune.export(repo, to="onnx")
    assert written == {"to": "onnx", "output": str(tmp_path / "bert-onnx"), "of": f"Pruned{TEXT['bert']}"}
    tree = loopback.files(repo)
    config = json.loads(tree["config.json"]) | {"hidden_dropout_prob": 0.2}
    loopback.repos["models", repo].branches["main"].append(tree | {"config.json": json.dumps(config).encode()})
    with pytest.raises(PlanMismatch, match="config.json, as in report.json"):
        ibprune.plan(repo, 0.9)


@pytest.fixture
def named(loopback, tmp_path, tokenizer) -> dict[str, str]:
    """A tiny BERT and a tiny SST-2 on the Hub under their real names, in the layout of the real ones."""
    build("bert", "BertForMaskedLM", dtype=torch.float32).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    loopback.serve_folder("models", "google-bert/bert-base-uncased", tmp_path / "bert")
    glue = tmp_path / "glue"
    (glue / "sst2").mkdir(parents=True)
    classes = ClassLabel(names=["negative", "positive"])
    features = Features(sentence=Value("string"), label=classes, idx=Value("int32"))
    files = []
    for split, rows in (("train", 64), ("validation", 32), ("test", 8)):
        labels = [-1 if split == "test" else i % 2 for i in range(rows)]
        words = [f"the film is {'good' if i % 2 else 'bad'} and {WORDS[i % 9]}" for i in range(rows)]
        table = Dataset.from_dict({"sentence": words, "label": labels, "idx": list(range(rows))}, features=features)
        table.to_parquet(glue / "sst2" / f"{split}-00000-of-00001.parquet")
        files.append({"split": split, "path": f"sst2/{split}-*"})
    card = yaml.safe_dump({"license": "other", "configs": [{"config_name": "sst2", "data_files": files}]})
    (glue / "README.md").write_text(f"---\n{card}---\n")
    loopback.serve_folder("datasets", "nyu-mll/glue", glue)
    return os.environ | loopback.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}


def test_bert_base_on_sst2_by_their_names_and_back_to_the_hub(named, loopback, tmp_path):
    steps = ["--finetune-steps", "4", "--mask-steps", "2", "--recover-steps", "2", "--batch-size", "16"]
    command = [sys.executable, "-m", "ibprune", "--model", "bert-base", "--budget", "0.3", "--task", "sst2", *steps]
    command += ["--max-length", "16", "--no-audit", "--quiet", "--push-to-hub", f"{USER}/bert-small", "--private"]
    found = subprocess.run(command, capture_output=True, text=True, env=named, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    folder, there = tmp_path / "pruned", loopback.files(f"{USER}/bert-small")
    assert set(there) == sent(folder) and loopback.repos["models", f"{USER}/bert-small"].private
    report = json.loads(there["report.json"])
    assert report["hub"] == {"model": "google-bert/bert-base-uncased", "data": "nyu-mll/glue:sst2"}
    assert report["command"] == " ".join(["ibprune", *command[3:-4]]).replace(" --quiet", "")
    card = ModelCard(there["README.md"].decode())
    assert check_card(str(card)) == [] and card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.base_model_relation == "finetune" and card.data.datasets == ["nyu-mll/glue"]
    assert card.data.library_name == "transformers" and card.data.tags == ["ibprune", "pruned"]
    (result,) = card.data.eval_results
    assert result.metric_type == "accuracy" and result.metric_value == report["pruned"]["metrics"]["accuracy"]
    assert (result.task_type, result.dataset_type) == ("text-classification", "nyu-mll/glue")
    assert result.dataset_config == "sst2"
    assert f'ibprune.load("{USER}/bert-small")' in card.text and report["command"] in card.text
    assert card.text.replace(f"{USER}/bert-small", "pruned") == ModelCard.load(folder / "README.md").text
    repeated = make_recipe({}, file=folder / "recipe.yaml")
    assert repeated.push_to_hub is None and not repeated.private
    assert ibprune.load(f"{USER}/bert-small").config.id2label == {0: "negative", 1: "positive"}
    keep_card(folder, tmp_path / "model_cards" / "bert-small")
    check_kept(tmp_path / "model_cards" / "bert-small")
    (folder / "README.md").write_text(f"{card.text}\nMy own words about pruned.")
    ibprune.push(folder, f"{USER}/bert-small", overwrite=True)
    assert loopback.files(f"{USER}/bert-small")["README.md"] == (folder / "README.md").read_bytes()


def keep_card(run: Path, kept: Path) -> None:
    runpy.run_path(str(ROOT / "scripts" / "model_card.py"))["main"](str(run), str(kept))


def check_kept(folder: Path) -> None:
    """What model_cards/ holds of a run: the card that its report gives, with the command, and no weights."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    audit = {name for name in files if name == "audit.json" or name.startswith("audit/")}
    assert files - audit == {"README.md", "report.json"}
    card = (folder / "README.md").read_text()
    assert renamed_card(folder, folder.name) == card and check_card(card) == []
    assert json.loads((folder / "report.json").read_text())["command"] in card
    assert {name for name in files if name.endswith(".png")} == set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", card))


def test_the_project_s_own_cards_are_what_their_reports_give():
    reports = list((ROOT / "model_cards").glob("*/report.json"))
    assert reports
    for report in reports:
        check_kept(report.parent)
