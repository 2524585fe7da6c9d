"""A version's lineage as a CycloneDX ML-BOM: models, files, data, and what depends on what.

The library knows no model card yet, so what one would hold (training, data, scores) are properties
in the namespace `sdft:`. Licences of models and data are not in a lineage, so none are stated.
The hash of a model is the sha256 over its files' hashes, that of data over its canonical rows.
"""

# The library's class decorator hides its constructors from pyright.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import version as installed
from uuid import NAMESPACE_OID, uuid5

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot7
from pydantic import JsonValue

from schemas.digest import canonical_json, digest_json
from schemas.lineage import Lineage, LineageStage
from schemas.snapshot import AnchorsOrigin
from schemas.stage import FileDigest


def ml_bom(lineage: Lineage) -> str:
    """The lineage as CycloneDX 1.7 JSON; the same lineage gives the same bytes.

    The serial number comes from the lineage's hash, the time is the end of its last stage.
    """
    base = _base(lineage)
    models = [_model(lineage, stage) for stage in lineage.stages]
    data = [_data(lineage, stage) for stage in lineage.stages]
    anchors = _anchors(lineage)
    bom = Bom(
        serial_number=uuid5(NAMESPACE_OID, digest_json(lineage.model_dump(mode="json"))),
        metadata=BomMetaData(
            timestamp=datetime.fromisoformat(lineage.stages[-1].ended),
            tools=ToolRepository(components=[_writer()]),
            component=models[-1],
        ),
        components=[base, *models[:-1], *data, *anchors.values()],
    )
    made = {stage.version: model for stage, model in zip(lineage.stages, models, strict=True)}
    learned: dict[str, Component] = {}
    for stage, model, rows in zip(lineage.stages, models, data, strict=True):
        parent = base if stage.parent_version is None else made[stage.parent_version]
        facts = stage.data
        again = [learned.get(one.data_hash) for one in facts.rehearsed_from.values()]
        asked = facts.anchors_from and anchors[facts.anchors_from]
        learned[_own_hash(stage)] = rows
        bom.register_dependency(model, [parent, rows, *filter(None, [*again, asked])])
    return JsonV1Dot7(bom).output_as_string(indent=2)


def _writer() -> Component:
    return Component(
        type=ComponentType.APPLICATION,
        name="sdft",
        version=installed("sdft"),
        licenses=[DisjunctiveLicense(id="Apache-2.0")],
    )


def _base(lineage: Lineage) -> Component:
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=lineage.base_path,
        bom_ref=f"base:{lineage.base_hash}",
        description="The base model, on which the first stage was trained.",
        hashes=_sha256(lineage.base_hash),
        properties=_properties({"model_hash": lineage.base_hash}),
    )


def _model(lineage: Lineage, stage: LineageStage) -> Component:
    facts: dict[str, JsonValue] = {
        "stage": stage.stage,
        "skill": stage.skill,
        "stage_key": stage.stage_key,
        "model_hash": stage.model_hash,
        "parent_version": stage.parent_version,
        "parent_hash": stage.parent_hash,
        "data_hash": stage.data.data_hash,
        "rows": stage.data.rows,
        "rows_rehearsed": {**stage.data.rehearsed},
        "rows_anchors": stage.data.anchors,
        "steps": stage.steps,
        "train_seconds": stage.train_seconds,
        "code_version": stage.code_version,
        "run_id": stage.run_id,
        "run_link": stage.run_link,
        "started": stage.started,
        "ended": stage.ended,
        "decision": stage.decision,
        **_under("setting", stage.settings),
        **_under("environment", stage.environment),
        **_under("score", stage.scores),
    }
    for entry in stage.history:
        facts[f"ledger:{entry.seq}"] = canonical_json(entry.model_dump(mode="json"))
        if entry.kind not in ("registered", "verdict"):
            reason = f": {entry.reason}" if entry.reason else ""
            event = entry.told_of(stage.version).replace(" ", "-")
            facts[f"{event}:{entry.seq}"] = f"{entry.time} by {entry.who}{reason}"
    if stage.version == lineage.version:
        facts["aliases"] = ", ".join(lineage.aliases)
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=lineage.name,
        version=stage.version,
        bom_ref=f"model:{lineage.name}/{stage.version}",
        description=f"The model after stage {stage.stage}, which learned {stage.skill}.",
        hashes=_sha256(stage.model_hash),
        components=[_file(stage, file) for file in stage.files],
        properties=_properties(facts),
    )


def _data(lineage: Lineage, stage: LineageStage) -> Component:
    """The skill's own rows."""
    data, own_hash = stage.data, _own_hash(stage)
    facts: dict[str, JsonValue] = {
        "skill": stage.skill,
        "source": data.source,
        "rows": data.own,
        "quarantined": data.quarantined,
        "data_hash": own_hash,
        "rules": data.rules,
        "rules_met": data.rules_met,
    }
    return Component(
        type=ComponentType.DATA,
        name=f"{lineage.name}.{stage.skill}",
        version=own_hash,
        bom_ref=f"data:{lineage.name}/{stage.version}",
        description=f"The {data.own} demonstrations of the skill {stage.skill}.",
        hashes=_sha256(own_hash),
        properties=_properties(facts),
    )


def _own_hash(stage: LineageStage) -> str:
    return stage.data.own_hash or stage.data.data_hash  # the second in documents of before


def _anchors(lineage: Lineage) -> dict[AnchorsOrigin, Component]:
    """Each set of anchors once; most often all stages have the same."""
    made: dict[AnchorsOrigin, Component] = {}
    for stage in lineage.stages:
        origin = stage.data.anchors_from
        if origin is not None and origin not in made:
            rows: dict[str, JsonValue] = {"rows": stage.data.anchors}
            made[origin] = Component(
                type=ComponentType.DATA,
                name=f"{lineage.name}/anchors",
                version=origin.data_hash,
                bom_ref=f"anchors:{lineage.name}/{stage.version}",
                description=(
                    f"{stage.data.anchors} prompts of no skill, to be answered as before (anchors)."
                ),
                hashes=_sha256(origin.data_hash),
                properties=_properties(rows | origin.model_dump(mode="json")),
            )
    return made


def _file(stage: LineageStage, file: FileDigest) -> Component:
    return Component(
        type=ComponentType.FILE,
        name=file.path,
        bom_ref=f"file:{stage.version}/{file.path}",
        hashes=_sha256(file.sha256),
        properties=_properties({"size_bytes": file.size_bytes}),
    )


def _sha256(digest: str) -> Iterable[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=digest)]


def _under(group: str, facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {f"{group}:{name}": value for name, value in facts.items()}


def _properties(facts: Mapping[str, JsonValue]) -> list[Property]:
    """Texts as they are, everything else as JSON (so a setting that is not set is `null`)."""
    return [
        Property(
            name=f"sdft:{name}", value=value if isinstance(value, str) else canonical_json(value)
        )
        for name, value in facts.items()
    ]
