"""Programs of `sdft` as child processes: started, watched, ended with their whole group."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from schemas.base import BadInput
from schemas.stage import EXIT_BAD_INPUT, EXIT_OK
from sdft.process import ERROR_MARK

POLL_S = 0.2
GRACE_S = 60.0
"""How long a child may take to write its checkpoint after SIGTERM."""


class ChildFailed(RuntimeError):
    """A child process ended badly; the message has how, and the end of its log."""


def run_child(
    module: str,
    spec_file: Path,
    directory: Path,
    log_file: Path,
    tick: Callable[[], object],
    stall_timeout_s: float,
) -> None:
    """Run `python -m module spec_file directory` to its end; output goes to `log_file`.

    `tick` is called a few times a second and returns something that changes whenever there is
    progress; a child without progress for `stall_timeout_s` is ended. Whatever interrupts the
    caller ends the child too, after it had the time to save.

    Raises BadInput with the child's own message, or ChildFailed.
    """
    with log_file.open("ab") as log:
        start = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(spec_file), str(directory)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        progress, since = tick(), time.monotonic()
        while child.poll() is None:
            time.sleep(POLL_S)
            if (now := tick()) != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > stall_timeout_s:
                raise ChildFailed(
                    f"{module} made no progress for {stall_timeout_s:.0f} s and was ended; its log "
                    f"is {log_file}"
                )
    finally:
        _end(child)
    tick()
    if child.returncode == EXIT_OK:
        return
    output = log_file.read_bytes()[start:].decode("utf-8", "replace")
    if child.returncode == EXIT_BAD_INPUT and ERROR_MARK in output:
        raise BadInput(output.rpartition(ERROR_MARK)[2].strip())
    tail = "\n".join(output.splitlines()[-12:])
    raise ChildFailed(f"{module} {_how(child.returncode)}; the end of {log_file}:\n{tail}")


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
