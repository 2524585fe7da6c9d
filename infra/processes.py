"""Processes that outlive whoever started them, and are found again by a mark in their environment.

There is no file of process ids that could be wrong after a crash: the table of processes is asked.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

STACK, PART = "SDFT_STACK", "SDFT_STACK_PART"
"""The marks: the stack's directory, and the name of the part. Whatever a part starts has them."""
KILL_S = 10


def start(
    directory: Path,
    part: str,
    command: list[str],
    environment: Mapping[str, str],
    options: Mapping[str, Any],
) -> subprocess.Popen[Any]:
    """Start a part of the stack in a session of its own; what it says is added to its log."""
    marks = {STACK: str(directory), PART: part}
    log = log_of(directory, part)
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env={**environment, **marks},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **options,
        )


def log_of(directory: Path, part: str) -> Path:
    """Where a part of the stack writes what it says."""
    return directory / "logs" / f"{part}.log"


def living(directory: Path) -> dict[str, list[psutil.Process]]:
    """The processes of a stack, by part; the first one of a part is its oldest."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            marks = process.environ()
            if marks.get(STACK) != str(directory) or process.status() == psutil.STATUS_ZOMBIE:
                continue
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # another user's is none of ours
            continue
        found.setdefault(marks.get(PART, ""), []).append(process)
    return {part: sorted(group, key=_age) for part, group in found.items()}


def end(directory: Path, part: str, number: signal.Signals, patience_s: float) -> None:
    """End a part: ask its oldest process, then all that is left of it, then kill.

    Waits until nothing of it lives, also of what has a session of its own.
    """
    group = living(directory).get(part, [])
    everybody = _with_children(group)
    _send(group[:1], number)
    psutil.wait_procs(everybody, patience_s)
    for last in (signal.SIGTERM, signal.SIGKILL):
        everybody = _with_children(living(directory).get(part, []))
        _send(everybody, last)
        psutil.wait_procs(everybody, KILL_S)
    deadline = time.monotonic() + KILL_S
    while left := living(directory).get(part):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{part}: processes that cannot be killed: {left}")
        _send(left, signal.SIGKILL)
        time.sleep(0.1)


def _with_children(group: Iterable[psutil.Process]) -> list[psutil.Process]:
    """A server that writes its state into its title (PostgreSQL) has no marks in its children."""
    found: dict[int, psutil.Process] = {}
    for process in group:
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        found.update({one.pid: one for one in family})
    return [*found.values()]


def _send(group: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in group:
        if process.pid == os.getpid():
            continue
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _age(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.NoSuchProcess:
        return float("inf")
