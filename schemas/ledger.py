"""The ledger's entries: who let which version in, and when; and the hash chain over them."""

from typing import Literal

from schemas.base import Contract, Sealed

Kind = Literal[
    "registered", "verdict", "promoted", "refused", "rolled back", "overridden", "repaired"
]
CHANGES = ("promoted", "rolled back")
"""The kinds that put a champion in place."""
GENESIS = "0" * 64
"""What the first entry has for the hash of the one before."""


class Draft(Contract):
    """What is to be written down; `Entry` adds who, where, when and the place in the chain."""

    kind: Kind
    name: str
    """The registered model."""
    version: str | None
    """The version it is about; for a change of champion, the new one."""
    epoch: int | None = None
    """The number of the change of champion, counted from 1 a name: the fencing token."""
    expected: str | None = None
    """The champion that a change of champion replaces."""
    skill: str | None = None
    parent_version: str | None = None
    stage_key: str | None = None
    model_hash: str | None = None
    data_hash: str | None = None
    evidence_hash: str | None = None
    """The hash of the record, metrics, data and validation of the stage, as its run has them."""
    package_hash: str | None = None
    """The hash of every file of the registered package (`sdft.modelfiles.model_hash`)."""
    verdict_hash: str | None = None
    decision: str | None = None
    reason: str = ""


class Entry(Draft, Sealed):
    """One line of the ledger, sealed by its own hash and tied to the line before."""

    seq: int
    time: str
    """UTC, ISO 8601."""
    who: str
    host: str
    code_version: str
    previous: str

    def told_of(self, version: str) -> str:
        """What happened to a version by this entry: a rollback puts one back and takes others."""
        return "put back" if self.kind == "rolled back" and self.version == version else self.kind


class Champion(Contract):
    """The state of a name's championship: the newest change and the version it put in place."""

    version: str | None = None
    epoch: int = 0
