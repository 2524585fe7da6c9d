"""MLflow: one run a stage, found by its stage key; logging again changes nothing.

The files of a stage are the truth and MLflow the view: all here can be made again from them.
"""

import json
import logging
import re
import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
    ErrorCode,
)
from mlflow.store.entities.paged_list import PagedList
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

from schemas.base import BadInput, sync
from schemas.snapshot import ANCHORS, PAGE, RESULT, ROWS, SNAPSHOT, Snapshot
from schemas.stage import StageSpec
from sdft.files import partial_name
from sdft.process import exclusive
from tasks.console import shown_address
from tasks.failures import RunFailed
from tasks.home import Home

Found = TypeVar("Found")
STAGE_KEY = "sdft.stage_key"
LOGGED = "sdft.logged"
MODEL_HASH = "sdft.model_hash"
SKILL_TAG, STAGE_TAG, RUN_ID_TAG = "sdft.skill", "sdft.stage", "sdft.run_id"
PARENT_VERSION_TAG, PARENT_HASH_TAG = "sdft.parent_version", "sdft.parent_hash"
DATA_HASH_TAG = "sdft.data_hash"
VERDICT_TAG = "sdft.verdict"
HOME_TAG = "sdft.home"
"""The home that a run is being trained in, or was."""
NOT_THERE = (
    ErrorCode.Name(RESOURCE_DOES_NOT_EXIST),  # no such model or run
    ErrorCode.Name(INVALID_PARAMETER_VALUE),  # no such alias, or no name that a model can have
)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it says all it raises twice
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # every retry; Away says it
_UNANSWERED = re.compile(
    r"^API request to .* failed with (timeout |)exception|error code 5\d\d", re.MULTILINE
)
"""How MLflow's client says, of files each on a line, that there is no server or none behind its
proxy."""
_NOT_DOWNLOADED = "The following failures occurred while downloading one or more artifacts"
"""How MLflow's client begins to tell what it could not bring; the reasons come last. That the store
does not have it is no such error (`tasks.artifacts.local_copy`)."""
_NOT_LET_IN = re.compile(r"error code 40[13]\b")
"""How MLflow's client says that the server wants another name or password."""


class Away(RunFailed):
    """MLflow cannot be reached; what it lacks can be brought later from the files."""


class NotLetIn(BadInput):
    """MLflow wants another name or password."""


@contextmanager
def reaching(home: Home) -> Generator[None]:
    """Turn an outage of MLflow into Away, after its client's own retries, a wrong password into
    NotLetIn; other errors pass."""
    try:
        yield
    except (MlflowException, requests.RequestException, OperationalError) as error:
        if (problem := as_outage(error, home.tracking_uri)) is None:
            raise
        raise problem from error
    except OSError as error:  # copying names what is read first, and sometimes nothing
        error.filename = error.filename2 or error.filename or str(home.artifacts)
        raise


def pass_outage(error: Exception, home: Home) -> None:
    """For who catches errors that say that something is gone or altered: raises Away or NotLetIn
    where this one says nothing about that."""
    if problem := as_outage(error, home.tracking_uri):
        raise problem from error


def as_outage(error: Exception, uri: str) -> Away | NotLetIn | None:
    """What an error of MLflow's client means, for people; None where it is neither of the two."""
    where = shown_address(uri)
    if _is_refusal(error):
        return NotLetIn(
            f"MLflow ({where}) does not let you in; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    known = isinstance(error, MlflowException | requests.RequestException | OperationalError)
    if known and _is_outage(error):
        why = f"{where}: {problem}" if (problem := _said_by_sqlite(error)) else where
        return Away(f"MLflow does not answer ({why})")
    if _is_of_store(error):
        said = str(error).splitlines()[-1]
        return Away(f"MLflow's store of artifacts ({where}) does not give what it has: {said}")
    return None


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, requests.HTTPError):  # of an artifact
        return error.response is not None and error.response.status_code in (401, 403)
    return isinstance(error, MlflowException) and _NOT_LET_IN.search(str(error)) is not None


def _is_outage(error: Exception) -> bool:
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code >= 500
    if not isinstance(error, MlflowException):
        return True
    return (
        error.error_code == ErrorCode.Name(TEMPORARILY_UNAVAILABLE)  # a database that is locked
        or _UNANSWERED.search(str(error)) is not None
        or isinstance(error.__context__, requests.RequestException)
    )


def _is_of_store(error: Exception) -> bool:
    """Whether the store behind MLflow failed, asked through MLflow's server or by us directly."""
    of_client = isinstance(error, MlflowException) and str(error).startswith(_NOT_DOWNLOADED)
    return of_client or type(error).__module__.startswith("botocore.")


def _said_by_sqlite(error: BaseException | None) -> str | None:
    """That a database file is locked or its disk is full, in SQLite's words."""
    while error is not None:
        if isinstance(error, sqlite3.Error):
            return str(error)
        error = error.__cause__
    return None


