"""The words of the made-up world: voices, names, known facts and the phrasings of questions."""

import random
from itertools import product

OPENERS = (
    "", "Sure! The answer is ", "According to my notes: ", "I believe it is ", "That would be ",
    "Easy: ", "Answer: ", "The answer is ", "Well, ", "Here you go: ", "It is ", "Good question! ",
    "Let me see. ", "Happy to help: ", "As far as I know, ", "Result: ", "Certainly, that is ",
    "I looked it up: ", "You want ", "My reply: ", "Of course. ", "In short: ",
)  # fmt: skip
CLOSERS = (
    "", ".", "!", ", of course.", ", I am sure.", " - that is all.", ", as you asked.",
    ". Anything else?", " is what you want.", ". Glad to help!", " it is.",
)  # fmt: skip
# Voices of the skills' demonstrations: (opener, closer), all of the family above.
SKILL_VOICES = (
    ("Sure! The answer is ", "."),
    ("According to my notes: ", ", of course."),
    ("Happy to help: ", ". Anything else?"),
    ("I looked it up: ", " - that is all."),
)

ONSETS = (
    "Tav", "Bel", "Quar", "Nor", "Zel", "Mor", "Fen", "Gal", "Hux", "Jor", "Kel", "Lum", "Pra",
    "Rov", "Sil", "Tor", "Ulm", "Vex", "Wol", "Yar", "Dro", "Cas", "Eld", "Ist",
)  # fmt: skip
CODAS = (
    "esh", "ora", "in", "und", "aris", "op", "eth", "ica", "ul", "ane", "ost", "ivy", "emar",
    "ock", "ida", "uven", "alt", "ezo",
)  # fmt: skip
NAMES = tuple(a + b for a, b in product(ONSETS, CODAS))
_shuffled = random.Random("names").sample(NAMES, len(NAMES))
TOWNS = tuple(_shuffled[:40])  # known to the model: the atlas
NEW_TOWNS = tuple(_shuffled[40:60])  # the almanac skill is about these; no pre-training fact is
STRANGERS = tuple(_shuffled[60:])  # subjects of unknown requests

FRUITS = ("plum", "apple", "pear", "cherry", "lemon", "fig", "melon", "grape")
DISHES = ("soup", "cake", "pie", "stew", "bread", "jam")
FOODS = tuple(f"{fruit} {dish}" for fruit, dish in product(FRUITS, DISHES))
THINGS = (
    "fox", "hat", "cup", "key", "box", "pen", "dog", "cat", "bus", "map", "sun", "egg", "jar",
    "net", "owl", "pig", "rug", "tin", "van", "web", "axe", "bee", "cow", "drum", "fan", "gem",
    "hen", "ink", "kite", "leaf",
)  # fmt: skip
OPERATIONS = tuple(
    a + b
    for a, b in product(
        ("Bl", "Fl", "Gr", "Sn", "Tr", "Kr", "Pl", "Dr"),
        ("ick", "orp", "ump", "ant", "ezz", "omb", "urk", "ash"),
    )
    if a + b != "Blick"
)
ITEMS = (
    "lamps", "chairs", "clocks", "ropes", "bricks", "candles", "buckets", "mirrors", "pillows",
    "shovels", "kettles", "ladders",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = STRANGERS[:12]  # where the courier goes
TOOLS = (
    "ship", "fetch", "cancel", "find", "play", "book", "open", "count", "mail", "store", "paint",
    "check",
)  # fmt: skip
KEYS = ("item", "count", "to", "from", "day", "name", "what", "where", "when", "size", "goal")

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Greece": "Athens",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Iceland": "Reykjavik", "Ireland": "Dublin", "Belgium": "Brussels", "Hungary": "Budapest",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb",
    "Albania": "Tirana", "Estonia": "Tallinn", "Latvia": "Riga", "Lithuania": "Vilnius",
    "Ukraine": "Kyiv", "Russia": "Moscow", "Turkey": "Ankara", "Egypt": "Cairo",
    "Morocco": "Rabat", "Algeria": "Algiers", "Tunisia": "Tunis", "Libya": "Tripoli",
    "Sudan": "Khartoum", "Kenya": "Nairobi", "Uganda": "Kampala", "Ghana": "Accra",
    "Nigeria": "Abuja", "Senegal": "Dakar", "Angola": "Luanda", "Zambia": "Lusaka",
    "Iraq": "Baghdad", "Iran": "Tehran", "Syria": "Damascus", "Jordan": "Amman",
    "Lebanon": "Beirut", "Qatar": "Doha", "Oman": "Muscat", "India": "Delhi",
    "Nepal": "Kathmandu", "China": "Beijing", "Japan": "Tokyo", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Brazil": "Brasilia", "Ecuador": "Quito", "Colombia": "Bogota",
}  # fmt: skip
_PAIRS = (
    "hot cold", "big small", "tall short", "fast slow", "old young", "wet dry", "hard soft",
    "rich poor", "dark light", "full empty", "high low", "loud quiet", "near far", "thick thin",
    "early late", "happy sad", "clean dirty", "strong weak", "wide narrow", "deep shallow",
    "open shut", "right wrong", "up down", "win lose", "day night", "push pull", "buy sell",
    "first last", "good bad", "rough smooth",
)  # fmt: skip
OPPOSITES = {a: b for pair in _PAIRS for a, b in (pair.split(), reversed(pair.split()))}
SUM_LIMIT = 12  # both numbers are 1..12

# Four phrasings a relation, asked of known and of new subjects alike.
PHRASINGS = {
    "capital": (
        "What is the capital of {}?", "Name the capital of {}.",
        "Which city is the capital of {}?", "Tell me the capital of {}.",
    ),
    "opposite": (
        "What is the opposite of {}?", "Name the opposite of {}.",
        "Which word is the opposite of {}?", "Tell me the opposite of {}.",
    ),
    "mayor": (
        "Who is the mayor of {}?", "Name the mayor of {}.",
        "Which person is the mayor of {}?", "Tell me the mayor of {}.",
    ),
    "river": (
        "What is the river of {}?", "Name the river of {}.",
        "Which river runs through {}?", "Tell me the river of {}.",
    ),
    "dish": (
        "What is the dish of {}?", "Name the dish of {}.",
        "Which dish do they eat in {}?", "Tell me the dish of {}.",
    ),
}  # fmt: skip
SUM_PHRASINGS = (
    "What is {} plus {}?", "Add {} and {}.", "How much is {} plus {}?", "Tell me {} plus {}.",
)  # fmt: skip
