"""What a judged stage leaves in MLflow, registry and ledger, now or when MLflow is back."""

from collections.abc import Sequence
from pathlib import Path

from prefect import task

from schemas.base import Contract
from schemas.results import Verdict
from sdft.chain import let_in, newest
from sdft.record import ADAPTER
from tasks.aliases import settle
from tasks.console import say
from tasks.evaluation import ScoredCell, log_scores
from tasks.events import deliver
from tasks.gating import keep_verdict
from tasks.home import Home
from tasks.leases import Fence
from tasks.ledger import Ledger
from tasks.packages import AdapterStack
from tasks.registration import Origin, register_stage
from tasks.stagefiles import INPUTS, WAITING, StageInputs
from tasks.stageruns import log_stage
from tasks.tracking import Away, open_client, reaching
from tasks.training import TrainedStage


class JudgedStage(Contract):
    """A stage that was trained, scored and judged."""

    trained: TrainedStage
    cells: dict[str, ScoredCell]
    verdict: Verdict
    references: dict[str, str]
    """By suite, the file of the answers that the verdict compares with."""
    parent_stage: int
    """The stage it started from; 0 is the base model."""


@task(task_run_name="settle-registry-{name}")
def settle_registry(name: str, home_dir: str) -> None:
    """Finish what a crash left between ledger and aliases; say which aliases were moved by hand."""
    home = Home(home_dir)
    try:
        with reaching(home):
            drift = settle(home, name)
    except Away as away:
        say("registry", name, f"{away}; training goes on without it", "yellow")
        return
    for line in drift:
        say("registry", name, f"{line}; sdft reconcile puts it back", "yellow")


@task(task_run_name="publish-{name}")
def publish_stages(
    name: str, judged: list[JudgedStage], versions: dict[int, str], fence: Fence, home_dir: str
) -> dict[int, str]:
    """Register the stages that `versions` (by stage) lacks, in their order; returns all versions.

    Where MLflow cannot be reached the rest is left: it is asked for again with the next stage.
    """
    home, known = Home(home_dir), dict(versions)
    by_number = {stage.trained.stage: stage for stage in judged}
    for stage in judged:
        number, skill = stage.trained.stage, stage.trained.skill
        if number in known:
            continue
        try:
            with reaching(home):
                parent = known.get(stage.parent_stage)
                origin = Origin(parent_version=parent, stack=stack_of(_line(stage, by_number)))
                known[number] = _publish(home, name, stage, origin, fence)
        except Away as away:
            say("register", skill, f"not yet: {away}", "yellow")
            for one in judged:
                if one.trained.stage not in known:
                    (Path(one.trained.directory) / WAITING).touch()
            break
    deliver(home, name, in_flow=True)
    return known


def is_let_in(home: Home, name: str, stage_key: str, verdict: Verdict) -> bool:
    """Whether the next stage may start from this one: it passed, or a person overrode that.

    By the ledger, also while MLflow is away, where it has this verdict.
    """
    entries = Ledger(home).entries(name)
    for one in entries:
        if (one.kind, one.stage_key) == ("registered", stage_key) and one.version:
            judged = newest(entries, one.version, "verdict")
            if judged is not None and judged.verdict_hash == verdict.digest:
                return let_in(entries, one.version)
    return verdict.passed


def stack_of(line: Sequence[TrainedStage]) -> AdapterStack | None:
    """The adapters that the last of these stages is a stack of; None where it is a whole model.

    `line` are stages with adapters, each on the one before. A stack that has outgrown the model is
    none: the next one begins on that stage.
    """
    stack = None
    for stage in line:
        directory = Path(stage.directory)
        base, below = (stack.base_dir, stack.adapter_dirs) if stack else (stage.parent_dir, ())
        adapters = (*below, str(directory / ADAPTER))
        outgrown = sum(map(_weight_bytes, adapters)) >= _weight_bytes(directory / "model")
        stack = None if outgrown else AdapterStack(base_dir=base, adapter_dirs=adapters)
    return stack


def _weight_bytes(directory: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def _line(stage: JudgedStage, judged: dict[int, JudgedStage]) -> list[TrainedStage]:
    """A stage and those below it, oldest first, as far down as they have adapters."""
    line: list[TrainedStage] = []
    while (Path(stage.trained.directory) / ADAPTER).is_dir():
        line.insert(0, stage.trained)
        if stage.parent_stage == 0:
            break
        stage = judged[stage.parent_stage]
    return line


def _publish(home: Home, name: str, stage: JudgedStage, origin: Origin, fence: Fence) -> str:
    directory = Path(stage.trained.directory)
    inputs = StageInputs.read(directory / INPUTS).model_copy(
        update={"curriculum": name, "stage": stage.trained.stage}
    )
    run_id = stage.trained.run_id or log_stage(home, directory, inputs)
    trained = stage.trained.model_copy(update={"run_id": run_id})
    log_scores(open_client(home), run_id, stage.cells)
    keep_verdict(stage.verdict, stage.references, run_id, home)
    version = register_stage(home, name, trained, stage.verdict, origin, fence)
    (directory / WAITING).unlink(missing_ok=True)
    return version
