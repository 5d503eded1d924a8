"""A residual stream turned into other axes: the same function, and directions in the place of features."""

import copy
import json
import types

import pytest
import torch
import transformers
from conftest import CASES, build, outputs, random_keep, token_ids
from test_resuming import STEPS, Stopping, same, unverified  # noqa: F401
from test_vocabulary import spelt  # noqa: F401

import ibprune
from ibprune import cli
from ibprune.budget import make_budget
from ibprune.costs import count_params
from ibprune.embeddings import TokenUse, factorize_
from ibprune.errors import BadRecipe, PlanMismatch, UnsupportedModel
from ibprune.folders import verify, write_model
from ibprune.inject import inject_
from ibprune.models import find_source, load_dense
from ibprune.plans import PruningPlan, full_plan, is_rotated
from ibprune.rotation import check_rotation, principal_axes, rotate_
from ibprune.sites import find_sites
from ibprune.structure import choose_kinds, prepare_
from ibprune.surgery import compact_

RMS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3", "mixtral", "qwen3_moe",
       "qwen3_moe-sparse", "t5", "t5-gated")  # fmt: skip
HEADED = [(family, head) for family, head in CASES if family in RMS and "For" in head]


def random_axes(width: int = 24) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3)).double()).Q


@pytest.mark.parametrize("family,head", HEADED)
def test_the_function_stays_as_it_is(family, head):
    model = build(family, head, dtype=torch.float32)
    before = outputs(model)
    rotate_(model, random_axes())
    assert (outputs(model) - before).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))
    assert is_rotated(model) and find_sites(model)  # no parameter that no row owns


def in_float64(norm, x: torch.Tensor) -> torch.Tensor:
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (norm.weight + norm.offset)


@pytest.mark.parametrize("family,head", HEADED)
def test_in_float64_it_stays_to_the_last_digits(family, head, monkeypatch):
    """With norms that do not compute in float32, as transformers' do."""
    model = build(family, head)
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            module.offset = 1.0 if family == "gemma" else 0.0
            module.forward = types.MethodType(in_float64, module)
    twin = copy.deepcopy(model)
    for ours, theirs in zip(twin.modules(), model.modules()):
        if "forward" in vars(theirs):
            ours.forward = types.MethodType(in_float64, ours)
    rotate_(twin, random_axes())
    before = outputs(model)
    assert (outputs(twin) - before).abs().max() < 1e-10 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize(
    "family,head", [c for c in HEADED if c[0] in ("llama-tied", "qwen3", "qwen3_moe", "t5", "gemma")]
)
def test_cutting_directions_is_exact_and_costs_what_is_predicted(family, head):
    model = build(family, head, dtype=torch.float32)
    dense = count_params(model)
    kinds = (
        ("hidden", "embedding_rank")
        if "embedding_rank" in {s.kind for s in find_sites(model).values()}
        else ("hidden",)
    )
    use = TokenUse(torch.ones(61), torch.eye(24)) if len(kinds) > 1 else None
    structure = prepare_(model, kinds, use, axes=random_axes())
    assert structure.costs.params.of_dense() == dense
    budget = make_budget(structure.costs.params, structure.sites, keep=0.5, scope="model", round_to=1)
    assert budget.limit == int(0.5 * dense)
    masks = inject_(model, structure.sites)
    keep = {"hidden": tuple(range(0, 24, 3))}
    masks.set_keep({name: keep.get(name, tuple(range(site.n_units))) for name, site in structure.sites.items()})
    expected = outputs(model)
    plan = structure.plan(model, keep)
    compact_(model, plan)
    assert (outputs(model) - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    assert count_params(model) == structure.costs.params(plan.kept())


@pytest.mark.parametrize("family,head", [(f, h) for f, h in HEADED if h.endswith(("LM", "ForConditionalGeneration"))])
@pytest.mark.parametrize("even", [True, False])
def test_folders_of_directions_load(family, head, even, tmp_path):
    model = build(family, head, dtype=torch.float32)
    axes = random_axes()
    structure = prepare_(model, ("hidden",), None, axes=axes)
    keep = {} if even else random_keep(structure.everything, 5)
    plan = structure.plan(model, keep | {"hidden": tuple(range(12))})
    compact_(model, plan)
    tier = write_model(model, None, plan, tmp_path)
    # The others scale by the dense width, or split it between heads, and no key of their configs says so.
    plain = even and family not in ("gemma", "t5", "t5-gated", "phi3")
    assert tier == ("vanilla" if plain else "remote_code")
    assert verify(model, tmp_path, tier)["max_abs_diff"] <= 1e-5 * max(1.0, float(outputs(model).abs().max()))


def test_the_axes_are_those_of_what_the_norms_see():
    model = build("llama", "LlamaForCausalLM", dtype=torch.float32)
    batch = {"input_ids": token_ids(4), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    axes = principal_axes(model, [batch])
    assert torch.allclose(axes.T @ axes, torch.eye(24).double(), atol=1e-12)
    rotate_(model, axes)
    shares = []  # of the normalised stream, by direction
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda _, args, out: shares.append(out[batch["attention_mask"].bool()]))
    outputs(model, batch["input_ids"])
    moment = sum(rows.double().T @ rows.double() / len(rows) for rows in shares) / len(shares)
    assert torch.allclose(moment, moment.diagonal().diag(), atol=1e-2 * float(moment[0, 0]))
    assert bool((moment.diagonal().diff() <= 1e-3).all())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "family,head,why",
    [
        ("gemma2", "Gemma2ForCausalLM", "scales features that no layer reads"),
        ("gemma3_text", "Gemma3ForCausalLM", "scales features that no layer reads"),
        ("olmo2", "Olmo2ForCausalLM", "its width is not cut"),
        ("llama", "LlamaModel", "'norm' scales features that no layer reads, but that are added or returned"),
        ("bert", "BertForMaskedLM", "takes a mean over the features"),
        ("gpt2", "GPT2LMHeadModel", "takes a mean over the features"),
    ],
)
def test_what_cannot_be_turned_is_refused_and_left_alone(family, head, why):
    model = build(family, head, dtype=torch.float32)
    before = outputs(model)
    with pytest.raises(UnsupportedModel, match=why):
        check_rotation(model)
    with pytest.raises(UnsupportedModel, match=why):
        rotate_(model, random_axes())
    assert torch.equal(outputs(model), before) and not is_rotated(model)


