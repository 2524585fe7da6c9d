"""Data validation: every row of a skill or suite against its Great Expectations suite.

A set that passes becomes a snapshot in the home: canonical Parquet, the validation result, its Data
Docs page. A set that does not leaves a quarantine file with a reason a row.
"""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import task

from schemas.base import BadInput, Contract, write_atomically
from schemas.curriculum import Curriculum, DataSource, Skill, Suite
from schemas.digest import digest_json
from schemas.expectations import EXPECTATIONS_VERSION, Expectation, eval_suite, train_suite
from schemas.snapshot import Snapshot, SuiteData
from sdft.data import Row, data_hash, eval_table, read_rows, row_id, train_table, write_table
from sdft.files import placed
from sdft.modelfiles import all_files
from tasks.basemodel import ModelDir
from tasks.console import say
from tasks.home import Home

SHOWN_ROWS = 8
ROWS, SNAPSHOT = "rows.parquet", "snapshot.json"


class Violation(Contract):
    """An expectation that some rows break; `rows` are numbered from 1 as in the source."""

    rule: str
    rows: tuple[int, ...]


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
        template = skill.training.teacher_template
        learned_by = [skill.training]
        if self.curriculum.rehearsal:  # by later stages as well
            skills = self.curriculum.skills
            learned_by += [one.training for one in skills[skills.index(skill) + 1 :]]
        answers = [one.max_new_tokens for one in learned_by]
        prompts = [one.max_prompt_tokens for one in learned_by if one.max_prompt_tokens]

        def suite_and_facts() -> tuple[list[Expectation], list[Row]]:
            room = self.facts.max_positions - max(answers)
            expectations = train_suite(min([room, *prompts]), min(answers))
            return expectations, self.facts.train(rows, template, asked)

        inputs = {
            "kind": "train",
            "rows": rows,
            "asked": [row["prompt"] for row in asked],
            "limits": [*sorted({min(answers), max(answers)}), min(prompts, default=None)],
            "template": template,
        }
        return self._check(f"{skill.name}/train", skill.train, rows, inputs, suite_and_facts)

    def _check(
        self, name: str, source: DataSource, rows: list[Row], inputs: Row, suite_and_facts: Any
    ) -> Snapshot:
        """The snapshot of these very rows under these very rules, made where it is not there."""
        key = digest_json(
            json.loads(json.dumps(inputs, default=str))
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
                _write_quarantine(rows, violations, partial / "quarantine.parquet")
            keep = [row for number, row in enumerate(rows, 1) if number not in bad]
            if violations and (self.curriculum.on_invalid == "fail" or not keep or not bad):
                refused = self.home.data / f"refused-{key[:32]}"
                shutil.rmtree(refused, ignore_errors=True)
                partial.rename(refused)
                raise BadInput(_message(source.path, violations, refused))
            table = train_table(keep) if inputs["kind"] == "train" else eval_table(keep)
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


def verified_snapshot(directory: Path) -> Snapshot:
    """A snapshot that is there; raises BadInput where it is not as it was made."""
    snapshot = Snapshot.read(directory / SNAPSHOT)
    if all_files(directory, lambda path: path.name != SNAPSHOT) != snapshot.files:
        raise BadInput(f"{directory}: was altered after it was made")
    return snapshot


def run_expectations(
    name: str, facts: list[Row], expectations: list[Expectation], directory: Path
) -> list[Violation]:
    """Run the suite over the facts; writes result.json and the Data Docs page docs.html.

    An expectation that crashed counts as broken, by no row in particular.
    """
    import great_expectations as gx
    import pandas as pd
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    # The page is rendered here; the default context would leave an empty docs site in /tmp.
    stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    settings = DataContextConfig(
        store_backend_defaults=stores, progress_bars=ProgressBarsConfig(globally=False)
    )
    context = gx.get_context(mode="ephemeral", project_config=settings)
    batch = (
        context.data_sources.add_pandas("rows")
        .add_dataframe_asset(name)
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": pd.DataFrame(facts)})
    )
    suite = gx.ExpectationSuite(name=name)
    for one in expectations:
        suite.add_expectation_configuration(
            ExpectationConfiguration(type=one.type, kwargs=one.kwargs, meta={"rule": one.rule})
        )
    result = batch.validate(
        suite,
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
    )
    document: Any = result.to_json_dict()
    write_atomically(directory / "result.json", json.dumps(document, indent=1))
    page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result))
    write_atomically(directory / "docs.html", page)
    return [
        Violation(
            rule=one["expectation_config"]["meta"]["rule"],
            rows=tuple(
                int(place["row"]) for place in one["result"].get("unexpected_index_list") or ()
            ),
        )
        for one in document["results"]
        if not one["success"]
    ]


def _write_quarantine(rows: list[Row], violations: list[Violation], path: Path) -> None:
    reasons: dict[int, list[str]] = {}
    for violation in violations:
        for row in violation.rows:
            reasons.setdefault(row, []).append(violation.rule)
    table = [
        {
            "row": number,
            "id": row_id(rows[number - 1]),
            "reasons": why,
            "content": json.dumps(rows[number - 1], ensure_ascii=False, default=str),
        }
        for number, why in sorted(reasons.items())
    ]
    write_table(pa.Table.from_pylist(table), path)


def _message(source: str, violations: list[Violation], directory: Path) -> str:
    lines = [f"{source}: {len(violations)} rules are broken"]
    for violation in violations:
        shown = ", ".join(map(str, violation.rows[:SHOWN_ROWS]))
        more = len(violation.rows) - SHOWN_ROWS
        where = f" in row {shown}" if violation.rows else ""
        where += f" and {more} more" if more > 0 else ""
        lines.append(f"  {violation.rule}: not so{where}")
    lines.append(f"  details: {directory / 'docs.html'}")
    if any(violation.rows for violation in violations):
        lines.append(f"  the rows with their reasons: {directory / 'quarantine.parquet'}")
    return "\n".join(lines)
