"""What a run would do: the flow's decisions without its work."""

from typing import Literal

from flows.learn import prepare
from schemas.base import Contract
from schemas.curriculum import Curriculum
from sdft.record import verified_record
from sdft.schedule import total_steps
from tasks.basemodel import describe_model
from tasks.home import Home
from tasks.registration import stage_verdict
from tasks.training import stage_spec


class PlannedStage(Contract):
    """One stage of a plan."""

    skill: str
    demonstrations: int
    items: int
    steps: int
    action: Literal["reused", "learned"]


class Plan(Contract):
    """All stages of a curriculum, after its data have passed their checks."""

    curriculum: str
    base_path: str
    base_hash: str
    stages: tuple[PlannedStage, ...]


def plan_curriculum(curriculum: Curriculum, home: Home) -> Plan:
    """The plan; a stage after one that is still to be learned is to be learned as well."""
    prepared = prepare(curriculum, str(home.root))
    parent = prepared.base
    stages: list[PlannedStage] = []
    known = True
    for skill in curriculum.skills:
        data = prepared.data[skill.name]
        assert data.train is not None
        spec = stage_spec(skill, data, parent, curriculum.seed, curriculum.runtime)
        directory = home.stages / spec.key[:32]
        known = known and verified_record(directory) is not None
        stages.append(
            PlannedStage(
                skill=skill.name,
                demonstrations=data.train.rows,
                items=data.eval.rows,
                steps=total_steps(skill.training, data.train.rows),
                action="reused" if known else "learned",
            )
        )
        if known and stage_verdict(home, curriculum.name, spec.key) == "pass":
            parent = describe_model(directory / "model")
    return Plan(
        curriculum=curriculum.name,
        base_path=prepared.base.path,
        base_hash=prepared.base.model_hash,
        stages=tuple(stages),
    )
