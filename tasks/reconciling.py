"""What processes that died have left behind: leases, runs that say RUNNING, half-written files."""

import os
import shutil

from prefect import get_client, task
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.runtime import flow_run
from prefect.states import Crashed

from sdft.files import PARTIAL, is_orphan
from tasks.console import say
from tasks.home import Home
from tasks.leases import holders, release_dead
from tasks.ledger import Ledger
from tasks.orchestration import PrefectAway, reaching_prefect
from tasks.stageruns import ENDED
from tasks.tracking import HOME_TAG, STAGE_KEY, Away, open_client, reaching, set_tags

DEPTH = 4
"""How deep below the home directories are written."""
GONE = "its process is gone and left no word"


@task
def reconcile_work(home_dir: str) -> None:
    """Tidy up after the dead, from inside a flow."""
    for line in tidy(Home(home_dir), in_flow=True):
        say("reconcile", "", line, "yellow")


def tidy(home: Home, in_flow: bool = False) -> list[str]:
    """Release and close what dead processes of this home held; returns one line each.

    Prefect's runs are looked at inside a flow or where PREFECT_API_URL is set.
    """
    ledger = Ledger(home)
    done = [f"released {key[:12]} of {holder}" for key, holder in release_dead(ledger).items()]
    try:
        with reaching(home):
            done += _close_runs(home, ledger)
    except Away as away:
        done.append(f"{away}; its runs are not looked at")
    if in_flow or os.environ.get("PREFECT_API_URL"):
        try:
            with reaching_prefect():
                done += _close_flow_runs(home, ledger)
        except PrefectAway as away:
            done.append(f"{away}; its runs are not looked at")
    return done + _remove_half_written(home)


def _close_runs(home: Home, ledger: Ledger) -> list[str]:
    """MLflow's runs that say RUNNING, and nobody holds their stage, or, for a report, the home."""
    client = open_client(home)
    held = {key.partition("/")[0] for key in holders(ledger)}
    ours = f"attributes.status = 'RUNNING' AND tags.`{HOME_TAG}` = '{home.lease_key}'"
    closed: list[str] = []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id], ours):
            if run.data.tags.get(STAGE_KEY, home.lease_key) in held:
                continue
            client.set_terminated(run.info.run_id, "KILLED")
            set_tags(client, run.info.run_id, {ENDED: GONE})
            closed.append(f"MLflow run {run.info.run_name}: {GONE}")
    return closed


def _close_flow_runs(home: Home, ledger: Ledger) -> list[str]:
    """Prefect's flow runs of this home that say RUNNING; while one holds the home, there are none.

    The holder itself asks this when it starts: every other one is dead.
    """
    running = {"type": {"any_": ["RUNNING"]}}
    wanted = FlowRunFilter.model_validate({"state": running, "tags": {"all_": [home.lease_key]}})
    tasks = TaskRunFilter.model_validate({"state": running})
    closed: list[str] = []
    with get_client(sync_client=True) as client:
        running_now = client.read_flow_runs(flow_run_filter=wanted)
        holder = holders(ledger).get(home.lease_key)  # only now: one that begins is in both
        if holder is not None and holder.pid != os.getpid():
            return []
        for run in running_now:
            if str(run.id) == flow_run.id:
                continue
            its_own = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
            for one in client.read_task_runs(flow_run_filter=its_own, task_run_filter=tasks):
                client.set_task_run_state(one.id, Crashed(message=GONE), force=True)
            client.set_flow_run_state(run.id, Crashed(message=GONE), force=True)
            closed.append(f"Prefect run {run.name}: {GONE}")
    return closed


def _remove_half_written(home: Home) -> list[str]:
    removed: list[str] = []
    for depth in range(DEPTH):
        for path in home.root.glob("*/" * depth + f"{PARTIAL}*"):
            if is_orphan(path):
                shutil.rmtree(path, ignore_errors=True)
                removed.append(f"removed {path.relative_to(home.root)}, which was not finished")
    return removed
