"""A folder with loading code in the tools around it: Trainer, PEFT, bitsandbytes, shards, dtypes, pipelines, copies."""

import copy
import importlib.util

import pytest
import torch
import transformers
from conftest import inputs_of, outputs, random_keep, token_ids
from test_folders import cut, pruned

import ibprune
from ibprune.folders import write_model
from ibprune.models import find_source, load_dense
from ibprune.task_heads import auto_class

CASES = {
    "bert": "BertForSequenceClassification",
    "llama-tied": "LlamaForCausalLM",
    "vit": "ViTForImageClassification",
}
TARGETS = {"bert": "all-linear", "llama-tied": ["q_proj", "down_proj"], "vit": "all-linear"}
needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name}")
    for name in ("peft", "bitsandbytes")
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, tokenizer):
    """A family, its folder, and the outputs of what was written there."""
    family = request.param
    model, plan = pruned(family, CASES[family], lambda sites: random_keep(sites, 5))
    folder = tmp_path_factory.mktemp(family)
    assert write_model(model, None if family == "vit" else tokenizer, plan, folder) == "remote_code"
    return family, folder, outputs(model)


def load(case, folder=None, **options):
    """By the folder's own code."""
    family, own, _ = case
    head = CASES[family]
    auto = getattr(transformers, auto_class(head, family.partition("-")[0]))
    return auto.from_pretrained(folder or own, trust_remote_code=True, **options).eval()


def same(model, expected) -> bool:
    return torch.allclose(outputs(model).float(), expected, atol=1e-5)


def rows(family) -> list[dict]:
    if family == "vit":
        return [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(4)]
    ids = token_ids(4)
    return [{"input_ids": row, "labels": i % 2 if family == "bert" else row} for i, row in enumerate(ids)]


@pytest.mark.parametrize("options", [
    {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_ways_of_loading_give_the_same(case, options):
    assert same(load(case, **options), case[2])


def test_half_precision_is_near(case):
    model = load(case, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(outputs(model).float(), case[2], atol=0.05)


def test_saved_again_whole_or_in_shards_it_loads_both_ways(case, tmp_path):
    for name, size in (("whole", "5GB"), ("shards", "5KB")):
        copy.deepcopy(load(case)).save_pretrained(tmp_path / name, max_shard_size=size)
        assert (tmp_path / name / "modeling_ibprune.py").exists()
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (name == "shards")
        assert same(load(case, tmp_path / name), case[2]) and same(ibprune.load(tmp_path / name), case[2])


def test_saved_from_ibprune_load_it_has_no_code_and_loads_there_only(case, tmp_path):
    ibprune.load(case[1]).save_pretrained(tmp_path / "again")
    assert same(ibprune.load(tmp_path / "again"), case[2])
    assert not list((tmp_path / "again").glob("*.py"))
    with pytest.raises((RuntimeError, ValueError)):
        load(case, tmp_path / "again")


def test_checkpointed_gradients_are_the_plain_ones(case):
    found = []
    for checkpointed in (False, True):
        model = load(case).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)  # dropout
        model(**inputs_of(model)).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(found[1][name], grad, atol=1e-6) for name, grad in found[0].items())


def test_the_trainer_trains_and_its_folders_load_both_ways(case, tmp_path):
    model = load(case)
    options = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, save_steps=2,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=rows(case[0]))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trained = outputs(model.eval())
    assert not torch.allclose(trained, case[2], atol=1e-3)
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-2"):
        assert same(load(case, folder), trained) and same(ibprune.load(folder), trained)


@needs["peft"]
def test_adapters_are_trained_saved_loaded_and_merged(case, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(load(case), LoraConfig(r=2, target_modules=TARGETS[case[0]]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(**inputs_of(model)).logits.square().mean().backward()
        optimizer.step()
    adapted = outputs(model.eval())
    assert not torch.allclose(adapted, case[2], atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(case), tmp_path / "adapter").eval()
    assert same(loaded, adapted)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert same(load(case, tmp_path / "merged"), adapted) and same(ibprune.load(tmp_path / "merged"), adapted)


@needs["peft"]
def test_a_pruned_minilm_is_fine_tuned_by_trainer_and_adapters_and_saved_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ibprune.models.hub_reachable", lambda: False)
    loaded = load_dense(find_source("minilm"), n_labels=2)
    torch.nn.init.normal_(loaded.model.classifier.weight)

    def half_or_more(sites):
        return random_keep({name: site.at_least(site.n_units // 2) for name, site in sites.items()}, 5)

    model, plan = cut(loaded.model, half_or_more, factorize=False)
    (tmp_path / "small").mkdir()
    assert write_model(model, loaded.tokenizer, plan, tmp_path / "small") == "remote_code"
    case = "bert", tmp_path / "small", outputs(model)
    test_the_trainer_trains_and_its_folders_load_both_ways(case, tmp_path)
    test_adapters_are_trained_saved_loaded_and_merged(case, tmp_path)


@needs["peft"]
def test_an_adapter_cannot_name_the_layer_of_a_sublayer_that_is_gone(case):
    """Post-norm blocks keep what calls it, so an identity has its name: "all-linear" passes over it."""
    if case[0] != "bert":
        pytest.skip("pre-norm blocks lose the name too")
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="Identity"):
        get_peft_model(load(case), LoraConfig(r=2, target_modules=["query", "dense"]))


@pytest.mark.parametrize("task,family", [("text-classification", "bert"), ("text-generation", "llama-tied")])
def test_pipelines_take_the_folder(case, task, family):
    if case[0] != family:
        pytest.skip("another task")
    found = transformers.pipeline(task, model=str(case[1]), trust_remote_code=True)("the film", **(
        {"max_new_tokens": 3, "do_sample": False} if family != "bert" else {}
    ))  # fmt: skip
    assert found[0].keys() == ({"label", "score"} if family == "bert" else {"generated_text"})


def test_a_pipeline_classifies_pictures(case):
    if case[0] != "vit":
        pytest.skip("another task")
    from PIL import Image

    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    classify = transformers.pipeline("image-classification", model=load(case), image_processor=processor)
    assert {found["label"] for found in classify(Image.new("RGB", (8, 8)))} == {"LABEL_0", "LABEL_1"}


@needs["bitsandbytes"]
def test_in_4_bits_it_computes_what_its_weights_then_say(case):
    from bitsandbytes.functional import dequantize_4bit

    model = load_quantised(case, load_in_4bit=True)
    layers = {name: m.weight for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) > 3
    plain = load(case)
    with torch.no_grad():
        for name, weight in layers.items():
            plain.get_submodule(name).weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    assert same(model, outputs(plain)) and not same(model, case[2])


@needs["bitsandbytes"]
def test_in_8_bits_it_computes_nearly_the_same(case):
    model = load_quantised(case, load_in_8bit=True)
    assert sum(type(module).__name__ == "Linear8bitLt" for module in model.modules()) > 3
    error = (outputs(model).float() - case[2]).norm() / case[2].norm()
    assert 0 < error < 0.2


def load_quantised(case, **options):
    """For a CPU bitsandbytes would compile its kernels, which takes minutes."""
    torch.compiler.set_stance("force_eager")
    return load(case, quantization_config=transformers.BitsAndBytesConfig(**options))


@pytest.fixture(autouse=True)
def no_compiler():
    yield
    torch.compiler.set_stance("default")
