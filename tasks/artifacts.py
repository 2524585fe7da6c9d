"""MLflow's artifacts as files: in place where the store is a folder, otherwise downloaded."""

import functools
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from schemas.base import BadInput

_FOLDER: ContextVar[str | None] = ContextVar("folder", default=None)
"""Where downloads go now."""


def run_file(run: Run, path: str) -> Path:
    """A file or folder among the artifacts of a run."""
    return local_copy(f"{run.info.artifact_uri}/{path}")


def local_copy(uri: str) -> Path:
    """An artifact in place where the store is a folder, otherwise downloaded: until we end, or the
    `downloads` that this is in.

    Raises BadInput where another store does not have it: MLflow's server says that as it says that
    the store is away.
    """
    local = uri.startswith(("file:", "/"))
    target = None if local else tempfile.mkdtemp(dir=_FOLDER.get() or _until_we_end().name)
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=target))
    except MlflowException as error:
        if _is_listed(uri):
            raise
        raise BadInput(f"{uri}: is not in MLflow's store of artifacts") from error


def _is_listed(uri: str) -> bool:
    folder, _, name = uri.rpartition("/")
    listed = mlflow.artifacts.list_artifacts(artifact_uri=folder)
    return name in {Path(one.path).name for one in listed}


@contextmanager
def downloads() -> Generator[None]:
    """What is downloaded within this is removed at its end: models can be many, and large."""
    with tempfile.TemporaryDirectory(prefix="sdft-", ignore_cleanup_errors=True) as folder:
        token = _FOLDER.set(folder)
        try:
            yield
        finally:
            _FOLDER.reset(token)


@functools.cache
def _until_we_end() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sdft-")
