"""Several processes train as one: the same rows, noise, losses and plan, one folder, and what goes wrong is said."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import ibprune
from ibprune import candidates, cli, pipeline, training, vib
from ibprune.console import Quiet
from ibprune.engine import make_accelerator
from ibprune.errors import BadData, BadRecipe, IBPruneError
from ibprune.latency import measure_latency
from ibprune.masks import VIBMask
from ibprune.processes import check_batch_size, divided, n_processes, on_main, process_index, shared
from ibprune.recipe import make_recipe
from ibprune.resuming import open_journal
from ibprune.trainer import train

SMALL = dict(
    budget=0.4, mask_steps=8, recover_steps=4, finetune_steps=12, lr=3e-3, batch_size=16, max_length=16, seed=3,
    probe_steps=0, audit=False, precision="fp32",
)  # fmt: skip


def together(n: int, do, *args) -> list:
    """What `do(*args)` gives in each of n forked processes that know of each other; an exception is its text."""
    context, queue, processes = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Queue(), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    fresh.start()

    def one(rank: int) -> None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
        AcceleratorState._reset_state(reset_partial_state=True)
        fresh.inherit()
        try:
            queue.put((rank, do(*args)))
        except Exception as error:  # noqa: BLE001
            queue.put((rank, f"{type(error).__name__}: {error}"))
        time.sleep(0.3)  # not before the others have heard the last word

    for rank in range(n):
        processes.append(context.Process(target=one, args=(rank,)))
        processes[-1].start()
    found = dict(queue.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    return [found[rank] for rank in range(n)]


@pytest.fixture
def steady(folders, tmp_path):
    """A function: a dense model without dropout, which each process draws for itself, by its head."""

    def folder(head: str) -> str:
        path = tmp_path / head
        shutil.copytree(folders[head], path)
        config = json.loads((path / "config.json").read_text())
        config |= {key: 0.0 for key in config if key.endswith("dropout_prob")}
        (path / "config.json").write_text(json.dumps(config))
        return str(path)

    return folder


def pruned(model: str, data: str, output: Path, values: dict) -> dict:
    """The report of a run, with the losses of its phases."""
    losses = []

    def watched(*args, **more):
        state = train(*args, **more)
        losses.append((state.phase, state.losses))
        return state

    with pytest.MonkeyPatch.context() as patch:
        for module in (candidates, pipeline, training, vib):
            patch.setattr(module, "train", watched)
        report = ibprune.prune(model, data=data, output=str(output), **values).report
    return {"report": report, "losses": losses, "count": n_processes()}


@pytest.mark.parametrize(
    "n,head,data,more",
    [
        (2, "BertForSequenceClassification", "reviews", {"probe_steps": 2}),
        (4, "BertForSequenceClassification", "reviews", {"grad_accum": 2, "finetune_steps": 4, "shares": "equal"}),
        (2, "BertForMaskedLM", "stories", {"score": "gradual", "gradient_checkpointing": True, "shares": "equal"}),
        (2, "LlamaForCausalLM", "stories", {"budget": 0.6, "recovery": "lora", "eval_every": 2}),
    ],
)
def test_several_processes_find_the_plan_of_one(n, head, data, more, steady, request, tmp_path):
    model, source = steady(head), request.getfixturevalue(data)
    values = SMALL | more
    alone = pruned(model, source, tmp_path / "alone", values)
    several = together(n, pruned, model, source, tmp_path / "several", values)
    assert all(isinstance(found, dict) for found in several), several
    assert [found["count"] for found in several] == [n] * n and alone["count"] == 1
    first = several[0]
    assert all(found["report"] == first["report"] for found in several)
    assert first["report"]["world_size"] == n and alone["report"]["world_size"] == 1
    assert [phase for phase, _ in first["losses"]] == [phase for phase, _ in alone["losses"]]
    for (_, ours), (_, theirs) in zip(first["losses"], alone["losses"]):
        assert torch.allclose(torch.tensor(ours[:20]), torch.tensor(theirs[:20]), rtol=0, atol=1e-5)
    assert (tmp_path / "several" / "plan.json").read_text() == (tmp_path / "alone" / "plan.json").read_text()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("several", "alone"))
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-2) for name in theirs)
    assert not (tmp_path / "several.partial").exists()


def test_a_latency_is_measured_by_the_main_process(steady, stories, tmp_path):
    model, measured = steady("LlamaForCausalLM"), []

    def measure(*args, **more):
        measured.append(process_index())
        return measure_latency(*args, **more)

    def run() -> tuple[dict, list[int]]:
        values = SMALL | {"cost": "latency", "budget": 1.0, "score": "magnitude", "finetune_steps": 0}
        with pytest.MonkeyPatch.context() as patch:  # a share that any measurement leaves in reach
            patch.setattr("ibprune.structure.measure_latency", measure)
            return pruned(model, stories, tmp_path / "several", values)["report"], measured

    found = together(2, run)
    assert not any(isinstance(said, str) for said in found), found
    (first, by), (second, also) = found
    assert first == second and first["budget"]["cost"] == "latency" and (by, also) == ([0], [])


def test_several_budgets_and_a_trained_head_in_two_processes(folders, reviews, tmp_path):
    def ladder(output: Path) -> list[dict]:
        values = SMALL | {"budget": (0.6, 0.4), "recover_steps": 2, "finetune_steps": 2, "shares": "equal"}
        results = ibprune.prune(folders["BertForSequenceClassification"], data=reviews, output=str(output), **values)
        return [{name: p.abs().sum().item() for name, p in r.model.named_parameters()} for r in results]

    first, second = together(2, ladder, tmp_path / "out")
    assert first == second and len(first) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"0.6", "0.4", "pareto.json"}


def test_processes_that_stop_again_and_again_go_on_to_the_same_bits(folders, reviews, tmp_path):
    class Asked(Quiet):
        def __init__(self, what: str, n: int):
            self.at = (what, n)

        def track(self, items, stage, total):
            for i, item in enumerate(items):  # one of them is asked, at a step of its own
                self.stopping = self.stopping or (process_index() == 1 and (stage, i) == self.at)
                yield item

    def go(output: Path, **more) -> bool:
        values = SMALL | {"finetune_steps": 2, "shares": "equal", "data": reviews} | more
        return ibprune.prune(folders["BertForSequenceClassification"], output=str(output), **values).report["resumed"]

    assert together(2, go, tmp_path / "whole") == [False, False]
    for what, n in (("learning masks", 4), ("recovering", 2)):
        more = {"console": Asked(what, n), "resume": what == "recovering"}
        for said in together(2, partial(go, tmp_path / "out", **more)):
            assert said.startswith(f"Stopped: stopped after step {n + 1} of ") and f"'{what}'" in said
    assert together(2, lambda: go(tmp_path / "out", resume=True)) == [True, True]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_module_in_two_processes(tmp_path):
    def prune() -> tuple[list[float], dict]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        x = torch.randn(64, 8)
        loader = [(x[i : i + 16], x[i : i + 16, :3].argmax(1)) for i in range(0, 64, 16)]
        judged = []
        result = ibprune.prune(
            net, 0.5, train_loader=loader, mask_steps=8, recover_steps=4, eval_fn=lambda m: judged.append(1) or 1.0
        )
        weights = [p.sum().item() for p in result.model.parameters()]
        return weights, result.report["kept"], len(judged)

    (first, kept, judged), (second, also, never) = together(2, prune)
    assert first == second and kept == also and (judged, never) == (2, 0)


def test_each_row_draws_its_noise_however_many_processes_there_are():
    mask = VIBMask(5, log_alpha=0.0).train()
    mask.draw = (7, 0, 1)
    whole = mask(6)
    halves = []
    for index in range(2):
        mask.draw = (7, index, 2)
        halves.append(mask(3))
    assert torch.equal(torch.cat(halves), whole) and torch.equal(mask(3), halves[1])
    mask.draw = (8, 0, 1)
    assert not torch.equal(mask(6), whole)


def test_batches_are_divided_and_what_is_left_over_is_left_out():
    def rows() -> list[list[int]]:
        device = make_accelerator("fp32").device
        batches = [{"x": torch.arange(start, start + n)} for start, n in ((0, 4), (4, 3), (7, 1), (8, 2))]
        read = iter(batches) if process_index() == 0 else None  # nobody else reads
        return [batch["x"].tolist() for batch in divided(read, device)]

    assert together(2, rows) == [[[0, 1], [4], [8]], [[2, 3], [5], [9]]]


def test_what_the_main_process_finds_or_raises_all_have():
    def found():
        make_accelerator("fp32")
        value = shared({"x": torch.full((2,), float(process_index())), "n": process_index()})
        made = on_main(lambda: os.getpid())
        try:
            on_main(lambda: (_ for _ in ()).throw(BadData("no such rows")))
        except IBPruneError as error:
            return value["x"].tolist(), value["n"], made, str(error)

    first, second = together(2, found)
    assert first == second and first[:2] == ([0.0, 0.0], 0) and first[3] == "no such rows"
    assert shared(3) == 3 and on_main(lambda: 4) == 4  # alone


def test_what_processes_cannot_share_is_refused(monkeypatch, folders, reviews, tmp_path):
    monkeypatch.setattr("ibprune.processes.n_processes", lambda: 3)
    with pytest.raises(BadRecipe, match="multiple of the 3 processes.*found 16"):
        check_batch_size(16)
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "3")  # for something else: there is no WORLD_SIZE
    assert process_index() == 0
    monkeypatch.undo()
    assert together(2, lambda: check_batch_size(5)) == [None, None]  # nothing has started

    def tiny_batches():
        make_accelerator("fp32")
        net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        rows = [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))]
        ibprune.prune(net, 0.5, train_loader=rows, mask_steps=2, recover_steps=2)

    for said in together(2, tiny_batches):
        assert said == "BadData: expected batches to train on with a row for each of 2 processes, found none."
    odd = dict(data=reviews, batch_size=15, output=str(tmp_path / "wrong"))
    for run in (partial(ibprune.prune, budget=0.5), ibprune.train):
        for said in together(2, partial(run, folders["BertForSequenceClassification"], **odd)):
            assert said.startswith("BadRecipe: --batch-size: expected a multiple of the 2 processes")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")  # each of them would take itself for the main one
    fake = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
    monkeypatch.setattr("ibprune.engine.Accelerator", lambda **_: fake)
    with pytest.raises(IBPruneError, match="expected 2 processes to train together, as WORLD_SIZE says, found 1"):
        make_accelerator("fp32")
    fake.distributed_type = DistributedType.FSDP
    with pytest.raises(IBPruneError, match="found FSDP, which divides it"):
        make_accelerator("fp32")
    fake.distributed_type = DistributedType.MULTI_CPU  # what Accelerate makes of these on CPUs, where it goes on
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(IBPruneError, match=f"found {name}, which divides it"):
            make_accelerator("fp32")
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")


def test_a_state_of_another_number_of_processes_is_refused(monkeypatch, folders, tmp_path):
    recipe = make_recipe({"model": folders["BertModel"], "budget": 0.5, "output": str(tmp_path / "out")})
    with open_journal(recipe, tmp_path / "out", Quiet()) as journal:
        journal.bind({"the weights": "a"}, None)
        journal.write("scores", {"x": torch.ones(1)})
    with open_journal(recipe.model_copy(update={"resume": True}), tmp_path / "out", Quiet()) as again:
        again.bind({"the weights": "a"}, None)
        monkeypatch.setattr("ibprune.resuming.n_processes", lambda: 2)
        with pytest.raises(BadRecipe, match="the number of processes changed"):
            again.bind({"the weights": "a"}, None)


def train_flags(folders, reviews, steps: int) -> list[str]:
    return ["train", "--model", folders["BertForSequenceClassification"], "--data", reviews, "--max-length", "16",
            "--batch-size", "16", "--finetune-steps", str(steps)]  # fmt: skip


def test_the_main_process_speaks_for_all(folders, reviews, tmp_path):
    def told() -> tuple[int, str, str]:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = cli.main([*train_flags(folders, reviews, 2), "--json", "--output", str(tmp_path / "out")])
        return code, out.getvalue(), err.getvalue()

    (code, stdout, stderr), other = together(2, told)
    assert code == 0 and json.loads(stdout)["world_size"] == 2 and (tmp_path / "out" / "model.safetensors").exists()
    assert stderr.count("writing and checking") == 1 and other == (0, "", "")


def test_what_they_say_is_passed_on_and_what_they_refuse_is_said_once():
    code = "import sys; from ibprune.launching import launch; sys.exit(launch(sys.argv[1:], 2))"
    ended = fresh.run([sys.executable, "-c", code, "--version"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"ibprune {ibprune.__version__}\n" * 2, "")
    ended = fresh.run([sys.executable, "-c", code, "recipes", "show", "nope"])
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("ibprune: error: no recipe 'nope' comes with ibprune")


def test_a_signal_stops_a_run_after_its_step(folders, reviews, tmp_path, monkeypatch, capsys):
    said = []

    class Signalled(Quiet):
        say = staticmethod(said.append)

        def track(self, items, what, total):
            for i, item in enumerate(items):
                if (what, i) == ("training dense", 3):
                    os.kill(os.getpid(), signal.SIGTERM)
                yield item

    monkeypatch.setattr(cli, "Quiet", Signalled)
    assert cli.main([*train_flags(folders, reviews, 9), "--quiet", "--output", str(tmp_path / "out")]) == 130
    check_stopped(*capsys.readouterr(), tmp_path)
    assert said.count("stopping after this step; the same signal again stops at once") == 1


def check_stopped(stdout: str, stderr: str, folder: Path) -> None:
    assert stdout == "" and "Traceback" not in stderr
    *_, last = stderr.strip().splitlines()
    assert last.startswith("ibprune: stopped after step ") and last.endswith("--resume goes on from there.")
    assert [path.name for path in folder.iterdir()] == ["out.partial"]
    assert (folder / "out.partial" / "training-dense.safetensors").exists()


@pytest.fixture
def command(tmp_path_factory):
    """A function that starts the command line and returns its process and its two outputs so far."""
    folder, started = tmp_path_factory.mktemp("said"), []
    files = folder / "out", folder / "err"

    def start(*arguments: str):
        started.append(fresh.begin([sys.executable, "-m", "ibprune", *arguments], *files))
        return started[-1], lambda: [file.read_text() if file.exists() else "" for file in files]

    yield start
    for process in started:
        process.kill()


def wait(condition, process) -> None:
    for _ in range(6000):
        if condition() or not process.is_alive():
            return
        time.sleep(0.05)


def test_a_signal_stops_several_processes_after_their_step(command, folders, reviews, tmp_path):
    flags = [*train_flags(folders, reviews, 100_000), "--num-processes", "2", "--output", str(tmp_path / "out")]
    run, said = command(*flags)
    wait(lambda: "Training the dense model" in said()[1], run)
    time.sleep(1)
    os.kill(run.pid, signal.SIGTERM)
    run.join(300)
    stdout, stderr = said()
    assert run.exitcode == 130, stderr
    check_stopped(stdout, stderr, tmp_path)
    assert stderr.count("stopping after this step") == 1


def test_a_lost_process_ends_the_run_and_leaves_its_state(command, folders, reviews, tmp_path):
    state = tmp_path / "out.partial" / "training-dense.safetensors"
    flags = [*train_flags(folders, reviews, 100_000), "--save-every", "0.001", "--num-processes", "2", "--quiet"]
    run, said = command(*flags, "--output", str(tmp_path / "out"))
    wait(state.exists, run)
    assert run.is_alive(), said()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    run.join(300)
    stderr = said()[1]
    assert run.exitcode == 1 and state.exists() and not (tmp_path / "out").exists()
    assert "of 2 was lost (SIGKILL)" in stderr and "--resume" in stderr and "Traceback" not in stderr
