"""What was brought from elsewhere, by hash, on this machine's disk: verified, bounded, shared.

An entry is a folder that is filled file by file, so that what a crash left is gone on with. Who
fills or removes one has its lock of the operating system alone; who uses one shares it, with the
programs that it starts. The lock ends with all of them.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from schemas.base import BadInput
from schemas.parcel import Parcel
from schemas.stage import FileDigest
from sdft.modelfiles import all_files
from tasks.failures import RunFailed

LIMIT = "SDFT_CACHE_BYTES"
"""Environment variable: what the cache of a home may take, in bytes."""
USUAL_LIMIT = 100 * 10**9
Bring = Callable[[Path, list[FileDigest]], None]
"""Puts files into an entry's folder."""


def limit_bytes() -> int:
    """What the cache may take; raises BadInput where it is set to no such number."""
    said = os.environ.get(LIMIT) or str(USUAL_LIMIT)
    if not said.isdecimal() or int(said) == 0:
        raise BadInput(f"{LIMIT} must be a number of bytes, such as {USUAL_LIMIT}")
    return int(said)


class Cache:
    """Entries in one folder, a parcel each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._beside = folder / ".beside"  # not among the files, which others copy

    @contextmanager
    def holding(self, parcel: Parcel, bring: Bring) -> Generator[Path]:
        """The folder of a parcel, whole and verified, which nobody removes or changes meanwhile.

        Only what is missing or damaged is brought. Raises BadInput where what was brought is not
        what the parcel lists or is larger than the limit, RunFailed where there is no room for it
        beside what is in use.
        """
        entry = self.folder / parcel.name
        with self._lock(parcel.name, fcntl.LOCK_SH) as lock:
            while lacking(entry, parcel):  # between the two kinds of lock others have their turn
                fcntl.flock(lock, fcntl.LOCK_EX)
                if missing := lacking(entry, parcel):
                    self._reserve(parcel)
                    _remove_others(entry, parcel)
                    bring(entry, missing)
                    if wrong := lacking(entry, parcel):
                        (entry / wrong[0].path).unlink(missing_ok=True)
                        raise BadInput(f"{parcel.name}: {wrong[0].path} is not what it should be")
                fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(self.listing(parcel.name))
            yield entry

    def keep(self, parcel: Parcel, source: Path) -> None:
        """Take over the files of a folder that is the parcel, unless it is here already."""
        entry = self.folder / parcel.name
        if entry.exists():  # and perhaps in use for hours
            return
        with self._lock(parcel.name, fcntl.LOCK_EX):
            if not entry.exists():
                self._reserve(parcel)
                for path in source.iterdir():
                    path.rename(entry / path.name)

    def find(self, name: str) -> Parcel | None:
        """What an entry is to hold, if it is here; it may not be whole."""
        listing = self.listing(name)
        return Parcel.read(listing) if listing.is_file() else None

    def listing(self, name: str) -> Path:
        """Where it is written down what an entry is to hold; its time is that of the last use."""
        return self._beside / f"{name}.json"

    def _reserve(self, parcel: Parcel) -> None:
        """Make the entry's folder, which counts at its full size from then on, and room for it.

        What was not used for the longest time goes first; nothing goes that is in use.
        """
        limit = limit_bytes()
        if parcel.size_bytes > limit:
            raise BadInput(
                f"{parcel.name} takes {parcel.size_bytes} bytes, the cache {self.folder} may take "
                f"{limit}; set {LIMIT} to more"
            )
        with self._lock("", fcntl.LOCK_EX):
            entries = [one for one in self.folder.iterdir() if is_shown(Path(one.name))]
            others = sorted((one for one in entries if one.name != parcel.name), key=self._last_use)
            taken = sum(self._size_bytes(one) for one in others)
            for entry in others:
                size_bytes = self._size_bytes(entry)
                if taken + parcel.size_bytes <= limit:
                    break
                taken -= size_bytes if self._remove(entry) else 0
            if taken + parcel.size_bytes > limit:
                raise RunFailed(
                    f"{parcel.name} takes {parcel.size_bytes} bytes, and {taken} of the {limit} of "
                    f"the cache {self.folder} are in use; set {LIMIT} to more, or wait"
                )
            parcel.write(self.listing(parcel.name))
            (self.folder / parcel.name).mkdir(exist_ok=True)

    def _size_bytes(self, entry: Path) -> int:
        parcel = self.find(entry.name)
        return parcel.size_bytes if parcel else 0

    def _last_use(self, entry: Path) -> float:
        listing = self.listing(entry.name)
        return listing.stat().st_mtime if listing.is_file() else 0.0

    def _remove(self, entry: Path) -> bool:
        try:
            with self._lock(entry.name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(entry)
                self.listing(entry.name).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _lock(self, name: str, kind: int) -> Generator[int]:
        self._beside.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._beside / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.set_inheritable(lock, True)  # what is started meanwhile uses the entry too
            fcntl.flock(lock, kind)
            yield lock
        finally:
            os.close(lock)


def lacking(entry: Path, parcel: Parcel) -> list[FileDigest]:
    """What an entry lacks of its parcel, or has otherwise."""
    there = set(all_files(entry, is_shown))
    return [one for one in parcel.files if one not in there]


def _remove_others(entry: Path, parcel: Parcel) -> None:
    """Remove what is damaged, or was never in the parcel."""
    for one in all_files(entry, is_shown):
        if one not in parcel.files:
            (entry / one.path).unlink()


def is_shown(name: Path) -> bool:
    return not name.parts[0].startswith(".")
