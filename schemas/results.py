"""What evaluation and the gate give: cells, rows and the matrix, and verdicts."""

from typing import Literal

from pydantic import ConfigDict

from schemas.base import Contract
from schemas.curriculum import Scorer
from schemas.digest import digest_json
from schemas.settings import EvaluationSettings

SCORING_VERSION = 1
"""Raised whenever the same completion would get another score; part of every fingerprint."""


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
        return digest_json({"model": self.model_hash, "fingerprint": self.fingerprint(suite)})


class Cell(Contract):
    """One model's score on one suite; the items behind it lie in items.parquet beside it."""

    model_config = ConfigDict(allow_inf_nan=True)  # the gate refuses what is no score, with a name

    model_hash: str
    suite_hash: str
    fingerprint: str
    items: int
    scored: int
    errors: int
    """Items whose answer could not be made or scored; they count as 0 in `score`."""
    score: float
    interval: tuple[float, float]
    """95% Wilson interval of `score`."""
    seconds: float


Role = Literal["new skill", "earlier skill", "general"]


class SuiteJudgement(Contract):
    """One line of a verdict."""

    suite: str
    role: Role
    reference_stage: int
    reference: float | None
    candidate: float | None
    change: float | None
    limit: float
    passed: bool
    reason: str


class Verdict(Contract):
    """The gate's decision on one stage, with every number that it used."""

    stage: int
    skill: str
    passed: bool
    judgements: tuple[SuiteJudgement, ...]
    fingerprints: dict[str, tuple[str | None, str | None]]
    """Per suite: the reference cell's and the candidate cell's."""

    @property
    def reasons(self) -> list[str]:
        """Why it was refused: one line a suite; empty when it passed."""
        return [f"{one.suite}: {one.reason}" for one in self.judgements if not one.passed]


class MatrixRow(Contract):
    """One stage in the retention matrix; `cells` in the order of the matrix's suites."""

    stage: int
    skill: str | None
    parent_stage: int | None
    model_hash: str
    passed: bool
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
