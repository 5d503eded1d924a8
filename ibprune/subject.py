"""A dense model bound to its data: found, loaded, its labels matched, its batches made."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ibprune.channels import Found, find_channels
from ibprune.console import Quiet
from ibprune.costs import count_params
from ibprune.data import TextData
from ibprune.engine import multiplies_in
from ibprune.errors import BadData, BadRecipe
from ibprune.estimating import check_weights, present_device
from ibprune.feeding import Feed, find_data, find_pictures, make_feed, make_picture_feed
from ibprune.images import ImageData
from ibprune.labels import match_labels, unnamed
from ibprune.lora import need_peft
from ibprune.models import Loaded, Source, build_model, find_source, has_weights, load_config, load_dense, model_class
from ibprune.names import WRITES
from ibprune.overlaps import held_out_overlap
from ibprune.pruned_config import is_pruned
from ibprune.quantised import bits, check_packable, check_quantised, flag, quantisation
from ibprune.recipe import Recipe
from ibprune.report import pruned_before
from ibprune.rotation import check_rotation
from ibprune.shards import checkpoint_files
from ibprune.sites import is_traced, reads_pictures
from ibprune.skeletons import check_cut
from ibprune.structure import check_cnn, choose_kinds
from ibprune.task_heads import writes

SAMPLED = 64  # values of a tensor and rows of a data set, about, that make a fingerprint


@dataclass(frozen=True)
class Subject:
    """What a run works on.

    Attributes:
        recipe: With the defaults that the model's objective decides filled in.
        loaded: The dense model, on the CPU.
        found: The channels of a CNN, None for a transformer.
        overlap: Held-out rows that the training data hold too; None where nobody looked.
        first: Of a model that was pruned before, as `Report.first`.
    """

    recipe: Recipe
    source: Source
    data: TextData | ImageData
    loaded: Loaded
    feed: Feed
    found: Found | None
    overlap: int | None
    first: dict | None


def load_subject(recipe: Recipe, console: Quiet, *, untrained: bool = False) -> Subject:
    """Loads what a recipe names.

    Args:
        untrained: Whether a folder without weights will do: then they are random, and the outputs are as many as
            the data have labels.

    Raises:
        IBPruneError: A model, data or a pair of both that cannot be used.
    """
    if recipe.recovery == "lora":
        need_peft()
    if bits(recipe) and untrained:
        raise BadRecipe(f"{flag(recipe)} leaves weights as they are, and here they are trained: leave it out.")
    if bits(recipe):
        check_quantised(recipe)
    source = find_source(recipe.model)
    if source.note:
        console.say(source.note)
    config = load_config(source)
    first = pruned_before(Path(source.location)) or ({} if is_pruned(config) else None)
    pictures, traced = reads_pictures(config.model_type), is_traced(config.model_type)
    if traced:
        check_cnn(recipe, config.model_type)
    if bits(recipe):
        check_packable(config, recipe)
        checkpoint_files(source)
    data = find_pictures(recipe) if pictures else find_data(recipe, console, writes=writes(config))
    fresh = untrained and not has_weights(source)
    if not fresh:
        data = match_labels(data, config, source.name)
    if data.note:
        console.say(data.note)
    overlap = held_out_overlap(data)
    if overlap:
        console.say(
            f"warning: {overlap:,} of the {len(data.held_out):,} held-out rows of '{data.name}' occur in the training "
            "data too: what is measured on them flatters."
        )
    if pictures and not data.labels:
        raise BadData(f"expected a classifier of pictures in '{source.name}', found one with a single output.")
    n_labels = (len(data.labels) or 1) if data.label_column else None
    regression = bool(data.label_column and not data.labels)
    objective = "" if pictures or data.objective == WRITES else data.objective
    cls = model_class(config, classify=n_labels is not None, objective=objective)
    check_weights(config, cls, bits=bits(recipe))
    loaded = load_dense(
        source, n_labels=n_labels, regression=regression, untrained=fresh, objective=objective,
        quantisation=quantisation(recipe, multiplies_in(recipe.precision)), device=present_device(),
    )  # fmt: skip
    numbered = all(label.isdigit() for label in data.labels)
    if data.labels and (loaded.new_head or (unnamed(loaded.model.config) and not numbered)):
        loaded.model.config.id2label = dict(enumerate(data.labels))
        loaded.model.config.label2id = {label: i for i, label in enumerate(data.labels)}
    if recipe.gradient_checkpointing and not loaded.model.supports_gradient_checkpointing:
        raise BadRecipe(f"--gradient-checkpointing: transformers has none for '{config.model_type}': leave it out.")
    found = None
    if not traced:
        choose_kinds(  # what cannot be is said before anything is trained
            loaded.model, recipe.kinds, cost=recipe.cost, vanilla=recipe.vanilla, rotate=recipe.rotate,
            quantised=bool(bits(recipe)),
        )  # fmt: skip
        if recipe.rotate:
            check_rotation(loaded.model)
    if pictures:
        recipe, feed = make_picture_feed(recipe, loaded.model, loaded.processor, data)
        found = find_channels(loaded.model, feed.example()["pixel_values"]) if traced else None
    else:
        recipe, feed = make_feed(recipe, loaded.model, loaded.tokenizer, data)
    if not untrained:
        check_cut(recipe, loaded, feed, found)
    held = f" held in {bits(recipe)} bits" if bits(recipe) else ""
    whole = build_model(loaded.model.config, type(loaded.model), device="meta") if held else loaded.model
    console.say(
        f"{type(loaded.model).__name__} of {source.name}{held}: {count_params(whole):,} parameters; "
        f"{data.name}: {'a stream of' if feed.n_rows is None else f'{feed.n_rows:,}'} training rows; "
        f"{feed.objective.name}"
    )
    if found is not None:
        console.say(f"{len(found.sites)} places where channels can be cut, {len(found.refused)} refused.")
    return Subject(recipe, source, data, loaded, feed, found, overlap, first)


def fingerprints(subject: Subject) -> dict[str, str]:
    """Digests by which other weights or rows under the same names are known; of samples, as both may be large."""
    weights, rows = hashlib.sha256(), hashlib.sha256()
    for name, tensor in subject.loaded.model.state_dict().items():
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, len(values) // SAMPLED)]
        weights.update(f"{name} {tuple(tensor.shape)} {values.tolist()}".encode())
    for part in (subject.data.train, subject.data.held_out):
        few = part.select(range(0, len(part), max(1, len(part) // SAMPLED)))
        rows.update(f"{len(part)} {part.column_names} {few.to_list()}".encode())
    return {"the model": weights.hexdigest(), "the data": rows.hexdigest()}


@contextmanager
def known_tokens(subject: Subject) -> Iterator[None]:
    """Says in one line that the tokenizer makes ids for which the model has no embedding."""
    try:
        yield
    except IndexError as error:
        if subject.loaded.tokenizer is None:
            raise
        rows = subject.loaded.model.get_input_embeddings().num_embeddings
        raise BadData(
            f"the tokenizer of '{subject.source.name}' makes token ids beyond the model's {rows:,} embeddings: they do "
            "not belong together."
        ) from error
