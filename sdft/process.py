"""What the trainer and the evaluator share as programs: signals, exit codes, one at a time."""

import atexit
import errno
import fcntl
import functools
import gc
import json
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from schemas.base import BadInput, write_atomically
from schemas.stage import EXIT_BAD_INPUT, EXIT_ERROR, EXIT_STOPPED

ERROR_MARK = "error: "
LOCK = ".lock"
PARENT_HOLDS_STDIN = "SDFT_PARENT_HOLDS_STDIN"
"""Set for a child whose standard input its parent keeps open for as long as it lives."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set for one of several ranks: where it leaves its error for the process that started them."""
OF_MEMORY = re.compile(
    "allocate memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED"
    "|could not (?:create|execute) a primitive(?! desc)"
)
"""How a RuntimeError says that memory has run out: torch's own on a CPU, CUDA's, cuBLAS's, and
oneDNN's, whose descriptions are of what it cannot do at all."""
EXIT_CODE = "exit_code"
"""The key in that file for the exit code that the error stands for: a rank that is killed while it
exits has another one itself."""


class StageFailed(Exception):
    """A stage cannot go on; the message says what to change."""


class Stop:
    """Set by SIGTERM, SIGINT and the parent's death; the program ends at its next good moment."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        def request(*_: object) -> None:
            self.requested = True

        signal.signal(signal.SIGTERM, request)
        signal.signal(signal.SIGINT, request)
        if os.environ.get(PARENT_HOLDS_STDIN):
            when_orphaned(request)


def when_orphaned(end: Callable[[], None]) -> None:
    """Have `end` called, in a thread, when nobody holds our standard input any more."""

    def watch() -> None:
        with suppress(ConnectionResetError):  # who held it has left something unread
            while os.read(0, 1):
                pass
        end()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def exclusive(directory: Path) -> Generator[None]:
    """Hold the directory's lock of the operating system; waits while another process has it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{directory.name}: another process works on it; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def machine() -> str:
    """This machine since its last start, and its own numbering of processes."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.is_file():
        return platform.node()
    return f"{boot.read_text().strip()} {os.readlink(space)}"  # noqa: PTH115


def is_locked(directory: Path) -> bool:
    """Whether some process holds the directory's lock."""
    try:
        with (directory / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def run_program(main: Callable[[Path, Path, Stop], bool], smaller: str) -> None:
    """Run `main(spec file, directory, stop)` from the command line and exit with what it means.

    `smaller` is the setting that a person lowers where memory runs out.
    """
    if len(sys.argv) != 3:
        sys.exit(f"usage: python -m {main.__module__} SPEC.json DIRECTORY")
    from transformers.utils.logging import disable_progress_bar

    forget_garbage()
    stop = Stop()
    stop.listen()
    disable_progress_bar()
    try:
        finished = main(Path(sys.argv[1]), Path(sys.argv[2]), stop)
    except BadInput as error:
        _end(str(error), EXIT_BAD_INPUT)
    except (StageFailed, OSError, RuntimeError, MemoryError) as error:
        if (problem := _explained(error, smaller)) is None:
            raise
        _end(problem, EXIT_ERROR)
    sys.exit(0 if finished else EXIT_STOPPED)


def forget_garbage() -> None:
    """Let the garbage collector pass over all that is imported by now, and over everything at the
    end: with a million objects of libraries each of its rounds takes a second."""
    gc.freeze()
    atexit.register(gc.freeze)


def _end(problem: str, code: int) -> NoReturn:
    """Say it, or as one of several ranks leave it to the process that started them."""
    said = json.dumps({"message": problem, EXIT_CODE: code})
    try:
        write_atomically(Path(os.environ[ERROR_FILE]), said)
    except (KeyError, OSError):  # it is no rank, or the disk is full
        print(f"{ERROR_MARK}{problem}", file=sys.stderr, flush=True)
    sys.exit(code)


def _explained(error: Exception, smaller: str) -> str | None:
    """What a person can do about an error that is no fault of the program; None for any other."""
    if isinstance(error, StageFailed):
        return str(error)
    if is_of_memory(error):
        said = str(error).partition("\n")[0] or type(error).__name__
        return (
            f"out of memory ({said}); what was saved before is untouched: set {smaller} to less "
            "than it is, or give it more memory"
        )
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'a file'}: {error.strerror or error}; what was saved before is "
            "untouched: put the disk in order and run the same command again"
        )
    return None


def is_of_memory(error: Exception) -> bool:
    """Whether memory has run out, of the machine or of a GPU, whichever library says it."""
    from torch import OutOfMemoryError

    if isinstance(error, MemoryError | OutOfMemoryError):
        return True
    number = error.errno if isinstance(error, OSError) else None
    return number == errno.ENOMEM or OF_MEMORY.search(str(error)) is not None
