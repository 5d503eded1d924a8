"""Rows of text become padded batches of token ids."""

import itertools

import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from ibprune.annotations import STARTS, as_text, first_pieces
from ibprune.data import TextData
from ibprune.errors import BadRecipe
from ibprune.losses import DENSE, WORDS, Batch
from ibprune.names import TAGS
from ibprune.reading import Stream

AT_ONCE = 16  # texts of a stream that are tokenised together: they may be as long as books
LEAST_WINDOW = 24  # tokens of a window with a question and some of its context


class Collate:
    """Tokenises rows into one padded batch; tokenising here keeps large data sets off the disk.

    Where words have tags, `labels` are (batch, length): the tag of a word at its first piece, -100 at other tokens.
    Words beyond `max_length` are not read. With a `dense_tokenizer` the batch also holds what the dense model reads of
    the same texts (`losses.DENSE`) and, where there are no labels, to which word each token belongs (-1: to none): both
    tokenizers find the same words.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: TextData,
        max_length: int,
        dense_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.tokenizer, self.data, self.max_length = tokenizer, data, max_length
        self.dense_tokenizer = dense_tokenizer

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [[as_text(row[column]) for row in rows] for column in self.data.text_columns]
        if self.data.objective == TAGS:
            return self._tagged(rows, texts[0])
        batch = self._encode(self.tokenizer, texts)
        if self.dense_tokenizer is not None:
            batch |= {DENSE + key: value for key, value in self._encode(self.dense_tokenizer, texts).items()}
        if self.data.label_column:
            dtype = torch.long if self.data.labels else torch.float32
            batch["labels"] = torch.tensor([row[self.data.label_column] for row in rows], dtype=dtype)
        return batch

    def _tagged(self, rows: list[dict], texts: list[str]) -> Batch:
        found = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt",
            return_offsets_mapping=True,
        )  # fmt: skip
        offsets = found.pop("offset_mapping").tolist()
        labels = []
        for row, pieces in zip(rows, offsets):
            tags = [*row[self.data.label_column], -100]  # the last is that of no word, -1
            labels.append([tags[word] for word in first_pieces(row[self.data.text_columns[0]], pieces)])
        return dict(found) | {"labels": torch.tensor(labels)}

    def _encode(self, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]) -> dict[str, torch.Tensor]:
        found = tokenizer(*texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        if self.dense_tokenizer is None or self.data.label_column:
            return dict(found)
        words = [[-1 if word is None else word for word in found.word_ids(i)] for i in range(len(texts[0]))]
        return dict(found) | {WORDS: torch.tensor(words)}


def windows(
    rows: Dataset | Stream, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int, *, packing: bool = False
) -> Dataset | Stream:
    """Texts cut into windows of at most `max_length` tokens, for language models; column `input_ids`.

    Args:
        packing: Whether texts are joined, each with the end-of-text token behind it, and cut into windows of exactly
            `max_length` tokens. What is left at the end is dropped.

    Raises:
        BadRecipe: No such token to join them with.

    Example: of texts of 3 and 4 tokens, packing makes the windows [a a a E b] and, dropped, [b b b E].
    """
    end = tokenizer.eos_token_id
    if packing and end is None:
        raise BadRecipe("--packing joins texts by the end-of-text token, and this tokenizer has none: leave it out.")

    def cut(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
        left: list[int] = []  # of the texts so far, when they are packed

        def split(batch: dict) -> dict:
            ids = tokenizer(batch[column], verbose=False)["input_ids"]
            if packing:
                for text in ids:
                    left.extend(text if text[-1:] == [end] else [*text, end])
                full = len(left) - len(left) % max_length
                ids = [left[:full]]
                del left[:full]
            parts = [text[i : i + max_length] for text in ids for i in range(0, len(text), max_length)]
            return {"input_ids": [part for part in parts if len(part) > 1]}

        memory = {"batch_size": AT_ONCE} if isinstance(rows, IterableDataset) else {"keep_in_memory": True}
        features = Features({"input_ids": List(Value("int32"))})
        return rows.select_columns([column]).map(
            split, batched=True, remove_columns=[column], features=features, **memory
        )

    return rows.mapped(cut) if isinstance(rows, Stream) else cut(rows)


def answer_windows(
    rows: Dataset, data: TextData, tokenizer: PreTrainedTokenizerBase, max_length: int, *, judged: bool
) -> Dataset:
    """Each question with its context, a long context in windows that overlap by a quarter of `max_length`.

    Columns `input_ids`, `token_type_ids` where the model reads them, and `labels`: the first and the last token of the
    first answer, or `no_answer` where the window does not hold all of it. A question longer than a third of
    `max_length` is cut. `judged` rows also have `row`, the question's number, and `offsets`: the characters of the
    context that each token covers, (-1, -1) outside of it.

    Raises:
        BadRecipe: `max_length` leaves no room for both.
    """
    if max_length < LEAST_WINDOW:
        raise BadRecipe(f"--max-length: expected at least {LEAST_WINDOW} for question and context, found {max_length}.")
    question, context = data.text_columns

    def split(batch: dict, numbers: list[int]) -> dict:
        found = tokenizer(
            _shortened(tokenizer, batch[question], max_length // 3), batch[context], truncation="only_second",
            max_length=max_length, stride=max_length // 4, return_overflowing_tokens=True, return_offsets_mapping=True,
            verbose=False,
        )  # fmt: skip
        kept = {key: found[key] for key in ("input_ids", "token_type_ids") if key in found} | {"labels": []}
        kept |= {"row": [], "offsets": []} if judged else {}
        for i, sample in enumerate(found["overflow_to_sample_mapping"]):
            pieces = zip(found["offset_mapping"][i], found.sequence_ids(i))
            offsets = [tuple(span) if side == 1 else (-1, -1) for span, side in pieces]
            ids = kept["input_ids"][i]
            nowhere = no_answer(tokenizer, ids)
            answers, starts = batch[data.label_column][sample], batch[STARTS][sample]
            place = _place(offsets, starts[0], starts[0] + len(answers[0])) if answers else None
            kept["labels"].append(place or (nowhere, nowhere))
            if judged:
                kept["row"].append(numbers[sample])
                kept["offsets"].append(offsets)
        return kept

    return rows.map(split, batched=True, with_indices=True, remove_columns=rows.column_names, keep_in_memory=True)


def no_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """The place that stands for "not here" in a window: that of [CLS], or the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _shortened(tokenizer: PreTrainedTokenizerBase, texts: list[str], most: int) -> list[str]:
    """The texts, cut after `most` tokens."""
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [text if len(at) <= most else text[: at[most - 1][1]] for text, at in zip(texts, found)]


