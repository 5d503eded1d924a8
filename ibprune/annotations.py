"""Rows with annotations inside their text: words with tags, and questions with answers that stand in a context."""

import re
from collections.abc import Iterable, Mapping, Sequence

from datasets import Dataset, Features, LargeList, List, Value

from ibprune.errors import BadData
from ibprune.names import ANSWERS, TAGS

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "pos_tags", "tags", "labels")
ANSWER_COLUMNS = ("question", "context"), "answers"
STARTS = "starts"  # the column of where each answer begins
TEXT = ("string", "large_string", "string_view")


def find_annotations(
    features: Features, text: tuple[str, ...], label: str, source: str, *, plain: bool
) -> tuple[str, tuple[str, ...], str]:
    """What rows are for, `TAGS`, `ANSWERS` or "", and the columns with their text and annotation.

    Args:
        text, label: The columns that the user named, if any.
        plain: Whether there are columns of plain text, so that lists are not what the rows are about.

    Raises:
        BadData: Tags without words, words without tags, or answers without question and context.
    """
    (question, context), answers = ANSWER_COLUMNS
    if _holds_answers(features.get(label or answers)) and (label or not text):
        text = text or ((question, context) if {question, context} <= set(features) else ())
        if len(text) != 2:
            raise BadData(
                f"expected the columns '{question}' and '{context}' beside the answers in '{source}', found "
                f"{', '.join(features)}: name both with --text-columns, in this order."
            )
        return ANSWERS, text, label or answers
    named = [name for name in text[:1] if len(text) == 1 and _is_list(features[name])]
    words = named or [] if text else [name for name in WORD_COLUMNS if _is_list(features.get(name))]
    tags = [name for name in ((label,) if label else TAG_COLUMNS) if _is_list(features.get(name))]
    if words and tags:
        return TAGS, (words[0],), tags[0]
    if tags and (label or not (plain or text)):
        raise BadData(
            f"expected a column of words beside the tags '{tags[0]}' in '{source}' (lists called "
            f"{' or '.join(WORD_COLUMNS)}), found {', '.join(features)}: name it with --text-columns."
        )
    if named or (words and not plain):
        raise BadData(
            f"expected a column of tags beside the words '{words[0]}' in '{source}' (lists called "
            f"{', '.join(TAG_COLUMNS)}), found {', '.join(features)}: name it with --label-column."
        )
    return "", text, label


def check_tags(name: str, split: str, rows: Dataset, words: str, tags: str) -> tuple[Dataset, int]:
    """The rows that have words, and how many had none.

    Raises:
        BadData: Lists of other things, a row whose words and tags are not equally many, or nothing is left.
    """
    _check_columns(name, split, rows, (words, tags))
    for column, kinds in ((words, TEXT), (tags, (*TEXT, "int"))):
        feature = rows.features[column]
        kind = getattr(feature.feature, "dtype", "lists") if _is_list(feature) else "no lists"
        if not str(kind).removeprefix("u").startswith(kinds):
            wanted = "text" if column == words else "text or whole numbers"
            raise BadData(f"expected lists of {wanted} in '{column}' of '{name}', found {kind}.")
    kept = []
    for i, (texts, marks) in enumerate(zip(rows[words], rows[tags])):
        if len(texts or ()) != len(marks or ()):
            raise BadData(
                f"expected a tag for every word, found {len(texts or ())} words and {len(marks or ())} tags in "
                f"{split} row {i} of '{name}'."
            )
        if any(value is None for value in (*(texts or ()), *(marks or ()))):
            raise BadData(f"expected a tag for every word, found a gap in {split} row {i} of '{name}'.")
        if any(text.strip() for text in texts or ()):
            kept.append(i)
    if not kept:
        raise BadData(f"expected rows with words in '{name}', found none.")
    return rows.select_columns([words, tags]).select(kept), len(rows) - len(kept)


def tag_metrics(labels: Iterable[str]) -> tuple[str, ...]:
    """What tags are judged by: entities where the tags are of the BIO form, else the mean F1 of the classes.

    Example:
        >>> tag_metrics(["O", "B-PER", "I-PER"]), tag_metrics(["NOUN", "VERB"])
        (('accuracy', 'entity_f1'), ('accuracy', 'macro_f1'))
    """
    labels = list(labels)
    bio = all(re.fullmatch(r"O|[BI]-.+", label) for label in labels) and set(labels) != {"O"}
    return "accuracy", "entity_f1" if bio else "macro_f1"


def check_answers(name: str, split: str, rows: Dataset, text: tuple[str, ...], answers: str) -> tuple[Dataset, int]:
    """The rows with question and context, their answers as the columns "answers" and "starts", and how many had none.

    A row may have several answers, or none: then its question has no answer in the context.

    Raises:
        BadData: A column of another kind, an answer that does not stand where it should, or nothing is left.
    """
    _check_columns(name, split, rows, (*text, answers))
    for column in text:
        kind = getattr(rows.features[column], "dtype", "lists")
        if kind not in TEXT:
            raise BadData(f"expected text in '{column}' of '{name}', found {kind}.")
    if not _holds_answers(rows.features[answers]):
        raise BadData(f"expected 'text' and 'answer_start' in '{answers}' of '{name}', found neither.")
    kept, texts, starts = [], [], []
    for i, (question, context, value) in enumerate(zip(*(rows[column] for column in (*text, answers)))):
        if not (question or "").strip() or not (context or "").strip():
            continue
        found = _pairs(value, f"{split} row {i} of '{name}'")
        for answer, start in found:
            if start < 0 or context[start : start + len(answer)] != answer:
                stands = context[max(start, 0) : start + len(answer)] if start >= 0 else ""
                raise BadData(
                    f"expected the answer '{_short(answer)}' at character {start} of its context in {split} row {i} "
                    f"of '{name}', found '{_short(stands)}'."
                )
        kept.append(i)
        texts.append([answer for answer, _ in found])
        starts.append([start for _, start in found])
    if not kept:
        raise BadData(f"expected rows with a question and a context in '{name}', found none.")
    whole = rows.select_columns(list(text)).select(kept)
    whole = whole.add_column(ANSWER_COLUMNS[1], texts, feature=List(Value("string")))
    return whole.add_column(STARTS, starts, feature=List(Value("int64"))), len(rows) - len(kept)


