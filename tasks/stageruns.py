"""A stage's run in MLflow: fed while the stage trains, completed from its files, closed.

metrics.jsonl is the truth. What MLflow does not take now it gets later: training waits for nothing.
"""

import threading
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from schemas.stage import StageRecord, StageSpec, StepMetrics
from sdft.record import RECORD, recorded_folders
from sdft.stagelog import METRICS, MetricsReader, read_metrics
from tasks.home import Home
from tasks.leases import Fence, Fenced, check
from tasks.ledger import Ledger, LedgerAway
from tasks.machine import MachineMetrics
from tasks.packages import MODEL_FILES
from tasks.seen import known_record
from tasks.stagefiles import INPUTS, StageInputs
from tasks.tracking import (
    HOME_TAG,
    LOGGED,
    MODEL_HASH,
    STAGE_KEY,
    Away,
    NotLetIn,
    experiment,
    find_run,
    log_snapshot,
    open_client,
    reaching,
    set_tags,
    stage_run,
)

METRICS_A_BATCH = 1000
CARRY_S, LONGEST_S = 1.0, 30.0
"""How often metrics are carried; the pause doubles up to the longest while MLflow is away."""
LEAD_METRIC = "train/divergence"
"""Every step has it, and a step is carried whole: which steps a run has is read from it."""
ENDED, PEAK = "sdft.ended", "sdft.peak_memory_bytes"


class Spool:
    """Carries the metrics of a stage that is being trained to its run, in the background."""

    def __init__(self, home: Home, work: Path, spec: StageSpec, inputs: StageInputs, fence: Fence):
        self._home, self._spec, self._inputs, self._fence = home, spec, inputs, fence
        self._ledger = Ledger(home)
        self._reader = MetricsReader(work / METRICS)
        self._waiting: list[StepMetrics] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.is_away = False

    def end(self, patience_s: float | None = None) -> bool:
        """Stop; what was not carried is left to `log_stage`. Nothing is written after that.

        Returns False where it still waits for MLflow after `patience_s`.
        """
        self._ended.set()
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause, run_id, there, machine = 0.0, None, set[int](), None
        client = open_client(self._home)
        while not self._ended.wait(pause):
            try:
                with reaching(self._home):
                    if run_id is None:
                        run_id = _open_run(client, self._home, self._spec, self._inputs)
                        client.update_run(run_id, "RUNNING")
                        set_tags(client, run_id, {HOME_TAG: self._home.lease_key})
                        there = _steps(client, run_id)
                        machine = MachineMetrics(run_id, self._home.tracking_uri)
                    self._waiting += self._reader.new()
                    check(self._ledger, self._fence)
                    carry(client, run_id, [one for one in self._waiting if one.step not in there])
                    if machine is not None and (sample := machine.new(self._reader.step)):
                        client.log_batch(run_id, metrics=sample)
                self._waiting, self.is_away, pause = [], False, CARRY_S
            except (Away, NotLetIn, LedgerAway):
                self.is_away, pause = True, min(max(2 * pause, CARRY_S), LONGEST_S)
            except Fenced:  # the training itself will notice
                return


def carry(client: MlflowClient, run_id: str, lines: list[StepMetrics]) -> None:
    """Log steps, each whole or not at all; the same line again is the same point."""
    batch: list[Metric] = []
    for line in lines:
        points = [
            Metric(f"train/{name}", value, line.time_ms, line.step)
            for name, value in line.metrics.items()
        ]
        if len(batch) + len(points) > METRICS_A_BATCH:
            client.log_batch(run_id, metrics=batch)
            batch = []
        batch += points
    if batch:
        client.log_batch(run_id, metrics=batch)


