"""What changed from one lineage to another: a pure function."""

from collections.abc import Mapping, Sequence

from schemas.lineage import (
    Lineage,
    LineageDiff,
    LineageStage,
    RowChange,
    SettingChange,
    SkillChange,
)
from sdft.rehearsal import owners

RowHashes = Mapping[str, Sequence[str]]
"""The row hashes of a data set, by its data hash."""


def compare(before: Lineage, after: Lineage, rows: RowHashes) -> LineageDiff:
    """What changed from one version to another; `rows` has every data set of both."""
    was = {stage.skill: stage for stage in before.stages}
    now = {stage.skill: stage for stage in after.stages}
    both = [_change(was[skill], stage, rows) for skill, stage in now.items() if skill in was]
    scores = (before.stages[-1].scores, after.stages[-1].scores)
    return LineageDiff(
        before=f"{before.name}/{before.version}",
        after=f"{after.name}/{after.version}",
        base_changed=before.base_hash != after.base_hash,
        skills_added=tuple(skill for skill in now if skill not in was),
        skills_removed=tuple(skill for skill in was if skill not in now),
        skills_changed=tuple(one for one in both if one is not None),
        scores={
            suite: scores[1][suite] - scores[0][suite] for suite in scores[0] if suite in scores[1]
        },
    )


def _change(was: LineageStage, now: LineageStage, rows: RowHashes) -> SkillChange | None:
    old, new = _by_owner(was, rows), _by_owner(now, rows)
    changed = {
        owner: RowChange(added=tuple(sorted(added)), removed=tuple(sorted(removed)))
        for owner in {**old, **new}
        if (added := new.get(owner, set()) - old.get(owner, set()))
        | (removed := old.get(owner, set()) - new.get(owner, set()))
    }
    settings = {
        name: SettingChange(before=was.settings.get(name), after=now.settings.get(name))
        for name in sorted(was.settings.keys() | now.settings.keys())
        if was.settings.get(name) != now.settings.get(name)
    }
    if not changed and not settings:
        return None
    own = changed.pop(now.skill, RowChange(added=(), removed=()))
    return SkillChange(
        skill=now.skill,
        rows_added=own.added,
        rows_removed=own.removed,
        anchors=changed.pop("", None),
        learned_again=changed,
        settings=settings,
    )


def _by_owner(stage: LineageStage, rows: RowHashes) -> dict[str, set[str]]:
    """The rows of a stage by the skill that they are of; anchors under an empty text."""
    found: dict[str, set[str]] = {}
    hashes = rows[stage.data.data_hash]
    for owner, row in zip(owners(stage.skill, stage.data), hashes, strict=True):
        found.setdefault(owner, set()).add(row)
    return found
