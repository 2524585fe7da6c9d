"""The gate refuses evidence that does not hold, with a name, and keeps every number it used."""

import dataclasses
import math

import pytest
from test_gate import BASE, FIRST, GOOD, Row, decide, right, row, with_cell, with_items

from schemas.results import Verdict

BAD_EVIDENCE: dict[str, tuple[Row, str]] = {
    "another evaluation set": (
        with_cell(GOOD, 2, suite_hash="g2", fingerprint="g2"),
        "g: the evaluation set changed",
    ),
    "another fingerprint": (with_cell(GOOD, 0, fingerprint="x"), "a: the two scores are not"),
    "NaN": (with_cell(GOOD, 1, score=math.nan), "b: the candidate's score is nan"),
    "above 1": (with_cell(GOOD, 1, score=1.5), "b: the candidate's score is 1.5"),
    "another model": (with_cell(GOOD, 2, model_hash="x"), "g: the candidate's score is another"),
    "a score that its items do not give": (
        with_cell(GOOD, 2, score=0.95),
        "g: the candidate's score is 0.950, but 90 of 100 are right",
    ),
    "counts that its items do not give": (
        with_items(GOOD, 2, lambda found: found[:-1]),
        "g: the candidate counts 100 scored, but its 99 items 99 scored",
    ),
    "other ids": (
        with_items(GOOD, 2, lambda found: [dataclasses.replace(found[0], id="z"), *found[1:]]),
        "g: 1 items of the reference and 1 of the candidate have no pair",
    ),
    "an id twice": (
        with_items(GOOD, 2, lambda found: [found[0], found[0], *found[2:]]),
        "g: 1 of the candidate's items have the id of another",
    ),
    "half a score": (
        with_items(GOOD, 2, lambda found: [*found[:-1], dataclasses.replace(found[-1], score=0.5)]),
        "g: 1 of the candidate's items are scored neither 0 nor 1",
    ),
    "a NaN among the items": (
        with_items(
            GOOD, 2, lambda found: [*found[:-1], dataclasses.replace(found[-1], score=math.nan)]
        ),
        "g: 1 of the candidate's items are scored neither 0 nor 1",
    ),
}


@pytest.mark.parametrize("name", BAD_EVIDENCE)
def test_evidence_that_does_not_hold_is_refused(name: str) -> None:
    candidate, reason = BAD_EVIDENCE[name]
    verdict = decide(candidate, BASE, FIRST)
    assert verdict.decision == "refuse"
    [only] = verdict.reasons
    assert only.startswith(reason)
    bad = next(one for one in verdict.judgements if one.decision == "refuse")
    assert bad.change is None and bad.pairs is None
    assert Verdict.model_validate_json(verdict.model_dump_json()).digest == verdict.digest


def test_a_cell_without_its_items_is_refused() -> None:
    verdict = decide((GOOD[0], {}), BASE, FIRST)
    assert verdict.reasons[0] == "b: the candidate's per-item results are missing"


def test_every_number_is_in_the_verdict() -> None:
    verdict = decide(row(2, "b", "01" + right(79, 98), right(70), right(90)), BASE, FIRST)
    new, earlier, general = verdict.judgements
    assert (new.role, earlier.role, general.role) == ("new skill", "earlier skill", "general")
    assert (new.reference_stage, earlier.reference_stage, general.reference_stage) == (1, 1, 0)
    assert (new.pairs, new.gained, new.lost, new.change) == (100, 70, 0, 0.7)
    assert (earlier.reference, earlier.candidate) == (0.8, 0.8)
    assert (earlier.gained, earlier.lost, earlier.change) == (1, 1, 0.0)
    assert earlier.p_value == 0.75  # at least one of two
    assert earlier.lower == pytest.approx(-(earlier.upper or 0.0))
    assert (new.limit, general.limit) == (0.1, -0.05)
    assert earlier.reference_cell and earlier.reference_cell.fingerprint == "a"
    assert (verdict.candidate_hash, verdict.parent_hash) == ("m2", "m1")


def test_the_digest_binds_every_number() -> None:
    verdict = decide(GOOD, BASE, FIRST)
    again = Verdict.model_validate_json(verdict.model_dump_json())
    assert (again, again.digest) == (verdict, verdict.digest)
    other = decide(with_cell(GOOD, 2, items_sha256="1"), BASE, FIRST)
    assert other.digest != verdict.digest
