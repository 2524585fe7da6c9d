"""A version's lineage as OpenLineage events, to a file or to a lineage server.

A stage is a run of the job NAME.SKILL: its demonstrations, those of earlier skills that it learns
again, anchors and its parent model go in, a version comes out. A stage that the gate refused was
trained to its end all the same, so its run completes and the verdict stands in the stage facet. The
spec's parent facet names the run that started a run, which a lineage does not know; a stage's
parent model is an input.
"""

import os
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_OID, uuid5

from attrs import define
from openlineage.client.event_v2 import (
    InputDataset,
    Job,
    OutputDataset,
    Run,
    RunEvent,
    RunState,
    set_producer,
)
from openlineage.client.facet_v2 import (
    DatasetFacet,
    RunFacet,
    dataset_type_dataset,
    dataset_version_dataset,
    datasource_dataset,
    input_statistics_input_dataset,
    job_type_job,
    output_statistics_output_dataset,
    processing_engine_run,
    schema_dataset,
)
from openlineage.client.serde import Serde
from openlineage.client.transport.http import HttpConfig, HttpTransport
from requests import RequestException

from schemas.base import BadInput, write_atomically
from schemas.data import TRAIN_SCHEMA
from schemas.lineage import Lineage, LineageStage
from schemas.snapshot import Origin
from tasks.console import shown_address

NAMESPACE = "sdft"
API_KEY = "OPENLINEAGE_API_KEY"
"""Environment variable of OpenLineage's own clients: sent as bearer token where it is set."""
RETRY = {"total": 2, "raise_on_status": False}

set_producer(f"urn:sdft:{installed('sdft')}")


@define
class StageRunFacet(RunFacet):
    """What the standard facets have no place for. Settings that are not set are left out."""

    model: str
    version: str
    stage: int
    skill: str
    stageKey: str  # noqa: N815
    modelHash: str  # noqa: N815
    parentHash: str  # noqa: N815
    dataHash: str  # noqa: N815
    files: list[dict[str, Any]]
    settings: dict[str, Any]
    steps: int
    trainSeconds: float  # noqa: N815
    codeVersion: str  # noqa: N815
    environment: dict[str, str]
    runId: str  # noqa: N815
    runLink: str  # noqa: N815
    quarantined: int
    rules: int
    rulesMet: int  # noqa: N815
    rehearsed: dict[str, int]
    anchors: int
    anchorsQuarantined: int  # noqa: N815
    anchorsRules: int  # noqa: N815
    anchorsRulesMet: int  # noqa: N815
    scores: dict[str, float]
    decision: str
    history: list[dict[str, Any]]

    @staticmethod
    def _get_schema() -> str:
        return "urn:sdft:facets:1-0-0:StageRunFacet"


def run_events(lineage: Lineage) -> list[RunEvent]:
    """A START and a COMPLETE event for each stage, in order; the same lineage, the same events."""
    return [
        event
        for stage in lineage.stages
        for event in (_start(lineage, stage), _complete(lineage, stage))
    ]


def send(lineage: Lineage, to: str) -> int:
    """Write the events to a file, a line each, or post them to a server; returns how many.

    An http(s) address without a path gets the spec's own, /api/v1/lineage. Sending twice is
    harmless: the runs have the same ids. Raises BadInput where the events cannot be delivered.
    """
    events = run_events(lineage)
    if to.startswith(("http://", "https://")):
        _post(events, to)
    else:
        try:
            write_atomically(Path(to), "".join(f"{Serde.to_json(event)}\n" for event in events))
        except OSError as error:
            raise BadInput(f"{to}: cannot be written: {error.strerror}") from error
    return len(events)


def _post(events: list[RunEvent], to: str) -> None:
    try:
        transport = _transport(to)
    except ValueError as error:
        raise BadInput(
            f"{shown_address(to)}: is no http address, such as http://host:5000"
        ) from error
    where = urlsplit(to).netloc.rpartition("@")[2]  # a password stays out of the message
    for sent, event in enumerate(events):
        try:
            transport.emit(event)
        except RequestException as error:
            said = (
                f"answered {error.response.status_code}"
                if error.response is not None
                else f"does not answer ({type(error).__name__})"
            )
            raise BadInput(
                f"{where}: {said}; it took {sent} of {len(events)} events; check the address and "
                "send them again, which repeats nothing"
            ) from error
    transport.close()


def _transport(to: str) -> HttpTransport:
    parts = urlsplit(to)
    config: dict[str, Any] = {"url": f"{parts.scheme}://{parts.netloc}", "retry": RETRY}
    if endpoint := parts._replace(scheme="", netloc="").geturl().lstrip("/"):
        config["endpoint"] = endpoint
    if key := os.environ.get(API_KEY):
        config["auth"] = {"type": "api_key", "apiKey": key}
    return HttpTransport(HttpConfig.from_dict(config))


def _start(lineage: Lineage, stage: LineageStage) -> RunEvent:
    return RunEvent(
        eventType=RunState.START,
        eventTime=stage.started,
        run=_run(stage),
        job=_job(lineage, stage),
        inputs=_inputs(lineage, stage),
    )


