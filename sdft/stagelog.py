"""What a running stage writes for others to read: metrics as JSON lines, rollouts as Parquet."""

import json
import time
from pathlib import Path

import pyarrow as pa

from schemas.data import ROLLOUT_SCHEMA
from schemas.stage import StepMetrics
from sdft.data import write_table

METRICS = "metrics.jsonl"


class StageLog:
    """metrics.jsonl holds every step once, also when steps are repeated after a resume."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rollouts: list[dict[str, object]] = []
        path = directory / METRICS
        lines, torn = read_metrics(path)
        if torn:  # a kill in the middle of a line
            path.write_text("".join(line.model_dump_json() + "\n" for line in lines))
        self._last_step = lines[-1].step if lines else 0
        self._file = path.open("a", encoding="utf-8")
        (directory / "rollouts").mkdir(exist_ok=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if step > self._last_step:
            line = StepMetrics(step=step, time_ms=time.time_ns() // 10**6, metrics=metrics)
            self._file.write(line.model_dump_json() + "\n")
            self._file.flush()
            self._last_step = step

    def rollout(self, **row: object) -> None:
        self._rollouts.append(row)

    def flush_rollouts(self, step: int) -> None:
        """Write the rollouts since the last flush to rollouts/step-N.parquet."""
        if self._rollouts:
            table = pa.Table.from_pylist(self._rollouts, schema=ROLLOUT_SCHEMA)
            write_table(table, self._directory / "rollouts" / f"step-{step:06d}.parquet")
            self._rollouts = []


def read_metrics(path: Path) -> tuple[list[StepMetrics], bool]:
    """The complete lines of a metrics file, and whether an incomplete one follows them."""
    if not path.is_file():
        return [], False
    *whole, rest = path.read_bytes().split(b"\n")
    return [StepMetrics.model_validate(json.loads(line)) for line in whole], bool(rest)
