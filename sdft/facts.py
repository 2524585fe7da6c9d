"""Scalar facts of raw rows, the columns that data validation looks at; made without judging."""

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from schemas.digest import digest_json
from schemas.expectations import ROLES
from schemas.templates import Message, teacher_messages
from sdft.data import Row, as_messages, as_references, row_id
from sdft.model import max_positions, render
from sdft.pretrained import open_config, open_tokenizer
from sdft.scorers import reference_problem

SHOWN = 40
"""Characters of a reference that cannot be used."""
_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
"""How chat messages begin that were written into one field, as JSON or as Python shows them."""


class FactMaker:
    """Facts of rows under one model's tokenizer, chat template and length."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = open_tokenizer(model_dir)
        self.max_positions = max_positions(open_config(model_dir))

    def train(self, rows: list[Row], template: str | None, asked: list[Row]) -> list[Row]:
        """One row of TRAIN_FACTS for each raw row; null where a fact cannot be made.

        `template` is None where no teacher reads the rows; `asked` are evaluation items whose
        prompts must not be trained on.
        """
        asked_keys = _prompt_keys(asked)
        facts = []
        for number, row in enumerate(rows, 1):
            messages, response = as_messages(row["prompt"]), _text_or_none(row["response"])
            taught = None
            if template and messages and response is not None and messages[-1]["role"] == "user":
                context = _text_or_none(row.get("context"))
                taught = teacher_messages(messages, response, context, template)
            common = self._common(number, row)
            teacher_tokens, problem = self._prompt_tokens(taught)
            length = None if response is None else len(self._encode(response)) + 1  # and its end
            facts.append(
                {
                    **common,
                    "template_problem": common["template_problem"] or problem,
                    "response": response,
                    "response_tokens": length,
                    "teacher_tokens": teacher_tokens,
                    "in_eval": _prompt_key(row) in asked_keys,
                    "context_ok": isinstance(row.get("context"), str | None),
                }
            )
        return facts

    def anchors(self, rows: list[Row], asked: list[Row], taught: list[Row]) -> list[Row]:
        """One row of ANCHOR_FACTS for each raw row; null where a fact cannot be made.

        `asked` are evaluation items, `taught` the skills' demonstrations.
        """
        asked_keys, taught_keys = _prompt_keys(asked), _prompt_keys(taught)
        return [
            {
                **self._common(number, row),
                "in_eval": _prompt_key(row) in asked_keys,
                "in_train": _prompt_key(row) in taught_keys,
            }
            for number, row in enumerate(rows, 1)
        ]

    def eval(self, rows: list[Row], scorer: str) -> list[Row]:
        """One row of EVAL_FACTS for each raw row; null where a fact cannot be made."""
        facts = []
        for number, row in enumerate(rows, 1):
            references, choices = as_references(row["references"]), row.get("choices") or None
            problems = [_told(one, reference_problem(scorer, one)) for one in references or []]
            facts.append(
                {
                    **self._common(number, row),
                    "references": references and "\n".join(references),
                    "reference_problem": next((one for one in problems if one), ""),
                    "choices_ok": choices is None
                    or (isinstance(choices, list) and as_references(choices) is not None),
                }
            )
        return facts

    def _common(self, number: int, row: Row) -> Row:
        messages = as_messages(row["prompt"])
        tokens, problem = self._prompt_tokens(messages)
        return {
            "row": number,
            "id": row_id(row),
            "prompt": messages and messages[-1]["content"],
            "chat_as_text": isinstance(row["prompt"], str) and bool(_CHAT.match(row["prompt"])),
            "roles": messages and _roles(messages),
            "student_tokens": tokens,
            "template_problem": problem,
        }

    def _prompt_tokens(self, messages: list[Message] | None) -> tuple[int | None, str]:
        """The length of a prompt, and what the chat template has against its turns."""
        if not messages or not re.match(ROLES, _roles(messages)):
            return None, ""
        try:
            return len(render(self.tokenizer, messages)), ""
        except TemplateError as error:
            return None, str(error)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _roles(messages: list[Message]) -> str:
    return ">".join(turn["role"].replace(">", "?") for turn in messages)


def _told(reference: str, problem: str | None) -> str:
    shown = reference if len(reference) <= SHOWN else f"{reference[:SHOWN]}..."
    return f"{shown!r} {problem}" if problem else ""


def _prompt_keys(rows: list[Row]) -> set[str]:
    return {key for row in rows if (key := _prompt_key(row))}


def _prompt_key(row: Row) -> str | None:
    """The same for prompts that differ in white space alone; None for what is no prompt."""
    messages = as_messages(row["prompt"])
    if messages is None:
        return None
    turns = [{"role": turn["role"], "words": turn["content"].split()} for turn in messages]
    return digest_json({"turns": turns})


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
