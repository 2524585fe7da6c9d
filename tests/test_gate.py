"""The gate on hand-made rows."""

import math

import pytest

from schemas.results import Cell, MatrixRow
from schemas.settings import GateSettings
from sdft.gate import judge
from sdft.matrix import build_matrix

SUITES = ["a", "b", "g"]
SETTINGS = GateSettings(min_gain=0.1, max_forgetting=0.05)


def cell(score: float, fingerprint: str = "f", errors: int = 0) -> Cell:
    return Cell(
        model_hash="m",
        suite_hash="s",
        fingerprint=fingerprint,
        items=100,
        scored=100 - errors,
        errors=errors,
        score=score,
        interval=(0.0, 1.0),
        seconds=0.0,
    )


def row(stage: int, skill: str | None, *cells: Cell | float | None) -> MatrixRow:
    return MatrixRow(
        stage=stage,
        skill=skill,
        parent_stage=None,
        model_hash=f"m{stage}",
        passed=True,
        version=str(stage) if stage else None,
        cells=tuple(cell(c) if isinstance(c, float) else c for c in cells),
    )


BASE = row(0, None, 0.0, 0.0, 0.9)
FIRST = row(1, "a", 0.8, 0.0, 0.9)

CASES = {
    "learned, nothing lost": (row(2, "b", 0.8, 0.7, 0.9), None),
    "losses within the limit": (row(2, "b", 0.75, 0.7, 0.85), None),
    "a loss of exactly the limit": (row(2, "b", 0.8 - 0.05, 0.1, 0.9), None),
    "gain too small": (row(2, "b", 0.8, 0.05, 0.9), "b: gained +0.050"),
    "an earlier skill lost while the mean rose": (row(2, "b", 0.5, 1.0, 1.0), "a: lost 0.300"),
    "a general suite lost": (row(2, "b", 0.8, 0.7, 0.8), "g: lost 0.100"),
    "a cell is missing": (row(2, "b", None, 0.7, 0.9), "a: the candidate's score is missing"),
    "NaN": (row(2, "b", 0.8, math.nan, 0.9), "b: the candidate's score is nan"),
    "errors": (row(2, "b", 0.8, 0.7, cell(0.9, errors=3)), "g: 3 of the candidate's 100 items"),
    "another fingerprint": (row(2, "b", 0.8, 0.7, cell(0.9, "x")), "g: the two scores are not"),
}


@pytest.mark.parametrize("name", CASES)
def test_gate(name: str) -> None:
    candidate, refusal = CASES[name]
    verdict = judge(candidate, [BASE, FIRST], SUITES, ["g"], SETTINGS)
    assert verdict.passed == (refusal is None)
    assert len(verdict.judgements) == 3
    if refusal:
        assert [reason for reason in verdict.reasons if reason.startswith(refusal)]


def test_small_losses_cannot_add_up_past_the_limit() -> None:
    """The reference of an earlier skill is the stage that learned it, not the last stage."""
    suites = ["a", "b", "c", "g"]
    base = row(0, None, 0.0, 0.0, 0.0, 0.9)
    first = row(1, "a", 0.80, 0.0, 0.0, 0.9)
    second = row(2, "b", 0.76, 0.9, 0.0, 0.9)
    third = row(3, "c", 0.72, 0.9, 0.9, 0.9)
    assert judge(second, [base, first], suites, ["g"], SETTINGS).passed
    verdict = judge(third, [base, first, second], suites, ["g"], SETTINGS)
    assert verdict.reasons == ["a: lost 0.080, more than max_forgetting 0.050"]


def test_measures_follow_the_kept_model_not_a_refused_one() -> None:
    refused = row(2, "b", 0.1, 0.9, 0.1).model_copy(update={"passed": False})
    matrix = build_matrix("c", ["a", "b"], ["g"], [BASE, FIRST, refused])
    assert matrix.measures.average == pytest.approx(0.8)
    assert matrix.measures.general_forgetting == pytest.approx(0.0)
    assert matrix.measures.backward_transfer is None
    assert len(matrix.rows) == 3
