"""Words with tags and questions with answers: columns, alignment, windows, metrics, errors, and whole runs."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import TINY, VOCAB, WORDS, build
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

import ibprune
from ibprune import cli
from ibprune.annotations import first_pieces, read_conll
from ibprune.collating import Collate, CollateWindows, answer_windows
from ibprune.console import Quiet
from ibprune.data import TextData, load_data
from ibprune.errors import BadData, BadRecipe, UnsupportedModel
from ibprune.evaluation import evaluate_model
from ibprune.feeding import make_feed
from ibprune.inputs import encode_inputs
from ibprune.labels import match_labels
from ibprune.losses import Objective, distill_loss, forward, sensitivity, supervised_loss
from ibprune.metrics import entities, load_metric
from ibprune.models import model_class
from ibprune.names import ANSWERS, TAGS
from ibprune.recipe import Recipe

THINGS = ("film", "story", "actor", "plot")
KIND = ("good", "fine", "warm")
SHORT = dict(mask_steps=6, recover_steps=4, batch_size=16, seed=3)


def sentence(rng: random.Random) -> dict:
    """Words, with an entity wherever things stand side by side."""
    words = rng.choices(WORDS, k=rng.randint(4, 9))
    tags = ["O"] * len(words)
    for i, word in enumerate(words):
        if word in THINGS:
            tags[i] = "I-THING" if i and tags[i - 1] != "O" else "B-THING"
    return {"tokens": words, "ner_tags": tags}


def question(rng: random.Random) -> dict:
    """A context with one kind word, which is the answer."""
    words = rng.choices([w for w in WORDS if w not in KIND], k=rng.randint(4, 8))
    words.insert(rng.randrange(len(words)), rng.choice(KIND))
    context = " ".join(words)
    answer = next(word for word in words if word in KIND)
    start = len(" ".join(words[: words.index(answer)])) + (words.index(answer) > 0)
    return {"question": "was it", "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def write(folder, train: list[dict], dev: list[dict] | None = None) -> str:
    for split, rows in (("train", train), ("dev", dev)):
        if rows is not None:
            (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> str:
    rng = random.Random(0)
    return write(
        tmp_path_factory.mktemp("ner"), [sentence(rng) for _ in range(160)], [sentence(rng) for _ in range(64)]
    )


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    rng = random.Random(0)
    return write(tmp_path_factory.mktemp("qa"), [question(rng) for _ in range(160)], [question(rng) for _ in range(64)])


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that cuts words."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "happy", "##happy", "dog", "##s", ".", "the"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def tagged(rows: list[tuple[list[str], list[int]]], labels: tuple[str, ...] = ("O", "B-A", "I-A")) -> TextData:
    data = Dataset.from_dict({"tokens": [words for words, _ in rows], "tags": [tags for _, tags in rows]})
    return TextData("d", data, data, ("tokens",), "tags", labels, ("accuracy", "entity_f1"), objective=TAGS)


def asked(rows: list[tuple[str, str, list[str]]]) -> TextData:
    """Questions, contexts and answers, which stand where they first occur."""
    columns = {"question": [q for q, _, _ in rows], "context": [c for _, c, _ in rows]}
    columns |= {"answers": [a for _, _, a in rows], "starts": [[c.index(x) for x in a] for _, c, a in rows]}
    kinds = Features({key: Value("string") for key in ("question", "context")})
    kinds |= {"answers": List(Value("string")), "starts": List(Value("int64"))}
    data = Dataset.from_dict(columns, features=Features(kinds))
    return TextData(
        "d", data, data, ("question", "context"), "answers", ("start", "end"), ("squad",), objective=ANSWERS
    )


# --- columns


def test_words_with_tags_are_found_in_files(tmp_path):
    data = load_data(write(tmp_path, [sentence(random.Random(i)) for i in range(30)]))
    assert data.objective == TAGS and data.text_columns == ("tokens",) and data.label_column == "ner_tags"
    assert data.labels == ("B-THING", "I-THING", "O") and data.metrics == ("accuracy", "entity_f1")
    assert set(data.train[0]["ner_tags"]) <= {0, 1, 2}
    names = Features({"words": List(Value("string")), "pos_tags": List(ClassLabel(names=["NOUN", "VERB"]))})
    rows = Dataset.from_dict({"words": [["a", "b"]] * 30, "pos_tags": [[0, 1]] * 30}, features=names)
    rows.to_parquet(tmp_path / "rows.parquet")
    data = load_data(str(tmp_path / "rows.parquet"))
    assert data.labels == ("NOUN", "VERB") and data.metrics == ("accuracy", "macro_f1")
    (tmp_path / "rows.conll").write_text("-DOCSTART- -X- O\n\n" + "Ada NNP B-PER\nran VB O\n\nhome NN O\n\n" * 20)
    data = load_data(str(tmp_path / "rows.conll"))
    assert len(data.train) + len(data.held_out) == 40 and data.labels == ("B-PER", "O")


def test_comments_in_conll_are_no_words_and_numbered_words_are_refused(tmp_path):
    """A word "#" has a tag and as many fields as other words; `# text = …` has not."""
    assert read_conll("# newdoc id = a\n\n# text = Ada ran off\nAda B-PER\nran O\n\n# O\n1 O\n# O\n")["tokens"] == [
        ["Ada", "ran"], ["#", "1", "#"],
    ]  # fmt: skip
    rows = "".join(f"{i}\t{word}\t_\tNOUN\t_\n" for i, word in enumerate(("Ada", "ran"), 1)) + "\n"
    (tmp_path / "rows.conll").write_text(("# text = Ada ran\n" + rows) * 30)
    with pytest.raises(BadData, match="found numbered words"):
        load_data(str(tmp_path / "rows.conll"))


def test_answers_are_found_in_every_nesting(tmp_path):
    row = {"question": "who", "context": "Ada ran", "answers": {"text": ["Ada"], "answer_start": [0]}}
    none = row | {"answers": {"text": [], "answer_start": []}}
    listed = row | {"answers": [{"text": "Ada", "answer_start": 0}]}
    for i, rows in enumerate(([row, none] * 15, [listed] * 30)):
        (tmp_path / f"{i}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    nested = [{"paragraphs": [{"context": "Ada ran", "qas": [{"question": "who", "answers": listed["answers"]}] * 30}]}]
    (tmp_path / "2.json").write_text(json.dumps({"version": "1.1", "data": nested}))
    for name, without in (("0.jsonl", 15), ("1.jsonl", 0), ("2.json", 0)):
        data = load_data(str(tmp_path / name))
        assert data.objective == ANSWERS and data.text_columns == ("question", "context")
        found = [answers for rows in (data.train, data.held_out) for answers in rows["answers"]]
        assert len(found) == 30 and found.count([]) == without and found.count(["Ada"]) == 30 - without


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda i: {"tokens": ["a", "b"], "tags": ["O"] * (1 if i == 7 else 2)}, "2 words and 1 tags in train row"),
        (lambda i: {"tokens": ["a", "b"], "tags": ["O", None if i == 7 else "X"]}, "found a gap in train row"),
        (lambda i: {"ner_tags": ["O", "X"]}, "expected a column of words beside the tags 'ner_tags'"),
        (lambda i: {"words": ["a", "b"], "id": i}, "expected a column of tags beside the words 'words'"),
        (lambda i: {"tokens": ["a"], "tags": [0.5]}, "text or whole numbers in 'tags'.*found float64"),
        (lambda i: {"tokens": [3], "tags": ["O"]}, "lists of text in 'tokens'.*found int64"),
        (lambda i: {"tokens": ["a"], "tags": ["O"]}, "at least two classes"),
        (
            lambda i: {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [0]}},
            "the answer 'b' at character 0 of its context in train row 0 .* found 'a'",
        ),
        (
            lambda i: {"question": "q", "answers": {"text": ["b"], "answer_start": [0]}},
            "expected the columns 'question'",
        ),
        (
            lambda i: {"question": "q", "context": "b", "answers": {"text": ["b"], "answer_start": []}},
            "expected a start for every answer, found 1 and 0",
        ),
    ],
)
def test_annotations_that_do_not_fit_are_said_in_one_line(change, reason, tmp_path):
    rows = [change(i) for i in range(40)]
    with pytest.raises(BadData, match=reason) as caught:
        load_data(write(tmp_path, rows, rows[-20:]))
    assert "\n" not in str(caught.value)


def test_held_out_rows_need_known_tags_and_the_same_columns(tmp_path):
    row = {"tokens": ["a", "b"], "tags": ["O", "X"]}
    with pytest.raises(BadData, match=r"held-out labels \['Y'\] never occur"):
        load_data(write(tmp_path, [row] * 20, [row | {"tags": ["O", "Y"]}]))
    with pytest.raises(BadData, match="the column 'tags' in the held_out rows"):
        load_data(write(tmp_path, [row] * 20, [{"tokens": ["a"]}]))


def test_lists_beside_plain_text_are_left_alone(tmp_path):
    row = {"text": "good film", "label": 1, "tags": ["x", "y"]}
    data = load_data(write(tmp_path, [row, row | {"label": 0}] * 15))
    assert data.objective == "" and data.text_columns == ("text",) and data.label_column == "label"


# --- alignment


def test_a_word_has_its_tag_at_its_first_piece(pieces):
    data = tagged([(["the", "unhappy", "dogs."], [0, 1, 2]), (["dog"], [1])])
    batch = Collate(pieces, data, 16)(list(data.train))
    tokens = pieces.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens == ["[CLS]", "the", "un", "##happy", "dog", "##s", ".", "[SEP]"]
    assert batch["labels"].tolist() == [[-100, 0, 1, -100, 2, -100, -100, -100], [-100, 1, *[-100] * 6]]
    short = Collate(pieces, data, 5)(list(data.train))
    assert short["labels"][0].tolist() == [-100, 0, 1, -100, -100]  # the last word is not read
    pieces.padding_side = "left"
    left = Collate(pieces, data, 16)(list(data.train))
    pieces.padding_side = "right"
    assert left["labels"][1].tolist() == [*[-100] * 6, 1, -100]


@pytest.mark.parametrize("trim", [True, False])
def test_pieces_that_bring_their_space_belong_to_the_next_word(trim):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder, core.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["the film the film"] * 5, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    words = ["the", "film", "é", "the"]
    found = tokenizer(" ".join(words), return_offsets_mapping=True)
    first = first_pieces(words, found["offset_mapping"])
    assert [word for word in first if word >= 0] == [0, 1, 2, 3]
    texts = [tokenizer.decode([i]).strip() for i, word in zip(found["input_ids"], first) if word in (0, 1, 3)]
    assert all(word.startswith(text) for word, text in zip(("the", "film", "the"), texts))


def test_windows_cover_the_context_and_point_at_the_answer(pieces):
    context = "the dog. " * 6 + "unhappy dogs. " + "the dog. " * 6
    data = asked([("the dog", context, ["unhappy dogs"]), ("the " * 30, "the dogs", [])])
    windows = answer_windows(data.train, data, pieces, 24, judged=True)
    seen, hits = set(), 0
    for row in windows:
        assert len(row["input_ids"]) <= 24 and row["input_ids"][0] == 2
        inside = [(a, b) for a, b in row["offsets"] if a >= 0]
        seen |= {(row["row"], c) for a, b in inside for c in range(a, b)}
        first, last = row["labels"]
        if (first, last) != (0, 0):
            hits += 1
            text = data.train[row["row"]]["context"]
            assert text[row["offsets"][first][0] : row["offsets"][last][1]] == "unhappy dogs"
    assert hits >= 1 and {c for row, c in seen if row == 0} == {i for i, x in enumerate(context) if x != " "}
    assert sum(row["row"] == 1 for row in windows) == 1 and windows[-1]["labels"] == [0, 0]
    batch = CollateWindows(pieces, data)([windows[0], windows[-1]])
    assert batch["labels"].shape == (2, 2) and batch["token_type_ids"].shape == batch["input_ids"].shape
    assert set(answer_windows(data.train, data, pieces, 24, judged=False).column_names) == {
        "input_ids", "token_type_ids", "labels",
    }  # fmt: skip
    with pytest.raises(BadRecipe, match="--max-length: expected at least 24"):
        answer_windows(data.train, data, pieces, 16, judged=True)


# --- metrics and losses


def test_entities_count_when_type_and_both_ends_are_right():
    assert entities(["I-A", "I-A", "B-A", "O", "I-B", "I-A"]) == [
        ("A", 0, 1), ("A", 2, 2), ("B", 4, 4), ("A", 5, 5),
    ]  # fmt: skip
    truth = [["B-A", "I-A", "O"], ["B-B", "O", "O"]]
    found = [["B-A", "O", "O"], ["B-B", "O", "B-A"]]
    f1 = load_metric("entity_f1").compute(predictions=found, references=truth)["entity_f1"]
    assert f1 == pytest.approx(2 * 1 / (3 + 2))
    assert load_metric("entity_f1").compute(predictions=truth, references=truth)["entity_f1"] == 1
    assert load_metric("entity_f1").compute(predictions=[["O"]], references=[["O"]])["entity_f1"] == 0
    macro = load_metric("macro_f1").compute(predictions=[0, 1, 1, 1], references=[0, 0, 1, 1])["macro_f1"]
    assert macro == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_answers_are_compared_as_squad_does():
    def squad(answer: str, *known: str) -> tuple[float, float]:
        found = load_metric("squad").compute(predictions=[answer], references=[list(known)])
        return found["exact_match"], found["f1"]

    assert squad("The  Nile!", "nile") == (1, 1)
    assert squad("the long river Nile", "Nile", "river Nile") == (0, pytest.approx(0.8))
    assert squad("dog dog", "dog") == (0, pytest.approx(2 / 3))
    assert squad("", "a dog") == (0, 0) and squad("") == (1, 1) and squad("dog") == (0, 0)


@pytest.mark.parametrize("family,head", [
    ("bert", "BertForTokenClassification"), ("roberta", "RobertaForTokenClassification"),
    ("distilbert", "DistilBertForTokenClassification"), ("bert", "BertForQuestionAnswering"),
    ("roberta", "RobertaForQuestionAnswering"), ("distilbert", "DistilBertForQuestionAnswering"),
])  # fmt: skip
def test_losses_read_the_tagged_tokens_or_the_span_alone(family, head):
    model, tags = build(family, head), "Token" in head
    objective = Objective(TAGS if tags else ANSWERS)
    torch.manual_seed(0)
    ids = torch.randint(5, 26, (3, 7))
    mask = torch.ones_like(ids)
    labels = torch.tensor([[-100, 1, -100, 0, 1, -100, -100]] * 3) if tags else torch.tensor([[2, 4]] * 3)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    out = forward(model, batch)
    loss = supervised_loss(objective, out, batch)
    if tags:
        each = torch.nn.functional.cross_entropy(
            out.logits[0, [1, 3, 4]].float(), torch.tensor([1, 0, 1]), reduction="none"
        )
        assert torch.isclose(loss[0], each.mean())
    else:
        ends = out.start_logits.float().log_softmax(1)[0, 2], out.end_logits.float().log_softmax(1)[0, 4]
        assert torch.isclose(loss[0], -sum(ends) / 2)
    assert distill_loss(objective, out, out, batch).abs().max() < 1e-6
    assert torch.equal(sensitivity(objective, out, batch, torch.Generator()), loss)
    pad = torch.nn.functional.pad
    longer = {"input_ids": pad(ids, (0, 4), value=1), "attention_mask": pad(mask, (0, 4)),
              "labels": pad(labels, (0, 4), value=-100) if tags else labels}  # fmt: skip
    padded = forward(model, longer)
    assert torch.allclose(supervised_loss(objective, padded, longer), loss, atol=1e-5)
    other = forward(build(family, head, seed=1), batch), forward(build(family, head, seed=1), longer)
    apart = distill_loss(objective, out, other[0], batch)
    assert apart.min() > 0 and torch.allclose(distill_loss(objective, padded, other[1], longer), apart, atol=1e-5)


class Fixed(torch.nn.Module):
    """Says what it was told, batch by batch."""

    def __init__(self, *outputs):
        super().__init__()
        self.weight, self.outputs = torch.nn.Parameter(torch.zeros(1)), list(outputs)

    def forward(self, **inputs):
        return self.outputs.pop(0)


def test_the_best_span_of_all_windows_is_the_answer(pieces):
    context = "the dog. " * 6 + "unhappy dogs. " + "the dog. " * 6
    data = asked([("dog", context, ["unhappy dogs"]), ("dog", "the dog", [])])
    recipe = Recipe(model="m", budget=0.5, max_length=24, batch_size=64)
    model = build("bert", "BertForQuestionAnswering")
    _, feed = make_feed(recipe, model, pieces, data)
    batch = next(iter(feed.held_out()))
    first, last = (torch.nn.functional.one_hot(side, batch["input_ids"].shape[1]).float() for side in batch["labels"].T)
    sure = type("Outputs", (), {"start_logits": 5 * first, "end_logits": 5 * last})
    found = evaluate_model(Fixed(sure), feed, feed.objective, console=Quiet(), what="")
    assert found == {"exact_match": 1, "f1": 1}
    sure.start_logits[:, 0] = 20.0  # "nowhere", everywhere
    found = evaluate_model(Fixed(sure), feed, feed.objective, console=Quiet(), what="")
    assert found == {"exact_match": 0.5, "f1": 0.5}


# --- models


def test_tags_take_the_numbers_that_a_trained_head_knows():
    def config(**names):
        return BertConfig(architectures=["BertForTokenClassification"], num_labels=3, **names)

    ids = {"O": 0, "I-A": 1, "B-A": 2}
    known = config(label2id=ids, id2label={i: label for label, i in ids.items()})
    named = match_labels(tagged([(["a", "b"], [1, 2])]), known, "m")
    assert list(named.train["tags"]) == [[2, 1]] and named.labels == ("O", "I-A", "B-A")
    numbered = match_labels(tagged([(["a", "b"], [1, 2])], ("0", "1", "2")), known, "m")
    assert numbered.labels == ("O", "I-A", "B-A") and numbered.metrics == ("accuracy", "entity_f1")
    with pytest.raises(BadData, match="trained for 3 outputs, the data have 2"):
        match_labels(tagged([(["a", "b"], [0, 1])], ("X", "Y")), known, "m")
    with pytest.raises(BadData, match="BertForSequenceClassification, whose head words with tags cannot train"):
        match_labels(tagged([(["a"], [0])]), BertConfig(architectures=["BertForSequenceClassification"]), "m")
    with pytest.raises(BadData, match="BertForTokenClassification, whose head questions with answers cannot train"):
        match_labels(asked([("a", "b", [])]), known, "m")


def test_models_that_transformers_or_ibprune_cannot_train_for_them():
    for family, objective in (("bart", ANSWERS), ("t5", TAGS)):
        with pytest.raises(UnsupportedModel, match="of the encoder-decoder"):
            model_class(TINY[family](), classify=True, objective=objective)
    llama = TINY["llama"]()
    for head, works in (("LlamaForCausalLM", False), ("LlamaModel", True), ("LlamaForQuestionAnswering", True)):
        llama.architectures = [head]
        if works:
            assert model_class(llama, classify=True, objective=ANSWERS).__name__ == "LlamaForQuestionAnswering"
        else:
            with pytest.raises(UnsupportedModel, match="cannot read the weights of a LlamaForCausalLM into its"):
                model_class(llama, classify=True, objective=ANSWERS)
    with pytest.raises(UnsupportedModel, match="no token classifier for model_type 'olmo2'"):
        model_class(TINY["olmo2"](), classify=True, objective=TAGS)


def test_one_word_of_each_text_is_asked_for_its_tag(pieces):
    words = ["the", "unhappy", "dogs"]
    rng = random.Random(0)
    rows = []
    for i in range(300):
        chosen = [rng.randrange(3) for _ in range(9)]
        rows.append(([words[c] for c in chosen], [3 if i == 0 and j == 0 else c for j, c in enumerate(chosen)]))
    found = encode_inputs(tagged(rows), pieces, max_length=32, most=250)
    assert found.columns.shape == (250,) and found.n == 250
    ids = torch.cat([torch.nn.functional.pad(b["input_ids"], (0, 32 - b["input_ids"].shape[1])) for b in found.batches])
    first = {10: 0, 4: 1, 7: 2}  # the, un, dog
    assert [first[int(ids[i, column])] for i, column in enumerate(found.columns)] == found.labels
    assert min(np.bincount(found.labels, minlength=3)) > 60


# --- whole runs


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer) -> str:
    """An encoder without a head."""
    folder = tmp_path_factory.mktemp("dense")
    build("bert", "BertModel", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("data,auto,metrics", [
    ("sentences", "AutoModelForTokenClassification", {"accuracy", "entity_f1"}),
    ("questions", "AutoModelForQuestionAnswering", {"exact_match", "f1"}),
])  # fmt: skip
def test_the_main_job(data, auto, metrics, dense, request, tmp_path):
    out = tmp_path / "out"
    steps = dict(finetune_steps=100, mask_steps=20, recover_steps=40, batch_size=16, lr=3e-3, max_length=32)
    result = ibprune.prune(dense, 0.6, data=request.getfixturevalue(data), output=str(out), **steps)
    report = result.report
    assert report["budget"]["achieved"] <= report["budget"]["limit"] and report["verify"]["max_abs_diff"] <= 1e-5
    assert "at least 200" in report["audit_note"] and report["audit"] is None
    for side in ("dense", "pruned"):
        assert set(report[side]["metrics"]) == metrics and min(report[side]["metrics"].values()) > 0.7
    names = ["B-THING", "I-THING", "O"] if data == "sentences" else ["start", "end"]
    assert json.loads((out / "config.json").read_text())["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert auto in (out / "README.md").read_text()
    again = ibprune.load(out)
    ids = torch.randint(5, 26, (2, 7))
    assert torch.allclose(again(ids)[0], result.model(ids)[0], atol=1e-5)


def test_a_trained_tagger_is_pruned_with_its_own_numbers_and_audited(tokenizer, tmp_path, capsys):
    rng = random.Random(1)
    data = write(tmp_path, [sentence(rng) for _ in range(80)], [sentence(rng) for _ in range(260)])
    config = TINY["distilbert"]()
    config.id2label = {0: "O", 1: "B-THING", 2: "I-THING", 3: "B-OTHER"}
    config.label2id = {label: i for i, label in config.id2label.items()}
    config.architectures = ["DistilBertForTokenClassification"]
    folder = tmp_path / "dense"
    torch.manual_seed(0)
    model_class(config, classify=False)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trained, out = str(tmp_path / "trained"), str(tmp_path / "out")
    flags = ["--model", str(folder), "--data", data, "--batch-size", "16", "--quiet", "--json"]
    assert cli.main(["train", *flags, "--output", trained, "--finetune-steps", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == TAGS and set(found["metrics"]["after"]) == {"accuracy", "entity_f1"}
    flags[1] = trained
    steps = ["--mask-steps", "0", "--recover-steps", "0", "--score", "fisher", "--no-audit", "--budget", "0.6"]
    assert cli.main([*flags, *steps, "--output", out]) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == config.label2id
    audit = ibprune.audit(trained, out, data=data, layers=("transformer.layer.2",))
    layer = audit["layers"][0]
    assert audit["labels"]["n_classes"] == 3 and layer["pooling"] == "token"
    assert layer["V_LY"]["before"]["value"] is not None
    for flag in (["--tokens", "5"], ["--pooling", "mean"]):
        assert cli.main(["audit", trained, out, "--data", data, *flag]) == 2
        assert flag[0] in capsys.readouterr().err


def test_roberta_finds_answers_too(tokenizer, questions, tmp_path):
    folder = tmp_path / "dense"
    build("roberta", "RobertaForQuestionAnswering", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    result = ibprune.prune(folder, 0.5, data=questions, output=str(out), score="magnitude", shares="equal", **SHORT)
    assert result.report["objective"] == ANSWERS and result.report["pruned"]["metrics"].keys() == {"exact_match", "f1"}


def test_nothing_is_written_for_what_does_not_fit(
    dense, folders, sentences, questions, stories, tokenizer, tmp_path, capsys
):
    def refused(model: str, data: str, *flags: str) -> str:
        out = tmp_path / "out"
        where = ["--model", model, "--data", data, "--output", str(out), "--budget", "0.5", "--quiet"]
        assert cli.main([*where, *flags]) == 2
        assert not out.exists()
        message = capsys.readouterr().err.strip().splitlines()
        assert len(message) == 1
        return message[0]

    assert "'vocab' is cut in sequence classifiers" in refused(dense, sentences, "--kinds", "ffn,vocab")
    assert "cannot train" in refused(folders["BertForSequenceClassification"], sentences)
    assert "at least 24" in refused(dense, questions, "--max-length", "16")
    assert "of the encoder-decoder 'bart'" in refused(folders["BartForConditionalGeneration"], questions)
    tagger = tmp_path / "tagger"
    build("bert", "BertForTokenClassification", dtype=torch.float32).save_pretrained(tagger)
    tokenizer.save_pretrained(tagger)
    assert "BertForTokenClassification needs words with tags" in refused(str(tagger), stories)


def test_a_slow_tokenizer_is_refused(sentences, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    from transformers.tokenization_python import PythonBackend

    class Slow(PythonBackend):
        is_fast = False

    with pytest.raises(BadRecipe, match="expected a fast tokenizer.*found Slow"):
        make_feed(
            Recipe(model="m", budget=0.5), build("bert", "BertForTokenClassification"), Slow.__new__(Slow),
            load_data(sentences),
        )  # fmt: skip
