"""Training one stage on one specification, and what MLflow keeps of it."""

from pathlib import Path

from mlflow import MlflowClient
from prefect import task
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from schemas.base import Contract
from schemas.curriculum import Skill
from schemas.settings import RuntimeSettings
from schemas.snapshot import SuiteData
from schemas.stage import StageRecord, StageSpec
from sdft.record import verified_record
from sdft.schedule import total_steps
from tasks.basemodel import ModelDir, describe_model
from tasks.children import run_child
from tasks.console import console, say
from tasks.home import Home
from tasks.tracking import LOGGED, MetricRelay, experiment, log_snapshot, open_client, set_tags
from tasks.tracking import stage_run as find_or_create_run


class TrainedStage(Contract):
    """A finished stage: its model, its identity, and its MLflow run."""

    stage: int
    skill: str
    key: str
    run_id: str
    directory: str
    model: ModelDir
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


@task(task_run_name="train-{stage}-{spec.skill}")
def train_skill(
    spec: StageSpec, stage: int, data: SuiteData, curriculum: str, home_dir: str
) -> TrainedStage:
    """Train a stage in a child process, unless it is finished, with its metrics going to MLflow."""
    home = Home(home_dir)
    directory = home.stages / spec.key[:32]
    directory.mkdir(parents=True, exist_ok=True)
    client = open_client(home)
    run = find_or_create_run(client, experiment(client, home, curriculum), spec, stage)
    relay = MetricRelay(client, run.info.run_id, directory)
    record = verified_record(directory)
    trained_now = record is None
    if record is None:
        client.update_run(run.info.run_id, "RUNNING")
        try:
            record = _train(spec, directory, relay, data)
        except BaseException as error:  # MLflow is to say how it ended, whatever it was
            ended = "FAILED" if isinstance(error, Exception) else "KILLED"
            client.set_terminated(run.info.run_id, ended)
            raise
    else:
        say(
            "train",
            spec.skill,
            f"stage {spec.key[:12]} is finished and verified; not trained again",
        )
    if run.data.tags.get(LOGGED) != record.key:
        relay.tick()
        _log_results(client, run.info.run_id, data, directory, record)
    return TrainedStage(
        stage=stage,
        skill=spec.skill,
        key=spec.key,
        run_id=run.info.run_id,
        directory=str(directory),
        model=describe_model(directory / "model"),
        parent_hash=spec.parent_hash,
        data_hash=spec.data_hash,
        trained_now=trained_now,
    )


def _train(spec: StageSpec, directory: Path, relay: MetricRelay, data: SuiteData) -> StageRecord:
    spec_file = directory / "spec.json"
    spec.write(spec_file)
    assert data.train is not None
    steps = total_steps(spec.training, data.train.rows)
    columns = [
        TextColumn(f"[dim]train    [/dim] [bold]{spec.skill:<16}[/bold]"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>4}/{task.total} steps  {task.fields[now]}"),
        TimeElapsedColumn(),
    ]
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=steps, now="starting")

        def tick() -> int:
            step = relay.tick()
            if relay.latest is not None:
                now = f"divergence {relay.latest.metrics['divergence']:.3f}"
                progress.update(bar, completed=step, now=now)
            return step

        run_child(
            "sdft.train",
            spec_file,
            directory,
            directory / "log.txt",
            tick,
            spec.runtime.stall_timeout_s,
        )
    record = verified_record(directory)
    assert record is not None, f"{directory}: the trainer ended well without a record"
    say(
        "train",
        spec.skill,
        f"{spec.training.method}, {record.steps} steps in {record.train_seconds:.0f} s, divergence "
        f"{relay.latest.metrics['divergence'] if relay.latest else float('nan'):.3f}",
    )
    return record


def _log_results(
    client: MlflowClient, run_id: str, data: SuiteData, directory: Path, record: StageRecord
) -> None:
    for snapshot, context in [(data.train, "training"), (data.eval, "evaluation")]:
        if snapshot is not None:
            log_snapshot(client, run_id, snapshot, context)
    for file in ("record.json", "spec.json", "metrics.jsonl"):
        client.log_artifact(run_id, str(directory / file))
    client.log_artifacts(run_id, str(directory / "rollouts"), "rollouts")
    for checkpoint in sorted((directory / "checkpoints").glob("step-*")):
        for file in ("model.safetensors", "manifest.json"):
            client.log_artifact(run_id, str(checkpoint / file), f"checkpoints/{checkpoint.name}")
    client.set_terminated(run_id, "FINISHED")
    set_tags(client, run_id, {"sdft.model_hash": record.model_hash, LOGGED: record.key})
