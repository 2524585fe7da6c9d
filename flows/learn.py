"""Learning a curriculum: the story from the base model to the champion.

Data first, all of it; then, for the base model and every skill: train, evaluate, gate, register.
"""

from pathlib import Path

from prefect import flow

from flows.options import open_curriculum
from schemas.base import Contract
from schemas.curriculum import Curriculum, Skill
from schemas.results import MatrixRow, RetentionMatrix, SuiteSpec, Verdict
from schemas.snapshot import Snapshot, SuiteData
from sdft.matrix import build_matrix
from tasks.basemodel import ModelDir, resolve_base_model
from tasks.elsewhere import check_deployments
from tasks.evaluation import ScoredCell, evaluate_model, suite_spec
from tasks.gating import gate_stage, references_of
from tasks.home import Home
from tasks.leases import Fence, leased
from tasks.observing import export_metrics, show_in_prefect
from tasks.orchestration import tagged
from tasks.publishing import JudgedStage, is_let_in, publish_stages, settle_registry
from tasks.reconciling import reconcile_work
from tasks.rehearsal import with_rehearsal
from tasks.reporting import Report, report_run
from tasks.stagefiles import StageInputs
from tasks.training import stage_spec, train_skill
from tasks.validation import validate_data
from tasks.watched import record_order, watch_skills


class Learned(Contract):
    """What a run of the flow gives."""

    matrix: RetentionMatrix
    verdicts: tuple[Verdict, ...]
    trained: tuple[str, ...]
    """Skills that were trained now; the others were finished before."""
    unregistered: tuple[str, ...]
    """Skills whose stages wait for MLflow: it could not be reached. The next run registers them."""
    report: Report | None
    """None where MLflow could not be reached."""


class Prepared(Contract):
    """A curriculum whose base model and data have passed their checks."""

    curriculum: Curriculum
    base: ModelDir
    data: dict[str, SuiteData]
    anchors: Snapshot | None

    def suites(self, stage: int) -> list[SuiteSpec]:
        """The suites that stage `stage` is scored on.

        Without forward transfer: the general suites, the skills so far, and the next one, whose
        gain is measured against this stage.
        """
        skills = self.curriculum.skills
        reach = len(skills) if self.curriculum.evaluation.forward_transfer else stage + 1
        chosen = (*skills[:reach], *self.curriculum.general)
        return [suite_spec(suite, self.data[suite.name].eval) for suite in chosen]


@flow(name="prepare", validate_parameters=False)
def prepare(curriculum: Curriculum, home_dir: str) -> Prepared:
    """Check the base model and every row of data before any work is spent."""
    base = resolve_base_model(curriculum.base_model, home_dir)
    validated = validate_data(curriculum, base, home_dir)
    return Prepared(
        curriculum=curriculum, base=base, data=validated.data, anchors=validated.anchors
    )


@flow(name="learn")
def learn(curriculum_file: str, home_dir: str) -> Learned:
    """Learn the skills of a curriculum one after the other; what is finished is not done again.

    A stage that is refused is registered as such, and the next one starts from its parent, unless
    a person has let it in. Another run in the same home is waited for.
    """
    curriculum, home = open_curriculum(Path(curriculum_file), Path(home_dir))
    with tagged(home.lease_key), leased(home.lease_key, curriculum.name, home) as run:
        return _learn(curriculum, run, home_dir)


