"""How the teacher is shown the demonstration: templates over chat messages (paper, section 3)."""

import re

Message = dict[str, str]

DIALOGUE = "dialogue"
"""The demonstration as an earlier turn; what small models follow best."""

TEMPLATES: dict[str, str] = {
    "paper": (
        "{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
        "Now answer with a response of your own, including the thinking process."
    ),
    "compact": "{prompt}\n\nExample response:\n{demonstration}\n\nNow answer the request.",
    DIALOGUE: "{prompt}",
}


def check_template(text: str) -> None:
    """Raise ValueError unless `text` holds {prompt}, {demonstration} and no other placeholder."""
    placeholders = set(re.findall(r"\{(\w*)\}", text))
    if placeholders != {"prompt", "demonstration"}:
        raise ValueError(
            f"teacher template {text!r} is none of {', '.join(TEMPLATES)}, and as a text of your "
            "own it needs exactly the placeholders {prompt} and {demonstration}"
        )


def teacher_messages(
    messages: list[Message], response: str, context: str | None, template: str
) -> list[Message]:
    """The prompt's turns with the demonstration worked into the context (paper, section 3).

    Earlier turns stay as they are; the last user turn is put through the template. A source text
    (`context`, for knowledge skills) goes before it. Filled by plain replacement in one pass, so
    braces in the data are just text.
    """
    *earlier, last = messages
    source = f"{context}\n\n" if context else ""
    if template == DIALOGUE:
        question = {"role": "user", "content": source + last["content"]}
        return [*earlier, question, {"role": "assistant", "content": response}, last]
    values = {"{prompt}": last["content"], "{demonstration}": response}
    filled = re.sub(
        r"\{prompt\}|\{demonstration\}",
        lambda found: values[found.group()],
        TEMPLATES.get(template, template),
    )
    return [*earlier, {"role": "user", "content": source + filled}]
