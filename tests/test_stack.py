"""The native stack: up, a skill learned against it as against any shared installation, down."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import psutil
import pytest
from learning import SKILLS, write_curriculum
from stacks import UP_S, command, prefect, sdft, skip_without_postgresql, stack

from infra import postgresql
from infra.credentials import CLIENT_FILE, FILE, Credentials, read_credentials
from infra.first_start import BUCKET, store_client
from infra.parts import STATE, cluster
from infra.processes import living
from infra.stack import ORDER
from tasks.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.stack]

UP = {*ORDER}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a stack may be brought up; ended whatever happens."""
    skip_without_postgresql()
    place = tmp_path_factory.mktemp("stack")
    yield place
    stack("down", place)


def check_nothing_is_left(directory: Path) -> None:
    assert living(directory) == {}
    assert not cluster(directory).exists()
    assert not any((directory / name).exists() for name in (STATE, FILE, CLIENT_FILE))
    for process in psutil.process_iter():
        try:
            said = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        assert str(directory) not in said, said
        assert str(cluster(directory)) not in said, said


def test_an_interrupted_start_leaves_nothing_and_a_killed_one_is_no_hindrance(
    directory: Path,
) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command("up", directory),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal
        )
        end = time.monotonic() + UP_S
        while "mlflow" not in living(directory):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(number)
        process.wait(UP_S)
        if number == signal.SIGINT:
            check_nothing_is_left(directory)
    assert {"postgres", "s3", "mlflow"} <= living(directory).keys()
    for processes in living(directory).values():  # the machine goes down; files stay behind
        for one in processes:
            one.kill()
    code, said = stack("status", directory)
    assert code == 1 and said.count(" ended ") == len(ORDER), said


@pytest.fixture(scope="module")
def made(directory: Path) -> Credentials:
    code, said = stack("up", directory)
    assert code == 0, said
    found = read_credentials(directory)
    assert found is not None
    return found


def test_all_parts_answer_and_only_who_has_the_password_is_let_in(
    directory: Path, made: Credentials
) -> None:
    before = {part: processes[0].pid for part, processes in living(directory).items()}
    assert before.keys() == UP
    code, said = stack("up", directory)  # again
    assert (code, said.count(" up ")) == (0, len(ORDER)), said
    assert before == {part: processes[0].pid for part, processes in living(directory).items()}

    runs = f"{made.prefect_url}/api/flow_runs/filter"
    experiments = f"{made.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.post(runs, json={}).status_code == 401
    assert httpx.get(experiments).status_code == 401
    login = ("admin", made.MLFLOW_PASSWORD)
    assert httpx.get(experiments, auth=login).status_code == 200
    elsewhere = httpx.get(experiments, auth=login, headers={"Host": "evil.example"})
    assert elsewhere.status_code == 403
    assert not postgresql.answers(made.superuser.replace(made.POSTGRES_PASSWORD, "wrong"))
    foreign = made.database("ledger").rpartition("/")[0] + "/prefect"
    assert not postgresql.answers(foreign), "the ledger's user reaches Prefect's database"
    assert httpx.get(f"{made.s3_url}/{BUCKET}").status_code >= 400