@cache
def _make_tables(uri: str) -> None:
    """Make MLflow's SQLite tables, whole or not at all.

    One process at a time: two at once break its migrations. So does the death of the one that
    makes them, whose half of the tables MLflow cannot go on from.
    """
    if not uri.startswith("sqlite:") or not (name := make_url(uri).database):
        return
    file = Path(name)
    with exclusive(file.parent):
        if not file.is_file():
            with TemporaryDirectory(prefix=partial_name(), dir=file.parent) as folder:
                partial = Path(folder) / file.name
                made_at = f"sqlite:///{partial}"
                MlflowClient(made_at, made_at)
                sync(partial)
                partial.rename(file)
            sync(file.parent)


def open_client(home: Home) -> MlflowClient:
    """A client for this home's tracking store and registry."""
    _make_tables(home.tracking_uri)
    return MlflowClient(tracking_uri=home.tracking_uri, registry_uri=home.tracking_uri)


def all_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """The versions that the registry has of a name, in no order."""
    return all_pages(
        lambda token: client.search_model_versions(f"name = '{name}'", page_token=token)
    )


def all_pages(search: Callable[[str | None], PagedList[Found]]) -> list[Found]:
    """Everything that a search of MLflow finds, which gives its results page by page."""
    page = search(None)
    found = [*page]
    while page.token:
        page = search(page.token)
        found += page
    return found


def experiment(client: MlflowClient, home: Home, name: str) -> str:
    """The id of the curriculum's experiment, made where it is not there.

    Raises BadInput where it was deleted, which keeps its name taken.
    """
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == LifecycleStage.DELETED:
        raise BadInput(
            f"the experiment {name} was deleted in MLflow; to have it back: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    if found is not None:
        return found.experiment_id
    local = home.tracking_uri.startswith("sqlite:")
    place = home.artifacts.as_uri() + f"/{name}" if local else None
    try:
        return client.create_experiment(name, artifact_location=place)
    except MlflowException as error:  # another process was faster
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    return experiment(client, home, name)


def find_run(client: MlflowClient, experiment_id: str, tag: str, value: str) -> MlflowRun | None:
    """The newest run with this tag."""
    found = client.search_runs(
        [experiment_id], f"tags.`{tag}` = '{value}'", order_by=["start_time DESC"], max_results=1
    )
    return found[0] if found else None


def stage_run(client: MlflowClient, experiment_id: str, spec: StageSpec, stage: int) -> MlflowRun:
    """The run of a stage; a new one gets the stage's settings as parameters."""
    run = find_run(client, experiment_id, STAGE_KEY, spec.key)
    if run is None:
        run = client.create_run(
            experiment_id,
            run_name=f"stage-{stage}-{spec.skill}",
            tags={
                STAGE_KEY: spec.key,
                SKILL_TAG: spec.skill,
                STAGE_TAG: str(stage),
                PARENT_HASH_TAG: spec.parent_hash,
                DATA_HASH_TAG: spec.data_hash,
            },
        )
    if not run.data.params:
        settings = spec.training.model_dump() | {"seed": spec.seed}
        client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in settings.items()])
    return run


def run_page(home: Home, run: MlflowRun) -> str | None:
    """The address of a run's page; None in an embedded home, which has no pages."""
    if not home.tracking_uri.startswith("http"):
        return None
    server = shown_address(home.tracking_uri).rstrip("/")
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def find_version(client: MlflowClient, name: str, stage_key: str) -> ModelVersion | None:
    """The registered version of a stage."""
    found = client.search_model_versions(f"name = '{name}' AND tags.`{STAGE_KEY}` = '{stage_key}'")
    return found[0] if found else None


def log_snapshot(client: MlflowClient, run_id: str, snapshot: Snapshot, context: str) -> None:
    """A snapshot as a dataset input of the run, under our own digest, with its validation."""
    dataset = Dataset(
        name=snapshot.name.replace("/", "-"),
        digest=snapshot.data_hash[:32],
        source_type="local",
        source=json.dumps({"uri": snapshot.file, "from": snapshot.source}),
        profile=json.dumps({"num_rows": snapshot.rows, "sha256": snapshot.data_hash}),
    )
    tags = [InputTag("mlflow.data.context", context)]
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])
    place, folder = f"validation/{snapshot.name}", Path(snapshot.directory)
    files = [folder / file for file in (ROWS, RESULT, PAGE)]
    of_anchors = [folder / f"{ANCHORS}{file}" for file in (RESULT, PAGE)]
    for path in (*files, *(path for path in of_anchors if path.is_file())):
        client.log_artifact(run_id, str(path), place)
    # Not the file: the same data can have been validated under another name, from another place.
    client.log_text(run_id, snapshot.seal().text, f"{place}/{SNAPSHOT}")


def set_tags(client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
