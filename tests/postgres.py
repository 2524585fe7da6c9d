"""A throw-away PostgreSQL server, and processes that write to a ledger in it."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from schemas.ledger import Draft
from tasks import ledger as ledger_module
from tasks.home import Home
from tasks.ledger import Ledger

START_S = 60


def programs() -> Path:
    """The folder of the server's programs, which Debian keeps off the PATH; skips without one."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if found is None else []
    if found is None and not folders:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    return Path(found).resolve().parent if found else folders[-1]


def account() -> dict[str, Any]:
    """How to start the server: it refuses to run as root, so as somebody else then."""
    if os.geteuid() != 0:
        return {}
    names = {one.pw_name: one for one in pwd.getpwall()}
    user = names.get("postgres") or names.get("nobody")
    if user is None:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextmanager
def server() -> Generator[str]:
    """The address of a fresh server's first database; gone at the end, with all its data."""
    pytest.importorskip("psycopg", reason="no driver here: the extra postgres has it")
    bin_dir, somebody = programs(), account()
    # Not in pytest's own folder: nobody else may enter that; and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="sdft-postgres-") as folder:
        if somebody:
            os.chown(folder, somebody["user"], somebody["group"])
        data = f"{folder}/data"
        init = [bin_dir / "initdb", "-D", data, "-U", "sdft", "-A", "trust", "-E", "UTF8", "-N"]
        made = subprocess.run(
            [*init, "--no-locale"], cwd=folder, capture_output=True, text=True, **somebody
        )
        assert made.returncode == 0, made.stderr
        settings = (f"unix_socket_directories={folder}", "listen_addresses=", "fsync=off")
        options = [part for one in settings for part in ("-c", one)]
        with Path(folder, "log").open("w") as log:
            process = subprocess.Popen(
                [bin_dir / "postgres", "-D", data, *options],
                cwd=folder,
                stdout=log,
                stderr=log,
                **somebody,
            )
            try:
                url = f"postgresql+psycopg://sdft@/postgres?host={folder}"
                _await(url, process, Path(folder, "log"))
                yield url
            finally:
                process.send_signal(signal.SIGQUIT)  # stop at once, whoever is connected
                process.wait(START_S)


def new_database(url: str, name: str) -> str:
    """The address of a new and empty database on a server."""
    run_sql(url, f'CREATE DATABASE "{name}"')
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def run_sql(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    engine = create_engine(url)
    end = time.monotonic() + START_S
    while True:
        try:
            with engine.connect():
                break
        except OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"PostgreSQL did not start:\n{log.read_text()}") from None
            time.sleep(0.1)
    engine.dispose()


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
