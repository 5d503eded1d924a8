"""Image data: folders of classes, npz arrays and tables with pictures, as rows, and rows as batches of pixels."""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from PIL import ImageOps, UnidentifiedImageError
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.vit import ViTImageProcessorPil

from ibprune.data import (
    LABEL_COLUMNS,
    READERS,
    SPLITS,
    TextData,
    check_columns,
    data_name,
    find_splits,
    hold_out,
    number_classes,
)
from ibprune.errors import BadData, first_line

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Unlike texts, whose test labels are often hidden, images are judged on a test split where no other is.
IMAGE_SPLITS = {"train": SPLITS["train"], "held_out": (*SPLITS["held_out"], "val", "test")}
ARRAYS = {  # of an npz file, in lower case: (pictures, labels)
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("x", "y")),
    "held_out": (
        ("x_val", "y_val"),
        ("val_images", "val_labels"),
        ("x_test", "y_test"),
        ("test_images", "test_labels"),
    ),
}
IMAGE, LABEL = "image", "label"  # the columns of the rows
SMALL = 64  # pixels of a side up to which training pictures are padded by an eighth and cropped back
STATISTICS = 5000  # training pictures of which mean and deviation are taken
UNREADABLE = (OSError, ValueError, SyntaxError, Picture.DecompressionBombError)
_ROW = {IMAGE: Image(decode=False)}


@dataclass(frozen=True)
class ImageData:
    """Labelled pictures.

    Attributes:
        name: What the report calls it.
        train, held_out: Columns "image" (bytes or path, not decoded) and "label".
        sizes: The (width, height) that pictures have.
        labels: Class names.
        metrics: Names of the metrics the task is judged by.
        note: What the user must know about the rows, or "".
    """

    name: str
    train: Dataset
    held_out: Dataset
    sizes: frozenset[tuple[int, int]]
    labels: tuple[str, ...]
    label_column: str = LABEL
    metrics: tuple[str, ...] = ("accuracy",)
    note: str = ""


Data = TypeVar("Data", TextData, ImageData)


def load_images(source: str, *, label_column: str = "", seed: int = 0) -> ImageData:
    """Pictures with classes from a folder, an npz or parquet file, or the Hub.

    A folder has one sub-folder per class, or such folders in train/ and val/ (or validation/, test/). An
    npz file has uint8 arrays (N, H, W), (N, H, W, 3) or (N, 3, H, W) named as in `ARRAYS`, in either case.
    A data set has a column of pictures and one of classes. Without a held-out split, some of the training
    rows are held out by the seed (`ibprune.data.held_out_size`).

    Raises:
        BadData: Nothing there, pictures that cannot be read, or fewer than two classes.

    Example:
        >>> load_images("cats_and_dogs").labels  # doctest: +SKIP
        ('cat', 'dog')
    """
    path = Path(source)
    if path.suffix == ".npz":
        splits = _from_arrays(path)
    elif os.path.isdir(source) and not any(file.suffix in READERS for file in path.glob("train.*")):
        splits = _from_folders(path)
    else:
        splits = {
            split: _columns(rows, source, label_column) for split, rows in find_splits(source, IMAGE_SPLITS).items()
        }
    name = data_name(source)
    if not all(len(rows) for rows in splits.values()):
        raise BadData(f"expected pictures in every split of '{name}', found an empty one.")
    # The pictures of one array are of one size: looking at the first is enough.
    seen = [rows.select([0]) if path.suffix == ".npz" else rows for rows in splits.values()]
    sizes = frozenset(_size(image, name) for rows in seen for image in rows[IMAGE])
    splits = hold_out(splits, source, seed=seed)
    train, held_out, labels = number_classes(name, splits["train"], splits["held_out"], LABEL)
    if not labels:
        raise BadData(f"expected classes as labels of '{name}', found decimals.")
    return ImageData(name, train, held_out, sizes, labels)


