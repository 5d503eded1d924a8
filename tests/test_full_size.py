"""Costs at full size: real configs without weights, on the meta device, against real counters."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import random_keep
from torch.utils.flop_counter import FlopCounterMode

from ibprune.costs import count_params, macs_model, params_model
from ibprune.embeddings import factorize_
from ibprune.examples import example_inputs
from ibprune.plans import PruningPlan
from ibprune.sites import find_family, find_sites
from ibprune.surgery import compact_

LENGTH = 128
PUBLISHED = json.loads((Path(__file__).parents[1] / "scripts" / "published_configs.json").read_text())
HEADLESS = {"bert": "BertModel", "roberta": "RobertaModel"}  # of these the published count is without a head
NAMES = [name for name, model in PUBLISHED.items() if model["config"]["model_type"] != "resnet"]  # it is traced


def macs(model) -> int:
    """Multiply-accumulates of one sequence or image, by torch's own counter."""
    counter = FlopCounterMode(display=False)
    inputs = {key: value.to("meta") for key, value in example_inputs(model, batch=1, length=LENGTH).items()}
    with counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NAMES)
def test_costs_of_published_models_and_of_a_random_plan_are_exact(name):
    published, values = PUBLISHED[name]["params"], dict(PUBLISHED[name]["config"])
    kind, (trained,) = values.pop("model_type"), values.pop("architectures")
    config = transformers.AutoConfig.for_model(kind, **values, attn_implementation="eager")
    with torch.device("meta"):
        model = getattr(transformers, HEADLESS.get(kind, trained))(config).eval()
    assert count_params(model) == published
    dense = macs(model)
    if find_family(model.config.model_type).factorizes:
        factorize_(model)
    sites = find_sites(model)
    costs = params_model(model, sites), macs_model(model, sites, length=LENGTH)
    n_units = {site.name: site.n_units for site in sites.values()}
    assert [cost(n_units) for cost in costs] == [published, dense]
    plan = PruningPlan(model.config.model_type, n_units, random_keep(sites, 3))
    compact_(model, plan)
    assert [cost(plan.kept()) for cost in costs] == [count_params(model), macs(model)]
