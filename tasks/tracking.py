"""MLflow: one run a stage, found by its stage key; logging again changes nothing.

The files of a stage are the truth and MLflow the view: all here can be made again from them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from schemas.snapshot import Snapshot
from schemas.stage import StageSpec, StepMetrics
from sdft.stagelog import METRICS, read_metrics
from tasks.home import Home

STAGE_KEY = "sdft.stage_key"
LOGGED = "sdft.logged"
VERDICT_TAG = "sdft.verdict"
METRICS_A_BATCH = 1000


def open_client(home: Home) -> MlflowClient:
    """A client for this home's tracking store and registry."""
    return MlflowClient(tracking_uri=home.tracking_uri, registry_uri=home.tracking_uri)


def experiment(client: MlflowClient, home: Home, name: str) -> str:
    """The id of the curriculum's experiment, made where it is not there."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = home.tracking_uri.startswith("sqlite:")
    return client.create_experiment(
        name, artifact_location=home.artifacts.as_uri() + f"/{name}" if local else None
    )


def find_run(client: MlflowClient, experiment_id: str, tag: str, value: str) -> MlflowRun | None:
    """The newest run with this tag."""
    found = client.search_runs(
        [experiment_id], f"tags.`{tag}` = '{value}'", order_by=["start_time DESC"], max_results=1
    )
    return found[0] if found else None


def stage_run(client: MlflowClient, experiment_id: str, spec: StageSpec, stage: int) -> MlflowRun:
    """The run of a stage; a new one gets the stage's settings as parameters."""
    run = find_run(client, experiment_id, STAGE_KEY, spec.key)
    if run is None:
        run = client.create_run(
            experiment_id,
            run_name=f"stage-{stage}-{spec.skill}",
            tags={
                STAGE_KEY: spec.key,
                "sdft.skill": spec.skill,
                "sdft.stage": str(stage),
                "sdft.parent_hash": spec.parent_hash,
                "sdft.data_hash": spec.data_hash,
            },
        )
    if not run.data.params:
        settings = spec.training.model_dump() | {"seed": spec.seed}
        client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in settings.items()])
    return run


def log_snapshot(client: MlflowClient, run_id: str, snapshot: Snapshot, context: str) -> None:
    """A snapshot as a dataset input of the run, under our own digest, with its validation."""
    dataset = Dataset(
        name=snapshot.name.replace("/", "-"),
        digest=snapshot.data_hash[:32],
        source_type="local",
        source=json.dumps({"uri": snapshot.file, "from": snapshot.source}),
        profile=json.dumps({"num_rows": snapshot.rows, "sha256": snapshot.data_hash}),
    )
    tags = [InputTag("mlflow.data.context", context)]
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])
    for file in ("rows.parquet", "snapshot.json", "result.json", "docs.html"):
        path = Path(snapshot.directory) / file
        client.log_artifact(run_id, str(path), f"validation/{snapshot.name}")


class MetricRelay:
    """Carries the complete lines of a metrics file to a run, each once, as they appear.

    A point's timestamp is the one in the file, so a line carried twice is still one point.
    """

    def __init__(self, client: MlflowClient, run_id: str, stage_dir: Path) -> None:
        self._client, self._run_id = client, run_id
        self._path = stage_dir / METRICS
        self._size = 0
        self._carried = 0
        self.latest: StepMetrics | None = None

    def tick(self) -> int:
        """Carry what is new; returns the last step seen."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size != self._size:
            lines, _ = read_metrics(self._path)
            self._carry(lines[self._carried :])
            self._carried, self._size = len(lines), size
            self.latest = lines[-1] if lines else None
        return self.latest.step if self.latest else 0

    def _carry(self, lines: Iterable[StepMetrics]) -> None:
        points = [
            Metric(f"train/{name}", value, line.time_ms, line.step)
            for line in lines
            for name, value in line.metrics.items()
        ]
        for start in range(0, len(points), METRICS_A_BATCH):
            self._client.log_batch(self._run_id, metrics=points[start : start + METRICS_A_BATCH])


def set_tags(client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
