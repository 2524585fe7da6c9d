"""Outages: servers and databases that go away in the middle of runs, and processes that die.

The trainer is held between two of its steps while a fault is made, so that every fault meets a
stage that is half trained. The stories mostly wait, so they are played side by side; each ends by
comparing what came out with a run that nothing happened to.
"""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from learning import SKILLS, STEPS, Learning, start_prefect, wait_for
from mlflow.entities import Run

from schemas.curriculum import load_curriculum
from sdft.files import partial_name
from sdft.stagelog import METRICS, read_metrics
from tasks.children import ATTEMPTS
from tasks.home import Home
from tasks.leases import holders
from tasks.ledger import Ledger
from tasks.reconciling import GONE
from tasks.stageruns import CARRY_S, ENDED, Spool
from tasks.tracking import STAGE_KEY, Away, all_versions

pytestmark = [pytest.mark.slow, pytest.mark.faults]

AWAY_S = 20
LOCKED_S = (5, 60)
PATIENCE_S = 240
SIDE_BY_SIDE = 3


@dataclass(frozen=True)
class Stage:
    """Where a story is played: its folder, a Prefect server for all, and what must come out."""

    folder: Path
    prefect: str
    undisturbed: "Future[dict[str, str]]"

    def learning(self, **curriculum: Any) -> Learning:
        return Learning(self.folder / "learning", **curriculum)


class Server:
    """A server of our own that can be killed, and started again where it was."""

    def __init__(self, folder: Path, start: Callable[[Path, int], subprocess.Popen[bytes]]) -> None:
        self.folder, self._start = folder, start
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = self._start(self.folder, self.port)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def start_mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command = ["server", *store, "--artifacts-destination", str(folder / "artifacts")]
    quick = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--workers", "1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **quick},
    )
    wait_for(f"http://127.0.0.1:{port}/health", server)
    return server


def locked_databases(stage: Stage) -> None:
    """MLflow's, the ledger's and Prefect's, in the training of each skill: they are waited for."""
    place = stage.learning()
    with Server(stage.folder / "prefect", start_prefect) as prefect:
        place.variables["PREFECT_API_URL"] = api = f"{prefect.address}/api"
        files = [place.home.root / "mlflow.db", place.home.root / "ledger.db"]
        files.append(prefect.folder / "prefect.db")
        process = place.start()
        for seconds in LOCKED_S:
            with halfway(place, process):
                locks = [lock(file) for file in files]
            time.sleep(seconds)
            for one in locks:
                one.close()
        assert place.join(process) == 0, place.output
        assert prefect_states(api, place) == {"learn": ["Completed"], "prepare": ["Completed"]}
        check(place, stage)


