"""The tokens with which all prompts of a stage begin, passed through the model once for all.

Chat prompts share their system message and the head of their template, teacher prompts often more.
The keys and values of these tokens depend on nothing after them.

Shapes: B sequences, T tokens of the prefix.
"""

import inspect
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sdft.attention import States, behind_prefix, can_attend_apart

LEAST_TOKENS = 8
"""A shorter prefix saves less than the pass through the model that it needs."""


def shared_prefix(model: PreTrainedModel, prompts: list[list[int]]) -> list[int]:
    """What all prompts begin with; each keeps at least one token after it.

    Empty where that is little, where there is nobody to share with, and for a model that cannot.
    """
    if len(prompts) < 2 or not has_plain_cache(model):
        return []
    common = list(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    return common if len(common) >= LEAST_TOKENS else []


class Prefix:
    """Keys and values of a prefix under a model as it is now.

    With gradients on, those with respect to the cached keys and values accumulate over all passes
    that use them; `backward` sends their sum through the prefix once.
    """

    def __init__(self, model: PreTrainedModel, tokens: list[int]) -> None:
        self.tokens, self._model = tokens, model
        self._made: list[Tensor] = []
        self._used: list[Tensor] = []
        if not tokens:
            return
        ids_1T = torch.tensor([tokens], device=model.device)
        cache = model.base_model(input_ids=ids_1T, use_cache=True).past_key_values
        self._made = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        self._used = [states.detach().requires_grad_(states.requires_grad) for states in self._made]

    @contextmanager
    def ahead_of(self, rows: int) -> Generator[DynamicCache | None]:
        """Inside, a pass over B whole sequences with this cache has the prefix ahead of them.

        None where there is no prefix.
        """
        states = self.pairs()
        if states and can_attend_apart(self._model, states):
            with behind_prefix(self._model, states) as cache:
                yield cache
        else:
            yield DynamicCache(self.pairs(rows)) if states else None

    def cache(self, rows: int, room: int) -> DynamicCache | None:
        """For decoding B sequences without gradients: begins with the prefix, if there is one.

        It has memory for `room` tokens a sequence. None where the model cannot use it.
        """
        if not has_plain_cache(self._model):
            return None
        cache = DynamicCache(config=self._model.config)
        layers: list[Any] = [PreallocatedLayer(room) for _ in cache.layers]
        for layer, (keys, values) in zip(layers, self.pairs(rows), strict=False):  # may be none
            layer.update(keys, values)
        cache.layers = layers
        return cache

    def pairs(self, rows: int = 1) -> list[States]:
        """Keys and values of each layer, for so many sequences."""
        wide = [states.expand(rows, *states.shape[1:]) for states in self._used]
        return list(zip(wide[::2], wide[1::2], strict=True))

    def backward(self) -> None:
        """Add the prefix's share of the gradient; call once, after the last pass that used it."""
        pairs = zip(self._made, self._used, strict=True)
        reached = [(made, used.grad) for made, used in pairs if used.grad is not None]
        if reached:
            torch.autograd.backward([made for made, _ in reached], [grad for _, grad in reached])


class PreallocatedLayer(DynamicLayer):
    """A cache layer with memory for `room` tokens.

    transformers' own copies everything as it grows.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._memory: list[Tensor] = []
        self._place_1: Tensor | None = None

    def write_at(self, place_1: Tensor) -> None:
        """From here on take one token at a time, where the tensor says, and show all the memory.

        So shapes and addresses stay, also while the number in the tensor is counted up.
        """
        self._place_1 = place_1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new states behind the known ones; returns views of all of them."""
        if not self._memory:
            self.lazy_initialization(key_states, value_states)
            self._memory = [self._empty(states) for states in (key_states, value_states)]
        pairs = zip(self._memory, (key_states, value_states), strict=True)
        if self._place_1 is not None:
            for memory, states in pairs:
                memory.index_copy_(-2, self._place_1, states.to(memory.dtype))
            return self._memory[0], self._memory[1]
        known = self.get_seq_length()
        end = known + key_states.shape[-2]
        for memory, states in pairs:
            memory[..., known:end, :] = states
        self.keys, self.values = (memory[..., :end, :] for memory in self._memory)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows only."""
        known = self._room if self._place_1 is not None else self.get_seq_length()
        kept = [memory[..., :known, :][beam_idx] for memory in self._memory]
        self._memory = [self._empty(states) for states in kept]
        for memory, states in zip(self._memory, kept, strict=True):
            memory[..., :known, :] = states
        self.keys, self.values = (memory[..., :known, :] for memory in self._memory)

    def _empty(self, states: Tensor) -> Tensor:
        """Zeros, for what is masked must be a number, in the dtype that attention multiplies in."""
        device = states.device.type
        lower = torch.is_autocast_enabled(device)
        return states.new_zeros(
            *states.shape[:-2],
            self._room,
            states.shape[-1],
            dtype=torch.get_autocast_dtype(device) if lower else states.dtype,
        )


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether a model keeps plain keys and values of all tokens in every layer."""
    if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)
