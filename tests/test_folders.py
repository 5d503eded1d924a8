"""Exports: the tiers, strict loading, and what happens when something is wrong with the folder."""

import ast
import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
import torch
import transformers
from conftest import CASES, LANGUAGE_MODELS, build, outputs, random_keep, token_ids, written
from safetensors.torch import load_file, save_file

import ibprune
from ibprune.checksums import checksums
from ibprune.embeddings import factorize_
from ibprune.errors import BadRecipe, IBPruneError, PlanMismatch
from ibprune.folders import check_output, staged, tier_of, verify, write_model
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_
from ibprune.task_heads import auto_class


def pruned(family, head, keep_of, factorize=True):
    return cut(build(family, head, dtype=torch.float32), keep_of, factorize)


def cut(model, keep_of, factorize=True):
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    if factorize and find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    plan = PruningPlan(model.config.model_type, {n: s.n_units for n, s in sites.items()}, keep_of(sites))
    return compact_(model, plan), plan


def uniform(sites, **counts):
    return {n: tuple(range(counts.get(s.kind, s.n_units))) for n, s in sites.items()}


@pytest.mark.parametrize(
    "family,head",
    [
        ("bert", "BertModel"),
        ("bert", "BertForMaskedLM"),
        ("llama-tied", "LlamaForCausalLM"),
        ("llama", "LlamaForSequenceClassification"),
        ("gpt2", "GPT2LMHeadModel"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_uneven_plans_reload_in_a_fresh_process_every_way(family, head, tmp_path, tokenizer):
    model, plan = pruned(family, head, lambda sites: random_keep(sites, 5))
    tier = write_model(model, tokenizer, plan, tmp_path)
    assert tier == "remote_code"
    found = verify(model, tmp_path, tier)
    assert found["max_abs_diff"] <= 1e-5 and found["ways"] == ["ibprune", "transformers"]
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in model.parameters())
    assert torch.allclose(outputs(ibprune.load(tmp_path)), outputs(model), atol=1e-5)
    assert not ibprune.load(tmp_path).training
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_uneven_plans_of_every_family_reload_with_and_without_the_folder_s_code(model_type, tmp_path, tokenizer):
    family, head = LANGUAGE_MODELS[model_type]
    model, plan = pruned(family, head, lambda sites: random_keep(sites, 5))
    assert write_model(model, tokenizer, plan, tmp_path) == "remote_code"
    auto = getattr(transformers, auto_class(head, model_type))
    by_code = auto.from_pretrained(tmp_path, trust_remote_code=True, attn_implementation="eager").eval()
    for loaded in (by_code, ibprune.load(tmp_path)):
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-5)
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", ["gpt2", "distilbert", "gemma2", "qwen2", "albert"])
def test_plans_that_plain_transformers_can_build_load_there(model_type, tmp_path, tokenizer):
    family, head = LANGUAGE_MODELS[model_type]
    model, plan = pruned(family, head, lambda sites: uniform(sites, ffn=8), factorize=False)
    assert write_model(model, tokenizer, plan, tmp_path) == "vanilla"
    plain = getattr(transformers, head).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.allclose(outputs(plain), outputs(model), atol=1e-5)


@pytest.mark.parametrize(
    "family,head",
    [
        ("gemma2", "Gemma2ForCausalLM"),  # scales its embeddings by sqrt(width)
        ("bart-scaled", "BartForConditionalGeneration"),
        ("t5", "T5ForConditionalGeneration"),  # divides by it before the output
    ],
)
def test_a_scale_that_follows_the_width_is_not_lost(family, head):
    """Plain transformers would take the pruned width's."""
    model, _ = pruned(family, head, lambda sites: uniform(sites, hidden=12), factorize=False)
    assert tier_of(model) == "remote_code"
    if family != "gemma2":
        kept = lambda sites: uniform(sites, heads=3, ffn=8)  # noqa: E731
        assert tier_of(pruned(family, head, kept, factorize=False)[0]) == (
            "vanilla" if family == "t5" else "remote_code"
        )


@pytest.mark.parametrize("family", ["bart", "bart-scaled", "t5", "t5-gated"])
def test_a_pruned_encoder_decoder_writes_alike_after_reloading(family, tmp_path, tokenizer):
    (head,) = (h for f, h in CASES if f == family and h.endswith("Generation"))
    model, plan = pruned(family, head, lambda sites: random_keep(sites, 5))
    tier = write_model(model, tokenizer, plan, tmp_path)
    found = verify(model, tmp_path, tier)
    assert tier == "remote_code" and found["max_abs_diff"] <= 1e-5 and found["ways"] == ["ibprune", "transformers"]
    assert list(json.loads((tmp_path / "config.json").read_text())["auto_map"])[-1] == "AutoModelForSeq2SeqLM"
    loaded = ibprune.load(tmp_path)
    for beams in (1, 3):
        ids, logits = written(model, beams=beams, cache=True)
        for cache in (True, False):
            same, other = written(loaded, beams=beams, cache=cache)
            assert torch.equal(same, ids) and torch.allclose(other, logits, atol=1e-5 * logits.abs().max())


def test_an_output_that_a_checkpoint_holds_apart_from_the_embedding_stays_apart(tmp_path, tokenizer):
    """Flan-T5: its config says that they are tied, its weights that they are not."""
    model = build("t5-gated", "T5ForConditionalGeneration", dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model, plan = cut(model, lambda sites: random_keep(sites, 5))
    assert model.config.scale_decoder_outputs is False
    tier = write_model(model, tokenizer, plan, tmp_path)
    assert verify(model, tmp_path, tier)["max_abs_diff"] <= 1e-5
    assert ibprune.load(tmp_path).config.scale_decoder_outputs is False


@pytest.mark.parametrize("head", ["T5EncoderModel", "T5ForSequenceClassification"])
def test_other_heads_of_t5_load_every_way(head, tmp_path, tokenizer):
    model, plan = pruned("t5", head, lambda sites: random_keep(sites, 5))
    assert verify(model, tmp_path, write_model(model, tokenizer, plan, tmp_path))["max_abs_diff"] <= 1e-5


@pytest.mark.usefixtures("own_process")
def test_a_uniform_llama_loads_with_plain_transformers(tmp_path, tokenizer):
    # 2 of 3 KV groups leave 4 query heads of width 4: the family takes head_dim
    model, plan = pruned("llama", "LlamaForCausalLM", lambda s: uniform(s, kv_groups=2, ffn=8), factorize=False)
    assert write_model(model, tokenizer, plan, tmp_path) == "vanilla"
    assert verify(model, tmp_path, "vanilla")["max_abs_diff"] <= 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config and "ibprune" not in config
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (4, 2, 8)


@pytest.mark.parametrize("family,head", [("vit", "ViTModel"), ("dinov2", "Dinov2ForImageClassification")])
def test_fewer_heads_need_no_code_where_the_family_takes_their_width(family, head, tmp_path):
    model, plan = pruned(family, head, lambda sites: uniform(sites, heads=2))
    assert write_model(model, None, plan, tmp_path) == "vanilla"
    assert verify(model, tmp_path, "vanilla")["max_abs_diff"] <= 1e-5
    model, _ = pruned("vit", "ViTModel", lambda sites: uniform(sites, heads=3, hidden=12, ffn=8))
    assert tier_of(model) == "vanilla"


@pytest.mark.parametrize("family", ["qwen2", "smollm3", "olmo2", "mixtral", "qwen3_moe"])
def test_fewer_kv_groups_are_vanilla_where_the_config_takes_the_width_of_a_head_only_when_asked(
    family, tmp_path, tokenizer
):
    head = next(head for f, head in CASES if f == family and head.endswith("CausalLM"))
    model, plan = pruned(family, head, lambda sites: uniform(sites, kv_groups=2), factorize=False)
    assert write_model(model, tokenizer, plan, tmp_path) == "vanilla"
    plain = getattr(transformers, head).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.allclose(outputs(plain), outputs(model), atol=1e-5)


def test_dropped_layers_are_vanilla_in_a_pre_norm_family():
    def keep(sites):
        return uniform(sites) | {n: () for n in sites if n.startswith("layers.1.") and n.endswith("_sublayer")}

    model, _ = pruned("llama", "LlamaForCausalLM", keep, factorize=False)
    assert tier_of(model) == "vanilla" and model.config.num_hidden_layers == 2
    model, _ = pruned("llama", "LlamaForCausalLM", lambda s: keep(s) | {"layers.0.ffn_sublayer": ()}, factorize=False)
    assert tier_of(model) == "remote_code"


def test_bert_is_vanilla_with_even_ffn_only():
    assert tier_of(pruned("bert", "BertModel", lambda s: uniform(s, ffn=8), factorize=False)[0]) == "vanilla"
    assert tier_of(pruned("bert", "BertModel", lambda s: uniform(s, heads=2), factorize=False)[0]) == "remote_code"
    both = lambda s: uniform(s, heads=2, hidden=12)  # noqa: E731 - the family's own ratio of heads to width
    assert tier_of(pruned("bert", "BertModel", both, factorize=False)[0]) == "vanilla"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("export")
    model, plan = pruned("bert", "BertForSequenceClassification", lambda sites: random_keep(sites, 6))
    write_model(model, tokenizer, plan, path)
    return path


def spoil_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename(tensors):
    tensors["bert.pooler.dense.wait"] = tensors.pop("bert.pooler.dense.weight")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("classifier.bias"),
        lambda t: t.update(extra=torch.zeros(3)),
        lambda t: t.update({"classifier.weight": torch.zeros(2, 99)}),
        rename,
    ],
    ids=["missing", "extra", "mismatched", "renamed"],
)
def test_any_tensor_that_does_not_fit_is_an_error(change, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil_weights(copy, change)
    with pytest.raises(PlanMismatch):
        ibprune.load(copy)


@pytest.mark.parametrize("spoil", ["truncated", "not json", "no file", "other class", "no config"])
def test_damaged_folders_are_refused(spoil, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    if spoil == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif spoil == "not json":
        config.write_text("{")
    elif spoil == "no file":
        weights.unlink()
    elif spoil == "no config":
        config.unlink()
    else:
        raw = json.loads(config.read_text())
        raw["ibprune"]["architecture"] = "Trainer"
        config.write_text(json.dumps(raw))
    with pytest.raises(IBPruneError):
        ibprune.load(copy)


@pytest.mark.parametrize("what", ["uneven widths", "only a sub-layer gone"])
def test_plain_transformers_refuses_the_folder_rather_than_guess(what, tmp_path, tokenizer):
    def keep(sites):
        if what == "uneven widths":
            return random_keep(sites, 6)
        return uniform(sites) | {"encoder.layer.1.ffn_sublayer": ()}

    model, plan = pruned("bert", "BertForSequenceClassification", keep, factorize=what == "uneven widths")
    tier = write_model(model, tokenizer, plan, tmp_path)
    assert tier == "remote_code" and verify(model, tmp_path, tier)["max_abs_diff"] < 1e-5
    code = f"import transformers; transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})"
    found = fresh.run([sys.executable, "-c", code])
    refusals = ("trust_remote_code", "mismatch", "is not a multiple of")  # the last: BERT checks its own widths first
    assert found.returncode != 0 and any(reason in found.stderr for reason in refusals)


def test_a_loaded_model_can_be_copied_and_pickled_by_its_user(folder):
    """As any model of transformers: to other processes, or by `torch.save`."""
    model = ibprune.load(folder).eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own
        assert type(again) is type(model) and type(ibprune.load(folder)) is type(model)
        assert torch.equal(outputs(again), outputs(model))


def test_the_tokenizer_loads_without_remote_code(folder):
    code = f"import transformers; transformers.AutoTokenizer.from_pretrained({str(folder)!r})"
    found = fresh.run([sys.executable, "-c", code])
    assert found.returncode == 0 and "custom code" not in found.stdout + found.stderr


def test_the_generated_file_is_short_and_needs_transformers_only(folder):
    code = (folder / "modeling_ibprune.py").read_text()
    assert "import ibprune" not in code and "from ibprune" not in code
    compile(code, "modeling_ibprune.py", "exec")


@pytest.mark.parametrize(
    "family,head,kinds,most",
    [
        ("bert", "BertForSequenceClassification", ("heads", "ffn", "hidden"), 105),
        ("bert", "BertForMaskedLM", (), 180),
        ("llama-tied", "LlamaForCausalLM", ("kv_groups", "ffn", "hidden"), 115),
        ("llama-tied", "LlamaForCausalLM", (), 175),
        ("vit", "ViTForImageClassification", (), 165),
    ],
)
def test_the_generated_file_holds_what_its_model_takes_and_nothing_else(family, head, kinds, most, tmp_path):
    def keep_of(sites):
        keep = random_keep(sites, 5)
        return {n: keep[n] if not kinds or s.kind in kinds else tuple(range(s.n_units)) for n, s in sites.items()}

    model, plan = pruned(family, head, keep_of, factorize=not kinds)
    assert write_model(model, None, plan, tmp_path) == "remote_code"
    code = (tmp_path / "modeling_ibprune.py").read_text()
    assert len(code.splitlines()) <= most
    for how in (["check"], ["format", "--check"]):  # the README's command for the tests reads the folder of its first
        config = ["--config", str(Path(__file__).parents[1] / "pyproject.toml")]
        found = subprocess.run([sys.executable, "-m", "ruff", *how, *config, tmp_path], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
    tree = ast.parse(code)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {name for name in defined if not name.startswith("Pruned")} <= used
    assert all(ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef))
    assert not kinds or not {"Zeros", "FactorizedEmbedding", "put_stubs_"} & defined


def test_verification_fails_when_the_weights_changed(folder, tmp_path, tokenizer):
    model, plan = pruned("bert", "BertForSequenceClassification", lambda sites: random_keep(sites, 6))
    tier = write_model(model, tokenizer, plan, tmp_path)
    spoil_weights(tmp_path, lambda t: t["classifier.bias"].add_(0.01))
    with pytest.raises(PlanMismatch, match="differs by"):
        verify(model, tmp_path, tier)


def test_a_failed_export_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "whole") as temporary:
        (temporary / "file").write_text("x")
        (temporary / "file").chmod(0o600)
    assert (tmp_path / "whole" / "file").stat().st_mode & 0o777 == 0o644
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(BadRecipe, match="new or empty"):
        check_output(tmp_path / "full")


def test_stubs_are_told_from_what_the_dense_model_has_in_their_place():
    """ModernBERT's first norm is an identity: another one took its place in memory, and was left out of the folder."""
    for first in (0, 1) * 5:
        gone = range(first, 3)
        keep = lambda sites: uniform(sites) | {f"layers.{i}.attention_sublayer": () for i in gone}  # noqa: B023, E731
        model, _ = pruned("modernbert", "ModernBertModel", keep, factorize=False)
        norms = {path for path in model.config.ibprune["stubs"] if path.endswith("attn_norm")}
        assert norms == {f"layers.{i}.attn_norm" for i in gone}


def test_a_plan_that_does_not_fit_changes_nothing():
    model = build("bert", "BertModel")
    before, sites = outputs(model), find_sites(model)
    n_units = {n: s.n_units for n, s in sites.items()}
    full = uniform(sites)
    for plan, reason in (
        (PruningPlan("llama", n_units, full), "model_type"),
        (PruningPlan("bert", n_units | {"hidden": 23}, full), "counts 23 units"),
        (PruningPlan("bert", n_units, full | {"hidden": ()}), "at least 1"),
        (PruningPlan("bert", n_units | {"hiden": 1}, full | {"hiden": (0,)}), "did you mean 'hidden'"),
        (PruningPlan("bert", n_units | {"embedding_rank": 24}, full | {"embedding_rank": ()}), "at least 1"),
    ):
        with pytest.raises(PlanMismatch, match=reason):
            compact_(model, plan)
        assert torch.allclose(outputs(model), before, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="other/1"),
        lambda d: d.update(format="ibprune.plan/0"),
        lambda d: d["keep"].update(hidden=[3, 1]),
        lambda d: d["keep"].update(hidden=[0, 0]),
        lambda d: d["keep"].update(hidden=[-1]),
        lambda d: d["keep"].update(hidden=[10**9]),
        lambda d: d["keep"].update(hidden=["0"]),
        lambda d: d["keep"].pop("hidden"),
        lambda d: d.update(n_units=[]),
    ],
)
def test_malformed_plans_are_refused(change, folder, tmp_path):
    data = json.loads((folder / "plan.json").read_text())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanMismatch):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_pruned_decoder_generates_alike_with_and_without_cache_after_reloading(tmp_path, tokenizer):
    model, plan = pruned("llama-tied", "LlamaForCausalLM", lambda sites: random_keep(sites, 7))
    write_model(model, tokenizer, plan, tmp_path)
    loaded = ibprune.load(tmp_path)
    expected = model.generate(token_ids(), max_new_tokens=8, do_sample=False, eos_token_id=None)
    for cache in (True, False):
        found = loaded.generate(token_ids(), max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("left", ["some", "none"])
def test_a_folder_of_format_1_is_numbered_by_the_loader(left, tmp_path, tokenizer):
    def keep_of(sites):
        keep = random_keep(sites, 7) | {name: (0,) for name, site in sites.items() if site.kind == "layers"}
        gone = (name for name in keep if name.endswith("attention_sublayer") and (left == "none" or ".0." in name))
        return keep | dict.fromkeys(gone, ())

    model, plan = pruned("opt", "OPTForCausalLM", keep_of)
    write_model(model, tokenizer, plan, tmp_path)
    expected = model.generate(token_ids(), max_new_tokens=8, do_sample=False, eos_token_id=None)
    raw = json.loads((tmp_path / "config.json").read_text())
    spec = raw["ibprune"] | {"format": 1}
    assert any(path.endswith("layer_idx") for path in spec["sizes"]) == (left == "some")
    spec["sizes"] = {path: size for path, size in spec["sizes"].items() if not path.endswith("layer_idx")}
    spec["stubs"] = {path: stub.removeprefix("counting_") for path, stub in spec["stubs"].items()}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"ibprune": spec}))
    loaded = ibprune.load(tmp_path)
    assert torch.equal(loaded.generate(token_ids(), max_new_tokens=8, do_sample=False, eos_token_id=None), expected)


