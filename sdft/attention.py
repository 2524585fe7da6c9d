"""Attention for sequences with a shared prefix, apart from that to each sequence's own tokens.

What a token attends to falls into two parts; each is attended to by itself, and the two answers
are weighted by their sums of exponentials (Juravsky et al., Hydragen, arXiv 2402.05099). So keys
and values of the shared part lie in memory once, not once a sequence, and all queries meet them in
one product.

Shapes: B sequences, P tokens of the prefix, T tokens after it, H heads, K heads of keys and values,
G = H / K, D width of a head.
"""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "_attn_implementation"
"""Where transformers looks up, in each pass, which attention a model's configuration names."""
BEHIND_PREFIX = "sdft_behind_prefix"
"""The name of ours."""
States = tuple[Tensor, Tensor]
"""Keys and values of a layer, [1, K, P, D] each."""


def can_attend_apart(model: PreTrainedModel, states: Sequence[States]) -> bool:
    """Whether a model on a CPU looks its attention up, by name, in the table that all share.

    One that is compiled would be compiled anew for each pass; values as wide as their keys are what
    torch's flash attention wants (those of latent attention are not).
    """
    module = sys.modules[type(model).__module__]
    looks_up = getattr(module, "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS
    plain = looks_up and getattr(model.config, ATTENTION) == "sdpa"
    is_compiled = getattr(model.base_model, "_compiled_call_impl", None) is not None
    alike = all(keys.shape == values.shape for keys, values in states)
    return model.device.type == "cpu" and plain and alike and not is_compiled


@contextmanager
def behind_prefix(model: PreTrainedModel, states: Sequence[States]) -> Generator[DynamicCache]:
    """Inside, a pass with this cache attends to a prefix too; given are its states in each layer.

    It is for a pass over whole sequences, padded on the right if at all.
    """

    def attend(
        module: nn.Module,
        query_BHTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None, "whole sequences, padded on the right, need none"
        assert others.get("position_bias") is None, "is of encoders and decoders"
        layer = module.layer_idx
        assert isinstance(layer, int), "transformers numbers the layers that have a cache"
        tensors = [query_BHTD, key_BKTD, value_BKTD, *states[layer]]
        return attend_apart(tensors, scaling).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS[BEHIND_PREFIX] = attend
    ALL_MASK_ATTENTION_FUNCTIONS[BEHIND_PREFIX] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    cache = DynamicCache(config=model.config)
    layers: list[Any] = [_Behind(keys.shape[-2]) for keys, _ in states]
    cache.layers = layers
    config, usual = model.config, getattr(model.config, ATTENTION)
    setattr(config, ATTENTION, BEHIND_PREFIX)
    try:
        yield cache
    finally:
        setattr(config, ATTENTION, usual)
        del ALL_ATTENTION_FUNCTIONS[BEHIND_PREFIX]
        del ALL_MASK_ATTENTION_FUNCTIONS[BEHIND_PREFIX]


class _Behind(DynamicLayer):
    """Counts the tokens of the prefix; of keys and values it gives the pass's own back."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self._tokens


def attend_apart(tensors: Sequence[Tensor], scale: float | None) -> Tensor:
    """[B, H, T, D] of queries [B, H, T, D], own keys and values [B, K, T, D], and the prefix's.

    To their own, sequences attend causally; the prefix's are [1, K, P, D]. Differentiable; for
    tensors on a CPU.
    """
    if torch.is_autocast_enabled("cpu"):
        tensors = [one.to(torch.get_autocast_dtype("cpu")) for one in tensors]
    return _Apart.apply(*tensors, scale)


class _Apart(torch.autograd.Function):
    """A gradient with respect to either part needs only the answer and the sum of both."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, prefix_key, prefix_value, scale = inputs
        own, own_sum = _flash(query, key, value, True, scale)
        begin, begin_sum = _flash(_gathered(query, key), prefix_key, prefix_value, False, scale)
        begin, begin_sum = _parted(begin, query), _parted(begin_sum[..., None], query)[..., 0]
        log_sum = torch.logaddexp(own_sum, begin_sum)
        answer = own * (own_sum - log_sum).exp()[..., None].to(own.dtype)
        answer += begin * (begin_sum - log_sum).exp()[..., None].to(own.dtype)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, answer, log_sum)
        ctx.scale = scale
        return answer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, answer, log_sum = ctx.saved_tensors
        [grad] = grads
        grad_query, grad_key, grad_value = _flash_backward(
            (grad, query, key, value, answer, log_sum), True, ctx.scale
        )
        grad, rows, answer, log_sum = (
            _gathered(one, key) for one in (grad, query, answer, log_sum[..., None])
        )
        grad_rows, grad_prefix_key, grad_prefix_value = _flash_backward(
            (grad, rows, prefix_key, prefix_value, answer, log_sum[..., 0]), False, ctx.scale
        )
        grad_query = grad_query + _parted(grad_rows, query)
        return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, None


def _gathered(rows_BHTX: Tensor, key_BKTD: Tensor) -> Tensor:
    """[1, K, B*G*T, X]: all rows that meet the same head of the prefix."""
    heads = key_BKTD.shape[1]
    grouped = rows_BHTX.unflatten(1, (heads, -1)).transpose(0, 1)
    return grouped.reshape(1, heads, -1, rows_BHTX.shape[-1])


def _parted(rows_1KRX: Tensor, query_BHTD: Tensor) -> Tensor:
    """[B, H, T, X]: what `_gathered` put together."""
    sequences, heads, tokens, _ = query_BHTD.shape
    kinds, width = rows_1KRX.shape[1], rows_1KRX.shape[-1]
    grouped = rows_1KRX.view(kinds, sequences, heads // kinds, tokens, width)
    return grouped.transpose(0, 1).reshape(sequences, heads, tokens, width)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of each row's sum of exponentials."""
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )


def _flash_backward(
    tensors: tuple[Tensor, ...], causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value."""
    grad, query, key, value, answer, log_sum = tensors
    groups = query.shape[1] // key.shape[1]
    wide = [one.repeat_interleave(groups, 1) for one in (key, value)]
    by_query, *others = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, *wide, answer, log_sum, 0.0, causal, scale=scale
    )
    by_key, by_value = (one.unflatten(1, (-1, groups)).sum(2) for one in others)
    return by_query, by_key, by_value
