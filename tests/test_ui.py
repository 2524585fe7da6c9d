"""`sdft ui` as a process: what everybody on the machine can see of it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tasks.home import Home

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc here"),
]
SECRET = "s3cret"
START_S = 180


def test_no_command_of_the_ui_shows_the_password_of_the_database(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.activate(offline=True)
    database = f"{home.tracking_uri}&password={SECRET}"  # SQLite ignores it
    with ui(tmp_path, database) as (server, port):
        await_answer(server, port)
        seen = commands(server.pid)
    assert any("uvicorn" in one for one in seen), "the process that holds the database"
    assert [one for one in seen if SECRET in one] == []
    assert (tmp_path / "mlflow.db").is_file(), "it is the database that was meant"


@contextmanager
def ui(home: Path, database: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from flows.cli import main; main()", "ui"]
    server = subprocess.Popen(
        [*command, "--home", str(home), "--port", str(port)],
        env={**os.environ, "MLFLOW_TRACKING_URI": database},
        start_new_session=True,
    )
    try:
        yield server, port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def await_answer(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, f"it ended with {server.returncode}"
        try:
            with urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
                return
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"no answer in {START_S} s")


def commands(session: int) -> list[str]:
    """The command lines of a session's processes, as `ps` shows them."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(place.name)) == session:
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile
            continue
    return found