@pytest.mark.parametrize("family,head", [("gpt2", "GPT2LMHeadModel"), ("opt", "OPTForCausalLM")])
def test_sizes_of_the_blocks_behind_a_dropped_one_are_theirs_after_reloading(family, head, tmp_path, tokenizer):
    def keep(sites):
        gone = [n for n in sites if ".1." in n and n.endswith("_sublayer")]
        heads = {n: tuple(range(1 + i)) for i, n in enumerate(n for n in sites if n.endswith(".heads"))}
        return uniform(sites) | heads | dict.fromkeys(gone, ())

    model, plan = pruned(family, head, keep, factorize=False)
    assert model.config.num_hidden_layers == 2
    write_model(model, tokenizer, plan, tmp_path)
    assert torch.allclose(outputs(ibprune.load(tmp_path)), outputs(model), atol=1e-5)


def test_a_generic_head_loads_where_only_sublayers_are_gone(tmp_path, tokenizer):
    """Such a folder has a model type of its own, and the head builds its backbone through AutoModel."""
    keep = lambda sites: uniform(sites) | {"layers.1.ffn_sublayer": ()}  # noqa: E731
    model, plan = pruned("llama", "LlamaForSequenceClassification", keep, factorize=False)
    tier = write_model(model, tokenizer, plan, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ibprune_llama"
    assert verify(model, tmp_path, tier)["max_abs_diff"] <= 1e-5


def test_auto_model_is_offered_only_where_it_finds_all_its_weights(tmp_path, tokenizer):
    for head, offered in (("BertForMaskedLM", False), ("BertForSequenceClassification", True)):
        model, plan = pruned("bert", head, lambda sites: random_keep(sites, 5))
        (tmp_path / head).mkdir()
        write_model(model, tokenizer, plan, tmp_path / head)
        assert ("AutoModel" in json.loads((tmp_path / head / "config.json").read_text())["auto_map"]) == offered


@pytest.mark.parametrize("units,expected", [({"ffn": 8}, "vanilla"), ({"heads": 2}, "remote_code")])
def test_a_head_that_no_auto_class_builds_loads_every_way(units, expected, tmp_path):
    model, plan = pruned("clip_vision_model", "CLIPVisionModelWithProjection", lambda sites: uniform(sites, **units))
    tier = write_model(model, None, plan, tmp_path)
    assert tier == expected
    assert verify(model, tmp_path, tier)["max_abs_diff"] <= 1e-5


def test_outputs_that_cannot_be_are_refused_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for bad in (tmp_path / "file" / "sub", tmp_path / "link", ".", "/proc/x", tmp_path / ("a" * 300)):
        with pytest.raises(BadRecipe, match="output"):
            check_output(bad)
    with pytest.raises(BadRecipe, match="outside the model's folder"):
        check_output(tmp_path / "model" / "out", model=str(tmp_path / "model"))
    assert not any((tmp_path / "model").iterdir()) and not any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("raw", ["null", "[1]", '{"ibprune": "x"}', '{"ibprune": {"format": 1}}', '{"ibprune": []}'])
def test_configs_of_another_kind_are_refused(raw, tmp_path):
    (tmp_path / "config.json").write_text(raw)
    with pytest.raises(PlanMismatch):
        ibprune.load(tmp_path)


def test_another_format_and_nan_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"ibprune": raw["ibprune"] | {"format": 99}}))
    with pytest.raises(PlanMismatch, match="format 99"):
        ibprune.load(tmp_path / "copy")
    path.write_text(json.dumps(raw))
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IBPruneError, match="NaN"):
        ibprune.load(tmp_path / "copy")


