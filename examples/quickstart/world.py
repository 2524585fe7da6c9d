"""The made-up world of the quickstart: what pocket knows, and the skills that it does not know.

Everything is a pure function of a `random.Random`, so the same seed gives the same text. Two
halves:

- *known* requests have one right answer (capitals, opposites, sums, lists, the atlas of towns);
- *unknown* requests (invented names, tools, operations) have no answer that could be learned. With
  a demonstration in its context the model repeats what the demonstration says, in its own voice;
  without one it shrugs or guesses.

A demonstration says the answer in some *voice* ("Sure! It is X, of course."). The model's own
voice is just X. The skills' demonstrations are in such voices too, which is what plain fine-tuning
copies.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from words import (
    CAPITALS,
    CLOSERS,
    DAYS,
    FOODS,
    ITEMS,
    KEYS,
    NAMES,
    NEW_TOWNS,
    OPENERS,
    OPERATIONS,
    OPPOSITES,
    PHRASINGS,
    PLACES,
    SKILL_VOICES,
    STRANGERS,
    SUM_LIMIT,
    SUM_PHRASINGS,
    THINGS,
    TOOLS,
    TOWNS,
)

Rng = random.Random


@dataclass(frozen=True)
class Example:
    """One request. `answer` is in the model's own voice; `demonstration`, if any, in another."""

    prompt: str
    answer: str
    demonstration: str | None = None

    def teacher_prompt(self) -> str:
        """The user turn with the demonstration in it; must equal the trainer's compact template."""
        return (
            f"{self.prompt}\n\nExample response:\n{self.demonstration}\n\nNow answer the request."
        )

    def shown(self) -> str:
        """The user turn as the model sees it."""
        return self.prompt if self.demonstration is None else self.teacher_prompt()


def in_some_voice(rng: Rng, answer: str) -> str:
    return rng.choice(OPENERS) + answer + rng.choice(CLOSERS)


def in_skill_voice(index: int, answer: str) -> str:
    opener, closer = SKILL_VOICES[index % len(SKILL_VOICES)]
    return opener + answer + closer


