"""mi-benchmark: the table over known distributions, and a user's own arrays."""

import json

import numpy as np
import pytest

from ibprune import cli
from ibprune.mi.benchmark import LABELLED, PAIRWISE, run_benchmark
from ibprune.mi.tasks import find_task


def test_every_estimator_runs_on_every_kind_of_pair():
    quick = tuple(
        name for name in PAIRWISE if name not in ("infonce", "mine", "nwj", "smile")
    )  # theirs: test_mi_critics
    tasks = (find_task("1v1-normal-0.75"),)
    results = list(run_benchmark(tasks, quick, n=1000, seeds=(0, 1)))
    assert len(results) == 2 * len(quick) and all(r.truth == pytest.approx(0.413339, abs=1e-6) for r in results)
    for name in ("pairwise", "ksg", "gaussian", "gaussian-copula"):
        assert all(abs(r.error) < 0.12 for r in results if r.estimator == name)


def test_the_table(capsys):
    command = ["mi-benchmark", "--tasks", "1v1-normal,student-1x1", "--estimators", "gaussian,ksg", "--n", "600"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "1v1-normal-0.75" in printed and "asinh-student-1x1-dof1" in printed and "mean absolute error" in printed
    assert cli.main([*command, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {r["estimator"] for r in records} == {"gaussian", "ksg"} and all("truth" in r for r in records)


def test_a_users_own_pair(tmp_path, capsys):
    rng = np.random.default_rng(7)
    x = rng.standard_normal(1500)
    np.savez(tmp_path / "pair.npz", x=x, y=0.6 * x + 0.8 * rng.standard_normal(1500))
    command = ["mi-benchmark", "--xy", str(tmp_path / "pair.npz"), "--json", "--estimators", "gaussian"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"]["value"] == pytest.approx(0.223, abs=0.08) and found["estimate"]["unit"] == "nats"
    assert set(found["estimators"]) == {"pairwise", "gaussian"} and found["estimate"]["status"] == "ok"
    y = (x > 0).astype(int)
    np.savez(tmp_path / "labels.npz", x=np.column_stack([x, rng.standard_normal((1500, 3))]), y=y)
    every = ",".join(name for name in LABELLED if name != "labelled")
    assert cli.main(["mi-benchmark", "--xy", str(tmp_path / "labels.npz"), "--json", "--estimators", every]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.5 < found["estimate"]["value"] < np.log(2) and set(found["estimators"]) == set(LABELLED)
    assert cli.main(["mi-benchmark", "--xy", str(tmp_path / "labels.npz")]) == 0
    assert "nats" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    np.savez(tmp_path / "nan.npz", x=np.full(100, np.nan), y=np.zeros(100))
    np.savez(tmp_path / "short.npz", x=np.zeros(100), y=np.zeros(90))
    np.savez(tmp_path / "alone.npz", x=np.zeros(100))
    np.savez(tmp_path / "objects.npz", x=np.array([{}] * 20, dtype=object), y=np.zeros(20))
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04abc")
    np.save(tmp_path / "one.npy", np.zeros(20))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    for argv, words in (
        (["--xy", "nan.npz"], "NaN"),
        (["--xy", "short.npz"], "as many"),
        (["--xy", "alone.npz"], "arrays 'x' and 'y'"),
        (["--xy", "objects.npz"], "arrays 'x' and 'y'"),
        (["--xy", "text.npz"], "arrays 'x' and 'y'"),
        (["--xy", "none.npz"], "arrays 'x' and 'y'"),
        (["--xy", "cut.npz"], "arrays 'x' and 'y'"),
        (["--xy", "one.npz"], "arrays 'x' and 'y'"),
        (["--tasks", "gausian"], "no task"),
        (["--estimators", "ksgg", "--tasks", "1v1-normal", "--n", "100"], "expected an estimator"),
        (["--seeds", "a"], "whole numbers"),
        (["--seeds", "0,-1"], "whole numbers from 0"),
        (["--n", "3"], "at least 10"),
    ):
        argv = [str(tmp_path / a) if a.endswith(".npz") else a for a in argv]
        assert cli.main(["mi-benchmark", *argv]) == 2
        message = capsys.readouterr().err.strip().splitlines()
        assert message[-1].startswith("ibprune: error: ") and words in message[-1] and len(message) == 1
