"""Image data: every source gives the same rows, what is augmented and normalised, and errors that say what to do."""

import numpy as np
import pytest
import torch
from cnn_models import pictures, save_pictures
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import ResNetConfig
from transformers.models.convnext import ConvNextImageProcessorPil

from ibprune.collating import make_loader
from ibprune.errors import BadData
from ibprune.images import CollatePictures, load_images, make_processor, resize_
from ibprune.labels import match_labels
from ibprune.models import load_processor

NAMES = ("down", "up")


@pytest.fixture
def folder(tmp_path):
    save_pictures(tmp_path / "data" / "train", *pictures(40), NAMES)
    save_pictures(tmp_path / "data" / "val", *pictures(8, seed=1), NAMES)
    return tmp_path / "data"


def arrays_of(rows) -> np.ndarray:
    return np.stack([np.asarray(image) for image in rows.cast_column("image", Image())["image"]])


def test_a_folder_an_npz_and_a_table_give_the_same_rows(folder, tmp_path):
    (x, y), (held_x, held_y) = pictures(40), pictures(8, seed=1)
    np.savez(tmp_path / "a.npz", X_train=x, y_train=y, X_test=held_x, y_test=held_y[:, None])
    np.savez(
        tmp_path / "b.npz", x_train=x.transpose(0, 3, 1, 2), y_train=y, x_val=held_x, y_val=held_y, x_test=x, y_test=y
    )
    (tmp_path / "table").mkdir()
    features = Features({"label": ClassLabel(names=list(NAMES)), "id": Value("int64"), "img": Image()})
    for split, (images, labels) in (("train", (x, y)), ("test", (held_x, held_y))):
        columns = {"label": labels, "id": labels, "img": [Picture.fromarray(image) for image in images]}
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "table" / f"{split}.parquet")
    for source in (folder, tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "table"):
        data = load_images(str(source))
        assert data.labels == (("0", "1") if source.suffix else NAMES) and data.metrics == ("accuracy",)
        assert sorted(data.train["label"]) == sorted(y) and sorted(data.held_out["label"]) == sorted(held_y)
        order = np.argsort(y, kind="stable") if source == folder else slice(None)
        assert (arrays_of(data.train) == x[order]).all()


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_without_a_split_rows_are_held_out_by_the_seed(name, tmp_path):
    x, y = pictures(100, shape=(8, 8))
    source = tmp_path / ("a.npz" if name == "npz" else "plain")
    if name == "npz":
        np.savez(source, x=x, y=y + 3)
    else:
        save_pictures(source, x, y, NAMES)
    first, again, other = (load_images(str(source), seed=seed) for seed in (0, 0, 1))
    assert len(first.train) == 80 and len(first.held_out) == 20
    assert first.held_out["image"] == again.held_out["image"] != other.held_out["image"]
    assert set(first.train["label"]) == {0, 1} and first.labels == (("3", "4") if name == "npz" else NAMES)


def test_classes_take_the_numbers_that_a_trained_head_knows(folder):
    names = {"label2id": {"up": 0, "down": 1}, "id2label": {0: "up", 1: "down"}}
    config = ResNetConfig(architectures=["ResNetForImageClassification"], **names)
    data = load_images(str(folder))
    matched = match_labels(data, config, "m")
    assert matched.labels == ("up", "down") and matched.train["label"][0] == 1 - data.train["label"][0]
    three = ResNetConfig(architectures=["ResNetForImageClassification"], num_labels=3)
    with pytest.raises(BadData, match=r"trained for 3 outputs, the data have 2 labels \(down, up\)"):
        match_labels(data, three, "m")


