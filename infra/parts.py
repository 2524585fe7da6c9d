"""The parts of a stack on one machine: how each is started, and how it is seen to be well."""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from infra import postgresql
from infra.credentials import DATABASES, HOST, MLFLOW_USER, Credentials
from infra.first_start import BUCKET, REGION, TIMEOUT_S, store_client
from schemas.digest import digest_text
from tasks.home import NOTHING_SENT

LEFT_OUT = ("PREFECT_", "MLFLOW_", "AWS_", "SDFT_", "PG", "MOTO_")
"""What starts so in the environment of whoever starts the stack is not meant for its parts."""
STATE, MLFLOW_LOGINS = "stack-state", "mlflow-logins.ini"
POOLS = ("cpu", "gpu")


@dataclass(frozen=True)
class Part:
    """One part of the stack."""

    name: str
    command: list[str]
    environment: dict[str, str]
    is_well: Callable[[], bool]
    """Asked over its own interface; False also where it does not answer."""
    address: str
    """For people, without secrets."""
    options: dict[str, Any] = field(default_factory=dict)


def postgres(made: Credentials, folder: Path) -> Part:
    """The database server over the cluster in `folder`."""
    settings = {"listen_addresses": HOST, "port": made.POSTGRES_PORT, "max_connections": "200"}
    return Part(
        name="postgres",
        command=postgresql.server_command(folder, settings),
        environment=_inherited(),
        is_well=lambda: postgresql.answers(made.superuser),
        address=f"{HOST}:{made.POSTGRES_PORT}, databases {', '.join(DATABASES)}",
        options={"cwd": folder, **postgresql.account()},
    )


def s3(made: Credentials) -> Part:
    return Part(
        name="s3",
        command=[sys.executable, "-m", "infra.s3", made.S3_PORT],
        environment=_inherited() | _s3_login(made),
        is_well=lambda: _has_bucket(made),
        address=f"{made.s3_url}, bucket {BUCKET}",
    )


def prefect_server(made: Credentials, state: Path) -> Part:
    place = ["--host", HOST, "--port", made.PREFECT_PORT]
    return Part(
        name="prefect",
        command=[sys.executable, "-m", "prefect", "server", "start", *place],
        environment=_inherited()
        | {
            "PREFECT_HOME": str(state / "prefect"),
            "PREFECT_API_DATABASE_CONNECTION_URL": made.database("prefect", "asyncpg"),
            "PREFECT_SERVER_API_AUTH_STRING": ":".join(made.prefect_login),
            "PREFECT_UI_API_URL": f"{made.prefect_url}/api",
        },
        is_well=lambda: _is_ok(f"{made.prefect_url}/api/health"),
        address=made.prefect_url,
    )


def mlflow_server(made: Credentials, state: Path) -> Part:
    """Artifacts go through the server, so that only it needs the store's key."""
    place = ["--host", HOST, "--port", made.MLFLOW_PORT, "--workers", "1"]
    names = ("localhost", HOST)
    hosts = ",".join([*names, *(f"{name}:{made.MLFLOW_PORT}" for name in names)])
    return Part(
        name="mlflow",
        command=[sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
        + [*place, "--allowed-hosts", hosts],
        environment=_inherited()
        | _s3_login(made)
        | {
            "MLFLOW_BACKEND_STORE_URI": made.database("mlflow"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}",
            "MLFLOW_S3_ENDPOINT_URL": made.s3_url,
            "MLFLOW_AUTH_CONFIG_PATH": str(state / MLFLOW_LOGINS),
            "MLFLOW_AUTH_ADMIN_USERNAME": MLFLOW_USER,
            "MLFLOW_AUTH_ADMIN_PASSWORD": made.MLFLOW_PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": made.MLFLOW_SECRET_KEY,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        is_well=lambda: _is_ok(f"{made.mlflow_url}/health"),
        address=made.mlflow_url,
    )


def worker(made: Credentials, state: Path, pool: str) -> Part:
    """A worker that starts processes; one at a time on the pool of the GPUs.

    Each has a home of its own: the two stand for machines that share no disk.
    """
    name = f"{pool}-worker"
    limit = ["--limit", "1"] if pool == "gpu" else []
    command = ["-m", "prefect", "worker", "start", "--type", "process", "--name", name]
    return Part(
        name=name,
        command=[sys.executable, *command, "--pool", pool, *limit],
        environment=_inherited()
        | made.client
        | {
            "PREFECT_HOME": str(state / name),
            "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
            "PREFECT_WORKER_QUERY_SECONDS": "2",  # a stage waits for it twice; usual are 10
            "SDFT_HOME": str(state / f"{pool}-home"),
        },
        is_well=lambda: _is_online(made, pool, name),
        address=f"work pool {pool}",
    )


def cluster(directory: Path) -> Path:
    """The folder of the databases: short for its socket, and open to the user of the server."""
    return Path(tempfile.gettempdir()) / f"sdft-stack-{digest_text(str(directory))[:16]}"


def _inherited() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LEFT_OUT)}
    return kept | NOTHING_SENT


def _s3_login(made: Credentials) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": made.S3_ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": made.S3_SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
    }


def _has_bucket(made: Credentials) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    client = store_client(made.s3_url, made.S3_ACCESS_KEY, made.S3_SECRET_KEY)
    try:
        client.list_objects_v2(Bucket=BUCKET, MaxKeys=1)
    except (BotoCoreError, ClientError):
        return False
    return True


def _is_ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=TIMEOUT_S).status_code == 200
    except httpx.TransportError:
        return False


def _is_online(made: Credentials, pool: str, name: str) -> bool:
    """Whether Prefect's server has lately heard from a worker."""
    try:
        answer = httpx.post(
            f"{made.prefect_url}/api/work_pools/{pool}/workers/filter",
            json={},
            auth=made.prefect_login,
            timeout=TIMEOUT_S,
        )
    except httpx.TransportError:
        return False
    workers = answer.json() if answer.status_code == 200 else []
    return any(one["name"] == name and one["status"] == "ONLINE" for one in workers)