def test_the_doctor_finds_it_well_and_a_wrong_password_not(
    made: Credentials, tmp_path: Path
) -> None:
    code, said = sdft(made.client, tmp_path, "doctor")
    assert code == 0, said
    for pool in ("cpu", "gpu"):
        assert f"process, workers online: {pool}-worker" in said
    assert "the store behind it answers" in said
    assert said.count("agrees with ours") == 3  # of PostgreSQL, MLflow and Prefect
    wrong = {"MLFLOW_TRACKING_PASSWORD": "wrong", "PREFECT_API_AUTH_STRING": "sdft:wrong"}
    code, said = sdft(made.client | wrong, tmp_path, "doctor")
    assert (code, said.count("does not let you in")) == (1, 2), said
    assert made.LEDGER_DB_PASSWORD not in said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a curriculum lies, and the home that it is learned in."""
    return tmp_path_factory.mktemp("place")


def test_a_skill_is_learned_with_all_of_it_in_postgresql_and_s3(
    directory: Path, made: Credentials, place: Path
) -> None:
    home, curriculum = place / "home", write_curriculum(place, skills=SKILLS[:1])
    code, said = sdft(made.client, home, "learn", str(curriculum))
    assert code == 0, said
    assert "demo version 1: champion" in said
    assert f"look next: {made.mlflow_url}" in said
    assert not [*home.glob("*.db")] and not (home / "artifacts").exists()

    kinds = postgresql.query(made.database("ledger"), "SELECT kind FROM ledger ORDER BY seq")
    assert kinds == ["registered", "verdict", "promoted"]
    runs = postgresql.query(made.database("mlflow"), "SELECT status FROM runs")
    assert runs == ["FINISHED", "FINISHED"]  # the stage, the report
    states = postgresql.query(made.database("prefect"), "SELECT state_name FROM flow_run")
    assert states == ["Completed", "Completed"]  # learn, prepare
    store = store_client(made.s3_url, made.S3_ACCESS_KEY, made.S3_SECRET_KEY)
    keys = [one["Key"] for one in store.list_objects_v2(Bucket=BUCKET)["Contents"]]
    for wanted in ("record.json", "retention/matrix.json", "model.safetensors"):
        assert any(key.endswith(wanted) for key in keys), wanted

    code, said = sdft(made.client, home, "lineage", "demo", "--verify")
    assert code == 0 and "proven: 1 stages" in said, said


def test_deployments_do_on_workers_what_the_commands_do(made: Credentials, place: Path) -> None:
    database = made.database("prefect")
    prefect(made, place, "deploy", "--all", "--prefect-file", "infra/prefect.yaml")
    deployed = postgresql.query(database, "SELECT name FROM deployment ORDER BY name")
    on_gpus, on_cpus = ["gpu", "gpu"], ["cpu"]
    assert deployed == [*on_cpus, "gc", *on_gpus, "nightly", "promote", "reconcile", "rollback"]
    crons = postgresql.query(database, "SELECT schedule ->> 'cron' FROM deployment_schedule")
    assert sorted(crons) == ["*/5 * * * *", "0 2 * * *", "0 5 * * 0"]
    limits = "SELECT concurrency_options ->> 'collision_strategy' FROM deployment ORDER BY name"
    enqueue, cancel = "ENQUEUE", "CANCEL_NEW"
    limited = [cancel, enqueue, enqueue, cancel, enqueue]
    assert [one for one in postgresql.query(database, limits) if one] == limited

    who = ["-p", "name=demo", "-p", "asked_by=ada"]
    for run in (["learn/nightly"], ["promote/promote", "-p", "version=1", *who], ["gc/gc"]):
        prefect(made, place, "deployment", "run", *run)
    prefect(made, place, "deployment", "run", "rollback/rollback", *who)
    ours = (
        "SELECT d.name || ' ' || r.state_name FROM flow_run r JOIN deployment d "
        "ON d.id = r.deployment_id WHERE NOT r.auto_scheduled ORDER BY d.name"
    )
    end = time.monotonic() + UP_S
    while True:
        ended = postgresql.query(database, ours)
        if all(one.endswith(("Completed", "Failed", "Crashed")) for one in ended):
            break
        assert time.monotonic() < end, ended
        time.sleep(0.5)
    # there is no earlier champion to go back to
    assert ended == ["gc Completed", "nightly Completed", "promote Completed", "rollback Failed"]
    key = Home(place / "home").lease_key  # how `reconcile` finds the runs of a home
    tagged = f"SELECT name FROM flow_run WHERE tags ? '{key}' AND deployment_id IS NOT NULL"
    assert len(postgresql.query(database, tagged)) == 1
    kinds = postgresql.query(made.database("ledger"), "SELECT kind FROM ledger ORDER BY seq")
    assert kinds == ["registered", "verdict", "promoted"]  # all was done before


def test_what_containers_do_at_their_first_start_changes_nothing_here(
    made: Credentials, tmp_path: Path
) -> None:
    places = {"POSTGRES_ADDRESS": f"127.0.0.1:{made.POSTGRES_PORT}", "S3_ENDPOINT": made.s3_url}
    file = tmp_path / "logins.ini"
    subprocess.run(
        [sys.executable, "-m", "infra.first_start", str(file)],
        env={**os.environ, **asdict(made), **places},
        check=True,
    )
    assert made.database("mlflow") in file.read_text()


def test_a_wrong_password_of_prefect_is_said_without_it(
    directory: Path, made: Credentials, tmp_path: Path
) -> None:
    curriculum = write_curriculum(tmp_path, skills=SKILLS[:1])
    wrong = {"PREFECT_API_AUTH_STRING": "sdft:wrong"}
    code, said = sdft(made.client | wrong, tmp_path / "home", "learn", str(curriculum))
    expected = (
        f"error: Prefect's server ({made.prefect_url}/api) does not let you in; set "
        "PREFECT_API_AUTH_STRING to user:password"
    )
    assert (code, said.splitlines()[1:]) == (2, [expected]), said


def test_no_secret_is_in_a_log_or_on_a_command_line(directory: Path, made: Credentials) -> None:
    for file in (FILE, CLIENT_FILE):
        assert stat.S_IMODE((directory / file).stat().st_mode) == 0o600
    lines = (directory / FILE).read_text().splitlines()
    secrets = {line.partition("=")[2] for line in lines if "_PORT" not in line}
    assert len(secrets) == 9
    said = [" ".join(one.cmdline()) for part in living(directory).values() for one in part]
    said += [log.read_text() for log in (directory / "logs").iterdir()]
    assert len(said) > 2 * len(ORDER)
    for one in said:
        assert not any(secret in one for secret in secrets), re.sub("|".join(secrets), "***", one)


def test_down_ends_all_of_it_and_again_is_no_error(directory: Path, made: Credentials) -> None:
    assert made.POSTGRES_PORT
    code, said = stack("down", directory)
    assert code == 0 and all(part in said for part in ORDER), said
    check_nothing_is_left(directory)
    assert stack("down", directory) == (0, "nothing was running\n")
    assert stack("status", directory)[0] == 1
