"""What a registered version rests on, as files with a manifest that the ledger holds the hash of.

The package is the model as `mlflow.transformers` saves it; the evidence is what its run keeps of
how it was made.
"""

import inspect
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.environment_variables import MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from schemas.base import BadInput, Contract
from schemas.digest import digest_file
from schemas.ledger import Entry
from schemas.stage import FileDigest, StageRecord
from sdft.modelfiles import all_files, model_hash
from sdft.record import ADAPTER, RECORD
from sdft.stagelog import METRICS, ROLLOUTS
from tasks.artifacts import local_copy, run_file
from tasks.stagefiles import INPUTS

if TYPE_CHECKING:  # looking at a package must not cost the import of torch
    from peft import PeftModel

PACKAGE, EVIDENCE = "package.json", "evidence.json"
"""Manifests, artifacts of the stage's run."""
VERDICTS = "verdicts"
MLFLOWS_OWN = "registered_model_meta"
"""MLflow writes this beside a package that it hands out, even in place."""
STACKED = "peft/adapter_model.safetensors"
"""Where a package holds adapters in place of a model."""
MODEL_FILES = "model-files"
"""Artifacts of a run: what its model directory has beside the weights."""
EVIDENCE_PATHS = (RECORD, INPUTS, METRICS, ROLLOUTS, MODEL_FILES, ADAPTER, "validation")


class Manifest(Contract):
    """Files with their hashes; the ledger holds the hash of it all."""

    files: tuple[FileDigest, ...]

    @property
    def hash(self) -> str:
        return model_hash(self.files)


class AdapterStack(Contract):
    """The adapters of the stages from a model with all its weights on, in their order."""

    base_dir: str
    adapter_dirs: tuple[str, ...]


