"""What a version answered to the items of a suite, read back from its run."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from schemas.base import BadInput
from schemas.digest import digest_file
from schemas.ledger import Entry
from schemas.results import Answer, Answers, CellEvidence, SuiteJudgement, Verdict
from schemas.snapshot import ROWS
from sdft.cells import ITEMS
from sdft.chain import ancestry, newest
from sdft.data import Item, read_items, rehash
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.lineage import kept, resolve
from tasks.packages import (
    Registered,
    evaluation_folder,
    open_registered,
    reference_folder,
    suite_tag,
    verdict_file,
)
from tasks.tracking import open_client

Result = dict[str, Any]
"""A row of items.parquet."""


def read_answers(home: Home, reference: str, suite: str) -> Answers:
    """The answers of `NAME`, `NAME@alias` or `NAME/version` to a suite.

    With those that the gate compared them with, where it did. Raises BadInput where the version was
    not scored on the suite, and where what its run keeps is gone or altered.
    """
    name, version = resolve(home, reference)
    entries = Ledger(home).entries(name)
    registered = open_registered(open_client(home), ancestry(entries, version)[-1])
    items = _items(home, registered, suite)
    judged = _judgement(home, registered, entries, suite)
    evidence = judged.candidate_cell if judged else None
    results = _results(home, registered, evaluation_folder(suite), evidence)
    compared = judged if judged and judged.pairs is not None else None
    before: dict[str, Result] = {}
    if compared:
        before = _results(home, registered, reference_folder(suite), compared.reference_cell)
    if results.keys() != {item.id for item in items}:
        raise BadInput(
            f"{registered.label}: its answers on {suite} are to other items than lie beside them; "
            "sdft learn, run again with its curriculum, brings both"
        )
    answers = tuple(_answer(item, results[item.id], before.get(item.id)) for item in items)
    return Answers(
        name=name,
        version=version,
        suite=suite,
        reference_stage=compared.reference_stage if compared else None,
        items=len(answers),
        wrong=sum(not one.right for one in answers),
        reference_wrong=sum(not one.reference_right for one in answers) if compared else None,
        answers=answers,
    )


def _items(home: Home, registered: Registered, suite: str) -> list[Item]:
    label, data = registered.label, registered.run.data
    if f"eval/{suite}" not in data.metrics:
        scored = [one.removeprefix("eval/") for one in data.metrics if one.startswith("eval/")]
        known = ", ".join(sorted(scored))
        raise BadInput(f"{label}: was not scored on {suite!r}, only on {known}")
    asked = data.tags.get(suite_tag(suite))
    if asked is None:
        raise BadInput(
            f"{label}: its run does not keep the items of {suite}; sdft learn, run again with its "
            "curriculum, brings them"
        )

    def read(file: Path) -> list[Item]:
        if rehash(pq.read_table(file)) != asked:
            raise ValueError("not the items that were answered")
        return read_items(file)

    return kept(home, label, registered.run, f"{evaluation_folder(suite)}/{ROWS}", read)


def _judgement(
    home: Home, registered: Registered, entries: list[Entry], suite: str
) -> SuiteJudgement | None:
    """What the newest verdict says about a suite; None for a skill still to come."""
    entry = newest(entries, registered.entry.version, "verdict")
    if entry is None:
        return None
    file = verdict_file(entry.verdict_hash or "")
    verdict = kept(home, registered.label, registered.run, file, Verdict.read)
    return next((one for one in verdict.judgements if one.suite == suite), None)


def _results(
    home: Home, registered: Registered, folder: str, evidence: CellEvidence | None
) -> dict[str, Result]:
    """Per-item results by id; they are those that a verdict was given on where there is one."""

    def read(file: Path) -> dict[str, Result]:
        if evidence is not None and digest_file(file) != evidence.items_sha256:
            raise ValueError("not what the verdict was given on")
        return {one["id"]: one for one in pq.read_table(file).to_pylist()}

    return kept(home, registered.label, registered.run, f"{folder}/{ITEMS}", read)


def _answer(item: Item, result: Result, before: Result | None) -> Answer:
    return Answer(
        id=item.id,
        prompt=tuple(item.messages),
        references=tuple(item.references),
        status=result["status"],
        answer=result["completion"],
        error=result["error"],
        right=result["score"] == 1.0,
        reference_answer=before["completion"] if before else None,
        reference_right=before["score"] == 1.0 if before else None,
    )
