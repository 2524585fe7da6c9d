"""Write the data of the SmolLM2 example: two skills and four general suites.

    python make_data.py        # writes skills/ and general/ beside this file

Everything comes from the lists below and one seed, so the files are the same bytes each time.
Measured with the model's tokenizer: a tool call has at most 24 tokens with its end token, its
student prompt 41, its teacher prompt 87 (demonstration as an earlier turn); an order line 11, its
prompts 37 and 69; a sum's prompt 90.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 7
TRAIN_PER_TOOL = 60
EVAL_PER_TOOL = 20
TRAIN_ORDERS = 240
EVAL_ORDERS = 80
GENERAL_ITEMS = 24

Row = dict[str, Any]
Call = dict[str, str]


def words(text: str) -> list[str]:
    return text.split()


# Part of every prompt of a skill, in training and evaluation, for student and teacher. It takes the
# place of the default system prompt, under which the general suites are asked.
SYSTEM = "You are an assistant that answers requests with a tool call in JSON."
ORDER_SYSTEM = "You are an assistant that turns orders into one line."

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# Values of the second list of each pair occur in evaluation items only.
CITIES = (
    words(
        "Paris London Berlin Madrid Rome Vienna Oslo Dublin Lisbon Prague Athens Warsaw Tokyo "
        "Delhi Cairo Lima Boston Chicago Denver Seattle Toronto Sydney Dallas Miami"
    ),
    words("Milan Geneva Hamburg Houston Munich Moscow Atlanta Phoenix"),
)
NAMES = (
    words(
        "Anna Ben Carlos David Emma Frank Grace Henry Jack Kate Laura Maria Nina Oscar Peter Rosa "
        "Sam Tom Victor Alice Julia Martin Paul Sarah"
    ),
    words("Daniel Lucy Robert Helen George Linda Simon Eva"),
)
TEXTS = (
    [
        "I am late",
        "Call me back",
        "Dinner is ready",
        "The train is late",
        "Happy birthday",
        "Good luck",
        "The meeting is over",
        "I am at home",
        "Bring the keys",
        "See you soon",
        "Lunch is at noon",
        "The door is open",
        "I found the book",
        "Thank you",
        "Wait for me",
        "The bus is full",
    ],
    [
        "I am on the way",
        "The game is over",
        "Buy some bread",
        "Send the report",
        "The room is free",
        "Good night",
    ],
)

REQUESTS: dict[str, list[str]] = {
    "weather": [
        "What is the weather in {city} on {day}?",
        "How will the weather be in {city} on {day}?",
        "Tell me the weather for {city} on {day}.",
        "Will it rain in {city} on {day}?",
        "What weather will {city} have on {day}?",
        "Is it going to be sunny in {city} on {day}?",
    ],
    "calendar": [
        "Put a meeting with {with} on {day} in my calendar.",
        "Schedule a meeting with {with} on {day}.",
        "I want to meet {with} on {day}.",
        "Plan a meeting with {with} for {day}.",
        "Add {with} to my calendar for {day}.",
        "Set up a call with {with} on {day}.",
    ],
    "message": [
        'Tell {to}: "{text}".',
        'Send {to} the message "{text}".',
        'Write "{text}" to {to}.',
        'Text {to} "{text}".',
        'Let {to} know: "{text}".',
        'Send a message to {to} that says "{text}".',
    ],
    "flight": [
        "Book a flight from {from} to {to}.",
        "I want to fly from {from} to {to}.",
        "Find me a flight from {from} to {to}.",
        "Get me a plane ticket from {from} to {to}.",
        "I need a flight from {from} to {to}.",
        "Show me flights from {from} to {to}.",
    ],
}

ARTICLES = (
    words(
        "lamps chairs tables shirts books cups bags clocks boxes pens desks shoes coats bikes "
        "plates knives towels mirrors hats tents radios brushes candles carpets"
    ),
    words("spoons pillows ladders phones forks baskets gloves pans"),
)
ORDERS = [
    "Please send {count} {article} to {city} on {day}.",
    "We need {count} {article} in {city} by {day}.",
    "Ship {count} {article} to {city} for {day}.",
    "I would like {count} {article} delivered to {city} on {day}.",
    "Our shop in {city} wants {count} {article} on {day}.",
    "By {day} we must have {count} {article} in {city}.",
]

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Russia": "Moscow",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Thailand": "Bangkok",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
}
# Elements 2 to 20 and five metals of daily life. (Hydrogen is left out to keep the count.)
SYMBOLS = {
    "helium": "He",
    "lithium": "Li",
    "beryllium": "Be",
    "boron": "B",
    "carbon": "C",
    "nitrogen": "N",
    "oxygen": "O",
    "fluorine": "F",
    "neon": "Ne",
    "sodium": "Na",
    "magnesium": "Mg",
    "aluminum": "Al",
    "silicon": "Si",
    "phosphorus": "P",
    "sulfur": "S",
    "chlorine": "Cl",
    "argon": "Ar",
    "potassium": "K",
    "calcium": "Ca",
    "iron": "Fe",
    "copper": "Cu",
    "silver": "Ag",
    "gold": "Au",
    "lead": "Pb",
}
OPPOSITES: dict[str, list[str]] = {
    "hot": ["cold"],
    "big": ["small", "little"],
    "fast": ["slow"],
    "light": ["dark", "heavy"],
    "happy": ["sad", "unhappy"],
    "rich": ["poor"],
    "early": ["late"],
    "empty": ["full"],
    "strong": ["weak"],
    "young": ["old"],
    "high": ["low"],
    "wet": ["dry"],
    "hard": ["soft", "easy"],
    "long": ["short"],
    "open": ["close", "shut"],
    "buy": ["sell"],
    "win": ["lose"],
    "push": ["pull"],
    "day": ["night"],
    "love": ["hate"],
    "thick": ["thin"],
    "loud": ["quiet", "silent", "soft"],
    "first": ["last"],
    "true": ["false"],
}


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def draw_call(tool: str, held_out: bool, rng: random.Random) -> Call:
    """A tool call with random values; with `held_out` every open value is one of evaluation's."""

    def pick(values: tuple[list[str], list[str]]) -> str:
        return rng.choice(values[held_out])

    match tool:
        case "weather":
            return {"tool": tool, "city": pick(CITIES), "day": rng.choice(DAYS)}
        case "calendar":
            return {"tool": tool, "with": pick(NAMES), "day": rng.choice(DAYS)}
        case "message":
            return {"tool": tool, "to": pick(NAMES), "text": pick(TEXTS)}
        case _:
            origin, destination = rng.sample(CITIES[held_out], 2)
            return {"tool": tool, "from": origin, "to": destination}


