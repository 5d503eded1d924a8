"""Binds data to a model: which objective, which batches, which metrics, which defaults."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ibprune.collating import (
    Collate,
    CollateIds,
    CollateMasked,
    CollateWindows,
    answer_windows,
    make_loader,
    windows,
)
from ibprune.console import Quiet
from ibprune.data import PROSE, TextData, load_data, load_task
from ibprune.denoising import CollatePairs, CollateSpans
from ibprune.errors import BadData, BadRecipe, UnsupportedModel
from ibprune.examples import image_shape
from ibprune.hub import hub_reachable
from ibprune.images import CollatePictures, Data, ImageData, blank_shape, load_images, make_processor, resize_
from ibprune.losses import LAYERED, Batch, Objective
from ibprune.names import ANSWERS, TAGS, WRITES
from ibprune.prose import load_prose
from ibprune.quantised import bits
from ibprune.reading import Stream, limited
from ibprune.recipe import Recipe
from ibprune.sites import find_family, is_traced
from ibprune.streaming import stream_data
from ibprune.task_heads import auto_of, dense_name, is_headless
from ibprune.thinning import hold_back, thin
from ibprune.vocabulary import check_tokenizer


@dataclass(frozen=True)
class Defaults:
    """What a recipe leaves open. An encoder's are sized so that MiniLM takes minutes on two CPU cores.

    Without labels a recovery serves its own texts, not what the encoder is for: it does not choose between cuts.
    """

    lr: float
    max_length: int
    mask_steps: int = 300
    recover_steps: int = 900
    probe_steps: int | None = None
    start: str = "fisher"


DEFAULTS = {
    "classification": Defaults(5e-5, 128),
    "regression": Defaults(5e-5, 128),
    "causal_lm": Defaults(5e-4, 256, start="flap"),
    "masked_lm": Defaults(1e-4, 128),
    WRITES: Defaults(3e-4, 128),
    TAGS: Defaults(5e-5, 128),
    ANSWERS: Defaults(5e-5, 384),
    "encoder": Defaults(3e-4, 64, mask_steps=80, recover_steps=400, probe_steps=0),
    "images": Defaults(1e-3, 0),
    "images by patches": Defaults(1e-4, 0),
}


ANNOTATED = {
    "AutoModelForTokenClassification": "words with tags",
    "AutoModelForQuestionAnswering": "questions with answers that stand in a context",
}
JUDGED_TEXTS = 600  # an encoder's recall is among so many: a number of its own for every count


@dataclass(frozen=True)
class Feed:
    """Batches for a model and what they are for.

    Attributes:
        objective: What the model is trained and judged by.
        metrics: Metric names, for labelled data.
        train_set, held_out_set: Rows the collator understands; a stream's training rows are read as they are needed.
        collate: Rows to a padded batch, or to a batch of pixels.
        batch_size, seed: Of the run.
        preprocessor: The tokenizer or image processor, which goes with the model.
        normalised_by: For pictures, where their mean and deviation come from.
        few: The rows of `train_set` that are trained on, where these are not all.
        held_back: Training rows that are no longer in `train_set`: they judge a model as it trains.
    """

    objective: Objective
    metrics: tuple[str, ...]
    train_set: Dataset | Stream
    held_out_set: Dataset
    collate: Collate | CollateIds | CollateMasked | CollateWindows | CollatePairs | CollateSpans | CollatePictures
    batch_size: int
    seed: int
    preprocessor: PreTrainedTokenizerBase | BaseImageProcessor
    normalised_by: str = ""
    few: Dataset | None = None
    held_back: Dataset | None = None

    @property
    def generator(self) -> torch.Generator | None:
        """What hides tokens or changes pictures as batches are made, None where nothing is drawn."""
        return getattr(self.collate, "generator", None)

    @property
    def n_rows(self) -> int | None:
        """Rows of an epoch before any thinning; None for a stream, whose end nobody has seen."""
        return None if isinstance(self.train_set, Stream) else len(self.train_set)

    def train(self, epoch_seed: int) -> DataLoader:
        """Shuffled training batches, a function of the seed."""
        rows = self.train_set if self.few is None else self.few
        return make_loader(rows, self.collate, batch_size=self.batch_size, seed=epoch_seed)

    def thinned(self) -> "Feed":
        """The same, trained on a few of the rows (`ibprune.thinning`); tokens are counted in all of them."""
        data, labels = getattr(self.collate, "data", None), None
        if self.objective.name == "classification":
            labels = self.train_set[data.label_column]
        return replace(self, few=thin(self.train_set, labels, seed=self.seed))

    def holding_back(self) -> "Feed":
        """The same with some of the training rows held back (`ibprune.thinning.hold_back`)."""
        train_set, held_back = hold_back(self.train_set, seed=self.seed)
        return replace(self, train_set=train_set, held_back=held_back)

    def held_out(self) -> DataLoader:
        """Held-out batches in order, as `judging` makes them."""
        return self.judging(self.held_out_set)

    def judging(self, rows: Dataset) -> DataLoader:
        """Batches in order; hidden tokens of a masked LM are the same at every call, pictures as they are."""
        collate = self.collate
        if isinstance(collate, CollateMasked):
            collate = CollateMasked(collate.tokenizer, self.seed)
        elif isinstance(collate, CollateSpans):
            collate = CollateSpans(collate.tokenizer, collate.config, self.seed)
        elif isinstance(collate, CollatePictures):
            collate = collate.judging()
        return make_loader(rows, collate, batch_size=self.batch_size, seed=None)

    def calibration(self, sequences: int, device: torch.device) -> list[Batch]:
        """Training batches for scores and probes, moved to the device."""
        loader = self.train(self.seed + 1_000_003)  # other batches than the first epoch's
        batches = itertools.islice(loader, max(1, sequences // self.batch_size))
        return [{key: value.to(device) for key, value in batch.items()} for batch in batches]

    def retokenised(self, tokenizer: PreTrainedTokenizerBase) -> "Feed":
        """The same texts as another tokenizer reads them, beside what the dense model does (`losses.dense_batch`)."""
        dense = self.collate.tokenizer
        collate = Collate(tokenizer, self.collate.data, self.collate.max_length, dense)
        return replace(self, collate=collate, preprocessor=tokenizer)

    def example(self, n: int = 2) -> Batch:
        """The first held-out inputs, without their labels."""
        batch = next(iter(self.held_out()))
        return {key: value[:n] for key, value in batch.items() if key != "labels"}

    def probe(self) -> Batch | None:
        """Inputs on which copies of the model are compared; None for texts, where any token ids will do."""
        return self.example() if isinstance(self.collate, CollatePictures) else None

    def pictures(self) -> dict | None:
        """What the model reads of a picture and how it was normalised, for the report; None for texts."""
        if not isinstance(self.collate, CollatePictures):
            return None
        return {
            "shape": list(self.example()["pixel_values"].shape[1:]),
            "mean": list(self.preprocessor.image_mean),
            "std": list(self.preprocessor.image_std),
            "normalised_by": self.normalised_by,
            "augment": list(self.collate.augment),
        }

    def unshuffled(self) -> Iterator[Batch]:
        return iter(make_loader(self.train_set, self.collate, batch_size=256, seed=None))


def find_pictures(recipe: Recipe) -> ImageData:
    """The pictures a recipe names.

    Raises:
        BadRecipe: It names none, or something that only texts have.
    """
    if not recipe.data or recipe.data == PROSE:
        raise BadRecipe("expected pictures: name a folder, an npz file or a Hub data set with --data.")
    for key in ("task", "text_columns", "max_length", "packing"):
        if getattr(recipe, key):
            raise BadRecipe(f"--{key.replace('_', '-')}: the model reads pictures, not text: leave it out.")
    if recipe.streaming:
        raise BadRecipe("--streaming: pictures are decoded as they are needed anyway, and not streamed: leave it out.")
    return _limited(load_images(recipe.data, label_column=recipe.label_column, seed=recipe.seed), recipe)


def find_data(recipe: Recipe, console: Quiet, *, writes: bool = False) -> TextData:
    """The texts a recipe names; prose of this machine when it names none.

    Args:
        writes: Whether the model reads one text and writes another.
    """
    if recipe.image_size:
        raise BadRecipe("--image-size: the model reads text, not pictures: leave it out.")
    if recipe.task and recipe.data:
        raise BadRecipe("expected --task or --data, found both: --task is a GLUE task from the Hub.")
    columns = dict(text_columns=recipe.text_columns, label_column=recipe.label_column, writes=writes)
    if recipe.streaming:
        if recipe.data in (None, PROSE):
            raise BadRecipe(
                "--streaming: expected --data with files or a Hub data set; other data are small: leave it out."
            )
        found = stream_data(recipe.data, **columns, held_out=recipe.max_eval_samples, buffer=recipe.shuffle_buffer)
        return replace(found, stream=limited(found.stream, recipe.max_train_samples, seed=recipe.seed))
    if recipe.data and recipe.data != PROSE:
        return _limited(load_data(recipe.data, **columns, seed=recipe.seed), recipe)
    if recipe.task:
        return _limited(load_task(recipe.task), recipe)
    if not recipe.data:
        why = "No data named" if hub_reachable() else "No data named and the Hub is out of reach"
        console.say(f"{why}: using English prose of this Python installation (--data {PROSE}).")
    return _limited(load_prose(seed=recipe.seed, console=console), recipe)


def _limited(data: Data, recipe: Recipe) -> Data:
    """No more training and held-out rows than the recipe asks for."""
    train = limited(data.train, recipe.max_train_samples, seed=recipe.seed)
    return replace(data, train=train, held_out=limited(data.held_out, recipe.max_eval_samples, seed=recipe.seed))


def objective_name(model: PreTrainedModel, data: TextData) -> str:
    """What a model can be trained for on some data.

    Raises:
        BadData: A task head that the data cannot feed.
    """
    name, auto = dense_name(model), auto_of(model)
    if data.objective:  # the model was loaded for them
        return data.objective
    if auto in ANNOTATED:
        raise BadData(
            f"{name} needs {ANNOTATED[auto]}, found none in '{data.name}': name the columns, or other --data."
        )
    if auto == "AutoModelForSequenceClassification":
        if not data.label_column:
            raise BadData(f"{name} needs labelled data, '{data.name}' has no label column: use --task or --data.")
        return "classification" if data.labels else "regression"
    if auto == "AutoModelForSeq2SeqLM":
        return WRITES
    if auto == "AutoModelForCausalLM":
        return "causal_lm"
    if auto == "AutoModelForMaskedLM":
        return "masked_lm"
    if model.config.is_encoder_decoder:
        raise BadData(
            f"{name} ends in the decoder's hidden states, which nothing here trains. Of an encoder-decoder it trains "
            "the model for conditional generation, sequence classifiers, and T5EncoderModel; `ibprune plan` takes "
            "every head."
        )
    if is_headless(model):
        return "encoder"
    raise BadData(f"{name} has a task head that ibprune cannot train yet: use a base, classification or LM model.")


def tokens_read(asked: int | None, config: PreTrainedConfig, objective: str) -> int:
    """Tokens of a sequence, where none are asked for by the objective.

    Raises:
        BadRecipe: More than the model can read.
    """
    default, limit = DEFAULTS[objective].max_length, find_family(config.model_type).max_tokens(config)
    if limit and (asked or 0) > limit:
        raise BadRecipe(f"--max-length: expected at most {limit}, what the model can read, found {asked}.")
    return asked or min(default, limit or default)


def make_feed(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TextData
) -> tuple[Recipe, Feed]:
    """The feed, and the recipe with the defaults that its objective decides filled in.

    Held-out texts of a language model are never packed: they are judged alike however it is trained.
    """
    name = objective_name(model, data)
    if "vocab" in recipe.kinds:
        if name in ("causal_lm", "masked_lm", WRITES, TAGS, ANSWERS):
            raise BadRecipe(
                "'vocab' is cut in sequence classifiers, regressors and encoders without a head: other models are "
                "trained and judged token by token, and their tokens would not be the dense model's. Leave it out of "
                "--kinds."
            )
        check_tokenizer(tokenizer)
    if data.objective in (TAGS, ANSWERS) and not tokenizer.is_fast:
        raise BadRecipe(
            f"expected a fast tokenizer, which says where each token stands, found {type(tokenizer).__name__}: "
            "save the model with a tokenizer.json."
        )
    if name == "encoder" and recipe.distill == "none":
        raise BadRecipe("an encoder without a head is recovered by distillation alone: leave --no-distill out.")
    if name in ("regression", "encoder") and recipe.divergence != "forward":
        raise BadRecipe(
            "--divergence: a regressor, and an encoder without a head, give no distributions to compare: leave it out."
        )
    if recipe.packing and name != "causal_lm":
        raise BadRecipe(f"--packing joins the texts of causal language models, found {name}: leave it out.")
    recipe = filled_in(recipe, name, model.config)
    max_length = recipe.max_length
    train_set, held_out_set = data.stream or data.train, data.held_out
    if name in ("causal_lm", "masked_lm"):
        column = data.text_columns[0]
        train_set = windows(train_set, column, tokenizer, max_length, packing=recipe.packing)
        if recipe.max_train_tokens:
            if recipe.max_train_tokens < max_length:
                raise BadRecipe(
                    f"--max-train-tokens: expected at least a window of {max_length}, found {recipe.max_train_tokens}."
                )
            train_set = limited(train_set, recipe.max_train_tokens // max_length, seed=recipe.seed)
        held_out_set = windows(held_out_set, column, tokenizer, max_length)
        collate = CollateIds(tokenizer) if name == "causal_lm" else CollateMasked(tokenizer, recipe.seed)
        if name == "masked_lm" and tokenizer.mask_token_id is None:
            raise BadData("a masked language model needs a tokenizer with a mask token, found none.")
    elif name == WRITES:
        if data.objective == WRITES:
            collate = CollatePairs(tokenizer, data, max_length, model.config)
        else:
            collate = CollateSpans(tokenizer, model.config, recipe.seed)
            train_set, held_out_set = (
                windows(rows, data.text_columns[0], tokenizer, max_length) for rows in (train_set, held_out_set)
            )
    elif name == ANSWERS:
        train_set, held_out_set = (
            answer_windows(rows, data, tokenizer, max_length, judged=judged)
            for rows, judged in ((train_set, False), (held_out_set, True))
        )
        collate = CollateWindows(tokenizer, data)
    else:
        if name == "encoder":  # every text column is text to embed; labels play no part
            train_set, held_out_set = (_stack(rows, data.text_columns) for rows in (train_set, held_out_set))
            held_out_set = held_out_set.select(range(min(JUDGED_TEXTS, len(held_out_set))))
            data = replace(data, text_columns=("text",), label_column=None)
        collate = Collate(tokenizer, data, max_length)
    if next(iter(train_set), None) is None or len(held_out_set) == 0:
        raise BadData(f"expected text to train and to judge on in '{data.name}', found an empty split.")
    feed = Feed(
        _objective(name, recipe), data.metrics, train_set, held_out_set, collate, recipe.batch_size, recipe.seed,
        tokenizer,
    )  # fmt: skip
    return recipe, feed


def make_picture_feed(
    recipe: Recipe, model: PreTrainedModel, processor: BaseImageProcessor | None, data: ImageData
) -> tuple[Recipe, Feed]:
    """The feed of a model that reads pictures, and the recipe with its defaults filled in.

    Args:
        processor: The model's own; None makes one from the training pictures.

    Raises:
        BadRecipe: A size that the model cannot read (a vision transformer has positions for one), or a distillation of
            blocks that it has not.
    """
    size, traced = recipe.image_size, is_traced(model.config.model_type)
    if traced and recipe.distill in LAYERED:
        raise BadRecipe(
            f"--distill {recipe.distill} reads the blocks of a transformer, found a CNN "
            f"('{model.config.model_type}'): use --distill logits."
        )
    recipe = filled_in(recipe, "images" if traced else "images by patches", model.config)
    channels, size = (model.config.num_channels, size) if traced else _fixed_shape(model, size)
    normalised_by = "the model's image processor" if processor is not None else "the training pictures"
    if processor is None:
        processor = make_processor(data, channels, size)
    elif size and blank_shape(processor, channels)[1:] != (size, size):
        resize_(processor, size)
    collate = CollatePictures(processor, data, channels, augment=recipe.augment, seed=recipe.seed)
    feed = Feed(
        _objective("classification", recipe), data.metrics, data.train, data.held_out, collate, recipe.batch_size,
        recipe.seed, processor, normalised_by,
    )  # fmt: skip
    return recipe, feed


def _objective(name: str, recipe: Recipe) -> Objective:
    return Objective(name, divergence=recipe.divergence, layers=recipe.distill if recipe.distill in LAYERED else "")


def _fixed_shape(model: PreTrainedModel, size: int | None) -> tuple[int, int]:
    """Channels and side of the pictures that a vision transformer reads."""
    channels, height, width = image_shape(model)
    if height != width:
        raise UnsupportedModel(f"expected a model that reads square pictures, found {height} x {width}.")
    if size not in (None, height):
        raise BadRecipe(f"--image-size: expected {height}, for which the model has positions, found {size}.")
    return channels, height


def filled_in(recipe: Recipe, name: str, config: PreTrainedConfig) -> Recipe:
    """The recipe with what it leaves open.

    Args:
        name: One of `DEFAULTS`: an objective, or what is read.

    Raises:
        BadRecipe: Texts longer than the model can read.
    """
    defaults, keys = DEFAULTS[name], ("mask_steps", "recover_steps", "probe_steps")
    if defaults.max_length:
        recipe = recipe.model_copy(update={"max_length": tokens_read(recipe.max_length, config, name)})
    if recipe.mode == "faster":  # the weights stay as they are, unless a recovery is asked for
        defaults = replace(defaults, recover_steps=0, probe_steps=0)
    steps = {key: getattr(defaults, key) for key in keys if getattr(recipe, key) is None}
    start = recipe.start
    if start is None and recipe.score == "vib":
        start = "fisher" if bits(recipe) else defaults.start  # FLAP reads weights, which are packed then
    return recipe.model_copy(update={"lr": recipe.lr or defaults.lr, "start": start, **steps})


def _stack(rows: Dataset | Stream, columns: tuple[str, ...]) -> Dataset | Stream:
    """All text columns below each other as one column "text"."""

    def below(batch: Dataset | dict) -> dict:
        return {"text": [text for column in columns for text in batch[column] if text]}

    def unfolded(rows: IterableDataset) -> IterableDataset:
        return rows.select_columns(list(columns)).map(below, batched=True, remove_columns=list(columns))

    return rows.mapped(unfolded) if isinstance(rows, Stream) else Dataset.from_dict(below(rows))
