"""What an encoder-decoder reads and writes: pairs of texts, or one text with holes that it fills."""

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ibprune.collating import pad_ids
from ibprune.data import TextData
from ibprune.errors import BadData
from ibprune.losses import Batch

HIDDEN = 0.15  # share of the tokens that are hidden
SPAN = 3  # tokens of a hidden span on average
SENTINEL = "<extra_id_{}>"  # T5's names for the places of hidden spans


class CollatePairs:
    """Tokenises pairs of what is read and what is to be written.

    `labels` are the ids to be written, -100 where padded; `decoder_input_ids` are these, shifted by one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: TextData, max_length: int, config: PreTrainedConfig):
        self.tokenizer, self.data, self.max_length, self.config = tokenizer, data, max_length, config

    def __call__(self, rows: list[dict]) -> Batch:
        options = dict(truncation=True, max_length=self.max_length, verbose=False)
        read, written = ([row[column] for row in rows] for column in self.data.text_columns)
        ids = self.tokenizer(read, **options)["input_ids"]
        targets = self.tokenizer(text_target=written, **options)["input_ids"]
        return _batch(ids, targets, self.tokenizer, self.config)


class CollateSpans:
    """Hides spans of windows of token ids, 15 % of their tokens, three at a time on average.

    With T5's sentinels each span is one of them in what is read, and the spans behind their sentinels are to be
    written (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4). With a mask token alone each span is that token, and
    the whole text is to be written (BART's infilling: Lewis et al. 2020, arXiv 1910.13461, section 2.2).

    Raises:
        BadData: A tokenizer with neither.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, seed: int):
        self.tokenizer, self.config = tokenizer, config
        self.generator = torch.Generator().manual_seed(seed)
        known = tokenizer.get_vocab()
        self.sentinels = []
        while SENTINEL.format(len(self.sentinels)) in known:
            self.sentinels.append(known[SENTINEL.format(len(self.sentinels))])
        if not self.sentinels and tokenizer.mask_token_id is None:
            raise BadData(
                "expected pairs of texts, or a tokenizer with <extra_id_0> or a mask token to hide words of plain text "
                "with, found neither: name both columns with --text-columns."
            )
        self.special = set(tokenizer.all_special_ids)

    def __call__(self, rows: list[dict]) -> Batch:
        pairs = [self._hide(row["input_ids"]) for row in rows]
        return _batch([read for read, _ in pairs], [written for _, written in pairs], self.tokenizer, self.config)

    def _hide(self, ids: list[int]) -> tuple[list[int], list[int]]:
        text = [i for i, token in enumerate(ids) if token not in self.special]
        n_hidden = max(1, round(HIDDEN * len(text)))
        n_spans = max(1, round(n_hidden / SPAN))
        if self.sentinels:
            n_spans = min(n_spans, len(self.sentinels) - 1) or 1
        starts, lengths = self._spans(len(text), n_hidden, n_spans)
        spans = [text[start : start + length] for start, length in zip(starts, lengths)]
        marks = self.sentinels or [self.tokenizer.mask_token_id] * len(spans)
        first = {span[0]: mark for span, mark in zip(spans, marks)}
        hidden = {i for span in spans for i in span}
        read = [first.get(i, token) for i, token in enumerate(ids) if i in first or i not in hidden]
        if not self.sentinels:
            return read, ids
        written = [token for span, mark in zip(spans, marks) for token in (mark, *(ids[i] for i in span))]
        end = self.tokenizer.eos_token_id
        return read, [*written, *self.sentinels[len(spans) :][:1], *([] if end is None else [end])]

    def _spans(self, length: int, n_hidden: int, n_spans: int) -> tuple[list[int], list[int]]:
        """First places and lengths of spans that do not touch, where there is room."""
        n_hidden = min(n_hidden, length)
        n_spans = max(1, min(n_spans, n_hidden, length - n_hidden + 1))
        lengths = self._parts(n_hidden, n_spans)
        gaps = self._parts(length - n_hidden + 2, n_spans + 1)  # the outer gaps may be empty
        starts, at = [], gaps[0] - 1
        for span, gap in zip(lengths, gaps[1:]):
            starts.append(at)
            at += span + gap
        return starts, lengths

    def _parts(self, total: int, n: int) -> list[int]:
        """A whole number as so many random parts of at least 1."""
        cuts = torch.randperm(total - 1, generator=self.generator)[: n - 1].sort().values.tolist()
        edges = [0, *(cut + 1 for cut in cuts), total]
        return [b - a for a, b in zip(edges, edges[1:])]


def _batch(
    ids: list[list[int]], targets: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> Batch:
    batch = pad_ids({"input_ids": ids}, tokenizer)
    written = pad_ids({"input_ids": targets}, tokenizer)
    first = torch.full((len(targets), 1), config.decoder_start_token_id)
    batch["decoder_input_ids"] = torch.cat([first, written["input_ids"][:, :-1]], dim=1)
    batch["labels"] = written["input_ids"].masked_fill(written["attention_mask"] == 0, -100)
    return batch
