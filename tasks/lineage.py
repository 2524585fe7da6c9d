"""The lineage of a version, read from registry, runs and ledger; and what can be asked of it."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from schemas.base import BadInput
from schemas.digest import digest_json
from schemas.ledger import Entry
from schemas.lineage import (
    BASE_MODEL,
    DataFacts,
    Lineage,
    LineageDiff,
    LineageStage,
    Trace,
    Traces,
    Unread,
)
from schemas.snapshot import Snapshot
from schemas.stage import StageRecord
from sdft.chain import ancestry, newest
from sdft.compare import compare
from sdft.record import RECORD
from tasks.aliases import CHAMPION, wanted_aliases
from tasks.console import shown_address
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.packages import Registered, open_registered, run_file
from tasks.tracking import open_client, pass_outage

SHORTEST_HASH = 8


def resolve(home: Home, reference: str) -> tuple[str, str]:
    """Name and version of `NAME` (its champion), `NAME@alias` or `NAME/version`, by the ledger.

    Raises BadInput where there is none.
    """
    match = re.fullmatch(r"([^@/]+)(?:@([^@/]+)|/(\d+))?", reference)
    if match is None:
        raise BadInput(f"{reference!r}: write NAME, NAME@alias or NAME/version")
    name, alias, version = match.groups()
    entries = Ledger(home).entries(name)
    if not entries:
        raise BadInput(f"{name}: is not in the ledger of {home.root}; see sdft status")
    if version is not None:
        if newest(entries, version, "registered") is None:
            raise BadInput(f"{name}/{version}: is not in the ledger; see sdft status")
        return name, version
    aliases = wanted_aliases(entries)
    wanted = alias or CHAMPION
    if wanted not in aliases:
        raise BadInput(
            f"{name}@{wanted}: the aliases are {' and '.join(aliases)}; what another one points to "
            f"is asked for by its version: {name}/VERSION, see sdft status"
        )
    if (found := aliases[wanted]) is None:
        raise BadInput(f"{name}: has no {wanted}")
    return name, found


def read_lineage(home: Home, reference: str) -> Lineage:
    """The whole story of a version; nothing in it is proven yet (see `tasks.proof`)."""
    name, version = resolve(home, reference)
    entries, client = Ledger(home).entries(name), open_client(home)
    line = [open_registered(client, one) for one in ancestry(entries, version)]
    stages = tuple(_stage(home, entries, one, number) for number, one in enumerate(line, 1))
    first = StageRecord.read(line[0].file(RECORD))
    return Lineage(
        name=name,
        version=version,
        aliases=_aliases(entries, version),
        base_path=first.spec.parent_dir,
        base_hash=first.spec.parent_hash,
        stages=stages,
    )


def _aliases(entries: list[Entry], version: str) -> tuple[str, ...]:
    return tuple(alias for alias, at in wanted_aliases(entries).items() if at == version)


def _stage(home: Home, entries: list[Entry], registered: Registered, number: int) -> LineageStage:
    run, version = registered.run, registered.entry.version or ""
    record = StageRecord.read(registered.file(RECORD))
    verdict = newest(entries, version, "verdict")
    return LineageStage(
        version=version,
        stage=number,
        skill=registered.entry.skill or "",
        parent_version=registered.entry.parent_version,
        parent_hash=record.spec.parent_hash,
        model_hash=record.model_hash,
        stage_key=record.key,
        files=record.files,
        data=_data(registered.file(f"validation/{registered.entry.skill}/train")),
        settings=record.spec.training.model_dump(mode="json") | {"seed": record.spec.seed},
        steps=record.steps,
        train_seconds=record.train_seconds,
        code_version=record.code_version,
        environment=record.environment,
        run_id=run.info.run_id,
        run_link=_link(home, run),
        started=_iso(run.info.start_time),
        ended=_iso(run.info.end_time),
        scores={
            name.removeprefix("eval/"): value
            for name, value in run.data.metrics.items()
            if name.startswith("eval/")
        },
        decision=(verdict and verdict.decision) or "none",
        history=tuple(one for one in entries if one.version == version),
    )


def _data(folder: Path) -> DataFacts:
    snapshot = Snapshot.read(folder / "snapshot.json")
    statistics = json.loads((folder / "result.json").read_text(encoding="utf-8"))["statistics"]
    return DataFacts(
        source=snapshot.source,
        rows=snapshot.rows,
        quarantined=snapshot.quarantined,
        rehearsed=snapshot.rehearsed,
        anchors=snapshot.anchors,
        data_hash=snapshot.data_hash,
        rules=statistics["evaluated_expectations"],
        rules_met=statistics["successful_expectations"],
    )


def _link(home: Home, run: Run) -> str:
    address = shown_address(home.tracking_uri)
    if address.startswith("http"):
        return f"{address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return f"{address}#{run.info.run_id}"


def _iso(milliseconds: int | None) -> str:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).isoformat()


def row_hashes(run: Run, skill: str) -> list[str]:
    """The hashes of a stage's demonstrations, in order."""
    file = run_file(run, f"validation/{skill}/train/rows.parquet")
    return pq.read_table(file, columns=["row_hash"]).column("row_hash").to_pylist()


