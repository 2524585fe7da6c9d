"""The ledger read as a whole: is the chain unbroken, who is and was champion. Pure functions."""

from collections.abc import Iterable, Sequence

from schemas.base import BadInput
from schemas.ledger import GENESIS, Champion, Draft, Entry, Kind


def first_break(entries: Sequence[Entry]) -> str | None:
    """Where and how the chain is broken, or None when every entry is as it was written."""
    previous = GENESIS
    for place, entry in enumerate(entries, 1):
        if entry.seq != place:
            return f"ledger entry {place}: is missing (the next one there is {entry.seq})"
        if entry.hash != entry.sealed:
            return f"ledger entry {place}: was altered; its hash is not that of its content"
        if entry.previous != previous:
            return f"ledger entry {place}: does not follow entry {place - 1}, which was replaced"
        previous = entry.hash
    return None


def champion(entries: Iterable[Entry]) -> Champion:
    """The champion after one name's entries."""
    state = Champion()
    for entry in entries:
        if entry.epoch is not None:
            state = Champion(version=entry.version, epoch=entry.epoch)
    return state


def champions(entries: Iterable[Entry]) -> list[str]:
    """One name's champions, oldest first, as far as they were not rolled back; the last one rules.

    A rollback to a version further down takes away all above it, so rolling back again goes one
    further. A rollback to a version that is no longer there puts it on top.
    """
    stack: list[str] = []
    for entry in entries:
        _take_in(stack, entry)
    return stack


def _take_in(stack: list[str], entry: Entry) -> list[str]:
    """Change the champions by one more entry; returns those that it took away."""
    taken: list[str] = []
    if entry.epoch is None or entry.version is None:
        return taken
    if entry.kind == "rolled back" and entry.version in stack:
        while stack[-1] != entry.version:
            taken.append(stack.pop())
    elif stack[-1:] != [entry.version]:
        stack.append(entry.version)
    return taken


def withdrawn(entries: Sequence[Entry]) -> set[str]:
    """Versions that a rollback took away, and that no champion of today is built on."""
    parents = {one.version: one.parent_version for one in entries if one.kind == "registered"}
    kept: set[str | None] = {None}
    for version in champions(entries):
        line: str | None = version
        while line not in kept:
            kept.add(line)
            line = parents.get(line)
    return {one.version for one in entries if one.epoch is not None and one.version} - kept


def history(entries: Iterable[Entry], version: str) -> tuple[Entry, ...]:
    """One name's entries about a version, and the rollbacks that took it away."""
    stack: list[str] = []
    found: list[Entry] = []
    for entry in entries:
        taken = version in _take_in(stack, entry) and version not in stack
        taken = taken or version == entry.expected  # which was let in twice, it may be
        if entry.version == version or (entry.kind == "rolled back" and taken):
            found.append(entry)
    return tuple(found)


def newest(entries: Iterable[Entry], version: str | None, *kinds: str) -> Entry | None:
    """The last entry of these kinds about a version."""
    found = [one for one in entries if one.version == version and one.kind in kinds]
    return found[-1] if found else None


def ancestry(entries: Iterable[Entry], version: str | None) -> list[Entry]:
    """The registrations from the first stage to a version, by parents; empty for the base model.

    Raises BadInput where one is missing.
    """
    registered = {one.version: one for one in entries if one.kind == "registered"}
    line: list[Entry] = []
    while version is not None:
        if version not in registered:
            raise BadInput(
                f"version {version}: the entry that registered it is not in the ledger any more; "
                "sdft ledger NAME says where its chain is broken"
            )
        line.append(registered[version])
        version = registered[version].parent_version
    return line[::-1]


def skills_of(entries: Iterable[Entry], version: str | None) -> set[str]:
    """The skills that a version was given."""
    return {one.skill for one in ancestry(entries, version) if one.skill is not None}


def let_in(entries: Sequence[Entry], version: str) -> bool:
    """Whether the next stage may start from a version: it passed, or a person overrode that."""
    verdict, override = (newest(entries, version, kind) for kind in ("verdict", "overridden"))
    if verdict is None:
        return False
    overridden = override is not None and override.verdict_hash == verdict.verdict_hash
    return verdict.decision == "pass" or overridden


def about(registration: Draft, kind: Kind, verdict_hash: str | None, decision: str | None) -> Draft:
    """An entry about a registered version: its identity and hashes, and its verdict's."""
    fields = {field: getattr(registration, field) for field in Draft.model_fields}
    own = {"kind": kind, "reason": "", "verdict_hash": verdict_hash, "decision": decision}
    return Draft.model_validate(fields | own)
