"""The registry: a version of the curriculum's model for every stage, and the two aliases."""

import logging
import tempfile
import warnings
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from prefect import task

from schemas.base import Contract
from schemas.results import Verdict
from tasks.console import say
from tasks.home import Home
from tasks.tracking import STAGE_KEY, experiment, open_client, user
from tasks.training import TrainedStage

CANDIDATE, CHAMPION = "candidate", "champion"
VERDICT = "sdft.verdict"


@task(task_run_name="register-{stage.stage}-{stage.skill}")
def register_stage(
    name: str,
    stage: TrainedStage,
    verdict: Verdict,
    parent_version: str | None,
    home_dir: str,
) -> str:
    """The version number of a stage; its aliases are set when its verdict is new.

    The verdict's tag is written last, so what a crash left undone is done by the next run.
    """
    home = Home(home_dir)
    client = open_client(home)
    ensure_model(client, name)
    version = find_version(client, name, stage.key)
    if version is None:
        version = _create_version(client, home, name, stage, parent_version)
    word = "pass" if verdict.passed else "refuse"
    if version.tags.get(VERDICT) == word:
        return str(version.version)
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    if verdict.passed:
        client.set_registered_model_alias(name, CHAMPION, version.version)
    elif champion_version(home, name) == str(version.version):  # it passed under an older gate
        if parent_version is None:
            client.delete_registered_model_alias(name, CHAMPION)
        else:
            client.set_registered_model_alias(name, CHAMPION, parent_version)
    client.set_model_version_tag(name, version.version, VERDICT, word)
    outcome = "champion" if verdict.passed else "refused; the champion stays as it was"
    say("register", stage.skill, f"{name} version {version.version}: {outcome}")
    return str(version.version)


def find_version(client: MlflowClient, name: str, stage_key: str) -> ModelVersion | None:
    """The registered version of a stage."""
    found = client.search_model_versions(f"name = '{name}' AND tags.`{STAGE_KEY}` = '{stage_key}'")
    return found[0] if found else None


def champion_version(home: Home, name: str) -> str | None:
    """The version that the champion alias points to; None where there is no model or alias."""
    try:
        return str(open_client(home).get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException:
        return None


def ensure_model(client: MlflowClient, name: str) -> None:
    """Make the registered model where it is not there."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def _create_version(
    client: MlflowClient,
    home: Home,
    name: str,
    stage: TrainedStage,
    parent_version: str | None,
) -> ModelVersion:
    logged = client.create_logged_model(
        experiment(client, home, name),
        name=f"{name}-{stage.skill}",
        source_run_id=stage.run_id,
        tags={STAGE_KEY: stage.key, "sdft.model_hash": stage.model.model_hash},
    )
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        save_package(Path(stage.model.path), package)
        client.log_model_artifacts(logged.model_id, str(package))
    client.finalize_logged_model(logged.model_id, "READY")
    return client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=stage.run_id,
        model_id=logged.model_id,
        tags={
            STAGE_KEY: stage.key,
            "sdft.skill": stage.skill,
            "sdft.stage": str(stage.stage),
            "sdft.parent_version": parent_version or "base",
            "sdft.parent_hash": stage.parent_hash,
            "sdft.model_hash": stage.model.model_hash,
            "sdft.data_hash": stage.data_hash,
            "sdft.run_id": stage.run_id,
            "sdft.registered_by": user(),
        },
    )


def save_package(model_dir: Path, target: Path) -> None:
    """Save a model directory for `mlflow.transformers.load_model`, in safetensors only."""
    import mlflow.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # There is no hub to ask about a model that was made here, and its requirements are known.
    for quiet in ("mlflow.transformers", "huggingface_hub", "mlflow.utils.environment"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.transformers.save_model(
            {
                "model": AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto"),
                "tokenizer": AutoTokenizer.from_pretrained(model_dir),
            },
            path=str(target),
            task="llm/v1/chat",
            pip_requirements=["transformers", "torch"],
        )


class RegisteredVersion(Contract):
    """A version as `sdft status` shows it."""

    version: str
    skill: str
    verdict: str
    aliases: tuple[str, ...]
    parent: str
    model_hash: str
    run_id: str


class RegisteredName(Contract):
    """A registered model and its versions, oldest first."""

    name: str
    versions: tuple[RegisteredVersion, ...]


def stage_verdict(home: Home, name: str, stage_key: str) -> str | None:
    """The registered verdict on a stage: pass, refuse, or None where there is none yet."""
    version = find_version(open_client(home), name, stage_key)
    return version.tags.get(VERDICT) if version else None


def registry_status(home: Home) -> list[RegisteredName]:
    """Everything that is registered in this home."""
    client = open_client(home)
    return [
        RegisteredName(
            name=model.name,
            versions=tuple(
                RegisteredVersion(
                    version=str(one.version),
                    skill=one.tags.get("sdft.skill", ""),
                    verdict=one.tags.get(VERDICT, "none yet"),
                    # search results carry no aliases of their own
                    aliases=tuple(
                        a for a, v in model.aliases.items() if str(v) == str(one.version)
                    ),
                    parent=one.tags.get("sdft.parent_version", ""),
                    model_hash=one.tags.get("sdft.model_hash", ""),
                    run_id=one.run_id or "",
                )
                for one in sorted(
                    client.search_model_versions(f"name = '{model.name}'"),
                    key=lambda one: int(one.version),
                )
            ),
        )
        for model in client.search_registered_models()
    ]
