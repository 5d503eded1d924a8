"""Finished runs side by side: what their reports say, several budgets as several rows, anything else refused."""

import copy
import json
from pathlib import Path

import pytest

from ibprune import cli
from ibprune.checksums import OWN
from ibprune.contrast import contrast
from ibprune.errors import PlanMismatch

REPORT = json.loads((Path(__file__).parents[1] / "model_cards" / "minilm-0.3" / "report.json").read_text())


def write(folder: Path, report: dict = REPORT, **changes: object) -> Path:
    folder.mkdir(parents=True)
    changed = {key: value for key, value in (copy.deepcopy(report) | changes).items() if key != OWN}
    (folder / "report.json").write_text(json.dumps(changed))
    return folder


def test_runs_have_a_row_each_with_the_figures_of_their_reports(tmp_path, capsys):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", score="fisher")
    assert cli.main(["compare", str(one), str(two), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == contrast([one, two]) and found["notes"] == []
    first, second = found["runs"]
    assert first | {"folder": str(two), "score": "fisher"} == second
    for key in ("params", "macs", "file_bytes"):
        assert first[key] == [REPORT["dense"][key], REPORT["pruned"][key]]
    assert first["metrics"]["recall_at_1"] == [REPORT[side]["metrics"]["recall_at_1"] for side in ("dense", "pruned")]
    sides = [REPORT[side]["latency_ms"]["median"] for side in ("dense", "pruned")]
    assert first["latency_ratio"] == sides[1] / sides[0]
    assert cli.main(["compare", str(one), str(two)]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"{REPORT['pruned']['params']:,}" in shown and "fisher" in shown and "note:" not in shown


def test_several_budgets_are_several_rows_and_what_differs_is_said(tmp_path, capsys):
    for keep in ("0.5", "0.35"):
        write(tmp_path / "many" / keep, data="sst2", device="cuda:0")
    (tmp_path / "many" / "pareto.json").write_text("{}")
    module = {"schema": "ibprune.module_report/1", "model": "LeNet", "device": "cpu", "budget": REPORT["budget"]}
    module["settings"] = {"score": "vib", "seed": 1}
    for side in ("dense", "pruned"):
        module[side] = {key: REPORT[side][key] for key in ("params", "macs", "latency_ms")} | {"metrics": {}}
    net = write(tmp_path / "net", module)
    found = contrast([tmp_path / "many", net])
    assert [Path(run["folder"]).name for run in found["runs"]] == ["0.5", "0.35", "net"]
    assert found["runs"][2]["file_bytes"] is None and found["runs"][2]["seed"] == 1
    assert [note.split(":")[0] for note in found["notes"]][:2] == [
        "metrics are not to be compared", "latency ratios are not to be compared",
    ]  # fmt: skip
    assert cli.main(["compare", str(tmp_path / "many"), str(net)]) == 0
    assert "the devices differ (cpu, cuda:0)" in capsys.readouterr().out


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    good = write(tmp_path / "good")
    for name, changes, expected in (
        ("none", None, "with a report.json, found none in"),
        ("trained", {"schema": "ibprune.train_report/1"}, "found 'ibprune.train_report/1'"),
        ("short", {"dense": {}}, "'latency_ms'"),
    ):
        folder = tmp_path / name if changes is None else write(tmp_path / name, **changes)
        assert cli.main(["compare", str(good), str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("ibprune: error: ") and expected in line and str(folder) in line
    (good / "report.json").write_text("{")
    with pytest.raises(PlanMismatch, match="could not read"):
        contrast([good])
    assert cli.main(["compare"]) == 2
    assert "folders" in capsys.readouterr().err
