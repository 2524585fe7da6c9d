"""What a run would do: the flow's decisions without its work, and without Prefect."""

from typing import Literal

from flows.learn import Prepared
from schemas.base import BadInput, Contract
from schemas.curriculum import Curriculum, Suite
from schemas.results import Verdict
from schemas.settings import GateSettings, RuntimeSettings
from schemas.snapshot import SuiteData
from schemas.stage import StageSpec
from schemas.watched import Remark
from sdft.schedule import short_of_steps, total_steps
from tasks.basemodel import ModelDir, resolve_base_model, stage_model
from tasks.elsewhere import TRAIN, deployment
from tasks.evaluation import evaluation_spec, suite_spec
from tasks.home import Home
from tasks.placement import has_gpu
from tasks.rehearsal import with_rehearsal
from tasks.seen import known_record
from tasks.stagefiles import check_name, finished_dir
from tasks.training import stage_spec
from tasks.validation import validate_data
from tasks.verdicts import StandingVerdict, standing_verdict
from tasks.watched import watch

Action = Literal["reused", "judged anew", "learned", "open"]
"""`judged anew`: the model is there, but no verdict on it by these rules on these items. `open`:
reused or learned, which hangs on a verdict that is still to be made."""

Rules = dict[str, tuple[GateSettings, str | None]]
"""By suite, the new skill's first: the gate's settings, and the fingerprint of what it looks at."""


class PlannedStage(Contract):
    """One stage of a plan."""

    skill: str
    demonstrations: int
    """The skill's own rows."""
    rehearsed: int
    """Rows of earlier skills that it learns again."""
    anchors: int
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
    """On directories of the watched folder that are not taken, or not as they are now, and on
    stages that would be learned and learn little."""


def plan_curriculum(curriculum: Curriculum, home: Home) -> Plan:
    """The plan; a stage after one that is still to be learned is to be learned as well.

    Raises BadInput also where a stage asks for a GPU and would be trained here, without one.
    """
    watched = watch(curriculum, home)
    curriculum, remarks = watched.curriculum, [*watched.remarks]
    base = resolve_base_model.fn(curriculum.base_model, str(home.root))
    validated = validate_data.fn(curriculum, base, str(home.root))
    prepared = Prepared(
        curriculum=curriculum, base=base, data=validated.data, anchors=validated.anchors
    )
    parent = prepared.base
    kept: list[Suite] = []
    knows: dict[str, SuiteData] = {}
    """What stages learn again; of one whose verdict is open we take it that it passes."""
    stages: list[PlannedStage] = []
    action: Action = "reused"
    for number, skill in enumerate(curriculum.skills, 1):
        own = prepared.data[skill.name]
        data = with_rehearsal(skill, own, knows, prepared.anchors, curriculum, prepared.base, home)
        assert own.train is not None and data.train is not None
        spec = stage_spec(skill, data, parent, curriculum.seed, curriculum.runtime)
        model = _known_model(home, spec) if action == "reused" else None
        standing = None
        if model is not None:
            rules = _rules(model, [skill, *kept, *curriculum.general], prepared)
            standing = _standing(home, curriculum.name, spec, number, rules)
        action = _action(action, model, standing)
        if action == "learned":
            check_place(curriculum.runtime)
            said = short_of_steps(skill.training, data.train.rows)
            remarks += [Remark(name=skill.name, said=said)] if said else []
        if standing is None or standing.let_in:
            knows[skill.name] = own
        if model is not None and standing is not None and standing.let_in:
            parent = model
            kept.append(skill)
        stages.append(
            PlannedStage(
                skill=skill.name,
                demonstrations=own.train.rows,
                rehearsed=sum(data.train.rehearsed.values()),
                anchors=data.train.anchors,
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
        remarks=tuple(remarks),
    )


def check_place(runtime: RuntimeSettings) -> None:
    """Raise BadInput where stages are to be trained on a GPU, here, and there is none."""
    if runtime.device == "cuda" and deployment(TRAIN) is None and not has_gpu():
        raise BadInput(
            "runtime.device is 'cuda', but this machine has no CUDA device; use 'auto' or 'cpu', "
            f"or have a worker with one train the stages ({TRAIN})"
        )


def _action(before: Action, model: ModelDir | None, standing: StandingVerdict | None) -> Action:
    """What becomes of a stage, by the action on the one before it, and by what is there of it.

    Only after stages that are all reused it is known from which model a stage would start.
    """
    if before in ("judged anew", "open"):
        return "open"
    if before == "learned" or model is None:
        return "learned"
    return "judged anew" if standing is None else "reused"


def _known_model(home: Home, spec: StageSpec) -> ModelDir | None:
    """The model of a stage that is finished here."""
    directory = finished_dir(home, spec)
    record = known_record(directory)
    if record is None:
        return None
    check_name(record, spec)
    return stage_model(directory, record)


def _standing(
    home: Home, name: str, spec: StageSpec, stage: int, rules: Rules
) -> StandingVerdict | None:
    """The verdict on a stage, where the gate would come to it again."""
    standing = standing_verdict(home, name, spec.key)
    return standing if standing and _stands(standing.verdict, stage, rules) else None


def _rules(model: ModelDir, suites: list[Suite], prepared: Prepared) -> Rules:
    """What a verdict on a model would be made by."""
    asked = prepared.curriculum
    spec = evaluation_spec(model, [], asked.evaluation, asked.runtime)
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
