"""Models that read one text and write another: pairs, plain text with holes, whole runs, and what is refused."""

import json
import random
from copy import deepcopy

import pytest
import torch
from conftest import WORDS, build, outputs
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, BartConfig

import ibprune
from ibprune.data import TextData
from ibprune.denoising import CollatePairs, CollateSpans
from ibprune.errors import BadData

SHORT = dict(mask_steps=4, recover_steps=4, batch_size=16, max_length=32, seed=3, shares="equal")
CONFIG = BartConfig(decoder_start_token_id=3, pad_token_id=0)
SENTINELS = [f"<extra_id_{i}>" for i in range(6)]


@pytest.fixture(scope="module")
def with_sentinels(tokenizer):
    found = deepcopy(tokenizer)
    found.add_special_tokens({"additional_special_tokens": SENTINELS, "eos_token": "[SEP]"})
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """A file of texts and what a model shall write of them: their first three words."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    rng = random.Random(0)
    rows = [rng.choices(WORDS, k=rng.randint(6, 10)) for _ in range(1200)]
    path.write_text("document\tsummary\n" + "".join(f"{' '.join(r)}\t{' '.join(r[:3])}\n" for r in rows))
    return str(path)


def rows_of(tokenizer, n: int = 40) -> list[dict]:
    return [{"input_ids": tokenizer(" ".join(WORDS[: 2 + i % 20]))["input_ids"]} for i in range(n)]


def test_spans_and_what_is_left_make_the_text_again(with_sentinels):
    """T5: every sentinel of the input stands for the tokens behind it in what is written."""
    tokenizer, rows = with_sentinels, rows_of(with_sentinels)
    marks = tokenizer.convert_tokens_to_ids(SENTINELS)
    batch = CollateSpans(tokenizer, CONFIG, seed=0)(rows)
    n_hidden = n_text = 0
    for row, read, mask, written in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        read, written = read[mask.bool()].tolist(), written[written != -100].tolist()
        assert written[-1] == tokenizer.eos_token_id and written[-2] in marks and written[-2] not in read
        spans: dict[int, list[int]] = {}
        for token in written[:-1]:
            if token in marks:
                spans[token] = []
                last = token
            else:
                spans[last].append(token)
        whole = [token for i in read for token in (spans[i] if i in marks else [i])]
        assert whole == row["input_ids"]
        assert [i for i in read if i in marks] == marks[: len(spans) - 1]
        n_hidden, n_text = n_hidden + sum(map(len, spans.values())), n_text + len(row["input_ids"]) - 2
    assert 0.12 < n_hidden / n_text < 0.22  # at least one token of each text


def test_a_mask_token_stands_for_a_span_and_the_whole_text_is_written(tokenizer):
    rows = rows_of(tokenizer)
    batch = CollateSpans(tokenizer, CONFIG, seed=0)(rows)
    for row, read, mask, written in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        assert written[written != -100].tolist() == row["input_ids"]
        read = read[mask.bool()].tolist()
        assert tokenizer.mask_token_id in read and len(read) <= len(row["input_ids"])
    again = CollateSpans(tokenizer, CONFIG, seed=0)(rows)
    assert all(torch.equal(value, batch[key]) for key, value in again.items())
    assert not torch.equal(CollateSpans(tokenizer, CONFIG, seed=1)(rows)["input_ids"], batch["input_ids"])


def test_the_decoder_reads_what_it_wrote_one_token_later(tokenizer):
    rows = Dataset.from_dict({"a": ["good film", "the long story"], "b": ["good", "cold actor plot"]})
    batch = CollatePairs(tokenizer, TextData("pairs", rows, rows, ("a", "b")), 8, CONFIG)(list(rows))
    shown = batch["labels"].masked_fill(batch["labels"] == -100, 0)
    assert torch.equal(batch["decoder_input_ids"][:, 1:], shown[:, :-1])
    assert batch["decoder_input_ids"][:, 0].tolist() == [3, 3]
    assert tokenizer.decode(batch["labels"][1]) == "[CLS] cold actor plot [SEP]"
    assert (batch["labels"][0] == -100).sum() == 2 and batch["input_ids"].shape == (2, 5)


@pytest.mark.parametrize(
    "family,head", [("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")]
)
@pytest.mark.parametrize("kind", ["pairs", "plain"])
def test_the_main_job(family, head, kind, with_sentinels, tokenizer, pairs, stories, tmp_path):
    source, out = tmp_path / "dense", tmp_path / "out"
    build(family, head, dtype=torch.float32).save_pretrained(source)
    (with_sentinels if family == "t5" else tokenizer).save_pretrained(source)
    data, audited = (pairs, family == "t5") if kind == "pairs" else (stories, False)
    result = ibprune.prune(str(source), 0.6, data=data, output=str(out), audit=audited, **SHORT)
    report = result.report
    assert report["objective"] == "seq2seq_lm" and report["budget"]["achieved"] <= report["budget"]["limit"]
    assert 1 < report["pruned"]["metrics"]["perplexity"] < 500
    assert torch.allclose(outputs(ibprune.load(out)), outputs(result.model), atol=1e-5)
    model = AutoModelForSeq2SeqLM.from_pretrained(out, trust_remote_code=True)
    ids = torch.tensor([[2, 9, 12, 15, 3]])
    with torch.no_grad():
        assert torch.equal(model.generate(ids, max_new_tokens=5), result.model.generate(ids, max_new_tokens=5))
    assert report["audit"] == ("audit.json" if audited else None)


def test_it_learns_what_to_write(tmp_path, tokenizer, pairs):
    source, out = tmp_path / "dense", tmp_path / "out"
    build("bart", "BartForConditionalGeneration", dtype=torch.float32).save_pretrained(source)
    tokenizer.save_pretrained(source)
    ibprune.train(str(source), data=pairs, output=str(out), finetune_steps=120, lr=1e-2, batch_size=32, max_length=16)
    report = ibprune.train(str(source), data=pairs, output=str(tmp_path / "again"), finetune_steps=0)
    after = json.loads((out / "report.json").read_text())["metrics"]["after"]["perplexity"]
    assert after < 0.5 * report["metrics"]["before"]["perplexity"]


def test_what_cannot_be_trained_is_refused(tokenizer, stories, pairs, tmp_path):
    for family, head in (("t5", "T5Model"), ("bart", "BartModel")):
        source = tmp_path / head
        build(family, head, dtype=torch.float32).save_pretrained(source)
        tokenizer.save_pretrained(source)
        with pytest.raises(BadData, match="conditional generation, sequence classifiers, and T5EncoderModel"):
            ibprune.prune(str(source), 0.5, data=stories, output=str(tmp_path / "out"), **SHORT)
    blind = deepcopy(tokenizer)
    blind.mask_token = None
    with pytest.raises(BadData, match="name both columns with --text-columns"):
        CollateSpans(blind, CONFIG, seed=0)
    assert not (tmp_path / "out").exists()
