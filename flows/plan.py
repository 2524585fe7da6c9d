"""What a run would do: the flow's decisions without its work."""

from typing import Literal

from flows.learn import Prepared, prepare
from schemas.base import Contract
from schemas.curriculum import Curriculum, Suite
from schemas.results import EvaluationSpec, Verdict
from schemas.settings import GateSettings
from schemas.snapshot import SuiteData
from schemas.watched import Remark
from sdft.record import library_versions
from sdft.schedule import total_steps
from tasks.basemodel import ModelDir, stage_model
from tasks.evaluation import suite_spec
from tasks.home import Home
from tasks.rehearsal import with_rehearsal
from tasks.seen import known_record
from tasks.stagefiles import check_name, finished_dir
from tasks.training import stage_spec
from tasks.verdicts import standing_verdict
from tasks.watched import watch

Action = Literal["reused", "judged anew", "learned", "open"]
"""`judged anew`: the model is there, but no verdict on it by these rules on these items. `open`:
reused or learned, which hangs on a verdict that is still to be made."""


class PlannedStage(Contract):
    """One stage of a plan."""

    skill: str
    demonstrations: int
    items: int
    steps: int
    action: Action
    watched: Literal["recorded", "new"] | None
    """For a skill from the watched folder: whether its place in the order is written down."""


class Plan(Contract):
    """All stages of a curriculum, after its data have passed their checks."""

    curriculum: str
    base_path: str
    base_hash: str
    stages: tuple[PlannedStage, ...]
    remarks: tuple[Remark, ...]
    """On directories of the watched folder that are not taken, or not as they are now."""


def plan_curriculum(curriculum: Curriculum, home: Home) -> Plan:
    """The plan; a stage after one that is still to be learned is to be learned as well."""
    watched = watch(curriculum, home)
    curriculum = watched.curriculum
    prepared = prepare(curriculum, str(home.root))
    parent = prepared.base
    kept: list[Suite] = []
    knows: dict[str, SuiteData] = {}
    """What stages learn again; of one whose verdict is open we take it that it passes."""
    stages: list[PlannedStage] = []
    action: Action = "reused"
    for number, skill in enumerate(curriculum.skills, 1):
        own = prepared.data[skill.name]
        data = with_rehearsal(skill, own, knows, prepared.anchors, curriculum, prepared.base, home)
        assert data.train is not None
        spec = stage_spec(skill, data, parent, curriculum.seed, curriculum.runtime)
        directory = finished_dir(home, spec)
        record = known_record(directory) if action == "reused" else None
        if action == "judged anew":
            action = "open"
        elif action == "reused" and record is None:
            action = "learned"
        refused = False
        if record is not None:
            check_name(record, spec)
            model = stage_model(directory, record)
            judged_on = [skill, *kept, *curriculum.general]
            rules = _rules(model, judged_on, curriculum, prepared)
            standing = standing_verdict(home, curriculum.name, spec.key)
            if standing is None or not _stands(standing.verdict, number, rules):
                action = "judged anew"
            elif standing.let_in:
                parent = model
                kept.append(skill)
            else:
                refused = True
        if not refused:
            knows[skill.name] = prepared.data[skill.name]
        stages.append(
            PlannedStage(
                skill=skill.name,
                demonstrations=data.train.rows,
                items=data.eval.rows,
                steps=total_steps(skill.training, data.train.rows),
                action=action,
                watched=watched.state.get(skill.name),
            )
        )
    return Plan(
        curriculum=curriculum.name,
        base_path=prepared.base.path,
        base_hash=prepared.base.model_hash,
        stages=tuple(stages),
        remarks=watched.remarks,
    )


Rules = dict[str, tuple[GateSettings, str | None]]
"""By suite, the new skill's first: the gate's settings, and the fingerprint of what it looks at."""


def _rules(
    model: ModelDir, suites: list[Suite], curriculum: Curriculum, prepared: Prepared
) -> Rules:
    """What a verdict on a model would be made by."""
    spec = EvaluationSpec(
        model_dir=model.path,
        model_hash=model.model_hash,
        template_hash=model.template_hash,
        suites=(),
        settings=curriculum.evaluation,
        libraries=library_versions(),
    )
    return {
        suite.name: (
            suite.gate,
            spec.fingerprint(suite_spec(suite, prepared.data[suite.name].eval)),
        )
        for suite in suites
    }


def _stands(verdict: Verdict, stage: int, rules: Rules) -> bool:
    """Whether the gate would come to this verdict again."""
    made_by: Rules = {
        one.suite: (one.settings, one.candidate_cell and one.candidate_cell.fingerprint)
        for one in verdict.judgements
    }
    return verdict.stage == stage and [*made_by.items()] == [*rules.items()]
