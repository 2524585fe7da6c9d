"""What the checks of `sdft doctor` find, one line each, and what every server is asked."""

import time
from collections.abc import Generator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from packaging.version import InvalidVersion, Version

from schemas.base import Contract

PATIENCE_S = 10
"""How long a server may take to answer."""
UNSURE_S, WRONG_S = 2.0, 30.0
"""Headers give whole seconds. Beyond the second, schedules and signed requests go wrong."""


class Finding(Contract):
    """One line of the doctor's."""

    what: str
    state: Literal["well", "note", "mend"]
    found: str
    mend: str = ""
    """What to do about it; empty where all is well."""


Findings = Generator[Finding]


def well(what: str, found: str) -> Finding:
    return Finding(what=what, state="well", found=found)


def note(what: str, found: str, mend: str = "") -> Finding:
    """Worth a look, and nothing that keeps a run from doing well."""
    return Finding(what=what, state="note", found=found, mend=mend)


def wrong(what: str, found: str, mend: str) -> Finding:
    return Finding(what=what, state="mend", found=found, mend=mend)


def clock(whose: str, theirs: datetime, before: float) -> Finding:
    """How far a server's clock is from ours; `before` is ours when it was asked."""
    ours = time.time()
    told = theirs.astimezone(UTC).timestamp()
    skew_s = max(before - UNSURE_S - told, told - ours - UNSURE_S, 0.0)
    if skew_s <= WRONG_S:
        return well("clock", f"the {whose}'s agrees with ours to {UNSURE_S + skew_s:.0f} s")
    return wrong(
        "clock",
        f"the {whose}'s differs from ours by {skew_s:.0f} s",
        "have both keep time (chrony or systemd-timesyncd)",
    )


def version_of(what: str, ours: str, theirs: str) -> Finding:
    """Whether a server is of our version; an older one may not know what we ask for."""
    text = f"server {theirs}, client {ours}"
    try:
        one, other = Version(ours), Version(theirs)
    except InvalidVersion:
        return wrong(what, f"{text}: is that {what}?", "look at its address")
    if one.release[:2] == other.release[:2]:
        return well(what, text)
    behind = "server" if other < one else "client"
    return wrong(what, f"{text}: not the same", f"update the {behind}; constraints.txt has ours")


def date_of(header: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(header).astimezone(UTC) if header else None
    except ValueError:
        return None
