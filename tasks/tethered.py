"""`python -m tasks.tethered MODULE ...`: a module as a program that its parent's death ends.

It gets SIGTERM when nobody holds its standard input any more, also where the parent was killed.
"""

import os
import runpy
import signal
import subprocess
import sys
from typing import Any

from sdft.process import when_orphaned


def tethered(args: list[str], **kwargs: Any) -> subprocess.Popen[Any]:
    """Start `python -m MODULE ...`, which ends when we are dead, and not before.

    In a session of its own: a Ctrl-C in a terminal, or a SIGTERM for our group, is not for it.
    """
    python, dash_m, *program = args
    command = [python, dash_m, __name__, *program]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **kwargs)


if __name__ == "__main__":
    when_orphaned(lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