def test_a_model_without_a_head_keeps_its_width_and_is_told_so():
    with pytest.raises(BadRecipe, match="and here it is not cut: a model without a head keeps its width"):
        choose_kinds(build("llama", "LlamaModel"), (), rotate=True)


@pytest.mark.parametrize("family,head", [("clip", "CLIPForImageClassification"), ("gpt2", "GPT2LMHeadModel")])
def test_a_plan_refuses_what_modules_show(family, head):
    """CLIP's config is that of two towers: no width stands in it."""
    config = build(family, head).config
    config.architectures = [head]
    with pytest.raises(UnsupportedModel, match="takes a mean over the features"):
        ibprune.plan(config, 0.8, rotate=True)


def test_a_pruned_model_whose_output_shares_factors_is_refused_by_plan_and_run_alike(tokenizer, tmp_path):
    model = build("llama-tied", "LlamaForCausalLM", dtype=torch.float32)
    factorize_(model)
    sites = find_sites(model)
    plan = PruningPlan("llama", {name: site.n_units for name, site in sites.items()}, random_keep(sites, 5))
    write_model(compact_(model, plan), tokenizer, plan, tmp_path)
    loaded = load_dense(find_source(str(tmp_path))).model
    for refused in (lambda: check_rotation(loaded), lambda: ibprune.plan(str(tmp_path), 0.9, rotate=True)):
        with pytest.raises(UnsupportedModel, match="pruned already, and its output shares the factors"):
            refused()


def test_what_no_structure_tells_the_figures_do():
    """A per-feature operation inside a forward: modules and norms are those of any LLaMA."""
    model = build("llama", "LlamaForCausalLM", dtype=torch.float32)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].clamp_min(0), *args[1:]))
    check_rotation(model)
    with pytest.raises(UnsupportedModel, match="its output moves by .*something reads single features"):
        rotate_(model, random_axes())
    constant = build("llama", "LlamaModel", dtype=torch.float32)  # its output is the stream itself
    torch.nn.init.ones_(constant.norm.weight)
    with pytest.raises(UnsupportedModel, match="its output moves by"):
        rotate_(constant, random_axes())


def test_a_plan_of_directions_is_no_plan_of_features(tmp_path):
    dense = build("llama", "LlamaForCausalLM", dtype=torch.float32)
    turned = copy.deepcopy(dense)
    rotate_(turned, random_axes())
    plans = [full_plan(model, find_sites(model)) for model in (dense, turned)]
    for i, plan in enumerate(plans):
        plan.save(tmp_path / f"{i}.json")
        assert PruningPlan.load(tmp_path / f"{i}.json") == plan
    assert "rotated" not in (tmp_path / "0.json").read_text()
    with pytest.raises(PlanMismatch, match="counts the features of a turned residual stream, the model's is not"):
        compact_(copy.deepcopy(dense), plans[1])
    with pytest.raises(PlanMismatch, match="of a plain residual stream, the model's is turned"):
        compact_(turned, plans[0])
    (tmp_path / "1.json").write_text((tmp_path / "1.json").read_text().replace("true", "1"))
    with pytest.raises(PlanMismatch, match="expected true or false for 'rotated'"):
        PruningPlan.load(tmp_path / "1.json")


