"""Data validation: every row of a skill, suite or set of anchors against its expectations.

A set that passes becomes a snapshot in the home: canonical Parquet, the validation result, its Data
Docs page. A set that does not leaves a quarantine file with a reason a row.
"""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from prefect import task

from schemas.base import BadInput
from schemas.curriculum import Curriculum, DataSource, Skill, Suite
from schemas.digest import digest_json
from schemas.expectations import (
    EXPECTATIONS_VERSION,
    Expectation,
    anchor_suite,
    eval_suite,
    train_suite,
)
from schemas.snapshot import Snapshot, SuiteData
from sdft.data import Row, data_hash, eval_table, plain, read_rows, train_table, write_table
from sdft.files import placed
from sdft.modelfiles import all_files
from tasks.basemodel import ModelDir
from tasks.console import say
from tasks.home import Home
from tasks.violations import message_of, run_expectations, write_quarantine

ROWS, SNAPSHOT = "rows.parquet", "snapshot.json"


@task
def validate_suite(
    suite: Suite, curriculum: Curriculum, model: ModelDir, home_dir: str
) -> SuiteData:
    """Check a skill's or general suite's data; raises BadInput with the rows and rules broken."""
    home = Home(home_dir)
    checker = _Checker(home, model, curriculum)
    eval_rows = read_rows(suite.eval, "eval", home.cache)
    items = checker.check_eval(suite, eval_rows)
    if not isinstance(suite, Skill):
        return SuiteData(eval=items, train=None)
    asked = [] if suite.allow_overlap else eval_rows
    for other in curriculum.suites:
        if other.name != suite.name:
            asked = [*asked, *read_rows(other.eval, "eval", home.cache)]
    return SuiteData(eval=items, train=checker.check_train(suite, asked))


@task
def validate_anchors(curriculum: Curriculum, model: ModelDir, home_dir: str) -> Snapshot | None:
    """Check the prompts that stages are to answer as before; None where there are none.

    Raises BadInput with the rows and rules broken, and for a skill whose method has no teacher.
    """
    if curriculum.anchors is None:
        return None
    for skill in curriculum.skills:
        if problem := curriculum.problem_with(skill):
            raise BadInput(problem)
    home = Home(home_dir)
    return _Checker(home, model, curriculum).check_anchors(curriculum.anchors)


class _Checker:
    def __init__(self, home: Home, model: ModelDir, curriculum: Curriculum) -> None:
        self.home, self.model, self.curriculum = home, model, curriculum
        self._facts: Any = None

    @property
    def facts(self) -> Any:
        """Made when first needed: importing the tokenizer's library costs more than a second."""
        if self._facts is None:
            from sdft.facts import FactMaker

            self._facts = FactMaker(Path(self.model.path))
        return self._facts

    def check_eval(self, suite: Suite, rows: list[Row]) -> Snapshot:
        limits = self.curriculum.evaluation.max_new_tokens

        def suite_and_facts() -> tuple[list[Expectation], list[Row]]:
            room = _room(self.facts.max_positions, limits, "evaluation.max_new_tokens")
            expectations = eval_suite(room)
            return expectations, self.facts.eval(rows, suite.scorer)

        inputs = {"kind": "eval", "rows": rows, "scorer": suite.scorer, "limits": limits}
        return self._check(f"{suite.name}/eval", suite.eval, rows, inputs, suite_and_facts)

    def check_train(self, skill: Skill, asked: list[Row]) -> Snapshot:
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

    def check_anchors(self, source: DataSource) -> Snapshot:
        rows = read_rows(source, "anchors", self.home.cache)
        skills, suites, cache = self.curriculum.skills, self.curriculum.suites, self.home.cache
        asked = [row for one in suites for row in read_rows(one.eval, "eval", cache)]
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
            if violations and (self.curriculum.on_invalid == "fail" or not keep or not bad):
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