@pytest.mark.parametrize("channels", [1, 3])
def test_without_a_processor_training_pictures_have_mean_0_and_deviation_1(channels, folder, tmp_path):
    data = load_images(str(folder))
    processor = make_processor(data, channels)
    collate = CollatePictures(processor, data, channels)
    x = collate(data.train.to_list())["pixel_values"]
    assert x.shape == (40, channels, 16, 16) and x.dtype == torch.float32
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    processor.save_pretrained(tmp_path / "saved")
    loaded = load_processor(str(tmp_path / "saved"))
    assert torch.equal(CollatePictures(loaded, data, channels)(data.train.to_list())["pixel_values"], x)
    small = make_processor(data, channels, 8)
    assert CollatePictures(small, data, channels)(data.train.to_list())["pixel_values"].shape[2:] == (8, 8)


def test_the_processor_of_the_model_decides_and_can_be_resized(folder, tmp_path):
    assert load_processor(str(tmp_path)) is None
    ConvNextImageProcessorPil(size={"shortest_edge": 24}).save_pretrained(tmp_path)
    processor, data = load_processor(str(tmp_path)), load_images(str(folder))
    assert CollatePictures(processor, data, 3)([data.train[0]])["pixel_values"].shape == (1, 3, 24, 24)
    resize_(processor, 10)
    assert CollatePictures(processor, data, 3)([data.train[0]])["pixel_values"].shape == (1, 3, 10, 10)
    with pytest.raises(BadData, match="cannot make one batch"):
        CollatePictures(processor, data, 1)([data.train[0]])
    with pytest.raises(BadData, match="one or three channels, found 4"):
        CollatePictures(processor, data, 4)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadData, match="could not read the image processor"):
        load_processor(str(tmp_path))


def test_augmentation_mirrors_half_and_shifts_by_an_eighth_and_judging_does_neither(folder):
    data = load_images(str(folder))
    processor, rows = make_processor(data, 3), data.train.to_list()
    plain = CollatePictures(processor, data, 3)(rows)["pixel_values"]
    flipped = CollatePictures(processor, data, 3, augment=("flip",), seed=1)(rows)["pixel_values"]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, plain)]
    assert 10 < sum(mirrored) < 30
    assert all(mirror or torch.equal(a, b) for mirror, a, b in zip(mirrored, flipped, plain))
    shifts = set()
    cropped = CollatePictures(processor, data, 3, augment=("crop",), seed=1)(rows)["pixel_values"]
    for a, b in zip(cropped, plain):
        inside = b[:, 2:-2, 2:-2]
        found = [(i, j) for i in range(5) for j in range(5) if torch.equal(a[:, i : i + 12, j : j + 12], inside)]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 10 and {i for i, _ in shifts} == {j for _, j in shifts} == set(range(5))
    both = CollatePictures(processor, data, 3, augment=("flip", "crop"))
    assert torch.equal(both.judging()(rows)["pixel_values"], plain)
    assert not torch.equal(both(rows)["pixel_values"], both(rows)["pixel_values"])


def test_batches_are_shuffled_by_the_seed(folder):
    data = load_images(str(folder))
    collate = CollatePictures(make_processor(data, 3), data, 3)
    x = [
        torch.cat([b["pixel_values"] for b in make_loader(data.train, collate, batch_size=8, seed=s)])
        for s in (0, 0, 1)
    ]
    assert torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2])
    assert torch.equal(x[0].sum((1, 2, 3)).sort().values, x[2].sum((1, 2, 3)).sort().values)


