"""What evaluation and the gate give: items and cells, verdicts, rows and the matrix."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import ConfigDict

from schemas.base import Contract, Sealed
from schemas.curriculum import Scorer
from schemas.digest import digest_json, digest_text
from schemas.settings import EvaluationSettings, GateSettings
from schemas.templates import Message

SCORING_VERSION = 2
"""Raised whenever the same completion would get another score, or a cell has another form; part of
every fingerprint. 2: items that are invalid or were not run are counted apart from errors."""


class SuiteSpec(Contract):
    """A suite ready to be answered: canonical items and their hash."""

    name: str
    file: str
    suite_hash: str
    scorer: Scorer


class EvaluationSpec(Contract):
    """All that `sdft.evaluate` needs: one model and the suites it has not answered yet."""

    model_dir: str
    model_hash: str
    template_hash: str
    """sha256 of the chat template: other words around a prompt give other scores."""
    suites: tuple[SuiteSpec, ...]
    settings: EvaluationSettings
    device: Literal["auto", "cpu", "cuda"] = "auto"
    libraries: dict[str, str]

    def fingerprint(self, suite: SuiteSpec) -> str:
        """What two cells must share to be comparable (all but the model's weights)."""
        return digest_json(
            {
                "scoring_version": SCORING_VERSION,
                "suite": suite.suite_hash,
                "scorer": suite.scorer,
                "max_new_tokens": self.settings.max_new_tokens,
                "template": self.template_hash,
                "libraries": self.libraries,
            }
        )

    def cell_key(self, suite: SuiteSpec) -> str:
        return cell_key(self.model_hash, self.fingerprint(suite))


def cell_key(model_hash: str, fingerprint: str) -> str:
    """The name of a cell's directory."""
    return digest_json({"model": model_hash, "fingerprint": fingerprint})


Status = Literal["scored", "error", "invalid", "unrun"]
"""What became of an item: it has a score, which may be 0; answering or scoring it went wrong; it
cannot be asked or scored as it is; the suite has it, but no answer was made."""


@dataclass(frozen=True)
class ItemResult:
    """What the gate looks at of a row of items.parquet; it trusts none of it."""

    id: str
    status: str
    score: float | None


class Cell(Contract):
    """One model's score on one suite; the items behind it lie in items.parquet beside it."""

    model_config = ConfigDict(allow_inf_nan=True)  # the gate refuses what is no score, with a name

    model_hash: str
    suite_hash: str
    fingerprint: str
    items: int
    scored: int
    errors: int
    invalid: int
    unrun: int
    score: float
    """Share of right answers among all items: what is not scored counts as wrong."""
    interval: tuple[float, float]
    """95% Wilson interval of `score`."""
    items_sha256: str
    """Of the bytes of items.parquet."""
    seconds: float

    @property
    def key(self) -> str:
        return cell_key(self.model_hash, self.fingerprint)


class CellFile(Sealed):
    """A cell as it lies beside its items."""

    cell: Cell


class CellEvidence(Contract):
    """What a verdict keeps of a cell beside its score."""

    items: int
    scored: int
    errors: int
    invalid: int
    unrun: int
    fingerprint: str
    items_sha256: str


Role = Literal["new skill", "earlier skill", "general"]
Decision = Literal["pass", "refuse", "ask"]
"""`ask` needs a person; until then the stage has not passed."""


class SuiteJudgement(Contract):
    """One line of a verdict."""

    suite: str
    role: Role
    decision: Decision
    reason: str
    reference_stage: int
    reference: float | None
    """The reference's score; None where it is missing or no score."""
    candidate: float | None
    pairs: int | None
    """Items that both answered; None, as all up to `p_value`, where the two are not comparable."""
    gained: int | None
    """Items that were wrong before and are right now."""
    lost: int | None
    change: float | None
    lower: float | None
    """One-sided confidence bounds of the change, each by itself (`sdft.paired`)."""
    upper: float | None
    p_value: float | None
    """Chance of so clear a gain (new skill) or loss (the others) if nothing had changed."""
    limit: float
    """What the change, or with proof "bound" its lower bound, must reach."""
    settings: GateSettings
    reference_cell: CellEvidence | None
    candidate_cell: CellEvidence | None


class Verdict(Contract):
    """The gate's decision on one stage, with every number that it used."""

    stage: int
    skill: str
    decision: Decision
    """The strictest of the judgements': refuse before ask before pass."""
    candidate_hash: str
    """The candidate's model hash."""
    parent_hash: str
    judgements: tuple[SuiteJudgement, ...]
    """The new skill's first."""

    @property
    def passed(self) -> bool:
        return self.decision == "pass"

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass: one line a suite; empty when it passed."""
        return [f"{one.suite}: {one.reason}" for one in self.judgements if one.decision != "pass"]

    @property
    def digest(self) -> str:
        """sha256 of the whole document."""
        return digest_text(self.text)


class MatrixRow(Contract):
    """One stage in the retention matrix; `cells` in the order of the matrix's suites."""

    stage: int
    skill: str | None
    parent_stage: int | None
    model_hash: str
    passed: bool
    """Whether the next stage starts from this one."""
    decision: Decision | None = None
    """The gate's; None for the base model, which is not judged."""
    version: str | None
    cells: tuple[Cell | None, ...]


class Measures(Contract):
    """The measures of `sdft.retention` over the stages that passed; None where undefined."""

    average: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    general_forgetting: float | None


class RetentionMatrix(Contract):
    """Every stage's score on every suite: the skills in order, then the general suites."""

    curriculum: str
    skills: tuple[str, ...]
    general: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    measures: Measures

    @property
    def suites(self) -> tuple[str, ...]:
        return (*self.skills, *self.general)


class Answer(Contract):
    """What a model answered to an item of a suite."""

    id: str
    prompt: tuple[Message, ...]
    """Chat messages."""
    references: tuple[str, ...]
    status: Status
    answer: str | None
    error: str | None
    """Why it is not scored."""
    right: bool
    """Whether its score is 1: what is not scored counts as wrong."""
    reference_answer: str | None = None
    """What the model answered that the gate held this one against."""
    reference_right: bool | None = None


class Answers(Contract):
    """A version's answers to a suite, in the order of its items."""

    name: str
    version: str
    suite: str
    reference_stage: int | None
    """Of whom `reference_answer` is, 0 for the base model; None where the gate compared nothing."""
    items: int
    wrong: int
    reference_wrong: int | None
    answers: tuple[Answer, ...]
    """To all items, or the wrong ones."""

    def only_wrong(self) -> Self:
        return self.model_copy(
            update={"answers": tuple(one for one in self.answers if not one.right)}
        )
