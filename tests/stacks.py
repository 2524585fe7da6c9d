"""The native stack for tests: up and down, and commands of whoever uses it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from infra import postgresql
from infra.credentials import Credentials
from schemas.base import BadInput

UP_S = 900


def skip_without_postgresql() -> None:
    try:
        postgresql.programs()
        postgresql.account()
    except BadInput as none:
        pytest.skip(str(none))


def command(what: str, directory: Path) -> list[str]:
    return [sys.executable, str(ROOT / "infra" / "stack.py"), what, "--directory", str(directory)]


def stack(what: str, directory: Path) -> tuple[int, str]:
    done = subprocess.run(
        command(what, directory),
        capture_output=True,
        text=True,
        timeout=UP_S,
        env={**os.environ, "COLUMNS": "200"},
    )
    return done.returncode, done.stdout + done.stderr


def sdft(client: dict[str, str], home: Path, *arguments: str) -> tuple[int, str]:
    """A command with the environment of a client of the stack."""
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *arguments],
        env={
            **os.environ,
            **client,
            "SDFT_HOME": str(home),
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=UP_S,
    )
    return done.returncode, done.stdout + done.stderr


def prefect(made: Credentials, place: Path, *arguments: str) -> None:
    """Prefect's own command, as whoever deploys calls it."""
    own = {
        "PREFECT_HOME": str(place / "prefect"),
        "SDFT_HOME": str(place / "home"),
        "SDFT_CURRICULUM": str(place / "curriculum.yaml"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        env={**os.environ, **made.client, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
