"""The gate: from matrix rows to a verdict, as a pure function.

A pass needs every number; a number that is missing or not comparable is a refusal.
"""

import math
from collections.abc import Sequence

from schemas.results import Cell, MatrixRow, Role, SuiteJudgement, Verdict
from schemas.settings import GateSettings


def judge(
    candidate: MatrixRow,
    kept: Sequence[MatrixRow],
    suites: Sequence[str],
    general: Sequence[str],
    settings: GateSettings,
) -> Verdict:
    """The verdict on a stage.

    `kept` is the base model's row and those of the stages that passed, in order; its last is the
    candidate's parent. The new skill must gain `min_gain` over the parent. No earlier skill may
    lose more than `max_forgetting` against the stage that learned it, no general suite against the
    base model: fixed references, so that small losses cannot add up unseen. A cell that is missing,
    has errors, or was made under another fingerprint is a refusal.
    """
    skill = candidate.skill
    assert skill is not None, "the base model is not judged"
    column = {suite: index for index, suite in enumerate(suites)}
    parent, base = kept[-1], kept[0]
    pairs: list[tuple[str, Role, MatrixRow]] = [(skill, "new skill", parent)]
    for row in kept[1:]:
        assert row.skill is not None, "only row 0 is the base model"
        pairs.append((row.skill, "earlier skill", row))
    for suite in general:
        pairs.append((suite, "general", base))
    judgements: list[SuiteJudgement] = []
    fingerprints: dict[str, tuple[str | None, str | None]] = {}
    for suite, role, reference in pairs:
        before, after = reference.cells[column[suite]], candidate.cells[column[suite]]
        limit = settings.min_gain if role == "new skill" else settings.max_forgetting
        reason = _incomparable(before, after)
        was, now = _number(before), _number(after)
        change = None if was is None or now is None else now - was
        if reason is None and change is not None:
            reason = _shortfall(role, change, limit)
        judgements.append(
            SuiteJudgement(
                suite=suite,
                role=role,
                reference_stage=reference.stage,
                reference=was,
                candidate=now,
                change=change,
                limit=limit,
                passed=reason is None,
                reason=reason or "within the limit",
            )
        )
        fingerprints[suite] = (before and before.fingerprint, after and after.fingerprint)
    return Verdict(
        stage=candidate.stage,
        skill=skill,
        passed=all(one.passed for one in judgements),
        judgements=tuple(judgements),
        fingerprints=fingerprints,
    )


def _number(cell: Cell | None) -> float | None:
    return cell.score if cell is not None and math.isfinite(cell.score) else None


def _incomparable(before: Cell | None, after: Cell | None) -> str | None:
    for cell, which in [(before, "reference"), (after, "candidate")]:
        if cell is None:
            return f"the {which}'s score is missing"
        if cell.errors:
            return f"{cell.errors} of the {which}'s {cell.items} items ended in an error"
        if not 0.0 <= cell.score <= 1.0:  # NaN included
            return f"the {which}'s score is {cell.score}, which is no score"
    if before and after and before.fingerprint != after.fingerprint:
        return "the two scores are not comparable: their fingerprints differ"
    return None


def _shortfall(role: Role, change: float, limit: float) -> str | None:
    rounding = 1e-9
    if role == "new skill" and change < limit - rounding:
        return f"gained {change:+.3f}, less than min_gain {limit:.3f}"
    if role != "new skill" and change < -limit - rounding:
        return f"lost {-change:.3f}, more than max_forgetting {limit:.3f}"
    return None
