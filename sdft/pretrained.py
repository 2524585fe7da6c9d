"""What transformers opens of a model directory: local files, safetensors, no code of the model's.

Raises BadInput for a directory that transformers cannot open.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from schemas.base import BadInput

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def open_config(directory: Path) -> Any:
    """The configuration of the part of a model that reads and writes text."""
    with _refused(directory):
        return AutoConfig.from_pretrained(directory, **_LOCAL).get_text_config()


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checked model directory; its chat template can render a question."""
    question = [{"role": "user", "content": "q"}]
    with _refused(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, **_LOCAL)
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return tokenizer


def open_weights(
    directory: Path, dtype: torch.dtype | str, attention: str | None = None
) -> PreTrainedModel:
    """The model, with all its weights from the directory's files.

    Its attention is what transformers takes by itself where the model's class has no such one.
    """
    settings = {
        "dtype": dtype,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # `complete` tells them
        "output_loading_info": True,
        **_LOCAL,
    }
    open_with = partial(AutoModelForCausalLM.from_pretrained, directory, **settings)
    with _refused(directory):
        try:
            opened = open_with(attn_implementation=attention)
        except ValueError:  # raised before any weight is read; any other comes again
            if attention is None:
                raise
            opened = open_with()
    return complete(opened, directory)


def complete(opened: Any, source: Path) -> PreTrainedModel:
    """The model of what was opened with loading information.

    Raises BadInput where weights were in no file, or of other shapes: transformers has then drawn
    some.
    """
    model, loading = opened
    if mismatched := sorted(loading["mismatched_keys"]):
        name, there, expected = mismatched[0]
        raise BadInput(
            f"{source}: {name} has the shape {list(there)}, by config.json it would have "
            f"{list(expected)}; use the config.json that the weights were saved with"
        )
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
    except TemplateError as error:
        raise BadInput(
            f"{directory}: its chat template cannot render a question: {error}"
        ) from None
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise BadInput(f"{directory}: its config.json cannot be used: {said}") from None
    except (ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise BadInput(
                f"{directory}: needs code of its own to be opened, and such code is never run; use "
                "a model that transformers knows by itself"
            ) from None
        said = str(error).strip().partition("\n")[0]
        raise BadInput(f"{directory}: transformers cannot open it: {said}") from error
