"""Stage directories: where a stage is worked on, and where it lies when it is finished.

A holder works in `KEY.TOKEN`, named by its lease; a finished stage lies in `KEY`. Taking over is
renaming the directory, so whoever had it before, however long it slept, has no path into it.
"""

import shutil
import time
from pathlib import Path

from schemas.base import BadInput, Sealed, sync
from schemas.snapshot import SuiteData
from schemas.stage import StageRecord, StageSpec
from sdft.process import LOCK, is_locked
from tasks.children import GRACE_S, POLL_S
from tasks.home import Home
from tasks.seen import known_record

SPEC, INPUTS = "spec.json", "inputs.json"
WAITING = "waiting"
"""A file beside them while the stage waits to be registered, since MLflow was away."""


class StageInputs(Sealed):
    """What a stage directory keeps for the tracker: which stage of what, on which data."""

    curriculum: str
    stage: int
    data: SuiteData


def finished_dir(home: Home, spec: StageSpec) -> Path:
    """Where a finished stage lies; there is nothing at this path before."""
    return home.stages / spec.key[:32]


def take_over(home: Home, spec: StageSpec, token: int) -> Path:
    """The work directory of a lease's holder, with what the holder before has left.

    A trainer that lost its flow saves its state and ends; it is given the time to.
    """
    home.stages.mkdir(parents=True, exist_ok=True)
    target = home.stages / f"{spec.key[:32]}.{token}"
    left = sorted(home.stages.glob(f"{spec.key[:32]}.*"), key=lambda path: int(path.suffix[1:]))
    for older in left[:-1]:
        shutil.rmtree(older)
    if left and left[-1] != target:
        patience = time.monotonic() + GRACE_S
        while is_locked(left[-1]) and time.monotonic() < patience:
            time.sleep(POLL_S)
        left[-1].rename(target)
        (target / LOCK).unlink(missing_ok=True)  # one that sleeps may hold it for ever
    target.mkdir(exist_ok=True)
    sync(home.stages)
    return target


def finished_stage(directory: Path, spec: StageSpec) -> StageRecord | None:
    """The verified record of a stage; None where it is not finished.

    Raises BadInput where the directory holds another stage, or not what its record lists.
    """
    record = known_record(directory)
    if record is not None and record.key != spec.key:
        raise BadInput(f"{directory}: holds another stage, {record.key[:12]}")
    return record


def check_name(record: StageRecord, spec: StageSpec) -> None:
    """Raise BadInput where a finished stage was learned under another skill's name.

    Its run, versions and ledger entries have that name, and audits go by it.
    """
    if record.spec.skill != spec.skill:
        raise BadInput(
            f"skill {spec.skill}: what it would learn is there as the skill {record.spec.skill}, "
            "from the same data, model and settings; keep that name, or learn in another home"
        )


def publish(home: Home, spec: StageSpec, work: Path) -> StageRecord:
    """Make a finished work directory the stage's own; returns its verified record."""
    target, record = finished_dir(home, spec), finished_stage(work, spec)
    assert record is not None, f"{work}: the trainer ended well without a record"
    if target.exists():  # another one was faster; on a CPU it is the same to the byte
        shutil.rmtree(work)
    else:
        work.rename(target)
        sync(target.parent)
    return record