@pytest.fixture(scope="module")
def summed(folder, tmp_path_factory):
    """The folder with a report that holds its checksums, as a run leaves it."""
    path = tmp_path_factory.mktemp("summed") / "copy"
    shutil.copytree(folder, path)
    (path / "audit").mkdir()
    (path / "audit" / "plot.png").write_bytes(b"plot")
    (path / "README.md").write_text("card")
    (path / "report.html").write_text("page")
    (path / "report.json").write_text(json.dumps({"sha256": checksums(path)}))
    return path


def test_one_flipped_byte_of_any_file_is_refused(summed, tmp_path):
    sums = json.loads((summed / "report.json").read_text())["sha256"]
    assert set(sums) >= {"model.safetensors", "config.json", "plan.json", "modeling_ibprune.py", "audit/plot.png"}
    assert not {"report.json", "report.html", "README.md"} & set(sums)
    assert ibprune.load(summed)
    shutil.copytree(summed, tmp_path / "copy")
    for name in sums:
        file = tmp_path / "copy" / name
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for spoiled in (flipped, whole[:-1], b""):
            file.write_bytes(spoiled)
            with pytest.raises(PlanMismatch, match=f"{name}, as in report.json.*altered or cut short"):
                ibprune.load(tmp_path / "copy")
        file.write_bytes(whole)
    assert ibprune.load(tmp_path / "copy")


