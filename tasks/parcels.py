"""Models, data and scores on their way between machines that share no disk.

They go by hash through MLflow's artifact store: a folder each, its list of files written last. What
arrives is verified and kept in the home's cache. Of a model that was made with adapters only those
travel; where it is wanted it is made of its parent again, to the same hash.
"""

import shutil
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from schemas.base import BadInput
from schemas.parcel import Parcel
from schemas.stage import FileDigest, StageRecord
from sdft.files import partial_name
from sdft.modelfiles import all_files, is_the_model, model_hash
from sdft.record import ADAPTER
from tasks.cache import Cache, is_shown
from tasks.failures import RunFailed
from tasks.home import Home
from tasks.tracking import experiment, open_client, reaching

EXPERIMENT = "sdft.parcels"
"""Whose artifacts they are; no curriculum can have this name."""
LIST, FILES = "parcel.json", "files"
DATA = "data-"
Made = Mapping[str, Path]
"""Models that are at hand, by hash: a parent need not be brought to make a model of it."""


def model_name(model_hash: str) -> str:
    return f"model-{model_hash}"


def cache_of(home: Home) -> Cache:
    return Cache(home.cache / "parcels")


def send_model(home: Home, directory: Path, model_hash: str) -> str:
    """Have a model in the store; returns its parcel's name. Raises Away."""
    name = model_name(model_hash)
    if not is_there(home, name):
        send(home, Parcel(name=name, files=all_files(directory, is_shown)), directory)
    return name


def send_stage(home: Home, directory: Path, record: StageRecord) -> Parcel:
    """Have the model of a finished stage in the store: of one with adapters only those."""
    parcel = Parcel(
        name=model_name(record.model_hash),
        files=all_files(directory / "model", is_shown),  # the licence too, which is in no hash
        adapter_of=record.spec.parent_hash if record.adapter else "",
        adapter=record.adapter,
    )
    if not is_there(home, parcel.name):
        send(home, parcel, directory / "model", directory / ADAPTER)
    return parcel


def send_data(home: Home, directory: Path) -> str:
    """Have a snapshot, with its validation, in the store; returns its parcel's name."""
    files = all_files(directory)
    parcel = Parcel(name=f"{DATA}{model_hash(files)}", files=files)
    if not is_there(home, parcel.name):
        send(home, parcel, directory)
    return parcel.name


def send(home: Home, parcel: Parcel, directory: Path, adapter: Path | None = None) -> None:
    """Write a parcel into the store; only when all of it is there it can be seen."""
    with reaching(home):
        store = _store(home, parcel.name)
        for one in parcel.files:
            if not parcel.is_made(one):
                _upload(store, directory / one.path, f"{FILES}/{one.path}")
        for one in parcel.adapter:
            assert adapter is not None, f"{parcel.name}: has an adapter that is not given"
            _upload(store, adapter / one.path, f"{ADAPTER}/{one.path}")
        with _scratch(home) as scratch:
            parcel.write(scratch / LIST)
            store.log_artifact(str(scratch / LIST))


def is_there(home: Home, name: str) -> bool:
    """Whether the store has all of a parcel."""
    with reaching(home):
        if open_client(home).get_experiment_by_name(EXPERIMENT) is None:
            return False
        listed = _store(home, name).list_artifacts()
    return any(Path(one.path).name == LIST for one in listed)


def all_parcels(home: Home) -> dict[str, Parcel | None]:
    """What the store has by name, as it is listed there and unchecked. Raises Away.

    None for what was not sent to its end, or was removed halfway.
    """
    with reaching(home):
        if open_client(home).get_experiment_by_name(EXPERIMENT) is None:
            return {}
        names = sorted(Path(one.path).name for one in _store(home).list_artifacts())
    return {name: _listed(home, name) if is_there(home, name) else None for name in names}


def remove_parcel(home: Home, name: str) -> None:
    """Take a parcel, or what there is of it, out of the store; its list goes first. Raises Away."""
    with reaching(home):
        _store(home, name).delete_artifacts(LIST)
        _store(home, name).delete_artifacts()


