"""A causal language model, opened for training or for answering.

Shapes: B sequences, T tokens, R loss rows, D hidden width, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from schemas.base import BadInput
from schemas.templates import Message
from sdft.modelfiles import check_model_dir


@dataclass(frozen=True)
class Head:
    """The output projection, apart from the model, so that it can be applied to chosen rows."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], in fp32 or wider."""
        logits_RV = nn.functional.linear(hidden_RD, self.weight_VD, self.bias_V)
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        if self.softcap is not None:
            logits_RV = self.softcap * torch.tanh(logits_RV / self.softcap)
        return logits_RV


@dataclass(frozen=True)
class LanguageModel:
    """Model, tokenizer and the few facts that the algorithm needs of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    end_of_turn: int
    max_positions: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    def head(self, model: PreTrainedModel | None = None) -> Head:
        """The output head of this model, or of a copy of it."""
        module = (model or self.model).get_output_embeddings()
        assert isinstance(module, nn.Linear), "checked when the model was opened"
        return Head(module.weight, module.bias, _softcap(self.model))

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The messages in the model's chat format, up to where the answer begins."""
        return render(self.tokenizer, messages)

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a conversation, up to where the answer begins."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(str(text), add_special_tokens=False)


def pick_device(setting: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise BadInput("runtime.device is 'cuda', but no CUDA device is there; use 'auto' or 'cpu'")
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checked model directory."""
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_model(directory: Path, device: torch.device) -> LanguageModel:
    """Open a model directory in fp32, ready to train; raises BadInput with what it lacks."""
    check_model_dir(directory)
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    _without_dropout(model)
    model.eval()
    model.to(device)  # pyright: ignore[reportArgumentType] transformers' stub of `to` is wrong
    loaded = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(model, tokenizer),
        end_of_turn=_end_of_turn(model, tokenizer),
        max_positions=max_positions(model.config),
    )
    _check_vocabulary(loaded)
    _check_head(loaded)
    return loaded


def _without_dropout(model: PreTrainedModel) -> None:
    """No dropout: the student that is trained must be the one that sampled and that will answer."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def max_positions(config: object) -> int:
    """The longest sequence that the model was made for, in tokens."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    many = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*many, eos_id(tokenizer)] if token is not None)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end-of-sequence token."""
    assert isinstance(tokenizer.eos_token_id, int), "checked when the model was opened"
    return tokenizer.eos_token_id


def _end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer in the chat format (Gemma's is not the tokenizer's EOS)."""
    question = [{"role": "user", "content": "q"}]
    start = render(tokenizer, question)
    answered = tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": "a"}], tokenize=False
    )
    answer = tokenizer.encode(str(answered), add_special_tokens=False)[len(start) :]
    endings = [token for token in answer if token in _eos_ids(model, tokenizer)]
    return endings[0] if endings else eos_id(tokenizer)


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def _check_vocabulary(loaded: LanguageModel) -> None:
    rows, tokens = loaded.model.config.get_text_config().vocab_size, len(loaded.tokenizer)
    if tokens > rows:
        raise BadInput(
            f"{loaded.model.name_or_path}: the tokenizer has {tokens} tokens, the model embeds "
            f"only {rows}; use the tokenizer that the model was trained with"
        )


@torch.no_grad()
def _check_head(loaded: LanguageModel) -> None:
    """The loss applies the head by itself; make sure that this is what the model does."""
    model = loaded.model
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise BadInput(
            f"{model.name_or_path}: its output head is not linear; such models cannot be trained"
        )
    ids_BT = torch.tensor(
        [loaded.prompt_ids([{"role": "user", "content": "a"}])[:8]], device=model.device
    )
    hidden_BTD = model.base_model(input_ids=ids_BT).last_hidden_state
    expected_BTV = model(input_ids=ids_BT).logits.float()
    if not torch.allclose(loaded.head().logits(hidden_BTD), expected_BTV, rtol=1e-3, atol=1e-3):
        raise BadInput(
            f"{model.name_or_path}: {type(model).__name__} does more between its last hidden state "
            "and its logits than a linear head and a soft cap; such models cannot be trained here"
        )
