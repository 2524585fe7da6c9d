"""What ends a run and is no fault of the program: told to people without a traceback."""

import errno
import shutil
from pathlib import Path
from typing import TypeGuard

_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
FULL_BYTES = 2**20
"""A disk with less free space counts as full."""


class RunFailed(RuntimeError):
    """A run cannot go on; the message says why, and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, after it has saved its state."""


def is_of_disk(error: BaseException) -> TypeGuard[OSError]:
    """Whether it says that a disk is full, broken or not ours to use: nothing about what a file
    holds."""
    return isinstance(error, OSError) and error.errno in _DISK_TROUBLE


def is_full(directory: Path) -> bool:
    """Whether its disk is full, which who writes there may not be able to say."""
    return shutil.disk_usage(directory).free < FULL_BYTES
