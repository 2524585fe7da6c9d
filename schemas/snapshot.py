"""Validated data: what a stage and an evaluation stand on."""

from schemas.base import Contract


class Snapshot(Contract):
    """A validated data set in canonical form."""

    name: str
    source: str
    directory: str
    file: str
    file_sha256: str
    data_hash: str
    rows: int
    quarantined: int


class SuiteData(Contract):
    """What a curriculum's suite stands on: items, and for a skill its demonstrations."""

    eval: Snapshot
    train: Snapshot | None
