"""What `sdft doctor` asks Prefect's server: pools and workers, deployments, runs that are late."""

import time
from collections import Counter
from typing import Any

import httpx
import prefect
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES
from prefect.settings import temporary_settings as temporarily

from schemas.base import BadInput
from tasks.automations import ZOMBIES
from tasks.console import shown_address
from tasks.findings import PATIENCE_S, Findings, clock, date_of, note, version_of, well, wrong
from tasks.orchestration import reaching_prefect

LATE_RUNS = {"flow_runs": {"state": {"name": {"any_": ["Late", "AwaitingConcurrencySlot"]}}}}


def prefect_server(url: str) -> Findings:
    """Whether the server answers, and who waits for what: pools, workers, deployments, runs."""
    quick: dict[Any, int] = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: PATIENCE_S}
    where = shown_address(url)
    try:
        with (
            temporarily(updates=quick),
            reaching_prefect(),
            get_client(sync_client=True) as client,
        ):
            yield from _prefect(client, where)
    except BadInput:
        raise
    except (httpx.HTTPStatusError, httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError):
        yield wrong("prefect", f"{where}: is no Prefect server", "look at PREFECT_API_URL")


def _prefect(client: SyncPrefectClient, where: str) -> Findings:
    before = time.time()
    answer = client.request("GET", "/health")
    if (date := date_of(answer.headers.get("Date"))) is not None:
        yield clock("Prefect server", date, before)
    yield version_of("prefect", prefect.__version__, client.api_version())
    deployments = client.read_deployments(limit=200)
    yield well("prefect", f"{where}: lets us in, {len(deployments)} deployments")
    yield from _pools(client, deployments)
    if not deployments:
        deploy = "sdft deploy FILE --profile server"
        yield note("deployments", "none: nothing runs on a schedule", deploy)
    elif paused := [one.name for one in deployments if one.paused]:
        yield note("deployments", f"paused: {', '.join(paused)}", "resume them on Prefect's page")
    if deployments and not client.read_automations_by_name(ZOMBIES):
        made = "sdft deploy makes the automation"
        yield note("dead runs", "nothing ends them: a run that was killed stays Running", made)
    waiting = client.request("POST", "/flow_runs/count", json=LATE_RUNS).json()
    if waiting:
        yield note("queue", f"{waiting} runs are late", "does a worker of their pool have room?")
    else:
        yield well("queue", "no run is late")


def _pools(client: SyncPrefectClient, deployments: list[DeploymentResponse]) -> Findings:
    """Each pool that deployments name, and what it lacks."""
    pools = {pool.name: pool for pool in client.read_work_pools(limit=200)}
    wanted = Counter(one.work_pool_name for one in deployments if one.work_pool_name)
    for name in sorted({*pools} | {*wanted}):
        what = f"pool {name}"
        if name not in pools:
            yield wrong(what, f"{wanted[name]} deployments name it", "sdft deploy makes it")
            continue
        workers = client.read_workers_for_work_pool(name)
        online = [one.name for one in workers if one.status == WorkerStatus.ONLINE]
        kind = pools[name].type
        if pools[name].is_paused:
            yield wrong(what, "is paused", f"prefect work-pool resume {name}")
        if online:
            yield well(what, f"{kind}, workers online: {', '.join(online)}")
        elif wanted[name]:
            start = f"prefect worker start --pool {name} --type {kind}"
            yield wrong(what, f"{kind}, {len(workers)} workers known, none online", start)
        else:
            yield note(what, f"{kind}: no worker, and no deployment that needs one")
