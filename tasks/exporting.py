"""A version as a plain model directory, made of what the registry has, its hash proven."""

import shutil
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlflow import MlflowClient

from schemas.base import BadInput, Contract
from schemas.ledger import Entry
from schemas.stage import FileDigest, StageRecord
from sdft.chain import ancestry, first_break
from sdft.files import PARTIAL, placed
from sdft.modelfiles import model_files, model_hash
from sdft.record import ADAPTER, RECORD
from tasks.artifacts import local_copy
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.lineage import UNREADABLE, kept, resolve
from tasks.packages import MODEL_FILES, Registered, open_registered
from tasks.parcels import is_there, model_name, received
from tasks.proof import Disproved
from tasks.tracking import open_client, pass_outage


class Exported(Contract):
    """What was written of a version."""

    name: str
    version: str
    files: int
    size_bytes: int
    model_hash: str
    entry: int
    """Of the ledger, which has this hash."""


def export(home: Home, reference: str, directory: Path) -> Exported:
    """Write a version into a directory that transformers opens; it is there whole or not at all.

    Raises BadInput where the directory cannot be made or what the version is made of is gone,
    Disproved where that is not as it was trained.
    """
    target = directory.resolve()
    _check_free(target)
    name, version = resolve(home, reference)
    everything = Ledger(home).entries()
    if broken := first_break(everything):
        raise Disproved(broken)
    line = ancestry([one for one in everything if one.name == name], version)
    client = open_client(home)
    try:
        with placed(target) as partial:
            _write_weights(home, client, line, partial)
            registered = open_registered(client, line[-1])
            shutil.copytree(_kept(home, registered, MODEL_FILES), partial, dirs_exist_ok=True)
            files = model_files(partial)
            _prove(home, registered, files)
            _check_free(target)  # writing took its time
    except OSError as error:
        place = Path(error.filename2 or error.filename or "")
        if place != target and not any(part.startswith(PARTIAL) for part in place.parts):
            raise  # it is about what was read
        raise BadInput(
            f"{target}: cannot be written: {error.strerror}; nothing of it is left"
        ) from None
    return Exported(
        name=name,
        version=version,
        files=len(files),
        size_bytes=sum(one.size_bytes for one in files),
        model_hash=line[-1].model_hash or "",
        entry=line[-1].seq,
    )


def _check_free(target: Path) -> None:
    if any(target.iterdir()) if target.is_dir() else target.exists():
        raise BadInput(f"{target}: is there already; name a directory that is new or empty")
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent}: there is no such directory")


def _write_weights(home: Home, client: MlflowClient, line: list[Entry], target: Path) -> None:
    """Write the weights of the last of a line of versions.

    Where its package holds adapters these are added, stage by stage as they were trained, to the
    nearest model below with all its weights.
    """
    adapters: list[Path] = []
    with ExitStack() as held:
        for entry in reversed(line):
            registered = open_registered(client, entry)
            whole = _package(home, registered) / "model"
            if any(whole.glob("*.safetensors")):
                break
            adapters.insert(0, _kept(home, registered, ADAPTER))
        else:
            whole = held.enter_context(_base(home, open_registered(client, line[0])))
        if adapters:
            _merge(whole, adapters, target)
        else:
            for file in whole.glob("*.safetensors*"):
                shutil.copyfile(file, target / file.name)


def _merge(whole: Path, adapters: list[Path], target: Path) -> None:
    from transformers.utils import logging  # with torch and peft it costs seconds

    from sdft.lora import merged

    logging.disable_progress_bar()
    with warnings.catch_warnings():  # of libraries, about each other
        warnings.simplefilter("ignore")
        merged(whole, *adapters).save_pretrained(target)


@contextmanager
def _base(home: Home, first: Registered) -> Generator[Path]:
    """The base model of a first version: where it was, or as it was sent between machines."""
    spec = _record(home, first).spec
    place, parcel = Path(spec.parent_dir), model_name(spec.parent_hash)
    if place.is_dir() and model_hash(model_files(place)) == spec.parent_hash:
        yield place
    elif is_there(home, parcel):
        with received(home, parcel) as folder:
            yield folder
    else:
        raise BadInput(
            f"{first.label}: is adapters, and their base model {spec.parent_hash[:12]} is not at "
            f"{place}; export it where that is"
        )


def _prove(home: Home, registered: Registered, files: tuple[FileDigest, ...]) -> None:
    """Raise Disproved unless these files were trained, which the ledger has the hash of."""
    record, label = _record(home, registered), registered.label
    if model_hash(record.files) != registered.entry.model_hash:
        raise Disproved(f"{label}: its record is not of the model that was registered")
    if differs := sorted(one.path for one in set(files) ^ set(record.files)):
        raise Disproved(f"{label}: {differs[0]} of what the registry has is not as it was trained")


def _record(home: Home, registered: Registered) -> StageRecord:
    return kept(home, registered.label, registered.run, RECORD, StageRecord.read)


def _kept(home: Home, registered: Registered, folder: str) -> Path:
    return kept(home, registered.label, registered.run, folder, Path)


def _package(home: Home, registered: Registered) -> Path:
    try:
        return local_copy(registered.package_uri)
    except UNREADABLE as error:
        pass_outage(error, home)
        raise BadInput(
            f"{registered.label}: its package is gone or cannot be read: {error}"
        ) from None