def _learn(curriculum: Curriculum, run: Fence, home_dir: str) -> Learned:
    check_deployments()
    reconcile_work(home_dir)
    watched = watch_skills(curriculum, home_dir)
    curriculum = watched.curriculum
    prepared = prepare(curriculum, home_dir)
    record_order(watched, home_dir)
    settle_registry(curriculum.name, home_dir)
    name, home = curriculum.name, Home(home_dir)
    general = [suite.name for suite in curriculum.general]
    rules = {suite.name: suite.gate for suite in curriculum.suites}

    base_cells = _evaluate("base", prepared.base, prepared, 0, home_dir)
    rows = [_row(curriculum, 0, None, None, prepared.base, base_cells)]
    judged: list[JudgedStage] = []
    versions: dict[int, str] = {}
    parent = prepared.base
    for number, skill in enumerate(curriculum.skills, 1):
        knows = {one.skill: prepared.data[one.skill] for one in rows if one.passed and one.skill}
        own = prepared.data[skill.name]
        data = with_rehearsal(skill, own, knows, prepared.anchors, curriculum, prepared.base, home)
        spec = stage_spec(skill, data, parent, curriculum.seed, curriculum.runtime)
        inputs = StageInputs(curriculum=name, stage=number, data=data)
        with leased(f"{spec.key}/stage", skill.name, home):  # until others find it registered
            stage = train_skill(spec, inputs, home_dir)
            cells = _evaluate(skill.name, stage.model, prepared, number, home_dir)

            kept = [row for row in rows if row.passed]
            kept[-1] = _scored_on(skill, kept[-1], parent, prepared, home_dir)
            row = _row(curriculum, number, skill.name, kept[-1].stage, stage.model, cells)
            verdict = gate_stage(row, kept, rules, general, home_dir)
            judged.append(
                JudgedStage(
                    trained=stage,
                    cells=cells,
                    verdict=verdict,
                    references=references_of(verdict, kept, home),
                    parent_stage=kept[-1].stage,
                )
            )
            versions = publish_stages(name, judged, versions, run, home_dir)

        let_in = is_let_in(home, name, spec.key, verdict)
        rows.append(row.model_copy(update={"passed": let_in, "decision": verdict.decision}))
        export_metrics(curriculum, judged, home_dir)
        if let_in:
            parent = stage.model

    rows = [row.model_copy(update={"version": versions.get(row.stage)}) for row in rows]
    skills = [skill.name for skill in curriculum.skills]
    matrix = build_matrix(name, skills, general, rows)
    general_items = [prepared.data[one].eval for one in general]
    missing = [one.trained.skill for one in judged if one.trained.stage not in versions]
    report = None
    if not missing:
        trained = [one.trained for one in judged]
        report = report_run(curriculum, matrix, trained, base_cells, general_items, home_dir)
    verdicts = [one.verdict for one in judged]
    show_in_prefect(matrix, verdicts, report, home_dir)
    return Learned(
        matrix=matrix,
        verdicts=tuple(verdicts),
        trained=tuple(one.trained.skill for one in judged if one.trained.trained_now),
        unregistered=tuple(missing),
        report=report,
    )


def _evaluate(
    label: str, model: ModelDir, prepared: Prepared, stage: int, home_dir: str
) -> dict[str, ScoredCell]:
    suites, asked = prepared.suites(stage), prepared.curriculum
    return evaluate_model(label, model, suites, asked.evaluation, asked.runtime, home_dir)


def _scored_on(
    skill: Skill, row: MatrixRow, model: ModelDir, prepared: Prepared, home_dir: str
) -> MatrixRow:
    """The parent's row with its score on the new skill, which a refusal between can leave out."""
    asked = prepared.curriculum
    column = asked.skills.index(skill)
    if row.cells[column] is not None:
        return row
    suite = suite_spec(skill, prepared.data[skill.name].eval)
    label = row.skill or "base"
    scored = evaluate_model(label, model, [suite], asked.evaluation, asked.runtime, home_dir)
    cells = [*row.cells]
    cells[column] = scored[skill.name].cell
    return row.model_copy(update={"cells": tuple(cells)})


def _row(
    curriculum: Curriculum,
    stage: int,
    skill: str | None,
    parent_stage: int | None,
    model: ModelDir,
    cells: dict[str, ScoredCell],
) -> MatrixRow:
    """A matrix row before its verdict; only the base model has passed by itself."""
    scored = [cells.get(suite.name) for suite in curriculum.suites]
    return MatrixRow(
        stage=stage,
        skill=skill,
        parent_stage=parent_stage,
        model_hash=model.model_hash,
        passed=skill is None,
        version=None,
        cells=tuple(one.cell if one else None for one in scored),
    )
