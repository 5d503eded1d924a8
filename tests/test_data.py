"""Data: the splits, the columns, the embedded prose, and errors that say what to do."""

import json
from decimal import Decimal
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from transformers import BertConfig

from ibprune.collating import Collate, CollateIds, CollateMasked, make_loader, token_counts, windows
from ibprune.data import TextData, load_data
from ibprune.errors import BadData
from ibprune.labels import match_labels
from ibprune.metrics import load_metric
from ibprune.prose import load_prose
from ibprune.reading import open_files
from ibprune.streaming import stream_data


def test_a_folder_gives_its_own_split_and_quotes_are_literal(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + 'a "quoted film\t1\nbad\t0\n' * 10)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\r\ngood\t1\r\n")
    data = load_data(str(tmp_path))
    assert len(data.train) == 20 and data.train[0]["sentence"] == 'a "quoted film'
    assert data.held_out[:] == {"sentence": ["good"], "label": [1]}
    assert data.labels == ("0", "1") and data.metrics == ("accuracy",)


def test_without_a_split_rows_are_held_out_by_the_seed(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"row {i},{'yes' if i % 2 else 'no'}\n" for i in range(100)))
    first, again, other = (load_data(str(file), seed=seed) for seed in (0, 0, 1))
    assert len(first.train) == 80 and len(first.held_out) == 20
    assert first.held_out["text"] == again.held_out["text"] != other.held_out["text"]
    assert not set(first.held_out["text"]) & set(first.train["text"])
    assert set(first.train["label"]) == {0, 1} and first.labels == ("no", "yes")


def test_scores_make_it_a_regression(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("sentence1,sentence2,score\n" + "".join(f"a {i},b,{i / 7}\n" for i in range(40)))
    data = load_data(str(file))
    assert data.labels == () and data.label_column == "score" and data.metrics == ("spearmanr",)
    assert data.text_columns == ("sentence1", "sentence2")


@pytest.mark.parametrize(
    "text,flags,reason",
    [
        ("text,label\nx,1\n" * 30, {"label_column": "lable"}, "did you mean 'label'"),
        ("words,label\n" + "x,1\ny,0\n" * 20, {}, "name it with --text-columns"),
        ("text,label\n" + "x,1\n" * 30, {}, "at least two classes"),
        ("text,label\nx,1\n", {}, "at least 20 rows"),
        ("", {}, "could not read"),
    ],
)
def test_data_that_cannot_be_used(text, flags, reason, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(BadData, match=reason):
        load_data(str(file), **flags)


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"text": {"en": "x"}, "label": 1}, "expected text in 'text' of 'rows.jsonl', found dict"),
        # numbers among texts: the oldest datasets refuse them while they read
        ({"text": 7, "label": 1}, "expected text in 'text' of 'rows.jsonl', found json|changed from string to number"),
        ({"text": "x", "label": [1]}, "expected one label a row in 'label' of 'rows.jsonl', found list"),
        ({"text": "x", "label": 1e999}, "expected finite numbers in 'label' of 'rows.jsonl', found an infinite one"),
    ],
)
def test_values_that_are_no_texts_and_labels(row, reason, tmp_path):
    others = row if not isinstance(row["text"], int) else row | {"text": "y"}
    others = others if others["label"] != 1e999 else others | {"label": 0.5}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [others] * 15 + [row] + [others] * 15)))
    with pytest.raises(BadData, match=reason):
        load_data(str(file))


def test_a_folder_without_a_training_file(tmp_path):
    (tmp_path / "test.csv").write_text("text\nx\n")
    with pytest.raises(BadData, match=r"expected a train\.\* file"):
        load_data(str(tmp_path))


def test_prose_is_english_the_same_every_time_and_split():
    first, again = load_prose(limit=2000), load_prose(limit=2000)
    assert first.train["text"] == again.train["text"]
    assert not set(first.train["text"]) & set(first.held_out["text"])
    assert all(8 <= len(text.split()) <= 40 for text in first.train["text"])


