"""The information audit: what each layer of a model knew of its input and its labels before and after pruning."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import nn

from ibprune.attention import add_heads_
from ibprune.checks import apply_checks_, hard_checks, headline, untouched
from ibprune.console import Quiet
from ibprune.errors import BadData, BadRecipe
from ibprune.features import TOKEN, block_layers, collect, find_layers
from ibprune.inputs import Inputs, draw_tokens
from ibprune.measures import DEFAULTS, AuditSettings, interval_bits, measure_layer, to_bits, token_information
from ibprune.mi.entropies import label_entropy
from ibprune.plans import PruningPlan
from ibprune.sites import has_row

SCHEMA = "ibprune.mi_audit/1"


@dataclass(frozen=True)
class Side:
    """One of the two models: a name for the report and the module."""

    id: str
    model: nn.Module

    def to_dict(self) -> dict:
        return {"id": self.id, "params": sum(p.numel() for p in self.model.parameters())}


def audit(
    before: Side,
    after: Side,
    inputs: Inputs,
    *,
    layers: tuple[str, ...] = (),
    settings: AuditSettings = DEFAULTS,
    plan: PruningPlan | None = None,
    console: Quiet | None = None,
) -> dict:
    """Audits two models on the same inputs with the same noise; the dict of `audit.json`, in bits.

    Per layer: a bracket of I(X; L + noise) through a noise calibrated on the dense model and then frozen,
    V-information about the labels where there are any, spectra, and beside each the error of the same
    estimator on a synthetic twin. Blocks also tell where their attention heads look. Hard checks turn statuses
    to "inconsistent".

    Args:
        layers: Names from `features.find_layers`, which also says what the default is.
        plan: That made the pruned model, to tell which of its heads is which of the dense one's.

    Raises:
        BadData: NaN in a layer, or too few inputs.
        BadRecipe: An unknown layer or pooling.
    """
    console = console or Quiet()
    start = time.perf_counter()
    batch = inputs.batches[0]
    where_before = find_layers(before.model, layers, batch=batch)
    if not layers and not has_row(before.model):
        layers = tuple(where_before)  # stages are those of the dense model
    where_after = find_layers(after.model, layers, batch=batch)
    if list(where_before) != list(where_after):
        raise BadData(
            f"expected the same layers in both models, found {len(where_before)} and {len(where_after)}: "
            "name common ones with --layers."
        )
    if inputs.own is not None and settings.pooling == "random":
        raise BadRecipe("--pooling: 'random' takes the same token of both models, but the vocabulary of one was cut.")
    if inputs.columns is not None:  # labels are tags of words: layers are read where these words begin
        if settings.tokens:
            raise BadData("--tokens: words with tags are asked for their tags already: leave it out.")
        settings = replace(settings, pooling=TOKEN)
    tokens = draw_tokens(inputs, settings.tokens, seed=settings.seed) if settings.tokens else None
    read = {"poolings": (settings.pooling, TOKEN)[: 2 if tokens else 1], "seed": settings.seed}
    read["columns"] = tokens.columns if tokens else inputs.columns
    own = inputs.batches if inputs.own is None else inputs.own
    sides = [
        collect(side.model, console.track(batches, f"reading {what}", len(batches)), where, **read)
        for side, batches, where, what in (
            (before, inputs.batches, where_before, "dense"), (after, own, where_after, "pruned"),
        )
    ]  # fmt: skip
    features = [side[settings.pooling] for side in sides]
    labels = None if inputs.labels is None else np.asarray(inputs.labels)
    stream = block_layers(before.model) if has_row(before.model) else {}

    def measure(name: str) -> dict:
        record = {"name": name, "kind": "residual_stream" if name in stream else "module"}
        record |= measure_layer(features[0][name], features[1][name], labels, settings)
        targets = {"V_token": tokens.current, "V_next": tokens.following} if tokens else {}
        for key in ("V_token", "V_next"):
            at = [side[TOKEN][name] for side in sides] if tokens else []
            record[key] = token_information(*at, targets[key], settings) if tokens else None
        return record

    # critics draw from torch's own generator, which threads would share
    with _side_by_side(1 if settings.pair else torch.get_num_threads()) as run:
        records = list(console.track(run(measure, where_before), "auditing layers", len(where_before)))
    if inputs.own is None:  # heads look at tokens
        add_heads_(
            records, before.model, after.model, inputs.batches, plan=plan, special=inputs.special, console=console
        )
    checks = hard_checks(untouched(before.model, after.model, where_before), *features, records)
    apply_checks_(records, checks)
    n = len(features[0][next(iter(where_before))])
    found = {
        "schema": SCHEMA,
        "unit": "bits",
        "seed": settings.seed,
        "data": {
            "name": inputs.name,
            "n": n,
            "split": inputs.split,
            "dedup_removed": inputs.removed,
            "sha256": inputs.sha256,
            "overlap_with_pruning": inputs.overlap,
        },
        "models": {"before": before.to_dict(), "after": after.to_dict()},
        "labels": _labels(labels),
        "layers": records,
        "checks": checks,
        "env": {
            "torch": version("torch"),
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - start, 1),
        },
    }
    return found | {"headline": headline(found)}


@contextmanager
def _side_by_side(workers: int) -> Iterator[Callable[[Callable[[str], dict], Iterable[str]], Iterator[dict]]]:
    """A map over layers whose threads take one layer each.

    One thread per operation: on matrices of a layer's size the threads of two libraries that wait for each other
    took the probes fifteen times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
            # filters belong to the process: what one layer's context restores, another may still need
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def _labels(labels: np.ndarray | None) -> dict | None:
    if labels is None:
        return None
    entropy = label_entropy(labels)
    return {
        "n_classes": len(np.unique(labels)),
        "H": to_bits(entropy.value),
        "H_ci95": interval_bits(entropy.ci95),
        "status": entropy.status,
    }