def mlflow_away_for_good(stage: Stage) -> None:
    """All is learned nevertheless; what MLflow missed is brought when it is back.

    The first skill loses it in the middle, the second one begins without it, and so does a whole
    second run.
    """
    place = stage.learning()
    place.variables["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    with Server(stage.folder / "mlflow", start_mlflow) as mlflow:
        place.variables["MLFLOW_TRACKING_URI"] = mlflow.address
        process = place.start()
        with halfway(place, process):
            mlflow.kill()
        assert place.join(process) == 1, place.output
        waiting = "what waits to be registered: courier, blick"
        assert place.output.count(waiting) == 1
        assert place.hashes() == stage.undisturbed.result()
        assert place.run() == 1, place.output
        assert place.output.count(waiting) == 2
        assert not Ledger(place.home).entries()

        mlflow.start()
        assert place.run(None, "sync") == 0, place.output
        for number, skill in enumerate(SKILLS, 1):
            assert f"demo, stage {number} {skill}: {STEPS} steps" in place.output
        check_curves(place)
        assert place.run() == 0, place.output
        check(place, stage)
    assert attempts(place) == ["finished"] * len(SKILLS)
    assert "Traceback" not in place.output
    assert "Retry" not in place.output


def mlflow_away_for_a_while(stage: Stage) -> None:
    """The run is held up, and ends as if nothing had been."""
    place = stage.learning(skills=SKILLS[:1])
    with Server(stage.folder / "mlflow", start_mlflow) as mlflow:
        place.variables["MLFLOW_TRACKING_URI"] = mlflow.address
        process = place.start()
        goes_away(mlflow, place, process)
        check(place, stage)


def prefect_away_for_a_while(stage: Stage) -> None:
    """The run is held up, and ends as if nothing had been; away from the very start it is said.

    A plan needs none.
    """
    place = stage.learning(skills=SKILLS[:1])
    with Server(stage.folder / "prefect", start_prefect) as prefect:
        place.variables["PREFECT_API_URL"] = api = f"{prefect.address}/api"
        process = place.start()
        goes_away(prefect, place, process)
        assert prefect_states(api, place) == {"learn": ["Completed"], "prepare": ["Completed"]}
        check(place, stage)
    assert place.run(None, "plan", str(place.curriculum)) == 0, place.output
    for number, (command, code) in enumerate([((), 1), (("reconcile",), 0)], 1):
        assert place.run(None, *command) == code, place.output
        assert place.output.count(f"Prefect's server does not answer ({api})") == number
    assert "Traceback" not in place.output


def processes_that_die(stage: Stage) -> None:
    """How a run ended is said by MLflow, Prefect and its files; reconcile closes what says nothing.

    One after the other: the trainer is killed, the flow gets Ctrl-C, the flow is killed.
    """
    place = stage.learning(skills=SKILLS[:1])
    process = place.start()
    with halfway(place, process, 1) as trainer:
        trainer.kill()
    assert place.join(process) == 1
    run = only_run(place)
    assert (run.info.status, attempts(place)) == ("FAILED", ["killed"])
    assert "was killed by SIGKILL" in run.data.tags[ENDED]

    process = place.start()
    with halfway(place, process, 1):
        os.kill(process.pid, signal.SIGINT)
    assert place.join(process) == 130
    run = only_run(place)
    assert (run.info.status, attempts(place)) == ("KILLED", ["killed", "stopped"])
    assert run.data.tags[ENDED] == "interrupted"

    process = place.start()
    with halfway(place, process, steps_at_work(place) + 1):
        process.kill()
    assert place.join(process) == -signal.SIGKILL
    assert only_run(place).info.status == "RUNNING"
    assert prefect_states(stage.prefect, place)["learn"] == ["Failed", "Crashed", "Running"]
    assert len(holders(Ledger(place.home))) == 3  # of the home, the stage and its training
    mine = partial_name()
    dead, alive = (
        place.home.data / f"{mine.replace(f'-{os.getpid()}-', f'-{pid}-')}x"
        for pid in (process.pid, os.getpid())
    )
    dead.mkdir()
    alive.mkdir()

    assert place.run(None, "reconcile") == 0, place.output
    run = only_run(place)
    assert (run.info.status, run.data.tags[ENDED]) == ("KILLED", GONE)
    assert prefect_states(stage.prefect, place)["learn"] == ["Failed", "Crashed", "Crashed"]
    assert task_states(stage.prefect, place) == {"Completed", "Failed", "Crashed"}
    assert not holders(Ledger(place.home))
    assert (dead.exists(), alive.exists()) == (False, True)
    assert place.run() == 0, place.output
    check(place, stage)


STORIES = [
    locked_databases,
    mlflow_away_for_good,
    processes_that_die,
    prefect_away_for_a_while,
    mlflow_away_for_a_while,
]


def test_runs_end_as_if_nothing_had_been(
    prefect_server: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        undisturbed = pool.submit(learn_undisturbed, tmp_path / "undisturbed")
        played: dict[str, Future[None]] = {}
        for story in STORIES:
            folder = tmp_path / story.__name__
            folder.mkdir()
            played[story.__name__] = pool.submit(story, Stage(folder, prefect_server, undisturbed))
        for name, story in played.items():
            with subtests.test(name):
                story.result()


def test_an_mlflow_that_is_away_is_asked_again_after_longer_and_longer_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_at: list[float] = []

    def open_run(*_: object) -> str:
        asked_at.append(time.monotonic())
        raise Away("not there")

    monkeypatch.setattr("tasks.stageruns._open_run", open_run)
    nothing: Any = None
    spool = Spool(Home(tmp_path), tmp_path, nothing, nothing, nothing)
    end = time.monotonic() + PATIENCE_S
    while len(asked_at) < 3 and time.monotonic() < end:
        time.sleep(CARRY_S / 10)
    assert spool.end(CARRY_S)
    assert spool.is_away
    first, second = (b - a for a, b in pairwise(asked_at[:3]))
    assert first > 0.8 * CARRY_S  # a busy machine makes them longer, nothing shorter
    assert second > 1.6 * CARRY_S


def learn_undisturbed(folder: Path) -> dict[str, str]:
    """The model hash of each stage of a run that nothing happens to."""
    place = Learning(folder)
    assert place.run() == 0, place.output
    return place.hashes()


def goes_away(server: Server, place: Learning, process: Any) -> None:
    """A server is not there for a while in the middle of a run, which ends well nevertheless."""
    with halfway(place, process):
        server.kill()
    time.sleep(AWAY_S)
    server.start()
    assert place.join(process) == 0, place.output


@contextmanager
def halfway(place: Learning, process: Any, step: int = 2) -> Generator[psutil.Process]:
    """The trainer of the stage at work, held after `step` of its steps or a little later."""
    end = time.monotonic() + PATIENCE_S
    while not step <= steps_at_work(place) < STEPS or (trainer := place.trainer()) is None:
        assert time.monotonic() < end and process.is_alive(), place.output[-3000:]
        time.sleep(0.05)
    trainer.suspend()
    assert steps_at_work(place) < STEPS, "the trainer was too fast"
    yield trainer
    with suppress(psutil.NoSuchProcess):
        trainer.resume()


def steps_at_work(place: Learning) -> int:
    """The steps in the curve of the stage at work; 0 where none is."""
    curves = place.home.stages.glob(f"*.*/{METRICS}")
    return max((len(read_metrics(one)) for one in curves), default=0)


def lock(file: Path) -> sqlite3.Connection:
    """Nobody else writes to the database, or reads it where it has no WAL, until this is closed."""
    assert file.is_file()
    connection = sqlite3.connect(
        file, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False
    )
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def prefect_states(api: str, place: Learning) -> dict[str, list[str]]:
    """The states of Prefect's runs of a home, by flow, oldest first."""
    flows = {one["id"]: one["name"] for one in asked(f"{api}/flows/filter")}
    states: dict[str, list[str]] = {}
    for run in sorted(prefect_runs(api, place), key=lambda one: one["start_time"]):
        states.setdefault(flows[run["flow_id"]], []).append(run["state_name"])
    return states


def task_states(api: str, place: Learning) -> set[str]:
    """The states of all task runs of a home's flow runs."""
    runs = {"id": {"any_": [one["id"] for one in prefect_runs(api, place)]}}
    return {one["state_name"] for one in asked(f"{api}/task_runs/filter", flow_runs=runs)}


def prefect_runs(api: str, place: Learning) -> list[dict[str, Any]]:
    ours = {"tags": {"all_": [place.home.lease_key]}}
    return asked(f"{api}/flow_runs/filter", flow_runs=ours)


def asked(address: str, **filters: object) -> list[dict[str, Any]]:
    return httpx.post(address, json=filters).raise_for_status().json()


def only_run(place: Learning) -> Run:
    [run] = place.client.search_runs([place.client.get_experiment_by_name("demo").experiment_id])
    return run


def attempts(place: Learning) -> list[str]:
    """How the trainers ended, stage by stage."""
    files = sorted(place.home.stages.glob(f"*/{ATTEMPTS}"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line)["outcome"] for line in lines]


def check(place: Learning, stage: Stage) -> None:
    """The same weights, one version a stage, and every point of every curve once."""
    skills = [one.name for one in load_curriculum(place.curriculum).skills]
    undisturbed = stage.undisturbed.result()
    assert place.hashes() == {skill: undisturbed[skill] for skill in skills}
    check_curves(place)
    client = place.client
    versions = sorted(all_versions(client, "demo"), key=lambda one: int(one.version))
    assert [one.tags["sdft.skill"] for one in versions] == skills
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert len(runs) == len(skills) + 1  # and the one of the report
    kinds = [one.kind for one in Ledger(place.home).entries("demo")]
    assert kinds == ["registered", "verdict", "promoted"] * len(skills)


def check_curves(place: Learning) -> None:
    """Every stage has one run, which is finished and has each point of its metrics file once."""
    client = place.client
    experiment = client.get_experiment_by_name("demo").experiment_id
    for record in place.records().values():
        [run] = client.search_runs([experiment], f"tags.`{STAGE_KEY}` = '{record.key}'")
        assert (run.info.status, run.data.tags[ENDED]) == ("FINISHED", "finished")
        lines = read_metrics(place.home.stages / record.key[:32] / METRICS)
        curves = {name for name in run.data.metrics if name.startswith("train/")}
        assert curves == {f"train/{name}" for name in lines[0].metrics}
        for name in lines[0].metrics:
            history = client.get_metric_history(run.info.run_id, f"train/{name}")
            points = sorted((point.step, point.value) for point in history)
            assert [step for step, _ in points] == list(range(1, STEPS + 1))
            if name != "tokens_per_s":  # a step that was made twice took another time
                assert points == [(line.step, line.metrics[name]) for line in lines]
