"""Directories that appear under their name whole or not at all, and stay after a power cut."""

import errno
import os
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from schemas.base import sync
from schemas.digest import digest_text
from sdft.process import machine

PARTIAL = ".partial-"
"""How the name of a directory that is still being written begins."""
OLD_S = 24 * 3600
"""One of another machine's process, which may live, is kept so long."""


def partial_name() -> str:
    """How the name of a directory begins that this process is writing: it tells whose it is."""
    return f"{PARTIAL}{digest_text(machine())[:12]}-{os.getpid()}-"


def is_orphan(partial: Path) -> bool:
    """Whether nobody writes a directory of such a name any more."""
    on, _, rest = partial.name.removeprefix(PARTIAL).partition("-")
    number = rest.partition("-")[0]
    if on == digest_text(machine())[:12] and number.isdigit():
        return not psutil.pid_exists(int(number))
    return time.time() - partial.stat().st_mtime > OLD_S


@contextmanager
def placed(target: Path) -> Generator[Path]:
    """A new directory to write into, which becomes `target` when all went well.

    What was at `target` is replaced. Whatever goes wrong takes the half-written directory away;
    only SIGKILL leaves it, under a name that nothing reads.
    """
    partial = target.with_name(f"{partial_name()}{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with disk_errors(target):
            yield partial
            for path in partial.rglob("*"):
                sync(path)
            sync(partial)
            _put(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


def _put(partial: Path, target: Path) -> None:
    """Give a directory its name, whoever has it meanwhile."""
    while True:
        shutil.rmtree(target, ignore_errors=True)
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn what safetensors and Arrow make of a full or broken disk into OSErrors of this path."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None
        if named or (number := _number(error)) is None:  # a server's, say
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _number(error: Exception) -> int | None:
    """The operating system's number of an error, which libraries put into the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = re.search(r"(?:os error|errno) (\d+)", str(error))
    return int(said[1]) if said else None
