"""The inputs of an audit: held-out texts, pictures or tensors, without duplicates, in a fixed order."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ibprune.annotations import as_text, first_pieces
from ibprune.collating import pad_ids
from ibprune.data import TextData
from ibprune.errors import BadData
from ibprune.images import IMAGE, CollatePictures, stored_digest, stored_size
from ibprune.losses import Batch
from ibprune.mi.probes import LEAST_PER_CLASS
from ibprune.names import TAGS, WRITES
from ibprune.overlaps import is_comparable, text_keys
from ibprune.pairs import Pairs

MOST_INPUTS = 2400
LEAST = 200  # fewer inputs and no figure of an audit means anything


@dataclass(frozen=True)
class Inputs:
    """What both models read.

    Attributes:
        name: Of the data.
        batches: Padded batches, in order; no labels inside.
        labels: Class of each input, or the tag of one of its words, or None for unlabelled data.
        removed: Duplicates left out.
        overlap: Inputs that also occur in the training rows; None where these are too many to look, or not known.
        sha256: Of the token ids, the stored pictures or the tensors, in order.
        special: Ids of the tokens that mark where texts begin and end.
        split: Where they come from: "held_out" rows, or "given" by the caller.
        own: The same texts, batch by batch, as a pruned model with a tokenizer of its own reads them; None where both
            read the same.
        columns: Where the tagged word begins in the padded batch, (n,); None where labels are of whole inputs.
    """

    name: str
    batches: Sequence[Batch]
    labels: list[int] | None
    removed: int
    overlap: int | None
    sha256: str
    special: tuple[int, ...] = ()
    split: str = "held_out"
    own: Sequence[Batch] | None = None
    columns: np.ndarray | None = None

    @property
    def n(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.batches)


def _spread(total: int, most: int) -> list[int]:
    """At most so many of 0 .. total - 1, evenly spaced.

    Example:
        >>> _spread(10, 4), _spread(3, 4)
        ([0, 2, 5, 7], [0, 1, 2])
    """
    n = min(total, most)
    return [i * total // n for i in range(n)]


def encode_inputs(
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    most: int,
    own: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
) -> Inputs:
    """Encodes at most `most` distinct held-out texts, evenly spaced: files may lie class by class.

    Batches hold texts of like length.

    Of words with tags one word of each text is asked for its tag (`_draw_words`). Answers are not asked for.

    Args:
        own: The tokenizer of the pruned model, where its vocabulary was cut. Texts are distinct, and cut at so many
            tokens, as each tokenizer reads them.

    Raises:
        BadData: Fewer than 200 distinct texts.
    """
    rows = data.held_out.select(_spread(len(data.held_out), 4 * most))  # a large split is not read whole
    read = data.text_columns[:1] if data.objective == WRITES else data.text_columns
    columns = [[as_text(text) for text in rows[column]] for column in read]
    tagged = data.objective == TAGS
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, verbose=False, return_offsets_mapping=tagged)
    seen: set[tuple] = set()
    chosen = []
    for i, ids in enumerate(encoded["input_ids"]):
        if tuple(ids) not in seen and len(ids) > 0:
            seen.add(tuple(ids))
            chosen.append(i)
    removed = len(columns[0]) - len(chosen)
    words: dict[int, tuple[int, int]] = {}
    if tagged:
        words = _draw_words(rows, data, chosen, encoded["offset_mapping"])
        chosen = [i for i in chosen if i in words]
    chosen = [chosen[i] for i in _spread(len(chosen), most)]
    _check_enough(len(chosen), data.name)
    chosen.sort(key=lambda i: len(encoded["input_ids"][i]))  # less padding; stable, so the order is fixed
    parts = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    batches = _batches(encoded, parts, tokenizer)
    again = None
    if own is not None:
        again = _batches(own(*columns, truncation=True, max_length=max_length, verbose=False), parts, own)
    labels = None
    if tagged:
        labels = [words[i][1] for i in chosen]
    elif data.label_column and data.labels and not data.objective:
        column = rows[data.label_column]
        labels = [int(column[i]) for i in chosen]
    digest = hashlib.sha256(repr([encoded["input_ids"][i] for i in chosen]).encode()).hexdigest()
    overlap = None
    if is_comparable(data):
        known, own_keys = set(text_keys(data.train, data.text_columns)), text_keys(rows, data.text_columns)
        overlap = sum(own_keys[i] in known for i in chosen)
    places = np.array([words[i][0] for i in chosen]) if tagged else None
    return Inputs(
        data.name, batches, labels, removed, overlap, digest, special_ids(tokenizer), own=again, columns=places
    )


def _batches(encoded: BatchEncoding, parts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    return [pad_ids({key: [encoded[key][i] for i in part] for key in keys}, tokenizer) for part in parts]


class PictureBatches(Sequence):
    """Batches of pictures {"pixel_values": (batch, channels, height, width)}, decoded whenever they are asked for.

    2,400 pictures of 224 pixels would fill 1.4 GB.
    """

    def __init__(self, rows: Dataset, collate: CollatePictures, size: int):
        self.rows, self.collate, self.size = rows, collate, size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = self.rows.select(range(i * self.size, min((i + 1) * self.size, len(self.rows))))
        return {"pixel_values": self.collate(list(part))["pixel_values"]}


def encode_pictures(collate: CollatePictures, *, most: int, batch_size: int = 64) -> Inputs:
    """At most `most` distinct held-out pictures, evenly spaced: those of a folder lie class by class.

    Pictures are the same if they are stored as the same bytes.

    Args:
        collate: That makes their pixels, without augmentation.

    Raises:
        BadData: Fewer than 200 distinct pictures.
    """
    data, total = collate.data, len(collate.data.held_out)
    rows = data.held_out.select(_spread(total, most))
    images = list(rows[IMAGE])
    digests = [stored_digest(image) for image in images]
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    chosen = sorted(first.values())
    _check_enough(len(chosen), data.name)
    overlap = None
    if is_comparable(data):
        sizes = {stored_size(image) for image in images}
        known = {stored_digest(image) for image in data.train[IMAGE] if stored_size(image) in sizes}
        overlap = len(known & set(first))
    rows = rows.select(chosen)
    digest = hashlib.sha256("".join(digests[i] for i in chosen).encode()).hexdigest()
    labels = [int(label) for label in rows[data.label_column]]
    repeated = len(images) - len(chosen)
    return Inputs(data.name, PictureBatches(rows, collate, batch_size), labels, repeated, overlap, digest)


def encode_pairs(loader: Iterable, *, most: int) -> Inputs:
    """The first `most` distinct inputs of a loader of (inputs, targets), held in memory; whole numbers are labels.

    Raises:
        BadData: Fewer than 200 distinct inputs, or no such loader.
    """
    pairs = Pairs(loader, "data")
    seen: set[bytes] = set()
    batches, targets, found = [], [], 0
    for batch in pairs:
        inputs, rows = batch["inputs"].detach().cpu(), []
        for i, row in enumerate(inputs):
            digest = hashlib.sha256(_bytes(row)).digest()
            if digest not in seen and len(seen) < most:
                seen.add(digest)
                rows.append(i)
        if rows:
            batches.append({"inputs": inputs[rows]})
            targets.append(batch["labels"].detach().cpu()[rows])
        found += len(inputs)
        if len(seen) >= most:
            break
    name = type(getattr(loader, "dataset", loader)).__name__
    _check_enough(len(seen), name)
    labels = torch.cat(targets)
    is_class = labels.ndim == 1 and not labels.is_floating_point()
    whole = hashlib.sha256(b"".join(_bytes(batch["inputs"]) for batch in batches)).hexdigest()
    return Inputs(
        name, batches, labels.long().tolist() if is_class else None, found - len(seen), None, whole, split="given"
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    """Of any dtype, bfloat16 too, which numpy has not."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_enough(found: int, name: str) -> None:
    if found < LEAST:
        raise BadData(
            f"expected at least {LEAST} distinct inputs to audit in '{name}', found {found}: give more held-out data."
        )


