"""Work that a deployment does: how its run ends is told as if the work had been done here.

Prefect's server is a real one; the test takes the worker's part, and says how runs end.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import State, flow, get_client
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from schemas.base import BadInput
from tasks import elsewhere
from tasks.elsewhere import TRAIN, Job, as_state, check_deployments, deployment, have_done
from tasks.failures import RunFailed
from tasks.home import Home
from tasks.leases import LEASE_S, leased, myself
from tasks.ledger import Ledger, LedgerAway
from tasks.ledger_tables import LEASES

pytestmark = pytest.mark.slow
NAME = "train-skill/here"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeploymentResponse]:
    """A server with one deployment, which no worker looks at."""
    os.environ["PREFECT_LOCAL_STORAGE_PATH"] = str(tmp_path_factory.mktemp("storage"))
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180), get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("train-skill")
        made = client.create_deployment(flow_id=flow_id, name="here")
        yield client.read_deployment(made)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(elsewhere, "POLL_S", 0.05)
    monkeypatch.setenv(LEASE_S, "0.4")
    return Home(tmp_path)


class Worker:
    """Gives the runs of the deployment these states, one each, in their order."""

    def __init__(self, server: DeploymentResponse, *states: State[Any]) -> None:
        self.id, self.states = str(server.id), states
        self.before = {run["id"] for run in self.runs()}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    def runs(self) -> list[dict[str, Any]]:
        wanted = {"deployments": {"id": {"any_": [self.id]}}, "sort": "EXPECTED_START_TIME_ASC"}
        with get_client(sync_client=True) as client:
            return client.request("POST", "/flow_runs/filter", json=wanted).json()

    def ended(self) -> list[str]:
        return [run["state"]["name"] for run in self.runs() if run["id"] not in self.before]

    def _work(self) -> None:
        given: set[str] = set()
        while not self._over.wait(0.05) and len(given) < len(self.states):
            for run in self.runs():
                if run["id"] not in self.before | given and len(given) < len(self.states):
                    state = self.states[len(given)]
                    given.add(run["id"])
                    with get_client(sync_client=True) as client:
                        client.set_flow_run_state(run["id"], state, force=True)


JOB = Job(deployment=NAME, order={"what": 1}, key="stage", step="train", label="alpha")


def raises(error: Exception) -> State[Any]:
    def work() -> None:
        raise error

    return as_state(work)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            raises(BadInput("rows.jsonl: row 3 is empty")),
            BadInput,
            r"^rows\.jsonl: row 3 is empty$",
        ),
        (raises(RunFailed("no room on the disk")), RunFailed, "^no room on the disk$"),
        (Failed(message="KeyError: lost"), RunFailed, f"{NAME}: run .* ended as Failed: KeyError"),
        (Cancelled(message="by hand"), RunFailed, "ended as Cancelled: by hand"),
    ],
)
def test_how_the_other_run_ended_is_how_this_one_ends(
    server: DeploymentResponse, home: Home, state: State[Any], error: type[Exception], message: str
) -> None:
    with Worker(server, state) as worker, pytest.raises(error, match=message) as raised:
        have_done(JOB, home)
    assert type(raised.value) is error
    assert len(worker.ended()) == 1, "it is not tried again"
    [run] = [one for one in worker.runs() if one["id"] not in worker.before]
    assert run["parameters"] == {"order": {"what": 1}}


def test_a_flow_keeps_the_name_of_what_ended_it(server: DeploymentResponse) -> None:
    @flow(name="ends")
    def ends(kind: str) -> State[Any]:
        return {"well": as_state(lambda: None), "badly": raises(BadInput("row 3"))}[kind]

    state = ends("badly", return_state=True)
    assert (state.type, state.name, state.message) == (StateType.FAILED, "BadInput", "row 3")
    assert ends("well", return_state=True).is_completed()
    with pytest.raises(KeyError):
        raises(KeyError("a fault"))


def test_what_died_is_given_out_again_a_few_times(
    server: DeploymentResponse, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = Crashed(message="the node is gone")
    with Worker(server, died, died, Completed()) as worker:
        have_done(JOB, home)
    assert worker.ended() == ["Crashed", "Crashed", "Completed"]
    monkeypatch.setattr(elsewhere, "TRIES", 2)
    with Worker(server, died, died) as worker, pytest.raises(RunFailed, match="died 2 times"):
        have_done(JOB, home)
    assert worker.ended() == ["Crashed"] * 2


def test_a_run_that_gives_no_beat_is_dead_and_one_that_does_is_not(
    server: DeploymentResponse, home: Home
) -> None:
    """Its worker died with it, so nobody says so to Prefect's server."""
    with Worker(server, Running(), Completed()) as worker:
        have_done(JOB, home)
    assert worker.ended() == ["Crashed", "Completed"]

    done = threading.Event()

    def beating() -> None:
        with leased(JOB.key, "alpha", home):
            done.wait(3.0)  # many times what a silent one is given

    holder = threading.Thread(target=beating)
    with Worker(server, Running()) as worker:
        holder.start()
        waiting = threading.Thread(target=lambda: have_done(JOB, home))
        waiting.start()
        holder.join(30)
        assert worker.ended() == ["Running"]
        [run] = [one for one in worker.runs() if one["id"] not in worker.before]
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run["id"], Completed(), force=True)
        waiting.join(30)
    assert worker.ended() == ["Completed"]


