"""Audits two models, checkpoints on disk or from the Hub or modules: binds both to the data, writes the folder."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ibprune.audit_output import write_audit
from ibprune.auditing import Side
from ibprune.auditing import audit as audit_models
from ibprune.console import Quiet
from ibprune.errors import BadData, BadRecipe, did_you_mean
from ibprune.features import default_pooling
from ibprune.feeding import find_data, find_pictures, make_picture_feed
from ibprune.folders import check_output, staged
from ibprune.inputs import MOST_INPUTS, Inputs, encode_inputs, encode_pairs, encode_pictures
from ibprune.loading import load_any
from ibprune.losses import Batch
from ibprune.measures import AuditSettings
from ibprune.mi.probes import PROBES, Probe
from ibprune.models import Loaded, find_source, load_config, load_dense, load_processor, load_tokenizer
from ibprune.plans import PruningPlan
from ibprune.recipe import Recipe, make_recipe
from ibprune.sites import find_family, has_row, reads_pictures
from ibprune.task_heads import writes

MAX_LENGTH = 128


@dataclass(frozen=True)
class Pair:
    """Two models and what both read. The plan is the one that made the second, where it is known."""

    before: Side
    after: Side
    inputs: Inputs
    plan: PruningPlan | None


def audit(
    dense: str | nn.Module,
    pruned: str | nn.Module,
    *,
    data: str | Iterable | None = None,
    task: str | None = None,
    text_columns: tuple[str, ...] = (),
    label_column: str = "",
    image_size: int | None = None,
    layers: tuple[str, ...] = (),
    pooling: str | None = None,
    probe: str = "logistic",
    tokens: int = 0,
    pair: bool = False,
    max_inputs: int = MOST_INPUTS,
    max_length: int | None = None,
    seed: int = 0,
    output: str | None = None,
    console: Quiet | None = None,
) -> dict:
    """What each layer of a dense and of a pruned model knows of its input and its labels, in bits.

    Args:
        dense, pruned: Hub ids, folders or aliases; the pruned one may be any checkpoint of the same family. Or two
            modules that read one tensor and have modules of the same names; they stay as they are.
        data, task, text_columns, label_column, image_size: As for `prune`; the held-out rows are used. For modules,
            `data` is a loader of (inputs, targets), and whole numbers as targets are labels.
        layers: Blocks ("encoder.layer.3") or module paths; default: see `ibprune.features.find_layers`.
        pooling: Of tokens: mean, cls, last or random; default: last for decoders, mean otherwise. Maps of
            convolutions (batch, channels, ...) are averaged over their positions.
        probe: Family of predictors of the V-information: logistic, or mlp, which takes some ten times as long.
        tokens: So many of the most frequent tokens become targets too (current and next token); 20 is plenty.
        pair: Whether to estimate I(dense layer; pruned layer) too.
        max_inputs: At most so many distinct texts, pictures or inputs of a loader.
        max_length: Tokens of a text that are read; default 128.
        output: A folder for audit.json and the plots; nothing is written without it.

    Returns:
        The dict of `audit.json` (schema ibprune.mi_audit/1).

    Raises:
        IBPruneError: Models, data or layers that cannot be used or do not belong together.

    Example:
        >>> found = audit("minilm", "pruned", data="prose")  # doctest: +SKIP
        >>> found = audit(net, ibprune.prune(net, 0.5, train_loader=train).model, data=test)  # doctest: +SKIP
        >>> found["layers"][-1]["I_XL"]["retained"]  # doctest: +SKIP
    """
    console = console or Quiet()
    if probe not in PROBES:
        raise BadRecipe(f"--probe: found {probe!r}: {did_you_mean(str(probe), PROBES)}.")
    folder = check_output(output) if output else None
    if isinstance(dense, nn.Module):
        unasked = {"task": task, "text_columns": text_columns, "label_column": label_column, "image_size": image_size,
                   "pooling": pooling, "tokens": tokens, "max_length": max_length}  # fmt: skip
        found = _modules(dense, pruned, data, unasked, most=max_inputs)
    elif isinstance(pruned, nn.Module):
        raise BadRecipe("expected two names or two modules, found a name and a module.")
    else:
        asked = {"data": data, "task": task, "image_size": image_size, "max_length": max_length}
        recipe = make_recipe(
            {"model": dense, "budget": 1.0, "text_columns": text_columns, "label_column": label_column, "seed": seed}
            | {key: value for key, value in asked.items() if value is not None}
        )
        found = _checkpoints(recipe, pruned, most=max_inputs, console=console)
    model = found.before.model
    if pooling not in (None, "mean") and not has_row(model):
        raise BadRecipe(f"--pooling: '{pooling}' is of tokens; the maps of {type(model).__name__} are averaged.")
    if pooling and found.inputs.columns is not None:
        raise BadData("--pooling: layers are read at one tagged word of each text: leave it out.")
    settings = AuditSettings(
        pooling=pooling or default_pooling(model), probe=Probe(probe), tokens=tokens, pair=pair, seed=seed
    )
    record = audit_models(
        found.before, found.after, found.inputs, layers=tuple(layers), settings=settings, plan=found.plan,
        console=console,
    )  # fmt: skip
    if folder is not None:
        with staged(folder) as temporary:
            write_audit(record, temporary)
    return record


def _modules(dense: nn.Module, pruned: nn.Module, data: object, unasked: dict, *, most: int) -> Pair:
    """Copies of two modules in eval mode, and a loader's inputs."""
    if not isinstance(pruned, nn.Module):
        raise BadRecipe("expected two names or two modules, found a module and a name.")
    for key, value in unasked.items():
        if value:
            raise BadRecipe(f"{key}: expected none with modules, which read what the loader gives, found {value!r}.")
    if data is None or isinstance(data, str):
        raise BadRecipe(f"expected data=, a loader of (inputs, targets), to audit modules, found {data!r}.")
    inputs = encode_pairs(data, most=most)
    before, after = (Side(name, copy.deepcopy(model).eval()) for name, model in (("dense", dense), ("pruned", pruned)))
    return Pair(before, after, inputs, None)


