"""Training one stage on one specification: here, elsewhere, or not at all, if it is finished."""

import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

from prefect import task
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from schemas.base import BadInput, Contract
from schemas.curriculum import Skill
from schemas.settings import RuntimeSettings
from schemas.snapshot import SuiteData
from schemas.stage import StageRecord, StageSpec
from sdft.files import partial_name
from sdft.health import Health
from sdft.record import RECORD
from sdft.schedule import short_of_steps, total_steps
from sdft.stagelog import METRICS, MetricsReader, read_metrics
from tasks.basemodel import ModelDir, stage_model
from tasks.children import ChildFailed, run_child
from tasks.console import console, say
from tasks.elsewhere import TRAIN, Job, deployment, have_done
from tasks.failures import RunFailed
from tasks.fetching import fetch_stage
from tasks.home import Home
from tasks.leases import Fence, Fenced, check, checking, leased
from tasks.ledger import Ledger
from tasks.parcels import cache_of, model_name, received, send_data, send_model, send_stage
from tasks.placement import placed_on
from tasks.stagefiles import (
    INPUTS,
    SPEC,
    StageInputs,
    check_name,
    finished_dir,
    finished_stage,
    publish,
    take_over,
)
from tasks.stageruns import CARRY_S, Spool, close_run, log_stage
from tasks.tracking import Away, NotLetIn


class TrainedStage(Contract):
    """A finished stage: its model, its identity, and its MLflow run."""

    stage: int
    skill: str
    key: str
    run_id: str
    """Empty while MLflow cannot be reached."""
    directory: str
    model: ModelDir
    parent_dir: str
    parent_hash: str
    data_hash: str
    trained_now: bool


def stage_spec(
    skill: Skill, data: SuiteData, parent: ModelDir, seed: int, runtime: RuntimeSettings
) -> StageSpec:
    """The specification of a stage: everything that the trainer is told."""
    assert data.train is not None, f"{skill.name} has no demonstrations"
    return StageSpec(
        skill=skill.name,
        parent_dir=parent.path,
        parent_hash=parent.model_hash,
        train_file=data.train.file,
        data_hash=data.train.data_hash,
        seed=seed,
        training=skill.training,
        runtime=runtime,
    )


class TrainOrder(Contract):
    """A stage for a worker that shares no disk with us: no path in it counts, only hashes."""

    spec: StageSpec
    inputs: StageInputs
    train: str
    """Parcel of the demonstrations."""
    eval: str
    """Parcel of the items, which the stage's run keeps too."""


@task(task_run_name="train-{inputs.stage}-{spec.skill}")
def train_skill(spec: StageSpec, inputs: StageInputs, home_dir: str) -> TrainedStage:
    """A finished stage: trained here, in a child process, or where a deployment runs.

    Its metrics go to MLflow meanwhile; training here waits for nothing there.
    """
    home = Home(home_dir)
    directory = finished_dir(home, spec)
    known = _is_known(home, spec, inputs)
    if not known:
        _say_if_short_of_steps(spec, inputs)
        if name := deployment(TRAIN):
            _train_elsewhere(name, home, spec, inputs)
        else:
            with leased(spec.key, spec.skill, home) as fence:
                _train(home, spec, inputs, fence)
    run_id = ""
    with suppress(Away):  # said where it matters: when the stage is to be registered
        run_id = log_stage(home, directory, inputs)
    return TrainedStage(
        stage=inputs.stage,
        skill=spec.skill,
        key=spec.key,
        run_id=run_id,
        directory=str(directory),
        model=stage_model(directory, StageRecord.read(directory / RECORD)),
        parent_dir=spec.parent_dir,
        parent_hash=spec.parent_hash,
        data_hash=spec.data_hash,
        trained_now=not known,
    )


def execute(order: TrainOrder, home: Home) -> None:
    """What a worker does for `train_skill`: the stage is trained, and all of it is sent.

    Then only the model stays here, in the cache, where the next stage looks for it.
    """
    spec = order.spec
    with leased(spec.key, spec.skill, home) as fence:
        with ExitStack() as held:
            train = held.enter_context(received(home, order.train))
            items = held.enter_context(received(home, order.eval))
            data = order.inputs.data.under(train, items)
            inputs = order.inputs.model_copy(update={"data": data})
            if not _is_known(home, spec, inputs):
                parent = held.enter_context(received(home, model_name(spec.parent_hash)))
                assert data.train is not None
                places = {"parent_dir": str(parent), "train_file": data.train.file}
                _train(home, spec.model_copy(update=places), inputs, fence)
            directory = finished_dir(home, spec)
            log_stage(home, directory, inputs)
            parcel = send_stage(home, directory, StageRecord.read(directory / RECORD))
        # No stage any more, also where we are killed: without its model it would be a damaged one.
        left = directory.rename(directory.with_name(f"{partial_name()}{directory.name}"))
        with suppress(RunFailed):  # where there is no room it is brought again
            cache_of(home).keep(parcel, left / "model")
        shutil.rmtree(left)


