"""The bench: what is counted is exact, every reason follows from figures, and bad input is one line."""

import copy
import json
import shutil

import pytest
import torch
from conftest import build, random_keep, token_ids
from test_cli import refused
from test_folders import pruned

import ibprune
from ibprune import benchmarking, cli
from ibprune.costs import macs_model
from ibprune.errors import BadRecipe
from ibprune.examples import example_inputs
from ibprune.folders import write_model
from ibprune.footprint import footprint, lookup_params
from ibprune.models import load_dense
from ibprune.sites import find_sites
from ibprune.verdict import verdict
from ibprune.walls import width_times


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer) -> dict[str, tuple[str, str]]:
    """Dense and pruned folders by family."""
    root, found = tmp_path_factory.mktemp("bench"), {}
    for family, head in (
        ("bert", "BertForSequenceClassification"), ("llama-tied", "LlamaForCausalLM"),
        ("vit", "ViTForImageClassification"), ("distilbert", "DistilBertModel"),
    ):  # fmt: skip
        folders = root / family / "dense", root / family / "pruned"
        build(family, head, dtype=torch.float32).save_pretrained(folders[0])
        folders[1].mkdir(parents=True)
        model, plan = pruned(family, head, lambda sites: random_keep(sites, 5))
        preprocessor = None if family == "vit" else tokenizer
        write_model(model, preprocessor, plan, folders[1])
        if preprocessor is not None:
            preprocessor.save_pretrained(folders[0])
        found[family] = str(folders[0]), str(folders[1])
    return found


@pytest.mark.parametrize("family,head", [("bert", "BertModel"), ("gpt2", "GPT2LMHeadModel"), ("t5", "T5Model")])
def test_the_products_that_are_counted_are_those_of_the_cost_model(family, head):
    model = build(family, head, dtype=torch.float32)
    inputs = example_inputs(model, batch=1, length=9)
    found = footprint(model, lambda: model(**inputs))
    assert found.macs == macs_model(model, find_sites(model), length=9)(
        {name: site.n_units for name, site in find_sites(model).items()}
    )
    assert 0 < found.batched_macs < found.macs
    twice = footprint(model, lambda: model(**{key: value.repeat(2, 1) for key, value in inputs.items()}))
    assert twice.macs == 2 * found.macs
    assert twice.activation_bytes > 1.5 * found.activation_bytes


def test_memory_is_what_lives_at_once_and_views_are_no_operations():
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(5)))
    x = torch.ones(4, 8)
    row = 4 * 8 * 4  # bytes
    found = footprint(net, lambda: net(x.t().t()))
    assert found.operations == 5 and found.activation_bytes == 2 * row  # a layer's input and output
    assert footprint(net, lambda: [net[0](x) for _ in range(7)]).activation_bytes == 7 * row
    assert footprint(net, lambda: net[0].weight + 1).layers == ()


def test_embeddings_are_looked_up_unless_an_output_shares_them():
    tied, apart = build("llama-tied", "LlamaForCausalLM"), build("llama", "LlamaForCausalLM")
    assert lookup_params(tied) == 0
    assert lookup_params(apart) == apart.model.embed_tokens.weight.numel()


def test_a_decoder_is_timed_while_it_reads_and_while_it_writes(pairs, tmp_path):
    file = tmp_path / "bench.json"
    found = ibprune.bench(*pairs["llama-tied"], batches=(1, 2), lengths=(9,), rounds=2, output=str(file))
    assert json.loads(file.read_text()) == found and list(tmp_path.iterdir()) == [file]
    shapes = [(c["phase"], c["batch"], c["length"]) for c in found["cells"]]
    assert shapes == [(p, b, 9) for b in (1, 2) for p in ("prefill", "decode")]
    for side, folder in zip(("dense", "pruned"), pairs["llama-tied"]):
        model = load_dense(benchmarking.find_source(folder)).model if side == "dense" else ibprune.load(folder)
        assert found[side]["params"] == sum(p.numel() for p in model.parameters())
        assert found[side]["file_bytes"] > 4 * found[side]["params"] - 1
        for cell in found["cells"]:
            ms, tokens = cell[side]["ms"], cell["length"] if cell["phase"] == "prefill" else 1
            assert 0 < ms["q1"] <= ms["median"] <= ms["q3"]
            assert cell[side]["per_second"] == pytest.approx(1000 * cell["batch"] * tokens / ms["median"])
            assert cell[side]["peak_bytes"] > found[side]["weight_bytes"] >= found[side]["read_bytes"]
            assert 0 < cell[side]["layers_ms"] < ms["median"]
    reading, writing = found["cells"][:2]
    assert writing["dense"]["macs"] < reading["dense"]["macs"]  # one token, whatever the prompt
    assert writing["pruned"]["macs"] < writing["dense"]["macs"]
    assert found["env"]["threads"] == torch.get_num_threads() and found["env"]["device"]
    assert [line.partition(",")[0] for line in found["verdict"] if line[0] != " "] == ["prefill", "decode"]