def flatten_squad(rows: Dataset) -> Dataset:
    """The rows of a file in SQuAD's own nesting (data, paragraphs, qas) as question, context and answers."""
    found: dict[str, list] = {"question": [], "context": [], "answers": []}
    for article in (article for value in rows["data"] for article in value):
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                found["question"].append(question["question"])
                found["context"].append(paragraph["context"])
                found["answers"].append(
                    {key: [answer[key] for answer in question["answers"] or ()] for key in ("text", "answer_start")}
                )
    spans = {"text": List(Value("string")), "answer_start": List(Value("int64"))}
    return Dataset.from_dict(
        found, features=Features({"question": Value("string"), "context": Value("string"), "answers": spans})
    )


def is_squad(features: Features) -> bool:
    """Whether rows have SQuAD's own nesting."""
    articles = getattr(features.get("data"), "feature", None)
    return isinstance(articles, dict) and "paragraphs" in articles


def read_conll(text: str) -> Dataset:
    """Sentences of CoNLL's form: a word a line, its tag the last field, a blank line after each sentence.

    Lines before a sentence's first word that begin with "#" are comments, unless they have as many fields and tabs as
    words have.

    Raises:
        BadData: A line of a word without a tag, or words that are numbered, as in CoNLL-U.

    Example:
        >>> read_conll("# sent_id = 1\\nAda B-PER\\nran O\\n")[0]
        {'tokens': ['Ada', 'ran'], 'tags': ['B-PER', 'O']}
    """
    lines = [line.strip() for line in text.splitlines()]
    forms = {_form(line) for line in lines if len(line.split()) > 1 and line[0] != "#"}
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in enumerate(lines, 1):
        fields, (words, tags) = line.split(), sentences[-1]
        if not fields or fields[0] == "-DOCSTART-":
            sentences.append(([], []))
        elif not words and line[0] == "#" and forms and _form(line) not in forms:
            continue
        elif len(fields) == 1:
            raise BadData(f"expected a word and its tag in line {number}, found '{_short(fields[0])}'")
        else:
            words.append(fields[0])
            tags.append(fields[-1])
    whole = [sentence for sentence in sentences if sentence[0]]
    if whole and all(words == [str(1 + i) for i in range(len(words))] for words, _ in whole):
        raise BadData("expected a word in the first column and its tag in the last, found numbered words (CoNLL-U)")
    return Dataset.from_dict({"tokens": [words for words, _ in whole], "tags": [tags for _, tags in whole]})


def _form(line: str) -> tuple[int, int]:
    """How many fields and tabs a line has."""
    return len(line.split()), line.count("\t")


def as_text(value: str | Sequence[str] | None) -> str:
    """A text, or words joined by spaces."""
    return " ".join(value) if isinstance(value, list) else str(value or "")


def first_pieces(words: Sequence[str], offsets: Iterable[Sequence[int]]) -> list[int]:
    """For each token the index of the word that it begins, -1 for every other token.

    Args:
        words: Of a text that `as_text` joined.
        offsets: First and last character (exclusive) of each token; a token may bring the space before it.

    Example:
        >>> first_pieces(["un", "happy"], [(0, 0), (0, 2), (2, 5), (5, 8), (0, 0)])
        [-1, 0, 1, -1, -1]
    """
    word_at = [index for i, word in enumerate(words) for index in (*[i] * len(word), -1)]
    found, last = [], -1
    for start, end in offsets:
        word = next((index for index in word_at[start:end] if index >= 0), -1)
        found.append(word if word > last else -1)
        last = max(last, word)
    return found


def _is_list(feature) -> bool:
    return isinstance(feature, List | LargeList) and not isinstance(feature.feature, dict)


def _holds_answers(feature) -> bool:
    inner = feature.feature if isinstance(feature, List | LargeList) else feature
    return isinstance(inner, Mapping) and {"text", "answer_start"} <= set(inner)


def _check_columns(name: str, split: str, rows: Dataset, columns: Iterable[str]) -> None:
    for column in columns:
        if column not in rows.column_names:
            raise BadData(f"expected the column '{column}' in the {split} rows of '{name}', found none.")


def _pairs(value, where: str) -> list[tuple[str, int]]:
    """Text, without spaces around it, and start of each answer, whichever way they are nested; blank ones are none."""
    if isinstance(value, list):
        pairs = [(answer["text"], answer["answer_start"]) for answer in value]
    else:
        texts, starts = ((value or {}).get(key) for key in ("text", "answer_start"))
        texts, starts = (([] if v is None else v if isinstance(v, list) else [v]) for v in (texts, starts))
        if len(texts) != len(starts):
            raise BadData(f"expected a start for every answer, found {len(texts)} and {len(starts)} in {where}.")
        pairs = list(zip(texts, starts))
    if any(text and start is None for text, start in pairs):
        raise BadData(f"expected a start for every answer, found none in {where}.")
    return [
        (text.strip(), int(start) + len(text) - len(text.lstrip())) for text, start in pairs if (text or "").strip()
    ]


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "…"
