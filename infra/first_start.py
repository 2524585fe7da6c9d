"""What the stores need before the servers start; done again it changes nothing.

Databases with a user each, the bucket, and the file in which MLflow finds its users' database.
`python -m infra.first_start FILE` does it in containers, from the variables of `compose.yaml`.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from infra import postgresql
from infra.credentials import DATABASES, database_url, write_private

BUCKET, REGION = "artifacts", "us-east-1"
TIMEOUT_S = 5


def make_databases(superuser: str | URL, passwords: Mapping[str, str]) -> None:
    """The databases, each with a user of its own whom nobody else's database lets in."""
    users = postgresql.query(superuser, "SELECT rolname FROM pg_roles")
    there = postgresql.query(superuser, "SELECT datname FROM pg_database")
    for name in DATABASES:
        if name not in users:
            login = f"CREATE ROLE {name} LOGIN PASSWORD '{passwords[name]}'"
            postgresql.run_sql(superuser, login)
        if name not in there:
            postgresql.run_sql(superuser, f"CREATE DATABASE {name} OWNER {name}")
        postgresql.run_sql(superuser, f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")


def write_mlflow_logins(file: Path, database: str) -> None:
    """Where MLflow keeps its users; the first of them it makes itself."""
    write_private(
        file,
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = {database}\n"
        "auth_cache_ttl_seconds = 60\n"  # each request would hash the password anew
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
    )


def store_client(endpoint: str, key: str, secret: str) -> Any:
    """A client of the artifact store that does not wait long."""
    import boto3
    from botocore.config import Config

    quick = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}
    return boto3.client(
        "s3",
        region_name=REGION,
        endpoint_url=endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(**quick, retries={"total_max_attempts": 1}),
    )


def make_bucket(client: Any) -> None:
    """The bucket of the artifacts."""
    if BUCKET not in {one["Name"] for one in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)


def main() -> None:
    given = os.environ
    passwords = {name: given[f"{name.upper()}_DB_PASSWORD"] for name in DATABASES}
    host, _, port = given["POSTGRES_ADDRESS"].partition(":")
    place = (host, int(port or 5432))
    superuser = (postgresql.SUPERUSER, given["POSTGRES_PASSWORD"], "postgres")
    make_databases(database_url(*superuser, *place), passwords)
    keys = (given["S3_ACCESS_KEY"], given["S3_SECRET_KEY"])
    make_bucket(store_client(given["S3_ENDPOINT"], *keys))
    mlflow = database_url("mlflow", passwords["mlflow"], "mlflow", *place)
    write_mlflow_logins(Path(sys.argv[1]), mlflow)


if __name__ == "__main__":
    main()
