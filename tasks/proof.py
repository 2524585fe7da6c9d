"""Proving a lineage: every hash in it is made again from the files and compared.

What is proven rests on the ledger: its chain ties every entry to the one before, an entry ties
record, data, package and verdict of a version, and the record ties the weights to their parent.
The stage key is held against the record's, and not made again: the version of the algorithm that
is in it may be an older one.
"""

from pathlib import Path

import pyarrow.parquet as pq
from mlflow.exceptions import MlflowException

from schemas.base import BadInput, Contract
from schemas.digest import digest_file
from schemas.ledger import Entry
from schemas.results import Verdict
from schemas.snapshot import ROWS
from schemas.stage import StageRecord
from sdft.cells import ITEMS
from sdft.chain import ancestry, first_break
from sdft.data import rehash
from sdft.modelfiles import model_files, model_hash
from sdft.record import RECORD, verified_record
from tasks.aliases import drift, is_behind, own_entries
from tasks.artifacts import downloads
from tasks.failures import RunFailed, is_of_disk
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.lineage import data_folder, resolve
from tasks.packages import (
    Manifest,
    Registered,
    check_evidence,
    check_logs,
    check_package,
    check_weights,
    evaluation_folder,
    open_registered,
    reference_folder,
    verdict_file,
)
from tasks.tracking import (
    DATA_HASH_TAG,
    MODEL_HASH,
    PARENT_HASH_TAG,
    PARENT_VERSION_TAG,
    RUN_ID_TAG,
    SKILL_TAG,
    STAGE_KEY,
    open_client,
    pass_outage,
)


class Disproved(Exception):
    """Something is not as it was written down; the message names it."""


class Proof(Contract):
    """What was proven of a version."""

    name: str
    version: str
    entries: int
    stages: int
    files: int
    size_bytes: int
    base_checked: bool
    """Whether the base model's directory is at hand here."""


def prove(home: Home, reference: str) -> Proof:
    """Prove a version's lineage from the base model on.

    Raises Disproved at the first thing that is not as it was written down, RunFailed where the
    registry has yet to take over the newest entries, Away where MLflow is away.
    """
    ledger, client = Ledger(home), open_client(home)
    name, version = resolve(home, reference)
    manifests: list[Manifest] = []
    records: list[StageRecord] = []
    try:
        everything = ledger.entries()
        if broken := first_break(everything):
            raise Disproved(broken)
        entries = own_entries(ledger, client, name)
        if differs := drift(client, name, entries):
            now = ledger.entries(name)
            if now != entries or is_behind(ledger, now):
                raise RunFailed(
                    f"{differs[0]}: a change is under way, or was cut short; run sdft reconcile "
                    f"{name}, then ask again"
                )
            raise Disproved(differs[0])
        line = ancestry(entries, version)
        for entry in line:
            with downloads():
                registered = open_registered(client, entry)
                package = check_package(registered)
                evidence = check_evidence(registered)
                manifests += [evidence, package]
                records.append(_check_stage(home, registered, records[-1] if records else None))
                check_weights(registered.label, package, records[-1])
                check_logs(registered.label, evidence, records[-1])
                _check_verdicts(registered, entries)
    except (BadInput, MlflowException, OSError) as error:  # altered, or gone
        pass_outage(error, home)
        if is_of_disk(error):
            raise
        raise Disproved(str(error)) from None
    base = records[0].spec
    base_checked = Path(base.parent_dir).is_dir()
    if base_checked and model_hash(model_files(Path(base.parent_dir))) != base.parent_hash:
        raise Disproved(f"{base.parent_dir}: is not the base model that {name} was trained from")
    files = [file for manifest in manifests for file in manifest.files]
    return Proof(
        name=name,
        version=version,
        entries=len(everything),
        stages=len(line),
        files=len(files),
        size_bytes=sum(file.size_bytes for file in files),
        base_checked=base_checked,
    )


def _check_stage(home: Home, registered: Registered, parent: StageRecord | None) -> StageRecord:
    """Record, data, weights and tags of one version agree with each other and with the ledger."""
    label, entry, version = registered.label, registered.entry, registered.version
    record = StageRecord.read(registered.file(RECORD))
    rows = registered.file(f"{data_folder(entry.skill or '')}/{ROWS}")
    claims = {
        "stage key": (record.key, entry.stage_key),
        "data": (rehash(pq.read_table(rows)), entry.data_hash),
        "data of the record": (record.spec.data_hash, entry.data_hash),
        "weights": (model_hash(record.files), entry.model_hash),
        "tag of the stage key": (version.tags.get(STAGE_KEY), entry.stage_key),
        "tag of the skill": (version.tags.get(SKILL_TAG), entry.skill),
        "tag of the data": (version.tags.get(DATA_HASH_TAG), entry.data_hash),
        "tag of the run": (version.tags.get(RUN_ID_TAG), version.run_id),
        "tag of the parent's weights": (
            version.tags.get(PARENT_HASH_TAG),
            record.spec.parent_hash,
        ),
        "tag of the weights": (version.tags.get(MODEL_HASH), entry.model_hash),
        "tag of the parent": (
            version.tags.get(PARENT_VERSION_TAG),
            entry.parent_version or "base",
        ),
    }
    if parent is not None:
        claims["parent's weights"] = (record.spec.parent_hash, parent.model_hash)
    for what, (found, written) in claims.items():
        if found != written:
            raise Disproved(f"{label}: {what}: found {found}, written down {written}")
    trained = home.stages / record.key[:32]
    here = verified_record(trained)
    if here is not None and here.files != record.files:
        raise Disproved(f"{label}: {trained} does not hold the weights that were trained")
    return record


def _check_verdicts(registered: Registered, entries: list[Entry]) -> None:
    """Every verdict on a version, and the answers behind the newest, are there to the byte."""
    label = registered.label
    verdicts = [
        one for one in entries if one.kind == "verdict" and one.version == registered.entry.version
    ]
    for entry in verdicts:
        file = registered.file(verdict_file(entry.verdict_hash or ""))
        if digest_file(file) != entry.verdict_hash:
            raise Disproved(f"{label}: {file} is not as it was given")
    newest = verdicts[-1]
    for one in Verdict.read(registered.file(verdict_file(newest.verdict_hash or ""))).judgements:
        measured = registered.run.data.metrics.get(f"eval/{one.suite}")
        if measured != one.candidate:
            raise Disproved(
                f"{label}: the run says {measured} on {one.suite}, its verdict {one.candidate}"
            )
        for answers, folder in [
            (one.candidate_cell, evaluation_folder(one.suite)),
            (one.reference_cell, reference_folder(one.suite)),
        ]:
            if answers is None:
                continue
            items = registered.file(f"{folder}/{ITEMS}")
            if digest_file(items) != answers.items_sha256:
                raise Disproved(f"{label}: {items} is not what the verdict was given on")
