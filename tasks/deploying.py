"""Putting the pipeline on a schedule: pools, deployments and automations on Prefect's server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.workers.process import ProcessWorker

from schemas.base import BadInput, Contract
from tasks.automations import Done, apply_automation, notifications, save_block, zombies
from tasks.orchestration import reaching_prefect

POOLS = ("cpu", "gpu")
LEARN = "flows.learn.learn"
ENTRYPOINTS = "flows."
"""How the entry points of our deployments begin."""
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
BEATS_S = 30
NOTIFY_URL = "SDFT_NOTIFY_URL"

PoolType = Literal["process", "kubernetes"]


class Applied(Contract):
    """One thing on the server, and what was done about it."""

    kind: Literal["pool", "deployment", "automation"]
    name: str
    done: Done
    detail: str = ""


def apply_all(
    pool_type: PoolType, prefect_file: Path, job_template: Path, place: dict[str, str]
) -> list[Applied]:
    """Make what is missing, bring what is there up to date; done again it changes nothing.

    `place` are the variables that the deployments' file names: home and curriculum, as the workers
    see them. Raises BadInput where a pool of another type is in the way.
    """
    template: dict[str, Any] = (
        ProcessWorker.get_default_base_job_template()
        if pool_type == "process"
        else json.loads(job_template.read_text(encoding="utf-8"))
    )
    with reaching_prefect(), get_client(sync_client=True) as client:
        done = [_pool(client, name, pool_type, template) for name in POOLS]
        before = {one.id: one for one in _ours(client)}
        _deploy(prefect_file, place)
        after = _ours(client)
        done += [_deployed(one, before.get(one.id)) for one in after]
        flows = sorted({one.flow_id for one in after}, key=str)
        wanted = [zombies(flows)]
        if url := os.environ.get(NOTIFY_URL):
            wanted += notifications(flows, *save_block(url))
        for one in wanted:
            applied = apply_automation(client, one)
            done.append(Applied(kind="automation", name=one.name, done=applied))
    return done


def at_another_time(prefect_file: Path, cron: str, folder: Path) -> Path:
    """The deployments' file, written to `folder`, with another time for the curriculum."""
    content = yaml.safe_load(prefect_file.read_text(encoding="utf-8"))
    [learn] = [one for one in content["deployments"] if one["entrypoint"] == LEARN]
    [schedule] = learn["schedules"]
    schedule["cron"] = cron
    changed = folder / prefect_file.name
    changed.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return changed


def pool_template(name: str, template: dict[str, Any]) -> dict[str, Any]:
    """The template of one pool: frequent heartbeats, and a GPU where it is the GPUs' pool."""
    properties: dict[str, Any] = json.loads(json.dumps(template["variables"]["properties"]))
    properties["env"]["default"] = properties["env"].get("default", {}) | {HEARTBEAT: str(BEATS_S)}
    if name == "gpu" and "gpu_count" in properties:
        properties["gpu_count"]["default"] = 1
    return template | {"variables": template["variables"] | {"properties": properties}}


def _pool(
    client: SyncPrefectClient, name: str, pool_type: PoolType, template: dict[str, Any]
) -> Applied:
    """A pool that is there is left as it is: its template is where a team sets its own defaults."""
    there = {pool.name: pool for pool in client.read_work_pools(limit=200)}
    if name not in there:
        wanted = pool_template(name, template)
        pool = WorkPoolCreate(name=name, type=pool_type, base_job_template=wanted)
        client.create_work_pool(pool)
        return Applied(kind="pool", name=name, done="made", detail=pool_type)
    if there[name].type != pool_type:
        raise BadInput(
            f"the pool {name} is of type {there[name].type}, not {pool_type}; delete it (prefect "
            f"work-pool delete {name}), or choose the other profile"
        )
    return Applied(kind="pool", name=name, done="as it was", detail=pool_type)


def _ours(client: SyncPrefectClient) -> list[DeploymentResponse]:
    found = client.read_deployments(limit=200)
    return [one for one in found if (one.entrypoint or "").startswith(ENTRYPOINTS)]


def _deployed(now: DeploymentResponse, before: DeploymentResponse | None) -> Applied:
    detail = ", ".join([f"pool {now.work_pool_name}", *_crons(now)])
    changing = {"updated", "last_polled", "status", "schedules"}
    same = (
        before is not None
        and now.model_dump(exclude=changing) == before.model_dump(exclude=changing)
        and _crons(now) == _crons(before)
    )
    done: Done = "made" if before is None else "as it was" if same else "changed"
    return Applied(kind="deployment", name=now.name, done=done, detail=detail)


def _crons(deployment: DeploymentResponse) -> list[str]:
    active = [one for one in deployment.schedules if one.active]
    return [f"{cron} {zone}" for one in active for cron, zone in _cron(one)]


def _cron(schedule: Any) -> list[tuple[str, str]]:
    cron = getattr(schedule.schedule, "cron", None)
    return [(cron, schedule.schedule.timezone or "UTC")] if cron else []


def _deploy(prefect_file: Path, place: dict[str, str]) -> None:
    """As `prefect deploy --all` does it."""
    command = ["-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file"]
    done = subprocess.run(
        [sys.executable, *command, str(prefect_file)],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise BadInput(f"{prefect_file}: cannot be deployed:\n{last}")