def test_batches_are_a_function_of_the_seed(tokenizer):
    rows = Dataset.from_dict({"text": [" ".join(WORDS[: 1 + i % 9]) for i in range(64)]})
    collate = Collate(tokenizer, TextData("x", rows, rows, ("text",)), 16)
    ids = [[b["input_ids"] for b in make_loader(rows, collate, batch_size=8, seed=seed)] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(ids[0], ids[1]))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(ids[0], ids[2]))


def test_windows_cover_a_text_and_padding_is_not_a_label(tokenizer):
    rows = Dataset.from_dict({"text": ["good film " * 10, "bad plot"]})
    cut = windows(rows, "text", tokenizer, 8)
    assert sum(len(ids) for ids in cut["input_ids"][:3]) == 22
    batch = CollateIds(tokenizer)([cut[0], cut[len(cut) - 1]])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert torch.equal(batch["labels"][0], batch["input_ids"][0])


def test_masking_hides_a_seventh_and_never_special_tokens(tokenizer):
    rows = [{"input_ids": [2, *range(5, 25), 3]} for _ in range(200)]
    batch = CollateMasked(tokenizer, seed=0)(rows)
    hidden = batch["labels"] != -100
    assert 0.12 < hidden[:, 1:-1].float().mean() < 0.18
    assert not hidden[:, [0, -1]].any()
    assert torch.equal(batch["input_ids"][~hidden], torch.tensor([row["input_ids"] for row in rows])[~hidden])


def test_token_counts_see_behind_masks_and_leave_padding_out(tokenizer):
    rows = [{"input_ids": [2, *[7] * n, 3]} for n in (3, 10)]
    batches = [CollateMasked(tokenizer, seed=0)(rows)]
    counts = token_counts(batches, 26, batches=5, masked=True)
    assert counts[7] == 13 and counts[2] == counts[3] == 2 and counts.sum() == 17


def test_metrics_speak_the_interface_of_evaluate():
    found = load_metric("accuracy").compute(predictions=[1, 0, 1], references=[1, 1, 1])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert load_metric("f1").compute(predictions=[1, 0, 1], references=[1, 1, 0])["f1"] == pytest.approx(0.5)
    assert load_metric("spearmanr").compute(predictions=[1.0, 2, 3], references=[3.0, 2, 1])["spearmanr"] == -1
    metric = load_metric("matthews_correlation")
    metric.add_batch(predictions=[1, 0, 1, 0], references=[1, 0, 1, 0])
    assert metric.compute()["matthews_correlation"] == 1
    with pytest.raises(BadData, match="did you mean 'accuracy'"):
        load_metric("acuracy")


@pytest.mark.parametrize(
    "name,text",
    [
        ("a.csv", "text,label\n" + "good film,1\nbad film,0\n" * 15 + ",1\nfine,\n"),
        (
            "a.jsonl",
            '{"text": "good", "label": "y"}\n{"text": "bad", "label": "n"}\n' * 15 + '{"text": null, "label": "y"}\n',
        ),
    ],
)
def test_rows_without_text_or_label_are_left_out_and_said(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    data = load_data(str(tmp_path / name))
    assert len(data.train) + len(data.held_out) == 30 and len(data.labels) == 2 and "Left out" in data.note


def test_both_splits_need_the_same_columns_and_classes(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 10)
    for dev, reason in (("text\nfine\n", "label"), ("text,label\nfine,2\n", "never occur"), ("text,label\n", "rows")):
        (tmp_path / "dev.csv").write_text(dev)
        with pytest.raises(BadData, match=reason):
            load_data(str(tmp_path))
    (tmp_path / "dev.csv").write_text("text,label\n7,1\n8,0\n")
    with pytest.raises(BadData, match="expected text in 'text'"):
        load_data(str(tmp_path))


def classifier(n: int, **names) -> BertConfig:
    return BertConfig(architectures=["BertForSequenceClassification"], num_labels=n, **names)


def labelled(values: list, **options) -> TextData:
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(len(values))], "label": values})
    return TextData("d", rows, rows, ("text",), "label", **options)


