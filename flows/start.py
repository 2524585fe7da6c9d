"""Where `sdft` begins: a Ctrl-C while the rest is still being imported is no traceback."""

import sys


def main() -> None:
    try:
        from flows.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.exit(130)
