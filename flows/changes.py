"""What owners change, for the commands and for the flows: done, then told to who follows."""

from schemas.ledger import Entry
from tasks.events import deliver
from tasks.home import Home
from tasks.promotion import promote, rollback


def promote_version(
    home: Home, name: str, version: str, expect: str | None, override: str, in_flow: bool
) -> Entry:
    """Make a version the champion; see `tasks.promotion.promote`."""
    entry = promote(home, name, version, expect, override)
    deliver(home, name, in_flow)
    return entry


def roll_back(home: Home, name: str, to: str | None, expect: str | None, in_flow: bool) -> Entry:
    """Put an earlier champion back; see `tasks.promotion.rollback`."""
    entry = rollback(home, name, to, expect)
    deliver(home, name, in_flow)
    return entry