def test_weights_that_lie_there_twice_count_once(pairs, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(pairs["llama-tied"][0], folder)
    for name in ("pytorch_model.bin", "training_args.bin"):
        shutil.copy(folder / "model.safetensors", folder / name)
    found = ibprune.bench(str(folder), pairs["llama-tied"][1], batches=(1,), lengths=(9,), rounds=1)
    assert found["dense"]["file_bytes"] == (folder / "model.safetensors").stat().st_size


def test_pictures_have_no_length_and_texts_of_other_models_a_forward_pass(pairs, capsys):
    found = ibprune.bench(*pairs["vit"], batches=(3,), rounds=1)
    assert [(c["phase"], c["length"]) for c in found["cells"]] == [("forward", 0)]
    assert cli.main(["bench", *pairs["bert"], "--batches", "2", "--lengths", "5", "--rounds", "1", "--quiet"]) == 0
    table = capsys.readouterr().out
    assert "forward, eager, 2 x 5 tokens" in table and "times as fast" in table


def test_a_dense_model_without_the_head_gets_one(pairs, tmp_path, tokenizer):
    build("bert", "BertModel", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = ibprune.bench(str(tmp_path), pairs["bert"][1], batches=(1,), lengths=(5,), rounds=1)
    same = ibprune.bench(*pairs["bert"], batches=(1,), lengths=(5,), rounds=1)
    assert found["dense"]["params"] == same["dense"]["params"]


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--batches", "0"], "--batches: expected whole numbers of at least 1, found 0"),
        (["--batches", "1,x"], "--batches"),
        (["--lengths", ""], "--lengths"),
        (["--lengths", "60"], "expected at most 64 tokens of this model, found 60 and 16 to write"),
        (["--runtimes", "eagre"], "did you mean 'eager'"),
        (["--runtimes", ""], "--runtimes: found ''"),
        (["--precision", "fp16"], "did you mean 'bf16'"),
        (["--rounds", "0"], "--rounds"),
        (["--image-size", "32"], "leave it out"),
        (["--output", "none/there.json"], "--output"),
        (["--output", "/dev/null/there.json"], "--output"),
        (["--runtime", "eager"], "did you mean '--runtimes'"),
    ],
)
def test_bad_flags_are_one_line(flags, expected, pairs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, "bench", *pairs["llama-tied"], *flags)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadRecipe, match="--batches: expected whole numbers of at least 1, found 8"):
        ibprune.bench(*pairs["llama-tied"], batches=8)


def test_models_that_do_not_belong_together_are_one_line(pairs, capsys, tmp_path, tokenizer):
    dense, small = pairs["bert"]
    assert "one family, found 'bert' and 'distilbert'" in refused(capsys, "bench", dense, pairs["distilbert"][1])
    assert "did you mean" in refused(capsys, "bench", "minilmm", small)
    assert "config.json" in refused(capsys, "bench", dense, tmp_path)
    assert "pictures, which have none" in refused(capsys, "bench", *pairs["vit"], "--lengths", "5")
    model = build("bert", "BertForSequenceClassification", dtype=torch.float32)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert "one vocabulary, found 70 and 61 rows" in refused(capsys, "bench", tmp_path / "other", small)
    build("bert", "BertForMaskedLM", dtype=torch.float32).save_pretrained(tmp_path / "masked")
    tokenizer.save_pretrained(tmp_path / "masked")
    heads = refused(capsys, "bench", dense, tmp_path / "masked")
    assert "one head, found BertForSequenceClassification and BertForMaskedLM" in heads


def test_compiled_models_are_timed_and_a_compiler_that_fails_is_one_line(pairs, capsys, monkeypatch):
    compiled = []

    def compiler(model, *, dynamic):
        compiled.append(model)
        return lambda **inputs: model(**inputs)

    monkeypatch.setattr(torch, "compile", compiler)
    cell = dict(batches=(1,), lengths=(4,), rounds=1)
    found = ibprune.bench(*pairs["llama-tied"], runtimes=("eager", "compile"), **cell)
    assert [(c["runtime"], c["phase"]) for c in found["cells"]] == [
        ("eager", "prefill"), ("eager", "decode"), ("compile", "prefill"),
    ]  # fmt: skip
    assert len(compiled) == 2 and found["cells"][2]["pruned"]["walls_ms"]["operations"] is None

    def broken(model, *, dynamic):
        def call(**inputs):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert "torch.compile does not work here: no C++ compiler" in refused(
        capsys, "bench", *pairs["llama-tied"], "--runtimes", "compile", "--batches", "1"
    )


