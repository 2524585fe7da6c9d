"""Which versions hold something: a skill, a row, a data set, a model, the base model below."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from mlflow.exceptions import MlflowException

from schemas.base import BadInput
from schemas.digest import digest_json
from schemas.ledger import Entry
from schemas.lineage import BASE_MODEL, DataFacts, Trace, Traces, Unread
from schemas.stage import StageRecord
from sdft.chain import ancestry
from sdft.record import RECORD
from sdft.rehearsal import owners
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.lineage import aliases_of, data_facts, data_folder, kept, row_hashes
from tasks.packages import open_registered
from tasks.tracking import open_client, pass_outage

SHORTEST_HASH = 8


class Find(NamedTuple):
    """What of a stage is meant by what was looked for."""

    what: str
    skill: str
    """That it is of; empty for anchors."""


def trace(home: Home, wanted: str) -> Traces:
    """Every version, of every name, that holds a skill, or what a hash names.

    `wanted` is a skill's name, or the hash (from 8 digits on) of a data row, a data set, a stage, a
    model or a base model. The ledger is asked first; the runs are read only for what it does not
    know (rows and sets of rows), and what cannot be read is listed. Raises BadInput for a hash that
    is too short.
    """
    everything = Ledger(home).entries()
    registered = [one for one in everything if one.kind == "registered"]
    by_skill = any(one.skill == wanted for one in registered)
    if not by_skill and not re.fullmatch(rf"[0-9a-f]{{{SHORTEST_HASH},64}}", wanted):
        raise BadInput(
            f"{wanted!r}: is neither a skill that was learned nor {SHORTEST_HASH} to 64 digits of "
            "a hash"
        )
    holds = {one.hash: _in_ledger(one, wanted, by_skill) for one in registered}
    unread: dict[str, Unread] = {}
    known = {find.what for finds in holds.values() for find in finds}
    if known <= {"model hash"}:  # a model learned here can be another one's base
        bases, unread = _ask_stages(home, registered, _as_base, wanted)
        holds = bases | {key: finds for key, finds in holds.items() if finds}
    named = {find.what for finds in holds.values() for find in finds}
    if named <= {"data hash"}:  # which another stage may have learned with other rows
        others = [one for one in registered if not holds.get(one.hash)]
        found, failed = _ask_stages(home, others, _among_data, wanted)
        holds, unread = holds | found, unread | failed
    traces: list[Trace] = []
    for one in registered:
        entries = [entry for entry in everything if entry.name == one.name]
        version = one.version or ""
        traces += [
            Trace(
                name=one.name,
                version=version,
                skill=find.skill,
                learned_with=origin.skill or "",
                came_with=origin.version or "",
                found=find.what,
                aliases=aliases_of(entries, version),
            )
            for origin in ancestry(entries, version)
            for find in holds.get(origin.hash, [])
        ]
    return Traces(found=tuple(traces), unread=tuple(unread.values()))


def _in_ledger(registered: Entry, wanted: str, by_skill: bool) -> list[Find]:
    """What of a stage is meant by `wanted`, as the ledger knows it."""
    skill = registered.skill or ""
    if by_skill:
        return [Find("skill", skill)] if skill == wanted else []
    for what in ("data_hash", "stage_key", "model_hash", "package_hash"):
        if (getattr(registered, what) or "").startswith(wanted):
            return [Find(what.replace("_", " "), skill)]
    return []


def _ask_stages(
    home: Home,
    registered: list[Entry],
    look: Callable[[Home, Entry, str], list[Find]],
    wanted: str,
) -> tuple[dict[str, list[Find]], dict[str, Unread]]:
    """What a look at every stage finds, and where it fails; by the registration's hash."""
    holds: dict[str, list[Find]] = {}
    unread: dict[str, Unread] = {}
    for one in registered:
        try:
            holds[one.hash] = look(home, one, wanted)
        except (BadInput, MlflowException, OSError, pa.ArrowException) as error:  # gone, or altered
            pass_outage(error, home)
            reason = str(error).removeprefix(f"{one.name}/{one.version}: ")
            unread[one.hash] = Unread(name=one.name, version=one.version or "", reason=reason)
    return holds, unread


def _as_base(home: Home, registered: Entry, wanted: str) -> list[Find]:
    """Whether a first stage was trained from the base model with this hash."""
    if registered.parent_version is not None:
        return []
    file = home.stages / (registered.stage_key or "")[:32] / RECORD
    if not file.is_file():  # learned on another machine
        file = open_registered(open_client(home), registered).file(RECORD)
    record = StageRecord.read(file)
    is_base = record.spec.parent_hash.startswith(wanted)
    return [Find(BASE_MODEL, registered.skill or "")] if is_base else []


def _among_data(home: Home, registered: Entry, wanted: str) -> list[Find]:
    """The places of the rows with this hash, by the skill that they are of; or a part of them."""
    skill, opened = registered.skill or "", open_registered(open_client(home), registered)
    hashes, data = kept(home, opened.label, opened.run, data_folder(skill), _data)
    if (len(hashes), digest_json([*hashes])) != (data.rows, registered.data_hash):
        raise BadInput("its data rows are not those that were registered")
    parts = {skill: data.own_hash, "": data.anchors_from.data_hash if data.anchors_from else ""}
    finds = [Find("data hash", of) for of, one in parts.items() if one.startswith(wanted)]
    places: dict[str, list[str]] = {}
    for number, (owner, one) in enumerate(zip(owners(skill, data), hashes, strict=True), 1):
        if one.startswith(wanted):
            places.setdefault(owner, []).append(str(number))
    return finds + [Find(f"row {', '.join(rows)}", owner) for owner, rows in places.items()]


def _data(folder: Path) -> tuple[list[str], DataFacts]:
    return row_hashes(folder), data_facts(folder)
