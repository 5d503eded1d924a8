"""Whole runs on tiny models: every objective, every score, the folder, the report, and the same run again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATA, outputs
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import ibprune
from ibprune import cli
from ibprune.console import Quiet
from ibprune.errors import BadRecipe
from ibprune.losses import Objective, distill_loss, forward, supervised_loss, training_loss

SHORT = dict(mask_steps=6, recover_steps=4, batch_size=16, max_length=16, seed=3)


def check(result, folder, keep):
    report = json.loads((folder / "report.json").read_text())
    assert report == result.report
    assert report["schema"] == "ibprune.report/1"
    saved = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == report["pruned"]["params"]
    assert report["budget"]["achieved"] <= report["budget"]["limit"]
    assert report["budget"]["keep"] == keep
    assert set(report["dense"]) >= {"params", "macs", "file_bytes", "metrics", "latency_ms"}
    assert set(report["dense"]["latency_ms"]) == {"median", "iqr", "layers"}
    assert 0 < report["dense"]["latency_ms"]["layers"] < report["dense"]["latency_ms"]["median"]
    assert report["verify"]["max_abs_diff"] <= 1e-5 and report["world_size"] == 1
    assert set(p.name for p in folder.iterdir()) >= {
        "config.json", "model.safetensors", "plan.json", "report.json", "report.html", "README.md", "recipe.yaml",
        "tokenizer.json", "decision.json",
    }  # fmt: skip
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(report["sha256"]) == names - {"report.json", "report.html", "README.md"}
    assert torch.allclose(outputs(ibprune.load(folder)), outputs(result.model), atol=1e-5)


@pytest.mark.parametrize(
    "head,data,score,shares,keep",
    [
        ("BertForSequenceClassification", "reviews", "vib", "probe", 0.4),
        ("BertModel", "stories", "vib", "probe", 0.5),
        ("BertForMaskedLM", "stories", "fisher", "cost", 0.5),
        ("LlamaForCausalLM", "stories", "vib", "equal", 0.6),
        ("LlamaForCausalLM", "stories", "magnitude", "probe", 0.5),
        ("BertForSequenceClassification", "reviews", "random", "equal", 0.5),
        ("BertModel", "stories", "vib", "probe", 1.0),
        ("BartForSequenceClassification", "reviews", "vib", "equal", 0.5),
        ("T5EncoderModel", "stories", "vib", "probe", 0.6),
        ("T5ForSequenceClassification", "reviews", "fisher", "cost", 0.6),
    ],
)
def test_the_main_job(head, data, score, shares, keep, folders, request, tmp_path):
    source = request.getfixturevalue(data)
    out = tmp_path / "out"
    result = ibprune.prune(folders[head], keep, data=source, score=score, shares=shares, output=str(out), **SHORT)
    check(result, out, keep)


def test_the_figures_of_a_report_are_those_of_the_folder(folders, reviews, tmp_path):
    """Counted and measured again from the files alone, by others' code."""
    steps = dict(finetune_steps=8, mask_steps=0, recover_steps=0, batch_size=16, max_length=16)
    more = dict(score="magnitude", shares="equal", audit=False, output=str(tmp_path / "out"))
    report = ibprune.prune(folders["BertForSequenceClassification"], 0.6, data=reviews, **more, **steps).report[
        "pruned"
    ]
    model, weights = ibprune.load(tmp_path / "out"), tmp_path / "out" / "model.safetensors"
    assert report["params"] == sum(p.numel() for p in model.parameters())
    assert report["file_bytes"] == weights.stat().st_size
    model.set_attn_implementation("eager")
    length = json.loads((tmp_path / "out" / "report.json").read_text())["macs_length"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.long))
    assert report["macs"] == counter.get_total_flops() // 2
    rows = [line.split("\t") for line in (Path(reviews) / "dev.tsv").read_text().splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    read = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        found = model(**read).logits.argmax(-1)
    right = [int(label) == int(number) for number, (_, label) in zip(found, rows)]
    assert report["metrics"]["accuracy"] == pytest.approx(sum(right) / len(rows), abs=1e-9)


@pytest.mark.parametrize("head,data", [("BertForSequenceClassification", "reviews"), ("LlamaForCausalLM", "stories")])
@pytest.mark.parametrize(
    "score,more",
    [
        ("gradual", dict(shares="probe", kinds="heads,ffn,hidden", mask_steps=16)),
        ("kwon", dict(shares="equal", kinds="heads,ffn,hidden")),
        ("obs", dict(shares="cost", kinds="heads,ffn,hidden")),
        ("taylor", dict(shares="cost")),
        ("flap", dict(shares="cost", kinds="heads,ffn")),
        ("activation", dict(shares="equal")),
        ("fisher", dict(shares="equal", reconstruct=True)),
        ("vib", dict(shares="equal", kinds="heads,ffn,layers", mask_steps=0, reconstruct=True)),
    ],
)
def test_every_other_score_runs_to_a_folder(score, more, head, data, folders, request, tmp_path):
    source, out = request.getfixturevalue(data), tmp_path / "out"
    scope = "blocks" if "kinds" in more else "model"
    more = SHORT | dict(audit=False, scope=scope) | more
    result = ibprune.prune(folders[head], 0.6, data=source, score=score, output=str(out), **more)
    check(result, out, 0.6)
    assert result.report["score"] == score


def test_what_a_score_cannot_do_is_said_in_one_line(folders, reviews, tmp_path, capsys):
    flags = ["--model", folders["BertForSequenceClassification"], "--data", reviews, "--budget", "0.6"]
    flags += ["--output", str(tmp_path / "out"), "--quiet"]
    for more, line in (
        (["--score", "flap"], "embedding_rank, hidden, layers are not: use --kinds ffn,heads, or another score"),
        (["--reconstruct"], "vib and gradual train the weights around their cuts"),
        (["--score", "taylr"], "did you mean 'taylor'"),
        (["--start", "tailor"], "did you mean 'taylor'"),
        (["--score", "fisher", "--start", "flap"], "the masks of score vib start to learn: leave it out"),
    ):
        assert cli.main([*flags, *more]) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_masks_start_from_the_ranking_that_is_asked_for(folders, stories, tmp_path):
    """Without steps of learning the ranking decides alone; with some, the same seed ends elsewhere for it."""
    common = dict(data=stories, kinds="kv_groups,ffn", shares="equal", scope="blocks", audit=False) | SHORT

    def plan(name, **more):
        values = common | more
        return ibprune.prune(folders["LlamaForCausalLM"], 0.5, output=str(tmp_path / name), **values).plan

    flap = plan("one-shot", score="flap")
    assert plan("by default", mask_steps=0) == flap != plan("fisher", start="fisher", mask_steps=0)
    assert plan("random", start="random") != plan("learned")
    assert "start: flap" in (tmp_path / "learned" / "recipe.yaml").read_text()
    again = ibprune.prune(recipe=str(tmp_path / "one-shot" / "recipe.yaml"), output=str(tmp_path / "again"))
    assert again.plan == flap  # a recipe of another score names no start


def test_the_saved_recipe_repeats_the_run(folders, reviews, tmp_path, capsys):
    first = tmp_path / "first"
    flags = ["--model", folders["BertForSequenceClassification"], "--data", reviews, "--budget", "0.4"]
    flags += ["--mask-steps", "6", "--recover-steps", "4", "--batch-size", "16", "--cost", "macs", "--quiet"]
    assert cli.main([*flags, "--output", str(first)]) == 0
    assert "written to" in capsys.readouterr().out
    second = tmp_path / "second"
    assert cli.main(["--recipe", str(first / "recipe.yaml"), "--output", str(second), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "ibprune.report/1"
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("own_process")
def test_no_steps_at_all_scores_cuts_and_exports(folders, stories, tmp_path):
    out = tmp_path / "out"
    steps = dict(mask_steps=0, recover_steps=0, batch_size=16, max_length=16)
    result = ibprune.prune(folders["LlamaForCausalLM"], 0.7, data=stories, output=str(out), audit=False, **steps)
    check(result, out, 0.7)


def test_a_new_task_head_is_trained_first_and_the_model_learns(folders, reviews, tmp_path):
    steps = dict(finetune_steps=60, mask_steps=20, recover_steps=40, batch_size=16, lr=3e-3)
    result = ibprune.prune(folders["BertModel"], 0.6, data=reviews, output=str(tmp_path / "out"), **steps)
    assert result.report["dense"]["metrics"]["accuracy"] > 0.8
    assert result.report["pruned"]["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize(
    "values, said",
    [({"budget": 0.01}, "cannot go below"), ({"budget": (0.5, 0.01)}, "cannot go below"),
     ({"budget": 0.5, "score": "flap", "kinds": ("layers", "ffn")}, "use --kinds ffn"),
     ({"budget": 0.9, "score": "fisher", "reconstruct": True, "kinds": ("hidden",)}, "of hidden, nothing"),
     ({"budget": 0.9, "kinds": ("experts",)}, "has no units 'experts'")],
)  # fmt: skip
def test_what_cannot_be_cut_is_said_before_a_head_is_trained(values, said, folders, reviews, tmp_path):
    class Stages(Quiet):
        def track(self, items, what, total):
            raise AssertionError(f"'{what}' began")

    with pytest.raises(BadRecipe, match=said):
        ibprune.prune(model=folders["BertModel"], data=reviews, output=tmp_path / "out", console=Stages(), **values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_local_files_of_every_format(kind, folders, tmp_path):
    import pandas

    rows = pandas.DataFrame({"text": ["good film", "dull plot"] * 60, "label": ["yes", "no"] * 60})
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        rows.to_csv(path, index=False)
    elif kind == "jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_parquet(path)
    steps = dict(mask_steps=0, recover_steps=0, score="magnitude", shares="cost")
    model = folders["BertForSequenceClassification"]
    result = ibprune.prune(model, 0.8, data=str(path), output=str(tmp_path / "out"), **steps)
    assert result.report["dense"]["metrics"].keys() == {"accuracy"}


def test_a_copy_of_the_teacher_has_no_distance_to_it(folders, reviews, tokenizer):
    ids = torch.randint(5, 26, (6, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for head, name in (
        ("BertModel", "encoder"),
        ("BertForSequenceClassification", "classification"),
        ("LlamaForCausalLM", "causal_lm"),
        ("BertForMaskedLM", "masked_lm"),
    ):
        model = ibprune.load(folders[head])
        labels = {"labels": torch.ones(6, dtype=torch.long) if name == "classification" else ids}
        out = forward(model, batch)
        objective = Objective(name)
        distance = distill_loss(objective, out, out, batch | labels)
        assert distance.shape == (6,) and distance.abs().max() < 1e-4
        plain = supervised_loss(objective, out, batch | labels)
        assert plain.shape == (6,)
        assert torch.isclose(training_loss(objective, out, None, batch | labels), plain.mean())


def test_padding_does_not_change_the_losses(folders):
    ids = torch.randint(5, 26, (4, 9), generator=torch.Generator().manual_seed(0))
    long = torch.nn.functional.pad(ids, (0, 5))
    model = ibprune.load(folders["LlamaForCausalLM"])
    objective = Objective("causal_lm")
    found = []
    for x, width in ((ids, 9), (long, 14)):
        mask = (torch.arange(width) < 9).long().expand(4, width)
        batch = {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}
        found.append(supervised_loss(objective, forward(model, batch), batch))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.data
def test_a_trained_llama_keeps_its_perplexity_and_generates(tmp_path):
    """stories260K at 0.9 without any training: perplexity stays near, text generates alike with and without cache."""
    data = DATA / "tinystories" / "tinystories_sample.txt"
    steps = dict(mask_steps=0, recover_steps=0, score="fisher", max_length=64, audit=False)
    model = str(DATA / "models" / "stories260K")
    result = ibprune.prune(model, 0.9, data=str(data), output=str(tmp_path / "out"), **steps)
    dense, pruned = (result.report[side]["metrics"]["perplexity"] for side in ("dense", "pruned"))
    assert dense < 7 and pruned < 3 * dense
    ids = torch.tensor([[1, 403, 407, 261]])
    texts = [result.model.generate(ids, max_new_tokens=40, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_stays_one(dtype, folders, reviews, tmp_path):
    """The config says what the weights are, so that what loads the folder, or cuts it again, takes them as they are."""
    model = AutoModelForSequenceClassification.from_pretrained(folders["BertForSequenceClassification"]).to(dtype)
    shutil.copytree(folders["BertForSequenceClassification"], tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    steps = dict(data=reviews, score="magnitude", shares="cost", mask_steps=0, recover_steps=0, audit=False)
    sizes = []
    for source, keep in (("half", 0.8), ("once", 0.9)):
        target = tmp_path / {"half": "once", "once": "twice"}[source]
        ibprune.prune(str(tmp_path / source), keep, output=str(target), **steps)
        assert ibprune.load(target).dtype == dtype
        assert json.loads((target / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        sizes.append((target / "model.safetensors").stat().st_size)
    assert sizes[1] < sizes[0]


def test_units_inside_sub_layers_that_go_are_not_counted_as_kept(folders, reviews, tmp_path):
    """A plan lists as many of them as their floors say; the file has none."""
    result = ibprune.prune(folders["BertForSequenceClassification"], 0.12, output=str(tmp_path / "out"), data=reviews,
                           kinds=("heads", "ffn", "layers"), cost="macs", score="magnitude", shares="cost",
                           recover_steps=0, audit=False)  # fmt: skip
    tensors, kept, head = load_file(tmp_path / "out" / "model.safetensors"), result.report["kept"], 24 // 4
    decision, listed = json.loads((tmp_path / "out" / "decision.json").read_text())["kinds"], {}
    sizes = {"heads": ("attention.self.query.weight", 3 * 4, head), "ffn": ("intermediate.dense.weight", 3 * 20, 1)}
    for kind, (weight, total, size) in sizes.items():
        rows = sum(len(tensor) for name, tensor in tensors.items() if name.endswith(weight))
        assert kept[kind] == pytest.approx(rows / size / total)
        assert (decision[kind]["kept"], decision[kind]["units"]) == (rows // size, total)
        listed[kind] = sum(len(units) for site, units in result.plan.keep.items() if site.endswith(kind)) / total
    assert kept["layers"] < 1 and any(listed[kind] > kept[kind] for kind in sizes)
    assert f"| {kept['heads']:.1%} |" in (tmp_path / "out" / "README.md").read_text()


def test_the_names_of_classes_that_the_data_have_go_into_the_config(folders, reviews, tmp_path):
    """A model that numbers its classes alone: what is deployed says which is which. Numbers are no names."""
    job = dict(score="magnitude", shares="equal", recover_steps=0, audit=False)
    for split in ("train", "dev"):
        lines = (Path(reviews) / f"{split}.tsv").read_text().splitlines()
        named = [lines[0], *(f"{line[:-1]}{('cold', 'kind')[int(line[-1])]}" for line in lines[1:])]
        (tmp_path / f"{split}.tsv").write_text("\n".join(named) + "\n")
    for data, names in ((tmp_path, {0: "cold", 1: "kind"}), (reviews, {0: "LABEL_0", 1: "LABEL_1"})):
        out = tmp_path / f"out {names[0]}"
        ibprune.prune(folders["BertForSequenceClassification"], 0.8, data=str(data), output=str(out), **job)
        config = AutoConfig.from_pretrained(out)
        assert config.id2label == names and config.label2id == {name: i for i, name in names.items()}
