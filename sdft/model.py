"""A causal language model, opened for training or for answering.

Shapes: B sequences, T tokens, R loss rows, D hidden width, V vocabulary.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.import_utils import is_flash_attn_2_available

from schemas.base import BadInput
from schemas.templates import Message
from sdft.attention import ATTENTION
from sdft.linear import linear
from sdft.modelfiles import check_model_dir
from sdft.pretrained import open_tokenizer, open_weights
from sdft.ranks import whole
from sdft.scoring import can_pack, keeps_apart


@dataclass(frozen=True)
class Head:
    """The output projection, apart from the model, so that it can be applied to chosen rows."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head; its products in this dtype."""
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return Head(self.weight_VD.to(dtype), bias_V, self.softcap)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], in fp32 or wider, from hidden states of the head's dtype."""
        logits_RV = linear(hidden_RD, self.weight_VD, self.bias_V)
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
    compute: torch.dtype = torch.float32
    """What matrix products are made in while it is trained."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def computing(self) -> AbstractContextManager[object]:
        """Inside, matrix products are made in the compute dtype; gradients are made outside."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute)

    def head(self, model: PreTrainedModel | None = None) -> Head:
        """The output head of this model, or of a copy of it."""
        module = output_head(model or self.model)
        return Head(whole(module.weight), whole(module.bias), _softcap(self.model))

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The messages in the model's chat format, up to where the answer begins."""
        return render(self.tokenizer, messages)

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of hidden states."""
    module = model.get_output_embeddings()
    assert isinstance(module, nn.Linear), "checked when the model was opened"
    return module


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


def pick_compute(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for `auto`, `fp32` or `bf16`."""
    if setting == "auto":
        setting = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.bfloat16 if setting == "bf16" else torch.float32


def gpu_memory(lm: LanguageModel) -> dict[str, float]:
    """Metrics of a GPU's memory: the most so far, in bytes; none on a CPU."""
    if lm.device.type != "cuda":
        return {}
    return {
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(lm.device),
        "gpu_reserved_bytes": torch.cuda.memory_reserved(lm.device),
    }


def load_model(
    directory: Path,
    device: torch.device,
    compute: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
) -> LanguageModel:
    """Open a model directory, ready to train; raises BadInput with what it lacks.

    Weights that are to learn must be in fp32, whatever they are multiplied in.
    """
    check_model_dir(directory)
    tokenizer = open_tokenizer(directory)
    model = open_weights(directory, weights, _attention(device, compute))
    _check_cache(model)
    _without_dropout(model)
    model.eval()
    move(model, device)
    loaded = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(model, tokenizer),
        end_of_turn=_end_of_turn(model, tokenizer),
        max_positions=max_positions(model.config.get_text_config()),
        compute=compute,
    )
    _check_vocabulary(loaded)
    with loaded.computing():  # flash attention takes no fp32
        _check_head(loaded)
        if can_pack(model) and not keeps_apart(model):
            setattr(model.config, ATTENTION, model.get_correct_attn_implementation(None))
    return loaded


def move(model: PreTrainedModel, where: torch.device) -> None:
    """Take a model to a device, in place."""
    model.to(where)  # pyright: ignore[reportArgumentType] transformers' stub of `to` is wrong


def _attention(device: torch.device, compute: torch.dtype) -> str | None:
    """Flash attention where it is installed and the device has it; else what transformers takes."""
    usable = device.type == "cuda" and compute == torch.bfloat16 and is_flash_attn_2_available()
    return "flash_attention_2" if usable else None


def _without_dropout(model: PreTrainedModel) -> None:
    """No dropout: the student that is trained must be the one that sampled and that will answer."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def max_positions(config: object) -> int:
    """The longest sequence that a model with this text configuration was made for, in tokens."""
    named = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    return next((limit for name in named if (limit := getattr(config, name, None))), 2**31)


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


def _check_cache(model: PreTrainedModel) -> None:
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise BadInput(
            f"{model.name_or_path}: a {type(model).__name__} keeps no past_key_values to answer "
            "with; such models cannot be trained here"
        )


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
    if not expected_BTV.isfinite().all():
        raise BadInput(f"{model.name_or_path}: its logits are not finite; its weights are damaged")
    exact = model.dtype == loaded.compute == torch.float32
    within = 1e-3 if exact else 5e-2  # a soft cap may be made in the model's dtype
    made_BTV = loaded.head().logits(hidden_BTD)
    if not torch.allclose(made_BTV, expected_BTV, rtol=within, atol=within):
        raise BadInput(
            f"{model.name_or_path}: {type(model).__name__} does more between its last hidden state "
            "and its logits than a linear head and a soft cap; such models cannot be trained here"
        )
