"""Model directories as files: what makes one usable, its hash, and turning a GGUF into one.

Nothing here loads weights into a model except `convert_gguf`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from schemas.base import BadInput
from schemas.digest import digest_file, digest_json
from schemas.stage import FileDigest
from sdft.files import placed

_NOT_THE_MODEL = {"README.md", "LICENSE", "LICENSE.txt"}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
WEIGHTS = (".safetensors", *_PICKLED, ".h5", ".msgpack", ".onnx", ".gguf")
"""How the names of files with weights end, whoever wrote them."""


def check_model_dir(directory: Path) -> None:
    """Raise BadInput unless `directory` is a Hugging Face model that can be trained and asked.

    It needs config.json, safetensors weights (pickled ones are never read), a tokenizer with an
    end-of-sequence and a padding token, and a chat template.
    """
    if not directory.is_dir():
        raise BadInput(
            f"{directory}: there is no such model directory; one from the Hugging Face hub is "
            "hub:ORGANISATION/NAME@COMMIT"
        )
    if not (directory / "config.json").is_file():
        raise BadInput(f"{directory}: has no config.json, so it is no Hugging Face model directory")
    _read_json(directory / "config.json")
    if not any(directory.glob("*.safetensors")):
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise BadInput(
            f"{directory}: has {found}; save it with model.save_pretrained(), which writes "
            "safetensors, the only format that is read"
        )
    _check_weights(directory)
    vocabulary = any((directory / name).is_file() for name in _VOCABULARIES)
    if not vocabulary or not (directory / "tokenizer_config.json").is_file():
        raise BadInput(f"{directory}: has no tokenizer; add one with tokenizer.save_pretrained()")
    if not chat_template(directory):
        raise BadInput(
            f"{directory}: its tokenizer has no chat template; set tokenizer.chat_template and save"
        )
    config = _read_json(directory / "tokenizer_config.json")
    for token in ("eos_token", "pad_token"):
        if not config.get(token):
            raise BadInput(
                f"{directory}: its tokenizer has no {token}; set tokenizer.{token} and save"
            )


def _check_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, "np"):  # reads the header, which says how long the file is
                pass
        except SafetensorError as error:
            raise BadInput(f"{path}: is not whole ({error}); copy it again") from None
    for index in directory.glob("*.safetensors.index.json"):
        for name in set(_read_json(index).get("weight_map", {}).values()):
            if not (directory / name).is_file():
                raise BadInput(f"{directory}: {name}, which {index.name} lists, is not there")


def chat_template(directory: Path) -> str | None:
    """The chat template's text, from its own file or the tokenizer's configuration."""
    own_file = directory / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = _read_json(directory / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str | None) else json.dumps(template)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, not an object of JSON")
    return content


def model_files(directory: Path) -> tuple[FileDigest, ...]:
    """Path, size and sha256 of every file that is part of the model, sorted by path.

    Raises BadInput on a symbolic link that leaves the directory.
    """
    return all_files(directory, is_the_model)


def all_files(
    directory: Path, wanted: Callable[[Path], bool] = lambda _: True
) -> tuple[FileDigest, ...]:
    """The same of every file, or of those whose path inside the directory is wanted."""
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(directory.resolve()):
            raise BadInput(f"{path}: is a link that leaves the model directory; copy the file")
        name = path.relative_to(directory)
        if path.is_file() and wanted(name):
            found.append(
                FileDigest(
                    path=name.as_posix(), size_bytes=path.stat().st_size, sha256=digest_file(path)
                )
            )
    return tuple(found)


def is_the_model(name: Path) -> bool:
    """Whether a file in a model directory is part of the model, and of its hash."""
    hidden = any(part.startswith(".") for part in name.parts)
    return name.name not in _NOT_THE_MODEL and not hidden


def model_hash(files: tuple[FileDigest, ...]) -> str:
    """The model's identity: sha256 over its files' paths and contents."""
    return digest_json([[file.path, file.sha256] for file in files])


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model in a GGUF file (dequantised to fp32) as a Hugging Face directory at `target`.

    `target` appears whole or not at all.
    """
    import gguf
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sdft.pretrained import complete

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    loaded = complete(
        AutoModelForCausalLM.from_pretrained(**place, dtype="float32", output_loading_info=True),
        source,
    )
    config = loaded.config
    delattr(config, "quantization_config")  # or the saved model asks for the GGUF file again
    # A copy without the GGUF quantizer: transformers refuses to save the loaded model itself.
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**place)
    kind = gguf.GGUFReader(source).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":  # transformers drops its digit splitting
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.model_max_length = config.max_position_embeddings
    with placed(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
