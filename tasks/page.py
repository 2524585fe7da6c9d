"""A version's lineage as one HTML page for an auditor: no script, nothing loaded from elsewhere."""

from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from pydantic import JsonValue

from schemas.digest import canonical_json
from schemas.ledger import Entry
from schemas.lineage import Lineage
from tasks.console import visible

DECISIONS = {
    "pass": "passed",
    "refuse": "refused",
    "ask": "left to a person",
    "none": "not judged",
}


def lineage_page(lineage: Lineage) -> str:
    """The page as HTML; the same lineage gives the same bytes."""
    ledger = {entry.seq: entry for stage in lineage.stages for entry in stage.history}
    suites = list(dict.fromkeys(suite for stage in lineage.stages for suite in stage.scores))
    return _page().render(
        lineage=lineage,
        suites=suites,
        ledger=[ledger[seq] for seq in sorted(ledger)],
    )


def _page() -> Template:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    pages.filters["moment"] = _moment
    pages.filters["shown"] = _shown
    pages.filters["decision"] = _decision
    pages.filters["event"] = _event
    pages.tests["web"] = _web
    return pages.get_template("lineage.html.jinja")


def _visible(value: object) -> object:
    """A text as `visible` has it; a number, or a piece of the page itself, as it is."""
    return visible(value) if type(value) is str else value


def _moment(iso: str) -> str:
    return datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _shown(value: JsonValue) -> str:
    """A setting for people: texts as they are, everything else as JSON."""
    if value is None:
        return "not set"
    return value if isinstance(value, str) else canonical_json(value)


def _decision(word: str) -> str:
    return DECISIONS.get(word, word)


def _event(entry: Entry, version: str | None = None) -> str:
    """What an entry says, of one version where it is given."""
    if entry.kind == "verdict":
        return f"verdict: {_decision(entry.decision or 'none')}"
    return entry.kind if version is None else entry.told_of(version)


def _web(value: str) -> bool:
    """Whether a link may be one on the page: a text such as `javascript:...` stays a text."""
    return value.startswith(("http://", "https://"))
