"""Who works on what: one holder a key, in the ledger's database, for as long as it gives beats.

A holder that gives none is taken for dead, by the clock of whoever waits, so no two machines need
the same time. The token counts the holders: what one of them still wants to write when another has
the key is refused (fencing).
"""

import math
import os
import platform
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import psutil
from sqlalchemy import ColumnElement, Connection, insert, select, update

from schemas.base import BadInput, Contract
from sdft.process import machine
from tasks.console import say
from tasks.failures import RunFailed
from tasks.home import Home
from tasks.ledger import Ledger, LedgerAway
from tasks.ledger_tables import LEASES

LEASE_S = "SDFT_LEASE_S"
"""Environment variable: a holder without a beat for so long (60 s) has lost what it held."""
BEATS = 6
"""Beats in that time."""
PATIENCE = 2.0
"""In lifetimes of a lease: who gives no beat for so long is dead, though nobody wants the key."""


class Fenced(RunFailed):
    """Another process holds what this one thought to hold; nothing more is written."""


class Holder(Contract):
    """A process, on one machine since its last start."""

    host: str
    machine: str
    pid: int
    started: float
    """In seconds after the machine."""
    since: str

    @property
    def is_dead(self) -> bool:
        """Whether it can be seen from here that this process is no more."""
        if self.machine != machine():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(_started(process) - self.started) > 1
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


class Fence(Contract):
    """What a holder shows with everything it writes."""

    key: str
    token: int


def lease_s() -> float:
    """How long a lease lives without a beat; raises BadInput where it is set to no such time."""
    try:
        seconds = float(os.environ.get(LEASE_S, "60"))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise BadInput(f"{LEASE_S} must be a time in seconds, such as 60")
    return seconds


