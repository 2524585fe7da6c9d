"""Write the quickstart's data from the made-up world: general suites and three skills.

Usage: python make_skills.py        (the same bytes every time)
"""

import json
import random
from pathlib import Path
from typing import Any

import words
import world
from world import Example

HERE = Path(__file__).parent
SUITE_ITEMS = 60
COURIER_TRAIN, BLICK_TRAIN, EVAL_ITEMS = 160, 200, 60


def train_row(item_id: str, example: Example, voice: int) -> dict[str, Any]:
    """A demonstration in a foreign voice; the own-voice answer serves to measure the teacher."""
    return {
        "id": item_id,
        "prompt": example.prompt,
        "response": world.in_skill_voice(voice, example.answer),
        "metadata": {"answer": example.answer},
    }


def eval_row(item_id: str, example: Example) -> dict[str, Any]:
    return {"id": item_id, "prompt": example.prompt, "references": [example.answer]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in rows}) == len(rows), f"ids repeat in {path}"
    assert len({row["prompt"] for row in rows}) == len(rows), f"prompts repeat in {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def general_suites() -> dict[str, list[Example]]:
    """Every capital and every opposite once; samples of the sums and the list operations."""
    phrasing = random.Random("phrasing")
    facts = {
        name: [
            Example(phrasing.choice(words.PHRASINGS[relation]).format(subject), answer)
            for subject, answer in answers.items()
        ]
        for name, relation, answers in (
            ("capitals", "capital", words.CAPITALS),
            ("opposites", "opposite", words.OPPOSITES),
        )
    }
    return facts | {
        "sums": world.distinct(world.known_sum, SUITE_ITEMS, "sums suite"),
        "lists": world.distinct(world.known_list, SUITE_ITEMS, "lists suite"),
    }


def almanac() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each new fact in two phrasings to learn from; asked as given, and in a third phrasing."""
    rng = random.Random("almanac phrasings")
    train, evaluation = [], []
    for number, ((relation, town), answer) in enumerate(world.ALMANAC.items()):
        first, second, other = (
            Example(phrasing.format(town), answer)
            for phrasing in rng.sample(words.PHRASINGS[relation], 3)
        )
        fact = f"almanac-{number:03d}"
        train.append(train_row(f"{fact}-a", first, 2 * number))
        train.append(train_row(f"{fact}-b", second, 2 * number + 1))
        evaluation.append(eval_row(f"{fact}-given", first))
        evaluation.append(eval_row(f"{fact}-reworded", other))
    return train, evaluation


def main() -> None:
    for name, examples in general_suites().items():
        assert len(examples) == SUITE_ITEMS, f"{name} has {len(examples)} items"
        rows = [eval_row(f"{name}-{i:03d}", example) for i, example in enumerate(examples)]
        write(HERE / "general" / f"{name}.jsonl", rows)

    train, evaluation = almanac()
    write(HERE / "skills" / "almanac" / "train.jsonl", train)
    write(HERE / "skills" / "almanac" / "eval.jsonl", evaluation)

    for name, make, size in (
        ("courier", world.courier_example, COURIER_TRAIN),
        ("blick", world.blick_example, BLICK_TRAIN),
    ):
        examples = world.distinct(make, size + EVAL_ITEMS, name)
        train = [train_row(f"{name}-{i:03d}", e, i) for i, e in enumerate(examples[:size])]
        evaluation = [eval_row(f"{name}-{i:03d}", e) for i, e in enumerate(examples[size:], size)]
        write(HERE / "skills" / name / "train.jsonl", train)
        write(HERE / "skills" / name / "eval.jsonl", evaluation)


if __name__ == "__main__":
    main()