def _complete(lineage: Lineage, stage: LineageStage) -> RunEvent:
    run = _run(stage)
    assert run.facets is not None, "a run has facets"
    run.facets["sdft_stage"] = _stage_facet(lineage, stage)
    written = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        size=sum(file.size_bytes for file in stage.files), fileCount=len(stage.files)
    )
    output = OutputDataset(
        namespace=NAMESPACE,
        name=f"{lineage.name}/{stage.version}",
        facets=_model_facets(stage.model_hash),
        outputFacets={"outputStatistics": written},
    )
    return RunEvent(
        eventType=RunState.COMPLETE,
        eventTime=stage.ended,
        run=run,
        job=_job(lineage, stage),
        inputs=_inputs(lineage, stage),
        outputs=[output],
    )


def _run(stage: LineageStage) -> Run:
    engine = processing_engine_run.ProcessingEngineRunFacet(
        name="torch", version=stage.environment.get("torch", "unknown")
    )
    run_id = str(uuid5(NAMESPACE_OID, f"sdft:run:{stage.run_id}"))
    return Run(runId=run_id, facets={"processing_engine": engine})


def _job(lineage: Lineage, stage: LineageStage) -> Job:
    kind = job_type_job.JobTypeJobFacet(
        processingType="BATCH", integration="SDFT", jobType="TRAINING"
    )
    return Job(namespace=NAMESPACE, name=f"{lineage.name}.{stage.skill}", facets={"jobType": kind})


def _inputs(lineage: Lineage, stage: LineageStage) -> list[InputDataset]:
    base = stage.parent_version is None
    model = f"base/{lineage.base_hash}" if base else f"{lineage.name}/{stage.parent_version}"
    facets = _model_facets(stage.parent_hash)
    if base:
        facets["dataSource"] = _source(lineage.base_path)
    data = stage.data
    own = Origin(source=data.source, data_hash=data.own_hash or data.data_hash)
    rows = [_rows(f"{lineage.name}.{stage.skill}/demonstrations", own, data.own)]
    for skill, count in data.rehearsed.items():
        name = f"{lineage.name}.{skill}/demonstrations"
        rows.append(_rows(name, data.rehearsed_from.get(skill), count))
    if data.anchors:
        rows.append(_rows(f"{lineage.name}/anchors", data.anchors_from, data.anchors))
    return [*rows, InputDataset(namespace=NAMESPACE, name=model, facets=facets)]


def _rows(name: str, origin: Origin | None, count: int) -> InputDataset:
    """So many rows of a data set; the lineages of before do not say where these are from."""
    fields = [
        schema_dataset.SchemaDatasetFacetFields(name=field.name, type=str(field.type))
        for field in TRAIN_SCHEMA
    ]
    facets: dict[str, DatasetFacet] = {"schema": schema_dataset.SchemaDatasetFacet(fields=fields)}
    if origin is not None:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(origin.data_hash)
        facets["dataSource"] = _source(origin.source)
    read = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(rowCount=count)
    return InputDataset(
        namespace=NAMESPACE, name=name, facets=facets, inputFacets={"inputStatistics": read}
    )


def _model_facets(model_hash: str) -> dict[str, DatasetFacet]:
    return {
        "version": dataset_version_dataset.DatasetVersionDatasetFacet(model_hash),
        "datasetType": dataset_type_dataset.DatasetTypeDatasetFacet(datasetType="MODEL"),
    }


def _source(name: str) -> DatasetFacet:
    """A path or an address as the curriculum has it; a uri only where it is one."""
    uri = name if "://" in name else None
    return datasource_dataset.DatasourceDatasetFacet(name=name, uri=uri)


def _stage_facet(lineage: Lineage, stage: LineageStage) -> StageRunFacet:
    anchors = stage.data.anchors_from
    return StageRunFacet(
        model=lineage.name,
        version=stage.version,
        stage=stage.stage,
        skill=stage.skill,
        stageKey=stage.stage_key,
        modelHash=stage.model_hash,
        parentHash=stage.parent_hash,
        dataHash=stage.data.data_hash,
        files=[file.model_dump() for file in stage.files],
        settings=dict(stage.settings),
        steps=stage.steps,
        trainSeconds=stage.train_seconds,
        codeVersion=stage.code_version,
        environment=stage.environment,
        runId=stage.run_id,
        runLink=stage.run_link,
        quarantined=stage.data.quarantined,
        rules=stage.data.rules,
        rulesMet=stage.data.rules_met,
        rehearsed=stage.data.rehearsed,
        anchors=stage.data.anchors,
        anchorsQuarantined=anchors.quarantined if anchors else 0,
        anchorsRules=anchors.rules if anchors else 0,
        anchorsRulesMet=anchors.rules_met if anchors else 0,
        scores=stage.scores,
        decision=stage.decision,
        history=[entry.model_dump() for entry in stage.history],
    )
