"""Models that must not be pruned: each is one line that says why, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, build, outputs, random_keep
from safetensors.torch import load_file, save_file
from test_cli import refused

import ibprune
from ibprune.costs import count_params, params_model
from ibprune.embeddings import factorize_
from ibprune.errors import IBPruneError, UnsupportedModel
from ibprune.folders import write_model
from ibprune.models import Source, load_dense
from ibprune.plans import PruningPlan
from ibprune.sites import find_sites
from ibprune.surgery import SPEC_KEYS, compact_


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {key.replace("layer.1.intermediate.dense", "layer.1.wide"): value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def leave_the_adapter_alone(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "bert"}')
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def forget_embeddings(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (name,) = (key for key in weights if key.endswith("word_embeddings.weight"))
    weights[name] = weights[name][:12].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, vocab_size=12)


OLD = dict.fromkeys(SPEC_KEYS, {}) | {"format": 1, "model_type": "bert", "architecture": "BertModel"}
FOLDERS = {
    "renamed tensor": (rename_a_tensor, "2 are missing or of another shape, such as"),
    "unknown type": (lambda folder: set_config(folder, model_type="robertta"), "did you mean 'roberta'"),
    "quantised": (
        lambda folder: set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised: prune the full-precision model",
    ),
    "half a structure": (lambda folder: set_config(folder, ibprune={"format": 2}), "found none of model_type"),
    "pruned by the first ibprune": (lambda folder: set_config(folder, ibprune=OLD), "start from the dense model"),
    "adapter beside its base": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "is a PEFT adapter: merge it",
    ),
    "adapter alone": (leave_the_adapter_alone, "is a PEFT adapter: merge it"),
    "tokens beyond the embeddings": (forget_embeddings, "beyond the model's 12 embeddings"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_cannot_be_pruned(what, folders, stories, tmp_path, capsys):
    spoil, expected = FOLDERS[what]
    shutil.copytree(folders["BertModel"], tmp_path / "model")
    spoil(tmp_path / "model")
    values = {"data": stories, "mask_steps": 0, "recover_steps": 0, "output": str(tmp_path / "out")}
    flags = [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", value)]
    assert expected in refused(capsys, "--model", tmp_path / "model", "--budget", "0.5", *flags, "--quiet")
    with pytest.raises(IBPruneError) as error:
        ibprune.prune(str(tmp_path / "model"), 0.5, **values)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank one beside it, as PEFT wraps them."""

    def __init__(self, base_layer: torch.nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Packed(torch.nn.Module):
    """A layer whose weights are no parameters, as torch's own quantisation leaves them."""

    __module__ = "torch.ao.nn.quantized.dynamic.modules.linear"


@pytest.mark.parametrize(
    "family,head,layer",
    [
        ("bert", "BertModel", "encoder.layer.0.attention.self.query"),
        ("llama", "LlamaForCausalLM", "model.layers.0.mlp.up_proj"),
    ],
)
def test_models_in_memory_that_are_wrapped_or_packed(family, head, layer):
    model = build(family, head, dtype=torch.float32)
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, Adapted(model.get_submodule(layer)))
    with pytest.raises(UnsupportedModel, match=f"'{layer}"):
        find_sites(model)
    model = build(family, head, dtype=torch.float32)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedModel, match="is quantised"):
        find_sites(model)
    model = build(family, head, dtype=torch.float32)
    setattr(model.get_submodule(parent), name, Packed())
    with pytest.raises(UnsupportedModel, match=f"'{layer}' is quantised"):
        find_sites(model)


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("family,head", [("llama-tied", "LlamaForCausalLM"), ("bert", "BertForMaskedLM")])
def test_weights_that_differ_although_the_config_ties_them_stay_apart(family, head, factorized, tmp_path, tokenizer):
    """Tying them would lose one, so they are two: in the counts, in the masks and in the folder."""
    model = build(family, head, dtype=torch.float32)
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(torch.randn_like(output.weight))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    loaded = load_dense(Source("dense", str(tmp_path / "dense"))).model
    assert loaded.config.tie_word_embeddings and torch.allclose(outputs(loaded), outputs(model), atol=1e-4)
    if factorized:
        factorize_(loaded)
    sites = find_sites(loaded)
    cost = params_model(loaded, sites)
    plan = PruningPlan(loaded.config.model_type, {n: s.n_units for n, s in sites.items()}, random_keep(sites, 5))
    compact_(loaded, plan)
    assert cost(plan.kept()) == count_params(loaded)
    (tmp_path / "small").mkdir()
    write_model(loaded, tokenizer, plan, tmp_path / "small")
    small = ibprune.load(tmp_path / "small")
    assert count_params(small) == count_params(loaded)
    assert torch.allclose(outputs(small), outputs(loaded), atol=1e-5)


@pytest.mark.parametrize("variant", [{"word_embed_proj_dim": 16}, {"do_layer_norm_before": False}])
def test_variants_of_opt_that_no_row_covers_are_refused_as_such(variant):
    """OPT-350m has both: narrow embeddings, and norms behind the sub-layers."""
    config = TINY["opt"]()
    for key, value in variant.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModel, match="a variant of 'opt' that is not covered"):
        ibprune.plan(config, 0.7)
