"""Processes that promote, for tests of races, pauses and crashes."""

import contextlib
import os
import signal
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from schemas.base import BadInput
from tasks import promotion
from tasks.home import Home
from tasks.ledger import Ledger


def race(root: Path, name: str, mine: tuple[str, str], rounds: int, gate: Barrier) -> None:
    """In every round, try to make one of two versions of one's own the champion."""
    home = Home(root)
    home.activate(offline=True)
    for _ in range(rounds):
        now = Ledger(home).champion(name).version
        version = mine[0] if now != mine[0] else mine[1]
        gate.wait()
        with contextlib.suppress(BadInput):  # somebody else was faster
            promotion.promote(home, name, version, expect=now or "none")
        gate.wait()
        gate.wait()  # the parent looks at what came out


GAPS: dict[str, tuple[Any, str]] = {
    "before the ledger": (promotion, "check_package"),
    "between ledger and alias": (promotion, "mirror"),
    "before an alias is set": (MlflowClient, "set_registered_model_alias"),
    "after the aliases": (MlflowClient, "set_registered_model_tag"),
    "before the cursor": (Ledger, "advance"),
}
"""Where a promotion can be cut: the function that the signal comes just before."""


def promote_and_signal(root: Path, name: str, version: str, gap: str, number: int) -> None:
    """Promote, with a signal to oneself (SIGKILL or SIGSTOP) in a gap."""
    home = Home(root)
    home.activate(offline=True)
    owner, function = GAPS[gap]
    real: Callable[..., Any] = getattr(owner, function)

    def cut(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, function, real)
        os.kill(os.getpid(), signal.Signals(number))
        return real(*args, **kwargs)

    setattr(owner, function, cut)
    promotion.promote(home, name, version)
