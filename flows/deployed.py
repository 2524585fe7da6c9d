"""What the commands of owners do, as flows: for deployments, which a worker runs.

`learn` and `reconcile` are flows of their own already. Prefect knows one user for all, so who asks
says so, and the ledger keeps it.
"""

import os
from pathlib import Path
from typing import Literal

from prefect import flow

from flows.changes import promote_version, roll_back
from flows.options import open_home
from schemas.ledger import Entry
from tasks.garbage import Garbage, collect_alone

Expected = int | Literal["none"] | None
"""The version that must be champion now, `none` for no champion, None for whichever it is."""


@flow(name="promote")
def promote(
    home_dir: str,
    name: str,
    version: int,
    asked_by: str,
    expect: Expected = None,
    override: str = "",
) -> Entry:
    """Make a version the champion, as `sdft promote`."""
    os.environ["SDFT_USER"] = asked_by
    home = open_home(Path(home_dir))
    return promote_version(home, name, str(version), _text(expect), override, in_flow=True)


@flow(name="rollback")
def rollback(
    home_dir: str, name: str, asked_by: str, to: int | None = None, expect: Expected = None
) -> Entry:
    """Put an earlier champion back, as `sdft rollback`."""
    os.environ["SDFT_USER"] = asked_by
    return roll_back(open_home(Path(home_dir)), name, _text(to), _text(expect), in_flow=True)


@flow(name="gc")
def gc(home_dir: str, remove: bool = False, older_than_h: float = 24.0) -> list[Garbage]:
    """Find, or remove, what nothing reaches any more, as `sdft gc`."""
    return collect_alone(open_home(Path(home_dir)), older_than_h * 3600, remove)


def _text(version: int | str | None) -> str | None:
    return None if version is None else str(version)