def toolcall(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Train and eval rows. No call occurs twice; half of eval's have values unseen in train."""
    seen: set[str] = set()

    def draw(tool: str, held_out: bool) -> tuple[list[Row], str]:
        while True:
            call = draw_call(tool, held_out, rng)
            answer = json.dumps(call)
            if answer not in seen:
                seen.add(answer)
                request = rng.choice(REQUESTS[tool]).format(**call)
                return [turn("system", SYSTEM), turn("user", request)], answer

    train = [draw(tool, False) for tool in REQUESTS for _ in range(TRAIN_PER_TOOL)]
    rng.shuffle(train)
    evaluate = [draw(tool, i % 2 == 1) for i in range(EVAL_PER_TOOL) for tool in REQUESTS]
    return rows_of(train, evaluate)


def orderline(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Train and eval rows. No order occurs twice; half of eval's have values unseen in train."""
    seen: set[str] = set()

    def draw(held_out: bool) -> tuple[list[Row], str]:
        while True:
            article, city = rng.choice(ARTICLES[held_out]), rng.choice(CITIES[held_out])
            count, day = rng.randint(2, 9), rng.choice(DAYS)
            answer = f"{article} | {count} | {city} | {day}"
            if answer not in seen:
                seen.add(answer)
                order = rng.choice(ORDERS).format(article=article, count=count, city=city, day=day)
                return [turn("system", ORDER_SYSTEM), turn("user", order)], answer

    train = [draw(False) for _ in range(TRAIN_ORDERS)]
    return rows_of(train, [draw(i % 2 == 1) for i in range(EVAL_ORDERS)])


def rows_of(
    train: list[tuple[list[Row], str]], evaluate: list[tuple[list[Row], str]]
) -> tuple[list[Row], list[Row]]:
    """Rows of a skill's two files, from prompts and their answers."""
    return (
        [
            {"id": f"train-{i:03}", "prompt": prompt, "response": answer}
            for i, (prompt, answer) in enumerate(train)
        ],
        [
            {"id": f"eval-{i:03}", "prompt": prompt, "references": [answer]}
            for i, (prompt, answer) in enumerate(evaluate)
        ],
    )


def capitals() -> list[Row]:
    """Scored by `contains`."""
    return [
        {"prompt": f"What is the capital of {country}?", "references": [capital]}
        for country, capital in CAPITALS.items()
    ]


def elements() -> list[Row]:
    """Scored by `regex`: "O" or "He" as a substring would be found in any sentence."""
    return [
        {
            "prompt": f"What is the chemical symbol of {element}? Answer with the symbol only.",
            "references": [rf"\b{symbol}\b"],
        }
        for element, symbol in SYMBOLS.items()
    ]


def opposites() -> list[Row]:
    """Scored by `contains`."""
    return [
        {"prompt": f'What is the opposite of "{word}"?', "references": answers}
        for word, answers in OPPOSITES.items()
    ]


def sums(rng: random.Random) -> list[Row]:
    """Scored by `regex`. Two sums answered in earlier turns show the short form of an answer."""

    def question(a: int, b: int) -> Row:
        return turn("user", f"What is {a} + {b}?")

    shown = [(1, 2), (4, 5)]
    earlier: list[Row] = []
    for a, b in shown:
        earlier += [question(a, b), turn("assistant", f"{a} + {b} = {a + b}")]
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 10 - a) if (a, b) not in shown]
    return [
        {"prompt": [*earlier, question(a, b)], "references": [rf"\b{a + b}\b"]}
        for a, b in sorted(rng.sample(pairs, GENERAL_ITEMS))
    ]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the two skills and the general suites.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write them to")
    out: Path = parser.parse_args().out

    rng = random.Random(SEED)
    files: dict[str, list[Row]] = {}
    files["skills/toolcall/train"], files["skills/toolcall/eval"] = toolcall(rng)
    general = {
        "capitals": capitals(),
        "elements": elements(),
        "opposites": opposites(),
        "sums": sums(rng),
    }
    for suite, rows in general.items():
        assert len(rows) == GENERAL_ITEMS, f"{suite} has {len(rows)} items, not {GENERAL_ITEMS}"
        files[f"general/{suite}"] = [{"id": f"{suite}-{i:02}", **row} for i, row in enumerate(rows)]
    files["skills/orderline/train"], files["skills/orderline/eval"] = orderline(rng)
    for name, rows in files.items():
        write_jsonl(out / f"{name}.jsonl", rows)
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
