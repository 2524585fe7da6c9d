"""Stages that another home has finished, brought into this one and verified."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

from schemas.base import BadInput
from schemas.stage import StageRecord, StageSpec
from sdft.files import placed
from sdft.record import ADAPTER, RECORD, recorded_folders
from sdft.stagelog import METRICS
from tasks.artifacts import run_file
from tasks.console import say
from tasks.home import Home
from tasks.packages import MODEL_FILES, package_of, package_uri
from tasks.parcels import is_there, model_name, received
from tasks.stagefiles import INPUTS, StageInputs, finished_dir, finished_stage
from tasks.tracking import (
    LOGGED,
    MODEL_HASH,
    STAGE_KEY,
    Away,
    find_run,
    find_version,
    open_client,
    reaching,
)


def fetch_stage(home: Home, spec: StageSpec, curriculum: str) -> bool:
    """Bring a stage whose files MLflow has all of; False where none can be had."""
    try:
        with reaching(home):
            client = open_client(home)
            experiment = client.get_experiment_by_name(curriculum)
            if experiment is None:
                return False
            run = find_run(client, experiment.experiment_id, STAGE_KEY, spec.key)
            if run is None or not run.data.tags.get(LOGGED):
                return False
            parcel = model_name(run.data.tags.get(MODEL_HASH, ""))
            version = None
            if not is_there(home, parcel):  # a stage that was trained where it was registered
                version = find_version(client, curriculum, spec.key)
                if version is None:
                    return False
            home.stages.mkdir(exist_ok=True)
            with placed(finished_dir(home, spec)) as partial:
                for file in (RECORD, INPUTS, METRICS):
                    shutil.copyfile(run_file(run, file), partial / file)
                record = StageRecord.read(partial / RECORD)
                for folder in recorded_folders(record):
                    shutil.copytree(run_file(run, folder), partial / folder)
                if version is None:
                    parents = {spec.parent_hash: Path(spec.parent_dir)} if spec.parent_dir else {}
                    with received(home, parcel, parents) as model:
                        _link(model, partial / "model")
                else:
                    if record.adapter:  # the package may lack its base
                        _merge(home, spec, partial)
                    files = run_file(run, MODEL_FILES)
                    shutil.copytree(files, partial / "model", dirs_exist_ok=True)
                    if not record.adapter:
                        package, _ = package_of(package_uri(client, version))
                        for weights in (package / "model").glob("*.safetensors*"):
                            shutil.copyfile(weights, partial / "model" / weights.name)
                finished_stage(partial, spec)
                StageInputs.read(partial / INPUTS)
    except Away:
        return False
    except BadInput as error:
        say("train", spec.skill, f"what MLflow has of it cannot be used: {error}", "yellow")
        return False
    return True


def _link(source: Path, target: Path) -> None:
    """The files of the cache under another name: they take no space twice, and are never altered.

    What is removed from the cache stays here.
    """
    shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns(".*"))


def _merge(home: Home, spec: StageSpec, directory: Path) -> None:
    """Make model/ of a stage's adapter and its parent, to the byte as the trainer did."""
    from sdft.lora import merged  # torch and peft cost seconds

    at_hand = spec.parent_dir and Path(spec.parent_dir)
    place = nullcontext(at_hand) if at_hand else received(home, model_name(spec.parent_hash))
    with place as parent:
        merged(parent, directory / ADAPTER).save_pretrained(directory / "model")
