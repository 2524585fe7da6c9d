"""Directories that appear under their name whole or not at all, and stay after a power cut."""

import errno
import os
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
    """Turn what safetensors makes of a full or broken disk back into an OSError."""
    try:
        yield
    except SafetensorError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
