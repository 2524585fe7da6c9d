"""Two runs of one curriculum at once, signals, and a run that sleeps past its lease."""

import json
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from learning import SKILLS, STEPS, Learning

from sdft.chain import first_break
from sdft.stagelog import METRICS, read_metrics
from tasks.children import ATTEMPTS
from tasks.ledger import Ledger
from tasks.tracking import all_versions

pytestmark = [pytest.mark.slow, pytest.mark.faults]
ROUNDS = [0, 1, *(pytest.param(number, marks=pytest.mark.long) for number in range(2, 10))]


@pytest.fixture
def place(one_skill: Learning, tmp_path: Path) -> Learning:
    """A home that has the validated data and the base model's scores, and nothing learned."""
    return fresh(one_skill, tmp_path)


def fresh(one_skill: Learning, folder: Path) -> Learning:
    place = Learning(folder, skills=SKILLS[:1])
    place.prepare(one_skill)
    return place


def check(place: Learning, one_skill: Learning) -> None:
    """One result: the undisturbed run's weights, one version, a whole curve, a whole chain."""
    assert place.hashes() == one_skill.hashes()
    [version] = all_versions(place.client, "demo")
    history = place.client.get_metric_history(version.run_id, "train/divergence")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    experiment = place.client.get_experiment_by_name("demo").experiment_id
    runs = place.client.search_runs([experiment])
    assert sorted(run.info.run_name for run in runs) == ["demo-retention", "stage-1-courier"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    entries = Ledger(place.home).entries()
    assert [one.kind for one in entries] == ["registered", "verdict", "promoted"]
    assert first_break(entries) is None


def training(place: Learning, process: Any, step: int = 1) -> tuple[Path, int]:
    """The stage's work directory and its trainer, when it has done so many steps."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.is_alive():
        for path in place.home.stages.glob(f"*.*/{METRICS}"):
            if len(read_metrics(path)) >= step and (trainer := place.trainer()) is not None:
                return path.parent, trainer.pid
        time.sleep(0.01)
    raise AssertionError(f"was never seen training\n{place.output[-3000:]}")


def attempts(place: Learning) -> list[str]:
    [file] = place.home.stages.glob(f"*/{ATTEMPTS}")
    return [json.loads(line)["outcome"] for line in file.read_text().splitlines()]


def stop_outside_of_transactions(place: Learning, processes: list[int]) -> None:
    """SIGSTOP where no database is in use: SQLite's lock stays with a stopped process."""
    while True:
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        while not all(map(is_stopped, processes)):  # the signal comes to each thread by itself
            time.sleep(0.01)
        if not any(is_locked(place.home.root / name) for name in ("ledger.db", "mlflow.db")):
            return
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)


def is_stopped(pid: int) -> bool:
    stats = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def is_locked(file: Path) -> bool:
    """Whether anybody reads or writes: who reads keeps others from ending what they write."""
    with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            return True
    return False


@pytest.mark.parametrize("number", ROUNDS)
def test_the_same_curriculum_twice_at_once_is_one_result(
    one_skill: Learning, place: Learning, number: int
) -> None:
    both = [place.start(), place.start()]
    for one in both:
        one.join(200)
    assert [one.exitcode for one in both] == [0, 0], place.output
    check(place, one_skill)
    assert attempts(place) == ["finished"], "it was trained once"
    assert "waiting for process" in place.output


@pytest.mark.parametrize("number", range(2))
def test_two_homes_that_share_registry_and_ledger_train_it_once(
    one_skill: Learning, tmp_path: Path, number: int
) -> None:
    homes = [fresh(one_skill, tmp_path / name) for name in ("one", "two")]
    for place in homes:
        place.variables = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db?timeout=120",
            "SDFT_LEDGER_URL": f"sqlite:///{tmp_path}/ledger.db",
        }
    both = [place.start() for place in homes]
    for one in both:
        one.join(200)
    outputs = [place.output for place in homes]
    assert [one.exitcode for one in both] == [0, 0], "\n".join(outputs)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in homes[0].variables.items():
            patch.setenv(name, value)
        for place in homes:
            check(place, one_skill)
    fetched = ["fetched from the registry" in output for output in outputs]
    assert sorted(fetched) == [False, True]


def test_sigterm_to_the_flow_saves_and_the_same_command_goes_on(
    one_skill: Learning, place: Learning
) -> None:
    process = place.start()
    training(place, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(100)
    assert process.exitcode == 143, place.output
    assert "terminated; the same command goes on" in place.output
    assert "Traceback" not in place.output
    assert attempts(place) == ["stopped"]
    [run] = place.client.search_runs([place.client.get_experiment_by_name("demo").experiment_id])
    assert (run.info.status, run.data.tags["sdft.ended"]) == ("KILLED", "terminated")
    [work] = place.home.stages.glob("*.*")
    assert list((work / "checkpoints").glob("step-*/COMPLETE"))
    assert place.run() == 0, place.output
    check(place, one_skill)
    assert attempts(place) == ["stopped", "finished"]


def test_sigterm_to_the_trainer_alone_is_an_error_that_says_so(
    one_skill: Learning, place: Learning
) -> None:
    process = place.start()
    _, trainer = training(place, process)
    os.kill(trainer, signal.SIGTERM)
    process.join(100)
    assert process.exitcode == 1, place.output
    assert "sdft.train was stopped by a signal and has saved its state" in place.output
    assert "Traceback" not in place.output
    assert attempts(place) == ["stopped"]
    assert place.run() == 0, place.output
    check(place, one_skill)


def test_a_run_that_sleeps_past_its_lease_is_fenced(one_skill: Learning, place: Learning) -> None:
    """Flow and trainer are stopped, another run takes over and finishes, then they wake up."""
    place.variables = {"SDFT_LEASE_S": "5"}
    sleeper = place.start()
    work, trainer = training(place, sleeper)
    stopped = [sleeper.pid, trainer]
    stop_outside_of_transactions(place, stopped)
    try:
        before = len(place.output)
        second = place.start()
        second.join(240)
        assert second.exitcode == 0, place.output
        assert "taken over from process" in place.output[before:]
        check(place, one_skill)
        left = sorted(path for path in place.home.root.rglob("*") if "prefect" not in path.parts)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    sleeper.join(60)
    assert sleeper.exitcode == 1, place.output
    assert "took this work over" in place.output
    assert "Traceback" not in place.output
    check(place, one_skill)
    assert not work.exists()
    now = sorted(path for path in place.home.root.rglob("*") if "prefect" not in path.parts)
    assert now == left, "what woke up has written nothing"
