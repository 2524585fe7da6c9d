"""The Great Expectations suites, as values: what every row of a data set must satisfy.

Prompts are nested and texts are long, so the expectations look at scalar facts of a row (made by
`sdft.facts`). Each has a rule in words, which error messages, quarantine and reports show.
"""

from typing import Any

from schemas.base import Contract

EXPECTATIONS_VERSION = 4

ROLES = r"^(?:system>)?(?:user>assistant>)*user\Z"
_COMMON = ["row", "id", "prompt", "chat_as_text", "roles", "student_tokens", "template_problem"]
TRAIN_FACTS = [*_COMMON, "response", "response_tokens", "teacher_tokens", "in_eval", "context_ok"]
ANCHOR_FACTS = [*_COMMON, "in_eval", "in_train"]
EVAL_FACTS = [*_COMMON, "references", "reference_problem", "choices_ok"]
TELL_WHY = ("template_problem", "reference_problem")
"""The facts that say in words what is wrong; empty where nothing is."""


class Expectation(Contract):
    """One expectation: its Great Expectations type, arguments, and the rule in words."""

    type: str
    kwargs: dict[str, Any]
    rule: str


def train_suite(prompt_limit: int, response_limit: int) -> list[Expectation]:
    """What demonstrations must satisfy; limits in tokens."""
    return [
        *_common_suite(TRAIN_FACTS, prompt_limit),
        *_text("response"),
        _one_of("context_ok", [True], "context is a text or null"),
        _at_most("teacher_tokens", prompt_limit, "the teacher's prompt fits"),
        _at_most("response_tokens", response_limit, "the response fits into max_new_tokens"),
        _one_of(
            "in_eval",
            [False],
            "the prompt is in no evaluation suite (a skill's own may have it: allow_overlap)",
        ),
    ]


def anchor_suite(prompt_limit: int) -> list[Expectation]:
    """What prompts without answers must satisfy; the limit is in tokens."""
    return [
        *_common_suite(ANCHOR_FACTS, prompt_limit),
        _one_of("in_eval", [False], "the prompt is in no evaluation suite"),
        _one_of("in_train", [False], "no skill demonstrates an answer to the prompt"),
    ]


def eval_suite(prompt_limit: int) -> list[Expectation]:
    """What evaluation items must satisfy; the limit is in tokens."""
    return [
        *_common_suite(EVAL_FACTS, prompt_limit),
        _not_null("references", "references is a text or a list of texts"),
        _one_of("reference_problem", [""], "the scorer can use every reference"),
        _one_of("choices_ok", [True], "choices is a list of texts or null"),
    ]


def _common_suite(columns: list[str], prompt_limit: int) -> list[Expectation]:
    return [
        Expectation(
            type="expect_table_row_count_to_be_between",
            kwargs={"min_value": 1},
            rule="there is at least one row",
        ),
        Expectation(
            type="expect_table_columns_to_match_set",
            kwargs={"column_set": columns, "exact_match": True},
            rule="the columns are complete",
        ),
        _not_null("id", "id is not null"),
        Expectation(
            type="expect_column_values_to_be_unique",
            kwargs={"column": "id"},
            rule="id is unique (rows without ids: no two rows are equal)",
        ),
        _not_null("prompt", "prompt is a text, or messages with texts as role and content"),
        _not_blank("prompt"),
        _one_of(
            "chat_as_text",
            [False],
            "prompt is no text that holds chat messages (JSONL and Parquet hold them as they are)",
        ),
        Expectation(
            type="expect_column_values_to_match_regex",
            kwargs={"column": "roles", "regex": ROLES},
            rule="roles are an optional system, then user and assistant in turn, a user last",
        ),
        _one_of("template_problem", [""], "the model's chat template takes the turns"),
        _at_most("student_tokens", prompt_limit, "the prompt fits"),
    ]


def _text(column: str) -> list[Expectation]:
    return [_not_null(column, f"{column} is a text and not null"), _not_blank(column)]


def _not_blank(column: str) -> Expectation:
    return Expectation(
        type="expect_column_values_to_match_regex",
        kwargs={"column": column, "regex": r"\S"},
        rule=f"{column} is not blank",
    )


def _not_null(column: str, rule: str) -> Expectation:
    return Expectation(
        type="expect_column_values_to_not_be_null", kwargs={"column": column}, rule=rule
    )


def _one_of(column: str, values: list[Any], rule: str) -> Expectation:
    return Expectation(
        type="expect_column_values_to_be_in_set",
        kwargs={"column": column, "value_set": values},
        rule=rule,
    )


def _at_most(column: str, limit: int, rule: str) -> Expectation:
    return Expectation(
        type="expect_column_values_to_be_between",
        kwargs={"column": column, "max_value": limit},
        rule=f"{rule} (at most {limit} tokens)",
    )
