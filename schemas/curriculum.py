"""The curriculum file: base model, ordered skills, general suites and settings."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from schemas.base import Contract
from schemas.names import SafeName
from schemas.settings import EvaluationSettings, GateSettings, RuntimeSettings, TrainingSettings
from schemas.yamlfile import named, read_yaml

Scorer = Literal["exact_match", "contains", "regex", "tool_call"]
HUB, S3 = "hub:", "s3://"
INHERITED: dict[str, type[Contract]] = {"training": TrainingSettings, "gate": GateSettings}
"""Settings of the curriculum that a skill can change for itself; a general suite only `gate`."""


class DataSource(Contract):
    """Rows in a file, in a saved `datasets` directory, or on the Hugging Face hub.

    In YAML either a plain path or this mapping. `columns` maps our column to the file's, such as
    `{prompt: question, response: answer}`.
    """

    path: str
    """A .jsonl, .json, .csv or .parquet file, a `datasets` directory, or hub:org/name."""
    columns: dict[str, str] = {}
    split: str = "train"
    """Only for directories and the hub."""
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _hub_is_pinned(self) -> Self:
        if self.path.startswith(HUB) and not self.revision:
            raise ValueError(f"{self.path} needs a revision, so that the data cannot change")
        return self

    def under(self, folder: Path) -> Self:
        """The same source with a relative path made absolute from `folder`."""
        if self.path.startswith(HUB):
            return self
        return self.model_copy(update={"path": str((folder / self.path).resolve())})


class Suite(Contract):
    """Evaluation items and how a completion is scored against their references."""

    name: SafeName
    eval: DataSource
    scorer: Scorer = "exact_match"
    gate: GateSettings = GateSettings()
    """In YAML only what differs from the curriculum's own `gate`."""


class Skill(Suite):
    """A suite with demonstrations to learn it from."""

    train: DataSource
    allow_overlap: bool = False
    """Knowledge is asked as it was taught: let its own evaluation repeat training prompts."""
    training: TrainingSettings = TrainingSettings()
    """In YAML only what differs from the curriculum's own `training`."""

    def under(self, folder: Path) -> Self:
        """The same skill with relative paths made absolute from `folder`."""
        paths = {"train": self.train.under(folder), "eval": self.eval.under(folder)}
        return self.model_copy(update=paths)


