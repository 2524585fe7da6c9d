"""Outages: servers and databases that go away in the middle of runs, and processes that die.

The trainer is stopped between two of its steps while a fault is made, so that every fault meets a
stage that is half trained. Runs that mostly wait are made side by side.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from learning import SKILLS, STEPS, Learning, start_prefect, wait_for

from sdft.files import PARTIAL
from sdft.stagelog import METRICS, read_metrics
from tasks.aliases import all_versions
from tasks.children import ATTEMPTS
from tasks.leases import holders
from tasks.ledger import Ledger
from tasks.reconciling import GONE
from tasks.stageruns import ENDED

pytestmark = [pytest.mark.slow, pytest.mark.faults]

AWAY_S = 20
PATIENCE_S = 120
Hashes = dict[str, str]


class Server:
    """A server of our own that can be killed, and started again where it was."""

    def __init__(self, folder: Path, start: Callable[[Path, int], subprocess.Popen[bytes]]) -> None:
        self.folder, self._start = folder, start
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = self._start(self.folder, self.port)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def start_mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command = ["server", *store, "--artifacts-destination", str(folder / "artifacts")]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--workers", "1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    wait_for(f"http://127.0.0.1:{port}/health", server)
    return server


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers that end with the test."""
    made: list[Server] = []

    def make(name: str, start: Callable[[Path, int], subprocess.Popen[bytes]]) -> Server:
        made.append(Server(tmp_path / name, start))
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture(scope="module")
def undisturbed(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Hashes:
    """The model hash of each stage of a run that nothing happens to."""
    place = Learning(tmp_path_factory.mktemp("undisturbed"))
    assert place.run() == 0, place.output
    check(place, place.hashes())
    return place.hashes()


def check(place: Learning, undisturbed: Hashes) -> None:
    """The same weights, one version a stage, and every point of every curve once."""
    assert place.hashes() == undisturbed
    client = place.client
    versions = sorted(all_versions(client, "demo"), key=lambda one: int(one.version))
    assert [one.tags["sdft.skill"] for one in versions] == list(SKILLS)
    for version in versions:
        run = client.get_run(version.run_id)
        assert (run.info.status, run.data.tags[ENDED]) == ("FINISHED", "finished")
        key = version.tags["sdft.stage_key"]
        lines = read_metrics(place.home.stages / key[:32] / METRICS)
        assert [line.step for line in lines] == list(range(1, STEPS + 1))
        curves = {name for name in run.data.metrics if name.startswith("train/")}
        assert curves == {f"train/{name}" for name in lines[0].metrics}
        for name in lines[0].metrics:
            points = client.get_metric_history(version.run_id, f"train/{name}")
            found = sorted((point.step, point.timestamp, point.value) for point in points)
            assert found == [(one.step, one.time_ms, one.metrics[name]) for one in lines]
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert len(runs) == len(SKILLS) + 1  # and the one of the report
    kinds = [one.kind for one in Ledger(place.home).entries("demo")]
    assert kinds == ["registered", "verdict", "promoted"] * len(SKILLS)


@contextmanager
def halfway(place: Learning, process: Any, step: int = 2) -> Generator[psutil.Process]:
    """The trainer of the stage that is being trained, held after `step` steps."""
    end = time.monotonic() + PATIENCE_S
    while not any(len(read_metrics(path)) >= step for path in place.home.stages.glob(f"*.*/{METRICS}")):
        assert time.monotonic() < end and process.is_alive(), place.output[-3000:]
        time.sleep(0.01)
    [trainer] = [
        child
        for child in psutil.Process(process.pid).children()
        if "sdft.train" in child.cmdline()
    ]
    trainer.suspend()
    assert any(step <= len(read_metrics(path)) < STEPS for path in place.home.stages.glob(f"*.*/{METRICS}"))
    yield trainer
    with suppress(psutil.NoSuchProcess):
        trainer.resume()


def test_servers_that_are_away_for_a_while_hold_a_run_up_and_no_more(
    undisturbed: Hashes, servers: Callable[..., Server], tmp_path: Path
) -> None:
    mlflow, prefect = servers("mlflow", start_mlflow), servers("prefect", start_prefect)
    with_mlflow, with_prefect = Learning(tmp_path / "one"), Learning(tmp_path / "two")
    with_mlflow.variables["MLFLOW_TRACKING_URI"] = mlflow.address
    with_prefect.variables["PREFECT_API_URL"] = f"{prefect.address}/api"
    mlflow.start()
    prefect.start()
    began = time.monotonic()
    runs = [(place, place.start()) for place in (with_mlflow, with_prefect)]
    for (place, process), server in zip(runs, (mlflow, prefect), strict=True):
        with halfway(place, process):
            server.kill()
    t0 = time.monotonic(); print("killed", t0 - began)
    time.sleep(AWAY_S)
    mlflow.start()
    print("mlflow back", time.monotonic() - t0)
    prefect.start()
    print("prefect back", time.monotonic() - t0)
    for place, process in runs:
        code = place.join(process)
        print(time.monotonic() - t0, code, place.output)
    for place, process in runs:
        assert process.exitcode == 0
        check(place, undisturbed)
    print(flow_states(f"{prefect.address}/api", with_prefect), task_states(f"{prefect.address}/api"))


def flow_states(api: str, place: Learning) -> list[tuple[str, str]]:
    """Flow and state of Prefect's runs of a home, oldest first."""
    wanted = {"flow_runs": {"tags": {"all_": [place.home.lease_key]}}, "sort": "START_TIME_ASC"}
    runs = httpx.post(f"{api}/flow_runs/filter", json=wanted).raise_for_status().json()
    flows = {one["id"]: one["name"] for one in httpx.post(f"{api}/flows/filter", json={}).json()}
    return [(flows[one["flow_id"]], one["state_name"]) for one in runs]


def task_states(api):
    return [(t["name"], t["state_name"]) for t in httpx.post(f"{api}/task_runs/filter", json={}).json()]
