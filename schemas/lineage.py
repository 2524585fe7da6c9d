"""What is in a model: the base and every stage on it, with data, settings, code and verdict."""

from pydantic import JsonValue

from schemas.base import Contract
from schemas.ledger import Entry
from schemas.snapshot import AnchorsOrigin, Origin
from schemas.stage import FileDigest


class DataFacts(Contract):
    """What a stage learned from: rows of its skill, then of earlier ones again, then anchors."""

    source: str
    """Of the skill's own rows."""
    rows: int
    """All of them."""
    quarantined: int
    rehearsed: dict[str, int]
    """How many of the rows are of earlier skills, by skill."""
    anchors: int
    """How many of the rows are prompts of no skill, to be answered as before."""
    data_hash: str
    """Of all rows."""
    own_hash: str = ""
    """Of the skill's own; empty where they were mixed with others and it was not kept."""
    rehearsed_from: dict[str, Origin] = {}
    anchors_from: AnchorsOrigin | None = None
    """Where these rows are from; it was not always kept."""
    rules: int
    """Expectations that were checked of the skill's own rows."""
    rules_met: int

    @property
    def own(self) -> int:
        """How many of the rows are the skill's own."""
        return self.rows - sum(self.rehearsed.values()) - self.anchors


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
    """The ledger's entries about this version, and rollbacks that took it away: those are about
    the version that they put back."""


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


class RowChange(Contract):
    """Row hashes that only one side has."""

    added: tuple[str, ...]
    removed: tuple[str, ...]


class SkillChange(Contract):
    """A skill that both versions were given, from other data or with other settings."""

    skill: str
    rows_added: tuple[str, ...]
    rows_removed: tuple[str, ...]
    """Hashes of its own rows."""
    learned_again: dict[str, RowChange]
    """By earlier skill, where its rows in this skill's stage are others."""
    anchors: RowChange | None
    """None where they are the same."""
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
    """The skill that it is of; for a base model, the first one learned on it; empty for anchors."""
    learned_with: str
    """The skill whose stage learned it: another one for rows learned again, and for anchors."""
    came_with: str
    """The version of that stage; `version` is this one or built on it."""
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
