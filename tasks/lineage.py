"""The lineage of a version, read from registry, runs and ledger; and what changed between two."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from schemas.base import BadInput
from schemas.digest import digest_json
from schemas.ledger import Entry
from schemas.lineage import DataFacts, Lineage, LineageDiff, LineageStage
from schemas.snapshot import ROWS, SNAPSHOT, Snapshot
from schemas.stage import StageRecord
from sdft.chain import ancestry, history, newest
from sdft.compare import compare
from sdft.record import RECORD
from tasks.aliases import CHAMPION, wanted_aliases
from tasks.artifacts import run_file
from tasks.console import shown_address
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.packages import Registered, open_registered
from tasks.tracking import open_client, pass_outage, run_page
from tasks.violations import rules_checked

Value = TypeVar("Value")
UNREADABLE = (MlflowException, OSError, ValueError, LookupError, pa.ArrowException)
"""How a file says that it is not there, or not what it was."""


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
    """The whole story of a version; nothing in it is proven yet (see `tasks.proof`).

    Raises BadInput where what it is read from is gone or cannot be read.
    """
    name, version = resolve(home, reference)
    entries, client = Ledger(home).entries(name), open_client(home)
    line = [open_registered(client, one) for one in ancestry(entries, version)]
    stages = tuple(_stage(home, entries, one, number) for number, one in enumerate(line, 1))
    first = kept(home, line[0].label, line[0].run, RECORD, StageRecord.read)
    return Lineage(
        name=name,
        version=version,
        aliases=aliases_of(entries, version),
        base_path=first.spec.parent_dir,
        base_hash=first.spec.parent_hash,
        stages=stages,
    )


def aliases_of(entries: list[Entry], version: str) -> tuple[str, ...]:
    return tuple(alias for alias, at in wanted_aliases(entries).items() if at == version)


def _stage(home: Home, entries: list[Entry], registered: Registered, number: int) -> LineageStage:
    run, version = registered.run, registered.entry.version or ""
    skill, label = registered.entry.skill or "", registered.label
    record = kept(home, label, run, RECORD, StageRecord.read)
    verdict = newest(entries, version, "verdict")
    return LineageStage(
        version=version,
        stage=number,
        skill=skill,
        parent_version=registered.entry.parent_version,
        parent_hash=record.spec.parent_hash,
        model_hash=record.model_hash,
        stage_key=record.key,
        files=record.files,
        data=kept(home, label, run, data_folder(skill), data_facts),
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
        history=history(entries, version),
    )


def kept(home: Home, label: str, run: Run, path: str, read: Callable[[Path], Value]) -> Value:
    """What a version's run keeps at a path.

    Raises BadInput where it is gone or cannot be read, Away in an outage of MLflow.
    """
    try:
        return read(run_file(run, path))
    except UNREADABLE as error:
        pass_outage(error, home)
        said = " ".join(str(error).split())
        raise BadInput(
            f"{label}: {path} of its run {run.info.run_id} is gone or cannot be read ({said}); "
            f"sdft lineage {label} --verify names what is not as it was registered"
        ) from None


def data_folder(skill: str) -> str:
    """Where a run keeps what its stage learned from."""
    return f"validation/{skill}/train"


def data_facts(folder: Path) -> DataFacts:
    """What a run keeps of its stage's data, without the rows."""
    snapshot = Snapshot.read(folder / SNAPSHOT)
    rules, met = rules_checked(folder)
    mixed = snapshot.rehearsed or snapshot.anchors
    return DataFacts(
        source=snapshot.source,
        rows=snapshot.rows,
        quarantined=snapshot.quarantined,
        rehearsed=snapshot.rehearsed,
        anchors=snapshot.anchors,
        data_hash=snapshot.data_hash,
        own_hash=snapshot.own_hash if mixed else snapshot.data_hash,
        rehearsed_from=snapshot.rehearsed_from,
        anchors_from=snapshot.anchors_from,
        rules=rules,
        rules_met=met,
    )


def row_hashes(folder: Path) -> list[str]:
    """The hashes of the rows that a stage learned, in order."""
    return pq.read_table(folder / ROWS, columns=["row_hash"]).column("row_hash").to_pylist()


def _same_rows(folder: Path) -> list[str]:
    """The same; raises BadInput where they are not those of the snapshot beside them."""
    hashes, snapshot = row_hashes(folder), Snapshot.read(folder / SNAPSHOT)
    if (len(hashes), digest_json([*hashes])) != (snapshot.rows, snapshot.data_hash):
        raise BadInput(f"{folder / ROWS}: holds other rows than {SNAPSHOT} says")
    return hashes


def _link(home: Home, run: Run) -> str:
    return run_page(home, run) or f"{shown_address(home.tracking_uri)}#{run.info.run_id}"


def _iso(milliseconds: int | None) -> str:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).isoformat()


def diff_versions(home: Home, before: str, after: str) -> LineageDiff:
    """What changed from one version to another: skills, rows, settings, scores.

    Raises BadInput as `read_lineage` does.
    """
    client = open_client(home)
    sides = (read_lineage(home, before), read_lineage(home, after))
    rows: dict[str, list[str]] = {}
    for side in sides:
        for stage in side.stages:
            if stage.data.data_hash not in rows:
                label, run = f"{side.name}/{stage.version}", client.get_run(stage.run_id)
                hashes = kept(home, label, run, data_folder(stage.skill), _same_rows)
                rows[stage.data.data_hash] = hashes
    return compare(*sides, rows)
