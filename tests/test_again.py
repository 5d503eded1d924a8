"""A pruned model is a model like any other: cut again, trained again, judged again; what that cannot be is refused."""

import json
import random
from pathlib import Path

import pytest
import torch
from cnn_models import pictures, save_pictures
from conftest import WORDS, build, counted_macs, inputs_of, outputs, random_keep
from test_cli import refused
from test_cnn_pipeline import SHORT, save_net

import ibprune
from ibprune import cli
from ibprune.checksums import write_report
from ibprune.console import Quiet
from ibprune.costs import count_params, macs_model, params_model
from ibprune.data import load_data
from ibprune.embeddings import factorize_
from ibprune.errors import PlanMismatch
from ibprune.evaluation import evaluate_model
from ibprune.feeding import make_feed
from ibprune.folders import write_model
from ibprune.inject import inject_
from ibprune.models import find_source, load_config, load_dense, load_tokenizer
from ibprune.plans import PruningPlan
from ibprune.recipe import make_recipe
from ibprune.report import pruned_before, whole_line
from ibprune.sites import came_factorized, find_family, find_sites
from ibprune.surgery import compact_

RUN = ["--score", "fisher", "--shares", "equal", "--recover-steps", "2", "--batch-size", "16", "--max-length", "16",
       "--no-audit", "--quiet"]  # fmt: skip


def cut(model, seed: int, block: str) -> PruningPlan:
    """Compacts a model by a random plan that takes a whole block out; masks and costs must foresee the result."""
    if find_family(model.config.model_type).factorizes and not came_factorized(model):
        factorize_(model)
    sites = find_sites(model)
    keep = random_keep(sites, seed) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
    keep |= {name: () for name, site in sites.items() if site.kind == "layers" and name.startswith(f"{block}.")}
    masks = inject_(model, sites)
    masks.set_keep(keep)
    masked = outputs(model)
    params, macs = params_model(model, sites), macs_model(model, sites, length=7)
    plan = PruningPlan(model.config.model_type, {name: site.n_units for name, site in sites.items()}, keep)
    compact_(model, plan)
    assert torch.allclose(outputs(model), masked, atol=1e-5)
    assert params(plan.kept()) == count_params(model)
    assert macs(plan.kept()) == counted_macs(model, {key: value[:1] for key, value in inputs_of(model).items()})
    return plan


@pytest.mark.parametrize(
    "family,head,layers",
    [
        ("bert", "BertForMaskedLM", "encoder.layer"),
        ("llama-tied", "LlamaForCausalLM", "layers"),
        ("gpt2", "GPT2LMHeadModel", "h"),
        ("gemma3_text", "Gemma3ForCausalLM", "layers"),
        ("t5", "T5ForConditionalGeneration", "encoder.block"),
        ("vit", "ViTForImageClassification", "layers"),
    ],
)
def test_surgery_composes(family, head, layers, tmp_path, tokenizer):
    model = build(family, head, dtype=torch.float32)
    for run, number in enumerate((0, 1)):  # the second of the two that are left is the third of the dense three
        plan = cut(model, 4 + run, f"{layers}.{number}")
        folder = tmp_path / f"{run}"
        folder.mkdir()
        write_model(model, None if family == "vit" else tokenizer, plan, folder)
        assert torch.allclose(outputs(ibprune.load(folder)), outputs(model), atol=1e-5)
        loaded = load_dense(find_source(str(folder))).model
        assert type(loaded) is type(model) and torch.allclose(outputs(loaded), outputs(model), atol=1e-5)
        loaded.set_attn_implementation("eager")
        model = loaded
    spec = getattr(load_config(find_source(str(folder))), "ibprune", None)
    if family == "vit":  # one block is left, and its widths have a place in the config
        assert spec is None and (folder / "config.json").exists()
    else:
        assert spec["dropped_blocks"] == ([] if family in ("bert", "t5") else [f"{layers}.0", f"{layers}.2"])


