"""Held-out rows that the training data hold too: what is measured on them is not what the model can do."""

from datasets import Dataset

from ibprune.annotations import as_text
from ibprune.data import TextData
from ibprune.images import IMAGE, ImageData, stored_digest, stored_size

COMPARABLE = 500_000  # training rows that are looked through


def held_out_overlap(data: TextData | ImageData) -> int | None:
    """How many held-out rows also occur in the training rows; None where these are too many to look, or a stream.

    Texts are the same but for white space, in all their columns; pictures if they are stored as the same bytes.
    """
    if not is_comparable(data):
        return None
    if isinstance(data, TextData):
        known = set(text_keys(data.train, data.text_columns))
        return sum(key in known for key in text_keys(data.held_out, data.text_columns))
    images = list(data.held_out[IMAGE])
    sizes = {stored_size(image) for image in images}
    known = {stored_digest(image) for image in data.train[IMAGE] if stored_size(image) in sizes}
    return sum(stored_digest(image) in known for image in images)


def is_comparable(data: TextData | ImageData) -> bool:
    """Whether all training rows can be looked through."""
    return len(data.train) <= COMPARABLE and not (isinstance(data, TextData) and data.stream)


def text_keys(rows: Dataset, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The texts of each row with single spaces between their words."""
    return list(zip(*([" ".join(as_text(text).split()) for text in rows[column]] for column in columns)))
