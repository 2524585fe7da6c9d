"""What is in a model: the base and every stage on it, with data, settings, code and verdict."""

from pydantic import JsonValue

from schemas.base import Contract
from schemas.ledger import Entry
from schemas.stage import FileDigest


class DataFacts(Contract):
    """The demonstrations of a stage."""

    source: str
    rows: int
    quarantined: int
    rehearsed: dict[str, int]
    """How many of the rows are of earlier skills, by skill."""
    anchors: int
    """How many of the rows are prompts of no skill, to be answered as before."""
    data_hash: str
    rules: int
    """Expectations that were checked."""
    rules_met: int


class LineageStage(Contract):
    """One stage on the way to a model."""

    version: str
    stage: int
    skill: str
    parent_version: str | None
    parent_hash: str
    model_hash: str
    stage_key: str
    files: tuple[FileDigest, ...]
    """The model directory that the trainer wrote."""
    data: DataFacts
    settings: dict[str, JsonValue]
    """Everything that decides the weights: training settings and seed."""
    steps: int
    train_seconds: float
    code_version: str
    environment: dict[str, str]
    run_id: str
    run_link: str
    started: str
    ended: str
    """When the run was made and when it ended; UTC, ISO 8601."""
    scores: dict[str, float]
    """By suite."""
    decision: str
    history: tuple[Entry, ...]
    """The ledger's entries about this version."""


class Lineage(Contract):
    """The whole story of a version."""

    name: str
    version: str
    aliases: tuple[str, ...]
    base_path: str
    base_hash: str
    stages: tuple[LineageStage, ...]
    """From the base model on; the last one is the version itself."""


class SettingChange(Contract):
    """A setting that differs; None where a side does not have it."""

    before: JsonValue
    after: JsonValue


class SkillChange(Contract):
    """A skill that both versions were given, from other data or with other settings."""

    skill: str
    rows_added: tuple[str, ...]
    rows_removed: tuple[str, ...]
    """Row hashes."""
    settings: dict[str, SettingChange]


class LineageDiff(Contract):
    """What changed from one version to another."""

    before: str
    after: str
    base_changed: bool
    skills_added: tuple[str, ...]
    skills_removed: tuple[str, ...]
    skills_changed: tuple[SkillChange, ...]
    scores: dict[str, float]
    """By suite: score of `after` minus that of `before`."""


BASE_MODEL = "base model"
"""What `Trace.found` says of a base model."""


class Trace(Contract):
    """Where something that was looked for went."""

    name: str
    version: str
    skill: str
    """The skill through which it came in; for a base model, the first one learned on it."""
    came_with: str
    """The version whose stage learned it; `version` is this one or built on it."""
    found: str
    aliases: tuple[str, ...]


class Unread(Contract):
    """A version that may hold what was looked for, and so may all that are built on it."""

    name: str
    version: str
    reason: str
    """Why it could not be looked at."""


class Traces(Contract):
    """The answer of a trace; complete only where nothing is unread."""

    found: tuple[Trace, ...]
    unread: tuple[Unread, ...]
