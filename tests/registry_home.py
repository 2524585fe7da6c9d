"""A home with registered versions whose weights are a few bytes: registry and ledger without torch.

Everything but the training is real: runs, artifacts, versions, manifests, verdicts, ledger.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from conftest import train_rows

from schemas.data import ROLLOUT_SCHEMA
from schemas.digest import digest_json
from schemas.results import Verdict
from schemas.settings import RuntimeSettings, TrainingSettings
from schemas.snapshot import Snapshot, SuiteData
from schemas.stage import StageRecord, StageSpec
from sdft.data import Row, data_hash, train_table, write_table
from sdft.modelfiles import all_files, model_files, model_hash
from sdft.record import RECORD, log_files
from sdft.stagelog import METRICS, ROLLOUTS
from tasks import registration
from tasks.artifacts import run_file
from tasks.basemodel import ModelDir
from tasks.gating import keep_verdict
from tasks.home import Home
from tasks.leases import leased
from tasks.lineage import data_folder, row_hashes
from tasks.stagefiles import INPUTS, StageInputs
from tasks.stageruns import log_stage
from tasks.tracking import open_client
from tasks.training import TrainedStage


class RegistryHome:
    """Grows versions in a home, one stage on another."""

    def __init__(self, folder: Path, name: str = "demo", weights: bytes = b"") -> None:
        self.name, self.weights = name, weights
        self.home = Home(folder / "home")
        self.home.activate(offline=True)
        self.client = open_client(self.home)
        self.base = self._model(folder / "base", "base")
        registration.save_package = _copy  # the real one needs a model that transformers can open

    def grow(
        self,
        skill: str,
        parent: TrainedStage | None = None,
        rows: int = 3,
        mix: Callable[[SuiteData], SuiteData] | None = None,
    ) -> TrainedStage:
        """A finished stage with its run, as training leaves it; not registered yet."""
        stage = parent.stage + 1 if parent else 1
        base = parent.model if parent else self.base
        data = self.data(skill, rows)
        data = mix(data) if mix else data
        snapshot = data.train
        assert snapshot is not None
        spec = StageSpec(
            skill=skill,
            parent_dir=base.path,
            parent_hash=base.model_hash,
            train_file=snapshot.file,
            data_hash=snapshot.data_hash,
            seed=0,
            training=TrainingSettings(),
            runtime=RuntimeSettings(),
        )
        directory = self.home.stages / spec.key[:32]
        model = self._model(directory / "model", spec.key)
        (directory / METRICS).write_text('{"step":1,"time_ms":0,"metrics":{"divergence":0.5}}\n')
        (directory / ROLLOUTS).mkdir(exist_ok=True)
        rollout = {"step": 1, "id": "0", "prompt": "a", "completion": "b", "tokens": 1}
        rollout |= {"finished": True, "divergence": 0.5}
        table = pa.Table.from_pylist([rollout], schema=ROLLOUT_SCHEMA)
        write_table(table, directory / ROLLOUTS / "step-000001.parquet")
        record = StageRecord(
            key=spec.key,
            spec=spec,
            model_hash=model.model_hash,
            files=model_files(directory / "model"),
            logs=log_files(directory),
            steps=1,
            train_seconds=1.0,
            checkpoint_seconds=0.0,
            peak_memory_bytes=1,
            code_version="test",
            environment={"device": "cpu"},
        ).seal()
        record.write(directory / RECORD)
        inputs = StageInputs(curriculum=self.name, stage=stage, data=data).seal()
        inputs.write(directory / INPUTS)
        run_id = log_stage(self.home, directory, inputs)
        self.client.log_metric(run_id, f"eval/{skill}", 0.5)
        return TrainedStage(
            stage=stage,
            skill=skill,
            key=spec.key,
            run_id=run_id,
            directory=str(directory),
            model=model,
            parent_dir=base.path,
            parent_hash=base.model_hash,
            data_hash=snapshot.data_hash,
            trained_now=True,
        )

    def register(
        self, stage: TrainedStage, parent_version: str | None, decision: str = "pass"
    ) -> str:
        """Register a stage under a verdict; returns its version."""
        return self.register_judged(stage, make_verdict(stage, decision), parent_version)

    def register_judged(
        self,
        stage: TrainedStage,
        verdict: Verdict,
        parent_version: str | None,
        references: dict[str, str] | None = None,
    ) -> str:
        """Keep a verdict and register its stage, as a run does; returns the version."""
        keep_verdict(verdict, references or {}, stage.run_id, self.home)
        with leased(f"process {os.getpid()}", self.name, self.home) as fence:
            return registration.register_stage(
                self.home,
                self.name,
                stage,
                verdict,
                registration.Origin(parent_version=parent_version),
                fence,
            )

    def line(self, skills: list[str]) -> list[str]:
        """Versions for skills learned one on another; all pass."""
        parent, version, versions = None, None, []
        for skill in skills:
            parent = self.grow(skill, parent)
            version = self.register(parent, version)
            versions.append(version)
        return versions

    def rows(self, run_id: str, skill: str) -> list[str]:
        """The hashes of the rows that a run's stage learned."""
        return row_hashes(run_file(self.client.get_run(run_id), data_folder(skill)))

    def _model(self, directory: Path, content: str) -> ModelDir:
        directory.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            body = self.weights if file == "model.safetensors" else b""
            (directory / file).write_bytes(f"{file} of {content}\n".encode() + body)
        model = model_hash(model_files(directory))
        return ModelDir(path=str(directory), model_hash=model, template_hash=digest_json("t"))

    def data(self, skill: str, rows: int) -> SuiteData:
        """Validated demonstrations, which are the evaluation's items as well."""
        snapshot = self.snapshot(f"{skill}-{rows}", f"{skill}/train", train_rows(rows, skill))
        return SuiteData(eval=snapshot.model_copy(update={"name": f"{skill}/eval"}), train=snapshot)

    def snapshot(self, folder: str, name: str, rows: list[Row]) -> Snapshot:
        directory = self.home.data / folder
        directory.mkdir(parents=True, exist_ok=True)
        table = train_table(rows)
        write_table(table, directory / "rows.parquet")
        (directory / "result.json").write_text(
            '{"statistics": {"evaluated_expectations": 2, "successful_expectations": 2}}'
        )
        (directory / "docs.html").write_text("<p>fine</p>")
        snapshot = Snapshot(
            name=name,
            source=f"{name.split('/')[0]}.jsonl",
            directory=str(directory),
            file=str(directory / "rows.parquet"),
            files=all_files(directory),
            data_hash=data_hash(table),
            rows=len(rows),
            quarantined=0,
        ).seal()
        snapshot.write(directory / "snapshot.json")
        return snapshot


def make_verdict(stage: TrainedStage, decision: str, note: str = "") -> Verdict:
    return Verdict(
        stage=stage.stage,
        skill=stage.skill + note,
        decision=decision,
        candidate_hash=stage.model.model_hash,
        parent_hash=stage.parent_hash,
        judgements=(),
    )


def _copy(model_dir: Path, _stack: object, target: Path) -> None:
    shutil.copytree(model_dir, target / "model")
    (target / "MLmodel").write_text("flavors: {}\n")
