"""What a stage is held against, and whether two cells can be compared at all: pure functions."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from schemas.results import Cell, ItemResult, MatrixRow, Role

Items = Mapping[str, Sequence[ItemResult]]
"""The per-item results of cells, by `Cell.key`."""


@dataclass(frozen=True)
class Pairing:
    """A suite that a stage is judged on: its cell there, and the one it is held against."""

    suite: str
    role: Role
    reference: MatrixRow
    before: Cell | None
    after: Cell | None


def pairings(
    candidate: MatrixRow, kept: Sequence[MatrixRow], suites: Sequence[str], general: Sequence[str]
) -> list[Pairing]:
    """What a stage is compared with, the new skill first.

    `kept` is the base model's row and those of the stages that passed, in order; its last is the
    candidate's parent. The new skill is held against the parent, an earlier skill against the stage
    that learned it, a general suite against the base model: fixed references, so that small losses
    cannot add up unseen. `suites` are the names of the rows' columns.
    """
    assert candidate.skill is not None, "the base model is not judged"
    chosen: list[tuple[str, Role, MatrixRow]] = [(candidate.skill, "new skill", kept[-1])]
    for row in kept[1:]:
        assert row.skill is not None, "only row 0 is the base model"
        chosen.append((row.skill, "earlier skill", row))
    for suite in general:
        chosen.append((suite, "general", kept[0]))
    column = {suite: index for index, suite in enumerate(suites)}
    return [
        Pairing(suite, role, row, row.cells[column[suite]], candidate.cells[column[suite]])
        for suite, role, row in chosen
    ]


def obstacles(pairing: Pairing, candidate: MatrixRow, items: Items) -> list[str]:
    """Everything that keeps the two cells from being compared; empty when they can be."""
    before, after = pairing.before, pairing.after
    problems = [
        *_cell_problems("reference", before, pairing.reference.model_hash, items),
        *_cell_problems("candidate", after, candidate.model_hash, items),
    ]
    if before is None or after is None:
        return problems
    if before.suite_hash != after.suite_hash:
        problems.append("the evaluation set changed between the two scores")
    elif before.fingerprint != after.fingerprint:
        problems.append("the two scores are not comparable: their fingerprints differ")
    elif not problems:
        asked, answered = ({item.id for item in items[cell.key]} for cell in (before, after))
        if asked != answered:
            problems.append(
                f"{len(asked - answered)} items of the reference and {len(answered - asked)} of "
                "the candidate have no pair"
            )
    return problems


def _cell_problems(which: str, cell: Cell | None, model_hash: str, items: Items) -> Iterator[str]:
    if cell is None:
        yield f"the {which}'s score is missing"
        return
    if cell.model_hash != model_hash:
        yield f"the {which}'s score is another model's"
    for count, what in [
        (cell.errors, "ended in an error"),
        (cell.invalid, "cannot be asked or scored"),
        (cell.unrun, "were not run"),
    ]:
        if count:
            yield f"{count} of the {which}'s {cell.items} items {what}"
    if not 0.0 <= cell.score <= 1.0:  # NaN included
        yield f"the {which}'s score is {cell.score}, which is no score"
    if cell.key in items:
        yield from _contradictions(which, cell, items[cell.key])
    else:
        yield f"the {which}'s per-item results are missing"


def _contradictions(which: str, cell: Cell, results: Sequence[ItemResult]) -> Iterator[str]:
    """Where a cell and its per-item results do not tell the same."""
    if not results:
        yield f"the {which} has no items"
    if doubles := len(results) - len({item.id for item in results}):
        yield f"{doubles} of the {which}'s items have the id of another"
    found = Counter(item.status for item in results)
    said = Counter(scored=cell.scored, error=cell.errors, invalid=cell.invalid, unrun=cell.unrun)
    if found != said or cell.items != len(results):
        yield f"the {which} counts {_counts(said)}, but its {len(results)} items {_counts(found)}"
    odd = sum(item.status == "scored" and item.score not in (0.0, 1.0) for item in results)
    if odd:
        yield f"{odd} of the {which}'s items are scored neither 0 nor 1"
    right = sum(item.score == 1.0 for item in results)
    if 0.0 <= cell.score <= 1.0 and abs(right - cell.score * len(results)) > 1e-6 * len(results):
        yield f"the {which}'s score is {cell.score:.3f}, but {right} of {len(results)} are right"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none"
