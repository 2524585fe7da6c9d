"""What `sdft doctor` asks MLflow: tracking, registry, artifacts."""

import os
import time

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.exc import SQLAlchemyError

from schemas.base import BadInput
from tasks.console import shown_address
from tasks.findings import PATIENCE_S, Findings, clock, date_of, version_of, well, wrong
from tasks.home import Home
from tasks.tracking import all_pages, open_client, reaching

_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


def mlflow_server(home: Home) -> Findings:
    """Whether tracking, registry and artifacts answer, with our name and password."""
    uri = home.tracking_uri
    where = shown_address(uri)
    if uri.startswith("http"):
        yield from _over_http(uri, where)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    try:
        with reaching(home):
            client = open_client(home)
            client.search_experiments(max_results=1)
            models = all_pages(lambda token: client.search_registered_models(page_token=token))
    except MlflowException as error:
        said = shown_address(error.message.splitlines()[0])  # it may hold the whole address
        yield wrong("mlflow", f"{where}: {said}", "look at MLFLOW_TRACKING_URI, and at its log")
        return
    except (SQLAlchemyError, ImportError) as error:  # its text may hold the password
        found = f"{where}: cannot be used ({type(error).__name__})"
        yield wrong("mlflow", found, "look at MLFLOW_TRACKING_URI")
        return
    yield well("mlflow", f"{where}: lets us in, {len(models)} registered models")


def _over_http(uri: str, where: str) -> Findings:
    credentials = get_default_host_creds(uri)

    def ask(path: str) -> requests.Response:
        answer = http_request(
            credentials, path, "GET", max_retries=0, timeout=PATIENCE_S, raise_on_status=False
        )
        assert answer is not None
        return answer

    before = time.time()
    try:
        answer, theirs, artifacts = ask("/health"), ask("/version"), ask(_ARTIFACTS)
    except (MlflowException, requests.RequestException):
        return  # what is asked next says it
    if (date := date_of(answer.headers.get("Date"))) is not None:
        yield clock("MLflow server", date, before)
    if "host" in answer.text.lower() and answer.status_code == 403:
        raise BadInput(
            f"{where}: does not answer to this name; name it in the server's --allowed-hosts, with "
            "and without the port"
        )
    if theirs.status_code == 200:
        yield version_of("mlflow", mlflow.__version__, theirs.text.strip())
    if artifacts.status_code == 200:
        yield well("artifacts", f"{where}: the store behind it answers")
    elif artifacts.status_code not in (401, 403):
        yield wrong(
            "artifacts",
            f"{where}: the store behind it does not answer ({artifacts.status_code})",
            "look at MLflow's log, and at the store's address and keys that it was started with",
        )
