"""Where `sdft` begins: a Ctrl-C while the rest is still being imported is no traceback."""

import os
import signal
import sys


def main() -> None:
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        # Native code that is being imported may turn a KeyboardInterrupt into an error of its own.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from flows.cli import main as command_line

    signal.signal(signal.SIGINT, usual)
    try:
        command_line()
    except KeyboardInterrupt:
        sys.exit(130)