def save_package(model_dir: Path, stack: AdapterStack | None, target: Path) -> None:
    """Save a model directory for `mlflow.transformers.load_model`, in safetensors only.

    Of a stack of adapters only these are saved, as one, with the path of their base.
    """
    import mlflow.transformers
    from transformers import PreTrainedModel
    from transformers.utils import logging as transformers_logging

    from sdft.pretrained import open_tokenizer, open_weights

    transformers_logging.disable_progress_bar()
    # Into as large files as the trainer's: MLflow would cut a model of over 500 MB into others.
    whole = inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
    MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE.set(whole)
    # There is no hub to ask about a model that was made here, and its requirements are known.
    for quiet in ("mlflow.transformers", "huggingface_hub", "mlflow.utils.environment"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.transformers.save_model(
            {
                "model": _stacked(stack) if stack else open_weights(model_dir, "auto"),
                "tokenizer": open_tokenizer(model_dir),
            },
            path=str(target),
            task="llm/v1/chat",
            pip_requirements=["transformers", "torch", *(["peft"] if stack else [])],
            base_model_path=stack and stack.base_dir,
        )


def _stacked(stack: AdapterStack) -> "PeftModel":
    from sdft.lora import stacked

    return stacked(Path(stack.base_dir), [Path(one) for one in stack.adapter_dirs])


@dataclass(frozen=True)
class Registered:
    """A registered version, and the run that made it, as the registry gives them back."""

    entry: Entry
    version: ModelVersion
    run: Run
    package_uri: str
    """Where the registry takes the package from that it hands out."""

    @property
    def label(self) -> str:
        return f"{self.entry.name}/{self.entry.version}"

    def file(self, path: str) -> Path:
        """A file or folder among the artifacts of the run."""
        return run_file(self.run, path)


def open_registered(client: MlflowClient, entry: Entry) -> Registered:
    """The version that a `registered` entry is about; raises BadInput where it is gone."""
    what = "is gone from the registry"
    try:
        version = client.get_model_version(entry.name, entry.version or "")
        what = f"its run {version.run_id} is gone, and all that it kept of how it was made"
        run = client.get_run(version.run_id or "")
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        raise BadInput(f"{entry.name}/{entry.version}: {what}") from None
    return Registered(entry, version, run, package_uri(client, version))


def package_uri(client: MlflowClient, version: ModelVersion) -> str:
    return client.get_model_version_download_uri(version.name, str(version.version))


def package_of(uri: str) -> tuple[Path, Manifest]:
    """A version's package, as the registry gives it back."""
    place = local_copy(uri)
    return place, Manifest(files=all_files(place, lambda name: name.as_posix() != MLFLOWS_OWN))


def evidence_of(run: Run) -> tuple[Path, Manifest]:
    """What a stage was made from, and what its making left, as its run gives them back."""
    found: list[FileDigest] = []
    listed = mlflow.artifacts.list_artifacts(artifact_uri=run.info.artifact_uri)
    there = {Path(one.path).name for one in listed}
    for path in sorted(there.intersection(EVIDENCE_PATHS)):  # not every stage has all of them
        place = run_file(run, path)
        if place.is_file():
            size = place.stat().st_size
            found.append(FileDigest(path=path, size_bytes=size, sha256=digest_file(place)))
        else:
            found += [
                one.model_copy(update={"path": f"{path}/{one.path}"}) for one in all_files(place)
            ]
    return run_file(run, RECORD).parent, Manifest(files=tuple(found))


def log_manifest(client: MlflowClient, run_id: str, name: str, manifest: Manifest) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        manifest.write(path)
        client.log_artifact(run_id, str(path))


def check_package(registered: Registered) -> Manifest:
    """Prove that a version's package is the one that was registered.

    Raises BadInput with the first file that is not.
    """
    place, now = package_of(registered.package_uri)
    return _check(registered, PACKAGE, registered.entry.package_hash, place, now)


def check_weights(label: str, package: Manifest, record: StageRecord) -> None:
    """Prove that a package holds the very weights that the trainer wrote, or adapters alone.

    Those are of several stages: `check_stack` can tell whose.
    """
    paths = {file.path for file in package.files if file.path.endswith(".safetensors")}
    stacked = bool(record.adapter) and paths == {STACKED}
    if not stacked and _weights(package.files) != _weights(record.files):
        raise BadInput(f"{label}: its package does not hold the weights that were trained")


def check_stack(label: str, package: Manifest, stack: AdapterStack) -> None:
    """Prove that a package holds the adapters of these stages, by stacking them again."""
    with tempfile.TemporaryDirectory() as folder:
        _stacked(stack).save_pretrained(folder)
        again = _weights(all_files(Path(folder)))
    if again != _weights(package.files):
        raise BadInput(f"{label}: its package does not hold the adapters that were trained")


def _weights(files: tuple[FileDigest, ...]) -> set[str]:
    return {file.sha256 for file in files if file.path.endswith(".safetensors")}


def check_logs(label: str, evidence: Manifest, record: StageRecord) -> None:
    """Prove that a run keeps the very curve, rollouts and model files that the trainer wrote."""
    made = set(record.logs)
    made.update(one.model_copy(update={"path": f"{ADAPTER}/{one.path}"}) for one in record.adapter)
    for file in record.files:
        if ".safetensors" not in file.path:  # the weights are in the package
            made.add(file.model_copy(update={"path": f"{MODEL_FILES}/{file.path}"}))
    trained = (METRICS, ROLLOUTS, MODEL_FILES, ADAPTER)
    kept = [one for one in evidence.files if one.path.split("/")[0] in trained]
    if differs := sorted(one.path for one in made.symmetric_difference(kept)):
        raise BadInput(f"{label}: {differs[0]} of its run is not what the trainer wrote")


def evaluation_folder(suite: str) -> str:
    """Where a run keeps the items of a suite and its model's answers to them."""
    return f"evaluation/{suite}"


def suite_tag(suite: str) -> str:
    """The tag of a run with the hash of the items that lie beside the answers."""
    return f"sdft.suite.{suite}"


def reference_folder(suite: str) -> str:
    """Where a run keeps the answers that its stage's verdict compares with."""
    return f"references/{suite}"


def verdict_file(digest: str) -> str:
    """Where a verdict lies among the artifacts of its stage's run."""
    return f"{VERDICTS}/{digest[:16]}.json"


def check_evidence(registered: Registered) -> Manifest:
    """Prove that what a version's run keeps of its making is what was registered."""
    place, now = evidence_of(registered.run)
    return _check(registered, EVIDENCE, registered.entry.evidence_hash, place, now)


def _check(
    registered: Registered, name: str, expected: str | None, place: Path, now: Manifest
) -> Manifest:
    label = registered.label
    manifest = Manifest.read(registered.file(name))
    if manifest.hash != expected or manifest.text != registered.file(name).read_text("utf-8"):
        raise BadInput(f"{label}: {registered.file(name)} is not the one that was registered")
    there = {file.path: file for file in now.files}
    for file in manifest.files:
        if there.pop(file.path, None) != file:
            raise BadInput(f"{label}: {place / file.path} is not as it was registered")
    if there:
        raise BadInput(f"{label}: {place / min(there)} was added after it was registered")
    return manifest
