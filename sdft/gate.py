"""The gate: from matrix rows and the items behind them to a verdict, as a pure function.

A pass needs every number; what is missing, not scored or not comparable is a refusal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from schemas.results import Cell, CellEvidence, Decision, MatrixRow, SuiteJudgement, Verdict
from schemas.settings import GateSettings
from sdft.paired import change_bounds, count_changes, p_value
from sdft.pairing import Items, Pairing, obstacles, pairings

_STRICTEST_FIRST: tuple[Decision, ...] = ("refuse", "ask", "pass")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Paired:
    """The numbers of a comparison, named as in SuiteJudgement."""

    pairs: int
    gained: int
    lost: int
    change: float
    lower: float
    upper: float
    p_value: float


def judge(
    candidate: MatrixRow,
    kept: Sequence[MatrixRow],
    settings: Mapping[str, GateSettings],
    general: Sequence[str],
    items: Items,
) -> Verdict:
    """The verdict on a stage; `settings` has one entry a column of the rows, in their order.

    The new skill must gain `min_gain`, and the gain must be real; no other suite may lose more than
    `max_forgetting`. What is near a limit, or lost too much on too few items to be sure, is for a
    person to decide.
    """
    assert candidate.skill is not None, "the base model is not judged"
    parent_hash = kept[-1].model_hash
    judgements: list[SuiteJudgement] = []
    for pairing in pairings(candidate, kept, list(settings), general):
        rule = settings[pairing.suite]
        paired, problems = None, obstacles(pairing, candidate, items)
        if pairing.role == "new skill" and candidate.model_hash == parent_hash:
            problems.insert(0, "training changed nothing: the model is its parent, bit by bit")
        if not problems:
            paired = _compare(pairing, items, rule.confidence)
        judgements.append(_judgement(pairing, rule, paired, problems))
    decisions = {one.decision for one in judgements}
    return Verdict(
        stage=candidate.stage,
        skill=candidate.skill,
        decision=next(one for one in _STRICTEST_FIRST if one in decisions),
        candidate_hash=candidate.model_hash,
        parent_hash=parent_hash,
        judgements=tuple(judgements),
    )


def _compare(pairing: Pairing, items: Items, confidence: float) -> Paired:
    assert pairing.before is not None and pairing.after is not None, "they are comparable"
    before, after = (
        {item.id: item.score == 1.0 for item in items[cell.key]}
        for cell in (pairing.before, pairing.after)
    )
    gained, lost = count_changes(before, after)
    lower, upper = change_bounds(gained, lost, len(before), confidence)
    toward = (gained, lost) if pairing.role == "new skill" else (lost, gained)
    return Paired(
        pairs=len(before),
        gained=gained,
        lost=lost,
        change=(gained - lost) / len(before),
        lower=lower,
        upper=upper,
        p_value=p_value(*toward),
    )


def _judgement(
    pairing: Pairing, rule: GateSettings, paired: Paired | None, problems: list[str]
) -> SuiteJudgement:
    limit = rule.min_gain if pairing.role == "new skill" else 0.0 - rule.max_forgetting
    if paired is None:
        decision, reason = "refuse", "; ".join(problems)
    elif pairing.role == "new skill":
        decision, reason = _judge_gain(paired, rule)
    else:
        decision, reason = _judge_loss(paired, rule)
    return SuiteJudgement(
        suite=pairing.suite,
        role=pairing.role,
        decision=decision,
        reason=reason,
        reference_stage=pairing.reference.stage,
        reference=_number(pairing.before),
        candidate=_number(pairing.after),
        pairs=paired and paired.pairs,
        gained=paired and paired.gained,
        lost=paired and paired.lost,
        change=paired and paired.change,
        lower=paired and paired.lower,
        upper=paired and paired.upper,
        p_value=paired and paired.p_value,
        limit=limit,
        settings=rule,
        reference_cell=_evidence(pairing.before),
        candidate_cell=_evidence(pairing.after),
    )


def _judge_gain(paired: Paired, rule: GateSettings) -> tuple[Decision, str]:
    gained = f"gained {paired.change:+.3f}"
    if rule.min_gain > 0.0 and paired.p_value > 1.0 - rule.confidence:
        return "refuse", f"{gained}, too small to be real: p={paired.p_value:.2g}"
    number, shown = _number_to_judge(paired, rule, gained)
    limit = f"min_gain {rule.min_gain:.3f}"
    match _side(number, rule.min_gain, rule.band):
        case "reached":
            return "pass", f"{shown}, at least {limit}"
        case "near":
            return "ask", f"{shown}, within {rule.band:.3f} of {limit}"
        case "missed":
            return "refuse", f"{shown}, less than {limit}"


def _judge_loss(paired: Paired, rule: GateSettings) -> tuple[Decision, str]:
    change, allowed = paired.change, 0.0 - rule.max_forgetting
    lost = f"lost {-change:.3f}" if change < 0.0 else f"changed {change:+.3f}"
    number, shown = _number_to_judge(paired, rule, lost)
    limit = f"max_forgetting {rule.max_forgetting:.3f}"
    match _side(number, allowed, rule.band):
        case "reached":
            return "pass", f"{shown}, within {limit}"
        case "near":
            return "ask", f"{shown}, within {rule.band:.3f} of {limit}"
        case "missed":
            pass
    if change >= allowed - _ROUNDING:
        return "ask", f"{shown}: a loss of more than {limit} cannot be ruled out"
    if paired.p_value > 1.0 - rule.confidence:
        chance = f"{paired.pairs} items cannot tell it from chance: p={paired.p_value:.2g}"
        return "ask", f"{lost}, more than {limit}, but {chance}"
    return "refuse", f"{lost}, more than {limit}"


def _number_to_judge(paired: Paired, rule: GateSettings, shown: str) -> tuple[float, str]:
    """The number that is held against the limit, and how to say it."""
    if rule.proof == "estimate":
        return paired.change, shown
    return paired.lower, f"{shown} (lower bound {paired.lower:+.3f})"


def _side(number: float, limit: float, band: float) -> Literal["reached", "near", "missed"]:
    if number >= limit + band - _ROUNDING:
        return "reached"
    return "missed" if number <= limit - band + _ROUNDING else "near"


def _number(cell: Cell | None) -> float | None:
    return cell.score if cell is not None and math.isfinite(cell.score) else None


def _evidence(cell: Cell | None) -> CellEvidence | None:
    if cell is None:
        return None
    return CellEvidence.model_validate(cell.model_dump(include=set(CellEvidence.model_fields)))
