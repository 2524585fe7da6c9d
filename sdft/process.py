"""What the trainer and the evaluator share as programs: signals, exit codes, one at a time."""

import fcntl
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from schemas.base import BadInput
from schemas.stage import EXIT_BAD_INPUT, EXIT_STOPPED

ERROR_MARK = "error: "


class Stop:
    """Set by SIGTERM and SIGINT; the program ends at its next good moment."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        def request(_signal: int, _frame: FrameType | None) -> None:
            self.requested = True

        signal.signal(signal.SIGTERM, request)
        signal.signal(signal.SIGINT, request)


@contextmanager
def exclusive(directory: Path) -> Generator[None]:
    """Hold the directory's lock of the operating system; waits while another process has it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{directory.name}: another process works on it; waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_program(main: Callable[[Path, Path, Stop], bool]) -> None:
    """Run `main(spec file, directory, stop)` from the command line and exit with what it means."""
    if len(sys.argv) != 3:
        sys.exit(f"usage: python -m {main.__module__} SPEC.json DIRECTORY")
    from transformers.utils.logging import disable_progress_bar

    stop = Stop()
    stop.listen()
    disable_progress_bar()
    try:
        finished = main(Path(sys.argv[1]), Path(sys.argv[2]), stop)
    except BadInput as error:
        print(f"{ERROR_MARK}{error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(0 if finished else EXIT_STOPPED)
