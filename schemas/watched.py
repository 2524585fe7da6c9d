"""Skills that are dropped into a watched folder or S3 prefix, and the order in which they came.

A skill's directory, named after it, holds its data, a skill.yaml with the keys that a skill has in
a curriculum, and, written last, a file COMPLETE.
"""

from typing import Literal

from schemas.base import Contract, Sealed
from schemas.curriculum import Curriculum
from schemas.digest import digest_json
from schemas.stage import FileDigest

COMPLETE, SKILL_FILE = "COMPLETE", "skill.yaml"


class SourceFile(Contract):
    """A file of a directory as its listing shows it; `path` is inside the directory."""

    path: str
    size_bytes: int
    changed_ns: int


class Drop(Contract):
    """A directory that is there now."""

    name: str
    files: tuple[SourceFile, ...]
    problems: tuple[str, ...] = ()
    """Paths that cannot or must not be read, with the reason."""

    @property
    def refused(self) -> str | None:
        """Why nothing of it may be read; None where it may."""
        paths = [file.path for file in self.files]
        if self.problems:
            return self.problems[0]
        if odd := [path for path in paths if not _stays_inside(path)]:
            return f"{odd[0]!r} is no path of a file inside it"
        if COMPLETE not in paths:
            return f"incomplete: it has no file {COMPLETE}, which is written last"
        if SKILL_FILE not in paths:
            return f"it has no {SKILL_FILE}"
        return None


def _stays_inside(path: str) -> bool:
    odd = any(part in ("", ".", "..") for part in path.split("/"))
    return not odd and path.isprintable() and "\\" not in path


class Copy(Sealed):
    """What a home has of a directory: written beside the copied files when they are all there."""

    listing: tuple[SourceFile, ...]
    """What was copied, without the marker."""
    files: tuple[FileDigest, ...]

    @property
    def content_hash(self) -> str:
        """The directory's identity: sha256 over its files' paths and contents."""
        return digest_json([[file.path, file.sha256] for file in self.files])


class Recorded(Contract):
    """A skill's place in the order, which is written once."""

    skill: str
    content_hash: str


class Remark(Contract):
    """Why a directory was not taken, or not as it is now."""

    name: str
    said: str


class Watched(Contract):
    """A curriculum with the skills that were found, those recorded first."""

    curriculum: Curriculum
    recorded: tuple[Recorded, ...] = ()
    new: tuple[Recorded, ...] = ()
    remarks: tuple[Remark, ...] = ()

    @property
    def state(self) -> dict[str, Literal["recorded", "new"]]:
        """By skill that came from the watched folder: whether its place is written down."""
        places: dict[str, Literal["recorded", "new"]] = {}
        for one in self.recorded:
            places[one.skill] = "recorded"
        for one in self.new:
            places[one.skill] = "new"
        return places