def side(ms: float, *, macs: int, batched: int = 0, layers: float | None = None, **walls: float) -> dict:
    walls_ms = {"operations": 0.0, "weights": 0.0, "products": 0.0} | walls
    return {
        "ms": {"q1": ms, "median": ms, "q3": ms}, "macs": macs, "batched_macs": batched, "operations": 100,
        "layers_ms": ms if layers is None else layers, "walls_ms": walls_ms,
    }  # fmt: skip


def record(dense: dict, pruned: dict, *, lookups: tuple[int, int] = (0, 0), widths=()) -> dict:
    ratio = dense["ms"]["median"] / pruned["ms"]["median"]
    cell = {"runtime": "eager", "phase": "forward", "batch": 8, "length": 32, "dense": dense, "pruned": pruned}
    cell["speedup"] = {"q1": 0.95 * ratio, "median": ratio, "q3": 1.05 * ratio}
    sizes = [
        {"params": params, "lookup_params": rows, "read_bytes": 4_000_000 * params}
        for params, rows in zip((100, 40), lookups)
    ]
    return {"cells": [cell], "dense": sizes[0], "pruned": sizes[1], "widths": list(widths)}


@pytest.mark.parametrize(
    "found,expected",
    [
        (record(side(10, macs=100), side(4, macs=40)), []),
        (record(side(10, macs=100), side(9, macs=40)), ["MACs pass at"]),
        (record(side(10, macs=50), side(9.9, macs=50), lookups=(60, 10)), ["83% of the 60 removed parameters"]),
        (record(side(10, macs=50), side(9.9, macs=50)), ["no wall that was measured explains it"]),
        (record(side(10, macs=100), side(9, macs=80, operations=5)), ["starting 100 operations (dense: 100)"]),
        (record(side(10, macs=100), side(9, macs=80, weights=8)), ["so the bound is their ratio: 2.50 times"]),
        (record(side(10, macs=100), side(9, macs=80, weights=8, products=9)), ["no wall"]),
        (record(side(10, macs=100, layers=4), side(9, macs=80, layers=3)), ["6.00 of 9.00 ms pass outside"]),
        (record(side(10, macs=100, batched=20), side(9, macs=80, batched=20)), ["25% of the MACs and fell 1.00 times"]),
        (
            record(
                side(10, macs=100), side(9, macs=80),
                widths=[{"shape": [4, 100, 90], "ms": 2, "ms_at_8": 1.9, "share_at_8": 0.95, "ms_at_64": 1,
                         "share_at_64": 0.6}],
            ),
            ["a layer of 100 x 90 takes 2.000 ms at 4 rows, but 1.000 with both widths rounded up to multiples of 64"],
        ),
    ],
)  # fmt: skip
def test_every_reason_follows_from_the_figures(found, expected):
    first, *reasons = verdict(found)
    assert first.startswith(f"forward, eager: {found['cells'][0]['speedup']['median']:.2f} times as fast")
    assert len(reasons) == len(expected)
    for reason, text in zip(reasons, expected):
        assert reason.startswith("  at 8 x 32 tokens: ") and text in reason


def test_a_difference_within_the_spread_is_called_none():
    found = record(side(10, macs=100), side(9.8, macs=100))
    assert "no difference can be told" in verdict(found)[0]
    clear = copy.deepcopy(found)
    clear["cells"][0]["speedup"]["q1"] = 1.01
    assert "no difference" not in verdict(clear)[0]


def test_rounder_widths_are_timed_for_the_heaviest_odd_layers_only():
    layers = ((4, 128, 64), (2, 65, 64), (2, 65, 64), (2, 70, 70), (2, 66, 64), (2, 64, 65), (2, 30, 65))
    found = width_times(layers, torch.device("cpu"), torch.float32)
    assert [timed["shape"] for timed in found] == [[2, 65, 64], [2, 70, 70], [2, 66, 64]]
    assert all(timed["share_at_64"] > 0 for timed in found)
    assert width_times(((4, 128, 64),), torch.device("cpu"), torch.float32) == []


def test_a_cut_vocabulary_is_read_with_ids_that_both_have(pairs):
    dense, small = (build("bert", "BertModel", dtype=torch.float32) for _ in range(2))
    small.resize_token_embeddings(30)
    inputs = benchmarking._example([dense, small], 2, 50, None, torch.device("cpu"))
    assert inputs["input_ids"].max() < 30 and token_ids().max() > 30