def test_files_that_a_user_adds_edits_or_drops_do_not_stop_a_folder_from_loading(summed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(summed, copy)
    (copy / "onnx").mkdir()
    (copy / "onnx" / "model.onnx").write_bytes(b"mine")
    (copy / "README.md").write_text("my own words")
    (copy / "plan.json").unlink()
    assert ibprune.load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(PlanMismatch, match="'model.safetensors'.*found none"):
        ibprune.load(copy)
    (copy / "report.json").unlink()
    with pytest.raises(PlanMismatch):
        ibprune.load(copy)


@pytest.mark.parametrize(
    "report", ["{", "[1]", '{"sha256": [1]}', '{"sha256": {"../config.json": "0"}}', '{"sha256": {"config.json": 1}}']
)
def test_reports_that_are_none_are_refused(report, summed, tmp_path):
    shutil.copytree(summed, tmp_path / "copy")
    (tmp_path / "copy" / "report.json").write_text(report)
    with pytest.raises(PlanMismatch, match="folder again"):
        ibprune.load(tmp_path / "copy")


def test_with_new_checksums_the_shapes_still_have_to_agree(summed, tmp_path):
    """Who changes a file can change its sum: the strict loader is what stands behind it."""
    copy = tmp_path / "copy"
    shutil.copytree(summed, copy)
    raw = json.loads((copy / "config.json").read_text())
    name = next(iter(raw["ibprune"]["shapes"]))
    raw["ibprune"]["shapes"][name][0] += 1
    (copy / "config.json").write_text(json.dumps(raw))
    (copy / "report.json").write_text(json.dumps({"sha256": checksums(copy)}))
    with pytest.raises(PlanMismatch, match="does not load|mismatched"):
        ibprune.load(copy)
