"""Work that a deployment does: a stage or an evaluation is executed where its flow runs.

Two variables name the deployments; where they are not set the work is done here. How the other run
ends is told as if it had been done here: a user's mistake is one, and what died is done again.
"""

import math
import os
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
from prefect import State, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Completed, Crashed

from schemas.base import BadInput, Contract
from tasks.console import say
from tasks.failures import RunFailed
from tasks.home import Home
from tasks.leases import PATIENCE, holders, lease_s, pulse
from tasks.ledger import Ledger, LedgerAway
from tasks.orchestration import PrefectAway, reaching_prefect

TRAIN, EVALUATE = "SDFT_TRAIN_DEPLOYMENT", "SDFT_EVALUATE_DEPLOYMENT"
"""Environment variables: FLOW/DEPLOYMENT, such as train-skill/gpu."""
TRIES = 5
"""How often work is given out whose worker dies."""
POLL_S, CANCEL_S = 1.0, 25.0
"""How often a run is looked at; how long the end of one is waited for that is cancelled. Prefect
kills who cancels after 30 s."""
BEGIN_S = 900.0
"""How long a worker may take to begin what it has taken: images are pulled, nodes are started."""


def deployment(variable: str) -> str | None:
    """The deployment that a variable names; None where the work is done here."""
    name = os.environ.get(variable) or None
    if name is not None and not all(name.partition("/")):
        raise BadInput(f"{variable} must be FLOW/DEPLOYMENT, such as train-skill/gpu, not {name!r}")
    return name


def check_deployments() -> None:
    """Raise BadInput for a deployment that is named and not there, before work is spent."""
    for variable in (TRAIN, EVALUATE):
        if name := deployment(variable):
            with reaching_prefect(), get_client(sync_client=True) as client:
                try:
                    client.read_deployment_by_name(name)
                except ObjectNotFound:
                    raise BadInput(
                        f"{variable}: Prefect's server has no deployment {name}; deploy "
                        "infra/prefect.yaml, or unset it to do the work here"
                    ) from None


def as_state(work: Callable[[], object]) -> State[Any]:
    """What the run of a deployment ends with: what ends a run and is told to people has its own
    name, everything else is a fault and passes."""
    try:
        work()
    except BadInput as error:
        return State(type=StateType.FAILED, name=BadInput.__name__, message=str(error))
    except RunFailed as error:
        return State(type=StateType.FAILED, name=RunFailed.__name__, message=str(error))
    return Completed()


class Job(Contract):
    """Work for a deployment."""

    deployment: str
    order: dict[str, Any]
    """The only parameter of its flow."""
    key: str
    """The lease that whoever executes it holds."""
    step: str
    label: str


def have_done(job: Job, home: Home) -> None:
    """Have a deployment do a job, and wait for its end.

    A run whose worker died is given out again. Raises what was raised there (BadInput, RunFailed);
    whatever interrupts this cancels the run.
    """
    name = job.deployment
    for attempt in range(1, TRIES + 1):
        with reaching_prefect():
            run = run_deployment(name, parameters={"order": job.order}, timeout=0)
        assert isinstance(run, FlowRun), "a flow is no coroutine here"
        try:
            state = _ended(run.id, job, home)
        except BaseException:
            _cancel(run.id)
            raise
        message = state.message or state.name or "no word"
        if state.type == StateType.COMPLETED:
            return
        if state.name == BadInput.__name__:
            raise BadInput(message)
        if state.name == RunFailed.__name__:
            raise RunFailed(message)
        if state.type != StateType.CRASHED:
            raise RunFailed(f"{name}: run {run.name} ended as {state.name}: {message}")
        died = f"run {run.name} of {name} died ({message}), {attempt} of {TRIES}"
        say(job.step, job.label, died, "yellow")
    raise RunFailed(f"{name}: its worker died {TRIES} times; look at its log, then run this again")


def _ended(run_id: UUID, job: Job, home: Home) -> State[Any]:
    """The last state of a run. One whose worker is dead is made Crashed: nobody else may do it."""
    ledger, waits = Ledger(home), False
    before = pulse(ledger, job.key)  # of those who had it earlier, and may be dead
    seen, since, told = None, time.monotonic(), False
    while True:
        time.sleep(POLL_S)
        try:
            with reaching_prefect(), get_client(sync_client=True) as client:
                state = client.read_flow_run(run_id).state
            assert state is not None, f"run {run_id} has no state"
            now = (state.type, beat := pulse(ledger, job.key))
            holder = holders(ledger).get(job.key)
        except ObjectNotFound:
            return Cancelled(message=f"run {run_id} was deleted")
        except (PrefectAway, LedgerAway) as away:
            if not told:
                say(job.step, job.label, f"{away}; asked again until it does", "yellow")
            told, since = True, time.monotonic()  # the work goes on
            continue
        told = False
        if state.is_final():
            return state
        if state.type == StateType.SCHEDULED and not waits:
            waits = True
            say(job.step, job.label, f"waits for a worker of {job.deployment}")
        if now != seen:
            seen, since = now, time.monotonic()
        limits = {StateType.PENDING: BEGIN_S, StateType.RUNNING: PATIENCE * lease_s()}
        quiet_s = time.monotonic() - since
        is_new = beat is not None and (before is None or beat[0] != before[0])
        is_dead = is_new and holder is not None and holder.is_dead
        if is_dead or quiet_s > limits.get(state.type, math.inf):
            why = f"{holder} is gone" if is_dead else f"no sign of life for {quiet_s:.0f} s"
            silent = Crashed(message=why)
            with reaching_prefect(), get_client(sync_client=True) as client:
                client.set_flow_run_state(run_id, silent, force=True)
            return silent


def _cancel(run_id: UUID) -> None:
    """Have a run stopped, which saves its state, and wait a while for it."""
    end = time.monotonic() + CANCEL_S
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run_id, Cancelling())
            while time.monotonic() < end:
                state = client.read_flow_run(run_id).state
                if state is None or state.is_final():
                    return
                time.sleep(POLL_S)
    except (httpx.TransportError, httpx.HTTPStatusError, ObjectNotFound):
        say("prefect", "", f"run {run_id} could not be cancelled: no answer", "yellow")