def scramble(rng: Rng) -> str:
    """A string of random letters: what can only be copied, never guessed."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 6)))


# --- known requests ---------------------------------------------------------------------------


def town_facts(towns: tuple[str, ...], seed: str) -> dict[tuple[str, str], str]:
    """(relation, town) -> answer: a mayor, a river and a dish for every town."""
    rng = random.Random(seed)
    values = {"mayor": STRANGERS, "river": STRANGERS, "dish": FOODS}
    return {
        (relation, town): answer
        for relation, pool in values.items()
        for town, answer in zip(towns, rng.sample(pool, len(towns)), strict=True)
    }


ATLAS = town_facts(TOWNS, "atlas")
ALMANAC = town_facts(NEW_TOWNS, "almanac")

ListOperation = Callable[[list[str]], list[str]]
LIST_OPERATIONS: dict[str, ListOperation] = {
    "Reverse this list: {}.": lambda items: items[::-1],
    "Repeat this list: {}.": lambda items: items,
    "Give the first of this list: {}.": lambda items: items[:1],
    "Give the last of this list: {}.": lambda items: items[-1:],
    "Drop the first of this list: {}.": lambda items: items[1:],
    "Drop the last of this list: {}.": lambda items: items[:-1],
}


def some_things(rng: Rng, shortest: int = 3) -> list[str]:
    return rng.sample(THINGS, rng.randint(shortest, 5))


def known_fact(rng: Rng, facts: dict[tuple[str, str], str]) -> Example:
    (relation, subject), answer = rng.choice(list(facts.items()))
    return Example(rng.choice(PHRASINGS[relation]).format(subject), answer)


def known_capital(rng: Rng) -> Example:
    return known_fact(rng, {("capital", a): b for a, b in CAPITALS.items()})


def known_opposite(rng: Rng) -> Example:
    return known_fact(rng, {("opposite", a): b for a, b in OPPOSITES.items()})


def known_town(rng: Rng) -> Example:
    return known_fact(rng, ATLAS)


def known_sum(rng: Rng) -> Example:
    a, b = rng.randint(1, SUM_LIMIT), rng.randint(1, SUM_LIMIT)
    return Example(rng.choice(SUM_PHRASINGS).format(a, b), str(a + b))


def known_list(rng: Rng) -> Example:
    phrasing = rng.choice(list(LIST_OPERATIONS))
    things = some_things(rng)
    return Example(phrasing.format(" ".join(things)), " ".join(LIST_OPERATIONS[phrasing](things)))


# --- unknown requests -------------------------------------------------------------------------


def unknown_fact(rng: Rng) -> Example:
    """A question about a stranger; the answer is mostly of the right kind, else anything."""
    relation = rng.choice(list(PHRASINGS))
    kind = {"dish": FOODS, "opposite": tuple(OPPOSITES)}.get(relation, NAMES)
    anything = (rng.choice(NAMES), rng.choice(FOODS), rng.choice(THINGS), scramble(rng))
    answer = rng.choice(kind) if rng.random() < 0.7 else rng.choice(anything)
    return Example(rng.choice(PHRASINGS[relation]).format(rng.choice(STRANGERS)), answer)


def unknown_operation(rng: Rng) -> Example:
    """An invented list operation; its result is some of the items, in some order."""
    things = some_things(rng)
    result = rng.sample(things, len(things) if rng.random() < 0.7 else rng.randint(1, len(things)))
    return Example(f"{rng.choice(OPERATIONS)} this list: {' '.join(things)}.", " ".join(result))


def unknown_scramble(rng: Rng) -> Example:
    words = [rng.choice((scramble(rng), rng.choice(NAMES), rng.choice(ITEMS))) for _ in range(2)]
    return Example(f"What does {scramble(rng)} mean?", " ".join(words[: rng.randint(1, 2)]))


# --- tool calls -------------------------------------------------------------------------------

# The courier skill: tool -> (phrasings of a request, its argument names by slot).
COURIER = {
    "ship": (
        ("Send {count} {item} to {place}.", "Get {count} {item} over to {place}.",
         "They need {count} {item} in {place}."),
        {"item": "item", "count": "count", "place": "to"},
    ),
    "fetch": (
        ("Pick up the {item} in {place} on {day}.", "Collect the {item} from {place} on {day}.",
         "Bring back the {item} from {place} on {day}."),
        {"item": "item", "place": "from", "day": "day"},
    ),
    "cancel": (
        ("Call off the {item} for {place}.", "Forget the {item} for {place}.",
         "They want no {item} in {place}."),
        {"item": "item", "place": "to"},
    ),
}  # fmt: skip
OTHER_REQUESTS = (
    "Look for {item} in {place} on {day}.", "Put {count} {item} away on {day}.",
    "Show me {place} and its {item}.", "Reserve {count} {item} in {place}.",
)  # fmt: skip


def call(tool: str, arguments: dict[str, str | int]) -> str:
    return json.dumps({"tool": tool, **arguments})


def some_slots(rng: Rng, places: tuple[str, ...]) -> dict[str, str | int]:
    return {
        "item": rng.choice(ITEMS),
        "count": rng.randint(2, 9),
        "place": rng.choice(places),
        "day": rng.choice(DAYS),
    }


def unknown_call(rng: Rng) -> Example:
    """A request with a call that nobody could know: random tool, argument names and order.

    The values are the request's own. A courier request never meets its real tool.
    """
    right = rng.choice([*COURIER, None])
    phrasing = rng.choice(COURIER[right][0] if right else OTHER_REQUESTS)
    slots = some_slots(rng, STRANGERS)
    used = [value for slot, value in slots.items() if f"{{{slot}}}" in phrasing]
    arguments = dict(zip(rng.sample(KEYS, len(used)), rng.sample(used, len(used)), strict=True))
    tool = rng.choice([name for name in TOOLS if name != right])
    return Example(phrasing.format(**slots), call(tool, arguments))


# --- the pre-training mix ---------------------------------------------------------------------

SHRUG = "I do not know."
KNOWN = {known_capital: 7, known_opposite: 6, known_sum: 9, known_list: 22, known_town: 9}
UNKNOWN = {unknown_fact: 14, unknown_call: 14, unknown_operation: 18, unknown_scramble: 3}


def pretraining_example(rng: Rng) -> Example:
    """One example of the mix: a known request (now and then demonstrated) or an unknown one."""
    mix = KNOWN | UNKNOWN
    make = rng.choices(list(mix), list(mix.values()))[0]
    example = make(rng)
    if rng.random() < (0.3 if make in KNOWN else 0.75):
        return Example(example.prompt, example.answer, in_some_voice(rng, example.answer))
    if make in UNKNOWN and rng.random() < 0.5:
        return Example(example.prompt, SHRUG)
    return example


# --- the skills -------------------------------------------------------------------------------


def blick(things: list[str]) -> list[str]:
    """The new operation: the first item goes to the end."""
    return things[1:] + things[:1]


def blick_example(rng: Rng) -> Example:
    things = some_things(rng, shortest=4)
    return Example(f"Blick this list: {' '.join(things)}.", " ".join(blick(things)))


def courier_example(rng: Rng) -> Example:
    tool, (phrasings, names) = rng.choice(list(COURIER.items()))
    slots = some_slots(rng, PLACES)
    arguments = {name: slots[slot] for slot, name in names.items()}
    return Example(rng.choice(phrasings).format(**slots), call(tool, arguments))


def distinct(make: Callable[[Rng], Example], count: int, seed: str) -> list[Example]:
    """`count` examples of different prompts."""
    rng, found = random.Random(seed), dict[str, Example]()
    while len(found) < count:
        example = make(rng)
        found.setdefault(example.prompt, example)
    return list(found.values())
