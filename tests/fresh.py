"""Fresh interpreters without their start: forked from one that imported torch and transformers, and nothing of ibprune.

A child has seen nothing of the test: no module of ibprune, no class of a model, no random numbers.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers.modeling_utils", "transformers.dynamic_module_utils"])


def run(command: list[str], *, env: dict[str, str] | None = None, **_: object) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns for [python, "-m", module, …] or [python, "-c", code], its output captured."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        process = begin(command, out, err, env=env)
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def begin(
    command: list[str], out: Path, err: Path, *, env: dict[str, str] | None = None
) -> multiprocessing.process.BaseProcess:
    """The process that runs such a command while this one goes on; the two files get its output."""
    process = _CONTEXT.Process(target=_child, args=(command[1:], dict(env or os.environ), out, err))
    process.start()
    return process


def start() -> None:
    """Starts the server, so that processes forked from here can use it (`inherit`)."""
    multiprocessing.forkserver.ensure_running()


def inherit() -> None:
    """In a process forked from one that called `start`: the server, which is no child of this process, does run."""
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None


def _child(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("ibprune", "conftest"))
    if loaded:
        raise RuntimeError(f"expected a fresh interpreter, found {loaded}")
    os.environ.clear()
    os.environ.update(environment)
    from transformers import dynamic_module_utils

    # Read from the environment at import, which was the server's.
    dynamic_module_utils.HF_MODULES_CACHE = environment.get("HF_MODULES_CACHE", tempfile.gettempdir())
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    what, code, *rest = arguments
    sys.argv = [what, *rest]
    if what == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(code, {"__name__": "__main__"})