def test_labels_take_the_numbers_that_a_trained_head_knows():
    data = labelled([0, 1, 1], labels=("neg", "pos"), metrics=("accuracy",))
    named = match_labels(data, classifier(2, label2id={"pos": 0, "neg": 1}, id2label={0: "pos", 1: "neg"}), "m")
    assert list(named.train["label"]) == [1, 0, 0] and named.labels == ("pos", "neg")
    guessed = match_labels(data, classifier(2), "m")
    assert list(guessed.train["label"]) == [0, 1, 1] and "does not name its classes; taken in order" in guessed.note
    other = match_labels(data, classifier(2, label2id={"bad": 0, "good": 1}, id2label={0: "bad", 1: "good"}), "m")
    assert list(other.train["label"]) == [0, 1, 1] and "has other names for its classes; taken in order" in other.note
    rare = match_labels(labelled([0, 1], labels=("0", "2"), metrics=("accuracy",)), classifier(3), "m")
    assert list(rare.train["label"]) == [0, 2] and len(rare.labels) == 3
    floats = match_labels(labelled([0.0, 1.0], metrics=("spearmanr",)), classifier(2), "m")
    assert list(floats.train["label"]) == [0, 1] and floats.metrics == ("accuracy",)
    scores = match_labels(labelled([0, 1, 2], labels=("1", "4", "5"), metrics=("accuracy",)), classifier(1), "m")
    assert (
        list(scores.train["label"]) == [1, 4, 5]
        and scores.labels == ()
        and scores.train.features["label"].dtype == "float64"
    )
    assert match_labels(data, BertConfig(architectures=["BertModel"]), "m") is data
    with pytest.raises(BadData, match="trained for 2 outputs"):
        match_labels(labelled([0, 1, 2], labels=("a", "b", "c"), metrics=("accuracy",)), classifier(2), "m")
    with pytest.raises(BadData, match="BertForTokenClassification"):
        match_labels(data, BertConfig(architectures=["BertForTokenClassification"]), "m")


def test_whole_numbers_of_a_regressor_keep_their_values(tmp_path):
    """They are taken for classes while no model is known, and numbered: the numbers are not what it was trained on."""
    rows = [f"text {i}\t{(1, 3, 5, 10)[i % 4]}" for i in range(40)]
    (tmp_path / "ratings.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    data = load_data(tmp_path / "ratings.tsv")
    assert data.labels == ("1", "3", "5", "10")
    matched = match_labels(data, classifier(1), "m")
    assert matched.labels == () and set(matched.train["label"]) == {1.0, 3.0, 5.0, 10.0}
    words = [f"text {i}\t{('low', 'high')[i % 2]}" for i in range(40)]
    (tmp_path / "words.tsv").write_text("\n".join(["sentence\tlabel", *words]))
    with pytest.raises(BadData, match="could not convert string to float"):
        match_labels(load_data(tmp_path / "words.tsv"), classifier(1), "m")


@pytest.mark.parametrize("gap", range(0, 60, 7))
def test_a_row_without_a_label_changes_no_classes_into_decimals(gap, tmp_path):
    """Whether the gap falls into the training rows or the held-out ones."""
    rows = [f"text {i}\t{'' if i == gap else i % 2}" for i in range(60)]
    (tmp_path / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    data = load_data(tmp_path / "rows.tsv")
    assert data.labels == ("0", "1") and data.metrics == ("accuracy",) and "1 rows" in data.note
    assert {str(part.features["label"].dtype) for part in (data.train, data.held_out)} == {"int64"}


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_none_and_na_are_words(ending, tmp_path):
    mark = {"csv": ",", "tsv": "\t"}[ending]
    texts = ["null", *(f"text {i}" for i in range(1, 60))]
    rows = [f"{text}{mark}{('None', 'NA', 'pos')[i % 3]}" for i, text in enumerate(texts)]
    (tmp_path / f"rows.{ending}").write_text("\n".join([f"sentence{mark}label", *rows]))
    data = load_data(tmp_path / f"rows.{ending}")
    assert data.labels == ("NA", "None", "pos") and len(data.train) + len(data.held_out) == 60 and not data.note
    (read,) = open_files([tmp_path / f"rows.{ending}"]).take(1)
    assert read == {"sentence": "null", "label": "None"}


def test_held_out_labels_of_another_kind_are_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *(f"text {i}\t0.{i}" for i in range(1, 30))]))
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *["text\tpos"] * 5]))
    with pytest.raises(BadData, match="expected decimals in the column 'label'"):
        load_data(tmp_path)


