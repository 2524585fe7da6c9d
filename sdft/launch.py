"""Starts a program as several ranks on this machine, through torch.distributed.run's own agent."""

import os
import signal
import sys
import tempfile
import threading
import time
import uuid

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from schemas.base import BadInput
from schemas.stage import EXIT_BAD_INPUT, EXIT_STOPPED
from sdft.process import EXIT_CODE, PARENT_HOLDS_STDIN, StageFailed, Stop

LOOK_S = 0.1


def launch(module: str, arguments: list[str], processes: int, stop: Stop) -> bool:
    """Run `python -m module arguments` as so many ranks, to the end of all of them.

    Returns False when they were stopped before the end. When one fails the others are ended; raises
    BadInput or StageFailed with what it said, or how it was killed.
    """
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _hold_stdin_of_ranks(stop)
    with tempfile.TemporaryDirectory(prefix="sdft-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=LOOK_S,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle="SIGHUP",  # the others are ours
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            return _not_finished(error.failures, processes)
    return True


def _hold_stdin_of_ranks(stop: Stop) -> None:
    """Ranks stop when their standard input ends: when we are to stop, and when we are gone.

    A signal could come before they are there, and they have sessions of their own.
    """
    theirs, ours = os.pipe()
    os.dup2(theirs, sys.stdin.fileno())
    os.environ[PARENT_HOLDS_STDIN] = "1"

    def pass_on() -> None:
        while not stop.requested:
            time.sleep(LOOK_S)
        os.close(ours)

    threading.Thread(target=pass_on, daemon=True).start()


def _not_finished(failures: dict[int, ProcessFailure], processes: int) -> bool:
    """False for ranks that were stopped; otherwise raises what the cause of the failure means."""
    rank = min(sorted(failures), key=lambda rank: _cause_order(failures[rank]))
    cause = failures[rank]
    if said := _said(cause):
        is_bad_input = cause.error_file_data.get(EXIT_CODE) == EXIT_BAD_INPUT
        raise BadInput(said) if is_bad_input else StageFailed(said)
    if cause.exitcode == EXIT_STOPPED:
        return False
    how = f"ended with exit code {cause.exitcode}"
    if cause.exitcode < 0:
        how = f"was killed by {cause.signal_name()}"
    raise StageFailed(
        f"rank {rank} of {processes} {how}, and the others were ended with it; the last good "
        "checkpoint is untouched: run the same command again"
    )


def _cause_order(failure: ProcessFailure) -> int:
    """Sort key, lowest for the likeliest cause: a failure that says why, one that somebody killed,
    others.

    A rank whose peer is gone fails too, and the agent ends the rest with SIGTERM.
    """
    if _said(failure):
        return 0
    if failure.exitcode < 0:
        return 4 if failure.exitcode == -signal.SIGTERM else 1
    return 2 if failure.exitcode == EXIT_STOPPED else 3


def _said(failure: ProcessFailure) -> str:
    message = failure.error_file_data["message"]
    return "" if message == "<NONE>" else message
