"""Reconciling as a flow of its own, for a schedule: what `sdft reconcile` does."""

from pathlib import Path

from prefect import flow

from flows.options import open_home
from schemas.base import BadInput
from tasks.aliases import reconcile as reconcile_name
from tasks.events import deliver
from tasks.home import Home
from tasks.leases import release_silent
from tasks.ledger import Ledger
from tasks.reconciling import tidy


@flow(name="reconcile")
def reconcile(home_dir: str, name: str | None = None) -> dict[str, list[str]]:
    """Tidy up after dead processes, make aliases what the ledger says, send the events owed.

    Returns what was found, by registered model; under an empty name what belongs to none. Raises
    BadInput at the end where the registry's model of a name does not follow the ledger.
    """
    found, problems = reconcile_all(open_home(Path(home_dir)), name, in_flow=True)
    if problems:
        raise BadInput("\n".join(problems))
    return found


def reconcile_all(
    home: Home, name: str | None, in_flow: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """The same without Prefect around it: what was found, and why a name is left as it is."""
    silent = release_silent(Ledger(home))
    released = [f"released {key[:12]} of {who}, which is silent" for key, who in silent.items()]
    found, problems = {"": [*released, *tidy(home, in_flow)]}, []
    names = [name] if name else sorted({entry.name for entry in Ledger(home).entries()})
    for one in names:
        try:
            found[one] = reconcile_name(home, one)
        except BadInput as error:
            problems.append(str(error))
        else:
            deliver(home, one, in_flow)
    return found, problems