def _draw_words(
    rows: Dataset, data: TextData, chosen: list[int], offsets: list[list[tuple[int, int]]]
) -> dict[int, tuple[int, int]]:
    """One word of each chosen text at random, by row: the column of its first token, and its tag.

    First one of the text's tags is drawn, then a word that has it, or "O" would be nearly all there is to tell. Tags
    that are drawn fewer than ten times are left out, and with them texts that have no other.
    """
    text_words, text_tags = list(rows[data.text_columns[0]]), list(rows[data.label_column])
    places: dict[int, dict[int, list[int]]] = {}  # by row and tag
    for i in chosen:
        by_tag = places.setdefault(i, {})
        for column, word in enumerate(first_pieces(text_words[i], offsets[i])):
            if word >= 0:
                by_tag.setdefault(text_tags[i][word], []).append(column)
    allowed = {tag for by_tag in places.values() for tag in by_tag}
    while True:
        draw, found = np.random.default_rng(0), {}
        for i, by_tag in places.items():
            tags = sorted(allowed & set(by_tag))
            if tags:
                tag = tags[int(draw.integers(len(tags)))]
                found[i] = by_tag[tag][int(draw.integers(len(by_tag[tag])))], tag
        counts = Counter(tag for _, tag in found.values())
        rare = {tag for tag in allowed if counts[tag] < LEAST_PER_CLASS}
        if not rare:
            return found
        allowed -= rare


