"""Torch-Pruning's dependency graph as a witness: the slices that it couples to a unit are those that our rows cut."""

import re
import warnings

import pytest
import torch
import torch_pruning
import transformers
from conftest import TINY, build, inputs_of

from ibprune.families import FAMILIES
from ibprune.groups import Site, axis_dims, axis_width, get_tensor, is_norm
from ibprune.sites import find_sites
from ibprune.tracing import tensors

UNIT = 1
# Tensors that go with the width although no path through the graph says so: what a forward without masked patches, or
# a classifier, never runs; and DeBERTa's relative positions, a stream of their own to which the row gives one width.
BESIDE = {
    "clip": "post_layernorm",
    "dinov2": "mask_token",
    "dinov2_with_registers": "mask_token",
    "deberta-v2": r"rel_embeddings|encoder\.LayerNorm|pos_(key|query)_proj",
}
Slice = tuple[int, int, int]  # id of a tensor, dimension, index


def base_model(family: str) -> torch.nn.Module:
    """Without a head: heads pick single states, where a graph ends."""
    if family == "clip":
        return build(family, "CLIPForImageClassification", dtype=torch.float32)
    return build(family, transformers.MODEL_MAPPING[type(TINY[family]())].__name__, dtype=torch.float32)


def ours(model: torch.nn.Module, site: Site) -> set[Slice]:
    """Everything that goes with the unit."""
    found = set()
    for cut in site.cuts:
        module, features = model.get_submodule(cut.path), axis_width(model, cut)
        if features:
            offset, width = cut.span(site.n_units, features)
            dims = [(id(get_tensor(module, name)), dim) for name, dim in axis_dims(module, cut.axis)]
            found |= {(*dim, offset + UNIT * width + i) for dim in dims for i in range(width)}
    return found


def theirs(model: torch.nn.Module, graph: torch_pruning.DependencyGraph, path: str) -> frozenset[Slice]:
    """Everything that the graph reaches from that feature of a layer's output."""
    owners = {p: module for module in model.modules() for p in module.parameters(recurse=False)}
    layer = model.get_submodule(path)
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    found = set()
    for item in graph.get_pruning_group(layer, prune, [UNIT]).items:
        target = item.dep.target.module
        module = owners.get(target, target)
        if isinstance(target, torch.nn.Parameter):
            axis = "out" if is_norm(module) else "own"
        else:
            axis = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        for name, dim in axis_dims(module, axis):
            tensor = get_tensor(module, name)
            if module is target or tensor is target:
                found |= {(id(tensor), dim, i) for i in item.idxs}
    return frozenset(found)


def trace(model: torch.nn.Module) -> torch_pruning.DependencyGraph:
    model.config.use_cache = False  # the graph does not know the sizes that meet in an empty cache
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            model,
            inputs_of(model),
            output_transform=lambda output: [x * 1.0 for x in tensors(output) if x.grad_fn is not None],
            verbose=False,
        )


# Stacked experts are parameters of three dimensions, which the graph does not follow.
BEYOND_THE_GRAPH = ("gpt2", "mixtral", "qwen3_moe", "qwen3_moe-sparse")


@pytest.mark.parametrize("family", [family for family in TINY if family not in BEYOND_THE_GRAPH])
def test_the_graph_couples_what_a_row_cuts(family):
    """FFN units, and features of the residual stream; of heads it knows single features only."""
    model = base_model(family)
    graph, checked = trace(model), set()
    beside = re.compile(BESIDE.get(model.config.model_type, "$^"))
    left_out = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if beside.search(name)}
    assert bool(left_out) == (model.config.model_type in BESIDE) or family == "deberta-absolute"
    for site in find_sites(model).values():
        starts = [c.path for c in site.cuts if c.axis == "out" and type(model.get_submodule(c.path)) is torch.nn.Linear]
        if site.kind not in ("ffn", "hidden") or not starts:
            continue
        expected = {item for item in ours(model, site) if item[0] not in left_out}
        groups = {
            frozenset(item for item in theirs(model, graph, path) if item[0] not in left_out)
            for path in starts
            if not beside.search(f"{path}.weight")
        }
        assert frozenset().union(*groups) == expected, site.name
        if site.kind == "hidden" and model.config.is_encoder_decoder:  # two streams that meet in one embedding
            assert len(groups) == 2 and frozenset.intersection(*groups)
        else:
            assert len(groups) == 1, site.name
        checked.add(site.kind)
    assert checked == ({"ffn"} if family in ("olmo2", "swin") else {"ffn", "hidden"})


def test_the_graph_takes_gpt2_s_own_linear_layers_for_element_wise_operations():
    model = base_model("gpt2")
    assert isinstance(trace(model).get_pruner_of_module(model.h[0].mlp.c_fc), torch_pruning.ops.ElementWisePruner)


def test_no_row_is_left_out():
    assert {TINY[family]().model_type for family in TINY} == {name for row in FAMILIES for name in row.model_types}