@contextmanager
def received(home: Home, name: str, made: Made | None = None) -> Generator[Path]:
    """A parcel's folder in the home's cache, whole, verified and kept for as long as this lasts.

    Raises Away, and what `Cache.holding` raises.
    """
    parcel = _checked(cache_of(home).find(name) or _parcel(home, name), name)
    with cache_of(home).holding(parcel, partial(_bring, home, parcel, made or {})) as folder:
        yield folder


def bring_small(home: Home, name: str, target: Path) -> None:
    """Put a parcel's files into a folder, past the cache and unchecked."""
    with reaching(home):
        store = _store(home, name)
        for one in _parcel(home, name).files:
            _download(store, f"{FILES}/{one.path}", target / one.path)


def _parcel(home: Home, name: str) -> Parcel:
    if not is_there(home, name):
        raise RunFailed(f"{name} is not in MLflow's store; run the curriculum again to send it")
    return _listed(home, name)


def _listed(home: Home, name: str) -> Parcel:
    """The list of a parcel that is there."""
    with reaching(home), _scratch(home) as scratch:
        _download(_store(home, name), LIST, scratch / LIST)
        return Parcel.read(scratch / LIST)


def _checked(parcel: Parcel, name: str) -> Parcel:
    """A list of files is believed only where it gives the hash by which the parcel is known."""
    kind, _, expected = name.partition("-")
    wanted = is_the_model if kind == "model" else is_shown
    found = model_hash(tuple(one for one in parcel.files if wanted(Path(one.path))))
    if (parcel.name, found) != (name, expected):
        raise BadInput(f"{name}: its list of files is not the one that it is named by")
    return parcel


def _bring(home: Home, parcel: Parcel, made: Made, entry: Path, lacking: list[FileDigest]) -> None:
    store = _store(home, parcel.name)
    with reaching(home):
        for one in lacking:
            if not parcel.is_made(one):
                _download(store, f"{FILES}/{one.path}", entry / one.path)
    if any(parcel.is_made(one) for one in lacking):
        with _scratch(home) as scratch, ExitStack() as held, reaching(home):
            for one in parcel.adapter:
                _download(store, f"{ADAPTER}/{one.path}", scratch / ADAPTER / one.path)
            parent = made.get(parcel.adapter_of)
            parent = parent or held.enter_context(received(home, model_name(parcel.adapter_of)))
            _merge(parent, scratch, entry)


def _merge(parent: Path, scratch: Path, entry: Path) -> None:
    from sdft.lora import merged  # torch and peft cost seconds

    with warnings.catch_warnings():  # of libraries, about each other
        warnings.simplefilter("ignore", FutureWarning)
        merged(parent, scratch / ADAPTER).save_pretrained(scratch / "model")
    for weights in (scratch / "model").glob("*.safetensors*"):
        weights.replace(entry / weights.name)


def _store(home: Home, name: str = "") -> ArtifactRepository:
    client = open_client(home)
    found = client.get_experiment(experiment(client, home, EXPERIMENT))
    place = f"{found.artifact_location}/{name}".rstrip("/")
    return get_artifact_repository(place, home.tracking_uri, home.tracking_uri)


def _upload(store: ArtifactRepository, source: Path, path: str) -> None:
    store.log_artifact(str(source), Path(path).parent.as_posix())


def _download(store: ArtifactRepository, path: str, target: Path) -> None:
    """One file, which has its name only when all of it is there."""
    coming = target.parent / ".coming"
    coming.mkdir(parents=True, exist_ok=True)
    Path(store.download_artifacts(path, str(coming))).replace(target)
    shutil.rmtree(coming)


@contextmanager
def _scratch(home: Home) -> Generator[Path]:
    """A folder for a moment, on the disk of the home, where large files can be moved from."""
    home.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.cache, prefix=partial_name()) as folder:
        yield Path(folder)