@dataclass(frozen=True)
class Tokens:
    """One token of each input, and the one after it.

    Attributes:
        columns: Where it stands in the padded batch, (n,); 0 where the input has none.
        current, following: Token ids, (n,); -1 where there is none, or where it is not a frequent one.
    """

    columns: np.ndarray
    current: np.ndarray
    following: np.ndarray


def draw_tokens(inputs: Inputs, most: int, *, seed: int = 0) -> Tokens:
    """An occurrence of one of the `most` most frequent tokens in each input, at random.

    One of each, so that the samples are independent.

    Raises:
        BadData: Inputs that are not tokens, or not the same for both models.
    """
    if inputs.own is not None:
        raise BadData(
            "expected two models that read the same tokens to ask for tokens, but the vocabulary of one was cut: leave "
            "--tokens out."
        )
    if "input_ids" not in inputs.batches[0]:
        raise BadData("expected inputs of tokens to ask for tokens, found other inputs: leave --tokens out.")
    ids = torch.cat([batch["input_ids"][batch["attention_mask"] > 0] for batch in inputs.batches])
    values, counts = ids.unique(return_counts=True)
    counts[torch.isin(values, torch.tensor(inputs.special, dtype=values.dtype))] = 0
    frequent = values[counts.argsort(descending=True, stable=True)[:most]]
    draw = np.random.default_rng([seed, 217_645_199])
    columns, current, following = [], [], []
    for batch in inputs.batches:
        real = batch["attention_mask"] > 0
        eligible = torch.isin(batch["input_ids"], frequent) & real
        for row, (allowed, u) in enumerate(zip(eligible, draw.random(len(eligible)))):
            places = allowed.nonzero()[:, 0]
            column = int(places[int(u * len(places))]) if len(places) else 0
            columns.append(column)
            current.append(int(batch["input_ids"][row, column]) if len(places) else -1)
            after = column + 1
            usable = len(places) > 0 and after < eligible.shape[1] and bool(eligible[row, after])
            following.append(int(batch["input_ids"][row, after]) if usable else -1)
    return Tokens(np.array(columns), np.array(current), np.array(following))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that mark where texts begin and end ([CLS], [SEP], BOS, EOS): those without content."""
    marks = (getattr(tokenizer, f"{mark}_token_id", None) for mark in ("cls", "sep", "bos", "eos"))
    return tuple(sorted({mark for mark in marks if mark is not None}))


def spread(batches: list[Batch], most: int) -> list[Batch]:
    """At most `most` inputs, evenly spaced: batches are sorted by length, so the first ones would be short."""
    total = sum(len(batch["input_ids"]) for batch in batches)
    chosen = np.arange(min(most, total)) * total // max(min(most, total), 1)
    found, start = [], 0
    for batch in batches:
        size = len(batch["input_ids"])
        rows = torch.from_numpy(chosen[(chosen >= start) & (chosen < start + size)] - start)
        if len(rows):
            found.append({key: value[rows] for key, value in batch.items()})
        start += size
    return found
