"""`sdft doctor`: what is well, what is wrong and what to mend; no traceback, no secret."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from sqlalchemy import text

from schemas.ledger import Champion, Draft
from tasks import doctor
from tasks.findings import Finding, clock, version_of
from tasks.home import Home
from tasks.ledger import Ledger

SECRET = "s3cret"


class Odd(BaseHTTPRequestHandler):
    """A server whose answer and clock are chosen by the test."""

    status, body, skew_s = 401, b"Unauthorized", 0

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def date_time_string(self, timestamp: float | None = None) -> str:
        return format_datetime(datetime.now(UTC) + timedelta(seconds=self.skew_s), usegmt=True)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), type("One", (Odd,), {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def sdft_doctor(home: Path, **variables: str) -> tuple[int, list[Finding], str]:
    """Exit code, findings, and all that was said."""
    ours = ("PREFECT_", "MLFLOW_", "SDFT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "doctor", "--json"],
        env={**kept, "SDFT_HOME": str(home), **variables},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert SECRET not in said
    return done.returncode, [Finding(**one) for one in json.loads(done.stdout)], said


def found(findings: list[Finding], what: str) -> Finding:
    """The worst finding about something."""
    about = [one for one in findings if one.what == what]
    return next((one for one in about if one.state == "mend"), about[0])


def test_a_home_that_is_not_there_is_well_and_is_not_made(tmp_path: Path) -> None:
    code, findings, _ = sdft_doctor(tmp_path / "home")
    assert (code, {one.state for one in findings}) == (0, {"well"}), findings
    assert [one.what for one in findings] == [
        *("settings", "home", "disk", "versions", "gpu", "ledger", "mlflow", "prefect")
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_home_in_use_is_well(tmp_path: Path) -> None:
    Ledger(Home(tmp_path)).append([Draft(kind="registered", name="demo", version="1")])
    before = (tmp_path / "ledger.db").read_bytes()
    code, findings, said = sdft_doctor(tmp_path)
    assert code == 0, said
    assert found(findings, "ledger").found.endswith("1 entries, the chain is whole")
    assert (tmp_path / "ledger.db").read_bytes() == before
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_a_ledger_that_was_altered_is_found(tmp_path: Path) -> None:
    ledger = Ledger(Home(tmp_path))
    ledger.append([Draft(kind="promoted", name="demo", version="1")], Champion())
    with ledger.engine.execution_options(writes=True).begin() as connection:
        connection.execute(text("DROP TRIGGER ledger_no_update"))
        connection.execute(text("UPDATE ledger SET version = '2'"))
    code, findings, _ = sdft_doctor(tmp_path)
    assert code == 1
    assert "was altered" in found(findings, "ledger").found


@pytest.mark.slow
def test_servers_that_are_not_there_are_told_with_what_to_mend(tmp_path: Path) -> None:
    code, findings, _ = sdft_doctor(
        tmp_path / "home",
        MLFLOW_TRACKING_URI=f"http://ada:{SECRET}@127.0.0.1:9",
        PREFECT_API_URL="http://127.0.0.1:9/api",
        PREFECT_API_AUTH_STRING=f"ada:{SECRET}",
        SDFT_LEDGER_URL=f"postgresql+psycopg://ada:{SECRET}@127.0.0.1:9/ledger",
    )
    assert code == 1
    wrong = {one.what: one for one in findings if one.state == "mend"}
    assert wrong.keys() == {"ledger", "mlflow", "prefect"}
    assert all("127.0.0.1:9" in one.found and one.mend for one in wrong.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mlflow", "prefect", "ledger"),
    [
        (f"nosuch://ada:{SECRET}@host", "nonsense/api", f"nosuch://ada:{SECRET}@host/x"),
        (f"http://ada:{SECRET}@[", f"http://ada:{SECRET}@[/api", f"ada:{SECRET}"),
        (f"postgresql+nosuch://ada:{SECRET}@host", "ftp://host/api", "sqlite:///no/where/l.db"),
        (f"http://ada:{SECRET}@host:x", "http://127.0.0.1:99999/api", "postgresql://h:x/y"),
    ],
)
def test_addresses_that_are_none(mlflow: str, prefect: str, ledger: str, tmp_path: Path) -> None:
    given = {"MLFLOW_TRACKING_URI": mlflow, "PREFECT_API_URL": prefect, "SDFT_LEDGER_URL": ledger}
    code, findings, said = sdft_doctor(tmp_path, **given)
    assert code == 1, said
    assert {"mlflow", "prefect"} <= {one.what for one in findings if one.state == "mend"}, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "body", "of_mlflow", "of_prefect"),
    [
        (401, b"Unauthorized", "does not let you in", "does not let you in"),
        (403, b"Invalid Host header", "does not answer to this name", "does not let you in"),
        (200, b"<html>", "is that mlflow?", "is no Prefect server"),
    ],
)
def test_servers_that_answer_something_else(
    odd: HTTPServer, tmp_path: Path, status: int, body: bytes, of_mlflow: str, of_prefect: str
) -> None:
    odd.RequestHandlerClass.status, odd.RequestHandlerClass.body = status, body  # type: ignore[attr-defined]
    address = f"http://127.0.0.1:{odd.server_port}"
    code, findings, said = sdft_doctor(
        tmp_path,
        MLFLOW_TRACKING_URI=address,
        MLFLOW_TRACKING_USERNAME="ada",
        MLFLOW_TRACKING_PASSWORD=SECRET,
        PREFECT_API_URL=f"{address}/api",
        PREFECT_API_AUTH_STRING=f"ada:{SECRET}",
        SDFT_LEDGER_URL=f"sqlite:///{tmp_path / 'ledger.db'}",
    )
    assert code == 1
    assert of_mlflow in found(findings, "mlflow").found, said
    assert of_prefect in found(findings, "prefect").found, said


@pytest.mark.slow
def test_a_server_whose_clock_is_wrong_is_told(odd: HTTPServer, tmp_path: Path) -> None:
    odd.RequestHandlerClass.skew_s = -3600  # type: ignore[attr-defined]
    address = f"http://127.0.0.1:{odd.server_port}"
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    _, findings, _ = sdft_doctor(tmp_path, MLFLOW_TRACKING_URI=address, SDFT_LEDGER_URL=ledger)
    told = found(findings, "clock")
    assert told.state == "mend"
    assert "MLflow server's differs from ours by 35" in told.found or "36" in told.found


def test_clocks_agree_within_what_a_header_can_tell() -> None:
    now = time.time()
    for seconds, state in [(0, "well"), (-1.5, "well"), (20, "well"), (60, "mend"), (-60, "mend")]:
        told = datetime.fromtimestamp(now + seconds, UTC)
        assert clock("server", told, now).state == state, seconds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"MLFLOW_TRACKING_URI": "https://m"}, "the ledger is this home's own"),
        ({"SDFT_LEDGER_URL": "postgresql://l"}, "the registry is this home's own"),
        ({"PREFECT_API_URL": "https://p"}, "does not end with /api"),
        ({"PREFECT_API_AUTH_STRING": "a:b"}, "PREFECT_API_URL is not"),
        ({"SDFT_WEBHOOK_URL": "https://w"}, "SDFT_WEBHOOK_SECRET is not"),
        ({"PREFECT_API_URL": "http://p/api"}, "unencrypted"),
    ],
)
def test_variables_that_do_not_go_together(given: dict[str, str], said: str) -> None:
    findings = [*doctor.settings(given)]
    assert said in findings[0].found
    assert findings[0].mend


def test_a_whole_set_of_variables_is_well() -> None:
    given = {
        "PREFECT_API_URL": "https://p/api",
        "PREFECT_API_AUTH_STRING": "a:b",
        "MLFLOW_TRACKING_URI": "https://m",
        "SDFT_LEDGER_URL": "postgresql://l",
    }
    assert [one.state for one in doctor.settings(given)] == ["well"]


def test_versions_that_do_not_fit_are_named() -> None:
    for asked, problem in [
        ("prefect>=99", "prefect is "),
        ("Not_There", "not-there is missing"),
        ("prefect", None),
    ]:
        found = doctor.unmet(Requirement(asked))
        assert found is None if problem is None else problem in (found or "")
    assert version_of("mlflow", "3.17.2", "3.17.0").state == "well"
    assert "update the server" in version_of("mlflow", "3.17.2", "3.9.0").mend
    assert "update the client" in version_of("mlflow", "3.17.2", "4.0.0").mend


def test_a_disk_with_no_room_for_a_stage_like_the_largest_is_told(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (home.stages / "one" / "model").mkdir(parents=True)
    with (home.stages / "one" / "model" / "model.safetensors").open("wb") as file:
        file.truncate(2**43)  # it takes no room
    told = found([*doctor.own_home(home)], "disk")
    assert told.state == "mend"
    assert "ten times its largest model, 8192.0 GiB" in told.found


@pytest.mark.slow
def test_pools_and_workers_of_a_real_server(prefect_server: str, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.flows import flow
    from prefect.settings import PREFECT_API_URL, temporary_settings

    one = flow(name="doctored")(lambda: None)
    with (
        temporary_settings({PREFECT_API_URL: prefect_server}),
        get_client(sync_client=True) as client,
    ):
        flow_id = client.create_flow(one)
        for pool in ("manned", "empty"):
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            client.create_deployment(flow_id, f"on-{pool}", work_pool_name=pool)
        client.send_worker_heartbeat("manned", "ada")
    code, findings, said = sdft_doctor(tmp_path, PREFECT_API_URL=prefect_server)
    assert code == 1, said
    assert found(findings, "prefect").state == "well"
    assert found(findings, "clock").state == "well"
    assert found(findings, "pool manned").found == "process, workers online: ada"
    empty = found(findings, "pool empty")
    assert (empty.state, empty.found) == ("mend", "process, 0 workers known, none online")
    assert empty.mend == "prefect worker start --pool empty --type process"
