"""Programs of `sdft` as child processes: started, watched, ended with their whole group."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil

from schemas.base import BadInput, Contract
from schemas.stage import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED
from sdft.process import ERROR_MARK
from tasks.failures import RunFailed, is_full
from tasks.forked import Forked

POLL_S = 0.2
GRACE_S = 60.0
"""How long a child may take to write its checkpoint after SIGTERM."""
OUT_OF_MEMORY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
"""How a program ends that the kernel chose, or whose native code got no memory."""
ATTEMPTS = "attempts.jsonl"
SHOWN_LINES = 12

Outcome = Literal["finished", "stopped", "refused", "failed", "killed", "stalled"]


class Attempt(Contract):
    """One run of a child process, a line of attempts.jsonl: how it ended, and what it took."""

    module: str
    pid: int
    started: str
    ended: str
    outcome: Outcome
    """stopped: by a signal, after a checkpoint; refused: the user's mistake; killed: by a signal
    that gave it no chance; stalled: ended by us, for it made no progress."""
    how: str
    peak_memory_bytes: int


class ChildFailed(RunFailed):
    """A child process ended badly; the message has how, and the end of its log."""

    def __init__(self, message: str, attempt: Attempt) -> None:
        super().__init__(message)
        self.attempt = attempt


def run_child(
    module: str,
    spec_file: Path,
    directory: Path,
    log_file: Path,
    tick: Callable[[], object],
    stall_timeout_s: float,
) -> Attempt:
    """Run `python -m module spec_file directory` to its end; output goes to `log_file`.

    `tick` is called a few times a second and returns something that changes whenever there is
    progress; a child without progress for `stall_timeout_s` is ended. Whatever interrupts the
    caller ends the child too, after it had the time to save; so does the caller's death, which
    closes the child's standard input. How it ended is written down beside the log.

    Raises BadInput with the child's own message, or ChildFailed.
    """
    started = _now()
    with log_file.open("ab") as log:
        start = log.tell()
        child = Forked([module, str(spec_file), str(directory)], log.fileno())
    stalled, peak = False, 0
    try:
        progress, since = tick(), time.monotonic()
        while child.poll() is None and not stalled:
            time.sleep(POLL_S)
            peak = max(peak, _memory(child.pid))
            if (now := tick()) != progress:
                progress, since = now, time.monotonic()
            stalled = time.monotonic() - since > stall_timeout_s
    finally:
        code = _ended(child)
        kept = log_file.is_file()  # or another process has taken the directory over
        output = log_file.read_bytes()[start:].decode("utf-8", "replace") if kept else ""
        outcome, how = _how(code, output)
        if kept and outcome == "failed" and not output and is_full(directory):
            how = f"ended, and the disk of {directory} is full, so it could not say why"
        if stalled:
            outcome, how = "stalled", f"made no progress for {stall_timeout_s:.0f} s and was ended"
        attempt = Attempt(
            module=module,
            pid=child.pid,
            started=started,
            ended=_now(),
            outcome=outcome,
            how=how,
            peak_memory_bytes=peak,
        )
        if kept:
            _write_down(attempt, log_file.with_name(ATTEMPTS))
    tick()
    if outcome == "finished":
        return attempt
    if outcome == "refused":
        raise BadInput(how)
    message = f"{module} {how} (its log: {log_file}; at most {peak / 2**20:.0f} MiB of memory)"
    if output and ERROR_MARK not in output:
        message += ":\n" + "\n".join(output.splitlines()[-SHOWN_LINES:])
    raise ChildFailed(message, attempt)


def _write_down(attempt: Attempt, path: Path) -> None:
    """Add it to the attempts of a stage, where the disk lets us."""
    with suppress(OSError), path.open("a", encoding="utf-8") as attempts:
        attempts.write(attempt.model_dump_json() + "\n")


def _how(code: int, output: str) -> tuple[Outcome, str]:
    said = output.rpartition(ERROR_MARK)[2].strip() if ERROR_MARK in output else ""
    if code == EXIT_OK:
        return "finished", "ended well"
    if code == EXIT_BAD_INPUT and said:
        return "refused", said
    if code == EXIT_STOPPED:
        return "stopped", "was stopped by a signal and has saved its state"
    if code < 0:
        hint = " (out of memory?)" if -code in OUT_OF_MEMORY else ""
        return "killed", f"was killed by {signal.Signals(-code).name}{hint}"
    return "failed", f"failed: {said}" if said else f"ended with exit code {code}"


def _memory(pid: int) -> int:
    """Of a child and all that it started, in bytes."""
    total = 0
    for one in _family(pid):
        with suppress(psutil.Error):
            total += one.memory_info().rss
    return total


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [(child := psutil.Process(pid)), *child.children(recursive=True)]
    return []


def _ended(child: Forked) -> int:
    """The exit code of a child that has ended, or is to end now."""
    if child.poll() is None:
        _kill(child.pid, signal.SIGTERM)
        if child.wait(GRACE_S) is None:
            family = _family(child.pid)  # ranks of a stage have sessions of their own
            _kill(child.pid, signal.SIGKILL)
            for one in family:
                with suppress(psutil.Error):
                    one.kill()
    code = child.wait()
    child.close()
    assert code is not None
    return code


def _kill(group: int, with_signal: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(group, with_signal)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
