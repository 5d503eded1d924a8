"""Turns STS-B and MRPC as published into the labelled files that `--data` takes, under runs/data/.

    python scripts/pair_tasks.py ../shared/data

writes `runs/data/stsb` and `runs/data/mrpc`, each with train.tsv, dev.tsv and test.tsv of the columns sentence1,
sentence2 and label. STS-B comes as sts-{train,dev,test}.orig.tsv without a header (genre, file, year, id, score and the
two sentences, then sometimes sources). MRPC comes as msr_paraphrase_{train,test}.txt, with a header, without a dev
split: 408 rows are drawn from the training rows. Quotes are text in both.
"""

import argparse
import csv
import random
from pathlib import Path

MRPC_DEV = 408  # as many as in GLUE


def read_rows(path: Path, columns: tuple[int, int, int], encoding: str = "utf-8") -> list[tuple[str, ...]]:
    """(sentence1, sentence2, label) of every line, taken from the given columns."""
    with open(path, encoding=encoding, newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    short = next((i for i, line in enumerate(lines, 1) if len(line) <= max(columns)), None)
    if short is not None:
        raise SystemExit(f"{path}: expected {max(columns) + 1} columns or more, found {len(lines[short - 1])} "
                         f"in line {short}.")  # fmt: skip
    return [tuple(line[column] for column in columns) for line in lines]


def write_splits(folder: Path, splits: dict[str, list[tuple[str, ...]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join("\t".join(row) + "\n" for row in [("sentence1", "sentence2", "label"), *rows])
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
        print(f"{folder / name}.tsv: {len(rows):,} rows")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder with stsb/ and mrpc/ as published")
    parser.add_argument("--output", type=Path, default=Path("runs/data"))
    arguments = parser.parse_args(argv)
    stsb, mrpc = arguments.source / "stsb", arguments.source / "mrpc"
    splits = {name: read_rows(stsb / f"sts-{name}.orig.tsv", (5, 6, 4)) for name in ("train", "dev", "test")}
    write_splits(arguments.output / "stsb", splits)
    files = [mrpc / f"msr_paraphrase_{name}.txt" for name in ("train", "test")]
    train, test = (read_rows(file, (3, 4, 0), "utf-8-sig")[1:] for file in files)
    random.Random(0).shuffle(train)
    write_splits(arguments.output / "mrpc", {"train": train[MRPC_DEV:], "dev": train[:MRPC_DEV], "test": test})


if __name__ == "__main__":
    main()
