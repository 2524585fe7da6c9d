"""What a running stage writes for others to read: metrics as JSON lines, rollouts as Parquet."""

import os
import time
from pathlib import Path

import pyarrow as pa

from schemas.base import write_atomically
from schemas.data import ROLLOUT_SCHEMA
from schemas.stage import StepMetrics
from sdft.data import write_table
from sdft.files import disk_errors

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts"


class StageLog:
    """metrics.jsonl holds every step once: it begins with `known`, the lines of the checkpoint.

    What a killed run wrote after its last checkpoint is cut off, for those steps are run again.
    Nothing is kept open, so a process whose directory was taken over has no way to write into it.
    Of several ranks one `writes`, the others only know the curve.
    """

    def __init__(self, directory: Path, known: bytes, writes: bool = True) -> None:
        self._directory, self._writes = directory, writes
        self._lines = bytearray(known)
        self._rollouts: list[dict[str, object]] = []
        if not writes:
            return
        write_atomically(directory / METRICS, known.decode())
        (directory / ROLLOUTS).mkdir(exist_ok=True)
        last = _rollouts_file(known.count(b"\n"))
        for path in (directory / ROLLOUTS).iterdir():
            if path.name > last or path.name.startswith("."):  # one that was not written to its end
                path.unlink()

    @property
    def lines(self) -> bytes:
        """All of metrics.jsonl."""
        return bytes(self._lines)

    @property
    def curve(self) -> list[StepMetrics]:
        return _parsed(self.lines)

    def step(self, step: int, metrics: dict[str, float]) -> StepMetrics:
        """Write a step's line; returns it."""
        line = StepMetrics(step=step, time_ms=time.time_ns() // 10**6, metrics=metrics)
        text = f"{line.model_dump_json()}\n".encode()
        path = self._directory / METRICS
        if self._writes:
            with disk_errors(path), path.open("r+b") as file:  # never makes the file anew
                file.seek(len(self._lines))
                file.write(text)
        self._lines += text
        return line

    def rollout(self, row: dict[str, object]) -> None:
        if self._writes:
            self._rollouts.append(row)

    def flush_rollouts(self, step: int) -> None:
        """Write the rollouts since the last flush to rollouts/step-N.parquet."""
        if self._rollouts:
            table = pa.Table.from_pylist(self._rollouts, schema=ROLLOUT_SCHEMA)
            write_table(table, self._directory / ROLLOUTS / _rollouts_file(step))
            self._rollouts = []


def _rollouts_file(step: int) -> str:
    return f"step-{step:06d}.parquet"


class MetricsReader:
    """Follows a metrics file: each step once, also where a resumed trainer began it anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = 0
        self._place = 0
        self.latest: StepMetrics | None = None

    @property
    def step(self) -> int:
        return self.latest.step if self.latest else 0

    def new(self) -> list[StepMetrics]:
        """The steps that were completed since the last call."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            if (number := os.fstat(file.fileno()).st_ino) != self._file:
                self._file, self._place = number, 0
            file.seek(self._place)
            whole, end, _ = file.read().rpartition(b"\n")
        self._place += len(whole) + len(end)
        fresh = [line for line in _parsed(whole) if line.step > self.step]
        self.latest = fresh[-1] if fresh else self.latest
        return fresh


def read_metrics(path: Path) -> list[StepMetrics]:
    """The complete lines of a metrics file; one that is just being written is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return _parsed(whole)


def _parsed(lines: bytes) -> list[StepMetrics]:
    return [StepMetrics.model_validate_json(line) for line in lines.split(b"\n") if line]
