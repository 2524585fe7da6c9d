"""Processes that promote, and what must come of it, for tests of races, pauses and crashes."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from registry_home import RegistryHome

from schemas.base import BadInput
from sdft.chain import first_break
from tasks import promotion
from tasks.aliases import alias_version
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.promotion import promote

SPAWN = multiprocessing.get_context("spawn")
RACERS, ROUNDS, LONG_S = 4, 200, 300


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


def check_a_pause(demo: RegistryHome, gap: str) -> None:
    """A promoter of version 1 that is paused in a gap does no harm to the next one, of version 2.

    `demo` has three versions, the third of them champion.
    """
    child = SPAWN.Process(
        target=promote_and_signal, args=(demo.home.root, "demo", "1", gap, signal.SIGSTOP)
    )
    child.start()
    while not is_stopped(child.pid):
        time.sleep(0.05)
    promote(demo.home, "demo", "2")
    os.kill(child.pid, signal.SIGCONT)
    child.join(LONG_S)
    fenced = gap == "before the ledger"
    assert (child.exitcode == 1) == fenced, "past its turn before the ledger, it is refused"
    entries = Ledger(demo.home).entries("demo")
    assert [one.version for one in entries[9:]] == (["2"] if fenced else ["1", "2"])
    assert alias_version(demo.client, "demo", "candidate") == "3"
    assert alias_version(demo.client, "demo", "champion") == "2", "never over a later one"
    assert first_break(entries) is None


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def check_a_race(demo: RegistryHome, after_round: Callable[[], object]) -> None:
    """Four processes promote at once, round after round: one champion each, and nothing is lost."""
    versions = [demo.register(demo.grow(f"s{number}"), None) for number in range(2 * RACERS)]
    ledger = Ledger(demo.home)
    before = sum(one.kind == "promoted" for one in ledger.entries("demo"))
    gate = SPAWN.Barrier(RACERS + 1)
    pairs = zip(versions[::2], versions[1::2], strict=True)
    racers = [
        SPAWN.Process(target=race, args=(demo.home.root, "demo", mine, ROUNDS, gate))
        for mine in pairs
    ]
    for one in racers:
        one.start()
    for number in range(1, ROUNDS + 1):
        gate.wait(LONG_S)  # they start
        gate.wait(LONG_S)  # they are through
        changes = [one for one in ledger.entries("demo") if one.kind == "promoted"]
        assert len(changes) == before + number, "exactly one champion a round"
        alias = alias_version(demo.client, "demo", "champion")
        assert alias == changes[-1].version, "alias = ledger"
        after_round()
        gate.wait(LONG_S)
    for one in racers:
        one.join(LONG_S)
        assert one.exitcode == 0
    assert first_break(ledger.entries()) is None
    epochs = [one.epoch for one in ledger.entries("demo") if one.epoch is not None]
    assert epochs == list(range(1, len(epochs) + 1)), "no lost entry"
