"""Validated data: what a stage and an evaluation stand on."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from schemas.base import Contract, Sealed
from schemas.stage import FileDigest

ROWS, SNAPSHOT = "rows.parquet", "snapshot.json"
"""In a snapshot's directory: its rows, and what is said of them."""
RESULT, PAGE = "result.json", "docs.html"
"""What Great Expectations found, and the same for people."""
ANCHORS = "anchors-"
"""How the names of those two begin where they are of a stage's anchors."""


class Origin(Contract):
    """A validated data set that some rows of a stage are from."""

    source: str
    data_hash: str


class AnchorsOrigin(Origin):
    """The anchors, and how their validation ended; a skill's own has its files."""

    quarantined: int
    rules: int
    rules_met: int


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
    rehearsed: Annotated[dict[str, int], Field(exclude_if=lambda rows: not rows)] = {}
    """Of the rows after the own ones, by skill that they come from: what a stage learns again."""
    anchors: Annotated[int, Field(exclude_if=lambda rows: not rows)] = 0
    """Of the rows the last ones: prompts that the stage is to answer as before."""
    own_hash: Annotated[str, Field(exclude_if=lambda one: not one)] = ""
    """The data hash of the own rows alone, where there are others."""
    rehearsed_from: Annotated[dict[str, Origin], Field(exclude_if=lambda one: not one)] = {}
    """By skill, the rows that it was learned from."""
    anchors_from: Annotated[AnchorsOrigin | None, Field(exclude_if=lambda one: one is None)] = None

    @property
    def made_from(self) -> set[str]:
        """The hashes of the data that its rows are from, where they are from several sets."""
        hashes = {one.data_hash for one in self.rehearsed_from.values()}
        hashes |= {self.anchors_from.data_hash} if self.anchors_from else set()
        return hashes | {self.own_hash} if self.own_hash else hashes

    def at(self, directory: Path) -> Self:
        """The same data in a copy of their directory."""
        file = directory / Path(self.file).name
        return self.model_copy(update={"directory": str(directory), "file": str(file)}).seal()


class SuiteData(Contract):
    """What a curriculum's suite stands on: items, and for a skill its demonstrations."""

    eval: Snapshot
    train: Snapshot | None

    def under(self, train: Path, items: Path) -> Self:
        """The same data in copies of their directories."""
        assert self.train is not None
        return self.model_copy(update={"eval": self.eval.at(items), "train": self.train.at(train)})
