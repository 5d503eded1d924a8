"""The public Python names: prune, train, load; plan, estimate, sensitivity; audit, bench; push, export, …; masks."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ibprune.benchmarking import bench
from ibprune.comparing import audit
from ibprune.console import Quiet
from ibprune.errors import BadRecipe
from ibprune.estimating import estimate
from ibprune.exporting import export
from ibprune.hub_folders import fetch, push
from ibprune.legacy import convert_legacy
from ibprune.loading import load as load_transformer
from ibprune.masked_training import MaskedTraining
from ibprune.module_files import is_module_folder, load_module
from ibprune.module_pipeline import ModuleResult, make_settings, prune_module
from ibprune.pipeline import PruneResult
from ibprune.planning import plan
from ibprune.recipe import make_recipe
from ibprune.sensing import sensitivity
from ibprune.smallest import carry_out
from ibprune.training import train_dense

__all__ = [
    "MaskedTraining",
    "ModuleResult",
    "PruneResult",
    "audit",
    "bench",
    "convert_legacy",
    "estimate",
    "export",
    "load",
    "plan",
    "prune",
    "push",
    "sensitivity",
    "train",
]


def prune(
    model: str | nn.Module | None = None,
    budget: float | tuple[float, ...] | None = None,
    *,
    recipe: str | None = None,
    console: Quiet | None = None,
    **overrides: object,
) -> PruneResult | tuple[PruneResult, ...] | ModuleResult:
    """Prunes a trained model to a share of its size or compute.

    By name, a transformer: the result is also a folder that loads. As an `nn.Module`, any network that
    reads one tensor, from a loader of (input, target) pairs: the result is a module, `.save(folder)` writes it.

    Args:
        model: Hub id, folder or alias; or the module, which stays as it is.
        budget: Share of the dense cost to keep, in (0, 1]. Several give nested models, a result and a folder for each.
        recipe: A YAML recipe; the other arguments override it (by name only).
        console: Where progress is shown; nothing by default.
        overrides: By name, the other fields of `ibprune.recipe.Recipe`, such as score="fisher" or output="out".
            For a module, train_loader=, eval_fn=, example= and loss= of `module_pipeline.prune_module`,
            and the fields of `module_pipeline.ModuleSettings`.

    Raises:
        IBPruneError: Anything the user can mend, in one line.

    Example:
        >>> result = prune("minilm", 0.3, output="small")  # doctest: +SKIP
        >>> result.report["pruned"]["params"]  # doctest: +SKIP
        >>> result = prune(net, 0.5, cost="macs", train_loader=loader, eval_fn=accuracy)  # doctest: +SKIP
        >>> result.save("small")  # doctest: +SKIP
    """
    values = {"model": model, "budget": budget} | overrides
    if not isinstance(model, nn.Module):
        return carry_out(
            make_recipe({k: v for k, v in values.items() if v is not None}, file=recipe), console or Quiet()
        )
    if recipe is not None:
        raise BadRecipe("expected no recipe with a module: give its fields as arguments.")
    if overrides.get("train_loader") is None:
        raise BadRecipe("expected train_loader=, batches of (input, target), to prune a module, found none.")
    inputs = {key: overrides.pop(key) for key in ("train_loader", "eval_fn", "example", "loss") if key in overrides}
    values = overrides if budget is None else {"budget": budget} | overrides
    return prune_module(model, make_settings(values), **inputs, console=console or Quiet())


def train(
    model: str | None = None, *, output: str = "trained", console: Quiet | None = None, **overrides: object
) -> dict:
    """Trains a dense model and writes a folder that loads; returns the dict of its report.json.

    Args:
        model: Hub id, folder or alias. A folder with a config and no weights starts from random ones.
        output: The folder to write.
        console: Where progress is shown; nothing by default.
        overrides: By name, other fields of `ibprune.recipe.Recipe`, such as data="pictures" or finetune_steps=2000.

    Raises:
        IBPruneError: Anything the user can mend, in one line.

    Example:
        >>> train("config_folder", data="pictures", finetune_steps=2000)["metrics"]  # doctest: +SKIP
    """
    values = {"model": model, "budget": 1.0, "output": output} | overrides
    return train_dense(make_recipe({k: v for k, v in values.items() if v is not None}), console or Quiet())


def load(
    folder: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> nn.Module:
    """The pruned model of a folder or of a Hub repo, in eval mode; no code of the folder is run.

    Args:
        model: For a folder that `ModuleResult.save` wrote: what makes the dense module, or the module itself.
        dtype: Of the weights; as they are stored by default.
        revision: Branch, tag or commit of the repo.

    Raises:
        PlanMismatch: A file that differs from its checksum in `report.json`, an unknown structure, or a tensor
            missing, extra or misshapen.
        BadRecipe: A repo that cannot be read.

    Example:
        >>> model = load("pruned")  # doctest: +SKIP
        >>> model = load("small", model=LeNet)  # doctest: +SKIP
        >>> model = load("user/model", revision="v1")  # doctest: +SKIP
    """
    folder = fetch(folder, revision=revision)
    if model is None and is_module_folder(folder):
        raise BadRecipe(f"expected model= for '{folder}', a plain module's folder: give its constructor.")
    if model is None:
        return load_transformer(folder, dtype=dtype)
    module = load_module(folder, model)
    return module if dtype is None else module.to(dtype)
