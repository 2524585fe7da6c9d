"""Programs of `sdft` as forks of one process that has their libraries: started and waited for."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from signal import SIGKILL

from sdft.process import PARENT_HOLDS_STDIN
from tasks.failures import RunFailed

PRELOADED = ("sdft.train", "sdft.evaluate") if sys.platform == "linux" else ()
"""What takes every program seconds to import. Other systems' own libraries, once they are loaded,
survive no fork."""
START_S = 600.0
"""How long a program may take to start: as long as the slowest disk needs for its libraries."""


class Forks:
    """The process that forks, started when it is needed first; it ends when we do."""

    def __init__(
        self, preloaded: tuple[str, ...] = PRELOADED, requests: socket.socket | None = None
    ) -> None:
        """`requests` is where such a process is asked that is there already."""
        self._preloaded = preloaded
        self._requests = requests
        self._server: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def start(self) -> socket.socket:
        """Have it import its libraries, unless it is there; where it is asked."""
        with self._one_at_a_time:
            if self._requests is None or (self._server and self._server.poll() is not None):
                self._requests, theirs = socket.socketpair()
                with theirs:
                    self._server = subprocess.Popen(
                        [sys.executable, "-m", "sdft.forking", *self._preloaded],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                        env=_environment(),
                    )
            return self._requests

    def give_up(self) -> None:
        """End it: whoever needs it next has another."""
        with self._one_at_a_time:
            if self._server is not None:
                self._server.kill()
                self._server.wait()


forks = Forks()


class Forked:
    """`python -m` program, running: its process number, and how it ended, as `Popen` has them."""

    def __init__(self, program: list[str], log: int) -> None:
        """Start it in a group of its own, its output to the open file `log`.

        It holds what is inheritable here, such as what is locked for it, and its standard input is
        open for as long as we live. Raises RunFailed where it cannot be started.
        """
        self.returncode: int | None = None
        """None while it runs; -n where signal n killed it."""
        request = {
            "program": program,
            "environment": _environment(),
            "path": [str(one) for one in sys.path],
        }
        self._talk, theirs = socket.socketpair()
        self._lines = self._talk.makefile("rb", buffering=0)
        try:
            with theirs, _inheritable() as locks:
                socket.send_fds(forks.start(), [b"."], [theirs.fileno(), log, *locks])
            self._talk.sendall(json.dumps(request).encode() + b"\n")
            if not wait([self._talk], START_S):
                forks.give_up()
                raise RunFailed(
                    f"{program[0]} has not started in {START_S:.0f} s: the disk or network drive "
                    "that Python's libraries are on does not answer"
                )
            self.pid = int(self._lines.readline())
        except (ConnectionError, ValueError):  # it said nothing
            self.close()
            raise RunFailed(
                f"{program[0]} cannot be started: what is to fork it has died"
            ) from None
        except BaseException:
            self.close()  # so it does not begin
            raise

    def poll(self) -> int | None:
        """`returncode` by now."""
        return self.wait(0)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """`returncode` when it has ended, or when this time is over."""
        if self.returncode is None and wait([self._talk], timeout_s):
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
    copies: list[int] = []
    try:
        for one in Path("/dev/fd").iterdir():
            file = int(one.name)
            try:
                if file > 2 and os.get_inheritable(file):
                    copies.append(os.dup(file))
            except OSError as error:
                if error.errno != errno.EBADF:  # another thread has just closed it
                    raise
        yield copies
    finally:
        for copy in copies:
            os.close(copy)
