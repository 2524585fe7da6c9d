"""One stage of the tiny model, trained in this process."""

from pathlib import Path

import torch
from conftest import train_rows

from schemas.settings import RuntimeSettings, TrainingSettings
from schemas.stage import StageRecord, StageSpec
from sdft.data import data_hash, train_table, write_table
from sdft.model import load_model
from sdft.process import Stop
from sdft.stagelog import read_metrics
from sdft.train import train

BASIC = TrainingSettings(
    epochs=2, prompts_per_step=4, learning_rate=3e-3, warmup_steps=2, max_new_tokens=12
)
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("could not create a primitive"),
)
"""As torch says it, the last for oneDNN."""


class Case:
    """One stage's inputs in a folder of its own."""

    def __init__(self, model_dir: Path, folder: Path) -> None:
        self.model_dir, self.folder = model_dir, folder
        table = train_table(train_rows(10))
        self.file = folder / "train.parquet"
        write_table(table, self.file)
        self.hash = data_hash(table)

    def spec(self, training: TrainingSettings = BASIC, **runtime: object) -> StageSpec:
        return StageSpec(
            skill="alpha",
            parent_dir=str(self.model_dir),
            parent_hash="p",
            train_file=str(self.file),
            data_hash=self.hash,
            seed=1,
            training=training,
            runtime=RuntimeSettings.model_validate({"device": "cpu", **runtime}),
        )

    def run(self, name: str, spec: StageSpec) -> tuple[StageRecord, list[float], Path]:
        directory = self.folder / name
        directory.mkdir(exist_ok=True)
        record = train(spec, directory, Stop())
        assert record is not None
        lines = read_metrics(directory / "metrics.jsonl")
        return record, [line.metrics["divergence"] for line in lines], directory


class StopAfter(Stop):
    """Asks to stop when it has been looked at as often as the trainer does in `steps` steps."""

    def __init__(self, steps: int) -> None:
        self._steps, self._looks = steps, 0

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self._looks += 1
        return self._looks >= self._steps


def assert_weights_close(one: Path, other: Path) -> None:
    first = load_model(one / "model", torch.device("cpu")).model.state_dict()
    second = load_model(other / "model", torch.device("cpu")).model.state_dict()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)
