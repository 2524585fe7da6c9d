"""Striking at an exact place of a real program."""

import os
import resource
import signal
from collections.abc import Callable
from importlib import import_module
from typing import Any

import psutil

SPARE = 2**20
"""Bytes that a process still gets whose memory runs out."""


def strike(victims: str, parent: int) -> None:
    """What becomes of the process that is at the place, or of the one that runs it."""
    if victims in ("parent", "both"):
        os.kill(parent, signal.SIGKILL)
    if victims in ("self", "both"):
        os.kill(os.getpid(), signal.SIGKILL)
    if victims == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)
    if victims == "memory":
        limit = psutil.Process().memory_info().vms + SPARE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def patched(function: str, turn: int, strike: Callable[[], None]) -> None:
    """Have `strike` called just before the n-th call of `module:name` or `module:class.name`."""
    module, _, name = function.partition(":")
    *path, last = name.split(".")
    owner: Any = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)
    calls = 0

    def cut(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            strike()
        return real(*args, **kwargs)

    setattr(owner, last, cut)
