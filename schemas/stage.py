"""One stage of training: what goes in, its identity, and the record of what came out."""

from typing import Annotated

from pydantic import Field, field_validator

from schemas.base import Contract, Sealed
from schemas.digest import digest_json
from schemas.settings import RuntimeSettings, TrainingSettings

ALGORITHM_VERSION = 3
"""Raised whenever the same inputs would train to other weights; part of every stage key. 2: a fused
optimizer, shared prefixes and packed weights round otherwise; no dropout. 3: so do a frozen
teacher's prompts that are kept over epochs."""

EXIT_OK, EXIT_ERROR, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 75
"""How the trainer and the evaluator end; EXIT_STOPPED: a signal, after a checkpoint."""


class StageSpec(Contract):
    """All that `sdft.train` needs; paths say where, hashes say what."""

    skill: str
    parent_dir: str
    parent_hash: str
    train_file: str
    data_hash: str
    seed: int
    training: TrainingSettings
    runtime: RuntimeSettings

    @property
    def key(self) -> str:
        """The stage's identity: sha256 over everything that changes the resulting weights."""
        return digest_json(
            {
                "algorithm_version": ALGORITHM_VERSION,
                "parent": self.parent_hash,
                "data": self.data_hash,
                "seed": self.seed,
                "training": self.training.model_dump(),
            }
        )


class FileDigest(Contract):
    """A file of a finished directory, by its path inside it."""

    path: str
    size_bytes: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        """Lists come from elsewhere, and files are written where they say."""
        if "\0" in value or not {"", ".", ".."}.isdisjoint(value.split("/")):
            raise ValueError(f"{value!r} is no path of a file inside its directory")
        return value


class StageRecord(Sealed):
    """Written last into a stage directory: the stage is finished, and this is what it holds."""

    key: str
    spec: StageSpec
    model_hash: str
    files: tuple[FileDigest, ...]
    """Of model/."""
    adapter: Annotated[tuple[FileDigest, ...], Field(exclude_if=lambda files: not files)] = ()
    """Of adapter/, where adapters were trained: model/ is the parent with it added."""
    logs: tuple[FileDigest, ...]
    """The curve and the rollouts."""
    steps: int
    train_seconds: float
    """Of the process that ended the stage; one that went on from a checkpoint has a part of it."""
    checkpoint_seconds: float
    """What saving took of them."""
    peak_memory_bytes: int
    code_version: str
    environment: dict[str, str]


class StepMetrics(Contract):
    """One line of metrics.jsonl."""

    step: int
    time_ms: int
    """Milliseconds since the epoch, written once; the trackers' timestamp, so that a line that is
    relayed twice is the same point."""
    metrics: dict[str, float]
