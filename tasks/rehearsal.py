"""The data of a stage: its own demonstrations, some of the skills before it, and anchors."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import BadInput
from schemas.curriculum import Curriculum, Skill
from schemas.data import TRAIN_SCHEMA
from schemas.digest import digest_json
from schemas.snapshot import AnchorsOrigin, Origin, Snapshot, SuiteData
from sdft.data import data_hash, write_table
from sdft.files import placed
from sdft.modelfiles import all_files
from sdft.rehearsal import rehearsed
from tasks.basemodel import ModelDir
from tasks.console import say
from tasks.home import Home
from tasks.validation import ROWS, SNAPSHOT, prompt_limit, verified_snapshot
from tasks.violations import rules_checked

ANCHORS = "anchors-"
"""How the names of the files begin that a snapshot has from the validation of its anchors."""


def with_rehearsal(
    skill: Skill,
    data: SuiteData,
    earlier: dict[str, SuiteData],
    anchors: Snapshot | None,
    curriculum: Curriculum,
    model: ModelDir,
    home: Home,
) -> SuiteData:
    """The data of a skill with rows of the skills that the stage's model knows, then the anchors.

    All of them have passed validation; what does not fit this skill's settings is left out here, so
    that they decide nothing for other skills' stages. `model` is the base model. The snapshot is
    made once and kept, like any other: by what is in it, so its name and the sources are those of
    whoever asks.
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
        "limits": [skill.training.max_new_tokens, skill.training.max_prompt_tokens],
        "template": skill.training.teacher_template,
        "model": model.model_hash,
    }
    if anchors:
        key["anchors"] = anchors.hash
    target = home.data / digest_json(key)[:32]
    try:
        made = verified_snapshot(target)
    except BadInput:  # not there, or altered
        made = None
    if made is None:
        own_rows = _rows(own)
        parts = rehearsed(own_rows, [_rows(one) for one in learned.values()], share, seed)
        parts += [_rows(anchors)] if anchors else []
        fit = _fitting(parts, skill, model)
        counts, table = [*map(len, fit)], pa.concat_tables([own_rows, *fit])
        left_out = sum(map(len, parts)) - sum(counts)
        with placed(target) as partial:
            _copy_files(own, partial)
            if anchors:
                _copy_files(anchors, partial, ANCHORS)
            write_table(table, partial / ROWS)
            again = {name: count for name, count in zip(learned, counts, strict=False) if count}
            changed = {
                "files": all_files(partial),
                "data_hash": data_hash(table),
                "rows": len(table),
                "rehearsed": again,
                "anchors": counts[-1] if anchors else 0,
                **_origins(own, {name: learned[name] for name in again}, anchors, counts[-1]),
            }
            made = own.model_copy(update=changed).at(target)
            made.write(partial / SNAPSHOT)
        counted = [f"{count} of {name} again" for name, count in made.rehearsed.items()]
        if made.anchors:
            counted.append(f"{made.anchors} anchors")
        with_it = ", ".join(counted) or "no rows again"
        without = f"; {left_out} rows do not fit its settings" if left_out else ""
        say("rehearse", skill.name, f"learns {with_it}{without}")
    told = {"name": own.name, "source": own.source}
    again = {name: learned[name] for name in made.rehearsed}
    told |= _origins(own, again, anchors, made.anchors)
    return data.model_copy(update={"train": made.model_copy(update=told).at(target)})


def _fitting(tables: list[pa.Table], skill: Skill, model: ModelDir) -> list[pa.Table]:
    """The rows of each table of which all that a skill's stage makes of them fits its settings."""
    from sdft.facts import FactMaker  # importing the tokenizer's library costs more than a second

    maker, settings = FactMaker(Path(model.path)), skill.training
    limit = prompt_limit(skill, maker.max_positions)
    limits = {
        "student_tokens": limit,
        "teacher_tokens": limit,
        "response_tokens": settings.max_new_tokens,
    }
    template = settings.teacher_template if settings.method == "sdft" else None
    fitting: list[pa.Table] = []
    for table in tables:
        rows = [row | {"prompt": row["messages"]} for row in table.to_pylist()]
        facts = maker.train(rows, template, asked=[])
        fits = [all((one[name] or 0) <= most for name, most in limits.items()) for one in facts]
        fitting.append(table.filter(pa.array(fits, pa.bool_())))
    return fitting


def _origins(
    own: Snapshot, again: dict[str, Snapshot], anchors: Snapshot | None, fitting: int
) -> dict[str, Any]:
    """What a mixed snapshot says of where its rows are from; so many of the anchors are in it."""
    asked = None
    if anchors and fitting:
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