def _is_known(home: Home, spec: StageSpec, inputs: StageInputs) -> bool:
    """Whether a stage is finished here, or in another home and could be fetched."""
    directory = finished_dir(home, spec)
    how = "finished and verified; not trained again"
    record = _finished(directory, spec)
    if record is None and fetch_stage(home, spec, inputs.curriculum):
        how = "fetched from the registry and verified; not trained"
        record = _finished(directory, spec)
    if record is None:
        return False
    check_name(record, spec)
    say("train", spec.skill, f"stage {spec.key[:12]} is {how}")
    return True


def _train_elsewhere(name: str, home: Home, spec: StageSpec, inputs: StageInputs) -> None:
    """Have a deployment train a stage: what it needs is sent, and what it made is fetched."""
    assert inputs.data.train is not None
    send_model(home, Path(spec.parent_dir), spec.parent_hash)
    order = TrainOrder(
        spec=spec.model_copy(update={"parent_dir": "", "train_file": ""}),
        inputs=inputs,
        train=send_data(home, Path(inputs.data.train.directory)),
        eval=send_data(home, Path(inputs.data.eval.directory)),
    )
    job = Job(
        deployment=name,
        order=order.model_dump(mode="json"),
        key=spec.key,
        step="train",
        label=spec.skill,
    )
    have_done(job, home)
    if not fetch_stage(home, spec, inputs.curriculum):
        raise RunFailed(
            f"{spec.skill}: {name} has finished the stage, but it cannot be fetched from MLflow "
            "now; run the same command again"
        )
    _say_trained(home, spec)


def _say_if_short_of_steps(spec: StageSpec, inputs: StageInputs) -> None:
    assert inputs.data.train is not None
    if said := short_of_steps(spec.training, inputs.data.train.rows):
        say("train", spec.skill, said, "yellow")


def _finished(directory: Path, spec: StageSpec) -> StageRecord | None:
    try:
        return finished_stage(directory, spec)
    except BadInput as error:
        raise BadInput(
            f"{error}, so it is not the stage that was trained; remove {directory}, and it is "
            "trained again"
        ) from None


def _train(home: Home, spec: StageSpec, inputs: StageInputs, fence: Fence) -> None:
    """Train here: in a directory that nobody reads, which gets its name when all of it is there.

    MLflow is fed meanwhile, and told how it ended.
    """
    work = take_over(home, spec, fence.token)
    spec.write(work / SPEC)
    inputs.seal().write(work / INPUTS)
    if not (work / RECORD).is_file():  # no checkpoint vouches for its curve: it is written anew
        (work / METRICS).unlink(missing_ok=True)
    spool = Spool(home, work, spec, inputs, fence)
    try:
        if not (work / RECORD).is_file():  # else it was killed just before it could say so
            _run_trainer(home, spec, inputs, fence, spool, work)
        check(Ledger(home), fence)
        publish(home, spec, work)
    except Fenced:  # how it ends is for the other one to say
        spool.end(CARRY_S)
        raise
    except BaseException as error:
        status, why = "FAILED", str(error) or type(error).__name__
        if not isinstance(error, Exception):  # Prefect makes an exception of its own of SIGTERM
            status = "KILLED"
            why = "interrupted" if type(error) is KeyboardInterrupt else "terminated"
        peak = error.attempt.peak_memory_bytes if isinstance(error, ChildFailed) else 0
        with suppress(Away, NotLetIn):
            if spool.end(CARRY_S):  # else MLflow is away: the next run closes what is open
                close_run(home, spec, inputs, status, why, peak)
        raise
    spool.end()
    _say_trained(home, spec)


def _say_trained(home: Home, spec: StageSpec) -> None:
    directory = finished_dir(home, spec)
    record = StageRecord.read(directory / RECORD)
    last = read_metrics(directory / METRICS)[-1].metrics
    told = f"{spec.training.method}, {record.steps} steps in {record.train_seconds:.0f} s"
    say("train", spec.skill, f"{told}, divergence {last['divergence']:.3f}")


def _run_trainer(
    home: Home, spec: StageSpec, inputs: StageInputs, fence: Fence, spool: Spool, work: Path
) -> None:
    """Run `sdft.train` as a child process, and show its steps."""
    assert inputs.data.train is not None
    steps = total_steps(spec.training, inputs.data.train.rows)
    columns = [
        TextColumn(f"[dim]train    [/dim] [bold]{spec.skill:<16}[/bold]"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>4}/{task.total} steps  {task.fields[now]}"),
        TimeElapsedColumn(),
    ]
    reader, check_fence = MetricsReader(work / METRICS), checking(Ledger(home), fence)
    health = Health(spec.training, spec.runtime)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=steps, now="starting")

        def tick() -> int:
            check_fence()
            for line in reader.new():
                for finding in health.look(line):
                    if not finding.stops:  # the trainer ends with that one, and says it
                        message = f"step {finding.step}: {finding.message}"
                        say("health", spec.skill, message, "yellow")
            if reader.latest is not None:
                away = "  (MLflow is away)" if spool.is_away else ""
                now = f"divergence {reader.latest.metrics['divergence']:.3f}{away}"
                progress.update(bar, completed=reader.step, now=now)
            return reader.step

        runtime = spec.runtime
        with placed_on(runtime.device, runtime.processes, runtime.gpu_memory_gib, spec.skill):
            timeout_s = runtime.stall_timeout_s
            run_child("sdft.train", work / SPEC, work, work / "log.txt", tick, timeout_s)
