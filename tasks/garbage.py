"""What nothing reaches any more: no alias, version, ledger entry or running stage."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlparse

from schemas.base import BadInput, Contract
from schemas.results import CellFile
from schemas.snapshot import SNAPSHOT, Snapshot
from schemas.stage import StageRecord
from sdft.cells import CELL
from sdft.modelfiles import model_files, model_hash
from sdft.record import RECORD
from tasks.console import say
from tasks.home import Home
from tasks.leases import holders, leased, release_dead, release_silent
from tasks.ledger import Ledger
from tasks.parcels import DATA, EXPERIMENT, all_parcels, model_name, remove_parcel
from tasks.stagefiles import INPUTS, WAITING, StageInputs
from tasks.stageruns import is_logged
from tasks.tracking import STAGE_KEY, all_pages, open_client, reaching
from tasks.watched import recorded_copies

Document = TypeVar("Document", bound=Contract)


class Garbage(Contract):
    """One thing that can go."""

    what: str
    path: str
    """Inside the home, or the address of an artifact outside of it."""
    size_bytes: int


@dataclass
class _Reached:
    """What must stay: stages by key, models and data by hash, base models by directory."""

    stages: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    data: set[str] = field(default_factory=set)
    bases: set[str] = field(default_factory=set)


def collect_alone(home: Home, older_than_s: float, remove: bool) -> list[Garbage]:
    """The same as `collect`, after a run that is at work in the home."""
    with leased(home.lease_key, "gc", home):
        return collect(home, older_than_s, remove)


def collect(home: Home, older_than_s: float, remove: bool) -> list[Garbage]:
    """Find what nothing reaches and nobody has touched for so long; with `remove`, remove it.

    A registered version reaches its stage, its parent, its data, with those that they were mixed
    from, and its scores; a held lease reaches the stage that is being worked on. A finished stage
    that MLflow was away for stays, with its data, until it is brought there and registered. The
    checkpoints of a registered stage are reached by nothing: the stage is whole without them, and
    MLflow has their weights. With `remove`, leases of who is gone are released first. Raises Away,
    with nothing removed, where MLflow cannot be asked.
    """
    before = time.time() - older_than_s
    if remove:
        ledger = Ledger(home)
        for key, holder in (release_dead(ledger) | release_silent(ledger)).items():
            say("lease", key[:12], f"released, {holder} is gone", "yellow")
    found: list[Garbage] = []
    with reaching(home):  # first, before anything is removed
        waiting = _waiting(home)
        packages = [*_logged_models(home, before, remove)]
    for what, path in _unreached(home, waiting):
        if path.stat().st_mtime <= before:
            name = str(path.relative_to(home.root))
            found.append(Garbage(what=what, path=name, size_bytes=_size(path)))
            if remove:
                shutil.rmtree(path)
    with reaching(home):
        return found + packages + [*_parcels(home, remove)]


def _waiting(home: Home) -> dict[str, StageInputs]:
    """Finished stages, by directory, that the next run brings to MLflow or registers."""
    found: dict[str, StageInputs] = {}
    for path in _directories(home.stages):
        record, inputs = _read(StageRecord, path / RECORD), _read(StageInputs, path / INPUTS)
        if record is None or inputs is None:
            continue
        if (path / WAITING).exists() or not is_logged(home, inputs, record):
            found[path.name] = inputs
    return found


def _unreached(home: Home, waiting: dict[str, StageInputs]) -> Iterator[tuple[str, Path]]:
    ledger = Ledger(home)
    registered = [one for one in ledger.entries() if one.kind == "registered"]
    keys = {(one.stage_key or "")[:32] for one in registered}
    held = {key[:32] for key in holders(ledger)}
    reached = _Reached(
        stages=keys | held | waiting.keys(),
        models={one.model_hash or "" for one in registered},
        data={one.data_hash or "" for one in registered},
    )
    for inputs in waiting.values():
        data = (inputs.data.train, inputs.data.eval)
        reached.data.update(one.data_hash for one in data if one is not None)
    yield from _stages(home, reached, keys, held)
    yield from _cells(home, reached)
    yield from _data(home, reached)
    yield from _watched(home, ledger)
    for path in _directories(home.models):  # a stage trained elsewhere names a path of its own
        if str(path) not in reached.bases and _hash(path) not in reached.models:
            yield "a base model that no stage here was trained on", path


def _stages(
    home: Home, reached: _Reached, registered: set[str], held: set[str]
) -> Iterator[tuple[str, Path]]:
    for path in _directories(home.stages):
        key = path.name.partition(".")[0]
        if key not in reached.stages:
            yield "a stage that is not registered", path
            continue
        if path.suffix and key not in held:
            yield "work on a stage that is finished", path
            continue
        if not path.suffix and (path / RECORD).is_file():
            record = StageRecord.read(path / RECORD)
            reached.models.update((record.model_hash, record.spec.parent_hash))
            reached.bases.add(record.spec.parent_dir)
        if key in registered and (path / "checkpoints").is_dir():
            yield "checkpoints of a finished stage", path / "checkpoints"


def _cells(home: Home, reached: _Reached) -> Iterator[tuple[str, Path]]:
    known = {one[:16] for one in reached.models}
    for path in _directories(home.cells):
        if path.name.startswith("spec-"):
            if path.name.split("-")[1] not in known:
                yield "an evaluation of a model that is gone", path
            continue
        file = _read(CellFile, path / CELL)
        if file is None or file.cell.model_hash not in reached.models:
            yield "a score of a model that is gone", path
        else:
            reached.data.add(file.cell.suite_hash)


def _data(home: Home, reached: _Reached) -> Iterator[tuple[str, Path]]:
    snapshots = {path: _read(Snapshot, path / SNAPSHOT) for path in _directories(home.data)}
    for snapshot in snapshots.values():
        if snapshot is not None and snapshot.data_hash in reached.data:
            reached.data |= snapshot.made_from
    for path, snapshot in snapshots.items():
        if path.name.startswith("refused-"):
            yield "a report on data that were refused", path
        elif snapshot is None or snapshot.data_hash not in reached.data:
            yield "data that no version rests on", path


def _watched(home: Home, ledger: Ledger) -> Iterator[tuple[str, Path]]:
    recorded = recorded_copies(ledger)
    for path in _directories(home.watched):
        if path.name not in recorded:
            yield "a copy of a watched skill that is not recorded", path


def _parcels(home: Home, remove: bool) -> Iterator[Garbage]:
    """What has arrived: models that are registered, and data, which each sender has.

    Only while no run is at work anywhere, since one may be about to fetch what it was sent.
    """
    ledger = Ledger(home)
    if _is_somebody_at_work(home, ledger):
        return
    registered = {model_name(one.model_hash) for one in ledger.entries() if one.model_hash}
    for name, parcel in all_parcels(home).items():
        if parcel is None or name in registered or name.startswith(DATA):
            if _is_somebody_at_work(home, ledger):  # it began just now, and may be sending this one
                return
            yield Garbage(
                what="a parcel that has arrived" if parcel else "a part of a parcel",
                path=f"{EXPERIMENT}/{name}",
                size_bytes=parcel.sent_bytes if parcel else 0,
            )
            if remove:
                remove_parcel(home, name)


def _is_somebody_at_work(home: Home, ledger: Ledger) -> bool:
    return any(key != home.lease_key for key in holders(ledger))


def _logged_models(home: Home, before: float, remove: bool) -> Iterator[Garbage]:
    """Packages that a killed registration left in MLflow, of which no version was made."""
    client = open_client(home)
    versions = all_pages(lambda token: client.search_model_versions(page_token=token))
    used = {one.source for one in versions} | {one.model_id for one in versions}
    experiments = all_pages(lambda token: client.search_experiments(page_token=token))
    places = [one.experiment_id for one in experiments]
    for model in all_pages(lambda token: client.search_logged_models(places, page_token=token)):
        names = {model.model_id, model.artifact_location, f"models:/{model.model_id}"}
        ours = STAGE_KEY in model.tags
        if not ours or names & used or model.creation_timestamp / 1000 > before:
            continue
        address = urlparse(model.artifact_location)
        folder = Path(unquote(address.path)) if address.scheme in ("", "file") else None
        yield Garbage(
            what="a package that became no version",
            path=model.artifact_location,
            size_bytes=_size(folder) if folder else 0,
        )
        if remove:
            client.delete_logged_model(model.model_id)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _directories(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def _hash(directory: Path) -> str:
    return model_hash(model_files(directory))


def _read(kind: type[Document], path: Path) -> Document | None:
    try:
        return kind.read(path)
    except BadInput:
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
