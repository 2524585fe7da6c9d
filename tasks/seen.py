"""Finished stages that nobody has touched since they were verified are not read again.

As git knows its files: one whose inode, size and times of change are those that it had when it was
hashed is the same. The time of a change is the kernel's, no program sets it back. What a disk gives
back wrong by itself is not noticed so; `sdft lineage --verify` reads everything.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from schemas.base import BadInput, Sealed
from schemas.stage import StageRecord
from sdft.record import ADAPTER, RECORD, verified_record
from sdft.stagelog import METRICS, ROLLOUTS

SEEN = "verified.json"
SETTLED_S = 2.0
"""A file that was modified less than this before it was read is not trusted: file systems' times
are coarse, and a second change could get the same one."""


class Seen(Sealed):
    """How the files of a stage directory were when all were found as its record lists them."""

    record: str
    """The record's hash."""
    files: dict[str, tuple[int, ...]]
    """By path: inode, size, times of the last modification and of the last change, in ns."""


def known_record(directory: Path) -> StageRecord | None:
    """What `verified_record` gives or raises; files are read only where they may have changed."""
    if not (directory / RECORD).is_file():
        return None
    now_ns, record = time.time_ns(), StageRecord.read(directory / RECORD)
    here = Seen(record=record.hash, files=dict(_marks(directory))).seal()
    if _remembered(directory) == here:
        return record
    verified_record(directory)
    if max(changed for *_, changed in here.files.values()) < now_ns - SETTLED_S * 10**9:
        with suppress(OSError):  # where it cannot be kept, all is read the next time too
            here.write(directory / SEEN)
    return record


def _remembered(directory: Path) -> Seen | None:
    try:
        return Seen.read(directory / SEEN)
    except BadInput:  # there is none, or it was altered: then all is read
        return None


def _marks(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    listed = [directory / METRICS]
    for folder in ("model", ADAPTER, ROLLOUTS):
        listed += sorted((directory / folder).rglob("*"))
    for path in listed:
        if path.exists():
            now = path.stat()
            marks = (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            yield str(path.relative_to(directory)), marks