def diff_versions(home: Home, before: str, after: str) -> LineageDiff:
    """What changed from one version to another: skills, rows, settings, scores."""
    client = open_client(home)
    sides = (read_lineage(home, before), read_lineage(home, after))
    rows = {
        stage.data.data_hash: row_hashes(client.get_run(stage.run_id), stage.skill)
        for side in sides
        for stage in side.stages
    }
    return compare(*sides, rows)


def trace(home: Home, wanted: str) -> Traces:
    """Every version, of every name, that holds a skill, or what a hash names.

    `wanted` is a skill's name, or the hash (from 8 digits on) of a data row, a data set, a stage, a
    model or a base model. The ledger is asked first; the runs are read only for what it does not
    know, and what cannot be read is listed. Raises BadInput for a hash that is too short.
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
    if {*holds.values()} <= {"", "model hash"}:  # a model learned here can be another one's base
        bases, unread = _ask_stages(home, registered, _as_base, wanted)
        holds = bases | {key: what for key, what in holds.items() if what}
    if not any(holds.values()):
        holds, failed = _ask_stages(home, registered, _among_rows, wanted)
        unread |= failed
    traces: list[Trace] = []
    for one in registered:
        entries = [entry for entry in everything if entry.name == one.name]
        version = one.version or ""
        traces += [
            Trace(
                name=one.name,
                version=version,
                skill=origin.skill or "",
                came_with=origin.version or "",
                found=found,
                aliases=_aliases(entries, version),
            )
            for origin in ancestry(entries, version)
            if (found := holds.get(origin.hash))
        ]
    return Traces(found=tuple(traces), unread=tuple(unread.values()))


def _in_ledger(registered: Entry, wanted: str, by_skill: bool) -> str:
    """What of a stage is meant by `wanted`, as the ledger knows it; empty for nothing."""
    if by_skill:
        return "skill" if registered.skill == wanted else ""
    for what in ("data_hash", "stage_key", "model_hash", "package_hash"):
        if (getattr(registered, what) or "").startswith(wanted):
            return what.replace("_", " ")
    return ""


def _ask_stages(
    home: Home,
    registered: list[Entry],
    look: Callable[[Home, Entry, str], str],
    wanted: str,
) -> tuple[dict[str, str], dict[str, Unread]]:
    """What a look at every stage finds, and where it fails; by the registration's hash."""
    holds: dict[str, str] = {}
    unread: dict[str, Unread] = {}
    for one in registered:
        try:
            holds[one.hash] = look(home, one, wanted)
        except (BadInput, MlflowException, OSError, pa.ArrowException) as error:  # gone, or altered
            pass_outage(error, home)
            reason = str(error).removeprefix(f"{one.name}/{one.version}: ")
            unread[one.hash] = Unread(name=one.name, version=one.version or "", reason=reason)
    return holds, unread


def _as_base(home: Home, registered: Entry, wanted: str) -> str:
    """Whether a first stage was trained from the base model with this hash."""
    if registered.parent_version is not None:
        return ""
    file = home.stages / (registered.stage_key or "")[:32] / RECORD
    if not file.is_file():  # learned on another machine
        file = open_registered(open_client(home), registered).file(RECORD)
    record = StageRecord.read(file)
    return BASE_MODEL if record.spec.parent_hash.startswith(wanted) else ""


def _among_rows(home: Home, registered: Entry, wanted: str) -> str:
    """The places of the demonstrations with this hash."""
    run = open_registered(open_client(home), registered).run
    hashes = row_hashes(run, registered.skill or "")
    if digest_json([*hashes]) != registered.data_hash:
        raise BadInput("its data rows are not those that were registered")
    numbers = [number for number, one in enumerate(hashes, 1) if one.startswith(wanted)]
    return f"row {', '.join(map(str, numbers))}" if numbers else ""
