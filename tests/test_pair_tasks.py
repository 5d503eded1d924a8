"""The script that lays out STS-B and MRPC: columns, quotes that are text, and a dev split where none is published."""

import runpy
from pathlib import Path

import pytest

from ibprune.data import load_data

SCRIPT = Path(__file__).parents[1] / "scripts" / "pair_tasks.py"


@pytest.fixture
def published(tmp_path) -> Path:
    (tmp_path / "stsb").mkdir()
    (tmp_path / "mrpc").mkdir()
    for name, score in (("train", "5.000"), ("dev", "2.400"), ("test", "0.000")):
        line = f'main\tMSRvid\t2012\t0001\t{score}\tA "man.\tA dog.'
        (tmp_path / "stsb" / f"sts-{name}.orig.tsv").write_text(f"{line}\n{line}\tsource\n")
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    for name, rows in (("train", 420), ("test", 3)):
        text = header + "".join(f"{i % 2}\t{i}\t{i}\tfirst {i}\tsecond {i}\r\n" for i in range(rows))
        (tmp_path / "mrpc" / f"msr_paraphrase_{name}.txt").write_text(text, newline="")
    return tmp_path


def test_published_pairs_become_data(published, tmp_path):
    main = runpy.run_path(str(SCRIPT))["main"]
    main([str(published), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out/stsb/dev.tsv").read_text().splitlines()[1] == 'A "man.\tA dog.\t2.400'
    data = load_data(str(tmp_path / "out/mrpc"))
    assert (len(data.train), len(data.held_out)) == (12, 408)
    rows = [line.split("\t") for name in ("train", "dev") for line in (tmp_path / f"out/mrpc/{name}.tsv").open()]
    assert {row[0] for row in rows} == {"sentence1", *(f"first {i}" for i in range(420))}  # none lost, none twice
    assert all(row[0].split()[1] == row[1].split()[1] for row in rows if row[0] != "sentence1")
    (published / "stsb/sts-dev.orig.tsv").write_text("main\t1\t2\n")
    with pytest.raises(SystemExit, match="expected 7 columns or more, found 3 in line 1"):
        main([str(published), "--output", str(tmp_path / "out")])