def log_stage(home: Home, directory: Path, inputs: StageInputs) -> str:
    """Bring all that MLflow keeps of a finished stage, as far as it is not there; returns the run.

    Raises Away where MLflow cannot be reached.
    """
    record = StageRecord.read(directory / RECORD)
    with reaching(home):
        client = open_client(home)
        experiment_id = experiment(client, home, inputs.curriculum)
        run = stage_run(client, experiment_id, record.spec, inputs.stage)
        run_id = run.info.run_id
        if not _has_all(home, run, inputs.curriculum, record):
            set_tags(client, run_id, {LOGGED: ""})
            there = _steps(client, run_id)
            lines = read_metrics(directory / METRICS)
            carry(client, run_id, [line for line in lines if line.step not in there])
            _log_files(client, run_id, directory, inputs)
            client.set_terminated(run_id, "FINISHED")
            tags = {MODEL_HASH: record.model_hash, ENDED: "finished", LOGGED: record.hash}
            set_tags(client, run_id, tags)
    return run_id


def sync_stages(home: Home) -> list[str]:
    """Bring to MLflow what it lacks of this home's finished stages; returns one line a stage.

    Raises Away where MLflow cannot be reached.
    """
    done: list[str] = []
    for directory in sorted(home.stages.glob("*")):
        if not (directory / INPUTS).is_file() or not (directory / RECORD).is_file():
            continue
        inputs, record = StageInputs.read(directory / INPUTS), known_record(directory)
        assert record is not None
        with reaching(home):
            is_there = is_logged(home, inputs, record)
        if not is_there:
            log_stage(home, directory, inputs)
            steps, skill = len(read_metrics(directory / METRICS)), record.spec.skill
            done.append(f"{inputs.curriculum}, stage {inputs.stage} {skill}: {steps} steps")
    return done


def is_logged(home: Home, inputs: StageInputs, record: StageRecord) -> bool:
    """Whether MLflow has all of a finished stage."""
    client = open_client(home)
    known = client.get_experiment_by_name(inputs.curriculum)
    run = known and find_run(client, known.experiment_id, STAGE_KEY, record.key)
    return run is not None and _has_all(home, run, inputs.curriculum, record)


def _has_all(home: Home, run: Run, curriculum: str, record: StageRecord) -> bool:
    """Whether a run has the files of this very training; those of a registered version stay."""
    logged = run.data.tags.get(LOGGED)
    if not logged or logged == record.hash:
        return bool(logged)
    entries = Ledger(home).entries(curriculum)
    return any((one.kind, one.stage_key) == ("registered", record.key) for one in entries)


def close_run(
    home: Home, spec: StageSpec, inputs: StageInputs, status: str, why: str, peak_bytes: int
) -> None:
    """Say in a stage's run how its training ended, where it did not end well."""
    with reaching(home):
        client = open_client(home)
        run_id = _open_run(client, home, spec, inputs)
        client.set_terminated(run_id, status)
        set_tags(client, run_id, {ENDED: why[:5000], PEAK: str(peak_bytes)})


def _open_run(client: MlflowClient, home: Home, spec: StageSpec, inputs: StageInputs) -> str:
    experiment_id = experiment(client, home, inputs.curriculum)
    return stage_run(client, experiment_id, spec, inputs.stage).info.run_id


def _steps(client: MlflowClient, run_id: str) -> set[int]:
    return {point.step for point in client.get_metric_history(run_id, LEAD_METRIC)}


def _log_files(client: MlflowClient, run_id: str, directory: Path, inputs: StageInputs) -> None:
    for snapshot, context in [(inputs.data.train, "training"), (inputs.data.eval, "evaluation")]:
        if snapshot is not None:
            log_snapshot(client, run_id, snapshot, context)
    for file in (RECORD, INPUTS, METRICS):
        client.log_artifact(run_id, str(directory / file))
    for folder in recorded_folders(StageRecord.read(directory / RECORD)):
        client.log_artifacts(run_id, str(directory / folder), folder)
    for file in (directory / "model").iterdir():
        if ".safetensors" not in file.name:  # the weights are in the registered package
            client.log_artifact(run_id, str(file), MODEL_FILES)
    for checkpoint in sorted((directory / "checkpoints").glob("step-*")):
        kept = f"checkpoints/{checkpoint.name}"
        client.log_artifact(run_id, str(checkpoint / "manifest.json"), kept)
        if (parts := checkpoint / "model").is_dir():  # as the ranks of a sharded stage had them
            client.log_artifacts(run_id, str(parts), f"{kept}/model")
        else:
            client.log_artifact(run_id, f"{parts}.safetensors", kept)
