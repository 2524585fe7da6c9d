"""What a stack is reached with: secrets and ports, made once and kept in a file of mode 0600."""

import os
import secrets
import socket
import string
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dotenv import dotenv_values
from sqlalchemy import URL

from infra.postgresql import SUPERUSER
from schemas.base import BadInput

FILE, CLIENT_FILE = "stack.env", "client.env"
HOST = "127.0.0.1"
MLFLOW_USER = "admin"
DATABASES = ("prefect", "mlflow", "ledger")
"""Each belongs to a user of the same name."""


@dataclass(frozen=True)
class Credentials:
    """Secrets are safe in addresses, shells and ini files: letters, digits, `-` and `_`."""

    POSTGRES_PASSWORD: str
    PREFECT_DB_PASSWORD: str
    MLFLOW_DB_PASSWORD: str
    LEDGER_DB_PASSWORD: str
    PREFECT_PASSWORD: str
    MLFLOW_PASSWORD: str
    MLFLOW_SECRET_KEY: str
    S3_ACCESS_KEY: str
    S3_SECRET_KEY: str
    POSTGRES_PORT: str
    S3_PORT: str
    PREFECT_PORT: str
    MLFLOW_PORT: str

    @property
    def s3_url(self) -> str:
        return f"http://{HOST}:{self.S3_PORT}"

    @property
    def prefect_url(self) -> str:
        return f"http://{HOST}:{self.PREFECT_PORT}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{HOST}:{self.MLFLOW_PORT}"

    @property
    def prefect_login(self) -> tuple[str, str]:
        """Prefect knows one user for all."""
        return "sdft", self.PREFECT_PASSWORD

    def database(self, name: str, driver: str = "psycopg") -> str:
        """The address of one of the databases, for its own user."""
        return database_url(name, self.database_passwords[name], name, *self._place, driver)

    @property
    def database_passwords(self) -> dict[str, str]:
        """By database."""
        return {name: getattr(self, f"{name.upper()}_DB_PASSWORD") for name in DATABASES}

    @property
    def superuser(self) -> str:
        """The address of the server for who may do everything."""
        return database_url(SUPERUSER, self.POSTGRES_PASSWORD, "postgres", *self._place)

    @property
    def _place(self) -> tuple[str, int]:
        return HOST, int(self.POSTGRES_PORT)

    @property
    def client(self) -> dict[str, str]:
        """The environment of whoever uses the stack: a person, or a worker."""
        return {
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_API_AUTH_STRING": ":".join(self.prefect_login),
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": MLFLOW_USER,
            "MLFLOW_TRACKING_PASSWORD": self.MLFLOW_PASSWORD,
            "SDFT_LEDGER_URL": self.database("ledger"),
        }


def database_url(
    user: str, password: str, database: str, host: str, port: int, driver: str = "psycopg"
) -> str:
    """The address of a PostgreSQL database, with its password."""
    url = URL.create(f"postgresql+{driver}", user, password, host, port, database)
    return url.render_as_string(hide_password=False)


def make_credentials() -> Credentials:
    """New secrets, and ports that are free now."""
    names = [one.name for one in fields(Credentials)]
    ports = [name for name in names if name.endswith("_PORT")]
    made = {name: secrets.token_urlsafe(24) for name in names} | _free_ports(ports)
    letters = string.ascii_uppercase + "234567"
    made["S3_ACCESS_KEY"] = "AKIA" + "".join(secrets.choice(letters) for _ in range(16))
    return Credentials(**made)


def keep_credentials(directory: Path, made: Credentials) -> None:
    """Write them down, and beside them what a client of the stack needs, both for us alone."""
    for name, values in [(FILE, asdict(made)), (CLIENT_FILE, made.client)]:
        lines = [f"{name}={value}\n" for name, value in values.items()]
        write_private(directory / name, "".join(lines))


def read_credentials(directory: Path) -> Credentials | None:
    """Those of a stack that is, or was, up; None where there are none.

    Raises BadInput where the file is not as it was made.
    """
    file = directory / FILE
    if not file.is_file():
        return None
    found = {name: value or "" for name, value in dotenv_values(file).items()}
    missing = [one.name for one in fields(Credentials) if not found.get(one.name)]
    if missing:
        raise BadInput(f"{file}: lacks {', '.join(missing)}; `down` and `up` make it anew")
    return Credentials(**found)


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else may read, at no moment."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _free_ports(names: list[str]) -> dict[str, str]:
    with ExitStack() as held:  # all at once, so that they differ
        sockets = {name: held.enter_context(socket.socket()) for name in names}
        for one in sockets.values():
            one.bind((HOST, 0))
        return {name: str(one.getsockname()[1]) for name, one in sockets.items()}
