"""`python -m sdft.forking MODULE ...`: imports modules once, and forks for every program to run.

What takes a program seconds to import it has at once as a fork. Standard input is a Unix socket, on
which each byte brings open files: a socket that becomes the program's standard input, the log for
its output, and locks for it to hold. By its socket the program is asked for in a line of JSON:
`program` (the module and its arguments), `environment`, `path` (sys.path) and `directory`. Two
lines come back: its process number and, in the end, its exit code. When nobody holds the other end
of standard input any more, no more programs are started.

Nothing may be computed here before a fork: threads of OpenMP do not survive it, nor does CUDA.
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

MOST_FILES = 250
"""That a byte can bring."""


def serve() -> None:
    """Fork for whatever is asked; returns only in a fork that is to run `sys.argv`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked here
    with socket.socket(fileno=os.dup(0)) as requests:
        while True:
            asked, files, *_ = socket.recv_fds(requests, 1, MOST_FILES)
            if not asked:
                os._exit(0)  # there is nothing to put away, and it would take seconds
            if os.fork() == 0:
                break
            for file in files:
                os.close(file)
    talk, log, *locks = files
    for output in (1, 2):
        os.dup2(log, output)
    os.close(log)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if program := os.fork():
        _wait_for(program, talk, locks)
    os.setpgid(0, 0)
    os.dup2(talk, 0)
    os.close(talk)
    _take_over()


def _wait_for(program: int, talk: int, locks: list[int]) -> None:
    """Tell on the socket what becomes of a program; does not return."""
    with suppress(OSError):  # it has done so itself
        os.setpgid(program, program)
    for lock in locks:  # the program's alone
        os.close(lock)
    with suppress(OSError):  # nobody listens any more
        os.write(talk, f"{program}\n".encode())
    _, status = os.waitpid(program, 0)
    with suppress(OSError):
        os.write(talk, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _take_over() -> None:
    """Be as a new process would be that who asks had started."""
    with open(0, "rb", buffering=0, closefd=False) as lines:
        line = lines.readline()
    if not line:
        os._exit(0)  # who asked is gone
    request = json.loads(line)
    sys.argv = request["program"]
    sys.path[:] = request["path"]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    with suppress(OSError):  # what `top` calls it, where there is /proc
        Path("/proc/self/comm").write_text(sys.argv[0])


if __name__ == "__main__":
    for module in sys.argv[1:]:
        import_module(module)
    gc.freeze()
    serve()
    sys.modules.pop(sys.argv[0], None)  # it is to run, not to be imported
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