@pytest.fixture(scope="module")
def pruned(folders, reviews, tmp_path_factory) -> str:
    """A classifier at 0.6 of a tiny BERT, which takes code to load."""
    folder = tmp_path_factory.mktemp("once") / "pruned"
    flags = ["--model", folders["BertForSequenceClassification"], "--data", reviews, "--budget", "0.6"]
    assert cli.main([*flags, *RUN, "--output", str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text())["verify"]["tier"] == "remote_code"
    return str(folder)


@pytest.mark.parametrize("more", [[], ["--score", "vib", "--mask-steps", "4", "--shares", "probe"]])
def test_a_pruned_model_is_pruned_again(more, pruned, reviews, tmp_path, capsys):
    out = tmp_path / "twice"
    flags = ["--model", pruned, "--data", reviews, "--budget", "0.8", *RUN, *more, "--output", str(out)]
    assert cli.main(flags) == 0, capsys.readouterr().err
    first, second = (json.loads((Path(f) / "report.json").read_text()) for f in (pruned, out))
    assert second["model"] == pruned and second["dense"]["params"] == first["pruned"]["params"]
    assert second["dense"]["metrics"] == first["pruned"]["metrics"]
    assert 0.7 * first["pruned"]["params"] < second["pruned"]["params"] <= 0.8 * first["pruned"]["params"]
    assert second["pruned"]["params"] == count_params(ibprune.load(out))
    assert first["first"] is None and second["first"]["model"] == first["model"]
    whole = f"in all, {second['pruned']['params'] / first['dense']['params']:.1%} of the {first['dense']['params']:,} "
    whole += f"parameters and {second['pruned']['macs'] / first['dense']['macs']:.1%} of the MACs of "
    assert f"`{pruned}` had been pruned before: {whole}`{first['model']}` are left." in (out / "README.md").read_text()
    assert f"{whole}<code>{first['model']}</code> are left." in (out / "report.html").read_text()
    assert "had been pruned before" not in (Path(pruned) / "README.md").read_text()


def test_what_a_base_was_cut_of_is_handed_on_by_training_and_said_to_be_unknown_elsewhere(pruned, tmp_path):
    dense = {"model": "m", "params": 1000, "macs": 8, "macs_input": "9 tokens"}
    write_report({"schema": "ibprune.training/1", "first": dense}, tmp_path)
    assert pruned_before(tmp_path) == dense and pruned_before(tmp_path / "nowhere") is None
    (tmp_path / "report.json").write_text((tmp_path / "report.json").read_text().replace("1000", "1001"))
    with pytest.raises(PlanMismatch, match="the file was altered"):
        pruned_before(tmp_path)
    report = json.loads((Path(pruned) / "report.json").read_text())
    said = whole_line(report | {"first": dense})  # the MACs are of another length, and are not compared
    assert said.endswith(f"in all, {report['pruned']['params'] / 1000:.1%} of the 1,000 parameters of `m` are left.")
    for unknown in ({}, dense | {"params": 0}, dense | {"macs": "many"}):
        said = whole_line(report | {"first": unknown})
        assert said.endswith("had been pruned before; how much, its folder does not say.")


def test_a_pruned_model_is_planned_trained_judged_audited_and_timed(pruned, reviews, tmp_path, capsys):
    assert cli.main(["plan", "--model", pruned, "--budget", "0.8"]) == 0
    params = f"{count_params(ibprune.load(pruned)):,}"
    assert f"dense {params} parameters" in " ".join(capsys.readouterr().out.split())
    flags = ["--data", reviews, "--batch-size", "16", "--max-length", "16"]
    trained = tmp_path / "trained"
    assert cli.main(["train", "--model", pruned, *flags, "--finetune-steps", "3", "--output", str(trained)]) == 0
    before = json.loads((Path(pruned) / "report.json").read_text())["pruned"]["metrics"]
    report = json.loads((trained / "report.json").read_text())
    assert report["first"]["params"] == json.loads((Path(pruned) / "report.json").read_text())["dense"]["params"]
    assert report["metrics"]["before"] == before and report["steps"] == 3
    model, tokenizer = ibprune.load(pruned), load_tokenizer(find_source(pruned))
    recipe = make_recipe({"model": pruned, "budget": 0.5, "batch_size": 16, "max_length": 16})
    _, feed = make_feed(recipe, model, tokenizer, load_data(reviews))
    assert evaluate_model(model, feed, feed.objective, console=Quiet(), what="again") == before
    assert cli.main(["bench", pruned, str(trained), "--batches", "1", "--lengths", "8", "--rounds", "3"]) == 0
    assert f"parameters {params} -> {params}" in capsys.readouterr().out
    rng, many = random.Random(5), tmp_path / "many.txt"  # an audit asks for 200 texts
    many.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(1200)))
    flags = ["--data", str(many), "--max-inputs", "200", "--max-length", "16", "--quiet", "--output"]
    assert cli.main(["audit", pruned, str(trained), *flags, str(tmp_path / "a")]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert [layer["name"] for layer in found["layers"]][0] == "embeddings" and len(found["layers"]) > 1
    assert all(0.5 < layer["I_XL"]["retained"] < 1.5 for layer in found["layers"])  # three steps change little


def test_a_pruned_encoder_gets_a_head_where_its_width_stayed(folders, reviews, stories, tmp_path, capsys):
    for kinds, code in (("heads,ffn", 0), ("hidden", 2)):
        once, out = tmp_path / f"once {kinds}", tmp_path / f"twice {kinds}"
        flags = ["--data", stories, "--budget", "0.8", "--kinds", kinds, *RUN, "--output", str(once)]
        assert cli.main(["--model", folders["BertModel"], *flags]) == 0
        flags = ["--data", reviews, "--budget", "0.8", "--finetune-steps", "1", *RUN, "--output", str(out)]
        assert cli.main(["--model", str(once), *flags]) == code
        assert out.exists() != bool(code)
    assert "pruned as a BertModel, in its width too" in capsys.readouterr().err


def test_a_pruned_cnn_is_pruned_again(tmp_path, capsys):
    data, once, twice = (tmp_path / name for name in ("data", "once", "twice"))
    save_pictures(data / "train", *pictures(64), ("down", "up"))
    save_pictures(data / "val", *pictures(24, seed=1), ("down", "up"))
    flags = ["--data", str(data), "--cost", "macs", "--image-size", "32", "--score", "magnitude", *SHORT]
    for model, budget, out in ((save_net("hf_resnet", tmp_path / "dense"), "0.6", once), (str(once), "0.7", twice)):
        assert cli.main(["--model", model, "--budget", budget, *flags, "--output", str(out)]) == 0
    reports = [json.loads((folder / "report.json").read_text()) for folder in (once, twice)]
    assert reports[1]["dense"]["macs"] == reports[0]["pruned"]["macs"] > reports[1]["pruned"]["macs"]
    assert reports[1]["pruned"]["params"] == count_params(ibprune.load(twice))


@pytest.mark.parametrize(
    "verb,flags,message",
    [
        ("plan", ["--vanilla"], "pruned already, in shapes that take code to load"),
        ("plan", ["--estimate"], "there is no estimate for it"),
        ("prune", ["--load-in-4bit", "--mode", "faster", "--recover-steps", "0"], "this one is pruned: leave it out"),
    ],
)
def test_what_a_pruned_model_cannot_be_is_refused(verb, flags, message, pruned, reviews, tmp_path, capsys):
    if verb == "prune":
        flags = [*flags, "--data", reviews, "--output", str(tmp_path / "out")]
    said = refused(capsys, verb, "--model", pruned, "--budget", "0.8", *flags)
    assert message in said and not (tmp_path / "out").exists()


def test_a_pruned_folder_needs_no_conversion(pruned, tmp_path, capsys):
    assert "a folder of ibprune already" in refused(capsys, "convert-legacy", pruned, "--output", str(tmp_path / "out"))