def _from_folders(path: Path) -> dict[str, Dataset]:
    folders = _folders(path)
    named = {split: next((path / n for n in names if n in folders), None) for split, names in IMAGE_SPLITS.items()}
    if named["train"] is None:
        named = {"train": path}
    roots = {split: root for split, root in named.items() if root is not None}
    classes = _folders(roots["train"])
    if len(classes) < 2:
        raise BadData(
            f"expected a sub-folder of pictures for each of at least two classes in '{roots['train']}', found "
            f"{', '.join(classes) or 'none'}."
        )
    for root in roots.values():
        unknown = sorted(set(_folders(root)) - set(classes))
        if unknown:
            raise BadData(f"'{root}' has a class '{unknown[0]}' that '{roots['train']}' lacks.")
    features = Features(_ROW | {LABEL: ClassLabel(names=classes)})
    splits = {}
    for split, root in roots.items():
        files = [(file, i) for i, name in enumerate(classes) for file in _pictures(root / name)]
        images = [{"path": str(file), "bytes": None} for file, _ in files]
        splits[split] = Dataset.from_dict({IMAGE: images, LABEL: [i for _, i in files]}, features=features)
        empty = sorted(set(range(len(classes))) - {i for _, i in files})
        if split == "train" and empty:
            raise BadData(f"expected pictures ({', '.join(PICTURES)}) in '{root / classes[empty[0]]}', found none.")
    return splits


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _pictures(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES) if path.is_dir() else []


def _from_arrays(path: Path) -> dict[str, Dataset]:
    try:
        with np.load(path) as file:
            arrays = {key.lower(): file[key] for key in file.files}
    except FileNotFoundError as error:
        raise BadData(f"expected an npz file at '{path}', found nothing.") from error
    except Exception as error:  # noqa: BLE001  zlib's, zipfile's and the tokenizer's own; of a npy file TypeError
        raise BadData(f"could not read '{path}' as npz: {first_line(error)}") from error
    splits = {}
    for split, names in ARRAYS.items():
        keys = next((keys for keys in names if set(keys) <= set(arrays)), None)
        if keys:
            splits[split] = _from_pair(*(arrays[key] for key in keys), f"'{keys[0]}' and '{keys[1]}' of '{path}'")
    if "train" not in splits:
        expected = ", ".join(" and ".join(keys) for keys in ARRAYS["train"])
        raise BadData(f"expected arrays {expected} in '{path}', found {', '.join(arrays) or 'none'}.")
    return splits


