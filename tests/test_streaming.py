"""Data that are read as they are trained on: the same rows as held in memory, in an order by the seed, without end."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS, build
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from test_processes import together
from test_resuming import Stopping
from transformers import AutoTokenizer, BertConfig

import ibprune
from ibprune import pipeline, reading, streaming
from ibprune.collating import windows
from ibprune.console import Quiet
from ibprune.data import load_data, read_file
from ibprune.engine import make_accelerator
from ibprune.errors import BadData, BadRecipe
from ibprune.labels import match_labels
from ibprune.processes import divided
from ibprune.reading import Stream, limited, open_files
from ibprune.recipe import make_recipe
from ibprune.streaming import stream_data
from ibprune.subject import load_subject


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for i in range(n)]


def write(path: Path, texts: list[str], labels: list | None = None) -> str:
    """Texts, labelled or not, in a file of any kind."""
    columns = {"text": texts} | ({"label": labels} if labels else {})
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts))
    elif path.suffix == ".parquet":
        Dataset.from_dict(columns).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values())))
    else:
        sep = "\t" if path.suffix == ".tsv" else ","
        path.write_text("\n".join([sep.join(columns), *(sep.join(map(str, row)) for row in zip(*columns.values()))]))
    return str(path)


def stream(texts: list[str], buffer: int = 8) -> Stream:
    rows = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    return Stream(lambda: rows, "texts", buffer)


def texts_of(rows) -> list[str]:
    return [row["text"] for row in rows]


@pytest.fixture(scope="module")
def speaking(tokenizer, folders, tmp_path_factory) -> str:
    """A tiny language model whose tokenizer has an end-of-text token."""
    folder = tmp_path_factory.mktemp("speaking") / "llama"
    shutil.copytree(folders["LlamaForCausalLM"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "[SEP]"}))
    return str(folder)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet", "rows.txt"])
def test_files_give_the_rows_that_they_give_to_memory(name, tmp_path):
    file = tmp_path / name
    write(file, sentences(60))
    found = stream_data(str(file), held_out=9, buffer=8)
    everything = texts_of(read_file(file))
    assert len(everything) == 60 and texts_of(found.held_out) == everything[:9]
    assert texts_of(found.stream) == texts_of(found.train) == everything[9:]
    assert len(stream_data(str(file), buffer=8).held_out) == 12  # a fifth, as of data in memory


def test_texts_end_at_their_marks(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo <|endoftext|>three<|endoftext|>\n <|endoftext|>four")
    assert texts_of(open_files([file])) == texts_of(read_file(file)) == ["one\n\ntwo", "three", "four"]
    file.write_text("\n\none\nline\n \t\n\ntwo\n\n")
    assert texts_of(open_files([file])) == texts_of(read_file(file)) == ["one\nline", "two"]
    monkeypatch.setattr(reading, "LONGEST", 6)
    with pytest.raises(BadData, match=r"texts that end at <\|endoftext\|> or a blank line in '.*a.txt'"):
        texts_of(open_files([file]))


def test_a_folder_of_many_files_and_its_own_held_out_rows(tmp_path):
    parts = [sentences(30, seed=seed) for seed in range(3)]
    for i, texts in enumerate(parts):
        write(tmp_path / f"train-{i}.jsonl", texts)
    write(tmp_path / "dev.jsonl", sentences(25, seed=9))
    found = stream_data(str(tmp_path), held_out=20, buffer=4)
    assert texts_of(found.stream) == sum(parts, []) and texts_of(found.held_out) == sentences(25, seed=9)[:20]
    first = {texts_of(found.stream.shuffled(seed))[0] for seed in range(12)}
    assert any(set(part) & first for part in parts[1:])  # the files are shuffled, too
    for i, texts in enumerate(parts):
        (tmp_path / f"train-{i}.jsonl").unlink()
        write(tmp_path / "train" / f"{i}.jsonl", texts)
    assert texts_of(stream_data(str(tmp_path), buffer=4).stream) == sum(parts, [])


def test_the_order_is_a_function_of_the_seed():
    rows = stream(sentences(50))
    first, again, other = (texts_of(rows.shuffled(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(sentences(50)) != first
    assert max(first.index(text) - i for i, text in enumerate(sentences(50))) > 8  # an early row may come late


def test_packed_windows_are_full_and_hold_every_text(tokenizer, speaking):
    speaker = AutoTokenizer.from_pretrained(speaking)
    texts = sentences(70)
    held, passing = Dataset.from_dict({"text": texts}), stream(texts)
    packed = windows(held, "text", speaker, 16, packing=True)["input_ids"]
    tokens = sum(speaker(texts)["input_ids"], [])  # each ends with [SEP], the end-of-text token here
    assert {len(window) for window in packed} == {16}
    assert sum(packed, []) == tokens[: len(tokens) // 16 * 16] and tokens.count(speaker.eos_token_id) == 70
    streamed = windows(passing, "text", speaker, 16, packing=True)
    for _ in range(2):  # nothing is left of the first pass in the second
        assert [row["input_ids"] for row in streamed] == packed
    for rows in (held, passing):
        loose = [row["input_ids"] for row in windows(rows, "text", speaker, 7)]
        assert all(len(window) <= 7 for window in loose) and sum(loose, [])[:14] == tokens[:14]
    speaker.eos_token = "[MASK]"  # one that the tokenizer itself does not add
    packed = windows(held, "text", speaker, 16, packing=True)["input_ids"]
    ended = sum(([*ids, speaker.mask_token_id] for ids in speaker(texts)["input_ids"]), [])
    assert sum(packed, []) == ended[: len(ended) // 16 * 16]
    with pytest.raises(BadRecipe, match="this tokenizer has none"):
        windows(held, "text", tokenizer, 16, packing=True)


def test_rows_are_limited():
    rows = Dataset.from_dict({"text": sentences(40)})
    some, again, other = (limited(rows, 10, seed=seed)["text"] for seed in (0, 0, 1))
    assert list(some) == list(again) != list(other) and len(some) == 10
    assert [text for text in rows["text"] if text in set(some)] == list(some)  # in their order
    assert limited(rows, None, seed=0) is limited(rows, 40, seed=0) is rows
    first = limited(stream(sentences(40)), 10, seed=0)
    assert texts_of(first) == sentences(10) and sorted(texts_of(first.shuffled(3))) == sorted(sentences(10))


def test_a_recipe_limits_rows_and_tokens(speaking, stories):
    values = {"model": speaking, "budget": 0.6, "data": stories, "max_length": 8, "packing": True}
    values |= {"max_train_tokens": 80, "max_eval_samples": 5, "max_train_samples": 30}
    for streaming_ in (False, True):
        subject = load_subject(make_recipe(values | {"streaming": streaming_}), Quiet())
        assert len(subject.data.held_out) == 5
        batches = list(subject.feed.train(0))
        assert sum(len(batch["input_ids"]) for batch in batches) == 10 and subject.feed.n_rows == (
            None if streaming_ else 10
        )
        assert all(batch["attention_mask"].all() and batch["input_ids"].shape[1] == 8 for batch in batches)
    with pytest.raises(BadRecipe, match="--max-train-tokens: expected at least a window of 8, found 4"):
        load_subject(make_recipe(values | {"max_train_tokens": 4}), Quiet())
    plain = load_subject(
        make_recipe({"model": speaking, "budget": 0.6, "data": stories, "max_train_samples": 30}), Quiet()
    )
    assert len(plain.data.train) == 30


def test_classes_have_the_numbers_that_they_have_in_memory(tmp_path):
    labels = [("no", "yes", "maybe")[i % 3] for i in range(60)]
    write(tmp_path / "train.jsonl", sentences(60), labels)
    write(tmp_path / "dev.jsonl", sentences(9, seed=2), labels[:9])
    held, passing = load_data(str(tmp_path)), stream_data(str(tmp_path), buffer=8)
    assert passing.labels == held.labels == ("maybe", "no", "yes") and passing.metrics == held.metrics
    assert [row["label"] for row in passing.stream] == list(held.train["label"])
    names = {"label2id": {"yes": 0, "no": 1, "maybe": 2}, "id2label": {0: "yes", 1: "no", 2: "maybe"}}
    config = BertConfig(architectures=["BertForSequenceClassification"], **names)
    known = [match_labels(data, config, "m") for data in (held, passing)]
    assert [row["label"] for row in known[1].stream] == list(known[0].train["label"]) != list(held.train["label"])
    numbers = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").unlink()
        rows = {"text": sentences(20), "label": [0] * 10 + [1] * 10}
        Dataset.from_dict(rows, features=numbers).to_parquet(tmp_path / f"{name}.parquet")
    declared = stream_data(str(tmp_path), buffer=8)
    assert declared.labels == ("no", "yes") and [row["label"] for row in declared.stream] == [0] * 10 + [1] * 10


def test_decimals_make_it_a_regression_and_gaps_are_left_out(tmp_path):
    rows = [{"text": f"text {i}", "score": i / 7} for i in range(40)] + [{"text": "x", "score": None}]
    rows += [{"text": " ", "score": 1.5}, {"text": None, "score": 2.5}, {"text": "last", "score": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = stream_data(str(tmp_path / "a.jsonl"), held_out=20, buffer=8)
    assert found.labels == () and found.metrics == ("spearmanr",)
    assert list(found.stream) == [*rows[20:40], {"text": "last", "score": 3.0}]


@pytest.mark.parametrize(
    "head,labels",
    [
        ("BertModel", False),
        ("BertForMaskedLM", False),
        ("BertForSequenceClassification", True),
        ("BartForConditionalGeneration", False),
        ("LlamaForCausalLM", False),
    ],
)
def test_every_objective_reads_a_stream(head, labels, folders, tmp_path):
    file = write(tmp_path / "a.jsonl", sentences(60), [i % 2 for i in range(60)] if labels else None)
    values = {"model": folders[head], "budget": 0.6, "data": file, "max_length": 16, "batch_size": 8}
    feed = load_subject(make_recipe(values | {"streaming": True}), Quiet()).feed
    batches, again = list(feed.train(1)), list(feed.train(1))
    assert len(batches) >= 5 and feed.n_rows is None
    if head not in ("BertForMaskedLM", "BartForConditionalGeneration"):  # whose hidden tokens are drawn on and on
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    held = load_subject(make_recipe(values), Quiet()).feed
    assert {key: value.dtype for key, value in batches[0].items()} == {
        key: value.dtype for key, value in next(iter(held.train(1))).items()
    }
    assert len(feed.calibration(16, torch.device("cpu"))) == 2


def test_a_run_on_a_stream_goes_on_where_it_was_cut_short(speaking, stories, monkeypatch, tmp_path):
    found = {"auto_class": "AutoModel", "max_abs_diff": 0.0, "ways": [], "transformers": ""}
    monkeypatch.setattr(pipeline, "verify", lambda model, folder, tier, *rest, **more: found | {"tier": tier})
    values = dict(
        model=speaking, data=stories, budget=0.6, score="magnitude", shares="cost", recover_steps=14, batch_size=16,
        max_length=16, seed=3, audit=False, streaming=True, packing=True, shuffle_buffer=12, max_eval_samples=12,
    )  # fmt: skip
    whole = ibprune.prune(**values, output=tmp_path / "whole")
    assert whole.report["overlap"] is None and whole.report["pruned"]["metrics"]["perplexity"] > 1
    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**values, output=tmp_path / "out", save_every=1e-9, console=Stopping("recovering", 12))
    console = Stopping()
    ibprune.prune(**values, output=tmp_path / "out", resume=True, console=console)
    assert ("recovering", 2) in console.ran  # in the second epoch: each has 9 batches
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def rows_read(model: str, data: str) -> list[list]:
    """What a process trains on in an epoch."""
    make_accelerator("fp32")
    values = dict(model=model, data=data, budget=0.6, batch_size=8, max_length=16, streaming=True, packing=True)
    feed = load_subject(make_recipe(values), Quiet()).feed
    return [batch["input_ids"].tolist() for batch in divided(feed.train(5), torch.device("cpu"))]


def test_several_processes_train_on_the_rows_of_one(speaking, stories):
    alone = rows_read(speaking, stories)
    first, second = together(2, rows_read, speaking, stories)
    assert len(alone) == 16 and [ours + theirs for ours, theirs in zip(first, second, strict=True)] == alone


def read_on(file: str) -> int:
    make_accelerator("fp32")
    rows = stream_data(file, held_out=20, buffer=4).stream.mapped(lambda rows: rows.map(lambda row: {"n": len(row)}))
    batches = ({"x": torch.full((2,), row["n"])} for row in rows)
    return sum(1 for _ in divided(batches, torch.device("cpu")))


def test_a_row_that_cannot_be_read_ends_all_processes(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    monkeypatch.setattr(streaming, "AHEAD", 30)
    write(file, sentences(60))
    assert together(2, read_on, str(file)) == [40, 40]
    file.write_text(file.read_text() + "{broken\n")
    for found in together(2, read_on, str(file)):
        assert "could not read line 61 of" in found and "a.jsonl' as JSON" in found


ROW = '{"text": "good film", "label": 1}\n{"text": "bad film", "label": 0}\n'


@pytest.mark.parametrize(
    "name,text,flags,reason",
    [
        ("a.jsonl", "", {}, "expected at least 20 rows in '.*a.jsonl', found 0"),
        ("a.csv", "", {}, "could not read"),
        ("a.jsonl", ROW * 5, {}, "at least 20 rows"),
        ("a.jsonl", ROW * 15, {"held_out": 30}, "--max-eval-samples: expected fewer than the 30 rows"),
        ("a.jsonl", ROW * 15, {"text_columns": ("txt",)}, "did you mean 'text'"),
        ("a.jsonl", '{"words": "x"}\n' * 30, {}, "name it with --text-columns"),
        ("a.jsonl", ROW * 15 + "[1]\n", {}, "expected an object in line 31 of '.*a.jsonl', found \\[1\\]"),
        ("a.jsonl", ROW * 15 + "{broken\n", {}, "could not read line 31 of '.*a.jsonl' as JSON"),
        ("a.json", ROW, {}, r"expected files of one of .csv, .*found .json"),
        ("a.jsonl", '{"tokens": ["a", "b"], "ner_tags": ["O", "X"]}\n' * 30, {}, "words with tags.* are not streamed"),
    ],
)
def test_data_that_cannot_be_streamed(name, text, flags, reason, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadData, match=reason):
        stream_data(str(tmp_path / name), buffer=4, **flags)


@pytest.mark.parametrize(
    "more,reason",
    [
        ('{"text": "a"}\n', "expected a column 'label' in every row of 'a.jsonl', found a row with text"),
        ('{"text": 7, "label": 1}\n', "expected text in 'text' of 'a.jsonl', found 7"),
        ('{"text": "a", "label": 2}\n', "the class '2' is not among those of the first rows \\(0, 1\\)"),
        ('{"text": "a", "label"\n', "could not read line 41 of '.*a.jsonl' as JSON"),
    ],
)
def test_rows_far_down_that_cannot_be_used(more, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "AHEAD", 25)
    (tmp_path / "a.jsonl").write_text(ROW * 20 + more)
    found = stream_data(str(tmp_path / "a.jsonl"), held_out=5, buffer=4)
    with pytest.raises(BadData, match=reason):
        list(found.stream)


def test_a_broken_file_among_others_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "AHEAD", 25)
    for i in range(2):
        write(tmp_path / f"train-{i}.csv", sentences(40))
    (tmp_path / "train-1.csv").write_text((tmp_path / "train-1.csv").read_text() + '\na,b,c,"\n')
    with pytest.raises(BadData, match="could not read on in '.*train-1.csv'"):
        list(stream_data(str(tmp_path), buffer=4).stream)
    write(tmp_path / "train-2.jsonl", sentences(3))
    with pytest.raises(BadData, match="expected files of one of .*, found .csv, .jsonl"):
        stream_data(str(tmp_path), buffer=4)


@pytest.mark.parametrize(
    "values,reason",
    [
        ({"data": "prose"}, "--streaming: expected --data with files or a Hub data set"),
        ({}, "--streaming: expected --data with files or a Hub data set"),
        ({"task": "sst2"}, "--streaming: expected --data with files or a Hub data set"),
        ({"data": "a.txt", "mode": "fast"}, "--mode fast learns from a share of all rows.*--max-train-samples"),
        ({"data": "a.txt", "eval_every": 5}, "--eval-every holds training rows back"),
        ({"streaming": False, "shuffle_buffer": 7}, "--shuffle-buffer is of a stream"),
        ({"max_train_tokens": 100}, "expected --packing beside --max-train-tokens"),
        ({"max_train_samples": 0}, "max-train-samples"),
    ],
)
def test_recipes_that_make_no_sense(values, reason, folders):
    with pytest.raises(BadRecipe, match=reason):
        load_subject(
            make_recipe({"model": folders["LlamaForCausalLM"], "budget": 0.5, "streaming": True} | values), Quiet()
        )


def test_what_is_not_packed_or_streamed(folders, reviews, tmp_path):
    values = {"model": folders["BertForSequenceClassification"], "budget": 0.5, "data": reviews}
    with pytest.raises(BadRecipe, match="--packing joins the texts of causal language models, found classification"):
        load_subject(make_recipe(values | {"packing": True}), Quiet())
    build("vit", "ViTForImageClassification", dtype=torch.float32).save_pretrained(tmp_path / "vit")
    values = {"model": str(tmp_path / "vit"), "budget": 0.5, "data": "photos"}
    with pytest.raises(BadRecipe, match="--streaming: pictures are decoded as they are needed anyway"):
        load_subject(make_recipe(values | {"streaming": True}), Quiet())
    with pytest.raises(BadRecipe, match="--packing: the model reads pictures"):
        load_subject(make_recipe(values | {"packing": True}), Quiet())
