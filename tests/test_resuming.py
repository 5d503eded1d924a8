"""A run that is cut short goes on where it was, to the last bit; a state that is damaged, foreign or full says so."""

import json
import os
import random
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_saves import full_disk

import ibprune
from ibprune import cli, cutting, pipeline, saves, training
from ibprune.console import Quiet
from ibprune.errors import BadRecipe, IBPruneError, Stopped

STEPS = dict(mask_steps=9, recover_steps=8, probe_steps=0, batch_size=16, max_length=16, seed=3, audit=False)
STEPS |= dict(save_every=1e-9)  # after every step


@pytest.fixture(scope="module", autouse=True)
def unverified():
    """Folders are compared here, not loaded: other tests do that."""
    found = {"auto_class": "AutoModel", "max_abs_diff": 0.0, "ways": [], "transformers": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saves.os, "fsync", lambda number: None)  # nobody pulls the plug
        for module in (pipeline, training):
            patch.setattr(module, "verify", lambda model, folder, tier, *rest, **more: found | {"tier": tier})
        yield


class Stopping(Quiet):
    """Stops like Ctrl-C at the n-th item of a stage, and remembers which stages ran."""

    def __init__(self, what: str = "", n: int = 0):
        self.what, self.n, self.ran, self.said = what, n, [], []

    def say(self, line):
        self.said.append(line)

    def track(self, items, what, total):
        self.ran.append((what, total))
        for i, item in enumerate(items):
            if (what, i) == (self.what, self.n):
                raise KeyboardInterrupt
            yield item


def same(first: Path, second: Path) -> None:
    for name in ("plan.json", "decision.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def interrupt(folder, what, n, **values):
    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**values, output=folder, console=Stopping(what, n))
    assert not folder.exists() and folder.with_name("out.partial").is_dir()


def resume(folder, **values) -> Stopping:
    console = Stopping()
    result = ibprune.prune(**values, output=folder, resume=True, console=console)
    assert result.report["resumed"] and not folder.with_name("out.partial").exists()
    return console


@pytest.fixture(scope="module")
def classifier(folders, reviews):
    return dict(model=folders["BertForSequenceClassification"], budget=0.4, data=reviews, finetune_steps=12) | STEPS


