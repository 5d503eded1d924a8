"""Rows of text become padded batches of token ids."""

import itertools

import torch
from datasets import Dataset, Image
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from ibprune.data import TextData
from ibprune.losses import DENSE, WORDS


class Collate:
    """Tokenises rows into one padded batch; tokenising here keeps large data sets off the disk.

    With a `dense_tokenizer` the batch also holds what the dense model reads of the same texts (`losses.DENSE`) and,
    where there are no labels, to which word each token belongs (-1: to none): both tokenizers find the same words.
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
        texts = [[row[column] for row in rows] for column in self.data.text_columns]
        batch = self._encode(self.tokenizer, texts)
        if self.dense_tokenizer is not None:
            batch |= {DENSE + key: value for key, value in self._encode(self.dense_tokenizer, texts).items()}
        if self.data.label_column:
            dtype = torch.long if self.data.labels else torch.float32
            batch["labels"] = torch.tensor([row[self.data.label_column] for row in rows], dtype=dtype)
        return batch

    def _encode(self, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]) -> dict[str, torch.Tensor]:
        found = tokenizer(*texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        if self.dense_tokenizer is None or self.data.label_column:
            return dict(found)
        words = [[-1 if word is None else word for word in found.word_ids(i)] for i in range(len(texts[0]))]
        return dict(found) | {WORDS: torch.tensor(words)}


def windows(dataset: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Texts cut into windows of at most `max_length` tokens, for language models; column `text` of ids."""

    def split(rows: dict) -> dict:
        ids = tokenizer(rows[column], verbose=False)["input_ids"]
        return {"input_ids": [row[i : i + max_length] for row in ids for i in range(0, len(row), max_length)]}

    found = dataset.select_columns([column]).map(split, batched=True, remove_columns=[column], keep_in_memory=True)
    return found.filter(lambda row: len(row["input_ids"]) > 1, keep_in_memory=True)


class CollateIds:
    """Pads windows of token ids; `labels` are the ids, -100 where padded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


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


def make_loader(dataset: Dataset, collate, *, batch_size: int, seed: int | None) -> DataLoader:
    """Batches of rows; shuffled by the seed (texts into rows of like length), or in order when it is None."""
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


def token_counts(loader: DataLoader, vocab_size: int, *, batches: int) -> torch.Tensor:
    """How often each token id occurs in the first batches, (vocab_size,)."""
    counts = torch.zeros(vocab_size)
    for batch in itertools.islice(loader, batches):
        ids, labels = batch["input_ids"], batch.get("labels")
        if labels is not None and labels.shape == ids.shape:
            ids = torch.where(labels >= 0, labels, ids)  # what a masked LM's [MASK] hides
        ids = ids[batch["attention_mask"].bool()]
        counts += torch.bincount(ids, minlength=vocab_size)[:vocab_size]
    return counts
