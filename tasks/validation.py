"""Data validation: every row of a skill, suite or set of anchors against its expectations.

A set that passes becomes a snapshot in the home: canonical Parquet, the validation result, its Data
Docs page. A set that does not leaves a quarantine file with a reason a row.
"""

import importlib.metadata
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import task

from schemas.base import BadInput, Contract
from schemas.curriculum import Curriculum, DataSource, Skill, Suite
from schemas.digest import digest_json
from schemas.expectations import (
    EXPECTATIONS_VERSION,
    Expectation,
    anchor_suite,
    eval_suite,
    train_suite,
)
from schemas.snapshot import ROWS, SNAPSHOT, Snapshot, SuiteData
from sdft.data import Row, data_hash, eval_table, plain, train_table, write_table
from sdft.files import placed
from sdft.modelfiles import all_files
from sdft.sources import read_rows
from tasks.basemodel import ModelDir
from tasks.console import say
from tasks.home import Home
from tasks.violations import message_of, run_expectations, write_quarantine


class Validated(Contract):
    """The data of a curriculum, which have passed their checks."""

    data: dict[str, SuiteData]
    """By skill or general suite."""
    anchors: Snapshot | None


@task
def validate_data(curriculum: Curriculum, model: ModelDir, home_dir: str) -> Validated:
    """Check all data of a curriculum; raises BadInput with the rows and rules broken in any set."""
    checker = Checker(curriculum, model, Home(home_dir))
    items: dict[str, Snapshot] = {}
    demonstrations: dict[str, Snapshot] = {}
    anchors: Snapshot | None = None
    problems: dict[str, None] = {}  # in their order; one that several sets have is said once
    for suite in curriculum.suites:
        with _noting(problems):
            items[suite.name] = checker.check_eval(suite)
        if isinstance(suite, Skill):
            with _noting(problems):
                demonstrations[suite.name] = checker.check_train(suite)
    with _noting(problems):
        anchors = checker.check_anchors()
    if problems:
        raise BadInput("\n".join(problems))
    data = {
        name: SuiteData(eval=snapshot, train=demonstrations.get(name))
        for name, snapshot in items.items()
    }
    return Validated(data=data, anchors=anchors)


@contextmanager
def _noting(problems: dict[str, None]) -> Generator[None]:
    try:
        yield
    except BadInput as error:
        problems[str(error)] = None