class Curriculum(Contract):
    """What is to be learned, in which order, from which data, judged by what."""

    name: SafeName
    base_model: str
    """A model directory, a .gguf file, or hub:org/name@revision."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    skills_from: str | None = None
    """A folder or s3://bucket/prefix that is looked at for further skills at each run: directories
    with data, a skill.yaml and, last, a file COMPLETE (`schemas.watched`)."""
    skills: Annotated[tuple[Skill, ...], Field(validate_default=True)] = ()
    general: tuple[Suite, ...] = ()
    rehearsal: Annotated[float, Field(ge=0.0, le=1.0, exclude_if=lambda share: not share)] = 0.0
    """Each stage learns so many demonstrations of the skills before it again, as a share of its
    own: rows of the skills that the gate has let in, from each as many as from the others."""
    anchors: Annotated[DataSource | None, Field(exclude_if=lambda one: one is None)] = None
    """Prompts of no skill, without answers: each stage learns to go on answering them as its
    teacher does without a demonstration. Only for SDFT."""
    training: TrainingSettings = TrainingSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    on_invalid: Literal["fail", "continue"] = "fail"
    """`continue` learns from the rows that passed; the others are in the quarantine file."""

    @model_validator(mode="before")
    @classmethod
    def _suites_inherit(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        shared = {key: value[key] for key in INHERITED if _is_sound(key, value.get(key))}
        inherited = {
            kind: [_inherit(suite, shared, keys) for suite in value[kind]]
            for kind, keys in (("skills", [*INHERITED]), ("general", ["gate"]))
            if isinstance(value.get(kind), list)
        }
        return value | inherited

    @field_serializer("skills", mode="wrap")
    def _what_is_turned_off_stays_off(
        self, value: tuple[Skill, ...], dump: SerializerFunctionWrapHandler
    ) -> Any:
        """Settings leave out `lora` where there is none, and the curriculum's would be inherited
        when the dump is read."""
        skills = dump(value)
        if self.training.lora is not None:
            for skill in skills:
                skill["training"].setdefault("lora", None)
        return skills

    @field_validator("skills_from")
    @classmethod
    def _no_key_in_the_address(cls, value: str | None) -> str | None:
        if value and "://" in value and (not value.startswith(S3) or "@" in value):
            raise ValueError(
                "must be a folder or s3://bucket/prefix; keys belong into the environment "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        return value

    @field_validator("skills")
    @classmethod
    def _there_is_something_to_learn(
        cls, value: tuple[Skill, ...], info: ValidationInfo
    ) -> tuple[Skill, ...]:
        if not value and not info.data.get("skills_from"):
            raise ValueError("there must be at least 1 skill, or skills_from")
        return value

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        seen: set[str] = set()
        for suite in self.suites:
            if suite.name in seen:
                raise ValueError(f"two skills or general suites are named {suite.name!r}")
            seen.add(suite.name)
        return self

    @property
    def suites(self) -> tuple[Suite, ...]:
        """The columns of the retention matrix: the skills in order, then the general suites."""
        return (*self.skills, *self.general)

    def problem_with(self, skill: Skill) -> str | None:
        """Why a skill cannot be learned beside what all stages learn; None where it can."""
        if self.anchors is None or skill.training.method == "sdft":
            return None
        return (
            f"anchors: the skill {skill.name} is learned by {skill.training.method}, which has no "
            "teacher whose answers could be kept; use method sdft or leave anchors out"
        )

    def under(self, folder: Path) -> Self:
        """The same curriculum with every relative path made absolute from `folder`."""
        base, watched = self.base_model, self.skills_from
        if watched and not watched.startswith(S3):
            watched = str((folder / watched).resolve())
        return self.model_copy(
            update={
                "skills_from": watched,
                "base_model": base if base.startswith(HUB) else str((folder / base).resolve()),
                "skills": tuple(skill.under(folder) for skill in self.skills),
                "anchors": self.anchors and self.anchors.under(folder),
                "general": tuple(
                    suite.model_copy(update={"eval": suite.eval.under(folder)})
                    for suite in self.general
                ),
            }
        )


def _is_sound(key: str, settings: Any) -> bool:
    """Whether settings can be inherited; a mistake in them is reported once, where it stands."""
    try:
        INHERITED[key].model_validate(settings)
    except ValidationError:
        return False
    return True


def _inherit(suite: Any, shared: dict[str, Any], keys: list[str]) -> Any:
    if not isinstance(suite, dict):
        return suite
    return {**suite, **{key: _over(shared.get(key, {}), suite.get(key, {})) for key in keys}}


def _over(shared: Any, own: Any) -> Any:
    """A mapping with what it does not say taken from another one; what is no mapping stands."""
    if not (isinstance(shared, dict) and isinstance(own, dict)):
        return own
    return {**shared, **{key: _over(shared.get(key), value) for key, value in own.items()}}


def load_curriculum(path: Path) -> Curriculum:
    """Read and check a curriculum file; relative paths in it start at the file's folder.

    Raises BadInput with file, line and field of everything that is wrong.
    """
    content, lines = read_yaml(path, "name, base_model and skills")
    with named(path, lines):
        return Curriculum.model_validate(content).under(path.parent)


def load_skill(path: Path, name: str, curriculum: Curriculum) -> Skill:
    """Read and check the file of one skill, with what it inherits from a curriculum.

    Its `name` may be left out. Raises BadInput as `load_curriculum` does.
    """
    content, lines = read_yaml(path, "train and eval")
    shared = {key: getattr(curriculum, key).model_dump() for key in INHERITED}
    whole = {"name": name, **_inherit(content, shared, [*INHERITED])}
    with named(path, lines):
        return Skill.model_validate(whole)
