"""The end of a stage: its model directory and, written last, its record; and checking both."""

import functools
import hashlib
import importlib.metadata
import platform
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.base import BadInput
from schemas.stage import FileDigest, StageRecord, StageSpec
from sdft.files import placed
from sdft.modelfiles import WEIGHTS, all_files, model_files, model_hash
from sdft.stagelog import METRICS, ROLLOUTS

if TYPE_CHECKING:  # reading a record must not cost the import of torch
    from peft import PeftModel

    from sdft.model import LanguageModel

RECORD, ADAPTER = "record.json", "adapter"


@dataclass(frozen=True)
class Finished:
    """What a stage took."""

    steps: int
    seconds: float
    checkpoint_seconds: float
    environment: dict[str, str]


def finish_stage(
    spec: StageSpec,
    directory: Path,
    lm: "LanguageModel",
    adapter: "PeftModel | None",
    finished: Finished,
) -> StageRecord:
    """Write model/ and then record.json; the record's presence means that the stage is whole.

    Of a stage with adapters also adapter/, from which, with the parent, model/ is made.
    """
    model_dir, model = directory / "model", lm.model
    if adapter is not None:
        from sdft.lora import merged, save_adapter

        with placed(directory / ADAPTER) as partial:
            save_adapter(adapter, spec.parent_hash, partial)
        model = merged(Path(spec.parent_dir), directory / ADAPTER)
    with placed(model_dir) as partial:
        model.save_pretrained(partial)
        for file in Path(spec.parent_dir).iterdir():  # tokenizer and licence, byte for byte
            if file.is_file() and not (partial / file.name).exists() and _belongs(file):
                shutil.copyfile(file, partial / file.name)
    files = model_files(model_dir)
    record = StageRecord(
        key=spec.key,
        spec=spec,
        model_hash=model_hash(files),
        files=files,
        logs=log_files(directory),
        adapter=adapter_files(directory),
        steps=finished.steps,
        train_seconds=finished.seconds,
        checkpoint_seconds=finished.checkpoint_seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        code_version=code_version(),
        environment=finished.environment,
    ).seal()
    record.write(directory / RECORD)
    return record


def log_files(directory: Path) -> tuple[FileDigest, ...]:
    """What a stage directory tells of the training."""
    return all_files(directory, lambda name: name.parts[0] in (METRICS, ROLLOUTS))


def adapter_files(directory: Path) -> tuple[FileDigest, ...]:
    """The adapter in a stage directory; none where all weights were trained."""
    return all_files(directory / ADAPTER)


def recorded_folders(record: StageRecord) -> list[str]:
    """The folders that a stage directory has beside model/: rollouts, an adapter, or neither."""
    rollouts = any(Path(file.path).parts[0] == ROLLOUTS for file in record.logs)
    return [ROLLOUTS] * rollouts + [ADAPTER] * bool(record.adapter)


def verified_record(directory: Path) -> StageRecord | None:
    """The stage's record if it is finished; raises BadInput where its files are not as recorded."""
    path = directory / RECORD
    if not path.is_file():
        return None
    record = StageRecord.read(path)
    for place, now, recorded in [
        (directory / "model", model_files(directory / "model"), record.files),
        (directory / ADAPTER, adapter_files(directory), record.adapter),
        (directory, log_files(directory), record.logs),
    ]:
        if differs := sorted(one.path for one in set(now) ^ set(recorded)):
            raise BadInput(f"{place / differs[0]}: is not as {directory / RECORD} lists it")
    return record


@functools.cache
def code_version() -> str:
    """Package version and a digest of the source that decides what training does."""
    here = Path(__file__).parent
    sources = sorted([*here.glob("*.py"), *(here.parent / "schemas").glob("*.py")])
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return f"{importlib.metadata.version('sdft')}+{digest[:12]}"


code_version()  # kept from now on: later the files can have changed, but not what runs


def environment(lm: "LanguageModel") -> dict[str, str]:
    """What a stage ran on; recorded, not part of its identity."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if lm.device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        **library_versions(),
    }


def library_versions() -> dict[str, str]:
    """The libraries whose version can change a model's output."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def _belongs(file: Path) -> bool:
    return file.suffix not in (*WEIGHTS, ".md") and not file.name.endswith(".index.json")
