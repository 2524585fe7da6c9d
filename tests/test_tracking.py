"""MLflow's own SQLite database: there whole or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.home import Home
from tasks.reconciling import tidy
from tasks.tracking import open_client

OPENED = """
import sys
from tasks.home import Home
from tasks.tracking import open_client
open_client(Home(sys.argv[1]))
"""


def test_a_home_outlives_who_dies_while_mlflows_tables_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    program = subprocess.Popen([sys.executable, "-c", OPENED, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not (half_made := [*tmp_path.glob(".partial-*/mlflow.db")]):
        assert time.monotonic() < deadline and program.poll() is None
        time.sleep(0.01)
    while half_made[0].stat().st_size < 100_000:  # of some 600 kB
        time.sleep(0.001)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    assert not (tmp_path / "mlflow.db").exists()

    home = Home(tmp_path)
    assert open_client(home).search_experiments()
    assert (tmp_path / "mlflow.db").is_file()
    [removed] = tidy(home)
    assert ".partial-" in removed
    assert not [*tmp_path.glob(".partial-*")]
