"""The report page: what a folder's JSON files say, drawn; self-contained, escaped, the same again."""

import copy
import dataclasses
import fnmatch
import json
import math
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ibprune
from ibprune import cli
from ibprune.budget import Budget
from ibprune.checksums import check_files, own_sum
from ibprune.curves import draw_descent, draw_ranked
from ibprune.decisions import PARTS, POINTS, make_path, rank_kinds
from ibprune.drawing import make_axis, make_chart, unit_map
from ibprune.groups import Group, MaskAt, Site
from ibprune.ladder import pareto
from ibprune.report import rows
from ibprune.report_page import page, pareto_page, write_page
from ibprune.statuses import layer_status

ROOT = Path(__file__).parents[1]
VOID = {"meta"}
PLACE = Site("0.ffn", Group("ffn", "ffn", (), MaskAt("in")), "0", (), MaskAt("in"), n_units=4)
NASTY = "<script>alert('1')</script>\"&"


class Page(HTMLParser):
    """Every element of a page with its attributes, the text, and whether tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]

    def labels(self) -> list[str]:
        return [svg["aria-label"] for svg in self.all("svg") if svg.get("role") == "img"]


def check(text: str) -> Page:
    """What holds of every page."""
    found = Page(text)
    assert text.startswith("<!doctype html>") and found.all("html") == [{"lang": "en"}]
    assert not found.all("script") and not found.all("img") and not found.all("link")
    assert "://" not in text and text.count("url(") == text.count("url(#gone)") == 1
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in found.all("svg") if "x" not in svg)
    ids = [attributes["id"] for _, attributes in found.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in found.found if "aria-labelledby" in a} <= set(ids)
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    return found


@pytest.fixture(scope="module")
def run(folders, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "small"
    quick = dict(score="magnitude", recover_steps=0, max_length=16, audit=False)
    ibprune.prune(folders["BertForSequenceClassification"], 0.5, data=reviews, output=folder, **quick)
    return folder


@pytest.fixture(scope="module")
def real():
    """Report and audit of a run of this project, of an older version, without its plan."""
    folder = ROOT / "model_cards" / "minilm-0.3"
    return [json.loads((folder / name).read_text()) for name in ("report.json", "audit.json")]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_a_run_leaves_its_page_with_every_figure_of_the_table(run):
    report, plan = read(run, "report.json"), read(run, "plan.json")
    text = (run / "report.html").read_text()
    found = check(text)
    for cells in rows(report):
        assert all(cell.strip() in found.text for cell in cells)
    assert f"{report['budget']['achieved']:,} of at most {report['budget']['limit']:,} params" in found.text
    assert report["command"] in found.text and report["versions"]["torch"] in found.text
    assert "Not audited: --no-audit" in found.text and "One run with seed 0" in found.text
    for name, units in plan[
        "keep"
    ].items():  # every place is in the drawing, but for sub-layers, which their units show
        said = [label for label in found.labels() if label.startswith(f"{name}: ")]
        if "." not in name:  # of the whole model: a kind of its own, or listed apart
            assert said
            continue
        assert len(said) == (not name.endswith("_sublayer")), name
        if name.endswith("heads"):
            whole = plan["keep"][name.replace("heads", "attention_sublayer")]
            assert f"{len(units) if whole else 0} of {plan['n_units'][name]} kept" in said[0]
    assert page(report, plan, None, read(run, "decision.json")) == text


def test_scores_are_drawn_with_their_cut_and_a_folder_without_them_has_none(run):
    report, plan, decision = (read(run, name) for name in ("report.json", "plan.json", "decision.json"))
    found = check((run / "report.html").read_text())
    assert decision["score"] == "magnitude" and decision["path"] is None  # nothing was learned
    assert "By the squared weights that go with a unit." in found.text and "mask learning" not in found.text
    kinds = {kind: told["kept"] / told["units"] for kind, told in decision["kinds"].items()}
    assert kinds.items() <= report["kept"].items() and len(kinds) >= 4
    for kind, told in decision["kinds"].items():
        cut = f", from {told['threshold']:.3g} up" if told["kept"] < told["units"] else ""
        (label,) = [label for label in found.labels() if label.startswith(f"{kind}: scores of its units, best first")]
        assert f"{told['kept']:,} of {told['units']:,} stay{cut}" in label
    older = check(page(report, plan, None))
    assert "How the units were chosen" not in older.text and "How the units were chosen" in found.text
    assert "How the units were chosen" not in page(report, plan, None, decision | {"schema": "ibprune.decision/0"})


def test_scores_are_kept_in_few_numbers_and_say_who_stays_across_the_cut():
    values = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    places = {name: dataclasses.replace(PLACE, name=name, n_units=500) for name in ("0.ffn", "1.ffn")}
    scores = dict(zip(places, values.split(500)))
    keep = {name: tuple((score >= 600).nonzero().flatten().tolist()) for name, score in scores.items()}
    found = rank_kinds(scores, keep, places)["ffn"]
    assert (found["units"], found["kept"], found["threshold"], found["beyond"]) == (1000, 400, 600.0, 0)
    assert len(found["scores"]) == len(found["stays"]) == PARTS and found["scores"][0] > 990
    assert found["stays"] == [1.0] * 102 + [0.5] + [0.0] * 153  # of parts with three or four units
    kept = sum(width for _, width, share in draw_ranked("ffn", found).runs if share == 1)
    assert kept == pytest.approx(100 * 102 / 256, abs=0.01)
    worst = int(scores["0.ffn"].argmin())
    moved = {"0.ffn": (*keep["0.ffn"][1:], worst), "1.ffn": keep["1.ffn"]}
    assert rank_kinds(scores, moved, places)["ffn"]["beyond"] == 1
    before = scores | {"1.ffn": torch.full((500,), -torch.inf)}
    gone = rank_kinds(before, {"0.ffn": keep["0.ffn"], "1.ffn": ()}, places)["ffn"]
    assert gone["scores"][-120:] == [None] * 120 and json.loads(json.dumps(gone, allow_nan=False)) == gone
    drawn = draw_ranked("ffn", gone)
    assert max(x for x, _ in drawn.points) < 51 and sum(width for _, width, _ in drawn.runs) == pytest.approx(100)


def test_a_path_is_kept_in_few_points_and_drawn_with_its_stops(run):
    budget = Budget("macs", 0.3, "blocks", 300)
    points = [[step, 1 - 0.7 * step / 1000, 1 - 0.69 * step / 1000] for step in range(1001)]
    path = make_path(points, [[500, 0.65], [1000, 0.3]], budget)
    assert len(path["points"]) == POINTS and [path["points"][i][0] for i in (0, -1)] == [0, 1000]
    assert (path["cost"], path["scope"]) == ("macs", "blocks") and make_path([], [], budget) is None
    drawn = draw_descent(path)
    assert [label for *_, label in drawn.stops] == ["0.65", "0.3"]
    (x, y, _), (end, low, _) = drawn.stops
    assert x < end and low < y == pytest.approx(drawn.y.at(0.65), abs=0.5)
    decision = read(run, "decision.json") | {"path": path}
    found = check(page(read(run, "report.json"), None, None, decision))
    assert len(found.all("polyline")) == 2 + len(decision["kinds"]) and "allowed by the ramp" in found.text
    assert any("1.00 of the dense one at first, 0.30 from step" in label for label in found.labels())


def test_scores_below_zero_stay_below_the_others():
    """What masks learn is a logarithm already: as powers of ten, the worst unit would be drawn beside the next."""
    drawn = draw_ranked("heads", {"units": 4, "kept": 2, "threshold": 4.0, "beyond": 0,
                                  "scores": [7.0, 4.0, 2.0, -0.7], "stays": [1.0, 1.0, 0.0, 0.0]})  # fmt: skip
    heights = [y for _, y in drawn.points]
    assert heights[2] - heights[3] > heights[1] - heights[2]
    assert not any("e" in label for _, label in drawn.y.ticks)


@pytest.mark.parametrize("scores", [[3.0, 2.0, 1.0], [1e6, 1.0, 0.0], [0.0, 0.0, 0.0], [5.0, -1.0, -9.0], [None] * 3])
def test_any_scores_can_be_drawn(scores):
    told = {"units": 3, "kept": 1, "threshold": scores[0], "beyond": 0, "scores": scores, "stays": [1.0, 0.0, 0.0]}
    drawn = draw_ranked("ffn", told)
    heights = [y for _, y in drawn.points]
    assert heights == sorted(heights, reverse=True) and all(0 <= y <= 100 for y in heights)
    assert drawn.cut == pytest.approx(100 / 3, abs=0.01) and drawn.y.ticks


def test_what_is_no_decision_is_refused_in_one_line(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    whole = read(run, "decision.json")
    ffn = whole["kinds"]["ffn"]
    wrong = [{"kinds": {"ffn": told}} for told in ({"units": 0}, ffn | {"scores": ["<b>"]}, ffn | {"stays": []})]
    for broken in ("{", "[]", {"kinds": 3}, {"score": "<b>"}, {"path": {"points": []}}, *wrong):
        (folder / "decision.json").write_text(broken if isinstance(broken, str) else json.dumps(whole | broken))
        assert cli.main(["report", str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "copy" in line
    (folder / "decision.json").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert "How the units were chosen" not in (folder / "report.html").read_text()


def test_the_page_is_drawn_again_to_the_same_bytes_and_is_no_part_of_the_sums(run, capsys):
    before = (run / "report.html").read_bytes()
    names = {path.name for path in run.iterdir()}
    (run / "report.html").write_text("old")
    check_files(run, needed=("*",))
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"written to {run / 'report.html'}\n"
    assert (run / "report.html").read_bytes() == before and {path.name for path in run.iterdir()} == names


def test_units_inside_a_removed_sublayer_are_drawn_as_removed():
    keep = {"hidden": [0, 2], "e.layer.0.heads": [0], "e.layer.0.attention_sublayer": [], "e.layer.0.ffn": [1, 2]}
    keep |= {"e.layer.0.ffn_sublayer": [0], "e.layer.1.heads": [1, 3], "e.layer.1.attention_sublayer": [0]}
    keep |= {"d.layer.0.cross.heads": [0], "d.layer.0.cross.attention_sublayer": [], "d.layer.0.heads": [0]}
    keep |= {"d.layer.0.attention_sublayer": [0], "mpnet.0.attention_sublayer": []}
    n_units = {name: 1 if "sublayer" in name else 4 for name in keep}
    whole, stacks = unit_map({"n_units": n_units, "keep": keep})
    assert set(whole) == {"hidden"} and not whole["hidden"].units
    assert [(stack.title, stack.columns) for stack in stacks] == [
        ("e.layer", ("heads", "ffn")), ("d.layer", ("cross.heads", "heads")), ("mpnet", ("attention_sublayer",)),
    ]  # fmt: skip
    (_, (heads, ffn)), (_, (second, none)) = stacks[0].rows
    assert heads.gone and heads.kept == 0 and not any(heads.units) and "sub-layer was removed" in heads.words()
    assert ffn.kept == 2 and not ffn.gone and none is None
    assert second.units == (False, True, False, True) and second.words().endswith("2 of 4 kept, removed: 0, 2")
    cross, own = stacks[1].rows[0][1]
    assert cross.gone and own.kept == 1 and not own.gone


def test_the_audit_is_drawn_with_intervals_and_statuses(real):
    report, audit = real
    found = check(page(report, None, audit))
    for layer in audit["layers"]:
        low, high = layer["I_XL"]["retained_ci95"]
        words = f"{layer['I_XL']['retained']:.0%} retained, 95% interval {low:.0%} to {high:.0%}"
        assert sum(label.endswith(words) for label in found.labels()) >= 1
    assert not any("bits" in label for label in found.labels())  # no labels were asked for
    audit = copy.deepcopy(audit)
    interval = {"value": 0.5, "ci95": [0.4, 0.6]}
    for layer in audit["layers"]:
        layer["V_LY"] |= {"before": interval, "after": {"value": None, "ci95": None}, "status": "ok", "H_ceiling": 1.0}
    first = audit["layers"][0]
    first["V_LY"]["status"] = "biased"
    audit |= {"labels": {"n_classes": 2}, "headline": "A sentence.", "checks": [{"id": "dpi_label", "status": "fail"}]}
    text = page(report, None, audit)
    found = check(text)
    labels = [label for label in found.labels() if "dense 0.500 bits, 95% interval 0.400 to 0.600" in label]
    assert len(labels) == len(audit["layers"]) and "A sentence." in found.text
    assert "Failed checks: dpi_label" in found.text and "biased" in found.text
    doubtful = [layer for layer in audit["layers"] if layer_status(layer) != "ok"]
    assert first in doubtful and doubtful != audit["layers"]
    assert sum("hollow" in circle["class"] for circle in found.all("circle")) == 2 * len(doubtful)
    first["I_XL"] |= {"retained": None, "retained_ci95": None}
    assert "not measured" in check(page(report, None, audit)).text


def test_names_are_escaped_wherever_they_come_from(run, real):
    report, plan = read(run, "report.json"), read(run, "plan.json")
    report |= {key: NASTY for key in ("model", "data", "command", "audit_note", "device", "score")}
    report |= {"refused": {NASTY: NASTY}, "timings_s": {NASTY: 1.0}, "versions": {NASTY: NASTY} | report["versions"]}
    report["kept"] = {NASTY: 0.5}
    for side in ("dense", "pruned"):
        report[side] = report[side] | {"metrics": {NASTY: 0.5}}
    for key in ("keep", "n_units"):
        plan[key] = {f"{NASTY}.0.{NASTY}": plan[key]["hidden"], NASTY: plan[key]["hidden"]}
    audit = copy.deepcopy(real[1])
    audit["layers"][0]["name"] = audit["data"]["name"] = audit["headline"] = NASTY
    decision = read(run, "decision.json")
    decision["kinds"] = {NASTY: decision["kinds"]["ffn"]}
    path = {"cost": NASTY, "scope": NASTY, "points": [[0, 1.0, 1.0], [9, 0.5, 0.5]], "stops": [[9, 0.5]]}
    found = check(page(report, plan, audit, decision | {"path": path}))
    assert found.text.count(NASTY) > 10 and any(NASTY in label for label in found.labels())
    ladder = pareto([report])
    ladder["points"][0]["folder"] = "javascript:alert(1)//"
    found = check(pareto_page(ladder))
    assert [a["href"] for a in found.all("a")] == ["./javascript%3Aalert%281%29///report.html"]


def test_figures_that_are_no_numbers_are_said_and_not_drawn(run):
    report = read(run, "report.json")
    report["pruned"]["metrics"] = {name: math.nan for name in report["dense"]["metrics"]}
    assert "nan" in check(page(report, None, None)).text
    found = check(pareto_page(pareto([report])))
    assert "No metric was measured that can be drawn." in found.text and "nan" in found.text
    assert make_chart("x", "y", [(1.0, math.inf, "a", True), (2.0, 1.0, "b", False)]) is None
    flat = make_axis([3.0, 3.0])
    assert flat.at(3.0) == 50 and flat.ticks


def test_a_ladder_has_a_page_with_its_curve_and_its_folders(run, tmp_path):
    report = read(run, "report.json")
    smaller = copy.deepcopy(report)
    smaller["budget"]["keep"], smaller["pruned"]["params"] = 0.3, report["pruned"]["params"] // 2
    for each in (report, smaller):
        folder = tmp_path / f"{each['budget']['keep']:g}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(each | {"own_sha256": own_sum(each)}))
    (tmp_path / "pareto.json").write_text(json.dumps(pareto([report, smaller])))
    assert write_page(tmp_path) == [tmp_path / name / "report.html" for name in ("", "0.5", "0.3")]
    found = check((tmp_path / "report.html").read_text())
    assert [a["href"] for a in found.all("a")] == ["./0.5/report.html", "./0.3/report.html"]
    assert all((tmp_path / a["href"]).is_file() for a in found.all("a"))
    metrics = report["dense"]["metrics"]
    assert len(found.all("polyline")) == len(metrics) and len(found.all("circle")) == 3 * len(metrics)
    assert f"{smaller['pruned']['params']:,}" in found.text and report["command"] in found.text


def test_what_was_chosen_and_how_it_recovered_is_drawn(run):
    report = read(run, "report.json")
    tried = [{"budget": 0.5, "value": 0.9, "kept": True}, {"budget": 0.3, "value": 0.7, "kept": False}]
    report["chosen"] = {"at_least": "accuracy=99%", "metric": "accuracy", "note": "Chosen so.", "tried": tried}
    report["recovery"] = {"steps": 40, "held_back": 64, "best_step": 20, "best_loss": 0.25}
    report["recovery"]["validation"] = [[10, 0.5], [20, 0.25], [40, 0.3]]
    found = check(page(report, None, None))
    assert "Chosen so." in found.text and "0.7000" in found.text and "lost" in found.text
    assert "the best of 40 steps was 20" in found.text
    (curve,) = found.all("polyline")
    heights = [float(point.split(",")[1]) for point in curve["points"].split()]
    assert max(heights) == heights[1] and min(heights) == heights[0]  # the lowest loss is drawn lowest


def test_a_module_has_a_page_too(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(2, (64,)))
    quick = dict(score="magnitude", shares="cost", recover_steps=1)
    loader = DataLoader(data, batch_size=16)
    result = ibprune.prune(net, 0.5, train_loader=loader, eval_fn=lambda model: 0.75, **quick)
    result.save(tmp_path / "net")
    found = check((tmp_path / "net" / "report.html").read_text())
    report = read(tmp_path / "net", "report.json")
    ((site, (kept, total)),) = report["kept"].items()
    assert any(
        label.startswith(f"channels: scores of its units, best first; {kept} of {total}") for label in found.labels()
    )
    assert f"{site}: {kept} of {total} kept" in found.labels() and "0.7500" in found.text
    assert (
        "ibprune.prune(model, train_loader=..., eval_fn=..., budget=0.5" in found.text
        and "MACs (1 x 8 x 8)" in found.text
    )
    assert "recipe.yaml" not in found.text and write_page(tmp_path / "net") == [tmp_path / "net" / "report.html"]
    assert ibprune.load(tmp_path / "net", model=net)


def test_folders_without_a_run_are_refused_in_one_line(run, tmp_path, capsys):
    def refused() -> str:
        assert cli.main(["report", str(tmp_path)]) == 2
        assert not (tmp_path / "report.html").exists() and not list(tmp_path.glob(".*"))
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "with a report.json, found none in" in refused()
    report = read(run, "report.json")
    (tmp_path / "report.json").write_text(json.dumps(report | {"seed": report["seed"] + 1}))
    assert "to be those that were written, found others" in refused()
    del report["own_sha256"]
    for text, expected in (
        ("{", "could not read"),
        ("[]", "expected keys and values"),
        ("{}", "found 'None'"),
        (json.dumps(report | {"schema": "ibprune.train_report/1"}), "found 'ibprune.train_report/1'"),
        (json.dumps({key: report[key] for key in report if key != "kept"}), "'kept'"),
    ):
        (tmp_path / "report.json").write_text(text)
        assert expected in refused()
    (tmp_path / "pareto.json").write_text('{"schema": "ibprune.pareto/0"}')
    assert "found 'ibprune.pareto/0'" in refused()
    assert cli.main(["report"]) == 2


def test_the_templates_are_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ibprune"]
    files = [path.relative_to(ROOT / "ibprune").as_posix() for path in (ROOT / "ibprune" / "templates").iterdir()]
    assert len(files) >= 4 and all(any(fnmatch.fnmatch(file, p) for p in patterns) for file in files)


def test_powers_of_ten_have_whole_exponents():
    for low in (-7.9, -1.2, 0.0, 0.45):
        for span in (2.01, 3.7, 8.0):
            labels = [label for _, label in make_axis([low, low + span], unit="power", most=3).ticks]
            assert len(labels) >= 2 and not any("." in label for label in labels)
    narrow = {"units": 2, "kept": 1, "threshold": 90.0, "beyond": 0, "scores": [90.0, 1.0], "stays": [1.0, 0.0]}
    assert not any("1e" in label for _, label in draw_ranked("ffn", narrow).y.ticks)
