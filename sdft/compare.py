"""What changed from one lineage to another: a pure function."""

from collections.abc import Mapping, Sequence

from schemas.lineage import Lineage, LineageDiff, LineageStage, SettingChange, SkillChange

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
        skills_changed=tuple(
            one for one in both if one.rows_added or one.rows_removed or one.settings
        ),
        scores={
            suite: scores[1][suite] - scores[0][suite] for suite in scores[0] if suite in scores[1]
        },
    )


def _change(was: LineageStage, now: LineageStage, rows: RowHashes) -> SkillChange:
    old, new = rows[was.data.data_hash], rows[now.data.data_hash]
    names = sorted(was.settings.keys() | now.settings.keys())
    return SkillChange(
        skill=now.skill,
        rows_added=tuple(sorted(set(new) - set(old))),
        rows_removed=tuple(sorted(set(old) - set(new))),
        settings={
            name: SettingChange(before=was.settings.get(name), after=now.settings.get(name))
            for name in names
            if was.settings.get(name) != now.settings.get(name)
        },
    )
