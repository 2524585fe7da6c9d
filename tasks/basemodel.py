"""The base model as a checked local directory, whatever the curriculum names."""

import re
from pathlib import Path

from prefect import task

from schemas.base import BadInput, Contract
from schemas.curriculum import HUB
from schemas.digest import digest_file, digest_json
from schemas.stage import StageRecord
from sdft.modelfiles import chat_template, check_model_dir, convert_gguf, model_files, model_hash
from tasks.console import say
from tasks.failures import is_of_disk
from tasks.home import Home


class ModelDir(Contract):
    """A model directory and what it holds."""

    path: str
    model_hash: str
    template_hash: str


def describe_model(directory: Path) -> ModelDir:
    """Check a model directory and hash it."""
    check_model_dir(directory)
    return ModelDir(
        path=str(directory),
        model_hash=model_hash(model_files(directory)),
        template_hash=digest_json(chat_template(directory)),
    )


def stage_model(directory: Path, record: StageRecord) -> ModelDir:
    """The same of a finished stage whose files were just verified; they are not read again."""
    path = directory / "model"
    template = digest_json(chat_template(path))
    return ModelDir(path=str(path), model_hash=record.model_hash, template_hash=template)


@task
def resolve_base_model(source: str, home_dir: str) -> ModelDir:
    """The directory of a base model; a .gguf file is converted once into the home's models."""
    home = Home(home_dir)
    path = Path(source)
    if source.startswith(HUB):
        path = _download(source.removeprefix(HUB), home)
    elif path.suffix == ".gguf":
        path = _converted(path, home)
    return describe_model(path)


def _converted(source: Path, home: Home) -> Path:
    if not source.is_file():
        raise BadInput(f"{source}: there is no such model file")
    target = home.models / f"{source.stem}-{digest_file(source)[:16]}"
    if not target.is_dir():
        say("base", source.stem, "converting the GGUF file to safetensors, once")
        home.models.mkdir(exist_ok=True)
        try:
            convert_gguf(source, target)
        except (ValueError, OSError) as error:  # of transformers, about what the file holds
            if is_of_disk(error):
                raise
            said = str(error).partition("\n")[0]
            raise BadInput(f"{source}: is no GGUF file of a model: {said}") from None
    return target


def _download(name: str, home: Home) -> Path:
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise BadInput(
            f"base_model {HUB}{name} needs a commit, so that it cannot change: "
            f"{HUB}{repository}@<40 hex digits>"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                local_dir=home.models / f"{repository.replace('/', '--')}-{revision}",
                allow_patterns=[
                    "*.safetensors",
                    "*.json",
                    "*.jinja",
                    "*.model",
                    "*.txt",
                    "LICENSE*",
                ],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"base_model {HUB}{name} cannot be downloaded: {error}") from error