def _from_pair(images: np.ndarray, labels: np.ndarray, what: str) -> Dataset:
    """Rows of arrays (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W) and labels (N,) or (N, 1)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.ndim != 1 or len(labels) != len(images):
        raise BadData(
            f"expected {what} to be uint8 pictures (N, H, W[, 3]) or (N, 3, H, W) and labels (N,), found "
            f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}."
        )
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        raise BadData(f"expected one or three channels in {what}, found {images.shape}.")
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if not np.issubdtype(labels.dtype, np.integer):
        raise BadData(f"expected whole numbers as labels in {what}, found {labels.dtype}.")
    magic = b"P5" if images.ndim == 3 else b"P6"  # the files of netpbm: a line of sizes, then the bytes as they are
    head = b"%s %d %d 255\n" % (magic, images.shape[2], images.shape[1])
    if len(labels) and int(labels.max()) > np.iinfo(np.int64).max:
        raise BadData(f"expected labels that 64 bits hold with a sign in {what}, found {labels.max()}.")
    rows = {IMAGE: [{"bytes": head + image.tobytes(), "path": None} for image in images], LABEL: labels.tolist()}
    return Dataset.from_dict(rows, features=Features(_ROW | {LABEL: Value("int64")}))


def _columns(rows: Dataset, source: str, label: str) -> Dataset:
    """The columns of pictures and labels of a table, under our names."""
    image = next((key for key, feature in rows.features.items() if isinstance(feature, Image)), None)
    if image is None:
        raise BadData(f"expected a column of pictures in '{source}', found {', '.join(rows.column_names)}.")
    classes = [key for key, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    label = label or next(iter([*(c for c in classes if c in LABEL_COLUMNS), *classes]), "")
    label = label or next((column for column in LABEL_COLUMNS if column in rows.column_names), "")
    if not label:
        raise BadData(
            f"expected a column of classes in '{source}', found {', '.join(rows.column_names)}: name it with "
            "--label-column."
        )
    check_columns((label,), rows.column_names, source)
    unknown = -1 if label in classes else None  # what datasets calls a class that is not known
    rows = rows.select_columns([image, label]).rename_columns({image: IMAGE, label: LABEL})
    rows = rows.cast_column(IMAGE, _ROW[IMAGE])
    codes = list(rows[LABEL])
    pictures = sum(part[IMAGE].null_count for part in rows.with_format("arrow").iter(1000))  # whose bytes are not read
    for what, empty in (("picture", pictures), ("class", sum(code is None or code == unknown for code in codes))):
        if empty:
            raise BadData(f"expected a {what} in every row of '{source}', found {empty:,} without: take them out.")
    return rows


def stored_size(image: Mapping) -> int:
    """Bytes of a picture as it is stored; a file is not read."""
    return os.stat(image["path"]).st_size if image["bytes"] is None else len(image["bytes"])


def stored_digest(image: Mapping) -> str:
    """SHA-256 of a picture as it is stored: equal for equal files, or equal pixels of an array."""
    stored = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    return hashlib.sha256(stored).hexdigest()


def _open(image: Mapping, name: str) -> Picture.Image:
    """A picture whose header has been read; its pixels follow when they are asked for."""
    try:
        picture = Picture.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
        if picture.mode[0] in "IF":
            picture.close()
            raise ValueError(f"its mode is {picture.mode}; 8 bits a channel are expected.")
        return picture
    except UnidentifiedImageError as error:
        raise BadData(f"could not read {_label(image, name)} as a picture: its format is not known.") from error
    except (*UNREADABLE, TypeError) as error:
        raise BadData(f"could not read {_label(image, name)} as a picture: {first_line(error)}") from error


def _size(image: Mapping, name: str) -> tuple[int, int]:
    with _open(image, name) as picture:  # which keeps a file open until its pixels are read
        return picture.size


def _label(image: Mapping, name: str) -> str:
    return f"'{image['path']}'" if image.get("path") else f"a row of '{name}'"


def _decode(image: Mapping, mode: str, name: str) -> Picture.Image:
    with _open(image, name) as picture:
        try:
            return ImageOps.exif_transpose(picture).convert(mode)
        except UNREADABLE as error:
            raise BadData(
                f"could not read {_label(image, name)} as a picture: {first_line(error).rstrip('.')}. Get it again, or "
                "take it out."
            ) from error


def picture_mode(channels: int) -> str:
    """How PIL calls pictures of so many channels.

    Raises:
        BadData: Neither one nor three.
    """
    if channels not in (1, 3):
        raise BadData(f"expected a model that reads one or three channels, found {channels}.")
    return "L" if channels == 1 else "RGB"


def make_processor(data: ImageData, channels: int, size: int | None = None) -> BaseImageProcessor:
    """A processor that brings pictures to one size, and to mean 0 and deviation 1 on the training pictures.

    Args:
        size: Of a side in pixels; default: that of the pictures, where they are all of one.

    Raises:
        BadData: Pictures of several sizes and no size given.
    """
    sizes = {(size, size)} if size else data.sizes
    if len(sizes) > 1:
        width, height = min(sizes)
        raise BadData(
            f"expected pictures of one size in '{data.name}', because the model brings no image processor, found "
            f"{len(sizes)} sizes, such as {width} x {height}: give --image-size."
        )
    ((width, height),) = sizes
    mean, std = _statistics(data, channels, (width, height))
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=mean, image_std=std)


def resize_(processor: BaseImageProcessor, size: int) -> None:
    """Makes a processor give pictures of another side length."""
    for name in ("size", "crop_size"):
        old = getattr(processor, name, None)
        if old:
            setattr(processor, name, type(old)(**{key: size for key in dict(old)}))


def _statistics(data: ImageData, channels: int, size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over evenly spaced training pictures, of values in [0, 1]."""
    n = len(data.train)
    chosen = data.train.select([i * n // min(n, STATISTICS) for i in range(min(n, STATISTICS))])
    total, squares = np.zeros(channels), np.zeros(channels)
    for image in chosen[IMAGE]:
        picture = _decode(image, picture_mode(channels), data.name).resize(size, Picture.Resampling.BILINEAR)
        values = np.asarray(picture, dtype=np.float64).reshape(-1, channels) / 255
        total, squares = total + values.mean(0), squares + np.square(values).mean(0)
    mean = total / len(chosen)
    std = np.sqrt(np.maximum(squares / len(chosen) - mean**2, 1e-6))
    return [round(float(x), 6) for x in mean], [round(float(x), 6) for x in std]


class CollatePictures:
    """Decodes rows into one batch of pixels, (batch, channels, height, width), augmented on the way.

    "flip" mirrors half of the pictures left to right. "crop" shifts those with a side of at most `SMALL`
    pixels by up to an eighth of it each way, black where nothing is. Decoding here keeps large data off
    the memory.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        data: ImageData,
        channels: int,
        *,
        augment: Iterable[str] = (),
        seed: int = 0,
    ):
        self.processor, self.data, self.mode = processor, data, picture_mode(channels)
        self.augment = tuple(augment)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pictures = [_decode(row[IMAGE], self.mode, self.data.name) for row in rows]
        if self.augment:
            pictures = [self._changed(picture) for picture in pictures]
        labels = torch.tensor([row[self.data.label_column] for row in rows])
        return {"pixel_values": pixels(self.processor, pictures, self.data.name), "labels": labels}

    def _changed(self, picture: Picture.Image) -> Picture.Image:
        flip, across, down = torch.rand(3, generator=self.generator).tolist()
        width, height = picture.size
        if "flip" in self.augment and flip < 0.5:
            picture = ImageOps.mirror(picture)
        if "crop" in self.augment and min(width, height) <= SMALL:
            x, y = (int(u * (2 * (side // 8) + 1)) - side // 8 for u, side in ((across, width), (down, height)))
            picture = picture.crop((x, y, x + width, y + height))  # PIL fills what lies outside with 0
        return picture

    def judging(self) -> "CollatePictures":
        """The same without augmentation."""
        return CollatePictures(self.processor, self.data, len(self.mode))


def blank_shape(processor: BaseImageProcessor, channels: int) -> tuple[int, int, int]:
    """The shape of what a processor makes of a square picture, (channels, height, width)."""
    blank = Picture.new(picture_mode(channels), (256, 256))
    return tuple(pixels(processor, [blank], "a blank picture").shape[1:])


def pixels(processor: BaseImageProcessor, pictures: list[Picture.Image], name: str) -> torch.Tensor:
    """What a model reads of some pictures, (batch, channels, height, width), float32.

    Raises:
        BadData: The processor cannot take them, or gives several sizes.
    """
    try:
        return processor(pictures, return_tensors="pt")["pixel_values"].float()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadData(
            f"the model's image processor cannot make one batch of the pictures of '{name}': {first_line(error)}"
        ) from error


def input_shape(
    config: PreTrainedConfig, processor: BaseImageProcessor | None, size: int | None
) -> tuple[int, int, int]:
    """What a CNN reads of one picture, (channels, height, width), as far as processor and config tell."""
    if processor is not None:
        if size:
            resize_(processor, size)
        return blank_shape(processor, config.num_channels)
    size = size or getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return config.num_channels, height, width