def _place(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """First and last token of the characters from `start` to `end` (exclusive); None unless all are in the window."""
    context = [i for i, (a, b) in enumerate(offsets) if 0 <= a < b]
    inside = [i for i in context if offsets[i][1] > start and offsets[i][0] < end]
    if not inside or offsets[context[0]][0] > start or offsets[context[-1]][1] < end:
        return None
    return inside[0], inside[-1]


class CollateWindows:
    """Pads the windows of questions and contexts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: TextData):
        self.tokenizer, self.data = tokenizer, data

    def __call__(self, rows: list[dict]) -> Batch:
        keys = [key for key in ("input_ids", "token_type_ids") if key in rows[0]]
        batch = pad_ids({key: [row[key] for row in rows] for key in keys}, self.tokenizer)
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def pad_ids(parts: dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Token ids, and what else there is of each token, padded on the right, with their attention mask."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = parts["input_ids"]
    width = max(len(row) for row in ids)
    batch = {
        key: torch.tensor([row + [pad if key == "input_ids" else 0] * (width - len(row)) for row in rows])
        for key, rows in parts.items()
    }
    batch["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return batch


class CollateIds:
    """Pads windows of token ids; `labels` are the ids, -100 where padded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict]) -> Batch:
        batch = pad_ids({"input_ids": [row["input_ids"] for row in rows]}, self.tokenizer)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class CollateMasked:
    """Pads windows and hides 15 % of the tokens for a masked language model (BERT's 80/10/10 rule)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.ids = CollateIds(tokenizer)
        self.tokenizer = tokenizer
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.ids(rows)
        ids = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids)) | (batch["attention_mask"] == 0)
        draw = torch.rand(ids.shape, generator=self.generator)
        hidden = (draw < 0.15) & ~special
        batch["labels"] = ids.masked_fill(~hidden, -100)
        random_ids = torch.randint(len(self.tokenizer), ids.shape, generator=self.generator)
        ids = ids.masked_fill(hidden & (draw < 0.12), self.tokenizer.mask_token_id)
        batch["input_ids"] = torch.where(hidden & (draw >= 0.12) & (draw < 0.135), random_ids, ids)
        return batch


def make_loader(dataset: Dataset | Stream, collate, *, batch_size: int, seed: int | None) -> DataLoader:
    """Batches of rows; shuffled by the seed (texts into rows of like length), or in order when it is None.

    Rows of a stream are shuffled within its buffer, and not put together by their length.
    """
    if isinstance(dataset, Stream):
        rows = dataset if seed is None else dataset.shuffled(seed)
        return DataLoader(rows, batch_size=batch_size, collate_fn=collate)
    sampler = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        if any(isinstance(feature, Image) for feature in dataset.features.values()):
            sampler = RandomSampler(dataset, generator=generator)
        else:
            column = "input_ids" if "input_ids" in dataset.column_names else collate.data.text_columns[0]
            lengths = [len(value) for value in dataset[column]]
            sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
    last = isinstance(sampler, RandomSampler) and len(dataset) >= batch_size  # a batch of one has no variance
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate, drop_last=last)


def token_counts(loader: DataLoader, vocab_size: int, *, batches: int, masked: bool = False) -> torch.Tensor:
    """How often each token id occurs in the first batches, (vocab_size,).

    Args:
        masked: Whether labels are the tokens that a masked language model's [MASK] hides.
    """
    counts = torch.zeros(vocab_size)
    for batch in itertools.islice(loader, batches):
        ids = batch["input_ids"]
        if masked:
            ids = torch.where(batch["labels"] >= 0, batch["labels"], ids)
        ids = ids[batch["attention_mask"].bool()]
        counts += torch.bincount(ids, minlength=vocab_size)[:vocab_size]
    return counts