class Checker:
    """Checks the data of one curriculum; each check raises BadInput with the rows and rules broken.

    Evaluation items are read once: all demonstrations are held against all of them.
    """

    def __init__(self, curriculum: Curriculum, model: ModelDir, home: Home) -> None:
        self.curriculum, self.model, self.home = curriculum, model, home

    @cached_property
    def _read(self) -> dict[str, list[Row] | BadInput]:
        """The items of each suite, or why they cannot be read."""
        found: dict[str, list[Row] | BadInput] = {}
        for suite in self.curriculum.suites:
            try:
                found[suite.name] = read_rows(suite.eval, "eval", self.home.cache)
            except BadInput as error:
                found[suite.name] = error
        return found

    @property
    def items(self) -> dict[str, list[Row]]:
        """Of each suite that can be read."""
        return {name: rows for name, rows in self._read.items() if not isinstance(rows, BadInput)}

    @cached_property
    def facts(self) -> Any:
        """Made when first needed: importing the tokenizer's library costs more than a second."""
        from sdft.facts import FactMaker

        return FactMaker(Path(self.model.path))

    def check_eval(self, suite: Suite) -> Snapshot:
        """The items of a skill or general suite."""
        rows = self._read[suite.name]
        if isinstance(rows, BadInput):
            raise rows
        limits = self.curriculum.evaluation.max_new_tokens

        def suite_and_facts() -> tuple[list[Expectation], list[Row]]:
            room = _room(self.facts.max_positions, limits, "evaluation.max_new_tokens")
            expectations = eval_suite(room)
            return expectations, self.facts.eval(rows, suite.scorer)

        inputs = {"kind": "eval", "rows": rows, "scorer": suite.scorer, "limits": limits}
        return self._check(f"{suite.name}/eval", suite.eval, rows, inputs, suite_and_facts)

    def check_train(self, skill: Skill) -> Snapshot:
        """The demonstrations of a skill; none may be asked in a suite."""
        left_out = skill.name if skill.allow_overlap else ""
        asked = [row for name, rows in self.items.items() if name != left_out for row in rows]
        rows = read_rows(skill.train, "train", self.home.cache)
        training = skill.training
        template = training.teacher_template if training.method == "sdft" else None

        def suite_and_facts() -> tuple[list[Expectation], list[Row]]:
            limit = prompt_limit(skill, self.facts.max_positions)
            expectations = train_suite(limit, training.max_new_tokens)
            return expectations, self.facts.train(rows, template, asked)

        inputs = {
            "kind": "train",
            "rows": rows,
            "asked": [row["prompt"] for row in asked],
            "limits": [training.max_new_tokens, training.max_prompt_tokens],
            "template": template,
        }
        return self._check(f"{skill.name}/train", skill.train, rows, inputs, suite_and_facts)

    def check_anchors(self) -> Snapshot | None:
        """The prompts that stages are to answer as before; None where there are none.

        Raises BadInput also for a skill whose method has no teacher.
        """
        source, skills, cache = self.curriculum.anchors, self.curriculum.skills, self.home.cache
        if source is None:
            return None
        for skill in skills:
            if problem := self.curriculum.problem_with(skill):
                raise BadInput(problem)
        rows = read_rows(source, "anchors", cache)
        asked = [row for items in self.items.values() for row in items]
        taught = [row for one in skills for row in read_rows(one.train, "train", cache)]
        trainings = [one.training for one in skills]

        def suite_and_facts() -> tuple[list[Expectation], list[Row]]:
            limits = [prompt_limit(one, self.facts.max_positions) for one in skills]
            expectations = anchor_suite(max(limits))  # where it is too long it is left out
            return expectations, self.facts.anchors(rows, asked, taught)

        inputs = {
            "kind": "anchors",
            "rows": rows,
            "asked": [row["prompt"] for row in asked],
            "taught": [row["prompt"] for row in taught],
            "limits": [[one.max_new_tokens, one.max_prompt_tokens] for one in trainings],
        }
        return self._check("anchors", source, rows, inputs, suite_and_facts)

    def _check(
        self, name: str, source: DataSource, rows: list[Row], inputs: Row, suite_and_facts: Any
    ) -> Snapshot:
        """The snapshot of these very rows under these very rules, made where it is not there."""
        key = digest_json(
            plain(inputs)
            | {
                "model": self.model.model_hash,
                "on_invalid": self.curriculum.on_invalid,
                "version": [
                    EXPECTATIONS_VERSION,
                    importlib.metadata.version("great_expectations"),
                ],
            }
        )
        target = self.home.data / key[:32]
        if target.is_dir():
            try:
                snapshot = verified_snapshot(target)
            except BadInput as error:
                say("validate", name, f"{error}; made again", "yellow")
            else:
                place = {"name": name, "source": source.path}  # the home may have moved
                place |= {"directory": str(target), "file": str(target / ROWS)}
                return snapshot.model_copy(update=place)
        expectations, facts = suite_and_facts()
        self.home.data.mkdir(parents=True, exist_ok=True)
        with placed(target) as partial:
            violations = run_expectations(name, facts, expectations, partial)
            bad = {row for violation in violations for row in violation.rows}
            if bad:
                write_quarantine(rows, violations, partial / "quarantine.parquet")
            keep = [row for number, row in enumerate(rows, 1) if number not in bad]
            of_no_row = any(not violation.rows for violation in violations)
            if violations and (self.curriculum.on_invalid == "fail" or not keep or of_no_row):
                refused = self.home.data / f"refused-{key[:32]}"
                shutil.rmtree(refused, ignore_errors=True)
                partial.rename(refused)
                raise BadInput(message_of(source.path, violations, refused))
            table = eval_table(keep) if inputs["kind"] == "eval" else train_table(keep)
            write_table(table, partial / ROWS)
            snapshot = Snapshot(
                name=name,
                source=source.path,
                directory=str(target),
                file=str(target / ROWS),
                files=all_files(partial),
                data_hash=data_hash(table),
                rows=len(table),
                quarantined=len(bad),
            ).seal()
            snapshot.write(partial / SNAPSHOT)
        note = f"{len(table)} rows pass {len(expectations)} rules"
        if bad:
            note += f"; {len(bad)} rows are in quarantine: {target / 'quarantine.parquet'}"
        say("validate", name, note, "yellow" if bad else "")
        return snapshot


def prompt_limit(skill: Skill, max_positions: int) -> int:
    """What a prompt that a skill's stage learns may have, in tokens."""
    setting = f"training.max_new_tokens of the skill {skill.name}"
    room = _room(max_positions, skill.training.max_new_tokens, setting)
    return min(room, skill.training.max_prompt_tokens or room)


def _room(max_positions: int, answer: int, setting: str) -> int:
    """What a prompt may have, in tokens, where an answer of so many is to follow."""
    if max_positions <= answer:
        raise BadInput(
            f"{setting} is {answer}, which leaves no room for a prompt in the model's "
            f"{max_positions} positions; set it lower"
        )
    return max_positions - answer


def verified_snapshot(directory: Path) -> Snapshot:
    """A snapshot that is there; raises BadInput where it is not as it was made."""
    snapshot = Snapshot.read(directory / SNAPSHOT)
    if all_files(directory, lambda path: path.name != SNAPSHOT) != snapshot.files:
        raise BadInput(f"{directory}: was altered after it was made")
    return snapshot
