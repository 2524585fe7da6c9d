"""Directories that appear under their name whole or not at all, and stay after a power cut."""

import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from schemas.base import sync

PARTIAL = ".partial-"
"""How the name of a directory that is still being written begins; its process's number follows."""


@contextmanager
def placed(target: Path) -> Generator[Path]:
    """A new directory to write into, which becomes `target` when all went well.

    What was at `target` is replaced. Whatever goes wrong takes the half-written directory away;
    only SIGKILL leaves it, under a name that nothing reads.
    """
    partial = target.with_name(f"{PARTIAL}{os.getpid()}-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with disk_errors(target):
            yield partial
            for path in partial.rglob("*"):
                sync(path)
            sync(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn what safetensors and Arrow make of a full or broken disk into OSErrors of this path."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None
        if named or (number := _number(error)) is None:  # the second is of no disk, say a server's
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _number(error: Exception) -> int | None:
    """The operating system's number of an error, which libraries put into the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = re.search(r"(?:os error|errno) (\d+)", str(error))
    return int(said[1]) if said else None
