"""Trackers of Accelerate's see a run as it goes, and one that cannot be had is refused before anything is loaded."""

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

import ibprune
from ibprune.errors import BadRecipe

SHORT = dict(mask_steps=10, recover_steps=4, finetune_steps=3, batch_size=16, max_length=16, grad_accum=2, audit=False)


class Fake(GeneralTracker):
    """Remembers what it is told."""

    name, requires_logging_directory, main_process_only = "tensorboard", True, True
    rows: list[tuple[int | None, dict]] = []
    folders: list[str] = []

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.folders.append(str(logging_dir))

    def start(self):
        self.rows.clear()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self):
        self.rows.append((None, {"finished": 1}))


@pytest.fixture
def tracked(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    return Fake


def test_a_tracker_sees_losses_masks_and_metrics_in_steps_that_only_rise(tracked, folders, reviews, tmp_path):
    result = ibprune.prune(
        folders["BertForSequenceClassification"], 0.4, data=reviews, output=str(tmp_path / "out"),
        log_with="tensorboard", **SHORT,
    )  # fmt: skip
    assert tracked.folders[-1] == str(tmp_path / "out.logs")
    steps = [step for step, values in tracked.rows if step is not None]
    assert steps == sorted(steps) and steps[-1] == 3 + 10 + 4 + sum("trying a cut/loss" in v for _, v in tracked.rows)
    keys = set().union(*(values for _, values in tracked.rows))
    assert keys >= {"training dense/loss", "learning masks/lr", "recovering/loss", "masks/kl/ffn", "dense/accuracy"}
    costs = [values["masks/cost"] for _, values in tracked.rows if "masks/cost" in values]
    limits = [values["masks/limit"] for _, values in tracked.rows if "masks/limit" in values]
    assert len(costs) == 2 and costs[0] > costs[1] and all(cost <= limit for cost, limit in zip(costs, limits))
    assert tracked.rows[-2][1]["pruned/accuracy"] == result.report["pruned"]["metrics"]["accuracy"]
    assert tracked.rows[-1][1] == {"finished": 1}
    assert "log_with" not in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_tracker_that_cannot_be_had_is_refused_by_name(monkeypatch, folders, reviews, tmp_path):
    values = dict(data=reviews, output=str(tmp_path / "out"))
    with pytest.raises(BadRecipe, match="--log-with: found 'tensorbord': did you mean 'tensorboard'"):
        ibprune.prune(folders["BertForSequenceClassification"], 0.4, log_with="tensorbord", **values)
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(BadRecipe, match="tensorboard is not installed: pip install tensorboard"):
        ibprune.prune(folders["BertForSequenceClassification"], 0.4, log_with="tensorboard", **values)
    assert list(tmp_path.iterdir()) == []