def myself() -> Holder:
    process = psutil.Process()
    return Holder(
        host=platform.node(),
        machine=machine(),
        pid=process.pid,
        started=_started(process),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _started(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's: no clock that is set changes them."""
    return process.create_time() - psutil.boot_time()


@contextmanager
def leased(key: str, what: str, home: Home) -> Generator[Fence]:
    """Hold a key; waits while another process that is alive has it. `what` is told to people."""
    ledger = Ledger(home)
    fence = _acquire(ledger, key, what)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(ledger, fence, done), daemon=True)
    beating.start()
    try:
        yield fence
    finally:
        done.set()
        beating.join()
        with suppress(LedgerAway), ledger.transaction() as connection:
            connection.execute(update(LEASES).where(_mine(fence)).values(holder=None))


def check(ledger: Ledger, fence: Fence) -> None:
    """Raise Fenced where another process has taken the key over."""
    with ledger.reading() as connection:
        check_in(connection, fence)


def checking(ledger: Ledger, fence: Fence) -> Callable[[], None]:
    """`check`, to be called again and again: a short outage of the ledger's database passes.

    Raises LedgerAway where it has not answered for as long as a lease lives without a beat.
    """
    answered = time.monotonic()

    def look() -> None:
        nonlocal answered
        try:
            check(ledger, fence)
        except LedgerAway:
            if time.monotonic() - answered > lease_s():
                raise
        else:
            answered = time.monotonic()

    return look


def check_in(connection: Connection, fence: Fence) -> None:
    """The same inside of a transaction, which then holds for as long as that does."""
    row = connection.execute(
        select(LEASES.c.token, LEASES.c.holder).where(LEASES.c.key == fence.key)
    ).first()
    if row is None or row.token != fence.token:
        holder = row.holder if row else None
        who = Holder.model_validate_json(holder) if holder else "another process"
        did = "took this work over" if holder else "took this work over, or gave it up"
        raise Fenced(f"{who} {did}, for this one gave no sign of life for {lease_s():.0f} s")


def holders(ledger: Ledger) -> dict[str, Holder]:
    """Who holds what now, by key; some may be dead."""
    with ledger.reading() as connection:
        rows = connection.execute(
            select(LEASES.c.key, LEASES.c.holder).where(LEASES.c.holder.is_not(None))
        ).all()
    return {row.key: Holder.model_validate_json(row.holder) for row in rows}


def pulse(ledger: Ledger, key: str) -> tuple[int, int] | None:
    """What changes for as long as anybody who holds a key lives; None where nobody ever has."""
    with ledger.reading() as connection:
        query = select(LEASES.c.token, LEASES.c.beats).where(LEASES.c.key == key)
        row = connection.execute(query).first()
    return (row.token, row.beats) if row else None


def release_dead(ledger: Ledger) -> dict[str, Holder]:
    """Take from dead processes of this machine what they held; returns it."""
    dead = {key: holder for key, holder in holders(ledger).items() if holder.is_dead}
    with ledger.transaction() as connection:
        for key, holder in dead.items():
            held = (LEASES.c.key == key) & (LEASES.c.holder == holder.model_dump_json())
            connection.execute(update(LEASES).where(held).values(holder=None))
    return dead


def release_silent(ledger: Ledger) -> dict[str, Holder]:
    """Take from holders on other machines that give no beat what they held; returns it.

    Where there are such holders they are watched until each gave a beat, for at most PATIENCE times
    as long as a lease lives without one. One that was only asleep is fenced.
    """
    silent = _held_elsewhere(ledger)
    patience_s = PATIENCE * lease_s()
    if silent:
        who = ", ".join(sorted({holder.host for _, holder in silent.values()}))
        say("lease", "", f"watching for signs of life from {who}, {patience_s:.0f} s at most")
    quiet_s = 0.0
    while silent and quiet_s < patience_s:
        asked = time.monotonic()
        now = _held_elsewhere(ledger)
        silent = {key: seen for key, seen in silent.items() if now.get(key) == seen}
        quiet_s += _wait(asked)
    released: dict[str, Holder] = {}
    with ledger.transaction() as connection:
        for key, ((token, beats), holder) in silent.items():
            same = (LEASES.c.key == key) & (LEASES.c.token == token) & (LEASES.c.beats == beats)
            still = same & (LEASES.c.holder == holder.model_dump_json())
            values = {"token": token + 1, "beats": 0, "holder": None}
            if connection.execute(update(LEASES).where(still).values(values)).rowcount:
                released[key] = holder
    return released


def _held_elsewhere(ledger: Ledger) -> dict[str, tuple[tuple[int, int], Holder]]:
    """Token, beats and holder of the keys that other machines hold.

    Behind whoever writes, as beats are: while those have to wait nobody is silent.
    """
    with ledger.transaction() as connection:
        rows = connection.execute(select(LEASES).where(LEASES.c.holder.is_not(None))).all()
    held = {
        row.key: ((row.token, row.beats), Holder.model_validate_json(row.holder)) for row in rows
    }
    return {key: one for key, one in held.items() if one[1].machine != machine()}


def _acquire(ledger: Ledger, key: str, what: str) -> Fence:
    me = myself().model_dump_json()
    seen: tuple[int, int] | None = None
    quiet_s = 0.0
    while True:
        asked = time.monotonic()
        with ledger.transaction() as connection:
            row = connection.execute(select(LEASES).where(LEASES.c.key == key)).first()
            if row is None:
                values = {"key": key, "token": 1, "beats": 0, "holder": me}
                connection.execute(insert(LEASES).values(values))
                return Fence(key=key, token=1)
            now = (row.token, row.beats)
            holder = Holder.model_validate_json(row.holder) if row.holder else None
            quiet_s = quiet_s if now == seen else 0.0
            if holder is None or holder.is_dead or quiet_s >= lease_s():
                values = {"token": row.token + 1, "beats": 0, "holder": me}
                connection.execute(update(LEASES).where(LEASES.c.key == key).values(values))
                if holder is not None:
                    say("lease", what, f"taken over from {holder}, which is gone", "yellow")
                return Fence(key=key, token=row.token + 1)
        if seen is None:
            say("lease", what, f"waiting for {holder}", "yellow")
        seen = now
        quiet_s += _wait(asked)


def _wait(since: float) -> float:
    """Wait until it is worth looking for a beat again; returns what counts of the time since then.

    A database that did not answer, or a machine asleep, is no silence of a holder's.
    """
    time.sleep(lease_s() / BEATS / 4)
    return min(time.monotonic() - since, lease_s() / BEATS)


def _beat(ledger: Ledger, fence: Fence, done: threading.Event) -> None:
    while not done.wait(lease_s() / BEATS):
        try:
            with ledger.transaction() as connection:
                values = {"beats": LEASES.c.beats + 1}
                connection.execute(update(LEASES).where(_mine(fence)).values(values))
        except LedgerAway:  # the next beat may get through; if none does, others take over
            continue


def _mine(fence: Fence) -> ColumnElement[bool]:
    return (LEASES.c.key == fence.key) & (LEASES.c.token == fence.token)
