"""Flows for deployments, which a worker runs: stages and evaluations, and what owners do.

`learn` and `reconcile` are flows of their own already. Prefect knows one user for all, so who asks
says so, and the ledger keeps it.
"""

import os
from pathlib import Path
from typing import Any, Literal

from prefect import State, flow

from flows.changes import promote_version, roll_back
from flows.options import DEFAULT_HOME, open_home
from schemas.ledger import Entry
from tasks import evaluation, training
from tasks.elsewhere import as_state
from tasks.evaluation import EvaluateOrder
from tasks.garbage import Garbage, collect_alone
from tasks.home import Home
from tasks.reconciling import tidy
from tasks.training import TrainOrder

Expected = int | Literal["none"] | None
"""The version that must be champion now, `none` for no champion, None for whichever it is."""


@flow(name="train-skill")
def train_skill(order: TrainOrder) -> State[Any]:
    """Train a stage for a `learn` that runs elsewhere, in the home of this worker."""
    return as_state(lambda: training.execute(order, _worker_home()))


@flow(name="evaluate-suites")
def evaluate_suites(order: EvaluateOrder) -> State[Any]:
    """Score a model on suites for a `learn` that runs elsewhere, in the home of this worker."""
    return as_state(lambda: evaluation.execute(order, _worker_home()))


@flow(name="promote")
def promote(
    home_dir: str,
    name: str,
    version: int,
    asked_by: str,
    expect: Expected = None,
    override: str = "",
) -> Entry:
    """Make a version the champion, as `sdft promote`."""
    os.environ["SDFT_USER"] = asked_by
    home = open_home(Path(home_dir))
    return promote_version(home, name, str(version), _text(expect), override, in_flow=True)


@flow(name="rollback")
def rollback(
    home_dir: str, name: str, asked_by: str, to: int | None = None, expect: Expected = None
) -> Entry:
    """Put an earlier champion back, as `sdft rollback`."""
    os.environ["SDFT_USER"] = asked_by
    return roll_back(open_home(Path(home_dir)), name, _text(to), _text(expect), in_flow=True)


@flow(name="gc")
def gc(home_dir: str, remove: bool = False, older_than_h: float = 24.0) -> list[Garbage]:
    """Find, or remove, what nothing reaches any more, as `sdft gc`."""
    return collect_alone(open_home(Path(home_dir)), older_than_h * 3600, remove)


def _worker_home() -> Home:
    """The home of this worker, which it shares with no other machine; tidied up after its dead."""
    home = Home(os.environ.get("SDFT_HOME") or DEFAULT_HOME)
    home.activate(offline=True)
    tidy(home)
    return home


def _text(version: int | str | None) -> str | None:
    return None if version is None else str(version)
