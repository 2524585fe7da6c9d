"""Stages on workers that share no disk: the same as on one machine, also when one is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT
from learning import write_curriculum
from stacks import UP_S, prefect, sdft, skip_without_postgresql, stack

from infra import postgresql
from infra.credentials import Credentials, read_credentials
from infra.parts import STATE
from infra.processes import living
from schemas.stage import StageRecord
from tasks.elsewhere import EVALUATE, TRAIN
from tasks.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.stack]

SKILLS = ("courier", "blick", "almanac")
"""The first trains all weights, the others adapters."""
DEPLOYMENTS = {TRAIN: "train-skill/gpu", EVALUATE: "evaluate-suites/gpu"}
LONG_S = 900


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    skip_without_postgresql()
    place = tmp_path_factory.mktemp("stack")
    yield place
    stack("down", place)


@pytest.fixture(scope="module")
def made(directory: Path, place: Path) -> Credentials:
    code, said = stack("up", directory)
    assert code == 0, said
    found = read_credentials(directory)
    assert found is not None
    prefect(found, place, "deploy", "--all", "--prefect-file", "infra/prefect.yaml")
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a curriculum of three skills lies, the last of them longer, and homes to learn it."""
    place = tmp_path_factory.mktemp("place")
    file = write_curriculum(place, skills=SKILLS)
    content = yaml.safe_load(file.read_text())
    content["skills"][-1] |= {"allow_overlap": True}
    content["skills"][-1]["training"]["epochs"] = 20
    file.write_text(yaml.safe_dump(content))
    return place


@pytest.fixture(scope="module")
def embedded(place: Path) -> dict[str, StageRecord]:
    """The stages of the same curriculum, learned without any server."""
    code, said = sdft({}, place / "embedded", "learn", str(place / "curriculum.yaml"))
    assert code == 0, said
    return records(place / "embedded")


def records(home: Path) -> dict[str, StageRecord]:
    found = [StageRecord.read(path) for path in Home(home).stages.glob("*/record.json")]
    return {one.spec.skill: one for one in found}


def test_a_killed_worker_is_waited_for_and_the_stages_are_those_of_one_machine(
    directory: Path, made: Credentials, place: Path, embedded: dict[str, StageRecord]
) -> None:
    home, theirs = place / "home", Home(directory / STATE / "gpu-home")
    with (place / "output.txt").open("w") as output:
        learning = subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", "learn"]
            + [str(place / "curriculum.yaml"), "--home", str(home)],
            env={**os.environ, **made.client, **DEPLOYMENTS, "COLUMNS": "200"},
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )
    try:
        key = embedded["almanac"].key[:32]
        await_line(learning, theirs, f"{key}.*/checkpoints/step-*/COMPLETE", "")
        for one in living(directory)["gpu-worker"]:  # the machine is gone
            one.send_signal(signal.SIGKILL)
        assert stack("up", directory)[0] == 0
        resumed = await_line(learning, theirs, f"{key}.*/log.txt", r"goes on after step [1-9]")
        assert learning.wait(LONG_S) == 0, (place / "output.txt").read_text()
    finally:
        learning.kill()
    assert resumed
    said = (place / "output.txt").read_text()
    assert re.search(r"of train-skill/gpu died \(.*\), 1 of 5", said), said

    here = records(home)
    assert here.keys() == embedded.keys() == {*SKILLS}
    for skill, record in here.items():
        assert record.key == embedded[skill].key
        assert record.model_hash == embedded[skill].model_hash
    assert not [*theirs.stages.iterdir()], "a worker keeps models in its cache, nothing else"
    assert not [*home.glob("*.db")] and not (home / "artifacts").exists()
    kinds = postgresql.query(made.database("ledger"), "SELECT kind FROM ledger ORDER BY seq")
    assert kinds == ["registered", "verdict", "promoted"] * len(SKILLS)
    runs = (
        "SELECT f.name, r.state_name FROM flow_run r JOIN flow f ON f.id = r.flow_id "
        "WHERE f.name = 'train-skill' ORDER BY r.start_time"
    )
    states = postgresql.query(made.database("prefect"), runs.replace("f.name, ", ""))
    assert states == ["Completed", "Completed", "Crashed", "Completed"]


