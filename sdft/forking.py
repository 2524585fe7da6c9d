"""`python -m sdft.forking MODULE ...`: imports modules once, and forks for every program to run.

What takes a program seconds to import it has at once as a fork. Standard input is a Unix socket, of
which each byte asks for a program and brings its open files: its standard input, which is a socket
too, its log, and the locks that it is to hold. By its standard input the program gets a line of
JSON: `program` (the module and its arguments), `environment` and `path` (sys.path). Two lines come
back: its process number and, from a second fork that waits for it, its exit code. When nobody holds
the other end of our standard input any more, no more programs are started.

Nothing may be computed here before a fork: threads of OpenMP do not survive it, nor does CUDA.
Those that libraries have started by then (OpenBLAS's, jemalloc's) are made for it.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

MOST_FILES = 253
"""That a message can bring: the kernel's limit."""
NOT_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Ignored here, also where a whole group gets them: we outlive a program to tell how it ended."""


def serve() -> None:
    """Fork for whatever is asked; returns only in a fork that is to run `sys.argv`."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in NOT_OURS}
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
    for file, number in ((talk, 0), (log, 1), (log, 2)):
        os.dup2(file, number)
    os.close(talk)
    os.close(log)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Who is told the program's number may send it a signal at once: that must wait, not be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, NOT_OURS)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if program := os.fork():
        _wait_for(program, locks)
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_OURS)
    _take_over()


def _wait_for(program: int, locks: list[int]) -> None:
    """Tell what becomes of a program; does not return. Signals stay blocked."""
    os.setpgid(program, program)  # or it does: before anybody knows its number
    for lock in locks:  # the program's alone
        os.close(lock)
    with suppress(OSError):  # nobody listens any more
        os.write(0, f"{program}\n".encode())
    _, status = os.waitpid(program, 0)
    with suppress(OSError):
        os.write(0, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _take_over() -> None:
    """Take the arguments, paths and environment of who asked, if that is still there."""
    try:
        request = json.loads(sys.stdin.readline())
    except (ConnectionResetError, json.JSONDecodeError):  # ended before all was said
        os._exit(0)
    if select.select([0], [], [], 0)[0]:  # the end: nothing else follows
        os._exit(0)
    sys.argv = request["program"]
    sys.path[:] = request["path"]
    os.environ.clear()
    os.environ.update(request["environment"])
    with suppress(OSError):  # what `top` calls it, where there is /proc
        Path("/proc/self/comm").write_text(sys.argv[0])


if __name__ == "__main__":
    for module in sys.argv[1:]:
        with suppress(Exception):  # the program meets it again, and tells
            import_module(module)
    sys.stdout.flush()  # or each program says again what was said meanwhile
    gc.freeze()
    serve()
    sys.modules.pop(sys.argv[0], None)  # it is to run, not to be imported
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
