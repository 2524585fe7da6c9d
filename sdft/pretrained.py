"""What transformers opens of a model directory: local files, safetensors, no code of the model's.

Raises BadInput for a directory that transformers cannot open.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from schemas.base import BadInput

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def open_config(directory: Path) -> Any:
    """The configuration of the part of a model that reads and writes text."""
    with _refused(directory):
        return AutoConfig.from_pretrained(directory, **_LOCAL).get_text_config()


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checked model directory."""
    with _refused(directory):
        return AutoTokenizer.from_pretrained(directory, **_LOCAL)


def open_weights(
    directory: Path, dtype: torch.dtype | str, attention: str | None = None
) -> PreTrainedModel:
    """The model, with all its weights from the directory's files."""
    with _refused(directory):
        opened = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention,
            output_loading_info=True,
            **_LOCAL,
        )
    return complete(opened, directory)


def complete(opened: Any, source: Path) -> PreTrainedModel:
    """The model of what was opened with loading information.

    Raises BadInput where weights were in no file: transformers has then drawn some.
    """
    model, loading = opened
    if missing := sorted(loading["missing_keys"]):
        raise BadInput(
            f"{source}: lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}; save the whole model anew"
        )
    return model


@contextmanager
def _refused(directory: Path) -> Generator[None]:
    try:
        yield
    except (ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise BadInput(
                f"{directory}: needs code of its own to be opened, and such code is never run; use "
                "a model that transformers knows by itself"
            ) from None
        said = str(error).strip().partition("\n")[0]
        raise BadInput(f"{directory}: transformers cannot open it: {said}") from error
