"""Write anchors.jsonl: ordinary requests, which each stage is to answer as its parent does.

    python make_anchors.py     # the same bytes each time

None of them is in a suite. They were written as kinds of questions, and not chosen by what the
model answers.
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent

ASKED = {
    "What color is {}?": "grass snow coal blood milk gold honey sky lemon chocolate",
    "What sound does a {} make?": "cow dog cat duck sheep horse lion frog owl bee",
    'What is the past tense of "{}"?': "run eat go see write take give swim speak fly",
    'What is the plural of "{}"?': "mouse child foot tooth leaf knife box city man goose",
    "How many legs does a {} have?": "spider cat bird ant horse dog fly cow chicken crab",
    "What is a {}? Answer in three words.": "apple carrot salmon oak rose piano hammer copper "
    "diamond whale tiger bread cheese doctor teacher train bicycle river desert moon",
    "On which continent is {}?": "France Italy China Egypt Canada India Mexico Kenya Norway Peru",
    "What is a baby {} called?": "cat dog cow sheep horse bear hen duck goat lion",
    "Name a {}.": "bird fish tree color metal sport vegetable planet river city flower drink "
    "language job tool shape",
}
ASKED_ONCE = [
    "What do bees make?",
    "Which planet do we live on?",
    "What is the largest ocean?",
    "Who wrote Hamlet?",
    "What language is spoken in Brazil?",
    "What is the currency of Japan?",
    "Which month comes after May?",
    "Which day comes before Sunday?",
    "How many days are in a week?",
    "What is ice made of?",
    "Name a fruit.",
    "Name a musical instrument.",
    "Name a country in Africa.",
    "What do plants need to grow?",
    "How do you say thank you in French?",
    "What is the tallest mountain?",
    "What is 10 minus 3?",
    "What is the first letter of the alphabet?",
    "Which season comes after winter?",
    "What do you use to cut paper?",
]


def main() -> None:
    asked = [form.format(word) for form, words in ASKED.items() for word in words.split()]
    rows = [{"id": f"anchor-{n:03}", "prompt": one} for n, one in enumerate(asked + ASKED_ONCE)]
    (HERE / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
