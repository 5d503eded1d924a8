"""The script that compares scores: its paired statistics, its cells that are not run twice, its page."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_scores_are_compared_example_by_example(script):
    """Examples differ far more than scores do: only their pairs show that the second is better by 0.1 everywhere."""
    hard = [0.1 * i for i in range(60)]
    first = [{"nll": hard, "right": [i % 2 for i in range(60)], "agrees": [0] * 60}] * 2
    other = [{"nll": [x - d for x in hard], "right": [1] * 60, "agrees": [i % 3 == 0 for i in range(60)]}
             for d in (0.05, 0.15)]  # fmt: skip
    found = script["compare"](first, other)
    assert found["difference"] == pytest.approx(-0.1) and found["interval"] == pytest.approx([-0.1, -0.1])
    assert [seed["only_first"] for seed in found["mcnemar"]] == [0, 0]
    assert found["mcnemar"][0]["only_other"] == 30 and found["mcnemar"][0]["p"] == pytest.approx(2 * 0.5**30)
    low, high = found["agreement_interval"]
    assert found["agreement"] == pytest.approx(1 / 3) and 0.15 < low < 1 / 3 < high < 0.5
    same = script["compare"](first, first)
    assert same["difference"] == 0 and same["mcnemar"][0]["p"] == 1


def test_an_interval_holds_the_mean_of_noise(script):
    noise = [(-1) ** i * (1 + i % 7) for i in range(400)]
    found = script["compare"](
        [{"nll": [0.0] * 400, "right": [], "agrees": []}], [{"nll": noise, "right": [], "agrees": []}]
    )
    low, high = found["interval"]
    assert low < 0 < high and found["mcnemar"] == []
    assert high - low == pytest.approx(2 * 1.96 * 20**0.5 / 20, rel=0.05)  # the mean square of 1 … 7 is 20


def test_seeds_that_hold_out_other_examples_are_drawn_apart(script):
    """The mean of two independent means, of 400 and of 100 examples, has the variance of both by four."""
    none = [{"nll": [0.0] * n, "right": [], "agrees": []} for n in (400, 100)]
    noisy = [{"nll": [1 + (-1) ** i for i in range(n)], "right": [], "agrees": []} for n in (400, 100)]
    found = script["compare"](none, noisy)
    low, high = found["interval"]
    assert found["difference"] == 1 and high - low == pytest.approx(
        2 * 1.96 * ((1 / 400 + 1 / 100) / 4) ** 0.5, rel=0.05
    )


def test_a_table_is_run_once_and_goes_on(script, folders, reviews, tmp_path, capsys):
    table = {
        "total_steps": 4,
        "mask_steps": 2,
        "recipe": {"batch_size": 16, "max_length": 16, "shares": "equal", "kinds": "heads,ffn", "scope": "blocks"},
        "rows": [{"name": "kind words", "model": folders["BertForSequenceClassification"], "data": reviews,
                  "test": f"{reviews}/dev.tsv", "budget": 0.6}],
        "scores": ["fisher", {"label": "gradual Fisher", "score": "gradual"}],
    }  # fmt: skip
    path = tmp_path / "words.yaml"
    path.write_text(yaml.safe_dump(table))
    script["main"]([str(path)])
    page = capsys.readouterr().out
    assert "| fisher | 0+4 |" in page and "| gradual Fisher | 2+2 |" in page
    assert (tmp_path / "words.md").read_text() in page and (tmp_path / "words.png").stat().st_size
    records = json.loads((tmp_path / "words.json").read_text())["records"]
    assert [record["compared_on"] for record in records] == ["test", "test"]
    assert records[0]["test"] == records[0]["dev"]  # here they are the same file
    assert 0 <= records[0]["agreement"][0] <= 1 and "as the dense model" in page
    assert records[0]["against_first"]["difference"] == 0 != records[1]["against_first"]["difference"]
    cells = sorted((tmp_path / "cells" / "words").iterdir())
    assert [cell.name for cell in cells] == ["kind_words__fisher__0.json", "kind_words__gradual_Fisher__0.json"]
    before = [cell.read_bytes() for cell in cells]
    cells[1].unlink()
    script["main"]([str(path)])
    assert "| gradual Fisher | 2+2 |" in capsys.readouterr().out
    again = [cell.read_bytes() for cell in cells]
    assert again[0] == before[0]  # with its seconds: not run again
    examples = [json.loads(found[1])["examples"] for found in (before, again)]
    assert examples[0] == examples[1]
    old = json.loads(cells[0].read_text())
    del old["examples"]["dev"]["agrees"]
    cells[0].write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="fisher__0.json is of an older version of this script"):
        script["main"]([str(path)])
    path.write_text(yaml.safe_dump(table | {"total_steps": 6}))
    with pytest.raises(SystemExit, match="was run with other settings"):
        script["main"]([str(path)])


@pytest.mark.parametrize("file", sorted(SCRIPT.parents[1].glob("benchmarks/*.yaml")), ids=lambda file: file.stem)
def test_every_table_of_the_repo_is_one(script, file):
    cells = script["read_table"](file)
    assert cells and all(cell.values["recover_steps"] >= 0 for cell in cells)
