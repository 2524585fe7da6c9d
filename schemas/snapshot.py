"""Validated data: what a stage and an evaluation stand on."""

from schemas.base import Contract, Sealed
from schemas.stage import FileDigest


class Snapshot(Sealed):
    """A validated data set in canonical form."""

    name: str
    source: str
    directory: str
    file: str
    files: tuple[FileDigest, ...]
    """Of the directory: rows, validation result, its page, what is in quarantine."""
    data_hash: str
    rows: int
    quarantined: int


class SuiteData(Contract):
    """What a curriculum's suite stands on: items, and for a skill its demonstrations."""

    eval: Snapshot
    train: Snapshot | None
