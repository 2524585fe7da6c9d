"""The end of a run: the retention matrix and its pictures as artifacts of one MLflow run."""

import tempfile
from pathlib import Path

import pyarrow as pa
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from prefect import task

from schemas.base import Contract
from schemas.curriculum import Curriculum
from schemas.digest import digest_json
from schemas.results import RetentionMatrix
from schemas.snapshot import Snapshot
from sdft.data import write_table
from sdft.stagelog import METRICS, read_metrics
from tasks.artifacts import run_file
from tasks.console import say
from tasks.evaluation import ScoredCell
from tasks.home import Home
from tasks.packages import evaluation_folder
from tasks.registration import ensure_model
from tasks.tracking import (
    HOME_TAG,
    NOT_THERE,
    Away,
    experiment,
    find_run,
    log_snapshot,
    open_client,
    reaching,
)
from tasks.training import TrainedStage

MATRIX_DIGEST = "sdft.matrix_digest"
CURRICULUM, CURRICULUM_DIGEST = "curriculum.json", "sdft.curriculum_digest"
LATEST = "sdft.latest_matrix_run"


class Report(Contract):
    """Where the matrix of a run lies in MLflow."""

    run_id: str
    is_new: bool


@task
def report_run(
    curriculum: Curriculum,
    matrix: RetentionMatrix,
    stages: list[TrainedStage],
    base_cells: dict[str, ScoredCell],
    general: list[Snapshot],
    home_dir: str,
) -> Report | None:
    """Log the matrix (JSON, Parquet, PNG) and the curves (PNG), unless this very one is there.

    With them what belongs to no stage: the curriculum, the base model's per-item results and the
    general suites' validation. Returns None where MLflow cannot be reached.
    """
    home = Home(home_dir)
    try:
        with reaching(home):
            return _report(home, curriculum, matrix, stages, base_cells, general)
    except Away as away:
        say("report", matrix.curriculum, str(away), "yellow")
        return None


def _report(
    home: Home,
    curriculum: Curriculum,
    matrix: RetentionMatrix,
    stages: list[TrainedStage],
    base_cells: dict[str, ScoredCell],
    general: list[Snapshot],
) -> Report:
    client = open_client(home)
    experiment_id = experiment(client, home, matrix.curriculum)
    digest = digest_json(matrix.model_dump(mode="json", exclude=_TIMINGS))
    run = find_run(client, experiment_id, MATRIX_DIGEST, digest)
    if run is not None and run.info.status == "FINISHED":
        _log_curriculum(client, run, curriculum)
        _mark_latest(client, run.info.run_id, matrix.curriculum)
        return Report(run_id=run.info.run_id, is_new=False)
    if run is None:  # else a killed run has left it half done
        run = client.create_run(
            experiment_id,
            run_name=f"{matrix.curriculum}-retention",
            tags={MATRIX_DIGEST: digest, HOME_TAG: home.lease_key},
        )
    run_id = run.info.run_id
    with tempfile.TemporaryDirectory() as folder:
        write_report(matrix, stages, Path(folder))
        client.log_artifacts(run_id, folder, "retention")
    _log_curriculum(client, run, curriculum)
    for suite, scored in base_cells.items():
        client.log_artifact(run_id, scored.items_file, evaluation_folder(suite))
    for snapshot in general:
        log_snapshot(client, run_id, snapshot, "evaluation")
    measures = [
        Metric(f"retention/{name}", value, 0, 0)
        for name, value in matrix.measures.model_dump().items()
        if value is not None
    ]
    client.log_batch(run_id, metrics=measures)
    client.set_terminated(run_id, "FINISHED")
    _mark_latest(client, run_id, matrix.curriculum)
    return Report(run_id=run_id, is_new=True)


def _log_curriculum(client: MlflowClient, run: Run, curriculum: Curriculum) -> None:
    """Keep the curriculum that the matrix comes of, the newest where several give the same one."""
    digest = digest_json(curriculum.model_dump(mode="json"))
    if run.data.tags.get(CURRICULUM_DIGEST) == digest:
        return
    with tempfile.TemporaryDirectory() as folder:
        curriculum.write(Path(folder) / CURRICULUM)
        client.log_artifact(run.info.run_id, str(Path(folder) / CURRICULUM), "retention")
    client.set_tag(run.info.run_id, CURRICULUM_DIGEST, digest)


def _mark_latest(client: MlflowClient, run_id: str, curriculum: str) -> None:
    """Make this the matrix that `sdft matrix` shows: the registered model's name points to it."""
    ensure_model(client, curriculum)
    client.set_registered_model_tag(curriculum, LATEST, run_id)


_TIMINGS = {"rows": {"__all__": {"cells": {"__all__": {"seconds"}}}}}


def write_report(matrix: RetentionMatrix, stages: list[TrainedStage], folder: Path) -> None:
    """matrix.json, matrix.parquet (a row a cell), matrix.png and curves.png."""
    from tasks.plots import curves, heat_map  # matplotlib costs half a second

    matrix.write(folder / "matrix.json")
    cells = [
        {"stage": row.stage, "skill": row.skill, "passed": row.passed, "suite": suite}
        | (cell.model_dump(exclude={"interval"}) if cell else {})
        for row in matrix.rows
        for suite, cell in zip(matrix.suites, row.cells, strict=True)
    ]
    write_table(pa.Table.from_pylist(cells), folder / "matrix.parquet")
    heat_map(matrix, folder / "matrix.png")
    lines = {one.skill: read_metrics(Path(one.directory) / METRICS) for one in stages}
    curves(lines, folder / "curves.png")


def latest_matrix(home: Home, curriculum: str) -> RetentionMatrix | None:
    """The newest retention matrix of a curriculum, read back through MLflow."""
    file = _latest(home, curriculum, "matrix.json")
    return RetentionMatrix.read(file) if file else None


def latest_curriculum(home: Home, name: str) -> Curriculum | None:
    """The curriculum of the newest retention matrix, as it was learned."""
    file = _latest(home, name, CURRICULUM)
    return Curriculum.read(file) if file else None


def _latest(home: Home, name: str, file: str) -> Path | None:
    client = open_client(home)
    try:
        run_id = client.get_registered_model(name).tags.get(LATEST)
        run = client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        return None
    return run and run_file(run, f"retention/{file}")
