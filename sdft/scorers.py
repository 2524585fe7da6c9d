"""How a completion is scored against its references: 1.0 or 0.0, by the best reference."""

import re
from collections.abc import Callable
from typing import Any

from schemas.digest import STRICT_JSON, canonical_json

Score = Callable[[str, list[str]], float]


def exact_match(completion: str, references: list[str]) -> float:
    """1.0 if the completion is a reference, up to white space at the ends and runs of it within."""
    answer = " ".join(completion.split())
    return float(any(answer == " ".join(reference.split()) for reference in references))


def contains(completion: str, references: list[str]) -> float:
    """1.0 if a reference occurs in the completion as whole words, in any case."""
    return float(
        any(
            re.search(rf"(?<!\w){re.escape(reference.strip())}(?!\w)", completion, re.IGNORECASE)
            for reference in references
        )
    )


def regex(completion: str, references: list[str]) -> float:
    """1.0 if a reference, as a regular expression, matches somewhere in the completion."""
    return float(any(re.search(reference, completion) for reference in references))


def tool_call(completion: str, references: list[str]) -> float:
    """1.0 if the first JSON object in the completion equals a reference's, in any key order."""
    call = first_object(completion)
    if call is None:
        return 0.0
    texts = [canonical_json(first_object(one)) for one in references]  # true is not 1
    return float(canonical_json(call) in texts)


SCORERS: dict[str, Score] = {
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex,
    "tool_call": tool_call,
}


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, which may stand between other words; None without one."""
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = STRICT_JSON.raw_decode(text, start)
        except (ValueError, RecursionError):  # also for a number that Python or JSON cannot hold
            start = text.find("{", start + 1)
            continue
        return value
    return None


def reference_problem(scorer: str, reference: str) -> str | None:
    """Why a scorer could never use this reference; None when it can."""
    if not reference.strip():
        return "is blank"
    if scorer == "regex":
        try:
            re.compile(reference)
        except (re.error, OverflowError, RecursionError) as error:
            return f"is no regular expression: {error}"
    if scorer == "tool_call" and first_object(reference) is None:
        return "holds no JSON object"
    return None
