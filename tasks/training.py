"""Training one stage on one specification: here, elsewhere, or not at all, if it is finished."""

import shutil
from contextlib import suppress
from pathlib import Path

from prefect import task
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from schemas.base import BadInput, Contract
from schemas.curriculum import Skill
from schemas.settings import RuntimeSettings
from schemas.snapshot import SuiteData
from schemas.stage import StageRecord, StageSpec
from sdft.files import placed
from sdft.health import Health
from sdft.record import ADAPTER, RECORD, recorded_folders
from sdft.schedule import total_steps
from sdft.stagelog import METRICS, MetricsReader, read_metrics
from tasks.basemodel import ModelDir, describe_model
from tasks.children import ChildFailed, run_child
from tasks.console import console, say
from tasks.home import Home
from tasks.leases import Fence, Fenced, check
from tasks.ledger import Ledger
from tasks.packages import package_of, package_uri, run_file
from tasks.stagefiles import (
    INPUTS,
    SPEC,
    StageInputs,
    finished_dir,
    finished_stage,
    publish,
    take_over,
)
from tasks.stageruns import CARRY_S, MODEL_FILES, Spool, close_run, log_stage
from tasks.tracking import Away, NotLetIn, find_version, open_client, reaching


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


@task(task_run_name="train-{inputs.stage}-{spec.skill}")
def train_skill(spec: StageSpec, inputs: StageInputs, fence: Fence, home_dir: str) -> TrainedStage:
    """Train a stage in a child process, unless it is finished here or in another home.

    Its metrics go to MLflow meanwhile; training waits for nothing there.
    """
    home = Home(home_dir)
    directory = finished_dir(home, spec)
    known = "finished and verified; not trained again"
    record = _finished(directory, spec)
    if record is None and _fetch(home, spec, inputs.curriculum):
        record, known = (
            _finished(directory, spec),
            "fetched from the registry and verified; not trained",
        )
    trained_now = record is None
    if trained_now:
        record = _train(home, spec, inputs, fence)
    else:
        say("train", spec.skill, f"stage {spec.key[:12]} is {known}")
    run_id = ""
    with suppress(Away):  # said where it matters: when the stage is to be registered
        run_id = log_stage(home, directory, inputs)
    return TrainedStage(
        stage=inputs.stage,
        skill=spec.skill,
        key=spec.key,
        run_id=run_id,
        directory=str(directory),
        model=describe_model(directory / "model"),
        parent_dir=spec.parent_dir,
        parent_hash=spec.parent_hash,
        data_hash=spec.data_hash,
        trained_now=trained_now,
    )


def _finished(directory: Path, spec: StageSpec) -> StageRecord | None:
    try:
        return finished_stage(directory, spec)
    except BadInput as error:
        raise BadInput(
            f"{error}, so it is not the stage that was trained; remove {directory}, and it is "
            "trained again"
        ) from None


def _train(home: Home, spec: StageSpec, inputs: StageInputs, fence: Fence) -> StageRecord:
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
        record = publish(home, spec, work)
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
    say(
        "train",
        spec.skill,
        f"{spec.training.method}, {record.steps} steps in {record.train_seconds:.0f} s, divergence "
        f"{read_metrics(finished_dir(home, spec) / METRICS)[-1].metrics['divergence']:.3f}",
    )
    return record


def _run_trainer(
    home: Home, spec: StageSpec, inputs: StageInputs, fence: Fence, spool: Spool, work: Path
) -> None:
    assert inputs.data.train is not None
    steps = total_steps(spec.training, inputs.data.train.rows)
    columns = [
        TextColumn(f"[dim]train    [/dim] [bold]{spec.skill:<16}[/bold]"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>4}/{task.total} steps  {task.fields[now]}"),
        TimeElapsedColumn(),
    ]
    reader, ledger = MetricsReader(work / METRICS), Ledger(home)
    health = Health(spec.training, spec.runtime)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=steps, now="starting")

        def tick() -> int:
            check(ledger, fence)
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

        timeout_s = spec.runtime.stall_timeout_s
        run_child("sdft.train", work / SPEC, work, work / "log.txt", tick, timeout_s)


def _fetch(home: Home, spec: StageSpec, curriculum: str) -> bool:
    """Bring a stage that another home has finished and registered; False where none can be had."""
    try:
        with reaching(home):
            client = open_client(home)
            version = find_version(client, curriculum, spec.key)
            if version is None:
                return False
            run = client.get_run(version.run_id or "")
            home.stages.mkdir(exist_ok=True)
            with placed(finished_dir(home, spec)) as partial:
                for file in (RECORD, INPUTS, METRICS):
                    shutil.copyfile(run_file(run, file), partial / file)
                record = StageRecord.read(partial / RECORD)
                for folder in recorded_folders(record):
                    shutil.copytree(run_file(run, folder), partial / folder)
                if record.adapter:
                    _merge(spec, partial)
                shutil.copytree(run_file(run, MODEL_FILES), partial / "model", dirs_exist_ok=True)
                if not record.adapter:
                    package, _ = package_of(package_uri(client, version))
                    for weights in (package / "model").glob("*.safetensors*"):
                        shutil.copyfile(weights, partial / "model" / weights.name)
                finished_stage(partial, spec)
                StageInputs.read(partial / INPUTS)
    except Away:
        return False
    except BadInput as error:
        say("train", spec.skill, f"what the registry has of it cannot be used: {error}", "yellow")
        return False
    return True


def _merge(spec: StageSpec, directory: Path) -> None:
    """Make model/ of a stage's adapter and its parent, to the byte as the trainer did."""
    from sdft.lora import merged

    merged(Path(spec.parent_dir), directory / ADAPTER).save_pretrained(directory / "model")
