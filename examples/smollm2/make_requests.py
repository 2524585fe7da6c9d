"""Writes skills/orderline/train-and-requests.jsonl: the order lines, then ordinary requests.

    python examples/smollm2/make_requests.py

The requests, none of which is in a suite, have the base model's own answers: a stage that learns
them beside its skill keeps the model's manner of answering. Needs the model (fetch_model.py).
Answers are greedy; one that does not end within a rollout's length is left out.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from sdft.drawing import Sampling
from sdft.model import load_model, pick_device
from sdft.modelfiles import convert_gguf
from sdft.rollout import generate

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 28  # as in curriculum.yaml

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
    asked += ASKED_ONCE
    [file] = (HERE / "model").glob("*.gguf")
    with TemporaryDirectory() as folder:
        convert_gguf(file, Path(folder) / "base")
        lm = load_model(Path(folder) / "base", pick_device("cpu"))
    prompts = [lm.prompt_ids([{"role": "user", "content": one}]) for one in asked]
    answers = generate(lm, prompts, Sampling(MAX_NEW_TOKENS))
    rows = [
        {
            "id": f"request-{n:03}",
            "prompt": prompt,
            "response": lm.tokenizer.decode(said.tokens[:-1]),
        }
        for n, (prompt, said) in enumerate(zip(asked, answers, strict=True))
        if said.finished
    ]
    orders = (HERE / "skills" / "orderline" / "train.jsonl").read_text()
    written = HERE / "skills" / "orderline" / "train-and-requests.jsonl"
    written.write_text(orders + "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} of {len(asked)} answers ended in time")


if __name__ == "__main__":
    main()
