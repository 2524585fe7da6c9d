"""A frozen teacher's prompts, read once a stage: their keys and values are kept over its epochs.

They depend on nothing that a stage changes. What is kept lies in a file without a name, which goes
with its process; a stage that is resumed reads prompts again as it comes to them. The prompts of a
step of the first epoch are always read together, so that a prompt's states have the same bits
whenever that is.

Shapes: B sequences, S tokens of the prefix that all prompts share, P tokens of a prompt between it
and the last one, T tokens of an answer, L all of these, R rows (all completion tokens, sequence
after sequence), K heads, D width.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from schemas.stage import StageSpec
from sdft.files import disk_errors
from sdft.model import LanguageModel
from sdft.prefix import Prefix, has_plain_cache, shared_prefix
from sdft.schedule import batch, micro_batches, total_steps
from sdft.sharding import is_sharded
from sdft.teacher import Teacher

MOST_BYTES = 2**33
"""What a stage may keep on its disk; larger ones keep nothing."""
Prompt = tuple[int, ...]


def can_keep(model: PreTrainedModel) -> bool:
    """Whether a model takes states of prompts of several lengths, with positions, on a CPU."""
    places = inspect.signature(model.base_model.forward).parameters
    return model.device.type == "cpu" and has_plain_cache(model) and "position_ids" in places


def open_kept(
    lm: LanguageModel, teacher: Teacher, prompts: list[list[int]], spec: StageSpec, folder: Path
) -> "KeptPrompts | None":
    """The teacher's prompts of a stage; None where it would read none of them twice, or cannot."""
    settings, model = spec.training, teacher.model
    changes = bool(teacher.averages) or spec.runtime.compile or is_sharded(model)
    if settings.epochs == 1 or changes or not can_keep(model):
        return None
    groups = [
        [prompts[row] for row in batch(settings, len(prompts), spec.seed, step)]
        for step in range(total_steps(settings, len(prompts)) // settings.epochs)
    ]
    with torch.no_grad(), teacher.speaking(), lm.computing():
        kept = KeptPrompts(model, shared_prefix(model, prompts), groups, folder)
    return kept if kept.size_bytes <= MOST_BYTES else None


class KeptPrompts:
    """Prompts that all begin with `shared`, in the groups in which they are read."""

    def __init__(
        self,
        model: PreTrainedModel,
        shared: list[int],
        groups: Iterable[Sequence[list[int]]],
        folder: Path,
    ) -> None:
        self._model, self._shared = model, len(shared)
        states = Prefix(model, shared or [0]).pairs()
        self._ahead = [[one[:, :, : len(shared)] for one in pair] for pair in states]
        """The prefix's keys and values in each layer, [1, K, S, D]; S may be 0."""
        self._token_bytes = sum(one[0, :, :1].nbytes for pair in states for one in pair)
        self._groups: dict[Prompt, list[Prompt]] = {}
        for group in groups:
            new = [one for one in dict.fromkeys(map(tuple, group)) if one not in self._groups]
            self._groups |= dict.fromkeys(new, new)
        self._scratch = _Scratch(folder)
        self._places: dict[Prompt, list[list[int]]] = {}
        """Where the keys and values of a prompt's own tokens are, in each layer."""

    @property
    def size_bytes(self) -> int:
        """What there will be to keep."""
        return self._token_bytes * sum(map(self._own, self._groups))

    def hidden(self, prompts: list[list[int]], answers: list[list[int]], budget: int) -> Tensor:
        """[R, D]: what `completion_hidden` gives; prompts not read yet are, `budget` tokens a pass.

        Raises OSError where the disk is full.
        """
        asked = [tuple(prompt) for prompt in prompts]
        for prompt in asked:
            if prompt not in self._places:
                self._read(self._groups[prompt], budget)
        lengths_B = torch.tensor([*map(self._own, asked)])
        width, rows = int(lengths_B.max()), max(map(len, answers))
        ids_BT = torch.zeros(len(asked), rows, dtype=torch.long)
        rows_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for index, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            ids_BT[index, : len(answer)] = torch.tensor([prompt[-1], *answer[:-1]])
            rows_BT[index, : len(answer)] = True
        columns = torch.arange(self._shared + width + rows)  # prefix, padding, prompt, answer
        own_BL = columns >= self._shared + width - lengths_B[:, None]
        hidden_BTD = self._model.base_model(
            input_ids=ids_BT,
            attention_mask=own_BL | (columns < self._shared),
            position_ids=self._shared + lengths_B[:, None] + torch.arange(rows),
            past_key_values=self._cache(width, partial(self._kept, asked, width)),
            use_cache=True,
        ).last_hidden_state
        return hidden_BTD[rows_BT]

    def _own(self, prompt: Prompt) -> int:
        """Tokens of a prompt whose states are kept."""
        return len(prompt) - self._shared - 1

    def _read(self, group: list[Prompt], budget: int) -> None:
        """Have the states of these prompts in the file."""
        for part in micro_batches([*map(self._own, group)], budget):
            prompts = [group[index] for index in part]
            width = self._own(prompts[0])
            ids_BP = torch.zeros(len(part), width, dtype=torch.long)
            for row, prompt in zip(ids_BP, prompts, strict=True):
                row[: self._own(prompt)] = torch.tensor(prompt[self._shared : -1])
            places = [[[0, 0] for _ in self._ahead] for _ in prompts]
            cache = self._cache(0, partial(self._keep, prompts, places))
            if width:
                self._model.base_model(input_ids=ids_BP, past_key_values=cache, use_cache=True)
            self._places |= zip(prompts, places, strict=True)

    def _cache(self, tokens: int, behind: Callable[..., Tensor]) -> DynamicCache:
        """A cache of the prefix and so many tokens that `behind` gives."""
        cache = DynamicCache(config=self._model.config)
        layers: list[Any] = [
            _Lent(self._shared + tokens, ahead, partial(behind, number))
            for number, ahead in enumerate(self._ahead)
        ]
        cache.layers = layers
        return cache

    def _keep(
        self,
        prompts: list[Prompt],
        places: list[list[list[int]]],
        layer: int,
        kind: int,
        states_BKPD: Tensor,
    ) -> Tensor:
        """Write the states that a pass has made; behind the prefix there is nothing else then."""
        for prompt, place, states_KPD in zip(prompts, places, states_BKPD, strict=True):
            place[layer][kind] = self._scratch.write(states_KPD[:, : self._own(prompt)])
        return states_BKPD[:, :, :0]

    def _kept(
        self, prompts: list[Prompt], width: int, layer: int, kind: int, states_BKTD: Tensor
    ) -> Tensor:
        """[B, K, width, D]: states out of the file, padded on the left, for a pass with these."""
        _, heads, _, size = states_BKTD.shape
        kept_BKPD = states_BKTD.new_zeros(len(prompts), heads, width, size)
        for row, prompt in zip(kept_BKPD, prompts, strict=True):
            if length := self._own(prompt):
                place = self._places[prompt][layer][kind]
                states_KPD = row.new_empty(heads, length, size)
                self._scratch.read(place, states_KPD)
                row[:, width - length :] = states_KPD
        return kept_BKPD


class _Lent(DynamicLayer):
    """Puts a prefix, and what else is to be behind it, ahead of a pass's states; keeps nothing."""

    def __init__(self, tokens: int, ahead: list[Tensor], behind: Callable[..., Tensor]) -> None:
        super().__init__()
        self._tokens, self._ahead, self._behind = tokens, ahead, behind

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.cat([ahead.expand(len(own), -1, -1, -1), self._behind(kind, own), own], dim=-2)
            for kind, (ahead, own) in enumerate(
                zip(self._ahead, (key_states, value_states), strict=True)
            )
        )
        return keys, values

    def get_seq_length(self) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens + query_length, 0


class _Scratch:
    """A file without a name, so that nothing is left of it whatever becomes of the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (for the whole stage)

    def write(self, states: Tensor) -> int:
        """Write a tensor behind what is there; returns its place. Raises OSError."""
        place = self._file.seek(0, os.SEEK_END)
        with disk_errors(self._folder):
            self._file.write(_bytes(states.contiguous()))
            self._file.flush()
        return place

    def read(self, place: int, states: Tensor) -> None:
        """Fill a tensor that is contiguous with what was written there."""
        self._file.seek(place)
        self._file.readinto(_bytes(states))


def _bytes(states: Tensor) -> memoryview:
    return states.view(-1).view(torch.uint8).numpy().data
