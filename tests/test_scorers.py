"""Scorers on completions as models write them."""

import pytest

from sdft.scorers import SCORERS, reference_problem


@pytest.mark.parametrize(
    ("scorer", "completion", "references", "expected"),
    [
        ("exact_match", " Paris\n", ["Rome", "Paris"], 1.0),
        ("exact_match", "Paris.", ["Paris"], 0.0),
        ("exact_match", "a  b\tc", ["a b c"], 1.0),
        ("contains", "It is PARIS, of course.", ["paris"], 1.0),
        ("contains", "The sum is 112", ["12"], 0.0),
        ("contains", "a+b (c)", ["b (c)"], 1.0),
        ("regex", "The symbol is He", [r"\bHe\b"], 1.0),
        ("regex", "The helium", [r"\bHe\b"], 0.0),
        ("tool_call", '{"b": 2, "a": 1}', ['{"a": 1, "b": 2}'], 1.0),
        ("tool_call", 'Sure: {not} {"a": 1} done', ['{"a": 1}'], 1.0),
        ("tool_call", '{"a": 1', ['{"a": 1}'], 0.0),
        ("tool_call", '{"a": "1"}', ['{"a": 1}'], 0.0),
        ("tool_call", '{"a": true}', ['{"a": 1}'], 0.0),
        ("tool_call", "", ['{"a": 1}'], 0.0),
        ("tool_call", '{"a": NaN}', ['{"a": 1}'], 0.0),
        ("tool_call", '{"a": 1e999}', ['{"a": 1}'], 0.0),
        ("tool_call", '{"a": -1e999} {"a": 1.5}', ['{"a": 1.5}'], 1.0),
        pytest.param("tool_call", f'{{"a": {"9" * 5000}}}', ['{"a": 1}'], 0.0, id="long number"),
    ],
)
def test_scores(scorer: str, completion: str, references: list[str], expected: float) -> None:
    assert SCORERS[scorer](completion, references) == expected


def test_references_that_could_never_match_are_found_before_any_work() -> None:
    assert reference_problem("regex", "(") is not None
    assert reference_problem("tool_call", "weather in Oslo") is not None
    assert reference_problem("tool_call", '{"a": 1e999}') is not None
    assert reference_problem("exact_match", "  ") is not None
    deep = '{"a": ' + "[" * 10**5
    assert reference_problem("tool_call", deep) is not None
    assert SCORERS["tool_call"](deep, ['{"tool": "x"}']) == 0.0
    assert reference_problem("regex", "(" * 10**4 + ")" * 10**4) is not None
    assert reference_problem("tool_call", '{"tool": "x"}') is None
