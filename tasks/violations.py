"""Rows that break a rule: found by Great Expectations, set aside, and told to people."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.base import BadInput, Contract, write_atomically
from schemas.expectations import TELL_WHY, Expectation
from schemas.snapshot import PAGE, RESULT
from sdft.data import Row, row_id, write_table

SHOWN_ROWS = 8


class Violation(Contract):
    """An expectation that some rows break; `rows` are numbered from 1 as in the source."""

    rule: str
    rows: tuple[int, ...]
    why: dict[int, str] = {}
    """By row, where more is known than the rule."""


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
    write_atomically(directory / RESULT, json.dumps(document, indent=1))
    page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result))
    write_atomically(directory / PAGE, page)
    return [_violation(one) for one in document["results"] if not one["success"]]


def _violation(result: Any) -> Violation:
    config = result["expectation_config"]
    places = result["result"].get("unexpected_index_list") or ()
    column = config["kwargs"].get("column")
    return Violation(
        rule=config["meta"]["rule"],
        rows=tuple(int(place["row"]) for place in places),
        why={int(place["row"]): place[column] for place in places if column in TELL_WHY},
    )


def rules_checked(directory: Path) -> tuple[int, int]:
    """How many expectations were checked and how many were met, by the result in a directory.

    Raises BadInput where there is none or it cannot be read.
    """
    file = directory / RESULT
    try:
        found = json.loads(file.read_bytes())["statistics"]
        return int(found["evaluated_expectations"]), int(found["successful_expectations"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{file}: is no validation result ({error})") from None


def write_quarantine(rows: list[Row], violations: list[Violation], path: Path) -> None:
    reasons: dict[int, list[str]] = {}
    for violation in violations:
        for row in violation.rows:
            why = f": {violation.why[row]}" if row in violation.why else ""
            reasons.setdefault(row, []).append(f"{violation.rule}{why}")
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


def message_of(source: str, violations: list[Violation], directory: Path) -> str:
    count = len(violations)
    lines = [f"{source}: {count} {'rules are' if count > 1 else 'rule is'} broken"]
    for violation in violations:
        shown = ", ".join(
            f"{row} ({violation.why[row]})" if row in violation.why else str(row)
            for row in violation.rows[:SHOWN_ROWS]
        )
        more = len(violation.rows) - SHOWN_ROWS
        where = f" in row {shown}" if violation.rows else ""
        where += f" and {more} more" if more > 0 else ""
        lines.append(f"  {violation.rule}: not so{where}")
    lines.append(f"  details: {directory / PAGE}")
    if any(violation.rows for violation in violations):
        lines.append(f"  the rows with their reasons: {directory / 'quarantine.parquet'}")
    return "\n".join(lines)
