"""Reconciling as a flow of its own, for a schedule: what `sdft reconcile` does."""

from pathlib import Path

from prefect import flow

from flows.options import open_home
from tasks.aliases import reconcile as reconcile_name
from tasks.events import deliver
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.reconciling import tidy


@flow(name="reconcile")
def reconcile(home_dir: str, name: str | None = None) -> dict[str, list[str]]:
    """Tidy up after dead processes, make aliases what the ledger says, send the events owed.

    Returns what was found, by registered model; under an empty name what belongs to none.
    """
    return reconcile_all(open_home(Path(home_dir)), name, in_flow=True)


def reconcile_all(home: Home, name: str | None, in_flow: bool) -> dict[str, list[str]]:
    """The same without Prefect around it."""
    found = {"": tidy(home, in_flow)}
    names = [name] if name else sorted({entry.name for entry in Ledger(home).entries()})
    for one in names:
        found[one] = reconcile_name(home, one)
        deliver(home, one, in_flow)
    return found
