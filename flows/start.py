"""Where `sdft` begins: a signal while something is being imported is no traceback."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    atexit.register(gc.freeze)  # the collector's last round, over all libraries, takes seconds
    from flows.cli import main as command_line

    try:
        command_line()
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


@contextmanager
def importing() -> Generator[None]:
    """Inside, nothing is looked through for garbage; what is there afterwards never is."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _interrupt(_signal: int, frame: FrameType | None) -> None:
    """A Ctrl-C: a KeyboardInterrupt, but within an import the end at once."""
    end_within_import(frame, 130, "interrupted")
    raise KeyboardInterrupt


def end_within_import(frame: FrameType | None, code: int, word: str) -> None:
    """End at once where a signal came while something was being imported.

    Nothing is at stake there, and native code that is being imported swallows an exception or turns
    it into an error of its own.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _say(word)
            os._exit(code)
        frame = frame.f_back


def _say(word: str) -> None:
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"error: {word}\n".encode())
