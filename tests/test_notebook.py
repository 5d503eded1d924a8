"""The notebook of the docs: its code runs from top to bottom, in an empty folder and without a network."""

import json
from pathlib import Path

import ibprune

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = json.loads(NOTEBOOK.read_text())
    assert found["nbformat"] == 4 and all(cell["cell_type"] in ("code", "markdown") for cell in found["cells"])
    namespace = {}
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None  # it is kept as it was written
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    said = capsys.readouterr().out
    assert "embedding_rank" in said and "0.9: " in said and "params: 22,713,216 -> " in said
    report = namespace["result"].report
    assert report["budget"]["achieved"] <= report["budget"]["limit"] == int(0.75 * 22_713_216)
    similar = namespace["similar"]
    assert similar[0, 1] > similar[0, 2]  # a cat is more of a kitten than of a share
    assert (tmp_path / "small" / "report.html").is_file() and ibprune.load("small").num_parameters() < 22_713_216
