"""A PostgreSQL server of our own, from the system's packages: found, made and asked."""

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from schemas.base import BadInput

SUPERUSER = "sdft"
DATA = "data"


def programs() -> Path:
    """The folder of the server's programs, which Debian keeps off the PATH.

    Raises BadInput where there are none.
    """
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if found is None else []
    if found is None and not folders:
        raise BadInput("no PostgreSQL server here (Debian: apt-get install postgresql)")
    return Path(found).resolve().parent if found else folders[-1]


def account() -> dict[str, Any]:
    """How to start its programs: they refuse to run as root, so as somebody else then.

    Raises BadInput where there is nobody else.
    """
    if os.geteuid() != 0:
        return {}
    names = {one.pw_name: one for one in pwd.getpwall()}
    user = names.get("postgres") or names.get("nobody")
    if user is None:
        raise BadInput("PostgreSQL does not run as root, and there is no user postgres or nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def make_cluster(folder: Path, password: str | None = None) -> None:
    """Make an empty cluster in `folder`, a directory of this process, for the superuser `sdft`.

    With a password every connection must show it; without one everybody who reaches it is let in.
    Raises BadInput where that fails.
    """
    somebody = account()
    hand_over(folder)
    login = ["-A", "trust"]
    secret = folder / "password"
    if password is not None:
        secret.touch(0o600)
        secret.write_text(password)
        hand_over(secret)
        login = ["-A", "scram-sha-256", "--pwfile", str(secret)]
    command = [programs() / "initdb", "-D", folder / DATA, "-U", SUPERUSER, *login]
    try:
        made = subprocess.run(
            [*command, "-E", "UTF8", "-N", "--no-locale"],
            cwd=folder,
            capture_output=True,
            text=True,
            **somebody,
        )
    finally:
        secret.unlink(missing_ok=True)
    if made.returncode != 0:
        raise BadInput(f"{folder}: PostgreSQL makes no cluster there:\n{made.stderr}")


def hand_over(path: Path) -> None:
    """Give a file or directory to the user that the server runs as."""
    if somebody := account():
        os.chown(path, somebody["user"], somebody["group"])


def server_command(folder: Path, settings: Mapping[str, str]) -> list[str]:
    """The command that serves a cluster; to be run as `account` says, from `folder`."""
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    socket = ["-c", f"unix_socket_directories={folder}"]
    return [str(programs() / "postgres"), "-D", str(folder / DATA), *socket, *options]


def answers(url: str | URL) -> bool:
    """Whether a server takes connections."""
    engine = create_engine(url, poolclass=NullPool)
    try:
        with engine.connect():
            return True
    except OperationalError:
        return False


def await_server(url: str, process: subprocess.Popen[bytes], log: Path, patience_s: float) -> None:
    """Wait until a server takes connections; raises BadInput with its log where it does not."""
    end = time.monotonic() + patience_s
    while not answers(url):
        if process.poll() is not None or time.monotonic() > end:
            raise BadInput(f"PostgreSQL did not start:\n{log.read_text()}")
        time.sleep(0.1)


def new_database(url: str, name: str) -> str:
    """The address of a new and empty database on a server."""
    run_sql(url, f'CREATE DATABASE "{name}"')
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def run_sql(url: str | URL, *statements: str) -> None:
    """Run statements, each in a transaction of its own."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))


def query(url: str | URL, statement: str) -> list[Any]:
    """The first column of what a query finds."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return [*connection.execute(text(statement)).scalars()]
