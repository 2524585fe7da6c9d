"""A version's answers to a suite for people in a terminal."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from schemas.results import Answer, Answers
from tasks.console import console, visible

LAST_MESSAGES = 3
LONGEST = 600
"""Of a text that is longer this many characters are shown: its beginning and its end."""


def show_answers(found: Answers) -> None:
    """What was asked and answered, item by item, and how many answers are wrong."""
    reference = _reference(found.reference_stage)
    for one in found.answers:
        console.print(_heading(one, reference), soft_wrap=True)
        table = Table.grid(padding=(0, 2), pad_edge=True)
        table.add_column(no_wrap=True, max_width=12, style="dim")
        table.add_column(overflow="fold")
        for label, text in _lines(one, reference):
            table.add_row(Text(visible(label)), Text(_cut(visible(text))))
        console.print(table)
    told = f"{found.name}/{found.version} on {found.suite}: {found.wrong} of {found.items} wrong"
    if found.reference_wrong is not None:
        told += f"; {reference}, which it was held against: {found.reference_wrong}"
    console.print(told, style="bold", markup=False, soft_wrap=True)


def _reference(stage: int | None) -> str:
    return f"stage {stage}" if stage else "base"


def _heading(one: Answer, reference: str) -> Text:
    word, style = ("right", "green") if one.right else ("wrong", "red")
    changed = one.reference_right not in (None, one.right)
    before = f", {reference} was {'wrong' if one.right else 'right'}" if changed else ""
    return Text.assemble((word, style), f"{before}  {visible(one.id)}")


def _lines(one: Answer, reference: str) -> Iterator[tuple[str, str]]:
    """What is shown of an item: labels and texts."""
    if (earlier := len(one.prompt) - LAST_MESSAGES) > 0:
        yield "", f"[{earlier} earlier messages]"
    for message in one.prompt[-LAST_MESSAGES:]:
        yield message["role"], message["content"]
    for number, text in enumerate(one.references):
        yield "" if number else "expected", text
    if one.error is not None or one.answer is None:
        yield one.status, one.error or "no answer was made"
    if one.answer is not None:
        yield "answered", one.answer
    if one.reference_answer not in (None, one.answer):
        yield reference, one.reference_answer or ""


def _cut(text: str) -> str:
    left_out = len(text) - LONGEST
    if left_out <= 0:
        return text
    half = LONGEST // 2
    return f"{text[:half]} [{left_out} characters] {text[-half:]}"