def _checkpoints(recipe: Recipe, pruned: str, *, most: int, console: Quiet) -> Pair:
    """Two checkpoints, and the held-out rows of the recipe's data as both read them."""
    source = find_source(recipe.model)
    config = load_config(source)
    pictures = reads_pictures(config.model_type)
    rows = find_pictures(recipe) if pictures else find_data(recipe, console, writes=writes(config))
    loaded = load_dense(source)
    before, after = loaded.model.float(), load_any(pruned).float()
    if before.config.model_type != after.config.model_type:
        raise BadData(
            f"expected two models of one family, found '{before.config.model_type}' and '{after.config.model_type}'."
        )
    plan = _plan(pruned)
    if rows.note:
        console.say(rows.note)
    if pictures:
        _, feed = make_picture_feed(recipe, before, _processor(loaded, pruned), rows)
        inputs = encode_pictures(feed.collate.judging(), most=most)
    else:
        length = recipe.max_length or MAX_LENGTH
        limits = [find_family(before.config.model_type).max_tokens(model.config) or length for model in (before, after)]
        cut = plan is not None and len(plan.keep.get("vocab", ())) < plan.n_units.get("vocab", 0)
        own = load_tokenizer(find_source(pruned)) if cut else None
        inputs = encode_inputs(rows, loaded.tokenizer, max_length=min(length, *limits), most=most, own=own)
        _check_vocabulary(inputs.batches, before)
        _check_vocabulary(inputs.own or inputs.batches, after)
    return Pair(Side(source.name, before), Side(pruned, after), inputs, plan)


def _processor(loaded: Loaded, pruned: str) -> BaseImageProcessor | None:
    """The dense model's image processor; where it brings none, the one that its pruned folder got."""
    return loaded.processor or load_processor(find_source(pruned).location)


def _plan(name: str) -> PruningPlan | None:
    """The plan that an exported folder carries."""
    path = Path(find_source(name).location) / "plan.json"
    return PruningPlan.load(path) if path.exists() else None


def _check_vocabulary(batches: Sequence[Batch], model: PreTrainedModel) -> None:
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise BadData(f"expected models that read the same tokens, found one with {rows:,} and a token {largest:,}.")
