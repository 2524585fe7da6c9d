"""A throw-away PostgreSQL server, and processes that write to a ledger in it."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from infra import postgresql
from schemas.base import BadInput
from schemas.ledger import Draft
from tasks import ledger as ledger_module
from tasks.home import Home
from tasks.ledger import Ledger

START_S = 60


@contextmanager
def server() -> Generator[str]:
    """The address of a fresh server's first database; gone at the end, with all its data."""
    pytest.importorskip("psycopg", reason="no driver here: the extra postgres has it")
    try:
        postgresql.programs()
        somebody = postgresql.account()
    except BadInput as none:
        pytest.skip(str(none))
    # Not in pytest's own folder: nobody else may enter that; and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="sdft-postgres-") as name:
        folder = Path(name)
        postgresql.make_cluster(folder)
        settings = {"listen_addresses": "", "fsync": "off"}
        with Path(folder, "log").open("w") as log:
            process = subprocess.Popen(
                postgresql.server_command(folder, settings),
                cwd=folder,
                stdout=log,
                stderr=log,
                **somebody,
            )
            try:
                url = f"postgresql+psycopg://{postgresql.SUPERUSER}@/postgres?host={folder}"
                postgresql.await_server(url, process, folder / "log", START_S)
                yield url
            finally:
                process.send_signal(signal.SIGQUIT)  # stop at once, whoever is connected
                process.wait(START_S)


def open_together(urls: list[str], root: Path, gate: Barrier) -> None:
    """Open a ledger in each new database at the same moment as others do, and write to it."""
    for url in urls:
        os.environ["SDFT_LEDGER_URL"] = url
        gate.wait(START_S)
        Ledger(Home(root)).append([Draft(kind="registered", name="demo", version=str(os.getpid()))])


def append_together(root: Path, rounds: int, gate: Barrier) -> None:
    """Append entries that need no champion at the same moment as others do."""
    ledger = Ledger(Home(root))
    for number in range(rounds):
        gate.wait(START_S)
        ledger.append([Draft(kind="repaired", name="demo", version=None, reason=f"{number}")] * 3)


def append_and_signal(root: Path, number: int) -> None:
    """Append two entries, with a signal to oneself between them, amid the transaction."""
    ledger = Ledger(Home(root))
    real: Callable[..., Any] = ledger_module._seal

    def cut(draft: Draft, seq: int, previous: str) -> Any:
        if draft.reason == "second":
            os.kill(os.getpid(), signal.Signals(number))
        return real(draft, seq, previous)

    ledger_module._seal = cut
    draft = Draft(kind="repaired", name="demo", version=None, reason="first")
    ledger.append([draft, draft.model_copy(update={"reason": "second"})])


def append_one(root: Path, wait_s: int) -> None:
    """Append one entry, with less patience than usual."""
    ledger_module.WAIT_S = wait_s
    Ledger(Home(root)).append([Draft(kind="repaired", name="demo", version=None, reason="other")])
