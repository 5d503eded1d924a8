"""Starts a command in several processes of this machine that train together."""

import logging
import os
import signal
import sys

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ibprune.errors import BadRecipe

PATIENCE = 300  # seconds that the processes have to finish a step and to save it


def launch(argv: list[str], n_processes: int) -> int:
    """Runs `python -m ibprune` with these arguments in so many processes, as `torchrun` does; the exit code.

    A process that ends with an error ends the others.

    Raises:
        BadRecipe: Fewer than one process, or more than there are GPUs, where there are any.
    """
    if n_processes < 1:
        raise BadRecipe(f"--num-processes: expected at least 1, found {n_processes}.")
    gpus = torch.cuda.device_count()
    if 0 < gpus < n_processes:
        raise BadRecipe(f"--num-processes: expected at most {gpus}, a GPU for each, found {n_processes}.")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # they say themselves what went wrong
    config = LaunchConfig(
        run_id=f"ibprune{os.getpid()}", min_nodes=1, max_nodes=1, nproc_per_node=n_processes, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1, shutdown_timeout=PATIENCE,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "ibprune", *argv)
    except SignalException:  # was passed on to the processes, which have said what they saved
        return 130
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.stderr.write(
                f"ibprune: error: process {number} of {n_processes} was lost ({signal.Signals(-failure.exitcode).name})"
                ": what was saved of the run is taken up by --resume.\n"
            )
            return 1
        return failure.exitcode
    return 0
