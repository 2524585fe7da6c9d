"""Programs of `sdft` as forks of one process that has their libraries: started and waited for."""

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL

from sdft.process import PARENT_HOLDS_STDIN
from tasks.failures import RunFailed

PRELOADED = ("sdft.train", "sdft.evaluate") if sys.platform == "linux" else ()
"""What takes every program seconds to import. Other systems' own libraries survive no fork."""


class Forks:
    """The process that forks, started when it is needed first; it ends with this one."""

    def __init__(self, preloaded: tuple[str, ...] = PRELOADED) -> None:
        self._preloaded = preloaded
        self._server: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()
        self.requests: socket.socket | None = None
        """Where it is asked."""

    def start(self) -> socket.socket:
        """Have it import its libraries, unless it is there; `requests`."""
        if self.requests is None or (self._server and self._server.poll() is not None):
            self.requests, theirs = socket.socketpair()
            with theirs:
                self._server = subprocess.Popen(
                    [sys.executable, "-m", "sdft.forking", *self._preloaded],
                    stdin=theirs.fileno(),
                    start_new_session=True,
                    env=_environment(),
                )
        return self.requests

    def ask(self, files: list[int]) -> None:
        """Ask for a program that talks, writes and locks by these open files."""
        with self._one_at_a_time:
            socket.send_fds(self.start(), [b"."], files)


forks = Forks()


class Forked:
    """`python -m` program, running: its process number, and how it ended, as `Popen` has them."""

    def __init__(self, program: list[str], log: int) -> None:
        """Start it in a group of its own, its output to the open file `log`.

        It holds what is locked here for it (only locks are inheritable), and its standard input is
        open for as long as we live. Raises RunFailed where it cannot be started.
        """
        self.returncode: int | None = None
        """None while it runs; -n where signal n killed it."""
        request = {
            "program": program,
            "environment": _environment(),
            "path": sys.path,
            "directory": str(Path.cwd()),
        }
        self._talk, theirs = socket.socketpair()
        self._lines = self._talk.makefile("rb")
        try:
            with theirs, _inheritable() as locks:
                forks.ask([theirs.fileno(), log, *locks])
            self._talk.sendall(json.dumps(request).encode() + b"\n")
            self.pid = int(self._lines.readline())
        except (ConnectionError, ValueError):  # it said nothing
            raise RunFailed(f"{program[0]} cannot be started; its error is above") from None

    def poll(self) -> int | None:
        """`returncode` by now."""
        return self.wait(0)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """`returncode` when it has ended, or when this time is over."""
        if self.returncode is None and select.select([self._talk], [], [], timeout_s)[0]:
            self.returncode = int(self._lines.readline() or -SIGKILL)
        return self.returncode

    def close(self) -> None:
        """Let go of its standard input."""
        self._lines.close()
        self._talk.close()


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", PARENT_HOLDS_STDIN: "1"}


@contextmanager
def _inheritable() -> Generator[list[int]]:
    """Copies of the open files that what is started here is to have."""
    copies = []
    for one in Path("/dev/fd").iterdir():
        file = int(one.name)
        with suppress(OSError):  # another thread has just closed it
            if file > 2 and os.get_inheritable(file):
                copies.append(os.dup(file))
    try:
        yield copies
    finally:
        for copy in copies:
            os.close(copy)