@pytest.fixture(scope="module")
def whole(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert not ibprune.prune(**classifier, output=folder).report["resumed"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    return folder


@pytest.mark.parametrize(
    "what,n,left",
    [
        ("training dense", 11, ("training dense", 1)),  # in the second epoch
        ("scoring units", 3, ("scoring units", 10)),
        ("learning masks", 3, ("learning masks", 6)),  # between two cuts by the ramp
        ("learning masks", 8, ("learning masks", 1)),  # after what stays was fixed
        ("recovering", 0, ("recovering", 8)),
        ("recovering", 5, ("recovering", 3)),
        ("evaluating pruned", 0, None),
    ],
)
def test_a_run_goes_on_where_it_was_cut_short(what, n, left, classifier, whole, tmp_path):
    interrupt(tmp_path / "out", what, n, **classifier)
    console = resume(tmp_path / "out", **classifier)
    same(whole, tmp_path / "out")
    trained = ("training dense", "scoring units", "learning masks", "recovering")
    ran = [stage for stage in console.ran if stage[0] in trained]
    assert (ran[0] if ran else None) == left
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (whole / "recipe.yaml").read_bytes()


@pytest.mark.parametrize("what,n,left", [("learning masks", 3, ("learning masks", 5)), ("recovering", 7, None)])
def test_a_run_that_is_asked_to_stop_does_so_after_its_step(what, n, left, classifier, whole, tmp_path):
    class Asked(Stopping):
        def track(self, items, stage, total):
            for i, item in enumerate(items):
                self.stopping = self.stopping or (stage, i) == (what, n)
                yield item

    with pytest.raises(
        Stopped, match=rf"stopped after step {n + 1} of .* of '{what}'; its state is in '.*out.partial'"
    ):
        ibprune.prune(**classifier, output=tmp_path / "out", console=Asked())
    console = resume(tmp_path / "out", **classifier)
    same(whole, tmp_path / "out")
    assert next((stage for stage in console.ran if stage[0] in ("learning masks", "recovering")), None) == left


def test_a_candidate_cut_that_was_compared_is_not_tried_again(folders, stories, tmp_path):
    values = dict(model=folders["LlamaForCausalLM"], budget=0.6, data=stories, kinds="ffn,hidden") | STEPS
    values |= dict(probe_steps=2, mask_steps=0, recover_steps=0)
    console = Stopping()
    ibprune.prune(**values, output=tmp_path / "whole", console=console)
    tries = [stage for stage in console.ran if stage[0] == "trying a cut"]
    assert len(tries) >= 2
    console = Stopping("trying a cut", 1)
    console.n, tracks = -1, iter([-1, 1])  # the first candidate runs, the second is stopped
    original = console.track

    def track(items, what, total):
        console.n = next(tracks) if what == "trying a cut" else console.n
        return original(items, what, total)

    console.track = track
    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**values, output=tmp_path / "out", console=console)
    again = resume(tmp_path / "out", **values)
    assert [stage for stage in again.ran if stage[0] == "trying a cut"] == tries[1:]
    assert not any(stage == "scoring units" for stage, _ in again.ran)
    same(tmp_path / "whole", tmp_path / "out")


def test_a_run_may_be_cut_short_again_and_again(classifier, whole, tmp_path):
    interrupt(tmp_path / "out", "learning masks", 2, **classifier)
    for what in ("learning masks", "learning masks", "recovering"):
        interrupt(tmp_path / "out", what, 3, **classifier, resume=True)
    resume(tmp_path / "out", **classifier)
    same(whole, tmp_path / "out")


@pytest.mark.parametrize(
    "head,data,more",
    [
        ("BertForMaskedLM", "stories", dict(distill="hidden", schedule="cosine")),
        ("LlamaForCausalLM", "stories", dict(distill="relations")),
    ],
)
def test_hidden_tokens_and_accumulated_steps_go_on_too(head, data, more, folders, request, tmp_path):
    """What a masked language model's batches hide is drawn by a generator that no seed of an epoch sets."""
    values = dict(model=folders[head], budget=0.5, data=request.getfixturevalue(data), grad_accum=2) | STEPS | more
    ibprune.prune(**values, output=tmp_path / "whole")
    interrupt(tmp_path / "out", "learning masks", 5, **values)
    interrupt(tmp_path / "out", "recovering", 6, **values, resume=True)
    resume(tmp_path / "out", **values)
    same(tmp_path / "whole", tmp_path / "out")


def test_a_state_is_never_overwritten_unasked_nor_taken_up_by_another_recipe(classifier, tmp_path, capsys):
    out = tmp_path / "out"
    interrupt(out, "learning masks", 2, **classifier)
    state = {path.name: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()}
    flags = ["--model", classifier["model"], "--data", classifier["data"], "--output", str(out), "--quiet"]
    assert cli.main([*flags, "--budget", "0.4"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("ibprune: error: found the state") and "out.partial': take it up with --resume" in message
    with pytest.raises(BadRecipe, match="whose budget is 0.4, found 0.3"):
        ibprune.prune(**classifier | dict(budget=0.3), output=out, resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()} == state
    older = json.dumps({"format": "ibprune.state/1", "recipe": {}})  # of what model and data, it did not say
    (tmp_path / "out.partial" / "recipe.json").write_text(older)
    with pytest.raises(BadRecipe, match="its format is not ibprune.state/4. Delete the folder"):
        ibprune.prune(**classifier, output=out, resume=True)
    (tmp_path / "out.partial" / "recipe.json").write_text("{")
    with pytest.raises(BadRecipe, match="recipe.json.*Delete the folder"):
        ibprune.prune(**classifier, output=out, resume=True)
    assert not out.exists()


def test_damaged_saves_give_way_to_those_before_them_and_damaged_parts_are_done_again(classifier, whole, tmp_path):
    interrupt(tmp_path / "out", "recovering", 4, **classifier)
    state = tmp_path / "out.partial"
    damaged = [state / f"{name}.safetensors" for name in ("learning-masks", "recovering", "scores", "kept-units")]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-1])
    console = resume(tmp_path / "out", **classifier)
    same(whole, tmp_path / "out")
    said = [line for line in console.said if line.startswith("warning: '")]
    assert len(said) == 4 and all(any(f"'{file}' is damaged" in line for line in said) for file in damaged)
    trained = ("training dense", "scoring units", "learning masks", "recovering")
    # of the masks the last step, of the recovery what was left and the step that was damaged; what rests on the
    # scores, which came out alike, is taken as it is
    expected = [("scoring units", 10), ("learning masks", 1), ("recovering", 5)]
    assert [stage for stage in console.ran if stage[0] in trained] == expected


def test_a_phase_with_no_save_that_is_whole_is_refused_and_without_them_done_again(classifier, whole, tmp_path):
    interrupt(tmp_path / "out", "recovering", 4, **classifier, keep_last=1)
    file = tmp_path / "out.partial" / "learning-masks.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadRecipe, match=r"learning-masks.safetensors', but: .*Delete it to do that part again"):
        ibprune.prune(**classifier, output=tmp_path / "out", resume=True)
    file.unlink()
    console = resume(tmp_path / "out", **classifier)
    same(whole, tmp_path / "out")
    assert ("learning masks", 9) in console.ran and ("recovering", 4) in console.ran


def test_parts_that_rest_on_one_that_came_out_differently_are_done_again(classifier, tmp_path, monkeypatch):
    interrupt(tmp_path / "out", "recovering", 1, **classifier)
    (tmp_path / "out.partial" / "scores.safetensors").write_bytes(b"")
    score_units = cutting.score_units

    def otherwise(*arguments):  # as a GPU may round
        return {name: score * 0.5 for name, score in score_units(*arguments).items()}

    monkeypatch.setattr(cutting, "score_units", otherwise)
    console = Stopping("recovering", 0)
    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**classifier, output=tmp_path / "out", resume=True, console=console)
    assert sum("is not used: what it rests on was done again" in line for line in console.said) == 4
    assert ("learning masks", 9) in console.ran and ("recovering", 8) in console.ran


