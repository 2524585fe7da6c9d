"""Everything that is registered, for `sdft status`."""

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from schemas.base import Contract
from tasks.aliases import drift
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.tracking import (
    MODEL_HASH,
    PARENT_VERSION_TAG,
    SKILL_TAG,
    VERDICT_TAG,
    all_pages,
    open_client,
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
    drift: tuple[str, ...]
    """How its aliases differ from the ledger, one line each."""


def registry_status(home: Home) -> list[RegisteredName]:
    """Everything that is registered in this home."""
    client, ledger = open_client(home), Ledger(home)
    versions: dict[str, list[ModelVersion]] = {}
    for one in all_pages(lambda token: client.search_model_versions(page_token=token)):
        versions.setdefault(one.name, []).append(one)  # no filter can name what others register
    return [
        RegisteredName(
            name=model.name,
            drift=tuple(_drift(ledger, client, model.name)),
            versions=tuple(
                RegisteredVersion(
                    version=str(one.version),
                    skill=one.tags.get(SKILL_TAG, ""),
                    verdict=one.tags.get(VERDICT_TAG, "none yet"),
                    # search results carry no aliases of their own
                    aliases=tuple(
                        a for a, v in model.aliases.items() if str(v) == str(one.version)
                    ),
                    parent=one.tags.get(PARENT_VERSION_TAG, ""),
                    model_hash=one.tags.get(MODEL_HASH, ""),
                    run_id=one.run_id or "",
                )
                for one in sorted(versions.get(model.name, []), key=lambda one: int(one.version))
            ),
        )
        for model in all_pages(lambda token: client.search_registered_models(page_token=token))
    ]


def _drift(ledger: Ledger, client: MlflowClient, name: str) -> list[str]:
    """How the aliases of a name differ from the ledger; one that is not in it is another's."""
    entries = ledger.entries(name)
    return drift(client, name, entries) if entries else []
