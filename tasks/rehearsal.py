"""The data of a stage: its own demonstrations, some of the skills before it, and anchors."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import BadInput
from schemas.curriculum import Curriculum
from schemas.data import TRAIN_SCHEMA
from schemas.digest import digest_json
from schemas.snapshot import AnchorsOrigin, Origin, Snapshot, SuiteData
from sdft.data import data_hash, write_table
from sdft.files import placed
from sdft.modelfiles import all_files
from sdft.rehearsal import rehearsed
from tasks.console import say
from tasks.home import Home
from tasks.validation import ROWS, SNAPSHOT, verified_snapshot
from tasks.violations import rules_checked

ANCHORS = "anchors-"
"""How the names of the files begin that a snapshot has from the validation of its anchors."""


def with_rehearsal(
    data: SuiteData,
    earlier: dict[str, SuiteData],
    anchors: Snapshot | None,
    curriculum: Curriculum,
    home: Home,
) -> SuiteData:
    """The data of a skill with rows of the skills that the stage's model knows, then all anchors.

    All of them have passed validation. The snapshot is made once and kept, like any other: by what
    is in it, so its name and the sources are those of whoever asks.
    """
    own, share, seed = _train(data), curriculum.rehearsal, curriculum.seed
    learned = {name: _train(one) for name, one in earlier.items()} if share else {}
    if not learned and not anchors:
        return data
    key = {
        "own": own.hash,
        "earlier": {name: one.data_hash for name, one in learned.items()},
        "share": share,
        "seed": seed,
    }
    if anchors:
        key["anchors"] = anchors.hash
    target = home.data / digest_json(key)[:32]
    try:
        made = verified_snapshot(target)
    except BadInput:  # not there, or altered
        made = None
    if made is None:
        tables = [_rows(one) for one in learned.values()]
        table, counts = rehearsed(_rows(own), tables, share, seed)
        if anchors:
            table = pa.concat_tables([table, _rows(anchors)])
        with placed(target) as partial:
            _copy_files(own, partial)
            if anchors:
                _copy_files(anchors, partial, ANCHORS)
            write_table(table, partial / ROWS)
            again = {name: count for name, count in zip(learned, counts, strict=True) if count}
            changed = {
                "files": all_files(partial),
                "data_hash": data_hash(table),
                "rows": len(table),
                "rehearsed": again,
                "anchors": anchors.rows if anchors else 0,
                **_origins(own, {name: learned[name] for name in again}, anchors),
            }
            made = own.model_copy(update=changed).at(target)
            made.write(partial / SNAPSHOT)
        counted = [f"{count} of {name} again" for name, count in made.rehearsed.items()]
        counted += [f"{made.anchors} anchors"] * bool(made.anchors)
        with_it = ", ".join(counted) or "no rows again"
        say("rehearse", data.eval.name.removesuffix("/eval"), f"learns {with_it}")
    told = {"name": own.name, "source": own.source}
    told |= _origins(own, {name: learned[name] for name in made.rehearsed}, anchors)
    return data.model_copy(update={"train": made.model_copy(update=told).at(target)})


def _origins(own: Snapshot, again: dict[str, Snapshot], anchors: Snapshot | None) -> dict[str, Any]:
    """What a mixed snapshot says of where its rows are from."""
    asked = None
    if anchors:
        rules, met = rules_checked(Path(anchors.directory))
        asked = AnchorsOrigin(
            source=anchors.source,
            data_hash=anchors.data_hash,
            quarantined=anchors.quarantined,
            rules=rules,
            rules_met=met,
        )
    return {
        "own_hash": own.data_hash,
        "rehearsed_from": {
            name: Origin(source=one.source, data_hash=one.data_hash) for name, one in again.items()
        },
        "anchors_from": asked,
    }


def _copy_files(snapshot: Snapshot, folder: Path, prefix: str = "") -> None:
    """Copy what its validation left beside the rows."""
    for file in snapshot.files:
        if file.path != ROWS:
            shutil.copyfile(f"{snapshot.directory}/{file.path}", folder / f"{prefix}{file.path}")


def _rows(snapshot: Snapshot) -> pa.Table:
    return pq.read_table(snapshot.file, schema=TRAIN_SCHEMA)  # before, no response was no row


def _train(data: SuiteData) -> Snapshot:
    assert data.train is not None, f"{data.eval.name} has no demonstrations"
    return data.train