def test_a_folder_that_cannot_be_written_leaves_the_state_from_which_the_run_goes_on(classifier, whole, tmp_path):
    out, full = tmp_path / "out", ExitStack()

    class Filling(Stopping):
        def say(self, line):
            if line.startswith("writing and checking"):
                full.enter_context(full_disk(most=20_000))

    with pytest.raises(IBPruneError) as error, full:
        ibprune.prune(**classifier, output=out, console=Filling())
    said = str(error.value)
    assert said.startswith(f"expected to write '{out}', but: ") and "File too large" in said and said.count("\n") == 0
    assert said.endswith(f"its state is in '{out}.partial', and the same command with --resume goes on from there.")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    console = resume(out, **classifier)
    same(whole, out)
    assert not any(stage in ("learning masks", "recovering") for stage, _ in console.ran)


def test_a_second_run_into_the_same_folder_is_refused(classifier, tmp_path, capsys):
    flags = ["--model", classifier["model"], "--data", classifier["data"], "--output", str(tmp_path / "out")]
    codes = []

    class Twice(Stopping):
        def track(self, items, what, total):
            if what == "training dense":
                codes.extend(cli.main([*flags, "--budget", "0.4", "--quiet", *more]) for more in ([], ["--resume"]))
                raise KeyboardInterrupt
            yield from super().track(items, what, total)

    with pytest.raises(KeyboardInterrupt):
        ibprune.prune(**classifier, output=tmp_path / "out", console=Twice())
    assert list(tmp_path.iterdir()) == []  # nothing was saved yet
    first, second = capsys.readouterr().err.strip().splitlines()[-2:]
    assert codes == [2, 2] and first == second
    assert f"error: expected no other run into '{tmp_path / 'out'}', found process {os.getpid()} on " in first


def test_another_model_or_other_data_under_the_same_names_are_refused(classifier, tmp_path):
    values = classifier | {"model": str(tmp_path / "model"), "data": str(tmp_path / "data")}
    shutil.copytree(classifier["model"], values["model"])
    shutil.copytree(classifier["data"], values["data"])
    interrupt(tmp_path / "out", "recovering", 4, **values)
    files = {path: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()}
    weights, rows = tmp_path / "model" / "model.safetensors", tmp_path / "data" / "train.tsv"
    for path, said in ((weights, "the model changed"), (rows, "the data changed")):
        old = path.read_bytes()
        if path == weights:
            tensors = load_file(path)
            name = max(tensors, key=lambda name: tensors[name].numel())
            save_file({**tensors, name: tensors[name] + 1e-3}, path, {"format": "pt"})
        else:
            path.write_bytes(old + b"one more kind word\t1\n")
        with pytest.raises(BadRecipe, match=f"--resume: {said} since the run"):
            ibprune.prune(**values, output=tmp_path / "out", resume=True)
        path.write_bytes(old)
    assert {path: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()} == files


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_costs_the_state_and_not_the_run(error, classifier, whole, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(saves, "save_file", full)
    console = Stopping()
    ibprune.prune(**classifier, output=tmp_path / "out", console=console)
    same(whole, tmp_path / "out")
    assert any(line.startswith("warning: the state of the run was not saved") for line in console.said)
    assert any("No space left" in line for line in console.said)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_to_resume_starts_from_the_beginning(classifier, whole, tmp_path):
    console = Stopping()
    result = ibprune.prune(**classifier, output=tmp_path / "out", resume=True, console=console)
    assert any(line.startswith("nothing to resume") for line in console.said) and not result.report["resumed"]
    same(whole, tmp_path / "out")


def test_a_mistake_before_anything_was_done_leaves_no_state(classifier, tmp_path):
    with pytest.raises(BadRecipe, match="ask for at least"):
        ibprune.prune(**classifier | dict(budget=0.001, finetune_steps=0), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_training_for_its_own_sake_goes_on_too(classifier, tmp_path):
    values = {key: classifier[key] for key in ("model", "data", "batch_size", "max_length", "save_every")}
    values |= dict(finetune_steps=14)
    ibprune.train(**values, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ibprune.train(**values, output=tmp_path / "out", console=Stopping("training dense", 12))
    report = ibprune.train(**values, output=tmp_path / "out", resume=True)
    assert report["resumed"] and not (tmp_path / "out.partial").exists()
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_all_generators_are_put_back():
    data = torch.Generator().manual_seed(5)

    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            random.random(),
            torch.rand(2, generator=data).tolist(),
        )

    draw()
    state = saves.rng_state(data)
    state = state[0], json.loads(json.dumps(state[1]))
    first = draw()
    assert draw() != first
    saves.set_rng_state(*state, data)
    assert draw() == first
