"""The registry: a version of the curriculum's model for every stage, and its ledger entries."""

import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from schemas.base import BadInput, Contract
from schemas.ledger import Draft, Entry, Kind
from schemas.results import Decision, Verdict
from schemas.stage import StageRecord
from sdft.chain import about, ancestry, champion, newest, skills_of, withdrawn
from sdft.record import RECORD
from tasks.aliases import mirror, own_entries
from tasks.console import say
from tasks.home import Home
from tasks.leases import Fence, check_in
from tasks.ledger import Ledger, Raced
from tasks.packages import (
    EVIDENCE,
    PACKAGE,
    AdapterStack,
    check_logs,
    check_stack,
    check_weights,
    evidence_of,
    log_manifest,
    package_of,
    package_uri,
    save_package,
)
from tasks.tracking import (
    DATA_HASH_TAG,
    MODEL_HASH,
    PARENT_HASH_TAG,
    PARENT_VERSION_TAG,
    RUN_ID_TAG,
    SKILL_TAG,
    STAGE_KEY,
    STAGE_TAG,
    experiment,
    find_version,
    open_client,
)
from tasks.training import TrainedStage


class Origin(Contract):
    """What a version is built on."""

    parent_version: str | None
    """None for the base model."""
    stack: AdapterStack | None = None
    """Where the version is to hold adapters without their base."""


def register_stage(
    home: Home,
    name: str,
    stage: TrainedStage,
    verdict: Verdict,
    origin: Origin,
    fence: Fence,
) -> str:
    """The version of a stage, with its registration and verdict in the ledger.

    A version that passed becomes champion by itself when it knows every skill that the champion
    knows and rests on none that was rolled back; otherwise that is for a person to decide. The
    ledger's entries are written all at once, and each step is skipped where it is done, so the next
    run does what a crash left undone.
    """
    client, ledger = open_client(home), Ledger(home)
    ensure_model(client, name)
    with ledger.alone(name):  # another process may be at the same stage
        entries = own_entries(ledger, client, name)
        version = find_version(client, name, stage.key)
        if version is None:
            version = _create_version(client, home, name, stage, origin)
        number = str(version.version)
        registered = newest(entries, number, "registered")
        if registered is not None and registered.stage_key != stage.key:
            raise BadInput(
                f"{name}/{number}: is another stage in the ledger; the registered model was "
                "deleted and its numbers began anew: learn under another name"
            )
        if registered is not None and registered.model_hash != stage.model.model_hash:
            raise BadInput(
                f"{name}/{number}: was registered by another home, which has trained this stage to "
                f"other weights; remove {stage.directory}, and the registered ones are fetched"
            )
        draft = registered or _registration(client, name, stage, version, origin)
        outcome = _write_down(ledger, draft, verdict, fence)
    mirror(home, name)
    if outcome:
        say("register", stage.skill, f"{name} version {number}: {outcome}")
    return number


def _write_down(ledger: Ledger, registration: Draft, verdict: Verdict, fence: Fence) -> str:
    """Append what the ledger lacks; returns what became of the version, nothing if all is there."""
    name, version = registration.name, registration.version or ""
    while True:
        entries = ledger.entries(name)
        now = champion(entries)
        judged = newest(entries, version, "verdict")
        if judged is not None and judged.verdict_hash == verdict.digest:
            return ""
        known = newest(entries, version, "registered") is not None
        drafts = [] if known else [registration]
        judgement = about(registration, "verdict", verdict.digest, verdict.decision)
        judgement = judgement.model_copy(update={"reason": "; ".join(verdict.reasons)})
        kind, outcome = _becomes(entries, registration, verdict.decision)
        drafts.append(judgement)
        if kind:
            drafts.append(judgement.model_copy(update={"kind": kind}))
        try:
            ledger.append(drafts, now, lambda connection: check_in(connection, fence))
        except Raced:  # somebody made another champion meanwhile: decide again
            continue
        return outcome


def _becomes(
    entries: list[Entry], registration: Draft, decision: Decision
) -> tuple[Kind | None, str]:
    """What a version becomes by a verdict: what else the ledger is told, and the words for it."""
    name, version, now = registration.name, registration.version, champion(entries)
    line = ancestry(entries, registration.parent_version)
    learned = {one.skill for one in line} | {registration.skill}
    lacking = skills_of(entries, now.version) - learned
    taken = withdrawn(entries)
    gone = [one.version for one in line if one.version in taken]
    by_hand = f"to let it in: sdft promote {name} {version}"
    match decision:
        case "refuse" if now.version == version:
            return "refused", f"refused, and it is the champion; see sdft rollback {name}"
        case "refuse":
            return "refused", "refused; the champion stays as it was"
        case "ask":
            return None, f"needs a person; {by_hand} --override REASON"
        case "pass" if now.version == version:
            return None, "passed anew; the champion stays as it was"
        case "pass" if newest(entries, version, "registered"):  # rolled back since, it may be
            return None, f"passed anew; {by_hand}"
        case "pass" if lacking:
            skills = ", ".join(sorted(lacking))
            return None, f"passed, but the champion also knows {skills}; {by_hand}"
        case "pass" if gone:
            return None, f"passed, but rests on version {gone[0]}, rolled back; {by_hand}"
        case "pass":
            return "promoted", "champion"


def ensure_model(client: MlflowClient, name: str) -> None:
    """Make the registered model where it is not there."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def _create_version(
    client: MlflowClient,
    home: Home,
    name: str,
    stage: TrainedStage,
    origin: Origin,
) -> ModelVersion:
    logged = client.create_logged_model(
        experiment(client, home, name),
        name=f"{name}-{stage.skill}",
        source_run_id=stage.run_id,
        tags={STAGE_KEY: stage.key, MODEL_HASH: stage.model.model_hash},
    )
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        save_package(Path(stage.model.path), origin.stack, package)
        client.log_model_artifacts(logged.model_id, str(package))
    client.finalize_logged_model(logged.model_id, "READY")
    return client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=stage.run_id,
        model_id=logged.model_id,
        tags={
            STAGE_KEY: stage.key,
            SKILL_TAG: stage.skill,
            STAGE_TAG: str(stage.stage),
            PARENT_VERSION_TAG: origin.parent_version or "base",
            PARENT_HASH_TAG: stage.parent_hash,
            MODEL_HASH: stage.model.model_hash,
            DATA_HASH_TAG: stage.data_hash,
            RUN_ID_TAG: stage.run_id,
        },
    )


def _registration(
    client: MlflowClient,
    name: str,
    stage: TrainedStage,
    version: ModelVersion,
    origin: Origin,
) -> Draft:
    """What the ledger keeps of a version: every hash, of what the registry gives back."""
    _, package = package_of(package_uri(client, version))
    record = StageRecord.read(Path(stage.directory) / RECORD)
    check_weights(f"{name}/{version.version}", package, record)
    if origin.stack is not None:
        check_stack(f"{name}/{version.version}", package, origin.stack)
    _, evidence = evidence_of(client.get_run(stage.run_id))
    check_logs(f"{name}/{version.version}", evidence, record)
    log_manifest(client, stage.run_id, PACKAGE, package)
    log_manifest(client, stage.run_id, EVIDENCE, evidence)
    return Draft(
        kind="registered",
        name=name,
        version=str(version.version),
        skill=stage.skill,
        parent_version=origin.parent_version,
        stage_key=stage.key,
        model_hash=stage.model.model_hash,
        data_hash=stage.data_hash,
        evidence_hash=evidence.hash,
        package_hash=package.hash,
    )