@pytest.mark.parametrize("gap", ["NA", "null", ""])
def test_words_for_a_missing_number_make_no_classes_of_the_others(gap, tmp_path):
    values = [gap, *(f"{i / 10:.1f}" for i in range(1, 40))]
    (tmp_path / "scores.csv").write_text(
        "\n".join(["sentence,label", *(f"text {i},{v}" for i, v in enumerate(values))])
    )
    data = load_data(tmp_path / "scores.csv")
    assert data.labels == () and "1 rows" in data.note and len(data.train) + len(data.held_out) == 39


def test_numbers_beyond_whole_ones_are_no_classes(tmp_path):
    rows = [{"text": f"word {i}", "label": 1e300 if i == 3 else i % 2} for i in range(40)] + [{"text": "a"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_data(str(tmp_path / "rows.jsonl")).labels == ()


def test_a_row_without_a_text_makes_no_classes_of_decimals(tmp_path):
    rows = [f"{'' if i == 3 else f'text {i}'}\t{i % 5}.0" for i in range(40)]
    (tmp_path / "scores.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    assert load_data(tmp_path / "scores.tsv").labels == ()


def test_predictions_that_are_all_alike_order_nothing():
    assert load_metric("spearmanr").compute(predictions=[0.5, 0.5], references=[1.0, 2.0]) == {"spearmanr": 0.0}
    with pytest.raises(BadData, match="found 2 alone"):
        load_metric("spearmanr").compute(predictions=[0.5, 0.7], references=[2.0, 2.0])


@pytest.mark.parametrize("places,labels,metrics", [(0, ("0", "1"), ("accuracy",)), (2, (), ("spearmanr",))])
def test_decimals_of_a_database_are_numbers(places, labels, metrics, tmp_path):
    """decimal128(10, 0) numbers classes, decimal128(10, 2) is what a regressor learns; texts may be string views."""
    codes = pa.array([Decimal(i % 2).scaleb(-places) for i in range(40)], pa.decimal128(10, places))
    texts = pa.array([f"row {i}" for i in range(40)], pa.string_view())
    pq.write_table(pa.table({"text": texts, "label": codes}), tmp_path / "rows.parquet")
    for read in (load_data, partial(stream_data, buffer=8)):
        data = read(str(tmp_path / "rows.parquet"))
        assert (data.labels, data.metrics) == (labels, metrics)


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    for name, content in (("a.txt", "\ufefffirst text\n\n" + "more\n\n" * 30),
                          ("a.jsonl", "\ufeff" + '{"text": "first text"}\n' + '{"text": "more"}\n' * 30)):  # fmt: skip
        (tmp_path / name).write_text(content, "utf-8")
        for read in (load_data, partial(stream_data, buffer=8)):
            data = read(str(tmp_path / name))
            rows = [row["text"] for rows in (data.stream or data.train, data.held_out) for row in rows]
            assert "first text" in rows and not any("\ufeff" in row for row in rows)


def test_rows_that_are_null_are_refused_where_the_parser_would_end_the_process(tmp_path):
    """At the start of JSON lines and where many follow each other pyarrow 26 has a segmentation fault."""
    rows = "".join(json.dumps({"text": f"word {i} and more", "label": i % 2}) + "\n" for i in range(40))
    for ending in ("json", "jsonl"):
        path = tmp_path / f"rows.{ending}"
        for text, line in (("null", 1), ("\n \n\tnull\n" + rows, 3), ("\ufeffnull\n" + rows, 1), ("nulll", 1),
                           (rows + "null\n" * 3, 41), ('null {"a": 1}\n' + rows, 1)):  # fmt: skip
            path.write_text(text)
            with pytest.raises(BadData, match=f"line {line} is null: take such rows out"):
                load_data(str(path))
        path.write_text(rows.replace("word", "null"))
        assert len(load_data(str(path)).train) == 32
    (tmp_path / "rows.json").write_text(json.dumps([{"text": f"word {i}", "label": None} for i in range(40)], indent=1))
    with pytest.raises(BadData, match="label"):
        load_data(str(tmp_path / "rows.json"))