def await_line(learning: subprocess.Popen[bytes], home: Home, pattern: str, text: str) -> bool:
    """Wait until a file of a worker's stages is there and has a text."""
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        for path in home.stages.glob(pattern):
            try:
                if re.search(text, path.read_text()):
                    return True
            except FileNotFoundError:  # the directory was taken over
                continue
        assert learning.poll() is None, "learn ended"
        time.sleep(0.05)
    raise AssertionError(f"{pattern} does not come to say {text}")


def test_a_schedules_run_learns_on_the_cpu_worker_and_has_the_gpu_worker_do_the_rest(
    made: Credentials, place: Path, tmp_path: Path
) -> None:
    """With nothing left on the machine of the run but the curriculum: all is fetched by hash."""
    database = made.database("prefect")
    before = len(postgresql.query(database, "SELECT name FROM flow_run"))
    fresh = tmp_path / "home"
    prefect(made, place, "deployment", "run", "learn/nightly", "-p", f"home_dir={fresh}", "--watch")
    assert records(fresh).keys() == {*SKILLS}
    flows = postgresql.query(
        database,
        "SELECT f.name FROM flow_run r JOIN flow f ON f.id = r.flow_id "
        "WHERE f.name IN ('train-skill', 'evaluate-suites') ORDER BY r.created",
    )
    assert flows.count("train-skill") == 4, "nothing is trained again"
    assert len(postgresql.query(database, "SELECT name FROM flow_run")) > before


def test_a_users_mistake_on_a_worker_is_one_here_and_an_interrupt_ends_the_run_there(
    directory: Path, made: Credentials, place: Path, tmp_path: Path
) -> None:
    file = write_curriculum(tmp_path, skills=SKILLS[:1])
    content = yaml.safe_load(file.read_text())
    content["name"] = "mistaken"
    content["skills"][0]["training"] = {"lora": {"rank": 2, "targets": ["nowhere"]}}
    file.write_text(yaml.safe_dump(content))
    code, said = sdft(made.client | DEPLOYMENTS, tmp_path / "home", "learn", str(file))
    assert code == 2, said
    assert "training.lora.targets" in said and "has no module 'nowhere'" in said
    assert "Traceback" not in said

    missing = DEPLOYMENTS | {TRAIN: "train-skill/nowhere"}
    code, said = sdft(made.client | missing, tmp_path / "home", "learn", str(file))
    assert (code, "has no deployment train-skill/nowhere" in said) == (2, True), said

    content["skills"][0]["training"] = {"epochs": 500}
    file.write_text(yaml.safe_dump(content))
    with (tmp_path / "output.txt").open("w") as output:
        learning = subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", "learn"]
            + [str(file), "--home", str(tmp_path / "home")],
            env={**os.environ, **made.client, **DEPLOYMENTS},
            stdout=output,
            stderr=output,
            cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    theirs = Home(directory / STATE / "gpu-home")
    await_line(learning, theirs, "*/checkpoints/step-*/COMPLETE", "")
    learning.send_signal(signal.SIGINT)
    assert learning.wait(UP_S) == 130, (tmp_path / "output.txt").read_text()
    end = time.monotonic() + UP_S
    while any(one.name() == "sdft.train" for one in workers(directory)):
        assert time.monotonic() < end, "the trainer lives on"
        time.sleep(0.2)
    last = (
        "SELECT r.state_type FROM flow_run r JOIN flow f ON f.id = r.flow_id "
        "WHERE f.name = 'train-skill' ORDER BY r.created DESC LIMIT 1"
    )
    assert postgresql.query(made.database("prefect"), last) == ["CANCELLED"]


def workers(directory: Path) -> list[psutil.Process]:
    return living(directory).get("gpu-worker", [])