@pytest.mark.parametrize(
    "arrays,reason",
    [
        ({"a": np.zeros(3)}, "expected arrays x_train and y_train, .*found a"),
        ({"x": np.zeros((30, 8, 8)), "y": np.zeros(30, int)}, "uint8 pictures .* found float64"),
        ({"x": np.zeros((30, 8, 8), np.uint8), "y": np.zeros(29, int)}, r"labels \(29,\)|int64 \(29,\)"),
        ({"x": np.zeros((30, 8, 8, 5), np.uint8), "y": np.zeros(30, int)}, "one or three channels"),
        ({"x": np.zeros((30, 8, 8), np.uint8), "y": np.zeros(30)}, "whole numbers as labels"),
        ({"x": np.zeros((30, 8, 8), np.uint8), "y": np.zeros(30, int)}, "at least two classes"),
        ({"x": np.zeros((9, 8, 8), np.uint8), "y": np.arange(9)}, "at least 20 rows"),
        ({"x": np.zeros((30, 8, 8), np.uint8), "y": np.full(30, 2**63, np.uint64)}, "64 bits hold with a sign"),
        ({"x": np.array([{}]), "y": np.zeros(1, int)}, "could not read .* as npz: Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_cannot_be_used(arrays, reason, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadData, match=reason):
        load_images(str(tmp_path / "a.npz"))


def test_a_damaged_archive_of_arrays_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(
        path, x=np.random.default_rng(0).integers(0, 9, (40, 8, 8)).astype(np.uint8), y=np.arange(40) % 2
    )
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    for place in rng.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load_images(str(path))  # a flip may fall where nothing is read
        except BadData as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("gap", ["picture", "class", "class that is not known"])
def test_rows_of_a_table_without_a_picture_or_a_class_are_refused(gap, tmp_path):
    pictures = [Picture.new("RGB", (8, 8), (i, 0, 0)) for i in range(40)]
    codes = [i % 2 for i in range(40)]
    if gap == "picture":
        pictures[7] = None
    else:
        codes[7] = None if gap == "class" else -1
    kind = ClassLabel(names=["a", "b"]) if gap.endswith("known") else Value("int64")
    features = Features({"image": Image(), "label": kind})
    Dataset.from_dict({"image": pictures, "label": codes}, features=features).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(BadData, match=f"expected a {gap.split()[0]} in every row of .*, found 1 without: take them"):
        load_images(str(tmp_path / "rows.parquet"))


def test_folders_and_files_that_cannot_be_used(folder, tmp_path):
    def refused(match: str, source=folder):
        with pytest.raises(BadData, match=match):
            load_images(str(source))

    refused("found nothing", tmp_path / "none.npz")
    refused("found nothing at", "./none")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no")
    refused("as npz", tmp_path / "broken.npz")
    (folder / "val" / "left").mkdir()
    refused("has a class 'left' that '.*train' lacks")
    (folder / "val" / "left").rmdir()
    (folder / "train" / "left").mkdir()
    refused(r"expected pictures \(.*left', found none")
    (folder / "train" / "left").rmdir()
    (folder / "train" / "up" / "text.png").write_text("no picture")
    refused("could not read '.*text.png' as a picture")
    (folder / "train" / "up" / "text.png").unlink()
    whole = (folder / "train" / "up" / "0001.png").read_bytes()
    (folder / "train" / "up" / "0001.png").write_bytes(whole[: len(whole) // 2])
    data = load_images(str(folder))  # the header is whole
    with pytest.raises(BadData, match="could not read '.*0001.png' as a picture: .* Get it again, or take it out"):
        make_processor(data, 3)
    Picture.fromarray(np.zeros((16, 16), np.uint16)).save(folder / "train" / "up" / "0001.png")
    refused("its mode is I")  # which the header says, before anything is trained
    Picture.fromarray(np.zeros((20, 16), np.uint8)).save(folder / "train" / "up" / "0001.png")
    with pytest.raises(BadData, match="found 2 sizes, such as 16 x 16: give --image-size"):
        make_processor(load_images(str(folder)), 3)
    assert make_processor(load_images(str(folder)), 3, 12).size["height"] == 12
    one = tmp_path / "one"
    save_pictures(one, *pictures(4), ("same", "same"))
    refused("at least two classes in '.*one', found same", one)
    (tmp_path / "text.csv").write_text("text,label\n" + "x,1\ny,0\n" * 20)
    refused("expected a column of pictures in '.*text.csv', found text, label", tmp_path / "text.csv")
