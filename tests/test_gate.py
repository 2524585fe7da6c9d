"""The gate on hand-made rows and items."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.results import Cell, Decision, ItemResult, MatrixRow, Verdict
from schemas.settings import GateSettings
from sdft.gate import judge
from sdft.matrix import build_matrix

STATUS = {"1": "scored", "0": "scored", "e": "error", "i": "invalid", "u": "unrun"}
Row = tuple[MatrixRow, dict[str, list[ItemResult]]]


def right(count: int, of: int = 100) -> str:
    """The first `count` items right, the others wrong: two of these differ in one direction."""
    return "1" * count + "0" * (of - count)


def row(stage: int, skill: str | None, *results: str | None) -> Row:
    """A stage on the suites a, b, c ... and g (last), with a letter an item for each of them."""
    names = [*"abcdef"[: len(results) - 1], "g"]
    cells: list[Cell | None] = []
    items: dict[str, list[ItemResult]] = {}
    for name, letters in zip(names, results, strict=True):
        if letters is None:
            cells.append(None)
            continue
        cell = Cell(
            model_hash=f"m{stage}",
            suite_hash=name,
            fingerprint=name,
            items=len(letters),
            scored=sum(letter in "10" for letter in letters),
            errors=letters.count("e"),
            invalid=letters.count("i"),
            unrun=letters.count("u"),
            score=letters.count("1") / len(letters),
            interval=(0.0, 1.0),
            items_sha256="",
            seconds=0.0,
        )
        cells.append(cell)
        items[cell.key] = [
            ItemResult(f"{name}{n}", STATUS[letter], float(letter) if letter in "10" else None)
            for n, letter in enumerate(letters)
        ]
    made = MatrixRow(
        stage=stage,
        skill=skill,
        parent_stage=None,
        model_hash=f"m{stage}",
        passed=True,
        version=str(stage) if stage else None,
        cells=tuple(cells),
    )
    return made, items


BASE = row(0, None, right(0), right(0), right(90))
FIRST = row(1, "a", right(80), right(0), right(90))
RULE = GateSettings(min_gain=0.1, max_forgetting=0.05)


def decide(
    candidate: Row,
    *kept: Row,
    rule: GateSettings = RULE,
    own: dict[str, GateSettings] | None = None,
) -> Verdict:
    suites = [*"abcdef"[: len(candidate[0].cells) - 1], "g"]
    items = {key: found for one in (*kept, candidate) for key, found in one[1].items()}
    settings = {suite: (own or {}).get(suite, rule) for suite in suites}
    return judge(candidate[0], [one[0] for one in kept], settings, ["g"], items)


def rule(**changes: Any) -> GateSettings:
    return RULE.model_copy(update=changes)


CASES: dict[str, tuple[tuple[str | None, ...], GateSettings, Decision, str]] = {
    # results of stage 2 on a, b (new) and g; the rule; what comes out, and why
    "learned, nothing lost": ((right(80), right(70), right(90)), RULE, "pass", ""),
    "losses within the limit": ((right(76), right(70), right(86)), RULE, "pass", ""),
    "a loss of exactly the limit": ((right(75), right(70), right(85)), RULE, "pass", ""),
    "a gain of exactly the limit": ((right(80), right(10), right(90)), RULE, "pass", ""),
    "gain too small to be real": (
        (right(80), right(3), right(90)),
        rule(min_gain=0.01),
        "refuse",
        "b: gained +0.030, too small to be real: p=0.12",
    ),
    "a real gain, but too small": (
        (right(80), right(9), right(90)),
        RULE,
        "refuse",
        "b: gained +0.090, less than min_gain 0.100",
    ),
    "no gain at min_gain 0": ((right(80), right(0), right(90)), rule(min_gain=0.0), "pass", ""),
    "an earlier skill lost while the mean rose": (
        (right(50), right(100), right(100)),
        RULE,
        "refuse",
        "a: lost 0.300, more than max_forgetting 0.050",
    ),
    "a general suite lost": (
        (right(80), right(70), right(80)),
        RULE,
        "refuse",
        "g: lost 0.100, more than max_forgetting 0.050",
    ),
    "as many gained as lost": (
        # 20 items of a lost, 20 others gained: the scores are equal
        ("0" * 20 + "1" * 80, right(70), right(90)),
        RULE,
        "pass",
        "",
    ),
    "a cell is missing": (
        (None, right(70), right(90)),
        RULE,
        "refuse",
        "a: the candidate's score is missing",
    ),
    "every kind of item without a score is counted": (
        (right(80), right(70), right(80, 90) + "eeeiiuuuuu"),
        RULE,
        "refuse",
        "g: 3 of the candidate's 100 items ended in an error; 2 of the candidate's 100 items "
        "cannot be asked or scored; 5 of the candidate's 100 items were not run",
    ),
    "items that do not pair": (
        (right(80), right(70), right(90, 98)),
        RULE,
        "refuse",
        "g: 2 items of the reference and 0 of the candidate have no pair",
    ),
    "a loss near the limit": (
        (right(74), right(70), right(90)),
        rule(band=0.02),
        "ask",
        "a: lost 0.060, within 0.020 of max_forgetting 0.050",
    ),
    "a loss at the end of the band": (
        (right(77), right(70), right(90)),
        rule(band=0.02),
        "pass",
        "",
    ),
    "a gain near the limit": (
        (right(80), right(11), right(90)),
        rule(band=0.02),
        "ask",
        "b: gained +0.110, within 0.020 of min_gain 0.100",
    ),
    "refuse wins over ask": (
        (right(74), right(7), right(90)),
        rule(band=0.02),
        "refuse",
        "b: gained +0.070, less than min_gain 0.100",
    ),
    "a gain that the bound does not prove": (
        (right(80), right(12), right(90)),
        rule(proof="bound"),
        "refuse",
        "b: gained +0.120 (lower bound +0.076), less than min_gain 0.100",
    ),
    "a loss that the bound does not rule out": (
        (right(79), right(70), right(90)),
        rule(proof="bound", max_forgetting=0.03),
        "ask",
        "a: lost 0.010 (lower bound -0.044): a loss of more than max_forgetting 0.030 cannot",
    ),
    "bounds that prove it": ((right(79), right(70), right(90)), rule(proof="bound"), "pass", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_gate(name: str) -> None:
    results, settings, decision, reason = CASES[name]
    verdict = decide(row(2, "b", *results), BASE, FIRST, rule=settings)
    assert verdict.decision == decision
    assert verdict.passed == (decision == "pass") == (not verdict.reasons)
    assert [one.suite for one in verdict.judgements] == ["b", "a", "g"]
    if reason:
        assert [one for one in verdict.reasons if one.startswith(reason)], verdict.reasons


def test_on_ten_items_a_loss_cannot_be_told_from_chance() -> None:
    base = row(0, None, right(0, 10), right(9, 10))
    verdict = decide(row(1, "a", right(9, 10), right(8, 10)), base)
    assert verdict.decision == "ask" and not verdict.passed
    assert verdict.reasons == [
        "g: lost 0.100, more than max_forgetting 0.050, but 10 items cannot tell it from chance: "
        "p=0.5"
    ]
    worse = decide(row(1, "a", right(9, 10), right(4, 10)), base)
    assert worse.decision == "refuse", "5 of 5 changes are losses: p = 1/32"


def test_a_suite_can_have_a_rule_of_its_own() -> None:
    candidate = row(2, "b", right(60), right(70), right(90))
    assert decide(candidate, BASE, FIRST).decision == "refuse"
    lenient = {"a": rule(max_forgetting=0.3)}
    verdict = decide(candidate, BASE, FIRST, own=lenient)
    assert verdict.passed
    assert [one.settings.max_forgetting for one in verdict.judgements] == [0.05, 0.3, 0.05]


def with_cell(made: Row, column: int, **changes: Any) -> Row:
    """The same row with a cell changed, and its items under the new key."""
    old = made[0].cells[column]
    assert old is not None
    new = old.model_copy(update=changes)
    cells = [*made[0].cells]
    cells[column] = new
    return made[0].model_copy(update={"cells": tuple(cells)}), made[1] | {new.key: made[1][old.key]}


def with_items(made: Row, column: int, change: Callable[[list[ItemResult]], Any]) -> Row:
    cell = made[0].cells[column]
    assert cell is not None
    return made[0], made[1] | {cell.key: change(list(made[1][cell.key]))}


GOOD = row(2, "b", right(80), right(70), right(90))


def test_a_model_that_training_did_not_change_is_refused() -> None:
    same = row(1, "b", right(80), right(0), right(90))
    verdict = decide(same, BASE, FIRST, rule=rule(min_gain=0.0))
    assert verdict.decision == "refuse"
    assert verdict.reasons == [
        "b: training changed nothing: the model is its parent, bit by bit",
    ]


def test_small_losses_cannot_add_up_past_the_limit() -> None:
    """The reference of an earlier skill is the stage that learned it, not the last stage."""
    base = row(0, None, *[right(0)] * 3, right(90))
    first = row(1, "a", right(80), right(0), right(0), right(90))
    second = row(2, "b", right(76), right(90), right(0), right(90))
    third = row(3, "c", right(72), right(90), right(90), right(90))
    assert decide(second, base, first).passed
    verdict = decide(third, base, first, second)
    assert verdict.reasons == ["a: lost 0.080, more than max_forgetting 0.050"]


ANSWERS = st.text("01", min_size=12, max_size=12)


@given(ANSWERS, ANSWERS, st.permutations(range(12)), st.sampled_from(["estimate", "bound"]))
def test_the_order_of_items_does_not_matter(
    before: str, after: str, order: list[int], proof: str
) -> None:
    base, candidate = row(0, None, right(0, 12), before), row(1, "a", right(12, 12), after)
    shuffled = with_items(candidate, 1, lambda found: [found[n] for n in order])
    settings = rule(proof=proof)
    assert decide(candidate, base, rule=settings) == decide(shuffled, base, rule=settings)


@given(ANSWERS, ANSWERS, st.integers(0, 11), st.sampled_from(["estimate", "bound"]))
def test_one_more_right_answer_is_never_worse(
    before: str, after: str, place: int, proof: str
) -> None:
    order: list[Decision] = ["refuse", "ask", "pass"]
    better = after[:place] + "1" + after[place + 1 :]
    for column in (0, 1):  # the new skill, the general suite
        full, none = right(12, 12), right(0, 12)
        base = row(0, None, *((before, full) if column == 0 else (none, before)))
        less, more = (
            decide(
                row(1, "a", *((answers, full) if column == 0 else (full, answers))),
                base,
                rule=rule(proof=proof, band=0.03, max_forgetting=0.1),
            ).decision
            for answers in (after, better)
        )
        assert order.index(less) <= order.index(more)


def test_measures_follow_the_kept_model_not_a_refused_one() -> None:
    refused, _ = row(2, "b", right(10), right(90), right(10))
    rows = [BASE[0], FIRST[0], refused.model_copy(update={"passed": False})]
    matrix = build_matrix("c", ["a", "b"], ["g"], rows)
    assert matrix.measures.average == pytest.approx(0.8)
    assert matrix.measures.general_forgetting == pytest.approx(0.0)
    assert matrix.measures.backward_transfer is None
    assert len(matrix.rows) == 3
