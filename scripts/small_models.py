"""Writes a GPT-2 and a ViT small enough for two cores, not yet trained, and the splits they are trained and judged on.

    python scripts/small_models.py ../shared/data
    ibprune train --model runs/gpt2-untrained --data runs/data/stories --max-length 64 --batch-size 16 --lr 1e-3 \\
        --finetune-steps 3000 --output runs/gpt2-stories
    ibprune train --model runs/vit-untrained --data runs/data/cifar10/train.npz --batch-size 64 --lr 1e-3 \\
        --finetune-steps 3000 --output runs/vit-cifar10

writes `runs/gpt2-untrained` (the tokenizer of stories260K), `runs/vit-untrained`, `runs/data/stories` with train.txt,
dev.txt and test.txt, and `runs/data/cifar10` with train.npz (its last 1,000 training images are its held-out split) and
test.npz (the 1,000 test images, in both of its splits).
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, GPT2Config, ViTConfig

END = "<|endoftext|>"
STORIES = {"dev": 200, "test": 200}  # the others are trained on
HELD_OUT = 1000


def write_stories(shared: Path, output: Path) -> None:
    """The stories in an order of chance, so that the splits are of one kind."""
    stories = [s.strip() for s in (shared / "tinystories/tinystories_sample.txt").read_text("utf-8").split(END)]
    stories = [story for story in stories if story]
    random.Random(0).shuffle(stories)
    folder = output / "data/stories"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (STORIES | {"train": len(stories) - sum(STORIES.values())}).items():
        rows, stories = stories[:count], stories[count:]
        (folder / f"{name}.txt").write_text(f"\n{END}\n".join(rows) + "\n", "utf-8")
        print(f"{folder / name}.txt: {len(rows):,} stories")


def read_images(shared: Path, names: list[str]) -> np.ndarray:
    """(N, 32, 32, 3) uint8 of pictures whose rows are images."""
    return np.concatenate([np.asarray(Image.open(shared / name)).reshape(-1, 32, 32, 3) for name in names])


def write_images(shared: Path, output: Path) -> None:
    source = shared / "cifar10"
    labels = np.load(source / "labels_51000.npy")
    files = sorted(source.glob("*.png"), key=lambda file: int("".join(c for c in file.stem if c.isdigit())))
    images = read_images(source, [file.name for file in files])
    train, test = images[:-1000], images[-1000:]
    folder = output / "data/cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    classes = labels[: len(train)]
    np.savez(
        folder / "train.npz", x_train=train[:-HELD_OUT], y_train=classes[:-HELD_OUT],
        x_val=train[-HELD_OUT:], y_val=classes[-HELD_OUT:],
    )  # fmt: skip
    judged = labels[50000:51000]
    np.savez(folder / "test.npz", x_train=test, y_train=judged, x_val=test, y_val=judged)
    print(f"{folder}: {len(train) - HELD_OUT:,} images to train on, {HELD_OUT:,} held out, {len(test):,} to test on")


def write_models(shared: Path, output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    gpt2 = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=96,
        n_layer=4,
        n_head=6,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
    )
    vit = ViTConfig(
        image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=6, intermediate_size=384
    )
    for name, config in (("gpt2", gpt2), ("vit", vit)):
        config.save_pretrained(output / f"{name}-untrained")
    tokenizer.save_pretrained(output / "gpt2-untrained")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder with tinystories/, cifar10/ and models/stories260K/")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    arguments = parser.parse_args(argv)
    for write in (write_stories, write_images, write_models):
        write(arguments.source, arguments.output)


if __name__ == "__main__":
    main()