def test_a_holder_that_can_be_seen_to_be_dead_is_not_waited_for(
    server: DeploymentResponse, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEASE_S, "3600")
    ledger = Ledger(home)
    dead = myself().model_copy(update={"started": 1.0}).model_dump_json()
    with Worker(server, Running(), Completed()) as worker:
        runs = len(worker.before)
        taking = threading.Thread(target=lambda: _take(ledger, dead, worker, runs))
        taking.start()
        have_done(JOB, home)
        taking.join(30)
    assert worker.ended() == ["Crashed", "Completed"]


def _take(ledger: Ledger, holder: str, worker: Worker, runs: int) -> None:
    """Hold the key as the first run does, and be dead."""
    while worker.ended() != ["Running"]:
        os.sched_yield()
    assert len(worker.runs()) == runs + 1
    with ledger.transaction() as connection:
        values = {"key": JOB.key, "token": 1, "beats": 0, "holder": holder}
        connection.execute(LEASES.insert().values(values))


def test_an_interrupt_here_ends_the_run_there(
    server: DeploymentResponse, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def interrupted(*_: object) -> tuple[int, int]:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt
        return 0, 0

    monkeypatch.setattr(elsewhere, "pulse", interrupted)
    with Worker(server) as worker, pytest.raises(KeyboardInterrupt):
        have_done(JOB, home)
    assert worker.ended() == ["Cancelled"]


def test_a_deployment_that_is_not_there_is_told_before_work_is_spent(
    server: DeploymentResponse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRAIN, raising=False)
    assert deployment(TRAIN) is None
    check_deployments()
    monkeypatch.setenv(TRAIN, NAME)
    check_deployments()
    assert deployment(TRAIN) == NAME
    monkeypatch.setenv(TRAIN, "train-skill/nowhere")
    with pytest.raises(BadInput, match=f"{TRAIN}: .* has no deployment train-skill/nowhere"):
        check_deployments()
    monkeypatch.setenv(TRAIN, "here")
    with pytest.raises(BadInput, match=f"{TRAIN} must be FLOW/DEPLOYMENT"):
        check_deployments()


def test_nobody_is_taken_for_dead_by_what_an_earlier_holder_left(
    server: DeploymentResponse, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEASE_S, "3600")
    ledger = Ledger(home)
    dead = myself().model_copy(update={"started": psutil.boot_time()}).model_dump_json()
    with ledger.transaction() as connection:
        values = {"key": JOB.key, "token": 7, "beats": 3, "holder": dead}
        connection.execute(LEASES.insert().values(values))
    looks = 0
    real = elsewhere.pulse

    def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        return real(*arguments)

    monkeypatch.setattr(elsewhere, "pulse", counted)
    with Worker(server, Running()) as worker:
        waiting = threading.Thread(target=lambda: have_done(JOB, home))
        waiting.start()
        while looks < 10:
            os.sched_yield()
        assert worker.ended() == ["Running"]
        [run] = [one for one in worker.runs() if one["id"] not in worker.before]
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run["id"], Completed(), force=True)
        waiting.join(30)
    assert worker.ended() == ["Completed"]


def test_a_run_that_is_deleted_is_over(
    server: DeploymentResponse, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = elsewhere.pulse

    def deleted(*arguments: Any) -> Any:
        with get_client(sync_client=True) as client:
            for run in worker.runs():
                if run["id"] not in worker.before:
                    client.request("DELETE", f"/flow_runs/{run['id']}")
        return real(*arguments)

    monkeypatch.setattr(elsewhere, "pulse", deleted)
    with Worker(server) as worker, pytest.raises(RunFailed, match=r"ended as Cancelled: .*deleted"):
        have_done(JOB, home)


def test_an_outage_while_another_runs_is_told_once_and_waited_for(
    server: DeploymentResponse,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, looks = elsewhere.pulse, 0

    def away(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        if 2 <= looks <= 5:
            raise LedgerAway("the ledger is away")
        if looks == 6:
            [run] = [one for one in worker.runs() if one["id"] not in worker.before]
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(run["id"], Completed(), force=True)
        return real(*arguments)

    monkeypatch.setattr(elsewhere, "pulse", away)
    with Worker(server) as worker:
        have_done(JOB, home)
    assert capsys.readouterr().out.count("the ledger is away; asked again") == 1
