"""The data of a stage: its own demonstrations, some of the skills before it, and anchors."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import BadInput
from schemas.curriculum import Curriculum, Skill
from schemas.data import TRAIN_SCHEMA
from schemas.digest import digest_json
from schemas.snapshot import ANCHORS, ROWS, SNAPSHOT, AnchorsOrigin, Origin, Snapshot, SuiteData
from sdft.data import data_hash, write_table
from sdft.files import placed
from sdft.modelfiles import all_files
from sdft.rehearsal import rehearsed
from tasks.basemodel import ModelDir
from tasks.console import say
from tasks.home import Home
from tasks.validation import prompt_limit, verified_snapshot
from tasks.violations import rules_checked


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
    share, seed = curriculum.rehearsal, curriculum.seed
    learned = {name: _train(one) for name, one in earlier.items()} if share else {}
    if not learned and not anchors:
        return data
    mixture = _Mixture(skill, _train(data), learned, anchors, share, seed, model)
    target = home.data / mixture.key[:32]
    try:
        made = verified_snapshot(target)
    except BadInput:  # not there, or altered
        made = mixture.make(target)
    return data.model_copy(update={"train": mixture.told(made).at(target)})


@dataclass(frozen=True)
class _Mixture:
    """What a stage is to learn: the skill's own rows, some of those before it, and anchors."""

    skill: Skill
    own: Snapshot
    learned: dict[str, Snapshot]
    anchors: Snapshot | None
    share: float
    seed: int
    model: ModelDir

    @property
    def key(self) -> str:
        """A digest of all that decides what is in it."""
        training = self.skill.training
        parts = {
            "own": self.own.hash,
            "earlier": [[name, one.data_hash] for name, one in self.learned.items()],
            "share": self.share,
            "seed": self.seed,
            "limits": [training.max_new_tokens, training.max_prompt_tokens],
            "template": training.teacher_template,
            "model": self.model.model_hash,
        }
        return digest_json(parts | ({"anchors": self.anchors.hash} if self.anchors else {}))

    def make(self, target: Path) -> Snapshot:
        """Write its snapshot, whole or not at all, and say what is in it."""
        own, others = _rows(self.own), [_rows(one) for one in self.learned.values()]
        added = rehearsed(own, others, self.share, self.seed)
        added += [_rows(self.anchors)] if self.anchors else []
        fitting = _fitting(added, self.skill, self.model)
        counts, table = [*map(len, fitting)], pa.concat_tables([own, *fitting])
        again = {name: count for name, count in zip(self.learned, counts, strict=False) if count}
        with placed(target) as partial:
            _copy_files(self.own, partial)
            if self.anchors:
                _copy_files(self.anchors, partial, ANCHORS)
            write_table(table, partial / ROWS)
            contents = {
                "files": all_files(partial),
                "data_hash": data_hash(table),
                "rows": len(table),
                "rehearsed": again,
                "anchors": counts[-1] if self.anchors else 0,
            }
            made = self.told(self.own.model_copy(update=contents)).at(target)
            made.write(partial / SNAPSHOT)
        self._say(made, left_out=sum(map(len, added)) - sum(counts))
        return made

    def told(self, made: Snapshot) -> Snapshot:
        """The snapshot with names and sources as they are now: where its rows are from."""
        again = {name: self.learned[name] for name in made.rehearsed}
        origins: dict[str, Any] = {
            "name": self.own.name,
            "source": self.own.source,
            "own_hash": self.own.data_hash,
            "rehearsed_from": {
                name: Origin(source=one.source, data_hash=one.data_hash)
                for name, one in again.items()
            },
            "anchors_from": _origin(self.anchors) if self.anchors and made.anchors else None,
        }
        return made.model_copy(update=origins)

    def _say(self, made: Snapshot, left_out: int) -> None:
        parts = [f"{count} of {name} again" for name, count in made.rehearsed.items()]
        parts += [f"{made.anchors} anchors"] if made.anchors else []
        without = f"; {left_out} rows do not fit its settings" if left_out else ""
        say("rehearse", self.skill.name, f"learns {', '.join(parts) or 'no rows again'}{without}")


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


def _origin(anchors: Snapshot) -> AnchorsOrigin:
    rules, met = rules_checked(Path(anchors.directory))
    return AnchorsOrigin(
        source=anchors.source,
        data_hash=anchors.data_hash,
        quarantined=anchors.quarantined,
        rules=rules,
        rules_met=met,
    )


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