def test_a_run_cuts_directions_and_says_so_everywhere(folders, stories, tmp_path, capsys):
    flags = [
        "--model",
        folders["LlamaForCausalLM"],
        "--data",
        stories,
        "--budget",
        "0.6",
        "--kinds",
        "ffn,hidden",
        "--rotate",
    ]
    flags += [
        "--max-length",
        "16",
        "--batch-size",
        "4",
        "--mask-steps",
        "3",
        "--recover-steps",
        "3",
        "--probe-steps",
        "0",
    ]
    flags += ["--no-audit", "--round-to", "1", "--output", str(tmp_path / "out")]
    assert cli.main(flags) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kept, total = report["directions"]
    assert total == 24 and 1 <= kept < 24 and "--rotate" in report["command"]
    said = f"hidden ({kept} of 24 directions of the turned stream)"
    assert said in " ".join(capsys.readouterr().out.split()) and said in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rotated_stream"] is True and config["tie_word_embeddings"] is False
    assert report["dense"]["params"] == count_params(ibprune.load(folders["LlamaForCausalLM"]))  # tied, as it is
    assert report["pruned"]["params"] == count_params(ibprune.load(tmp_path / "out")) <= report["budget"]["limit"]
    assert PruningPlan.load(tmp_path / "out" / "plan.json").rotated
    found = ibprune.plan(folders["LlamaForCausalLM"], 0.6, kinds=("ffn", "hidden"), rotate=True, round_to=1)
    assert (
        found["budget"]["limit"] == report["budget"]["limit"] and found["dense"]["params"] == report["dense"]["params"]
    )


@pytest.mark.parametrize(
    "family,head,kinds,score",
    [
        ("llama", "LlamaForSequenceClassification", "hidden,embedding_rank", "kwon"),
        ("llama-tied", "LlamaForSequenceClassification", "", "taylor"),
        ("t5", "T5ForSequenceClassification", "hidden,heads", "fisher"),
        ("qwen3", "Qwen3ForSequenceClassification", "hidden", "magnitude"),
    ],
)
def test_directions_go_with_every_kind_and_score(family, head, kinds, score, tokenizer, reviews, tmp_path, unverified):  # noqa: F811
    build(family, head, dtype=torch.float32).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    values = dict(kinds=kinds, score=score, rotate=True, round_to=1) | STEPS
    result = ibprune.prune(str(tmp_path / "dense"), 0.6, data=reviews, output=str(tmp_path / "out"), **values)
    report = result.report
    assert result.plan.rotated and report["directions"][0] == len(result.plan.keep["hidden"])
    assert count_params(result.model) == report["pruned"]["params"] <= report["budget"]["limit"]


def test_a_cut_vocabulary_comes_first_and_the_axes_stay(spelt, tmp_path, unverified):  # noqa: F811
    tokenizer = transformers.AutoTokenizer.from_pretrained(spelt["BertModel"])
    ids = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None)
    build("llama", "LlamaForSequenceClassification", dtype=torch.float32, **ids).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    values = dict(kinds="hidden,embedding_rank,vocab", shares="equal", score="fisher", rotate=True) | STEPS
    result = ibprune.prune(str(tmp_path / "dense"), 0.5, data=spelt["data"], output=str(tmp_path / "out"), **values)
    assert len(result.plan.keep["vocab"]) < result.plan.n_units["vocab"] and result.plan.rotated
    assert count_params(result.model) <= result.report["budget"]["limit"]


@pytest.mark.parametrize("what,n", [("learning masks", 2), ("recovering", 2)])
def test_a_run_with_directions_goes_on_where_it_was_cut_short(what, n, folders, stories, tmp_path, unverified):  # noqa: F811
    values = dict(model=folders["LlamaForCausalLM"], budget=0.6, data=stories, kinds="ffn,hidden", rotate=True) | STEPS
    ibprune.prune(**values, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**values, output=tmp_path / "out", console=Stopping(what, n))
    ibprune.prune(**values, output=tmp_path / "out", resume=True)
    same(tmp_path / "whole", tmp_path / "out")


def test_several_budgets_share_the_axes(folders, stories, tmp_path, unverified):  # noqa: F811
    values = dict(model=folders["LlamaForCausalLM"], data=stories, kinds="ffn,hidden", rotate=True) | STEPS
    results = ibprune.prune(**values, budget=(0.8, 0.6), output=tmp_path / "out")
    large, small = (set(result.plan.keep["hidden"]) for result in results)
    assert small < large and all(result.plan.rotated for result in results)


@pytest.mark.parametrize(
    "values,why",
    [
        (dict(kinds="ffn"), "turns the axes in which 'hidden' is cut: add it to --kinds"),
        (dict(head="BertForSequenceClassification"), "takes a mean over the features"),
    ],
)
def test_a_run_that_cannot_turn_says_so_before_it_starts(values, why, folders, reviews, tmp_path):
    values = dict(values)
    model = folders[values.pop("head", "LlamaForCausalLM")]
    with pytest.raises((BadRecipe, UnsupportedModel), match=why):
        ibprune.prune(model, 0.6, data=reviews, rotate=True, output=str(tmp_path / "out"), **values)
    assert not list(tmp_path.iterdir())
