"""The inputs of an audit: held-out texts encoded once, without duplicates, in a fixed order."""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ibprune.annotations import as_text, first_pieces
from ibprune.collating import pad_ids
from ibprune.data import TextData
from ibprune.errors import BadData
from ibprune.losses import Batch
from ibprune.mi.probes import LEAST_PER_CLASS
from ibprune.task_heads import TAGS

MOST_INPUTS = 2400
COMPARABLE = 500_000  # training rows that are looked through for the audited texts
LEAST = 200  # fewer inputs and no figure of an audit means anything


@dataclass(frozen=True)
class Inputs:
    """What both models read.

    Attributes:
        name: Of the data.
        batches: Padded batches, in order; no labels inside.
        labels: Class of each input, or the tag of one of its words, or None for unlabelled data.
        removed: Duplicates left out.
        overlap: Inputs whose text also occurs in the training rows; None where these are too many to look.
        sha256: Of the token ids, in order.
        special: Ids of the tokens that mark where texts begin and end.
        columns: Where the tagged word begins in the padded batch, (n,); None where labels are of whole inputs.
    """

    name: str
    batches: list[Batch]
    labels: list[int] | None
    removed: int
    overlap: int | None
    sha256: str
    special: tuple[int, ...] = ()
    columns: np.ndarray | None = None

    @property
    def n(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.batches)


def encode_inputs(
    data: TextData, tokenizer: PreTrainedTokenizerBase, *, max_length: int, most: int, batch_size: int = 64
) -> Inputs:
    """Encodes at most `most` distinct held-out texts; batches hold texts of like length.

    Of words with tags one word of each text is asked for its tag (`_draw_words`). Answers are not asked for.

    Raises:
        BadData: Fewer than 200 distinct texts.
    """
    rows = data.held_out.select(range(min(len(data.held_out), 4 * most)))  # a large split is not read whole
    columns = [[as_text(text) for text in rows[column]] for column in data.text_columns]
    tagged = data.objective == TAGS
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, verbose=False, return_offsets_mapping=tagged)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
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
    chosen = chosen[:most]
    if len(chosen) < LEAST:
        raise BadData(
            f"expected at least {LEAST} distinct inputs to audit in '{data.name}', found {len(chosen)}: "
            "give more text with --data."
        )
    chosen.sort(key=lambda i: len(encoded["input_ids"][i]))  # less padding; stable, so the order is fixed
    batches = [
        pad_ids({key: [encoded[key][i] for i in part] for key in keys}, tokenizer)
        for part in (chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size))
    ]
    labels = None
    if tagged:
        labels = [words[i][1] for i in chosen]
    elif data.label_column and data.labels and not data.objective:
        column = rows[data.label_column]
        labels = [int(column[i]) for i in chosen]
    digest = hashlib.sha256(repr([encoded["input_ids"][i] for i in chosen]).encode()).hexdigest()
    overlap = None
    if len(data.train) <= COMPARABLE:
        known = _texts(data.train, data.text_columns)
        overlap = sum(tuple(column[i] for column in columns) in known for i in chosen)
    places = np.array([words[i][0] for i in chosen]) if tagged else None
    return Inputs(data.name, batches, labels, removed, overlap, digest, special_ids(tokenizer), places)


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
        BadData: Inputs that are not tokens.
    """
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


def _texts(rows: Dataset, columns: tuple[str, ...]) -> set[tuple[str, ...]]:
    return set(zip(*([as_text(text) for text in rows[column]] for column in columns)))
