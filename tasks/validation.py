"""Data validation: every row of a skill, suite or set of anchors against its expectations.

A set that passes becomes a snapshot in the home: canonical Parquet, the validation result, its Data
Docs page. A set that does not leaves a quarantine file with a reason a row.
"""

import importlib.metadata
import shutil
from collections.abc import Sequence
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
from schemas.settings import TrainingSettings
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
        if skill.training.method != "sdft":
            raise BadInput(
                f"anchors: the skill {skill.name} is learned by {skill.training.method}, which has "
                "no teacher whose answers could be kept; use method sdft or leave anchors out"
            )
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
            expectations = eval_suite(self.facts.max_positions - limits)
            return expectations, self.facts.eval(rows, suite.scorer)

        inputs = {"kind": "eval", "rows": rows, "scorer": suite.scorer, "limits": limits}
        return self._check(f"{suite.name}/eval", suite.eval, rows, inputs, suite_and_facts)

    def check_train(self, skill: Skill, asked: list[Row]) -> Snapshot:
        rows = read_rows(skill.train, "train", self.home.cache)
        skills = self.curriculum.skills
        later = skills[skills.index(skill) + 1 :] if self.curriculum.rehearsal else ()
        learned_by = [one.training for one in (skill, *later)]
        taught_by = [one.teacher_template for one in learned_by if one.method == "sdft"]
        template, limits = next(iter(taught_by), None), _Limits(learned_by)

        def suite_and_facts() -> tuple[list[Expectation], list[Row]]:
            expectations = train_suite(limits.prompt(self.facts.max_positions), limits.answers[0])
            return expectations, self.facts.train(rows, template, asked)

        inputs = {
            "kind": "train",
            "rows": rows,
            "asked": [row["prompt"] for row in asked],
            "limits": [*sorted({*limits.answers}), limits.prompts],
            "template": template,
        }
        return self._check(f"{skill.name}/train", skill.train, rows, inputs, suite_and_facts)

    def check_anchors(self, source: DataSource) -> Snapshot:
        rows = read_rows(source, "anchors", self.home.cache)
        skills, suites, cache = self.curriculum.skills, self.curriculum.suites, self.home.cache
        asked = [row for one in suites for row in read_rows(one.eval, "eval", cache)]
        taught = [row for one in skills for row in read_rows(one.train, "train", cache)]
        limits = _Limits([one.training for one in skills])

        def suite_and_facts() -> tuple[list[Expectation], list[Row]]:
            expectations = anchor_suite(limits.prompt(self.facts.max_positions))
            return expectations, self.facts.anchors(rows, asked, taught)

        inputs = {
            "kind": "anchors",
            "rows": rows,
            "asked": [row["prompt"] for row in asked],
            "taught": [row["prompt"] for row in taught],
            "limits": [limits.answers[1], limits.prompts],
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


class _Limits:
    """The strictest limits, in tokens, of the stages that learn some rows."""

    def __init__(self, settings: Sequence[TrainingSettings]) -> None:
        lengths = [one.max_new_tokens for one in settings]
        self.answers = min(lengths), max(lengths)
        """What the shortest and the longest answer may have."""
        self.prompts = min(
            [one.max_prompt_tokens for one in settings if one.max_prompt_tokens], default=None
        )

    def prompt(self, max_positions: int) -> int:
        """What a prompt may have."""
        room = max_positions - self.answers[1]
        return min(room, self.prompts or room)


def verified_snapshot(directory: Path) -> Snapshot:
    """A snapshot that is there; raises BadInput where it is not as it was made."""
    snapshot = Snapshot.read(directory / SNAPSHOT)
    if all_files(directory, lambda path: path.name != SNAPSHOT) != snapshot.files:
        raise BadInput(f"{directory}: was altered after it was made")
    return snapshot
